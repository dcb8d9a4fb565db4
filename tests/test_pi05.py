"""pi05.py against the official implementation, and against what its docstring says. tests/test_pi0.py tests
what both files hold; that they hold the same is tested here."""
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
from test_pi0 import SMALL, early_layout, official_batch, official_config, parameters, small_batch

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


@golden("pi05.PI0Pytorch")
def test_every_layout_gives_the_same_model_without_a_copy(case):
    config = official_config(case, Config)
    want = Pi05.from_official(case.sd, config).state_dict()
    layout = {early_layout(k): v for k, v in case.sd.items()}
    got = Pi05.from_official(layout, config).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    held = {v.data_ptr() for v in layout.values()}
    assert all(v.data_ptr() in held for v in got.values())


@golden("pi05.PI0Pytorch")
def test_a_fresh_expert_beside_loaded_weights(case):
    config = official_config(case, Config)
    model = Pi05.from_official({k: v for k, v in case.sd.items() if ".paligemma." in k}, config)
    loaded = Pi05.from_official(case.sd, config)
    assert torch.equal(model.vlm.layers[0].q.weight, loaded.vlm.layers[0].q.weight)
    assert all((p == 0).all() for m in model.expert.modules() if isinstance(m, pi05.AdaptiveNorm)
               for p in m.parameters())
    assert torch.isfinite(model.loss(official_batch(case))["loss"])


def test_weights_of_the_other_model_are_named_in_one_line():
    for module, weights, other in ((pi0, "pi05_base", "pi0.5: take pi05.py, or --model pi05"),
                                   (pi05, "pi0_base", "pi0: take pi0.py, or --model pi0")):
        for prefix in ("", "model."):
            with pytest.raises(ValueError) as error:
                module.Model.from_official(meta(weights, prefix),
                                           module.Config(**module.PRESETS[module.__name__]))
            assert str(error.value) == f"these are weights of {other}"


# -- meaning -----------------------------------------------------------------------------------------------


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    return Pi05(Config(**SMALL | {"text_len": 24} | changes)).eval()


def small(seed=0, **changes):
    """With gates, scales and shifts that are not zero, which would hide what stands behind them."""
    model = fresh(seed, **changes)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, pi05.AdaptiveNorm):
                m.dense.weight.normal_(std=0.3)
                m.dense.bias.normal_(std=0.5)
    return model


def batch_of(config, B=3):
    batch = small_batch(config, B)
    words, state = ("red", "the blue", ""), batch["state"][:, 0]
    batch["text"] = torch.stack([config.encode_text(words[i % 3], state[i]) for i in range(B)])
    return batch


def velocity(model, batch, x_t, t):
    with torch.no_grad():
        cache, valid = model.encode(batch, *model.embed_images(batch))
        return model.velocity(cache, valid, x_t, t)


def test_a_fresh_expert_passes_its_tokens_through():
    """Gates 0: whatever a branch answers, at any time, is not added. Scale and shift 0: a plain last norm."""
    model = fresh()
    batch, x_t = batch_of(model.config), torch.randn(3, 5, 2)
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = model.action_out_proj(rms(model.action_in_proj(x_t)))
    for t in (0.1, 0.9):
        assert torch.allclose(velocity(model, batch, x_t, torch.full((3,), t)), want, atol=1e-6)


def test_the_first_step_teaches_gates_and_what_stands_around_them():
    model = fresh(text_weight=0.0).train()
    model.loss(batch_of(model.config), noise=torch.randn(3, 5, 2), t=torch.rand(3))["loss"].backward()
    D = model.config.expert_width
    learns = lambda p: p.grad is not None and bool((p.grad != 0).any())
    for name, p in model.named_parameters():
        around = name.startswith(("action_in_proj", "action_out_proj"))
        assert learns(p) == (around or ".norm" in name and ".dense." in name), name
    for layer in model.expert.layers:
        for norm in (layer.norm1, layer.norm2):                                 # scale, shift, gate
            assert [bool((g != 0).any()) for g in norm.dense.bias.grad.split(D)] == [False, False, True]
    assert [bool((g != 0).any()) for g in model.expert.norm.dense.bias.grad.split(D)] == [True, True, False]


