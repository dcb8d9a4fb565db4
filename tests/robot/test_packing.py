"""robot/packing.py: layers computed by oneDNN give the numbers of torch's own."""
import copy
import io

import pytest
import torch
import torch.nn as nn
from helpers import recorder
from test_all_models import FIRST, POLICIES, make_batch, make_draws, make_model, make_noise, observed

import dp_cnn
from robot import packing
from robot.packing import MOST_ROWS, PACKED, pack
from robot.policy import Policy
from robot.realtime import guidance

CONVS = [(1, {}), (5, {"padding": 2}), (3, {"stride": 2, "padding": 1}), (4, {"stride": 3, "padding": 1}),
         (2, {}), (5, {"padding": 2, "bias": False})]
OTHERS = [(3, {"groups": 2}), (3, {"dilation": 2}), (3, {"padding": 1, "padding_mode": "circular"}),
          (3, {"padding": "same"})]


def twins(layer):
    """A layer and its packed copy, with weights that are not trained."""
    layer.requires_grad_(False)
    return layer, pack(copy.deepcopy(layer))


def differ(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("rows", [1, 7, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rows, bias):
    torch.manual_seed(0)
    plain, fast = twins(nn.Linear(131, 257, bias=bias))
    x = torch.randn(rows, 131)
    with torch.no_grad():
        assert differ(fast(x), plain(x)) < 1e-5
        assert differ(fast(x[None, :, ::1].expand(1, -1, -1)), plain(x)[None]) < 1e-5
        assert fast(x[0]).shape == (257,)
    assert fast in PACKED                                           # x[0] is one row
    with torch.no_grad():
        only_many = twins(nn.Linear(131, 257))[1]
        only_many(torch.randn(MOST_ROWS + 1, 131))
    assert only_many not in PACKED                                  # many rows need no second copy


@pytest.mark.parametrize("B, T", [(1, 4), (1, 9), (2, 16), (3, 100)])
@pytest.mark.parametrize("k, more", CONVS)
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.ConvTranspose1d])
def test_convolutions(cls, k, more, B, T):
    torch.manual_seed(0)
    plain, fast = twins(cls(70, 66, k, **more))
    x = torch.randn(B, T, 70).transpose(1, 2) if B == 2 else torch.randn(B, 70, T)
    with torch.no_grad():
        want, got = plain(x), fast(x)
    assert got.shape == want.shape and differ(got, want) < 1e-5
    steps = T if cls is nn.ConvTranspose1d else want.shape[2]
    assert (fast in PACKED) == (B * steps <= MOST_ROWS and plain.weight.numel() >= packing.LEAST)


