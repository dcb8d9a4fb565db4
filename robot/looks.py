"""How a camera's pictures look, in 8 x 8 colours: enough to tell two cameras apart, or a picture from its
mirror image. Data sets, checkpoints and a robot's frames are compared by these looks, of a sample of frames.
"""
import numpy as np

from .transforms import resize

SIDE = 8                        # of a look, in pixels
CLEARLY = 0.7                   # another reading of a picture is believed if it is so much less off

# What happens to cameras between two recordings, undone: look (8, 8, 3) -> look.
CHANGES = {"mirrored": lambda look: look[:, ::-1], "upside down": lambda look: look[::-1],
           "turned by 180 degrees": lambda look: look[::-1, ::-1],
           "with red and blue exchanged": lambda look: look[..., ::-1]}


def spread(count, limit):
    """Indices of at most `limit` of `count` things, evenly spread, first and last among them: (n,) int."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def look_of(frames):
    """Pictures (N, H, W, 3) uint8 -> (N, 8, 8, 3) float32, 0..255."""
    k = max(1, min(frames.shape[1:3]) // 64)        # of a large picture, every k-th pixel is enough
    return resize(frames[:, ::k, ::k], (SIDE, SIDE)).astype(np.float32)


def distance(a, b):
    """Mean absolute difference of two looks, in grey levels."""
    return float(np.abs(a - b).mean())


def change_of(look, known):
    """The name in CHANGES that explains why `look` is not like `known`; "" if none does clearly."""
    as_it_is = distance(look, known)
    undone = {name: distance(undo(look), known) for name, undo in CHANGES.items()}
    best = min(undone, key=undone.get)
    return best if undone[best] < CLEARLY * as_it_is else ""


def swapped(looks, known):
    """Pairs of cameras that clearly look like each other's. looks, known: {camera: look}."""
    cameras = [camera for camera in known if camera in looks]
    for i, a in enumerate(cameras):
        for b in cameras[i + 1:]:
            straight = distance(looks[a], known[a]) + distance(looks[b], known[b])
            crossed = distance(looks[a], known[b]) + distance(looks[b], known[a])
            if crossed < CLEARLY * straight:
                yield a, b
