"""What the data say about a Config: a file in a known form needs no flag."""
import importlib

import numpy as np
import pytest
import torch
from helpers import write

import data
from robot.errors import UserError
from tools import options

POLICIES = ("dp_cnn", "dp_transformer", "dit_policy", "rdt", "pi0")


def opened(model, path, *flags, normalizer=None):
    """(Config, training items, normaliser) as train.py makes them of these flags."""
    module = importlib.import_module(model)
    chosen, explicit = options.parse_options(["--model", model, "--data", str(path), *flags])
    chosen = options.with_recipe(chosen, explicit, module)
    facts, make_items, _, normalizer = data.open_data(chosen, module, normalizer=normalizer)
    config = options.make_config(module, chosen, facts)
    return config, make_items(config, torch.device("cpu"))[0], normalizer


def learns(model, path, *flags):
    config, items, _ = opened(model, path, *flags)
    loss = importlib.import_module(model).Model(config).loss(items.batch(torch.arange(4)))["loss"]
    assert loss.isfinite()
    return config


def seven(file):
    """Seven actions, nine states, no camera, and a long instruction."""
    for e, demo in enumerate(file["data"].values()):
        n = len(demo["actions"])
        del demo["actions"]
        demo["actions"] = 100 * e + np.arange(7.0 * n).reshape(n, 7)
        demo["obs/arm"] = np.arange(9.0 * n).reshape(n, 9)
        del demo["obs/pos"], demo["obs/angle"]
        demo.attrs["language_instruction"] = "ü" * 20 * e


@pytest.mark.parametrize("model", POLICIES)
def test_a_file_without_cameras_needs_no_flag_or_says_that_it_needs_one(tmp_path, capsys, model):
    path = write(tmp_path / "a.hdf5", [6, 6, 6], seven, images=False)
    if model == "pi0":
        with pytest.raises(UserError, match="a.hdf5:demo_0 has no camera.*which the policy needs"):
            opened(model, path)
        return
    config = learns(model, path)
    assert (config.action_dim, config.state_dim, config.n_cameras, config.obs) == (7, 9, 0, "lowdim")
    said = capsys.readouterr().err
    if model == "dit_policy":
        assert config.text_len == 0 and "no instruction is read" in said
    if model in ("dit_policy", "rdt"):          # who asks for pictures does not silently get none
        with pytest.raises(UserError, match="has no camera"):
            opened(model, path, "--set", "obs=image")


@pytest.mark.parametrize("model", ["dit_policy", "rdt", "pi0"])
def test_text_len_grows_with_the_longest_instruction(tmp_path, capsys, model):
    def long(file):
        file["data/demo_1"].attrs["language_instruction"] = "é" * 30                # 60 bytes
    path = write(tmp_path / "a.hdf5", [6, 6, 6], long)
    config, items, _ = opened(model, path)
    usual = importlib.import_module(model).Config.text_len
    assert config.text_len == 60 and items.text.shape[1] == 60
    assert f"text_len is 60 instead of {usual}" in capsys.readouterr().err
    assert opened(model, write(tmp_path / "b.hdf5"))[0].text_len == usual           # it does not shrink
    assert opened(model, write(tmp_path / "b.hdf5"), "--set", "text_len=99")[0].text_len == 99
    if model == "rdt":                          # whoever gives a length keeps it
        assert opened(model, path, "--set", "text_len=8")[0].text_len == 8
    else:
        with pytest.raises(UserError, match="more than text_len 8"):
            opened(model, path, "--set", "text_len=8")


def test_an_endless_instruction_does_not_make_an_endless_network(tmp_path):
    def endless(file):
        file["data/demo_1"].attrs["language_instruction"] = "x" * 5000
    with pytest.raises(UserError, match="more than text_len") as error:
        opened("pi0", write(tmp_path / "a.hdf5", edit=endless))
    assert "text_len" in str(error.value)


def test_rdt_takes_places_in_the_order_of_the_file_and_shows_how_to_name_them(tmp_path, capsys):
    import rdt
    path = write(tmp_path / "a.hdf5", [6, 6, 6], seven, images=False)
    config, _, _ = opened("rdt", path)
    assert rdt.slots(config.action_names) == [*range(7)] and rdt.slots(config.state_names) == [*range(9)]
    said = capsys.readouterr().err
    assert "does not name its 7 action dimensions" in said and '--set "action_names=[right_arm_joint' in said
    names = [f"left_arm_joint_{i}_pos" for i in range(7)]
    config, _, _ = opened("rdt", path, "--set", f"action_names=[{', '.join(names)}]")
    assert list(config.action_names) == names and "7 action" not in capsys.readouterr().err

    def named(file):
        seven(file)
        file["data"].attrs["action_names"] = names
    config, _, _ = opened("rdt", write(tmp_path / "b.hdf5", [6, 6, 6], named, images=False))
    assert list(config.action_names) == names and "7 action" not in capsys.readouterr().err

    def twice(file):
        seven(file)
        file["data"].attrs["action_names"] = names[:6] + names[:1]
    config, _, _ = opened("rdt", write(tmp_path / "c.hdf5", [6, 6, 6], twice, images=False))
    assert rdt.slots(config.action_names) == [*range(7)] and "7 action" in capsys.readouterr().err


def test_more_than_the_first_arms_places_go_to_the_second(tmp_path):
    import rdt

    def wide(file):
        for demo in file["data"].values():
            n = len(demo["actions"])
            del demo["actions"]
            demo["actions"] = np.zeros((n, 48))
    config, _, _ = opened("rdt", write(tmp_path / "a.hdf5", [6, 6, 6], wide))
    assert rdt.slots(config.action_names) == [*range(45), 50, 51, 52]


