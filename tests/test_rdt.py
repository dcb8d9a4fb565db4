"""rdt.py against the official implementation, against closed forms, and against what its docstring says."""

import dataclasses
import gzip
import json
import math
import os
import re
import time

import pytest
import torch
import torch.nn.functional as F
from golden_cases import GOLDEN_DIR, golden, manifest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rdt
from rdt import (
    ALOHA,
    PRESETS,
    RDT,
    UNIFIED,
    Config,
    T5Encoder,
    convert_official,
    cosine_alpha_bar,
    dpm_solver,
    pack,
    slots,
    unpack,
)

# -- the official implementation ---------------------------------------------------------------------------


def official_config(case):
    """The case's description of RDTRunner -> ours."""
    c = {k: v for k, v in case.config.items() if not k.startswith("_")}
    unknown = set(c) - {
        "rdt",
        "lang_adaptor",
        "img_adaptor",
        "state_adaptor",
        "scheduler",
        "A",
        "H",
        "Dl",
        "Di",
        "max_lang",
        "L",
        "N",
        "img_grid",
        "keep_pos_embed",
    }
    assert not unknown and set(c["rdt"]) == {"hidden_size", "depth", "num_heads"}, "arguments without a place"
    assert (c["lang_adaptor"], c["img_adaptor"], c["state_adaptor"]) == (
        "mlp2x_gelu",
        "mlp2x_gelu",
        "mlp3x_gelu",
    )
    s = c["scheduler"]
    assert (
        s["beta_schedule"] == "squaredcos_cap_v2"
        and s["prediction_type"] == "sample"
        and not s["clip_sample"]
    )
    To, V, N = c["img_grid"]
    return Config(
        action_dim=c["A"],
        state_dim=c["A"],
        unified_dim=c["A"],
        action_names=(),
        state_names=(),
        n_cameras=V,
        n_obs_steps=To,
        image_tokens=-N,
        horizon=c["H"],
        n_action_steps=1,
        text_len=c["max_lang"],
        t5_width=c["Dl"],
        vit_width=c["Di"],
        encoders="none",
        width=c["rdt"]["hidden_size"],
        depth=c["rdt"]["depth"],
        n_heads=c["rdt"]["num_heads"],
        norm="released",
        masked=False,
        n_draws=1,
        n_diffusion_steps=s["num_train_timesteps"],
        sampler_steps=s["num_inference_timesteps"],
    )


def official_batch(case, **inputs):
    inp = case.inp | inputs
    return {
        "actions": inp["action"],
        "action_valid": inp["action_mask"][:, 0],
        "state_valid": inp["action_mask"][:, 0],  # the original has one mask for both
        "state": inp["state"],
        "action_mask": torch.ones(inp["action"].shape[:2], dtype=torch.bool),
        "control_hz": inp["ctrl_freq"],
        "lang_embeds": inp["lang_tokens"],
        "lang_mask": inp["lang_mask"],
        "image_embeds": inp["img_tokens"],
    }


@golden("rdt.RDTRunner")
def test_golden(case):
    config = official_config(case)
    model = RDT.from_official(case.sd, config).eval()
    inputs = {
        "state": case.inp["state"].clone().requires_grad_(),
        "img_tokens": case.inp["img_tokens"].clone().requires_grad_(),
    }
    batch, inp = official_batch(case, **inputs), case.inp
    valid = inp["action_mask"]
    case.check("out/lang_cond", model.lang_adaptor(inp["lang_tokens"]))
    case.check("out/img_cond", model.img_adaptor(inp["img_tokens"]))
    rows = torch.cat([inp["state"], case.out["noisy_action"]], dim=1)
    case.check("out/state_cond", model.state_adaptor(torch.cat([rows, valid.expand_as(rows)], dim=-1)))
    case.check("out/pred", model.denoise(model.encode(batch), case.out["noisy_action"], inp["timesteps"]))

    result = model.loss(batch, noise=inp["noise"], t=inp["timesteps"])
    case.check("out/loss", result["loss"])
    result["loss"].backward()
    ours = {k: p.grad for k, p in model.named_parameters()}
    for key, want in case.grad.items():
        ((name, _),) = convert_official({key: want}).items()
        case.check(f"grad/{key}", ours[name])
    for name in case.grad_in:
        case.check(f"grad_in/{name}", inputs[name].grad)

    assert (
        rdt.solver_times(config.n_diffusion_steps, config.sampler_steps)
        == case.out["sample_timesteps"].tolist()
    )
    trace = []
    case.check("out/actions", model.sample(batch, noise=inp["init_noise"], trace=trace))
    with torch.no_grad():  # all places, those that the robot lacks among them
        encoded, K = model.encode(batch), config.n_diffusion_steps
        denoise = lambda x, t: model.denoise(encoded, x, torch.full((len(x),), t))
        alpha_bar = cosine_alpha_bar(K, "cpu").tolist()
        states = torch.stack([*dpm_solver(denoise, inp["init_noise"], alpha_bar, config.sampler_steps)])
    case.check("out/sample_trace", states)
    assert torch.equal(torch.stack(trace), states * valid)  # the caller is shown the robot's own

    config.norm = "true"  # what apex and newer timm compute
    with torch.no_grad():
        plain = RDT.from_official(case.sd, config).eval()
        pred = plain.denoise(plain.encode(batch), case.out["noisy_action"], inp["timesteps"])
    case.check("out/pred_plain_rms", pred)
    assert (pred - case.out["pred"]).abs().max() > 0.05 * case.out["pred"].square().mean().sqrt()


@golden("rdt.DPMSolverMultistepScheduler")
def test_golden_solver(case):
    c = case.config
    assert c["_model_output"] == "tanh(x) * cos(2*t/1000) + 0.1" and c["prediction_type"] == "sample"
    outputs, times = [], []

    def denoise(x, t):
        times.append(t)
        outputs.append(torch.tanh(x) * math.cos(2 * t / 1000) + 0.1)
        return outputs[-1]

    alpha_bar = cosine_alpha_bar(c["num_train_timesteps"], "cpu")
    trace = list(dpm_solver(denoise, case.inp["init"], alpha_bar.tolist(), c["_steps"]))
    assert times == case.out["timesteps"].tolist()
    case.check("out/trace", torch.stack(trace))
    case.check("out/model_outputs", torch.stack(outputs))
    sigmas = F.pad(((1 - alpha_bar) / alpha_bar).sqrt()[times], (0, 1))
    case.check("out/sigmas", sigmas)


@golden("rdt.SiglipVisionModel")
def test_golden_siglip(case):
    c = case.config
    weights = convert_official(case.sd)
    model = rdt.Siglip(
        c["image_size"],
        c["patch_size"],
        c["hidden_size"],
        c["num_hidden_layers"],
        c["intermediate_size"],
        c["num_attention_heads"],
    )
    model.load_state_dict({k.removeprefix("vision."): v for k, v in weights.items()})
    pixels, hidden = case.inp["pixel_values"].clone().requires_grad_(), []
    model.layers[0].register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    for layer in model.layers:
        layer.register_forward_hook(lambda m, args, out: hidden.append(out))
    out = model(pixels)
    for i, h in enumerate(hidden):
        case.check(f"out/hidden_{i}", h)
    case.check("out/last_hidden_state", out)
    loss = (out * case.inp["cotangent"]).mean()
    case.check("out/loss", loss)
    loss.backward()
    ours = {f"vision.{k}": p.grad for k, p in model.named_parameters()}
    for key, want in case.grad.items():
        ((name, _),) = convert_official({key: want}).items()
        case.check(f"grad/{key}", ours[name])
    case.check("grad_in/pixel_values", pixels.grad)


@golden("rdt.T5EncoderModel")
def test_golden_t5(case):
    c = case.config
    assert c["feed_forward_proj"] == "gated-gelu"
    model = T5Encoder(
        c["vocab_size"],
        c["d_model"],
        c["num_layers"],
        c["num_heads"],
        c["d_kv"],
        c["d_ff"],
        c["relative_attention_num_buckets"],
        c["relative_attention_max_distance"],
    )
    model.load_state_dict({k.removeprefix("t5."): v for k, v in convert_official(case.sd).items()})
    hidden, mask = [], case.inp["attention_mask"] > 0
    model.layers[0].register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    for layer in model.layers[:-1]:
        layer.register_forward_hook(lambda m, args, out: hidden.append(out))
    out = model(case.inp["input_ids"], mask)
    for i, h in enumerate([*hidden, out]):
        case.check(f"out/hidden_{i}", h)
    case.check("out/last_hidden_state", out)
    case.check(
        "out/position_bias", model.position_bias(out.shape[1]) + torch.zeros_like(case.out["position_bias"])
    )
    loss = (out * case.inp["cotangent"] * mask[..., None]).mean()
    case.check("out/loss", loss)
    loss.backward()
    ours = {f"t5.{k}": p.grad for k, p in model.named_parameters()}
    for key, want in case.grad.items():
        ((name, _),) = convert_official({key: want}).items()
        case.check(f"grad/{key}", ours[name])


FROZEN = {"encoders": "frozen", "tokenizer_path": "spiece.model"}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def meta(name):
    keys, n = manifest(name)
    return {k: torch.empty(shape, device="meta") for k, shape in keys.items()}, n


