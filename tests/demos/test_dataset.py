"""demos/dataset.py and the layouts: which observations, which episodes, and what is refused."""
import json

import h5py
import numpy as np
import pytest
import torch
from helpers import claim, drop, replace, set_value, write

import data
from demos import check
from demos.dataset import open_demos
from robot.errors import UserError
from robot.transforms import resize


def test_demos_come_in_the_order_of_their_numbers(tmp_path):
    demos = open_demos(write(tmp_path / "a.hdf5", lengths=range(2, 14), images=False))
    assert demos.lengths.tolist() == list(range(2, 14))
    assert demos.episode_names[2] == "a.hdf5:demo_2" and demos.instructions[11] == "task 11"


def test_privileged_keys_are_hidden_from_cameras(tmp_path):
    def edit(file):
        for demo in file["data"].values():
            demo["obs/object"] = demo["obs/goal"] = np.zeros((len(demo["actions"]), 2), np.float32)
            demo["obs/count"] = np.zeros((len(demo["actions"]), 1), np.int64)
    path = write(tmp_path / "a.hdf5", edit=edit)
    keys = lambda *args: (lambda d: (list(d.state_keys), d.camera_keys))(open_demos(path, *args))
    assert keys("lowdim") == (["angle", "goal", "object", "pos"], [])
    assert keys("image") == (["angle", "goal", "pos"], ["left", "right"])
    assert keys("image", True) == (["angle", "pos"], ["left", "right"])


def test_shape_meta_names_keys_and_their_order(tmp_path):
    path = write(tmp_path / "a.hdf5")
    meta = {"obs": {"right": {"shape": [3, 4, 6], "type": "rgb"}, "pos": {"shape": [3]},
                    "angle": {"shape": [1], "type": "low_dim"}}, "action": {"shape": [2]}}
    demos = open_demos(path, shape_meta=meta)
    assert demos.state_keys == {"pos": 3, "angle": 1} and demos.camera_keys == ["right"]
    assert demos.state[9].tolist() == [104, 104.25, 104.5, 104] and demos.image_size == (4, 6)
    for key, spec, words in [("pos", {"shape": [4]}, r"low_dim \[4\], but in a.hdf5:demo_0 float64 \[3\]"),
                             ("left", {"shape": [4, 6, 3], "type": "rgb"}, r"rgb is \[3, H, W\]"),
                             ("pos", {"shape": [3], "type": "rgb"}, "'pos' is rgb"),
                             ("pos", {"shape": [3], "type": "depth"},
                              "obs: pos: type is rgb or low_dim, not 'depth'"),
                             ("pso", {"shape": [3]}, "no 'pso', did you mean 'pos'")]:
        with pytest.raises(UserError, match=words):
            open_demos(path, shape_meta={"obs": {key: spec}})
    with pytest.raises(UserError, match=r"actions have shape \[7\]"):
        open_demos(path, shape_meta={"obs": {"pos": {"shape": [3]}}, "action": {"shape": [7]}})
    with pytest.raises(UserError, match="shape_meta: unknown key 'pos'"):
        open_demos(path, shape_meta={"pos": [3]})


def test_masks_decide_unless_asked_otherwise(tmp_path):
    def masks(file):
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_3"]), np.array([b"demo_1"])
    path = write(tmp_path / "a.hdf5", lengths=[4] * 10, edit=masks, images=False)
    demos = open_demos(path)
    assert demos.train_episodes.tolist() == [0, 3] and demos.valid_episodes.tolist() == [1]
    demos = open_demos(path, val_ratio=0.3)
    assert len(demos.train_episodes) == 7 and len(demos.valid_episodes) == 3
    assert not set(demos.train_episodes) & set(demos.valid_episodes)
    few = open_demos(path, val_ratio=0.3, max_train_episodes=4)
    assert len(few.train_episodes) == 4 and set(few.train_episodes) < set(demos.train_episodes)
    assert few.valid_episodes.tolist() == demos.valid_episodes.tolist()         # not the episodes left over
    assert len(data.Windows(demos, None, 4, 2, -1, split="valid")) == 12
    with pytest.raises(UserError, match="val_ratio must be"):
        open_demos(path, val_ratio=1.0)
    with pytest.raises(UserError, match="max_train_episodes must be"):
        open_demos(path, max_train_episodes=0)


