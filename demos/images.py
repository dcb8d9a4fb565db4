"""Data for the generative files: 2-D points, generated shapes, and image files. See `open_samples`.

    moons, checkerboard, eight_gaussians, spirals    (N, 2) float32, within about [-1, 1]
    shapes                      (N, 3, 32, 32) uint8: one of eight shapes on a plain ground
    a .npz or HDF5 file with    x (N, H, W) or (N, H, W, C) uint8, and y (N,) if there are classes;
                                or x_train, y_train, x_test, y_test; perhaps class_names
"""
from pathlib import Path

import h5py
import numpy as np
import torch

from demos.files import open_file
from robot.errors import UserError, fingerprint, nearest, one_line


def moons(n, rng):
    """Two half circles that reach into each other, with noise; 2 classes."""
    label, angle = rng.integers(2, size=n), rng.uniform(0, np.pi, n)
    upper, lower = (np.cos(angle), np.sin(angle)), (1 - np.cos(angle), 0.5 - np.sin(angle))
    x = np.where(label == 0, upper, lower).T + 0.05 * rng.standard_normal((n, 2))
    return (x - [0.5, 0.25]) / 1.5, label


def checkerboard(n, rng):
    """Uniform on 8 of the 16 fields of a board on [-1, 1]^2: area 2, entropy log 2."""
    field, inside = rng.integers(8, size=n), rng.uniform(size=(n, 2))
    row, column = field // 2, 2 * (field % 2) + field // 2 % 2
    return (np.stack([column, row], 1) + inside) / 2 - 1, None


def eight_gaussians(n, rng):
    """Eight blobs of deviation 0.05 on a circle of radius 0.8; 8 classes. Neighbours are 12 deviations apart,
    so the entropy is log 8 + log(2 pi e 0.05^2) = -1.0741."""
    label = rng.integers(8, size=n)
    angle = label * np.pi / 4
    return 0.8 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * rng.standard_normal((n, 2)), label


