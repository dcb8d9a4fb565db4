"""Diffusion Policy, Transformer variant: a robot's next actions drawn from a conditional diffusion model.

    Cheng Chi, Zhenjia Xu, Siyuan Feng, Eric Cousineau, Yilun Du, Benjamin Burchfiel, Russ Tedrake, Shuran
    Song: "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", arXiv:2303.04137
    official code: github.com/real-stanford/diffusion_policy (TransformerForDiffusion)

The policy is a distribution p(A | O) over a whole chunk of actions A, given the last observations O. It is a
distribution because demonstrators may pass an obstacle on either side: the mean, which regression learns,
hits it. A network learns to predict the noise in a noised chunk; sampling starts from pure noise and removes
it step by step. O is a condition: the joint p(A, O) would have to predict observations as well. Inpainting
[9] alone models the joint (of encoded observations); it is told the observed steps. This is dp_cnn.py with
another network: an action is a token that sees the actions before it and the observations up to its own time.
The paper turns to it where actions change fast, which convolutions smooth out; it is harder to tune.

Axes: B batch, T tokens (steps of the chunk), M condition tokens (t, To observations), D width, d = D / heads,
L layers, A action dimensions (in p(A | O): the chunk), input_dim A or A + obs_dim [9], V cameras, C channels.
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
    [7]  condition tokens m = E([e(t), W o_1, .., W o_To] + positions); e(t) are the sinusoids of t, no more;
         E is an MLP that takes each token by itself, or a transformer encoder. Every layer of the decoder:
         x += SelfAttention(LN(x));   x += CrossAttention(LN(x), m);   x += MLP(LN(x))
    [8]  spatial softmax: p = softmax over the pixels of a channel; keypoint = (sum p x, sum p y)
    [9]  inpainting instead of tokens for O: x = [action, observation]; known entries are put back each step
    [10] causal masks: an action sees the step t, and the actions and observations that are not later than it
           self-attention, T = 4      cross-attention, T = 4, To = 2
                 a0 a1 a2 a3                  t  o1 o2
             a0   x  .  .  .              a0  x  x  .    a0 belongs to the time of o1 and does not see the
             a1   x  x  .  .              a1  x  x  x    newest observation; it lies in the past, and is
             a2   x  x  x  .              a2  x  x  x    not executed. With pred_action_steps_only a0 is the
             a3   x  x  x  x              a3  x  x  x    present action: every action sees all of O
    [11] cross-attention with its query and output matrices moved over to the condition, in every head:
         (W_q x + b_q) . k_j = x . (W_q^T k_j) + b_q . k_j   and   W_o (sum_j p_j v_j) = sum_j p_j (W_o v_j)
    [12] "bert", for inpainting: the step is a token among the actions, [e(t), x_0, .., x_{T-1}]

Map: Config | SelfAttention, CrossAttention, Block, DecoderTransformer, BertTransformer | ResNet,
SpatialSoftmax, ImageEncoder | DiffusionPolicyTransformer: loss, sample, from_official | PRESETS | main.

Differs from the original:
 1. Past an episode's end the data repeat its last step, before its start the first. These actions are left
    out of the loss; the original trains on them, so that the policy learns to stay (train_on_padding).
 2. A random crop can start at every offset; the original never draws the last one.
 3. Cross-attention is computed as [11]. The numbers are the same. As M is small (3 for To = 2), a whole step
    of sampling takes 5 to 12 % less time than with plain attention to kept keys and values.
 4. With inpainting the image encoder learns, through the known entries; the original cuts its gradient off.
 5. With pred_action_steps_only positions and masks are those of the Ta tokens; the original's are for Tp.
 6. With images the features are ordered [cameras, state] for every data set.

Run alone: `python dp_transformer.py` learns paths around an obstacle in about a minute on two CPU cores.
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
    conditioning: str = "tokens"  # "tokens": O as condition tokens [7]; "inpaint": as known entries of x [9]
    # -- the transformer; in brackets the official names
    arch: str = "decoder"  # the step t is a condition; "bert": it is among the actions [12] (time_as_cond)
    width: int = 96  # D, width of a token (n_emb)
    depth: int = 3  # L, layers (n_layer)
    n_heads: int = 4  # heads of every attention (n_head)
    cond_depth: int = 0  # layers of the condition's encoder; 0 = an MLP for each token (n_cond_layers)
    causal: bool = True  # True: the masks [10]; False: every token sees all others (causal_attn)
    embed_dropout: float = 0.0  # dropout of tokens + positions (p_drop_emb)
    dropout: float = 0.0  # of attention weights, inside the MLP and of what a branch adds (p_drop_attn)
    # -- the image encoder
    resnet_widths: tuple = (64, 128, 256, 512)  # channels of the ResNet's stages; the default is ResNet-18's
    n_keypoints: int = 32  # keypoints of the spatial softmax
    crop_size: tuple = ()  # height, width: random in training, centre in evaluation; () = the whole image
    obs_encoder_weight_decay: float = 1e-6  # its weight decay; the transformer's is train.py's --weight_decay
    # -- the diffusion
    n_diffusion_steps: int = 100  # K, noise levels in training
    prediction_type: str = "eps"  # the network's output: "eps" or "x0" (official: `epsilon`, `sample`)
    sampler: str = "ddim"  # "ddim" or "ddpm"
    sampler_steps: int = 10  # noise levels visited when sampling; at most K
    spacing: str = "leading"  # which levels these are: "leading" or "trailing", see timetable
    clip_x0: float = 1.0  # bound of x0_hat [4], 0 = none; 1 fits actions that are normalised to [-1, 1]

    def __post_init__(self):
        check_choice("obs", self.obs, ("lowdim", "image"))
        check_choice("conditioning", self.conditioning, ("tokens", "inpaint"))
        check_choice("arch", self.arch, ("decoder", "bert"))
        check_choice("prediction_type", self.prediction_type, ("eps", "x0"))
        check_choice("sampler", self.sampler, ("ddim", "ddpm"))
        check_choice("spacing", self.spacing, ("leading", "trailing"))
        check_at_least(self, 0, "state_dim", "n_cameras", "cond_depth", "obs_encoder_weight_decay", "clip_x0")
        check_at_least(self, 1, "action_dim", "image_size", "horizon", "n_obs_steps", "n_action_steps",
                       "width", "depth", "n_heads", "resnet_widths", "n_keypoints", "crop_size",
                       "n_diffusion_steps")
        if len(self.image_size) != 2 or len(self.crop_size) not in (0, 2):
            raise ValueError(f"image_size {self.image_size}, crop_size {self.crop_size}: give height, width")
        if any(crop > size for crop, size in zip(self.crop_size, self.image_size)):
            raise ValueError(f"crop_size {self.crop_size} is larger than image_size {self.image_size}")
        if not self.resnet_widths or any(width % 16 for width in self.resnet_widths):
            raise ValueError(f"resnet_widths {self.resnet_widths} must be multiples of 16, a norm's group")
        if self.n_obs_steps + self.n_action_steps > self.horizon + 1:  # the present counts twice
            raise ValueError(f"n_obs_steps {self.n_obs_steps} + n_action_steps {self.n_action_steps} must be "
                             f"at most horizon {self.horizon} + 1")
        if self.conditioning == "inpaint" and self.pred_action_steps_only:
            raise ValueError("pred_action_steps_only needs conditioning 'tokens'")
        if self.width % self.n_heads or self.width % 2 or self.width < 4:
            raise ValueError(f"width {self.width} must be even, >= 4, a multiple of n_heads = {self.n_heads}")
        if self.arch == "bert" and (self.conditioning != "inpaint" or self.cond_depth):
            raise ValueError("arch 'bert' needs conditioning to be 'inpaint' and cond_depth to be 0")
        if not (0 <= self.dropout < 1 and 0 <= self.embed_dropout < 1):
            raise ValueError(f"dropout {self.dropout}, embed_dropout {self.embed_dropout} must be in [0, 1)")
        timetable(self.n_diffusion_steps, self.sampler_steps, self.spacing)

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


# ---------------------------------------------------------------- the network: a transformer over the chunk
def time_embedding(t, dim):
    """Sinusoids of the diffusion step, (...,) -> (..., dim), sines first. It differs from iDDPM's and DiT's:
    the exponent runs to 1 (half - 1 in the denominator), as in Ho et al., and theirs begin with cosines."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def additive(mask):
    """Bool mask, True = visible -> what is added to attention scores: 0 or -inf."""
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


def attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k' / sqrt(d) + mask) v over the last two axes: (..., N, d) -> (..., N, d). It differs from
    pi0.py's: weights may be dropped, and sampling, with few tokens, keeps the fused kernel in bfloat16."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16 or not v.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
    # In bfloat16 on a CPU, the fused kernel's backward pass takes four times as long as that of two products.
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits if mask is None else logits + mask.to(logits.dtype)
    return F.dropout(torch.softmax(logits, dim=-1, dtype=logits.dtype), dropout) @ v


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other. (B, T, D), mask (T, T) or None -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.in_proj = nn.Linear(config.width, 3 * config.width)  # rows: queries, keys, values
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x, mask):
        B, T, D = x.shape
        qkv = self.in_proj(x).view(B, T, 3, self.n_heads, D // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # 3 x (B, heads, T, d)
        x = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))                      # (B, T, D)


class CrossAttention(SelfAttention):
    """Multi-head attention of T tokens to M condition tokens, SelfAttention's parameters, computed as [11]:
    `memory` does all projections, once per condition; `forward` compares x with keys and sums values."""

    def memory(self, m, mask):
        """Condition tokens m (B, M, D), mask (M, T) -> keys, values (B, heads, M, D), and what is added to
        the scores, (B, heads, M, T)."""
        B, M, D = m.shape
        heads, d = self.n_heads, D // self.n_heads
        (w_q, w_kv), (b_q, b_kv) = (p.split([D, 2 * D]) for p in (self.in_proj.weight, self.in_proj.bias))
        k, v = F.linear(m, w_kv, b_kv).view(B, M, 2, heads, d).unbind(2)        # 2 x (B, M, heads, d)
        k = k / math.sqrt(d)
        keys = torch.einsum("bmhd,hdw->bhmw", k, w_q.view(heads, d, D))         # [11] W_q^T k_j
        values = torch.einsum("bmhd,whd->bhmw", v, self.out_proj.weight.view(D, heads, d))  # [11] W_o v_j
        bias = torch.einsum("bmhd,hd->bhm", k, b_q.view(heads, d))[..., None]   # [11] b_q . k_j
        return keys, values, bias + mask                                        # [10]

    def forward(self, x, keys, values, bias):
        bias = bias.flatten(1, 2).transpose(1, 2)                               # (B, T, heads M)
        scores = torch.baddbmm(bias, x, keys.flatten(1, 2).transpose(1, 2))     # (B, T, heads M)
        p = scores.unflatten(-1, (self.n_heads, -1)).softmax(dim=-1)            # (B, T, heads, M)
        p = F.dropout(p, self.dropout, self.training).flatten(2)
        return torch.baddbmm(self.out_proj.bias, p, values.flatten(1, 2))       # (B, T, D)


