"""robot/environments.py: Gymnasium environments and their mapping."""
import math
import types

import numpy as np
import pytest
import torch
import yaml
from helpers import LOWDIM, ROOT, Recorder, scaled

from robot.environments import GymEpisodes, TabletopEpisodes
from robot.errors import UserError, say_once
from robot.gym_episodes import BLIND, pick
from robot.policy import Policy
from robot.rollout import closed_loop, rehearse


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
        self.history = []

    def sample_chunk(self):
        pass

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
    assert result["success"] == 0 and 0 <= result["score"] < 1
    assert len(policy.model.batches) == 1 + 12                      # one look, and twelve to time it


FORMS = {"plain": lambda x: {"pos": x}, "nested": lambda x: {"agent": {"pos": x}, "pixels": {"top": PICTURE}},
         "dotted": lambda x: {"observation.state": x, "eef-pos": x}, "array": lambda x: x,
         "keypoints": lambda x: {"keypoints": np.stack([x, x + 1, x - 1])},
         "scalar": lambda x: {"width": np.float32(x[0]), "pos": x}, "pixels": lambda x: {"top": PICTURE}}
PICTURE = np.full((8, 12, 3), 90, np.uint8)


@pytest.fixture
def point():
    """Registers "Point-v0", a point that is pushed about, with what a test asks for: point(form="nested")."""
    gymnasium = pytest.importorskip("gymnasium", reason="package gymnasium is an extra")

    def register(form="plain", space=None, success=True, renders="picture", takes_mode=True, name="Point-v0"):
        class Point(gymnasium.Env):
            metadata = {"render_modes": ["rgb_array"]}
            action_space = space or gymnasium.spaces.Box(-1, 1, (2,), np.float32)
            observation_space = gymnasium.spaces.Box(-9, 9, (2,))

            def reset(self, seed=None, options=None):
                self.x, self.t = np.float32([seed % 7, 1]), 0
                return FORMS[form](self.x), {}

            def step(self, action):
                assert self.action_space.contains(action), action
                self.x, self.t = self.x + action.reshape(2), self.t + 1
                info = {"is_success": self.t == 3, "grasped": self.t == 2} if success else {}
                return FORMS[form](self.x), -1.0 - self.t, self.t == 3, False, info

            def render(self):
                if renders == "no screen":
                    raise RuntimeError("no GL")
                return PICTURE if renders == "picture" else None

        if takes_mode:
            Point.__init__ = lambda self, render_mode=None: setattr(self, "render_mode", render_mode)
        gymnasium.register(id=name, entry_point=Point, max_episode_steps=10)
        registered.append(name)
        return {"id": name}

    registered = []
    yield register
    for name in registered:
        del gymnasium.registry[name]


class Pusher:
    """A stand-in for Policy that keeps what it is shown and commands 5 in every dimension."""
    normalizer = types.SimpleNamespace(stats={"actions": {"mean": torch.full((2,), 5.0)}})
    to_robot = staticmethod(lambda chunk: chunk)

    def __init__(self, state_keys, camera_keys=(), action_dim=2):
        self.description = {"state_keys": state_keys, "camera_keys": list(camera_keys),
                            "action_dim": action_dim}

    def reset(self):
        self.history, self.seen = [], []

    def observe(self, obs):
        self.seen.append(obs)

    def act(self, obs):
        self.seen.append(obs)
        return np.full((len(next(iter(obs.values()))), 2), 5.0, np.float32)

    def sample_chunk(self):
        pass


@pytest.mark.parametrize("form, keys, cameras, obs, first", [
    ("plain", {"pos": 2}, [], None, {"pos": [5, 1]}),
    ("nested", {"agent_pos": 2}, ["top"], {"agent_pos": "agent.pos", "top": "pixels.top"},
     {"agent_pos": [5, 1], "top": PICTURE}),
    ("dotted", {"observation.state": 2, "eef-pos": 2}, [], None,
     {"observation.state": [5, 1], "eef-pos": [5, 1]}),
    ("keypoints", {"keypoints": 6}, [], None, {"keypoints": [5, 1, 6, 2, 4, 0]}),
    ("scalar", {"width": 1, "pos": 2}, [], None, {"width": [5], "pos": [5, 1]}),
    ("array", {"pos": 1}, [], {"pos": "state[1:2]"}, {"pos": [1]}),
    ("pixels", {}, ["top"], None, {"top": PICTURE})])
def test_every_form_of_observation_arrives(form, keys, cameras, obs, first, point):
    policy = Pusher(keys, cameras)
    spec = point(form) | ({"obs": obs} if obs else {})
    rehearse(policy, spec)
    result = closed_loop(policy, spec, 2, seed=0)                   # seeds 100000, 100001: 100000 % 7 = 5
    for key, value in first.items():
        assert np.array_equal(policy.seen[0][key][0], value), key
    # The action space ends at 1, so the point moves by 1 a step; rewards -2, -3, -4.
    if "pos" in keys and form != "array":
        assert policy.seen[-1]["pos"].tolist() == [[7, 3], [8, 3]]
    assert result["score"] == -2 and result["return"] == -9 and result["success"] == 1


def test_success_is_what_the_environment_says_and_unknown_where_it_is_silent(point):
    result = closed_loop(Pusher({"pos": 2}), point(success=False), 2, seed=0)
    assert result["success"] is None and result["interval"] is None and "outcomes" not in result
    assert result["return"] == -9
    spec = point(name="Named-v0")
    assert closed_loop(Pusher({"pos": 2}), spec | {"success": "grasped"}, 2, seed=0)["success"] == 1
    with pytest.raises(UserError, match="'graspd' is not in the environment's info, did you mean 'grasped'"):
        closed_loop(Pusher({"pos": 2}), spec | {"success": "graspd"}, 2, seed=0)


