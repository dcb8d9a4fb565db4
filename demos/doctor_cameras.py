"""What can be wrong with the cameras of a data set. A sample of the frames is looked at, one at a time, so
that the pictures need not fit into memory."""
import itertools
import zlib
from dataclasses import dataclass, field

import numpy as np

from demos.findings import Finding, of
from demos.limits import refuse_beyond_memory
from robot.jpeg import decode_jpeg
from robot.looks import change_of, look_of, spread, swapped

PICTURES = 4000                 # are read of a set, half a minute of JPEG frames of 640 x 480
FRAMES = 8                      # of an episode, evenly spread over it; two where there are many episodes
DARK = 16                       # the black of video: a picture without a brighter value shows nothing
MOVED = 0.05                    # of the range: where the state has gone so far, the picture has changed
LEAST = 3                       # episodes, to say how a camera usually looks
SHOWN = 160                     # pixels a side of the pictures that are kept for the page


@dataclass
class Seen:
    """What is kept of one camera in one episode."""
    steps: np.ndarray           # (F,) which frames were looked at
    marks: list                 # a checksum of each
    low: int                    # darkest and brightest value of all of them
    high: int
    looks: np.ndarray           # (F, 8, 8, 3), see robot/looks.py
    size: tuple                 # (H, W)
    first: np.ndarray = field(repr=False)   # the first one, reduced for the page


def sample(lengths, cameras):
    """{episode: steps to look at}; not every episode of a set that has very many."""
    n = len(lengths)
    each = int(np.clip(PICTURES // max(1, n * cameras), 2, FRAMES))
    most = max(1, PICTURES // (each * max(1, cameras)))
    return {int(e): spread(lengths[e], each) for e in spread(n, most)}


def look_at(file, array, steps, colour):
    """-> Seen, of a camera's Array in an open file. Raises UserError, OSError, KeyError, RuntimeError."""
    marks, looks, low, high = [], [], 255, 0
    if array.kind == "camera":
        refuse_beyond_memory(f"a picture of {array.path}", 2 * int(np.prod(array.shape[1:])), "resize them")
    for t in steps:
        frame = file[array.path][int(t):int(t) + 1][0]       # of a video, only slices can be had
        frame = decode_jpeg(frame, colour) if array.kind == "jpeg" else np.asarray(frame)
        marks.append(zlib.crc32(np.ascontiguousarray(frame)))
        looks.append(look_of(frame[None])[0])
        low, high = min(low, int(frame.min())), max(high, int(frame.max()))
        if t == steps[0]:
            k = -(-max(frame.shape[:2]) // SHOWN)
            first, size = frame[::k, ::k].copy(), frame.shape[:2]
    return Seen(steps, marks, low, high, np.stack(looks), size, first)


def cameras(found, seen):
    """Findings. seen: {camera: {episode: Seen}}, numbers of found.episodes."""
    for camera, of_episode in seen.items():
        yield from blank(camera, of_episode)
        yield from frozen(found, camera, of_episode)
    yield from unlike(found, seen)


def blank(camera, of_episode):
    for says, those in (
            (f"nothing brighter than {DARK}", [e for e, s in of_episode.items() if s.high <= DARK]),
            ("a single colour", [e for e, s in of_episode.items() if s.low == s.high > DARK])):
        if those:
            yield Finding("black camera", f"'{camera}' shows {says} in {of(len(those), len(of_episode))}",
                          "fault", those)


def frozen(found, camera, of_episode):
    """For a second or more all frames are the same to the last bit, while the state moves on."""
    reach = np.maximum(np.ptp(found.motion, axis=0), 1e-9)
    those = {}
    for e, s in of_episode.items():
        if s.high <= DARK or s.low == s.high:
            continue                            # blank, which says it better
        x = found.motion[found.rows(e)]
        for _, run in itertools.groupby(range(len(s.steps)), key=s.marks.__getitem__):
            run = list(run)
            first, last = s.steps[run[0]], s.steps[run[-1]]
            if last - first >= found.fps and (np.ptp(x[first:last + 1], axis=0) > MOVED * reach).any():
                those.setdefault(e, (first, last))
    if those:
        e = next(iter(those))
        yield Finding("frozen camera", f"'{camera}' stands still while the robot moves, in "
                      f"{of(len(those), len(of_episode))}, such as {found.named([e])} from step "
                      f"{those[e][0]} to {those[e][1]}", "fault", list(those))


def unlike(found, seen):
    """Episodes in which a camera looks like another one, or like its mirror image, in the others. How it
    looks is the mean over an episode; how it usually looks, the median of these."""
    usual, looks = {}, {}
    for camera, of_episode in seen.items():
        means = {e: s.looks.mean(0) for e, s in of_episode.items() if s.high > DARK}
        if len(means) >= LEAST:
            usual[camera] = np.median(list(means.values()), axis=0)
            for e, look in means.items():
                looks.setdefault(e, {})[camera] = look
    pairs, changed = {}, {}
    for e, look in looks.items():
        crossed = list(swapped(look, usual))
        for pair in crossed:
            pairs.setdefault(pair, []).append(e)
        for camera in look:
            change = change_of(look[camera], usual[camera])
            if change and not any(camera in pair for pair in crossed):
                changed.setdefault((camera, change), []).append(e)
    for (a, b), those in pairs.items():
        yield Finding("swapped cameras", f"'{a}' and '{b}' look like each other in "
                      f"{of(len(those), len(looks))}: {found.named(those)}", "fault", those)
    for (camera, change), those in changed.items():
        yield Finding("changed camera", f"'{camera}' is {change} in {of(len(those), len(looks))}: "
                      f"{found.named(those)}", "fault", those)
