"""openpi's norm_stats.json: statistics as its scripts/compute_norm_stats.py makes them.

A policy that openpi trained on a data set has seen the numbers that these statistics make of it. Its
quantiles come from a histogram, so that they are those of the data to within a bin or so;
robot/normalizer.py takes them from the data themselves.
"""
import numpy as np

BINS = 5000


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
