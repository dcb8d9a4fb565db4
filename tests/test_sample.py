"""sample.py: the command line, and whether a trained policy works."""
import copy
import dataclasses
import json
import types

import numpy as np
import pytest
from helpers import refused

import sample
import train
from robot import tabletop
from robot.errors import UserError
from robot.models import MODELS, load_module, sampler_config
from robot.policy import Policy
from robot.rollout import closed_loop


def test_command_line(solved, capsys):
    result = sample.main([str(solved), "--episodes", "2", "--sampler_steps", "5"])
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed == result == json.loads((solved / "evaluation.json").read_text())
    assert "<html" in (solved / "evaluation.html").read_text()
    again = closed_loop(Policy.load(solved, steps=5), "tabletop", 2, 0)
    assert (again["success"], again["outcomes"]) == (result["success"], result["outcomes"])
    result = sample.main([str(solved / "checkpoint.pt"), "--episodes", "3", "--set", "sampler=ddpm",
                          "--env", "tabletop", "--seed", "1", "--dtype", "bfloat16"])
    assert result["episodes"] == 3 and sum(result["outcomes"].values()) == 3


@pytest.mark.parametrize("argv, named", [
    (["--instruction", "7"], ["instruction", "0..3"]), (["--sampler_steps", "1000"], ["1000"]),
    (["--episodes", "0"], ["--episodes 0"]), (["--episode", "3"], ["did you mean 'episodes'"]),
    (["--set", "samplr=ddpm"], ["did you mean 'sampler'"]), (["--set", "sampler=dpm"], ["dpm"]),
    (["--set", "horizon=8"], ["--set horizon", "sampler of a trained dp_cnn", "sampler_steps"]),
    (["--set", "obs=image"], ["--set obs"]), (["--set", "n_diffusion_steps=50"], ["--set n_diffusion_steps"]),
    (["--set", "guidance=2.0"], ["--set guidance"]), (["--set", "clip_x0=.nan"], ["clip_x0", "not finite"]),
    (["--seed", "-1"], ["--seed -1"]), (["--seed", str(2**63)], ["--seed"]),
    (["--sampler_steps", "-1"], ["--sampler_steps -1"]), (["--config", "/dev/zero"], ["a pipe or a device"]),
    (["--device", "tpu"], ["tpu"]), (["--env", "NoSuch-v0"], ["NoSuch"]),
    (["--config", "missing.yaml"], ["missing.yaml"])])
def test_wrong_flags(argv, named, solved, capsys):
    if "--env" in argv:
        pytest.importorskip("gymnasium", reason="package gymnasium is an extra")
    refused(capsys, lambda: sample.main([str(solved), "--episodes", "1", *argv]), *named)


def test_wrong_runs(tiny, tmp_path, capsys):
    refused(capsys, lambda: sample.main([str(tmp_path)]), tmp_path)
    refused(capsys, lambda: sample.main([str(tiny)]), "names no environment")
    refused(capsys, lambda: sample.main([str(tiny), "--env", "tabletop"]), "lacks 'agent_pos'")


