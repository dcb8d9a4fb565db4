"""Demonstrations and images on disk -> batches.

    open_demos("tabletop" or HDF5 files) -> Demos       what is there, checked; which episodes are held out
    MixedDemos({robot: (Demos, ...)})    -> Demos       several robots in one unified action vector
    fit_normalizer(demos, "minmax")      -> Normalizer  y = x * scale + offset, per dimension
    Windows(demos, normalizer, ...)                     one item per time step; a batch is one gather
    open_samples("moons" or FILE.npz)    -> Samples     2-D points and images (image_sets.py)
    batches(windows or samples, batch_size, seed)       (indices, batch) without end, from any step on
    python data.py FILE_OR_FOLDER                       what is in it, what looks wrong (check_data.py)

How the files look is in episodes.py. A window around "now" = t, for n_obs_steps 2, horizon 16 and
first_action -1 (the convention of Diffusion Policy):

    step             t-1   t   t+1 ... t+14
    state, images     x    x
    actions           x    x    x   x    x

Past either end of the episode its first or last step is repeated, and action_mask is False. Every t of every
episode has its window. (Diffusion Policy leaves out the last ones, where more than n_action_steps - 1 actions
would be padding, because it trains on the padding.)

Numbers (actions, state) are read once and stay in memory: five million steps of 50 dimensions are 1 GB.
Images stay there too if they fit; if not, every process opens the files for itself and reads what it needs.
"""
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

from episodes import (UserError, decode_jpeg, faults, find_files, nearest, nonfinite, one_line, open_file,
                      read_episodes)
from image_sets import Samples, open_samples  # noqa: F401  (so that data.py is all that a caller needs)


def encode_text(text, length):
    """Text as its UTF-8 bytes + 1, int64 (length,). 0 is padding; what is beyond `length` bytes is cut, which
    is said once."""
    if len(text.encode()) > length:
        say_once(f"an instruction has {len(text.encode())} bytes and is cut to {length}: {text!r}")
    codes = np.frombuffer(text.encode()[:length], np.uint8).astype(np.int64) + 1
    return torch.from_numpy(np.pad(codes, (0, length - len(codes))))


@functools.lru_cache
def say_once(note):
    print(f"note: {note}", file=sys.stderr)


def decode_text(codes):
    """The text of one row of codes, without a character that the cut has split."""
    return bytes(int(c) - 1 for c in codes if c > 0).decode(errors="ignore")


