"""Episodes -> one HDF5 file in robomimic's layout.

Every episode is first written to a file of its own in OUT.parts, so that a run that was killed goes on where
it stopped, and that no more than one episode is in memory.
"""
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from demos.generated import new_hdf5
from demos.reading import Reader
from demos.verify import arrays_of, compare
from robot.errors import UserError, input_text, one_line, say, write_json, written_aside

AT_ONCE = 16                    # pictures in memory


def write_hdf5(episodes, out, image_size=None, colour="bgr"):
    """Write the file `out`; -> lines that say what was compared. Raises UserError."""
    parts, reader = Path(f"{out}.parts"), Reader(colour, image_size)
    start_parts(parts, episodes, image_size, colour)
    with tqdm(total=sum(e.length for e in episodes), unit="step", disable=None) as bar:
        for i, episode in enumerate(episodes):
            part = parts / f"episode_{i:06d}.hdf5"
            if not part.exists():
                write_part(part, episode, reader)
            bar.update(episode.length)
    need = sum(part.stat().st_size for part in parts.glob("*.hdf5"))
    free = shutil.disk_usage(parts).free
    if need > free:             # HDF5 does not survive a full disk
        raise UserError(f"{out} needs {need / 1e9:.1f} GB beside {parts}, {free / 1e9:.1f} GB are free: make "
                        f"room and give the command again, it goes on from there")
    with written_aside(out) as aside:
        with h5py.File(aside, "w") as file:
            data = file.create_group("data")
            for i in range(len(episodes)):
                with h5py.File(parts / f"episode_{i:06d}.hdf5", "r") as part:
                    part.copy("demo", data, f"demo_{i}")
            write_attributes(file, data, episodes)
        with h5py.File(aside, "r") as file:
            lines = compare(episodes, reader, lambda i, name, lo, hi: file[f"data/demo_{i}/{name}"][lo:hi])
    reader.close()
    shutil.rmtree(parts)
    return lines


def start_parts(parts, episodes, image_size, colour):
    """The folder of parts; one that another conversion left is refused."""
    plan = {"image_size": image_size and list(image_size), "colour": colour,
            "episodes": [[e.file, e.name, e.length, e.fps, e.instruction, sorted(arrays_of(e))]
                         for e in episodes]}
    known = parts / "plan.json"
    if not known.exists():
        write_json(known, plan)
    elif json.loads(input_text(known)) != plan:
        raise UserError(f"{parts} holds parts of another conversion: delete it, or choose another name")
    else:
        done = len(list(parts.glob("*.hdf5")))
        say(f"{done} of {len(episodes)} episodes are in {parts} already, going on from there")


def write_part(part, episode, reader):
    try:
        with new_hdf5(part) as file:
            write_demo(file, episode, reader)
    except (ValueError, TypeError, KeyError) as error:          # of h5py, for instance about a name
        raise UserError(f"{episode.name} cannot be written as HDF5: {one_line(error)}") from None


def write_demo(file, episode, reader):
    demo = file.create_group("demo")
    demo.attrs.update(num_samples=episode.length, fps=episode.fps)
    if episode.instruction:
        demo.attrs["language_instruction"] = episode.instruction
    for name, array in arrays_of(episode).items():
        if array.is_camera:
            write_pictures(demo, name, episode, reader)
        else:
            demo[name] = reader.read(episode, array)
            if array.names:
                demo[name].attrs["names"] = json.dumps(array.names)


def write_pictures(demo, name, episode, reader):
    dataset, n = None, episode.length
    for lo in range(0, n, AT_ONCE):
        frames = reader.frames(episode, name.removeprefix("obs/"), lo, min(lo + AT_ONCE, n))
        if dataset is None:
            size = frames.shape[1:]
            dataset = demo.create_dataset(name, (n, *size), np.uint8, compression=1,
                                          chunks=(min(AT_ONCE, n), *size))
        dataset[lo:lo + len(frames)] = frames


def write_attributes(file, data, episodes):
    """Attributes of the whole set; which episodes belong together, and which are held out."""
    first = episodes[0]
    data.attrs.update(format_version=1, fps=first.fps, total=sum(e.length for e in episodes))
    if first.action_names:
        data.attrs["action_names"] = json.dumps(first.action_names)
    if all(e.split is not None for e in episodes):
        for split in ("train", "valid"):
            named = [f"demo_{i}" for i, e in enumerate(episodes) if e.split == split]
            file[f"mask/{split}"] = np.array(named, "S")
    rollouts = list(dict.fromkeys(e.rollout for e in episodes))
    for i, e in enumerate(episodes if len(rollouts) < len(episodes) else []):
        data[f"demo_{i}"].attrs["rollout"] = rollouts.index(e.rollout)