def spirals(n, rng):
    """Two arms of one and a half turns, with noise; 2 classes."""
    label = rng.integers(2, size=n)
    along = np.sqrt(rng.uniform(size=n))            # the root: outer turns are longer and get more points
    angle = 3 * np.pi * along + np.pi * label
    x = 0.95 * along[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return x + 0.02 * rng.standard_normal((n, 2)), label


SHAPES = ("disc", "square", "triangle", "ring", "cross", "bar", "star", "diamond")


def shapes(n, rng, size=32):
    """One bright shape on a dark ground: images (n, 3, size, size) uint8 and its number in SHAPES.

    A shape is a distance in pixels, negative inside. A pixel that the outline crosses mixes both colours,
    which is all there is to anti-aliasing.
    """
    label = rng.integers(len(SHAPES), size=n)
    colour, ground = rng.uniform(120, 255, (n, 3, 1, 1)), rng.uniform(0, 80, (n, 3, 1, 1))
    radius = rng.uniform(0.22, 0.36, n) * size
    centre = rng.uniform(radius, size - radius, (2, n))
    pixel = np.arange(size) + 0.5
    distance = np.empty((n, size, size))
    for k, name in enumerate(SHAPES):
        of = label == k
        r = radius[of, None, None]
        x = pixel - centre[0][of, None, None]                                   # (m, 1, W)
        y = pixel[:, None] - centre[1][of, None, None]                          # (m, H, 1), down
        far, ax, ay = np.hypot(x, y), abs(x), abs(y)
        # Angle from the nearest ray of a five-pointed star, 0 .. pi/5: a star is one edge, mirrored ten
        # times.
        turn = abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        distance[of] = {
            "disc": lambda: far - r,
            "square": lambda: np.maximum(ax, ay) - 0.8 * r,
            "triangle": lambda: np.maximum(y - 0.5 * r, 0.866 * ax - 0.5 * y - 0.5 * r),
            "ring": lambda: abs(far - 0.75 * r) - 0.25 * r,
            "cross": lambda: np.minimum(np.maximum(ax - r, ay - 0.3 * r), np.maximum(ax - 0.3 * r, ay - r)),
            "bar": lambda: np.maximum(ax - r, ay - 0.3 * r),
            "star": lambda: 0.328 * (far * np.cos(turn) - r) + 0.944 * far * np.sin(turn),
            "diamond": lambda: 0.707 * (ax + ay - r),
        }[name]()
    cover = np.clip(0.5 - distance, 0, 1)[:, None]                          # (n, 1, H, W)
    return np.rint(ground * (1 - cover) + colour * cover).astype(np.uint8), label


GENERATED = {"moons": moons, "checkerboard": checkerboard, "eight_gaussians": eight_gaussians,
             "spirals": spirals, "shapes": shapes}


class Samples:
    """Points x (N, 2) float32, or images x (N, C, H, W) uint8, which `batch` brings to [-1, 1]."""

    def __init__(self, source, x, label, class_names):
        self.source, self.class_names, self.n_classes = str(source), class_names, len(class_names)
        self.x = torch.from_numpy(np.ascontiguousarray(x))
        self.label = None if label is None else torch.from_numpy(label.astype(np.int64))
        self.shape = tuple(self.x.shape[1:])
        self.device = self.held_on = self.x.device

    def to(self, device):
        """Hold the data on this device from now on; batches come out there."""
        self.x, self.label = self.x.to(device), None if self.label is None else self.label.to(device)
        self.device = self.held_on = self.x.device
        return self

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        """{"x": (B, ...) float32 in [-1, 1], and "label": (B,) int64 where there are labels}"""
        indices = indices.to(self.held_on)
        x = self.x[indices]
        batch = {"x": x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x}
        return batch if self.label is None else {**batch, "label": self.label[indices]}

    def episode(self, indices):
        """Names of these items, for messages."""
        return [f"{self.source}:{i}" for i in indices.tolist()]

    def description(self):
        """What a checkpoint keeps of the data: plain values only."""
        return {"source": self.source, "shape": list(self.shape), "n_classes": self.n_classes,
                "class_names": list(self.class_names), "items": len(self),
                "fingerprint": fingerprint(self.x.cpu().numpy())}


def open_samples(source, n=None, seed=0, split="train"):
    """Points or images: -> Samples. Raises UserError.

    source   the name of a generated set, or a .npz or HDF5 file with images (see the top of this file)
    n        how many in all (default: 20000 points, 4000 shapes, all of a file)
    split    "train", or "valid": the file's test part if it has one, else the last tenth of all
    """
    if split not in ("train", "valid"):
        raise UserError(f"split must be 'train' or 'valid', not {split!r}")
    if source in GENERATED:
        n = n or (4000 if source == "shapes" else 20000)
        x, label = GENERATED[source](n, np.random.default_rng(seed))
        x = x if x.dtype == np.uint8 else x.astype(np.float32)
        names = SHAPES if source == "shapes" else range(0 if label is None else label.max() + 1)
        parts = {"all": (x, label)}
    else:
        parts, names = read_images(source)
    x, label = parts.get("test" if split == "valid" else "train") or parts.get("train") or parts["all"]
    x, label = x[:n], None if label is None else label[:n]
    if "test" not in parts:
        held_out = len(x) // 10
        keep = slice(len(x) - held_out, None) if split == "valid" else slice(len(x) - held_out)
        x, label = x[keep], None if label is None else label[keep]
    return Samples(source, x, label, [str(name) for name in names])


def read_arrays(path):
    """{name: array} of a .npz or of the root of an HDF5 file. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, [*GENERATED, *beside]) or f": give a file or one of {', '.join(GENERATED)}"
        raise UserError(f"no images or points at {path}{hint}")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except Exception as error:      # zipfile, zlib and numpy have errors of their own for a broken file
            raise UserError(f"{path} cannot be read as .npz, write it again: {one_line(error)}") from None
    with open_file(path) as file:
        try:
            return {key: file[key][:] for key in file if isinstance(file[key], h5py.Dataset)}
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be read, copy it again: {one_line(error)}") from None


def read_images(path):
    """({"train": (x, y), ["test": (x, y)]} or {"all": (x, y)}, class names); x (N, C, H, W) uint8, y (N,) or
    None. Raises UserError."""
    arrays = read_arrays(path)
    parts = {part: tail for part, tail in (("train", "_train"), ("test", "_test")) if "x" + tail in arrays}
    parts = parts if "train" in parts else {"all": ""}
    if "x" + next(iter(parts.values())) not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}, but no images 'x' or 'x_train'")
    names = [n.decode() if isinstance(n, bytes) else str(n) for n in arrays.get("class_names", [])]
    for part, tail in parts.items():
        x, y = arrays["x" + tail], arrays.get("y" + tail)
        sound = x.ndim == 3 or x.ndim == 4 and x.shape[3] in (1, 3)
        if not sound or x.dtype != np.uint8 or not x.size:
            raise UserError(f"{path}: 'x{tail}' is {x.dtype} {x.shape}, write images as uint8 (N, H, W) or "
                            f"(N, H, W, 1 or 3), 0..255")
        if y is not None:
            if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
                raise UserError(f"{path}: 'y{tail}' is {y.dtype} {y.shape}, write one integer for each of "
                                f"{len(x)} images")
            names = names or list(range(y.max() + 1))       # without names the training part sets the classes
            wrong = np.flatnonzero((y < 0) | (y >= len(names)))
            if len(wrong):
                raise UserError(f"{path}: label {y[wrong[0]]} of image {wrong[0]} in 'y{tail}' is out of "
                                f"range, classes go from 0 to {len(names) - 1}")
        parts[part] = pad(np.moveaxis(x if x.ndim == 4 else x[..., None], 3, 1)), y
    return parts, names if all(y is not None for _, y in parts.values()) else []


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
