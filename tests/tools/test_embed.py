"""tools/embed.py, and training on what it writes."""
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import refused, replace, write, write_rdt

import data
import rdt
import train
from demos.embeddings import read_language
from robot.policy import Policy
from tools import embed, options

SIGLIP = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
T5 = {"d_model": 10, "d_kv": 6, "d_ff": 14, "num_layers": 2, "num_heads": 2, "vocab_size": 300,
      "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 20}


class Words:
    """Stands in for SentencePiece: a code for each letter."""

    def encode(self, text):
        return [3 + byte for byte in text.encode()]

    def vocab_size(self):
        return 300


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr(rdt, "tokenizer", lambda path: Words())


def official(model, kind):
    """The state_dict under transformers' names: those that convert_official turns into ours."""
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "out": "self_attn.out_proj",
             **{x: f"self_attn.{x}_proj" for x in "qkv"}, "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    t5 = {"norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm", "gate": "layer.1.DenseReluDense.wi_0",
          "up": "layer.1.DenseReluDense.wi_1", "down": "layer.1.DenseReluDense.wo",
          **{x: f"layer.0.SelfAttention.{x}" for x in "qkvo"}}
    found = {}
    for key, x in model.state_dict().items():
        first, *rest = key.split(".")
        if kind == "siglip":
            new = {"patch": "embeddings.patch_embedding.", "norm": "post_layernorm.",
                   "position": "embeddings.position_embedding.weight"}.get(first, "encoder.layers.")
            rest = [rest[0], names[rest[1]], rest[2]] if first == "layers" else rest
            found["vision_model." + new + ".".join(rest)] = x
        else:
            new = {"embed": "shared.", "norm": "encoder.final_layer_norm.", "layers": "encoder.block.",
                   "relative": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."}[first]
            rest = [rest[0], t5[rest[1]], rest[2]] if first == "layers" else rest
            found[new + ".".join(rest)] = x
    assert set(rdt.convert_official(found)) == {f"{'vision' if kind == 'siglip' else 't5'}.{k}"
                                                for k in model.state_dict()}
    return found


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of both with random weights, as transformers writes them, and the modules."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    c = SIGLIP
    vision = rdt.Siglip(c["image_size"], c["patch_size"], c["hidden_size"], c["num_hidden_layers"],
                        c["intermediate_size"], c["num_attention_heads"])
    vision.position.data.normal_()
    c = T5
    t5 = rdt.T5Encoder(c["vocab_size"], c["d_model"], c["num_layers"], c["num_heads"], c["d_kv"], c["d_ff"],
                       c["relative_attention_num_buckets"], c["relative_attention_max_distance"])
    for kind, model, config in (("siglip", vision, SIGLIP), ("t5", t5, T5)):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(config))
        torch.save(official(model, kind), folder / kind / "pytorch_model.bin")
    (folder / "t5" / "spiece.model").write_bytes(b"")
    return folder, vision.eval(), t5.eval()


def run(encoders, source, out, *more):
    t5, siglip = (str(encoders[0] / kind) for kind in ("t5", "siglip"))
    return embed.main([str(source), "--t5", t5, "--siglip", siglip, "--out", str(out), "--device", "cpu",
                       *more])


@pytest.fixture
def embedded(tmp_path, encoders):
    source = write(tmp_path / "demos.hdf5", lengths=(6, 9, 4))
    return source, run(encoders, source, tmp_path / "out", "--batch_size", "4", "--text", "go home")


def test_tokens_are_those_of_each_picture_and_each_instruction(embedded, encoders, monkeypatch):
    source, out = embedded
    _, vision, t5 = encoders
    with h5py.File(out / "episode_00001.hdf5") as file, h5py.File(source) as demos, torch.no_grad():
        assert set(file) == {"left", "right"} and file["left"].shape == (9, 4, 12)
        for camera in ("left", "right"):
            frame = torch.from_numpy(demos[f"data/demo_1/obs/{camera}"][5]).permute(2, 0, 1)[None].float()
            want = vision(rdt.fit_square(frame, 28))
            np.testing.assert_allclose(file[camera][5], want[0], atol=0.02)     # float16, Pillow's rounding
        assert np.abs(file["left"][5] - file["right"][5]).max() > 0.1
    language = read_language(out)
    assert list(language) == ["", "task 0", "task 1", "task 2", "go home"]
    with torch.no_grad():
        for text in language:
            codes = torch.tensor([Words().encode(text) + [1]])
            np.testing.assert_allclose(language[text], t5(codes, codes > 0)[0], atol=1e-5)
        grey = vision(torch.full((1, 3, 28, 28), 127 / 127.5 - 1))[0]
    with h5py.File(out / "language.hdf5") as file:
        np.testing.assert_allclose(file["background"], grey, atol=0.01)


