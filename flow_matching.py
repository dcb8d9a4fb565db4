"""Flow matching: a network learns, by regression, a velocity field whose flow carries noise to data.

    Lipman, Chen, Ben-Hamu, Nickel, Le: "Flow Matching for Generative Modeling", arXiv:2210.02747
    optimal coupling: Tong et al., arXiv:2302.00482; github.com/atong01/conditional-flow-matching ("torchcfm")
    a library by authors of the first: github.com/facebookresearch/flow_matching

Let a cloud of noise drift with velocity v_t(x) from t = 0 to t = 1: with the right v it arrives distributed
like the data. Training such a flow by likelihood takes an ODE solve per step. Flow matching takes none: draw
a noise point and a data point, go a fraction t of the way between them, regress v_t on the velocity there.

TIME AND NAMES are those of the flow papers. Time runs AGAINST ddpm.py, and x0 is NOISE:
    here                            ddpm.py, K steps
    t = 0 noise ... t = 1 data      t = K-1 noise ... t = 0 almost data:  t here = 1 - (t there + 1)/K
    x0 noise, x1 data               eps noise, x0 data
    alpha, sigma                    sqrt(alpha_bar), sqrt(1 - alpha_bar)
    velocity v_t = dx/dt            (its target "v" is alpha eps - sigma x0, another thing: see `convert`)
Axes: B samples, D dimensions of a point; or C, H, W of an image in [-1, 1]. M centres of a mixture.

The flow (a continuous normalising flow)
    [1]  dx/dt = v_t(x),   x(0) ~ N(0, I),   samples are x(1)
    [2]  d log p_t(x(t))/dt = -div v_t(x(t)); Hutchinson: div v = E z^T (dv/dx) z for random z, E z z^T = I
Its training
    [3]  L_FM = E |v_t(x) - u_t(x)|^2,   u_t(x) = E[u_t(x|x1) | x_t = x]: the field we want, but cannot
         compute, since it is a mean over all data points x1 that may have led to x
    [4]  L_CFM = E |v_t(x) - u_t(x|x1)|^2 = L_FM + constant: can be computed, and has the same gradients
Paths from noise to one data point
    [5]  p_t(x|x1) = N(mu, sigma^2 I), mu = alpha x1:   x_t = alpha x1 + sigma x0
    [6]  u_t(x|x1) = (sigma'/sigma) (x - mu) + mu',   which is alpha' x1 + sigma' x0 at x = x_t
    [7]  "ot": alpha = t,   sigma = 1 - (1 - sigma_min) t: straight lines at constant speed; for sigma_min = 0
         x_t = t x1 + (1 - t) x0,   u_t = x1 - x0,   so that x1 = x_t + (1 - t) u_t
    [8]  "vp": alpha = exp(-T/2),   sigma = sqrt(1 - exp(-T)),   T = integral of beta over [0, 1-t]: DDPM
    [9]  "ve": alpha = 1,   sigma = sigma_min (sigma_max/sigma_min)^(1-t): noise shrinks, data stay in place
Around it
    [10] coupling "ot": noise and data of a batch are paired not at random, but with the least sum |x0 - x1|^2
    [11] Runge-Kutta: k_i = v(x + h sum_j a_ij k_j, t + c_i h),   x(t + h) = x + h sum_i b_i k_i
    [12] score grad log p_t(x) = -E[x0 | x_t = x]/sigma
    [13] guidance: v = v(any class) + g (v(class) - v(any class));   g > 1: clearer; some write w = g - 1

Map: Config | MLP, UNet (as in ddpm.py) | paths | identities | couplings | solvers | FlowMatching | main.
Run alone: `python flow_matching.py` learns eight Gaussians in about half a minute on two CPU cores.

Differs from the original:
 1. sigma_min is 0, as in both repositories. The paper's is "sufficiently small", without a number.
 2. The network is given 100 t, as from a chain of 100 steps. Both repositories give it t, at which most
    sinusoids of the embedding hardly move; at 1000 t they ripple: dopri5 needs 3 times the evaluations.
 3. The optimal coupling uses each point of a batch once; torchcfm draws pairs with replacement. With labels,
    noise is exchanged only within a class: the noise of a class must stay N(0, I), where its samples start.
 4. No official weights: torchcfm's, the only ones, are of another U-Net (four heads, cosines first, raw t).
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
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
    # -- the flow
    path: str = "ot"                 # a name in PATHS: how noise turns into data [5]
    sigma_min: float = 0.0           # "ot", "ve": standard deviation left around a data point at t = 1
    sigma_max: float = 10.0          # "ve": the same at t = 0; about the largest distance between data points
    coupling: str = "independent"    # a name in COUPLINGS: which noise goes with which data [10]
    solver: str = "midpoint"         # a name in TABLEAUS [11]; "midpoint" evaluates the network twice a step
    sampler_steps: int = 50          # of `sample`, from noise to data; "dopri5" chooses its own
    tolerance: float = 1e-5          # "dopri5": error allowed per step, absolute and relative (the paper's)
    guidance: float = 1.0            # g of [13] where a label is given; 1 = none

    def __post_init__(self):
        self.data_shape = tuple(self.data_shape)                              # a list, if it comes from YAML
        check_networks(self)
        check_at_least(self, 0, "sigma_min", "sigma_max")
        check_at_least(self, 1, "sampler_steps")
        check_choice("path", self.path, PATHS)
        check_choice("coupling", self.coupling, COUPLINGS)
        check_choice("solver", self.solver, TABLEAUS)
        if self.sigma_min >= 1 or self.path == "ve" and not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below 1, for path 've' above 0 and below "
                             f"sigma_max {self.sigma_max}: take 0.01")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance {self.tolerance} must be positive")


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


# ---------------------------------------------------------------- paths: alpha, sigma, alpha', sigma' of t
def ot_path(t, config):
    """Straight lines, each of which a solver follows exactly in one step. The field bends only where lines to
    different data points cross, so that it needs fewer steps than curved paths. Both "ot" are optimal
    transport: this path from N(0, I) to one data point, the coupling from noise to data of a whole batch."""
    shrink = 1 - config.sigma_min
    return t, 1 - shrink * t, torch.ones_like(t), torch.full_like(t, -shrink)                 # [7]


def vp_path(t, config, beta_min=0.1, beta_max=20.0):
    """The linear schedule of ddpm.py as K grows: beta_k = beta(k/K)/K there, and alpha_bar, the product of
    1 - beta_k, tends to exp(-T). Noise is only approached: 0.7 % of x1 is left at t = 0."""
    s = 1 - t                                                 # diffusion's own time
    T = beta_min * s + (beta_max - beta_min) * s**2 / 2
    alpha, sigma = torch.exp(-T / 2), torch.sqrt(-torch.expm1(-T))        # 1 - exp(-T) would lose digits
    half_beta = (beta_min + (beta_max - beta_min) * s) / 2
    return alpha, sigma, half_beta * alpha, -half_beta * alpha**2 / sigma                     # [8]


def ve_path(t, config):
    """x_t = x1 + sigma x0, with so much noise at t = 0 that sampling may start from noise alone. The network
    gets x_t unscaled, unlike Karras et al.'s, and learns this path less well than the others."""
    rate = math.log(config.sigma_max / config.sigma_min)
    sigma = config.sigma_min * torch.exp(rate * (1 - t))
    return torch.ones_like(t), sigma, torch.zeros_like(t), -rate * sigma                      # [9]


