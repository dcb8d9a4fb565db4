"""Demonstrations in HDF5: which episodes a file holds, and what is wrong with their shapes. Used by data.py.

Two layouts are read. robomimic's is the native one; what stands in brackets may be left out:

    data/demo_<i>/actions      (T, A) float
    data/demo_<i>/obs/<key>    (T, D) float: state
    data/demo_<i>/obs/<key>    (T, H, W, 3) uint8, RGB: camera
    [mask/train, mask/valid]   names of demos: which ones are held out
    attributes of demo_<i>     [num_samples]; [rollout], demos with the same number are held out together
    ... or of data, the file   [fps] [language_instruction] [action_names]

ALOHA's, also ACT's and RDT's, has one episode per file:

    action                       (T, A) float
    observations/<key>           (T, D) float: state
    observations/images/<camera> (T, H, W, 3) uint8, or T JPEG buffers

To read another layout, write a function like `aloha_episode`.
"""
import difflib
import glob
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np


class UserError(Exception):
    """What a user can get wrong. The message is one line: what, where, how to mend it."""


def nearest(name, names):
    """", did you mean 'xyz'?" or nothing, as the end of a message."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], 1)
    return f", did you mean {close[0]!r}?" if close else ""


@dataclass
class Array:
    path: str                   # inside the file
    shape: tuple
    dtype: np.dtype
    kind: str                   # "state", "camera", "jpeg" (a compressed camera), "other" (used if asked for)


@dataclass
class Episode:
    file: str
    name: str                   # "file.hdf5:demo_3", for messages
    actions: Array
    obs: dict                   # key -> Array
    num_samples: int            # as the file claims; None if it does not
    fps: float                  # None if the file does not say
    instruction: str            # "" if there is none
    action_names: list          # [] if the file does not say
    rollout: object             # episodes of one rollout are held out together
    split: str                  # "train", "valid", "" (in neither mask), None (the file has no masks)

    @property
    def length(self):
        return self.actions.shape[0]


def find_files(source):
    """HDF5 files of a path, a folder (searched to the bottom) or a glob; episode_10 comes after episode_9."""
    source, path = str(source), Path(source).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in (".hdf5", ".h5")]
    else:
        found = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    if not found:
        if ".zarr" in source or any(path.glob("*.zarr*")):
            reason = ": turn the zarr replay buffer into HDF5 with convert.py"
        elif (path / "meta" / "info.json").exists():
            reason = ": a LeRobot data set, write its columns into HDF5 (README, 'Your own data')"
        elif path.is_dir():
            reason = ": the folder holds no *.hdf5 or *.h5"
        else:
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            reason = nearest(path.name, ["tabletop", *beside]) or ": check the path"
        raise UserError(f"no demonstrations at {source}{reason}")
    natural = lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(p))]
    return sorted(found, key=natural)


def open_file(path):
    """h5py.File for reading. Raises UserError."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if not os.path.exists(path):
            raise UserError(f"no such file: {path}") from None
        reason = "is cut short, copy it again" if "truncated" in str(error) else "cannot be opened as HDF5"
        raise UserError(f"{path} {reason}: {one_line(error)}") from None


def one_line(error):
    return " ".join(str(error).split())


def read_episodes(path):
    """The episodes of one file: a list of Episode. Reads shapes and attributes, no data. Raises UserError."""
    with open_file(path) as file:
        try:
            if "observations" in file and "action" in file:
                return [aloha_episode(path, file)]
            found = robomimic_episodes(path, file) if isinstance(file.get("data"), h5py.Group) else []
            holds = ", ".join(file) or "nothing"
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read, copy or write it again: {one_line(error)}") from None
    if not found:
        raise UserError(f"{path} holds {holds}, but neither data/demo_<i> (robomimic) nor observations and "
                        f"action (ALOHA): see README, 'Your own data'")
    return found


def robomimic_episodes(path, file):
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


def aloha_episode(path, file):
    # RDT's annotation draws from "instruction", a short form and paraphrases; here it is always the first.
    notes = sorted(Path(path).parent.glob("expanded_instruction*.json"))
    instruction = str(json.loads(notes[0].read_text()).get("instruction", "")) if notes else ""
    return make_episode(path, Path(path).name, file["action"], file["observations"], [file],
                        rollout=str(path), split=None, instruction=instruction)


