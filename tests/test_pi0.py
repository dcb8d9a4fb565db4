"""pi0.py against the official implementation, against closed forms, and against what its docstring says."""

import dataclasses
import math
import os
import re
import time

import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden, manifest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pi0
from pi0 import PRESETS, Config, Pi0, block_mask, convert_official

# -- the official implementation ---------------------------------------------------------------------------


def official_config(case, config=Config):
    """The case's description of PI0Pytorch -> ours."""
    c = {k: v for k, v in case.config.items() if not k.startswith("_")}
    unknown = set(c) - {
        "vlm",
        "expert",
        "vit",
        "patch_size",
        "image",
        "vocab",
        "lang_len",
        "chunk",
        "dim",
        "n_cams",
        "steps",
    }
    assert not unknown, f"arguments that this file cannot build: {unknown}"
    (width, depth, mlp, *heads), (expert_width, *_), vit = c["vlm"], c["expert"], c["vit"]
    assert c["expert"][1] == depth and c["expert"][3:] == heads, "the two models meet in every layer"
    return config(
        action_dim=c["dim"],
        state_dim=c["dim"],
        padded_dim=c["dim"],
        n_cameras=c["n_cams"],
        max_cameras=c["n_cams"],
        image_size=(c["image"], c["image"]),
        horizon=c["chunk"],
        n_action_steps=1,
        text_len=c["lang_len"],
        vocab_size=c["vocab"],
        vit_size=c["image"],
        patch_size=c["patch_size"],
        vit_width=vit[0],
        vit_depth=vit[1],
        vit_mlp=vit[2],
        vit_heads=vit[3],
        depth=depth,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=heads[2],
        width=width,
        mlp=mlp,
        expert_width=expert_width,
        expert_mlp=c["expert"][2],
        n_draws=1,
        text_weight=0.0,
        sampler_steps=c["steps"],
    )


def official_batch(case, **inputs):
    inp = case.inp | inputs
    cameras = range(case.config["n_cams"])
    return {
        "images": torch.stack([inp[f"image_{v}"] for v in cameras], dim=1)[:, None],
        "image_mask": torch.stack([inp[f"image_mask_{v}"] for v in cameras], dim=1)[:, None],
        "text": inp["lang_tokens"],
        "text_mask": inp["lang_mask"],
        "state": inp["state"][:, None],
        "actions": inp["actions"],
        "action_mask": torch.ones(inp["actions"].shape[:2], dtype=torch.bool),
    }


def one_attention(model, batch, x_t, t):
    """The velocity as the paper draws it: prefix, state and actions side by side in one sequence, every layer
    one attention over all of it, no cache. -> (velocity, mask (B, N, N), positions (B, N))"""
    images, seen = model.embed_images(batch)
    prefix = torch.cat([images, model.embed_text(batch["text"])], dim=1)
    suffix = model.embed_suffix(model.pad(batch["state"][:, -1]), x_t, t)
    P, S = prefix.shape[1], suffix.shape[1]
    valid = F.pad(torch.cat([seen, batch.get("text_mask", batch["text"] > 0)], dim=1), (0, S), value=True)
    mask, positions = block_mask(valid, torch.tensor([0] * P + [1, 1] + [0] * (S - 2))), valid.cumsum(1) - 1
    rope = pi0.rope_angles(positions, model.config.head_dim)
    group = model.config.n_heads // model.config.n_kv_heads
    streams = [prefix, suffix]
    for layers in zip(model.vlm.layers, model.expert.layers):
        normed = [layer.norm1(x) for layer, x in zip(layers, streams)]
        q, k, v = (
            torch.cat([getattr(layer, name)(h) for layer, h in zip(layers, normed)], dim=1).unflatten(
                -1, (-1, model.config.head_dim)
            )
            for name in "qkv"
        )
        q, k = pi0.rotate(q, *rope), pi0.rotate(k, *rope)
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / model.config.head_dim**0.5
        weights = torch.where(mask[:, None], logits, pi0.MASKED).softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2).split([P, S], dim=1)
        streams = [x + layer.o(o) for layer, x, o in zip(layers, streams, out)]
        for i, layer in enumerate(layers):
            h = layer.norm2(streams[i])
            streams[i] = streams[i] + layer.down(F.gelu(layer.gate(h), approximate="tanh") * layer.up(h))
    return model.action_out_proj(model.expert.norm(streams[1])[:, 1:]), mask, positions


@golden("pi0.PI0Pytorch")
def test_golden(case):
    model = Pi0.from_official(case.sd, official_config(case))
    inputs = {k: case.inp[k].clone().requires_grad_() for k in ("state", "actions", "noise")}
    batch, t = official_batch(case, **inputs), case.inp["time"]
    images, seen = model.embed_images(batch)
    case.check("out/prefix_embs", torch.cat([images, model.embed_text(batch["text"])], dim=1))
    case.check("out/time_emb", pi0.time_embedding(t, model.config.expert_width))
    case.check("out/suffix_embs", model.embed_suffix(inputs["state"], case.out["x_t"], t))
    cache, valid = model.encode(batch, images, seen)
    v_t = model.velocity(cache, valid, inputs["state"], case.out["x_t"], t)
    case.check("out/v_t", v_t)
    case.check("out/loss_elements", (v_t - (inputs["noise"] - inputs["actions"])) ** 2)
    result = model.loss(batch, noise=inputs["noise"], t=t)
    case.check("out/loss", result["loss"])
    assert torch.allclose(result["per_sample"], case.out["loss_elements"].mean((1, 2)), rtol=1e-4)

    result["loss"].backward()
    ours = {k: p.grad for k, p in model.named_parameters()}
    for key, want in case.grad.items():
        ((name, _),) = convert_official({key: want}).items()
        case.check(f"grad/{key}", ours[name])
    for name in case.grad_in:
        case.check(f"grad_in/{name}", inputs[name].grad)

    with torch.no_grad():
        joint, mask, positions = one_attention(model, batch, case.out["x_t"], t)
    case.check("out/v_t", joint)
    assert torch.equal(mask, case.out["att_mask"]) and torch.equal(positions, case.out["position_ids"])

    trace = []
    chunk = model.sample(batch, steps=case.config["steps"], noise=case.inp["init_noise"], trace=trace)
    # Two official ways to count time differ by 8e-5 here; ours is LeRobot's, which made these numbers.
    case.check("out/samples", chunk)
    case.check("out/sample_trace", torch.stack(trace))
    case.check("out/samples_uncached", chunk)


