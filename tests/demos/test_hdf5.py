"""Files as other people store them: links, names, attributes, masks. What was written is loaded."""
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from helpers import ROOT, save, write, write_aloha

from demos import check
from demos.dataset import open_demos
from robot.errors import UserError

TEXT = "bring the café mug — 请把杯子放好"


def first_actions(demos):
    return [float(demos.actions[start, 0]) for start in demos.starts]


def merged(folder):
    """Two operators' files of two demos each, and a file that links to all four."""
    (folder / "parts").mkdir()
    for k in range(2):
        with h5py.File(folder / "parts" / f"operator_{k}.hdf5", "w") as file:
            for i in range(2):
                x = 10.0 * k + i + np.zeros((4, 3))
                file[f"data/demo_{i}/actions"], file[f"data/demo_{i}/obs/eef_pos"] = x, -x
                file[f"data/demo_{i}"].attrs["rollout"] = i
    with h5py.File(folder / "merged.hdf5", "w") as file:
        file.create_group("data").attrs["fps"] = 20.0
        for n in range(4):
            file[f"data/demo_{n}"] = h5py.ExternalLink(f"parts/operator_{n // 2}.hdf5", f"/data/demo_{n % 2}")
    return folder / "merged.hdf5"


def test_an_external_link_leads_to_its_own_numbers(tmp_path):
    demos = open_demos(merged(tmp_path), val_ratio=0)
    assert first_actions(demos) == [0, 1, 10, 11]
    assert demos.state[demos.starts, 0].tolist() == [0, -1, -10, -11]


def test_rollouts_of_two_files_are_not_the_same_because_their_number_is(tmp_path):
    (tmp_path / "two").mkdir()
    for name in "ab":
        write(tmp_path / "two" / f"{name}.hdf5", [3, 3], images=False, fps=10, edit=lambda file: [
            demo.attrs.__setitem__("rollout", 7) for demo in file["data"].values()])
    demos = open_demos(tmp_path / "two", val_ratio=0.5)
    assert sorted(map(sorted, (demos.train_episodes, demos.valid_episodes))) == [[0, 1], [2, 3]]
    assert len({e.rollout for e in open_demos(merged(tmp_path), val_ratio=0).episodes}) == 4


@pytest.mark.parametrize("link", [h5py.ExternalLink("gone.h5", "a"), h5py.SoftLink("/nowhere")])
def test_a_link_that_leads_nowhere_is_named(tmp_path, link):
    def edit(file):
        file["data/demo_1/obs/extra"] = link
    to = getattr(link, "filename", None) or link.path
    with pytest.raises(UserError, match=f"a.hdf5:demo_1: obs: extra is a broken link to {to}") as error:
        open_demos(write(tmp_path / "a.hdf5", edit=edit))
    assert len(str(error.value)) < 400


def test_a_group_that_holds_itself_is_refused(tmp_path):
    def edit(file):
        file["data/demo_0/obs/again"] = file["data/demo_0/obs"]
    with pytest.raises(UserError, match="groups in groups beyond 8 levels"):
        open_demos(write(tmp_path / "a.hdf5", edit=edit))


def virtual(folder, take=slice(0, 20), rows=20):
    """A file of three demos whose actions are virtual, from sources beside it."""
    for i in range(3):
        with h5py.File(folder / f"part_{i}.h5", "w") as file:
            file["a"] = 10.0 * i + np.arange(20 * 3, dtype="f4").reshape(20, 3)
    with h5py.File(folder / "virtual.hdf5", "w") as file:
        file.create_group("data").attrs["fps"] = 20.0
        for i in range(3):
            layout = h5py.VirtualLayout((rows, 3), "f4")
            count = take.stop - take.start
            layout[:count] = h5py.VirtualSource(f"part_{i}.h5", "a", (20, 3), "f4")[take]
            demo = file.create_group(f"data/demo_{i}")
            demo.create_virtual_dataset("actions", layout)
            demo["obs/pos"] = np.arange(rows * 2.0).reshape(rows, 2)
    return folder / "virtual.hdf5"


