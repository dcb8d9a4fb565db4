"""An episode on disk, and what can be wrong with its shapes. Every layout turns its files into Episodes."""
import math
from dataclasses import dataclass, field

import numpy as np

from robot.errors import UserError, few, hint, nearest, one_line

STATE_SIZE = 1000               # more numbers than this per step are no state but, say, a depth map
DEPTH_SIZE = 16                 # more than this are one if they are called depth, flattened or not


@dataclass
class Array:
    path: str                   # inside the file
    shape: tuple
    dtype: np.dtype
    kind: str = "state"         # or "camera", "jpeg" (a compressed camera), "other" (used if asked for)
    why: str = ""               # it is neither a state nor a camera
    names: list = field(default_factory=list)       # of its numbers, where the file says them
    fault: str = ""             # of a camera: why its pictures cannot be read, said where they are used

    @property
    def is_camera(self):
        return self.kind in ("camera", "jpeg")


class Rows:
    """The rows of an array that is put together as it is read, by [i] or [lo:hi]; read(lo, hi) -> array."""

    def __init__(self, length, read):
        self.length, self.read = length, read

    def __getitem__(self, at):
        if isinstance(at, slice):
            lo, hi, _ = at.indices(self.length)
            return self.read(lo, hi)
        at = range(self.length)[at]
        return self.read(at, at + 1)[0]


@dataclass
class Episode:
    file: str
    name: str                   # "file.hdf5:demo_3", for messages
    actions: Array
    obs: dict                   # key -> Array
    labels: dict = field(default_factory=dict)      # name -> Array: what else lies beside the actions
    unread: dict = field(default_factory=dict)      # name -> why: what lies there and is no array of steps
    num_samples: float = None   # as the file claims; None if it does not
    fps: float = None           # None if the file does not say
    usual_fps: float = 20.0     # then: what sets of this layout mostly have; robosuite, unless told otherwise
    instruction: str = ""       # "" if there is none
    action_names: list = field(default_factory=list)
    rollout: object = None      # episodes of one rollout are held out together; by default each is its own
    split: str = None           # "train", "valid", "" (in neither mask), None (the file has no masks)
    mask_fault: str = ""        # why the file's masks cannot be used
    notes: list = field(default_factory=list)       # what was guessed or passed over while reading it
    begin: int = 0              # steps of the file before the first that is used, see demos/still.py

    def __post_init__(self):
        self.rollout = self.rollout or (self.file, self.name)

    @property
    def steps(self):
        """In the file."""
        return (*self.actions.shape, 0)[0]

    @property
    def length(self):
        """Steps that are used."""
        return self.steps - self.begin


def notes_of(episodes):
    """What was guessed or passed over, a line each with the episodes it is about."""
    for note in dict.fromkeys(note for e in episodes for note in e.notes):
        yield f"{first_of([e.name for e in episodes if note in e.notes])}: {note}"


def first_of(names):
    """"name and 3 more", for a message."""
    return names[0] + f" and {len(names) - 1} more" * (len(names) > 1)


def kind_of(path, shape, dtype):
    """(kind, why it is neither a state nor a camera) of an array that is not compressed; see Array."""
    per_step = shape[1:]
    if dtype.kind not in "fiub":
        return "other", f"{one_line(dtype, 30)}, no numbers"
    if not shape or not all(per_step):
        return "other", f"shape {shape}, nothing per step"
    if len(shape) == 4 and dtype == np.uint8 and shape[3] == 3:
        return "camera", ""
    if len(shape) >= 4 or len(shape) == 3 and dtype == np.uint8:
        return "other", f"{dtype} {per_step} per step, a camera is uint8 (H, W, 3)"
    if math.prod(per_step) > STATE_SIZE:
        return "other", f"more than {STATE_SIZE} numbers per step"
    if math.prod(per_step) > DEPTH_SIZE and "depth" in path.lower():
        return "other", "looks like a depth map: shape_meta can name it"
    if dtype.kind != "f":       # often counters of frames or tasks, which a policy must not follow
        return "other", f"{dtype}, not float: shape_meta can name it"
    return "state", ""


