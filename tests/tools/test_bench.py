"""bench.py: its rows, its tables, and what the regression baseline answers where there are two ways."""
import itertools
import json
import math
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import refused

import dp_cnn
import rdt
from robot.errors import UserError, run_command
from robot.packing import PACKED, pack
from tools import bench, bench_all, measure
from tools.regression import Regression

CPU = torch.device("cpu")


# ---------------------------------------------------------------- a row

@pytest.mark.parametrize("model, extra, samplers", [
    ("dp_cnn", ["--set", "down_dims=[16, 32]"], {"ddim 10", "ddpm 20"}),
    ("dp_cnn", ["--set", "down_dims=[16, 32]", "--dtype", "bfloat16"], {"ddim 10", "ddpm 20"}),
    ("ddpm", ["--set", "sampler_steps=20"], {"ddim 10", "ddpm 20"})])
def test_one_json_line_with_times_of_steps_and_chunks(model, extra, samplers, capsys):
    bench.main(["--model", model, "--batch_size", "4", "--repeat", "2", "--device", "cpu",
                "--set", "n_diffusion_steps=20", *extra])
    row = json.loads(capsys.readouterr().out)
    dtypes = ["bfloat16"] if "bfloat16" in extra else ["float32", "bfloat16"]
    assert row["model"] == model and row["batch_size"] == 4 and row["data_ms"] > 0 and not row["left_out"]
    assert list(row["training"]) == dtypes and all(list(found) == dtypes for found in row["chunk"].values())
    assert set(row["chunk"]) == samplers
    for found in row["training"].values():
        assert 0 < found["share"] <= 1.2 and found["of"] == "arithmetic"
        assert found["gflops"] == pytest.approx(found["flops"] / found["ms"] / 1e6, rel=0.01, abs=0.06)
        assert found["samples_per_s"] == pytest.approx(4000 / found["ms"], rel=0.01)
    for found in row["chunk"].values():
        assert all(0 < x["share"] <= 1.2 and 0 < x["p50_ms"] <= x["p95_ms"] for x in found.values())
        assert len(dtypes) == 1 or 0 <= found["bfloat16"]["error"] < 0.5
        assert len(dtypes) == 1 or found["float32"]["bytes"] == 2 * found["bfloat16"]["bytes"]
    assert 50 < row["peak_mb"]["chunk"] <= row["peak_mb"]["all"]
    best = row["ceilings"]
    assert best["float32"] > 1 and best["bfloat16"] > 0.1 and 0.5 < best["read"] < 5000


def test_the_share_of_a_small_network_on_a_fast_machine_is_not_rounded_to_nothing():
    found, best = {"flops": 1e5, "bytes": 1e3}, {"bfloat16": 1000.0, "read": 50.0}
    assert measure.share(2.0, found, best, "bfloat16") == (5e-05, "arithmetic")


class Chain(torch.nn.Module):
    """Its chunk of n steps multiplies n times by a matrix, after a table of which it looks up one row."""

    def __init__(self, wait=lambda: None):
        super().__init__()
        self.table, self.layer, self.wait = torch.nn.Embedding(100, 8), torch.nn.Linear(8, 8), wait

    @torch.no_grad()
    def sample(self, batch, steps=None, generator=None):
        x = self.table(batch["code"])
        for _ in range(steps):
            self.wait()
            x = self.layer(x)
        return x


def test_arithmetic_and_reads_of_a_chunk_are_those_on_paper():
    """Ten steps of (1, 8) x (8, 8): 2 * 64 operations and 64 + 8 weights each, and 8 numbers of the table."""
    flops, nbytes, _ = measure.chunk_costs(Chain(), {"code": torch.tensor([3])}, 10)
    assert flops == 10 * 2 * 64 and nbytes == 4 * (10 * (64 + 8) + 8)


def test_packed_layers_count_as_plain_ones():
    torch.manual_seed(0)
    config = dp_cnn.Config(down_dims=(128, 256), sampler="ddim")
    model, batch = dp_cnn.DiffusionPolicyCNN(config).eval(), {"state": torch.randn(1, 2, 16)}
    plain = measure.chunk_costs(model, batch, 10)[:2]
    pack(model.requires_grad_(False))
    model.sample(batch, 2)
    assert len(PACKED) > 5
    assert measure.chunk_costs(model, batch, 10)[:2] == plain
    training = {"state": torch.randn(4, 2, 16), "actions": torch.randn(4, 16, 3),
                "action_mask": torch.ones(4, 16, dtype=torch.bool)}
    loss = lambda: model.loss(training)["loss"].backward()
    flops = measure.count(loss, model.train().requires_grad_())[0]
    copy = dp_cnn.DiffusionPolicyCNN(config)
    assert flops == measure.count(lambda: copy.loss(training)["loss"].backward(), copy)[0]