@pytest.mark.parametrize("take, rows", [(slice(0, 20), 20), (slice(5, 15), 10)])
def test_virtual_data_sets_read_their_sources(tmp_path, take, rows):
    demos = open_demos(virtual(tmp_path, take, rows), val_ratio=0)
    assert first_actions(demos) == [3.0 * take.start + 10 * i for i in range(3)] and demos.lengths[0] == rows


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "part_2.h5").unlink(), "source a in part_2.h5 is missing"),
    (lambda folder: (folder / "part_2.h5").write_text("no"), "source a in part_2.h5 cannot be read"),
    (lambda folder: h5py.File(folder / "part_2.h5", "w").close(), "source a in part_2.h5 cannot be read"),
    (lambda folder: save(folder / "part_2.h5", a=np.zeros((9, 3), "f4")),
     r"source a in part_2.h5 is \(9, 3\), which is less"),
])
def test_a_virtual_data_set_is_never_filled_with_zeros(tmp_path, spoil, words):
    path = virtual(tmp_path)
    spoil(tmp_path)
    for read in (open_demos, check.examine):
        with pytest.raises(UserError, match="demo_2: /data/demo_2/actions: its " + words) as error:
            read(path)
        assert len(str(error.value)) < 400


def test_a_source_that_is_one_step_short_is_too_small(tmp_path):
    path = virtual(tmp_path, slice(5, 15), 10)
    save(tmp_path / "part_2.h5", a=np.zeros((15, 3), "f4"))
    assert open_demos(path).lengths.tolist() == [10] * 3
    save(tmp_path / "part_2.h5", a=np.zeros((14, 3), "f4"))
    with pytest.raises(UserError, match=r"demo_2: .* is \(14, 3\), which is less"):
        open_demos(path)


def test_a_virtual_data_set_with_a_gap_is_refused(tmp_path):
    with pytest.raises(UserError, match="sources have 60 of 75 numbers, the rest is nowhere"):
        open_demos(virtual(tmp_path, rows=25))


# ---- names


def test_arrays_of_one_name_go_by_their_paths(tmp_path):
    def edit(file):
        for demo in file["data"].values():
            n = len(demo["actions"])
            demo["obs/left_arm/qpos"], demo["obs/right_arm/qpos"] = np.full((n, 7), 1.0), np.full((n, 7), 2.0)
            demo["obs/head/rgb"] = np.full((n, 4, 6, 3), 10, np.uint8)
            demo["obs/hand/rgb"] = np.full((n, 4, 6, 3), 200, np.uint8)
            demo["obs/base/speed"] = np.full((n, 1), 3.0)
    demos = open_demos(write(tmp_path / "a.hdf5", edit=edit, images=False), "image")
    assert demos.state_keys == {"angle": 1, "left_arm/qpos": 7, "pos": 3, "right_arm/qpos": 7, "speed": 1}
    assert demos.state[0, 1:8].tolist() == [1] * 7 and demos.state[0, 11:].tolist() == [2] * 7 + [3]
    assert demos.camera_keys == ["hand/rgb", "head/rgb"]
    assert demos.images(0, 0, 1)[0, :, 0, 0, 0].tolist() == [200, 10]


def test_alohas_cameras_are_those_in_images(tmp_path, capsys):
    folder = write_aloha(tmp_path / "set", [4, 4])
    for path in folder.iterdir():
        with h5py.File(path, "a") as file:
            file["observations/depth/top"] = np.full((4, 4, 6, 3), 99, np.uint8)
            file["observations/depth/raw"] = np.zeros((4, 480, 640), np.uint16)
            file["instruction"] = "fold the towel"
    demos = open_demos(folder, "image")
    assert demos.camera_keys == ["top"] and demos.images(1, 0, 4).max() == 1        # not the depth's 99
    assert demos.instructions == ["fold the towel"] * 2
    said = capsys.readouterr().err
    assert "raw (more than 1000 numbers per step)" in said
    assert "depth/top (not in observations/images)" in said


# ---- attributes


def attrs(**values):
    return lambda file: [demo.attrs.update(values) for demo in file["data"].values()]


def without(edit):
    """`write` gives every demo an instruction of its own; here it has none."""
    def change(file):
        for demo in file["data"].values():
            del demo.attrs["language_instruction"]
        edit(file)
    return change


