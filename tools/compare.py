"""Comparisons: finished runs side by side, and training on an equal budget.

    python -m tools.compare out/dp_cnn out/pi0      same seeds, same observations: a table and report.html
    python -m tools.compare --minutes 5             every policy and a regression: the same rollouts, minutes
                                                    and seeds
    python -m tools.compare --task metaworld        the same in Meta-World's tasks, beside its experts

The first shows what checkpoints do that are there. The second trains them: budget.py says how.
"""
import math
from pathlib import Path

import numpy as np
import torch

import sample
from robot.cli import SEEDS, Parser
from robot.environments import make_episodes
from robot.errors import UserError, run_command, write_json
from robot.rollout import EVALUATION_SEEDS, closed_loop
from tools import report
from tools.budget import METAWORLD, TASKS, budget
from tools.cells import latency_cells, markdown, size_cells, success_cells
from tools.pictures import frame_of_chunks, pictures, step_labels
from tools.quality import compare_samples
from tools.words import about


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
            if len(driver.queue) < policy.model.config.n_obs_steps:
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