def test_what_is_there_is_not_made_again(embedded, encoders, tmp_path, monkeypatch):
    """Stopped in the second episode, the command goes on with it; each instruction is read once."""
    source, whole = embedded
    out, made, read, pictures = tmp_path / "again", [], [], embed.picture_tokens

    def stops(vision, images):
        made.append(len(images))
        if len(made) == 5:                      # the background, 2 of the first episode, 2 of the second
            raise KeyboardInterrupt
        return pictures(vision, images)

    tokens = embed.instruction_tokens
    monkeypatch.setattr(embed, "instruction_tokens",
                        lambda texts, *more: read.extend(texts) or tokens(texts, *more))
    monkeypatch.setattr(embed, "picture_tokens", stops)
    with pytest.raises(KeyboardInterrupt):
        run(encoders, source, out, "--batch_size", "4")
    assert sorted(p.name for p in out.iterdir()) == ["episode_00000.hdf5", "language.hdf5"]
    monkeypatch.setattr(embed, "picture_tokens", lambda *args: made.append(0) or pictures(*args))
    run(encoders, source, out, "--batch_size", "4")
    assert made == [1, 8, 4, 8, 8, 0, 0, 0, 0, 0]   # once the background, 3 times 9 steps, once 4
    assert read == ["", "task 0", "task 1", "task 2"]
    for path in whole.glob("episode*"):
        with h5py.File(path) as a, h5py.File(out / path.name) as b:
            assert all((a[key][:] == b[key][:]).all() for key in a) and dict(a.attrs) == dict(b.attrs)


def test_t5_is_read_layer_by_layer(encoders, monkeypatch):
    """Of the layers, one is in memory at a time; instructions share each."""
    part, loaded = embed.open_encoder("t5", encoders[0] / "t5"), []
    load = rdt.T5Layer.load_state_dict
    monkeypatch.setattr(rdt.T5Layer, "load_state_dict",
                        lambda self, *args, **more: loaded.append(id(self)) or load(self, *args, **more))
    embed.instruction_tokens(["red", "blue", ""], part, torch.device("cpu"), torch.float32)
    assert len(loaded) == 2 and len(set(loaded)) == 1


CHOSEN = {"horizon": 4, "n_action_steps": 2, "action_names": ["eef_pos_x", "eef_pos_y"],
          "state_names": ["eef_pos_x", "eef_pos_y", "eef_pos_z", "gripper_open"]}


def windows(source, out, **changes):
    chosen = options.Options(model="rdt", data=str(source), embeddings=str(out), normalizer="none",
                             set=CHOSEN, **changes)
    facts, items, *_ = data.open_data(chosen, rdt)
    config = options.make_config(rdt, chosen, facts)
    return items(config, "cpu"), config


@pytest.mark.parametrize("still", [0.0, 2.5])
def test_a_batch_holds_the_tokens_of_its_steps(embedded, still):
    """Also where steps before the first move are left out."""
    source, out = embedded
    (items, held_out), config = windows(source, out, still=still)
    assert (config.encoders, config.vit_width, config.t5_width, config.image_tokens) == ("none", 12, 10, 4)
    batch = items.batch(torch.arange(len(items)))
    assert "images" not in batch and "text" not in batch
    language = read_language(out)
    for i, name in enumerate(items.episode(torch.arange(len(items)))):
        e = int(name[-1])
        t = int(batch["state"][i, -1, 0]) - 100 * e
        with h5py.File(out / f"episode_{e:05d}.hdf5") as file:
            begin = 2 if still else 0
            want = np.stack([file[camera][s] for s in (max(t - 1, begin), t) for camera in ("left", "right")])
        assert (batch["image_embeds"][i].numpy() == want.reshape(-1, 12)).all()
        tokens = language[f"task {e}"]
        assert (batch["lang_embeds"][i][batch["lang_mask"][i]].numpy() == tokens).all()
    assert (batch["empty_embeds"][3].numpy() == language[""]).all()
    model = rdt.RDT(config)
    model.loss(batch)["loss"].backward()        # hides pictures and instructions too
    assert torch.isfinite(model.sample(batch)).all()


