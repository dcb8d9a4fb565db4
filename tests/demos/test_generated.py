"""The generated set: demonstrations of the built-in task, and their file."""
import weakref
from pathlib import Path

import numpy as np
from helpers import CAMERAS, LOW_DIM, rollout

from demos import generated
from demos.dataset import open_demos
from demos.generated import DEMO_SEEDS, WHOLE, segments
from robot import tabletop
from robot.tabletop import Expert, INSTRUCTIONS, Tabletop, WALL_Y, ZONE


def test_the_second_robot_of_the_built_in_task(tmp_path):
    demos = open_demos("tabletop_velocity", episodes=6, cache=tmp_path)
    assert demos.fps == 5 and demos.action_names == ["velocity_x", "velocity_y", "gripper"]
    first = open_demos("tabletop", episodes=6, cache=tmp_path)
    assert first.fps == 10 and len(list(tmp_path.iterdir())) == 2
    assert demos.lengths.sum() < 0.8 * first.lengths.sum()


def test_tabletop_is_made_once_and_read_like_any_file(tmp_path, monkeypatch, capsys):
    from robot import tabletop
    demos = open_demos("tabletop", "image", text=True, episodes=4, cache=tmp_path, val_ratio=0.25)
    path, = tmp_path.iterdir()
    assert path.name.startswith("tabletop_4_cameras_seed0_") and path.suffix == ".hdf5"
    written = path.stat().st_mtime_ns
    assert demos.fps == tabletop.FPS and demos.image_size == (64, 64) and len(demos.camera_keys) == 2
    assert not {"object", "goal"} & demos.state_keys.keys()
    assert set(demos.instructions) <= set(tabletop.INSTRUCTIONS)
    made = list(segments(4, seed=0, cameras=True))
    assert demos.lengths.tolist() == [len(d["actions"]) for d in made]
    assert np.array_equal(demos.actions, np.concatenate([d["actions"] for d in made]))
    camera = made[1]["obs"][demos.camera_keys[0]]
    assert np.array_equal(demos.images(1, 0, len(camera))[:, 0], np.moveaxis(camera, 3, 1))
    rollout = np.array([d["episode"] for d in made])
    assert not set(rollout[demos.train_episodes]) & set(rollout[demos.valid_episodes])

    open_demos("tabletop", "image", episodes=4, cache=tmp_path)
    assert path.stat().st_mtime_ns == written
    changed = tmp_path / "changed" / "tabletop.py"
    changed.parent.mkdir()
    changed.write_text(Path(tabletop.__file__).read_text() + "# one line more\n")
    monkeypatch.setattr(tabletop, "__file__", str(changed))
    open_demos("tabletop", "lowdim", episodes=3, cache=tmp_path)
    monkeypatch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path / "elsewhere"))
    open_demos("tabletop", "lowdim", episodes=3, seed=1)
    names = sorted(p.name for p in tmp_path.rglob("*.hdf5"))
    assert [n.rsplit("_", 1)[0] for n in names] == ["tabletop_3_lowdim_seed0", "tabletop_3_lowdim_seed1",
                                                    "tabletop_4_cameras_seed0"]
    assert names[0].rsplit("_", 1)[1] != path.name.rsplit("_", 1)[1]
    assert "generating 3 demonstrations" in capsys.readouterr().err


def test_demonstrations_have_the_promised_form():
    demos = list(segments(40, seed=1))
    for d in demos:
        T = len(d["actions"])
        assert T >= 2 and d["actions"].shape == (T, 3) and d["actions"].dtype == np.float32
        assert np.abs(d["actions"]).max() <= 1
        assert {k: v.shape for k, v in d["obs"].items()} == {k: (T, size) for k, size in LOW_DIM.items()}
        assert d["instruction"] in INSTRUCTIONS and 0 <= d["episode"] < 40 and isinstance(d["episode"], int)
        goal = d["obs"]["goal"][0]
        assert INSTRUCTIONS[2 * goal[1].astype(int) + goal[3].astype(int)] == d["instruction"]