def cosine_path(t, config):
    """The cosine schedule of ddpm.py without its offset and clip."""
    angle, speed = math.pi / 2 * t, math.pi / 2
    return angle.sin(), angle.cos(), speed * angle.cos(), -speed * angle.sin()


def linear_vp_path(t, config):
    """alpha = t as in "ot", sigma such that alpha^2 + sigma^2 = 1."""
    sigma = torch.sqrt(1 - t**2)
    return t, sigma, torch.ones_like(t), -t / sigma


def polynomial_path(t, config, n=2):
    """The lines of "ot", begun slowly: where "ot" is at time t^n, this is at t."""
    return t**n, 1 - t**n, n * t ** (n - 1), -n * t ** (n - 1)


PATHS = {"ot": ot_path, "vp": vp_path, "ve": ve_path, "cosine": cosine_path, "linear_vp": linear_vp_path,
         "polynomial": polynomial_path}
# Where the flow ends: 1, unless sigma' is infinite there (the paper, too, stops just before).
T_END = {"vp": 1 - 1e-5, "linear_vp": 1 - 1e-5}


# ---------------------------------------------------------------- identities: for the tests and the demo
def gaussian_velocity(x, mu, sigma, d_mu, d_sigma):
    """While mu and sigma change, a point stays as many standard deviations sigma off the centre mu."""
    return d_sigma / sigma * (x - mu) + d_mu                                                  # [6]


