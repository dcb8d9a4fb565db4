"""data.py and demos/: what a batch means, and what is refused."""
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from demos import check
from demos import convert
import data
import dp_cnn
from golden_cases import golden
from demos.dataset import open_demos
from demos.generated import demonstrations, new_hdf5
from demos.images import open_samples
from demos.mixed import MixedDemos
from robot.errors import UserError, written_aside
from robot.normalizer import Normalizer
from robot.text import decode_text, encode_text
from tools.options import parse_options

ROOT = Path(data.__file__).parent


def write(path, lengths=(5, 8, 3), edit=None, images=True, **attrs):
    """A robomimic file whose values are step number + 100 x episode number. `edit(file)` spoils it."""
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs.update(attrs or {"fps": 10})
        for e, n in enumerate(lengths):
            step = 100 * e + np.arange(n, dtype=np.float64)
            demo = group.create_group(f"demo_{e}")
            demo.attrs.update(num_samples=n, language_instruction=f"task {e}")
            demo["actions"] = np.stack([step, -step], 1)
            demo["obs/pos"] = step[:, None] + np.array([0, 0.25, 0.5])
            demo["obs/angle"] = step
            if images:
                demo["obs/left"] = np.tile(step.astype(np.uint8)[:, None, None, None], (1, 4, 6, 3))
                demo["obs/right"] = 250 - demo["obs/left"][:]
        if edit:
            edit(file)
    return path


def write_aloha(folder, lengths, write_frames=None, **attrs):
    folder.mkdir(exist_ok=True)
    for e, n in enumerate(lengths):
        with h5py.File(folder / f"episode_{e}.hdf5", "w") as file:
            file.attrs.update(attrs)
            file["action"] = np.full((n, 14), e, np.float32) + np.arange(n, dtype=np.float32)[:, None]
            file["observations/qpos"] = file["action"][:]
            file["observations/qvel"] = np.zeros((n, 14), np.float32)
            if write_frames:
                write_frames(file, n)
            else:
                file["observations/images/top"] = np.full((n, 4, 6, 3), e, np.uint8)
    return folder


# ---- normaliser


@golden("data.LinearNormalizer")
def test_normalizer_equals_the_official_one(case):
    for official, mode in (("limits", "minmax"), ("gaussian", "meanstd"), ("limits_no_offset", "maxabs")):
        normalizer = Normalizer.fit({"x": case.inp["data"].numpy()}, mode)
        case.check(f"out/{official}/scale", normalizer.scale["x"])
        case.check(f"out/{official}/offset", normalizer.offset["x"])
        case.check(f"out/{official}/normalised", normalizer.normalize("x", case.inp["data"]))
        case.check(f"out/{official}/back", normalizer.unnormalize("x", case.inp["query"]))
        for stat in ("min", "max", "mean", "std"):
            case.check(f"out/stats/{stat}", normalizer.stats["x"][stat])


@pytest.mark.parametrize("mode", Normalizer.MODES)
def test_normalizer_ranges_round_trip_and_checkpoint(mode, tmp_path):
    x = np.random.default_rng(0).normal(size=(1000, 3)) * [1, 50, 1e-6] + [0, 200, 7]
    normalizer = Normalizer.fit({"x": x}, mode)
    y = normalizer.normalize("x", torch.tensor(x, dtype=torch.float32))
    if mode == "meanstd":
        assert y[:, :2].mean(0).abs().max() < 1e-4 and (y[:, :2].std(0) - 1).abs().max() < 1e-3
    elif mode == "maxabs":
        assert torch.allclose(y.abs().amax(0), torch.ones(3))
    else:
        inside = (y[:, :2].abs() <= 1 + 1e-5).float().mean(0)
        assert (inside == 1).all() if mode == "minmax" else ((inside - 0.98).abs() < 0.002).all()
        # a range of about 1e-5 is shifted to start at 0, not blown up to [-1, 1]
        assert y[:, 2].abs().max() < 1e-4 and normalizer.near_constant == {"x": [2]}
        assert "near-constant dimensions 2 " in normalizer.summary()
    assert torch.allclose(normalizer.unnormalize("x", y)[:, :2], torch.tensor(x[:, :2]).float(), atol=1e-3)

    torch.save(normalizer.state(), tmp_path / "n.pt")
    again = Normalizer.from_state(torch.load(tmp_path / "n.pt", weights_only=True))
    assert torch.equal(again.normalize("x", y), normalizer.normalize("x", y)) and again.mode == mode
    assert again.summary() == normalizer.summary()


def test_normalizer_is_fitted_on_training_episodes_only(tmp_path):
    def masks(file):
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_2"]), np.array([b"demo_1"])
    demos = open_demos(write(tmp_path / "a.hdf5", edit=masks))
    normalizer = data.fit_normalizer(demos)
    assert normalizer.stats["actions"]["max"].tolist() == [202, 0]                 # demo_1 reaches 107
    assert normalizer.stats["state"]["min"].tolist() == [0, 0, 0.25, 0.5]          # angle, then pos
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        data.fit_normalizer(demos, "min_max")


# ---- text


@pytest.mark.parametrize("text", ["", "put the red block in the left zone", "grüße 🤖"])
def test_text_round_trip(text):
    codes = encode_text(text, 64)
    assert codes.dtype == torch.int64 and codes.shape == (64,)
    assert decode_text(codes) == text
    assert (codes > 0).sum() == len(text.encode()) and (codes[(codes > 0).sum():] == 0).all()


def test_text_is_cut_at_a_whole_character():
    assert decode_text(encode_text("ab\x00ü", 3)) == "ab\x00"            # 0 is a byte, not padding
    assert decode_text(encode_text("aüb", 2)) == "a"


# ---- windows


@pytest.mark.parametrize("To, Tp, first, n_state", [(2, 4, -1, None), (1, 16, 0, None), (3, 6, -2, 7)])
def test_window_holds_the_right_steps(tmp_path, To, Tp, first, n_state):
    demos = open_demos(write(tmp_path / "a.hdf5"), "image", val_ratio=0)
    windows = data.Windows(demos, None, Tp, To, first, n_state_steps=n_state, text_len=8)
    assert len(windows) == 16
    batch = windows.batch(torch.arange(16))
    rows = [(e, t, n) for e, n in enumerate((5, 8, 3)) for t in range(n)]
    for i, (e, t, n) in enumerate(rows):
        steps = np.arange(t + first, t + first + Tp)
        assert batch["action_mask"][i].tolist() == ((steps >= 0) & (steps < n)).tolist()
        wanted = 100 * e + np.clip(steps, 0, n - 1)
        assert batch["actions"][i].tolist() == np.stack([wanted, -wanted], 1).tolist()
        seen = 100 * e + np.clip(np.arange(t - To + 1, t - To + 1 + (n_state or To)), 0, n - 1)
        assert batch["state"][i].tolist() == [[s, s, s + 0.25, s + 0.5] for s in seen]      # angle, pos
        assert (batch["images"][i, :, 0] == torch.tensor(seen)[:, None, None, None]).all()     # left
        assert (batch["images"][i, :, 1] == 250 - torch.tensor(seen)[:, None, None, None]).all()
        assert decode_text(batch["text"][i]) == f"task {e}"
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape[2:] == (2, 3, 4, 6)
    assert batch["control_hz"].tolist() == [10.0] * 16
    assert windows.episode(torch.tensor([0, 5, 15])) == ["a.hdf5:demo_0", "a.hdf5:demo_1", "a.hdf5:demo_2"]


