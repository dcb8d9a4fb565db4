"""Meta-World: 50 tasks of one arm at a table, each with a scripted expert, made by others.

Yu et al. 2019, arXiv:1910.10897; the package metaworld (Farama), physics by MuJoCo. An observation is 39
numbers: hand (3), opening of the gripper, pose of two objects (7 each), the same of the step before, and the
goal (3). An action is 4 numbers in [-1, 1]: displacement of the hand in hundredths of a metre, closing of the
gripper. 80 steps of control a second. An episode ends when the task is done, at the latest after 500 steps.

    tasks_of(names)         the tasks by name, or one line with the nearest name
    Scene(task)             one of them, as Gymnasium has environments; reset(seed): the scene of this seed
    MetaworldEpisodes       n of them side by side for a policy, see environments.py

Meta-World's own Gymnasium ids choose an episode's scene from a list of 50, and not by the seed of `reset`.
So two policies would not meet the same scenes; Scene draws every scene anew, from its seed.
"""
import copy
import functools
import importlib.util
import os
import warnings

import numpy as np

from .errors import UserError, hint, one_line
from .gym_episodes import GymEpisodes, Later, own_context

FPS = 80
MAX_STEPS = 500
GLANCE = 16               # steps between two pictures of a film
CAMERA = "corner2"        # the view of most papers that learn these tasks from pictures, moved nearer to
CAMERA_AT = (0.75, 0.075, 0.7)  # the table as in the data set lerobot/metaworld_mt50

