"""robot/processing.py and steps.py: each step by hand, all of them there and back, and what is refused."""
import math

import numpy as np
import pytest
import torch

from robot.errors import UserError
from robot.normalizer import Normalizer
from robot.processing import Processing
from robot.rotations import FORMS, convert

KEYS = {"qpos": 14, "eef_pos": 3, "eef_quat": 4}


def states(rng, n):
    quat = rng.normal(size=(n, 4))
    return {"qpos": rng.uniform(-2, 2, (n, 14)), "eef_pos": rng.normal(size=(n, 3)),
            "eef_quat": quat / np.linalg.norm(quat, axis=1, keepdims=True)}


def test_without_a_description_nothing_changes():
    values = states(np.random.default_rng(0), 5)
    processing = Processing({}, KEYS, ["left", "right"])
    state = processing.state(values)
    assert state.dtype == torch.float32 and processing.state_dims == KEYS and processing.state_dim == 21
    assert torch.equal(state, torch.from_numpy(np.concatenate(list(values.values()), 1)).float())
    x = torch.randn(5, 7, 9)
    assert torch.equal(processing.actions(x, state), x) and torch.equal(processing.undo_actions(x, state), x)
    assert processing.places == [("left", "left"), ("right", "right")] and not processing.relative
    assert processing.action_dim(9) == 9 and processing.modes("minmax", 9) == "minmax"
    assert Processing(None).state_dim == 0


def test_linear_by_hand():
    spec = {"obs": {"qpos": [{"linear": {"at": [6, 13], "factor": [0.5, 2], "offset": [1, 0]}},
                             {"linear": {"at": 0, "factor": -1}}]}}
    x = np.arange(28.0).reshape(2, 14)
    state = Processing(spec, {"qpos": 14}).state({"qpos": x})
    want = x.copy()
    want[:, 6], want[:, 13], want[:, 0] = 0.5 * x[:, 6] + 1, 2 * x[:, 13], -x[:, 0]
    assert np.array_equal(state.numpy(), want.astype(np.float32))


def test_the_gripper_of_aloha_is_a_triangle():
    """Where horn and gap stand at a right angle to the arm the sine is (horn^2 + gap^2 - arm^2) / (2 horn
    gap); 0.5 of the range in metres and the ends, by openpi's formula."""
    step = {"aloha_gripper": {"at": [1]}}
    processing = Processing({"obs": {"q": [step]}, "actions": [step]}, {"q": 2})
    x = torch.tensor([[3.0, 0.0], [3.0, 0.5], [3.0, 1.0]])
    y = processing.state({"q": x})
    for reported, got in zip((0.0, 0.5, 1.0), y[:, 1].tolist()):
        gap = reported * (0.058 - 0.01844) + 0.01844
        angle = math.asin((0.022**2 + gap**2 - 0.036**2) / (2 * 0.022 * gap))
        assert got == pytest.approx((angle - 0.5476) / (1.6296 - 0.5476), abs=1e-6)
    assert torch.equal(y[:, 0], x[:, 0])
    assert (processing.undo_state(y)["q"] - x).abs().max() < 1e-6
    now = torch.zeros(3, 2)
    assert (processing.undo_actions(processing.actions(x[:, None], now), now)[:, 0] - x).abs().max() < 1e-6


def test_delta_by_hand():
    """Relative to the state of "now" after its own steps; what is excepted stays, and so does the order of
    undoing: the state is added first."""
    spec = {"obs": {"qpos": [{"linear": {"at": [0], "factor": -1}}]},
            "actions": [{"linear": {"at": [0], "factor": -1}}, {"delta": {"to": "qpos", "except": [2]}}]}
    processing = Processing(spec, {"other": 1, "qpos": 3})
    now = processing.state({"other": np.array([[9.0]]), "qpos": np.array([[10.0, 20.0, 0.5]])})
    assert now.tolist() == [[9, -10, 20, 0.5]]
    x = torch.tensor([[[11.0, 22.0, 0.75], [12.0, 20.0, 0.25]]])
    got = processing.actions(x, now)
    assert got.tolist() == [[[-1, 2, 0.75], [-2, 0, 0.25]]]
    assert processing.undo_actions(got, now).tolist() == x.tolist()
    assert processing.relative and processing.moving(3) == [0, 1]
    first = Processing({"actions": [{"delta": {"to": "qpos", "except": 0}}]}, {"qpos": 3})
    assert first.moving(3) == [1, 2]                    # 0 is a number of an action, not nothing
    # Another state than that of the chunk: the way is kept, the place is not.
    assert processing.undo_actions(got, now + torch.tensor([0, 0, 5.0, 5.0])).tolist()[0][0] == [11, 27, 0.75]


