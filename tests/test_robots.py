"""Several robots in one run: YAML -> mixed data -> one set of weights -> each body acts."""
import numpy as np
import pytest

import train
from robot.checkpoint import load_model
from robot.errors import UserError
from robot.normalizer import Normalizer
from robot.policy import Policy

SMALL = ["--steps", "2", "--warmup", "1", "--batch_size", "4", "--demos", "4", "--episodes", "2", "--dtype",
         "float32", "--set", "vit_depth=1", "--set", "width=32", "--set", "depth=2", "--set", "horizon=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(folder / "cache"))
        result = train.main(["--config", "configs/rdt_two_robots.yaml", "--out", str(folder / "out"), *SMALL])
    return folder / "out", result


def test_each_robot_is_evaluated_in_its_own_world(run):
    out, result = run
    for robot in ("tabletop", "tabletop_velocity"):
        assert result[f"episodes_{robot}"] == 2 and 0 <= result[f"success_{robot}"] <= 1
    assert 0 < result["error_of_mean"] < 10 and (out / "report.html").exists()


def test_a_policy_acts_in_the_body_it_is_asked_for(run):
    out, _ = run
    model, checkpoint = load_model(out)
    normalizer = Normalizer.from_state(checkpoint["normalizer"])
    seen = []
    inner = model.sample
    model.sample = lambda batch, **kw: seen.append(batch) or inner(batch, **kw)
    obs = {
        "robot0_eef_pos": np.zeros(2, np.float32),
        "robot0_gripper_qpos": np.ones(1, np.float32),
        "agentview_image": np.zeros((64, 64, 3), np.uint8),
        "instruction": "red block to the left",
        "robot0_eye_in_hand_image": np.zeros((64, 64, 3), np.uint8),
    }
    for robot, hz, places in (("tabletop", 10, [10, 30, 31]), ("tabletop_velocity", 5, [10, 39, 40])):
        policy = Policy(
            model, normalizer, checkpoint["data"], robot=robot, without=["agentview_image"]
        )
        assert policy.act(obs).shape == (3,) and policy.chunk.shape == (1, 8, 3)
        batch = seen[-1]
        assert batch["control_hz"].tolist() == [hz]
        assert batch["action_valid"][0].nonzero().flatten().tolist() == places
        assert batch["state"][0, -1].nonzero().flatten().tolist() in ([10, 30, 31], [30, 31])
        cameras = checkpoint["data"]["camera_keys"]
        covered = batch["images"][0, :, cameras.index("agentview_image")]
        assert (covered == 127).all() and (batch["images"] == 0).any()
    loaded = Policy.load(out, robot="tabletop_velocity")
    assert loaded.description["fps"] == 5 and loaded.places["actions"] == policy.places["actions"]
    for robot, words in (
        (None, "add --robot with one of tabletop, tabletop_velocity"),
        ("tabletop_v", "not trained on, did you mean 'tabletop"),
    ):
        with pytest.raises(UserError, match=words):
            Policy(model, normalizer, checkpoint["data"], robot=robot)
    with pytest.raises(UserError, match="no camera 'agentview', did you mean 'agentview_image'"):
        Policy(model, normalizer, checkpoint["data"], robot="tabletop", without=["agentview"])


@pytest.mark.parametrize(
    "robots, words",
    [
        ("{a: {data: tabletop}}", "robots: a: needs action_names and state_names"),
        (
            "{a: {data: tabletop, action_names: [eef_pos_q], state_names: []}}",
            "'eef_pos_q' is no name.*did you mean",
        ),
    ],
)
def test_robots_that_are_not_described(tmp_path, robots, words):
    (tmp_path / "a.yaml").write_text(f"model: rdt\nrobots: {robots}\n")
    with pytest.raises(UserError, match=words):
        train.main(["--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out")])


def test_a_model_without_a_unified_vector_refuses_robots(tmp_path):
    with pytest.raises(UserError, match="dp_cnn has no unified action vector: use --model rdt"):
        train.main(["--config", "configs/rdt_two_robots.yaml", "--model", "dp_cnn", "--out", str(tmp_path)])