@golden("pi0.preprocess_images")
def test_golden_images(case):
    for k in range(len(case.config["hw"])):
        case.check(f"out/image_{k}", pi0.fit_images(case.inp[f"image_{k}"], case.config["S"]))
    config = Config(action_dim=1, state_dim=case.config["state_dim"], padded_dim=case.config["dim"])
    case.check("out/state", small(config).pad(case.inp["state"]))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def meta(name, rename=lambda k: k):
    keys, n = manifest(name)
    return {rename(k): torch.empty(shape, device="meta") for k, shape in keys.items()}, n


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        model = Pi0(Config(**PRESETS["pi0"]))
    assert parameters(model) == 3_238_048_528
    parts = [model.vision, model.projector, model.embed, model.vlm, model.expert]
    assert [parameters(p) for p in parts] == [412_442_352, 2_361_344, 526_647_296, 1_981_884_416, 311_464_960]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_released_weights_load_on_the_meta_device(prefix):
    official, _ = meta("pi0_base", lambda k: prefix + k)
    model = Pi0.from_official(official, Config(**PRESETS["pi0"]))
    assert parameters(model) == 3_238_048_528
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    del official[prefix + tied], official[f"{prefix}paligemma_with_expert.gemma_expert.lm_head.weight"]
    assert parameters(Pi0.from_official(official, Config(**PRESETS["pi0"]))) == 3_238_048_528


@pytest.mark.parametrize("published_2024", [False, True])
def test_paligemma_alone_loads_and_the_expert_starts_fresh(published_2024):
    def rename(key):
        if published_2024:
            key = key.removeprefix("model.").replace("language_model.", "language_model.model.")
            key = key.replace("lm_head.", "language_model.lm_head.")
        return key

    official, _ = meta("paligemma_3b_224", rename)
    model = Pi0.from_official(official, Config(**PRESETS["pi0"] | {"freeze_vlm": True}))
    assert parameters(model) == 3_238_048_528
    trained = sum(p.numel() for p in model.param_groups(0.0)[0]["params"])
    assert trained == 311_464_960 + 3_248_160  # expert and its projections


def early_layout(key):
    """LeRobot's names of early 2025 for openpi's."""
    key = key.replace("paligemma.lm_head", "paligemma.language_model.lm_head")
    key = key.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
    return "model." + key.replace("paligemma.model.", "paligemma.")


@golden("pi0.PI0Pytorch")
def test_every_layout_gives_the_same_model_without_a_copy(case):
    config = official_config(case)
    want = Pi0.from_official(case.sd, config).state_dict()
    normalizer = {"normalize_inputs.buffer_observation_state.mean": torch.zeros(3)}
    early = {early_layout(k): v for k, v in case.sd.items()} | normalizer
    assert all(".model.vision_tower" not in k for k in early)
    for layout in ({f"model.{k}": v for k, v in case.sd.items()}, early):
        got = Pi0.from_official(layout, config).state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
        held = {v.data_ptr() for v in layout.values()}
        assert all(v.data_ptr() in held for v in got.values())


@golden("pi0.PI0Pytorch")
def test_a_fresh_expert_beside_loaded_weights(case):
    config = official_config(case)
    vlm = {k: v for k, v in case.sd.items() if ".paligemma." in k}
    torch.manual_seed(0)
    model = Pi0.from_official(vlm, config)
    loaded = Pi0.from_official(case.sd, config)
    assert torch.equal(model.vlm.layers[0].q.weight, loaded.vlm.layers[0].q.weight)
    gate = model.expert.layers[0].gate.weight
    assert gate.std().item() == pytest.approx((3 * gate.shape[1]) ** -0.5, rel=0.1)  # torch's own rule
    assert torch.isfinite(model.loss(official_batch(case))["loss"])


def test_from_official_names_everything_that_does_not_fit():
    official, _ = meta("pi0_base")
    del official["action_out_proj.bias"]
    official["extra"] = torch.empty(3, device="meta")
    official["state_proj.bias"] = torch.empty(7, device="meta")
    with pytest.raises(ValueError) as error:
        Pi0.from_official(official, Config(**PRESETS["pi0"]))
    for named in (
        "missing action_out_proj.bias",
        "left over extra",
        "state_proj.bias is (7,) and should be (1024,)",
    ):
        assert named in str(error.value)
    assert "\n" not in str(error.value)


# -- what the tests below are made of

SMALL = {
    "action_dim": 2,
    "state_dim": 3,
    "n_cameras": 2,
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
    "depth": 2,
    "head_dim": 8,
    "width": 32,
    "mlp": 48,
    "expert_width": 24,
    "expert_mlp": 32,
    "n_draws": 1,
}


def small(config=None, seed=0, **changes):
    torch.manual_seed(seed)
    if config is not None:
        changes |= {k: getattr(config, k) for k in ("action_dim", "state_dim", "padded_dim")}
    return Pi0(Config(**SMALL | changes)).eval()


