"""The robots that openpi has configurations for, as processing descriptions: which observation goes where, in
which units, and what the network's actions mean (src/openpi/training/config.py, src/openpi/policies/).

    ROBOTS["pi0_aloha"]     a Robot, by the name of openpi's configuration

Observations have the names that the robots' own programs give them, and those programs' units.
"""
from dataclasses import dataclass, field

BASE, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"   # the network's cameras, in order


@dataclass(frozen=True)
class Robot:
    model: str                  # "pi0" or "pi05"
    assets: str                 # folder of its statistics, below assets/
    state_keys: dict            # {key: numbers}
    action_dim: int             # numbers of a command
    cameras: dict               # {place of the network: key, or None}
    fps: float                  # control steps a second, of openpi's client
    n_action_steps: int         # executed steps of a chunk, of openpi's client
    horizon: int = 50           # steps of a chunk
    obs: dict = field(default_factory=dict)         # steps of the observations
    actions: tuple = ()                             # ... and of the commands
    state_in_text: bool = False  # pi0.5: the prompt ends with the state
    instruction: str = ""       # where none is given

    def processing(self):
        """As YAML's processing:. openpi resizes pictures with Pillow, as uint8, and centres them on black."""
        return {"obs": dict(self.obs), "actions": list(self.actions), "cameras": dict(self.cameras),
                "images": {"fit": "pad", "filter": "bilinear", "fill": 0}}


def aloha(model, delta=True, **more):
    """Two arms, the left one first: six joints (rad) and a gripper (0..1) each. Some joints turn the other
    way than those of the robots that pi0 was trained on. For pi0 a gripper begins at 0.5476 rad; a command is
    0..1 of the range -0.6213 .. 1.4910 rad. What the robot reports is converted by AlohaGripper (steps.py).
    """
    signs = {"linear": {"at": [1, 2, 8, 9], "factor": [-1.0, -1.0, -1.0, -1.0]}}
    grippers = [6, 13]
    command = {"linear": {"at": grippers, "factor": [1.4910 + 0.6213] * 2, "offset": [-0.6213 - 0.5476] * 2}}
    deltas = [{"delta": {"to": "qpos", "except": grippers}}] * delta
    cameras = {BASE: "cam_high", LEFT: "cam_left_wrist", RIGHT: "cam_right_wrist"}
    return Robot(model, "trossen", {"qpos": 14}, 14, cameras, 50, 25, actions=(signs, command, *deltas),
                 obs={"qpos": [signs, {"aloha_gripper": {"at": grippers}}]},
                 state_in_text=model == "pi05", **more)


def libero(model, delta, **more):
    """A simulated arm in robosuite's observations: position of the hand (m), its rotation as a quaternion
    (x, y, z, w), positions of two fingers (m). Both pictures are to be turned by 180 degrees before."""
    state = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
    cameras = {BASE: "agentview_image", LEFT: "robot0_eye_in_hand_image", RIGHT: None}
    deltas = [{"delta": {"to": ["robot0_eef_pos", "robot0_eef_quat"], "except": [6]}}] * delta
    return Robot(model, "physical-intelligence/libero", state, 7, cameras, 20, 5, actions=tuple(deltas),
                 obs={"robot0_eef_quat": [{"robosuite_axis_angle": {"at": 0}}]}, **more)


def droid(model, delta=False, **more):
    """A Franka arm: seven joints (rad), a gripper (0 open, 1 closed). Commands: velocities of the joints, or
    with `delta` their positions; and the position of the gripper."""
    cameras = {BASE: "observation/exterior_image_1_left", LEFT: "observation/wrist_image_left", RIGHT: None}
    state = {"observation/joint_position": 7, "observation/gripper_position": 1}
    deltas = [{"delta": {"to": "observation/joint_position", "except": [7]}}] * delta
    return Robot(model, "droid", state, 8, cameras, 15, 8, actions=tuple(deltas),
                 state_in_text=model == "pi05", **more)


# If only the folder of the statistics says which robot it is, the first configuration of that robot is taken.
ROBOTS = {
    "pi0_aloha": aloha("pi0"),
    "pi05_aloha": aloha("pi05"),
    "pi0_aloha_towel": aloha("pi0", instruction="fold the towel"),
    "pi0_aloha_tupperware": aloha("pi0", instruction="open the tupperware and put the food on the plate"),
    "pi0_aloha_pen_uncap": aloha("pi0", instruction="uncap the pen"),
    "pi05_aloha_pen_uncap": aloha("pi05", instruction="uncap the pen"),
    "pi0_aloha_sim": aloha("pi0", delta=False, instruction="Transfer cube"),
    "pi0_libero": libero("pi0", delta=True),
    "pi05_libero": libero("pi05", delta=False, horizon=10),
    "pi0_droid": droid("pi0", horizon=10),
    "pi05_droid": droid("pi05", horizon=15),
    "pi05_droid_finetune": droid("pi05", horizon=16),
    "pi05_full_droid_finetune": droid("pi05", delta=True, horizon=16),
    "pi05_droid_jointpos_polaris": droid("pi05", delta=True, horizon=15),
}
