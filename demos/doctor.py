"""What can be wrong with the numbers of a data set. Each function examines one thing and gives Findings.

A threshold is either a convention of the training (its horizon, what its normaliser calls near-constant), or
so far out that no clean recording comes near it; the comment beside it says which. demos/doctor_cameras.py
examines the pictures, demos/check.py prints what both found.
"""
import collections
import itertools
import math

import numpy as np

from demos.episodes import coarse
from demos.findings import Finding, of
from demos.motion import steps_gone
from robot.errors import few, fingerprint, one_line
from robot.looks import spread
from robot.normalizer import Normalizer

STILL = 0.01                    # what stays within this share of its range does not move
IDLE_SECONDS = 0.5              # longer than a person's reaction: who waits longer has not begun
IDLE_SHARE = 0.1                # of the episodes: fewer hardly teach to wait
SLIVER = 0.02                   # 98 of 100 values within this share of the range: the scale is that of spikes
TURNS = (2 * np.pi, 360.0)
COPY = 0.5                      # of the motion in one step: an action nearer to its state than that is a copy
EXCEEDS = 0.05                  # of the range: less than the error that policies make
CHANCE = 1e-3                   # of a test over all dimensions together
RATE_SHARE = 0.05               # by which two rates differ if they are not the same
FACTOR = 3                      # times the usual, or a third of it: an outlier, unless such a spread is usual
LEAST = 5                       # episodes, to say what is usual
CHOICES = 10                    # values at most of a number that is a choice
MOST_STARTS = 2000              # start poses that are compared, each with each
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


# ---- dimensions


def dimensions(found):
    """Constant, near-constant and squeezed dimensions, and float32's precision."""
    for key, x in found.numbers.items():
        x = x[np.isfinite(x).all(1)]
        if not len(x):
            continue
        span = np.ptp(x, axis=0)
        low, high = np.quantile(x, [0.01, 0.99], axis=0)
        near = (span < Normalizer.EPS) & (span > 0)
        spiky = (span >= Normalizer.EPS) & (high - low < SLIVER * span) & (high > low)
        for name, those, level, says in (
                ("constant dimension", span == 0, "note", "is constant"),
                ("near-constant dimension", near, "fault", f"is near-constant (within {Normalizer.EPS:g})"),
                ("spikes", spiky, "fault", f"has 98 % of its values within {SLIVER:.0%} of its range")):
            if those.any():
                where = few(map(str, np.flatnonzero(those)), 12)
                yield Finding(name, f"'{key}' {says} in dimension {where}", level)
        for line in coarse(key, x):
            yield Finding("precision", line)


def angle_wraps(found):
    """A dimension that ranges over one turn, no more, and leaps from one end of it to the other."""
    inside = steps_gone(found.lengths)[1:] > 0
    for key, x in found.numbers.items():
        if len(x) < 2:
            continue
        low, span = x.min(0), np.ptp(x, axis=0)
        for turn in TURNS:
            leaps = (abs(np.diff(x, axis=0)) > 0.75 * turn) & inside[:, None]
            ends = np.minimum(x - low, low + span - x) < 0.15 * turn
            leaps &= ends[1:] & ends[:-1]
            wraps = leaps.any(0) & (span > 0.9 * turn) & (span < 1.1 * turn)
            for d in np.flatnonzero(wraps):
                unit = "degrees" if turn == 360 else "2 pi"
                where = np.unique(np.searchsorted(found.starts, np.flatnonzero(leaps[:, d]), "right") - 1)
                yield Finding("angle wrap", f"'{key}' leaps by about {turn:.4g} ({unit}) in dimension {d}, "
                              f"{leaps[:, d].sum()} times in {of(len(where), len(found.lengths))}",
                              "fault" if key == "actions" else "note", where.tolist())


def late_actions(found, pairs):
    """Actions that say where the arm is or was, and states that follow only beyond a whole chunk."""
    moves = abs(np.diff(found.state, axis=0))[steps_gone(found.lengths)[1:] > 0]
    late = [p for p in pairs if p.kind == "position" and p.lag <= 0
            and p.apart < COPY * moves[:, p.state].mean()]
    for steps, those in itertools.groupby(sorted(late, key=lambda p: -p.lag), key=lambda p: p.lag):
        names = ", ".join(pair_name(found, p) for p in list(those)[:4])
        when = "the same step" if steps == 0 else f"{-steps} step{'s' * (steps < -1)} before"
        yield Finding("late action", f"actions repeat the state of {when}: {names}")


def slow_states(found, pairs, horizon):
    slow = [p for p in pairs if p.kind == "position" and p.lag > horizon]
    if slow:
        names = ", ".join(f"{pair_name(found, p)} after {p.lag} steps" for p in slow[:4])
        yield Finding("slow state", f"a state follows its action only beyond a chunk of {horizon}: {names}")