def random_spec(rng):
    """Steps of every kind, in an order and at places that a seed decides."""
    forms = [form for form in FORMS if form != "axis_angle"]
    pick = lambda n, k: sorted(rng.choice(n, k, replace=False).tolist())
    linear = lambda n: {"linear": {"at": pick(n, 3), "factor": rng.choice([-1, 0.2087, 11.9], 3).tolist(),
                                   "offset": rng.normal(size=3).tolist()}}
    turn = {"rotation": {"at": 3, "from": "axis_angle", "to": str(rng.choice(forms))}}
    last = FORMS[turn["rotation"]["to"]] + 3            # the gripper, wherever the rotation has put it
    quat = {"rotation": {"at": 0, "from": "quaternion_xyzw", "to": str(rng.choice(forms))}}
    return {"obs": {"qpos": [linear(14), linear(14)], "eef_quat": [quat]},
            "actions": [linear(3), turn, {"linear": {"at": last, "factor": 2, "offset": -1}},
                        {"delta": {"to": "qpos", "except": [2, *range(3, last + 1)]}}],
            "normalize": {"actions": {str(rng.choice(Normalizer.MODES)): [0, 1]},
                          "eef_quat": "none"}}


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_there_and_back(seed):
    rng = np.random.default_rng(seed)
    processing = Processing(random_spec(rng), KEYS)
    values = states(rng, 20)
    state = processing.state(values)
    assert state.shape == (20, processing.state_dim) and state.dtype == torch.float32
    x = torch.from_numpy(rng.uniform(-1, 1, (20, 6, 7))).float()
    sent = processing.actions(x, state)
    assert sent.shape == (20, 6, processing.action_dim(7))

    data = {"actions": sent.flatten(0, 1).numpy(), "state": state.numpy()}
    normalizer = Normalizer.fit(data, processing.modes("meanstd", 7))
    now = normalizer.unnormalize("state", normalizer.normalize("state", state))
    assert (now - state).abs().max() <= 1e-6 * state.abs().max()
    back = processing.raw(normalizer, normalizer.normalize("actions", sent),
                          normalizer.normalize("state", state))
    rest = [0, 1, 2, 6]
    assert (back - x)[..., rest].abs().max() < 1e-6 * sent.abs().max()
    turned = [convert(a[..., 3:6], "axis_angle", "matrix") for a in (x, back)]
    assert (turned[0] - turned[1]).abs().max() < 2e-6
    again = processing.undo_state(state)
    assert (again["qpos"].double() - torch.from_numpy(values["qpos"])).abs().max() < 2e-6
    turned = [convert(torch.as_tensor(a), "quaternion_xyzw", "matrix")
              for a in (values["eef_quat"], again["eef_quat"])]
    assert (turned[0] - turned[1]).abs().max() < 1e-6


def test_modes_of_every_number():
    spec = {"normalize": {"actions": {"minmax": [0, 2]}, "b": "none", "c": {"meanstd": [1]}},
            "obs": {"b": [{"rotation": {"at": 0, "from": "quaternion_wxyz", "to": "rotation_6d"}}]}}
    processing = Processing(spec, {"a": 2, "b": 4, "c": 2})
    assert processing.modes("quantile", 3) == {
        "actions": ["minmax", "none", "minmax"],
        "state": ["quantile"] * 2 + ["none"] * 6 + ["none", "meanstd"]}