def small_batch(config, B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    V, (H, W) = config.n_cameras, config.image_size
    text = torch.stack([config.encode_text(w) for w in ("red", "the blue", "")])[torch.arange(B) % 3]
    return {
        "actions": torch.rand(B, config.horizon, config.action_dim, generator=g) * 2 - 1,
        "action_mask": torch.ones(B, config.horizon, dtype=torch.bool),
        "text": text,
        "state": torch.randn(B, 1, config.state_dim, generator=g),
        "images": torch.randint(256, (B, 1, V, 3, H, W), generator=g, dtype=torch.uint8),
    }


def velocity(model, batch, x_t, t):
    with torch.no_grad():
        cache, valid = model.encode(batch, *model.embed_images(batch))
        return model.velocity(cache, valid, model.pad(batch["state"][:, -1]), x_t, t)


class KnownVelocity:
    """Stands in for the network: v(x_t, t), and keeps what it was asked."""

    def __init__(self, model, v):
        self.v, self.seen = v, []
        model.velocity = self

    def __call__(self, cache, valid, state, x_t, t):
        self.seen.append((x_t, t))
        return self.v(x_t, t)


# -- closed forms


def test_time_is_distributed_as_the_shifted_beta():
    torch.manual_seed(0)
    t = pi0.sample_time(200_000, "cpu").double()
    a, b = 1.5, 1.0
    assert t.mean().item() == pytest.approx(0.001 + 0.999 * a / (a + b), abs=2e-3)
    assert t.var().item() == pytest.approx(0.999**2 * a * b / ((a + b) ** 2 * (a + b + 1)), rel=0.02)
    assert 0.001 <= t.min() and t.max() <= 1
    for q in (0.1, 0.5, 0.9):  # P(beta < x) = x^1.5
        assert (t < 0.001 + 0.999 * q).double().mean().item() == pytest.approx(q**1.5, abs=5e-3)


def test_the_ends_of_the_path_are_exactly_noise_and_data():
    model = small()
    batch, noise = small_batch(model.config), torch.randn(3, 5, 2)
    known = KnownVelocity(model, lambda x, t: torch.zeros_like(x))
    model.loss(batch, noise=noise, t=torch.tensor([1.0, 0.0, 0.25]))
    ((x_t, t),) = known.seen
    assert torch.equal(x_t[0], noise[0]) and torch.equal(x_t[1], batch["actions"][1])
    assert torch.allclose(x_t[2], 0.25 * noise[2] + 0.75 * batch["actions"][2])


def test_the_loss_is_zero_for_the_target_and_sampling_it_leads_from_noise_to_data():
    """The sign: with v = eps - x0, what the loss asks for, the sampler ends on x0, in one step or many."""
    model = small(text_weight=0.0)
    batch, noise = small_batch(model.config), torch.randn(3, 5, 2)
    KnownVelocity(model, lambda x, t: noise - batch["actions"])
    assert model.loss(batch, noise=noise)["loss"] == 0
    for steps in (1, 3, 10):
        assert torch.allclose(model.sample(batch, steps, noise=noise), batch["actions"], atol=1e-6)


def test_time_runs_from_one_to_the_last_step_before_zero():
    model = small()
    known = KnownVelocity(model, lambda x, t: t[:, None, None] * torch.ones_like(x))
    start = torch.randn(3, 5, 2)
    end = model.sample(small_batch(model.config), 10, noise=start)
    assert [t[0].item() for _, t in known.seen] == pytest.approx([1 - k / 10 for k in range(10)])
    assert torch.allclose(end, start - 0.55, atol=1e-6)  # the sum of 0.1 * (1 - k / 10)


def test_gaussian_chunks_come_back():
    """x0 ~ N(m, s^2) has the velocity E[eps - x0 | x_t] in closed form: m + (t - (1-t) s^2) / var * (x_t -
    (1-t) m) with m negated in front; many Euler steps carry N(0, 1) onto N(m, s^2)."""
    m, s = 0.4, 0.3
    model = small(horizon=2, n_action_steps=1)

    def v(x, t):
        t = t[:, None, None]
        return -m + (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2) * (x - (1 - t) * m)

    KnownVelocity(model, v)
    chunk = model.sample(small_batch(model.config, B=4000), 200, generator=torch.Generator().manual_seed(0))
    assert chunk.mean().item() == pytest.approx(m, abs=0.01)
    assert chunk.std().item() == pytest.approx(s, rel=0.03)


def test_loss_is_the_mean_over_real_steps_and_padded_dimensions():
    model = small(padded_dim=4, text_weight=0.0)
    batch, noise = small_batch(model.config), torch.randn(3, 5, 4)
    KnownVelocity(model, lambda x, t: torch.zeros_like(x))
    batch["action_mask"][0, 2:] = False
    result = model.loss(batch, noise=noise, t=torch.tensor([0.5, 0.2, 0.9]))
    u = noise - F.pad(batch["actions"], (0, 2))
    real = torch.cat([u[0, :2].flatten(), u[1:].flatten()])
    assert result["loss"].item() == pytest.approx(real.square().mean().item(), rel=1e-5)
    assert result["per_sample"][0].item() == pytest.approx(u[0, :2].square().mean().item(), rel=1e-5)
    assert torch.equal(result["t"], torch.tensor([0.5, 0.2, 0.9]))


def test_rope_turns_by_the_difference_of_positions_and_keeps_lengths():
    q, k = torch.randn(2, 1, 1, 1, 8)
    turn = lambda x, p: pi0.rotate(x, *pi0.rope_angles(torch.tensor([[p]]), 8))
    product = lambda a, b: (turn(q, a) * turn(k, b)).sum()
    assert torch.allclose(product(3, 1), product(103, 101), atol=1e-4)
    assert not torch.allclose(product(3, 1), product(4, 1), atol=1e-4)
    assert torch.allclose(turn(q, 7).norm(), q.norm())
    # At position p the pair (0, 4) turns by p, the slowest pair (3, 7) by p / 1000.
    x = torch.eye(8)[[0, 3]][None, :, None]  # (1, 2, 1, 8)
    x = pi0.rotate(x, *pi0.rope_angles(torch.tensor([[2, 2]]), 8))[0, :, 0]
    assert torch.allclose(x[0, [0, 4]], torch.tensor([math.cos(2), math.sin(2)]))
    assert torch.allclose(x[1, [3, 7]], torch.tensor([math.cos(0.002), math.sin(0.002)]))


def test_images_keep_their_aspect_and_are_scaled_to_one():
    image = torch.ones(1, 3, 12, 16)  # white, wider than high
    fitted = pi0.fit_images(image, 8)[0, 0]  # 6 white rows between two black ones
    assert torch.equal(fitted[:, 0], torch.tensor([-1, 1, 1, 1, 1, 1, 1, -1.0]))


# -- meaning


def test_the_mask_is_the_picture_in_the_docstring():
    valid = torch.tensor([[True, True, False, True, True, True]])
    mask = block_mask(valid, torch.tensor([0, 0, 0, 1, 1, 0]))[0].int().tolist()
    assert mask == [
        [1, 1, 0, 0, 0, 0],  # image
        [1, 1, 0, 0, 0, 0],  # text
        [0, 0, 0, 0, 0, 0],  # padding
        [1, 1, 0, 1, 0, 0],  # state
        [1, 1, 0, 1, 1, 1],  # two actions
        [1, 1, 0, 1, 1, 1],
    ]


def test_who_sees_whom():
    """Each part is changed in turn; what may not see it stays the same to the last bit."""
    model = small()
    batch, x_t, t = small_batch(model.config), torch.randn(3, 5, 2), torch.tensor([0.2, 0.5, 0.9])
    outputs = []
    model.expert.register_forward_hook(lambda module, args, out: outputs.append(out[0]))

    def suffix(batch, x_t):
        velocity(model, batch, x_t, t)
        return outputs[-1]  # (B, 1 + Tp, D): state, actions

    base = suffix(batch, x_t)
    one = x_t.clone()
    one[:, 4] += 1
    moved = (suffix(batch, one) - base).abs().amax((0, 2))
    assert moved[0] == 0 and (moved[1:] > 1e-4).all()  # the last action: seen by the first, not by the state
    moved = (suffix(batch | {"state": batch["state"] + 1}, x_t) - base).abs().amax((0, 2))
    assert (moved > 1e-4).all()
    other = batch | {"text": model.config.encode_text("blue").expand(3, -1)}
    assert ((suffix(other, x_t) - base).abs().amax((1, 2)) > 1e-4).all()
    cache, _ = model.encode(batch, *model.embed_images(batch))  # takes no state and no actions
    changed, _ = model.encode(other, *model.embed_images(batch))
    images = 2 * (16 // 8) ** 2
    assert not torch.equal(cache[-1][0][:, :, :images], changed[-1][0][:, :, :images])  # images see the text


def test_a_masked_camera_and_padded_text_cannot_change_anything():
    model = small()
    batch, noise = small_batch(model.config), torch.randn(3, 5, 2)
    batch["image_mask"] = torch.tensor([[[True, False]]] * 3)
    base = model.sample(batch, noise=noise)
    junk = batch | {"images": batch["images"].clone()}
    junk["images"][:, :, 1] = 255 - junk["images"][:, :, 1]
    assert torch.equal(model.sample(junk, noise=noise), base)
    padded = batch | {"text_mask": batch["text"] > 0}
    padded["text"] = torch.where(batch["text"] > 0, batch["text"], 77)
    assert torch.equal(model.sample(padded, noise=noise), base)
    # A camera that is not there at all counts like one that is masked, and so does text cut to its length.
    model.config.n_cameras = 1
    less = batch | {
        "images": batch["images"][:, :, :1],
        "image_mask": torch.ones(3, 1, 1, dtype=torch.bool),
        "text": batch["text"][:, :8],
    }
    assert torch.allclose(model.sample(less, noise=noise), base, atol=1e-5)


def test_cached_sampling_equals_computing_everything_again():
    model = small(n_kv_heads=2)
    batch, x_t = small_batch(model.config), torch.randn(3, 5, 2)
    chunk = model.sample(batch, 10, noise=x_t)
    with torch.no_grad():
        for k in range(10):
            x_t = x_t - one_attention(model, batch, x_t, torch.full((3,), 1 - k / 10))[0] / 10
    assert torch.allclose(chunk, x_t, atol=1e-5)


def test_draws_that_share_a_prefix_are_so_many_losses():
    model = small(n_draws=3)
    batch, noise, t = small_batch(model.config), torch.randn(9, 5, 2), torch.rand(9)
    shared = model.loss(batch, noise=noise, t=t)
    alone = [model.loss(batch, noise=noise[i : i + 3], t=t[i : i + 3])["flow"] for i in (0, 3, 6)]
    assert shared["flow"].item() == pytest.approx(sum(alone).item() / 3, rel=1e-5)
    torch.manual_seed(1)
    assert model.loss(batch)["per_sample"].shape == (9,)


def test_time_enters_through_the_action_tokens_only():
    model = small()
    state, x = torch.randn(2, 3), torch.randn(2, 5, 2)
    early, late = (model.embed_suffix(state, x, torch.full((2,), t)) for t in (0.9, 0.1))
    assert torch.equal(early[:, 0], late[:, 0]) and ((early[:, 1:] - late[:, 1:]).abs().amax(-1) > 1e-3).all()


def test_sampling_is_the_same_one_at_a_time_and_nearly_so_in_bfloat16():
    model = small()
    batch, noise = small_batch(model.config), torch.randn(3, 5, 2)
    together = model.sample(batch, noise=noise)
    one = lambda i: model.sample({k: v[i : i + 1] for k, v in batch.items()}, noise=noise[i : i + 1])
    assert torch.allclose(together, torch.cat([one(i) for i in range(3)]), atol=1e-5)
    half = model.to(torch.bfloat16).sample(batch, noise=noise)
    assert (half - together).abs().max() < 0.15 and half.dtype == torch.float32


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing).train()
        batch = small_batch(model.config)
        model.loss(batch, noise=torch.ones(3, 5, 2), t=torch.tensor([0.1, 0.5, 0.8]))["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_what_learns():
    """Everything by default; without the text loss not the parts that only it reads; frozen, the expert
    alone."""
    for changes, idle in (
        ({}, r"^$"),
        ({"text_weight": 0.0}, r"^vlm\.(norm|layers\.1\.(q|o|norm2|gate|up|down))\."),
        ({"freeze_vlm": True}, r"^(vision|projector|embed|vlm)\."),
    ):
        model = small(**changes).train()
        result = model.loss(small_batch(model.config))
        result["loss"].backward()
        for name, p in model.named_parameters():
            assert (p.grad is None) == (not p.requires_grad) == bool(re.match(idle, name)), name
        listed = sum(p.numel() for p in model.param_groups(0.1)[0]["params"])
        assert listed == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert ("text" in result) == (not changes)


# -- text


def test_text_is_causal_and_reads_images():
    model = small()
    batch = small_batch(model.config)
    images, seen = model.embed_images(batch)
    text = batch["text"]
    base = model.text_logits(images, seen, text)  # (3, 9, 257)
    changed = text.clone()
    changed[:, 4] = 99
    moved = (model.text_logits(images, seen, changed) - base).abs().amax((0, 2))
    assert (moved[:5] == 0).all() and (moved[5:] > 1e-4).all()  # code 4 is an input from 5 on
    moved = (model.text_logits(images.flip(0), seen, text) - base).abs().amax((1, 2))
    assert moved[0] > 1e-4 and moved[2] > 1e-4


def test_text_loss_counts_each_code_and_the_end():
    """With even logits the loss is log(vocab); with the right answer certain it is 0, whatever the padding
    says."""
    model = small()
    batch = small_batch(model.config)
    model.text_logits = lambda images, seen, text: torch.zeros(*text.shape, 257)
    assert model.text_loss(None, None, batch["text"]).item() == pytest.approx(math.log(257), rel=1e-5)
    certain = F.one_hot(batch["text"], 257) * 100.0
    certain[0, 4:] = 0  # "red" ends at 3; padding from 4 on
    model.text_logits = lambda images, seen, text: certain
    assert model.text_loss(None, None, batch["text"]).item() == pytest.approx(0, abs=1e-6)
    certain[0, 3] = 0  # the end of "red" counts
    n = 4 + 9 + 1
    assert model.text_loss(None, None, batch["text"]).item() == pytest.approx(math.log(257) / n, rel=1e-5)


def test_the_text_head_learns_what_the_picture_shows_and_completes_it():
    model = small(text_share=1.0).train()
    config = model.config
    words = ["red", "blue"]
    batch = small_batch(config, B=8)
    batch["text"] = torch.stack([config.encode_text(words[i % 2]) for i in range(8)])
    batch["images"][:] = 0
    batch["images"][::2, :, :, 0], batch["images"][1::2, :, :, 2] = 255, 255
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        result = model.loss(batch)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["text"].item())
        assert result["loss"].item() == pytest.approx(result["flow"].item() + 0.1 * losses[-1], rel=1e-4)
    assert losses[-1] < 0.05 * losses[0]
    model.eval()
    two = {k: v[:2] for k, v in batch.items()}
    read = lambda prompt: [config.decode_text(c) for c in model.complete_text(two, prompt)]
    assert read(torch.zeros(2, 0, dtype=torch.int64)) == words
    assert read(config.encode_text("bl")[None, :2].expand(2, -1))[1] == "blue"  # the picture that is blue


def test_bytes_and_back_and_what_is_too_long():
    config = Config(text_len=8)
    codes = config.encode_text("gr\u00fcn")
    assert codes.tolist() == [104, 115, 196, 189, 111, 0, 0, 0] and config.decode_text(codes) == "gr\u00fcn"
    with pytest.raises(ValueError, match="9 codes, more than text_len 8"):
        config.encode_text("nine byte")


def test_sentencepiece_text_has_paligemmas_form(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="package sentencepiece is an extra")
    sentences = ["put the red block in the left zone", "put the blue block in the right zone"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "words"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path = str(tmp_path / "words.model")
    pieces = pi0.tokenizer(path)
    config = Config(tokenizer_path=path, vocab_size=pieces.vocab_size(), text_len=40)
    codes = config.encode_text("  put_the red block\n").tolist()
    assert codes[0] == 2 and len(codes) == 40
    real = [c for c in codes if c]
    assert real == [2] + pieces.encode("put the red block") + pieces.encode("\n")
    assert config.decode_text(torch.tensor(codes)).strip() == "put the red block"
    with pytest.raises(ValueError, match="pieces, vocab_size is 9"):
        Config(tokenizer_path=path, vocab_size=9).encode_text("red")


def test_a_tokenizer_file_that_is_not_there_is_named():
    pytest.importorskip("sentencepiece", reason="package sentencepiece is an extra")
    with pytest.raises(ValueError, match="nowhere.model"):
        Config(tokenizer_path="nowhere.model").encode_text("red")


# -- bad input, shapes, the file itself


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_cameras": 4}, "4 cameras.*room for 3"),
        ({"n_cameras": 0}, "n_cameras 0 must be at least 1"),
        ({"n_obs_steps": 2}, "no history"),
        ({"padded_dim": 1}, "action_dim 2 is above padded_dim 1"),
        ({"padded_dim": 2}, "state_dim 3 is above padded_dim 2"),
        ({"n_action_steps": 6}, "n_action_steps 6"),
        ({"text_len": 0}, "text_len 0"),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"patch_size": 7}, "vit_size 16 must be a multiple of patch_size 7"),
        ({"n_kv_heads": 3}, "n_kv_heads 3"),
        ({"vit_heads": 3}, "vit_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"n_draws": 0}, "n_draws 0"),
        ({"sampler_steps": 0}, "sampler_steps 0"),
    ],
)
def test_impossible_configurations_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**SMALL | change)
    assert "\n" not in str(error.value)


