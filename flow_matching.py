"""Flow matching: a network learns, by regression, a velocity field whose flow carries noise to data.

    Yaron Lipman, Ricky T. Q. Chen, Heli Ben-Hamu, Maximilian Nickel, Matt Le:
    "Flow Matching for Generative Modeling", arXiv:2210.02747 (the code of its experiments is not public)
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
Axes: B samples, D dimensions of a point; or C, H, W of an image in [-1, 1]. K centres of a mixture.

The flow (a continuous normalising flow)
    [1]  dx/dt = v_t(x),   x(0) ~ N(0, I),   samples are x(1)
    [2]  d log p_t(x(t))/dt = -div v_t(x(t)), div v = trace(dv/dx) = E z' (dv/dx) z if E z z' = I (Hutchinson)
Its training
    [3]  L_FM = E |v_t(x) - u_t(x)|^2,   u_t(x) = E[u_t(x|x1) | x_t = x]: the field we want but do not know
    [4]  L_CFM = E |v_t(x) - u_t(x|x1)|^2 = L_FM + constant: can be computed, and has the same gradients
Paths from noise to one data point
    [5]  p_t(x|x1) = N(mu, sigma^2 I), mu = alpha x1:   x_t = alpha x1 + sigma x0
    [6]  u_t(x|x1) = (sigma'/sigma) (x - mu) + mu',   which is alpha' x1 + sigma' x0 at x = x_t
    [7]  "ot": alpha = t,   sigma = 1 - (1 - sigma_min) t: straight lines at constant speed
    [8]  "vp": alpha = exp(-T/2),   sigma = sqrt(1 - exp(-T)),   T = integral of beta over [0, 1-t]: DDPM
    [9]  "ve": alpha = 1,   sigma = sigma_min (sigma_max/sigma_min)^(1-t): noise shrinks, data stay in place
Around it
    [10] optimal coupling: noise and data of a batch paired so that sum |x0 - x1|^2 is least, not at random
    [11] Runge-Kutta: k_i = v(x + h sum_j a_ij k_j, t + c_i h),   x(t + h) = x + h sum_i b_i k_i
    [12] score grad log p_t(x) = -E[x0 | x_t = x]/sigma
    [13] guidance: v = v(any class) + g (v(class) - v(any class));   others count from zero, w = g - 1

Map: Config | MLP, UNet | paths [7-9] | what follows from a path [3, 6, 12] | couplings [10] | solvers [2, 11]
| FlowMatching: loss [4, 5], sample, log_prob | PRESETS | main. The networks are ddpm.py's, word for word.

Differs from the original:
 1. sigma_min is 0, as in both repositories. The paper's is "sufficiently small", without a number.
 2. The network is given 100 t, as from a chain of 100 steps. Both repositories give it t, for which most
    sinusoids of the embedding stand still; at 1000 t they ripple, and dopri5 needs 3 times the evaluations.
 3. The optimal coupling uses each point of a batch once; torchcfm draws pairs with replacement. With labels,
    noise is exchanged only within a class: else, given the class, it is not N(0, I), where sampling starts.
 4. No official weights are loaded: the only ones released, torchcfm's for CIFAR-10, are of another U-Net of
    equal size (four heads, cosines first, i/half, GroupNorm eps 1e-5, raw t), a second network in this file.

Run alone: `python flow_matching.py` learns eight Gaussians in about half a minute on two CPU cores.
"""
import difflib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # shape of one sample: (D,) for points, (C, H, W) for images scaled to [-1, 1]
    data_shape: tuple = (2,)
    # number of classes; 0 = no labels. The networks keep one more row: class n_classes means "any class"
    n_classes: int = 0
    # share of the training labels replaced by "any class", so that this row is trained too
    label_dropout: float = 0.1

    # -- network for points (MLP)
    # units per layer
    width: int = 128
    # residual layers
    depth: int = 4

    # -- network for images (UNet)
    # feature maps at full resolution
    channels: int = 32
    # feature maps per level, as multiples of `channels`; each level but the first halves the image
    channel_mult: tuple = (1, 2, 2)
    # ResBlocks per level on the way down (one more on the way up)
    n_res_blocks: int = 1
    # image heights at which every ResBlock is followed by self-attention
    attn_resolutions: tuple = (8,)
    # groups of GroupNorm; must divide every level's feature maps
    norm_groups: int = 8
    # dropout inside the ResBlocks
    dropout: float = 0.0

    # -- the flow
    # a name in PATHS: how noise turns into data [5]
    path: str = "ot"
    # "ot", "ve": standard deviation left around a data point at t = 1
    sigma_min: float = 0.0
    # "ve": standard deviation at t = 0; about the largest distance between two data points (Song & Ermon)
    sigma_max: float = 10.0
    # a name in COUPLINGS: which noise goes with which data [10]
    coupling: str = "independent"
    # a name in TABLEAUS [11]
    solver: str = "midpoint"
    # steps of `sample` from noise to data; "dopri5" chooses its own
    sampler_steps: int = 50
    # "dopri5": error allowed per step, absolute and relative (the paper's)
    tolerance: float = 1e-5
    # g of [13] where a label is given; 1 = none
    guidance: float = 1.0

    def __post_init__(self):
        self.data_shape = tuple(self.data_shape)                              # a list, if it comes from YAML
        check_name("path", self.path, PATHS)
        check_name("coupling", self.coupling, COUPLINGS)
        check_name("solver", self.solver, TABLEAUS)
        check_steps(self.sampler_steps)
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min {self.sigma_min} must lie in [0, 1)")
        if self.path == "ve" and not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"path 've' needs 0 < sigma_min < sigma_max = {self.sigma_max}, not sigma_min "
                             f"{self.sigma_min}: take 0.01")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance {self.tolerance} must be positive")
        if len(self.data_shape) not in (1, 3):
            raise ValueError(f"data_shape {self.data_shape}: (D,) for points or (C, H, W) for images")
        multiple = 2 ** (len(self.channel_mult) - 1)
        if any(size % multiple for size in self.data_shape[1:]):
            raise ValueError(f"data_shape {self.data_shape}: height and width must be multiples of {multiple}"
                             f", or channel_mult shorter: it halves {len(self.channel_mult) - 1} times")
        if any(round(self.channels * m) % self.norm_groups for m in self.channel_mult):
            raise ValueError(f"norm_groups {self.norm_groups} does not divide channels x channel_mult, "
                             f"{self.channels} x {self.channel_mult}")


