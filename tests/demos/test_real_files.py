"""Real demonstrations and images, where DEMO_DATA names a folder of them."""
import os
from pathlib import Path

import pytest
import torch

import data
from demos import check
from demos.dataset import open_demos
from demos.images import open_samples


real = pytest.mark.skipif("DEMO_DATA" not in os.environ, reason="DEMO_DATA names no folder of real data")


@real
@pytest.mark.parametrize("name, obs, episodes, state, fps", [
    ("pusht_lowdim", "lowdim", 206, 26, 10), ("pusht_image", "image", 206, 7, 10),
    ("g1_bottle_lowdim", "lowdim", 100, 26, 30), ("g1_bottle_image", "image", 5, 26, 10),
    ("lift_scripted_lowdim", "lowdim", 200, 26, 20)])
def test_real_demonstrations(name, obs, episodes, state, fps, capsys):
    path = Path(os.environ["DEMO_DATA"]) / f"{name}.hdf5"
    demos = open_demos(path, obs, memory_gb=0)
    assert (len(demos.lengths), demos.state_dim, demos.fps) == (episodes, state, fps)
    normalizer = data.fit_normalizer(demos)
    windows = data.Windows(demos, normalizer, 16, 2, -1)
    batch = windows.batch(torch.arange(0, len(windows), 997))
    assert batch["actions"].abs().max() <= 1 + 1e-5
    if name.startswith("lift"):
        assert normalizer.near_constant["actions"] == [3, 4, 5]         # the script never turns the hand
    check.main([str(path)])
    assert "must be mended" not in capsys.readouterr().out


@real
@pytest.mark.parametrize("name, shape, train, valid", [("mnist_t10k", (1, 32, 32), 9000, 1000),
                                                       ("cifar10_subset", (3, 32, 32), 2000, 500)])
def test_real_images(name, shape, train, valid):
    path = Path(os.environ["DEMO_DATA"]) / f"{name}.npz"
    parts = [open_samples(path, split=split) for split in ("train", "valid")]
    assert [len(p) for p in parts] == [train, valid] and parts[0].shape == shape and parts[0].n_classes == 10
    if name == "mnist_t10k":
        assert (parts[0].x[:, 0, :2] == 0).all()
