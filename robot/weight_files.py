"""Files of weights as people download them -> {name: tensor}.

    read_weights("FOLDER or FILE")   .safetensors, a torch file, or the shards that an index.json lists

Tensors stay in the file until they are looked at (they are mapped), in the type that the file has. What
others wrapped around them is taken off: training state beside the weights, and prefixes of DDP, torch.compile
and averages. Nothing is unpickled: torch's reader takes tensors, numbers, texts and containers of them only.
"""
import argparse
import json
import math
import re
import struct
from pathlib import Path

import torch

from .errors import UserError, few, input_file, input_text, one_line

# safetensors' names of types, https://github.com/huggingface/safetensors#format
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Where a folder keeps its weights, best first.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
         "pytorch_model.bin.index.json", "diffusion_pytorch_model.safetensors", "model.pt", "model.pth")
# Keys under which programs save weights. If a file has several, the first of these is taken: averages come
# first, since authors evaluate those.
WRAPPERS = ("state_dicts", "ema_model", "ema", "module", "state_dict", "model_state_dict", "model", "params")
# DDP, torch.compile (anywhere in a name), Diffusion Policy's and ema_pytorch's averages.
PREFIXES = ("module.", "ema_model.")
# Some releases have "model." in their own names. In front of one of these names it comes from a program that
# held the policy as its attribute `model`.
HELD = re.compile(r"model\.(model|diffusion|obs_encoder|normalizer|normalize_inputs|noise_net|x_embedder)\.")


def read_weights(path):
    """-> ({name: tensor}, [notes on what was left out]). Raises UserError."""
    path = find_weights(Path(path))
    if path.name.endswith(".index.json"):
        weights, notes = read_shards(path), []
    elif path.suffix == ".safetensors":
        weights, notes = read_safetensors(path), []
    else:
        weights, notes = unwrap(read_torch(path), path)
    return strip_prefixes(weights, notes), notes


def find_weights(path):
    """The file of a folder that holds weights, or names the files that do."""
    if not path.is_dir():
        path = input_file(path)
        shard = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.(\w+)", path.name)
        if shard and int(shard[2]) > 1:
            raise UserError(f"{path} is one of {int(shard[2])} parts: give the folder that holds them all "
                            f"and {shard[1]}.{shard[3]}.index.json")
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    found = found or sorted(file for pattern in ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt")
                            for file in path.glob(pattern) if "processor" not in file.name)
    if not found:
        has = few(sorted(p.name for p in path.iterdir()))
        raise UserError(f"the folder {path} holds no weights (it has {has}): it should have {NAMES[0]}, "
                        f"{NAMES[1]} or {NAMES[2]}")
    if len(found) > 1 and found[0].name not in NAMES:
        raise UserError(f"the folder {path} holds several files of weights: name one of "
                        f"{few(p.name for p in found)}, or several with commas if they are one model")
    return input_file(found[0])


