"""What lies between a camera and a network: the one way in which pictures are resized."""
import numpy as np
import torch
import torch.nn.functional as F

ONCE = 2**26                    # bytes of float32 in work at a time


def resize(frames, size, fit="stretch", filter="bilinear", fill=0):
    """Pictures (N, H, W, 3) uint8 -> (N, *size, 3) uint8, size = (height, width).

    Bilinear and antialiased: where a picture shrinks, every new pixel is a mean over the old ones around it,
    so that nothing thin flickers. The data set, while it is read, and a robot's frames go through here alike.
    """
    size = tuple(size)
    if frames.shape[1:3] == size:
        return frames
    out = np.empty((len(frames), *size, 3), np.uint8)
    many = max(1, ONCE // (4 * max(int(np.prod(frames.shape[1:])), int(np.prod(size)) * 3)))
    for at in range(0, len(frames), many):
        x = torch.from_numpy(np.ascontiguousarray(frames[at:at + many])).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        out[at:at + many] = x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return out


def same_shape(a, b):
    """Whether two sizes (H, W) have the same ratio of height to width, within a hundredth."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= 0.01 * a[1] * b[0]
