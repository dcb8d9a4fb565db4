"""The one train loop of all models: `python train.py --model dp_cnn`.

Reads demonstrations (or a generated set) through data.py, trains the model file that is named, and leaves in
--out

    checkpoint.pt   weights, EMA, optimiser, step, configuration, normaliser; replaced whole
    metrics.jsonl   one JSON object per logged step and per evaluation
    result.json     the final figures
    report.html     curves, samples forming out of noise, rollouts

Everything random in step k (which windows, noise, t, crops, dropout) is a function of (seed, k, rank). A run
that is resumed needs the step and nothing else, and on a CPU it equals the uninterrupted run bit for bit.

Several GPUs: `torchrun --nproc_per_node 4 train.py --model ...` (DDP; --batch_size is per process).
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import report
import sample
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


def open_data(options, module):
    """-> (facts about the data for the Config, function (config, device) -> [training items, held-out items],
    description for the checkpoint, normaliser or None for a generative model)"""
    fields = {f.name: f.default for f in dataclasses.fields(module.Config)}
    if "data_shape" in fields:  # points or images
        train, valid = (data.open_samples(options.data or "moons", n=options.demos or None, seed=options.seed,
                                          split=split) for split in ("train", "valid"))
        facts = {"data_shape": train.shape, "n_classes": train.n_classes}
        return facts, lambda config, device: [train, valid], train.description(), None

    chosen = fields | module.PRESETS.get(options.preset, {}) | options.set
    demos = data.open_demos(
        options.data or "tabletop", obs=chosen.get("obs", "image"), text="text_len" in fields,
        shape_meta=options.shape_meta or None, episodes=options.demos or None,
        val_ratio=options.val_ratio or None, max_train_episodes=options.max_train_episodes or None,
        seed=options.seed)
    normalizer = data.fit_normalizer(demos, options.normalizer)
    facts = {"action_dim": demos.action_dim, "state_dim": demos.state_dim,
             "n_cameras": len(demos.camera_keys)}
    if demos.image_size:
        facts["image_size"] = tuple(demos.image_size)

    def windows(config, device):
        return [data.Windows(demos, normalizer, config.pred_horizon, config.n_obs_steps, config.first_action,
                             n_state_steps=config.n_obs_loaded, text_len=getattr(config, "text_len", 0),
                             split=split, device=device) for split in ("train", "valid")]

    return facts, windows, demos.description(), normalizer


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
    model.load_state_dict(checkpoint["weights"])
    ema.load_state_dict(checkpoint["ema"])
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
        error = (raw[0] - raw[1])[:, executed][batch["action_mask"][:, executed]]
        row["action_error"] = error.abs().mean().item()
    return row


# ----------------------------------------------------------------------------------------------------------


class LossStep(torch.nn.Module):
    """The model's loss as a forward pass, which is what DDP and torch.compile wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


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
    optimizer = torch.optim.AdamW(model.param_groups(options.weight_decay), lr=options.lr,
                                  betas=options.betas, fused=device.type in ("cuda", "cpu"))
    example = (held_out if len(held_out) else windows).batch(torch.zeros(1, dtype=torch.long))
    try:
        with torch.no_grad():
            model.loss({k: v.to(device) for k, v in example.items()})
    except ValueError as e:  # data that the model's Config does not describe
        raise UserError(f"{options.model}: {e}") from None
    start, seconds, rows = 0, 0.0, []
    if options.resume:
        start, seconds = resume(out / "checkpoint.pt", options, config, model, ema, optimizer, device)
        rows = read_metrics(out / "metrics.jsonl", up_to=start)
    stream = data.batches(windows, options.batch_size, options.seed, start * options.grad_accum, rank, world,
                          options.workers)
    environment = options.env or None
    if normalizer is not None and (options.data or "tabletop") == "tabletop":
        environment = environment or "tabletop"

    def save(step):
        sample.save_checkpoint(out / "checkpoint.pt", {
            "model": options.model, "preset": options.preset, "options": dataclasses.asdict(options),
            "config": dataclasses.asdict(config), "data": description,
            "normalizer": normalizer.state() if normalizer else None, "step": step, "train_seconds": seconds,
            "weights": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
            "replay": sample.record(ema, example)})

    def log(row):
        rows.append(row)
        with open(out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def evaluate(step, closed_loop):
        row = {"step": step} | validate(ema, held_out, normalizer, options.seed)
        if normalizer is None:
            row |= sample.compare_samples(ema, held_out, options.seed)
        if closed_loop and environment and options.episodes:
            policy = sample.Policy(ema, normalizer, description, device=device, seed=options.seed)
            row |= sample.evaluate(policy, environment, options.episodes, options.seed)
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
    loss_step = LossStep(model)
    loss_step = torch.compile(loss_step) if options.compile else loss_step
    loss_step = torch.nn.parallel.DistributedDataParallel(loss_step) if world > 1 else loss_step
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
                loss = loss_step(batch)["loss"] / options.grad_accum
            loss.backward()
            losses.append(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        decay = ema_decay(step, options.ema_power, options.ema_max)
        with torch.no_grad():  # EMA: average <- decay * average + (1 - decay) * weights
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
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
        if main:
            log(row)
            bar.set_postfix_str(f"loss {row['loss']:.4f} data {1e3 * row['data_s']:.1f} ms "
                                f"compute {1e3 * row['compute_s']:.1f} ms")
            if saving:
                save(done)
            validating, rolling = (every and done % every == 0 and done < options.steps
                                   for every in (options.eval_every, options.rollout_every))
            if (validating or rolling) and not stopping:
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
    if main:
        row = evaluate(options.steps, closed_loop=True)
        rollouts = row.pop("rollouts", [])
        log(row)
        result = {"model": options.model, "preset": options.preset, "parameters": n_parameters,
                  "train_seconds": round(seconds, 1), "device": device.type} | row
        result.pop("loss_t", None)  # drawn as a curve
        sample.write_json(out / "result.json", result)
        pictures = sample.pictures(ema, held_out if len(held_out) else windows, normalizer, description,
                                   options.seed)
        report.write(out / "report.html", f"{options.model} ({options.preset})", rows, result,
                     dataclasses.asdict(config), rollouts=rollouts, **pictures)
        print(json.dumps(result))
        print(f"wrote checkpoint.pt, metrics.jsonl, result.json and report.html to {out}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return result


def main(argv=None):
    options, explicit = parse_options(sys.argv[1:] if argv is None else argv)
    module = load_module(options.model)
    return train(with_recipe(options, explicit, module), module)


if __name__ == "__main__":
    run(main)
