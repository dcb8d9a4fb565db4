"""Environments: n episodes side by side, as a policy and the closed loop (rollout.py) see them.

    reset(seeds (n,))     -> observations {key: (n, ...)}, info
    step(actions (n, A))  -> observations, reward (n,), done (n,), info with "success" (n,); "known" (n,), if
                          it is not known of every episode; "outcome", "instruction" (n,), if there are any
    glance(i, obs)        what a film of episode i needs of this moment; film([glance]) -> (T, H, W, 3) uint8
    films_all             True where a glance costs next to nothing
    max_steps             after which every episode has ended

To add one, write a class with these and enter it in ENVIRONMENTS (docs/extending.md).
"""
import numpy as np

from . import tabletop
from .gym_episodes import GymEpisodes
from .metaworld import MetaworldEpisodes


class TabletopEpisodes:
    """The built-in task, with one of its robots. Pictures are rendered for the policy only if it has cameras;
    films are drawn from the low-dimensional observations afterwards."""
    films_all = True

    def __init__(self, n, description, instruction=None, robot=tabletop.Tabletop):
        self.max_steps = robot.max_steps * robot.fps // tabletop.FPS
        size = [*description.get("camera_sizes", {}).values(), description["image_size"] or [64]][0][0]
        self.env = robot(n, cameras=bool(description["camera_keys"]), image_size=size)
        self.options = {} if instruction is None else {"instruction": instruction}

    def reset(self, seeds):
        obs, info = self.env.reset(seed=seeds, options=self.options)
        return obs | {"instruction": info["instruction"]}, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs | {"instruction": info["instruction"]}, reward, terminated | truncated, info

    def glance(self, i, obs):
        return {key: obs[key][i] for key in ("robot0_eef_pos", "robot0_gripper_qpos", "object")}

    def film(self, glances):
        return tabletop.film({key: np.stack([g[key] for g in glances]) for key in glances[0]})


def tabletop_episodes(robot):
    return lambda n, description, instruction: TabletopEpisodes(n, description, instruction, robot)


# id -> class (n, description of the data, what the YAML says); any other id is Gymnasium's.
WITH_SPEC = {"metaworld": MetaworldEpisodes}
# name -> function (n, description of the data, instruction or None) -> n episodes
ENVIRONMENTS = {name: tabletop_episodes(robot) for name, robot in tabletop.ROBOTS.items()}


def fields_of(name):
    """What a YAML may say about the environment with this id."""
    return WITH_SPEC.get(name, GymEpisodes).FIELDS


def make_episodes(environment, n, description, instruction=None):
    """environment: a name in ENVIRONMENTS, or a dict as in GymEpisodes whose id may be such a name, too."""
    name = environment if isinstance(environment, str) else environment.get("id")
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name](n, description, instruction)
    spec = {"id": name} if isinstance(environment, str) else environment
    return WITH_SPEC.get(name, GymEpisodes)(n, description, spec)
