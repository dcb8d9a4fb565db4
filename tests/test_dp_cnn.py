"""dp_cnn.py against the official implementations, closed forms, and what it says of itself."""
import dataclasses
import math

import pytest
import torch
from golden_cases import golden, manifest
from torch.utils._python_dispatch import TorchDispatchMode

import dp_cnn

from dp_cnn import PRESETS, Config, DiffusionPolicyCNN, UNet1d, convert_official, official_normalizer


# -- the official implementations


def unet_config(official, **more):
    """Official constructor arguments of ConditionalUnet1D -> ours."""
    known = {"input_dim", "global_cond_dim", "diffusion_step_embed_dim", "down_dims", "kernel_size",
             "n_groups", "cond_predict_scale", "local_cond_dim"}
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
    of_step, of_obs = unet.film_of_step(case.inp["timestep"].expand(B)), unet.film_of_obs(cond)
    pred = unet(sample, of_step, of_obs)
    case.check("out/pred", pred)
    loss = (pred * case.inp["cotangent"]).mean()
    case.check("out/loss", loss)
    loss.backward()
    check_gradients(case, unet, config, prefix="unet.")
    for name, tensor in {"sample": sample, "global_cond": cond}.items():
        if name in case.grad_in:
            case.check(f"grad_in/{name}", tensor.grad)
    with torch.no_grad():  # the matrix-product path of a single short sequence
        one = unet(case.inp["sample"][:1], [f[:1] for f in of_step], [f[:1] for f in of_obs])
    assert torch.allclose(one, pred[:1], atol=2e-5 * pred.abs().max().item())


def check_gradients(case, module, config, prefix="", order=None):
    """Every stored official gradient, renamed and permuted as the weights are, equals ours."""
    ours = {prefix + k: p.grad for k, p in module.named_parameters()}
    for key in case.grad:
        official = f"unet.{key}" if prefix else key
        (name, want), = convert_official({official: case.grad[key]}, config, order).items()
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
    supported = {"n_obs_steps", "horizon", "n_action_steps", "down_dims", "kernel_size", "n_groups",
                 "crop_shape", "diffusion_step_embed_dim", "use_film_scale_modulation",
                 "spatial_softmax_num_keypoints",
                 "use_separate_rgb_encoder_per_camera", "do_mask_loss_for_padding", "prediction_type"}
    assert set(official) <= supported, f"LeRobot arguments that cannot be built: {set(official) - supported}"
    return Config(
        action_dim=c["action_dim"], state_dim=c["state_dim"] + c.get("env_dim", 0), n_cameras=c["n_cams"],
        image_size=tuple(c["image_hw"]), obs="image" if c["n_cams"] else "lowdim",
        horizon=official["horizon"], n_obs_steps=official["n_obs_steps"],
        n_action_steps=official["n_action_steps"], down_dims=tuple(official["down_dims"]),
        kernel_size=official["kernel_size"], n_groups=official["n_groups"],
        step_embed_dim=official["diffusion_step_embed_dim"], film_scale=official["use_film_scale_modulation"],
        resnet_widths=tuple(c.get("resnet_widths", (64, 128, 256, 512))),
        n_keypoints=official["spatial_softmax_num_keypoints"], crop_size=tuple(official["crop_shape"] or ()),
        share_encoder=not official["use_separate_rgb_encoder_per_camera"],
        prediction_type={"epsilon": "eps", "sample": "x0"}[official.get("prediction_type", "epsilon")])


@golden("dp_cnn.LeRobotDiffusionPolicy")
def test_golden_lerobot(case):
    config = lerobot_config(case)
    order = [case.config["state_dim"], *"c" * config.n_cameras, case.config.get("env_dim", 0)]
    model = DiffusionPolicyCNN.from_official(case.sd, config, order).eval()
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
    columns = slice(None)
    if config.n_cameras:
        columns = [c - emb for c in dp_cnn.official_columns(config, order)[emb:]]
    assert (cond - case.out["global_cond"][:, columns]).abs().max() <= case.tolerance("out/global_cond")

    result = model.loss(batch, noise=case.inp["noise"], t=case.inp["timesteps"])
    case.check("out/loss", result["loss"])
    result["loss"].backward()
    check_gradients(case, model, config, order=order)
    for name, tensor in {"state": parts[0], "env_state": parts[-1],
                         **{f"image_{v}": x for v, x in enumerate(images)}}.items():
        if name in case.grad_in:
            case.check(f"grad_in/{name}", tensor.grad)
    x_t, t = case.out["noisy_action"], case.inp["timesteps"]
    case.check("out/unet_pred", model.unet(x_t, model.unet.film_of_step(t), model.unet.film_of_obs(cond)))
    executed = slice(config.n_obs_steps - 1, config.n_obs_steps - 1 + config.n_action_steps)
    for sampler, steps in (("ddpm", 100), ("ddim", 10)):
        model.config.sampler, trace = sampler, []
        chunk = model.sample(batch, steps=steps, noise=case.inp["init_noise"], trace=trace,
                             step_noise=case.inp["step_noise"])
        case.check(f"out/{sampler}_full", chunk)
        case.check(f"out/{sampler}_chunk", chunk[:, executed])
        if f"{sampler}_trace" in case.out:
            case.check(f"out/{sampler}_trace", torch.stack(trace))


