"""A release, as it is downloaded (Download) and as the rest of the project needs it (Release)."""
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UserError, few, one_line, user_path
from .weight_files import read_json, read_weights


@dataclass
class Part:
    """A file or folder that the user names."""
    path: Path
    folder: Path              # itself, or where the file lies
    config: dict              # of config.json in the folder, {} if there is none
    weights: dict             # {official name: tensor}, mapped, in the types of the file


@dataclass
class Download:
    """The files, before a reader of robot/released.py has recognised their format."""
    name: str                 # as the user wrote it, for messages
    parts: list               # of Part
    notes: list               # what was left out so far

    @property
    def folder(self):
        return self.parts[0].folder

    @property
    def config(self):
        return self.parts[0].config

    @property
    def weights(self):
        """{official name: tensor} of all parts."""
        weights = {}
        for part in self.parts:
            twice = [key for key in part.weights if key in weights]
            if twice:
                raise UserError(f"{self.name}: {part.path} and a file before it both hold {few(twice, 3)}")
            weights |= part.weights
        return weights

    def json(self, name):
        """{} where the folder has no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}


@dataclass
class Release:
    """A downloaded policy, in the terms of this project."""
    model: str                # "dp_cnn", "pi0", ...: its file here
    config: dict              # Config fields that the folder and the shapes of the weights tell
    weights: dict             # {official name: tensor}, prefixes stripped, in the types of the file
    normalizer: object        # Normalizer with the release's statistics, or None
    description: dict         # as a checkpoint's "data": state_keys, camera_keys, image_size, ..., processing
    notes: list               # what was not used, for the user
    loading: dict = field(default_factory=dict)  # more arguments of the model's from_official
    recipe: dict = field(default_factory=dict)   # options of train.py that its authors trained it with
    free: tuple = ()          # fields of the Config that a further training may change: in no weight's shape


FACTS = ("action_dim", "state_dim", "n_cameras", "image_size")  # fields of a Config that the data decide


def describe(source, state_keys, camera_keys, image_size, action_dim, processing=None):
    """A release's description: what a checkpoint keeps of the data it was trained on (its "data").

    state_keys {key: numbers}; image_size [H, W] or None; action_dim: numbers of a robot's command;
    processing: as in YAML.
    """
    return {"source": source, "fps": None, "state_keys": dict(state_keys), "camera_keys": list(camera_keys),
            "image_size": image_size, "action_dim": action_dim, "state_dim": sum(state_keys.values()),
            "action_names": [], "instructions": [], "processing": processing or {}}


def open_download(path):
    """One path, or several with commas -> Download. Raises UserError."""
    whole = user_path(path)
    paths = [whole] if whole.exists() else [user_path(p) for p in str(path).split(",") if p]
    parts, notes = [], []
    for place in paths:
        if (place / "pretrained_model").is_dir():       # a checkpoint of LeRobot's own training
            place = place / "pretrained_model"
        folder = place if place.is_dir() else place.parent
        weights, left_out = read_weights(place)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        parts.append(Part(place, folder, config, weights))
        notes += left_out
    if not parts:
        raise UserError(f"{one_line(path)!r} names no file")
    return Download(str(path), parts, notes)
