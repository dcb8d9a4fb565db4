"""Comparisons: finished runs side by side, and training on an equal budget.

    python -m tools.compare out/dp_cnn out/pi0      same seeds, same observations: a table and report.html
    python -m tools.compare --minutes 5             every policy and a regression: the same rollouts, minutes
                                                    and seeds
    python -m tools.compare --task metaworld        the same in Meta-World's tasks, beside its experts

The first shows what checkpoints do that are there. The second trains them: `budget` below says how.
"""
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import data
import sample
import train
from demos import metaworld
from robot.checkpoint import read_checkpoint
from robot.cli import SEEDS, Parser
from robot.environments import make_episodes
from robot.errors import UserError, run_command, write_json
from robot.metaworld import Scene, expert_of, tasks_of
from robot.models import load_module, pick_device
from robot.rollout import EVALUATION_SEEDS, closed_loop, wilson
from tools import measure, regression, report
from tools.options import make_config, parse_options, with_recipe
from tools.pictures import frame_of_chunks, pictures, step_labels
from tools.quality import compare_samples
from tools.runs import read_rows, write_rows
from tools.words import about

# ----------------------------------------------------------------------------------------------------------
# Side by side


def side_by_side(args):
    """Runs of one environment (policies) or of one data set (generative models) are compared with each other;
    others stand in a group of their own. Writes compare.json and report.html to --out or out/compare."""
    groups, names = {}, unique_names(args.run)
    for path, name in zip(args.run, names):
        model, checkpoint, policy = sample.load_run(path, args)
        if policy is None:
            key = ("samples of", f"{checkpoint['data']['source']} {tuple(checkpoint['data']['shape'])}")
        else:
            try:
                environment = sample.environment_of(args, checkpoint)
            except UserError as e:
                raise UserError(f"{path}: {e}") from None
            checkpoint |= {"policy": policy, "environment": environment}
            key = ("policies in", environment if isinstance(environment, str) else environment["id"])
        groups.setdefault(key, []).append((name, model, checkpoint))

    tables, shown = [], {"chunks": [], "rollouts": [], "samples": []}
    for (kind, where), members in groups.items():
        compare = compare_policies if kind == "policies in" else compare_generative
        try:
            rows, drawn = compare(members, where, args)
        except (ValueError, UserError) as e:  # sampler steps, an instruction, observations that are not there
            raise UserError(f"{kind} {where}: {e}") from None
        tables.append((f"{kind[0].upper()}{kind[1:]} {where}", rows))
        for section, entries in drawn.items():
            shown[section] += entries
        print(markdown(*tables[-1]), flush=True)
    if len(groups) > 1:
        print(f"{len(groups)} groups: what has another environment or other data cannot be compared")
    out = Path(args.out or "out/compare")
    write_json(out / "compare.json", dict(tables))
    facts = about(*[checkpoint["data"] for members in groups.values() for _, _, checkpoint in members])
    report.write(out / "report.html", " | ".join(names), tables=tables, about=facts, **shown)
    print(f"wrote {out}/report.html and compare.json")
    return dict(tables)