@pytest.mark.parametrize("preset, n", [("170M", 166_229_888), ("1B", 1_228_319_872)])
def test_published_sizes(preset, n):
    with torch.device("meta"):
        model = RDT(Config(**PRESETS[preset]))
    assert parameters(model) == n
    with torch.device("meta"):
        whole = RDT(Config(**PRESETS[preset] | FROZEN))
    assert [parameters(p) for p in (whole.vision, whole.t5)] == [412_987_248, 4_762_310_656]
    assert sum(p.numel() for p in whole.param_groups(0.0)[0]["params"]) == n  # the encoders stay


@pytest.mark.parametrize("preset, name", [("170M", "rdt_170m"), ("1B", "rdt_1b")])
def test_released_weights_load_on_the_meta_device(preset, name):
    official, n = meta(name)
    model = RDT.from_official({f"module.{k}": v for k, v in official.items()}, Config(**PRESETS[preset]))
    assert parameters(model) == n
    # Beside them SigLIP with its pooling head and T5, whose embedding has two names.
    whole = official | meta("siglip_so400m_patch14_384_vision")[0] | meta("t5_v1_1_xxl_encoder")[0]
    config = Config(**PRESETS[preset] | FROZEN)
    assert parameters(RDT.from_official(whole, config)) == n + 412_987_248 + 4_762_310_656
    del whole["encoder.embed_tokens.weight"]
    RDT.from_official(whole, config)
    with pytest.raises(ValueError, match="left over vision.patch.bias"):
        RDT.from_official(whole, Config(**PRESETS[preset]))


def test_from_official_names_everything_that_does_not_fit():
    official, _ = meta("rdt_170m")
    del official["model.t_embedder.mlp.0.bias"]
    official["extra"] = torch.empty(3, device="meta")
    official["model.x_pos_embed"] = torch.empty(1, 7, 9, device="meta")
    with pytest.raises(ValueError) as error:
        RDT.from_official(official, Config(**PRESETS["170M"]))
    for named in (
        "missing t_embed.0.bias",
        "left over extra",
        "x_pos is (1, 7, 9) and should be (1, 67, 1024)",
    ):
        assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_is_the_released_one():
    path = GOLDEN_DIR / "manifests" / "rdt_state_vector.json.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt") as f:
        assert json.load(f)["keys"] == UNIFIED


# -- what the tests below are made of

SMALL = {
    "image_size": (12, 16),
    "horizon": 5,
    "n_action_steps": 3,
    "text_len": 9,
    "vit_size": 16,
    "patch_size": 8,
    "vit_width": 16,
    "vit_depth": 1,
    "vit_mlp": 24,
    "vit_heads": 2,
    "t5_width": 16,
    "t5_heads": 2,
    "t5_head_dim": 8,
    "t5_mlp": 24,
    "width": 32,
    "n_heads": 2,
    "n_draws": 1,
    "depth": 2,
}
PACKED = {"action_dim": 128, "state_dim": 128, "action_names": (), "state_names": ()}


def small(seed=0, **changes):
    """A small model whose last layer is not zero, or nothing could be seen to matter."""
    torch.manual_seed(seed)
    model = RDT(Config(**SMALL | changes)).eval()
    torch.nn.init.normal_(model.decoder.fc2.weight, std=0.3)
    return model


def small_batch(config, B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    To, V, (H, W) = config.n_obs_steps, config.n_cameras, config.image_size
    text = torch.stack([config.encode_text(w) for w in ("red", "the blue", "")])[torch.arange(B) % 3]
    batch = {
        "actions": torch.rand(B, config.horizon, config.action_dim, generator=g) * 2 - 1,
        "text": text,
        "action_mask": torch.ones(B, config.horizon, dtype=torch.bool),
        "control_hz": torch.full((B,), 10.0),
        "state": torch.randn(B, To, config.state_dim, generator=g),
        "images": torch.randint(256, (B, To, V, 3, H, W), generator=g, dtype=torch.uint8),
    }
    if not config.action_names:
        batch |= {
            "action_valid": torch.rand(B, config.unified_dim, generator=g) < 0.3,
            "state_valid": torch.rand(B, config.unified_dim, generator=g) < 0.3,
        }
    return batch


def predict(model, batch, seed=1):
    g, c = torch.Generator().manual_seed(seed), model.config
    with torch.no_grad():
        x = torch.randn(len(batch["state"]), c.horizon, c.unified_dim, generator=g)
        return model.denoise(model.encode(batch), x, torch.full((len(x),), 400))


class KnownNetwork:
    """Stands in for the network: x0(x_t, t), and keeps what it was asked."""

    def __init__(self, model, x0):
        self.x0, self.seen = x0, []
        model.denoise = self

    def __call__(self, encoded, x_t, t):
        self.seen.append((x_t, t))
        return self.x0(x_t, t)


# -- closed forms: schedule, noising, loss, sampler


def test_the_schedule_is_the_squared_cosine():
    alpha_bar = cosine_alpha_bar(1000, "cpu")
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 10, 500, 900, 990):
        assert alpha_bar[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), rel=2e-3)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3, rel=1e-3)  # beta is clipped there


def test_the_ends_of_the_path_are_nearly_data_and_noise_and_between_lies_the_schedule():
    model = small()
    batch, noise = small_batch(model.config), torch.randn(3, 5, 128)
    known = KnownNetwork(model, lambda x, t: torch.zeros_like(x))
    model.loss(batch, noise=noise, t=torch.tensor([0, 500, 999]))
    ((x_t, _),) = known.seen
    x0, alpha_bar = pack(batch["actions"], slots(model.config.action_names)), cosine_alpha_bar(1000, "cpu")
    assert (x_t[0] - x0[0]).abs().max() < 0.05 and (x_t[2] - noise[2]).abs().max() < 1e-3
    middle = alpha_bar[500].sqrt() * x0[1] + (1 - alpha_bar[500]).sqrt() * noise[1]
    assert torch.allclose(x_t[1], middle, atol=1e-6)


def test_the_loss_asks_for_clean_actions_over_real_steps_and_the_robots_dimensions():
    model = small()
    batch, noise = small_batch(model.config), torch.randn(3, 5, 128)
    x0 = pack(batch["actions"], slots(model.config.action_names))
    KnownNetwork(model, lambda x, t: x0)
    assert model.loss(batch, noise=noise)["loss"] == 0
    KnownNetwork(model, lambda x, t: x0 + 1 + 100 * (x0 == 0))  # 100 in places that the robot lacks
    assert model.loss(batch, noise=noise)["loss"].item() == pytest.approx(1.0)
    KnownNetwork(model, lambda x, t: torch.zeros_like(x))
    batch["action_mask"][0, 2:] = False
    result = model.loss(batch, noise=noise, t=torch.tensor([0, 999, 333]))
    a = batch["actions"]
    real = torch.cat([a[0, :2].flatten(), a[1:].flatten()])
    assert result["loss"].item() == pytest.approx(real.square().mean().item(), rel=1e-5)
    assert result["per_sample"][0].item() == pytest.approx(a[0, :2].square().mean().item(), rel=1e-5)
    assert result["t"].tolist() == pytest.approx([0, 1, 333 / 999])


