"""Releases of pi0 and pi0.5: LeRobot's folders, openpi's PyTorch weights, PaliGemma's weights alone.

Readers for released.py. What the official programs do around their networks becomes a processing description,
statistics and fields of the Config. Sizes are read off the shapes of the weights.
"""
import math

import torch

from .downloads import FACTS, Release, describe
from .errors import UserError, few, hint, one_line
from .models import load_module
from .normalizer import Normalizer
from .openpi_robots import ROBOTS
from .processing import Processing
from .released_lerobot import (NORMALIZERS, features, known_steps, normalizer, recipe_of, renames_of,
                               statistics, steps_of, take_buffers)
from .weight_files import read_json

# Heads are in no shape. Gemma's 8 are fixed in openpi's code (gemma_pytorch.py), SigLIP has those of So400m.
HEADS = {"n_heads": 8, "vit_heads": 16}
# Settings of LeRobot's config.json that are constants in pi0.py: other values are refused.
CONSTANTS = {"n_obs_steps": 1, "time_sampling_beta_alpha": 1.5, "time_sampling_beta_beta": 1.0,
             "time_sampling_scale": 0.999, "time_sampling_offset": 0.001,
             "min_period": 0.004, "max_period": 4.0,
             "use_visual_memory": False, "use_proprioceptive_memory": False,
             "adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False}     # of early 2025
# Steps of LeRobot's processors that are done here, by the policy, the Config or the normaliser.
STEPS = ("rename_observations_processor", "to_batch_processor", "pi0_new_line_processor",
         "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor", "device_processor",
         "relative_actions_processor", "normalizer_processor", "unnormalizer_processor",
         "absolute_actions_processor")
STATE = "observation.state"
# Fields that are in no weight's shape: of a robot's own data, which padded_dim has room for, and of training.
FREE = (*FACTS, "horizon", "text_len", "state_in_text", "tokenizer_path", "antialias", "augment",
        "wrist_cameras", "n_draws", "text_weight", "text_share")

# ----------------------------------------------------------------------------------------------------------
# LeRobot


def lerobot(download, model, hints):
    """A folder that LeRobot's pi0 or pi0.5 has saved."""
    kind, config = download.config.get("type"), download.config
    if kind not in ("pi0", "pi05"):
        return None
    for key, value in CONSTANTS.items():
        if config.get(key, value) != value:
            raise UserError(f"{download.name}: config.json has {key} {one_line(config[key], 40)}, {kind} has "
                            f"{value} here, and nothing else")
    inputs, outputs = features(config)
    steps = known_steps(download, STEPS)
    renames = renames_of(download, steps)
    state_key = renames.get(STATE, STATE)
    state_dim = inputs.get(STATE, ("STATE", [number(download, "max_state_dim", 32)]))[1][0]
    action_dim = outputs.get("action", ("ACTION", [number(download, "max_action_dim", 32)]))[1][0]
    cameras = places_of(download, [name for name, (what, _) in inputs.items() if what == "VISUAL"], renames)
    fields = fields_of(download, kind)
    square = [fields["vit_size"]] * 2
    if config.get("image_resolution") not in (None, square):
        raise UserError(f"{download.name}: config.json has image_resolution "
                        f"{one_line(config['image_resolution'], 40)}, the weights see {square}")
    fields |= {"n_cameras": len(cameras), "max_cameras": max(3, len(cameras)), "antialias": False,
               "augment": False}
    own = {"horizon": "chunk_size", "n_action_steps": "n_action_steps", "text_len": "tokenizer_max_length"}
    fields |= {ours: number(download, theirs) for ours, theirs in own.items()}
    if "num_inference_steps" in config:                 # num_steps in early 2025
        fields["sampler_steps"] = number(download, "num_inference_steps")
    if kind == "pi0":
        fields["text_as_is"] = True
    processing = {"actions": relative(steps["relative_actions_processor"], state_key, action_dim),
                  "images": {"fit": "model"}, "cameras": cameras}
    own = str(steps["tokenizer_processor"].get("tokenizer_name", "."))
    notes = with_tokenizer(fields, download, hints, (".", own))
    weights = download.weights
    scales = lerobot_normalizer(download, weights, {STATE: state_dim}, {"action": action_dim}, notes)
    description = description_of(download, {state_key: state_dim}, action_dim, fields, processing)
    recipe = official_recipe(kind) | recipe_of(config)
    recipe |= {"normalizer": scales.mode_of("actions")} if scales else {}
    return Release(kind, fields, weights, scales, description, notes, recipe=recipe, free=FREE)


def number(download, key, default=None):
    """A whole number of config.json."""
    value = download.config.get(key, default)
    if type(value) is not int or value < 0:
        raise UserError(f"{download.name}: config.json has {key} {one_line(value, 40)}, no whole number: it "
                        f"is another program's, or it was edited")
    return value


def places_of(download, names, renames):
    """{camera in config.json: the robot's name of it, or None}. Empty ones stand last, as there."""
    empty = [name for name in names if ".empty_camera_" in name]
    wanted = [f"observation.images.empty_camera_{i}" for i in range(number(download, "empty_cameras", 0))]
    empty += [name for name in wanted if name not in empty]
    real = [name for name in names if name not in empty]
    if not real:
        raise UserError(f"{download.name}: config.json: input_features names no camera, type VISUAL")
    return {name: renames.get(name, name) for name in real} | dict.fromkeys(empty)


def lerobot_normalizer(download, weights, state, action, notes):
    """Normalizer, or None where the folder has no statistics. Takes those of early files out of `weights`."""
    early = not steps_of(download, "policy_preprocessor.json")
    if early:
        notes.append(f"{download.name} was made before LeRobot had processors: pictures stand in the middle "
                     f"of black as today; at that time they stood at its right and lower edge")
    saved = [state for part in ("pre", "post") for name, _, state in steps_of(
        download, f"policy_{part}processor.json") if name in NORMALIZERS and state]
    if not saved and not (early and take_buffers(dict(weights))):
        notes.append(f"{download.name} has no statistics: train it on data before it acts")
        return None
    found = statistics(download, weights)
    for name, (mode, _) in found.items():
        if name not in (*state, *action) and mode != "IDENTITY":
            raise UserError(f"{download.name}: {name} is normalised by {mode}; pictures are not, here")
    return normalizer(found, {"actions": action, "state": state})


def relative(options, state_key, action_dim):
    """The step that takes the state off a command, except where a joint's name holds an excluded word."""
    if not options.get("enabled"):
        return []
    words = [str(word).lower() for word in options.get("exclude_joints") or [] if word]
    names = [str(name).lower() for name in options.get("action_names") or []][:action_dim]
    absolute = [i for i, name in enumerate(names) if any(word in name for word in words)]
    return [{"delta": {"to": state_key, "except": absolute}}]


# ----------------------------------------------------------------------------------------------------------
# openpi


def openpi(download, model, hints):
    """A folder that openpi's convert_jax_model_to_pytorch.py or its PyTorch training wrote, with statistics
    in assets/<robot>/norm_stats.json. hints: robot, a name in ROBOTS."""
    names = load_module("pi0").convert_official(dict.fromkeys(download.weights))
    if "type" in download.config or "expert.layers.0.q.weight" not in names:
        return None
    kind = "pi05" if "expert.norm.dense.weight" in names else "pi0"
    fields = fields_of(download, kind)
    notes = with_tokenizer(fields, download, hints)
    name = chosen_robot(download, kind, hints.get("robot"))
    if not name:
        notes.append(f"{download.name}: whose statistics are taken? Add --robot with one of "
                     f"{few(robots_of(kind), 20)}; or train it on data")
        return unnamed(kind, fields, download, notes)
    robot = ROBOTS[name]
    horizon = number(download, "action_horizon", robot.horizon)
    fields |= {"horizon": horizon, "n_action_steps": min(robot.n_action_steps, horizon),
               "n_cameras": len(robot.cameras)}
    if kind == "pi05":
        fields["state_in_text"] = robot.state_in_text
    description = description_of(download, robot.state_keys, robot.action_dim, fields,
                                 robot.processing())
    description |= {"fps": robot.fps, "default_instruction": robot.instruction}
    normalizer = openpi_normalizer(download, robot, fields)
    return Release(kind, fields, download.weights, normalizer, description, notes,
                   recipe=official_recipe(kind), free=FREE)


def robots_of(kind):
    return [name for name, robot in ROBOTS.items() if robot.model == kind]


def chosen_robot(download, kind, asked):
    """A name in ROBOTS: as the user asks, or the first one of the only robot that has statistics here."""
    if asked:
        if asked not in robots_of(kind):
            other = f" ({download.name} holds {kind})" if asked in ROBOTS else ""
            raise UserError(f"--robot {asked}: openpi has no such configuration of {kind}{other}"
                            f"{hint(asked, robots_of(kind))}")
        return asked
    first = {}
    for name in robots_of(kind):
        if (download.folder / "assets" / ROBOTS[name].assets / "norm_stats.json").is_file():
            first.setdefault(ROBOTS[name].assets, name)
    return next(iter(first.values())) if len(first) == 1 else None


def openpi_normalizer(download, robot, fields):
    """Mean 0 and deviation 1 for pi0; the 1 % and 99 % quantiles to -1 and 1 for pi0.5. The zeros that pad
    the statistics are cut off."""
    path = download.folder / "assets" / robot.assets / "norm_stats.json"
    if not path.is_file():
        raise UserError(f"{download.name} lacks assets/{robot.assets}/norm_stats.json, the statistics of the "
                        f"robot: download assets as well, or name another --robot")
    mode, names = ("meanstd", ("mean", "std")) if robot.model == "pi0" else ("quantile", ("q01", "q99"))
    content, stats = read_json(path).get("norm_stats"), {}
    for key, dim in (("state", fields["state_dim"]), ("actions", fields["action_dim"])):
        stats[key] = {}
        for name in names:
            try:
                values = torch.tensor(content[key][name], dtype=torch.float64)
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: norm_stats has no {name} of {key}, a list of numbers, which "
                                f"{robot.model} needs") from None
            if values.ndim != 1 or len(values) < dim or not values.isfinite().all():
                raise UserError(f"{path}: {name} of {key} should be {dim} finite numbers or more, it has "
                                f"{values.isfinite().sum()}: it is another robot's")
            stats[key][name] = values[:dim]
    return Normalizer.from_stats({"state": mode, "actions": mode}, stats, eps=1e-6)


