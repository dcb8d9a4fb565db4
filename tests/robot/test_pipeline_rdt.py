"""RDT from raw frames and joint angles to raw commands, and from its files to training samples, as its own
programs do it."""
import importlib.util
import json

import h5py
import numpy as np
import pytest
import torch

import data
import rdt
from demos.dataset import open_demos
from demos.statistics import state_spread
from pipeline_cases import Pipeline, pipelines, replayed
from robot.jpeg import decode_jpeg
from robot.normalizer import Normalizer
from robot.policy import Policy
from robot.processing import Processing
from robot.released import open_release
from robot.released_rdt import ALOHA, interpolate
from robot.transforms import through_jpeg
from tools import options

PLACES = {"external": "front", "right_wrist": "right", "left_wrist": "left"}
CODEC = pytest.mark.skipif(not importlib.util.find_spec("cv2"), reason="OpenCV is an extra")


def opened(case, jpeg):
    """The policy of a case's folder, for the cameras that the case's robot has."""
    cameras = {place: key if key in case.inp else None for place, key in PLACES.items()}
    release = open_release(case.folder, cameras=cameras)
    release.description["fps"] = float(case.config["control_frequency"])
    release.description["processing"]["images"] = ALOHA["images"] | {"jpeg": jpeg}
    return Policy.from_release(release)


def act(case, policy, frames):
    """A new chunk at every step. -> [(batch, chunk)] that the model got and gave, commands (T, Tp, A)"""
    calls, chunks = replayed(policy.model, torch.from_numpy(case.inp["noise"])), []
    for t, qpos in enumerate(case.inp["qpos"]):
        policy.queue = []
        policy.act({key: x[t] for key, x in frames.items()} | {
            "qpos": qpos, "lang_embeds": case.inp["lang_embeds"][0]})
        chunks.append(policy.chunk[0])
    return calls, np.stack(chunks)


def pixels(batch, size):
    """What SigLIP is given: (B To V, 3, size, size); the background where the mask hides a picture."""
    x = rdt.fit_square(batch["images"].flatten(0, 2).float(), size)
    shown = batch.get("image_mask", torch.ones(batch["images"].shape[:3])).flatten() > 0
    return torch.where(shown[:, None, None, None], x, torch.tensor(127 / 127.5 - 1))


@pipelines("rdt_agilex")
@pytest.mark.parametrize("jpeg", [False, pytest.param(True, marks=CODEC)], ids=["decoded", "raw"])
def test_pipeline_from_raw_frames_to_raw_commands(folder, jpeg, monkeypatch):
    """decoded: from the frames as OpenCV's codec had left them, where the official program ran."""
    case, states = Pipeline(folder), []
    frames = {key: case.inp[key] if jpeg else case.out[f"jpeg/{key}"] for key in PLACES.values()
              if key in case.inp}
    if jpeg:
        for key, x in frames.items():
            case.check(f"jpeg/{key}", through_jpeg(x))
    solver = rdt.dpm_solver
    monkeypatch.setattr(rdt, "dpm_solver", lambda *args: (states.append(x) or x for x in solver(*args)))
    policy = opened(case, jpeg)
    model, c = policy.model, policy.model.config
    calls, chunks = act(case, policy, frames)
    batches = [batch for batch, _ in calls]
    case.check("actions", chunks, 2e-4)
    masks = torch.stack([model.valid("state", batch) for batch in batches])
    ends = torch.stack(states[c.sampler_steps - 1::c.sampler_steps])[:, 0]
    case.check("trajectory", ends * masks, 2e-4)
    case.check("state", torch.stack([model.unify("state", b["state"][0, -1:]) for b in batches]), 1e-5)
    case.check("state_mask", masks, 1e-5)
    case.check("ctrl_freq", np.array([batch["control_hz"].item() for batch in batches]))
    case.check("pixel_values", torch.stack([pixels(batch, c.vit_size) for batch in batches]), 1e-5)
    tokens = torch.stack([model.encode_images(batch)[0] for batch in batches])
    case.check("image_tokens", tokens.unflatten(1, (6, -1)), 2e-4)
    commands = [case.inp[f"interpolate/{key}"] for key in ("previous", "current", "arm_steps_length")]
    case.check("interpolate", interpolate(*commands), 1e-5)
    big = [case.inp[f"full_size/{i}"] for i in range(len(case.out["full_size_5"]) - 1)]
    big = [Processing({"images": ALOHA["images"]}).image(x[None], (384, 384)) for x in big]
    batch = {"images": torch.from_numpy(np.stack([0 * big[0], *big], 1)).permute(0, 1, 4, 2, 3)[None],
             "image_mask": torch.tensor([[[0, *[1] * len(big)]]])}              # the first picture is missing
    case.check("full_size_5", pixels(batch, 384)[:, :, ::5, ::5], 1e-5)
    left = {key for key in case.unchecked if not key.startswith("jpeg/")}
    assert left == {"actions_bfloat16"}         # for information: those of the robot


