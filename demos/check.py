"""What is in a data file, what looks wrong with it, and how to mend that.

    python -m demos.check FILE_OR_FOLDER       demonstrations in HDF5, or images in .npz or HDF5
                          [--image_size H W]   what resizing would make of the pictures, and what it costs
                          [--colour rgb]       of JPEG frames, as for train.py

What it lists under "must be mended" training refuses (open_demos raises the first such line); what stands
under "worth a look" it takes as it is. The table says what becomes of every array, for a policy with cameras
where the file has some. Exit status 2, with one line, only if nothing can be read.
"""
import collections
import contextlib
import time
from pathlib import Path

import h5py
import numpy as np

from demos.dataset import check_numbers, rates
from demos.episodes import coarse, faults, nonfinite
from demos.files import OPENERS, find_files, open_file, read_episodes, unreadable
from demos.generated import tabletop_file
from demos.image_files import KNOWN, declared, read_images
from demos.images import open_samples
from demos.jpeg import check_colour, decode_jpeg
from demos.keys import beside, sort_keys, width
from demos.limits import refuse_beyond_memory
from demos.split import split_episodes
from robot.cli import Parser
from robot.errors import UserError, few, one_line, run_command
from robot.normalizer import Normalizer
from robot.transforms import resize, same_shape

TO, TP = 2, 16                  # padding is counted for Diffusion Policy's windows
IDLE_SECONDS = 0.5              # an episode that waits longer than this before it begins has an idle start
STILL = 0.01                    # what stays within this share of its range does not move
MEMORY_GB = 4.0                 # --memory_gb of train.py, where nobody says otherwise


def inspect(path, image_size=None, colour="bgr"):
    """Print the report on a file, a folder or a glob. Raises UserError if there is nothing readable."""
    if holds_images(path):
        return inspect_images(path)
    if path == "tabletop":
        path = tabletop_file(cameras=True, rollouts=None, seed=0, cache=None)
    check_colour(colour)
    wrong, odd, episodes = [], [], []
    for file in find_files(path):
        try:
            episodes += read_episodes(file)
        except UserError as error:
            wrong.append(str(error))
    if not episodes:
        raise UserError(wrong[0])

    cameras = any(array.kind in ("camera", "jpeg") for array in episodes[0].obs.values())
    keys = sort_keys(episodes, "image" if cameras else "lowdim")
    sound = []                  # episodes that fit together; the others are named and left out of all figures
    for e in episodes:
        found = list(faults(e, episodes[0], keys.state, keys.cameras, resized=bool(image_size)))
        wrong += found
        sound += [] if found else [e]
    if not (keys.cameras or keys.state):
        wrong.append(f"{episodes[0].name} has neither a state nor a camera: see the table")
    check_numbers(path, sound, sum(width(e.actions) for e in sound[:1]) + sum(
        width(sound[0].obs[key]) for key in keys.state if sound))
    sound, numbers, frames = read_values(sound, keys, wrong, colour)

    report_episodes(path, episodes, wrong, odd)
    report_keys(episodes[0], keys, numbers, frames, odd)
    if sound:
        report_motion(sound, numbers, odd)
        report_memory(sound, numbers, frames, image_size, wrong, odd)
    report_faults(wrong, odd)


