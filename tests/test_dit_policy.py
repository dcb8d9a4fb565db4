"""dit_policy.py against the official implementation, torch's attention, closed forms, and its docstring."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden
from torch.utils._python_dispatch import TorchDispatchMode

import dit_policy
from dit_policy import PRESETS, Config, DiTPolicy, convert_official

ALPHA_BAR = dit_policy.cosine_alpha_bar(100, torch.device("cpu"))

# -- the official implementation


def network_arguments(official):
    """Constructor arguments of _DiTNoiseNet -> ours."""
    known = {"ac_dim", "ac_chunk", "time_dim", "hidden_dim", "num_blocks", "dropout", "dim_feedforward",
             "nhead", "activation"}
    assert set(official) <= known, f"arguments that this file cannot build: {set(official) - known}"
    assert official.get("activation", "gelu") == "gelu", "the policy has one activation"
    return {"width": official.get("hidden_dim", 512), "depth": official.get("num_blocks", 6),
            "n_heads": official.get("nhead", 8), "mlp": official.get("dim_feedforward", 2048),
            "time_dim": official.get("time_dim", 256), "dropout": official.get("dropout", 0.1)}


def check_gradients(case, module, prefix=""):
    ours = {prefix + k: p.grad for k, p in module.named_parameters()}
    for key in case.grad:
        (name, want), = convert_official({f"{prefix}{key}": case.grad[key]}).items()
        assert ours[name].shape == want.shape, key
        error = (ours[name] - want).abs().max().item()
        assert error <= case.tolerance(f"grad/{key}"), f"{case.name} {key}: {error:.2e}"


@golden("dit_policy.DiTNoiseNet")
def test_golden_noise_net(case):
    official = case.config["net"]
    config = Config(**SMALL | network_arguments(official) | {
        "action_dim": official["ac_dim"], "horizon": official["ac_chunk"], "n_action_steps": 1})
    net = dit_policy.NoiseNet(config).eval()
    weights = convert_official({f"noise_net.{k}": v for k, v in case.sd.items()})
    net.load_state_dict({k.removeprefix("noise_net."): v for k, v in weights.items()})
    x, obs = (case.inp[k].clone().requires_grad_() for k in ("noise_actions", "obs_enc"))
    outputs = net.encode(obs)
    for i, h in enumerate(outputs):
        case.check(f"out/enc_{i}", h.transpose(0, 1))
    eps = net(x, net.condition([h.mean(1) for h in outputs], case.inp["time"]))
    case.check("out/eps", eps)
    loss = (eps * case.inp["cotangent"]).mean()
    case.check("out/loss", loss)
    loss.backward()
    check_gradients(case, net, "noise_net.")
    case.check("grad_in/noise_actions", x.grad)
    case.check("grad_in/obs_enc", obs.grad)


def agent_config(case):
    a, more = case.config["agent"], {k for k in case.config if not k.startswith("_")}
    known = {"odim", "n_cams", "use_obs", "ac_dim", "ac_chunk", "train_diffusion_steps", "imgs_per_cam",
             "eval_diffusion_steps", "dropout", "token_dim", "noise_net_kwargs", "share_cam_features",
             "early_fusion", "feat_norm"}
    assert set(a) <= known and not a.get("early_fusion"), f"arguments that cannot be built: {set(a) - known}"
    assert a.get("feat_norm") in (None, "layer_norm"), "no batch norm"
    more -= {"agent", "resnet_widths", "gn_groups", "hw", "max_len", "avg_pool", "weights_by_rule"}
    assert not more, f"not understood: {more}"
    return Config(
        action_dim=a["ac_dim"], state_dim=a["odim"], n_cameras=a["n_cams"],
        image_size=tuple(case.config["hw"]), horizon=a["ac_chunk"], n_action_steps=1, text_len=0,
        n_obs_steps=a.get("imgs_per_cam", 1), n_groups=case.config["gn_groups"], n_draws=1,
        resnet_widths=tuple(case.config.get("resnet_widths", (64, 128, 256, 512))),
        pool=case.config.get("avg_pool", False), share_encoder=a.get("share_cam_features", False),
        proprioception={"add_token": "token", "pad_img_tokens": "pad", None: "none"}[a["use_obs"]],
        token_norm=a.get("feat_norm") == "layer_norm", token_dropout=a.get("dropout", 0),
        n_diffusion_steps=a["train_diffusion_steps"], sampler_steps=a["eval_diffusion_steps"],
        prediction_type="eps", **network_arguments(a["noise_net_kwargs"]))


@golden("dit_policy.DiffusionTransformerAgent")
def test_golden_agent(case):
    config = agent_config(case)
    model = DiTPolicy.from_official(case.sd, config).eval()
    B, Tp, A = len(case.inp["obs"]), config.horizon, config.action_dim
    state = case.inp["obs"].clone().requires_grad_()
    # Their frames are the newest first, a batch of ours the oldest first.
    cameras = [case.inp[f"cam{v}"].flip(1) for v in range(config.n_cameras)]
    mask = case.inp["mask"].view(B, Tp, A)
    assert torch.equal(mask.amin(-1), mask.amax(-1)), "a mask within a step is not supported"
    batch = {"images": torch.stack(cameras, dim=2), "state": state[:, None],
             "actions": case.inp["actions"].view(B, Tp, A), "action_mask": mask[..., 0] > 0}
    case.check("out/tokens", model.tokens(batch))
    modulation = model.noise_net.condition(model.encode(batch), case.inp["timesteps"])
    case.check("out/eps", model.noise_net(case.out["noisy_actions"], modulation))
    result = model.loss(batch, noise=case.inp["noise"], t=case.inp["timesteps"])
    # The original sums over the chunk and divides by the items.
    theirs = result["loss"] * batch["action_mask"].sum() / B
    case.check("out/loss", theirs)
    assert torch.allclose((result["per_sample"] * batch["action_mask"].sum(1)).mean(), theirs, rtol=1e-5)
    theirs.backward()
    check_gradients(case, model)
    for name in case.grad_in:
        assert name == "obs"
        case.check("grad_in/obs", state.grad)

    trace, batch["state"] = [], batch["state"].detach()
    case.check("out/actions", model.sample(batch, noise=case.inp["init_noise"], trace=trace))
    case.check("out/trace", torch.stack(trace))


@golden("dit_policy.DiffusionTransformerAgent")
def test_the_trainer_s_file_loads_and_what_does_not_fit_is_named(case):
    config = agent_config(case)
    want = DiTPolicy.from_official(case.sd, config).state_dict()
    got = DiTPolicy.from_official({"model": case.sd, "global_step": 7}, config)
    assert all(torch.equal(got.state_dict()[k], want[k]) for k in want)
    held = {v.data_ptr() for v in case.sd.values()}
    assert all(p.data_ptr() in held for p in got.parameters()), "loading copies nothing"
    assert all(p.requires_grad for p in got.parameters())
    broken = dict(case.sd)
    del broken["noise_net.eps_out.linear.bias"]
    broken["extra"] = torch.zeros(3)
    broken["noise_net.ac_proj.0.bias"] = torch.zeros(77)
    with pytest.raises(ValueError) as error:
        DiTPolicy.from_official(broken, config)
    for named in ("missing noise_net.out.bias", "left over extra",
                  f"noise_net.action_mlp.0.bias is (77,) and should be ({config.action_dim},)"):
        assert named in str(error.value)
    assert "\n" not in str(error.value)


def official_shapes(cameras, A, S, Tp):
    """Keys and shapes of the original's policy at its published width, written down from its code."""
    def linear(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name, channels):
        return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}

    keys = linear("_obs_proc.1", 512, S)
    for v in range(cameras):
        net = f"visual_features.{v}._model."
        keys |= {net + "conv1.weight": (64, 3, 7, 7)} | norm(net + "bn1", 64)
        for i, (C, into) in enumerate(((64, 64), (128, 64), (256, 128), (512, 256)), 1):
            for j in (0, 1):
                block = f"{net}layer{i}.{j}."
                keys[block + "conv1.weight"] = (C, into if j == 0 else C, 3, 3)
                keys[block + "conv2.weight"] = (C, C, 3, 3)
                keys |= norm(block + "bn1", C) | norm(block + "bn2", C)
            if i > 1:
                keys[f"{net}layer{i}.0.downsample.0.weight"] = (C, into, 1, 1)
                keys |= norm(f"{net}layer{i}.0.downsample.1", C)
    net = "noise_net."
    keys |= {net + "dec_pos": (Tp, 1, 512), net + "enc_pos.pe": (5000, 1, 512), net + "time_net.w": (128,)}
    keys |= linear(net + "time_net.out_net.0", 512, 256) | linear(net + "time_net.out_net.2", 512, 512)
    keys |= linear(net + "ac_proj.0", A, A) | linear(net + "ac_proj.2", 512, A)
    keys |= linear(net + "eps_out.linear", A, 512) | linear(net + "eps_out.adaLN_modulation.1", 1024, 512)
    for part in ("encoder", "decoder"):
        for i in range(6):
            layer = f"{net}{part}.layers.{i}."
            keys[layer + "self_attn.in_proj_weight"] = (1536, 512)
            keys[layer + "self_attn.in_proj_bias"] = (1536,)
            keys |= linear(layer + "self_attn.out_proj", 512, 512)
            keys |= linear(layer + "linear1", 2048, 512) | linear(layer + "linear2", 512, 2048)
            keys |= norm(layer + "norm1", 512) | norm(layer + "norm2", 512)
            for name in ("attn_mod1.scale", "attn_mod1.shift", "attn_mod2.scale", "mlp_mod1.scale",
                         "mlp_mod1.shift", "mlp_mod2.scale") if part == "decoder" else ():
                keys |= linear(layer + name, 512, 512)
    return keys


