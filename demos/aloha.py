"""ALOHA's layout, also ACT's and RDT's: one episode per file.

    action                       (T, A) float
    observations/<key>           (T, D) float: state
    observations/images/<camera> (T, H, W, 3) uint8, or T JPEG buffers
"""
import json
from pathlib import Path

from demos.episodes import make_episode
from robot.errors import input_text


def matches(file):
    return "observations" in file and "action" in file


def episodes(path, file):
    """The one episode of an open file, see demos/files.py."""
    # RDT's annotation draws from "instruction", a short form and paraphrases; here it is always the first.
    notes = sorted(Path(path).parent.glob("expanded_instruction*.json"))
    noted = json.loads(input_text(notes[0])) if notes else {}
    instruction = str(noted.get("instruction", ""))
    return [make_episode(path, Path(path).name, file["action"], file["observations"], [file],
                        rollout=str(path), split=None, instruction=instruction)]
