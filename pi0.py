"""pi0: a vision-language model that draws a robot's next actions with flow matching.

    Kevin Black, Noah Brown, Danny Driess, Adnan Esmail, Michael Equi, Chelsea Finn, Niccolo Fusai, et al.:
    "pi0: A Vision-Language-Action Flow Model for General Robot Control", arXiv:2410.24164
    official code: github.com/Physical-Intelligence/openpi, and its port in github.com/huggingface/lerobot

Modelled is p(x0 | o): a chunk x0 of the next Tp actions, given an observation o = (images, instruction,
state: the robot's own pose). Not p(x0, o): nobody needs generated pictures, and o is encoded once per chunk.

A pretrained vision-language model (PaliGemma = SigLIP + Gemma) reads images and text. Beside it stands a
smaller transformer with weights of its own for what the robot is and does: the action expert. They meet in
the attention of every layer: each token is projected by the weights of its own model, and all of them share
one attention. Which query (row) sees which key (column):

                     images  text | state | a_1 ... a_Tp
    images, text        x      x  |   .   |      .        PaliGemma's weights. Nothing here sees the state or
    ----------------------------------------------------  the actions: computed once, kept as keys and values
    state               x      x  |   x   |      .        the expert's weights; the same at every t
    a_1 ... a_Tp        x      x  |   x   |      x        ... actions see each other in both directions

Missing cameras and padding behind the text are masked: nothing sees them, and positions [7] skip them.

TIME runs as in openpi, against the paper; released weights depend on it:
    here      t = 1 noise .. 0 data    x_t = t eps + (1 - t) x0            dx/dt = eps - x0, t goes down
    paper     tau = 1 - t              x_tau = tau x0 + (1 - tau) eps      dx/dtau = x0 - eps, tau goes up
The paper prints the target eps - x0 beside tau, which would lead away from the data: it belongs to t.

Axes: B items; To = 1 observed, Tp predicted, Ta executed steps; A, S numbers of an action, of a state; V
cameras; H, W pixels; L text codes; P prefix tokens (images and text); N queries, M keys of an attention; D
width, d width of a head; n draws of noise and time per observation.

    [1]  t = 0.001 + 0.999 b,   b ~ Beta(1.5, 1): density growing as sqrt(b), more practice at noisy times
    [2]  x_t = t eps + (1 - t) x0,   eps ~ N(0, I)                                             noising
    [3]  flow = mean (v_theta(x_t, t, o) - u_t)^2,   u_t = eps - x0                            flow matching
    [4]  text = - mean log p(l_j | images, l_1 .. l_{j-1}),   loss = flow + w text             one loss
    [5]  x_{t - dt} = x_t - dt v_theta(x_t, t, o),   dt = 1/10, from t = 1 to 0                Euler
    [6]  softmax(q [k_prefix, k_suffix]' / sqrt(d)) [v_prefix, v_suffix]                       one attention
    [7]  RoPE: components (i, i + d/2) of q and k turn by (position) 10000^(-2i/d)
    [8]  GeGLU: W_down (gelu(W_gate x) * W_up x)
    [9]  action token = W_2 silu(W_1 [W_in x_t, sin, cos of 2 pi t / period]): time enters here alone

[5] needs the mean of u_t over all pairs (x0, eps) whose lines [2] pass through x_t. It is unknown, but it is
what minimises [3], and [3] takes one pair at a time. Ten steps are enough because lines are straight: where o
leaves one chunk only, a single Euler step would land on it; paths bend where several are still possible.

Map: Config | Siglip | Gemma | block_mask, time | policy: loss, text, sample, from_official | PRESETS | main.

Differs from the original:
 1. The one attention is computed in two parts, prefix first, in training as in sampling. The numbers are the
    same, since the prefix does not see the suffix (the expert's tokens), and n draws of noise and time can
    share a prefix. The prefix's last layer stops at keys and values: the suffix reads nothing else.
 2. Steps past the end of an episode are left out of the loss. openpi trains on the last action, repeated, so
    that the policy learns to stay: `train_on_padding`.
 3. openpi's code trains no text. Here the text loss is a second pass over a share of the batch, with the mask
    that PaliGemma was trained with: a code sees the images and the codes before it, not those behind. Code 0,
    padding elsewhere, begins and ends a text.
 4. Images are augmented with `augment` only, each picture by draws of its own, in the ranges of openpi's
    PyTorch code, which draws once per camera and batch. (Its JAX code draws per picture, but recolours half
    of them; hues move there, and saturations, by an oversight, do not.) A camera that a robot lacks can be
    left out, which equals masking it.
 5. "tiny" is the published architecture with other sizes, bytes for text, two heads of keys and values,
    vectors without padding, 4 draws per observation, and larger initial queries, keys, patches and
    positions. Without these, attention starts nearly even, patches differ less from each other than words do,
    and the few tokens that matter (some letters, a small block) are lost among the rest.

Run alone, this file learns to obey a one-letter instruction, in half a minute on two CPU cores.
"""
import functools
import math
import re
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    # -- the data; train.py fills these in
    action_dim: int = 3         # A, numbers of one action
    state_dim: int = 3          # S, numbers of the state
    n_cameras: int = 2          # V, all through one encoder
    image_size: tuple = (64, 64)  # H, W of every camera image, pixels
    # -- the timeline, in control steps: the chunk starts now
    horizon: int = 16           # Tp, predicted steps (paper: H)
    n_obs_steps: int = 1        # To, observed steps: the present only
    n_action_steps: int = 8     # Ta, executed steps
    # -- what the weights are made for
    padded_dim: int = 0         # zeros pad a robot's vectors to this, so that robots share weights; 0 = none
    max_cameras: int = 3        # most cameras that are accepted
    text_len: int = 24          # L, longest instruction in codes
    vocab_size: int = 257       # number of codes; 257 = bytes + 1, 0 is padding
    tokenizer_path: str = ""    # SentencePiece model file; "" = bytes
    text_as_is: bool = False    # with tokenizer_path: LeRobot's way; False: openpi's, which cleans the text
    # -- SigLIP, the image encoder
    vit_size: int = 48          # side of the square that images are fitted into, pixels
    patch_size: int = 12        # side of a patch, pixels
    vit_width: int = 128        # width of its tokens
    vit_depth: int = 1          # ... layers
    vit_mlp: int = 256          # ... hidden width of the MLPs
    vit_heads: int = 4          # ... heads
    # True: pictures shrink as in openpi, every old pixel counts; False: as in LeRobot's port, a few do.
    # For openpi's own numbers, bytes rounded as Pillow does, fit them before: `images` of `processing`
    antialias: bool = False
    augment: bool = False       # True: cropped, turned and recoloured anew in every training step
    wrist_cameras: tuple = ()   # numbers, 0 .. V-1, of the cameras on a wrist, which are recoloured only
    # -- Gemma (prefix) and the action expert (suffix). Depth and heads are common: they meet in the attention
    depth: int = 4              # layers
    n_heads: int = 4            # heads of queries
    n_kv_heads: int = 2         # ... of keys and values; fewer: a smaller prefix to keep and to read per step
    head_dim: int = 32          # d, width of a head
    width: int = 128            # D of Gemma
    mlp: int = 256              # ... hidden width of its MLPs
    expert_width: int = 96      # D of the action expert
    expert_mlp: int = 192       # ... hidden width of its MLPs
    qk_init: float = 3.0        # factor on initial queries and keys; above 1: attention starts focused
    image_init: float = 5.0     # factor on initial patches and positions of SigLIP; its root on the projector
    # -- training and sampling
    n_draws: int = 4            # n, draws of noise and time per observation
    text_weight: float = 0.1    # w, weight of the text loss [4]; 0, or freeze_vlm: flow matching only
    text_share: float = 0.125   # share of the batch's observations in the text loss
    freeze_vlm: bool = False    # True: SigLIP and Gemma stay as they are, the expert learns
    train_on_padding: bool = False  # True: steps past an episode's end are trained on, as openpi does
    checkpointing: bool = False  # True: each layer is computed again in the backward pass instead of kept
    sampler_steps: int = 10     # Euler steps

    def __post_init__(self):
        may_be_0 = ("padded_dim", "text_weight", "wrist_cameras")
        check_at_least(self, 0, *may_be_0)
        check_at_least(self, 1, *[f.name for f in fields(self) if f.type in (int, tuple)
                                  and f.name not in may_be_0])
        check_at_least(self, 1e-6, "text_share", "qk_init", "image_init")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size {self.image_size} must be two numbers: height, width")
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps {self.n_obs_steps} must be 1: there is no history")
        if self.n_action_steps > self.horizon:
            raise ValueError(f"n_action_steps {self.n_action_steps} must lie in 1..horizon = {self.horizon}")
        if self.n_cameras > self.max_cameras:
            raise ValueError(f"{self.n_cameras} cameras, but there is room for {self.max_cameras}: name "
                             "those to use in shape_meta, or raise max_cameras")
        if any(camera >= self.n_cameras for camera in self.wrist_cameras):
            raise ValueError(f"wrist_cameras {self.wrist_cameras} must be numbers below n_cameras = "
                             f"{self.n_cameras}")
        for name in ("action_dim", "state_dim"):
            if 0 < self.padded_dim < (dim := getattr(self, name)):
                raise ValueError(f"{name} {dim} is above padded_dim {self.padded_dim}; from scratch, use 0")
        if not self.tokenizer_path and self.vocab_size < 257 and self.text_weight:
            raise ValueError(f"vocab_size {self.vocab_size} must be at least 257 for bytes")
        for name, part in (("vit_size", "patch_size"), ("vit_width", "vit_heads"), ("n_heads", "n_kv_heads")):
            a, b = getattr(self, name), getattr(self, part)
            if a % b:
                raise ValueError(f"{name} {a} must be a multiple of {part} {b}")
        if self.head_dim % 2 or self.expert_width % 2 or self.text_share > 1:
            raise ValueError(f"head_dim {self.head_dim} and expert_width {self.expert_width} must be even, "
                             f"text_share {self.text_share} at most 1")

    # Asked by the data: actions of a chunk, the step of its first one (0 = now), observed steps.
    pred_horizon = property(lambda self: self.horizon)
    first_action = property(lambda self: 0)
    n_obs_loaded = property(lambda self: self.n_obs_steps)

    def encode_text(self, text):
        """An instruction as codes, int64 (L,), 0 = padding: bytes + 1; with tokenizer_path its pieces, in the
        form that the weights were trained with: a beginning, the text, a line end. Pieces are cut to
        text_len as there, and then lack their end; bytes that are too many are refused."""
        if not self.tokenizer_path:
            codes = [byte + 1 for byte in text.encode()]
            if self.vocab_size != 257:
                raise ValueError(f"vocab_size {self.vocab_size} is not that of bytes, 257: tokenizer_path "
                                 "must name the SentencePiece file that goes with the weights")
            if len(codes) > self.text_len:
                raise ValueError(f"{len(codes)} codes, more than text_len {self.text_len}, in {text!r}")
        else:
            pieces = tokenizer(self.tokenizer_path)
            if (size := pieces.vocab_size()) != self.vocab_size:
                raise ValueError(f"{self.tokenizer_path} has {size} pieces, vocab_size is {self.vocab_size}")
            parts = [text.strip().replace("_", " ").replace("\n", " "), "\n"]
            if self.text_as_is:
                parts = [text if text.endswith("\n") else text + "\n"]
            codes = [pieces.bos_id()] + [code for part in parts for code in pieces.encode(part)]
            if len(codes) > self.text_len:
                warnings.warn(f"cut to text_len {self.text_len} codes, as in the original: {text!r}")
        return torch.tensor((codes + [0] * self.text_len)[:self.text_len])

    def decode_text(self, codes):
        """The text of one row of codes, without padding, halves of characters and spare codes."""
        codes = [int(c) for c in codes if c > 0]
        if self.tokenizer_path:
            pieces = tokenizer(self.tokenizer_path)
            return pieces.decode([c for c in codes if c < pieces.vocab_size()])
        return bytes(c - 1 for c in codes if c <= 256).decode(errors="ignore")