def test_the_released_loss_counts_all_dimensions():
    model = small(masked=False)
    batch, noise = small_batch(model.config), torch.randn(3, 5, 128)
    KnownNetwork(model, lambda x, t: torch.ones_like(x))
    x0 = pack(batch["actions"], slots(model.config.action_names))
    want = (1 - x0).square().mean()  # 125 of 128 ask for zeros
    assert model.loss(batch, noise=noise)["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_solver_times():
    assert rdt.solver_times(1000, 5) == [999, 799, 599, 400, 200]
    assert rdt.solver_times(1000, 1) == [999]


def test_a_network_that_knows_the_answer_is_believed_after_one_step_or_many():
    answer = torch.randn(2, 3)
    for steps in (1, 2, 5, 20):
        alpha_bar = cosine_alpha_bar(1000, "cpu").tolist()
        *_, end = dpm_solver(lambda x, t: answer, torch.randn(2, 3), alpha_bar, steps)
        assert torch.allclose(end, answer, atol=1e-6)


def test_the_solver_is_of_second_order_on_gaussian_data():
    """For data N(m, s^2) the best x0 is linear in x_t; the exact flow keeps (x_t - alpha m) / deviation."""
    m, s, alpha_bar = 0.4, 0.3, cosine_alpha_bar(1000, "cpu").double()

    def best(x, t):
        a, v = alpha_bar[t].sqrt(), 1 - alpha_bar[t]
        return m + a * s**2 / (a**2 * s**2 + v) * (x - a * m)

    start = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = m + s * start  # alpha at the start is as good as 0
    errors = {
        n: ([*dpm_solver(best, start, alpha_bar.tolist(), n)][-1] - exact).abs().mean().item()
        for n in (10, 20, 40, 80)
    }
    # The last step, from t = 1000 / n to clean data, is of first order; before it errors fall as 1 / n^2.
    assert errors[10] > 1.8 * errors[20] > 3.2 * errors[40] and errors[80] < 0.01
    first_order = start
    for t, u in zip(rdt.solver_times(1000, 20), [*rdt.solver_times(1000, 20)[1:], None]):
        x0 = best(first_order, t)
        eps = (first_order - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()
        first_order = x0 if u is None else alpha_bar[u].sqrt() * x0 + (1 - alpha_bar[u]).sqrt() * eps
    assert errors[20] < 0.5 * (first_order - exact).abs().mean().item()  # first order is DDIM


def test_sampling_starts_from_the_given_noise_and_visits_the_times():
    model = small()
    known = KnownNetwork(model, lambda x, t: torch.full_like(x, 0.25))
    noise, trace = torch.randn(3, 5, 128), []
    chunk = model.sample(small_batch(model.config), noise=noise, trace=trace)
    assert torch.equal(known.seen[0][0], noise) and [t[0].item() for _, t in known.seen] == [
        999,
        799,
        599,
        400,
        200,
    ]
    assert chunk.shape == (3, 5, 3) and torch.allclose(chunk, torch.tensor(0.25)) and len(trace) == 5
    assert torch.equal(trace[-1], chunk)


# -- norms, attention, encoders


def test_the_two_norms():
    x, true, released = torch.randn(4, 8) + 3, rdt.Norm(8), rdt.Norm(8, "released")
    w = true.weight.data = released.weight.data = torch.rand(8)
    assert torch.allclose(true(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w, atol=1e-6)
    assert torch.allclose(released(x), x / (x.std(-1, keepdim=True) ** 2 + 1e-6).sqrt() * w, atol=1e-5)
    flat = torch.full((1, 8), 2.0)  # without variance the released one blows up
    assert true(flat).abs().max() <= 1.001 and released(flat).abs().max() > 100
    assert released(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["attn", "cross_attn"])
def test_queries_and_keys_are_normed_per_head(kind):
    """Their length does not matter, and the weight of the norms sets how sharp attention is."""
    block = small().blocks[0]
    x, c = torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    read = (
        (lambda: block.attn(x))
        if kind == "attn"
        else (lambda: block.cross_attn(x, *block.cross_attn.keys_values(c)))
    )
    part, base = getattr(block, kind), read()
    with torch.no_grad():
        (part.qkv if kind == "attn" else part.q).weight[:32] *= 7.0
    assert torch.allclose(read(), base, atol=1e-4)
    with torch.no_grad():
        part.q_norm.weight *= 2
    assert not torch.allclose(read(), base, atol=1e-2)
    part.q_norm.weight.data.zero_()  # no query: attention is even
    value = (block.attn.qkv(x)[..., 64:] if kind == "attn" else block.cross_attn.kv(c)[..., 32:]).mean(1)
    assert torch.allclose(read(), part.proj(value)[:, None].expand_as(x), atol=1e-4)


def test_t5_buckets():
    far = torch.tensor([0, -1, -7, -8, -127, -500, 1, 7, 8, 127, 500])
    assert rdt.t5_bucket(far, 32, 128).tolist() == [0, 1, 7, 8, 15, 15, 17, 23, 24, 31, 31]


def test_t5_reads_by_distance_and_not_behind_the_mask():
    torch.manual_seed(0)
    t5 = small().t5
    codes, mask = torch.randint(1, 200, (2, 8)), torch.arange(8) < torch.tensor([[5], [8]])
    base = t5(codes, mask)
    other = codes.clone()
    other[0, 5:] = 77
    assert torch.equal(t5(other, mask)[0, :5], base[0, :5]) and torch.equal(t5(other, mask)[1], base[1])
    swapped = codes[:, [1, 0, *range(2, 8)]]
    assert not torch.allclose(t5(swapped, mask)[:, [1, 0]], base[:, :2], atol=1e-3)  # order matters


def test_fourier_features_are_the_papers_and_the_release_has_none():
    v = torch.tensor([[0.5, -0.25]])
    assert torch.equal(rdt.fourier(v, 0), v)
    got, pi = rdt.fourier(v, 2)[0], math.pi
    want = (
        [0.5, -0.25]
        + [math.sin(a) for a in (pi / 2, pi, -pi / 4, -pi / 2)]
        + [math.cos(a) for a in (pi / 2, pi, -pi / 4, -pi / 2)]
    )
    assert torch.allclose(got, torch.tensor(want), atol=1e-6)
    model = small(n_fourier=2)
    assert (
        model.state_adaptor[0].in_features == 128 * 6 and predict(model, small_batch(model.config)).std() > 0
    )


def test_sinusoids_have_cosines_first():
    s = rdt.time_embedding(torch.tensor([0.0, 3.0]))
    assert s[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert s[1, [0, 128]].tolist() == pytest.approx([math.cos(3), math.sin(3)])
    assert s[1, 64].item() == pytest.approx(math.cos(3 / 100))


def test_initial_positions():
    """Half of the channels names the kind, half the place; as released, if pos_init is 1."""
    model = RDT(Config(**SMALL | {"pos_init": 1.0, "n_cameras": 2}))
    x, lang, img = model.x_pos[0], model.lang_pos[0], model.img_pos[0]
    assert torch.equal(lang, torch.cat([torch.zeros(9, 16), torch.ones(9, 16)], dim=1))
    assert torch.equal(x[:3, 16:], x[3:4, 16:].expand(3, 16)) and torch.equal(
        x[3:, :16], x[3:4, :16].expand(5, 16)
    )
    assert x[4, 16].item() == pytest.approx(math.sin(1)) and x[4, 24].item() == pytest.approx(math.cos(1))
    assert x[3, 0].item() == pytest.approx(math.sin(3))
    grid = img.reshape(2, 2, 4, 32)  # step, camera, patch
    assert torch.equal(grid, grid[:, :, :1].expand_as(grid))
    assert torch.equal(grid[0, 1, 0, :16], grid[0, 0, 0, :16]) and torch.equal(
        grid[1, 0, 0, 16:], grid[0, 0, 0, 16:]
    )
    assert not torch.equal(grid[1, 0, 0], grid[0, 0, 0]) and not torch.equal(grid[0, 1, 0], grid[0, 0, 0])
    assert torch.allclose(RDT(Config(**SMALL | {"pos_init": 0.1})).x_pos[0], 0.1 * x)


def test_a_fresh_network_predicts_zero_and_the_rest_is_initialised_as_released():
    torch.manual_seed(0)
    model = RDT(Config(**SMALL))
    assert (predict(model, small_batch(model.config)) == 0).all()
    w = model.blocks[0].attn.qkv.weight
    assert w.abs().max() <= math.sqrt(6 / (32 + 96)) and w.std().item() == pytest.approx(
        math.sqrt(2 / 128), rel=0.1
    )
    assert model.t_embed[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.blocks[1].cross_attn.kv.bias == 0).all()
    assert (model.blocks[0].attn.q_norm.weight == 1.75).all()


# -- meaning: who reads what


@pytest.mark.parametrize("masked", [True, False])
def test_padded_words_cannot_change_the_output(masked):
    model = small(masked=masked)
    batch = small_batch(model.config)
    tokens, mask = model.encode_text(batch)
    given = {k: v for k, v in batch.items() if k != "text"} | {"lang_embeds": tokens, "lang_mask": mask}
    base = predict(model, batch)
    assert torch.allclose(predict(model, given), base, atol=1e-5)  # embeddings instead of text
    junk = given | {"lang_embeds": torch.where(mask[..., None], tokens, 1e3)}
    assert torch.equal(predict(model, junk), predict(model, given))
    cut = batch | {"text": batch["text"][:, :8]}  # the longest has 8 letters
    assert torch.allclose(predict(model, cut), base, atol=1e-5)
    more = batch | {"text": model.config.encode_text("rex").expand(3, -1)}
    assert ((predict(model, more) - base).abs().amax((1, 2)) > 1e-4).all()


def test_dimensions_that_a_robot_lacks_cannot_change_the_output():
    model = small(**PACKED)
    batch, noise = small_batch(model.config), torch.randn(3, 5, 128)
    base = model.sample(batch, noise=noise)
    has, state_has = batch["action_valid"][:, None], batch["state_valid"][:, None]
    junk = batch | {
        "state": torch.where(state_has, batch["state"], 1e3),
        "actions": torch.where(has, batch["actions"], 1e3),
    }
    assert torch.equal(model.sample(junk, noise=torch.where(has, noise, -50.0)), base)
    t = torch.tensor([100, 500, 900])
    losses = [
        model.loss(b, noise=n, t=t)["loss"]
        for b, n in ((batch, noise), (junk, torch.where(has, noise, -50.0)))
    ]
    assert torch.equal(*losses)
    assert ((base != 0) == has.expand_as(base)).all()  # 0 where it has nothing
    moved = model.sample(batch | {"state": batch["state"] + 0.5 * state_has}, noise=noise)
    assert ((moved - base).abs().amax((1, 2)) > 1e-4).all()


def test_language_enters_the_even_blocks_and_images_the_odd_ones():
    """Each condition is taken out of one block after the other."""
    model = small(depth=4)
    batch = small_batch(model.config)
    with torch.no_grad():
        changed = {
            "text": batch | {"text": model.config.encode_text("other").expand(3, -1)},
            "images": batch | {"images": 255 - batch["images"]},
        }
        base = model.encode(batch)["conditions"]
        for name, parity in (("text", 0), ("images", 1)):
            other = model.encode(changed[name])["conditions"]
            differs = [not torch.equal(a[0], b[0]) for a, b in zip(base, other)]
            assert differs == [i % 2 == parity for i in range(4)], name
        assert [k.shape[2] for k, _, _ in base] == [9, 2 * 2 * 4] * 2  # words, patches
        assert [bias is not None for _, _, bias in base] == [True, False] * 2
        # With the odd blocks' cross-attention removed the pictures are gone, with the even ones' the text.
        for parity, lost, kept in ((1, "images", "text"), (0, "text", "images")):
            blind = small(depth=4)
            for block in blind.blocks[parity::2]:
                block.cross_attn.proj.weight.zero_()
            want = predict(blind, batch)
            assert torch.equal(predict(blind, changed[lost]), want)
            assert (predict(blind, changed[kept]) - want).abs().max() > 1e-4


def test_state_frequency_and_time_are_read():
    model = small()
    batch = small_batch(model.config)
    base = predict(model, batch)
    for change in ({"state": batch["state"] + 1}, {"control_hz": torch.full((3,), 25.0)}):
        assert ((predict(model, batch | change) - base).abs().amax((1, 2)) > 1e-5).all()
    older = batch | {"state": batch["state"].clone()}
    older["state"][:, 0] += 1  # of the state only the present is read
    assert torch.equal(predict(model, older), base)
    x = torch.randn(3, 5, 128)
    with torch.no_grad():
        early, late = (model.denoise(model.encode(batch), x, torch.full((3,), t)) for t in (10, 900))
    assert (early - late).abs().max() > 1e-4
    silent = {k: v for k, v in batch.items() if k != "control_hz"}
    assert torch.equal(predict(model, silent), predict(model, batch | {"control_hz": torch.zeros(3)}))


def test_missing_cameras_show_the_background():
    model = small(max_cameras=3)  # two cameras, three places
    batch = small_batch(model.config)
    base = predict(model, batch)
    full = small(max_cameras=3, n_cameras=3)
    grey = torch.full_like(batch["images"][:, :, :1], 127)
    assert torch.allclose(
        predict(full, batch | {"images": torch.cat([batch["images"], grey], dim=2)}), base, atol=1e-5
    )
    hidden = batch | {"image_mask": torch.tensor([[[True, False]] * 2] * 3)}
    shown = batch | {"images": batch["images"].clone()}
    shown["images"][:, :, 1] = 127
    assert torch.allclose(predict(model, hidden), predict(model, shown), atol=1e-6)
    assert ((predict(model, hidden) - base).abs().amax((1, 2)) > 1e-5).all()
    assert torch.isfinite(model.sample(hidden)).all()  # it still acts
    blind = small(n_cameras=0, obs="lowdim")  # no camera at all
    nothing = {k: v for k, v in batch.items() if k != "images"}
    one = small(n_cameras=1)
    assert torch.allclose(predict(blind, nothing), predict(one, batch | {"images": grey}), atol=1e-5)


def test_order_of_the_pictures():
    """Older step first, then camera by camera; the place in img_pos follows."""
    model, seen = small(), []
    model.vision.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    batch = small_batch(model.config)
    for step in range(2):
        for v in range(2):
            batch["images"][:, step, v] = 50 * (2 * step + v) + 20
    model.encode(batch)
    assert [round(p) for p in ((seen[0][:4, 0, 8, 8] + 1) * 127.5).tolist()] == [20, 70, 120, 170]


def test_images_are_padded_to_a_square_with_the_background():
    image = torch.full((1, 3, 12, 16), 255.0)
    square = rdt.fit_square(image, 16)[0, 0]
    assert (square[2:14] == 1).all() and torch.allclose(square[[0, 1, 14, 15]], torch.tensor(127 / 127.5 - 1))
    small_one = rdt.fit_square(torch.full((1, 3, 30, 30), 200.0), 16)
    assert small_one.shape == (1, 3, 16, 16) and torch.allclose(
        small_one, torch.tensor(200 / 127.5 - 1), atol=1e-5
    )
    assert rdt.fit_square(torch.rand(1, 3, 40, 20) * 255, 16).abs().max() <= 1


def test_training_hides_each_modality_with_its_own_draw():
    model = small(mask_prob=0.1).train()
    B = 4000
    batch = {
        "state": torch.ones(B, 2, 3),
        "control_hz": torch.full((B,), 10.0),
        "text": torch.ones(B, 9).long(),
        "images": torch.zeros(B, 2, 2, 3, 1, 1),
    }
    torch.manual_seed(0)
    hidden = model.hide(batch)
    gone = {
        "state": hidden["state"][:, 0, 0] == 0,
        "hz": hidden["control_hz"] == 0,
        "text": hidden["text"][:, 0] == 0,
        "mask": ~hidden["masks_shown"][:, 0, 0],
        **{f"image {i}": ~hidden["image_mask"].flatten(1)[:, i] for i in range(4)},
    }
    draws = torch.stack(list(gone.values())).float()
    assert (draws.mean(1) - 0.1).abs().max() < 0.02
    assert (draws.corrcoef() - torch.eye(8)).abs().max() < 0.08
    assert (hidden["state"] == hidden["state"][:, :1, :1]).all() and (
        hidden["text"] == hidden["text"][:, :1]
    ).all()
    real = batch | {"image_mask": torch.zeros(B, 2, 2, dtype=torch.bool)}
    assert not model.hide(real)["image_mask"].any()  # what is missing stays missing
    assert not torch.equal(model.hide(batch)["state"], batch["state"])
    noisy = small(mask_prob=0.1, state_noise=0.01).hide(batch)["state"]
    kept = noisy[noisy.abs() > 0.5]
    assert kept.std().item() == pytest.approx(0.01, rel=0.1)


def test_hiding_happens_in_training_only_and_leaves_the_target_alone():
    model = small(mask_prob=0.9)
    batch, noise, t = small_batch(model.config), torch.randn(3, 5, 128), torch.tensor([100, 500, 900])
    loss = lambda: model.loss(batch, noise=noise, t=t)["loss"].item()
    assert loss() == loss()
    want = loss()
    model.train()
    torch.manual_seed(0)
    assert loss() != want
    KnownNetwork(model, lambda x, t: pack(batch["actions"], slots(model.config.action_names)))
    assert loss() == 0


def test_noise_on_the_state_does_not_need_hiding():
    model = small(mask_prob=0.0, state_noise=0.5)
    batch = small_batch(model.config)
    noise, t = torch.randn(3, 5, 128), torch.full((3,), 999)
    loss = lambda: model.loss(batch, noise=noise, t=t)["loss"].item()
    clean = loss()
    assert loss() == clean
    model.train()
    assert loss() != clean


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_training_times_follow_the_beta_distribution_and_are_uniform_as_released(alpha):
    """[3]: P(t / K < q) = q^alpha."""
    torch.manual_seed(0)
    model = small(time_alpha=alpha, n_draws=2000)
    with torch.no_grad():
        t = model.loss(small_batch(model.config))["t"]
    assert len(t) == 6000 and 0 <= t.min() and t.max() <= 1
    for q in (0.3, 0.6, 0.9):
        assert (t < q).float().mean().item() == pytest.approx(q**alpha, abs=0.02)  # three deviations


def test_draws_that_share_an_observation_are_so_many_losses():
    model = small(n_draws=3)
    batch, noise, t = small_batch(model.config), torch.randn(9, 5, 128), torch.randint(1000, (9,))
    shared = model.loss(batch, noise=noise, t=t)
    alone = [model.loss(batch, noise=noise[i : i + 3], t=t[i : i + 3])["loss"] for i in (0, 3, 6)]
    assert shared["loss"].item() == pytest.approx(sum(alone).item() / 3, rel=1e-5)
    assert model.loss(batch)["per_sample"].shape == (9,)


def test_sampling_is_the_same_one_at_a_time_and_nearly_so_in_bfloat16():
    model = small()
    batch, noise = small_batch(model.config), torch.randn(3, 5, 128)
    together = model.sample(batch, noise=noise)
    one = lambda i: model.sample({k: v[i : i + 1] for k, v in batch.items()}, noise=noise[i : i + 1])
    assert torch.allclose(together, torch.cat([one(i) for i in range(3)]), atol=1e-5)
    half = model.to(torch.bfloat16).sample(batch, noise=noise)
    assert (half - together).abs().max() < 0.15 * together.abs().max() and half.dtype == torch.float32


def test_what_learns_and_recomputed_activations():
    for encoders in ("train", "frozen"):
        gradients = []
        for checkpointing in (False, True):
            model = small(encoders=encoders, checkpointing=checkpointing, mask_prob=0.0).train()
            batch = small_batch(model.config)
            model.loss(batch, noise=torch.ones(3, 5, 128), t=torch.tensor([100, 500, 900]))["loss"].backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
            for name, p in model.named_parameters():
                still = encoders == "frozen" and name.startswith(("vision.", "t5."))
                assert (p.grad is None) == (not p.requires_grad) == still, name
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


# -- the unified vector


def test_single_arms_are_right_arms_and_aloha_is_where_the_release_has_it():
    assert (
        slots(["arm_joint_3_pos", "eef_vel_y", "gripper_open"])
        == slots(["right_arm_joint_3_pos", "right_eef_vel_y", "right_gripper_open"])
        == [3, 40, 10]
    )
    assert slots(ALOHA) == [*range(50, 56), 60, *range(6), 10]
    assert max(UNIFIED.values()) == 102 and not {*range(45, 50), *range(95, 100)} & set(UNIFIED.values())


def test_pack_and_unpack():
    x, places = torch.randn(2, 5, 3), slots(["left_eef_pos_x", "gripper_open", "base_vel_x"])
    packed = pack(x, places)
    assert packed.shape == (2, 5, 128) and torch.equal(unpack(packed, places), x)
    assert torch.equal(packed[..., [80, 10, 100]], x) and (packed != 0).sum() == x.numel()


def test_two_robots_in_one_batch_are_each_alone():
    """An item of a mixed batch gives what its robot's own model gives, and a chunk in its own places."""
    one = small(
        action_names=("eef_pos_x", "gripper_open", "base_vel_x"),
        state_names=("eef_pos_x", "eef_pos_y", "left_gripper_open"),
    )
    mixed = small(**PACKED)
    batch, noise = small_batch(one.config), torch.randn(3, 5, 128)
    a, s = slots(one.config.action_names), slots(one.config.state_names)
    has = lambda places: pack(torch.ones(3, len(places)), places)
    packed = batch | {
        "state": pack(batch["state"], s),
        "actions": pack(batch["actions"], a),
        "action_valid": has(a),
        "state_valid": has(s),
    }
    packed["action_valid"][1] = pack(torch.ones(2), slots(["left_eef_vel_x", "left_eef_vel_y"]))
    chunk = mixed.sample(packed, noise=noise)
    want = one.sample(batch, noise=noise)
    assert torch.allclose(unpack(chunk, a)[[0, 2]], want[[0, 2]], atol=1e-5)
    assert (chunk[1] != 0).any(0).nonzero().flatten().tolist() == [89, 90]
    losses = [
        m.loss(b, noise=noise, t=torch.tensor([9, 99, 999]))["per_sample"]
        for m, b in ((one, batch), (mixed, packed))
    ]
    assert torch.allclose(losses[0][[0, 2]], losses[1][[0, 2]], atol=1e-5)


# -- bad input


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"action_names": ("right_eef_pos_x", "right_eef_pos_q", "gripper_open")},
            "'right_eef_pos_q'.*did you mean 'right_eef_pos_.'",
        ),
        ({"state_names": ("zzz", "eef_pos_x", "gripper_open")}, "'zzz' is no name.*UNIFIED"),
        ({"action_names": ("eef_pos_x", "right_eef_pos_x", "gripper_open")}, "shares place 30"),
        ({"action_dim": 7}, "actions have 7 dimensions, action_names names 3"),
        ({"state_names": ()}, "states have 3 dimensions, state_names names 0.*packed states have 128"),
        ({"unified_dim": 20}, "unified_dim 20 has no room"),
        ({"n_cameras": 4, "max_cameras": 3}, "4 cameras.*room for 3"),
        ({"n_obs_steps": 0}, "n_obs_steps 0"),
        ({"n_action_steps": 6}, "n_action_steps 6"),
        ({"text_len": 0}, "text_len 0"),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"vocab_size": 32128}, "vocab_size 32128 is not that of bytes.*spiece.model"),
        ({"vocab_size": 32128, "encoders": "frozen"}, "vocab_size 32128 .*tokenizer_path"),
        ({"state_mean": (0.0,)}, "state_mean, state_std must have 3 numbers"),
        ({"patch_size": 7}, "vit_size 16 must be a multiple of patch_size 7"),
        ({"n_heads": 3}, "width 32 must be a multiple of n_heads 3"),
        ({"width": 34}, "width 34 must be a multiple of 4"),
        ({"norm": "rms"}, "norm 'rms'"),
        ({"encoders": "big"}, "encoders 'big'"),
        ({"n_draws": 0}, "n_draws 0"),
        ({"mask_prob": 1.0}, "mask_prob 1.0"),
        ({"time_alpha": 0.0}, "time_alpha 0.0"),
        ({"sampler_steps": 0}, "sampler_steps 0"),
        ({"sampler_steps": 1000}, "sampler steps 1000"),
    ],
)
def test_impossible_configurations_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**SMALL | change)
    assert "\n" not in str(error.value)


