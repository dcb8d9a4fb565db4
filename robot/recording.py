"""One recorded episode, step by step, as a robot would have seen it.

    robomimic    data/demo_<i>/actions (T, A), obs/<key> (T, D) or (T, H, W, 3)
    ALOHA        action (T, A), observations/<key>, observations/images/<camera>, T JPEG buffers among them

Needs h5py; JPEG frames need Pillow. Reading whole data sets, with all their checks, is the work of demos/.
"""
import json

import numpy as np

from .errors import UserError, few, hint, input_file, one_line, user_path
from .jpeg import decode_jpeg

# Names under which files have the instruction, as an attribute or as a text of its own.
INSTRUCTIONS = ("language_instruction", "language", "instruction", "task_description")


class Recording:
    """`states` and `cameras` are the keys of the observations that are wanted, colour the order of colours in
    JPEG frames ("bgr" or "rgb"). name, length; actions (T, A) float32; fps and instruction, None where the
    file has none. recording[t] is the raw observation of step t: states (D,), pictures (H, W, 3). Raises
    UserError."""

    def __init__(self, path, states, cameras, demo=None, colour="bgr"):
        try:
            import h5py
        except ImportError:
            raise UserError("a recorded episode is read with a package: pip install h5py") from None
        if user_path(path).is_dir():
            raise UserError(f"{path} is a folder, a recorded episode is an HDF5 file: of a LeRobot set or a "
                            f"replay buffer, python -m demos.convert FOLDER EPISODES.hdf5 makes one")
        path = input_file(path)
        try:
            self.file = h5py.File(path, "r")
        except OSError as e:
            raise UserError(f"{path} cannot be opened as HDF5: {one_line(e, 120)}") from None
        self.dataset, self.cameras, self.colour = h5py.Dataset, cameras, colour
        try:
            node, actions, observations, above = self._find(path, demo)
            self.actions = actions[:].astype(np.float32)
            self.length = len(self.actions)
            self.arrays = {key: self._array(observations, key) for key in (*states, *cameras)}
            self.fps = self._said(above, ("fps",), float) or self._said(above, ("env_args",), control_freq)
            self.instruction = self._said(above, INSTRUCTIONS, text)
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
            raise UserError(f"{path} cannot be read: {one_line(e, 200)}") from None
        if self.actions.ndim != 2 or not self.length:
            raise UserError(f"{self.name}: actions have shape {self.actions.shape}, wanted is (steps, "
                            f"dimensions)")
        for key, array in self.arrays.items():
            if array is not None and len(array) != self.length:
                raise UserError(f"{self.name}: '{key}' has {len(array)} steps, the actions {self.length}")

    def _find(self, path, demo):
        """(the episode's group, its actions, its observations, [nodes with attributes, innermost first])"""
        file = self.file
        if "data" in file:
            known = sorted((key for key in file["data"] if key.startswith("demo_")),
                           key=lambda key: (len(key), key))
            if not known or demo and demo not in known:
                raise UserError(f"{path} has no episode {demo or 'data/demo_0'!r}{hint(demo or '', known)}")
            demo = demo or known[0]
            node, self.name = file["data"][demo], f"{path.name}:{demo}"
            parts, above = ("actions", "obs"), [node, file["data"], file]
        elif "action" in file and "observations" in file:
            if demo:
                raise UserError(f"{path} is one episode: leave --demo out")
            node, self.name, parts, above = file, path.name, ("action", "observations"), [file]
        else:
            raise UserError(f"{path} holds {few(file)}, but neither data/demo_<i> (robomimic) nor action and "
                            f"observations (ALOHA)")
        for part in parts:
            if part not in node:
                raise UserError(f"{self.name} holds {few(node)}, but no '{part}'")
        return node, node[parts[0]], node[parts[1]], above

    def _array(self, group, key):
        """The array of an observation by its name or path; None if there is none, as the policy will say."""
        for path in (key, f"images/{key}"):
            if isinstance(group.get(path), self.dataset):
                return group[path]
        found = []
        group.visititems(lambda path, x: found.append(x) if isinstance(x, self.dataset)
                         and path.endswith(f"/{key}") else None)
        return found[0] if len(found) == 1 else None

    def _said(self, nodes, names, read):
        for node in nodes:
            for name in names:
                if name in node.attrs:
                    return read(np.ravel(node.attrs[name])[0])
                if read is text and isinstance(node.get(name), self.dataset):
                    return read(np.ravel(node[name][()])[0])
        return None

    def __getitem__(self, t):
        observation = {}
        for key, array in self.arrays.items():
            if array is None:
                continue
            camera = key in self.cameras            # not by its type: uint8 may be a state or JPEG bytes
            compressed = array.dtype.kind in "SO" or array.dtype == np.uint8 and array.ndim == 2
            try:
                value = decode_jpeg(array[t], self.colour) if camera and compressed else array[t]
            except (OSError, RuntimeError, UserError) as e:
                raise UserError(f"{self.name}: '{key}' of step {t} cannot be read: {one_line(e, 120)}"
                                ) from None
            observation[key] = value if camera else np.ravel(value)
        return observation

    def close(self):
        self.file.close()


def control_freq(value):
    """The control frequency in robomimic's env_args, a JSON text: at its top or in env_kwargs; else None."""
    found = json.loads(text(value))
    return found.get("control_freq") or found.get("env_kwargs", {}).get("control_freq")


def text(value):
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
