"""robot/normalizer.py against the official one."""
import numpy as np
import pytest
import torch
from golden_cases import golden

from robot.errors import UserError
from robot.normalizer import Normalizer


@golden("data.LinearNormalizer")
def test_normalizer_equals_the_official_one(case):
    for official, mode in (("limits", "minmax"), ("gaussian", "meanstd"), ("limits_no_offset", "maxabs")):
        normalizer = Normalizer.fit({"x": case.inp["data"].numpy()}, mode)
        case.check(f"out/{official}/scale", normalizer.scale["x"])
        offset = -normalizer.centre["x"] * normalizer.scale["x"]            # of y = x * scale + offset
        case.check(f"out/{official}/offset", offset)
        # x * scale + offset, as there, rounds at the size of the offset; (x - centre) * scale does not.
        rounding = 4 * 2**-24 * offset.abs().max().item()
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


def test_a_mode_for_every_number():
    x = np.random.default_rng(0).normal(size=(500, 4)) * [3, 2, 1, 5] + [0, 1, 7, 2]
    modes = ["minmax", "meanstd", "none", "quantile"]
    mixed = Normalizer.fit({"a": x, "b": (column for column in x.T)}, {"a": modes, "b": "maxabs"})
    for d, mode in enumerate(modes):
        alone = Normalizer.fit({"a": x}, mode)
        assert (mixed.scale["a"][d], mixed.centre["a"][d]) == (alone.scale["a"][d], alone.centre["a"][d])
    assert torch.equal(mixed.scale["b"], Normalizer.fit({"b": x}, "maxabs").scale["b"])
    assert (mixed.scale["a"][2], mixed.centre["a"][2]) == (1, 0)
    assert mixed.mode_of("a") == "minmax and meanstd and none and quantile" and mixed.mode_of("b") == "maxabs"
    assert torch.equal(mixed.stats["a"]["mean"], torch.from_numpy(x.mean(0)).float())
    nothing = Normalizer.of_units({"a": 4})
    assert torch.equal(nothing.normalize("a", torch.from_numpy(x)), torch.from_numpy(x).float())


def test_statistics_of_a_release():
    """As LeRobot (deviation + 1e-8, a range of 0 becomes 1e-8) and openpi (+ 1e-6) use them."""
    stats = {"mean": [1.0, 2], "std": [2.0, 0], "min": [0.0, 5], "max": [4.0, 5], "q01": [1.0, 5],
             "q99": [3.0, 5]}
    x = torch.tensor([[3.0, 5.0], [2.0, 5.0]])
    expected = {"meanstd": [[1, 3e6], [0.5, 3e6]], "minmax": [[0.5, -1], [0, -1]],
                "quantile": [[1, -1], [0, -1]], "none": x.tolist(), "maxabs": [[0.75, 1], [0.5, 1]]}
    for mode, want in expected.items():
        normalizer = Normalizer.from_stats(mode, {"x": stats}, eps=1e-6)
        y = normalizer.normalize("x", x)
        assert torch.allclose(y, torch.tensor(want, dtype=torch.float32), rtol=2e-6, atol=2e-6), mode
        assert torch.allclose(normalizer.unnormalize("x", y), x, rtol=1e-6)
    constant = Normalizer.from_stats({"x": ["none", "minmax"]}, {"x": stats}, eps={"y": 1.0})
    assert constant.normalize("x", x)[:, 1].tolist() == pytest.approx([-1, -1])     # the floor, as LeRobot's
    assert constant.stats["x"]["max"].tolist() == [4, 5]
    for mode, (low, high) in {"minmax": ("min", "max"), "quantile": ("q01", "q99")}.items():
        wide = Normalizer.from_stats(mode, {"x": {low: [1.0], high: [2.5]}}, eps=0.5)   # range 1.5 + 0.5
        assert wide.normalize("x", torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist() == [-1, 0, 1]
    few = Normalizer.from_stats("quantile", {"x": {"q01": [-1.0], "q99": [1.0]}})
    assert few.stats["x"]["min"].tolist() == [-1] and few.stats["x"]["mean"].tolist() == [0]


@pytest.mark.parametrize("mode, stats, words", [
    ("quantile", {"mean": [0.0], "std": [1.0]}, "statistics of 'x': mode quantile needs 'q01', there are"),
    ("meanstd", {"mean": [0.0, 1], "std": [1.0]}, "statistics of 'x': they need one length"),
    ("meanstd", {}, "they need one length, there are none"),
    ({"x": ["none", "none"]}, {"mean": [0.0] * 3, "std": [1.0] * 3}, "'x' are for 3 numbers, there are 2"),
    ("mean_std", {"mean": [0.0], "std": [1.0]}, "no normaliser 'mean_std', did you mean 'meanstd'")])
def test_statistics_that_lack_something(mode, stats, words):
    with pytest.raises(UserError, match=words):
        Normalizer.from_stats(mode, {"x": stats})