def pair_name(found, pair):
    key, d = found.state_columns[pair.state]
    return f"actions[{pair.action}] -> {'change of ' * (pair.kind == 'velocity')}{one_line(key, 24)}[{d}]"


def clipped(found):
    """(share of the held-out steps with an action beyond those trained on, [Finding]).

    Of n + 1 episodes alike, each is the one that reaches farthest with a chance of 1 / (n + 1), at either end
    of a dimension. So it is no finding that a few held-out episodes reach beyond; it is if more do than this
    chance explains."""
    if found.split is None or not all(map(len, found.split)):
        return None, []
    train, valid = found.split
    inside = np.concatenate([found.part("actions", e) for e in train])
    low, high = inside.min(0), inside.max(0)
    margin = EXCEEDS * np.maximum(high - low, Normalizer.EPS)
    beyond = [(x < low - margin) | (x > high + margin) for x in (found.part("actions", e) for e in valid)]
    share = float(np.concatenate(beyond).any(1).mean())
    those = np.stack([b.any(0) for b in beyond])                            # (held out, A)
    chance = min(1.0, 2 / (len(train) + 1))
    odd = [d for d, k in enumerate(those.sum(0))
           if k and at_least(int(k), len(valid), chance) < CHANCE / those.shape[1]]
    if not odd:
        return share, []
    where = [int(valid[e]) for e in np.flatnonzero(those[:, odd].any(1))]
    return share, [Finding("clipped actions", f"{share:.1%} of the held-out actions lie beyond all that are "
                           f"trained on, in dimension {few(map(str, odd), 8)}, in "
                           f"{of(len(where), len(valid), 'held-out episodes')}", "fault", where)]


def at_least(k, n, p):
    """The chance of k or more of n, each with chance p."""
    if p >= 1:
        return 1.0
    ways = lambda i: math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)      # a logarithm
    return sum(math.exp(ways(i) + i * math.log(p) + (n - i) * math.log(1 - p)) for i in range(k, n + 1))


# ---- episodes


def idle_starts(found):
    """(the line of the report, [Finding])"""
    wait = int(np.ceil(IDLE_SECONDS * (found.episodes[0].fps or 10)))
    with np.errstate(invalid="ignore"):
        scaled = [x / np.maximum(np.ptp(x, axis=0), Normalizer.EPS) for x in found.numbers.values()]
    begins = []                 # the first step at which anything has moved away from where it was at step 0
    for lo, n in zip(found.starts, found.lengths):
        moved = np.any([(abs(x[lo:lo + n] - x[lo]) > STILL).any(1) for x in scaled], axis=0)
        begins.append(int(moved.argmax()) if moved.any() else n)
    begins = np.array(begins)
    idle = begins >= wait
    line = f"{idle.mean():.0%} of the episodes do not move in their first {wait} steps"
    if idle.any():
        longest = found.episodes[begins.argmax()].name
        line += f" (median {np.median(begins[idle]):g}, longest {begins.max()} in {longest})"
    if idle.mean() <= IDLE_SHARE:
        return line, []
    return line, [Finding("idle start", line, "fault", np.flatnonzero(idle).tolist())]


def padding(lengths, n_obs_steps, horizon):
    """(share of the actions in all windows that lie past either end, [Finding])

    The window at t predicts t - To + 1 .. t - To + Tp. How much of it is before step 0 or behind n - 1?"""
    padded = 0
    for n in lengths:
        first = np.arange(n) - n_obs_steps + 1
        past = np.clip(-first, 0, horizon) + np.clip(first + horizon - n, 0, horizon)
        padded += past.clip(0, horizon).sum()
    share = padded / horizon / lengths.sum()
    short = np.flatnonzero(lengths < horizon).tolist()
    if not short and share <= 0.5:
        return share, []
    has = f"{of(len(short), len(lengths))} have less than {horizon} steps, " if short else ""
    return share, [Finding("padding", f"{has}{share:.0%} of all actions in windows are padding",
                           "fault" if share > 0.5 else "note", short)]


def duplicates(found):
    same = collections.defaultdict(list)
    for e in range(len(found.lengths)):
        same[fingerprint(*(np.ascontiguousarray(found.part(key, e)) for key in found.numbers))].append(e)
    groups = [group for group in same.values() if len(group) > 1]
    if groups:
        train = set(map(int, found.split[0])) if found.split else set()
        sides = sum(0 < len(train & set(group)) < len(group) for group in groups) if found.split else 0
        across = f", {sides} across the split" * bool(sides)
        yield Finding("duplicate episodes", f"{sum(len(g) - 1 for g in groups)} repeat another number by "
                      f"number, such as {found.named(groups[0])}{across}", "fault", sorted(sum(groups, [])))


