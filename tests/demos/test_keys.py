"""What becomes of every array, in training and in the doctor's report alike."""
import numpy as np
import pytest
from helpers import write

from demos import check
from demos.dataset import open_demos
from demos.episodes import Array, Episode, notes_of
from demos.files import unreadable
from robot.errors import UserError


def everything(file):
    """One array of every kind that is left out, and two labels."""
    for i, demo in enumerate(file["data"].values()):
        n = len(demo["actions"])
        demo["obs/is_grasped"] = np.arange(n)[:, None] % 2 == 0
        demo["obs/encoder"] = np.full((n, 6), 4095)
        demo["obs/state_u1"] = np.ones(n, np.uint8)
        demo["obs/depth"] = np.zeros((n, 4, 6, 1), np.float32)
        demo["obs/hand_Depth"] = np.zeros((n, 4, 6), np.float32)
        demo["obs/depth_raw/hand"], demo["obs/flat_depth"] = np.zeros((n, 4, 6), "u2"), np.zeros((n, 24))
        demo["obs/grey"] = np.zeros((n, 4, 6), np.uint8)
        demo["obs/rgba"] = np.zeros((n, 4, 6, 4), np.uint8)
        demo["obs/no_pixels"] = np.zeros((n, 0, 6, 3), np.uint8)
        demo["obs/cloud"] = np.zeros((n, 500, 3), np.float32)
        demo["obs/note"] = ["a"] * n
        demo["obs/object"] = np.zeros((n, 2))
        demo["rewards"] = np.zeros(n)
        demo["seed"] = 3
        demo["next_obs/pos"] = np.zeros((n, 3))
        if i:
            demo["obs/late"] = np.zeros((n, 2))


WHY = {"is_grasped": "bool, not float: shape_meta can name it", "encoder": "int64, not float",
       "state_u1": "uint8, not float", "depth": "float32 (4, 6, 1) per step, a camera is uint8 (H, W, 3)",
       "hand_Depth": "looks like a depth map", "hand": "like a depth", "flat_depth": "like a depth",
       "grey": "uint8 (4, 6) per step, a camera is", "rgba": "uint8 (4, 6, 4) per step, a camera is",
       "no_pixels": "nothing per step", "cloud": "more than 1000 numbers per step", "note": "object, no num",
       "object": "only a simulator knows it", "late": "demo_0 lacks it", "rewards": "not an observation",
       "seed": "one value for all steps", "next_obs": "a group"}


def test_every_array_is_used_or_named_with_the_reason(tmp_path, capsys):
    path = write(tmp_path / "a.hdf5", edit=everything)
    demos = open_demos(path, "image")
    used, *lines = [line for line in capsys.readouterr().err.splitlines() if "used: " in line]
    assert used == "note: used: actions, angle, pos, left, right" and len(lines) > 1
    assert all(line.startswith("note: not used: ") and len(line) < 400 for line in lines)
    left = " ".join(lines)
    check.main([str(path)])
    report = capsys.readouterr().out
    for key, why in WHY.items():
        assert key in left and why in left, key
        row, = [row for row in report.splitlines() if row.startswith(f"  {key} ")]
        assert f"not used ({why}" in row or f"not used (a.hdf5:{why}" in row or why in row, row
    for key, fate in {"actions": "actions", "pos": "state", "left": "camera"}.items():
        row, = [row for row in report.splitlines() if row.startswith(f"  {key} ")]
        assert row.endswith(f"  {fate}")
    assert "must be mended" not in report and not {*WHY} & {*demos.state_keys, *demos.camera_keys}


def test_what_shape_meta_names_is_used_whatever_its_type(tmp_path):
    path = write(tmp_path / "a.hdf5", edit=everything)
    meta = {"obs": {"is_grasped": {"shape": [1]}, "encoder": {"shape": [6]}, "state_u1": {"shape": [1]}}}
    demos = open_demos(path, shape_meta=meta)
    assert demos.state[:2].tolist() == [[1] + [4095] * 6 + [1], [0] + [4095] * 6 + [1]]
    assert demos.state.dtype == np.float32


