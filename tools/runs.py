"""A training run: what it carries from one function of train.py to the next, and its files in --out.

Read train.py first. metrics.jsonl grows by a line at a time; checkpoint.pt is replaced whole.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from robot.checkpoint import record, save_checkpoint, save_frozen
from robot.errors import UserError, input_text, user_path, written_aside
from tools import distributed, shards

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None


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
    frozen_file: str = ""       # which file in --out holds the frozen weights
    step: int = 0               # optimiser steps done
    seconds: float = 0.0        # of training so far
    rows: list = field(default_factory=list)  # of metrics.jsonl
    unlogged: dict = field(default_factory=lambda: {"step": 0})  # step of the last row, losses since then

    @property
    def main(self):
        return self.rank == 0

    @functools.cached_property
    def frozen(self):
        return frozen_names(self.model)


@dataclass
class Since:
    """What the loop gathers from one logged step to the next; losses stay on the device until then."""
    step: int
    losses: list = field(default_factory=list)
    data_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def fetch(self, stream, device):
        asked = time.perf_counter()
        _, batch = next(stream)
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        self.data_s += time.perf_counter() - asked
        return batch


LARGE = 2**16  # numbers of a weight that are worth a file of their own


def frozen_names(model):
    """The large weights that training leaves as they are: neither averaged nor written into each
    checkpoint."""
    return frozenset(name for name, p in model.named_parameters()
                     if not p.requires_grad and p.numel() >= LARGE)


def averaged(model, fsdp=False):
    """A copy for the average, whose frozen weights are those of the model itself (FSDP needs its own)."""
    frozen = () if fsdp else frozen_names(model)
    shared = {id(p): p for name, p in model.named_parameters() if name in frozen}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def prepare_out(options):
    """The output folder, writable; an earlier run in it is only touched with --resume."""
    out = user_path(options.out or f"out/{options.model}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").write_bytes(b"")
        (out / ".probe").unlink(missing_ok=True)  # another process of this run may have been here first
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror or e}); choose another folder") from None
    if (out / "checkpoint.pt").exists() and not options.resume:
        raise UserError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
    return out


@contextlib.contextmanager
def locked(out, rank):
    """Two runs in one folder would overwrite each other. The lock is on the folder itself: it leaves no file,
    and goes with the process, however that ends."""
    if rank or not fcntl:
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training into {out}: wait for it, or choose another --out"
                            ) from None
        for part in out.glob("*.part"):  # what a killed run left half written
            part.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def log(run, row):
    if run.main:
        run.rows.append(row)
        with open(run.out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


def read_rows(path):
    """The rows of a file that grows by a line of JSON at a time, but one that a killed process left half
    written."""
    rows = []
    for line in input_text(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_rows(path, rows):
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def collect(run):
    """All processes bring the parts of the average together in `shown`."""
    if run.options.fsdp:
        whole = distributed.gather(run.ema.state_dict())
        if run.main:
            run.shown.to("cpu").load_state_dict(whole)
            run.shown.to(run.device)


def save(run, stopping=False):
    """Replace checkpoint.pt as a whole; never by weights that are not finite. With --fsdp it is made of the
    shards where it is the last one, or one to keep; in between they are enough."""
    if not all(x.isfinite().all() for x in distributed.own(run.model)):
        raise UserError(f"weights are not finite after step {run.step}; the last checkpoint in {run.out} is "
                        f"intact: lower --lr or set --clip")
    options = run.options
    keeping = bool(options.keep_every and run.step) and run.step % options.keep_every == 0
    state = {"weights": run.model.state_dict(), "ema": run.ema.state_dict()}
    if run.frozen:
        if not run.frozen_file:     # once for all checkpoints
            whole = distributed.gather({name: state["weights"][name] for name in sorted(run.frozen)})
            run.frozen_file = save_frozen(run.out, whole) if run.main else "written by process 0"
        state = {part: {name: x for name, x in weights.items() if name not in run.frozen}
                 for part, weights in state.items()} | {"frozen": run.frozen_file}
    state |= {"model": options.model, "preset": options.preset, "options": dataclasses.asdict(options),
              "config": dataclasses.asdict(run.config), "data": run.description,
              "normalizer": run.normalizer.state() if run.normalizer else None, "processes": run.world,
              "step": run.step, "unlogged": run.unlogged, "train_seconds": run.seconds,
              "optimizer": run.optimizer.state_dict()}
    if options.fsdp:
        shards.write(run.out, state | {"example": run.example}, run.rank, run.world)
        if stopping or keeping or options.keep_best or run.step in (0, options.steps):
            if run.main:
                shards.merge(run.out, run.shown.to("cpu"))
            distributed.wait()
    elif run.main:
        save_checkpoint(run.out / "checkpoint.pt", state | {"replay": record(run.shown, run.example)})
    if run.main and keeping:
        copy_aside(run.out / "checkpoint.pt", run.out / f"checkpoint_{run.step}.pt")


def keep_best(run):
    """--keep_best: the checkpoint of this step stays if no evaluation so far had a lower held-out loss."""
    losses = [row["val_loss"] for row in run.rows if row.get("val_loss") is not None]
    if run.options.keep_best and losses and losses[-1] <= min(losses):
        copy_aside(run.out / "checkpoint.pt", run.out / "checkpoint_best.pt")


def copy_aside(source, target):
    with written_aside(target) as aside:
        shutil.copyfile(source, aside)


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


def worker_is_mourned():
    """A dead worker has been noticed: torch need not raise it again while the others are ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def stop_status(received):
    """What a shell sees of a program that a signal ended; of another process's signal here: SIGTERM."""
    return 128 + (received or [signal.SIGTERM])[0]