def check_name(field, value, known):
    """ValueError that lists what is known and names the nearest."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, cutoff=0.0)
        raise ValueError(f"{field} {value!r} is unknown; nearest: {near[0]!r}; known: {', '.join(known)}")


def check_steps(steps):
    """The chains of the diffusion files differ: a solver may take any number of steps."""
    if steps < 1:
        raise ValueError(f"sampler_steps {steps} must be at least 1")


# ---------------------------------------------------------------- small modules
def time_embedding(t, dim):
    """t (B,) float -> (B, dim): [sin, cos] of t at dim/2 frequencies from 1 down to 1/10000 (Ho et al.)."""
    # Two layouts are in use: the exponent is i/(half - 1) here, i/half in improved-diffusion and DiT, which
    # also put the cosines first. Mixed up, training still works but released weights give garbage.
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t.float()[:, None] * frequency                                # (B, half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                   # (B, dim)


class StepEmbedding(nn.Module):
    """Time t (B,) and, with n_classes > 0, label (B,) -> (B, d_out). label None means "any class"."""

    def __init__(self, d_in, d_out, n_classes):
        super().__init__()
        self.d_in, self.n_classes = d_in, n_classes
        self.mlp = nn.Sequential(nn.Linear(d_in, d_out), nn.SiLU(), nn.Linear(d_out, d_out))
        self.label = nn.Embedding(n_classes + 1, d_out) if n_classes else None

    def forward(self, t, label=None):
        emb = self.mlp(time_embedding(t, self.d_in))                      # (B, d_out)
        if self.n_classes:
            label = torch.full_like(t, self.n_classes, dtype=torch.long) if label is None else label
            emb = emb + self.label(label)                                 # (B, d_out)
        return emb


# ---------------------------------------------------------------- network for points
class MLP(nn.Module):
    """Residual MLP for points: x (B, D), t (B,), label (B,) or None -> (B, d_out)."""

    def __init__(self, config, d_out):
        super().__init__()
        (D,), W = config.data_shape, config.width
        self.embed = StepEmbedding(W, W, config.n_classes)
        self.inp = nn.Linear(D, W)
        self.layers = nn.ModuleList([nn.Linear(W, W) for _ in range(config.depth)])
        self.out = nn.Linear(W, d_out)
        self.init_weights()

    def init_weights(self):
        """torch's defaults, but the untrained network predicts zero: the loss starts at its trivial value."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, label=None):
        emb = self.embed(t, label)                                        # (B, W)
        h = self.inp(x)                                                   # (B, W)
        for layer in self.layers:
            h = h + layer(F.silu(h + emb))                                # (B, W)
        return self.out(F.silu(h))                                        # (B, d_out)


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
    """Two 3x3 convolutions with the step embedding added between them; `attn` appends self-attention."""

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


