"""The layout of the generated sets: all episodes in a row."""
import json

import h5py
import numpy as np
import pytest

from demos import check, flat
from demos.dataset import open_demos
from demos.files import open_file, read_episodes
from demos.generated import new_hdf5, segments, write_demo
from robot.errors import UserError


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same demonstrations with pictures: in a row, and in robomimic's layout."""
    folder, made = tmp_path_factory.mktemp("flat"), list(segments(4, cameras=True, image_size=24))
    with new_hdf5(folder / "flat.hdf5") as file:
        flat.write(file, made, 10, ("x", "y", "gripper"))
    with new_hdf5(folder / "demos.hdf5") as file:
        file.create_group("data").attrs.update(fps=10.0, action_names=json.dumps(("x", "y", "gripper")))
        for i, demo in enumerate(made):
            group = file.create_group(f"data/demo_{i}")
            group.attrs["rollout"] = demo["episode"]
            write_demo(group, demo["actions"], demo["obs"], demo["instruction"])
    return folder / "flat.hdf5", folder / "demos.hdf5"


def test_it_is_read_as_robomimics_is(both):
    ours, theirs = (read_episodes(path) for path in both)
    assert len(ours) == len(theirs) > 4 and len({e.instruction for e in ours}) > 1
    files = [open_file(path) for path in both]
    for a, b in zip(ours, theirs):
        assert a.name == b.name.replace("demos.", "flat.") and a.rollout[1] == b.rollout[1]
        assert (a.fps, a.instruction, a.action_names) == (b.fps, b.instruction, b.action_names)
        assert a.obs.keys() == b.obs.keys()
        for x, y in ((a.actions, b.actions), *((a.obs[key], b.obs[key]) for key in b.obs)):
            assert (x.shape, x.dtype, x.kind) == (y.shape, y.dtype, y.kind)
            assert np.array_equal(files[0][x.path][:], files[1][y.path][:])
            assert np.array_equal(files[0][x.path][1:2], files[1][y.path][1:2])
            assert np.array_equal(files[0][x.path][-1], files[1][y.path][-1])


def test_the_same_set_for_training(both, capsys):
    ours, theirs = (open_demos(path, "image", text=True, val_ratio=0.3) for path in both)
    assert ours.fingerprint == theirs.fingerprint and ours.usual() == theirs.usual()
    assert np.array_equal(ours.train_episodes, theirs.train_episodes)
    for e, length in enumerate(ours.lengths):
        pictures = theirs.images(e, 0, length)
        assert np.array_equal(ours.images(e, 0, length), pictures)
        assert np.array_equal(ours.images(e, 1, 2), pictures[1:2])
        given = np.full_like(pictures, 7)
        assert ours.images(e, 0, length, given) is given and np.array_equal(given, pictures)


def test_names_of_nothing(both):
    file = open_file(both[0])
    assert "0/actions" in file and len(file) == len(list(file))
    for name in ("data", "0/obs", "0/obs/agent", "-1/actions", "99/actions"):
        assert name not in file and file.get(name) is None


def test_the_doctor_sees_the_same(both, capsys):
    said = []
    for path in both:
        check.main([str(path)])
        said.append(capsys.readouterr().out.replace(path.name, "FILE").splitlines())
    same = [line for line in said[0] if line in said[1]]
    assert len(same) > 10 and len(said[0]) == len(said[1])


def test_a_file_that_lacks_steps_is_refused(both, tmp_path):
    path = tmp_path / "short.hdf5"
    path.write_bytes(both[0].read_bytes())
    with h5py.File(path, "r+") as file:
        actions = file["actions"][:-3]
        del file["actions"]
        file["actions"] = actions
    with pytest.raises(UserError, match=r"short.hdf5 is damaged, .* delete it, and it is made anew"):
        read_episodes(path)


def test_other_files_are_not_taken_for_one(both, tmp_path):
    path = tmp_path / "other.hdf5"
    path.write_bytes(both[1].read_bytes())
    with h5py.File(path, "r+") as file:
        file["episode_ends"] = [3, 6]
    assert len(read_episodes(path)) == len(read_episodes(both[1]))
