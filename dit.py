"""DiT: a transformer that generates images by diffusion in the latent space of an autoencoder.

    William Peebles, Saining Xie: "Scalable Diffusion Models with Transformers", arXiv:2212.09748
    code and weights: github.com/facebookresearch/DiT;   iDDPM: Nichol, Dhariwal, arXiv:2102.09672
    latent space: Rombach, Blattmann, Lorenz, Esser, Ommer, arXiv:2112.10752 (Stable Diffusion's autoencoder)
    variational inference: Kingma, Welling, arXiv:1312.6114;   guidance: Ho, Salimans, arXiv:2207.12598

p(x | y): images x of a class y. Two models are trained one after the other by the same loop. An autoencoder
makes the image small, since attention costs the square of the number of patches. Then a transformer learns to
remove noise from the encoder's latents. Sampling: noise -> latent -> image.

TIME: t = 0 is the LEAST noised of K levels (one step of noise, not clean data), K-1 is noise; `prev` is the
neighbour of t towards the data. The step back from t = 0 adds no noise.
Axes: B images (C, H, W) in [-1, 1]; their latents z (c, h, w); N patches of p x p latent pixels, as tokens D
wide; S steps of the sampler. eps is drawn from N(0, I).

Autoencoder: encoder q(z | x), decoder p(x | z), prior p(z) = N(0, I)
    [1]  log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)),  p(x | z) = N(decoder(z), vae_std^2)      (ELBO)
    [2]  z = mu(x) + sigma(x) eps:   a draw from q(z | x) = N(mu, diag sigma^2) with a gradient
    [3]  KL = 1/2 sum (mu^2 + sigma^2 - 1 - log sigma^2)
    [4]  z0 = z / std(z), one number for all:   the noise levels are made for data of about unit size
Transformer
    [5]  token = W patch + b + position;   position: sines and cosines of its column, then of its row
    [6]  cond = time(t) + class(y).   Four ways to let a block's branches (attention, MLP) know t and y:
         in-context        both are appended as two more tokens
    [7]  cross-attention   one more attention in each block, from the tokens to these two
    [8]  adaLN             the norm before a branch: LayerNorm(x) (1 + scale(cond)) + shift(cond)
    [9]  adaLN-Zero        ... and x + gate(cond) branch(x); gate is 0 at first: the block is the identity
    [10] decoder: each token -> p x p x 2c: eps_theta and f, which sets the log variance of the step back to
         (1 + f)/2 log beta_t + (1 - f)/2 log var_t,   var_t: the variance of q(z_prev | z_t, z0)
Diffusion of z0;   z0_hat is [11] solved for z0, with eps_theta as eps
    [11] z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) eps,  alpha_bar_t = (1 - beta_0) ... (1 - beta_t),
         beta_t in even steps from 0.1/K to 20/K
    [12] L = mean (eps - eps_theta)^2 + vb,   vb = KL(q(z_prev | z_t, z0) || p(z_prev | z_t)) for t > 0, else
         -log p(z0 | z_t): a term of the variational bound, in bits per number. Only f learns from it
    [13] guidance: eps = eps_null + guidance (eps_y - eps_null),   null: the class that stands for any
    [14] DDPM: z_prev = c_x0 z0_hat + c_xt z_t + s eps,   the mean of q(z_prev | z_t, z0_hat); s^2 from [10]
    [15] DDIM: z_prev = sqrt(alpha_bar_prev) z0_hat + sqrt(1 - alpha_bar_prev - s^2) eps_theta + s eps,
         s^2 = eta^2 var_t

Map: Config | autoencoder [1-3] | attention, MLP, four blocks [6-9], Transformer [5, 10] | coefficients of
a step, terms of the bound | DiT: loss [4, 11, 12], sample [13-15], from_official | PRESETS | generate, main.

Differs from the original:
 1. The autoencoder can be trained here, with squared error and KL only; Stable Diffusion's adds perceptual
    and adversarial losses. The standard deviation of [4] is measured on a batch, unless its inverse is given.
 2. Guidance acts on all channels of eps. The released sampler guides three of four, by accident, and keeps
    doing so for reproducibility: guidance_channels=3.
 3. The released code has adaLN-Zero only. The other three follow the paper's text. Where it is silent they
    are plain pre-norm blocks; adaLN too starts with scale and shift 0.
 4. What depends on time and class alone (modulation; keys and values of the condition) is computed for all
    steps of the sampler at once, before its loop. A third of XL/2's weights is then read only once.

Run alone: `python dit.py` learns to draw four kinds of stripes, without autoencoder, in half a minute on a
CPU core. `python dit.py DiT-XL-2-256x256.pt VAE.safetensors 207 360` draws these ImageNet classes into
dit.png, with the released weights of facebookresearch/DiT and stabilityai/sd-vae-ft-ema.
"""
import functools
import math
import re
import struct
import sys
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # -- the data; train.py fills these in
    data_shape: tuple = (3, 32, 32)  # (C, H, W) of an image in [-1, 1]
    n_classes: int = 8  # 0 = no labels. Class n_classes is the null class, "any"
    label_dropout: float = 0.1  # share of training labels made null; 0 = no null class, no guidance
    flip: bool = False  # mirror each training image left to right with probability 1/2
    # -- the autoencoder
    vae_channels: tuple = (8, 16, 32)  # feature maps per level; each further one halves x; () = none: z0 = x
    vae_res_blocks: int = 1  # residual blocks per level of the encoder; decoder: one more
    vae_groups: int = 8  # groups of its GroupNorms; must divide every level's feature maps
    latent_channels: int = 4  # c
    vae_std: float = 0.1  # standard deviation of p(x | z) [1]: how exact the decoder has to be
    vae_steps: int = 500  # steps of the autoencoder, before those of the transformer; 0 = it is loaded
    latent_scale: float = 0.0  # 1/std(z) [4]; 0 = measured after vae_steps. Released: 0.18215
    vae_file: str = ""  # the autoencoder's weights, where --init names the transformer's
    # -- the transformer
    conditioning: str = "adaln_zero"  # a name in CONDITIONINGS: how time and class enter
    patch_size: int = 2  # p, side of a patch in latent pixels
    width: int = 128  # D
    depth: int = 6  # blocks
    n_heads: int = 4  # head dimension is width / n_heads
    mlp_ratio: float = 4.0  # hidden width of the MLPs / D
    learn_variance: bool = True  # False: no f, the step back has variance var_t [10]
    # -- the diffusion
    n_diffusion_steps: int = 1000  # K, noise levels in training
    clip_x0: bool = False  # clip z0_hat to [-1, 1], where all pixels lie; latents have no bounds
    sampler: str = "ddim"  # "ddpm" [14] or "ddim" [15]
    sampler_steps: int = 50  # up to n_diffusion_steps
    eta: float = 0.0  # "ddim": share of fresh noise [15]; 0 = none
    guidance: float = 4.0  # [13]: above 1 the class shows more and images vary less; 1 = none
    guidance_channels: int = 0  # how many channels are guided; 0 = all. Released sampler: 3

    def __post_init__(self):
        self.data_shape, self.vae_channels = tuple(self.data_shape), tuple(self.vae_channels)
        check_choice("conditioning", self.conditioning, CONDITIONINGS)
        check_choice("sampler", self.sampler, ("ddpm", "ddim"))
        check_at_least(self, 1, "data_shape", "vae_channels", "vae_res_blocks", "vae_groups",
                       "latent_channels", "patch_size", "width", "depth", "n_heads", "n_diffusion_steps")
        check_at_least(self, 0, "n_classes", "vae_steps", "latent_scale", "guidance", "guidance_channels")
        timetable(self.n_diffusion_steps, self.sampler_steps)
        if len(self.data_shape) != 3:
            raise ValueError(f"data_shape {self.data_shape}: (C, H, W) of images is needed (--data shapes)")
        multiple = self.patch_size * 2 ** max(0, len(self.vae_channels) - 1)
        if any(size % multiple for size in self.data_shape[1:]):
            raise ValueError(f"data_shape {self.data_shape}: height and width must be multiples of {multiple}"
                             f", patch_size {self.patch_size} doubled by each halving in vae_channels")
        if any(channels % self.vae_groups for channels in self.vae_channels):
            raise ValueError(f"vae_groups {self.vae_groups} must divide all vae_channels {self.vae_channels}")
        if self.width % self.n_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of n_heads {self.n_heads} and of 4")
        if not 1 <= self.width * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} gives no hidden units: width is {self.width}")
        if self.guidance != 1 and not (self.n_classes and self.label_dropout):
            raise ValueError(f"guidance {self.guidance} needs a null class: set guidance=1, or n_classes "
                             f"({self.n_classes}) and label_dropout ({self.label_dropout}) above 0")
        if self.guidance_channels > self.latent_shape[0]:
            raise ValueError(f"guidance_channels {self.guidance_channels} of {self.latent_shape[0]} channels")
        if not 0 <= self.label_dropout <= 1 or not 0 <= self.eta <= 1 or not self.vae_std > 0:
            raise ValueError(f"label_dropout {self.label_dropout} and eta {self.eta} must lie in [0, 1], "
                             f"vae_std {self.vae_std} above 0")

    @property
    def latent_shape(self):
        """(c, h, w): what the transformer sees."""
        (C, H, W), n_levels = self.data_shape, len(self.vae_channels)
        return (self.latent_channels, H >> n_levels - 1, W >> n_levels - 1) if n_levels else (C, H, W)


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(map(str, choices))}")