def marginal(x, t, path, centres, std=0.0):
    """x (B, D), t (B,) -> the field (B, D) that a perfect network would learn, score (B, D), log p_t (B,).
    They are known here because the data are: N(centre, std^2 I) for one of centres (M, D) at random; std = 0
    makes a finite set. At every t the points bound for one centre are a Gaussian: [5] and [6] hold for it,
    with variance sigma^2 + (alpha std)^2. path: t -> alpha, sigma, alpha', sigma'."""
    D, M = x.shape[1], len(centres)
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path(t))                      # (B, 1, 1)
    wide = torch.sqrt(sigma**2 + (alpha * std) ** 2)
    d_wide = (sigma * d_sigma + alpha * d_alpha * std**2) / wide
    z = (x[:, None] - alpha * centres) / wide                                                 # (B, M, D)
    log_p = -0.5 * (z**2).sum(2) - D * torch.log(wide * math.sqrt(2 * math.pi))[:, :, 0]      # (B, M)
    posterior = log_p.softmax(1)[:, :, None]                  # of the centre, given x
    u = gaussian_velocity(x[:, None], alpha * centres, wide, d_alpha * centres, d_wide)       # (B, M, D)
    return (posterior * u).sum(1), (posterior * -z / wide).sum(1), log_p.logsumexp(1) - math.log(M)     # [3]


def convert(value, given, wanted, x_t, coefficients):
    """One form of the prediction from another: "x1", "eps" (the noise x0), "velocity", "score", DDPM's "v".
    Any of them and x_t fix the pair (x1, eps), which fixes the others; on "ot", x1 = x_t + (1 - t) velocity.
    coefficients: alpha, sigma, alpha', sigma', broadcastable to x_t; where time runs the other way, flip the
    signs of the last two. "score" takes noise and data for independent, which coupling "ot" gives up."""
    alpha, sigma, d_alpha, d_sigma = coefficients
    det = d_alpha * sigma - d_sigma * alpha
    norm = alpha**2 + sigma**2                                # 1 on the paths that preserve variance
    x1, eps = {
        "x1": lambda: (value, (x_t - alpha * value) / sigma),
        "eps": lambda: ((x_t - sigma * value) / alpha, value),
        "score": lambda: ((x_t + sigma**2 * value) / alpha, -sigma * value),                  # [12]
        "velocity": lambda: ((sigma * value - d_sigma * x_t) / det, (d_alpha * x_t - alpha * value) / det),
        "v": lambda: ((alpha * x_t - sigma * value) / norm, (sigma * x_t + alpha * value) / norm),
    }[given]()
    return {"x1": lambda: x1, "eps": lambda: eps, "score": lambda: -eps / sigma,
            "velocity": lambda: d_alpha * x1 + d_sigma * eps, "v": lambda: alpha * eps - sigma * x1}[wanted]()


