"""budget.py: every model gets the same minutes, rollouts and episodes, and what is done is not done again."""
import json
from xml.etree import ElementTree

import pytest
from helpers import refused

import dp_cnn
import train
from robot.checkpoint import read_checkpoint
from robot.rollout import wilson
from test_compare import CNN, SMALL
from tools import budget, compare
from tools.bars import LEFT, RIGHT, WIDTH, bars


@pytest.fixture
def tiny_budget(monkeypatch):
    """dp_cnn and the regression, tiny, on few demonstrations; a step takes what the test says."""
    real = budget.parse_options

    def parse_options(argv):
        return real([*argv, "--batch_size", "8", "--set", "down_dims=[16, 32]", "--set", "step_embed_dim=16"])
    monkeypatch.setattr(budget, "parse_options", parse_options)
    times = {"measured": 0, "seconds": 0.01}

    def step_seconds(options, module):
        times["measured"] += 1
        return times["seconds"]
    monkeypatch.setattr(budget, "step_seconds", step_seconds)
    return times


def test_budget(tiny_budget, tmp_path, monkeypatch, capsys):
    argv = ["--minutes", "0.001", "--only", "dp_cnn", "--only", "regression", "--seeds", "0", "1",
            "--episodes", "2", "--demos", "6", "--out", str(tmp_path / "out"), "--device", "cpu"]
    first = compare.main([*argv, "--seeds", "0"])["tabletop"]
    tiny_budget["seconds"] = 0.02                                   # the machine is busy now
    rows = compare.main(argv)["tabletop"]
    assert [row["model"] for row in rows] == ["dp_cnn", "regression"]
    kept = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["seed"]) for row in kept] == [("dp_cnn", 0), ("regression", 0), ("dp_cnn", 1),
                                                            ("regression", 1)]
    assert all(row["steps"] == 6 for row in kept)                   # 60 ms of steps of 10 ms
    for row in rows:
        mine = [k for k in kept if k["name"] == row["model"]]
        assert row["success"] == f"{round(sum(2 * k['success'] for k in mine))} of 4" and row["steps"] == "6"
        assert row["sees"] == "numbers"
    assert tiny_budget["measured"] == 2                             # once for each model
    assert [row["minutes"] for row in rows] == ["0.0"] * 2 and all(k["step_seconds"] == 0.01 for k in kept)
    assert compare.main(argv) == {"tabletop": rows}                 # nothing is done again
    assert compare.main([*argv, "--seeds", "0"])["tabletop"] == first != rows
    one = read_checkpoint(tmp_path / "out" / "tabletop_tiny_0.001min_dp_cnn_seed0")
    other = read_checkpoint(tmp_path / "out" / "tabletop_tiny_0.001min_regression_seed0")
    assert one["data"] == other["data"] and one["options"]["demos"] == 6    # the same demonstrations
    assert "| dp_cnn | numbers |" in capsys.readouterr().out