def test_channels_come_first_and_in_order(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)

    def edit(file):
        file["data/demo_0/obs/left"][:] = picture
    demos = open_demos(write(tmp_path / "a.hdf5", edit=edit), "image", val_ratio=0)
    image = data.Windows(demos, None, 2, 1, 0).batch(torch.tensor([3]))["images"][0, 0, 0]
    assert all(image[c, h, w] == picture[3, h, w, c] for c, h, w in np.ndindex(3, 4, 6))


def test_batch_is_normalised_and_undone_by_the_normaliser(tmp_path):
    demos = open_demos(write(tmp_path / "a.hdf5"), val_ratio=0)
    normalizer = data.fit_normalizer(demos, "meanstd")
    raw, scaled = (data.Windows(demos, n, 4, 2, -1).batch(torch.arange(16)) for n in (None, normalizer))
    for key in ("actions", "state"):
        assert torch.allclose(normalizer.unnormalize(key, scaled[key]), raw[key], atol=1e-3)
        assert scaled[key].abs().max() < 3
    assert "images" not in raw and "text" not in raw


def test_images_read_from_files_equal_those_in_memory(tmp_path):
    path = write(tmp_path / "a.hdf5", lengths=(5, 9, 7, 6))
    items = torch.tensor([26, 0, 13, 4, 5, 5])
    windows = [data.Windows(open_demos(path, "image", val_ratio=0, memory_gb=gb), None, 4, 2, -1, 4)
               for gb in (1, 0)]
    assert windows[0].images is not None and windows[1].images is None
    held, read = (w.batch(items) for w in windows)
    assert held.keys() == read.keys() and all(torch.equal(held[k], read[k]) for k in held)
    copied = pickle.loads(pickle.dumps(windows[1]))             # a spawned worker: no open file goes with it
    assert torch.equal(copied.batch(items)["images"], held["images"])


@pytest.mark.parametrize("memory_gb", [1, 0])
def test_workers_make_the_same_batches(tmp_path, memory_gb):
    demos = open_demos(write(tmp_path / "a.hdf5"), "image", val_ratio=0, memory_gb=memory_gb)
    windows = data.Windows(demos, None, 4, 2, -1, text_len=6)
    windows.batch(torch.arange(3))                              # the file is open before the workers fork
    streams = [data.batches(windows, 5, seed=3, start_step=2, workers=w) for w in (0, 2)]
    state = torch.get_rng_state()
    for (i, one), (j, other) in itertools.islice(zip(*streams), 6):
        assert torch.equal(i, j) and one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(torch.get_rng_state(), state)            # nor do they draw from the run's generator


def test_a_file_that_breaks_on_the_way_is_one_line_with_workers_too(tmp_path):
    def edit(file):
        for demo in file["data"].values():
            noise = np.random.default_rng(0).integers(0, 256, (len(demo["actions"]), 8, 8, 3), np.uint8)
            demo.create_dataset("obs/packed", data=noise, chunks=(1, 8, 8, 3), compression=4)
    path = write(tmp_path / "a.hdf5", edit=edit, images=False)
    with h5py.File(path) as file:
        chunk = file["data/demo_1/obs/packed"].id.get_chunk_info(5)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    windows = data.Windows(open_demos(path, "image", val_ratio=0, memory_gb=0), None, 4, 2, -1)
    windows.batch(torch.arange(5))                              # what is sound can be read
    for workers in (0, 1):
        with pytest.raises(UserError, match="a.hdf5:demo_1: /data/demo_1/obs/packed cannot be read") as error:
            for _ in itertools.islice(data.batches(windows, 4, 0, workers=workers), 4):
                pass
        assert "\n" not in str(error.value)


# ---- batches


def first_indices(n, steps, **kwargs):
    samples = open_samples("moons", n=n)
    return [i.tolist() for i, _ in itertools.islice(data.batches(samples, **kwargs), steps)]


def test_resumed_batches_go_on_as_if_never_stopped():
    whole = first_indices(100, 40, batch_size=8, seed=5)        # 90 items, 11 batches an epoch
    for k in (0, 1, 10, 11, 12, 30):
        assert first_indices(100, 40 - k, batch_size=8, seed=5, start_step=k) == whole[k:]
    assert first_indices(100, 40, batch_size=8, seed=6)[:2] != whole[:2]


def test_epoch_shows_every_item_once_and_then_in_a_new_order():
    steps = first_indices(100, 18, batch_size=10, seed=0)       # 9 batches an epoch
    epochs = [sum(steps[:9], []), sum(steps[9:], [])]
    assert [sorted(e) for e in epochs] == [list(range(90))] * 2 and epochs[0] != epochs[1]


def test_ranks_share_an_epoch():
    ranks = [first_indices(100, 4, batch_size=10, seed=1, rank=r, world=2) for r in (0, 1)]
    shown = sum(ranks[0] + ranks[1], [])
    assert len(shown) == len(set(shown)) == 80                  # the last ten do not fill a batch on both
    assert sum(zip(*ranks), ()) == tuple(first_indices(100, 8, batch_size=10, seed=1))


def test_seed_and_epoch_are_mixed():
    """No order comes twice, in spite of a generator that sees 32 bits of its seed."""
    streams = [next(data.index_stream(64, 64, seed, epoch, 0, 1)) for seed, epoch in
               itertools.product((0, 1, 2, 1000), range(4))]
    assert len({tuple(s.tolist()) for s in streams}) == 16


def test_batch_larger_than_the_set():
    with pytest.raises(UserError, match="batch_size 91 is more than the 90 items"):
        data.batches(open_samples("moons", n=100), 91, 0)
    with pytest.raises(UserError, match="on each of 2 processes"):
        data.batches(open_samples("moons", n=100), 46, 0, world=2)


# ---- which keys, which episodes


def test_demos_come_in_the_order_of_their_numbers(tmp_path):
    demos = open_demos(write(tmp_path / "a.hdf5", lengths=range(2, 14), images=False))
    assert demos.lengths.tolist() == list(range(2, 14))
    assert demos.episode_names[2] == "a.hdf5:demo_2" and demos.instructions[11] == "task 11"


def test_privileged_keys_are_hidden_from_cameras(tmp_path):
    def edit(file):
        for demo in file["data"].values():
            demo["obs/object"] = demo["obs/goal"] = np.zeros((len(demo["actions"]), 2), np.float32)
            demo["obs/count"] = np.zeros((len(demo["actions"]), 1), np.int64)
    path = write(tmp_path / "a.hdf5", edit=edit)
    keys = lambda *args: (lambda d: (list(d.state_keys), d.camera_keys))(open_demos(path, *args))
    assert keys("lowdim") == (["angle", "goal", "object", "pos"], [])
    assert keys("image") == (["angle", "goal", "pos"], ["left", "right"])
    assert keys("image", True) == (["angle", "pos"], ["left", "right"])