def test_the_norm_by_hand():
    """Thirds in the order scale, shift, gate; 1 + scale; the gate as it is."""
    norm = pi05.AdaptiveNorm(2)
    with torch.no_grad():
        norm.dense.weight.copy_(torch.arange(12.0).view(6, 2) / 10)
        norm.dense.bias.copy_(torch.tensor([0.0, 1, 2, 3, -4, 5]))
    c, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
    m = [0.2, 1.8, 3.4, 5.0, -1.4, 8.2]                 # 0.1 + 2 * 0.1, ... plus the biases
    h, gate = norm(x, c)
    n = [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)]
    want = torch.tensor([n[0] * (1 + m[0]) + m[2], n[1] * (1 + m[1]) + m[3]])
    assert torch.allclose(h, want.expand(1, 2, 2), atol=1e-5)
    assert torch.allclose(gate, torch.tensor([[m[4:]]]), atol=1e-5)


def test_time_reaches_every_norm_of_the_expert_and_nothing_of_the_prefix():
    """Items at other times give every norm of the expert another condition; and each is heard: without its
    condition the output is another one."""
    model = small()
    batch, x_t = batch_of(model.config), torch.randn(3, 5, 2)
    seen, kinds = [], (pi05.GemmaNorm, pi05.AdaptiveNorm)
    norms = [m for m in model.modules() if isinstance(m, kinds)]
    for m in norms:
        m.register_forward_pre_hook(lambda m, args: seen.append((m, args)))
    late = velocity(model, batch, x_t, torch.tensor([0.9, 0.9, 0.9]))
    seen.clear()
    early = velocity(model, batch, x_t, torch.tensor([0.9, 0.3, 0.001]))
    assert torch.equal(early[0], late[0]) and (early[1:] - late[1:]).abs().amax((1, 2)).min() > 1e-3
    in_expert = [m for m in norms if any(m is e for e in model.expert.modules())]
    assert all(isinstance(m, pi05.AdaptiveNorm) for m in in_expert) and len(in_expert) == 2 * 2 + 1
    told = {id(m): args[1] for m, args in seen if isinstance(m, pi05.AdaptiveNorm)}
    assert told.keys() == {id(m) for m in in_expert}
    assert all((c[0] != c[1]).any() and (c[1] != c[2]).any() for c in told.values())
    assert all(len(args) == 1 or args[1] is None for m, args in seen if isinstance(m, pi05.GemmaNorm))
    for norm in in_expert:                              # each of them is heard
        weight = norm.dense.weight.data.clone()
        norm.dense.weight.data.zero_()
        assert (velocity(model, batch, x_t, torch.tensor([0.9, 0.3, 0.001])) - early).abs().max() > 1e-4
        norm.dense.weight.data = weight
    assert list(inspect.signature(model.encode).parameters) == ["batch", "images", "seen"]      # no time


def test_the_condition_is_silu_twice():
    model, t = small(), torch.tensor([0.2, 0.7])
    e = pi05.time_embedding(t, model.config.expert_width)
    silu = lambda x: x / (1 + torch.exp(-x))
    want = silu(model.time_mlp_out(silu(model.time_mlp_in(e))))
    assert torch.allclose(model.condition(t), want, atol=1e-6)


def test_the_mask_is_the_picture_in_the_docstring():
    """Actions see the prefix and each other both ways; the prefix, computed before, sees no action."""
    model, masks = small(), []
    batch = batch_of(model.config)
    for part in (model.vlm, model.expert):
        part.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    x_t, t = torch.randn(3, 5, 2), torch.full((3,), 0.5)
    base = velocity(model, batch, x_t, t)
    P, real = 2 * 4 + model.config.text_len, 2 * 4 + (batch["text"] > 0).sum(1)
    for i in range(3):
        sees = torch.arange(P) < real[i]
        assert torch.equal(masks[0][i], sees[:, None] & sees)
        assert torch.equal(masks[1][i], torch.cat([sees, torch.ones(5, dtype=torch.bool)]).expand(5, -1))
    moved = x_t.clone()
    moved[:, 4] += 1                                    # the last action
    assert ((velocity(model, batch, moved, t) - base).abs().amax((0, 2)) > 1e-4).all()


