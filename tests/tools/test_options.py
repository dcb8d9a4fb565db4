"""tools/options.py: flags, YAML and recipes, and what can be wrong with them."""
import re

import pytest
import torch
import yaml
from helpers import ROOT, command, refused, resolved

import dp_cnn
import pi0
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


def test_bfloat16_is_recommended_to_cpus_that_have_it(monkeypatch):
    def recommended(*argv):
        return options.with_recipe(*options.parse_options([*argv, "--model", "pi0"]), pi0).dtype

    for device, has, dtype in (("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("cpu", None, "float32"),
                               ("cuda", False, "bfloat16"), ("mps", True, "float32")):
        monkeypatch.setattr(options, "pick_device", lambda *_: (torch.device(device), None))
        monkeypatch.setattr(options, "cpu_has_bfloat16", lambda: has)
        assert recommended() == dtype
        assert recommended("--dtype", "bfloat16") == "bfloat16"


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
        facts = {"n_cameras": len(cameras)}
        facts |= {"action_dim": meta["action"]["shape"][0]} if "action" in meta else {}
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
    (["--lr", "nan"], ["lr = nan", "not finite"]),
    (["--seed", str(2**63)], ["seed"]), (["--seed", str(2**32)], ["--seed", "from 0 to 4294967295"]),
    (["--ema_max", "1.5"], ["--ema_max 1.5", "from 0 to 1"]), (["--out", "~nouser/x"], ["no such user"]),
    (["--data", "~nouser/x"], ["no such user"]), (["--config", "~nouser/x"], ["--config", "no such user"]),
    (["--config", "/dev/zero"], ["--config /dev/zero", "a pipe or a device"]),
    (["--set", "=3"], ["FIELD=VALUE"]), (["--set", "horizon=" + "9" * 5000], ["not valid YAML"]),
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
    ("shape_meta: " + "{obs: " * 900 + "1" + "}" * 900, ["nested too deeply"]),
    ("set: &s {horizon: *s}", ["nested too deeply"]),
    ("a: &a [1, 2, 3, 4, 5, 6, 7]\nb: &b [*a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b]\nset: {x: ["
     + "*c, " * 50 + "1]}", ["too large for options"]),
    ("steps: " + "9" * 5000, ["not valid YAML", "digits"]),
    ("steps: 0x" + "f" * 5000, ["20000 bits"]),
    ("set: {horizon: 99999999999999999999}", ["67 bits"]),
    ("lr: 2020-02-31", ["not valid YAML", "day"]),
    ("set: {sampler: 2020-02-01}", ["2020-02-01", "quotes"]),
    ("steps: 1\nsteps: 2", ["a key stands twice"]),
    ("set: {horizon: 8, horizon: 16}", ["a key stands twice"]),
    ("3: 4", ["the key 3", "quotes"]),
    ("data: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ("seed: 18446744073709551616", ["65 bits"]),
    ("seed: 4294967296", ["--seed 4294967296", "from 0 to 4294967295"]),
    ("lr: .nan", ["lr = nan"]),
    ("shape_meta: {obs: {}}", ["names no observation"]),
    ("shape_meta: {action: {shape: [2]}}", ["names no observation"]),
    ("shape_meta: {obss: {}}", ["'obss'", "did you mean 'obs'"]),
    ("shape_meta: {obs: {agent_pos: {shap: [2]}}}", ["obs: agent_pos", "did you mean 'shape'"]),
    ("shape_meta: {obs: {agent_pos: {shape: 2}}}", ["obs: agent_pos", "[3, H, W]"]),
    ("shape_meta: {obs: {agent_pos: {shape: [0]}}}", ["obs: agent_pos", "[0]"]),
    ("shape_meta: {obs: {agent_pos: {shape: [2]}}, action: {shape: [2], type: x}}", ["action", "'type'"]),
    ("env: {id: X-v0, kwarg: {}}", ["env", "did you mean 'kwargs'"]),
    ("robots: {left: 3}", ["robots: left", "action_names"]),
    ("robots: {left: {action_name: [a]}}", ["robots: left", "did you mean 'action_names'"]),
])
def test_wrong_yaml(text, named, demos, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    no_flag = {key: None for key in re.findall(r"^(\w+):", text)}   # it would win over the YAML
    argv = command(demos, tmp_path / "out", "--config", str(tmp_path / "wrong.yaml"), **no_flag)
    refused(capsys, lambda: train.main(argv), *named)


def test_what_a_yaml_merges_may_be_overridden():
    text = "a: &a {shape: [2], type: low_dim}\nb: {<<: *a, shape: [3]}"
    assert options.read_values(text, "x")["b"] == {"shape": [3], "type": "low_dim"}


def test_a_yaml_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_bytes("data: gr\u00fcn.hdf5\n".encode())
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda *_: "ascii", raising=False)
    assert resolved("--config", str(tmp_path / "c.yaml")).data == "gr\u00fcn.hdf5"
    (tmp_path / "c.yaml").write_bytes("data: gr\u00fcn.hdf5\n".encode("latin-1"))
    with pytest.raises(UserError, match="--config .* no text in UTF-8"):
        resolved("--config", str(tmp_path / "c.yaml"))


def test_every_number_among_the_options_has_a_range():
    numbers = {name for name, value in vars(options.Options()).items() if type(value) in (int, float)}
    assert numbers == set(options.RANGES)
    default = vars(options.Options())
    assert all(least <= default[name] <= most for name, (least, most) in options.RANGES.items())


def test_a_network_has_so_many_layers_at_most():
    """Making a hundred thousand of them takes minutes, even without memory."""
    with pytest.raises(UserError, match="t5_depth = 100000: no network here has more than 1000 layers"):
        options.make_config(load_module("rdt"), resolved("--set", "t5_depth=100000"), {})
    assert options.make_config(load_module("rdt"), resolved("--set", "t5_depth=1000"), {}).t5_depth == 1000
