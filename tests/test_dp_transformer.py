"""dp_transformer.py against the official implementation, against closed forms, and against its docstring."""
import math
import re
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from golden_cases import golden, manifest
from torch.utils._python_dispatch import TorchDispatchMode

import dp_transformer
from tools import options
import train
from dp_transformer import (PRESETS, BertTransformer, Config, DecoderTransformer, DiffusionPolicyTransformer,
                            convert_official, official_normalizer)
from robot.checkpoint import read_checkpoint
from robot.errors import UserError
from robot.policy import Policy

CONFIGS = Path(dp_transformer.__file__).parent / "configs"

# -- the official implementation -----------------------------------------------------------------------------


def network_config(official, **more):
    """Official constructor arguments of TransformerForDiffusion -> ours. obs_as_cond is ignored there:
    cond_dim decides. The BERT-like form ignores n_cond_layers."""
    known = {"input_dim", "output_dim", "horizon", "n_obs_steps", "cond_dim", "n_layer", "n_head", "n_emb",
             "p_drop_emb", "p_drop_attn", "causal_attn", "time_as_cond", "obs_as_cond", "n_cond_layers"}
    unknown = {k for k in official if not k.startswith("_")} - known
    assert not unknown, f"constructor arguments that this file cannot build: {unknown}"
    given = {"n_layer": 12, "n_head": 12, "n_emb": 768, "p_drop_emb": 0.1, "p_drop_attn": 0.1, "cond_dim": 0,
             "causal_attn": False, "time_as_cond": True, "n_cond_layers": 0, "n_obs_steps": None} | official
    bert = not given["cond_dim"] and not given["time_as_cond"]
    return Config(**{"horizon": given["horizon"], "n_obs_steps": given["n_obs_steps"] or given["horizon"],
                     "n_action_steps": 1, "width": given["n_emb"], "depth": given["n_layer"],
                     "n_heads": given["n_head"], "cond_depth": 0 if bert else given["n_cond_layers"],
                     "causal": given["causal_attn"], "embed_dropout": given["p_drop_emb"],
                     "dropout": given["p_drop_attn"], "arch": "bert" if bert else "decoder",
                     "conditioning": "tokens" if given["cond_dim"] else "inpaint"} | more)


@golden("dp_transformer.TransformerForDiffusion")
def test_golden_network(case):
    config = network_config(case.config)
    form = {"decoder": DecoderTransformer, "bert": BertTransformer}[config.arch]
    dims = [case.config.get(name, 0) for name in ("input_dim", "output_dim", "cond_dim")]
    network = form(*dims, config).eval()
    weights = convert_official({f"model.{k}": v for k, v in case.sd.items()}, config)
    network.load_state_dict({k.removeprefix("transformer."): v for k, v in weights.items()})
    for ours, official in ((network.mask, "mask"), (getattr(network, "memory_mask", None), "memory_mask")):
        if official in case.sd:
            assert torch.equal(ours if official == "mask" else ours.T, case.sd[official])
    x = case.inp["sample"].clone().requires_grad_()
    cond = case.inp.get("cond", torch.zeros(len(x), 0, 0)).clone().requires_grad_()
    t = case.inp["timestep"].expand(len(x))
    pred = network(x, network.memory(t, cond))
    case.check("out/pred", pred)
    loss = (pred * case.inp["cotangent"]).mean()
    case.check("out/loss", loss)
    loss.backward()
    check_gradients(case, network, config, prefix="transformer.")
    for name, tensor in {"sample": x, "cond": cond}.items():
        if name in case.grad_in:
            case.check(f"grad_in/{name}", tensor.grad)
    with torch.no_grad():  # the products of a CPU that samples
        case.check("out/pred", network(x, network.memory(t, cond)))


def check_gradients(case, module, config, prefix=""):
    """Every stored official gradient, renamed as the weights are, equals ours."""
    ours = {prefix + k: p.grad for k, p in module.named_parameters()}
    for key in case.grad:
        official = f"model.{key}" if prefix else key
        (name, want), = convert_official({official: case.grad[key]}, config).items()
        error = (ours[name] - want).abs().max().item()
        assert error <= case.tolerance(f"grad/{key}"), f"{case.name} {key}: {error:.2e}"


def names_of_groups(model, weight_decay):
    name = {id(p): n for n, p in model.named_parameters()}
    return [({name[id(p)] for p in g["params"]}, g["weight_decay"]) for g in model.param_groups(weight_decay)]


@golden("dp_transformer.TransformerForDiffusion")
def test_golden_names_of_decayed_parameters(case):
    config = network_config(case.config, action_dim=2, state_dim=3)
    groups = names_of_groups(DiffusionPolicyTransformer(config), 0.125)
    for (ours, decay), part in zip(groups, ("decay", "no_decay")):
        official = convert_official({f"model.{k}": torch.empty(0) for k in case.meta[part]}, config)
        assert ours == set(official), f"{case.name} {part}: {ours ^ set(official)}"
        assert decay == {"decay": 0.125, "no_decay": 0.0}[part]


def policy_config(case):
    p = case.config["policy"]
    known = {"horizon", "obs_dim", "action_dim", "n_action_steps", "n_obs_steps", "obs_as_cond",
             "pred_action_steps_only"}
    assert set(p) <= known, f"policy arguments that cannot be built: {p}"
    assert bool(p.get("obs_as_cond")) == bool(case.config["model"].get("cond_dim"))
    prediction_type = {"epsilon": "eps", "sample": "x0"}[case.config["prediction_type"]]
    return network_config(case.config["model"], action_dim=p["action_dim"], state_dim=p["obs_dim"],
                          horizon=p["horizon"], n_obs_steps=p["n_obs_steps"], prediction_type=prediction_type,
                          n_action_steps=p["n_action_steps"],
                          pred_action_steps_only=p.get("pred_action_steps_only", False))


def official_batch(case, config, obs, action):
    """Raw official observations (B, T, Do) and actions (B, T, Da) -> our batch."""
    scale = official_normalizer(case.sd)
    obs = obs * scale["obs"][0] + scale["obs"][1]
    action = action * scale["action"][0] + scale["action"][1]
    first = config.n_obs_steps - 1 if config.pred_action_steps_only else 0
    action = action[:, first:first + config.pred_horizon]
    return {"state": obs[:, :config.n_obs_loaded], "actions": action,
            "action_mask": torch.ones(action.shape[:2], dtype=torch.bool)}