def test_batches_that_do_not_fit_are_refused():
    model = small()
    batch = small_batch(model.config)
    without = {k: v for k, v in batch.items() if k not in ("text", "images")}
    cases = [
        (batch | {"images": batch["images"][:, :, :1]}, r"\(3, 2, 1, .*\(3, 2, 2\) = .*steps, n_cameras"),
        (batch | {"images": batch["images"][:, :1]}, r"images \(3, 1, 2, .*\(3, 2, 2\)"),
        (batch | {"text": torch.ones(3, 10, dtype=torch.int64)}, "text_len = 9"),
        (
            without | {"images": batch["images"], "lang_embeds": torch.ones(3, 4, 20)},
            r"lang_embeds \(3, 4, 20\) given, \(3, 4, 16\) = ",
        ),
        (without | {"text": batch["text"], "image_embeds": torch.ones(3, 7, 16)}, r"\(3, 16, 16\) = .* exp"),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            model.sample(wrong)
    with pytest.raises(ValueError, match="sampler steps 0"):
        model.sample(batch, steps=0)
    with pytest.raises(ValueError, match="need action_valid"):
        packed = small(**PACKED)
        packed.sample({k: v for k, v in small_batch(packed.config).items() if not k.endswith("_valid")})
    bare = small(encoders="none")
    for wrong in (
        without | {"text": batch["text"], "image_embeds": torch.ones(3, 16, 16)},
        without | {"images": batch["images"], "lang_embeds": torch.ones(3, 4, 16)},
    ):
        with pytest.raises(ValueError, match="encoders='none' takes (lang|image)_embeds"):
            bare.sample(wrong)


def test_text_and_what_is_too_long(capsys):
    config = Config(**SMALL)
    codes = config.encode_text("gr\u00fcn")
    assert codes.tolist() == [104, 115, 196, 189, 111, 0, 0, 0, 0]
    for _ in range(2):
        assert config.encode_text("put it there").tolist() == [c + 1 for c in b"put it th"]
    assert capsys.readouterr().err.count("has 12 codes and is cut to text_len = 9: 'put it there'") == 1


def test_sentencepiece_text_ends_as_t5_expects(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="package sentencepiece is an extra")
    sentences = ["put the red block in the left zone", "put the blue block in the right zone"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "words"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = str(tmp_path / "words.model")
    codes = Config(tokenizer_path=path, vocab_size=60).encode_text("put the red block").tolist()
    real = [c for c in codes if c]
    assert real == rdt.tokenizer(path).encode("put the red block") + [1] and len(codes) == 24
    with pytest.raises(ValueError, match="nowhere.model"):
        Config(tokenizer_path="nowhere.model").encode_text("red")


# -- shapes, learning, the file itself


def test_documented_shapes():
    model = small(n_draws=2)
    batch, shapes = small_batch(model.config), {}
    names = ("vision", "t5", "lang_adaptor", "img_adaptor", "state_adaptor", "t_embed", "blocks.0", "decoder")
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: shapes.update({name: (tuple(args[0].shape), tuple(out.shape))})
        )
    model.loss(batch)
    D, N, L = 32, 3 + 5, 9
    assert shapes == {
        "vision": ((3 * 2 * 2, 3, 16, 16), (12, 4, 16)),
        "t5": ((3, L), (3, L, 16)),
        "lang_adaptor": ((3, L, 16), (3, L, D)),
        "img_adaptor": ((3, 16, 16), (3, 16, D)),
        "state_adaptor": ((6, 6, 256), (6, 6, D)),
        "t_embed": ((6, 256), (6, D)),
        "blocks.0": ((6, N, D), (6, N, D)),
        "decoder": ((6, 5, D), (6, 5, 128)),
    }
    k, v, bias = model.encode(batch)["conditions"][0]
    assert k.shape == v.shape == (3, 2, L, 16) and bias.shape == (3, 1, 1, L)


def test_the_loss_falls():
    torch.manual_seed(0)
    model = RDT(Config(**SMALL | {"mask_prob": 0.0, "n_draws": 4})).train()
    batch = small_batch(model.config, B=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = model.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_main_learns_to_read_one_letter_in_two_bodies():
    assert rdt.main(steps=150) > 0.9


def test_every_equation_of_the_docstring_is_tagged_in_the_code():
    head, _, code = open(rdt.__file__).read()[3:].partition('"""')
    listed = set(re.findall(r"^    \[(\d+)\] ", head, flags=re.M))
    tagged = set(re.findall(r"#[^\n]*\[(\d+)\]", code))
    assert listed == tagged == {str(i) for i in range(1, len(listed) + 1)}


def test_initial_patches_and_positions_are_as_large_as_configured():
    models = []
    for factor in (1.0, 4.0):
        torch.manual_seed(0)
        models.append(RDT(Config(**SMALL | {"image_init": factor})))
    a, b = models
    torch.testing.assert_close(b.vision.patch.weight, 4 * a.vision.patch.weight)
    torch.testing.assert_close(b.vision.position, 4 * a.vision.position)


def test_init_weights_sets_every_weight():
    """A model that is built on the meta device has nothing but what this method writes."""
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    assert not [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]


# -- nothing waits for the device, nothing is kept for nothing


class HostCopies(TorchDispatchMode):
    """Collects what takes a tensor of the CPU to the meta device. That has no numbers: reading one back, or
    leaving a tensor behind on the CPU, raises by itself."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if devices == {"cpu", "meta"} or func is torch.ops.aten.lift_fresh.default and "meta" in devices:
            self.found.append(str(func))
        return out


GIVEN = {"encoders": "none"}  # embeddings instead of pictures and words


def embedded(config, batch):
    c = config
    g = torch.Generator().manual_seed(5)
    rest = {k: v for k, v in batch.items() if k not in ("text", "images")}
    return rest | {
        "lang_embeds": torch.randn(3, 6, c.t5_width, generator=g),
        "lang_mask": torch.arange(6) < torch.tensor([[3], [6], [1]]),
        "empty_embeds": torch.randn(1, 1, c.t5_width, generator=g).expand(3, -1, -1),
        "background_embeds": torch.randn(1, c.tokens_per_image, c.vit_width, generator=g).expand(3, -1, -1),
        "image_embeds": torch.randn(
            3, c.n_obs_steps * c.cameras * c.tokens_per_image, c.vit_width, generator=g
        ),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PACKED,
        {"max_cameras": 3, "checkpointing": True},
        {"obs": "lowdim", "n_cameras": 0, "masked": False},
        GIVEN | {"norm": "released", "time_alpha": 1.0},
    ],
)
def test_loss_and_sample_never_wait_for_the_device(changes, monkeypatch):
    config = Config(**SMALL | {"n_draws": 2, "mask_prob": 0.1, "state_noise": 0.01} | changes)
    batch = small_batch(config) if config.n_cameras else {
        k: v for k, v in small_batch(Config(**SMALL)).items() if k != "images"
    }
    batch = embedded(config, batch) if config.encoders == "none" else batch
    batch = {k: v.to("meta") for k, v in batch.items()}
    with torch.device("meta"):
        model = RDT(config).train()

    def step():
        model.loss(batch)["loss"].backward()
        model.sample(batch)

    step()  # tables are copied once
    monkeypatch.setattr(torch, "tensor", None)  # a list of Python's is on the CPU too
    with HostCopies() as copies:
        step()
    assert not copies.found
    assert model.sample(batch).device.type == "meta" and all(
        p.grad is not None for p in model.parameters() if p.requires_grad
    )


def test_the_schedule_is_copied_once_and_stays_float32_beside_bfloat16_weights():
    table = cosine_alpha_bar(1000, torch.device("cpu"))
    assert cosine_alpha_bar(1000, torch.device("cpu")) is table and table.dtype == torch.float32
    assert 0.99 < table[0] < 1 and len(small().state_dict().keys() & {"alpha_bar"}) == 0
    model = small().to(torch.bfloat16)
    known = KnownNetwork(model, lambda x, t: torch.zeros_like(x))
    batch, noise = small_batch(model.config), torch.randn(3, 5, 128)
    model.loss(batch, noise=noise, t=torch.zeros(3, dtype=torch.int64))
    x0 = pack(batch["actions"], slots(model.config.action_names))
    assert (known.seen[0][0] - table[0].sqrt() * x0).abs().max() > 1e-3  # still one step of noise


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_bfloat16_trains_and_samples(half):
    model, batch = small(n_draws=2), small_batch(Config(**SMALL))
    noise, t = torch.randn(6, 5, 128), torch.randint(1000, (6,))
    want, chunk = model.loss(batch, noise=noise, t=t)["loss"], model.sample(batch, noise=noise[:3])
    if half == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        loss, got = model.loss(batch, noise=noise, t=t)["loss"], model.sample(batch, noise=noise[:3])
    loss.backward()
    assert loss.dtype == got.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.1)
    assert (got - chunk).abs().max() < 0.15 * chunk.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def kept_bytes(forward):
    """What a forward pass keeps for the backward pass, outside of what is computed again there."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x,
        lambda x: x,
    ):
        out = forward()
    return sum(kept.values()), out


def test_keys_values_and_t5_layers_are_recomputed_too():
    """Checkpointing leaves, per condition, little more than the keys and values themselves."""
    kept = {}
    for on in (False, True):
        model = small(**GIVEN, depth=8, checkpointing=on).train()
        batch = embedded(model.config, small_batch(model.config))
        weights = sum(p.numel() * 4 for p in model.parameters())
        kept[on] = kept_bytes(lambda: model.encode(batch))[0] - weights
    assert kept[True] < kept[False] - 8 * 3 * 16 * 32 * 4 * 2  # of 8 blocks at least two tensors of 16 tokens
    texts, mask = torch.randint(1, 200, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    kept = [
        kept_bytes(lambda: small(t5_depth=4, checkpointing=on).t5(texts, mask))[0] for on in (False, True)
    ]
    assert kept[1] < 0.5 * kept[0]


# -- masks, draws, what is hidden


def ragged(batch, config):
    lengths = torch.tensor([2, 5, 3])
    return batch | {"action_mask": torch.arange(config.horizon) < lengths[:, None]}


def test_draws_and_masks_stand_in_one_order():
    """Masks of different lengths, robots with different numbers: one loss of n draws is n losses of one."""
    model = small(n_draws=3, **PACKED)
    batch = ragged(small_batch(model.config), model.config)
    noise, t = torch.randn(9, 5, 128), torch.randint(1000, (9,))
    shared = model.loss(batch, noise=noise, t=t)
    parts = [model.loss(batch, noise=noise[i : i + 3], t=t[i : i + 3]) for i in (0, 3, 6)]
    assert torch.allclose(shared["per_sample"], torch.cat([p["per_sample"] for p in parts]), rtol=1e-4)
    assert shared["loss"].item() == pytest.approx(sum(p["loss"].item() for p in parts) / 3, rel=1e-5)
    one = lambda i: {k: v[i : i + 1] for k, v in batch.items()}
    for i in range(3):
        alone = model.loss(one(i), noise=noise[i::3], t=t[i::3])
        assert torch.allclose(alone["per_sample"], shared["per_sample"][i::3], rtol=1e-4)


def test_padding_is_left_out_or_trained_on():
    batch = ragged(small_batch(Config(**SMALL)), Config(**SMALL))
    for on in (False, True):
        model = small(train_on_padding=on)
        x0 = pack(batch["actions"], slots(model.config.action_names))
        past = ~batch["action_mask"][..., None]
        KnownNetwork(model, lambda x, t: x0 + 2.0 * past)  # wrong by 2 past the end only
        result = model.loss(batch, noise=torch.randn(3, 5, 128))
        want = 4.0 * 5 / 15 if on else 0.0  # 3 + 0 + 2 of 15 steps
        assert result["loss"].item() == pytest.approx(want, abs=1e-6)
        assert result["per_sample"].tolist() == pytest.approx([4 * 0.6, 0, 4 * 0.4] if on else [0, 0, 0])
    assert all(PRESETS[p]["train_on_padding"] for p in ("170M", "1B")) and not Config().train_on_padding


def test_a_hidden_state_is_exactly_the_mean_whatever_the_noise():
    model = small(mask_prob=0.5, state_noise=0.3).train()
    B = 400
    batch = {"state": torch.ones(B, 2, 3), "text": torch.ones(B, 9).long()}
    state = model.hide(batch)["state"]
    gone = (state == 0).all(-1).all(-1)
    assert 0.4 < gone.float().mean() < 0.6 and ((state[~gone] - 1).abs() > 0).all()
    assert (state[~gone] - 1).std().item() == pytest.approx(0.3, rel=0.1)


def test_no_noise_on_numbers_that_a_robot_lacks():
    model = small(mask_prob=0.0, state_noise=0.3, masked=False, **PACKED).train()
    batch = small_batch(model.config)
    batch["state"] = batch["state"] * batch["state_valid"][:, None]
    has = batch["state_valid"][:, None].expand_as(batch["state"])
    moved = model.hide(batch)["state"] - batch["state"]
    assert (moved[~has] == 0).all() and (moved[has] != 0).all()


def test_hidden_masks_reach_the_network_for_state_and_actions():
    model, inputs = small(mask_prob=0.5), []
    batch = small_batch(model.config)
    model.state_adaptor.register_forward_pre_hook(lambda m, args: inputs.append(args[0][..., 128:]))
    shown = torch.tensor([True, False, True]).view(3, 1, 1)
    predict(model, batch | {"masks_shown": shown})
    has = pack(torch.ones(3), slots(model.config.action_names))
    assert inputs[0].shape == (3, 6, 128)
    assert torch.equal(inputs[0], has * shown.float().expand(3, 6, 1))


def test_packed_states_need_a_mask_of_their_own():
    model = small(**PACKED)
    batch = small_batch(model.config)
    for kind in ("action", "state"):
        less = {k: v for k, v in batch.items() if k != f"{kind}_valid"}
        with pytest.raises(ValueError, match=rf"packed {kind}s need {kind}_valid \(B, U\)"):
            model.loss(less)
    other = batch | {"state_valid": ~batch["state_valid"]}
    assert not torch.equal(predict(model, other), predict(model, batch))


def test_masks_may_be_numbers():
    model = small(**PACKED)
    batch = ragged(small_batch(model.config), model.config)
    batch["image_mask"] = torch.rand(3, 2, 2) < 0.5
    noise, t = torch.randn(3, 5, 128), torch.tensor([5, 500, 900])
    for case in (batch, embedded(model.config, batch)):
        want = model.loss(case, noise=noise, t=t)["loss"]
        for dtype in (torch.int64, torch.uint8, torch.float32):
            numbers = {k: v.to(dtype) if v.dtype == torch.bool else v for k, v in case.items()}
            assert torch.equal(model.loss(numbers, noise=noise, t=t)["loss"], want)
        hidden = small(mask_prob=0.5, **PACKED).train().hide(numbers)
        assert torch.isfinite(model.sample(hidden)).all()


def test_an_image_mask_of_another_shape_is_refused():
    """pi0's (B, V) of old would be read as steps where B = To."""
    model = small()
    batch = small_batch(model.config, B=2)
    with pytest.raises(ValueError, match=r"image_mask \(2, 2\) given, \(2, 2, 2\) = \(B, n_obs") as e:
        model.sample(batch | {"image_mask": torch.ones(2, 2)})
    assert "\n" not in str(e.value)


# -- what the released weights were trained on


def test_a_hidden_state_shows_the_mean_and_noise_is_a_share_of_the_deviation():
    facts = {"state_mean": (0.5, -2.0, 30.0), "state_std": (1.0, 0.1, 10.0)}
    batch = {"state": torch.zeros(4000, 2, 3), "text": torch.ones(4000, 9).long()}
    torch.manual_seed(0)
    state = small(mask_prob=0.5, state_noise=0.1, n_cameras=0, obs="lowdim", **facts).hide(batch)["state"]
    gone = (state == torch.tensor(facts["state_mean"])).all(-1).all(-1)
    assert 0.45 < gone.float().mean() < 0.55
    noise = state[~gone].flatten(0, 1)
    assert torch.allclose(noise.std(0), 0.1 * torch.tensor(facts["state_std"]), rtol=0.05)
    unmasked = small(mask_prob=0.0, state_noise=0.1, n_cameras=0, obs="lowdim", **facts).hide(batch)
    assert unmasked.keys() == batch.keys()
    assert unmasked["state"].std(dim=(0, 1))[2].item() == pytest.approx(1, 0.05)
    values = tuple(map(float, range(128)))  # of several robots: places that one lacks stay 0
    packed = small(mask_prob=0.5, masked=False, state_mean=values, **PACKED)
    batch = small_batch(packed.config)
    batch["state"] = torch.full((3, 2, 128), -1.0) * batch["state_valid"][:, None]
    has = batch["state_valid"][:, None].expand(3, 2, 128)
    for _ in range(4):
        state = packed.hide(batch)["state"]
        assert (state[~has] == 0).all()
        assert ((state == -1) | (state == torch.tensor(values)))[has].all()


def test_hidden_and_masked_embeddings_are_the_backgrounds():
    """As if the picture had been grey: for image_embeds as for images, in training as in acting."""
    model = small(max_cameras=3)
    batch = small_batch(model.config)
    tokens = model.encode_images(batch).detach()                                # of three places
    given = {k: v for k, v in batch.items() if k != "images"} | {"image_embeds": tokens}
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0]]]).bool().expand(3, -1, -1)
    want = predict(model, batch | {"image_mask": mask[..., :2]})
    assert torch.allclose(predict(model, given | {"image_mask": mask}), want, atol=1e-5)
    assert (predict(model, given) - want).abs().max() > 1e-4
    grey = model.background({})[0, 0].detach().expand(3, -1, -1)
    bare = small(max_cameras=3, encoders="none")
    encoders = ("vision.", "t5.")
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(encoders)})
    lang, read = model.encode_text(batch)
    given |= {"lang_embeds": lang.detach(), "lang_mask": read, "image_mask": mask}
    with pytest.raises(ValueError, match=r"image_mask\) take background_embeds \(B, N"):
        predict(bare, given)
    assert torch.allclose(predict(bare, given | {"background_embeds": grey}), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"image_mask \(3, 2, 2\) given, \(3, 2, 3\)"):
        predict(bare, given | {"background_embeds": grey, "image_mask": mask[..., :2]})
    bare.config.mask_prob = 0.5
    torch.manual_seed(0)
    given |= {"empty_embeds": torch.zeros(3, 1, 16)}
    hidden = torch.stack([bare.hide(given)["image_mask"] for _ in range(400)]).float().mean((0, 1))
    assert torch.allclose(hidden, 0.5 * mask[0], atol=0.06) and ((hidden == 0) == ~mask[0]).all()