def check_at_least(config, least, *fields):
    """Each of these fields, or every number of it if it is a tuple, is at least `least`."""
    for field in fields:
        value = getattr(config, field)
        if not all(x >= least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} {value} must be at least {least}")


def check_shape(what, x, shape):
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"{what} of shape {tuple(x.shape[1:])} given, {tuple(shape)} expected")


# ---------------------------------------------------------------- autoencoder
class AttnBlock(nn.Module):
    """Self-attention over the pixels of a feature map, one head, residual."""

    def __init__(self, channels, norm_groups):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)         # 1e-6: Ho; others have 1e-5
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)[:, None]              # (B, 1 head, H*W, C)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        return x + self.out(h)[:, 0].transpose(1, 2).reshape(B, C, H, W)  # (B, C, H, W)


class Downsample(nn.Module):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # Zeros on the right and bottom only: TensorFlow's "SAME" padding, as in the original.
        return self.conv(F.pad(x, (0, 1, 0, 1)))                          # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (B, C, 2H, 2W)


class PlainResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. Group norm, since batch norm's running statistics would belong to
    the last weights and not to their average (EMA)."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                             # (B, c_out, H, W)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))       # (B, c_out, H, W)


def middle(channels, groups):
    return nn.Sequential(PlainResBlock(channels, channels, groups), AttnBlock(channels, groups),
                         PlainResBlock(channels, channels, groups))


def levels(widths, n_blocks, groups):
    """Residual blocks of every level; the first one changes the number of feature maps."""
    return nn.ModuleList([
        nn.Sequential(*[PlainResBlock(c_in, width, groups) for c_in in [before] + [width] * (n_blocks - 1)])
        for before, width in zip((widths[0], *widths), widths)])


