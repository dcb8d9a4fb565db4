"""How a run starts: with a new model, with weights (--init), or where it stopped (--resume)."""
import contextlib
import dataclasses
import os

import torch

from robot.checkpoint import load_official, read_checkpoint
from robot.errors import UserError, nearest, one_line, user_path
from tools import distributed
from tools.runs import n_parameters, read_rows


@contextlib.contextmanager
def one_model(name):
    """A Config that the data do not fit, or that no network can be made of, is one line here and no traceback
    an hour later."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError, IndexError) as e:
        kind = "" if isinstance(e, ValueError) else "this configuration gives no model: "
        raise UserError(f"{name}: {kind}{one_line(e, 300)}") from None


def build(options, module, config, example, device, earlier):
    """The model on its device, after a first loss."""
    with one_model(options.model):
        with torch.device("meta"):
            check_size(module.Model(config), device)
        official = options.init and not earlier
        model = load_official(module, config, options.init) if official else module.Model(config)
        if options.init and earlier:
            start_from(model, earlier, options)
        model = model.to(device)
        with torch.no_grad():
            model.loss({k: v.to(device) for k, v in example.items()})
    return model


def check_size(model, device):
    """Refuse weights that cannot fit beside their average, before they are allocated."""
    need, has = 8 * n_parameters(model), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    if need > has:
        raise ValueError(f"{n_parameters(model):,} parameters and their average take {need / 1e9:.0f} GB, "
                         f"{device.type} has {has / 1e9:.0f} GB: take a smaller preset")


def earlier_run(options, out):
    """The checkpoint to go on with or to start from; None for a new run and for weights of a release."""
    if options.resume:
        return read_checkpoint(out)
    path = user_path(options.init)
    if not options.init or not ((path / "checkpoint.pt").exists() or path.match("checkpoint*.pt")):
        return None
    try:
        return read_checkpoint(path)
    except UserError as e:
        raise UserError(f"--init: {e}") from None


def start_from(model, checkpoint, options):
    """--init out/run: the averaged weights of an own run. What --fresh names keeps its random initialisation.
    Raises UserError for what does not fit."""
    if checkpoint["model"] != options.model:
        raise UserError(f"--init {options.init} is a run of {checkpoint['model']}, not of {options.model}")
    fresh = tuple(prefix for prefix in options.fresh.split(",") if prefix)
    want, weights = model.state_dict(), checkpoint["ema"]
    for prefix in fresh:
        if not any(key.startswith(prefix) for key in want):
            parts = {key.rpartition(".")[0] for key in want}
            raise UserError(f"--fresh {prefix}: no weight begins so{nearest(prefix, parts)}")
    shape = lambda x: tuple(getattr(x, "shape", ()))
    wrong = [f"{key} is {shape(weights[key])}, should be {shape(want[key])}" if key in weights else
             f"{key} is missing" for key in want
             if not key.startswith(fresh) and (key not in weights or shape(weights[key]) != shape(want[key]))]
    wrong += [f"{key} is left over" for key in weights if key not in want and not key.startswith(fresh)]
    if wrong:
        was, now = (c.get("text_len") for c in (checkpoint["config"], vars(model.config)))
        if was != now:
            wrong.insert(0, f"made for instructions of text_len={was}, here it is {now}")
        raise UserError(f"--init {options.init}: {'; '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}: use the "
                        f"run's own --set and data, or name with --fresh what shall start anew")
    anew = [key for key in want if key.startswith(fresh)]
    model.load_state_dict({key: want[key] if key in anew else weights[key] for key in want})
    if anew:
        print(f"note: {len(anew)} weights start fresh: {', '.join(anew[:6])}{' ...' * (len(anew) > 6)}")


# What the result depends on: a change is named, since it makes another run of it.
SHAPING = ("data", "seed", "steps", "batch_size", "grad_accum", "lr", "warmup", "lr_schedule", "clip",
           "weight_decay", "betas", "ema_power", "ema_max", "dtype", "normalizer",
           "image_size", "colour")


def resume(run, checkpoint):
    """Take up the state of the checkpoint in --out, and the rows of metrics.jsonl up to its step."""
    path = run.out / "checkpoint.pt"
    if checkpoint["model"] != run.options.model:
        raise UserError(f"{path} is a checkpoint of {checkpoint['model']}, not of {run.options.model}; "
                        f"choose another --out")
    same_data(checkpoint["data"], run.description, run.out)
    now, was = dataclasses.asdict(run.config), checkpoint["config"]
    changed = [f"{k} was {was[k]!r}, is {now.get(k)!r}" for k in was if now.get(k) != was[k]]
    if changed:
        raise UserError(f"--resume: the configuration of {path} differs: {'; '.join(changed)[:300]}")
    if run.options.steps < checkpoint["step"]:
        raise UserError(f"--resume: {path} has {checkpoint['step']} steps behind it, more than --steps "
                        f"{run.options.steps}: leave it as it was")
    for name in SHAPING:  # an older checkpoint may lack some
        value = getattr(run.options, name)
        was = checkpoint["options"].get(name, value)
        if was != value and run.main:
            print(f"note: {name} was {was!r} and is now {value!r}: this is not the run that was interrupted")
    try:
        take_up(run, checkpoint)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} does not fit {run.options.model}.py, which has changed since: "
                        f"{one_line(e)[:200]}") from None
    run.rows = read_metrics(run.out / "metrics.jsonl", up_to=run.step)
    if run.step == run.options.steps:  # its last evaluation is made anew
        run.rows = [row for row in run.rows if row["step"] < run.step or "lr" in row]


def take_up(run, checkpoint):
    for part, weights in ((run.model, checkpoint["weights"]), (run.ema, checkpoint["ema"])):
        part.load_state_dict({key: distributed.split(weights[key], like)
                              for key, like in part.state_dict().items()})
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for i, state in checkpoint["optimizer"]["state"].items():
        state |= {key: distributed.split(x, parameters[i]) for key, x in state.items()
                  if x.shape == parameters[i].shape}
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.step, run.seconds = checkpoint["step"], checkpoint["train_seconds"]
    run.unlogged = checkpoint.get("unlogged", {"step": run.step})


def same_data(was, now, out):
    """Refuse to go on with other data: weights in other units, held-out episodes that are trained on."""
    for key, what in (("state_keys", "observations"), ("camera_keys", "cameras"), ("lengths", "episodes"),
                      ("items", "items"), ("fingerprint", "numbers"), ("train_episodes", "split"),
                      ("valid_episodes", "split"), ("processing", "processing:")):
        if key in was and was[key] != now.get(key):
            what += f" ({len(was[key])} then, {len(now[key])} now)" if isinstance(was[key], list) else ""
            raise UserError(f"--resume: the data have changed since the run began, other {what}: use the same"
                            f" files and split, or start a new run from this one: --init {out} --out NEW")


def read_metrics(path, up_to):
    """Rows of the run's earlier part, without those after the checkpoint."""
    return [row for row in read_rows(path) if isinstance(row.get("step"), int) and row["step"] <= up_to]
