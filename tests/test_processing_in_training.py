"""Processing in training: windows and statistics of relative actions, a resumed run, what is refused."""
import h5py
import numpy as np
import pytest
import torch
from helpers import command, read_rows, refused, spoil, write_demos

import data
import train
from demos.dataset import open_demos
from robot.checkpoint import read_checkpoint
from robot.errors import UserError
from robot.policy import Policy

DELTA = {"obs": {"agent_pos": [{"linear": {"at": [1], "factor": -2, "offset": 1}}]},
         "actions": [{"linear": {"at": [1], "factor": -2, "offset": 1}},
                     {"delta": {"to": "agent_pos", "except": [2]}}]}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The tiny set with a third action, a quaternion, and a goal that is two numbers."""
    def change(i, actions, obs):
        rng = np.random.default_rng(i)
        quat = rng.normal(size=(len(actions), 4)).astype(np.float32)
        return (np.concatenate([actions, rng.normal(size=(len(actions), 1))], 1).astype(np.float32),
                obs | {"quat": quat / np.linalg.norm(quat, axis=1, keepdims=True)})
    return write_demos(tmp_path_factory.mktemp("sets") / "three.hdf5", change=change)


def raw_episodes(path, episodes):
    """[(actions, {key: state})] of the file, in its own numbers."""
    with h5py.File(path) as file:
        return [(file[f"data/demo_{e}/actions"][:], {k: x[:] for k, x in file[f"data/demo_{e}/obs"].items()})
                for e in episodes]


def by_hand(actions, obs, t, steps):
    """The relative actions of a window at t, as DELTA says, from the file's own numbers."""
    place = obs["agent_pos"][t] * [1, -2] + [0, 1]
    rows = actions[np.clip(t + np.array(steps), 0, len(actions) - 1)].astype(np.float64)
    rows[:, 1] = -2 * rows[:, 1] + 1
    rows[:, :2] -= place
    return rows


def test_windows_are_relative_to_now_also_past_the_ends(three):
    """The padding repeats the last action; relative to each "now" it is another number, and it is masked."""
    demos = open_demos(three, processing=DELTA)
    steps = range(-1, 5)
    windows = data.Windows(demos, None, 6, 2, -1)
    batch = windows.batch(torch.arange(len(windows)))
    assert batch["actions"].dtype == torch.float32
    i = 0
    for actions, obs in raw_episodes(three, demos.train_episodes):
        for t in range(len(actions)):
            want = by_hand(actions, obs, t, steps)
            assert abs(batch["actions"][i].numpy() - want).max() < 1e-5
            real = [0 <= t + k < len(actions) for k in steps]
            assert batch["action_mask"][i].tolist() == real
            i += 1
    assert i == len(windows)


@pytest.mark.parametrize("mode", ["minmax", "meanstd", "quantile"])
def test_statistics_are_those_of_the_relative_actions(three, mode):
    """Of all steps of all windows that are real; of the absolute number, of the steps of the file."""
    demos, steps = open_demos(three, processing=DELTA), range(-1, 5)
    normalizer = data.fit_normalizer(demos, mode, steps)
    windows = data.Windows(demos, normalizer, 6, 2, -1)
    batch = windows.batch(torch.arange(len(windows)))
    whole = raw_episodes(three, demos.train_episodes)
    every = np.concatenate([by_hand(actions, obs, t, [k for k in steps if 0 <= t + k < len(actions)])
                            for actions, obs in whole for t in range(len(actions))])
    absolute = np.concatenate([actions[:, 2] for actions, _ in whole])
    stats = normalizer.stats["actions"]
    for d, x in enumerate([every[:, 0], every[:, 1], absolute]):
        found = [stats[name][d].item() for name in ("min", "max", "mean", "std")]
        assert found == pytest.approx([x.min(), x.max(), x.mean(), x.std(ddof=1)], abs=1e-5)
        low, high = {"minmax": (x.min(), x.max()), "quantile": np.quantile(x, [0.01, 0.99]),
                     "meanstd": x.mean() + x.std(ddof=1) * np.array([-1, 1])}[mode]
        ends = torch.tensor([[low] * 3, [high] * 3])
        assert normalizer.normalize("actions", ends)[:, d].tolist() == pytest.approx([-1, 1], abs=1e-4)
    # Normalised relative actions are relative actions, normalised.
    plain = data.Windows(demos, None, 6, 2, -1).batch(torch.arange(len(windows)))
    want = normalizer.normalize("actions", plain["actions"])
    assert (batch["actions"] - want).abs().max() < 1e-5
    if mode == "minmax":
        assert batch["actions"][batch["action_mask"]][:, :2].abs().max() <= 1 + 1e-5


