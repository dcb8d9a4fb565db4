"""Observers of a model file at work: which modules are called from which lines with which shapes, where the
equations are computed, and which keys a softmax gives a probability of 0. explain.py prints what they saw."""
import ast
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tools.equations import computed


@dataclass
class Node:
    """A call of a module, or a line with an equation, and what happened inside it."""
    line: int                   # of the model file
    text: str
    shape: str = ""
    inside: list = field(default_factory=list)
    name: str = ""

    def like(self, shapes=True):
        """Equal for calls that a reader need not see twice."""
        return (self.line, self.text, self.shape * shapes, *(node.like(shapes) for node in self.inside))


def shape_of(x):
    """Shapes of the tensors in whatever a module takes or gives."""
    def tensors(x):
        if isinstance(x, (dict, list, tuple)):
            return [t for part in (x.values() if isinstance(x, dict) else x) for t in tensors(part)]
        return [x] if torch.is_tensor(x) else []
    shapes = [str(tuple(t.shape)) if t.ndim else "a number" for t in tensors(x)]
    return ", ".join(shapes if len(shapes) <= 2 else [shapes[0], f"{len(shapes) - 1} more"])


class Watch(TorchFunctionMode):
    """`with Watch(file, model) as watch:` what the model does is in watch.root, a tree of Nodes, in
    watch.reached, numbers of equations, and in watch.masks. Without a model: while one is built."""

    def __init__(self, file, model=None):
        super().__init__()
        self.model, self.file, source = model, file, Path(file).read_text(encoding="utf-8")
        self.tags = computed(source)
        self.lines = source.splitlines()
        self.classes = {node.name: node.lineno for node in ast.parse(source).body
                        if isinstance(node, ast.ClassDef)}
        self.root = Node(0, "")
        self.stack, self.masks, self.reached = [self.root], {}, set()

    def __enter__(self):
        self.handles = []
        for name, module in self.model.named_modules() if self.model else ():
            if name:
                self.handles += [module.register_forward_pre_hook(self.entered(name), with_kwargs=True),
                                 module.register_forward_hook(self.left)]
        self.before = sys.gettrace()
        sys.settrace(self.called)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        sys.settrace(self.before)
        for handle in self.handles:
            handle.remove()

    def here(self):
        """The innermost line of the model file that is running."""
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return frame.f_lineno if frame else 0

    def entered(self, name):
        def hook(module, args, kwargs):
            text = type(module).__name__
            if type(module).__module__ == type(self.model).__module__:
                text += f" ({self.classes[text]})"
            node = Node(self.here(), text, shape_of([*args, *kwargs.values()]), name=name)
            self.stack[-1].inside.append(node)
            self.stack.append(node)
        return hook

    def left(self, module, args, output):
        node = self.stack.pop()
        # An activation, a norm, a dropout of torch's own is no news: what it gives looks like what it takes.
        if node.shape == shape_of(output) and not node.inside and "(" not in node.text and all(
                p.ndim < 2 for p in module.parameters()):
            self.stack[-1].inside.remove(node)
        node.shape += f" -> {shape_of(output)}"

    def called(self, frame, event, arg):
        """sys.settrace: follow the model file's own functions, line by line."""
        if frame.f_code.co_filename != self.file:
            return None
        pending = None                              # the tagged statement that is being computed

        def finished(value):
            first, last, names, numbers = pending
            value = [frame.f_locals[n] for n in names if n in frame.f_locals] if value is None else value
            line = frame.f_lineno if frame.f_code.co_name == "<lambda>" else first
            shown = self.lines[line - 1].split("  #")[0].strip()
            shown = shown[:65] + (" ..." if last > line == first or len(shown) > 65 else "")
            text = f"{''.join(f'[{n}]' for n in numbers)} {shown}"
            self.reached.update(numbers)
            self.stack[-1].inside.append(Node(line, text, shape_of(value)))

        def local(frame, event, arg):
            nonlocal pending
            if pending and event == "return":
                finished(arg)
                pending = None
            elif pending and event == "line" and not pending[0] <= frame.f_lineno <= pending[1]:
                finished(None)
                pending = None
            if event == "line" and pending is None:
                pending = self.tags.get(frame.f_lineno)
            return local
        return local

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            self.note_mask(attention_of(*args, **kwargs), "attention")
        elif getattr(function, "__name__", "") == "softmax" and result.shape[-1] > 1:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self.note_mask(result.movedim(dim, -1), "softmax")
        return result

    def note_mask(self, p, kind):
        """p (B, .., N, .., M) probabilities over keys."""
        seen = pattern(p.detach() > 0)
        name = re.sub(r"\d+", "*", self.stack[-1].name) or type(self.model).__name__
        key = (kind, self.here(), name, tuple(p.shape[1:]), tuple(map(tuple, seen.tolist())))
        self.masks[key] = self.masks.get(key, 0) + 1


@torch.no_grad()
def attention_of(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The probabilities that F.scaled_dot_product_attention does not return."""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    logits = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1)


def pattern(seen):
    """Who sees whom in the first item: (B, .., M) bool -> (N, M). Axes along which nothing changes (heads)
    are left out; if nothing changes at all, one row stands for all."""
    seen = seen[0].cpu()
    varying = [axis for axis in range(seen.ndim - 1) if not (seen == seen.narrow(axis, 0, 1)).all()]
    for axis in reversed(range(seen.ndim - 1)):
        if axis not in varying[-1:]:
            seen = seen.select(axis, 0)
    seen = seen.reshape(-1, seen.shape[-1])
    for n in range(1, len(seen)):                   # queries that share keys are lined up one after the other
        if len(seen) % n == 0 and (seen.view(-1, n, seen.shape[-1]) == seen[:n]).all():
            return seen[:n]
    return seen