class Clock:
    """Stands for `time` in measure: passes only when somebody waits."""
    now = 0.0

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_a_chunk_that_takes_too_long_is_computed_from_its_first_steps(monkeypatch):
    monkeypatch.setattr(measure, "time", clock := Clock())
    counted = lambda: len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()) > 0
    model, batch = Chain(lambda: clock.wait(0.07 if counted() else 0.02)), {"code": torch.tensor([3])}
    found = measure.time_chunk(model, batch, 1000, CPU, repeat=3, seconds=0.1)
    assert found["about_ms"] == 20_000 and "p50_ms" not in found
    for steps in 5, 20:                         # 20: too long only where operations are counted
        found = measure.time_chunk(model, batch, steps, CPU, repeat=3, seconds=0.1)
        assert found["p50_ms"] == pytest.approx(20 * steps) and found["runs"] < 3


def test_the_share_is_that_of_the_nearer_ceiling():
    best = {"float32": 100.0, "bfloat16": 400.0, "read": 50.0}      # GFLOP/s, GB/s
    assert measure.share(20, {"flops": 1e9, "bytes": 1e8}, best, "float32") == (0.5, "arithmetic")
    assert measure.share(20, {"flops": 1e9, "bytes": 5e8}, best, "bfloat16") == (0.5, "reading")
    assert measure.share(20, {"flops": 1e9}, best, "bfloat16") == (0.125, "arithmetic")


def test_repetitions_end_with_the_time(monkeypatch):
    monkeypatch.setattr(measure, "time", clock := Clock())
    calls = []
    assert len(measure.times_ms(lambda: calls.append(1), CPU, repeat=5)) == 5 and len(calls) == 7
    waits = iter([0.2, 0.02, 0.5])
    times = measure.times_ms(lambda: clock.wait(next(waits)), CPU, repeat=50, seconds=0.001)
    assert times == [pytest.approx(20)]


def test_a_step_is_timed_after_two_that_are_dearer(monkeypatch):
    monkeypatch.setattr(measure, "time", clock := Clock())
    monkeypatch.setattr(measure, "count", lambda *_: (7, 0))
    waits = itertools.chain([5.0, 5.0], itertools.repeat(2.0))
    monkeypatch.setattr(measure, "training_step", lambda *_: lambda: clock.wait(next(waits)))
    found = measure.time_training(torch.nn.Linear(1, 1), {}, CPU, torch.float32, False, repeat=9, seconds=0.1)
    assert found == (2000, 7)


def test_the_batch_is_chosen_by_the_arithmetic(monkeypatch):
    """The largest power of two, 64 at most, whose step stays below WORK."""
    options = bench.Options(model="dp_cnn", device="cpu", dtype="float32", batch_size=0,
                            set={"down_dims": [16, 32]})
    its = bench.Bench(options, 1, 0)
    batches = measure.Batches(its.config, CPU)
    model = its.build()
    its.training(model, batches)
    assert its.row["batch_size"] == 64
    one = its.row["training"]["float32"]["flops"] / 64
    monkeypatch.setitem(bench.WORK, "cpu", 5.5 * one)
    its.training(model, batches)
    assert its.row["batch_size"] == 4 and its.row["training"]["float32"]["flops"] == 4 * one
    batches.close()


def test_what_does_not_fit_is_named_with_what_it_takes(monkeypatch):
    """65.8 M parameters: 20 bytes each to train, twice 4 or 2 to sample."""
    def left_out(bytes_per_parameter):
        monkeypatch.setattr(measure, "free_gb", lambda device: bytes_per_parameter * 65_783_298 / 1e9)
        return bench.Bench(bench.Options(model="dp_cnn", preset="lowdim", device="cpu"), 1, 0).row["left_out"]

    assert list(left_out(23)) == [] and list(left_out(21)) == ["training"]      # a tenth is to spare
    assert "take 1.3 GB, cpu has 0.6 GB free" in left_out(9)["training"]
    assert list(left_out(8.5)) == ["chunk, float32", "training"]
    with pytest.raises(UserError, match="dp_cnn lowdim: chunk, float32: .* take 0.5 GB, .*; chunk, bf"):
        left_out(3)
        bench.Bench(bench.Options(model="dp_cnn", preset="lowdim", device="cpu"), 1, 0).measure()


