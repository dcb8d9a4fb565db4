"""Paths, and what many tests start from: a small set of demonstrations and runs on it."""
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("helpers", "golden_cases", "pipeline_cases")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch starts its threads


@pytest.fixture(scope="session", autouse=True)
def first_backward():
    """On torch 2.14.1, no process that is forked (test_fuzz.py) can train if the parent's first backward pass
    came after torch.compile. So it comes before any test."""
    import torch
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def case(request):
    from golden_cases import Case
    return Case(request.param) if request.param is not None else None


@pytest.fixture(scope="session")
def demos(tmp_path_factory):
    from helpers import write_demos
    return write_demos(tmp_path_factory.mktemp("demos") / "tiny.hdf5")


@pytest.fixture(scope="session")
def tiny(demos, tmp_path_factory):
    """Folder of a run of four steps on the tiny set."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    import train
    from helpers import command
    train.main(command(demos, folder, steps=4, eval_every=0))
    return folder


@pytest.fixture(scope="session")
def solved(tmp_path_factory):
    """Folder of a run that has learned most of the built-in task: a quarter of a minute on one core."""
    import train
    folder = tmp_path_factory.mktemp("runs") / "solved"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        train.main(["--model", "dp_cnn", "--out", str(folder), "--demos", "300", "--steps", "600",
                    "--batch_size", "64", "--lr", "2e-3", "--warmup", "20", "--ema_max", "0.98",
                    "--eval_every", "0", "--episodes", "20", "--device", "cpu", "--set", "prediction_type=x0",
                    "--set", "down_dims=[32, 64]", "--set", "step_embed_dim=32"])
    return folder


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """The training loop takes over the signals; generated sets belong into a folder of the test."""
    monkeypatch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path / "cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def whole(demos, tmp_path_factory):
    """{grad_accum: folder of a run that nothing interrupted}."""
    import train
    from helpers import command
    folders = {n: tmp_path_factory.mktemp("whole") / str(n) for n in (1, 2)}
    for n, folder in folders.items():
        train.main(command(demos, folder, grad_accum=n))
    return folders