def test_batches_that_do_not_fit_are_refused():
    model = small()
    batch = small_batch(model.config)
    with pytest.raises(ValueError, match="n_cameras = 2"):
        model.loss(batch | {"images": batch["images"][:, :, :1]})
    with pytest.raises(ValueError, match="text_len = 9"):
        model.sample(batch | {"text": torch.ones(3, 10, dtype=torch.int64)})
    with pytest.raises(ValueError, match="sampler steps 0"):
        model.sample(batch, steps=0)


def test_documented_shapes():
    model = small()
    batch = small_batch(model.config)
    shapes = {}
    for name in ("vision", "vlm", "expert"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.update({name: (args[0].shape, out)})
        )
    trace = []
    chunk = model.sample(batch, steps=7, trace=trace)
    assert chunk.shape == (3, 5, 2) and len(trace) == 7 and torch.equal(trace[-1], chunk)
    P, S = 2 * 4 + 9, 1 + 5
    assert shapes["vision"][0] == (6, 3, 16, 16) and shapes["vision"][1].shape == (6, 4, 16)
    assert shapes["vlm"][0] == (3, P, 32) and shapes["vlm"][1][0] is None
    assert shapes["expert"][0] == (3, S, 24) and shapes["expert"][1][0].shape == (3, S, 24)
    heads = model.config.n_kv_heads
    assert [k.shape for k, _ in shapes["vlm"][1][1]] == [(3, heads, P, 8)] * 2
    assert [v.shape for _, v in shapes["expert"][1][1]] == [(3, heads, P + S, 8)] * 2


