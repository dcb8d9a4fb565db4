"""RDT from raw frames and joint angles to raw commands, and from its files to training samples, beside what the
official programs computed (GOLDEN_DIR/pipelines)."""
import importlib.util
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
import rdt
from robot.policy import Policy
from robot.released import open_release
from robot.released_rdt import ALOHA, interpolate
from tools import options

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent.parent / "golden") / "pipelines"


def cases(prefix, file):
    """Parametrise a test over all folders of this kind: `case` is (folder, inputs, outputs, meta)."""
    found = sorted(path for path in GOLDEN_DIR.glob(f"{prefix}*") if (path / file).is_file())
    reason = pytest.mark.skip(reason=f"no {prefix} in {GOLDEN_DIR}")
    found = [pytest.param(path / file, id=path.name) for path in found]
    return pytest.mark.parametrize("path", found or [pytest.param(None, marks=reason)])


def load(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    part = lambda name: {key[len(name):]: x for key, x in arrays.items() if key.startswith(name)}
    return part("in/"), part("out/"), meta


def close(got, want, relative):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    rms = np.sqrt((want**2).mean())
    assert np.abs(got - want).max() <= relative * rms, f"{np.abs(got - want).max() / rms:.2e} of the rms"


def opened(path, inputs, meta, jpeg):
    """The policy of a case's folder, with the names that its robot has for cameras."""
    cameras = {"external": "front", "right_wrist": "right", "left_wrist": "left"}
    cameras = {place: key if key in inputs else None for place, key in cameras.items()}
    release = open_release(path.parent, cameras=cameras)
    release.description["fps"] = float(meta["config"]["control_frequency"])
    release.description["processing"]["images"] = ALOHA["images"] | {"jpeg": jpeg}
    return Policy.from_release(release)


def observation(inputs, shown, t):
    return {key: x[t] for key, x in shown.items()} | {"qpos": inputs["qpos"][t],
                                                      "lang_embeds": inputs["lang_embeds"][0]}


@cases("rdt_agilex", "episode.npz")
@pytest.mark.parametrize("jpeg", [False, True])
def test_pipeline_from_raw_frames_to_raw_commands(path, jpeg):
    """Every call asks for a new chunk. jpeg False: from the frames that had been through OpenCV's codec."""
    inputs, out, meta = load(path)
    if jpeg and not importlib.util.find_spec("cv2"):
        pytest.skip("OpenCV is an extra")
    shown = {key: inputs[key] if jpeg else out[f"jpeg/{key}"] for key in ("front", "left", "right") if key in inputs}
    policy, seen = opened(path, inputs, meta, jpeg), []
    model = policy.model
    model.vision.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    unified = []
    sample = model.sample

    def given(batch, **more):
        unified.append((model.unify("state", batch["state"][:, -1:]), model.valid("state", batch), batch,
                        model.encode_images(batch)))
        return sample(batch, **more, noise=torch.from_numpy(inputs["noise"][len(unified) - 1]))

    model.sample = given
    for t in range(len(inputs["qpos"])):
        policy.queue = []
        policy.act(observation(inputs, shown, t))
        close(policy.chunk[0], out["actions"][t], 2e-4)
        state, valid, batch, tokens = unified[-1]
        close(state[0], out["state"][t], 1e-5)
        assert (valid.numpy() == out["state_mask"][t]).all()
        assert batch["control_hz"].item() == out["ctrl_freq"][t]
        close(tokens[0], out["image_tokens"][t].reshape(-1, tokens.shape[-1]), 2e-4)
        mask = batch.get("image_mask", torch.ones(1, 2, 3)).flatten().bool()
        pixels = rdt.fit_square(batch["images"].flatten(0, 2).float(), model.config.vit_size)
        close(pixels[mask], out["pixel_values"][t][mask], 1e-6)
        assert (abs(out["pixel_values"][t][~mask] - (127 / 127.5 - 1)) < 1e-6).all()


@cases("rdt_agilex", "episode.npz")
def test_pipeline_trajectory_of_all_128_places(path):
    inputs, out, meta = load(path)
    policy = opened(path, inputs, meta, False)
    shown = {key: out[f"jpeg/{key}"] for key in ("front", "left", "right") if key in inputs}
    states, model = [], policy.model
    step = rdt.dpm_solver

    def solver(*args):
        for x in step(*args):
            states.append(x)
            yield x

    sample = model.sample
    try:
        rdt.dpm_solver = solver
        for t in range(len(inputs["qpos"])):
            model.sample = lambda batch, **more: sample(batch, **more, noise=torch.from_numpy(inputs["noise"][t]))
            policy.queue = []
            policy.act(observation(inputs, shown, t))
            mask = np.concatenate([out["state_mask"][t]] * 64)
            close(states[-1][0].numpy() * mask, out["trajectory"][t], 2e-4)
    finally:
        rdt.dpm_solver = step


@cases("rdt_agilex", "episode.npz")
def test_pipeline_pictures_of_the_released_size(path):
    """384 pixels, every fifth row and column; the first picture is missing."""
    inputs, out, _ = load(path)
    size = 384
    pictures = [ALOHA_picture(inputs[f"full_size/{i}"], size) for i in range(len(out["full_size_5"]) - 1)]
    got = torch.stack([torch.full((3, size, size), 127 / 127.5 - 1), *pictures])[:, :, ::5, ::5]
    close(got, out["full_size_5"], 1e-6)


def ALOHA_picture(frame, size):
    from robot.processing import Processing
    image = Processing({"images": ALOHA["images"]}).image(frame[None], (size, size))
    return rdt.fit_square(torch.from_numpy(image).permute(0, 3, 1, 2).float(), size)[0]


@cases("rdt_agilex", "episode.npz")
def test_pipeline_commands_between_two_commands(path):
    inputs, out, _ = load(path)
    got = interpolate(inputs["interpolate/previous"], inputs["interpolate/current"],
                      inputs["interpolate/arm_steps_length"])
    close(got, out["interpolate"], 1e-5)


# -- training samples

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


def write_episode(path, inputs, meta):
    """The case as RDT's recorders write it. Pictures that the case does not hold are black."""
    with h5py.File(path / "episode_0.hdf5", "w") as file:
        file.attrs["fps"] = 25.0
        file["action"], file["observations/qpos"] = inputs["action"], inputs["qpos"]
        for camera in CAMERAS:
            known = {int(key.split("/")[2]): x for key, x in inputs.items() if key.startswith(f"jpeg/{camera}/")}
            longest, any_one = max(map(len, known.values())), next(iter(known.values()))
            rows = [known.get(t, any_one) for t in range(len(inputs["qpos"]))]
            file[f"observations/images/{camera}"] = np.stack([np.pad(x, (0, longest - len(x))) for x in rows])
    (path / "expanded_instruction.json").write_text(json.dumps(meta["config"]["instructions"]))
    return path


def training_items(path, meta, **changes):
    """data.py's items of an episode for a model with the released timeline."""
    options_ = options.Options(model="rdt", data=str(path), normalizer="none", still=0.01, shortest=128,
                               image_size=(meta["config"]["siglip_size"],) * 2, processing=ALOHA, **changes)
    small = {"width": 32, "depth": 1, "n_heads": 2, "vit_width": 16, "vit_depth": 1, "vit_heads": 2, "t5_depth": 1}
    preset = rdt.RELEASED | small | {"encoders": "train", "vocab_size": 257, "text_len": 40, "patch_size": 14,
                                     "vit_size": meta["config"]["siglip_size"]}
    rdt.PRESETS["pipeline"] = preset
    try:
        options_.preset = "pipeline"
        facts, windows, description, _ = data.open_data(options_, rdt)
        config = options.make_config(rdt, options_, facts)
    finally:
        del rdt.PRESETS["pipeline"]
    return windows(config, "cpu")[0], config, description


@cases("rdt_hdf5", "case.npz")
def test_pipeline_training_samples(path, tmp_path):
    pytest.importorskip("PIL", reason="Pillow is an extra, for JPEG frames")
    inputs, out, meta = load(path)
    items, config, _ = training_items(write_episode(tmp_path, inputs, meta), meta)
    model = rdt.RDT(config)
    first = out["first_step"].item()
    assert len(items) == len(inputs["qpos"]) - first
    for t in inputs["steps"].tolist():
        want = {key[len(f"{t}/"):]: x for key, x in out.items() if key.startswith(f"{t}/")}
        batch = items.batch(torch.tensor([t - first]))
        close(model.unify("state", batch["state"])[0, -1:], want["state"], 1e-5)
        close(model.unify("action", batch["actions"])[0], want["actions"], 1e-5)
        assert (model.valid("action", batch)[0].numpy() == out["state_indicator"]).all()
        assert batch["control_hz"].item() == want["ctrl_freq"]
        assert batch["images"].shape[1:3] == (2, 3)
        for v, camera in enumerate(("cam_high", "cam_right_wrist", "cam_left_wrist")):
            assert batch["image_mask"][0, :, v].tolist() == want[f"{camera}_mask"].tolist()
        grey = torch.full_like(batch["images"], 127)
        shown = torch.where(batch["image_mask"][..., None, None, None], batch["images"], grey)
        close(rdt.fit_square(shown[0].flatten(0, 1).float(), config.vit_size), want["pixel_values"], 1e-6)
    assert decoded(inputs, first, meta)


def decoded(inputs, first, meta):
    from demos.jpeg import decode_jpeg
    return all(decode_jpeg(x).dtype == np.uint8 for key, x in inputs.items() if key.startswith("jpeg/"))
