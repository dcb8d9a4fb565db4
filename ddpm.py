"""Denoising diffusion (DDPM): a network learns to undo, step by step, a process that turns data into noise.

    Ho, Jain, Abbeel: "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; hojonathanho/diffusion
    cosine schedule, learned variance: Nichol, Dhariwal, arXiv:2102.09672 ("iDDPM"; openai/improved-diffusion)
    faster sampling: Song, Meng, Ermon: "Denoising Diffusion Implicit Models", arXiv:2010.02502 (DDIM)
    classes: Ho, Salimans: "Classifier-Free Diffusion Guidance", arXiv:2207.12598

What is modelled is the distribution of the data. K small steps of noise turn it into N(0, I), which is easy
to draw from. The reverse of each step is nearly a normal distribution, whose mean a regression can learn.

TIME: t counts levels of noise, from 0, the LEAST, to K-1, noise alone. Clean data is not t = 0; it would be
t = -1, with alpha_bar = 1. (The papers count 1..K: their t is ours + 1.) `prev` is the level next to t on
the data's side. The step back from t = 0 ends at the data and adds no noise.
Axes: B samples, D dimensions of a point; or C, H, W of an image in [-1, 1]. eps and z are drawn from N(0, I).

Forward, nothing to learn
    [1]  q(x_t | x_prev) = N(sqrt(1 - beta_t) x_prev, beta_t I)
    [2]  alpha_bar_t = product of 1 - beta_i over i <= t
    [3]  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps             all steps up to t in one jump
Backward, learned
    [4]  p(x_prev | x_t) = N(mu(x_t, t), Sigma);   a learned Sigma lies between [10] and beta_t, in log space
    [5]  -log p(x0) <= KL(q(x_{K-1} | x0) || N(0, I)) + sum_{t>0} KL(q(x_prev | x_t, x0) || p(x_prev | x_t))
                       - log p(x0 | x_t at t = 0):   the variational bound
    [6]  L_simple = mean (target - network(x_t, t))^2,   target: eps, x0 or
                    v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0
         L_hybrid = L_simple + 0.001 bound, if Sigma is learned; only Sigma learns from the bound
Schedules
    [7]  cosine: alpha_bar_t = f(t + 1)/f(0),   f(i) = cos^2((i/K + s)/(1 + s) pi/2),   beta_t <= 0.999
    [8]  linear: beta_t in even steps from 0.1/K to 20/K
The step back, in three forms of equal result, then a faster one
    [9]  x_prev = alpha (x_t - gamma eps) + sigma z:   as Diffusion Policy (arXiv:2303.04137) writes it, with
         alpha = 1/sqrt(1 - beta_t), gamma = beta_t/sqrt(1 - alpha_bar_t), sigma = sqrt(var_t)
    [10] var_t = beta_t (1 - alpha_bar_prev)/(1 - alpha_bar_t):   variance of q(x_prev | x_t, x0), by Bayes
    [11] x_prev = mu + sigma z, mu the mean of q(x_prev | x_t, x0):
         mu = (sqrt(alpha_bar_prev) beta_t x0 + sqrt(1 - beta_t) (1 - alpha_bar_prev) x_t)/(1 - alpha_bar_t),
         where x0 is estimated as (x_t - sqrt(1 - alpha_bar_t) eps)/sqrt(alpha_bar_t), and may be clipped
    [12] x_prev = alpha (x_t - beta_t grad E) + sigma z:   noisy descent of an energy E = -log q(x_t) + const,
         grad E = -score = eps/sqrt(1 - alpha_bar_t). The gradient does not need the constant
    [13] DDIM: x_prev = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - s^2) eps + s z, s = eta sigma
    [14] guidance: eps = eps(any class) + g (eps(class) - eps(any class));   g > 1: clearer, less varied

Map: Config | MLP, UNet | schedules, coefficients | one step | identities | bound | DDPM | PRESETS | main.
Run alone: `python ddpm.py` learns two moons in about 20 seconds on one CPU core.

Differs from the original:
 1. The linear schedule is scaled by 1000/K (as iDDPM's), so that any K ends in noise; at K = 1000 it is Ho's.
 2. t is drawn uniformly; iDDPM's importance sampling of t is left out.
 3. Fewer than K steps are a chain of their own, with larger betas (iDDPM). DDIM's eps is that of clipped x0.
 4. Labels and guidance are later than the paper. A label is a learned vector, added to the time embedding.
"""
import functools
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    data_shape: tuple = (2,)         # of one sample: (D,) for points, (C, H, W) for images scaled to [-1, 1]
    n_classes: int = 0               # 0 = no labels. One more label, n_classes itself, means "any class"
    label_dropout: float = 0.1       # share of training labels replaced by "any class", so that it is trained
    flip: bool = False               # mirror each training image, left to right, with probability 1/2
    # -- network for points (MLP)
    width: int = 128                 # units per layer
    depth: int = 4                   # residual layers
    # -- network for images (UNet)
    channels: int = 32               # feature maps at full resolution
    channel_mult: tuple = (1, 2, 2)  # feature maps / `channels`, per level; levels after the first halve H, W
    n_res_blocks: int = 1            # ResBlocks per level on the way down (one more on the way up)
    attn_resolutions: tuple = (8,)   # image heights at which every ResBlock is followed by self-attention
    norm_groups: int = 8             # groups of GroupNorm; must divide every level's feature maps
    dropout: float = 0.0             # inside the ResBlocks
    # -- the diffusion
    n_diffusion_steps: int = 100     # K, length of the chain: 1000 in the papers; 100 is enough for points
    schedule: str = "cosine"         # a name in SCHEDULES [7, 8]; "cosine" keeps signal for more of the steps
    prediction_type: str = "eps"     # a name in PREDICTIONS: what the network is asked for [6]
    variance: str = "fixed_small"    # a name in VARIANCES: Sigma of the step back [4, 10]
    clip_x0: bool = False            # when sampling, clip the estimate of x0 to [-1, 1], where pixels lie
    sampler: str = "ddpm"            # "ddpm": new noise in every step [4]; "ddim": good in fewer steps [13]
    sampler_steps: int = 100         # steps that `sample` takes: 1..n_diffusion_steps
    eta: float = 0.0                 # "ddim": fresh noise per step; 0 none, 1 as "ddpm" with fixed_small
    guidance: float = 1.0            # g of [14] where a label is given; 1 = none

    def __post_init__(self):
        self.data_shape = tuple(self.data_shape)                              # a list, if it comes from YAML
        check_networks(self)
        check_at_least(self, 1, "n_diffusion_steps")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("prediction_type", self.prediction_type, PREDICTIONS)
        check_choice("variance", self.variance, VARIANCES)
        check_choice("sampler", self.sampler, ("ddpm", "ddim"))
        timetable(self.n_diffusion_steps, self.sampler_steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} must lie in [0, 1]")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(map(str, choices))}")


