"""Episodes -> a LeRobot data set, version 3.0 or 2.1 (demos/lerobot.py has the layout).

Pictures become videos without loss (x264, RGB, a key frame at every other frame), so that no number changes.

Names that begin with "observation." stay. A camera `top` becomes observation.images.top. The other states
stand side by side in observation.state, in the order in which open_demos reads them; only robomimic's
`object`, which a simulator alone knows, becomes observation.environment_state. Labels keep their names.
LeRobot has no place for held-out episodes that are no range, nor for parts of one recording: they stand in
columns `split` and `rollout` of the episodes, which it passes over.
"""
import json
import shutil
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from demos.keys import SIMULATED
from demos.lerobot import KEPT_BY_LEROBOT, UNFINISHED, LeRobot
from demos.parquet import import_parquet
from demos.reading import Reader
from demos.verify import arrays_of, compare
from demos.video import VideoWriter, import_av
from robot.errors import UserError, few, one_line, say, write_json

VERSIONS = {"lerobot": "v3.0", "lerobot2.1": "v2.1"}
CHUNK = "chunk-{chunk_index:03d}/file-{file_index:03d}"
PATHS = {"v3.0": (f"data/{CHUNK}.parquet", f"videos/{{video_key}}/{CHUNK}.mp4"),
         "v2.1": ("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                  "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")}
PER_CHUNK = 1000                # files in a folder
DATA_MB, VIDEO_MB = 100, 200    # v3: a file that has grown to this is followed by another
AT_ONCE, SAMPLED = 16, 20       # pictures in memory; pictures of an episode in its statistics
STATE, ENVIRONMENT = "observation.state", "observation.environment_state"


def write_lerobot(episodes, out, version="v3.0", image_size=None, colour="bgr"):
    """Write the folder `out`; -> lines that say what was compared. Raises UserError."""
    import_parquet(out)
    part, reader = Path(f"{out}{UNFINISHED}"), Reader(colour, image_size)
    if part.exists():
        raise UserError(f"{part} is there, from a conversion that was stopped: delete it")
    if len({e.fps for e in episodes}) > 1:
        raise UserError(f"{episodes[0].name} has {episodes[0].fps:g} Hz, others have another rate, and "
                        f"LeRobot has one for a set: --fps N gives one to all")
    sources = sources_of(episodes[0])
    left = {name for e in episodes for name in arrays_of(e)} - {name for x in sources.values() for name in x}
    if left:
        say(f"not taken: {few(sorted(left))} (a name that LeRobot uses itself, or not in "
            f"{episodes[0].name})")
    try:
        writer = Writer(part, version, describe(episodes, sources, reader), episodes)
        with tqdm(total=sum(e.length for e in episodes), unit="step", disable=None) as bar:
            for episode in episodes:
                writer.add(episode, sources, reader)
                bar.update(episode.length)
        writer.finish()
        lines = compare_written(episodes, reader, part, sources, version)
        part.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {part}, make room or take another folder: {one_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        reader.close()
    return lines


def sources_of(episode):
    """{LeRobot's name: [our names]} of all arrays that are written. Numbers may stand side by side."""
    found = {"action": ["actions"]}
    for key, array in sorted(episode.obs.items()):
        name = f"observation.{key}"
        if key.startswith("observation."):
            name = key
        elif array.is_camera:
            name = f"observation.images.{key}"
        elif key in SIMULATED:
            name = ENVIRONMENT
        elif array.kind == "state" and STATE not in episode.obs:
            name = STATE
        found.setdefault(name.replace("/", "."), []).append(f"obs/{key}")
    for key in arrays_of(episode):
        if not key.startswith("obs/") and key not in ("actions", *KEPT_BY_LEROBOT):
            found.setdefault(key.replace("/", "."), [key])
    return found


def describe(episodes, sources, reader):
    """meta/info.json's features, by the first episode, in a type that holds the numbers of all."""
    episode, every, features = episodes[0], [arrays_of(e) for e in episodes], {}
    arrays = every[0]
    for name, ours in sources.items():
        parts = [arrays[key] for key in ours]
        if parts[0].is_camera:
            height, width = reader.frames(episode, ours[0].removeprefix("obs/"), 0, 1).shape[1:3]
            features[name] = {"dtype": "video", "shape": [height, width, 3],
                              "names": ["height", "width", "channels"], "info": {
                    "video.height": height, "video.width": width, "video.channels": 3, "video.codec": "h264",
                    "video.pix_fmt": "gbrp", "video.fps": rate(episode.fps), "video.is_depth_map": False,
                    "has_audio": False}}
            continue
        names = [label for key, x in zip(ours, parts) for label in names_of(episode, key, x)]
        kinds = {found[key].dtype for found in every for key in ours if key in found}
        features[name] = {"dtype": np.result_type(*kinds).name, "shape": [len(names)], "names": names}
    for name in KEPT_BY_LEROBOT:
        kind = "float32" if name == "timestamp" else "int64"
        features[name] = {"dtype": kind, "shape": [1], "names": None}
    return features


def names_of(episode, key, array):
    """Names of an array's numbers: its own, or its name with a number."""
    dim, short = prod(array.shape[1:]), key.removeprefix("obs/")
    own = array.names or (episode.action_names if key == "actions" else [])
    if len(own) == dim:
        return own
    return [short] if dim == 1 else [f"{short}.{d}" for d in range(dim)]


def rate(fps):
    return int(fps) if fps == int(fps) else fps


class Writer:
    """Writes one episode after the other; finish() writes meta."""

    def __init__(self, root, version, features, episodes):
        import pyarrow
        self.arrow, self.parquet = pyarrow, import_parquet(root)
        self.root, self.version, self.features, self.many = root, version, features, version == "v3.0"
        self.cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        if self.cameras:
            import_av(root)
        self.fps, self.tasks = episodes[0].fps, list(dict.fromkeys(e.instruction for e in episodes))
        self.rollouts = list(dict.fromkeys(e.rollout for e in episodes))
        self.split = all(e.split is not None for e in episodes)
        self.rows, self.steps, self.episodes = [], 0, len(episodes)
        self.writers, self.counts = {}, {}          # "" is the table, the others are cameras

    def _next(self, kind, open_file):
        """(writer, number of its file) of the table or a camera: a new file for every episode, or, in v3,
        when the last one is large."""
        number = self.counts.get(kind, -1)
        full = (VIDEO_MB if kind else DATA_MB) * 2**20
        if number < 0 or not self.many or self._path(kind, number).stat().st_size > full:
            if kind in self.writers:
                self.writers[kind].close()
            self.counts[kind] = number = number + 1
            path = self._path(kind, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writers[kind] = open_file(path)
        return self.writers[kind], number

    def _path(self, camera, number):
        chunk, file = divmod(number, PER_CHUNK)
        return self.root / PATHS[self.version][bool(camera)].format(
            chunk_index=chunk, file_index=file, episode_chunk=chunk, episode_index=number, video_key=camera)

    def add(self, episode, sources, reader):
        e, n, arrays = len(self.rows), episode.length, arrays_of(episode)
        columns = {name: np.concatenate([reader.read(episode, arrays[key]).reshape(n, -1) for key in ours], 1)
                   for name, ours in sources.items() if name not in self.cameras}
        task, steps = self.tasks.index(episode.instruction), np.arange(n)
        columns |= {"timestamp": (steps / self.fps).astype(np.float32), "frame_index": steps,
                    "episode_index": np.full(n, e), "index": self.steps + steps,
                    "task_index": np.full(n, task)}
        row = {"episode_index": e, "tasks": [episode.instruction], "length": n}
        if self.split:
            row["split"] = episode.split
        if len(self.rollouts) < self.episodes:
            row["rollout"] = self.rollouts.index(episode.rollout)
        stats = {name: statistics(x.reshape(n, -1), -1) for name, x in columns.items()}
        table = self.arrow.table({name: self._column(name, x) for name, x in columns.items()})
        writer, number = self._next("", lambda path: self.parquet.ParquetWriter(path, table.schema))
        writer.write_table(table, row_group_size=n)
        if self.many:
            row |= {"dataset_from_index": self.steps, "dataset_to_index": self.steps + n,
                    "data/chunk_index": number // PER_CHUNK, "data/file_index": number % PER_CHUNK}
        for camera in self.cameras:
            stats[camera] = self._film(n, camera, row, lambda lo, hi: reader.frames(
                episode, sources[camera][0].removeprefix("obs/"), lo, hi))
        self.steps += n
        self.rows.append((row, stats))

    def _column(self, name, x):
        feature = self.features[name]
        x = x.astype(feature["dtype"])
        flat, width = self.arrow.array(x.ravel()), feature["shape"][0]
        return flat if width == 1 else self.arrow.FixedSizeListArray.from_arrays(flat, width)

    def _film(self, n, camera, row, frames):
        """Write the pictures of an episode; -> their statistics."""
        writer, number = self._next(camera, lambda path: VideoWriter(
            path, self.fps, self.features[camera]["shape"][:2]))
        first, sampled = writer.frames, []
        for lo in range(0, n, AT_ONCE):
            part = frames(lo, min(lo + AT_ONCE, n))
            writer.write(part)
            sampled += [part[t - lo] for t in range(lo, lo + len(part)) if t % max(1, n // SAMPLED) == 0]
        if self.many:
            row |= {f"videos/{camera}/chunk_index": number // PER_CHUNK,
                    f"videos/{camera}/file_index": number % PER_CHUNK,
                    f"videos/{camera}/from_timestamp": first / self.fps,
                    f"videos/{camera}/to_timestamp": (first + n) / self.fps}
        return statistics(np.stack(sampled).reshape(-1, 3) / 255, (3, 1, 1), len(sampled))

    def finish(self):
        for writer in self.writers.values():
            writer.close()
        meta = self.root / "meta"
        info = {"codebase_version": self.version, "robot_type": None, "fps": rate(self.fps),
                "total_episodes": len(self.rows), "total_frames": self.steps, "total_tasks": len(self.tasks),
                "chunks_size": PER_CHUNK, "splits": {"train": f"0:{len(self.rows)}"},
                "data_path": PATHS[self.version][0], "features": self.features,
                "video_path": PATHS[self.version][1] if self.cameras else None}
        if self.many:
            info |= {"data_files_size_in_mb": DATA_MB, "video_files_size_in_mb": VIDEO_MB}
            self._tables(meta)
        else:
            info |= {"total_videos": len(self.rows) * len(self.cameras),
                     "total_chunks": -(-len(self.rows) // PER_CHUNK)}
            lines = {"episodes": [row for row, _ in self.rows],
                     "tasks": [{"task_index": i, "task": task} for i, task in enumerate(self.tasks)],
                     "episodes_stats": [{"episode_index": row["episode_index"], "stats": listed(stats)}
                                        for row, stats in self.rows]}
            meta.mkdir()
            for name, rows in lines.items():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (meta / f"{name}.jsonl").write_text(text, encoding="utf-8")
        write_json(meta / "info.json", info)

    def _tables(self, meta):
        """The meta of v3. pandas, by which LeRobot reads the tasks, has their texts as its index."""
        at = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows = [row | {f"stats/{name}/{kind}": x for name, of in listed(stats).items()
                       for kind, x in of.items()} | at for row, stats in self.rows]
        path = meta / "episodes" / CHUNK.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        self.parquet.write_table(self.arrow.Table.from_pylist(rows), f"{path}.parquet")
        column = lambda name, kind, stored: {"name": name, "field_name": name, "pandas_type": kind,
                                             "numpy_type": stored, "metadata": None}
        pandas = {"index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0", "columns": [
            column("task_index", "int64", "int64"), column("task", "unicode", "object")]}
        tasks = self.arrow.table({"task_index": range(len(self.tasks)), "task": self.tasks})
        self.parquet.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}),
                                 meta / "tasks.parquet")
        write_json(meta / "stats.json", listed(together([stats for _, stats in self.rows])))


# ---- statistics, by which LeRobot's policies normalise


def statistics(x, shape, count=None):
    """min, max, mean, std of the columns of x (N, D), each in `shape`, and the count."""
    x = x.astype(np.float64)
    of = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    return {key: y.reshape(shape) for key, y in of.items()} | {"count": np.array([count or len(x)])}


def together(every):
    """Statistics of all episodes from those of each."""
    found = {}
    for name in every[0]:
        part = {kind: np.stack([stats[name][kind] for stats in every]) for kind in every[0][name]}
        share = part["count"].reshape(-1, *[1] * (part["mean"].ndim - 1)) / part["count"].sum()
        mean = (share * part["mean"]).sum(0)
        square = (share * (part["std"]**2 + (part["mean"] - mean)**2)).sum(0)
        found[name] = {"min": part["min"].min(0), "max": part["max"].max(0), "mean": mean, "std": square**0.5,
                       "count": part["count"].sum(0)}
    return found


def listed(stats):
    return {name: {kind: x.tolist() for kind, x in of.items()} for name, of in stats.items()}


def compare_written(episodes, reader, root, sources, version):
    """demos/verify.py on what was written."""
    file, theirs = LeRobot(root), {key: (name, ours) for name, ours in sources.items() for key in ours}

    def written(i, name, lo, hi):
        feature, ours = theirs[name]
        if file.features[feature]["dtype"] == "video":
            return file.frames(i, feature, lo, hi)
        arrays = arrays_of(episodes[i])
        widths = [prod(arrays[key].shape[1:]) for key in ours]
        at = sum(widths[:ours.index(name)])
        return file.numbers(i, feature, lo, hi).reshape(hi - lo, -1)[:, at:at + widths[ours.index(name)]]

    try:
        return compare(episodes, reader, written, set(theirs))
    finally:
        file.close()
