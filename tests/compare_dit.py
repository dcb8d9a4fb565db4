"""dit.py measured. Run by hand, on an idle machine:

    python tests/compare_dit.py --conditionings [STEPS]     # four conditionings, the same budget, 3 seeds
    git clone https://github.com/facebookresearch/DiT
    python tests/compare_dit.py DiT                         # forward pass beside the original's, same weights

The first trains one autoencoder on the generated shapes, and on its latents the transformer of the tiny
preset with each conditioning for STEPS steps (default 2500), same batches, noise and learning rate. It
prints parameters, milliseconds per step, validation loss, and how many guided samples a classifier takes for
the class asked for. The second times S/2 at batch 4 and XL/2 at batch 1 in float32, the two in turns, and
prints the largest difference of their outputs too.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch starts its threads
import copy
import dataclasses
import importlib.util
import statistics
import sys
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import dit  # noqa: E402
import sample  # noqa: E402
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


class Attention(torch.nn.Module):
    """What the original takes from timm, with that package's names: attention, MLP, patches."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, **kwargs):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim, bias=qkv_bias), torch.nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(torch.nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop=0):
        super().__init__()
        self.fc1, self.act = torch.nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = torch.nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(torch.nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = torch.nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def load_original(folder):
    """The original's models.py; timm itself if it is installed, else the stand-ins above."""
    path = Path(folder) / "models.py"
    if not path.exists():
        sys.exit(f"{path} is not there: give the folder of a checkout of facebookresearch/DiT")
    try:
        import timm.models.vision_transformer  # noqa: F401
    except ImportError:
        for name in ("timm", "timm.models", "timm.models.vision_transformer"):
            sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(Attention=Attention, Mlp=Mlp, PatchEmbed=PatchEmbed)
        print("timm is not installed: its three modules are replaced by equal ones")
    spec = importlib.util.spec_from_file_location("original_dit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def beside_original(folder, repeat=7):
    module = load_original(folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    print(f"{'':20}{'original':>12}{'ours':>12}{'ratio':>8}")
    for preset, B in (("S/2", 4), ("XL/2", 1)):
        torch.manual_seed(0)
        theirs = module.DiT_models[f"DiT-{preset}"](input_size=32, num_classes=1000).eval()
        for p in theirs.parameters():                               # else much of it is zero
            torch.nn.init.normal_(p, std=0.02)
        changes = {"data_shape": (4, 32, 32), "vae_channels": ()}   # latents as they are
        config = dit.Config(**dit.PRESETS[preset] | changes)
        ours = dit.DiT.from_official(theirs.state_dict(), config).eval()
        x, t, y = torch.randn(B, 4, 32, 32), torch.full((B,), 500), torch.arange(B)
        passes = (lambda: theirs(x, t, y), lambda: ours.net(x, ours.net.condition(t, y)))
        with torch.no_grad():
            error = (passes[0]() - passes[1]()).abs().max().item()
            times = ([], [])
            for _ in range(repeat):                                 # in turns: both meet the same machine
                for mine, run in zip(times, passes):
                    began = time.perf_counter()
                    run()
                    mine.append((time.perf_counter() - began) * 1e3)
        a, b = (statistics.median(mine) for mine in times)
        print(f"{f'{preset}, batch {B}':20}{a:>9.0f} ms{b:>9.0f} ms{b / a:>8.2f}   differ by {error:.1e}",
              flush=True)


def main():
    if sys.argv[1:2] == ["--conditionings"]:
        conditionings(int(sys.argv[2]) if len(sys.argv) > 2 else 2500)
    elif len(sys.argv) == 2:
        beside_original(sys.argv[1])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
