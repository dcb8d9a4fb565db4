"""Memory of a training step on each of N GPUs, computed from the module itself without having it:
`python -m tools.bench --memory --model pi0 --preset pi0` prints a table.

    weights, AdamW, average     4, 8 and 4 bytes a number, divided by N with --fsdp
    gathered                    with --fsdp: what is in no block, whole; the block that is at work, and the
                                one that is fetched meanwhile. In bfloat16 also autocast's copies of weights
    gradients                   4 bytes for each number that is trained, divided as the weights
    activations                 the most that loss and backward pass hold beside all this
    at a time                   the most that all this takes: activations go while gradients come, and
                                with --fsdp a block's gradient is whole until it has been summed

Loss and backward pass are run on the meta device, where tensors have shapes and no numbers. Attention counts
as fused, as it is on a GPU. In bfloat16 all activations do, where autocast leaves some in float32 (norms,
softmax). Not counted: CUDA itself (about 0.5 GB), what NCCL keeps, gaps between blocks of memory.
"""
import contextlib
import functools
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools import distributed


class Fused(torch.autograd.Function):
    """Attention that keeps its inputs, its output and a number per query, as FlashAttention does."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


@contextlib.contextmanager
def fused_attention():
    """No mode of torch would do: layers that are computed again in the backward pass would not see it."""
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, **_: Fused.apply(q, k, v, attn_mask)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class Held(TorchDispatchMode):
    """Bytes of the tensors that are made while it is on: `now`, and `most` at a time."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, {}

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is not None and id(storage) not in before and id(storage) not in self.known:
                self.known[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage))
                self.add(storage.nbytes())
        return out

    def gone(self, key):
        self.now -= self.known.pop(key)


def step_bytes(model, batch, processes, low=4):
    """The most bytes that loss and backward pass hold beside the weights; processes 0: without the gradients
    of the weights. Of several processes, each keeps its share of a block's gradient as soon as the block is
    finished; until then all of it is there, `low` bytes a number, and at the end in float32 to be summed."""
    held, waiting = Held(), {}
    for block in distributed.blocks(model) if processes > 1 else ():
        own = {p for p in block.parameters() if p.requires_grad}
        waiting |= dict.fromkeys(own, (own, sum(p.numel() for p in own)))

    def finished(p):
        p.grad = None
        left, n = waiting.get(p, (None, 0))
        held.add(p.numel() * (4 if left is None else low))
        if left is not None:
            left.remove(p)
            if not left:
                held.add(4 * n)
                held.add((4 / processes - low - 4) * n)
    forget = lambda p: setattr(p, "grad", None)
    hooks = [p.register_post_accumulate_grad_hook(finished if processes else forget)
             for p in model.parameters() if p.requires_grad]
    with held, fused_attention():
        model.loss(batch)["loss"].backward()
    for hook in hooks:
        hook.remove()
    return held.most


def meta_batch(config, B):
    """A batch of the shapes that train.py would hand over, without numbers."""
    get = lambda name: getattr(config, name, 0)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    if get("data_shape"):
        label = {"label": empty(B, dtype=torch.int64)} if config.n_classes else {}
        return {"x": empty(B, *config.data_shape)} | label
    steps = config.n_obs_loaded
    batch = {"actions": empty(B, config.pred_horizon, config.action_dim), "control_hz": empty(B),
             "action_mask": empty(B, config.pred_horizon, dtype=torch.bool),
             "state": empty(B, steps, config.state_dim)}
    if get("encoders") == "none":           # pictures and text come as tokens
        tokens = config.n_obs_steps * config.cameras * config.tokens_per_image
        batch |= {"image_embeds": empty(B, tokens, config.vit_width),
                  "lang_embeds": empty(B, config.text_len, config.t5_width)}
    else:
        if config.n_cameras:
            batch["images"] = empty(B, steps, config.n_cameras, 3, *config.image_size, dtype=torch.uint8)
        if get("text_len"):
            batch["text"] = empty(B, config.text_len, dtype=torch.int64)
    if get("text_dim"):
        batch["text_embedding"] = empty(B, config.text_dim)
    if get("unified_dim") and not config.action_names:
        batch |= {f"{kind}_valid": empty(B, config.unified_dim) for kind in ("action", "state")}
    return batch


def per_gpu(module, config, batch_size, processes, dtype):
    """Bytes on each of `processes` GPUs, by the names above: with one, or with --fsdp on several."""
    with torch.device("meta"):
        model = module.Model(config).eval()         # no dropout: its masks are small
    size = lambda part: sum(p.numel() for p in part.parameters())
    blocks = [(size(block), distributed.gathered_in(block, dtype)) for block in distributed.blocks(model)]
    every, trained = size(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    copied = 2 if dtype == torch.bfloat16 else 0            # bytes of the copy of a float32 weight
    rest = every - sum(n for n, _ in blocks)
    low = min([kind.itemsize for _, kind in blocks], default=4)
    gathered, average = copied * every, 4 * trained
    if processes > 1:
        copies = copied * (rest + sum(n for n, kind in blocks if kind == torch.float32))
        gathered = 4 * rest + copies + 2 * max([n * kind.itemsize for n, kind in blocks], default=0)
        average = 4 * every / processes
    batch = meta_batch(config, batch_size)
    with torch.no_grad():
        model.to(dtype).loss(batch)                 # tables that a model file keeps are made here
    step = functools.partial(step_bytes, model, batch)
    stays = {"weights": 4 * every / processes, "AdamW": 8 * trained / processes, "average": average,
             "gathered": gathered}
    return stays | {"gradients": 4 * trained / processes, "activations": step(0),
                    "at a time": sum(stays.values()) + step(processes, low)}


def table(module, config, batch_size, dtype=torch.bfloat16, processes=(1, 8, 64)):
    """Markdown: a row for each number of GPUs, in GB (10^9 bytes) on each."""
    rows = [per_gpu(module, config, batch_size, n, dtype) for n in processes]
    lines = ["| GPUs | " + " | ".join(rows[0]) + " |", "|---|" + "---|" * len(rows[0])]
    for n, row in zip(processes, rows):
        lines.append(f"| {n} | " + " | ".join(f"{x / 1e9:.1f}" for x in row.values()) + " |")
    return "\n".join(lines)
