"""Beside peers: what is timed, compared and kept, with a peer made here. The peers themselves are tested if
PEERS in the environment names a folder of checkouts with their names (dit, rdt, ...)."""
import json
import os
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import refused

import dp_cnn
from robot.errors import UserError
from tools import against, bench
from tools.peers import work


def compare(*peers, out):
    argv = [word for peer in peers for word in ("--against", peer)]
    bench.main([*argv, "--device", "cpu", "--out", str(out), "--repeat", "3", "--seconds", "0"])


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """Three peers. "slow" takes 20 ms where ours takes 5 or 1, its numbers are ours + 0.25; "absent" lacks a
    package; the code of "changed" is not what its file expects."""
    built = []

    def build(name):
        built.append(name)
        wait = lambda seconds, x: (time.sleep(seconds), torch.tensor([x, 1.0]))[1]
        return work.Pair(lambda: wait(0.02, 0.25), lambda: wait(0.005, 0.0), lambda: wait(0.001, 0.5))

    slow = types.ModuleType("tools.peers.slow")
    slow.URL, slow.FILE, slow.PACKAGE = "https://example.org/slow", "net.py", ""
    slow.works = lambda folder: [work.Work(name, lambda name=name: build(name)) for name in ("step", "chunk")]
    absent = types.ModuleType("tools.peers.absent")
    absent.works = lambda folder: [work.Work("step", lambda: work.imported("no_such_package_here"))]
    changed = types.ModuleType("tools.peers.changed")
    changed.works = lambda folder: [work.Work("step", lambda: {}["width"])]
    absent.FILE = changed.FILE = "net.py"
    absent.URL = changed.URL = "https://example.org"
    for module in (slow, absent, changed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(against, "PEERS", ("slow", "absent", "changed"))
    page = tmp_path / "speed.md"
    page.write_text("<!-- against slow: begin -->\nold\n<!-- against slow: end -->\n")
    monkeypatch.setattr(against, "PAGE", page)
    (tmp_path / "net.py").touch()
    return types.SimpleNamespace(built=built, page=page)


def test_a_table_of_ratios_and_differences(tmp_path, peers, capsys):
    compare(f"absent={tmp_path}", f"changed={tmp_path}", f"slow={tmp_path}", out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "against.jsonl").read_text().splitlines()]
    assert [row["work"] for row in rows] == ["step", "chunk"]
    for row in rows:
        assert 0.2 < row["ratio"] < 0.6 and 0.04 < row["bfloat16_ratio"] < 0.25 and row["rounds"] == 3
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["theirs_ms"], abs=0.002)
        assert row["ours_differ"] == 0.25 and row["bfloat16_differ"] == 0.25
    printed = capsys.readouterr()
    assert "skipped: absent: no_such_package_here needs the package no_such_package_here" in printed.err
    assert "skipped: changed: step: its code does not fit tools/peers/changed.py: KeyError" in printed.err
    assert printed.err.count("skipped") == 2
    text = peers.page.read_text()
    assert f"| {rows[1]['ratio']:.2f} | 2.5e-01 |" in text and "| chunk | " in text and "old" not in text
    assert text.strip() in f"<!-- against slow: begin -->\n{printed.out.strip()}\n<!-- against slow: end -->"
    compare(f"slow={tmp_path}", out=tmp_path)               # nothing is measured twice
    assert peers.built == ["step", "chunk"]


def test_of_other_networks_only_the_times_are_compared(peers):
    pair = work.Pair(lambda: torch.zeros(1), lambda: torch.ones(2), lambda: None, compare=False)
    row = against.turns(pair, 3, 0)
    assert row["ours_differ"] is None and row["bfloat16_differ"] is None and row["ratio"] > 0
    row = {"machine": {"name": "x", "threads": 1, "torch": "2"}, "peer": "slow", "work": "chunk"} | row
    assert against.table([row]).splitlines()[-1].count("|  |") == 2


