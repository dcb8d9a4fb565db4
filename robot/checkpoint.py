"""Checkpoints: weights, configuration, description of the data and a recorded pair to replay, in one file."""
import math
import zipfile
from pathlib import Path

import torch

from .errors import UserError, fingerprint, input_file, one_line, user_path, written_aside
from .models import load_module, model_config
from .normalizer import Normalizer
from .processing import Processing

FORMAT = 1                # of checkpoint.pt; a newer one is refused by name


def save_checkpoint(path, content):
    save_tensors(path, {"format": FORMAT} | content)


def save_tensors(path, content):
    with written_aside(path) as aside:
        try:
            torch.save(content, aside)
        except RuntimeError as e:  # what torch makes of a full disk
            raise OSError(f"torch.save: {str(e).splitlines()[0]}") from None


def save_frozen(folder, weights):
    """Write weights that training leaves as they are, once for all checkpoints in `folder`. -> name of the
    file, for the checkpoints' "frozen"."""
    bytes_of = lambda x: x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    name = f"frozen_{fingerprint(*map(bytes_of, weights.values()))}.pt"
    if not (folder / name).exists():
        save_tensors(folder / name, weights)
    return name


# The parts of a checkpoint and their types; [str] means a list of texts.
CONTENT = {"model": str, "preset": str, "config": dict, "data": dict, "normalizer": (dict, type(None)),
           "options": {"data": str, "seed": int, "steps": int, "demos": int, "env": dict},
           "step": int, "train_seconds": (int, float), "weights": dict, "ema": dict, "optimizer": dict,
           "replay": {"batch": dict, "output": torch.Tensor}}
# Those of its part "data", for a policy (DATA) and for a generative model (SAMPLES).
DATA = {"source": str, "state_keys": dict, "camera_keys": [str], "image_size": (list, type(None)),
        "fps": (int, float, type(None)), "action_dim": int, "state_dim": int, "action_names": [str],
        "instructions": [str]}
SAMPLES = {"source": str, "shape": [int], "n_classes": int, "class_names": [str]}


def sound(value, kind):
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(k in value and sound(value[k], kind[k]) for k in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(x, kind[0]) for x in value)
    return isinstance(value, kind)


def finite(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(finite, parts)) and (not isinstance(value, float) or math.isfinite(value))


def faults(content):
    """Names of the parts that a checkpoint lacks, or holds as something else."""
    yield from (key for key, kind in CONTENT.items() if key not in content or not sound(content[key], kind))
    yield from (key for key in ("data", "train_seconds") if not finite(content[key]))
    unlogged = content.get("unlogged", {"step": 0})  # older ones have none
    losses = unlogged.get("losses", torch.zeros(0)) if sound(unlogged, {"step": int}) else None
    if not torch.is_tensor(losses) or losses.ndim != 1 or not losses.dtype.is_floating_point:
        yield "unlogged"
    if not isinstance(content["options"].get("robots", {}), dict):
        yield "options"
    if content.get("normalizer") is None:
        yield from () if sound(content.get("data"), SAMPLES) else ["data"]
    elif not sound(content.get("data"), DATA):
        yield "data"
    else:
        try:
            check_normalizer(Normalizer.from_state(content["normalizer"]), content["data"])
        except Exception:  # an edited normaliser can raise anything here
            yield "normalizer"


def check_normalizer(normalizer, data):
    dims = {"actions": data["action_dim"], "state": data["state_dim"]}
    if data.get("processing"):
        steps = Processing(data["processing"], data["state_keys"], data["camera_keys"])
        dims = {"actions": steps.action_dim(data["action_dim"]), "state": steps.state_dim}
    for key, dim in dims.items():
        there_and_back = normalizer.unnormalize(key, normalizer.normalize(key, torch.zeros(1, dim)))
        stats = [normalizer.stats[key][name] for name in ("min", "max", "mean", "std")]
        numbers = torch.stack([there_and_back[0], *stats])
        listed = isinstance(normalizer.near_constant[key], list)
        if not listed or numbers.shape != (5, dim) or numbers.dtype != torch.float32 or \
                not numbers.isfinite().all():
            raise ValueError(key)
    normalizer.summary()                # what it says of itself, when training goes on


