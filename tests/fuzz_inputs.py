"""Inputs as nobody should write them, each a function of its seed: test_fuzz.py feeds them to the commands.

A kind of input is a function (rng, base, folder) -> Case. It takes a sound input from Base, changes it (see
fuzz_changes.py), writes it into `folder`, and says which command reads it.
"""
import dataclasses
import importlib
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
import yaml
from fuzz_changes import (VALUES, WORDS, Payload, bomb, other_array, spoil_bytes, spoil_hdf5, spoil_place,
                          spoil_tree)
from golden_cases import Case as Golden
from helpers import TINY, save, write, write_aloha
from test_dp_cnn import policy_config

import sample
import train
from demos import check, convert
from demos.generated import tabletop_file
from robot.models import MODELS
from tools import bench, compare, options


def given(*fields):
    return [word for field in fields for word in ("--set", field)]


SHORT = ["--steps", "2", "--batch_size", "4", "--warmup", "1", "--log_every", "1", "--episodes", "0",
         "--device", "cpu", "--out", "out"]
CHAIN = given("n_diffusion_steps=4", "sampler_steps=2")
POLICY = ["--model", "dp_cnn", *SHORT, *CHAIN, *given(*TINY[:4])]
IMAGE = ["--preset", "tiny_image", *given("crop_size=[]", "resnet_widths=[16]", "n_keypoints=4")]
POINTS = ["--model", "ddpm", *SHORT, *CHAIN, *given("width=16", "depth=1"), "--demos", "200"]
PICTURES = given("channels=8", "channel_mult=[1]", "norm_groups=4", "n_res_blocks=1", "attn_resolutions=[]")
BENCH = ["--batch_size", "2", "--repeat", "1", "--seconds", "0", "--device", "cpu"]


@dataclass
class Case:
    main: object
    argv: list
    environ: dict = field(default_factory=dict)


class Base:
    """Sound inputs. run(main, argv) makes the runs."""

    def __init__(self, folder, run):
        def enrich(file):
            file["mask/train"] = np.array(["demo_0", "demo_1"], "S")
            file["mask/valid"] = np.array(["demo_2"], "S")
            for demo in file["data"].values():
                demo["success"] = np.ones(len(demo["actions"]))
                demo.attrs["rollout"] = int(demo.name[-1])
        self.demos = write(folder / "demos.hdf5", edit=enrich, fps=10.0, action_names='["a", "b"]',
                           env_args='{"env_kwargs": {"control_freq": 10}}')
        self.aloha = write_aloha(folder / "aloha", (5, 6, 4))
        rng = np.random.default_rng(0)
        images = {"x": rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), "y": np.arange(40) % 2,
                  "class_names": np.array(["cat", "dog"])}
        self.images = [save(folder / f"images.{suffix}", **images) for suffix in ("npz", "h5")]
        # Official weights, and the data and the Config that they fit.
        golden = Golden(Path(__file__).parent / "golden" / "train_steps_dp_cnn.npz")
        config = dataclasses.asdict(policy_config(golden))
        self.weights, self.wide = golden.sd, folder / "wide.hdf5"
        self.fields = given(*(f"{name}={list(value) if isinstance(value, tuple) else value}"
                              for name, value in config.items()))
        with h5py.File(self.wide, "w") as file:
            file.create_group("data").attrs["fps"] = 10.0
            for i in range(3):
                file[f"data/demo_{i}/actions"] = rng.normal(size=(20, config["action_dim"]))
                file[f"data/demo_{i}/obs/state"] = rng.normal(size=(20, config["state_dim"]))
        self.policy, self.generator = folder / "policy", folder / "generator"
        self.table = tabletop_file(False, 5, 0, folder)
        run(train.main, self.command(POLICY, self.table, out=self.policy))
        run(train.main, self.command(POINTS, None, out=self.generator))

    def command(self, argv=POLICY, data="", *more, out="out"):
        """A training run; data: None for what argv says itself."""
        argv = [str(out) if before == "--out" else word for before, word in zip(["", *argv], argv)]
        return argv + list(more) + ([] if data is None else ["--data", str(data or self.demos)])


def copied(path, folder):
    target = folder / path.name
    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return target


def spoil_file(rng, path, spoil):
    how = rng.random()
    (spoil_place if how < 0.06 else spoil_bytes if how < 0.3 else spoil)(rng, path)


# ----------------------------------------------------------------------------------------------------------
# Data


def hdf5(rng, base, folder):
    path = copied(base.demos, folder)
    spoil_file(rng, path, spoil_hdf5)
    more = rng.choice(([], IMAGE, ["--normalizer", "quantile"], ["--val_ratio", "0.3"]))
    return Case(check.main, [str(path)]) if rng.random() < 0.4 else Case(
        train.main, base.command(POLICY, path, *more))


