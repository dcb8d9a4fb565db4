"""The doctor: what is in a data file, what is wrong with it, what that does to training, how to mend it.

    python -m demos.check FILE_OR_FOLDER       demonstrations in HDF5, or images in .npz or HDF5
                          [--html FILE]        also a page: every dimension over time, frames of every camera
                          [--json]             the same as one JSON object instead
                          [--horizon 16]       of the policy, for padding and lag
                          [--image_size H W]   what resizing would make of the pictures, and what it costs
                          [--colour rgb]       of JPEG frames, as for train.py

"must be mended" lists what training refuses (open_demos raises the first such line). "worth a look" lists
what training accepts, though it is most likely wrong. Notes are findings that many good sets have. The table
says what every array is used for, by a policy with cameras if the file has some. The exit status is 2, with
one line, only if nothing can be read.

The examinations: demos/doctor.py (numbers), demos/doctor_cameras.py (pictures); all names: demos/findings.py.
"""
import collections
import json
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from demos import doctor, doctor_page
from demos.check_images import holds_images, inspect_images
from demos.dataset import check_numbers, rates
from demos.doctor_cameras import cameras, look_at, sample
from demos.episodes import faults, nonfinite
from demos.files import find_files, open_file, read_episodes, unreadable
from demos.findings import CLOCKS, FINDINGS, Finding, Recordings
from demos.generated import tabletop_file
from demos.keys import beside, sort_keys, width
from demos.motion import pairs_of
from demos.reading import OpenFiles
from demos.split import split_episodes
from robot.cli import Parser
from robot.errors import UserError, few, one_line, run_command, say
from robot.jpeg import check_colour
from robot.transforms import resize, same_shape

TO, TP = 2, 16                  # Diffusion Policy's windows
MEMORY_GB = 4.0                 # --memory_gb of train.py, where nobody says otherwise
LINES = 20                      # of each list that are printed


@dataclass
class Report:
    lines: list = field(default_factory=list)           # what is there, for reading ...
    facts: dict = field(default_factory=dict)           # ... and for programs
    wrong: list = field(default_factory=list)           # lines: what training refuses
    findings: list = field(default_factory=list)        # Finding
    found: Recordings = None                            # what was read; None of images, or if nothing fits
    seen: dict = field(default_factory=dict)            # camera -> {episode: Seen}

    def level(self, name):
        return [finding for finding in self.findings if finding.level == name]

    def sections(self):
        """(title, lines) of all that was found, the gravest first."""
        return [("must be mended", self.wrong), ("worth a look", [f.line() for f in self.level("fault")]),
                ("notes", [f.line() for f in self.level("note")])]

    def text(self):
        lines = list(self.lines)
        for title, those in self.sections():
            lines += [f"{title}:"] if those else []
            lines += [f"  - {line}" for line in those[:LINES]]
            lines += [f"  - and {len(those) - LINES} more"] if len(those) > LINES else []
        if not self.wrong and not self.level("fault"):
            lines.append("nothing looks wrong")
        return "\n".join(lines)

    def plain(self):
        """As plain values, for --json."""
        names = [e.name for e in self.found.episodes] if self.found else []
        findings = [{"name": f.name, "level": f.level, "what": f.what,
                     **dict(zip(("does", "mend"), FINDINGS.get(f.name, ("", "")))),
                     "episodes": [names[e] for e in f.episodes]} for f in self.findings]
        return self.facts | {"must_be_mended": self.wrong, "findings": findings}