class Block(nn.Module):
    """Transformer layer, (B, T, D) -> (B, T, D), normalised before each branch: that trains more stably."""

    def __init__(self, config, cross):
        super().__init__()
        D = config.width
        self.norm_self, self.self_attn = nn.LayerNorm(D), SelfAttention(config)
        if cross:
            self.norm_cross, self.cross_attn = nn.LayerNorm(D), CrossAttention(config)
        self.norm_mlp, self.linear1, self.linear2 = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, memory=None):
        x = x + self.drop(self.self_attn(self.norm_self(x), mask))              # [7]
        if memory is not None:
            x = x + self.drop(self.cross_attn(self.norm_cross(x), *memory))     # [7]
        h = self.drop(F.gelu(self.linear1(self.norm_mlp(x))))                   # (B, T, 4D); erf, not tanh
        return x + self.drop(self.linear2(h))                                   # [7]


class DecoderTransformer(nn.Module):
    """eps_theta: noised chunk (B, T, input_dim), `memory` of t, O -> (B, T, output_dim). As in the official
    TransformerForDiffusion no MLP follows the step's sinusoids, and no norm the condition's encoder."""

    def __init__(self, input_dim, output_dim, obs_dim, config):
        super().__init__()
        T, D, M = config.pred_horizon, config.width, 1 + (config.n_obs_steps if obs_dim else 0)
        self.input_emb = nn.Linear(input_dim, D)
        self.pos_emb = nn.Parameter(torch.zeros(1, T, D))
        self.obs_emb = nn.Linear(obs_dim, D) if obs_dim else None
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, M, D))
        self.drop = nn.Dropout(config.embed_dropout)
        encoder = [Block(config, cross=False) for _ in range(config.cond_depth)]
        self.cond_encoder = nn.Sequential(*encoder or [nn.Linear(D, 4 * D), nn.Mish(), nn.Linear(4 * D, D)])
        self.tokens_mix = config.cond_depth > 0  # encoded, a condition token depends on the others
        self.blocks = nn.ModuleList([Block(config, cross=True) for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, output_dim)
        action, token = torch.arange(T), torch.arange(M)
        mask = additive(action <= action[:, None]) if config.causal else None   # [10] (T, T)
        self.register_buffer("mask", mask, persistent=False)
        # Token 0 is the step, token j the observation of time j - To, counted from now as first_action is.
        not_later = token[:, None] - config.n_obs_steps <= action + config.first_action  # (M, T)
        visible = not_later | (token[:, None] == 0) | (not config.causal)       # [10]
        self.register_buffer("memory_mask", additive(visible), persistent=False)
        init_weights(self)
        if not obs_dim:
            nn.init.zeros_(self.cond_pos_emb)  # as the original, which draws it only with observations

    def step_token(self, t):
        """t (N,) -> (N, 1, D)"""
        e = time_embedding(t, self.pos_emb.shape[-1]).to(self.pos_emb.dtype)
        return self.drop(e[:, None] + self.cond_pos_emb[:, :1])

    def obs_tokens(self, obs):
        """obs (B, To, obs_dim) -> (B, To, D); without observations (B, 0, D)"""
        if self.obs_emb is None:
            return self.cond_pos_emb[:, 1:].expand(len(obs), -1, -1)
        return self.drop(self.obs_emb(obs.to(self.pos_emb.dtype)) + self.cond_pos_emb[:, 1:])

    def keys_values(self, tokens, mask):
        """Condition tokens (B, M, D) -> L x (keys, values, bias), see CrossAttention.memory."""
        m = self.cond_encoder(tokens)                                           # [7] (B, M, D)
        return [block.cross_attn.memory(m, mask) for block in self.blocks]

    def memory(self, t, obs):
        """t (B,), obs (B, To, obs_dim) -> L x (keys, values (B, heads, M, D), bias (B, heads, M, T))."""
        tokens = torch.cat([self.step_token(t), self.obs_tokens(obs)], dim=1)
        return self.keys_values(tokens, self.memory_mask)

    def memories(self, levels, obs):
        """memory(t, obs) for every t of `levels` (steps,), one after the other."""
        B = len(obs)
        if self.tokens_mix:  # every condition token knows t: nothing can be kept from step to step
            yield from (self.memory(t.expand(B), obs) for t in levels)
            return
        # The MLP takes each token by itself: the observation's share is the same at every step.
        step = self.keys_values(self.step_token(levels), self.memory_mask[:1])  # L x 3 x (steps, heads, 1, .)
        obs = self.keys_values(self.obs_tokens(obs), self.memory_mask[1:])      # L x 3 x (B, heads, To, .)
        for i in range(len(levels)):
            yield [[torch.cat([s[i:i + 1].expand(B, -1, -1, -1), o], dim=2) for s, o in zip(*layer)]
                   for layer in zip(step, obs)]                                 # L x 3 x (B, heads, M, .)

    def forward(self, x, memory):
        x = self.drop(self.input_emb(x.to(self.pos_emb.dtype)) + self.pos_emb)  # (B, T, D)
        for block, layer_memory in zip(self.blocks, memory):
            x = block(x, self.mask, layer_memory)
        return self.head(self.norm(x)).float()                                  # (B, T, output_dim)


class BertTransformer(nn.Module):
    """eps_theta without a condition: the diffusion step is the first token, and `memory` is that token. The
    interface is DecoderTransformer's. Official: TransformerForDiffusion without time_as_cond."""

    def __init__(self, input_dim, output_dim, obs_dim, config):
        super().__init__()
        T, D = config.pred_horizon, config.width
        self.input_emb = nn.Linear(input_dim, D)
        self.pos_emb = nn.Parameter(torch.zeros(1, 1 + T, D))
        self.drop = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList([Block(config, cross=False) for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, output_dim)
        token = torch.arange(1 + T)
        # The step's token comes first, so every action sees it, and it sees no action.
        mask = additive(token <= token[:, None]) if config.causal else None     # [10]
        self.register_buffer("mask", mask, persistent=False)
        init_weights(self)

    def memory(self, t, obs):
        """t (B,) -> (B, 1, D)"""
        return time_embedding(t, self.pos_emb.shape[-1]).to(self.pos_emb.dtype)[:, None]

    def memories(self, levels, obs):
        yield from self.memory(levels, obs)[:, None].expand(-1, len(obs), -1, -1)  # steps x (B, 1, D)

    def forward(self, x, memory):
        x = torch.cat([memory, self.input_emb(x.to(self.pos_emb.dtype))], dim=1)  # [12] (B, 1 + T, D)
        x = self.drop(x + self.pos_emb)
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x[:, 1:])).float()                           # (B, T, output_dim)


