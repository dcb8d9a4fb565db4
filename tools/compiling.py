"""Training steps under torch.compile."""
import inspect
import sys

import torch


def compiled(step):
    """train.LossStep, compiled.

    torch.compile looks behind functools.lru_cache: it would compute the tables of a model file anew in every
    step, and copy them to the device. They depend on plain numbers alone, so they are constants to it. That
    is said here, not in the model files, because saying it takes two seconds (it imports torch._dynamo)."""
    for function in vars(sys.modules[type(step.model).__module__]).values():
        if hasattr(function, "cache_clear") and inspect.isfunction(function.__wrapped__):
            torch.compiler.assume_constant_result(function.__wrapped__)
    return torch.compile(step)
