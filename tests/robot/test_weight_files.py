"""Files of weights as people download them."""
import argparse
import json

import pytest
import torch

from robot.downloads import open_download
from robot.errors import UserError
from robot.weight_files import read_weights, refuse_not_finite
from helpers import write_safetensors

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
           "n": torch.tensor(3), "flag": torch.tensor([True, False]),
           "odd": torch.tensor([7, 8, 9], dtype=torch.uint8), "after.odd": torch.tensor([0.25, 4.0])}


def same(got, want=WEIGHTS):
    return list(got) == list(want) and all(
        got[key].dtype == x.dtype and torch.equal(got[key], x) for key, x in want.items())


def test_safetensors_are_read_in_the_types_of_the_file_and_stay_in_it(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    weights, notes = read_weights(path)
    assert same(weights) and not notes
    assert same(read_weights(tmp_path)[0]), "the folder stands for its file"
    before = path.read_bytes()
    weights["a.weight"] += 1                        # a map of one's own: the file is not written to
    assert path.read_bytes() == before and same(read_weights(path)[0])


def test_the_package_safetensors_writes_what_is_read_here(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="package safetensors is an extra")
    safetensors.save_file(WEIGHTS, tmp_path / "model.safetensors")
    got = read_weights(tmp_path)[0]
    assert same({key: got[key] for key in WEIGHTS})


@pytest.mark.parametrize("spoil, named", [
    (lambda raw: raw[:-3], "has no place in it"), (lambda raw: raw[:5], "promise"),
    (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
    (lambda raw: raw[:8] + b"[" + raw[9:], "no JSON"),
    (lambda raw: raw.replace(b"[2, 3]", b"[2, 4]"), "a.weight has no place"),
    (lambda raw: raw.replace(b'"F32"', b'"F33"'), "type F33")])
def test_a_safetensors_file_that_is_cut_short_or_spoilt_is_one_line(spoil, named, tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=named) as error:
        read_weights(path)
    assert "model.safetensors" in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("wrap, note", [
    (lambda w: w, None), (lambda w: {"module": w}, None),
    (lambda w: {"state_dict": w, "epoch": 7}, "not epoch"),
    (lambda w: {"model": {"x": torch.zeros(1)}, "ema": w, "opt": {}, "args": argparse.Namespace(lr=1)},
     "'ema' is taken, and not model, opt, args"),
    (lambda w: {"state_dicts": {"model": {}, "ema_model": w}}, "not model"),
    (lambda w: w | {"step": 5}, "no tensors: step")])
def test_what_programs_wrap_around_weights_is_taken_off_and_named(wrap, note, tmp_path):
    torch.save(wrap(WEIGHTS), tmp_path / "weights.pt")
    weights, notes = read_weights(tmp_path / "weights.pt")
    assert same(weights)
    assert len(notes) == (note is not None) and (not notes or note in notes[0])


@pytest.mark.parametrize("name", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "ema_model.{}",
                                  "ema_model.module.{}"])
def test_prefixes_of_other_programs_are_stripped(name, tmp_path):
    torch.save({name.format(key): x for key, x in WEIGHTS.items()}, tmp_path / "weights.pt")
    assert same(read_weights(tmp_path / "weights.pt")[0])


def test_a_programs_model_is_no_part_of_the_policys_names(tmp_path):
    policy = {"model.final_conv.weight": torch.zeros(1), "obs_encoder.x": torch.ones(1)}
    for names, want in (({f"model.{key}": x for key, x in policy.items()}, policy), (policy, policy),
                        ({"model.down.x": torch.ones(1)}, {"model.down.x": torch.ones(1)})):
        torch.save({"state_dict": names}, tmp_path / "weights.pt")
        assert same(read_weights(tmp_path / "weights.pt")[0], want)


def test_an_average_beside_the_weights_is_preferred_and_said(tmp_path):
    both = {f"online_model.{key}": 0 * x for key, x in WEIGHTS.items()} | {
        f"ema_model.{key}": x for key, x in WEIGHTS.items()}
    torch.save(both, tmp_path / "weights.pt")
    weights, notes = read_weights(tmp_path / "weights.pt")
    assert same(weights) and "online_model.a.weight" in notes[0]


@pytest.mark.parametrize("content, named", [
    ([torch.zeros(2)], "holds a list"), ({0: torch.zeros(2)}, "key 0 is no name"), ({}, "no tensors"),
    ({"module": {3: torch.zeros(1)}}, r"\['module'\]: the key 3"), (torch.zeros(2), "holds a Tensor"),
    ({"lr": 0.1}, "no tensors"),
    ({"model": {"model": {"model": {"model": {"a": torch.zeros(1)}}}}}, "nested too deeply")])
def test_what_is_no_weights_by_name_is_one_line(content, named, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=named) as error:
        read_weights(tmp_path / "weights.pt")
    assert "weights.pt" in str(error.value)


def test_a_pickle_is_never_run(tmp_path):
    ran = tmp_path / "ran"
    class Evil:
        def __reduce__(self):
            return ran.write_text, ("x",)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "cfg": Evil()}, tmp_path / "latest.ckpt")
    with pytest.raises(UserError, match="none is unpickled"):
        read_weights(tmp_path / "latest.ckpt")
    assert not ran.exists()


