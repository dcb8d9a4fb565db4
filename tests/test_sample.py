"""sample.py: what a policy sees and does, environments, evaluation, checkpoints, official weights."""
import copy
import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
import yaml
from golden_cases import golden
from test_dp_cnn import policy_config
from test_train import ROOT, as_before, command, refused, spoil, write_demos  # noqa: F401

import data
import dp_cnn
import sample
from robot import tabletop
import train
from tools import quality
from demos.dataset import open_demos
from demos.generated import DEMO_SEEDS
from demos.images import open_samples
from robot.checkpoint import FORMAT, load_model, read_checkpoint
from robot.environments import GymEpisodes, pick
from robot.errors import UserError
from robot.normalizer import Normalizer
from robot.policy import Policy
from robot.rollout import EVALUATION_SEEDS, closed_loop, wilson
from robot.text import decode_text
from tools.quality import classifier, compare_samples

LOWDIM = {"state_keys": {"a": 1, "b": 2}, "camera_keys": [], "image_size": None, "fps": 10.0}


class Recorder(torch.nn.Module):
    """Stands in for a policy: keeps what it is given, and its k-th chunk is 100 k + 0, 1, 2, ... in every
    dimension of every episode."""

    def __init__(self, n_obs_steps=3, first_action=-2, n_action_steps=4, text_len=0, action_dim=2):
        super().__init__()
        self.config = types.SimpleNamespace(n_obs_steps=n_obs_steps, first_action=first_action,
                                            n_action_steps=n_action_steps, text_len=text_len)
        self.action_dim, self.batches = action_dim, []

    def sample(self, batch, steps=None, generator=None):
        chunk = 100.0 * len(self.batches) + torch.arange(8.0)[:, None]
        self.batches.append(batch)
        return chunk.expand(len(batch["state"]), 8, self.action_dim)


def scaled(action_dim=2, state_dim=3):
    """normalised = raw / 2 + 1, for actions and state"""
    dims = {"actions": action_dim, "state": state_dim}
    scale, offset = ({key: torch.full((dim,), value) for key, dim in dims.items()} for value in (0.5, 1.0))
    return Normalizer("minmax", scale, offset, {}, {})


def recorder(description=LOWDIM, **config):
    return Policy(Recorder(**config), scaled(), description)


def observed(t):
    return {"a": np.array([t]), "b": np.array([10 * t, 0.5])}


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_demos(tmp_path_factory.mktemp("demos") / "tiny.hdf5")


