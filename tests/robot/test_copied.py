"""robot/, one model file and a checkpoint in an empty folder: all that a robot's computer needs."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import train

PROGRAM = """
import json, sys
import numpy as np
from {package} import Policy

policy = Policy.load("checkpoint.pt")
observation = {{key: np.zeros(dim, np.float32) for key, dim in policy.description["state_keys"].items()}}
print(json.dumps(policy.act(observation).tolist()))
print(sorted(name for name in sys.modules if name.split(".")[0] in ("demos", "tools", "train", "sample")))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(folder / "cache"))
        train.main(["--model", "dp_cnn", "--steps", "1", "--demos", "4", "--batch_size", "4", "--episodes",
                    "0", "--out", str(folder / "out"), "--set", "down_dims=[8, 16]"])
    return folder / "out" / "checkpoint.pt"


def act(folder, package):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(package=package)], cwd=folder, text=True,
                          env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    return done, done.stdout.splitlines()


@pytest.mark.parametrize("package", ["arm", "my_project.vendor.arm"])
def test_a_copy_under_another_name_acts(checkpoint, tmp_path, package):
    """Beside files of somebody else's that have the names of ours, and that must not be imported."""
    place = tmp_path.joinpath(*package.split(".")[:-1])
    shutil.copytree(ROOT / "robot", place / "arm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dp_cnn.py", place)
    shutil.copy(checkpoint, tmp_path)
    for folder in {tmp_path, place}:
        for foreign in ("data", "report", "sample", "train", "tools", "demos"):
            (folder / f"{foreign}.py").write_text("raise SystemExit('a foreign file was imported')\n")
    done, lines = act(tmp_path, package)
    assert done.returncode == 0, done.stderr
    here, expected = json.loads(lines[0]), act_here(checkpoint)
    assert len(here) == 3 and here == pytest.approx(expected, abs=1e-5) and lines[1] == "[]"


def act_here(checkpoint):
    import numpy as np

    from robot import Policy
    policy = Policy.load(checkpoint)
    states = policy.description["state_keys"]
    return policy.act({key: np.zeros(dim, np.float32) for key, dim in states.items()})


def test_a_copy_without_the_model_file_says_so_in_one_line(checkpoint, tmp_path):
    shutil.copytree(ROOT / "robot", tmp_path / "arm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkpoint, tmp_path)
    done, _ = act(tmp_path, "arm")
    assert "UserError: there is no dp_cnn.py beside the folder arm: copy it there" in done.stderr
