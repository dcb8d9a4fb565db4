"""robot/metaworld.py and demos/metaworld.py: somebody else's benchmark, from its demonstrations on."""
import copy

import h5py
import numpy as np
import pytest
from helpers import Recorder, scaled

from demos import metaworld
from demos.generated import DEMO_SEEDS
from robot.environments import make_episodes
from robot.errors import UserError
from robot.gym_episodes import BLIND, Later
from robot.metaworld import GLANCE, WORDS, MetaworldEpisodes, Scene, expert_of, tasks_of, words_of
from robot.policy import Policy
from robot.rollout import closed_loop, rehearse


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("metaworld", reason="package metaworld is an extra")


def test_names_and_words(package):
    assert tasks_of(["push", "pick-place-v3", "push-v3"]) == ["pick-place-v3", "push-v3"]
    with pytest.raises(UserError, match="no task 'pik-place', did you mean 'pick-place'"):
        tasks_of(["pik-place"])
    with pytest.raises(UserError, match="no task of Meta-World is named"):
        tasks_of([])
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    assert {f"{task}-v3" for task in WORDS} == set(ALL_V3_ENVIRONMENTS)
    assert len(set(WORDS.values())) == 50       # a policy that reads can tell them apart


def test_the_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install metaworld"):
        metaworld.generate(["push"], 1, tmp_path / "a.hdf5")
    assert not (tmp_path / "a.hdf5").exists()


def test_a_seed_is_a_scene(package):
    scene, other = Scene("push-v3", ["push-v3"]), Scene("push-v3", ["push-v3"])
    first = [scene.reset(seed)[0]["state"] for seed in (7, 8, 7)]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[0], other.reset(7)[0]["state"])
    assert np.abs(first[0][4:7] - first[1][4:7]).max() > 0.01      # the puck lies elsewhere
    assert np.abs(first[0][36:39] - first[1][36:39]).max() > 1e-3  # and so does the goal, which is observed


def test_recorded_is_what_the_expert_wanted(package):
    """Noise moves the arm and stays out of the actions; a second pass gives the same file."""
    scene, expert = Scene("reach-v3", ["reach-v3"]), expert_of("reach-v3")
    calm, shaken, again = (metaworld.demonstration(scene, expert, 3, noise) for noise in (0, 0.3, 0.3))
    np.testing.assert_array_equal(shaken["actions"], again["actions"])
    assert np.abs(calm["obs"]["state"][5, :3] - shaken["obs"]["state"][5, :3]).max() > 1e-3
    for demo in (calm, shaken):
        wanted = np.stack([expert(state) for state in demo["obs"]["state"]])
        np.testing.assert_allclose(demo["actions"], wanted, atol=1e-5)
    # Executed undisturbed, the recorded actions lead where the recorded states say.
    obs, _ = scene.reset(3)
    for t, action in enumerate(calm["actions"]):
        np.testing.assert_allclose(obs["state"], calm["obs"]["state"][t], atol=1e-6)
        obs, _, success, _, _ = scene.step(action)
        assert success == (t >= len(calm["actions"]) - metaworld.HOLD - 1) or t < len(calm["actions"]) - 11


def test_a_set_of_two_tasks(package, tmp_path):
    path = tmp_path / "mw.hdf5"
    metaworld.generate(["reach", "push"], 2, path)
    with h5py.File(path) as file:
        demos = [file[f"data/demo_{i}"] for i in range(4)]
        assert [demo.attrs["language_instruction"] for demo in demos] == \
            [WORDS["push"]] * 2 + [WORDS["reach"]] * 2
        assert [demo["obs/task"][0].tolist() for demo in demos] == [[1, 0]] * 2 + [[0, 1]] * 2
        scene = Scene("push-v3", ["push-v3"])
        np.testing.assert_array_equal(demos[0]["obs/state"][0], scene.reset(DEMO_SEEDS)[0]["state"])
        assert file["data"].attrs["fps"] == 80
        assert set(demos[0]["obs"]) == {"state", "task"}
    with pytest.raises(UserError, match="exists already"):
        metaworld.generate(["reach"], 1, path)


