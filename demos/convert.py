"""Turn a zarr replay buffer of Diffusion Policy into HDF5 that train.py reads.

    python -m demos.convert pusht_cchi_v7_replay.zarr[.zip] out.hdf5 [--images] [--fps 10]

The buffer holds all episodes in a row: data/<key> (N, ...) and meta/episode_ends (E,), where episode e ends
before step episode_ends[e]. `action` becomes `actions`, every other array an observation: (N, 9, 2) is
flattened to (T, 18); pictures (N, H, W, 3) are taken only with --images and become uint8. Needs the package
zarr, version 2 or 3 (pip install zarr).
"""
from pathlib import Path

import numpy as np

from demos.generated import new_hdf5
from robot.cli import Parser
from robot.errors import UserError, nearest, one_line, run_command


def open_buffer(path):
    """The zarr group of a folder or of a .zip."""
    if not Path(path).exists():
        beside = [p.name for p in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
        raise UserError(f"no replay buffer at {path}{nearest(Path(path).name, beside) or ': check the path'}")
    try:
        import zarr
        from zarr.storage import ZipStore
    except ImportError:
        raise UserError("demos.convert needs the package zarr: pip install zarr") from None
    store = ZipStore(path, mode="r") if str(path).endswith(".zip") else str(path)
    buffer = zarr.open_group(store, mode="r")
    if "data/action" not in buffer or "meta/episode_ends" not in buffer:
        raise UserError(f"{path} has no data/action and meta/episode_ends: it is not a replay buffer")
    return buffer


def convert(source, out, images=False, fps=10.0, instruction=""):
    """Write `out` from the buffer `source`; returns (episodes, steps). Raises UserError."""
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another name")
    try:
        buffer = open_buffer(source)
        ends = np.asarray(buffer["meta/episode_ends"][:]).astype(int)
        arrays = {key: buffer["data"][key] for key in buffer["data"]}
        arrays = {key: x for key, x in arrays.items() if images or x.ndim < 4}
        if not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
            raise UserError(f"{source}: meta/episode_ends does not rise, {ends[:5]} ...: it is damaged")
        for key, x in arrays.items():
            if x.shape[0] != ends[-1]:
                raise UserError(f"{source}: data/{key} has {x.shape[0]} steps, episodes end at {ends[-1]}")
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
        if x.dtype != np.uint8 and (x.min() < 0 or x.max() > 255 or x.max() <= 1):
            raise UserError(f"data/{key} goes from {x.min():g} to {x.max():g}: scale it to 0 .. 255 first")
        demo.create_dataset(f"obs/{'image' if key == 'img' else key}", data=np.rint(x).astype(np.uint8),
                            compression=4, chunks=(min(16, len(x)), *x.shape[1:]))


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="replay buffer: a .zarr folder or a .zarr.zip")
    parser.add_argument("out", help="HDF5 file to write; must not exist")
    parser.add_argument("--images", action="store_true", help="take the pictures along")
    parser.add_argument("--fps", type=float, default=10.0, help="control steps per second (10 is Push-T's)")
    parser.add_argument("--instruction", default="", help="the task in words, for policies that read")
    args = parser.parse(argv, {"fps": (0.001, 1e6)})
    episodes, steps = convert(args.source, args.out, args.images, args.fps, args.instruction)
    print(f"{args.out}: {episodes} episodes, {steps} steps. python -m demos.check {args.out} tells more.")


if __name__ == "__main__":
    run_command(main)