def check_at_least(config, least, *fields):
    """Each of these fields, or every number of it if it is a tuple, is at least `least`."""
    for field in fields:
        value = getattr(config, field)
        if not all(x >= least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} {value} must be at least {least}")


def check_networks(config):
    """Raise a ValueError if a field of the data, the labels or the two networks cannot be used."""
    check_at_least(config, 0, "n_classes", "label_dropout", "dropout", "guidance", "channel_mult")
    check_at_least(config, 1, "data_shape", "depth", "n_res_blocks", "attn_resolutions", "norm_groups")
    check_at_least(config, 4, "width", "channels")
    shape, mult, groups = config.data_shape, config.channel_mult, config.norm_groups
    multiple, widths = 2 ** (len(mult) - 1), [round(config.channels * m) for m in (1, *mult)]
    for wrong, message in (
        (config.label_dropout >= 1 or config.dropout >= 1, "label_dropout and dropout must be below 1"),
        (config.guidance != 1 and not (config.n_classes and config.label_dropout),
         f"guidance {config.guidance} needs classes, and label_dropout above 0 to train 'any class'"),
        (config.width % 2 or config.channels % 2, "width and channels must be even: sines and cosines"),
        (len(shape) not in (1, 3), f"data_shape {shape}: (D,) for points or (C, H, W) for images"),
        (config.flip and len(shape) == 1, f"flip: {shape} is no image"),
        (not mult, "channel_mult () needs a number for each level of the U-Net, at least one"),
        (any(size % multiple for size in shape[1:]),
         f"data_shape {shape}: height and width must be multiples of {multiple}, or channel_mult shorter"),
        (any(width < 1 or width % groups for width in widths),
         f"norm_groups {groups} must divide channels {config.channels}, and that times channel_mult {mult}"),
    ):
        if wrong:
            raise ValueError(message)