# ---------------------------------------------------------------- couplings: which noise goes with which data
def assignment(cost):
    """cost (n, n) array -> the permutation with the least sum of cost[i, permutation[i]], exactly. O(n^3).
    Shortest augmenting paths (Jonker & Volgenant 1987). Rows get their columns one after the other. If a row
    wants a column that is taken, the owner moves to another, whose owner moves in turn, until one is free. Of
    all such chains of moves, Dijkstra's algorithm finds the one that raises the sum least; `price` is what
    earlier rows have shown about the columns. scipy's linear_sum_assignment, in C++, is ten times as fast."""
    if not np.isfinite(cost).all():
        raise ValueError("optimal coupling: the data or the noise of this batch are not finite")
    n = len(cost)
    price, row_of, column_of = cost.min(0), np.full(n, -1), np.full(n, -1)
    for j, i in enumerate(cost.argmin(0)):                    # the cheapest row of a column, if still free
        if column_of[i] < 0:
            row_of[j], column_of[i] = i, j
    for row in np.flatnonzero(column_of < 0):
        reach, before = cost[row] - price, np.full(n, row)    # cost of the chain to column j; its last row
        done = np.zeros(n, bool)
        while True:
            j = np.where(done, np.inf, reach).argmin()
            if row_of[j] < 0:
                break                                         # a free column ends the chain
            done[j] = True
            pushed = cost[row_of[j]] - price                  # the row that owns it moves to another column
            pushed += reach[j] - pushed[j]
            better = (pushed < reach) & ~done
            reach[better], before[better] = pushed[better], row_of[j]
        price[done] += reach[done] - reach[j]
        while j >= 0:                                         # back along the chain: rows take their columns
            i = row_of[j] = before[j]
            column_of[i], j = j, column_of[i]
    return column_of


def optimal_coupling(x0, x1, label):
    """x0 in another order: its row i now goes with x1[i], and label[i] if given. Lines so paired cross less
    and the field bends less. The assignment runs on the CPU: the host waits for the device in every step."""
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()) ** 2                   # (B, B)
    if label is not None:   # noise stays in its class: one pair across classes costs more than all within
        cost = cost + (label[:, None] != label) * (cost.max() + 1) * len(cost)
    return x0[torch.from_numpy(assignment(cost.cpu().numpy())).to(x0.device)]                 # [10]


COUPLINGS = {"independent": lambda x0, x1, label: x0, "ot": optimal_coupling}


