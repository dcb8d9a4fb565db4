"""The layout of the generated sets: all episodes in a row, so that thousands of them open at once. (In
robomimic's layout, every episode has its own objects in the file, and finding them takes seconds.) For
demonstrations of your own, robomimic's is the better choice: other programs know it.

    actions         (N, A) float32
    obs/<key>       (N, D) float32: state; (N, H, W, 3) uint8, RGB: camera
    episode_ends    (E,): episode e ends before this step
    instructions    (E,) texts
    rollouts        (E,): episodes with the same number are held out together
    attributes      fps, action_names in JSON
"""
import collections.abc
import json
from pathlib import Path

import numpy as np

from demos.episodes import Array, Episode, Rows, kind_of
from robot.errors import UserError, few

FRAMES = 32                     # of a camera that are compressed together


class Flat(collections.abc.Mapping):
    """An open file: {"<episode>/actions" and "<episode>/obs/<key>": rows by [i] or [lo:hi]}. Numbers are read
    whole, the first time that somebody asks for them."""

    def __init__(self, file):
        self.file, self.ends = file, file["episode_ends"][:].tolist()
        self.starts = [0, *self.ends[:-1]]
        self.arrays = {"actions": file["actions"]} | {f"obs/{key}": x for key, x in file["obs"].items()}

    def __getitem__(self, name):
        e, _, key = name.partition("/")
        if not e.isdigit() or int(e) >= len(self.ends) or key not in self.arrays:
            raise KeyError(name)
        lo, hi = self.starts[int(e)], self.ends[int(e)]
        if self.arrays[key].ndim < 4:
            self.arrays[key] = self.arrays[key][:]
        return Rows(hi - lo, lambda a, b: self.arrays[key][lo + a:lo + b])

    def __iter__(self):
        return (f"{e}/{key}" for e in range(len(self.ends)) for key in self.arrays)

    def __len__(self):
        return len(self.ends) * len(self.arrays)

    def close(self):
        self.file.close()


def is_flat(file):
    """Whether an h5py.File has this layout."""
    return all(name in file for name in ("actions", "obs", "episode_ends", "instructions", "rollouts"))


def matches(file):
    return isinstance(file, Flat)


def episodes(path, file):
    """The episodes of an open file, see demos/files.py."""
    attributes, name = file.file.attrs, Path(path).name
    steps = {key: len(x) for key, x in file.arrays.items()}
    if sorted(set(file.ends)) != file.ends or set(steps.values()) != {file.ends[-1]}:
        raise UserError(f"{path} is damaged, its episodes end at {file.ends[-1]} and it has the steps "
                        f"{few(f'{key}: {n}' for key, n in steps.items())}: delete it, and it is made anew")
    instructions, rollouts = file.file["instructions"].asstr()[:], file.file["rollouts"][:].tolist()
    found = []
    for e, (lo, hi) in enumerate(zip(file.starts, file.ends)):
        shapes = {key: ((hi - lo, *x.shape[1:]), x.dtype) for key, x in file.arrays.items()}
        arrays = {key.removeprefix("obs/"): Array(f"{e}/{key}", shape, dtype, *kind_of(key, shape, dtype))
                  for key, (shape, dtype) in shapes.items()}
        found.append(Episode(file=str(path), name=f"{name}:demo_{e}", actions=arrays.pop("actions"),
                             obs=arrays, fps=float(attributes["fps"]), instruction=instructions[e],
                             action_names=json.loads(attributes["action_names"]),
                             rollout=(str(path), rollouts[e])))
    return found


def write(file, demos, fps, action_names):
    """Fill an open h5py.File with the dicts of demos/generated.py. Pictures are written as they come, numbers
    at the end."""
    numbers, cameras, about, end = {}, {}, {"episode_ends": [], "instructions": [], "rollouts": []}, 0
    for demo in demos:
        start, end = end, end + len(demo["actions"])
        for key, x in {"actions": demo["actions"], **{f"obs/{k}": x for k, x in demo["obs"].items()}}.items():
            if x.ndim < 4:
                numbers.setdefault(key, []).append(x)
                continue
            if key not in cameras:      # rendered images shrink to a few per cent even at the fastest level
                cameras[key] = file.create_dataset(
                    key, (0, *x.shape[1:]), x.dtype, maxshape=(None, *x.shape[1:]),
                    chunks=(FRAMES, *x.shape[1:]), compression=1)
            cameras[key].resize(end, axis=0)
            cameras[key][start:] = x
        for key, value in zip(about, (end, demo["instruction"], demo["episode"])):
            about[key].append(value)
    for key, parts in numbers.items():
        file[key] = np.concatenate(parts)
    for key, values in about.items():
        file[key] = values
    file.attrs.update(fps=float(fps), action_names=json.dumps(action_names))
