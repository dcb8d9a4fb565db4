"""tools/memory.py: what is computed for a step on N GPUs. That it is what a step takes is measured in
test_several_processes.py."""
import pytest
import torch

import test_all_models as small
from tools import distributed, memory


@pytest.mark.parametrize("case", [*small.FIRST.values(), "rdt-packed", "rdt-embeddings"])
def test_every_model_has_a_table(case):
    """Weights are counted, divided, and activations grow with the batch and not with the GPUs."""
    module, config = small.load(case.split("-")[0]), small.make_config(case)
    of = lambda batch, gpus: memory.per_gpu(module, config, batch, gpus, torch.float32)
    alone, several, twice = of(8, 1), of(8, 4), of(16, 4)
    model = module.Model(config)
    n, *blocks = (sum(p.numel() for p in part.parameters()) for part in (model, *distributed.blocks(model)))
    assert alone["weights"] == 4 * n and several["weights"] == several["average"] == n
    assert several["AdamW"] == 2 * several["gradients"] == alone["AdamW"] / 4
    assert alone["gathered"] == 0
    assert several["gathered"] == 4 * (n - sum(blocks) + 2 * max(blocks))
    assert alone["activations"] == several["activations"]
    assert 1.5 < twice["activations"] / several["activations"] < 2.2


def test_attention_is_counted_as_fused():
    """Its matrix, 64 MB here, is not held; its output and a number per query are, beside the inputs."""
    q, k, v = torch.empty(3, 1, 1, 4000, 8, device="meta", requires_grad=True).unbind()
    with memory.Held() as held, memory.fused_attention():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert held.most == 4 * 4000 * (8 + 1) and out.shape == q.shape


def test_what_is_freed_is_not_counted():
    with memory.Held() as held:
        for _ in range(3):
            x = torch.empty(1000, device="meta")
            y = x.view(10, 100).t()                     # no bytes of its own
            del x, y
        z = torch.empty(500, device="meta")
    assert held.most == 4000 and held.now == 2000 and z.shape == (500,)


def test_the_table(capsys):
    module, config = small.load("ddpm"), small.make_config("ddpm-points")
    lines = memory.table(module, config, 4, processes=(1, 2)).splitlines()
    assert lines[0] == "| GPUs | weights | AdamW | average | gathered | gradients | activations | at a time |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 2"] and len(lines) == 4
