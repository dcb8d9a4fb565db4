"""Demonstrations of Meta-World's tasks by its own experts, as an HDF5 file like any other.

    python -m demos.metaworld --tasks pick-place-v3 push-v3 --demos 50 --out mw.hdf5
    python -m demos.metaworld --tasks push-v3 --demos 50 --images --out mw_push.hdf5    needs a way to render

The expert's hand trembles: noise is added to what is executed and not to what is recorded. So the set shows
how to come back to the way, which a policy needs as soon as it has left it. An episode is kept if the task
was done, and ends HOLD steps after that. With --images it holds the picture and the hand's own position and
opening, and not where the objects are. Seeds begin at demos.generated.DEMO_SEEDS, far from those of the
evaluation; the scene of a seed is always the same.
"""
import math

import numpy as np
from tqdm import tqdm

from demos.generated import DEMO_SEEDS, new_hdf5, write_demo
from robot.cli import SEEDS, Parser
from robot.errors import UserError, run_command, say, user_path
from robot.metaworld import FPS, Scene, expert_of, tasks_of, words_of

HOLD = 10                               # steps that are kept after the task was done
PATIENCE = 300                          # an expert that takes longer has failed
NOISE = 0.1                             # standard deviation of the trembling, in units of the action


def demonstration(scene, expert, seed, noise):
    """One episode from the scene of this seed, {"actions" (T, 4), "obs": {key: (T, ...)}} float32 (pictures
    uint8), or None if the expert failed."""
    keys = ("hand", *scene.cameras) if scene.cameras else ("state", "task")
    rng = np.random.default_rng(seed)
    obs, _ = scene.reset(seed)
    actions, seen, done_at = [], [], math.inf
    while len(actions) < min(PATIENCE, done_at + HOLD):
        wanted = expert(obs["state"])
        actions.append(wanted)
        seen.append({key: np.array(obs[key]) for key in keys if key in obs})    # pictures are drawn here
        # The fingers do not tremble: what they hold would fall.
        shaken = wanted + noise * np.append(rng.standard_normal(3), 0)
        obs, _, success, _, _ = scene.step(np.clip(shaken, -1, 1).astype(np.float32))
        done_at = min(done_at, len(actions)) if success else done_at
    if done_at > PATIENCE:
        return None
    return {"actions": np.stack(actions), "obs": {key: np.stack([s[key] for s in seen]) for key in seen[0]}}


def generate(tasks, demos, out, images=False, image_size=(96, 96), noise=NOISE, seed=0):
    """Write `out`: so many demonstrations of each task, task after task. Raises UserError."""
    tasks, out = tasks_of(tasks), user_path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another name")
    scenes = [Scene(task, tasks, ("image",) if images else (), image_size) for task in tasks]
    if images:
        scenes[0].reset(0)
        scenes[0].render()              # where this fails, nothing was generated yet
    with new_hdf5(out) as file, tqdm(total=demos * len(tasks), unit="demo") as bar:
        data = file.create_group("data")
        data.attrs.update(format_version=1, fps=float(FPS))
        for task, scene in zip(tasks, scenes):
            expert, kept, tried = expert_of(task), 0, 0
            while kept < demos:
                demo = demonstration(scene, expert, DEMO_SEEDS + 10**6 * seed + tried, noise)
                tried += 1
                if demo is not None:
                    group = data.create_group(f"demo_{bar.n}")
                    write_demo(group, demo["actions"], demo["obs"], words_of(task))
                    kept += 1
                    bar.update()
                elif tried > 20 and kept < tried / 5:
                    raise UserError(f"{task}: with noise {noise:g} the expert succeeds in {kept} of {tried} "
                                    f"scenes: lower --noise, or leave the task out")
            if tried > kept:
                say(f"{task}: the expert failed in {tried - kept} of {tried} scenes, which are left out")


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="for example pick-place-v3")
    parser.add_argument("--demos", type=int, default=50, help="of each task (default: 50)")
    parser.add_argument("--out", required=True, help="HDF5 file to write; must not exist")
    parser.add_argument("--images", action="store_true", help="with the pictures of a camera")
    parser.add_argument("--image_size", type=int, nargs=2, default=[96, 96], metavar=("H", "W"))
    parser.add_argument("--noise", type=float, default=NOISE, help=f"of the expert's hand (default: {NOISE})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse(argv, {"demos": (1, 10**5), "image_size": (8, 1024), "noise": (0, 1), "seed": SEEDS})
    generate(args.tasks, args.demos, args.out, args.images, tuple(args.image_size), args.noise, args.seed)
    print(f"{args.out} is written. python -m demos.check {args.out} tells what is in it.")


if __name__ == "__main__":
    run_command(main)