@pytest.mark.parametrize("text", ["env: [a]", "lr: 1", "3", "env:", "env: {id: 1", "env: {}", "a: 1\na: 2"])
def test_a_yaml_without_an_environment(text, tiny, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    argv = [str(tiny), "--config", str(tmp_path / "c.yaml")]
    refused(capsys, lambda: sample.main(argv), "--config", "c.yaml")


@pytest.mark.parametrize("config, env, found", [
    ("env: {id: A-v0, max_steps: 3}", "", {"id": "A-v0", "max_steps": 3}),
    ("env: {id: A-v0, max_steps: 3}", "B-v0", {"id": "B-v0", "max_steps": 3}),  # another task, same mapping
    ("env: {max_steps: 3}", "B-v0", {"id": "B-v0", "max_steps": 3}),
    ("", "R-v0", {"id": "R-v0", "fps": 5}), ("", "", {"id": "R-v0", "fps": 5}),
    ("", "B-v0", {"id": "B-v0"}), ("", "tabletop", "tabletop")])
def test_the_environment_of_a_command(config, env, found, tmp_path):
    """The mapping of --config counts for --env; the run's own does where --env names its environment."""
    if config:
        (tmp_path / "c.yaml").write_text(config)
    args = types.SimpleNamespace(config=str(tmp_path / "c.yaml") if config else "", env=env, robot="")
    run = {"options": {"env": {"id": "R-v0", "fps": 5}, "data": "x.hdf5", "robots": {}}}
    assert sample.environment_of(args, run) == found


def test_closed_loop_success(solved):
    result = json.loads((solved / "result.json").read_text())
    assert result["episodes"] == 20 and result["success"] >= 0.6


def test_both_ways_round_the_wall_and_their_mean_into_it(solved):
    """From one observation, on the way to the middle of the wall with the block in hand: chunks for both
    sides are drawn, and few touch the wall; their mean, which is what regression would answer, does."""
    n, seed = 64, 0
    while True:                                                     # until the asked block lies in the middle
        _, blocks, asked = tabletop.scene(seed)
        if abs(blocks[asked // 2, 0]) < 0.02:
            break
        seed += 1
    env = tabletop.Tabletop(n, cameras=False)
    obs, _ = env.reset(seed=np.full(n, seed))
    expert = tabletop.Expert(env)
    while expert.carried[0] < 3 or obs["robot0_eef_pos"][0, 1] < tabletop.WALL_Y - 0.45:
        before, (obs, *_) = obs, env.step(expert.act(obs))
    policy = Policy.load(solved)
    policy.history = [policy.prepare(before)[0]]
    policy.act(obs)
    chunks = policy.chunk[:, 1:]                                    # (n, 15, 3) from now on
    left, right = chunks[:, -1, 0] < -0.2, chunks[:, -1, 0] > 0.2
    assert left.sum() >= n // 8 and right.sum() >= n // 8 and (left | right).mean() > 0.9

    def touches(chunk):
        world, touched = copy.deepcopy(env), np.zeros(n, bool)
        for t in range(chunk.shape[1]):
            world.step(chunk[:, t])
            touched |= world.cancelled.any(1)
        return touched

    assert touches(chunks).mean() < 0.25
    assert touches(np.broadcast_to(chunks.mean(0), chunks.shape)).all()


def test_a_generative_checkpoint_is_sampled_and_compared_with_held_out_data(tmp_path, capsys):
    short = ["--steps", "2", "--batch_size", "8", "--demos", "400"]
    train.main(["--model", "ddpm", *short, "--out", str(tmp_path)])
    result = sample.main([str(tmp_path), "--sampler_steps", "5"])
    assert 0 < result["floor"] < result["distance"]      # two steps of training do not reach the data
    assert (tmp_path / "evaluation.html").stat().st_size > 10_000
    with pytest.raises(UserError, match="generates samples, it is no policy"):
        Policy.load(tmp_path)
    with pytest.raises(UserError, match="2000"):
        sample.main([str(tmp_path), "--sampler_steps", "2000"])


def test_set_reaches_the_sampler_of_every_model():
    """What a Config says of its sampler may be changed after training, all else is what the weights are."""
    structure = {"horizon", "n_obs_steps", "n_diffusion_steps", "action_dim", "width", "data_shape", "obs"}
    expected = {"ddpm": {"sampler", "sampler_steps", "eta", "clip_x0", "guidance"},
                "flow_matching": {"solver", "sampler_steps", "tolerance", "guidance"},
                "dp_cnn": {"sampler", "sampler_steps", "spacing", "clip_x0"},
                "dp_transformer": {"sampler", "sampler_steps", "spacing", "clip_x0"},
                "dit": {"sampler", "sampler_steps", "eta", "clip_x0", "guidance", "guidance_channels"},
                "dit_policy": {"sampler_steps", "spacing", "clip_x0"}, "rdt": {"sampler_steps"},
                "pi0": {"sampler_steps"}, "pi05": {"sampler_steps"}}
    for name in MODELS:
        module = load_module(name)
        config = dataclasses.asdict(module.Config())
        for key in config:
            if key in expected[name]:
                assert sampler_config(module, config, {key: config[key]}) == module.Config()
            else:
                with pytest.raises(UserError, match=f"--set {key}: only the sampler"):
                    sampler_config(module, config, {key: config[key]})
        assert expected[name] <= set(config) and not expected[name] & structure
