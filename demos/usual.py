"""How a data set usually is, as plain numbers in the units of the file: what a checkpoint keeps of it for
robot/preflight.py."""
import contextlib
import itertools

import numpy as np

from demos.doctor_cameras import look_at
from demos.files import open_file
from demos.motion import MOST_STEPS, pairs_of
from robot.looks import distance, spread

PICTURES = 64                   # of each camera, from as many episodes


def usual_of(episodes, state_keys, cameras, fps, colour):
    """{
    actions, state    {low, high: smallest and largest value, step: largest change in one step}, a number for
                      each dimension; the state keys stand side by side
    first_jump        [action, number of the state, largest distance of the two at the same step] for those in
                      the same unit: how far a robot may be told to go from where it stands
    looks             camera -> {mean: 8 x 8 colours (robot/looks.py), far: of the picture least like it}
    colour            of JPEG frames
    }, over these episodes, which are not empty."""
    ends, kept, steps = {"actions": [], "state": []}, [], 0
    for actions, state in read_numbers(episodes, state_keys):
        for kind, x in (("actions", actions), ("state", state)):
            moved = abs(np.diff(x, axis=0)).max(0) if len(x) > 1 else 0 * x[0]
            ends[kind].append((x.min(0), x.max(0), moved))
        if steps < MOST_STEPS:
            kept.append((actions, state))
            steps += len(actions)
    actions, state = (np.concatenate(parts) for parts in zip(*kept))
    lengths = np.array([len(part) for part, _ in kept])
    jumps = [[p.action, p.state, float(abs(actions[:, p.action] - state[:, p.state]).max())]
             for p in pairs_of(actions, state, lengths, fps) if p.kind == "position"]
    found = {"first_jump": jumps, "looks": looks_of(episodes, cameras, colour), "colour": colour}
    for kind, of_episode in ends.items():
        low, high, step = zip(*of_episode)
        found[kind] = {"low": np.min(low, 0).tolist(), "high": np.max(high, 0).tolist(),
                       "step": np.max(step, 0).tolist()}
    return found


def read_numbers(episodes, state_keys):
    """(actions (T, A), state (T, S)) float32 of each episode; a file that holds several is opened once."""
    for path, those in itertools.groupby(episodes, key=lambda e: e.file):
        with contextlib.closing(open_file(path)) as file:
            for e in those:
                parts = [file[array.path][e.begin:].reshape(e.length, -1).astype(np.float32)
                         for array in (e.actions, *(e.obs[key] for key in state_keys))]
                yield parts[0], np.concatenate([parts[0][:, :0], *parts[1:]], axis=1)


def looks_of(episodes, cameras, colour):
    some = spread(len(episodes), PICTURES) if cameras else []
    looks = {key: [] for key in cameras}
    for i, number in enumerate(some):
        e = episodes[number]
        last = e.length - 1
        steps = sorted({e.begin + i * last // max(1, len(some) - 1), e.begin + last // 2})
        with contextlib.closing(open_file(e.file)) as file:
            for key in [key for key in cameras if key in e.obs]:
                looks[key] += list(look_at(file, e.obs[key], steps, colour).looks)
    means = {key: np.mean(x, axis=0).round() for key, x in looks.items() if x}
    return {key: {"mean": mean.astype(int).tolist(), "far": max(distance(x, mean) for x in looks[key])}
            for key, mean in means.items()}
