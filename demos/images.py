"""Data for the generative files: 2-D points, generated shapes, and image files. See `open_samples`.

    moons, checkerboard, eight_gaussians, spirals    (N, 2) float32, within about [-1, 1]
    shapes                      (N, 3, 32, 32) uint8: one of eight shapes on a plain ground
    a .npz or HDF5 file         see demos/image_files.py
"""
import numpy as np
import torch

from demos.image_files import read_images
from robot.errors import UserError, few, fingerprint, say


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

    source   the name of a generated set, or a .npz or HDF5 file with images (see demos/image_files.py)
    n        how many in all (default: 20000 points, 4000 shapes, all of a file)
    split    "train", or "valid": the file's test part if it has one, else a tenth that `seed` draws, of every
             class alike. (Of a generated set, where every item is drawn by itself: the last tenth.)
    """
    if split not in ("train", "valid"):
        raise UserError(f"split must be 'train' or 'valid', not {split!r}")
    if source in GENERATED:
        n = n or (4000 if source == "shapes" else 20000)
        x, label = GENERATED[source](n, np.random.default_rng(seed))
        x = x if x.dtype == np.uint8 else x.astype(np.float32)
        names = SHAPES if source == "shapes" else range(0 if label is None else label.max() + 1)
        held_out = np.arange(n - n // 10, n)
        rows = held_out if split == "valid" else np.arange(n - n // 10)
        return Samples(source, x[rows], None if label is None else label[rows], [str(name) for name in names])

    parts, names = read_images(source, GENERATED)
    x, label = parts.get("test" if split == "valid" else "train") or parts.get("train") or parts["all"]
    rows = np.sort(np.random.default_rng(seed).permutation(len(x))[:n])     # a file may be sorted by class
    if "test" not in parts:
        held_out = a_tenth(np.zeros(len(rows)) if label is None else label[rows], seed)
        rows = rows[held_out if split == "valid" else np.setdiff1d(np.arange(len(rows)), held_out)]
    label = None if label is None else label[rows]
    if label is not None and names:
        empty = [name for name, count in zip(names, np.bincount(label, minlength=len(names))) if not count]
        if empty:
            side = "trained on" if split == "train" else "held out"
            say(f"{source}: no image of class {few(empty)} is {side}")
    return Samples(source, x[rows], label, [str(name) for name in names])


def a_tenth(label, seed):
    """Which items to hold out, at least one of two or more: every tenth, once they are shuffled by `seed` and
    then put in order of their classes."""
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    step = min(10, len(label))
    return np.sort(order[step // 2::step]) if step > 1 else order[:0]
