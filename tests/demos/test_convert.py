"""demos/convert.py: sets of every layout become HDF5 or LeRobot, and nothing changes on the way."""
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import ROOT, refused, replace, set_value, write, write_aloha

from demos import check, convert, to_hdf5, to_lerobot
from demos.dataset import open_demos
from robot.errors import UserError
from robot.transforms import resize

packages = [importlib.util.find_spec(name) for name in ("pyarrow", "av", "PIL")]
lerobot = pytest.mark.skipif(None in packages, reason="pyarrow, av and Pillow: LeRobot's data sets")
both = pytest.mark.parametrize("to", ["lerobot", "lerobot2.1"])


def masks(file):
    file["mask/train"], file["mask/valid"] = [b"demo_2", b"demo_0"], [b"demo_1"]


def same(a, b, **options):
    """Whether two sets hold the same numbers, pictures, texts and held-out episodes."""
    a, b = (open_demos(source, "image", text=True, **options) for source in (a, b))
    assert np.array_equal(a.actions, b.actions) and np.array_equal(a.state, b.state)
    assert (a.fps, a.instructions, a.action_names) == (b.fps, b.instructions, b.action_names)
    assert a.train_episodes.tolist() == b.train_episodes.tolist()
    assert a.valid_episodes.tolist() == b.valid_episodes.tolist()
    for e, n in enumerate(a.lengths):
        assert np.array_equal(a.images(e, 0, n), b.images(e, 0, n))
    return a, b


@lerobot
@both
def test_to_lerobot_and_back(tmp_path, to):
    def edit(file):
        masks(file)
        for demo in file["data"].values():
            demo["reward"], demo["done"] = demo["obs/angle"][:] / 7, demo["obs/angle"][:] > 1
            demo["obs/object"] = demo["obs/pos"][:, :2] * 1.1
        for i, rollout in enumerate((5, 5, 6)):
            file[f"data/demo_{i}"].attrs["rollout"] = rollout
    first = write(tmp_path / "a.hdf5", edit=edit, fps=10, action_names=["x", "y"])
    convert.convert(first, tmp_path / "set", to=to)
    convert.convert(tmp_path / "set", tmp_path / "b.hdf5")
    same(first, tmp_path / "set")
    same(first, tmp_path / "b.hdf5")
    names = ["angle", "pos.0", "pos.1", "pos.2"]
    for path in (tmp_path / "set", tmp_path / "b.hdf5"):
        demos = open_demos(path, extra={"reward": 1, "done": 1})
        assert np.array_equal(demos.labels, open_demos(first, extra={"reward": 1, "done": 1}).labels)
        assert list(demos.state_keys) == ["observation.environment_state", "observation.state"]
        assert demos.state_names == ["object.0", "object.1", *names]
        assert len({e.rollout for e in demos.episodes}) == 2
        assert demos.episodes[0].rollout == demos.episodes[1].rollout
        assert open_demos(path, "image").state_names == names
    with h5py.File(first) as a, h5py.File(tmp_path / "b.hdf5") as b:
        assert b["data/demo_1/actions"].dtype == a["data/demo_1/actions"].dtype == np.float64
        assert np.array_equal(a["data/demo_1/actions"], b["data/demo_1/actions"])
    check.main([str(tmp_path / "b.hdf5")])


@lerobot
@pytest.mark.skipif("DEMO_DATA" not in os.environ, reason="DEMO_DATA names no folder of real data")
@pytest.mark.parametrize("name, to", [("g1_bottle_image", "lerobot"), ("lift_scripted_lowdim", "lerobot")])
def test_real_sets_go_there_and_back_without_a_changed_number(tmp_path, name, to):
    first = Path(os.environ["DEMO_DATA"]) / f"{name}.hdf5"
    convert.convert(first, tmp_path / "set", to=to)
    convert.convert(tmp_path / "set", tmp_path / "b.hdf5")
    with h5py.File(first) as a, h5py.File(tmp_path / "b.hdf5") as b:
        assert len(a["data"]) == len(b["data"])
        for demo in a["data"]:
            before, after = a["data"][demo], b["data"][demo]
            assert np.array_equal(before["actions"], after["actions"])
            keys = sorted(key for key in before["obs"] if key not in ("cam_high", "object"))
            states = np.hstack([before["obs"][key] for key in keys])
            assert np.array_equal(states, after["obs/observation.state"])
            if name.startswith("g1"):
                assert np.array_equal(before["obs/cam_high"], after["obs/observation.images.cam_high"])
            else:
                assert np.array_equal(before["obs/object"], after["obs/observation.environment_state"])
                assert np.array_equal(before["rewards"], after["rewards"])
    a, b = open_demos(first), open_demos(tmp_path / "set")
    assert a.valid_episodes.tolist() == b.valid_episodes.tolist() and a.fps == b.fps


