"""LeRobot's folders: config.json, weights, and statistics in the two processors or, until 2025, in the weights.

github.com/huggingface/lerobot: src/lerobot/policies/diffusion, src/lerobot/processor/normalize_processor.py. The
first half is what all of its policies have in common, the second half its Diffusion Policy.
"""
import re

import numpy as np

from .downloads import Release
from .errors import UserError, few, hint, one_line
from .normalizer import Normalizer
from .weight_files import read_safetensors

# LeRobot's names of normalisations -> ours, and the two statistics that each needs.
MODES = {"MEAN_STD": ("meanstd", "mean", "std"), "MIN_MAX": ("minmax", "min", "max"),
         "QUANTILES": ("quantile", "q01", "q99"), "QUANTILE10": ("quantile", "q10", "q90"),
         "IDENTITY": ("none",)}
EPS = 1e-8
# Statistics among the weights of early files; the name of a feature has _ for each of its points.
BUFFER = re.compile(r"(?:normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_(.+)\.(\w+)")
# Steps of the processors that change no number here: batches and devices are made elsewhere.
PLAIN_STEPS = ("rename_observations_processor", "to_batch_processor", "device_processor", "normalizer_processor",
               "unnormalizer_processor")


def features(config):
    """config.json -> ({input: (type, shape)}, {output: (type, shape)}), in its order. The first files (2024)
    had input_shapes."""
    if "input_shapes" in config:
        kind = lambda name: "VISUAL" if "image" in name else "ENV" if "environment" in name else "STATE"
        named = [{name: (kind(name), shape) for name, shape in config.get(key, {}).items()}
                 for key in ("input_shapes", "output_shapes")]
    else:
        try:
            named = [{name: (one["type"], one["shape"]) for name, one in config[key].items()}
                     for key in ("input_features", "output_features")]
        except (KeyError, TypeError, AttributeError):
            raise UserError("config.json names no input_features and output_features with type and shape"
                            ) from None
    for name, (kind, shape) in [*named[0].items(), *named[1].items()]:
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape) or not shape:
            raise UserError(f"config.json: the shape of {one_line(name, 60)} is {one_line(repr(shape), 40)}")
    return named


def steps_of(download, name):
    """The steps of a processor's JSON -> [(name, config, state {key: tensor})]; [] where there is no file."""
    found = []
    steps = download.json(name).get("steps", [])
    for step in steps if isinstance(steps, list) else []:
        kind = str(step.get("registry_name") or step.get("class", "")).rpartition(".")[2]
        state, file = {}, step.get("state_file")
        if file:
            path = download.folder / str(file)
            if path.parent != download.folder or not path.is_file():
                raise UserError(f"{name} names {one_line(file, 80)}, which is not in {download.folder}: download "
                                f"the whole folder")
            state = read_safetensors(path)
        found.append((kind, step.get("config") or {}, state))
    return found


def statistics(download, weights):
    """{feature: (mode, {statistic: array})} of inputs and outputs, by the two processors; of early files by the
    buffers among the weights, which are taken out of `weights`. Raises UserError for what is missing."""
    config = download.config
    inputs, outputs = features(config)
    kinds = {name: kind for name, (kind, _) in (inputs | outputs).items()}
    buffers = {}
    for key in [key for key in weights if BUFFER.fullmatch(key)]:
        name, statistic = BUFFER.fullmatch(key).groups()
        buffers.setdefault(name, {})[statistic] = weights.pop(key).numpy()
    found = {}
    for name, kind in kinds.items():
        processor = "policy_postprocessor.json" if name in outputs else "policy_preprocessor.json"
        normalizers = [(c, state) for step, c, state in steps_of(download, processor)
                       if step in ("normalizer_processor", "unnormalizer_processor")]
        if normalizers:
            settings, state = normalizers[0]
            only = settings.get("normalize_observation_keys")
            mode = settings.get("norm_map", {}).get(kind, "IDENTITY")
            mode = "IDENTITY" if only is not None and name in inputs and name not in only else mode
            has = {key.rpartition(".")[2]: x.numpy() for key, x in state.items()
                   if key.rpartition(".")[0] == name}
        else:
            early = config.get("input_normalization_modes", {}) | config.get("output_normalization_modes", {})
            mode = early.get(name, config.get("normalization_mapping", {}).get(kind, "IDENTITY")).upper()
            has = buffers.get(name.replace(".", "_"), {})
        if mode not in MODES:
            raise UserError(f"{processor}: the normalisation {one_line(mode, 40)} of {name}{hint(mode, MODES)}")
        missing = [statistic for statistic in MODES[mode][1:] if statistic not in has]
        if missing:
            raise UserError(f"{download.name} lacks the statistics {few(missing)} of {name}, which it normalises by "
                            f"{mode}: download {processor} with its files, or early weights with theirs")
        found[name] = (mode, has)
    return found


def check_length(name, found, dim):
    mode, has = found
    for statistic in MODES[mode][1:]:
        if has[statistic].size != dim:
            raise UserError(f"the statistics of {name} have {has[statistic].size} numbers of '{statistic}', config.json "
                            f"gives it {dim}")


def normalizer(stats, state_keys, action="action"):
    """Normalizer of "actions" and "state" (these features one after the other) from `statistics`."""
    modes, values, eps = {}, {}, {}
    for key, names in (("actions", {action: stats[action][1].get("mean", stats[action][1].get("min"))}),
                       ("state", state_keys)):
        modes[key], parts = [], []
        for name, dim in names.items():
            dim = dim if isinstance(dim, int) else dim.size
            mode, has = stats[name]
            check_length(name, stats[name], dim)
            ours, *pair = MODES[mode]
            modes[key] += [ours] * dim
            part = {statistic: has[statistic].reshape(-1) for statistic in has if has[statistic].size == dim}
            # The tenth and ninetieth percentile scale as the first and last one do.
            parts.append(part | ({"q01": part["q10"], "q99": part["q90"]} if "q10" in pair else {}))
        common = [name for name in ("mean", "std", "min", "max", "q01", "q99")]
        values[key] = {name: np.concatenate([part.get(name, np.full(dim, np.nan)) for part, dim in zip(
            parts, [len(next(iter(part.values()), ())) for part in parts])]) if parts else np.zeros(0)
            for name in common}
        eps[key] = EPS if set(modes[key]) == {"meanstd"} else 0.0
    return Normalizer.from_stats(modes, values, eps, floor=EPS)