@pytest.mark.parametrize("how", [{"renders": "none"}, {"renders": "no screen"}, {"takes_mode": False}],
                         ids=str)
def test_an_evaluation_does_not_die_of_a_picture(how, point, capsys):
    say_once.cache_clear()
    BLIND.discard("Point-v0")
    result = closed_loop(Pusher({"pos": 2}), point(**how), 2, seed=0)
    assert result["success"] == 1 and len(result["rollouts"]) == 2
    assert ("renders no picture" in capsys.readouterr().err) == ("renders" in how)


def test_actions_are_cut_to_the_bounds_unless_told_otherwise(point):
    """gym-aloha says [-1, 1], and its arms begin at an elbow of 1.16 rad."""
    description = {"state_keys": {"pos": 2}, "camera_keys": [], "action_dim": 2}
    for spec, moved in ((point(), [1, 1]), ({"id": "Point-v0", "clip": False}, [5, 5])):
        env = GymEpisodes(1, description, spec)
        env.envs[0].unwrapped.action_space.contains = lambda action: True
        before = env.reset([3])[0]["pos"]
        assert (env.step(np.full((1, 2), 5.0))[0]["pos"] - before).tolist() == [moved]
    with pytest.raises(UserError, match="clip must be true or false, not no_thanks"):
        GymEpisodes(1, description, {"id": "Point-v0", "clip": "no_thanks"})


def test_environments_side_by_side_draw_in_contexts_of_their_own(point):
    """As Gymnasium's MuJoCo environments do, whose renderer draws in the context that was made last."""
    current = []

    class Viewer:
        def __init__(self, name):
            self.name = name
            self.make_context_current()

        def make_context_current(self):
            current[:] = [self.name]

    description = {"state_keys": {"pos": 2}, "camera_keys": [], "action_dim": 2}
    env, drawn = GymEpisodes(2, description, point()), []
    for i, one in enumerate(env.envs):
        bare = one.unwrapped
        bare.mujoco_renderer = types.SimpleNamespace(viewer=Viewer(i))
        bare.render = lambda i=i: drawn.append((i, *current)) or PICTURE
        bare.step = lambda action, i=i, step=bare.step: drawn.append((i, *current)) or step(action)
        bare.reset = lambda i=i, reset=bare.reset, **how: drawn.append((i, *current)) or reset(**how)
    env.reset([0, 1])
    env.step(np.zeros((2, 2)))
    for i in range(2):
        env.glance(i, {})
    assert drawn == [(0, 0), (1, 1)] * 2 + [(0, 0), (1, 1)]


def test_what_cannot_render_is_asked_once_in_a_process(point):
    """Where MuJoCo finds no GL its second attempt ends the process, be it of another environment object."""
    BLIND.discard("Point-v0")
    asked, spec = [], point(renders="no screen")
    for _ in range(2):
        env = GymEpisodes(2, {"state_keys": {"pos": 2}, "camera_keys": [], "action_dim": 2}, spec)
        for one in env.envs:
            one.render = lambda: asked.append(0) or 1 / 0
        env.reset([0, 1])
        assert [env.glance(i, None).shape for i in range(2)] == [(8, 8, 3)] * 2
    assert len(asked) == 1
    BLIND.discard("Point-v0")


def test_a_policy_that_reads_is_told(point):
    policy = Pusher({"pos": 2})
    closed_loop(policy, point() | {"instruction": "push it"}, 2, seed=0)
    assert all(obs["instruction"] == ["push it"] * 2 for obs in policy.seen)


def test_what_does_not_fit_is_said_before_anything_is_trained(point):
    import gymnasium
    discrete = point(space=gymnasium.spaces.Discrete(5), name="Discrete-v0")
    for spec, policy, named in (
            (discrete, Pusher({"pos": 2}), r"takes Discrete\(5\)"),
            (point(), Pusher({"pos": 2}, action_dim=7), "the data have 7 numbers"),
            (point(name="B-v0") | {"idd": 1}, Pusher({"pos": 2}), "did you mean 'id'"),
            ({"id": "other_package:B-v0"}, Pusher({"pos": 2}), "other_package"),
            (point(name="C-v0") | {"obs": {"pos": "poss"}}, Pusher({"pos": 2}), r"'poss' .*\(pos\)")):
        with pytest.raises(UserError, match=named) as error:
            rehearse(policy, spec)
        assert len(str(error.value)) < 400


def test_a_namespace_that_is_no_package(point):
    point(name="Other-Name/Point-v0")
    assert closed_loop(Pusher({"pos": 2}), {"id": "Other-Name/Point-v0"}, 1, seed=0)["success"] == 1


def test_the_built_in_task_shows_a_policy_the_cameras_of_its_data():
    """Pictures of the size that the data had before they were resized: the policy resizes them alike."""
    keys = {"state_keys": {}, "camera_keys": ["agentview_image"], "image_size": [16, 16]}
    for description, size in ((keys | {"camera_sizes": {"agentview_image": [32, 32]}}, 32), (keys, 16)):
        obs, _ = TabletopEpisodes(2, description).reset(np.arange(2))
        assert obs["agentview_image"].shape == (2, size, size, 3)
    obs, _ = TabletopEpisodes(2, keys | {"camera_keys": [], "image_size": None}).reset(np.arange(2))
    assert "agentview_image" not in obs
