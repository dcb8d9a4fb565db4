"""python -m tools.bench --against PEER[=FOLDER]: the same work by a peer's own code and by ours, in turns.

PEER is one of PEERS, installed or, with =FOLDER, a checkout; the flag may be given several times. Both sides
have the same weights, input and noise, so that their numbers are compared too. They take turns in one
process: a machine that slows down slows both. The times are medians, the ratio is ours / theirs: below 1,
ours is faster. Rows are kept in against.jsonl in --out (out/bench), so that an interrupted run goes on. The
table of a peer goes into docs/speed.md when it is whole.
"""
import contextlib
import datetime
import importlib
import importlib.util
import statistics
import sys
import time

from robot.errors import UserError, hint, one_line, say, user_path
from robot.models import pick_device
from tools.bench_all import PAGE, Store, line, number, where, write_between
from tools.measure import machine

PEERS = ("diffusion_policy", "dit", "rdt", "openpi", "lerobot", "diffusers")


def run(args):
    device, _ = pick_device(args.device, args.dtype)
    if device.type != "cpu":
        raise UserError(f"--against measures on a CPU, not on {device.type}: add --device cpu")
    peers = [found(spec) for spec in args.against]
    flags = ["--repeat", str(args.repeat), "--seconds", str(args.seconds)]
    path = user_path(args.out or "out/bench") / "against.jsonl"
    store = Store(path, ("peer", "work"), machine(device), flags)
    skipped = {}
    for name, module, folder in peers:
        works = {(name, work.name): work for work in module.works(folder)}
        try:
            for key in store.missing(works):
                with contextlib.redirect_stdout(sys.stderr):        # some peers talk
                    row = turns(works[key].build(), args.repeat, args.seconds)
                store.add({"peer": name, "work": key[1]} | row)
        except UserError as e:
            skipped[name] = str(e)
        except Exception as e:              # others' code, perhaps of another day than their file here
            skipped[name] = (f"{key[1]}: its code does not fit tools/peers/{name}.py: {type(e).__name__}: "
                             f"{one_line(e, 150)}")
        if name in skipped:
            say(f"skipped: {name}: {skipped[name]}")
        rows = [store.rows[key] for key in works if key in store.rows]
        if rows:
            print(table(rows), flush=True)
        if len(rows) == len(works):
            write_between(PAGE, f"against {name}", table(rows))
    if len(skipped) == len(peers):
        raise UserError(f"{name}: {skipped[name]}")


def found(spec):
    """PEER or PEER=FOLDER -> its name, its file of tools/peers, and the folder or None."""
    name, given, folder = spec.partition("=")
    if name not in PEERS:
        raise UserError(f"--against {name!r} is no peer{hint(name, PEERS)}")
    module = importlib.import_module(f"tools.peers.{name}")
    how = f"git clone {module.URL}, and --against {name}=FOLDER"
    if given:
        folder = user_path(folder).resolve()
        if not (folder / module.FILE).is_file():
            raise UserError(f"--against {name}: {folder} holds no {module.FILE}: {how}")
    elif not module.PACKAGE or importlib.util.find_spec(module.PACKAGE) is None:
        raise UserError(f"--against {name}: no such package is installed: {how}")
    return name, module, folder if given else None


def turns(pair, repeat, seconds):
    """A row: medians in milliseconds over at most `repeat` rounds, at least three, in about `seconds` for
    each function; and what they return, compared."""
    functions = {"theirs": pair.theirs, "ours": pair.ours, "bfloat16": pair.bfloat16}
    results = {name: function() for name, function in functions.items()}        # this is the warm-up as well
    compared = {name: results[name] is not None and pair.compare for name in ("ours", "bfloat16")}
    row = {"date": datetime.date.today().isoformat()} | {
        f"{name}_differ": (results[name] - results["theirs"]).abs().max().item() if its else None
        for name, its in compared.items()}
    times, start = {name: [] for name in functions}, time.perf_counter()
    for rounds in range(1, max(3, repeat) + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - began) * 1e3)
        if rounds >= 3 and time.perf_counter() - start > 3 * seconds:
            break
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return row | {"rounds": rounds, **{f"{name}_ms": round(ms, 3) for name, ms in medians.items()},
                  "ratio": round(medians["ours"] / medians["theirs"], 3),
                  "bfloat16_ratio": round(medians["bfloat16"] / medians["theirs"], 3)}


def table(rows):
    peer = rows[0]["peer"]
    lines = [where(rows) + f" by `python -m tools.bench --against {peer}`.", "",
             "| work | theirs, ms | ours, ms | ratio | differ by | ours, bfloat16, ms | ratio | differ by |",
             "|---" * 8 + "|"]
    differ = lambda x: "" if x is None else f"{x:.1e}"
    for row in rows:
        cells = [(number(row[f"{name}_ms"]), f"{row[ratio]:.2f}", differ(row[f"{name}_differ"]))
                 for name, ratio in (("ours", "ratio"), ("bfloat16", "bfloat16_ratio"))]
        lines.append(line(row["work"], number(row["theirs_ms"]), *cells[0], *cells[1]))
    return "\n".join(lines) + "\n"
