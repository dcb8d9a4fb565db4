"""Reading of RDT's folders."""
import json

import numpy as np
import pytest
import torch
from helpers import refused, write_rdt

import rdt
from robot.normalizer import Normalizer
from robot.policy import Policy
from robot.released import build_model, open_release
from robot.released_rdt import ALOHA, camera_places, interpolate

SIZES = {"unified_dim": 128, "horizon": 6, "n_action_steps": 6, "text_len": 9, "t5_width": 8, "vit_width": 12,
         "width": 24, "depth": 2, "n_heads": 2, "image_tokens": 4}


@pytest.fixture
def release(tmp_path):
    return write_rdt(tmp_path, **SIZES)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sizes_are_those_of_the_weights_and_of_config_json(release):
    found = open_release(release)
    config = rdt.Config(**found.config)
    for key, value in SIZES.items():
        assert getattr(config, key) == value, key
    assert (config.n_obs_steps, config.n_cameras, config.encoders) == (2, 3, "none")
    assert (config.n_diffusion_steps, config.sampler_steps) == (500, 4)
    assert found.model == "rdt" and found.recipe["normalizer"] == "none"
    assert set(found.recipe) >= set(rdt.RECIPES["tiny"])     # or that would be taken
    model = build_model(found)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_without_config_json_the_released_timeline_is_assumed(release):
    (release / "config.json").unlink()
    found = open_release(release)
    assert [found.config[k] for k in ("n_obs_steps", "n_diffusion_steps", "n_heads")] == [2, 1000, 2]
    assert any("no config.json" in note for note in found.notes)


def test_what_deepspeed_saves_is_read(release):
    weights = torch.load(release / "pytorch_model.bin", weights_only=True)
    torch.save({"module": {f"module.{k}": x.bfloat16() for k, x in weights.items()}, "epoch": 3},
               release / "mp_rank_00_model_states.pt")
    (release / "pytorch_model.bin").unlink()
    model = build_model(open_release(release))
    assert torch.equal(model.x_pos, weights["model.x_pos_embed"].bfloat16().float())


@pytest.mark.parametrize("spoil, words", [
    (lambda f: edit(f, rdt=None), ["another policy", "'rdt'"]),
    (lambda f: edit(f, noise_scheduler={"prediction_type": "epsilon"}), ["'epsilon' is not 'sample'"]),
    (lambda f: edit(f, img_adaptor="linear"), ["img_adaptor 'linear'"]),
    (lambda f: edit(f, img_pos_embed_config=[["image", ["2", 3]]]), ["are no counts"]),
    (lambda f: edit(f, img_pos_embed_config=[["image", [2, 5, -4]]]), ["24 image tokens, which 2 steps"]),
    (lambda f: (f / "siglip").mkdir(), ["siglip has no config.json"]),
])
def test_folders_that_do_not_fit_are_refused(release, capsys, spoil, words):
    spoil(release)
    refused(capsys, lambda: open_release(release), *words)


def test_weights_that_lack_a_part_are_refused(release, capsys):
    weights = torch.load(release / "pytorch_model.bin", weights_only=True)
    del weights["model.x_pos_embed"]
    torch.save(weights, release / "pytorch_model.bin")
    refused(capsys, lambda: open_release(release), "lacks weights of RDTRunner", "x_pos_embed")


def test_cameras_have_places_by_name(capsys):
    assert camera_places({"left_wrist": "l", "external": "e"}, rdt) == {
        "external": "e", "right_wrist": None, "left_wrist": "l"}
    assert list(camera_places({"left_wrist": "l", "external": "e"}, rdt)) == list(rdt.CAMERA_PLACES)
    refused(capsys, lambda: camera_places({"right_wirst": "r"}, rdt), "no place 'right_wirst'",
            "did you mean 'right_wrist'")


# -- acting


