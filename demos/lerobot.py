"""LeRobot's data sets, versions 2.0, 2.1 and 3: a folder of parquet tables and videos.

    meta/info.json    version, fps, features {name: {dtype, shape, names}}, splits, patterns of paths
    data/...parquet   a row per step: every feature that is numbers; pictures of dtype "image" as PNG
    videos/...mp4     pictures of dtype "video", one camera in a file
    2.x               meta/episodes.jsonl, meta/tasks.jsonl; each episode has files of its own
    3.x               meta/episodes/...parquet, meta/tasks.parquet; a file holds many episodes. The row of an
                      episode says in which files it lies, and where in the videos, in seconds

Every array is called "<episode>/<feature>". Videos are decoded when they are asked for (demos/video.py). This
needs the packages pyarrow, av for videos and Pillow for pictures in tables.
"""
import collections.abc
import json
import re
from math import prod
from pathlib import Path

import numpy as np

from demos.episodes import Array, Episode, Rows, kind_of
from demos.parquet import Tables
from demos.video import Video, has_av
from robot.errors import UserError, few, input_text, one_line
from robot.jpeg import decode_jpeg

KEPT_BY_LEROBOT = ("timestamp", "frame_index", "episode_index", "index", "task_index")
STATES = ("observation.state", "observation.environment_state", "state")
ACTIONS = ("action", "actions")
HELD_OUT = ("valid", "val", "validation", "eval", "test")       # names of a split; the first that is there
WITHIN = 0.25                   # of a step: as far may a time be from where it belongs
VIDEOS = 24                     # so many stay open
UNFINISHED = ".part"            # a set is called so until it has been compared with its source


def matches(file):
    return isinstance(file, LeRobot)


def is_lerobot(path):
    return (Path(path) / "meta" / "info.json").is_file()


def open_lerobot(path):
    if Path(path).name.endswith(UNFINISHED):
        raise UserError(f"{path}: a conversion was stopped before it was compared with its source: delete it "
                        f"and convert again")
    try:
        return LeRobot(path)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: meta does not list its episodes and tasks as LeRobot does, copy it again: "
                        f"{one_line(repr(error), 80)}") from None


class LeRobot(collections.abc.Mapping):
    """An open data set: {"<episode>/<feature>": Rows}. Raises UserError.

    fps; features {name: {"dtype", "shape", "names"}}; meta {episode: {"length": ..}}; tasks {number: text}
    """

    def __init__(self, path):
        self.root, self.tables, self.videos, self.spans = Path(path), Tables(path), {}, {}
        self.info = read_info(self.root)
        self.fps, self.features = self.info["fps"], self.info["features"]
        self.many = self.info["codebase_version"].startswith("v3")          # episodes in a file
        read = (lambda name: self.tables.rows(self.root / name)) if self.many else (
            lambda name: read_lines(self.root / f"{name}.jsonl"))
        rows = read("meta/episodes")
        self.meta = {row["episode_index"]: row for row in sorted(rows, key=lambda row: row["episode_index"])}
        said = self.info.get("total_episodes", len(rows))
        if not len(rows) == len(self.meta) == said:
            raise UserError(f"{path}: meta/info.json says {said} episodes, meta/episodes has {len(rows)}: "
                            f"copy it again")
        # The texts are the index of a pandas table, whose column has a name that depends on the version.
        text = lambda row: next(x for x in (row.get("task"), *row.values()) if isinstance(x, str))
        self.tasks = {row["task_index"]: text(row)
                      for row in read("meta/tasks.parquet" if self.many else "meta/tasks")}

    def path(self, kind, e, camera=""):
        """The file of an episode: kind "data", or "video" of a camera."""
        row, values = self.meta[e], {"episode_index": e, "video_key": camera}
        if self.many:
            part = f"videos/{camera}" if camera else "data"
            values |= {key: row[f"{part}/{key}"] for key in ("chunk_index", "file_index")}
        else:
            values["episode_chunk"] = e // self.info.get("chunks_size", 1000)
        fill = lambda found: str(values[found[1]]).zfill(int(found[2] or 0))
        return self.root / re.sub(r"\{(\w+)(?::0?(\d)d)?\}", fill, self.info[f"{kind}_path"])

    def span(self, e):
        """(file, first row, length) of the rows of an episode."""
        if e not in self.spans:
            file = self.path("data", e)
            index = self.tables.column(file, "episode_index")
            begins = np.flatnonzero(np.diff(index, prepend=index[:1] - 1)).tolist()
            for lo, hi in zip(begins, [*begins[1:], len(index)]):
                span = file, lo, hi - lo
                if self.spans.setdefault(int(index[lo]), span) != span:
                    raise UserError(f"{file}: the rows of episode {index[lo]} do not stand together: sort "
                                    f"them")
        if e not in self.spans:
            raise UserError(f"{file} lacks episode {e}, which meta says is there: copy it again")
        return self.spans[e]

    def shape(self, key):
        """Shape of a feature in one step. LeRobot writes [1] for a single number."""
        shape = tuple(self.features[key].get("shape") or ())
        return () if shape == (1,) else shape

    def numbers(self, e, key, lo=0, hi=None):
        file, first, length = self.span(e)
        rows = self.tables.column(file, key)
        if rows[:1].size != prod(self.shape(key)):
            raise UserError(f"{file}: '{key}' has rows of {rows.shape[1:]}, meta/info.json says "
                            f"{self.shape(key)}: correct it")
        rows = rows[first:first + length][lo:hi]
        return rows.reshape(len(rows), *self.shape(key))

    def video(self, e, key):
        path = self.path("video", e, key)
        if path not in self.videos:
            if not path.exists():
                raise UserError(f"{path} is missing: copy it again")
            if len(self.videos) >= VIDEOS:
                self.videos.pop(next(iter(self.videos))).close()
            self.videos[path] = Video(path)
        return self.videos[path]

    def frames(self, e, key, lo, hi):
        """(hi - lo, H, W, 3) uint8, RGB"""
        if self.features[key]["dtype"] == "video":
            times = self.numbers(e, "timestamp", lo, hi).astype(np.float64)
            begin = self.meta[e][f"videos/{key}/from_timestamp"] if self.many else 0.0
            video = self.video(e, key)
            within = min(WITHIN, 0.5 / video.per_step(self.fps)) / self.fps     # else the frame before it
            return video.at(times + begin, within)
        file, first, _ = self.span(e)
        found = []
        for step, data in enumerate(self.tables.pictures(file, key, first + lo, first + hi), lo):
            if data is None:
                raise UserError(f"{file} has no picture at step {step} of episode {e}: copy it again")
            found.append(decode_jpeg(np.frombuffer(data, np.uint8), "rgb"))
        return np.stack(found)

    def __getitem__(self, name):
        e, _, key = name.partition("/")
        if not e.isdigit() or int(e) not in self.meta or key not in self.features:
            raise KeyError(name)
        read = self.frames if self.features[key]["dtype"] in ("video", "image") else self.numbers
        return Rows(self.span(int(e))[2], lambda lo, hi: read(int(e), key, lo, hi))

    def __iter__(self):
        return (f"{e}/{key}" for e in self.meta for key in self.features)

    def __len__(self):
        return len(self.meta) * len(self.features)

    def close(self):
        for video in self.videos.values():
            video.close()
        self.videos, self.tables.kept = {}, {}


