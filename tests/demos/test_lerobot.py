"""demos/lerobot.py: sets of both versions are read in place, and what is wrong with one is named."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import command, read_rows, refused
from lerobot_sets import CAMERAS, FPS, LENGTHS, TASKS, contents, encode, write_set

import data
import train
from demos import check
from demos.dataset import open_demos
from demos.video import Video
from robot.errors import UserError

for package in ("pyarrow", "av", "PIL"):
    pytest.importorskip(package, reason=f"{package} reads LeRobot's data sets")

CAMERA = CAMERAS[0]
FILE = {"v2.1": "data/chunk-000/episode_000001.parquet", "v3.0": "data/chunk-000/file-000.parquet"}
FILM = {"v2.1": f"videos/chunk-000/{CAMERA}/episode_000001.mp4",
        "v3.0": f"videos/{CAMERA}/chunk-000/file-000.mp4"}
both = pytest.mark.parametrize("version", ["v2.1", "v3.0"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{version: (folder, its pictures)} of sets that no test changes."""
    folders = {version: tmp_path_factory.mktemp("lerobot") / version for version in ("v2.1", "v3.0")}
    return {version: (folder, write_set(folder, version)) for version, folder in folders.items()}


def rows(key):
    return np.concatenate([episode[key] for episode in contents()])


@both
@pytest.mark.parametrize("image, lossless", [("video", True), ("video", False), ("image", True)])
def test_numbers_and_pictures_are_those_that_were_written(tmp_path, version, image, lossless):
    seen = write_set(tmp_path / "set", version, image=image, lossless=lossless)
    demos = open_demos(tmp_path / "set", val_ratio=0)
    assert demos.state_keys == {"observation.environment_state": 2, "observation.state": 4}
    assert np.array_equal(demos.actions, rows("action"))
    states = np.hstack([rows("observation.environment_state"), rows("observation.state")])
    assert np.array_equal(demos.state, states)
    demos = open_demos(tmp_path / "set", "image", text=True, val_ratio=0)
    assert demos.state_keys == {"observation.state": 4} and demos.camera_keys == sorted(CAMERAS)
    assert demos.lengths.tolist() == list(LENGTHS) and demos.fps == FPS
    assert demos.instructions == [TASKS[e % 2] for e in range(4)] and demos.state_names == list("abcd")
    assert demos.action_names == ["shoulder", "elbow", "gripper"]
    for e, n in enumerate(LENGTHS):
        for v, key in enumerate(demos.camera_keys):
            frames = np.moveaxis(demos.images(e, 0, n)[:, v], 1, 3)
            assert np.array_equal(frames, seen[e, key])                     # a decode by av itself
            assert lossless == np.array_equal(frames, contents()[e][key])   # the pixels that were encoded


@both
def test_any_order_of_reading_gives_the_same_pictures(sets, version):
    """Sought or decoded on, forwards, backwards, in steps, across the episodes of a file."""
    folder, seen = sets[version]
    demos = open_demos(folder, "image", val_ratio=0)
    draw = np.random.default_rng(3)
    for _ in range(25):
        e = draw.integers(4)
        lo = draw.integers(LENGTHS[e])
        hi = draw.integers(lo + 1, LENGTHS[e] + 1)
        for v, key in enumerate(demos.camera_keys):
            assert np.array_equal(np.moveaxis(demos.images(e, lo, hi)[:, v], 1, 3), seen[e, key][lo:hi])


def test_a_window_decodes_a_few_frames_not_the_video(tmp_path, monkeypatch):
    episodes = contents((120, 80))
    write_set(tmp_path / "set", "v3.0", episodes)
    demos = open_demos(tmp_path / "set", "image", val_ratio=0, memory_gb=0)
    windows, decoded, step = data.Windows(demos, None, 16, 2, -1), [], Video._next
    monkeypatch.setattr(Video, "_next", lambda self, wanted: decoded.append(wanted) or step(self, wanted))
    items = torch.tensor([3, 190, 77, 121, 40, 0])
    batch = windows.batch(items)
    assert len(decoded) <= 6 * 3 * 4                    # of 200 frames, a key frame every other one
    frames = np.concatenate([e[demos.camera_keys[1]] for e in episodes])
    assert np.array_equal(batch["images"][:, 1, 1].permute(0, 2, 3, 1), frames[items])
    first = np.array([2, 189, 76, 120, 39, 0])          # step t - 1, but not before the episode
    assert np.array_equal(batch["images"][:, 0, 1].permute(0, 2, 3, 1), frames[first])


