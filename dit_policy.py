"""DiT-block policy: a diffusion transformer for robots whose blocks start as the identity.

    Sudeep Dasari, Oier Mees, Sebastian Zhao, Mohan Kumar Srirama, Sergey Levine: "The Ingredients for Robotic
    Diffusion Transformers", arXiv:2410.10088
    official code: github.com/SudeepDasari/dit-policy

p(A | O): a chunk A of Tp actions, given O = (images, instruction, proprioception). The joint p(A, O) would
have to predict images too; as a condition, O is encoded once per chunk. The diffusion is that of dp_cnn.py.
A ResNet-18 per camera turns images into tokens; the instruction modulates its features. A transformer encoder
reads these tokens and one of the proprioception. A decoder of DiT blocks denoises the actions: block i sees
the mean of layer i's output, no more. With cross-attention instead, the authors measured fewer successes.

    images -> ResNet-18 (FiLM: text) -> tokens ----+-> layer 1 --> layer 2 --> ... --> layer L
    proprioception -> dropout -> linear -> token --+     |mean       |mean               |mean
                                                         v + e(t)    v + e(t)            v + e(t)
    noised actions x_t -> MLP + positions ----------> block 1 --> block 2 --> ... --> block L --> final layer

Axes: B items, n draws of noise per item, N observation tokens, D width, L layers, A action dimensions (in
p(A | O): the chunk), S numbers of proprioception, V cameras, C channels of an image token; Tp, To, Ta: below.
Time of the diffusion, t: 0 is the least noised of K levels (one step of noise, not clean data), K-1 is noise.
Time of the robot, here with To = 2 (among the tokens the newest image comes first):
    step        now-1  now  now+1 ... now+7 ... now+15
    observed      x     x
    predicted           x     x   x     x    x    x       Tp = 16 (x0 below)
    executed            x     x   x     x                 Ta = 8, then look again and re-plan

    [1]  alpha_bar_t = f((t+1)/K) / f(0),  f(u) = cos^2((u + 0.008) / 1.008 * pi/2),
         with each beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} cut to at most 0.999                   schedule
    [2]  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                     noising
    [3]  loss = mean (eps - eps_theta(O, x_t, t))^2,   t uniform in 0..K-1
    [4]  x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t), clipped to [-1, 1]
    [5]  x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s) eps_theta,   s < t                   DDIM step
    [6]  encoder layer (post-norm):  h = LN(h + Attention(q = k = h + positions, v = h)),  h = LN(h + MLP(h))
    [7]  c_i = mean over tokens of h_i + e(t),   e(t) = MLP([cos, sin](t w)),   w: 1 down to 1/10000
    [8]  adaLN(x) = scale(c) * LN(x) + shift(c), both linear in SiLU(c). DiT has 1 + scale
    [9]  x += gate(c) * Attention(adaLN(x)),  x += gate'(c) * MLP(adaLN'(x));  gates 0 at first: the identity
    [10] out = W (scale(c_L) * x + shift(c_L)) + b,   without a norm, and not zero at first
    [11] FiLM in each residual block of a ResNet:  h = (1 + scale(text)) * h + shift(text), both zero at first

Map: Config | attention, EncoderLayer, DiTBlock, NoiseNet | FilmBlock, FilmResNet, ImageEncoder, TextEncoder |
DiTPolicy: loss, sample, from_official | PRESETS | main.

Differs from the original:
 1. The loss is a mean over the chunk's real steps. The original sums over the chunk: Tp times as much.
 2. The original code reads no instruction. The paper puts a DistilBERT embedding into the ResNets by FiLM;
    here it may be given (text_dim), or n-gram detectors, trained with the rest, read the bytes.
 3. The ResNets start from scratch, as torchvision initialises them. The original starts from weights trained
    on images: ImageNet's, or its authors' own.
 4. Not carried over: a goal image, frames stacked as channels (early_fusion), batch norm over features.
 5. With crop_size, training images are cropped at random. They are not blurred or resized.
 6. Frequencies and positions are computed; the original keeps them among the weights, as constants.
 7. The sampler computes the modulation of all steps and blocks before its loop. An observation is encoded
    once for several draws of noise and time (n_draws).
 8. train.py normalises proprioception too; the original takes it as it is.
 9. "tiny" is the published architecture, smaller, with fewer ResNet stages, less dropout and x0 prediction,
    since eps prediction is slow to learn at this scale.

Run alone: `python dit_policy.py` learns to draw half circles and shows them forming out of noise, in half a
minute on two CPU cores.
"""
import copy
import functools
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # -- the data; train.py fills these in. In brackets, here and below: the official names
    action_dim: int = 3  # A, length of one action vector
    state_dim: int = 3  # S, length of the proprioception
    n_cameras: int = 2  # V, each with an encoder of its own; 0 = low-dimensional observations only
    image_size: tuple = (64, 64)  # height, width of every camera image, pixels
    obs: str = "image"  # "image": cameras and proprioception are loaded; "lowdim": all float observations
    # -- the timeline (picture above), in control steps
    horizon: int = 16  # Tp, predicted steps (ac_chunk)
    n_obs_steps: int = 1  # To: images of all these steps, proprioception of the newest (imgs_per_cam)
    n_action_steps: int = 8  # Ta, executed steps
    train_on_padding: bool = False  # learn from actions past an episode's end too, see `loss`
    # -- the instruction
    text_len: int = 40  # longest one in bytes; 0 = none is read, as in the official code
    text_dim: int = 0  # 0: bytes; else the length of batch["text_embedding"] (DistilBERT's: 768)
    text_width: int = 64  # numbers that FiLM receives
    # -- the image encoders
    resnet_widths: tuple = (16, 32, 64)  # channels per stage; 64, 128, 256, 512 is ResNet-18
    n_groups: int = 4  # groups of their group norms
    crop_size: tuple = ()  # height, width: random in training, centre in evaluation; () = the whole image
    pool: bool = False  # True: an image is one token, its mean; False: one per cell of the last feature map
    share_encoder: bool = False  # True: all cameras share one (share_cam_features)
    # -- how proprioception enters
    proprioception: str = "token"  # a "token", a "pad" beside each image token, or "none" (use_obs)
    state_dropout: float = 0.2  # probability of dropping each of its numbers in training
    # -- the transformers
    token_norm: bool = False  # True: tokens pass a layer norm first (feat_norm)
    token_dropout: float = 0.0  # of what enters the encoder
    width: int = 128  # D (hidden_dim)
    depth: int = 4  # L, layers of the encoder and blocks of the decoder (num_blocks)
    n_heads: int = 4  # heads of every attention (nhead)
    mlp: int = 256  # hidden width of the MLPs (dim_feedforward)
    time_dim: int = 128  # numbers in the sinusoids of t
    dropout: float = 0.0  # of attention weights, inside the MLPs and of every branch before it is added
    # -- the diffusion
    n_diffusion_steps: int = 100  # K, noise levels in training
    prediction_type: str = "x0"  # what the network predicts: "eps" (the original) or "x0"
    n_draws: int = 4  # draws of noise and time per observation
    sampler_steps: int = 8  # noise levels visited when sampling; at most K
    spacing: str = "leading"  # "leading" (the original) may start below K-1; "trailing" starts at it
    clip_x0: float = 1.0  # [4], 0 = none; 1 fits actions normalised to [-1, 1], train.py's default

    first_action = 0  # the chunk's first step, counted from now
    pred_horizon = property(lambda self: self.horizon)  # actions in a batch and in a sampled chunk
    n_obs_loaded = property(lambda self: self.n_obs_steps)  # observed steps in a training batch
    reads_text = property(lambda self: self.text_len > 0 or self.text_dim > 0)

    def __post_init__(self):
        check_choice("obs", self.obs, ("lowdim", "image"))
        check_choice("prediction_type", self.prediction_type, ("eps", "x0"))
        check_choice("proprioception", self.proprioception, ("token", "pad", "none"))
        check_choice("spacing", self.spacing, ("leading", "trailing"))
        check_at_least(self, 0, "n_cameras", "text_len", "text_dim", "clip_x0")
        check_at_least(self, 1, "action_dim", "state_dim", "image_size", "horizon", "n_obs_steps",
                       "n_action_steps", "text_width", "resnet_widths", "n_groups", "crop_size", "width",
                       "depth", "n_heads", "mlp", "n_diffusion_steps", "n_draws")
        if self.n_action_steps > self.horizon:
            raise ValueError(f"n_action_steps {self.n_action_steps} must lie in 1..horizon = {self.horizon}")
        if self.width % self.n_heads or self.width % 2:
            raise ValueError(f"width {self.width} must be even and a multiple of n_heads = {self.n_heads}")
        if self.time_dim % 2 or not self.time_dim >= 4:
            raise ValueError(f"time_dim {self.time_dim} must be even and at least 4: sines and cosines")
        if not self.n_cameras and (self.reads_text or self.proprioception != "token"):
            raise ValueError("no cameras: set text_len=0, text_dim=0, proprioception='token', the only token")
        if not self.resnet_widths or any(width % self.n_groups for width in self.resnet_widths):
            raise ValueError(f"resnet_widths {self.resnet_widths}: one or more are needed, all "
                             f"multiples of n_groups = {self.n_groups}")
        if len(self.image_size) != 2 or len(self.crop_size) not in (0, 2):
            raise ValueError(f"image_size {self.image_size} and crop_size {self.crop_size} are two numbers "
                             f"each, height and width; crop_size may be ()")
        if self.crop_size and any(c > s for c, s in zip(self.crop_size, self.image_size)):
            raise ValueError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}")
        for name in ("state_dropout", "token_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1)")
        timetable(self.n_diffusion_steps, self.sampler_steps, self.spacing)

    def encode_text(self, text):
        """An instruction as codes, int64 (text_len,), 0 = padding: its UTF-8 bytes + 1."""
        codes = [byte + 1 for byte in text.encode()]
        if len(codes) > self.text_len:
            raise ValueError(f"the instruction {text!r} has {len(codes)} codes, more than text_len "
                             f"{self.text_len}: shorten it or raise text_len")
        return torch.tensor(codes + [0] * (self.text_len - len(codes)))


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(map(str, choices))}")


