"""robot/environments.py: Gymnasium environments and their mapping."""
import math

import numpy as np
import pytest
import yaml
from helpers import LOWDIM, ROOT, Recorder, scaled

from robot.environments import GymEpisodes, pick
from robot.errors import UserError
from robot.policy import Policy
from robot.rollout import closed_loop


@pytest.fixture(scope="module")
def corridor():
    """Class of "Corridor-v0": go from x = 0 to a goal at 1, 2 or 3 by at most 0.5 a step. Observation: [x,
    goal], or a dict of both."""
    gymnasium = pytest.importorskip("gymnasium", reason="package gymnasium is an extra")

    class Corridor(gymnasium.Env):
        metadata = {"render_modes": ["rgb_array"]}
        steps_after_the_end = 0

        def __init__(self, as_dict=False, render_mode=None):
            box = gymnasium.spaces.Box(-9, 9, (2,))
            self.as_dict, self.render_mode = as_dict, render_mode
            self.action_space = gymnasium.spaces.Box(-9, 9, (1,))
            self.observation_space = gymnasium.spaces.Dict({"place": box, "goal": box}) if as_dict else box

        def observation(self):
            x, goal = np.float32([self.x, -self.x]), np.float32([self.goal, 0])
            return {"place": x, "goal": goal} if self.as_dict else np.float32([self.x, self.goal])

        def reset(self, seed=None, options=None):
            self.x, self.goal, self.ended = 0.0, 1.0 + seed % 3, False
            return self.observation(), {}

        def step(self, action):
            Corridor.steps_after_the_end += self.ended
            self.x += float(np.clip(action[0] - self.x, -0.5, 0.5))
            self.ended = abs(self.x - self.goal) < 1e-6
            # It pays most to pass x = 0.5, so the score tells the largest reward from the last one.
            reward = 5.0 if self.x == 0.5 else 1.0 - abs(self.x - self.goal) / 10
            return self.observation(), reward, self.ended, False, {"is_success": self.ended}

        def render(self):
            return np.full((96, 96, 3), int(10 * self.x), np.uint8)

    gymnasium.register(id="Corridor-v0", entry_point=Corridor)
    yield Corridor
    del gymnasium.registry["Corridor-v0"]


class Walker:
    """A stand-in for Policy: walks to the goal, or half of the way."""
    description = {"state_keys": {"x": 1, "goal": 1}, "camera_keys": []}

    def __init__(self, share=1.0):
        self.share = share

    def reset(self):
        self.latency = [0.01]

    def act(self, obs):
        assert obs["x"].shape == obs["goal"].shape == (6, 1)
        return self.share * obs["goal"]


@pytest.mark.parametrize("spec", [
    {"obs": {"x": "state[0:1]", "goal": "state[1:2]"}},
    {"obs": {"x": "place[0:1]", "goal": "goal[0:1]"}, "kwargs": {"as_dict": True}}], ids=["array", "dict"])
def test_gymnasium_environments(spec, corridor):
    spec = {"id": "Corridor-v0", "max_steps": 6} | spec
    corridor.steps_after_the_end = 0
    result = closed_loop(Walker(), spec, 6, seed=0)
    assert result["success"] == 1 and result["score"] == 5.0 and corridor.steps_after_the_end == 0
    # Seeds 100000 ...: goals 2, 3, 1, ... are 4, 6 and 2 steps away; frames are kept every second step.
    assert [len(film["frames"]) for film in result["rollouts"]] == [2, 3, 1] * 2
    result = closed_loop(Walker(), spec | {"max_steps": 5}, 6, seed=0)
    assert result["success"] == pytest.approx(4 / 6) and result["outcomes"] == {"failure": 2, "success": 4}
    result = closed_loop(Walker(0.2), spec, 6, seed=0)          # never gets to 0.5 unless the goal is 3
    assert result["success"] == 0
    assert result["score"] == pytest.approx(np.mean([0.84, 5.0, 0.92]))


@pytest.mark.parametrize("spec, named", [
    ({"id": "Coridor-v0"}, "Coridor"),
    ({"id": "no_such_package/Env-v0"}, "pip install no_such_package"), ({"id": None}, "names no environment"),
    ({"obs": {"x": "state[0:1]"}}, "'goal'"),
    ({"obs": {"x": "place[0:1]", "goal": "goall"}, "kwargs": {"as_dict": True}}, "goall"),
    ({"obs": {"x": "state[0]", "goal": "state[1:2]"}}, r"state\[0\]"),
    ({"kwargs": {"colour": 1}}, "colour")])
def test_environments_that_do_not_fit_are_named(spec, named, corridor):
    spec = {key: value for key, value in ({"id": "Corridor-v0"} | spec).items() if value is not None}
    with pytest.raises(UserError, match=named):
        closed_loop(Walker(), spec, 6, seed=0)


def test_keypoints_of_a_rigid_body():
    x, y, angle = 200.0, 310.0, 2.2
    points = [[9.3, 90.0], [-61.0, -1.2], [0.0, 0.0]]
    found = pick(np.array([7, 8, x, y, angle]), {"pose": "state[2:5]", "points": points})
    for (px, py), (wx, wy) in zip(points, found.reshape(-1, 2)):
        far, direction = math.hypot(px, py), math.atan2(py, px) + angle
        assert (wx, wy) == pytest.approx((x + far * math.cos(direction), y + far * math.sin(direction)))


@pytest.mark.parametrize("name", ["pusht_lowdim_cnn.yaml", "pusht_lowdim_cnn_cpu.yaml"])
def test_pusht(name):
    """The configuration's mapping in the real environment: agent and keypoints are where pymunk has them."""
    pytest.importorskip("gym_pusht", reason="package gym-pusht is an extra")
    spec = yaml.safe_load((ROOT / "configs" / name).read_text())["env"] | {"max_steps": 4}
    description = LOWDIM | {"state_keys": {"keypoint": 18, "agent_pos": 2}}
    env = GymEpisodes(2, description, spec)
    obs, _ = env.reset([100_000, 100_001])
    for i in range(2):
        world = env.envs[i].unwrapped
        corners = [tuple(world.block.local_to_world(tuple(p))) for p in spec["obs"]["keypoint"]["points"]]
        assert np.allclose(obs["keypoint"][i].reshape(9, 2), corners, atol=0.01)
        assert np.allclose(obs["agent_pos"][i], tuple(world.agent.position), atol=0.01)
    policy = Policy(Recorder(), scaled(state_dim=20), description)
    result = closed_loop(policy, spec, 2, seed=0)
    assert result["success"] == 0 and 0 <= result["score"] < 1 and len(policy.model.batches) == 1
