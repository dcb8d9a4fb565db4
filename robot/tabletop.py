"""A table, two blocks, a wall and a gripper: a manipulation task small enough to read in one sitting.

    y = +1  +-----------------------------+   Seen from above. The gripper is told where to go and whether to
            |   +----+         +-----+    |   close, and shall bring, say, the "red block to the left" zone
            |   |left|         |right|    |   (or the blue, or to the right: four instructions).
            |   +----+         +-----+    |
            |                             |   The wall is the point of it. The scripted expert passes it on
    y = 0.1 |         ==========          |   either side with equal odds; nothing in view tells which. A
            |            [g]              |   policy that regresses to the mean averages both ways into a
            |                             |   third, straight at the wall; a generative one picks a side. A
            |    [red]        [blue]      |   move that would touch the wall is cancelled as a whole: if the
    y = -1  +-----------------------------+   gripper could slide along, the averaged motion would slip
          x = -1                       x = +1 round the end, and nothing would be shown.

Many episodes are stepped at once: every array has a leading axis n and a step is a few array operations.
Gymnasium's reset / step signatures, batched. A finished episode stays frozen until the next reset.

    action (n, 3)                  target x, target y, gripper: absolute position in table units, [-1, 1];
                                   -1 opens .. +1 closes (robomimic's sign)
    obs, float32 but for the images, under robomimic's key names:
      robot0_eef_pos (n, 2)        gripper x, y
      robot0_gripper_qpos (n, 1)   aperture: 0 closed .. 1 open
      object (n, 9)                what only a simulator knows: red x, y; blue x, y; asked block minus gripper
                                   x, y; asked zone's centre minus gripper x, y; 1 while a block is held
      goal (n, 4)                  the instruction for policies that do not read: [red, blue, left, right],
                                   1 for the asked block and the asked zone
      agentview_image              (n, H, W, 3) uint8, the whole table from above
      robot0_eye_in_hand_image     (n, H, W, 3) uint8, what lies around the gripper
    reward (n,)                    1 in the step that succeeds, otherwise 0
    info                           "success" (n,) bool; "instruction", n sentences; "outcome" (n,) of running,
                                   success, wrong (released in a zone, but wrong block or zone), wall (out of
                                   time, pushing at the wall), timeout

The first release of a block inside a zone ends an episode, or else MAX_STEPS do. A block let go of elsewhere
can be picked up again. How an episode starts is a function of its own seed alone.

There is a second robot at the same table, VelocityTabletop: 5 Hz instead of 10, and its actions are
velocities, for policies that learn from several robots at once.

Map: the world's numbers -> Tabletop (reset, step), VelocityTabletop -> cameras -> Expert -> main.
`python -m robot.tabletop` rolls the expert out and prints what it achieves. How its rollouts become
demonstrations is in demos/generated.py.
"""
import numpy as np

FPS = 10                                # control steps per second
MAX_STEPS = 80                          # the expert's longest way takes about 70
ACTION_NAMES = ("target_x", "target_y", "gripper")
INSTRUCTIONS = tuple(f"{colour} block to the {side}"
                     for colour in ("red", "blue") for side in ("left", "right"))

SPEED = 0.07                            # farthest move in one step
FINGER_SPEED = 0.5                      # change of the aperture in one step: two steps from open to closed
GRASP = 0.13                            # closed fingers hold the nearest block within this distance
BLOCK = np.array([0.09, 0.09])          # all sizes are half-sizes (x, y)
ZONE = np.array([0.2, 0.2])
ZONES = np.array([[-0.55, 0.65], [0.55, 0.65]])     # centres: left, right
WALL = np.array([0.4, 0.04])
WALL_Y = 0.1                            # the wall is centred at (0, WALL_Y)


