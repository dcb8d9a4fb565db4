"""compare.py: runs side by side face the same states."""
import json
import re
import types

import numpy as np
import pytest
import torch
from helpers import Recorder, command, refused, scaled, write_demos

from tools import compare
import sample
from robot import tabletop
import train
from robot.checkpoint import load_model, read_checkpoint
from robot.normalizer import Normalizer
from robot.policy import Policy
from robot.rollout import EVALUATION_SEEDS, closed_loop, wilson
from tools.quality import compare_samples

SMALL = ["--steps", "3", "--batch_size", "8", "--eval_every", "0", "--episodes", "1", "--device", "cpu",
         "--demos", "6"]
CNN = ["--model", "dp_cnn", "--set", "down_dims=[16, 32]", "--set", "step_embed_dim=16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder} of a policy that sees numbers, one that sees pictures and reads, and point models."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        argv = {"numbers": CNN, "pictures": ["--model", "pi0", "--set", "depth=1", "--set", "vit_depth=1"],
                "ddpm": ["--model", "ddpm", "--demos", "200"],
                "flow": ["--model", "flow_matching", "--demos", "200"],
                "spirals": ["--model", "flow_matching", "--demos", "200", "--data", "spirals"]}
        for name, words in argv.items():
            train.main([*SMALL, *words, "--out", str(folder / name)])
    return {name: folder / name for name in argv}


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# -- side by side --------------------------------------------------------------------------------------------


def test_policies_side_by_side(runs, tmp_path, capsys):
    argv = [str(runs["numbers"]), str(runs["pictures"]), "--episodes", "3", "--seed", "2"]
    tables = compare.main([*argv, "--out", str(tmp_path / "both")])
    (title, rows), = tables.items()
    assert title == "Policies in tabletop" and [row["run"] for row in rows] == ["numbers", "pictures"]
    printed = capsys.readouterr().out
    for row, name in zip(rows, ("numbers", "pictures")):
        alone = closed_loop(Policy.load(runs[name], seed=2), "tabletop", 3, seed=2)
        assert row["success"] == f"{round(3 * alone['success'])} of 3"
        low, high = (100 * share for share in wilson(round(3 * alone["success"]), 3))
        assert row["95 % interval"] == f"{low:.1f} to {high:.1f} %"
        assert 0 < float(row["p50 ms"]) <= float(row["p95 ms"])
        weights = read_checkpoint(runs[name])["ema"]
        assert int(row["parameters"].replace(",", "")) == sum(w.numel() for w in weights.values())
        assert "| " + " | ".join(row.values()) + " |" in printed
    assert json.loads((tmp_path / "both" / "compare.json").read_text()) == tables

    data = page_data(tmp_path / "both" / "report.html")
    first, second = data["chunks"]
    assert [first["name"], second["name"]] == ["numbers", "pictures"]
    assert first["image"] == second["image"] and first["view"] == second["view"]
    assert first["trace"]["shape"][1] == second["trace"]["shape"][1] == 32
    scenes = [(r["scene"].split(":")[0], r["name"]) for r in data["rollouts"]]
    assert scenes == [(f"seed {EVALUATION_SEEDS + 2000 + i}", name) for i in range(3)
                      for name in ("numbers", "pictures")]


class Moving(Recorder):
    """Acts at random around the middle of the table; keeps what it is given."""

    def sample(self, batch, steps=None, generator=None):
        super().sample(batch)
        return torch.randn(len(batch["state"]), 8, 3, generator=generator) / 4 + 1


@pytest.mark.parametrize("first_action", [-1, 0])
def test_policies_of_different_eyes_see_the_same_state(first_action):
    """Numbers, twice; pictures, once: at the shared moment both histories are of one state of the table."""
    normalizer = scaled(3, 16)
    lowdim = {"state_keys": {"goal": 4, "object": 9, "robot0_eef_pos": 2, "robot0_gripper_qpos": 1},
              "camera_keys": [], "image_size": None, "fps": 10.0}
    image = lowdim | {"state_keys": {"robot0_eef_pos": 2}, "camera_keys": ["agentview_image"],
                      "image_size": [32, 32]}
    policies = [Policy(Moving(2, first_action, 4), normalizer, lowdim),
                Policy(Moving(1, 0, 3), scaled(3, 2), image)]
    args = types.SimpleNamespace(seed=1, instruction=None)
    frame = compare.shared_moment(policies, ["tabletop", "tabletop"], args, n=3, looks=2)
    numbers, pictures = (policy.history for policy in policies)
    assert len(numbers) == 2 and len(pictures) == 1
    raw = (numbers[-1]["state"] - 1) * 2
    parts = dict(zip(lowdim["state_keys"], raw.split(list(lowdim["state_keys"].values()), dim=1)))
    assert torch.allclose(parts["robot0_eef_pos"], (pictures[-1]["state"] - 1) * 2, atol=1e-6)
    state = {key: value.numpy() for key, value in parts.items()}
    seen = lambda size: tabletop.render(state, size)["agentview_image"][0]
    assert np.array_equal(seen(32), pictures[-1]["images"][0, 0].numpy())
    assert np.array_equal(seen(96), frame)
    assert all(not policy.queue for policy in policies)


def test_the_shared_moment_is_where_chunks_differ_most():
    class Undecided(Recorder):
        """Sure of itself in every episode but the one whose goal is 2."""

        def sample(self, batch, steps=None, generator=None):
            undecided = (batch["state"][:, -1, 1] > 1.9).float()[:, None, None]
            noise = torch.randn(len(batch["state"]), 8, 2, generator=generator)
            return 1 + undecided * noise

    class World:
        max_steps = 9

        def __init__(self, *args):
            pass

        def reset(self, seeds):
            self.t, self.n = 0, len(seeds)
            return self.observe(), {}

        def observe(self):
            return {"a": np.full((self.n, 1), float(self.t)), "b": np.arange(self.n)[:, None] * 1.0}

        def step(self, action):
            self.t += 1
            return self.observe(), np.zeros(self.n), np.zeros(self.n, bool), {}

        def glance(self, i, obs):
            return i

        def film(self, glances):
            return glances

    description = {"state_keys": {"a": 1, "b": 1}, "camera_keys": [], "image_size": None, "fps": 10.0}
    normalizer = Normalizer("minmax", *({"actions": torch.full((2,), v), "state": torch.full((2,), v)}
                                             for v in (1.0, 0.0)), {}, {})
    policy = Policy(Undecided(1, 0, 2), normalizer, description)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "make_episodes", World)
        args = types.SimpleNamespace(seed=0, instruction=None)
        assert compare.shared_moment([policy], [{"id": "World"}], args, n=3) == 2
    assert policy.history[-1]["state"][0, 1] == 2