@pytest.mark.parametrize("k, more", OTHERS)
def test_other_convolutions_stay_torchs_own(k, more):
    plain, fast = twins(nn.Conv1d(64, 64, k, **more))
    assert type(fast) is nn.Conv1d
    x = torch.randn(1, 64, 8)
    assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("T", [4, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype, T, monkeypatch):
    """Of a linear layer, a convolution that shortens, one that keeps the length, and a transposed one."""
    torch.manual_seed(0)
    monkeypatch.setattr(packing, "LEAST", 1)
    layers = [nn.Linear(T, T), nn.Conv1d(24, 40, 3, stride=2, padding=1), nn.Conv1d(40, 24, 5, padding=2),
              nn.ConvTranspose1d(24, 8, 4, stride=2, padding=1)]
    plain = nn.Sequential(*layers)
    fast = pack(copy.deepcopy(plain))
    assert [type(layer) for layer in fast] == [packing.Linear, packing.Conv1d, packing.Conv1d,
                                               packing.ConvTranspose1d]
    x, g = torch.randn(3, 24, T), torch.randn(3, 8, T)
    found = []
    for net, enabled in ((plain, False), (fast, dtype == torch.bfloat16)):
        start = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = net(start)
        y.backward(g.to(y.dtype))
        found.append([y, start.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found):
        # Against float32: bfloat16 has 8 bits, and errors of four layers add up.
        assert differ(b.float(), a) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_sum(dtype):
    """What arrives is expanded: one number in memory."""
    torch.manual_seed(0)
    for B, T, k in ((3, 8, 5), (3, 8, 1), (3, 1, 1)):
        plain = nn.Conv1d(128, 128, k, padding=k // 2)
        fast, x = pack(copy.deepcopy(plain)), torch.randn(1, 128, T).expand(B, -1, -1)
        for layer in (plain, fast):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer(x)
            ours = layer is fast and dtype in packing.types()
            assert (type(y.grad_fn).__name__ == "ConvolutionBackward") == ours
            y.sum().backward()
        assert differ(fast.weight.grad, plain.weight.grad) < (1e-5 if dtype == torch.float32 else 0.05)


def test_which_convolutions_have_a_product_as_gradient():
    layer = pack(nn.Conv1d(64, 64, 5, padding=2))
    its = lambda x: type(layer(x).grad_fn).__name__ == "ConvolutionBackward"     # torch's end in 0
    assert its(torch.randn(2, 64, packing.SHORT)) and not its(torch.randn(2, 64, packing.SHORT + 1))
    assert not its(torch.randn(64, 8))                              # a single sequence
    for dtype, yes in ((torch.bfloat16, torch.bfloat16 in packing.types()), (torch.float16, False)):
        with torch.autocast("cpu", dtype):
            assert its(torch.randn(2, 64, 8)) == yes
    x = torch.randn(2, 64, 8)
    value, pulled = torch.func.vjp(layer, x)                        # of a function of x: torch's own
    assert torch.allclose(pulled(value)[0], torch.autograd.functional.vjp(layer, x, value)[1], atol=1e-5)
    layer.weight.requires_grad_(False)
    assert not its(x)                                               # it is not asked for


def test_changed_weights_are_packed_anew():
    x = torch.randn(2, 256)

    def check(layer):
        with torch.no_grad():
            want = nn.functional.linear(x.to(layer.weight), layer.weight, layer.bias)
            assert differ(layer(x.to(layer.weight)).float(), want.float()) < 1e-2

    layer = twins(nn.Linear(256, 256))[1]
    check(layer)
    torch._foreach_lerp_(list(layer.parameters()), [torch.randn_like(p) for p in layer.parameters()], 0.5)
    check(layer)                                                    # as train.py averages
    layer.load_state_dict({key: torch.randn_like(value) for key, value in layer.state_dict().items()})
    check(layer)
    layer.weight.data = torch.randn(256, 256)
    check(layer)
    check(layer.to(torch.bfloat16))
    check(copy.deepcopy(layer))
    layer.requires_grad_(True).float()
    check(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0, fused=True)
    layer(x).sum().backward()
    optimizer.step()                                                # raises no version
    check(layer)


def test_what_is_saved_is_what_was_there():
    plain, fast = twins(nn.Sequential(nn.Linear(256, 256), nn.Conv1d(1, 64, 5)))
    with torch.no_grad():
        fast(torch.randn(1, 1, 256))
    assert fast[0] in PACKED
    written = [io.BytesIO(), io.BytesIO()]
    for model, file in zip((plain, fast), written):
        torch.save(model.state_dict(), file)
    assert written[0].getvalue() == written[1].getvalue()


def test_packed_weights_are_forgotten_with_their_layer():
    before = len(PACKED)
    fast = twins(nn.Linear(256, 256))[1]
    with torch.no_grad():
        fast(torch.randn(1, 256))
    assert len(PACKED) == before + 1
    del fast
    assert len(PACKED) == before


def test_without_the_operators_nothing_changes(monkeypatch):
    class Without:
        pass
    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    assert type(pack(nn.Linear(256, 256))) is nn.Linear


def test_types_that_onednn_lacks_are_left_to_torch(monkeypatch):
    plain, fast = twins(nn.Linear(256, 256).double())
    x = torch.randn(2, 256, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))
    monkeypatch.setattr(packing, "types", lambda: (torch.float32,))  # a machine without bfloat16
    plain, fast = twins(nn.Linear(256, 256).bfloat16())
    with torch.no_grad():
        assert torch.equal(fast(x.bfloat16()), plain(x.bfloat16()))
    assert fast not in PACKED


@pytest.mark.parametrize("case", FIRST.values())
def test_every_model_samples_and_learns_the_same(case, monkeypatch):
    monkeypatch.setattr(packing, "LEAST", 1)                        # these models are small
    plain = make_model(case).eval()
    fast = pack(copy.deepcopy(plain))
    batch = make_batch(plain.config, 3)
    losses, gradients = [], []
    for model in (plain, fast):
        torch.manual_seed(1)
        loss = model.loss(batch, **make_draws(plain.config, 3))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.requires_grad_(False)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert differ(*gradients) < 1e-4
    noise = make_noise(plain.config, 3)
    chunks = [model.sample(observed(batch), **noise) for model in (fast, plain)]
    assert sum(layer in PACKED for layer in fast.modules()) > 3
    assert differ(*chunks) < 1e-5 * (100 if "ancestral" in case or "flow" in case else 10)


@pytest.mark.parametrize("case", [FIRST[name] for name in POLICIES])
def test_real_time_chunking_has_its_gradients(case, monkeypatch):
    """They pass through layers whose weights are packed."""
    monkeypatch.setattr(packing, "LEAST", 1)
    plain = make_model(case).eval().requires_grad_(False)
    fast = pack(copy.deepcopy(plain))
    config = plain.config
    batch, noise = observed(make_batch(config, 2)), make_noise(config, 2)
    free = fast.sample(batch, **noise)
    guide = guidance(torch.zeros(2, config.pred_horizon, 2), torch.ones(config.pred_horizon), range(2))
    chunks = [model.sample(batch, **noise, guide=guide) for model in (fast, plain)]
    assert differ(*chunks) < 1e-4 < differ(free, chunks[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_convolutions_in_training_are_torchs_own(autocast):
    """Forward, where products take longer: their weights would be reordered in every step, and back."""
    counts = []
    for model in (make_model("dp_cnn-lowdim"), pack(make_model("dp_cnn-lowdim"))):
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.loss(make_batch(model.config, 32))["loss"].backward()
        counts.append(sum(e.count for e in profile.key_averages() if e.key == "aten::convolution"))
    assert counts[0] == counts[1] > 5


def test_gradients_of_one_row_that_stands_for_all():
    layer, plain = pack(nn.Sequential(nn.Linear(8, 4)))[0], nn.Linear(8, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8).expand(5, 8)
    for its in (layer, plain):
        its(x).sum().backward()
    assert torch.allclose(layer.weight.grad, plain.weight.grad, atol=1e-6)
    assert torch.allclose(layer.bias.grad, plain.bias.grad)


def test_a_policy_packs_its_model():
    policy = recorder()
    model = dp_cnn.Model(dp_cnn.Config(action_dim=2, state_dim=3)).eval().requires_grad_(False)
    Policy(model, policy.normalizer, policy.description)
    assert type(model.unet.final_conv) is packing.Conv1d
