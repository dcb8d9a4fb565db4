"""dp_cnn.py against the official implementations, against closed forms, and against what its docstring says."""
import math
import re

import pytest
import torch
from golden_cases import golden, manifest

import dp_cnn

from dp_cnn import PRESETS, Config, DiffusionPolicyCNN, UNet1d, convert_official, official_normalizer

EXECUTED_FROM = {True: -1, False: 0}  # official `oa_step_convention`: executes from step To - 1, or To


# -- the official implementations -------------------------------------------------------------------------------------


def unet_config(official, **more):
    """Official constructor arguments of ConditionalUnet1D -> ours."""
    known = {"input_dim", "global_cond_dim", "diffusion_step_embed_dim", "down_dims", "kernel_size", "n_groups",
             "cond_predict_scale", "local_cond_dim"}
    unknown = {k for k in official if not k.startswith("_")} - known
    assert not unknown, f"constructor arguments that this file cannot build: {unknown}"
    return Config(step_embed_dim=official["diffusion_step_embed_dim"], down_dims=tuple(official["down_dims"]),
                  kernel_size=official["kernel_size"], n_groups=official["n_groups"],
                  film_scale=official["cond_predict_scale"], **more)


@golden("dp_cnn.ConditionalUnet1D")
def test_golden_unet(case):
    if case.config.get("local_cond_dim"):
        pytest.skip("local conditioning is left out: no released model uses it")
    T = case.inp["sample"].shape[1]
    config = unet_config(case.config, horizon=T, n_action_steps=1)
    unet = UNet1d(case.config["input_dim"], case.config.get("global_cond_dim") or 0, config)
    weights = convert_official({f"unet.{k}": v for k, v in case.sd.items()}, config)
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items()})
    sample = case.inp["sample"].clone().requires_grad_()
    B = len(sample)
    cond = case.inp.get("global_cond", torch.zeros(B, 0)).clone().requires_grad_()
    pred = unet(sample, unet.film(case.inp["timestep"].expand(B), cond))
    case.check("out/pred", pred)
    loss = (pred * case.inp["cotangent"]).mean()
    case.check("out/loss", loss)
    loss.backward()
    check_gradients(case, unet, config, prefix="unet.")
    for name, tensor in {"sample": sample, "global_cond": cond}.items():
        if name in case.grad_in:
            case.check(f"grad_in/{name}", tensor.grad)
    with torch.no_grad():  # the matrix-product path of a single short sequence
        one = unet(case.inp["sample"][:1], [f[:1] for f in unet.film(case.inp["timestep"].expand(B), cond)])
    assert torch.allclose(one, pred[:1], atol=2e-5 * pred.abs().max().item())


def check_gradients(case, module, config, prefix="", state_dim=None):
    """Every stored official gradient, renamed and permuted as the weights are, equals ours."""
    ours = {prefix + k: p.grad for k, p in module.named_parameters()}
    for key in case.grad:
        official = f"unet.{key}" if prefix else key
        (name, want), = convert_official({official: case.grad[key]}, config, state_dim).items()
        error = (ours[name] - want).abs().max().item()
        assert error <= case.tolerance(f"grad/{key}"), f"{case.name} {key}: {error:.2e}"


def policy_config(case):
    official, p = case.config["model"], case.config["policy"]
    known = {"horizon", "obs_dim", "action_dim", "n_action_steps", "n_obs_steps", "obs_as_global_cond",
             "oa_step_convention", "pred_action_steps_only", "obs_as_local_cond"}
    assert set(p) <= known and not p.get("obs_as_local_cond"), f"policy arguments that cannot be built: {p}"
    return unet_config(official, action_dim=p["action_dim"], state_dim=p["obs_dim"], horizon=p["horizon"],
                       n_obs_steps=p["n_obs_steps"], n_action_steps=p["n_action_steps"],
                       pred_action_steps_only=p.get("pred_action_steps_only", False),
                       conditioning="global" if p.get("obs_as_global_cond") else "inpaint",
                       prediction_type={"epsilon": "eps", "sample": "x0"}[case.config["prediction_type"]])


