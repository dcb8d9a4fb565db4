"""The scale between a robot's units and the numbers of a network. It travels inside the checkpoint."""
import numpy as np
import torch

from .errors import UserError, nearest


class Normalizer:
    """y = (x - centre) * scale, per key and dimension: float32 in and out, float64 in between.

    The centre is taken off first: of a coordinate of millions of metres, x * scale + offset in float32 would
    leave rounding errors as large as the steps of a robot.

    mode      what it does to the data                              scale, centre
    minmax    into [-1, 1]                                          2 / (max - min), (min + max) / 2
    meanstd   mean 0, (unbiased) deviation 1                        1 / std, mean
    maxabs    into [-1, 1], zero stays zero                         1 / max |x|, 0
    quantile  1 % .. 99 % into [-1, 1], what lies beyond goes out   as minmax, from these two points

    A near-constant dimension (range, deviation or max |x| below EPS) would be blown up to noise of full size.
    It is only shifted: its smallest value, its mean or its 1 % point goes to 0. near_constant = {key:
    [dimensions]}. The first three are "limits", "gaussian" and "limits without offset" of Diffusion Policy's
    LinearNormalizer (diffusion_policy/model/common/normalizer.py).
    """
    MODES = ("minmax", "meanstd", "maxabs", "quantile")
    EPS = 1e-4

    def __init__(self, mode, scale, centre, stats, near_constant):
        self.mode, self.scale, self.centre = mode, scale, centre
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
                scale, centre = 1 / width, mean
            elif mode == "maxabs":
                scale, centre = 1 / width, np.zeros_like(width)
            else:
                scale, centre = np.where(flat, 1, 2 / width), np.where(flat, low, (low + high) / 2)
            self.scale[key], self.centre[key] = float32(scale), torch.tensor(centre)
            self.near_constant[key] = np.flatnonzero(flat).tolist()
        return self

    @classmethod
    def from_stats(cls, modes, stats, eps=0.0, floor=1e-8):
        """A normaliser from the statistics of a release instead of data.

        modes {key: mode, or a list of the modes of its numbers}, stats {key: {"mean", "std", "min", "max",
        "q01", "q99": (D,)}} (those that the mode needs), keys "actions" and "state". eps is added to every
        deviation and range (a number, or {key: number}); what is 0 even then becomes `floor`.
        """
        raise NotImplementedError

    def normalize(self, key, x):
        """x (..., D), a tensor on any device"""
        y = (x.cpu().double() - self.centre[key]) * self.scale[key]     # not every device has float64
        return y.float().to(x.device)

    def unnormalize(self, key, x):
        """The inverse of `normalize`."""
        return (x.cpu().double() / self.scale[key] + self.centre[key]).float().to(x.device)

    def offset(self, key):
        """What y = x * scale + offset would have: Diffusion Policy's parameter of this name."""
        return -self.centre[key] * self.scale[key]

    def state(self):
        """Everything as plain dicts, lists and tensors, for torch.save and torch.load(weights_only=True)."""
        return {name: getattr(self, name) for name in ("mode", "scale", "centre", "stats", "near_constant")}

    @classmethod
    def from_state(cls, state):
        if "offset" in state:           # of the first checkpoints, which had y = x * scale + offset
            state = dict(state)
            offset = {key: x.double() for key, x in state.pop("offset").items()}
            state["centre"] = {key: -x / state["scale"][key] for key, x in offset.items()}
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
