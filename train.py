"""The one train loop of all models: `python train.py --model dp_cnn`.

Reads demonstrations (or a generated set) through data.py, trains the model file that is named, and leaves in
--out

    checkpoint.pt   weights, EMA, optimiser, configuration, normaliser; replaced whole
    metrics.jsonl   one JSON object per logged step and per evaluation
    result.json     the final figures
    report.html     curves, samples forming out of noise, rollouts

Everything random in step k (windows, noise, t, crops, dropout) is a function of (seed, k, rank): a run needs
the step and nothing else to be resumed, and on a CPU it then equals the uninterrupted one bit for bit.

Map: schedules | prepare | loop, after_steps | evaluate, finish | train, main. Read `train` and `loop` first.
Saving, resuming and signals are in tools/runs.py, several GPUs (docs/scaling.md) in tools/distributed.py.
"""
import copy
import dataclasses
import json
import math
import sys
import time

import torch
from tqdm import tqdm

import data
from robot.environments import ENVIRONMENTS
from robot.errors import UserError, one_line, run_command, write_json
from robot.models import load_module, pick_device
from robot.packing import pack
from robot.policy import Policy
from robot.rollout import closed_loop, rehearse
from tools import distributed, speed
from tools.options import make_config, parse_options, with_recipe
from tools.quality import compare_samples, validate
from tools.runs import (Run, Since, averaged, catch_signals, collect, keep_best, locked, log, n_parameters,
                        prepare_out, release_signals, save, stop_status, worker_is_mourned, write_rows)
from tools.starting import build, earlier_run, first_loss, fits, resume, say_notes, units, with_release

# ----------------------------------------------------------------------------------------------------------
# Schedules


def lr_factor(step, warmup, total, schedule="cosine", final=0.1):
    """Learning rate of optimiser step 0, 1, ... as a share of the peak, after a linear warm-up. "pi0" is that
    of LeRobot's pi0: it warms up from 1 / (warmup + 1), its cosine counts from step 0, and it ends at `final`
    of the peak. (openpi's cosine counts from the end of the warm-up, at most 4.4 % of the peak away.)"""
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
    """Decay of the averaged weights at optimiser step 0, 1, ... The first two steps copy the weights, since
    Diffusion Policy's counter (ema_model.py) lags by one."""
    step = max(0, step - update_after_step - 1)
    return 0.0 if step <= 0 else min(max(1 - (1 + step / inv_gamma) ** -power, min_value), max_value)


def seed_step(seed, step, rank):
    """What step k draws depends on this line alone."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1024 + rank) % 2**63)


# ----------------------------------------------------------------------------------------------------------
# Before the first step


class LossStep(torch.nn.Module):
    """The model's loss as a forward pass, which is what DDP and torch.compile wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def prepare(options, module, out, device, dtype, rank, world, release=None):
    """Open the data, build the model and its average, the optimiser. -> Run"""
    earlier = earlier_run(options, out, rank)
    # The data decide the shapes in the model's Config. A run goes on in the units in which it began.
    facts, make_items, description, normalizer = data.open_data(
        options, module, normalizer=units(options, earlier, release))
    if release:
        fits(release, facts, description)
        say_notes(release, out)
    config = make_config(module, options, facts)
    items, held_out = make_items(config, device)
    options = data.fitting_batch(options, len(items), world)
    example = (held_out if len(held_out) else items).batch(torch.zeros(1, dtype=torch.long))
    torch.manual_seed(options.seed)
    model = pack(build(options, module, config, device, earlier, release, world))
    ema = averaged(model, options.fsdp)
    loss_step, shown = LossStep(model), ema
    if options.fsdp:
        shown = copy.deepcopy(ema) if rank == 0 else None
        distributed.shard((loss_step, ema), device, world, dtype)
    first_loss(loss_step, example, device, dtype, options.model)
    optimizer = torch.optim.AdamW(model.param_groups(options.weight_decay), lr=options.lr,
                                  betas=options.betas, fused=device.type in ("cuda", "cpu"))
    run = Run(options, out, device, dtype, rank, world, config, model, ema, shown, loss_step, optimizer,
              items, held_out, description, normalizer, example)
    if options.resume:
        resume(run, earlier)
    return run


# ----------------------------------------------------------------------------------------------------------
# The loop