def read_checkpoint(path, device="cpu", mapped=False):
    """The checkpoint's dict. `path` may be the run's folder. Only tensors, numbers, texts and containers of
    them are read; anything else a pickle could hold is refused. The file's checksums are compared, so that no
    flipped bit becomes a weight. mapped: see read_tensors."""
    path = user_path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"there is no {path}; give the --out folder of a training run")
    content = read_tensors(path, device, mapped)
    found = content.get("format")
    if found is None:
        raise not_of_this_project(path)
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(f"{path} has format {str(found)[:20]}, this code reads up to {FORMAT}: update the "
                        f"code")
    if "frozen" in content:
        frozen = read_frozen(path, content["frozen"], device, mapped)
        content |= {part: frozen | content[part] for part in ("weights", "ema")
                    if isinstance(content.get(part), dict)}
    for key in faults(content):
        raise UserError(f"{path} holds no sound '{key}': it was edited, train again or take another copy")
    return content


def read_frozen(path, name, device="cpu", mapped=False):
    """The frozen weights that lie beside the checkpoint `path`."""
    beside = path.parent / Path(str(name)).name
    if not beside.exists():
        raise UserError(f"{path} needs {beside.name}, which holds its frozen weights: copy it into the same "
                        f"folder")
    return read_tensors(beside, device, mapped)


def read_tensors(path, device, mapped=False):
    """The dict in a file of save_tensors. mapped: its tensors stay in the file until they are looked at, for
    processes that each need a part of them."""
    path = input_file(path)
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        content = None if damaged else torch.load(path, map_location=device, weights_only=True,
                                                    mmap=mapped)
    except PermissionError:
        raise UserError(f"{path} may not be read: change its permissions") from None
    except Exception:  # torch has a dozen types of error for files that are cut short, foreign or pickles
        raise not_of_this_project(path) from None
    if damaged:
        raise UserError(f"{path} is damaged ({damaged} does not match its checksum): copy it again")
    if not isinstance(content, dict):
        raise not_of_this_project(path)
    return content


def not_of_this_project(path):
    return UserError(f"{path} is not a checkpoint of this project, or it is cut short; only files that "
                     f"train.py wrote are read, and nothing is ever unpickled")


def record(model, batch):
    """A batch and the model's output for it with given noise: stored in the checkpoint, replayed when it is
    loaded."""
    batch = {k: v.cpu() for k, v in batch.items()}
    return {"batch": batch, "output": sample_two_steps(model, batch)}


def sample_two_steps(model, batch):
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    return model.sample(batch, steps=2, generator=torch.Generator().manual_seed(0)).float().cpu()


def load_model(path, device="cpu", module=None, replay=True):
    """-> (model with the averaged weights, in evaluation mode, and the checkpoint). Verifies by replay that
    this code computes what the code that trained it did; replay=False leaves that out, after an intended
    change. module: the module with the Model that was trained, if it is not the model file of that name (for
    example a head of your own, docs/extending.md). Raises UserError.
    """
    checkpoint = read_checkpoint(path, device)
    module = module or load_module(checkpoint["model"])
    config = model_config(module, checkpoint["config"], path)
    recorded, error = checkpoint["replay"], 0.0
    try:
        model = module.Model(config)
        model.load_state_dict(checkpoint["ema"])
        model.to(device).eval().requires_grad_(False)
        if replay:
            output = sample_two_steps(model, recorded["batch"])
            error = (output - recorded["output"]).abs().max().item()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as e:
        raise UserError(f"{path} does not fit {module.__name__}, which has changed since it was trained (a "
                        f"class of your own needs Policy.load(..., module=...)): {one_line(e)[:180]}"
                        ) from None
    if not error <= 1e-2:
        raise UserError(f"{path}: the recorded input gives another output than when it was saved (by "
                        f"{error:.2g}): {checkpoint['model']}.py has changed since it was trained; if that "
                        f"is meant, load it with --no_replay")
    return model, checkpoint