# ----------------------------------------------------------------------------------------------------------
# PaliGemma, and what all have in common


def paligemma(download, model, hints):
    """PaliGemma alone, with today's names or those of 2024: it sees and reads. The expert starts fresh."""
    names = load_module("pi0").convert_official(dict.fromkeys(download.weights))
    if "vlm.layers.0.q.weight" not in names or any(name.startswith("expert.") for name in names):
        return None
    kind = "pi05" if model == "pi05" else "pi0"
    fields = fields_of(download, kind)
    fields["vocab_size"] = min(fields["vocab_size"], load_module(kind).PRESETS[kind]["vocab_size"])
    notes = with_tokenizer(fields, download, hints)
    notes.append(f"{download.name} is PaliGemma: the action expert starts fresh, train it on data")
    return unnamed(kind, fields, download, notes)


def unnamed(kind, fields, download, notes):
    """Weights without a robot: the training data decide what the observations and actions are."""
    fields = {key: value for key, value in fields.items() if key not in FACTS}
    return Release(kind, fields, download.weights, None, {}, notes, recipe=official_recipe(kind), free=FREE)


def official_recipe(kind):
    return load_module(kind).RECIPES[kind] | {"preset": kind}


def fields_of(download, kind):
    """Fields of the Config: those of the published preset, with the sizes of these weights. Heads, of which
    shapes do not tell, may stand in sizes.json: {"vlm": [width, depth, mlp, heads], "vit": [the same]}."""
    module, sizes = load_module(kind), download.json("sizes.json")
    weights = module.convert_official(download.weights)
    theirs = "pi05" if "expert.norm.dense.weight" in weights else "pi0"
    if theirs != kind and "expert.layers.0.q.weight" in weights:
        raise UserError(f"{download.name}: config.json says {kind}, but beside it lie weights of {theirs}")
    size = lambda name, axis: weights[name].shape[axis]
    depth = lambda part: 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(part))
    try:
        fields = {"n_heads": sizes["vlm"][3], "vit_heads": sizes["vit"][3]} if sizes else dict(HEADS)
        fields |= {"head_dim": size("vlm.layers.0.q.weight", 0) // fields["n_heads"]}
        fields |= {"n_kv_heads": size("vlm.layers.0.k.weight", 0) // fields["head_dim"],
                   "depth": depth("vlm.layers."), "width": size("vlm.layers.0.q.weight", 1),
                   "mlp": size("vlm.layers.0.gate.weight", 0), "vocab_size": size("embed.weight", 0),
                   "patch_size": size("vision.patch.weight", -1), "vit_width": size("vision.position", 1),
                   "vit_depth": depth("vision.layers."), "vit_mlp": size("vision.layers.0.fc1.weight", 0)}
        fields["vit_size"] = math.isqrt(size("vision.position", 0)) * fields["patch_size"]
        fields["image_size"] = (fields["vit_size"],) * 2
        if "expert.layers.0.q.weight" in weights:
            fields |= {"expert_width": size("expert.layers.0.q.weight", 1),
                       "expert_mlp": size("expert.layers.0.gate.weight", 0),
                       "padded_dim": size("action_in_proj.weight", 1)}
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{download.name} lacks {one_line(e, 60)}, or has it in another shape: these are not "
                        f"the whole weights of {kind}") from None
    return module.PRESETS[kind] | fields


def with_tokenizer(fields, download, hints, folders=(".",)):
    """Set fields["tokenizer_path"]: the file that the user names, or the one in the first of these folders
    that has it. -> notes"""
    files = [download.folder / name / "tokenizer.model" for name in folders]
    found = hints.get("tokenizer_path") or next((str(path) for path in files if path.is_file()), "")
    fields["tokenizer_path"] = found
    return [] if found else [f"{download.name} has no tokenizer.model, without which no instruction is read: "
                             f"put google/paligemma-3b-pt-224's there, or add --set tokenizer_path=FILE"]


def description_of(download, state_keys, action_dim, fields, processing):
    """-> the release's description. Enters in `fields` how many numbers of state and action the network sees,
    after `processing`."""
    cameras = [key for key in processing["cameras"].values() if key]
    work = Processing(processing, state_keys, cameras)
    fields |= {"state_dim": work.state_dim, "action_dim": work.action_dim(action_dim)}
    return describe(download.name, state_keys, cameras, list(fields["image_size"]), action_dim, processing)
