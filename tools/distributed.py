"""Several GPUs: torchrun starts a process for each, and these functions keep them together.

DDP keeps whole weights in every process and averages the gradients. --fsdp (FSDP2), for presets of a billion
weights, keeps a part of every weight, of its average and of the optimiser's state in each process, and
gathers the weights block by block where they are needed. With one process nothing here does anything.
"""
import contextlib
import datetime
import inspect
import os
import sys
import warnings

import torch
import torch.distributed as dist

from robot.cli import environ_number
from robot.errors import UserError


def join(device, fsdp):
    """-> (number of this process, how many there are)"""
    rank, world = environ_number("RANK", 0), environ_number("WORLD_SIZE", 1)
    if rank >= max(1, world):
        raise UserError(f"RANK={rank} of WORLD_SIZE={world} in the environment: leave them to torchrun")
    if fsdp and world == 1:
        raise UserError("--fsdp needs several processes: torchrun --nproc_per_node 4 train.py ... --fsdp")
    if fsdp and not hasattr(getattr(torch, device.type).Stream, "record_event"):  # torch 2.6 on a CPU
        raise UserError(f"--fsdp: FSDP2 of torch {torch.__version__} does not run on {device.type}: "
                        f"pip install 'torch>=2.13'")
    if world > 1:
        try:
            # Others wait while process 0 evaluates, or makes one file of the shards.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=2))
        except (ValueError, RuntimeError) as e:  # MASTER_ADDR is not set, or nobody answers there
            raise UserError(f"the {world} processes do not find each other, start them by torchrun: {e}"
                            ) from None
        if device.type == "cuda":
            torch.cuda.set_device(device)
    return rank, world


def leave():
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def whole_exit():
    """Wraps a command. Where there are several processes, each of them ends as soon as the command has, and
    Python is not taken down: torch's threads outlive the process group, and one that lets go of a tensor
    meanwhile aborts the process, although all is saved (github.com/pytorch/pytorch/issues/117762)."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    status = 0
    try:
        yield
    except SystemExit as e:
        if not several:
            raise
        status = e.code or 0
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait():
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def any_process(flag, device):
    """Whether `flag` is set in any of the processes. All of them take part."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


def blocks(module):
    """The modules in a model's ModuleLists, the outermost ones: layers, residual blocks, encoders."""
    for child in module.children():
        if isinstance(module, torch.nn.ModuleList) and not isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from blocks(child)


def ways_in(module):
    """Names of the methods beside `forward` by which a model file uses this module: `prepare`, `memory`, ...
    They are the public ones that forward does not call itself."""
    own = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")]
    public = {name for kind in own for name, x in vars(kind).items()
              if inspect.isfunction(x) and not name.startswith("_")}
    return sorted(public - {"forward", *type(module).forward.__code__.co_names})


def groups(model):
    """What FSDP gathers and frees together, parts before the whole: every block, and within it a part that
    has ways in of its own, such as a cross-attention whose keys and values are computed ahead of the block.
    The rest of the model is one more group."""
    for block in blocks(model):
        for part in reversed([*block.modules()]):
            if any(True for _ in part.parameters()) and (part is block or ways_in(part)):
                yield part


def gathered_in(part, dtype):
    """In which type a group is gathered. Torch's own norms, and those with statistics, want float32."""
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    wants = any(isinstance(m, norms) and [*m.parameters()] for m in part.modules()) or [*part.buffers()]
    return torch.float32 if wants else dtype


def shard(models, device, world, dtype=torch.float32):
    """--fsdp: each weight is divided along its first axis. A block's weights are whole from the beginning of
    its forward to the end, and again in the backward pass; the rest (embeddings, heads, ...) is whole for the
    whole step. Of models that come from the CPU, the device never holds more than a block whole. dtype: in
    which blocks are gathered, see gathered_in."""
    from torch.distributed.device_mesh import init_device_mesh  # seconds, which others need not wait for
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (world,))
    # Of blocks that return a view, which no model file changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # Autocast would keep a bfloat16 copy of each weight until the backward pass. What is gathered in bfloat16
    # needs no copy. Gradients are summed in float32, and inputs keep their type.
    policy = lambda part: MixedPrecisionPolicy(gathered_in(part, dtype), torch.float32,
                                               cast_forward_inputs=False)
    for model in models:
        for part in groups(model):
            fully_shard(part, mesh=mesh, mp_policy=policy(part))
            for name in ways_in(part):
                register_fsdp_forward_method(part, name)
        fully_shard(model, mesh=mesh)


def gather(x):
    """A state_dict whose tensors are whole: on the first process, on its CPU. All processes take part."""
    if isinstance(x, dict):
        return {key: gather(value) for key, value in x.items()}
    if not hasattr(x, "full_tensor"):  # no DTensor
        return x
    whole = x.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def split(whole, like):
    """What this process keeps of a tensor that all have whole (mapped from a file) as `like` is divided."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor
    rows, rank = -(-len(whole) // dist.get_world_size()), dist.get_rank()   # the last may have less, or none
    own, mesh = whole[rank * rows:(rank + 1) * rows].to(like.device), like.device_mesh
    return DTensor.from_local(own, mesh, like.placements, shape=like.shape, stride=like.stride())


def own(module, without=()):
    """The parameters as far as this process keeps them, but those of these names."""
    return [p.to_local() if hasattr(p, "to_local") else p for name, p in module.named_parameters()
            if name not in without]
