"""LeRobot's folders: config.json, and statistics in the two processors or, until 2025, among the weights.

github.com/huggingface/lerobot, src/lerobot/processor/normalize_processor.py: what all of its policies have in
common. Its Diffusion Policy is in released_dp.py.
"""
import re

import torch

from .errors import UserError, few, hint, one_line
from .normalizer import Normalizer, filled
from .weight_files import read_safetensors

# LeRobot's names of normalisations -> ours, and the two statistics that each needs. The tenth and the
# ninetieth percentile scale as the first and the last one do.
MODES = {"MEAN_STD": ("meanstd", "mean", "std"), "MIN_MAX": ("minmax", "min", "max"),
         "QUANTILES": ("quantile", "q01", "q99"), "QUANTILE10": ("quantile", "q10", "q90"),
         "IDENTITY": ("none",)}
EPS = 1e-8
# Statistics among the weights of early files; the name of a feature has _ for each of its points.
BUFFER = re.compile(r"(?:normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_(.+)\.(\w+)")
NORMALIZERS = ("normalizer_processor", "unnormalizer_processor")


def features(config):
    """config.json -> ({input: (type, shape)}, {output: (type, shape)}), in its order. The files of 2024 have
    input_shapes. Raises UserError."""
    if "input_shapes" in config:
        kind = lambda name: next((kind for word, kind in (("image", "VISUAL"), ("environment", "ENV"),
                                                          ("action", "ACTION")) if word in name), "STATE")
        named = [{name: (kind(name), shape) for name, shape in (config.get(key) or {}).items()}
                 for key in ("input_shapes", "output_shapes")]
    else:
        try:
            named = [{name: (one["type"], one["shape"]) for name, one in config[key].items()}
                     for key in ("input_features", "output_features")]
        except (KeyError, TypeError, AttributeError):
            raise UserError("config.json names no input_features and output_features with type and shape"
                            ) from None
    for name, (_, shape) in (named[0] | named[1]).items():
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise UserError(f"config.json: the shape of {one_line(name, 60)} is {one_line(repr(shape), 40)}")
    return named


def recipe_of(config):
    """How config.json says that the policy was trained, as options of train.py."""
    names = {"lr": "optimizer_lr", "weight_decay": "optimizer_weight_decay",
             "warmup": "scheduler_warmup_steps"}
    recipe = {ours: config[name] for ours, name in names.items()
              if isinstance(config.get(name), (int, float))}
    betas = config.get("optimizer_betas")
    return recipe | ({"betas": tuple(betas)} if isinstance(betas, list) else {})


def known_steps(download, known):
    """{step: its options} of the two processors, {} for a step that is not there. Raises UserError for a step
    that is not in `known`: left out, it would change what the policy sees or does."""
    found = dict.fromkeys(known, {})
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        for name, options, _ in steps_of(download, file):
            if name not in known:
                raise UserError(f"{download.name}: {file} has a step {one_line(name, 60)!r}, which is not "
                                f"done here{hint(name, known)}")
            found[name] = options
    return found


def renames_of(download, steps):
    """{feature: what the robot calls it}, from the rename_map of `known_steps`. Raises UserError."""
    renames = steps["rename_observations_processor"].get("rename_map") or {}
    if not isinstance(renames, dict) or not all(isinstance(name, str) for name in renames.values()):
        raise UserError(f"{download.name}: rename_map is {one_line(renames, 60)}, no names of observations")
    return {feature: robots for robots, feature in renames.items()}


def steps_of(download, name):
    """The steps of a processor's JSON -> [(name, config, state {key: tensor})]; [] where there is no file."""
    found = []
    for step in download.json(name).get("steps", []):
        kind = str(step.get("registry_name") or step.get("class", "")).rpartition(".")[2]
        state, file = {}, step.get("state_file")
        if file:
            path = download.folder / str(file)
            if path.parent != download.folder or not path.is_file():
                raise UserError(f"{name} names {one_line(file, 80)}, which is not in {download.folder}: "
                                f"download the whole folder")
            state = read_safetensors(path)
        found.append((kind, step.get("config") or {}, state))
    return found