def test_a_depth_of_few_numbers_is_a_state(tmp_path):
    """The depth of a drill, the pose of a depth camera."""
    def edit(file):
        for demo in file["data"].values():
            demo["obs/depth"], demo["obs/depth_cam_pose"] = demo["obs/pos"][:, :1] + 7, demo["obs/pos"][:]
    demos = open_demos(write(tmp_path / "a.hdf5", edit=edit, images=False), val_ratio=0)
    assert demos.state_keys == {"angle": 1, "depth": 1, "depth_cam_pose": 3, "pos": 3}
    assert demos.state[2, 1] == 9


def test_a_camera_that_is_not_looked_at_is_named(tmp_path, capsys):
    path = write(tmp_path / "a.hdf5")
    open_demos(path)
    assert "used: actions, angle, pos; not used: left, right (a camera: obs=image" in capsys.readouterr().err
    open_demos(path, shape_meta={"obs": {"pos": {"shape": [3]}}})
    assert "not used: angle, left, right (not in shape_meta)" in capsys.readouterr().err


def test_cameras_where_there_are_some_else_states(tmp_path):
    path = write(tmp_path / "a.hdf5", images=False)
    with pytest.raises(UserError, match="has no camera.*which the policy needs; its observations: angle"):
        open_demos(path, "image")
    demos = open_demos(path, "auto")
    assert demos.camera_keys == [] and list(demos.state_keys) == ["angle", "pos"] and demos.image_size is None
    assert open_demos(write(tmp_path / "b.hdf5"), "auto").camera_keys == ["left", "right"]


def test_what_the_order_of_demos_must_not_decide(tmp_path):
    """What is a camera in any demo is one in all: a grey one in the first demo is refused like any other."""
    def grey_first(file):
        for name in ("demo_0",):
            x = file[f"data/{name}/obs/left"][..., 0]
            del file[f"data/{name}/obs/left"]
            file[f"data/{name}/obs/left"] = x
    path = write(tmp_path / "a.hdf5", edit=grey_first)
    with pytest.raises(UserError, match=r"demo_0: camera 'left' is uint8 \(5, 4, 6\): write uint8"):
        open_demos(path, "image")


def test_numbers_that_float32_is_too_coarse_for_are_named(tmp_path, capsys):
    def edit(file):
        for demo in file["data"].values():
            demo["obs/utm"] = 4_649_776.25 + 0.01 * demo["actions"][:]
            demo["obs/time"] = 1_700_000_000.0 + demo["actions"][:, :1]
    path = write(tmp_path / "a.hdf5", edit=edit, images=False)
    open_demos(path)
    said = capsys.readouterr().err
    check.main([str(path)])
    report = capsys.readouterr().out.split("worth a look")[1]
    for text in (said, report):
        assert "'utm' is about 4.65e+06 and ranges over 2.5 in dimension 0: float32 keeps" in text
        assert "'time' is about 1.7e+09" in text and "'pos' is about" not in text


def test_shape_meta_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="names no observation"):
        open_demos(write(tmp_path / "a.hdf5"), shape_meta={"obs": {}})


def test_notes_name_the_episodes_they_are_about():
    actions = Array("actions", (5, 2), np.dtype(np.float32))
    episodes = [Episode("a.hdf5", f"demo_{i}", actions, {}, notes=notes)
                for i, notes in enumerate([["late"], ["late", "dark"], [], ["late"]])]
    assert list(notes_of(episodes)) == ["demo_0 and 2 more: late", "demo_1: dark"]


def test_a_missing_filter_is_named():
    error = OSError("Can't read data (can't open directory (/usr/local/plugin). Please verify its existence)")
    assert "needs a compression filter that h5py lacks" in unreadable(error)
    assert "copy the file again" in unreadable(OSError("filter returned failure during read"))


def test_many_keys_are_all_named_on_lines_that_can_be_read(tmp_path, capsys):
    def many(file):
        for demo in file["data"].values():
            for i in range(120):
                demo[f"obs/counter_{i:03}"] = np.zeros((len(demo["actions"]), 1), int)
            demo["obs/" + "k" * 3000] = np.zeros((len(demo["actions"]), 1), int)
    open_demos(write(tmp_path / "a.hdf5", edit=many))
    said = capsys.readouterr().err
    assert all(f"counter_{i:03}" in said for i in range(120)) and "kkk ..." in said
    assert max(map(len, said.splitlines())) < 400