@pytest.mark.parametrize("preset, shape", [("droid", (1, 10, 7, 100)), ("aloha", (3, 14, 14, 100))])
def test_official_names_fill_a_published_size(preset, shape):
    official = {k: torch.empty(s, device="meta") for k, s in official_shapes(*shape).items()}
    model = DiTPolicy.from_official(official, Config(**PRESETS[preset]))
    counted = sum(v.numel() for k, v in official.items() if not k.endswith(("enc_pos.pe", "time_net.w")))
    assert parameters(model) == counted


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset, published, network", [("droid", 59_446_584, 48_265_976),
                                                        ("aloha", 81_807_392, 48_270_176)])
def test_the_published_sizes_have_the_published_parameters(preset, published, network):
    """The original counts the 128 frequencies of t, which are no weights here."""
    with torch.device("meta"):
        model = DiTPolicy(Config(**PRESETS[preset]))
    assert parameters(model) == published - 128 and parameters(model.noise_net) == network - 128
    assert parameters(model.noise_net.encoder) == 18_914_304
    assert parameters(model.noise_net.decoder) == 28_369_920
    assert [parameters(e) for e in model.encoders] == [11_176_512] * model.config.n_cameras


def test_published_settings():
    for name, cameras in (("droid", 1), ("aloha", 3)):
        config, recipe = Config(**PRESETS[name]), dit_policy.RECIPES[name]
        assert (config.n_groups, config.n_heads, config.dropout, config.token_dropout) == (16, 8, 0.1, 0.1)
        assert (config.state_dropout, config.proprioception, config.n_cameras) == (0.2, "token", cameras)
        assert (config.n_diffusion_steps, config.sampler_steps, config.spacing) == (100, 8, "leading")
        assert config.prediction_type == "eps" and config.clip_x0 == 1 and not config.train_on_padding
        assert (recipe["lr"], recipe["betas"], recipe["weight_decay"]) == (3e-4, (0.95, 0.999), 1e-6)
        assert (recipe["steps"], recipe["batch_size"], recipe["warmup"]) == (150_000, 150, 2000)


def test_a_published_size_has_49_tokens_per_camera_or_one():
    for pool, cells in ((False, 49), (True, 1)):
        with torch.device("meta"):
            model = DiTPolicy(Config(**PRESETS["aloha"] | {"pool": pool})).eval()
            batch = {"images": torch.zeros(1, 1, 3, 3, 256, 256), "state": torch.zeros(1, 1, 14)}
            assert model.tokens(batch).shape == (1, 3 * cells + 1, 512)


# -- what the tests below are made of

SMALL = {"action_dim": 2, "state_dim": 3, "n_cameras": 2, "image_size": (32, 40), "horizon": 5,
         "n_action_steps": 3, "text_len": 12, "text_width": 8, "resnet_widths": (8, 16), "n_groups": 4,
         "width": 24, "depth": 2, "n_heads": 3, "mlp": 32, "time_dim": 16, "n_draws": 1}


def small(seed=0, randomize=True, **changes):
    """A policy in evaluation mode; randomize: no parameter is zero, or nothing would depend on anything."""
    torch.manual_seed(seed)
    model = DiTPolicy(Config(**SMALL | changes)).eval()
    if randomize:
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return model


