"""Releases of pi0 and pi0.5: layouts of the same weights, what is refused, and training from them."""
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from golden_cases import GOLDEN_DIR
from helpers import read_rows, refused, write_safetensors
from test_pipeline_openpi import SMALL, official_names

import data
import pi0
import train
from robot.checkpoint import load_model
from robot.errors import UserError
from robot.openpi_robots import ROBOTS
from robot.policy import Policy
from robot.processing import Processing
from robot.released import build_model, open_release
from robot.weight_files import read_safetensors

NUMBERS = {name: [0.1 * i + k for i in range(32)] for k, name in enumerate(("mean", "std", "q01", "q99"))}
STATS = {"state": NUMBERS, "actions": NUMBERS}
CAMERAS = {"observation.images.top": 1, "observation.images.wrist": 2}


def weights_of(model="pi0", **changes):
    module = {"pi0": pi0}[model]
    torch.manual_seed(0)
    return official_names(module.Model(module.Config(**SMALL | {"vit_size": 112, "vocab_size": 300} | changes)
                                       ).state_dict())


def openpi(folder, stats=STATS, assets=("trossen",), weights=None):
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", weights or weights_of())
    for name in assets:
        (folder / "assets" / name).mkdir(parents=True)
        (folder / "assets" / name / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return folder


def lerobot(folder, config=(), stats=None, steps=(), weights=None, mode="MEAN_STD"):
    """A folder of LeRobot's pi0 with two cameras, a state of three numbers and commands of two."""
    folder.mkdir()
    shape = lambda kind, *dims: {"type": kind, "shape": list(dims)}
    inputs = {name: shape("VISUAL", 3, 48, 64) for name in CAMERAS} | {"observation.state": shape("STATE", 3)}
    content = {"type": "pi0", "input_features": inputs, "output_features": {"action": shape("ACTION", 2)},
               "chunk_size": 6, "n_action_steps": 4, "tokenizer_max_length": 20, "num_inference_steps": 2}
    (folder / "config.json").write_text(json.dumps(content | dict(config)))
    (folder / "sizes.json").write_text(json.dumps({"vlm": [8, 1, 8, 8], "vit": [16, 1, 8, 16]}))
    weights = weights or {f"model.{key}": x for key, x in weights_of().items()}
    write_safetensors(folder / "model.safetensors", weights)
    dims, names = {"observation.state": 3, "action": 2}, ("min", "q01", "mean", "std", "q99", "max")
    found = {f"{key}.{s}": torch.linspace(1, 2, dim) + k for key, dim in dims.items()
             for k, s in enumerate(names)}
    write_safetensors(folder / "stats.safetensors", found | (stats or {}))
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    for part, name in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        step = {"registry_name": name, "config": {"norm_map": modes}, "state_file": "stats.safetensors"}
        (folder / f"policy_{part}processor.json").write_text(json.dumps({"steps": [step, *steps]}))
    return folder


# -- layouts


def test_openpis_weights_are_read_whatever_they_are_called(tmp_path):
    """The embedding under its other name, a stale text head, no prefix: the same network."""
    ours = weights_of()
    want = build_model(open_release(openpi(tmp_path / "a"))).state_dict()
    embed = next(key for key in ours if "embed_tokens" in key)
    head = "paligemma_with_expert.paligemma.lm_head.weight"
    spare = {"paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(300, 8)}
    for i, changed in enumerate((
            {head if key == embed else key: x for key, x in ours.items()} | spare,
            ours | {head: ours[embed] + 1},
            {f"module.{key}": x for key, x in ours.items()})):
        got = build_model(open_release(openpi(tmp_path / f"b{i}", weights=changed))).state_dict()
        assert all(torch.equal(got[key], x) for key, x in want.items())


def test_the_only_robot_with_statistics_is_taken_and_else_one_is_asked_for(tmp_path):
    release = open_release(openpi(tmp_path / "one", assets=["droid"]))
    assert release.config["horizon"] == 10 and list(release.description["state_keys"].values()) == [7, 1]
    several = open_release(openpi(tmp_path / "two", assets=["droid", "trossen"]))
    assert several.normalizer is None and any("--robot" in note for note in several.notes)
    with pytest.raises(UserError, match="train.py --init"):
        Policy.from_release(several)
    named = open_release(tmp_path / "two", robot="pi0_aloha_towel")
    assert named.description["default_instruction"] == "fold the towel"
    # Statistics of 32 numbers are cut to the robot's 14; pi0 takes mean and deviation, with openpi's 1e-6.
    state = torch.linspace(-1, 1, 14)
    mean, std = (torch.tensor(STATS["state"][name][:14]) for name in ("mean", "std"))
    torch.testing.assert_close(named.normalizer.normalize("state", state), (state - mean) / (std + 1e-6))


def test_a_robot_without_instruction_and_wrists_has_its_default_and_hidden_places(tmp_path):
    folder = openpi(tmp_path / "folder", weights=weights_of(vocab_size=257))
    policy = Policy.from_release(open_release(folder, robot="pi0_aloha_towel"))
    look = {"qpos": np.full(14, 0.5), "cam_high": np.full((48, 64, 3), 9, np.uint8)}
    step, _ = policy.prepare(look)
    assert policy.model.config.decode_text(step["text"][0]) == "fold the towel"
    assert step["image_mask"].tolist() == [[True, False, False]] and not step["images"][:, 1:].any()
    told, _ = policy.prepare(look | {"instruction": "wave"})
    assert policy.model.config.decode_text(told["text"][0]) == "wave"


def test_every_robots_description_is_sound_and_exact_there_and_back():
    """What a command becomes on its way to the network is undone, also where it is relative."""
    generator = torch.Generator().manual_seed(0)
    for name, robot in ROBOTS.items():
        cameras = [key for key in robot.cameras.values() if key]
        work = Processing(robot.processing(), robot.state_keys, cameras)
        values = {key: 0.1 + 0.5 * torch.rand(dim, generator=generator)
                  for key, dim in robot.state_keys.items()}
        if "robot0_eef_quat" in values:
            values["robot0_eef_quat"] /= values["robot0_eef_quat"].norm()
        state, actions = work.state(values), torch.rand(9, robot.action_dim, generator=generator)
        back = work.undo_actions(work.actions(actions, state), state)
        torch.testing.assert_close(back, actions, rtol=0, atol=1e-6, msg=name)
        assert [place for place, _ in work.places] == ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]


def test_the_yaml_of_aloha_is_what_the_flag_takes():
    path = Path(train.__file__).parent / "configs/openpi_aloha.yaml"
    spec, robot = yaml.safe_load(path.read_text())["processing"], ROBOTS["pi0_aloha"]
    state, command = {"qpos": torch.rand(14)}, torch.rand(3, 14)
    a, b = (Processing(one, robot.state_keys, list(robot.cameras.values()))
            for one in (spec, robot.processing()))
    assert a.places == b.places and a.rule == b.rule
    torch.testing.assert_close(a.state(state), b.state(state))
    torch.testing.assert_close(a.actions(command, a.state(state)), b.actions(command, b.state(state)))


def test_robosuites_angle_goes_up_to_a_full_turn():
    """w below 0 is the long way round; no turn has no axis; there and back it is the same quaternion."""
    spec = {"obs": {"quat": [{"robosuite_axis_angle": {"at": 0}}]}}
    work = Processing(spec, {"quat": 4})
    turn = lambda *xyzw: work.state({"quat": torch.tensor(xyzw)})
    half = 0.5 ** 0.5
    torch.testing.assert_close(turn(half, 0.0, 0.0, half), torch.tensor([torch.pi / 2, 0, 0]))
    torch.testing.assert_close(turn(-half, 0.0, 0.0, -half), torch.tensor([-1.5 * torch.pi, 0, 0]))
    assert turn(0.0, 0.0, 0.0, 1.0).tolist() == [0, 0, 0] == turn(0.0, 0.0, 0.0, -1.0).tolist()
    for quat in (torch.tensor([0.1, -0.7, 0.5, -0.5]), torch.tensor([0.5, 0.5, 0.5, 0.5])):
        quat = quat / quat.norm()
        torch.testing.assert_close(work.undo_state(work.state({"quat": quat}))["quat"], quat)


def test_paligemma_alone_is_a_start_and_its_expert_is_fresh(tmp_path):
    """Names of today and of 2024; the table's spare rows are cut; nothing of a robot is known."""
    whole = weights_of(vocab_size=257200)
    seeing = {key.removeprefix("paligemma_with_expert.paligemma."): x for key, x in whole.items()
              if "paligemma.model" in key}
    old = {key.removeprefix("model.").replace("language_model.", "language_model.model."): x
           for key, x in seeing.items()}
    for name, weights in (("today", seeing), ("2024", old)):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", weights)
        release = open_release(tmp_path / name)
        assert release.model == "pi0" and release.normalizer is None and not release.description
        assert release.config["vocab_size"] == 257152 and "action_dim" not in release.config
        model = build_model(release, pi0.Config(**release.config | {
            "action_dim": 2, "state_dim": 3, "expert_width": 8, "expert_mlp": 8}))
        table = seeing["model.language_model.embed_tokens.weight"]
        assert torch.equal(model.embed.weight, table[:257152])
        assert any("expert starts fresh" in note for note in release.notes)


def test_early_folders_bring_their_statistics_among_the_weights(tmp_path):
    """LeRobot before September 2025: no processors, buffers normalize_*. They used to be dropped."""
    folder = lerobot(tmp_path / "new")
    stats = read_safetensors(folder / "stats.safetensors")
    for part in ("pre", "post"):
        (folder / f"policy_{part}processor.json").unlink()
    weights = dict(read_safetensors(folder / "model.safetensors"))
    weights |= {f"normalize_inputs.buffer_observation_state.{s}": stats[f"observation.state.{s}"] for s in (
        "mean", "std")}
    weights |= {f"{name}.buffer_action.{s}": stats[f"action.{s}"] for s in ("mean", "std") for name in (
        "normalize_targets", "unnormalize_outputs")}
    config = json.loads((folder / "config.json").read_text()) | {"normalization_mapping": {
        "VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}
    early = lerobot(tmp_path / "early", config, weights={key: x.clone() for key, x in weights.items()})
    for part in ("pre", "post"):
        (early / f"policy_{part}processor.json").unlink()
    release = open_release(early)
    x = torch.tensor([0.5, 1.5])
    want = x * stats["action.std"] + stats["action.mean"]
    torch.testing.assert_close(release.normalizer.unnormalize("actions", x), want)
    assert not any(key.startswith("normalize") for key in release.weights)
    assert any("right and lower edge" in note for note in release.notes)


def test_a_renamed_observation_has_the_robots_name(tmp_path):
    step = {"registry_name": "rename_observations_processor",
            "config": {"rename_map": {"cam": "observation.images.wrist", "joints": "observation.state"}}}
    release = open_release(lerobot(tmp_path / "a", steps=[step]))
    assert release.description["camera_keys"] == ["observation.images.top", "cam"]
    assert release.description["state_keys"] == {"joints": 3}


# -- refused, in one line


@pytest.mark.parametrize("change, named", [
    ({"config": {"type": "pi05"}}, ["config.json says pi05", "weights of pi0"]),
    ({"config": {"chunk_size": None}}, ["chunk_size None", "no whole number"]),
    ({"config": {"time_sampling_scale": 0.5}}, ["time_sampling_scale 0.5", "0.999"]),
    ({"config": {"adapt_to_pi_aloha": True}}, ["adapt_to_pi_aloha True"]),
    ({"config": {"input_features": {"observation.state": {"type": "STATE", "shape": [3]}}}}, ["no camera"]),
    ({"config": {"input_features": {"a": 3}}}, ["input_features"]),
    ({"config": {"image_resolution": [112, 224]}}, ["image_resolution [112, 224]", "[112, 112]"]),
    ({"steps": [{"registry_name": "rename_observations_processor", "config": {"rename_map": ["a"]}}]},
     ["rename_map", "no names"]),
    ({"steps": [{"registry_name": "to_polar_processor"}]}, ["to_polar_processor", "not done here"]),
    ({"stats": {"action.mean": torch.zeros(7)}}, ["action", "7", "2"]),
    ({"mode": "WHITENING"}, ["WHITENING"]),
    ({"weights": {"model.paligemma_with_expert.gemma_expert.model.norm.weight": torch.zeros(8)}}, ["lacks"]),
])
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, capsys, change, named):
    folder = lerobot(tmp_path / "folder", **change)
    refused(capsys, lambda: train.main(["--init", str(folder)]), "--init", *named)


def test_statistics_that_lack_a_key_are_refused(tmp_path, capsys):
    folder = lerobot(tmp_path / "folder")
    stats = {key: x.clone() for key, x in read_safetensors(folder / "stats.safetensors").items()
             if key != "action.std"}
    write_safetensors(folder / "stats.safetensors", stats)
    refused(capsys, lambda: train.main(["--init", str(folder)]), "std", "action")


@pytest.mark.parametrize("stats, named", [
    ({"state": STATS["state"]}, ["no mean of actions"]),
    (STATS | {"actions": {"mean": [0.0] * 13, "std": [1.0] * 13}}, ["mean of actions", "14", "13"]),
    (STATS | {"state": {"mean": [0.0] * 14, "std": [float("nan")] * 14}}, ["std of state", "finite"]),
    ([1, 2], ["no mean of state"]),
])
def test_openpis_statistics_are_checked(tmp_path, capsys, stats, named):
    folder = openpi(tmp_path / "folder", stats=stats)
    refused(capsys, lambda: train.main(["--init", str(folder)]), "norm_stats", *named)


@pytest.mark.parametrize("robot, named", [
    ("pi0_alohe", ["pi0_aloha"]), ("pi05_droid", ["holds pi0"]),
    ("pi0_libero", ["physical-intelligence/libero"])])
def test_another_robot_is_refused(tmp_path, capsys, robot, named):
    folder = openpi(tmp_path / "folder")
    refused(capsys, lambda: train.main(["--init", str(folder), "--robot", robot]), *named)


def test_a_missing_tokenizer_or_one_of_another_size_is_refused_before_training(tmp_path, capsys):
    """A released vocabulary is no alphabet of bytes (it used to be read as one)."""
    folder = lerobot(tmp_path / "folder")
    run = ["--init", str(folder), "--data", str(demos(tmp_path / "a.hdf5")), "--out", str(tmp_path / "out"),
           "--episodes", "0", "--device", "cpu"]
    refused(capsys, lambda: train.main(run), "tokenizer_path")
    path = GOLDEN_DIR / "pipelines/lerobot_pi0_relative/tokenizer.model"
    if not path.exists():
        pytest.skip(f"no {path}")
    pytest.importorskip("sentencepiece")
    refused(capsys, lambda: train.main([*run, "--set", f"tokenizer_path={path}"]), "512 pieces", "300")


def test_cameras_without_a_place_are_refused(tmp_path, capsys):
    folder = lerobot(tmp_path / "folder")
    path = demos(tmp_path / "a.hdf5", names=("left", "right"))
    run = ["--init", str(folder), "--data", str(path), "--out", str(tmp_path / "out")]
    refused(capsys, lambda: train.main(run), "camera", "left")


# -- training


def demos(path, names=tuple(CAMERAS), lacking=(), episodes=4):
    """Demonstrations of a robot with two cameras of one size, three joints and commands for two of them."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["fps"] = 10.0
        for i in range(episodes):
            demo = file.create_group(f"data/demo_{i}")
            demo.attrs["language_instruction"] = "pick up the cube"
            joints = rng.normal(size=(9, 3)).cumsum(0).astype(np.float32)
            demo["actions"], demo["obs/observation.state"] = joints[:, :2] + 0.1, joints
            for name in names:
                if (i, name) not in lacking:
                    demo[f"obs/{name}"] = np.full((9, 48, 64, 3), 60 * i + len(name), np.uint8)
    return path


def small_vocabulary(folder):
    """As bytes, so that no tokenizer is needed."""
    return lerobot(folder, weights={f"model.{key}": x for key, x in weights_of(vocab_size=257).items()})


def test_a_lerobot_folder_is_trained_further_with_its_own_statistics(tmp_path):
    folder = small_vocabulary(tmp_path / "folder")
    path, out = demos(tmp_path / "a.hdf5"), tmp_path / "out"
    train.main(["--init", str(folder), "--data", str(path), "--normalizer", "checkpoint", "--out", str(out),
                "--steps", "30", "--batch_size", "8", "--lr", "1e-2", "--warmup", "1", "--episodes", "0",
                "--device", "cpu", "--log_every", "1", "--set", "augment=true"])
    model, checkpoint = load_model(out)
    assert checkpoint["model"] == "pi0" and model.config.text_as_is
    assert checkpoint["data"]["image_size"] == [48, 64]     # as they are: the network fits them
    assert model.config.wrist_cameras == (1,) and model.config.augment and not model.config.antialias
    losses = [row["loss"] for row in read_rows(out) if "lr" in row]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    release, policy = open_release(folder), Policy.load(out)
    x = torch.tensor([[0.3, -0.2]])
    torch.testing.assert_close(policy.normalizer.unnormalize("actions", x),
                               release.normalizer.unnormalize("actions", x))
    look = {name: np.zeros((48, 64, 3), np.uint8) for name in CAMERAS}
    look |= {"observation.state": np.zeros(3), "instruction": "pick up the cube"}
    assert policy.act(look).shape == (2,)


def test_episodes_that_lack_a_camera_are_trained_on_with_its_place_hidden(tmp_path, capsys):
    """Where places are named; it used to be an error. What is hidden cannot change the loss."""
    lacking = {(1, "observation.images.wrist"), (3, "observation.images.top")}
    path = demos(tmp_path / "a.hdf5", lacking=lacking)
    options, explicit, release = train.with_release(*train.parse_options(
        ["--init", str(small_vocabulary(tmp_path / "folder")), "--data", str(path), "--model", "pi0",
         "--val_ratio", "0.3"]))
    options = train.with_recipe(options, explicit, pi0)
    facts, windows, _, _ = data.open_data(options, pi0)
    assert "demo_1: no camera 'observation.images.wrist'" in capsys.readouterr().err
    config = train.make_config(pi0, options, facts)
    for items in windows(config, "cpu"):
        names = items.episode(torch.arange(len(items)))
        batch = items.batch(torch.arange(len(items)))
        for name, images, mask in zip(names, batch["images"], batch["image_mask"]):
            want = [not name.endswith("demo_3"), not name.endswith("demo_1")]
            assert mask[0].tolist() == want
            assert [bool(view.any()) for view in images[0]] == want  # black where it is hidden
    model = build_model(release, config).eval()
    noise, t = torch.randn(len(batch["actions"]), 6, 32), torch.rand(len(batch["actions"]))
    loss = model.loss(batch, noise=noise, t=t)["loss"]
    painted = torch.where(batch["image_mask"][..., None, None, None], batch["images"], 200)
    assert torch.equal(model.loss(batch | {"images": painted}, noise=noise, t=t)["loss"], loss)


def test_a_model_without_a_mask_refuses_such_episodes(tmp_path, capsys):
    path = demos(tmp_path / "a.hdf5", lacking={(1, "observation.images.wrist")})
    config = tmp_path / "c.yaml"
    config.write_text("processing: {cameras: {a: observation.images.top, b: observation.images.wrist}}\n")
    run = ["--model", "dit_policy", "--data", str(path), "--config", str(config), "--out", str(tmp_path)]
    refused(capsys, lambda: train.main(run), "dit_policy has no image_mask")
