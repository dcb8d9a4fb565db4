"""Diffusion Policy, Transformer variant: a robot's next actions drawn from a conditional diffusion model.

    Cheng Chi, Zhenjia Xu, Siyuan Feng, Eric Cousineau, Yilun Du, Benjamin Burchfiel, Russ Tedrake, Shuran
    Song: "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", arXiv:2303.04137
    official code: github.com/real-stanford/diffusion_policy (TransformerForDiffusion)

dp_cnn.py with another network: `diff dp_cnn.py dp_transformer.py` is the lesson. Loss, sampler and image
encoder are the same. Every action of the chunk is a token, which looks at the actions before it and at the
observations up to its own time. O conditions every step but is not itself predicted (p(A | O), not p(A, O)).

Axes: B batch, T tokens (one per step of the chunk), M condition tokens (the diffusion step and To
observations), D width, H heads, L layers, A action dimensions, V cameras, C channels.
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
    [7]  condition tokens m = E([e(t), W o_1, .., W o_To] + positions); e(t) are the sinusoids of t, no more;
         E is an MLP that takes each token by itself, or a transformer encoder. Every layer of the decoder:
         x += SelfAttention(LN(x));   x += CrossAttention(LN(x), m);   x += MLP(LN(x))
    [8]  spatial softmax: p = softmax over the pixels of a channel; keypoint = (sum p x, sum p y)
    [9]  inpainting instead of tokens for O: x = [action, observation]; known entries are put back each step
    [10] causal masks: action i sees the actions j <= i, the step t, and the observations j <= i
           self-attention, T = 4      cross-attention, T = 4, To = 2
                 a0 a1 a2 a3                  t  o0 o1
             a0   x  .  .  .              a0  x  x  .    a0 belongs to the time of o0 and does not see the
             a1   x  x  .  .              a1  x  x  x    newest observation; it lies in the past, and is
             a2   x  x  x  .              a2  x  x  x    not executed
             a3   x  x  x  x              a3  x  x  x
    [11] cross-attention with its query and output matrices moved over to the condition, in every head:
         (W_q x + b_q) . k_m = x . (W_q^T k_m) + b_q . k_m   and   W_o (sum_m p_m v_m) = sum_m p_m (W_o v_m)
    [12] with inpainting the step may be a token among the actions, x = [e(t), x_0, .., x_{T-1}], and
         self-attention is all there is ("BERT")

Map: Config | Linear, SelfAttention, CrossAttention, Block, DecoderTransformer, BertTransformer | ResNet,
SpatialSoftmax, ImageEncoder | DiffusionPolicyTransformer: loss, sample, from_official | PRESETS | main.

Differs from the original:
 1. Steps past the end of an episode are left out of the loss. The original repeats the last action there and
    trains on it, with the plain mean over everything.
 2. A random crop can start at every offset; the original never draws the last one.
 3. Cross-attention is computed as [11]. The numbers are the same. M is small (3 for To = 2), which makes this
    less work in training, and in a sampler most of it is done once per chunk, for all steps.
 4. With inpainting the image encoder learns, through the known entries; the original cuts its gradient off.
 5. With pred_action_steps_only the network has Ta tokens; the original keeps positions and masks for Tp.
 6. The hybrid image policy's features are ordered [cameras, state] for every data set.

Run alone: `python dp_transformer.py` trains a small policy on paths around an obstacle, in about a minute on
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
    # "tokens": the actions cross-attend to it [7]; "inpaint": as known entries of the trajectory [9]
    conditioning: str = "tokens"
    # -- the transformer; in brackets the official names
    # "decoder": the diffusion step is a condition token; "bert": one among the actions [12] (time_as_cond)
    arch: str = "decoder"
    # D, width of a token (n_emb)
    width: int = 96
    # layers (n_layer)
    depth: int = 3
    # H, heads of every attention (n_head)
    n_heads: int = 4
    # layers of the condition's transformer encoder; 0 = an MLP per token (n_cond_layers)
    cond_depth: int = 0
    # True: the masks [10]; False: everyone sees everything (causal_attn)
    causal: bool = True
    # dropout of tokens + positions (p_drop_emb)
    embed_dropout: float = 0.0
    # dropout of attention weights, inside the MLP and of every branch before it is added (p_drop_attn)
    dropout: float = 0.0
    # -- the image encoder
    # channels of the four ResNet stages (ResNet-18: 64, 128, 256, 512)
    resnet_widths: tuple = (64, 128, 256, 512)
    # keypoints of the spatial softmax
    n_keypoints: int = 32
    # height, width of the crop: random in training, centre in evaluation; () = the whole image
    crop_size: tuple = ()
    # its weight decay; that of the transformer is train.py's --weight_decay
    obs_encoder_weight_decay: float = 1e-6
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
        check_choice("conditioning", self.conditioning, ("tokens", "inpaint"))
        check_choice("arch", self.arch, ("decoder", "bert"))
        check_choice("prediction_type", self.prediction_type, ("eps", "x0"))
        check_choice("sampler", self.sampler, ("ddim", "ddpm"))
        check_choice("obs", self.obs, ("lowdim", "image"))
        if self.n_heads < 1 or self.width % self.n_heads or self.width % 2 or self.width < 4:
            raise ValueError(f"width {self.width} must be even and a multiple of n_heads = {self.n_heads}, "
                             f"because every head has width / n_heads units; at least 4")
        if self.n_obs_steps < 1 or self.n_obs_steps > self.horizon:
            raise ValueError(f"n_obs_steps {self.n_obs_steps} must lie between 1 and horizon {self.horizon}")
        if not 1 <= self.n_action_steps <= self.horizon - self.n_obs_steps + 1:
            raise ValueError(f"n_action_steps {self.n_action_steps} must lie between 1 and horizon - "
                             f"n_obs_steps + 1 = {self.horizon - self.n_obs_steps + 1}")
        if self.crop_size and any(c > s for c, s in zip(self.crop_size, self.image_size)):
            raise ValueError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}")
        if self.conditioning == "inpaint" and self.pred_action_steps_only:
            raise ValueError("pred_action_steps_only needs conditioning 'tokens': inpainting predicts "
                             "observed steps too")
        if self.arch == "bert" and (self.conditioning != "inpaint" or self.cond_depth):
            raise ValueError("arch 'bert' has no condition tokens: set conditioning to 'inpaint' and "
                             "cond_depth to 0")
        if not (0 <= self.dropout < 1 and 0 <= self.embed_dropout < 1):
            raise ValueError(f"dropout {self.dropout} and embed_dropout {self.embed_dropout} must lie "
                             f"between 0 and 1")
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
# The noise prediction network: a transformer over the steps of the chunk


def step_embedding(t, dim):
    """Sinusoids of the diffusion step, (...,) -> (..., dim), sines first. The exponent runs to 1 (half - 1
    in the denominator) as in Ho et al.; iDDPM and DiT differ in both."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def additive(mask):
    """Bool mask, True = visible -> what is added to attention scores: 0 or -inf."""
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