@golden("dp_transformer.DiffusionTransformerLowdimPolicy")
def test_golden_policy(case):
    config = policy_config(case)
    model = DiffusionPolicyTransformer.from_official(case.sd, config).eval()
    batch = official_batch(case, config, case.inp["obs"], case.inp["action"])
    loss = model.loss(batch, noise=case.inp["noise"], t=case.inp["timesteps"])["loss"]
    case.check("out/loss", loss)
    loss.backward()
    check_gradients(case, model, config)

    scale, offset = official_normalizer(case.sd)["action"]
    for sampler, steps, kept in (("ddpm", 100, [0, 9, 49, 89, 98]), ("ddim", 10, range(10))):
        model.config.sampler, trace = sampler, []
        chunk = model.sample(batch, steps=steps, noise=case.inp["init_noise"], trace=trace,
                             step_noise=case.inp["step_noise"])
        case.check(f"out/{sampler}_action_pred", (chunk - offset) / scale)
        official = case.out[f"{sampler}_trace"][..., :config.action_dim]
        limit = case.tolerance(f"out/{sampler}_trace")
        for k, want in zip(kept, official):
            assert (trace[k] - want).abs().max() <= limit, f"{case.name} {sampler} step {k}"
        now = -config.first_action  # executed from step To - 1 on, whatever the variant
        case.check(f"out/{sampler}_action", (chunk[:, now:now + config.n_action_steps] - offset) / scale)


def count(**overrides):
    with torch.device("meta"):
        model = DiffusionPolicyTransformer(Config(**overrides))
    parts = (model.transformer, model.encoders)
    return tuple(sum(p.numel() for p in part.parameters()) for part in parts)


@pytest.mark.parametrize("preset, overrides, transformer, encoders", [
    ("lowdim", {}, 8_965_122, 0),
    # Block Push
    ("lowdim", {"horizon": 5, "n_obs_steps": 3, "n_action_steps": 1, "state_dim": 16}, 8_961_538, 0),
    ("kitchen", {}, 80_415_753, 0),
    ("image", {}, 8_997_642, 22_394_176),
    # Transport
    ("image", {"action_dim": 20, "n_cameras": 4, "state_dim": 18}, 9_037_844, 44_788_352),
])
def test_parameter_counts_are_the_published_ones(preset, overrides, transformer, encoders):
    assert count(**PRESETS[preset] | overrides) == (transformer, encoders)


def official_shapes(name="diffusion_policy_transformer_pusht_lowdim"):
    keys, n_parameters = manifest(name)
    return {f"model.{k}": torch.empty(shape, device="meta") for k, shape in keys.items()}, n_parameters


def test_published_manifest_loads_on_the_meta_device():
    official, n_parameters = official_shapes()
    model = DiffusionPolicyTransformer.from_official(official, Config(**PRESETS["lowdim"]))
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_from_official_names_everything_that_does_not_fit():
    official, _ = official_shapes()
    del official["model.head.bias"]
    official["model.extra"] = torch.empty(3, device="meta")
    official["model.decoder.layers.3.norm2.bias"] = torch.empty(7, device="meta")
    with pytest.raises(ValueError) as error:
        DiffusionPolicyTransformer.from_official(official, Config(**PRESETS["lowdim"]))
    for named in ("missing transformer.head.bias", "left over transformer.extra",
                  "transformer.blocks.3.norm_cross.bias is (7,) and should be (256,)"):
        assert named in str(error.value)
    with pytest.raises(ValueError, match="causal should be True"):
        DiffusionPolicyTransformer.from_official(official, Config(**PRESETS["lowdim"], causal=False))


TINY_IMAGE = {"obs": "image", "n_cameras": 2, "image_size": (84, 84), "crop_size": (76, 76), "state_dim": 9,
              "action_dim": 7, "horizon": 10, "width": 32, "depth": 2, "resnet_widths": (16, 16, 16, 16),
              "n_keypoints": 4}


def official_encoder_keys():
    """{name of an encoder's weight in robomimic's ObservationEncoder: name in ImageEncoder}."""
    pairs = {"nets.0.nets.0.weight": "resnet.conv1.weight", "nets.0.nets.1": "resnet.norm1",
             "nets.1.nets": "keypoints.conv", "nets.3": "out"}
    for stage in range(4):
        for block in range(2):
            theirs, ours = f"nets.0.nets.{stage + 4}.{block}.", f"resnet.stages.{stage}.{block}."
            pairs |= {f"{theirs}conv{i}.weight": f"{ours}conv{i}.weight" for i in (1, 2)}
            pairs |= {f"{theirs}bn{i}": f"{ours}norm{i}" for i in (1, 2)}
            if stage and not block:
                pairs |= {f"{theirs}downsample.0.weight": f"{ours}shortcut.0.weight",
                          f"{theirs}downsample.1": f"{ours}shortcut.1"}
    parts = lambda key: [""] if key.endswith(".weight") else [".weight", ".bias"]
    return {theirs + part: ours + part for theirs, ours in pairs.items() for part in parts(theirs)}


def test_names_of_a_hybrid_image_checkpoint():
    """Both aliases of the encoders and all constants are in it; cameras keep their order."""
    config = Config(**TINY_IMAGE)
    model = DiffusionPolicyTransformer(config)
    official, wanted = {"mask_generator._dummy_variable": 0, "normalizer.params_dict.action.scale": 1}, {}
    for v, camera in enumerate(("agentview_image", "robot0_eye_in_hand_image")):
        for theirs, ours in official_encoder_keys().items():
            prefix = f"obs_encoder.obs_nets.{camera}."
            alias = re.sub(r"^nets\.1\.", "pool.", re.sub(r"^nets\.0\.", "backbone.", theirs))
            official[prefix + theirs] = official[prefix + alias] = f"{v} {ours}"
            wanted[f"encoders.{v}.{ours}"] = f"{v} {ours}"
        official |= {f"{prefix}nets.1.{constant}": 0 for constant in ("pos_x", "pos_y", "temperature")}
    weights = convert_official(official, config)
    assert weights == wanted
    assert set(weights) == {k for k in model.state_dict() if k.startswith("encoders.")}


# -- closed forms --------------------------------------------------------------------------------------------