def test_a_film_is_decoded_once_when_it_is_read_from_end_to_end(sets, monkeypatch):
    folder, _ = sets["v3.0"]
    decoded, step = [], Video._next
    monkeypatch.setattr(Video, "_next", lambda self, wanted: decoded.append(wanted) or step(self, wanted))
    data.Windows(open_demos(folder, "image", val_ratio=0), None, 8, 2, -1)
    assert len(decoded) <= sum(LENGTHS) * len(CAMERAS) + 3 * 2


def test_key_frames_far_apart(tmp_path):
    seen = write_set(tmp_path / "set", "v3.0", contents((40, 30)), gop=250, lossless=False)
    demos = open_demos(tmp_path / "set", "image", val_ratio=0)
    for e, lo in ((1, 20), (0, 35), (1, 29), (0, 0)):
        frame = np.moveaxis(demos.images(e, lo, lo + 1)[0, 0], 0, 2)
        assert np.array_equal(frame, seen[e, demos.camera_keys[0]][lo])


@both
def test_held_out_episodes_are_drawn_as_in_other_layouts(tmp_path, sets, version):
    from helpers import write
    other = open_demos(write(tmp_path / "a.hdf5", LENGTHS, images=False), val_ratio=0.5, seed=5)
    demos = open_demos(sets[version][0], val_ratio=0.5, seed=5)
    assert demos.valid_episodes.tolist() == other.valid_episodes.tolist()


@pytest.mark.parametrize("splits, train, valid, said", [
    ({"train": "0:3", "val": "3:4"}, [0, 1, 2], [3], ""), ({"train": "2:4", "test": "0:1"}, [2, 3], [0], ""),
    ({"train": "0:3"}, [0, 1, 2], [3], "the split train alone"), ({"train": "all"}, None, None, "no range")])
def test_splits(tmp_path, capsys, splits, train, valid, said):
    write_set(tmp_path / "set", "v2.1", splits=splits, image="image")
    demos = open_demos(tmp_path / "set")
    assert said in capsys.readouterr().err
    if train is None:
        assert len(demos.valid_episodes) == 1 and all(e.split is None for e in demos.episodes)
    else:
        assert demos.train_episodes.tolist() == train and demos.valid_episodes.tolist() == valid
        assert len(open_demos(tmp_path / "set", val_ratio=0.5).valid_episodes) == 2


def test_other_features_are_named_and_can_be_asked_for(sets, capsys):
    folder, _ = sets["v3.0"]
    meta = {"obs": {"observation.effort": {"shape": [2]}, CAMERA: {"shape": [3, 24, 32], "type": "rgb"}}}
    demos = open_demos(folder, shape_meta=meta, extra={"next.reward": 1, "next.done": 1}, val_ratio=0)
    assert np.array_equal(demos.state, rows("observation.effort")) and demos.camera_keys == [CAMERA]
    assert np.array_equal(demos.labels, np.column_stack([rows("next.reward"), rows("next.done")]))
    capsys.readouterr()
    open_demos(folder)
    assert "observation.effort (not observation.state: shape_meta can name it)" in capsys.readouterr().err


def test_of_several_tasks_the_first_counts(tmp_path, capsys):
    def two_tasks(e, columns):
        columns["task_index"] = np.where(columns["frame_index"] < 3, 1, 0)
    write_set(tmp_path / "set", "v3.0", image="image", edit=two_tasks)
    assert open_demos(tmp_path / "set", text=True).instructions == [TASKS[1]] * 4
    assert "and 3 more: has several tasks, the first is its instruction" in capsys.readouterr().err