@functools.lru_cache
def tokenizer(path):
    try:
        import sentencepiece
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except ImportError:
        raise ValueError("tokenizer_path needs a package: pip install sentencepiece") from None
    except (OSError, RuntimeError) as e:
        raise ValueError(f"tokenizer_path {path} cannot be read ({' '.join(str(e).split())})") from None


def check_at_least(config, least, *fields):
    """Each of these fields, or every number of it if it is a tuple, is at least `least`."""
    for field in fields:
        value = getattr(config, field)
        if not all(x >= least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} {value} must be at least {least}")


# ---------------------------------------------------------------- SigLIP: patches of pictures become tokens

def fit_images(images, size, antialias=False):
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [-1, 1]: as large as fits, the rest black,
    bilinear, an odd row or column of black at the bottom or right."""
    H, W = images.shape[-2:]
    ratio = max(H, W) / size
    h, w = max(1, int(H / ratio)), max(1, int(W / ratio))
    if (h, w) != (H, W):
        images = F.interpolate(images, (h, w), mode="bilinear", align_corners=False, antialias=antialias)
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top)) * 2 - 1


def move_images(images):
    """Images (B, 3, H, W) with black = 0, as cameras would give them that were bumped: each is cropped to
    95 % at its own random place, brought to its size again and turned by up to 5 degrees either way. One
    resampling does all. What a turned corner misses is black."""
    B = len(images)
    draw = lambda most: most * (2 * torch.rand(B, device=images.device) - 1)
    angle, x, y = draw(math.radians(5)), draw(0.05), draw(0.05)     # x, y: the crop's centre, edges are +-1
    cos, sin = 0.95 * angle.cos(), 0.95 * angle.sin()
    place = torch.stack([cos, -sin, x, sin, cos, y], dim=-1).view(B, 2, 3)      # new pixel -> where it was
    grid = F.affine_grid(place, images.shape, align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=False)


def recolour_images(images):
    """Images (B, V, 3, H, W) in [0, 1] as another light would show them: each one's brightness times
    0.7 .. 1.3, then its contrast times 0.6 .. 1.4, then its saturation times 0.5 .. 1.5."""
    draw = lambda most: 1 + most * (2 * torch.rand(*images.shape[:2], 1, 1, 1, device=images.device) - 1)
    images = images * draw(0.3)
    mean = images.mean((2, 3, 4), keepdim=True)
    images = mean + (images - mean) * draw(0.4)
    grey = images.mean(2, keepdim=True)
    return (grey + (images - grey) * draw(0.5)).clamp(0, 1)


def augment_images(images, wrist_cameras):
    """Images (B, V, 3, H, W) in [-1, 1] as another day would give them. Cameras of the robot's wrists are not
    moved: they are fixed to the hand, and where things lie in their pictures says where the hand is."""
    images = images / 2 + 0.5
    images = [view if v in wrist_cameras else move_images(view) for v, view in enumerate(images.unbind(1))]
    return recolour_images(torch.stack(images, dim=1)) * 2 - 1


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


# ---------------------------------------------------------------- attention

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


# ---------------------------------------------------------------- Gemma: PaliGemma's, and the action expert

def product_dtype(x):
    """The type that matrix products of x have: autocast's where it is on. A mask of another type would be
    converted in every layer anew, and each result kept for the backward pass."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


