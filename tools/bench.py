"""What a model file costs: `python -m tools.bench --model dp_cnn --preset lowdim` prints one JSON line.

    step_ms, data_ms     one training step (loss, backward, AdamW, EMA) and the fetching of its batch
    samples_per_s        batch_size / step
    gflops               arithmetic per second achieved in forward and backward, by torch's FLOP counter
    sample_ms            {sampler and steps: milliseconds for one chunk (or image, or point) at batch 1}
    bf16_error           with --dtype bfloat16: largest difference from the float32 chunk, normalised units
    peak_mb              largest memory of the process (CPU) or of the device (CUDA)

Medians over repetitions after a warm-up; the numbers mean something on an idle machine only. --regression
trains the regression baseline of the built-in task instead: the network of dp_cnn.py, asked for the mean.
"""
import copy
import dataclasses
import json
import math
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from demos.dataset import open_demos
from demos.generated import new_hdf5
from demos.images import Samples
from robot.cli import Parser
from robot.errors import run_command
from robot.models import load_module, pick_device
from tools import regression
from tools.options import Options, make_config, parse_set
from tools.starting import check_size, one_model


def random_demos(config, folder):
    """A file of random demonstrations with the shapes of `config`: fetching is then measured as it is."""
    rng, path = np.random.default_rng(0), Path(folder) / "random.hdf5"
    with new_hdf5(path) as f:
        f.create_group("data").attrs["fps"] = 10.0
        for i in range(20):
            demo = f.create_group(f"data/demo_{i}")
            demo.attrs["num_samples"] = 100
            demo["actions"] = rng.uniform(-1, 1, (100, config.action_dim)).astype(np.float32)
            demo["obs/state"] = rng.uniform(-1, 1, (100, config.state_dim)).astype(np.float32)
            for v in range(config.n_cameras):
                demo[f"obs/camera_{v}"] = rng.integers(0, 256, (100, *config.image_size, 3), dtype=np.uint8)
    return path


def random_codes(config, n):
    """Texts of full length, in any vocabulary, without its tokenizer."""
    return torch.randint(1, getattr(config, "vocab_size", 257), (n, config.text_len))


def random_items(config, device, folder):
    """Items as train.py sees them, for the shapes of `config`."""
    if hasattr(config, "data_shape"):
        x, label = torch.randn(1000, *config.data_shape), torch.randint(max(1, config.n_classes), (1000,))
        label = label.numpy() if config.n_classes else None
        return Samples("random", x, label, range(config.n_classes))
    demos = open_demos(random_demos(config, folder), obs=getattr(config, "obs", "image"),
                            text=hasattr(config, "text_len"))
    return data.Windows(demos, data.fit_normalizer(demos), config.pred_horizon, config.n_obs_steps,
                        config.first_action, config.n_obs_loaded, getattr(config, "text_len", 0),
                        device=device, encode=lambda texts, _: random_codes(config, len(texts)))


def median_ms(function, device, repeat):
    """Median time of function() in milliseconds, after two calls that do not count."""
    times = []
    for _ in range(repeat + 2):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times[2:]) * 1e3, 3)


def time_training(model, batch, device, dtype, compile, repeat):
    """-> (milliseconds of a training step, floating point operations of its forward and backward)"""
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-4, fused=device.type in ("cuda", "cpu"))
    loss_step = train.LossStep(model)
    loss_step = torch.compile(loss_step) if compile else loss_step

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_step(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.001)

    step_ms = median_ms(step, device, repeat)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)["loss"].backward()
    model.zero_grad()
    return step_ms, counter.get_total_flops()


def time_sampling(model, batch, device, dtype, repeat):
    """-> ({sampler: milliseconds at batch 1}, {sampler: error of bfloat16 weights} or {})"""
    batch = {k: v[:1] for k, v in batch.items()}
    fast = copy.deepcopy(model).to(dtype)
    sample_ms, error = {}, {}
    for name, sampler, steps in samplers(model.config):
        for m in (model, fast):
            m.config = dataclasses.replace(m.config, **({"sampler": sampler} if sampler else {}))
        sample_ms[name] = median_ms(lambda: fast.sample(batch, steps=steps), device, max(3, repeat // 3))
        if dtype != torch.float32:
            chunks = [m.sample(batch, steps, generator=torch.Generator().manual_seed(0))
                      for m in (model, fast)]
            error[name] = round((chunks[0] - chunks[1]).abs().max().item(), 5)
    return sample_ms, error


def bench(options, repeat):
    device, dtype = pick_device(options.device, options.dtype)
    module = load_module(options.model)
    config = make_config(module, options, {})
    with one_model(options.model):
        return measure(options, module, config, device, dtype, repeat)


def measure(options, module, config, device, dtype, repeat):
    with torch.device("meta"):
        check_size(module.Model(config), device)
    torch.manual_seed(0)
    model = module.Model(config).to(device)
    with tempfile.TemporaryDirectory() as folder:
        stream = data.batches(random_items(config, device, folder), options.batch_size, seed=0)
        data_ms = median_ms(lambda: next(stream), device, repeat)
        batch = {k: v.to(device) for k, v in next(stream)[1].items()}
    step_ms, flops = time_training(model, batch, device, dtype, options.compile, repeat)
    sample_ms, error = time_sampling(model.eval(), batch, device, dtype, repeat)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"model": options.model, "preset": options.preset, "device": device.type,
            "parameters": sum(p.numel() for p in model.parameters()), "batch_size": options.batch_size,
            "dtype": str(dtype).removeprefix("torch."), "compile": options.compile,
            "threads": torch.get_num_threads(), "step_ms": step_ms, "data_ms": data_ms,
            "samples_per_s": round(options.batch_size / step_ms * 1e3, 1),
            "gflops": round(flops / step_ms / 1e6, 1), "sample_ms": sample_ms, "bf16_error": error,
            "peak_mb": round(peak)}


def samplers(config):
    """(name, value of config.sampler or None, steps) of what is timed."""
    if getattr(config, "sampler", None) in ("ddim", "ddpm"):
        K = config.n_diffusion_steps
        return [("ddim 10", "ddim", 10), (f"ddpm {K}", "ddpm", K)]
    return [(f"{config.sampler_steps} steps", None, config.sampler_steps)]


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    defaults = Options()
    for name in ("model", "preset", "device", "dtype", "out"):
        parser.add_argument(f"--{name}", default=getattr(defaults, name))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=10, help="repetitions of what is timed")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--regression", action="store_true", help="train the regression baseline on tabletop")
    parser.add_argument("--steps", type=int, default=0, help="of --regression; default: as dp_cnn")
    ranges = {"batch_size": (1, 10**6), "repeat": (1, 10**6), "steps": (0, math.inf)}
    args = vars(parser.parse(argv, ranges))
    args["set"] = parse_set(args["set"])
    repeat, baseline, steps = args.pop("repeat"), args.pop("regression"), args.pop("steps")
    options = Options(**args)
    if not baseline:
        print(json.dumps(bench(options, repeat)))
        return
    recipe = regression.MODULE.RECIPES["tiny"]
    recipe = recipe | ({"steps": steps} if steps else {})
    options = dataclasses.replace(options, model="dp_cnn", out=options.out or "out/regression", **recipe)
    train.train(options, regression.MODULE)


if __name__ == "__main__":
    run_command(main)