def shards(folder, ending="safetensors"):
    parts = [dict(list(WEIGHTS.items())[:2]), dict(list(WEIGHTS.items())[2:])]
    names = [f"model-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for name, part in zip(names, parts):
        write_safetensors(folder / name, part) if ending == "safetensors" else torch.save(part, folder / name)
    places = {key: name for name, part in zip(names, parts) for key in part}
    index = folder / f"{'model' if ending == 'safetensors' else 'pytorch_model'}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return index, names


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_one_set_of_weights(ending, tmp_path):
    index, names = shards(tmp_path, ending)
    assert same(read_weights(tmp_path)[0]) and same(read_weights(index)[0])
    with pytest.raises(UserError, match="one of 2 parts"):
        read_weights(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=f"names {names[1]}, which is not beside it"):
        read_weights(tmp_path)


def test_an_index_leads_to_no_other_folder_and_names_what_parts_lack(tmp_path):
    index, names = shards(tmp_path)
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["more"] = names[0]
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="lack more"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match="not beside it"):
        read_weights(tmp_path)


def test_several_files_of_one_model_and_a_name_that_two_of_them_hold(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(1)}, tmp_path / "b.pt")
    download = open_download(f"{tmp_path / 'a.pt'},{tmp_path / 'b.pt'}")
    assert list(download.weights) == ["a", "b"]
    assert [part.path.name for part in download.parts] == ["a.pt", "b.pt"]
    with pytest.raises(UserError, match="several files of weights: name one of a.pt, b.pt"):
        open_download(tmp_path)
    with pytest.raises(UserError, match="both hold a"):
        open_download(f"{tmp_path / 'a.pt'},{tmp_path / 'a.pt'}").weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(bad, dtype):
    refuse_not_finite({"whole": torch.full((3,), 60_000.0, dtype=dtype), "n": torch.tensor(3),
                       "empty": torch.zeros(0), "model.mask": torch.tensor([0.0, -torch.inf])})
    with pytest.raises(UserError, match="unet.bias holds numbers that are not finite"):
        refuse_not_finite({"fine": torch.zeros(2), "unet.bias": torch.tensor([0.0, bad], dtype=dtype)})


@pytest.mark.parametrize("odd", [torch.zeros(3, device="meta"), torch.eye(3).to_sparse()])
def test_tensors_without_plain_numbers_are_refused(odd):
    with pytest.raises(UserError, match="unet.bias holds no plain numbers"):
        refuse_not_finite({"fine": torch.zeros(2), "unet.bias": odd})