class Encoder(nn.Module):
    """Images (B, C, H, W) -> (B, 2c, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.vae_channels, config.vae_groups
        self.conv_in = nn.Conv2d(config.data_shape[0], widths[0], 3, padding=1)
        self.down = levels(widths, config.vae_res_blocks, groups)
        self.downsample = nn.ModuleList([Downsample(width) for width in widths[:-1]])
        self.mid = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                               # (B, width, H, W)
        for blocks, halve in zip(self.down, [*self.downsample, nn.Identity()]):
            x = halve(blocks(x))                                          # (B, width, H/2, W/2) but the last
        x = self.mid(x)                                                   # (B, width, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))                    # (B, 2c, h, w)


class Decoder(nn.Module):
    """Latents (B, c, h, w) -> (B, C, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.vae_channels[::-1], config.vae_groups     # the coarsest level first
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], groups)
        self.up = levels(widths, config.vae_res_blocks + 1, groups)
        self.upsample = nn.ModuleList([Upsample(width) for width in widths[:-1]])
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.data_shape[0], 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))                                     # (B, width, h, w)
        for blocks, double in zip(self.up, [*self.upsample, nn.Identity()]):
            x = double(blocks(x))                                         # (B, width, 2h, 2w) but the last
        return self.conv_out(F.silu(self.norm_out(x)))                    # (B, C, H, W)


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder. Weights start as torch's defaults."""

    def __init__(self, config):
        super().__init__()
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, x):
        """-> mean and log-variance of q(z | x), each (B, c, h, w)."""
        x = self.encoder(x.to(self.quant_conv.weight.dtype))
        mean, log_variance = self.quant_conv(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)                          # so that exp stays finite

    def decode(self, z):
        """-> mean of p(x | z), (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.weight.dtype)))


def reparameterise(mean, log_variance, noise):
    return mean + (0.5 * log_variance).exp() * noise                                          # [2]


def kl_to_prior(mean, log_variance):
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) in nats, (B,)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)          # [3]


# ---------------------------------------------------------------- transformer
def attention(q, k, v):
    """softmax(q k' / sqrt(d)) v over the last two axes: (..., N, d), (..., M, d) -> (..., N, d). It differs
    from pi0.py's: there is no mask."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    # On a CPU the fused kernel takes two to eight times as long as this in bfloat16.
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1, dtype=q.dtype) @ v


class TokenAttention(nn.Module):
    """Multi-head attention among tokens. (B, N, D) -> (B, N, D)."""

    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class ConditionAttention(nn.Module):
    """Multi-head attention from tokens x (B, N, D) to what `kv` made of the condition, (B, M, 2D)."""

    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.kv, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x, kv):
        heads = lambda y: y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)        # (B, heads, N or M, d)
        k, v = kv.chunk(2, dim=-1)
        return self.out(attention(heads(self.q(x)), heads(k), heads(v)).transpose(1, 2).flatten(2))