def aloha(rng, base, folder):
    path = copied(base.aloha, folder)
    for file in rng.sample(sorted(path.iterdir()), rng.choice((1, 1, 3))):
        spoil_file(rng, file, spoil_hdf5)
    if rng.random() < 0.2:
        notes = path / "expanded_instruction.json"
        notes.write_text('{"instruction": "put it down"}')
        spoil_file(rng, notes, lambda rng, notes: notes.write_text(
            rng.choice(("{", "[]", '{"instruction": 3}', "\x00", "3", '{"instruction": [1]}'))))
    return Case(check.main, [str(path)]) if rng.random() < 0.5 else Case(
        train.main, base.command(POLICY, path, *rng.choice(([], IMAGE))))


def image_sets(rng, base, folder):
    path = copied(rng.choice(base.images), folder)
    spoil_file(rng, path, spoil_hdf5 if path.suffix == ".h5" else spoil_npz)
    argv = rng.choice((["--model", "ddpm", *CHAIN], ["--model", "flow_matching", *CHAIN[2:]]))
    return Case(check.main, [str(path)]) if rng.random() < 0.4 else Case(
        train.main, [*argv, *SHORT, *PICTURES, "--data", str(path)])


def spoil_npz(rng, path):
    arrays = dict(np.load(path))
    key, how = rng.choice(sorted(arrays)), rng.randrange(8)
    if how == 0:
        del arrays[key]
    elif how == 1:
        arrays[rng.choice(("x_train", "x_test", "y_test", "z", "../x", "y"))] = arrays.pop(key)
    elif how == 2:
        arrays[key] = np.array([Payload()], object)
    elif how == 3:
        arrays["y"] = arrays["y"] * rng.choice((-1, 10**6, 2**40)) + rng.choice((0, 1))
    else:
        arrays[key] = other_array(rng, arrays[key])
    np.savez(path, **arrays)
    if how == 2 and rng.random() < 0.5:
        path.write_bytes(pickle.dumps(Payload()))
    if how == 7:
        bomb(path)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints and weights


def checkpoint(rng, base, folder):
    run = copied(rng.choice((base.policy, base.policy, base.generator)), folder)
    policy = run.name == "policy"
    path = run / rng.choice(("checkpoint.pt",) * 9 + ("metrics.jsonl",))
    spoil_file(rng, path, spoil_checkpoint if path.suffix == ".pt" else spoil_bytes)
    argv = (POLICY, base.table) if policy else (POINTS, None)
    seen = ["--episodes", "1", "--device", "cpu", *(["--env", "tabletop"] if policy else [])]
    cases = [Case(sample.main, [str(run), *seen]),
             Case(train.main, base.command(*argv, out=run) + ["--resume"]),
             Case(train.main, base.command(*argv) + ["--init", str(run)])]
    if rng.random() < 0.3:
        cases.append(Case(compare.main, [str(run), str(base.generator), *seen]))
    return rng.choice(cases)


def spoil_checkpoint(rng, path):
    how = rng.random()
    if how < 0.08:
        return path.write_bytes(pickle.dumps({"format": 1, "weights": Payload()}))
    content = torch.load(path, weights_only=True)
    if how < 0.16:
        content[rng.choice(sorted(content))] = Payload()
    for _ in range(rng.choice((1, 1, 2))):
        spoil_tree(rng, content)
    torch.save(content, path)


def weights(rng, base, folder):
    path, content = folder / "weights.pt", dict(base.weights)
    if rng.random() < 0.15:
        content = rng.choice(({}, [], 3, Payload(), {"state_dict": content}, torch.zeros(3), {1: 2},
                              {"x": Payload()}))
    else:
        for _ in range(rng.choice((1, 2, 3))):
            spoil_tree(rng, content)
    torch.save(content, path)
    if rng.random() < 0.2:
        spoil_file(rng, path, spoil_bytes)
    if rng.random() < 0.1:
        path = path.rename(path.with_suffix(".safetensors"))
    return from_weights(base, path)


def from_weights(base, path):
    return Case(train.main, ["--model", "dp_cnn", *SHORT, *base.fields, "--data", str(base.wide), "--init",
                             str(path)])


# ----------------------------------------------------------------------------------------------------------
# YAML, flags and --set

TEXTS = (Path(__file__).parent / "fuzz_texts.txt").read_text(encoding="utf-8").split("\n----\n")
NESTED = "shape_meta: " + "{obs: " * 900 + "1" + "}" * 900
TEXTS += [NESTED, "steps: " + "9" * 5000, "steps: 0x" + "f" * 5000, "steps: 1\x00", "\ufeffsteps: 1",
          "\tsteps: 1"]
# What takes long is no mistake: of these only small numbers are tried.
LENGTHY = ("steps", "episodes", "demos", "minutes", "repeat", "batch_size", "workers", "grad_accum", "warmup")


