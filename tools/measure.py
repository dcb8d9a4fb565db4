"""What one model file costs, measured in this process: a training step, a chunk, the memory, the machine.

A time alone says little: `share` says how near it is to what the machine can do at best. That is the longer
of two times: the arithmetic (torch's FLOP counter) at the speed of a large product, and the weights that are
read (`WeightReads`) at the speed of a large read. Both speeds are measured in the same process (`ceilings`),
because a machine that others use, too, is not equally fast in every minute.
"""
import copy
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from demos.dataset import open_demos
from demos.generated import new_hdf5
from demos.images import Samples
from robot import packing
from robot.graph import Graph
from tools.speed import compiled, keep_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------
# Random data of the right shapes

def random_demos(config, folder):
    """A file of random demonstrations with the shapes of `config`: fetching is then measured as it is."""
    rng, path = np.random.default_rng(0), Path(folder) / "random.hdf5"
    with new_hdf5(path) as f:
        f.create_group("data").attrs["fps"] = 10.0
        for i in range(4):
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


def random_tokens(config, n):
    """A batch for encoders="none" (RDT): all pictures, and an instruction of 32 codes, as tokens."""
    pictures = config.n_obs_steps * config.cameras
    return {"state": torch.rand(n, config.n_obs_steps, config.state_dim) * 2 - 1,
            "actions": torch.rand(n, config.horizon, config.action_dim) * 2 - 1,
            "action_mask": torch.ones(n, config.horizon, dtype=torch.bool),
            "image_embeds": torch.randn(n, pictures * config.tokens_per_image, config.vit_width),
            "lang_embeds": torch.randn(n, min(32, config.text_len), config.t5_width),
            "background_embeds": torch.randn(n, config.tokens_per_image, config.vit_width),
            "empty_embeds": torch.randn(n, 1, config.t5_width)}


class Batches:
    """Batches of any size for a Config, from a file that is written once and removed with `close`."""

    def __init__(self, config, device):
        self.config, self.device, self.items = config, device, None
        if getattr(config, "encoders", "") != "none":
            self.folder = tempfile.TemporaryDirectory()
            self.items = random_items(config, device, self.folder.name)

    def __call__(self, n):
        if self.items is None:
            batch = random_tokens(self.config, n)
        else:
            batch = next(data.batches(self.items, n, seed=0))[1]
        return {k: v.to(self.device) for k, v in batch.items()}

    def fetch_ms(self, n, repeat):
        """Median milliseconds in which a training run gets n items; None if they are made here."""
        if self.items is None:
            return None
        stream = data.batches(self.items, n, seed=0)
        return median_ms(lambda: next(stream), self.device, repeat)

    def close(self):
        if self.items is not None:
            self.folder.cleanup()


# ----------------------------------------------------------------------------------------------------------
# Times, arithmetic, bytes

def times_ms(function, device, repeat, seconds=math.inf, warm=2):
    """Milliseconds of `repeat` calls, after `warm` that do not count. After `seconds` it ends: the last call
    counts then, and at most one was for warming up."""
    times, start = [], time.perf_counter()
    while len(times) < warm + repeat:
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
        if len(times) > min(warm, 1) and time.perf_counter() - start > seconds:
            break
    return times[warm:] or times[-1:]


def median_ms(function, device, repeat):
    return round(statistics.median(times_ms(function, device, repeat)), 3)


# torch's counter does not know the product that robot/packing.py calls: x (..., I), weight (O, I).
ONEDNN = {}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    ONEDNN[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]


class WeightReads(TorchDispatchMode):
    """Counts the bytes of parameters that operations inside a `with` block read. What every step of a sampler
    uses counts every time; of a table count the rows that are looked up."""

    def __init__(self, model):
        super().__init__()
        self.own, self.total = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [x for x in args if isinstance(x, torch.Tensor) and not func.is_view
                and (x.is_mkldnn or x.untyped_storage().data_ptr() in self.own)]    # packed, or as they are
        if func is torch.ops.aten.embedding.default:
            read = [out]
        self.total += sum(x.numel() * x.element_size() for x in read)
        return out


def count(function, model):
    """-> (floating point operations, bytes of parameters read) of function()"""
    with WeightReads(model) as reads, FlopCounterMode(display=False, custom_mapping=ONEDNN) as flops:
        function()
    return flops.get_total_flops(), reads.total


def ceilings(device):
    """What the machine does at best, now: {"float32", "bfloat16": GFLOP/s of a product, "read": GB/s}"""
    n, size = (2048, 2**27) if device.type == "cpu" else (8192, 2**30)
    best = {}
    for name, dtype in DTYPES.items():
        own = device.type == "cuda" or dtype in packing.types()
        side = n if own else 512        # without instructions for it, a CPU takes 13 s for 2,048 in bfloat16
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products = [lambda: a @ b]
        if ONEDNN and device.type == "cpu" and own:                         # float32: twice MKL's on AMD
            products.append(lambda: packing.onednn(a, b))
        best[name] = round(2e-6 * side**3 / min(median_ms(product, device, 5) for product in products), 1)
    x = torch.ones(size, device=device)
    best["read"] = round(x.nbytes / median_ms(x.sum, device, 5) / 1e6, 1)
    return best


