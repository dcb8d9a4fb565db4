"""Flags and YAML -> options and a model's Config.

Whatever a user can get wrong ends here as a UserError: one line that says what, where and how to mend it.
"""
import dataclasses
import inspect
import math
import re
from dataclasses import dataclass, field

import yaml

from demos.keys import check_shape_meta
from robot.cli import SEEDS, Parser, check_ranges
from robot.environments import fields_of
from robot.errors import UserError, hint, input_text, one_line
from robot.models import MODELS, cpu_has_bfloat16, model_config, pick_device, typed
from robot.steps import check_keys


@dataclass
class Options:
    """Every flag, with its help as a comment. A YAML file given with --config may hold any of them, and flags
    win over it. A model file's RECIPES hold the values that suit its presets, and are overridden by both."""
    model: str = ""                 # which model file: dp_cnn, pi0, ...
    preset: str = "tiny"            # a name in the file's PRESETS
    config: str = ""                # YAML file with any of these options
    data: str = ""                  # tabletop | file, folder or glob | moons, shapes, ...: docs/data.md
    out: str = ""                   # where the run goes; default out/<model>
    steps: int = 5000               # optimiser steps
    batch_size: int = 128           # items per step and process
    grad_accum: int = 1             # batches whose gradients are added up before a step
    lr: float = 1e-3                # peak learning rate
    lr_schedule: str = "cosine"     # cosine | linear | constant | pi0, after a linear warm-up
    warmup: int = 200               # optimiser steps of warm-up
    weight_decay: float = 1e-6      # AdamW's weight decay, on the groups that the model decays
    betas: tuple = (0.95, 0.999)    # AdamW's betas
    clip: float = 0.0               # largest gradient norm; 0 = no clipping
    ema_power: float = 0.75         # EMA: decay = 1 - (1 + step)^-ema_power, at most ema_max
    ema_max: float = 0.9999         # EMA: largest decay
    seed: int = 0                   # seed of everything random
    demos: int = 0                  # rollouts generated for tabletop, or points of a 2-D set; 0 = its default
    max_train_episodes: int = 0     # training episodes at most; 0 = all
    val_ratio: float = 0.0          # share of the episodes held out; 0 = as the file says, else 0.05
    normalizer: str = "minmax"      # minmax | meanstd | quantile | maxabs | none | checkpoint (of --init)
    memory_gb: float = 4.0          # gigabytes of memory for images; what takes more stays in the files
    image_size: tuple = (0, 0)      # height and width that pictures are brought to; 0 0 = as they are
    colour: str = "bgr"             # of JPEG frames: bgr (ALOHA's and RDT's recorders) | rgb
    embeddings: str = ""            # folder of tools.embed: pictures and instructions as tokens, for rdt
    still: float = 0.0              # leave out steps before the first move of more than this; 0 = none
    shortest: int = 0               # leave out episodes of fewer steps (RDT: 128)
    workers: int = 0                # processes that read files (sets that fit into memory need none)
    log_every: int = 50             # a logged line every N steps
    eval_every: int = 1000          # held-out loss and error of sampled actions every N steps; 0 = at the end
    rollout_every: int = 0          # closed-loop success every N steps; 0 = at the end only
    episodes: int = 100             # closed-loop episodes at the end; 0 = none
    checkpoint_every: int = 1000    # checkpoint every N steps
    device: str = "auto"            # auto | cpu | cuda | mps
    dtype: str = "auto"             # auto (bfloat16 on CUDA, float32 elsewhere) | float32 | bfloat16
    compile: bool = False           # compile the training step with torch.compile
    explain: bool = False           # show what one batch meets inside the model file, and train nothing
    fsdp: bool = False              # several GPUs share weights, gradients, average and optimiser (FSDP2)
    resume: bool = False            # go on with the run in --out
    keep_every: int = 0             # keep every N-th checkpoint as checkpoint_<step>.pt; 0 = the newest only
    keep_best: bool = False         # keep the checkpoint with the lowest held-out loss, checkpoint_best.pt
    init: str = ""                  # weights to start from: a run, or what was downloaded (docs/weights.md)
    fresh: str = ""                 # with --init: weights that start fresh, by the beginning of their names
    set: dict = field(default_factory=dict)         # fields of the model's Config
    shape_meta: dict = field(default_factory=dict)  # keys of the data, as in Diffusion Policy (YAML only)
    extra: dict = field(default_factory=dict)       # labels per step: {name: dimensions} (YAML only)
    robot: str = ""                 # openpi's weights: whose statistics and units (robot/openpi_robots.py)
    robots: dict = field(default_factory=dict)      # several in one run, for rdt: docs/data.md (YAML only)
    processing: dict = field(default_factory=dict)  # between robot and network: docs/data.md (YAML only)
    env: dict = field(default_factory=dict)         # of the closed loop: docs/environments.md (YAML only)


# ----------------------------------------------------------------------------------------------------------
# From flags and YAML to a Config: every mistake becomes one line


class Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it safely, but a key that stands twice is a mistake: one value would be lost."""

    def construct_mapping(self, node, deep=False):
        # Looked at before PyYAML enters the keys of `<<: *other`, which those that are written win over.
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise yaml.YAMLError(f"a key stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_values(text, where):
    """YAML text -> plain values: numbers that fit into 64 bits, texts, lists, and dicts with names as keys.
    `where` begins the message of a UserError."""
    try:
        content = yaml.load(text, Loader)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply for options") from None
    except (yaml.YAMLError, ValueError, ArithmeticError) as e:  # ValueError: 5,000 digits, the 32nd of May
        raise UserError(f"{where} is not valid YAML: {one_line(e)}") from None
    left = [10_000]                 # a few lines of YAML can stand for as many values as one likes

    def check(value, depth):
        left[0] -= 1
        if depth > 12 or left[0] < 0:
            raise UserError(f"{where} is nested too deeply or too large for options")
        if type(value) is int and not -2**63 <= value < 2**63:
            raise UserError(f"{where}: a number of {value.bit_length()} bits is too large, 63 are allowed")
        if not isinstance(value, (bool, int, float, str, list, dict, type(None))):  # a date, for example
            raise UserError(f"{where}: {one_line(value, 60)} is neither number nor text: put it in quotes")
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {one_line(repr(key), 60)} is no name: put it in quotes")
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part, depth + 1)

    check(content, 0)
    return content


def parse_set(items):
    """["depth=8", "n_heads=4"] -> {"depth": 8, "n_heads": 4}; values are read as YAML."""
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"--set {one_line(item, 100)}: write it as FIELD=VALUE, for example --set "
                            f"horizon=16")
        pairs[key] = read_values(text, f"--set {one_line(item, 100)}")
    return pairs


def parse_options(argv):
    """Flags and YAML -> Options, and the names of those that were given in either."""
    parser = Parser(description=f"Train one model file of: {', '.join(MODELS)}")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Options), re.M))
    for name, default in vars(Options()).items():
        text = comments[name] + f" (default: {default})" * (default != "")
        kind = {"help": text.replace("%", "%%"), "default": None}
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


# (least, most) of every number among the options.
RANGES = {"seed": SEEDS, "ema_max": (0, 1), "workers": (0, 1000), "episodes": (0, 100_000)} | {
    name: (1, math.inf) for name in ("batch_size", "grad_accum", "log_every", "checkpoint_every")} | {
    name: (0, math.inf) for name in ("steps", "warmup", "eval_every", "rollout_every", "clip", "lr",
                                     "weight_decay", "demos", "keep_every", "ema_power", "memory_gb",
                                     "max_train_episodes", "val_ratio", "still", "shortest")}


def check_options(options):
    """Numbers that no run can use, and keys that nobody reads."""
    check_ranges(vars(options), RANGES)
    if len(options.betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in options.betas):
        raise UserError(f"--betas {options.betas} must be two numbers of at least 0 and below 1")
    if len(options.image_size) != 2 or any(options.image_size) and min(options.image_size) < 1:
        raise UserError(f"--image_size {options.image_size} must be height and width, both at least 1")
    if options.fresh and not options.init:
        raise UserError("--fresh says which weights of --init are not taken: add --init")
    schedules = ("cosine", "linear", "constant", "pi0")
    if options.lr_schedule not in schedules:
        raise UserError(f"--lr_schedule {options.lr_schedule!r} is unknown"
                        f"{hint(options.lr_schedule, schedules)}")
    name = options.env.get("id") if isinstance(options.env, dict) else None
    check_keys(options.env, "env", (), fields_of(name if isinstance(name, str) else ""))
    for name, spec in options.robots.items():
        check_keys(spec, f"robots: {name}", (), ("data", "action_names", "state_names"))
    if options.shape_meta:
        check_shape_meta(options.shape_meta)


def read_yaml(path):
    """{option: value} of a YAML file, types checked."""
    try:
        text = input_text(path)
    except UserError as e:
        raise UserError(f"--config {e}; give a YAML file, configs/ has some") from None
    content = read_values(text, f"--config {path}") or {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no KEY: VALUE lines; see configs/ for examples")
    defaults = vars(Options())
    for key in content:
        if key not in defaults:
            raise UserError(f"--config {path}: unknown key {key!r}{hint(key, defaults)}")
    return {key: typed(key, value, defaults[key], f"--config {path}") for key, value in content.items()}


def with_recipe(options, explicit, module):
    """Options that were not given take the value which the model file recommends for the preset. Where
    nothing says that the device has instructions for bfloat16, float32 is taken all the same."""
    recipe = getattr(module, "RECIPES", {}).get(options.preset, {})
    if recipe.get("dtype") == "bfloat16":
        device = pick_device(options.device, "auto")[0].type
        if not (device == "cuda" or device == "cpu" and cpu_has_bfloat16()):
            recipe = recipe | {"dtype": "float32"}
    return dataclasses.replace(options, **{k: v for k, v in recipe.items() if k not in explicit})


def tuple_of(value):
    """A list of YAML as the tuple that a Config holds."""
    return tuple(value) if isinstance(value, list) else value


def make_config(module, options, facts):
    """The model's Config: preset, then facts of the data, then --set. `facts` {field: value} are used
    where the Config has such a field, and --set may not contradict them."""
    if options.preset not in module.PRESETS:
        raise UserError(f"--preset {options.preset!r} is not in {module.__name__}.py"
                        f"{hint(options.preset, module.PRESETS)}")
    names = {f.name for f in dataclasses.fields(module.Config)}
    facts = {k: v for k, v in facts.items() if k in names}
    for key, fact in facts.items():  # n_classes = 0 means: do not look at the labels
        value = tuple_of(options.set.get(key, fact))
        if value != fact and (key, value) != ("n_classes", 0):
            raise UserError(f"--set {key}={value}: the data decide this, it is {fact}; leave it out")
    return model_config(module, module.PRESETS[options.preset] | facts | options.set, "--set")
