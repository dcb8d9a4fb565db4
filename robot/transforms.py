"""Pictures between a camera and a network. All of them are resized here, in training and on the robot."""
import math

import numpy as np
import torch

from .errors import UserError, hint, one_line, say_once

ONCE = 2**26                    # bytes of int32 in work at a time
BITS = 22                       # of the weights, as Pillow has them
FITS = ("stretch", "pad", "square", "model")    # model: not done here, see processing.Processing


def triangle(x):
    return (1 - x.abs()).clamp(min=0)


def cubic(x, a=-0.5):
    """Keys' kernel. a = -0.5 is Pillow's; OpenCV and torch take -0.75 without antialiasing."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


FILTERS = {"bilinear": (triangle, 1), "bicubic": (cubic, 2)}     # kernel, how far it reaches


def resize(frames, size, fit="stretch", filter="bilinear", fill=0):
    """Pictures (N, H, W, 3) uint8 -> (N, *size, 3) uint8, size = (height, width).

    fit      "stretch": to the size, whatever becomes of the proportions. "pad": as large as it fits with its
             proportions kept, `fill` around it. "square": padded to a square with `fill` first, then resized
    filter   "bilinear" or "bicubic", both antialiased: where a picture shrinks, every new pixel is a mean
             over the old ones around it, so that nothing thin flickers

    Equal to Pillow's resize bit for bit: width first, then height, each rounded to uint8, with weights of 22
    bits (torch's own uint8 pictures are a level or two off). Released weights were trained on such pictures.
    (Pillow 13 begins with the height where that shrinks more than the width; the releases are older.) The
    data set, while it is read, and a robot's frames go through here alike.
    """
    size = tuple(size)
    height, width = frames.shape[1:3]
    if (height, width) == size:
        return frames
    if fit == "square":
        frames = pad(frames, (max(height, width),) * 2, fill)
    inner = size
    if fit == "pad":
        ratio = max(width / size[1], height / size[0])
        inner = max(1, int(height / ratio)), max(1, int(width / ratio))
    out = np.empty((len(frames), *inner, 3), np.uint8)
    many = max(1, ONCE // (4 * max(int(np.prod(frames.shape[1:])), int(np.prod(inner)) * 3)))
    for at in range(0, len(frames), many):
        x = torch.from_numpy(np.ascontiguousarray(frames[at:at + many]))
        out[at:at + many] = along(along(x, 2, inner[1], filter), 1, inner[0], filter).numpy()
    return pad(out, size, fill)


def along(x, axis, length, filter):
    """uint8 pictures (N, H, W, 3), resized along one axis."""
    if x.shape[axis] == length:
        return x
    start, weights = taps(x.shape[axis], length, filter)
    total = torch.full(tuple(length if a == axis else n for a, n in enumerate(x.shape)), 1 << (BITS - 1),
                       dtype=torch.int32)
    last = x.shape[axis] - 1
    shape = [length if a == axis else 1 for a in range(4)]
    for k in range(weights.shape[1]):           # a weight of 0 may stand past the end
        total += x.index_select(axis, (start + k).clamp(max=last)) * weights[:, k].view(shape)
    return (total >> BITS).clamp(0, 255).byte()


def taps(old, new, filter):
    """-> the first old pixel that each new one is made of (new,), and the weights of it and of its
    successors (new, taps): int32, in units of 2**-22."""
    kernel, reach = FILTERS[filter]
    scale = old / new
    wide = max(scale, 1.0)
    reach = reach * wide
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    start = (centre - reach + 0.5).long().clamp(min=0)          # .long() cuts towards 0, as C does
    stop = (centre + reach + 0.5).long().clamp(max=old)
    at = torch.arange(2 * math.ceil(reach) + 1)
    weights = kernel((at + start[:, None] - centre[:, None] + 0.5) * (1 / wide))
    weights = torch.where(at < (stop - start)[:, None], weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True) * 2**BITS
    return start, (weights + weights.sign() * 0.5).int()


def pad(frames, size, fill):
    """Pictures in the middle of larger ones; the odd row or column is below or on the right."""
    height, width = frames.shape[1:3]
    if (height, width) == tuple(size):
        return frames
    out = np.full((len(frames), *size, 3), fill, np.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    out[:, top:top + height, left:left + width] = frames
    return out


def through_jpeg(frames):
    """Pictures (N, H, W, 3) uint8 as OpenCV's JPEG codec leaves them, at its usual quality of 95: RDT's
    program on the robot sends its pictures through it, as its training data had been. Without OpenCV they
    stay as they are, which is said once."""
    try:
        import cv2
    except ImportError:
        say_once("jpeg: pictures do not go through it, OpenCV is missing: pip install opencv-python-headless")
        return frames
    return np.stack([cv2.imdecode(cv2.imencode(".jpg", frame)[1], cv2.IMREAD_COLOR) for frame in frames])


def check_rule(rule, where):
    """The `images:` of a processing description. Raises UserError."""
    for key, known in (("fit", FITS), ("filter", tuple(FILTERS))):
        if rule.get(key, known[0]) not in known:
            raise UserError(f"{where}: {key}: {rule[key]!r} is not known{hint(rule[key], known)}")
    fill = rule.get("fill", 0)
    if type(fill) is not int or not 0 <= fill <= 255:
        raise UserError(f"{where}: fill: {fill!r} should be a grey level, 0 to 255")
    if type(rule.get("jpeg", False)) is not bool:
        raise UserError(f"{where}: jpeg: {one_line(repr(rule['jpeg']), 40)} should be true or false")


def same_shape(a, b):
    """Whether two sizes (H, W) have the same ratio of height to width, within a hundredth."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= 0.01 * a[1] * b[0]