# ---------------------------------------------------------------- small modules
def time_embedding(t, dim):
    """t (B,) float -> (B, dim): sines, then cosines, of t at dim/2 frequencies from 1 down to 1/10000 (Ho et
    al.). Others differ: improved-diffusion and DiT put the cosines first and divide by half, not half - 1.
    With the wrong one training still works, but released weights give garbage."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t.float()[:, None] * frequency                                # (B, half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                   # (B, dim)


class StepEmbedding(nn.Module):
    """t (B,), or (1,) for all; label (B,) if there are classes, None = "any class" -> (B or 1, d_out)."""

    def __init__(self, d_in, d_out, n_classes):
        super().__init__()
        self.d_in, self.n_classes = d_in, n_classes
        self.mlp = nn.Sequential(nn.Linear(d_in, d_out), nn.SiLU(), nn.Linear(d_out, d_out))
        self.label = nn.Embedding(n_classes + 1, d_out) if n_classes else None

    def forward(self, t, label=None):
        emb = self.mlp(time_embedding(t, self.d_in).to(self.mlp[0].weight.dtype))     # (B or 1, d_out)
        if self.n_classes:
            label = torch.full_like(t, self.n_classes, dtype=torch.long) if label is None else label
            emb = emb + self.label(label)                                 # (B, d_out)
        return emb


# ---------------------------------------------------------------- network for points
class MLP(nn.Module):
    """Residual MLP for points: x (B, D), t (B,) or (1,), label (B,) or None -> (B, d_out), of x's dtype."""

    def __init__(self, config, d_out):
        super().__init__()
        (D,), width = config.data_shape, config.width
        self.embed = StepEmbedding(width, width, config.n_classes)
        self.inp = nn.Linear(D, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(config.depth)])
        self.out = nn.Linear(width, d_out)
        self.init_weights()

    def init_weights(self):
        """torch's defaults, but the output starts at zero: the first loss is the target's mean square."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, label=None):
        emb = self.embed(t, label)                                        # (B or 1, width)
        h = self.inp(x.to(emb.dtype))                                     # (B, width)
        for layer in self.layers:
            h = h + layer(F.silu(h + emb))                                # (B, width)
        return self.out(F.silu(h)).to(x.dtype)                            # (B, d_out)


# ---------------------------------------------------------------- network for images
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


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the step embedding added between them; `attn` appends self-attention.
    Group norm: batch norm would mix the images of a batch, each noised to another level, and its running
    statistics would not fit the averaged weights that samples are made with (EMA, see RECIPES)."""

    def __init__(self, c_in, c_out, c_emb, norm_groups, dropout, attn):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(norm_groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = AttnBlock(c_out, norm_groups) if attn else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))                             # (B, c_out, H, W)
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))               # (B, c_out, H, W)
        return self.attn(self.shortcut(x) + h)                            # (B, c_out, H, W)


