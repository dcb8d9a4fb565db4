"""tools/delays.py: what a row measures, and rows that outlive a kill."""
import json
import types

import numpy as np
import pytest
from helpers import refused

from robot.errors import UserError
from robot.realtime import STRATEGIES
from tools import delays


class Glides:
    """A policy whose k-th chunk leads every gripper to the right, and up by `jump` from its own start on."""
    description = {"camera_keys": [], "image_size": None, "fps": 10.0, "action_dim": 3,
                   "state_keys": {"robot0_eef_pos": 2}}

    def __init__(self, jump=0.0):
        config = types.SimpleNamespace(n_obs_steps=1, first_action=0, n_action_steps=4)
        self.model, self.jump, self.chunks = types.SimpleNamespace(config=config), jump, 0

    def reset(self):
        pass

    def observe(self, observation):
        self.history.append(observation)

    def sample_chunk(self, plan=None):
        place = self.history[-1]["robot0_eef_pos"].astype(float)        # (n, 2)
        ahead = 0.005 * np.arange(1, 9)[:, None] * [1.0, 0.0] + [0, self.jump * self.chunks]
        self.chunks += 1
        chunk = place[:, None] + ahead
        return np.concatenate([chunk, -np.ones((len(place), 8, 1))], -1).astype(np.float32)


def test_of_a_straight_way_without_delay_the_jerk_is_zero_and_borders_are_not_seen():
    row = delays.play(Glides(), "naive", 0, 4, 3, 0)
    assert row["success"] == 0 and row["timeouts"] == 3 and row["steps"] is None and row["held"] == 0
    assert row["jump"] == pytest.approx(0.005, abs=1e-4) and row["change"] == pytest.approx(0.005, abs=1e-4)
    assert row["interval"] == [0.0, pytest.approx(0.5615, abs=1e-4)] and row["jerk"] < 0.5


def test_a_jump_at_the_border_is_measured_there_and_as_jerk():
    """The k-th chunk lies lower by 0.001 k than where the gripper is. A step of height h has the third
    differences h, -2 h and h, of which there are 78 in 80 steps."""
    smooth, rough = (delays.play(Glides(jump), "naive", 0, 4, 2, 0) for jump in (0.0, -0.001))
    assert rough["change"] == pytest.approx(0.005, abs=1e-4) and rough["jump"] > 2 * smooth["jump"]
    assert rough["jerk"] == pytest.approx(10 ** 3 * 4 * 0.001 * sum(range(1, 20)) / 78, abs=0.05)


def test_wait_stands_still_for_its_delay():
    row = delays.play(Glides(), "wait", 4, 4, 2, 0)
    assert row["held"] == pytest.approx(0.5, abs=0.03)


def test_standing_still_is_the_present_place_with_the_fingers_as_they_were():
    obs = {"robot0_eef_pos": np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)}
    assert delays.stand_still(obs, None).tolist() == [[*row, -1] for row in obs["robot0_eef_pos"].tolist()]
    last = np.array([[9, 9, 1], [9, 9, -1]], np.float32)
    assert delays.stand_still(obs, last)[:, 2].tolist() == [1, -1]


@pytest.fixture
def played(monkeypatch):
    """The rows that were computed, not read."""
    found = []

    def play(policy, strategy, delay, every, episodes, seed):
        found.append((strategy, delay, every))
        return {"success": 0.5, "interval": [0.25, 0.75], "timeouts": 1, "steps": None, "jerk": 1.25,
                "jump": 0.5 if delay else None, "change": 0.0625, "held": 0.0}
    config = types.SimpleNamespace(n_action_steps=8)
    policy = types.SimpleNamespace(model=types.SimpleNamespace(config=config))
    monkeypatch.setattr(delays, "open_policy", lambda run, args: (policy, 7))
    monkeypatch.setattr(delays, "play", play)
    return found


def test_rows_are_kept_and_a_killed_run_goes_on(played, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    argv = ["out/a", "--delays", "0", "4", "--strategies", "naive", "wait", "--every", "3", "--out", str(out)]
    delays.main(argv[:3] + argv[4:])            # delay 0 alone
    assert played == [("naive", 0, 3), ("wait", 0, 8)]
    with open(out, "a") as file:
        file.write('{"run": "out/a", "st')      # killed while it wrote
    capsys.readouterr()
    rows = delays.main(argv)
    assert played[2:] == [("naive", 4, 3), ("wait", 4, 8)] and len(rows) == 4
    assert [json.loads(line)["delay"] for line in out.read_text().splitlines()] == [0, 0, 4, 4]
    said = capsys.readouterr()
    assert "half a line at its end is dropped" in said.err
    assert said.out.splitlines() == [
        "| policy | strategy | success in % at a delay of 0 | 4 |", "|---|---|---|---|",
        "| a | naive, every 3 | 50 [25, 75] | 50 [25, 75] |",
        "| a | wait, every 8 | 50 [25, 75] | 50 [25, 75] |", "",
        "| policy | strategy | jerk / jump at a delay of 0 | 4 |", "|---|---|---|---|",
        "| a | naive, every 3 | 1 /  | 1 / 0.50 |", "| a | wait, every 8 | 1 /  | 1 / 0.50 |", ""]
    delays.main(argv)
    assert len(played) == 4                     # nothing is computed twice
    delays.main([*argv, "--episodes", "9"])
    assert len(played) == 8                     # ... but what was asked differently


def test_a_foreign_file_is_left_alone(played, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("my notes\nsecond line\n")
    with pytest.raises(UserError, match="notes.txt: line 1 is no row of this command: give another --out"):
        delays.main(["out/a", "--out", str(out)])
    assert out.read_text() == "my notes\nsecond line\n" and not played


@pytest.mark.parametrize("argv, named", [
    (["x", "--strategies", "naiv"], "--strategies naiv: there is no such one, did you mean 'naive'"),
    (["x", "--delays", "-1"], "--delays -1 must be from 0 to 1000"),
    (["nowhere"], "there is no nowhere"), ([], "run")])
def test_mistakes_are_one_line(argv, named, capsys):
    refused(capsys, lambda: delays.main(argv), named)


def test_a_policy_of_another_task_is_refused(tiny, capsys):
    refused(capsys, lambda: delays.main([str(tiny)]), "was not trained on the built-in task (tabletop) but")
    assert list(STRATEGIES) == ["wait", "naive", "ensembling", "rtc"]
