"""robot/checkpoint.py: what is read, replayed and refused; official weights."""
import dataclasses
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from golden_cases import golden
from test_dp_cnn import policy_config
from helpers import episode, refused, spoil, write_demos

import dp_cnn
import sample
import train
from robot.checkpoint import FORMAT, load_model, read_checkpoint
from robot.errors import UserError
from robot.policy import Policy


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
    ({"normalizer": None}, "no sound 'data'"), ({"format": FORMAT + 1}, "update the code"),
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
    refused(capsys, lambda: train.main(argv), "--init", "should be", f", {other})")


@pytest.mark.parametrize("key", ["weights", "ema", "options", "config", "data", "replay", "step", "model"])
def test_a_checkpoint_without_a_part_or_with_one_of_another_type(key, tiny, tmp_path):
    for change in ({}, {key: [1]}):
        content = read_checkpoint(tiny)
        content.pop(key)
        torch.save(content | change, tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match=f"holds no sound '{key}'"):
            Policy.load(tmp_path)


def test_a_flipped_bit_in_a_weight_is_noticed(tiny, tmp_path):
    data = bytearray((tiny / "checkpoint.pt").read_bytes())
    with zipfile.ZipFile(tiny / "checkpoint.pt") as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 4
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        Policy.load(tmp_path)


def test_a_model_file_that_has_changed_its_layers_is_one_line(tiny, monkeypatch):
    class Changed(dp_cnn.Model):
        def __init__(self, config):
            super().__init__(config)
            self.another = torch.nn.Linear(2, 2)
    monkeypatch.setattr(dp_cnn, "Model", Changed)
    with pytest.raises(UserError, match=r"does not fit dp_cnn.*another") as error:
        Policy.load(tiny)
    assert len(str(error.value)) < 400


def test_the_replay_can_be_overruled(tiny, tmp_path, capsys):
    content = read_checkpoint(tiny)
    content["replay"]["output"] += 1
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="--no_replay"):
        Policy.load(tmp_path)
    assert Policy.load(tmp_path, replay=False).act(episode(1, None)[0]).shape == (2,)


@pytest.mark.parametrize("device, named", [("cuda", "finds none"), ("cudda", "did you mean 'cuda'")])
def test_a_device_that_is_not_there(device, named, tiny):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=named):
        Policy.load(tiny, device=device)


@pytest.mark.parametrize("part, change", [
    ("options", lambda c: c["options"].pop("data")), ("options", lambda c: c["options"].update(seed="0")),
    ("options", lambda c: c["options"].update(robots="")),
    ("normalizer", lambda c: c["normalizer"]["near_constant"].pop("state")),
    ("data", lambda c: c["data"].update(fps=-float("inf"))),
    ("train_seconds", lambda c: c.update(train_seconds=float("nan"))),
    ("replay", lambda c: c["replay"].pop("output")), ("data", lambda c: c["data"].pop("state_keys")),
    ("data", lambda c: c["data"].update(action_dim=2.0)), ("unlogged", lambda c: c.update(unlogged={"x": 1})),
    ("unlogged", lambda c: c["unlogged"].update(losses=[1.0])),
    ("data", lambda c: c["data"].update(camera_keys=[3])),
    ("normalizer", lambda c: c["normalizer"].pop("scale")),
    ("normalizer", lambda c: c["normalizer"].update(x=1)),
    ("normalizer", lambda c: c["normalizer"]["scale"].update(actions=torch.ones(3))),
    ("normalizer", lambda c: c["normalizer"]["scale"].update(state=torch.full((5,), torch.nan))),
    ("normalizer", lambda c: c["normalizer"]["stats"]["actions"].pop("mean")),
    ("normalizer", lambda c: c["normalizer"]["stats"]["state"].update(min=torch.zeros(4)))])
def test_what_was_edited_is_named(part, change, tiny, tmp_path, capsys):
    content = read_checkpoint(tiny)
    change(content)
    torch.save(content, tmp_path / "checkpoint.pt")
    refused(capsys, lambda: sample.main([str(tmp_path)]), f"holds no sound '{part}'", tmp_path)


def test_a_pipe_is_no_checkpoint(tiny, tmp_path, capsys):
    os.mkfifo(tmp_path / "checkpoint.pt")
    refused(capsys, lambda: sample.main([str(tmp_path)]), "a pipe or a device")
    argv = ["--model", "dp_cnn", "--init", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path / "out")]
    refused(capsys, lambda: train.main(argv), "--init", "a pipe or a device")
    argv[3] = "/dev/zero"
    argv += ["--device", "cpu", "--demos", "5"]
    refused(capsys, lambda: train.main(argv), "--init", "pipe or a device")