class UNet(nn.Module):
    """U-Net of Ho et al. 2020: x (B, C, H, W), t (B,) or (1,), label (B,) or None -> (B, c_out, H, W)."""

    def __init__(self, config, c_out):
        super().__init__()
        (c_data, size, _), n = config.data_shape, config.n_res_blocks
        ch, widths = config.channels, [round(config.channels * m) for m in config.channel_mult]
        res = lambda a, b, attn: ResBlock(a, b, 4 * ch, config.norm_groups, config.dropout, attn)
        attn_at = lambda level: size // 2**level in config.attn_resolutions
        named = lambda **parts: nn.Sequential(OrderedDict(parts))
        # Zeros on the right and bottom only: TensorFlow's "SAME" padding, as in the original.
        halve = lambda c: named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))
        double = lambda c: named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1))
        self.embed = StepEmbedding(ch, 4 * ch, config.n_classes)
        self.conv_in = nn.Conv2d(c_data, ch, 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        c, c_skips = ch, [ch]         # feature maps: now, and of every output kept for the way up
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList([res(a, width, attn_at(level)) for a in [c] + [width] * (n - 1)]))
            c, c_skips = width, c_skips + [width] * n
            if level + 1 < len(widths):
                self.downsample.append(halve(c))
                c_skips.append(c)
        self.mid = nn.ModuleList([res(c, c, True), res(c, c, False)])
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):            # self.up[0] is the coarsest level
            inputs = [a + c_skips.pop() for a in [c] + [width] * n]       # last skip: conv_in or downsample
            self.up.append(nn.ModuleList([res(a, width, attn_at(level)) for a in inputs]))
            c = width
            if level > 0:
                self.upsample.append(double(c))
        self.norm_out = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, c_out, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """Ho et al.: uniform, fan-average; but the output and the ends of residual branches start at zero."""
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
                if name.endswith(("conv2", "attn.out", "conv_out")):
                    nn.init.zeros_(m.weight)

    def forward(self, x, t, label=None):
        emb = self.embed(t, label)                                        # (B or 1, 4 ch)
        h = self.conv_in(x.to(emb.dtype))                                 # (B, ch, H, W)
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, emb)                                         # (B, width, H/2^level, W/2^level)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)                             # (B, width, H/2^(level+1), ...)
                skips.append(h)
        for block in self.mid:
            h = block(h, emb)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)        # (B, c_out, H, W)


# ---------------------------------------------------------------- schedules: K betas, float64
def linear_beta(K, first, last):
    return torch.linspace(first, last, K, dtype=torch.float64).clamp(max=0.999)               # [8]


def cosine_beta(K, s=0.008):
    # s keeps the first betas from being tiny; only the last is clipped. diffusers calls it squaredcos_cap_v2.
    f = torch.cos((torch.arange(K + 1, dtype=torch.float64) / K + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)                                              # [7]


# 0.1/K .. 20/K: for every K the same process in continuous time, which is "vp" of flow_matching.py.
SCHEDULES = {"linear": lambda K: linear_beta(K, 0.1 / K, 20 / K), "cosine": cosine_beta}


def alpha_bars(schedule, K):
    """(K,) float64. diffusers' float32 tables differ in the fifth digit where 1 - alpha_bar is small."""
    return torch.cumprod(1 - SCHEDULES[schedule](K), 0)                                       # [2]


class Coefficients(NamedTuple):
    """The numbers of a step x_t -> x_prev: (S,) for S levels, or broadcastable over x. dit.py's differ."""
    signal: torch.Tensor        # sqrt(alpha_bar): how much of x0 is in x_t
    sigma: torch.Tensor         # sqrt(1 - alpha_bar): how much noise. sigma of [9] is the root of `variance`
    signal_prev: torch.Tensor   # the same two of x_prev; 1 and 0 if x_prev is the data
    sigma_prev: torch.Tensor
    beta: torch.Tensor
    c_x0: torch.Tensor          # coefficients of the posterior mean
    c_xt: torch.Tensor
    variance: torch.Tensor      # of the posterior: 0 at t = 0, where x_prev is x0 itself
    log_small: torch.Tensor     # log variance, at t = 0 that of a floor
    log_large: torch.Tensor     # log beta, at t = 0 that of the same floor


def coefficients(alpha_bar):
    """alpha_bar (S,) of the levels visited, least noised first -> Coefficients, stacked (fields, S). Any
    selection of the K levels is a chain of its own, with larger betas: so sampling can take fewer steps.
    Give float64: 1 - alpha_bar/alpha_bar_prev loses half its digits in float32. It differs from dit.py's."""
    alpha_bar_prev = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / alpha_bar_prev
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)                                  # [10]
    # The variance at t = 0 is 0 and has no log; only the last term of the bound needs one. Ho and iDDPM take
    # the variance at t = 1, for log_large too (diffusers 1e-20). A chain of one step has no t = 1: take beta.
    floor = variance[1:2] if len(variance) > 1 else beta
    return torch.stack(Coefficients(
        signal=alpha_bar.sqrt(), sigma=(1 - alpha_bar).sqrt(),
        signal_prev=alpha_bar_prev.sqrt(), sigma_prev=(1 - alpha_bar_prev).sqrt(), beta=beta,
        c_x0=alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),                                  # [11]
        c_xt=(1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar), variance=variance,
        log_small=torch.cat([floor, variance[1:]]).log(), log_large=torch.cat([floor, beta[1:]]).log()))