@lerobot
@pytest.mark.parametrize("version, image", [("v2.1", "video"), ("v3.0", "video"), ("v3.0", "image")])
def test_a_lerobot_set_becomes_hdf5(tmp_path, version, image, capsys):
    from lerobot_sets import LENGTHS, contents, write_set
    seen = write_set(tmp_path / "set", version, image=image, lossless=False)
    convert.main([str(tmp_path / "set"), str(tmp_path / "a.hdf5"), "--image_size", "12", "20"])
    said = capsys.readouterr().out
    assert "4 episodes, 33 steps" in said
    assert "all numbers of 4 episodes, 33 steps are as in the source" in said
    low = min(e["action"].min() for e in contents())
    assert f"{low:.6g}" in said
    demos = open_demos(tmp_path / "a.hdf5", "image", text=True, val_ratio=0)
    assert demos.image_size == (12, 20) and demos.instructions[:2] == ["pick up the cube", "open the drawer"]
    for e, n in enumerate(LENGTHS):
        for v, key in enumerate(demos.camera_keys):
            frames = np.moveaxis(demos.images(e, 0, n)[:, v], 1, 3)
            assert np.array_equal(frames, resize(seen[e, key], (12, 20)))
    meta = {"obs": {"observation.effort": {"shape": [2]}}}
    effort = open_demos(tmp_path / "a.hdf5", shape_meta=meta, val_ratio=0).state
    assert np.array_equal(effort, np.concatenate([e["observation.effort"] for e in contents()]))
    assert not list(tmp_path.glob("*.part*"))


def test_a_folder_of_aloha_becomes_one_file(tmp_path, capsys):
    folder = write_aloha(tmp_path / "set", [3, 4])
    convert.convert(folder, tmp_path / "a.hdf5")
    assert "does not say its rate, 50 Hz assumed: --fps sets it" in capsys.readouterr().err
    same(folder, tmp_path / "a.hdf5", val_ratio=0)


def test_a_conversion_that_was_killed_goes_on(tmp_path):
    """It is killed while it writes the third of eight episodes; nothing is written twice."""
    source, out = write(tmp_path / "a.hdf5", [6] * 8), tmp_path / "b.hdf5"
    program = ("import os, sys, time; from demos import convert, to_hdf5\n"
               "whole, count = to_hdf5.write_pictures, []\n"
               "def slow(*args):\n"
               "    count.append(1)\n"
               "    if len(count) == 5: print('here', flush=True); time.sleep(60)\n"     # two cameras each
               "    whole(*args)\n"
               "to_hdf5.write_pictures = slow\n"
               "convert.main(sys.argv[1:])\n")
    child = subprocess.Popen([sys.executable, "-c", program, source, out], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"here\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    parts = sorted((tmp_path / "b.hdf5.parts").glob("*.hdf5"))
    assert [p.name for p in parts] == ["episode_000000.hdf5", "episode_000001.hdf5"] and not out.exists()
    written = [p.stat().st_mtime_ns for p in parts]

    with pytest.raises(UserError, match="b.hdf5.parts holds parts of another conversion: delete it"):
        convert.convert(source, out, image_size=(8, 8))
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_hdf5.shutil, "rmtree", lambda path: kept.extend(p.stat().st_mtime_ns for p in parts))
        convert.convert(source, out)
    assert kept == written
    same(source, out, val_ratio=0)


def test_no_more_than_an_episode_is_in_memory(tmp_path, monkeypatch):
    """Every array is read for one episode alone, pictures sixteen at a time."""
    source, seen = write(tmp_path / "a.hdf5", [40, 30]), []
    whole = to_hdf5.Reader.read
    monkeypatch.setattr(to_hdf5.Reader, "read", lambda self, *args: seen.append(x := whole(self, *args)) or x)
    convert.convert(source, tmp_path / "b.hdf5")
    assert max(len(x) for x in seen if x.ndim == 4) == 16 and max(len(x) for x in seen) == 40