def examine(path, image_size=None, colour="bgr", horizon=TP):
    """The Report on a file, a folder or a glob. Raises UserError if there is nothing readable."""
    report = Report(facts={"path": str(path)})
    if holds_images(path):
        report.wrong, report.findings = inspect_images(path, report.lines.append)
        return report
    if path == "tabletop":
        path = tabletop_file(cameras=True, rollouts=None, seed=0, cache=None)
    check_colour(colour)
    episodes = []
    for file in find_files(path):
        try:
            episodes += read_episodes(file)
        except UserError as error:
            report.wrong.append(str(error))
    if not episodes:
        raise UserError(report.wrong[0])

    pictures = any(array.is_camera for array in episodes[0].obs.values())
    keys = sort_keys(episodes, "image" if pictures else "lowdim")
    sound = []                  # episodes that fit together; the others are named and left out of all figures
    for e in episodes:
        unfit = list(faults(e, episodes[0], keys.state, keys.cameras, resized=bool(image_size)))
        report.wrong += unfit
        sound += [] if unfit else [e]
    if not (keys.cameras or keys.state):
        report.wrong.append(f"{episodes[0].name} has neither a state nor a camera: see the table")
    check_numbers(path, sound, sum(width(e.actions) for e in sound[:1]) + sum(
        width(sound[0].obs[key]) for key in keys.state if sound))
    read_values(report, sound, keys, colour)

    report_episodes(report, path, episodes)
    report_keys(report, episodes[0], keys)
    if report.found:
        examine_numbers(report, horizon)
        report.findings += cameras(report.found, report.seen)
        report_memory(report, image_size)
    return report


# ---- reading


def read_values(report, episodes, keys, colour):
    """Numbers of all episodes, a sample of their pictures; what cannot be read goes into report.wrong."""
    readable, numbers, times, seen = [], collections.defaultdict(list), [], collections.defaultdict(dict)
    steps = sample([e.length for e in episodes], len(keys.cameras)) if episodes else {}
    files = OpenFiles(open_file)
    for i, e in enumerate(episodes):
        file = files[e.file]
        try:
            looks = {key: look_at(file, e.obs[key], steps[i], colour) for key in keys.cameras if i in steps}
            arrays = {"actions": e.actions} | {key: e.obs[key] for key in keys.state}
            values = {key: file[array.path][:] for key, array in arrays.items()}
            clock = time_stamps(file, e)
        except (OSError, KeyError, RuntimeError) as error:
            report.wrong.append(f"{e.name} {unreadable(error)}")
            continue
        except UserError as error:
            report.wrong.append(f"{e.name}: {error}")
            continue
        for key, look in looks.items():
            seen[key][len(readable)] = look
        for key, x in values.items():
            with np.errstate(over="ignore"):
                x = x.reshape(e.length, -1).astype(np.float32)
            report.wrong += nonfinite(e.name, key, x)
            numbers[key].append(x)
        times.append(clock)
        readable.append(e)
    files.close()
    if readable:
        numbers = {key: np.concatenate(x) for key, x in numbers.items()}
        report.seen = {key: seen[key] for key in keys.cameras}
        report.found = Recordings(readable, np.array([e.length for e in readable]), numbers,
                                  float(rates(readable)[0]), times)
    if len(steps) < len(episodes) and keys.cameras:
        report.lines.append(f"pictures of {len(steps)} of {len(episodes)} episodes are looked at")


def time_stamps(file, episode):
    """(T,) float64, or None. float32 would not do for seconds since 1970."""
    for key, array in (episode.labels | episode.obs).items():
        plain = array.shape in ((episode.length,), (episode.length, 1)) and array.dtype.kind in "fiu"
        if plain and key.rpartition("/")[2].lower() in CLOCKS:
            return file[array.path][:].reshape(-1).astype(np.float64)
    return None


# ---- what is there


