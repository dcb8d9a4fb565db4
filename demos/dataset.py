"""Episodes -> a checked set of demonstrations: which observations are used, which episodes are held out.

    open_demos("tabletop" or files) -> Demos
    MixedDemos({robot: (Demos, ...)}) -> Demos     several robots in one unified action vector (mixed.py)

Numbers (actions, state) are read once and stay in memory: five million steps of 50 dimensions are 1 GB.
Images stay in the files until they are asked for.
"""
import math

import numpy as np

from demos.episodes import coarse, faults, first_of, label_of, nonfinite, notes_of
from demos.files import find_files, read_episodes
from demos.generated import tabletop_file
from demos.keys import check_extra, choose_keys, width
from demos.limits import refuse_beyond_memory
from demos.reading import Reader
from demos.split import split_episodes
from demos.still import leave_out
from demos.usual import usual_of
from robot import tabletop
from robot.errors import UserError, fingerprint, say
from robot.jpeg import check_colour
from robot.processing import Processing
from robot.transforms import same_shape


class Demos:
    """A checked set of demonstrations, see open_demos.

    the set        state_keys {key: dim in the file}, camera_keys, label_keys {name: dim}, state_dim,
                   action_dim, action_names and state_names ([] where the file has none), image_size (H, W)
                   or None, camera_sizes {key: (H, W)} before resizing, fps (of the first episode),
                   processing, notes (what a user should know)
    each episode   lengths, starts, instructions, episode_names, episode_fps; shown (episodes, V) bool:
                   whether a camera fills this place of the network; train_episodes, valid_episodes: numbers
    each step      actions (N, action_dim), state (N, state_dim), labels (N, sum of their dims): float32, all
                   episodes in a row; episode e begins at starts[e]

    Several state keys, or labels, stand side by side in their order. Actions and state are in the units of
    the file, after the steps of `processing`. Only delta is left to the windows, on which it depends.
    """

    def __init__(self, source, episodes, keys, label_keys, split, memory_gb, image_size=None, colour="bgr",
                 processing=None):
        first = episodes[0]
        self.source, self.episodes, self.memory_gb = str(source), episodes, memory_gb
        self.reader, self.notes = Reader(colour), keys.lines(label_keys)
        self.embeddings = None                  # demos.embeddings.Embeddings, instead of pictures and texts
        self.train_episodes, self.valid_episodes = split
        for episode in episodes:
            cameras = keys.cameras
            if isinstance(processing, dict) and processing.get("cameras"):      # a place may be empty
                cameras = [key for key in cameras if key in episode.obs] or cameras
            for fault in faults(episode, first, keys.state, cameras, resized=bool(image_size)):
                raise UserError(fault)
        self.lengths = np.array([e.length for e in episodes])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.instructions = [e.instruction for e in episodes]
        self.episode_names = [e.name for e in episodes]
        self.episode_fps = rates(episodes)
        self.fps = float(self.episode_fps[0])
        self.state_keys = {key: width(first.obs[key]) for key in keys.state}
        self.camera_keys, self.action_names = list(keys.cameras), first.action_names
        self.label_keys = label_keys
        self.process(Processing(processing, self.state_keys, self.camera_keys))
        self.raw_action_dim = first.actions.shape[1]
        self.action_dim = self.processing.action_dim(self.raw_action_dim)
        self.state_dim = self.processing.state_dim
        names = [name for key in keys.state for name in first.obs[key].names]
        self.state_names = names if len(names) == self.state_dim else []
        check_numbers(source, episodes, self.action_dim + self.state_dim + sum(label_keys.values()))

        raw = np.concatenate([self._numbers(e, "actions", e.actions) for e in episodes])
        obs = {key: np.concatenate([self._numbers(e, key, e.obs[key]) for e in episodes])
               for key in self.state_keys}
        self.fingerprint = fingerprint(raw, np.concatenate([raw[:, :0], *obs.values()], axis=1))
        self.actions, self.state = self._processed(raw, obs)
        labels = [[self._numbers(e, name, label_of(e, name, dim)) for e in episodes]
                  for name, dim in label_keys.items()]
        self.labels = np.concatenate([raw[:, :0], *map(np.concatenate, labels)], axis=1)

        self.camera_sizes = {key: self._size(first, key) for key in self.camera_keys}
        sizes = set(self.camera_sizes.values())
        if len(sizes) > 1 and not image_size:
            raise UserError(f"{first.name}: cameras differ in size, {self.camera_sizes}: --image_size H W "
                            f"brings them to one size, or name equal ones in shape_meta")
        self.resizing = bool(image_size)
        self.image_size = tuple(image_size) if image_size and sizes else next(iter(sizes), None)
        self.notes += remarks(self)
        self.close()

    def process(self, processing):
        self.processing = processing
        self.shown = np.array([[key in e.obs for _, key in processing.places] for e in self.episodes], bool)

    def _size(self, episode, key):
        """(H, W) of a camera; a compressed one is decoded for it."""
        array = episode.obs[key]
        if array.kind == "camera":
            return array.shape[1:3]
        return self.reader.frames(episode, key, 0, 1).shape[1:3]

    def raw_actions(self, e):
        """The actions of episode e as the file has them, (T, A) float32, with the steps that are left out."""
        return self.reader.read(self.episodes[e], self.episodes[e].actions).astype(np.float32)

    def _numbers(self, episode, key, array):
        with np.errstate(over="ignore"):                # what float32 cannot hold becomes infinite, see below
            x = self.reader.read(episode, array).reshape(episode.steps, -1).astype(np.float32)[episode.begin:]
        for fault in nonfinite(episode.name, key, x):
            raise UserError(fault)
        return x

    def _processed(self, raw, obs):
        """The numbers after the steps of `processing`; one episode at a time, so that a fault can name it."""
        actions = np.empty((len(raw), self.action_dim), np.float32)
        state = np.empty((len(raw), self.state_dim), np.float32)
        for name, start, length in zip(self.episode_names, self.starts, self.lengths):
            rows = slice(start, start + length)
            try:
                actions[rows] = self.processing.absolute_actions(raw[rows])
                if obs:
                    state[rows] = self.processing.state({key: x[rows] for key, x in obs.items()})
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        return actions, state

    def images(self, e, lo, hi, out=None):
        """Steps lo .. hi-1 of episode e at all V places of the network: (hi - lo, V, 3, H, W) uint8, RGB,
        written into `out` if it is given. A place without a camera (`shown` is False) is black."""
        places = self.processing.places
        out = np.empty((hi - lo, len(places), 3, *self.image_size), np.uint8) if out is None else out
        out[:, ~self.shown[e]] = 0
        for v, key in [(v, places[v][1]) for v in np.flatnonzero(self.shown[e])]:
            block = max(16, 2**24 // math.prod(self.camera_sizes[key]))  # a whole episode may be gigabytes
            for at in range(lo, hi, block):
                begin = self.episodes[e].begin
                frames = self.reader.frames(self.episodes[e], key, begin + at, begin + min(at + block, hi))
                if frames.shape[1:3] != self.image_size and not self.resizing:
                    raise UserError(f"{self.episode_names[e]}: '{key}' is {frames.shape[1:3]}, others are "
                                    f"{self.image_size}: --image_size H W brings pictures to one size")
                frames = self.processing.image(frames, self.image_size)
                out[at - lo:at - lo + len(frames), v] = np.moveaxis(frames, 3, 1)
        return out

    def rows(self, episodes):
        """Where the steps of these episodes lie in `actions` and `state`."""
        spans = [np.arange(self.starts[e], self.starts[e] + self.lengths[e]) for e in episodes]
        return np.concatenate([np.zeros(0, int), *spans])

    def close(self):
        """Close the files, so that others can write them; what is read next opens them again."""
        self.reader.close()

    def description(self):
        """What a checkpoint keeps of the data: plain values only."""
        return {"source": self.source, "fps": self.fps,
                "state_keys": dict(self.state_keys), "camera_keys": list(self.camera_keys),
                "image_size": list(self.image_size) if self.image_size else None,
                "camera_sizes": {key: list(size) for key, size in self.camera_sizes.items()},
                "state_dim": sum(self.state_keys.values()), "action_dim": self.raw_action_dim,
                "action_names": self.action_names, "processing": self.processing.spec,
                "instructions": sorted(set(self.instructions) - {""}), "episode_names": self.episode_names,
                "fingerprint": self.fingerprint, "lengths": self.lengths.tolist(),
                "train_episodes": self.train_episodes.tolist(),
                "valid_episodes": self.valid_episodes.tolist(), "usual": self.usual()}

    def usual(self):
        """How the episodes trained on usually are, for robot/preflight.py."""
        return usual_of([self.episodes[e] for e in self.train_episodes], list(self.state_keys),
                        self.camera_keys, self.fps, self.reader.colour)


def rates(episodes):
    """Control steps per second of each. Neither robosuite nor ALOHA nor a replay buffer writes it down."""
    return np.array([e.fps or e.usual_fps for e in episodes])


def check_numbers(source, episodes, per_step):
    """Refuse what cannot fit: all of it as float32, held three times while it is gathered and normalised."""
    steps = sum(e.length for e in episodes)
    refuse_beyond_memory(f"{source}: {steps:,} steps of {per_step} numbers", steps * (12 * per_step + 64),
                         "split the set, or leave arrays out with shape_meta")


def remarks(demos):
    """What was guessed, passed over or changed, a line each."""
    silent = [e.name for e in demos.episodes if not e.fps]
    if silent:
        usual = demos.episode_fps[demos.episode_names.index(silent[0])]
        yield f"{silent[0]} does not say its rate, {usual:g} Hz assumed: set attribute 'fps'"
    if not len(demos.valid_episodes):
        yield f"no episode of {demos.source} is held out, {len(demos.train_episodes)} trained on"
    for v, (place, key) in enumerate(demos.processing.places):
        without = [name for name, has in zip(demos.episode_names, demos.shown[:, v]) if key and not has]
        if without:
            yield f"{first_of(without)}: no camera '{key}', the place '{place}' is hidden there (image_mask)"
    yield from notes_of(demos.episodes)
    at = np.cumsum([0, *demos.processing.state_dims.values()])
    parts = {"actions": demos.actions} | {
        key: demos.state[:, lo:hi] for key, lo, hi in zip(demos.state_keys, at, at[1:])}
    for key, x in parts.items():
        yield from coarse(key, x)
    for key, size in demos.camera_sizes.items():
        if size != demos.image_size:
            height, width = demos.image_size
            stretched = demos.processing.rule.get("fit", "stretch") == "stretch"
            kept = not stretched or same_shape(size, demos.image_size)
            yield f"camera '{key}' is resized from {size[0]} x {size[1]} to {height} x {width}" + (
                "" if kept else ", which changes its proportions")


def open_demos(source, obs="lowdim", text=False, shape_meta=None, extra=None, episodes=None, val_ratio=None,
               max_train_episodes=None, seed=0, cache=None, memory_gb=4.0, image_size=None, colour="bgr",
               processing=None, still=0.0, shortest=0):
    """Open and check demonstrations: -> Demos. Raises UserError for what is wrong, prints notes to stderr.

    source       "tabletop", "tabletop_velocity" (the other robot), or a path, folder or glob of files in a
                 layout that demos/files.py knows
    obs          "lowdim": all float observations, no cameras. "image": cameras, and all float observations
                 but `object` (with text=True also without `goal`). "auto": as "image" where there are
                 cameras, else as "lowdim". Not looked at if shape_meta is given
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
    image_size   (H, W): pictures are brought to this size as they are read (robot/transforms.py); None: they
                 stay as they are, and all have to have one size
    colour       order of the colours in JPEG frames, see robot/jpeg.py: "bgr" (OpenCV's recorders) or "rgb"
    processing   what is done to numbers and pictures before the normaliser, see robot/processing.py
    still        steps are left out before the state has moved so far, see demos/still.py
    shortest     episodes of less steps are left out
    """
    if source in tabletop.ROBOTS:
        files = [tabletop_file(obs != "lowdim", episodes, seed, cache, source)]
    else:
        files = find_files(source)
    extra = extra or {}
    check_extra(extra)
    check_colour(colour)
    found = [episode for path in files for episode in read_episodes(path)]
    keys = choose_keys(found, obs, text, shape_meta, extra)
    found, left_out = leave_out(found, keys.state, still, shortest)
    split, notes = split_episodes(found, val_ratio, max_train_episodes, seed)
    demos = Demos(source, found, keys, extra, split, memory_gb, image_size, colour, processing)
    for key in keys.cameras if shape_meta else []:
        if tuple(shape_meta["obs"][key]["shape"]) != (3, *demos.image_size):
            raise UserError(f"shape_meta: '{key}' is {shape_meta['obs'][key]['shape']}, but the pictures of "
                            f"{source} are {[3, *demos.image_size]}: correct it, or resize: --image_size H W")
    demos.notes += notes + left_out
    missing = sum(not text for text in demos.instructions)
    if text and missing:
        demos.notes.append(f"{source} has no instructions, texts are empty: set 'language_instruction'"
                           if missing == len(found) else f"{missing} of {len(found)} episodes have no "
                           f"instruction, their texts are empty: set 'language_instruction'")
    for note in demos.notes:
        say(note)
    return demos