@functools.lru_cache
def step_table(schedule, K, device, levels=None):
    """Coefficients of the chain of all levels, or of a tuple of some, noisiest first: float32 (fields, S) on
    `device`. Cached: a copy from the host in every step would make the host wait. Not a buffer of the model:
    .to(bfloat16) would round alpha_bar_0 to 1."""
    alpha_bar = alpha_bars(schedule, K)
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


# ---------------------------------------------------------------- one step of the chain; c: its Coefficients
def q_sample(x0, eps, c):
    return c.signal * x0 + c.sigma * eps                                                      # [3]


# What the network may predict: how the target is made, and how x0 follows from the prediction.   [6] [11]
PREDICTIONS = {
    "eps": (lambda x0, eps, c: eps, lambda x_t, eps, c: (x_t - c.sigma * eps) / c.signal),
    "x0": (lambda x0, eps, c: x0, lambda x_t, x0, c: x0),
    "v": (lambda x0, eps, c: c.signal * eps - c.sigma * x0, lambda x_t, v, c: c.signal * x_t - c.sigma * v),
}

# Log-variance of the step back. Small is right if the data are one point, large if they are N(0, I). Where it
# is learned, a second output f of the network says what lies between: -1 small, 1 beta itself (f unbounded).
VARIANCES = {
    "fixed_small": lambda f, c: c.log_small,
    "fixed_large": lambda f, c: c.log_large,
    "learned": lambda f, c: (1 + f) / 2 * c.beta.log() + (1 - f) / 2 * c.log_small,           # [4]
}


def eps_from_x0(x_t, x0, c):
    return (x_t - c.signal * x0) / c.sigma


def posterior_mean(x0, x_t, c):
    return c.c_x0 * x0 + c.c_xt * x_t                                                         # [11]


def ancestral_step(x0, x_t, log_variance, c, z):
    return posterior_mean(x0, x_t, c) + (0.5 * log_variance).exp() * z                        # [4]


def ddim_step(x0, eps, c, eta, z):
    s = eta * c.variance.sqrt()
    # clamp: at eta = 1 the difference may be 0 up to rounding, and the root of -1e-12 is nan.
    return c.signal_prev * x0 + (c.sigma_prev**2 - s**2).clamp(min=0).sqrt() * eps + s * z    # [13]


# ---------------------------------------------------------------- identities, for tests: no model calls them
def q_step(x_prev, z, c):
    """One step of noise; t + 1 of them make q_sample."""
    return (1 - c.beta).sqrt() * x_prev + c.beta.sqrt() * z                                   # [1]


def score_from_eps(eps, c):
    """grad log q(x_t), which is minus the gradient of the energy."""
    return -eps / c.sigma                                                                     # [12]


def alpha_gamma_step(x_t, eps, c, z):
    """Equals ancestral_step with x0 not clipped and variance fixed_small."""
    alpha, gamma, sigma = 1 / (1 - c.beta).sqrt(), c.beta / c.sigma, c.variance.sqrt()
    return alpha * (x_t - gamma * eps) + sigma * z                                            # [9]


def energy_step(x_t, energy_gradient, c, z):
    """Equal as well: go downhill by beta, undo the shrinking of q_step, add noise."""
    return (x_t - c.beta * energy_gradient) / (1 - c.beta).sqrt() + c.variance.sqrt() * z     # [12]


