"""train.py: the loop against the official one, stopping and resuming, and what must not be lost."""
import dataclasses
import errno
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import golden
from helpers import ROOT, command, read_rows, refused, spoil, write_demos

import data
import dp_cnn
import sample
import train
from robot.checkpoint import FORMAT, load_model, read_checkpoint
from robot.errors import UserError
from robot.normalizer import Normalizer
from robot.policy import Policy
from tools import runs
from tools.runs import locked


def assert_same_run(out, reference):
    """Weights, average, optimiser and what was logged of two runs are equal, to the last bit."""
    a, b = read_checkpoint(out), read_checkpoint(reference)
    flat = lambda x: {(): x} if not isinstance(x, (dict, list)) else {
        (key, *rest): leaf for key, part in (x.items() if isinstance(x, dict) else enumerate(x))
        for rest, leaf in flat(part).items()}
    for part in ("step", "weights", "ema", "optimizer", "normalizer"):
        mine, other = flat(a[part]), flat(b[part])
        assert mine.keys() == other.keys()
        for key in mine:
            equal = torch.equal if torch.is_tensor(mine[key]) else lambda x, y: x == y
            assert equal(mine[key], other[key]), f"{part} {key}"
    kept = ("step", "loss", "lr", "grad_norm", "val_loss", "loss_t", "action_error")
    mine, other = ([{k: row[k] for k in kept if k in row} for row in read_rows(o)] for o in (out, reference))
    assert mine == other


class Crash(Exception):
    pass


def at_step(monkeypatch, wanted, act):
    """Let the loop do act() in the middle of optimiser step `wanted` (the first is 0); grad_accum 1."""
    real = train.seed_step

    def seed_step(seed, step, rank):
        real(seed, step, rank)
        if step == wanted:
            act()
    monkeypatch.setattr(train, "seed_step", seed_step)


def raiser(error):
    def act(*args, **kwargs):
        raise error
    return act


@golden("train.EMAModel")
def test_golden_ema(case):
    for variant, settings in case.config["variants"].items():
        decays = torch.tensor([train.ema_decay(k, **settings) for k in range(case.config["n"])])
        case.check(f"out/decay_{variant}", decays)
        if f"decay_long_{variant}" in case.out:
            steps = [0, 1, 2, 3, *(10 ** k for k in range(1, len(case.out[f"decay_long_{variant}"]) - 3))]
            decays = torch.tensor([train.ema_decay(k, **settings) for k in steps])
            case.check(f"out/decay_long_{variant}", decays)


@golden("train.lr_schedules")
def test_golden_lr_schedules(case):
    warmup, total = case.config["warmup"], case.config["total"]
    for official in ("cosine", "linear", "constant_with_warmup"):
        if official in case.out:
            ours = official.removesuffix("_with_warmup")
            factors = [train.lr_factor(k, warmup, total, ours) for k in range(len(case.out[official]))]
            case.check(f"out/{official}", torch.tensor(factors))
    if "pi0" in case.out:
        c = case.config["pi0"]
        rates = [c["peak_lr"] * train.lr_factor(k, c["num_warmup_steps"], c["num_decay_steps"], "pi0",
                                                final=c["decay_lr"] / c["peak_lr"])
                 for k in range(len(case.out["pi0"]))]
        case.check("out/pi0", torch.tensor(rates), atol=1e-6 * c["peak_lr"])


class GivenBatch:
    """A data set that consists of one batch."""

    def __init__(self, batch):
        self.rows = batch

    def __len__(self):
        return len(self.rows["actions"])

    def batch(self, indices):
        return {key: x[indices] for key, x in self.rows.items()}


