"""The scale between a robot's units and the numbers of a network. It travels inside the checkpoint."""
import itertools

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
    none      nothing: the network works in these units             1, 0

    `mode` is one of these, or {key: one of them, or a list with that of each number}.

    A near-constant dimension (range, deviation or max |x| below EPS) would be blown up to noise of full size.
    It is only shifted: its smallest value, its mean or its 1 % point goes to 0. near_constant = {key:
    [dimensions]}. The first three are "limits", "gaussian" and "limits without offset" of Diffusion Policy's
    LinearNormalizer (diffusion_policy/model/common/normalizer.py).
    """
    MODES = ("minmax", "meanstd", "maxabs", "quantile", "none")
    EPS = 1e-4

    def __init__(self, mode, scale, centre, stats, near_constant):
        self.mode, self.scale, self.centre = mode, scale, centre
        self.stats, self.near_constant = stats, near_constant

    @classmethod
    def fit(cls, data, mode="minmax"):
        """data: {key: (N, D) array, or an iterable of D columns of any length}, finite. A number of which
        nothing is known, an empty column, stays as it is. Raises UserError for an unknown mode."""
        self = cls(mode, {}, {}, {}, {})
        for key, columns in data.items():
            of_each, columns = modes_of(mode, key), columns.T if hasattr(columns, "T") else columns
            fitted = [fit_column(np.asarray(x, np.float64), one, cls.EPS) for x, one in zip(columns, of_each)]
            scale, centre, flat, *stats = zip(*fitted) if fitted else [()] * 7
            float32 = lambda a: torch.tensor(a, dtype=torch.float32)
            self.stats[key] = dict(zip(("min", "max", "mean", "std"), map(float32, stats)))
            self.scale[key], self.centre[key] = float32(scale), torch.tensor(centre, dtype=torch.float64)
            self.near_constant[key] = [d for d, is_flat in enumerate(flat) if is_flat]
        return self

    @classmethod
    def from_stats(cls, mode, stats, eps=0.0, floor=1e-8):
        """A normaliser from the statistics of a release instead of data. Raises UserError.

        stats {key: {"mean", "std", "min", "max", "q01", "q99": (D,)}}, keys "actions" and "state"; those that
        the mode needs must be there. eps is added to every deviation and range (a number, or {key: number}:
        openpi has 1e-6, LeRobot 1e-8 for deviations on the way in). What is 0 even then becomes `floor`.
        """
        self = cls(mode, {}, {}, {}, {})
        for key, given in stats.items():
            given = {name: torch.as_tensor(given[name], dtype=torch.float64).flatten()
                     for name in STATISTICS if name in given}
            lengths = {name: len(x) for name, x in given.items()}
            if len(set(lengths.values())) != 1:
                raise UserError(f"statistics of {key!r}: they need one length, there are {lengths or 'none'}")
            dim, margin = min(lengths.values()), eps.get(key, 0) if isinstance(eps, dict) else eps
            pairs = []
            for d, one in zip(range(dim), modes_of(mode, key, dim)):
                for name in NEEDED[one]:
                    if name not in given:
                        raise UserError(f"statistics of {key!r}: mode {one} needs {name!r}, there are "
                                        f"{', '.join(given)}")
                pairs.append(scale_and_centre(one, *[given[name][d].item() for name in NEEDED[one]],
                                              margin=margin, floor=floor))
            scale, centre = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
            self.scale[key], self.centre[key], self.near_constant[key] = scale, centre, []
            self.stats[key] = {name: x.float() for name, x in filled(given).items()}
        return self

    @classmethod
    def of_units(cls, dims):
        """One that does nothing, where there are no statistics. dims: {key: numbers}"""
        scale = {key: torch.ones(dim) for key, dim in dims.items()}
        centre = {key: torch.zeros(dim, dtype=torch.float64) for key, dim in dims.items()}
        return cls("none", scale, centre, {}, {key: [] for key in dims})

    def normalize(self, key, x, dtype=torch.float32):
        """x (..., D), a tensor on any device"""
        y = (x.cpu().double() - self.centre[key]) * self.scale[key]     # not every device has float64
        return y.to(dtype).to(x.device)

    def unnormalize(self, key, x):
        """The inverse of `normalize`."""
        return (x.cpu().double() / self.scale[key] + self.centre[key]).float().to(x.device)

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

    def mode_of(self, key):
        """The mode of a key in words; of several, each once."""
        mode = self.mode.get(key, "none") if isinstance(self.mode, dict) else self.mode
        return mode if isinstance(mode, str) else " and ".join(dict.fromkeys(mode))

    def summary(self):
        """One line per key, with a warning where dimensions hardly move."""
        lines = []
        for key, stats in self.stats.items():
            line = f"{key}: {len(stats['min'])} dimensions, {self.mode_of(key)}"
            if len(stats["min"]):
                line += f", raw values from {stats['min'].min():.4g} to {stats['max'].max():.4g}"
            if self.near_constant[key]:
                names = ", ".join(map(str, self.near_constant[key]))
                line += f"; WARNING: near-constant dimensions {names} (within {self.EPS:g}) are not scaled"
            lines.append(line)
        return "\n".join(lines)


# The two statistics that a mode is made of.
NEEDED = {"minmax": ("min", "max"), "meanstd": ("mean", "std"), "maxabs": ("min", "max"),
          "quantile": ("q01", "q99"), "none": ()}
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


def modes_of(mode, key, dim=None):
    """The mode of each number of a key. Raises UserError for an unknown one, or if they are not `dim`."""
    found = mode[key] if isinstance(mode, dict) else mode
    for name in [found] if isinstance(found, str) else found:
        if name not in Normalizer.MODES:
            known = nearest(name, Normalizer.MODES) or f": it is one of {', '.join(Normalizer.MODES)}"
            raise UserError(f"there is no normaliser {name!r}{known}")
    if isinstance(found, str):
        return itertools.repeat(found)
    if dim not in (None, len(found)):
        raise UserError(f"statistics of {key!r} are for {dim} numbers, there are {len(found)}")
    return found


def scale_and_centre(mode, first=0.0, second=1.0, margin=0.0, floor=1e-8):
    """From the two statistics that the mode is made of, see NEEDED."""
    if mode == "none":
        return 1.0, 0.0
    if mode == "meanstd":
        return 1 / ((second + margin) or floor), first
    if mode == "maxabs":
        return 1 / ((max(abs(first), abs(second)) + margin) or floor), 0.0
    width = (second - first + margin) or floor
    centre = first + width / 2
    # From the centre as it is rounded, and kept in float64: what lies at `first` becomes exactly -1, in a
    # range of 1e-8 too. A policy whose text holds the state (pi05.py) reads another number below it.
    return 1 / ((centre - first) or width / 2), centre


def filled(given):
    """min, max, mean and std where a release does not give all of them: what a normal distribution would
    have. They only say which observations are unusual."""
    low, high = given.get("min", given.get("q01")), given.get("max", given.get("q99"))
    mean = given.get("mean", (low + high) / 2 if low is not None and high is not None else None)
    std = given.get("std", (high - low) / 5 if low is not None and high is not None else None)
    if mean is None or std is None:
        raise UserError(f"statistics: {', '.join(given)} do not say where the numbers lie")
    return {"min": mean - 3 * std if low is None else low, "max": mean + 3 * std if high is None else high,
            "mean": mean, "std": std}


def fit_column(x, mode, eps):
    """-> scale, centre, whether it hardly changes, and min, max, mean, std of x (N,)"""
    if not len(x):
        return 1.0, 0.0, False, 0.0, 0.0, 0.0, 0.0
    stats = x.min(), x.max(), x.mean(), x.std(ddof=1)
    low, high = np.quantile(x, [0.01, 0.99]) if mode == "quantile" else stats[:2]
    width = {"none": 1, "meanstd": stats[3], "maxabs": max(abs(low), abs(high))}.get(mode, high - low)
    if width >= eps:
        first, second = stats[2:] if mode == "meanstd" else (low, high)
        return *scale_and_centre(mode, first, second), False, *stats
    return 1.0, {"meanstd": stats[2], "maxabs": 0.0}.get(mode, low), True, *stats
