"""Training on an equal budget, for tools/compare.py: every policy of a task for the same minutes.

    python -m tools.compare --minutes 5             every policy and a regression, on the built-in task
    python -m tools.compare --task metaworld        in Meta-World's tasks, beside its experts

The minutes are those of one machine: steps times the time of a step, measured once for each model before the
first run and kept. So all seeds and tasks have the same number of steps, whatever else the machine does.
"""
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

import data
import train
from demos import metaworld
from robot.checkpoint import read_checkpoint
from robot.errors import input_text, write_json
from robot.metaworld import Scene, expert_of, tasks_of
from robot.models import load_module, pick_device
from robot.rollout import EVALUATION_SEEDS
from tools import bench, regression
from tools.bars import write_bars
from tools.cells import markdown, success_cells
from tools.options import make_config, parse_options, with_recipe
from tools.runs import read_rows, write_rows

# What is trained for each task, and the YAML where a task needs one. "regression" is the network of dp_cnn.py
# that answers with the mean (regression.py).
# Of Meta-World: easy ones, and those that papers call hard or very hard.
METAWORLD = ("assembly", "basketball", "button-press-topdown", "door-open", "drawer-close", "peg-insert-side",
             "pick-place", "push", "stick-push", "window-open")
TASKS = {
    "tabletop": {name: "" for name in ("regression", "dp_cnn", "dp_transformer", "dit_policy", "rdt", "pi0",
                                       "pi05")},
    "metaworld": {"regression": "configs/metaworld_cnn.yaml", "dp_cnn": "configs/metaworld_cnn.yaml",
                  "dp_transformer": "configs/metaworld_transformer.yaml"},
    "pusht": {"regression": "configs/pusht_lowdim_cnn_cpu.yaml",
              "dp_cnn": "configs/pusht_lowdim_cnn_cpu.yaml",
              "dp_transformer": "configs/pusht_lowdim_transformer_cpu.yaml"},
}


def budget(args):
    """Train every model of a task for the same minutes, from the same rollouts (on the tabletop whole for who
    sees numbers, two in three up to the grasp for who sees pictures; each seed has its own), with each
    training seed, and let it act in the same episodes (those of the seed). The minutes become a number of
    steps, the same in every run of a model, see `steps_of`. A line of results.jsonl per run: what is there is
    not done again, and a run that was interrupted goes on."""
    out = Path(args.out or "out/matched")
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "results.jsonl"
    wanted = args.only or list(TASKS[args.task])
    worlds = tasks_of(args.tasks) if args.task == "metaworld" else [args.task]
    demos = args.demos or (100 if args.task == "metaworld" else 2000)
    done = read_rows(lines)
    write_rows(lines, done)             # without what a killed comparison left half written
    tables, counts = {}, {}
    for world in worlds:
        same = {"task": world, "minutes": args.minutes, "episodes": args.episodes, "demos": demos,
                "preset": args.preset}
        if args.task == "metaworld":
            args.data = str(out / f"{world}_{demos}.hdf5")
            if not Path(args.data).exists():
                metaworld.generate([world], demos, args.data)
        found = [row for row in done if all(row.get(k) == v for k, v in same.items())]
        names = wanted + ["expert"] * (args.task == "metaworld")
        for seed in args.seeds:
            for name in names:
                if not any(row["name"] == name and row["seed"] == seed for row in found):
                    folder = out / f"{world}_{args.preset}_{args.minutes:g}min_{name}_seed{seed}"
                    one = expert_one(world, seed, args) if name == "expert" else train_one(
                        name, seed, folder, args, out / "step_seconds.json")
                    row = {"name": name, "seed": seed} | same | one
                    with open(lines, "a", encoding="utf-8") as f:
                        f.write(json.dumps(row) + "\n")
                    found.append(row)
        found = sorted((row for row in found if row["seed"] in args.seeds), key=lambda row: row["seed"])
        tables[world] = [pooled(name, [row for row in found if row["name"] == name]) for name in names]
        print(markdown(f"{world}, {args.minutes:g} minutes of training each, seeds {args.seeds}",
                       tables[world]), flush=True)
        counts[world] = {name: counted([row for row in found if row["name"] == name]) for name in names}
        write_bars(counts, out / "bars.svg")
    return tables


