"""What a model file costs: `python -m tools.bench --model dp_cnn --preset lowdim` prints one JSON line.

    training      {dtype: ms of a step (loss, backward, AdamW, EMA), samples_per_s, flops, gflops, share}
    data_ms       fetching a batch of batch_size
    chunk         {sampler: {dtype: p50_ms, p95_ms, flops, bytes, share, of}} of a chunk (or image, or point)
                  at batch 1. about_ms: computed from its first steps, for one that takes too long. error: the
                  largest difference of the bfloat16 chunk from the float32 one, normalised units. compile_s:
                  seconds that --compile took
    share, of     how near to the nearer ceiling, "arithmetic" or "reading", of 1 (tools/measure.py)
    ceilings      GFLOP/s of a large product in both types, GB/s of a large read, measured after the rest
    peak_mb       largest memory: up to the chunks' end, and in all
    left_out      {what: why}

The numbers mean something on an idle machine only. More:

    python -m tools.bench --all                 every file and preset, each in a process of its own
    python -m tools.bench --against dit=FOLDER  beside a peer, in turns (tools/against.py)
    python -m tools.bench --memory              what the largest presets take on 1, 8 and 64 GPUs
    python -m tools.bench --regression          trains the regression baseline of the built-in task: the
                                                network of dp_cnn.py, asked for the mean
"""
import dataclasses
import datetime
import json
import math

import torch

import train
from robot.cli import Parser
from robot.errors import UserError, run_command
from robot.models import load_module, pick_device
from robot.packing import pack
from tools import measure, regression
from tools.options import Options, make_config, parse_set
from tools.runs import frozen_names
from tools.starting import one_model

# Without --batch_size a step is to take about so much arithmetic (CPU, GPU): seconds, or fractions of one.
WORK = {"cpu": 4e11, "cuda": 4e13}
MOST_COMPILED = 20      # steps: compiling takes time for each of them


