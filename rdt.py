"""RDT: one diffusion transformer for many robots, two arms among them.

    Songming Liu, Lingxuan Wu, Bangguo Li, Hengkai Tan, Huayu Chen, Zhengyi Wang, Ke Xu, Hang Su, Jun Zhu:
    "RDT-1B: a Diffusion Foundation Model for Bimanual Manipulation", arXiv:2410.07864
    official code: github.com/thu-ml/RoboticsDiffusionTransformer

p(A | l, o): a chunk A of Tp actions, given an instruction l and o = (the pictures of the last To steps, the
robot's own state, or proprioception, its control frequency). Diffusion, as in ddpm.py: training mixes noise
into a chunk, to a level t, and a transformer over [t, frequency, state, noised actions] predicts the clean
chunk; sampling starts with noise alone and lowers t in a few steps, predicting anew in each. Language (a T5
encoder) and pictures (SigLIP) stand outside that sequence: hundreds or thousands of tokens, read by
cross-attention, in turn.

    block 0   [t, hz, s, a_1 .. a_Tp] <-> each other   then <- words of the instruction   then MLP
    block 1   [t, hz, s, a_1 .. a_Tp] <-> each other   then <- patches of the pictures    then MLP
    block 2   as block 0, block 3 as block 1, ...

Every robot's numbers have their place in one vector of 128 (table UNIFIED below), by physical meaning; a
mask says which of them a robot has. So robots with different arms, actions and rates share all weights.

Axes: B items, Tp predicted steps, To observed ones, V cameras, N tokens, D width, L text codes, A a robot's
dimensions of action, S of state, U = 128.
Time of the diffusion, t: 0 is the least noised of K levels (one step of noise), K - 1 is noise.
Time of the robot: pictures of now and before, state of now; the chunk starts now.

    [1]  alpha_bar_t = f((t+1)/K) / f(0),  f(u) = cos^2((u + 0.008) / 1.008 * pi/2),  beta_t cut at 0.999
    [2]  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                     noising
    [3]  loss = mean (x0_hat - x0)^2,   x0_hat = f_theta(l, o, x_t, t): the network predicts x0;        loss
         t = floor(K b), b ~ Beta(a, 1). Released: a = 1, t uniform in 0..K-1
    [4]  x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) X,   h = lambda_s - lambda_t,       DPM-Solver++
         lambda = log(alpha / sigma), alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar); 5 steps t -> s,
         s < t, the last to clean data: alpha_s = 1, sigma_s = 0
    [5]  X = x0_hat in the first and the last step, else x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)
    [6]  RMSNorm(x) = w x / sqrt(mean(x^2) + 1e-6);   released: w x / sqrt(var(x) + 1e-6)
    [7]  softmax(RMSNorm(q) RMSNorm(k)' / sqrt(d)) v                                                QK-norm
    [8]  x += self(norm(x));  x += cross(norm(x), c_i);  x += MLP(norm(x)),   three norms as in [6];
         c_i = language for even i, pictures for odd
    [9]  token of a state or an action = MLP([v, m]), v its 128 numbers, m the mask; MLP decoder at the end
    [10] Fourier features of the paper: sin, cos of 2^j pi v, j = 0..n-1, appended to v. Released: none
    [11] token of t and of the control frequency (Hz) = MLP(cos, sin of (value) 10000^(-i/128))
    [12] training hides each modality independently of the others, with probability 0.1 in the paper
    [13] T5: softmax(q k' + b(j - i)) v, b learned per head and bucket of the distance; no 1 / sqrt(d)

Map: Config | UNIFIED, slots | Siglip | T5Encoder | norms, attention, RDTBlock | DPM-Solver++ | RDT: loss,
sample, from_official | PRESETS | main.

Differs from the original:
 1. The released norms divide by the deviation around the mean, not by the root mean square: timm 1.0.3's
    mistake, which their weights rely on. Both are here, `norm` chooses.
 2. `masked` (tiny): dimensions that a robot lacks are 0 in the network's input and left out of the loss. The
    original feeds noise to all 128 and trains all 128. A sample has the robot's own in both.
 3. Steps past the end of an episode are left out of the loss; the original trains on a repeated last action.
 4. Keys and values of language and pictures are computed once per chunk, and once for n_draws draws of noise.
 5. A hidden state is 0, which is the data set's mean (as in the original) if it is normalised by mean and
    deviation. At an episode's start the older picture is the first one again, there the background.
 6. Colour jitter, image corruption and the exchange of instructions for paraphrases are left out.
 7. "tiny" is the published architecture with other numbers: sizes, bytes for text, initial weights that let
    attention choose and let content outweigh position, and diffusion times nearer to noise [3]. Its encoders
    learn with the rest: frozen, as published, they would have to know something beforehand, and frozen random
    ones would be a farce.

Run alone: `python rdt.py` trains two robots on one set of weights, in a quarter of a minute on two CPU cores.
"""
import difflib
import functools
import math
import re
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    # -- the data; train.py fills these in
    # "image": cameras and proprioception; "lowdim": a robot without cameras, which sees the background
    obs: str = "image"
    # A, length of one action vector
    action_dim: int = 3
    # length of the proprioception
    state_dim: int = 3
    # number of cameras, all through one encoder; released order: external, right wrist, left wrist
    n_cameras: int = 2
    # height, width of every camera image, pixels
    image_size: tuple = (64, 64)
    # -- the unified vector
    # U, its length
    unified_dim: int = 128
    # names in UNIFIED of the action's dimensions, in their order; () = actions come packed, with action_valid
    action_names: tuple = ("right_eef_pos_x", "right_eef_pos_y", "right_gripper_open")
    # ... and of the state's
    state_names: tuple = ("right_eef_pos_x", "right_eef_pos_y", "right_gripper_open")
    # -- the timeline, in control steps: the chunk starts now
    # Tp, predicted steps
    horizon: int = 16
    # To, steps whose pictures are seen
    n_obs_steps: int = 2
    # Ta, executed steps
    n_action_steps: int = 8
    # -- what the weights are made for
    # camera places; one that a robot lacks shows the background; 0 = as many as there are cameras
    max_cameras: int = 0
    # tokens of one picture; 0 = one per patch
    image_tokens: int = 0
    # L, longest instruction in codes; what is longer is cut
    text_len: int = 24
    # number of codes; 257 = bytes + 1, 0 is padding
    vocab_size: int = 257
    # SentencePiece model file of T5; "" = bytes
    tokenizer_path: str = ""
    # -- the encoders
    # "train": learn with the rest; "frozen": given weights stay; "none": batches bring embeddings
    encoders: str = "train"
    # SigLIP: side of the square that images are fitted into, pixels
    vit_size: int = 48
    # side of a patch, pixels
    patch_size: int = 12
    # width of its tokens
    vit_width: int = 128
    # ... layers
    vit_depth: int = 1
    # ... hidden width of the MLPs
    vit_mlp: int = 256
    # ... and heads
    vit_heads: int = 4
    # T5: width of its tokens
    t5_width: int = 96
    # ... layers
    t5_depth: int = 2
    # ... heads
    t5_heads: int = 4
    # ... width of a head
    t5_head_dim: int = 24
    # ... hidden width of the MLPs
    t5_mlp: int = 192
    # ... buckets of relative distance
    t5_buckets: int = 32
    # ... and the distance from which on all are alike, codes
    t5_distance: int = 128
    # -- the diffusion transformer
    # D, width
    width: int = 128
    # blocks: even ones read language, odd ones pictures
    depth: int = 4
    # heads of self- and cross-attention
    n_heads: int = 4
    # "true" | "released", see [6]
    norm: str = "true"
    # n, Fourier frequencies per input number [10]; 0 = as released
    n_fourier: int = 0
    # initial weight of the norms of queries and keys; more than 1: attention that starts focused
    qk_init: float = 1.75
    # factor on the adaptors' initial weights. Torch's own rule, 1, shrinks what a word or a patch says so far
    # that its position drowns it, and what a letter asks for in `main` is not learned
    adaptor_init: float = 2.4
    # factor on the initial positions, for the same reason; 1 = as released
    pos_init: float = 0.1
    # factor on the initial weights of SigLIP's patches and positions, as in pi0.py
    image_init: float = 5.0
    # -- training
    # True: keep to the dimensions that the robot has; False: as released (difference 2)
    masked: bool = True
    # draws of noise and time per observation
    n_draws: int = 1
    # a in [3]; 1: uniform, as released. More: practice near noise, where words and pictures alone can tell
    # which chunk is meant; where it shows through x_t it can be read off, which teaches nothing about them.
    # With 5, half of all t lie above 0.87 K and 1 % below 0.4 K, enough for the easy end
    time_alpha: float = 5.0
    # probability with which each modality is hidden in training (released: 0.1)
    mask_prob: float = 0.05
    # deviation of noise on the normalised state in training (released fine-tuning: 40 dB, 0.01)
    state_noise: float = 0.0
    # True: recompute every layer in the backward pass instead of keeping its activations
    checkpointing: bool = False
    # -- the diffusion
    # K, noise levels in training
    n_diffusion_steps: int = 1000
    # steps of DPM-Solver++
    sampler_steps: int = 5

    def __post_init__(self):
        check_choice("obs", self.obs, ("image", "lowdim"))
        check_choice("encoders", self.encoders, ("train", "frozen", "none"))
        check_choice("norm", self.norm, ("true", "released"))
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(f"n_action_steps {self.n_action_steps} must lie in 1..horizon = {self.horizon}")
        if self.n_obs_steps < 1:
            raise ValueError(f"n_obs_steps {self.n_obs_steps} must be at least 1")
        if 0 < self.max_cameras < self.n_cameras:
            raise ValueError(f"{self.n_cameras} cameras, but there is room for {self.max_cameras}: name "
                             "those to use in shape_meta, or raise max_cameras")
        for kind, dim in (("action", self.action_dim), ("state", self.state_dim)):
            names = getattr(self, f"{kind}_names")
            if len(names or range(self.unified_dim)) != dim:
                raise ValueError(
                    f"{kind}s have {dim} dimensions, {kind}_names names {len(names)}: name each as the table "
                    "UNIFIED of rdt.py does, in their order" if names else
                    f"packed {kind}s have unified_dim = {self.unified_dim} dimensions, not {dim}")
            slots(names)
        if max(slots(self.action_names + self.state_names, repeated=True), default=0) >= self.unified_dim:
            raise ValueError(f"unified_dim {self.unified_dim} has no room for the names given: use 128")
        if self.text_len < 1 or not self.tokenizer_path and self.vocab_size < 257 and self.encoders != "none":
            raise ValueError(f"text_len {self.text_len} must be at least 1, and vocab_size {self.vocab_size} "
                             "at least 257 for bytes")
        pairs = [("width", "n_heads")]
        pairs += [("vit_size", "patch_size"), ("vit_width", "vit_heads")] if self.encoders == "train" else []
        for name, part in pairs:
            a, b = getattr(self, name), getattr(self, part)
            if a % b:
                raise ValueError(f"{name} {a} must be a multiple of {part} {b}")
        if self.width % 4 or self.depth < 1:
            raise ValueError(f"width {self.width} must be a multiple of 4, depth {self.depth} at least 1")
        if self.n_draws < 1 or not 0 <= self.mask_prob < 1 or self.time_alpha <= 0:
            raise ValueError(f"n_draws {self.n_draws} must be at least 1, mask_prob {self.mask_prob} in "
                             f"[0, 1), time_alpha {self.time_alpha} above 0")
        check_solver_steps(self.sampler_steps, self.n_diffusion_steps)

    @property
    def pred_horizon(self):
        """Number of actions in a batch and in a sampled chunk."""
        return self.horizon

    @property
    def first_action(self):
        """Step of the chunk's first action, counted from now."""
        return 0

    @property
    def n_obs_loaded(self):
        """Observed steps in a training batch."""
        return self.n_obs_steps

    @property
    def tokens_per_image(self):
        return self.image_tokens or (self.vit_size // self.patch_size) ** 2

    @property
    def cameras(self):
        """Camera places, filled or not."""
        return self.max_cameras or max(1, self.n_cameras)

    def encode_text(self, text):
        """An instruction as codes, int64 (text_len,), 0 = padding: its UTF-8 bytes + 1, or the pieces of
        tokenizer_path and T5's end mark. What is too long is cut, which is said once."""
        if self.tokenizer_path:
            codes = tokenizer(self.tokenizer_path).encode(text) + [1]
        else:
            codes = [byte + 1 for byte in text.encode()]
        if len(codes) > self.text_len:
            say_once(f"an instruction has {len(codes)} codes and is cut to text_len = {self.text_len}: "
                     f"{text!r}")
            codes = codes[:self.text_len]
        return torch.tensor(codes + [0] * (self.text_len - len(codes)))


@functools.lru_cache
def tokenizer(path):
    try:
        import sentencepiece
    except ImportError:
        raise ValueError("tokenizer_path needs a package: pip install sentencepiece") from None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"tokenizer_path {path} cannot be read ({' '.join(str(e).split())})") from None


