"""Several GPUs: torchrun starts a process for each, and these functions keep them together.

DDP keeps whole weights in every process and averages the gradients. --fsdp (FSDP2), for presets of a billion
weights, keeps a part of every weight, of its average and of the optimiser's state in each process. With one
process nothing here does anything.
"""
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
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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


def shard(parts, device, world):
    """--fsdp: the weights are whole from a step's forward to its backward pass. One group, not one per block:
    model files use parts of a block by other ways than its forward, which FSDP2 would not notice."""
    from torch.distributed.device_mesh import init_device_mesh  # seconds, which others need not wait for
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (world,))
    for part in parts:
        fully_shard(part, mesh=mesh)


def gather(x):
    """A state_dict whose tensors are whole: on the first process, on its CPU. All processes take part."""
    if isinstance(x, dict):
        return {key: gather(value) for key, value in x.items()}
    if not hasattr(x, "full_tensor"):  # no DTensor
        return x
    whole = x.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def split(whole, like):
    """The inverse of `gather` for one tensor."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def own(module, without=()):
    """The parameters as far as this process keeps them, but those of these names."""
    return [p.to_local() if hasattr(p, "to_local") else p for name, p in module.named_parameters()
            if name not in without]