# ---- meta


def read_info(root):
    path = Path(root) / "meta" / "info.json"
    try:
        info = json.loads(input_text(path))
        version, fps, features = (info[key] for key in ("codebase_version", "fps", "features"))
        assert all(isinstance(feature["dtype"], str) for feature in features.values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} does not describe a LeRobot data set, copy it again: "
                        f"{one_line(repr(error), 80)}") from None
    if not re.fullmatch(r"v[23]\.\d+", str(version)):
        raise UserError(f"{root} is a LeRobot data set of version {one_line(version, 20)!r}; v2.0, v2.1 and "
                        f"v3 are read: convert it with LeRobot's scripts")
    if type(fps) not in (int, float) or not 0 < fps < 1e6:
        raise UserError(f"{path}: fps is {one_line(fps, 30)!r}, it must be steps per second")
    return info


def read_lines(path):
    """The objects of a file that has one in every line."""
    found = []
    for number, line in enumerate(input_text(path).splitlines(), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is no JSON: copy it again") from None
    return found


def splits_of(file):
    """({episode: "train", "valid" or ""} or None, [note]). A split is a range of episodes, "0:40". LeRobot
    writes {"train": all of them}, which says nothing."""
    if all("split" in row for row in file.meta.values()):           # as demos/to_lerobot.py writes them
        return {e: row["split"] for e, row in file.meta.items()}, []
    named = {}
    for name, text in (file.info.get("splits") or {}).items():
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if not found:
            return None, [f"meta/info.json: the split {one_line(name, 30)} is {one_line(text, 30)!r}, no "
                          f"range as 0:40, so splits are not used"]
        named[name] = range(int(found[1]), int(found[2]))
    train, valid = named.get("train", ()), next((named[name] for name in HELD_OUT if name in named), None)
    rest = [e for e in file.meta if e not in train]
    if not rest or not train:
        return None, []
    if valid is None:
        return ({e: "valid" if e in rest else "train" for e in file.meta},
                ["meta/info.json has the split train alone, the other episodes are held out"])
    return {e: "valid" if e in valid else "train" if e in train else "" for e in file.meta}, []


def names_of(feature, dim):
    """The names of a feature's numbers: a list, or {"motors": a list}; [] if there is not one for each."""
    def flat(x):
        if isinstance(x, (list, tuple, dict)):
            return [name for part in (x.values() if isinstance(x, dict) else x) for name in flat(part)]
        return [str(x)]
    names = flat(feature.get("names") or [])
    return names if len(names) == dim else []


# ---- episodes


def episodes(path, file):
    """The episodes of an open data set, see demos/files.py."""
    actions = next((key for key in ACTIONS if key in file.features), None)
    if actions is None:
        raise UserError(f"{path} has the features {few(file.features)}, but no 'action'")
    splits, notes = splits_of(file)
    found = []
    for e, row in file.meta.items():
        name = f"{Path(path).name}:episode_{e}"
        check_steps(file, e, name)
        tasks = list(dict.fromkeys(file.numbers(e, "task_index").tolist()))
        if not set(tasks) <= set(file.tasks):
            raise UserError(f"{name}: task_index {tasks[0]} stands for no text in meta/tasks: add it")
        arrays = {key: describe(file, e, key) for key in file.features if key not in KEPT_BY_LEROBOT[1:]}
        seen = [key for key, array in arrays.items() if array and key != actions and (
            array.kind == "camera" or key.startswith("observation") or key in STATES)]
        found.append(Episode(
            file=str(path), name=name, actions=arrays[actions], obs={key: arrays[key] for key in seen},
            labels={key: x for key, x in arrays.items() if x and key not in (*seen, actions)},
            unread={key: f"{one_line(file.features[key]['dtype'], 20)}, no numbers"
                    for key, x in arrays.items() if not x},
            fps=float(file.fps), instruction=file.tasks[tasks[0]], action_names=arrays[actions].names,
            rollout=(str(path), row["rollout"]) if "rollout" in row else None,
            split=splits and splits[e], notes=notes + [
                "has several tasks, the first is its instruction"] * (len(tasks) > 1)))
    return found


def check_steps(file, e, name):
    """Refuse an episode that lacks steps."""
    length, said = file.span(e)[2], file.meta[e]["length"]
    if length != said:
        raise UserError(f"{name} has {length} rows in {file.path('data', e)}, meta/episodes says {said}: "
                        f"copy both again")
    index, times = file.numbers(e, "frame_index"), file.numbers(e, "timestamp").astype(np.float64)
    wrong = np.flatnonzero(index != np.arange(length))
    if len(wrong):
        raise UserError(f"{name}: the row of step {wrong[0]} is missing, frame_index is {index[wrong[0]]} "
                        f"there: copy the episode again or leave it out")
    wrong = np.flatnonzero(abs(times - times[0] - index / file.fps) * file.fps > WITHIN)
    if len(wrong):
        raise UserError(f"{name}: step {wrong[0]} has the timestamp {times[wrong[0]]:.4f} s, at {file.fps:g} "
                        f"Hz it should be {times[0] + wrong[0] / file.fps:.4f}: mend it or leave the episode "
                        f"out")


def describe(file, e, key):
    """The Array of a feature in an episode; None if it has no numbers."""
    feature, length, path = file.features[key], file.span(e)[2], f"{e}/{key}"
    if feature["dtype"] in ("video", "image"):
        return describe_camera(file, e, key)
    try:
        dtype = np.dtype(feature["dtype"])
    except TypeError:
        return None
    if dtype.kind not in "fiub":
        return None
    shape = length, *file.shape(key)
    array = Array(path, shape, dtype, *kind_of(path, shape, dtype))
    if array.kind == "state" and key not in STATES:
        array.kind, array.why = "other", "not observation.state: shape_meta can name it"
    array.names = names_of(feature, prod(file.shape(key)))
    return array


def describe_camera(file, e, key):
    """A camera's size and number of frames are what the header of its video says; without av or the video,
    what meta says, since a policy may need no cameras."""
    feature, frames, shape = file.features[key], file.span(e)[2], file.shape(key)
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):   # what is decoded has them last
        shape = (*shape[1:], *shape[:1])
    info = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
    depth, fault = info.get("is_depth_map") or info.get("video.is_depth_map"), ""
    if feature["dtype"] == "video":
        try:
            video = file.video(e, key) if has_av() else None
        except UserError as error:          # the file is missing or damaged
            video, fault = None, str(error)
        if video and video.frames:          # some containers do not count them
            begin = round(file.meta[e][f"videos/{key}/from_timestamp"] * file.fps) if file.many else 0
            frames = min(frames, max(-(-video.frames // video.per_step(file.fps)) - begin, 0))
        shape = (*video.size, *shape[2:]) if video else shape
    kind, why = ("other", "a depth map") if depth else kind_of(key, (frames, *shape), np.dtype(np.uint8))
    return Array(f"{e}/{key}", (frames, *shape), np.dtype(np.uint8), kind, why, fault=fault)
