"""Before an arm moves: GO or NO-GO.

    python -m robot.preflight out/run EPISODE.hdf5     a run's folder, a recorded episode of the robot
                   [--demo demo_3]                     of a file with several; else its first one
                   [--instruction "..."]               what the robot will be told; else what the episode says
                   [--sampler_steps 5] [--device cuda] [--compile] [--robot NAME]     as the robot will run it
                   [--json]                            one JSON object instead

The episode is replayed through exactly the path of a robot: Policy.load, then Policy.act with the raw
observation of every step. Record it with the programs that will run the policy, so that their cameras, units
and order of joints are put to the test. What the policy sees, what it answers and how long that takes is
compared with the data it was trained on, of which the checkpoint keeps a few numbers (`usual`, written by
demos/usual.py). Exit status: 0 GO, 1 NO-GO, 2 for mistakes such as a file that is not there.

A reason is a NO-GO; a remark is not. What is compared, and with what: preflight_checks.py, docs/preflight.md.
"""
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from .cli import Parser
from .errors import UserError, one_line, run_command
from .looks import look_of, spread
from .policy import Policy
from .preflight_checks import judge
from .recording import Recording

LOOKS = 8                       # frames of the episode that say how its cameras look


@dataclass
class Flight:
    """What was seen while the episode was replayed."""
    policy: Policy
    recording: Recording
    told: str                                           # the instruction
    actions: list = field(default_factory=list)         # (A,) of each step
    state: list = field(default_factory=list)           # (S,) of each step, raw
    fresh: list = field(default_factory=list)           # steps at which a chunk was sampled
    seconds: list = field(default_factory=list)         # of Policy.act in these
    looks: dict = field(default_factory=dict)           # camera -> [(8, 8, 3)]
    sizes: dict = field(default_factory=dict)           # camera -> {(H, W)}
    refused: str = ""                                   # why the policy did not go on

    def name(self, d):
        names = self.policy.description["action_names"]
        return f"action {d}" + (f" ({one_line(names[d], 30)})" if len(names) > d else "")


def fly(policy, recording, told):
    """Replay: -> Flight. It ends early where the policy refuses an observation."""
    flight = Flight(policy, recording, told)
    cameras, states = policy.description["camera_keys"], policy.description["state_keys"]
    shown = spread(recording.length, LOOKS)
    policy.reset()
    for t in range(recording.length):
        observation = recording[t]
        if told is not None:
            observation["instruction"] = told
        for key in cameras:
            frame = observation.get(key)
            if t in shown and frame is not None and frame.ndim == 3 and frame.dtype == np.uint8:
                flight.sizes.setdefault(key, set()).add(frame.shape[:2])
                flight.looks.setdefault(key, []).append(look_of(frame[None])[0])
        try:
            policy.prepare(observation)         # `act` looks at pictures only where a chunk will see them
            began, chunks = time.perf_counter(), len(policy.latency)
            action = policy.act(observation)
        except UserError as e:
            flight.refused = f"at step {t}: {e}"
            return flight
        if len(policy.latency) > chunks:
            flight.fresh.append(t)
            flight.seconds.append(time.perf_counter() - began)
        flight.actions.append(np.asarray(action, np.float64))
        flight.state.append(np.concatenate([np.zeros(0), *(observation[key] for key in states)]))
    return flight


def agreement(flight):
    """Mean distance of the policy's actions from the recorded ones, in shares of the data's range; None if
    there is nothing to compare. Nothing is judged by it: a good policy may choose another way."""
    n = len(flight.actions)
    recorded = flight.recording.actions[:n]
    ends = (flight.policy.description.get("usual") or {}).get("actions")
    if not n or not ends or recorded.shape[1] != len(flight.actions[0]):
        return None
    reach = np.maximum(np.subtract(ends["high"], ends["low"]), 1e-3)
    return float((abs(np.stack(flight.actions) - recorded) / reach).mean())


def main(argv=None):
    parser = Parser(prog="python -m robot.preflight", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run's folder, or its checkpoint")
    parser.add_argument("episode", help="HDF5 file with a recorded episode")
    parser.add_argument("--demo", help="which one, for example demo_3")
    parser.add_argument("--instruction", help="what the robot will be told")
    parser.add_argument("--sampler_steps", type=int, help="as for sample.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="if the robot's program loads it so")
    parser.add_argument("--robot", help="whose body, if several were trained on")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse(argv, {"sampler_steps": (1, 100_000)})
    policy = Policy.load(args.run, device=args.device, steps=args.sampler_steps, robot=args.robot)
    if args.compile:
        policy.compile()
    d = policy.description
    colour = (d.get("usual") or {}).get("colour", "bgr")
    recording = Recording(args.episode, d["state_keys"], d["camera_keys"], args.demo, colour)
    with contextlib.closing(recording):
        flight = fly(policy, recording, args.instruction or recording.instruction)
    found = judge(flight)
    go = not any(level == "reason" for level, _, _ in found)
    if args.json:
        content = {"go": go, "episode": recording.name, "steps": len(flight.actions),
                   "chunk_seconds": flight.seconds, "distance_from_recorded": agreement(flight),
                   **{f"{kind}s": [{"name": name, "what": what} for level, name, what in found
                                   if level == kind] for kind in ("reason", "remark")}}
        json.dump(content, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(lines(flight, found, go)))
    if not go:
        sys.stdout.flush()
        raise SystemExit(1)


def lines(flight, found, go):
    yield "GO" if go else "NO-GO"
    for kind, head in (("reason", "  - "), ("remark", "  remark, ")):
        yield from (head + one_line(f"{name}: {what}", 380) for level, name, what in found if level == kind)
    times, apart = flight.seconds[1:], agreement(flight)
    yield (f"{flight.recording.name}: {len(flight.actions)} of {flight.recording.length} steps"
           + (f", {len(flight.seconds)} chunks of {1e3 * np.median(times):.0f} ms" if times else "")
           + (f", {apart:.1%} of the range away from the recorded actions" if apart is not None else ""))


if __name__ == "__main__":
    run_command(main)
