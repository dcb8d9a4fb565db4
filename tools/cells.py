"""Rows of a comparison's tables: [{column: text}], and the cells that several tables have."""
import time

import numpy as np

from robot.rollout import wilson


def markdown(title, rows):
    """[{column: value}] as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)] + [[str(row.get(key, "")) for key in columns] for row in rows]
    return "\n".join([f"\n{title}", ""] + [f"| {' | '.join(cells)} |" for cells in lines]) + "\n"


def success_cells(successes, episodes):
    low, high = (100 * share for share in wilson(successes, episodes))
    return {"success": f"{successes} of {episodes}", "95 % interval": f"{low:.1f} to {high:.1f} %"}


def latency_cells(call, repeat=20):
    """Milliseconds of call(), after two calls that do not count."""
    times = []
    for _ in range(repeat + 2):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return {"p50 ms": f"{np.median(times[2:]):.3g}", "p95 ms": f"{np.percentile(times[2:], 95):.3g}"}


def size_cells(model):
    return {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
