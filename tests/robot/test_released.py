"""Released weights: what a folder says is done, and what the user says against it is refused."""
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import sample
import train
from robot.checkpoint import load_model
from robot.errors import UserError
from robot.policy import Policy
from robot.released import build_model, open_release
from robot.released_dp import picture_size
from robot.weight_files import read_safetensors
from helpers import refused, write_safetensors
from tools.runs import read_rows

LEGACY = Path(__file__).parents[1] / "golden/pipelines/lerobot_diffusion_legacy"
LOOK = {"observation.state": np.array([100.0, 200.0]), "observation.image": np.zeros((72, 72, 3), np.uint8)}
FAST = ["--episodes", "0", "--batch_size", "4", "--device", "cpu", "--eval_every", "0", "--ema_max", "0.5"]


def legacy_weights():
    return {key: x.clone() for key, x in read_safetensors(LEGACY / "model.safetensors").items()}


def legacy(folder, weights=None, **changes):
    """The folder of 2025, with other weights and with changes of its config.json; None takes a key out."""
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", weights or legacy_weights())
    config = json.loads((LEGACY / "config.json").read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def today(folder, modes=None, spoil=None, steps=(), **changes):
    """The same in today's layout: statistics in the files of two processors. spoil(stats) changes them."""
    weights = legacy_weights()
    stats = {"observation.image": {name: torch.full((3, 1, 1), x) for name, x in (
        ("mean", 0.4), ("std", 0.2), ("min", 0.1), ("max", 0.9))}}
    for name, key in (("observation.state", "normalize_inputs.buffer_observation_state"),
                      ("action", "normalize_targets.buffer_action")):
        low, high = weights[f"{key}.min"], weights[f"{key}.max"]
        stats[name] = {"min": low, "max": high, "mean": (low + high) / 3, "std": (high - low) / 5,
                       "q01": low + 1, "q99": high - 1, "count": torch.tensor([9.0])}
    legacy(folder, {key: x for key, x in weights.items() if "normalize" not in key}, **changes)
    if spoil:
        spoil(stats)
    modes = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"} | (modes or {})
    for way, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        file = f"policy_{way}processor_step_0_{step}.safetensors"
        write_safetensors(folder / file, {f"{name}.{s}": x for name, part in stats.items()
                                          for s, x in part.items()})
        first = {"registry_name": step, "config": {"norm_map": modes}, "state_file": file}
        content = {"steps": [first, *steps]}
        (folder / f"policy_{way}processor.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def demonstrations(path, cameras=("camera",), state=2, size=72):
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["fps"] = 10.0
        rng = np.random.default_rng(0)
        for i in range(3):
            group = file.create_group(f"data/demo_{i}")
            group["actions"] = rng.uniform(0, 500, (9, 2)).astype(np.float32)
            group["obs/agent_pos"] = rng.uniform(0, 500, (9, state)).astype(np.float32)
            for camera in cameras:
                group[f"obs/{camera}"] = rng.integers(0, 256, (9, size, size, 3), dtype=np.uint8)
    return path


def test_the_folder_says_which_model_it_is_and_how_it_was_made(tmp_path):
    release = open_release(today(tmp_path / "folder", {"STATE": "QUANTILES", "ACTION": "MEAN_STD"}))
    assert (release.model, release.config["down_dims"], release.config["sampler_steps"]) == (
        "dp_cnn", [16, 16, 24], 20)
    assert release.config["resnet_widths"] == [16, 16, 24, 32], "no config.json says them: the weights do"
    assert release.recipe == {"lr": 1e-4, "weight_decay": 1e-6, "warmup": 500, "betas": (0.95, 0.999)}
    assert torch.allclose(torch.tensor(release.config["image_mean"] + release.config["image_std"]),
                          torch.tensor([0.4] * 3 + [0.2] * 3))
    buffers = legacy_weights()
    low, high = (buffers[f"normalize_inputs.buffer_observation_state.{s}"] for s in ("min", "max"))
    state = torch.stack([low + 1, high - 1])
    assert torch.allclose(release.normalizer.normalize("state", state), torch.tensor([[-1.0, -1], [1, 1]]))
    low, high = (buffers[f"unnormalize_outputs.buffer_action.{s}"] for s in ("min", "max"))
    centre_and_one_deviation = torch.stack([(low + high) / 3, (low + high) / 3 + (high - low) / 5])
    assert torch.allclose(release.normalizer.unnormalize("actions", torch.tensor([[0.0, 0], [1, 1]])),
                          centre_and_one_deviation)


def test_modes_that_do_nothing_and_ranges_that_are_zero(tmp_path):
    def flat(stats):
        stats["action"]["max"][1] = stats["action"]["min"][1]
    release = open_release(today(tmp_path / "folder", {"STATE": "IDENTITY", "VISUAL": "IDENTITY"}, flat))
    x = torch.tensor([[3.0, -7.0]])
    assert torch.equal(release.normalizer.normalize("state", x), x)
    assert release.config["image_mean"] == [0.0] * 3 and release.config["image_std"] == [1.0] * 3
    low = legacy_weights()["unnormalize_outputs.buffer_action.min"]
    assert torch.allclose(release.normalizer.normalize("actions", low[None]), torch.tensor([[-1.0, -1.0]]))
    top = release.normalizer.unnormalize("actions", torch.ones(1, 2))[0]
    assert top[1] == low[1] and top[0] > low[0], "a range of zero is 1e-8"
    release = open_release(today(tmp_path / "pixels", {"VISUAL": "MIN_MAX"}))
    assert release.config["image_mean"] == pytest.approx([0.5] * 3)             # 0.1 .. 0.9 to -1 .. 1
    assert release.config["image_std"] == pytest.approx([0.4] * 3)


def test_pictures_have_one_size():
    assert picture_size([[3, 4, 6], [3, 4, 6]]) == [4, 6] and picture_size([]) is None
    for shapes in ([[3, 4, 6], [3, 4, 8]], [[4, 6, 3]], [[4, 6]]):
        with pytest.raises(UserError, match="all should be of one"):
            picture_size(shapes)


def test_a_robots_own_names_by_the_rename_map(tmp_path):
    step = {"registry_name": "rename_observations_processor",
            "config": {"rename_map": {"qpos": "observation.state"}}}
    release = open_release(today(tmp_path / "folder", steps=[step]))
    assert release.description["state_keys"] == {"qpos": 2}


@pytest.mark.parametrize("change, named", [
    ({"type": "act"}, "a policy of type 'act'"), ({"input_features": None}, "input_features"),
    ({"horizon": None}, "lacks horizon"), ({"down_dims": [16, 16]}, "fit the configuration"),
    ({"vision_backbone": "resnet50"}, "vision_backbone 'resnet50'"),
    ({"prediction_type": "v_prediction"}, "prediction_type"), ({"beta_schedule": "sigmoid"}, "beta_schedule"),
    ({"noise_scheduler_type": "PNDM"}, "noise_scheduler_type"), ({"horizon": "16"}, "horizon"),
    ({"normalization_mapping": {"ACTION": "MAGIC"}}, "MAGIC"),
    ({"num_inference_steps": 1000}, "sampler steps"), ({"resize_shape": 7}, "resize = 7"),
    ({"normalization_mapping": 3}, "not as its program writes them"), ({"crop_shape": "x"}, "crop_size"),
    ({"input_features": {"observation.state": {"type": "STATE", "shape": [3]}}}, "statistics of obs")])
def test_what_a_config_says_and_this_code_does_not_do_is_one_line(change, named, tmp_path):
    folder = legacy(tmp_path / "folder", **change)
    with pytest.raises(UserError, match=named) as error:
        build_model(open_release(folder))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("spoil, named", [
    (lambda s: s["action"].pop("max"), "lacks the statistics max of action"),
    (lambda s: s.pop("observation.image"), "lacks the statistics mean, std of observation.image"),
    (lambda s: s["action"].update(max=torch.ones(5)), "5 numbers of max, it has 2")])
def test_statistics_that_lack_a_key_or_have_another_length(spoil, named, tmp_path):
    with pytest.raises(UserError, match=named):
        open_release(today(tmp_path / "folder", spoil=spoil))


def test_a_step_of_a_processor_that_is_not_known(tmp_path):
    with pytest.raises(UserError, match="policy_preprocessor.json has a step .mirror., which is not done"):
        open_release(today(tmp_path / "folder", steps=[{"registry_name": "mirror"}]))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, capsys):
    weights = legacy_weights()
    weights["diffusion.unet.mid_modules.0.conv1.block.0.bias"][1] = float("nan")
    folder = legacy(tmp_path / "folder", weights)
    refused(capsys, lambda: train.main(["--init", str(folder), "--out", str(tmp_path / "out")]),
            "mid_modules.0.conv1.block.0.bias", "not finite")


def test_weights_in_whole_numbers_are_refused(tmp_path):
    weights = legacy_weights()
    name = "diffusion.unet.final_conv.1.bias"
    weights[name] = weights[name].to(torch.uint8)
    with pytest.raises(UserError, match="floating point") as error:
        build_model(open_release(legacy(tmp_path / "folder", weights)))
    assert len(str(error.value)) < 400


def test_another_models_weights_and_lists(tmp_path, capsys):
    torch.save({"paligemma_with_expert.x": torch.zeros(1)}, tmp_path / "pi.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name, said in (("pi.pt", "holds weights of pi0, not of dp_cnn"), ("list.pt", "holds a list")):
        refused(capsys, lambda: train.main(["--model", "dp_cnn", "--init", str(tmp_path / name), "--out",
                                            str(tmp_path / "out")]), said)


@pytest.mark.parametrize("argv, named", [
    (["--set", "horizon=8"], "--set: horizon = 8, the weights of --init were made with 16"),
    (["--model", "pi0"], "dp_cnn, not a pi0"), (["--preset", "image"], "--preset image: down_dims"),
    (["--set", "sampler_steps=200"], "sampler steps"), (["--set", "horison=16"], "did you mean 'horizon'")])
def test_what_contradicts_the_folder_is_refused_by_name(argv, named, tmp_path, capsys):
    data = demonstrations(tmp_path / "demos.hdf5")
    run = ["--init", str(LEGACY), "--data", str(data), "--out", str(tmp_path / "out"), *FAST]
    refused(capsys, lambda: train.main(run + argv), named)


@pytest.mark.parametrize("change, named", [
    (dict(state=3), "state_dim 2, the data 3"), (dict(cameras=("left", "right")), "n_cameras 1, the data 2")])
def test_data_that_the_weights_were_not_made_for(change, named, tmp_path, capsys):
    data = demonstrations(tmp_path / "demos.hdf5", **change)
    run = ["--init", str(LEGACY), "--data", str(data), "--out", str(tmp_path / "out"), *FAST]
    refused(capsys, lambda: train.main(run), named)


def test_training_goes_on_from_the_folder_alone_in_float32_whatever_it_holds(tmp_path, capsys):
    """Mixed types in the file; a killed run goes on without the folder; its checkpoint replays."""
    weights = {key: x.bfloat16() if "unet" in key and x.ndim > 1 else x
               for key, x in legacy_weights().items()}
    folder, data = legacy(tmp_path / "folder", weights), demonstrations(tmp_path / "demos.hdf5")
    argv = ["--init", str(folder), "--data", str(data), "--normalizer", "checkpoint", "--steps", "4",
            "--warmup", "0", "--lr_schedule", "constant", *FAST]
    train.main([*argv, "--out", str(tmp_path / "out")])
    model, checkpoint = load_model(tmp_path / "out")                            # replays
    start = build_model(open_release(folder))
    assert {p.dtype for p in start.parameters()} == {p.dtype for p in model.parameters()} == {torch.float32}
    assert checkpoint["model"] == "dp_cnn" and model.config.down_dims == (16, 16, 24)
    assert checkpoint["options"]["lr"] == 1e-4 and model.config.clip_x0 == 1.0
    moved = torch.cat([(checkpoint["weights"][key] != x).flatten() for key, x in start.named_parameters()])
    assert moved.float().mean() > 0.9, "in bfloat16 a step of 1e-4 is lost in most weights"
    release = open_release(folder)
    assert torch.equal(checkpoint["normalizer"]["scale"]["actions"], release.normalizer.scale["actions"])
    assert "normalizer checkpoint" not in capsys.readouterr().err

    train.main([*argv, "--steps", "2", "--out", str(tmp_path / "half")])
    shutil.rmtree(folder)
    train.main([*argv, "--resume", "--out", str(tmp_path / "half")])
    again = load_model(tmp_path / "half")[1]
    assert all(torch.equal(again["weights"][key], x) for key, x in checkpoint["weights"].items())


def test_statistics_that_are_not_used_are_said(tmp_path, capsys):
    data = demonstrations(tmp_path / "demos.hdf5")
    argv = ["--data", str(data), "--steps", "0", *FAST]
    train.main(["--init", str(LEGACY), *argv, "--out", str(tmp_path / "out")])
    assert "--normalizer checkpoint takes them" in capsys.readouterr().err
    checkpoint = load_model(tmp_path / "out")[1]
    scale = Policy.load(tmp_path / "out").normalizer.scale["actions"]
    assert not torch.equal(scale, open_release(LEGACY).normalizer.scale["actions"])
    # Without its config.json the file says nothing about itself.
    shutil.copy(LEGACY / "model.safetensors", tmp_path / "bare.safetensors")
    argv += [word for key, value in checkpoint["options"]["set"].items()
             for word in ("--set", f"{key}={json.dumps(value)}")]
    argv += ["--init", str(tmp_path / "bare.safetensors")]
    train.main([*argv, "--out", str(tmp_path / "bare")])
    said = capsys.readouterr().err
    assert "8 statistics among the weights" in said and "are not used" in said
    assert "8 statistics" in (tmp_path / "bare/init.log").read_text(encoding="utf-8")
    argv += ["--normalizer", "checkpoint", "--out", str(tmp_path / "none")]
    refused(capsys, lambda: train.main(argv), "no statistics came")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_in_the_type_that_is_asked_for(dtype):
    policy = Policy.from_release(open_release(LEGACY), dtype=dtype)
    assert {p.dtype for p in policy.model.parameters()} == {dtype}
    exact = Policy.from_release(open_release(LEGACY)).act(LOOK)
    assert np.abs(policy.act(LOOK) - exact).max() <= (0 if dtype == torch.float32 else 60)


def test_sample_acts_with_a_release(tmp_path, capsys, monkeypatch):
    """Without a run, a data set or training: the environment sees the policy of the folder."""
    seen = {}

    def episode(policy, environment, episodes, seed, instruction=None):
        seen.update(action=policy.act(LOOK), environment=environment, steps=policy.model.config.sampler_steps)
        return {"success": 0.5, "interval": [0.1, 0.9], "episodes": 2, "score": 0.0, "return": 0.0,
                "outcomes": {"success": 1, "failure": 1}, "rollouts": []}
    monkeypatch.setattr(sample, "closed_loop", episode)
    out = tmp_path / "out"
    sample.main(["--init", str(LEGACY), "--env", "Push-v0", "--set", "sampler_steps=5", "--out", str(out),
                 "--device", "cpu"])
    assert seen["action"].shape == (2,) and seen["environment"] == {"id": "Push-v0"} and seen["steps"] == 5
    assert (out / "evaluation.json").exists() and not (LEGACY / "evaluation.json").exists()
    for argv, named in ((["--init", str(LEGACY)], "add --env"), ([], "name the folder of a run"),
                        (["--init", str(LEGACY), "--env", "x", "--set", "horizon=8"], "only the sampler"),
                        (["--init", str(tmp_path)], "holds no weights")):
        refused(capsys, lambda: sample.main([*argv, "--device", "cpu", "--out", str(out)]), named)


def test_a_release_can_be_trained_further_on_real_demonstrations(tmp_path):
    """LeRobot's tiny Push-T policy on Push-T: the loss on its way down."""
    data = Path(os.environ.get("DEMO_DATA", "nowhere")) / "pusht_image.hdf5"
    if not data.exists():
        pytest.skip("no pusht_image.hdf5: set DEMO_DATA")
    image = "{shape: [3, 72, 72], type: rgb}"
    meta = f"shape_meta: {{obs: {{agent_pos: {{shape: [2]}}, image: {image}}}}}\n"
    (tmp_path / "meta.yaml").write_text(meta, encoding="utf-8")
    train.main(["--config", str(tmp_path / "meta.yaml"), "--init", str(LEGACY), "--data", str(data), "--lr",
                "1e-3", "--normalizer", "checkpoint", "--warmup", "0", "--max_train_episodes", "4", "--steps",
                "60", "--log_every", "20", *FAST, "--batch_size", "16", "--out", str(tmp_path / "out")])
    losses = [row["loss"] for row in read_rows(tmp_path / "out/metrics.jsonl") if "lr" in row]
    assert losses[-1] < 0.8 * losses[0], losses
