"""Training steps under torch.compile, and in memory that is kept."""
import ctypes
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import ddpm
from tools.speed import compiled
from train import LossStep


def test_tables_are_constants_of_the_compiled_step(monkeypatch):
    torch.manual_seed(0)
    model = ddpm.Model(ddpm.Config(data_shape=(2,), **ddpm.PRESETS["tiny"] | {"width": 16, "depth": 1}))
    batch, graphs, compile = {"x": torch.randn(8, 2)}, [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step: compile(step, backend=backend))
    step = compiled(LossStep(model))
    torch.manual_seed(1)
    loss = step(batch)["loss"]
    torch.manual_seed(1)
    assert torch.allclose(loss, model.loss(batch)["loss"])
    called = {getattr(node.target, "__name__", node.target) for graph in graphs for node in graph.graph.nodes}
    assert "linear" in called and not {"cumprod", "linspace"} & called


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
                    reason="needs glibc")
def test_freed_memory_is_kept():
    """Pages that a process gets anew are counted by the system as faults."""
    code = ("import resource, sys, torch; from tools.speed import keep_memory\n"
            "keep_memory() if sys.argv[1] == 'kept' else None\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for i in range(9):\n"
            "    before = faults()\n"
            "    x, y = (torch.ones(2**22) for _ in range(2))\n"         # 16 MiB each
            "    del x, y\n"
            "print(faults() - before)")
    found = {}
    for way in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, timeout=120,
                              cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found[way] = int(done.stdout)
    if found["given back"] < 1000:
        pytest.skip(f"pages are large here: {found['given back']} faults for 32 MiB")
    assert found["kept"] < 100
