"""RDT: one diffusion transformer for many robots, two arms among them.

    Songming Liu, Lingxuan Wu, Bangguo Li, Hengkai Tan, Huayu Chen, Zhengyi Wang, Ke Xu, Hang Su, Jun Zhu:
    "RDT-1B: a Diffusion Foundation Model for Bimanual Manipulation", arXiv:2410.07864
    official code: github.com/thu-ml/RoboticsDiffusionTransformer

Modelled is p(x0 | l, o): a chunk x0 of the next Tp actions, given an instruction l and o = (pictures of the
last To steps, the robot's own state, its control frequency). Not p(x0, l, o): no picture is to be generated.
Training mixes noise of level t into a chunk, and a network over [t, frequency, state, noised actions]
predicts the clean chunk; sampling starts with noise alone and lowers t in a few steps. Words (T5) and patches
(SigLIP) are read by cross-attention, in turn: in one softmax the many patches would drown the few words.

    block 0   [t, hz, state, a_1 .. a_Tp] <-> each other   then <- words of the instruction   then MLP
    block 1   [t, hz, state, a_1 .. a_Tp] <-> each other   then <- patches of the pictures    then MLP   ...

Every robot's numbers have their place in one vector of U = 128 (table UNIFIED below), by physical meaning; a
mask says which of them a robot has. So robots with different arms, actions and rates share all weights.

Axes: B items; To observed, Tp predicted, Ta executed steps; A, S numbers of an action, of a state; U places
of the unified vector; V cameras; H, W pixels; L text codes; N tokens, M keys of an attention; D width (D_t5,
D_vit: the encoders'), d width of a head; K noise levels; n draws of noise and time per observation.
Time: t = 0 is the least noised of K levels (one step of noise), t = K - 1 is noise.

    [1]  alpha_bar_t = f((t+1)/K) / f(0),  f(u) = cos^2((u + 0.008) / 1.008 * pi/2),  beta_t cut at 0.999
    [2]  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                     noising
    [3]  loss = mean (x0_hat - x0)^2,   x0_hat = f_theta(l, o, x_t, t): the network predicts x0;        loss
         t = floor(K b), b ~ Beta(time_alpha, 1). Released: time_alpha = 1, t uniform in 0..K-1
    [4]  x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) X,   h = lambda_s - lambda_t,       DPM-Solver++
         lambda = log(alpha / sigma), alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), s < t
    [5]  X = x0_hat in the first and the last step, else x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)
    [6]  RMSNorm(x) = w x / sqrt(mean(x^2) + 1e-6);   released: w x / sqrt(var(x) + 1e-6)
    [7]  softmax(RMSNorm(q) RMSNorm(k)' / sqrt(d)) v                                                QK-norm
    [8]  x += self(norm(x)); x += cross(norm(x), read_i); x += MLP(norm(x)); read_i: words (even i) or patches
    [9]  token of a state or an action = MLP([y, m]), y its 128 numbers, m the mask; MLP decoder at the end
    [10] Fourier features of the paper: sin, cos of 2^j pi y, j = 0 .. J-1, appended to y. Released: J = 0
    [11] token of t and of the control frequency (Hz) = MLP(cos, sin of (value) 10000^(-i/128))
    [12] training hides each modality with probability 0.1 (paper), lest the policy rely on one of them alone
    [13] T5: softmax(q k' + r(j - i)) v, r learned per head and bucket of the distance; no 1 / sqrt(d)

Map: Config | UNIFIED | Siglip | T5Encoder | RDTBlock | dpm_solver | RDT: loss, sample, from_official | main.

Differs from the original:
 1. Norms: "released" divides by the deviation, not by the root mean square, as timm 1.0.3 does. Whether the
    released weights were trained so is not known: with apex installed, timm takes a true RMS norm (`norm`).
 2. `masked` (tiny): places that a robot lacks are 0 in the network's input and left out of the loss. The
    original feeds noise to all 128 and trains all 128. A sample has only the robot's own in both.
 3. Steps past an episode's end are left out of the loss. The original trains on them (`train_on_padding`).
 4. Noise on the state is a share of the deviation over all episodes, not over the one at hand.
 5. Colour jitter, image corruption and the exchange of instructions for paraphrases are left out.
 6. "tiny" has other sizes, bytes for text, initial weights that let attention choose and content outweigh
    position, times nearer to noise [3], and encoders that learn with the rest, as they are not pretrained.

Run alone: `python rdt.py` trains two robots on one set of weights, in a quarter of a minute on two CPU cores.
"""
import difflib
import functools
import math
import re
import sys
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

END = 1  # T5's end mark, all that an empty instruction has
say_once = functools.lru_cache(print)  # the same words are printed only once


