"""What `python -m tools.embed` wrote: the pictures and instructions of a data set as tokens of SigLIP and T5.

    FOLDER/language.hdf5      texts (K,); tokens/<k> (L, D_t5) float32, of texts[k]; texts[0] is ""
                              background (N, D_vit) float16: tokens of a picture without content
    FOLDER/episode_<i>.hdf5   <camera> (T, N, D_vit) float16: N tokens of each step's picture
    attributes of all         format_version, siglip, t5: which weights made them
    ... of an episode         name, actions: as in the data set, to know it again

They stay in the files: a picture of SigLIP so400m has 729 x 1152 numbers, 1.7 MB.
"""
from pathlib import Path

import h5py
import numpy as np
import torch

from demos.reading import OpenFiles
from robot.errors import UserError, fingerprint, hint, input_file, one_line, user_path

FORMAT = 1
HOW = "python -m tools.embed DATA --t5 FOLDER --siglip FOLDER --out FOLDER"


def embed(demos, module, given, options):
    """Let a set give tokens instead of pictures and texts. given: {field: value} of preset and --set. ->
    {field of Config: value}. Raises UserError."""
    if not options.embeddings:
        if given.get("encoders") in ("none", "images"):
            raise UserError(f"{options.model} {options.preset} takes pictures and instructions as tokens: "
                            f"{HOW}, then --embeddings with that folder")
        return {}
    if not hasattr(module.Config, "encoders"):
        raise UserError(f"--embeddings: {options.model} does not read SigLIP's and T5's tokens, rdt does")
    if options.robots:
        raise UserError("--embeddings are of one robot, not of robots: in YAML")
    demos.embeddings = Embeddings(options.embeddings, demos, [key for _, key in demos.processing.places])
    return demos.embeddings.facts(given, options.preset)


def open_part(path):
    """One of the files, for reading. Raises UserError."""
    try:
        file = h5py.File(input_file(path), "r")
    except OSError as error:
        raise UserError(f"{path} cannot be opened, run tools.embed again: {one_line(error, 100)}") from None
    if file.attrs.get("format_version") != FORMAT:
        file.close()
        raise UserError(f"{path} was not written by this version of tools.embed: run it again")
    return file


def identity(demos, e):
    """What identifies an episode: its name, and a fingerprint of its actions as the file has them."""
    return demos.episode_names[e], fingerprint(demos.raw_actions(e))


def read_language(folder):
    """{text: tokens (L, D_t5) float32 array}"""
    with open_part(Path(folder) / "language.hdf5") as file:
        return {text: file[f"tokens/{k}"][:] for k, text in enumerate(file["texts"].asstr()[:])}


class Embeddings:
    """The tokens of a data set. demos: a demos.dataset.Demos. places: camera keys in the network's order,
    None for a place without a camera. Raises UserError if the tokens were made from other data."""

    def __init__(self, folder, demos, places):
        self.folder, self.places, self.files = user_path(folder), list(places), OpenFiles(open_part)
        if not (self.folder / "language.hdf5").is_file():
            raise UserError(f"--embeddings {folder} has no language.hdf5: it should be a folder from {HOW}")
        self.language = {text: torch.from_numpy(x) for text, x in read_language(self.folder).items()}
        with open_part(self.folder / "language.hdf5") as file:
            self.background = torch.from_numpy(file["background"][:])
        for text in dict.fromkeys(demos.instructions):
            if text not in self.language:
                raise UserError(f"--embeddings {folder} has no instruction {one_line(repr(text), 80)}: run "
                                f"tools.embed again, which adds it")
        known = self.known()
        self.of_episode, self.begins = [], []
        for e in range(len(demos.episodes)):
            found = known.get(identity(demos, e))
            if found is None:
                raise UserError(f"--embeddings {folder} has no episode {demos.episode_names[e]} with these "
                                f"actions: they are of other data, or tools.embed was stopped; run it again")
            self.check(*found, demos, e)
            self.of_episode.append(found[0])
            self.begins.append(demos.episodes[e].begin)
        self.texts, self.shown = demos.instructions, demos.shown
        self.empty = self.language[""]

    def known(self):
        """{(name, fingerprint of the actions): (file, {camera: shape})}"""
        found = {}
        for path in sorted(self.folder.glob("episode_*.hdf5")):
            with open_part(path) as file:
                shapes = {key: file[key].shape for key in file}
                found[file.attrs["name"], file.attrs["actions"]] = path, shapes
        return found

    def check(self, path, shapes, demos, e):
        steps = demos.episodes[e].steps
        for key in [self.places[v] for v in np.flatnonzero(demos.shown[e])]:
            if key not in shapes:
                raise UserError(f"{path} has no camera {key!r}{hint(key, shapes)}")
            if shapes[key] != (steps, *self.background.shape):
                raise UserError(f"{path}: {key!r} has shape {shapes[key]}, {demos.episode_names[e]} and the "
                                f"background make {(steps, *self.background.shape)}: run tools.embed again")

    def facts(self, given, preset):
        """{field of rdt's Config: value}. given: {field: value} of preset and --set, with which they must
        agree."""
        longest = max(len(self.language[text]) for text in self.texts)
        facts = {"vit_width": self.background.shape[1], "image_tokens": self.background.shape[0],
                 "t5_width": self.empty.shape[1]}
        patches = (given["vit_size"] // given["patch_size"]) ** 2 if "vit_size" in given else None
        wanted = given | ({"image_tokens": patches} if patches and not given.get("image_tokens") else {})
        for field in ("vit_width", "image_tokens", "t5_width"):
            if wanted.get(field, facts[field]) != facts[field]:
                raise UserError(f"--embeddings {self.folder} have {field} {facts[field]}, the model {preset} "
                                f"{wanted[field]}: they were made by encoders of another size")
        if longest > given.get("text_len", longest):
            raise UserError(f"--embeddings {self.folder}: the longest instruction has {longest} tokens, "
                            f"text_len is {given['text_len']}")
        facts |= {} if "text_len" in given else {"text_len": longest}
        # A release that brings its encoders keeps them, to act with them.
        return facts | ({} if given.get("encoders") in ("images", "frozen") else {"encoders": "none"})

    def batch(self, episodes, steps):
        """Episodes (B,) and their steps (B, To), numbers -> image_embeds (B, To places N, D_vit), lang_embeds
        (B, L, D_t5), lang_mask (B, L), background_embeds (B, N, D_vit), empty_embeds (B, n, D_t5). A place
        without a camera holds the background."""
        B, (N, D) = len(episodes), self.background.shape
        images = self.background.expand(B, steps.shape[1], len(self.places), N, D).clone()
        for b, e in enumerate(episodes):
            file = self.files[self.of_episode[e]]
            for k, step in enumerate(steps[b].tolist()):
                for v in np.flatnonzero(self.shown[e]):
                    file[self.places[v]].read_direct(images[b, k, v].numpy(), np.s_[self.begins[e] + step])
        told = [self.language[self.texts[e]] for e in episodes]
        lengths = torch.tensor([len(x) for x in told])
        lang = torch.nn.utils.rnn.pad_sequence(told, batch_first=True)
        return {"image_embeds": images.flatten(1, 3), "lang_embeds": lang,
                "lang_mask": torch.arange(lang.shape[1]) < lengths[:, None],
                "background_embeds": self.background.expand(B, -1, -1),
                "empty_embeds": self.empty.expand(B, -1, -1)}