@functools.lru_cache
def say_once(note):
    print(f"note: {note}", file=sys.stderr)


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(choices)}")


def check_solver_steps(steps, n_diffusion_steps):
    if not 1 <= steps < n_diffusion_steps:
        raise ValueError(f"sampler steps {steps} must lie in 1..{n_diffusion_steps - 1}, below "
                         f"n_diffusion_steps")


# ----------------------------------------------------------------------------------------------------------
# The unified vector. Units: m, rad, m/s, rad/s; grippers 0 closed .. 1 open. The angles are six numbers: the
# first two columns of the rotation matrix, one after the other. What has no name is reserved.

ARM = {"arm_joint_{}_pos": (0, range(10)), "gripper_joint_{}_pos": (10, range(5)), "gripper_open": (10, [""]),
       "arm_joint_{}_vel": (15, range(10)), "gripper_joint_{}_vel": (25, range(5)),
       "gripper_open_vel": (25, [""]), "eef_pos_{}": (30, "xyz"), "eef_angle_{}": (33, range(6)),
       "eef_vel_{}": (39, "xyz"), "eef_angular_vel_{}": (42, ["roll", "pitch", "yaw"])}
# {name: place}. A single arm is the right one, so names without a side are the right arm's.
UNIFIED = {side + pattern.format(part): base + first + i
           for side, base in (("", 0), ("right_", 0), ("left_", 50))
           for pattern, (first, parts) in ARM.items() for i, part in enumerate(parts)}
