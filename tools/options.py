"""Flags and YAML -> options and a model's Config.

Whatever a user can get wrong ends here as a UserError: one line that says what, where and how to mend it.
"""
import argparse
import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from robot.errors import UserError, hint, nearest
from robot.models import MODELS, model_config, typed


@dataclass
class Options:
    """Every flag; a YAML file given with --config may hold any of them, and flags win over it. A model
    file's RECIPES hold the values that suit its presets, and are overridden by both."""

    # which file: one of MODELS
    model: str = ""
    # a name in the file's PRESETS
    preset: str = "tiny"
    # YAML file with any of these options
    config: str = ""
    # tabletop | HDF5 file, folder or glob | moons, checkerboard, ..., shapes | images as .npz
    data: str = ""
    # where the run goes; default out/<model>
    out: str = ""
    # optimiser steps
    steps: int = 5000
    # items per step and process
    batch_size: int = 128
    # batches whose gradients are added up before a step
    grad_accum: int = 1
    # peak learning rate
    lr: float = 1e-3
    # cosine | linear | constant | pi0, after a linear warm-up
    lr_schedule: str = "cosine"
    # optimiser steps of warm-up
    warmup: int = 200
    # AdamW's weight decay, on the groups that the model decays
    weight_decay: float = 1e-6
    # AdamW's betas
    betas: tuple = (0.95, 0.999)
    # largest gradient norm; 0 = no clipping
    clip: float = 0.0
    # EMA: decay = 1 - (1 + step)^-ema_power, at most ema_max
    ema_power: float = 0.75
    # ... and its largest value
    ema_max: float = 0.9999
    # seed of everything random
    seed: int = 0
    # generated episodes to train on, for --data tabletop (0: demos/dataset.py's default) and the 2-D sets
    demos: int = 0
    # demonstrations to train on at most, 0 = all
    max_train_episodes: int = 0
    # share of the episodes held out for validation, where the file does not say itself; 0 = as the file says
    val_ratio: float = 0.0
    # minmax | meanstd | quantile | maxabs
    normalizer: str = "minmax"
    # gigabytes of memory for images; what takes more stays in the files
    memory_gb: float = 4.0
    # worker processes that read files (sets that fit into memory need none)
    workers: int = 0
    # a logged line every N steps
    log_every: int = 50
    # validation loss and error of sampled actions every N steps; 0 = at the end only
    eval_every: int = 1000
    # closed-loop success every N steps; 0 = at the end only
    rollout_every: int = 0
    # closed-loop episodes at the end; 0 = none
    episodes: int = 100
    # checkpoint every N steps
    checkpoint_every: int = 1000
    # auto | cpu | cuda | mps
    device: str = "auto"
    # auto (bfloat16 on CUDA, float32 elsewhere) | float32 | bfloat16
    dtype: str = "auto"
    # compile the training step with torch.compile
    compile: bool = False
    # show what one batch meets inside the model file, and train nothing
    explain: bool = False
    # several GPUs: share out weights, gradients, average and optimiser (FSDP2), for the largest presets
    fsdp: bool = False
    # go on with the run in --out
    resume: bool = False
    # keep every N-th checkpoint as checkpoint_<step>.pt; 0 = the newest only
    keep_every: int = 0
    # keep the checkpoint with the lowest held-out loss as checkpoint_best.pt
    keep_best: bool = False
    # weights to start from: a run of one's own (its folder), or .safetensors or state_dict of a release
    init: str = ""
    # with --init: weights whose names begin so start fresh, for example a new head; several with commas
    fresh: str = ""
    # fields of the model's Config
    set: dict = field(default_factory=dict)
    # observation and action keys of the data, as in Diffusion Policy's YAML (YAML only)
    shape_meta: dict = field(default_factory=dict)
    # labels of a step that the loss reads beside the actions: {name in the file: dimensions} (YAML only)
    extra: dict = field(default_factory=dict)
    # several robots in one run: {name: {data, action_names, state_names}}, for rdt (YAML only)
    robots: dict = field(default_factory=dict)
    # environment of the closed loop: {id, kwargs, obs, ...}, see robot/environments.py (YAML only)
    env: dict = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------
# From flags and YAML to a Config: every mistake becomes one line