class Tabletop:
    """n episodes side by side; `cameras=False` leaves the images out and is far faster.

    The state is there to be read: gripper (n, 2), aperture (n,), blocks (n, 2, 2) red then blue, held (n,)
    index of the held block or -1, instruction (n,) index into INSTRUCTIONS, outcome (n,), steps done.
    """
    fps, max_steps, action_names = FPS, MAX_STEPS, ACTION_NAMES

    def __init__(self, n=1, cameras=True, image_size=64):
        self.n, self.cameras, self.image_size = n, cameras, image_size
        self.steps = None               # None until the first reset

    def reset(self, seed=None, options=None):
        """Start n new episodes: (obs, info).

        seed: an int (episode i gets seed + i), n ints, or None for starts that nobody can repeat.
        options: {"instruction": int or n ints} asks for something else in the same scene.
        ValueError for anything else.
        """
        if seed is None:
            seed = np.random.default_rng().integers(2**31, size=self.n)
        seeds = np.asarray(seed)
        if seeds.shape not in ((), (self.n,)) or seeds.dtype.kind not in "iu" or seeds.min() < 0:
            raise ValueError(f"seed must be one int or {self.n} of them, none negative, not {seed!r}")
        if seeds.ndim == 0:
            seeds = seeds + np.arange(self.n)
        unknown = set(options or {}) - {"instruction"}
        if unknown:
            raise ValueError(f"unknown reset option {min(unknown)!r}, the only one is 'instruction'")

        self.gripper, self.blocks, asked = (np.stack(part) for part in zip(*map(scene, seeds)))
        asked = np.asarray((options or {}).get("instruction", asked))
        if asked.shape not in ((), (self.n,)) or not np.isin(asked, range(len(INSTRUCTIONS))).all():
            raise ValueError(f"option 'instruction' must be one or {self.n} of 0..3, not {asked.tolist()}")
        self.instruction = np.broadcast_to(asked, self.n).astype(int)
        self.aperture = np.ones(self.n)
        self.held = np.full(self.n, -1)
        self.outcome = np.full(self.n, "running")       # no other outcome is longer, so all fit this dtype
        self.cancelled = np.zeros((self.n, FPS), bool)  # the moves of the last second
        self.steps = 0
        return self._obs(), self._info()

    def step(self, action):
        """Move the running episodes on by one step: (obs, reward, terminated, truncated, info), (n,) each.

        ValueError for an action of another shape than (n, 3) or with a number that is not finite.
        """
        return self._move(self._checked(action))

    def command(self, target):
        """This robot's action that heads for `target` (n, 3): x, y, gripper."""
        return target

    def _checked(self, action):
        if self.steps is None:
            raise ValueError("call reset() before the first step()")
        action = np.asarray(action, dtype=float)
        if action.shape != (self.n, 3):
            raise ValueError(f"action must have shape ({self.n}, 3) (x, y, gripper), not {action.shape}")
        if not np.isfinite(action).all():
            row = np.argwhere(~np.isfinite(action))[0, 0]
            raise ValueError(f"action of episode {row} is not finite: {action[row].tolist()}")
        return action

    def _move(self, action):
        """A tenth of a second towards action (n, 3): x, y, gripper."""
        running = self.outcome == "running"

        # Fingers first: whoever opens lets go of the block where it is, before the arm moves on.
        aperture = np.clip(self.aperture - FINGER_SPEED * np.where(action[:, 2] > 0, 1, -1), 0, 1)
        self.aperture = np.where(running, aperture, self.aperture)
        released = np.where(self.aperture > 0, self.held, -1)               # (n,) block index or -1
        self.held = np.where(self.aperture > 0, -1, self.held)

        # The arm follows its set-point at limited speed, and not at all if the way touches the wall.
        delta = shorten(np.clip(action[:, :2], -1, 1) - self.gripper, SPEED)
        cancelled = running & touches_wall(self.gripper, self.gripper + delta)
        self.gripper = self.gripper + delta * (running & ~cancelled)[:, None]

        # Closed fingers take hold of the nearest block in reach; a held block sits centred between them.
        gap = length(self.blocks - self.gripper[:, None])                   # (n, 2)
        grasps = running & (self.aperture == 0) & (self.held < 0) & (gap.min(1) < GRASP)
        self.held = np.where(grasps, gap.argmin(1), self.held)
        i = np.flatnonzero(self.held >= 0)
        self.blocks[i, self.held[i]] = self.gripper[i]

        # The verdict: the first release inside a zone ends the episode, well or badly.
        place = self.blocks[np.arange(self.n), released]                    # meaningless where released is -1
        inside = (np.abs(place[:, None] - ZONES) <= ZONE).all(-1)           # (n, 2)
        ended = (released >= 0) & inside.any(1)
        success = ended & (2 * released + inside.argmax(1) == self.instruction)
        self.outcome[ended] = "wrong"
        self.outcome[success] = "success"
        self.cancelled[:, self.steps % FPS] = cancelled
        self.steps += 1
        if self.steps >= self.max_steps:
            late = self.outcome == "running"
            self.outcome[late] = np.where(self.cancelled.mean(1) >= 0.5, "wall", "timeout")[late]
        terminated = np.isin(self.outcome, ("success", "wrong"))
        truncated = np.isin(self.outcome, ("wall", "timeout"))
        return self._obs(), success.astype(np.float32), terminated, truncated, self._info()

    def _obs(self):
        block, zone = self.instruction // 2, self.instruction % 2
        asked = self.blocks[np.arange(self.n), block]
        obs = {
            "robot0_eef_pos": self.gripper,
            "robot0_gripper_qpos": self.aperture[:, None],
            "object": np.concatenate([self.blocks.reshape(self.n, 4), asked - self.gripper,
                                      ZONES[zone] - self.gripper, self.held[:, None] >= 0], axis=1),
            "goal": np.concatenate([np.eye(2)[block], np.eye(2)[zone]], axis=1),
        }
        obs = {key: value.astype(np.float32) for key, value in obs.items()}
        return {**obs, **render(obs, self.image_size)} if self.cameras else obs

    def _info(self):
        return {"success": self.outcome == "success", "outcome": self.outcome.copy(),
                "instruction": [INSTRUCTIONS[i] for i in self.instruction]}