def test_cameras_in_their_places():
    spec = {"cameras": {"base": "high", "left": None, "right": "wrist"}, "images": {"fit": "pad", "fill": 9}}
    processing = Processing(spec, {}, ["wrist", "high"])
    assert processing.places == [("base", "high"), ("left", None), ("right", "wrist")]
    image = processing.image(np.full((1, 4, 8, 3), 200, np.uint8), (8, 8))
    assert (image[0, 2:6] == 200).all() and (image[0, :2] == 9).all() and (image[0, 6:] == 9).all()


LINEAR = {"at": [0], "factor": 1}


@pytest.mark.parametrize("spec, words", [
    ({"action": []}, "processing: unknown key 'action', did you mean 'actions'"),
    ([], None), (["obs"], "should be KEY: VALUE with obs, actions"),
    ({"obs": {"qpoz": []}}, "obs: qpoz is no state of the robot, did you mean 'qpos'"),
    ({"obs": []}, None), ({"obs": ["qpos"]}, "processing: obs: .* should be KEY: VALUE"),
    ({"obs": {"qpos": {"linear": LINEAR}}}, "obs: qpos: should be a list of steps"),
    ({"obs": {"qpos": [{"linaer": LINEAR}]}}, "qpos: step 1: 'linaer' is no step, did you mean 'linear'"),
    ({"obs": {"qpos": [{"delta": {"to": "qpos"}}]}}, "'delta' is no step .delta comes last"),
    ({"obs": {"qpos": ["linear"]}}, "step 1: 'linear' should be one step"),
    ({"obs": {"qpos": [{"linear": {"at": [0]}}]}}, r"step 1 \(linear\): lacks 'factor'"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"scale": 2}}]}}, r"\(linear\): unknown key 'scale'"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"at": [14]}}]}}, "number 14 does not exist, there are 14"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"at": [-1]}}]}}, r"at: \[-1\] should say which numbers"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"at": [1, 1]}}]}}, "should say which numbers"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"at": True}}]}}, "should say which numbers"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"factor": 0}}]}}, "factor: 0 cannot be undone"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"factor": [1, 2]}}]}}, r"factor: \[1, 2\] should be a number"),
    ({"obs": {"qpos": [{"linear": LINEAR | {"factor": math.nan}}]}}, "factor: nan should be a number"),
    ({"obs": {"eef_quat": [{"rotation": {"at": 0, "from": "quat_xyzw", "to": "matrix"}}]}},
     "from: 'quat_xyzw' is no form of a rotation, did you mean 'quaternion_xyzw'"),
    ({"obs": {"eef_quat": [{"rotation": {"at": 1, "from": "quaternion_xyzw", "to": "matrix"}}]}},
     "quaternion_xyzw from 1 on: number 4 does not exist, there are 4"),
    ({"obs": {"eef_pos": [{"aloha_gripper": {"at": 6}}]}}, "aloha_gripper.*: number 6 does not exist"),
    ({"actions": [{"delta": {"to": "qpos"}}, {"linear": LINEAR}]}, "'delta' is no step .delta comes last"),
    ({"actions": [{"delta": {"to": "actions"}}]}, "delta: to: actions is no state of the robot"),
    ({"actions": [{"delta": {"to": "eef_pos"}}]}, "'eef_pos' has 3 numbers, none for number 3 of"),
    ({"actions": [{"delta": {"to": "qpos", "except": [7]}}]}, "delta: except: number 7 does not exist"),
    ({"actions": [{"delta": {"to": "qpos", "exept": [6]}}]}, "unknown key 'exept', did you mean 'except'"),
    ({"actions": [{"linear": LINEAR | {"at": 7}}]}, "actions: step 1 .linear.: number 7 does not exist"),
    ({"normalize": {"qpos": "minmx"}}, "normalize: qpos: there is no normaliser 'minmx', did you"),
    ({"normalize": {"state": "none"}}, "normalize: state is no state of the robot"),
    ({"obs": {"eef_quat": [{"rotation": {"at": 0, "from": ["matrix"], "to": "matrix"}}]}}, "is no form of a"),
    ({"obs": {"eef_quat": [{"rotation": {"at": [0, 1], "from": "quaternion_xyzw", "to": "matrix"}}]}},
     r"at: \[0, 1\] should be its first number"),
    ({"actions": [{"delta": {"to": "qpos", "except": "0"}}]}, "delta: except: '0' should say which numbers"),
    ({"normalize": {"qpos": {"minmax": [1, 2], "none": [2]}}}, "normalize: qpos: a number has two modes"),
    ({"normalize": {"qpos": 3}}, "normalize: qpos: 3 should be a mode"),
    ({"normalize": {"actions": {"minmax": [7]}}}, "normalize: actions: number 7 does not exist, there are 7"),
    ({"normalize": {"qpos": {"none": [14]}}}, "normalize: qpos: number 14 does not exist"),
    ({"images": {"fit": "padd"}}, "images: fit: 'padd' is not known, did you mean 'pad'"),
    ({"images": {"filter": "lanczos"}}, "images: filter: 'lanczos' is not known"),
    ({"images": {"fill": 256}}, "images: fill: 256 should be a grey level"),
    ({"images": {"size": 3}}, "images: unknown key 'size'"),
    ({"cameras": {"base": "hihg", "wrist": "wrist"}}, "there is no camera 'hihg', did you mean 'high'"),
    ({"cameras": {"base": "high"}}, "camera 'wrist' has no place: give it one"),
    ({"cameras": {"a": "high", "b": "high", "c": "wrist"}}, "cameras: 'high' has two places"),
])
def test_what_is_wrong_is_named(spec, words):
    if words is None:                               # empty is as good as not there
        assert Processing(spec, KEYS, ["high", "wrist"]).state_dim == 21
        return
    with pytest.raises(UserError, match=words) as error:
        Processing(spec, KEYS, ["high", "wrist"]).action_dim(7)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("numbers", [[0, 0, 0, 0], [0, 0, 0, 1.2]])
