"""Arrays of episodes, out of files that are opened once."""
import os

import numpy as np

from demos.files import open_file, unreadable
from robot.errors import UserError
from robot.jpeg import decode_jpeg
from robot.transforms import resize

MOST_OPEN = 64                  # a folder can hold more episode files than a process may open


class OpenFiles:
    """Files that stay open, by their paths. opener: function path -> file, called when a file is first asked
    for."""

    def __init__(self, opener):
        self.opener, self.files = opener, {}

    def __getitem__(self, path):
        # Handles belong to the process that opened them: after a fork, HDF5 would share the file position.
        key = (os.getpid(), path)
        if key not in self.files:
            if len(self.files) >= MOST_OPEN:
                self.files.pop(next(iter(self.files))).close()
            self.files[key] = self.opener(path)
        return self.files[key]

    def close(self):
        """Close the files, so that others can write them; what is read next opens them again."""
        for file in self.files.values():
            file.close()
        self.files = {}

    def __getstate__(self):                             # a process that is spawned opens files of its own
        return self.__dict__ | {"files": {}}


class Reader:
    """colour: of JPEG frames, see robot/jpeg.py. image_size: (H, W) to which pictures are brought, or None.
    Raises UserError."""

    def __init__(self, colour="bgr", image_size=None):
        self.colour, self.image_size, self.files = colour, image_size, OpenFiles(open_file)

    def read(self, episode, array, lo=None, hi=None):
        """Rows lo .. hi-1 of an Array, as they lie in the file."""
        file = self.files[episode.file]
        try:
            return file[array.path][lo:hi]
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{episode.name}: {array.path} {unreadable(error)}") from None
        except UserError as error:
            raise UserError(f"{episode.name}: {error}") from None

    def frames(self, episode, key, lo, hi):
        """Pictures of the steps lo .. hi-1 from a camera: (hi - lo, H, W, 3) uint8, RGB."""
        array = episode.obs[key]
        frames = self.read(episode, array, lo, hi)
        if array.kind == "jpeg":
            try:
                frames = np.stack([decode_jpeg(frame, self.colour) for frame in frames])
            except (UserError, ValueError) as error:    # ValueError: frames of different size
                raise UserError(f"{episode.name}: '{key}', steps {lo} to {hi - 1}: {error}") from None
        return resize(frames, self.image_size) if self.image_size else frames

    def close(self):
        self.files.close()