def loop(run, stream):
    """Fetch, loss, backward, clip, step, EMA, log. Nothing here waits for the device but `after_steps`."""
    options, model, optimizer = run.options, run.model, run.optimizer
    loss_step = speed.compiled(run.loss_step) if options.compile else run.loss_step
    if run.world > 1 and not options.fsdp:
        loss_step = torch.nn.parallel.DistributedDataParallel(loss_step)
    autocast = torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.dtype == torch.bfloat16)
    received, since = catch_signals(), Since(run.unlogged["step"])
    since.losses += run.unlogged.get("losses", torch.zeros(0)).to(run.device).unbind()
    bar = tqdm(total=options.steps, initial=run.step, disable=not run.main, mininterval=1, unit="step")
    while run.step < options.steps:
        lr = options.lr * lr_factor(run.step, options.warmup, options.steps, options.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(run.step * options.grad_accum, (run.step + 1) * options.grad_accum):
            batch = since.fetch(stream, run.device)
            seed_step(options.seed, micro, run.rank)
            with autocast:
                named = loss_step(batch)
                loss = named["loss"] / options.grad_accum
            loss.backward()
            since.losses.append(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        decay = ema_decay(run.step, options.ema_power, options.ema_max)
        with torch.no_grad():  # EMA: average <- decay * average + (1 - decay) * weights
            torch._foreach_lerp_(distributed.own(run.ema, run.frozen), distributed.own(model, run.frozen),
                                 1 - decay)
        run.step += 1
        bar.update()
        since = after_steps(run, since, named, lr, grad_norm, received, bar)
    bar.close()


def after_steps(run, since, named, lr, grad_norm, received, bar):
    """Every log_every steps, the one place where the host waits for the device: log, save, evaluate, stop.
    -> what to gather in from here on"""
    options, done, due = run.options, run.step, evaluations_due(run)
    at = lambda every: bool(every) and done % every == 0
    saving = done == options.steps or at(options.checkpoint_every) or at(options.keep_every) or (
        options.keep_best and any(due))
    logging = saving or any(due) or at(options.log_every)
    stopping = bool(received) and (run.world == 1 or logging)
    if run.world > 1 and logging:  # all processes stop at the same step, or some would wait for ever
        stopping = distributed.any_process(stopping, run.device)
    if not (logging or stopping):
        return since
    losses = torch.stack(since.losses)
    each = losses.reshape(-1, options.grad_accum).sum(1).tolist()
    grad_norm = (grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm).item()
    # A gradient can overflow where the loss does not: the weights are then lost, and must not be saved.
    stop_if_not_finite(run, since.step, each[:-1] + [each[-1] + 0 * grad_norm])
    elapsed, n = time.perf_counter() - since.began, done - since.step
    run.seconds += elapsed
    if logging:
        row = {"step": done, "loss": sum(each) / n, "lr": lr, "grad_norm": grad_norm,
               "data_s": since.data_s / n, "compute_s": (elapsed - since.data_s) / n,
               "samples_per_s": n * options.batch_size * options.grad_accum * run.world / elapsed}
        row |= {f"loss_{name}": x.item() for name, x in named.items() if x.ndim == 0 and name != "loss"}
        log(run, row)
        bar.set_postfix_str(f"loss {row['loss']:.4f} data {1e3 * row['data_s']:.1f} ms "
                            f"compute {1e3 * row['compute_s']:.1f} ms")
    # Stopped between two rows: the next one is written by the resumed run, as if nothing had happened.
    run.unlogged = {"step": done} if logging else {"step": since.step, "losses": losses.cpu()}
    if saving or stopping:
        save(run, stopping)
    if stopping:
        bar.close()
        if run.main:
            print(f"stopped after step {done}; all is saved. Go on with the same command and --resume")
        raise SystemExit(stop_status(received))
    if any(due):
        evaluate_on_the_way(run)
    return Since(done)


def stop_if_not_finite(run, first_step, losses):
    """Raise at the first loss that is not finite: names the step and the episodes of its batch."""
    bad = next((i for i, v in enumerate(losses) if not math.isfinite(v)), None)
    if bad is None:
        return
    options = run.options
    stream = data.batches(run.items, options.batch_size, options.seed,
                          (first_step + bad) * options.grad_accum, run.rank, run.world)
    names = sorted({name for _ in range(options.grad_accum) for name in run.items.episode(next(stream)[0])})
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise UserError(f"loss or gradient of step {first_step + bad + 1} is {losses[bad]}; its batch: {shown}. "
                    f"The last checkpoint in {run.out} is intact: check the data (python -m demos.check) or "
                    f"lower --lr")


# ----------------------------------------------------------------------------------------------------------
# Evaluate and finish


def arenas(options):
    """Where to act: {robot: environment}; a single robot has no name."""
    found = {None: options.env or options.data or "tabletop"}
    if options.robots:
        found = {name: spec.get("data", name) for name, spec in options.robots.items()}
    return {name: env for name, env in found.items() if isinstance(env, dict) or env in ENVIRONMENTS}


def evaluate(run, acting):
    """A row of metrics: held-out loss and error of sampled actions; with `acting` also the closed loop."""
    options = run.options
    row = {"step": run.step} | validate(run.shown, run.held_out, run.normalizer, options.seed)
    if run.normalizer is None:
        return row | compare_samples(run.shown, run.held_out, options.seed, run.items if acting else None)
    for robot, environment in arenas(options).items() if acting and options.episodes else ():
        policy = Policy(run.shown, run.normalizer, run.description, device=run.device, seed=options.seed,
                        robot=robot)
        found = closed_loop(policy, environment, options.episodes, options.seed)
        if robot:  # success_<robot>, ...; the films of all of them side by side
            films = row.get("rollouts", []) + found.pop("rollouts")[:3]
            found = {f"{key}_{robot}": value for key, value in found.items()} | {"rollouts": films}
        row |= found
    return row


def rehearse_all(run):
    """Every environment is opened, reset and stepped once: what is wrong with it costs no training."""
    for robot, world in arenas(run.options).items() if run.normalizer and run.options.episodes else ():
        rehearse(Policy(run.shown, run.normalizer, run.description, robot=robot), world)


def evaluations_due(run):
    """-> whether the held-out loss and whether the closed loop is due at this step, but the last."""
    return [bool(every) and run.step % every == 0 and 0 < run.step < run.options.steps
            for every in (run.options.eval_every, run.options.rollout_every)]


def evaluate_on_the_way(run):
    collect(run)
    if run.main:
        row = evaluate(run, acting=evaluations_due(run)[1])
        row.pop("rollouts", None)
        log(run, row)
        keep_best(run)
        if run.options.fsdp:
            run.shown.to("cpu")  # its device has no room to spare


def finish(run):
    """The last evaluation, result.json and the report. -> the dict of result.json"""
    collect(run)
    result, options = {}, run.options
    if run.main:
        row = evaluate(run, acting=True)
        rollouts = row.pop("rollouts", [])
        log(run, row)
        result = {"model": options.model, "preset": options.preset, "parameters": n_parameters(run.shown),
                  "train_seconds": round(run.seconds, 1), "device": run.device.type} | row
        result.pop("loss_t", None)  # drawn as a curve
        write_json(run.out / "result.json", result)
        from tools.report import write_of_run  # nothing is imported for the start that the end needs alone
        write_of_run(run, result, rollouts, arenas(options))
        print(json.dumps(result))
        print(f"wrote checkpoint.pt, metrics.jsonl, result.json and report.html to {run.out}")
    distributed.leave()
    return result


def announce(run):
    """Print what is going to be trained on what, and begin metrics.jsonl."""
    print(json.dumps({"options": dataclasses.asdict(run.options), "config": dataclasses.asdict(run.config)}))
    print(f"{run.options.model}: {n_parameters(run.shown):,} parameters, {len(run.items):,} training and "
          f"{len(run.held_out):,} held-out items, {run.device.type}, {str(run.dtype)[6:]}")
    if run.normalizer is not None:
        print(run.normalizer.summary())
    write_rows(run.out / "metrics.jsonl", run.rows)


def train(options, module, release=None):
    """Train, evaluate, write all to options.out. release: weights to start from. -> dict of result.json"""
    device, dtype = pick_device(options.device, options.dtype)
    rank, world = distributed.join(device, options.fsdp)
    speed.keep_memory()
    out = prepare_out(options)
    distributed.wait()  # all have looked before one writes
    with locked(out, rank):
        return carry_out(prepare(options, module, out, device, dtype, rank, world, release))


def carry_out(run):
    """From the first step to the report."""
    options = run.options
    stream = data.batches(run.items, options.batch_size, options.seed, run.step * options.grad_accum,
                          run.rank, run.world, options.workers)
    died = None
    try:
        if run.main:
            rehearse_all(run)
            announce(run)
        if not options.resume:
            save(run)
        if any(evaluations_due(run)) and not any(r["step"] == run.step and "lr" not in r for r in run.rows):
            evaluate_on_the_way(run)  # what was interrupted after its checkpoint and before this
        loop(run, stream)
    except torch.OutOfMemoryError as e:
        raise UserError(f"step {run.step + 1} needs more memory than {run.device} has ({one_line(e)[:120]}): "
                        f"lower --batch_size and raise --grad_accum") from None
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as e:  # at any place of the loop
        if not options.workers or isinstance(e, RuntimeError) and "DataLoader worker" not in str(e):
            raise
        died = one_line(e)[:99] or type(e).__name__
        worker_is_mourned()
    finally:
        stream.close()  # the workers that are left end here
    if died:  # raised here, where nothing of the loop is held any more
        raise UserError(f"a worker process died ({died}): go on with --resume")
    release_signals()  # all is saved: from here on an interruption costs the evaluation only
    return finish(run)


def main(argv=None):
    options, explicit, release = with_release(*parse_options(sys.argv[1:] if argv is None else argv))
    module = load_module(options.model)
    options = with_recipe(options, explicit, module)
    if options.explain:
        from tools.explain import explain_one_batch
        return explain_one_batch(options, module)
    return train(options, module, release)


if __name__ == "__main__":
    with distributed.whole_exit():
        run_command(main)
