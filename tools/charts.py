"""Rows of metrics.jsonl -> the curves of the report, and as numbers what was logged only once."""
import math

MAX_POINTS = 800       # points per curve, each the mean of a group of rows

# title, {key in metrics.jsonl: name of its line}, options of the drawing
CURVES = [
    ("Training loss", {"loss": "loss"}, {"log": True, "smooth": True}),
    ("Validation loss", {"val_loss": "loss"}, {"log": True}),
    ("Success in closed loop", {"success": "success"}, {"percent": True}),
    ("Error of sampled actions", {"action_error": "error"}, {}),
    ("Gradient norm", {"grad_norm": "norm"}, {"log": True, "smooth": True}),
    ("Learning rate", {"lr": "rate"}, {}),
    ("Seconds per step", {"data_s": "data", "compute_s": "compute"}, {}),
    ("Samples per second", {"samples_per_s": "samples / s"}, {}),
]


def number(value):
    """JSON has no NaN: whatever is not a finite number becomes null. Five digits are enough to draw."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def mean(values):
    finite = [v for v in values if v is not None]
    return number(sum(finite) / len(finite)) if finite else None


def rows_with(metrics, key):
    """Rows that hold `key`, by step. A resumed run may repeat a step: the later row counts."""
    rows = {row["step"]: row for row in metrics if "step" in row and row.get(key) is not None}
    return [rows[step] for step in sorted(rows)]


def line(metrics, key, name, smooth=False):
    rows = rows_with(metrics, key)
    y = [number(row[key]) for row in rows]
    group = max(1, math.ceil(len(y) / MAX_POINTS))
    drawn = {"name": name, "bad": [row["step"] for row, value in zip(rows, y) if value is None],
             "x": [row["step"] for row in rows[::group]],
             "y": [mean(y[i:i + group]) for i in range(0, len(y), group)]}
    if smooth and len(y) > 40:
        reach = len(drawn["y"]) // 40
        drawn["mean"] = [mean(drawn["y"][max(0, i - reach):i + reach + 1]) for i in range(len(drawn["y"]))]
    if key == "success" and group == 1:
        drawn["interval"] = [[number(v) for v in row.get("interval") or ()] for row in rows]
    return drawn


def loss_by_t(metrics):
    """The loss in equal buckets of t: a line over the steps for each bucket, or, after a single evaluation,
    one line over t."""
    rows = rows_with(metrics, "loss_t")
    if not rows:
        return None
    n = len(rows[0]["loss_t"])
    if len(rows) == 1:
        values = rows[0]["loss_t"]
        by_t = {"name": "loss", "bad": [], "x": [(i + 0.5) / n for i in range(n)],
                "y": [number(value) for value in values]}
        title = f"Loss by t, at step {rows[0]['step']:,}"
        return {"title": title, "lines": [by_t], "log": True, "axis": "t"}
    lines = [line([{"step": row["step"], "loss": row["loss_t"][i]} for row in rows], "loss",
                  f"t {i / n:.2g}\u2013{(i + 1) / n:.2g}:") for i in range(n)]
    return {"title": "Loss by t", "lines": lines, "log": True}


def charts_and_numbers(metrics, known=()):
    """-> (curves for the page, [(title, value)] of what was logged at one step only and is therefore no
    curve). known: keys whose last value stands on the page already."""
    charts, numbers = [], []
    for title, keys, options in CURVES:
        lines = {key: line(metrics, key, name, options.get("smooth")) for key, name in keys.items()}
        lines = {key: drawn for key, drawn in lines.items() if drawn["x"]}
        if len({step for drawn in lines.values() for step in drawn["x"]}) > 1:
            charts.append({"title": title, "lines": list(lines.values())} | options)
            continue
        for key, drawn in lines.items():
            if key not in known:
                label = title if len(keys) == 1 else f"{title}, {drawn['name']}"
                value = drawn["y"][0]
                numbers.append((label, "not finite" if value is None else value, drawn["x"][0]))
    by_t = loss_by_t(metrics)
    if by_t:
        charts.insert(min(2, len(charts)), by_t)
    return charts, numbers
