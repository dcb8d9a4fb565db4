"""The numbers to which the normaliser is fitted: those of the training episodes."""
import numpy as np
import torch

from demos.mixed import MixedDemos
from robot.normalizer import Normalizer


def columns(demos, kind, steps=None):
    """The values of every dimension of "actions" or "state" in the training episodes: D arrays.

    With several robots, a dimension has the values of the robots that have it, since it means the same for
    all of them. A relative action has one value for each step (offset from "now") of every window that lies
    within the episode.
    """
    rows, x = demos.rows(demos.train_episodes), getattr(demos, kind)
    if isinstance(demos, MixedDemos):
        robot = np.repeat(demos.robot, demos.lengths)[rows]
        has = demos.action_valid if kind == "actions" else demos.state_valid
        return [x[rows[has[robot, d]], d] for d in range(x.shape[1])]
    if kind == "state" or not demos.processing.relative:
        return list(x[rows].T)
    moving = demos.processing.moving(x.shape[1])
    base = demos.processing.base(torch.from_numpy(demos.state), x.shape[1]).numpy()
    now, then = windows(demos, steps)
    return (x[then, d] - base[now, d] if d in moving else x[rows, d] for d in range(x.shape[1]))


def windows(demos, steps):
    """-> rows of "now" and rows of the action, of all pairs that lie `steps` apart in a training episode."""
    now = demos.rows(demos.train_episodes)
    episode = np.repeat(np.arange(len(demos.lengths)), demos.lengths)[now]
    first, last = demos.starts[episode], demos.starts[episode] + demos.lengths[episode] - 1
    pairs = [(now[real], now[real] + k) for k in steps for real in [(now + k >= first) & (now + k <= last)]]
    return [np.concatenate(rows) for rows in zip(*pairs)]


def fit_normalizer(demos, mode="minmax", steps=None):
    """A Normalizer of "actions" and "state" over the training episodes; steps: see columns."""
    return Normalizer.fit({kind: columns(demos, kind, steps) for kind in ("actions", "state")}, mode)


def state_spread(demos, normalizer):
    """{"state_mean", "state_std"}: of the training states, in the network's units. Facts of rdt's Config:
    rounded, so that they read well."""
    of = [(x.mean(), x.std()) if len(x) else (0.0, 0.0) for x in columns(demos, "state")]
    mean, std = torch.tensor(of, dtype=torch.float64).reshape(-1, 2).unbind(1)
    mean, std = normalizer.normalize("state", mean), std * normalizer.scale["state"]
    return {name: tuple(round(value, 6) + 0.0 for value in x.tolist())
            for name, x in (("state_mean", mean), ("state_std", std))}


def largest(demos, normalizer, steps=None):
    """The largest absolute value of the normalised actions that are trained on: what a sampler may cut x0 to.
    Exactly 1 where the normaliser brought them to [-1, 1]."""
    ends = [[x.min(), x.max()] if len(x) else [0, 0] for x in columns(demos, "actions", steps)]
    found = normalizer.normalize("actions", torch.tensor(ends).T).abs().max().item()
    return found if found > 1 + 1e-4 else 1.0
