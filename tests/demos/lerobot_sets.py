"""LeRobot data sets as the format's description has them, written without the code that reads them."""
import io
import json
from fractions import Fraction

import numpy as np

CAMERAS = ("observation.images.top", "observation.images.left", "observation.images.right")
TASKS = ("pick up the cube", "open the drawer")
LENGTHS, FPS, SIZE = (12, 7, 9, 5), 10, (24, 32)


def contents(lengths=LENGTHS, seed=0):
    """[{feature: rows}] of each episode. Pictures are smooth, so that a lossy codec changes them little."""
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        y, x = np.mgrid[:SIZE[0], :SIZE[1]]
        tint = rng.integers(0, 200, (len(CAMERAS), n, 1, 1, 3))
        pictures = tint + (y[None, :, :, None] + np.arange(n)[:, None, None, None] + x[:, :, None]) % 50
        found.append({"action": rng.normal(size=(n, 3)).astype(np.float32),
                      "observation.state": rng.normal(size=(n, 4)).astype(np.float32),
                      "observation.environment_state": rng.normal(size=(n, 2)).astype(np.float32),
                      "observation.effort": rng.normal(size=(n, 2)).astype(np.float32),
                      "next.reward": rng.random(n).astype(np.float32), "next.done": np.arange(n) == n - 1,
                      **dict(zip(CAMERAS, pictures.astype(np.uint8)))})
    return found


def features(image):
    vector = lambda n, names=None: {"dtype": "float32", "shape": [n], "names": names}
    camera = {"dtype": image, "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    whole = {"dtype": "int64", "shape": [1], "names": None}
    return {"action": vector(3, {"motors": ["shoulder", "elbow", "gripper"]}),
            "observation.state": vector(4, ["a", "b", "c", "d"]), "observation.environment_state": vector(2),
            "observation.effort": vector(2), "next.reward": vector(1),
            "next.done": {"dtype": "bool", "shape": [1], "names": None},
            **{key: camera for key in CAMERAS}, "timestamp": vector(1),
            **{key: whole for key in ("frame_index", "episode_index", "index", "task_index")}}


def encode(path, pictures, lossless=True, gop=2, rate=FPS):
    """An mp4 file of pictures (T, H, W, 3); returns them as av itself decodes them."""
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, options = ("libx264rgb", {"qp": "0"}) if lossless else ("libx264", {"crf": "20"})
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=Fraction(rate), options=options | {"g": str(gop)})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def png(picture):
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(e, episode, image, first, edit):
    """The columns of an episode's rows."""
    n = len(episode["action"])
    columns = {key: [png(p) for p in x] if key in CAMERAS else x for key, x in episode.items()
               if key not in CAMERAS or image == "image"}
    columns |= {"timestamp": (np.arange(n) / FPS).astype(np.float32), "frame_index": np.arange(n),
                "episode_index": np.full(n, e), "index": first + np.arange(n),
                "task_index": np.full(n, e % len(TASKS))}
    edit(e, columns)
    return columns


def table(rows):
    import pyarrow as pa
    found = {}
    for key, x in rows.items():
        if isinstance(x, list):
            found[key] = pa.array(x)
        elif x.ndim == 1:
            found[key] = pa.array(x)
        else:
            found[key] = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    return pa.table(found)


def write_set(root, version="v3.0", episodes=None, image="video", edit=lambda e, columns: None, lossless=True,
              per_file=2, splits=None, gop=2):
    """Write a set; returns {(episode, camera): the pictures as they should be read}. In v3 there are
    `per_file` episodes in a file. edit(e, columns) may spoil the rows of an episode."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    episodes, many = episodes or contents(), version.startswith("v3")
    lengths = [len(episode["action"]) for episode in episodes]
    firsts = np.cumsum(lengths) - lengths
    every = [rows_of(e, episode, image, int(firsts[e]), edit) for e, episode in enumerate(episodes)]
    chunk = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    data = f"data/{chunk}.parquet" if many else (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")
    video = f"videos/{{video_key}}/{chunk}.mp4" if many else (
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps({
        "codebase_version": version, "robot_type": "arm", "fps": FPS, "total_episodes": len(episodes),
        "total_frames": sum(lengths), "total_tasks": len(TASKS), "chunks_size": 1000, "data_path": data,
        "video_path": video if image == "video" else None,
        "splits": splits or {"train": f"0:{len(episodes)}"}, "features": features(image)}))
    meta, seen = [], {}
    groups = [range(e, min(e + per_file, len(episodes))) for e in range(0, len(episodes), per_file)]
    for number, group in enumerate(groups if many else [[e] for e in range(len(episodes))]):
        at = {"chunk_index": 0, "file_index": number, "episode_chunk": 0, "episode_index": number}
        path = root / data.format(**at)
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = [table(every[e]) for e in group]
        with pq.ParquetWriter(path, tables[0].schema) as writer:
            for part in tables:
                writer.write_table(part)
        for e in group:
            tasks = [TASKS[i % 2] for i in dict.fromkeys(every[e]["task_index"].tolist())]
            meta.append({"episode_index": e, "tasks": tasks, "length": lengths[e]})
            if many:
                meta[e] |= {"data/chunk_index": 0, "data/file_index": number,
                            "dataset_from_index": int(firsts[e]),
                            "dataset_to_index": int(firsts[e]) + lengths[e]}
        for camera in CAMERAS if image == "video" else []:
            whole = np.concatenate([episodes[e][camera] for e in group])
            whole = encode(root / video.format(video_key=camera, **at), whole, lossless, gop)
            start = 0
            for e in group:
                seen[e, camera] = whole[start:start + lengths[e]]
                if many:
                    meta[e] |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": number,
                                f"videos/{camera}/from_timestamp": start / FPS,
                                f"videos/{camera}/to_timestamp": (start + lengths[e]) / FPS}
                start += lengths[e]
    if many:
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(meta), root / "meta/episodes/chunk-000/file-000.parquet")
        # As pandas writes a table whose index has no name.
        tasks = pa.table({"task_index": range(len(TASKS)), "__index_level_0__": list(TASKS)})
        of = lambda name, kind: {"name": name, "field_name": name or "__index_level_0__", "metadata": None,
                                 "pandas_type": kind, "numpy_type": "int64" if name else "object"}
        pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "pandas_version": "2.3.0",
                  "columns": [of("task_index", "int64"), of(None, "unicode")]}
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(pandas)})
        pq.write_table(tasks, root / "meta/tasks.parquet")
    else:
        lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
        (root / "meta/episodes.jsonl").write_text(lines(meta))
        tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
        (root / "meta/tasks.jsonl").write_text(lines(tasks))
    return seen or {(e, key): episode[key] for e, episode in enumerate(episodes) for key in CAMERAS}
