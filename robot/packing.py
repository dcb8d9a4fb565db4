"""Layers as a CPU computes them fastest: the same numbers, by the products of oneDNN, which torch contains.

    pack(model)     a policy that acts on a CPU, or a model that is trained there

Two things are slow in torch's own layers. They leave float32 products to MKL, which uses no AVX-512 on AMD
processors and takes twice as long. And a chunk for one robot is a few rows times many large matrices: then
reading the matrices is nearly all the work, and it has the speed of the memory only if they were packed, that
is stored in the order in which the kernel reads them. A convolution over a short sequence is such a product
too: its windows, all taps side by side, times its weights. Trained, it stays torch's own, but for the
gradient of its weights: in bfloat16 torch takes several times as long as for that product.

`pack` exchanges the classes of layers and nothing else: parameters, their names and gradients stay, and with
them copies, `.to()` and what is saved. Weights are packed when a layer first meets few rows without
gradients, and anew when they have changed (in place through `.data`, nobody notices); weights that are
trained never are. Packed ones stand beside the plain ones, so that such a layer holds its weights twice: all
layers of dp_cnn do, and of pi0's and pi05's those of the action expert, a tenth.

The operators are those that torch.compile emits for weights that stay as they are (torch/_inductor/
fx_passes/mkldnn_fusion.py). Without them, on another device and in other types the layers are torch's own.
"""
import functools
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F

from .errors import say_once

MOST_ROWS = 128         # with more rows the arithmetic takes longer than the reading: plain weights will do
LEAST = 2**14           # numbers of a matrix that is worth packing
SHORT = 16              # steps of a sequence up to which torch's gradient of a convolution's weights is slow

PACKED = weakref.WeakKeyDictionary()    # layer -> (its weights, their version, these weights packed)


def pack(model):
    """Let the linear layers and 1D convolutions of a model on a CPU compute as above. -> model"""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        for layer in model.modules():
            fast = LAYERS.get(type(layer))
            if fast and layer.weight.device.type == "cpu" and (fast is Linear or one_product(layer)):
                layer.__class__ = fast
    return model


# ---------------------------------------------------------------- products

def onednn(x, weight, bias=None):
    """x (..., I), weight (O, I), plain or packed -> (..., O)"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def types():
    """Those that oneDNN computes in on this machine."""
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def takes(x, weight):
    """Whether x times these weights is computed here. In bfloat16 training torch calls oneDNN itself."""
    trained_low = torch.is_autocast_enabled("cpu") or torch.is_grad_enabled() and x.dtype == torch.bfloat16
    return not torch.compiler.is_compiling() and not trained_low \
        and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in types()


class Product(torch.autograd.Function):
    """F.linear in float32, whose gradients are products of oneDNN as well."""

    @staticmethod
    def forward(x, weight, bias):
        return onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # contiguous: an expanded tensor's rows are one row in memory, which oneDNN refuses
        g, x = g.contiguous(), x.contiguous()
        rows, columns = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        return (onednn(g, weight.T) if of_x else None,
                onednn(rows.T, columns.T) if of_weight else None,
                rows.sum(0) if of_bias else None)


def product(layer, x, bias):
    """F.linear(x, layer._matrix(), bias): x (..., I), the matrix (O, I) -> (..., O)"""
    if torch.compiler.is_compiling():       # robot/graph.py has the compiler pack it
        return F.linear(x, layer._matrix(), bias)
    if torch.is_grad_enabled():
        return Product.apply(x, layer._matrix(), bias)
    few = x.shape[:-1].numel() <= MOST_ROWS and layer.weight.numel() >= LEAST
    return onednn(x, packed(layer) if few and fixed(layer.weight) else layer._matrix(), bias)


def fixed(weight):
    """Whether weights may be packed. Those that are trained never are: fused AdamW changes them without
    raising their version."""
    return not weight.requires_grad and not weight.is_inference()


def packed(layer):
    """Packed weights of a layer; they are packed anew if it has other ones now, or of another type."""
    weight = layer.weight
    of, version, blocks = PACKED.get(layer, (weight, None, None))
    if (of.data_ptr(), of.dtype, version) != (weight.data_ptr(), weight.dtype, weight._version):
        blocks = torch.ops.mkldnn._reorder_linear_weight(layer._matrix().contiguous(), None)
        # The plain weights are kept too: no others can then come to lie at their address.
        PACKED[layer] = weight.detach(), weight._version, blocks
        if sum(of.nbytes for of, _, _ in PACKED.values()) > 2**30:
            say_once("packed weights take more than 1 GiB, beside the plain ones (docs/weights.md)")
    return blocks


# ---------------------------------------------------------------- layers

class Linear(nn.Linear):
    def _matrix(self):
        return self.weight

    def forward(self, x):
        return product(self, x, self.bias) if takes(x, self.weight) else super().forward(x)


def one_product(conv):
    """Whether a 1D convolution is one product: ungrouped, its taps next to each other, padded with zeros."""
    return conv.groups == 1 and conv.dilation == (1,) and conv.padding_mode == "zeros" and \
        not isinstance(conv.padding, str) and conv.output_padding == (0,)


def pays(x, steps, weight):
    """Whether a convolution of x (B, C, T), whose weights meet so many steps, is faster as a product."""
    if torch.is_grad_enabled() or x.ndim != 3 or x.shape[0] * steps > MOST_ROWS:
        return False
    if torch.compiler.is_compiling():
        return x.device.type == "cpu" and not weight.requires_grad
    return fixed(weight) and takes(x, weight)


def slowly_trained(x, steps, weight):
    """Whether torch is slow with the gradient of a convolution's weights, which meet so many steps of x."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():    # as in torch.func.vjp
        return False
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    low = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if low else x.dtype
    return x.ndim == 3 and steps <= SHORT and weight.numel() >= LEAST and dtype in types() \
        and x.device.type == weight.device.type == "cpu" and (low or weight.dtype == dtype)