def test_training_steps_of_both_sides_are_the_same_arithmetic():
    """A model beside itself: after four steps of each (and none in bfloat16) the weights agree, and so do the
    losses of the next."""
    torch.manual_seed(0)
    config = dp_cnn.Config(action_dim=2, state_dim=3, down_dims=(16, 32), step_embed_dim=16)
    ours = dp_cnn.DiffusionPolicyCNN(config)
    theirs = dp_cnn.DiffusionPolicyCNN(config)
    theirs.load_state_dict(ours.state_dict())
    batch = {"state": torch.randn(4, 2, 3), "actions": torch.rand(4, 16, 2),
             "action_mask": torch.ones(4, 16, dtype=torch.bool)}
    noise, t = torch.randn(4, 16, 2), torch.tensor([3, 20, 50, 90])
    loss = lambda model: lambda: model.loss(batch, noise, t)["loss"]
    pair = work.pair_of_steps(theirs, loss(theirs), ours, loss(ours), lr=1e-3, weight_decay=0.01)
    losses = [(pair.theirs(), pair.ours()) for _ in range(4)]
    assert losses[-1][0] < 0.9 * losses[0][0]
    for one, other in losses:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    before = ours.unet.final_out.weight.detach().clone()
    assert pair.bfloat16() is None and not torch.equal(before, ours.unet.final_out.weight)


def test_an_installed_module_is_not_replaced_and_another_is_empty(monkeypatch):
    work.empty("json", dumps=None)
    assert json.dumps
    for name in ("no_package_a", "no_package_a.part"):
        monkeypatch.setitem(sys.modules, name, None)        # removed again after the test
        del sys.modules[name]
    work.empty("no_package_a.part", answer=42)
    from no_package_a.part import answer
    assert answer == 42


def test_a_checkout_is_on_the_path_while_it_is_imported_only(tmp_path, monkeypatch):
    (tmp_path / "peer_of_test.py").write_text("import peer_of_test_2\n")
    (tmp_path / "peer_of_test_2.py").write_text("answer = 42\n")
    path = list(sys.path)
    assert work.imported("peer_of_test", tmp_path).peer_of_test_2.answer == 42
    (tmp_path / "peer_broken.py").write_text("1 +\n")
    with pytest.raises(UserError, match="peer_broken cannot be imported here"):
        work.imported("peer_broken", tmp_path)
    assert sys.path == path
    for name in ("peer_of_test", "peer_of_test_2"):
        del sys.modules[name]


@pytest.mark.parametrize("spec, named", [
    ("lerobo", "did you mean 'lerobot'"), ("dit={}", "holds no models.py: git clone https://github.com"),
    ("rdt=", "holds no models/rdt_runner.py"),
    ("diffusion_policy", "no such package is installed: git clone"),
    ("dit", "no such package is installed: git clone")])        # dit.py and rdt.py of this project are none
def test_a_mistake_is_one_line(spec, named, tmp_path, capsys):
    refused(capsys, lambda: compare(spec.format(tmp_path / "empty"), out=tmp_path), named)


def test_nothing_to_compare_is_one_line(tmp_path, peers, capsys):
    refused(capsys, lambda: compare(f"absent={tmp_path}", out=tmp_path), "no_such_package_here")
    assert not (tmp_path / "against.jsonl").exists()


@pytest.mark.parametrize("name", against.PEERS)
def test_the_numbers_of_a_peer(name):
    folder = Path(os.environ.get("PEERS", "no folder")) / name
    if not folder.exists():
        pytest.skip(f"PEERS holds no folder {name}, a checkout of it")
    module = against.found(f"{name}={folder}")[1]
    for its in module.works(folder):
        if "training" not in its.name and "XL" not in its.name and "100" not in its.name:
            try:
                pair = its.build()
            except UserError as e:
                pytest.skip(str(e))
            theirs, ours = pair.theirs(), pair.ours()
            if pair.compare:
                torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=1e-3)