def test_shape_meta_names_keys_and_their_order(tmp_path):
    path = write(tmp_path / "a.hdf5")
    meta = {"obs": {"right": {"shape": [3, 4, 6], "type": "rgb"}, "pos": {"shape": [3]},
                    "angle": {"shape": [1], "type": "low_dim"}}, "action": {"shape": [2]}}
    demos = open_demos(path, shape_meta=meta)
    assert demos.state_keys == {"pos": 3, "angle": 1} and demos.camera_keys == ["right"]
    assert demos.state[9].tolist() == [104, 104.25, 104.5, 104] and demos.image_size == (4, 6)
    for key, spec, words in [("pos", {"shape": [4]}, r"low_dim \[4\], but in a.hdf5:demo_0 float64 \[3\]"),
                             ("left", {"shape": [4, 6, 3], "type": "rgb"}, r"rgb is \[3, H, W\]"),
                             ("pos", {"shape": [3], "type": "rgb"}, "'pos' is rgb"),
                             ("pos", {"shape": [3], "type": "depth"}, "'rgb' or 'low_dim'"),
                             ("pso", {"shape": [3]}, "no 'pso', did you mean 'pos'")]:
        with pytest.raises(UserError, match=words):
            open_demos(path, shape_meta={"obs": {key: spec}})
    with pytest.raises(UserError, match=r"actions have shape \[7\]"):
        open_demos(path, shape_meta={"obs": {"pos": {"shape": [3]}}, "action": {"shape": [7]}})
    with pytest.raises(UserError, match="shape_meta must read"):
        open_demos(path, shape_meta={"pos": [3]})


def test_masks_decide_unless_asked_otherwise(tmp_path):
    def masks(file):
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_3"]), np.array([b"demo_1"])
    path = write(tmp_path / "a.hdf5", lengths=[4] * 10, edit=masks, images=False)
    demos = open_demos(path)
    assert demos.train_episodes.tolist() == [0, 3] and demos.valid_episodes.tolist() == [1]
    demos = open_demos(path, val_ratio=0.3)
    assert len(demos.train_episodes) == 7 and len(demos.valid_episodes) == 3
    assert not set(demos.train_episodes) & set(demos.valid_episodes)
    few = open_demos(path, val_ratio=0.3, max_train_episodes=4)
    assert len(few.train_episodes) == 4 and set(few.train_episodes) < set(demos.train_episodes)
    assert few.valid_episodes.tolist() == demos.valid_episodes.tolist()         # not the episodes left over
    assert len(data.Windows(demos, None, 4, 2, -1, split="valid")) == 12
    with pytest.raises(UserError, match="val_ratio must be"):
        open_demos(path, val_ratio=1.0)
    with pytest.raises(UserError, match="max_train_episodes must be"):
        open_demos(path, max_train_episodes=0)


def test_split_is_diffusion_policys(tmp_path):
    """get_val_mask(206, 0.02, seed 42) there: default_rng(42).choice(206, 4, replace=False)."""
    demos = open_demos(write(tmp_path / "a.hdf5", [2] * 206, images=False), val_ratio=0.02, seed=42)
    drawn = np.random.default_rng(42).choice(206, size=4, replace=False)
    assert demos.valid_episodes.tolist() == sorted(drawn)