def statistics(download, weights):
    """{feature: (mode, {statistic: (dim,) float64})} of inputs and outputs: by the two processors, or of
    early files by the buffers among the weights, which are taken out of `weights`. Raises UserError for what
    is missing or has another length."""
    inputs, outputs = features(download.config)
    buffers, found = take_buffers(weights), {}
    for name, (kind, shape) in (inputs | outputs).items():
        file = "policy_postprocessor.json" if name in outputs else "policy_preprocessor.json"
        normalizers = [(settings, state) for step, settings, state in steps_of(download, file)
                       if step in NORMALIZERS]
        if normalizers:
            mode, has = of_processor(*normalizers[0], name, kind)
        else:
            mode = early_mode(download.config, name, kind)
            has = buffers.get(name.replace(".", "_"), {})
        if mode not in MODES:
            raise UserError(f"the normalisation {one_line(mode, 40)} of {name}{hint(mode, MODES)}")
        missing = [statistic for statistic in MODES[mode][1:] if statistic not in has]
        if missing:
            raise UserError(f"{download.name} lacks the statistics {few(missing)} of {name}, which it scales "
                            f"by {mode}: {file} and the file it names should be in the folder")
        dim = shape[0]
        wrong = [s for s in MODES[mode][1:] if has[s].numel() != dim]
        if wrong:
            raise UserError(f"the statistics of {name} have {has[wrong[0]].numel()} numbers of {wrong[0]}, "
                            f"it has {dim} in config.json")
        found[name] = mode, {s: x.double().flatten() for s, x in has.items() if x.numel() == dim}
    return found


def of_processor(settings, state, name, kind):
    """Mode and statistics of a feature by a normalizer_processor."""
    if settings.get("eps", EPS) != EPS:
        raise UserError(f"the normaliser of {name} adds eps = {settings['eps']!r}, here it is {EPS}")
    only = settings.get("normalize_observation_keys")
    left_out = only is not None and kind != "ACTION" and name not in only
    mode = "IDENTITY" if left_out else str(settings.get("norm_map", {}).get(kind, "IDENTITY"))
    return mode, {key[len(name) + 1:]: x for key, x in state.items() if key.rpartition(".")[0] == name}


def early_mode(config, name, kind):
    """Mode of a feature by config.json: files of early 2025 say it by the kind of feature, those of 2024 by
    its name."""
    by_name = {**config.get("input_normalization_modes", {}), **config.get("output_normalization_modes", {})}
    return str(by_name.get(name) or config.get("normalization_mapping", {}).get(kind, "IDENTITY")).upper()


def take_buffers(weights):
    """{feature with _: {statistic: tensor}}, removed from `weights`."""
    found = {}
    for key in [key for key in weights if BUFFER.fullmatch(key)]:
        name, statistic = BUFFER.fullmatch(key).groups()
        found.setdefault(name, {})[statistic] = weights.pop(key)
    return found


def scale_of(stats, name):
    """(centre, width) of a feature, (dim,) each, normalised as (x - centre) / width; None if it is not. For
    pictures, whose scale is in the model's Config."""
    mode, has = stats[name]
    kind, *pair = MODES[mode]
    if kind == "none":
        return None
    first, second = (has[statistic] for statistic in pair)
    if kind == "meanstd":
        return first, second + EPS
    width = torch.where(second == first, EPS, second - first)
    return first + width / 2, width / 2


def normalizer(stats, keys):
    """Normalizer from `statistics`. keys: {"actions": {feature: dim}, "state": {feature: dim, ...}}; the
    features of a key stand side by side."""
    modes, values, eps = {}, {}, {}
    for key, names in keys.items():
        modes[key], parts = [], []
        for name, dim in names.items():
            mode, has = stats[name]
            ours, *pair = MODES[mode]
            modes[key] += [ours] * dim
            usual = {s: torch.zeros(dim) for s in ("min", "max", "mean", "std")} if mode == "IDENTITY" else {}
            has = usual | has | (dict(q01=has["q10"], q99=has["q90"]) if "q10" in pair else {})
            has |= filled(has)
            parts.append({"q01": has["min"], "q99": has["max"]} | has)   # only so that all have the same
        values[key] = {s: torch.cat([part[s] for part in parts]) if parts else torch.zeros(0)
                       for s in ("min", "max", "mean", "std", "q01", "q99")}
        # LeRobot adds it to deviations, on the way in; to ranges that are 0, both ways.
        eps[key] = EPS if set(modes[key]) == {"meanstd"} else 0.0
    return Normalizer.from_stats(modes, values, eps, floor=EPS)