def unique_names(paths):
    """Names of the runs' folders, or whole paths where these are the same."""
    folders = [Path(p).parent if Path(p).suffix else Path(p) for p in paths]
    names = [folder.resolve().name for folder in folders]
    names = [str(p) if names.count(name) > 1 else name for p, name in zip(paths, names)]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def markdown(title, rows):
    """[{column: value}] as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)] + [[str(row.get(key, "")) for key in columns] for row in rows]
    return "\n".join([f"\n{title}", ""] + [f"| {' | '.join(cells)} |" for cells in lines]) + "\n"


def success_cells(successes, episodes):
    low, high = (100 * share for share in wilson(successes, episodes))
    return {"success": f"{successes} of {episodes}", "95 % interval": f"{low:.1f} to {high:.1f} %"}


def latency_cells(call, repeat=20):
    """Milliseconds of call(), after two calls that do not count."""
    times = []
    for _ in range(repeat + 2):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return {"p50 ms": f"{np.median(times[2:]):.3g}", "p95 ms": f"{np.percentile(times[2:], 95):.3g}"}


def size_cells(model):
    return {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}


def compare_policies(members, where, args):
    """Closed loop on the same seeds; chunks from the same state; latency of one chunk for one robot."""
    rows, rollouts, chunks = [], [], []
    for name, model, checkpoint in members:
        policy, environment = checkpoint["policy"], checkpoint["environment"]
        result = closed_loop(policy, environment, args.episodes, args.seed, n_rollouts=4,
                                 instruction=args.instruction)
        row = {"run": name, "model": f"{checkpoint['model']} ({checkpoint['preset']})"}
        row |= {"success": "unknown"} if result["success"] is None else success_cells(
            round(result["success"] * args.episodes), args.episodes)
        if where != "tabletop":  # there the score is the success
            row["score"] = f"{result['score']:.3f}"
        failures = {k: n for k, n in result.get("outcomes", {}).items() if k != "success"}
        rows.append(row | {"failures": ", ".join(f"{n} {k}" for k, n in failures.items()) or "none"})
        for i, r in enumerate(result["rollouts"]):
            scene = f"seed {r['seed']}" + f": {r['instruction']}" * bool(r["instruction"])
            rollouts.append((i, r | {"name": name, "scene": scene}))
    rollouts = [r for _, r in sorted(rollouts, key=lambda pair: pair[0])]  # of one seed beside each other

    policies = [checkpoint["policy"] for _, _, checkpoint in members]
    frame = shared_moment(policies, [checkpoint["environment"] for _, _, checkpoint in members], args)
    for row, (name, model, checkpoint), policy in zip(rows, members, policies):
        row |= latency_cells(policy.sample_chunk) | size_cells(model)
        trace = []
        policy.generator = torch.Generator().manual_seed(args.seed)
        policy.sample_chunk(copies=32, trace=trace)
        states = policy.raw(torch.stack(trace))
        axes = frame_of_chunks(model.config, policy.description, checkpoint["environment"])
        # Where actions are places in the picture, it lies below them; elsewhere it stands beside, once.
        chunks.append(axes | {"name": name, "group": where, "trace": states, "labels": step_labels(states),
                              "observation": frame if "extent" in axes or not chunks else None})
    return rows, {"rollouts": rollouts, "chunks": chunks}


def shared_moment(policies, environments, args, n=8, looks=6):
    """Give all policies the same observation, one where they have to choose: of the states at the first
    `looks` samplings of the first one in n episodes, that where the chunks of all differ most. Every policy
    has a world of its own, in which the same seeds and the same actions make the same things happen, and sees
    it with its own eyes (numbers or pictures, last step or last two). -> picture of the state"""
    worlds = [make_episodes(environment, n, policy.description, args.instruction)
              for policy, environment in zip(policies, environments)]
    seeds = EVALUATION_SEEDS + 1000 * args.seed + np.arange(n)
    observed = [world.reset(seeds)[0] for world in worlds]
    driver, *others = policies
    for policy in policies:
        policy.reset()
    best, running = None, np.ones(n, bool)
    for _ in range(worlds[0].max_steps):
        for policy, obs in zip(others, observed[1:]):
            policy.observe(obs)
        looking = not driver.queue
        action = driver.act(observed[0])
        if looking:
            looks -= 1
            spread = sum(spread_of(policy) for policy in policies)
            i = int(np.where(running, spread, -1).argmax())
            if best is None or spread[i] > best[0]:
                one = [[{k: v[i:i + 1] for k, v in step.items()} for step in p.history] for p in policies]
                best = spread[i], one, worlds[0].film([worlds[0].glance(i, observed[0])])[0]
        if not looks or not running.any():
            break
        stepped = [world.step(action) for world in worlds]
        observed, running = [s[0] for s in stepped], running & ~stepped[0][2]
    _, histories, frame = best
    for policy, history in zip(policies, histories):
        policy.reset()
        policy.history = history
    return frame


def spread_of(policy, copies=4):
    """How far chunks for the same observation lie apart, in each episode, in units of the actions' range."""
    chunks = policy.normalizer.normalize("actions", policy.sample(copies)).unflatten(0, (-1, copies))
    return chunks.std(1).flatten(1).mean(1).numpy()


