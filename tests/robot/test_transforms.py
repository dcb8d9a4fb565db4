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


def pillow(frame, size, filter):
    from PIL import Image
    return np.asarray(Image.fromarray(frame).resize(size[::-1], getattr(Image, filter.upper())))


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("old, new", [((480, 640), (168, 224)), ((48, 64), (84, 112)), ((7, 5), (224, 3)),
                                      ((300, 200), (300, 77)), ((3, 3), (2, 2)), ((90, 120), (13, 60))])
def test_every_pixel_is_that_of_pillow(old, new, filter):
    """Half of the picture is noise, half of it black and white, where bicubic overshoots."""
    Image = pytest.importorskip("PIL", reason="needs the package pillow")
    frame = np.random.default_rng(0).integers(0, 256, (*old, 3), np.uint8)
    frame[:old[0] // 2] = np.where(frame[:old[0] // 2] > 127, 255, 0)
    if int(Image.__version__.split(".")[0]) >= 13 and new == (13, 60):
        pytest.skip("Pillow 13 begins with the height where that shrinks more than the width")
    assert np.array_equal(resize(frame[None], new, filter=filter)[0], pillow(frame, new, filter))


def test_weights_by_hand():
    """Four pixels to two, bilinear: centres at 1 and 3, weights 1 - |x - centre| / 2 of the pixels at 0.5,
    1.5 and 2.5: 0.75, 0.75, 0.25, together 1.75."""
    row = np.array([10, 20, 60, 200], np.uint8)
    small = resize(np.broadcast_to(row[None, None, :, None], (1, 2, 4, 3)).copy(), (2, 2))[0, 0, :, 0]
    want = [(0.75 * 10 + 0.75 * 20 + 0.25 * 60) / 1.75, (0.25 * 20 + 0.75 * 60 + 0.75 * 200) / 1.75]
    assert small.tolist() == [round(x) for x in want]


def test_pad_keeps_proportions_and_square_pads_first():
    """Pad: 48 x 64 in 21 x 21 becomes 15 x 21 (int of 15.75), 3 rows above and below. Square: the padding is
    resized with the picture, so that its edge is a mean."""
    frame = np.full((1, 48, 64, 3), 200, np.uint8)
    padded = resize(frame, (21, 21), fit="pad", fill=7)[0]
    assert (padded[3:18] == 200).all() and (padded[:3] == 7).all() and (padded[18:] == 7).all()
    tall = resize(frame.transpose(0, 2, 1, 3), (20, 30), fit="pad")[0]  # 64 x 48 -> 20 x 15: 7 left, 8 right
    assert (tall[:, 7:22] == 200).all() and (tall[:, :7] == 0).all() and (tall[:, 22:] == 0).all()
    square = resize(frame[:, :47], (32, 32), fit="square", fill=127)[0]     # 8 rows above, 9 below, then half
    assert (square[:3] == 127).all() and (square[6:26] == 200).all() and (square[29:] == 127).all()
    assert 127 < square[27, 0, 0] < 200                                      # 55 = 27.5 * 2: on the edge
    assert resize(frame, (48, 64), fit="square") is frame                    # of the size already