def check_at_least(config, least, *fields):
    """Each of these fields, or every number of it if it is a tuple, is at least `least`."""
    for field in fields:
        value = getattr(config, field)
        if not all(x >= least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} {value} must be at least {least}")


# ---------------------------------------------------------------- noise network: encoder and DiT blocks
def attention(q, k, v, dropout=0.0):
    """softmax(q k' / sqrt(d)) v over the last two axes: (..., N, d) -> (..., N, d). It differs from pi0.py's:
    nothing is masked, and weights may be dropped."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # On a CPU the fused kernel takes two to eight times as long as this in bfloat16.
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)
    return F.dropout(weights, dropout) @ v


class SelfAttention(nn.Module):
    """Multi-head attention, no mask. (B, N, D) -> (B, N, D). It differs from dp_transformer.py's: queries and
    keys see the positions, if any are given; values do not."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.in_proj = nn.Linear(config.width, 3 * config.width)  # rows: queries, keys, values
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x, positions=None):
        if positions is None:
            q, k, v = self.in_proj(x).chunk(3, dim=-1)                          # (B, N, D) each
        else:
            D = x.shape[-1]
            (w_qk, w_v), (b_qk, b_v) = (p.split([2 * D, D]) for p in self.in_proj.parameters())
            q, k = F.linear(x + positions, w_qk, b_qk).chunk(2, dim=-1)
            v = F.linear(x, w_v, b_v)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, N, d)
        x = attention(q, k, v, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """(..., D) -> (..., D). It differs from the networks of this name in ddpm.py and flow_matching.py."""

    def __init__(self, config):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.width, config.mlp), nn.Linear(config.mlp, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh")))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer, as in the original. (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = SelfAttention(config), MLP(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions):
        x = self.norm1(x + self.dropout(self.attn(x, positions)))               # [6]
        return self.norm2(x + self.dropout(self.mlp(x)))                        # [6]


def modulate(x, shift, scale):
    """x (B, Tp, D), shift and scale (B, D). It differs from dit.py's, which has 1 + scale. Here the scale
    starts as random, since zero would silence the branch."""
    return x * scale[:, None] + shift[:, None]                                  # [8] [10]


class DiTBlock(EncoderLayer):
    """adaLN-Zero block [9] of the same parts. (B, Tp, D) and what `prepare` returns -> (B, Tp, D)."""

    def __init__(self, config):
        super().__init__(config)
        self.modulation = nn.ModuleList([nn.Linear(config.width, config.width) for _ in range(6)])

    def prepare(self, c):
        """SiLU of c_i [7], (..., D) -> six (..., D): all that block i takes from observation and t."""
        return [linear(c) for linear in self.modulation]                        # [8]

    def forward(self, x, modulation):
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation               # (B, D) each
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.dropout(self.attn(h))                     # [9]
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2[:, None] * self.dropout(self.mlp(h))                   # [9]


def position_table(n, dim, device=None):
    """Fixed positions of n tokens [6], (n, dim). It differs from rdt.py's: sine and cosine in turn."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000) / dim))
    angle = torch.arange(n, device=device)[:, None] * frequency                 # (n, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def time_embedding(t, dim):
    """Sinusoids of the diffusion step, (...,) -> (..., dim). It differs from ddpm.py's: cosines first, and
    the exponent runs to 1 (half - 1 in the denominator)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                        # [7]


class NoiseNet(nn.Module):
    """Observation tokens, noised chunk and t -> eps or x0. `encode` and `condition` do all that needs no x_t,
    `forward` the rest. Official: _DiTNoiseNet."""

    def __init__(self, config):
        super().__init__()
        A, D = config.action_dim, config.width
        self.time_dim = config.time_dim
        self.positions = nn.Parameter(torch.empty(config.horizon, D))
        self.time_mlp = nn.Sequential(nn.Linear(config.time_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.action_mlp = nn.Sequential(nn.Linear(A, A), nn.GELU(approximate="tanh"), nn.Linear(A, D))
        self.encoder = nn.ModuleList([EncoderLayer(config) for _ in range(config.depth)])
        self.decoder = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_modulation = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, A)
        self.init_weights()

    def init_weights(self):
        """As the original. What is not named here starts as torch's default, the final layer too. The gates'
        zeros come last, so that nothing undoes them."""
        for layer in [*self.encoder, *self.decoder]:
            for p in layer.parameters():
                if p.ndim > 1:
                    nn.init.xavier_uniform_(p)
            nn.init.zeros_(layer.attn.in_proj.bias)
            nn.init.zeros_(layer.attn.out_proj.bias)
        nn.init.xavier_uniform_(self.positions[:, None])  # as (Tp, 1, D), like the original: smaller numbers
        for block in self.decoder:
            for linear in block.modulation:
                nn.init.zeros_(linear.bias)
            for gate in (block.modulation[2], block.modulation[5]):  # order: see DiTBlock.forward
                nn.init.zeros_(gate.weight)                                     # [9]

    def encode(self, tokens):
        """Observation tokens (B, N, D) -> the output of every layer, L x (B, N, D)."""
        positions = position_table(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens.dtype)
        outputs = []
        for layer in self.encoder:
            tokens = layer(tokens, positions)
            outputs.append(tokens)
        return outputs

    def condition(self, summaries, t):
        """Means of the layers' outputs, L x (B, D), and t (B,) or (levels, 1) -> six (B, D) or (levels, B, D)
        per block; then shift and scale of the final layer."""
        e = self.time_mlp(time_embedding(t, self.time_dim).to(self.out.weight.dtype))
        c = [F.silu(summary + e) for summary in summaries]                      # [7]
        final = self.final_modulation(c[-1]).chunk(2, dim=-1)
        return [block.prepare(c_i) for block, c_i in zip(self.decoder, c)] + [final]

    def forward(self, x_t, condition):
        x = self.action_mlp(x_t.to(self.out.weight.dtype)) + self.positions     # (B, Tp, D)
        for block, modulation in zip(self.decoder, condition):
            x = block(x, modulation)
        return self.out(modulate(x, *condition[-1])).float()                    # (B, Tp, A)


# ---------------------------------------------------------------- observation: images and text to tokens
class FilmBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions; FiLM by the text acts on the residual branch. (B, dim_in, H, W)
    -> (B, dim_out, H/stride, W/stride)."""

    def __init__(self, dim_in, dim_out, stride, n_groups, text_width):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(n_groups, dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(n_groups, dim_out)
        self.film = nn.Linear(text_width, 2 * dim_out) if text_width else None
        self.shortcut = nn.Identity() if stride == 1 and dim_in == dim_out else nn.Sequential(
            nn.Conv2d(dim_in, dim_out, 1, stride, bias=False), nn.GroupNorm(n_groups, dim_out))

    def forward(self, x, text=None):
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if self.film is not None:
            scale, shift = self.film(text)[..., None, None].chunk(2, dim=1)     # (B, dim_out, 1, 1)
            h = (1 + scale) * h + shift                                         # [11]
        return F.relu(h + self.shortcut(x))


class FilmResNet(nn.Module):
    """ResNet-18 up to its last feature map. (B, 3, H, W), text (B, text_width) -> (B, C, H/32, W/32), rounded
    up; H/16 with three stages. Group norm, since batch norm's running statistics would belong to the last
    weights and not to their average (EMA)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.resnet_widths, config.n_groups
        text_width = config.text_width if config.reads_text else 0
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.stages = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(zip((widths[0],) + tuple(widths), widths)):
            first = FilmBlock(dim_in, dim_out, 1 if i == 0 else 2, groups, text_width)
            self.stages.append(nn.ModuleList([first, FilmBlock(dim_out, dim_out, 1, groups, text_width)]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision does; torch's own start is 2.4 times smaller
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, FilmBlock) and module.film is not None:
                nn.init.zeros_(module.film.weight)                              # [11]
                nn.init.zeros_(module.film.bias)

    def forward(self, x, text=None):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            for block in stage:
                x = block(x, text)
        return x


@functools.lru_cache
def imagenet(device):
    """Mean and deviation of ImageNet's images in [0, 1], (3, 1, 1) each, with which the original normalises.
    Cached for the same reason as cosine_alpha_bar."""
    numbers = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device="cpu")
    return numbers[..., None, None].to(device).unbind()


class ImageEncoder(nn.Module):
    """One camera: crop, normalise bytes (not floats), ResNet; a token is a cell of its last feature map.
    (B, 3, H, W), text -> (B, cells, C). It differs from dp_cnn.py's: tokens, not keypoints, and text."""

    def __init__(self, config):
        super().__init__()
        self.crop_size, self.pool = config.crop_size, config.pool
        self.resnet = FilmResNet(config)

    def crop(self, x):
        """A random place per image in training, the centre in evaluation."""
        if not self.crop_size:
            return x
        (B, _, H, W), (h, w) = x.shape, self.crop_size
        if not self.training:
            top, left = round((H - h) / 2), round((W - w) / 2)  # halves to even, as torchvision's centre crop
            return x[:, :, top:top + h, left:left + w]
        rows = torch.randint(H - h + 1, (B, 1), device=x.device) + torch.arange(h, device=x.device)  # (B, h)
        cols = torch.randint(W - w + 1, (B, 1), device=x.device) + torch.arange(w, device=x.device)  # (B, w)
        image = torch.arange(B, device=x.device)[:, None, None]
        return x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

    def forward(self, x, text=None):
        x = self.crop(x)                                                        # (B, 3, h, w)
        if not x.is_floating_point():
            mean, std = imagenet(x.device)
            x = (x / 255 - mean) / std
        x = x.to(self.resnet.conv1.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
        x = self.resnet(x, text)                                                # (B, C, h/32, w/32)
        x = x.mean((2, 3), keepdim=True) if self.pool else x
        return x.flatten(2).transpose(1, 2)                                     # (B, cells, C)


class TextEncoder(nn.Module):
    """Codes (B, text_len), 0 = padding -> (B, text_width). Each learned detector of five bytes gives its
    largest response, so that a colour's name counts as much in a long sentence as in a short one."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.conv = nn.Conv1d(width, width, 5, padding=2)
        self.out = nn.Linear(width, width)

    def forward(self, text):
        real = (text > 0)[..., None]                                            # (B, text_len, 1)
        x = self.embed(text) * real  # zeros, as the convolution sees beyond the end
        x = F.relu(self.conv(x.mT).mT) * real  # never below 0: a masked place cannot be the largest
        return self.out(x.amax(1))


# ---------------------------------------------------------------- the policy: loss and sampler
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
def alpha_bar_numbers(K):
    """The same as Python numbers: a sampler does not wait for the device, torch.compile sees constants."""
    return cosine_alpha_bar(K, "cpu").tolist()


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


class DiTPolicy(nn.Module):
    """The policy: encoders of images and text, a noise network, and the diffusion around them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, S, D = config.resnet_widths[-1], config.state_dim, config.width
        if config.reads_text:
            width = config.text_width
            self.text = nn.Linear(config.text_dim, width) if config.text_dim else TextEncoder(width)
        n_encoders = min(config.n_cameras, 1) if config.share_encoder else config.n_cameras
        encoder = ImageEncoder(config)          # one initialisation for all cameras, as in the original
        self.encoders = nn.ModuleList([copy.deepcopy(encoder) for _ in range(n_encoders)])
        if config.proprioception == "token":
            self.state_token = nn.Linear(S, C)
        channels = C + S if config.proprioception == "pad" else C
        self.token_proj = nn.Linear(channels, D) if channels != D else nn.Identity()
        self.token_norm = nn.LayerNorm(D) if config.token_norm else nn.Identity()
        self.noise_net = NoiseNet(config)

    def text_vector(self, batch):
        """What FiLM receives, (B, text_width), or None if no text is read."""
        if not self.config.reads_text:
            return None
        size, key = self.config.text_dim, "text_embedding" if self.config.text_dim else "text"
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}, which text_dim = {size} and text_len = "
                             f"{self.config.text_len} ask for; set both to 0 to read no instruction")
        text = batch[key]
        if size and text.shape[1:] != (size,):
            raise ValueError(f"text_embedding has shape {tuple(text.shape[1:])} per item, text_dim is {size}")
        return self.text(text.to(self.text.weight.dtype) if size else text)

    def tokens(self, batch):
        """Observation tokens (B, N, D): camera by camera, the newest image first, and proprioception last."""
        config = self.config
        state = batch["state"][:, -1].to(self.noise_net.out.weight.dtype)       # (B, S)
        tokens = []
        if config.n_cameras:
            images = batch["images"]                                            # (B, To, V, 3, H, W)
            B, To, V = images.shape[:3]
            if (To, V) != (config.n_obs_steps, config.n_cameras):
                raise ValueError(f"images of {To} steps and {V} cameras given, n_obs_steps = "
                                 f"{config.n_obs_steps} and n_cameras = {config.n_cameras} expected")
            text = self.text_vector(batch)
            text = None if text is None else text.repeat_interleave(To, dim=0)  # (B To, text_width)
            encoders = [self.encoders[0]] * V if config.share_encoder else self.encoders
            for camera, encoder in enumerate(encoders):
                cells = encoder(images[:, :, camera].flip(1).flatten(0, 1), text)  # (B To, cells, C)
                tokens.append(cells.unflatten(0, (B, To)).flatten(1, 2))
        state = F.dropout(state, config.state_dropout, self.training)
        if config.proprioception == "token":
            tokens.append(self.state_token(state)[:, None])                     # (B, 1, C)
        tokens = torch.cat(tokens, dim=1)                                       # (B, N, C)
        if config.proprioception == "pad":
            tokens = torch.cat([state[:, None].expand(-1, tokens.shape[1], -1), tokens], dim=2)
        tokens = self.token_norm(self.token_proj(tokens))                       # (B, N, D)
        return F.dropout(tokens, config.token_dropout, self.training)

    def encode(self, batch):
        """All that depends on the observation alone: the mean of every encoder layer's output, L x (B, D)."""
        return [h.mean(1) for h in self.noise_net.encode(self.tokens(batch))]   # [7]

    def loss(self, batch, noise=None, t=None):
        """Mean squared error of the predicted noise (or chunk) over all steps of the batch that are real.
        batch: actions (B, Tp, A), action_mask (B, Tp), state (B, To, S), images (B, To, V, 3, H, W) and text
        (B, text_len) where they are read. noise (n B, Tp, A) and t (n B,), all items once, then again, are
        drawn if not given. Time: t = 0 is almost data, t = K-1 noise. per_sample is each item's own mean.
        -> {"loss": (), "per_sample": (n B,), "t": (n B,) in [0, 1]}"""
        x0, mask = batch["actions"], batch["action_mask"]                       # (B, Tp, A), (B, Tp)
        if x0.shape[1:] != (self.config.horizon, self.config.action_dim):
            raise ValueError(f"actions of shape {tuple(x0.shape[1:])} per item given, horizon and action_dim "
                             f"are {self.config.horizon} and {self.config.action_dim}")
        # The mask is False past an episode's end, where the data repeat the last action. Learning from the
        # repeats makes the policy stay where the episode ended; the original leaves them out.
        mask = torch.ones_like(mask) if self.config.train_on_padding else mask
        n = self.config.n_draws if noise is None else len(noise) // len(x0)
        x0, mask = x0.repeat(n, 1, 1), mask.repeat(n, 1)
        K = self.config.n_diffusion_steps
        noise = torch.randn_like(x0) if noise is None else noise
        t = torch.randint(K, (len(x0),), device=x0.device) if t is None else t
        alpha_bar = cosine_alpha_bar(K, x0.device)[t][:, None, None]            # (n B, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise            # [2]
        summaries = [h.repeat(n, 1) for h in self.encode(batch)]                # L x (n B, D)
        pred = self.noise_net(x_t, self.noise_net.condition(summaries, t))      # (n B, Tp, A)
        target = noise if self.config.prediction_type == "eps" else x0
        error = ((pred - target) ** 2).mean(-1) * mask                          # (n B, Tp)
        loss = error.sum() / mask.sum()                                         # [3]
        per_sample = error.detach().sum(1) / mask.sum(1).clamp(min=1)
        return {"loss": loss, "per_sample": per_sample, "t": t / max(K - 1, 1)}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, guide=None):
        """Draw one chunk per observation: (B, Tp, A), normalised units; the policy executes the first Ta.
        batch: state, images, text as in `loss`. steps: how many noise levels to visit, or a list of them,
        default config.sampler_steps. noise (B, Tp, A): where to start, drawn from `generator` if not given.
        trace: receives (B, Tp, A) after every step. Steps are deterministic: all chance is in the noise.
        guide: for real-time chunking. guide(net, alpha, sigma, kind) returns what is called in place of the
        network net(x_t) of a step; x_t = alpha x0 + sigma eps, and kind says what net gives: "x0", "eps" or
        "v" = eps - x0."""
        config, K = self.config, self.config.n_diffusion_steps
        levels = timetable(K, config.sampler_steps if steps is None else steps, config.spacing)
        alpha_bars = alpha_bar_numbers(K)
        summaries = self.encode(batch)                                          # L x (B, D)
        shape, device = (len(summaries[0]), config.horizon, config.action_dim), summaries[0].device
        x_t = randn(shape, generator, device) if noise is None else noise.float()
        # All that does not depend on x_t, for all levels at once, (levels, B, D) each. t is filled in number
        # by number, since a tensor made of a list would be copied from the host.
        t = torch.stack([torch.full((1,), level, device=device) for level in levels])
        condition = self.noise_net.condition(summaries, t)
        visited = [*(alpha_bars[level] for level in levels), 1.0]  # after the last level: clean data
        for i, (alpha_bar, alpha_bar_s) in enumerate(zip(visited, visited[1:])):
            net = lambda x: self.noise_net(x, [[m[i] for m in modulation] for modulation in condition])
            if guide is not None:
                net = guide(net, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), config.prediction_type)
            out = net(x_t)                                                      # (B, Tp, A)
            if config.prediction_type == "eps":
                eps, x0 = out, (x_t - math.sqrt(1 - alpha_bar) * out) / math.sqrt(alpha_bar)  # [4]
            else:
                eps, x0 = (x_t - math.sqrt(alpha_bar) * out) / math.sqrt(1 - alpha_bar), out
            if config.clip_x0:
                # Actions lie within; at noisy levels the division enlarges errors of eps. eps itself is kept.
                x0 = x0.clamp(-config.clip_x0, config.clip_x0)                  # [4]
            x_t = math.sqrt(alpha_bar_s) * x0 + math.sqrt(1 - alpha_bar_s) * eps  # [5]
            if trace is not None:
                trace.append(x_t)
        return x_t

    def param_groups(self, weight_decay):
        """The original decays every parameter alike."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    @classmethod
    def from_official(cls, state_dict, config):
        """A policy with the weights of a file that the original's trainer has saved, or of its model alone.
        config must describe it (PRESETS["droid"], PRESETS["aloha"]). Strict: see load_strictly."""
        with torch.device("meta"):
            model = cls(config)
        load_strictly(model, convert_official(state_dict))
        return model.requires_grad_()


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


# Official names -> ours, applied in this order: image encoders (torchvision's ResNet), tokens, noise network.
RENAMES = [
    (r"^visual_features\._model\.", "encoders.0.resnet."),
    (r"^visual_features\.(\d+)\._model\.", r"encoders.\1.resnet."), (r"\.bn([12])\.", r".norm\1."),
    (r"\.downsample\.", ".shortcut."),
    (r"\.resnet\.layer([1-4])\.", lambda m: f".resnet.stages.{int(m[1]) - 1}."),
    (r"^_obs_proc\.1\.", "state_token."), (r"^post_proc\.0\.", "token_proj."),
    (r"^post_proc\.1\.", "token_norm."), (r"\.dec_pos$", ".positions"),
    (r"\.time_net\.out_net\.", ".time_mlp."), (r"\.ac_proj\.", ".action_mlp."),
    (r"\.(encoder|decoder)\.layers\.", r".\1."), (r"\.self_attn\.in_proj_", ".attn.in_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."), (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.attn_mod1\.scale\.", ".modulation.0."), (r"\.attn_mod1\.shift\.", ".modulation.1."),
    (r"\.attn_mod2\.scale\.", ".modulation.2."), (r"\.mlp_mod1\.scale\.", ".modulation.3."),
    (r"\.mlp_mod1\.shift\.", ".modulation.4."), (r"\.mlp_mod2\.scale\.", ".modulation.5."),
    (r"\.eps_out\.linear\.", ".out."), (r"\.eps_out\.adaLN_modulation\.1\.", ".final_modulation."),
]
CONSTANTS = re.compile(r"\.time_net\.w$|\.enc_pos\.pe$")  # frequencies of t, positions of the tokens


def convert_official(state_dict):
    """Rename the keys of an official state_dict (or of a part of it); positions lose an axis, constants go.
    What is renamed differs from file to file."""
    state_dict = state_dict.get("model", state_dict)  # the trainer's file: {model, optim, schedule, ..}
    weights = {}
    for key, value in state_dict.items():
        if CONSTANTS.search(key):
            continue
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        weights[key] = value.squeeze(1) if key.endswith(".positions") and value.ndim == 3 else value
    return weights


Model = DiTPolicy

PUBLISHED = {"n_obs_steps": 1, "horizon": 100, "n_action_steps": 100, "text_len": 0, "n_groups": 16,
             "image_size": (256, 256), "crop_size": (224, 224), "resnet_widths": (64, 128, 256, 512),
             "width": 512, "depth": 6, "n_heads": 8, "mlp": 2048, "time_dim": 256, "dropout": 0.1,
             "token_dropout": 0.1, "prediction_type": "eps", "n_draws": 1}
PRESETS = {
    "tiny": {},  # learns the built-in task from images and instruction on two CPU cores
    "droid": PUBLISHED | {"n_cameras": 1, "action_dim": 10, "state_dim": 7},  # 59,446,456 parameters
    "aloha": PUBLISHED | {"n_cameras": 3, "action_dim": 14, "state_dim": 14},  # 81,807,264 parameters
}
PUBLISHED_RECIPE = {"steps": 150_000, "batch_size": 150, "lr": 3e-4, "warmup": 2000, "betas": (0.95, 0.999),
                    "weight_decay": 1e-6, "ema_max": 0.0}
# ema_max: the policy that acts is an average of the weights over the run, which is less noisy than the last
# ones; its memory grows with the run, up to 1/(1 - ema_max) steps (ema_decay in train.py). dtype: on a CPU
# with instructions for it.
RECIPES = {
    "tiny": {"steps": 3000, "batch_size": 32, "lr": 1.5e-3, "warmup": 200, "clip": 1.0, "betas": (0.9, 0.95),
             "weight_decay": 1e-3, "ema_max": 0.995, "dtype": "bfloat16"},
    "droid": PUBLISHED_RECIPE, "aloha": PUBLISHED_RECIPE,  # trainer=bc_cos_sched, which averages no weights
}


# ---------------------------------------------------------------- demo
def half_circles(angle, side, steps=16):
    """Ways (n, steps, 2) from the angle (n,) of a circle to the opposite one: anticlockwise where side (n,)
    is 1, clockwise where it is -1."""
    turned = angle[:, None] + side[:, None] * math.pi * torch.linspace(0, 1, steps)
    return 0.8 * torch.stack([turned.cos(), turned.sin()], dim=-1)


def main(steps=500):
    """Train on half circles of both senses; print how they form out of noise."""
    torch.manual_seed(0)
    config = Config(obs="lowdim", n_cameras=0, text_len=0, action_dim=2, state_dim=2, state_dropout=0.0,
                    width=64, depth=2, mlp=128, time_dim=64, sampler_steps=10)
    model = DiTPolicy(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-6), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)

    def draw(n):
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        side = torch.randint(2, (n,), generator=generator) * 2.0 - 1
        chunk = half_circles(angle, side)
        return angle, {"state": chunk[:, None, 0], "actions": chunk,
                       "action_mask": torch.ones(chunk.shape[:2], dtype=torch.bool)}

    for step in range(steps):
        _, batch = draw(32)
        loss = model.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}")
    model.eval()
    angle, batch = draw(500)
    both = torch.stack([half_circles(angle, torch.full_like(angle, side)) for side in (-1, 1)])
    trace = []
    model.sample(batch, generator=generator, trace=trace)
    for k, x_t in enumerate(trace, 1):
        distance = (x_t - both).norm(dim=-1).mean(-1)                           # (2, 500)
        print(f"denoising step {k:2d}: {distance.amin(0).mean():.3f} from the nearer half circle")
    near = (distance.amin(0) < 0.1).float().mean().item()
    anticlockwise = (distance.argmin(0) == 1).float().mean().item()
    print(f"trajectories that are a half circle: {100 * near:.1f} % (expected: at least 95); anticlockwise: "
          f"{100 * anticlockwise:.0f} % (expected: about 50)")
    return near, anticlockwise


if __name__ == "__main__":
    main()
