"""Turn a zarr replay buffer of Diffusion Policy into HDF5 that train.py reads.

    python -m demos.convert pusht_cchi_v7_replay.zarr[.zip] out.hdf5 [--images] [--fps 10]

The buffer holds all episodes in a row: data/<key> (N, ...) and meta/episode_ends (E,), where episode e ends
before step episode_ends[e]. `action` becomes `actions`, every other array an observation: (N, 9, 2) is
flattened to (T, 18); pictures (N, H, W, 3) are taken only with --images and become uint8. Needs the package
zarr, version 2 or 3 (pip install "zarr<4").

zarr reads what a store tells it to: a codec named there may unpickle, that is run, what the chunks hold, and
a chunk that is missing is a chunk of zeros. Both are looked for before anything is read.
"""
import json
import zipfile
from pathlib import Path

import numpy as np

from demos.generated import new_hdf5
from robot.cli import Parser
from robot.errors import UserError, few, nearest, one_line, run_command, say

# Files in which a store names its codecs, and the codecs that compute on bytes and numbers alone.
METADATA = (".zarray", ".zmetadata", ".zgroup", ".zattrs", "zarr.json")
CODECS = {"blosc", "zlib", "gzip", "bz2", "lzma", "lz4", "zstd", "zfpy", "pcodec", "delta", "shuffle",
          "bitround", "quantize", "fixedscaleoffset", "astype", "packbits", "crc32", "crc32c", "adler32",
          "fletcher32", "jenkins_lookup3", "bytes", "transpose", "sharding_indexed", "vlen-utf8",
          "vlen-bytes", "imagecodecs_jpeg2k", "imagecodecs_jpeg"}


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


def open_buffer(path):
    """The zarr group of a folder or of a .zip."""
    if not Path(path).exists():
        beside = [p.name for p in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
        raise UserError(f"no replay buffer at {path}{nearest(Path(path).name, beside) or ': check the path'}")
    try:
        import zarr
        from zarr.storage import ZipStore
    except ImportError:
        raise UserError("demos.convert needs the package zarr: pip install 'zarr<4'") from None
    check_codecs(path)
    store = ZipStore(path, mode="r") if str(path).endswith(".zip") else str(path)
    buffer = zarr.open_group(store, mode="r")
    if "data/action" not in buffer or "meta/episode_ends" not in buffer:
        raise UserError(f"{path} has no data/action and meta/episode_ends: it is not a replay buffer")
    return buffer


def check_arrays(source, arrays, ends, missing_zeros):
    if not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
        raise UserError(f"{source}: meta/episode_ends does not rise, {ends[:5]} ...: it is damaged")
    for key, x in arrays.items():
        if x.shape[:1] != (ends[-1],):
            steps = x.shape[0] if x.shape else "no"
            raise UserError(f"{source}: data/{key} has {steps} steps, episodes end at {ends[-1]}")
        missing = x.nchunks - x.nchunks_initialized
        if missing and not missing_zeros:
            raise UserError(f"{source}: {missing} of {x.nchunks} chunks of data/{key} are missing: copy the "
                            f"store again; if they are zeros, which zarr 3 does not write, add "
                            f"--missing_zeros")


def convert(source, out, images=False, fps=10.0, instruction="", missing_zeros=False):
    """Write `out` from the buffer `source`; returns (episodes, steps). missing_zeros: chunks that the store
    lacks are zeros. Raises UserError."""
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another name")
    try:
        buffer = open_buffer(source)
        found = {key: buffer["data"][key] for key in buffer["data"]}
        arrays = {key: x for key, x in found.items() if images or x.ndim < 4}
        if len(found) > len(arrays):
            left = few([key for key in found if key not in arrays])
            say(f"not taken: {left} (pictures; --images takes them)")
        ends = np.asarray(buffer["meta/episode_ends"][:]).astype(int)
        check_arrays(source, arrays, ends, missing_zeros)
        with new_hdf5(out) as file:
            data = file.create_group("data")
            data.attrs.update(format_version=1, fps=fps, total=ends[-1])
            if instruction:
                data.attrs["language_instruction"] = instruction
            for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends)):
                demo = data.create_group(f"demo_{e}")
                demo.attrs["num_samples"] = hi - lo
                for key, x in arrays.items():
                    write_array(demo, key, x[lo:hi])
                # Diffusion Policy makes this observation as it loads Push-T, and its configurations name it.
                if "state" in arrays and ("keypoint" in arrays or "img" in buffer["data"]):
                    demo["obs/agent_pos"] = demo["obs/state"][:, :2]
    except UserError:
        raise
    except Exception as error:          # a missing codec, a broken chunk: zarr has no common class for these
        raise UserError(f"{source} cannot be read as zarr: {one_line(error)}") from None
    return len(ends), int(ends[-1])


def write_array(demo, key, x):
    if key == "action":
        demo["actions"] = x.astype(np.float32)
    elif x.ndim < 4:
        demo[f"obs/{key}"] = x.reshape(len(x), -1).astype(np.float32)
    else:
        # Push-T stores whole numbers 0 .. 255 as float32, so nothing is lost.
        if x.dtype != np.uint8 and not (x.min() >= 0 and 1 < x.max() <= 255):
            raise UserError(f"data/{key} goes from {x.min():g} to {x.max():g}: scale it to 0 .. 255 first")
        demo.create_dataset(f"obs/{'image' if key == 'img' else key}", data=np.rint(x).astype(np.uint8),
                            compression=4, chunks=(min(16, len(x)), *x.shape[1:]))


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="replay buffer: a .zarr folder or a .zarr.zip")
    parser.add_argument("out", help="HDF5 file to write; must not exist")
    parser.add_argument("--images", action="store_true", help="take the pictures along")
    parser.add_argument("--fps", type=float, default=10.0, help="control steps per second (10 is Push-T's)")
    parser.add_argument("--missing_zeros", action="store_true", help="chunks that are missing are zeros")
    parser.add_argument("--instruction", default="", help="the task in words, for policies that read")
    args = parser.parse(argv, {"fps": (0.001, 1e6)})
    episodes, steps = convert(args.source, args.out, args.images, args.fps, args.instruction,
                              args.missing_zeros)
    print(f"{args.out}: {episodes} episodes, {steps} steps. python -m demos.check {args.out} tells more.")


if __name__ == "__main__":
    run_command(main)