def test_initial_queries_and_keys_are_as_wide_as_configured():
    model = small(width=256, n_heads=4, head_dim=64, qk_init=2.0)
    layer, x = model.vlm.layers[0], torch.randn(500, 256)
    plain = layer.v(x).std().item()
    assert plain == pytest.approx(3 ** -0.5, rel=0.05)  # torch's own rule: uniform up to 1 / sqrt(width)
    assert layer.q(x).std().item() == pytest.approx(2.0 * plain, rel=0.05)
    assert layer.k(x).std().item() == pytest.approx(2.0 * plain, rel=0.05)


def test_initial_picture_tokens_are_as_large_as_configured():
    models = []
    for factor in (1.0, 4.0):
        torch.manual_seed(0)
        models.append(small(image_init=factor))
    a, b = models
    torch.testing.assert_close(b.vision.patch.weight, 4 * a.vision.patch.weight)
    torch.testing.assert_close(b.vision.position, 4 * a.vision.position)
    torch.testing.assert_close(b.projector.weight, 2 * a.projector.weight)


def test_every_equation_of_the_docstring_is_tagged_in_the_code():
    head, _, code = open(pi0.__file__).read()[3:].partition('"""')
    listed = set(re.findall(r"^    \[(\d+)\] ", head, flags=re.M))
    tagged = set(re.findall(r"#[^\n]*\[(\d+)\]", code))
    assert listed == tagged == {str(i) for i in range(1, len(listed) + 1)}


def test_main_learns_to_read_one_letter():
    assert pi0.main(steps=200) > 0.9


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


@pytest.mark.parametrize("changes", [{}, {"padded_dim": 4, "text_weight": 0.0}, {"checkpointing": True},
                                     {"augment": True, "wrist_cameras": (1,)}])
def test_loss_and_sample_never_wait_for_the_device(changes, monkeypatch):
    config = Config(**SMALL | {"n_draws": 2} | changes)
    batch = {k: v.to("meta") for k, v in small_batch(config).items()}
    with torch.device("meta"):
        model = Pi0(config).train()
    monkeypatch.setattr(torch, "tensor", None)  # a list of Python's is on the CPU too
    with HostCopies() as copies:
        model.loss(batch)["loss"].backward()
        model.sample(batch)
    assert not copies.found


