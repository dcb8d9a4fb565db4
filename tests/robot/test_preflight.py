"""robot/preflight.py: an episode that the policy may fly is a GO, every planted fault a NO-GO by its name."""
import io
import json
import time

import h5py
import numpy as np
import pytest
import torch

from helpers import TINY, refused, write_aloha, write_demos

import train
from robot import preflight
from robot.errors import UserError
from robot.policy import Policy
from robot.preflight_checks import UNKNOWN

LENGTH = 24


def arm(i, actions, obs):
    """Joints that stand a little behind their targets, in rad, and two cameras."""
    rng = np.random.default_rng(i)
    clock = np.arange(LENGTH)[:, None] / 10
    target = np.array([0.8, -0.4]) + 0.5 * np.sin(2 * clock + rng.uniform(0, 6, 2))
    joint = np.concatenate([target[:1], 0.5 * (target[:-1] + target[1:])]) - 0.02
    y, x = np.mgrid[:16, :24]
    front = np.stack([8 * x + 20, 3 * y + 0 * x, 5 * y + 10 + 0 * x], -1)
    hand = np.stack([4 * y + 0 * x, 200 - 8 * x, 9 * y + 60 + 0 * x], -1)
    cameras = {"front": front, "hand": hand}
    noise = rng.integers(0, 30, (LENGTH, 16, 24, 3))
    return target.astype(np.float32), {"joint": joint.astype(np.float32)} | {
        key: (x + noise).astype(np.uint8) for key, x in cameras.items()}


