"""demos/zarr.py: a replay buffer is read in place, or becomes HDF5."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from demos import convert
from demos.dataset import open_demos
from robot.errors import UserError


def test_convert_a_replay_buffer(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    rng = np.random.default_rng(0)
    arrays = {"action": rng.random((50, 2)), "state": rng.random((50, 5)), "keypoint": rng.random((50, 9, 2)),
              "img": rng.integers(0, 256, (50, 8, 8, 3))}
    buffer = zarr.open_group(str(tmp_path / "b.zarr"), mode="w")
    for key, x in arrays.items():
        buffer[f"data/{key}"] = x.astype(np.float32)
    buffer["meta/episode_ends"] = np.array([20, 50])
    shutil.make_archive(str(tmp_path / "b.zarr"), "zip", tmp_path / "b.zarr")
    for source, images in (("b.zarr", False), ("b.zarr.zip", True)):
        out = tmp_path / f"{images}.hdf5"
        assert convert.convert(tmp_path / source, out, images, fps=12, instruction="push")[:2] == (2, 50)
        assert open_demos(out).fps == 12 and open_demos(out).instructions == ["push"] * 2
        for path in (out, tmp_path / source):               # converted, and in place
            demos = open_demos(path, "image" if images else "lowdim", val_ratio=0)
            assert demos.lengths.tolist() == [20, 30]
            assert demos.state_keys == {"agent_pos": 2, "keypoint": 18, "state": 5}
            assert np.array_equal(demos.actions, arrays["action"].astype(np.float32))
            assert np.array_equal(demos.state[:, 2:20], arrays["keypoint"].reshape(50, 18).astype(np.float32))
            assert np.array_equal(demos.state[:, :2], arrays["state"][:, :2].astype(np.float32))
            assert not images or np.array_equal(demos.images(1, 3, 30)[:, 0],
                                                np.moveaxis(arrays["img"][23:], 3, 1))
    assert demos.camera_keys == ["image"] and demos.fps == 10
    buffer.attrs["fps"] = 5.0
    assert open_demos(tmp_path / "b.zarr").fps == 5
    with pytest.raises(UserError, match="name the replay buffer itself, b.zarr, b.zarr.zip"):
        (tmp_path / "folder").mkdir()
        for name in ("b.zarr", "b.zarr.zip"):
            (tmp_path / name).rename(tmp_path / "folder" / name)
        open_demos(tmp_path / "folder")
    (tmp_path / "folder/b.zarr").rename(tmp_path / "b.zarr")

    with pytest.raises(UserError, match="exists already"):
        convert.convert(tmp_path / "b.zarr", out)
    buffer["meta/episode_ends"][:] = np.array([20, 49])
    with pytest.raises(UserError, match="has 50 steps, episodes end at 49"):
        convert.convert(tmp_path / "b.zarr", tmp_path / "c.hdf5")
    assert not list(tmp_path.glob("c.hdf5*"))
    (tmp_path / "not.zarr").mkdir()
    with pytest.raises(UserError, match="not.zarr"):
        convert.convert(tmp_path / "not.zarr", tmp_path / "c.hdf5")


def test_convert_without_zarr_or_buffer(tmp_path, monkeypatch):
    (tmp_path / "b.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UserError, match="pip install 'zarr<4'"):
        convert.convert(tmp_path / "b.zarr", tmp_path / "c.hdf5")
    with pytest.raises(UserError, match="did you mean 'b.zarr'"):
        convert.convert(tmp_path / "a.zarr", tmp_path / "c.hdf5")


def buffer_of(tmp_path, name="b.zarr"):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    buffer = zarr.open_group(str(tmp_path / name), mode="w", zarr_format=2)
    for key, x in {"action": np.arange(100.0).reshape(50, 2) + 1, "state": np.ones((50, 5))}.items():
        array = buffer.create_array(f"data/{key}", shape=x.shape, chunks=(10, x.shape[1]), dtype=x.dtype)
        array[:] = x
    buffer["meta/episode_ends"] = np.array([20, 50])
    return tmp_path / name


def test_a_buffer_of_another_robot_is_not_taken_for_push_t(tmp_path):
    """Only Push-T's state of five numbers begins with the agent's place; an agent_pos is read as it is."""
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    arrays = {"action": np.ones((6, 2)), "state": np.arange(42.0).reshape(6, 7),
              "img": np.zeros((6, 8, 8, 3), np.uint8)}
    own = {"agent_pos": -np.ones((6, 3)), "state": np.arange(30.0).reshape(6, 5)}
    for name, more, wanted in (("a", {}, {"state": 7}), ("b", own, {"agent_pos": 3, "state": 5})):
        buffer = zarr.open_group(str(tmp_path / f"{name}.zarr"), mode="w")
        for key, x in (arrays | more).items():
            buffer[f"data/{key}"] = x + 1 if key == "img" else x
        buffer["meta/episode_ends"] = np.array([3, 6])
        demos = open_demos(tmp_path / f"{name}.zarr", val_ratio=0)
        assert demos.state_keys == wanted
        assert np.array_equal(demos.state[:, -wanted["state"]:], (arrays | more)["state"])
    assert (demos.state[:, :3] == -1).all()


def test_missing_chunks_are_not_zeros_unless_somebody_says_so(tmp_path):
    path = buffer_of(tmp_path)
    (path / "data/action/2.0").unlink()
    with pytest.raises(UserError, match="1 of 5 chunks of data/action are missing.*--missing_zeros"):
        convert.convert(path, tmp_path / "a.hdf5")
    assert not (tmp_path / "a.hdf5").exists()
    convert.convert(path, tmp_path / "a.hdf5", missing_zeros=True)
    actions = open_demos(tmp_path / "a.hdf5", val_ratio=0).actions
    assert (actions[20:30] == 0).all() and (actions[:20] != 0).all() and (actions[30:] != 0).all()


@pytest.mark.parametrize("where", ["compressor", "filters", ".zmetadata", "zarr.json", "zip"])
def test_a_store_that_would_unpickle_is_refused_unread(tmp_path, where):
    """A codec "pickle" runs what the chunks hold; here that would write a file."""
    path, marker = buffer_of(tmp_path), tmp_path / "it_ran"
    description = json.loads((path / "data/state/.zarray").read_text())
    description |= {"compressor": {"id": "pickle"}} if where != "filters" else {"filters": [{"id": "pickle"}]}
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    if where == ".zmetadata":
        (path / where).write_text(json.dumps({"metadata": {"data/state/.zarray": description}}))
    elif where == "zarr.json":
        (path / where).write_text(json.dumps({"codecs": [{"name": "sharding_indexed", "configuration": {
            "codecs": [{"name": "numcodecs.pickle"}]}}]}))
    else:
        (path / "data/state/.zarray").write_text(json.dumps(description))
    for chunk in (path / "data/state").glob("[0-9]*"):
        chunk.write_bytes(payload)
    if where == "zip":
        path = Path(shutil.make_archive(str(path), "zip", path))
    with pytest.raises(UserError, match="names the codec '(numcodecs.)?pickle', which may run code") as error:
        convert.convert(path, tmp_path / "a.hdf5")
    assert not marker.exists() and len(str(error.value)) < 400


def test_metadata_that_is_no_json_is_one_line(tmp_path):
    path = buffer_of(tmp_path)
    (path / "data/state/.zattrs").write_text("{no")
    with pytest.raises(UserError, match="data/state/.zattrs is no JSON"):
        convert.convert(path, tmp_path / "a.hdf5")


def test_pictures_that_are_not_taken_are_named(tmp_path, capsys):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    path = buffer_of(tmp_path)
    zarr.open_group(str(path), mode="a")["data/img"] = np.ones((50, 8, 8, 3), np.float32) * 9
    convert.convert(path, tmp_path / "a.hdf5")
    assert "not taken: image (pictures; --images takes them)" in capsys.readouterr().err
    zarr.open_group(str(path), mode="a")["data/img"] = np.full((50, 8, 8, 3), np.nan, np.float32)
    with pytest.raises(UserError, match="is float and has nothing above 1 in 8 pictures, evenly spread: sc"):
        convert.convert(path, tmp_path / "b.hdf5", images=True)
    pictures = np.full((50, 8, 8, 3), 9, np.float32)
    pictures[30] = -1
    zarr.open_group(str(path), mode="a")["data/img"] = pictures
    with pytest.raises(UserError, match="data/img goes from -1 to 9: scale it"):
        open_demos(path, "image").images(1, 0, 30)


def test_pictures_in_float_may_begin_with_black_ones(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    path = buffer_of(tmp_path)
    pictures = np.zeros((50, 8, 8, 3), np.float32)
    pictures[20:] = np.arange(30)[:, None, None, None] + 100
    zarr.open_group(str(path), mode="a")["data/img"] = pictures + 1e-9      # zarr does not write zeros
    images = [open_demos(path, "image", val_ratio=0).images(e, 0, n) for e, n in enumerate((20, 30))]
    assert np.array_equal(np.concatenate(images)[:, 0, 0, 0, 0], pictures[:, 0, 0, 0])
    zarr.open_group(str(path), mode="a")["data/img"] = pictures / 255 + 1e-9
    with pytest.raises(UserError, match="data/img is float and has nothing above 1 in 8 pictures"):
        open_demos(path, "image")
    assert open_demos(path, val_ratio=0).action_dim == 2                    # which needs no pictures


def test_small_depth_maps_are_no_states(tmp_path, capsys):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    path = buffer_of(tmp_path)
    zarr.open_group(str(path), mode="a")["data/hand_depth"] = np.full((50, 6, 8), 1.5, np.float32)
    zarr.open_group(str(path), mode="a")["data/corners"] = np.full((50, 9, 2), 2.5, np.float32)
    assert open_demos(path, val_ratio=0).state_keys == {"corners": 18, "state": 5}
    assert "not used: hand_depth (looks like a depth map" in capsys.readouterr().err


def test_missing_pictures_matter_where_they_are_used(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    path = buffer_of(tmp_path)
    array = zarr.open_group(str(path), mode="a").create_array("data/img", shape=(50, 8, 8, 3),
                                                              chunks=(10, 8, 8, 3), dtype=np.uint8)
    array[:] = 9
    (path / "data/img/2.0.0.0").unlink()
    assert open_demos(path, val_ratio=0).lengths.tolist() == [20, 30]
    with pytest.raises(UserError, match="1 of 5 chunks of data/img are missing.* shape_meta"):
        open_demos(path, "image")
