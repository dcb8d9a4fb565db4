"""A model file by its name, its Config from plain values, and the device it runs on."""
import contextlib
import dataclasses
import functools
import importlib
import math
from pathlib import Path

import torch

from .cli import environ_number
from .errors import UserError, hint, one_line, say_once

MODELS = ("ddpm", "flow_matching", "dp_cnn", "dp_transformer", "dit", "dit_policy", "rdt", "pi0", "pi05")
# Fields of the Configs that may be changed after training; the others decide what the weights are.
SAMPLER_FIELDS = ("sampler", "sampler_steps", "spacing", "eta", "clip_x0", "solver", "tolerance", "guidance",
                  "guidance_channels")


def load_module(name):
    """The model file `name`, which stands beside this folder, whatever the folder is called."""
    if not name:
        raise UserError(f"--model is needed: one of {', '.join(MODELS)}")
    if name not in MODELS:
        raise UserError(f"--model {name!r} is not a model file{hint(name, MODELS)}")
    beside = __package__.rpartition(".")[0]  # "" unless the folder was put into somebody's package
    path = f"{beside}.{name}" if beside else name
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as e:
        if e.name != path:
            raise
        raise UserError(f"there is no {name}.py beside the folder {__package__}: copy it there") from None


def typed(name, value, like, where):
    """`value` as the type of the default `like`: lists become tuples, whole numbers may stand for floats. The
    elements of a tuple are checked as well. Numbers are finite, and whole ones fit into 64 bits."""
    shown = f"{where}: {name} = {one_line(repr(value), 60)}"
    if isinstance(like, tuple) and isinstance(value, (list, tuple)):
        element = (like or value or (0,))[0]  # an empty default does not say: then all are like the first
        if not isinstance(element, (int, float, str)):
            raise UserError(f"{shown} should hold numbers or names, not {type(element).__name__}")
        return tuple(typed(name, x, element, where) for x in value)
    if isinstance(like, float) and isinstance(value, str):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(like, float) and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not type(like):
        raise UserError(f"{shown} should be {type(like).__name__}, for example {like!r}")
    if isinstance(value, float) and not math.isfinite(value) or type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{shown} is not finite or too large, for example {like!r}")
    return value


def model_config(module, values, where):
    """Config from {field: value}; `where` says in an error where the values come from."""
    defaults = {f.name: f.default for f in dataclasses.fields(module.Config)}
    for key in values:
        if key not in defaults:
            raise UserError(f"{where}: {module.__name__}.Config has no field {key!r}{hint(key, defaults)}")
        if key.endswith(("depth", "blocks")) and type(values[key]) is int and values[key] > 1000:
            raise UserError(f"{where}: {key} = {values[key]}: no network here has more than 1000 layers")
    try:
        return module.Config(**{k: typed(k, v, defaults[k], where) for k, v in values.items()})
    except ValueError as e:
        raise UserError(f"{module.__name__}: {e}") from None


def sampler_config(module, config, changes):
    """The Config of a trained model with some of its sampler's fields changed, for --set."""
    known = [f.name for f in dataclasses.fields(module.Config) if f.name in SAMPLER_FIELDS]
    for key in changes:
        if key not in known:
            raise UserError(f"--set {key}: only the sampler of a trained {module.__name__} can be changed"
                            f"{hint(key, known)}")
    return model_config(module, config | changes, "--set")


@functools.cache
def cpu_has_bfloat16():
    """Whether this CPU multiplies in bfloat16 (AVX512_BF16, AMX or ARM's BF16); None where no Linux says so.
    Others take longer than in float32, without AVX-512 fifty times as long."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def pick_device(name, dtype):
    """Names as flags have them ("auto", "cpu", "cuda", "cuda:1", "mps"; "auto", "float32", "bfloat16") ->
    (device, dtype)"""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name, _, index = name.partition(":")
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if available[d])
    if name not in available:
        raise UserError(f"--device {name!r} is not known{hint(name, ['auto', *available])}")
    if not available[name]:
        raise UserError(f"--device {name}: torch {torch.__version__} finds none; use --device cpu or auto")
    dtypes = {"auto": torch.bfloat16 if name == "cuda" else torch.float32, "float32": torch.float32,
              "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"--dtype {dtype!r} is not known{hint(dtype, dtypes)}")
    local, count = environ_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if index and name != "cuda":
        raise UserError(f"--device {name}:{index}: only cuda has numbers")
    index = index or str(local)
    if name == "cuda" and not (index.isascii() and index.isdigit() and int(index[:9]) < count):
        raise UserError(f"--device cuda:{index}: there are {count} GPUs, from cuda:0 on")
    if name == "cpu" and dtype == "bfloat16" and cpu_has_bfloat16() is False:
        say_once("--dtype bfloat16: this CPU has no instructions for it, float32 may be much faster")
    return torch.device(name, int(index)) if name == "cuda" else torch.device(name), dtypes[dtype]