# oneDNN's matrix product, as torch.compile calls it; None where torch is built without oneDNN.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """nn.Linear, (..., D) -> (..., D'). A CPU that samples multiplies with oneDNN: MKL, to which torch leaves
    float32 products, does without AVX-512 on AMD processors and takes 1.5 (few rows) to 2.2 times as long."""

    def forward(self, x):
        training = torch.is_grad_enabled()
        if ONEDNN_LINEAR is None or training or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        return ONEDNN_LINEAR(x, self.weight, self.bias, "none", [], "")


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other. (B, T, D), mask (T, T) or None -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.in_proj = Linear(config.width, 3 * config.width)  # rows: queries, keys, values
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x, mask):
        B, T, D = x.shape
        qkv = self.in_proj(x).view(B, T, 3, self.n_heads, D // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # 3 x (B, H, T, D/H)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))                      # (B, T, D)


class CrossAttention(nn.Module):
    """Multi-head attention of T tokens to M condition tokens, computed as [11]: `memory` turns the condition
    into keys and values that are compared with x, and added to it, as they are."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.in_proj = Linear(config.width, 3 * config.width)  # rows: queries, keys, values
        self.out_proj = Linear(config.width, config.width)

    def memory(self, m, mask):
        """Condition tokens m (B, M, D), mask (M, T) -> keys, values (B, H, M, D), what is added to the
        scores (B, H, M, T)."""
        B, M, D = m.shape
        H, d = self.n_heads, D // self.n_heads
        w_q, w_kv = self.in_proj.weight.split([D, 2 * D])
        b_q, b_kv = self.in_proj.bias.split([D, 2 * D])
        k, v = F.linear(m, w_kv, b_kv).view(B, M, 2, H, d).unbind(2)            # 2 x (B, M, H, d)
        k = k / math.sqrt(d)
        keys = torch.einsum("bmhd,hdw->bhmw", k, w_q.view(H, d, D))             # [11] W_q^T k_m
        values = torch.einsum("bmhd,whd->bhmw", v, self.out_proj.weight.view(D, H, d))  # [11] W_o v_m
        bias = torch.einsum("bmhd,hd->bhm", k, b_q.view(H, d))[..., None]       # [11] b_q . k_m
        return keys, values, bias + mask                                        # [10]

    def forward(self, x, keys, values, bias):
        B, T, D = x.shape
        bias = bias.flatten(1, 2).transpose(1, 2)                               # (B, T, H M)
        scores = torch.baddbmm(bias, x, keys.flatten(1, 2).transpose(1, 2))     # (B, T, H M)
        p = scores.unflatten(-1, (self.n_heads, -1)).softmax(dim=-1)            # (B, T, H, M)
        p = F.dropout(p, self.dropout, self.training).flatten(2)
        return torch.baddbmm(self.out_proj.bias, p, values.flatten(1, 2))       # (B, T, D)


