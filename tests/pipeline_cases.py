"""Reads the golden pipelines: what official programs computed from raw observations to raw actions.

A case is a folder of GOLDEN_DIR/pipelines, its arrays in an .npz: in/..., out/... and `meta`, a JSON text.
"""
import json

import numpy as np
import pytest

from golden_cases import GOLDEN_DIR


class Pipeline:
    """folder; inp, out: {name: array}; meta; config: of the official program."""

    def __init__(self, folder):
        self.folder, self.name = folder, folder.name
        path, = folder.glob("*.npz")
        with np.load(path, allow_pickle=False) as arrays:
            self.meta = json.loads(str(arrays["meta"]))
            self.inp, self.out = ({key[len(part):]: arrays[key] for key in arrays.files
                                   if key.startswith(part)} for part in ("in/", "out/"))
        self.config = self.meta["config"]
        self.unchecked = set(self.out)

    def check(self, key, got, relative=0.0):
        """Assert that `got` equals the array out/<key> within `relative` of its rms, or within ten times
        the error of float32 in the official program."""
        want, got = self.out[key], np.asarray(got)
        assert got.shape == want.shape, f"{self.name} {key}: {got.shape}, official {want.shape}"
        self.unchecked.discard(key)
        if want.dtype.kind in "bU" or not relative:
            assert np.array_equal(got, want), f"{self.name} {key}: {(got != want).sum()} differ"
            return
        error = np.abs(got.astype(np.float64) - want).max()
        rms = np.sqrt(np.square(want, dtype=np.float64).mean())
        official = self.meta.get("float64_deviation", {}).get(f"out/{key}", [0.0])[0]
        limit = max(relative * rms, 10 * official)
        assert error <= limit, f"{self.name} {key}: differs by {error / rms:.1e} of rms"


def pipelines(*prefixes):
    """Parametrise a test over the folders whose names begin so: `@pipelines("openpi_")` gives `folder`."""
    folders = sorted(path for path in (GOLDEN_DIR / "pipelines").glob("*") if path.name.startswith(prefixes))
    if not folders:
        reason = f"no pipeline {' or '.join(prefixes)}... in {GOLDEN_DIR}/pipelines"
        return pytest.mark.parametrize("folder", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("folder", folders, ids=[path.name for path in folders])


def replayed(model, noise, step_noise=None):
    """Let a model's r-th chunk start from noise[r]. -> list that receives what each got and gave: (batch,
    chunk)"""
    sample, calls = model.sample, []

    def with_noise(batch, **arguments):
        r = len(calls)
        more = {} if step_noise is None else {"step_noise": step_noise[r]}
        calls.append((batch, sample(batch, **arguments | {"noise": noise[r]} | more)))
        return calls[-1][1]

    model.sample = with_noise
    return calls
