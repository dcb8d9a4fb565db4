"""Closed loop: episodes of a policy in an environment, and the interval of its success."""
import copy
import math
import time

import numpy as np

from .environments import make_episodes

EVALUATION_SEEDS = 100_000  # Diffusion Policy evaluates on the seeds from here on, too


def evaluation_seeds(seed, episodes):
    """Seeds of the episodes that belong to --seed, the same for every policy: (episodes,) int."""
    return EVALUATION_SEEDS + 1000 * seed + np.arange(episodes)


def wilson(successes, n, z=1.96):
    """95 % interval of a share, (low, high)."""
    p, w = successes / n, z * z / n
    centre, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return centre - half, centre + half


def rehearse(policy, environment, seed=0):
    """One reset and one step, before an hour of training: the packages are there, the observations are those
    of the data, the actions fit. Raises UserError. The action is the mean of the data."""
    env = make_episodes(environment, 1, policy.description)
    policy.reset()
    policy.observe(env.reset(evaluation_seeds(seed, 1))[0])
    mean = policy.normalizer.stats["actions"]["mean"]
    obs, *_ = env.step(policy.to_robot(mean[None, None])[:, 0].numpy())
    policy.observe(obs)
    env.film([env.glance(0, obs)])
    policy.reset()


def closed_loop(policy, environment, episodes, seed, n_rollouts=6, instruction=None):
    """`episodes` episodes at once from the seeds that belong to `seed`, the same for every policy. policy: a
    Policy, or what has its description, reset and act; the latency is measured where there are chunks.

    -> {"success", "interval" (None where the environment does not say it), "episodes", "score" and "return"
    (means over the episodes of the largest reward and of the sum of rewards), "outcomes", "latency_ms",
    "latency_p95_ms" (of a chunk for one robot), "rollouts" (films for the report, failures first)}
    """
    env = make_episodes(environment, episodes, policy.description, instruction)
    seeds = evaluation_seeds(seed, episodes)
    policy.reset()
    obs, info = env.reset(seeds)
    done, success, known = np.zeros(episodes, bool), np.zeros(episodes, bool), np.zeros(episodes, bool)
    best, total = np.full(episodes, -np.inf), np.zeros(episodes)
    seen = [[] for _ in range(episodes if env.films_all else min(n_rollouts, episodes))]
    for step in range(env.max_steps):
        for i, film in enumerate(seen):
            if not done[i] and step % 2 == 0:
                film.append(env.glance(i, obs))
        obs, reward, finished, info = env.step(policy.act(obs))
        best = np.maximum(best, np.where(done, -np.inf, reward))
        total += np.where(done, 0, reward)
        success |= info["success"] & ~done
        known |= info.get("known", True)
        done |= finished
        if done.all():
            break
    told = info.get("instruction", [""] * episodes)
    result = {"success": None, "interval": None, "episodes": episodes, "score": float(best.mean()),
              "return": float(total.mean())}
    outcomes = np.full(episodes, "unknown")
    if known.all():
        outcomes = info.get("outcome", np.where(success, "success", "failure"))
        names, counts = np.unique(outcomes, return_counts=True)
        interval = [round(float(x), 4) for x in wilson(success.sum(), episodes)]
        result |= {"success": float(success.mean()), "interval": interval,
                   "outcomes": {str(k): int(c) for k, c in zip(names, counts)}}
    rollouts = [{"frames": env.film(seen[i]), "success": bool(success[i]), "outcome": str(outcomes[i]),
                 "instruction": told[i], "seed": int(seeds[i])}
                for i in to_film(success, len(seen), n_rollouts)]
    if hasattr(policy, "sample_chunk"):
        result |= latency(policy)
    return result | {"rollouts": rollouts}


def latency(policy, repeat=10):
    """Milliseconds of a chunk for one robot: median and 95th percentile of `repeat`, after two that do not
    count."""
    alone = copy.copy(policy)
    alone.history = [{key: x[:1] for key, x in step.items()} for step in policy.history]
    times = []
    for _ in range(repeat + 2):
        began = time.perf_counter()
        alone.sample_chunk()
        times.append(1e3 * (time.perf_counter() - began))
    return {"latency_ms": float(np.median(times[2:])), "latency_p95_ms": float(np.percentile(times[2:], 95))}


def to_film(success, n_seen, n):
    """Which of the first n_seen episodes are shown: failures first, since they teach most, but two places are
    kept for successes."""
    failed, worked = np.flatnonzero(~success[:n_seen]), np.flatnonzero(success[:n_seen])
    failed = failed[:n - min(2, len(worked))]
    return [*failed, *worked[:n - len(failed)]]