@pytest.fixture(scope="module")
def tiny(demos, tmp_path_factory):
    """Folder of a run of four steps on the tiny set."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train.main(command(demos, folder, steps=4, eval_every=0))
    return folder


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """Folder of a run that has learned most of the built-in task: a quarter of a minute on one core."""
    folder = tmp_path_factory.mktemp("runs") / "solved"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        train.main(["--model", "dp_cnn", "--out", str(folder), "--demos", "300", "--steps", "600",
                    "--batch_size", "64", "--lr", "2e-3", "--warmup", "20", "--ema_max", "0.98",
                    "--eval_every", "0", "--episodes", "20", "--device", "cpu", "--set", "prediction_type=x0",
                    "--set", "down_dims=[32, 64]", "--set", "step_embed_dim=32"])
    return folder


def episode(n, count):
    """n observations of the tiny set, random; with a leading axis of `count` if that is not None."""
    rng, lead = np.random.default_rng(0), () if count is None else (count,)
    return [{"agent_pos": rng.normal(size=(*lead, 2)), "goal": rng.normal(size=(*lead, 2)),
             "number": rng.normal(size=(*lead, 1))} for _ in range(n)]


# -- the policy on a robot -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first_action", [-2, 0])  # Diffusion Policy's chunk starts two steps ago, pi0's now
def test_receding_horizon(first_action):
    policy = recorder(first_action=first_action)
    actions = [policy.act(observed(t)) for t in range(9)]
    assert len(policy.model.batches) == 3                           # at steps 0, 4 and 8
    for k, action in enumerate(actions):
        index = -first_action + k % 4                               # "now" is -first_action in the chunk
        assert action.tolist() == [2 * (100 * (k // 4) + index - 1)] * 2  # and in raw units
    for batch, history in zip(policy.model.batches, ([0, 0, 0], [2, 3, 4], [6, 7, 8])):
        raw = (batch["state"] - 1) * 2                              # (1, To, a and b)
        assert raw[0].tolist() == [[t, 10 * t, 0.5] for t in history]
        assert batch["control_hz"].tolist() == [10.0]


def test_reset_forgets():
    policy = recorder()
    for t in range(2):
        policy.act(observed(t))
    policy.reset()
    policy.act(observed(7))
    assert ((policy.model.batches[-1]["state"] - 1) * 2)[0, :, 0].tolist() == [7, 7, 7]


def test_episodes_side_by_side_act_as_each_alone():
    together = recorder()
    alone = [recorder() for _ in range(3)]
    for t in range(5):
        rows = [observed(t + 100 * i) for i in range(3)]
        actions = together.act({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        assert actions.shape == (3, 2)
        for i, policy in enumerate(alone):
            assert np.array_equal(policy.act(rows[i]), actions[i])
    for k, batch in enumerate(together.model.batches):
        assert torch.equal(batch["state"], torch.cat([policy.model.batches[k]["state"] for policy in alone]))


def test_images_and_instructions_arrive_where_the_model_expects_them():
    cameras = LOWDIM | {"camera_keys": ["front", "hand"], "image_size": [4, 6]}
    policy = recorder(cameras, text_len=16)
    rng = np.random.default_rng(0)
    seen = [observed(t) | {key: rng.integers(0, 256, (4, 6, 3), np.uint8) for key in ("front", "hand")}
            for t in range(5)]
    for step in seen:
        policy.act(step | {"instruction": "go there"})
    images = policy.model.batches[1]["images"]                      # planned at step 4 from steps 2, 3, 4
    assert images.shape == (1, 3, 2, 3, 4, 6) and images.dtype == torch.uint8
    for i, step in enumerate(seen[2:]):
        for v, key in enumerate(("front", "hand")):
            assert np.array_equal(images[0, i, v].permute(1, 2, 0).numpy(), step[key])
    assert decode_text(policy.model.batches[1]["text"][0]) == "go there"
    both = {key: np.stack([value, value]) for key, value in seen[0].items()}
    policy.reset()
    policy.act(both | {"instruction": ["left", "right"]})
    assert [decode_text(row) for row in policy.model.batches[-1]["text"]] == ["left", "right"]


def test_the_policy_sees_what_it_was_trained_on(tmp_path):
    """The batch at step t of a demonstration, acted through, is the training batch of that step."""
    def with_camera(i, actions, obs):
        rng = np.random.default_rng(i)
        return actions, obs | {"cam": rng.integers(0, 256, (len(actions), 8, 8, 3), np.uint8)}
    found = open_demos(write_demos(tmp_path / "cam.hdf5", change=with_camera), obs="image")
    normalizer = data.fit_normalizer(found)
    windows = data.Windows(found, normalizer, 8, 3, -2)
    policy = Policy(Recorder(n_action_steps=1), normalizer, found.description())
    T = found.lengths[found.train_episodes[0]]
    raw = found.state[found.rows(found.train_episodes[:1])]
    frames = found.images(found.train_episodes[0], 0, T)
    for t in range(T):
        parts = np.split(raw[t], np.cumsum([*found.state_keys.values()]))
        policy.act({"cam": frames[t, 0].transpose(1, 2, 0)} | dict(zip(found.state_keys, parts)))
        trained = windows.batch(torch.tensor([t]))
        for key in ("state", "images", "control_hz"):
            assert torch.equal(policy.model.batches[-1][key], trained[key]), (key, t)


def test_a_model_file_may_bring_its_own_codes():
    """With encode_text in its Config, instructions arrive in its codes; what it refuses is one line."""
    policy = recorder(text_len=4)

    def encode_text(text):
        if len(text) > 4:
            raise ValueError(f"{text!r} is too long")
        return torch.tensor([7, 8, 9, len(text)])
    policy.model.config.encode_text = encode_text
    policy.act(observed(0) | {"instruction": "go"})
    assert policy.model.batches[0]["text"].tolist() == [[7, 8, 9, 2]]
    with pytest.raises(UserError, match="'go there' is too long"):
        policy.act(observed(1) | {"instruction": "go there"})


def test_words_can_be_exchanged_to_see_whether_a_policy_listens():
    policy = recorder(text_len=40)
    policy.swap = [sample.word_pair("red,blue")]
    policy.act(observed(0) | {"instruction": "red block, reduced, on the blue one"})
    assert decode_text(policy.model.batches[0]["text"][0]) == "blue block, reduced, on the red one"
    with pytest.raises(UserError, match="--swap red: write it as two words, for example"):
        sample.word_pair("red")


def test_copies_and_trace_of_a_chunk(tiny):
    """Several chunks for each episode, with noise of their own; the trace ends with the chunks."""
    policy, trace = Policy.load(tiny), []
    for step in episode(2, 3):
        policy.observe(step)
    chunks = policy.sample_chunk(copies=4, trace=trace)
    assert chunks.shape[0] == 12 and not policy.queue
    last = policy.normalizer.unnormalize("actions", trace[-1]).numpy()
    assert np.allclose(last, chunks, atol=1e-6)
    rows = chunks.reshape(3, 4, -1)
    assert np.ptp(rows, axis=1).max() > 1e-3
    policy.generator = torch.Generator().manual_seed(0)
    whole = policy.sample_chunk()
    alone = Policy.load(tiny)
    for step in episode(2, 3):
        alone.observe(step)
    assert np.array_equal(alone.sample_chunk(), whole)


@pytest.mark.parametrize("change, named", [
    ({"b": None}, "lacks 'b'"), ({"b": np.zeros(3)}, r"'b' has shape \(3,\), trained on was \(2,\)"),
    ({"front": None, "frnt": np.zeros((4, 6, 3), np.uint8)}, "lacks 'front', did you mean 'frnt'"),
    ({"front": np.zeros((6, 4, 3), np.uint8)}, r"\(4, 6, 3\)"), ({"front": np.zeros((4, 6, 3))}, "float64")])
def test_observations_that_do_not_fit_are_named(change, named):
    policy = recorder(LOWDIM | {"camera_keys": ["front"], "image_size": [4, 6]})
    observation = observed(0) | {"front": np.zeros((4, 6, 3), np.uint8)} | change
    with pytest.raises(UserError, match=named):
        policy.act({key: value for key, value in observation.items() if value is not None})


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_same_seed_same_actions(tiny):
    def acted(policy, count=None):
        return np.stack([policy.act(step) for step in episode(6, count)])
    policy = Policy.load(tiny)
    first = acted(policy)
    policy.reset()
    assert first.shape == (6, 2) and np.array_equal(acted(policy), first)
    assert np.array_equal(acted(Policy.load(tiny)), first)
    assert not np.allclose(acted(Policy.load(tiny, seed=1)), first, atol=1e-3)
    # A batch draws noise of its own for every episode.
    several = acted(Policy.load(tiny), count=2)
    assert several.shape == (6, 2, 2) and not np.allclose(several[0, 0], several[0, 1], atol=1e-3)


def test_bfloat16_acts_like_float32(tiny):
    exact, half = (Policy.load(tiny, dtype=dtype) for dtype in (None, torch.bfloat16))
    for step in episode(5, 16):
        a, b = exact.act(step), half.act(step)
        assert b.dtype == np.float32 and np.abs(a - b).mean() < 0.02 * a.std()


def test_load_uses_the_averaged_weights_in_evaluation_mode(tiny):
    model, checkpoint = load_model(tiny)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(w, checkpoint["ema"][key]) for key, w in model.state_dict().items())
    assert any(not torch.equal(w, checkpoint["weights"][key]) for key, w in model.state_dict().items())


def test_load_refuses_weights_that_compute_something_else(tiny, tmp_path, capsys):
    content = read_checkpoint(tiny)
    key = next(k for k in content["ema"] if k.endswith("final_out.weight"))
    content["ema"][key] += 0.1
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="another output"):
        Policy.load(tmp_path)
    refused(capsys, lambda: sample.main([str(tmp_path)]), "another output", tmp_path)


@pytest.mark.parametrize("changes, named", [
    ({"normalizer": None}, "no policy"), ({"format": FORMAT + 1}, "update the code"),
    ({"model": "dp_cmm"}, "did you mean 'dp_cnn'"), ({"config": {"horizont": 8}}, "did you mean 'horizon'")])
def test_load_names_what_does_not_fit(changes, named, tiny, tmp_path):
    torch.save(read_checkpoint(tiny), tmp_path / "checkpoint.pt")
    spoil(tmp_path, **changes)
    with pytest.raises(UserError, match=named):
        Policy.load(tmp_path)
    with pytest.raises(UserError, match="nothing"):
        Policy.load(tmp_path / "nothing")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@golden("dp_cnn.DiffusionUnetLowdimPolicy")
def test_official_weights_through_the_command_line(case, suffix, tmp_path, capsys):
    """--init --steps 0: the checkpoint holds the official weights, and acts."""
    config, path = policy_config(case), tmp_path / f"official{suffix}"
    if suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors.torch", reason="package safetensors is an extra")
        safetensors.save_file(case.sd, path)
    else:
        torch.save(case.sd, path)

    def with_state(i, actions, obs):
        state = np.random.default_rng(i).normal(size=(len(actions), config.state_dim))
        return actions, {"state": state.astype(np.float32)}
    demos = write_demos(tmp_path / "demos.hdf5", action_dim=config.action_dim, change=with_state)
    fields = {name: value for name, value in dataclasses.asdict(config).items()
              if value != getattr(dp_cnn.Config, name)}
    fields = [word for name, value in fields.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    argv = ["--model", "dp_cnn", "--data", str(demos), "--episodes", "0", "--steps", "0", "--batch_size", "8",
            "--device", "cpu", "--init", str(path), *fields]
    train.main([*argv, "--out", str(tmp_path / "out")])
    official = dp_cnn.Model.from_official(case.sd, config).state_dict()
    model, checkpoint = load_model(tmp_path / "out")
    for weights in (checkpoint["weights"], model.state_dict()):
        assert all(torch.equal(weights[key], w) for key, w in official.items())
    policy = Policy.load(tmp_path / "out")
    assert policy.act({"state": np.zeros(config.state_dim)}).shape == (config.action_dim,)
    other = config.step_embed_dim + 8                               # weights of another size are named
    argv += ["--set", f"step_embed_dim={other}", "--out", str(tmp_path / "misfit")]
    refused(capsys, lambda: train.main(argv), "--init", "should be", f"({other}")


# -- evaluation ----------------------------------------------------------------------------------------------


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
        self.expert, self.latency, self.starts = None, [0.02, 0.04], None

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
    assert good["latency_ms"] == pytest.approx(30) and good["episodes"] == 12
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


# -- Gymnasium environments ----------------------------------------------------------------------------------


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


# -- the command line ----------------------------------------------------------------------------------------


def test_command_line(solved, capsys):
    result = sample.main([str(solved), "--episodes", "2", "--sampler_steps", "5"])
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed == result == json.loads((solved / "evaluation.json").read_text())
    assert "<html" in (solved / "evaluation.html").read_text()
    again = closed_loop(Policy.load(solved, steps=5), "tabletop", 2, 0)
    assert (again["success"], again["outcomes"]) == (result["success"], result["outcomes"])
    result = sample.main([str(solved / "checkpoint.pt"), "--episodes", "3", "--set", "sampler=ddpm",
                          "--env", "tabletop", "--seed", "1", "--dtype", "bfloat16"])
    assert result["episodes"] == 3 and sum(result["outcomes"].values()) == 3


@pytest.mark.parametrize("argv, named", [
    (["--instruction", "7"], ["instruction", "0..3"]), (["--sampler_steps", "1000"], ["1000"]),
    (["--episodes", "0"], ["--episodes 0"]), (["--episode", "3"], ["did you mean 'episodes'"]),
    (["--set", "samplr=ddpm"], ["did you mean 'sampler'"]), (["--set", "sampler=dpm"], ["dpm"]),
    (["--device", "tpu"], ["tpu"]), (["--env", "NoSuch-v0"], ["NoSuch"]),
    (["--config", "missing.yaml"], ["missing.yaml"])])
def test_wrong_flags(argv, named, solved, capsys):
    if "--env" in argv:
        pytest.importorskip("gymnasium", reason="package gymnasium is an extra")
    refused(capsys, lambda: sample.main([str(solved), "--episodes", "1", *argv]), *named)


def test_wrong_runs(tiny, tmp_path, capsys):
    refused(capsys, lambda: sample.main([str(tmp_path)]), tmp_path)
    refused(capsys, lambda: sample.main([str(tiny)]), "names no environment")
    refused(capsys, lambda: sample.main([str(tiny), "--env", "tabletop"]), "lacks 'agent_pos'")


# -- does it work? -------------------------------------------------------------------------------------------


def test_closed_loop_success(solved):
    result = json.loads((solved / "result.json").read_text())
    assert result["episodes"] == 20 and result["success"] >= 0.6


def test_both_ways_round_the_wall_and_their_mean_into_it(solved):
    """From one observation, on the way to the middle of the wall with the block in hand: chunks for both
    sides are drawn, and few touch the wall; their mean, which is what regression would answer, does."""
    n, seed = 64, 0
    while True:                                                     # until the asked block lies in the middle
        _, blocks, asked = tabletop.scene(seed)
        if abs(blocks[asked // 2, 0]) < 0.02:
            break
        seed += 1
    env = tabletop.Tabletop(n, cameras=False)
    obs, _ = env.reset(seed=np.full(n, seed))
    expert = tabletop.Expert(env)
    while expert.carried[0] < 3 or obs["robot0_eef_pos"][0, 1] < tabletop.WALL_Y - 0.45:
        before, (obs, *_) = obs, env.step(expert.act(obs))
    policy = Policy.load(solved)
    policy.history = [policy.prepare(before)[0]]
    policy.act(obs)
    chunks = policy.chunk[:, 1:]                                    # (n, 15, 3) from now on
    left, right = chunks[:, -1, 0] < -0.2, chunks[:, -1, 0] > 0.2
    assert left.sum() >= n // 8 and right.sum() >= n // 8 and (left | right).mean() > 0.9

    def touches(chunk):
        world, touched = copy.deepcopy(env), np.zeros(n, bool)
        for t in range(chunk.shape[1]):
            world.step(chunk[:, t])
            touched |= world.cancelled.any(1)
        return touched

    assert touches(chunks).mean() < 0.25
    assert touches(np.broadcast_to(chunks.mean(0), chunks.shape)).all()


def test_a_generative_checkpoint_is_sampled_and_compared_with_held_out_data(tmp_path, capsys):
    short = ["--steps", "2", "--batch_size", "8", "--demos", "400"]
    train.main(["--model", "ddpm", *short, "--out", str(tmp_path)])
    result = sample.main([str(tmp_path), "--sampler_steps", "5"])
    assert 0 < result["floor"] < result["distance"]      # two steps of training do not reach the data
    assert (tmp_path / "evaluation.html").stat().st_size > 10_000
    with pytest.raises(UserError, match="2000"):
        sample.main([str(tmp_path), "--sampler_steps", "2000"])


class Renderer(torch.nn.Module):
    """Stands in for an image model with classes: its samples of a class are real images of it, or for the
    share `wrong` of them of the next class."""

    def __init__(self, images, wrong=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images, self.wrong = images, wrong
        self.config = types.SimpleNamespace(n_classes=images.n_classes)

    def sample(self, batch, generator=None):
        label = batch["label"].clone()
        few = int(self.wrong * len(label))
        label[:few] = (label[:few] + 1) % self.images.n_classes
        first = [(self.images.label == c).nonzero()[0] for c in label]
        return self.images.batch(torch.cat(first))["x"]


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_a_classifier_says_whether_samples_show_what_was_asked_for(wrong, monkeypatch):
    held_out, real = (open_samples("shapes", n=1500, split=split) for split in ("valid", "train"))
    short = classifier
    monkeypatch.setattr(quality, "classifier", lambda train, seed: short(train, seed, steps=120))
    before = torch.random.get_rng_state()
    result = compare_samples(Renderer(held_out, wrong), held_out, 0, real)
    assert torch.equal(before, torch.random.get_rng_state())        # the run's randomness is not touched
    assert result["accuracy_real"] > 0.85
    assert result["accuracy_samples"] == pytest.approx(1 - wrong, abs=0.2)
    assert "accuracy_samples" not in compare_samples(Renderer(held_out), held_out, 0)
    points = open_samples("moons", n=400, split="valid")
    model = types.SimpleNamespace(sample=lambda batch, generator: batch["x"], parameters=lambda: iter([
        torch.zeros(1)]), config=types.SimpleNamespace(n_classes=2))
    assert set(compare_samples(model, points, 0, points)) == {"distance", "floor"}