# ---------------------------------------------------------------- solvers
# An explicit Runge-Kutta method is a table: the rows of a, one per stage, then b; c_i is the sum of row i.
# rk4_38, the 3/8 rule, is what torchdiffeq means by "rk4"; dopri5 is Dormand & Prince's of 1980.
TABLEAUS = {
    "euler": [[], [1]],                                                                       # order 1
    "midpoint": [[], [1 / 2], [0, 1]],                                                        # order 2
    "heun": [[], [1], [1 / 2, 1 / 2]],                                                        # order 2
    "heun3": [[], [1 / 3], [0, 2 / 3], [1 / 4, 0, 3 / 4]],                                    # order 3
    "rk4": [[], [1 / 2], [0, 1 / 2], [0, 0, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],                # order 4
    "rk4_38": [[], [1 / 3], [-1 / 3, 1], [1, -1, 1], [1 / 8, 3 / 8, 3 / 8, 1 / 8]],           # order 4
    "dopri5": [[], [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],               # order 5, adaptive
               [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
               [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
               [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]],
}
# Weights of its error: b less the b of a method of order 4, which also uses the slope at the new point.
DOPRI5_ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]


def weighted_sum(weights, slopes):
    return sum(w * k for w, k in zip(weights, slopes) if w)


def runge_kutta_step(f, x, t, h, tableau, first=None):
    """x(t + h), and the slopes k_i. first: f(x, t), if it is known already."""
    *rows, b = tableau
    slopes = [f(x, t) if first is None else first]
    for row in rows[1:]:
        slopes.append(f(x + h * weighted_sum(row, slopes), t + h * sum(row)))                 # [11]
    return x + h * weighted_sum(b, slopes), slopes                                            # [11]


def odeint(f, x, times, solver="midpoint", tolerance=1e-5, trace=None):
    """Solve dx/dt = f(x, t) through times, floats that rise or fall -> x at the last, count of evaluations.
    One step from each time to the next, but "dopri5" chooses its own between the first and the last. trace: a
    list that receives x before the first and after every step."""
    tableau = TABLEAUS[solver]
    keep = (lambda x: None) if trace is None else trace.append
    keep(x)
    if solver == "dopri5":
        return dopri5(f, x, times[0], times[-1], tolerance, keep)
    for t, t_next in zip(times, times[1:]):
        x, _ = runge_kutta_step(f, x, t, t_next - t, tableau)
        keep(x)
    return x, (len(times) - 1) * (len(tableau) - 1)


def dopri5(f, x, t, end, tolerance, keep):
    """As odeint. A step is taken if the root mean square of its estimated error, over all of x, is within the
    tolerance. The host reads that number in every step, and waits for the device as with no other solver."""
    h, slope, n_evaluations = (end - t) / 20, f(x, t), 1
    while t != end:
        h, t_new = (h, t + h) if abs(h) < abs(end - t) else (end - t, end)
        x_new, slopes = runge_kutta_step(f, x, t, h, TABLEAUS["dopri5"], first=slope)
        slope_new = f(x_new, t_new)                           # is also the first slope of the next step
        n_evaluations += 6
        error = h * weighted_sum(DOPRI5_ERROR, slopes + [slope_new])
        bound = tolerance * (1 + torch.maximum(x.abs(), x_new.abs()))
        ratio = (error / bound).square().mean().sqrt().item()
        if ratio <= 1:
            x, t, slope = x_new, t_new, slope_new
            keep(x)
        elif abs(h) < 1e-10:
            raise ValueError(f"dopri5: no step is short enough at t = {t:.6f}: the velocity is not finite "
                             f"there, or tolerance {tolerance} is finer than {x.dtype}")
        # Errors grow as h^5: the next h aims a little below the bound, in moderate leaps; nan is far above.
        h *= 0.2 if math.isnan(ratio) else min(5.0, max(0.2, 0.9 * max(ratio, 1e-9) ** -0.2))
    return x, n_evaluations


def divergence(f, x, t, probe=None):
    """f(x, t) and its divergence (B,): exact, by a backward pass per dimension; or, if a random z shaped like
    x is given as probe, Hutchinson's estimate, by a single pass."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = f(x, t)
        gradient = lambda y: torch.autograd.grad(y.sum(), x, retain_graph=True)[0].flatten(1)
        if probe is None:       # dv_i/dx_i, one i after the other: together they would fill the memory
            div = sum(gradient(v.flatten(1)[:, i])[:, i] for i in range(x[0].numel()))        # [2]
        else:
            div = (gradient(probe * v) * probe.flatten(1)).sum(1)         # z^T (dv/dx) z       [2]
    return v.detach(), div


def transport(f, x, log_p, times, solver="midpoint", tolerance=1e-5, probe=None):
    """Carry points and the log-density at them (B,) along the flow, forwards or backwards -> x, log_p,
    count of evaluations. One probe serves the whole way: fresh ones would turn the ODE into a noisy one."""
    def joint(state, t):                                      # the points, flat, and log_p as one more column
        v, div = divergence(f, state[:, :-1].view_as(x), t, probe)
        return torch.cat([v.flatten(1), -div[:, None]], dim=1)                                # [1] [2]

    state = torch.cat([x.flatten(1), log_p[:, None]], dim=1)                                  # (B, D + 1)
    state, n_evaluations = odeint(joint, state, times, solver, tolerance)
    return state[:, :-1].view_as(x), state[:, -1], n_evaluations


# ---------------------------------------------------------------- the model
def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


class FlowMatching(nn.Module):
    """A flow to points or images. n_evaluations: of the velocity, by the last `sample` or `log_prob`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, is_points = config.data_shape[0], len(config.data_shape) == 1
        self.net = (MLP if is_points else UNet)(config, d)
        self.t_end, self.n_evaluations = T_END.get(config.path, 1.0), 0

    def path(self, t):
        """alpha, sigma, alpha', sigma' at t, each shaped like t."""
        return PATHS[self.config.path](t, self.config)

    def velocity(self, x_t, t, label=None, guidance=1.0):
        """v_t (B, ...) for x_t at t (B,) or (1,). label None = "any class". Why 100 t: difference 2."""
        v_t = self.net(x_t, 100 * t, label)
        if label is not None and guidance != 1:
            any_class = self.net(x_t, 100 * t)
            v_t = any_class + guidance * (v_t - any_class)                                    # [13]
        return v_t

    def loss(self, batch, noise=None, t=None):
        """batch: x (B, *data_shape), label (B,) if n_classes; t (B,) in [0, 1], where 0 is noise and 1 data
        -> loss (0-d), per_sample (B,) and t (B,)."""
        x1, label = batch["x"], self.label(batch, required=True)
        if self.training and self.config.flip:
            x1 = torch.where(torch.rand(len(x1), 1, 1, 1, device=x1.device) < 0.5, x1.flip(3), x1)
        x0 = torch.randn_like(x1) if noise is None else noise
        x0 = COUPLINGS[self.config.coupling](x0, x1, label)                                   # [10]
        t = self.t_end * torch.rand(len(x1), device=x1.device) if t is None else t
        alpha, sigma, d_alpha, d_sigma = (c.reshape(-1, *[1] * (x1.dim() - 1)) for c in self.path(t))
        x_t = alpha * x1 + sigma * x0                                                         # [5]
        u_t = d_alpha * x1 + d_sigma * x0                                                     # [6]
        if label is not None and self.training:
            dropped = torch.rand(t.shape, device=t.device) < self.config.label_dropout
            label = torch.where(dropped, self.config.n_classes, label)
        v_t = self.velocity(x_t, t, label)
        per_sample = (v_t - u_t).square().flatten(1).mean(1)                                  # [4]
        return {"loss": per_sample.mean(), "per_sample": per_sample.detach(), "t": t}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None):
        """From noise to data: -> x (B, *data_shape). batch says how many, by "n", "label" (B,) or "x"; no
        label means "any class". steps: how many. noise: the start, x0; else drawn from generator. trace:
        a list that receives every x_t."""
        config, device = self.config, next(self.parameters()).device
        B = batch["n"] if "n" in batch else len(batch.get("label", batch.get("x")))
        x0 = randn((B, *config.data_shape), generator, device) if noise is None else noise
        x = self.path(x0.new_zeros(1))[1] * x0                                # sigma at t = 0: not 1 on "ve"
        x, self.n_evaluations = odeint(self.field(batch, config.guidance), x, self.timetable(steps),
                                       config.solver, config.tolerance, trace)                # [1]
        return x

    @torch.no_grad()
    def log_prob(self, batch, steps=None, probe=None):
        """log p(x), or p(x | label), in nats (B,): back along the flow to noise, whose density is known. Not
        guided: guidance makes better samples, but the flow it bends is no longer that of p(x | label).
        probe: None = exact, D times as slow; or z of random signs, like x (then average over several)."""
        x1, config = batch["x"], self.config
        log_p, times = x1.new_zeros(len(x1)), self.timetable(steps)[::-1]
        x0, change, self.n_evaluations = transport(
            self.field(batch), x1, log_p, times, config.solver, config.tolerance, probe)
        sigma = self.path(x1.new_zeros(1))[1]
        log_p0 = -0.5 * (x0 / sigma) ** 2 - torch.log(sigma * math.sqrt(2 * math.pi))         # (B, ...)
        return log_p0.flatten(1).sum(1) - change                              # change: log p_0 - log p_1

    def bits_per_dim(self, batch, steps=None, probe=None):
        """Bits per number of 8-bit images, x = pixel/127.5 - 1: (B,); on average an upper bound, the paper's.
        Uniform noise as wide as one level of a pixel, 1/127.5, makes x continuous for log_prob."""
        x = batch["x"] + (torch.rand_like(batch["x"]) - 0.5) / 127.5
        nats = self.log_prob({**batch, "x": x}, steps, probe) / x[0].numel()
        return math.log2(127.5) - nats / math.log(2)

    def field(self, batch, guidance=1.0):
        """What the solver integrates, f(x, t) with t a float: the velocity for the batch's labels."""
        label = self.label(batch)
        return lambda x, t: self.velocity(x, x.new_full((1,), t), label, guidance)

    def timetable(self, steps=None):
        """The times between the solver's steps, from noise to data. steps: how many."""
        steps = self.config.sampler_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"sampler steps {steps} must be at least 1")
        return [self.t_end * k / steps for k in range(steps + 1)]

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
        """Always a ValueError: see difference 4."""
        raise ValueError("flow_matching.py has no official weights to load: torchcfm's are of another U-Net")


