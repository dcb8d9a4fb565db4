"""Closed loop: episodes of a policy in an environment, and the interval of its success."""
import math

import numpy as np

from .environments import make_episodes

EVALUATION_SEEDS = 100_000  # episode i has seed 100000 + 1000 * --seed + i; the paper's are 100000 + i


def wilson(successes, n, z=1.96):
    """95 % interval of a share, (low, high)."""
    p, w = successes / n, z * z / n
    centre, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return centre - half, centre + half


def closed_loop(policy, environment, episodes, seed, n_rollouts=6, instruction=None):
    """`episodes` episodes at once from the seeds that belong to `seed`, the same for every policy.

    -> {"success", "interval", "episodes", "score" (mean of the largest reward of an episode), "outcomes",
    "latency_ms", "latency_p95_ms" (of one chunk for all episodes), "rollouts" (films for the report, failures
    first)}
    """
    env = make_episodes(environment, episodes, policy.description, instruction)
    seeds = EVALUATION_SEEDS + 1000 * seed + np.arange(episodes)
    policy.reset()
    obs, info = env.reset(seeds)
    done, success = np.zeros(episodes, bool), np.zeros(episodes, bool)
    score = np.zeros(episodes)
    seen = [[] for _ in range(episodes if env.films_all else min(n_rollouts, episodes))]
    for step in range(env.max_steps):
        for i, film in enumerate(seen):
            if not done[i] and step % 2 == 0:
                film.append(env.glance(i, obs))
        obs, reward, finished, info = env.step(policy.act(obs))
        score = np.maximum(score, np.where(done, 0, reward))
        success |= info["success"] & ~done
        done |= finished
        if done.all():
            break
    outcomes = info.get("outcome", np.where(success, "success", "failure"))
    names, counts = np.unique(outcomes, return_counts=True)
    latency = np.array(policy.latency) * 1e3
    told = info.get("instruction", [""] * episodes)
    rollouts = [{"frames": env.film(seen[i]), "success": bool(success[i]), "outcome": str(outcomes[i]),
                 "instruction": told[i], "seed": int(seeds[i])}
                for i in to_film(success, len(seen), n_rollouts)]
    interval = [round(float(x), 4) for x in wilson(success.sum(), episodes)]
    return {"success": float(success.mean()), "interval": interval, "episodes": episodes,
            "score": float(score.mean()),
            "outcomes": {str(k): int(c) for k, c in zip(names, counts)},
            "latency_ms": float(np.median(latency)), "latency_p95_ms": float(np.percentile(latency, 95)),
            "rollouts": rollouts}


def to_film(success, n_seen, n):
    """Which of the first n_seen episodes are shown: failures first, for they teach most, but two places are
    kept for successes where there are any."""
    failed, worked = np.flatnonzero(~success[:n_seen]), np.flatnonzero(success[:n_seen])
    failed = failed[:n - min(2, len(worked))]
    return [*failed, *worked[:n - len(failed)]]