def problem(text):
    """As LIBERO has it, on the data group."""
    info = json.dumps({"problem_name": "x", "language_instruction": text})
    return lambda file: file["data"].attrs.update(problem_info=info)


@pytest.mark.parametrize("edit, text, note", [
    (attrs(language_instruction=TEXT), TEXT, ""),
    (attrs(language_instruction=np.bytes_(TEXT.encode())), TEXT, ""),
    (attrs(language_instruction=[TEXT]), TEXT, ""), (attrs(language=np.array([b"open it"])), "open it", ""),
    (attrs(language_instruction=["open it", "pull it"]), "open it", "said in 2 ways, the first is taken"),
    (attrs(language_instruction=["same", "same"]), "same", ""),
    (attrs(language_instruction=h5py.Empty("S10")), "", "has no instructions"),
    (attrs(task_description=TEXT), TEXT, ""),
    (attrs(ep_meta=json.dumps({"lang": TEXT, "layout": 3})), TEXT, ""),
    (problem(TEXT), TEXT, ""), (problem([*TEXT]), TEXT, ""),
    (lambda file: [demo.__setitem__("language", TEXT) for demo in file["data"].values()], TEXT, ""),
    (attrs(ep_meta="no json"), "", "attribute 'ep_meta' is no JSON object"),
])
def test_forms_of_an_instruction(tmp_path, capsys, edit, text, note):
    path = write(tmp_path / "a.hdf5", edit=without(edit), images=False, fps=10)
    assert open_demos(path, text=True).instructions == [text] * 3
    said = capsys.readouterr().err
    assert note in said and ("no instruction" in said) == (not text)


def test_the_innermost_attribute_counts(tmp_path):
    def edit(file):
        file.attrs.update(language_instruction="file", fps=1.0)
        file["data"].attrs["language_instruction"] = "data"
        del file["data/demo_1"].attrs["language_instruction"]
        del file["data/demo_2"].attrs["language_instruction"]
        file["data/demo_0"].attrs["fps"] = 50.0
        file["data/demo_2"].attrs["language_instruction"] = h5py.Empty("S3")
    path = write(tmp_path / "a.hdf5", edit=edit, images=False, fps=10)
    demos = open_demos(path)
    assert demos.instructions == ["task 0", "data", "data"] and demos.episode_fps.tolist() == [50, 10, 10]
    with h5py.File(path, "a") as file:
        del file["data"].attrs["fps"], file["data"].attrs["language_instruction"]
    demos = open_demos(path)
    assert demos.instructions == ["task 0", "file", "file"] and demos.episode_fps.tolist() == [50, 1, 1]


def test_instructions_of_some_episodes_only_are_counted(tmp_path, capsys):
    def edit(file):
        del file["data/demo_1"].attrs["language_instruction"]
    path = write(tmp_path / "a.hdf5", edit=edit)
    open_demos(path, text=True)
    assert "1 of 3 episodes have no instruction" in capsys.readouterr().err
    check.main([str(path)])
    assert "1 of 3 episodes have no instruction" in capsys.readouterr().out


@pytest.mark.parametrize("value, fps", [(np.array([15.0]), 15), ("25", 25), (np.float32(12.5), 12.5)])
def test_a_rate_is_one_number(tmp_path, value, fps):
    assert open_demos(write(tmp_path / "a.hdf5", fps=value)).fps == fps


def actions(value):
    def edit(file):
        for demo in file["data"].values():
            del demo["actions"]
            if callable(value):
                value(demo)
            else:
                demo["actions"] = value
    return edit


def ragged(demo):
    demo.create_dataset("actions", (5,), h5py.vlen_dtype("f4"))[:] = [np.zeros(3, "f4")] * 5