def report_episodes(report, path, episodes):
    lengths = np.array([e.length for e in episodes])
    told = sorted({e.fps for e in episodes if e.fps})
    rate = " or ".join(f"{r:g}" for r in told[:6]) or "unknown"
    minutes = f", {lengths.sum() / told[0] / 60:.1f} minutes" if len(told) == 1 else ""
    report.lines.insert(0, f"{path}: {len(episodes)} episodes, {lengths.sum()} steps at {rate} Hz{minutes}")
    report.lines.append(f"  lengths       {lengths.min()} .. {lengths.max()} steps, median "
                        f"{np.median(lengths):g}")
    odd = report.findings
    try:
        split, notes = split_episodes(report.found.episodes if report.found else episodes, None, None, seed=0)
        odd += [Finding("split", note, "note") for note in notes]
        if report.found:
            report.found.split = split
    except UserError as error:
        report.wrong.append(str(error))
    split = collections.Counter(e.split for e in episodes)
    report.lines.append(
        f"  held out      {split['valid']} episodes by the masks in the file, {split['train']} to train on"
        if None not in split else "  held out      chosen at training, by no masks in the file")
    said = collections.Counter(e.instruction for e in episodes if e.instruction).most_common()
    report.lines.append(f"  instructions  {len(said) or 'none'}")
    report.lines += [f"      {count:6d} x {one_line(text, 100)}" for text, count in said[:8]]
    odd += doctor.instructions(episodes)
    for note, count in collections.Counter(note for e in episodes for note in e.notes).items():
        odd.append(Finding("reading", f"{count} episode{'s' * (count > 1)}: {note}", "note"))
    if any(not e.fps for e in episodes):
        aloha = episodes[0].actions.path == "/action"
        where = "attribute 'fps' of the file" if aloha else "data.attrs['fps']"
        odd.append(Finding("rate", f"the rate is {rate} Hz: unknown or not the same everywhere, set {where}; "
                           f"without it {rates(episodes[:1])[0]:g} Hz are assumed", "note"))
    if len({e.rollout for e in episodes}) == 1:
        odd.append(Finding("single episode", "nothing can be held out, record more"))
    if any(array.kind == "jpeg" for e in episodes for array in e.obs.values()):
        odd.append(Finding("colours", "JPEG frames: red and blue are taken to be swapped, as in ALOHA and "
                           "RDT; look at one, and if its colours are right as they are, train with --colour "
                           "rgb", "note"))
    report.facts |= {"episodes": len(episodes), "steps": int(lengths.sum()), "fps": told,
                     "lengths": [int(lengths.min()), float(np.median(lengths)), int(lengths.max())],
                     "instructions": dict(said[:100])}


def report_keys(report, first, keys):
    """A line for every array, with what becomes of it."""
    report.lines.append(f"  {'key':28s}{'per step':>14s}  {'type':9s}{'min':>11s}{'max':>11s}  becomes")
    known, table = {"actions": first.actions} | first.labels | first.obs, {}
    for key in ["actions", *keys.state, *keys.cameras]:
        fate = "actions" if key == "actions" else "camera" if key in keys.cameras else "state"
        x = report.found.numbers.get(key) if report.found and fate != "camera" else None
        x = np.zeros(0) if x is None else x[np.isfinite(x)]
        ends = (float(x.min()), float(x.max())) if x.size else ()
        shape = tuple(known[key].shape[1:])
        if report.seen.get(key):
            looked = report.seen[key].values()
            ends = (min(s.low for s in looked), max(s.high for s in looked))
            shape = (*next(iter(looked)).size, 3)
        shown = "".join(f"{x:11.4g}" for x in ends) or " " * 22
        report.lines.append(f"  {one_line(key, 28):28s}{str(shape):>14s}  "
                            f"{one_line(known[key].dtype, 9):9s}{shown}  {fate}")
        table[key] = {"shape": shape, "type": one_line(known[key].dtype), "range": ends, "becomes": fate}
    for key, why in (keys.unused | beside(first)).items():
        array = known.get(key)
        what = f"{str(array.shape[1:]):>14s}  {one_line(array.dtype, 9):9s}" if array else " " * 25
        report.lines.append(f"  {one_line(key, 28):28s}{what}{'':22s}  not used ({why})")
        table[key] = {"becomes": "", "why": why}
    report.facts["keys"] = table


# ---- the examinations