def faults(episode, first, state_keys, camera_keys, resized=False):
    """What is wrong with the shapes of an episode, a line each; `first` is the episode it has to be like.
    resized: pictures of any size will do."""
    e, actions = episode, episode.actions
    if len(actions.shape) != 2 or not actions.shape[1] or actions.dtype.kind not in "fiub":
        yield (f"{e.name}: actions are {one_line(actions.dtype, 60)} {actions.shape}, make it (steps, "
               f"dimensions), numbers")
        return
    if e.length < 2:
        yield f"{e.name} has {e.length} step, an episode needs at least 2: leave it out of the file"
    if e.fps is not None and not 0 < e.fps < float("inf"):
        yield f"{e.name}: the control frequency is {e.fps:g} Hz, it must be above 0: correct attribute 'fps'"
    if e.num_samples not in (None, e.steps):
        yield f"{e.name}: num_samples says {e.num_samples:g}, actions have {e.steps} steps: correct it"
    if actions.shape[1:] != first.actions.shape[1:]:
        yield (f"{e.name}: actions have shape {actions.shape[1:]} per step, in {first.name} "
               f"{first.actions.shape[1:]}: keep different robots in different data sets")
    for key in [*state_keys, *camera_keys]:
        if key not in e.obs:
            mend = ": leave this episode out, or name the keys that all have in shape_meta" + (
                "; pi0, pi05, rdt hide it by processing: cameras" * (key in camera_keys))
            yield (f"{e.name} has observations {few(e.obs)}, but no '{key}'"
                   f"{mend if key in first.obs else nearest(key, e.obs)}")
            continue
        array, like = e.obs[key], first.obs.get(key)
        if array.fault:
            yield f"{e.name}: {array.fault}; to train without '{key}', name the others in shape_meta"
        elif array.shape[:1] != (e.steps,):
            yield f"{e.name}: actions have {e.steps} steps, '{key}' is {array.shape}: cut the longer one"
        if key in state_keys and array.dtype.kind not in "fiub":
            yield f"{e.name}: '{key}' is {one_line(array.dtype, 60)}, write a state as float (T, D)"
        if key in camera_keys and not array.is_camera:
            yield (f"{e.name}: camera '{key}' is {one_line(array.dtype, 60)} {array.shape}: write uint8 "
                   f"(T, H, W, 3), 0..255")
        camera = key in camera_keys
        any_size = camera and (resized or "jpeg" in (array.kind, like and like.kind))
        if like and not any_size and array.shape[1:] != like.shape[1:]:
            yield (f"{e.name}: '{key}' has shape {array.shape[1:]} per step, in {first.name} "
                   f"{like.shape[1:]}: " + ("--image_size H W brings pictures to one size" if camera else
                                            "keep different robots in different data sets"))


def label_of(episode, name, dim):
    """The Array of a label with `dim` numbers per step, from beside the actions or from the observations.
    Raises UserError."""
    e, known = episode, episode.obs | episode.labels
    if name not in known:
        raise UserError(f"{e.name} has no label '{name}'{hint(name, known)}")
    array = known[name]
    shapes = [(e.steps, dim)] + [(e.steps,)] * (dim == 1)
    if array.shape not in shapes or array.dtype.kind not in "fiub":
        raise UserError(f"{e.name}: label '{name}' is {one_line(array.dtype, 60)} {array.shape}, extra asks "
                        f"for numbers {' or '.join(map(str, shapes))}")
    return array


def nonfinite(name, key, x):
    """A line if x (T, D) holds NaN or infinity, with the first such step."""
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        yield (f"{name}: '{key}' is not finite at step {bad[0]} ({len(bad)} of {len(x)} steps): "
               f"cut the episode there or leave it out")


def coarse(key, x):
    """A line if float32 (N, D) keeps less than a thousandth of what a dimension ranges over: coordinates far
    from their origin, time stamps."""
    if not len(x):
        return
    low, high = x.min(0), x.max(0)
    step, span = np.spacing(np.maximum(abs(low), abs(high))), high - low
    bad = np.flatnonzero((span > 0) & (step > span / 1000))
    if len(bad):
        d = bad[0]
        yield (f"'{key}' is about {high[d]:.4g} and ranges over {span[d]:.3g} in dimension {d}: float32 "
               f"keeps steps of {step[d]:.2g} there, subtract an origin before you write it")