class Casts(TorchDispatchMode):
    """Collects the shapes of all tensors that change their type."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            self.found.append(tuple(out.shape))
        return out


def test_masks_are_cast_once_and_not_in_every_layer():
    """Under autocast embeddings are float32 and products are not: a mask in the embeddings' type would be
    converted, and kept, once per layer."""
    model = small(depth=6, text_weight=0.0)
    batch = small_batch(model.config)
    P, N, group = 2 * 4 + 9, 1 + 5, 2
    masks = {(3, P, P), (3, 1, group * P, P), (3, N, P + N), (3, 1, group * N, P + N)}
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        model.loss(batch)
    assert 1 <= sum(shape in masks for shape in casts.found) <= 2


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_bfloat16_trains_and_samples(half):
    model = small(n_draws=2)
    batch, noise, t = small_batch(model.config), torch.randn(6, 5, 2), torch.rand(6)
    want, chunk = model.loss(batch, noise=noise, t=t)["loss"], model.sample(batch, noise=noise[:3])
    if half == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        loss, got = model.loss(batch, noise=noise, t=t)["loss"], model.sample(batch, noise=noise[:3])
    loss.backward()
    assert loss.dtype == got.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.05)
    assert (got - chunk).abs().max() < 0.15 and all(torch.isfinite(p.grad).all() for p in model.parameters())


# -- masks and draws


def ragged(batch, config):
    lengths = torch.tensor([2, 5, 3])
    return batch | {"action_mask": torch.arange(config.horizon) < lengths[:, None]}


def test_draws_and_masks_stand_in_one_order():
    """Masks of different lengths: one loss of n draws is n losses of one, and each item's is its own."""
    model = small(n_draws=3, text_weight=0.0)
    batch = ragged(small_batch(model.config), model.config)
    batch["image_mask"] = torch.tensor([[[1, 1]], [[0, 1]], [[1, 0]]]).bool()
    noise, t = torch.randn(9, 5, 2), torch.rand(9)
    shared = model.loss(batch, noise=noise, t=t)
    parts = [model.loss(batch, noise=noise[i : i + 3], t=t[i : i + 3]) for i in (0, 3, 6)]
    assert torch.allclose(shared["per_sample"], torch.cat([p["per_sample"] for p in parts]), rtol=1e-4)
    assert shared["loss"].item() == pytest.approx(sum(p["loss"].item() for p in parts) / 3, rel=1e-5)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        alone = model.loss(one, noise=noise[i::3], t=t[i::3])["per_sample"]
        assert torch.allclose(alone, shared["per_sample"][i::3], rtol=1e-4), i


def test_padding_is_left_out_or_trained_on():
    config = Config(**SMALL)
    batch = ragged(small_batch(config), config)
    noise, past = torch.randn(3, 5, 2), ~batch["action_mask"][..., None]
    for on in (False, True):
        model = small(train_on_padding=on, text_weight=0.0)
        KnownVelocity(model, lambda x, t: noise - batch["actions"] + 2.0 * past)  # wrong past the end only
        result = model.loss(batch, noise=noise)
        want = 4.0 * 5 / 15 if on else 0.0  # 3 + 0 + 2 of 15 steps
        assert result["loss"].item() == pytest.approx(want, abs=1e-6)
        want = [4 * 0.6, 0, 4 * 0.4] if on else [0, 0, 0]
        assert result["per_sample"].tolist() == pytest.approx(want, abs=1e-6)
    assert PRESETS["pi0"]["train_on_padding"] and not Config().train_on_padding


def test_masks_may_be_numbers():
    model = small()
    batch = ragged(small_batch(model.config), model.config)
    batch["image_mask"] = torch.tensor([[[1, 1]], [[0, 1]], [[1, 0]]]).bool()
    batch["text_mask"] = batch["text"] > 0
    noise, t = torch.randn(3, 5, 2), torch.rand(3)
    want = model.loss(batch, noise=noise, t=t)
    for dtype in (torch.int64, torch.uint8, torch.float32):
        numbers = {k: v.to(dtype) if v.dtype == torch.bool else v for k, v in batch.items()}
        got = model.loss(numbers, noise=noise, t=t)
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_an_image_mask_of_another_shape_is_refused():
    model = small()
    batch = small_batch(model.config)
    for shape in ((3, 2), (3, 2, 2), (3, 1, 3)):
        with pytest.raises(ValueError, match=r"image_mask \(3, .* \(B, To, V\) = \(3, 1, 2\)") as error:
            model.loss(batch | {"image_mask": torch.ones(shape)})
        assert "\n" not in str(error.value)


def test_the_text_loss_heeds_both_masks():
    """What stands behind the end of a text, and pictures of cameras that are missing, change nothing."""
    model = small(text_share=1.0)
    batch = small_batch(model.config)
    batch |= {"text_mask": batch["text"] > 0, "image_mask": torch.tensor([[[True, False]]] * 3)}
    loss = lambda batch: model.loss(batch, noise=torch.ones(3, 5, 2), t=torch.full((3,), 0.5))["text"]
    base, junk = loss(batch), batch | {"images": batch["images"].clone()}
    junk["text"] = torch.where(batch["text_mask"], batch["text"], 77)
    assert torch.equal(loss(junk), base)
    junk["images"][:, :, 1] = 255 - junk["images"][:, :, 1]
    assert torch.equal(loss(junk), base)
    junk["images"][:, :, 0] = 255 - junk["images"][:, :, 0]
    assert (loss(junk) - base).abs() > 1e-5
    plain = {k: v for k, v in batch.items() if k != "text_mask"}
    assert torch.equal(loss(plain), base)


# -- pictures, generators, groups


def test_pictures_in_bytes_are_fitted_and_scaled_and_floats_are_that_already():
    model = small()
    batch = small_batch(model.config)
    tokens, _ = model.embed_images(batch)
    fitted = pi0.fit_images(batch["images"].flatten(0, 2) / 255, 16).view(3, 1, 2, 3, 16, 16)
    assert torch.allclose(model.embed_images(batch | {"images": fitted})[0], tokens, atol=1e-6)
    seen = []
    model.vision.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    for byte, value in ((0, -1.0), (51, -0.6), (255, 1.0)):
        model.embed_images(batch | {"images": torch.full((3, 1, 2, 3, 16, 16), byte, dtype=torch.uint8)})
        assert torch.allclose(seen[-1], torch.tensor(value))
    assert pi0.fit_images(torch.ones(1, 3, 1, 1000), 16).shape == (1, 3, 16, 16)  # at least one row


def test_a_batch_is_its_items_one_by_one():
    """Three texts and three states; text loss and flow."""
    model = small(text_share=1.0, n_draws=2)
    batch = ragged(small_batch(model.config), model.config)
    noise, t = torch.randn(6, 5, 2), torch.rand(6)
    together = model.loss(batch, noise=noise, t=t)
    ones = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    alone = [model.loss(one, noise=noise[i::3], t=t[i::3]) for i, one in enumerate(ones)]
    for i in range(3):
        assert torch.allclose(together["per_sample"][i::3], alone[i]["per_sample"], rtol=1e-4), i
    codes = torch.tensor([4.0, 9.0, 1.0])  # "red" and its end, "the blue" and its end, the end
    want = sum(n * a["text"] for n, a in zip(codes, alone)) / codes.sum()
    assert together["text"].item() == pytest.approx(want.item(), rel=1e-4)