Model = FlowMatching

PRESETS = {
    "tiny": {},                                                           # points in the plane
    "tiny_image": dict(data_shape=(3, 32, 32)),                           # two CPU cores are enough
    # The size of torchcfm's network, which is Ho et al.'s: 35.7 M parameters; theirs reaches FID 3.5.
    "cifar10": dict(data_shape=(3, 32, 32), flip=True, channels=128, channel_mult=(1, 2, 2, 2),
                    n_res_blocks=2, attn_resolutions=(16,), norm_groups=32, dropout=0.1, solver="dopri5"),
}

# What train.py takes for these presets unless told otherwise; its defaults are the rest. ema_max: samples
# are made by a moving average of the weights (EMA), less noisy than those of any one step. Its memory is
# short at first, because early weights are soon out of date, and grows to about 1/(1 - ema_max) steps.
ADAM = dict(betas=(0.9, 0.999), weight_decay=0.0)
RECIPES = {
    "tiny": ADAM | dict(steps=4000, batch_size=512, lr=2e-3, ema_max=0.999),
    "tiny_image": ADAM | dict(steps=1500, batch_size=64, lr=1e-3, ema_max=0.995, eval_every=500),
    "cifar10": ADAM | dict(steps=400_000, batch_size=128, lr=2e-4, lr_schedule="constant", warmup=5000,
                           clip=1.0),
}


