"""Checkpoints of a run whose weights are divided among processes (--fsdp): each process writes what it has,
and one of them makes checkpoint.pt of it.

    out/shards_2000/0.pt, 1.pt, ...     rows of weights, their average and the optimiser's state, by process
    out/shards_2000/head.pt             all the rest, and the checksums of the other files. Written last

A folder without head.pt is one that a process was killed over. It is never read, and the one before it goes
only when head.pt is there. A run that ends or is stopped leaves checkpoint.pt; one that was killed is
collected by --resume, whatever the number of processes, or by

    python -m tools.shards out/run      -> out/run/checkpoint.pt, in one process without a GPU
"""
import hashlib
import shutil
import zipfile

import torch

from robot.checkpoint import (not_of_this_project, read_frozen, read_tensors, record, save_checkpoint,
                              save_tensors, sound)
from robot.cli import Parser
from robot.errors import UserError, one_line, run_command, user_path
from robot.models import load_module, model_config
from tools import distributed


# What head.pt holds at least; read_checkpoint looks at the rest.
HEAD = {"shards": [str], "step": int, "model": str, "config": dict, "example": dict, "weights": dict,
        "ema": dict, "optimizer": dict}


def divided(x):
    """Whether processes have a part each of this tensor, or of one within."""
    return any(map(divided, x.values())) if isinstance(x, dict) else hasattr(x, "to_local")


def own_rows(x):
    """Of a dict, the rows that this process has of divided tensors, on the CPU."""
    if isinstance(x, dict):
        return {key: own_rows(value) for key, value in x.items() if divided(value)}
    return x.to_local().detach().cpu().clone()      # a clone: torch.save would write all that a view is of


def the_rest(x):
    """Of a dict, what is the same in all processes."""
    if isinstance(x, dict):
        return {key: the_rest(value) for key, value in x.items() if isinstance(value, dict) or
                not divided(value)}
    return x


def joined(rest, parts):
    """The dict that `the_rest` and everybody's `own_rows` were made of."""
    whole = dict(rest)
    for key, first in parts[0].items():
        of_key = [part[key] for part in parts]
        whole[key] = joined(rest[key], of_key) if isinstance(first, dict) else torch.cat(of_key)
    return whole


def checksums(path):
    """A short text that changes with the content of a file of save_tensors, without reading all of it."""
    with zipfile.ZipFile(path) as parts:
        listed = [(part.filename.partition("/")[2], part.CRC, part.file_size) for part in parts.infolist()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def write(out, state, rank, world):
    """All processes together: `state`, a dict with "step", as shards in `out`."""
    folder = out / f"shards_{state['step']}"
    (folder / "head.pt").unlink(missing_ok=True)
    save_tensors(folder / f"{rank}.pt", own_rows(state))
    distributed.wait()
    if rank == 0:
        shards = [checksums(folder / f"{other}.pt") for other in range(world)]
        save_tensors(folder / "head.pt", the_rest(state) | {"shards": shards})
        remove(out, but=folder)


def remove(out, but=None):
    for folder in out.glob("shards_*"):
        if folder != but:
            shutil.rmtree(folder)


def newest(out):
    """The last folder of shards that was completed, or None."""
    step = lambda folder: int(folder.name.rpartition("_")[2])
    whole = [head.parent for head in out.glob("shards_*/head.pt") if head.parent.name[7:].isdigit()]
    return max(whole, key=step, default=None)


def read(folder):
    """What `write` was given, its tensors whole. Files are mapped: memory holds no more than the result."""
    head = read_tensors(folder / "head.pt", "cpu")
    if not sound(head, HEAD):
        raise not_of_this_project(folder / "head.pt")
    parts, found = [], sorted(folder.glob("[0-9]*.pt"))
    for rank, checked in enumerate(head.pop("shards")):
        path = folder / f"{rank}.pt"
        if not path.exists():
            raise UserError(f"{folder} has {len(found)} shards, {path.name} is missing: all processes must "
                            f"write --out to one file system. Copy it there, or remove {folder}")
        parts.append(read_tensors(path, "cpu", mapped=True))
        if checksums(path) != checked:
            raise UserError(f"{path} is of another run or step than head.pt beside it: copy the right one, "
                            f"or remove {folder}")
    try:
        return joined(head, parts)
    except (KeyError, TypeError, RuntimeError):     # edited
        raise not_of_this_project(folder / "head.pt") from None


def merge(out, model=None):
    """One process: make checkpoint.pt of the newest shards in `out`, if there are any, and remove them.
    model: one of the run's kind, whose weights are overwritten; built if it is not given."""
    folder = newest(out)
    if folder is None:
        return
    content = read(folder)
    example, average = content.pop("example"), content["ema"]
    if content.get("frozen"):
        average = read_frozen(out / "checkpoint.pt", content["frozen"]) | average
    try:
        if model is None:
            module = load_module(content["model"])
            model = module.Model(model_config(module, content["config"], folder)).eval()
        model.load_state_dict(average)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder} does not fit {content['model']}.py, which has changed since: "
                        f"{one_line(e)[:180]}") from None
    save_checkpoint(out / "checkpoint.pt", content | {"replay": record(model, example)})
    remove(out)


def main(argv=None):
    parser = Parser(prog="python -m tools.shards", description="One checkpoint.pt of a run's newest shards.")
    parser.add_argument("run", help="folder of a run with --fsdp")
    out = user_path(parser.parse(argv).run)
    folder = newest(out)
    if folder is None:
        raise UserError(f"{out} has no shards that are complete: give the --out folder of a run with --fsdp")
    merge(out)
    print(f"wrote {out / 'checkpoint.pt'} of {folder.name}")


if __name__ == "__main__":
    run_command(main)