SMALL = {"width": 16, "depth": 2, "n_heads": 2, "action_dim": 2, "state_dim": 3, "horizon": 8,
         "n_obs_steps": 3, "n_action_steps": 4}
FORMS = {"decoder": {}, "condition encoder": {"cond_depth": 2},
         "decoder, inpaint": {"conditioning": "inpaint"}, "bert": {"conditioning": "inpaint", "arch": "bert"}}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def small_model(**overrides):
    """Weights large enough that every path matters."""
    torch.manual_seed(0)
    model = DiffusionPolicyTransformer(Config(**SMALL | overrides)).eval()
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def small_batch(config, B=4, n=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = config.n_obs_loaded if n is None else n
    return {"actions": torch.rand(B, config.pred_horizon, config.action_dim, generator=g) * 2 - 1,
            "action_mask": torch.ones(B, config.pred_horizon, dtype=torch.bool),
            "state": torch.randn(B, n, config.state_dim, generator=g)}


def test_cross_attention_is_torchs_multihead_attention():
    """[11] against nn.MultiheadAttention with the same weights, values and gradients."""
    torch.manual_seed(0)
    config = Config(**SMALL)
    ours, theirs = dp_transformer.CrossAttention(config), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    for theirs_p, p in zip((theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight,
                            theirs.out_proj.bias), ours.parameters()):
        torch.nn.init.normal_(p)
        theirs_p.data.copy_(p.data)
    x, m = torch.randn(5, 8, 16), torch.randn(5, 4, 16)
    hidden = torch.rand(8, 4) < 0.3
    hidden[:, 0] = False
    got = ours(x, *ours.memory(m, dp_transformer.additive(~hidden).T))
    want = theirs(x, m, m, attn_mask=hidden, need_weights=False)[0]
    assert torch.allclose(got, want, atol=1e-4)
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(ours.in_proj.weight.grad, theirs.in_proj_weight.grad, rtol=1e-3, atol=1e-2)
    assert torch.allclose(ours.out_proj.weight.grad, theirs.out_proj.weight.grad, rtol=1e-3, atol=1e-2)


@each_form
@pytest.mark.parametrize("B", [1, 3])
def test_what_a_sampler_computes_ahead_is_what_it_would_compute_at_every_step(form, B):
    model = small_model(**form)
    cond, _, _ = model.condition(small_batch(model.config, B))
    levels = torch.tensor([90, 40, 0])
    x = torch.randn(B, 8, model.transformer.input_emb.in_features)
    with torch.no_grad():
        for t, memory in zip(levels, model.transformer.memories(levels, cond), strict=True):
            want = model.transformer(x, model.transformer.memory(t.expand(B), cond))
            assert torch.allclose(model.transformer(x, memory), want, atol=1e-4)


def test_the_condition_is_encoded_once_per_chunk():
    model = small_model()
    calls = []
    model.transformer.obs_emb.register_forward_hook(lambda *_: calls.append("observation"))
    model.transformer.cond_encoder.register_forward_hook(lambda m, x, y: calls.append(tuple(y.shape)))
    model.sample(small_batch(model.config, B=2), steps=10)
    assert calls == [(10, 1, 16), "observation", (2, 3, 16)]  # the tokens of 10 steps, then the observations


class OptimalDenoiser(torch.nn.Module):
    """What a perfect network would answer if the flattened chunks were N(mean, cov)."""

    def __init__(self, alpha_bar, mean, cov, prediction_type):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)  # sample() reads the dtype of the weights here
        self.alpha_bar, self.mean, self.cov = alpha_bar.double(), mean, cov
        self.prediction_type = prediction_type

    def memories(self, levels, obs):
        return iter(levels)

    def forward(self, x, level):
        a = self.alpha_bar[level]
        delta = x.double().flatten(1) - a.sqrt() * self.mean
        cov_t = a * self.cov + (1 - a) * torch.eye(len(self.mean), dtype=torch.float64)
        eps = (1 - a).sqrt() * torch.linalg.solve(cov_t, delta.T).T
        x0 = (x.double().flatten(1) - (1 - a).sqrt() * eps) / a.sqrt()
        return (eps if self.prediction_type == "eps" else x0).reshape(x.shape).float()


@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampler_with_the_optimal_denoiser_lands_on_the_data(sampler, prediction_type):
    """Gaussian chunks with correlated steps: mean and covariance come back."""
    config = Config(**SMALL | {"action_dim": 1, "horizon": 4, "n_action_steps": 2}, sampler=sampler,
                    prediction_type=prediction_type, n_diffusion_steps=1000)
    model = DiffusionPolicyTransformer(config)
    mean = torch.tensor([0.1, 0.2, 0.3, -0.2], dtype=torch.float64)
    root = torch.tensor([[0.2, 0, 0, 0], [0.15, 0.1, 0, 0], [0.1, 0.1, 0.1, 0], [0, -0.1, 0, 0.2]],
                        dtype=torch.float64)
    alpha_bar = dp_transformer.cosine_alpha_bar(1000, "cpu")
    model.transformer = OptimalDenoiser(alpha_bar, mean, root @ root.T, prediction_type)
    batch = {"state": torch.zeros(10_000, 3, 3)}
    x = model.sample(batch, 1000, generator=torch.Generator().manual_seed(0)).flatten(1).double()
    assert torch.allclose(x.mean(0), mean, atol=0.01)
    assert torch.allclose(torch.cov(x.T), root @ root.T, atol=0.003)