class Convolution(torch.autograd.Function):
    """F.conv1d, whose weights' gradient is a product of oneDNN."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)         # under autocast
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.at = stride, padding
        return F.conv1d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.at
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        if of_weight:
            windows = F.pad(x, (padding, padding)).unfold(2, weight.shape[2], stride)    # (B, C, T', k)
            columns = windows.transpose(1, 2).flatten(2).flatten(0, 1)                   # (B T', C k)
            rows = g.transpose(1, 2).flatten(0, 1)                                       # (B T', O)
        return (torch.nn.grad.conv1d_input(x.shape, weight, g, stride, padding) if of_x else None,
                onednn(rows.T, columns.T).view_as(weight) if of_weight else None,
                g.sum((0, 2)) if of_bias else None, None, None)


class Conv1d(nn.Conv1d):
    def _matrix(self):
        return self.weight.transpose(1, 2).flatten(1)                            # (O, k C)

    def forward(self, x):
        (k,), (stride,), (padding,) = self.kernel_size, self.stride, self.padding
        steps = (x.shape[-1] + 2 * padding - k) // stride + 1
        if slowly_trained(x, steps, self.weight):
            return Convolution.apply(x, self.weight, self.bias, stride, padding)
        if not pays(x, steps, self.weight):
            return super().forward(x)
        x = F.pad(x.transpose(1, 2), (0, 0, padding, padding))                  # (B, T + 2 padding, C)
        windows = x.unfold(1, k, stride).transpose(2, 3).flatten(2)             # (B, T', k C)
        # A single sequence's windows may be a view in which they overlap, which oneDNN does not take.
        return product(self, windows.contiguous(), self.bias).transpose(1, 2)   # (B, O, T')


class ConvTranspose1d(nn.ConvTranspose1d):
    def _matrix(self):
        return self.weight.flatten(1).T                                          # (O k, C)

    def forward(self, x, output_size=None):
        (k,), (stride,), (padding,) = self.kernel_size, self.stride, self.padding
        if output_size is not None or not pays(x, x.shape[-1], self.weight):
            return super().forward(x, output_size)
        taps = product(self, x.transpose(1, 2), None)                           # (B, T, O k)
        length = (x.shape[2] - 1) * stride - 2 * padding + k                    # T'
        # Where the taps of neighbouring steps meet they are added.
        x = F.fold(taps.transpose(1, 2), (1, length), (1, k), stride=(1, stride), padding=(0, padding))
        return x[:, :, 0] if self.bias is None else x[:, :, 0] + self.bias[:, None]     # (B, O, T')


LAYERS = {nn.Linear: Linear, nn.Conv1d: Conv1d, nn.ConvTranspose1d: ConvTranspose1d}