@golden("train.steps")
def test_golden_steps(case, monkeypatch, tmp_path):
    """The loop of train.py itself, from official weights, on given batches, noise and t: losses, gradient
    norms, learning rates, and the weights and their average at the end are the official ones."""
    name = case.config["policy_family"].split(".")[0]
    module, helpers = importlib.import_module(name), importlib.import_module(f"test_{name}")
    config, n = helpers.policy_config(case), case.config["n"]
    given = zip(case.inp["obs"], case.inp["action"])
    batches = [helpers.official_batch(case, config, *pair) for pair in given]
    A = config.action_dim
    one, zero = ({key: torch.full((d,), float(v)) for key, d in (("actions", A), ("state", config.state_dim))}
                 for v in (1, 0))
    stats = {key: dict.fromkeys(("min", "max", "mean", "std"), x) for key, x in zero.items()}
    unscaled = Normalizer("minmax", one, zero, stats, {key: [] for key in zero})
    description = {"source": "given", "state_keys": {"state": config.state_dim}, "camera_keys": [],
                   "image_size": None, "fps": None, "action_dim": A, "state_dim": config.state_dim,
                   "action_names": [], "instructions": []}
    rows, none = GivenBatch(batches[0]), GivenBatch({"actions": ()})
    opened = dataclasses.asdict(config), lambda *_: [rows, none], description, unscaled
    monkeypatch.setattr(data, "open_data", lambda *_, **__: opened)
    monkeypatch.setattr(data, "batches", lambda *_: ((None, batch) for batch in batches))
    draws, loss = iter(zip(case.inp["noise"], case.inp["timesteps"])), module.Model.loss
    monkeypatch.setattr(module.Model, "loss", lambda self, batch: loss(
        self, batch, *(next(draws) if torch.is_grad_enabled() else ())))  # without gradient: the first look

    optim, ema = dict(case.config["optim"]), dict(case.config["ema"])
    assert optim.pop("eps", 1e-8) == 1e-8
    no_flags = {k: ema.pop(k) for k in ("inv_gamma", "min_value", "update_after_step") if k in ema}
    monkeypatch.setattr(train, "ema_decay", functools.partial(train.ema_decay, **no_flags))
    torch.save(case.sd, tmp_path / "official.pt")
    flags = {"model": name, "data": "given", "init": tmp_path / "official.pt", "out": tmp_path / "out",
             "steps": n, "warmup": case.config["warmup"], "lr_schedule": "cosine", "lr": optim.pop("lr"),
             "weight_decay": optim.pop("weight_decay"), "ema_power": ema.pop("power"),
             "ema_max": ema.pop("max_value"), "clip": 0, "log_every": 1, "eval_every": 0, "episodes": 0,
             "device": "cpu", "dtype": "float32"}
    betas = optim.pop("betas")
    assert not optim and not ema, f"settings that this test cannot make: {optim}, {ema}"
    argv = [word for k, v in flags.items() for word in (f"--{k}", v)]
    train.main([str(word) for word in [*argv, "--betas", *betas]])

    logged = [row for row in read_rows(tmp_path / "out") if "loss" in row]
    for official, ours in {"losses": "loss", "grad_norm": "grad_norm", "lr": "lr"}.items():
        case.check(f"out/{official}", torch.tensor([row[ours] for row in logged]))
    checkpoint = read_checkpoint(tmp_path / "out")
    start = module.Model.from_official(case.sd, config).state_dict()
    for official, ours in {"final": "weights", "ema": "ema"}.items():
        # Only some of the official weights are stored: these replace the first ones, and are looked at.
        stored = {k.partition("/")[2]: v for k, v in case.out.items() if k.startswith(f"{official}/")}
        end = module.Model.from_official(case.sd | stored, config).state_dict()
        compared = {key: end[key] != start[key] for key in end}
        assert sum(moved.any().item() for moved in compared.values()) >= len(stored) > 0
        for key, moved in compared.items():
            error = (end[key] - checkpoint[ours][key])[moved].abs()
            assert not len(error) or error.max() <= 1e-4, f"{case.name} {official} {key}"


def test_loss_falls_on_a_set_that_can_be_learned(demos, tmp_path):
    train.main(command(demos, tmp_path, steps=60, batch_size=32, lr=3e-3, eval_every=30))
    rows = read_rows(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    held_out = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in held_out] == [30, 60]
    assert held_out[1]["val_loss"] < held_out[0]["val_loss"]
    assert held_out[1]["action_error"] < held_out[0]["action_error"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["val_loss"] == held_out[1]["val_loss"] and result["model"] == "dp_cnn"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_gradient_accumulation_equals_the_larger_batch(demos, tmp_path, monkeypatch):
    """With full masks, and with noise that belongs to an item, not to its place in a batch."""
    real = dp_cnn.Model.loss

    def loss(self, batch):
        batch = batch | {"action_mask": torch.ones_like(batch["action_mask"])}
        number = batch["actions"].flatten(1).sum(1) + batch["state"].flatten(1).sum(1)
        noise = torch.sin(1e3 * batch["actions"] + 1e2 * number[:, None, None])
        return real(self, batch, noise=noise, t=(1e3 * number.abs()).long() % self.config.n_diffusion_steps)

    monkeypatch.setattr(dp_cnn.Model, "loss", loss)
    for name, batch_size, grad_accum in (("one", 16, 1), ("four", 4, 4)):
        train.main(command(demos, tmp_path / name, steps=4, batch_size=batch_size, grad_accum=grad_accum))
    one, four = ([row for row in read_rows(tmp_path / name) if "loss" in row] for name in ("one", "four"))
    for a, b in zip(one, four):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-2)


def test_lr_of_every_step_is_what_the_schedule_says(whole):
    logged = [row["lr"] for row in read_rows(whole[1]) if "lr" in row]
    assert logged[:3] == pytest.approx([0, 5e-4, 1e-3])             # two steps of warm-up
    assert logged[5] == pytest.approx(5e-4)                         # half way down: 3 of 6 steps
    assert logged == sorted(logged[:3]) + sorted(logged[3:], reverse=True)