# Each task in words, for policies that read.
WORDS = {
    "assembly": "put the ring over the peg",
    "basketball": "drop the ball into the basket",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press-wall": "reach over the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "lift the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "drive the nail in with the hammer",
    "hand-insert": "put the hand with the puck into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "push the peg into the hole in the side of the box",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "lift the puck out of the hole",
    "pick-place": "pick up the puck and hold it at the goal",
    "pick-place-wall": "carry the puck over the wall to the goal",
    "plate-slide": "slide the plate into the goal",
    "plate-slide-back": "slide the plate back out of the goal",
    "plate-slide-back-side": "slide the plate back out of the goal sideways",
    "plate-slide-side": "slide the plate into the goal sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal with the hand",
    "reach-wall": "reach over the wall to the goal with the hand",
    "shelf-place": "put the block on the shelf",
    "soccer": "push the ball into the net",
    "stick-pull": "pull the jug by the stick",
    "stick-push": "push the jug with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}


def tasks_of(names):
    """Task names, with or without "-v3" -> the same with it, sorted. Raises UserError."""
    tasks = {name.removesuffix("-v3") for name in names}
    for task in sorted(tasks):
        if task not in WORDS:
            raise UserError(f"Meta-World has no task {one_line(task, 60)!r}{hint(task, WORDS)}")
    if not tasks:
        raise UserError(f"no task of Meta-World is named: choose some of {', '.join(list(WORDS)[:5])}, ...")
    needs_package()
    return [f"{task}-v3" for task in sorted(tasks)]


def words_of(task):
    return WORDS[task.removesuffix("-v3")]


def needs_package():
    if importlib.util.find_spec("metaworld") is None:
        raise UserError("Meta-World needs a package: pip install metaworld (see requirements-extras.txt)")


def expert_of(task):
    """The scripted expert of the package: function observation (39,) -> action (4,) in [-1, 1]"""
    from metaworld.policies import ENV_POLICY_MAP
    policy = ENV_POLICY_MAP[task]()

    def act(observation):
        with warnings.catch_warnings():         # "constants may be too high": they are, that is why we cut
            warnings.simplefilter("ignore")
            return np.clip(policy.get_action(observation), -1, 1).astype(np.float32)
    return act


@functools.cache
def class_of(task):
    """The package's class of a task, which reads its XML once: that takes a tenth of a second, an evaluation
    has fifty scenes."""
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    class Task(ALL_V3_ENVIRONMENTS[task]):
        first = None

        def _initialize_simulation(self):
            if Task.first is None:
                Task.first, _ = super()._initialize_simulation()
            model = copy.copy(Task.first)           # a copy of all arrays: every scene moves its own objects
            size = model.vis.global_
            size.offwidth, size.offheight = max(size.offwidth, self.width), max(size.offheight, self.height)
            return model, mujoco.MjData(model)
    return Task


class Scene:
    """One task. Observations are dicts: "state" (39,); "hand" (4,), what of it a robot knows of itself; of
    several tasks "task", one-hot in their order; each camera's picture (H, W, 3), rendered when somebody
    looks at it."""
    spec = None

    def __init__(self, task, tasks, cameras=(), size=(96, 96)):
        self.env = class_of(task)(render_mode="rgb_array", camera_name=CAMERA, width=size[1], height=size[0])
        self.env.model.cam(CAMERA).pos[:] = CAMERA_AT
        self.env._partially_observable, self.env._set_task_called = False, True     # the goal is observed
        vars(self.env).pop("sawyer_observation_space", None)    # kept from before, it cuts the goal to 0
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True       # a scene of its own per seed
        self.one_hot = np.array([name == task for name in tasks], np.float32)
        self.task, self.cameras, self.action_space = task, cameras, self.env.action_space

    def observe(self, state):
        state = np.asarray(state, np.float32)
        obs = {"state": state, "hand": state[:4]}
        obs |= {"task": self.one_hot} if len(self.one_hot) > 1 else {}
        return obs | {camera: Later(self.render) for camera in self.cameras}

    def reset(self, seed):
        self.env.seed(int(seed))
        self.steps, self.picture = 0, None
        return self.observe(self.env.reset()[0]), {}

    def step(self, action):
        state, reward, _, _, info = self.env.step(action)
        self.steps, self.picture = self.steps + 1, None
        success = bool(info["success"])
        return self.observe(state), reward, success, self.steps >= MAX_STEPS, {"success": success}

    def render(self):
        """(H, W, 3) uint8, the right way up: the package's camera hangs upside down. Drawn once a step.
        Raises UserError where none can be drawn."""
        if self.picture is None:
            try:
                self.picture = np.ascontiguousarray(own_context(self.env).render()[::-1, ::-1])
            except Exception as e:              # any: every backend of MuJoCo fails in its own way
                chosen = os.environ.get("MUJOCO_GL")
                raise UserError(f"no picture can be rendered with MUJOCO_GL={chosen or '(not set)'} "
                                f"({one_line(e, 120)}): use MUJOCO_GL=egl with a GPU, MUJOCO_GL=osmesa "
                                f"without one (apt install libosmesa6)") from None
        return self.picture


class MetaworldEpisodes(GymEpisodes):
    """`spec`, from YAML:

        id: metaworld
        tasks: [pick-place-v3, push-v3]     default: those whose words the data have as instructions
        max_steps: 500
        obs: {...}                          as in GymEpisodes; default: state, task, and the data's cameras

    Episode i is of task i modulo the number of tasks.
    """
    FIELDS = ("id", "tasks", "max_steps", "obs")

    def __init__(self, n, description, spec):
        told = [task for task, words in WORDS.items() if words in description.get("instructions", ())]
        tasks = spec.get("tasks") or told
        if not isinstance(tasks, (list, tuple)) or not all(isinstance(task, str) for task in tasks):
            raise UserError(f"env: tasks must be a list of names, not {one_line(tasks, 60)}")
        self.tasks = tasks_of(tasks)
        self.glances = {}
        super().__init__(n, description, {"max_steps": MAX_STEPS} | spec)

    def make(self, i):
        size = self.description["image_size"] or (96, 96)
        return Scene(self.tasks[i % len(self.tasks)], self.tasks, self.description["camera_keys"], size)

    def glance(self, i, obs):
        """A new picture every GLANCE steps: without a GPU one takes longer than a hundred steps. Where the
        policy looks in the same step, it sees the same one."""
        if self.envs[i].steps % GLANCE == 0 or i not in self.glances:
            self.glances[i] = super().glance(i, obs)
        return self.glances[i]

    def told(self):
        return {"instruction": [words_of(env.task) for env in self.envs]}
