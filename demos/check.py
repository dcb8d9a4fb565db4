"""What is in a data file, what looks wrong with it, and how to mend that.

    python -m demos.check FILE_OR_FOLDER       demonstrations in HDF5, or images in .npz or HDF5

What it lists under "must be mended" training refuses (open_demos raises the first such line); what stands
under "worth a look" it takes as it is. Exit status 2, with one line, only if nothing can be read.
"""
import collections
import contextlib
from pathlib import Path

import h5py
import numpy as np

from demos.episodes import decode_jpeg, faults, nonfinite
from demos.files import OPENERS, find_files, open_file, read_episodes
from demos.generated import tabletop_file
from demos.images import read_arrays, read_images
from robot.cli import Parser
from robot.errors import UserError, one_line, run_command
from robot.normalizer import Normalizer

TO, TP = 2, 16                  # padding is counted for Diffusion Policy's windows
IDLE_SECONDS = 0.5              # an episode that waits longer than this before it begins has an idle start
STILL = 0.01                    # what stays within this share of its range does not move


def inspect(path):
    """Print the report on a file, a folder or a glob. Raises UserError if there is nothing readable."""
    if holds_images(path):
        return inspect_images(path)
    if path == "tabletop":
        path = tabletop_file(cameras=True, rollouts=None, seed=0, cache=None)
    wrong, odd, episodes = [], [], []
    for file in find_files(path):
        try:
            episodes += read_episodes(file)
        except UserError as error:
            wrong.append(str(error))
    if not episodes:
        raise UserError(wrong[0])

    kinds = {key: array.kind for e in episodes for key, array in e.obs.items()}
    state_keys = [key for key, kind in kinds.items() if kind == "state"]
    camera_keys = [key for key, kind in kinds.items() if kind in ("camera", "jpeg")]
    sound = []                  # episodes that fit together; the others are named and left out of all figures
    for e in episodes:
        found = list(faults(e, episodes[0], state_keys, camera_keys))
        wrong += found
        sound += [] if found else [e]
    sound, numbers, frames = read_values(sound, wrong)

    report_episodes(path, episodes, odd)
    print(f"  {'key':28s}{'per step':>14s}  {'type':9s}{'min':>11s}{'max':>11s}")
    for key, x in {**numbers, **frames}.items():
        report_key(key, x, sound[0].actions if key == "actions" else sound[0].obs[key], odd)
    if sound:
        report_motion(sound, numbers, odd)
        images = sum(e.length for e in sound) * sum(x[0].nbytes for x in frames.values())
        print(f"  in memory     {(sum(x.nbytes for x in numbers.values()) + images) / 1e6:.1f} MB"
              + (f", {images / 1e6:.1f} MB of it images" if images else ""))
    report_faults(wrong, odd)


def read_values(episodes, wrong):
    """(readable episodes, {key: (N, D) numbers}, {key: (E, H, W, 3) first frames}); adds to `wrong`."""
    readable, numbers, frames = [], collections.defaultdict(list), collections.defaultdict(list)
    camera = lambda array: array.kind in ("camera", "jpeg")
    for e in episodes:
        with contextlib.closing(open_file(e.file)) as file:
            try:
                first = {key: file[array.path][0] for key, array in e.obs.items() if camera(array)}
                first = {key: decode_jpeg(x) if e.obs[key].kind == "jpeg" else x for key, x in first.items()}
                values = {key: file[array.path][:] for key, array in {"actions": e.actions, **e.obs}.items()
                          if key == "actions" or array.kind == "state"}
            except (OSError, KeyError, RuntimeError, UserError) as error:
                wrong.append(f"{e.name} cannot be read, copy the file again: {one_line(error)}")
                continue
        readable.append(e)
        for key, frame in first.items():
            frames[key].append(frame)
        for key, x in values.items():
            x = x.reshape(e.length, -1).astype(np.float32)
            wrong += nonfinite(e.name, key, x)
            numbers[key].append(x)
    for key, x in list(frames.items()):
        if len({frame.shape for frame in x}) > 1:
            wrong.append(f"camera '{key}' changes its size between episodes: bring all pictures to one size")
            del frames[key]
    numbers = {key: np.concatenate(x) for key, x in numbers.items()}
    return readable, numbers, {key: np.stack(x) for key, x in frames.items()}


