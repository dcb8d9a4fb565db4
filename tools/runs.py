"""A training run: what it carries from one function of train.py to the next, and its files in --out.

Read train.py first. metrics.jsonl grows by a line at a time; checkpoint.pt is replaced whole.
"""
import contextlib
import dataclasses
import json
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch

from robot.checkpoint import read_checkpoint, record, save_checkpoint
from robot.errors import UserError
from tools import distributed


@dataclass
class Run:
    """What a run carries from one function to the next."""
    options: object
    out: Path
    device: torch.device
    dtype: torch.dtype
    rank: int                   # number of this process ...
    world: int                  # ... of so many
    config: object              # the model's Config
    model: torch.nn.Module
    ema: torch.nn.Module        # its averaged weights
    shown: torch.nn.Module      # the average, whole, for saving and evaluating; with --fsdp on process 0 only
    loss_step: torch.nn.Module  # the model's loss as a forward pass
    optimizer: torch.optim.Optimizer
    items: object               # what is trained on: data.Windows or Samples
    held_out: object
    description: dict           # of the data, for the checkpoint
    normalizer: object          # None for a generative model
    example: dict               # the batch of one item that the checkpoint records and replays
    step: int = 0               # optimiser steps done
    seconds: float = 0.0        # of training so far
    rows: list = field(default_factory=list)  # of metrics.jsonl

    @property
    def main(self):
        return self.rank == 0


def prepare_out(options):
    """The output folder, writable; an earlier run in it is only touched with --resume."""
    out = Path(options.out or f"out/{options.model}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").write_bytes(b"")
        (out / ".probe").unlink(missing_ok=True)  # another process of this run may have been here first
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror or e}); choose another folder") from None
    if (out / "checkpoint.pt").exists() and not options.resume:
        raise UserError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
    for part in out.glob("checkpoint.pt.*.part"):  # what a killed run left half written
        part.unlink(missing_ok=True)
    return out


def log(run, row):
    if run.main:
        run.rows.append(row)
        with open(run.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")


def collect(run):
    """All processes bring the parts of the average together in `shown`."""
    if run.options.fsdp:
        whole = distributed.gather(run.ema.state_dict())
        if run.main:
            run.shown.load_state_dict(whole)


def save(run):
    collect(run)
    state = distributed.gather({"weights": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    if run.main:
        save_checkpoint(run.out / "checkpoint.pt", state | {
            "model": run.options.model, "preset": run.options.preset,
            "options": dataclasses.asdict(run.options), "config": dataclasses.asdict(run.config),
            "data": run.description, "normalizer": run.normalizer.state() if run.normalizer else None,
            "step": run.step, "train_seconds": run.seconds, "ema": run.shown.state_dict(),
            "replay": record(run.shown, run.example)})


def resume(run):
    """Take up the state of the checkpoint in --out, and the rows of metrics.jsonl up to its step."""
    path = run.out / "checkpoint.pt"
    checkpoint = read_checkpoint(path, run.device)
    if checkpoint["model"] != run.options.model:
        raise UserError(f"{path} is a checkpoint of {checkpoint['model']}, not of {run.options.model}; "
                        f"choose another --out")
    now, was = dataclasses.asdict(run.config), checkpoint["config"]
    changed = [f"{k} was {was[k]!r}, is {now.get(k)!r}" for k in was if now.get(k) != was[k]]
    if changed:
        raise UserError(f"--resume: the configuration of {path} differs: {'; '.join(changed)}")
    for name in ("data", "seed", "steps", "batch_size", "grad_accum", "lr", "warmup", "lr_schedule", "clip"):
        was, value = checkpoint["options"][name], getattr(run.options, name)
        if was != value:
            print(f"note: {name} was {was!r} and is now {value!r}: this is not the run that was interrupted")
    for part, weights in ((run.model, checkpoint["weights"]), (run.ema, checkpoint["ema"])):
        part.load_state_dict({key: distributed.split(weights[key], like)
                              for key, like in part.state_dict().items()})
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for i, state in checkpoint["optimizer"]["state"].items():
        state |= {key: distributed.split(x, parameters[i]) for key, x in state.items()
                  if x.shape == parameters[i].shape}
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.step, run.seconds = checkpoint["step"], checkpoint["train_seconds"]
    run.rows = read_metrics(run.out / "metrics.jsonl", up_to=run.step)


def read_metrics(path, up_to):
    """Rows of the run's earlier part, without those after the checkpoint."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed run left half written
            rows.append(json.loads(line))
    return [r for r in rows if r["step"] <= up_to]


def catch_signals():
    """-> list that receives the first SIGINT or SIGTERM; a second one interrupts at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return received


def release_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_status(received):
    """What a shell sees of a program that a signal ended; of another process's signal here: SIGTERM."""
    return 128 + (received or [signal.SIGTERM])[0]
