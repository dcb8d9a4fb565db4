"""What a file declares is judged before it is read."""
import io
import resource
import zipfile

import h5py
import numpy as np
import pytest
from helpers import save, write

from demos import check, limits
from demos.dataset import open_demos
from demos.images import open_samples
from robot.errors import UserError


def declare(path, shape):
    """An HDF5 file of two demos that declares (but does not hold) so many numbers."""
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["fps"] = 10
        for i in range(2):
            demo = file.create_group(f"data/demo_{i}")
            demo.create_dataset("actions", shape, "f4", chunks=(1024, *shape[1:]))
            demo.create_dataset("obs/pos", shape, "f4", chunks=(1024, *shape[1:]))
    return path


def test_numbers_beyond_memory_are_refused_before_they_are_read(tmp_path):
    path = declare(tmp_path / "a.hdf5", (2**33, 50))
    for read in (open_demos, check.examine):
        with pytest.raises(UserError, match="steps of 100 numbers would take .* GB, the memory is"):
            read(path)


def test_the_estimate_is_that_of_what_is_used(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdf5", [100, 100], images=False)     # 200 steps of 6 numbers
    monkeypatch.setattr(limits, "memory", lambda: 200 * 136)
    assert open_demos(path).lengths.sum() == 200
    monkeypatch.setattr(limits, "memory", lambda: 200 * 136 - 1)
    with pytest.raises(UserError, match="200 steps of 6 numbers"):
        open_demos(path)


def test_pictures_that_are_only_declared_are_not_read_to_learn_their_size(tmp_path):
    def huge(file):
        for name in ("demo_0", "demo_1"):
            n = len(file[f"data/{name}/actions"])
            shape = (n, 30_000, 30_000, 3)
            file[f"data/{name}"].create_dataset("obs/huge", shape, "u1", chunks=(1, 100, 100, 3))
    path = write(tmp_path / "a.hdf5", [4, 4], huge, images=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    demos = open_demos(path, "image")
    assert demos.image_size == (30_000, 30_000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                      # in KB
    assert after - before < 500_000, "a picture was read, of 2.7 GB"


def bomb(path, shape, dtype="|u1"):
    """A small .npz whose x declares `shape`."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("x.npy", head.getvalue() + bytes(1000))
    return path


def test_an_npz_that_declares_more_than_memory_is_refused_unread(tmp_path):
    path = bomb(tmp_path / "a.npz", (10**9, 64, 64))
    with pytest.raises(UserError, match="arrays x would take .* GB, the memory is"):
        open_samples(path)
    with pytest.raises(UserError, match="cannot be read as .npz"):      # less than memory, and not there
        open_samples(bomb(tmp_path / "b.npz", (100, 64, 64)))
    with pytest.raises(UserError, match="holds Python objects, which are never unpickled"):
        open_samples(bomb(tmp_path / "c.npz", (100, 64, 64), "|O"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (10**9, 64, 64), "u1", chunks=(1, 64, 64))
    with pytest.raises(UserError, match="arrays x would take"):
        open_samples(tmp_path / "a.h5")


def test_arrays_that_nobody_asked_for_are_not_read(tmp_path):
    path = save(tmp_path / "a.npz", x=np.zeros((20, 8, 8), np.uint8))
    with zipfile.ZipFile(path, "a") as parts:
        head = io.BytesIO()
        declared = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(head, declared)
        parts.writestr("features.npy", head.getvalue())
    assert len(open_samples(path)) == 18


def test_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path):
    assert 10**8 < limits.memory() < 10**14
    (tmp_path / "max").write_text("12345\n")
    real = limits.Path
    monkeypatch.setattr(limits, "Path", lambda path: real(tmp_path / "max"))
    assert limits.memory() == 12345
    (tmp_path / "max").write_text("max\n")
    assert limits.memory() > 10**8