def examine_numbers(report, horizon):
    found, lines = report.found, report.lines
    pairs = [] if not np.isfinite(found.state).all() or not np.isfinite(found.numbers["actions"]).all() else (
        pairs_of(found.numbers["actions"], found.state, found.lengths, found.fps))
    line, idle = doctor.idle_starts(found)
    padded, short = doctor.padding(found.lengths, TO, horizon)
    share, beyond = doctor.clipped(found)
    lines.append(f"  idle starts   {line}")
    lines.append(f"  padding       {padded:.1%} of the actions in windows with To {TO}, Tp {horizon}")
    if share is not None:
        lines.append(f"  clipped       {share:.1%} of the held-out actions lie beyond those trained on by "
                     f"more than {doctor.EXCEEDS:.0%} of the range")
    said = [f"{doctor.pair_name(found, p)} after {p.lag} (r {p.r:.2f})" for p in pairs]
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    lines.append(f"  lag in steps  {len(said)} of {found.numbers['actions'].shape[1]} actions go with a state"
                 + f": {', '.join(said[:3])}{more}" * bool(said))
    report.findings += [
        *doctor.dimensions(found), *idle, *doctor.angle_wraps(found), *doctor.late_actions(found, pairs),
        *doctor.slow_states(found, pairs, horizon), *beyond, *short, *doctor.duplicates(found),
        *doctor.clocks(found), *doctor.outliers(found, horizon)]
    lags = [{"action": p.action, "state": list(found.state_columns[p.state]), "kind": p.kind, "steps": p.lag,
             "r": p.r} for p in pairs]
    report.facts |= {"padding": padded, "clipped": share, "lag": lags}


def report_memory(report, image_size):
    """How much memory a set takes, as it is and resized."""
    found, odd = report.found, report.findings
    sizes = {key: list(dict.fromkeys(s.size for s in those.values())) for key, those in report.seen.items()}
    every = [f"{key} {height} x {wide}" for key, sized in sizes.items() for height, wide in sized]
    steps = int(found.lengths.sum())
    if len({size for sized in sizes.values() for size in sized}) > 1 and not image_size:
        report.wrong.append(f"pictures differ in size, {few(every)}: train with --image_size H W, which "
                            f"brings them to one")
    images = sum(steps * 3 * (size[0] * size[1]) for size in (sized[0] for sized in sizes.values()))
    line = f"{(sum(x.nbytes for x in found.numbers.values()) + images) / 1e6:.1f} MB"
    report.lines.append(f"  in memory     {line}" + f", {images / 1e6:.1f} MB of it images" * bool(images))
    if image_size and sizes:
        frames = [np.zeros((1, *sized[0], 3), np.uint8) for sized in sizes.values()]
        began = time.perf_counter()
        for frame in frames:
            resize(frame, image_size)
        seconds = (time.perf_counter() - began) / len(frames)
        after = steps * len(sizes) * 3 * image_size[0] * image_size[1]
        report.lines.append(
            f"  resized       to {image_size[0]} x {image_size[1]}: {after / 1e6:.1f} MB of images, "
            f"{1e3 * seconds:.2g} ms a picture, {seconds * steps * len(sizes):.0f} s for all of them")
        images = after
        odd += [Finding("proportions", f"camera '{key}' changes its proportions, from "
                        f"{sized[0][0]} x {sized[0][1]}")
                for key, sized in sizes.items() if not same_shape(sized[0], image_size)]
    if images > MEMORY_GB * 1e9:
        odd.append(Finding("memory", f"{images / 1e9:.1f} GB of images stay in the files and are read in "
                           f"every batch: smaller ones (--image_size H W) or more --memory_gb spare that",
                           "note"))


def main(argv=None):
    parser = Parser(prog="python -m demos.check", description=__doc__.partition("\n")[0])
    parser.add_argument("path", help="HDF5 file, folder or glob; .npz or HDF5 of images; tabletop")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--html", metavar="FILE", help="a page with pictures, written there")
    parser.add_argument("--horizon", type=int, default=TP, metavar="TP", help="of the policy (default 16)")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="as for train.py")
    parser.add_argument("--colour", default="bgr", help="as for train.py: bgr | rgb")
    args = parser.parse(argv, {"horizon": (1, 10_000), "image_size": (1, 20_000)})
    report = examine(args.path, args.image_size, args.colour, args.horizon)
    if args.json:
        json.dump(report.plain(), sys.stdout, indent=1)
        print()
    else:
        print(report.text())
    if args.html:
        doctor_page.write(args.html, report)
        say(f"wrote {args.html}")


if __name__ == "__main__":
    run_command(main)
