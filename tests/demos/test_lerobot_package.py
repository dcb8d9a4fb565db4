"""LeRobot's own package as the oracle: what it reads is what demos/lerobot.py reads."""
import numpy as np
import pytest
from helpers import write
from lerobot_sets import CAMERAS, FPS, LENGTHS, SIZE, TASKS, contents, write_set

from demos import convert
from demos.dataset import open_demos

reason = "LeRobot's package, which wants another torch, is not installed: pip install --no-deps lerobot"
lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason=reason)


def opened(root):
    return lerobot.LeRobotDataset("test/set", root=root, video_backend="pyav")


@pytest.mark.parametrize("image, lossless", [("video", True), ("video", False), ("image", True)])
def test_values_and_frames_are_the_same(tmp_path, image, lossless):
    write_set(tmp_path / "set", "v3.0", image=image, lossless=lossless)
    theirs, ours = opened(tmp_path / "set"), open_demos(tmp_path / "set", "image", text=True, val_ratio=0)
    meta = {"obs": {"observation.state": {"shape": [4]}, "observation.environment_state": {"shape": [2]}}}
    numbers = open_demos(tmp_path / "set", shape_meta=meta, val_ratio=0)
    assert len(theirs) == sum(LENGTHS) == len(ours.actions) and theirs.fps == ours.fps
    step = 0
    for e, n in enumerate(LENGTHS):
        frames = ours.images(e, 0, n)
        for t in range(n):
            item = theirs[step]
            assert np.array_equal(item["action"], ours.actions[step])
            assert np.array_equal(item["observation.state"], numbers.state[step, :4])
            assert np.array_equal(item["observation.environment_state"], numbers.state[step, 4:])
            assert item["task"] == ours.instructions[e] == TASKS[e % 2]
            for v, key in enumerate(ours.camera_keys):
                assert np.array_equal(np.rint(255 * item[key].numpy()), frames[t, v])
            step += 1


def test_a_set_that_was_written_here_opens_there(tmp_path):
    write(tmp_path / "a.hdf5")
    convert.convert(tmp_path / "a.hdf5", tmp_path / "set", to="lerobot")
    theirs, ours = opened(tmp_path / "set"), open_demos(tmp_path / "a.hdf5", "image", text=True, val_ratio=0)
    assert len(theirs) == len(ours.actions) == 16 and theirs.fps == 10
    frames = np.concatenate([ours.images(e, 0, n) for e, n in enumerate(ours.lengths)])
    for i in range(16):
        item = theirs[i]
        assert np.array_equal(item["action"], ours.actions[i])
        assert np.array_equal(item["observation.state"], ours.state[i])
        assert item["task"] == ours.instructions[item["episode_index"]]
        for v, key in enumerate(ours.camera_keys):
            assert np.array_equal(np.rint(255 * item[f"observation.images.{key}"].numpy()), frames[i, v])
    stats = theirs.meta.stats
    assert np.allclose(stats["action"]["mean"], ours.actions.mean(0))
    assert np.allclose(stats["action"]["std"], ours.actions.std(0))
    assert np.array_equal(stats["observation.state"]["max"], ours.state.max(0))
    assert stats["observation.images.left"]["mean"].shape == (3, 1, 1)
    assert np.allclose(stats["observation.images.left"]["mean"].ravel(), frames[:, 0].mean() / 255)


def test_version_2_1_is_what_lerobots_own_conversion_takes(tmp_path):
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset
    write(tmp_path / "a.hdf5")
    convert.convert(tmp_path / "a.hdf5", tmp_path / "set", to="lerobot2.1")
    before = open_demos(tmp_path / "set", "image", text=True, val_ratio=0)
    frames = [before.images(e, 0, n) for e, n in enumerate(before.lengths)]
    convert_dataset("test/set", root=tmp_path / "set", push_to_hub=False)
    after = open_demos(tmp_path / "set", "image", text=True, val_ratio=0)
    assert np.array_equal(before.actions, after.actions) and np.array_equal(before.state, after.state)
    assert before.instructions == after.instructions
    assert all(np.array_equal(x, after.images(e, 0, len(x))) for e, x in enumerate(frames))
    assert len(opened(tmp_path / "set")) == 16


@pytest.mark.parametrize("videos", [True, False])
def test_a_set_that_its_recorder_wrote_is_read(tmp_path, videos):
    episodes = contents((6, 4))
    camera = {"dtype": "video" if videos else "image", "shape": (*SIZE, 3),
              "names": ["height", "width", "channel"]}
    vector = lambda n: {"dtype": "float32", "shape": (n,), "names": [f"joint_{i}" for i in range(n)]}
    theirs = lerobot.LeRobotDataset.create(
        "test/set", fps=FPS, root=tmp_path / "set", use_videos=videos, video_backend="pyav",
        features={"action": vector(3), "observation.state": vector(4), CAMERAS[0]: camera})
    for e, episode in enumerate(episodes):
        for t in range(len(episode["action"])):
            keys = ("action", "observation.state", CAMERAS[0])
            theirs.add_frame({key: episode[key][t] for key in keys} | {"task": TASKS[e]})
        theirs.save_episode()
    theirs.finalize()
    ours, theirs = open_demos(tmp_path / "set", "image", text=True, val_ratio=0), opened(tmp_path / "set")
    assert np.array_equal(ours.actions, np.concatenate([e["action"] for e in episodes]))
    assert ours.instructions == list(TASKS) and ours.action_names == ["joint_0", "joint_1", "joint_2"]
    frames = np.concatenate([ours.images(e, 0, n) for e, n in enumerate(ours.lengths)])[:, 0]
    for i, frame in enumerate(frames):
        assert np.array_equal(np.rint(255 * theirs[i][CAMERAS[0]].numpy()), frame)
    if not videos:
        assert np.array_equal(np.moveaxis(frames, 1, 3), np.concatenate([e[CAMERAS[0]] for e in episodes]))
