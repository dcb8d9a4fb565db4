"""Several robots as one set."""
import numpy as np

from demos.dataset import Demos
from robot.errors import UserError, fingerprint
from robot.policy import BACKGROUND
from robot.processing import Processing


class MixedDemos(Demos):
    """Sets of several robots as one: actions and state stand at their places in a unified vector of `dim`
    numbers, 0 elsewhere.

    parts {robot: (Demos, places of its actions, places of its state)}. A set with fewer cameras than another
    shows BACKGROUND for the others; the pictures of all have one size. robots: their names; of each:
    action_valid, state_valid (robots, dim) bool, which places it has; of each episode: robot, its number.
    """
    def __init__(self, parts, dim=128):
        self.robots, self.parts = list(parts), [demos for demos, _, _ in parts.values()]
        self.places = {name: {"actions": list(a), "state": list(s)} for name, (_, a, s) in parts.items()}
        first = max(self.parts, key=lambda demos: len(demos.camera_keys))
        sizes = {name: demos.image_size for name, (demos, _, _) in parts.items() if demos.image_size}
        if len(set(sizes.values())) > 1:
            raise UserError(f"pictures of the robots differ in size, {sizes}: bring them to one size, "
                            f"--image_size H W does it")
        for name, (demos, actions, state) in parts.items():
            for kind, places in (("action", actions), ("state", state)):
                has = getattr(demos, f"{kind}_dim")
                if has != len(places):
                    raise UserError(f"robot {name}: {demos.source} has {has} {kind} dimensions, {kind}_names "
                                    f"names {len(places)}: name each, in their order")
        chain = lambda name: [x for demos in self.parts for x in getattr(demos, name)]
        self.source, self.memory_gb = " + ".join(d.source for d in self.parts), first.memory_gb
        self.notes, self.episodes, self.embeddings = [], chain("episodes"), None
        self.state_keys, self.camera_keys, self.action_names, self.state_names = {}, first.camera_keys, [], []
        self.image_size, self.state_dim, self.action_dim = first.image_size, dim, dim
        self.raw_action_dim, self.processing = dim, Processing({}, {}, self.camera_keys)
        self.camera_sizes = first.camera_sizes
        self.label_keys, self.labels = first.label_keys, np.concatenate([d.labels for d in self.parts])
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
        self.shown = np.ones((len(self.lengths), len(self.camera_keys)), bool)
        self.fingerprint = fingerprint(self.actions, self.state)

    def images(self, e, lo, hi, out=None):
        demos, size = self.parts[self.robot[e]], (hi - lo, len(self.camera_keys), 3, *self.image_size)
        out, own = np.empty(size, np.uint8) if out is None else out, len(demos.camera_keys)
        out[:, own:] = BACKGROUND
        if own:
            demos.images(e - self.offsets[self.robot[e]], lo, hi, out[:, :own])
        return out

    def close(self):
        for demos in self.parts:
            demos.close()

    def usual(self):
        return {}                               # of a mixture nothing is; each robot has its own

    def description(self):
        each = {}
        for name, demos in zip(self.robots, self.parts):
            part = demos.description()
            keys = ("source", "fps", "state_keys", "camera_keys", "image_size", "camera_sizes",
                    "action_names", "usual")
            each[name] = {key: part[key] for key in keys} | {"places": self.places[name]}
        whole = super().description()
        return whole | {"state_dim": self.state_dim, "robots": each}
