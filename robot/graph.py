"""A policy's sampler as one graph: the shortest time from an observation to a chunk.

    graph = Graph(draw, model, batch)           draw(batch, noise=..., [step_noise=...]) -> chunks
    chunks = graph(batch, generator=generator)

torch.compile makes one function of all steps of a sampler, with small operations fused and, on a CPU, weights
packed. That takes a minute or more. torch keeps what it compiled, so that the next start is faster. On CUDA
the function is then recorded, so that one call starts all of its kernels.

Shapes are fixed, those of the first batch: `fits` says whether another one has them. The noise is drawn
outside, from the same generator in the same order as `draw` would: the chunks are those of plain sampling.
"""
import contextlib
import inspect
import sys
import warnings
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from .errors import UserError, one_line, say


class Graph:
    """draw: samples with `model`, whose weights stay as they are. batch, more: tensors as it will get them.
    Raises UserError."""

    @torch.no_grad()
    def __init__(self, draw, model, batch, more=()):
        self.like, self.noise = outline(batch, more), []
        self.device = next(iter(batch.values())).device
        with NoiseShapes(self.noise):           # sampled plainly once, to see which noise is drawn
            draw(batch, *more)
        constants(sys.modules[type(model).__module__])
        compiled = torch.compile(draw, fullgraph=True, dynamic=False)
        names, a, b = list(batch), len(batch), len(batch) + len(more)

        def run(*tensors):
            noise, step_noise = tensors[b], list(tensors[b + 1:])              # DDPM draws some in every step
            return compiled(dict(zip(names, tensors)), *tensors[a:b], noise=noise,
                            **{"step_noise": step_noise} if step_noise else {})

        self.run, tensors = run, self.tensors(batch, more, None)
        try:
            with packed_weights(self.device):
                run(*tensors)
        except RuntimeError as e:               # the compiler's errors are of this kind
            raise UserError(f"--compile: torch.compile cannot compile {type(model).__name__}.sample (leave "
                            f"--compile out): {one_line(e)[:200]}") from None
        if self.device.type == "cuda":
            try:
                self.run = recorded(run, tensors)
            except RuntimeError as e:
                say(f"--compile: {type(model).__name__}.sample is compiled, but cannot be recorded as a CUDA "
                    f"graph: {one_line(e)[:150]}")

    def fits(self, batch, more=()):
        return outline(batch, more) == self.like

    @torch.no_grad()                            # as it was compiled
    def __call__(self, batch, more=(), generator=None):
        """batch, more: tensors that fit -> the chunks"""
        return self.run(*self.tensors(batch, more, generator))

    def tensors(self, batch, more, generator):
        # As a model's own `randn`: a CPU generator gives the same numbers on every device.
        draw = lambda shape: torch.randn(shape, generator=generator).to(self.device)
        return [*batch.values(), *more, *map(draw, self.noise)]


def outline(batch, more):
    return list(batch), [(x.shape, x.dtype, x.device) for x in (*batch.values(), *more)]


class NoiseShapes(TorchFunctionMode):
    """Within a `with` block: notes the shapes that torch.randn is asked for."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.randn:
            self.shapes.append(args[0])
        return function(*args, **(kwargs or {}))


class AsOnArm:
    """torch.ops.mkldnn, which says that it runs on ARM: there, torch.compile has oneDNN pack float32 weights
    as well. Elsewhere it leaves them to MKL, which is slower on AMD (robot/packing.py)."""

    def __getattr__(self, name):
        return (lambda: True) if name == "_is_mkldnn_acl_supported" else getattr(torch.ops.mkldnn, name)


@contextlib.contextmanager
def packed_weights(device):
    """Within a `with` block, torch.compile packs the weights of what it compiles for a CPU, that is of what
    is called for the first time, without gradients. The weights are to stay as they are."""
    if device.type != "cpu":
        yield
        return
    from torch._inductor import config          # seconds to import
    from torch._inductor.fx_passes import mkldnn_fusion
    # Among torch.compile's options, "freezing" would come too late: the tracer looks at the setting itself.
    with config.patch(freezing=True), mock.patch.object(mkldnn_fusion, "mkldnn", AsOnArm(), create=True):
        yield


def constants(module):
    """Tell torch.compile that the tables of a model file are constants.

    It looks behind functools.lru_cache and would compute them anew at every call, and copy them to the
    device. They depend on plain numbers alone. That is said here, not in the model files, because saying it
    takes two seconds (it imports torch._dynamo)."""
    warnings.filterwarnings("ignore", "(?s)Dynamo detected a call to a `functools.lru_cache`")
    for function in vars(module).values():
        if hasattr(function, "cache_clear") and inspect.isfunction(function.__wrapped__):
            # A function may stand for one constant tensor only: not one that makes a tensor of any `numbers`.
            if "numbers" not in inspect.signature(function).parameters:
                torch.compiler.assume_constant_result(function.__wrapped__)


def recorded(function, tensors):
    """On CUDA, function(*tensors) as a graph -> a function of tensors of the same shapes. Its result is
    overwritten by the next call."""
    tensors = [x.clone() for x in tensors]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):              # a library's first call allocates, which no graph may do
        function(*tensors)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a camera's, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(*tensors)

    def replay(*new):
        for x, its in zip(tensors, new):
            x.copy_(its)
        graph.replay()
        return result
    return replay