class Normalizer:
    """y = x * scale + offset, per key and dimension; all numbers are float32 tensors.

    mode      what it does to the data                              scale, offset
    minmax    into [-1, 1]                                          2 / (max - min), -1 - scale * min
    meanstd   mean 0, (unbiased) deviation 1                        1 / std, -mean / std
    maxabs    into [-1, 1], zero stays zero                         1 / max |x|, 0
    quantile  1 % .. 99 % into [-1, 1], what lies beyond goes out   as minmax, from these two points

    A near-constant dimension (range, deviation or max |x| below EPS) would be blown up to noise of full size.
    It is only shifted: its smallest value, its mean or its 1 % point goes to 0. near_constant = {key:
    [dimensions]}. The first three are "limits", "gaussian" and "limits without offset" of Diffusion Policy's
    LinearNormalizer (diffusion_policy/model/common/normalizer.py).
    """
    MODES = ("minmax", "meanstd", "maxabs", "quantile")
    EPS = 1e-4

    def __init__(self, mode, scale, offset, stats, near_constant):
        self.mode, self.scale, self.offset = mode, scale, offset
        self.stats, self.near_constant = stats, near_constant

    @classmethod
    def fit(cls, data, mode="minmax"):
        """data: {key: (N, D) array}, finite. Raises UserError for an unknown mode."""
        if mode not in cls.MODES:
            known = nearest(mode, cls.MODES) or f": it is one of {', '.join(cls.MODES)}"
            raise UserError(f"there is no normaliser {mode!r}{known}")
        self = cls(mode, {}, {}, {}, {})
        float32 = lambda a: torch.tensor(a, dtype=torch.float32)
        for key, x in data.items():
            x = np.asarray(x, np.float64)
            low, high, mean, std = x.min(0), x.max(0), x.mean(0), x.std(0, ddof=1)
            stats = {"min": low, "max": high, "mean": mean, "std": std}
            self.stats[key] = {name: float32(a) for name, a in stats.items()}
            if mode == "quantile":
                low, high = np.quantile(x, [0.01, 0.99], axis=0)
            width = {"meanstd": std, "maxabs": np.maximum(abs(low), abs(high))}.get(mode, high - low)
            flat = width < cls.EPS
            width = np.where(flat, 1, width)
            if mode == "meanstd":
                scale, offset = 1 / width, -mean / width
            elif mode == "maxabs":
                scale, offset = 1 / width, np.zeros_like(width)
            else:
                scale = np.where(flat, 1, 2 / width)
                offset = np.where(flat, -low, -1 - scale * low)
            self.scale[key], self.offset[key] = float32(scale), float32(offset)
            self.near_constant[key] = np.flatnonzero(flat).tolist()
        return self

    def normalize(self, key, x):
        """x (..., D), a tensor on any device"""
        return x * self.scale[key].to(x.device) + self.offset[key].to(x.device)

    def unnormalize(self, key, x):
        """The inverse of `normalize`."""
        return (x - self.offset[key].to(x.device)) / self.scale[key].to(x.device)

    def state(self):
        """Everything as plain dicts, lists and tensors, for torch.save and torch.load(weights_only=True)."""
        return {name: getattr(self, name) for name in ("mode", "scale", "offset", "stats", "near_constant")}

    @classmethod
    def from_state(cls, state):
        return cls(**state)

    def summary(self):
        """One line per key, with a warning where dimensions hardly move."""
        lines = []
        for key, stats in self.stats.items():
            line = f"{key}: {len(stats['min'])} dimensions, {self.mode}"
            if len(stats["min"]):
                line += f", raw values from {stats['min'].min():.4g} to {stats['max'].max():.4g}"
            if self.near_constant[key]:
                names = ", ".join(map(str, self.near_constant[key]))
                line += f"; WARNING: near-constant dimensions {names} (within {self.EPS:g}) are not scaled"
            lines.append(line)
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Which observations, which episodes


def choose_keys(first, obs, text, shape_meta):
    """(state keys, camera keys): named by shape_meta, or else found by their kind in the first episode."""
    if shape_meta:
        return keys_of_shape_meta(first, shape_meta)
    if obs not in ("lowdim", "image"):
        raise UserError(f"obs is 'lowdim' or 'image', not {obs!r}{nearest(obs, ('lowdim', 'image'))}")
    # `object` is what only a simulator knows; `goal` says in numbers what the instruction says in words.
    hidden = [] if obs == "lowdim" else ["object", "goal"] if text else ["object"]
    state = [key for key, array in sorted(first.obs.items()) if array.kind == "state" and key not in hidden]
    cameras = [key for key, array in sorted(first.obs.items()) if array.kind in ("camera", "jpeg")]
    if obs == "lowdim":
        cameras = []
    if not (cameras if obs == "image" else state):
        wanted = "camera, uint8 (T, H, W, 3)" if obs == "image" else "state, float (T, D)"
        raise UserError(f"{first.name} has no {wanted}; its observations: {', '.join(first.obs) or 'none'}")
    return state, cameras


def keys_of_shape_meta(first, shape_meta):
    try:
        wanted = {key: (m.get("type", "low_dim"), tuple(m["shape"])) for key, m in shape_meta["obs"].items()}
        actions = tuple(shape_meta["action"]["shape"]) if "action" in shape_meta else first.actions.shape[1:]
    except (KeyError, TypeError, AttributeError):
        raise UserError("shape_meta must read {obs: {KEY: {shape: [..], type: rgb or low_dim}}, "
                        f"action: {{shape: [..]}}}}, not {shape_meta!r}") from None
    if actions != first.actions.shape[1:]:
        raise UserError(f"shape_meta: actions have shape {list(actions)}, but in {first.name} "
                        f"{list(first.actions.shape[1:])}: correct it")
    for key, (kind, shape) in wanted.items():
        if kind not in ("rgb", "low_dim"):
            raise UserError(f"shape_meta: the type of '{key}' is 'rgb' or 'low_dim', not {kind!r}")
        array = first.obs.get(key)
        if array is None or (kind, array.kind) == ("rgb", "jpeg"):
            continue                    # `faults` names a missing key; JPEGs show their size once decoded
        has = (3, *array.shape[1:3]) if kind == "rgb" else array.shape[1:] or (1,)
        if shape != has or (kind == "rgb") != (array.kind == "camera"):
            raise UserError(f"shape_meta: '{key}' is {kind} {list(shape)}, but in {first.name} {array.dtype} "
                            f"{list(array.shape[1:])} per step: correct it (rgb is [3, H, W])")
    return [[key for key in wanted if wanted[key][0] == kind] for kind in ("low_dim", "rgb")]


