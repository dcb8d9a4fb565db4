"""What a conversion wrote, compared with its source."""
import numpy as np

from robot.errors import UserError

SAMPLES = 64                    # pictures that are compared, about


def compare(episodes, reader, written, names=None):
    """Lines that say what was compared. Raises UserError at the first difference.

    written(i, name, lo, hi): rows of episode i as they were written, pictures decoded. `name` is "actions",
    "obs/<key>" or the name of a label; `names`: those that were written, by default all. Numbers are compared
    one by one, pictures at steps drawn at random.
    """
    rng, ends, pictures = np.random.default_rng(0), {}, 0
    frames = sum(e.length * sum(x.is_camera for x in e.obs.values()) for e in episodes)
    for i, e in enumerate(episodes):
        for name, array in arrays_of(e).items():
            if names and name not in names:
                continue
            if array.is_camera:
                steps = [t for t in range(e.length) if rng.random() < SAMPLES / frames or not (t or pictures)]
                source = [reader.frames(e, name.removeprefix("obs/"), t, t + 1) for t in steps]
                same = all(np.array_equal(x, written(i, name, t, t + 1)) for t, x in zip(steps, source))
                pictures += len(steps)
            else:
                x, y = reader.read(e, array), written(i, name, 0, e.length)
                same = np.array_equal(x.reshape(e.length, -1), y.reshape(len(y), -1), x.dtype.kind == "f")
                low, high = ends.get(name, (np.inf, -np.inf))
                ends[name] = min(low, np.min(x)), max(high, np.max(x))
            if not same:
                raise UserError(f"{e.name}: '{name}' was not written as it was read: convert again, and if "
                                f"that repeats, look at the disk")
    return [f"all numbers of {len(episodes)} episodes, {sum(e.length for e in episodes)} steps are as in the "
            f"source; {pictures} of {frames} pictures compared",
            *(f"  {name:28s} {low:12.6g} .. {high:.6g}" for name, (low, high) in ends.items())]


def arrays_of(episode):
    """{name: Array} of all arrays of an episode, as robomimic's layout calls them."""
    labels = {key: x for key, x in episode.labels.items() if key not in ("actions", "obs")}
    return {"actions": episode.actions, **{f"obs/{key}": x for key, x in episode.obs.items()}, **labels}
