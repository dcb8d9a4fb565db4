"""tools/distributed.py: what torchrun leaves in the environment, and what others do. Several processes are in
test_train.py."""
import pytest
import torch

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