# ---------------------------------------------------------------- demo
def eight_gaussians(n, radius=0.8, std=0.05):
    """n points (n, 2) in eight round blobs on a circle, the blob of each (n,), and the centres (8, 2)."""
    angle, label = torch.arange(8) * math.pi / 4, torch.randint(8, (n,))
    centres = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres[label] + std * torch.randn(n, 2), label, centres


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples: 0 only for equal distributions (Szekely & Rizzo)."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def main(steps=4000, batch_size=512):
    torch.manual_seed(0)
    # Half of the labels are dropped, so that one network learns p(x) as well as p(x | label).
    model = FlowMatching(Config(n_classes=8, label_dropout=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        x, label, _ = eight_gaussians(batch_size)
        loss = model.loss({"x": x, "label": label})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 1000 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    x, label, centres = eight_gaussians(2000)
    t, x0 = torch.rand(2000), torch.randn(2000, 2)
    alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in model.path(t))
    x_t = alpha * x + sigma * x0
    u_t, _, _ = marginal(x_t, t, model.path, centres, std=0.05)
    error = (model.velocity(x_t, t) - u_t).square().mean().item()
    constant = (d_alpha * x + d_sigma * x0 - u_t).square().mean().item()
    print(f"squared error of the velocity: {error:.4f}; expect about 0.003 (the loss adds {constant:.4f})")
    own = torch.cdist(model.sample({"label": label}), centres).argmin(1) == label
    print(f"samples of a class nearest to its centre: {own.float().mean():.3f}; expect 1")
    log_p = model.log_prob({"x": x}).mean().item()
    best = -math.log(8) - math.log(2 * math.pi * math.e * 0.05**2)            # the blobs do not overlap
    print(f"mean log-likelihood of data: {log_p:.3f} nats; expect 0.1 below minus the entropy, {best:.3f}")
    # Means over several sets: a single distance between two sets of 2000 varies by as much as its size.
    new = lambda: eight_gaussians(2000)[0]
    distance = sum(energy_distance(x, new()) for x in model.sample({"n": 10000}).split(2000)) / 5
    floor = sum(energy_distance(new(), new()) for _ in range(20)) / 20
    print(f"energy distance of 2000 samples to data: {distance:.5f}; expect about 0.001, as between two sets "
          f"of data: {floor:.5f}")
    return distance, floor


if __name__ == "__main__":
    main()