def test_a_batch_of_tokens_is_what_rdt_takes_without_its_encoders():
    config = rdt.Config(**rdt.PRESETS["170M"] | {
        "width": 16, "depth": 2, "n_heads": 2, "vit_width": 8, "vit_heads": 1, "t5_width": 8, "horizon": 4,
        "n_action_steps": 4, "mask_prob": 0.5})
    batch = measure.Batches(config, CPU)(2)
    assert batch["image_embeds"].shape == (2, 2 * 3 * 729, 8) and batch["lang_embeds"].shape == (2, 32, 8)
    model = rdt.RDT(config)
    assert math.isfinite(model.loss(batch)["loss"].item())
    assert model.sample(batch, steps=1).shape == (2, 4, 14)


# ---------------------------------------------------------------- all rows

def all_of(*argv, out):
    bench.main(["--all", "--device", "cpu", "--out", str(out), *argv])


@pytest.fixture
def counted(monkeypatch):
    """In place of processes: a list of the rows that were asked for. The third is interrupted, once."""
    asked = []

    def measured(model, preset, flags):
        asked.append((model, preset))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"model": model, "preset": preset, "left_out": {"all": "not here"}}
    monkeypatch.setattr(bench_all, "measured", measured)
    return asked


def test_an_interrupted_run_goes_on(tmp_path, counted, capsys):
    with pytest.raises(KeyboardInterrupt):
        all_of("--model", "dp_cnn", out=tmp_path)
    all_of("--model", "dp_cnn", out=tmp_path)
    presets = list(dp_cnn.PRESETS)
    assert [preset for _, preset in counted] == [*presets[:3], *presets[2:]]
    printed = capsys.readouterr()
    assert "2 of 4 rows stand in" in printed.err
    assert [line for line in printed.out.splitlines() if line.startswith("- ")] == [
        f"- dp_cnn {preset}, all: not here" for preset in presets]
    all_of("--model", "dp_cnn", "--repeat", "7", out=tmp_path)      # other flags: other rows
    assert len(counted) == 9


def test_only_a_whole_run_is_written_into_the_page(tmp_path, counted, monkeypatch):
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nafter\n")
    monkeypatch.setattr(bench_all, "PAGE", page)
    counted += [None] * 3                               # no interruption
    all_of("--preset", "tiny", out=tmp_path)
    assert "old" in page.read_text()
    all_of(out=tmp_path)
    text = page.read_text()
    assert text.startswith("before\n<!-- cpu: begin -->\nMeasured") and "old" not in text
    assert text.endswith("<!-- cpu: end -->\nafter\n") and "- rdt 1B, all: not here" in text
    page.write_text("no place")
    bench_all.write_between(page, "cpu", "text")
    assert page.read_text() == "no place"


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    all_of("--model", "ddpm", "--preset", "tiny", "--batch_size", "4", "--repeat", "1", out=tmp_path)
    row, = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["training"]["float32"]["ms"] > 0 and not row["left_out"]
    text = capsys.readouterr().out
    ms = bench_all.number(row["training"]["float32"]["ms"])
    assert f"| ddpm | tiny | {row['parameters']:,} | 4 | {ms} |" in text
    assert f"a large read {row['ceilings']['read']:,.0f} (" in text


@pytest.mark.parametrize("outcome, named", [
    (subprocess.CompletedProcess([], 2, "", "note: x\nbench.py: dp_cnn: too large\n"), "dp_cnn: too large"),
    (subprocess.CompletedProcess([], -signal.SIGKILL, "", ""), "out of memory"),
    (subprocess.TimeoutExpired([], 900), "took longer than 900 s")])
def test_a_row_that_fails_says_why(outcome, named, monkeypatch):
    def run(*args, **kwargs):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    monkeypatch.setattr(subprocess, "run", run)
    assert named in bench_all.measured("dp_cnn", "tiny", [])["left_out"]["all"]


def test_rows_that_are_none_are_one_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\nnonsense")
    refused(capsys, lambda: all_of("--model", "ddpm", out=tmp_path), "rows.jsonl", "delete it")
    refused(capsys, lambda: all_of("--preset", "tiny_imag", out=tmp_path), "did you mean 'tiny_image'")


@pytest.mark.parametrize("x, text", [(None, ""), (1234.5, "1,234"), (12.34, "12.3"), (0.1234, "0.123")])
def test_numbers_of_a_table(x, text):
    assert bench_all.number(x) == text


# ---------------------------------------------------------------- the regression baseline, mistakes

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
    (["--batch_size", "-1"], ["--batch_size -1"]), (["--seconds", "-1"], ["--seconds -1"]),
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