UNIFIED |= {"base_vel_x": 100, "base_vel_y": 101, "base_angular_vel": 102}


def slots(names, repeated=False):
    """Places of these names in the unified vector. ValueError for a name that is not in the table, and for
    two names of one place."""
    for name in names:
        if name not in UNIFIED:
            close = difflib.get_close_matches(str(name), UNIFIED, 1)
            raise ValueError(f"{name!r} is no name of the unified action vector"
                             + (f", did you mean {close[0]!r}?" if close else "; see UNIFIED in rdt.py"))
    places = [UNIFIED[name] for name in names]
    if len(set(places)) < len(places) and not repeated:
        twice = next(n for n, p in zip(names, places) if places.count(p) > 1)
        raise ValueError(f"{twice!r} shares place {UNIFIED[twice]} of the unified vector with another name: "
                         "give each dimension a place of its own")
    return places


def pack(x, places, dim=128):
    """(..., A) -> (..., dim): every number to its place, 0 elsewhere."""
    return x.new_zeros(*x.shape[:-1], dim).index_copy(-1, torch.tensor(places, device=x.device), x)


def unpack(x, places):
    """(..., dim) -> (..., A): the inverse of `pack`."""
    return x.index_select(-1, torch.tensor(places, device=x.device))


# ----------------------------------------------------------------------------------------------------------
# SigLIP: a vision transformer; every patch of a picture becomes a token

BACKGROUND = 127  # SigLIP's mean colour, 0..255: what a missing or hidden picture shows


def fit_square(images, size):
    """Images (B, 3, H, W), 0..255 -> (B, 3, size, size) in [-1, 1]: padded to a square with the background,
    then resized as SigLIP's own preprocessing does (bicubic, antialiased)."""
    H, W = images.shape[-2:]
    top, left = max(0, W - H) // 2, max(0, H - W) // 2
    images = F.pad(images, (left, max(0, H - W) - left, top, max(0, W - H) - top), value=BACKGROUND)
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return images / 127.5 - 1


def run(layer, recompute, *inputs):
    """layer(*inputs); recompute: its activations are not kept for the gradient but computed again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class SiglipLayer(nn.Module):
    """Pre-norm transformer block with biases everywhere. (B, N, D) -> (B, N, D)."""

    def __init__(self, width, mlp, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x):
        B, N, D = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = attention(q, k, v)                                                  # (B, H, N, d)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Siglip(nn.Module):
    """Images (B, 3, size, size) in [-1, 1] -> one token per patch (B, N, D); no class token, no pooling."""

    def __init__(self, size, patch_size, width, depth, mlp, n_heads, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.patch = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.empty((size // patch_size) ** 2, width))
        self.layers = nn.ModuleList([SiglipLayer(width, mlp, n_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)                       # (B, N, D)
        x = x + self.position
        for layer in self.layers:
            x = run(layer, self.checkpointing, x)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------
# Norms and attention


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean x^2) * weight, computed in float32: what "RMSNorm" means."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)  # [6]


def released_norm(x, weight, eps=1e-6):
    """x / sqrt(var x) * weight: x itself is not centred, but the variance is around its mean, with n - 1 in
    the denominator. So timm 1.0.3 computes its RmsNorm, and the released weights are used to it."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.var(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)  # [6]


NORMS = {"true": rms_norm, "released": released_norm}


class Norm(nn.Module):
    def __init__(self, width, kind="true"):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(width)), NORMS[kind]

    def forward(self, x):
        return self.norm(x, self.weight)


# Added to the logits of masked keys: huge, but finite in bfloat16 too. Some key is always left (lang_mask).
MASKED = -2.3819763e38


