"""RDT's release: the diffusion transformer, SigLIP and T5, each in a folder of its own.

    --init rdt-1b                                      with siglip/ and t5/ in it, or without
    --init rdt-1b,siglip-so400m-patch14-384            ... or named beside it

github.com/thu-ml/RoboticsDiffusionTransformer: configs/base.yaml, models/rdt_runner.py and, in scripts/,
agilex_model.py and agilex_inference.py. Sizes are those of the tensors; config.json tells what these do not
say. Without SigLIP the model takes pictures as tokens, without T5 instructions (`python -m tools.embed`).
"""
import math
import re

import numpy as np

from .downloads import Part, Release, describe
from .errors import UserError, hint, one_line
from .models import load_module
from .normalizer import Normalizer
from .weight_files import read_json, read_weights

# The robot of the released fine-tuning code: both arms of ALOHA. Angles stay in rad; grippers become 0 .. 1,
# by other factors in the state than in an action (scripts/agilex_model.py, data/hdf5_vla_dataset.py).
GRIPPERS, STATE_GRIPPERS, ACTION_GRIPPERS = [6, 13], (4.7908, 4.7888), (11.8997, 13.9231)
ALOHA = {
    "obs": {"qpos": [{"linear": {"at": GRIPPERS, "factor": [1 / x for x in STATE_GRIPPERS]}}]},
    "actions": [{"linear": {"at": GRIPPERS, "factor": [1 / x for x in ACTION_GRIPPERS]}}],
    "images": {"fit": "square", "filter": "bicubic", "fill": 127, "jpeg": True},
    "cameras": {"external": "cam_high", "right_wrist": "cam_right_wrist", "left_wrist": "cam_left_wrist"},
}
# Fields of the Config that follow from the robot, not from the weights.
ROBOT = ("action_names", "state_names", "action_dim", "state_dim", "n_cameras", "image_size")
ALOHA_HZ = 25.0                 # configs/dataset_control_freq.json, scripts/agilex_inference.py


def read_rdt(download, model, hints):
    """A reader of released.READERS. hints: siglip, t5: folders; cameras {place: key of the observation}."""
    own = next((part for part in download.parts if "img_adaptor.0.weight" in part.weights), None)
    if own is None or model not in (None, "rdt"):
        return None
    rdt = load_module("rdt")
    config, notes = own_config(own), list(download.notes)
    if not own.config:
        notes.append("there is no config.json: two observed steps of three cameras are assumed, as released")
    weights = dict(own.weights)
    encoders = {kind: encoder_part(kind, download, own, hints) for kind in ("siglip", "t5")}
    for kind, sizes in (("siglip", siglip_sizes), ("t5", t5_sizes)):
        if part := encoders[kind]:
            found, width = sizes(part), {"siglip": "vit_width", "t5": "t5_width"}[kind]
            if found[width] != config[width]:
                raise UserError(f"{part.path} makes tokens {found[width]} wide, {own.path} takes "
                                f"{config[width]}")
            if encoders["siglip"]:
                config, weights = config | found, weights | part.weights
            else:
                notes.append(f"{part.path} is not used without SigLIP")
    config["encoders"] = "frozen" if all(encoders.values()) else "images" if encoders["siglip"] else "none"
    size = config.get("vit_size", 384)
    cameras = camera_places(hints.get("cameras") or ALOHA["cameras"], rdt)
    description = describe(download.name, {"qpos": 14}, [key for key in cameras.values() if key],
                           [size, size], 14, ALOHA | {"cameras": cameras})
    description |= {"fps": ALOHA_HZ, "action_names": list(rdt.ALOHA)}
    units = Normalizer.of_units({"actions": 14, "state": 14})
    recipe = {"ema_max": 0.9999, "dtype": "auto"} | rdt.FINE_TUNING     # nothing of the recipe of "tiny"
    return Release("rdt", config, weights, units, description, notes, recipe=recipe, free=ROBOT)


def camera_places(cameras, rdt):
    """{place: camera key or None} in the order of the network; places that are not named are empty. Raises
    UserError for a place that the released weights do not have."""
    for place in cameras:
        if place not in rdt.CAMERA_PLACES:
            raise UserError(f"processing: cameras: rdt has no place {one_line(repr(place), 60)}"
                            f"{hint(place, rdt.CAMERA_PLACES)}")
    return {place: cameras.get(place) for place in rdt.CAMERA_PLACES}


