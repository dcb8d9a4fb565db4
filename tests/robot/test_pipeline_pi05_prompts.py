"""From a state and an instruction to the codes that pi0 and pi0.5 read, as openpi and LeRobot do it: every
case of GOLDEN_DIR/pipelines that holds prompts."""
import json

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN_DIR

import pi0
import pi05
from robot.text import prompts

PIPELINES = GOLDEN_DIR / "pipelines"


def cases(pattern):
    found = sorted(PIPELINES.glob(pattern))
    skip = pytest.mark.skip(reason=f"no {PIPELINES}/{pattern}")
    return pytest.mark.parametrize("path", found or [pytest.param(None, marks=skip)],
                                   ids=lambda path: path and path.name)


def arrays(path):
    with np.load(path, allow_pickle=False) as z:
        return {key: z[key] for key in z.files}


def lerobot_config(path, module, **fields):
    pytest.importorskip("sentencepiece", reason="package sentencepiece is an extra")
    vocabulary = json.loads((path / "sizes.json").read_text())["vocab"]
    length = json.loads((path / "config.json").read_text())["tokenizer_max_length"]
    return module.Config(tokenizer_path=str(path / "tokenizer.model"), vocab_size=vocabulary, text_len=length,
                         text_weight=0.0, **fields)


def normalised(path, key, x):
    """By the statistics of a LeRobot folder: its mode and its numbers."""
    load_file = pytest.importorskip("safetensors.numpy", reason="package safetensors is an extra").load_file
    steps = json.loads((path / "policy_preprocessor.json").read_text())["steps"]
    step = next(s for s in steps if s["registry_name"] == "normalizer_processor")
    stats = load_file(path / step["state_file"])
    of = lambda name: stats[f"{key}.{name}"].astype(np.float32)
    if step["config"]["norm_map"]["STATE"] == "MEAN_STD":
        return (x - of("mean")) / (of("std") + np.float32(1e-8))
    width = of("q99") - of("q01")
    return 2 * (x - of("q01")) / np.where(width == 0, np.float32(1e-8), width) - 1


@pytest.mark.filterwarnings("ignore:cut to text_len")
@cases("lerobot_pi05_*")
def test_lerobots_pi05(path):
    z = arrays(path / "episode.npz")
    config = lerobot_config(path, pi05)
    further = normalised(path, "observation.state", z["in/prompt_states"])
    for texts, states, tokens, mask, written in (
            (z["in/task"], z["out/state_normalized"], "tokens", "token_mask", "out/text"),
            (z["in/prompts"], further, "prompt_tokens", "prompt_mask", "out/prompt_text")):
        got = prompts(config, [str(t) for t in texts], torch.from_numpy(states).float())
        assert torch.equal(got, torch.from_numpy(z[f"out/{tokens}"]))
        assert torch.equal(got > 0, torch.from_numpy(z[f"out/{mask}"]))
        for row, text in zip(got, z[written]):              # the stored text is what was encoded
            pieces = pi05.tokenizer(config.tokenizer_path).encode(str(text))
            assert row[1:1 + len(pieces)].tolist() == pieces[:config.text_len - 1]
    bins = pi05.state_bins(torch.from_numpy(z["out/state_normalized"]))
    assert torch.equal(bins, torch.from_numpy(z["out/state_bins"]))


@pytest.mark.filterwarnings("ignore:cut to text_len")
@cases("lerobot_pi0_*")
def test_lerobots_pi0(path):
    z = arrays(path / "episode.npz")
    config = lerobot_config(path, pi0, text_as_is=True)
    for texts, tokens, mask in ((z["in/task"], "tokens", "token_mask"),
                                (z["in/prompts"], "prompt_tokens", "prompt_mask")):
        got = prompts(config, [str(t) for t in texts], None)
        assert torch.equal(got, torch.from_numpy(z[f"out/{tokens}"]))
        assert torch.equal(got > 0, torch.from_numpy(z[f"out/{mask}"]))


def openpi_queries(z):
    """(instruction, state as the network gets it, codes) of every query of an openpi case."""
    n = sum(key.endswith("/tokens") for key in z)
    for i in range(n):
        told = z.get(f"in/{i}/prompt", z.get("in/prompt"))
        if told is not None:
            yield str(told), z[f"out/{i}/state"], z[f"out/{i}/tokens"], z[f"out/{i}/token_mask"]


@pytest.mark.filterwarnings("ignore:cut to text_len")
@cases("openpi_pi0*")
def test_openpis_codes(path):
    pytest.importorskip("sentencepiece", reason="package sentencepiece is an extra")
    z = arrays(path / "case.npz")
    meta = json.loads(str(z["meta"]))["config"]
    module = pi05 if meta["model_type"] == "ModelType.PI05" else pi0
    more = {"state_in_text": meta["discrete_state_input"]} if module is pi05 else {}
    tokenizer = str(path / "tokenizer.model")
    config = module.Config(tokenizer_path=tokenizer, vocab_size=module.tokenizer(tokenizer).vocab_size(),
                           text_len=meta["max_token_len"], text_weight=0.0, **more)
    seen, S = 0, z["in/stats/state"].shape[-1]                 # what the robot has, before the zeros
    for text, state, tokens, mask in openpi_queries(z):
        got = prompts(config, [text], torch.from_numpy(state[None, :S]).float())[0]
        assert torch.equal(got, torch.from_numpy(tokens)) and torch.equal(got > 0, torch.from_numpy(mask))
        seen += 1
    assert seen


@cases("pi05_prompts*.npz")
def test_openpis_bins_and_text(path, monkeypatch):
    z = arrays(path)
    low, high = (z[f"in/{q}"].astype(np.float64) for q in ("q01", "q99"))
    y = (z["in/state"] - low) / (high - low + 1e-6) * 2 - 1
    np.testing.assert_allclose(y, z["out/state_normalized"], rtol=1e-5, atol=1e-6)
    state, bins = torch.from_numpy(y).float(), torch.from_numpy(z["out/bins"])
    assert torch.equal(pi05.state_bins(state), bins)
    assert torch.equal(pi05.state_bins(torch.from_numpy(z["in/edges"])), torch.from_numpy(z["out/edge_bins"]))

    class Letters:
        """Instead of SentencePiece: code points, so that nothing of the text is lost."""
        vocab_size = lambda self: 5000
        bos_id = lambda self: 2
        encode = lambda self, text: [ord(c) for c in text]

    monkeypatch.setattr(pi05, "tokenizer", lambda path: Letters())
    config = pi05.Config(tokenizer_path="any", vocab_size=5000, text_len=400, text_weight=0.0)
    read = lambda codes: "".join(chr(c) for c in codes[1:].tolist() if c)
    for i, task in enumerate(z["in/task"]):
        assert read(config.encode_text(str(task), state[i])) == str(z["out/prompt"][i])
        assert read(config.encode_text(str(task))) == str(z["out/prompt_without_state"][i])
    config.state_in_text = False
    assert read(config.encode_text(str(task), state[i])) == str(z["out/prompt_without_state"][i])