def small_batch(config, B=3, seed=0, words=("red", "the blue", "")):
    g = torch.Generator().manual_seed(seed)
    V, To, (H, W) = config.n_cameras, config.n_obs_steps, config.image_size
    batch = {"actions": torch.rand(B, config.horizon, config.action_dim, generator=g) * 2 - 1,
             "action_mask": torch.ones(B, config.horizon, dtype=torch.bool),
             "state": torch.randn(B, To, config.state_dim, generator=g)}
    if V:
        batch["images"] = torch.randint(256, (B, To, V, 3, H, W), generator=g, dtype=torch.uint8)
    if config.text_len:
        batch["text"] = torch.stack([config.encode_text(words[i % len(words)]) for i in range(B)])
    return batch


def noise_like(batch, seed=1):
    return torch.randn(batch["actions"].shape, generator=torch.Generator().manual_seed(seed))


def stand_in(model, predict):
    """Replace the noise network by predict(x_t, t), t as the modulation was asked for it."""
    model.noise_net.condition = lambda summaries, t: [[t[:, 0] if t.ndim > 1 else t]]
    model.noise_net.forward = lambda x_t, modulation: predict(x_t, modulation[0][0])


# -- diffusion


def test_the_schedule_is_the_squared_cosine():
    got, K = ALPHA_BAR, 100
    f = [math.cos((i / K + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(K + 1)]
    want = [f[i + 1] / f[0] for i in range(K)]
    assert torch.allclose(got[:-1].double(), torch.tensor(want[:-1]).double(), rtol=1e-5)
    assert 0 < got[-1] < 1e-4 and got[-1] == pytest.approx(got[-2].item() * 0.001, rel=1e-3)


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_the_noised_chunk_and_the_loss(kind):
    model = small(prediction_type=kind)
    batch, seen = small_batch(model.config), []
    noise, t = noise_like(batch), torch.tensor([0, 40, 99])
    stand_in(model, lambda x, t: (seen.append(x), torch.zeros_like(x))[1])
    result = model.loss(batch, noise=noise, t=t)
    a = ALPHA_BAR[t].view(3, 1, 1).double()
    assert torch.allclose(seen[0].double(), a.sqrt() * batch["actions"] + (1 - a).sqrt() * noise, atol=1e-6)
    target = noise if kind == "eps" else batch["actions"]
    assert torch.allclose(result["loss"], (target ** 2).mean())
    assert torch.allclose(result["per_sample"], (target ** 2).mean((1, 2)))
    assert torch.allclose(result["t"], torch.tensor([0, 40 / 99, 1.0]))
    stand_in(model, lambda x, t: target)
    assert model.loss(batch, noise=noise, t=t)["loss"] == 0


def test_padding_past_the_end_is_not_trained_on():
    model = small()
    batch = small_batch(model.config)
    batch["action_mask"][0, 2:] = False
    batch["action_mask"][1, 4:] = False
    noise, t = noise_like(batch), torch.tensor([5, 50, 90])
    pred = torch.zeros_like(noise)
    stand_in(model, lambda x, t: pred)
    want = (batch["actions"] ** 2).mean(-1)[batch["action_mask"]].mean()
    assert torch.allclose(model.loss(batch, noise=noise, t=t)["loss"], want)
    pred[0, 2:] = 1e3
    assert torch.allclose(model.loss(batch, noise=noise, t=t)["loss"], want)


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_sampling_leads_to_the_data_when_the_network_knows_it(kind):
    """One clean chunk c: eps = (x_t - sqrt(a) c) / sqrt(1 - a) is exact, and every step lies on the line."""
    model = small(prediction_type=kind)
    batch, noise = small_batch(model.config), noise_like(small_batch(model.config))
    c, levels, trace = batch["actions"], [], []

    def known(x, t):
        a = ALPHA_BAR[t]
        levels.append(int(t))
        return (x - a.sqrt() * c) / (1 - a).sqrt() if kind == "eps" else c

    stand_in(model, known)
    chunk = model.sample(batch, steps=8, noise=noise, trace=trace)
    assert levels == [84, 72, 60, 48, 36, 24, 12, 0]
    assert torch.allclose(chunk, c, atol=1e-5) and len(trace) == 8 and trace[-1] is chunk
    a0, a1 = ALPHA_BAR[84], ALPHA_BAR[72]
    eps = (noise - a0.sqrt() * c) / (1 - a0).sqrt()
    assert torch.allclose(trace[0], a1.sqrt() * c + (1 - a1).sqrt() * eps, atol=1e-5)
    levels.clear()
    model.sample(batch, steps=10, noise=noise)
    assert levels == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]


def test_gaussian_data_come_back():
    """x0 ~ N(m, s^2): E[eps | x_t] = sqrt(1-a) (x_t - sqrt(a) m) / (a s^2 + 1 - a); DDIM turns N(0, 1) into
    the data as its steps grow many."""
    model, m, s = small(prediction_type="eps", horizon=4), 0.3, 0.15

    def best(x, t):
        a = ALPHA_BAR[t]
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s ** 2 + 1 - a)

    stand_in(model, best)
    batch = small_batch(model.config, B=2000, words=("red",))
    batch["images"] = batch["images"][:1].expand(2000, *batch["images"].shape[1:])
    model.encode = lambda batch: [torch.zeros(2000, 24)]
    x = model.sample(batch, steps=100, generator=torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(m, abs=0.01)
    assert x.std().item() == pytest.approx(s, rel=0.05)


def test_the_estimate_of_x0_is_clipped_and_eps_is_not():
    model = small(prediction_type="eps")
    batch, noise, trace = small_batch(model.config), torch.full((3, 5, 2), 3.0), []
    stand_in(model, lambda x, t: torch.full_like(x, 0.5))
    model.sample(batch, steps=8, noise=noise, trace=trace)
    a, prev = ALPHA_BAR[84], ALPHA_BAR[72]
    assert ((3 - (1 - a).sqrt() * 0.5) / a.sqrt()) > 1
    assert torch.allclose(trace[0], (prev.sqrt() + (1 - prev).sqrt() * 0.5).expand(3, 5, 2))


# -- the network


def test_the_encoder_layer_is_post_norm_with_positions_on_queries_and_keys_only():
    """Against torch's own multi-head attention, given the same weights."""
    net = small().noise_net
    layer, x = net.encoder[0], torch.randn(2, 7, 24)
    p = torch.zeros(7, 24)
    for n in range(7):
        for i in range(12):
            p[n, 2 * i], p[n, 2 * i + 1] = (f(n * 10000 ** (-2 * i / 24)) for f in (math.sin, math.cos))
    assert torch.allclose(dit_policy.position_table(7, 24), p, atol=1e-6)
    with torch.no_grad():
        attn = official_attention(layer.attn)
        h = layer.norm1(x + attn(x + p, x + p, x)[0])
        h = layer.norm2(h + layer.mlp.fc2(F.gelu(layer.mlp.fc1(h), approximate="tanh")))
        assert torch.allclose(layer(x, p), h, atol=1e-5)
        assert torch.allclose(net.encode(x)[0], h, atol=1e-5)
        assert torch.allclose(net.encode(x)[1], net.encoder[1](h, p), atol=1e-5)
    for norm in (layer.norm1, layer.norm2):
        assert norm.eps == 1e-5 and norm.elementwise_affine


def official_attention(ours):
    attn = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    attn.load_state_dict({"in_proj_weight": ours.in_proj.weight, "in_proj_bias": ours.in_proj.bias,
                          "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias})
    return attn


def test_the_block_is_adaln_zero_with_a_plain_scale():
    net = small().noise_net
    block, x, c = net.decoder[0], torch.randn(2, 5, 24), torch.randn(2, 24)
    with torch.no_grad():
        m = block.prepare(F.silu(c))
        scale1, shift1, gate1, scale2, shift2, gate2 = (
            F.silu(c)[:, None] @ linear.weight.T + linear.bias for linear in block.modulation)
        h = F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias) * scale1 + shift1
        want = x + gate1 * official_attention(block.attn)(h, h, h)[0]
        h = F.layer_norm(want, (24,), block.norm2.weight, block.norm2.bias) * scale2 + shift2
        want = want + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
        assert torch.allclose(block(x, m), want, atol=1e-5)


def test_a_fresh_block_is_the_identity_and_the_gates_are_exactly_zero():
    model = small(randomize=False)
    batch, net, t = small_batch(model.config), model.noise_net, torch.tensor([3, 50, 97])
    noise = noise_like(batch)
    with torch.no_grad():
        modulation = net.condition(model.encode(batch), t)
        for block, m in zip(net.decoder, modulation):
            x = torch.randn(3, 5, 24)
            assert torch.equal(block(x, m), x)
            assert all((g == 0).all() for g in (m[2], m[5])), "the gates"
            assert all((y != 0).any() for y in (m[0], m[1], m[3], m[4])), "scale and shift"
        # The final layer acts on an unnormalised x, and is not zero at first.
        x = net.action_mlp(noise) + net.positions
        shift, scale = modulation[-1]
        want = net.out(x * scale[:, None] + shift[:, None])
        got = net(noise, modulation)
    assert torch.allclose(got, want, atol=1e-6) and got.abs().max() > 0.01


def test_initial_weights_follow_the_original():
    model = small(randomize=False, width=48, mlp=96, horizon=64)
    net = model.noise_net
    bound = lambda w: w.abs().max().item() / math.sqrt(6 / (w.shape[0] + w.shape[1]))
    for layer in [*net.encoder, *net.decoder]:
        for linear in (layer.attn.in_proj, layer.attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            assert 0.95 < bound(linear.weight) <= 1
        assert (layer.attn.in_proj.bias == 0).all() and (layer.attn.out_proj.bias == 0).all()
        assert (layer.mlp.fc1.bias != 0).any()
    for i in (0, 1, 3, 4):
        assert 0.95 < bound(net.decoder[0].modulation[i].weight) <= 1
        assert (net.decoder[0].modulation[i].bias == 0).all()
    limit = math.sqrt(6 / (48 * (1 + 64)))                      # fans of a (64, 1, 48) tensor
    assert 0.9 * limit < net.positions.abs().max() <= limit
    assert all(torch.equal(a, b) for a, b in zip(*(e.parameters() for e in model.encoders)))


def test_block_i_takes_the_mean_of_layer_i_and_the_final_layer_that_of_the_last():
    model = small(depth=3)
    net, t = model.noise_net, torch.tensor([20, 30])
    summaries = [torch.randn(2, 24) for _ in range(3)]
    with torch.no_grad():
        before = net.condition(summaries, t)
        for i in range(3):
            other = [s + 1 if j == i else s for j, s in enumerate(summaries)]
            changed = [not torch.equal(a[0], b[0]) for a, b in zip(before, net.condition(other, t))]
            assert changed == [i == 0, i == 1, i == 2, i == 2]
        batch = small_batch(model.config)
        outputs = net.encode(model.tokens(batch))
        assert all(torch.equal(s, h.mean(1)) for s, h in zip(model.encode(batch), outputs))
        e = net.time_mlp(torch.stack([torch.cat([torch.cos(k * w), torch.sin(k * w)]) for k in (20.0, 30.0)
                                      for w in [10000 ** (-torch.arange(8) / 7)]]))
        for block, s, m in zip(net.decoder, summaries, before):
            want = block.modulation[1](F.silu(s + e))
            assert torch.allclose(m[1], want, atol=1e-5)


def test_documented_shapes():
    model = small(n_obs_steps=2)
    shapes = {}

    def remember(name):
        return lambda module, args, out: shapes.setdefault(name, []).append(tuple(out.shape))

    net = model.noise_net
    for name, module in {"text": model.text, "camera": model.encoders[0], "resnet": model.encoders[1].resnet,
                         "layer": net.encoder[1], "block": net.decoder[0], "out": net,
                         "time": net.time_mlp, "film": model.encoders[0].resnet.stages[1][0]}.items():
        module.register_forward_hook(remember(name))
    batch, trace = small_batch(model.config, B=4), []
    chunk = model.sample(batch, steps=3, trace=trace)
    # 32 x 40 pixels, halved by the stem, the pooling and the second stage: 4 x 5 cells
    assert shapes["text"] == [(4, 8)] and shapes["camera"] == [(8, 20, 16)]
    assert shapes["resnet"] == [(8, 16, 4, 5)] == shapes["film"]
    assert shapes["layer"] == [(4, 2 * 2 * 20 + 1, 24)], "the encoder runs once per chunk"
    assert shapes["time"] == [(3, 1, 24)], "all steps of the sampler are embedded at once"
    assert shapes["block"] == [(4, 5, 24)] * 3 and shapes["out"] == [(4, 5, 2)] * 3
    assert chunk.shape == (4, 5, 2) and [x.shape for x in trace] == [chunk.shape] * 3
    result = model.loss(batch)
    assert result["loss"].shape == () and result["per_sample"].shape == (4,) == result["t"].shape
    modulation = net.condition(model.encode(batch), torch.tensor([[7], [0]]))
    assert [m.shape for m in modulation[0]] == [(2, 4, 24)] * 6 and len(modulation) == 3


def test_the_sampler_equals_a_loop_that_computes_everything_anew():
    model = small(prediction_type="eps")
    batch = small_batch(model.config)
    x = noise = noise_like(batch)
    got = model.sample(batch, steps=4, noise=noise)
    with torch.no_grad():
        for t, s in ((75, 50), (50, 25), (25, 0), (0, None)):
            modulation = model.noise_net.condition(model.encode(batch), torch.full((3,), t))
            eps = model.noise_net(x, modulation)
            a, b = ALPHA_BAR[t], torch.tensor(1.0) if s is None else ALPHA_BAR[s]
            x = b.sqrt() * ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1) + (1 - b).sqrt() * eps
    assert torch.allclose(got, x, atol=1e-5)


def test_draws_share_an_observation():
    model = small()
    batch = small_batch(model.config)
    noise, t = torch.randn(9, 5, 2), torch.randint(100, (9,))
    batch["action_mask"][0, 3:] = False
    shared = model.loss(batch, noise=noise, t=t)
    again = model.loss({k: v.repeat(3, *[1] * (v.ndim - 1)) for k, v in batch.items()}, noise=noise, t=t)
    assert torch.allclose(shared["loss"], again["loss"], rtol=1e-5)
    assert torch.allclose(shared["per_sample"], again["per_sample"], rtol=1e-4)
    model.config.n_draws = 4
    assert model.loss(batch)["per_sample"].shape == (12,)


# -- the observation


def test_film_is_the_identity_at_first_and_scales_and_shifts_later():
    model = small(randomize=False)
    batch = small_batch(model.config)
    other = batch | {"text": batch["text"].flip(0)}
    with torch.no_grad():
        before = model.tokens(batch)
        assert torch.equal(before, model.tokens(other)), "no instruction before training"
        block = model.encoders[0].resnet.stages[0][1]
        x, text = torch.randn(3, 8, 6, 6), torch.randn(3, 8)
        plain = block(x, text)
        block.film.bias.data = torch.cat([torch.full((8,), 0.5), torch.full((8,), -0.25)])
        h = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x)))))
        assert torch.allclose(plain, F.relu(h + x), atol=1e-6)
        assert torch.allclose(block(x, text), F.relu(1.5 * h - 0.25 + x), atol=1e-6)
        block.film.weight.data.normal_()
        assert not torch.allclose(model.tokens(batch), model.tokens(other), atol=1e-3)