class TanhMLP(nn.Module):
    """(B, N, D) -> (B, N, D)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """x (B, N, D), shift and scale (B, 1, D). It differs from dit_policy.py's: zeros change nothing.
    Shift comes first in the weights: DiT's order, not iDDPM's."""
    return torch.addcmul(shift, x, 1 + scale)                                                 # [8]


# Four blocks. `prepare` turns time and class, (..., 2, D), into what the block needs of them (..., n_vectors,
# D or 2D). It sees no tokens, so a sampler calls it once for all its steps. `forward` takes its result.
class InContextBlock(nn.Module):
    """Pre-norm block; time and class are tokens among the others."""

    def __init__(self, config, affine=True):
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=affine)
        self.attn = TokenAttention(D, config.n_heads)
        self.norm2 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=affine)
        self.mlp = TanhMLP(D, int(D * config.mlp_ratio))

    def prepare(self, cond):
        return cond[..., :0, :]                                           # no vector

    def forward(self, x, nothing):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))                                # (B, N + 2, D)


class CrossAttentionBlock(InContextBlock):
    """Pre-norm block with a third branch, in which the tokens look at time and class."""

    def __init__(self, config):
        super().__init__(config)
        self.norm_cross = nn.LayerNorm(config.width, eps=1e-6)
        self.cross = ConditionAttention(config.width, config.n_heads)

    def prepare(self, cond):
        return self.cross.kv(cond)                                        # (..., 2, 2D)

    def forward(self, x, kv):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), kv)                                            # [7]
        return x + self.mlp(self.norm2(x))                                # (B, N, D)


class AdaLNBlock(InContextBlock):
    """Block whose LayerNorms take scale and shift from the condition, and have none of their own."""

    n_vectors = 4

    def __init__(self, config):
        super().__init__(config, affine=False)
        self.modulation = nn.Linear(config.width, self.n_vectors * config.width)

    def prepare(self, cond):
        return self.modulation(F.silu(cond.sum(-2))).unflatten(-1, (self.n_vectors, -1))      # [6]

    def forward(self, x, modulation):
        shift1, scale1, shift2, scale2 = modulation[:, :, None].unbind(1)  # (B, 1, D) each
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))      # (B, N, D)


class AdaLNZeroBlock(AdaLNBlock):
    """AdaLNBlock whose branches each pass a gate, which is closed at first."""

    n_vectors = 6

    def forward(self, x, modulation):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None].unbind(1)  # (B, 1, D) each
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))       # [9]
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))     # (B, N, D)


CONDITIONINGS = {"in_context": InContextBlock, "cross_attention": CrossAttentionBlock, "adaln": AdaLNBlock,
                 "adaln_zero": AdaLNZeroBlock}


class FinalLayer(nn.Module):
    """Last norm, adaptive if those of the blocks are, and the linear decoder. (B, N, D) -> (B, N, d_out)."""

    def __init__(self, config, d_out):
        super().__init__()
        D, adaptive = config.width, issubclass(CONDITIONINGS[config.conditioning], AdaLNBlock)
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=not adaptive)
        self.modulation = nn.Linear(D, 2 * D) if adaptive else None
        self.linear = nn.Linear(D, d_out)

    def prepare(self, cond):
        if self.modulation is None:
            return cond[..., :0, :]
        return self.modulation(F.silu(cond.sum(-2))).unflatten(-1, (2, -1))  # (..., 2, D)

    def forward(self, x, modulation):
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *modulation[:, :, None].unbind(1))
        return self.linear(x)


def sincos_positions(rows, columns, width):
    """(rows columns, width), row by row. The first half encodes the column, the second the row, each as [sin,
    cos] at width/4 frequencies from 1 down to nearly 1/10000."""
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = lambda n: torch.arange(n, dtype=torch.float64)[:, None] * frequency               # (n, width/4)
    row, column = (torch.cat([angle(n).sin(), angle(n).cos()], dim=1) for n in (rows, columns))
    grid = [column.expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)]
    return torch.cat(grid, dim=2).flatten(0, 1).float()                                       # [5]


def time_embedding(t, dim):
    """t (...) -> (..., dim): cosines, then sines, at dim/2 frequencies from 1 down to nearly 1/10000. Order
    and frequencies differ from ddpm.py's."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Transformer(nn.Module):
    """z_t (B, c, h, w) and the condition -> (B, c or 2c, h, w)."""

    def __init__(self, config):
        super().__init__()
        self.shape, self.p, D = config.latent_shape, config.patch_size, config.width
        self.in_context = config.conditioning == "in_context"
        c, h, w = self.shape
        self.c_out = 2 * c if config.learn_variance else c
        self.patch = nn.Conv2d(c, D, self.p, stride=self.p)
        # Fixed, and yet a parameter, since released files hold it.
        self.position = nn.Parameter(torch.zeros(1, h // self.p * (w // self.p), D), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        null_class = config.label_dropout > 0 or config.n_classes == 0
        self.label = nn.Embedding(config.n_classes + null_class, D)
        self.blocks = nn.ModuleList([CONDITIONINGS[config.conditioning](config) for _ in range(config.depth)])
        self.final = FinalLayer(config, self.p**2 * self.c_out)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """As released. The zeros come last: with them adaLN-Zero's blocks are the identity at first, and the
        network's output is zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))             # as the linear layer that it is
        nn.init.zeros_(self.patch.bias)
        c, h, w = self.shape
        self.position.copy_(sincos_positions(h // self.p, w // self.p, self.position.shape[-1]))
        for weight in (self.label.weight, self.time[0].weight, self.time[2].weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [m.modulation for m in (*self.blocks, self.final) if getattr(m, "modulation", None)]
        for m in (*modulations, self.final.linear):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def condition(self, t, label):
        """All that depends on time and class alone: t (...), label (...) -> list of (..., n_vectors, D or
        2D): both embeddings, then what each block and the final layer make of them."""
        time = self.time(time_embedding(t, 256).to(self.patch.weight.dtype))
        cond = torch.stack(torch.broadcast_tensors(time, self.label(label)), dim=-2)          # (..., 2, D)
        return [cond] + [part.prepare(cond) for part in (*self.blocks, self.final)]

    def forward(self, z_t, condition):
        check_shape("a latent", z_t, self.shape)
        B, (_, h, w), p = len(z_t), self.shape, self.p
        x = self.patch(z_t.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)            # (B, N, D)
        x, (cond, *parts) = x + self.position, condition
        x = torch.cat([x, cond], dim=1) if self.in_context else x         # (B, N (+ 2), D)   [6]
        for block, part in zip(self.blocks, parts):
            x = block(x, part)                                            # (B, N (+ 2), D)
        x = self.final(x[:, :self.position.shape[1]], parts[-1])          # (B, N, p p c_out)
        x = x.view(B, h // p, w // p, p, p, self.c_out).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, self.c_out, h, w).float()                     # (B, c_out, h, w)  [10]


# ---------------------------------------------------------------- diffusion
class Coefficients(NamedTuple):
    """The numbers of a step z_t -> z_prev: (S,) each for a chain of S steps, or shaped to broadcast over z.
    It differs from ddpm.py's: the standard deviation instead of beta and the variance."""

    signal: torch.Tensor        # sqrt(alpha_bar): how much of z0 is in z_t
    sigma: torch.Tensor         # sqrt(1 - alpha_bar): how much noise
    signal_prev: torch.Tensor   # the same for z_prev; 1 and 0 if z_prev is the data
    sigma_prev: torch.Tensor
    c_x0: torch.Tensor          # coefficients of the mean of q(z_prev | z_t, z0)
    c_xt: torch.Tensor
    deviation: torch.Tensor     # ... and its standard deviation: 0 at t = 0, where z_prev is z0 itself
    log_small: torch.Tensor     # log of its variance, floored at t = 0
    log_large: torch.Tensor     # log beta


def coefficients(alpha_bar):
    """alpha_bar (S,) float64 of the levels visited, least noised first -> Coefficients, stacked (fields, S).
    Any selection of the K levels is a chain of its own, with larger betas, so a sampler may take fewer steps.
    It differs from ddpm.py's in the fields."""
    prev = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / prev
    variance = beta * (1 - prev) / (1 - alpha_bar)
    # The variance at t = 0 is 0, its log -inf. As in iDDPM the next level's stands there; only vb sees it.
    floor = variance[1:2] if len(variance) > 1 else beta
    return torch.stack(Coefficients(
        signal=alpha_bar.sqrt(), sigma=(1 - alpha_bar).sqrt(), signal_prev=prev.sqrt(),
        sigma_prev=(1 - prev).sqrt(), c_x0=prev.sqrt() * beta / (1 - alpha_bar),
        c_xt=(1 - beta).sqrt() * (1 - prev) / (1 - alpha_bar), deviation=variance.sqrt(),
        log_small=torch.cat([floor, variance[1:]]).log(), log_large=beta.log()))


def linear_alpha_bar(K):
    """alpha_bar_t of [11] for t = 0 .. K-1, float64 (K,). Clamped, since with few levels 20/K exceeds 1."""
    beta = torch.linspace(0.1 / K, 20 / K, K, dtype=torch.float64, device="cpu").clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)


@functools.lru_cache
def step_table(K, device, levels=None):
    """Coefficients of the chain of all levels, or of a tuple of some, noisiest first: float32 (fields, S) on
    `device`. Cached: a copy from the host in every step would make the host wait. Not a buffer of the model:
    .to(bfloat16) would round sqrt(alpha_bar_0) to 1. It differs from ddpm.py's: there is one schedule."""
    alpha_bar = linear_alpha_bar(K)
    return coefficients(alpha_bar if levels is None else alpha_bar[list(levels[::-1])]).float().to(device)


def at(table, t, x):
    """Row t (an int or (B,) indices) of coefficients (fields, S), shaped to broadcast over x (B, ...)."""
    return Coefficients(*table[:, t].reshape(len(table), -1, *[1] * (x.dim() - 1)))


def timetable(K, steps):
    """The levels t that a sampler visits, noisiest first: `steps` of K, evenly from K-1 to 0, or steps itself
    if it is a list. The policy files' timetable differs: its "leading" steps may start below K-1."""
    if isinstance(steps, int):
        if not 1 <= steps <= K:
            raise ValueError(f"sampler steps {steps} must lie in 1..n_diffusion_steps = {K}")
        last = max(steps - 1, 1)
        return [round((K - 1) * (last - k) / last) for k in range(steps)]
    levels = [int(t) for t in steps]
    if not levels or levels != sorted(set(levels), reverse=True) or levels[0] >= K or levels[-1] < 0:
        raise ValueError(f"sampler steps {levels} must fall from at most {K - 1} to at least 0")
    return levels


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - ratio - 1 + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def pixel_nll(x0, mean, log_variance):
    """-log probability of an 8-bit pixel: the mass of its bin in [-1, 1]; outer bins reach to infinity."""
    # The normal distribution function as the released code approximates it: published figures contain this.
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    scale = (-0.5 * log_variance).exp()
    upper = torch.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) * scale))
    lower = torch.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) * scale))
    return -(upper - lower).clamp(min=1e-12).log()