def read_values(episodes, keys, wrong, colour):
    """(readable episodes, {key: (N, D) numbers}, {key: [first frame of each episode]}); adds to `wrong`."""
    readable, numbers, frames = [], collections.defaultdict(list), collections.defaultdict(list)
    whole = sum(width(e.obs[key]) for e in episodes for key in keys.cameras if e.obs[key].kind == "camera")
    refuse_beyond_memory("the first pictures of all episodes", whole, "split the set")
    for e in episodes:
        with contextlib.closing(open_file(e.file)) as file:
            try:
                first = {key: file[e.obs[key].path][0] for key in keys.cameras}
                first = {key: decode_jpeg(x, colour) if e.obs[key].kind == "jpeg" else x
                         for key, x in first.items()}
                arrays = {"actions": e.actions} | {key: e.obs[key] for key in keys.state}
                values = {key: file[array.path][:] for key, array in arrays.items()}
            except (OSError, KeyError, RuntimeError) as error:
                wrong.append(f"{e.name} {unreadable(error)}")
                continue
            except UserError as error:
                wrong.append(f"{e.name}: {error}")
                continue
        readable.append(e)
        for key, frame in first.items():
            frames[key].append(frame)
        for key, x in values.items():
            with np.errstate(over="ignore"):
                x = x.reshape(e.length, -1).astype(np.float32)
            wrong += nonfinite(e.name, key, x)
            numbers[key].append(x)
    return readable, {key: np.concatenate(x) for key, x in numbers.items()}, dict(frames)


def report_episodes(path, episodes, wrong, odd):
    lengths = np.array([e.length for e in episodes])
    said_rates = sorted({e.fps for e in episodes if e.fps})
    rate = " or ".join(f"{r:g}" for r in said_rates[:6]) or "unknown"
    minutes = f", {lengths.sum() / said_rates[0] / 60:.1f} minutes" if len(said_rates) == 1 else ""
    print(f"{path}: {len(episodes)} episodes, {lengths.sum()} steps at {rate} Hz{minutes}")
    print(f"  lengths       {lengths.min()} .. {lengths.max()} steps, median {np.median(lengths):g}")
    try:
        _, notes = split_episodes(episodes, None, None, seed=0)
        odd += notes
    except UserError as error:
        wrong.append(str(error))
    split = collections.Counter(e.split for e in episodes)
    print(f"  held out      {split['valid']} episodes by the masks in the file, {split['train']} to train on"
          if None not in split else "  held out      chosen at training, by no masks in the file")
    said = collections.Counter(e.instruction for e in episodes if e.instruction).most_common()
    print(f"  instructions  {len(said) or 'none'}")
    for text, count in said[:8]:
        print(f"      {count:6d} x {one_line(text, 100)}")
    silent = sum(not e.instruction for e in episodes)
    if said and silent:
        odd.append(f"{silent} of {len(episodes)} episodes have no instruction: set 'language_instruction'")
    for note, count in collections.Counter(note for e in episodes for note in e.notes).items():
        odd.append(f"{count} episode{'s' * (count > 1)}: {note}")
    if len(said_rates) != 1 or any(not e.fps for e in episodes):
        aloha = episodes[0].actions.path == "/action"
        where = "attribute 'fps' of the file" if aloha else "data.attrs['fps']"
        odd.append(f"the rate is {rate} Hz: unknown or not the same everywhere, set {where}; without it "
                   f"{rates(episodes[:1])[0]:g} Hz are assumed")
    if len({e.rollout for e in episodes}) == 1:
        odd.append("a single episode: nothing can be held out, record more")
    if any(array.kind == "jpeg" for e in episodes for array in e.obs.values()):
        odd.append("JPEG frames: red and blue are taken to be swapped, as in ALOHA and RDT; look at one, and "
                   "if its colours are right as they are, train with --colour rgb")


def report_keys(first, keys, numbers, frames, odd):
    """A line for every array, with what becomes of it."""
    print(f"  {'key':28s}{'per step':>14s}  {'type':9s}{'min':>11s}{'max':>11s}  becomes")
    known = {"actions": first.actions} | first.labels | first.obs
    for key in ["actions", *keys.state, *keys.cameras]:
        x = numbers.get(key) if key not in keys.cameras else frames.get(key)
        fate = "actions" if key == "actions" else "camera" if key in keys.cameras else "state"
        report_key(key, x, known[key], fate, odd)
    for key, why in (keys.unused | beside(first)).items():
        array = known.get(key)
        what = f"{str(array.shape[1:]):>14s}  {one_line(array.dtype, 9):9s}" if array else " " * 25
        print(f"  {one_line(key, 28):28s}{what}{'':22s}  not used ({why})")


