"""robot/rollout.py: episodes, films and the interval."""
import math
import time
import types

import numpy as np
import pytest

from demos.generated import DEMO_SEEDS
from robot import tabletop
from robot.rollout import EVALUATION_SEEDS, closed_loop, wilson


@pytest.mark.parametrize("successes, n", [(0, 7), (10, 10), (37, 50), (50, 100)])
def test_wilson_interval(successes, n):
    """Its ends are the shares p from which the observed one lies exactly 1.96 standard deviations away."""
    low, high = wilson(successes, n)
    for p, sign in ((low, 1), (high, -1)):
        assert successes / n - p == pytest.approx(sign * 1.96 * math.sqrt(max(0, p * (1 - p)) / n), abs=1e-9)
    assert 0 <= low + 1e-12 and high <= 1 + 1e-12


class Scripted:
    """A stand-in for Policy that plays the tabletop's expert, or keeps still."""
    description = {"state_keys": {"robot0_eef_pos": 2}, "camera_keys": [], "image_size": None}

    def __init__(self, moves=True):
        self.moves = moves

    def reset(self):
        self.expert, self.starts, self.history = None, None, []

    def sample_chunk(self):
        time.sleep(0.03)

    def act(self, obs):
        if self.expert is None:
            asked = np.array([tabletop.INSTRUCTIONS.index(text) for text in obs["instruction"]])
            self.expert = tabletop.Expert(types.SimpleNamespace(instruction=asked, n=len(asked)))
            self.starts = np.concatenate([obs["robot0_eef_pos"], obs["object"], asked[:, None]], axis=1)
        return self.expert.act(obs) if self.moves else np.pad(obs["robot0_eef_pos"], ((0, 0), (0, 1)))


def test_evaluation_of_the_expert_and_of_one_that_keeps_still():
    expert, still = Scripted(), Scripted(moves=False)
    good, bad = (closed_loop(policy, "tabletop", 12, seed=0) for policy in (expert, still))
    assert (good["success"], good["score"], good["outcomes"]) == (1.0, 1.0, {"success": 12})
    assert good["interval"] == pytest.approx(wilson(12, 12), abs=1e-3)
    assert (bad["success"], bad["score"], bad["outcomes"]) == (0.0, 0.0, {"timeout": 12})
    assert 30 <= good["latency_ms"] < 300 and good["episodes"] == 12         # of one chunk, not of twelve
    assert np.array_equal(expert.starts, still.starts)              # every policy gets the same episodes
    first, *_ = rollouts = good["rollouts"]
    assert len(rollouts) == 6 and first["seed"] == EVALUATION_SEEDS and first["success"]
    assert first["frames"].dtype == np.uint8 and len(first["frames"]) < len(bad["rollouts"][0]["frames"])
    closed_loop(expert, "tabletop", 12, seed=1)
    assert not np.array_equal(expert.starts, still.starts)
    assert EVALUATION_SEEDS + 12_000 < DEMO_SEEDS   # never trained on


def test_another_instruction_in_the_same_scenes():
    plain, asked = Scripted(), Scripted()
    closed_loop(plain, "tabletop", 5, seed=0)
    assert closed_loop(asked, "tabletop", 5, seed=0, instruction=3)["success"] == 1
    assert (asked.starts[:, -1] == 3).all() and np.array_equal(asked.starts[:, :6], plain.starts[:, :6])