class GemmaNorm(nn.Module):
    """x / sqrt(mean x^2) * (1 + weight), computed in float32. Stored as in Gemma: 0 changes nothing. Files
    differ in what comes with it: pi05.py has gates."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), 1e-6).to(x.dtype)


def rope_angles(positions, head_dim):
    """(cos, cos) and (-sin, sin) of the angles in [7] at positions (B, N), each (B, N, 1, d)."""
    frequency = 10000 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angle = positions[:, :, None, None] * frequency                             # (B, N, 1, d / 2)
    return torch.cat([angle.cos(), angle.cos()], dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + d/2) of x (B, N, heads, d). Other code bases pair neighbours, (2i, 2i + 1)."""
    x32 = x.float()
    return (x32 * cos + x32.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)  # [7]


class GemmaLayer(nn.Module):
    """One layer of one set of weights. (B, N, D) -> (B, N, D), and keys and values for later tokens. Norms
    differ by file."""

    def __init__(self, width, mlp, config):
        super().__init__()
        heads, kv_heads, d = config.n_heads, config.n_kv_heads, config.head_dim
        self.n_kv_heads, self.head_dim = kv_heads, d
        self.norm1 = GemmaNorm(width)
        self.q = nn.Linear(width, heads * d, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * d, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * d, width, bias=False)
        self.norm2 = GemmaNorm(width)
        self.gate, self.up = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x, rope, bias, past=None, cache_only=False):
        """cache_only: only keys and values are wanted."""
        N, h = x.shape[1], self.norm1(x)
        k, v = (f(h).unflatten(-1, (-1, self.head_dim)) for f in (self.k, self.v))
        k, v = rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)              # (B, kv heads, N, d)
        if cache_only:
            return None, (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, kv heads, M, d)
        q = rotate(self.q(h).unflatten(-1, (-1, self.head_dim)), *rope)         # (B, N, heads, d)
        # g = heads / kv heads share their keys: as g N queries of one head they need no copies of these.
        q = q.unflatten(2, (self.n_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, kv heads, gN, d)
        h = attention(q, k, v, bias)                                            # [6] (B, kv heads, gN, d)
        x = x + self.o(h.unflatten(2, (-1, N)).permute(0, 3, 1, 2, 4).flatten(2))
        h = self.norm2(x)
        x = x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))  # [8]
        return x, (k, v)


