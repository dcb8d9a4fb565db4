"""What a LeRobot folder says beside its weights: observations, statistics, what is done to them.

config.json names the observations; policy_preprocessor.json and policy_postprocessor.json list the steps
before and after the network, and name the files of statistics. Folders of early 2025 have neither: their
statistics are tensors among the weights, their modes stand in config.json. (lerobot: src/lerobot/processor/)
"""
import re

import torch

from .errors import UserError, few, one_line
from .normalizer import Normalizer
from .weight_files import read_safetensors

# LeRobot's mode -> ours, {what Normalizer.from_stats reads: the file's name of it}, what is added to a width.
MODES = {"IDENTITY": ("none", {}, 0.0),
         "MEAN_STD": ("meanstd", {"mean": "mean", "std": "std"}, 1e-8),
         "MIN_MAX": ("minmax", {"min": "min", "max": "max"}, 0.0),
         "QUANTILES": ("quantile", {"q01": "q01", "q99": "q99"}, 0.0),
         "QUANTILE10": ("quantile", {"q01": "q10", "q99": "q90"}, 0.0)}
ZERO_RANGE = 1e-8               # what LeRobot divides by where a range is 0
# Early files: normalize_inputs.buffer_observation_state.mean
EARLY = re.compile(r"^(?:un)?normalize_(?:inputs|targets|outputs)\.buffer_(.+)\.(\w+)$")
STATE, ACTION = "observation.state", "action"


class LeRobotFolder:
    """cameras: their names, in the order of config.json. steps {name: its options} of both processors. early:
    made before there were processors. known: the steps that are done here, any other is refused. Raises
    UserError."""

    def __init__(self, download, known):
        self.name, self.config, self.download = download.name, download.config, download
        self.lists = {part: download.json(f"policy_{part}processor.json") for part in ("pre", "post")}
        self.early, self.steps = not self.lists["pre"], {}
        for part, content in self.lists.items():
            for step in self.entries(content, "steps", list):
                name = step.get("registry_name") if isinstance(step, dict) else None
                if name not in known:
                    raise UserError(f"{self.name}: policy_{part}processor.json has a step "
                                    f"{one_line(name, 60)!r}, which is not done here; done are {few(known)}")
                self.steps[name] = step | self.entries(step, "config", dict)
        renamed = self.entries(self.steps.get("rename_observations_processor", {}), "rename_map", dict)
        self.robots = {ours: theirs for theirs, ours in renamed.items()}    # {in config.json: the robot's}
        inputs = self.entries(self.config, "input_features", dict)
        self.cameras = [name for name in inputs if self.entries(inputs, name, dict).get("type") == "VISUAL"]

    def entries(self, content, key, kind):
        """content[key], empty if there is none. Raises UserError where it is something else."""
        value = content.get(key)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise UserError(f"{self.name}: {one_line(key, 60)} is {one_line(value, 60)}, no {kind.__name__}: "
                            f"take the files as they were downloaded")
        return value

    def robots_name(self, name):
        return self.robots.get(name, name)

    def width(self, features, name, default):
        """Numbers of the observation or command `name`."""
        part = self.entries(self.entries(self.config, features, dict), name, dict)
        shape = part.get("shape") or [default]
        if len(shape) != 1 or type(shape[0]) is not int:
            raise UserError(f"{self.name}: config.json: {name} has shape {one_line(shape, 60)}, not [D]")
        return shape[0]

    def number(self, key, default=None):
        """A whole number of config.json."""
        value = self.config.get(key, default)
        if type(value) is not int or value < 0:
            raise UserError(f"{self.name}: config.json has {key} {one_line(value, 40)}, no whole number: "
                            f"it is another program's, or it was edited")
        return value

    def normalizer(self, state_dim, action_dim):
        """-> Normalizer of "state" and "actions", or None where the folder has no statistics: such weights
        are meant to be trained further, on data that have."""
        modes, stats, eps = {}, {}, {}
        wanted = (("state", STATE, "STATE", state_dim), ("actions", ACTION, "ACTION", action_dim))
        for key, name, kind, dim in wanted:
            mode, found = self.mode(key, name, kind), self.statistics(key)
            modes[key], names, eps[key] = MODES[mode]
            if names and not found:
                return None
            stats[key] = {ours: self.statistic(found, name, theirs, dim) for ours, theirs in names.items()}
            stats[key] = stats[key] or {"mean": torch.zeros(dim)}
        return Normalizer.from_stats(modes, stats, eps=eps, floor=ZERO_RANGE)

    def mode(self, key, name, kind):
        step = self.steps.get("normalizer_processor" if key == "state" else "unnormalizer_processor")
        table = self.config.get("normalization_mapping") if step is None else step.get("norm_map")
        mode = (table or {}).get(kind, "IDENTITY")
        chosen = (step or {}).get("normalize_observation_keys")
        mode = "IDENTITY" if key == "state" and chosen is not None and name not in chosen else mode
        if mode not in MODES:
            raise UserError(f"{self.name}: {kind} is normalised by {one_line(mode, 60)!r}, which is none of "
                            f"{few(MODES)}")
        return mode

    def statistics(self, key):
        """{"<feature>.<statistic>": tensor} of the pre- or the postprocessor, or of an early file."""
        if self.early:
            found = {EARLY.match(name): x for name, x in self.download.weights.items() if EARLY.match(name)}
            dotted = lambda feature: feature.replace("_", ".")      # as LeRobot's own migration has it
            return {f"{dotted(m[1])}.{m[2]}": x for m, x in found.items()}
        step = self.steps.get("normalizer_processor" if key == "state" else "unnormalizer_processor", {})
        file = step.get("state_file")
        if not file:
            return {}
        path = self.download.folder / str(file)
        if path.parent != self.download.folder or not path.is_file():
            raise UserError(f"{self.name} lacks {one_line(file, 100)}, its statistics: download it as well")
        return read_safetensors(path)

    def statistic(self, found, name, statistic, dim):
        x = found.get(f"{name}.{statistic}")
        if x is None:
            raise UserError(f"{self.name}: the statistics lack {name}.{statistic}, which its normalisation "
                            f"reads; they have {few(found, 6)}")
        if x.shape != (dim,):
            raise UserError(f"{self.name}: {name}.{statistic} of the statistics has shape {tuple(x.shape)}, "
                            f"config.json says ({dim},): they are another robot's")
        return x