# ---------------------------------------------------------------- terms of the bound, elementwise, in nats
def normal_kl(mean1, log_variance1, mean2, log_variance2):
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - ratio - 1 + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def point_nll(x0, mean, log_variance):
    """-log density of a normal distribution."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * (-log_variance).exp())


def pixel_nll(x0, mean, log_variance):
    """-log probability of an 8-bit pixel: the mass of its bin in [-1, 1]; outer bins reach to infinity."""
    # The normal distribution function as the released code approximates it: published figures contain this.
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    scale = (-0.5 * log_variance).exp()
    upper = torch.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) * scale))
    lower = torch.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) * scale))
    return -(upper - lower).clamp(min=1e-12).log()


# ---------------------------------------------------------------- the model
def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


class DDPM(nn.Module):
    """A diffusion model of points or images."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, is_points = config.data_shape[0], len(config.data_shape) == 1
        self.net = (MLP if is_points else UNet)(config, 2 * d if config.variance == "learned" else d)
        self.target, self.to_x0 = PREDICTIONS[config.prediction_type]
        self.log_variance = VARIANCES[config.variance]
        self.nll = point_nll if is_points else pixel_nll

    def predict(self, x_t, t, label=None, guidance=1.0):
        """The network's eps, x0 or v (B, ...) for x_t at t (B,) or (1,), and its f (B, ...), None unless
        learned. label None = "any class". Guiding x0 or v guides eps: both are linear in it, given x_t."""
        split = lambda out: out.chunk(2, dim=1) if self.config.variance == "learned" else (out, None)
        prediction, f = split(self.net(x_t, t.float(), label))            # (B, d, ...) each
        if label is not None and guidance != 1:
            any_class, _ = split(self.net(x_t, t.float()))
            prediction = any_class + guidance * (prediction - any_class)                      # [14]
        return prediction, f

    def x0_estimate(self, x_t, prediction, c, clip):
        x0 = self.to_x0(x_t, prediction, c)
        # Deep in the noise c.signal is nearly 0: dividing by it makes a small error of eps a huge one of x0.
        # Pixels lie in [-1, 1], so what is beyond can be cut off. Points may lie beyond: do not clip them.
        return x0.clamp(-1, 1) if clip else x0

    def bound_term(self, x0, x_t, x0_hat, f, t, c):
        """The term of the bound [5] at t, bits per dimension (B,): -log p(x0 | x_t) at t = 0, else a KL."""
        mean, log_variance = posterior_mean(x0_hat, x_t, c), self.log_variance(f, c)
        kl = normal_kl(posterior_mean(x0, x_t, c), c.log_small, mean, log_variance)           # [5]
        nll = self.nll(x0, mean, log_variance)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    def loss(self, batch, noise=None, t=None):
        """batch: x (B, *data_shape), label (B,) if n_classes -> loss (0-d), its parts mse and, with learned
        variance, vb (bits per dimension), per_sample (B,), and t (B,) scaled to [0, 1]. The argument t is in
        0..K-1: t = 0 is one step of noise, not none, and t = K-1 is all noise."""
        x0, label, K = batch["x"], self.label(batch, required=True), self.config.n_diffusion_steps
        if self.training and self.config.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0.flip(3), x0)
        eps = torch.randn_like(x0) if noise is None else noise
        t = torch.randint(K, (len(x0),), device=x0.device) if t is None else t
        c = at(step_table(self.config.schedule, K, x0.device), t, x0)
        x_t = q_sample(x0, eps, c)                                                            # [3]
        if label is not None and self.training:
            dropped = torch.rand(t.shape, device=t.device) < self.config.label_dropout
            label = torch.where(dropped, self.config.n_classes, label)
        prediction, f = self.predict(x_t, t, label)
        mse = (prediction - self.target(x0, eps, c)).square().flatten(1).mean(1)              # [6]
        per_sample, parts = mse, {"mse": mse.mean()}
        if self.config.variance == "learned":
            # detach: the mean learns from the mse alone, whose gradient is much less noisy than the bound's.
            vb = self.bound_term(x0, x_t, self.x0_estimate(x_t, prediction.detach(), c, clip=False), f, t, c)
            # K vb estimates the bound's sum over t. DiT and some of iDDPM's models omit the factor 0.001 K.
            per_sample, parts["vb"] = mse + 0.001 * K * vb, vb.mean()
        return {"loss": per_sample.mean(), **parts, "per_sample": per_sample.detach(), "t": t / max(K - 1, 1)}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, step_noise=None):
        """From noise to data: -> x (B, *data_shape). batch says how many, by "n", "label" (B,) or "x"; no
        label means "any class". steps: how many, or which t (see timetable). noise: x at the first t;
        step_noise: z of all steps but the last; else drawn. trace: a list that receives every x_t."""
        config, label, device = self.config, self.label(batch), next(self.parameters()).device
        B = batch["n"] if "n" in batch else len(batch.get("label", batch.get("x")))
        ts = timetable(config.n_diffusion_steps, config.sampler_steps if steps is None else steps)
        table = step_table(config.schedule, config.n_diffusion_steps, device, tuple(ts))      # (fields, S)
        draw = lambda: randn((B, *config.data_shape), generator, device)
        keep = (lambda x: None) if trace is None else trace.append
        x = draw() if noise is None else noise
        keep(x)
        for k, t in enumerate(ts):
            c = at(table, len(ts) - 1 - k, x)                             # rows count from the data
            prediction, f = self.predict(x, torch.full((1,), t, device=device), label, config.guidance)
            x0 = self.x0_estimate(x, prediction, c, config.clip_x0)
            noiseless = k == len(ts) - 1 or config.sampler == "ddim" and config.eta == 0
            z = 0 if noiseless else draw() if step_noise is None else step_noise[k]
            if config.sampler == "ddim":        # its eps fits the clipped x0; diffusers keeps the network's
                x = ddim_step(x0, eps_from_x0(x, x0, c), c, config.eta, z)
            else:
                x = ancestral_step(x0, x, self.log_variance(f, c), c, z)
            keep(x)
        return x

    @torch.no_grad()
    def bits_per_dim(self, batch, noise=None):
        """The bound on -log p(x) [5], bits per dimension, of 8-bit pixels or of a density: total (B,), prior
        (B,), vb (B, K) with a column per t. noise: None or (K, B, ...), a row per t. Costs K evaluations."""
        x0, label, K, vb = batch["x"], self.label(batch), self.config.n_diffusion_steps, []
        for k in range(K):
            t = torch.full((1,), k, device=x0.device)
            c = at(step_table(self.config.schedule, K, x0.device), k, x0)
            x_t = q_sample(x0, torch.randn_like(x0) if noise is None else noise[k], c)
            prediction, f = self.predict(x_t, t, label)
            x0_hat = self.x0_estimate(x_t, prediction, c, self.config.clip_x0)
            vb.append(self.bound_term(x0, x_t, x0_hat, f, t, c))
        zero, vb = torch.zeros_like(x0), torch.stack(vb, dim=1)
        # [5] How far the last level, whose c is left here, still is from N(0, I). Nothing in it is learned.
        prior = normal_kl(c.signal * x0, 2 * c.sigma.log(), zero, zero).flatten(1).mean(1) / math.log(2)
        return {"total": vb.sum(1) + prior, "prior": prior, "vb": vb}

    def label(self, batch, required=False):
        """The checked labels of a batch; None = "any class"."""
        n_classes, label = self.config.n_classes, batch.get("label")
        if n_classes and label is None and (required or not self.config.label_dropout):
            raise ValueError(f"the batch has no 'label', but the model has n_classes = {n_classes}; only "
                             f"label_dropout, here {self.config.label_dropout}, trains 'any class'")
        # On a GPU every step would have to wait for this comparison; there the embedding itself complains.
        on_cpu = n_classes and label is not None and label.device.type == "cpu"
        if on_cpu and ((label < 0) | (label >= n_classes)).any():
            raise ValueError(f"label {label.min()}..{label.max()} is out of range 0..{n_classes - 1}")
        return label if n_classes else None

    def param_groups(self, weight_decay):
        """For AdamW: matrices and kernels decay; biases, norms and embeddings do not."""
        embeddings = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
        decays = lambda p: p.dim() > 1 and p not in embeddings
        return [{"params": [p for p in self.parameters() if decays(p)], "weight_decay": weight_decay},
                {"params": [p for p in self.parameters() if not decays(p)], "weight_decay": 0.0}]

    @classmethod
    def from_official(cls, state_dict, config=None):
        """Weights of diffusers' UNet2DModel as in google/ddpm-cifar10-32, which are Ho et al.'s own, -> DDPM.
        config: PRESETS["cifar10"] if None. ValueError if they do not fit it."""
        weights = {}
        for key, value in state_dict.items():
            name = key
            for pattern, replacement in OFFICIAL_NAMES:
                name = re.sub(pattern, replacement, name)
            weights[key if name in weights else name] = value             # name taken: the key is left over
        with torch.device("meta"):
            model = cls(config or Config(**PRESETS["cifar10"]))
        load_strictly(model.net, weights)
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