def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


# ---------------------------------------------------------------- the model
MODULATION_LIMIT = 2**27  # numbers that DiT.conditions may compute and keep at a time


class DiT(nn.Module):
    """Autoencoder, transformer and diffusion."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vae = AutoencoderKL(config).requires_grad_(config.vae_steps > 0) if config.vae_channels else None
        self.net = Transformer(config)
        # 1/std(z) [4]; 1 until it is measured. A parameter without gradient, so that the average of the
        # weights (EMA) holds it, as it does the autoencoder. A vector of one, since FSDP2 takes no scalars.
        self.scale = nn.Parameter(torch.tensor([config.latent_scale or 1.0]), requires_grad=False)
        # Steps of the autoencoder begun so far. vae_steps + 1: its training is over. -1: it has no weights,
        # and vae_steps is 0. A Python number: to read a tensor, the host would wait for the device.
        self.seen = 0 if config.vae_steps or not self.vae else -1
        self.version = None  # of the autoencoder's weights when its last step began; an optimiser raises it

    def get_extra_state(self):
        # The average of the weights (EMA) never counted steps. If its scale [4] has been measured, its
        # autoencoder is trained, and a further run must not train it again.
        measures = self.vae and self.config.vae_steps and not self.config.latent_scale
        over = measures and not self.scale.is_meta and self.scale.item() != 1
        return torch.tensor(self.config.vae_steps + 1 if over else self.seen, device="cpu")

    def set_extra_state(self, state):
        self.seen = int(state)

    def load_state_dict(self, state_dict, **options):
        """Takes older files too, whose scale is a scalar."""
        vector = {k: v.reshape(1) for k, v in state_dict.items() if k == "scale"}
        return super().load_state_dict({**state_dict, **vector}, **options)

    def _apply(self, fn, recurse=True):
        """.to(bfloat16) leaves the scale in float32: rounded, it would resize all latents."""
        scale = self.scale.detach().clone()
        super()._apply(fn, recurse)
        if not scale.is_meta:
            self.scale.data = scale.to(self.scale.device)
        return self

    # -- autoencoder
    def elbo(self, x, noise=None):
        """The terms of [1] in nats per number of x, (B,) each: nll and kl. noise: eps of [2]."""
        mean, log_variance = self.vae.encode(x)
        z = reparameterise(mean, log_variance, torch.randn_like(mean) if noise is None else noise)
        variance, error = self.config.vae_std**2, (x - self.vae.decode(z)).square().flatten(1)
        nll = 0.5 * (error.mean(1) / variance + math.log(2 * math.pi * variance))
        return nll, kl_to_prior(mean, log_variance) / error.shape[1]

    def encode(self, x):
        """Images -> z0 (B, c, h, w): a draw from q(z | x), not its mean, scaled; without vae, x itself."""
        if self.vae is None:
            return x
        mean, log_variance = self.vae.encode(x)
        return self.scale * reparameterise(mean, log_variance, torch.randn_like(mean)).float()  # [4]

    def decode(self, z0):
        """z0 (B, c, h, w) -> images."""
        check_shape("a latent", z0, self.config.latent_shape)
        return z0 if self.vae is None else self.vae.decode(z0 / self.scale).float()

    @torch.compiler.disable
    def begin_step(self, x):
        """Whether this step trains the autoencoder. Counts its steps; measures the scale [4] after them."""
        if self.vae is None or not self.training:
            return False
        if self.seen < 0:
            raise ValueError("the autoencoder has no weights: train it (vae_steps=N), load it (--init, or "
                             "vae_file beside a transformer's --init), or do without (vae_channels=[])")
        if self.config.vae_steps and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError("vae_steps is for a single process: train the autoencoder in one, or load one")
        step, weight = self.seen, self.vae.quant_conv.weight
        if weight.grad is not None and weight._version == self.version:
            step -= 1                           # gradient accumulation: still the step begun last
        elif torch.is_grad_enabled() and step <= self.config.vae_steps:  # without gradients it is no step
            if step == self.config.vae_steps and not self.config.latent_scale:
                with torch.no_grad():
                    self.scale.div_(self.encode(x).std())                                     # [4]
            self.seen, self.version = step + 1, weight._version
        return step < self.config.vae_steps

    # -- diffusion
    def predict(self, z_t, coef, condition):
        """-> eps_theta and the log-variance of the step back, (B, c, h, w) each."""
        if not self.config.learn_variance:
            return self.net(z_t, condition), coef.log_small
        eps, f = self.net(z_t, condition).chunk(2, dim=1)
        return eps, (1 + f) / 2 * coef.log_large + (1 - f) / 2 * coef.log_small               # [10]

    def bound_term(self, z0, z_t, eps, log_variance, t, coef):
        """The term of the bound that belongs to t (B,), bits per number, (B,). As released, at t = 0 latents
        too are treated as 8-bit pixels."""
        mean = coef.c_x0 * (z_t - coef.sigma * eps) / coef.signal + coef.c_xt * z_t
        true_mean = coef.c_x0 * z0 + coef.c_xt * z_t
        kl = normal_kl(true_mean, coef.log_small, mean, log_variance).flatten(1).mean(1)
        nll = pixel_nll(z0, mean, log_variance).flatten(1).mean(1)
        return torch.where(t == 0, nll, kl) / math.log(2)                                     # [12]

    def loss(self, batch, noise=None, t=None):
        """batch: x (B, C, H, W), label (B,) if n_classes. noise: eps of [2] while the autoencoder is trained,
        then of [11]. t (B,) in 0..K-1: 0 is one step of noise, not none, and K-1 is all noise.
        -> loss (), per_sample (B,), t / K (B,) and parts: nll and kl in the first vae_steps steps, then mse
        and, with learned variance, vb (bits per number)."""
        x, label, K = batch["x"], self.label(batch, required=True), self.config.n_diffusion_steps
        check_shape("an image", x, self.config.data_shape)
        if self.config.flip and self.training:
            mirrored = torch.rand(len(x), device=x.device) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if self.begin_step(x):
            nll, kl = self.elbo(x, noise)
            bound = nll + kl                                                                  # [1]
            return {"loss": bound.mean(), "nll": nll.mean(), "kl": kl.mean(), "per_sample": bound.detach(),
                    "t": torch.zeros_like(bound)}
        with torch.no_grad():
            z0 = self.encode(x)
        eps = torch.randn_like(z0) if noise is None else noise
        t = torch.randint(K, (len(z0),), device=z0.device) if t is None else t
        coef = at(step_table(K, z0.device), t, z0)
        z_t = coef.signal * z0 + coef.sigma * eps                                             # [11]
        if self.training and self.config.label_dropout:
            dropped = torch.rand(t.shape, device=t.device) < self.config.label_dropout
            label = torch.where(dropped, self.config.n_classes, label)
        eps_hat, log_variance = self.predict(z_t, coef, self.net.condition(t, label))
        mse = (eps_hat - eps).square().flatten(1).mean(1)
        per_sample, parts = mse, {"mse": mse.mean()}
        if self.config.learn_variance:
            # detach: eps_theta learns from the mse alone. vb has weight 1, where iDDPM has K/1000.
            vb = self.bound_term(z0, z_t, eps_hat.detach(), log_variance, t, coef)
            per_sample, parts["vb"] = mse + vb, vb.mean()                                     # [12]
        return {"loss": per_sample.mean(), **parts, "per_sample": per_sample.detach(), "t": t / K}

    def conditions(self, ts, label):
        """Yields Transformer.condition for label (B,) and each step in ts. One pass computes as many steps as
        memory allows, since it reads each weight once."""
        size = len(label) * self.config.depth * self.config.width * 6     # numbers per step, with adaLN-Zero
        # Filled in number by number, since a tensor made of a list would be copied from the host.
        all_t = torch.stack([torch.full((1,), t, device=label.device) for t in ts])
        for t in all_t.split(max(1, MODULATION_LIMIT // size)):
            yield from zip(*self.net.condition(t, label[None]))           # (B, n_vectors, D or 2D) each

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, step_noise=None):
        """From noise to images (B, C, H, W). batch says how many by "n", "label" (B,) or "x"; no label means
        any class. steps: how many, or a list of t (see timetable). noise (B, c, h, w): the start; step_noise:
        eps of each step but the last; both are drawn from generator if not given. trace: a list that receives
        the decoded state after each step."""
        B = batch["n"] if "n" in batch else len(batch.get("label", batch.get("x")))
        config, device, label = self.config, self.scale.device, self.label(batch, B)
        ts = timetable(config.n_diffusion_steps, config.sampler_steps if steps is None else steps)
        table = step_table(config.n_diffusion_steps, device, tuple(ts))   # (fields, S)
        draw = lambda: randn((B, *config.latent_shape), generator, device)
        z = draw() if noise is None else noise
        check_shape("noise", z, config.latent_shape)
        guided = config.guidance != 1 and "label" in batch
        if guided:                              # each image twice: with its class, then with the null class
            label = torch.cat([label, torch.full_like(label, config.n_classes)])
        for k, condition in enumerate(self.conditions(ts, label)):
            to_go = len(ts) - 1 - k             # row of this step: the chain counts from the data
            coef = at(table, to_go, z)
            eps, log_variance = self.predict(z.repeat(1 + guided, 1, 1, 1), coef, condition)
            if guided:
                (eps, eps_null), log_variance = eps.chunk(2), log_variance.chunk(2)[0]
                n = config.guidance_channels or eps.shape[1]
                eps_guided = eps_null[:, :n] + config.guidance * (eps[:, :n] - eps_null[:, :n])  # [13]
                eps = torch.cat([eps_guided, eps[:, n:]], dim=1)
            x0 = (z - coef.sigma * eps) / coef.signal
            x0 = x0.clamp(-1, 1) if config.clip_x0 else x0
            if to_go == 0 or config.sampler == "ddim" and config.eta == 0:
                fresh = 0                       # the last step, and DDIM without eta, add no noise
            else:
                fresh = draw() if step_noise is None else step_noise[k]
            if config.sampler == "ddim":
                s, eps = config.eta * coef.deviation, (z - coef.signal * x0) / coef.sigma  # x0 may be clipped
                # clamp: at eta = 1 a long stride leaves 0 up to rounding, and the root of -1e-12 is nan.
                direction = (coef.sigma_prev**2 - s**2).clamp(min=0).sqrt() * eps
                z = coef.signal_prev * x0 + direction + s * fresh                             # [15]
            else:
                z = coef.c_x0 * x0 + coef.c_xt * z + (0.5 * log_variance).exp() * fresh       # [14]
            if trace is not None:
                trace.append(self.decode(z))
        return self.decode(z)

    def label(self, batch, n=0, required=False):
        """The checked labels of a batch, (B,); the null class n times, if it has none."""
        n_classes, label = self.config.n_classes, batch.get("label")
        if label is not None and n_classes:
            # On a GPU every step would wait for this comparison; there the embedding checks the range.
            if label.device.type == "cpu" and ((label < 0) | (label >= n_classes)).any():
                raise ValueError(f"label {label.min()}..{label.max()} is out of range: 0..{n_classes - 1}")
            return label
        if n_classes and (required or not self.config.label_dropout):
            raise ValueError(f"the batch has no 'label', which n_classes = {n_classes} asks for")
        return torch.full((n or len(batch["x"]),), n_classes, device=self.scale.device)

    def param_groups(self, weight_decay):
        """For AdamW: matrices and kernels decay; biases, norms and embeddings do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        decays = lambda p: p.dim() > 1 and p is not self.net.label.weight
        return [{"params": [p for p in parameters if decays(p)], "weight_decay": weight_decay},
                {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0}]

    @classmethod
    def from_official(cls, state_dict, config):
        """Released weights of a transformer (facebookresearch/DiT), of an autoencoder (diffusers'
        AutoencoderKL, also with its older names of the attention), or of both. config.vae_file may hold the
        autoencoder's. Given an autoencoder alone, the transformer starts untrained. config must describe them
        (PRESETS["XL/2"]). Strict: see load_strictly."""
        weights = rename_official(state_dict)
        if config.vae_file:
            weights |= rename_official(read_file(config.vae_file))
        with torch.device("meta"):
            model = cls(config)
        if not any(k.startswith("net.") for k in weights):
            weights |= {f"net.{k}": v for k, v in Transformer(config).state_dict().items()}
        if model.vae and not any(k.startswith("vae.") for k in weights):
            raise ValueError("these are a transformer's weights alone: add the autoencoder's (vae_file=FILE)")
        weights["scale"] = torch.tensor([config.latent_scale or 1.0])
        weights["_extra_state"] = torch.tensor(0, device="cpu")  # not -1: the autoencoder is there
        load_strictly(model, weights)
        return model


