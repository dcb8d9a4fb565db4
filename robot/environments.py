"""Environments: n episodes side by side, as a policy and the closed loop (rollout.py) see them.

    reset(seeds (n,))     -> observations {key: (n, ...)}, info
    step(actions (n, A))  -> observations, reward (n,), done (n,), info with "success" (n,)
    glance(i, obs)        what a film of episode i needs of this moment; film([glance]) -> (T, H, W, 3) uint8
    films_all             True where a glance costs next to nothing
    max_steps             after which every episode has ended

To add one, write a class with these and enter it in ENVIRONMENTS (docs/extending.md).
"""
import importlib
import math
import re

import numpy as np

from . import tabletop
from .errors import UserError


class TabletopEpisodes:
    """The built-in task, with one of its robots. Pictures are rendered for the policy only if it has cameras;
    films are drawn from the low-dimensional observations afterwards."""
    films_all = True

    def __init__(self, n, description, instruction=None, robot=tabletop.Tabletop):
        self.max_steps = robot.max_steps * robot.fps // tabletop.FPS
        size = description["image_size"][0] if description["image_size"] else 64
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


class GymEpisodes:
    """n copies of a Gymnasium environment, stepped in turn. `spec`, from YAML:

        id: gym_pusht/PushT-v0             an id that needs its package imported is written as PACKAGE/NAME
        kwargs: {obs_type: state}          for gymnasium.make
        max_steps: 300
        obs:                               our key -> where it is found in the environment's observation
          agent_pos: state[0:2]            slice of an array; "state" alone if the observation is one array
          image: pixels                    a key of a dict observation
          keypoint: {pose: "state[2:5]", points: [[9.3, 90.0], ...]}   points of a body with pose x, y, angle
    """
    films_all = False

    def __init__(self, n, description, spec):
        if "id" not in spec:
            raise UserError("env: names no environment; add its id, for example id: gym_pusht/PushT-v0")
        try:
            import gymnasium
            name = spec["id"]
            if "/" in name:
                importlib.import_module(name.split("/")[0])
            self.envs = [gymnasium.make(name, disable_env_checker=True, render_mode="rgb_array",
                                        max_episode_steps=spec.get("max_steps"), **spec.get("kwargs", {}))
                         for _ in range(n)]
        except ImportError as e:
            raise UserError(f"environment {spec['id']} needs a package: pip install {e.name or 'gymnasium'} "
                            f"(see requirements-extras.txt)") from None
        except (gymnasium.error.Error, TypeError) as e:  # TypeError: kwargs that it does not take
            raise UserError(f"environment {spec['id']}: {' '.join(str(e).split())}") from None
        wanted = list(description["state_keys"]) + list(description["camera_keys"])
        self.mapping = spec.get("obs") or {k: k for k in wanted}
        absent = [k for k in wanted if k not in self.mapping]
        if absent:
            raise UserError(f"env: obs: does not say where {absent[0]!r} comes from; add it to the YAML")
        self.max_steps = spec.get("max_steps") or self.envs[0].spec.max_episode_steps or 1000
        self.done = np.zeros(n, bool)

    def reset(self, seeds):
        self.done[:] = False
        self.last = [env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds)]
        return self.observe(), {}

    def step(self, action):
        reward, success = np.zeros(len(self.envs)), np.zeros(len(self.envs), bool)
        for i in np.flatnonzero(~self.done):
            self.last[i], reward[i], terminated, truncated, info = self.envs[i].step(action[i])
            success[i] = info.get("is_success", info.get("success", terminated))
            self.done[i] = terminated or truncated
        return self.observe(), reward, self.done.copy(), {"success": success}

    def observe(self):
        found = {}
        for key, where in self.mapping.items():
            try:
                found[key] = np.stack([pick(obs, where) for obs in self.last])
            except (KeyError, TypeError, ValueError, AttributeError):
                has = ", ".join(self.last[0]) if isinstance(self.last[0], dict) else "one array"
                raise UserError(f"env: obs: {key}: {where!r} is not in the environment's observation "
                                f"({has}); write NAME, NAME[FROM:TO] or {{pose: .., points: ..}}") from None
        return found

    def glance(self, i, obs):
        picture = self.envs[i].render()
        return picture[::max(1, len(picture) // 96), ::max(1, len(picture) // 96)]

    def film(self, glances):
        return np.stack(glances)


def pick(obs, where):
    """One entry of the mapping above, applied to one observation."""
    if isinstance(where, dict):
        x, y, angle = pick(obs, where["pose"])
        c, s = math.cos(angle), math.sin(angle)
        points = np.asarray(where["points"]) @ np.array([[c, s], [-s, c]]) + [x, y]   # rotated, then moved
        return points.reshape(-1)
    name, part = re.fullmatch(r"(\w*)(?:\[(\d+):(\d+)\])?", where).group(1, 2)
    value = np.asarray(obs[name] if isinstance(obs, dict) else obs)
    return value[slice(*map(int, re.findall(r"\d+", where.partition("[")[2])))] if part else value


def tabletop_episodes(robot):
    return lambda n, description, instruction: TabletopEpisodes(n, description, instruction, robot)


# name -> function (n, description of the data, instruction or None) -> n episodes
ENVIRONMENTS = {name: tabletop_episodes(robot) for name, robot in tabletop.ROBOTS.items()}


def make_episodes(environment, n, description, instruction=None):
    """environment: a name in ENVIRONMENTS, or a dict as in GymEpisodes whose id may be such a name, too."""
    name = environment if isinstance(environment, str) else environment.get("id")
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name](n, description, instruction)
    return GymEpisodes(n, description, environment)
