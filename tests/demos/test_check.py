"""demos/check.py names what was planted."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, refused, save, write, write_aloha

import data
from demos import check
from demos.dataset import open_demos
from demos.files import open_file


def test_inspector_names_what_was_planted(tmp_path, capsys):
    def edit(file):
        file["data/demo_1/actions"][6, 1] = np.nan
        file["data/demo_2"].attrs["num_samples"] = 99
        for demo in file["data"].values():
            demo["obs/dead"] = np.column_stack([demo["obs/pos"][:, :1], np.full(len(demo["actions"]), 3.0)])
            demo["obs/left"][:] = 0
        for key in ("actions", "obs/pos", "obs/angle", "obs/dead", "obs/right"):
            file[f"data/demo_3/{key}"][:20] = file[f"data/demo_3/{key}"][0]         # waits for 2 s
    path = write(tmp_path / "a.hdf5", [30, 30, 30, 40], edit)
    check.main([str(path)])
    report = capsys.readouterr().out
    wrong, odd = report.split("must be mended:")[1].split("worth a look:")
    odd, notes = odd.split("notes:")
    assert "demo_1: 'actions' is not finite at step 6 (1 of 30 steps)" in wrong
    assert "demo_2: num_samples says 99, actions have 30 steps" in wrong
    assert "constant dimension: 'dead' is constant in dimension 1: it is shifted, not scaled" in notes
    assert "black camera: 'left' shows nothing brighter than 16 in 3 of 3 episodes" in odd
    assert "33% of the episodes do not move in their first 5 steps (median 20, longest 20 in" in odd
    assert "4 episodes, 130 steps at 10 Hz" in report and "30 .. 40 steps, median 30" in report
    assert "1 x task 3" in report and "(4, 6, 3)" in report


def test_a_file_of_many_episodes_is_opened_once(tmp_path, monkeypatch):
    """To open a LeRobot set or a replay buffer is to read all that describes it."""
    opened = []
    monkeypatch.setattr(check, "open_file", lambda path: opened.append(path) or open_file(path))
    path = write(tmp_path / "a.hdf5", [20, 30, 40])
    assert len(check.examine(path).found.episodes) == 3 and opened == [str(path)]


def test_inspector_counts_padding(tmp_path, capsys):
    """Against the action masks of the windows themselves."""
    path = write(tmp_path / "a.hdf5", [5, 20, 40])
    check.main([str(path)])
    demos = open_demos(path, val_ratio=0)
    masks = data.Windows(demos, None, 16, 2, -1).batch(torch.arange(65))["action_mask"]
    assert f"padding       {1 - masks.float().mean():.1%}" in capsys.readouterr().out


def test_inspector_on_other_files(tmp_path, capsys):
    check.main([str(write(tmp_path / "fine.hdf5", [20, 20]))])
    assert capsys.readouterr().out.endswith("nothing looks wrong\n")
    folder = write_aloha(tmp_path / "set", [20, 30])
    (folder / "broken.hdf5").write_text("no")
    check.main([str(folder)])
    report = capsys.readouterr().out
    assert "2 episodes, 50 steps at unknown Hz" in report and "broken.hdf5 cannot be opened" in report
    ones = np.ones((5, 28, 28), np.uint8)
    check.main([str(save(tmp_path / "a.npz", x=ones, y=np.array([0, 1, 1, 3, 3])))])
    report = capsys.readouterr().out
    assert "1 x 32 x 32 after padding" in report and "all: no image of class 2" in report
    assert "no value above 1" in report
    check.main([str(save(tmp_path / "b.hdf5", x=np.ones((5, 28), np.uint8)))])
    assert "must be mended" in capsys.readouterr().out


def test_command_line_ends_in_one_line(tmp_path):
    (tmp_path / "text.hdf5").write_text("this is no HDF5")
    command = [sys.executable, "-m", "demos.check", tmp_path / "text.hdf5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "cannot be opened as HDF5" in done.stderr


@pytest.mark.parametrize("argv, named", [
    ([], ["required", "path"]), (["a.hdf5", "b.hdf5"], ["unknown argument b.hdf5"]),
    (["--help=x"], ["help"]), (["~nouser/x"], ["no such user"])])
def test_wrong_flags(argv, named, capsys):
    refused(capsys, lambda: check.main(argv), *named)