def report_episodes(path, episodes, odd):
    lengths = np.array([e.length for e in episodes])
    rates = sorted({e.fps for e in episodes if e.fps})
    rate = " or ".join(f"{r:g}" for r in rates) or "unknown"
    minutes = f", {lengths.sum() / rates[0] / 60:.1f} minutes" if len(rates) == 1 else ""
    print(f"{path}: {len(episodes)} episodes, {lengths.sum()} steps at {rate} Hz{minutes}")
    print(f"  lengths       {lengths.min()} .. {lengths.max()} steps, median {np.median(lengths):g}")
    split = collections.Counter(e.split for e in episodes)
    print(f"  held out      {split['valid']} episodes by the masks in the file, {split['train']} to train on"
          if None not in split else "  held out      chosen at training, the file has no masks")
    said = collections.Counter(e.instruction for e in episodes if e.instruction).most_common()
    print(f"  instructions  {len(said) or 'none'}")
    for text, count in said[:8]:
        print(f"      {count:6d} x {text}")
    if len(rates) != 1 or any(not e.fps for e in episodes):
        odd.append(f"the rate is {rate} Hz: unknown or not the same everywhere, set data.attrs['fps']")
    if len({e.rollout for e in episodes}) == 1:
        odd.append("a single episode: nothing can be held out, record more")
    if any(array.kind == "jpeg" for e in episodes for array in e.obs.values()):
        odd.append("JPEG frames: red and blue are taken to be swapped, as in ALOHA and RDT, look at one")


def report_key(key, x, array, odd):
    """One line of the table. x: all numbers (N, D) of a key, or first frames (E, H, W, 3) of a camera."""
    finite = x[np.isfinite(x)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    per_step = x.shape[1:] if x.dtype == np.uint8 else array.shape[1:]
    print(f"  {key:28s}{str(tuple(per_step)):>14s}  {str(array.dtype):9s}{low:11.4g}{high:11.4g}")
    if x.dtype == np.uint8:
        if low == high:
            odd.append(f"camera '{key}' shows nothing but the value {low}: was it plugged in?")
        return
    span = [np.ptp(column[np.isfinite(column)]) if np.isfinite(column).any() else 0 for column in x.T]
    still = [str(d) for d, s in enumerate(span) if s < Normalizer.EPS]
    if still:
        odd.append(f"'{key}' is near-constant in dimension {', '.join(still)}: it is shifted, not scaled; "
                   f"leave it out if it means nothing")


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
    arrays, wrong, odd, parts = read_arrays(path), [], [], {}
    print(f"{path}: {len(arrays)} arrays")
    for key, x in arrays.items():
        ends = f"{x.min():11.4g}{x.max():11.4g}" if x.dtype.kind in "fiub" and x.size else ""
        print(f"  {key:28s}{str(x.shape):>22s}  {str(x.dtype):9s}{ends}")
    try:
        parts, names = read_images(path)
    except UserError as error:
        wrong.append(str(error))
    for part, (x, y) in parts.items():
        print(f"  {part:12s}  {len(x)} images, {' x '.join(map(str, x.shape[1:]))} after padding")
        if y is not None:
            count = np.bincount(y, minlength=len(names))
            print(f"  {'':12s}  {len(names)} classes, {count.min()} to {count.max()} images each")
            if not count.min():
                empty = ", ".join(str(names[c]) for c in np.flatnonzero(count == 0))
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
    inspect(parser.parse(argv).path)


if __name__ == "__main__":
    run_command(main)