def split_episodes(episodes, val_ratio, max_train_episodes, seed):
    """(train, valid): episode numbers. Rollouts are held out whole, so that no scene is on both sides."""
    masked = all(e.split is not None for e in episodes) and any(e.split == "train" for e in episodes)
    if masked and val_ratio is None and max_train_episodes is None:
        splits = np.array([e.split for e in episodes])
        return [np.flatnonzero(splits == name) for name in ("train", "valid")]
    val_ratio = 0.05 if val_ratio is None else val_ratio
    if not 0 <= val_ratio < 1:
        raise UserError(f"val_ratio must be at least 0 and below 1, not {val_ratio}")
    if max_train_episodes is not None and max_train_episodes < 1:
        raise UserError(f"max_train_episodes must be at least 1, not {max_train_episodes}")
    number = {rollout: i for i, rollout in enumerate(dict.fromkeys(e.rollout for e in episodes))}
    n = len(number)
    # The draws of Diffusion Policy's get_val_mask and downsample_mask: a seed trains on the same episodes as
    # there. (There, what max_train_episodes leaves over is validated on; here it is not used.)
    n_valid = min(max(1, round(n * val_ratio)), n - 1) if val_ratio else 0
    valid = np.random.default_rng(seed).choice(n, n_valid, replace=False)
    train = np.setdiff1d(np.arange(n), valid)
    if max_train_episodes is not None and max_train_episodes < len(train):
        train = train[np.random.default_rng(seed).choice(len(train), max_train_episodes, replace=False)]
    rollout = np.array([number[e.rollout] for e in episodes])
    return [np.flatnonzero(np.isin(rollout, part)) for part in (train, valid)]


