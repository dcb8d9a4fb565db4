"""A robot's program, whole. The robot is the built-in task, in real time; put your own in its place.

    python train.py --model dp_cnn
    python examples/robot.py out/dp_cnn                             the policy in a thread of this program
    python examples/robot.py out/dp_cnn --strategy naive --speed 10 ten times as fast

    python examples/robot.py --serve out/dp_cnn --port 5555         the policy in a process of its own,
    python examples/robot.py --connect 127.0.0.1:5555               here or on another machine

The loop below runs at the robot's own pace and never waits for the network. When a chunk is late, or the
connection is lost, the arm holds still, and goes on when the policy is back: stop the server and start it
again to see it.

What to copy: this file, robot/, the model file, the checkpoint. What to change: `Robot`. Connect to a machine
in your own network only, or through a tunnel (ssh -L 5555:127.0.0.1:5555 gpu-machine): see robot/remote.py.
"""
import sys
import time
from pathlib import Path

import numpy as np

# In a checkout robot/ and the model files are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from robot.cli import SEEDS, Parser
from robot.errors import UserError, run_command, say
from robot.policy import Policy
from robot.realtime import STRATEGIES, InThread, RealTime
from robot.remote import Remote, serve
from robot.tabletop import Tabletop

RANGES = {"port": (0, 65535), "speed": (0.01, 1000), "episodes": (1, 1_000_000), "seed": SEEDS,
          "timeout": (0.01, 3600)}


class Robot:
    """What a robot has to offer, here by the built-in task. Yours reads its sensors and sends its
    commands."""
    hz = Tabletop.fps                       # control steps per second, those of the demonstrations

    def __init__(self):
        self.world = Tabletop(1)

    def start(self, seed):
        """Bring the arm to where an episode starts. -> the first observation"""
        obs, info = self.world.reset(seed=seed)
        return self.seen(obs, info)

    def step(self, action):
        """Command an action (A,). -> the observation that follows, and whether the episode is over."""
        obs, _, terminated, truncated, info = self.world.step(action[None])
        return self.seen(obs, info), bool(terminated[0] or truncated[0])

    def seen(self, obs, info):
        """One observation: the keys, shapes and units of the demonstrations, pictures (H, W, 3) uint8 RGB,
        and the instruction for policies that read."""
        self.outcome = str(info["outcome"][0])
        return {key: x[0] for key, x in obs.items()} | {"instruction": info["instruction"][0]}

    @staticmethod
    def hold(observation, last):
        """The action with which the arm stays where it is. Here actions are positions: the present one, and
        the gripper as it was commanded last. For a robot that is told velocities: zeros."""
        gripper = [-1.0] if last is None else last[2:]
        return np.concatenate([observation["robot0_eef_pos"], gripper]).astype(np.float32)


class Clock:
    """Wakes the loop at a steady pace. A step that came too late is counted, and not made up for: two
    commands in a row would be one jump."""

    def __init__(self, hz):
        self.period, self.late, self.steps = 1 / hz, 0, 0
        self.next = time.monotonic() + self.period

    def wait(self):
        now = time.monotonic()
        self.steps += 1
        if now > self.next:
            self.late += 1
            self.next = now
        time.sleep(self.next - now)
        self.next += self.period


def episode(robot, policy, speed, seed):
    """-> {"outcome", "steps", "held", "delays", "late", "act_ms": the longest that `act` took}"""
    policy.reset()
    observation, done, slowest = robot.start(seed), False, 0.0
    clock = Clock(robot.hz * speed)
    while not done:
        began = time.perf_counter()
        action = policy.act(observation)
        slowest = max(slowest, time.perf_counter() - began)
        clock.wait()
        observation, done = robot.step(action)
    return {"outcome": robot.outcome, "steps": clock.steps, "held": policy.held, "delays": policy.delays,
            "late": clock.late, "act_ms": 1e3 * slowest}


def reach(address, timeout, patience=30.0):
    """A connection to the policy; its server may still be starting."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return Remote(address, timeout)
        except OSError as e:
            if time.monotonic() > deadline:
                raise UserError(f"nobody answers at {address} ({e.strerror or e}): start the server with "
                                f"--serve") from None
            time.sleep(0.2)


def load(args):
    policy = Policy.load(args.run, args.device)
    if args.compile:
        policy.compile(guided=args.serve or args.strategy == "rtc")
    return policy


def parse(argv):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("run", nargs="?", help="folder of a training run; not with --connect")
    add("--serve", action="store_true", help="serve the policy to a robot that connects, until stopped")
    add("--connect", default="", metavar="HOST:PORT", help="where the policy is served")
    add("--host", default="127.0.0.1", help="--serve: who may connect; 0.0.0.0 = all (default: this machine)")
    add("--port", type=int, default=5555, help="--serve: (default: 5555)")
    add("--timeout", type=float, default=2.0, help="--connect: seconds after which an answer is given up")
    add("--strategy", default="rtc", help=f"{', '.join(STRATEGIES)} (default: rtc)")
    add("--speed", type=float, default=1.0, help="times real time (default: 1)")
    add("--episodes", type=int, default=5)
    add("--seed", type=int, default=0, help="of the first episode (default: 0)")
    add("--device", default="auto", help="auto | cpu | cuda | mps (default: auto)")
    add("--compile", action="store_true", help="faster chunks, after minutes of torch.compile at the start")
    args = parser.parse(argv, RANGES)
    if bool(args.run) == bool(args.connect):
        raise UserError("give either a run, as in out/dp_cnn, or --connect HOST:PORT")
    return args


def main(argv=None):
    args = parse(argv)
    if args.serve:
        policy = load(args)
        print(f"{args.run} is served at {args.host}:{args.port}; stop with Ctrl-C", flush=True)
        serve(policy, args.host, args.port)
    if args.connect:
        worker = reach(args.connect, args.timeout)
    else:
        worker = InThread(load(args))
    if worker.settings["fps"] not in (None, Robot.hz):
        say(f"the policy learned from {worker.settings['fps']:g} steps per second, the robot makes "
            f"{Robot.hz}")
    policy, robot = RealTime(worker, args.strategy, Robot.hold), Robot()
    results = []
    for i in range(args.episodes):
        results.append(result := episode(robot, policy, args.speed, args.seed + i))
        delays = np.array(result["delays"] or [0])
        print(f"episode {i}: {result['outcome']} in {result['steps']} steps; delays {np.median(delays):.0f} "
              f"(median) to {delays.max()} steps; held still in {result['held']} steps; act took "
              f"{result['act_ms']:.1f} ms at most; {result['late']} steps began late", flush=True)
    policy.close()
    return results


if __name__ == "__main__":
    run_command(main)