def test_ddim_with_a_perfect_guess_returns_the_data_in_any_number_of_steps():
    model = DiffusionPolicyTransformer(Config(**SMALL))
    x0, eps = torch.rand(1, 8, 2) - 0.5, torch.randn(1, 8, 2)
    model.transformer.forward = lambda x, memory: eps
    for steps in (1, 7, 10, 100):
        top = dp_transformer.cosine_alpha_bar(100, "cpu")[(steps - 1) * (100 // steps)]
        start = top.sqrt() * x0 + (1 - top).sqrt() * eps
        chunk = model.sample({"state": torch.zeros(1, 3, 3)}, steps, noise=start)
        assert torch.allclose(chunk, x0, atol=2e-3 if top < 1e-3 else 1e-5)


def test_initial_weights():
    """Matrices and positions from N(0, 0.02^2), biases zero, norms the identity; the position of a lone step
    token zero, as official."""
    torch.manual_seed(0)
    config = Config(**SMALL | {"width": 256})
    network = DiffusionPolicyTransformer(config).transformer
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".norm" in name or name.startswith("norm"):
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02, rel=0.1) and abs(p.mean().item()) < 0.003, name
    alone = DiffusionPolicyTransformer(Config(**SMALL, conditioning="inpaint")).transformer
    assert not alone.cond_pos_emb.any() and alone.pos_emb.any() and network.cond_pos_emb.any()


# -- meaning -------------------------------------------------------------------------------------------------


def influence(model):
    """Which input moves which output: actions (T, T) and observations (T, To), as bool [output, input]."""
    config = model.config
    T, To, A = config.pred_horizon, config.n_obs_steps, config.action_dim
    batch = small_batch(config, B=1)
    x = torch.randn(1, T, model.transformer.input_emb.in_features)
    t = torch.tensor([50])

    def outputs(x, cond):
        with torch.no_grad():
            return model.transformer(x, model.transformer.memory(t, cond))[0]

    cond, _, _ = model.condition(batch)
    start = outputs(x, cond)
    moved = lambda y: (y - start).abs().amax(-1) > 1e-5
    of_actions = torch.stack([moved(outputs(x + (torch.arange(T) == j)[:, None], cond)) for j in range(T)], 1)
    if not cond.numel():
        return of_actions, None
    of_obs = [moved(outputs(x, cond + (torch.arange(To) == j)[:, None])) for j in range(To)]
    return of_actions, torch.stack(of_obs, 1)


def sees(T, n):
    return torch.arange(n) <= torch.arange(T)[:, None]


@each_form
def test_causal_mask_hides_the_future(form):
    """Action i moves with action j exactly if j <= i."""
    of_actions, _ = influence(small_model(**form))
    assert torch.equal(of_actions, sees(8, 8))


@each_form
def test_without_causal_mask_everyone_sees_everything(form):
    of_actions, of_obs = influence(small_model(**form, causal=False))
    assert of_actions.all() and (of_obs is None or of_obs.all())


def test_memory_mask_hides_observations_that_come_later():
    """Action i moves with observation j exactly if j <= i; the picture in the docstring."""
    model = small_model()
    assert torch.equal(influence(model)[1], sees(8, 3))
    row = lambda i: (model.transformer.memory_mask[:, i] == 0).tolist()
    assert row(0) == [True, True, False, False] and row(2) == [True] * 4  # [step, o0, o1, o2]


def test_a_chunk_that_starts_now_sees_every_observation():
    """Its first action is the present one: nothing that was observed is later."""
    model = small_model(pred_action_steps_only=True)
    of_actions, of_obs = influence(model)
    assert of_obs.all() and torch.equal(of_actions, sees(4, 4))


def test_a_chunk_that_starts_now_learns_from_the_newest_observation():
    """Every action is the newest state's first numbers: to be learned by all tokens alike."""
    torch.manual_seed(0)
    config = Config(**SMALL, pred_action_steps_only=True, prediction_type="x0")
    model = DiffusionPolicyTransformer(config)
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=3e-3)
    for _ in range(200):
        batch = small_batch(config, B=64, seed=int(torch.randint(10**6, ())))
        batch["actions"] = batch["state"][:, -1:, :2].clamp(-1, 1).expand(-1, 4, -1)
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    error = (model.eval().sample(batch) - batch["actions"]).abs().mean((0, 2))
    assert error[0] < 1.5 * error[1:].mean()


def test_a_condition_encoder_tells_early_actions_of_later_observations():
    """It has no mask of its own: what the first action may look at knows everything."""
    assert influence(small_model(cond_depth=1))[1].all()


@each_form
def test_every_action_sees_the_step(form):
    model = small_model(**form)
    cond, _, _ = model.condition(small_batch(model.config, B=1))
    x = torch.randn(1, 8, model.transformer.input_emb.in_features)
    with torch.no_grad():
        y = [model.transformer(x, model.transformer.memory(torch.tensor([t]), cond)) for t in (3, 60)]
    assert ((y[0] - y[1]).abs().amax(-1) > 1e-4).all()


def test_padded_actions_change_no_gradient_of_real_ones_before_them():
    """Behind the end of an episode: nothing of it reaches the loss, neither as target nor, with the causal
    mask, as input of a step that counts."""
    model, gradients = small_model(), []
    batch = small_batch(model.config)
    batch["action_mask"][1, 3:] = batch["action_mask"][2, 5:] = False
    noise, t = torch.randn(4, 8, 2), torch.tensor([3, 20, 60, 99])
    for filler in (0.0, 5.0):
        actions = torch.where(batch["action_mask"][..., None], batch["actions"], filler)
        model.zero_grad()
        model.loss(batch | {"actions": actions}, noise=noise, t=t)["loss"].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_loss_is_the_mean_over_real_steps():
    model = DiffusionPolicyTransformer(Config(**SMALL))
    model.transformer.forward = lambda x, memory: torch.zeros_like(x)
    batch = small_batch(model.config)
    batch["action_mask"][0, 2:] = False
    noise = torch.randn(4, 8, 2)
    result = model.loss(batch, noise=noise, t=torch.tensor([0, 5, 50, 99]))
    real = torch.cat([noise[0, :2].flatten(), noise[1:].flatten()])
    assert result["loss"].item() == pytest.approx(real.square().mean().item(), rel=1e-6)
    assert result["per_sample"][0].item() == pytest.approx(noise[0, :2].square().mean().item(), rel=1e-6)
    assert result["t"][0] == 0 and result["t"][3] == 1


