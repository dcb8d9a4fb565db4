"""dit.py: official numbers, closed forms of the bound, four conditionings, guidance, two stages, errors."""
import copy
import dataclasses
import functools
import math
import re

import pytest
import torch
from golden_cases import golden, manifest
from torch.utils._python_dispatch import TorchDispatchMode

import dit
from dit import Config, DiT, Transformer
from robot.checkpoint import read_checkpoint
from tools import runs

LN2 = math.log(2)


def tiny(**changes):
    """A model so small that a test can train it; pixels unless vae_channels says otherwise."""
    torch.manual_seed(0)
    small = dict(data_shape=(2, 8, 8), n_classes=3, vae_channels=(), vae_groups=4, width=32, depth=2,
                 n_heads=2, sampler_steps=5)
    return DiT(Config(**small | changes))


def table(model, levels=None):
    """Coefficients (fields, S) of a chain of these levels, noisiest first; all if None."""
    return dit.step_table(model.config.n_diffusion_steps, torch.device("cpu"), levels and tuple(levels))


def alpha_bar(model):
    return dit.linear_alpha_bar(model.config.n_diffusion_steps)


def awake(model):
    """All weights random: nothing hides behind what starts as zero."""
    torch.manual_seed(1)
    for p in model.net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.15)
    return model.eval()


# ---------------------------------------------------------------- official numbers
def config_of(case, **more):
    c = case.config["model"]
    return Config(data_shape=(c["in_channels"], c["input_size"], c["input_size"]), vae_channels=(),
                  patch_size=c["patch_size"], width=c["hidden_size"], depth=c["depth"],
                  n_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], label_dropout=c["class_dropout_prob"],
                  n_classes=c["num_classes"],
                  learn_variance=c["learn_sigma"], **more)


def our_name(key):
    return next(iter(dit.rename_official({key: torch.zeros(1)})))


def check_gradients(case, module):
    ours = dict(module.named_parameters())
    for key in case.grad:
        case.check(f"grad/{key}", ours[our_name(key)].grad)


@golden("dit.DiT")
def test_official_network(case):
    model = DiT.from_official(case.sd, config_of(case)).eval()
    assert sum(p.numel() for p in model.net.parameters()) == case.meta["n_params"]
    x = case.inp["x"].clone().requires_grad_()
    out = model.net(x, model.net.condition(case.inp["t"], case.inp["y"]))
    loss = (out * case.inp["cotangent"]).mean()
    loss.backward()
    case.check("out/out", out)
    case.check("out/loss", loss)
    case.check("grad_in/x", x.grad)
    check_gradients(case, model)
    c = case.config["model"]
    side = c["input_size"] // c["patch_size"]
    case.check("out/sincos", dit.sincos_positions(side, side, c["hidden_size"]))
    case.check("out/t_embedding", dit.time_embedding(case.inp["t"], 256))


@golden("dit.DiT")
def test_official_guidance(case):
    """Both halves of the official batch see the first half's images. The eps that `sample` uses is read off
    one step to the data."""
    scale, (c, *_) = case.config["cfg_scale"], case.inp["cfg_x"].shape[1:]
    model = DiT.from_official(case.sd, config_of(case, guidance=scale, guidance_channels=3)).eval()
    n = len(case.inp["cfg_x"]) // 2
    first, second = (case.inp[f"cfg_{name}"][:n] for name in "ty"), case.inp["cfg_y"][n:]
    assert (second == model.config.n_classes).all() and case.inp["cfg_t"].tolist()[:n] == \
        case.inp["cfg_t"].tolist()[n:]
    for i, (t, y) in enumerate(zip(*first)):
        z, t = case.inp["cfg_x"][i:i + 1], t.item()
        k = dit.at(table(model, [t]), 0, z)
        eps = (z - k.signal * model.sample({"label": y[None]}, steps=[t], noise=z)) / k.sigma
        # The detour through x0 costs a few digits where there is hardly any noise to divide by.
        limit = case.tolerance("out/cfg_out") + 1e-6 / k.sigma.item()
        assert (eps - case.out["cfg_out"][i:i + 1, :c]).abs().max() < limit


@golden("dit.diffusion")
def test_official_loss(case):
    model = DiT.from_official(case.sd, config_of(case)).eval()
    assert sum(p.numel() for p in model.net.parameters()) == case.meta["n_params"]
    out = model.loss({"x": case.inp["x"], "label": case.inp["y"]}, noise=case.inp["noise"], t=case.inp["t"])
    c = dit.at(table(model), case.inp["t"], case.inp["x"])
    case.check("out/x_t", c.signal * case.inp["x"] + c.sigma * case.inp["noise"])
    case.check("out/train_loss", out["per_sample"])
    case.check("out/loss", out["loss"])
    assert abs(out["mse"] - case.out["mse"].mean()) < case.tolerance("out/mse")
    assert abs(out["vb"] - case.out["vb"].mean()) < case.tolerance("out/vb")
    out["loss"].backward()
    check_gradients(case, model)


@golden("dit.diffusion")
@pytest.mark.parametrize("clip", [False, True], ids=["free", "clip"])
def test_official_trajectories(case, clip):
    n, suffix = case.config["_n"], "_clip" if clip else ""
    for sampler, name, steps in (("ddpm", "p", case.config["p_steps"]), ("ddim", "ddim", None)):
        config = config_of(case, guidance=case.config["cfg_scale"], guidance_channels=3, clip_x0=clip,
                           sampler=sampler, eta=case.config["eta"])
        model, trace = DiT.from_official(case.sd, config).eval(), []
        ts = case.out[f"{name}_timesteps"].tolist()
        visited = steps and dit.timetable(model.config.n_diffusion_steps, steps)
        assert steps is None or ts == sorted(visited, reverse=ts[0] > ts[-1])
        ts = sorted(ts, reverse=True)
        model.sample({"label": case.inp["sample_y"][:n]}, steps=ts, noise=case.inp["init_noise"][:n],
                     step_noise=case.inp[f"{name}_step_noise"][:, :n], trace=trace)
        key = f"out/{name}_samples{suffix}"
        want = case.out[f"{name}_samples{suffix}"][:, :n]
        got = torch.stack(trace)
        assert got.shape == want.shape
        assert (got - want).abs().max() < case.tolerance(key), (got - want).abs().amax((1, 2, 3, 4))
        if sampler == "ddpm":
            rows = dit.Coefficients(*table(model, ts))
            case.check("out/p_posterior_log_variance_clipped", rows.log_small)
            case.check("out/p_betas", rows.log_large.exp())