def test_demonstrations_are_deterministic_and_continue_with_n():
    few, more = list(segments(10, seed=4)), list(segments(25, seed=4))
    assert len(more) > len(few) > 10
    for a, b in zip(few, more):
        assert a["episode"] == b["episode"] and a["instruction"] == b["instruction"]
        np.testing.assert_array_equal(a["actions"], b["actions"])
        for key in LOW_DIM:
            np.testing.assert_array_equal(a["obs"][key], b["obs"][key])
    other = list(segments(10, seed=5))
    assert not np.array_equal(other[0]["obs"]["object"][0], few[0]["obs"]["object"][0])


def test_demonstrations_with_cameras_are_the_same_ones_seen_most_of_them_up_to_the_grasp():
    n = 2 * WHOLE + 1
    plain, seen = list(segments(n, seed=2)), list(segments(n, seed=2, cameras=True, image_size=32))
    whole = lambda demos: [d for d in demos if d["episode"] % WHOLE == 0]
    assert len(whole(seen)) == len(whole(plain)) > 0
    for a, b in zip(whole(plain), whole(seen), strict=True):
        np.testing.assert_array_equal(a["actions"], b["actions"])
    approaches = [d for d in seen if d["episode"] % WHOLE]
    assert {d["episode"] for d in approaches + whole(seen)} == {d["episode"] for d in plain}
    for d in approaches:
        assert not d["obs"]["object"][:, 8].any()                       # nothing is held yet
        T, same = len(d["actions"]), [p["actions"] for p in plain if p["episode"] == d["episode"]]
        assert any(np.array_equal(p[i:i + T], d["actions"]) for p in same for i in range(len(p)))
    for b in seen:
        for key in CAMERAS:
            assert b["obs"][key].shape == (len(b["actions"]), 32, 32, 3) and b["obs"][key].dtype == np.uint8
    # What the simulator would have shown in the first state, bit for bit.
    env = Tabletop(1, image_size=32)
    first = next(d for d in seen if d["obs"]["robot0_gripper_qpos"][0, 0] == 1)
    env.reset(seed=0)
    env.gripper[0] = first["obs"]["robot0_eef_pos"][0]
    env.blocks[0] = first["obs"]["object"][0, :4].reshape(2, 2)
    for key in CAMERAS:
        np.testing.assert_array_equal(env._obs()[key][0], first["obs"][key][0])


def test_demonstrations_contain_recoveries_and_nothing_of_the_kicks():
    demos = list(segments(200, seed=0))
    episodes = {d["episode"] for d in demos}
    assert 0.9 * 200 <= len(episodes) < len(demos)                      # few failed, many were cut
    starts = [{key: value[0] for key, value in d["obs"].items()} for d in demos]
    empty = [s for s in starts if s["robot0_gripper_qpos"][0] == 0 and s["object"][8] == 0]
    carrying = [s for s in starts if s["object"][8] == 1]
    assert len(empty) > 0.2 * 200 and len(carrying) > 0.2 * 200
    for d in demos:
        gripper, aperture = d["obs"]["robot0_eef_pos"].astype(float), d["obs"]["robot0_gripper_qpos"][:, 0]
        # Recorded is the intention, and inside a segment the motion follows it but for the tremble: each step
        # goes towards the recorded target and the fingers do what the recorded command says. A kick would go
        # anywhere and mostly close on nothing. (One step may be cancelled by the wall, hence the `or`.)
        way, wish = np.diff(gripper, axis=0), d["actions"][:-1, :2] - gripper[:-1]
        lead = np.linalg.norm(wish, axis=1)
        assert lead.max() < tabletop.REACH + 1e-6                       # the tremble would exceed it
        far = lead > tabletop.SPEED + 0.03
        along = (way * wish).sum(1) / lead.clip(1e-9)
        assert ((along[far] > 0.7 * tabletop.SPEED) | (np.abs(way[far]).max(1) == 0)).all()
        expected = np.clip(aperture[:-1] - 0.5 * d["actions"][:-1, 2], 0, 1)
        np.testing.assert_array_equal(aperture[1:], expected)
    # An empty closed gripper is told to open: that is the recovery.
    opened = [d for d, s in zip(demos, starts) if s["robot0_gripper_qpos"][0] == 0 and s["object"][8] == 0
              and np.linalg.norm(s["object"][4:6]) > 0.15]
    assert len(opened) > 20 and all(d["actions"][0, 2] == -1 for d in opened)


