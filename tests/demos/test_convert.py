"""demos/convert.py: a zarr replay buffer becomes HDF5."""
import sys

import numpy as np
import pytest

from demos import convert
from demos.dataset import open_demos
from robot.errors import UserError


def test_convert_a_replay_buffer(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    import shutil
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
        assert convert.convert(tmp_path / source, out, images, fps=12, instruction="push") == (2, 50)
        demos = open_demos(out, "image" if images else "lowdim", val_ratio=0)
        assert demos.lengths.tolist() == [20, 30] and demos.fps == 12 and demos.instructions == ["push"] * 2
        assert demos.state_keys == {"agent_pos": 2, "keypoint": 18, "state": 5}
        assert np.array_equal(demos.actions, arrays["action"].astype(np.float32))
        assert np.array_equal(demos.state[:, 2:20], arrays["keypoint"].reshape(50, 18).astype(np.float32))
        assert np.array_equal(demos.state[:, :2], arrays["state"][:, :2].astype(np.float32))
    assert demos.camera_keys == ["image"]
    assert np.array_equal(demos.images(1, 0, 30)[:, 0], np.moveaxis(arrays["img"][20:], 3, 1))

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
    with pytest.raises(UserError, match="pip install zarr"):
        convert.convert(tmp_path / "b.zarr", tmp_path / "c.hdf5")
    with pytest.raises(UserError, match="did you mean 'b.zarr'"):
        convert.convert(tmp_path / "a.zarr", tmp_path / "c.hdf5")
