"""robomimic's layout, the native one; what stands in brackets may be left out:

    data/demo_<i>/actions      (T, A) float
    data/demo_<i>/obs/<key>    (T, D) float: state
    data/demo_<i>/obs/<key>    (T, H, W, 3) uint8, RGB: camera
    [mask/train, mask/valid]   names of demos: which ones are held out
    attributes of demo_<i>     [num_samples]; [rollout], demos with the same number are held out together
    ... or of data, the file   [fps] [language_instruction] [action_names]
"""
import re
from pathlib import Path

import h5py

from demos.episodes import make_episode
from robot.errors import UserError, nearest


def matches(file):
    return isinstance(file.get("data"), h5py.Group)


def episodes(path, file):
    """The episodes of an open file, see demos/files.py."""
    data, name, masks, found = file["data"], Path(path).name, {}, []
    for split in {"train", "valid"} & set(file.get("mask", {})):
        names = file["mask"][split]
        masks[split] = set(names.asstr()[:] if names.dtype.kind == "O" else names[:].astype(str))
    # Sorted by number, because HDF5 lists demo_10 before demo_2.
    for d in sorted((d for d in data if re.fullmatch(r"demo_\d+", d)), key=lambda d: int(d[5:])):
        demo = data[d]
        for part in ("actions", "obs"):
            if part not in demo:
                holds = ", ".join(demo) or "nothing"
                raise UserError(f"{name}:{d} holds {holds}, but no '{part}'{nearest(part, demo)}")
        split = next((s for s in masks if d in masks[s]), "") if len(masks) == 2 else None
        rollout = (str(path), demo.attrs.get("rollout", d))
        found.append(make_episode(path, f"{name}:{d}", demo["actions"], demo["obs"], [demo, data, file],
                                  rollout=rollout, split=split))
    return found