def test_what_cannot_be_compared_stands_in_a_group_of_its_own(runs, tmp_path, capsys):
    chosen = [str(runs[name]) for name in ("ddpm", "numbers", "flow", "spirals")]
    tables = compare.main([*chosen, "--episodes", "1", "--out", str(tmp_path)])
    assert {title: [row["run"] for row in rows] for title, rows in tables.items()} == {
        "Samples of moons (2,)": ["ddpm", "flow"], "Policies in tabletop": ["numbers"],
        "Samples of spirals (2,)": ["spirals"]}
    assert "3 groups" in capsys.readouterr().out
    shown = page_data(tmp_path / "report.html")
    assert [s["name"] for s in shown["samples"]] == ["ddpm", "flow", "spirals"] and len(shown["chunks"]) == 1
    model, checkpoint = load_model(runs["flow"])
    alone = compare_samples(model, sample.held_out_samples(checkpoint), 0)
    assert tables["Samples of moons (2,)"][1]["distance"] == f"{alone['distance']:.4f}"


def test_one_line_for_what_is_wrong(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_demos(tmp_path / "demos.hdf5")
    train.main(command(folder, tmp_path / "own", steps=2, eval_every=0))
    numbers = str(runs["numbers"])
    wrong = {("own",): "no environment", ("nothing",): "nothing",
             ("--instruction", "9", "--episodes", "1"): "0..3"}
    for more, named in wrong.items():
        refused(capsys, lambda: compare.main([numbers, *more]), named)
    refused(capsys, lambda: sample.main([numbers, "own"]), "python -m tools.compare")
    assert not (tmp_path / "out").exists()


def test_names():
    assert compare.unique_names(["out/a", "out/b/checkpoint.pt"]) == ["a", "b"]
    assert compare.unique_names(["x/a", "y/a", "out/b"]) == ["x/a", "y/a", "b"]
    assert compare.unique_names(["a", "a"]) == ["a (1)", "a (2)"]
