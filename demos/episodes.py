"""What an episode on disk is, and what can be wrong with its shapes. Every layout makes its own of these."""
import io
import json
from dataclasses import dataclass, field

import h5py
import numpy as np

from robot.errors import UserError, hint, nearest, one_line


@dataclass
class Array:
    path: str                   # inside the file
    shape: tuple
    dtype: np.dtype
    kind: str = "state"         # or "camera", "jpeg" (a compressed camera), "other" (used if asked for)


@dataclass
class Episode:
    file: str
    name: str                   # "file.hdf5:demo_3", for messages
    actions: Array
    obs: dict                   # key -> Array
    labels: dict = field(default_factory=dict)      # name -> Array: what else lies beside the actions
    num_samples: int = None     # as the file claims; None if it does not
    fps: float = None           # None if the file does not say
    instruction: str = ""       # "" if there is none
    action_names: list = field(default_factory=list)
    rollout: object = None      # episodes of one rollout are held out together; by default each is its own
    split: str = None           # "train", "valid", "" (in neither mask), None (the file has no masks)

    def __post_init__(self):
        self.rollout = self.rollout or (self.file, self.name)

    @property
    def length(self):
        return self.actions.shape[0]


def make_episode(path, name, actions, obs, nodes, rollout, split, instruction=""):
    """An Episode from its HDF5 parts; `nodes` are those whose attributes count, the innermost first. Labels
    are the arrays of the innermost one."""
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
        labels={key: describe(node) for key, node in nodes[0].items()
                if isinstance(node, h5py.Dataset) and node.shape},
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


def label_of(episode, name, dim):
    """The Array of a label with `dim` numbers per step, from beside the actions or from the observations.
    Raises UserError."""
    e, known = episode, episode.obs | episode.labels
    if name not in known:
        raise UserError(f"{e.name} has no label '{name}'{hint(name, known)}")
    array = known[name]
    shapes = [(e.length, dim)] + [(e.length,)] * (dim == 1)
    if array.shape not in shapes or array.dtype.kind not in "fiub":
        raise UserError(f"{e.name}: label '{name}' is {array.dtype} {array.shape}, extra asks for numbers "
                        f"{' or '.join(map(str, shapes))}")
    return array


def nonfinite(name, key, x):
    """A line if x (T, D) holds NaN or infinity, with the first such step."""
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        yield (f"{name}: '{key}' is not finite at step {bad[0]} ({len(bad)} of {len(x)} steps): "
               f"cut the episode there or leave it out")
