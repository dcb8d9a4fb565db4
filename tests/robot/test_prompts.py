"""The state in the text of pi0.5: the same in training and in acting, and what is said of it."""
import numpy as np
import pytest
import torch
from helpers import write

import data
import pi05
from robot.errors import say_once
from robot.policy import Policy
from robot.text import prompts
from tools import options

SMALL = ["--set", "vit_width=16", "--set", "vit_mlp=16", "--set", "depth=1", "--set", "width=16",
         "--set", "mlp=16", "--set", "expert_width=8", "--set", "expert_mlp=8", "--batch_size", "4"]


@pytest.fixture(autouse=True)
def unsaid():
    say_once.cache_clear()


def opened(path, *flags):
    """(Config, training items, normaliser, description) as train.py makes them."""
    chosen, explicit = options.parse_options(["--model", "pi05", "--data", str(path), *SMALL, *flags])
    chosen = options.with_recipe(chosen, explicit, pi05)
    facts, make_items, description, normalizer = data.open_data(chosen, pi05)
    config = options.make_config(pi05, chosen, facts)
    return config, make_items(config, torch.device("cpu"))[0], normalizer, description


def by_hand(text, state):
    """pi05's text of bytes, from the edges of the bins."""
    bins = [sum(s >= -1 + k / 128 for k in range(256)) - 1 for s in state.tolist()]
    return f"{text};{''.join('-1' if b < 0 else f'{b:02x}' for b in bins)}"


def test_every_item_holds_its_own_state_and_so_does_an_observation(tmp_path):
    path = write(tmp_path / "a.hdf5", (5, 8, 3))
    config, items, normalizer, description = opened(path)
    assert normalizer.mode == "quantile" or set(normalizer.mode.values()) == {"quantile"}
    policy = Policy(pi05.Pi05(config).eval(), normalizer, description)
    episodes = items.item_episode.tolist()
    batch = items.batch(torch.arange(len(items)))
    assert len(batch["text"].unique(dim=0)) == len(items)                   # no two steps are alike
    for i in range(len(items)):
        told = items.demos.instructions[items.episodes[episodes[i]]]
        assert config.decode_text(batch["text"][i]) == by_hand(told, batch["state"][i, -1])
        raw = items.demos.state[items.demos.rows(items.episodes)][i]
        parts = np.split(raw, np.cumsum([*description["state_keys"].values()]))[:-1]
        picture = {key: batch["images"][i, -1, v].permute(1, 2, 0).numpy()
                   for v, key in enumerate(description["camera_keys"])}
        observation = dict(zip(description["state_keys"], parts)) | picture | {"instruction": told}
        step, _ = policy.prepare(observation)
        assert torch.equal(step["text"][0], batch["text"][i]), i
    some = torch.tensor([3, 0, 3])
    assert torch.equal(items.batch(some)["text"], batch["text"][some])


def test_without_the_state_the_text_is_the_instruction(tmp_path):
    config, items, *_ = opened(write(tmp_path / "a.hdf5", (5, 8, 3)), "--set", "state_in_text=false")
    texts = {config.decode_text(codes) for codes in items.batch(torch.arange(len(items)))["text"]}
    assert texts == {items.demos.instructions[e] for e in items.episodes}


def test_text_len_has_room_for_the_state(tmp_path, capsys):
    def long(file):
        file["data/demo_1"].attrs["language_instruction"] = "é" * 30            # 60 bytes
    config, items, *_ = opened(write(tmp_path / "a.hdf5", (5, 8, 3), long))
    S = config.state_dim
    assert config.text_len == 60 + 1 + 2 * S and S == 4
    said = capsys.readouterr().err
    assert f"text_len is {config.text_len} instead of 30: the longest instruction and the state have" in said
    assert opened(write(tmp_path / "b.hdf5", (5, 8, 3)))[0].text_len == 30      # it does not shrink


def test_a_state_outside_is_said_once(capsys):
    config = pi05.Config(text_len=10)
    inside, outside = torch.tensor([[-1.0, 1.0]]), torch.tensor([[0.0, 1.01]])
    prompts(config, ["a"], inside)
    assert "outside" not in capsys.readouterr().err
    for _ in range(3):
        assert config.decode_text(prompts(config, ["a"], outside)[0]) == "a;80ff"
    assert config.decode_text(prompts(config, ["a"], -outside)[0]) == "a;80-1"
    said = capsys.readouterr().err
    assert said.count("outside of -1..1") == 1 and said.count("\n") == 1
    say_once.cache_clear()
    prompts(config, ["a"], -outside)                        # on the other side as well
    assert "outside of -1..1" in capsys.readouterr().err
    say_once.cache_clear()
    config.state_in_text = False                            # then nothing is written, and nothing said
    prompts(config, ["a"], outside)
    assert not capsys.readouterr().err
