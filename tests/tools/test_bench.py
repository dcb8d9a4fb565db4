"""bench.py: its JSON line, and what its regression baseline answers where demonstrations go two ways."""
import json
from pathlib import Path

import pytest
import torch
from helpers import refused

import dp_cnn
from robot.errors import UserError, run_command
from tools import bench, bench_all, measure
from tools.regression import Regression


@pytest.mark.parametrize("model, extra, samplers", [
    ("dp_cnn", ["--set", "down_dims=[16, 32]"], {"ddim 10", "ddpm 100"}),
    ("dp_cnn", ["--set", "down_dims=[16, 32]", "--dtype", "bfloat16"], {"ddim 10", "ddpm 100"}),
    ("ddpm", [], None)])
def test_one_json_line_with_times_of_steps_and_samples(model, extra, samplers, capsys):
    bench.main(["--model", model, "--batch_size", "4", "--repeat", "1", *extra])
    row = json.loads(capsys.readouterr().out)
    assert row["model"] == model and row["batch_size"] == 4
    assert row["step_ms"] > 0 and row["data_ms"] > 0 and row["peak_mb"] > 0 and row["gflops"] > 0
    assert samplers is None or set(row["sample_ms"]) == samplers
    assert all(ms > 0 for ms in row["sample_ms"].values())
    assert bool(row["bf16_error"]) == ("bfloat16" in extra)
    assert all(0 < e < 0.5 for e in row["bf16_error"].values())


def test_regression_answers_with_the_mean_of_both_ways():
    torch.manual_seed(0)
    config = dp_cnn.Config(action_dim=2, state_dim=2, down_dims=(16, 32))
    model = Regression(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        state, actions = dp_cnn.obstacle_paths(64, generator)
        batch = {"state": state, "actions": actions, "action_mask": torch.ones(64, 16, dtype=torch.bool)}
        model.loss(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    state, actions = dp_cnn.obstacle_paths(64, generator)
    path = model.sample({"state": state})
    assert actions[:, 8, 1].abs().min() > 0.5             # every demonstration keeps clear of the middle
    assert path[:, 8, 1].abs().max() < 0.3                # the mean of both sides goes through it


def test_an_unknown_model_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: bench.main(["--model", "dp_cn"]))
    assert exit.value.code == 2 and "did you mean 'dp_cnn'" in capsys.readouterr().err


@pytest.mark.parametrize("argv, named", [
    (["--batch_size", "-1"], ["--batch_size -1"]), (["--batch_size", "0"], ["--batch_size 0"]),
    (["--repeat", "0"], ["--repeat 0"]), (["--steps", "-1", "--regression"], ["--steps -1"]),
    (["--set", "down_dims=[-8, -16]"], ["down_dims"]),
    (["--set", "down_dims=[100000000, 200000000]"], ["dp_cnn", "GB"]),
    (["--set", "action_dim=9000000000000000000"], ["dp_cnn"])])
def test_wrong_numbers_are_one_line(argv, named, capsys):
    refused(capsys, lambda: bench.main(["--model", "dp_cnn", "--device", "cpu", *argv]), *named)


def test_random_demonstrations_are_written_as_a_whole(tmp_path, monkeypatch):
    """HDF5 itself does not survive a full disk."""
    def full(self, content):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="make room"):
        measure.random_demos(dp_cnn.Config(), tmp_path)
    assert not list(tmp_path.iterdir())