class Block(nn.Module):
    """Transformer layer, normalised before each branch. (B, T, D) -> (B, T, D). cross=False: without
    cross-attention, a layer of an encoder."""

    def __init__(self, config, cross):
        super().__init__()
        D = config.width
        self.norm_self, self.self_attn = nn.LayerNorm(D), SelfAttention(config)
        if cross:
            self.norm_cross, self.cross_attn = nn.LayerNorm(D), CrossAttention(config)
        self.norm_mlp, self.linear1, self.linear2 = nn.LayerNorm(D), Linear(D, 4 * D), Linear(4 * D, D)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, memory=None):
        B, T, D = x.shape
        x = x + self.drop(self.self_attn(self.norm_self(x), mask))              # [7]
        if memory is not None:
            x = x + self.drop(self.cross_attn(self.norm_cross(x), *memory))     # [7]
        h = self.drop(F.gelu(self.linear1(self.norm_mlp(x))))                   # (B, T, 4D); erf, not tanh
        return x + self.drop(self.linear2(h))                                   # [7]


class DecoderTransformer(nn.Module):
    """eps_theta: noised chunk (B, T, input_dim), memory -> (B, T, output_dim). Official:
    TransformerForDiffusion with time_as_cond.

    Traits of the official network that released weights depend on: no MLP behind the step's sinusoids, no
    norm on the condition, and a single norm at the decoder's end.
    """

    def __init__(self, input_dim, output_dim, obs_dim, config):
        super().__init__()
        T, D, M = config.pred_horizon, config.width, 1 + (config.n_obs_steps if obs_dim else 0)
        self.input_emb = Linear(input_dim, D)
        self.pos_emb = nn.Parameter(torch.zeros(1, T, D))
        self.obs_emb = Linear(obs_dim, D) if obs_dim else None
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, M, D))
        self.drop = nn.Dropout(config.embed_dropout)
        if config.cond_depth:
            self.cond_encoder = nn.Sequential(*[Block(config, cross=False) for _ in range(config.cond_depth)])
        else:
            self.cond_encoder = nn.Sequential(Linear(D, 4 * D), nn.Mish(), Linear(4 * D, D))
        self.tokens_mix = config.cond_depth > 0
        self.blocks = nn.ModuleList([Block(config, cross=True) for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(D), Linear(D, output_dim)
        i, m = torch.arange(T), torch.arange(M)
        see_all = not config.causal
        self.register_buffer("mask", None if see_all else additive(i <= i[:, None]), persistent=False)  # [10]
        # Token m of the condition is observation m - 1, except for the step, which is token 0.
        visible = (m[:, None] - 1 <= i) | see_all                               # [10] (M, T)
        self.register_buffer("memory_mask", additive(visible), persistent=False)
        init_weights(self)
        if not obs_dim:
            nn.init.zeros_(self.cond_pos_emb)

    def step_token(self, t):
        """t (N,) -> (N, 1, D)"""
        e = step_embedding(t, self.pos_emb.shape[-1]).to(self.pos_emb.dtype)
        return self.drop(e[:, None] + self.cond_pos_emb[:, :1])

    def obs_tokens(self, obs):
        """obs (B, To, O) -> (B, To, D); without observations (B, 0, D)"""
        if self.obs_emb is None:
            return self.cond_pos_emb[:, 1:].expand(len(obs), -1, -1)
        return self.drop(self.obs_emb(obs) + self.cond_pos_emb[:, 1:])

    def attended(self, tokens, mask):
        """Condition tokens (B, M, D) -> for every layer what cross-attention takes of them."""
        m = self.cond_encoder(tokens)                                           # [7] (B, M, D)
        return [block.cross_attn.memory(m, mask) for block in self.blocks]

    def memory(self, t, obs):
        """t (B,), obs (B, To, O) -> for every layer keys, values (B, H, M, D) and bias (B, H, M, T)."""
        return self.attended(torch.cat([self.step_token(t), self.obs_tokens(obs)], dim=1), self.memory_mask)

    def memories(self, levels, obs):
        """memory(t, obs) for every t of `levels` (steps,), one after the other."""
        B = len(obs)
        if self.tokens_mix:  # every condition token knows t: nothing can be kept from step to step
            yield from (self.memory(t.expand(B), obs) for t in levels)
            return
        # The MLP takes each token by itself: the observation's share is the same at every step.
        step = self.attended(self.step_token(levels), self.memory_mask[:1])     # L x 3 x (steps, H, 1, .)
        obs = self.attended(self.obs_tokens(obs), self.memory_mask[1:])         # L x 3 x (B, H, To, .)
        step, obs = [[torch.stack(layers) for layers in zip(*parts)] for parts in (step, obs)]
        for i in range(len(levels)):
            both = [torch.cat([a[:, i:i + 1].expand(-1, B, -1, -1, -1), b], dim=3) for a, b in zip(step, obs)]
            yield list(zip(*both))                                              # L x 3 x (B, H, M, .)

    def forward(self, x, memory):
        B, T, _ = x.shape
        x = self.drop(self.input_emb(x) + self.pos_emb)                         # (B, T, D)
        for block, layer_memory in zip(self.blocks, memory):
            x = block(x, self.mask, layer_memory)
        return self.head(self.norm(x))                                          # (B, T, output_dim)


class BertTransformer(nn.Module):
    """eps_theta without a condition: the diffusion step is the first token. Same interface as
    DecoderTransformer; `memory` is that token. Official: TransformerForDiffusion without time_as_cond."""

    def __init__(self, input_dim, output_dim, obs_dim, config):
        super().__init__()
        T, D = config.pred_horizon + 1, config.width
        self.input_emb = Linear(input_dim, D)
        self.pos_emb = nn.Parameter(torch.zeros(1, T, D))
        self.drop = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList([Block(config, cross=False) for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(D), Linear(D, output_dim)
        i = torch.arange(T)
        # The step's token comes first, so every action sees it, and it sees no action.
        mask = additive(i <= i[:, None]) if config.causal else None             # [10]
        self.register_buffer("mask", mask, persistent=False)
        init_weights(self)

    def memory(self, t, obs):
        """t (B,) -> (B, 1, D)"""
        return step_embedding(t, self.pos_emb.shape[-1]).to(self.pos_emb.dtype)[:, None]

    def memories(self, levels, obs):
        return self.memory(levels, obs)[:, None].expand(-1, len(obs), -1, -1)   # (steps, B, 1, D)

    def forward(self, x, memory):
        B, T, _ = x.shape
        x = torch.cat([memory, self.input_emb(x)], dim=1)                       # [12] (B, 1 + T, D)
        x = self.drop(x + self.pos_emb)
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x[:, 1:]))                                   # (B, T, output_dim)


def init_weights(network):
    """minGPT's: matrices and positions from N(0, 0.02^2), biases zero; norms stay at one and zero."""
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim > 1:
            nn.init.normal_(p, std=0.02)


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


class DiffusionPolicyTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.obs_dim = config.state_dim + config.n_cameras * 2 * config.n_keypoints
        network = {"decoder": DecoderTransformer, "bert": BertTransformer}[config.arch]
        if config.conditioning == "tokens":
            self.transformer = network(config.action_dim, config.action_dim, self.obs_dim, config)
        else:
            both = config.action_dim + self.obs_dim
            self.transformer = network(both, both, 0, config)
        self.encoders = nn.ModuleList([ImageEncoder(config) for _ in range(config.n_cameras)])
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
        features = [enc(images[:, :, v].flatten(0, 1)).unflatten(0, (B, n))
                    for v, enc in enumerate(self.encoders)]
        return torch.cat(features + [state], dim=-1)

    def condition(self, batch):
        """-> (what becomes tokens (B, To, obs_dim), known entries of the trajectory or None, which of them
        are known)."""
        obs = self.encode(batch)                                                # (B, n, obs_dim)
        B, n, D = obs.shape
        To, Tp, A = self.config.n_obs_steps, self.config.pred_horizon, self.config.action_dim
        if self.config.conditioning == "tokens":
            return obs[:, :To], None, torch.zeros(Tp, A, dtype=torch.bool, device=obs.device)
        known = torch.zeros(Tp, A + D, dtype=torch.bool, device=obs.device)
        known[:To, A:] = True
        return obs.new_zeros(B, 0, 0), F.pad(obs, (A, 0, 0, Tp - n)), known

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
        pred = self.transformer(x_t, self.transformer.memory(t, cond))
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
        # bfloat16 weights: the network in bfloat16, x_t in float32
        dtype = self.transformer.head.weight.dtype
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
        for i, memory in enumerate(self.transformer.memories(levels, cond)):
            out = self.transformer(x_t.to(dtype), memory).float()               # (B, Tp, D)
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
        """The transformer's matrices are decayed; its biases, norms and positions are not; the image encoders
        have a weight decay of their own."""
        matrices = [m.weight for m in self.transformer.modules() if isinstance(m, nn.Linear)]
        decayed = {id(p) for p in matrices}
        rest = [p for p in self.transformer.parameters() if id(p) not in decayed]
        encoders, encoder_decay = list(self.encoders.parameters()), self.config.obs_encoder_weight_decay
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0},
                {"params": encoders, "weight_decay": encoder_decay}]

    @classmethod
    def from_official(cls, state_dict, config):
        """A policy with the weights of a Diffusion Policy checkpoint (low-dimensional or hybrid image).

        config must describe it (PRESETS["lowdim"], "kitchen", "image"). Strict: one ValueError names every
        key that is missing, left over or has another shape. Normaliser entries are left to
        `official_normalizer`; buffers that hold constants are not read.
        """
        weights = convert_official(state_dict, config)
        model = cls(config)
        want = model.state_dict()
        problems = [f"missing {k}" for k in want if k not in weights]
        problems += [f"left over {k}" for k in weights if k not in want]
        problems += [f"{k} is {tuple(weights[k].shape)} and should be {tuple(want[k].shape)}"
                     for k in want if k in weights and weights[k].shape != want[k].shape]
        if ("model.mask" in state_dict) != config.causal:
            problems.append(f"causal should be {not config.causal}: the masks are stored with the weights")
        if problems:
            raise ValueError(f"these weights do not fit the configuration: {'; '.join(problems)}")
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_()


