"""A policy's sampler as one graph: its chunks are those of the plain sampler."""
import itertools
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import scaled

import dit_policy
import dp_cnn
import dp_transformer
import pi0
import pi05
import rdt
from robot.errors import UserError
from robot.policy import Policy

A, S, SIZE = 3, 3, (32, 32)
DESCRIPTION = {"state_keys": {"pose": S}, "camera_keys": ["front", "hand"], "image_size": list(SIZE),
               "state_dim": S, "action_dim": A, "fps": 10, "instructions": ["push the cube"]}


def sees(module, changes):
    return changes.get("obs", "lowdim" if module in (dp_cnn, dp_transformer) else "image") == "image"


def small_policy(module, device="cpu", **changes):
    torch.manual_seed(0)
    cameras = DESCRIPTION["camera_keys"][:2 * sees(module, changes)]
    config = module.Config(**module.PRESETS["tiny"] | {
        "action_dim": A, "state_dim": S, "n_cameras": len(cameras), "image_size": SIZE,
        "sampler_steps": 2} | changes)
    model = module.Model(config).to(device).eval().requires_grad_(False)
    for p in model.parameters():        # some begin with zeros, which would hide an error
        p.add_(torch.randn_like(p), alpha=0.05)
    return Policy(model, scaled(A, S), DESCRIPTION | {"camera_keys": cameras}, device=device)


def observation(t):
    rng = np.random.default_rng(t)
    return {"pose": rng.uniform(-2, 2, S), "instruction": "push the cube",
            **{camera: rng.integers(0, 256, (*SIZE, 3), np.uint8) for camera in DESCRIPTION["camera_keys"]}}


def acted(policy, steps=17):
    policy.reset()
    return np.stack([policy.act(observation(t)) for t in range(steps)])


def near(got, want, error):
    largest = np.abs(want).max()
    return largest > 0.01 and np.abs(got - want).max() < error * largest


@pytest.fixture
def faster(monkeypatch):
    """As if the graph always took half the time: `compile` measures it first."""
    times = itertools.cycle([1.0, 2.0])

    def least_ms(function):
        function()
        return next(times)
    monkeypatch.setattr("robot.policy.least_ms", least_ms)


@pytest.fixture
def traced(monkeypatch, faster):
    """torch.compile without a compiler: what it cannot make one graph of, it refuses all the same. -> the
    batch sizes of the graphs' runs"""
    torch._dynamo.reset()
    compile, runs = torch.compile, []

    def traced(function, **flags):
        inner = compile(function, backend="aot_eager", **flags)

        def run(batch, *more, **noise):
            runs.append(len(batch["state"]))
            return inner(batch, *more, **noise)
        return run
    monkeypatch.setattr(torch, "compile", traced)
    return runs


POLICIES = [(dp_cnn, {}), (dp_cnn, {"obs": "image", "resnet_widths": (16, 16)}),
            (dp_cnn, {"sampler": "ddpm", "conditioning": "inpaint", "schedule": "linear"}),
            (dp_transformer, {}), (dit_policy, {}), (rdt, {}), (pi0, {}), (pi05, {})]


@pytest.mark.parametrize("module, changes", POLICIES)
def test_chunks_of_the_graph_are_those_of_plain_sampling(traced, module, changes):
    plain, policy = small_policy(module, **changes), small_policy(module, **changes)
    policy.compile(guided=True)
    assert set(traced) == {1}
    del traced[:]
    assert near(acted(policy), acted(plain), 1e-5)
    assert len(traced) >= 2 and set(traced) == {1}
    # With a plan: the other graph. With a trace, or of several chunks: plainly.
    del traced[:]
    plan = plain.sample_chunk() + 0.5, np.linspace(1, 0, plain.chunk.shape[1], dtype=np.float32)
    policy.generator, other = (torch.Generator().manual_seed(5) for _ in range(2))
    plain.generator = other
    pulled = policy.sample_chunk(plan=plan)
    assert near(pulled, plain.sample_chunk(plan=plan), 1e-4) and traced == [1]
    assert policy.sample_chunk(copies=3).shape[0] == 3 and traced == [1]
    trace = []
    policy.sample_chunk(trace=trace)
    assert trace and traced == [1]


def test_several_robots_side_by_side_are_sampled_plainly(traced):
    plain, policy = small_policy(dp_cnn), small_policy(dp_cnn)
    policy.compile()
    two = {"pose": np.stack([observation(t)["pose"] for t in range(2)])}
    del traced[:]
    assert np.array_equal(plain.act(two), policy.act(two)) and not traced


def test_a_hidden_camera_is_sampled_plainly(traced):
    policy = small_policy(dit_policy)
    policy.compile()
    del traced[:]
    policy.processing.spec["cameras"] = {}              # the places are known by name
    seen = observation(0)
    del seen["hand"]
    policy.act(seen)
    assert not traced
    policy.reset()
    policy.act(observation(0))
    assert traced == [1]


def test_a_graph_that_is_slower_is_left(traced, monkeypatch, capsys):
    times = iter([30.0, 20.0])
    monkeypatch.setattr("robot.policy.least_ms", lambda function: next(times))
    policy = small_policy(dp_cnn)
    policy.compile()
    assert "takes 30.0 ms as one graph, 20.0 ms plainly" in capsys.readouterr().err
    del traced[:]
    policy.act(observation(0))
    assert not traced


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    def fails(function, **flags):
        def run(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nand much more")
        return run
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match="--compile: torch.compile cannot compile .*: no C.. compiler") as e:
        small_policy(dp_cnn).compile()
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not shutil.which("g++") or not Path(sysconfig.get_path("include"), "Python.h").exists(),
                    reason="torch.compile needs g++ and the headers of Python")
@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
def test_compiled_in_earnest(tmp_path, monkeypatch, faster):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    small = {"sampler_steps": 1, "depth": 1, "width": 32}
    plain, policy = (small_policy(dp_transformer, **small) for _ in range(2))
    policy.compile()
    want = acted(plain)
    assert near(acted(policy), want, 1e-4)
    for name, layer in policy.model.named_modules():    # their weights were packed: the graph has its own
        # (Cross-attention takes parts of its matrix, which are not packed.)
        if isinstance(layer, torch.nn.Linear) and "attn" not in name:
            layer.weight.zero_()
    assert near(acted(policy), want, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("module, changes", POLICIES)
def test_recorded_on_a_gpu(module, changes, faster):
    torch._dynamo.reset()
    plain, policy = (small_policy(module, device="cuda", **changes) for _ in range(2))
    policy.compile(guided=True)
    got = acted(policy)
    assert near(got, acted(plain), 1e-2) and np.array_equal(acted(policy), got)
