"""ALOHA's layout, also ACT's and RDT's: one episode per file.

    action                       (T, A) float
    observations/<key>           (T, D) float: state
    observations/images/<camera> (T, H, W, 3) uint8, or T JPEG buffers
    [instruction]                a text
"""
import json
from pathlib import Path

from demos.hdf5 import make_episode, texts
from robot.errors import UserError, input_text, one_line


def matches(file):
    return "observations" in file and "action" in file


def episodes(path, file):
    """The one episode of an open file, see demos/files.py."""
    return [make_episode(path, Path(path).name, "", file, "action", "observations", [file],
                         rollout=str(path), instruction=annotation(path), usual_fps=50.0)]


def annotation(path):
    """RDT's loader draws from "instruction", a short form and paraphrases; here it is always the first."""
    for notes in sorted(Path(path).parent.glob("expanded_instruction*.json"))[:1]:
        try:
            found = texts(json.loads(input_text(notes)).get("instruction", ""), notes.name)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{notes} is no JSON object with an instruction: {one_line(error, 80)}") from None
        return (found or [""])[0]
    return ""