def test_a_task_is_its_own_text_not_another_one_beside_it(tmp_path):
    write_set(tmp_path / "set", "v2.1", image="image")
    rows = [{"task_index": i, "category": "kitchen", "task": task} for i, task in enumerate(TASKS)]
    (tmp_path / "set/meta/tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_demos(tmp_path / "set", text=True).instructions == [TASKS[e % 2] for e in range(4)]


@both
@pytest.mark.parametrize("times", [2, 3, 6])
def test_a_film_with_more_frames_than_steps(tmp_path, version, times):
    """Of these, the frames at the times of the steps count; all others are a single grey."""
    episodes = contents((12, 7))
    write_set(tmp_path / "set", version, episodes)
    for film in sorted((tmp_path / "set/videos").rglob("*.mp4")):
        those = episodes if version == "v3.0" else [episodes[int(film.stem[-6:])]]
        camera = next(key for key in CAMERAS if key in film.parts)
        pictures = np.concatenate([episode[camera] for episode in those])
        frames = np.full((times * len(pictures), *pictures.shape[1:]), 7, np.uint8)
        frames[::times] = pictures
        encode(film, frames, rate=times * FPS)
    demos = open_demos(tmp_path / "set", "image", val_ratio=0)
    for e, episode in enumerate(episodes):
        frames = demos.images(e, 0, len(episode["action"]))
        for v, key in enumerate(demos.camera_keys):
            assert np.array_equal(np.moveaxis(frames[:, v], 1, 3), episode[key])


def test_a_film_that_goes_on_after_the_episode(tmp_path):
    episodes = contents((6, 5))
    write_set(tmp_path / "set", "v2.1", episodes)
    film = tmp_path / "set" / FILM["v2.1"]
    encode(film, np.concatenate([episodes[1][CAMERA], episodes[0][CAMERA][:1]]))
    demos = open_demos(tmp_path / "set", "image", val_ratio=0)
    frames = demos.images(1, 0, 5)[:, demos.camera_keys.index(CAMERA)]
    assert np.array_equal(np.moveaxis(frames, 1, 3), episodes[1][CAMERA])


@pytest.mark.parametrize("image", ["video", "image"])
@pytest.mark.parametrize("shape, names", [([3, 24, 32], None), ([3, 24, 32], ["channels", "height", "width"]),
                                          ([24, 32, 3], [])])
def test_meta_may_say_the_channels_first(tmp_path, image, shape, names):
    write_set(tmp_path / "set", "v2.1", image=image)
    path = tmp_path / "set/meta/info.json"
    info = json.loads(path.read_text())
    for key in CAMERAS:
        info["features"][key] |= {"shape": shape, "names": names}
    path.write_text(json.dumps(info))
    demos = open_demos(tmp_path / "set", "image", val_ratio=0)
    assert demos.camera_keys == sorted(CAMERAS) and demos.image_size == (24, 32)
    frames = demos.images(2, 0, 9)[:, demos.camera_keys.index(CAMERA)]
    assert np.array_equal(np.moveaxis(frames, 1, 3), contents()[2][CAMERA])


def test_pictures_of_16_bits_are_not_made_white(tmp_path):
    import io

    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 32), 1200, np.uint16)).save(buffer, "png")

    def depth(e, columns):
        columns[CAMERA] = [{"bytes": buffer.getvalue(), "path": None}] * len(columns["action"])
    write_set(tmp_path / "set", "v2.1", image="image", edit=depth)
    demos = open_demos(tmp_path / "set", val_ratio=0)
    assert demos.state_dim == 6
    with pytest.raises(UserError, match="episode_0: a frame has more than 8 bits a colour"):
        open_demos(tmp_path / "set", "image", val_ratio=0).images(0, 0, 1)


def test_a_depth_map_is_no_camera(tmp_path):
    write_set(tmp_path / "set", "v3.0")
    path = tmp_path / "set/meta/info.json"
    info = json.loads(path.read_text())
    info["features"][CAMERA] = info["features"][CAMERA] | {"info": {"video.is_depth_map": True}}
    path.write_text(json.dumps(info))
    demos = open_demos(tmp_path / "set", "image")
    assert demos.camera_keys == sorted(CAMERAS[1:]) and "(a depth map)" in demos.notes[0]


@both
def test_the_report_and_training_take_a_folder(sets, tmp_path, version, capsys):
    folder, _ = sets[version]
    check.main([str(folder)])
    report = capsys.readouterr().out
    assert "4 episodes, 33 steps at 10 Hz" in report and "must be mended" not in report
    assert "2 x pick up the cube" in report and "24, 32, 3" in report
    train.main(command(folder, tmp_path / "run", steps=5))
    assert read_rows(tmp_path / "run")[-1]["step"] == 5


def test_training_on_videos_that_do_not_fit_into_memory(sets, tmp_path):
    folder, _ = sets["v3.0"]
    stays, fits = (data.Windows(open_demos(folder, "image", memory_gb=gb), None, 8, 2, -1) for gb in (0, 4))
    items = torch.tensor([20, 3, 11])
    assert stays.images is None and torch.equal(stays.batch(items)["images"], fits.batch(items)["images"])
    train.main(command(folder, tmp_path / "run", "--set", "obs=image", "--memory_gb", "0", steps=1,
                       batch_size=2, eval_every=0))
    assert read_rows(tmp_path / "run")[-1]["step"] == 1