def test_every_rollout_ends_in_success_and_takes_both_sides():
    demos = list(segments(400, seed=7))
    last = {d["episode"]: d for d in demos}                             # the last segment of each rollout
    # The last recorded step opens the fingers, with the asked block in the asked zone ...
    opened = [d for d in last.values() if d["actions"][-1, 2] == -1]
    for d in opened:
        state = d["obs"]["object"][-1]
        assert state[8] == 1 and np.abs(state[4:6]).max() == 0 and (np.abs(state[6:8]) < ZONE).all()
    # ... unless a kick came just before it, and left that step alone in its segment.
    assert len(opened) > 0.95 * len(last)
    sides = []
    for episode in last:
        way = np.concatenate([d["obs"]["robot0_eef_pos"] for d in demos if d["episode"] == episode])
        beyond = way[way[:, 1] > WALL_Y]
        sides.append(beyond[0, 0] < 0)
    assert abs(np.sum(sides) - len(sides) / 2) < 4 * np.sqrt(len(sides) / 4)


def test_recorded_actions_of_an_unperturbed_episode_replay_to_success():
    n = 50
    env = Tabletop(n, cameras=False)
    obs, _ = env.reset(seed=9)
    _, history = rollout(env, obs, Expert(env, seed=9))
    env.reset(seed=9)
    for action in history["action"]:
        *_, info = env.step(action)                                     # nobody looks at what comes back
    assert info["success"].all()


def test_demonstrations_start_from_seeds_kept_for_them():
    first = list(segments(5, seed=0))[0]
    env = Tabletop(1, cameras=False)
    obs, _ = env.reset(seed=DEMO_SEEDS + first["episode"])
    np.testing.assert_array_equal(obs["object"][0, :4], first["obs"]["object"][0, :4])


def test_demonstrations_of_the_velocity_robot():
    demos = list(segments(40, seed=1, robot=tabletop.VelocityTabletop))
    assert len({d["episode"] for d in demos}) > 30
    actions = np.concatenate([d["actions"] for d in demos])
    assert actions.dtype == np.float32 and np.abs(actions[:, :2]).max() <= 5 * tabletop.REACH + 1e-5
    for d in demos:                                                     # a step is a fifth of a second
        way = np.diff(d["obs"]["robot0_eef_pos"], axis=0)
        assert np.linalg.norm(way, axis=1).max() <= 2 * tabletop.SPEED + 1e-6
        free = np.abs(way).max(1) > 0
        assert np.abs(way - d["actions"][:-1, :2] / 5)[free].max() < 0.1


def test_sets_of_other_seeds_show_other_scenes_with_other_perturbations(monkeypatch):
    """No scene comes twice, in whatever place; the tremble, the kicks and the expert's choices are others."""
    asked, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: asked.append(str(seed)) or real(seed))
    sets = [list(segments(30, seed=seed)) for seed in (0, 1, 2)]
    first = [{d["episode"]: d for d in demos[::-1]}.values() for demos in sets]
    scenes = [{tuple(d["obs"]["object"][0, :4]) for d in demos} for demos in first]
    assert all(len(s) > 20 for s in scenes)
    assert not (scenes[0] & scenes[1] or scenes[0] & scenes[2] or scenes[1] & scenes[2])
    for seed in range(3):
        for stream in range(3):                 # the expert, the tremble, the kicks
            assert asked.count(str([seed, stream])) == 1


def test_the_file_is_written_a_segment_at_a_time(monkeypatch, tmp_path):
    """With cameras a thousand rollouts are a gigabyte of pictures, the file a twentieth of that."""
    alive, most = weakref.WeakSet(), []

    class Pictures(dict):
        """A segment's observations, counted while somebody holds them."""
        __hash__ = object.__hash__

    def counted(*args, **kwargs):
        for segment in segments(*args, **kwargs):
            segment["obs"] = Pictures(segment["obs"])
            alive.add(segment["obs"])
            most.append(len(alive))
            yield segment

    segments = generated.segments
    monkeypatch.setattr(generated, "segments", counted)
    path = generated.tabletop_file(True, 6, 0, tmp_path)
    assert len(open_demos(path, "image").lengths) == len(most) > 6 and max(most) <= 2