# diffusers' names -> ours, applied in turn. The published file has the older query, key, value, proj_attn.
OFFICIAL_NAMES = (
    (r"^time_embedding\.linear_1\.", "embed.mlp.0."), (r"^time_embedding\.linear_2\.", "embed.mlp.2."),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2."), (r"^conv_norm_out\.", "norm_out."),
    (r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"\1.\2.\3.attn."), (r"\.group_norm\.", ".norm."),
    (r"^(down|up)_blocks\.(\d+)\.\1samplers\.0\.", r"\1sample.\2."), (r"\.conv_shortcut\.", ".shortcut."),
    (r"^mid_block\.resnets\.", "mid."), (r"^mid_block\.attentions\.0\.", "mid.0.attn."),
    (r"\.(to_q|query)\.", ".q."), (r"\.(to_k|key)\.", ".k."), (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".out."), (r"\.time_emb_proj\.", ".emb."),
)

Model = DDPM

PRESETS = {
    "tiny": {},                                                           # points in the plane
    "tiny_image": dict(data_shape=(3, 32, 32), n_diffusion_steps=1000, clip_x0=True, sampler="ddim",
                       sampler_steps=50),                                 # two CPU cores are enough
    "cifar10": dict(data_shape=(3, 32, 32), flip=True, channels=128, channel_mult=(1, 2, 2, 2),
                    n_res_blocks=2, attn_resolutions=(16,), norm_groups=32, dropout=0.1,
                    n_diffusion_steps=1000, schedule="linear", variance="fixed_large", clip_x0=True,
                    sampler_steps=1000),                                  # Ho et al.: 35.7 M, FID 3.17
}

