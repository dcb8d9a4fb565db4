"""Diffusion Policy's rotations and actions with rotations, against robot/rotations.py and Processing."""
import numpy as np
import pytest
import torch
from golden_cases import GOLDEN_DIR

from robot.processing import Processing
from robot.rotations import convert

PATHS = sorted((GOLDEN_DIR / "pipelines").glob("dp_rotations*.npz"))
NONE = [pytest.param(None, marks=pytest.mark.skip(reason="GOLDEN_DIR/pipelines has no dp_rotations case"))]
FORMS = {"axis_angle": "axis_angle", "quaternion": "quaternion_wxyz", "matrix": "matrix",
         "rotation_6d": "rotation_6d"}


def form(name):
    """Ours of an official name; "euler_XYZ" and so on."""
    return FORMS.get(name) or f"euler_{name.split('_')[1].lower()}_intrinsic"


@pytest.mark.parametrize("path", PATHS or NONE, ids=lambda path: getattr(path, "stem", "none"))
def test_pipeline_rotations(path):
    with np.load(path, allow_pickle=False) as file:
        case = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    conversions = [key for key in case if key.startswith(tuple(f"out/{name}" for name in (*FORMS, "euler")))]
    assert len(conversions) >= 10
    for key in conversions:
        source, target = key.removeprefix("out/").split("_to_")
        x = case[f"in/{source}"]
        if target.startswith("euler"):                          # of the rotations whose angles were given
            x = case[f"out/{target}_to_{source}"]
        close(key, convert(x.flatten(1), form(source), form(target)).reshape(case[key].shape), case[key])
    for key in case.keys() - set(conversions):
        kind, _, width = key.removeprefix("out/").partition("_")
        if key.startswith("in/") or kind not in ("actions", "pred"):
            continue
        source, target = map(int, width.split("_to_"))
        arms = min(source, target) // 7
        # Each arm: position 3, rotation, gripper 1. The second arm begins where the first has left it.
        turns = [{"rotation": {"at": 10 * arm + 3, "from": "axis_angle", "to": "rotation_6d"}}
                 for arm in range(arms)]
        processing = Processing({"actions": turns}, {})
        assert processing.action_dim(7 * arms) == 10 * arms
        x, now = case[f"in/{kind}_{source}"], torch.zeros(1, 0)
        function = processing.actions if kind == "actions" else processing.undo_actions
        close(key, function(x, now).reshape(case[key].shape), case[key])


def close(name, got, want):
    error, limit = (got - want).abs().max().item(), 1e-5 * want.square().mean().sqrt().item()
    assert error <= limit, f"{name} differs by {error:.2e}, allowed {limit:.2e}"


def test_the_official_actions_come_back():
    """Of the rotations of the case: the same rotation, though not always the same vector."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(50, 1, 7)).astype(np.float32))
    steps = [{"rotation": {"at": 3, "from": "axis_angle", "to": "rotation_6d"}}]
    processing, now = Processing({"actions": steps}, {}), torch.zeros(50, 0)
    back = processing.undo_actions(processing.actions(x, now), now)
    assert torch.equal(back[..., :3], x[..., :3]) and torch.equal(back[..., 6], x[..., 6])
    turned = [convert(a[..., 3:6], "axis_angle", "matrix") for a in (x, back)]
    assert (turned[0] - turned[1]).abs().max() < 1e-6
