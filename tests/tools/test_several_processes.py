"""Two processes over gloo give what one gives with the joint batch; and with --fsdp no more than one block's
weights are whole at a time."""
import os
import socket
import subprocess
import sys

import pytest
import torch

import joint_losses
import test_all_models as small
import train
from helpers import ROOT
from tools import distributed, memory

pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                                reason="FSDP2 of this torch needs a GPU")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "found.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    # The test's own process is none of them: after a failed start, as another test makes one, torch counts
    # its groups otherwise than a new process does, and the two would wait for each other.
    command = [sys.executable, ROOT / "tests" / "joint_losses.py", out]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                             env=os.environ | environ | {"RANK": rank}) for rank in "01"]
    try:
        for process in both:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("case", joint_losses.CASES)
def test_two_processes_have_the_losses_of_one(case, found):
    alone, ddp, fsdp = (found[case][way] for way in ("alone", "ddp", "fsdp"))
    assert alone["losses"][0] > 1.05 * alone["losses"][1]           # it learns, so that a step counts
    for several in (ddp, fsdp):
        assert several["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        # Adam divides by the gradient's size: where that is next to nothing, rounding decides.
        for key, x in alone["average"].items():
            assert (several["average"][key] - x).abs().max() < 4e-3, key
    assert any((x - y).abs().max() > 8e-3 for x, y in zip(
        alone["average"].values(), small.make_model(case).parameters()))


@pytest.mark.parametrize("case", joint_losses.CASES)
def test_no_more_than_a_block_is_gathered(case, found):
    """Beside what belongs to no block: embeddings, first and last layers."""
    model = small.make_model(case)
    sizes = [sum(p.numel() for p in block.parameters()) for block in distributed.blocks(model)]
    whole = sum(p.numel() for p in model.parameters())
    assert found[case]["fsdp"]["most"] == 4 * (whole - sum(sizes) + max(sizes))
    assert len([size for size in sizes if size]) >= 2


def test_in_bfloat16_blocks_are_gathered_in_bfloat16(found):
    """But those with layer norms of torch's. The rest is whole in float32, as it is without --fsdp. The
    losses are those of autocast."""
    alone, fsdp = (found["bfloat16"][way] for way in ("alone", "fsdp"))
    model = small.make_model(joint_losses.LOW, **joint_losses.WIDER)
    sizes = {}
    for block in distributed.blocks(model):
        sizes.setdefault(type(block).__name__, []).append(sum(p.numel() for p in block.parameters()))
    rest = sum(p.numel() for p in model.parameters()) - sum(map(sum, sizes.values()))
    assert 2 * max(sizes["GemmaLayer"]) > 4 * max(sizes["SiglipLayer"])     # the latter are in float32
    assert fsdp["most"] == 4 * rest + 2 * max(sizes["GemmaLayer"])
    assert fsdp["losses"] == pytest.approx(alone["losses"], rel=1e-2)
    assert alone["losses"][2] < 0.95 * alone["losses"][0]


@pytest.mark.parametrize("processes", [1, 2])
def test_computed_memory_is_what_is_measured(processes, found):
    changes, batch_size = joint_losses.MIDDLE
    module, config = small.load("dp_transformer"), small.make_config("dp_transformer-lowdim", **changes)
    computed = memory.per_gpu(module, config, batch_size, processes, torch.float32)
    assert computed["at a time"] == pytest.approx(found["bytes"][processes], rel=0.1)
    # No part is too small to be noticed; what is gathered is looked at in test_memory.py.
    parts = [computed[part] for part in ("weights", "gradients", "AdamW", "average", "activations")]
    assert min(parts) > 0.08 * computed["at a time"]


# The released sizes; a sixth of pi0 is the embedding of 257,152 words.
@pytest.mark.parametrize("name, preset, share", [("pi0", "pi0", 0.21), ("rdt", "1B", 0.1),
                                                 ("dit", "XL/2", 0.15), ("dp_cnn", "image", 0.5)])
def test_blocks_of_released_sizes_are_small_pieces(name, preset, share):
    module = small.load(name)
    config = module.Config(**module.PRESETS[preset])
    with torch.device("meta"):
        step = train.LossStep(module.Model(config))
    sizes = [sum(p.numel() for p in block.parameters()) for block in distributed.blocks(step)]
    whole = sum(p.numel() for p in step.parameters())
    assert (whole - sum(sizes) + max(sizes)) / whole < share


def test_ways_into_a_block_are_found():
    """The methods of a block that forward does not call itself; of its parts only those that have such."""
    ways = {}
    for case in joint_losses.CASES:
        for part in distributed.groups(small.make_model(case)):
            ways[type(part).__name__] = distributed.ways_in(part)
    assert {name: found for name, found in ways.items() if found} == {
        "ResidualBlock1d": ["film_of_obs", "film_of_step"], "CrossAttention": ["memory"],
        "AdaLNZeroBlock": ["prepare"], "DiTBlock": ["prepare"], "NormedCrossAttention": ["keys_values"]}
    assert ways["ImageEncoder"] == ways["GemmaLayer"] == ways["Linear"] == []