# A process of two: trains, and keeps its weights and what it drew.
ONE_OF_TWO = """
import os, sys, torch, train
class LossStep(train.LossStep):
    def __init__(self, model):
        super().__init__(model)
        kept.update(weights=model.state_dict(), seen=[], seeds=[])
    def forward(self, batch):
        kept["seen"].append(batch["state"].clone())
        kept["seeds"].append(torch.initial_seed())
        return super().forward(batch)
kept, train.LossStep = {}, LossStep
with train.distributed.whole_exit():
    train.main(sys.argv[2:])
    torch.save(kept, os.path.join(sys.argv[1], "rank" + os.environ["RANK"] + ".pt"))
"""


def test_two_processes_end_with_the_same_weights(demos, tmp_path):
    (tmp_path / "one.py").write_text(ONE_OF_TWO)
    argv = [str(tmp_path / "one.py"), str(tmp_path), *command(demos, tmp_path / "out", steps=3, eval_every=0)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, *argv], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    refuses = re.search("gloo|rendezvous|socket|bind", done.stderr, re.I) and "train.py" not in done.stderr
    if done.returncode and refuses:
        pytest.skip(f"two processes cannot talk to each other here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    own = [kept["seen"][1:] for kept in (a, b)]                     # the first one is the example of both
    assert not any(torch.equal(x, y) for x, y in zip(*own)) and len(own[0]) == 3    # own batches, own noise
    assert len({*a["seeds"][1:], *b["seeds"][1:]}) == 6
    start = read_checkpoint(tmp_path / "out")
    assert start["step"] == 3 and all(torch.equal(a["weights"][k], start["weights"][k]) for k in a["weights"])


def test_sharding_is_refused_where_torch_cannot_do_it(demos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "Stream", object)                # as in torch 2.6, without record_event
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, lambda: train.main(command(demos, tmp_path / "out", "--fsdp")), "--fsdp", "torch>=2.13")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, sys, train
def evaluate(run, acting):
    if run.step == 4:
        os.kill(os.getpid(), 9)
    return real(run, acting)
