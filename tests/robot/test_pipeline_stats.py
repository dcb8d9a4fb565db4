"""The statistics of what Processing makes of openpi's raw samples are those in its norm_stats.json."""
import json

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN_DIR

from robot.normalizer import Normalizer
from robot.processing import Processing

BINS = 5000                                     # of openpi's histogram
FOLDERS = sorted(path.parent for path in (GOLDEN_DIR / "pipelines").glob("openpi_*/case.npz"))
NONE = [pytest.param(None, marks=pytest.mark.skip(reason="GOLDEN_DIR/pipelines has no openpi case"))]

SIGNS = {"at": [1, 2, 8, 9], "factor": -1}      # of the joints of ALOHA's two arms, as pi0 counts them
ALOHA = {"obs": {"state": [{"linear": SIGNS}, {"aloha_gripper": {"at": [6, 13]}}]},
         "actions": [{"linear": SIGNS},
                     {"linear": {"at": [6, 13], "factor": 2.1123, "offset": -0.6213 - 0.5476}}]}


def processing_of(meta, state_dim, action_dim):
    """What openpi's named config does before the normaliser."""
    transforms, spec = meta["config"]["input_transforms"], {}
    if "AlohaInputs" in transforms and not meta["config"]["config_name"].endswith("sim"):
        spec = dict(ALOHA)
    if "DeltaActions" in transforms:
        absolute = [d for d in range(action_dim) if d % 7 == 6]
        spec["actions"] = spec.get("actions", []) + [{"delta": {"to": "state", "except": absolute}}]
    return Processing(spec, {"state": state_dim})


def openpi_statistics(batches):
    """Arrays (..., D), one after the other -> {"mean", "std", "q01", "q99"}: (D,) float64. The deviation is
    that of a population (divided by N). src/openpi/shared/normalize.py RunningStats."""
    rows = [np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in batches]
    every = np.concatenate(rows)
    q01, q99 = histogram_quantiles(rows, (0.01, 0.99))
    return {"mean": every.mean(0), "std": every.std(0), "q01": q01, "q99": q99}


def histogram_quantiles(batches, shares):
    """Of rows (n, D) that come batch by batch: the left edge of the bin in which a share of all is reached,
    (D,) for each share. When a batch widens the range of any number, the bins of all are laid out anew, and
    what was counted moves with the left edge of its bin."""
    low, high = batches[0].min(0), batches[0].max(0)
    edges = np.linspace(low - 1e-10, high + 1e-10, BINS + 1, axis=1)        # (D, BINS + 1)
    counts = np.zeros((len(low), BINS))
    for x in batches:
        wider = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
        if not np.array_equal(wider, (low, high)):
            low, high = wider
            moved = np.linspace(low, high, BINS + 1, axis=1)
            counts = np.stack([np.histogram(old[:-1], new, weights=n)[0]
                               for old, new, n in zip(edges, moved, counts)])
            edges = moved
        counts += np.stack([np.histogram(column, bins)[0] for column, bins in zip(x.T, edges)])
    n = sum(len(x) for x in batches)
    at = [[np.searchsorted(row.cumsum(), share * n) for row in counts] for share in shares]
    return [edges[np.arange(len(low)), places] for places in at]


@pytest.mark.parametrize("folder", FOLDERS or NONE, ids=lambda folder: getattr(folder, "name", "none"))
def test_pipeline_statistics(folder):
    with np.load(folder / "case.npz", allow_pickle=False) as file:
        case = {key: file[key] for key in file.files}
    meta = json.loads(str(case["meta"]))
    state, actions = case["in/stats/state"], case["in/stats/actions"]       # (8, 16, D), (8, 16, 6, A)
    processing = processing_of(meta, state.shape[-1], actions.shape[-1])
    now = processing.state({"state": state})
    sent = processing.actions(actions, now)
    found = {"state": openpi_statistics(now.numpy()), "actions": openpi_statistics(sent.numpy())}
    path, = folder.glob("assets/**/norm_stats.json")
    official = json.loads(path.read_text())["norm_stats"]
    for key, x in (("state", now), ("actions", sent)):
        want = {name: np.array(official[key][name])[:x.shape[-1]] for name in found[key]}
        close(f"{key}: ", found[key], want, rms(x))

    # The training target of the same config, with these statistics, before it is padded; and back.
    mode = "quantile" if meta["config"]["use_quantile_norm"] else "meanstd"
    normalizer = Normalizer.from_stats(mode, found, eps=1e-6)
    want = {key: torch.from_numpy(case[f"out/train0/{key}"]) for key in ("state", "actions")}
    now = normalizer.unnormalize("state", want["state"][:state.shape[-1]])
    if "in/train0/state" in case:
        own = processing.state({"state": case["in/train0/state"]})
        close("train0 ", {"state": own}, {"state": now}, rms(now))
    raw = torch.from_numpy(case["in/train0/actions"])
    target = normalizer.normalize("actions", processing.actions(raw, now))
    assert want["actions"][:, target.shape[-1]:].abs().max() == 0
    close("train0 ", {"actions": target}, {"actions": want["actions"][:, :target.shape[-1]]}, rms(target))
    close("back ", {"actions": processing.undo_actions(normalizer.unnormalize("actions", target), now)},
          {"actions": raw}, 0.1 * rms(raw))                                 # 1e-6 there and back


def rms(x):
    return float(x.double().square().mean().sqrt())


def close(where, found, want, size):
    for name, x in found.items():
        error = abs(np.asarray(x) - np.asarray(want[name])).max()
        assert error <= 1e-5 * size, f"{where}{name} differs by {error:.2e}, allowed {1e-5 * size:.2e}"


def test_quantiles_of_a_histogram_follow_the_data_to_a_bin():
    """Where the first batch spans the whole range, the counts never move: exact to the width of a bin."""
    rng = np.random.default_rng(0)
    x = np.concatenate([[[-4.0, 0.0], [4.0, 9.0]], rng.normal(size=(5000, 2)) * [1, 0.1] + [0, 5]])
    q01, q99 = histogram_quantiles([x[:100], x[100:]], (0.01, 0.99))
    for d, span in enumerate((8, 9)):
        for found, share in ((q01[d], 0.01), (q99[d], 0.99)):
            assert abs(found - np.quantile(x[:, d], share)) < 3 * span / BINS
    stats = openpi_statistics([x[:100], x[100:]])
    assert np.allclose(stats["mean"], x.mean(0)) and np.allclose(stats["std"], x.std(0))