class UNet(nn.Module):
    """U-Net of Ho et al. 2020: x (B, C, H, W), t (B,), label (B,) or None -> (B, c_out, H, W)."""

    def __init__(self, config, c_out):
        super().__init__()
        (c_data, size, _), n = config.data_shape, config.n_res_blocks
        ch, widths = config.channels, [round(config.channels * m) for m in config.channel_mult]
        res = lambda a, b, attn: ResBlock(a, b, 4 * ch, config.norm_groups, config.dropout, attn)
        attn_at = lambda level: size // 2**level in config.attn_resolutions
        self.embed = StepEmbedding(ch, 4 * ch, config.n_classes)
        self.conv_in = nn.Conv2d(c_data, ch, 3, padding=1)

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        c, skips = ch, [ch]                       # feature maps now, and of every output saved for later
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList([res(a, width, attn_at(level)) for a in [c] + [width] * (n - 1)]))
            c, skips = width, skips + [width] * n
            if level + 1 < len(widths):
                self.downsample.append(Downsample(c))
                skips.append(c)

        self.mid = nn.ModuleList([res(c, c, True), res(c, c, False)])

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):            # self.up[0] is the coarsest level
            self.up.append(nn.ModuleList())
            for _ in range(n + 1):                # one more than down: for conv_in's or Downsample's output
                self.up[-1].append(res(c + skips.pop(), width, attn_at(level)))
                c = width
            if level > 0:
                self.upsample.append(Upsample(c))

        self.norm_out = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, c_out, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """Ho et al.: uniform, fan-average; then every residual branch and the output start at zero."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.weight)
            elif isinstance(m, AttnBlock):
                nn.init.zeros_(m.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x, t, label=None):
        emb = self.embed(t, label)                                        # (B, 4 ch)
        h = self.conv_in(x)                                               # (B, ch, H, W)
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, emb)                                         # (B, width, H/2^level, W/2^level)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        for block in self.mid:
            h = block(h, emb)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return self.conv_out(F.silu(self.norm_out(h)))                    # (B, c_out, H, W)


# ---------------------------------------------------------------- paths: alpha, sigma, alpha', sigma' of t
def ot_path(t, config):
    """Optimal transport from N(0, I) to one data point; for a batch of them, add the coupling "ot"."""
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
    """Never without x1: x_t at t = 0 is x1 + sigma_max x0, and sampling takes that for sigma_max x0. It asks
    for a network that sees x_t/sigma (Karras et al.); this one sees x_t, and learns it less well."""
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


# ---------------------------------------------------------------- what follows from a path
def gaussian_velocity(x, mu, sigma, d_mu, d_sigma):
    """A point d standard deviations from the centre stays at d while centre and deviation change."""
    return d_sigma / sigma * (x - mu) + d_mu                                                  # [6]


def marginal(x, t, path, centres, std=0.0):
    """The field that a perfect network would learn, the score and the log-density: (B, D), (B, D), (B,).

    x (B, D), t (B,), path: t -> alpha, sigma, alpha', sigma'. The data: equal parts N(centre, std^2 I), with
    centres (K, D); std = 0 makes them a finite set. Each part is Gaussian at every t, so [5] and [6] hold for
    it with the wider sigma^2 + (alpha std)^2.
    """
    D, K = x.shape[1], len(centres)
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path(t))                      # (B, 1, 1)
    wide = torch.sqrt(sigma**2 + (alpha * std) ** 2)
    d_wide = (sigma * d_sigma + alpha * d_alpha * std**2) / wide
    z = (x[:, None] - alpha * centres) / wide                                                 # (B, K, D)
    log_p = -0.5 * (z**2).sum(2) - D * torch.log(wide * math.sqrt(2 * math.pi))[:, :, 0]      # (B, K)
    posterior = log_p.softmax(1)[:, :, None]                  # of the component, given x
    u = gaussian_velocity(x[:, None], alpha * centres, wide, d_alpha * centres, d_wide)       # (B, K, D)
    return (posterior * u).sum(1), (posterior * -z / wide).sum(1), log_p.logsumexp(1) - math.log(K)     # [3]


def convert(value, given, wanted, x_t, coefficients):
    """One form of the prediction from another: "x1", "eps" (the noise x0), "velocity", "score", DDPM's "v".

    Each of them and x_t fix the pair (x1, eps), and the pair fixes the others. coefficients: alpha, sigma,
    alpha', sigma', broadcastable to x_t; where time runs the other way, flip the signs of the last two.
    "score" takes noise and data for independent, which coupling "ot" gives up.
    """
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

    Shortest augmenting paths (Jonker & Volgenant 1987). Rows are placed one by one. One that wants a taken
    column pushes the row there to another, and so on to a free one, along the cheapest chain of such moves,
    found by Dijkstra's algorithm. scipy's linear_sum_assignment is the same in C++, ten times as fast.
    """
    if not np.isfinite(cost).all():
        raise ValueError("optimal coupling: the data or the noise of this batch are not finite")
    n = len(cost)
    price, row_of, column_of = cost.min(0), np.full(n, -1), np.full(n, -1)
    for j, i in enumerate(cost.argmin(0)):                    # the cheapest row of a column, if still free
        if column_of[i] < 0:
            row_of[j], column_of[i] = i, j
    for row in np.flatnonzero(column_of < 0):
        reach, before = cost[row] - price, np.full(n, row)    # cost of a chain to column j; who then takes j
        done = np.zeros(n, bool)
        while True:
            j = np.where(done, np.inf, reach).argmin()
            if row_of[j] < 0:
                break                                         # a free column ends the chain
            done[j] = True
            pushed = cost[row_of[j]] - price                  # the row that sits there, to all other columns
            pushed += reach[j] - pushed[j]
            better = (pushed < reach) & ~done
            reach[better], before[better] = pushed[better], row_of[j]
        price[done] += reach[done] - reach[j]
        while j >= 0:                                         # every row of the chain moves one column on
            i = row_of[j] = before[j]
            column_of[i], j = j, column_of[i]
    return column_of


