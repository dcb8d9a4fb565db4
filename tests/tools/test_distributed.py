"""tools/distributed.py: what torchrun leaves in the environment, and what others do. Several processes are in
test_train.py."""
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from robot.errors import UserError
from tools import distributed


@pytest.mark.parametrize("environ, named", [
    ({"RANK": "x"}, "RANK=x"), ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5"), ({"RANK": "-1"}, "RANK=-1"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"), ({"RANK": "1"}, "RANK=1 of WORLD_SIZE=1"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "2 processes do not find each other.*torchrun")])
def test_an_environment_that_torchrun_did_not_make(environ, named, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.join(torch.device("cpu"), fsdp=False) == (0, 1)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=named):
        distributed.join(torch.device("cpu"), fsdp=False)


ENDING = """
import atexit
from robot.errors import UserError, run_command
from tools.distributed import whole_exit
atexit.register(print, "Python's own end")
def main():
    print("said", end="")
    if {refused}:
        raise UserError("refused")
with whole_exit():
    run_command(main)
"""


@pytest.mark.parametrize("refused, status", [(False, 0), (True, 2)])
def test_one_process_of_several_ends_at_once_with_its_output_and_status(refused, status):
    for world, said in ("1", "saidPython's own end\n"), ("2", "said"):
        done = subprocess.run([sys.executable, "-c", ENDING.format(refused=refused)], capture_output=True,
                              text=True, timeout=120, cwd=ROOT, env=os.environ | {"WORLD_SIZE": world})
        assert (done.returncode, done.stdout) == (status, said)
        assert done.stderr == ("-c: refused\n" if refused else "")