def test_the_built_in_task_keeps_the_names_of_rdts_config(capsys, tmp_path):
    import rdt
    config, _, _ = opened("rdt", "tabletop", "--demos", "4")
    assert config.action_names == rdt.Config.action_names and config.obs == "image" and config.n_cameras == 2
    assert "does not name" not in capsys.readouterr().err


# ---- clip_x0


def grip(file):
    """The second action is 1 in the last step of an episode and 0 before, as a gripper that closes late."""
    for demo in file["data"].values():
        demo["actions"][:, 1] = np.arange(len(demo["actions"])) == len(demo["actions"]) - 1


@pytest.mark.parametrize("model", ["dp_cnn", "dp_transformer", "dit_policy"])
def test_x0_is_clipped_to_what_the_actions_reach(tmp_path, model):
    path = write(tmp_path / "a.hdf5", [20, 20, 20], grip)
    for mode, reach in (("minmax", 1), ("maxabs", 1), ("meanstd", 19 / 20**0.5), ("quantile", 1)):
        config, items, normalizer = opened(model, path, "--normalizer", mode)
        assert abs(config.clip_x0 - items.actions.abs().max()) < 1e-4
        assert config.clip_x0 == 1.0 if reach == 1 and mode != "quantile" else config.clip_x0 >= 1
        if mode == "meanstd":                   # one of 40 steps: (1 - 0.05) / deviation
            assert config.clip_x0 > 4
    assert opened(model, path, "--set", "clip_x0=0.5")[0].clip_x0 == 0.5
    assert opened(model, path, "--set", "clip_x0=0")[0].clip_x0 == 0


def test_the_reach_is_that_of_the_actions_that_are_trained_on(tmp_path):
    def edit(file):
        grip(file)
        file["data/demo_1/actions"][0, 1] = -900
        file["mask/train"], file["mask/valid"] = [b"demo_0", b"demo_2"], [b"demo_1"]
    path = write(tmp_path / "a.hdf5", [20, 20, 20], edit)
    config, items, normalizer = opened("dp_cnn", path, "--normalizer", "meanstd")
    assert config.clip_x0 == items.actions.abs().max()
    # With the units of an earlier run, other data may reach further than 1.
    path = write(tmp_path / "b.hdf5", [20, 20, 20], lambda file: file["data/demo_0/actions"].write_direct(
        np.full((20, 2), 50.0)))
    config, items, _ = opened("dp_cnn", path, normalizer=normalizer)
    assert config.clip_x0 == items.actions.abs().max() > 1


def test_a_normaliser_to_one_means_exactly_one(tmp_path):
    """Rounding may leave 1.0000001, which would be another Config for every seed."""
    def uneven(seed):
        def edit(file):
            rng = np.random.default_rng(seed)
            for demo in file["data"].values():
                demo["actions"][:] = rng.uniform(-3, 7, demo["actions"].shape) / 3 + 1000 * seed
        return edit
    configs = [opened("dp_cnn", write(tmp_path / f"{seed}.hdf5", [20, 20, 20], uneven(seed), images=False))
               for seed in range(12)]
    assert {config.clip_x0 for config, _, _ in configs} == {1.0}
    assert any(items.actions.abs().max() != 1 for _, items, _ in configs)


# ---- flags arrive


def test_image_size_and_colour_arrive(tmp_path):
    path = write(tmp_path / "a.hdf5", [6, 6, 6])
    config, items, _ = opened("pi0", path, "--image_size", "2", "3")
    assert config.image_size == (2, 3) and items.images.shape[-2:] == (2, 3)
    (tmp_path / "a.yaml").write_text("image_size: [3, 2]\n")
    assert opened("pi0", path, "--config", str(tmp_path / "a.yaml"))[0].image_size == (3, 2)
    for size in (("0", "3"), ("3", "0"), ("-1", "-1")):
        with pytest.raises(UserError, match="image_size .* must be height and width, both at least 1"):
            opened("pi0", path, "--image_size", *size)
    with pytest.raises(UserError, match="colour 'brg' is no order of colours"):
        opened("pi0", path, "--colour", "brg")


# ---- batch size


def test_a_batch_larger_than_the_set_is_lowered_and_said(capsys):
    chosen, _ = options.parse_options(["--model", "dp_cnn", "--batch_size", "99"])
    assert data.fitting_batch(chosen, 99) is chosen and data.fitting_batch(chosen, 198, world=2) is chosen
    assert not capsys.readouterr().err
    assert data.fitting_batch(chosen, 98).batch_size == 98
    assert data.fitting_batch(chosen, 75, world=2).batch_size == 37
    assert data.fitting_batch(chosen, 120, world=2).batch_size == 60
    assert data.fitting_batch(chosen, 1, world=2) is chosen     # too few for that: data.batches refuses
    said = capsys.readouterr().err
    assert "batch_size 99 is more than the 98 items" in said and "37 from here on" in said


def test_pictures_of_one_batch_that_no_memory_holds_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdf5")           # 4 x 6 pixels, 2 cameras
    monkeypatch.setattr("demos.limits.memory", lambda: 5000)
    with pytest.raises(UserError, match=r"a batch of 16 pictures of \(4, 6\).*lower --batch_size, or resize"):
        opened("pi0", path, "--batch_size", "8")
    opened("pi0", path, "--batch_size", "4")
