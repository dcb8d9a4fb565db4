"""A checkpoint at work: `python sample.py out/dp_cnn`.

A policy acts in closed loop, in many episodes at once whose seeds are the same for every policy: success with
its Wilson interval, the latency of a chunk, films. A generative model draws samples: their energy distance to
held-out data. Writes evaluation.json and evaluation.html into the run's folder, or to --out.

A policy that was downloaded acts as it is: `python sample.py --init FOLDER --env ...` (docs/weights.md).
What a robot's program uses is in robot/: `from robot import Policy`. Several runs beside each other:
`python -m tools.compare out/dp_cnn out/pi0`.
"""
import json
import re
from pathlib import Path

from demos.images import open_samples
from robot.checkpoint import load_model
from robot.cli import SEEDS, Parser
from robot.environments import ENVIRONMENTS
from robot.errors import UserError, input_text, run_command, write_json
from robot.models import load_module, pick_device, sampler_config
from robot.normalizer import Normalizer
from robot.packing import pack
from robot.policy import Policy
from robot.rollout import closed_loop
from tools import report
from tools.options import parse_set, read_values
from tools.pictures import pictures
from tools.quality import compare_samples
from tools.starting import released_policy
from tools.words import about

RANGES = {"episodes": (1, 100_000), "seed": SEEDS, "sampler_steps": (0, 100_000)}


def add_flags(parser):
    """The flags that say how a run is looked at; tools.compare has them too."""
    add = parser.add_argument
    add("--out", default="", help="folder of what is written; default: the run's own")
    add("--env", default="", help="tabletop, or a Gymnasium id; default: what the run was trained on")
    add("--config", default="", help="YAML whose env: maps the environment's observations")
    add("--episodes", type=int, default=100, help="of the closed loop (default: 100)")
    add("--sampler_steps", type=int, default=0, help="default: as the model was configured")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the sampler, e.g. sampler=ddpm")
    add("--robot", default="", help="which of the robots that it was trained on")
    add("--without", action="append", default=[], metavar="CAMERA", help="cover this camera")
    add("--swap", action="append", default=[], metavar="A,B", help="exchange two words in the instruction")
    add("--instruction", type=int, default=None, help="tabletop: ask for this one of the four instead")
    add("--seed", type=int, default=0, help="of the sampler and of the episodes (default: 0)")
    add("--device", default="auto", help="auto | cpu | cuda | mps (default: auto)")
    add("--no_replay", action="store_true", help="load although the model file computes something else now")
    add("--dtype", default="float32", help="auto | float32 | bfloat16 (default: float32)")


def load_run(path, args):
    """-> (model with --set applied, its checkpoint, Policy or None for a generative model)"""
    device, dtype = pick_device(args.device, args.dtype)
    model, checkpoint = load_model(path, device, replay=not args.no_replay)
    pack(model)
    changes = parse_set(args.set)
    model.config = sampler_config(load_module(checkpoint["model"]), checkpoint["config"], changes)
    if checkpoint["normalizer"] is None:
        model.config.sampler_steps = args.sampler_steps or model.config.sampler_steps
        return model, checkpoint, None
    normalizer = Normalizer.from_state(checkpoint["normalizer"])
    policy = Policy(model, normalizer, checkpoint["data"], device, dtype, args.sampler_steps or None,
                    args.seed, args.robot or None, args.without, [word_pair(x) for x in args.swap])
    return model, checkpoint, policy


def word_pair(text):
    pair = re.findall(r"\w+", text)
    if len(pair) != 2:
        raise UserError(f"--swap {text}: write it as two words, for example --swap red,blue")
    return pair


def held_out_samples(checkpoint, split="valid"):
    options = checkpoint["options"]
    return open_samples(options["data"] or "moons", options["demos"] or None, options["seed"], split=split)


def environment_of(args, checkpoint):
    """--env with the mapping of --config, or with that of the run's own YAML if this names the same one."""
    options = checkpoint["options"]
    env = options["env"]
    if args.config:
        content = read_values(input_text(args.config), f"--config {args.config}")
        env = content.get("env") if isinstance(content, dict) else None
        if not isinstance(env, dict) or not env:
            raise UserError(f"--config {args.config} holds no env: of KEY: VALUE lines")
        return env | ({"id": args.env} if args.env else {})
    robot = options.get("robots", {}).get(args.robot, {})
    data = robot.get("data", args.robot) or options["data"] or "tabletop"
    if args.env in ENVIRONMENTS or not args.env and not env and data in ENVIRONMENTS:
        return args.env or data
    if not args.env and not env:
        raise UserError("the run names no environment: add --env tabletop, or --env with a Gymnasium id")
    return env if env and args.env in ("", env.get("id")) else {"id": args.env}


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="*", help="folder of a training run, or its checkpoint.pt")
    parser.add_argument("--init", default="", help="instead of a run: a released policy (docs/weights.md)")
    parser.add_argument("--model", default="", help="whose weights these are, where they do not say it")
    parser.add_argument("--compile", action="store_true",
                        help="faster chunks for one robot, after minutes of torch.compile")
    add_flags(parser)
    args = parser.parse(argv, RANGES)
    if len(args.run) > 1:
        raise UserError(f"{len(args.run)} runs are given: python -m tools.compare shows them side by side")
    if bool(args.init) == bool(args.run):
        raise UserError("name the folder of a run, or --init with a released policy")
    path = Path(args.run[0] if args.run else args.out or "out/released")
    model, checkpoint, policy = released_policy(args) if args.init else load_run(path, args)
    if args.init:
        path.mkdir(parents=True, exist_ok=True)
    if args.compile and policy is None:
        raise UserError(f"--compile is for policies, {checkpoint['model']} generates samples")
    if args.compile:
        policy.compile()
    folder = Path(args.out) if args.out else path if path.is_dir() else path.parent
    title = f"{checkpoint['model']} ({checkpoint['preset']}), step {checkpoint['step']}"
    try:
        if policy is None:
            held_out = held_out_samples(checkpoint)
            result = compare_samples(model, held_out, args.seed, held_out_samples(checkpoint, "train"))
            shown = pictures(model, held_out, None, checkpoint["data"], args.seed)
        else:
            result = closed_loop(policy, environment_of(args, checkpoint), args.episodes, args.seed,
                                 instruction=args.instruction)
            shown = {"rollouts": result.pop("rollouts")}
    except ValueError as e:  # sampler steps or an instruction that do not exist
        raise UserError(str(e)) from None
    print(json.dumps(result))
    write_json(folder / "evaluation.json", result)
    report.write(folder / "evaluation.html", title, (), result, checkpoint["config"],
                 about=about(checkpoint["data"]), **shown)
    print(f"wrote {folder}/evaluation.json and evaluation.html")
    return result


if __name__ == "__main__":
    run_command(main)