@pytest.mark.parametrize("edit, words", [
    (attrs(fps="20 Hz"), "demo_0: fps is '20 Hz', write one number"),
    (attrs(fps=np.array([1.0, 2.0])), "demo_0: fps is .* write one number"),
    (attrs(num_samples=float("inf")), "demo_0: num_samples says inf, actions have 5 steps"),
    (attrs(num_samples="many"), "num_samples is 'many', write one number"),
    (attrs(rollout=np.arange(3)), r"demo_0: rollout is '\[0 1 2\]', write one number or name"),
    (attrs(language_instruction=3), "the instruction is .*3.*, write a text"),
    (attrs(language_instruction=np.bytes_(b"caf\xe9")), "the instruction is .* write a text in UTF-8"),
    (attrs(action_names="[x, y"), "action_names is .* no list of names"),
    (actions(np.full((5, 2), b"left")),
     r"demo_0: actions are \|S4 \(5, 2\), make it \(steps, dimensions\), numbers"),
    (actions(np.zeros(5, [("x", "f4"), ("y", "f4")])), "demo_0: actions are .* make it"),
    (actions(3.0), r"actions are float64 \(\), make it"),
    (actions(h5py.Empty("f4")), r"actions are float32 \(\)"),
    (actions(np.zeros((5, 0))), r"actions are float64 \(5, 0\)"),
    (actions(ragged), r"actions are object \(5,\)"),
    (actions(lambda demo: demo.create_dataset("actions/arm", data=np.zeros((5, 3)))),
     r"demo_0: 'actions' is a group of arm, write one array \(T, A\)"),
    (lambda file: [file.__delitem__(f"data/demo_{i}/obs") or file.__setitem__(f"data/demo_{i}/obs", 1.0)
                   for i in range(3)], "'obs' is an array, write a group"),
    (attrs(language_instruction="x" * 60_000, fps="y" * 60_000), "fps is 'yyy"),
], ids=lambda x: None if callable(x) else x[:30])
def test_odd_contents_are_one_line(tmp_path, edit, words):
    path = write(tmp_path / "a.hdf5", edit=edit, images=False)
    with pytest.raises(UserError, match=words) as error:
        open_demos(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("env", ["{'env_name': 'Lift'}", "null", "[1]", '{"env_kwargs": 3}'])
def test_env_args_that_say_nothing_do_not_stop_a_run(tmp_path, capsys, env):
    path = write(tmp_path / "a.hdf5", images=False, env_args=env)
    assert open_demos(path).fps == 20
    assert ("'env_args' is no JSON object" in capsys.readouterr().err) == (env[0] != "{" or "'" in env)


def test_a_key_may_be_float_in_one_demo_and_whole_in_another(tmp_path):
    def edit(file):
        for name in ("demo_0", "demo_2"):
            x = file[f"data/{name}/obs/pos"][:]
            del file[f"data/{name}/obs/pos"]
            file[f"data/{name}/obs/pos"] = x.astype(np.int32)
    demos = open_demos(write(tmp_path / "a.hdf5", edit=edit))
    assert demos.state_keys["pos"] == 3 and demos.state[6, 1:].tolist() == [101, 101.25, 101.5]
    assert demos.state[1, 1:].tolist() == [1, 1, 1]


@pytest.mark.parametrize("content", ["no json", "[]", '{"instruction": 3}'])
def test_an_annotation_that_is_none_is_one_line(tmp_path, content):
    folder = write_aloha(tmp_path / "set", [3, 3])
    (folder / "expanded_instruction.json").write_text(content)
    with pytest.raises(UserError, match="expanded_instruction.json"):
        open_demos(folder)


# ---- masks


def masks(**named):
    def edit(file):
        for name, value in named.items():
            file[f"mask/{name}"] = value
    return edit


names = lambda *numbers: np.array([f"demo_{i}" for i in numbers], "S8")


def open_six(path, edit, **options):
    return open_demos(write(path / "six.hdf5", [4] * 6, edit, images=False), **options)


@pytest.mark.parametrize("edit, train, valid, note", [
    (masks(train=names(0, 1, 2), valid=names(3)), [0, 1, 2], [3], ""),
    (masks(train=np.array([0, 1, 2, 3]), valid=np.array([4, 5])), [0, 1, 2, 3], [4, 5], ""),
    (masks(train=np.arange(6) < 2, valid=np.arange(6) == 5), [0, 1], [5], ""),
    (masks(train=names(0, 1, 2)), [0, 1, 2], [3, 4, 5],
     "mask/train alone, the demos that it does not name are h"),
    (masks(valid=names(1)), [0, 2, 3, 4, 5], [1], "mask/valid alone, the demos that it does not name are t"),
    (masks(train=names(0, 1), valid=np.zeros(0, "S8")), [0, 1], [], "no episode of"),
    (masks(better=names(0), worse=names(1)), [0, 1, 2, 3, 4], [5],
     "mask/ holds better, worse, but neither train nor valid: it is not used"),
])
def test_masks_in_their_forms(tmp_path, capsys, edit, train, valid, note):
    demos = open_six(tmp_path, edit)
    assert (demos.train_episodes.tolist(), demos.valid_episodes.tolist()) == (train, valid)
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("edit, words", [
    (masks(train=names(0, 1, 4), valid=names(4, 5)), "demo_4 stands in both mask/train and mask/valid"),
    (masks(train=names(10, 11), valid=names(2)),
     "mask/train names demo_10, demo_11, which the file does not"),
    (masks(train=names(0), valid=names(40)), "mask/valid names demo_40"),
    (masks(train=[7]), "mask/train names demo_7"), (masks(train=[-1]), "mask/train names demo_-1"),
    (masks(train=np.ones(5, bool)), "mask/train is no list of names"),
    (masks(train=np.zeros((2, 2))), "mask/train is no list"), (masks(train=3.0), "mask/train is no list"),
    (lambda file: file.create_dataset("mask/train/names", data=names(0)), "mask/train is no list of names"),
    (masks(train=np.zeros(0, "S8"), valid=names(0)), "masks leave no episode to train on"),
])
def test_masks_that_cannot_be_meant(tmp_path, capsys, edit, words):
    with pytest.raises(UserError, match=words + ".*--val_ratio"):
        open_six(tmp_path, edit)
    check.main([str(tmp_path / "six.hdf5")])
    assert words.split(",")[0].split(" ")[0] in capsys.readouterr().out.split("must be mended")[1]
    assert len(open_demos(tmp_path / "six.hdf5", val_ratio=0.5).train_episodes) == 3    # not used


def test_episodes_of_another_name_are_not_passed_over_in_silence(tmp_path, capsys):
    def edit(file):
        file.move("data/demo_1", "data/demo_1_retry")
        file.move("data/demo_4", "data/Demo_4")
    assert open_six(tmp_path, edit, val_ratio=0).actions[::4, 0].tolist() == [0, 200, 300, 500]
    assert "data/ also holds Demo_4, demo_1_retry, which are not read: rename" in capsys.readouterr().err


def test_a_split_does_not_depend_on_the_interpreter(tmp_path):
    both = masks(train=names(0, 1, 2, 3), valid=names(4, 5))
    path = write(tmp_path / "six.hdf5", [4] * 6, both, images=False)
    program = f"from demos.dataset import open_demos; print(open_demos({str(path)!r}).valid_episodes)"
    said = {subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert said == {"[4 5]\n"}


def test_files_with_and_without_masks_are_split_anew_and_said(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "a.hdf5", edit=masks(train=names(0), valid=names(1)))
    write(tmp_path / "set" / "b.hdf5")
    demos = open_demos(tmp_path / "set")
    assert len(demos.train_episodes) + len(demos.valid_episodes) == 6
    assert "a.hdf5 has masks and" in capsys.readouterr().err


@pytest.mark.parametrize("n, ratio, held", [(90, 0.02, 2), (120, 0.02, 2), (40, 0.02, 1), (10, 0.99, 9)])
def test_the_held_out_share_is_rounded(tmp_path, n, ratio, held):
    demos = open_demos(write(tmp_path / "a.hdf5", [2] * n, images=False), val_ratio=ratio, seed=3)
    assert len(demos.valid_episodes) == held and len(demos.train_episodes) == n - held


def test_max_train_episodes_draws_by_the_seed(tmp_path):
    path = write(tmp_path / "a.hdf5", [2] * 40, images=False)
    kept = [open_demos(path, max_train_episodes=8, seed=seed).train_episodes.tolist() for seed in range(3)]
    assert [len(k) for k in kept] == [8] * 3 and len({tuple(k) for k in kept}) == 3
    left = np.setdiff1d(np.arange(40), open_demos(path, seed=1).valid_episodes)
    drawn = left[np.random.default_rng(1).choice(38, 8, replace=False)]             # Diffusion Policy's draw
    assert kept[1] == sorted(drawn.tolist())
