"""Faster training steps: torch.compile, and memory that is kept."""
import ctypes
import sys

import torch

from robot.graph import constants


def compiled(step):
    """train.LossStep, compiled."""
    constants(sys.modules[type(step.model).__module__])
    return torch.compile(step)


def keep_memory():
    """On Linux, let freed memory stay with the process. glibc gives large blocks back to the system, which
    fills them with zeros, page by page, when the next training step asks for them again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie idle at the heap's end
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger blocks are given back all the same
