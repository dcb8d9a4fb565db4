"""Images in a .npz or at the root of an HDF5 file:

    x (N, H, W) or (N, H, W, C) uint8, and y (N,) if there are classes;
    or x_train, y_train, x_test, y_test; perhaps class_names

Shapes are read and judged before any array is: a few kilobytes of .npz can declare gigabytes.
"""
import contextlib
import math
import zipfile
from pathlib import Path

import h5py
import numpy as np

from demos.files import open_file, unreadable
from demos.limits import refuse_beyond_memory
from robot.errors import UserError, few, nearest, one_line

KNOWN = ("x", "y", "x_train", "y_train", "x_test", "y_test", "class_names")
MOST_CLASSES = 10_000


def declared(path, generated=()):
    """{name: (shape, dtype)} of the arrays in a file, without reading them. Raises UserError. generated:
    names that may have been meant instead."""
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, [*generated, *beside]) or (
            f": give a file or one of {', '.join(generated)}" if generated else ": check the path")
        raise UserError(f"no images or points at {path}{hint}")
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as parts:
                return {name.removesuffix(".npy"): header(parts, name) for name in parts.namelist()}
        except Exception as error:      # zipfile, zlib and numpy have errors of their own for a broken file
            raise UserError(f"{path} cannot be read as .npz, write it again: {one_line(error)}") from None
    with contextlib.closing(open_file(path)) as file:
        try:
            return {key: (file[key].shape or (), file[key].dtype) for key in file
                    if isinstance(file[key], h5py.Dataset)}
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} {unreadable(error)}") from None


def header(parts, name):
    """(shape, dtype) of one array of an .npz."""
    with parts.open(name) as part:
        form = np.lib.format
        first = form.read_magic(part) == (1, 0)
        shape, _, dtype = (form.read_array_header_1_0 if first else form.read_array_header_2_0)(part)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are never unpickled")
    return shape, dtype


def read_arrays(path, names):
    """{name: array} of those that the file has."""
    found = {key: what for key, what in declared(path).items() if key in names}
    need = sum(math.prod(shape) * dtype.itemsize for shape, dtype in found.values())
    refuse_beyond_memory(f"{path}: arrays {few(found)}", 3 * need, "split the set")
    if Path(path).suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in found}
        except Exception as error:      # zipfile, zlib and numpy have errors of their own for a broken file
            raise UserError(f"{path} cannot be read as .npz, write it again: {one_line(error)}") from None
    with contextlib.closing(open_file(path)) as file:
        try:
            return {key: np.asarray(file[key][()]) for key in found}     # an Empty one, too
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} {unreadable(error)}") from None


def read_images(path, generated=()):
    """({"train": (x, y), ["test": (x, y)]} or {"all": (x, y)}, class names); x (N, C, H, W) uint8, y (N,) or
    None. Raises UserError."""
    has = declared(path, generated)
    parts = {part: tail for part, tail in (("train", "_train"), ("test", "_test")) if "x" + tail in has}
    parts = parts if "train" in parts else {"all": ""}
    if "x" + next(iter(parts.values())) not in has:
        raise UserError(f"{path} holds {few(has)}, but no images 'x' or 'x_train'")
    for tail in parts.values():
        check_pictures(path, "x" + tail, *has["x" + tail])
    arrays = read_arrays(path, KNOWN)
    names = class_names(path, arrays.get("class_names"))
    for part, tail in parts.items():
        x, y = arrays["x" + tail], arrays.get("y" + tail)
        if y is not None:
            y = check_labels(path, "y" + tail, y, len(x), names)
            names = names or list(range(y.max() + 1))       # without names the training part sets the classes
            wrong = np.flatnonzero((y < 0) | (y >= len(names)))
            if len(wrong):
                raise UserError(f"{path}: label {y[wrong[0]]} of image {wrong[0]} in 'y{tail}' is out of "
                                f"range, classes go from 0 to {len(names) - 1}")
        parts[part] = pad(np.moveaxis(x if x.ndim == 4 else x[..., None], 3, 1)), y
    sizes = {part: x.shape[1:] for part, (x, _) in parts.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{path}: images of the test part are {sizes['test']}, those to train on "
                        f"{sizes['train']} (channels, height, width): bring them to one size")
    return parts, names if all(y is not None for _, y in parts.values()) else []


def check_pictures(path, name, shape, dtype):
    sound = len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3)
    if not sound or dtype != np.uint8 or not all(shape):
        raise UserError(f"{path}: '{name}' is {one_line(dtype, 60)} {shape}, write images as uint8 (N, H, W) "
                        f"or (N, H, W, 1 or 3), 0..255")


def check_labels(path, name, y, n, names):
    """Labels as (N,) int64."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.dtype.kind not in "iu" or y.shape != (n,):
        raise UserError(f"{path}: '{name}' is {one_line(y.dtype, 60)} {y.shape}, write one integer for each "
                        f"of {n} images")
    if not names and y.max() >= max(n, MOST_CLASSES):
        raise UserError(f"{path}: '{name}' has labels up to {y.max()} for {n} images: number the classes "
                        f"from 0 on, without gaps")
    return y.astype(np.int64)


def class_names(path, names):
    if names is None:
        return []
    if names.ndim != 1 or names.dtype.kind not in "SUOiu":
        raise UserError(f"{path}: 'class_names' is {one_line(names.dtype, 60)} {names.shape}, write one name "
                        f"for each class")
    return [n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names]


def pad(x):
    """Height and width up to a multiple of 8, because networks halve them three times (MNIST: 28 -> 32). The
    border gets the colour of the background: the median of the upper left corner."""
    N, C, H, W = x.shape
    up, left = -H % 8, -W % 8
    background = np.median(x[:, :, 0, 0], axis=0).astype(np.uint8)                          # (C,)
    out = np.empty((N, C, H + up, W + left), np.uint8)
    out[:] = background[:, None, None]
    out[:, :, up // 2:up // 2 + H, left // 2:left // 2 + W] = x
    return out