def test_actions_stand_directly_behind_the_text():
    """No position is kept for a state; each item counts its own real tokens."""
    model, positions = small(), []
    batch = batch_of(model.config)
    model.expert.register_forward_pre_hook(lambda module, args: positions.append(args[2]))
    velocity(model, batch, torch.randn(3, 5, 2), torch.rand(3))
    real = 2 * 4 + (batch["text"] > 0).sum(1, keepdim=True)
    assert torch.equal(positions[0], real + torch.arange(5)) and len(set(real.flatten().tolist())) == 3


def test_the_state_acts_through_the_text_alone():
    """One bin further, and nothing else: another chunk. Within the bin, or in the batch without the text: the
    same to the last bit."""
    model, noise = small(), torch.randn(1, 5, 2)
    config = model.config
    batch = {k: v[:1] for k, v in batch_of(config).items()}
    at = lambda *state: batch | {"text": config.encode_text("red", torch.tensor(state))[None]}
    base = model.sample(at(0.25, 0.0, -0.5), noise=noise)
    assert torch.equal(model.sample(at(0.2578, 0.0, -0.5), noise=noise), base)         # 1/128 is 0.0078
    for state in ((0.2579, 0.0, -0.5), (0.25, -1e-9, -0.5), (0.25, 0.0, -0.4921)):
        assert (model.sample(at(*state), noise=noise) - base).abs().max() > 1e-4, state
    other = at(0.25, 0.0, -0.5) | {"state": torch.full((1, 1, 3), 9.0)}
    assert torch.equal(model.sample(other, noise=noise), base)
    config.state_in_text = False
    assert torch.equal(config.encode_text("red", torch.ones(3)), config.encode_text("red", -torch.ones(3)))


def test_a_masked_camera_and_padded_text_cannot_change_anything():
    model = small()
    batch, noise = batch_of(model.config), torch.randn(3, 5, 2)
    batch["image_mask"] = torch.tensor([[[True, False]]] * 3)
    base = model.sample(batch, noise=noise)
    junk = batch | {"images": batch["images"].clone(), "text_mask": batch["text"] > 0}
    junk["images"][:, :, 1] = 255 - junk["images"][:, :, 1]
    junk["text"] = torch.where(batch["text"] > 0, batch["text"], 77)
    assert torch.equal(model.sample(junk, noise=noise), base)
    model.config.n_cameras = 1
    less = batch | {"images": batch["images"][:, :, :1], "image_mask": torch.ones(3, 1, 1, dtype=torch.bool)}
    assert torch.allclose(model.sample(less, noise=noise), base, atol=1e-5)


def test_cached_sampling_equals_computing_everything_again():
    model = small()
    batch, x_t = batch_of(model.config), torch.randn(3, 5, 2)
    chunk = model.sample(batch, 10, noise=x_t)
    with torch.no_grad():
        for k in range(10):
            x_t = x_t - one_attention(model, batch, x_t, torch.full((3,), 1 - k / 10))[0] / 10
    assert torch.allclose(chunk, x_t, atol=1e-5)


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing).train()
        t = torch.tensor([0.1, 0.5, 0.8])
        model.loss(batch_of(model.config), noise=torch.ones(3, 5, 2), t=t)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients) if a is not None)


# -- text and state ----------------------------------------------------------------------------------------


def test_bins():
    """256 edges from -1 on, 1/128 apart; below the first -1, from the last on 255. Exact at every edge."""
    edges = torch.arange(-128, 128) / 128
    assert torch.equal(state_bins(edges), torch.arange(256))
    assert torch.equal(state_bins(torch.nextafter(edges, torch.tensor(-9.0))), torch.arange(-1, 255))
    assert state_bins(torch.tensor([-7.0, 5.0, 1.0, 0.0])).tolist() == [-1, 255, 255, 128]
    assert state_bins(torch.tensor([0.5], dtype=torch.float64)).tolist() == [192]


def test_bytes_end_with_two_digits_a_number():
    config = Config(text_len=12)
    codes = config.encode_text("red", torch.tensor([0.0, -2.0, 2.0]))
    assert config.decode_text(codes) == "red;80-1ff" and codes[-2:].tolist() == [0, 0]
    assert config.decode_text(config.encode_text("red")) == "red"
    with pytest.raises(ValueError, match="13 codes, more than text_len 12, in 'yellow'"):
        config.encode_text("yellow", torch.zeros(3))


