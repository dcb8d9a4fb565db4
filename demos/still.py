"""What RDT's programs leave out of a set: short episodes, and the steps before a robot moves.

data/hdf5_vla_dataset.py of github.com/thu-ml/RoboticsDiffusionTransformer, `parse_hdf5_file`.
"""
import numpy as np

from demos.files import unreadable
from demos.reading import Reader
from robot.errors import UserError, few


def leave_out(episodes, state_keys, still, shortest):
    """-> (the episodes of at least `shortest` steps, [notes]). The first move of an episode is the first step
    at which a number of the state (of qpos, if there is one) differs from step 0 by more than `still`, in the
    units of the file. The episode begins one step before it; with still = 0, nothing is left out. Raises
    UserError if nothing is left."""
    kept, notes = [e for e in episodes if e.steps >= shortest], []
    short = [e.name for e in episodes if e.steps < shortest]
    if not kept:
        raise UserError(f"no episode has the {shortest} steps that --shortest asks for, the longest has "
                        f"{max(e.steps for e in episodes)}: lower it")
    if short:
        notes.append(f"{len(short)} episodes of less than {shortest} steps are left out: {few(short, 3)}")
    if still:
        keys = ["qpos"] if "qpos" in state_keys else state_keys
        reader = Reader()
        for e in kept:
            e.begin = begin_of(reader, e, keys, still)
        reader.close()
        total = sum(e.begin for e in kept)
        notes.append(f"{total} steps before the first move of more than {still:g} are left out")
    return kept, notes


def begin_of(reader, episode, keys, still):
    """The step before the first that has moved. Raises UserError for an episode that never moves."""
    moved = np.zeros(episode.steps, bool)
    for key in keys:
        try:
            x = reader.read(episode, episode.obs[key]).reshape(episode.steps, -1).astype(np.float32)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{episode.name}: {key!r} {unreadable(error)}") from None
        moved |= (np.abs(x - x[:1]) > still).any(1)
    if not moved.any():
        raise UserError(f"{episode.name}: no number of {few(keys)} moves by more than {still:g}: leave the "
                        f"episode out, or lower --still")
    return int(moved.argmax()) - 1