def test_what_is_no_rotation_is_named(numbers):
    spec = {"obs": {"eef_quat": [{"rotation": {"at": 0, "from": "quaternion_xyzw", "to": "rotation_6d"}}]}}
    values = states(np.random.default_rng(0), 5)
    values["eef_quat"][3] = numbers
    with pytest.raises(UserError, match=r"'eef_quat': \[0, 0, 0, .*\] \(row 3\) is no rotation, quatern"):
        Processing(spec, KEYS).state(values)
    actions = [{"rotation": {"at": 0, "from": "rotation_6d", "to": "axis_angle"}}]
    with pytest.raises(UserError, match=r"actions: \[1, 0, 0, 1, 0, 0\] \(row 1\) is no rotation, rotation"):
        Processing({"actions": actions}, KEYS).absolute_actions([[1.0, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]])


ODD = (None, True, -1, 0, 2**70, 1.5, math.inf, "", "x" * 500, "qpos", "none", [], [[]], [None], [0, 0], {},
       {"at": {}}, {"minmax": [99]}, ["linear"], [{"delta": None}], {"qpos": {"qpos": {}}})


def nodes(value, path=()):
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from nodes(part, (*path, key))


def with_node(value, path, new):
    """A copy of nested dicts and lists in which one part is another."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = with_node(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize("seed", range(2))
def test_whatever_stands_there_is_taken_or_refused_in_one_line(seed):
    """Each part of a description in turn is replaced by each odd value."""
    cameras = {"cameras": {"a": "high", "b": None, "c": "wrist"}, "images": {"fit": "pad", "fill": 3}}
    spec = random_spec(np.random.default_rng(seed)) | cameras
    refused = taken = 0
    for path in list(nodes(spec)):
        for odd in ODD:
            try:
                found = Processing(with_node(spec, path, odd), KEYS, ["high", "wrist"])
                found.action_dim(7), found.modes("minmax", 7)
                taken += 1
            except UserError as error:
                refused += 1
                assert len(str(error)) <= 380 and "\n" not in str(error)
    assert refused > 500 and taken > 50