def yaml_file(rng, base, folder):
    path, how = folder / "c.yaml", rng.random()
    if how < 0.45:
        text = "\n".join(rng.sample(TEXTS, rng.choice((1, 1, 2))))
    elif how < 0.9:
        name = rng.choice(sorted(vars(options.Options())))
        value = rng.choice(VALUES)
        if isinstance(vars(options.Options())[name], dict) and rng.random() < 0.8:
            inner = {rng.choice(("pos", "shape")): value}
            value = {rng.choice(("obs", "action", "a", "id", "success", "horizon")): inner}
        if type(value) is int:
            value = min(value, 3 if name in LENGTHY else 2**200)
        text = yaml.safe_dump({name: value})
    else:
        text = "steps: 1\nlr: 1.0e-3\nset:\n  horizon: 8\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if how > 0.85:
        spoil_file(rng, path, spoil_bytes)
    if rng.random() < 0.1:
        return Case(sample.main, [str(base.policy), "--config", str(path), "--episodes", "1"])
    argv = base.command() + ["--config", str(path)]
    flag = f"--{text.partition(':')[0]}"
    if flag in argv and flag not in ("--steps", "--config"):        # it would win over the YAML
        at = argv.index(flag)
        del argv[at:at + 2]
    return Case(train.main, argv)


LOOK = ("out", "env", "config", "episodes", "sampler_steps", "set", "robot", "without", "swap", "instruction",
        "seed", "device", "no_replay", "dtype", "help")
FLAGS = {train.main: tuple(name for name in vars(options.Options()) if name != "compile"),
         sample.main: LOOK,
         compare.main: (*LOOK, "minutes", "task", "only", "seeds", "demos", "preset", "data"),
         bench.main: ("model", "preset", "device", "dtype", "out", "batch_size", "repeat", "set", "steps"),
         check.main: ("help", "path"), convert.main: (
             "images", "fps", "instruction", "to", "image_size", "missing_zeros", "colour", "help")}


def flags(rng, base, folder):
    main = rng.choice((train.main, *FLAGS))
    argv = {train.main: base.command(), check.main: [str(base.demos)],
            sample.main: [str(base.generator), "--device", "cpu"],
            bench.main: ["--model", "dp_cnn", *BENCH, *given(*TINY[:4])],
            compare.main: [str(base.generator), "--device", "cpu"],
            convert.main: [str(base.demos), "out.hdf5"]}[main]
    for _ in range(rng.choice((1, 1, 2))):
        name, word = rng.choice(FLAGS[main]), rng.choice(WORDS)
        if name in LENGTHY and word.lstrip("-").isdigit() and 2 < len(word) < 4000:
            word = "2"
        how = rng.random()
        if how < 0.1:
            argv.append(word)
        elif how < 0.2:
            argv += [f"--{name[:-1]}", word]
        elif how < 0.3:
            argv.append(f"--{name}")
        elif how < 0.4 and len(argv) > 1:               # a comparison of no runs would train for hours
            del argv[rng.randrange(main is compare.main, len(argv))]
        else:
            argv.append(f"--{name}={word}")
    if rng.random() < 0.9:
        return Case(main, argv)
    variable = rng.choice(("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACTION_DIFFUSION_CACHE"))
    return Case(main, argv, {variable: rng.choice(("x", "-1", "1.5", "", "3", "9" * 20, "/dev/null/x"))})


def set_values(rng, base, folder):
    model = rng.choice(("dp_cnn", "dp_cnn", "ddpm", rng.choice(MODELS)))
    names = [f.name for f in dataclasses.fields(importlib.import_module(model).Config)]
    name = rng.choice(names)[:None if rng.random() < 0.9 else -1]
    word = rng.choice(WORDS + ("-3", "2", "7", "1000", "100000", "[0]", "[-1]", "[3, 3]", "[1e9]", "[[1]]",
                               ".nan", ".inf", "null", "1e30", "[32, 64]", "[1, 2, 3]", "2147483648", "{}",
                               "!!python/name:os.system"))
    item = rng.choice((name, "=", f"={word}", f"{name}={word}={word}")) if rng.random() < 0.05 else (
        f"{name}={word}")
    seen = [str(base.generator), "--device", "cpu"]
    trained = ["--model", model, *SHORT, *(["--demos", "200"] if "data_shape" in names else [
        "--data", str(base.demos)])]
    if model == "dp_cnn":
        seen, trained = [str(base.policy), "--episodes", "1", "--env", "tabletop"], base.command()
    elif model == "ddpm":
        trained = base.command(POINTS, None)
    train_main = Case(train.main, [*trained, "--set", item])
    return rng.choice((train_main, train_main, Case(sample.main, [*seen, "--set", item]),
                       Case(bench.main, ["--model", model, *BENCH, "--set", item])))


KINDS = (hdf5, aloha, image_sets, yaml_file, checkpoint, weights, flags, set_values)