def test_an_expert_that_fails_is_said(package, tmp_path, monkeypatch):
    monkeypatch.setattr(metaworld, "PATIENCE", 5)
    with pytest.raises(UserError, match="reach-v3: with noise 0.1 the expert succeeds in 0 of 21 scenes"):
        metaworld.generate(["reach"], 1, tmp_path / "a.hdf5")
    assert not list(tmp_path.iterdir())


class ExpertPolicy:
    """Stands in for a Policy: the experts of two tasks, chosen by the instruction."""
    description = {"state_keys": {"state": 39, "task": 2}, "camera_keys": [], "image_size": None,
                   "action_dim": 4, "instructions": [WORDS["reach"], WORDS["drawer-close"]]}

    def reset(self):
        self.experts = {words_of(task): expert_of(task) for task in ("reach-v3", "drawer-close-v3")}

    def act(self, obs):
        told = zip(obs["instruction"], obs["state"])
        return np.stack([self.experts[words](state) for words, state in told])


def test_episodes_are_of_the_tasks_of_the_data(package):
    env = make_episodes("metaworld", 4, ExpertPolicy.description)
    assert isinstance(env, MetaworldEpisodes)
    obs, _ = env.reset(np.arange(4))
    assert obs["instruction"] == [WORDS["drawer-close"], WORDS["reach"]] * 2
    assert obs["task"].tolist() == [[1, 0], [0, 1]] * 2
    result = closed_loop(ExpertPolicy(), {"id": "metaworld", "max_steps": 150}, 4, 0, n_rollouts=0)
    assert result["success"] == 1


def test_pictures_are_drawn_when_somebody_looks(package):
    drawn = []
    scene = Scene("reach-v3", ["reach-v3"], ["image"])
    scene.render = lambda: drawn.append(0) or np.zeros((4, 4, 3), np.uint8)
    obs, _ = scene.reset(0)
    assert isinstance(obs["image"], Later) and not drawn
    description = ExpertPolicy.description | {"state_keys": {"state": 39}, "camera_keys": ["image"],
                                              "image_size": (4, 4), "instructions": [WORDS["reach"]]}
    env = make_episodes("metaworld", 2, description)
    for one in env.envs:
        one.render = scene.render
    obs, _ = env.reset(np.arange(2))
    for _ in range(3):
        obs, *_ = env.step(np.zeros((2, 4)))
    assert not drawn
    assert np.asarray(obs["image"]).shape == (2, 4, 4, 3) and len(drawn) == 2


def test_scenes_side_by_side_have_the_pictures_that_each_has_alone(package):
    tasks = ["drawer-close-v3", "reach-v3"]
    scenes = [Scene(task, tasks, ["image"], (32, 32)) for task in tasks]
    alone = []
    for scene in scenes:
        scene.reset(5)
        try:
            alone.append(scene.render())
        except UserError as e:
            pytest.skip(f"nothing renders here: {e}")
    for scene, picture in zip(scenes, alone):
        scene.picture = None
        assert np.array_equal(scene.render(), picture)


# Of a data set with pictures of one task.
SEES = {"state_keys": {"hand": 4}, "camera_keys": ["image"], "image_size": (4, 4), "action_dim": 4,
        "fps": 80.0, "instructions": [WORDS["reach"]]}


def test_an_evaluation_draws_what_the_policy_looks_at(package, monkeypatch):
    """Two steps seen, four executed: of eight steps the policy looks at 0, 3, 4 and 7. Films take their
    pictures from these, but for one in GLANCE steps."""
    drawn = []

    def render(env):
        drawn.append(round(env.data.time * 80))
        return np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr("metaworld.sawyer_xyz_env.SawyerXYZEnv.render", render)
    policy = Policy(Recorder(2, -1, action_dim=4), scaled(4, 4), SEES)
    result = closed_loop(policy, {"id": "metaworld", "max_steps": 8}, 2, 0)
    start = drawn[0]                            # the package lets the arm settle before an episode
    assert [step - start for step in drawn] == [0, 0, 3, 3, 4, 4, 7, 7]
    assert result["rollouts"][0]["frames"].shape == (4, 4, 4, 3)