class Follower:
    """Stands in for the network: its chunk goes on from the joints at hand, evenly."""
    def __init__(self, model, change=lambda chunk: chunk, seconds=0.0):
        self.model, self.change, self.seconds, self.config = model, change, seconds, model.config

    def to(self, *_):
        return self

    def sample(self, batch, steps=None, generator=None):
        time.sleep(self.seconds)
        now = batch["state"][:, -1:, :2]
        return self.change(now.repeat(1, self.config.pred_horizon, 1) * 0.9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a run of two steps, its data set)"""
    folder = tmp_path_factory.mktemp("arm")
    data = write_demos(folder / "arm.hdf5", episodes=8, change=arm)
    with h5py.File(data, "r+") as file:
        for demo in file["data"].values():
            demo.attrs["language_instruction"] = "wave to me"
    fields = [word for field in (*TINY, "obs=image") for word in ("--set", field)]
    train.main(["--model", "dp_cnn", "--data", str(data), "--out", str(folder / "run"), "--steps", "2",
                "--warmup", "1", "--batch_size", "4", "--episodes", "0", "--device", "cpu", *fields])
    return folder / "run", data


def fly(trained, capsys, monkeypatch, change=lambda chunk: chunk, seconds=0.0, episode=None, description=None,
        told=None, reads=False):
    """Exit status and report of a flight with a stand-in for the network."""
    run, data = trained
    load = Policy.load.__func__

    def stand_in(cls, *args, **kwargs):
        policy = load(cls, *args, **kwargs)
        policy.model = Follower(policy.model, change, seconds)
        policy.description = description(policy.description) if description else policy.description
        if reads:
            policy.model.config = type("Reads", (), {"text_len": 16})()
            for name in ("n_obs_steps", "first_action", "n_action_steps", "pred_horizon"):
                setattr(policy.model.config, name, getattr(policy.model.model.config, name))
        return policy
    argv = [str(run), str(episode or data), "--device", "cpu", "--json"]
    capsys.readouterr()
    status = 0
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "load", classmethod(stand_in))
        try:
            preflight.main(argv + (["--instruction", told] if told else []))
        except SystemExit as stopped:
            status = stopped.code
    said = json.loads(capsys.readouterr().out)
    assert status == (0 if said["go"] else 1)
    return said


def spoiled(path, edit):
    """One episode of the arm that the set does not have, changed by edit(actions, obs)."""
    def change(i, actions, obs):
        actions, obs = arm(90 + i, actions, obs)
        edit(obs)
        return actions, obs
    return write_demos(path, episodes=1, change=change)


def names(said):
    return [reason["name"] for reason in said["reasons"]]


def test_a_clean_episode_is_a_go(trained, capsys, monkeypatch, tmp_path):
    said = fly(trained, capsys, monkeypatch)
    assert said["go"] and said["reasons"] == said["remarks"] == [] and said["steps"] == LENGTH
    assert len(said["chunk_seconds"]) == LENGTH // 4 and said["distance_from_recorded"] < 0.2
    assert fly(trained, capsys, monkeypatch, episode=spoiled(tmp_path / "new.hdf5", lambda obs: None))["go"]


OBSERVATIONS = {
    "degrees": ("units", "the state looks like degrees instead of rad: joint[0], joint[1]",
                lambda obs: obs.update(joint=np.rad2deg(obs["joint"]))),
    "millimetres": ("units", "the state looks like millimetres instead of metres: joint[0], joint[1]",
                    lambda obs: obs.update(joint=1000 * obs["joint"])),
    "order": ("state", "joint[0] is ", lambda obs: obs.update(joint=obs["joint"][:, ::-1] - [[2, 0]])),
    "swapped": ("cameras", "'front' and 'hand' look like each other",
                lambda obs: obs.update(front=obs["hand"], hand=obs["front"])),
    "mirrored": ("cameras", "'hand' looks mirrored", lambda obs: obs.update(hand=obs["hand"][:, :, ::-1])),
    "colours": ("cameras", "'front' looks with red and blue exchanged",
                lambda obs: obs.update(front=obs["front"][..., ::-1])),
    "dark": ("cameras", "'front' is ", lambda obs: obs.update(front=obs["front"] // 30)),
    "proportions": ("refused", "at step 0: observation 'front' is uint8 (16, 16, 3), a picture must be",
                    lambda obs: obs.update(front=obs["front"][:, :, :16])),
    "lacking": ("refused", "at step 0: the observation lacks 'hand'", lambda obs: obs.pop("hand")),
    "non-finite": ("refused", "at step 2: observation 'joint' is not finite",
                   lambda obs: obs["joint"].__setitem__((2, 1), np.nan)),
}


@pytest.mark.parametrize("fault", OBSERVATIONS)
def test_a_fault_of_the_observations_is_named(fault, trained, capsys, monkeypatch, tmp_path):
    name, words, edit = OBSERVATIONS[fault]
    said = fly(trained, capsys, monkeypatch, episode=spoiled(tmp_path / "new.hdf5", edit))
    what, = [reason["what"] for reason in said["reasons"] if reason["name"] == name]
    assert words in what and len(what) < 380
    # What is far from the data sends this policy far, too; nothing else is wrong with it.
    assert set(names(said)) <= {name, "limits", "first action", "speed"} and not said["go"]


def step(chunk):
    chunk = chunk.clone()
    chunk[:, 3, 1] -= 0.9 * chunk[:, 3, 1].sign()
    return chunk


ACTIONS = {
    "non-finite": ("non-finite", "24 of 24 actions are not finite, the first at step 0",
                   lambda c: c * torch.nan),
    "limits": ("limits", "action 1 is ", lambda c: c + torch.tensor([0, -2.0])),
    "speed": ("speed", "action 1 goes ", step),
    "first action": ("first action", "action 0 of the chunk at step ",
                     lambda c: (c + torch.tensor([0.7, 0])).clamp(-1, 1)),
}


@pytest.mark.parametrize("fault", ACTIONS)
def test_a_fault_of_the_actions_is_named(fault, trained, capsys, monkeypatch):
    name, words, change = ACTIONS[fault]
    said = fly(trained, capsys, monkeypatch, change)
    what, = [reason["what"] for reason in said["reasons"] if reason["name"] == name]
    assert words in what
    assert set(names(said)) <= {name, "first action"} and not said["go"]


def test_latency_is_compared_with_the_control_period(trained, capsys, monkeypatch):
    said = fly(trained, capsys, monkeypatch, seconds=0.13)
    assert names(said) == ["latency"]
    assert "a control step 100 ms: the arm would wait" in said["reasons"][0]["what"]
    assert fly(trained, capsys, monkeypatch, seconds=0.04)["go"]


def test_instructions_and_rates_that_are_not_those_of_the_data(trained, capsys, monkeypatch, tmp_path):
    said = fly(trained, capsys, monkeypatch, told="wave to her", reads=True)
    assert names(said) == ["instruction"]
    assert ("'wave to her' is unknown, 1 others were trained on, did you mean 'wave to me'?"
            in said["reasons"][0]["what"])
    assert fly(trained, capsys, monkeypatch, reads=True)["go"]                  # as the episode says
    silent = spoiled(tmp_path / "new.hdf5", lambda obs: None)
    said = fly(trained, capsys, monkeypatch, reads=True, episode=silent)
    assert names(said) == ["refused", "instruction"] and "nothing is asked" in said["reasons"][1]["what"]
    with h5py.File(silent, "r+") as file:
        file["data"].attrs["fps"] = 30.0
    said = fly(trained, capsys, monkeypatch, episode=silent)
    assert names(said) == ["rate"] and "the episode has 30 Hz, the policy was trained at 10 Hz" in \
        said["reasons"][0]["what"]


def test_frames_of_another_size_are_a_remark(trained, capsys, monkeypatch, tmp_path):
    larger = spoiled(tmp_path / "new.hdf5", lambda obs: obs.update(
        {key: obs[key].repeat(2, 1).repeat(2, 2) for key in ("front", "hand")}))
    said = fly(trained, capsys, monkeypatch, episode=larger)
    assert said["go"] and [(x["name"], x["what"].partition(":")[0]) for x in said["remarks"]] == [
        ("camera size", f"'{key}' is 32 x 48, recorded was 16 x 24") for key in ("front", "hand")]


def test_an_older_checkpoint_says_what_it_does_not_know(trained, capsys, monkeypatch):
    said = fly(trained, capsys, monkeypatch, lambda chunk: 40 * chunk,
               description=lambda d: {key: x for key, x in d.items() if key != "usual"})
    remark, = said["remarks"]
    assert said["go"] and remark["what"] == UNKNOWN and remark["name"].startswith("limits, speeds")


def test_what_a_checkpoint_keeps_of_its_data(trained):
    run, data = trained
    usual = Policy.load(run, device="cpu").description["usual"]
    episodes = Policy.load(run, device="cpu").description["train_episodes"]
    with h5py.File(data) as file:
        parts = [file[f"data/demo_{e}"] for e in episodes]
        actions, joint = ([part[key][:] for part in parts] for key in ("actions", "obs/joint"))
        front = np.concatenate([part["obs/front"][:] for part in parts])
    assert np.allclose(usual["actions"]["low"], np.min(np.concatenate(actions), 0), atol=1e-7)
    assert np.allclose(usual["state"]["high"], np.max(np.concatenate(joint), 0), atol=1e-7)
    assert np.allclose(usual["actions"]["step"], np.max([abs(np.diff(x, axis=0)).max(0) for x in actions], 0))
    apart = np.max(abs(np.concatenate(actions) - np.concatenate(joint)), 0)
    assert [jump[:2] for jump in usual["first_jump"]] == [[0, 0], [1, 1]]
    assert np.allclose([jump[2] for jump in usual["first_jump"]], apart)
    mean = np.array(usual["looks"]["front"]["mean"])
    assert mean.shape == (8, 8, 3) and abs(mean.mean((0, 1)) - front.mean((0, 1, 2))).max() < 2
    assert 1 < usual["looks"]["front"]["far"] < 15 and usual["colour"] == "bgr"


def test_a_real_run_is_read_from_aloha_too(trained, capsys, tmp_path):
    """No stand-in: a network of two training steps. The two layouts of one episode give the same flight."""
    run, data = trained
    with h5py.File(data) as file, h5py.File(tmp_path / "episode_0.hdf5", "w") as to:
        demo = file["data/demo_0"]
        to["action"], to["observations/joint"] = demo["actions"][:], demo["obs/joint"][:]
        for key in ("front", "hand"):
            to[f"observations/images/{key}"] = demo[f"obs/{key}"][:]
    flown = []
    for path in (data, tmp_path / "episode_0.hdf5"):
        recording = preflight.Recording(path, ["joint"], ["front", "hand"])
        flown.append(np.stack(preflight.fly(Policy.load(run, device="cpu"), recording, None).actions))
        recording.close()
    assert flown[0].shape == (LENGTH, 2) and np.array_equal(*flown)
    policy = Policy.load(run, device="cpu")
    with h5py.File(data) as file:
        obs = file["data/demo_0/obs"]
        direct = [policy.act({key: obs[key][t] for key in obs}) for t in range(LENGTH)]
    assert np.array_equal(flown[0], direct)
    with pytest.raises(SystemExit) as stopped:
        preflight.main([str(run), str(data), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1 and lines[0] == "NO-GO"
    assert lines[-1].startswith("arm.hdf5:demo_0: 24 of 24 steps, 6 chunks of ")


@pytest.mark.parametrize("argv, named", [
    (["{run}", "nowhere.hdf5"], ["nowhere.hdf5"]), (["{run}/nothing", "{data}"], ["there is no"]),
    (["{run}", "{data}", "--demo", "demo_99"], ["no episode 'demo_99'"]),
    (["{run}", "{run}/checkpoint.pt"], ["cannot be opened as HDF5"]),
    (["{run}", "{run}"], ["is a folder", "python -m demos.convert FOLDER"]),
    (["{run}"], ["required", "episode"]),
    (["{run}", "{data}", "--sampler_steps", "0"], ["--sampler_steps 0"])])
def test_mistakes_end_in_one_line(argv, named, trained, capsys):
    run, data = trained
    refused(capsys, lambda: preflight.main([word.format(run=run, data=data) for word in argv]), *named)


def test_whether_bytes_are_a_picture_is_said_by_the_key(tmp_path):
    """A state may be uint8, if shape_meta names it, and a camera may have been recorded as none should be."""
    def edit(i, actions, obs):
        n = len(actions)
        return actions, {"buttons": np.arange(3 * n, dtype=np.uint8).reshape(n, 3),
                         "pose": np.arange(12 * n, dtype=np.uint8).reshape(n, 2, 2, 3),
                         "front": np.full((n, 4, 6, 3), 0.5, np.float32)}
    path = write_demos(tmp_path / "a.hdf5", episodes=1, change=edit)
    recording = preflight.Recording(path, ["buttons", "pose"], ["front"])
    seen = recording[2]
    recording.close()
    assert seen["buttons"].tolist() == [6, 7, 8] and seen["pose"].tolist() == [*range(24, 36)]
    assert seen["front"].shape == (4, 6, 3) and seen["front"].dtype == np.float32       # the policy says so


def test_jpeg_frames_of_a_recording(tmp_path):
    """In the colours of the training data; a broken one is a line with the episode's name."""
    Image = pytest.importorskip("PIL.Image", reason="package Pillow is an extra")

    def frames(file, n):
        buffers = file.create_dataset("observations/images/top", n, h5py.vlen_dtype(np.uint8))
        for t in range(n):
            packed = io.BytesIO()
            Image.new("RGB", (16, 16), (200, 40, 10 * t)).save(packed, "JPEG", quality=100)
            buffers[t] = np.frombuffer(packed.getvalue(), np.uint8) if t < 2 else np.zeros(9, np.uint8)
    path = write_aloha(tmp_path / "set", [3], frames) / "episode_0.hdf5"
    for colour, first in (("rgb", (200, 40, 10)), ("bgr", (10, 40, 200))):
        recording = preflight.Recording(path, ["qpos"], ["top"], colour=colour)
        assert abs(recording[1]["top"][8, 8].astype(int) - first).max() <= 4
        with pytest.raises(UserError, match="episode_0.hdf5.*JPEG frame cannot be decoded"):
            recording[2]
        recording.close()
