"""pi0.5 that first says a subtask and then acts on it: the high-level inference of arXiv:2504.16054, small.

    python -m tools.subtask --seed 0 --steps 3000 --out out/subtask       flags as train.py's

In the paper one model is asked twice: what is to be done now, which it answers in words, and how, which the
action expert answers. So it is here. The text, instruction and state, is continued with the subtask that is
under way: "red block to the left;8a7f00;grasp red". In training it comes from the demonstration, and the text
loss of pi05.py learns to say it. A policy lets the model say it (`complete_text`), and the expert reads it.

It differs from the paper, where the expert is told the subtask in place of the instruction: here a chunk that
begins with "grasp red" ends on the way to a side, which the subtask does not name.

docs/results.md says whether it helps.
"""
import dataclasses
import sys
import types

import torch

import pi05
import train
from robot.errors import run_command
from tools import distributed
from tools.options import parse_options, with_recipe

HELD = 8                        # number of `object` that says whether a block is held (robot/tabletop.py)
GRIPPER = 2                     # number of an action that closes the fingers where it is above 0


def subtasks(config, batch):
    """What is under way at each item's first action: "reach red", "grasp red", "carry left", "place left"."""
    held, closing = batch["object"][:, 0, HELD] > 0, batch["actions"][:, 0, GRIPPER] > 0
    for codes, holds, closes in zip(batch["text"], held.tolist(), closing.tolist()):
        colour, *_, side = config.decode_text(codes).partition(";")[0].split()
        if holds:
            yield f"carry {side}" if closes else f"place {side}"
        else:
            yield f"grasp {colour}" if closes else f"reach {colour}"


def continued(text, endings):
    """Codes (B, L), each row continued with a text of its own behind a semicolon."""
    text = text.clone()
    for row, ending in zip(text, endings):
        codes = torch.tensor([byte + 1 for byte in f";{ending}".encode()])
        row[(n := int((row > 0).sum())):n + len(codes)] = codes
    return text


class SaysSubtask(pi05.Pi05):
    def loss(self, batch, noise=None, t=None):
        text = continued(batch["text"], subtasks(self.config, batch))
        return super().loss(batch | {"text": text}, noise, t)

    def sample(self, batch, *args, **kwargs):
        text = self.complete_text(batch, continued(batch["text"], [""] * len(batch["text"])))
        return super().sample(batch | {"text": text}, *args, **kwargs)


# In train.py's eyes a model file like any other, with room for "blue block to the right;8a7f00;carry right".
MODULE = types.SimpleNamespace(**vars(pi05) | {"Model": SaysSubtask, "PRESETS": {"tiny": {"text_len": 42}}})


def main(argv=None):
    options, explicit = parse_options(["--model", "pi05", *(sys.argv[1:] if argv is None else argv)])
    options = dataclasses.replace(options, extra={"object": 9}, out=options.out or "out/subtask")
    return train.train(with_recipe(options, explicit, MODULE), MODULE)


if __name__ == "__main__":
    with distributed.whole_exit():
        run_command(main)