def official_batch(case, config, obs, action):
    """Normalised official observations (B, T, Do) and actions (B, T, Da) -> our batch."""
    scale = official_normalizer(case.sd)
    obs, action = obs * scale["obs"][0] + scale["obs"][1], action * scale["action"][0] + scale["action"][1]
    first = config.n_obs_steps - 1 if config.pred_action_steps_only else 0
    action = action[:, first:first + config.pred_horizon]
    return {"state": obs[:, :config.n_obs_loaded], "actions": action,
            "action_mask": torch.ones(action.shape[:2], dtype=torch.bool)}


@golden("dp_cnn.DiffusionUnetLowdimPolicy")
def test_golden_policy(case):
    config = policy_config(case)
    model = DiffusionPolicyCNN.from_official(case.sd, config)
    batch = official_batch(case, config, case.inp["obs"], case.inp["action"])
    loss = model.loss(batch, noise=case.inp["noise"], t=case.inp["timesteps"])["loss"]
    case.check("out/loss", loss)
    loss.backward()
    check_gradients(case, model, config)

    action_scale, action_offset = official_normalizer(case.sd)["action"]
    model.eval()
    A = config.action_dim
    for sampler, steps, kept in (("ddpm", 100, [0, 9, 49, 89, 98]), ("ddim", 10, range(10))):
        model.config.sampler, trace = sampler, []
        chunk = model.sample(batch, steps=steps, noise=case.inp["init_noise"], trace=trace,
                             step_noise=case.inp["step_noise"])
        case.check(f"out/{sampler}_action_pred", (chunk - action_offset) / action_scale)
        official = case.out[f"{sampler}_trace"][..., :A]
        limit = case.tolerance(f"out/{sampler}_trace")
        for k, want in zip(kept, official):
            assert (trace[k] - want).abs().max() <= limit, f"{case.name} {sampler} step {k}"
        start = -config.first_action
        if not config.pred_action_steps_only and not case.config["policy"].get("oa_step_convention"):
            start += 1
        executed = (chunk[:, start:start + config.n_action_steps] - action_offset) / action_scale
        case.check(f"out/{sampler}_action", executed)


def lerobot_config(case):
    c = case.config
    official = dict(c["lerobot"])
    supported = {"n_obs_steps", "horizon", "n_action_steps", "down_dims", "kernel_size", "n_groups", "crop_shape",
                 "diffusion_step_embed_dim", "use_film_scale_modulation", "spatial_softmax_num_keypoints",
                 "use_separate_rgb_encoder_per_camera", "do_mask_loss_for_padding", "prediction_type"}
    assert set(official) <= supported, f"LeRobot arguments that cannot be built: {set(official) - supported}"
    return Config(action_dim=c["action_dim"], state_dim=c["state_dim"] + c.get("env_dim", 0), n_cameras=c["n_cams"],
                  image_size=tuple(c["image_hw"]), obs="image" if c["n_cams"] else "lowdim",
                  horizon=official["horizon"], n_obs_steps=official["n_obs_steps"],
                  n_action_steps=official["n_action_steps"], down_dims=tuple(official["down_dims"]),
                  kernel_size=official["kernel_size"], n_groups=official["n_groups"],
                  step_embed_dim=official["diffusion_step_embed_dim"],
                  film_scale=official["use_film_scale_modulation"],
                  resnet_widths=tuple(c.get("resnet_widths", (64, 128, 256, 512))),
                  n_keypoints=official["spatial_softmax_num_keypoints"], crop_size=tuple(official["crop_shape"] or ()),
                  share_encoder=not official["use_separate_rgb_encoder_per_camera"],
                  prediction_type={"epsilon": "eps", "sample": "x0"}[official.get("prediction_type", "epsilon")])