def test_a_hidden_instruction_is_an_empty_one():
    """Bytes: no code, and the first place is read. T5: its end mark. Embeddings: those of ""."""
    B = 400
    batch = {"state": torch.zeros(B, 2, 3), "text": torch.full((B, 9), 7)}
    torch.manual_seed(0)
    for end, more in ((0, {}), (1, {"tokenizer_path": "spiece.model", "vocab_size": 300})):
        text = small(mask_prob=0.5, n_cameras=0, obs="lowdim", **more).hide(batch)["text"]
        gone = text[:, 0] != 7
        assert 0.4 < gone.float().mean() < 0.6
        assert (text[gone] == torch.tensor([end] + [0] * 8)).all() and (text[~gone] == 7).all()
    assert (batch["text"] == 7).all()
    given = {"state": torch.zeros(B, 2, 3), "lang_embeds": torch.ones(B, 4, 16),
             "lang_mask": torch.tensor([True, True, True, False]).expand(B, -1)}
    model = small(mask_prob=0.5, n_cameras=0, obs="lowdim")
    with pytest.raises(ValueError, match=r"instructions \(mask_prob\) take empty_embeds \(B, n"):
        model.hide(given)
    empty = torch.arange(32.0).view(1, 2, 16).expand(B, -1, -1)
    hidden = model.hide(given | {"empty_embeds": empty})
    gone = hidden["lang_mask"].sum(1) == 2
    assert 0.4 < gone.float().mean() < 0.6 and torch.equal(hidden["lang_embeds"][gone][:, :2], empty[gone])
    assert torch.equal(hidden["lang_embeds"][~gone], given["lang_embeds"][~gone])
    assert torch.equal(hidden["lang_mask"][~gone], given["lang_mask"][~gone])