def expert_one(world, seed, args):
    """The scripted expert, undisturbed, in the same scenes. -> as train_one"""
    expert, scene = expert_of(world), Scene(world, [world])
    successes = 0
    for i in range(args.episodes):
        obs, _ = scene.reset(EVALUATION_SEEDS + 1000 * seed + i)
        done = success = False
        while not done:
            obs, _, success, cut, _ = scene.step(expert(obs["state"]))
            done = success or cut
        successes += success
    return {"sees": "numbers", "success": successes / args.episodes,
            "outcomes": {"success": successes, "failure": args.episodes - successes}}


def train_one(name, seed, folder, args, times):
    """-> what results.jsonl keeps of one run"""
    module = regression.MODULE if name == "regression" else load_module(name)
    argv = {"model": module.__name__, "preset": args.preset if args.preset in module.PRESETS else "tiny",
            "seed": seed, "out": folder, "episodes": args.episodes, "device": args.device, "eval_every": 0,
            "rollout_every": 0, "demos": args.demos or 2000 if args.task == "tabletop" else 0}
    if TASKS[args.task][name]:
        argv["config"] = Path(__file__).parent.parent / TASKS[args.task][name]
    argv |= {"data": args.data} if args.data else {}
    options, explicit = parse_options([str(word) for key, value in argv.items()
                                       for word in (f"--{key}", value)])
    options = with_recipe(options, explicit, module)
    begun = (folder / "checkpoint.pt").exists()
    # A run that was begun ends as it was planned then.
    steps = read_checkpoint(folder)["options"]["steps"] if begun else None
    seconds = kept_step_seconds(f"{args.task} {name} {options.preset}", times, options, module)
    steps = steps or max(1, int(60 * args.minutes / seconds))
    options = dataclasses.replace(options, steps=steps, warmup=min(options.warmup, steps // 10), resume=begun)
    result = train.train(options, module)
    config = read_checkpoint(folder)["config"]
    sees = "pictures" if config["n_cameras"] and config.get("obs", "image") == "image" else "numbers"
    sees += " and words" if config.get("text_len") else ""
    return {"steps": steps, "step_seconds": seconds, "sees": sees} | {key: result[key] for key in (
        "parameters", "success", "score", "outcomes", "action_error", "latency_ms")}


def kept_step_seconds(key, times, options, module):
    """The seconds of a step, measured once for each model and kept in the file `times`: on a machine that
    others use, too, every measurement is another one, and the runs of a model would differ in their steps."""
    kept = {} if not times.exists() else json.loads(input_text(times))
    if key not in kept:
        kept[key] = step_seconds(options, module)
        write_json(times, kept)
    return kept[key]


def step_seconds(options, module):
    """Seconds of one training step: fetch, loss, backward, optimiser, EMA."""
    device, dtype = pick_device(options.device, options.dtype)
    facts, make_items, *_ = data.open_data(options, module)
    config = make_config(module, options, facts)
    torch.manual_seed(options.seed)
    model, items = module.Model(config).to(device), make_items(config, device)[0]
    stream = data.batches(items, options.batch_size, options.seed)
    fetch = bench.median_ms(lambda: next(stream), device, 20)
    batch = {k: v.to(device) for k, v in next(stream)[1].items()}
    step, _ = bench.time_training(model, batch, device, dtype, options.compile, 20)
    return (fetch + step) / 1e3


def counted(runs):
    """-> successes, episodes"""
    return sum(round(row["success"] * row["episodes"]) for row in runs), sum(row["episodes"] for row in runs)


def pooled(name, runs):
    """A row of the table: episodes of all seeds together."""
    successes, episodes = counted(runs)
    if not episodes:
        return {"model": name}
    failures = {}
    for row in runs:
        for outcome, n in row["outcomes"].items():
            failures[outcome] = failures.get(outcome, 0) + n * (outcome != "success")
    mean = lambda key: np.mean([row[key] for row in runs])
    cells = {"model": name, "sees": runs[0]["sees"]} | success_cells(successes, episodes) | {
        "by seed": ", ".join(str(counted([row])[0]) for row in runs),
        "failures": ", ".join(f"{n} {k}" for k, n in failures.items() if n) or "none"}
    if name == "expert":
        return cells
    return cells | {"score": f"{mean('score'):.3f}", "steps": f"{mean('steps'):,.0f}",
                    "minutes": f"{mean('steps') * mean('step_seconds') / 60:.1f}",
                    "parameters": f"{runs[0]['parameters']:,}"}