@golden("dp_cnn.LeRobotDiffusionPolicy")
def test_lerobot_weights_for_other_observations_are_refused_in_one_line(case):
    config = dataclasses.replace(lerobot_config(case), state_dim=lerobot_config(case).state_dim + 5)
    with pytest.raises(ValueError, match="film.weight is .* and should be") as error:
        DiffusionPolicyCNN.from_official(case.sd, config)
    assert "\n" not in str(error.value)


def count(**overrides):
    with torch.device("meta"):
        model = DiffusionPolicyCNN(Config(**overrides))
    return tuple(sum(p.numel() for p in part.parameters()) for part in (model.unet, model.encoders))


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


# -- closed forms

SMALL = {"down_dims": (16, 32), "step_embed_dim": 16, "action_dim": 2, "state_dim": 3, "horizon": 8,
         "n_action_steps": 4}


def small_batch(config, B=4, n=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = config.n_obs_loaded if n is None else n
    return {"actions": torch.rand(B, config.pred_horizon, config.action_dim, generator=g) * 2 - 1,
            "action_mask": torch.ones(B, config.pred_horizon, dtype=torch.bool),
            "state": torch.randn(B, n, config.state_dim, generator=g)}


def test_schedule_is_the_squared_cosine():
    K = 100
    alpha_bar = dp_cnn.cosine_alpha_bar(K, "cpu").double()
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 17, 50, 98):
        assert alpha_bar[t].item() == pytest.approx(f((t + 1) / K) / f(0), rel=1e-4)
    # The last beta would be 1: it is clipped, so that a trace of the data is left.
    assert (alpha_bar[99] / alpha_bar[98]).item() == pytest.approx(1 - 0.999, rel=1e-3)


def test_loss_noises_as_q_says():
    """x_t that reaches the network has mean sqrt(alpha_bar) x0 and variance 1 - alpha_bar; the loss is the
    mean squared distance of what the network says from the noise."""
    config = Config(**SMALL)
    model = DiffusionPolicyCNN(config)
    seen = []
    model.unet.forward = lambda x, *film: seen.append(x) or torch.zeros_like(x)
    batch = small_batch(config, B=20_000)
    batch["actions"][:] = 0.5
    torch.manual_seed(0)
    loss = model.loss(batch, t=torch.full((20_000,), 30))["loss"]
    alpha_bar = dp_cnn.cosine_alpha_bar(100, "cpu")[30].item()
    assert seen[0].mean().item() == pytest.approx(0.5 * math.sqrt(alpha_bar), abs=5e-3)
    assert seen[0].var().item() == pytest.approx(1 - alpha_bar, rel=1e-2)
    assert loss.item() == pytest.approx(1.0, rel=1e-2)  # the mean square of the noise itself


class OptimalDenoiser(torch.nn.Module):
    """What a perfect network would answer if the flattened chunks were N(mean, cov)."""

    def __init__(self, alpha_bar, mean, cov, prediction_type):
        super().__init__()
        self.final_out = torch.nn.Linear(1, 1)  # sample() reads the dtype of the weights here
        self.alpha_bar, self.mean, self.cov = alpha_bar.double(), mean, cov
        self.prediction_type = prediction_type

    def film_of_step(self, t):
        return [t]

    def film_of_obs(self, obs):
        return []

    def forward(self, x, of_step, of_obs):
        shape, a = x.shape, self.alpha_bar[of_step[0]]
        delta = x.double().flatten(1) - a.sqrt() * self.mean
        cov_t = a * self.cov + (1 - a) * torch.eye(len(self.mean), dtype=torch.float64)
        score = -torch.linalg.solve(cov_t, delta.T).T
        eps = -(1 - a).sqrt() * score
        x0 = (x.double().flatten(1) - (1 - a).sqrt() * eps) / a.sqrt()
        return (eps if self.prediction_type == "eps" else x0).reshape(shape).float()