class Bench:
    """One file and preset on its device; `row` is filled part by part."""

    def __init__(self, options, repeat, seconds):
        self.options, self.repeat, self.seconds = options, repeat, seconds
        self.device, _ = pick_device(options.device, options.dtype)
        self.dtypes = list(measure.DTYPES) if options.dtype == "auto" else [options.dtype]
        self.module = load_module(options.model)
        self.config = make_config(self.module, options, {})
        if getattr(self.config, "obs", "") == "image" and not self.config.n_cameras:
            self.config = dataclasses.replace(self.config, n_cameras=2)         # as the built-in task
        if getattr(self.config, "vae_channels", ()) and not self.config.vae_steps:
            # Its autoencoder is somebody else's: the transformer alone, in latents, as --against dit has it.
            self.config = dataclasses.replace(self.config, data_shape=self.config.latent_shape,
                                              vae_channels=())
        with torch.device("meta"):
            self.outline = self.module.Model(self.config)
        self.row = {"model": options.model, "preset": options.preset, "machine": measure.machine(self.device),
                    "date": datetime.date.today().isoformat(), "compile": options.compile,
                    "parameters": sum(p.numel() for p in self.outline.parameters()), "batch_size": 0,
                    "data_ms": None, "training": {}, "chunk": {}, "left_out": {}}
        self.row["left_out"] = self.too_large()

    def too_large(self):
        """{"training" or "chunk, bfloat16" ..: the memory that it takes and what there is}; nothing is built
        yet."""
        n, frozen = self.row["parameters"], frozen_names(self.outline)
        parts = {f"chunk, {dtype}": ("the weights, if all are packed,", n * (8 if dtype == "float32" else 4))
                 for dtype in self.dtypes}
        # Frozen weights have neither gradient nor moments nor average.
        parts["training"] = ("weights, gradients, Adam's moments and the average", sum(
            p.numel() * (4 if name in frozen else 20) for name, p in self.outline.named_parameters()))
        reasons = {what: measure.does_not_fit(*part, self.device) for what, part in parts.items()}
        return {what: why for what, why in reasons.items() if why}

    def measure(self):
        """-> the row. UserError if nothing of it fits."""
        if len(self.row["left_out"]) > len(self.dtypes):
            why = "; ".join(f"{what}: {why}" for what, why in self.row["left_out"].items())
            raise UserError(f"{self.row['model']} {self.row['preset']}: {why}")
        batches = measure.Batches(self.config, self.device)
        try:
            model = self.build()
            self.chunks(model, batches(1))
            self.row["peak_mb"] = {"chunk": measure.peak_mb(self.device)}
            if "training" not in self.row["left_out"]:
                self.training(model, batches)
            self.row["peak_mb"]["all"] = measure.peak_mb(self.device)
        finally:
            batches.close()
        best = self.row["ceilings"] = measure.ceilings(self.device)
        for kind in (self.row["training"], *self.row["chunk"].values()):
            for dtype, found in kind.items():
                ms = found.get("ms") or found.get("p50_ms") or found["about_ms"]
                found["share"], found["of"] = measure.share(ms, found, best, dtype)
        return self.row

    def build(self):
        """The model, packed as a robot has it; as bfloat16 from the beginning if float32 does not fit."""
        torch.manual_seed(0)
        small = "chunk, float32" in self.row["left_out"]
        torch.set_default_dtype(torch.bfloat16 if small else torch.float32)
        try:
            return pack(self.module.Model(self.config).to(self.device))
        finally:
            torch.set_default_dtype(torch.float32)

    def chunks(self, model, batch):
        """Every sampler in every type, with the same noise."""
        first = {}
        model.eval().requires_grad_(False)              # weights that are trained are not packed
        for dtype in self.dtypes:
            if f"chunk, {dtype}" in self.row["left_out"]:
                continue
            model.to(measure.DTYPES[dtype])
            for name, sampler, steps in measure.samplers(self.config):
                if sampler:
                    model.config = dataclasses.replace(model.config, sampler=sampler)
                few = self.options.compile and "state" in batch and steps and steps <= MOST_COMPILED
                found = measure.time_chunk(model, batch, steps, self.device, self.repeat, self.seconds, few)
                self.row["chunk"].setdefault(name, {})[dtype] = found
                if "p50_ms" in found and len(self.dtypes) > 1:
                    chunk = model.sample(batch, steps, generator=torch.Generator().manual_seed(0)).float()
                    if name in first:
                        found["error"] = round((chunk - first[name]).abs().max().item(), 5)
                    first[name] = chunk

    def training(self, model, batches):
        model, B = model.float().train(), self.options.batch_size
        for p, its in zip(model.parameters(), self.outline.parameters()):
            p.requires_grad_(its.requires_grad)
        if not B:
            one = batches(1)
            flops, _ = measure.count(lambda: model.loss(one)["loss"].backward(), model)
            B = min(64, 2 ** max(0, int(math.log2(WORK.get(self.device.type, WORK["cpu"]) / flops))))
            model.zero_grad()
        self.row |= {"batch_size": B, "data_ms": batches.fetch_ms(B, self.repeat)}
        batch = batches(B)
        for dtype in self.dtypes:
            ms, flops = measure.time_training(model, batch, self.device, measure.DTYPES[dtype],
                                              self.options.compile, self.repeat, self.seconds)
            self.row["training"][dtype] = {"ms": ms, "samples_per_s": round(B / ms * 1e3, 1), "flops": flops,
                                           "gflops": round(flops / ms / 1e6, 1)}


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    defaults = Options()
    for name in ("model", "preset", "device", "dtype", "out"):
        parser.add_argument(f"--{name}", default=getattr(defaults, name) if name != "preset" else "")
    parser.add_argument("--batch_size", type=int, default=0, help="default: by the arithmetic")
    parser.add_argument("--repeat", type=int, default=30, help="repetitions of what is timed, at most")
    parser.add_argument("--seconds", type=float, default=3, help="time for each of them, about")
    parser.add_argument("--compile", action="store_true", help="the training step, and a policy's sampler of "
                        f"{MOST_COMPILED} steps at most")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--all", action="store_true", help="all files and presets, or of --model, --preset")
    parser.add_argument("--against", action="append", default=[], metavar="PEER[=FOLDER]")
    parser.add_argument("--memory", action="store_true", help="of training on 1, 8, 64 GPUs, computed")
    parser.add_argument("--regression", action="store_true", help="train the regression baseline on tabletop")
    parser.add_argument("--steps", type=int, default=0, help="of --regression; default: as dp_cnn")
    ranges = {"batch_size": (0, 10**6), "repeat": (1, 10**6), "seconds": (0, 10**5), "steps": (0, math.inf)}
    args = parser.parse(argv, ranges)
    if args.all:
        from tools import bench_all
        return bench_all.run(args)
    if args.against:
        from tools import against
        return against.run(args)
    options = {name: value for name, value in vars(args).items() if name in vars(defaults)}
    options = Options(**options | {"set": parse_set(args.set), "preset": args.preset or defaults.preset})
    if args.regression:
        return train_regression(options)
    if args.memory:
        return print(memory_of_training(options))
    with one_model(options.model):
        print(json.dumps(Bench(options, args.repeat, args.seconds).measure()))


def memory_of_training(options):
    """A table: gigabytes on 1, 8 and 64 GPUs, for the batch of the recipe and bfloat16 if none is given."""
    from tools import memory
    module = load_module(options.model)
    recipe = getattr(module, "RECIPES", {}).get(options.preset, {})
    B = options.batch_size or recipe.get("batch_size", Options().batch_size)
    with one_model(options.model):
        return memory.table(module, make_config(module, options, {}), B,
                            measure.DTYPES.get(options.dtype, torch.bfloat16))


def train_regression(options):
    recipe = regression.MODULE.RECIPES["tiny"]
    recipe = recipe | ({"steps": options.steps} if options.steps else {})
    out = options.out or "out/regression"
    train.train(dataclasses.replace(options, model="dp_cnn", out=out, **recipe), regression.MODULE)


if __name__ == "__main__":
    run_command(main)
