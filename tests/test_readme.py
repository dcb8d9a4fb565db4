"""README from top to bottom, in a copy of the repository: every command and Python block, in their order."""
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from robot.models import load_module
from tools import options

README = (ROOT / "README.md").read_text()
# What makes a command small enough for a test; nothing else about it is changed.
SMALL = {"train.py": "--steps 2 --warmup 0 --batch_size 4 --demos 8 --episodes 2 --eval_every 0 --device cpu",
         "sample.py": "--episodes 2 --device cpu", "tools.compare": "--episodes 2 --device cpu"}
# What a command must leave behind.
LEAVES = {"train.py": "report.html", "sample.py": "evaluation.html"}


def blocks():
    """[(language, text)] of README's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


def programs():
    """The arguments of python in README's order; a Python block is ["-c", text]."""
    for language, text in blocks():
        if language == "python":
            yield ["-c", text]
        for line in text.splitlines() if not language else ():
            for part in re.split(r"\s*&&\s*", line):
                words = shlex.split(part)
                assert words[0] in ("python", "pip", "pytest"), f"README: what is {part}?"
                if words[0] == "python":
                    yield words[1:]


def small(argv):
    name = argv[1] if argv[0] == "-m" else argv[0]
    return argv if "--explain" in argv else argv + SMALL.get(name, "").split()


def test_every_command_works_in_its_place(tmp_path):
    copy = tmp_path / "copy"
    leave = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "*.hdf5")
    shutil.copytree(ROOT, copy, ignore=leave)
    environment = os.environ | {"ACTION_DIFFUSION_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = 0
    for argv in programs():
        run = subprocess.run([sys.executable, *small(argv)], cwd=copy, env=environment, capture_output=True,
                             text=True, timeout=300)
        assert run.returncode == 0, f"python {shlex.join(argv)[:200]}: {run.stderr[-500:]}"
        if argv[0] in LEAVES and "--explain" not in argv:
            assert f"{LEAVES[argv[0]]}" in run.stdout.splitlines()[-1], argv
        done += 1
    assert done >= 8 and (copy / "out/dp_cnn/report.html").exists() and (copy / "my_robot.hdf5").exists()


def test_it_is_one_page():
    assert len(README.split()) <= 1500


def test_files_that_it_names_are_there():
    mentioned = set(re.findall(
        r"\b((?:(?:configs|docs|examples|tests)/)?\w[\w-]*\.(?:py|yaml|txt|md))\b", README))
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", README)
    links = {(a or b).partition("#")[0] for a, b in links if not (a or b).startswith("http")}
    absent = sorted(name for name in mentioned | links if not (ROOT / name).exists())
    assert mentioned and not absent, f"README.md names {absent}"


@pytest.mark.parametrize("line", re.findall(r"^\| `(python [^`]+)`", README, re.M))
def test_commands_of_the_table_are_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)                         # --config is a path of the repository
    words = shlex.split(line)[1:]
    place = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    assert (ROOT / place).exists()
    if place == "train.py":
        chosen, _ = options.parse_options(words[1:])
        module = load_module(chosen.model)
        assert chosen.preset in module.PRESETS
        assert not set(chosen.set) - {field.name for field in dataclasses.fields(module.Config)}