def yaml_of(tmp_path, text):
    (tmp_path / "processing.yaml").write_text(text)
    return ["--config", str(tmp_path / "processing.yaml")]


WHOLE = """
processing:
  obs:
    agent_pos: [{linear: {at: 1, factor: -2, offset: 1}}]
    quat: [{rotation: {at: 0, from: quaternion_xyzw, to: rotation_6d_columns}}]
  actions:
    - linear: {at: 1, factor: -2, offset: 1}
    - delta: {to: agent_pos, except: [2]}
  normalize: {quat: none, actions: {meanstd: [0, 1], maxabs: [2]}}
"""


class Crash(Exception):
    pass


def test_a_resumed_run_equals_the_uninterrupted_one(three, tmp_path, monkeypatch):
    config = yaml_of(tmp_path, WHOLE)
    train.main(command(three, tmp_path / "whole", *config))
    calls, forward = [], train.LossStep.forward

    def counted(self, batch):
        calls.append(0)
        if len(calls) == 6:
            raise Crash
        return forward(self, batch)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train.LossStep, "forward", counted)
        train.main(command(three, tmp_path / "crashed", *config))
    train.main(command(three, tmp_path / "crashed", *config, "--resume"))
    a, b = (read_checkpoint(tmp_path / name) for name in ("whole", "crashed"))
    for part in ("weights", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    losses = [[row["loss"] for row in read_rows(tmp_path / name) if "lr" in row]
              for name in ("whole", "crashed")]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    assert a["data"]["state_keys"] == {"agent_pos": 2, "goal": 2, "number": 1, "quat": 4}      # the robot's
    assert a["config"]["state_dim"] == 11 and a["data"]["state_dim"] == 9
    assert a["config"]["clip_x0"] > 1                               # of relative actions with deviation 1

    policy = Policy.load(tmp_path / "whole")
    seen = {"agent_pos": np.ones(2), "goal": np.ones(2), "number": np.ones(1), "quat": np.eye(4)[3]}
    first = policy.act(seen)
    policy.reset()
    moved = policy.act(seen | {"quat": -seen["quat"]})              # the same rotation
    assert np.array_equal(first, moved) and first.shape == (3,)


def test_another_processing_is_refused_when_resumed(three, tmp_path, capsys):
    train.main(command(three, tmp_path / "run", *yaml_of(tmp_path, WHOLE), steps=2, eval_every=0))
    other = yaml_of(tmp_path, WHOLE.replace("factor: -2", "factor: -1"))
    again = command(three, tmp_path / "run", *other, "--resume", steps=2)
    refused(capsys, lambda: train.main(again), "other processing:")
    # A checkpoint whose description does not fit its normaliser is not sound.
    content = read_checkpoint(tmp_path / "run")
    spoil(tmp_path / "run", data=content["data"] | {"processing": {}})
    refused(capsys, lambda: Policy.load(tmp_path / "run"), "no sound 'normalizer'")


def test_weights_of_absolute_actions_do_not_start_relative_ones(three, tmp_path, capsys):
    train.main(command(three, tmp_path / "run", steps=2, eval_every=0))
    config = yaml_of(tmp_path, "processing: {actions: [{delta: {to: agent_pos, except: 2}}]}")
    argv = command(three, tmp_path / "next", *config, steps=2, init=tmp_path / "run")
    refused(capsys, lambda: train.main(argv), "its actions are not relative to the state")


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_an_episode_that_lacks_a_camera_is_masked_where_places_have_names(tmp_path, memory_gb, capsys):
    def change(i, actions, obs):
        cameras = ("high", "hand") if i != 2 else ("high",)
        return actions, obs | {key: np.full((len(actions), 4, 4, 3), 50 + i, np.uint8) for key in cameras}
    path = write_demos(tmp_path / "cameras.hdf5", change=change)
    named = {"cameras": {"wrist": "hand", "base": "high"}}
    demos = open_demos(path, obs="image", val_ratio=0, processing=named, memory_gb=memory_gb)
    windows = data.Windows(demos, None, 4, 2, -1)
    batch = windows.batch(torch.arange(len(windows)))
    numbers = np.repeat(np.arange(6), demos.lengths)
    lacks = torch.from_numpy(numbers == 2)
    assert batch["image_mask"].shape == (len(windows), 2, 2) and lacks.any() and not lacks.all()
    assert torch.equal(batch["image_mask"][:, 0, 0], ~lacks) and batch["image_mask"][:, :, 1].all()
    assert (batch["images"][lacks][:, :, 0] == 0).all() and (batch["images"][lacks][:, :, 1] == 52).all()
    assert (batch["images"][~lacks][:, :, 0] >= 50).all()
    assert "demo_2: no camera 'hand', the place 'wrist' is hidden there" in capsys.readouterr().err
    with pytest.raises(UserError, match="demo_2 has observations .* but no 'hand'"):
        open_demos(path, obs="image", val_ratio=0)


@pytest.mark.parametrize("text, named", [
    ("processing: {action: []}", "did you mean 'actions'"),
    ("processing: {actions: [{delta: {to: goals}}]}", "delta: to: goals is no state of the robot, did you"),
    ("processing: {actions: [{delta: {to: goal}}]}", "'goal' has 2 numbers, none for number 2"),
    ("processing: {obs: {goal: [{rotation: {at: 0, from: matrix, to: rotation_6d}}]}}", "number 8 does not"),
    ("processing: {cameras: {base: front}}", "there is no camera 'front'"),
    ("processing: {obs: {quat: [{rotation: {at: 0, from: rotation_6d, to: matrix}}]}}", "there are 4"),
    ("processing: {actions: [{rotation: {at: 0, from: axis_angle, to: matrix}}, {linear: {at: 9, factor: "
     "1}}]}", "number 9 does not exist, there are 9"),
    ("processing: 3", "processing = 3 should be dict"),
])
def test_what_is_wrong_with_the_yaml_is_one_line(three, tmp_path, capsys, text, named):
    config = yaml_of(tmp_path, text)
    refused(capsys, lambda: train.main(command(three, tmp_path / "out", *config)), named)


def test_data_that_are_no_rotations_name_their_episode(tmp_path, capsys):
    def change(i, actions, obs):
        quat = np.tile(np.array([0, 0, 0, 1], np.float32), (len(actions), 1))
        if i == 3:
            quat[5] = 0
        return actions, obs | {"quat": quat}
    path = write_demos(tmp_path / "quat.hdf5", change=change)
    turn = "rotation: {at: 0, from: quaternion_wxyz, to: matrix}"
    config = yaml_of(tmp_path, f"processing: {{obs: {{quat: [{{{turn}}}]}}}}")
    refused(capsys, lambda: train.main(command(path, tmp_path / "out", *config)),
            "quat.hdf5:demo_3: 'quat': [0, 0", "(row 5) is no rotation")


def test_several_robots_have_no_processing_of_their_own(three, tmp_path, capsys):
    robots = "robots: {a: {data: x, action_names: [], state_names: []}}"
    config = yaml_of(tmp_path, f"processing: {{images: {{fit: pad}}}}\nmodel: rdt\n{robots}")
    refused(capsys, lambda: train.main(["--out", str(tmp_path / "out"), *config]), "is for one robot")
    config = yaml_of(tmp_path, "processing: {images: {fit: pad}}\nmodel: ddpm")
    refused(capsys, lambda: train.main(["--out", str(tmp_path / "out"), *config]), "makes samples")