@pytest.mark.parametrize("arch", ["decoder", "bert"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_inpainted_observations_stand_clean_in_every_input_of_the_network(sampler, arch):
    model = small_model(conditioning="inpaint", arch=arch, sampler=sampler)
    batch = small_batch(model.config, n=3)
    inputs, forward = [], model.transformer.forward
    model.transformer.forward = lambda x, memory: inputs.append(x) or forward(x, memory)
    trace = []
    chunk = model.sample(batch, steps=10, generator=torch.Generator().manual_seed(0), trace=trace)
    assert chunk.shape == (4, 8, 2) and len(inputs) == len(trace) == 10
    for x in inputs:
        assert torch.equal(x[:, :3, 2:], batch["state"])  # the To observed steps, behind 2 action dimensions
    for x, after in zip(inputs[1:], trace):
        assert torch.equal(x[..., :2], after)
    moved = batch | {"state": batch["state"] + 1}
    other = model.sample(moved, 10, generator=torch.Generator().manual_seed(0))
    assert (other - chunk).abs().max() > 1e-3


def test_inpainted_entries_are_not_in_the_loss():
    model = small_model(conditioning="inpaint")
    model.transformer.forward = lambda x, memory: torch.zeros_like(x)
    batch, noise = small_batch(model.config, n=8), torch.randn(4, 8, 5)
    loss = model.loss(batch, noise=noise, t=torch.zeros(4, dtype=torch.long))["loss"].item()
    noise[:, :3, 2:] = 0  # counted as zeros in the mean
    assert loss == pytest.approx(noise.square().mean().item(), rel=1e-5)


def test_only_the_observed_steps_condition_the_chunk():
    model = small_model()
    batch = small_batch(model.config, n=8)
    later = {"state": batch["state"].clone()}
    later["state"][:, 3:] += 10
    draw = lambda b: model.sample(b, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(batch), draw(later))
    later["state"][:, 2] += 10
    assert not torch.equal(draw(batch), draw(later))


def test_pred_action_steps_only_starts_now():
    config = Config(**SMALL, pred_action_steps_only=True)
    model = DiffusionPolicyTransformer(config)
    assert config.first_action == 0 and config.pred_horizon == 4 and Config(**SMALL).first_action == -2
    chunk = model.sample(small_batch(config))
    assert chunk.shape == (4, 4, 2) and model.transformer.pos_emb.shape == (1, 4, 16)
    # The original has positions for the whole horizon, of which it uses the first.
    weights = convert_official({"model.pos_emb": torch.arange(8.0)[None, :, None].expand(1, 8, 16)}, config)
    assert weights["transformer.pos_emb"][0, :, 0].tolist() == [0, 1, 2, 3]


@each_form
def test_sampling_is_the_same_one_at_a_time_and_in_bfloat16_nearly(form):
    torch.manual_seed(0)
    model = DiffusionPolicyTransformer(Config(**SMALL | form)).eval()
    batch = small_batch(model.config, n=3)
    noise = torch.randn(4, 8, model.transformer.input_emb.in_features)
    together = model.sample(batch, noise=noise)
    one = lambda i: model.sample({"state": batch["state"][i:i + 1]}, noise=noise[i:i + 1])
    assert torch.allclose(together, torch.cat([one(i) for i in range(4)]), atol=1e-5)
    half = model.to(torch.bfloat16).sample(batch, noise=noise)
    assert (half - together).abs().max() < 0.1 and half.dtype == torch.float32


def test_dropout_acts_where_the_original_drops():
    """p_drop_emb: the action tokens, the step's and the observation's. p_drop_attn: per layer the weights of
    both attentions, the inside of the MLP and the three branches. Nothing else, and nothing in evaluation."""
    for field, places in (("embed_dropout", 3), ("dropout", 2 * 6)):
        model = DiffusionPolicyTransformer(Config(**SMALL, **{field: 0.5})).train()
        with torch.profiler.profile() as profile:
            model.loss(small_batch(model.config))
        calls = {e.key: e.count for e in profile.key_averages()}
        assert calls["aten::bernoulli_"] == places, field
        with torch.profiler.profile() as profile:
            model.eval().loss(small_batch(model.config))
        assert "aten::bernoulli_" not in {e.key for e in profile.key_averages()}


def test_optimiser_groups():
    model = DiffusionPolicyTransformer(Config(**TINY_IMAGE, obs_encoder_weight_decay=0.25))
    (decayed, a), (kept, b), (vision, c) = names_of_groups(model, 0.125)
    assert (a, b, c) == (0.125, 0.0, 0.25)
    assert decayed | kept | vision == {name for name, _ in model.named_parameters()}
    assert vision == {name for name, _ in model.named_parameters() if name.startswith("encoders.")}
    assert {"transformer.pos_emb", "transformer.cond_pos_emb", "transformer.norm.weight"} <= kept
    assert "transformer.blocks.0.cross_attn.in_proj.weight" in decayed
    assert not any("bias" in name for name in decayed)


def test_documented_shapes():
    model = small_model()
    network, cond = model.transformer, torch.randn(5, 3, 3)
    shapes = [[tuple(part.shape) for part in layer] for layer in network.memory(torch.zeros(5), cond)]
    assert shapes == [[(5, 2, 4, 16), (5, 2, 4, 16), (5, 2, 4, 8)]] * 2    # H = 2 heads, M = 4, T = 8
    assert network.step_token(torch.zeros(7)).shape == (7, 1, 16)
    assert network.obs_tokens(cond).shape == (5, 3, 16)
    for form in FORMS.values():  # float32 whatever the weights are
        half = small_model(**form).to(torch.bfloat16).transformer
        x = torch.zeros(5, 8, half.input_emb.in_features)
        pred = half(x, half.memory(torch.zeros(5), cond))
        assert pred.shape == x.shape and pred.dtype == torch.float32
    trace = []
    chunk = model.sample(small_batch(model.config), steps=7, trace=trace)
    assert chunk.shape == (4, 8, 2) and len(trace) == 7 and torch.equal(trace[-1], chunk)


# -- what a sampler visits and draws, and what it does not wait for ------------------------------------------


def test_which_levels_a_sampler_visits():
    assert dp_transformer.timetable(100, 10, "leading") == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert dp_transformer.timetable(100, 51, "leading")[:2] == [50, 49]  # the trap
    assert dp_transformer.timetable(100, 51, "trailing")[:3] == [99, 97, 95]
    assert dp_transformer.timetable(100, 4, "trailing") == [99, 74, 49, 24]
    for spacing in ("leading", "trailing"):
        assert dp_transformer.timetable(7, 7, spacing) == [6, 5, 4, 3, 2, 1, 0]
    for wrong in ([], [3, 3], [3, 5], [100, 2], [5, -1], 0, 101):
        with pytest.raises(ValueError, match="sampler steps"):
            dp_transformer.timetable(100, wrong, "leading")
    for steps, spacing, want in ((51, "leading", range(50, -1, -1)), (4, "trailing", [99, 74, 49, 24]),
                                 ([99, 7, 0], "leading", [99, 7, 0])):
        model, seen = DiffusionPolicyTransformer(Config(**SMALL, spacing=spacing)), []
        step_token = model.transformer.step_token
        model.transformer.step_token = lambda t: seen.extend(t.tolist()) or step_token(t)
        trace = []
        model.sample(small_batch(model.config), steps, trace=trace)
        assert seen == list(want) and len(trace) == len(seen)


@pytest.mark.parametrize("clip, want", [(1.0, 1.0), (0.5, 0.5), (3.0, 2.0), (0.0, 2.0)])
def test_the_guess_of_the_chunk_is_clipped_where_the_data_end(clip, want):
    """Data at 2, outside of [-1, 1], and a network that tells the noise exactly."""
    model = DiffusionPolicyTransformer(Config(**SMALL, clip_x0=clip))
    eps = torch.randn(1, 8, 2)
    model.transformer.forward = lambda x, memory: eps
    alpha_bar = dp_transformer.cosine_alpha_bar(100, "cpu")[40]
    start = alpha_bar.sqrt() * 2 + (1 - alpha_bar).sqrt() * eps
    chunk = model.sample({"state": torch.zeros(1, 3, 3)}, [40], noise=start)
    assert torch.allclose(chunk, torch.full_like(chunk, want), atol=1e-5)


def test_one_noise_level_is_enough():
    model = DiffusionPolicyTransformer(Config(**SMALL, n_diffusion_steps=1, sampler_steps=1))
    result = model.loss(small_batch(model.config))
    assert (result["t"] == 0).all() and result["loss"].isfinite()
    assert model.sample(small_batch(model.config)).isfinite().all()


@pytest.mark.parametrize("sampler, depends", [("ddpm", True), ("ddim", False)])
def test_the_generator_decides_every_draw(sampler, depends):
    model = small_model(sampler=sampler)
    batch, noise = small_batch(model.config), torch.randn(4, 8, 2)

    def draw(seed, **start):
        torch.manual_seed(seed + 100)
        before = torch.get_rng_state()
        chunk = model.sample(batch, generator=torch.Generator().manual_seed(seed), **start)
        assert torch.equal(torch.get_rng_state(), before), "something else was drawn from"
        return chunk

    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, noise=noise), draw(1, noise=noise)) != depends
    torch.manual_seed(5)
    assert torch.equal(draw(0), draw(0))


