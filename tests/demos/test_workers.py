"""demos/workers.py: who reads which item, and a set that is larger than what the processes may take."""
import sys
from collections import Counter

import pytest
import torch

import data
import measure_streaming
from demos.dataset import open_demos
from demos.workers import owners
from helpers import write


def windows_of(paths):
    return data.Windows(open_demos(str(paths), "image", val_ratio=0.0, memory_gb=0), None, 4, 2, -1)


def test_an_item_goes_to_the_worker_of_its_file(tmp_path):
    """Files of 16, 16, 30 and 2 steps: the longest to one worker, the next two to the other."""
    for name, lengths in {"a": (8, 8), "b": (5, 11), "c": (30,), "d": (2,)}.items():
        write(tmp_path / f"{name}.hdf5", lengths)
    windows = windows_of(tmp_path)
    worker = owners(windows, 2)
    by_file = {}
    for name, of in zip(windows.episode(torch.arange(len(windows))), worker.tolist()):
        by_file.setdefault(name.partition(":")[0], set()).add(of)
    assert sorted(map(len, by_file.values())) == [1, 1, 1, 1]
    assert by_file["a.hdf5"] == by_file["b.hdf5"] != by_file["c.hdf5"] == by_file["d.hdf5"]
    assert Counter(worker.tolist()) == {by_file["a.hdf5"].pop(): 32, by_file["c.hdf5"].pop(): 32}


def test_a_single_file_is_shared_by_episodes(tmp_path):
    windows = windows_of(write(tmp_path / "a.hdf5", (6, 10, 4, 12)))
    worker = owners(windows, 2)
    assert torch.equal(worker, worker[windows.first])               # an episode has one reader
    assert Counter(worker.tolist()) == {0: 16, 1: 16}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process holds")
def test_a_large_set_is_streamed_in_little_memory(tmp_path):
    """0.37 GB are read, each file by one of two workers, and no process grows by a tenth of that."""
    assert measure_streaming.write_set(tmp_path / "set", 0.37) == 2
    found = measure_streaming.stream(tmp_path / "set", workers=2, batch_size=8)
    assert found["bytes"] == 800 * 2 * 240 * 320 * 3
    assert sorted(map(sorted, found["files"])) == [["0000.hdf5"], ["0001.hdf5"]]
    assert found["growth"] < 0.1 * found["bytes"]