def test_parts_of_a_rollout_are_held_out_together(tmp_path):
    def edit(file):
        for i, demo in enumerate(file["data"].values()):
            demo.attrs["rollout"] = i // 3
    demos = open_demos(write(tmp_path / "a.hdf5", [3] * 9, edit, images=False), val_ratio=0.4)
    assert len(demos.valid_episodes) == 3 and len(set(demos.valid_episodes // 3)) == 1


def test_a_single_episode_is_trained_on_and_said(tmp_path, capsys):
    demos = open_demos(write(tmp_path / "a.hdf5", [7], images=False), val_ratio=0.5)
    assert demos.train_episodes.tolist() == [0] and len(demos.valid_episodes) == 0
    assert "no episode of" in capsys.readouterr().err
    assert len(data.Windows(demos, None, 4, 2, -1, text_len=4, split="valid")) == 0


@pytest.mark.parametrize("attrs, fps", [
    ({"fps": 15}, 15), ({"env_args": '{"control_freq": 30}'}, 30),
    ({"env_args": '{"env_kwargs": {"control_freq": 25}}'}, 25), ({"total": 1}, 20)])
def test_rate(tmp_path, capsys, attrs, fps):
    demos = open_demos(write(tmp_path / "a.hdf5", images=False, **attrs))
    assert demos.fps == fps and ("20 Hz assumed" in capsys.readouterr().err) == (fps == 20)


def test_every_episode_keeps_its_own_rate(tmp_path):
    for name, fps in (("a", 10), ("b", 50)):
        write(tmp_path / f"{name}.hdf5", [4], images=False, fps=fps)
    demos = open_demos(tmp_path, val_ratio=0)
    assert data.Windows(demos, None, 4, 2, -1).batch(torch.tensor([0, 7]))["control_hz"].tolist() == [10, 50]


def test_description_is_plain(tmp_path):
    path = write(tmp_path / "a.hdf5", fps=10, action_names=json.dumps(["x", "y"]))
    description = open_demos(path, "image").description()
    assert json.loads(json.dumps(description)) == description
    assert description["state_keys"] == {"angle": 1, "pos": 3} and description["image_size"] == [4, 6]
    assert description["action_names"] == ["x", "y"] and description["fps"] == 10


# ---- ALOHA


def test_aloha_folder(tmp_path, capsys):
    folder = write_aloha(tmp_path / "set", [3] * 11, language_instruction="fold")
    demos = open_demos(folder, "image", text=True)
    assert demos.episode_names[9:] == ["episode_9.hdf5", "episode_10.hdf5"]        # not 0, 1, 10, 2
    assert demos.state_keys == {"qpos": 14, "qvel": 14} and demos.camera_keys == ["top"]
    assert demos.fps == 50 and "50 Hz assumed" in capsys.readouterr().err
    assert set(demos.instructions) == {"fold"}
    images = data.Windows(demos, None, 2, 1, 0).images          # every picture shows its episode's number
    assert images.unique().tolist() == demos.train_episodes.tolist()
    assert len(open_demos(str(folder / "episode_1*.hdf5"), val_ratio=0).lengths) == 2      # 1 and 10


@pytest.mark.parametrize("form", ["variable", "padded", "strings"])
def test_jpeg_frames_have_their_colours_put_right(tmp_path, form):
    """OpenCV is given RGB and writes it as BGR; whoever decodes with anything else has to swap back."""
    Image = pytest.importorskip("PIL.Image", reason="pillow reads compressed frames")
    import io
    red = np.zeros((16, 24, 3), np.uint8)
    red[..., 0] = 255

    def encoded():
        buffer = io.BytesIO()
        Image.fromarray(red[..., ::-1].copy()).save(buffer, "JPEG", quality=95)     # as cv2.imencode does
        return buffer.getvalue()

    def write_frames(file, n):
        one = np.frombuffer(encoded(), np.uint8)
        if form == "variable":
            top = file.create_dataset("observations/images/top", (n,), h5py.vlen_dtype(np.uint8))
            for t in range(n):
                top[t] = one
        elif form == "padded":
            file["observations/images/top"] = np.stack([np.pad(one, (0, 100))] * n)
        else:
            file["observations/images/top"] = np.array([encoded()] * n, dtype=f"S{len(one) + 50}")

    folder = write_aloha(tmp_path / "set", [3, 4], write_frames)
    (folder / "expanded_instruction_gpt-4-turbo.json").write_text(json.dumps({"instruction": "pour"}))
    demos = open_demos(folder, "image")
    image = torch.from_numpy(demos.images(1, 0, 4))
    assert demos.image_size == (16, 24) and image.shape == (4, 1, 3, 16, 24)
    assert (image[:, :, 0] > 245).all() and (image[:, :, 1:] < 10).all()
    assert demos.instructions == ["pour", "pour"]
    meta = {"obs": {"top": {"type": "rgb", "shape": [3, 16, 24]}, "qpos": {"shape": [14]}}}
    assert open_demos(folder, shape_meta=meta).camera_keys == ["top"]
    meta["obs"]["top"]["shape"] = [3, 24, 16]
    with pytest.raises(UserError, match=r"'top' is \[3, 24, 16\], but the pictures of .* are \[3, 16, 24\]"):
        open_demos(folder, shape_meta=meta)

    demos.close()
    with h5py.File(folder / "episode_1.hdf5", "a") as file:
        file["observations/images/top"][2] = np.zeros_like(file["observations/images/top"][2])
    with pytest.raises(UserError, match="episode_1.hdf5: 'top', steps 2 to 2: a JPEG frame cannot"):
        open_demos(folder, "image").images(1, 2, 3)


# ---- labels per step


def add_labels(file):
    """To the file of `write`: success (T,) bool and goal_error (T, 2) beside the actions, progress (T, 1)
    among the observations; their values tell episode and step."""
    for demo in file["data"].values():
        step = demo["actions"][:, 0]
        demo["success"] = step % 100 >= 2
        demo["goal_error"] = np.stack([step + 0.5, -step], 1)
        demo["obs/progress"] = step[:, None] / 4


def test_labels_are_those_of_the_steps_of_the_actions(tmp_path):
    path = write(tmp_path / "a.hdf5", edit=add_labels)
    extra = {"success": 1, "goal_error": 2, "progress": 1}
    demos = open_demos(path, extra=extra, val_ratio=0)
    normalizer = data.fit_normalizer(demos)             # which leaves labels in the units of the file
    batch = data.Windows(demos, normalizer, 6, 2, -1).batch(torch.arange(16))
    steps = normalizer.unnormalize("actions", batch["actions"])[..., :1]    # clamped: 0 0 1 2 .. n-1 n-1
    assert torch.allclose(batch["goal_error"], torch.cat([steps + 0.5, -steps], -1), atol=1e-3)
    assert torch.allclose(batch["progress"], steps / 4, atol=1e-3)
    assert batch["success"].dtype == torch.float32 and batch["success"].shape == (16, 6, 1)
    assert batch["success"][0, :, 0].tolist() == [0, 0, 0, 1, 1, 1]        # steps 0 0 1 2 3 4
    assert batch["success"][15, :, 0].tolist() == [0, 1, 1, 1, 1, 1]       # steps 1 2 2 2 2 2 of demo_2
    assert list(demos.state_keys) == ["angle", "pos"]   # a label is not shown to the policy ...
    assert list(open_demos(path).state_keys) == ["angle", "pos", "progress"]
    meta = {"obs": {"progress": {"shape": [1]}}}        # ... unless it is asked for by name
    assert list(open_demos(path, shape_meta=meta, extra=extra).state_keys) == ["progress"]


def test_labels_of_the_held_out_part_of_aloha_and_of_several_robots(tmp_path):
    folder = write_aloha(tmp_path / "aloha", (4, 5, 6))
    for e, n in enumerate((4, 5, 6)):
        with h5py.File(folder / f"episode_{e}.hdf5", "a") as file:
            file["reward"] = 10.0 * e + np.arange(n)
    demos = open_demos(folder, extra={"reward": 1}, seed=1)
    for split, episodes in (("train", demos.train_episodes), ("valid", demos.valid_episodes)):
        windows = data.Windows(demos, None, 1, 1, 0, split=split)
        got = windows.batch(torch.arange(len(windows)))["reward"].flatten().tolist()
        assert got == [10.0 * e + t for e in episodes for t in range((4, 5, 6)[e])]

    parts = {}
    for name in "ab":
        path = write(tmp_path / f"{name}.hdf5", edit=add_labels)
        part = open_demos(path, extra={"success": 1}, val_ratio=0)
        part.labels = part.labels + 2 * (name == "b")   # to tell them apart
        parts[name] = (part, [0, 1], [0, 1, 2, 3, 4])
    windows = data.Windows(MixedDemos(parts, dim=5), None, 1, 1, 0)
    got = windows.batch(torch.arange(32))["success"].flatten().tolist()
    one = [float(t >= 2) for n in (5, 8, 3) for t in range(n)]
    assert got == one + [x + 2 for x in one]


@pytest.mark.parametrize("extra, words", [
    ({"sucess": 1}, r"a.hdf5:demo_0 has no label 'sucess', did you mean 'success'\?"),
    ({"success": 2}, r"demo_0: label 'success' is bool \(5,\), extra asks for numbers \(5, 2\)"),
    ({"goal_error": 1}, r"label 'goal_error' is float64 \(5, 2\), extra asks for numbers \(5, 1\) or \(5,\)"),
    ({"left": 1}, r"label 'left' is uint8 \(5, 4, 6, 3\), extra asks"),
    ({"note": 1}, r"label 'note' is object \(5,\), extra asks for numbers"),
    ({"broken": 1}, r"a.hdf5:demo_0: 'broken' is not finite at step 1"),
    ({"only_once": 1}, r"a.hdf5:demo_1 has no label 'only_once'"),
    ({"short": 1}, r"demo_0: label 'short' is float64 \(4,\), extra asks for numbers \(5, 1\) or \(5,\)"),
    ({"state": 1}, "a batch has its own 'state': give the label another name"),
    ({"success": 0}, "extra: success: 0 should be how many numbers a step has"),
    ({"success": True}, "extra: success: True should be how many"),
])
def test_bad_labels(tmp_path, extra, words):
    def edit(file):
        add_labels(file)
        file["data/demo_0/only_once"] = np.zeros(5)
        file["data/demo_0/short"] = np.zeros(4)
        file["data/demo_0/note"] = ["a"] * 5
        file["data/demo_0/broken"] = [0, np.nan, 0, 0, 0]
        file["data/demo_0/empty"] = h5py.Empty("f")     # of no step: neither a label nor a reason to refuse
    with pytest.raises(UserError, match=words) as error:
        open_demos(write(tmp_path / "a.hdf5", edit=edit), extra=extra)
    assert "\n" not in str(error.value)


def test_labels_come_from_the_yaml(tmp_path):
    write(tmp_path / "a.hdf5", edit=add_labels)
    (tmp_path / "a.yaml").write_text(f"model: dp_cnn\ndata: {tmp_path}/a.hdf5\nextra: {{success: 1}}\n")
    options, _ = parse_options(["--config", str(tmp_path / "a.yaml")])
    _, make_items, _, _ = data.open_data(options, dp_cnn)
    items, _ = make_items(dp_cnn.Config(), "cpu")
    assert items.batch(torch.arange(3))["success"].shape == (3, 16, 1)
    (tmp_path / "a.yaml").write_text("extra: success")
    with pytest.raises(UserError, match="extra = 'success' should be dict"):
        parse_options(["--config", str(tmp_path / "a.yaml")])


# ---- bad input


def replace(path, value):
    def edit(file):
        attrs = dict(file[path].attrs)
        del file[path]
        file[path] = value
        file[path].attrs.update(attrs)
    return edit


def spoil(path, index, value):
    def edit(file):
        file[path][index] = value
    return edit


def drop(path):
    def edit(file):
        del file[path]
    return edit


def claim(number):
    def edit(file):
        file["data/demo_1"].attrs["num_samples"] = number
    return edit


@pytest.mark.parametrize("edit, words", [
    (drop("data/demo_1/actions"), r"a.hdf5:demo_1 holds obs, but no 'actions'"),
    (drop("data/demo_1/obs/pos"), r"demo_1 has observations angle, left, right, but no 'pos'"),
    (drop("data"), r"holds nothing, but neither data/demo_<i>"),
    (spoil("data/demo_1/actions", (6, 1), np.nan), r"demo_1: 'actions' is not finite at step 6 \(1 of 8"),
    (spoil("data/demo_2/actions", (0, 0), np.inf), r"demo_2: 'actions' is not finite at step 0"),
    (spoil("data/demo_0/obs/pos", (3, 2), np.nan), r"demo_0: 'pos' is not finite at step 3"),
    (replace("data/demo_1/actions", np.zeros((8, 7))), r"demo_1: actions have shape \(7,\) per step, in"),
    (replace("data/demo_1/actions", np.zeros(8)), r"make it \(steps, dimensions\)"),
    (replace("data/demo_1/obs/pos", np.zeros((8, 4))), r"demo_1: 'pos' has shape \(4,\) per step"),
    (replace("data/demo_1/obs/pos", np.zeros((9, 3))), r"actions have 8 steps, 'pos' is \(9, 3\)"),
    (replace("data/demo_1/obs/left", np.zeros((8, 5, 6, 3), np.uint8)), r"'left' has shape \(5, 6, 3\)"),
    (replace("data/demo_1/obs/left", np.zeros((8, 4, 6, 3), np.float32)), r"'left' is float32 .* uint8"),
    (replace("data/demo_0/obs/left", np.zeros((5, 4, 6, 4), np.uint8)), r"'left' is uint8 \(5, 4, 6, 4\)"),
    (claim(9), r"num_samples says 9, actions have 8 steps"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_file(tmp_path, edit, words):
    path = write(tmp_path / "a.hdf5", edit=edit)
    with pytest.raises(UserError, match=words) as error:
        open_demos(path, "image")
    assert "\n" not in str(error.value)


def test_episode_of_one_step(tmp_path):
    with pytest.raises(UserError, match="demo_1 has 1 step, an episode needs at least 2"):
        open_demos(write(tmp_path / "a.hdf5", [4, 1]))


def test_no_camera_and_no_state(tmp_path):
    path = write(tmp_path / "a.hdf5", images=False)
    with pytest.raises(UserError, match="no camera, uint8"):
        open_demos(path, "image")
    with pytest.raises(UserError, match="did you mean 'lowdim'"):
        open_demos(path, "low_dim")

    def images_only(file):
        for demo in file["data"].values():
            del demo["obs/pos"], demo["obs/angle"]
    path = write(tmp_path / "b.hdf5", edit=images_only)
    with pytest.raises(UserError, match="no state, float"):
        open_demos(path)
    demos = open_demos(path, "image")                      # cameras alone are enough
    normalizer = data.fit_normalizer(demos)
    assert data.Windows(demos, normalizer, 4, 2, -1).batch(torch.arange(3))["state"].shape == (3, 2, 0)


def test_two_files_that_do_not_match(tmp_path):
    write(tmp_path / "a.hdf5")
    write(tmp_path / "b.hdf5", edit=lambda f: [replace(f"data/{d}/obs/pos", np.zeros((n, 2)))(f)
                                               for d, n in zip(list(f["data"]), (5, 8, 3))])
    with pytest.raises(UserError, match=r"b.hdf5:demo_0: 'pos' has shape \(2,\) per step, in a.hdf5:demo_0"):
        open_demos(tmp_path)


def test_cameras_of_different_size(tmp_path):
    def edit(file):
        for demo in file["data"].values():
            replace(f"{demo.name}/obs/right", np.zeros((len(demo["actions"]), 8, 8, 3), np.uint8))(file)
    with pytest.raises(UserError, match="cameras differ in size"):
        open_demos(write(tmp_path / "a.hdf5", edit=edit), "image")


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.hdf5").write_text("this is no HDF5")
    whole = write(tmp_path / "whole.hdf5").read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "buffer.zarr").mkdir()
    (tmp_path / "lerobot" / "meta").mkdir(parents=True)
    (tmp_path / "lerobot" / "meta" / "info.json").write_text("{}")
    for name, words in [("whola.hdf5", "did you mean 'whole.hdf5'"), ("empty", "holds no"),
                        ("no*.h5", "check the path"), ("text.hdf5", "cannot be opened as HDF5"),
                        ("cut.hdf5", "cut short"), ("lerobot", "LeRobot"), ("buffer.zarr", "demos.convert")]:
        with pytest.raises(UserError, match=words) as error:
            open_demos(tmp_path / name)
        assert "\n" not in str(error.value) and name.split(".")[0] in str(error.value)
    with pytest.raises(UserError, match="did you mean 'tabletop'"):
        open_demos("tabeltop")


def test_damage_inside_the_data_is_one_line(tmp_path):
    """A chunk whose compressed bytes are overwritten: the file opens, reading fails."""
    def edit(file):
        noise = np.random.default_rng(0).random((5, 400))
        file.create_dataset("data/demo_0/obs/packed", data=noise, compression=4, chunks=noise.shape)
        for d, n in (("demo_1", 8), ("demo_2", 3)):
            file[f"data/{d}/obs/packed"] = np.zeros((n, 400))
    path = write(tmp_path / "a.hdf5", edit=edit)
    with h5py.File(path) as file:
        chunk = file["data/demo_0/obs/packed"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    with pytest.raises(UserError, match="demo_0: /data/demo_0/obs/packed cannot be read, copy") as error:
        open_demos(path)
    assert "\n" not in str(error.value)


def test_files_are_not_kept_open(tmp_path):
    path = write(tmp_path / "a.hdf5")
    demos = open_demos(path, "image")
    data.Windows(demos, None, 4, 2, -1)
    with h5py.File(path, "a") as file:                          # raises while anybody reads
        file["data"].attrs["note"] = "still mine"
    with h5py.File(path) as file:
        assert file["data"].attrs["note"] == "still mine"


def test_written_aside_keeps_what_was_there(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(UserError, match="cannot write"), written_aside(path / "below a file"):
        pass


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "result.hdf5"
    path.write_text("old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="make room or take another folder: .* No space left"):
        with new_hdf5(path) as file:
            file["x"] = np.zeros(1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- several robots in one set


def two_robots(tmp_path, memory_gb=4.0, **second):
    """Set "a" with two cameras at 10 Hz, set "b" with one at 5 Hz, in other places of a vector of ten."""
    a = open_demos(write(tmp_path / "a.hdf5"), obs="image", seed=1)
    meta = {"obs": {"pos": {"shape": [3]}, "right": {"shape": [3, 4, 6], "type": "rgb"}}}
    b = open_demos(write(tmp_path / "b.hdf5", lengths=(4, 6), fps=5), shape_meta=meta, seed=1)
    for demos in (a, b):
        demos.memory_gb = memory_gb
    return MixedDemos({"a": (a, [1, 0], [4, 5, 6, 7]), "b": (b, [1, 8], [9, 5, 4])}, dim=10), a, b


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_robots_are_packed_into_one_vector(tmp_path, memory_gb):
    demos, a, b = two_robots(tmp_path, memory_gb)
    assert demos.lengths.tolist() == [5, 8, 3, 4, 6] and demos.robot.tolist() == [0, 0, 0, 1, 1]
    assert sorted([*demos.train_episodes, *demos.valid_episodes]) == [0, 1, 2, 3, 4]
    assert len(demos.valid_episodes) == 2               # each robot holds one out
    for split in ("train", "valid"):
        windows = data.Windows(demos, None, 4, 2, 0, text_len=8, split=split)
        batch = windows.batch(torch.arange(len(windows)))
        for demo, name, at in ((a, "a", 0), (b, "b", 3)):
            alone = data.Windows(demo, None, 4, 2, 0, text_len=8, split=split)
            want = alone.batch(torch.arange(len(alone)))
            mine = torch.tensor([windows.episodes[e] in range(at, at + len(demo.lengths))
                                 for e in windows.item_episode.tolist()])
            got = {key: x[mine] for key, x in batch.items()}
            places = demos.places[name]
            assert torch.equal(got["actions"][..., places["actions"]], want["actions"])
            assert torch.equal(got["state"][..., places["state"]], want["state"])
            for kind, key in (("action", "actions"), ("state", "state")):
                assert got[f"{kind}_valid"].sum(1).eq(len(places[key])).all()
                assert (got[key] * ~got[f"{kind}_valid"][:, None] == 0).all()
            for key in ("action_mask", "control_hz", "text"):
                assert torch.equal(got[key], want[key])
            cameras = want["images"].shape[2]
            assert torch.equal(got["images"][:, :, :cameras], want["images"])
            assert got["images"].shape[2] == 2 and (got["images"][:, :, cameras:] == 127).all()


@pytest.mark.parametrize("mode", ["meanstd", "minmax"])
def test_a_place_is_normalised_over_the_robots_that_have_it(tmp_path, mode):
    demos, a, b = two_robots(tmp_path)
    n = data.fit_normalizer(demos, mode)
    train = lambda d: d.actions[d.rows(d.train_episodes)]
    one = lambda x: Normalizer.fit({"x": x[:, None]}, mode)
    for place, values in ((0, train(a)[:, 1]), (8, train(b)[:, 1]),
                          (1, np.concatenate([train(a)[:, 0], train(b)[:, 0]]))):
        want = one(values)
        assert n.scale["actions"][place] == want.scale["x"][0]
        assert n.offset["actions"][place] == want.offset["x"][0]
        assert n.stats["actions"]["max"][place] == values.max()
    assert n.scale["actions"][[2, 3, 9]].tolist() == [1, 1, 1] and n.offset["actions"][2] == 0
    assert n.near_constant["actions"] == [] and "WARNING" not in n.summary()
    windows = data.Windows(demos, n, 4, 1, 0)
    batch = windows.batch(torch.arange(len(windows)))
    assert (batch["actions"] * ~batch["action_valid"][:, None] == 0).all()
    raw = n.unnormalize("actions", batch["actions"])
    plain = data.Windows(demos, None, 4, 1, 0).batch(torch.arange(len(windows)))["actions"]
    assert torch.allclose(raw * batch["action_valid"][:, None], plain, atol=1e-3)


def test_the_description_of_robots_is_plain_and_tells_each(tmp_path):
    demos, a, _ = two_robots(tmp_path)
    d = demos.description()
    torch.save(d, tmp_path / "d.pt")
    assert torch.load(tmp_path / "d.pt", weights_only=True) == d
    assert d["action_dim"] == d["state_dim"] == 10 and list(d["robots"]) == ["a", "b"]
    assert d["robots"]["b"]["fps"] == 5 and d["robots"]["b"]["camera_keys"] == ["right"]
    assert d["robots"]["a"]["places"] == {"actions": [1, 0], "state": [4, 5, 6, 7]}
    assert d["robots"]["a"]["state_keys"] == a.state_keys


def test_robots_that_do_not_fit(tmp_path):
    _, a, b = two_robots(tmp_path)
    with pytest.raises(UserError, match="robot b: .*2 action dimensions, action_names names 3"):
        MixedDemos({"a": (a, [1, 0], [4, 5, 6, 7]), "b": (b, [1, 2, 3], [9, 5, 4])}, dim=10)
    b.image_size = (5, 5)
    with pytest.raises(UserError, match="robots differ in size.*bring them to one size"):
        MixedDemos({"a": (a, [1, 0], [4, 5, 6, 7]), "b": (b, [1, 8], [9, 5, 4])}, dim=10)


@pytest.mark.parametrize("fps", [0, -5, float("nan")])
def test_a_control_frequency_is_above_zero(tmp_path, fps):
    with pytest.raises(UserError, match="frequency is .* Hz, it must be above 0: correct attribute 'fps'"):
        open_demos(write(tmp_path / "a.hdf5", fps=float(fps)))


def test_text_that_is_cut_is_said_once(capsys):
    for _ in range(3):
        encode_text("a long instruction, cut", 6)
    assert capsys.readouterr().err.count("has 23 bytes and is cut to 6") == 1


def test_a_model_file_may_make_its_own_codes(tmp_path):
    demos = open_demos(write(tmp_path / "a.hdf5"), text=True)
    encode = lambda text: torch.tensor([7, 8, int(text[-1])])
    windows = data.Windows(demos, None, 4, 1, 0, text_len=3, encode=encode)
    codes = windows.batch(torch.arange(len(windows)))["text"].tolist()
    assert all(code[:2] == [7, 8] and code[2] in range(3) for code in codes)

    def refuses(text):
        raise ValueError("too long, shorten it")
    with pytest.raises(UserError, match="too long, shorten it"):
        data.Windows(demos, None, 4, 1, 0, text_len=3, encode=refuses)


def test_the_second_robot_of_the_built_in_task(tmp_path):
    demos = open_demos("tabletop_velocity", episodes=6, cache=tmp_path)
    assert demos.fps == 5 and demos.action_names == ["velocity_x", "velocity_y", "gripper"]
    first = open_demos("tabletop", episodes=6, cache=tmp_path)
    assert first.fps == 10 and len(list(tmp_path.iterdir())) == 2
    assert demos.lengths.sum() < 0.8 * first.lengths.sum()

# ---- the generated set


def test_tabletop_is_made_once_and_read_like_any_file(tmp_path, monkeypatch, capsys):
    from robot import tabletop
    demos = open_demos("tabletop", "image", text=True, episodes=4, cache=tmp_path, val_ratio=0.25)
    path, = tmp_path.iterdir()
    assert path.name.startswith("tabletop_4_cameras_seed0_") and path.suffix == ".hdf5"
    written = path.stat().st_mtime_ns
    assert demos.fps == tabletop.FPS and demos.image_size == (64, 64) and len(demos.camera_keys) == 2
    assert not {"object", "goal"} & demos.state_keys.keys()
    assert set(demos.instructions) <= set(tabletop.INSTRUCTIONS)
    made = demonstrations(4, seed=0, cameras=True)
    assert demos.lengths.tolist() == [len(d["actions"]) for d in made]
    assert np.array_equal(demos.actions, np.concatenate([d["actions"] for d in made]))
    camera = made[1]["obs"][demos.camera_keys[0]]
    assert np.array_equal(demos.images(1, 0, len(camera))[:, 0], np.moveaxis(camera, 3, 1))
    rollout = np.array([d["episode"] for d in made])
    assert not set(rollout[demos.train_episodes]) & set(rollout[demos.valid_episodes])

    open_demos("tabletop", "image", episodes=4, cache=tmp_path)
    assert path.stat().st_mtime_ns == written
    changed = tmp_path / "changed" / "tabletop.py"
    changed.parent.mkdir()
    changed.write_text(Path(tabletop.__file__).read_text() + "# one line more\n")
    monkeypatch.setattr(tabletop, "__file__", str(changed))
    open_demos("tabletop", "lowdim", episodes=3, cache=tmp_path)
    monkeypatch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path / "elsewhere"))
    open_demos("tabletop", "lowdim", episodes=3, seed=1)
    names = sorted(p.name for p in tmp_path.rglob("*.hdf5"))
    assert [n.rsplit("_", 1)[0] for n in names] == ["tabletop_3_lowdim_seed0", "tabletop_3_lowdim_seed1",
                                                    "tabletop_4_cameras_seed0"]
    assert names[0].rsplit("_", 1)[1] != path.name.rsplit("_", 1)[1]
    assert "generating 3 demonstrations" in capsys.readouterr().err


# ---- points and images


@pytest.mark.parametrize("name, classes", [("moons", 2), ("checkerboard", 0), ("eight_gaussians", 8),
                                           ("spirals", 2)])
def test_points(name, classes):
    train, valid = (open_samples(name, n=5000, split=split) for split in ("train", "valid"))
    assert (len(train), len(valid), train.shape, train.n_classes) == (4500, 500, (2,), classes)
    x = torch.cat([train.x, valid.x])
    assert x.dtype == torch.float32 and x.abs().max() < 1.15 and x.abs().amax(0).min() > 0.4
    assert torch.equal(open_samples(name, n=5000).x, train.x)
    assert not torch.equal(open_samples(name, n=5000, seed=1).x, train.x)
    batch = train.batch(torch.tensor([3, 0]))
    assert torch.equal(batch["x"], train.x[[3, 0]]) and ("label" in batch) == bool(classes)
    assert train.episode(torch.tensor([3])) == [f"{name}:3"] and train.to("cpu") is train


def test_points_lie_where_they_should():
    x = open_samples("checkerboard", n=4000).x
    field = ((x + 1) * 2).floor().long()
    assert (field.sum(1) % 2 == 0).all()                        # only the fields of one colour
    assert torch.bincount(field[:, 1] * 4 + field[:, 0], minlength=16).gt(300).sum() == 8
    s = open_samples("eight_gaussians", n=4000)
    angle = s.label * torch.pi / 4
    rest = s.x - 0.8 * torch.stack([angle.cos(), angle.sin()], 1)
    assert (rest.std(0) - 0.05).abs().max() < 0.003
    s = open_samples("spirals", n=2000)                    # half a turn makes one arm the other
    nearest = torch.cdist(-s.x[s.label == 0], s.x[s.label == 1]).min(1).values
    assert nearest.median() < 0.02


def test_shapes_can_be_told_apart():
    s = open_samples("shapes", n=1600)
    assert s.shape == (3, 32, 32) and s.n_classes == 8 and s.class_names[:2] == ["disc", "square"]
    x = s.batch(torch.arange(len(s)))["x"]
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    ground = x[:, :, :1, :1]                                    # shapes keep clear of the corner
    colour = (x - ground).abs().flatten(2).amax(2)[:, :, None, None]
    cover = ((x - ground) / colour.clamp(min=0.3)).mean(1)      # 0 outside .. 1 inside
    assert ((cover > 0.1) & (cover < 0.9)).float().mean() > 0.02    # edges are mixed
    # extent of the shape from its bounding box, and the share of the box that is filled, per class
    inside = cover > 0.5
    box = inside.any(1).sum(1) * inside.any(2).sum(1)
    fill = inside.sum((1, 2)) / box
    mean = {name: fill[s.label == k].mean().item() for k, name in enumerate(s.class_names)}
    assert abs(mean["disc"] - np.pi / 4) < 0.05 and mean["square"] > 0.95 and mean["bar"] > 0.9
    assert abs(mean["diamond"] - 0.5) < 0.08 and abs(mean["triangle"] - 0.5) < 0.1
    assert abs(mean["ring"] - np.pi / 4 * (1 - 0.25)) < 0.07 and abs(mean["cross"] - 0.51) < 0.07
    assert mean["star"] < 0.45


def save(path, **arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, x in arrays.items():
                file[key] = x.astype("S") if x.dtype.kind == "U" else x
    return path


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_image_files(tmp_path, suffix):
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    digits[:, 0, 0] = 7                                         # what the corner shows is the background
    path = save(tmp_path / f"digits.{suffix}", x=digits, y=np.arange(40) % 10)
    train, valid = open_samples(path), open_samples(path, split="valid")
    assert (len(train), len(valid), train.shape, train.n_classes) == (36, 4, (1, 32, 32), 10)
    assert (train.x[:, 0, 2:30, 2:30].numpy() == digits[:36]).all() and (train.x[:, 0, :2] == 7).all()
    assert valid.label.tolist() == [6, 7, 8, 9]
    x = train.batch(torch.tensor([5]))["x"]
    assert torch.allclose(x[0, 0, 2:30, 2:30], torch.from_numpy(digits[5]).float() / 127.5 - 1)

    colour = rng.integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)
    path = save(tmp_path / f"colour.{suffix}", x_train=colour[:7], y_train=np.zeros(7, np.uint8),
                x_test=colour[7:], y_test=np.ones(3, np.uint8), class_names=np.array(["cat", "dog"]))
    train, valid = open_samples(path), open_samples(path, split="valid")
    assert (len(train), len(valid), train.shape, train.class_names) == (7, 3, (3, 16, 24), ["cat", "dog"])
    assert (train.x[2, 1].numpy() == colour[2, :, :, 1]).all()
    assert open_samples(save(tmp_path / f"n.{suffix}", x=digits)).n_classes == 0
    assert len(open_samples(path, n=5)) == 5


@pytest.mark.parametrize("arrays, words", [
    ({"x": np.zeros((4, 8, 8), np.float32)}, r"'x' is float32 \(4, 8, 8\), write images as uint8"),
    ({"x": np.zeros((4, 8), np.uint8)}, r"'x' is uint8 \(4, 8\)"),
    ({"x": np.zeros((4, 3, 8, 8), np.uint8)}, r"'x' is uint8 \(4, 3, 8, 8\)"),
    ({"x": np.zeros((0, 8, 8), np.uint8)}, r"'x' is uint8 \(0, 8, 8\)"),
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.array([0, 1, 2])}, "one integer for each of 4 images"),
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(4)}, "'y' is float64"),
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.array([0, 1, -1, 2])}, "label -1 of image 2"),
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.array([0, 1, 2, 2]), "class_names": np.array(["a", "b"])},
     "label 2 of image 2 in 'y' is out of range, classes go from 0 to 1"),
    ({"x_train": np.zeros((2, 8, 8), np.uint8), "y_train": np.array([0, 1]),
      "x_test": np.zeros((2, 8, 8), np.uint8), "y_test": np.array([0, 2])}, "label 2 of image 1 in 'y_test'"),
    ({"images": np.zeros((4, 8, 8), np.uint8)}, "holds images, but no images 'x'"),
])
def test_bad_image_file(tmp_path, arrays, words):
    for suffix in ("npz", "hdf5"):
        with pytest.raises(UserError, match=words):
            open_samples(save(tmp_path / f"a.{suffix}", **arrays))


