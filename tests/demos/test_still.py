"""Short episodes and still starts, places of cameras, the spread of states."""
import types

import numpy as np
import pytest
from helpers import refused, write, write_aloha

import rdt
from demos.dataset import open_demos
from demos.facts import place_cameras
from demos.statistics import fit_normalizer, state_spread
from robot.normalizer import Normalizer
from robot.processing import Processing


def still_set(folder, still=(3, 5), lengths=(8, 12)):
    """ALOHA files in which no joint moves by more than 0.01 before step `still`."""
    def frames(file, n):
        e = int(file.filename[-6])
        qpos = np.zeros((n, 14), np.float32)
        qpos[:, 2] = 0.009 * (np.arange(n) % 2)
        qpos[still[e]:, 5] = 0.02 + np.arange(n - still[e])
        file["observations/qpos"][:] = qpos
        file["observations/images/top"] = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None],
                                                          (n, 4, 6, 3))
    return write_aloha(folder, lengths, frames, fps=10.0)


def test_steps_before_the_first_move_are_left_out(tmp_path):
    demos = open_demos(str(still_set(tmp_path / "set")), obs="image", still=0.01)
    assert demos.lengths.tolist() == [8 - 2, 12 - 4]
    assert demos.actions[:2, 0].tolist() == [2, 3] and demos.actions[6, 0] == 1 + 4
    assert demos.state[:3, 5].tolist() == [0, pytest.approx(0.02), pytest.approx(1.02)]
    assert demos.images(0, 0, 2)[:, 0, 0, 0, 0].tolist() == [2, 3]
    assert demos.images(1, 7, 8)[0, 0, 0, 0, 0] == 11
    assert demos.raw_actions(0).shape == (8, 14)
    whole = open_demos(str(tmp_path / "set"), obs="image")
    assert whole.lengths.tolist() == [8, 12]


def test_short_episodes_are_left_out_and_said(tmp_path, capsys):
    folder = still_set(tmp_path / "set")
    demos = open_demos(str(folder), shortest=9)
    assert demos.lengths.tolist() == [12]
    assert "1 episodes of less than 9 steps are left out: episode_0.hdf5" in capsys.readouterr().err
    refused(capsys, lambda: open_demos(str(folder), shortest=13), "no episode has the 13 steps", "has 12")


def test_an_episode_that_never_moves_is_refused(tmp_path, capsys):
    folder = still_set(tmp_path / "set")
    refused(capsys, lambda: open_demos(str(folder), still=100.0), "no number of qpos moves by more than 100")


def test_other_files_look_at_their_states(tmp_path):
    def hold(file):
        file["data/demo_1/obs/angle"][:3] = file["data/demo_1/obs/angle"][0]
        file["data/demo_1/obs/pos"][:3] = file["data/demo_1/obs/pos"][0]
    demos = open_demos(str(write(tmp_path / "a.hdf5", edit=hold)), still=0.5)
    assert demos.lengths.tolist() == [5, 6, 3]


# -- places of cameras


def named(*cameras, processing=None):
    demos = types.SimpleNamespace(camera_keys=list(cameras), state_keys={},
                                  processing=Processing(processing or {}, {}, cameras))
    demos.process = lambda processing: setattr(demos, "processing", processing)
    return demos


@pytest.mark.parametrize("cameras, want", [
    (("cam_high", "cam_left_wrist", "cam_right_wrist"), ["cam_high", "cam_right_wrist", "cam_left_wrist"]),
    (("front", "left", "right"), ["front", "right", "left"]),
    (("agentview_image", "robot0_eye_in_hand_image"), ["agentview_image", "robot0_eye_in_hand_image", None]),
    (("robot0_agentview_left_image",), ["robot0_agentview_left_image", None, None]),
    (("wrist",), [None, "wrist", None])])
def test_cameras_are_put_into_the_places_of_the_release(cameras, want, capsys):
    """Not in the order of the alphabet, which exchanges the wrists."""
    demos = named(*cameras)
    place_cameras(demos, rdt, rdt.PRESETS["1B"])
    assert [key for _, key in demos.processing.places] == want
    assert [place for place, _ in demos.processing.places] == list(rdt.CAMERA_PLACES)
    assert "cameras are taken for" in capsys.readouterr().err


def test_named_places_are_taken_and_unknown_ones_refused(capsys):
    demos = named("a", "b", processing={"cameras": {"left_wrist": "a", "external": "b"}})
    place_cameras(demos, rdt, rdt.PRESETS["1B"])
    assert demos.processing.places == [("external", "b"), ("right_wrist", None), ("left_wrist", "a")]
    demos = named("a", processing={"cameras": {"head": "a"}})
    refused(capsys, lambda: place_cameras(demos, rdt, rdt.PRESETS["1B"]), "rdt has no place 'head'")
    refused(capsys, lambda: place_cameras(named("top", "front"), rdt, rdt.PRESETS["1B"]),
            "'top' and 'front' would both be external")
    demos = named("top", "front")
    place_cameras(demos, rdt, {})               # "tiny" learns whatever order there is
    assert [key for _, key in demos.processing.places] == ["top", "front"]


def test_the_spread_of_states_is_in_the_networks_units(tmp_path):
    demos = open_demos(str(write(tmp_path / "a.hdf5", lengths=(5, 8, 3))))
    rows = demos.state[demos.rows(demos.train_episodes)].astype(np.float64)
    raw = state_spread(demos, Normalizer.fit({"actions": demos.actions, "state": demos.state}, "none"))
    assert np.allclose(raw["state_mean"], rows.mean(0), rtol=1e-5)
    assert np.allclose(raw["state_std"], rows.std(0), rtol=1e-5)
    scaled = state_spread(demos, fit_normalizer(demos, "meanstd"))
    assert np.allclose(scaled["state_mean"], 0, atol=1e-5) and np.allclose(scaled["state_std"], 1, rtol=0.1)