def attention(q, k, v, bias=None):
    """softmax(q k' / sqrt(d) + bias) v over the last two axes: (..., N, d), (..., M, d) -> (..., N, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, bias)
    # On a CPU the backward pass of the fused kernel takes four times as long in bfloat16.
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    return torch.softmax(logits, dim=-1, dtype=logits.dtype) @ v


# ----------------------------------------------------------------------------------------------------------
# T5's encoder


def t5_bucket(distance, n_buckets, farthest):
    """Bucket of a distance (key minus query): half of them for keys behind, half for keys ahead; of each half
    the first half one per distance, the rest logarithmic up to `farthest`."""
    half, exact = n_buckets // 2, n_buckets // 4
    size = distance.abs()
    far = torch.log(size.clamp(min=1) / exact) / math.log(farthest / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


class T5Layer(nn.Module):
    """Pre-norm, no biases, gated GELU. (B, L, D) -> (B, L, D)."""

    def __init__(self, width, n_heads, head_dim, mlp):
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q, self.k, self.v = (nn.Linear(width, n_heads * head_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(n_heads * head_dim, width, bias=False)
        self.gate, self.up = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x, bias):
        B, L, D = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        # `attention` divides by sqrt(d), which T5 does not.
        h = attention(q * self.head_dim ** 0.5, k, v, bias)                     # [13] (B, H, L, d)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


class T5Encoder(nn.Module):
    """Codes (B, L), which of them are real (B, L) bool -> (B, L, D)."""

    def __init__(self, vocab_size, width, depth, n_heads, head_dim, mlp, buckets, distance):
        super().__init__()
        self.distance = distance
        self.embed = nn.Embedding(vocab_size, width)
        self.relative = nn.Embedding(buckets, n_heads)  # b in [13], the same in all layers
        self.layers = nn.ModuleList([T5Layer(width, n_heads, head_dim, mlp) for _ in range(depth)])
        self.norm = Norm(width)

    def position_bias(self, L):
        """(1, H, L, L): what is added to the logit of query i and key j, a function of j - i."""
        at = torch.arange(L, device=self.relative.weight.device)
        bucket = t5_bucket(at - at[:, None], self.relative.num_embeddings, self.distance)
        return self.relative(bucket).permute(2, 0, 1)[None]                     # [13]

    def forward(self, codes, mask):
        B, L = codes.shape
        x = self.embed(codes)                                                   # (B, L, D)
        bias = self.position_bias(L)
        bias = bias + torch.where(mask, 0.0, MASKED)[:, None, None].to(bias.dtype)  # (B, H, L, L)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------
# The diffusion transformer's parts


class NormedSelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D)."""

    def __init__(self, width, n_heads, norm):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (Norm(width // n_heads, norm) for _ in range(2))

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        h = attention(self.q_norm(q), self.k_norm(k), v)                        # [7]
        return self.proj(h.transpose(1, 2).flatten(2))


class NormedCrossAttention(nn.Module):
    """Tokens (B, N, D) read a condition whose keys and values are computed beforehand."""

    def __init__(self, width, n_heads, norm):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (Norm(width // n_heads, norm) for _ in range(2))

    def keys_values(self, c):
        """Condition (B, M, D) -> k, v, each (B, H, M, d)."""
        B, M, D = c.shape
        k, v = self.kv(c).view(B, M, 2, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        return self.k_norm(k), v

    def forward(self, x, k, v, bias=None):
        """x (n B, N, D): n draws of each item, all items once, then again. They are lined up as if they were
        more queries of one item, so that keys and values are never copied."""
        N, B = x.shape[1], len(k)
        q = self.q(x).view(-1, B, N, self.n_heads, k.shape[-1]).permute(1, 3, 0, 2, 4)  # (B, H, n, N, d)
        h = attention(self.q_norm(q).flatten(2, 3), k, v, bias)                 # [7] (B, H, n N, d)
        return self.proj(h.unflatten(2, (-1, N)).permute(2, 0, 3, 1, 4).reshape_as(x))


class FeedForward(nn.Module):
    """The hidden layer is as wide as the input: 1 times, not the usual 4."""

    def __init__(self, width, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RDTBlock(nn.Module):
    """Tokens (n B, N, D), keys and values of one condition -> (n B, N, D)."""

    def __init__(self, width, n_heads, norm):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (Norm(width, norm) for _ in range(3))
        self.attn = NormedSelfAttention(width, n_heads, norm)
        self.cross_attn = NormedCrossAttention(width, n_heads, norm)
        self.ffn = FeedForward(width, width)

    def forward(self, x, k, v, bias=None):
        x = x + self.attn(self.norm1(x))                                        # [8]
        x = x + self.cross_attn(self.norm2(x), k, v, bias)                      # [8]
        return x + self.ffn(self.norm3(x))                                      # [8]


def adaptor(dim, width, layers):
    """MLP from a modality's own width to the transformer's ("mlp2x_gelu", "mlp3x_gelu")."""
    parts = [nn.Linear(dim, width)]
    for _ in range(layers - 1):
        parts += [nn.GELU(approximate="tanh"), nn.Linear(width, width)]
    return nn.Sequential(*parts)


def fourier(v, n):
    """v (..., U) -> (..., U (1 + 2 n)): v and its sines and cosines. The paper writes that low-dimensional
    inputs are encoded by MLPs with Fourier features; the released network has the MLPs alone, n = 0."""
    angle = v[..., None] * math.pi * 2.0 ** torch.arange(n, device=v.device)    # (..., U, n)
    return torch.cat([v, angle.sin().flatten(-2), angle.cos().flatten(-2)], dim=-1)  # [10]


def sinusoid(value, dim=256):
    """(B,) -> (B, dim) float32, cosines first: of a diffusion time in 0..K-1, or of a rate in Hz."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=value.device) / (dim // 2))
    angle = value[:, None].float() * frequency                                  # [11]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_table(at, dim):
    """Positions (N,) -> (N, dim) float64, sines first: where the learned positions start."""
    angle = at[:, None].double() * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# ----------------------------------------------------------------------------------------------------------
# Diffusion


def cosine_alpha_bar(K):
    """alpha_bar_t of t = 0..K-1, (K,) float32, through the clipped beta_t, as `squaredcos_cap_v2` of
    diffusers: the product is taken in float32 because released models were trained and are sampled that
    way. beta_start and beta_end, which every official YAML gives, have no effect on this schedule."""
    u = torch.arange(K + 1, dtype=torch.float64) / K
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999).float()
    return torch.cumprod(1 - beta, dim=0)                                       # [1]


def solver_times(K, steps):
    """Times visited, evenly from K - 1 down; 0 is left out. 5 of 1000: 999, 799, 599, 400, 200."""
    return torch.linspace(0, K - 1, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]


def dpm_solver(denoise, x_t, alpha_bar, steps, trace=None):
    """DPM-Solver++ of second order: from noise x_t to a sample, in `steps` calls of denoise(x_t, t) -> x0.

    At t = K - 1, where sampling starts, alpha_bar is of the order 1e-9: x_t holds next to nothing of x0, and
    a predicted eps could not be turned into x0 (division by sqrt(alpha_bar)). x0 is used as predicted. The
    step to clean data, sigma = 0 and e^-h = 0, gives the last x0 itself.
    """
    times = solver_times(len(alpha_bar), steps)
    alpha_bar = alpha_bar.double()[times]
    alpha = F.pad(alpha_bar.sqrt(), (0, 1), value=1.0).tolist()
    sigma = F.pad((1 - alpha_bar).sqrt(), (0, 1)).tolist()
    previous, h_previous = None, None
    for i, t in enumerate(times.tolist()):
        x0 = denoise(x_t, t)
        e_h = (sigma[i + 1] / alpha[i + 1]) / (sigma[i] / alpha[i])             # e^-h
        X = x0
        if 0 < i < steps - 1:
            h = -math.log(e_h)
            X = x0 + h / (2 * h_previous) * (x0 - previous)                     # [5]
        x_t = sigma[i + 1] / sigma[i] * x_t + alpha[i + 1] * (1 - e_h) * X      # [4]
        previous, h_previous = x0, -math.log(e_h) if e_h else math.inf
        if trace is not None:
            trace.append(x_t)
    return x_t


def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


class RDT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.encoders != "none":
            self.vision = Siglip(c.vit_size, c.patch_size, c.vit_width, c.vit_depth, c.vit_mlp, c.vit_heads,
                                 c.checkpointing)
            self.t5 = T5Encoder(c.vocab_size, c.t5_width, c.t5_depth, c.t5_heads, c.t5_head_dim, c.t5_mlp,
                                c.t5_buckets, c.t5_distance)
        self.lang_adaptor = adaptor(c.t5_width, c.width, 2)
        self.img_adaptor = adaptor(c.vit_width, c.width, 2)
        self.state_adaptor = adaptor(c.unified_dim * (2 + 2 * c.n_fourier), c.width, 3)
        self.t_embed, self.freq_embed = (nn.Sequential(nn.Linear(256, c.width), nn.SiLU(),
                                                       nn.Linear(c.width, c.width)) for _ in range(2))
        self.x_pos = nn.Parameter(torch.empty(1, 3 + c.horizon, c.width))
        self.lang_pos = nn.Parameter(torch.empty(1, c.text_len, c.width))
        self.img_pos = nn.Parameter(torch.empty(1, c.n_obs_steps * c.cameras * c.tokens_per_image, c.width))
        self.blocks = nn.ModuleList([RDTBlock(c.width, c.n_heads, c.norm) for _ in range(c.depth)])
        self.final_norm = Norm(c.width, c.norm)
        self.decoder = FeedForward(c.width, c.unified_dim)
        self.init_weights()
        self.prepare()

    @torch.no_grad()
    def init_weights(self):
        c = self.config
        for m in self.modules():
            if isinstance(m, Norm):
                m.weight.fill_(1.0)
        for part in (self.lang_adaptor, self.img_adaptor, self.state_adaptor):  # torch's own rule
            for m in part:
                if isinstance(m, nn.Linear):
                    m.reset_parameters()
                    m.weight.mul_(c.adaptor_init)
        for part in (self.t_embed, self.freq_embed, self.blocks, self.decoder):
            for m in part.modules():
                if isinstance(m, nn.Linear):
                    nn.init.xavier_uniform_(m.weight)
                    m.bias.zero_()
        for part in (self.t_embed, self.freq_embed):
            part[0].weight.normal_(std=0.02)
            part[2].weight.normal_(std=0.02)
        # Queries and keys of mean square 1 give logits of deviation 1: nearly even attention over hundreds of
        # tokens, in which the few that matter drown. A larger weight in the norms makes it choose.
        for block in self.blocks:
            for attend in (block.attn, block.cross_attn):
                attend.q_norm.weight.fill_(c.qk_init)
                attend.k_norm.weight.fill_(c.qk_init)
        # Positions. Half of the channels tells the kind of token (or step, or camera), half its place.
        # The release gives all words one table row, that of place 0, and all patches of a picture the same:
        # T5 and SigLIP know places by themselves.
        half = c.width // 2
        kind = torch.tensor([0, 1, 2] + [3] * c.horizon)
        place = torch.tensor([0, 0, 0] + list(range(c.horizon)))
        self.x_pos[0] = torch.cat([position_table(kind, half), position_table(place, half)], dim=1)
        self.lang_pos[0] = torch.cat([torch.zeros(c.text_len, half), torch.ones(c.text_len, half)], dim=1)
        picture = torch.arange(c.n_obs_steps * c.cameras).repeat_interleave(c.tokens_per_image)
        step, camera = picture // c.cameras, picture % c.cameras
        self.img_pos[0] = torch.cat([position_table(step, half), position_table(camera, half)], dim=1)
        for table in (self.x_pos, self.lang_pos, self.img_pos):
            table.mul_(c.pos_init)
        if c.encoders != "none":
            for m in self.vision.modules():
                if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                    m.reset_parameters()
            self.vision.position.normal_(std=c.image_init * c.vit_width ** -0.5)
            self.vision.patch.weight.mul_(c.image_init)
            for m in self.t5.modules():
                if isinstance(m, nn.Linear):
                    m.weight.normal_(std=m.in_features ** -0.5)
            for layer in self.t5.layers:  # T5 divides here by what others divide the logits by
                layer.q.weight.mul_(c.t5_head_dim ** -0.5)
            self.t5.embed.weight.normal_()
            self.t5.relative.weight.normal_()  # in order that heads differ in where they look from the start
        # The last layer is zero: the first prediction is that every action is 0, the mean.
        self.decoder.fc2.weight.zero_()
        self.decoder.fc2.bias.zero_()

    def prepare(self):
        """What is no weight (and no buffer: model.to(bfloat16) would round 1 - alpha_bar_0 to zero)."""
        c = self.config
        self.alpha_bar = cosine_alpha_bar(c.n_diffusion_steps)
        self.places = {"action": slots(c.action_names), "state": slots(c.state_names)}
        if c.encoders != "none":
            for part in (self.vision, self.t5):
                part.requires_grad_(c.encoders == "train")

    def unify(self, kind, x):
        """Actions or states (..., A) to their places in the unified vector (..., U), or as they are if the
        batch comes packed."""
        return pack(x, self.places[kind], self.config.unified_dim) if self.places[kind] else x

    def valid(self, kind, batch):
        """Which of the U dimensions the robot of each item has, as 0 and 1: (B, U)."""
        B, U, device = len(batch["state"]), self.config.unified_dim, batch["state"].device
        if self.places[kind]:
            places = torch.tensor(self.places[kind], device=device)
            return torch.zeros(U, device=device).index_fill(0, places, 1).expand(B, U)
        given = batch.get(f"{kind}_valid", batch.get("action_valid"))
        if given is None:
            raise ValueError("packed actions need action_valid (B, U): which dimensions each robot has")
        return given.float()

    def hide(self, batch):
        """[12]: control frequency 0, state 0 (the mean), the masks of state and actions all 0 ("told"), each
        picture the background, text empty; an independent draw for each of these and each item."""
        B, device = len(batch["state"]), batch["state"].device
        keep = lambda *shape: torch.rand(B, *shape, device=device) >= self.config.mask_prob
        noise = self.config.state_noise * torch.randn_like(batch["state"])
        hidden = batch | {"state": (batch["state"] + noise) * keep(1, 1), "told": keep(1)}  # [12]
        if "control_hz" in batch:
            hidden["control_hz"] = batch["control_hz"] * keep()
        if "images" in batch:
            seen = keep(*batch["images"].shape[1:3])
            hidden["image_mask"] = seen & batch["image_mask"] if "image_mask" in batch else seen
        if "lang_embeds" in batch:  # as an empty text: the first word alone, and that one without meaning
            hidden["lang_embeds"] = batch["lang_embeds"] * (read := keep(1, 1))
            hidden["lang_mask"] = self.lang_mask(batch) & read[..., 0]
        elif "text" in batch:
            hidden["text"] = batch["text"] * keep(1)
        return hidden

    def image_tokens(self, batch):
        """SigLIP's tokens of all pictures, the older step first: (B, To V n, D_vit). Missing cameras and
        pictures that image_mask (B, To, V) says are missing show the background."""
        c = self.config
        N = self.img_pos.shape[1]
        if "image_embeds" in batch:
            x = batch["image_embeds"]
            if x.shape[1:] != (N, c.vit_width):
                raise ValueError(f"image embeddings {tuple(x.shape[1:])} given, {(N, c.vit_width)} expected: "
                                 f"{c.n_obs_steps} steps x {c.cameras} cameras x {c.tokens_per_image} tokens")
            return x
        if c.encoders == "none":
            raise ValueError("encoders='none' takes image_embeds and lang_embeds; for pictures and texts set "
                             "encoders='frozen' and give weights of SigLIP and T5")
        if not c.n_cameras:  # the background is encoded once, and stands for all
            size = self.vision.patch.weight.new_zeros(1, 3, c.vit_size, c.vit_size)
            x = self.vision(size + BACKGROUND / 127.5 - 1)                      # (1, n, D_vit)
            return x.repeat(len(batch["state"]), c.n_obs_steps * c.cameras, 1)
        images = batch["images"]                                                # (B, To, V, 3, H, W)
        B, To, V = images.shape[:3]
        if V != c.n_cameras or To != c.n_obs_steps:
            raise ValueError(f"images of {To} steps and {V} cameras given, n_obs_steps = {c.n_obs_steps} and "
                             f"n_cameras = {c.n_cameras} expected; a missing camera is a place in image_mask "
                             "(B, To, V)")
        if "image_mask" in batch:
            images = torch.where(batch["image_mask"][..., None, None, None], images, BACKGROUND)
        if V < c.cameras:
            missing = images.new_full((B, To, c.cameras - V, *images.shape[3:]), BACKGROUND)
            images = torch.cat([images, missing], dim=2)
        x = fit_square(images.flatten(0, 2).float(), c.vit_size)                # (B To V, 3, size, size)
        x = self.vision(x.to(self.vision.position.dtype))                       # (B To V, n, D_vit)
        return x.reshape(B, N, c.vit_width)

    def lang_mask(self, batch):
        """Which tokens of the text are read, (B, L). The first always is: an empty text is one token that
        says nothing."""
        if "lang_embeds" in batch:
            mask = batch.get("lang_mask", batch["lang_embeds"].new_ones(batch["lang_embeds"].shape[:2]) > 0)
        else:
            mask = batch["text"] > 0
        return mask | (torch.arange(mask.shape[1], device=mask.device) == 0)

    def lang_tokens(self, batch):
        """T5's tokens of the instruction: (B, L, D_t5)."""
        c, L = self.config, batch["lang_embeds" if "lang_embeds" in batch else "text"].shape[1]
        if L > c.text_len:
            raise ValueError(f"text of {L} codes given, at most text_len = {c.text_len} expected")
        if "lang_embeds" in batch:
            x = batch["lang_embeds"]
            if x.shape[-1] != c.t5_width:
                raise ValueError(f"text embeddings are {x.shape[-1]} wide, t5_width = {c.t5_width} expected: "
                                 "they must come from the encoder that the weights were trained with")
            return x
        if c.encoders == "none":
            raise ValueError("encoders='none' takes lang_embeds; for texts set encoders='frozen' and give "
                             "weights of T5")
        return self.t5(batch["text"], self.lang_mask(batch))

    def encode(self, batch):
        """Everything that does not change from one diffusion step to the next, once per observation: keys and
        values of each block's condition, the state token's numbers, the control frequency."""
        dtype = self.x_pos.dtype
        lang = self.lang_adaptor(self.lang_tokens(batch).to(dtype))             # (B, L, D)
        lang = lang + self.lang_pos[:, :lang.shape[1]]
        images = self.img_adaptor(self.image_tokens(batch).to(dtype)) + self.img_pos  # (B, N, D)
        bias = torch.where(self.lang_mask(batch), 0.0, MASKED)[:, None, None].to(dtype)  # (B, 1, 1, L)
        conditions = []
        for i, block in enumerate(self.blocks):
            c, c_bias = (lang, bias) if i % 2 == 0 else (images, None)          # [8]
            conditions.append((*block.cross_attn.keys_values(c), c_bias))
        valid, state_valid = self.valid("action", batch), self.valid("state", batch)
        told = batch.get("told", 1.0)
        state = self.unify("state", batch["state"][:, -1:])                     # (B, 1, U)
        if self.config.masked:
            state = state * state_valid[:, None]
        hz = batch.get("control_hz", torch.zeros(len(state), device=state.device))
        return {"conditions": conditions, "hz": hz, "state": state, "valid": valid,
                "told": told * valid, "state_told": told * state_valid}

    def denoise(self, encoded, x_t, t):
        """f_theta: x0 (n B, Tp, U) float32, predicted from x_t at times t (n B,)."""
        n, Tp = len(x_t) // len(encoded["hz"]), x_t.shape[1]
        draws = lambda x: x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))     # (B, ...) -> (n B, ...)
        dtype = self.x_pos.dtype
        if self.config.masked:
            x_t = x_t * draws(encoded["valid"])[:, None]
        v = torch.cat([draws(encoded["state"]), x_t], dim=1)                    # (n B, 1 + Tp, U)
        m = torch.cat([draws(encoded["state_told"])[:, None],
                       draws(encoded["told"])[:, None].expand(-1, Tp, -1)], dim=1)
        v = fourier(v, self.config.n_fourier)
        tokens = self.state_adaptor(torch.cat([v, m], dim=-1).to(dtype))        # [9]
        time = self.t_embed(sinusoid(t).to(dtype))[:, None]                     # (n B, 1, D)
        hz = draws(self.freq_embed(sinusoid(encoded["hz"]).to(dtype)))[:, None]
        x = torch.cat([time, hz, tokens], dim=1) + self.x_pos                   # (n B, 3 + Tp, D)
        for block, (k, v, bias) in zip(self.blocks, encoded["conditions"]):
            x = run(block, self.config.checkpointing, x, k, v, bias)
        return self.decoder(self.final_norm(x[:, 3:])).float()                  # [9]

    def loss(self, batch, noise=None, t=None):
        """Mean squared error of the predicted chunk over the steps (and dimensions, see `masked`) that are
        real.

        batch: actions (B, Tp, A), action_mask (B, Tp), state (B, To, S), images (B, To, V, 3, H, W) or
        image_embeds (B, N, D_vit), text (B, L) or lang_embeds (B, L, D_t5) and lang_mask (B, L), control_hz
        (B,); packed actions: action_valid and state_valid (B, U). noise (n B, Tp, U) and t (n B,), all items
        once, then again: drawn when not given. Time: t = 0 is almost data, t = K-1 noise.
        -> {"loss": (), "per_sample": (n B,), "t": (n B,) in [0, 1]}
        """
        x0, mask = self.unify("action", batch["actions"]), batch["action_mask"]  # (B, Tp, U), (B, Tp)
        B, n = len(x0), self.config.n_draws if noise is None else len(noise) // len(x0)
        hides = self.training and (self.config.mask_prob or self.config.state_noise)
        encoded = self.encode(self.hide(batch) if hides else batch)
        valid = self.valid("action", batch) if self.config.masked else torch.ones_like(x0[:, 0])
        draws = lambda x: x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))     # (B, ...) -> (n B, ...)
        x0, mask, valid = draws(x0), draws(mask), draws(valid)[:, None]
        K = self.config.n_diffusion_steps
        noise = torch.randn_like(x0) if noise is None else noise
        if t is None:  # Beta(a, 1) has the distribution function b^a, which is inverted here
            b = torch.rand(n * B, dtype=torch.float64, device=x0.device) ** (1 / self.config.time_alpha)
            t = (K * b).long().clamp(max=K - 1)                                 # [3]
        alpha_bar = self.alpha_bar.to(x0.device)[t][:, None, None]              # (n B, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise            # [2]
        pred = self.denoise(encoded, x_t, t)
        error = ((pred - x0) ** 2 * valid).sum(-1) / valid.sum(-1) * mask       # (n B, Tp)
        loss = error.sum() / mask.sum()                                         # [3]
        per_sample = error.detach().sum(1) / mask.sum(1).clamp(min=1)
        return {"loss": loss, "per_sample": per_sample, "t": t / (K - 1)}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None):
        """Draw one chunk per observation: (B, Tp, A), normalised units (packed: (B, Tp, U), 0 where the robot
        has nothing); the policy executes the first Ta.

        batch: as in `loss`, without actions. steps: of DPM-Solver++, default config.sampler_steps. noise (B,
        Tp, U): where to start, drawn from `generator` when not given. trace: receives (B, Tp, A) after every
        step.
        """
        c = self.config
        steps = c.sampler_steps if steps is None else steps
        check_solver_steps(steps, c.n_diffusion_steps)
        if "control_hz" in batch and not (batch["control_hz"] > 0).all():
            raise ValueError(f"the control frequency must be above 0, not {batch['control_hz'].min():g} Hz: "
                             "correct 'fps' of the data, or leave control_hz out")
        encoded = self.encode(batch)
        device, places = batch["state"].device, self.places["action"]
        shape = (len(batch["state"]), c.horizon, c.unified_dim)
        x_t = randn(shape, generator, device) if noise is None else noise.float()
        denoise = lambda x, t: self.denoise(encoded, x, torch.full((len(x),), t, device=device))
        states = []
        chunk = dpm_solver(denoise, x_t, self.alpha_bar, steps, states)         # (B, Tp, U)
        if trace is not None:
            trace += [unpack(x, places) if places else x for x in states]
        return unpack(chunk, places) if places else chunk * encoded["valid"][:, None]

    def param_groups(self, weight_decay):
        """The original decays every parameter alike."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    @classmethod
    def from_official(cls, state_dict, config):
        """A policy with released weights: the diffusion transformer and its adaptors (RDTRunner), and, unless
        encoders is "none", SigLIP's and T5's in the same state_dict, under the names of transformers.

        config must describe it (PRESETS["1B"]). The tensors become the parameters as they are, nothing is
        copied. Strict: one ValueError names every key that is missing, left over or has another shape. Not
        read: SigLIP's pooling head and text half, T5's decoder, the other name of its embedding.
        """
        weights = convert_official(state_dict)
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
        model.requires_grad_().prepare()
        return model


# Official names -> ours, applied in this order: the runner, SigLIP, T5.
RENAMES = [
    (r"^module\.", ""), (r"^model\.", ""), (r"^(t|freq)_embedder\.mlp\.", r"\1_embed."),
    (r"^x_pos_embed$", "x_pos"), (r"^(lang|img)_cond_pos_embed$", r"\1_pos"),
    (r"^final_layer\.norm_final\.", "final_norm."), (r"^final_layer\.ffn_final\.", "decoder."),
    (r"^vision_model\.", "vision."), (r"^vision\.embeddings\.patch_embedding\.", "vision.patch."),
    (r"^vision\.embeddings\.position_embedding\.weight$", "vision.position"),
    (r"^vision\.encoder\.layers\.", "vision.layers."), (r"^vision\.post_layernorm\.", "vision.norm."),
    (r"\.layer_norm([12])\.", r".norm\1."), (r"\.self_attn\.out_proj\.", ".out."),
    (r"\.self_attn\.([qkv])_proj\.", r".\1."), (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"^(shared|encoder\.embed_tokens)\.", "t5.embed."), (r"^encoder\.final_layer_norm\.", "t5.norm."),
    (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", "t5.relative."),
    (r"^encoder\.block\.(\d+)\.", r"t5.layers.\1."), (r"\.layer\.0\.SelfAttention\.", "."),
    (r"\.layer\.([01])\.layer_norm\.", lambda m: f".norm{int(m[1]) + 1}."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".gate."), (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".up."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".down."),
]
NOT_WEIGHTS = re.compile(r"^vision\.(head|embeddings\.position_ids)|^text_model\.|^logit_(scale|bias)$"
                         r"|^decoder\.(block|embed_tokens|final_layer_norm)|^lm_head\.")


def convert_official(state_dict):
    """Rename the keys of official weights (what is renamed differs from file to file)."""
    weights = {}
    for key, value in state_dict.items():
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        if not NOT_WEIGHTS.search(key):
            weights[key] = value
    return weights


Model = RDT

# Both arms of ALOHA, as its episode files order them. Two grippers opening, in 0 .. 1.
ALOHA = tuple(f"{side}_{part}" for side in ("left", "right")
              for part in [*(f"arm_joint_{i}_pos" for i in range(6)), "gripper_open"])
RELEASED = {"action_dim": 14, "state_dim": 14, "action_names": ALOHA, "state_names": ALOHA, "n_cameras": 3,
            "image_size": (480, 640), "horizon": 64, "n_action_steps": 64, "max_cameras": 3, "text_len": 1024,
            "vocab_size": 32128, "encoders": "none", "vit_size": 384, "patch_size": 14, "vit_width": 1152,
            "vit_depth": 27, "vit_mlp": 4304, "vit_heads": 16, "t5_width": 4096, "t5_depth": 24,
            "t5_heads": 64, "t5_head_dim": 64, "t5_mlp": 10240, "norm": "released", "qk_init": 1.0,
            "adaptor_init": 1.0, "image_init": 1.0, "pos_init": 1.0, "masked": False, "n_draws": 1,
            "time_alpha": 1.0, "mask_prob": 0.1}
PRESETS = {
    # Learns the built-in task on two CPU cores.
    "tiny": {},
    # 166,229,888 parameters: the transformer and its adaptors. SigLIP has 412,987,248, T5-XXL 4,762,310,656
    "170M": RELEASED | {"width": 1024, "depth": 14, "n_heads": 32},
    # 1,228,319,872 parameters
    "1B": RELEASED | {"width": 2048, "depth": 28, "n_heads": 32},
}
FINE_TUNING = {"steps": 200_000, "batch_size": 32, "lr": 1e-4, "lr_schedule": "constant", "warmup": 0,
               "clip": 1.0, "betas": (0.9, 0.999), "weight_decay": 1e-2, "normalizer": "meanstd"}
RECIPES = {
    # Only in one window of five does it matter which block is meant. Uniform times in batches of 32, and
    # times near noise in batches of 64, were not enough: after as many steps it still went to either.
    "tiny": {"steps": 2000, "batch_size": 128, "lr": 1.5e-3, "warmup": 200, "clip": 1.0, "betas": (0.9, 0.95),
             "weight_decay": 1e-3, "ema_max": 0.995, "dtype": "bfloat16", "normalizer": "meanstd"},
    "170M": FINE_TUNING, "1B": FINE_TUNING,
}


# ----------------------------------------------------------------------------------------------------------


# Two robots with the same goals: one commands positions of its right arm, one velocities of its left arm.
ROBOTS = (("right_eef_pos_x", "right_eef_pos_y"), ("left_eef_vel_x", "left_eef_vel_y"))


def lamps_for_two_robots(n, config, generator):
    """n scenes with a red and a blue square, one left, one right; "r" or "b" asks for one of them, and the
    actions go there: as positions of the right arm at 10 Hz, or as velocities of the left one at 20 Hz.
    -> batch, the side that is asked for (n,): -1 left, 1 right; the robot (n,)"""
    red_side, colour, robot = torch.randint(2, (3, n), generator=generator)
    images = torch.zeros(n, 1, 1, 3, 16, 16, dtype=torch.uint8)
    for side in (0, 1):
        channel = torch.where(red_side == side, 0, 2)
        images[torch.arange(n), 0, 0, channel, 4:12, 8 * side + 2:8 * side + 6] = 255
    side = torch.where(colour == 0, red_side, 1 - red_side) * 2.0 - 1
    texts = torch.stack([config.encode_text(letter) for letter in "rb"])
    s = torch.linspace(0, 1, config.horizon)
    position = torch.stack([side[:, None] * s, s.expand(n, -1)], dim=-1)        # (n, Tp, 2)
    velocity = torch.stack([side, torch.ones(n)], dim=-1)[:, None].expand_as(position)
    both = torch.stack([pack(x, slots(names)) for x, names in zip((position, velocity), ROBOTS)])
    valid = torch.stack([pack(torch.ones(2), slots(names)) for names in ROBOTS])
    at = torch.arange(n)
    batch = {"images": images, "text": texts[colour], "state": torch.zeros(n, 1, 128),
             "actions": both[robot, at], "action_valid": valid[robot], "control_hz": 10.0 * (1 + robot),
             "action_mask": torch.ones(n, config.horizon, dtype=torch.bool)}
    return batch, side, robot


def main(steps=200):
    """Train on lamps_for_two_robots; print how many sampled chunks of each robot go where they were asked."""
    torch.manual_seed(0)
    config = Config(action_dim=128, state_dim=128, action_names=(), state_names=(), n_cameras=1,
                    image_size=(16, 16), horizon=8, n_obs_steps=1, text_len=2, vit_size=16, patch_size=8,
                    vit_width=48, vit_depth=1, vit_mlp=96, t5_width=48, t5_depth=1, t5_mlp=96, width=64,
                    n_draws=2, mask_prob=0.0)
    model = RDT(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        batch, _, _ = lamps_for_two_robots(32, config, generator)
        loss = model.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}")
    model.eval()
    batch, side, robot = lamps_for_two_robots(500, config, generator)
    chunk = model.sample(batch)                                                 # (500, 8, 128)
    end = torch.stack([unpack(chunk, slots(names))[:, -1, 0] for names in ROBOTS])[robot, torch.arange(500)]
    right = ((end - side).abs() < 0.3).float()
    shares = [right[robot == r].mean().item() for r in (0, 1)]
    print(f"chunks that go where they were asked to: first robot {100 * shares[0]:.1f} %, second "
          f"{100 * shares[1]:.1f} % (expected: at least 95; 50 without reading)")
    return min(shares)


if __name__ == "__main__":
    main()
