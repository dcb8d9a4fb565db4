"""What demos/check.py finds, and what it looks at: names of all findings, and recordings as plain arrays."""
from dataclasses import dataclass, field

import numpy as np

from robot.errors import few, one_line

CLOCKS = ("timestamp", "timestamps", "time", "times")    # names of arrays that hold time stamps

# Name of a finding: what it does to training, how to mend it.
FINDINGS = {
    "constant dimension": ("it is shifted, not scaled, and tells a policy nothing",
                           "leave it out if you like"),
    "near-constant dimension": ("it is shifted, not scaled: a policy hardly sees it, or sends it noise as "
                                "large as its motion", "check its unit, or leave it out"),
    "spikes": ("scaled from end to end, all other values look alike to a policy",
               "cut the spikes, or train with --normalizer quantile"),
    "idle start": ("a policy learns to stand still", "cut these steps, or train with --still"),
    "angle wrap": ("angles that are nearly equal are far apart as numbers, and their mean points elsewhere",
                   "unwrap it in every episode, or write sine and cosine"),
    "late action": ("a policy learns to command where it is, and stands still",
                    "write the command, or the state of a later step, as the action"),
    "slow state": ("a policy does not see what its last chunk has done when it plans the next one",
                   "check the clocks of the recorder, or train with a longer --set horizon"),
    "clipped actions": ("a policy cannot command what lies beyond the actions it is trained on",
                        "train on these, too, or leave them out"),
    "padding": ("padded actions are masked: they cost time and teach nothing", "a shorter horizon, or longer "
                "episodes"),
    "duplicate episodes": ("they count twice; held out, they make validation look better than it is",
                           "delete all but one"),
    "mixed rates": ("one step is not the same time everywhere, so that speeds differ for no reason",
                    "resample to one rate, or correct 'fps'"),
    "dropped frames": ("a step there moves as far as several, and a policy learns such leaps",
                       "fill the gaps in by interpolation, or cut the episode there"),
    "missing instruction": ("a policy that reads gets an empty text", "set 'language_instruction'"),
    "outlier length": ("it weighs more or less than others, and may hold more than the task",
                       "look at it, cut it or leave it out"),
    "outlier speed": ("a policy imitates the mixture of speeds", "check its rate and unit, or leave it out"),
    "outlier start": ("a policy sees this pose once, at most",
                      "check its units and calibration, or record more from there"),
    "black camera": ("a policy learns to ignore the camera", "check its plug, leave out camera or episodes"),
    "frozen camera": ("the pictures do not belong to the states beside them",
                      "cut or leave out these episodes"),
    "swapped cameras": ("a policy cannot rely on either of them", "exchange the arrays in these episodes"),
    "changed camera": ("a policy sees a scene that the others do not show",
                       "turn or exchange it back in these episodes"),
}


@dataclass
class Finding:
    name: str                   # most are in FINDINGS
    what: str                   # what was found, and where
    level: str = "fault"        # or "note": true, and to be expected of many sound sets
    episodes: list = field(default_factory=list)        # numbers of those it is about; empty: the whole set

    def line(self):
        does, mend = FINDINGS.get(self.name, ("", ""))
        return one_line(f"{self.name}: {self.what}" + (f": {does}; {mend}" if does else ""), 420)


@dataclass
class Recordings:
    """What was read of the episodes that fit together."""
    episodes: list              # demos.episodes.Episode
    lengths: np.ndarray         # (E,)
    numbers: dict               # key -> (N, D) float32, all episodes in a row; "actions" and the states
    fps: float
    times: list                 # of each episode: (T,) float64 time stamps, or None
    split: tuple = None         # (numbers of the episodes to train on, of those held out)

    def __post_init__(self):
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.states = [key for key in self.numbers if key != "actions"]
        nothing = self.numbers["actions"][:, :0]
        self.state = np.concatenate([nothing, *(self.numbers[key] for key in self.states)], axis=1)
        self.state_columns = [(key, d) for key in self.states for d in range(self.numbers[key].shape[1])]
        self.motion = self.state if self.state_columns else self.numbers["actions"]     # how the arm moved

    def rows(self, e):
        """Where the steps of episode e lie in the arrays of `numbers`."""
        return slice(self.starts[e], self.starts[e] + self.lengths[e])

    def part(self, key, e):
        return self.numbers[key][self.rows(e)]

    def named(self, numbers):
        """Names of episodes, for a message."""
        one_file = len({e.file for e in self.episodes}) == 1
        names = [self.episodes[e].name for e in numbers]
        return few((name.rpartition(":")[2] if one_file else name for name in names), 4)


def of(count, all_of, what="episodes"):
    return f"{count} of {all_of} {what}"