def parse_set(items):
    """["depth=8", "n_heads=4"] -> {"depth": 8, "n_heads": 4}; values are read as YAML."""
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: write it as FIELD=VALUE, for example --set horizon=16")
        try:
            pairs[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {item}: {text!r} is not a YAML value") from None
    return pairs


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose mistakes are UserErrors that name the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [name.lstrip("-") for action in self._actions for name in action.option_strings]
            name = unknown[0].split("=")[0]
            guess = nearest(name.lstrip("-"), flags)
            raise UserError(f"unknown argument {name}{guess}; see {self.prog} --help")
        return args


def parse_options(argv):
    """Flags and YAML -> Options, and the names of those that were given in either."""
    parser = Parser(description=f"Train one model file of: {', '.join(MODELS)}")
    # The comment above a field is its help.
    comments = {name: text for text, name in re.findall(r"# (.*)\n    (\w+):", inspect.getsource(Options))}
    for name, default in vars(Options()).items():
        kind = {"help": f"{comments[name]} (default: {default})".replace("%", "%%"), "default": None}
        if name == "set":
            parser.add_argument("--set", action="append", metavar="FIELD=VALUE", **kind)
        elif isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", **kind)
        elif isinstance(default, tuple):
            parser.add_argument(f"--{name}", type=type(default[0]), nargs=len(default), **kind)
        elif not isinstance(default, dict):
            parser.add_argument(f"--{name}", type=type(default), metavar=type(default).__name__, **kind)
    flags = {k: v for k, v in vars(parser.parse(argv)).items() if v is not None}
    flags_set = parse_set(flags.pop("set", []))
    defaults = vars(Options())
    flags = {name: typed(name, value, defaults[name], f"--{name}") for name, value in flags.items()}
    chosen = read_yaml(flags["config"]) if "config" in flags else {}
    chosen_set = chosen.pop("set", {}) | flags_set
    options = Options(**chosen | flags | {"set": chosen_set})
    check_options(options)
    return options, set(chosen) | set(flags)


def check_options(options):
    """Numbers that no run can use."""
    for name, least in {"steps": 0, "batch_size": 1, "grad_accum": 1, "log_every": 1, "checkpoint_every": 1,
                        "warmup": 0, "workers": 0, "episodes": 0, "eval_every": 0, "rollout_every": 0,
                        "clip": 0, "seed": 0, "lr": 0, "weight_decay": 0, "demos": 0, "keep_every": 0,
                        "ema_power": 0, "memory_gb": 0, "ema_max": 0, "max_train_episodes": 0}.items():
        value = getattr(options, name)
        if not value >= least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if len(options.betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in options.betas):
        raise UserError(f"--betas {options.betas} must be two numbers of at least 0 and below 1")
    if options.ema_max > 1:
        raise UserError(f"--ema_max {options.ema_max} is a share: at most 1")
    if options.fresh and not options.init:
        raise UserError("--fresh says which weights of --init are not taken: add --init")
    schedules = ("cosine", "linear", "constant", "pi0")
    if options.lr_schedule not in schedules:
        raise UserError(f"--lr_schedule {options.lr_schedule!r} is unknown"
                        f"{hint(options.lr_schedule, schedules)}")


def read_yaml(path):
    """{option: value} of a YAML file, types checked."""
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as e:
        raise UserError(f"--config {path}: {e.strerror or e}; give a YAML file, configs/ has some") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no KEY: VALUE lines; see configs/ for examples")
    defaults = vars(Options())
    for key in content:
        if key not in defaults:
            raise UserError(f"--config {path}: unknown key {key!r}{hint(key, defaults)}")
    return {key: typed(key, value, defaults[key], f"--config {path}") for key, value in content.items()}


def with_recipe(options, explicit, module):
    """Options that were not given take the value which the model file recommends for the preset."""
    recipe = getattr(module, "RECIPES", {}).get(options.preset, {})
    return dataclasses.replace(options, **{k: v for k, v in recipe.items() if k not in explicit})


def make_config(module, options, facts):
    """The model's Config: preset, then facts of the data, then --set. `facts` {field: value} are used
    where the Config has such a field, and --set may not contradict them."""
    if options.preset not in module.PRESETS:
        raise UserError(f"--preset {options.preset!r} is not in {module.__name__}.py"
                        f"{hint(options.preset, module.PRESETS)}")
    names = {f.name for f in dataclasses.fields(module.Config)}
    facts = {k: v for k, v in facts.items() if k in names}
    for key, fact in facts.items():  # n_classes = 0 means: do not look at the labels
        value = options.set.get(key, fact)
        value = tuple(value) if isinstance(value, list) else value
        if value != fact and (key, value) != ("n_classes", 0):
            raise UserError(f"--set {key}={value}: the data decide this, it is {fact}; leave it out")
    return model_config(module, module.PRESETS[options.preset] | facts | options.set, "--set")
