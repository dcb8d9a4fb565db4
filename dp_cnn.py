"""Diffusion Policy, CNN variant: a robot's next actions drawn from a conditional diffusion model.

    Cheng Chi, Zhenjia Xu, Siyuan Feng, Eric Cousineau, Yilun Du, Benjamin Burchfiel, Russ Tedrake, Shuran
    Song: "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", arXiv:2303.04137
    official code: github.com/real-stanford/diffusion_policy, and its port in github.com/huggingface/lerobot

The policy is a distribution p(A | O) over a whole chunk of actions A, given the last observations O. A
network learns to tell the noise in a noised chunk; sampling starts from pure noise and removes it step by
step. O conditions every step but is not itself predicted (p(A | O), not p(A, O)): it is encoded once a chunk.

Axes: B batch, T steps of the chunk, A action dimensions, To observed steps, V cameras, C channels.
Time of the diffusion, t: 0 is the least noised of K levels (one step of noise, not clean data), K-1 is noise.
Time of the robot (To = 2 observed, Tp = 16 predicted, Ta = 8 executed):
    step        now-1  now  now+1 ... now+7 ... now+14
    observed      x     x
    predicted     x     x     x   x     x    x    x       (x0 below: all Tp of them)
    executed            x     x   x     x                 then look again and re-plan

    [1]  alpha_bar_t = f((t+1)/K) / f(0),  f(u) = cos^2((u + 0.008) / 1.008 * pi/2),  beta_t <= 0.999 schedule
    [2]  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                     noising
    [3]  L = mean (eps - eps_theta(O, x_t, t))^2,   t uniform in 0..K-1                              loss
    [4]  x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t), clipped to [-1, 1]
    [5]  x_{t-1} = c1 x0_hat + c2 x_t + sigma_t z,   c1 = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t),
         c2 = sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t),
         sigma_t^2 = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t                                DDPM step
         Unclipped this is the paper's A^{k-1} = alpha (A^k - gamma eps_theta(O, A^k, k)) + N(0, sigma^2 I)
         with alpha = 1 / sqrt(1 - beta_t) and gamma = beta_t / sqrt(1 - alpha_bar_t).
    [6]  x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s) eps_theta,   s < t                   DDIM step
    [7]  FiLM(h | c) = gamma(c) * h + beta(c), per channel; c = [step embedding, observations]
    [8]  spatial softmax: p = softmax over the pixels of a channel; keypoint = (sum p x, sum p y)
    [9]  inpainting instead of FiLM: x = [action, observation]; known entries are put back at every step

Map: Config | Conv1d, ResidualBlock1d, UNet1d | ResNet, SpatialSoftmax, ImageEncoder | DiffusionPolicyCNN:
loss, sample, from_official | PRESETS | main.

Differs from the original:
 1. Steps past the end of an episode are left out of the loss. The original repeats the last action there and
    trains on it, with the plain mean over everything; LeRobot does either.
 2. A random crop can start at every offset; the original never draws the last one.
 3. FiLM's linear layer over [step, observation] is computed as two products that are added: all steps of a
    sampler at once, and the observation once. The numbers are the same; each weight is read once per chunk,
    not per step.
 4. One short sequence is convolved as a matrix product on a CPU (same numbers, less time).
 5. The hybrid image policy's features are ordered [cameras, state] for every data set; LeRobot's [state,
    cameras, environment state] is permuted while loading. Local conditioning (never used by a released model)
    is left out.

Run alone: `python dp_cnn.py` trains a small policy on paths around an obstacle, in under a minute on
two CPU cores.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # -- the data; train.py fills these in
    # length of one action vector
    action_dim: int = 3
    # length of the low-dimensional observation of one step
    state_dim: int = 16
    # number of cameras, each with an encoder of its own; 0 = low-dimensional observations only
    n_cameras: int = 0
    # height, width of every camera image, pixels
    image_size: tuple = (64, 64)
    # -- the timeline (picture above), in control steps
    # Tp, predicted steps
    horizon: int = 16
    # To, observed steps
    n_obs_steps: int = 2
    # Ta, executed steps
    n_action_steps: int = 8
    # True: predict only the Ta steps that are executed
    pred_action_steps_only: bool = False
    # -- how the observation enters
    # "lowdim": every float observation; "image": cameras and proprioception
    obs: str = "lowdim"
    # "global": FiLM [7]; "inpaint": as known entries of the trajectory [9]
    conditioning: str = "global"
    # -- the temporal U-Net
    # channels of its levels; each level after the first halves the time axis
    down_dims: tuple = (32, 64, 128)
    # taps of its convolutions (odd)
    kernel_size: int = 5
    # groups of its group norms
    n_groups: int = 8
    # width of the diffusion step's embedding
    step_embed_dim: int = 64
    # True: FiLM scales and shifts; False: it only shifts
    film_scale: bool = True
    # -- the image encoder
    # channels of the four ResNet stages (ResNet-18: 64, 128, 256, 512)
    resnet_widths: tuple = (64, 128, 256, 512)
    # keypoints of the spatial softmax
    n_keypoints: int = 32
    # height, width of the crop: random in training, centre in evaluation; () = the whole image
    crop_size: tuple = ()
    # True: all cameras share one encoder (LeRobot's default; the paper has one per camera)
    share_encoder: bool = False
    # -- the diffusion
    # K, noise levels in training
    n_diffusion_steps: int = 100
    # what the network predicts: "eps" or "x0" (the official `epsilon` and `sample`)
    prediction_type: str = "eps"
    # "ddim" or "ddpm"
    sampler: str = "ddim"
    # noise levels visited when sampling; at most K
    sampler_steps: int = 10

    def __post_init__(self):
        check_choice("conditioning", self.conditioning, ("global", "inpaint"))
        check_choice("prediction_type", self.prediction_type, ("eps", "x0"))
        check_choice("sampler", self.sampler, ("ddim", "ddpm"))
        check_choice("obs", self.obs, ("lowdim", "image"))
        if not self.down_dims:
            raise ValueError("down_dims is empty: give the channels of one level at least")
        halvings = 2 ** (len(self.down_dims) - 1)
        if self.pred_horizon % halvings:
            raise ValueError(f"horizon {self.pred_horizon} cannot be halved {len(self.down_dims) - 1} times "
                             f"by the U-Net: make it a multiple of {halvings}, or shorten down_dims")
        if self.n_obs_steps < 1 or self.n_obs_steps > self.horizon:
            raise ValueError(f"n_obs_steps {self.n_obs_steps} must lie between 1 and horizon {self.horizon}")
        if not 1 <= self.n_action_steps <= self.horizon - self.n_obs_steps + 1:
            raise ValueError(f"n_action_steps {self.n_action_steps} must lie between 1 and horizon - "
                             f"n_obs_steps + 1 = {self.horizon - self.n_obs_steps + 1}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd to keep the sequence's length")
        bad = [d for d in self.down_dims if d % self.n_groups]
        if bad:
            raise ValueError(f"down_dims {bad} cannot be split into n_groups = {self.n_groups} groups")
        if self.crop_size and any(c > s for c, s in zip(self.crop_size, self.image_size)):
            raise ValueError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}")
        if self.conditioning == "inpaint" and self.pred_action_steps_only:
            raise ValueError("pred_action_steps_only needs conditioning 'global': inpainting predicts the "
                             "observed steps too")
        check_steps(self.sampler_steps, self.n_diffusion_steps)

    @property
    def pred_horizon(self):
        """Number of actions in a batch and in a sampled chunk."""
        return self.n_action_steps if self.pred_action_steps_only else self.horizon

    @property
    def first_action(self):
        """Step of the chunk's first action, counted from now: the chunk starts with the first observed
        step."""
        return 0 if self.pred_action_steps_only else 1 - self.n_obs_steps

    @property
    def n_obs_loaded(self):
        """Observed steps in a training batch: inpainting trains on the observations of the whole chunk."""
        return self.horizon if self.conditioning == "inpaint" else self.n_obs_steps


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(choices)}")


def check_steps(steps, n_diffusion_steps):
    if not 1 <= steps <= n_diffusion_steps:
        raise ValueError(f"sampler steps {steps} must lie in 1..n_diffusion_steps = {n_diffusion_steps}")


# ----------------------------------------------------------------------------------------------------------
# The noise prediction network: a U-Net along the time axis of the chunk


class Conv1d(nn.Conv1d):
    """nn.Conv1d, (B, C, T) -> (B, C', T'). At batch 1 a deep level is 1024 x 1024 x 5 weights applied to 4
    steps: all the time goes into reading weights, and a matrix product reads them about 1.5 times
    (bfloat16: 6 times) as fast."""

    def forward(self, x):
        B, C, T = x.shape
        if x.device.type != "cpu" or torch.is_grad_enabled() or B * T > 64:
            return super().forward(x)
        x = F.pad(x, (self.padding[0], self.padding[0]))
        x = x.unfold(2, self.kernel_size[0], self.stride[0])                    # (B, C, T', k)
        x = x.transpose(1, 2).flatten(2)                                        # (B, T', C k)
        return F.linear(x, self.weight.flatten(1), self.bias).transpose(1, 2)   # (B, C', T')


def step_embedding(t, dim):
    """Sinusoids of the diffusion step, (...,) -> (..., dim), sines first. The exponent runs to 1 (half - 1
    in the denominator) as in Ho et al.; iDDPM and DiT differ in both."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ResidualBlock1d(nn.Module):
    """Two convolutions with group norm and Mish; FiLM acts between them. (B, C, T) -> (B, C', T)."""

    def __init__(self, dim_in, dim_out, cond_dim, config):
        super().__init__()
        pad = config.kernel_size // 2
        self.conv1 = Conv1d(dim_in, dim_out, config.kernel_size, padding=pad)
        self.norm1 = nn.GroupNorm(config.n_groups, dim_out)
        self.conv2 = Conv1d(dim_out, dim_out, config.kernel_size, padding=pad)
        self.norm2 = nn.GroupNorm(config.n_groups, dim_out)
        self.film = nn.Linear(cond_dim, 2 * dim_out if config.film_scale else dim_out)
        self.residual = Conv1d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def film_parameters(self, step, obs):
        """[gamma, beta] (..., 2C') of [7] from Mish(step) (..., D) and Mish(obs) (..., G), whose leading axes
        broadcast. The layer acts on [step, obs]; a linear layer of a concatenation is a sum of two."""
        w_step, w_obs = self.film.weight.split([step.shape[-1], obs.shape[-1]], dim=1)
        return F.linear(step, w_step) + F.linear(obs, w_obs, self.film.bias)

    def forward(self, x, film):
        B, C, T = x.shape
        h = F.mish(self.norm1(self.conv1(x)))                                   # (B, C', T)
        if film.shape[1] == 2 * h.shape[1]:
            gamma, beta = film[..., None].chunk(2, dim=1)                       # 2 x (B, C', 1)
            h = gamma * h + beta                                                # [7] and not (1 + gamma)
        else:
            h = h + film[..., None]                                                    # film_scale = False
        h = F.mish(self.norm2(self.conv2(h)))
        return h + self.residual(x)


