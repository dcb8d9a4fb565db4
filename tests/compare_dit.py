"""dit.py's four conditionings on the same budget. Run by hand, on an idle machine:

    python tests/compare_dit.py [STEPS]

trains one autoencoder on the generated shapes, and on its latents the transformer of the tiny preset with
each conditioning for STEPS steps (default 2500): same batches, noise and learning rate, 3 seeds. It prints
parameters, milliseconds per step, validation loss, and how many guided samples a classifier takes for the
class asked for.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch starts its threads
import copy
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import dit  # noqa: E402
import train  # noqa: E402
from demos.images import open_samples
from tools.quality import compare_samples

RECIPE = dit.RECIPES["tiny"]


def fit(model, items, steps, seed):
    """The train loop without its files: -> (averaged model, median milliseconds of a step)"""
    torch.manual_seed(seed)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    groups = model.param_groups(RECIPE["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=RECIPE["betas"], fused=True)
    stream, times = data.batches(items, RECIPE["batch_size"], seed), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RECIPE["lr"] * train.lr_factor(step, RECIPE["warmup"], steps)
        _, batch = next(stream)
        train.seed_step(seed, step, 0)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=RECIPE["dtype"] == "bfloat16"):
            loss = model.loss(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip"])
        optimizer.step()
        optimizer.zero_grad()
        decay = train.ema_decay(step, max_value=RECIPE["ema_max"])
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        times.append(time.perf_counter() - began)
    return ema, statistics.median(times) * 1e3


def conditionings(steps, seeds=3):
    items, held_out = (open_samples("shapes", RECIPE["demos"], split=split)
                       for split in ("train", "valid"))
    config = dit.Config()
    torch.manual_seed(0)
    autoencoder, ms = fit(dit.DiT(config), items, config.vae_steps, seed=0)
    vae = autoencoder.vae.state_dict()
    print(f"shapes, {len(items)} images; autoencoder {config.vae_steps} steps of {ms:.0f} ms, then {steps} "
          f"steps of {RECIPE['batch_size']}; {seeds} seeds; {torch.get_num_threads()} thread(s)\n")
    print("| conditioning | parameters | ms per step | loss | mse | accuracy of samples | of real images |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in dit.CONDITIONINGS:
        rows = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = dit.DiT(dataclasses.replace(config, conditioning=name, vae_steps=0))
            model.vae.load_state_dict(vae)
            model.seen = 0                                          # its weights are there
            ema, ms = fit(model, items, steps, seed)
            batch = held_out.batch(torch.arange(min(256, len(held_out))))
            torch.manual_seed(0)
            with torch.no_grad():
                losses = [ema.loss(batch) for _ in range(8)]
            mean = lambda key: statistics.mean(out[key].item() for out in losses)
            result = compare_samples(ema, held_out, 0, items)
            rows.append((ms, mean("loss"), mean("mse"), 100 * result["accuracy_samples"],
                         100 * result["accuracy_real"]))
        n = sum(p.numel() for p in model.net.parameters())
        spread = lambda values, digits: (f"{statistics.mean(values):.{digits}f} +- "
                                         f"{statistics.stdev(values):.{digits}f}")
        ms, loss, mse, samples, real = zip(*rows)
        print(f"| {name} | {n:,} | {statistics.median(ms):.0f} | {spread(loss, 4)} | {spread(mse, 4)} | "
              f"{spread(samples, 1)} % | {statistics.mean(real):.1f} % |", flush=True)


if __name__ == "__main__":
    conditionings(int(sys.argv[1]) if len(sys.argv) > 1 else 2500)