def load_strictly(model, weights):
    """Put `weights` into a model, be it on the meta device. One ValueError names what does not fit."""
    want = model.state_dict()
    problems = [f"missing {k}" for k in want if k not in weights]
    problems += [f"left over {k}" for k in weights if k not in want]
    problems += [f"{k} is {tuple(weights[k].shape)} and should be {tuple(want[k].shape)}"
                 for k in want if k in weights and weights[k].shape != want[k].shape]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"these weights do not fit the configuration: {'; '.join(problems[:6])}{more}")
    model.load_state_dict(weights, assign=True)


# Official names -> ours, applied in this order: transformer, autoencoder.
RENAMES = [
    (r"^x_embedder\.proj\.", "net.patch."), (r"^pos_embed$", "net.position"),
    (r"^t_embedder\.mlp\.", "net.time."), (r"^y_embedder\.embedding_table\.", "net.label."),
    (r"^blocks\.", "net.blocks."), (r"^final_layer\.", "net.final."), (r"\.attn\.proj\.", ".attn.out."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"^(encoder|decoder|quant_conv|post_quant_conv)\.", r"vae.\1."),
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2."), (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.(down|up)_blocks\.(\d+)\.\1samplers\.0\.", r".\1sample.\2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.1."), (r"\.mid_block\.resnets\.0\.", ".mid.0."),
    (r"\.mid_block\.resnets\.1\.", ".mid.2."), (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."), (r"\.(to_q|query)\.", ".q."), (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."), (r"\.(to_out\.0|proj_attn)\.", ".out."),
]