@dataclass
class Config:
    # -- the data; train.py fills these in
    obs: str = "image"          # "image": cameras and state; "lowdim": no camera, the background is seen
    action_dim: int = 3         # A, numbers of one action
    state_dim: int = 3          # S, numbers of the state; only the present one is read
    n_cameras: int = 2          # V; one encoder; released weights have the order CAMERA_PLACES
    image_size: tuple = (64, 64)  # H, W of every camera image, pixels
    unified_dim: int = 128      # U, length of the unified vector
    # names in UNIFIED of an action's numbers, in order; () = all U come, packed, and action_valid with them
    action_names: tuple = ("right_eef_pos_x", "right_eef_pos_y", "right_gripper_open")
    state_names: tuple = ("right_eef_pos_x", "right_eef_pos_y", "right_gripper_open")  # ... of a state's
    state_mean: tuple = ()      # of the training states, in the network's units: what a hidden one shows
    state_std: tuple = ()       # ... their deviation; () = 0 and 1
    # -- the timeline, in control steps: the chunk starts now
    horizon: int = 16           # Tp, predicted steps
    n_obs_steps: int = 2        # To, steps whose pictures are seen
    n_action_steps: int = 8     # Ta, executed steps
    # -- what the weights are made for
    max_cameras: int = 0        # camera places; those left over show the background; 0 = as many as cameras
    image_tokens: int = 0       # tokens of one picture; 0 = one per patch
    text_len: int = 24          # L, longest instruction in codes; what is longer is cut
    vocab_size: int = 257       # number of codes; 257 = bytes + 1, 0 is padding
    tokenizer_path: str = ""    # SentencePiece model file of T5; "" = bytes
    # "train": with the rest; "frozen": as given; "images": SigLIP alone; "none": batches bring all tokens
    encoders: str = "train"
    vit_size: int = 48          # SigLIP: side of the square that images are fitted into, pixels
    patch_size: int = 12        # side of a patch, pixels; released (14 in 384): a rim stays unread
    vit_width: int = 128        # width of its tokens
    vit_depth: int = 1          # ... layers
    vit_mlp: int = 256          # ... hidden width of the MLPs
    vit_heads: int = 4          # ... heads
    t5_width: int = 96          # T5: width of its tokens
    t5_depth: int = 2           # ... layers
    t5_heads: int = 4           # ... heads
    t5_head_dim: int = 24       # ... width of a head
    t5_mlp: int = 192           # ... hidden width of the MLPs
    t5_buckets: int = 32        # ... buckets of relative distance
    t5_distance: int = 128      # ... distance in codes from which on all share a bucket
    # -- the diffusion transformer
    width: int = 128            # D
    depth: int = 4              # blocks: even ones read language, odd ones pictures
    n_heads: int = 4            # heads of self- and cross-attention
    norm: str = "true"          # "true" | "released", see [6]
    n_fourier: int = 0          # J, Fourier frequencies per input number [10]; 0 = as released
    qk_init: float = 1.75       # initial weight of the norms of queries and keys; 1 = as released
    adaptor_init: float = 2.4   # factor on initial adaptors; at 1, as released, positions drown tokens
    pos_init: float = 0.1       # factor on the initial positions, for the same reason; 1 = as released
    image_init: float = 5.0     # factor on initial patches and positions of SigLIP, as in pi0.py
    # -- diffusion and training
    masked: bool = True         # True: only the numbers that a robot has; False: as released (difference 2)
    n_draws: int = 1            # n, draws of noise and time per observation
    # see [3]; 1 = uniform, as released. 5: half of all t above 0.87 K, where x_t does not tell what is meant
    time_alpha: float = 5.0
    mask_prob: float = 0.05     # probability with which training hides each modality (released: 0.1)
    state_noise: float = 0.0    # noise on the state in training, a share of state_std (released: 0.01)
    train_on_padding: bool = False  # True: steps past an episode's end are trained on, which teaches to stay
    hide_before_start: bool = False  # True: pictures before an episode's first are hidden, as released
    checkpointing: bool = False  # True: each layer is computed again in the backward pass instead of kept
    n_diffusion_steps: int = 1000  # K, noise levels in training
    sampler_steps: int = 5      # steps of DPM-Solver++

    def __post_init__(self):
        check_choice("obs", self.obs, ("image", "lowdim"))
        check_choice("encoders", self.encoders, ("train", "frozen", "images", "none"))
        check_choice("norm", self.norm, ("true", "released"))
        may_be_0 = ("n_cameras", "max_cameras", "image_tokens", "n_fourier")
        sizes = [f.name for f in fields(self) if f.type is int and f.name not in may_be_0]
        check_at_least(self, 1, "image_size", *sizes)
        check_at_least(self, 0, "pos_init", "state_noise", "mask_prob", *may_be_0)
        check_at_least(self, 1e-6, "time_alpha", "qk_init", "adaptor_init", "image_init")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size {self.image_size} must be two numbers: height, width")
        for kind, dim in (("action", self.action_dim), ("state", self.state_dim)):
            names = getattr(self, f"{kind}_names")
            if dim != (len(names) or self.unified_dim):
                raise ValueError(f"{kind}s have {dim} dimensions, {kind}_names names {len(names)}: name each "
                                 f"as UNIFIED in rdt.py does; packed {kind}s have {self.unified_dim}")
            if max(slots(names), default=0) >= self.unified_dim:
                raise ValueError(f"unified_dim {self.unified_dim} has no room for the names given: use 128")
        if {len(self.state_mean), len(self.state_std)} - {0, self.state_dim}:
            raise ValueError(f"state_mean, state_std must have {self.state_dim} numbers, as a state, or none")
        parts = [("width", "n_heads"), ("vit_width", "vit_heads"), ("vit_size", "patch_size")]
        n_checked = {"none": 1, "train": 3}.get(self.encoders, 2)  # released SigLIP: a rim may stay unread
        for name, part in parts[:n_checked]:
            if (a := getattr(self, name)) % (b := getattr(self, part)):
                raise ValueError(f"{name} {a} must be a multiple of {part} {b}")
        if self.n_action_steps > self.horizon:
            raise ValueError(f"n_action_steps {self.n_action_steps} must lie in 1..horizon = {self.horizon}")
        if 0 < self.max_cameras < self.n_cameras:
            raise ValueError(f"{self.n_cameras} cameras, but there is room for {self.max_cameras}: name "
                             "those to use in shape_meta, or raise max_cameras")
        if not self.tokenizer_path and self.vocab_size != 257 and self.encoders in ("train", "frozen"):
            raise ValueError(f"vocab_size {self.vocab_size} is not that of bytes, 257, which mean something "
                             "else: name T5's spiece.model, --set tokenizer_path=FILE")
        patches = (self.vit_size // self.patch_size) ** 2
        if not patches or self.encoders != "none" and self.image_tokens not in (0, patches):
            raise ValueError(f"image_tokens {self.image_tokens}, but vit_size and patch_size make {patches}")
        if self.width % 4 or self.norm == "released" and self.width == self.n_heads:
            raise ValueError(f"width {self.width} must be a multiple of 4, and of a head above 1 for the "
                             "released norm, which divides by a deviation")
        if not 1 <= self.t5_buckets // 4 < self.t5_distance:
            raise ValueError(f"t5_buckets {self.t5_buckets} must lie in 4..{4 * self.t5_distance - 1}")
        if self.n_fourier > 20 or self.mask_prob >= 1:
            raise ValueError(f"n_fourier {self.n_fourier} must be <= 20, mask_prob {self.mask_prob} < 1")
        solver_times(self.n_diffusion_steps, self.sampler_steps)  # raises if they do not fit

    # Asked by the data: actions of a chunk, the step of its first one (0 = now), observed steps.
    pred_horizon = property(lambda self: self.horizon)
    first_action = property(lambda self: 0)
    n_obs_loaded = property(lambda self: self.n_obs_steps)
    tokens_per_image = property(lambda self: self.image_tokens or (self.vit_size // self.patch_size) ** 2)
    cameras = property(lambda self: self.max_cameras or max(1, self.n_cameras))  # places, filled or not

    def encode_text(self, text):
        """An instruction as codes, int64 (L,), 0 = padding: its UTF-8 bytes + 1, or the pieces of
        tokenizer_path and T5's end mark. What is too long is cut (not the end mark), which is said once."""
        codes, end = [byte + 1 for byte in text.encode()], []
        if self.tokenizer_path:
            pieces = tokenizer(self.tokenizer_path)
            if (size := pieces.vocab_size()) > self.vocab_size:
                raise ValueError(f"{self.tokenizer_path} has {size} pieces, vocab_size is {self.vocab_size}")
            codes, end = pieces.encode(text), [END]
        room = self.text_len - len(end)
        if len(codes) > room:
            say_once(f"note: an instruction has {len(codes + end)} codes and is cut to text_len = "
                     f"{self.text_len}: {text!r}", file=sys.stderr)
        codes = codes[:room] + end
        return torch.tensor(codes + [0] * (self.text_len - len(codes)))


@functools.lru_cache
def tokenizer(path):
    try:
        import sentencepiece
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except ImportError:
        raise ValueError("tokenizer_path needs a package: pip install sentencepiece") from None
    except (OSError, RuntimeError) as e:
        raise ValueError(f"tokenizer_path {path} cannot be read ({' '.join(str(e).split())})") from None


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(map(str, choices))}")


def check_at_least(config, least, *fields):
    """Each of these fields, or every number of it if it is a tuple, is at least `least`."""
    for field in fields:
        value = getattr(config, field)
        if not all(x >= least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} {value} must be at least {least}")


def check_axes(name, x, want, axes):
    """The first axes of x are as long as `want` says."""
    if x.shape[:len(want)] != want:
        raise ValueError(f"{name} {tuple(x.shape)} given, {want} = {axes} expected")


# ---------------------------------------------------------------- the unified vector

# One arm: {pattern: (first place, parts)}. Units: m, rad, m/s, rad/s; grippers 0 closed .. 1 open. The angles
# are the first two columns of the rotation matrix, one after the other. Places without a name are reserved.
ARM = {"arm_joint_{}_pos": (0, range(10)), "gripper_joint_{}_pos": (10, range(5)), "gripper_open": (10, [""]),
       "arm_joint_{}_vel": (15, range(10)), "gripper_joint_{}_vel": (25, range(5)),
       "gripper_open_vel": (25, [""]), "eef_pos_{}": (30, "xyz"), "eef_angle_{}": (33, range(6)),
       "eef_vel_{}": (39, "xyz"), "eef_angular_vel_{}": (42, ["roll", "pitch", "yaw"])}
# {name: place}. A single arm is the right one, so names without a side are the right arm's.
UNIFIED = {side + pattern.format(part): base + first + i
           for side, base in (("", 0), ("right_", 0), ("left_", 50))
           for pattern, (first, parts) in ARM.items() for i, part in enumerate(parts)}
UNIFIED |= {"base_vel_x": 100, "base_vel_y": 101, "base_angular_vel": 102}


# The places of cameras in released weights, in their order. A single arm's wrist is the right one.
CAMERA_PLACES = ("external", "right_wrist", "left_wrist")


@functools.lru_cache
def constants(numbers, device):
    """A tuple as a tensor. Kept: a copy from the host in every step would make the host wait."""
    return torch.tensor(numbers, device=device)


def slots(names):
    """Places of these names in the unified vector. Each name has to be in the table, each place unique."""
    for name in names:
        if name not in UNIFIED:
            close = difflib.get_close_matches(str(name), UNIFIED, 1)
            raise ValueError(f"{name!r} is no name of the unified action vector"
                             + (f", did you mean {close[0]!r}?" if close else "; see UNIFIED in rdt.py"))
    places = [UNIFIED[name] for name in names]
    for name, place in zip(names, places):
        if places.count(place) > 1:
            raise ValueError(f"{name!r} shares place {place} of the unified vector with another name")
    return places


def pack(x, places, dim=128):
    """(..., A) -> (..., dim): every number to its place, 0 elsewhere."""
    return x.new_zeros(*x.shape[:-1], dim).index_copy(-1, constants(tuple(places), x.device), x)


def unpack(x, places):
    """(..., dim) -> (..., A): the inverse of `pack`."""
    return x.index_select(-1, constants(tuple(places), x.device))


# ---------------------------------------------------------------- SigLIP: patches of pictures become tokens

BACKGROUND = 127  # SigLIP's mean colour, 0..255: what a missing or hidden picture shows


def fit_square(images, size):
    """Images (B, 3, H, W), 0..255 -> (B, 3, size, size) in [-1, 1]: padded to a square with the background,
    then resized as SigLIP's own preprocessing does (bicubic, antialiased)."""
    H, W = images.shape[-2:]
    side = max(H, W)
    top, left = (side - H) // 2, (side - W) // 2
    images = F.pad(images, (left, side - W - left, top, side - H - top), value=BACKGROUND)
    if side != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return images / 127.5 - 1


def checkpointed(layer, on, *inputs):
    """layer(*inputs). on: its activations are not kept for the backward pass but computed again there."""
    if on and torch.is_grad_enabled():
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
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = attention(q, k, v)                                                  # (B, heads, N, d)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Siglip(nn.Module):
    """Images (B, 3, size, size) in [-1, 1] -> one token per patch (B, N, D); no class token, no pooling."""

    def __init__(self, size, patch_size, width, depth, mlp, n_heads, checkpointing=False):
        super().__init__()
        self.size, self.checkpointing = size, checkpointing
        self.patch = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.empty((size // patch_size) ** 2, width))
        self.layers = nn.ModuleList([SiglipLayer(width, mlp, n_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(f"float images {tuple(images.shape[-2:])} do not fit vit_size {self.size}")
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position       # (B, N, D)
        for layer in self.layers:
            x = checkpointed(layer, self.checkpointing, x)
        return self.norm(x)


# ---------------------------------------------------------------- attention, norm, T5's encoder

# Added to the logits of masked keys. Finite, in bfloat16 too: a query all of whose keys are masked (padding,
# whose output nobody reads) weighs them evenly. With -inf it would be NaN.
MASKED = -2.3819763e38


def attention(q, k, v, bias=None):
    """softmax(q k' / sqrt(d) + bias) v over the last two axes: (..., N, d), (..., M, d) -> (..., N, d)."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, bias)
    # On a CPU the fused kernel takes two to eight times as long as this in bfloat16.
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    return torch.softmax(logits, dim=-1, dtype=logits.dtype) @ v


class Norm(nn.Module):
    """RMSNorm, in float32. Not layer norm, whose centring would shift the tokens of a time series (paper).
    kind "released": over the unbiased deviation, though x is not centred, as in timm 1.0.3 without apex."""

    def __init__(self, width, kind="true"):
        super().__init__()
        self.weight, self.released = nn.Parameter(torch.ones(width)), kind == "released"

    def forward(self, x):
        x32 = x.float()
        square = x32.var(-1, keepdim=True) if self.released else x32.square().mean(-1, keepdim=True)
        return (x32 * torch.rsqrt(square + 1e-6) * self.weight.float()).to(x.dtype)  # [6]


def t5_bucket(distance, n_buckets, farthest):
    """Bucket of a distance (key minus query). Half of the buckets are for keys before the query.
    In each half, the first ones hold a single distance, the rest widen logarithmically up to `farthest`."""
    half, single, gap = n_buckets // 2, n_buckets // 4, distance.abs()
    far = torch.log(gap.clamp(min=1) / single) / math.log(farthest / single) * (half - single)
    far = (single + far.long()).clamp(max=half - 1)
    return torch.where(gap < single, gap, far) + half * (distance > 0)


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
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = attention(q * self.head_dim ** 0.5, k, v, bias)  # [13] undoes 1 / sqrt(d); (B, heads, L, d)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


class T5Encoder(nn.Module):
    """Codes (B, L), which of them are real (B, L) bool -> (B, L, D)."""

    def __init__(self, vocab, width, depth, n_heads, head_dim, mlp, buckets, distance, checkpointing=False):
        super().__init__()
        self.distance, self.checkpointing = distance, checkpointing
        self.embed = nn.Embedding(vocab, width)
        self.relative = nn.Embedding(buckets, n_heads)  # r in [13], the same in all layers
        self.layers = nn.ModuleList([T5Layer(width, n_heads, head_dim, mlp) for _ in range(depth)])
        self.norm = Norm(width)

    def position_bias(self, L):
        """(1, heads, L, L): what is added to the logit of query i and key j, a function of j - i."""
        at = torch.arange(L, device=self.relative.weight.device)
        bucket = t5_bucket(at - at[:, None], self.relative.num_embeddings, self.distance)
        return self.relative(bucket).permute(2, 0, 1)[None]                     # [13]

    def forward(self, codes, mask):
        x, bias = self.embed(codes), self.position_bias(codes.shape[1])         # (B, L, D)
        bias = bias + torch.where(mask, 0.0, MASKED)[:, None, None].to(bias.dtype)  # (B, heads, L, L)
        for layer in self.layers:
            x = checkpointed(layer, self.checkpointing, x, bias)
        return self.norm(x)


# ---------------------------------------------------------------- the diffusion transformer's parts

class NormedSelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D). Normed queries and keys bound the logits, however large a robot's numbers are.
    Without, a large model is unstable in half precision."""

    def __init__(self, width, n_heads, norm):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (Norm(width // n_heads, norm) for _ in range(2))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        h = attention(self.q_norm(q), self.k_norm(k), v)                        # [7] (B, heads, N, d)
        return self.proj(h.transpose(1, 2).flatten(2))


class NormedCrossAttention(nn.Module):
    """Tokens (B, N, D) read a condition whose keys and values are computed beforehand."""

    def __init__(self, width, n_heads, norm):
        super().__init__()
        self.n_heads = n_heads
        self.q, self.kv, self.proj = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.q_norm, self.k_norm = (Norm(width // n_heads, norm) for _ in range(2))

    def keys_values(self, condition):
        """(B, M, D) -> k, v, each (B, heads, M, d)."""
        k, v = self.kv(condition).unflatten(-1, (2, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.k_norm(k), v

    def forward(self, x, k, v, bias=None):
        """x (n B, N, D): n draws of each item, all items once, then again. As n N queries of one item they
        need no copies of its keys and values."""
        N, B = x.shape[1], len(k)
        q = self.q(x).view(-1, B, N, self.n_heads, k.shape[-1]).permute(1, 3, 0, 2, 4)  # (B, heads, n, N, d)
        h = attention(self.q_norm(q).flatten(2, 3), k, v, bias)                 # [7] (B, heads, n N, d)
        return self.proj(h.unflatten(2, (-1, N)).permute(2, 0, 3, 1, 4).reshape_as(x))


class FeedForward(nn.Module):
    def __init__(self, width, out):
        super().__init__()  # the hidden layer is as wide as the input, not the usual 4 times
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
    """MLP of `layers` linear layers, from a modality's own width to the transformer's."""
    parts = [nn.Linear(dim, width)]
    for _ in range(layers - 1):
        parts += [nn.GELU(approximate="tanh"), nn.Linear(width, width)]
    return nn.Sequential(*parts)


def fourier(y, J):
    """y (..., U) -> (..., U (1 + 2 J)): y, sines, cosines."""
    angle = y[..., None] * math.pi * 2.0 ** torch.arange(J, device=y.device)    # (..., U, J)
    return torch.cat([y, angle.sin().flatten(-2), angle.cos().flatten(-2)], dim=-1)  # [10]


def time_embedding(t, dim=256):
    """Sinusoids of a time or a rate in Hz: (B,) -> (B, dim) float32, cosines first; differs from pi0.py's."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency                                      # [11]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_table(at, dim):
    """Positions (N,) -> (N, dim) float64, sines first: where the learned positions start."""
    angle = at[:, None].double() * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# ---------------------------------------------------------------- diffusion

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


@functools.lru_cache
def solver_times(K, steps):
    """Times visited, evenly from K - 1 down, then clean data, not 0. 5 of 1000: 999, 799, 599, 400, 200."""
    if not 1 <= steps <= max(K - 1, 1):
        raise ValueError(f"sampler steps {steps} must lie in 1..{max(K - 1, 1)}, below n_diffusion_steps")
    times = torch.linspace(0, K - 1, steps + 1, dtype=torch.float64, device="cpu").round().long()
    return times.tolist()[:0:-1]


def dpm_solver(denoise, x_t, alpha_bar, steps):
    """DPM-Solver++ of second order: from noise x_t to a sample, in `steps` calls of denoise(x_t, t) -> x0.
    Yields x after every step. X extrapolates x0 to the middle of a step; the last one (sigma = 0, e^-h = 0)
    gives x0 itself. Why x0 is predicted: at t = K - 1, where sampling starts, errors of eps would be divided
    by sqrt(alpha_bar), about 5e-5. Not clipped: data normalised by mean and deviation have no bounds."""
    times = solver_times(len(alpha_bar), steps)
    alpha = [math.sqrt(alpha_bar[t]) for t in times] + [1.0]
    sigma = [math.sqrt(1 - alpha_bar[t]) for t in times] + [0.0]
    lam = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma)]
    previous = None
    for i, t in enumerate(times):
        x0, h = denoise(x_t, t), lam[i + 1] - lam[i]
        X = x0 if i in (0, steps - 1) else x0 + h / (2 * (lam[i] - lam[i - 1])) * (x0 - previous)  # [5]
        x_t = sigma[i + 1] / sigma[i] * x_t + alpha[i + 1] * (1 - math.exp(-h)) * X  # [4]
        previous = x0
        yield x_t


def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


def draws(x, n):
    """n draws of noise and time share an observation: (B, ...) -> (n B, ...), all items once, then again."""
    return x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))


class RDT(nn.Module):
    """The policy. batch: see `loss`."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.places = {"action": slots(c.action_names), "state": slots(c.state_names)}
        self.kept = {}  # tokens that encoders which do not learn made of an instruction, of the background
        self.register_load_state_dict_post_hook(lambda model, _: model.kept.clear())
        if c.encoders != "none":
            self.vision = Siglip(c.vit_size, c.patch_size, c.vit_width, c.vit_depth, c.vit_mlp, c.vit_heads,
                                 c.checkpointing).requires_grad_(c.encoders == "train")
        if c.encoders in ("train", "frozen"):
            self.t5 = T5Encoder(c.vocab_size, c.t5_width, c.t5_depth, c.t5_heads, c.t5_head_dim, c.t5_mlp,
                                c.t5_buckets, c.t5_distance, c.checkpointing)
            self.t5.requires_grad_(c.encoders == "train")
        self.lang_adaptor, self.img_adaptor = (adaptor(D, c.width, 2) for D in (c.t5_width, c.vit_width))
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

    @torch.no_grad()
    def init_weights(self):
        c = self.config
        # Queries and keys of mean square 1 give logits of deviation 1: nearly even attention over hundreds of
        # tokens, in which the few that matter drown. A larger weight in the norms makes it choose.
        for name, m in self.named_modules():
            if isinstance(m, Norm):
                m.weight.fill_(c.qk_init if name.endswith(("q_norm", "k_norm")) else 1.0)
        for part in (self.lang_adaptor, self.img_adaptor, self.state_adaptor):  # torch's own rule
            for m in part[::2]:
                m.reset_parameters()
                m.weight.mul_(c.adaptor_init)
        for part in (self.t_embed, self.freq_embed, self.blocks, self.decoder):
            for m in part.modules():
                if isinstance(m, nn.Linear):
                    nn.init.xavier_uniform_(m.weight)
                    m.bias.zero_()
        for m in (self.t_embed[0], self.t_embed[2], self.freq_embed[0], self.freq_embed[2]):
            m.weight.normal_(std=0.02)
        # Positions: half of the channels for the kind of token (of a picture: its step), half for its place
        # (its camera). All words, all patches of a picture share a row: T5, SigLIP told them their places.
        table = lambda *halves: torch.cat([position_table(at, c.width // 2) for at in halves], dim=1)
        at = torch.arange(3 + c.horizon)
        picture = torch.arange(c.n_obs_steps * c.cameras).repeat_interleave(c.tokens_per_image)
        self.x_pos[0] = table(at.clamp(max=3), (at - 3).clamp(min=0))           # t, hz, state, a_1, a_2, ...
        self.lang_pos[0] = position_table(torch.zeros(c.text_len), c.width)
        self.img_pos[0] = table(picture // c.cameras, picture % c.cameras)
        for positions in (self.x_pos, self.lang_pos, self.img_pos):
            positions.mul_(c.pos_init)
        if c.encoders != "none":
            for m in self.vision.modules():
                if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                    m.reset_parameters()
            self.vision.position.normal_(std=c.image_init * c.vit_width ** -0.5)
            self.vision.patch.weight.mul_(c.image_init)
        if c.encoders in ("train", "frozen"):
            for m in self.t5.modules():
                if isinstance(m, nn.Linear):
                    m.weight.normal_(std=m.in_features ** -0.5)
            for layer in self.t5.layers:  # in place of the logits, which T5 does not divide by sqrt(d)
                layer.q.weight.mul_(c.t5_head_dim ** -0.5)
            self.t5.embed.weight.normal_()
            self.t5.relative.weight.normal_()  # so that heads differ in where they look from the start
        self.decoder.fc2.weight.zero_()  # at first, every action is predicted to be 0, the mean

    def unify(self, kind, x):
        """Actions or states (..., A) -> in their places (..., U), where packed ones are already."""
        return pack(x, self.places[kind], self.config.unified_dim) if self.places[kind] else x

    def valid(self, kind, batch):
        """Which places of the unified vector the robot of each item has, as 0 and 1: (B, U)."""
        if self.places[kind]:
            return self.unify(kind, batch["state"].new_ones(len(batch["state"]), len(self.places[kind])))
        if f"{kind}_valid" not in batch:
            raise ValueError(f"packed {kind}s need {kind}_valid (B, U): which dimensions each robot has")
        return batch[f"{kind}_valid"].float()

    def hide(self, batch):
        """[12], each with its own draw: state (hidden: the mean; shown: with noise), masks of state and
        actions (0), control frequency (0), every picture (the background), instruction (empty)."""
        c, state, device = self.config, batch["state"], batch["state"].device
        shown = lambda *shape: torch.rand(len(state), *shape, device=device) >= c.mask_prob
        mean, std = constants(c.state_mean or (0.0,), device), constants(c.state_std or (1.0,), device)
        noise = c.state_noise * std * torch.randn_like(state)
        if not self.places["state"]:  # packed: nothing on places that the robot lacks
            mean, noise = (x * self.valid("state", batch)[:, None] for x in (mean, noise))
        if not c.mask_prob:
            return batch | {"state": state + noise}
        hidden = batch | {"state": torch.where(shown(1, 1), state + noise, mean), "masks_shown": shown(1, 1)}
        hidden["control_hz"] = batch.get("control_hz", 0.0) * shown()           # [12]
        if V := c.cameras if "image_embeds" in batch else c.n_cameras:
            hidden["image_mask"] = shown(c.n_obs_steps, V) & (batch.get("image_mask", 1) > 0)
        told = shown(1)
        if "lang_embeds" in batch:
            if "empty_embeds" not in batch:
                raise ValueError("hidden instructions (mask_prob) take empty_embeds (B, n, D_t5)")
            lang, empty = batch["lang_embeds"], batch["empty_embeds"]
            L, n = lang.shape[1], empty.shape[1]
            hidden["lang_embeds"] = torch.where(told[..., None], lang, F.pad(empty, (0, 0, 0, L - n)))
            mask = batch.get("lang_mask", torch.ones_like(lang[..., 0])) > 0
            hidden["lang_mask"] = torch.where(told, mask, torch.arange(L, device=device) < n)
        elif "text" in batch:
            hidden["text"] = batch["text"] * told
            hidden["text"][:, :1] += ~told * (END if c.tokenizer_path else 0)
        return hidden

    def background(self, batch):
        """SigLIP's tokens of a picture without content, (B or 1, 1, 1, N, D_vit): given, or made here; once
        if SigLIP does not learn."""
        if "background_embeds" in batch:
            return batch["background_embeds"][:, None, None]
        if self.config.encoders == "none":
            raise ValueError("hidden pictures (mask_prob, image_mask) take background_embeds (B, N, D_vit)")
        tokens, size = self.kept.get("background"), self.vision.size
        if tokens is None:
            tokens = self.vision(self.img_pos.new_full((1, 3, size, size), BACKGROUND / 127.5 - 1))
        if self.config.encoders != "train":
            self.kept["background"] = tokens
        return tokens[:, None, None]

    def encode_images(self, batch):
        """Tokens of all pictures, the older step first, then place by place (B, To cameras N, D_vit): given,
        or SigLIP's. What image_mask hides, and cameras that the robot lacks, show the background."""
        c, x, mask = self.config, batch.get("image_embeds"), batch.get("image_mask")
        grid = len(batch["state"]), c.n_obs_steps, c.n_cameras if x is None else c.cameras  # (B, To, V)
        if x is not None:
            check_axes("image_embeds", x, (len(x), self.img_pos.shape[1], c.vit_width), "(B, M, vit_width)")
            x = x.unflatten(1, (*grid[1:], -1))                                 # (B, To, V, N, D_vit)
        elif c.encoders == "none":
            raise ValueError("encoders='none' takes image_embeds, 'images' and 'frozen' pictures")
        elif c.n_cameras:
            check_axes("images", batch["images"], grid, "(B, n_obs_steps, n_cameras)")
            images = batch["images"].flatten(0, 2)                              # (B To V, 3, H, W)
            if not images.is_floating_point():
                images = fit_square(images.float(), c.vit_size)                 # (B To V, 3, size, size)
            x = self.vision(images.to(self.vision.position.dtype)).unflatten(0, grid)
        if mask is not None and x is not None:
            check_axes("image_mask", mask, grid, "(B, n_obs_steps, cameras)")
            x = torch.where(mask[..., None, None] > 0, x, self.background(batch).to(x.dtype))
        if grid[2] < c.cameras:
            missing = self.background(batch).expand(*grid[:2], c.cameras - grid[2], -1, -1)
            x = missing if x is None else torch.cat([x, missing], dim=2)
        return x.flatten(1, 3)

    def encode_text(self, batch):
        """Tokens of the instruction (B, L, D_t5), given or T5's, and which of them are read (B, L): the real
        ones and the first, all that "" has. A T5 that does not learn reads each instruction once, unpadded;
        L is then that of the longest, and the host waits for the codes."""
        c, lang, text = self.config, batch.get("lang_embeds"), batch.get("text")
        if lang is None and c.encoders in ("none", "images"):
            raise ValueError(f"encoders={c.encoders!r} takes lang_embeds, 'frozen' text")
        mask = text > 0 if lang is None else batch.get("lang_mask", torch.ones_like(lang[..., 0])) > 0
        mask = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        if mask.shape[1] > c.text_len:
            raise ValueError(f"text of {mask.shape[1]} codes given, at most text_len = {c.text_len} expected")
        if lang is None and c.encoders == "train":
            lang = self.t5(text, mask)
        elif lang is None:
            texts = [tuple(codes[:n]) for codes, n in zip(text.tolist(), mask.sum(1).tolist())]
            for codes in {*texts} - {*self.kept}:
                real = torch.tensor([codes], device=text.device)
                self.kept[codes] = self.t5(real, real >= 0)[0]
            lang = nn.utils.rnn.pad_sequence([self.kept[codes] for codes in texts], batch_first=True)
            mask = mask[:, :lang.shape[1]]
        check_axes("lang_embeds", lang, (*mask.shape, c.t5_width), "(B, L, t5_width)")
        return lang, mask

    def encode(self, batch):
        """Everything that does not change from one diffusion step to the next, once per observation: keys and
        values of each block's condition, the state's numbers, the masks, the control frequency."""
        c, dtype = self.config, self.x_pos.dtype
        lang, mask = self.encode_text(batch)
        lang = self.lang_adaptor(lang.to(dtype)) + self.lang_pos[:, :lang.shape[1]]  # (B, L, D)
        images = self.img_adaptor(self.encode_images(batch).to(dtype)) + self.img_pos  # (B, M, D)
        bias = torch.where(mask, 0.0, MASKED)[:, None, None].to(dtype)          # (B, 1, 1, L)
        conditions = []
        for i, block in enumerate(self.blocks):
            tokens, token_bias = (images, None) if i % 2 else (lang, bias)      # [8]
            k, v = checkpointed(block.cross_attn.keys_values, c.checkpointing, tokens)
            conditions.append((k, v, token_bias))
        valid, state_valid = self.valid("action", batch)[:, None], self.valid("state", batch)[:, None]
        state = self.unify("state", batch["state"][:, -1:])                     # (B, 1, U)
        state = state * state_valid if c.masked else state
        masks = torch.cat([state_valid, valid.expand(-1, c.horizon, -1)], dim=1)  # (B, 1 + Tp, U)
        hz = batch.get("control_hz", torch.zeros(len(state), device=state.device))
        return {"conditions": conditions, "hz": hz, "state": state, "valid": valid,
                "masks": masks * batch.get("masks_shown", 1.0)}

    def denoise(self, encoded, x_t, t):
        """f_theta: x0 (n B, Tp, U) float32, predicted from x_t at times t (n B,)."""
        n, dtype = len(x_t) // len(encoded["hz"]), self.x_pos.dtype
        if self.config.masked:
            x_t = x_t * draws(encoded["valid"], n)
        numbers = torch.cat([draws(encoded["state"], n), x_t], dim=1)           # (n B, 1 + Tp, U)
        numbers = torch.cat([fourier(numbers, self.config.n_fourier), draws(encoded["masks"], n)], dim=-1)
        tokens = self.state_adaptor(numbers.to(dtype))                          # [9] (n B, 1 + Tp, D)
        time = self.t_embed(time_embedding(t).to(dtype))[:, None]               # (n B, 1, D)
        hz = draws(self.freq_embed(time_embedding(encoded["hz"]).to(dtype)), n)[:, None]
        x = torch.cat([time, hz, tokens], dim=1) + self.x_pos                   # (n B, 3 + Tp, D)
        for block, (k, v, bias) in zip(self.blocks, encoded["conditions"]):
            x = checkpointed(block, self.config.checkpointing, x, k, v, bias)
        return self.decoder(self.final_norm(x[:, 3:])).float()                  # [9]

    def loss(self, batch, noise=None, t=None):
        """Mean squared error of the predicted chunk over real steps (and numbers, see `masked`).

        batch: actions (B, Tp, A); action_mask (B, Tp), False past an episode's end, where the data repeat the
        last action; state (B, To, S); control_hz (B,), 0 or left out: not known; images (B, To, V, 3, H, W),
        uint8, or floats already fitted to vit_size and scaled to [-1, 1], or image_embeds (B, M, D_vit), with
        image_mask (B, To, cameras) if some are missing; text (B, L), or lang_embeds (B, L, D_t5) and
        lang_mask (B, L); beside embeddings what hidden ones show, background_embeds (B, N, D_vit) and
        empty_embeds (B, n, D_t5); packed: action_valid, state_valid (B, U). Masks are bool or 0 and 1. noise
        (n B, Tp, U), t (n B,), all items once, then again: drawn when not given.
        -> {"loss": (), "per_sample": (n B,), "t": (n B,) in [0, 1]}"""
        c, x0, mask = self.config, self.unify("action", batch["actions"]), batch["action_mask"]
        mask = torch.ones_like(mask) if c.train_on_padding else mask            # (B, Tp); x0 (B, Tp, U)
        B, n, K = len(x0), c.n_draws if noise is None else len(noise) // len(x0), c.n_diffusion_steps
        encoded = self.encode(self.hide(batch) if self.training and (c.mask_prob or c.state_noise) else batch)
        valid = self.valid("action", batch) if c.masked else torch.ones_like(x0[:, 0])
        x0, mask, valid = draws(x0, n), draws(mask, n), draws(valid, n)[:, None]
        noise = torch.randn_like(x0) if noise is None else noise
        if t is None:  # Beta(a, 1) has the distribution function b^a, which is inverted here
            dtype = torch.float32 if x0.device.type == "mps" else torch.float64  # mps has no float64
            b = torch.rand(n * B, dtype=dtype, device=x0.device) ** (1 / c.time_alpha)
            t = (K * b).long().clamp(max=K - 1)                                 # [3]
        alpha_bar = cosine_alpha_bar(K, x0.device)[t][:, None, None]            # (n B, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise            # [2]
        error = (self.denoise(encoded, x_t, t) - x0) ** 2 * valid               # (n B, Tp, U)
        error = error.sum(-1) / valid.sum(-1) * mask                            # (n B, Tp)
        per_sample = error.detach().sum(1) / mask.sum(1).clamp(min=1)
        return {"loss": error.sum() / mask.sum(), "per_sample": per_sample, "t": t / max(K - 1, 1)}  # [3]

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, guide=None):
        """Draw one chunk per observation: (B, Tp, A), packed (B, Tp, U), normalised; the policy executes the
        first Ta. batch: as in `loss`, without actions. steps: of the solver, else sampler_steps. noise
        (B, Tp, U): where to start, else drawn from `generator`. trace: receives x after every step.
        guide: for real-time chunking. guide(net, alpha, sigma, kind) returns what is called in place of the
        network net(x_t) of a step; x_t = alpha x0 + sigma eps, and kind says what net gives: "x0", "eps" or
        "v" = eps - x0."""
        c, steps = self.config, self.config.sampler_steps if steps is None else steps
        encoded, device, places = self.encode(batch), batch["state"].device, self.places["action"]
        shape = (len(batch["state"]), c.horizon, c.unified_dim)
        x_t = randn(shape, generator, device) if noise is None else noise.float()
        alpha_bar = alpha_bar_numbers(c.n_diffusion_steps)

        def denoise(x_t, t):
            net = lambda x: self.denoise(encoded, x, torch.full((len(x),), t, device=device))
            if guide is not None:
                net = guide(net, math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t]), "x0")
            return net(x_t)

        own = lambda x: unpack(x, places) if places else x * encoded["valid"]   # the robot's own numbers
        for x_t in dpm_solver(denoise, x_t, alpha_bar, steps):
            if trace is not None:
                trace.append(own(x_t))
        return own(x_t)

    def param_groups(self, weight_decay):
        """The original decays every parameter alike."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    @classmethod
    def from_official(cls, state_dict, config):
        """A policy with released weights: the diffusion transformer and its adaptors (RDTRunner), and, unless
        encoders is "none", SigLIP's and T5's in the same state_dict, under the names of transformers. config
        must describe it (PRESETS["1B"]). The tensors become the parameters as they are, nothing is copied."""
        weights = convert_official(state_dict)
        with torch.device("meta"):
            model = cls(config)
        load_strictly(model, weights)
        return model


# Official names -> ours, applied in this order: the runner, SigLIP, T5.
RENAMES = [
    (r"^module\.", ""), (r"^model\.", ""), (r"^(t|freq)_embedder\.mlp\.", r"\1_embed."),
    (r"^x_pos_embed$", "x_pos"), (r"^(lang|img)_cond_pos_embed$", r"\1_pos"),
    (r"^final_layer\.norm_final\.", "final_norm."), (r"^final_layer\.ffn_final\.", "decoder."),
    (r"^vision_model\.", "vision."),
    (r"\.embeddings\.patch_embedding\.", ".patch."), (r"\.encoder\.layers\.", ".layers."),
    (r"\.embeddings\.position_embedding\.weight", ".position"), (r"\.post_layernorm\.", ".norm."),
    (r"\.layer_norm([12])\.", r".norm\1."), (r"\.self_attn\.out_proj\.", ".out."),
    (r"\.self_attn\.([qkv])_proj\.", r".\1."), (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"^(shared|encoder\.embed_tokens)\.", "t5.embed."), (r"^encoder\.final_layer_norm\.", "t5.norm."),
    (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", "t5.relative."),
    (r"^encoder\.block\.(\d+)\.", r"t5.layers.\1."), (r"\.layer\.0\.SelfAttention\.", "."),
    (r"\.layer\.([01])\.layer_norm\.", lambda m: f".norm{int(m[1]) + 1}."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".gate."), (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".up."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".down."),
]
# Not read: SigLIP's pooling head and text half, T5's decoder and the other name of its embedding.
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
            "time_alpha": 1.0, "mask_prob": 0.1, "state_noise": 0.01, "train_on_padding": True,
            "hide_before_start": True}
PRESETS = {
    "tiny": {},  # learns the built-in task on two CPU cores
    # 166,229,888 and 1,228,319,872 parameters, adaptors included; SigLIP 412,987,248, T5-XXL 4,762,310,656
    "170M": RELEASED | {"width": 1024, "depth": 14, "n_heads": 32},
    "1B": RELEASED | {"width": 2048, "depth": 28, "n_heads": 32},
}
FINE_TUNING = {"steps": 200_000, "batch_size": 32, "lr": 1e-4, "lr_schedule": "constant", "warmup": 0,
               "clip": 1.0, "betas": (0.9, 0.999), "weight_decay": 1e-2,
               "normalizer": "none"}  # rad and m as they are; grippers 0 .. 1, see configs/rdt_aloha.yaml
# ema_max: the policy that acts is an average of the weights over the run, which is less noisy than the last
# ones; its memory grows with the run, up to 1/(1 - ema_max) steps (ema_decay in train.py).
RECIPES = {
    # The task's instruction matters in one window of five only: batches of 32 or 64 were too small.
    "tiny": {"steps": 2000, "batch_size": 128, "lr": 1.5e-3, "warmup": 200, "clip": 1.0, "betas": (0.9, 0.95),
             "weight_decay": 1e-3, "ema_max": 0.995, "normalizer": "meanstd"},
    "170M": FINE_TUNING, "1B": FINE_TUNING,
}


# ---------------------------------------------------------------- a toy task

# Two robots with the same goals: one commands positions of its right arm, one velocities of its left arm.
ROBOTS = (("right_eef_pos_x", "right_eef_pos_y"), ("left_eef_vel_x", "left_eef_vel_y"))


def lamps_for_two_robots(B, config, generator):
    """Scenes with a red and a blue square, one left, one right; "r" or "b" asks for one of them, and the
    actions go there: as positions of the right arm at 10 Hz, or as velocities of the left one at 20 Hz.
    -> batch, the side that is asked for (B,): -1 left, 1 right; the robot (B,)"""
    red_side, colour, robot = torch.randint(2, (3, B), generator=generator)
    images = torch.zeros(B, 1, 1, 3, 16, 16, dtype=torch.uint8)
    for side in (0, 1):
        channel = torch.where(red_side == side, 0, 2)
        images[torch.arange(B), 0, 0, channel, 4:12, 8 * side + 2:8 * side + 6] = 255
    side = torch.where(colour == 0, red_side, 1 - red_side) * 2.0 - 1
    texts = torch.stack([config.encode_text(letter) for letter in "rb"])
    way = torch.linspace(0, 1, config.horizon)
    position = torch.stack([side[:, None] * way, way.expand(B, -1)], dim=-1)    # (B, Tp, 2)
    velocity = torch.stack([side, torch.ones(B)], dim=-1)[:, None].expand_as(position)
    both = torch.stack([pack(x, slots(names)) for x, names in zip((position, velocity), ROBOTS)])
    valid = torch.stack([pack(torch.ones(2), slots(names)) for names in ROBOTS])
    batch = {"images": images, "text": texts[colour], "state": torch.zeros(B, 1, 128),
             "actions": both[robot, torch.arange(B)], "control_hz": 10.0 * (1 + robot),
             "action_valid": valid[robot], "state_valid": valid[robot],
             "action_mask": torch.ones(B, config.horizon, dtype=torch.bool)}
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
    first, second = (((end - side).abs() < 0.3)[robot == r].float().mean().item() for r in (0, 1))
    print(f"chunks that end where asked: {100 * first:.1f} % of the first robot, {100 * second:.1f} % of the "
          "second (expected: at least 95; 50 without reading)")
    return min(first, second)


if __name__ == "__main__":
    main()