def test_frozen_t5_reads_each_instruction_once_and_without_padding():
    model, seen = small(encoders="frozen", text_len=9), []
    learning = small(text_len=9)
    learning.load_state_dict(model.state_dict())
    model.t5.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    batch = small_batch(model.config)  # "red", "the blue", ""
    want = predict(learning, batch)
    for _ in range(2):
        assert torch.allclose(predict(model, batch), want, atol=1e-5)
    assert sorted(seen) == [(1, 1), (1, 3), (1, 8)]
    assert model.encode(batch)["conditions"][0][0].shape[2] == 8  # words: the longest, not text_len
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    learning.load_state_dict(model.state_dict())  # what other weights read is read anew
    assert torch.allclose(predict(model, batch), predict(learning, batch), atol=1e-4) and len(seen) == 6


def test_frozen_siglip_looks_at_the_background_once():
    model, seen = small(encoders="frozen", max_cameras=3), []
    model.vision.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    batch = small_batch(model.config)
    batch["image_mask"] = torch.tensor([[[True, False]] * 2] * 3)
    for _ in range(3):
        predict(model, batch)
    assert sorted(seen) == [1, 12, 12, 12]


def test_what_learning_encoders_made_is_not_kept():
    """Neither by the model nor by its average, whose weights change although they ask for no gradient."""
    model = small(max_cameras=3).requires_grad_(False)
    batch = small_batch(model.config)
    before = predict(model, batch)
    with torch.no_grad():
        model.vision.norm.bias += 1.0
        model.t5.norm.weight *= 2.0
    fresh = small(max_cameras=3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(predict(model, batch), predict(fresh, batch)) and not model.kept
    assert not torch.equal(predict(model, batch), before)


def test_siglip_alone_beside_embedded_instructions():
    model, whole = small(encoders="images"), small()
    assert not hasattr(model, "t5") and not any(p.requires_grad for p in model.vision.parameters())
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("t5.")})
    batch = small_batch(model.config)
    with pytest.raises(ValueError, match="encoders='images' takes lang_embeds"):
        predict(model, batch)
    lang, mask = whole.encode_text(batch)
    given = {k: v for k, v in batch.items() if k != "text"} | {"lang_embeds": lang, "lang_mask": mask}
    assert torch.allclose(predict(model, given), predict(whole, batch), atol=1e-5)