real, train.evaluate = train.evaluate, evaluate
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU")
def test_sharded_training_is_that_of_ddp(demos, tmp_path, capsys):
    """Losses, gradient norms, weights, average and optimiser, over a kill whose last checkpoint is in shards,
    and a resumption; and its checkpoint is like any other, for sample.py and for a single process."""
    (tmp_path / "killed.py").write_text(KILLED)
    argv = {way: command(demos, tmp_path / way, clip=0.5, eval_every=2, steps=5, lr_schedule="constant")
            for way in ("ddp", "fsdp")}
    for way, script, more in (("ddp", ROOT / "train.py", []), ("fsdp", tmp_path / "killed.py", ["--fsdp"]),
                              ("fsdp", ROOT / "train.py", ["--fsdp", "--resume"])):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*torchrun, str(script), *argv[way], *more], capture_output=True, text=True,
                              timeout=200, cwd=tmp_path,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        refuses = re.search("gloo|rendezvous|socket|bind", done.stderr, re.I)
        if done.returncode and refuses and script.name not in done.stderr:
            pytest.skip(f"two processes cannot talk to each other here: {done.stderr[-300:]}")
        if script.name == "killed.py":
            assert done.returncode and (tmp_path / "fsdp" / "shards_3" / "head.pt").exists(), done.stderr
            assert read_checkpoint(tmp_path / "fsdp")["step"] == 0
        else:
            assert done.returncode == 0, done.stderr
    assert not [*(tmp_path / "fsdp").glob("shards_*")]
    ddp, fsdp = ({(row["step"], key): value for row in read_rows(tmp_path / way) for key, value in row.items()
                  if key in ("loss", "grad_norm", "val_loss", "action_error")} for way in ("ddp", "fsdp"))
    assert set(ddp) <= set(fsdp) and len(ddp) == 5 * 2 + 3 * 2
    assert all(fsdp[key] == pytest.approx(value, rel=1e-5) for key, value in ddp.items())
    a, b = (read_checkpoint(tmp_path / way) for way in ("ddp", "fsdp"))
    assert a["step"] == b["step"] == 5
    for part in ("weights", "ema"):
        assert all(torch.allclose(a[part][key], b[part][key], atol=1e-6) for key in a[part])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.allclose(x, b["optimizer"]["state"][i][key], atol=1e-6) for key, x in state.items())
    assert Policy.load(tmp_path / "fsdp").act(
        {"agent_pos": np.zeros(2), "goal": np.zeros(2), "number": np.zeros(1)}).shape == (2,)
    capsys.readouterr()
    low = subprocess.run([*torchrun, str(ROOT / "train.py"), *command(demos, tmp_path / "low", steps=2),
                          "--fsdp", "--dtype", "bfloat16"], capture_output=True, text=True, timeout=200,
                         cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert low.returncode == 0, low.stderr
    want = {row["step"]: row["loss"] for row in read_rows(tmp_path / "ddp") if "loss" in row}
    found = {row["step"]: row["loss"] for row in read_rows(tmp_path / "low") if "loss" in row}
    assert found == pytest.approx({step: want[step] for step in (1, 2)}, rel=0.05)
    train.main([*argv["fsdp"], "--steps", "6", "--resume"])         # alone
    assert read_checkpoint(tmp_path / "fsdp")["step"] == 6
    assert "note: 2 processes had 8 items each, now there are 1" in capsys.readouterr().out


def test_sharding_needs_several_processes(demos, tmp_path, capsys):
    refused(capsys, lambda: train.main(command(demos, tmp_path, "--fsdp")), "torchrun")


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_crashed_and_resumed_run_equals_the_uninterrupted_one(step, demos, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, step, raiser(Crash))
        train.main(command(demos, tmp_path))
    assert read_checkpoint(tmp_path)["step"] == step // 3 * 3
    train.main(command(demos, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole[1])


@pytest.fixture
def half_frozen(monkeypatch):
    """dp_cnn whose middle is not trained, and a file of their own for frozen weights of any size."""
    class Half(dp_cnn.Model):
        def __init__(self, config):
            super().__init__(config)
            self.unet.mid.requires_grad_(False)
    monkeypatch.setattr(dp_cnn, "Model", Half)
    monkeypatch.setattr(runs, "LARGE", 1)


def test_frozen_weights_are_neither_averaged_nor_saved_again(demos, half_frozen, tmp_path, monkeypatch):
    out, again = tmp_path / "whole", tmp_path / "again"
    train.main(command(demos, out, "--keep_every", "3"))
    frozen, = out.glob("frozen_*.pt")
    for name in ("checkpoint.pt", "checkpoint_3.pt", "checkpoint_6.pt"):
        raw = torch.load(out / name, weights_only=True)
        assert raw["frozen"] == frozen.name and any("unet.down" in key for key in raw["ema"])
        assert not [key for part in ("weights", "ema") for key in raw[part] if "unet.mid" in key]
    kept = torch.load(frozen, weights_only=True)
    checkpoint = read_checkpoint(out)
    assert kept and all(".mid." in key for key in kept)
    for key, x in checkpoint["weights"].items():
        assert torch.equal(x, checkpoint["ema"][key]) == (key in kept)          # the others have moved
    model, _ = load_model(out)                                                  # replays
    assert all(torch.equal(model.state_dict()[key], x) for key, x in kept.items())

    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 4, raiser(Crash))
        train.main(command(demos, again))
    train.main(command(demos, again, "--resume"))
    assert_same_run(again, out)
    assert [path.name for path in again.glob("frozen_*")] == [frozen.name], "by the numbers in it"
    frozen.unlink()
    with pytest.raises(UserError, match=f"needs {frozen.name}.*copy it into the same folder"):
        Policy.load(out)


def test_a_frozen_weight_is_held_once(half_frozen):
    model = dp_cnn.Model(dp_cnn.Config(down_dims=(16, 32)))
    ema = runs.averaged(model)
    own = dict(model.named_parameters())
    same = {name for name, p in ema.named_parameters() if p is own[name]}
    assert same == runs.frozen_names(model) == {name for name in own if ".mid." in name}
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.training


def test_resumed_with_gradient_accumulation(demos, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 2 * 5 + 1, raiser(Crash))                    # the second batch of step 5
        train.main(command(demos, tmp_path, grad_accum=2))
    train.main(command(demos, tmp_path, "--resume", grad_accum=2))
    assert_same_run(tmp_path, whole[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, demos, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 4, lambda: os.kill(os.getpid(), number))
        train.main(command(demos, tmp_path))
    assert stopped.value.code == 128 + number
    assert "stopped after step 5" in capsys.readouterr().out.splitlines()[-1]
    assert read_checkpoint(tmp_path)["step"] == 5
    train.main(command(demos, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole[1])


def test_a_half_written_line_of_metrics_is_tolerated(demos, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 4, raiser(Crash))
        train.main(command(demos, tmp_path))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0.1')
    train.main(command(demos, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole[1])


def test_interrupted_in_its_evaluation_it_evaluates_when_resumed(demos, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train, "write_json", raiser(Crash))
        train.main(command(demos, tmp_path))
    train.main(command(demos, tmp_path, "--resume"))
    mine, other = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path, whole[1]))
    assert mine | {"train_seconds": 0} == other | {"train_seconds": 0}


# A run that stops for good: in the middle of a step, or with half a checkpoint on the disk.
HANG = """
import os, sys, time, torch, train
def hang():
    print("hanging", flush=True)
    time.sleep(100)
seed, save = train.seed_step, torch.save
def seed_step(*numbers):
    if where == "step" and numbers[1] == 5:
        hang()
    seed(*numbers)
def half(content, path):
    save(content, path)
    if where == "save" and content["step"] == 6:
        os.truncate(path, os.path.getsize(path) // 2)
        hang()
where, train.seed_step, torch.save = sys.argv[1], seed_step, half
train.main(sys.argv[2:])
"""


@pytest.mark.parametrize("where", ["step", "save"])
def test_killed_and_resumed(where, demos, whole, tmp_path):
    run = subprocess.Popen([sys.executable, "-c", HANG, where, *command(demos, tmp_path)], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in run.stdout:
            if line == "hanging\n":
                break
    finally:
        run.kill()                                                  # SIGKILL: nothing can be tidied up
    assert run.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == (where == "save")
    assert read_checkpoint(tmp_path)["step"] == 3
    train.main(command(demos, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole[1])
    assert not list(tmp_path.glob("*.part"))                        # what was half written is not left behind


def test_exit_status_of_a_terminated_process(demos, tmp_path):
    argv = command(demos, tmp_path, steps=10**6, eval_every=0, checkpoint_every=10**6)
    run = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            if (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.1)
        run.terminate()
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert "--resume" in out.splitlines()[-1]
    assert read_checkpoint(tmp_path)["step"] == read_rows(tmp_path)[-1]["step"] > 0


def loss_that_breaks(where, number, kept):
    """dp_cnn's loss, but NaN (`where` "loss") or with a NaN gradient (`where` "gradient") in training step
    `number`; the episodes of that batch go to `kept`."""
    real, steps = dp_cnn.Model.loss, itertools.count(1)

    def loss(self, batch):
        result = real(self, batch)
        if torch.is_grad_enabled() and next(steps) == number:
            kept.extend(batch["state"][:, -1, 4].tolist())          # the episode's number, normalised
            broken = result["loss"] * math.nan
            finite = result["loss"].detach() + (broken - broken).nan_to_num()
            result["loss"] = broken if where == "loss" else finite
        return result
    return loss


def test_a_loss_that_is_not_finite_names_step_and_episodes(demos, tmp_path, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(dp_cnn.Model, "loss", loss_that_breaks("loss", 5, kept))
    line = refused(capsys, lambda: train.main(command(demos, tmp_path, log_every=2)), "step 5 is nan")
    normalizer = Normalizer.from_state(read_checkpoint(tmp_path)["normalizer"])
    low, scale = normalizer.stats["state"]["min"][4], normalizer.scale["state"][4]
    numbers = sorted({round(((y + 1) / scale + low).item()) for y in kept})
    assert re.findall(r"tiny.hdf5:demo_(\d+)", line) == [str(n) for n in numbers]
    model, checkpoint = load_model(tmp_path)                 # the last good checkpoint is whole
    assert checkpoint["step"] == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_are_never_saved(demos, tmp_path, monkeypatch, capsys):
    """The loss of a step can be finite and its gradient not: the weights are then lost as it is saved."""
    monkeypatch.setattr(dp_cnn.Model, "loss", loss_that_breaks("gradient", 6, []))
    refused(capsys, lambda: train.main(command(demos, tmp_path)), "step 6")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["step"] == 3
    assert all(w.isfinite().all() for w in checkpoint["weights"].values())


def test_cuda_without_one(demos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = command(demos, tmp_path, device="cuda")
    refused(capsys, lambda: train.main(argv), "--device cuda", "--device cpu")


def cut_actions(i, actions, obs):
    return (actions[:1], {k: x[:1] for k, x in obs.items()}) if i == 2 else (actions, obs)


def nan_in_actions(i, actions, obs):
    actions[3, 0] = np.nan if i == 2 else actions[3, 0]
    return actions, obs


def no_goal(i, actions, obs):
    return actions, {k: x for k, x in obs.items() if k != "goal" or i != 2}


@pytest.mark.parametrize("change, named", [
    (cut_actions, ["demo_2", "1 step"]), (nan_in_actions, ["demo_2", "step 3"]),
    (no_goal, ["demo_2", "no 'goal'"])])
def test_wrong_episodes(change, named, tmp_path, capsys):
    path = write_demos(tmp_path / "spoilt.hdf5", change=change)
    refused(capsys, lambda: train.main(command(path, tmp_path / "out")), *named)


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "folder"])
def test_files_that_hold_no_demonstrations(kind, demos, tmp_path, capsys):
    path = tmp_path / ("nothing" if kind == "folder" else "wrong.hdf5")
    if kind == "folder":
        path.mkdir()
    else:
        half = demos.read_bytes()[:demos.stat().st_size // 2]
        path.write_bytes({"truncated": half, "text": b"no HDF5\n" * 100, "empty": b""}[kind])
    refused(capsys, lambda: train.main(command(path, tmp_path / "out")), path.name)


def test_two_files_with_different_shapes(tmp_path, capsys):
    (tmp_path / "both").mkdir()
    write_demos(tmp_path / "both" / "a.hdf5", action_dim=2)
    write_demos(tmp_path / "both" / "b.hdf5", action_dim=4)
    argv = command(tmp_path / "both", tmp_path / "out")
    refused(capsys, lambda: train.main(argv), "b.hdf5:demo_0", "(4,)", "(2,)")


@pytest.fixture
def finished(demos, whole, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(whole[1], tmp_path / "finished")


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_an_existing_run_is_not_overwritten(demos, finished, capsys):
    before = contents(finished)
    refused(capsys, lambda: train.main(command(demos, finished)), finished, "--resume")
    assert contents(finished) == before


def test_resumed_with_another_configuration(demos, finished, capsys):
    before = contents(finished)
    refused(capsys, lambda: train.main(command(demos, finished, "--resume", "--set", "n_obs_steps=3")),
            "n_obs_steps was 2, is 3")
    assert contents(finished) == before


def test_a_checkpoint_of_another_model(demos, finished, capsys):
    spoil(finished, model="dp_transformer")
    before = contents(finished)
    refused(capsys, lambda: train.main(command(demos, finished, "--resume")), "dp_transformer", "dp_cnn")
    assert contents(finished) == before


def test_a_checkpoint_of_a_newer_format(demos, finished, capsys):
    spoil(finished, format=FORMAT + 1)
    before = contents(finished)
    refused(capsys, lambda: train.main(command(demos, finished, "--resume")),
            f"format {FORMAT + 1}", "update the code")
    assert contents(finished) == before


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "inside a checkpoint", "cut short", "text"])
def test_what_is_no_checkpoint_is_refused_and_never_unpickled(kind, demos, finished, tmp_path, capsys):
    path, trace = finished / "checkpoint.pt", tmp_path / "was_run"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "x": Evil(trace)}, protocol=2))
    elif kind == "torch.save":
        torch.save(Evil(trace), path)
    elif kind == "inside a checkpoint":
        spoil(finished, extra=Evil(trace))
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.write_text("weights")
    before = contents(finished)
    line = refused(capsys, lambda: train.main(command(demos, finished, "--resume")), "not a checkpoint")
    assert refused(capsys, lambda: sample.main([str(finished)])) == line
    assert refused(capsys, lambda: train.main(command(demos, tmp_path / "new", init=path)), "--init")
    assert contents(finished) == before and not trace.exists()


def test_an_out_folder_that_cannot_be_written(demos, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")                    # permissions would not stop root
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(capsys, lambda: train.main(command(demos, out)), f"--out {out}")
    assert (tmp_path / "file").read_text() == "in the way"


def limit_file_size(size):
    """From now on the kernel refuses to let any file grow beyond `size` bytes, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def until_full(main):
    """main(), but whatever happens, the limit ends with it: pytest has files to write as well."""
    def run():
        try:
            main()
        finally:
            limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    return run


def test_a_full_disk_loses_no_checkpoint(demos, whole, tmp_path, monkeypatch, capsys):
    """torch's own writer meets the end of the disk half way through the checkpoint of step 6."""
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: limit_file_size(50_000))
        refused(capsys, until_full(lambda: train.main(command(demos, tmp_path))),
                "cannot write", "checkpoint.pt", "make room", "torch.save")
    assert read_checkpoint(tmp_path)["step"] == 3 and not list(tmp_path.glob("*.part"))
    train.main(command(demos, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole[1])


def test_a_disk_full_at_the_last_moment(demos, tmp_path, monkeypatch, capsys):
    """The file system notices only when the file is flushed."""
    at_step(monkeypatch, 5, lambda: monkeypatch.setattr(
        os, "fsync", raiser(OSError(errno.ENOSPC, "No space left on device"))))
    refused(capsys, lambda: train.main(command(demos, tmp_path)), "No space left on device", "checkpoint.pt")
    assert read_checkpoint(tmp_path)["step"] == 3 and not list(tmp_path.glob("*.part"))


def test_a_disk_too_full_for_a_line_of_metrics(demos, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, lambda: limit_file_size(0))
    refused(capsys, until_full(lambda: train.main(command(demos, tmp_path))), "--out", "make room")
    assert read_checkpoint(tmp_path)["step"] == 3


# -- going on with other data, starting from a run of one's own ----------------------------------------------


@pytest.mark.parametrize("write, named", [
    (dict(episodes=8), "other episodes (6 then, 8 now)"), (dict(seed=1), "other numbers"),
    (dict(length=15), "other episodes")], ids=str)
def test_other_data_are_refused_when_resumed(write, named, demos, tmp_path, capsys):
    own = shutil.copy(demos, tmp_path / "own.hdf5")
    train.main(command(own, tmp_path / "out", steps=2, eval_every=0))
    before = contents(tmp_path / "out")
    write_demos(own, **write)
    refused(capsys, lambda: train.main(command(own, tmp_path / "out", "--resume", steps=2)), named, "--init")
    assert contents(tmp_path / "out") == before


def test_another_split_is_refused_and_another_normaliser_is_not_taken(demos, tmp_path, capsys):
    train.main(command(demos, tmp_path, steps=2, eval_every=0))
    was = read_checkpoint(tmp_path)["normalizer"]
    refused(capsys, lambda: train.main(command(demos, tmp_path, "--resume", steps=4, val_ratio=0.4)), "split")
    train.main(command(demos, tmp_path, "--resume", steps=4, normalizer="meanstd"))
    assert "normalizer was 'minmax' and is now 'meanstd'" in capsys.readouterr().out
    now = read_checkpoint(tmp_path)
    assert now["step"] == 4 and now["normalizer"]["mode"] == "minmax"
    assert all(torch.equal(was["scale"][key], now["normalizer"]["scale"][key]) for key in was["scale"])


def test_fewer_steps_than_are_done_are_refused(demos, finished, capsys):
    refused(capsys, lambda: train.main(command(demos, finished, "--resume", steps=3)), "8 steps behind it")


def test_a_finished_run_that_is_resumed_doubles_no_row(demos, finished, whole):
    train.main(command(demos, finished, "--resume"))
    assert [(row["step"], sorted(row)) for row in read_rows(finished)] == [
        (row["step"], sorted(row)) for row in read_rows(whole[1])]
    assert_same_run(finished, whole[1])


def test_killed_between_a_checkpoint_and_its_evaluation(demos, whole, tmp_path, monkeypatch):
    """The row of the evaluation is made when the run goes on, in its place."""
    argv = command(demos, tmp_path / "a", checkpoint_every=4)
    train.main(command(demos, tmp_path / "b", checkpoint_every=4))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train, "evaluate", raiser(Crash))
        train.main(argv)
    assert read_checkpoint(tmp_path / "a")["step"] == 4
    train.main([*argv, "--resume"])
    assert [(row["step"], "val_loss" in row) for row in read_rows(tmp_path / "a")] == [
        (row["step"], "val_loss" in row) for row in read_rows(tmp_path / "b")]
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_evaluations_come_when_they_are_due_whatever_is_logged(demos, tmp_path):
    train.main(command(demos, tmp_path, log_every=50, checkpoint_every=50, eval_every=3, steps=8))
    assert [row["step"] for row in read_rows(tmp_path) if "val_loss" in row] == [3, 6, 8]


def test_a_run_of_ones_own_to_start_from(demos, whole, tmp_path, capsys):
    """Its averaged weights, in its units: what it knows is worth as much on other data of the robot."""
    other = write_demos(tmp_path / "other.hdf5", seed=7)
    train.main(command(other, tmp_path / "out", steps=0, init=whole[1]))
    first, now = read_checkpoint(whole[1]), read_checkpoint(tmp_path / "out")
    assert now["step"] == 0
    assert all(torch.equal(x, now["weights"][key]) for key, x in first["ema"].items())
    was, units = first["normalizer"], now["normalizer"]
    for part in ("scale", "centre"):
        assert all(torch.equal(was[part][key], units[part][key]) for key in was[part])
    train.main(command(other, tmp_path / "head", steps=0, init=whole[1], fresh="unet.final_out"))
    assert "2 weights start fresh: unet.final_out" in capsys.readouterr().out
    head = read_checkpoint(tmp_path / "head")["weights"]
    same = {key for key, x in first["ema"].items() if torch.equal(x, head[key])}
    assert set(head) - same == {"unet.final_out.weight", "unet.final_out.bias"}


def test_what_does_not_fit_the_run_to_start_from(demos, whole, tmp_path, capsys):
    for more, chosen, named in (([], {"fresh": "unet.finl_out"}, "did you mean 'unet.final_out'"),
                                (["--set", "n_groups=2", "--set", "down_dims=[16, 16]"], {}, "--fresh"),
                                ([], {"data": write_demos(tmp_path / "a.hdf5", action_dim=3)}, "normaliser")):
        argv = {"init": whole[1]} | chosen
        refused(capsys, lambda: train.main(command(argv.pop("data", demos), tmp_path / "out", *more, steps=0,
                                                   **argv)), named)
    refused(capsys, lambda: train.main(command(demos, tmp_path / "out", fresh="unet")), "add --init")


def test_best_and_every_third_checkpoint_are_kept(demos, tmp_path):
    train.main(command(demos, tmp_path, "--keep_best", keep_every=3, eval_every=1, steps=7))
    assert [read_checkpoint(tmp_path / f"checkpoint_{step}.pt")["step"] for step in (3, 6)] == [3, 6]
    losses = {row["step"]: row["val_loss"] for row in read_rows(tmp_path) if "val_loss" in row}
    losses.pop(7)                                                   # the last evaluation comes after the loop
    assert read_checkpoint(tmp_path / "checkpoint_best.pt")["step"] == min(losses, key=losses.get)


def test_weights_that_the_last_update_broke_are_not_saved(demos, tmp_path, monkeypatch, capsys):
    @torch.no_grad()
    def broken():
        torch._foreach_mul_(list(train_run["run"].model.parameters()), math.nan)
    train_run, real = {}, train.loop
    monkeypatch.setattr(train, "loop", lambda run, stream: (train_run.update(run=run), real(run, stream)))
    monkeypatch.setattr(train, "ema_decay", lambda step, *_: (broken() if step == 4 else None, 0.5)[1])
    argv = command(demos, tmp_path, steps=5, eval_every=0)
    refused(capsys, lambda: train.main(argv), "not finite after step 5")
    assert read_checkpoint(tmp_path)["step"] == 3


def test_two_processes_do_not_train_into_one_folder(demos, tmp_path, capsys):
    """The second is refused before it touches what the first is writing."""
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, 0):
        part = out / "checkpoint.pt.1.part"
        part.write_bytes(b"half")
        refused(capsys, lambda: train.main(command(demos, out)), "another process is training")
        assert part.exists()
    train.main(command(demos, out, steps=1, eval_every=0))
    assert not list(out.glob("*.part"))