def rename_official(state_dict):
    """Rename the keys of an official state_dict; values in float32."""
    weights = {}
    for key, value in state_dict.items():
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        weights[key] = value.float()
    return weights


def read_file(path):
    """The tensors of a .safetensors file or of a torch file; nothing else is unpickled."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError("reading .safetensors needs a package: pip install safetensors") from None
    except Exception as e:  # either library has types of its own for files that are cut short or foreign
        raise ValueError(f"{path} cannot be read: {' '.join(str(e).split())[:150]}") from None


Model = DiT

# 256 x 256 images of 1000 classes, 32 x 32 latents of Stable Diffusion's autoencoder (83,653,863 parameters).
RELEASED = {"data_shape": (3, 256, 256), "n_classes": 1000, "vae_channels": (128, 256, 512, 512),
            "vae_res_blocks": 2, "vae_groups": 32, "vae_steps": 0, "latent_scale": 0.18215, "sampler": "ddpm",
            "sampler_steps": 250, "guidance": 4.0, "guidance_channels": 3, "flip": True}
PRESETS = {
    # Learns eight shapes on two CPU cores.
    "tiny": {},
    # The paper's four sizes: 33, 131, 458 and 675 million parameters, fixed positions included.
    **{f"{name}/{p}": RELEASED | {"depth": depth, "width": width, "n_heads": n_heads, "patch_size": p}
       for name, depth, width, n_heads in (("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16),
                                           ("XL", 28, 1152, 16)) for p in (2, 4, 8)},
}

# ema_max: samples come from an average of the weights over the run, which is less noisy than the last ones;
# its memory grows with the run, up to 1/(1 - ema_max) steps (ema_decay in train.py).
RECIPES = {
    "tiny": {"data": "shapes", "demos": 8000, "steps": 6500, "batch_size": 64, "lr": 3e-3, "warmup": 100,
             "betas": (0.9, 0.99), "weight_decay": 0.0, "clip": 1.0, "ema_max": 0.995, "eval_every": 0},
    **{name: {"steps": 400_000, "batch_size": 256, "lr": 1e-4, "lr_schedule": "constant", "warmup": 0,
              "betas": (0.9, 0.999), "weight_decay": 0.0} for name in PRESETS if name != "tiny"},
}


# ---------------------------------------------------------------- released weights, and the demo
def write_png(path, image):
    """image (H, W, 3) uint8."""
    H, W, C = image.shape
    rows = F.pad(image.flatten(1), (1, 0)).numpy().tobytes()              # a row begins with its filter: none
    number = lambda n: struct.pack(">I", n)
    chunk = lambda kind, body: number(len(body)) + kind + body + number(zlib.crc32(kind + body))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0))
                + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def generate(dit_file, vae_file, labels, preset="XL/2", path="dit.png", seed=0, **changes):
    """Images of these classes, side by side, with released weights. changes: fields of Config, such as
    sampler_steps. -> (B, C, H, W)"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config(**PRESETS[preset] | {"vae_file": vae_file} | changes)
    model = DiT.from_official(read_file(dit_file), config).to(device).eval()
    batch, generator = {"label": torch.tensor(labels, device=device)}, torch.Generator().manual_seed(seed)
    images = model.sample(batch, generator=generator).cpu()
    pixels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    write_png(path, pixels.permute(2, 0, 3, 1).flatten(1, 2))
    print(f"wrote {path}")
    return images