# -- pictures, generators, groups


def test_pictures_in_bytes_are_fitted_and_scaled_and_floats_are_that_already():
    model = small()
    batch = small_batch(model.config)
    fitted = rdt.fit_square(batch["images"].flatten(0, 2).float(), 16).view(3, 2, 2, 3, 16, 16)
    byte = torch.full((1, 3, 16, 16), 255.0)
    assert (rdt.fit_square(byte, 16) == 1).all() and (rdt.fit_square(0 * byte, 16) == -1).all()
    assert rdt.fit_square(0 * byte + 51, 16)[0, 0, 0, 0].item() == pytest.approx(-0.6)
    scaled = batch | {"images": fitted}
    assert torch.allclose(predict(model, scaled), predict(model, batch), atol=1e-6)
    mask = {"image_mask": torch.tensor([[[True, False]] * 2] * 3)}
    assert torch.allclose(predict(model, scaled | mask), predict(model, batch | mask), atol=1e-5)


def test_a_batch_is_its_items_one_by_one():
    """Three texts, three lengths of padding, ragged cameras."""
    model = small(n_draws=2)
    batch = ragged(small_batch(model.config), model.config)
    batch["image_mask"] = torch.tensor([[[1, 1], [1, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 1]]])
    batch["control_hz"] = torch.tensor([5.0, 10.0, 50.0])
    noise, t = torch.randn(6, 5, 128), torch.tensor([3, 400, 800, 999, 0, 600])
    together = model.loss(batch, noise=noise, t=t)["per_sample"]
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        alone = model.loss(one, noise=noise[i::3], t=t[i::3])["per_sample"]
        assert torch.allclose(together[i::3], alone, rtol=1e-4), i


