"""Downloaded weights -> a Release, with which this project trains and acts.

    release = open_release("FOLDER")        a LeRobot folder, weights with an index.json, a torch file, ...
    model = build_model(release)            the model with these weights, float32

Each reader in READERS gets a Download. It returns a Release, or None if the files are not in its format.
"""
import re

import torch

from .downloads import Release, open_download
from .errors import UserError, few, one_line
from .models import load_module, model_config
from .released_dp import lerobot_diffusion, original
from .released_pi0 import lerobot, openpi, paligemma
from .released_rdt import read_rdt
from .weight_files import refuse_not_finite

# A part of the names of each model's official weights, by which a file without config.json is recognised.
MARKS = {"pi0": "paligemma_with_expert.", "rdt": "img_adaptor.", "dp_cnn": "down_modules.",
         "dit": "x_embedder.", "dp_transformer": "cond_pos_emb", "dit_policy": "noise_net."}
# Scales of actions and observations among the weights: LeRobot's until 2025, and Diffusion Policy's.
STATISTICS = re.compile(r"(un)?normalize_(inputs|targets|outputs)\.buffer_|normalizer\.params_dict\.")


def bare(download, model, hints):
    """Weights without a config.json that says what they are: --model, --preset and --set say it."""
    weights, kind = download.weights, download.config.get("type")
    if isinstance(kind, str):
        raise UserError(f"{download.name}: its config.json is that of a policy of type "
                        f"{one_line(kind, 40)!r}, which is not read here")
    found = {name for name, mark in MARKS.items() if any(mark in key for key in weights)}
    if model and found and model not in found:
        raise UserError(f"{download.name} holds weights of {' or '.join(sorted(found))}, not of {model}")
    if not model and len(found) != 1:
        raise UserError(f"{download.name} does not say whose weights it holds ({few(weights, 3)}): add "
                        f"--model")
    statistics = [key for key in weights if STATISTICS.match(key)]
    notes = [f"{len(statistics)} statistics among the weights ({few(statistics, 2)}) are not used: the "
             f"config.json that says what they are is not beside them"] if statistics else []
    weights = {key: x for key, x in weights.items() if key not in statistics}
    return Release(model or found.pop(), {}, weights, None, {}, download.notes + notes)


# Tried in this order: function(download, model or None, hints) -> Release or None.
READERS = [lerobot_diffusion, original, lerobot, openpi, paligemma, read_rdt, bare]


def open_release(path, model=None, **hints):
    """path: a folder or file, or several with commas. model: what the user says it is, or None. hints: what
    the folder may not say and only one of the readers needs (robot, tokenizer_path, ...). -> Release. Raises
    UserError."""
    try:
        download = open_download(path)
        refuse_not_finite(download.weights)
        release = next(filter(None, (reader(download, model, hints) for reader in READERS)))
    except UserError as e:
        raise UserError(f"--init: {e}") from None
    except (TypeError, AttributeError, KeyError, ValueError, IndexError) as e:  # JSON of another form
        raise UserError(f"--init {path}: its JSON files are not as its program writes them "
                        f"({type(e).__name__}: {one_line(e, 120)})") from None
    if model and release.model != model:
        raise UserError(f"--init {path} is a {release.model}, not a {model}: leave --model out")
    return release


def build_model(release, config=None, dtype=torch.float32):
    """The model with the release's weights, as copies in `dtype`. config: default what the release says."""
    module = load_module(release.model)
    config = config or model_config(module, release.config, "--init")
    try:
        model = module.Model.from_official(release.weights, config, **release.loading)
    except (ValueError, AttributeError, TypeError, RuntimeError) as e:  # numbers that are no floats, for one
        raise UserError(f"--init: {one_line(e, 340)}") from None
    for x in [*model.parameters(), *model.buffers()]:
        x.data = x.data.to(dtype if x.is_floating_point() else x.dtype, copy=True)
    return model
