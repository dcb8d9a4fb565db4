"""ALOHA's layout."""
import json
import os

import h5py
import numpy as np
import pytest
import torch
from helpers import write_aloha

import data
from demos.dataset import open_demos
from robot.errors import UserError
from robot.jpeg import decode_jpeg


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
    blue = torch.from_numpy(open_demos(folder, "image", colour="rgb").images(1, 0, 4))  # as the file has it
    assert torch.equal(blue, image.flip(2))
    with pytest.raises(UserError, match="colour 'brg' is no order of colours, did you mean"):
        open_demos(folder, "image", colour="brg")
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


@pytest.mark.parametrize("missing, mends", [
    ("images/top", ["no 'top': leave this episode out", "shape_meta", "processing: cameras"]),
    ("qvel", ["no 'qvel': leave this episode out", "shape_meta"])])
def test_what_one_episode_lacks_can_be_left_out_as_the_message_says(tmp_path, missing, mends):
    def edit(file, n):
        file["observations/images/top"] = np.zeros((n, 4, 6, 3), np.uint8)
        file["observations/images/hand"] = np.full((n, 4, 6, 3), 7, np.uint8)
    folder = write_aloha(tmp_path / "set", [3, 4, 5], edit)
    with h5py.File(folder / "episode_1.hdf5", "a") as file:
        del file[f"observations/{missing}"]
    with pytest.raises(UserError, match="episode_1.hdf5 has observations") as error:
        open_demos(folder, "image")
    assert all(part in str(error.value) for part in mends)
    assert ("processing" in str(error.value)) == (missing == "images/top")      # a state cannot be hidden
    meta = {"obs": {"qpos": {"shape": [14]}, "hand": {"shape": [3, 4, 6], "type": "rgb"}}}
    assert open_demos(folder, shape_meta=meta, val_ratio=0).lengths.tolist() == [3, 4, 5]
    (folder / "episode_1.hdf5").rename(tmp_path / "left_out.hdf5")
    assert open_demos(folder, "image", val_ratio=0).lengths.tolist() == [3, 5]


def test_a_pipe_beside_the_episodes_is_refused_unread(tmp_path):
    os.mkfifo(write_aloha(tmp_path / "set", (3, 3)) / "expanded_instruction.json")
    with pytest.raises(UserError, match="a pipe or a device"):
        open_demos(tmp_path / "set")


def test_a_jpeg_of_a_thousand_million_pixels_is_not_decoded(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="pillow reads compressed frames")
    import io
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(buffer, "JPEG")
    head = bytearray(buffer.getvalue())
    at = head.index(b"\xff\xc0") + 5                       # height and width in the frame header
    for size in (12_000, 60_000):                           # Pillow warns of the first and refuses the second
        head[at:at + 4] = size.to_bytes(2, "big") * 2
        with pytest.raises(UserError, match="a JPEG frame cannot be decoded: .*decompression bomb") as error:
            decode_jpeg(np.frombuffer(bytes(head), np.uint8))
        assert "\n" not in str(error.value)
