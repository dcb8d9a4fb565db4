"""python -m tools.bench --all: every file and preset, each in a process of its own, so with its own peak.

A row is one line of rows.jsonl in --out (out/bench). What is there already, measured on the same machine with
the same flags, is not measured again: an interrupted run goes on. With all rows the tables go into
docs/speed.md, between its markers; a part (--model, --preset) is only printed.
"""
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from robot.errors import UserError, few, hint, one_line, say, user_path, written_aside
from robot.models import MODELS, load_module, pick_device
from tools.measure import machine

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
PATIENCE = 900          # seconds after which a row is given up: one row must not hold up all others


def run(args):
    device, _ = pick_device(args.device, args.dtype)
    wanted = selection(args.model, args.preset)
    flags = flags_of(args)
    path = user_path(args.out or "out/bench") / "rows.jsonl"
    store = Store(path, ("model", "preset"), machine(device), flags)
    with tqdm(store.missing(wanted), unit="row") as bar:
        for model, preset in bar:
            bar.set_description(f"{model} {preset}")
            store.add(measured(model, preset, flags))
    text = tables([store.rows[row] for row in wanted])
    print(text)
    if wanted == selection("", ""):
        write_between(PAGE, device.type, text)


def selection(model, preset):
    """[(model, preset)] of the flags; "" stands for all."""
    for name in [model] if model else MODELS:
        load_module(name)
    found = [(name, known) for name in ([model] if model else MODELS) for known in load_module(name).PRESETS
             if preset in ("", known)]
    if not found:
        known = [known for name in ([model] if model else MODELS) for known in load_module(name).PRESETS]
        raise UserError(f"--preset {preset!r} is in none of these files{hint(preset, known)}")
    return found


def flags_of(args):
    """The flags that each row's process gets, too."""
    flags = ["--device", args.device, "--dtype", args.dtype, "--batch_size", str(args.batch_size), "--repeat",
             str(args.repeat), "--seconds", str(args.seconds), *["--compile"] * args.compile]
    return flags + [word for item in args.set for word in ("--set", item)]


class Store:
    """Rows of one machine and the same flags, kept in a file line by line: {its values of `keys`: row}."""

    def __init__(self, path, keys, machine, flags):
        self.path, self.keys, self.same, self.rows = path, keys, {"machine": machine, "flags": flags}, {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            for row in map(json.loads, lines):
                if self.same.items() <= row.items():
                    self.rows[tuple(row[key] for key in keys)] = row
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} holds no rows of tools.bench ({one_line(e, 80)}): delete it, or take "
                            f"another --out") from None

    def add(self, row):
        row = self.same | row
        self.rows[tuple(row[key] for key in self.keys)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def missing(self, wanted):
        """Those of the keys that have no row."""
        missing = [key for key in wanted if key not in self.rows]
        if len(missing) < len(wanted):
            say(f"{len(wanted) - len(missing)} of {len(wanted)} rows stand in {self.path} and are kept: "
                f"delete it to measure them again")
        return missing


def measured(model, preset, flags):
    """The row of a process of its own; where there is none, why."""
    argv = [sys.executable, "-m", "tools.bench", "--model", model, "--preset", preset, *flags]
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=PATIENCE)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        why = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("bench.py: ")
        if done.returncode < 0:
            why = f"ended by signal {-done.returncode}: out of memory" if done.returncode == -9 else why
    except subprocess.TimeoutExpired:
        why = f"took longer than {PATIENCE} s"
    return {"model": model, "preset": preset, "left_out": {"all": one_line(why)}}


# ----------------------------------------------------------------------------------------------------------
# Tables

def tables(rows):
    """The text of a page: when, where and how, the ceilings, two tables and what was left out."""
    whole = [row for row in rows if "ceilings" in row]
    parts = [f"{where(rows)} by `python -m tools.bench --all {' '.join(rows[0]['flags'])}`."]
    parts += [ceilings_line(whole), training_table(whole), chunk_table(whole)] if whole else []
    left = [f"- {row['model']} {row['preset']}, {what}: {why}" for row in rows
            for what, why in row["left_out"].items()]
    return "\n\n".join(parts + (["Left out:\n\n" + "\n".join(left)] if left else [])) + "\n"


def where(rows):
    its, dates = rows[0]["machine"], sorted({row["date"] for row in rows if "date" in row})
    return (f"Measured {few(dates)} on {its['threads']} thread{'s' * (its['threads'] > 1)} of {its['name']}, "
            f"torch {its['torch']},")


def ceilings_line(rows):
    def spread(key):
        values = [row["ceilings"][key] for row in rows]
        return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"

    return (f"The machine's ceilings, median and range over the rows: a large product {spread('float32')} "
            f"GFLOP/s in float32 and {spread('bfloat16')} in bfloat16, a large read {spread('read')} GB/s.")


def training_table(rows):
    lines = ["| file | preset | parameters | batch | ms a step, float32 | bfloat16 | samples/s, float32 | "
             "bfloat16 | share, float32 | bfloat16 | fetching, ms | peak, MB |", "|---" * 12 + "|"]
    for row in rows:
        if row["training"]:
            cells = [both(row["training"], form) for form in (
                lambda x: number(x["ms"]), lambda x: number(x["samples_per_s"]), share)]
            lines.append(line(row["model"], row["preset"], f"{row['parameters']:,}", row["batch_size"],
                              *sum(cells, []), number(row["data_ms"]), f"{row['peak_mb']['all']:,}"))
    return "\n".join(lines)


def chunk_table(rows):
    lines = ["| file | preset | sampler | p50, ms, float32 | p95 | share | p50, ms, bfloat16 | p95 | share | "
             "differs by | peak, MB |", "|---" * 11 + "|"]
    for row in rows:
        for sampler, found in row["chunk"].items():
            cells = [[p50(x), number(x.get("p95_ms")), share(x)] for x in (found.get(dtype, {}) for dtype in (
                "float32", "bfloat16"))]
            error = found.get("bfloat16", {}).get("error")
            lines.append(line(row["model"], row["preset"], sampler, *sum(cells, []),
                              "" if error is None else f"{error:.3f}", f"{row['peak_mb']['chunk']:,}"))
    return "\n".join(lines)


def both(kinds, form):
    return [form(kinds[dtype]) if dtype in kinds else "" for dtype in ("float32", "bfloat16")]


def line(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def number(x):
    """Three digits that mean something: 1,234 or 12.3 or 0.123; "" for None."""
    return "" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def p50(found):
    return f"about {number(found['about_ms'])}" if "about_ms" in found else number(found.get("p50_ms"))


def share(found):
    """With the ceiling: a for arithmetic, r for reading."""
    return f"{found['share']:.2f} {found['of'][0]}" if "share" in found else ""


def write_between(page, name, text):
    """Put `text` between the two markers of this name in a Markdown page."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, found, rest = old.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        say(f"{page} has no lines {begin.strip()} and {end}: the tables are printed only")
        return
    with written_aside(page) as aside:
        aside.write_text(before + begin + text + end + after, encoding="utf-8")