@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps, tolerance", [(100, 0.01), (1000, 0.003)])
def test_sampler_with_the_optimal_denoiser_lands_on_the_data(sampler, steps, tolerance, prediction_type):
    """Gaussian chunks with correlated steps: mean and covariance come back, closer with finer steps (the
    posterior variance of [5] is exact for data of one point only; in K = 100 steps that costs a sixth)."""
    config = Config(**SMALL | {"action_dim": 1, "horizon": 4, "n_action_steps": 2}, sampler=sampler,
                    prediction_type=prediction_type, n_diffusion_steps=steps)
    model = DiffusionPolicyCNN(config)
    mean = torch.tensor([0.1, 0.2, 0.3, -0.2], dtype=torch.float64)
    root = torch.tensor([[0.2, 0, 0, 0], [0.15, 0.1, 0, 0], [0.1, 0.1, 0.1, 0], [0, -0.1, 0, 0.2]],
                        dtype=torch.float64)
    model.unet = OptimalDenoiser(dp_cnn.cosine_alpha_bar(steps, "cpu"), mean, root @ root.T, prediction_type)
    batch = {"state": torch.zeros(10_000, 2, 3)}
    chunk = model.sample(batch, steps, generator=torch.Generator().manual_seed(0))
    x = chunk.flatten(1).double()
    assert torch.allclose(x.mean(0), mean, atol=0.01)
    assert torch.allclose(torch.cov(x.T), root @ root.T, atol=tolerance)