class Demos:
    """A checked set of demonstrations, see open_demos.

    Of the set: state_keys {key: dim}, camera_keys, state_dim, action_dim, action_names, image_size (H, W) or
    None, fps (of the first episode), notes (what a user should know).
    Of each episode: lengths, instructions, episode_names, episode_fps. train_episodes, valid_episodes:
    numbers. Of each step: actions (N, action_dim), state (N, state_dim): float32, in the units of the file,
    all episodes in a row; episode e begins at starts[e]. The state keys stand side by side in their order.
    """

    def __init__(self, source, episodes, state_keys, camera_keys, split, memory_gb):
        first = episodes[0]
        self.source, self.episodes, self.memory_gb = str(source), episodes, memory_gb
        self.notes, self.files = [], {}
        self.train_episodes, self.valid_episodes = split
        for episode in episodes:
            for fault in faults(episode, first, state_keys, camera_keys):
                raise UserError(fault)
        self.lengths = np.array([e.length for e in episodes])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.instructions = [e.instruction for e in episodes]
        self.episode_names = [e.name for e in episodes]
        # Neither robosuite (20 Hz unless told otherwise) nor ALOHA (50 Hz) writes its rate down.
        usual = 50.0 if first.actions.path == "/action" else 20.0
        self.episode_fps = np.array([e.fps or usual for e in episodes])
        self.fps = float(self.episode_fps[0])
        silent = [e.name for e in episodes if not e.fps]
        if silent:
            self.notes.append(f"{silent[0]} does not say its rate, {usual:g} Hz assumed: set attribute 'fps'")
        if not len(self.valid_episodes):
            self.notes.append(f"no episode of {source} is held out, {len(self.train_episodes)} trained on")

        self.state_keys = {key: int(np.prod(first.obs[key].shape[1:])) for key in state_keys}
        self.camera_keys, self.action_names = list(camera_keys), first.action_names
        self.state_dim, self.action_dim = sum(self.state_keys.values()), first.actions.shape[1]
        self.actions = np.concatenate([self._numbers(e, "actions", e.actions) for e in episodes])
        state = [[self._numbers(e, key, e.obs[key]) for e in episodes] for key in self.state_keys]
        self.state = np.concatenate([self.actions[:, :0], *map(np.concatenate, state)], axis=1)

        sizes = {key: self._frames(first, key, 0, 1).shape[1:3] for key in self.camera_keys}
        if len(set(sizes.values())) > 1:
            raise UserError(f"{first.name}: cameras differ in size, {sizes}: name equal ones in shape_meta")
        self.image_size = next(iter(sizes.values()), None)
        self.close()

    def _read(self, episode, array, lo=None, hi=None):
        # Handles belong to the process that opened them: after a fork, HDF5 would share the file position.
        # Few are kept, because a folder can hold more episode files than a process may open.
        key = (os.getpid(), episode.file)
        if key not in self.files:
            if len(self.files) >= 64:
                self.files.pop(next(iter(self.files))).close()
            self.files[key] = open_file(episode.file)
        try:
            return self.files[key][array.path][lo:hi]
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{episode.name}: {array.path} cannot be read, copy the file again: "
                            f"{one_line(error)}") from None

    def _numbers(self, episode, key, array):
        x = self._read(episode, array).reshape(episode.length, -1).astype(np.float32)
        for fault in nonfinite(episode.name, key, x):
            raise UserError(fault)
        return x

    def _frames(self, episode, key, lo, hi):
        frames = self._read(episode, episode.obs[key], lo, hi)
        if episode.obs[key].kind == "camera":
            return frames
        try:
            return np.stack([decode_jpeg(frame) for frame in frames])
        except (UserError, ValueError) as error:        # ValueError: frames of different size
            raise UserError(f"{episode.name}: '{key}', steps {lo} to {hi - 1}: {error}") from None

    def images(self, e, lo, hi):
        """Steps lo .. hi-1 of episode e from all cameras: (hi - lo, V, 3, H, W) uint8, RGB."""
        out = np.empty((hi - lo, len(self.camera_keys), 3, *self.image_size), np.uint8)
        for v, key in enumerate(self.camera_keys):
            frames = self._frames(self.episodes[e], key, lo, hi)                # (T, H, W, 3)
            if frames.shape[1:3] != self.image_size:
                raise UserError(f"{self.episode_names[e]}: '{key}' is {frames.shape[1:3]}, others are "
                                f"{self.image_size}: bring all pictures to one size")
            out[:, v] = np.moveaxis(frames, 3, 1)
        return out

    def rows(self, episodes):
        """Where the steps of these episodes lie in `actions` and `state`."""
        spans = [np.arange(self.starts[e], self.starts[e] + self.lengths[e]) for e in episodes]
        return np.concatenate([np.zeros(0, int), *spans])

    def close(self):
        """Close the files, so that others can write them; what is read next opens them again."""
        for file in self.files.values():
            file.close()
        self.files = {}

    def __getstate__(self):                             # a process that is spawned opens files of its own
        return self.__dict__ | {"files": {}}

    def description(self):
        """What a checkpoint keeps of the data: plain values only."""
        return {"source": self.source, "fps": self.fps,
                "state_keys": dict(self.state_keys), "camera_keys": list(self.camera_keys),
                "image_size": list(self.image_size) if self.image_size else None,
                "state_dim": self.state_dim, "action_dim": self.action_dim, "action_names": self.action_names,
                "instructions": sorted(set(self.instructions) - {""}), "episode_names": self.episode_names,
                "lengths": self.lengths.tolist(), "train_episodes": self.train_episodes.tolist(),
                "valid_episodes": self.valid_episodes.tolist()}


