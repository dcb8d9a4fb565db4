"""Training steps under torch.compile."""
import sys

import torch

from robot.graph import constants


def compiled(step):
    """train.LossStep, compiled."""
    constants(sys.modules[type(step.model).__module__])
    return torch.compile(step)