def test_split_is_diffusion_policys(tmp_path):
    """get_val_mask(206, 0.02, seed 42) there: default_rng(42).choice(206, 4, replace=False)."""
    demos = open_demos(write(tmp_path / "a.hdf5", [2] * 206, images=False), val_ratio=0.02, seed=42)
    drawn = np.random.default_rng(42).choice(206, size=4, replace=False)
    assert demos.valid_episodes.tolist() == sorted(drawn)


def test_parts_of_a_rollout_are_held_out_together(tmp_path):
    def edit(file):
        for i, demo in enumerate(file["data"].values()):
            demo.attrs["rollout"] = i // 3
    demos = open_demos(write(tmp_path / "a.hdf5", [3] * 9, edit, images=False), val_ratio=0.4)
    assert len(demos.valid_episodes) == 3 and len(set(demos.valid_episodes // 3)) == 1


def test_a_single_episode_is_trained_on_and_said(tmp_path, capsys):
    demos = open_demos(write(tmp_path / "a.hdf5", [7], images=False), val_ratio=0.5)
    assert demos.train_episodes.tolist() == [0] and len(demos.valid_episodes) == 0
    assert "no episode of" in capsys.readouterr().err
    assert len(data.Windows(demos, None, 4, 2, -1, text_len=4, split="valid")) == 0


@pytest.mark.parametrize("attrs, fps", [
    ({"fps": 15}, 15), ({"fps": 15, "env_args": '{"control_freq": 30}'}, 15),
    ({"env_args": '{"control_freq": 30}'}, 30),
    ({"env_args": '{"env_kwargs": {"control_freq": 25}}'}, 25), ({"total": 1}, 20)])
def test_rate(tmp_path, capsys, attrs, fps):
    demos = open_demos(write(tmp_path / "a.hdf5", images=False, **attrs))
    assert demos.fps == fps and ("20 Hz assumed" in capsys.readouterr().err) == (fps == 20)


def test_every_episode_keeps_its_own_rate(tmp_path):
    for name, fps in (("a", 10), ("b", 50)):
        write(tmp_path / f"{name}.hdf5", [4], images=False, fps=fps)
    demos = open_demos(tmp_path, val_ratio=0)
    assert data.Windows(demos, None, 4, 2, -1).batch(torch.tensor([0, 7]))["control_hz"].tolist() == [10, 50]


def test_description_is_plain(tmp_path):
    path = write(tmp_path / "a.hdf5", fps=10, action_names=json.dumps(["x", "y"]))
    description = open_demos(path, "image").description()
    assert json.loads(json.dumps(description)) == description
    assert description["state_keys"] == {"angle": 1, "pos": 3} and description["image_size"] == [4, 6]
    assert description["action_names"] == ["x", "y"] and description["fps"] == 10


@pytest.mark.parametrize("edit, words", [
    (drop("data/demo_1/actions"), r"a.hdf5:demo_1 holds obs, but no 'actions'"),
    (drop("data/demo_1/obs/pos"), r"demo_1 has observations angle, left, right, but no 'pos'"),
    (drop("data"), r"holds nothing, but neither data/demo_<i>"),
    (set_value("data/demo_1/actions", (6, 1), np.nan), r"demo_1: 'actions' is not finite at step 6 \(1 of 8"),
    (set_value("data/demo_2/actions", (0, 0), np.inf), r"demo_2: 'actions' is not finite at step 0"),
    (set_value("data/demo_0/obs/pos", (3, 2), np.nan), r"demo_0: 'pos' is not finite at step 3"),
    (replace("data/demo_1/actions", np.zeros((8, 7))), r"demo_1: actions have shape \(7,\) per step, in"),
    (replace("data/demo_1/actions", np.zeros(8)), r"make it \(steps, dimensions\)"),
    (replace("data/demo_1/obs/pos", np.zeros((8, 4))), r"demo_1: 'pos' has shape \(4,\) per step"),
    (replace("data/demo_1/obs/pos", np.zeros((9, 3))), r"actions have 8 steps, 'pos' is \(9, 3\)"),
    (replace("data/demo_1/obs/left", np.zeros((8, 5, 6, 3), np.uint8)), r"'left' has shape \(5, 6, 3\)"),
    (replace("data/demo_1/obs/left", np.zeros((8, 4, 6, 3), np.float32)), r"'left' is float32 .* uint8"),
    (replace("data/demo_0/obs/left", np.zeros((5, 4, 6, 4), np.uint8)), r"'left' is uint8 \(5, 4, 6, 4\)"),
    (claim(9), r"num_samples says 9, actions have 8 steps"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_file(tmp_path, edit, words):
    path = write(tmp_path / "a.hdf5", edit=edit)
    with pytest.raises(UserError, match=words) as error:
        open_demos(path, "image")
    assert "\n" not in str(error.value)


def test_episode_of_one_step(tmp_path):
    with pytest.raises(UserError, match="demo_1 has 1 step, an episode needs at least 2"):
        open_demos(write(tmp_path / "a.hdf5", [4, 1]))


def test_no_camera_and_no_state(tmp_path):
    path = write(tmp_path / "a.hdf5", images=False)
    with pytest.raises(UserError, match="no camera, uint8"):
        open_demos(path, "image")
    with pytest.raises(UserError, match="did you mean 'lowdim'"):
        open_demos(path, "low_dim")

    def images_only(file):
        for demo in file["data"].values():
            del demo["obs/pos"], demo["obs/angle"]
    path = write(tmp_path / "b.hdf5", edit=images_only)
    with pytest.raises(UserError, match="no state, float"):
        open_demos(path)
    demos = open_demos(path, "image")                      # cameras alone are enough
    normalizer = data.fit_normalizer(demos)
    assert data.Windows(demos, normalizer, 4, 2, -1).batch(torch.arange(3))["state"].shape == (3, 2, 0)


def test_two_files_that_do_not_match(tmp_path):
    write(tmp_path / "a.hdf5")
    write(tmp_path / "b.hdf5", edit=lambda f: [replace(f"data/{d}/obs/pos", np.zeros((n, 2)))(f)
                                               for d, n in zip(list(f["data"]), (5, 8, 3))])
    with pytest.raises(UserError, match=r"b.hdf5:demo_0: 'pos' has shape \(2,\) per step, in a.hdf5:demo_0"):
        open_demos(tmp_path)


def test_cameras_of_different_size(tmp_path, capsys):
    def edit(file):
        for demo in file["data"].values():
            replace(f"{demo.name}/obs/right", np.full((len(demo["actions"]), 8, 8, 3), 7, np.uint8))(file)
    path = write(tmp_path / "a.hdf5", edit=edit)
    with pytest.raises(UserError, match="cameras differ in size.*--image_size H W brings them to one size"):
        open_demos(path, "image")
    check.main([str(path)])
    wrong = capsys.readouterr().out.split("must be mended")[1]
    assert "left 4 x 6, right 8 x 8: train with --image_size" in wrong
    demos = open_demos(path, "image", image_size=(4, 6), val_ratio=0)
    said = capsys.readouterr().err
    assert "'right' is resized from 8 x 8 to 4 x 6, which changes its proportions" in said
    assert "'left'" not in said
    assert demos.image_size == (4, 6) and demos.camera_sizes == {"left": (4, 6), "right": (8, 8)}
    images = demos.images(1, 0, 8)
    assert (images[:, 0, 0] == (100 + np.arange(8))[:, None, None]).all() and (images[:, 1] == 7).all()


def test_resizing_while_reading(tmp_path, capsys):
    """Noise, so that the filter shows; pictures in memory and those read from the file are the same."""
    noise = {}

    def edit(file):
        rng = np.random.default_rng(0)
        for name, demo in file["data"].items():
            noise[name] = rng.integers(0, 256, (len(demo["actions"]), 24, 32, 3), np.uint8)
            replace(f"{demo.name}/obs/left", noise[name])(file)
        replace("data/demo_2/obs/left", noise["demo_2"][:, :12])(file)      # an episode of its own size
    path = write(tmp_path / "a.hdf5", [20, 40, 3], edit)
    with pytest.raises(UserError, match=r"demo_2: 'left' has shape \(12, 32, 3\).*--image_size H W"):
        open_demos(path, "image")
    meta = {"obs": {"left": {"shape": [3, 6, 8], "type": "rgb"}}}
    for gb in (4, 0):
        demos = open_demos(path, shape_meta=meta, image_size=(6, 8), val_ratio=0, memory_gb=gb)
        windows = data.Windows(demos, None, 4, 2, -1)
        assert (windows.images is None) == (gb == 0)
        batch = windows.batch(torch.tensor([20, 39, 59, 62]))["images"][:, 1, 0]
        for i, (name, t) in enumerate([("demo_1", 0), ("demo_1", 19), ("demo_1", 39)]):
            want = resize(noise[name][t:t + 1], (6, 8))[0]
            assert np.array_equal(batch[i].permute(1, 2, 0), want)
        assert np.array_equal(batch[3].permute(1, 2, 0), resize(noise["demo_2"][2:3, :12], (6, 8))[0])
    description = demos.description()
    assert description["camera_sizes"] == {"left": [24, 32]} and description["image_size"] == [6, 8]
    assert "proportions" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"'left' is \[3, 6, 8\], but the pictures of .* are \[3, 9, 9\]"):
        open_demos(path, shape_meta=meta, image_size=(9, 9))


def test_the_doctor_says_what_resizing_costs(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.hdf5", [20, 20])
    check.main([str(path), "--image_size", "2", "3"])
    report = capsys.readouterr().out
    assert "resized       to 2 x 3: 0.0 MB of images" in report and "ms a picture" in report
    assert report.endswith("nothing looks wrong\n")
    check.main([str(path), "--image_size", "3", "3"])
    assert "camera 'left' changes its proportions, from 4 x 6" in capsys.readouterr().out
    monkeypatch.setattr(check, "MEMORY_GB", 1e-6)
    check.main([str(path)])
    assert "of images stay in the files" in capsys.readouterr().out


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.hdf5").write_text("this is no HDF5")
    whole = write(tmp_path / "whole.hdf5").read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "buffer.zarr").mkdir()
    (tmp_path / "lerobot" / "meta").mkdir(parents=True)
    (tmp_path / "lerobot" / "meta" / "info.json").write_text("{}")
    for name, words in [("whola.hdf5", "did you mean 'whole.hdf5'"), ("empty", "holds no"),
                        ("no*.h5", "check the path"), ("text.hdf5", "cannot be opened as HDF5"),
                        ("cut.hdf5", "cut short"), ("lerobot", "LeRobot"), ("buffer.zarr", "replay buffer")]:
        with pytest.raises(UserError, match=words) as error:
            open_demos(tmp_path / name)
        assert "\n" not in str(error.value) and name.split(".")[0] in str(error.value)
    with pytest.raises(UserError, match="did you mean 'tabletop'"):
        open_demos("tabeltop")


def test_damage_inside_the_data_is_one_line(tmp_path):
    """A chunk whose compressed bytes are overwritten: the file opens, reading fails."""
    def edit(file):
        noise = np.random.default_rng(0).random((5, 400))
        file.create_dataset("data/demo_0/obs/packed", data=noise, compression=4, chunks=noise.shape)
        for d, n in (("demo_1", 8), ("demo_2", 3)):
            file[f"data/{d}/obs/packed"] = np.zeros((n, 400))
    path = write(tmp_path / "a.hdf5", edit=edit)
    with h5py.File(path) as file:
        chunk = file["data/demo_0/obs/packed"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    with pytest.raises(UserError, match="demo_0: /data/demo_0/obs/packed cannot be read, copy") as error:
        open_demos(path)
    assert "\n" not in str(error.value)


def test_files_are_not_kept_open(tmp_path):
    path = write(tmp_path / "a.hdf5")
    demos = open_demos(path, "image")
    data.Windows(demos, None, 4, 2, -1)
    with h5py.File(path, "a") as file:                          # raises while anybody reads
        file["data"].attrs["note"] = "still mine"
    with h5py.File(path) as file:
        assert file["data"].attrs["note"] == "still mine"


@pytest.mark.parametrize("fps", [0, -5, float("nan")])
def test_a_control_frequency_is_above_zero(tmp_path, fps):
    with pytest.raises(UserError, match="frequency is .* Hz, it must be above 0: correct attribute 'fps'"):
        open_demos(write(tmp_path / "a.hdf5", fps=float(fps)))
