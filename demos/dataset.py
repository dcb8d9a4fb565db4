"""Episodes -> a checked set of demonstrations: which observations are used, which episodes are held out.

    open_demos("tabletop" or files) -> Demos
    MixedDemos({robot: (Demos, ...)}) -> Demos     several robots in one unified action vector (mixed.py)

Numbers (actions, state) are read once and stay in memory: five million steps of 50 dimensions are 1 GB.
Images stay in the files until they are asked for.
"""
import os
import sys

import numpy as np

from demos.episodes import decode_jpeg, faults, label_of, nonfinite
from demos.files import find_files, open_file, read_episodes
from demos.generated import tabletop_file
from robot import tabletop
from robot.errors import UserError, fingerprint, nearest, one_line


# What a batch holds already, see data.Windows.
TAKEN = ("actions", "action_mask", "state", "images", "text", "control_hz", "action_valid", "state_valid")


def choose_keys(first, obs, text, shape_meta, extra):
    """(state keys, camera keys): named by shape_meta, or else found by their kind in the first episode."""
    if shape_meta:
        return keys_of_shape_meta(first, shape_meta)
    if obs not in ("lowdim", "image"):
        raise UserError(f"obs is 'lowdim' or 'image', not {obs!r}{nearest(obs, ('lowdim', 'image'))}")
    # `object` is what only a simulator knows; `goal` says in numbers what the instruction says in words.
    hidden = [] if obs == "lowdim" else ["object", "goal"] if text else ["object"]
    hidden += extra             # a policy that was shown what it has to tell would learn nothing
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


def check_extra(extra):
    for name, dim in extra.items():
        if name in TAKEN:
            raise UserError(f"extra: a batch has its own '{name}': give the label another name in the file")
        if type(dim) is not int or dim < 1:
            raise UserError(f"extra: {name}: {dim!r} should be how many numbers a step has, for example 1")


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

    Of the set: state_keys {key: dim}, camera_keys, label_keys {name: dim}, state_dim, action_dim,
    action_names, image_size (H, W) or None, fps (of the first episode), notes (what a user should know).
    Of each episode: lengths, instructions, episode_names, episode_fps. train_episodes, valid_episodes:
    numbers. Of each step: actions (N, action_dim), state (N, state_dim): float32, in the units of the file,
    all episodes in a row; episode e begins at starts[e]. The state keys stand side by side in their order. So
    do the labels: labels (N, sum of their dims).
    """

    def __init__(self, source, episodes, state_keys, camera_keys, label_keys, split, memory_gb):
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
        self.label_keys = label_keys
        labels = [[self._numbers(e, name, label_of(e, name, dim)) for e in episodes]
                  for name, dim in label_keys.items()]
        self.labels = np.concatenate([self.actions[:, :0], *map(np.concatenate, labels)], axis=1)

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
                "fingerprint": fingerprint(self.actions, self.state), "lengths": self.lengths.tolist(),
                "train_episodes": self.train_episodes.tolist(),
                "valid_episodes": self.valid_episodes.tolist()}


def open_demos(source, obs="lowdim", text=False, shape_meta=None, extra=None, episodes=None, val_ratio=None,
               max_train_episodes=None, seed=0, cache=None, memory_gb=4.0):
    """Open and check demonstrations: -> Demos. Raises UserError for what is wrong, prints notes to stderr.

    source       "tabletop", "tabletop_velocity" (the other robot), or a path, folder or glob of HDF5
    obs          "lowdim": all float observations, no cameras. "image": cameras, and all float observations
                 but `object` (with text=True also without `goal`). Not looked at if shape_meta is given
    text         whether instructions will be read
    shape_meta   {"obs": {key: {"shape": [..], "type": "rgb" | "low_dim"}}, "action": {"shape": [..]}} as in
                 Diffusion Policy: the keys, their order and their shapes, which are checked. rgb is [3, H, W]
    extra        {name: dim} of labels per step, which a loss reads beside the actions (success, progress).
                 They lie beside the actions or among the observations; a policy does not see them unless
                 shape_meta names them too
    episodes     for tabletop: how many rollouts to generate (default 1000, with cameras 2000:
                 see demos/generated.py)
    val_ratio    share of the episodes to hold out, at least one. None: what the files' masks say, else 0.05
    seed         of the split and of the generated set
    cache        folder of the generated set (default $ACTION_DIFFUSION_CACHE, else ~/.cache/action_diffusion)
    memory_gb    images that take more than this, decoded, are left in the files
    """
    if source in tabletop.ROBOTS:
        files = [tabletop_file(obs == "image", episodes, seed, cache, source)]
    else:
        files = find_files(source)
    extra = extra or {}
    check_extra(extra)
    found = [episode for path in files for episode in read_episodes(path)]
    state_keys, camera_keys = choose_keys(found[0], obs, text, shape_meta, extra)
    split = split_episodes(found, val_ratio, max_train_episodes, seed)
    demos = Demos(source, found, state_keys, camera_keys, extra, split, memory_gb)
    for key in camera_keys if shape_meta else []:
        if tuple(shape_meta["obs"][key]["shape"]) != (3, *demos.image_size):
            raise UserError(f"shape_meta: '{key}' is {shape_meta['obs'][key]['shape']}, but the pictures of "
                            f"{source} are {[3, *demos.image_size]}: correct it")
    if text and not any(demos.instructions):
        demos.notes.append(f"{source} has no instructions, texts are empty: set 'language_instruction'")
    for note in demos.notes:
        print(f"note: {note}", file=sys.stderr)
    return demos
