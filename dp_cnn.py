"""Diffusion Policy, CNN variant: a robot's next actions drawn from a conditional diffusion model.

    Cheng Chi, Zhenjia Xu, Siyuan Feng, Eric Cousineau, Yilun Du, Benjamin Burchfiel, Russ Tedrake, Shuran
    Song: "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", arXiv:2303.04137
    official code: github.com/real-stanford/diffusion_policy, and its port in github.com/huggingface/lerobot

The policy is a distribution p(A | O) over a whole chunk of actions A, given the last observations O. It is a
distribution because demonstrators may pass an obstacle on either side: the mean, which regression learns,
hits it. A network learns to predict the noise in a noised chunk; sampling starts from pure noise and removes
it step by step. O is a condition, encoded once per chunk: the joint p(A, O) would have to predict O as well.
Only inpainting [9] models the joint (of encoded observations); it is told the observed steps.

Axes: B batch, T steps of the chunk, A action dimensions (in p(A | O): the chunk), D denoised numbers per step
(A, or A + obs_dim when inpainting), G length of the condition, To observed steps, V cameras, C channels.
Time of the diffusion, t: 0 is the least noised of K levels (one step of noise, not clean data), K-1 is noise.
Time of the robot (To = 2 observed, Tp = 16 predicted, Ta = 8 executed):
    step        now-1  now  now+1 ... now+7 ... now+14
    observed      x     x
    predicted     x     x     x   x     x    x    x       x0; from the first observed step, as the original
    executed            x     x   x     x                 then look again and re-plan

    [1]  alpha_bar_t = f((t+1)/K) / f(0),  f(u) = cos^2((u + 0.008) / 1.008 * pi/2),  beta_t <= 0.999 schedule
    [2]  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                     noising
    [3]  loss = mean (eps - eps_theta(O, x_t, t))^2,   t uniform in 0..K-1
    [4]  x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t), clipped to [-1, 1]
    [5]  x_{t-1} = c1 x0_hat + c2 x_t + sigma_t z,   c1 = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t),
         c2 = sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t),
         sigma_t^2 = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t,   z ~ N(0, I)                 DDPM step
         If levels are skipped, t-1 is the next level visited and beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}.
         Unclipped this is the paper's A^{k-1} = alpha (A^k - gamma eps_theta(O, A^k, k)) + N(0, sigma^2 I)
         with alpha = 1 / sqrt(1 - beta_t) and gamma = beta_t / sqrt(1 - alpha_bar_t).
    [6]  x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s) eps_theta,   s < t                   DDIM step
    [7]  FiLM(h | c) = scale(c) * h + shift(c), per channel; c = [step embedding, observations]
    [8]  spatial softmax: p = softmax over the pixels of a channel; keypoint = (sum p x, sum p y)
    [9]  inpainting instead of FiLM: x = [action, observation]; known entries are put back at every step

Map: Config | ResidualBlock1d, UNet1d | ResNet, SpatialSoftmax, ImageEncoder | DiffusionPolicyCNN: loss,
sample, from_official | PRESETS | main.

Differs from the original:
 1. Past an episode's end the data repeat its last step, before its start the first: actions and observations.
    Repeated actions are left out of the loss. The original trains on them, so that the policy learns to stay
    (train_on_padding); LeRobot does either.
 2. A random crop can start at every offset; the original never draws the last one.
 3. FiLM's linear layer over [step, observation] is computed as a sum of two shares. The numbers are the same,
    and a sampler reads this layer's weights once per chunk instead of once per step.
 4. With images the features are ordered [cameras, state] for every data set; another order, as LeRobot's
    [state, cameras, environment state], is permuted while loading.
 5. Local conditioning (on every step of the chunk by itself) is left out: no released model uses it.

Run alone: `python dp_cnn.py` learns paths around an obstacle in under a minute on two CPU cores.
"""
import functools
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # -- the data; train.py fills these in
    action_dim: int = 3  # A, length of one action vector
    state_dim: int = 16  # S, length of the low-dimensional observation of one step
    n_cameras: int = 0  # V, each with an encoder of its own; 0 = low-dimensional observations only
    image_size: tuple = (64, 64)  # height, width of every camera image, pixels
    # -- the timeline (picture above), in control steps
    horizon: int = 16  # Tp, predicted steps
    n_obs_steps: int = 2  # To, observed steps
    n_action_steps: int = 8  # Ta, executed steps
    pred_action_steps_only: bool = False  # True: predict only the Ta steps that are executed
    train_on_padding: bool = False  # True: past an episode's end the policy learns to stay ("Differs", 1)
    # -- how the observation enters
    obs: str = "lowdim"  # "lowdim": every float observation; "image": cameras and proprioception
    conditioning: str = "global"  # "global": FiLM [7]; "inpaint": as known entries of the trajectory [9]
    # -- the temporal U-Net
    down_dims: tuple = (32, 64, 128)  # channels of its levels; each after the first halves the time axis
    kernel_size: int = 5  # taps of its convolutions (odd)
    n_groups: int = 8  # groups of its group norms (why: see ResNet)
    step_embed_dim: int = 64  # width of the diffusion step's embedding (even)
    film_scale: bool = True  # True: FiLM scales and shifts; False: it only shifts
    # -- the image encoder, a picture on its way: scaled, resized, cropped, ResNet, keypoints, features
    image_mean: tuple = ()  # mean and deviation of the pixels, 0..1: of three colours, or of three for each
    image_std: tuple = ()  # camera; () = 0.5, which scales to [-1, 1]
    resize: tuple = ()  # height, width, bilinear and antialiased; () = they stay as they are
    crop_size: tuple = ()  # height, width: random in training, centre in evaluation; () = the whole image
    random_crop: bool = True  # False: the centre in training as well
    resnet_norm: str = "group"  # "group"; "batch": of released weights, whose statistics are kept (ResNet)
    resnet_widths: tuple = (64, 128, 256, 512)  # channels of the ResNet's stages; the default is ResNet-18's
    n_keypoints: int = 32  # keypoints of the spatial softmax
    image_features: int = 0  # numbers that a picture becomes; 0 = 2 n_keypoints, those of its keypoints
    share_encoder: bool = False  # True: all cameras share one (LeRobot's default; the paper has one for each)
    # -- the diffusion
    n_diffusion_steps: int = 100  # K, noise levels in training
    schedule: str = "cosine"  # beta_t: "cosine" [1]; "linear", or its root is: "scaled_linear"
    beta_ends: tuple = (1e-4, 0.02)  # first and last beta of the linear ones
    prediction_type: str = "eps"  # the network's output: "eps" or "x0" (official: `epsilon`, `sample`)
    sampler: str = "ddim"  # "ddim" or "ddpm"
    sampler_steps: int = 10  # noise levels visited when sampling; at most K
    spacing: str = "leading"  # which levels these are: "leading" or "trailing", see timetable
    clip_x0: float = 1.0  # bound of x0_hat [4], 0 = none; 1 fits actions that are normalised to [-1, 1]

    def __post_init__(self):
        check_choice("obs", self.obs, ("lowdim", "image"))
        check_choice("conditioning", self.conditioning, ("global", "inpaint"))
        check_choice("resnet_norm", self.resnet_norm, ("group", "batch"))
        check_choice("schedule", self.schedule, ("cosine", "linear", "scaled_linear"))
        check_choice("prediction_type", self.prediction_type, ("eps", "x0"))
        check_choice("sampler", self.sampler, ("ddim", "ddpm"))
        check_choice("spacing", self.spacing, ("leading", "trailing"))
        check_at_least(self, 0, "state_dim", "n_cameras", "clip_x0", "image_features")
        check_at_least(self, 1, "action_dim", "image_size", "horizon", "n_obs_steps", "n_action_steps",
                       "down_dims", "kernel_size", "n_groups", "resnet_widths", "n_keypoints", "crop_size",
                       "resize", "n_diffusion_steps")
        if len(self.image_size) != 2 or not {len(self.crop_size), len(self.resize)} <= {0, 2}:
            raise ValueError(f"image_size {self.image_size}, resize {self.resize}, crop_size "
                             f"{self.crop_size}: give height, width")
        if any(crop > size for crop, size in zip(self.crop_size, self.resize or self.image_size)):
            raise ValueError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}"
                             f"{f', resized to {self.resize}' if self.resize else ''}")
        if len(self.image_mean) != len(self.image_std) or min(self.image_std, default=1) <= 0 or \
                len(self.image_mean) not in (0, 3, 3 * self.n_cameras):
            raise ValueError(f"image_mean {self.image_mean}, image_std {self.image_std}: give three numbers "
                             f"of each, or three for every camera; deviations are above 0")
        if not self.resnet_widths or any(w < 16 or w % (w // 16) for w in self.resnet_widths):
            raise ValueError(f"resnet_widths {self.resnet_widths} must be at least 16 and fall into groups "
                             f"of that size or more: take multiples of 16")
        if len(self.beta_ends) != 2 or not 0 < self.beta_ends[0] <= self.beta_ends[1] < 1:
            raise ValueError(f"beta_ends {self.beta_ends} must rise, both above 0 and below 1")
        if self.n_obs_steps + self.n_action_steps > self.horizon + 1:  # the present counts twice
            raise ValueError(f"n_obs_steps {self.n_obs_steps} + n_action_steps {self.n_action_steps} must be "
                             f"at most horizon {self.horizon} + 1")
        if self.conditioning == "inpaint" and self.pred_action_steps_only:
            raise ValueError("pred_action_steps_only needs conditioning 'global'")
        if not self.down_dims or self.down_dims[0] % 8 or any(d % self.n_groups for d in self.down_dims):
            raise ValueError(f"down_dims {self.down_dims} must be multiples of n_groups = {self.n_groups}, "
                             f"the first also of 8, the groups of the last group norm")
        if self.pred_horizon % 2 ** (len(self.down_dims) - 1):
            raise ValueError(f"horizon {self.pred_horizon} cannot be halved {len(self.down_dims) - 1} times "
                             f"by the U-Net: change it, or shorten down_dims")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd to keep the sequence's length")
        if self.step_embed_dim < 4 or self.step_embed_dim % 2:
            raise ValueError(f"step_embed_dim {self.step_embed_dim} must be even and at least 4")
        timetable(self.n_diffusion_steps, self.sampler_steps, self.spacing)

    @property
    def image_dim(self):  # numbers that a picture becomes
        return self.image_features or 2 * self.n_keypoints

    @property
    def pred_horizon(self):  # Tp below: actions in a batch and in a sampled chunk
        return self.n_action_steps if self.pred_action_steps_only else self.horizon

    @property
    def first_action(self):  # step of the chunk's first action, counted from now: the first observed step
        return 0 if self.pred_action_steps_only else 1 - self.n_obs_steps

    @property
    def n_obs_loaded(self):  # observed steps in a training batch: inpainting denoises those of all Tp steps
        return self.horizon if self.conditioning == "inpaint" else self.n_obs_steps


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(map(str, choices))}")


def check_at_least(config, least, *fields):
    """Each of these fields, or every number of it if it is a tuple, is at least `least`."""
    for field in fields:
        value = getattr(config, field)
        if not all(x >= least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} {value} must be at least {least}")


# ---------------------------------------------------------------- the network: a U-Net along the time axis
def time_embedding(t, dim):
    """Sinusoids of the diffusion step, (...,) -> (..., dim), sines first. It differs from iDDPM's and DiT's:
    the exponent runs to 1 (half - 1 in the denominator), as in Ho et al., and theirs begin with cosines."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ResidualBlock1d(nn.Module):
    """Two convolutions with group norm and Mish; FiLM acts between them. (B, C, T) -> (B, C', T). of_step and
    of_obs (B or 1, 2C'; C' to shift only): the shares of FiLM's parameters that come from t and from O."""

    def __init__(self, dim_in, dim_out, cond_dim, config):
        super().__init__()
        pad = config.kernel_size // 2
        self.conv1 = nn.Conv1d(dim_in, dim_out, config.kernel_size, padding=pad)
        self.norm1 = nn.GroupNorm(config.n_groups, dim_out)
        self.conv2 = nn.Conv1d(dim_out, dim_out, config.kernel_size, padding=pad)
        self.norm2 = nn.GroupNorm(config.n_groups, dim_out)
        self.film_scale = config.film_scale
        self.film = nn.Linear(cond_dim, 2 * dim_out if config.film_scale else dim_out)
        self.residual = nn.Conv1d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def film_of_step(self, step):
        """(N, emb) -> (N, 2C'), the columns of FiLM's matrix that come first; the bias is in the others."""
        return F.linear(step, self.film.weight[:, :step.shape[1]])

    def film_of_obs(self, obs):
        """(B, G) -> (B, 2C')"""
        first = self.film.in_features - obs.shape[1]
        return F.linear(obs, self.film.weight[:, first:], self.film.bias)

    def forward(self, x, of_step, of_obs):
        h = F.mish(self.norm1(self.conv1(x)))                                   # (B, C', T)
        shift = (of_step + of_obs)[..., None]                                   # (B, 2C', 1) with the scale
        if self.film_scale:
            scale, shift = shift.chunk(2, dim=1)                                # 2 x (B, C', 1)
            h = scale * h                                                       # [7] and not (1 + scale)
        h = F.mish(self.norm2(self.conv2(h + shift)))                           # [7]
        return h + self.residual(x)


class UNet1d(nn.Module):
    """eps_theta: noised chunk (B, T, D), FiLM parameters -> (B, T, D) float32. As in the official
    ConditionalUnet1D the way up has one level less than the way down: the skip at full length is not used."""

    def __init__(self, input_dim, obs_dim, config):
        super().__init__()
        dims, emb = config.down_dims, config.step_embed_dim
        block = functools.partial(ResidualBlock1d, cond_dim=emb + obs_dim, config=config)
        self.step_embed_dim = emb
        self.step_mlp = nn.Sequential(nn.Linear(emb, 4 * emb), nn.Mish(), nn.Linear(4 * emb, emb))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(zip((input_dim, *dims), dims)):
            last = i == len(dims) - 1
            shorten = nn.Identity() if last else nn.Conv1d(dim_out, dim_out, 3, stride=2, padding=1)
            self.down.append(nn.ModuleList([block(dim_in, dim_out), block(dim_out, dim_out), shorten]))
        self.mid = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        for dim_out, dim_in in reversed([*zip(dims, dims[1:])]):
            lengthen = nn.ConvTranspose1d(dim_out, dim_out, 4, stride=2, padding=1)
            self.up.append(nn.ModuleList([block(2 * dim_in, dim_out), block(dim_out, dim_out), lengthen]))
        self.final_conv = nn.Conv1d(dims[0], dims[0], config.kernel_size, padding=config.kernel_size // 2)
        self.final_norm = nn.GroupNorm(8, dims[0])  # 8 whatever n_groups is, as in the official code
        self.final_out = nn.Conv1d(dims[0], input_dim, 1)

    def blocks(self):
        """The residual blocks in the order in which `forward` meets them."""
        down, up = ([block for level in way for block in level[:2]] for way in (self.down, self.up))
        return down + list(self.mid) + up

    def film_of_step(self, t):
        """The step's share of the FiLM parameters: t (N,) -> (N, 2C) for every block."""
        emb, dtype = self.step_embed_dim, self.final_out.weight.dtype
        step = F.mish(self.step_mlp(time_embedding(t, emb).to(dtype)))          # (N, emb)
        return [block.film_of_step(step) for block in self.blocks()]

    def film_of_obs(self, obs):
        """The observation's share: obs (B, G) -> (B, 2C) for every block."""
        obs = F.mish(obs.to(self.final_out.weight.dtype))
        return [block.film_of_obs(obs) for block in self.blocks()]

    def forward(self, x, of_step, of_obs):
        shares, skips = iter(zip(of_step, of_obs)), []
        x = x.to(self.final_out.weight.dtype).transpose(1, 2)                   # (B, D, T)
        for block1, block2, shorten in self.down:
            x = block2(block1(x, *next(shares)), *next(shares))                 # (B, C, T)
            skips.append(x)
            x = shorten(x)                                                      # (B, C, T/2); last level: T
        for block in self.mid:
            x = block(x, *next(shares))
        for block1, block2, lengthen in self.up:
            x = torch.cat([x, skips.pop()], dim=1)                              # (B, 2C, T)
            x = lengthen(block2(block1(x, *next(shares)), *next(shares)))       # (B, C', 2T)
        x = F.mish(self.final_norm(self.final_conv(x)))                         # (B, C, T)
        return self.final_out(x).transpose(1, 2).float()                        # (B, T, D)


# ---------------------------------------------------------------- the image encoder: ResNet-18 from scratch
class FrozenBatchNorm(nn.Module):
    """Batch norm by the statistics of a release, in training as well; scale and shift are trained. (B, C, H,
    W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def image_norm(kind, channels):
    return FrozenBatchNorm(channels) if kind == "batch" else nn.GroupNorm(channels // 16, channels)


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions. (B, C, H, W) -> (B, C', H/stride, W/stride). It differs from
    the other files' by the choice of the norm."""

    def __init__(self, dim_in, dim_out, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride, padding=1, bias=False)
        self.norm1 = image_norm(norm, dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = image_norm(norm, dim_out)
        same = stride == 1 and dim_in == dim_out
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(dim_in, dim_out, 1, stride, bias=False), image_norm(norm, dim_out))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 up to its last feature map. (B, 3, H, W) -> (B, C, H/32, W/32), rounded up (four stages).
    Group norm instead of batch norm: the policy acts with a running average of its weights, which is less
    noisy (EMA in train.py; its decay rises from 0 to ema_max, so that the first weights are soon forgotten).
    Batch norm's running statistics would belong to the last weights, not to their average. (LeRobot's default
    has batch norm. Weights so trained keep their statistics, which differs from LeRobot's training.)"""

    def __init__(self, widths, norm="group"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.norm1 = image_norm(norm, widths[0])
        self.stages = nn.Sequential(*[
            nn.Sequential(BasicBlock(dim_in, dim_out, 2 if i else 1, norm),
                          BasicBlock(dim_out, dim_out, 1, norm))
            for i, (dim_in, dim_out) in enumerate(zip((widths[0], *widths), widths))])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision does; torch's default is smaller
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 3, stride=2, padding=1)
        return self.stages(x)


class SpatialSoftmax(nn.Module):
    """Where each of n_keypoints features is seen. (B, C, H, W) -> (B, n_keypoints, 2): x, y in [-1, 1]."""

    def __init__(self, channels, n_keypoints):
        super().__init__()
        self.conv = nn.Conv2d(channels, n_keypoints, 1)

    def forward(self, features):
        p = self.conv(features)                                                 # (B, n_keypoints, H, W)
        H, W = p.shape[-2:]
        p = p.flatten(2).softmax(dim=-1).unflatten(-1, (H, W))                  # [8]
        x = torch.linspace(-1, 1, W, device=p.device, dtype=p.dtype)
        y = torch.linspace(-1, 1, H, device=p.device, dtype=p.dtype)
        return torch.stack([(p.sum(2) * x).sum(-1), (p.sum(3) * y).sum(-1)], dim=-1)  # [8]


class ImageEncoder(nn.Module):
    """One camera: resize, crop, ResNet, spatial softmax, linear, ReLU. (N, 3, H, W) -> (N, image_dim). Bytes
    are scaled by the mean and deviation of the pixels; float images must be scaled already. It differs from
    dp_transformer's by this scale, and by the resizing."""

    def __init__(self, config):
        super().__init__()
        self.resize, self.crop_size, self.random_crop = config.resize, config.crop_size, config.random_crop
        self.resnet = ResNet(config.resnet_widths, config.resnet_norm)
        self.keypoints = SpatialSoftmax(config.resnet_widths[-1], config.n_keypoints)
        self.out = nn.Linear(2 * config.n_keypoints, config.image_dim)

    def crop(self, x):
        """A random place per image in training, the centre in evaluation."""
        N, C, H, W = x.shape
        if not self.crop_size:
            return x
        h, w = self.crop_size
        if not (self.training and self.random_crop):
            top, left = round((H - h) / 2), round((W - w) / 2)  # to even, as torchvision's centre crop
            return x[:, :, top:top + h, left:left + w]
        rows = torch.randint(H - h + 1, (N, 1), device=x.device) + torch.arange(h, device=x.device)  # (N, h)
        cols = torch.randint(W - w + 1, (N, 1), device=x.device) + torch.arange(w, device=x.device)  # (N, w)
        image = torch.arange(N, device=x.device)[:, None, None]
        return x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

    def forward(self, x, mean=0.5, std=0.5):
        scaled = x.is_floating_point()
        if self.resize:  # before or after scaling: it comes to the same
            x = F.interpolate(x.float(), self.resize, mode="bilinear", antialias=True)
        x = self.crop(x)                                                        # (N, 3, h, w)
        x = (x if scaled else (x / 255 - mean) / std).to(self.out.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x  # faster convolutions
        x = self.keypoints(self.resnet(x))                                      # (N, n_keypoints, 2)
        return F.relu(self.out(x.flatten(1)))                                   # the ReLU is robomimic's


# ---------------------------------------------------------------- the policy: loss and sampler
@functools.lru_cache
def per_channel(numbers, device):
    """Three numbers, one for each colour, (3, 1, 1) on `device`."""
    return torch.tensor(numbers, device=device)[:, None, None]


@functools.lru_cache
def cosine_alpha_bar(K, device):
    """alpha_bar_t of [1] for t = 0 .. K-1, float32 (K,) on `device`. Kept: a copy from the host in every step
    would make the host wait. No buffer of the model: .to(bfloat16) would round 1 - alpha_bar_0 to 0.

    As `squaredcos_cap_v2` of diffusers, whose product is taken in float32: released models were trained and
    are sampled that way. beta_start and beta_end, which every official YAML gives, have no effect on it."""
    u = torch.arange(K + 1, dtype=torch.float64, device="cpu") / K
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999).float()
    return torch.cumprod(1 - beta, dim=0).to(device)                            # [1]


@functools.lru_cache
def linear_schedule(K, device, ends, power):
    """alpha_bar_t of betas whose power-th root rises linearly: 1 is Ho et al.'s, 2 is "scaled_linear"."""
    first, last = (end ** (1 / power) for end in ends)
    return torch.cumprod(1 - torch.linspace(first, last, K) ** power, dim=0).to(device)


def schedule_table(K, schedule, beta_ends, device):
    """alpha_bar_t of the schedule asked for, (K,)"""
    if schedule == "cosine":
        return cosine_alpha_bar(K, device)
    return linear_schedule(K, device, beta_ends, 1 if schedule == "linear" else 2)


@functools.lru_cache
def schedule_numbers(K, schedule, beta_ends):
    """The same as Python numbers: a sampler does not wait for the device, torch.compile sees constants."""
    return schedule_table(K, schedule, beta_ends, "cpu").tolist()


def timetable(K, steps, spacing):
    """The levels that a sampler visits, noisiest first: that many of K, or `steps` itself if it is a list.

    "leading" is what the released policies use (diffusers' default): every (K // steps)-th level, counted
    from 0. The trap: 10 of 100 start at level 90, but 51 of 100 start at 50, though the chunk they are given
    is pure noise. "trailing" counts down from K - 1 and always starts at the top.
    """
    if not isinstance(steps, int):
        levels = list(steps)
        if not levels or levels != sorted(set(levels), reverse=True) or not 0 <= levels[-1] <= levels[0] < K:
            raise ValueError(f"sampler steps {levels} must fall from at most {K - 1} to at least 0")
        return levels
    if not 1 <= steps <= K:
        raise ValueError(f"sampler steps {steps} must lie in 1..n_diffusion_steps = {K}")
    if spacing == "trailing":
        return [round(K - k * K / steps) - 1 for k in range(steps)]
    return [k * (K // steps) for k in reversed(range(steps))]


def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


class DiffusionPolicyCNN(nn.Module):
    """p(A | O): encoders of the observation O, the U-Net that denoises chunks A given O, loss and sampler."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.obs_dim = config.state_dim + config.n_cameras * config.image_dim
        if config.conditioning == "global":
            self.unet = UNet1d(config.action_dim, config.n_obs_steps * self.obs_dim, config)
        else:
            self.unet = UNet1d(config.action_dim + self.obs_dim, 0, config)
        n_encoders = min(config.n_cameras, 1) if config.share_encoder else config.n_cameras
        self.encoders = nn.ModuleList([ImageEncoder(config) for _ in range(n_encoders)])

    def encode(self, batch):
        """Observations, one vector for each of n steps: image features, then the state. -> (B, n, obs_dim)"""
        state, images = batch["state"], batch.get("images")  # (B, n, S), (B, n, V, 3, H, W)
        if not self.config.n_cameras:
            return state
        V = 0 if images is None else images.shape[2]
        if V != self.config.n_cameras:
            raise ValueError(f"images of {V} cameras given, n_cameras = {self.config.n_cameras} expected")
        B, n = images.shape[:2]
        encoders = self.encoders if not self.config.share_encoder else [self.encoders[0]] * V
        features = [enc(images[:, :, v].flatten(0, 1), *self.pixels(v, images.device)).unflatten(0, (B, n))
                    for v, enc in enumerate(encoders)]
        return torch.cat(features + [state], dim=-1)

    def pixels(self, camera, device):
        """Mean and deviation of a camera's pixels, 2 x (3, 1, 1), or none for the default of the encoder."""
        both, at = (self.config.image_mean, self.config.image_std), slice(3 * camera, 3 * camera + 3)
        return [per_channel(x[at] or x, device) for x in both if x]

    def condition(self, batch):
        """-> cond (B, G) for FiLM, given (B, Tp, D) or None, known (Tp, D). When inpainting [9], `given` is a
        trajectory that holds the observations; `known` is True at those of the To observed steps."""
        obs = self.encode(batch)                                                # (B, n, obs_dim)
        B, n, _ = obs.shape
        To, Tp, A = self.config.n_obs_steps, self.config.pred_horizon, self.config.action_dim
        if self.config.conditioning == "global":
            return obs[:, :To].flatten(1), None, torch.zeros(Tp, A, dtype=torch.bool, device=obs.device)
        known = torch.zeros(Tp, A + self.obs_dim, dtype=torch.bool, device=obs.device)
        known[:To, A:] = True
        return obs.new_zeros(B, 0), F.pad(obs, (A, 0, 0, Tp - n)), known

    def loss(self, batch, noise=None, t=None):
        """Mean squared error of the predicted noise (or chunk) over a batch's real steps, which weigh alike.
        Batches (accumulated, or of several processes) weigh alike too, however many real steps each has.

        batch: actions (B, Tp, A), action_mask (B, Tp), True: real; state (B, n, S), with n = n_obs_loaded;
        with cameras images (B, n, V, 3, H, W), uint8 or floats in [-1, 1]. noise (B, Tp, D), t (B,): drawn
        if None. Time: t = 0 is almost data, t = K-1 noise. -> {"loss": (), "per_sample": (B,), each item's
        mean, "t": t / (K-1)}"""
        x0, mask = batch["actions"], batch["action_mask"]                       # (B, Tp, A), (B, Tp)
        mask = torch.ones_like(mask) if self.config.train_on_padding else mask
        cond, given, known = self.condition(batch)
        if given is not None:
            # The observations of all Tp steps are denoised too. Their encoder gets no gradient through this
            # target, which would be easiest if it encoded nothing: it learns through the known entries.
            x0 = torch.cat([x0, given[..., x0.shape[-1]:].detach()], dim=-1)    # (B, Tp, A + obs_dim)
        B, config, K = len(x0), self.config, self.config.n_diffusion_steps
        noise = torch.randn_like(x0) if noise is None else noise
        t = torch.randint(K, (B,), device=x0.device) if t is None else t
        alpha_bar = schedule_table(K, config.schedule, config.beta_ends, x0.device)[t]
        alpha_bar = alpha_bar[:, None, None]                                    # (B, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise            # [2]
        if given is not None:
            x_t = torch.where(known, given, x_t)                                # [9] clean, not noised
        pred = self.unet(x_t, self.unet.film_of_step(t), self.unet.film_of_obs(cond))
        target = noise if self.config.prediction_type == "eps" else x0
        # Known entries count as zeros in the mean, as in the original.
        error = ((pred - target) ** 2 * ~known).mean(-1) * mask                 # (B, Tp)
        loss = error.sum() / mask.sum()                                         # [3]
        per_sample = error.detach().sum(1) / mask.sum(1).clamp(min=1)
        return {"loss": loss, "per_sample": per_sample, "t": t / max(K - 1, 1)}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, step_noise=None,
               guide=None):
        """Draw one chunk per observation: (B, Tp, A), normalised. Index -first_action is executed first.

        batch: state (B, >= To, S), images likewise. steps: how many noise levels to visit, or a list of them,
        default config.sampler_steps. noise (B, Tp, D): where to start; step_noise: what DDPM adds, one tensor
        per step but the last; both are drawn from `generator` if None. trace: receives (B, Tp, A) every step.
        guide: for real-time chunking. guide(net, alpha, sigma, kind) returns what is called in place of the
        network net(x_t) of a step; x_t = alpha x0 + sigma eps, and kind says what net gives: "x0", "eps" or
        "v" = eps - x0.
        """
        config, To, A = self.config, self.config.n_obs_steps, self.config.action_dim
        steps = config.sampler_steps if steps is None else steps
        # The first level may lie below K - 1: near the top x_t holds little of the data, so noise will do.
        levels = timetable(config.n_diffusion_steps, steps, config.spacing)
        alpha_bars = schedule_numbers(config.n_diffusion_steps, config.schedule, config.beta_ends)
        batch = {k: v[:, :To] if k in ("state", "images") else v for k, v in batch.items()}
        cond, given, known = self.condition(batch)
        shape, device = (len(cond), *known.shape), cond.device                  # (B, Tp, D)
        x_t = randn(shape, generator, device) if noise is None else noise.float()
        if given is not None:
            x_t = torch.where(known, given, x_t)                                # [9]
        # Filled in number by number: a tensor made of a list would be copied from the host.
        t = torch.stack([torch.full((), level, device=device) for level in levels])
        of_step, of_obs = self.unet.film_of_step(t), self.unet.film_of_obs(cond)
        for i, level in enumerate(levels):
            last = i + 1 == len(levels)
            # After the last level come clean data: alpha_bar = 1, and no noise is added.
            alpha_bar, alpha_bar_prev = alpha_bars[level], 1.0 if last else alpha_bars[levels[i + 1]]
            net = lambda x: self.unet(x, [share[i:i + 1] for share in of_step], of_obs)
            if guide is not None:
                net = guide(net, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), config.prediction_type)
            out = net(x_t)                                                      # (B, Tp, D)
            if config.prediction_type == "eps":
                eps, x0 = out, (x_t - math.sqrt(1 - alpha_bar) * out) / math.sqrt(alpha_bar)  # [4]
            else:
                eps, x0 = (x_t - math.sqrt(alpha_bar) * out) / math.sqrt(1 - alpha_bar), out
            if config.clip_x0:  # no action lies outside; dividing by a small sqrt(alpha_bar) amplifies errors
                x0 = x0.clamp(-config.clip_x0, config.clip_x0)                  # [4]
            if config.sampler == "ddim":  # clipping x0 does not change eps, as in the original
                x_t = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * eps  # [6]
            else:
                beta = 1 - alpha_bar / alpha_bar_prev
                c1 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
                c2 = math.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar)
                x_t = c1 * x0 + c2 * x_t                                        # [5]
                if not last:
                    z = randn(shape, generator, device) if step_noise is None else step_noise[i]
                    x_t = x_t + math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * beta) * z  # [5]
            if given is not None:
                x_t = torch.where(known, given, x_t)                            # [9]
            if trace is not None:
                trace.append(x_t[..., :A])
        return x_t[..., :A]

    def param_groups(self, weight_decay):
        """The original decays every parameter alike."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    @classmethod
    def from_official(cls, state_dict, config, order=None):
        """A policy with the weights of a Diffusion Policy or LeRobot checkpoint. config must describe it
        (PRESETS["lowdim"], PRESETS["image"]). order: what an observation consists of there, names of cameras
        and numbers of state: [3, "wrist", "front", 2]; default: cameras first, in LeRobot's the state.
        The normaliser: `official_normalizer`."""
        weights = convert_official(state_dict, config, order)
        with torch.device("meta"):
            model = cls(config)
        load_strictly(model, weights)
        return model.requires_grad_()


# ---------------------------------------------------------------- loading official weights
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


# Official names -> ours, applied in this order: prefixes of both code bases, the U-Net, torchvision's ResNet.
RENAMES = [
    (r"^model\.obs_encoder\.", "obs_encoder."), (r"^diffusion\.", ""), (r"^model\.", "unet."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.0\.nets\.", r"encoders.\1.resnet."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.1\.", r"encoders.\1.pool."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.3\.", r"encoders.\1.out."),
    (r"^rgb_encoder\.(\d+)\.", r"encoders.\1."), (r"^rgb_encoder\.", "encoders.0."),
    (r"\.diffusion_step_encoder\.1\.", ".step_mlp.0."), (r"\.diffusion_step_encoder\.3\.", ".step_mlp.2."),
    (r"\.(down|mid|up)_modules\.", r".\1."), (r"\.(down|up)\.(\d+)\.2\.conv\.", r".\1.\2.2."),
    (r"\.final_conv\.0\.block\.0\.", ".final_conv."), (r"\.final_conv\.0\.block\.1\.", ".final_norm."),
    (r"\.final_conv\.1\.", ".final_out."), (r"\.residual_conv\.", ".residual."),
    (r"\.cond_encoder\.1\.", ".film."),
    (r"\.blocks\.0\.block\.0\.", ".conv1."), (r"\.blocks\.0\.block\.1\.", ".norm1."),
    (r"\.blocks\.1\.block\.0\.", ".conv2."), (r"\.blocks\.1\.block\.1\.", ".norm2."),
    (r"\.conv([12])\.block\.0\.", r".conv\1."), (r"\.conv([12])\.block\.1\.", r".norm\1."),
    (r"\.backbone\.", ".resnet."), (r"\.pool\.(nets\.)?(weight|bias)", r".keypoints.conv.\2"),
    (r"\.resnet\.0\.", ".resnet.conv1."), (r"\.resnet\.1\.", ".resnet.norm1."),
    (r"\.resnet\.([4-7])\.", lambda m: f".resnet.stages.{int(m[1]) - 4}."),
    (r"\.bn([12])\.", r".norm\1."), (r"\.downsample\.", ".shortcut."),
]
# Second names of the encoder's weights, constants, and the normaliser's entries.
NOT_WEIGHTS = re.compile(r"(_dummy_variable|pos_x|pos_y|pos_grid|temperature|num_batches_tracked)$"
                         r"|^normali[sz]e|^unnormali[sz]e"
                         r"|^(model\.)?obs_encoder\.obs_nets\.[^.]+\.(backbone|pool)\.")


def convert_official(state_dict, config, order=None):
    """Rename the keys of an official state_dict (or of a part of it); FiLM's columns in our order."""
    weights, cameras = {}, [part for part in order or () if isinstance(part, str)]
    for key, value in state_dict.items():
        if NOT_WEIGHTS.search(key):
            continue
        lerobot = key.startswith(("diffusion.", "unet."))  # with its prefix, or without
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        name = re.match(r"encoders\.([^.]+)\.", key)
        if name and not name[1].isdigit():  # the original names its encoders after the cameras
            cameras += [] if name[1] in cameras else [name[1]]
            key = key.replace(name[0], f"encoders.{cameras.index(name[1])}.", 1)
        if config.n_cameras and key.endswith(".film.weight") and (lerobot or order):
            columns = official_columns(config, order or [config.state_dim, *"c" * config.n_cameras])
            if value.shape[1] == len(columns):  # otherwise load_strictly reports the shape
                value = value[:, columns]
        weights[key] = value
    return weights


def official_columns(config, order):
    """Where each column of our condition [step embedding, To x (cameras, state)] stands in the official one,
    whose observations have the parts `order` (see from_official)."""
    cameras, state, width = [], [], 0  # width: of an observation, so far
    for part in order:
        camera = isinstance(part, str)
        n = config.image_dim if camera else part
        (cameras if camera else state).extend(range(width, width + n))
        width += n
    steps = range(config.step_embed_dim, config.step_embed_dim + config.n_obs_steps * width, max(width, 1))
    return [*range(config.step_embed_dim), *(first + i for first in steps for i in cameras + state)]


def official_normalizer(state_dict):
    """{"action": (scale, offset), ...} of an original checkpoint: normalised = raw * scale + offset."""
    prefix = "normalizer.params_dict."
    names = {k[len(prefix):].split(".")[0] for k in state_dict if k.startswith(prefix)}
    return {n: (state_dict[f"{prefix}{n}.scale"], state_dict[f"{prefix}{n}.offset"]) for n in sorted(names)}


# ---------------------------------------------------------------- presets
Model = DiffusionPolicyCNN

PRESETS = {
    "tiny": {},  # learns the built-in task in minutes on two CPU cores
    "tiny_image": {"obs": "image", "resnet_widths": (16, 32, 64, 128), "n_keypoints": 16,
                   "crop_size": (56, 56)},
    # Push-T from keypoints: 65,783,298 parameters
    "lowdim": {"down_dims": (256, 512, 1024), "step_embed_dim": 256, "sampler": "ddpm", "sampler_steps": 100,
               "action_dim": 2, "state_dim": 20},
    # Push-T from images: 251,511,938 + 11,197,088 in the encoder
    "image": {"down_dims": (512, 1024, 2048), "step_embed_dim": 128, "sampler": "ddpm", "sampler_steps": 100,
              "obs": "image", "action_dim": 2, "state_dim": 2, "n_cameras": 1, "image_size": (96, 96),
              "crop_size": (84, 84)},
}

# What train.py takes for these presets unless it is told otherwise; ema_max: the final decay of its EMA.
RECIPES = {
    "tiny": {"steps": 3000, "batch_size": 128, "lr": 1e-3, "ema_max": 0.999, "eval_every": 500},
    "tiny_image": {"steps": 2000, "batch_size": 64, "lr": 1e-3, "ema_max": 0.999, "eval_every": 500},
    "lowdim": {"steps": 220_000, "batch_size": 256, "lr": 1e-4, "warmup": 500},
    "image": {"steps": 500_000, "batch_size": 64, "lr": 1e-4, "warmup": 500},
}


# ---------------------------------------------------------------- the file alone
def obstacle_paths(n, generator):
    """n paths of 16 points from a given start to (1, 0) that pass an obstacle at the origin on either side
    with equal odds: state (n, To = 2, 2), the start twice, and actions (n, Tp = 16, 2)."""
    start = torch.stack([torch.full((n,), -1.0), torch.rand(n, generator=generator) * 0.6 - 0.3], dim=-1)
    side = torch.randint(2, (n, 1), generator=generator) * 2 - 1
    progress = torch.linspace(0, 1, 16)
    y = (1 - progress) * start[:, 1:] + 0.7 * side * torch.sin(math.pi * progress)
    actions = torch.stack([(2 * progress - 1).expand(n, -1), y], dim=-1)
    return start[:, None].expand(-1, 2, -1), actions


def main(steps=2000):
    """Train on paths around an obstacle; print how many sampled paths keep clear of it, on both sides."""
    torch.manual_seed(0)
    config = Config(action_dim=2, state_dim=2, down_dims=(16, 32, 64))
    model = DiffusionPolicyCNN(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-6), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        state, actions = obstacle_paths(64, generator)
        batch = {"state": state, "actions": actions, "action_mask": torch.ones(64, 16, dtype=torch.bool)}
        loss = model.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 400 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}")
    model.eval()
    state, _ = obstacle_paths(500, generator)
    path = model.sample({"state": state})                                       # (500, 16, 2)
    clear = (path.norm(dim=-1) > 0.5).all(1)
    up = (path[:, 8, 1] > 0).float().mean()
    print(f"paths clear of the obstacle: {100 * clear.float().mean():.1f} % (expected: at least 95; the mean "
          f"of the data hits it every time); above it: {100 * up:.0f} % (expected: about 50)")
    return clear.float().mean().item(), up.item()


if __name__ == "__main__":
    main()