class Watch(TorchDispatchMode):
    """Counts copies from the CPU to another device, and keeps the size of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.copies, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and len(devices) > 1:
            self.copies.append(func)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


NARROW_IMAGE = {"obs": "image", "n_cameras": 2, "image_size": (20, 24), "crop_size": (16, 16),
                "resnet_widths": (16, 16), "n_keypoints": 4}


@pytest.mark.parametrize("overrides", [
    {}, NARROW_IMAGE, NARROW_IMAGE | {"arch": "bert", "conditioning": "inpaint", "sampler": "ddpm"},
    {"sampler": "ddpm", "prediction_type": "x0", "pred_action_steps_only": True},
    {"cond_depth": 1, "dropout": 0.1, "embed_dropout": 0.1}], ids=str)
def test_nothing_waits_for_the_device(overrides):
    """On the meta device a value that is read raises, and so does a tensor that was left on the CPU."""
    config = Config(**SMALL | overrides)
    with torch.device("meta"):
        model = DiffusionPolicyTransformer(config)
    batch = {k: v.to("meta") for k, v in image_batch(config).items()}
    optimizer = torch.optim.AdamW(model.param_groups(1e-6), lr=1e-3, foreach=True)
    for _ in range(2):  # the first run may fill the tables that are kept
        with Watch() as watch:
            model.train().loss(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.eval().sample(batch)
    assert not watch.copies


# -- numbers of another type ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, NARROW_IMAGE, NARROW_IMAGE | {"conditioning": "inpaint"},
                                       {"cond_depth": 1}, FORMS["bert"]], ids=str)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(how, overrides):
    config = Config(**SMALL | overrides)
    torch.manual_seed(0)
    model = DiffusionPolicyTransformer(config).eval()
    batch = image_batch(config)
    noise = torch.randn(4, 8, 2 + (model.obs_dim if config.conditioning == "inpaint" else 0))

    def run():
        result = model.loss(batch, noise=noise, t=torch.tensor([0, 5, 50, 99]))
        result["loss"].backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        model.zero_grad()
        return result, gradient, model.sample(batch, noise=noise)

    exact, exact_gradient, exact_chunk = run()
    if how == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        result, gradient, chunk = run()
    assert result["loss"].dtype == result["per_sample"].dtype == chunk.dtype == torch.float32
    assert result["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.02)
    assert torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > 0.98
    assert (chunk - exact_chunk).abs().max() < 0.1


# -- training ------------------------------------------------------------------------------------------------


def ragged_batch(config, B=4):
    batch = image_batch(config, B)
    for i in range(B):
        batch["action_mask"][i, 3 + i:] = False
    return batch


def image_batch(config, B=4):
    batch = small_batch(config, B)
    if config.n_cameras:
        g = torch.Generator().manual_seed(1)
        shape = (B, config.n_obs_loaded, config.n_cameras, 3, *config.image_size)
        batch["images"] = torch.randint(256, shape, generator=g, dtype=torch.uint8)
    return batch


@pytest.mark.parametrize("conditioning", ["tokens", "inpaint"])
def test_a_batch_is_its_items_one_by_one(conditioning):
    """Loss and chunk, with pictures of two cameras and masks of different lengths."""
    model = small_model(**NARROW_IMAGE, conditioning=conditioning)
    batch, t = ragged_batch(model.config), torch.tensor([3, 20, 60, 99])
    noise = torch.randn(4, 8, 2 + (model.obs_dim if conditioning == "inpaint" else 0))
    item = lambda i: {k: v[i:i + 1] for k, v in batch.items()}
    result = model.loss(batch, noise=noise, t=t)
    alone = [model.loss(item(i), noise=noise[i:i + 1], t=t[i:i + 1]) for i in range(4)]
    assert torch.allclose(result["per_sample"], torch.cat([one["per_sample"] for one in alone]), atol=1e-5)
    real = batch["action_mask"].sum(1)
    weighed = sum(one["loss"] * n for one, n in zip(alone, real)) / real.sum()  # all real steps weigh alike
    assert result["loss"].item() == pytest.approx(weighed.item(), rel=1e-5)
    chunks = torch.cat([model.sample(item(i), noise=noise[i:i + 1]) for i in range(4)])
    assert torch.allclose(model.sample(batch, noise=noise), chunks, atol=1e-5)


def test_padding_is_trained_on_if_asked_for():
    batch, noise, t = ragged_batch(Config(**SMALL)), torch.randn(4, 8, 2), torch.tensor([3, 20, 60, 99])
    losses = {}
    for padding in (False, True):
        torch.manual_seed(0)
        model = DiffusionPolicyTransformer(Config(**SMALL, train_on_padding=padding))
        losses[padding] = model.loss(batch, noise=noise, t=t)
        whole = model.loss(batch | {"action_mask": torch.ones(4, 8, dtype=torch.bool)}, noise=noise, t=t)
    assert torch.equal(losses[True]["loss"], whole["loss"])
    assert torch.equal(losses[True]["per_sample"], whole["per_sample"])
    assert not torch.isclose(losses[False]["loss"], whole["loss"])


def test_pictures_of_bytes_are_the_floats_from_minus_one_to_one():
    config = Config(**SMALL | NARROW_IMAGE)
    model = DiffusionPolicyTransformer(config).eval()
    batch = image_batch(config)
    floats = batch | {"images": batch["images"].float() / 255 * 2 - 1}
    assert torch.allclose(model.encode(batch), model.encode(floats), atol=1e-5)
    with pytest.raises(ValueError, match="images of 0 cameras"):
        model.encode({"state": batch["state"]})


def test_crops_random_in_training_centre_in_evaluation():
    config = Config(**SMALL, n_cameras=1, obs="image", image_size=(20, 24), crop_size=(16, 16),
                    resnet_widths=(16, 16, 16, 16), n_keypoints=4)
    encoder = dp_transformer.ImageEncoder(config)
    y, x = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    image = torch.stack([y, x, y * 0]).expand(500, -1, -1, -1)
    crops = encoder.train().crop(image)
    corner = crops[:, :2, 0, 0]
    assert torch.equal(crops[:, 0], (corner[:, 0, None] + torch.arange(16))[:, :, None].expand(-1, -1, 16))
    assert set(corner[:, 0].tolist()) == set(range(5)) and set(corner[:, 1].tolist()) == set(range(9))
    assert encoder.eval().crop(image)[0, :2, 0, 0].tolist() == [2, 4]


def test_pictures_are_cropped_at_random_in_training_alone():
    model = small_model(**NARROW_IMAGE)
    batch, noise, t = image_batch(model.config), torch.randn(4, 8, 2), torch.tensor([3, 20, 60, 99])
    loss = lambda seed: (torch.manual_seed(seed), model.loss(batch, noise=noise, t=t)["loss"])[1]
    model.train()
    assert loss(0) == loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


def test_inpainting_trains_the_encoder_through_the_known_entries_alone():
    config = Config(**SMALL | NARROW_IMAGE, conditioning="inpaint")
    model = DiffusionPolicyTransformer(config)
    model.loss(image_batch(config))["loss"].backward()
    assert all(p.grad.any() for p in model.encoders.parameters() if p.ndim > 1)
    model.zero_grad()
    condition = model.condition

    def nothing_known(batch):
        cond, given, known = condition(batch)
        return cond, given, torch.zeros_like(known)

    model.condition = nothing_known
    model.loss(image_batch(config))["loss"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.encoders.parameters())


def test_the_resnet_starts_as_torchvisions():
    """N(0, 2 / fan_out) of He et al., so that gradients keep their size on the way down."""
    torch.manual_seed(0)
    resnet = dp_transformer.ResNet((64, 128, 256, 512))
    for name, p in resnet.named_parameters():
        if p.ndim == 4:
            fan_out = p.shape[0] * p.shape[2] * p.shape[3]
            assert p.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
            assert p.abs().max() > 2.5 * math.sqrt(2 / fan_out), name  # normal, not uniform
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("change, words", [
    ({"n_obs_steps": 9}, "n_obs_steps 9 .* horizon 8"), ({"n_action_steps": 7}, "n_action_steps 7"),
    ({"crop_size": (99, 9)}, "crop_size .* larger than image_size"), ({"crop_size": (0, 9)}, "crop_size"),
    ({"crop_size": (9,)}, "crop_size"), ({"image_size": (9,)}, "height"), ({"action_dim": 0}, "action_dim 0"),
    ({"resnet_widths": (8,)}, "of 16"), ({"resnet_widths": ()}, "of 16"), ({"depth": 0}, "depth 0"),
    ({"n_heads": 3}, "width 16 .* n_heads = 3"), ({"width": 15, "n_heads": 5}, "width 15 must be even"),
    ({"n_heads": 0}, "n_heads 0"), ({"width": 2}, "width 2"), ({"cond_depth": -1}, "cond_depth -1"),
    ({"conditioning": "global"}, "conditioning 'global'"),
    ({"obs_encoder_weight_decay": -1.0}, "obs_encoder_weight_decay"),
    ({"arch": "encoder"}, "arch 'encoder'"), ({"arch": "bert"}, "to be 'inpaint'"),
    ({"arch": "bert", "conditioning": "inpaint", "cond_depth": 1}, "cond_depth to be 0"),
    ({"dropout": 1.0}, "dropout 1.0"), ({"embed_dropout": math.nan}, "embed_dropout nan"),
    ({"sampler_steps": 101}, "sampler steps 101"), ({"spacing": "even"}, "leading, trailing"),
    ({"clip_x0": -1.0}, "clip_x0"), ({"n_diffusion_steps": 0}, "n_diffusion_steps 0"),
    ({"conditioning": "inpaint", "pred_action_steps_only": True}, "tokens"),
])
def test_impossible_configurations_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**SMALL | change)
    assert "\n" not in str(error.value)


# -- robomimic's layout, from file to action -----------------------------------------------------------------

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
STATE = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}


@pytest.fixture
def robomimic_file(tmp_path):
    """Two short demonstrations with exactly the five observation keys of the robomimic experiments."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "image.hdf5", "w") as file:
        file.create_group("data").attrs["fps"] = 20.0
        for i in range(2):
            demo = file.create_group(f"data/demo_{i}")
            demo.attrs["num_samples"] = 12
            demo["actions"] = rng.uniform(-1, 1, (12, 7))
            for key in CAMERAS:
                demo[f"obs/{key}"] = rng.integers(0, 256, (12, 84, 84, 3), dtype=np.uint8)
            for key, dim in STATE.items():
                demo[f"obs/{key}"] = rng.uniform(-1, 1, (12, dim))
    return tmp_path / "image.hdf5"