def report_key(key, x, array, fate, odd):
    """x: all numbers (N, D) of a key, or a list of first frames (H, W, 3) of a camera; None if unread."""
    sizes = list(dict.fromkeys(frame.shape for frame in x)) if fate == "camera" and x else [array.shape[1:]]
    values = np.concatenate([np.ravel(part) for part in x]) if x is not None else np.zeros(0)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    ends = f"{low:11.4g}{high:11.4g}" if finite.size else " " * 22
    what = f"{str(tuple(sizes[0])):>14s}  {one_line(array.dtype, 9):9s}"
    print(f"  {one_line(key, 28):28s}{what}{ends}  {fate}")
    if fate == "camera":
        if low == high:
            odd.append(f"camera '{key}' shows nothing but the value {low}: was it plugged in?")
    elif x is not None:
        span = [np.ptp(column[np.isfinite(column)]) if np.isfinite(column).any() else 0 for column in x.T]
        still = [str(d) for d, s in enumerate(span) if s < Normalizer.EPS]
        if still:
            odd.append(f"'{key}' is near-constant in dimension {few(still, 12)}: it is shifted, not scaled; "
                       f"leave it out if it means nothing")
        odd += coarse(key, x[np.isfinite(x).all(1)])


def report_memory(episodes, numbers, frames, image_size, wrong, odd):
    """What a set takes in memory, and what resizing makes of that."""
    sizes = {key: list(dict.fromkeys(frame.shape[:2] for frame in x)) for key, x in frames.items()}
    every = [f"{key} {height} x {width}" for key, found in sizes.items() for height, width in found]
    steps = sum(e.length for e in episodes)
    if len({size for found in sizes.values() for size in found}) > 1 and not image_size:
        wrong.append(f"pictures differ in size, {few(every)}: train with --image_size H W, which brings them "
                     f"to one")
    images = sum(steps * 3 * (size[0] * size[1]) for size in (found[0] for found in sizes.values()))
    line = f"{(sum(x.nbytes for x in numbers.values()) + images) / 1e6:.1f} MB"
    print(f"  in memory     {line}" + (f", {images / 1e6:.1f} MB of it images" if images else ""))
    if image_size and sizes:
        began, some = time.perf_counter(), [x[0][None] for x in frames.values()]
        for frame in some:
            resize(frame, image_size)
        seconds = (time.perf_counter() - began) / len(some)
        after = steps * len(sizes) * 3 * image_size[0] * image_size[1]
        print(f"  resized       to {image_size[0]} x {image_size[1]}: {after / 1e6:.1f} MB of images, "
              f"{1e3 * seconds:.2g} ms a picture, {seconds * steps * len(sizes):.0f} s for all of them")
        images = after
        odd += [f"camera '{key}' changes its proportions, from {found[0][0]} x {found[0][1]}"
                for key, found in sizes.items() if not same_shape(found[0], image_size)]
    if images > MEMORY_GB * 1e9:
        odd.append(f"{images / 1e9:.1f} GB of images stay in the files and are read in every batch: smaller "
                   f"ones (--image_size H W) or more --memory_gb spare that")


