"""pi05.py against the official implementation, and against what its docstring says. What it shares with pi0.py,
tests/test_pi0.py tests there; that it is shared, is tested here."""
import difflib
import gzip
import inspect
import json
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from golden_cases import GOLDEN_DIR, golden, manifest
from test_pi0 import official_batch, official_config, parameters

import pi0
import pi05
from pi05 import PRESETS, Config, Pi05, convert_official, state_bins

# -- the official implementation ---------------------------------------------------------------------------


def one_attention(model, batch, x_t, t):
    """The velocity as the paper draws it: prefix and actions side by side in one sequence, every layer one
    attention over all of it, no cache. -> (velocity, mask (B, N, N), positions (B, N))"""
    images, seen = model.embed_images(batch)
    streams = [torch.cat([images, model.embed_text(batch["text"])], dim=1), model.action_in_proj(x_t)]
    P, N = (x.shape[1] for x in streams)
    valid = F.pad(torch.cat([seen, batch.get("text_mask", batch["text"] > 0)], dim=1), (0, N), value=True)
    mask = pi05.block_mask(valid, torch.tensor([0] * P + [1] + [0] * (N - 1)))
    positions, c = valid.cumsum(1) - 1, model.condition(t)
    rope = pi05.rope_angles(positions, model.config.head_dim)
    group = model.config.n_heads // model.config.n_kv_heads

    def branches(layers, norm):
        """What each stream's norm gives: inputs of the branches, and their gates."""
        return zip(*(getattr(layer, norm)(x, c) for layer, x in zip(layers, streams)))

    for layers in zip(model.vlm.layers, model.expert.layers):
        normed, gates = branches(layers, "norm1")
        q, k, v = (torch.cat([getattr(layer, name)(h) for layer, h in zip(layers, normed)], dim=1).unflatten(
            -1, (-1, model.config.head_dim)) for name in "qkv")
        q, k = pi05.rotate(q, *rope), pi05.rotate(k, *rope)
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / model.config.head_dim ** 0.5
        weights = torch.where(mask[:, None], logits, pi05.MASKED).softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2).split([P, N], dim=1)
        streams = [x + gate * layer.o(o) for layer, x, o, gate in zip(layers, streams, out, gates)]
        normed, gates = branches(layers, "norm2")
        streams = [x + gate * layer.down(F.gelu(layer.gate(h), approximate="tanh") * layer.up(h))
                   for layer, x, h, gate in zip(layers, streams, normed, gates)]
    return model.action_out_proj(model.expert.norm(streams[1], c)[0]), mask, positions


@golden("pi05.PI0Pytorch")
def test_golden(case):
    model = Pi05.from_official(case.sd, official_config(case, Config))
    inputs = {k: case.inp[k].clone().requires_grad_() for k in ("actions", "noise")}
    batch, t = official_batch(case, **inputs), case.inp["time"]
    images, seen = model.embed_images(batch)
    case.check("out/prefix_embs", torch.cat([images, model.embed_text(batch["text"])], dim=1))
    case.check("out/time_emb", pi05.time_embedding(t, model.config.expert_width))
    case.check("out/suffix_embs", model.action_in_proj(case.out["x_t"]))
    c = model.condition(t)
    case.check("out/adarms_cond", c)
    case.check("out/modulation_first", model.expert.layers[0].norm1.dense(c))
    case.check("out/modulation_final", model.expert.norm.dense(c))
    seen_out = []
    model.expert.register_forward_hook(lambda module, args, out: seen_out.append(out[0]))
    cache, valid = model.encode(batch, images, seen)
    v_t = model.velocity(cache, valid, case.out["x_t"], t)
    case.check("out/expert_out", seen_out[0])
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
    D = model.config.expert_width
    assert (ours["expert.norm.dense.weight"][2 * D:] == 0).all()    # the last norm's gate is not used

    with torch.no_grad():
        joint, mask, positions = one_attention(model, batch, case.out["x_t"], t)
    case.check("out/v_t", joint)
    assert torch.equal(mask, case.out["att_mask"]) and torch.equal(positions, case.out["position_ids"])


@golden("pi05.PI0Pytorch")
def test_golden_samples(case, monkeypatch):
    model = Pi05.from_official(case.sd, official_config(case, Config))
    batch, steps, trace = official_batch(case), case.config["steps"], []
    chunk = model.sample(batch, steps=steps, noise=case.inp["init_noise"], trace=trace)
    case.check("out/samples_lerobot", chunk)
    # openpi subtracts its step again and again: at its own times, its own numbers.
    rms = case.out["samples"].square().mean().sqrt()
    assert (chunk - case.out["samples"]).abs().max() < 3e-4 * rms
    times, velocity = iter(case.out["sample_times"]), model.velocity
    monkeypatch.setattr(model, "velocity", lambda cache, valid, x_t, t: velocity(
        cache, valid, x_t, torch.full_like(t, next(times).item())))
    trace = []
    chunk = model.sample(batch, steps=steps, noise=case.inp["init_noise"], trace=trace)
    case.check("out/samples", chunk)
    case.check("out/sample_trace", torch.stack(trace))
    case.check("out/samples_uncached", chunk)


def meta(name, prefix=""):
    keys, _ = manifest(name)
    return {prefix + k: torch.empty(shape, device="meta") for k, shape in keys.items()}


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        model = Pi05(Config(**PRESETS["pi05"]))
    assert parameters(model) == 3_353_433_872
    parts = [model.vision, model.projector, model.embed, model.vlm, model.expert]
    assert [parameters(p) for p in parts] == [412_442_352, 2_361_344, 526_647_296, 1_981_884_416, 427_932_672]
    adaptive = [m for m in model.modules() if isinstance(m, pi05.AdaptiveNorm)]
    assert len(adaptive) == 37 and sum(map(parameters, adaptive)) == 116_505_600


@pytest.mark.parametrize("prefix", ["", "model."])
def test_released_weights_load_on_the_meta_device(prefix):
    official = meta("pi05_base", prefix)
    assert parameters(Pi05.from_official(official, Config(**PRESETS["pi05"]))) == 3_353_433_872
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    del official[prefix + tied], official[f"{prefix}paligemma_with_expert.gemma_expert.lm_head.weight"]
    # Files that were named after pi0, with a leftover of it.
    named = {k.replace("time_mlp", "action_time_mlp"): v for k, v in official.items()}
    named[prefix + "state_proj.weight"] = torch.empty(1024, 32, device="meta")
    assert parameters(Pi05.from_official(named, Config(**PRESETS["pi05"]))) == 3_353_433_872
    with gzip.open(GOLDEN_DIR / "manifests" / "pi05_base.json.gz", "rt") as f:
        assert json.load(f)["n_used_by_pi05"] == 3_353_433_872