def optimal_coupling(x0, x1, label):
    """x0 reordered: its row i now belongs to x1[i], which keeps its place and so its label (None without)."""
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()) ** 2                   # (B, B)
    if label is not None:                                     # noise i is in class label[i], and stays
        cost = cost + (label[:, None] != label) * (cost.max() + 1) * len(cost)
    return x0[torch.from_numpy(assignment(cost.cpu().numpy())).to(x0.device)]                 # [10]


COUPLINGS = {"independent": lambda x0, x1, label: x0, "ot": optimal_coupling}


# ---------------------------------------------------------------- solvers
# An explicit Runge-Kutta method is a table: the rows of a, one per stage, then b; c_i is the sum of row i.
TABLEAUS = {
    "euler": [[], [1]],                                                                       # order 1
    "midpoint": [[], [1 / 2], [0, 1]],                                                        # order 2
    "heun": [[], [1], [1 / 2, 1 / 2]],                                                        # order 2
    "heun3": [[], [1 / 3], [0, 2 / 3], [1 / 4, 0, 3 / 4]],                                    # order 3
    "rk4": [[], [1 / 2], [0, 1 / 2], [0, 0, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],                # order 4
    # also of order 4, the 3/8 rule: this is what torchdiffeq means by "rk4"
    "rk4_38": [[], [1 / 3], [-1 / 3, 1], [1, -1, 1], [1 / 8, 3 / 8, 3 / 8, 1 / 8]],
    # Dormand & Prince 1980, order 5, the step is adapted
    "dopri5": [[], [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
               [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
               [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
               [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]],
}
# dopri5's b less the b of a method of order 4 that also uses the velocity at the new point.
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
    One step from each time to the next, but "dopri5" heeds only the first and the last. trace: a list that
    receives x at every stop, start and end included."""
    tableau, trace = TABLEAUS[solver], [] if trace is None else trace
    trace.append(x)
    if solver == "dopri5":
        return dopri5(f, x, times[0], times[-1], tolerance, trace)
    for t, t_next in zip(times, times[1:]):
        x, _ = runge_kutta_step(f, x, t, t_next - t, tableau)
        trace.append(x)
    return x, (len(times) - 1) * (len(tableau) - 1)


def dopri5(f, x, t, end, tolerance, trace):
    """As odeint. A step counts if its estimated error, root mean square over all of x, is within bounds."""
    h, slope, n_evaluations = (end - t) / 20, f(x, t), 1
    while t != end:
        is_last = abs(h) >= abs(end - t)
        h, t_new = (end - t, end) if is_last else (h, t + h)
        x_new, slopes = runge_kutta_step(f, x, t, h, TABLEAUS["dopri5"], first=slope)
        slope_new = f(x_new, t_new)                           # is also the first slope of the next step
        n_evaluations += 6
        error = h * weighted_sum(DOPRI5_ERROR, slopes + [slope_new])
        bound = tolerance * (1 + torch.maximum(x.abs(), x_new.abs()))
        ratio = (error / bound).square().mean().sqrt().item()
        if ratio <= 1:
            x, t, slope = x_new, t_new, slope_new
            trace.append(x)
        elif abs(h) < 1e-10:
            raise ValueError(f"dopri5: no step is short enough at t = {t:.6f}: the velocity is not finite "
                             f"there, or tolerance {tolerance} is finer than {x.dtype}")
        # The error of a step grows as h^5: aim at 0.6 of the bound, in moderate leaps; nan is far too large.
        h *= 0.2 if math.isnan(ratio) else min(5.0, max(0.2, 0.9 * max(ratio, 1e-9) ** -0.2))
    return x, n_evaluations


def divergence(f, x, t, probe=None):
    """f(x, t) and its divergence (B,): exact, by a backward pass per dimension; or Hutchinson's estimate, by
    one in all, with the z given as probe, shaped like x."""
    probes = [probe]
    if probe is None:       # z'(dv/dx)z sums to the trace over the unit vectors z: Hutchinson D times
        D = x[0].numel()
        probes = torch.eye(D, dtype=x.dtype, device=x.device).view(D, 1, *x.shape[1:]).expand(D, *x.shape)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = f(x, t)
        pulled = [torch.autograd.grad(v, x, z, retain_graph=True)[0] for z in probes]         # z'(dv/dx)
    return v.detach(), sum((z * zJ).flatten(1).sum(1) for z, zJ in zip(probes, pulled))       # [2]


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
        net = MLP if is_points else UNet
        self.net = net(config, d)
        self.t_end, self.n_evaluations = T_END.get(config.path, 1.0), 0

    def path(self, t):
        """alpha, sigma, alpha', sigma' at t, each shaped like t."""
        return PATHS[self.config.path](t, self.config)

    def velocity(self, x_t, t, label=None, guidance=1.0):
        """v_t (B, ...) for x_t at t (B,). label None = "any class"; guidance but 1 doubles the batch."""
        if label is None or guidance == 1:
            return self.net(x_t, 100 * t, label)
        any_class = torch.full_like(label, self.config.n_classes)
        both = self.net(torch.cat([x_t, x_t]), 100 * torch.cat([t, t]), torch.cat([label, any_class]))
        v_label, v_any = both.chunk(2)
        return v_any + guidance * (v_label - v_any)                                           # [13]

    def loss(self, batch, noise=None, t=None):
        """batch: x (B, *data_shape), label (B,) if n_classes; t (B,) in [0, 1], where 0 is noise and 1 data
        -> loss (0-d), per_sample (B,) and t (B,)."""
        x1, label = batch["x"], self.label(batch, required=True)
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
        label means "any class". steps: how many (see timetable). noise: the start, x0; else drawn from
        generator. trace: a list that receives every x_t."""
        B = batch["n"] if "n" in batch else len(batch["label"] if "label" in batch else batch["x"])
        config, device = self.config, next(self.parameters()).device
        x0 = randn((B, *config.data_shape), generator, device) if noise is None else noise
        x = self.path(x0.new_zeros(1))[1] * x0                                # sigma at t = 0: not 1 on "ve"
        x, self.n_evaluations = odeint(self.field(batch), x, self.timetable(steps), config.solver,
                                       config.tolerance, trace)                               # [1]
        return x

    @torch.no_grad()
    def log_prob(self, batch, steps=None, probe=None):
        """log p(x), or p(x | label), in nats (B,): back along the flow to noise, whose density is known.
        probe: None = exact, D times as dear; or z of random signs, shaped like x (then average over several).
        Bits per dimension of 8-bit images plus uniform noise: 7 - log_prob/(D log 2), a level being 2^-7."""
        x1, config = batch["x"], self.config
        times = self.timetable(steps)[::-1]
        x0, change, self.n_evaluations = transport(self.field(batch), x1, x1.new_zeros(len(x1)), times,
                                                   config.solver, config.tolerance, probe)
        sigma = self.path(x1.new_zeros(1))[1]
        log_p0 = -0.5 * (x0 / sigma) ** 2 - torch.log(sigma * math.sqrt(2 * math.pi))         # (B, ...)
        return log_p0.flatten(1).sum(1) - change                              # change: log p_0 - log p_1

    def field(self, batch):
        """What the solver integrates, f(x, t) with t a float: the velocity for the batch's labels, guided."""
        label, guidance = self.label(batch), self.config.guidance
        return lambda x, t: self.velocity(x, x.new_full((len(x),), t), label, guidance)

    def timetable(self, steps=None):
        """The times between the solver's steps, from noise to data. steps: how many."""
        steps = self.config.sampler_steps if steps is None else steps
        check_steps(steps)
        return [self.t_end * k / steps for k in range(steps + 1)]

    def label(self, batch, required=False):
        """The checked labels of a batch; None = "any class"."""
        n_classes = self.config.n_classes
        if not n_classes:
            return None
        if "label" not in batch:
            if required:
                raise ValueError(f"the model has n_classes = {n_classes}, but the batch has no 'label'")
            return None
        label = batch["label"]
        # On a GPU the comparison would stop every step to wait for it; there the embedding's assertion fires.
        if label.device.type == "cpu" and ((label < 0) | (label >= n_classes)).any():
            raise ValueError(f"label {label.min()}..{label.max()} is out of range: n_classes = {n_classes} "
                             f"means 0..{n_classes - 1}")
        return label

    def param_groups(self, weight_decay):
        """For AdamW: matrices and kernels decay; biases, norms and embeddings do not."""
        embeddings = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
        decay = [p for p in self.parameters() if p.dim() > 1 and p not in embeddings]
        rest = [p for p in self.parameters() if p.dim() <= 1 or p in embeddings]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    @classmethod
    def from_official(cls, state_dict, config=None):
        """Always a ValueError: see difference 4."""
        raise ValueError("flow_matching.py has no official weights to load: the only ones released, "
                         "torchcfm's for CIFAR-10, are of another U-Net")


Model = FlowMatching

PRESETS = {
    # points in the plane
    "tiny": {},
    # 32 x 32 images on two CPU cores
    "tiny_image": dict(data_shape=(3, 32, 32)),
    # the size of torchcfm's network, which is Ho et al.'s: 35.7 M parameters; theirs reaches FID 3.5
    "cifar10": dict(data_shape=(3, 32, 32), channels=128, channel_mult=(1, 2, 2, 2), n_res_blocks=2,
                    attn_resolutions=(16,), norm_groups=32, dropout=0.1, solver="dopri5"),
}

# What train.py takes for these presets unless it is told otherwise.
RECIPES = {
    "tiny": {"steps": 4000, "batch_size": 512, "lr": 2e-3, "betas": (0.9, 0.999), "weight_decay": 0.0,
             "ema_max": 0.999},
    "tiny_image": {"steps": 1500, "batch_size": 64, "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0,
                   "ema_max": 0.995, "eval_every": 500},
    "cifar10": {"steps": 400_000, "batch_size": 128, "lr": 2e-4, "lr_schedule": "constant", "warmup": 5000,
                "clip": 1.0, "betas": (0.9, 0.999), "weight_decay": 0.0},
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
    with torch.no_grad():
        error = (model.velocity(x_t, t) - u_t).square().mean().item()
    constant = (d_alpha * x + d_sigma * x0 - u_t).square().mean().item()
    print(f"squared error of the velocity: {error:.4f}; expect about 0.003 (the loss adds {constant:.4f})")
    own = torch.cdist(model.sample({"label": label}), centres).argmin(1) == label
    print(f"samples of a class nearest to its centre: {own.float().mean():.3f}; expect 1")
    log_p = model.log_prob({"x": x}).mean().item()
    best = -math.log(8) - math.log(2 * math.pi * math.e * 0.05**2)            # the blobs do not overlap
    print(f"mean log-likelihood of data: {log_p:.3f} nats; expect 0.1 below minus the entropy, {best:.3f}")
    # Means over several sets: a single distance between two sets of 2000 varies by as much as it is.
    new = lambda: eight_gaussians(2000)[0]
    distance = sum(energy_distance(x, new()) for x in model.sample({"n": 10000}).split(2000)) / 5
    floor = sum(energy_distance(new(), new()) for _ in range(20)) / 20
    print(f"energy distance of 2000 samples to data: {distance:.5f}; expect about 0.001, as between two sets "
          f"of data: {floor:.5f}")
    return distance, floor


if __name__ == "__main__":
    main()