def test_an_interrupted_budget_goes_on(tiny_budget, tmp_path, monkeypatch):
    argv = ["--minutes", "0.001", "--only", "dp_cnn", "--seeds", "0", "--episodes", "1", "--demos", "6",
            "--out", str(tmp_path / "out"), "--device", "cpu"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def stop(*args):
            raise KeyboardInterrupt
        patch.setattr(train, "write_json", stop)                   # trained, not yet evaluated
        compare.main(argv)
    tiny_budget["seconds"] = 0.001                                  # another time of a step, the same run
    row, = compare.main(argv)["tabletop"]
    assert row["steps"] == "6" and tiny_budget["measured"] == 1


def test_time_of_a_step(tmp_path):
    options, explicit = train.parse_options([*CNN, *SMALL])
    assert 1e-4 < budget.step_seconds(options, dp_cnn) < 5


@pytest.mark.parametrize("argv, named", [
    (["--only", "pi1"], "dp_transformer"), (["--minutes", "0"], "--minutes 0"),
    (["--task", "pushed"], "pusht"), (["--minute", "1"], "did you mean 'minutes'")])
def test_wrong_flags(argv, named, capsys, tmp_path):
    refused(capsys, lambda: compare.main([*argv, "--out", str(tmp_path)]), named)


def stand_in(monkeypatch):
    """Nothing is trained: all five episodes of dp_cnn succeed, of the regression two. -> what was asked"""
    trained = []

    def train_one(name, seed, folder, args, times):
        trained.append((name, seed))
        n = 5 if name == "dp_cnn" else 2
        return {"steps": 1200, "step_seconds": 0.1, "sees": "numbers", "parameters": 1, "success": n / 5,
                "score": 1.0, "outcomes": {"success": n, "failure": 5 - n}, "action_error": 0.0,
                "latency_ms": 1.0}
    monkeypatch.setattr(budget, "train_one", train_one)
    return trained


def test_meta_world_beside_its_expert_and_as_a_picture(tmp_path, monkeypatch):
    """In every scene the expert is asked once; the picture has what the table has."""
    pytest.importorskip("metaworld", reason="package metaworld is an extra")
    trained, demos = stand_in(monkeypatch), []
    monkeypatch.setattr(budget.metaworld, "generate",
                        lambda tasks, n, path: demos.append((tasks, n)) or open(path, "w").close())
    argv = ["--task", "metaworld", "--tasks", "reach", "drawer-close-v3", "--only", "dp_cnn", "--only",
            "regression", "--seeds", "0", "1", "--episodes", "5", "--out", str(tmp_path)]
    tables = compare.main(argv)
    assert demos == [(["drawer-close-v3"], 100), (["reach-v3"], 100)] and len(trained) == 8
    for task in ("drawer-close-v3", "reach-v3"):
        assert [(row["model"], row["success"]) for row in tables[task]] == [
            ("dp_cnn", "10 of 10"), ("regression", "4 of 10"), ("expert", "10 of 10")]
        assert tables[task][0]["minutes"] == "2.0"
    assert "steps" not in tables["reach-v3"][2]
    monkeypatch.setattr(budget, "expert_one", None)
    assert compare.main(argv) == tables and len(trained) == 8 and len(demos) == 2   # nothing is done again
    root = ElementTree.parse(tmp_path / "bars.svg").getroot()
    assert root.find("{*}desc").text.startswith(
        "drawer-close-v3: dp_cnn 10 of 10; drawer-close-v3: regression 4 of 10; reach-v3: dp_cnn")


def test_bars():
    """Each bar is as long as the success, its line as long as Wilson's interval."""
    root = ElementTree.fromstring(bars({"a < b": {"one": (0, 50), "two": (40, 50), "expert": (25, 50)},
                                        "c": {"two": (50, 50)}}))
    scale = (WIDTH - LEFT - RIGHT) / 100
    found = [float(rect.get("width")) for rect in root.findall("{*}rect") if rect.get("x") == str(LEFT)]
    assert found == pytest.approx([0, 80 * scale, 100 * scale], abs=0.1)
    intervals = [path.get("d") for path in root.findall("{*}path") if path.get("class") == "interval"]
    low, high = (LEFT + 100 * scale * share for share in wilson(40, 50))
    assert intervals[1].startswith(f"M{low:.1f} ") and f"H{high:.1f}M" in intervals[1]
    expert, = [path for path in root.findall("{*}path") if path.get("class") == "expert"
               and float(path.get("d")[1:].split()[0]) >= LEFT and "V" in path.get("d")]
    assert float(expert.get("d")[1:].split()[0]) == pytest.approx(LEFT + 50 * scale, abs=0.1)
    assert [text.text for text in root.findall("{*}text") if text.get("class") == "name"] == ["a < b", "c"]


def test_a_comparison_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path, monkeypatch, capsys):
    trained = stand_in(monkeypatch)
    argv = ["--only", "dp_cnn", "--only", "regression", "--episodes", "5", "--out", str(tmp_path)]
    compare.main([*argv, "--seeds", "0"])
    whole = (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    (tmp_path / "results.jsonl").write_text(whole[:-30], encoding="utf-8")
    compare.main([*argv, "--seeds", "0", "1"])
    assert trained == [("dp_cnn", 0), ("regression", 0), ("regression", 0), ("dp_cnn", 1), ("regression", 1)]
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["name"], row["seed"]) for row in rows] == [trained[0], *trained[2:]]


@pytest.mark.parametrize("argv, named", [
    (["--minutes", "nan"], ["--minutes nan"]), (["--minutes", "inf"], ["--minutes inf"]),
    (["--minutes", "0"], ["--minutes 0"]), (["--seeds", "-1"], ["--seeds -1"]),
    (["--demos", "0"], ["--demos 0"]), (["--episodes", "0"], ["--episodes 0"]),
    (["--seed", "99999999999"], ["--seed 99999999999"])])
def test_numbers_no_comparison_can_use(argv, named, capsys):
    refused(capsys, lambda: compare.main(argv), *named)