class Letters:
    """Instead of SentencePiece: code points."""
    vocab_size = lambda self: 300
    bos_id = lambda self: 2
    encode = lambda self, text: [ord(c) for c in text]
    decode = lambda self, codes: "".join(map(chr, codes))


@pytest.mark.parametrize("module", [pi0, pi05])
def test_a_released_prompt_that_is_too_long_is_cut_and_that_is_said(module, monkeypatch):
    monkeypatch.setattr(module, "tokenizer", lambda path: Letters())
    config = module.Config(tokenizer_path="any", vocab_size=300, text_len=8)
    with pytest.warns(UserWarning, match="cut to text_len 8 codes.*'reds and blues'"):
        assert config.encode_text("reds and blues").tolist() == [2, *map(ord, "reds an")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.encode_text("red").tolist() == [2, *map(ord, "red\n"), 0, 0, 0]


@pytest.mark.parametrize("module", [pi0, pi05])
def test_codes_of_another_vocabulary_are_refused(module, monkeypatch):
    """Released weights read as bytes, or with another tokenizer, would silently mean something else."""
    refused = pytest.raises(ValueError, match="vocab_size 257152 is not that of bytes.*tokenizer_path must")
    with refused as error:
        module.Config(**module.PRESETS[module.__name__]).encode_text("red")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(module, "tokenizer", lambda path: Letters())
    for size in (299, 301):
        with pytest.raises(ValueError, match=f"any has 300 pieces, vocab_size is {size}"):
            module.Config(tokenizer_path="any", vocab_size=size).encode_text("red")


def test_lerobots_pi0_reads_the_text_as_it_is(monkeypatch):
    monkeypatch.setattr(pi0, "tokenizer", lambda path: Letters())
    as_it_is = pi0.Config(tokenizer_path="any", vocab_size=300, text_as_is=True)
    for text, want in ((" a_b", " a_b\n"), ("a\n", "a\n"), ("a\n\n", "a\n\n"), ("", "\n")):
        assert as_it_is.encode_text(text).tolist()[:len(want) + 1] == [2, *map(ord, want)]


# -- the file itself ---------------------------------------------------------------------------------------


def test_the_difference_to_pi0_is_small():
    read = lambda module: open(module.__file__).read().splitlines()
    changed = [line for line in difflib.ndiff(read(pi0), read(pi05)) if line[0] in "+-"]
    assert len(changed) <= 150, f"{len(changed)} changed lines"


def test_what_pi0_has_too_is_the_same_text():
    same = ("fit_images", "checkpointed", "SiglipLayer", "Siglip", "attention", "product_dtype",
            "rope_angles", "rotate", "block_mask", "time_embedding", "sample_time", "randn", "draws",
            "convert_official", "load_strictly", "tokenizer", "check_at_least", "two_lamps", "main")
    for name in same:
        assert inspect.getsource(getattr(pi0, name)) == inspect.getsource(getattr(pi05, name)), name
    for name in ("embed_images", "embed_text", "read_text", "encode", "text_logits", "text_loss",
                 "complete_text", "pad", "param_groups"):
        assert inspect.getsource(getattr(pi0.Pi0, name)) == inspect.getsource(getattr(Pi05, name)), name


def test_every_equation_of_the_docstring_is_tagged_in_the_code():
    head, _, code = open(pi05.__file__).read()[3:].partition('"""')
    listed = set(re.findall(r"^    \[(\d+)\] ", head, flags=re.M))
    tagged = set(re.findall(r"#[^\n]*\[(\d+)\]", code))
    assert listed == tagged == {str(i) for i in range(1, len(listed) + 1)}


def test_the_recipes_are_the_published_ones():
    c, recipe = Config(**PRESETS["pi05"]), pi05.RECIPES["pi05"]
    assert (c.horizon, c.sampler_steps, c.padded_dim, c.text_len, c.state_in_text) == (50, 10, 32, 200, True)
    assert {r["normalizer"] for r in pi05.RECIPES.values()} == {"quantile"}
    assert (recipe["lr"], recipe["ema_max"], recipe["weight_decay"]) == (2.5e-5, 0.99, 1e-10)


def test_main_learns_to_read_one_letter():
    assert pi05.main(steps=200) > 0.9