def test_ddpm_step_is_the_posterior_and_the_papers_alpha_gamma_form():
    """One reverse step from x_t, with x0 known: c1 x0 + c2 x_t, equal to Bayes' rule on the two Gaussians
    q(x_{t-1} | x0), q(x_t | x_{t-1}), and to alpha (x_t - gamma eps) [5]."""
    config = Config(**SMALL, sampler="ddpm", prediction_type="x0")
    model = DiffusionPolicyCNN(config)
    K = config.n_diffusion_steps
    a = dp_cnn.cosine_alpha_bar(K, "cpu").double()
    x0, start = torch.rand(1, 8, 2) - 0.5, torch.randn(1, 8, 2)
    model.unet.forward = lambda x, *film: x0
    trace, no_noise = [], [torch.zeros(1, 8, 2)] * (K - 1)
    model.sample({"state": torch.zeros(1, 2, 3)}, K, noise=start, trace=trace, step_noise=no_noise)
    for t in (90, 40, 1):
        before, after = trace[K - 2 - t].double(), trace[K - 1 - t].double()
        beta = 1 - a[t] / a[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - a[t - 1])
        bayes = ((1 - beta).sqrt() / beta * before + a[t - 1].sqrt() / (1 - a[t - 1]) * x0) / precision
        eps = (before - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        gradient_form = (before - beta / (1 - a[t]).sqrt() * eps) / (1 - beta).sqrt()
        assert torch.allclose(after, bayes, atol=1e-5)
        assert torch.allclose(after, gradient_form, atol=1e-5)


def test_ddim_with_a_perfect_guess_returns_the_data_in_any_number_of_steps():
    config = Config(**SMALL, sampler="ddim")
    model = DiffusionPolicyCNN(config)
    x0, eps = torch.rand(1, 8, 2) - 0.5, torch.randn(1, 8, 2)
    model.unet.forward = lambda x, *film: eps
    for steps in (1, 7, 10, 100):
        top = dp_cnn.cosine_alpha_bar(100, "cpu")[(steps - 1) * (100 // steps)]
        start = top.sqrt() * x0 + (1 - top).sqrt() * eps
        chunk = model.sample({"state": torch.zeros(1, 2, 3)}, steps, noise=start)
        assert torch.allclose(chunk, x0, atol=2e-3 if top < 1e-3 else 1e-5)


# -- meaning


@pytest.mark.parametrize("conditioning", ["global", "inpaint"])
def test_padded_actions_change_neither_loss_nor_gradient(conditioning):
    config = Config(**SMALL, conditioning=conditioning)
    batch = small_batch(config)
    batch["action_mask"][1, 3:] = batch["action_mask"][2, :2] = False
    gradients = []
    for filler in (0.0, 5.0):
        torch.manual_seed(0)
        model = DiffusionPolicyCNN(config)
        # A convolution sees its neighbours, so a padded step may enter as input; what is predicted for it may
        # not enter the loss. The network is replaced by one without neighbours to see the loss alone.
        model.unet.forward = lambda x, *film: x * model.unet.final_out.bias.mean()
        filled = batch | {"actions": torch.where(batch["action_mask"][..., None], batch["actions"], filler)}
        torch.manual_seed(1)
        result = model.loss(filled)
        result["loss"].backward()
        gradients.append((result["loss"].item(), model.unet.final_out.bias.grad.clone()))
    assert gradients[0][0] == gradients[1][0]
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_loss_is_the_mean_over_real_steps():
    config = Config(**SMALL)
    model = DiffusionPolicyCNN(config)
    model.unet.forward = lambda x, *film: torch.zeros_like(x)
    batch = small_batch(config)
    batch["action_mask"][0, 2:] = False
    noise = torch.randn(4, 8, 2)
    result = model.loss(batch, noise=noise, t=torch.tensor([0, 5, 50, 99]))
    real = torch.cat([noise[0, :2].flatten(), noise[1:].flatten()])
    assert result["loss"].item() == pytest.approx(real.square().mean().item(), rel=1e-6)
    assert result["per_sample"][0].item() == pytest.approx(noise[0, :2].square().mean().item(), rel=1e-6)
    assert result["t"][0] == 0 and result["t"][3] == 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_inpainted_observations_stand_clean_in_every_input_of_the_network(sampler):
    config = Config(**SMALL, conditioning="inpaint", sampler=sampler)
    model = DiffusionPolicyCNN(config).eval()
    batch = small_batch(config, n=2)
    inputs, forward = [], model.unet.forward
    model.unet.forward = lambda x, *film: inputs.append(x) or forward(x, *film)
    chunk = model.sample(batch, steps=10, generator=torch.Generator().manual_seed(0))
    assert chunk.shape == (4, 8, 2) and len(inputs) == 10
    for x in inputs:
        assert torch.equal(x[:, :2, 2:], batch["state"])  # the To observed steps, behind 2 action dimensions
    moved = batch | {"state": batch["state"] + 1}
    other = model.sample(moved, 10, generator=torch.Generator().manual_seed(0))
    assert (other - chunk).abs().max() > 1e-3


def test_only_the_observed_steps_condition_the_chunk():
    config = Config(**SMALL)
    model = DiffusionPolicyCNN(config).eval()
    batch = small_batch(config, n=8)
    later = {"state": batch["state"].clone()}
    later["state"][:, 2:] += 10
    draw = lambda b: model.sample(b, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(batch), draw(later))
    later["state"][:, 1] += 10
    assert not torch.equal(draw(batch), draw(later))


def test_sampling_is_the_same_one_at_a_time_and_in_bfloat16_nearly():
    config = Config(**SMALL)
    model = DiffusionPolicyCNN(config).eval()
    batch, noise = small_batch(config), torch.randn(4, 8, 2)
    together = model.sample(batch, noise=noise)
    one = lambda i: model.sample({"state": batch["state"][i:i + 1]}, noise=noise[i:i + 1])
    alone = torch.cat([one(i) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
    half = model.to(torch.bfloat16).sample(batch, noise=noise)
    assert (half - together).abs().max() < 0.1 and half.dtype == torch.float32


def test_spatial_softmax_finds_the_bright_spot():
    module = dp_cnn.SpatialSoftmax(1, 1)
    torch.nn.init.constant_(module.conv.weight, 100.0)
    image = torch.zeros(1, 1, 5, 9)
    image[0, 0, 1, 6] = 1
    assert torch.allclose(module(image)[0, 0], torch.tensor([6 / 4 - 1, 1 / 2 - 1]), atol=1e-5)  # x, then y


def test_crops_random_in_training_centre_in_evaluation():
    config = Config(**SMALL, n_cameras=1, obs="image", image_size=(20, 24), crop_size=(16, 16),
                    resnet_widths=(16, 16, 16, 16), n_keypoints=4)
    encoder = dp_cnn.ImageEncoder(config)
    y, x = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    image = torch.stack([y, x, y * 0]).expand(500, -1, -1, -1)
    crops = encoder.train().crop(image)
    corner = crops[:, :2, 0, 0]
    assert torch.equal(crops[:, 0], (corner[:, 0, None] + torch.arange(16))[:, :, None].expand(-1, -1, 16))
    assert set(corner[:, 0].tolist()) == set(range(5)) and set(corner[:, 1].tolist()) == set(range(9))
    assert encoder.eval().crop(image)[0, :2, 0, 0].tolist() == [2, 4]
    encoder.train().random_crop = False
    assert encoder.crop(image)[0, :2, 0, 0].tolist() == [2, 4]


def test_a_camera_has_pixels_of_its_own_scale():
    config = Config(**SMALL | NARROW_IMAGE | {"image_mean": (0.0, 0.2, 0.4, 0.5, 0.5, 0.5),
                                              "image_std": (1.0, 0.2, 0.1, 2.0, 2.0, 2.0)})
    model, seen = DiffusionPolicyCNN(config).eval(), []
    for encoder in model.encoders:
        encoder.resnet.register_forward_pre_hook(lambda module, x: seen.append(x[0][0, :, 0, 0].tolist()))
    batch = image_batch(config)
    model.encode(batch | {"images": torch.full_like(batch["images"], 51)})      # 0.2 of 255
    assert seen[0] == pytest.approx([0.2, 0.0, -2.0], abs=1e-6)
    assert seen[1] == pytest.approx([-0.15] * 3, abs=1e-6)


def test_a_picture_is_resized_with_antialiasing_before_it_is_cropped():
    """One column of four is bright: each pixel of a quarter of the width is their mean."""
    config = Config(**SMALL, n_cameras=1, obs="image", image_size=(64, 256), resize=(32, 64),
                    crop_size=(30, 32), resnet_widths=(16, 16, 16, 16), n_keypoints=4)
    encoder, seen = dp_cnn.ImageEncoder(config).eval(), []
    encoder.resnet.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    images = torch.zeros(1, 3, 64, 256, dtype=torch.uint8)
    images[..., 3::4] = 200
    encoder(images)
    assert seen[0].shape == (1, 3, 30, 32)
    assert (seen[0] + 1 - 50 / 127.5).abs().max() < 0.1, "without antialiasing every pixel is black"


def test_batch_norm_keeps_its_statistics_and_trains_its_scale():
    ours, official = dp_cnn.FrozenBatchNorm(4), torch.nn.BatchNorm2d(4).eval()
    state = {"weight": torch.rand(4), "bias": torch.randn(4), "running_mean": torch.randn(4),
             "running_var": torch.rand(4) + 0.5}
    ours.load_state_dict(state)
    official.load_state_dict(state, strict=False)
    x = torch.randn(3, 4, 5, 6) * 3 + 1
    assert torch.allclose(ours.train()(x), official(x), atol=1e-6)
    ours(x).sum().backward()
    assert ours.weight.grad.abs().min() > 0 and torch.equal(ours.running_mean, state["running_mean"])
    model = DiffusionPolicyCNN(Config(**SMALL | NARROW_IMAGE | {"resnet_norm": "batch"}))
    assert not [m for m in model.encoders.modules() if isinstance(m, torch.nn.GroupNorm)]


@pytest.mark.parametrize("schedule, power", [("linear", 1), ("scaled_linear", 2)])
def test_linear_schedules(schedule, power):
    K, first, last = 50, 1e-3, 0.03
    model = DiffusionPolicyCNN(Config(**SMALL | {"n_diffusion_steps": K, "schedule": schedule,
                                                 "beta_ends": (first, last)}))
    low, high = first ** (1 / power), last ** (1 / power)
    want, product = [], 1.0
    for k in range(K):
        product *= 1 - (low + k / (K - 1) * (high - low)) ** power
        want.append(product)
    table = dp_cnn.schedule_table(K, schedule, (first, last), "cpu").double()
    assert torch.allclose(table, torch.tensor(want, dtype=torch.float64), rtol=1e-5)
    batch = small_batch(model.config)                           # and it is the one that noises the chunk
    noise, t = torch.randn_like(batch["actions"]), torch.full((len(batch["actions"]),), K - 1)
    seen = []
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.loss(batch, noise=noise, t=t)
    x_t = math.sqrt(product) * batch["actions"] + math.sqrt(1 - product) * noise
    assert torch.allclose(seen[0], x_t, atol=1e-5)


def test_columns_of_observations_in_any_order():
    config = Config(**SMALL | NARROW_IMAGE | {"state_dim": 3, "image_features": 2, "n_obs_steps": 2})
    emb, order = config.step_embed_dim, ["back", 2, "front", 1]
    step = [0, 1, 4, 5, 2, 3, 6]                                # back, front, the two states
    want = [*range(emb), *(emb + 7 * k + i for k in range(2) for i in step)]
    assert dp_cnn.official_columns(config, order) == want
    weight = torch.arange(emb + 14).expand(8, -1)
    (_, got), = convert_official({"model.mid_modules.0.cond_encoder.1.weight": weight}, config, order).items()
    assert got[0].tolist() == want
    names = {f"obs_encoder.obs_nets.{name}.nets.3.bias": torch.zeros(2) for name in ("front", "back")}
    assert list(convert_official(names, config, order)) == ["encoders.1.out.bias", "encoders.0.out.bias"]


def test_each_camera_has_an_encoder_of_its_own():
    config = Config(**SMALL, n_cameras=2, obs="image", image_size=(96, 96), resnet_widths=(16, 16, 16, 16),
                    n_keypoints=4)
    model = DiffusionPolicyCNN(config)
    images = torch.zeros(4, 2, 2, 3, 96, 96, dtype=torch.uint8)
    images[:, :, 0, :, :30], images[:, :, 1, :, :, 60:] = 255, 200  # one sees a bright top, one a bright side
    batch = small_batch(config) | {"images": images}
    model.loss(batch)["loss"].backward()
    assert len(model.encoders) == 2 and all(p.grad is not None for p in model.parameters())
    swapped = batch | {"images": batch["images"].flip(2)}
    assert not torch.allclose(model.encode(batch), model.encode(swapped))
    with pytest.raises(ValueError, match="n_cameras = 2"):
        model.loss(batch | {"images": batch["images"][:, :, :1]})


def test_a_shared_encoder_sees_all_cameras_alike():
    config = Config(**SMALL | NARROW_IMAGE, share_encoder=True)
    model = DiffusionPolicyCNN(config).eval()
    batch = image_batch(config)
    first, second = model.encode(batch)[..., :16].chunk(2, dim=-1)
    swapped = model.encode(batch | {"images": batch["images"].flip(2)})[..., :16]
    assert len(model.encoders) == 1 and not torch.allclose(first, second)
    assert torch.allclose(swapped, torch.cat([second, first], dim=-1), atol=1e-6)


def test_documented_shapes():
    config = Config(**SMALL)
    model = DiffusionPolicyCNN(config)
    of_step, of_obs = model.unet.film_of_step(torch.zeros(5)), model.unet.film_of_obs(torch.zeros(3, 6))
    for n, film in ((5, of_step), (3, of_obs)):  # 5 steps; batch 3, To * S = 6
        assert [f.shape for f in film] == [(n, 2 * b.conv1.out_channels) for b in model.unet.blocks()]
    half = DiffusionPolicyCNN(config).to(torch.bfloat16).unet
    for unet in (model.unet, half):  # float32 whatever the weights are
        of_step, of_obs = unet.film_of_step(torch.zeros(1)), unet.film_of_obs(torch.zeros(3, 6))
        pred = unet(torch.zeros(3, 8, 2), of_step, of_obs)
        assert pred.shape == (3, 8, 2) and pred.dtype == torch.float32
    trace = []
    chunk = model.sample(small_batch(config), steps=7, trace=trace)
    assert chunk.shape == (4, 8, 2) and len(trace) == 7 and torch.equal(trace[-1], chunk)


# -- what a sampler visits and draws, and what it does not wait for


def test_which_levels_a_sampler_visits():
    assert dp_cnn.timetable(100, 10, "leading") == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert dp_cnn.timetable(100, 51, "leading")[:2] == [50, 49]  # the trap
    assert dp_cnn.timetable(100, 51, "trailing")[:3] == [99, 97, 95]
    assert dp_cnn.timetable(100, 4, "trailing") == [99, 74, 49, 24]
    for spacing in ("leading", "trailing"):
        assert dp_cnn.timetable(7, 7, spacing) == [6, 5, 4, 3, 2, 1, 0]
    for wrong in ([], [3, 3], [3, 5], [100, 2], [5, -1], 0, 101):
        with pytest.raises(ValueError, match="sampler steps"):
            dp_cnn.timetable(100, wrong, "leading")
    for steps, spacing, want in ((51, "leading", range(50, -1, -1)), (4, "trailing", [99, 74, 49, 24]),
                                 ([99, 7, 0], "leading", [99, 7, 0])):
        model, seen = DiffusionPolicyCNN(Config(**SMALL, spacing=spacing)), []
        film_of_step = model.unet.film_of_step
        model.unet.film_of_step = lambda t: seen.extend(t.tolist()) or film_of_step(t)
        trace = []
        model.sample(small_batch(model.config), steps, trace=trace)
        assert seen == list(want) and len(trace) == len(seen)


@pytest.mark.parametrize("clip, want", [(1.0, 1.0), (0.5, 0.5), (3.0, 2.0), (0.0, 2.0)])
def test_the_guess_of_the_chunk_is_clipped_where_the_data_end(clip, want):
    """Data at 2, outside of [-1, 1], and a network that tells the noise exactly."""
    model = DiffusionPolicyCNN(Config(**SMALL, clip_x0=clip))
    eps = torch.randn(1, 8, 2)
    model.unet.forward = lambda x, *film: eps
    alpha_bar = dp_cnn.cosine_alpha_bar(100, "cpu")[40]
    start = alpha_bar.sqrt() * 2 + (1 - alpha_bar).sqrt() * eps
    chunk = model.sample({"state": torch.zeros(1, 2, 3)}, [40], noise=start)
    assert torch.allclose(chunk, torch.full_like(chunk, want), atol=1e-5)


def test_one_noise_level_is_enough():
    model = DiffusionPolicyCNN(Config(**SMALL, n_diffusion_steps=1, sampler_steps=1))
    result = model.loss(small_batch(model.config))
    assert (result["t"] == 0).all() and result["loss"].isfinite()
    assert model.sample(small_batch(model.config)).isfinite().all()


@pytest.mark.parametrize("sampler, depends", [("ddpm", True), ("ddim", False)])
def test_the_generator_decides_every_draw(sampler, depends):
    model = DiffusionPolicyCNN(Config(**SMALL, sampler=sampler)).eval()
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
    {}, NARROW_IMAGE, NARROW_IMAGE | {"share_encoder": True, "conditioning": "inpaint", "sampler": "ddpm"},
    {"sampler": "ddpm", "prediction_type": "x0", "pred_action_steps_only": True}], ids=str)
def test_nothing_waits_for_the_device(overrides):
    """On the meta device a value that is read raises, and so does a tensor that was left on the CPU."""
    config = Config(**SMALL | overrides)
    with torch.device("meta"):
        model = DiffusionPolicyCNN(config)
    batch = {k: v.to("meta") for k, v in image_batch(config).items()}
    optimizer = torch.optim.AdamW(model.param_groups(1e-6), lr=1e-3, foreach=True)
    for _ in range(2):  # the first run may fill the tables that are kept
        with Watch() as watch:
            model.train().loss(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.eval().sample(batch)
    assert not watch.copies


def test_a_sampler_keeps_no_table_of_all_steps_of_all_items():
    config = Config(**SMALL, sampler_steps=50)
    model = DiffusionPolicyCNN(config).eval()
    with Watch() as watch:
        model.sample(small_batch(config, B=64))
    assert watch.largest < 50 * 64 * 2 * 16  # FiLM parameters of the narrowest block


# -- numbers of another type


@pytest.mark.parametrize("overrides", [{}, NARROW_IMAGE, NARROW_IMAGE | {"conditioning": "inpaint"}], ids=str)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(how, overrides):
    config = Config(**SMALL | overrides)
    torch.manual_seed(0)
    model = DiffusionPolicyCNN(config).eval()
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


# -- training


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


@pytest.mark.parametrize("conditioning", ["global", "inpaint"])
def test_a_batch_is_its_items_one_by_one(conditioning):
    """Loss and chunk, with pictures of two cameras and masks of different lengths."""
    config = Config(**SMALL | NARROW_IMAGE, conditioning=conditioning)
    model = DiffusionPolicyCNN(config).eval()
    batch, t = ragged_batch(config), torch.tensor([3, 20, 60, 99])
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
        model = DiffusionPolicyCNN(Config(**SMALL, train_on_padding=padding))
        losses[padding] = model.loss(batch, noise=noise, t=t)
        whole = model.loss(batch | {"action_mask": torch.ones(4, 8, dtype=torch.bool)}, noise=noise, t=t)
    assert torch.equal(losses[True]["loss"], whole["loss"])
    assert torch.equal(losses[True]["per_sample"], whole["per_sample"])
    assert not torch.isclose(losses[False]["loss"], whole["loss"])


def test_pictures_of_bytes_are_the_floats_from_minus_one_to_one():
    config = Config(**SMALL | NARROW_IMAGE)
    model = DiffusionPolicyCNN(config).eval()
    batch = image_batch(config)
    floats = batch | {"images": batch["images"].float() / 255 * 2 - 1}
    assert torch.allclose(model.encode(batch), model.encode(floats), atol=1e-5)
    with pytest.raises(ValueError, match="images of 0 cameras"):
        model.encode({"state": batch["state"]})


def test_pictures_are_cropped_at_random_in_training_alone():
    config = Config(**SMALL | NARROW_IMAGE)
    model = DiffusionPolicyCNN(config)
    batch, noise, t = image_batch(config), torch.randn(4, 8, 2), torch.tensor([3, 20, 60, 99])
    loss = lambda seed: (torch.manual_seed(seed), model.loss(batch, noise=noise, t=t)["loss"])[1]
    model.train()
    assert loss(0) == loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


def test_inpainting_trains_the_encoder_through_the_known_entries_alone():
    config = Config(**SMALL | NARROW_IMAGE, conditioning="inpaint")
    model = DiffusionPolicyCNN(config)
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
    resnet = dp_cnn.ResNet((64, 128, 256, 512))
    for name, p in resnet.named_parameters():
        if p.ndim == 4:
            fan_out = p.shape[0] * p.shape[2] * p.shape[3]
            assert p.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
            assert p.abs().max() > 2.5 * math.sqrt(2 / fan_out), name  # normal, not uniform
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_every_parameter_is_decayed_alike():
    model = DiffusionPolicyCNN(Config(**SMALL | NARROW_IMAGE))
    model.encoders[1].requires_grad_(False)
    (group,) = model.param_groups(0.125)
    assert group["weight_decay"] == 0.125
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("change, words", [
    ({"horizon": 9}, "cannot be halved"), ({"n_obs_steps": 9}, "n_obs_steps 9"),
    ({"n_action_steps": 8}, "n_action_steps 8"), ({"action_dim": 0}, "action_dim 0"),
    ({"kernel_size": 4}, "odd"), ({"kernel_size": -1}, "kernel_size -1"), ({"crop_size": (99, 9)}, "larger"),
    ({"crop_size": (0, 9)}, "crop_size"), ({"crop_size": (9,)}, "crop_size"),
    ({"image_size": (9,)}, "height"),
    ({"down_dims": (12, 20)}, "groups"), ({"down_dims": (4, 8), "n_groups": 4}, "first also of 8"),
    ({"down_dims": ()}, "down_dims"), ({"n_groups": 0}, "n_groups 0"), ({"resnet_widths": (8,)}, "of 16"),
    ({"resnet_widths": (56,)}, "of 16"), ({"resnet_widths": ()}, "of 16"),
    ({"n_keypoints": 0}, "n_keypoints"), ({"resize": (9,)}, "give height, width"),
    ({"resize": (8, 8), "crop_size": (9, 8)}, "larger than image_size .* resized to"),
    ({"image_mean": (0.5,), "image_std": (0.5,)}, "three numbers"),
    ({"image_mean": (0.5,) * 3}, "image_mean"),
    ({"image_mean": (0.5,) * 3, "image_std": (0.0,) * 3}, "deviations are above 0"),
    ({"resnet_norm": "layer"}, "resnet_norm 'layer'"), ({"schedule": "cubic"}, "schedule 'cubic'"),
    ({"beta_ends": (0.02, 0.01)}, "must rise"), ({"image_features": -1}, "image_features"),
    ({"step_embed_dim": 2}, "step_embed_dim 2"), ({"step_embed_dim": 33}, "step_embed_dim 33"),
    ({"conditioning": "film"}, "conditioning 'film'"), ({"sampler_steps": 0}, "sampler steps 0"),
    ({"n_diffusion_steps": 0}, "n_diffusion_steps 0"), ({"spacing": "even"}, "leading, trailing"),
    ({"clip_x0": -1.0}, "clip_x0"), ({"clip_x0": math.nan}, "clip_x0"), ({"n_cameras": -1}, "n_cameras"),
    ({"conditioning": "inpaint", "pred_action_steps_only": True}, "global"),
])
def test_impossible_configurations_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**SMALL | change)
    assert "\n" not in str(error.value)
