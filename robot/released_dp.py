"""Diffusion Policy as people download it: LeRobot's folders, and the state_dicts of the original.

github.com/huggingface/lerobot, src/lerobot/policies/diffusion; github.com/real-stanford/diffusion_policy.
Both become a Release of dp_cnn. A setting in their files that this code cannot follow is refused by its name.
"""
import re

import torch

from .downloads import Release, describe
from .errors import UserError, few, hint, one_line
from .normalizer import Normalizer
from .released_lerobot import (features, known_steps, normalizer, recipe_of, renames_of, scale_of,
                               statistics)

# Fields of LeRobot's DiffusionConfig -> ours, if at most the name differs.
FIELDS = {"horizon": "horizon", "n_obs_steps": "n_obs_steps", "n_action_steps": "n_action_steps",
          "down_dims": "down_dims", "kernel_size": "kernel_size", "n_groups": "n_groups",
          "diffusion_step_embed_dim": "step_embed_dim", "use_film_scale_modulation": "film_scale",
          "spatial_softmax_num_keypoints": "n_keypoints", "num_train_timesteps": "n_diffusion_steps"}
# ... that say nothing about what the policy computes once it is trained.
UNUSED = {"type", "device", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license",
          "pretrained_path", "pretrained_revision", "drop_n_last_frames", "pretrained_backbone_weights",
          "gradient_checkpointing", "compile_model", "compile_mode"}
READ = {*FIELDS, "input_features", "output_features", "input_shapes", "output_shapes",
        "normalization_mapping", "input_normalization_modes", "output_normalization_modes", "vision_backbone",
        "resize_shape", "crop_ratio", "crop_shape", "crop_is_random", "use_group_norm",
        "use_separate_rgb_encoder_per_camera",
        "noise_scheduler_type", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample",
        "clip_sample_range", "num_inference_steps", "do_mask_loss_for_padding"}
SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "scaled_linear"}
TARGETS = {"epsilon": "eps", "sample": "x0"}
SAMPLERS = {"DDPM": "ddpm", "DDIM": "ddim", "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
# Fields of the original's YAML that are read, or say nothing about what is computed.
ORIGINAL = {"shape_meta", "horizon", "n_obs_steps", "n_action_steps", "num_inference_steps", "down_dims",
            "obs_as_global_cond", "diffusion_step_embed_dim", "kernel_size", "n_groups", "cond_predict_scale",
            "crop_shape", "resnet_widths", "noise_scheduler", "scheduler", "num_keypoints", "_target_",
            "feature_dimension", "obs_encoder_group_norm", "eval_fixed_crop"}
# Steps of LeRobot's processors that the policy or the normaliser does here.
STEPS = ("rename_observations_processor", "to_batch_processor", "device_processor", "normalizer_processor",
         "unnormalizer_processor")
# Fields of diffusers' schedulers that this code has with one value only.
FIXED = {"trained_betas": None, "variance_type": "fixed_small", "thresholding": False, "steps_offset": 0,
         "rescale_betas_zero_snr": False, "set_alpha_to_one": True}


def lerobot_diffusion(download, model, hints):
    """A folder of LeRobot's DiffusionPolicy."""
    config = download.config
    if config.get("type") != "diffusion" and not ("input_shapes" in config and "down_dims" in config):
        return None
    weights, notes = download.weights, list(download.notes)
    inputs, outputs = features(config)
    cameras = [name for name, (kind, _) in inputs.items() if kind == "VISUAL"]
    env = [name for name, (kind, _) in inputs.items() if kind == "ENV"][:1]
    state_keys = {name: inputs[name][1][0] for name in ["observation.state", *env] if name in inputs}
    if "action" not in outputs or "observation.state" not in inputs:
        raise UserError(f"config.json has the features {few(inputs | outputs)}: a Diffusion Policy of "
                        f"LeRobot's has observation.state and action")
    notes += [f"the input {name} is not used, as in LeRobot" for name in inputs
              if name not in (*cameras, *state_keys)]
    stats = statistics(download, weights)
    keys = {"actions": {"action": outputs["action"][1][0]}, "state": state_keys}
    fields = lerobot_fields(config, notes) | encoder_fields(config, stats, cameras, weights)
    fields |= {"action_dim": keys["actions"]["action"], "state_dim": sum(state_keys.values()),
               "n_cameras": len(cameras), "obs": "image" if cameras else "lowdim"}
    if size := picture_size(inputs[name][1] for name in cameras):
        fields["image_size"] = size
    renames = renames_of(download, known_steps(download, STEPS))
    description = describe(download.name, {renames.get(k, k): d for k, d in state_keys.items()},
                           [renames.get(c, c) for c in cameras], size, fields["action_dim"])
    order = [state_keys["observation.state"], *cameras, *(state_keys[name] for name in env)]
    return Release("dp_cnn", fields, weights, normalizer(stats, keys), description, notes, {"order": order},
                   recipe_of(config))


def picture_size(shapes):
    """[H, W] of pictures of these shapes, each [3, H, W]; None if there are none. Raises UserError."""
    found = {tuple(shape) for shape in shapes}
    if len(found) > 1 or any(len(shape) != 3 or shape[0] != 3 for shape in found):
        raise UserError(f"config.json: pictures of {few(found)}; all should be of one [3, height, width]")
    return list(found.pop()[1:]) if found else None


def known(name, value, names, where="config.json"):
    if value not in names:
        raise UserError(f"{where}: {name} {one_line(repr(value), 40)} is not done here{hint(value, names)}")
    return names[value] if isinstance(names, dict) else value


def need(config, names):
    missing = [name for name in names if name not in config]
    if missing:
        raise UserError(f"config.json lacks {few(missing)}: it is not whole")


def lerobot_fields(config, notes):
    """Timeline, U-Net and sampler."""
    need(config, [*FIELDS, "noise_scheduler_type", "prediction_type"])
    unread = [name for name in config if name not in READ | UNUSED
              and not name.startswith(("optimizer_", "scheduler_"))]
    notes += [f"config.json: {few(unread)} is not known here, and not used"] if unread else []
    known("vision_backbone", config.get("vision_backbone", "resnet18"), ("resnet18",))
    steps = config.get("num_inference_steps")
    return {ours: config[name] for name, ours in FIELDS.items()} | {
        "sampler": known("noise_scheduler_type", config["noise_scheduler_type"], SAMPLERS),
        "schedule": known("beta_schedule", config.get("beta_schedule", "squaredcos_cap_v2"), SCHEDULES),
        "beta_ends": [config.get("beta_start", 1e-4), config.get("beta_end", 0.02)],
        "prediction_type": known("prediction_type", config["prediction_type"], TARGETS),
        "sampler_steps": config["num_train_timesteps"] if steps is None else steps,
        "clip_x0": config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else 0.0,
        "train_on_padding": not config.get("do_mask_loss_for_padding", False)}


def encoder_fields(config, stats, cameras, weights):
    """Scale, resizing and crop of the pictures, and the ResNet."""
    if not cameras:
        return {}
    scales = [scale_of(stats, name) or (torch.zeros(3), torch.ones(3)) for name in cameras]
    mean, std = (torch.cat([pair[i] for pair in scales]).tolist() for i in (0, 1))
    resize, crop = config.get("resize_shape") or [], config.get("crop_shape") or []
    if resize:                  # then the crop is a share of it, as LeRobot derives it whenever it loads
        share = config.get("crop_ratio", 1.0)
        crop = [int(side * share) for side in resize] if share < 1 else []
    return {"image_mean": mean, "image_std": std, "resize": resize, "crop_size": crop,
            "random_crop": config.get("crop_is_random", True),
            "resnet_norm": "group" if config.get("use_group_norm", True) else "batch",
            "share_encoder": not config.get("use_separate_rgb_encoder_per_camera", False),
            "resnet_widths": resnet_widths(weights, r"rgb_encoder\.(0\.)?backbone")}


def resnet_widths(weights, where):
    """Channels of the four stages, from the weights: no config.json says them."""
    found = {}
    for key, x in weights.items():
        stage = re.search(where + r"\.([4-7])\.0\.conv1\.weight$", key)
        if stage:
            found[stage[stage.lastindex]] = len(x)
    if len(found) != 4:
        raise UserError("its weights have no ResNet of four stages where the encoder of pictures should be")
    return [found[stage] for stage in sorted(found)]


# ----------------------------------------------------------------------------------------------------------
# The original


def original(download, model, hints):
    """A state_dict of Diffusion Policy's U-Net policies, with the shape_meta of its YAML beside it as
    config.json: hybrid images (robomimic's encoder)."""
    config = download.config
    if "shape_meta" not in config or "down_dims" not in config:
        return None
    need(config, ("horizon", "n_obs_steps", "n_action_steps", "down_dims", "noise_scheduler"))
    weights, notes = download.weights, list(download.notes)
    unread = [name for name in config if name not in ORIGINAL]
    notes += [f"config.json: {few(unread)} is not known here, and not used"] if unread else []
    try:
        obs = {key: (one.get("type", "low_dim"), one["shape"])
               for key, one in config["shape_meta"]["obs"].items()}
        action_dim, = config["shape_meta"]["action"]["shape"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError("config.json: shape_meta should have obs and action, with a shape each") from None
    for key, (kind, shape) in obs.items():
        known(f"shape_meta: {key}: type", kind, ("rgb", "low_dim"))
    cameras = [key for key, (kind, _) in obs.items() if kind == "rgb"]
    state_keys = {key: shape[0] for key, (kind, shape) in obs.items() if kind == "low_dim"}
    scale = original_scales(download.name, weights, [*obs, "action"])
    fields = original_fields(config, cameras, weights, scale)
    fields |= {"action_dim": action_dim, "state_dim": sum(state_keys.values()), "n_cameras": len(cameras)}
    if size := picture_size(obs[key][1] for key in cameras):
        fields["image_size"] = size
    order = [key if key in cameras else state_keys[key] for key in obs]
    if fields["conditioning"] == "inpaint" and order != [*cameras, *state_keys.values()]:
        raise UserError("obs_as_global_cond false: the cameras have to be the first of shape_meta's obs")
    arms = absolute_arms(action_dim, scale["action"], state_keys)
    processing, raw_dim = {}, action_dim
    if arms:
        # Rotations one after the other, each where the ones before it have left it.
        turn = {"from": "axis_angle", "to": "rotation_6d"}
        processing = {"actions": [{"rotation": {"at": 10 * arm + 3} | turn} for arm in range(arms)]}
        raw_dim = 7 * arms
        notes.append(f"actions of {action_dim} numbers are taken for absolute poses of {arms} arm(s): "
                     f"position, rotation as 6 numbers, gripper; the robot gets {raw_dim}, rotations as axis "
                     f"and angle")
    description = describe(download.name, state_keys, cameras, size, raw_dim, processing)
    return Release("dp_cnn", fields, weights, original_normalizer(scale, state_keys), description, notes,
                   {"order": order})


def original_scales(name, weights, keys):
    """{key: {"scale", "offset", "min", ...}} of the normaliser among the weights, taken out of them."""
    found, prefix = {}, "normalizer.params_dict."
    for key in [key for key in weights if key.startswith(prefix)]:
        which, _, part = key[len(prefix):].partition(".")
        found.setdefault(which, {})[part.rpartition(".")[2]] = weights.pop(key).double().flatten()
    for key in keys:
        if not {"scale", "offset"} <= set(found.get(key, ())):
            raise UserError(f"{name} has no normaliser of {key!r} among its weights, only of {few(found)}: "
                            f"save the whole state_dict")
    return found


def original_normalizer(scale, state_keys):
    """y = x * scale + offset, as it stands there."""
    both = {"actions": [scale["action"]], "state": [scale[key] for key in state_keys]}
    names = ("scale", "offset", "min", "max", "mean", "std")
    none = torch.zeros(0, dtype=torch.float64)
    joined = {key: {name: torch.cat([none, *(part.get(name, 0 * part["scale"]) for part in parts)])
                    for name in names} for key, parts in both.items()}
    state = {"mode": "minmax", "near_constant": {key: [] for key in joined},
             "scale": {key: x["scale"].float() for key, x in joined.items()},
             "offset": {key: x["offset"] for key, x in joined.items()},
             "stats": {key: {name: x[name].float() for name in ("min", "max", "mean", "std")}
                       for key, x in joined.items()}}
    return Normalizer.from_state(state)


def absolute_arms(action_dim, scale, state_keys):
    """How many arms have their absolute pose in an action, 0 if it is something else. A pose has ten numbers,
    of which only the three of the position are scaled."""
    plain = scale["scale"].reshape(-1, 10)[:, 3:] if action_dim % 10 == 0 else torch.zeros(1)
    return action_dim // 10 if (plain == 1).all() and "robot0_eef_pos" in state_keys else 0


def original_fields(config, cameras, weights, scale):
    noise = config["noise_scheduler"]
    for name, value in FIXED.items():
        known(f"noise_scheduler: {name}", noise.get(name, value), (value,))
    if cameras and not config.get("eval_fixed_crop", True):
        raise UserError("config.json: eval_fixed_crop false crops at random in evaluation, which is not done "
                        "here")
    crop = config.get("crop_shape") or []
    fields = {"horizon": config["horizon"], "n_obs_steps": config["n_obs_steps"],
              "n_action_steps": config["n_action_steps"], "down_dims": config["down_dims"],
              "kernel_size": config.get("kernel_size", 5), "n_groups": config.get("n_groups", 8),
              "step_embed_dim": config.get("diffusion_step_embed_dim", 256),
              "film_scale": config.get("cond_predict_scale", False),
              "conditioning": "global" if config.get("obs_as_global_cond", True) else "inpaint",
              "n_diffusion_steps": noise["num_train_timesteps"], "train_on_padding": True,
              "sampler": known("scheduler", config.get("scheduler", "DDPMScheduler"), SAMPLERS),
              "sampler_steps": config.get("num_inference_steps") or noise["num_train_timesteps"],
              "spacing": known("noise_scheduler: timestep_spacing", noise.get("timestep_spacing", "leading"),
                               ("leading", "trailing")),
              "schedule": known("noise_scheduler: beta_schedule", noise["beta_schedule"], SCHEDULES),
              "beta_ends": [noise.get("beta_start", 1e-4), noise.get("beta_end", 0.02)],
              "prediction_type": known("noise_scheduler: prediction_type", noise["prediction_type"], TARGETS),
              "clip_x0": noise.get("clip_sample_range", 1.0) if noise.get("clip_sample", True) else 0.0,
              "obs": "image" if cameras else "lowdim"}
    if cameras:
        pixels = [(-scale[key]["offset"] / scale[key]["scale"], 1 / scale[key]["scale"]) for key in cameras]
        mean, std = (torch.cat([pair[i].expand(3) for pair in pixels]).tolist() for i in (0, 1))
        fields |= {"image_mean": mean, "image_std": std, "crop_size": crop,
                   "n_keypoints": config.get("num_keypoints", 32),
                   "image_features": config.get("feature_dimension", 64),
                   "resnet_norm": "group" if config.get("obs_encoder_group_norm", False) else "batch",
                   "resnet_widths": resnet_widths(weights, r"obs_nets\.[^.]+\.nets\.0\.nets")}
    return fields
