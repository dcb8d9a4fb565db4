"""The one train loop of all models: `python train.py --model dp_cnn`.

Reads demonstrations (or a generated set) through data.py, trains the model file that is named, and leaves in
--out

    checkpoint.pt   weights, EMA, optimiser, step, configuration, normaliser; replaced whole
    metrics.jsonl   one JSON object per logged step and per evaluation
    result.json     the final figures
    report.html     curves, samples forming out of noise, rollouts

Everything random in step k (which windows, noise, t, crops, dropout) is a function of (seed, k, rank). A run
that is resumed needs the step and nothing else, and on a CPU it equals the uninterrupted run bit for bit.

Several GPUs: `torchrun --nproc_per_node 4 train.py --model ...` (DDP; --batch_size is per process);
presets of a billion weights with --fsdp.
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import report
import sample
import tabletop
from data import UserError, written_aside
from options import load_module, make_config, parse_options, pick_device, run, with_recipe

# ----------------------------------------------------------------------------------------------------------
# Schedules


def lr_factor(step, warmup, total, schedule="cosine", final=0.1):
    """Learning rate of optimiser step 0, 1, ... as a share of the peak, after a linear warm-up. "pi0" is
    openpi's: it warms up from 1 / (warmup + 1), its cosine counts from step 0, and it ends at `final` of
    the peak."""
    if schedule == "pi0":
        if step < warmup:
            start = 1 / (warmup + 1)
            return start + (1 - start) * step / warmup
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return {"cosine": max(0.0, 0.5 * (1 + math.cos(math.pi * progress))),
            "linear": max(0.0, 1 - progress), "constant": 1.0}[schedule]


def ema_decay(step, power=0.75, max_value=0.9999, inv_gamma=1.0, min_value=0.0, update_after_step=0):
    """Decay of the averaged weights at optimiser step 0, 1, ... [E24]. The first two steps copy the
    weights, since Diffusion Policy's counter (ema_model.py) lags by one."""
    step = max(0, step - update_after_step - 1)
    return 0.0 if step <= 0 else min(max(1 - (1 + step / inv_gamma) ** -power, min_value), max_value)


def seed_step(seed, step, rank):
    """What step k draws depends on this line alone."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1024 + rank) % 2**63)


# ----------------------------------------------------------------------------------------------------------
# Data, files, evaluation


def open_data(options, module, cache=None):
    """-> (facts about the data for the Config, function (config, device) -> [training items, held-out items],
    description for the checkpoint, normaliser or None for a generative model). cache: folder of generated
    demonstrations, default as data.py says."""
    fields = {f.name: f.default for f in dataclasses.fields(module.Config)}
    if "data_shape" in fields:  # points or images
        train, valid = (data.open_samples(options.data or "moons", n=options.demos or None, seed=options.seed,
                                          split=split) for split in ("train", "valid"))
        facts = {"data_shape": train.shape, "n_classes": train.n_classes}
        return facts, lambda config, device: [train, valid], train.description(), None

    chosen = fields | module.PRESETS.get(options.preset, {}) | options.set
    opened = lambda source: data.open_demos(
        source, obs=chosen.get("obs", "image"), text="text_len" in fields,
        shape_meta=options.shape_meta or None, episodes=options.demos or None,
        val_ratio=options.val_ratio or None, max_train_episodes=options.max_train_episodes or None,
        seed=options.seed, cache=cache)
    if options.robots:
        demos = mix_robots(options.robots, module, opened)
    else:
        demos = opened(options.data or "tabletop")
    normalizer = data.fit_normalizer(demos, options.normalizer)
    facts = {"action_dim": demos.action_dim, "state_dim": demos.state_dim,
             "n_cameras": len(demos.camera_keys)}
    if demos.image_size:
        facts["image_size"] = tuple(demos.image_size)
    if options.robots:  # their actions and states come packed
        facts |= {"action_names": (), "state_names": ()}

    def windows(config, device):
        return [data.Windows(demos, normalizer, config.pred_horizon, config.n_obs_steps, config.first_action,
                             n_state_steps=config.n_obs_loaded, text_len=getattr(config, "text_len", 0),
                             split=split, device=device, encode=getattr(config, "encode_text", None))
                for split in ("train", "valid")]

    return facts, windows, demos.description(), normalizer


def mix_robots(robots, module, opened):
    """One set of all robots of the YAML, packed by the names of their actions and states."""
    if not hasattr(module, "slots"):
        raise UserError(f"robots: {module.__name__} has no unified action vector: use --model rdt")
    parts = {}
    for name, spec in robots.items():
        try:
            places = [module.slots(spec[key]) for key in ("action_names", "state_names")]
        except (KeyError, TypeError):
            raise UserError(f"robots: {name}: needs action_names and state_names, lists of names") from None
        except ValueError as e:
            raise UserError(f"robots: {name}: {e}") from None
        parts[name] = (opened(spec.get("data", name)), *places)
    return data.MixedDemos(parts)


def prepare_out(options):
    """The output folder, writable; an earlier run in it is only touched with --resume."""
    out = Path(options.out or f"out/{options.model}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").write_bytes(b"")
        (out / ".probe").unlink(missing_ok=True)  # another process of this run may have been here first
        for part in out.glob("checkpoint.pt.*.part"):  # what a killed run left half written
            part.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror or e}); choose another folder") from None
    if (out / "checkpoint.pt").exists() and not options.resume:
        raise UserError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
    return out


def read_metrics(path, up_to):
    """Rows of the run's earlier part, without those after the checkpoint."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed run left half written
            rows.append(json.loads(line))
    return [r for r in rows if r["step"] <= up_to]


