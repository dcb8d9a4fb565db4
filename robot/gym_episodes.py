"""Any Gymnasium environment as a policy sees it: n copies, stepped in turn. What a YAML says about one is
described at GymEpisodes; docs/environments.md has examples.
"""
import contextlib
import importlib
import importlib.util
import math
import re

import numpy as np

from .errors import UserError, hint, one_line, say_once

# Environments that could not render once are not asked again in this process: where MuJoCo finds no GL, its
# second attempt ends the process.
BLIND = set()


class GymEpisodes:
    """n copies of a Gymnasium environment, stepped in turn. `spec`, from YAML:

        id: gym_pusht/PushT-v0             as for gymnasium.make; MODULE:NAMESPACE/NAME imports MODULE first
        kwargs: {obs_type: state}          for gymnasium.make
        max_steps: 300
        instruction: push the T            for policies that read
        success: info_key                  what in `info` means success; default is_success, then success
        clip: false                        leave actions as they are, where the space's bounds are not true
        obs:                               our key -> where it is found in the environment's observation
          agent_pos: state[0:2]            slice of an array; the name is free if the observation is one array
          image: pixels.top                a key of a dict, of a dict in it, or a name that holds dots
          keypoint: {pose: "state[2:5]", points: [[9.3, 90.0], ...]}   points of a body with pose x, y, angle

    Success is unknown where `info` does not say it: that an episode has terminated may mean anything. Actions
    are cut to the bounds of the action space, which is said once, unless clip is false.
    """
    films_all = False
    FIELDS = ("id", "kwargs", "max_steps", "instruction", "success", "clip", "obs")

    def __init__(self, n, description, spec):
        for key in spec:
            if key not in self.FIELDS:
                raise UserError(f"env: unknown key {key!r}{hint(key, self.FIELDS)}")
        if not isinstance(spec.get("id"), str):
            raise UserError("env: names no environment; add its id, for example id: gym_pusht/PushT-v0")
        if not isinstance(spec.get("clip", True), bool):
            raise UserError(f"env: clip must be true or false, not {one_line(spec['clip'], 60)}")
        self.spec, self.description, self.renders = spec, description, True
        with self.guard("made"):
            self.envs = [self.make(i) for i in range(n)]
        wanted = [*description["state_keys"], *description["camera_keys"]]
        self.mapping = spec.get("obs") or {key: key for key in wanted}
        absent = [key for key in wanted if key not in self.mapping]
        if absent:
            raise UserError(f"env: obs: does not say where {absent[0]!r} comes from; add it to the YAML")
        limit = self.envs[0].spec.max_episode_steps if self.envs[0].spec else None
        self.max_steps = spec.get("max_steps") or limit or 1000
        self.done = np.zeros(n, bool)
        self.check_actions(self.envs[0].action_space)

    @contextlib.contextmanager
    def guard(self, done):
        """What somebody else's environment raises becomes one line."""
        try:
            yield
        except UserError:
            raise
        except ImportError as e:
            raise UserError(f"environment {self.spec['id']} needs a package: pip install "
                            f"{e.name or 'gymnasium'} (see requirements-extras.txt)") from None
        except Exception as e:  # any: it is not our code
            raise UserError(f"environment {self.spec['id']} cannot be {done}: {type(e).__name__}: "
                            f"{one_line(e)[:250]}") from None

    def make(self, i):
        """Number i of the copies."""
        import gymnasium
        name, options = self.spec["id"], dict(self.spec.get("kwargs") or {})
        package = name.partition("/")[0]
        if ":" not in name and package.isidentifier() and importlib.util.find_spec(package):
            importlib.import_module(package)  # many packages register their environments under their own name
        options |= {"disable_env_checker": True, "max_episode_steps": self.spec.get("max_steps")}
        try:
            return gymnasium.make(name, render_mode="rgb_array", **options)
        except TypeError:  # an environment that takes no render_mode
            self.renders = False
            return gymnasium.make(name, **options)
        except gymnasium.error.Error as e:
            advice = "" if ":" in name else f"; pip install {package}" * ("/" in name) + (
                f"; if another module registers it, write MODULE:{name}")
            raise UserError(f"environment {name}: {one_line(e)[:200]}{advice}") from None

    def check_actions(self, space):
        """The environment's actions are numbers, as many as the policy gives."""
        shape, wanted = getattr(space, "shape", None), self.description.get("action_dim")
        if not hasattr(space, "low"):
            raise UserError(f"environment {self.spec['id']} takes {one_line(space)[:80]}; a policy gives "
                            f"vectors of numbers, which needs a Box")
        if wanted is not None and np.prod(shape, dtype=int) != wanted:
            raise UserError(f"environment {self.spec['id']} takes actions of shape {shape}, the data have "
                            f"{wanted} numbers: it is another robot's")

    def reset(self, seeds):
        self.done[:] = False
        with self.guard("reset"):
            self.last = [own_context(env).reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds)]
        return self.observe(), self.told()

    def step(self, action):
        n = len(self.envs)
        reward, success, known = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
        for i in np.flatnonzero(~self.done):
            space = self.envs[i].action_space
            one = np.asarray(action[i], space.dtype).reshape(space.shape)
            inside = np.clip(one, space.low, space.high) if self.spec.get("clip", True) else one
            if not np.array_equal(inside, one):
                say_once(f"{self.spec['id']}: actions are cut to its bounds {one_line(space)[:80]}")
            with self.guard("stepped"):
                self.last[i], reward[i], terminated, truncated, info = own_context(self.envs[i]).step(inside)
            found = self.success_of(info)
            known[i], success[i] = found is not None, bool(found)
            self.done[i] = terminated or truncated
        return self.observe(), reward, self.done.copy(), self.told() | {"success": success, "known": known}

    def success_of(self, info):
        """True or False as `info` says, None if it does not."""
        key = self.spec.get("success")
        if key and key not in info:
            raise UserError(f"env: success: {key!r} is not in the environment's info{hint(key, info)}")
        found = info[key] if key else info.get("is_success", info.get("success"))
        return None if found is None else bool(np.any(found))

    def told(self):
        text = self.spec.get("instruction")
        return {"instruction": [str(text)] * len(self.envs)} if text else {}

    def observe(self):
        found = dict(self.told())
        for key, where in self.mapping.items():
            try:
                found[key] = self.look(key, where)
            except (KeyError, TypeError, ValueError, AttributeError):
                has = ", ".join(names(self.last[0])) or "one array"
                raise UserError(f"env: obs: {key}: {str(where)[:60]!r} is not in the environment's "
                                f"observation ({has[:150]}); write NAME, NAME[FROM:TO] or {{pose: .., "
                                f"points: ..}}") from None
        return found

    def look(self, key, where):
        """(n, ...) of one key: numbers of any shape as a row; pictures keep theirs, and are rendered when the
        policy looks at them, where the environment can wait with it."""
        seen = [pick(obs, where) for obs in self.last]
        if any(isinstance(one, Later) for one in seen):
            return Later(lambda: np.stack(seen))
        stacked = np.stack(seen)
        return stacked.reshape(len(seen), -1) if key in self.description["state_keys"] else stacked

    def glance(self, i, obs):
        """A small picture, or a blank one where none is to be had: an evaluation never dies of a picture."""
        picture = None
        if self.renders and self.spec["id"] not in BLIND:
            try:
                picture = np.asarray(own_context(self.envs[i]).render(), np.uint8)
                assert picture.ndim == 3 and picture.shape[2] == 3
            except Exception as e:  # no screen, no GL, no picture
                picture = None
                BLIND.add(self.spec["id"])
                say_once(f"{self.spec['id']} renders no picture ({type(e).__name__}: {one_line(e)[:100]}): "
                         f"there will be no films")
        if picture is None:
            return np.full((8, 8, 3), 127, np.uint8)
        return picture[::max(1, len(picture) // 96), ::max(1, len(picture) // 96)]

    def film(self, glances):
        same = [picture for picture in glances if picture.shape == glances[0].shape]
        return np.stack(same)


def own_context(env):
    """Gymnasium's MuJoCo renderer draws in the OpenGL context that was made last, be it that of another
    environment, whose textures and buffers are not its own. -> env, its own context made current"""
    viewer = getattr(getattr(getattr(env, "unwrapped", env), "mujoco_renderer", None), "viewer", None)
    if viewer is not None:
        viewer.make_context_current()
    return env


class Later:
    """A picture that is drawn when NumPy asks for it, in the state that the environment has then: a policy
    that looks once a chunk does not wait for all the others. Who copies it, to look later, has it drawn."""

    def __init__(self, draw):
        self.draw = draw

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.draw(), dtype)

    def __deepcopy__(self, memo):
        return np.array(self)


def names(obs, above=""):
    """Names of everything in a dict observation, those of inner dicts behind a dot."""
    for key, value in obs.items() if isinstance(obs, dict) else ():
        yield from names(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]


def entry(obs, name):
    """What a dict observation holds under `name`: a key, or keys of dicts in dicts with dots between them."""
    if not isinstance(obs, dict):
        return obs
    if name in obs:
        return obs[name]
    heads = [name[:i] for i, c in enumerate(name) if c == "." and name[:i] in obs]
    if not heads:
        raise KeyError(name)
    return entry(obs[heads[0]], name[len(heads[0]) + 1:])


def pick(obs, where):
    """One entry of the mapping above, applied to one observation. KeyError if it is not there."""
    if isinstance(where, dict):
        x, y, angle = pick(obs, where["pose"])
        c, s = math.cos(angle), math.sin(angle)
        points = np.asarray(where["points"]) @ np.array([[c, s], [-s, c]]) + [x, y]   # rotated, then moved
        return points.reshape(-1)
    name, part = re.fullmatch(r"(.*?)(?:\[(\d+:\d+)\])?", where).groups()
    if "[" in name:
        raise KeyError(name)
    value = entry(obs, name)
    value = value if isinstance(value, Later) else np.asarray(value)
    return value[slice(*map(int, part.split(":")))] if part else value
