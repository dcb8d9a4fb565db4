"""tools/options.py: flags, YAML and recipes, and what can be wrong with them."""
import re

import pytest
import yaml
from helpers import ROOT, command, refused, resolved

import dp_cnn
import train
from robot.errors import UserError
from robot.models import load_module
from tools import options


def test_flags_win_over_yaml_and_yaml_over_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(dp_cnn.RECIPES, "tiny", {"lr": 0.5, "steps": 7, "batch_size": 3})
    (tmp_path / "c.yaml").write_text("lr: 25e-2\nsteps: 5\nbetas: [0.5, 0.75]\n"
                                     "set: {horizon: 8, down_dims: [16]}\n")
    assert resolved().lr == 0.5 and resolved().seed == options.Options().seed
    chosen = resolved("--config", str(tmp_path / "c.yaml"), "--steps", "4", "--set", "horizon=12")
    assert (chosen.lr, chosen.steps, chosen.batch_size, chosen.betas) == (0.25, 4, 3, (0.5, 0.75))
    assert chosen.set == {"horizon": 12, "down_dims": [16]}
    # A flag that happens to equal the default still wins over the recipe.
    assert resolved("--steps", str(options.Options().steps)).steps == options.Options().steps


def test_set_wins_over_the_preset_but_not_over_the_data():
    facts = {"action_dim": 5, "state_dim": 9, "not_a_field": 1, "image_size": (8, 6)}
    chosen = resolved("--set", "n_groups=4", "--set", "down_dims=[32, 64]", "--set", "image_size=[8, 6]")
    config = options.make_config(dp_cnn, chosen, facts)
    assert (config.action_dim, config.state_dim, config.n_groups, config.down_dims) == (5, 9, 4, (32, 64))
    preset = dp_cnn.Config(**dp_cnn.PRESETS["tiny"])
    assert config.prediction_type == preset.prediction_type
    with pytest.raises(UserError, match="--set state_dim=7: the data decide this, it is 9"):
        options.make_config(dp_cnn, resolved("--set", "state_dim=7"), facts)


@pytest.mark.parametrize("text, value", [
    ("horizon=32", 32), ("film_scale=false", False), ("sampler=ddpm", "ddpm"),
    ("crop_size=[48, 48]", (48, 48))])
def test_set_reads_values_as_the_fields_type(text, value):
    config = options.make_config(dp_cnn, resolved("--set", text), {})
    assert getattr(config, text.partition("=")[0]) == value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_of_the_project_is_read(path):
    content = yaml.safe_load(path.read_text())
    chosen, explicit = options.parse_options(["--config", str(path)])
    module = load_module(chosen.model)
    assert explicit >= set(content) - {"set"}
    facts, meta = {}, content.get("shape_meta")
    if meta:                                                        # what the data would say
        cameras = [m["shape"] for m in meta["obs"].values() if m.get("type") == "rgb"]
        facts = {"action_dim": meta["action"]["shape"][0], "n_cameras": len(cameras)}
        facts |= {"image_size": tuple(cameras[0][1:])} if cameras else {}
    for kind in ("action", "state"):                                    # rdt.py: a name for each dimension
        if f"{kind}_names" in content.get("set", {}):
            facts[f"{kind}_dim"] = len(content["set"][f"{kind}_names"])
    config = options.make_config(module, options.with_recipe(chosen, explicit, module), facts)
    assert all(getattr(config, field) == (tuple(v) if isinstance(v, list) else v)
               for field, v in content.get("set", {}).items())


@pytest.mark.parametrize("argv, named", [
    (["--model", "dp_cn"], ["dp_cn", "did you mean 'dp_cnn'"]),
    (["--model", ""], ["--model is needed", "dp_cnn"]),
    (["--preset", "tinny"], ["tinny", "did you mean 'tiny'"]),
    (["--batchsize", "8"], ["--batchsize", "did you mean 'batch_size'"]),
    (["--steps", "many"], ["steps", "'many'"]),
    (["--steps", "-1"], ["--steps -1"]),
    (["--batch_size", "0"], ["--batch_size 0"]),
    (["--batch_size", "99999"], ["batch_size 99999", "lower it"]),
    (["--lr", "nan"], ["lr = nan", "not finite"]),
    (["--betas", "0.9"], ["betas"]),
    (["--betas", "2", "3"], ["betas"]),
    (["--lr_schedule", "cosin"], ["did you mean 'cosine'"]),
    (["--normalizer", "minmx"], ["did you mean 'minmax'"]),
    (["--dtype", "float16"], ["float16"]),
    (["--device", "tpu"], ["tpu"]),
    (["--val_ratio", "2"], ["val_ratio"]),
    (["--set", "n_obs_step=2"], ["n_obs_step", "did you mean 'n_obs_steps'"]),
    (["--set", "horizon"], ["FIELD=VALUE"]),
    (["--set", "horizon=sixteen"], ["horizon = 'sixteen'", "int"]),
    (["--set", "horizon=true"], ["horizon = True", "int"]),
    (["--set", "down_dims=16"], ["down_dims = 16", "tuple"]),
    (["--set", "down_dims=[16"], ["down_dims"]),
    (["--set", "down_dims=[]"], ["down_dims"]),
    (["--set", "horizon=9"], ["horizon 9 cannot be halved", "shorten down_dims"]),
    (["--set", "sampler=dpm"], ["'dpm'", "ddpm"]),
    (["--set", "sampler_steps=21"], ["21"]),
    (["--init", "missing.safetensors"], ["missing.safetensors"]),
    (["--data", "missing.hdf5"], ["missing.hdf5"]),
    (["--config", "missing.yaml"], ["missing.yaml"]),
    (["--resume"], ["checkpoint.pt"]),
], ids=lambda x: "-".join(x).strip("-") if isinstance(x, list) and x[0].startswith("--") else "")
def test_wrong_flags(argv, named, demos, tmp_path, capsys):
    refused(capsys, lambda: train.main(command(demos, tmp_path / "out", *argv)), *named)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize("text, named", [
    ("batchsize: 8", ["batchsize", "did you mean 'batch_size'"]),
    ("batch_size: many", ["batch_size = 'many'", "int"]),
    ("steps: 1.5", ["steps = 1.5", "int"]),
    ("lr: fast", ["lr = 'fast'", "float"]),
    ("betas: 0.9", ["betas = 0.9", "tuple"]),
    ("betas: [0.9]", ["betas"]),
    ("set: {horizont: 8}", ["did you mean 'horizon'"]),
    ("set: 3", ["set = 3"]),
    ("preset: [tiny]", ["preset = ['tiny']"]),
    ("just words", ["KEY: VALUE"]),
    ("steps: [1, 2", ["not valid YAML"]),
    ("shape_meta: {obs: {agent_poss: {shape: [2]}}}", ["did you mean 'agent_pos'"]),
    ("shape_meta: {obs: {agent_pos: {shape: [3]}}}", ["agent_pos", "[3]", "[2]"]),
    ("shape_meta: {obs: [agent_pos]}", ["shape_meta"]),
])
def test_wrong_yaml(text, named, demos, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    no_flag = {key: None for key in re.findall(r"^(\w+):", text)}   # it would win over the YAML
    argv = command(demos, tmp_path / "out", "--config", str(tmp_path / "wrong.yaml"), **no_flag)
    refused(capsys, lambda: train.main(argv), *named)