def vae_config(case):
    c = case.config
    assert c["act_fn"] == "silu" and c["in_channels"] == c["out_channels"]
    return Config(data_shape=(c["in_channels"], case.config["_S"], case.config["_S"]), patch_size=1,
                  vae_channels=tuple(c["block_out_channels"]), vae_res_blocks=c["layers_per_block"],
                  vae_groups=c["norm_num_groups"], latent_channels=c["latent_channels"], vae_steps=1,
                  width=16, depth=1, n_heads=2)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(key):
    for new, old in OLD_NAMES.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


@golden("dit.AutoencoderKL")
@pytest.mark.parametrize("rename", [lambda key: key, old_name], ids=["new_names", "published_names"])
def test_official_autoencoder(case, rename):
    model = DiT.from_official({rename(k): v for k, v in case.sd.items()}, vae_config(case))
    assert sum(p.numel() for p in model.vae.parameters()) == case.meta["n_params"]
    x = case.inp["x"].clone().requires_grad_()
    mean, log_variance = model.vae.encode(x)
    z = dit.reparameterise(mean, log_variance, case.inp["noise"])
    kl, decoded = dit.kl_to_prior(mean, log_variance), model.vae.decode(z)
    for key, value in (("mean", mean), ("logvar", log_variance), ("z", z), ("kl", kl),
                       ("reconstruction", decoded), ("decoded", model.vae.decode(case.inp["z_given"]))):
        case.check(f"out/{key}", value)
    loss = (decoded - x).square().mean() + 1e-3 * kl.mean()
    case.check("out/loss", loss)
    loss.backward()
    case.check("grad_in/x", x.grad)
    check_gradients(case, model)
    nll, per_number = model.elbo(case.inp["x"], case.inp["noise"])
    size, variance = x[0].numel(), model.config.vae_std**2
    assert torch.allclose(per_number * size, case.out["kl"], rtol=1e-5)
    error = (case.out["reconstruction"] - case.inp["x"]).square().mean((1, 2, 3))
    assert torch.allclose(nll, 0.5 * (error / variance + math.log(2 * math.pi * variance)), rtol=1e-5)


@pytest.mark.parametrize("name, preset", [("dit_s_2_256", "S/2"), ("dit_b_2_256", "B/2"),
                                          ("dit_l_2_256", "L/2"), ("dit_xl_2_256", "XL/2")])
def test_manifests_of_the_published_sizes(name, preset):
    keys, n_parameters = manifest(name)
    vae, n_vae = manifest("sd_vae_ft_ema")
    with torch.device("meta"):
        state = {k: torch.empty(shape) for k, shape in (keys | vae).items()}
        config = Config(**dit.PRESETS[preset])
        model = DiT.from_official(state, config)
        assert sum(p.numel() for p in model.net.parameters()) == n_parameters
        assert sum(p.numel() for p in model.vae.parameters()) == n_vae == 83_653_863
        DiT.from_official({old_name(k): v for k, v in state.items()}, config)
        broken = {**state, "extra": torch.empty(1), "pos_embed": torch.empty(1, 9, 384)}
        del broken["encoder.conv_in.bias"]
        with pytest.raises(ValueError) as error:
            DiT.from_official(broken, config)
    message = str(error.value)
    for part in ("missing vae.encoder.conv_in.bias", "left over extra", "net.position is (1, 9, 384)"):
        assert part in message and "\n" not in message


COUNTS = {"S/2": 32_963_360, "S/4": 32_945_024, "S/8": 33_148_160, "B/2": 130_512_416, "B/4": 130_475_648,
          "B/8": 130_881_536, "L/2": 458_102_816, "L/4": 458_053_760, "L/8": 458_594_816, "XL/2": 675_129_632,
          "XL/4": 675_074_432, "XL/8": 675_683_072}


def test_presets_have_the_published_sizes():
    assert set(dit.PRESETS) == {"tiny", *COUNTS}
    for name, count in COUNTS.items():
        with torch.device("meta"):
            net = Transformer(Config(**dit.PRESETS[name]))
        assert sum(p.numel() for p in net.parameters()) == count, name


def test_released_settings():
    for name in COUNTS:
        config, recipe = Config(**dit.PRESETS[name]), dit.RECIPES[name]
        assert (config.latent_scale, config.vae_steps, config.sampler, config.sampler_steps) == (
            0.18215, 0, "ddpm", 250)
        assert (config.guidance, config.guidance_channels, config.label_dropout) == (4.0, 3, 0.1)
        assert config.conditioning == "adaln_zero" and config.learn_variance and not config.clip_x0
        assert config.n_diffusion_steps == 1000 and config.latent_shape == (4, 32, 32)
        assert recipe["lr"] == 1e-4 and recipe["betas"] == (0.9, 0.999) and recipe["batch_size"] == 256
        assert recipe["weight_decay"] == 0 and recipe["lr_schedule"] == "constant"


def test_512_pixels():
    with torch.device("meta"):
        net = Transformer(Config(**dit.PRESETS["XL/2"] | {"data_shape": (3, 512, 512)}))
    assert sum(p.numel() for p in net.parameters()) == 676_014_368


@pytest.mark.parametrize("conditioning, millions", [("in_context", 449), ("cross_attention", 598),
                                                    ("adaln", 600), ("adaln_zero", 675)])
def test_sizes_of_the_four_conditionings_are_those_of_the_paper(conditioning, millions):
    with torch.device("meta"):
        net = Transformer(Config(**dit.PRESETS["XL/2"] | {"conditioning": conditioning}))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 1


