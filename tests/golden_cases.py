"""Reads the golden cases: what the official implementations computed with random weights.

A case is one .npz in GOLDEN_DIR (default: tests/golden). Its `meta` names the official class (`family`), the
constructor arguments (`config`) and, for every array, how far float32 lies from a float64 run of the same
code.
"""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


class Case:
    """One case: `sd` (official state_dict), `inp`, `out`, `grad`, `grad_in`: dicts of tensors; `meta`,
    `config`."""

    def __init__(self, path):
        self.name = Path(path).stem
        with np.load(path, allow_pickle=False) as z:
            self.meta = json.loads(str(z["meta"]))
            arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "meta"}
        self.config = self.meta["config"]
        part = lambda p: {k[len(p):]: v for k, v in arrays.items() if k.startswith(p)}
        self.sd, self.inp, self.out = part("sd/"), part("in/"), part("out/")
        self.grad, self.grad_in = part("grad/"), part("grad_in/")
        if self.config.get("weights_by_rule"):
            self.sd = {k: rule_weight(self.meta["weight_rule"], k) for k in self.meta["weight_rule"]["keys"]}

    def tolerance(self, key):
        """Largest allowed difference: ten times the float32 error of the official code itself."""
        reference = self._reference(key)
        deviation = self.meta.get("float64_deviation", {}).get(key, [0.0, 0.0])[0]
        rms = reference.double().square().mean().sqrt().item() if reference.numel() else 0.0
        return max(10 * deviation, 2e-5 * rms, 1e-6)

    def check(self, key, got, atol=None):
        """Assert that `got` equals the array `key` ("out/loss", "grad/...", "grad_in/...") within its
        tolerance."""
        want = self._reference(key)
        assert got.shape == want.shape, f"{self.name} {key}: {tuple(got.shape)}, official {tuple(want.shape)}"
        error = (got.detach().double() - want.double()).abs().max().item() if want.numel() else 0.0
        limit = self.tolerance(key) if atol is None else atol
        assert error <= limit, f"{self.name} {key}: differs by {error:.2e}, allowed {limit:.2e}"

    def _reference(self, key):
        part, name = key.split("/", 1)
        return {"out": self.out, "grad": self.grad, "grad_in": self.grad_in}[part][name]


def rule_weight(rule, key):
    """A weight too large to store, made from its key: seed + crc32(key) -> normal draws (golden README)."""
    shape, mean, std = rule["keys"][key]
    z = np.random.RandomState((rule["seed"] + zlib.crc32(key.encode())) % 2**32).standard_normal(shape)
    return torch.from_numpy(np.asarray(np.float32(mean) + np.float32(std) * z.astype(np.float32)))


def golden(*families):
    """Parametrise a test over all cases of these families: `@golden("dp_cnn.ConditionalUnet1D")` gives
    `case`."""
    paths = []
    for path in sorted(GOLDEN_DIR.glob("*.npz")):
        with np.load(path, allow_pickle=False) as z:
            if json.loads(str(z["meta"]))["family"] in families:
                paths.append(path)
    if not paths:
        reason = f"no golden case of {', '.join(families)} in {GOLDEN_DIR}"
        return pytest.mark.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("case", paths, ids=[p.stem for p in paths], indirect=True)


def manifest(name):
    """{official key: shape} of a published size, from GOLDEN_DIR/manifests; skips when it is not there."""
    import gzip
    path = GOLDEN_DIR / "manifests" / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt") as f:
        content = json.load(f)
    return {k: tuple(v[0]) for k, v in content["keys"].items()}, content["n_parameters"]