def test_padding_of_the_text_cannot_change_the_output():
    model, longer = small(), small(text_len=31)
    longer.load_state_dict(model.state_dict())
    batch = small_batch(model.config)
    padded = batch | {"text": F.pad(batch["text"], (0, 19))}
    noise = noise_like(batch)
    with torch.no_grad():
        want = model.sample(batch, noise=noise)
        assert torch.allclose(longer.sample(padded, noise=noise), want, atol=1e-6)
        for n in (1, 3):  # texts that fill their row, so short that a detector finds little in them
            codes = batch["text"][:2, :n]
            assert torch.allclose(model.text(codes), model.text(F.pad(codes, (0, 9))), atol=1e-6)
        model.text.embed.weight.data[0] = 1e3
        assert torch.equal(model.sample(batch, noise=noise), want), "what stands for padding is never read"
        swapped = batch | {"text": batch["text"].flip(0)}
        assert not torch.allclose(model.sample(swapped, noise=noise), want, atol=1e-3)


def test_colours_differ_wherever_they_stand():
    encoder = small().text
    config = Config()
    read = lambda text: encoder(config.encode_text(text)[None])
    with torch.no_grad():
        red, blue = read("put the red block"), read("put the blue block")
        assert (red - blue).norm() > 0.05 * red.norm()
        assert torch.isfinite(read("")).all()
        # A detector's answer does not depend on where in the text it finds its bytes.
        assert torch.allclose(read("xxxxx red xxxxx"), read("xxxxxxx red xxxxx"), atol=1e-6)