# What train.py takes for these presets unless told otherwise; its defaults are the rest. ema_max: samples
# are made by a moving average of the weights (EMA), less noisy than those of any one step. Its memory is
# short at first, because early weights are soon out of date, and grows to about 1/(1 - ema_max) steps.
ADAM = dict(betas=(0.9, 0.999), weight_decay=0.0)
RECIPES = {
    "tiny": ADAM | dict(steps=4000, batch_size=512, lr=2e-3, ema_max=0.999),
    "tiny_image": ADAM | dict(steps=1500, batch_size=64, lr=1e-3, ema_max=0.995, eval_every=500),
    "cifar10": ADAM | dict(steps=800_000, batch_size=128, lr=2e-4, lr_schedule="constant", warmup=5000,
                           clip=1.0),
}


# ---------------------------------------------------------------- demo
def two_moons(n):
    """n points (n, 2) on two half circles that reach into each other, blurred by 0.05, about [-1, 1] wide."""
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return (torch.stack([x, y], dim=1) + 0.05 * torch.randn(n, 2) - torch.tensor([0.5, 0.25])) / 1.5


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples: 0 only for equal distributions (Szekely & Rizzo)."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def main(steps=3000, batch_size=512):
    torch.manual_seed(0)
    model = DDPM(Config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = model.loss({"x": two_moons(batch_size)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 1000 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    # Means over several sets: a single distance between two sets of 2000 varies by as much as its size.
    distance = sum(energy_distance(x, two_moons(2000)) for x in model.sample({"n": 10000}).split(2000)) / 5
    floor = sum(energy_distance(two_moons(2000), two_moons(2000)) for _ in range(20)) / 20
    print(f"energy distance of 2000 samples to data: {distance:.5f}; expect about 0.001, as between two sets "
          f"of data: {floor:.5f}")
    return distance, floor


if __name__ == "__main__":
    main()