# Official names -> ours, applied in this order: the transformer, then torchvision's ResNet as the list of its
# children. An official encoder is the condition's or, in the BERT-like form, the whole network.
RENAMES = [
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.0\.nets\.", r"encoders.\1.resnet."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.1\.", r"encoders.\1.pool."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.3\.", r"encoders.\1.out."),
    (r"^model\.", "transformer."), (r"\.cond_obs_emb\.", ".obs_emb."), (r"\.ln_f\.", ".norm."),
    (r"\.decoder\.layers\.(\d+)\.norm2\.", r".blocks.\1.norm_cross."), (r"\.decoder\.layers\.", ".blocks."),
    (r"^transformer\.encoder\.(layers\.)?", "transformer.cond_encoder."),
    (r"\.norm1\.", ".norm_self."), (r"\.norm[23]\.", ".norm_mlp."), (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.in_proj_", ".in_proj."),
    (r"\.pool\.(nets\.)?(weight|bias)", r".keypoints.conv.\2"),
    (r"\.resnet\.0\.", ".resnet.conv1."), (r"\.resnet\.1\.", ".resnet.norm1."),
    (r"\.resnet\.([4-7])\.", lambda m: f".resnet.stages.{int(m[1]) - 4}."),
    (r"\.bn([12])\.", r".norm\1."), (r"\.downsample\.", ".shortcut."),
]
# The aliases of the encoder, constants of the architecture, and what belongs to the normaliser.
NOT_WEIGHTS = re.compile(r"(_dummy_variable|mask|pos_x|pos_y|temperature)$|^normalizer"
                         r"|^obs_encoder\.obs_nets\.[^.]+\.(backbone|pool)\.")


def convert_official(state_dict, config):
    """Rename the keys of an official state_dict (or of a part of it). What is to be renamed differs from file
    to file."""
    weights, cameras = {}, []
    for key, value in state_dict.items():
        if NOT_WEIGHTS.search(key):
            continue
        for pattern, ours in RENAMES:
            key = re.sub(pattern, ours, key)
        if config.arch == "bert":
            key = key.replace("transformer.cond_encoder.", "transformer.blocks.")
        name = re.match(r"encoders\.([^.]+)\.", key)
        if name and not name[1].isdigit():  # the original names its encoders after the cameras
            cameras += [] if name[1] in cameras else [name[1]]
            key = key.replace(name[0], f"encoders.{cameras.index(name[1])}.", 1)
        if key == "transformer.pos_emb" and config.pred_action_steps_only:
            value = value[:, :config.pred_horizon]  # the original has positions for the whole horizon
        weights[key] = value
    return weights


def official_normalizer(state_dict):
    """{"action": (scale, offset), ...} of an original checkpoint: normalised = raw * scale + offset."""
    prefix = "normalizer.params_dict."
    names = {k[len(prefix):].split(".")[0] for k in state_dict if k.startswith(prefix)}
    return {n: (state_dict[f"{prefix}{n}.scale"], state_dict[f"{prefix}{n}.offset"]) for n in sorted(names)}


Model = DiffusionPolicyTransformer

PRESETS = {
    # learns the built-in task in minutes on two CPU cores; x0, because eps takes several times as many steps
    # at this size
    "tiny": {"prediction_type": "x0"},
    "tiny_image": {"prediction_type": "x0", "obs": "image", "resnet_widths": (16, 32, 64, 128),
                   "n_keypoints": 16, "crop_size": (56, 56)},
    # Push-T from keypoints: 8,965,122 parameters
    "lowdim": {"width": 256, "depth": 8, "dropout": 0.01, "sampler": "ddpm", "sampler_steps": 100,
               "action_dim": 2, "state_dim": 20},
    # Franka kitchen: 80,415,753 parameters
    "kitchen": {"width": 768, "depth": 8, "dropout": 0.1, "n_obs_steps": 4, "sampler": "ddpm",
                "sampler_steps": 100, "action_dim": 9, "state_dim": 60},
    # robomimic from two cameras, absolute actions: 8,997,642 + 22,394,176 in the encoders
    "image": {"width": 256, "depth": 8, "dropout": 0.3, "horizon": 10, "sampler": "ddpm",
              "sampler_steps": 100, "obs": "image", "action_dim": 10, "state_dim": 9, "n_cameras": 2,
              "image_size": (84, 84), "crop_size": (76, 76)},
}

# What train.py takes for these presets unless it is told otherwise.
RECIPES = {
    "tiny": {"steps": 7000, "batch_size": 128, "lr": 2e-3, "weight_decay": 1e-3, "betas": (0.9, 0.95),
             "ema_max": 0.999, "eval_every": 1000},
    "tiny_image": {"steps": 2000, "batch_size": 64, "lr": 1e-3, "weight_decay": 1e-3, "betas": (0.9, 0.95),
                   "ema_max": 0.999, "eval_every": 500},
    "lowdim": {"steps": 350_000, "batch_size": 256, "lr": 1e-4, "warmup": 1000, "weight_decay": 1e-1,
               "betas": (0.9, 0.95)},
    "kitchen": {"steps": 350_000, "batch_size": 256, "lr": 1e-4, "warmup": 1000, "weight_decay": 1e-3,
                "betas": (0.9, 0.95)},
    "image": {"steps": 500_000, "batch_size": 64, "lr": 1e-4, "warmup": 1000, "weight_decay": 1e-3,
              "betas": (0.9, 0.95)},
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


def main(steps=1000):
    """Train on paths around an obstacle; print how many sampled paths keep clear of it, on both sides."""
    torch.manual_seed(0)
    config = Config(action_dim=2, state_dim=2, width=64, prediction_type="x0", dropout=0.0)
    model = DiffusionPolicyTransformer(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3), lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        state, actions = obstacle_paths(128, generator)
        batch = {"state": state, "actions": actions, "action_mask": torch.ones(128, 16, dtype=torch.bool)}
        loss = model.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
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