@pipelines("rdt_agilex")
@pytest.mark.parametrize("wrong", ["gripper", "repeated", "order"])
def test_pipeline_with_one_step_done_wrongly_is_another(folder, wrong, monkeypatch):
    """So that the bounds above can fail: factors of the state for the actions, the first picture repeated
    before the start, the wrists exchanged."""
    case = Pipeline(folder)
    frames = {key: case.out[f"jpeg/{key}"] for key in PLACES.values() if key in case.inp}
    if wrong == "order" and len(frames) < 3:
        pytest.skip("a wrist is missing")
    policy = opened(case, False)
    if wrong == "gripper":
        spec = policy.description["processing"] | {"actions": ALOHA["obs"]["qpos"]}
        policy.processing = Processing(spec, {"qpos": 14}, list(frames))
    if wrong == "repeated":
        policy.model.config.hide_before_start = False
    if wrong == "order":
        frames = frames | {"left": frames["right"], "right": frames["left"]}
    _, chunks = act(case, policy, frames)
    want = case.out["actions"]
    assert np.abs(chunks - want).max() > 0.01 * np.sqrt((want**2).mean())


# -- training samples


def write_episode(case, path):
    """The case as RDT's recorders write it. Pictures that the case does not hold are any others."""
    with h5py.File(path / "episode_0.hdf5", "w") as file:
        file.attrs["fps"] = 25.0
        file["action"], file["observations/qpos"] = case.inp["action"], case.inp["qpos"]
        for camera in case.config["camera_hw"]:
            known = {int(key.split("/")[2]): x for key, x in case.inp.items()
                     if key.startswith(f"jpeg/{camera}/")}
            longest, other = max(map(len, known.values())), next(iter(known.values()))
            rows = [known.get(t, other) for t in range(len(case.inp["qpos"]))]
            rows = np.stack([np.pad(x, (0, longest - len(x))) for x in rows])
            file[f"observations/images/{camera}"] = rows
    (path / "expanded_instruction.json").write_text(json.dumps(case.config["instructions"]))
    return path


def training_items(case, path, monkeypatch):
    """data.py's items of the episode, for a small model with the released timeline."""
    size = case.config["siglip_size"]
    monkeypatch.setitem(rdt.PRESETS, "small", rdt.RELEASED | {
        "width": 32, "depth": 1, "n_heads": 2, "vit_width": 16, "vit_depth": 1, "vit_heads": 2, "t5_depth": 1,
        "t5_width": 16, "t5_mlp": 16, "encoders": "train", "vocab_size": 257, "text_len": 40,
        "patch_size": 14, "vit_size": size})
    chosen = options.Options(model="rdt", preset="small", data=str(path), normalizer="none", still=0.01,
                             shortest=128, image_size=(size, size), processing=ALOHA)
    facts, windows, _, _ = data.open_data(chosen, rdt)
    config = options.make_config(rdt, chosen, facts)
    return windows(config, "cpu")[0], config


@pipelines("rdt_hdf5")
def test_pipeline_training_samples(folder, tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="Pillow is an extra, for JPEG frames")
    case = Pipeline(folder)
    items, config = training_items(case, write_episode(case, tmp_path), monkeypatch)
    model, qpos = rdt.RDT(config), case.inp["qpos"]
    first = len(qpos) - len(items)
    case.check("first_step", first)
    for t in case.inp["steps"].tolist():
        batch = items.batch(torch.tensor([t - first]))
        case.check(f"{t}/state", model.unify("state", batch["state"])[0, -1:], 1e-5)
        case.check(f"{t}/actions", model.unify("action", batch["actions"])[0], 1e-5)
        case.check(f"{t}/ctrl_freq", int(batch["control_hz"].item()))
        case.check(f"{t}/pixel_values", pixels(batch, config.vit_size), 1e-5)
        for v, place in enumerate(("cam_high", "cam_right_wrist", "cam_left_wrist")):
            case.check(f"{t}/{place}_mask", batch["image_mask"][0, :, v])
            seen = [decode_jpeg(case.inp[f"jpeg/{place}/{max(s, 0)}"]) for s in (t - 1, t)]
            case.check(f"{t}/{place}", np.stack(seen))
        case.check("state_indicator", model.valid("action", batch)[0], 1e-5)
    # What RDT's statistics are made of: all steps from `first` on.
    rows = torch.arange(len(case.out["state_only/state"]))
    batch = items.batch(rows)
    case.check("state_only/state", model.unify("state", batch["state"])[:, -1], 1e-5)
    case.check("state_only/action", model.unify("action", batch["actions"])[:, 0], 1e-5)
    case.check("state_only/length", len(items))
    # Mean and deviation of the whole episode, the first steps included.
    whole = open_demos(str(tmp_path), obs="lowdim", processing={"obs": ALOHA["obs"]})
    spread = state_spread(whole, Normalizer.of_units({"actions": 14, "state": 14}))
    for name in ("mean", "std"):
        case.check(f"state_{name}", model.unify("state", torch.tensor(spread[f"state_{name}"])), 1e-5)
    norm = np.sqrt(np.square(whole.state).mean(0))
    case.check("state_norm", model.unify("state", torch.from_numpy(norm)), 1e-5)
    assert not case.unchecked
