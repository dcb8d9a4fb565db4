"""What one of two processes does in tests/tools/test_several_processes.py: it trains every model for three
steps on a joint batch in three ways, alone, with DDP and with FSDP, in the last two on its half. The first
process writes what it found: `python tests/joint_losses.py FILE`.
"""
import functools
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
import torch.distributed as dist

import test_all_models as small
import train
from tools import distributed
from tools.runs import averaged

B, STEPS = 4, 3
# One draw per item, no end of an episode, one length of text: then the mean of two halves is that of all.
PLAIN = {"n_draws": 1, "text_share": 1.0, "vae_steps": 0}
CASES = [*small.FIRST.values()]
LOW, WIDER = "pi0-images", {"mlp": 128}     # also in bfloat16


def half(x, rank):
    return x if rank is None else x[rank * B // 2:(rank + 1) * B // 2]


def joint_batch(config):
    batch = small.make_batch(config, B)
    if "action_mask" in batch:
        batch["action_mask"][:] = True
    if "text" in batch:
        batch["text"] = batch["text"][:1].expand(B, -1).clone()
    return batch


def gathered(model):
    """Bytes of the weights that are whole at present."""
    return sum(p.nbytes for p in model.parameters() if not hasattr(p, "to_local"))


def train_case(case, way, rank, dtype=torch.float32):
    known = vars(small.make_config(case))
    changes = PLAIN | (WIDER if dtype == torch.bfloat16 else {})
    model = small.make_model(case, **{key: x for key, x in changes.items() if key in known})
    model.eval()                                # no dropout, no random crops
    batch, draws, most = joint_batch(model.config), small.make_draws(model.config, B), [0]
    own = None if way == "alone" else rank
    batch, draws = ({key: half(x, own) for key, x in parts.items()} for parts in (batch, draws))
    model.loss = functools.partial(model.loss, **draws)
    ema, step = averaged(model, way == "fsdp"), train.LossStep(model)
    if way == "fsdp":
        watched = [*distributed.groups(step)]
        distributed.shard((step, ema), torch.device("cpu"), 2, dtype)
        note = lambda *_: most.__setitem__(0, max(most[0], gathered(model)))
        for part in watched:                    # after the gathering of this one, before the next
            part.register_forward_hook(note, prepend=True)
            part.register_full_backward_hook(note, prepend=True)
    optimizer = torch.optim.AdamW(model.param_groups(0.01), lr=1e-2, fused=True)
    wrapped = torch.nn.parallel.DistributedDataParallel(step) if way == "ddp" else step
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = wrapped(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(distributed.own(ema), distributed.own(model), 0.5)
        mean = loss.detach().clone()
        if own is not None:
            dist.all_reduce(mean)
        losses.append(mean.item() / (1 if own is None else 2))
    if way == "fsdp":                           # what is gathered is divided again as it was
        for p in map(torch.Tensor.detach, model.parameters()):
            assert torch.equal(distributed.split(p.full_tensor(), p).to_local(), p.to_local())
    average = distributed.gather({key: x.detach() for key, x in ema.named_parameters()})
    return {"losses": losses, "average": average, "most": most[0]}


# Large enough that weights and activations count, and not what surrounds them.
MIDDLE = dict(width=192, depth=5, n_heads=4, horizon=16, n_action_steps=8), 24


def allocated(function):
    """The most bytes that function() held at a time of what it allocated, by torch's own account."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return sizes.cumsum(0).max().item()


def measure(processes):
    """Bytes that a process takes in a step of MIDDLE: what stays, and the most that comes and goes."""
    changes, batch_size = MIDDLE
    model = small.make_model("dp_transformer-lowdim", **changes).eval()
    batch = small.make_batch(model.config, batch_size)
    ema, step = averaged(model, processes > 1), train.LossStep(model)
    if processes > 1:
        distributed.shard((step, ema), torch.device("cpu"), processes)
    optimizer = torch.optim.AdamW(model.param_groups(0.01), lr=1e-4, fused=True)

    def train_step():
        step(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):
        train_step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    stays = distributed.own(model) + distributed.own(ema) + [
        x.to_local() if hasattr(x, "to_local") else x for x in states]
    return sum(x.nbytes for x in stays) + allocated(train_step)


def main():
    """By case and way: losses, average of the weights and the most bytes gathered at a time."""
    torch.manual_seed(0)
    rank, _ = distributed.join(torch.device("cpu"), fsdp=True)
    found = {case: {way: train_case(case, way, rank) for way in ("alone", "ddp", "fsdp")} for case in CASES}
    low = {way: train_case(LOW, way, rank, torch.bfloat16) for way in ("alone", "fsdp")}
    found["bfloat16"] = low
    found["bytes"] = {processes: measure(processes) for processes in (1, 2)}
    distributed.leave()
    if rank == 0:
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    with distributed.whole_exit():
        main()