def open_demos(source, obs="lowdim", text=False, shape_meta=None, episodes=None, val_ratio=None,
               max_train_episodes=None, seed=0, cache=None, memory_gb=4.0):
    """Open and check demonstrations: -> Demos. Raises UserError for what is wrong, prints notes to stderr.

    source       "tabletop", "tabletop_velocity" (the other robot), or a path, folder or glob of HDF5
    obs          "lowdim": all float observations, no cameras. "image": cameras, and all float observations
                 but `object` (with text=True also without `goal`). Not looked at if shape_meta is given
    text         whether instructions will be read
    shape_meta   {"obs": {key: {"shape": [..], "type": "rgb" | "low_dim"}}, "action": {"shape": [..]}} as in
                 Diffusion Policy: the keys, their order and their shapes, which are checked. rgb is [3, H, W]
    episodes     for tabletop: how many rollouts to generate (default 1000, with cameras 2000:
                 see tabletop.demonstrations)
    val_ratio    share of the episodes to hold out, at least one. None: what the files' masks say, else 0.05
    seed         of the split and of the generated set
    cache        folder of the generated set (default $ACTION_DIFFUSION_CACHE, else ~/.cache/action_diffusion)
    memory_gb    images that take more than this, decoded, are left in the files
    """
    if source in ("tabletop", "tabletop_velocity"):
        files = [tabletop_file(obs == "image", episodes, seed, cache, source)]
    else:
        files = find_files(source)
    found = [episode for path in files for episode in read_episodes(path)]
    state_keys, camera_keys = choose_keys(found[0], obs, text, shape_meta)
    split = split_episodes(found, val_ratio, max_train_episodes, seed)
    demos = Demos(source, found, state_keys, camera_keys, split, memory_gb)
    for key in camera_keys if shape_meta else []:
        if tuple(shape_meta["obs"][key]["shape"]) != (3, *demos.image_size):
            raise UserError(f"shape_meta: '{key}' is {shape_meta['obs'][key]['shape']}, but the pictures of "
                            f"{source} are {[3, *demos.image_size]}: correct it")
    if text and not any(demos.instructions):
        demos.notes.append(f"{source} has no instructions, texts are empty: set 'language_instruction'")
    for note in demos.notes:
        print(f"note: {note}", file=sys.stderr)
    return demos


class MixedDemos(Demos):
    """Sets of several robots as one: actions and state stand at their places in a unified vector of `dim`
    numbers, 0 elsewhere.

    parts {robot: (Demos, places of its actions, places of its state)}. A set with fewer cameras than another
    shows BACKGROUND for the others; the pictures of all have one size. robots: their names; of each:
    action_valid, state_valid (robots, dim) bool, which places it has; of each episode: robot, its number.
    """
    BACKGROUND = 127

    def __init__(self, parts, dim=128):
        self.robots, self.parts = list(parts), [demos for demos, _, _ in parts.values()]
        self.places = {name: {"actions": list(a), "state": list(s)} for name, (_, a, s) in parts.items()}
        first = max(self.parts, key=lambda demos: len(demos.camera_keys))
        sizes = {name: demos.image_size for name, (demos, _, _) in parts.items() if demos.image_size}
        if len(set(sizes.values())) > 1:
            raise UserError(f"pictures of the robots differ in size, {sizes}: bring them to one size")
        for name, (demos, actions, state) in parts.items():
            for kind, places in (("action", actions), ("state", state)):
                has = getattr(demos, f"{kind}_dim")
                if has != len(places):
                    raise UserError(f"robot {name}: {demos.source} has {has} {kind} dimensions, {kind}_names "
                                    f"names {len(places)}: name each, in their order")
        chain = lambda name: [x for demos in self.parts for x in getattr(demos, name)]
        self.source, self.memory_gb = " + ".join(d.source for d in self.parts), first.memory_gb
        self.notes, self.files, self.episodes = [], {}, chain("episodes")
        self.state_keys, self.camera_keys, self.action_names = {}, first.camera_keys, []
        self.image_size, self.state_dim, self.action_dim = first.image_size, dim, dim
        self.instructions, self.episode_names = chain("instructions"), chain("episode_names")
        self.lengths, self.episode_fps = np.array(chain("lengths")), np.array(chain("episode_fps"))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.fps = float(self.episode_fps[0])
        counts = np.array([len(demos.lengths) for demos in self.parts])
        self.robot, self.offsets = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts) - counts
        shifted = lambda name: np.concatenate(
            [first + getattr(demos, name) for first, demos in zip(self.offsets, self.parts)])
        self.train_episodes, self.valid_episodes = shifted("train_episodes"), shifted("valid_episodes")
        for kind in ("actions", "state"):
            places = [self.places[name][kind] for name in self.robots]
            packed = [np.zeros((len(demos.actions), dim), np.float32) for demos in self.parts]
            for x, demos, at in zip(packed, self.parts, places):
                x[:, at] = getattr(demos, kind)
            setattr(self, kind, np.concatenate(packed))
            setattr(self, f"{kind.rstrip('s')}_valid", np.stack([np.isin(np.arange(dim), p) for p in places]))

    def images(self, e, lo, hi):
        demos = self.parts[self.robot[e]]
        out = np.full((hi - lo, len(self.camera_keys), 3, *self.image_size), self.BACKGROUND, np.uint8)
        if demos.camera_keys:
            out[:, :len(demos.camera_keys)] = demos.images(e - self.offsets[self.robot[e]], lo, hi)
        return out

    def close(self):
        for demos in self.parts:
            demos.close()

    def description(self):
        each = {}
        for name, demos in zip(self.robots, self.parts):
            part = demos.description()
            keys = ("source", "fps", "state_keys", "camera_keys", "image_size", "action_names")
            each[name] = {key: part[key] for key in keys} | {"places": self.places[name]}
        return super().description() | {"robots": each}