# ---- what is wrong is one line


def change_info(**changes):
    def spoil(root, version):
        path = root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spoil


def cut(files):
    def spoil(root, version):
        path = root / files[version]
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return spoil


def remove(files):
    return lambda root, version: (root / files[version]).unlink()


def shorter_film(root, version):
    frames = np.concatenate([e[CAMERA] for e in (contents()[:2] if version == "v3.0" else contents()[1:2])])
    encode(root / FILM[version], frames[:-2])


def damaged_film(root, version):
    path = root / FILM[version]
    spoilt = bytearray(path.read_bytes())
    end = spoilt.index(b"moov") - 4                     # the last frames; the index stays whole
    for i in range(end - 300, end, 7):
        spoilt[i] ^= 0x55
    path.write_bytes(spoilt)


@both
@pytest.mark.parametrize("spoil, named", [
    (change_info(codebase_version="v1.6"), ["version 'v1.6'", "v2.0, v2.1 and v3"]),
    (change_info(fps=0), ["fps is '0'"]), (change_info(total_episodes=5), ["says 5 episodes", "has 4"]),
    (change_info(features={"action": 3}), ["info.json does not describe"]),
    (remove(FILE), ["parquet is missing"]), (remove(FILM), ["mp4 is missing"]),
    (cut(FILE), ["parquet is cut short"]), (cut(FILM), ["mp4 cannot be opened as a video"]),
    (shorter_film, ["episode_1", "actions have 7 steps", CAMERA, "(5,"]),
    (damaged_film, ["episode_", "mp4 cannot be decoded at"])], ids=lambda x: getattr(x, "__name__", None))
def test_damaged_files(tmp_path, version, spoil, named):
    write_set(tmp_path / "set", version)
    spoil(tmp_path / "set", version)
    with pytest.raises(UserError) as error:
        data.Windows(open_demos(tmp_path / "set", "image"), None, 8, 2, -1)
    assert all(part in str(error.value) for part in named) and len(str(error.value)) < 400, str(error.value)


@both
@pytest.mark.parametrize("spoil", [remove, cut])
def test_a_film_that_cannot_be_read_matters_where_its_camera_is_used(tmp_path, version, spoil):
    write_set(tmp_path / "set", version)
    spoil(FILM)(tmp_path / "set", version)
    assert np.array_equal(open_demos(tmp_path / "set", val_ratio=0).actions, rows("action"))
    others = {"obs": {key: {"shape": [3, 24, 32], "type": "rgb"} for key in CAMERAS[1:]}}
    images = open_demos(tmp_path / "set", shape_meta=others, val_ratio=0).images(1, 0, 7)
    assert np.array_equal(np.moveaxis(images[:, 0], 1, 3), contents()[1][CAMERAS[1]])
    with pytest.raises(UserError, match=f"train without '{CAMERA}', name the others in shape_meta") as error:
        open_demos(tmp_path / "set", "image")
    named = "set:episode_1: " if version == "v2.1" else "set:episode_0: "
    assert str(error.value).startswith(named) and "copy it again" in str(error.value)
    report = check.examine(tmp_path / "set")
    assert sum("mp4" in line for line in report.wrong) == (1 if version == "v2.1" else 2)


def drop_row(e, columns):
    if e == 1:
        for key in columns:
            columns[key] = np.delete(columns[key], 4, axis=0)


def late(e, columns):
    columns["timestamp"][4:] += 0.1 * (e == 1)


def unknown_task(e, columns):
    columns["task_index"][:] = 7 if e == 1 else 0


def strange_episode(e, columns):
    columns["episode_index"][3] += 2 * (e == 1)


def no_picture(e, columns):
    if e == 1:
        columns[CAMERA] = [None if i == 2 else x for i, x in enumerate(columns[CAMERA])]


def broken_picture(e, columns):
    if e == 1:
        columns[CAMERA] = [x | {"bytes": x["bytes"][:50]} for x in columns[CAMERA]]


def not_finite(e, columns):
    columns["action"][2, 1] = np.nan if e == 1 else 0


def ragged(e, columns):
    columns["action"] = [x.tolist() for x in columns["action"]]
    if e == 1:
        del columns["action"][1][2]


