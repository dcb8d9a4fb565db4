"""What is timed beside a peer: a Work builds a Pair, two functions that do the same."""
import copy
import importlib
import sys
import types
from dataclasses import dataclass
from typing import Callable

import torch

from robot.errors import UserError, one_line
from robot.graph import constants, packed_weights
from robot.packing import pack
from tools.speed import keep_memory


@dataclass
class Pair:
    """One call each. The tensors that they return are compared before the clock runs. bfloat16: ours once
    more, in that type."""
    theirs: Callable
    ours: Callable
    bfloat16: Callable
    compare: bool = True            # False: other networks of the same size, whose numbers must differ


@dataclass
class Work:
    """`name`: what is done, for a table. build(): a Pair. Only what is timed is built."""
    name: str
    build: Callable


def empty(name, **content):
    """An installed module of this name, or one that holds nothing but `content`: for what a file of the peer
    imports but its network does not use."""
    try:
        importlib.import_module(name)
    except ImportError:
        parent, _, child = name.rpartition(".")
        if parent:
            empty(parent)
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        if parent:
            setattr(sys.modules[parent], child, module)


def imported(name, folder=None):
    """The module `name`, of a checkout if `folder` is given. Raises UserError for a missing package."""
    first = [str(folder)] if folder else []
    sys.path[:0] = first
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise UserError(f"{name} needs the package {e.name}: pip install {e.name}") from None
    except (ImportError, RuntimeError, SyntaxError, AttributeError, ValueError) as e:
        raise UserError(f"{name} cannot be imported here: {one_line(e, 200)}") from None
    finally:                    # a checkout has a train.py, too: what is imported later is not the peer's
        del sys.path[:len(first)]


def randomise(model, std=0.02):
    """Random weights where an initialisation leaves zeros, which would hide a mistake."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def clones(model):
    return {key: x.clone() for key, x in model.state_dict().items()}


def pair_of_chunks(theirs, model, sample, compare=True, graph=False):
    """theirs(): a chunk; sample(model): one of ours, with the same noise. graph: ours as one graph each."""
    pack(model.eval().requires_grad_(False))
    half = copy.deepcopy(model).to(torch.bfloat16)
    functions = [lambda: sample(model), lambda: sample(half).float()]
    if graph:
        constants(sys.modules[type(model).__module__])
        functions = [torch.compile(function, fullgraph=True, dynamic=False) for function in functions]
        with packed_weights(torch.device("cpu")), torch.no_grad():
            for function in functions:
                function()
    no_grad = torch.no_grad()
    return Pair(no_grad(theirs), *map(no_grad, functions), compare)


def pair_of_steps(their_model, their_loss, our_model, our_loss, compare=True, **optimiser):
    """Training steps: loss, backward, AdamW, moving average of the weights. their_loss(), our_loss(): of the
    same batch, noise and times. Theirs has torch's default AdamW and averages parameter by parameter, as
    Diffusion Policy's ema_model.py does."""
    keep_memory()               # of both

    def slow(old, new):
        for average, p in zip(old, new):
            average.mul_(0.999)
            average.add_(p, alpha=0.001)

    def steps(model, loss_of, average, **fused):
        old, new = list(copy.deepcopy(model).parameters()), list(model.parameters())
        optimizer = torch.optim.AdamW(new, **optimiser, **fused)

        def step(dtype=torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                average(old, new)
            return loss.detach()
        return step

    fast = lambda old, new: torch._foreach_lerp_(old, new, 0.001)
    ours = steps(pack(our_model), our_loss, fast, fused=True)

    def half():
        ours(torch.bfloat16)        # no loss to compare: the weights have moved on since the first step
    return Pair(steps(their_model, their_loss, slow), ours, half, compare)