def test_bad_image_paths(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 9), np.uint8)
    (tmp_path / "cut.npz").write_bytes(save(tmp_path / "whole.npz", x=noise).read_bytes()[:300])
    np.savez(tmp_path / "pickle.npz", x=np.array([{"a": 1}], dtype=object))
    for name in ("text", "cut", "pickle"):
        with pytest.raises(UserError, match=f"{name}.npz cannot be read as .npz") as error:
            open_samples(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean 'moons'"):
        open_samples("moon")
    with pytest.raises(UserError, match="did you mean 'whole.npz'"):
        open_samples(tmp_path / "whol.npz")


# ---- the inspector


def test_inspector_names_what_was_planted(tmp_path, capsys):
    def edit(file):
        file["data/demo_1/actions"][6, 1] = np.nan
        file["data/demo_2"].attrs["num_samples"] = 99
        for demo in file["data"].values():
            demo["obs/dead"] = np.column_stack([demo["obs/pos"][:, :1], np.full(len(demo["actions"]), 3.0)])
            demo["obs/left"][:] = 0
        for key in ("actions", "obs/pos", "obs/angle", "obs/dead", "obs/right"):
            file[f"data/demo_3/{key}"][:20] = file[f"data/demo_3/{key}"][0]         # waits for 2 s
    path = write(tmp_path / "a.hdf5", [30, 30, 30, 40], edit)
    check.inspect(path)
    report = capsys.readouterr().out
    wrong, odd = report.split("must be mended:")[1].split("worth a look:")
    assert "demo_1: 'actions' is not finite at step 6 (1 of 30 steps)" in wrong
    assert "demo_2: num_samples says 99, actions have 30 steps" in wrong
    assert "'dead' is near-constant in dimension 1:" in odd
    assert "camera 'left' shows nothing but the value 0" in odd
    assert "33% of the episodes do not move in their first 5 steps (median 20, longest 20 in" in odd
    assert "4 episodes, 130 steps at 10 Hz" in report and "30 .. 40 steps, median 30" in report
    assert "1 x task 3" in report and "(4, 6, 3)" in report


def test_inspector_counts_padding(tmp_path, capsys):
    """Against the action masks of the windows themselves."""
    path = write(tmp_path / "a.hdf5", [5, 20, 40])
    check.inspect(path)
    demos = open_demos(path, val_ratio=0)
    masks = data.Windows(demos, None, 16, 2, -1).batch(torch.arange(65))["action_mask"]
    assert f"padding       {1 - masks.float().mean():.1%}" in capsys.readouterr().out


def test_inspector_on_other_files(tmp_path, capsys):
    check.inspect(write(tmp_path / "fine.hdf5", [20, 20]))
    assert capsys.readouterr().out.endswith("nothing looks wrong\n")
    folder = write_aloha(tmp_path / "set", [20, 30])
    (folder / "broken.hdf5").write_text("no")
    check.inspect(folder)
    report = capsys.readouterr().out
    assert "2 episodes, 50 steps at unknown Hz" in report and "broken.hdf5 cannot be opened" in report
    ones = np.ones((5, 28, 28), np.uint8)
    check.inspect(save(tmp_path / "a.npz", x=ones, y=np.array([0, 1, 1, 3, 3])))
    report = capsys.readouterr().out
    assert "1 x 32 x 32 after padding" in report and "all: no image of class 2" in report
    assert "no value above 1" in report
    check.inspect(save(tmp_path / "b.hdf5", x=np.ones((5, 28), np.uint8)))
    assert "must be mended" in capsys.readouterr().out


def test_command_line_ends_in_one_line(tmp_path):
    (tmp_path / "text.hdf5").write_text("this is no HDF5")
    command = [sys.executable, "-m", "demos.check", tmp_path / "text.hdf5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "cannot be opened as HDF5" in done.stderr


# ---- convert.py


def test_convert_a_replay_buffer(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr reads Diffusion Policy's replay buffers")
    import shutil
    rng = np.random.default_rng(0)
    arrays = {"action": rng.random((50, 2)), "state": rng.random((50, 5)), "keypoint": rng.random((50, 9, 2)),
              "img": rng.integers(0, 256, (50, 8, 8, 3))}
    buffer = zarr.open_group(str(tmp_path / "b.zarr"), mode="w")
    for key, x in arrays.items():
        buffer[f"data/{key}"] = x.astype(np.float32)
    buffer["meta/episode_ends"] = np.array([20, 50])
    shutil.make_archive(str(tmp_path / "b.zarr"), "zip", tmp_path / "b.zarr")
    for source, images in (("b.zarr", False), ("b.zarr.zip", True)):
        out = tmp_path / f"{images}.hdf5"
        assert convert.convert(tmp_path / source, out, images, fps=12, instruction="push") == (2, 50)
        demos = open_demos(out, "image" if images else "lowdim", val_ratio=0)
        assert demos.lengths.tolist() == [20, 30] and demos.fps == 12 and demos.instructions == ["push"] * 2
        assert demos.state_keys == {"agent_pos": 2, "keypoint": 18, "state": 5}
        assert np.array_equal(demos.actions, arrays["action"].astype(np.float32))
        assert np.array_equal(demos.state[:, 2:20], arrays["keypoint"].reshape(50, 18).astype(np.float32))
        assert np.array_equal(demos.state[:, :2], arrays["state"][:, :2].astype(np.float32))
    assert demos.camera_keys == ["image"]
    assert np.array_equal(demos.images(1, 0, 30)[:, 0], np.moveaxis(arrays["img"][20:], 3, 1))

    with pytest.raises(UserError, match="exists already"):
        convert.convert(tmp_path / "b.zarr", out)
    buffer["meta/episode_ends"][:] = np.array([20, 49])
    with pytest.raises(UserError, match="has 50 steps, episodes end at 49"):
        convert.convert(tmp_path / "b.zarr", tmp_path / "c.hdf5")
    assert not list(tmp_path.glob("c.hdf5*"))
    (tmp_path / "not.zarr").mkdir()
    with pytest.raises(UserError, match="not.zarr"):
        convert.convert(tmp_path / "not.zarr", tmp_path / "c.hdf5")


def test_convert_without_zarr_or_buffer(tmp_path, monkeypatch):
    (tmp_path / "b.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UserError, match="pip install zarr"):
        convert.convert(tmp_path / "b.zarr", tmp_path / "c.hdf5")
    with pytest.raises(UserError, match="did you mean 'b.zarr'"):
        convert.convert(tmp_path / "a.zarr", tmp_path / "c.hdf5")


# ---- real files


real = pytest.mark.skipif("DEMO_DATA" not in os.environ, reason="DEMO_DATA names no folder of real data")


@real
@pytest.mark.parametrize("name, obs, episodes, state, fps", [
    ("pusht_lowdim", "lowdim", 206, 26, 10), ("pusht_image", "image", 206, 7, 10),
    ("g1_bottle_lowdim", "lowdim", 100, 26, 30), ("g1_bottle_image", "image", 5, 26, 10),
    ("lift_scripted_lowdim", "lowdim", 200, 26, 20)])
def test_real_demonstrations(name, obs, episodes, state, fps, capsys):
    path = Path(os.environ["DEMO_DATA"]) / f"{name}.hdf5"
    demos = open_demos(path, obs, memory_gb=0)
    assert (len(demos.lengths), demos.state_dim, demos.fps) == (episodes, state, fps)
    normalizer = data.fit_normalizer(demos)
    windows = data.Windows(demos, normalizer, 16, 2, -1)
    batch = windows.batch(torch.arange(0, len(windows), 997))
    assert batch["actions"].abs().max() <= 1 + 1e-5
    if name.startswith("lift"):
        assert normalizer.near_constant["actions"] == [3, 4, 5]         # the script never turns the hand
    check.inspect(path)
    assert "must be mended" not in capsys.readouterr().out


@real
@pytest.mark.parametrize("name, shape, train, valid", [("mnist_t10k", (1, 32, 32), 9000, 1000),
                                                       ("cifar10_subset", (3, 32, 32), 2000, 500)])
def test_real_images(name, shape, train, valid):
    path = Path(os.environ["DEMO_DATA"]) / f"{name}.npz"
    parts = [open_samples(path, split=split) for split in ("train", "valid")]
    assert [len(p) for p in parts] == [train, valid] and parts[0].shape == shape and parts[0].n_classes == 10
    if name == "mnist_t10k":
        assert (parts[0].x[:, 0, :2] == 0).all()
