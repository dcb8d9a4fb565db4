"""Training steps under torch.compile."""
import torch

import ddpm
from tools.compiling import compiled
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
