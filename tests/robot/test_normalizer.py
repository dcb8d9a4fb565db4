"""robot/normalizer.py against the official one."""
import numpy as np
import pytest
import torch
from golden_cases import golden

from robot.normalizer import Normalizer


@golden("data.LinearNormalizer")
def test_normalizer_equals_the_official_one(case):
    for official, mode in (("limits", "minmax"), ("gaussian", "meanstd"), ("limits_no_offset", "maxabs")):
        normalizer = Normalizer.fit({"x": case.inp["data"].numpy()}, mode)
        case.check(f"out/{official}/scale", normalizer.scale["x"])
        case.check(f"out/{official}/offset", normalizer.offset("x"))
        # x * scale + offset, as there, rounds at the size of the offset; (x - centre) * scale does not.
        rounding = 4 * 2**-24 * normalizer.offset("x").abs().max().item()
        limit = max(rounding, case.tolerance(f"out/{official}/normalised"))
        case.check(f"out/{official}/normalised", normalizer.normalize("x", case.inp["data"]), atol=limit)
        case.check(f"out/{official}/back", normalizer.unnormalize("x", case.inp["query"]))
        for stat in ("min", "max", "mean", "std"):
            case.check(f"out/stats/{stat}", normalizer.stats["x"][stat])


SCALING = Normalizer.MODES[:-1]                 # all but "none"


@pytest.mark.parametrize("mode", SCALING)
def test_normalizer_ranges_round_trip_and_checkpoint(mode, tmp_path):
    x = np.random.default_rng(0).normal(size=(1000, 3)) * [1, 50, 1e-6] + [0, 200, 7]
    normalizer = Normalizer.fit({"x": x}, mode)
    y = normalizer.normalize("x", torch.tensor(x, dtype=torch.float32))
    if mode == "meanstd":
        assert y[:, :2].mean(0).abs().max() < 1e-4 and (y[:, :2].std(0) - 1).abs().max() < 1e-3
    elif mode == "maxabs":
        assert torch.allclose(y.abs().amax(0), torch.ones(3))
    else:
        inside = (y[:, :2].abs() <= 1 + 1e-5).float().mean(0)
        assert (inside == 1).all() if mode == "minmax" else ((inside - 0.98).abs() < 0.002).all()
        # a range of about 1e-5 is shifted to start at 0, not blown up to [-1, 1]
        assert y[:, 2].abs().max() < 1e-4 and normalizer.near_constant == {"x": [2]}
        assert "near-constant dimensions 2 " in normalizer.summary()
    assert torch.allclose(normalizer.unnormalize("x", y)[:, :2], torch.tensor(x[:, :2]).float(), atol=1e-3)

    first = normalizer.state()                  # the first checkpoints had an offset, y = x * scale + offset
    first["offset"] = {key: (-c * first["scale"][key]).float() for key, c in first.pop("centre").items()}
    back = normalizer.unnormalize("x", y)
    assert torch.allclose(Normalizer.from_state(first).normalize("x", back), y, atol=1e-3)
    assert "offset" in first                    # the checkpoint's dict stays what it was
    torch.save(normalizer.state(), tmp_path / "n.pt")
    again = Normalizer.from_state(torch.load(tmp_path / "n.pt", weights_only=True))
    assert torch.equal(again.normalize("x", y), normalizer.normalize("x", y)) and again.mode == mode
    assert again.summary() == normalizer.summary()


@pytest.mark.parametrize("mode", SCALING)
def test_large_values_keep_their_precision(mode):
    """Coordinates of millions of metres that range over 32: float32 keeps half metres of them, and no more is
    lost."""
    x = np.float32(4_649_776) + np.arange(0, 32.5, 0.5, dtype=np.float32)[:, None]
    normalizer = Normalizer.fit({"x": x}, mode)
    y = normalizer.normalize("x", torch.from_numpy(x))
    assert y.dtype == torch.float32 and torch.equal(normalizer.unnormalize("x", y), torch.from_numpy(x))
    if mode == "minmax":
        assert (y[0], y[32], y[-1]) == (-1, 0, 1)
    if mode != "maxabs":                        # there zero stays zero, and 32 of millions are little
        assert torch.allclose(y.diff(dim=0), y.diff(dim=0).mean().expand(64, 1), rtol=1e-5)


def test_old_checkpoints_mean_what_they_meant():
    old = {"mode": "minmax", "scale": {"x": torch.tensor([0.5, 4.0])},
           "offset": {"x": torch.tensor([1.0, -2.0])}, "stats": {}, "near_constant": {}}
    normalizer = Normalizer.from_state(old)
    assert normalizer.normalize("x", torch.tensor([[2.0, 1.0]])).tolist() == [[2, 2]]
    assert normalizer.unnormalize("x", torch.tensor([[2.0, 2.0]])).tolist() == [[2, 1]]
    assert normalizer.offset("x").tolist() == [1, -2]