# ----------------------------------------------------------------------------------------------------------
# Sizes


def own_config(part):
    """Config fields of RDTRunner's weights."""
    has = {key: tuple(x.shape) for key, x in part.weights.items()}
    told = settings(part)
    try:
        width, head = has["model.x_pos_embed"][2], has["model.blocks.0.attn.q_norm.weight"][0]
        tokens = has["model.img_cond_pos_embed"][1]
        config = {
            "width": width, "n_heads": width // head, "horizon": has["model.x_pos_embed"][1] - 3,
            "depth": 1 + max(int(m[1]) for key in has if (m := re.match(r"model\.blocks\.(\d+)\.", key))),
            "unified_dim": has["model.final_layer.ffn_final.fc2.weight"][0],
            "text_len": has["model.lang_cond_pos_embed"][1], "t5_width": has["lang_adaptor.0.weight"][1],
            "vit_width": has["img_adaptor.0.weight"][1]}
    except (KeyError, IndexError, ValueError) as e:
        raise UserError(f"{part.path} lacks weights of RDTRunner or they have other shapes: {one_line(e, 80)}"
                        ) from None
    steps, cameras = told["grid"]
    if tokens % (steps * cameras):
        raise UserError(f"{part.path} has {tokens} image tokens, which {steps} steps of {cameras} cameras do "
                        f"not share evenly")
    return load_module("rdt").RELEASED | config | {
        "n_action_steps": config["horizon"], "n_obs_steps": steps, "n_cameras": cameras,
        "max_cameras": cameras, "image_tokens": tokens // (steps * cameras),
        "n_diffusion_steps": told["n_diffusion_steps"], "sampler_steps": told["sampler_steps"]}


def settings(part):
    """What the weights do not say: steps and cameras, times. config.json holds base.yaml, or what the hub's
    mixin writes of RDTRunner's arguments."""
    told = part.config
    groups = [told, *(told[key] for key in ("model", "common", "config") if isinstance(told.get(key), dict))]
    find = lambda key, default: next((group[key] for group in groups if key in group), default)
    if told and not isinstance(find("rdt", None), dict):
        raise UserError(f"{part.folder}/config.json describes another policy: it has no 'rdt'")
    scheduler = find("noise_scheduler", {})
    for key, want in (("prediction_type", "sample"), ("beta_schedule", "squaredcos_cap_v2"),
                      ("clip_sample", False)):
        demand(part, key, scheduler.get(key, want), want)
    for key, want in (("lang_adaptor", "mlp2x_gelu"), ("img_adaptor", "mlp2x_gelu"),
                      ("state_adaptor", "mlp3x_gelu")):
        demand(part, key, find(key, want), want)
    grid = find("img_history_size", 2), find("num_cameras", 3)
    embed = find("img_pos_embed_config", None)
    try:
        grid = tuple(embed[0][1][:2]) if embed else grid
        numbers = [*grid, scheduler.get("num_train_timesteps", 1000),
                   scheduler.get("num_inference_timesteps", 5)]
        if len(grid) != 2 or not all(type(n) is int and n > 0 for n in numbers):
            raise TypeError
    except (TypeError, IndexError, KeyError):
        raise UserError(f"{part.folder}/config.json: img_pos_embed_config, img_history_size, num_cameras or "
                        f"the scheduler's steps are no counts") from None
    return {"grid": grid, "n_diffusion_steps": numbers[2], "sampler_steps": numbers[3]}


def encoder_part(kind, download, own, hints):
    """SigLIP or T5 among the parts, in a folder that a hint names, or in one within the release. None if
    there is none."""
    mark = MARKS[kind]
    for part in download.parts:
        if part is not own and mark in part.weights:
            return part
    folder = hints.get(kind) or (own.folder / kind if (own.folder / kind).is_dir() else None)
    return open_encoder(kind, folder) if folder else None