def share(ms, found, best, dtype):
    """The nearer of the two ceilings, as a share of 1, and its name. found: {"flops", "bytes"} of `ms`."""
    bounds = {"arithmetic": found["flops"] / best[dtype] / 1e6,
              "reading": found.get("bytes", 0) / best["read"] / 1e6}
    nearer = max(bounds, key=bounds.get)
    return float(f"{bounds[nearer] / ms:.3g}"), nearer          # of a small network, far below 0.001


def machine(device):
    """What times depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            facts = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        name = facts.get("model name", name) + " with avx512_bf16" * ("avx512_bf16" in facts.get("flags", ""))
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(),
            "torch": torch.__version__.partition("+")[0]}


def peak_mb(device):
    """The largest memory so far: of the process, that is of weights, data and torch itself, or of the GPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def free_gb(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return kilobytes["MemAvailable"] * 1024 / 1e9
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def does_not_fit(what, nbytes, device):
    """The reason, or "" if it fits with a tenth to spare."""
    if nbytes < 0.9e9 * free_gb(device):
        return ""
    return f"{what} take {nbytes / 1e9:.1f} GB, {device.type} has {free_gb(device):.1f} GB free"


# ----------------------------------------------------------------------------------------------------------
# What is measured

def training_step(model, batch, device, dtype, compile):
    """A function that trains on the batch as train.py does: loss, backward, AdamW, EMA."""
    keep_memory()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-4, fused=device.type in ("cuda", "cpu"))
    loss_step = train.LossStep(model)
    loss_step = compiled(loss_step) if compile else loss_step

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_step(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.001)
    return step


def time_training(model, batch, device, dtype, compile, repeat, seconds=math.inf):
    """-> (milliseconds of a training step, floating point operations of its forward and backward)"""
    step = training_step(model, batch, device, dtype, compile)
    # Of a large network the first two steps take twice as long: AdamW's moments and all memory are new.
    times = times_ms(step, device, 3) + times_ms(step, device, repeat, seconds, warm=0)
    step_ms = round(statistics.median(times), 3)
    flops, _ = count(lambda: model.loss(batch)["loss"].backward(), model)
    model.zero_grad()
    return step_ms, flops


def samplers(config):
    """(name, value of config.sampler or None, steps or None) of what is timed."""
    if getattr(config, "sampler", None) in ("ddim", "ddpm"):
        K = config.n_diffusion_steps
        return [("ddim 10", "ddim", 10), (f"ddpm {K}", "ddpm", K)]
    if getattr(config, "solver", "") == "dopri5":
        return [("dopri5", None, None)]             # it chooses its steps
    return [(f"{config.sampler_steps} steps", None, config.sampler_steps)]


def chunk_costs(model, batch, steps):
    """-> (floating point operations, bytes of weights read, seconds with the counting) of a chunk in so many
    steps: computed from one step and two, since every further step costs the same. A first call packs the
    weights."""
    costs = []
    for n in (1, 1, 2) if steps else (None,):
        began = time.perf_counter()
        counts = count(lambda: model.sample(batch, steps=n), model)
        costs.append((*counts, time.perf_counter() - began))
    further = (steps or 1) - 1
    one, two = costs[-2:] if steps else costs * 2
    return [a + further * max(0, b - a) for a, b in zip(one, two)]


def chunk_seconds(model, batch, steps, device, seconds):
    """How long a chunk takes, computed from one step and from as many as take about `seconds`."""
    took = lambda n: statistics.median(
        times_ms(lambda: model.sample(batch, steps=n), device, 3, warm=0)) / 1e3
    one = took(1)
    few = min(steps, max(2, int(seconds / one)))
    return one + (steps - 1) * max(0, took(few) - one) / (few - 1)


def time_chunk(model, batch, steps, device, repeat, seconds, compile=False):
    """{"flops", "bytes", "p50_ms", "p95_ms", "runs"} at batch 1. Where a chunk would take more than ten times
    `seconds`: "about_ms", computed from its first steps, in place of the last three. compile: the sampler as
    one graph, and "compile_s"."""
    flops, nbytes, took = chunk_costs(model, batch, steps)
    result = {"flops": flops, "bytes": nbytes}
    if took > 10 * seconds and (steps or 1) > 1:
        took = chunk_seconds(model, batch, steps, device, seconds)
    if took > 10 * seconds:
        return result | {"about_ms": round(took * 1e3)}
    sample = lambda: model.sample(batch, steps=steps)
    if compile:
        began = time.perf_counter()
        graph = Graph(lambda batch, **noise: model.sample(batch, steps=steps, **noise), model, batch)
        result["compile_s"] = round(time.perf_counter() - began, 1)
        sample = lambda: graph(batch)
    times = times_ms(sample, device, repeat, seconds, warm=int(took < seconds))
    p50, p95 = np.percentile(times, (50, 95)).round(3).tolist()
    return result | {"p50_ms": p50, "p95_ms": p95, "runs": len(times)}