def resume(path, options, config, model, ema, optimizer, device):
    """Load the run's state into model, ema and optimizer. -> (step, seconds of training so far)"""
    checkpoint = sample.read_checkpoint(path, device)
    if checkpoint["model"] != options.model:
        raise UserError(f"{path} is a checkpoint of {checkpoint['model']}, not of {options.model}; "
                        f"choose another --out")
    now = dataclasses.asdict(config)
    was = checkpoint["config"]
    changed = [f"{k} was {was[k]!r}, is {now.get(k)!r}" for k in was if now.get(k) != was[k]]
    if changed:
        raise UserError(f"--resume: the configuration of {path} differs: {'; '.join(changed)}")
    for name in ("data", "seed", "steps", "batch_size", "grad_accum", "lr", "warmup", "lr_schedule", "clip"):
        was, value = checkpoint["options"][name], getattr(options, name)
        if was != value:
            print(f"note: {name} was {was!r} and is now {value!r}: this is not the run that was interrupted")
    for part, weights in ((model, checkpoint["weights"]), (ema, checkpoint["ema"])):
        part.load_state_dict({key: split(weights[key], like) for key, like in part.state_dict().items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in checkpoint["optimizer"]["state"].items():
        state |= {key: split(x, parameters[i]) for key, x in state.items() if x.shape == parameters[i].shape}
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["train_seconds"]


@torch.no_grad()
def validate(model, items, normalizer, seed, n=256):
    """Loss, loss per tenth of t, and mean absolute error of sampled actions over the executed steps, in
    data units; on held-out episodes, always the same items, noise and t."""
    if not len(items):
        return {}
    batch = items.batch(torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:n])
    batch = {k: v.to(next(model.parameters()).device) for k, v in batch.items()}
    torch.manual_seed(seed)
    losses = [model.loss(batch) for _ in range(4)]
    t = torch.cat([x["t"] for x in losses]).cpu()
    per_sample = torch.cat([x["per_sample"] for x in losses]).float().cpu()
    bucket = (t * 10).long().clamp(max=9)
    loss_t = [per_sample[bucket == b].mean().item() if (bucket == b).any() else None for b in range(10)]
    row = {"val_loss": per_sample.mean().item(), "loss_t": loss_t}
    if normalizer is not None:
        sampled = model.sample(batch, generator=torch.Generator().manual_seed(seed)).float()
        raw = normalizer.unnormalize("actions", torch.stack([sampled, batch["actions"]]))
        now = -model.config.first_action
        executed = slice(now, now + model.config.n_action_steps)
        real = batch["action_mask"][:, executed, None].expand_as(raw[0, :, executed]).clone()
        if "action_valid" in batch:
            real &= batch["action_valid"][:, None]
        error = lambda guess: (guess - raw[1])[:, executed][real].abs().mean().item()
        row["action_error"] = error(raw[0])
        # What knows nothing does: the mean action; and, where states are what actions are, to stay.
        row["error_of_mean"] = error(normalizer.stats["actions"]["mean"].to(raw.device).expand_as(raw[1]))
        names, demos = getattr(model.config, "action_names", ()), items.demos
        joints = list(demos.state_keys) == ["qpos"] and demos.state_dim == demos.action_dim  # as ALOHA has it
        if joints or names and names == model.config.state_names:
            pose = normalizer.unnormalize("state", batch["state"][:, model.config.n_obs_steps - 1])
            row["error_of_staying"] = error(pose[:, None].expand_as(raw[1]))
    return row


# ----------------------------------------------------------------------------------------------------------


class LossStep(torch.nn.Module):
    """The model's loss as a forward pass, which is what DDP and torch.compile wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def shard(loss_step, ema, device, world):
    """--fsdp: each process keeps a part of every weight, of its average and of the optimiser's state; the
    weights are whole from a step's forward to its backward pass. One group, not one per block: model files
    use parts of a block by other ways than its forward, which FSDP2 would not notice."""
    from torch.distributed.device_mesh import init_device_mesh  # seconds, which others need not wait for
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (world,))
    for part in (loss_step, ema):
        fully_shard(part, mesh=mesh)


def gather(x):
    """A state_dict whose tensors are whole: on the first process, on its CPU. All processes take part."""
    if isinstance(x, dict):
        return {key: gather(value) for key, value in x.items()}
    if not hasattr(x, "full_tensor"):  # no DTensor
        return x
    whole = x.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def split(whole, like):
    """The inverse of `gather` for one tensor."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def catch_signals():
    """-> list that receives the first SIGINT or SIGTERM; a second one interrupts at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return received


def stop_if_not_finite(losses, first_step, options, windows, rank, world, out):
    """Raise at the first loss that is not finite: names the step and the episodes of its batch."""
    bad = next((i for i, v in enumerate(losses) if not math.isfinite(v)), None)
    if bad is None:
        return
    stream = data.batches(windows, options.batch_size, options.seed, (first_step + bad) * options.grad_accum,
                          rank, world)
    names = sorted({name for _ in range(options.grad_accum) for name in windows.episode(next(stream)[0])})
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise UserError(f"loss or gradient of step {first_step + bad + 1} is {losses[bad]}; its batch: {shown}. "
                    f"The last checkpoint in {out} is intact: check the data (data.py FILE) or lower --lr")


def train(options, module):
    """Train, evaluate, write everything to options.out. -> the dict of result.json"""
    device, dtype = pick_device(options.device, options.dtype)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main = rank == 0
    if options.fsdp and world == 1:
        raise UserError("--fsdp needs several processes: torchrun --nproc_per_node 4 train.py ... --fsdp")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
    out = prepare_out(options)
    if world > 1:
        dist.barrier()  # all have looked before one writes

    # Data, model, optimiser. The data decide the shapes in the model's Config.
    facts, make_windows, description, normalizer = open_data(options, module)
    config = make_config(module, options, facts)
    windows, held_out = make_windows(config, device)
    torch.manual_seed(options.seed)
    model = sample.load_official(module, config, options.init) if options.init else module.Model(config)
    model = model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    example = (held_out if len(held_out) else windows).batch(torch.zeros(1, dtype=torch.long))
    try:
        with torch.no_grad():
            model.loss({k: v.to(device) for k, v in example.items()})
    except ValueError as e:  # data that the model's Config does not describe
        raise UserError(f"{options.model}: {e}") from None
    loss_step, shown = LossStep(model), ema  # shown: what is looked at, saved and evaluated
    if options.fsdp:
        shown = copy.deepcopy(ema) if main else None
        shard(loss_step, ema, device, world)
    optimizer = torch.optim.AdamW(model.param_groups(options.weight_decay), lr=options.lr,
                                  betas=options.betas, fused=device.type in ("cuda", "cpu"))
    start, seconds, rows = 0, 0.0, []
    if options.resume:
        start, seconds = resume(out / "checkpoint.pt", options, config, model, ema, optimizer, device)
        rows = read_metrics(out / "metrics.jsonl", up_to=start)
    stream = data.batches(windows, options.batch_size, options.seed, start * options.grad_accum, rank, world,
                          options.workers)
    # Where to act: {robot: environment}, one robot has no name.
    arenas = {None: options.env or options.data or "tabletop"}
    if options.robots:
        arenas = {name: spec.get("data", name) for name, spec in options.robots.items()}
    arenas = {name: env for name, env in arenas.items() if isinstance(env, dict) or env in tabletop.ROBOTS}

    def collect():
        """All processes bring the parts of the average together in `shown`."""
        if options.fsdp:
            whole = gather(ema.state_dict())
            if main:
                shown.load_state_dict(whole)

    def save(step):
        collect()
        state = gather({"weights": model.state_dict(), "optimizer": optimizer.state_dict()})
        if not main:
            return
        sample.save_checkpoint(out / "checkpoint.pt", state | {
            "model": options.model, "preset": options.preset, "options": dataclasses.asdict(options),
            "config": dataclasses.asdict(config), "data": description,
            "normalizer": normalizer.state() if normalizer else None, "step": step, "train_seconds": seconds,
            "ema": shown.state_dict(), "replay": sample.record(shown, example)})

    def log(row):
        rows.append(row)
        with open(out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def evaluate(step, closed_loop):
        row = {"step": step} | validate(shown, held_out, normalizer, options.seed)
        if normalizer is None:
            row |= sample.compare_samples(shown, held_out, options.seed, windows if closed_loop else None)
        for robot, environment in arenas.items() if closed_loop and normalizer and options.episodes else ():
            policy = sample.Policy(shown, normalizer, description, device=device, seed=options.seed,
                                   robot=robot)
            found = sample.evaluate(policy, environment, options.episodes, options.seed)
            if robot:  # success_<robot>, ...; the films of all of them side by side
                films = row.get("rollouts", []) + found.pop("rollouts")[:3]
                found = {f"{key}_{robot}": value for key, value in found.items()} | {"rollouts": films}
            row |= found
        return row

    if main:
        print(json.dumps({"options": dataclasses.asdict(options), "config": dataclasses.asdict(config)}))
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{options.model}: {n_parameters:,} parameters, {len(windows):,} training and "
              f"{len(held_out):,} held-out items, {device.type}, {str(dtype).removeprefix('torch.')}")
        if normalizer is not None:
            print(normalizer.summary())
        with written_aside(out / "metrics.jsonl") as aside:
            aside.write_text("".join(json.dumps(r) + "\n" for r in rows))
    if not options.resume:
        save(0)

    # The loop: fetch, loss, backward, clip, step, EMA, log.
    loss_step = torch.compile(loss_step) if options.compile else loss_step
    if world > 1 and not options.fsdp:
        loss_step = torch.nn.parallel.DistributedDataParallel(loss_step)
    own = lambda part: [p.to_local() if options.fsdp else p for p in part.parameters()]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    received = catch_signals()
    losses, data_s, began, since = [], 0.0, time.perf_counter(), start
    bar = tqdm(total=options.steps, initial=start, disable=not main, mininterval=1, unit="step")
    for step in range(start, options.steps):
        lr = options.lr * lr_factor(step, options.warmup, options.steps, options.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(options.grad_accum):
            asked = time.perf_counter()
            _, batch = next(stream)
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            data_s += time.perf_counter() - asked
            seed_step(options.seed, step * options.grad_accum + micro, rank)
            with autocast:
                named = loss_step(batch)
                loss = named["loss"] / options.grad_accum
            loss.backward()
            losses.append(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
        grad_norm = grad_norm.full_tensor() if options.fsdp else grad_norm
        optimizer.step()
        optimizer.zero_grad()
        decay = ema_decay(step, options.ema_power, options.ema_max)
        with torch.no_grad():  # EMA: average <- decay * average + (1 - decay) * weights
            torch._foreach_lerp_(own(ema), own(model), 1 - decay)
        done = step + 1
        bar.update()

        # From here on only every log_every steps: the one place where the host waits for the device.
        logging = done % options.log_every == 0 or done == options.steps
        stopping = bool(received)
        if world > 1 and logging:  # all processes stop at the same step, or some would wait for ever
            flag = torch.tensor(float(stopping), device=device)
            dist.all_reduce(flag)
            stopping = flag.item() > 0
        stopping = stopping and (world == 1 or logging)
        saving = stopping or done == options.steps or done % options.checkpoint_every == 0
        if not (logging or saving):
            continue
        values = torch.stack(losses).reshape(-1, options.grad_accum).sum(1).tolist()
        # A gradient can overflow where the loss does not: the weights are then lost, and must not be saved.
        checked = values[:-1] + [values[-1] + 0 * grad_norm.item()]
        stop_if_not_finite(checked, since, options, windows, rank, world, out)
        elapsed, n = time.perf_counter() - began, done - since
        seconds += elapsed
        row = {"step": done, "loss": sum(values) / n, "lr": lr, "grad_norm": grad_norm.item(),
               "data_s": data_s / n, "compute_s": (elapsed - data_s) / n,
               "samples_per_s": n * options.batch_size * options.grad_accum * world / elapsed}
        row |= {f"loss_{name}": x.item() for name, x in named.items() if x.ndim == 0 and name != "loss"}
        validating, rolling = (every and done % every == 0 and done < options.steps and not stopping
                               for every in (options.eval_every, options.rollout_every))
        if main:
            log(row)
            bar.set_postfix_str(f"loss {row['loss']:.4f} data {1e3 * row['data_s']:.1f} ms "
                                f"compute {1e3 * row['compute_s']:.1f} ms")
        if saving:
            save(done)
        elif validating or rolling:
            collect()
        if main and (validating or rolling):
            row = evaluate(done, closed_loop=rolling)
            row.pop("rollouts", None)
            log(row)
        if stopping:
            bar.close()
            if main:
                print(f"stopped after step {done}; all is saved. Go on with the same command and --resume")
            raise SystemExit(128 + (received or [signal.SIGTERM])[0])
        losses, data_s, began, since = [], 0.0, time.perf_counter(), done
    bar.close()
    # All is saved: from here on an interruption costs the evaluation only.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    result = {}
    collect()
    if main:
        row = evaluate(options.steps, closed_loop=True)
        rollouts = row.pop("rollouts", [])
        log(row)
        result = {"model": options.model, "preset": options.preset, "parameters": n_parameters,
                  "train_seconds": round(seconds, 1), "device": device.type} | row
        result.pop("loss_t", None)  # drawn as a curve
        sample.write_json(out / "result.json", result)
        pictures = sample.pictures(shown, held_out if len(held_out) else windows, normalizer, description,
                                   options.seed)
        report.write(out / "report.html", f"{options.model} ({options.preset})", rows, result,
                     dataclasses.asdict(config), rollouts=rollouts, **pictures)
        print(json.dumps(result))
        print(f"wrote checkpoint.pt, metrics.jsonl, result.json and report.html to {out}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return result


def explain_one_batch(options, module):
    """--explain: see explain.py. The built-in task is shown on a few episodes, which are not kept."""
    from explain import explain
    device, _ = pick_device(options.device, "float32")
    with tempfile.TemporaryDirectory() as cache:
        built_in = hasattr(module.Config, "horizon") and (options.data or "tabletop") == "tabletop"
        few = dataclasses.replace(options, demos=min(options.demos or 20, 20)) if built_in else options
        facts, make_items, description, normalizer = open_data(few, module, cache)
        config = make_config(module, options, facts)
        explain(module, config, make_items(config, device)[0], description, normalizer, device, options.seed)


def main(argv=None):
    options, explicit = parse_options(sys.argv[1:] if argv is None else argv)
    module = load_module(options.model)
    options = with_recipe(options, explicit, module)
    return explain_one_batch(options, module) if options.explain else train(options, module)


if __name__ == "__main__":
    run(main)
