"""What happens inside a model file, told by a run of it: `python train.py --model pi0 --explain`.

One batch goes through `loss` and `sample` while three observers (watch.py) look on, and what they saw is
printed: hooks on the modules (who is called from which line, with which shapes), a tracer of the model file's
lines (where an equation [n] was computed, and the shape of what came out), and a listener at every softmax
(which keys a query gives a probability of exactly 0). Nothing is told from a text that could fall behind the
code.

`python -m tools.explain --map` prints EQUATIONS.md: every equation of every docstring and the lines that
carry its number (equations.py). tests/tools/test_explain.py compares the two.
"""
import dataclasses
import inspect
import itertools
import re
import tempfile
from pathlib import Path

import torch

from data import batches, open_data
from robot.cli import Parser
from robot.errors import run_command
from robot.looks import spread
from robot.models import pick_device
from robot.text import decode_text
from tools.equations import equation_map, equations
from tools.options import make_config
from tools.pictures import processing_of
from tools.watch import Node, Watch


def picture(seen, limit=20):
    """(N, M) bool -> lines. Neighbours that are alike become one row or column, under their number; what is
    still too large is thinned out."""
    groups = lambda rows: [len(list(same)) for _, same in itertools.groupby(map(tuple, rows.tolist()))]
    down, across = groups(seen), groups(seen.T)
    ends = lambda sizes: torch.tensor(sizes).cumsum(0) - 1
    seen = seen[ends(down)][:, ends(across)]
    rows, columns = spread(len(down), limit).tolist(), spread(len(across), limit).tolist()
    width = max(len(str(across[c])) for c in columns)
    out = []
    if max(across) > 1:
        out.append(" " * 8 + " ".join(str(across[c]).rjust(width) for c in columns) + "  keys")
    for r in rows:
        marks = " ".join("x.x"[not seen[r, c]].rjust(width) for c in columns)
        out.append((str(down[r]) if max(down) > 1 else "").rjust(7) + " " + marks)
    if max(down) > 1:
        out[-1] += "  (left: how many queries)"
    if len(rows) < len(down) or len(columns) < len(across):
        out.append(f"        (thinned out from {len(down)} x {len(across)})")
    return out