@pytest.fixture
def signals():
    """The training loop takes over the signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def robomimic_command(data, out, *more, **flags):
    """configs/robomimic_image_transformer.yaml, with the smallest network and no worker processes."""
    flags = {"config": CONFIGS / "robomimic_image_transformer.yaml", "data": data, "out": out, "workers": 0,
             "batch_size": 4, "steps": 2, "device": "cpu"} | flags
    small = ["width=16", "depth=1", "n_keypoints=4", "resnet_widths=[16, 16, 16, 16]", "sampler_steps=4"]
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return words + [word for field in small for word in ("--set", field)] + list(more)


def test_robomimic_images_train_resume_load_and_act(robomimic_file, tmp_path, signals):
    out = tmp_path / "out"
    train.main(robomimic_command(robomimic_file, out))
    train.main(robomimic_command(robomimic_file, out, "--resume", steps=3))
    checkpoint = read_checkpoint(out)
    assert checkpoint["step"] == 3 and checkpoint["data"]["camera_keys"] == list(CAMERAS)
    assert checkpoint["data"]["state_keys"] == STATE
    config = checkpoint["config"]
    assert (config["action_dim"], config["state_dim"], config["n_cameras"]) == (7, 9, 2)
    assert (config["horizon"], config["n_action_steps"], tuple(config["crop_size"])) == (10, 8, (76, 76))
    assert [g["weight_decay"] for g in checkpoint["optimizer"]["param_groups"]] == [1e-3, 0.0, 1e-6]

    policy = Policy.load(out)
    with h5py.File(robomimic_file) as file:
        demo = file["data/demo_0"]
        observe = lambda t: {key: demo[f"obs/{key}"][t] for key in (*CAMERAS, *STATE)}
        low, high = np.min([file[f"data/demo_{i}/actions"][:].min(0) for i in range(2)], 0), 1
        actions = np.stack([policy.act(observe(t)) for t in range(9)])
    assert actions.shape == (9, 7) and (actions >= low - 1).all() and (actions <= high + 1).all()
    assert len(policy.latency) == 2  # one look for 8 actions
    with pytest.raises(UserError, match="lacks 'robot0_eef_pos'"):
        policy.reset()
        policy.act({key: value for key, value in zip(CAMERAS, np.zeros((2, 84, 84, 3), np.uint8))})


@pytest.mark.parametrize("more, named", [
    (("--set", "crop_size=[96, 76]"), ["crop_size (96, 76)", "image_size (84, 84)"]),
    (("--set", "n_obs_steps=11"), ["n_obs_steps 11", "horizon 10"]),
    (("--set", "n_heads=3"), ["width 16", "n_heads = 3"]),
])
def test_wrong_settings_of_the_experiment(more, named, robomimic_file, tmp_path, signals):
    with pytest.raises(UserError) as error:
        train.main(robomimic_command(robomimic_file, tmp_path / "out", *more))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named)


def test_absent_observations_are_named(robomimic_file, tmp_path, signals):
    with h5py.File(robomimic_file, "a") as file:
        for i in range(2):
            file.move(f"data/demo_{i}/obs/robot0_eef_quat", f"data/demo_{i}/obs/robot0_eef_quaternion")
    with pytest.raises(UserError, match="robot0_eef_quat'") as error:
        train.main(robomimic_command(robomimic_file, tmp_path / "out"))
    assert "robot0_eef_quaternion" in str(error.value) and "\n" not in str(error.value)


# What the experiment's original YAML sets.
ORIGINAL_KEYS = """
    agentview_image robot0_eye_in_hand_image robot0_eef_pos robot0_eef_quat robot0_gripper_qpos action
    num_train_timesteps beta_start beta_end beta_schedule variance_type clip_sample prediction_type
    horizon n_action_steps n_obs_steps num_inference_steps crop_shape obs_encoder_group_norm n_layer
    n_cond_layers n_head n_emb p_drop_emb p_drop_attn causal_attn time_as_cond obs_as_cond
    update_after_step inv_gamma power min_value max_value batch_size num_workers shuffle pin_memory
    persistent_workers transformer_weight_decay obs_encoder_weight_decay learning_rate betas device seed
    debug resume lr_scheduler lr_warmup_steps num_epochs gradient_accumulate_every use_ema rollout_every
    checkpoint_every val_every sample_every max_train_steps max_val_steps tqdm_interval_sec
