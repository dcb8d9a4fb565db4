"""README's moving picture: action chunks form out of noise on the built-in task, then the robot acts.

    python -m tools.movie out/dp_cnn docs/chunks.svg

The policy acts in the evaluation episodes, one after the other. Whenever it looks, it samples COPIES chunks
from the same observation, and the robot executes the first of them. The picture shows the first episode that
succeeds and has a look at which at least a quarter of the chunks pass the wall on either side. It begins at
the first such look. movie_svg.py draws it.
"""
import dataclasses

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from robot import tabletop
from robot.cli import SEEDS, Parser
from robot.environments import make_episodes
from robot.errors import UserError, run_command, written_aside
from robot.policy import Policy
from robot.rollout import evaluation_seeds
from tools import movie_svg

COPIES = 32                             # chunks sampled at each look
EPISODES = 30                           # evaluation seeds that are tried


@dataclasses.dataclass
class Film:
    """One episode from the look at which the policy had to choose; places in table units, [-1, 1]."""
    seed: int
    instruction: str
    states: np.ndarray                  # (S + 1, COPIES, T, 2) targets, noise to actions; [:, 0] is executed
    executed: int                       # how many targets of a chunk are executed before the next look
    looks: list = dataclasses.field(default_factory=list)   # [(control step, the chunk of that look (T, 2))]
    scenes: list = dataclasses.field(default_factory=list)  # [observation], before each control step and last

    @property
    def sides(self):
        return sides_of(self.states[-1])


def sides_of(chunks):
    """On which side of the wall chunks (n, T, 2) get past it: (n,) -1 left, 1 right, 0 not at all."""
    past = chunks[..., 1] > tabletop.WALL_Y
    x = chunks[np.arange(len(chunks)), past.argmax(1), 0]                   # at the first target behind it
    return np.where(past.any(1) & (np.abs(x) > tabletop.WALL[0]), np.sign(x), 0).astype(int)


def find(policy, seed=0):
    """The Film of the first evaluation episode that has one; `seed` as in sample.py."""
    for episode_seed in evaluation_seeds(seed, EPISODES).tolist():
        film = play(policy, episode_seed)
        if film:
            return film
    raise UserError(f"none of {EPISODES} episodes succeeds and has a look at which a quarter of the {COPIES} "
                    f"chunks pass the wall on either side: train longer, or try another --seed")


def play(policy, seed):
    """-> the Film of one episode, or None if the policy has no choice in it or fails."""
    env = make_episodes("tabletop", 1, policy.description)
    obs, info = env.reset(np.array([seed]))
    now, executed = -policy.model.config.first_action, policy.model.config.n_action_steps
    policy.reset()
    film, queue = None, []
    for _ in range(env.max_steps):
        policy.observe(obs)
        if not queue:
            states, chunk = denoise(policy)
            states, queue = states[:, :, now:], list(chunk[now:now + executed])
            left, right = ((sides_of(states[-1]) == side).mean() for side in (-1, 1))
            if film is None and min(left, right) >= 0.25:
                film = Film(seed, info["instruction"][0], states, executed)
            if film:
                film.looks.append((len(film.scenes), states[-1, 0]))
        if film:
            film.scenes.append(env.glance(0, obs))
        obs, _, done, info = env.step(queue.pop(0)[None])
        if done.all():
            break
    if film is None or not info["success"].all():
        return None
    film.scenes.append(env.glance(0, obs))
    return film


class FirstNoise(TorchFunctionMode):
    """Keeps the first noise that is drawn, where sampling starts: the trace only begins after one step."""
    noise = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.randn and self.noise is None:
            self.noise = result
        return result


def denoise(policy):
    """Chunks for the observations so far, in raw units -> (target x, y at every state of the sampler, noise
    first, (S + 1, COPIES, Tp, 2); the first chunk with all its dimensions (Tp, A))."""
    trace = []
    with FirstNoise() as first:
        chunks = policy.sample_chunk(COPIES, trace)
    noise, width = first.noise, trace[0].shape[-1]
    if noise.shape[-1] > width:                     # a model file may draw noise for more than the actions
        noise = noise[..., getattr(policy.model, "places", {}).get("action") or list(range(width))]
    return policy.raw(torch.stack([noise, *trace]))[..., :2], chunks[0]


def main(argv=None):
    parser = Parser(description="Action chunks form out of noise, then the robot acts: an animated SVG")
    parser.add_argument("run", help="folder of a training run, or its checkpoint.pt")
    parser.add_argument("target", help="the .svg that is written")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler and of the episodes (default: 0)")
    parser.add_argument("--robot", default="", help="which of the robots that it was trained on")
    args = parser.parse(argv, {"seed": SEEDS})
    policy = Policy.load(args.run, seed=args.seed, robot=args.robot or None)
    source = policy.description["source"]
    if source != "tabletop":
        raise UserError(f"{args.run} was trained on {source}, the picture needs a policy of the tabletop: "
                        f"only its actions are places on the table")
    film = find(policy, args.seed)
    with written_aside(args.target) as aside:
        aside.write_text(movie_svg.svg(film), encoding="utf-8")
    print(f"wrote {args.target}: evaluation seed {film.seed}, {film.instruction}")
    return film


if __name__ == "__main__":
    run_command(main)