def stripes():
    """Four kinds of stripes on 8 x 8 pixels, two wide, each in its four places: (16, 1, 8, 8) in {-1, 1}, and
    the kind: they lie, stand, rise or fall."""
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    along = torch.stack([y, x, x + y, x - y]).repeat_interleave(4, dim=0)  # (16, 8, 8)
    place = torch.arange(4).repeat(4)[:, None, None]
    return torch.where((along + place) % 4 < 2, 1.0, -1.0)[:, None], torch.arange(4).repeat_interleave(4)


def main(steps=1500, batch_size=64):
    """Train on `stripes`; print how many samples are, pixel for pixel, stripes of the kind asked for."""
    torch.manual_seed(0)
    images, kinds = stripes()
    model = DiT(Config(data_shape=(1, 8, 8), n_classes=4, vae_channels=(), patch_size=4, width=64, depth=3,
                       n_heads=2, clip_x0=True, guidance=2.0, sampler_steps=25))
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch_size,))
        losses = model.loss({"x": images[chosen], "label": kinds[chosen]})
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step:5d}  mse {losses['mse']:.4f}  vb {losses['vb']:.4f}")
    model.eval()
    asked = torch.arange(200) % 4
    drawn = model.sample({"label": asked}).sign()
    same = (drawn[:, None] == images).flatten(2).all(2)                   # (200, 16)
    right = (same & (kinds == asked[:, None])).any(1).float().mean().item()
    print(f"samples that are stripes of the kind asked for: {100 * right:.1f} % (expected: at least 90; of "
          f"2^64 black and white images {len(images)} are stripes)")
    return right


if __name__ == "__main__":
    if len(sys.argv) > 3:
        generate(*sys.argv[1:3], [int(label) for label in sys.argv[3:]])
    else:
        main()