@golden("dp_cnn.LeRobotDiffusionPolicy")
def test_golden_lerobot(case):
    config = lerobot_config(case)
    state_dim = case.config["state_dim"]
    model = DiffusionPolicyCNN.from_official(case.sd, config, state_dim=state_dim).eval()
    parts = [case.inp[k].clone().requires_grad_() for k in ("state", "env_state") if k in case.inp]
    images = [case.inp[f"image_{v}"].clone().requires_grad_() for v in range(config.n_cameras)]
    mask_padding = case.config["lerobot"].get("do_mask_loss_for_padding", False)
    mask = ~case.inp["action_is_pad"] if mask_padding else torch.ones_like(case.inp["action_is_pad"])
    batch = {"state": torch.cat(parts, dim=-1), "actions": case.inp["action"], "action_mask": mask}
    if images:
        batch["images"] = torch.stack(images, dim=2)
    for v in range(config.n_cameras):
        encoder = model.encoders[0 if config.share_encoder else v]
        x = images[v].flatten(0, 1)
        case.check(f"out/features_{v}", encoder(x))
        case.check(f"out/keypoints_{v}", encoder.keypoints(encoder.resnet(encoder.crop(x))))
        if f"featmap_{v}" in case.out:
            case.check(f"out/featmap_{v}", encoder.resnet(encoder.crop(x)))
    cond, _, _ = model.condition(batch)
    emb = config.step_embed_dim
    columns = [c - emb for c in dp_cnn.lerobot_columns(config, state_dim)[emb:]] if config.n_cameras else slice(None)
    assert (cond - case.out["global_cond"][:, columns]).abs().max() <= case.tolerance("out/global_cond")

    result = model.loss(batch, noise=case.inp["noise"], t=case.inp["timesteps"])
    case.check("out/loss", result["loss"])
    result["loss"].backward()
    check_gradients(case, model, config, state_dim=state_dim)
    for name, tensor in {"state": parts[0], "env_state": parts[-1],
                         **{f"image_{v}": x for v, x in enumerate(images)}}.items():
        if name in case.grad_in:
            case.check(f"grad_in/{name}", tensor.grad)
    x_t, t = case.out["noisy_action"], case.inp["timesteps"]
    case.check("out/unet_pred", model.unet(x_t, model.unet.film(t, cond)))
    executed = slice(config.n_obs_steps - 1, config.n_obs_steps - 1 + config.n_action_steps)
    for sampler, steps in (("ddpm", 100), ("ddim", 10)):
        model.config.sampler, trace = sampler, []
        chunk = model.sample(batch, steps=steps, noise=case.inp["init_noise"], trace=trace,
                             step_noise=case.inp["step_noise"])
        case.check(f"out/{sampler}_full", chunk)
        case.check(f"out/{sampler}_chunk", chunk[:, executed])
        if f"{sampler}_trace" in case.out:
            case.check(f"out/{sampler}_trace", torch.stack(trace))


def count(**overrides):
    with torch.device("meta"):
        model = DiffusionPolicyCNN(Config(**overrides))
    return (sum(p.numel() for p in model.unet.parameters()), sum(p.numel() for p in model.encoders.parameters()))


@pytest.mark.parametrize("preset, overrides, unet, encoder", [
    ("lowdim", {}, 65_783_298, 0),
    ("lowdim", {"conditioning": "inpaint"}, 65_245_718, 0),
    ("lowdim", {"action_dim": 10, "state_dim": 19}, 65_768_970, 0),
    ("lowdim", {"action_dim": 9, "state_dim": 60}, 66_942_729, 0),
    ("image", {}, 251_511_938, 11_197_088),
    ("image", {"action_dim": 10, "state_dim": 9, "n_cameras": 2}, 255_612_042, 22_394_176),
])
def test_parameter_counts_are_the_published_ones(preset, overrides, unet, encoder):
    assert count(**PRESETS[preset] | overrides) == (unet, encoder)


@pytest.mark.parametrize("name, preset, prefix", [
    ("diffusion_policy_unet_pusht_lowdim", "lowdim", "model."), ("lerobot_diffusion_pusht", "image", "")])
def test_published_manifest_loads_on_the_meta_device(name, preset, prefix):
    keys, n_parameters = manifest(name)
    config = Config(**PRESETS[preset] | {"share_encoder": preset == "image"})
    official = {prefix + k: torch.empty(shape, device="meta") for k, shape in keys.items()}
    model = DiffusionPolicyCNN.from_official(official, config)
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_from_official_names_everything_that_does_not_fit():
    keys, _ = manifest("diffusion_policy_unet_pusht_lowdim")
    official = {f"model.{k}": torch.empty(s, device="meta") for k, s in keys.items()}
    del official["model.final_conv.1.bias"]
    official["model.extra"] = torch.empty(3, device="meta")
    official["model.mid_modules.0.blocks.0.block.0.bias"] = torch.empty(7, device="meta")
    with pytest.raises(ValueError) as error:
        DiffusionPolicyCNN.from_official(official, Config(**PRESETS["lowdim"]))
    for named in ("missing unet.final_out.bias", "left over unet.extra", "unet.mid.0.conv1.bias is (7,)"):
        assert named in str(error.value)
