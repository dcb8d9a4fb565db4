"""Files on disk: which are meant, which layout they have, which episodes they hold.

A layout is a module with two functions, and one entry in LAYOUTS:

    matches(file)          whether an open file has this layout
    episodes(path, file)   its episodes, a list of demos.episodes.Episode, from shapes and attributes alone

`file` is what OPENERS makes of a path by its suffix, or SETS of a folder that is one set: a mapping from
names to arrays that can be sliced, with close(). docs/extending.md adds a layout in ten lines.
"""
import contextlib
import glob
import os
import re
from pathlib import Path

import h5py

from demos import aloha, flat, lerobot, robomimic, zarr
from robot.errors import UserError, few, input_file, nearest, one_line, say, user_path


def find_files(source):
    """Files of a path, a folder (searched to the bottom) or a glob; episode_10 comes after episode_9. A
    folder that is one set counts as a file."""
    source, path = str(source), user_path(source)
    buffers = []
    if path.is_dir() and not set_opener(path):
        found, buffers = search(path)
    else:
        found = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    if not found:
        if buffers:
            reason = f": name the replay buffer itself, {few(buffers)}"
        elif path.is_dir():
            reason = f": the folder holds no {' or '.join('*' + suffix for suffix in OPENERS)}"
        else:
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            reason = nearest(path.name, ["tabletop", *beside]) or ": check the path"
        raise UserError(f"no demonstrations at {source}{reason}")
    if buffers:                 # one of them may be what a file beside it was converted from
        say(f"{source}: replay buffers are not read unless --data names one: {few(buffers)}")
    natural = lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(p))]
    return sorted(found, key=natural)


def search(folder):
    """([files, LeRobot sets], [names of replay buffers]) in a folder, to the bottom, through links as well.
    What lies inside a set is not searched."""
    found, buffers, seen = [], [], set()
    unread = lambda error: say(f"{error.filename} is not searched: {error.strerror}")
    for here, folders, names in os.walk(folder, onerror=unread, followlinks=True):
        folders.sort()
        here, real = Path(here), os.path.realpath(here)
        if real in seen or set_opener(here):
            folders.clear()
        if real in seen:        # a link that leads back, or a second one to the same folder
            continue
        seen.add(real)
        if lerobot.is_lerobot(here):
            found.append(here)
        elif zarr.is_zarr(here):
            buffers.append(here.name)
        else:
            found += [here / name for name in names if Path(name).suffix.lower() in OPENERS]
            buffers += [name for name in names if name.endswith(".zarr.zip")]
    return found, sorted(buffers)


def open_hdf5(path):
    path = input_file(path)
    try:
        file = h5py.File(path, "r")
        return flat.Flat(file) if flat.is_flat(file) else file
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = "is cut short, copy it again" if "truncated" in str(error) else "cannot be opened as HDF5"
        raise UserError(f"{path} {reason}: {one_line(error)}") from None


OPENERS = {".hdf5": open_hdf5, ".h5": open_hdf5}
SETS = [(lerobot.is_lerobot, lerobot.open_lerobot), (zarr.is_zarr, zarr.ReplayBuffer)]
LAYOUTS = [lerobot, zarr, flat, aloha, robomimic]


def set_opener(path):
    """The opener of a folder that is one set; None if it is none."""
    return next((opener for is_one, opener in SETS if is_one(path)), None)


def unreadable(error):
    """Why HDF5 does not read some data, and what to do, for a message."""
    if any(words in str(error) for words in ("not registered", "plugin", "can't open directory")):
        return f"needs a compression filter that h5py lacks, repack the file: {one_line(error)}"
    return f"cannot be read, copy the file again: {one_line(error)}"


def open_file(path):
    """The file for reading, by its suffix; HDF5 where no opener knows it. Raises UserError."""
    return (set_opener(path) or OPENERS.get(Path(path).suffix, open_hdf5))(path)


def read_episodes(path):
    """The episodes of one file: a list of Episode. Reads shapes and attributes, no data. Raises UserError."""
    with contextlib.closing(open_file(path)) as file:
        try:
            layout = next((layout for layout in LAYOUTS if layout.matches(file)), None)
            found = layout.episodes(path, file) if layout else []
            holds = few(file)
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError,
                MemoryError) as error:
            raise UserError(f"{path} cannot be read, copy or write it again: {one_line(error)}") from None
    if not found:
        raise UserError(f"{path} holds {holds}, but neither data/demo_<i> (robomimic) nor observations and "
                        f"action (ALOHA): see docs/data.md")
    return found
