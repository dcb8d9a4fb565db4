"""How a run starts: with a new model, with weights (--init), or where it stopped (--resume)."""
import contextlib
import dataclasses

import torch

from demos.limits import memory
from robot.checkpoint import read_checkpoint
from robot.downloads import FACTS
from robot.errors import UserError, few, nearest, one_line, say, user_path, written_aside
from robot.models import SAMPLER_FIELDS, load_module, pick_device, sampler_config
from robot.normalizer import Normalizer
from robot.policy import Policy
from robot.released import build_model, open_release
from tools import distributed, shards
from tools.options import check_options, parse_set, tuple_of
from tools.runs import frozen_names, n_parameters, read_rows


@contextlib.contextmanager
def one_model(name):
    """A Config that the data do not fit, or that no network can be made of, is one line here and no traceback
    an hour later."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError, IndexError) as e:
        kind = "" if isinstance(e, ValueError) else "this configuration gives no model: "
        raise UserError(f"{name}: {kind}{one_line(e, 300)}") from None


# Fields of a Config that may differ from the release's: the weights mean the same with them.
FREE = (*SAMPLER_FIELDS, "n_action_steps", "train_on_padding", "random_crop", "checkpointing", "freeze_vlm")


def is_run(init):
    """Whether --init names a run of train.py."""
    path = user_path(init)
    return (path / "checkpoint.pt").exists() or path.match("checkpoint*.pt")


def with_release(options, explicit):
    """Options that the weights of --init decide, unless the user gives them. -> (options, names of the
    options that are given, Release or None). A resumed run has all of them in its checkpoint."""
    if not options.init or is_run(options.init):
        return options, explicit, None
    out = user_path(options.out or f"out/{options.model}")
    if options.resume and (out / "checkpoint.pt").exists():
        checkpoint = read_checkpoint(out)
        was = {name: value for name, value in checkpoint["options"].items()
               if name in vars(options) and name not in explicit | {"resume"}}
        was |= {"set": checkpoint["options"].get("set", {}) | options.set, "model": checkpoint["model"]}
        return dataclasses.replace(options, **was), explicit | set(was), None
    release = open_release(options.init, options.model or None, robot=options.robot,
                           tokenizer_path=options.set.get("tokenizer_path", ""))
    preset = load_module(release.model).PRESETS.get(options.preset, {}) if "preset" in explicit else {}
    for where, given in (("--set", options.set), (f"--preset {options.preset}", preset)):
        for key, value in given.items():
            its = release.config.get(key, value)
            if key not in FREE + release.free and tuple_of(value) != tuple_of(its):
                raise UserError(f"{where}: {key} = {one_line(value, 60)}, the weights of --init were made "
                                f"with {one_line(its, 60)}: leave it out")
    said = {key: x for key, x in release.config.items() if key not in FACTS or key not in release.free}
    found = {"model": release.model, "set": said | options.set} | release.recipe
    if release.description.get("processing"):
        found["processing"] = release.description["processing"]
    images = (options.processing or found.get("processing") or {}).get("images")
    by_model = isinstance(images, dict) and images.get("fit") == "model"    # then pictures keep their size
    if release.description.get("image_size") and not by_model:
        found["image_size"] = tuple(release.description["image_size"])
    found = {name: value for name, value in found.items() if name in vars(options) and (
        name not in explicit or name == "set")}
    options = dataclasses.replace(options, **found)
    check_options(options)
    return options, explicit | set(found), release


def released_policy(args):
    """sample.py --init: (model, what a run's checkpoint would say, Policy) of downloaded weights."""
    device, dtype = pick_device(args.device, args.dtype)
    if args.without or args.swap or args.no_replay:
        raise UserError("--init: --without, --swap and --no_replay are for runs of train.py")
    changes = parse_set(args.set)
    release = open_release(args.init, args.model or None, robot=args.robot,
                           tokenizer_path=changes.pop("tokenizer_path", ""))
    if changes:
        sampler_config(load_module(release.model), release.config, changes)
    release.config |= changes
    for note in release.notes:
        say(f"--init: {note}")
    policy = Policy.from_release(release, device, dtype, args.sampler_steps or None, args.seed)
    checkpoint = {"model": release.model, "preset": "released", "step": 0, "data": release.description,
                  "config": dataclasses.asdict(policy.model.config),
                  "options": {"env": {}, "data": args.init, "robots": {}}}
    return policy.model, checkpoint, policy


def units(options, earlier, release):
    """The normaliser that a run begins with: that of the run it goes on from, or of the release. None: it is
    fitted to the data."""
    if earlier:
        return Normalizer.from_state(earlier["normalizer"]) if earlier["normalizer"] else None
    if options.normalizer != "checkpoint":
        if release and release.normalizer and release.normalizer.mode != options.normalizer:
            say("the statistics that came with the weights of --init are not used, those of the data are: "
                "--normalizer checkpoint takes them")
        return None
    if not release or not release.normalizer:
        raise UserError("--normalizer checkpoint: no statistics came with --init, take another")
    return release.normalizer


def fits(release, facts, description):
    """Refuse data that the weights were not made for: another number of actions, cameras in another order."""
    if not release.config:
        return
    for key, fact in facts.items():
        its = release.config.get(key, fact)
        if key in FACTS and key not in release.free and tuple_of(its) != tuple_of(fact):
            keys = few(f"{name} {dim}" for name, dim in description["state_keys"].items())
            raise UserError(f"the weights of --init have {key} {its}, the data {fact} (state: {keys}; "
                            f"cameras: {few(description['camera_keys'])}): choose among them with shape_meta")
    places = lambda said: list((said.get("processing") or {}).get("cameras") or said.get("camera_keys", []))
    wanted, has = places(release.description), places(description)
    short = lambda names: [name.rpartition(".")[2] for name in names]
    if len(wanted) > 1 and len(wanted) == len(has) and short(has) != short(wanted):
        raise UserError(f"the weights of --init look at the cameras {few(wanted)} in this order, the data "
                        f"have {few(has)}: say which is which, processing: cameras: {{{wanted[0]}: ..}}")


def say_notes(release, out):
    """The first note on weights that are not used; all of them are written to a file of the run."""
    if release and release.notes:
        with written_aside(out / "init.log") as aside:
            aside.write_text("\n".join(release.notes) + "\n", encoding="utf-8")
        more = f" ({len(release.notes)} such notes in {out / 'init.log'})" if len(release.notes) > 1 else ""
        say(f"--init: {one_line(release.notes[0], 250)}{more}")


def build(options, module, config, device, earlier, release=None, world=1):
    """The model on its device; with --fsdp on the CPU, since it may be too large for one device."""
    with one_model(options.model):
        with torch.device("meta"):
            check_size(module.Model(config), device, world if options.fsdp else 1)
        model = build_model(release, config) if release else module.Model(config)
        if options.init and earlier:
            start_from(model, earlier, options)
        return model if options.fsdp else model.to(device)


def first_loss(loss_step, example, device, dtype, name):
    """Data that the model does not fit are a line here, and no traceback in the loop."""
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with one_model(name), torch.no_grad(), autocast:
        loss_step({k: v.to(device) for k, v in example.items()})
    if hasattr(loss_step, "reshard"):           # FSDP keeps some weights whole until the backward pass
        loss_step.reshard()


def check_size(model, device, processes=1):
    """Refuse weights that cannot fit beside their average, divided among so many, before they are
    allocated."""
    frozen = frozen_names(model)    # of these there is one copy
    need = sum(p.numel() * (4 if name in frozen else 8) for name, p in model.named_parameters()) / processes
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory()
    if need > has:
        raise ValueError(f"{n_parameters(model):,} parameters and their average take {need / 1e9:.0f} GB, "
                         f"{device.type} has {has / 1e9:.0f} GB: take a smaller preset, or more processes "
                         f"and --fsdp")


def earlier_run(options, out, rank):
    """The checkpoint to go on with or to start from; None for a new run and for weights of a release."""
    if options.resume:
        if rank == 0:
            shards.merge(out)       # what a killed run with --fsdp has left
        distributed.wait()
        return read_checkpoint(out, mapped=options.fsdp)
    if not options.init or not is_run(options.init):
        return None
    try:
        return read_checkpoint(user_path(options.init), mapped=options.fsdp)
    except UserError as e:
        raise UserError(f"--init: {e}") from None


def start_from(model, checkpoint, options):
    """--init out/run: the averaged weights of an earlier run. Weights that --fresh names keep their random
    initialisation. Raises UserError for weights that do not fit."""
    if checkpoint["model"] != options.model:
        raise UserError(f"--init {options.init} is a run of {checkpoint['model']}, not of {options.model}")
    relative = [is_relative(spec) for spec in (checkpoint["data"].get("processing"), options.processing)]
    if relative[0] != relative[1]:
        raise UserError(f"--init {options.init}: its actions are {'' if relative[0] else 'not '}relative to "
                        f"the state, here it is the other way round: write processing: actions: as there")
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


def is_relative(processing):
    return any("delta" in step for step in (processing or {}).get("actions", []))


# Options on which the result depends: if one changes, it is another run, and a note says so.
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
    was = checkpoint.get("processes", run.world)
    if was != run.world and run.main:
        print(f"note: {was} processes had {run.options.batch_size} items each, now there are {run.world}: "
              f"this is not the run that was interrupted, unless --batch_size changes as well")
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
    rows = read_rows(run.out / "metrics.jsonl")             # without those after the checkpoint
    run.rows = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= run.step]
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
    run.frozen_file = checkpoint.get("frozen", "")
    run.step, run.seconds = checkpoint["step"], checkpoint["train_seconds"]
    run.unlogged = checkpoint.get("unlogged", {"step": run.step})


def same_data(was, now, out):
    """Refuse to go on with other data: weights in other units, held-out episodes that are trained on."""
    was, now = ({"processing": {}} | description for description in (was, now))    # older runs have none
    for key, what in (("state_keys", "observations"), ("camera_keys", "cameras"), ("lengths", "episodes"),
                      ("items", "items"), ("fingerprint", "numbers"), ("train_episodes", "split"),
                      ("valid_episodes", "split"), ("processing", "processing:")):
        if key in was and was[key] != now.get(key):
            what += f" ({len(was[key])} then, {len(now[key])} now)" if isinstance(was[key], list) else ""
            raise UserError(f"--resume: the data have changed since the run began, other {what}: use the same"
                            f" files and split, or start a new run from this one: --init {out} --out NEW")