class VelocityTabletop(Tabletop):
    """The same table, another robot: 5 Hz, and an action (n, 3) is velocity x, y in table units per second,
    and the gripper as before. It takes the same way in fewer, longer steps, and has 10 seconds for it."""
    fps, max_steps, action_names = 5, 100, ("velocity_x", "velocity_y", "gripper")

    def command(self, target):
        velocity = (target[:, :2] - self.gripper) * self.fps
        return np.column_stack([velocity, target[:, 2]]).astype(np.float32)

    def step(self, action):
        action, paid = self._checked(action), 0
        for _ in range(FPS // self.fps):
            target = np.column_stack([self.gripper + action[:, :2] / FPS, action[:, 2]])
            obs, reward, terminated, truncated, info = self._move(target)
            paid = paid + reward
        return obs, paid, terminated, truncated, info


ROBOTS = {"tabletop": Tabletop, "tabletop_velocity": VelocityTabletop}


def scene(seed):
    """The start that belongs to a seed: gripper (2,), blocks (2, 2), index of the instruction."""
    rng = np.random.default_rng(seed)
    instruction = rng.integers(len(INSTRUCTIONS))
    gripper = rng.uniform([-0.5, -0.25], [0.5, -0.05])
    while True:                         # blocks that do not crowd each other; most draws pass
        blocks = rng.uniform([-0.8, -0.85], [0.8, -0.3], size=(2, 2))
        if length(blocks[0] - blocks[1]) > 0.35:
            return gripper, blocks, instruction


def length(v):
    return np.sqrt((v * v).sum(-1))


def shorten(v, limit):
    """The vectors v (n, 2), those longer than `limit` cut to it."""
    return v * np.minimum(1, limit / np.maximum(length(v), 1e-12))[:, None]


def touches_wall(start, end):
    """Whether the straight ways start -> end, (n, 2) each, touch the wall: (n,) bool.

    Separating axes: a segment and an upright box are apart exactly if their shadows are apart on x, on y or
    on the segment's normal. There is no division, so a gripper that stands still is no special case.
    """
    middle, reach = (start + end) / 2 - [0, WALL_Y], (end - start) / 2
    off_box = (np.abs(middle) > WALL + np.abs(reach)).any(1)
    off_line = (np.abs(middle[:, 0] * reach[:, 1] - middle[:, 1] * reach[:, 0])
                > WALL[0] * np.abs(reach[:, 1]) + WALL[1] * np.abs(reach[:, 0]))
    return ~(off_box | off_line)


# ------------------------------------------------------------------------------------------------ cameras

# Mid-grey is about 0 for a network: a bright table would be a large constant in every patch.
FLOOR, TABLE, GREEN, GREY = (36, 36, 40), (128, 124, 118), (112, 164, 108), (66, 62, 58)
RED, BLUE, PALM, FINGER = (205, 50, 45), (45, 85, 205), (232, 230, 226), (20, 20, 22)
HAND_VIEW = 0.3                         # half-extent of the picture from the hand, table units
# Two cameras never agree on white. It tells an encoder that they share through which one it looks.
HAND_TINT = (1.35, 1.15, 0.9)


def render(obs, size):
    """Both pictures, (n, size, size, 3) uint8, from the low-dimensional observation of n moments."""
    gripper = obs["robot0_eef_pos"]
    return {"agentview_image": film(obs, size),
            "robot0_eye_in_hand_image": draw(obs, gripper, HAND_VIEW, size, HAND_TINT)}


def film(obs, size=96):
    """The picture from above alone, (n, size, size, 3) uint8."""
    return draw(obs, np.zeros_like(obs["robot0_eef_pos"]), 1.0, size)


def draw(obs, centre, extent, size, tint=(1, 1, 1)):
    """Pictures (n, size, size, 3) of the squares `centre` (n, 2) +- `extent`; row 0 is the far side, large y.
    tint: what red, green and blue are multiplied by.

    Everything is an upright rectangle, painted one over the other. How much of a pixel a rectangle covers is
    then a product of two one-dimensional overlaps, each the signed distance to the edge, clipped: exact
    anti-aliasing, so that a block that moves by a tenth of a pixel is still seen to move.
    """
    n = len(centre)
    gripper, aperture, objects = obs["robot0_eef_pos"], obs["robot0_gripper_qpos"], obs["object"]
    ticks = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32) * extent      # pixel centres
    x, y = centre[:, :1] + ticks, centre[:, 1:] - ticks                             # (n, size)
    pixel = 2 * extent / size
    image = np.empty((n, 3, size, size), np.float32)
    image[:] = np.float32(FLOOR)[:, None, None]

    def paint(colour, middle, half):
        middle = np.asarray(middle, np.float32).reshape(-1, 2)
        cover = [np.clip((h - np.abs(axis - m[:, None])) / pixel + 0.5, 0, 1)
                 for axis, m, h in zip((x, y), middle.T, half)]
        cover = (cover[1][:, :, None] * cover[0][:, None, :])[:, None]              # (n, 1, size, size)
        image[:] += cover * (np.float32(colour)[:, None, None] - image)

    paint(TABLE, (0, 0), (1, 1))
    for zone in ZONES:
        paint(GREEN, zone, ZONE)
    paint(GREY, (0, WALL_Y), WALL)
    paint(RED, objects[:, 0:2], BLOCK)
    paint(BLUE, objects[:, 2:4], BLOCK)
    # Two fingers that stand outside a block when open and meet above it when closed. They reach in from the
    # far side and leave the near half of a held block in view: its colour tells which one it is.
    spread = np.concatenate([0.03 + 0.1 * aperture, np.zeros_like(aperture)], axis=1)
    reach_in = gripper + np.float32([0, 0.04])
    paint(PALM, gripper + np.float32([0, 0.1]), (0.16, 0.02))
    paint(FINGER, reach_in - spread, (0.025, 0.06))
    paint(FINGER, reach_in + spread, (0.025, 0.06))
    image = np.minimum(image * np.float32(tint)[:, None, None] + 0.5, 255)
    return image.astype(np.uint8).transpose(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------ scripted expert

REACH = 0.12                            # the set-point leads the gripper by at most this much
CLEARANCE = 0.14                        # between the wall and the way-points around it
DECIDE = 0.3                            # so far before the wall it is decided on which side to pass


class Expert:
    """Scripted policy for the n episodes of `env`; make a new one after each env.reset.

    It follows the instructions it was made with. The side of the wall (`side` (n,): -1 left, +1 right) is
    drawn once per episode with equal odds, whatever the shorter way: nothing that is seen foretells it.
    """

    def __init__(self, env, seed=0):
        self.block, self.zone = env.instruction // 2, env.instruction % 2
        self.side = np.where(np.random.default_rng(seed).random(env.n) < 0.5, -1, 1)
        self.carried = np.zeros(env.n, int)             # steps for which the asked block has been held

    def act(self, obs):
        """Clean actions (n, 3) float32 for what env.reset or env.step returned; call it once per step."""
        n = len(self.side)
        gripper = obs["robot0_eef_pos"].astype(float)
        block = obs["object"][:, :4].reshape(n, 2, 2)[np.arange(n), self.block]
        # A held block is exactly at the gripper, so this also tells that not the other block is held.
        holding = (obs["object"][:, 8] > 0) & (length(block - gripper) < 1e-6)
        self.carried = np.where(holding, self.carried + 1, 0)

        # Rest a little after the grasp, as a careful operator does, before setting out for the zone.
        goal = np.where((self.carried > 2)[:, None], ZONES[self.zone], block)
        far = length(goal - gripper)
        closes = np.where(holding, (self.carried <= 2) | (far >= 0.06), far < 0.05)
        target = gripper + shorten(self._waypoint(gripper, goal) - gripper, REACH)
        return np.column_stack([np.clip(target, -1, 1), np.where(closes, 1, -1)]).astype(np.float32)

    def _waypoint(self, gripper, goal):
        """Where to head for: the goal itself, or first the near, then the far corner at the chosen wall end.

        A function of the position alone (no list of way-points to tick off), so that after a push the expert
        goes on from wherever it finds itself.
        """
        n, slack = len(gripper), 0.05                                   # a corner need not be hit exactly
        across = np.where(goal[:, 1] > WALL_Y, 1, -1)                   # which way to pass: up or down
        progress = across * (gripper[:, 1] - WALL_Y)                    # > 0 on the goal's side of it
        outside = self.side * gripper[:, 0] > WALL[0] + CLEARANCE - slack           # free to pass
        passed = (progress > WALL[1] + CLEARANCE - slack) | ((progress > 0) & ~outside)
        corner_y = WALL_Y + across * np.where(outside, WALL[1] + CLEARANCE, -0.1)
        corner = np.column_stack([self.side * (WALL[0] + CLEARANCE), corner_y])
        # On the way up it first comes straight towards the wall and only then turns to its side: what lies
        # before the turn looks alike for both, so that a policy cannot tell them apart by where it is.
        early = (across > 0) & (progress < -DECIDE - slack)
        corner[early] = np.column_stack([gripper[:, 0], np.full(n, WALL_Y - DECIDE)])[early]
        return np.where(passed[:, None], goal, corner)


def main():
    n = 1000
    env = Tabletop(n, cameras=False)
    obs, info = env.reset(seed=0)
    expert = Expert(env, seed=0)
    steps, side = np.zeros(n), np.zeros(n)
    while (info["outcome"] == "running").any():
        steps += info["outcome"] == "running"
        obs, _, _, _, info = env.step(expert.act(obs))
        # The side on which the gripper first gets past the wall: seen in the motion, not read off the expert.
        side = np.where((side == 0) & (env.gripper[:, 1] > WALL_Y), np.sign(env.gripper[:, 0]), side)
    print(f"expert, {n} episodes: success {info['success'].mean():.1%} (expect 100 %), "
          f"left of the wall {(side < 0).mean():.1%}, right {(side > 0).mean():.1%} (about 50 % each), "
          f"mean length {steps.mean():.1f} steps")


if __name__ == "__main__":
    main()