def no_value(e, columns):
    columns["next.reward"] = columns["next.reward"].tolist()
    if e == 1:
        columns["next.reward"][1] = None


@pytest.mark.parametrize("edit, named", [
    (drop_row, ["has 6 rows", "meta/episodes says 7"]),
    (late, ["step 4 has the timestamp 0.5000", "should be 0.4"]),
    (unknown_task, ["task_index 7 stands for no text"]), (strange_episode, ["episode"]),
    (no_picture, ["no picture at step 2 of episode 1"]), (broken_picture, ["episode_1", "cannot be decoded"]),
    (not_finite, ["episode_1", "'actions' is not finite at step 2"]),
    (ragged, ["'action' has rows of 2, 3 numbers"]),
    (no_value, ["'next.reward' has 1 rows without a value"])])
def test_spoilt_rows(tmp_path, edit, named):
    write_set(tmp_path / "set", "v3.0", image="image", edit=edit)
    with pytest.raises(UserError) as error:
        data.Windows(open_demos(tmp_path / "set", "image", extra={"next.reward": 1}), None, 8, 2, -1)
    assert all(part in str(error.value) for part in named) and len(str(error.value)) < 400, str(error.value)


def test_a_film_that_lacks_a_frame_in_its_middle(tmp_path):
    import av
    write_set(tmp_path / "set", "v3.0", contents((12, 7)))
    path = tmp_path / "set" / FILM["v3.0"]
    with av.open(str(path)) as file, av.open(str(tmp_path / "b.mp4"), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.pts is not None and round(float(packet.pts * packet.time_base) * FPS) not in (6, 7):
                packet.stream = stream
                out.mux(packet)
    shutil.move(tmp_path / "b.mp4", path)
    with pytest.raises(UserError, match="episode_1: actions have 7 steps, .* is \\(5, 24, 32, 3\\)"):
        open_demos(tmp_path / "set", "image")
    video = Video(path)
    assert np.array_equal(video.at(np.arange(6) / FPS, 0.025), contents((12, 7))[0][CAMERA][:6])
    for first in (4, 6, 7):
        named = f"mp4 has no frame at 0.{max(first, 6)}00 s, the next one is at 0.800 s"
        with pytest.raises(UserError, match=named):
            video.at(np.arange(first, 9) / FPS, 0.025)
    assert np.array_equal(video.at(np.arange(8, 12) / FPS, 0.025), contents((12, 7))[0][CAMERA][8:])


def test_missing_packages_are_named(sets, monkeypatch):
    folder, _ = sets["v3.0"]
    monkeypatch.setitem(sys.modules, "av", None)
    assert open_demos(folder).state_dim == 6                # numbers need none
    with pytest.raises(UserError, match="mp4 is a video, which needs the package av: pip install av"):
        open_demos(folder, "image").images(0, 0, 1)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="needs the package pyarrow: pip install pyarrow av"):
        open_demos(folder)


@both
@pytest.mark.parametrize("row", [{"length": 3}, 3, {"episode_index": "one", "length": 3}])
def test_rows_of_meta_that_say_something_else(tmp_path, version, row):
    write_set(tmp_path / "set", version, image="image")
    if version == "v2.1":
        path = tmp_path / "set/meta/episodes.jsonl"
        path.write_text(path.read_text() + json.dumps(row))
    else:
        import pyarrow
        import pyarrow.parquet
        path = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"x": [str(row)]}), path)
    with pytest.raises(UserError, match="set: meta does not list its episodes and tasks as LeRobot does"):
        open_demos(tmp_path / "set")


def test_a_folder_of_sets(tmp_path):
    for name in ("set_10", "set_9"):
        write_set(tmp_path / name, "v3.0", contents((4, 5) if name == "set_9" else (6,)), image="image")
    demos = open_demos(tmp_path, val_ratio=0)
    assert demos.lengths.tolist() == [4, 5, 6]
    assert demos.episode_names == ["set_9:episode_0", "set_9:episode_1", "set_10:episode_0"]


def test_a_line_of_meta_that_is_no_json(tmp_path, capsys):
    write_set(tmp_path / "set", "v2.1", image="image")
    with open(tmp_path / "set/meta/episodes.jsonl", "a") as file:
        file.write("{'episode_index': 4}\n")
    refused(capsys, lambda: train.main(command(tmp_path / "set", tmp_path / "run")), "episodes.jsonl: line 5")
