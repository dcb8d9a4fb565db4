"""Replay buffers of Diffusion Policy: a zarr folder, or a .zarr.zip of one.

    data/<key>          (N, ...): all episodes in a row. `action`; every other array is an observation
    meta/episode_ends   (E,): episode e ends before this step
    [attribute fps]     control steps per second; 10, as in Push-T, where nobody says

(N, 9, 2) is flattened to (T, 18). Pictures (N, H, W, 3) are uint8, or whole numbers 0 .. 255 in float32, as
Push-T has them. Needs the package zarr, version 2 or 3.

zarr reads what a store tells it to: a codec named there may unpickle, that is run, what the chunks hold, and
a chunk that is missing is a chunk of zeros. Both are looked for before anything is read.
"""
import collections.abc
import json
import zipfile
from math import prod
from pathlib import Path

import numpy as np

from demos.episodes import Array, Episode, Rows, kind_of
from robot.errors import UserError, one_line
from robot.looks import spread

# Files in which a store names its codecs, and the codecs that compute on bytes and numbers alone.
METADATA = (".zarray", ".zmetadata", ".zgroup", ".zattrs", "zarr.json")
CODECS = {"blosc", "zlib", "gzip", "bz2", "lzma", "lz4", "zstd", "zfpy", "pcodec", "delta", "shuffle",
          "bitround", "quantize", "fixedscaleoffset", "astype", "packbits", "crc32", "crc32c", "adler32",
          "fletcher32", "jenkins_lookup3", "bytes", "transpose", "sharding_indexed", "vlen-utf8",
          "vlen-bytes", "imagecodecs_jpeg2k", "imagecodecs_jpeg"}
FPS = 10.0
LOOKS = 8                       # pictures in float that show whether they are in 0 .. 255
AGENT = "agent_pos"             # Diffusion Policy makes it as it loads Push-T, and its configurations name it


def matches(file):
    return isinstance(file, ReplayBuffer)


def is_zarr(path):
    path = Path(path)
    return path.name.endswith((".zarr", ".zarr.zip")) or any(
        (path / name).is_file() for name in (".zgroup", "zarr.json"))


class ReplayBuffer(collections.abc.Mapping):
    """An open buffer: {"<episode>/<key>": rows by [i] or [lo:hi]}. Raises UserError."""

    def __init__(self, path):
        self.path = path
        self.zarr = import_zarr(path)
        check_codecs(path)
        self.store = None
        try:
            if str(path).endswith(".zip"):
                self.store = self.zarr.storage.ZipStore(path, mode="r")
            group = self.zarr.open_group(self.store or str(path), mode="r")
            self.arrays = {key: group["data"][key] for key in group["data"]}
            self.ends = np.asarray(group["meta/episode_ends"][:]).astype(int)
            self.fps = float(group.attrs["fps"]) if "fps" in group.attrs else None
        except Exception as error:      # a missing codec, a broken chunk: zarr has no common class for these
            raise UserError(f"{path} cannot be read as a replay buffer, with data/action and "
                            f"meta/episode_ends: {one_line(error, 120)}") from None

    def read(self, key, lo, hi):
        """Steps lo .. hi-1 of an array, as the episodes have it."""
        try:
            x = self.arrays[key if key in self.arrays else "state"][lo:hi]
        except Exception as error:
            raise UserError(f"{self.path}: data/{key} cannot be read, copy it again: {one_line(error, 120)}"
                            ) from None
        if key not in self.arrays:
            return x[:, :2]
        if x.ndim < 4:
            return x.reshape(len(x), -1)
        if x.dtype != np.uint8 and not (x.min() >= 0 and x.max() <= 255):
            raise UserError(f"{self.path}: data/{key} goes from {x.min():g} to {x.max():g}: scale it to 0 .. "
                            f"255 first")
        return np.rint(x).astype(np.uint8)

    def __getitem__(self, name):
        e, _, key = name.partition("/")
        key = "img" if key == "image" and "image" not in self.arrays else key
        if not e.isdigit() or int(e) >= len(self.ends) or key not in (*self.arrays, AGENT):
            raise KeyError(name)
        hi = int(self.ends[int(e)])
        lo = int(self.ends[int(e) - 1]) if int(e) else 0
        return Rows(hi - lo, lambda a, b: self.read(key, lo + a, lo + b))

    def __iter__(self):
        return (f"{e}/{key}" for e in range(len(self.ends)) for key in self.arrays)

    def __len__(self):
        return len(self.ends) * len(self.arrays)

    def close(self):
        if self.store:
            self.store.close()