GROUP = """
import os, signal, sys, train
seed = train.seed_step
def seed_step(s, step, rank):
    seed(s, step, rank)
    if step == 3:
        {act}
train.seed_step = seed_step
if __name__ == "__main__":
    train.run_command(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("act, status, said", [
    ("os.killpg(0, signal.SIGTERM)", 128 + signal.SIGTERM, "stopped after step 4"),
    ("os.killpg(0, signal.SIGINT)", 128 + signal.SIGINT, "stopped after step 4"),
    ("import multiprocessing as m; m.active_children()[0].kill(); import time; time.sleep(2)", 2,
     "a worker process died"),
    ("import multiprocessing as m; m.active_children()[0].kill()", 2, "a worker process died")],
    ids=["SIGTERM", "SIGINT", "worker", "worker, noticed by the loader"])
def test_signals_to_the_group_and_dead_workers(act, status, said, demos, tmp_path):
    """Ctrl-C, a container that is stopped: workers get the signal too, and must not die of it."""
    (tmp_path / "group.py").write_text(GROUP.format(act=act))
    from_files = write_demos(tmp_path / "a.hdf5", change=lambda i, actions, obs: (actions, obs | {
        "camera": np.full((len(actions), 8, 8, 3), i, np.uint8)}))
    argv = command(from_files, tmp_path / "out", "--set", "obs=image", "--set", "resnet_widths=[16, 16, 16]",
                   "--memory_gb", "0", workers=2, eval_every=0)
    done = subprocess.run([sys.executable, str(tmp_path / "group.py"), *argv], cwd=tmp_path, text=True,
                          start_new_session=True, capture_output=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert said in (done.stdout if status != 2 else done.stderr)
    assert read_checkpoint(tmp_path / "out")["step"] == (3 if status == 2 else 4)


def test_an_error_without_words_does_not_end_in_a_result(demos, tmp_path, monkeypatch, capsys):
    """What a loader raises when its worker goes may be an EOFError that says nothing."""
    def loop(run, stream):
        raise EOFError
    monkeypatch.setattr(train, "loop", loop)
    argv = command(demos, tmp_path, workers=1)
    refused(capsys, lambda: train.main(argv), "a worker process died (EOFError)")
    assert not (tmp_path / "result.json").exists()


def test_the_norm_of_the_gradient_is_clipped(demos, tmp_path, monkeypatch):
    """What the optimiser sees is as short as --clip says; what is logged is the norm before."""
    seen, real = [], torch.optim.AdamW.step

    def step(self):
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.stack(norms).norm().item())
        return real(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train.main(command(demos, tmp_path, steps=3, clip=0.01, eval_every=0))
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(row["grad_norm"] > 0.02 for row in read_rows(tmp_path) if "grad_norm" in row)


@pytest.mark.parametrize("env, named", [("{id: no_such_package/Env-v0}", "no_such_package"),
                                        ("{di: x}", "'di'"), ("{id: 3}", "names no environment")])
def test_an_environment_that_is_wrong_costs_no_training(env, named, demos, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"env: {env}\n")
    argv = command(demos, tmp_path / "out", config=tmp_path / "a.yaml", episodes=2)
    refused(capsys, lambda: train.main(argv), named)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_stopped_between_two_rows(demos, tmp_path, monkeypatch):
    """The row that comes next is the mean over all of its steps, those before the stop among them."""
    argv = {name: command(demos, tmp_path / name, log_every=4, checkpoint_every=50, eval_every=0,
                          grad_accum=2)
            for name in ("whole", "stopped")}
    train.main(argv["whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2 * 5 + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train.main(argv["stopped"])
    assert read_checkpoint(tmp_path / "stopped")["step"] == 6
    train.main([*argv["stopped"], "--resume"])
    assert [row["step"] for row in read_rows(tmp_path / "stopped")] == [4, 8, 8]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_batch_larger_than_the_set_is_lowered_for_the_whole_run(demos, tmp_path, capsys):
    train.main(command(demos, tmp_path / "run", steps=2, batch_size=9999, eval_every=0))
    said = capsys.readouterr()
    n = int(re.search(r"batch_size 9999 is more than the (\d+) items", said.err)[1])
    assert f"{n:,} training and" in said.out and f"{n} from here on" in said.err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["options"]["batch_size"] == n
    train.main(command(demos, tmp_path / "run", "--resume", steps=4, batch_size=9999, eval_every=0))
    assert "batch_size was" not in capsys.readouterr().out