def fit_normalizer(demos, mode="minmax"):
    """A Normalizer of "actions" and "state" over the training episodes. Of several robots: one for the whole
    unified vector, each place over those that have it, since it means the same for all of them."""
    rows = demos.rows(demos.train_episodes)
    whole = Normalizer.fit({"actions": demos.actions[rows], "state": demos.state[rows]}, mode)
    if not isinstance(demos, MixedDemos):
        return whole
    robot = np.repeat(demos.robot, demos.lengths)[rows]
    for kind, valid in (("actions", demos.action_valid), ("state", demos.state_valid)):
        for d in range(valid.shape[1]):
            has = valid[robot, d]
            column = getattr(demos, kind)[rows][has, d:d + 1]
            one = Normalizer.fit({kind: column}, mode) if has.any() else None
            whole.scale[kind][d] = one.scale[kind][0] if one else 1.0
            whole.offset[kind][d] = one.offset[kind][0] if one else 0.0
            for name, x in whole.stats[kind].items():
                x[d] = one.stats[kind][name][0] if one else 0.0
            whole.near_constant[kind] = [k for k in whole.near_constant[kind] if k != d]
            whole.near_constant[kind] += [d] if one and one.near_constant[kind] else []
    return whole


@contextlib.contextmanager
def written_aside(path):
    """A name to write to; renamed to `path` at the end, removed on an error: `path` is whole or as it was."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())          # or a power cut could leave the new name with nothing in it
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}, make room or take another folder: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


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
    """The generated set, as a file like any other: made on first use, and anew when tabletop.py changes."""
    import tabletop
    rollouts = rollouts or (2000 if cameras else 1000)
    version = hashlib.sha256(Path(tabletop.__file__).read_bytes()).hexdigest()[:8]
    folder = cache or os.environ.get("ACTION_DIFFUSION_CACHE") or "~/.cache/action_diffusion"
    name = f"{robot}_{rollouts}_{'cameras' if cameras else 'lowdim'}_seed{seed}_{version}.hdf5"
    path = Path(folder).expanduser() / name
    if path.exists():
        return path
    print(f"note: generating {rollouts} demonstrations, kept in {path}", file=sys.stderr)
    with new_hdf5(path) as file:
        data = file.create_group("data")
        robot = tabletop.ROBOTS[robot]
        names = json.dumps(robot.action_names)
        data.attrs.update(format_version=1, fps=float(robot.fps), action_names=names)
        for i, demo in enumerate(tabletop.demonstrations(rollouts, seed=seed, cameras=cameras, robot=robot)):
            group = data.create_group(f"demo_{i}")
            group.attrs.update(num_samples=len(demo["actions"]), language_instruction=demo["instruction"],
                               rollout=demo["episode"])
            group["actions"] = demo["actions"]
            for key, x in demo["obs"].items():
                # Rendered images shrink to a few per cent even at the fastest level.
                packed = {"chunks": (min(16, len(x)), *x.shape[1:]), "compression": 1} if x.ndim == 4 else {}
                group.create_dataset(f"obs/{key}", data=x, **packed)
    return path


# ------------------------------------------------------------------------------------------------------------
# Windows and batches


class Windows:
    """One item per time step t of every episode of a split ("train" or "valid").

    normalizer               None leaves actions and state in their own units
    horizon, first_action    actions of the steps t + first_action .. t + first_action + horizon - 1
    n_obs_steps              state and images of the steps t - n_obs_steps + 1 .. t
    n_state_steps            so many of them instead, from the same first step on (for inpainting)
    text_len                 bytes of the instruction; 0 leaves the text out
    encode                   function that makes codes of an instruction instead, int64 (text_len,)
    device                   where batches come out. The data are held there too if it is a GPU and they take
                             less than a quarter of what is free on it
    """

    def __init__(self, demos, normalizer, horizon, n_obs_steps, first_action, n_state_steps=None, text_len=0,
                 split="train", device="cpu", encode=None):
        self.demos, self.device, self.held_on = demos, torch.device(device), torch.device("cpu")
        self.episodes = {"train": demos.train_episodes, "valid": demos.valid_episodes}[split]
        self.action_steps = torch.arange(first_action, first_action + horizon)
        self.state_steps = torch.arange(n_state_steps or n_obs_steps) - (n_obs_steps - 1)

        # Item i is row i of the flat arrays. Its window: rows i-1, i, i+1, ... clamped to first[i], last[i].
        lengths = torch.from_numpy(demos.lengths[self.episodes])
        self.item_episode = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        starts = lengths.cumsum(0) - lengths
        self.first, self.last = starts[self.item_episode], (starts + lengths - 1)[self.item_episode]
        rows = demos.rows(self.episodes)
        self.actions, self.state = torch.from_numpy(demos.actions[rows]), torch.from_numpy(demos.state[rows])
        if normalizer:
            self.actions = normalizer.normalize("actions", self.actions)
            self.state = normalizer.normalize("state", self.state)
        self.valid = {}
        if isinstance(demos, MixedDemos):           # 0 stays 0 where a robot has nothing
            robot = demos.robot[self.episodes]
            self.valid = {"action_valid": torch.from_numpy(demos.action_valid[robot]),
                          "state_valid": torch.from_numpy(demos.state_valid[robot])}
            self.actions *= self.valid["action_valid"][self.item_episode]
            self.state *= self.valid["state_valid"][self.item_episode]
        self.control_hz = torch.tensor(demos.episode_fps[self.episodes], dtype=torch.float32)
        encode = encode or (lambda text: encode_text(text, text_len))
        try:
            texts = [encode(demos.instructions[e]) for e in self.episodes] if text_len else []
        except ValueError as error:                 # of a model file: too long, a tokenizer that is not there
            raise UserError(str(error)) from None
        self.text = torch.stack(texts) if texts else None

        self.images = None
        if demos.camera_keys:
            shape = (len(demos.camera_keys), 3, *demos.image_size)
            used = np.concatenate([demos.train_episodes, demos.valid_episodes])     # both splits have to fit
            if demos.lengths[used].sum() * np.prod(shape) <= demos.memory_gb * 1e9:
                self.images = torch.empty((len(rows), *shape), dtype=torch.uint8)
                for e, start, length in zip(self.episodes, starts.tolist(), lengths.tolist()):
                    self.images[start:start + length] = torch.from_numpy(demos.images(e, 0, length))
                demos.close()
        held = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}
        all_held = self.images is not None or not demos.camera_keys
        if self.device.type == "cuda" and all_held and \
                4 * sum(x.nbytes for x in held.values()) < torch.cuda.mem_get_info(self.device)[0]:
            self.held_on = self.device
            vars(self).update({name: x.to(self.device) for name, x in held.items()})

    def __len__(self):
        return len(self.first)

    def batch(self, indices):
        """indices (B,) int64 -> dict on `device`: actions (B, Tp, A), action_mask (B, Tp), state (B, To, S)
        and control_hz (B,); images (B, To, V, 3, H, W) uint8 if there are cameras, text (B, L) unless
        text_len is 0; of several robots also action_valid, state_valid (B, dim)."""
        i = indices.to(self.held_on)
        first, last, episode = self.first[i, None], self.last[i, None], self.item_episode[i]
        acted = i[:, None] + self.action_steps                              # (B, Tp) rows, not yet clamped
        seen = (i[:, None] + self.state_steps).clamp(first, last)           # (B, To) rows
        batch = {"actions": gather(self.actions, acted.clamp(first, last)),
                 "action_mask": (acted >= first) & (acted <= last),
                 "state": gather(self.state, seen),
                 "control_hz": self.control_hz[episode],
                 **{key: x[episode.to(x.device)] for key, x in self.valid.items()}}
        if self.images is not None:
            batch["images"] = gather(self.images, seen)
        elif self.demos.camera_keys:
            batch["images"] = self._images_from_files(self.episodes[episode.numpy()], seen - first)
        if self.text is not None:
            batch["text"] = self.text[episode]
        return to_device(batch, self.device)

    def _images_from_files(self, episodes, steps):
        out = []
        for e, wanted in zip(episodes, steps):                              # steps within the episode
            lo, hi = int(wanted[0]), int(wanted[-1]) + 1
            out.append(torch.from_numpy(self.demos.images(e, lo, hi))[wanted - lo])
        return torch.stack(out)

    def episode(self, indices):
        """Names of the episodes that these items are from."""
        numbers = self.item_episode[indices.to(self.held_on)].tolist()
        return [self.demos.episode_names[self.episodes[e]] for e in numbers]


def gather(rows, index):
    """rows[index] for an index (B, T), but whole rows are copied: many times as fast for images on a CPU."""
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])


def to_device(batch, device):
    return {key: x.to(device, non_blocking=True) for key, x in batch.items()}


def batches(windows, batch_size, seed, start_step=0, rank=0, world=1, workers=0):
    """An iterator without end over (indices, batch), for Windows and Samples.

    batch_size is that of one process; there are `world` of them, this is number `rank`. Every epoch goes
    through all items in a new order and drops the rest that does not fill a batch on every rank. The indices
    of step k depend on (seed, k, rank, world) alone: started at start_step=k it goes on as if it had never
    stopped. With workers > 0 that many processes prepare the same batches; that pays only for images that
    stay in the files. Raises UserError if the set is too small, or a file breaks on the way.
    """
    n = len(windows)
    if batch_size * world > n:
        ranks = f" on each of {world} processes" if world > 1 else ""
        raise UserError(f"batch_size {batch_size}{ranks} is more than the {n} items of the set: lower it")
    stream = index_stream(n, batch_size, seed, start_step, rank, world)
    if not workers or windows.held_on.type != "cpu":
        return ((indices, windows.batch(indices)) for indices in stream)
    # A generator of its own: the loader draws a seed for its workers, which must not disturb the run's.
    loader = torch.utils.data.DataLoader(BatchByIndices(windows), batch_size=None, sampler=stream,
                                         num_workers=workers, pin_memory=windows.device.type == "cuda",
                                         generator=torch.Generator())
    return (received(indices, batch, windows.device) for indices, batch in loader)


def received(indices, batch, device):
    if isinstance(batch, UserError):
        raise batch
    return indices, to_device(batch, device)


def index_stream(n, batch_size, seed, start_step, rank, world):
    per_epoch = n // (batch_size * world)
    epoch, start = divmod(start_step, per_epoch)
    while True:
        # Mixed into 32 bits, because torch's CPU generator looks at only the lowest 32 bits of a seed.
        mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
        for k in range(start, per_epoch):
            at = (k * world + rank) * batch_size
            yield order[at:at + batch_size]
        epoch, start = epoch + 1, 0


class BatchByIndices(torch.utils.data.Dataset):
    """For DataLoader's workers: an "item" is a whole batch, on the CPU, as a forked process has no GPU. An
    error is handed over like a batch, because DataLoader would wrap its one line into a traceback."""

    def __init__(self, windows):
        self.windows = copy.copy(windows)
        self.windows.device = torch.device("cpu")

    def __getitem__(self, indices):
        try:
            return indices, self.windows.batch(indices)
        except UserError as error:
            return indices, error


if __name__ == "__main__":
    from check_data import main
    sys.exit(main())