# ---------------------------------------------------------------- autoencoder
def test_kl_and_draws_against_torch():
    mean, log_variance = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(dit.kl_to_prior(mean, log_variance), want, rtol=1e-5)
    assert (dit.kl_to_prior(torch.zeros(1, 5), torch.zeros(1, 5)) == 0).all()
    eps = torch.randn(20000, 1)
    z = dit.reparameterise(torch.tensor(0.7), torch.tensor(math.log(0.09)), eps)
    assert abs(z.mean() - 0.7) < 0.01 and abs(z.std() - 0.3) < 0.01


class Linear(torch.nn.Module):
    """In place of an autoencoder: q(z | x) = N(gain x, variance), p(x | z) = N(weight z, vae_std^2)."""

    def __init__(self, gain, variance, weight):
        super().__init__()
        self.gain, self.variance, self.weight = gain, torch.tensor(variance), weight

    def encode(self, x):
        return self.gain * x, self.variance.log().expand_as(x)

    def decode(self, z):
        return self.weight * z


def test_elbo_is_a_bound_and_tight_for_the_exact_posterior():
    """Data x = 0.8 z + 0.3 noise has log p(x) = log N(0, 0.64 + 0.09), and its posterior is known."""
    model = tiny(vae_channels=(4, 4), patch_size=1, vae_std=0.3, vae_steps=1)
    x = torch.randn(4000, 2, 8, 8) * 0.73**0.5
    evidence = torch.distributions.Normal(0.0, 0.73**0.5).log_prob(x).mean()
    gaps = []
    for gain, variance in ((0.8 / 0.73, 0.09 / 0.73), (0.8 / 0.73, 0.3), (0.5, 0.09 / 0.73)):
        model.vae = Linear(gain, variance, 0.8)
        nll, kl = model.elbo(x)
        gaps.append((evidence + (nll + kl).mean()).item())
    assert abs(gaps[0]) < 0.01 and min(gaps[1:]) > 0.1, gaps


def test_latents_have_unit_size_and_come_back():
    model = tiny(vae_channels=(4, 8), patch_size=1, vae_steps=1, guidance=1.0).train()
    batch = {"x": torch.randn(16, 2, 8, 8), "label": torch.arange(16) % 3}
    assert model.config.latent_shape == (4, 4, 4)
    first = model.loss(batch)
    assert {"nll", "kl"} <= set(first) and model.scale == 1
    torch.manual_seed(5)
    second = model.loss(batch)
    assert {"mse", "vb"} <= set(second) and model.scale != 1
    assert abs(model.encode(batch["x"]).std() - 1) < 0.05                 # [4]
    z0, scale = torch.randn(2, 4, 4, 4), model.scale.clone()
    assert torch.allclose(model.decode(z0), model.vae.decode(z0 / scale), atol=1e-6)
    model.loss(batch)
    assert model.scale == scale and not model.scale.requires_grad        # measured once


def test_a_latent_is_a_draw_and_not_the_mean():
    model = tiny(vae_channels=(4, 4), patch_size=1, vae_steps=1, latent_scale=0.5)
    model.vae, x = Linear(0.8, 0.09, 0.8), torch.ones(4000, 2, 8, 8)
    z0 = model.encode(x)
    assert z0.mean().item() == pytest.approx(0.4, abs=0.01)
    assert z0.std().item() == pytest.approx(0.15, abs=0.01)


def test_a_scale_that_is_given_is_not_measured():
    model = tiny(vae_channels=(4, 4), patch_size=1, vae_steps=1, latent_scale=0.5).train()
    batch = {"x": torch.randn(4, 2, 8, 8), "label": torch.arange(4) % 3}
    assert ["kl" in model.loss(batch) for _ in range(3)] == [True, False, False] and model.scale.item() == 0.5


def test_the_log_variance_of_a_latent_is_bounded():
    vae = tiny(vae_channels=(4, 4), patch_size=1, vae_steps=1).vae
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 1e3, -1e3])
        low, high = vae.encode(torch.randn(2, 2, 8, 8))[1].unflatten(1, (2, 2)).unbind(2)[::-1]
    assert (low == -30).all() and (high == 20).all()