def test_the_generator_decides_every_draw_of_a_sample():
    model = small()
    batch, draw = small_batch(model.config), lambda seed: torch.Generator().manual_seed(seed)
    torch.manual_seed(1)
    first = model.sample(batch, generator=draw(3))
    torch.manual_seed(2)
    assert torch.equal(model.sample(batch, generator=draw(3)), first)
    assert not torch.equal(model.sample(batch, generator=draw(4)), first)
    noise = torch.randn(3, 5, 128, generator=draw(3))
    assert torch.equal(model.sample(batch, noise=noise), first)
    assert not torch.equal(first[0], first[1]) and first.std(0).min() > 0  # each item its own noise


def test_each_draw_of_each_item_has_its_own_time_and_noise():
    model = small(n_draws=4)
    known = KnownNetwork(model, lambda x, t: torch.zeros_like(x))
    torch.manual_seed(0)
    model.loss(small_batch(model.config))
    ((x_t, t),) = known.seen
    assert len(t) == 12 and len(set(t.tolist())) > 9
    x0 = pack(small_batch(model.config)["actions"], slots(model.config.action_names))
    a = cosine_alpha_bar(1000, "cpu")[t][:, None, None]
    noise = (x_t - a.sqrt() * x0.repeat(4, 1, 1)) / (1 - a).sqrt()
    assert noise.std().item() == pytest.approx(1, rel=0.05) and noise.mean().abs() < 0.05
    assert (noise.flatten(1).corrcoef() - torch.eye(12)).abs().max() < 0.2


def test_every_parameter_that_learns_is_decayed_alike():
    for encoders in ("train", "frozen"):
        model = small(encoders=encoders)
        (group,) = model.param_groups(0.07)
        assert group["weight_decay"] == 0.07
        frozen = ("vision.", "t5.") if encoders == "frozen" else ()
        want = [p for name, p in model.named_parameters() if not name.startswith(frozen)]
        assert [id(p) for p in group["params"]] == [id(p) for p in want]


def test_constants_are_the_published_ones():
    assert rdt.BACKGROUND == 127
    c = Config(**PRESETS["1B"])
    assert (c.n_diffusion_steps, c.sampler_steps, c.horizon, c.mask_prob) == (1000, 5, 64, 0.1)
    assert (c.time_alpha, c.norm, c.masked, c.n_draws, c.qk_init) == (1, "released", False, 1, 1)
    assert rdt.RECIPES["1B"]["lr"] == 1e-4 and rdt.RECIPES["1B"]["weight_decay"] == 1e-2
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(rdt.Norm(2)(x), x / math.sqrt(12.5))
    q = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]])  # softmax(2 * 3 / sqrt(4)) between two keys
    k, v = torch.tensor([[[[3.0, 0, 0, 0], [0.0, 0, 0, 0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    assert rdt.attention(q, k, v).item() == pytest.approx(1 / (1 + math.exp(-3)))


# -- the rest


def test_the_trace_of_a_packed_run_ends_in_the_chunk():
    model, trace = small(**PACKED), []
    batch = small_batch(model.config)
    chunk = model.sample(batch, trace=trace)
    assert len(trace) == 5 and torch.equal(trace[-1], chunk)
    assert all((x[~batch["action_valid"][:, None].expand_as(x)] == 0).all() for x in trace)


def test_a_single_noise_level_is_a_level():
    model = small(n_diffusion_steps=1, sampler_steps=1)
    result = model.loss(small_batch(model.config))
    assert (result["t"] == 0).all() and torch.isfinite(result["loss"])
    assert torch.isfinite(model.sample(small_batch(model.config))).all()


def test_a_frequency_of_zero_is_one_that_is_not_known():
    model = small()
    batch = small_batch(model.config)
    silent = {k: v for k, v in batch.items() if k != "control_hz"}
    noise = torch.randn(3, 5, 128)
    zero = model.sample(batch | {"control_hz": torch.zeros(3)}, noise=noise)
    assert torch.equal(model.sample(silent, noise=noise), zero)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config) if f.type in (int, float)])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_no_number_ends_in_a_traceback(field, value):
    """Refused in one line that names the field, or built and trained."""
    try:
        model = RDT(Config(**SMALL | {field: value}))
    except ValueError as e:
        assert "\n" not in str(e) and field in str(e)
        return
    assert value == 0, f"{field} = {value} was taken"
    batch = small_batch(model.config) if model.config.n_cameras else {
        k: v for k, v in small_batch(Config(**SMALL)).items() if k != "images"
    }
    assert torch.isfinite(model.loss(batch)["loss"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_tokens": 5}, "image_tokens 5, but vit_size and patch_size make 4"),
        ({"vit_size": 4, "encoders": "frozen"}, "make 0"),
        ({"encoders": "frozen", "vit_heads": 3}, "vit_width 16 must be a multiple of vit_heads 3"),
        ({"t5_buckets": 3}, r"t5_buckets 3 must lie in 4\.\.511"),
        ({"t5_distance": 8}, r"t5_buckets 32 must lie in 4\.\.31"),
        ({"n_fourier": 30}, "n_fourier 30"),
        ({"norm": "released", "n_heads": 32}, "width 32 .* of a head above 1"),
        ({"image_size": (0, 64)}, r"image_size \(0, 64\) must be at least 1"),
        ({"mask_prob": -0.1}, "mask_prob -0.1"),
        ({"qk_init": 0.0}, "qk_init 0.0"),
    ],
)
def test_ranges(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**SMALL | change)
    assert "\n" not in str(error.value)


def test_a_cut_instruction_keeps_its_end_mark(monkeypatch):
    class Pieces:
        def encode(self, text):
            return [10 + i for i in range(len(text.split()))]

        def vocab_size(self):
            return 40

    monkeypatch.setattr(rdt, "tokenizer", lambda path: Pieces())
    config = Config(tokenizer_path="any", text_len=4, vocab_size=40)
    with pytest.raises(ValueError, match="any has 40 pieces, vocab_size is 39"):
        Config(tokenizer_path="any", vocab_size=39).encode_text("a")
    assert config.encode_text("a b c d e f").tolist() == [10, 11, 12, 1]
    assert config.encode_text("a b c").tolist() == [10, 11, 12, 1]
    assert config.encode_text("a").tolist() == [10, 1, 0, 0]


def test_what_does_not_fit_is_told_in_bounded_length():
    with pytest.raises(ValueError, match=r"missing .*; and \d+ more$") as error:
        RDT.from_official({"extra": torch.zeros(1)}, Config(**SMALL))
    assert len(str(error.value)) < 400 and str(error.value).count("missing") == 6


def test_what_stands_in_pi0_too_is_the_same_text():
    import inspect

    import pi0

    for name in ("SiglipLayer", "Siglip", "attention", "checkpointed", "randn", "draws", "load_strictly",
                 "check_at_least", "tokenizer"):
        assert inspect.getsource(getattr(rdt, name)) == inspect.getsource(getattr(pi0, name)), name
    assert rdt.MASKED == pi0.MASKED == pytest.approx(-2.3819763e38)


# -- the full size


@pytest.mark.skipif(not os.environ.get("RDT_FULL"), reason="set RDT_FULL=1: takes 4 GB and a minute on a CPU")
def test_the_full_size_samples_a_chunk_on_a_cpu():
    """Random bfloat16 weights; embeddings of a 32-word instruction and of six pictures are given."""
    import resource

    began = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = RDT(Config(**PRESETS["1B"]))
        model = model.to_empty(device="cpu").eval()
        model.init_weights()
        torch.nn.init.normal_(model.decoder.fc2.weight, std=0.02)
    finally:
        torch.set_default_dtype(torch.float32)
    print(f"\nbuilt in {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads")
    batch = {
        "state": torch.zeros(1, 2, 14),
        "control_hz": torch.tensor([25.0]),
        "lang_embeds": torch.randn(1, 32, 4096),
        "image_embeds": torch.randn(1, 4374, 1152),
    }
    for _ in range(2):
        began = time.perf_counter()
        chunk = model.sample(batch)
        print(f"one chunk, 5 steps: {time.perf_counter() - began:.2f} s")
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    assert chunk.shape == (1, 64, 14) and torch.isfinite(chunk).all() and chunk.std() > 0