def test_the_share_of_the_text_loss_is_the_batchs_first_items():
    model, asked = small(text_share=0.5), []
    batch = small_batch(model.config)
    model.text_loss = lambda images, seen, text: asked.append(text) or images.sum() * 0
    model.loss(batch)
    assert torch.equal(asked[0], batch["text"][:2])


def test_the_generator_decides_every_draw_of_a_sample():
    model = small()
    batch, draw = small_batch(model.config), lambda seed: torch.Generator().manual_seed(seed)
    torch.manual_seed(1)
    first = model.sample(batch, generator=draw(3))
    torch.manual_seed(2)
    assert torch.equal(model.sample(batch, generator=draw(3)), first)
    assert not torch.equal(model.sample(batch, generator=draw(4)), first)
    assert torch.equal(model.sample(batch, noise=torch.randn(3, 5, 2, generator=draw(3))), first)
    assert first.std(0).min() > 0  # each item its own noise


def test_each_draw_of_each_item_has_its_own_time_and_noise():
    model = small(n_draws=400)
    known = KnownVelocity(model, lambda x, t: torch.zeros_like(x))
    batch = small_batch(model.config)
    torch.manual_seed(0)
    result = model.loss(batch)
    ((x_t, t),) = known.seen
    assert torch.equal(result["t"], t) and len(set(t.tolist())) > 1100
    t = t[:, None, None]
    noise = (x_t - (1 - t) * batch["actions"].repeat(400, 1, 1)) / t
    noise = noise[t.flatten() > 0.1]
    assert noise.std().item() == pytest.approx(1, rel=0.02) and noise.mean().abs() < 0.02
    assert noise.std(0).min() > 0.9


def test_training_mode_changes_nothing():
    """There is no dropout: what a policy learns with is what it acts with."""
    model = small()
    batch, noise, t = small_batch(model.config), torch.randn(3, 5, 2), torch.rand(3)
    want = model.loss(batch, noise=noise, t=t)["loss"]
    assert torch.equal(model.train().loss(batch, noise=noise, t=t)["loss"], want)


def test_every_parameter_that_learns_is_decayed_alike():
    for freeze in (False, True):
        model = small(freeze_vlm=freeze)
        (group,) = model.param_groups(0.07)
        assert group["weight_decay"] == 0.07
        frozen = ("vision.", "projector.", "embed.", "vlm.") if freeze else ()
        want = [p for name, p in model.named_parameters() if not name.startswith(frozen)]
        assert [id(p) for p in group["params"]] == [id(p) for p in want]


def test_constants_are_the_published_ones():
    model = small()
    text = torch.tensor([[5, 7]])
    assert torch.allclose(model.embed_text(text), model.embed(text) * 5.656854)  # sqrt(32)
    assert pi0.MASKED == pytest.approx(-2.3819763e38)
    embedding = pi0.time_embedding(torch.tensor([0.5]), 4)[0]  # periods 0.004 and 4
    want = [f(2 * math.pi * 0.5 / period) for f in (math.sin, math.cos) for period in (0.004, 4)]
    assert embedding.tolist() == pytest.approx(want, abs=1e-6)
    norm, x = pi0.GemmaNorm(2), torch.tensor([[3.0, 4.0]])
    norm.weight.data[:] = torch.tensor([0.0, 1.0])
    assert torch.allclose(norm(x), x / math.sqrt(12.5) * torch.tensor([1.0, 2.0]))
    angle = pi0.rope_angles(torch.tensor([[3]]), 4)[0][0, 0, 0]  # frequencies 1 and 1 / 100
    assert angle[:2].tolist() == pytest.approx([math.cos(3), math.cos(0.03)])
    c, recipe = Config(**PRESETS["pi0"]), pi0.RECIPES["pi0"]
    assert (c.horizon, c.sampler_steps, c.padded_dim, c.text_len, c.n_kv_heads) == (50, 10, 32, 48, 1)
    assert (recipe["lr"], recipe["ema_max"], recipe["weight_decay"]) == (2.5e-5, 0.99, 1e-10)


# -- ranges


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config) if f.type in (int, float)])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_no_number_ends_in_a_traceback(field, value):
    """Refused in one line that names the field, or built and trained."""
    try:
        model = Pi0(Config(**SMALL | {field: value}))
    except ValueError as e:
        assert "\n" not in str(e) and field in str(e)
        return
    assert value == 0, f"{field} = {value} was taken"
    assert torch.isfinite(model.loss(small_batch(model.config))["loss"])


@pytest.mark.parametrize("change, words", [
    ({"image_size": (0, 64)}, r"image_size \(0, 64\) must be at least 1"),
    ({"expert_width": 25}, "expert_width 25 must be even"),
    ({"text_share": 1.5}, "text_share 1.5"),
    ({"wrist_cameras": (0, 2)}, r"wrist_cameras \(0, 2\) must be numbers below n_cameras = 2"),
    ({"wrist_cameras": (-1,)}, r"wrist_cameras \(-1,\) must be at least 0"),
    ({"n_heads": 2, "n_kv_heads": 4}, "n_heads 2 must be a multiple of n_kv_heads 4"),
])
def test_ranges(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**SMALL | change)
    assert "\n" not in str(error.value)


def test_codes_that_are_no_text_are_dropped(monkeypatch):
    assert Config().decode_text(torch.tensor([104, 300, 106, 0, 256, 257])) == "gi"

    class Pieces:
        def vocab_size(self):
            return 9

        def decode(self, codes):
            return "-".join(map(str, codes))

    monkeypatch.setattr(pi0, "tokenizer", lambda path: Pieces())
    assert Config(tokenizer_path="any", vocab_size=20).decode_text(torch.tensor([3, 0, 9, 8, 15])) == "3-8"


def test_what_does_not_fit_is_told_in_bounded_length():
    with pytest.raises(ValueError, match=r"missing .*; and \d+ more$") as error:
        Pi0.from_official({"expert.extra": torch.zeros(1)}, Config(**SMALL))
    assert len(str(error.value)) < 400 and str(error.value).count("missing") == 6


# -- the full size


