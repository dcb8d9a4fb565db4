"""robot/transforms.py: how pictures are resized, in the data and for a robot."""
import numpy as np
import pytest

from robot.transforms import ONCE, resize, same_shape


def test_a_picture_of_the_size_stays_as_it_is():
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    assert resize(frames, (5, 7)) is frames and resize(frames, [5, 7]) is frames


def test_shrinking_takes_means_so_that_nothing_thin_flickers():
    """One column of four shines: a quarter of it is seen everywhere. Without antialiasing, nothing of it."""
    stripes = np.zeros((2, 32, 32, 3), np.uint8)
    stripes[:, :, ::4] = 200
    small = resize(stripes, (8, 8))
    assert small.dtype == np.uint8 and small.shape == (2, 8, 8, 3)
    assert (small[:, :, 1:-1] == 50).all()
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (1, 64, 64, 3)).copy()
    halved = resize(ramp, (32, 32))[0, 0, 1:-1, 0]
    assert abs(halved.astype(int) - (np.arange(1, 31) * 8 + 2)).max() <= 1      # the mean of two


def test_height_width_and_colours_keep_their_places():
    picture = np.zeros((1, 40, 80, 3), np.uint8)
    picture[0, :20, :40, 0], picture[0, 20:, 40:, 2] = 200, 100         # red above left, blue below right
    small = resize(picture, (10, 30))[0]
    assert small.shape == (10, 30, 3)
    assert small[1, 2].tolist() == [200, 0, 0] and small[-2, -3].tolist() == [0, 0, 100]
    assert small[1, -3].tolist() == small[-2, 2].tolist() == [0, 0, 0]
    assert (resize(np.full((1, 3, 3, 3), 77, np.uint8), (9, 5)) == 77).all()


def test_many_frames_are_resized_one_by_one_alike(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (7, 30, 20, 3), np.uint8)
    whole = resize(frames, (12, 9))
    monkeypatch.setattr("robot.transforms.ONCE", 4 * 30 * 20 * 3 * 2)               # two at a time
    assert ONCE > 4 * 30 * 20 * 3 * 7 and np.array_equal(resize(frames, (12, 9)), whole)
    assert np.array_equal(np.concatenate([resize(frames[i:i + 1], (12, 9)) for i in range(7)]), whole)


@pytest.mark.parametrize("a, b, same", [((480, 640), (72, 96), True), ((480, 640), (96, 72), False),
                                        ((84, 84), (96, 96), True), ((480, 640), (479, 640), True),
                                        ((480, 640), (360, 640), False), ((240, 320), (64, 64), False)])
def test_same_shape_is_the_ratio_of_height_to_width(a, b, same):
    assert same_shape(a, b) == same_shape(b, a) == same