def open_encoder(kind, folder):
    """kind: "siglip" or "t5"; folder: as transformers writes it, a pathlib.Path -> Part. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder with {kind}'s config.json and weights")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, which says what {kind}'s weights are: download the "
                        f"whole folder")
    weights, _ = read_weights(folder)
    if MARKS[kind] not in weights:
        raise UserError(f"{folder} holds no weights of {NAMES[kind]}")
    return Part(folder, folder, read_json(folder / "config.json"), weights)


MARKS = {"siglip": "vision_model.embeddings.patch_embedding.weight",
         "t5": "encoder.block.0.layer.0.SelfAttention.q.weight"}
NAMES = {"siglip": "SigLIP's vision tower", "t5": "T5's encoder"}


def whole(part, config, key, default=None):
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{part.folder}/config.json: {key} is {one_line(repr(value), 40)}, a count is needed")
    return value


def demand(part, key, value, want):
    if value != want:
        raise UserError(f"{part.folder}/config.json: {key} {one_line(repr(value), 40)} is not {want!r}, the "
                        f"only one that rdt.py has")


def siglip_sizes(part):
    """Config fields of SiglipVisionModel, alone or in SiglipModel."""
    config = part.config.get("vision_config", part.config)
    for key, want in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-6)):
        demand(part, key, config.get(key, want), want)
    has = lambda key: tuple(part.weights[f"vision_model.{key}"].shape)
    width, _, patch, _ = has("embeddings.patch_embedding.weight")
    patches, _ = has("embeddings.position_embedding.weight")
    depth = 1 + max(int(m[1]) for key in part.weights
                    if (m := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key)))
    size = whole(part, config, "image_size", 224)
    if (size // patch) ** 2 != patches:
        raise UserError(f"{part.folder}: config.json says pictures of {size} in patches of {patch}, the "
                        f"weights have {patches} patches")
    return {"vit_size": size, "patch_size": patch, "vit_width": width, "vit_depth": depth,
            "vit_mlp": has("encoder.layers.0.mlp.fc1.weight")[0], "image_tokens": patches,
            "vit_heads": whole(part, config, "num_attention_heads", 12)}


def t5_sizes(part):
    """Config fields of T5EncoderModel, of version 1.1."""
    config, folder = part.config, part.folder
    if config.get("feed_forward_proj", "relu") != "gated-gelu":
        raise UserError(f"{folder} is no T5 of version 1.1: feed_forward_proj is not 'gated-gelu'")
    embed = "shared.weight" if "shared.weight" in part.weights else "encoder.embed_tokens.weight"
    vocab, width = part.weights[embed].shape
    heads = whole(part, config, "num_heads", 8)
    sizes = {"vocab_size": vocab, "t5_width": width, "t5_heads": heads,
             "t5_depth": whole(part, config, "num_layers", 6), "t5_mlp": whole(part, config, "d_ff", 2048),
             "t5_head_dim": whole(part, config, "d_kv", 64),
             "t5_buckets": whole(part, config, "relative_attention_num_buckets", 32),
             "t5_distance": whole(part, config, "relative_attention_max_distance", 128)}
    if (folder / "spiece.model").is_file():
        sizes["tokenizer_path"] = str(folder / "spiece.model")
    else:
        raise UserError(f"{folder} has no spiece.model, T5's tokenizer: download it too (tokenizer.json is "
                        f"another form of it, which is not read)")
    return sizes


# ----------------------------------------------------------------------------------------------------------
# On the robot


def interpolate(previous, current, longest):
    """The commands that lead from the previous one to the current one in equal steps, none of which is longer
    than `longest` in any joint: (n, D), the last of them `current`. scripts/agilex_inference.py's
    interpolate_action: its robot gets these at 200 Hz.

    previous, current: (D,); longest: one number, (D,), or (D / 2,) for two equal arms; above 0.
    """
    previous, current = (np.asarray(x, np.float64) for x in (previous, current))
    longest = np.asarray(longest, np.float64)
    longest = np.tile(longest, 2) if longest.ndim and 2 * longest.size == current.size else longest
    if previous.shape != current.shape or current.ndim != 1 or longest.size not in (1, current.size) or \
            not (longest > 0).all():
        raise UserError(f"interpolate: commands {previous.shape} and {current.shape} with steps of "
                        f"{one_line(longest, 60)} do not fit together")
    steps = max(1, math.ceil((np.abs(current - previous) / longest).max()))
    return np.linspace(previous, current, steps + 1)[1:]
