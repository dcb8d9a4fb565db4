"""Demonstrations of the built-in task, as a file like any other: made on first use, then kept.

`python -m demos.generated` times a hundred of them.
"""
import contextlib
import hashlib
import io
import os
import time
from pathlib import Path

import h5py
import numpy as np

from demos import flat
from robot import tabletop
from robot.errors import run_command, say, user_path, written_aside
from robot.tabletop import FPS, MAX_STEPS, REACH, Expert, Tabletop, render

WHOLE = 3                               # with cameras, one rollout in so many goes on after the grasp
DEMO_SEEDS = 10**9                      # demonstrations use the seeds from here on; evaluate on smaller ones


def segments(n, seed=0, cameras=False, image_size=64, robot=Tabletop):
    """Perturbed expert rollouts in segments, one after the other: {"actions" (T, 3) float32, "obs" {key: (T,
    ...)} with Tabletop's keys, "instruction" str, "episode" int}. A larger n gives the same ones, continued.
    robot: one of ROBOTS.

    A policy that has only seen the perfect path does not know how to return to it. So the hand is made to
    tremble (correlated noise on the set-point), and at times it is kicked: for some steps it goes elsewhere,
    mostly closing on nothing, and the expert has to recover. What is recorded is always what the expert
    wanted, never what the perturbation made of it.

    A kick is nobody's intention, so its steps are no data. The rollout is cut there: a segment ends with the
    last step before a kick, the next one begins with the first step after it; single steps are dropped.
    With cameras, one rollout in WHOLE is recorded to its end, the others only up to the grasp: what has to be
    found in the pictures is the block, and of a whole rollout three steps in four come after that.
    "episode" numbers the rollouts, so that validation can keep whole ones apart; those that failed in spite
    of all (a few per hundred) are left out, and their numbers with them.
    """
    env = robot(n, cameras=False)
    obs, info = env.reset(DEMO_SEEDS + seed * 10**6 + np.arange(n))
    expert = Expert(env, [seed, 0])
    # Drawn as (n, steps, ...), from one stream each: a row is then the same however many rows follow.
    tremble = np.random.default_rng([seed, 1]).normal(0, 0.01, (n, MAX_STEPS, 2))
    dice = np.random.default_rng([seed, 2]).random((n, MAX_STEPS, 4))
    whole = (np.arange(n) % WHOLE == 0) | (not cameras)
    noise, left, heading, shut = np.zeros((n, 2)), np.zeros(n, int), np.zeros((n, 2)), np.zeros(n, bool)
    history = {"actions": [], "obs": [], "real": []}
    for t in range(robot.max_steps * robot.fps // FPS):
        clean = expert.act(obs)
        # A kick begins: more often before the grasp, for 2 to 6 steps, anywhere to, fingers mostly shut.
        # A hand that holds a block keeps hold of it, since a release in a zone would end the episode.
        when, how_long, where_to, fingers = dice[:, t].T
        holding = env.held >= 0
        new = (left == 0) & (when < np.where(holding, 0.02, 0.07))
        left = np.where(new, 2 + (5 * how_long).astype(int), left)
        angle = 2 * np.pi * where_to
        heading[new] = REACH * np.column_stack([np.cos(angle), np.sin(angle)])[new]
        shut = np.where(new, holding | (fingers < 0.75), shut)
        kicked = left > 0
        left = np.maximum(left - 1, 0)

        history["actions"].append(env.command(clean))
        history["obs"].append(obs)
        history["real"].append((env.outcome == "running") & ~kicked & (whole | ~holding))
        noise = 0.9 * noise + np.sqrt(1 - 0.9**2) * tremble[:, t]           # same variance, correlated
        done = clean + np.column_stack([noise, np.zeros(n)])
        pushed = np.column_stack([env.gripper + heading, np.where(shut, 1, -1)])
        obs, _, terminated, _, info = env.step(env.command(np.where(kicked[:, None], pushed, done)))
        if terminated.all():
            break

    # (n, steps, ...) again, then cut where `real` rises and falls.
    actions = np.stack(history["actions"], axis=1)
    seen = {key: np.stack([o[key] for o in history["obs"]], axis=1) for key in obs}
    real = np.pad(np.stack(history["real"], axis=1), ((0, 0), (1, 1))).astype(np.int8)
    starts, ends = np.argwhere(np.diff(real) == 1), np.argwhere(np.diff(real) == -1)
    for (i, start), (_, end) in zip(starts, ends):
        if info["success"][i] and end - start >= 2:
            part = {key: value[i, start:end].copy() for key, value in seen.items()}
            if cameras:                 # drawn only now, and no picture to be thrown away
                part.update(render(part, image_size))
            yield {"actions": actions[i, start:end].copy(), "obs": part,
                   "instruction": info["instruction"][i], "episode": int(i)}


@contextlib.contextmanager
def new_hdf5(path):
    """An h5py.File to fill, written to `path` as a whole. It grows in memory, because HDF5 does not survive a
    full disk: it prints an error for every object and may crash."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        yield file
    with written_aside(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def tabletop_file(cameras, rollouts, seed, cache, robot="tabletop"):
    """The generated set, as a file like any other: made on first use, and anew when the task changes."""
    rollouts = rollouts or (2000 if cameras else 1000)
    sources = b"".join(Path(module).read_bytes() for module in (tabletop.__file__, __file__, flat.__file__))
    version = hashlib.sha256(sources).hexdigest()[:8]
    folder = cache or os.environ.get("ACTION_DIFFUSION_CACHE") or "~/.cache/action_diffusion"
    name = f"{robot}_{rollouts}_{'cameras' if cameras else 'lowdim'}_seed{seed}_{version}.hdf5"
    path = user_path(folder) / name
    if path.exists():
        return path
    say(f"generating {rollouts} demonstrations, kept in {path}")
    robot = tabletop.ROBOTS[robot]
    with new_hdf5(path) as file:
        flat.write(file, segments(rollouts, seed=seed, cameras=cameras, robot=robot), robot.fps,
                   robot.action_names)
    return path


def write_demo(group, actions, obs, instruction):
    """One demonstration into its group, in robomimic's layout."""
    group.attrs.update(num_samples=len(actions), language_instruction=instruction)
    group["actions"] = actions
    for key, x in obs.items():
        # Rendered images shrink to a few per cent even at the fastest level.
        packed = {"chunks": (min(16, len(x)), *x.shape[1:]), "compression": 1} if x.ndim == 4 else {}
        group.create_dataset(f"obs/{key}", data=x, **packed)


def main():
    began = time.perf_counter()
    frames = sum(len(segment["actions"]) for segment in segments(100, cameras=True))
    print(f"100 demonstrations with both cameras, {frames} steps: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    run_command(main)
