"""robomimic's layout, the native one; what stands in brackets may be left out:

    data/demo_<i>/actions      (T, A) float
    data/demo_<i>/obs/<key>    (T, D) float: state
    data/demo_<i>/obs/<key>    (T, H, W, 3) uint8, RGB: camera
    [mask/train, mask/valid]   which demos are held out: names, numbers, or one boolean for each demo
    attributes of demo_<i>     [num_samples]; [rollout], demos with the same number are held out together
    ... or of data, the file   [fps] [language_instruction] [action_names]
"""
import re
from pathlib import Path

import h5py
import numpy as np

from demos.hdf5 import children, make_episode, plain
from robot.errors import UserError, few, nearest


def matches(file):
    return isinstance(file.get("data"), h5py.Group)


def episodes(path, file):
    """The episodes of an open file, see demos/files.py."""
    data, name = file["data"], Path(path).name
    demos = {key: demo for key, demo in children(data, name) if re.fullmatch(r"demo_\d+", key)}
    demos = {key: demos[key] for key in sorted(demos, key=lambda key: int(key[5:]))}   # demo_2, then demo_10
    splits, fault, note = read_masks(file, list(demos))
    others = [key for key, x in children(data, name) if isinstance(x, h5py.Group) and key not in demos]
    note += [f"data/ also holds {few(others, 4)}, which are not read: rename them to demo_<i>"] * bool(others)
    found = []
    for d, demo in demos.items():
        parts = dict(children(demo, f"{name}:{d}"))
        for part in ("actions", "obs"):
            if part not in parts:
                raise UserError(f"{name}:{d} holds {few(parts)}, but no '{part}'{nearest(part, parts)}")
        rollout = plain(demo.attrs.get("rollout", d), f"{name}:{d}: rollout")
        found.append(make_episode(path, f"{name}:{d}", f"/data/{d}", demo, "actions", "obs",
                                  [demo, data, file], rollout=(demo.file.filename, rollout),
                                  split=splits and splits[d], mask_fault=fault))
        found[-1].notes += note
    return found


def read_masks(file, demos):
    """({demo: "train", "valid" or ""} or None, what is wrong with the masks, [note])"""
    group, named = file.get("mask"), {}
    if not isinstance(group, h5py.Group):
        return None, "", []
    for split in ("train", "valid"):
        if split in group:
            named[split] = masked(group[split], demos)
            if named[split] is None:
                return None, f"mask/{split} is no list of names: write names, as robomimic does", []
            unknown = [d for d in named[split] if d not in demos]
            if unknown:
                return None, f"mask/{split} names {few(unknown)}, which the file does not have", []
    both = [d for d in named.get("train", ()) if d in named.get("valid", ())]
    if both:
        return None, f"{few(both)} {'stand' if both[1:] else 'stands'} in both mask/train and mask/valid", []
    if not named:
        return None, "", [f"mask/ holds {few(group, 4)}, but neither train nor valid: it is not used"]
    splits = {d: next((split for split in named if d in named[split]), "") for d in demos}
    if len(named) == 2:
        return splits, "", []
    alone, = named                                      # one mask alone: the others are on the other side
    other = "valid" if alone == "train" else "train"
    what = "held out" if other == "valid" else "trained on"
    return ({d: split or other for d, split in splits.items()}, "",
            [f"the file has mask/{alone} alone, the demos that it does not name are {what}"])


def masked(mask, demos):
    """Names of the demos in a mask of names, of numbers, or of one boolean for each demo; else None."""
    if not isinstance(mask, h5py.Dataset) or mask.shape is None or len(mask.shape) != 1:
        return None
    values = mask[:]
    if values.dtype == bool:
        return [d for d, chosen in zip(demos, values) if chosen] if len(values) == len(demos) else None
    if values.dtype.kind in "iu":                       # of demos that are not counted from 0, it is unclear
        counted = demos == [f"demo_{i}" for i in range(len(demos))]
        return [f"demo_{i}" for i in values] if counted else None
    if values.dtype.kind not in "SO":
        return None
    try:
        return [v.decode() if isinstance(v, bytes) else str(v) for v in np.atleast_1d(values)]
    except UnicodeDecodeError:
        return None