class UNet1d(nn.Module):
    """eps_theta: noised chunk (B, T, D), FiLM parameters -> (B, T, D). Official: ConditionalUnet1D.

    Two traits of the official network are kept, since released weights depend on them: the skip of the first,
    full-length level is never used, and every level of the way up upsamples.
    """

    def __init__(self, input_dim, obs_dim, config):
        super().__init__()
        dims, emb = config.down_dims, config.step_embed_dim
        self.step_embed_dim = emb
        self.step_mlp = nn.Sequential(nn.Linear(emb, 4 * emb), nn.Mish(), nn.Linear(4 * emb, emb))

        def block(dim_in, dim_out):
            return ResidualBlock1d(dim_in, dim_out, emb + obs_dim, config)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(zip((input_dim,) + tuple(dims), dims)):
            last = i == len(dims) - 1
            shorten = nn.Identity() if last else Conv1d(dim_out, dim_out, 3, stride=2, padding=1)
            self.down.append(nn.ModuleList([block(dim_in, dim_out), block(dim_out, dim_out), shorten]))
        self.mid = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        for dim_in, dim_out in zip(dims[:0:-1], dims[-2::-1]):
            lengthen = nn.ConvTranspose1d(dim_out, dim_out, 4, stride=2, padding=1)
            self.up.append(nn.ModuleList([block(2 * dim_in, dim_out), block(dim_out, dim_out), lengthen]))
        self.final_conv = Conv1d(dims[0], dims[0], config.kernel_size, padding=config.kernel_size // 2)
        self.final_norm = nn.GroupNorm(8, dims[0])  # 8 whatever n_groups is, as in the official code
        self.final_out = Conv1d(dims[0], input_dim, 1)

    def blocks(self):
        """The residual blocks in the order in which `forward` meets them."""
        down, up = ([block for level in way for block in level[:2]] for way in (self.down, self.up))
        return down + list(self.mid) + up

    def film(self, t, obs):
        """FiLM parameters of every block: t (...,) and obs (..., G) broadcast -> list of (..., 2C)."""
        step = self.step_mlp(step_embedding(t, self.step_embed_dim).to(obs.dtype))  # (..., emb)
        step, obs = F.mish(step), F.mish(obs)
        return [block.film_parameters(step, obs) for block in self.blocks()]

    def forward(self, x, film):
        B, T, D = x.shape
        film = iter(film)
        x, skips = x.transpose(1, 2), []                                        # (B, D, T)
        for block1, block2, shorten in self.down:
            x = block2(block1(x, next(film)), next(film))                       # (B, C, T)
            skips.append(x)
            x = shorten(x)                                                      # (B, C, T/2)
        for block in self.mid:
            x = block(x, next(film))
        for block1, block2, lengthen in self.up:
            x = torch.cat([x, skips.pop()], dim=1)                              # (B, 2C, T)
            x = lengthen(block2(block1(x, next(film)), next(film)))             # (B, C/2, 2T)
        x = F.mish(self.final_norm(self.final_conv(x)))                         # (B, C, T)
        return self.final_out(x).transpose(1, 2)                                # (B, T, D)


# ----------------------------------------------------------------------------------------------------------
# The image encoder: ResNet-18 from scratch, with group norm because EMA and batch norm do not go together


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions. (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, dim_in, dim_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(dim_out // 16, dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(dim_out // 16, dim_out)
        self.shortcut = nn.Identity()
        if stride != 1 or dim_in != dim_out:
            self.shortcut = nn.Sequential(nn.Conv2d(dim_in, dim_out, 1, stride, bias=False),
                                          nn.GroupNorm(dim_out // 16, dim_out))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 up to its last feature map. (B, 3, H, W) -> (B, C, H/32, W/32), rounded up."""

    def __init__(self, widths):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.GroupNorm(widths[0] // 16, widths[0])
        self.stages = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(zip((widths[0],) + tuple(widths), widths)):
            self.stages.append(nn.Sequential(BasicBlock(dim_in, dim_out, 1 if i == 0 else 2),
                                             BasicBlock(dim_out, dim_out, 1)))

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return x


class SpatialSoftmax(nn.Module):
    """Where each of n_keypoints features is seen. (B, C, H, W) -> (B, n_keypoints, 2): x, y in [-1, 1]."""

    def __init__(self, channels, n_keypoints):
        super().__init__()
        self.conv = nn.Conv2d(channels, n_keypoints, 1)

    def forward(self, x):
        p = self.conv(x)                                                        # (B, n, H, W)
        H, W = p.shape[-2:]
        p = p.flatten(2).softmax(dim=-1).unflatten(-1, (H, W))                  # [8]
        x = torch.linspace(-1, 1, W, device=p.device, dtype=p.dtype)
        y = torch.linspace(-1, 1, H, device=p.device, dtype=p.dtype)
        return torch.stack([(p.sum(2) * x).sum(-1), (p.sum(3) * y).sum(-1)], dim=-1)  # [8]


class ImageEncoder(nn.Module):
    """One camera: crop, ResNet, spatial softmax, linear. (N, 3, H, W) -> (N, 2 n_keypoints).

    uint8 images are scaled to [-1, 1]; float images are taken as scaled already.
    """

    def __init__(self, config):
        super().__init__()
        self.crop_size = config.crop_size
        self.resnet = ResNet(config.resnet_widths)
        self.keypoints = SpatialSoftmax(config.resnet_widths[-1], config.n_keypoints)
        self.out = nn.Linear(2 * config.n_keypoints, 2 * config.n_keypoints)

    def crop(self, x):
        """A random place per image in training, the centre in evaluation."""
        N, C, H, W = x.shape
        if not self.crop_size:
            return x
        h, w = self.crop_size
        if not self.training:
            top, left = round((H - h) / 2), round((W - w) / 2)  # to even, as torchvision's centre crop
            return x[:, :, top:top + h, left:left + w]
        rows = torch.randint(H - h + 1, (N, 1), device=x.device) + torch.arange(h, device=x.device)  # (N, h)
        cols = torch.randint(W - w + 1, (N, 1), device=x.device) + torch.arange(w, device=x.device)  # (N, w)
        image = torch.arange(N, device=x.device)[:, None, None]
        return x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

    def forward(self, x):
        x = self.crop(x)                                                        # (N, 3, h, w)
        if not x.is_floating_point():
            x = x.to(self.out.weight.dtype) / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
        x = self.keypoints(self.resnet(x))                                      # (N, n_keypoints, 2)
        return F.relu(self.out(x.flatten(1)))  # the ReLU is robomimic's, applied to every encoded key


# ----------------------------------------------------------------------------------------------------------


def cosine_alpha_bar(K):
    """alpha_bar_t of t = 0..K-1, (K,) float32, through the clipped beta_t, as `squaredcos_cap_v2` of
    diffusers: the product is taken in float32 because released models were trained and are sampled that
    way. beta_start and beta_end, which every official YAML gives, have no effect on this schedule."""
    u = torch.arange(K + 1, dtype=torch.float64) / K
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999).float()
    return torch.cumprod(1 - beta, dim=0)                                       # [1]


def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


class DiffusionPolicyCNN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.obs_dim = config.state_dim + config.n_cameras * 2 * config.n_keypoints
        if config.conditioning == "global":
            self.unet = UNet1d(config.action_dim, config.n_obs_steps * self.obs_dim, config)
        else:
            self.unet = UNet1d(config.action_dim + self.obs_dim, 0, config)
        n_encoders = min(config.n_cameras, 1) if config.share_encoder else config.n_cameras
        self.encoders = nn.ModuleList([ImageEncoder(config) for _ in range(n_encoders)])
        # No buffer: model.to(bfloat16) would round 1 - alpha_bar_0 to zero.
        self.alpha_bar = cosine_alpha_bar(config.n_diffusion_steps)

    def encode(self, batch):
        """Observations as one vector per step: images through their encoders, then the state. (B, n,
        obs_dim)"""
        state = batch["state"]                                                  # (B, n, S)
        if not self.config.n_cameras:
            return state
        images = batch["images"]                                                # (B, n, V, 3, H, W)
        B, n, V = images.shape[:3]
        if V != self.config.n_cameras:
            raise ValueError(f"images of {V} cameras given, n_cameras = {self.config.n_cameras} expected")
        encoders = self.encoders if not self.config.share_encoder else [self.encoders[0]] * V
        features = [enc(images[:, :, v].flatten(0, 1)).unflatten(0, (B, n)) for v, enc in enumerate(encoders)]
        return torch.cat(features + [state], dim=-1)

    def condition(self, batch):
        """-> (condition of FiLM (B, G), known entries of the trajectory or None, which of them are known)."""
        obs = self.encode(batch)                                                # (B, n, obs_dim)
        B, n, D = obs.shape
        To, Tp, A = self.config.n_obs_steps, self.config.pred_horizon, self.config.action_dim
        if self.config.conditioning == "global":
            return obs[:, :To].flatten(1), None, torch.zeros(Tp, A, dtype=torch.bool, device=obs.device)
        known = torch.zeros(Tp, A + D, dtype=torch.bool, device=obs.device)
        known[:To, A:] = True
        return obs.new_zeros(B, 0), F.pad(obs, (A, 0, 0, Tp - n)), known

    def loss(self, batch, noise=None, t=None):
        """Mean squared error of the predicted noise (or of the predicted chunk) over the steps that are real.

        batch: actions (B, Tp, A), action_mask (B, Tp), state (B, n, S), images (B, n, V, 3, H, W) if there
        are cameras, with n = n_obs_loaded. noise (B, Tp, D), t (B,): drawn when not given. Time: t = 0 is
        almost data, t = K-1 noise. -> {"loss": (), "per_sample": (B,), "t": (B,) in [0, 1]}
        """
        x0, mask = batch["actions"], batch["action_mask"]                       # (B, Tp, A), (B, Tp)
        cond, obs, known = self.condition(batch)
        if obs is not None:
            # The observations of the whole chunk are data to be denoised. Their encoder learns through the
            # known entries alone: as a target it could make the loss small by encoding nothing.
            x0 = torch.cat([x0, obs[..., x0.shape[-1]:].detach()], dim=-1)      # (B, Tp, A + obs_dim)
        B, K = x0.shape[0], self.config.n_diffusion_steps
        noise = torch.randn_like(x0) if noise is None else noise
        t = torch.randint(K, (B,), device=x0.device) if t is None else t
        alpha_bar = self.alpha_bar.to(x0.device)[t][:, None, None]              # (B, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise            # [2]
        if obs is not None:
            x_t = torch.where(known, obs, x_t)                                  # [9] given clean, not noised
        pred = self.unet(x_t, self.unet.film(t, cond))
        target = noise if self.config.prediction_type == "eps" else x0
        # Known entries count as zeros in the mean, as in the original.
        error = ((pred - target) ** 2 * ~known).mean(-1) * mask                 # (B, Tp)
        loss = error.sum() / mask.sum()                                         # [3]
        per_sample = error.detach().sum(1) / mask.sum(1).clamp(min=1)
        return {"loss": loss, "per_sample": per_sample, "t": t / (K - 1)}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, step_noise=None):
        """Draw one chunk per observation: (B, Tp, A), normalised units, of which the policy executes Ta steps
        from index -first_action on.

        batch: state (B, >= To, S), images likewise. steps: noise levels visited, default
        config.sampler_steps. noise (B, Tp, D): where to start; step_noise: the noises that DDPM adds, one
        tensor per step but the last; both are drawn from `generator` when not given. trace: receives (B, Tp,
        A) after every step.
        """
        K, A = self.config.n_diffusion_steps, self.config.action_dim
        steps = self.config.sampler_steps if steps is None else steps
        check_steps(steps, K)
        dtype = self.unet.final_out.weight.dtype  # bfloat16 weights: the network in bfloat16, x_t in float32
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        To = self.config.n_obs_steps
        batch = {k: v[:, :To] if k in ("state", "images") else v for k, v in batch.items()}
        cond, obs, known = self.condition(batch)
        B, device = cond.shape[0], cond.device
        shape = (B, *known.shape)
        x_t = randn(shape, generator, device) if noise is None else noise.float()
        if obs is not None:
            x_t = torch.where(known, obs.float(), x_t)                          # [9]

        levels = torch.arange(steps - 1, -1, -1, device=device) * (K // steps)  # 10 of K=100: 90, 80 .. 0
        alpha_bars = self.alpha_bar.to(device)
        film = self.unet.film(levels[:, None], cond[None])  # all steps at once: a block's (steps, B, 2C)
        for i in range(steps):
            out = self.unet(x_t.to(dtype), [f[i] for f in film]).float()        # (B, Tp, D)
            alpha_bar = alpha_bars[levels[i]]
            # The level after 0 is clean data, alpha_bar = 1; no noise is added on the way there.
            alpha_bar_prev = alpha_bars[levels[i + 1]] if i + 1 < steps else torch.ones_like(alpha_bar)
            if self.config.prediction_type == "eps":
                eps, x0 = out, (x_t - (1 - alpha_bar).sqrt() * out) / alpha_bar.sqrt()  # [4]
            else:
                eps, x0 = (x_t - alpha_bar.sqrt() * out) / (1 - alpha_bar).sqrt(), out
            x0 = x0.clamp(-1, 1)                                                # [4] eps stays unclipped
            if self.config.sampler == "ddim":
                x_t = alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev).sqrt() * eps  # [6]
            else:
                beta = 1 - alpha_bar / alpha_bar_prev
                c1 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
                c2 = (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
                x_t = c1 * x0 + c2 * x_t                                        # [5]
                if i + 1 < steps:
                    z = randn(shape, generator, device) if step_noise is None else step_noise[i]
                    sigma = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20).sqrt()
                    x_t = x_t + sigma * z                                       # [5]
            if obs is not None:
                x_t = torch.where(known, obs.float(), x_t)                      # [9]
            if trace is not None:
                trace.append(x_t[..., :A])
        return x_t[..., :A]

    def param_groups(self, weight_decay):
        """The original decays every parameter alike."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    @classmethod
    def from_official(cls, state_dict, config, state_dim=None):
        """A policy with the weights of a Diffusion Policy or LeRobot checkpoint, whichever `state_dict`
        holds.

        config must describe it (PRESETS["lowdim"], PRESETS["image"]). state_dim: LeRobot with cameras and an
        environment state only: how many of config.state_dim come before the images there. Strict: one
        ValueError names every key that is missing, left over or has another shape. Normaliser entries are
        left to `official_normalizer`; buffers that hold constants are not read.
        """
        weights = convert_official(state_dict, config, state_dim)
        with torch.device("meta"):
            model = cls(config)
        want = model.state_dict()
        problems = [f"missing {k}" for k in want if k not in weights]
        problems += [f"left over {k}" for k in weights if k not in want]
        problems += [f"{k} is {tuple(weights[k].shape)} and should be {tuple(want[k].shape)}"
                     for k in want if k in weights and weights[k].shape != want[k].shape]
        if problems:
            raise ValueError(f"these weights do not fit the configuration: {'; '.join(problems)}")
        model.load_state_dict(weights, assign=True)
        model.alpha_bar = cosine_alpha_bar(config.n_diffusion_steps)
        return model.requires_grad_()


# Official names -> ours, applied in this order. The first group is the two code bases' prefixes, the second
# the U-Net, the third torchvision's ResNet as the list of its children.
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
# The aliases of the encoder, constants of the architecture, and what belongs to the normaliser.
NOT_WEIGHTS = re.compile(r"(_dummy_variable|pos_x|pos_y|pos_grid|temperature)$|^normali[sz]e|^unnormali[sz]e"
                         r"|^(model\.)?obs_encoder\.obs_nets\.[^.]+\.(backbone|pool)\.")


def convert_official(state_dict, config, state_dim=None):
    """Rename the keys of an official state_dict (or of a part of it) and bring FiLM's columns into our
    order."""
    weights, cameras = {}, []
    for key, value in state_dict.items():
        if NOT_WEIGHTS.search(key):
            continue
        if key.startswith("unet."):  # LeRobot without its prefix
            key = "diffusion." + key
        lerobot = key.startswith("diffusion.")
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        name = re.match(r"encoders\.([^.]+)\.", key)
        if name and not name[1].isdigit():  # the original names its encoders after the cameras
            cameras += [] if name[1] in cameras else [name[1]]
            key = key.replace(name[0], f"encoders.{cameras.index(name[1])}.", 1)
        if lerobot and config.n_cameras and key.endswith(".film.weight"):
            columns = lerobot_columns(config, state_dim)
            # Of another width they are weights for other observations: from_official will say so.
            value = value[:, columns] if value.shape[1] == len(columns) else value
        weights[key] = value
    return weights


def lerobot_columns(config, state_dim=None):
    """Where each column of our condition [step embedding, To x (cameras, state)] stands in LeRobot's,
    which orders a step as [state, cameras, environment state]."""
    first = config.state_dim if state_dim is None else state_dim
    images = config.n_cameras * 2 * config.n_keypoints
    one_step = list(range(first, first + images)) + list(range(first))
    one_step += list(range(first + images, images + config.state_dim))
    columns = list(range(config.step_embed_dim))
    for step in range(config.n_obs_steps):
        columns += [config.step_embed_dim + step * len(one_step) + i for i in one_step]
    return columns


def official_normalizer(state_dict):
    """{"action": (scale, offset), ...} of an original checkpoint: normalised = raw * scale + offset."""
    prefix = "normalizer.params_dict."
    names = {k[len(prefix):].split(".")[0] for k in state_dict if k.startswith(prefix)}
    return {n: (state_dict[f"{prefix}{n}.scale"], state_dict[f"{prefix}{n}.offset"]) for n in sorted(names)}


Model = DiffusionPolicyCNN

PRESETS = {
    # learns the built-in task in minutes on two CPU cores
    "tiny": {},
    "tiny_image": {"obs": "image", "resnet_widths": (16, 32, 64, 128),
                   "n_keypoints": 16, "crop_size": (56, 56)},
    # Push-T from keypoints: 65,783,298 parameters
    "lowdim": {"down_dims": (256, 512, 1024), "step_embed_dim": 256, "sampler": "ddpm", "sampler_steps": 100,
               "action_dim": 2, "state_dim": 20},
    # Push-T from images: 251,511,938 + 11,197,088 in the encoder
    "image": {"down_dims": (512, 1024, 2048), "step_embed_dim": 128, "sampler": "ddpm", "sampler_steps": 100,
              "obs": "image", "action_dim": 2, "state_dim": 2, "n_cameras": 1, "image_size": (96, 96),
              "crop_size": (84, 84)},
}

# What train.py takes for these presets unless it is told otherwise.
RECIPES = {
    "tiny": {"steps": 3000, "batch_size": 128, "lr": 1e-3, "ema_max": 0.999, "eval_every": 500},
    "tiny_image": {"steps": 2000, "batch_size": 64, "lr": 1e-3, "ema_max": 0.999, "eval_every": 500},
    "lowdim": {"steps": 220_000, "batch_size": 256, "lr": 1e-4, "warmup": 500},
    "image": {"steps": 500_000, "batch_size": 64, "lr": 1e-4, "warmup": 500},
}


# ----------------------------------------------------------------------------------------------------------


def obstacle_paths(n, generator):
    """n paths of 16 points from a given start to (1, 0) that pass an obstacle at the origin on either side
    with equal odds: state (n, 2, 2), the start twice, and actions (n, 16, 2)."""
    start = torch.stack([torch.full((n,), -1.0), torch.rand(n, generator=generator) * 0.6 - 0.3], dim=-1)
    side = torch.randint(2, (n, 1), generator=generator) * 2 - 1
    s = torch.linspace(0, 1, 16)
    y = (1 - s) * start[:, 1:] + 0.7 * side * torch.sin(math.pi * s)
    actions = torch.stack([(2 * s - 1).expand(n, -1), y], dim=-1)
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
