"""What is in a file of images for the generative models; see demos/check.py."""
from pathlib import Path

import h5py
import numpy as np

from demos.files import OPENERS
from demos.findings import Finding
from demos.image_files import KNOWN, declared, read_images
from demos.images import open_samples
from robot.errors import UserError, few, one_line


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


def inspect_images(path, say):
    """Tells what is there by say(line) -> (lines that must be mended, [Finding])"""
    arrays, wrong, odd, parts = declared(path), [], [], {}
    say(f"{path}: {len(arrays)} arrays")
    for key, (shape, dtype) in arrays.items():
        fate = "" if key in KNOWN else "  not used (its name says nothing to train.py)"
        say(f"  {one_line(key, 28):28s}{str(shape):>22s}  {one_line(dtype, 9):9s}{fate}")
    try:
        parts, names = read_images(path)
        split = {name: open_samples(path, split=name) for name in ("train", "valid")}
        say(f"  held out      {len(split['valid'])} images, {len(split['train'])} to train on")
    except UserError as error:
        wrong.append(str(error))
    for part, (x, y) in parts.items():
        say(f"  {part:12s}  {len(x)} images, {' x '.join(map(str, x.shape[1:]))} after padding")
        if y is not None and names:
            count = np.bincount(y, minlength=len(names))
            say(f"  {'':12s}  {len(names)} classes, {count.min()} to {count.max()} images each")
            if not count.min():
                empty = few([names[c] for c in np.flatnonzero(count == 0)])
                odd.append(Finding("empty class", f"{part}: no image of class {empty}"))
        if x.max() <= 1:
            odd.append(Finding("scale", f"{part}: no value above 1, was it scaled before it became uint8? "
                               f"Write 0..255"))
    return wrong, odd