def read_safetensors(path):
    """The tensors of a .safetensors file, mapped: 8 bytes with the length of a JSON text that says where each
    of them lies, this text, the numbers."""
    def refuse(why):
        raise UserError(f"{path} is not a whole .safetensors file ({why}): download it again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            refuse(f"{size} bytes are less than its first ones promise; a pointer of git-lfs?")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            refuse("its header is no JSON")
    if not isinstance(header, dict):
        refuse("its header names no tensors")
    header.pop("__metadata__", None)
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    weights = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            right = end - begin == math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else True
            right &= all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and end <= len(whole)
        except (KeyError, TypeError, ValueError):
            right = False
        if not right:
            refuse(f"{one_line(name, 80)} has no place in it")
        if dtype not in DTYPES:
            raise UserError(f"{path}: {one_line(name, 80)} has the type {one_line(dtype, 20)}, which is not "
                            f"read")
        part = whole[begin:end]
        aligned = (8 + length + begin) % DTYPES[dtype].itemsize == 0
        weights[name] = (part if aligned else part.clone()).view(DTYPES[dtype]).view(shape)
    return weights


def read_torch(path):
    """What a torch file holds, of tensors, numbers, texts and containers of them."""
    try:
        # DiT's files keep the flags of their run, an argparse.Namespace: a container like a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch has a dozen types of error for files cut short, foreign or pickles
        raise UserError(f"{path} cannot be read ({one_line(e, 110)}); it must be a .safetensors file or a "
                        f"torch file that holds tensors only: others are programs, and none is unpickled"
                        ) from None


def unwrap(content, path):
    """The weights of what a program has saved. -> ({name: tensor}, notes)"""
    notes, where = [], []
    for _ in range(4):
        if not isinstance(content, dict):
            raise UserError(f"{path}{''.join(where)} holds a {type(content).__name__}, not tensors by their "
                            f"names")
        if "replay" in content and "format" in content:
            raise UserError(f"{path} is a checkpoint of train.py: give the folder of its run, or call it "
                            f"checkpoint_....pt")
        odd = next((key for key in content if not isinstance(key, str)), None)
        if odd is not None:
            raise UserError(f"{path}{''.join(where)}: the key {one_line(repr(odd), 40)} is no name of a "
                            f"weight")
        weights = {key: x for key, x in content.items() if torch.is_tensor(x)}
        inner = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if weights and not inner:
            rest = [key for key in content if key not in weights]
            return weights, notes + ([f"of {path} these are no tensors: {few(rest)}"] if rest else [])
        if not inner:
            raise UserError(f"{path}{''.join(where)} holds no tensors, only {few(content)}")
        others = [key for key in content if key != inner]
        if others:
            notes.append(f"of {path}{''.join(where)} '{inner}' is taken, and not {few(others)}")
        content, where = content[inner], where + [f"[{inner!r}]"]
    raise UserError(f"{path} is nested too deeply: save the weights alone, by torch.save")


def read_shards(index):
    """The tensors of all the files that an index.json lists."""
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{index} has no weight_map of tensors and files: it is no index of weights")
    weights = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index} names {one_line(name, 80)}, which is not beside it: download all parts")
        part = index.parent / name
        found = read_safetensors(part) if part.suffix == ".safetensors" else unwrap(read_torch(part), part)[0]
        weights |= {key: x for key, x in found.items() if places.get(key) == name}
    missing = [key for key in places if key not in weights]
    if missing:
        raise UserError(f"the parts that {index} lists lack {few(missing, 3)}: download them again")
    return weights


def strip_prefixes(weights, notes):
    """Names as the model's own program knows them."""
    weights = {key.replace("_orig_mod.", ""): x for key, x in weights.items()}
    while True:
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in weights)), None)
        if any(map(HELD.match, weights)) and all(key.startswith("model.") for key in weights):
            prefix = prefix or "model."
        if prefix is None:
            return weights
        left = [key for key in weights if not key.startswith(prefix)]
        if left:
            notes.append(f"beside {prefix}... these are not used: {few(left)}")
        weights = {key[len(prefix):]: x for key, x in weights.items() if key.startswith(prefix)}


def read_json(path):
    """A JSON file that holds names and values."""
    try:
        content = json.loads(input_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is no valid JSON: {one_line(e, 100)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no names and values")
    return content


def refuse_not_finite(weights):
    """One line for the first weight that is NaN or infinite. All are read for it. Masks of attention, which
    some save among their weights, hold -inf by their nature."""
    for name, x in weights.items():
        if x.device.type != "cpu" or x.layout != torch.strided or x.is_nested:
            raise UserError(f"{one_line(name, 120)} holds no plain numbers ({x.layout}, {x.device}): save "
                            f"dense tensors, on the CPU")
        if x.is_floating_point() and x.numel() and not name.endswith("mask"):
            low, high = (x.float() if x.element_size() < 2 else x).aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise UserError(f"{one_line(name, 120)} holds numbers that are not finite: the file is "
                                f"damaged, or its training had diverged")