@pytest.mark.parametrize("name", ["actions", "obs/left"])
def test_what_was_written_wrongly_is_noticed(tmp_path, monkeypatch, name):
    source, whole = write(tmp_path / "a.hdf5"), to_hdf5.write_attributes

    def spoil(file, data, episodes):
        whole(file, data, episodes)
        data[f"demo_0/{name}"][0] += 1
    monkeypatch.setattr(to_hdf5, "write_attributes", spoil)
    with pytest.raises(UserError, match=f"demo_0: '{name}' was not written as it was read"):
        convert.convert(source, tmp_path / "b.hdf5")
    assert not (tmp_path / "b.hdf5").exists()


@pytest.mark.parametrize("argv, named", [
    (["in.zarr", "out.hdf5", "--fps", "nan"], ["--fps nan"]), (["in.zarr"], ["required", "out"]),
    (["in.zarr", "out.hdf5", "--image"], ["--image", "did you mean 'images'"]),
    (["a", "b", "--to", "lerobt"], ["--to lerobt", "did you mean 'lerobot'"]),
    (["a", "b", "--image_size", "0", "9"], ["--image_size 0"]),
    (["a", "b", "--colour", "red"], ["'red' is no order of colours"]),
    (["none.zarr", "out.hdf5"], ["none.zarr"])])
def test_wrong_flags(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, lambda: convert.main(argv), *named)


def test_a_source_that_does_not_fit_together(tmp_path):
    write(tmp_path / "a.hdf5")
    with pytest.raises(UserError, match="a.hdf5 exists already"):
        convert.convert(tmp_path / "a.hdf5", tmp_path / "a.hdf5")
    (tmp_path / "two").mkdir()
    write(tmp_path / "two/a.hdf5", [4])
    rename = lambda file: file.move("data/demo_0/obs/pos", "data/demo_0/obs/place")
    write(tmp_path / "two/b.hdf5", [4], edit=rename)
    with pytest.raises(UserError, match="has observations .*, but no 'pos'"):
        convert.convert(tmp_path / "two", tmp_path / "b.hdf5")
    assert not list(tmp_path.glob("b.hdf5*"))


def test_what_hdf5_cannot_hold_is_one_line(tmp_path, monkeypatch):
    source = write(tmp_path / "a.hdf5")
    with pytest.raises(UserError, match="demo_0 cannot be written as HDF5: .*NULL"):
        convert.convert(source, tmp_path / "b.hdf5", instruction="push\0")
    monkeypatch.setattr("demos.limits.memory", lambda: 24e9)
    with pytest.raises(UserError, match=r"16 pictures of \[20000, 20000\] would take 96.0 GB"):
        convert.convert(source, tmp_path / "c.hdf5", image_size=(20000, 20000))


def test_no_room_for_the_whole_file(tmp_path, monkeypatch):
    source = write(tmp_path / "a.hdf5")
    monkeypatch.setattr(to_hdf5.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="are free: make room and give the command again"):
        convert.convert(source, tmp_path / "b.hdf5")
    monkeypatch.undo()
    assert convert.convert(source, tmp_path / "b.hdf5")[:2] == (3, 16)


@lerobot
def test_a_set_has_its_name_only_when_it_has_been_compared(tmp_path, monkeypatch):
    """What a conversion that is killed as it compares leaves behind is whole, but not read."""
    source, whole = write(tmp_path / "a.hdf5"), to_lerobot.compare_written
    (tmp_path / "sets").mkdir()

    def compare(episodes, reader, root, *args):
        assert not (tmp_path / "sets/one").exists()
        shutil.copytree(root, tmp_path / "sets/two.part")
        return whole(episodes, reader, root, *args)
    monkeypatch.setattr(to_lerobot, "compare_written", compare)
    convert.convert(source, tmp_path / "sets/one", to="lerobot")
    for path in (tmp_path / "sets", tmp_path / "sets/two.part"):
        with pytest.raises(UserError, match="two.part: a conversion was stopped .*: delete it and convert"):
            open_demos(path)
    (tmp_path / "sets/two.part").rename(tmp_path / "sets/two")
    assert len(open_demos(tmp_path / "sets", val_ratio=0).lengths) == 6     # of both: it was whole


