"""Points and images for the generative files."""
import numpy as np
import pytest
import torch
from helpers import save

from demos import check
from demos.images import GENERATED, open_samples
from robot.errors import UserError


@pytest.mark.parametrize("name, classes", [("moons", 2), ("checkerboard", 0), ("eight_gaussians", 8),
                                           ("spirals", 2)])
def test_points(name, classes):
    train, valid = (open_samples(name, n=5000, split=split) for split in ("train", "valid"))
    assert (len(train), len(valid), train.shape, train.n_classes) == (4500, 500, (2,), classes)
    x = torch.cat([train.x, valid.x])
    whole = GENERATED[name](5000, np.random.default_rng(0))[0]     # of which the last tenth is held out
    assert np.array_equal(x, whole.astype(np.float32))
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


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_image_files(tmp_path, suffix):
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    digits[:, 0, 0] = 7                                         # what the corner shows is the background
    path = save(tmp_path / f"digits.{suffix}", x=digits, y=np.arange(40) % 10)
    train, valid = open_samples(path), open_samples(path, split="valid")
    assert (len(train), len(valid), train.shape, train.n_classes) == (36, 4, (1, 32, 32), 10)
    where = {picture.tobytes(): i for i, picture in enumerate(digits)}
    at = [[where[x[0, 2:30, 2:30].numpy().tobytes()] for x in part.x] for part in (train, valid)]
    assert sorted(sum(at, [])) == [*range(40)] and all(numbers == sorted(numbers) for numbers in at)
    assert [part.label.tolist() for part in (train, valid)] == [[i % 10 for i in numbers] for numbers in at]
    assert (train.x[:, 0, :2] == 7).all()
    x = train.batch(torch.tensor([5]))["x"]
    assert torch.allclose(x[0, 0, 2:30, 2:30], torch.from_numpy(digits[at[0][5]]).float() / 127.5 - 1)

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
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.array([0, 1, 2, 10**6])}, "labels up to 1000000 for 4 im"),
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros((4, 2), int)}, r"'y' is int64 \(4, 2\)"),
    ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(4, int), "class_names": np.array(3)},
     r"'class_names' is int64 \(\), write one name for each class"),
    ({"x_train": np.zeros((2, 8, 8), np.uint8), "x_test": np.zeros((2, 16, 8), np.uint8)},
     r"test part are \(1, 16, 8\), those to train on \(1, 8, 8\)"),
    ({"x": np.zeros((4, 0, 8), np.uint8)}, r"'x' is uint8 \(4, 0, 8\)"),
    ({"x": np.array(3, np.uint8)}, r"'x' is uint8 \(\)"),
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


def pictures(label):
    """Images that show their label and their number."""
    x = np.zeros((len(label), 8, 8), np.uint8)
    x[:, 0], x[:, 1] = np.asarray(label)[:, None], np.arange(len(label))[:, None]
    return x


def test_a_file_sorted_by_class_has_every_class_on_both_sides(tmp_path, capsys):
    label = np.repeat(np.arange(10), 20)
    path = save(tmp_path / "sorted.npz", x=pictures(label), y=label)
    for seed in range(3):
        train, valid = (open_samples(path, seed=seed, split=split) for split in ("train", "valid"))
        assert torch.bincount(train.label).tolist() == [18] * 10
        assert torch.bincount(valid.label).tolist() == [2] * 10
        for part in (train, valid):
            assert torch.equal(part.x[:, 0, 0, 0].long(), part.label)       # pictures keep their labels
        numbers = torch.cat([train.x[:, 0, 1, 0], valid.x[:, 0, 1, 0]])
        assert sorted(numbers.tolist()) == [*range(200)]        # nothing is on both sides or on none
    assert not torch.equal(valid.x, open_samples(path, seed=0, split="valid").x)
    assert torch.equal(valid.x, open_samples(path, seed=2, split="valid").x)
    some = open_samples(path, n=60)                             # not the first three classes alone
    assert len(some) == 54 and len(some.label.unique()) == 10
    assert not capsys.readouterr().err


def test_few_images_and_missing_classes_are_said(tmp_path, capsys):
    few = save(tmp_path / "few.npz", x=pictures(range(8)), y=np.arange(8))
    assert [len(open_samples(few, split=split)) for split in ("train", "valid")] == [7, 1]
    assert "no image of class 0, 1, 2, 3, 5" in capsys.readouterr().err
    one = save(tmp_path / "one.npz", x=pictures([0]))
    assert [len(open_samples(one, split=split)) for split in ("train", "valid")] == [1, 0]
    from_one = save(tmp_path / "from_one.npz", x=pictures(np.arange(40) % 4 + 1), y=np.arange(40) % 4 + 1)
    train = open_samples(from_one)
    assert train.n_classes == 5 and "no image of class 0 is trained on" in capsys.readouterr().err
    column = save(tmp_path / "column.npz", x=pictures(np.arange(40) % 4), y=np.arange(40)[:, None] % 4)
    assert torch.equal(open_samples(column).label, open_samples(column).x[:, 0, 0, 0].long())


def test_unlabelled_images_are_held_out_by_the_seed(tmp_path):
    path = save(tmp_path / "a.npz", x=pictures([0] * 50))
    held = [open_samples(path, seed=seed, split="valid").x[:, 0, 1, 0].tolist() for seed in range(4)]
    assert len({tuple(h) for h in held}) == 4 and all(len(h) == 5 for h in held)


def test_the_doctor_lists_every_array_and_the_split(tmp_path, capsys):
    label = np.arange(40) % 4
    check.main([str(save(tmp_path / "a.npz", x=pictures(label), y=label, features=np.zeros((40, 3))))])
    report = capsys.readouterr().out
    assert "not used (its name says nothing to train.py)" in report and "4 images, 36 to train on" in report
    assert [line for line in report.splitlines() if line.startswith("  features ")]