def make_episode(path, name, actions, obs, nodes, rollout, split, instruction=""):
    """An Episode from its HDF5 parts; `nodes` are those whose attributes count, the innermost first."""
    def attribute(*names, default=None, nodes=nodes):
        for node, key in ((node, key) for node in nodes for key in names):
            if key in node.attrs:
                value = node.attrs[key]
                return value.decode() if isinstance(value, bytes) else value
        return default

    def arrays(group):
        for key, node in group.items():
            if isinstance(node, h5py.Group):        # observations/images/<camera> goes by the camera's name
                yield from arrays(node)
            else:
                yield key, describe(node)

    env = json.loads(attribute("env_args", default="{}"))
    found = (attribute("fps"), env.get("control_freq"), (env.get("env_kwargs") or {}).get("control_freq"))
    fps = next((rate for rate in found if rate is not None), None)
    names = attribute("action_names", "joint_names", default="[]")
    names = json.loads(names) if isinstance(names, str) else names
    num_samples = attribute("num_samples", nodes=nodes[:1])     # on the data group it would be another number
    return Episode(
        file=str(path), name=name, actions=describe(actions), obs=dict(arrays(obs)),
        num_samples=None if num_samples is None else int(num_samples),
        fps=None if fps is None else float(fps),
        instruction=str(attribute("language_instruction", "language", default=instruction)),
        action_names=[n.decode() if isinstance(n, bytes) else str(n) for n in names],
        rollout=rollout, split=split)


def describe(dataset):
    shape, dtype = dataset.shape, dataset.dtype
    if "/images/" in dataset.name and (dtype.kind in "SO" or dtype == np.uint8 and len(shape) == 2):
        kind = "jpeg"
    elif len(shape) >= 4:
        kind = "camera"         # whether it is a sound one, `faults` says
    else:                       # more than a thousand numbers per step are no state but, say, a depth map
        kind = "state" if dtype.kind == "f" and np.prod(shape[1:]) <= 1000 else "other"
    return Array(dataset.name, shape, dtype, kind)


def decode_jpeg(buffer):
    """RGB (H, W, 3) uint8 of one compressed frame. Raises UserError.

    OpenCV writes arrays as if they were BGR, and ALOHA's and RDT's recorders hand it RGB. So red and blue are
    swapped in the file itself: OpenCV swaps them back as it reads, any other decoder has to do so by hand.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError("this set has JPEG frames: pip install pillow") from None
    try:
        with Image.open(io.BytesIO(np.asarray(buffer).tobytes())) as image:
            return np.asarray(image.convert("RGB"))[..., ::-1]
    except (OSError, ValueError, SyntaxError) as error:         # Pillow has no error class of its own
        raise UserError(f"a JPEG frame cannot be decoded: {one_line(error)}") from None


def faults(episode, first, state_keys, camera_keys):
    """What is wrong with the shapes of an episode, a line each; `first` is the episode it has to be like."""
    e = episode
    if len(e.actions.shape) != 2:
        yield f"{e.name}: actions have shape {e.actions.shape}, make it (steps, dimensions)"
        return
    if e.length < 2:
        yield f"{e.name} has {e.length} step, an episode needs at least 2: leave it out of the file"
    if e.fps is not None and not 0 < e.fps < float("inf"):
        yield f"{e.name}: the control frequency is {e.fps:g} Hz, it must be above 0: correct attribute 'fps'"
    if e.num_samples not in (None, e.length):
        yield f"{e.name}: num_samples says {e.num_samples}, actions have {e.length} steps: correct it"
    if e.actions.shape[1:] != first.actions.shape[1:]:
        yield (f"{e.name}: actions have shape {e.actions.shape[1:]} per step, in {first.name} "
               f"{first.actions.shape[1:]}: keep different robots in different data sets")
    for key in [*state_keys, *camera_keys]:
        if key not in e.obs:
            holds = ", ".join(e.obs) or "nothing"
            yield f"{e.name} has observations {holds}, but no '{key}'{nearest(key, e.obs)}"
            continue
        array, like = e.obs[key], first.obs.get(key)
        if array.shape[:1] != (e.length,):
            yield f"{e.name}: actions have {e.length} steps, '{key}' is {array.shape}: cut the longer one"
        if key in state_keys and array.dtype.kind not in "fiub":
            yield f"{e.name}: '{key}' is {array.dtype}, write a state as float (T, D)"
        if key in camera_keys and array.kind != "jpeg" and \
                (array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] != 3):
            yield f"{e.name}: camera '{key}' is {array.dtype} {array.shape}: write uint8 (T, H, W, 3), 0..255"
        if like and array.kind != "jpeg" and array.shape[1:] != like.shape[1:]:
            yield (f"{e.name}: '{key}' has shape {array.shape[1:]} per step, in {first.name} "
                   f"{like.shape[1:]}: keep different robots and cameras in different data sets")


def nonfinite(name, key, x):
    """A line if x (T, D) holds NaN or infinity, with the first such step."""
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        yield (f"{name}: '{key}' is not finite at step {bad[0]} ({len(bad)} of {len(x)} steps): "
               f"cut the episode there or leave it out")