def eyes(**changes):
    """A policy that looks with SigLIP and is told in tokens."""
    torch.manual_seed(0)
    config = rdt.Config(**rdt.RELEASED | SIZES | {"encoders": "images", "vit_size": 28, "patch_size": 14,
                                                  "vit_depth": 1, "vit_heads": 2, "vit_mlp": 12} | changes)
    model = rdt.RDT(config).eval()
    torch.nn.init.normal_(model.decoder.fc2.weight)
    description = {"source": "here", "fps": 25.0, "state_keys": {"qpos": 14}, "image_size": [28, 28],
                   "camera_keys": ["cam_high", "cam_right_wrist", "cam_left_wrist"], "action_dim": 14,
                   "state_dim": 14, "action_names": [], "instructions": [],
                   "processing": ALOHA | {"images": ALOHA["images"] | {"jpeg": False}}}
    return Policy(model, Normalizer.of_units({"actions": 14, "state": 14}), description)


def seen(**changes):
    rng = np.random.default_rng(0)
    frames = {key: rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
              for key in ("cam_high", "cam_right_wrist", "cam_left_wrist")}
    return frames | {"qpos": np.arange(14.0), "lang_embeds": rng.normal(size=(4, 8))} | changes


def test_pictures_before_the_first_are_hidden():
    policy, batches = eyes(), []
    sample = policy.model.sample
    policy.model.sample = lambda batch, **more: batches.append(batch) or sample(batch, **more)
    for _ in range(2):
        policy.queue = []
        policy.act(seen())
    assert batches[0]["image_mask"].tolist() == [[[False] * 3, [True] * 3]]
    assert batches[1].get("image_mask", torch.ones(1)).all()
    assert batches[0]["lang_embeds"].shape == (1, 4, 8)
    grippers = batches[0]["state"][0, -1, [6, 13]]
    assert grippers.tolist() == pytest.approx([6 / 4.7908, 13 / 4.7888])


def test_the_instruction_as_tokens_matters_and_is_checked(capsys):
    policy = eyes()
    first = policy.act(seen())
    policy.reset()
    assert not np.allclose(policy.act(seen(lang_embeds=np.ones((2, 8)))), first)
    for tokens, words in ((None, "add 'lang_embeds' (L, D)"), (np.ones((4, 7)), "shape (1, 4, 7)"),
                          (np.ones(8), "shape (8,)"), (np.full((4, 8), np.nan), "finite"),
                          ("fold", "no array of numbers")):
        refused(capsys, lambda: policy.act(seen(lang_embeds=tokens)), words)
    without = {key: x for key, x in seen().items() if key != "lang_embeds"}
    refused(capsys, lambda: policy.act(without), "add 'lang_embeds'")


def test_a_policy_without_eyes_says_what_it_lacks(release, capsys):
    policy = Policy.from_release(open_release(release))
    refused(capsys, lambda: policy.act(seen()), "which its weights lack", "RDT,SIGLIP")


def test_commands_between_commands():
    got = interpolate(np.zeros(2), np.array([0.3, -1.0]), np.array([0.1, 0.25]))
    assert np.allclose(got, np.linspace([0, 0], [0.3, -1.0], 5)[1:])
    shorter = interpolate(np.zeros(2), np.array([0.25, 0.0]), 0.1)          # no step is longer than allowed
    assert np.allclose(shorter[:, 0], [0.25 / 3, 0.5 / 3, 0.25])
    two_arms = interpolate(np.zeros(4), np.array([0, 0, 0.2, 0.0]), [0.1, 1.0])
    assert np.allclose(two_arms, [[0, 0, 0.1, 0], [0, 0, 0.2, 0]])
    assert np.allclose(interpolate(np.zeros(2), np.array([0.05, 0.0]), 0.1), [[0.05, 0.0]])
    assert np.allclose(interpolate(np.ones(2), np.ones(2), 0.1), [[1.0, 1.0]])


@pytest.mark.parametrize("longest", [0.0, [0.1, 0.1, 0.1], [-0.1, 0.1]])
def test_steps_that_do_not_fit_are_refused(capsys, longest):
    refused(capsys, lambda: interpolate(np.zeros(2), np.ones(2), longest), "do not fit together")