def test_stages_train_one_part_each_and_looking_does_not_count():
    model = tiny(vae_channels=(4, 8), patch_size=1, vae_steps=2).train()
    batch = {"x": torch.randn(4, 2, 8, 8), "label": torch.arange(4) % 3}
    with torch.no_grad():
        model.loss(batch)
    model.eval()
    assert "mse" in model.loss(batch) and model.seen == 0                # validation: always the diffusion
    model.train()
    touched = []
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        model.loss(batch)["loss"].backward()
        touched.append({name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None})
    assert touched == [{"vae"}] * 2 + [{"net"}] * 2 and model.seen == 3
    other = tiny(vae_channels=(4, 8), patch_size=1, vae_steps=2)
    other.load_state_dict(model.state_dict())
    assert other.seen == 3 and other.scale == model.scale


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Through train.py, interrupted within the first stage and within the second."""
    import train
    argv = ["--model", "dit", "--batch_size", "8", "--demos", "60", "--steps", "6", "--checkpoint_every", "1",
            "--log_every", "1", "--warmup", "0", "--set", "vae_channels=[8, 8, 8]", "--set", "width=16",
            "--set", "depth=1", "--set", "n_heads=2", "--set", "sampler_steps=2", "--set", "vae_steps=3"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    whole = read_checkpoint(tmp_path / "whole")
    for stop in (2, 4):
        out, save = tmp_path / f"stop{stop}", runs.save_checkpoint

        class Stop(Exception):
            pass

        def save_and_stop(path, content):
            save(path, content)
            if content["step"] == stop:
                raise Stop

        runs.save_checkpoint = save_and_stop
        try:
            with pytest.raises(Stop):
                train.main([*argv, "--out", str(out)])
        finally:
            runs.save_checkpoint = save
        train.main([*argv, "--out", str(out), "--resume"])
        resumed = read_checkpoint(out)
        for part in ("weights", "ema"):
            assert whole[part].keys() == resumed[part].keys()
            for key, value in whole[part].items():
                assert torch.equal(value, resumed[part][key]), (part, key)
    assert whole["weights"]["_extra_state"] == 4 and whole["weights"]["scale"] != 1
    import sample
    result = sample.main([str(tmp_path / "whole"), "--sampler_steps", "2"])
    assert 0 <= result["accuracy_samples"] <= 1


# ---------------------------------------------------------------- transformer
@pytest.mark.parametrize("conditioning", dit.CONDITIONINGS)
def test_the_untrained_network_is_zero(conditioning):
    model = tiny(conditioning=conditioning)
    t, label = torch.tensor([0, 500, 999]), torch.tensor([0, 1, 3])
    assert (model.net(torch.randn(3, 2, 8, 8), model.net.condition(t, label)) == 0).all()


def test_untrained_blocks_of_adaln_zero_are_the_identity_and_others_are_not():
    x, cond = torch.randn(3, 7, 32), torch.randn(3, 2, 32)
    for name, kind in dit.CONDITIONINGS.items():
        torch.manual_seed(0)
        net = tiny(conditioning=name).net
        block = net.blocks[0]
        assert isinstance(block, kind)
        assert torch.equal(block(x, block.prepare(cond)), x) == (name == "adaln_zero")


@pytest.mark.parametrize("conditioning", dit.CONDITIONINGS)
def test_time_and_class_reach_every_patch(conditioning):
    model, x = awake(tiny(conditioning=conditioning)), torch.randn(1, 2, 8, 8)
    out = lambda t, y: model.net(x, model.net.condition(torch.tensor([t]), torch.tensor([y])))
    base = out(100, 0)
    for other in (out(900, 0), out(100, 1), out(100, 3)):
        difference = (base - other).abs().amax(1)[0]                      # (8, 8)
        assert (difference > 1e-4).all()


@pytest.mark.parametrize("conditioning", dit.CONDITIONINGS)
def test_conditions_of_all_steps_at_once_are_those_of_each(conditioning, monkeypatch):
    model = awake(tiny(conditioning=conditioning))
    ts, kinds = [900, 400, 7], torch.tensor([0, 2, 3])
    for limit in (2**27, 1):                                              # in one pass, and step by step
        monkeypatch.setattr(dit, "MODULATION_LIMIT", limit)
        together = list(model.conditions(ts, kinds))
        assert len(together) == 3
        for t, condition in zip(ts, together):
            for a, b in zip(condition, model.net.condition(torch.full((3,), t), kinds)):
                assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
    calls = []
    monkeypatch.setattr(dit, "MODULATION_LIMIT", 2**27)
    model.net.time.register_forward_hook(lambda *a: calls.append(1))
    model.sample({"label": torch.tensor([0, 1, 1])})
    assert len(calls) == 1                                                # ahead of the loop


def test_shapes_of_the_transformer_and_of_the_autoencoder():
    for conditioning, tokens in (("in_context", 8 + 2), ("cross_attention", 8), ("adaln_zero", 8)):
        model = tiny(data_shape=(3, 16, 32), vae_channels=(4, 8, 12), conditioning=conditioning)
        shapes = {}
        for name, module in model.named_modules():
            hook = lambda m, i, out, name=name: shapes.__setitem__(name, tuple(out.shape))
            if name and not isinstance(module, torch.nn.ModuleList):
                module.register_forward_hook(hook)
        z = model.encode(torch.randn(2, 3, 16, 32))
        assert z.shape == (2, 4, 4, 8) == (2, *model.config.latent_shape)
        condition = model.net.condition(torch.tensor([3, 4]), torch.tensor([0, 1]))
        assert model.net(z, condition).shape == (2, 8, 4, 8)
        assert model.decode(z).shape == (2, 3, 16, 32)
        assert shapes["net.patch"] == (2, 32, 2, 4) and shapes["net.blocks.1"] == (2, tokens, 32)
        assert shapes["net.final"] == (2, 8, 2 * 2 * 8)
        assert shapes["vae.encoder.downsample.0"] == (2, 4, 8, 16)
        assert shapes["vae.encoder.mid.1"] == shapes["vae.decoder.mid.1"] == (2, 12, 4, 8)
        assert shapes["vae.encoder"] == (2, 8, 4, 8) and shapes["vae.decoder.up.2.1"] == (2, 4, 16, 32)


def test_patches_go_back_where_they_came_from():
    """With a decoder that copies, each output patch depends on the input patch at its own place alone."""
    model = awake(tiny(depth=1, patch_size=4))
    for block in model.net.blocks:
        torch.nn.init.zeros_(block.modulation.weight)                     # gates closed
        torch.nn.init.zeros_(block.modulation.bias)
    x = torch.randn(1, 2, 8, 8)
    other = x.clone()
    other[:, :, 4:, :4] += 1                                              # lower left
    condition = model.net.condition(torch.tensor([5]), torch.tensor([0]))
    changed = (model.net(x, condition) - model.net(other, condition)).abs().amax(1)[0] > 0
    assert changed[4:, :4].all() and changed.sum() == 16


def test_positions_tell_rows_from_columns():
    table = dit.sincos_positions(3, 5, 16).view(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8]) and torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    column = torch.tensor(4.0)
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    want = torch.cat([(column * frequencies).sin(), (column * frequencies).cos()])
    assert torch.allclose(table[1, 4, :8], want, atol=1e-6)
    assert len(table.flatten(0, 1).unique(dim=0)) == 15


# ---------------------------------------------------------------- diffusion
class Exact(torch.nn.Module):
    """In place of the transformer: the optimal eps for data that are these images, one set per class."""

    def __init__(self, model, images, kinds):
        super().__init__()
        self.table, self.images, self.kinds, self.null = table(model), images, kinds, model.config.n_classes

    def condition(self, t, label):
        return [x[..., None] for x in torch.broadcast_tensors(t, label)]

    def forward(self, z, condition):
        t, label = (x[:, 0] for x in condition)
        c = dit.at(self.table, t, z)
        distance = (z[:, None] - c.signal[:, None] * self.images).square().flatten(2).sum(2)
        open_to = (label[:, None] == self.null) | (self.kinds == label[:, None])
        weight = (-distance / (2 * c.sigma.flatten()[:, None] ** 2)).masked_fill(~open_to, -1e9).softmax(1)
        eps = (z - c.signal * (weight @ self.images.flatten(1)).view(z.shape)) / c.sigma
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)


@pytest.mark.parametrize("sampler, guidance", [("ddim", 1.0), ("ddim", 2.0), ("ddpm", 2.0)])
def test_samplers_with_the_optimal_network_draw_the_class_that_is_asked_for(sampler, guidance):
    images, kinds = dit.stripes()
    assert len(images.unique(dim=0)) == 16 and kinds.bincount().tolist() == [4] * 4
    model = tiny(data_shape=(1, 8, 8), n_classes=4, clip_x0=True, sampler=sampler, guidance=guidance,
                 sampler_steps=25).eval()
    model.net = Exact(model, images, kinds)
    asked = torch.arange(40) % 4
    x = model.sample({"label": asked}, generator=torch.Generator().manual_seed(0))
    near = torch.cdist(x.flatten(1), images.flatten(1))
    assert (kinds[near.argmin(1)] == asked).all() and near.min(1).values.max() < 0.3
    drawn = model.sample({"n": 60}, generator=torch.Generator().manual_seed(0))        # any class
    kinds_drawn = kinds[torch.cdist(drawn.flatten(1), images.flatten(1)).argmin(1)]
    assert set(kinds_drawn.tolist()) == {0, 1, 2, 3}


def test_coefficients_are_those_of_bayes_rule():
    model = tiny()
    alpha_bar = dit.linear_alpha_bar(1000)[[10, 300, 700]]
    beta = 1 - alpha_bar[1] / alpha_bar[0]
    c = dit.at(table(model, [700, 300, 10]), 1, torch.zeros(1, 1))
    # q(z_prev | z_t, z0): precisions of q(z_prev | z0) and of q(z_t | z_prev) add up
    precision = 1 / (1 - alpha_bar[0]) + (1 - beta) / beta
    assert c.deviation.item() == pytest.approx((1 / precision).sqrt().item(), rel=1e-5)
    c_x0, c_xt = alpha_bar[0].sqrt() / (1 - alpha_bar[0]) / precision, (1 - beta).sqrt() / beta / precision
    assert c.c_x0.item() == pytest.approx(c_x0.item(), rel=1e-5)
    assert c.c_xt.item() == pytest.approx(c_xt.item(), rel=1e-5)
    assert c.log_small.exp().item() == pytest.approx((1 / precision).item(), rel=1e-5)
    assert c.log_large.exp().item() == pytest.approx(beta.item(), rel=1e-5)


def test_schedule_is_the_released_one():
    alpha_bar = dit.linear_alpha_bar(1000)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(alpha_bar, torch.cumprod(1 - beta, 0), rtol=1e-10)
    timetable = functools.partial(dit.timetable, 1000)
    assert timetable(1000) == list(range(999, -1, -1)) and timetable(1) == [999] and timetable(2) == [999, 0]
    assert len(set(timetable(250))) == 250 and timetable([5, 3]) == [5, 3]


def test_loss_reads_as_the_paper():
    model = awake(tiny())
    x, eps, label = torch.randn(5, 2, 8, 8), torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    t = torch.tensor([0, 1, 300, 700, 999])
    ab = alpha_bar(model)[t].float()[:, None, None, None]
    x_t = ab.sqrt() * x + (1 - ab).sqrt() * eps
    prediction, v = model.net(x_t, model.net.condition(t, label)).chunk(2, dim=1)
    out = model.loss({"x": x, "label": label}, noise=eps, t=t)
    assert torch.allclose(out["mse"], (prediction - eps).square().mean(), rtol=1e-4)
    assert torch.allclose(out["loss"], out["mse"] + out["vb"]) and torch.equal(out["t"], t / 1000)
    c = dit.at(table(model), t[3:], x[3:])
    _, log_variance = model.predict(x_t[3:], c, model.net.condition(t[3:], label[3:]))
    f = (v[3:] + 1) / 2
    assert torch.allclose(log_variance, f * c.log_large + (1 - f) * c.log_small, atol=1e-4)
    from_vb, = torch.autograd.grad(out["vb"], model.net.final.linear.bias, retain_graph=True)
    from_vb = from_vb.view(2, 2, 4)                                       # pixel row, column, channel
    assert (from_vb[..., :2] == 0).all() and (from_vb[..., 2:] != 0).any()


def test_guidance_is_the_line_through_both_predictions():
    """One step of DDIM is linear in eps: the sample at scale w lies on the line through those at 0 and 1."""
    model, noise = awake(tiny()), torch.randn(3, 2, 8, 8)

    def drawn(**change):
        for name, value in change.items():
            setattr(model.config, name, value)
        return model.sample({"label": torch.tensor([0, 1, 2])}, steps=[300], noise=noise)

    null, with_class, guided = (drawn(guidance=w) for w in (0.0, 1.0, 3.0))
    assert torch.allclose(guided, null + 3 * (with_class - null), atol=1e-3) and not guided.equal(with_class)
    assert torch.allclose(null, model.sample({"n": 3}, steps=[300], noise=noise), atol=1e-4)
    one = drawn(guidance_channels=1)
    assert torch.equal(one[:, :1], guided[:, :1]) and torch.allclose(one[:, 1:], with_class[:, 1:], atol=1e-4)


def test_labels_are_dropped_in_training_only():
    model = awake(tiny(label_dropout=1.0))
    batch = {"x": torch.randn(6, 2, 8, 8), "label": torch.arange(6) % 3}
    noise, t = torch.randn(6, 2, 8, 8), torch.full((6,), 400)
    shown = model.loss(batch, noise, t)["per_sample"]
    dropped = model.train().loss(batch, noise, t)["per_sample"]
    seen = []
    model.net.label.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    model.loss(batch, noise, t)
    assert (seen[0] == 3).all() and not torch.allclose(shown, dropped)


def test_trace_noise_and_generator():
    for sampler in ("ddpm", "ddim"):
        model, trace = awake(tiny(sampler=sampler, eta=0.5, vae_channels=(4, 8), patch_size=1)), []
        batch = {"label": torch.tensor([2, 0])}
        g = torch.Generator().manual_seed(3)
        noise, *steps = [torch.randn(2, 4, 4, 4, generator=g) for _ in range(5)]
        a = model.sample(batch, noise=noise, step_noise=steps, trace=trace)
        assert torch.equal(a, model.sample(batch, generator=torch.Generator().manual_seed(3)))
        assert len(trace) == 5 and torch.equal(trace[-1], a) and a.shape == (2, 2, 8, 8)
        assert torch.allclose(model.sample({"label": torch.tensor([2])}, noise=noise[:1],
                                           step_noise=[z[:1] for z in steps]), a[:1], atol=1e-4)


@pytest.mark.parametrize("conditioning", dit.CONDITIONINGS)
def test_training_lowers_the_loss(conditioning):
    model = tiny(conditioning=conditioning)
    x = torch.randn(3, 2, 8, 8).sign()                                    # one image per class
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=3e-3)
    mse = []
    for _ in range(60):
        label = torch.randint(3, (32,))
        out = model.loss({"x": x[label], "label": label})
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        mse.append(out["mse"].item())
    assert mse[0] > 0.9 and sum(mse[-10:]) / 10 < 0.5, mse[::10]


def test_no_labels_and_no_variance():
    model = tiny(n_classes=0, guidance=1.0, learn_variance=False, conditioning="in_context")
    out = model.loss({"x": torch.randn(4, 2, 8, 8)})
    assert "vb" not in out and model.sample({"n": 2}).shape == (2, 2, 8, 8)


def test_param_groups_hold_what_learns_once():
    model = tiny(vae_channels=(4, 8), patch_size=1)
    groups = model.param_groups(0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"]) and id(model.net.label.weight) not in held[:len(
        groups[0]["params"])], "embeddings do not decay"
    decayed = {id(p) for p in groups[0]["params"]}
    assert {id(model.net.patch.weight), id(model.net.time[0].weight), id(model.vae.quant_conv.weight),
            id(model.net.blocks[0].modulation.weight)} <= decayed
    assert id(model.net.position) not in held and id(model.scale) not in held


# ---------------------------------------------------------------- released files
def released(tmp_path, monkeypatch):
    """A transformer's and an autoencoder's file in the released layouts, but small; PRESETS["XL/2"] fits."""
    config = dict(data_shape=(3, 16, 16), n_classes=5, vae_channels=(8, 8), vae_groups=4, vae_steps=0,
                  width=16, depth=1, n_heads=2, latent_scale=0.18215, sampler_steps=3, guidance=4.0,
                  guidance_channels=3)
    monkeypatch.setitem(dit.PRESETS, "XL/2", config)
    model = awake(tiny(**config))
    back = {"patch": "x_embedder.proj", "time": "t_embedder.mlp", "label": "y_embedder.embedding_table",
            "final": "final_layer", "modulation": "adaLN_modulation.1", "attn.out": "attn.proj"}
    state = {}
    for key, value in model.net.state_dict().items():
        key = "pos_embed" if key == "position" else key
        for ours, official in back.items():
            key = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{official}.", key)
        state[key] = value
    torch.save(state, tmp_path / "dit.pt")
    vae = {}
    for key, value in model.vae.state_dict().items():
        key = re.sub(r"\.(down|up)\.(\d+)\.(\d+)\.", r".\1_blocks.\2.resnets.\3.", key)
        key = re.sub(r"\.(down|up)sample\.(\d+)\.", r".\1_blocks.\2.\1samplers.0.", key)
        key = re.sub(r"\.mid\.([02])\.", lambda m: f".mid_block.resnets.{int(m[1]) // 2}.", key)
        key = key.replace(".mid.1.norm.", ".mid_block.attentions.0.group_norm.")
        key = re.sub(r"\.mid\.1\.([qkv])\.", r".mid_block.attentions.0.to_\1.", key)
        key = key.replace(".mid.1.out.", ".mid_block.attentions.0.to_out.0.")
        vae[key.replace(".shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")] = value
    torch.save(vae, tmp_path / "vae.pt")
    return model, tmp_path / "dit.pt", tmp_path / "vae.pt"


def test_two_released_files_make_pictures(tmp_path, monkeypatch):
    model, dit_file, vae_file = released(tmp_path, monkeypatch)
    images = dit.generate(str(dit_file), str(vae_file), [0, 4], path=tmp_path / "x.png", seed=2)
    want = model.sample({"label": torch.tensor([0, 4])}, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(images, want, atol=1e-5)
    png = (tmp_path / "x.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[16:24] == (32).to_bytes(4, "big") + (16).to_bytes(4, "big")


def test_released_files_start_a_training(tmp_path, monkeypatch):
    _, dit_file, vae_file = released(tmp_path, monkeypatch)
    batch = {"x": torch.randn(2, 3, 16, 16), "label": torch.tensor([0, 4])}
    config = Config(**dit.PRESETS["XL/2"])
    with pytest.raises(ValueError, match="autoencoder has no weights"):
        DiT(config).loss(batch)
    with pytest.raises(ValueError, match="vae_file="):
        DiT.from_official(torch.load(dit_file), config)
    fresh = DiT.from_official(torch.load(vae_file), config)              # the transformer starts fresh
    learning = {id(p) for group in fresh.param_groups(0.0) for p in group["params"]}
    assert not learning & {id(p) for p in fresh.vae.parameters()}, "a loaded autoencoder stays as it is"
    assert (fresh.net.final.linear.weight == 0).all() and fresh.scale == pytest.approx(0.18215)
    with_file = lambda path: Config(**dit.PRESETS["XL/2"] | {"vae_file": str(path)})
    both = DiT.from_official(torch.load(dit_file), with_file(vae_file))
    for model in (fresh, both):
        model.loss(batch)["loss"].backward()
        assert all(p.grad is None for p in model.vae.parameters())
        assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="nowhere.pt cannot be read"):
        DiT.from_official(torch.load(dit_file), with_file(tmp_path / "nowhere.pt"))


# ---------------------------------------------------------------- devices, precision, averages
class HostCopies(TorchDispatchMode):
    """Counts what is copied from the CPU to the meta device, which stands for a GPU: a value that is read
    back raises there, and so does a tensor that was left on the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sources = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        self.count += "cpu" in sources and isinstance(out, torch.Tensor) and out.is_meta
        return out