def test_given_embeddings():
    model = small(text_dim=6)
    batch = small_batch(model.config)
    batch["text_embedding"] = torch.randn(3, 6)
    with torch.no_grad():
        a, b = (model.sample(batch | {"text_embedding": e}, noise=noise_like(batch))
                for e in (batch["text_embedding"], -batch["text_embedding"]))
    assert not torch.allclose(a, b, atol=1e-3)
    with pytest.raises(ValueError, match="shape .5,. per item, text_dim is 6"):
        model.sample(batch | {"text_embedding": torch.randn(3, 5)})
    with pytest.raises(ValueError, match="no 'text_embedding'"):
        model.loss({k: v for k, v in batch.items() if k != "text_embedding"})


def test_proprioception_is_dropped_in_training_only():
    model = small(state_dropout=0.5, state_dim=400)
    batch = small_batch(model.config)
    batch["state"] = torch.ones(3, 1, 400)
    seen = []
    model.state_token.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        evaluated = [model.tokens(batch) for _ in range(2)]
        model.train()
        trained = [model.tokens(batch) for _ in range(2)]
    assert torch.equal(*evaluated) and (seen[0] == 1).all()
    assert not torch.equal(trained[0][:, -1], trained[1][:, -1])
    assert torch.equal(trained[0][:, :-1], trained[1][:, :-1]), "the tokens of the images are not dropped"
    assert sorted(set(seen[2].flatten().tolist())) == [0, 2] and 0.4 < (seen[2] == 0).float().mean() < 0.6