class Gemma(nn.Module):
    """A stack of layers: PaliGemma's language model or, narrower, the action expert. Norms differ by file."""

    def __init__(self, width, mlp, config):
        super().__init__()
        self.head_dim, self.group = config.head_dim, config.n_heads // config.n_kv_heads
        self.checkpointing = config.checkpointing
        self.layers = nn.ModuleList([GemmaLayer(width, mlp, config) for _ in range(config.depth)])
        self.norm = GemmaNorm(width)

    def forward(self, x, mask, positions, past=None, cache_only=False):
        """x (B, N, D); mask (B, N, M) bool, True = query may see key; positions (B, N); past: keys and values
        of every layer, which stand before x's own. cache_only: only the cache is wanted.
        -> ((B, N, D) or None, keys and values of every layer, `past` included)"""
        rope = rope_angles(positions, self.head_dim)
        bias = torch.where(mask, 0.0, MASKED).to(product_dtype(x))              # (B, N, M)
        bias = bias[:, None].repeat(1, 1, self.group, 1)                        # (B, 1, gN, M)
        cache = []
        for i, layer in enumerate(self.layers):
            last = cache_only and i + 1 == len(self.layers)
            x, keys_values = checkpointed(layer, self.checkpointing, x, rope, bias, past and past[i], last)
            cache.append(keys_values)
        return None if cache_only else self.norm(x), cache


# ---------------------------------------------------------------- masks, times, draws

def block_mask(valid, starts, first=0):
    """Who may see whom: valid (B, N) bool, starts (N,) with 1 where a block begins -> (B, N - first, N) bool,
    [query, key], of the queries from `first` on. A token sees its own block both ways and all blocks before
    it; padding neither sees nor is seen."""
    block = starts.cumsum(0)
    return (block[first:, None] >= block) & valid[:, None, :] & valid[:, first:, None]