@pytest.mark.skipif(not os.environ.get("PI0_FULL"), reason="set PI0_FULL=1: takes 8 GB and minutes on a CPU")
def test_the_full_size_samples_a_chunk_on_a_cpu():
    """Random bfloat16 weights, 3 cameras, 10 steps; prints the seconds and the memory."""
    import resource

    began = time.perf_counter()
    config = Config(**PRESETS["pi0"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Pi0(config)
        model = model.to_empty(device="cpu").eval()
        model.init_weights(model)
    finally:
        torch.set_default_dtype(torch.float32)
    print(f"\nbuilt in {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads")
    batch = {
        "images": torch.randint(256, (1, 1, 3, 3, 224, 224), dtype=torch.uint8),
        "state": torch.zeros(1, 1, 32),
        "text": torch.randint(1, 257152, (1, 48)),
    }
    for _ in range(2):
        marks = [time.perf_counter()]
        with torch.no_grad():
            images, seen = model.embed_images(batch)
            marks.append(time.perf_counter())
            model.encode(batch, images, seen)
            marks.append(time.perf_counter())
        chunk = model.sample(batch)
        marks.append(time.perf_counter())
        images_s, prefix_s, all_s = (b - a for a, b in zip(marks, marks[1:]))
        steps_s = all_s - images_s - prefix_s
        print(f"images {images_s:.2f} s, prefix {prefix_s:.2f} s, 10 steps {steps_s:.2f} s, {all_s:.2f} s")
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    assert chunk.shape == (1, 50, 32) and torch.isfinite(chunk).all() and chunk.std() > 0


# -- pictures ----------------------------------------------------------------------------------------------


def test_shrunk_pictures_count_every_pixel_with_antialiasing_only():
    """Of one white column of eight, a picture an eighth as wide holds an eighth; without it, nothing."""
    image = torch.zeros(1, 3, 32, 32)
    image[..., 0::8] = 1
    smooth, coarse = (pi0.fit_images(image, 4, antialias) / 2 + 0.5 for antialias in (True, False))
    assert smooth.mean().item() == pytest.approx(1 / 8, abs=0.03) and coarse.max().item() == 0
    assert torch.equal(small(antialias=True).embed_images(small_batch(Config(**SMALL)))[0],
                       small().embed_images(small_batch(Config(**SMALL)))[0])  # nothing to shrink: the same


def test_released_pictures_shrink_as_openpi_has_them():
    assert Config(**PRESETS["pi0"]).antialias and Config(**PRESETS["pi0"]).augment
    assert not Config().augment


def test_moved_pictures_are_cropped_shifted_and_turned_within_the_published_ranges():
    """The brightness of every pixel says where it was: two ramps give each new pixel's old place."""
    B, side = 400, 64
    edge = (torch.arange(side) + 0.5) / side * 2 - 1                    # centres of pixels, -1 .. 1
    y, x = torch.meshgrid(edge, edge, indexing="ij")
    torch.manual_seed(0)
    moved = pi0.move_images(torch.stack([2 + x, 2 + y, torch.ones_like(x)]).expand(B, 3, side, side))
    old = moved[:, :2, 8:-8, 8:-8] - 2                                  # (B, 2, 48, 48), away from the edges
    flat = torch.stack([x, y, torch.ones_like(x)])[:, 8:-8, 8:-8].flatten(1).T
    place = torch.linalg.lstsq(flat.expand(B, -1, -1), old.flatten(2).mT).solution.mT       # (B, 2, 3)
    torch.testing.assert_close(place @ flat.T, old.flatten(2), atol=1e-4, rtol=0)  # nothing but such a map
    scale = place[:, :, :2].det().sqrt()
    torch.testing.assert_close(scale, torch.full((B,), 0.95), atol=1e-3, rtol=0)
    degrees = torch.atan2(place[:, 1, 0], place[:, 0, 0]).rad2deg()
    shift = place[:, :, 2]
    for values, most in ((degrees, 5), (shift[:, 0], 0.05), (shift[:, 1], 0.05)):
        assert values.abs().max() < most * 1.01 and values.max() > 0.95 * most and values.min() < -0.95 * most
        assert abs(values.std().item() / most - 3 ** -0.5) < 0.05       # uniform
    assert abs(torch.corrcoef(torch.stack([degrees, *shift.T])).triu(1)).max() < 0.15  # three draws, not one
    assert moved[:, 2].min() == 0 and (moved[:, 2] > 0.99).float().mean() > 0.98  # corners only are black


def test_recoloured_pictures_keep_to_the_published_ranges():
    B = 500
    torch.manual_seed(0)
    grey = pi0.recolour_images(torch.full((B, 1, 3, 2, 2), 0.5)) / 0.5   # no contrast, no colour: brightness
    assert 0.7 < grey.min() < 0.72 and 1.28 < grey.max() < 1.3 and abs(grey.mean() - 1) < 0.02
    assert (grey.std((1, 2, 3, 4)) < 1e-6).all()                        # one factor for the whole picture
    image = torch.full((1, 1, 3, 2, 2), 0.4)
    image[..., 0] = 0.5                                                 # a lighter column, still grey
    both = pi0.recolour_images(image.expand(B, 1, 3, 2, 2))
    ratio = (both[..., 0] - both[..., 1]).mean((1, 2, 3)) / both.mean((1, 2, 3, 4)) * 0.45 / 0.1
    assert 0.6 < ratio.min() < 0.62 and 1.38 < ratio.max() < 1.4
    image = torch.tensor([0.5, 0.45, 0.4]).view(1, 1, 3, 1, 1).expand(B, 1, 3, 2, 2)
    red = pi0.recolour_images(image)
    ratio = (red[:, 0, 0] - red[:, 0, 2]).mean((1, 2)) / red.mean((1, 2, 3, 4)) * 0.45 / 0.1
    # Contrast stretches the distance of colours too, about the picture's mean: 0.6 * 0.5 .. 1.4 * 1.5.
    assert 0.3 < ratio.min() < 0.4 and 1.9 < ratio.max() < 2.1
    assert 0 <= both.min() and pi0.recolour_images(torch.ones(50, 1, 3, 1, 1)).max() == 1


def test_wrist_cameras_are_recoloured_and_never_moved():
    """Columns of dark and light: a moved picture mixes them, a recoloured one keeps the border sharp."""
    image = torch.full((40, 2, 3, 16, 16), -0.2)
    image[..., 8:] = 0.2
    torch.manual_seed(0)
    out = pi0.augment_images(image, (1,))
    shades = lambda x: len(x[0].mul(1e4).round().unique())
    assert all(shades(out[b, 1]) == 2 for b in range(40)) and all(shades(out[b, 0]) > 2 for b in range(40))
    assert (out[:, 1, :, :, 8:].std((1, 2, 3)) < 1e-6).all()
    assert len(out[:, 1, 0, 0, 0].mul(1e6).round().unique()) == 40      # each by draws of its own


def test_pictures_are_augmented_in_training_only_and_by_the_seed():
    model, plain = small(augment=True, wrist_cameras=(1,)), small()
    batch, seen = small_batch(model.config), []
    model.vision.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    want = plain.embed_images(batch)[0]
    assert torch.equal(model.embed_images(batch)[0], want)              # in evaluation
    noise, t = torch.randn(3, 5, 2), torch.rand(3)
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(model.train().loss(batch, noise=noise, t=t)["loss"])
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])
    given, used = seen[0].view(3, 2, 3, 16, 16), seen[1].view(3, 2, 3, 16, 16)
    torch.manual_seed(0)
    assert torch.equal(used, pi0.augment_images(given, (1,)))