""".split()


def test_the_robomimic_config_answers_for_every_key_of_the_original():
    text = (CONFIGS / "robomimic_image_transformer.yaml").read_text()
    absent = [key for key in ORIGINAL_KEYS if not re.search(rf"(?<!\w){key}(?!\w)", text)]
    assert not absent


@pytest.mark.parametrize("name, n", [
    ("robomimic_image_transformer", 8_996_103 + 22_394_176), ("pusht_lowdim_transformer", 8_965_122),
    ("pusht_lowdim_transformer_cpu", None)])
def test_configs_build_the_published_networks(name, n):
    chosen, explicit = options.parse_options(["--config", str(CONFIGS / f"{name}.yaml")])
    meta = chosen.shape_meta
    dims = {kind: sum(m["shape"][0] for m in meta["obs"].values() if m.get("type", "low_dim") == kind)
            for kind in ("low_dim", "rgb")}
    facts = {"action_dim": meta["action"]["shape"][0], "state_dim": dims["low_dim"],
             "n_cameras": dims["rgb"] // 3, "image_size": (84, 84)}
    config = options.make_config(dp_transformer, chosen, facts)
    if n:
        assert sum(count(**vars(config))) == n
        assert (config.prediction_type, config.sampler, config.sampler_steps) == ("eps", "ddpm", 100)
    env = chosen.env
    assert not env or set(env["obs"]) == set(meta["obs"])