def report_motion(episodes, numbers, odd):
    """Idle starts (operators often wait before they begin) and the share of padding."""
    lengths = np.array([e.length for e in episodes])
    wait = int(np.ceil(IDLE_SECONDS * (episodes[0].fps or 10)))
    with np.errstate(invalid="ignore"):
        scaled = [x / np.maximum(np.ptp(x, axis=0), Normalizer.EPS) for x in numbers.values()]
    begins = []                 # the first step at which anything has moved away from where it was at step 0
    for lo, n in zip(np.cumsum(lengths) - lengths, lengths):
        moved = np.any([(abs(x[lo:lo + n] - x[lo]) > STILL).any(1) for x in scaled], axis=0)
        begins.append(int(moved.argmax()) if moved.any() else n)
    begins = np.array(begins)
    idle = begins >= wait
    line = f"{idle.mean():.0%} of the episodes do not move in their first {wait} steps"
    if idle.any():
        longest = episodes[begins.argmax()].name
        line += f" (median {np.median(begins[idle]):g}, longest {begins.max()} in {longest})"
    print(f"  idle starts   {line}")
    if idle.mean() > 0.1:
        odd.append(f"{line}: cut these steps, or a policy learns to stand still")

    # The window at t predicts t - TO + 1 .. t - TO + TP. How much of it is before step 0 or behind n - 1?
    padding = 0
    for n in lengths:
        first = np.arange(n) - TO + 1
        padding += (np.clip(-first, 0, TP) + np.clip(first + TP - n, 0, TP)).clip(0, TP).sum()
    padding = padding / TP / lengths.sum()
    print(f"  padding       {padding:.1%} of the actions in windows with To {TO}, Tp {TP}")
    if (lengths < TP).any():
        odd.append(f"{(lengths < TP).sum()} episodes have less than {TP} steps: mostly padding")


def holds_images(path):
    if Path(path).suffix == ".npz":
        return ".npz" not in OPENERS    # then a layout of yours has episodes in them
    if not Path(path).is_file():
        return False            # a folder; a pipe, which would never end
    try:
        with h5py.File(path, "r") as file:
            return "data" not in file and ("x" in file or "x_train" in file)
    except (OSError, RuntimeError):
        return False            # not a file, or a broken one: read_episodes says it better


def inspect_images(path):
    arrays, wrong, odd, parts = declared(path), [], [], {}
    print(f"{path}: {len(arrays)} arrays")
    for key, (shape, dtype) in arrays.items():
        fate = "" if key in KNOWN else "  not used (its name says nothing to train.py)"
        print(f"  {one_line(key, 28):28s}{str(shape):>22s}  {one_line(dtype, 9):9s}{fate}")
    try:
        parts, names = read_images(path)
        split = {name: open_samples(path, split=name) for name in ("train", "valid")}
        print(f"  held out      {len(split['valid'])} images, {len(split['train'])} to train on")
    except UserError as error:
        wrong.append(str(error))
    for part, (x, y) in parts.items():
        print(f"  {part:12s}  {len(x)} images, {' x '.join(map(str, x.shape[1:]))} after padding")
        if y is not None and names:
            count = np.bincount(y, minlength=len(names))
            print(f"  {'':12s}  {len(names)} classes, {count.min()} to {count.max()} images each")
            if not count.min():
                empty = few([names[c] for c in np.flatnonzero(count == 0)])
                odd.append(f"{part}: no image of class {empty}")
        if x.max() <= 1:
            odd.append(f"{part}: no value above 1, was it scaled before it became uint8? Write 0..255")
    report_faults(wrong, odd)


def report_faults(wrong, odd):
    for title, lines in (("must be mended", wrong), ("worth a look", odd)):
        if lines:
            print(f"{title}:")
        for line in lines[:20]:
            print(f"  - {line}")
        if len(lines) > 20:
            print(f"  - and {len(lines) - 20} more")
    if not wrong and not odd:
        print("nothing looks wrong")


def main(argv=None):
    parser = Parser(prog="python -m demos.check", description=__doc__.partition("\n")[0])
    parser.add_argument("path", help="HDF5 file, folder or glob; .npz or HDF5 of images; tabletop")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="as for train.py")
    parser.add_argument("--colour", default="bgr", help="as for train.py: bgr | rgb")
    args = parser.parse(argv)
    if args.image_size and min(args.image_size) < 1:
        raise UserError(f"--image_size {args.image_size} must be height and width, both at least 1")
    inspect(args.path, args.image_size, args.colour)


if __name__ == "__main__":
    run_command(main)