def test_dropout_inside_the_transformers_is_for_training_only():
    model = small(dropout=0.3, token_dropout=0.3, state_dropout=0.0)
    batch, noise, t = small_batch(model.config), torch.randn(3, 5, 2), torch.tensor([1, 2, 3])
    loss = lambda: model.loss(batch, noise=noise, t=t)["loss"].item()
    assert loss() == loss()
    model.train()
    assert loss() != loss()
    tokens = model.tokens(batch)
    assert (tokens == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_the_newest_image_comes_first_and_the_newest_state_alone():
    model, one = small(n_obs_steps=2), small()
    one.load_state_dict(model.state_dict())
    batch = small_batch(model.config)
    now, before = ({k: v[:, i:i + 1] if k in ("images", "state") else v for k, v in batch.items()}
                   for i in (1, 0))
    with torch.no_grad():
        tokens, now, before = model.tokens(batch), one.tokens(now), one.tokens(before)
    want = torch.cat([now[:, :20], before[:, :20], now[:, 20:40], before[:, 20:40], now[:, 40:]], dim=1)
    assert torch.allclose(tokens, want, atol=1e-5)


def test_cameras_have_encoders_of_their_own_unless_they_share():
    for share in (False, True):
        model = small(share_encoder=share)
        batch = small_batch(model.config)
        with torch.no_grad():
            before = model.tokens(batch)
            model.encoders[-1].resnet.conv1.weight += 1
            changed = [not torch.equal(a, b) for a, b in zip(before.split([20, 20, 1], 1),
                                                             model.tokens(batch).split([20, 20, 1], 1))]
        assert changed == [share, True, False]


def test_other_ways_of_proprioception():
    model = small(proprioception="pad")
    batch = small_batch(model.config)
    with torch.no_grad():
        tokens = model.tokens(batch)
        moved = model.tokens(batch | {"state": batch["state"] + 1})
    assert tokens.shape == (3, 40, 24) and ((tokens - moved).abs().amax(-1) > 1e-4).all()
    model = small(proprioception="none", token_norm=True, pool=True)
    with torch.no_grad():
        tokens = model.tokens(batch)
        assert tokens.shape == (3, 2, 24)
        assert torch.equal(tokens, model.tokens(batch | {"state": batch["state"] + 1}))


def test_crops():
    model = small(crop_size=(24, 24))
    encoder = model.encoders[0]
    image = torch.arange(32 * 40.0).view(1, 1, 32, 40).repeat(200, 3, 1, 1)
    assert torch.equal(encoder.crop(image), image[:, :, 4:28, 8:32]), "the centre in evaluation"
    encoder.train()
    torch.manual_seed(0)
    corners = {divmod(int(v), 40) for v in encoder.crop(image)[:, 0, 0, 0]}
    assert {y for y, _ in corners} == set(range(9)) and {x for _, x in corners} == set(range(17))
    crop = encoder.crop(image)
    assert (crop[:, 0, 1:] - crop[:, 0, :-1] == 40).all() and (crop[..., 1:] - crop[..., :-1] == 1).all()


def test_images_are_normalised_as_imagenet():
    model = small()
    batch = small_batch(model.config)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    scaled = batch | {"images": (batch["images"] / 255 - mean) / std}
    with torch.no_grad():
        assert torch.allclose(model.tokens(batch), model.tokens(scaled), atol=1e-5)


def test_without_cameras():
    model = small(n_cameras=0, text_len=0, obs="lowdim")
    batch = small_batch(model.config)
    assert "images" not in batch and len(model.encoders) == 0
    with torch.no_grad():
        assert model.tokens(batch).shape == (3, 1, 24)
    moved = batch | {"state": batch["state"] + 1}
    assert not torch.allclose(*(model.sample(b, noise=noise_like(batch)) for b in (batch, moved)), atol=1e-3)


def test_a_generator_repeats_a_chunk_and_bfloat16_stays_close():
    model = small(prediction_type="eps")
    batch = small_batch(model.config)
    chunks = [model.sample(batch, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(chunks[0], chunks[1]) and not torch.allclose(chunks[0], chunks[2], atol=1e-2)
    fast = model.to(torch.bfloat16).sample(batch, generator=torch.Generator().manual_seed(0))
    assert fast.dtype == torch.float32 and (fast - chunks[0]).abs().max() < 0.15


def test_the_levels_that_are_visited():
    leading, trailing = (lambda *a, s=s: dit_policy.timetable(*a, s) for s in ("leading", "trailing"))
    assert leading(100, 8) == [84, 72, 60, 48, 36, 24, 12, 0] and leading(100, 51)[0] == 50
    assert trailing(100, 8) == [99, 87, 74, 61, 49, 37, 24, 11] and trailing(100, 10)[:2] == [99, 89]
    assert trailing(100, 100) == leading(100, 100) == list(range(99, -1, -1)) and leading(1, 1) == [0]
    assert [trailing(100, n)[0] for n in (1, 7, 51, 99)] == [99] * 4
    assert leading(100, (7, 3, 0)) == [7, 3, 0]
    for steps in ((3, 5), (5, 5), (100, 1), (5, -1), ()):
        with pytest.raises(ValueError, match="must fall from at most 99 to at least 0"):
            leading(100, steps)


def test_the_sampler_visits_the_levels_it_is_given():
    for fields, steps, want in (
            ({"spacing": "trailing"}, 4, [99, 74, 49, 24]), ({}, [80, 33, 2], [80, 33, 2]),
            ({"sampler_steps": 2, "spacing": "trailing"}, None, [99, 49])):
        model, seen = small(**fields), []
        batch = small_batch(model.config)
        stand_in(model, lambda x, t: (seen.append(int(t)), torch.zeros_like(x))[1])
        model.sample(batch, steps=steps, noise=noise_like(batch))
        assert seen == want


def test_the_clip_is_a_field():
    for clip in (2.0, 0.5, 0.0):
        model, trace = small(clip_x0=clip), []
        batch, noise = small_batch(model.config), torch.full((3, 5, 2), 3.0)
        stand_in(model, lambda x, t: torch.full_like(x, 1.5))
        got = model.sample(batch, steps=8, noise=noise, trace=trace)
        assert torch.allclose(got, torch.full_like(got, min(1.5, clip or 1.5)))


def test_padding_is_trained_on_when_asked_for():
    model = small(train_on_padding=True)
    batch, noise, t = small_batch(model.config), torch.randn(3, 5, 2), torch.tensor([5, 50, 90])
    want = model.loss(batch, noise=noise, t=t)
    batch["action_mask"][0, 2:] = False
    got = model.loss(batch, noise=noise, t=t)
    assert torch.equal(got["loss"], want["loss"]) and torch.equal(got["per_sample"], want["per_sample"])
    assert batch["action_mask"].sum() == 12, "the batch stays as it is"


def test_one_level_of_noise():
    model = small(n_diffusion_steps=1, sampler_steps=1)
    batch = small_batch(model.config)
    result = model.loss(batch)
    assert (result["t"] == 0).all() and torch.isfinite(result["loss"])
    assert torch.isfinite(model.sample(batch)).all()


def test_draws_and_masks_are_ragged_and_keep_their_order():
    """Draw j of item i stands at place 3 j + i, with the mask, text and pictures of item i."""
    model = small(n_obs_steps=2)
    batch = small_batch(model.config)
    for item, real in enumerate((5, 2, 3)):
        batch["action_mask"][item, real:] = False
    noise, t = torch.randn(6, 5, 2), torch.tensor([3, 40, 80, 95, 20, 60])
    result = model.loss(batch, noise=noise, t=t)
    sums = 0
    for place in range(6):
        item = slice(place % 3, place % 3 + 1)
        alone = model.loss({k: v[item] for k, v in batch.items()}, noise[place:place + 1], t[place:place + 1])
        assert torch.allclose(result["per_sample"][place], alone["loss"], rtol=1e-4)
        assert torch.allclose(alone["per_sample"], alone["loss"])
        sums = sums + alone["loss"] * batch["action_mask"][item].sum()
    assert torch.allclose(result["loss"], sums / 20, rtol=1e-4), "every real step weighs alike"


@pytest.mark.parametrize("fields", [
    {"n_obs_steps": 2}, {"pool": True, "share_encoder": True}, {"text_dim": 6}, {"proprioception": "pad"}])
def test_a_batch_equals_its_items_one_by_one(fields):
    """Three items, three instructions."""
    model = small(**fields)
    batch = small_batch(model.config) | {"text_embedding": torch.randn(3, 6)}
    noise = noise_like(batch)
    together = model.sample(batch, noise=noise)
    for i in range(3):
        one = slice(i, i + 1)
        alone = model.sample({k: v[one] for k, v in batch.items()}, noise=noise[one])
        assert torch.allclose(together[one], alone, atol=1e-4)
        other = batch | {k: v.roll(1, 0) for k, v in batch.items() if k.startswith("text")}
    assert not torch.allclose(model.sample(other, noise=noise), together, atol=1e-3)


def test_the_generator_decides_every_draw():
    model = small()
    batch, chunks = small_batch(model.config), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        chunks.append(model.sample(batch, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(*chunks)
    start = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.sample(batch, noise=start), chunks[0])


def test_every_dropout_is_applied_and_in_training_only():
    model = small(dropout=0.5)
    net, x, positions = model.noise_net, torch.randn(2, 7, 24), torch.randn(7, 24)
    layer, block = net.encoder[0], net.decoder[0]
    given = block.prepare(torch.randn(2, 24))
    calls = {"attention": lambda: layer.attn(x), "mlp": lambda: layer.mlp(x),
             "block": lambda: block(x, given), "layer": lambda: layer(x, positions)}
    with torch.no_grad():
        for name, call in calls.items():
            model.eval()
            assert torch.equal(call(), call()), name
            model.train()
            assert not torch.equal(call(), call()), name
        for part in (layer, block):                                   # both branches before they are added
            dropped = []
            part.dropout.register_forward_hook(lambda module, args, out: dropped.append((args[0], out)))
            calls["layer" if part is layer else "block"]()
            assert len(dropped) == 2
            assert all(0.2 < ((out == 0) & (inp != 0)).float().mean() < 0.8 for inp, out in dropped)
        q = torch.randn(2, 3, 50, 8)
        ones = torch.ones(2, 3, 50, 1)
        kept = dit_policy.attention(q, q, ones, 0.5)
        assert kept.mean().item() == pytest.approx(1, abs=0.1) and kept.std() > 0.05


def test_resnets_start_as_those_of_torchvision_and_cameras_alike():
    """kaiming_normal, fan_out: standard deviation sqrt(2 / (C_out k k))."""
    model = small(randomize=False, resnet_widths=(32, 64), n_cameras=2)
    for encoder in model.encoders:
        convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) == 1 + 4 + 4 + 1
        for conv in convolutions:
            want = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
            assert conv.weight.std().item() == pytest.approx(want, rel=0.1) and conv.bias is None
        for m in encoder.modules():
            if isinstance(m, dit_policy.FilmBlock):
                assert (m.film.weight == 0).all() and (m.film.bias == 0).all()
            if isinstance(m, torch.nn.GroupNorm):
                assert (m.weight == 1).all() and (m.bias == 0).all() and m.eps == 1e-5
    first, second = (list(encoder.parameters()) for encoder in model.encoders)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(first, second))


# -- devices and precision


class HostCopies(TorchDispatchMode):
    """Counts what is copied from the CPU to the meta device, which stands for a GPU: a value that is read
    back raises there, and so does a tensor that was left on the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sources = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        self.count += "cpu" in sources and isinstance(out, torch.Tensor) and out.is_meta
        return out


@pytest.mark.parametrize("preset, fields", [("tiny", {}), ("tiny", {"crop_size": (60, 60), "text_dim": 7}),
                                            ("droid", {}), ("aloha", {"spacing": "trailing"})])
def test_no_step_waits_for_the_device(preset, fields):
    """Loss, backward pass, clipping, optimiser, average; sampling."""
    config = Config(**PRESETS[preset] | fields)
    with torch.device("meta"):
        model = DiTPolicy(config).train()
        batch = {"actions": torch.empty(2, config.horizon, config.action_dim),
                 "action_mask": torch.ones(2, config.horizon, dtype=torch.bool),
                 "state": torch.empty(2, 1, config.state_dim),
                 "images": torch.zeros(2, 1, config.n_cameras, 3, *config.image_size, dtype=torch.uint8),
                 "text": torch.zeros(2, config.text_len, dtype=torch.long),
                 "text_embedding": torch.empty(2, config.text_dim)}
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.0))
    for step in range(2):
        with HostCopies() as copies:
            loss = model.loss(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.1)
            assert model.sample(batch).shape == batch["actions"].shape
    assert loss.is_meta and copies.count == 0, "what the second step needs is kept"


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_bfloat16_and_autocast(kind):
    exact = small(prediction_type=kind)
    batch, noise, t = small_batch(exact.config), torch.randn(3, 5, 2), torch.tensor([9, 50, 90])
    want, loss = exact.sample(batch, noise=noise), exact.loss(batch, noise=noise, t=t)["loss"]
    for cast in (True, False):
        model = small(prediction_type=kind)
        model = model.to(torch.bfloat16) if cast else model
        with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            got = model.loss(batch, noise=noise, t=t)
            got["loss"].backward()
            chunk = model.sample(batch, noise=noise)
        assert chunk.dtype == got["loss"].dtype == got["per_sample"].dtype == torch.float32
        assert got["loss"].item() == pytest.approx(loss.item(), rel=0.03)
        assert (chunk - want).abs().max() < 0.15
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# -- what a user can get wrong


@pytest.mark.parametrize("fields, message", [
    ({"width": 50, "n_heads": 4}, "width 50 must be even and a multiple of n_heads = 4"),
    ({"width": 27, "n_heads": 3}, "width 27 must be even"),
    ({"time_dim": 15}, "time_dim 15 must be even"),
    ({"n_action_steps": 17}, "n_action_steps 17 must lie in 1..horizon = 16"),
    ({"horizon": 0}, "horizon 0 must be at least 1"),
    ({"n_obs_steps": 0}, "n_obs_steps 0"),
    ({"depth": 0}, "depth 0"),
    ({"n_draws": 0}, "n_draws 0"),
    ({"sampler_steps": 101}, "sampler steps 101 must lie in 1..n_diffusion_steps = 100"),
    ({"sampler_steps": 0}, "sampler steps 0"),
    ({"crop_size": (65, 10)}, "crop_size .65, 10. is larger than image_size .64, 64."),
    ({"resnet_widths": (16, 30)}, "multiples of n_groups = 4"),
    ({"resnet_widths": ()}, "resnet_widths"),
    ({"prediction_type": "v"}, "prediction_type 'v' is not known: choose one of eps, x0"),
    ({"proprioception": "early"}, "choose one of token, pad, none"),
    ({"obs": "images"}, "choose one of lowdim, image"),
    ({"dropout": 1.0}, "dropout 1.0 must lie in"),
    ({"text_len": -1}, "text_len -1 must be at least 0"),
    ({"n_cameras": 0}, "set text_len=0"),
    ({"clip_x0": -1.0}, "clip_x0 -1.0 must be at least 0"), ({"clip_x0": math.nan}, "clip_x0 nan"),
    ({"spacing": "even"}, "spacing 'even' is not known: choose one of leading, trailing"),
    ({"dropout": math.nan}, "dropout nan"), ({"state_dropout": -0.1}, "state_dropout -0.1"),
    ({"token_dropout": 1.0}, "token_dropout 1.0"),
    ({"crop_size": (0, 5)}, "crop_size .0, 5. must be at least 1"),
    ({"crop_size": (5,)}, "two numbers each"), ({"image_size": (64,)}, "two numbers each"),
    ({"image_size": (0, 64)}, "image_size .0, 64. must be at least 1"),
    ({"resnet_widths": (0, 16)}, "resnet_widths .0, 16. must be at least 1"), ({"time_dim": 2}, "time_dim 2"),
    ({"n_cameras": -1}, "n_cameras -1 must be at least 0"), ({"text_dim": -1}, "text_dim -1"),
    *(({name: 0}, f"{name} 0 must be at least 1") for name in (
        "action_dim", "state_dim", "n_action_steps", "text_width", "n_groups", "width", "n_heads", "mlp",
        "n_diffusion_steps")),
    ({"n_cameras": 0, "text_len": 0, "proprioception": "pad"}, "the only token"),
])
def test_bad_configurations_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**fields)
    assert "\n" not in str(error.value)


def test_bad_inputs_are_named_in_one_line():
    with pytest.raises(ValueError, match="has 41 codes, more than text_len 40"):
        Config().encode_text("x" * 41)
    model = small()
    batch = small_batch(model.config)
    with pytest.raises(ValueError, match="sampler steps 500 must lie in"):
        model.sample(batch, steps=500)
    with pytest.raises(ValueError, match="1 steps and 1 cameras given, .* n_cameras = 2 expected"):
        model.sample(batch | {"images": batch["images"][:, :, :1]})
    with pytest.raises(ValueError, match="actions of shape .4, 2. per item given, horizon .* are 5 and 2"):
        model.loss(batch | {"actions": batch["actions"][:, 1:]})
    with pytest.raises(ValueError, match="no 'text'"):
        model.sample({k: v for k, v in batch.items() if k != "text"})


def test_codes_of_a_text():
    codes = Config(text_len=6).encode_text("réd")
    assert codes.tolist() == [b + 1 for b in "réd".encode()] + [0, 0] and codes.dtype == torch.int64


# -- training


def test_it_learns_to_obey():
    """One picture, two instructions, opposite ways: only the text tells them apart, and it acts by FiLM."""
    torch.manual_seed(0)
    config = Config(**SMALL | {"state_dropout": 0.0, "n_draws": 8, "n_cameras": 1, "image_size": (16, 16)})
    model = DiTPolicy(config)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3), lr=3e-3)
    batch = small_batch(config, B=4, words=("the red one", "the blue one"))
    batch["images"] = batch["images"][:1].expand(4, *batch["images"].shape[1:])
    side = torch.tensor([0.8, -0.8]).repeat(2)
    batch |= {"state": torch.zeros(4, 1, 3), "actions": side[:, None, None].expand(4, 5, 2)}
    losses = []
    for _ in range(80):
        loss = model.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    model.eval()
    chunk = model.sample(batch, generator=torch.Generator().manual_seed(0))
    assert (chunk.mean((1, 2)) - side).abs().max() < 0.3
    swapped = batch | {"text": batch["text"].roll(1, 0)}
    chunk = model.sample(swapped, generator=torch.Generator().manual_seed(0))
    assert (chunk.mean((1, 2)) + side).abs().max() < 0.3


def test_every_parameter_learns():
    model = small(dropout=0.1).train()
    model.loss(small_batch(model.config))["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_the_optimizer_gets_every_parameter_once():
    model = small()
    group, = model.param_groups(0.1)
    assert group["weight_decay"] == 0.1
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert len(group["params"]) == len(list(model.parameters()))


def test_half_circles_and_the_demo(capsys):
    angle, side = torch.tensor([0.0, math.pi / 2]), torch.tensor([1.0, -1.0])
    ways = dit_policy.half_circles(angle, side)
    assert torch.allclose(ways.norm(dim=-1), torch.tensor(0.8)) and ways.shape == (2, 16, 2)
    assert torch.allclose(ways[:, -1], -ways[:, 0], atol=1e-6)
    assert ways[0, 4, 1] > 0 and ways[1, 4, 0] > 0, "anticlockwise from the right, clockwise from the top"
    near, left = dit_policy.main(steps=2)
    assert 0 <= near <= 1 and 0 <= left <= 1
    out = capsys.readouterr().out
    assert out.count("denoising step") == 10 and "expected: at least 95" in out