def compare_generative(members, where, args):
    """Energy distance to held-out data, and the same labels and seeds forming beside each other."""
    rows, shown = [], []
    for name, model, checkpoint in members:
        held_out, real = (sample.held_out_samples(checkpoint, split) for split in ("valid", "train"))
        result = compare_samples(model, held_out, args.seed, real)
        one = {k: v[:1] for k, v in held_out.batch(torch.arange(1)).items()}
        rows.append({"run": name, "model": f"{checkpoint['model']} ({checkpoint['preset']})"}
                    | {key: f"{value:.4f}" for key, value in result.items()}
                    | latency_cells(lambda: model.sample(one), 5) | size_cells(model))
        picture = pictures(model, held_out, None, checkpoint["data"], args.seed)["samples"]
        shown.append(picture | {"name": name})
    for picture in shown[:-1]:
        if np.ndim(picture["data"]) == 4:
            picture.pop("data")  # the real images stand there once, after the last
    return rows, {"samples": shown}


# ----------------------------------------------------------------------------------------------------------
# An equal budget

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
    steps by the time of a step, measured before, so that the learning rate's schedule ends when they do; what
    the training took in the end is in the table. A line of results.jsonl per run: what is there is not done
    again, and a run that was interrupted goes on."""
    out = Path(args.out or "out/matched")
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "results.jsonl"
    wanted = args.only or list(TASKS[args.task])
    worlds = tasks_of(args.tasks) if args.task == "metaworld" else [args.task]
    demos = args.demos or (100 if args.task == "metaworld" else 2000)
    done = read_rows(lines)
    write_rows(lines, done)             # without what a killed comparison left half written
    tables = {}
    for world in worlds:
        same = {"task": world, "minutes": args.minutes, "episodes": args.episodes, "demos": demos,
                "preset": args.preset}
        if args.task == "metaworld":
            args.data = str(out / f"{world}_{demos}.hdf5")
            if not Path(args.data).exists():
                metaworld.generate([world], demos, args.data)
        found = [row for row in done if all(row.get(k) == v for k, v in same.items())]
        for seed in args.seeds:
            for name in wanted:
                if not any(row["name"] == name and row["seed"] == seed for row in found):
                    folder = out / f"{world}_{args.preset}_{args.minutes:g}min_{name}_seed{seed}"
                    row = {"name": name, "seed": seed} | same | train_one(name, seed, folder, args)
                    with open(lines, "a", encoding="utf-8") as f:
                        f.write(json.dumps(row) + "\n")
                    found.append(row)
        found = sorted((row for row in found if row["seed"] in args.seeds), key=lambda row: row["seed"])
        tables[world] = [pooled(name, [row for row in found if row["name"] == name]) for name in wanted]
        if args.task == "metaworld":
            tables[world].append(expert_row(world, args))
        print(markdown(f"{world}, {args.minutes:g} minutes of training each, seeds {args.seeds}",
                       tables[world]), flush=True)
    return tables


def expert_row(world, args):
    """The scripted expert, undisturbed, in the same scenes."""
    expert, scene = expert_of(world), Scene(world, [world])
    successes = 0
    for seed in args.seeds:
        for i in range(args.episodes):
            obs, _ = scene.reset(EVALUATION_SEEDS + 1000 * seed + i)
            done = success = False
            while not done:
                obs, _, success, cut, _ = scene.step(expert(obs["state"]))
                done = success or cut
            successes += success
    return {"model": "expert", "sees": "numbers"} | success_cells(successes, args.episodes * len(args.seeds))


def train_one(name, seed, folder, args):
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
    if (folder / "checkpoint.pt").exists():
        steps = read_checkpoint(folder)["options"]["steps"]  # as it was measured then
    else:
        steps = max(1, int(60 * args.minutes / step_seconds(options, module)))
    options = dataclasses.replace(options, steps=steps, warmup=min(options.warmup, steps // 10), resume=(
        folder / "checkpoint.pt").exists())
    result = train.train(options, module)
    config = read_checkpoint(folder)["config"]
    sees = "pictures" if config["n_cameras"] and config.get("obs", "image") == "image" else "numbers"
    sees += " and words" if config.get("text_len") else ""
    return {"steps": steps, "sees": sees} | {key: result[key] for key in (
        "parameters", "train_seconds", "success", "score", "outcomes", "action_error", "latency_ms")}


def step_seconds(options, module):
    """Seconds of one training step: fetch, loss, backward, optimiser, EMA."""
    device, dtype = pick_device(options.device, options.dtype)
    facts, make_items, *_ = data.open_data(options, module)
    config = make_config(module, options, facts)
    torch.manual_seed(options.seed)
    model, items = module.Model(config).to(device), make_items(config, device)[0]
    stream = data.batches(items, options.batch_size, options.seed)
    fetch = measure.median_ms(lambda: next(stream), device, 10)
    batch = {k: v.to(device) for k, v in next(stream)[1].items()}
    step, _ = measure.time_training(model, batch, device, dtype, options.compile, 10)
    return (fetch + step) / 1e3


def pooled(name, runs):
    """A row of the table: episodes of all seeds together."""
    episodes = sum(row["episodes"] for row in runs)
    if not episodes:
        return {"model": name}
    successes = [round(row["success"] * row["episodes"]) for row in runs]
    failures = {}
    for row in runs:
        for outcome, n in row["outcomes"].items():
            failures[outcome] = failures.get(outcome, 0) + n * (outcome != "success")
    mean = lambda key: np.mean([row[key] for row in runs])
    return {"model": name, "sees": runs[0]["sees"]} | success_cells(sum(successes), episodes) | {
        "by seed": ", ".join(map(str, successes)), "score": f"{mean('score'):.3f}",
        "failures": ", ".join(f"{n} {k}" for k, n in failures.items() if n) or "none",
        "minutes": f"{mean('train_seconds') / 60:.1f}", "steps": f"{mean('steps'):,.0f}",
        "parameters": f"{runs[0]['parameters']:,}"}


def main(argv=None):
    parser = Parser(description="Runs side by side, or all policies trained on an equal budget")
    parser.add_argument("run", nargs="*", help="folders of training runs, to see them side by side")
    sample.add_flags(parser)
    add = parser.add_argument_group("without runs: training on an equal budget").add_argument
    add("--minutes", type=float, default=5, help="training of each run (default: 5)")
    add("--task", default="tabletop", choices=TASKS)
    add("--only", action="append", help="this model (may be given several times)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training; each has its own episodes")
    add("--tasks", nargs="+", default=list(METAWORLD), metavar="TASK", help="metaworld: default: ten of them")
    add("--demos", type=int, help="tabletop: rollouts, the same for all (default: 2000); policies "
        "that see pictures get two in three up to the grasp only. metaworld: of each task (default: 100)")
    add("--preset", default="tiny", help="where a file has it; else tiny")
    add("--data", default="", help="pusht: its HDF5 file")
    ranges = {"minutes": (0.001, 10**6), "seeds": SEEDS, "demos": (1, math.inf)}
    args = parser.parse(argv, sample.RANGES | ranges)
    if args.run:
        return side_by_side(args)
    unknown = [name for name in args.only or () if name not in TASKS[args.task]]
    if unknown:
        raise UserError(f"--only {unknown[0]}: --task {args.task} has {', '.join(TASKS[args.task])}")
    return budget(args)


if __name__ == "__main__":
    run_command(main)
