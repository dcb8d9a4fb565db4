"""DiT's own code: the forward pass of S/2 and XL/2 on the latents of 256 x 256 pixels."""
import functools
import importlib.util

import torch

import dit
from tools.peers.work import Work, clones, empty, imported, pair_of_chunks, pair_of_steps, randomise

URL = "https://github.com/facebookresearch/DiT"
FILE = "models.py"
PACKAGE = ""


class Attention(torch.nn.Module):
    """Stands in for timm's, if timm is not installed: the same names of weights, the same numbers."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, **kwargs):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim, bias=qkv_bias), torch.nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(torch.nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop=0):
        super().__init__()
        self.fc1, self.act = torch.nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = torch.nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(torch.nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = torch.nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def works(folder):
    for preset, B in (("XL/2", 1), ("S/2", 4)):
        yield Work(f"{preset}: forward pass, batch {B}", functools.partial(forward, folder, preset, B))
    yield Work("S/2: training step, batch 4", functools.partial(training, folder, "S/2", 4))


def models(folder, preset):
    """-> their network with random weights, ours with the same"""
    empty("timm.models.vision_transformer", Attention=Attention, Mlp=Mlp, PatchEmbed=PatchEmbed)
    # By its path: another file on sys.path may be called models.py.
    spec = importlib.util.spec_from_file_location("original_dit", folder / FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    theirs = randomise(module.DiT_models[f"DiT-{preset}"](input_size=32, num_classes=1000)).eval()
    config = dit.Config(**dit.PRESETS[preset] | {"data_shape": (4, 32, 32), "vae_channels": ()})  # latents
    return theirs, dit.DiT.from_official(clones(theirs), config).eval()         # eval: no label is dropped


def forward(folder, preset, B):
    theirs, ours = models(folder, preset)
    x, t, y = torch.randn(B, 4, 32, 32), torch.full((B,), 500), torch.arange(B)
    return pair_of_chunks(lambda: theirs(x, t, y), ours,
                          lambda model: model.net(x, model.net.condition(t, y)))


def training(folder, preset, B):
    theirs, ours = models(folder, preset)
    diffusion = imported("diffusion", folder).create_diffusion("")
    x, noise = torch.randn(2, B, 4, 32, 32)
    t, y = torch.randint(1000, (B,)), torch.arange(B)
    return pair_of_steps(
        theirs, lambda: diffusion.training_losses(theirs, x, t, {"y": y}, noise)["loss"].mean(),
        ours, lambda: ours.loss({"x": x, "label": y}, noise, t)["loss"], lr=1e-4, weight_decay=0.0)
