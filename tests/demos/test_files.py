"""demos/files.py: what a folder holds is read once and whole, or named."""
import os

import pytest
from helpers import write

from demos.dataset import open_demos
from demos.files import find_files


def test_a_folder_is_searched_through_links_and_each_file_is_read_once(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "disk/deep").mkdir(parents=True)
    write(tmp_path / "set/a.hdf5", (4, 5), images=False)
    write(tmp_path / "disk/deep/b.H5", (6, 7, 8), images=False)
    (tmp_path / "set/more").symlink_to(tmp_path / "disk")
    (tmp_path / "set/more_again").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "set")
    assert open_demos(tmp_path / "set", val_ratio=0).lengths.tolist() == [4, 5, 6, 7, 8]


def test_replay_buffers_beside_files_are_named(tmp_path, capsys):
    (tmp_path / "b.zarr/data").mkdir(parents=True)
    write(tmp_path / "b.zarr/data/inside.hdf5")
    write(tmp_path / "a.hdf5")
    (tmp_path / "c.zarr.zip").touch()
    assert find_files(tmp_path) == [tmp_path / "a.hdf5"]
    assert "not read unless --data names one: b.zarr, c.zarr.zip" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_named(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a.hdf5")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert find_files(tmp_path) == [tmp_path / "a.hdf5"]
    assert f"{tmp_path / 'closed'} is not searched: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo²3.hdf5", "Ä ö ü.hdf5", "[1].hdf5"])
def test_any_name_of_a_file_will_do(tmp_path, name):
    write(tmp_path / name, (4, 5), images=False)
    for path in (tmp_path, tmp_path / name):
        assert open_demos(path, val_ratio=0).lengths.tolist() == [4, 5]
