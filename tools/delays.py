"""What a delay does to a policy: `python -m tools.delays out/dp_cnn out/dit_policy out/pi0 --episodes 100`.

The built-in task at its own pace, with chunks that are there 0 to 6 steps after their observation, and with
every strategy of robot/realtime.py: success with its Wilson interval, the jerk of the gripper's way, the jump
of the command where another chunk takes over. The delay is simulated: the figures do not depend on how fast
this computer is. All episodes of a row run side by side.

Rows are appended to --out as JSON lines. A row that is there already is not computed again, so that the
command can be killed and called again; at the end two tables are printed as markdown.
"""
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from robot.checkpoint import load_model
from robot.cli import SEEDS, Parser
from robot.environments import make_episodes
from robot.errors import UserError, hint, input_text, run_command, say, written_aside
from robot.models import pick_device
from robot.normalizer import Normalizer
from robot.policy import Policy
from robot.realtime import STRATEGIES, RealTime, Simulated
from robot.rollout import evaluation_seeds, wilson

RANGES = {"episodes": (1, 100_000), "seed": SEEDS, "every": (0, 1000), "delays": (0, 1000)}
KEY = ("run", "step", "strategy", "delay", "every", "episodes", "seed")   # what a row is known by


def stand_still(observation, last):
    """The built-in task's action for standing still, (n, 3): the present position, and the gripper as it was
    commanded last, open at first."""
    position = observation["robot0_eef_pos"]
    gripper = np.full_like(position[..., :1], -1) if last is None else last[..., 2:]
    return np.concatenate([position, gripper], axis=-1)


def play(policy, strategy, delay, every, episodes, seed):
    """One row: {"success", "interval", "timeouts", "steps" (mean of the successful), "jerk" (mean length of
    the gripper's third difference in the steps of an episode, times fps^3: units of the table per s^3),
    "jump" (mean length of the command's change in x and y where another chunk took over), "change"
    (elsewhere), "held" (share of steps in which the arm stood still)}"""
    env = make_episodes("tabletop", episodes, policy.description)
    driver = RealTime(Simulated(policy, delay), strategy, stand_still, every, say=lambda note: None)
    policy.reset()
    obs, info = env.reset(evaluation_seeds(seed, episodes))
    done, steps = np.zeros(episodes, bool), np.zeros(episodes, int)
    way, last, jumps, changes = [obs["robot0_eef_pos"]], None, [], []
    while not done.all() and len(way) <= env.max_steps:
        held = driver.held
        action = driver.act(obs)
        if last is not None and held == driver.held:
            change = np.linalg.norm(action[:, :2] - last[:, :2], axis=1)[~done]
            (jumps if driver.changed else changes).append(change)
        last = action
        obs, _, finished, info = env.step(action)
        steps += ~done
        done |= finished
        way.append(obs["robot0_eef_pos"])
    won = info["success"]
    third = np.linalg.norm(np.diff(np.stack(way, axis=1), n=3, axis=1), axis=-1)   # (n, T - 2)
    moving = np.arange(third.shape[1]) < steps[:, None] - 2
    mean = lambda parts: round(float(np.concatenate(parts).mean()), 4) if parts else None
    return {"success": float(won.mean()),
            "interval": [round(float(x), 4) for x in wilson(won.sum(), episodes)],
            "timeouts": int(np.isin(info["outcome"], ("timeout", "wall")).sum()),
            "steps": round(float(steps[won].mean()), 1) if won.any() else None,
            "jerk": round(float(third[moving].mean()) * policy.description["fps"] ** 3, 2),
            "jump": mean(jumps), "change": mean(changes), "held": round(driver.held / (len(way) - 1), 3)}


def read_rows(path):
    """Rows of a file that a killed run may have left with half a line at its end, which is dropped."""
    rows, path = [], Path(path)
    if not path.exists():
        return rows
    lines = input_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            assert set(KEY) <= set(rows[-1])
        except (ValueError, AssertionError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no row of this command: give another --out"
                                ) from None
            say(f"{path}: half a line at its end is dropped")
    if len(rows) < len(lines):
        with written_aside(path) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def success(row):
    low, high = (100 * x for x in row["interval"])
    return f"{100 * row['success']:.0f} [{low:.0f}, {high:.0f}]"


def smoothness(row):
    return f"{row['jerk']:.0f} / " + ("" if row["jump"] is None else f"{row['jump']:.2f}")


def tables(rows):
    """Two tables as markdown, a line for every policy and strategy, a column for every delay."""
    delays = sorted({row["delay"] for row in rows})
    lines = {}                                  # {(policy, strategy, every): {delay: row}}
    for row in rows:
        line = Path(row["run"]).name, row["strategy"], row["every"]
        lines.setdefault(line, {})[row["delay"]] = row
    parts = []
    for title, cell in (("success in % at a delay of", success), ("jerk / jump at a delay of", smoothness)):
        parts += [f"| policy | strategy | {title} {' | '.join(map(str, delays))} |",
                  "|---" * (2 + len(delays)) + "|"]
        for (name, strategy, every), line in lines.items():
            cells = [name, f"{strategy}, every {every}", *(cell(line[delay]) for delay in delays)]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def parse(argv):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("run", nargs="+", help="folders of training runs, policies all of them")
    add("--delays", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5, 6], help="in steps (default: 0 to 6)")
    add("--strategies", nargs="+", default=list(STRATEGIES), help="default: all of robot/realtime.py")
    add("--every", type=int, default=0,
        help="steps between two chunks, for all but wait (default: the model's n_action_steps)")
    add("--episodes", type=int, default=100, help="of every row (default: 100)")
    add("--seed", type=int, default=0, help="of the sampler and of the episodes (default: 0)")
    add("--device", default="auto", help="auto | cpu | cuda | mps (default: auto)")
    add("--out", default="out/delays.jsonl", help="file of the rows (default: out/delays.jsonl)")
    args = parser.parse(argv, RANGES)
    for strategy in args.strategies:
        if strategy not in STRATEGIES:
            raise UserError(f"--strategies {strategy}: there is no such one{hint(strategy, STRATEGIES)}")
    return args


def open_policy(run, args):
    """-> the policy, and the training step of its checkpoint"""
    device, _ = pick_device(args.device, "float32")
    model, checkpoint = load_model(run, device)
    data = checkpoint["data"]
    if checkpoint["normalizer"] is None or data["source"] != "tabletop":
        raise UserError(f"{run} was not trained on the built-in task (tabletop) but on {data['source']}")
    normalizer = Normalizer.from_state(checkpoint["normalizer"])
    return Policy(model, normalizer, data, device, seed=args.seed), checkpoint["step"]


def main(argv=None):
    args = parse(argv)
    rows, wanted = read_rows(args.out), []
    for run in args.run:
        policy, step = open_policy(run, args)
        own = policy.model.config.n_action_steps
        for strategy in args.strategies:
            # `wait` stands still for every chunk: it has no reason to begin one before the actions are used
            # up.
            every = own if strategy == "wait" else args.every or own
            wanted += [(policy, dict(zip(KEY, (run, step, strategy, delay, every, args.episodes, args.seed))))
                       for delay in args.delays]
    known = {tuple(row[key] for key in KEY): row for row in rows}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for policy, row in tqdm(wanted, unit="row", disable=None):
        key = tuple(row.values())
        if key in known:
            continue
        known[key] = row | play(policy, *key[2:])
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(known[key]) + "\n")
    asked = [known[tuple(row.values())] for _, row in wanted]
    print(tables(asked))
    return asked


if __name__ == "__main__":
    run_command(main)