def init_weights(network):
    """minGPT's: matrices and positions from N(0, 0.02^2), biases zero; norms stay at one and zero."""
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim > 1:
            nn.init.normal_(p, std=0.02)


# ---------------------------------------------------------------- the image encoder: ResNet-18 from scratch
class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions. (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, dim_in, dim_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(dim_out // 16, dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(dim_out // 16, dim_out)
        same = stride == 1 and dim_in == dim_out
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(dim_in, dim_out, 1, stride, bias=False), nn.GroupNorm(dim_out // 16, dim_out))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 up to its last feature map. (B, 3, H, W) -> (B, C, H/32, W/32), rounded up (four stages).
    Group norm instead of batch norm: the policy acts with a running average of its weights, which is less
    noisy (EMA in train.py; its decay rises from 0 to ema_max, so that the first weights are soon forgotten).
    Batch norm's running statistics would belong to the last weights, not to their average."""

    def __init__(self, widths):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.GroupNorm(widths[0] // 16, widths[0])
        self.stages = nn.Sequential(*[
            nn.Sequential(BasicBlock(dim_in, dim_out, 1 if i == 0 else 2), BasicBlock(dim_out, dim_out, 1))
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
    """One camera: crop, ResNet, spatial softmax, linear, ReLU. (N, 3, H, W) -> (N, 2 n_keypoints). Bytes are
    scaled to [-1, 1]; float images must be scaled already."""

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
        scaled, x = x.is_floating_point(), x.to(self.out.weight.dtype)
        x = x if scaled else x / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x  # faster convolutions
        x = self.keypoints(self.resnet(x))                                      # (N, n_keypoints, 2)
        return F.relu(self.out(x.flatten(1)))                                   # the ReLU is robomimic's


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


class DiffusionPolicyTransformer(nn.Module):
    """p(A | O): encoders of the observation O, the transformer that denoises chunks A, loss and sampler."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.obs_dim = config.state_dim + config.n_cameras * 2 * config.n_keypoints
        network = {"decoder": DecoderTransformer, "bert": BertTransformer}[config.arch]
        tokens = config.conditioning == "tokens"
        dim = config.action_dim + (0 if tokens else self.obs_dim)
        self.transformer = network(dim, dim, self.obs_dim if tokens else 0, config)
        self.encoders = nn.ModuleList([ImageEncoder(config) for _ in range(config.n_cameras)])

    def encode(self, batch):
        """Observations, one vector for each of n steps: image features, then the state. -> (B, n, obs_dim)"""
        state, images = batch["state"], batch.get("images")  # (B, n, S), (B, n, V, 3, H, W)
        if not self.config.n_cameras:
            return state
        V = 0 if images is None else images.shape[2]
        if V != self.config.n_cameras:
            raise ValueError(f"images of {V} cameras given, n_cameras = {self.config.n_cameras} expected")
        B, n = images.shape[:2]
        encoders = enumerate(self.encoders)
        features = [enc(images[:, :, v].flatten(0, 1)).unflatten(0, (B, n)) for v, enc in encoders]
        return torch.cat(features + [state], dim=-1)

    def condition(self, batch):
        """-> cond (B, To, obs_dim), given (B, Tp, input_dim) or None, known (Tp, input_dim). When inpainting
        [9], `given` is a trajectory that holds the observations; `known` is True at those of the To steps."""
        obs = self.encode(batch)                                                # (B, n, obs_dim)
        B, n, _ = obs.shape
        To, Tp, A = self.config.n_obs_steps, self.config.pred_horizon, self.config.action_dim
        if self.config.conditioning == "tokens":
            return obs[:, :To], None, torch.zeros(Tp, A, dtype=torch.bool, device=obs.device)
        known = torch.zeros(Tp, A + self.obs_dim, dtype=torch.bool, device=obs.device)
        known[:To, A:] = True
        return obs.new_zeros(B, 0, 0), F.pad(obs, (A, 0, 0, Tp - n)), known

    def loss(self, batch, noise=None, t=None):
        """Mean squared error of the predicted noise (or chunk) over a batch's real steps, which weigh alike.
        Batches (accumulated, or of several processes) weigh alike too, however many real steps each has.

        batch: actions (B, Tp, A), action_mask (B, Tp), True: real; state (B, n, S), with n = n_obs_loaded;
        with cameras images (B, n, V, 3, H, W), uint8 or floats in [-1, 1]. noise (B, Tp, input_dim), t (B,):
        drawn if None. Time: t = 0 is almost data, t = K-1 noise. -> {"loss": (), "per_sample": (B,), each
        item's mean, "t": t / (K-1)}"""
        x0, mask = batch["actions"], batch["action_mask"]                       # (B, Tp, A), (B, Tp)
        mask = torch.ones_like(mask) if self.config.train_on_padding else mask
        cond, given, known = self.condition(batch)
        if given is not None:
            # The observations of all Tp steps are denoised too. Their encoder gets no gradient through this
            # target, which would be easiest if it encoded nothing: it learns through the known entries.
            x0 = torch.cat([x0, given[..., x0.shape[-1]:].detach()], dim=-1)    # (B, Tp, A + obs_dim)
        B, K = len(x0), self.config.n_diffusion_steps
        noise = torch.randn_like(x0) if noise is None else noise
        t = torch.randint(K, (B,), device=x0.device) if t is None else t
        alpha_bar = cosine_alpha_bar(K, x0.device)[t][:, None, None]            # (B, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise            # [2]
        if given is not None:
            x_t = torch.where(known, given, x_t)                                # [9] clean, not noised
        pred = self.transformer(x_t, self.transformer.memory(t, cond))
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
        default config.sampler_steps. noise (B, Tp, input_dim): where to start; step_noise: what DDPM adds, a
        tensor per step but the last; both are drawn from `generator` if None. trace: gets every (B, Tp, A).
        guide: for real-time chunking. guide(net, alpha, sigma, kind) returns what is called in place of the
        network net(x_t) of a step; x_t = alpha x0 + sigma eps, and kind says what net gives: "x0", "eps" or
        "v" = eps - x0.
        """
        config, To, A = self.config, self.config.n_obs_steps, self.config.action_dim
        steps = config.sampler_steps if steps is None else steps
        # The first level may lie below K - 1: near the top x_t holds little of the data, so noise will do.
        levels = timetable(config.n_diffusion_steps, steps, config.spacing)
        alpha_bars = alpha_bar_numbers(config.n_diffusion_steps)
        batch = {k: v[:, :To] if k in ("state", "images") else v for k, v in batch.items()}
        cond, given, known = self.condition(batch)
        shape, device = (len(cond), *known.shape), cond.device                  # (B, Tp, input_dim)
        x_t = randn(shape, generator, device) if noise is None else noise.float()
        if given is not None:
            x_t = torch.where(known, given, x_t)                                # [9]
        # Filled in number by number: a tensor made of a list would be copied from the host.
        t = torch.stack([torch.full((), level, device=device) for level in levels])
        memories = self.transformer.memories(t, cond)
        for i, level in enumerate(levels):
            last = i + 1 == len(levels)
            # After the last level come clean data: alpha_bar = 1, and no noise is added.
            alpha_bar, alpha_bar_prev = alpha_bars[level], 1.0 if last else alpha_bars[levels[i + 1]]
            net = lambda x, memory=next(memories): self.transformer(x, memory)
            if guide is not None:
                net = guide(net, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), config.prediction_type)
            out = net(x_t)                                                      # (B, Tp, input_dim)
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
        """The transformer's matrices are decayed, but not its biases, norms and positions; the image encoders
        have a weight decay of their own."""
        matrices = [m.weight for m in self.transformer.modules() if isinstance(m, nn.Linear)]
        decayed = {id(p) for p in matrices}
        rest = [p for p in self.transformer.parameters() if id(p) not in decayed]
        encoders, encoder_decay = list(self.encoders.parameters()), self.config.obs_encoder_weight_decay
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0},
                {"params": encoders, "weight_decay": encoder_decay}]

    @classmethod
    def from_official(cls, state_dict, config):
        """A policy with the weights of a Diffusion Policy checkpoint. config must describe it (the PRESETS
        "lowdim", "kitchen", "image"). The normaliser: `official_normalizer`."""
        if ("model.mask" in state_dict) != config.causal:
            raise ValueError(f"causal should be {not config.causal}: the masks are stored with the weights")
        weights = convert_official(state_dict, config)
        model = cls(config)  # not on the meta device: the masks are made here
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


# Official names -> ours, applied in this order: the transformer, torchvision's ResNet. An official encoder is
# the condition's or, with arch "bert", the whole network.
RENAMES = [
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.0\.nets\.", r"encoders.\1.resnet."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.1\.", r"encoders.\1.pool."),
    (r"^obs_encoder\.obs_nets\.([^.]+)\.nets\.3\.", r"encoders.\1.out."),
    (r"^model\.", "transformer."), (r"\.cond_obs_emb\.", ".obs_emb."), (r"\.ln_f\.", ".norm."),
    (r"\.decoder\.layers\.(\d+)\.norm2\.", r".blocks.\1.norm_cross."), (r"\.decoder\.layers\.", ".blocks."),
    (r"^transformer\.encoder\.(layers\.)?", "transformer.cond_encoder."),
    (r"\.norm1\.", ".norm_self."), (r"\.norm[23]\.", ".norm_mlp."), (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.in_proj_", ".in_proj."), (r"\.pool\.(nets\.)?(weight|bias)", r".keypoints.conv.\2"),
    (r"\.resnet\.0\.", ".resnet.conv1."), (r"\.resnet\.1\.", ".resnet.norm1."),
    (r"\.resnet\.([4-7])\.", lambda m: f".resnet.stages.{int(m[1]) - 4}."),
    (r"\.bn([12])\.", r".norm\1."), (r"\.downsample\.", ".shortcut."),
]
# Second names of the encoder's weights, constants, and the normaliser's entries.
NOT_WEIGHTS = re.compile(r"(_dummy_variable|mask|pos_x|pos_y|temperature)$|^normalizer"
                         r"|^obs_encoder\.obs_nets\.[^.]+\.(backbone|pool)\.")


def convert_official(state_dict, config):
    """Rename the keys of an official state_dict (or of a part of it). dp_cnn's differs: other names."""
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


# ---------------------------------------------------------------- presets
Model = DiffusionPolicyTransformer

PRESETS = {
    # Learns the built-in task in minutes on two CPU cores; at this size eps takes several times as many steps
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

# What train.py takes for these presets unless it is told otherwise; ema_max: the final decay of its EMA;
# dtype: on a CPU with instructions for it.
OFFICIAL = {"lr": 1e-4, "warmup": 1000, "betas": (0.9, 0.95)}  # at every size
RECIPES = {
    "tiny": {"steps": 7000, "batch_size": 128, "lr": 2e-3, "weight_decay": 1e-3, "betas": (0.9, 0.95),
             "ema_max": 0.999, "eval_every": 1000, "dtype": "bfloat16"},
    "tiny_image": {"steps": 2000, "batch_size": 64, "lr": 1e-3, "weight_decay": 1e-3, "betas": (0.9, 0.95),
                   "ema_max": 0.999, "eval_every": 500},
    "lowdim": OFFICIAL | {"steps": 350_000, "batch_size": 256, "weight_decay": 1e-1},
    "kitchen": OFFICIAL | {"steps": 350_000, "batch_size": 256, "weight_decay": 1e-3},
    "image": OFFICIAL | {"steps": 500_000, "batch_size": 64, "weight_decay": 1e-3},
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


def main(steps=1000):
    """Train on paths around an obstacle; print how many sampled paths keep clear of it, on both sides."""
    torch.manual_seed(0)
    config = Config(action_dim=2, state_dim=2, width=64, prediction_type="x0")
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