@lerobot
def test_what_lerobot_cannot_hold(tmp_path, monkeypatch, capsys):
    def two_rates(file):
        file["data/demo_1"].attrs["fps"] = 5
    source = write(tmp_path / "a.hdf5", edit=two_rates)
    with pytest.raises(UserError, match="have another rate, and LeRobot has one for a set: --fps N"):
        convert.convert(source, tmp_path / "set", to="lerobot")
    convert.convert(source, tmp_path / "set", to="lerobot", fps=7)
    assert open_demos(tmp_path / "set").fps == 7
    (tmp_path / "other.part").mkdir()
    with pytest.raises(UserError, match="other.part is there, from a conversion that was stopped: delete it"):
        convert.convert(source, tmp_path / "other", to="lerobot", fps=7)


@pytest.mark.parametrize("to", ["hdf5", "lerobot"])
def test_an_array_that_is_not_of_steps_is_left_out_and_said(tmp_path, capsys, to):
    """ACT's recorders write compress_len (cameras, T), others a calibration, beside the actions."""
    if to == "lerobot":
        pytest.importorskip("pyarrow", reason="pyarrow writes LeRobot's data sets")

    def edit(file):
        for demo in file["data"].values():
            demo["compress_len"], demo["calibration"] = np.ones((2, 5), int), np.ones(7)
            demo["reward"] = np.arange(len(demo["actions"]), dtype=np.float32)
    out = tmp_path / ("b.hdf5" if to == "hdf5" else "set")
    convert.convert(write(tmp_path / "a.hdf5", edit=edit, images=False), out, to=to)
    demos = open_demos(out, extra={"reward": 1}, val_ratio=0)
    assert demos.labels[:, 0].tolist() == [*range(5), *range(8), *range(3)]
    assert "not taken: calibration, compress_len (no numbers of steps)" in capsys.readouterr().err


@lerobot
def test_an_array_called_action_is_not_added_to_the_actions(tmp_path, capsys):
    def edit(file):
        for demo in file["data"].values():
            demo["action"] = -demo["actions"][:]
    source = write(tmp_path / "a.hdf5", edit=edit, images=False)
    convert.convert(source, tmp_path / "set", to="lerobot")
    assert "not taken: action (a name that LeRobot uses itself" in capsys.readouterr().err
    assert np.array_equal(open_demos(tmp_path / "set").actions, open_demos(source).actions)


@lerobot
def test_episodes_of_two_precisions_lose_nothing(tmp_path):
    (tmp_path / "two").mkdir()
    single = replace("data/demo_0/actions", np.ones((4, 2), np.float32))
    write(tmp_path / "two/a.hdf5", [4], edit=single, images=False)
    write(tmp_path / "two/b.hdf5", [4], edit=set_value("data/demo_0/actions", 0, 0.1), images=False)
    convert.convert(tmp_path / "two", tmp_path / "set", to="lerobot")
    convert.convert(tmp_path / "set", tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert file["data/demo_1/actions"][0, 0] == 0.1


@lerobot
def test_large_files_of_version_3_are_followed_by_others(tmp_path, monkeypatch):
    monkeypatch.setattr(to_lerobot, "DATA_MB", 1e-3)
    monkeypatch.setattr(to_lerobot, "VIDEO_MB", -1)         # FFmpeg writes late: the file is still empty
    monkeypatch.setattr(to_lerobot, "PER_CHUNK", 2)
    source = write(tmp_path / "a.hdf5", [5, 4, 6, 3, 7], fps=10, action_names=["x", "y"])
    convert.convert(source, tmp_path / "set", to="lerobot")
    tables = tmp_path / "set/data"
    found = sorted(str(p.relative_to(tables)) for p in tables.rglob("*.parquet"))
    assert "chunk-001/file-000.parquet" in found and len(found) >= 3
    assert len(list((tmp_path / "set/videos").rglob("*.mp4"))) == 10
    same(source, tmp_path / "set", val_ratio=0)


@pytest.mark.parametrize("missing, named", [(("pyarrow", "pyarrow.parquet"), "pip install pyarrow av"),
                                            (("av",), "pip install av")])
def test_without_the_packages(tmp_path, monkeypatch, missing, named):
    if missing == ("av",):
        pytest.importorskip("pyarrow", reason="pyarrow writes LeRobot's data sets")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=named):
        convert.convert(write(tmp_path / "a.hdf5"), tmp_path / "set", to="lerobot")
    assert not list(tmp_path.glob("set*"))