def collapse(nodes):
    """-> [(how often, [(how often, node, names)])]: first neighbours that are alike become one, then
    stretches that repeat, the shortest first."""
    runs = [list(same) for _, same in itertools.groupby(nodes, Node.like)]
    runs = [(len(same), same[0], [node.name for node in same]) for same in runs]
    likes = [(times, node.like()) for times, node, _ in runs]
    out, i = [], 0
    while i < len(runs):
        times, length = 1, 1
        for n in range(2, (len(runs) - i) // 2 + 1):
            k = 1
            while likes[i:i + n] == likes[i + k * n:i + (k + 1) * n]:
                k += 1
            if k > 1:
                times, length = k, n
                break
        out.append((times, runs[i:i + length]))
        i += times * length
    return out


def short(name):
    """vlm.layers.0 -> layers.0, vlm.layers.0.q -> q"""
    found = re.search(r"[^.\d][^.]*(\.\d+)*$", name)
    return found[0] if found else name


def tree(nodes, file, depth=0, told=None):
    """Lines of the calls. What happens inside is told at the first of several calls that are alike."""
    told, out = set() if told is None else told, []
    column = len(file) + 7
    for often, part in collapse(nodes):
        if often > 1:
            out.append(" " * column + "  " * depth + f"{often} times:")
        for times, node, names in part:
            named = dict.fromkeys(map(short, names))
            name = next(iter(named)) + (f" x {times}" if times > 1 else "")
            if 1 < len(named) <= 3 and not next(iter(named))[-1].isdigit():
                name = ", ".join(named)             # q, k, v, but layers.0 x 4
            text = f"{name}: {node.text}" if node.name else node.text + f" {name}" * (times > 1)
            what = str((node.text, [inner.like(shapes=False) for inner in node.inside]))
            again = bool(node.inside) and what in told
            told.add(what)
            indent = depth + (often > 1)
            out.append(f"{file}:{node.line}".ljust(column) + "  " * indent + f"{text}  {node.shape}"
                       + "  as above" * again)
            if not again:
                out += tree(node.inside, file, indent + 1, told)
    return out


def timeline(config):
    """Which steps are observed, predicted and executed, counted from now."""
    now, last = 0, config.first_action + config.pred_horizon - 1
    first = min(1 - config.n_obs_steps, config.first_action)
    steps = range(first, max(now, last) + 1)
    width = 3 if len(steps) <= 30 else 1
    row = lambda label, inside: label.ljust(11) + "".join(
        ("x" if s in inside else ".").rjust(width) for s in steps)
    numbers = "".join(str(s).rjust(width) for s in steps) if width > 1 else \
        "".join("0" if s == 0 else " " if s % 10 else str(s // 10 % 10) for s in steps)
    return ["step".ljust(11) + numbers + ("" if width > 1 else "   (0 = now, then tens)"),
            row("observed", range(1 - config.n_obs_steps, 1)),
            row("predicted", range(config.first_action, last + 1)),
            row("executed", range(config.n_action_steps))]


def batch_table(batch, description, normalizer, config):
    """Keys, shapes, ranges, and what the numbers are."""
    axes = {"actions": "B, Tp, A", "action_mask": "B, Tp", "state": "B, To, S", "images": "B, To, V, 3, H, W",
            "text": "B, L", "image_mask": "B, To, V", "control_hz": "B", "x": "B, ...", "label": "B"}
    dims = lambda keys: ", ".join(f"{key} {dim}" for key, dim in keys.items())
    processing = processing_of(description)
    told = {"images": "cameras " + ", ".join(place for place, _ in processing.places),
            "state": dims(processing.state_dims),
            "actions": ", ".join(description.get("action_names") or []),
            "control_hz": "control steps per second", "action_mask": "False: past the end of the episode",
            "x": "scaled to about [-1, 1]", "label": ", ".join(description.get("class_names", [])[:8])}
    if "text" in batch:
        decode = getattr(config, "decode_text", decode_text)
        told["text"] = f"codes, 0 = padding; the first reads {decode(batch['text'][0])!r}"
    out = []
    for key, x in batch.items():
        low, high = x.min().item(), x.max().item()
        values = f"{low:.3g} .. {high:.3g}" if x.dtype != torch.bool else f"True {x.float().mean():.0%}"
        kind = str(x.dtype).removeprefix("torch.")
        out.append(f"{key:12} {str(tuple(x.shape)):24} {axes.get(key, ''):18} {kind:8} {values}")
        if told.get(key):
            out.append(" " * 13 + told[key])
        if normalizer and key in normalizer.stats:
            stats = normalizer.stats[key]
            if len(stats["min"]):
                out.append(" " * 13 + f"normalised ({normalizer.mode_of(key)}); in the data's units "
                           f"{stats['min'].min():.3g} .. {stats['max'].max():.3g}")
    return out


def parameters(model):
    """Parameters of the parts; a part that is nearly all of it is opened."""
    count = lambda m: sum(p.numel() for p in m.parameters())
    total, parts = count(model), dict(model.named_children())
    while True:
        largest = max(parts, key=lambda name: count(parts[name]), default=None)
        inner = dict(parts[largest].named_children()) if largest else {}
        if not inner or count(parts[largest]) < 0.9 * total:
            break
        parts.pop(largest)
        parts |= {f"{largest}.{name}": m for name, m in inner.items()}
    rest = total - sum(map(count, parts.values()))
    rows = [(name, count(m)) for name, m in parts.items() if count(m)] + [("(its own)", rest)] * bool(rest)
    return [f"{name:24} {n:14,}  {100 * n / total:5.1f} %" for name, n in rows] + [f"{'all':24} {total:14,}"]


def explain(module, config, items, description, normalizer, device="cpu", seed=0, n=5):
    """Print what happens to n items in the `loss` and the `sample` of a model file. items: Windows or
    Samples."""
    path, watches, told = inspect.getsourcefile(module), {}, set()
    file = Path(path).name
    title = lambda text, lines: print(f"\n{text}", *lines, sep="\n  ")
    torch.manual_seed(seed)
    with Watch(path) as watches["building"]:
        model = module.Model(config)
    model = model.to(device)
    batch = {k: v.to(device) for k, v in next(batches(items, min(n, len(items)), seed))[1].items()}
    generator = torch.Generator().manual_seed(seed)

    print(f"{file}, {type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters")
    title(f"BATCH of {min(n, len(items))} items: {description['source']}",
          batch_table(batch, description, normalizer, config))
    if hasattr(config, "pred_horizon"):
        title("TIMELINE in control steps, 0 is now", timeline(config))
    title("PARAMETERS", parameters(model))
    for name, call in (("loss", lambda: model.train().loss(batch)),
                       ("sample", lambda: model.eval().sample(batch, generator=generator))):
        with Watch(path, model) as watches[name]:
            result = call()
        title(f"{name.upper()}: where it is called, what (line of its class), shapes in -> out; "
              "equations [n] where they are computed", tree(watches[name].root.inside, file, 0, told))
        result = result if isinstance(result, dict) else {"result": result}
        print("  -> " + ", ".join(f"{key} {x.item():.4g}" if x.ndim == 0 else f"{key} {tuple(x.shape)}"
                                  for key, x in result.items()))

    print("\nWHO SEES WHOM, in the first item: x = seen, . = a probability of exactly 0")
    masks = {key: None for watch in watches.values() for key in watch.masks}
    for key in masks:
        kind, line, where, shape, seen = key
        calls = ", ".join(f"{w.masks[key]} x in {name}" for name, w in watches.items() if key in w.masks)
        seen = torch.tensor(seen)
        all_seen = seen.all().item()
        print(f"  {file}:{line} {kind} of {where}, {shape}, {calls}" + ": everyone sees all" * all_seen)
        if not all_seen:
            print(*(f"  {row}" for row in picture(seen)), sep="\n")
    if not masks:
        print("  there is no attention")

    title("EQUATIONS: where this run met them, and the lines that carry their number", [
        f"{f'[{number}]':5}{text[:60]:60}  "
        + (", ".join(name for name in watches if number in watches[name].reached) or "-").ljust(24)
        + ", ".join(map(str, lines))
        for number, text, lines in equations(Path(path).read_text(encoding="utf-8"))])


def explain_one_batch(options, module):
    """`train.py --explain`. The built-in task is shown on a few episodes, which are not kept."""
    device, _ = pick_device(options.device, "float32")
    with tempfile.TemporaryDirectory() as cache:
        built_in = hasattr(module.Config, "horizon") and (options.data or "tabletop") == "tabletop"
        few = dataclasses.replace(options, demos=min(options.demos or 20, 20)) if built_in else options
        facts, make_items, description, normalizer = open_data(few, module, cache)
        config = make_config(module, options, facts)
        explain(module, config, make_items(config, device)[0], description, normalizer, device, options.seed)


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--map", action="store_true", help="print EQUATIONS.md", required=True)
    parser.parse(argv)
    print(equation_map(Path(__file__).parent.parent), end="")


if __name__ == "__main__":
    run_command(main)