def import_zarr(path):
    try:
        import zarr.storage
    except ImportError:
        raise UserError(f"{path}: a replay buffer needs the package zarr: pip install 'zarr<4'") from None
    return zarr


def metadata(path):
    """(name, text) of the files that describe a store."""
    if str(path).endswith(".zip"):
        with zipfile.ZipFile(path) as store:
            for name in store.namelist():
                if name.rpartition("/")[2] in METADATA:
                    yield name, store.read(name)
    else:
        for file in sorted(Path(path).rglob("*")):
            if file.name in METADATA and file.is_file():
                yield str(file.relative_to(path)), file.read_bytes()


def codecs(node):
    """Names of all codecs in a JSON description."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("compressor", "compressors", "filters", "serializer", "codecs", "index_codecs"):
                for codec in value if isinstance(value, list) else [value] if value else []:
                    yield str(codec.get("id") or codec.get("name") if isinstance(codec, dict) else codec)
            yield from codecs(value)
    elif isinstance(node, list):
        for value in node:
            yield from codecs(value)


def check_codecs(path):
    """Refuse a store that names a codec which may do more than compute."""
    for name, text in metadata(path):
        try:
            named = list(codecs(json.loads(text)))
        except (ValueError, RecursionError):
            raise UserError(f"{path}: {one_line(name, 80)} is no JSON: the store is damaged") from None
        for codec in named:
            if codec.removeprefix("numcodecs.") not in CODECS:
                raise UserError(f"{path}: {one_line(name, 80)} names the codec {one_line(codec, 40)!r}, "
                                f"which may run code or is unknown, so nothing is read: store the arrays "
                                f"without it")


def episodes(path, file, missing_zeros=False):
    """The episodes of an open buffer, see demos/files.py. missing_zeros: chunks that it lacks are zeros."""
    if "action" not in file.arrays:
        raise UserError(f"{path} has no data/action: it is not a replay buffer")
    pictures = [key for key, x in file.arrays.items() if x.ndim == 4 and x.shape[3] == 3]
    check_arrays(file)
    faults = {key: fault_of(file, key, key in pictures, missing_zeros) for key in file.arrays}
    broken = [fault for key, fault in faults.items() if fault and key not in pictures]
    if broken:
        raise UserError(broken[0])
    names = {"image" if key == "img" and "image" not in file.arrays else key: key for key in file.arrays}
    found = []
    for e, length in enumerate(np.diff(file.ends, prepend=0).tolist()):
        arrays = {name: describe(f"{e}/{name}", file.arrays[key], length, key in pictures, faults[key])
                  for name, key in names.items()}
        push_t = "state" in arrays and ("keypoint" in arrays or "img" in file.arrays)
        if push_t and AGENT not in arrays and arrays["state"].shape[1:] == (5,):
            arrays[AGENT] = Array(f"{e}/{AGENT}", (length, 2), arrays["state"].dtype)
        found.append(Episode(file=str(path), name=f"{Path(path).name}:episode_{e}", fps=file.fps,
                             usual_fps=FPS, actions=arrays.pop("action"), obs=arrays))
    return found


def describe(path, x, length, picture, fault):
    if picture:
        return Array(path, (length, *x.shape[1:]), np.dtype(np.uint8), "camera", fault=fault)
    shape = (length, *x.shape[1:]) if x.ndim > 3 else (length, prod(x.shape[1:]))
    return Array(path, shape, x.dtype, *kind_of(path, shape, x.dtype))


def check_arrays(file):
    ends = file.ends
    if not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
        raise UserError(f"{file.path}: meta/episode_ends does not rise, {ends[:5]} ...: it is damaged")
    for key, x in file.arrays.items():
        if x.shape[:1] != (ends[-1],):
            steps = x.shape[0] if x.shape else "no"
            raise UserError(f"{file.path}: data/{key} has {steps} steps, episodes end at {ends[-1]}")


def fault_of(file, key, picture, missing_zeros):
    """Why an array cannot be read as it is; "" if it can. Of pictures, this matters where they are used."""
    x = file.arrays[key]
    missing = x.nchunks - x.nchunks_initialized
    if missing and not missing_zeros:
        return (f"{file.path}: {missing} of {x.nchunks} chunks of data/{key} are missing: copy the store "
                f"again; if they are zeros, which zarr 3 does not write: python -m demos.convert "
                f"--missing_zeros")
    if picture and x.dtype.kind == "f":
        some = spread(x.shape[0], LOOKS)            # the first one may be black
        if not any(x[int(t)].max() > 1 for t in some):
            return (f"{file.path}: data/{key} is float and has nothing above 1 in {len(some)} pictures, "
                    f"evenly spread: scale it to 0 .. 255")
    return ""