def time_embedding(t, dim):
    """Sinusoids of t in [0, 1], (B,) -> (B, dim), sines first; differs from the diffusion models' in its
    periods, 0.004 to 4, so short that the last bit of a float32 angle is seen. (mps has no float64.)"""
    dtype = torch.float32 if t.device.type == "mps" else torch.float64
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, dim // 2, dtype=dtype, device=t.device)
    angle = t[:, None].to(dtype) * (2 * math.pi / period)                       # [9]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def sample_time(count, device):
    """`count` times of [1], by inverting b^1.5, the distribution function of Beta(1.5, 1). None of the ten
    steps starts below 0.001. Noisy times come more often: there o tells what is meant; near data x_t does."""
    return 0.001 + 0.999 * torch.rand(count, device=device) ** (1 / 1.5)        # [1]


def randn(shape, generator, device):
    """Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
    source = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=source).to(device)


def draws(x, n):
    """n draws of noise and time share an observation: (B, ...) -> (n B, ...), all items once, then again."""
    return x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))


class Pi0(nn.Module):
    """The policy. batch: see `loss`."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.vision = Siglip(c.vit_size, c.patch_size, c.vit_width, c.vit_depth, c.vit_mlp, c.vit_heads,
                             c.checkpointing)
        self.projector = nn.Linear(c.vit_width, c.width)
        self.embed = nn.Embedding(c.vocab_size, c.width)  # and the text head: a logit per row
        self.vlm = Gemma(c.width, c.mlp, c)
        self.expert = Gemma(c.expert_width, c.expert_mlp, c)
        self.state_proj = nn.Linear(c.padded_dim or c.state_dim, c.expert_width)
        self.action_in_proj = nn.Linear(c.padded_dim or c.action_dim, c.expert_width)
        self.action_time_mlp_in = nn.Linear(2 * c.expert_width, c.expert_width)
        self.action_time_mlp_out = nn.Linear(c.expert_width, c.expert_width)
        self.action_out_proj = nn.Linear(c.expert_width, c.padded_dim or c.action_dim)
        self.init_weights(self)
        for part in (self.vision, self.projector, self.embed, self.vlm):
            part.requires_grad_(not c.freeze_vlm)
        if not c.text_weight:  # then nothing reads these (difference 1), and DDP would wait for gradients
            last = self.vlm.layers[-1]
            for part in (last.q, last.o, last.norm2, last.gate, last.up, last.down, self.vlm.norm):
                part.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self, module):
        """Set every weight inside `module`: by torch's own rule where it has one; times qk_init in queries
        and keys, and image_init in what makes the tokens of a picture."""
        for m in module.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                m.reset_parameters()
            elif isinstance(m, GemmaNorm):
                m.weight.zero_()
            elif isinstance(m, nn.Embedding):
                m.weight.normal_(std=m.embedding_dim ** -0.5)
            elif isinstance(m, Siglip):
                m.position.normal_(std=m.position.shape[1] ** -0.5)
        for m in module.modules():
            if isinstance(m, GemmaLayer):
                m.q.weight.mul_(self.config.qk_init)
                m.k.weight.mul_(self.config.qk_init)
            elif isinstance(m, Siglip):
                m.patch.weight.mul_(self.config.image_init)
                m.position.mul_(self.config.image_init)
            elif m is self:
                m.projector.weight.mul_(self.config.image_init ** 0.5)

    def fit(self, images):
        """Pictures (B, 3, H, W) uint8, as the network sees them: (B, 3, vit_size, vit_size) float."""
        return fit_images(images.float() / 255, self.config.vit_size, self.config.antialias)

    def embed_images(self, batch):
        """-> tokens of all cameras (B, V patches, D), which of them are real (B, V patches)."""
        c, images = self.config, batch["images"]                                # (B, To, V, 3, H, W)
        grid = *images.shape[:2], c.n_cameras
        seen = batch.get("image_mask", images.new_ones(images.shape[:3]))       # (B, To, V)
        if images.shape[:3] != grid or seen.shape != grid:
            raise ValueError(f"images {tuple(images.shape[:3])}, image_mask {tuple(seen.shape)} given, "
                             f"(B, To, V) = {grid} with V = n_cameras = {c.n_cameras} expected")
        images = images[:, -1].flatten(0, 1)                                    # (B V, 3, H, W)
        if not images.is_floating_point():
            images = self.fit(images)
        if c.augment and self.training:
            images = augment_images(images.unflatten(0, (-1, c.n_cameras)), c.wrist_cameras).flatten(0, 1)
        x = self.vision(images.to(self.projector.weight.dtype))                 # (B V, patches, D_vit)
        x = self.projector(x).unflatten(0, (-1, c.n_cameras))                   # (B, V, patches, D)
        return x.flatten(1, 2), seen[:, -1].bool().repeat_interleave(x.shape[2], dim=1)

    def embed_text(self, text):
        """Codes (B, L) -> (B, L, D), scaled by sqrt(D) as in Gemma. Image tokens are not scaled, which ports
        of PaliGemma have wrong at times: tokens that are too small are drowned by what the first layer adds
        to them; too large, they hardly change from layer to layer."""
        c, L = self.config, text.shape[1]
        if L > c.text_len:
            raise ValueError(f"text of {L} codes given, at most text_len = {c.text_len} expected")
        return self.embed(text) * c.width ** 0.5

    def read_text(self, batch):
        """-> codes of the instruction (B, L), 0 where they are padding; which of them are real (B, L)."""
        real = batch.get("text_mask", batch["text"] > 0).bool()
        return batch["text"] * real, real

    def encode(self, batch, images, seen):
        """What the suffix reads of o: keys and values of every layer; which prefix tokens are real (B, P)."""
        text, real = self.read_text(batch)
        x = torch.cat([images, self.embed_text(text)], dim=1)                   # (B, P, D)
        valid = torch.cat([seen, real], dim=1)                                  # (B, P)
        mask = block_mask(valid, torch.zeros(x.shape[1], dtype=torch.int, device=x.device))  # one block
        _, cache = self.vlm(x, mask, valid.cumsum(1) - 1, cache_only=True)
        return cache, valid

    def embed_suffix(self, state, x_t, t):
        """State token and action tokens: (B, S), (B, Tp, A), (B,) -> (B, 1 + Tp, D)."""
        dtype = self.action_in_proj.weight.dtype
        state = self.state_proj(state.to(dtype))[:, None]                       # (B, 1, D)
        h = self.action_in_proj(x_t.to(dtype))                                  # (B, Tp, D)
        time = time_embedding(t, h.shape[-1]).to(h.dtype)[:, None].expand_as(h)
        h = self.action_time_mlp_in(torch.cat([h, time], dim=-1))
        return torch.cat([state, self.action_time_mlp_out(F.silu(h))], dim=1)   # [9]

    def velocity(self, cache, valid, state, x_t, t):
        """v_theta: the expert reads what `encode` kept and its own tokens. -> (B, Tp, A) float32"""
        x = self.embed_suffix(state, x_t, t)                                    # (B, N, D), N = 1 + Tp
        P, N = valid.shape[1], x.shape[1]
        starts = torch.zeros(P + N, dtype=torch.int, device=x.device)
        starts[P:P + 2] = 1  # the state begins a block, the first action begins the last one
        mask = block_mask(F.pad(valid, (0, N), value=True), starts, first=P)    # (B, N, P + N)
        positions = valid.sum(1, keepdim=True) + torch.arange(N, device=x.device)
        x, _ = self.expert(x, mask, positions, past=cache)
        return self.action_out_proj(x[:, -x_t.shape[1]:]).float()

    def pad(self, x):
        """A vector with the zeros that a shared action space needs."""
        return F.pad(x, (0, max(0, self.config.padded_dim - x.shape[-1])))

    def loss(self, batch, noise=None, t=None):
        """Flow matching on real actions, plus the weighted cross-entropy of the instruction. Time: t = 1 is
        noise, t = 0 data (paper: tau = 1 - t). Padded dimensions count, as in openpi.

        batch: actions (B, Tp, A); action_mask (B, Tp), False past an episode's end, where the data repeat the
        last action; state (B, 1, S); images (B, 1, V, 3, H, W), uint8, or floats already fitted to vit_size
        and scaled to [-1, 1], with image_mask (B, 1, V) if some are missing; text (B, L), with text_mask
        (B, L) if a code above 0 is padding. Masks are bool or 0 and 1. noise (n B, Tp, padded A), t (n B,),
        all items once, then again: drawn when not given.
        -> {"loss": (), "flow": (), "text": (), "per_sample": (n B,) of the flow, "t": (n B,)}"""
        c, x0, mask = self.config, self.pad(batch["actions"]), batch["action_mask"]
        mask = torch.ones_like(mask) if c.train_on_padding else mask            # (B, Tp); x0 (B, Tp, A)
        B, n = len(x0), c.n_draws if noise is None else len(noise) // len(x0)
        x0, mask = draws(x0, n), draws(mask, n)
        noise = torch.randn_like(x0) if noise is None else noise
        t = sample_time(n * B, x0.device) if t is None else t
        images, seen = self.embed_images(batch)
        cache, valid = self.encode(batch, images, seen)
        cache, valid = [(draws(k, n), draws(v, n)) for k, v in cache], draws(valid, n)
        state = draws(self.pad(batch["state"][:, -1]), n)
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * x0            # [2]
        u_t = noise - x0
        v_t = self.velocity(cache, valid, state, x_t, t)
        error = ((v_t - u_t) ** 2).mean(-1) * mask                              # (n B, Tp)
        flow = error.sum() / mask.sum()                                         # [3]
        result = {"loss": flow, "flow": flow.detach(), "t": t,
                  "per_sample": error.detach().sum(1) / mask.sum(1).clamp(min=1)}
        if c.text_weight and not c.freeze_vlm:
            few = math.ceil(B * c.text_share)
            text = self.text_loss(images[:few], seen[:few], self.read_text(batch)[0][:few])
            result |= {"loss": flow + c.text_weight * text, "text": text.detach()}  # [4]
        return result

    def text_logits(self, images, seen, text):
        """Logits of each code of the text (B, L), given the images and the codes before it: (B, L, vocab)."""
        L, P = text.shape[1], images.shape[1]
        x = torch.cat([images, self.embed_text(F.pad(text[:, :-1], (1, 0)))], dim=1)  # (B, P + L, D)
        valid = F.pad(seen, (0, L), value=True)
        starts = (torch.arange(P + L, device=x.device) >= P).int()  # every code is a block of its own: causal
        x, _ = self.vlm(x, block_mask(valid, starts), valid.cumsum(1) - 1)
        return (x[:, P:] @ self.embed.weight.T).float()

    def text_loss(self, images, seen, text):
        """Mean cross-entropy, nats per code, of the instruction (B, L) and the 0 that ends it."""
        logits = self.text_logits(images, seen, text)                           # (B, L, vocab)
        real = F.pad(text > 0, (1, 0), value=True)[:, :-1]  # the first 0 too: it ends a text
        error = F.cross_entropy(logits.transpose(1, 2), text, reduction="none")  # (B, L)
        return (error * real).sum() / real.sum()                                # [4]

    @torch.no_grad()
    def complete_text(self, batch, prompt):
        """The prompt (B, any), continued with the likeliest code each time: (B, L). The first 0 of a row is
        where the model takes over."""
        images, seen = self.embed_images(batch)
        text = F.pad(prompt, (0, self.config.text_len - prompt.shape[1]))
        given, going = text > 0, torch.ones(len(text), dtype=torch.bool, device=text.device)
        for j in range(text.shape[1]):
            code = self.text_logits(images, seen, text)[:, j].argmax(-1)        # (B,)
            text[:, j] = torch.where(given[:, j], text[:, j], code * going)
            going &= text[:, j] > 0                                             # 0 ends a text
        return text

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None, guide=None):
        """Draw one chunk per observation: (B, Tp, A), normalised units; the policy executes the first Ta.
        batch: as in `loss`, without actions. steps: of Euler, else sampler_steps. noise (B, Tp, padded A):
        where to start, else drawn from `generator`. trace: receives (B, Tp, A) after every step.
        guide: for real-time chunking. guide(net, alpha, sigma, kind) returns what is called in place of the
        network net(x_t) of a step; x_t = alpha x0 + sigma eps, and kind says what net gives: "x0", "eps" or
        "v" = eps - x0."""
        c, steps = self.config, self.config.sampler_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"sampler steps {steps} must be at least 1")
        cache, valid = self.encode(batch, *self.embed_images(batch))
        state = self.pad(batch["state"][:, -1])
        shape = (len(valid), c.horizon, c.padded_dim or c.action_dim)
        x_t = randn(shape, generator, valid.device) if noise is None else noise.float()
        for i in range(steps):
            # Not t - dt again and again: rounding errors add up, and the short periods of [9] show them.
            t = torch.full((len(valid),), 1 - i / steps, device=valid.device)
            net = lambda x: self.velocity(cache, valid, state, x, t)
            if guide is not None:
                net = guide(net, i / steps, 1 - i / steps, "v")
            x_t = x_t - 1 / steps * net(x_t)                                    # [5]
            if trace is not None:
                trace.append(x_t[..., :c.action_dim])
        return x_t[..., :c.action_dim]

    def param_groups(self, weight_decay):
        """The original decays every parameter alike."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    @classmethod
    def from_official(cls, state_dict, config):
        """A policy with released weights in openpi's PyTorch layout or LeRobot's (now or early 2025), or with
        those of PaliGemma alone, beside which the action expert starts fresh. config must describe it
        (PRESETS). The tensors become the parameters as they are, nothing is copied."""
        weights = convert_official(state_dict)
        if any(".dense." in key for key in weights):
            raise ValueError("these are weights of pi0.5: take pi05.py, or --model pi05")
        with torch.device("meta"):
            model = cls(config)
        if "embed.weight" in weights and not any(k.startswith(ACTION_PARTS) for k in weights):
            # PaliGemma alone; the last rows of its table are spare.
            table = weights["embed.weight"] = weights["embed.weight"][:config.vocab_size]
            for name in ACTION_PARTS:
                part = getattr(model, name).to_empty(device=table.device).to(table.dtype)
                model.init_weights(part)
                weights |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
        load_strictly(model, weights)
        return model


# What PaliGemma does not have.
ACTION_PARTS = ("expert", "state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out",
                "action_out_proj")
# Official names -> ours, applied in this order: prefixes of the layouts, SigLIP, Gemma, the time MLP.
RENAMES = [
    (r"^model\.", ""), (r"^paligemma_with_expert\.", ""), (r"^paligemma\.", ""), (r"^model\.", ""),
    (r"^gemma_expert\.(model\.)?", "expert."), (r"^language_model\.(model\.)?", "vlm."),
    (r"^vlm\.embed_tokens\.", "embed."), (r"^vlm\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.linear\.", "projector."), (r"^vision_tower\.vision_model\.", "vision."),
    (r"\.embeddings\.patch_embedding\.", ".patch."), (r"\.encoder\.layers\.", ".layers."),
    (r"\.embeddings\.position_embedding\.weight", ".position"), (r"\.post_layernorm\.", ".norm."),
    (r"\.layer_norm([12])\.", r".norm\1."), (r"\.self_attn\.out_proj\.", ".out."),
    (r"\.self_attn\.([qkvo])_proj\.", r".\1."), (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".\1."), (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."), (r"^time_mlp_", "action_time_mlp_"),
]
# Not read: the expert's unused text head, and what early LeRobot files carry besides.
NOT_WEIGHTS = re.compile(r"^expert\.lm_head\.|^(un)?normalize_")


def convert_official(state_dict):
    """Rename the keys of official weights (what is renamed differs from file to file). The tied embedding may
    stand under either of its two names."""
    weights = {}
    for key, value in state_dict.items():
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        if not NOT_WEIGHTS.search(key):
            weights[key] = value
    head = weights.pop("lm_head.weight", None)
    return weights if head is None else {"embed.weight": head} | weights


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


Model = Pi0

PRESETS = {
    "tiny": {},  # learns the built-in task on two CPU cores
    # The released size
    "pi0": {"text_len": 48, "horizon": 50, "n_action_steps": 50,
        "padded_dim": 32, "action_dim": 32, "state_dim": 32,
        "n_cameras": 3, "image_size": (224, 224), "vocab_size": 257152, "vit_size": 224, "patch_size": 14,
        "vit_width": 1152, "vit_depth": 27, "vit_mlp": 4304, "vit_heads": 16, "depth": 18, "n_heads": 8,
        "n_kv_heads": 1, "head_dim": 256, "width": 2048, "mlp": 16384, "expert_width": 1024,
        "expert_mlp": 4096, "qk_init": 1.0, "image_init": 1.0, "n_draws": 1, "text_weight": 0.0,
        "train_on_padding": True, "antialias": True, "augment": True},
}
# ema_max: the policy that acts is an average of the weights over the run, which is less noisy than the last
# ones; its memory grows with the run, up to 1/(1 - ema_max) steps (ema_decay in train.py). dtype: on a CPU
# with instructions for it.
RECIPES = {
    "tiny": {"steps": 4000, "batch_size": 32, "lr": 1.5e-3, "warmup": 200, "clip": 1.0, "betas": (0.9, 0.95),
             "weight_decay": 1e-3, "ema_max": 0.995, "dtype": "bfloat16"},
    # openpi's fine-tuning
    "pi0": {"normalizer": "meanstd",
        "steps": 30000, "batch_size": 32, "lr": 2.5e-5, "lr_schedule": "pi0", "warmup": 1000, "clip": 1.0,
        "betas": (0.9, 0.95), "weight_decay": 1e-10, "ema_max": 0.99},
}


# ---------------------------------------------------------------- a toy task

def two_lamps(B, config, generator):
    """Scenes with a red and a blue square, one left, one right; "r" or "b" asks for one of them, and the
    actions go there. -> batch, the side that is asked for (B,): -1 left, 1 right"""
    red_side, colour = torch.randint(2, (2, B), generator=generator)
    images = torch.zeros(B, 1, 1, 3, 16, 16, dtype=torch.uint8)
    for side in (0, 1):
        channel = torch.where(red_side == side, 0, 2)
        images[torch.arange(B), 0, 0, channel, 4:12, 8 * side + 2:8 * side + 6] = 255
    side = torch.where(colour == 0, red_side, 1 - red_side) * 2.0 - 1
    texts = torch.stack([config.encode_text(letter) for letter in "rb"])
    way = torch.linspace(0, 1, config.horizon)
    batch = {"images": images, "text": texts[colour], "state": torch.zeros(B, 1, 1),
             "actions": torch.stack([side[:, None] * way, way.expand(B, -1)], dim=-1),
             "action_mask": torch.ones(B, config.horizon, dtype=torch.bool)}
    return batch, side


def main(steps=500):
    """Train on two_lamps; print how many sampled chunks end where they were asked to."""
    torch.manual_seed(0)
    config = Config(action_dim=2, state_dim=1, n_cameras=1, image_size=(16, 16), horizon=8, text_len=2,
                    vit_size=16, patch_size=8, vit_width=48, vit_depth=1, vit_mlp=96, depth=2, width=64,
                    mlp=128, expert_width=64, expert_mlp=128)
    model = Model(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        batch, _ = two_lamps(32, config, generator)
        losses = model.loss(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  flow {losses['flow']:.4f}  text {losses['text']:.4f}")
    model.eval()
    batch, side = two_lamps(500, config, generator)
    chunk = model.sample(batch)                                                 # (500, 8, 2)
    right = ((chunk[:, -1, 0] - side).abs() < 0.3).float().mean().item()
    print(f"chunks that end where asked: {100 * right:.1f} % (expected: at least 95; 50 without reading)")
    return right


if __name__ == "__main__":
    main()
