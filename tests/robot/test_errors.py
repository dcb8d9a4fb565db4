"""Files that are whole or not there."""
from pathlib import Path

import numpy as np
import pytest

from demos.generated import new_hdf5
from robot.errors import UserError, written_aside


def test_written_aside_keeps_what_was_there(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(UserError, match="cannot write"), written_aside(path / "below a file"):
        pass


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "result.hdf5"
    path.write_text("old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="make room or take another folder: .* No space left"):
        with new_hdf5(path) as file:
            file["x"] = np.zeros(1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
