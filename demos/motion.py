"""Which number of the state goes with which action, and how many steps later.

An action may be the position that its joint is told to take (then it has the unit of a state, which follows
it some steps later) or a velocity (then it goes with the state's change). Both are found by
cross-correlation.
"""
from dataclasses import dataclass

import numpy as np

MOST_STEPS = 100_000            # of a larger set, as many episodes are looked at as hold so many
SPAN = 3                        # changes over so many steps: those over one are as small as a sensor's noise
ALIKE = 0.6                     # smallest correlation of two numbers that belong together
SAME_UNIT = 0.1                 # ... and their mean distance, in shares of the action's range


@dataclass
class Pair:
    action: int                 # dimension of the actions
    state: int                  # number of the state that follows it
    kind: str                   # "position": in the same unit. "velocity": the state's change goes with it
    lag: int                    # steps: what an action of step t commands, the state shows at t + lag
    r: float                    # correlation of their changes at this lag
    apart: float = 0.0          # of a position: mean distance of the two at this lag


def pairs_of(actions, state, lengths, fps):
    """actions (N, A), state (N, S) of episodes in a row -> [Pair], at most one for an action. Lags of up to
    a second are tried, either way."""
    few = np.searchsorted(np.cumsum(lengths), MOST_STEPS) + 1
    lengths = lengths[:few]
    actions, state = (x[:lengths.sum()].astype(np.float64) for x in (actions, state))
    most = int(np.clip(round(fps), 8, 60))
    moved = changes(state, lengths, most)
    position = correlation(changes(actions, lengths, most), moved, most)        # (lags, A, S)
    summed = np.concatenate([np.cumsum(part, 0) for part in np.split(actions, np.cumsum(lengths)[:-1])])
    velocity = correlation(changes(summed, lengths, most), moved, most)
    found = []
    for a in range(actions.shape[1]):
        pair = best_position(a, position[:, a], actions[:, a], state, lengths)
        if pair is None and velocity[:, a].size:
            k, s = np.unravel_index(velocity[:, a].argmax(), velocity[:, a].shape)
            r = float(velocity[k, a, s])
            pair = Pair(a, int(s), "velocity", int(k) - most, r) if r >= ALIKE else None
        found += [pair] if pair else []
    return found


def best_position(a, r, action, state, lengths):
    """The Pair of action a with the best r (lags, S) among the numbers in its unit, or None."""
    most, reach = len(r) // 2, np.ptp(action)
    best = None
    for s in np.flatnonzero(r.max(0) >= ALIKE):
        k = int(r[:, s].argmax())
        lag = k - most
        within = steps_left(lengths) > lag if lag > 0 else steps_gone(lengths) >= -lag
        at = np.flatnonzero(within)
        apart = abs(action[at] - state[at + lag, s]).mean() if len(at) else np.inf
        if apart <= SAME_UNIT * reach and (best is None or r[k, s] > best.r):
            best = Pair(a, int(s), "position", lag, float(r[k, s]), float(apart))
    return best


def steps_gone(lengths):
    """How many steps of its episode lie before every step."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def steps_left(lengths):
    """How many steps of its episode are left at every step, itself counted."""
    return np.repeat(lengths, lengths) - steps_gone(lengths)


def changes(x, lengths, gap):
    """x (N, D) -> its changes over SPAN steps (N + gap E, D), about their mean. After every episode stand
    `gap` rows of zeros: shifted by up to that, no episode meets another. A number that changes evenly has
    none."""
    z = np.zeros((len(x) + gap * len(lengths), x.shape[1]))
    real = np.zeros(len(z), bool)
    at = 0
    for part in np.split(x, np.cumsum(lengths)[:-1]):
        n = max(0, len(part) - SPAN)
        z[at:at + n], real[at:at + n] = part[SPAN:] - part[:-SPAN], True
        at += len(part) + gap
    z[real] -= z[real].sum(0) / max(1, real.sum())
    still = np.sqrt((z**2).mean(0)) < 1e-6 * np.maximum(np.ptp(x, axis=0), 1e-12)
    z[:, still] = 0
    return z


def correlation(a, s, most):
    """(2 most + 1, A, S): of a at t with s at t + lag, for lag = -most .. most."""
    scale = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(s, axis=0))
    scale[scale == 0] = np.inf
    n = len(a)
    return np.stack([a[max(0, -k):n - max(0, k)].T @ s[max(0, k):n - max(0, -k)] / scale
                     for k in range(-most, most + 1)])