def test_places_and_steps_before_the_start(embedded):
    """A place without a camera is hidden; so are pictures before an episode's first, as released."""
    source, out = embedded
    chosen = {"cameras": {"external": None, "right_wrist": "right", "left_wrist": "left"}}
    given = {"max_cameras": 3, "hide_before_start": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rdt.PRESETS, "three", given)
        (items, _), config = windows(source, out, processing=chosen, preset="three")
    assert config.n_cameras == 3
    batch = items.batch(torch.tensor([0, 1]))
    assert batch["image_mask"].tolist() == [[[False] * 3, [False, True, True]], [[False, True, True]] * 2]
    tokens = batch["image_embeds"].unflatten(1, (2, 3, 4))
    background = batch["background_embeds"][:, None]
    assert (tokens[:, :, 0] == background).all() and not (tokens[:, 1, 1] == background[:, 0]).all()
    with h5py.File(out / f"episode_{int(items.episode(torch.tensor([1]))[0][-1]):05d}.hdf5") as file:
        assert (tokens[1, 1, 1].numpy() == file["right"][1]).all()
        assert (tokens[1, 0, 2].numpy() == file["left"][0]).all()


def test_training_on_tokens(embedded, tmp_path, capsys):
    source, out = embedded
    small = CHOSEN | {"width": 32, "depth": 2, "n_heads": 2}
    flags = {"model": "rdt", "data": source, "embeddings": out, "out": tmp_path / "run", "steps": 3,
             "batch_size": 4, "device": "cpu", "dtype": "float32", "episodes": 0}
    train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))]
               + [word for name, value in small.items() for word in ("--set", f"{name}={json.dumps(value)}")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [3] and np.isfinite(rows[-1]["val_loss"])


def test_training_goes_on_from_a_release(embedded, encoders, tmp_path):
    """Of another robot than the release's; SigLIP stays with the policy, which then looks at pictures."""
    source, out = embedded
    release = write_rdt(tmp_path / "rdt", horizon=4, n_action_steps=4, text_len=16, t5_width=10, vit_width=12,
                        width=24, depth=2, n_heads=2, image_tokens=4)
    (tmp_path / "robot.yaml").write_text(json.dumps({
        "set": {key: CHOSEN[key] for key in ("action_names", "state_names")},
        "processing": {"cameras": {"external": "left", "left_wrist": "right"}}}))
    flags = {"config": tmp_path / "robot.yaml", "data": source, "embeddings": out, "out": tmp_path / "run",
             "init": f"{release},{encoders[0] / 'siglip'}", "steps": 2, "batch_size": 4, "device": "cpu",
             "episodes": 0}
    train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    policy = Policy.load(tmp_path / "run")
    c = policy.model.config
    assert (c.encoders, c.horizon, c.n_cameras, c.action_dim) == ("images", 4, 3, 2)
    assert policy.processing.places == [("external", "left"), ("right_wrist", None), ("left_wrist", "right")]
    stats = policy.normalizer.stats["state"]
    assert policy.normalizer.mode == "none"
    assert c.state_mean[0] == pytest.approx(stats["mean"][0].item(), 1e-4)
    seen = {"angle": np.zeros(1), "pos": np.zeros(3), "lang_embeds": read_language(out)["go home"]}
    pictures = {key: np.full((4, 6, 3), 99, np.uint8) for key in ("left", "right")}
    assert np.isfinite(policy.act(seen | pictures)).all()


# -- bad input


def test_tokens_of_other_data_are_refused(embedded, encoders, tmp_path, capsys):
    source, out = embedded
    other = write(tmp_path / "other.hdf5", (6, 9, 4), replace("data/demo_1/actions", np.ones((9, 2))))
    shutil.copy(source, tmp_path / "kept.hdf5")
    source.unlink()
    shutil.move(other, source)
    refused(capsys, lambda: windows(source, out), "no episode demos.hdf5:demo_1 with these actions")
    shutil.move(tmp_path / "kept.hdf5", source)
    windows(source, out)
    with h5py.File(out / "episode_00002.hdf5", "r+") as file:
        short = file["right"][:3]
        del file["right"]
        file["right"] = short
    refused(capsys, lambda: windows(source, out), "'right' has shape (3, 4, 12)", "(4, 4, 12)")
    with h5py.File(out / "episode_00002.hdf5", "r+") as file:
        del file["right"]
    refused(capsys, lambda: windows(source, out), "has no camera 'right'")
    (out / "episode_00002.hdf5").write_bytes(b"no HDF5")
    refused(capsys, lambda: windows(source, out), "episode_00002.hdf5 cannot be opened")
    (out / "language.hdf5").unlink()
    refused(capsys, lambda: windows(source, out), "has no language.hdf5")


@pytest.mark.parametrize("change, words", [
    ({"vit_width": 1152}, "vit_width 12, the model three 1152"),
    ({"t5_width": 4096}, "t5_width 10, the model three 4096"),
    ({"vit_size": 384, "patch_size": 14}, "image_tokens 4, the model three 729"),
    ({"text_len": 3}, "longest instruction has 7 tokens, text_len is 3"),
])
def test_tokens_of_another_width_are_refused(embedded, capsys, monkeypatch, change, words):
    monkeypatch.setitem(rdt.PRESETS, "three", change)
    refused(capsys, lambda: windows(*embedded, preset="three"), words)


def test_presets_that_take_tokens_say_how_to_make_them(embedded, capsys):
    chosen = options.Options(model="rdt", preset="170M", data=str(embedded[0]))
    refused(capsys, lambda: data.open_data(chosen, rdt), "tools.embed", "--embeddings")
    import pi0
    chosen = options.Options(model="pi0", data=str(embedded[0]), embeddings=str(embedded[1]))
    refused(capsys, lambda: data.open_data(chosen, pi0), "pi0 does not read")


def test_an_instruction_that_is_new_is_added(embedded, encoders, capsys):
    source, out = embedded
    with h5py.File(source, "r+") as file:
        file["data/demo_1"].attrs["language_instruction"] = "another task"
    refused(capsys, lambda: windows(source, out), "no instruction 'another task'")
    run(encoders, source, out)
    windows(source, out)


@pytest.mark.parametrize("spoil, words", [
    (lambda f: (f / "t5" / "config.json").unlink(), ["t5 has no config.json"]),
    (lambda f: (f / "siglip" / "config.json").unlink(), ["siglip has no config.json"]),
    (lambda f: (f / "t5" / "spiece.model").unlink(), ["no spiece.model"]),
    (lambda f: edit(f / "siglip", image_size=56), ["pictures of 56 in patches of 14", "4 patches"]),
    (lambda f: edit(f / "siglip", hidden_act="gelu"), ["hidden_act 'gelu' is not"]),
    (lambda f: edit(f / "t5", feed_forward_proj="relu"), ["no T5 of version 1.1"]),
    (lambda f: edit(f / "t5", num_heads=4), ["T5 do not fit"]),
    (lambda f: edit(f / "t5", num_layers="two"), ["num_layers is 'two'"]),
    (lambda f: shutil.copy(f / "t5" / "pytorch_model.bin", f / "siglip"), ["holds no weights of SigLIP"]),
])
def test_encoders_that_do_not_fit_are_refused(encoders, tmp_path, capsys, monkeypatch, spoil, words):
    folder = shutil.copytree(encoders[0], tmp_path / "encoders")
    spoil(folder)
    source = write(tmp_path / "demos.hdf5", lengths=(4, 4))
    refused(capsys, lambda: run((folder,), source, tmp_path / "out"), *words)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tokenizer_of_another_size_is_refused(encoders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Words, "vocab_size", lambda self: 301)
    source = write(tmp_path / "demos.hdf5", lengths=(4, 4))
    refused(capsys, lambda: run(encoders, source, tmp_path / "out"), "has 301 pieces, vocab_size is 300")


def test_other_weights_and_full_disks_are_refused(embedded, encoders, tmp_path, capsys, monkeypatch):
    source, out = embedded
    folder = shutil.copytree(encoders[0], tmp_path / "encoders")
    weights = torch.load(folder / "siglip" / "pytorch_model.bin", weights_only=True)
    weights["vision_model.embeddings.patch_embedding.weight"] += 1
    torch.save(weights, folder / "siglip" / "pytorch_model.bin")
    refused(capsys, lambda: run((folder,), source, out), "was made with other weights of siglip")
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(capsys, lambda: run(encoders, source, tmp_path / "new"), "0.0 GB are free")
    refused(capsys, lambda: run(encoders, tmp_path, tmp_path / "inside"), "lies among the demonstrations")


@pytest.mark.skipif("DEMO_DATA" not in os.environ, reason="DEMO_DATA names no folder of real data")
def test_real_pictures(encoders, tmp_path):
    source = Path(os.environ["DEMO_DATA"]) / "g1_bottle_image.hdf5"
    out = run(encoders, source, tmp_path / "out")
    with h5py.File(source) as demos:
        lengths = [len(demos[f"data/demo_{i}/actions"]) for i in range(len(demos["data"]))]
    for i, length in enumerate(lengths):
        with h5py.File(out / f"episode_{i:05d}.hdf5") as file:
            assert all(len(file[key]) == length for key in file) and len(file)
