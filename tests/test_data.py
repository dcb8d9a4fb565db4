"""data.py: what a batch means."""
import functools
import gc
import itertools
import pickle

import h5py
import numpy as np
import pytest
import torch
from helpers import set_value, two_robots, write, write_aloha

import data
import dp_cnn
from demos.dataset import open_demos
from demos.images import open_samples
from demos.mixed import MixedDemos
from robot.errors import UserError
from robot.normalizer import Normalizer
from robot.text import decode_text, prompts
from tools.options import parse_options


def test_normalizer_is_fitted_on_training_episodes_only(tmp_path):
    def masks(file):
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_2"]), np.array([b"demo_1"])
    demos = open_demos(write(tmp_path / "a.hdf5", edit=masks))
    normalizer = data.fit_normalizer(demos)
    assert normalizer.stats["actions"]["max"].tolist() == [202, 0]                 # demo_1 reaches 107
    assert normalizer.stats["state"]["min"].tolist() == [0, 0, 0.25, 0.5]          # angle, then pos
    extreme = open_demos(write(tmp_path / "b.hdf5", edit=lambda file: [masks(file), set_value(
        "data/demo_1/actions", slice(None), [[9e4, -9e4]])(file)]))
    kept = np.concatenate([np.arange(5.0), 200 + np.arange(3.0)])
    for mode in Normalizer.MODES:                       # the held-out one is far outside
        n = data.fit_normalizer(extreme, mode)
        want = Normalizer.fit({"actions": np.stack([kept, -kept], 1)}, mode)
        assert torch.equal(n.scale["actions"], want.scale["actions"])
        assert torch.equal(n.centre["actions"], want.centre["actions"])
        for name, x in want.stats["actions"].items():
            assert torch.equal(n.stats["actions"][name], x), name
    with pytest.raises(UserError, match="did you mean 'minmax'"):
        data.fit_normalizer(demos, "min_max")


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
        del error
        gc.collect()                                    # a worker lives as long as what holds its loader


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
        assert n.centre["actions"][place] == want.centre["x"][0]
        assert n.stats["actions"]["max"][place] == values.max()
    assert n.scale["actions"][[2, 3, 9]].tolist() == [1, 1, 1] and n.centre["actions"][2] == 0
    assert n.near_constant["actions"] == [] and "WARNING" not in n.summary()
    windows = data.Windows(demos, n, 4, 1, 0)
    batch = windows.batch(torch.arange(len(windows)))
    assert (batch["actions"] * ~batch["action_valid"][:, None] == 0).all()
    assert (batch["state"] * ~batch["state_valid"][:, None] == 0).all()
    for kind, normalised in (("actions", n.normalize("actions", torch.zeros(10))),
                             ("state", n.normalize("state", torch.zeros(10)))):
        assert (normalised != 0).any(), f"{kind}: zeros must not be what the normaliser makes of them"
    raw = n.unnormalize("actions", batch["actions"])
    plain = data.Windows(demos, None, 4, 1, 0).batch(torch.arange(len(windows)))["actions"]
    assert torch.allclose(raw * batch["action_valid"][:, None], plain, atol=1e-3)


def test_a_model_file_may_make_its_own_codes(tmp_path):
    demos = open_demos(write(tmp_path / "a.hdf5"), text=True)
    encode = lambda texts, states: torch.tensor([[7, 8, int(text[-1])] for text in texts])
    windows = data.Windows(demos, None, 4, 1, 0, text_len=3, encode=encode)
    codes = windows.batch(torch.arange(len(windows)))["text"].tolist()
    assert all(code[:2] == [7, 8] and code[2] in range(3) for code in codes)

    class Refuses:
        def encode_text(text):
            raise ValueError("too long, shorten it")
    with pytest.raises(UserError, match="too long, shorten it"):
        data.Windows(demos, None, 4, 1, 0, text_len=3, encode=functools.partial(prompts, Refuses))


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