@pytest.mark.parametrize("preset", ["tiny", "S/8"])
def test_no_step_waits_for_the_device(preset):
    """Loss, backward pass, clipping, optimiser, average; sampling. In both stages, where there are two."""
    config = Config(**dit.PRESETS[preset] | {"sampler_steps": 4})
    with torch.device("meta"):
        model = DiT(config)
        batch = {"x": torch.empty(4, *config.data_shape), "label": torch.zeros(4, dtype=torch.long)}
    model.seen = max(0, config.vae_steps - 1)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.0))
    with HostCopies() as first:
        copies = []
        for _ in range(4):
            loss = model.loss(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.1)
            copies.append(first.count)
    assert loss.is_meta and copies[1] == copies[3], "what the second step needs is kept"
    model.eval().sample(batch)                                            # makes the chain's table
    for sampler, eta in (("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)):
        model.config = dataclasses.replace(config, sampler=sampler, eta=eta)
        with HostCopies() as again:
            assert model.sample(batch).shape == batch["x"].shape and model.sample({"n": 2}).is_meta
        assert again.count == 0


def test_ddim_without_fresh_noise_draws_its_start_alone():
    model = awake(tiny())
    state = lambda n: [torch.randn(2, 2, 8, 8, generator=g) for _ in range(n)] and g.get_state()
    for eta, sampler, draws in ((0.0, "ddim", 1), (0.5, "ddim", 5), (0.0, "ddpm", 5)):
        model.config.eta, model.config.sampler = eta, sampler
        g = torch.Generator().manual_seed(3)
        model.sample({"n": 2}, generator=g)
        used, g = g.get_state(), torch.Generator().manual_seed(3)
        assert torch.equal(used, state(draws)), (sampler, eta)            # 5 steps, none after the last


def test_the_generator_decides_every_draw():
    for sampler in ("ddim", "ddpm"):
        model = awake(tiny(sampler=sampler, eta=0.5))
        drawn = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            drawn.append(model.sample({"n": 2}, generator=torch.Generator().manual_seed(3)))
        assert torch.equal(*drawn)
        assert not torch.equal(drawn[0], model.sample({"n": 2}, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("conditioning", dit.CONDITIONINGS)
def test_a_batch_equals_its_images_one_by_one(conditioning):
    model, x = awake(tiny(conditioning=conditioning)), torch.randn(4, 2, 8, 8)
    label, t, eps = torch.tensor([2, 0, 1, 2]), torch.tensor([0, 400, 999, 30]), torch.randn(4, 2, 8, 8)
    together = model.loss({"x": x, "label": label}, eps, t)["per_sample"]
    drawn = model.sample({"label": label}, noise=eps)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model.loss({"x": x[one], "label": label[one]}, eps[one], t[one])
        assert torch.allclose(together[one], alone["loss"], rtol=1e-4)
        assert torch.allclose(drawn[one], model.sample({"label": label[one]}, noise=eps[one]), atol=1e-3)


@pytest.mark.parametrize("change", [{}, {"conditioning": "in_context"}, {"conditioning": "cross_attention"},
                                    {"vae_channels": (4, 8), "patch_size": 1, "vae_steps": 1}])
def test_bfloat16_and_autocast(change):
    batch = {"x": torch.rand(4, 2, 8, 8) * 2 - 1, "label": torch.arange(4) % 3}
    exact = awake(tiny(**change))
    want, noise = exact.sample(batch, noise=None, generator=torch.Generator().manual_seed(0)), torch.randn(1)
    for cast in (True, False):
        model = copy.deepcopy(exact)
        model = model.to(torch.bfloat16) if cast else model
        with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            for _ in range(1 + bool(change.get("vae_steps"))):            # of both stages
                losses = model.train().loss(batch)
                losses["loss"].backward()
                model.zero_grad()
            got = model.eval().sample(batch, generator=torch.Generator().manual_seed(0))
        assert "mse" in losses and losses["loss"].dtype == got.dtype == torch.float32
        assert all(torch.isfinite(value).all() for value in losses.values())
        if not change.get("vae_steps"):                                   # there the scale has been measured
            assert (got - want).abs().mean() < 0.05 * want.abs().mean()


def test_bfloat16_leaves_the_scale_as_it_is():
    model = tiny(vae_channels=(4, 8), patch_size=1, latent_scale=0.18215).to(torch.bfloat16)
    assert model.scale.dtype == torch.float32 and model.scale.item() == pytest.approx(0.18215, rel=1e-6)
    assert model.net.final.linear.weight.dtype == torch.bfloat16


def test_files_with_a_scalar_scale_load():
    model, other = (tiny(latent_scale=scale) for scale in (0.3, 0.0))
    old = model.state_dict() | {"scale": torch.tensor(0.3)}
    other.load_state_dict(old)
    assert other.scale.shape == (1,) and other.scale.item() == pytest.approx(0.3)


def test_a_process_whose_share_of_the_scale_is_empty_saves():
    """So it is with FSDP2: the vector of one lies on the first process."""
    model = tiny()
    model.scale.data = torch.empty(0)
    assert model.state_dict()["_extra_state"] == 0


def test_fsdp_takes_it(tmp_path):
    """One process, as train.py --fsdp does it: scalar parameters are refused there."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class LossStep(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model.loss(batch)

    step = LossStep(tiny())
    batch = {"x": torch.randn(3, 2, 8, 8), "label": torch.arange(3)}
    noise, t = torch.randn(3, 2, 8, 8), torch.tensor([5, 500, 900])
    want = step.model.eval().loss(batch, noise, t)["loss"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(step, mesh=init_device_mesh("cpu", (1,)))
        step.model.loss = functools.partial(step.model.loss, noise=noise, t=t)
        loss = step(batch)["loss"]
        loss.backward()
        assert torch.allclose(loss, want)
        assert all(p.grad is not None for p in step.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("zero_first", [True, False])
def test_steps_of_the_autoencoder_are_those_of_the_optimiser(zero_first):
    """Three batches a step; gradients are emptied before they are computed or after the step."""
    model = tiny(vae_channels=(4, 8), patch_size=1, vae_steps=2).train()
    batch = {"x": torch.randn(4, 2, 8, 8), "label": torch.arange(4) % 3}
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-3)
    stages = []
    for step in range(4):
        for micro in range(3):
            losses = model.loss(batch)
            if zero_first and micro == 0:
                optimizer.zero_grad()
            losses["loss"].backward()
            stages.append("kl" in losses)
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad()
    assert stages == [True] * 6 + [False] * 6


def test_an_averaged_model_does_not_train_the_autoencoder_again():
    config = dict(vae_channels=(4, 8), patch_size=1, vae_steps=2)
    model, batch = tiny(**config).train(), {"x": torch.randn(4, 2, 8, 8), "label": torch.arange(4) % 3}
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-3)
    for step in range(4):
        model.loss(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.3)
        trained = tiny(**config).train()
        trained.load_state_dict(ema.state_dict())
        assert ("kl" in trained.loss(batch)) == (step < 2)
        assert step < 2 or torch.equal(trained.scale, ema.scale)          # measured once


def test_images_are_mirrored_in_training_only_half_of_them_and_for_the_released_sizes():
    assert [Config(**dit.PRESETS[name]).flip for name in ("tiny", "S/8", "XL/2")] == [False, True, True]
    for vae in ({}, {"vae_channels": (4, 8), "patch_size": 1, "vae_steps": 9}):
        model, seen = tiny(flip=True, **vae), []
        x = torch.randn(1, 2, 8, 8).expand(400, -1, -1, -1)
        label, noise, t = torch.zeros(400, dtype=torch.long), torch.zeros(400, *model.config.latent_shape), \
            torch.zeros(400, dtype=torch.long)
        first = model.vae if vae else model.net.patch
        first = first.encoder.conv_in if vae else first
        first.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
        model.eval().loss({"x": x, "label": label}, noise, t)
        plain = seen.pop()
        assert torch.allclose(plain / plain.std(), x / x.std(), atol=1e-4), "never in evaluation"
        model.train().loss({"x": x, "label": label}, noise, t)
        same = (seen[0] == plain).flatten(1).all(1)
        assert torch.allclose(seen[0][~same], plain[~same].flip(3)) and 0.4 < same.float().mean() < 0.6


def test_one_level_of_noise():
    model = tiny(n_diffusion_steps=1, sampler_steps=1)
    losses = model.loss({"x": torch.rand(3, 2, 8, 8), "label": torch.arange(3)})
    assert all(torch.isfinite(value).all() for value in losses.values()) and (losses["t"] == 0).all()
    assert torch.isfinite(model.sample({"n": 2})).all()


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, message", [
    (dict(data_shape=(2, 9, 8)), "multiples of 2"), (dict(data_shape=(2,)), "of images is needed"),
    (dict(vae_channels=(4, 8, 8), data_shape=(2, 12, 12)), "multiples of 8"),
    (dict(label_dropout=0.0), "null class"), (dict(n_classes=0), "null class"),
    (dict(conditioning="adaln0"), "choose one of in_context, cross_attention, adaln, adaln_zero"),
    (dict(sampler="euler"), "sampler"),
    (dict(sampler_steps=0), "sampler steps 0"), (dict(sampler_steps=2000), "2000"),
    (dict(width=30), "n_heads"), (dict(vae_channels=(6, 8)), "vae_groups"),
    (dict(guidance_channels=5), "guidance_channels"), (dict(vae_std=0.0), "vae_std"),
    (dict(guidance=math.nan), "guidance"), (dict(guidance=-1.0), "guidance"), (dict(eta=1.5), "eta"),
    (dict(eta=math.nan), "eta"), (dict(label_dropout=7.0), "label_dropout"),
    (dict(vae_std=math.nan), "vae_std"),
    (dict(mlp_ratio=0.0), "mlp_ratio"), (dict(mlp_ratio=math.nan), "mlp_ratio"),
    (dict(latent_scale=-1.0), "latent_scale"), (dict(latent_scale=math.nan), "latent_scale"),
    (dict(vae_channels=(0, 8)), "vae_channels"), (dict(data_shape=(0, 8, 8)), "data_shape"),
    *((dict([(name, 0)]), f"{name} 0 must be at least 1") for name in (
        "vae_res_blocks", "vae_groups", "latent_channels", "patch_size", "width", "depth", "n_heads",
        "n_diffusion_steps")),
    *((dict([(name, -1)]), f"{name} -1 must be at least 0") for name in (
        "n_classes", "vae_steps", "guidance_channels"))])
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**change)
    assert "\n" not in str(error.value)


def test_bad_batches():
    model, x = tiny(), torch.randn(2, 2, 8, 8)
    cases = [
        (lambda: model.loss({"x": x, "label": torch.tensor([0, 3])}), "label 0..3 is out of range"),
        (lambda: model.sample({"label": torch.tensor([-1, 0])}), "out of range"),
        (lambda: model.loss({"x": x}), "no 'label'"),
        (lambda: model.loss({"x": torch.randn(2, 3, 8, 8), "label": torch.tensor([0, 1])}), "an image of"),
        (lambda: model.sample({"n": 2}, noise=torch.randn(2, 4, 8, 8)), r"noise of shape \(4, 8, 8\)"),
        (lambda: model.net(torch.randn(2, 3, 8, 8), None), "a latent of shape"),
        (lambda: model.decode(torch.randn(2, 4, 4, 4)), "a latent of shape"),
        (lambda: model.sample({"n": 2}, steps=[3, 5]), "must fall"),
        (lambda: tiny(label_dropout=0.0, guidance=1.0).sample({"n": 2}), "no 'label'")]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