def clocks(found):
    """Rates that differ, and gaps in the time stamps."""
    told = sorted({e.fps for e in found.episodes if e.fps})
    if len(told) > 1:
        yield Finding("mixed rates", f"episodes say {', '.join(f'{r:g}' for r in told[:6])} Hz")
    steps = {e: np.diff(t) for e, t in enumerate(found.times) if t is not None and len(t) > 1}
    usual = {e: float(np.median(dt)) for e, dt in steps.items()}
    back = [e for e, dt in steps.items() if not (dt > 0).all()]
    if back:
        yield Finding("dropped frames", f"time stands still or runs backwards in "
                      f"{of(len(back), len(steps))}: {found.named(back)}", "fault", back)
    usual = {e: dt for e, dt in usual.items() if dt > 0 and np.isfinite(dt)}
    if not usual:
        return
    common = float(np.median(list(usual.values())))
    other = [e for e, dt in usual.items() if abs(dt / common - 1) > RATE_SHARE]
    if other:
        times = max(usual[other[0]] / common, common / usual[other[0]])
        yield Finding("mixed rates", f"time stamps are {times:.3g} times as far apart, or as close, in "
                      f"{of(len(other), len(usual))}: {found.named(other)}", "fault", other)
    if found.episodes[0].fps and not other:
        unit = min(UNITS, key=lambda u: abs(math.log(common * found.fps / UNITS[u])))
        measured = UNITS[unit] / common
        if abs(measured / found.fps - 1) > RATE_SHARE:
            yield Finding("mixed rates", f"'fps' says {found.fps:g} Hz, the time stamps (in {unit}) "
                          f"{measured:.4g} Hz")
    gaps = {e: int((steps[e] > 1.5 * dt).sum()) for e, dt in usual.items() if e not in back}
    gaps = {e: n for e, n in gaps.items() if n}                 # a frame, or more, is missing in between
    if gaps:
        yield Finding("dropped frames", f"{sum(gaps.values())} gaps in the time stamps of "
                      f"{of(len(gaps), len(usual))}: {found.named(gaps)}", "fault", list(gaps))


def instructions(episodes):
    silent = [i for i, e in enumerate(episodes) if not e.instruction]
    if silent and len(silent) < len(episodes):
        yield Finding("missing instruction", f"{len(silent)} of {len(episodes)} episodes have no instruction",
                      "fault", silent)


def outliers(found, horizon):
    """Episodes of another length, speed or start pose than the others."""
    lengths = found.lengths
    yield from unusual("outlier length", "steps", found, lengths.astype(float), np.arange(len(lengths)))
    scaled = found.motion / np.maximum(np.ptp(found.motion, axis=0), Normalizer.EPS)
    long = np.flatnonzero(lengths >= horizon)       # a few steps say little of a speed
    speed = [np.median(abs(np.diff(scaled[found.rows(e)], axis=0)).mean(1)) for e in long]
    yield from unusual("outlier speed", "of the range per step", found, np.array(speed), long)
    yield from outlier_starts(found, scaled)


def unusual(name, unit, found, values, those):
    """Values FACTOR times the median or a FACTOR-th of it, and beyond five deviations of their logarithms
    (estimated from the median, so that outliers do not hide themselves)."""
    if len(values) < LEAST or not np.median(values) > 0:
        return
    usual = np.median(values)
    off = abs(np.log(np.maximum(values, 1e-9 * usual) / usual))
    far = np.flatnonzero(off > max(math.log(FACTOR), 5 * 1.4826 * np.median(off)))
    if len(far):
        worst = far[off[far].argmax()]
        episodes = [int(those[i]) for i in far]
        yield Finding(name, f"{of(len(far), len(values))}: {found.named(episodes)} ({values[worst]:.3g} "
                      f"{unit}, the median is {usual:.3g})", "fault", episodes)


def outlier_starts(found, scaled):
    """A start is far off if its third nearest neighbour among the starts is: two wrong ones do not excuse
    each other. Distances are the largest over the dimensions, in shares of their ranges. Numbers that take
    few values (a goal, an open or closed hand) are left out: they are a choice, no place."""
    some = spread(len(found.starts), MOST_STARTS)
    if len(some) < LEAST:
        return
    start = scaled[found.starts[some]]
    kept = [d for d in range(start.shape[1]) if len(np.unique(start[:, d])) > min(CHOICES, len(some) // 2)]
    start = start[:, kept]
    if not kept:
        return
    kth = min(3, len(some) // 2)
    near = np.empty(len(some))
    for i, pose in enumerate(start):
        near[i] = np.partition(abs(start - pose).max(1), kth)[kth]          # number 0 is the pose itself
    far = np.flatnonzero((near > 0.25) & (near > FACTOR * np.quantile(near, 0.9)))
    if len(far):
        worst = far[near[far].argmax()]
        d = kept[int(abs(start[worst] - np.median(start, axis=0)).argmax())]
        key, d = found.state_columns[d] if found.state_columns else ("actions", d)
        episodes = some[far].tolist()
        yield Finding("outlier start", f"{of(len(far), len(some))} begin {near[worst]:.0%} of the range away "
                      f"from others, most in {key}[{d}]: {found.named(episodes)}", "fault", episodes)