def test_a_film_has_a_new_picture_now_and_then(package, monkeypatch):
    monkeypatch.setattr(Scene, "render", lambda self: np.full((4, 4, 3), self.steps, np.uint8))
    env = make_episodes({"id": "metaworld"}, 1, ExpertPolicy.description)
    BLIND.discard("metaworld")
    obs, _ = env.reset(np.arange(1))
    seen = []
    for _ in range(2 * GLANCE + 1):
        seen.append(env.glance(0, obs)[0, 0, 0])
        obs, *_ = env.step(np.zeros((1, 4)))
    assert seen == [0] * GLANCE + [GLANCE] * GLANCE + [2 * GLANCE]


def test_a_copied_picture_is_that_of_its_time(package, monkeypatch):
    """RealTime copies what it sees and computes later; the scene has moved on by then."""
    monkeypatch.setattr("metaworld.sawyer_xyz_env.SawyerXYZEnv.render",
                        lambda env: np.full((2, 2, 3), round(env.data.time * 80) % 256, np.uint8))
    scene = Scene("reach-v3", ["reach-v3"], ["image"])
    early = copy.deepcopy(scene.reset(0)[0])
    late = scene.step(np.zeros(4, np.float32))[0]
    assert (np.asarray(late["image"]) - early["image"] == 1).all()
    assert np.asarray(late["image"]) is np.asarray(late["image"])       # drawn once


def test_with_pictures_the_set_does_not_tell_where_the_objects_are(package, tmp_path, monkeypatch):
    monkeypatch.setattr(Scene, "render", lambda self: np.full((8, 6, 3), self.env.data.time * 80 % 256,
                                                                  np.uint8))
    metaworld.generate(["reach"], 1, tmp_path / "a.hdf5", images=True, image_size=(8, 6))
    with h5py.File(tmp_path / "a.hdf5") as file:
        obs = file["data/demo_0/obs"]
        assert set(obs) == {"hand", "image"} and obs["image"].shape[1:] == (8, 6, 3)
        expected = Scene("reach-v3", ["reach-v3"]).reset(DEMO_SEEDS)[0]["state"][:4]
        np.testing.assert_array_equal(obs["hand"][0], expected)
        moved = np.diff(obs["image"][:, 0, 0, 0].astype(int))       # each step has a picture of its own time
        assert (moved == 1).all()


def test_no_way_to_render_is_one_line(package, tmp_path, monkeypatch):
    """Before demonstrations are generated, and before a policy that needs pictures is trained."""
    def broken(self):
        raise RuntimeError("no GL")
    monkeypatch.setattr("metaworld.sawyer_xyz_env.SawyerXYZEnv.render", broken)
    with pytest.raises(UserError, match="no picture can be rendered .*no GL.*MUJOCO_GL=osmesa"):
        metaworld.generate(["reach"], 1, tmp_path / "a.hdf5", images=True)
    assert not list(tmp_path.iterdir())
    policy = Policy(Recorder(2, -1, action_dim=4), scaled(4, 4), SEES)
    with pytest.raises(UserError, match="no picture can be rendered .*no GL.*MUJOCO_GL=osmesa"):
        rehearse(policy, {"id": "metaworld"})


@pytest.mark.parametrize("spec,message", [
    ({"tasks": "reach"}, "tasks must be a list of names"), ({"tasks": ["reech"]}, "did you mean 'reach'"),
    ({"task": ["reach"]}, "unknown key 'task', did you mean 'tasks'")])
def test_specs_of_the_yaml(package, spec, message):
    with pytest.raises(UserError, match=message):
        make_episodes({"id": "metaworld"} | spec, 1, ExpertPolicy.description)
