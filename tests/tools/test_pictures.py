"""pictures.py: what the report shows of a model is what the data and the sampler hold."""
import json
import re
import types

import h5py
import numpy as np
import torch
from helpers import command, write_demos

import data
import train
from demos.dataset import open_demos
from demos.mixed import MixedDemos
from robot import tabletop
from tools.pictures import pictures


class Guesser:
    """Chunks of noise that end at what the config says; undecided where the last state is `undecided`."""

    def __init__(self, horizon, first_action, n_obs_steps=1, n_action_steps=3, undecided=None, **more):
        self.config = types.SimpleNamespace(first_action=first_action, n_obs_steps=n_obs_steps,
                                            n_action_steps=n_action_steps, **({"action_dim": 3} | more))
        self.horizon, self.undecided = horizon, undecided

    def sample(self, batch, generator=None, trace=None):
        B, _, A = batch["actions"].shape
        noise = torch.randn(B, self.horizon, A, generator=generator)
        sure = torch.ones(B) if self.undecided is None else (
            (batch["state"][:, -1] - self.undecided).norm(dim=1) > 1e-6).float()
        states = [noise, noise * (1 - 0.9 * sure[:, None, None])]
        if trace is not None:
            trace.extend(states)
        return states[-1]


def arm(tmp_path, cameras=("cam_low", "cam_high")):
    """Two episodes of five joints. In step t of episode e, joint d acts e + t / 100 + d / 1000 and camera v
    shows the grey 100 v + 10 e + t."""
    with h5py.File(tmp_path / "arm.hdf5", "w") as file:
        names = json.dumps([f"joint_{d}" for d in range(5)])
        file.create_group("data").attrs.update(fps=25.0, language_instruction="lift the cup",
                                               action_names=names)
        for e in range(2):
            time = np.arange(9)
            group = file.create_group(f"data/demo_{e}")
            group["actions"] = np.float32(e + time[:, None] / 100 + np.arange(5) / 1000)
            group["obs/qpos"] = group["actions"][:] + 0.5
            for v, name in enumerate(cameras):
                grey = np.uint8(100 * v + 10 * e + time)
                group[f"obs/{name}"] = np.broadcast_to(grey[:, None, None, None], (9, 6, 8, 3))
    return open_demos(str(tmp_path / "arm.hdf5"), "image" if cameras else "lowdim", text=True, val_ratio=0.5)


def windows_of(demos, horizon, first_action, normalizer, split="train"):
    return data.Windows(demos, normalizer, horizon, 1, first_action, split=split, device="cpu")


def test_an_arm_over_time_with_what_was_demonstrated(tmp_path):
    """The observation where the chunks differ most, its cameras, its demonstration, in the data's units."""
    demos = arm(tmp_path)
    normalizer = data.fit_normalizer(demos)
    windows = windows_of(demos, 6, -1, normalizer)
    step = 6  # of nine: the last three of the six actions lie past the end
    model = Guesser(6, -1, action_dim=5, undecided=windows.state[step].clone())
    chosen = pictures(model, windows, normalizer, demos.description(), 3, n=32)["chunks"]
    episode = int(demos.train_episodes[0])
    assert chosen["trace"].shape == (2, 32, 6, 5) and chosen["labels"] == ["step 1", "step 2"]
    assert chosen["xy"] is None and "extent" not in chosen and chosen["hz"] == 25.0
    assert chosen["executed"] == (1, 4) and chosen["instruction"] == "lift the cup"
    assert chosen["names"] == [f"joint_{d}" for d in range(5)] and chosen["units"] == []
    want = episode + np.arange(step - 1, step + 5)[:, None] / 100 + np.arange(5) / 1000
    np.testing.assert_allclose(chosen["demonstrated"][:4], want[:4], atol=1e-5)
    assert np.isnan(chosen["demonstrated"][4:]).all()
    assert {name: np.unique(x).tolist() for name, x in chosen["cameras"].items()} == {
        "cam_high": [100 + 10 * episode + step], "cam_low": [10 * episode + step]}
    assert all(x.shape == (6, 8, 3) for x in chosen["cameras"].values())


def test_the_tabletop_is_seen_from_above(tmp_path):
    demos = open_demos("tabletop", episodes=3, cache=tmp_path)
    normalizer = data.fit_normalizer(demos)
    chosen = pictures(Guesser(4, 0), windows_of(demos, 4, 0, normalizer), normalizer, demos.description(), 0)
    chunks = chosen["chunks"]
    assert chunks["xy"] == (0, 1) and chunks["extent"] == (-1, 1, -1, 1) and chunks["cameras"] == {}
    assert chunks["names"] == list(tabletop.ACTION_NAMES) and chunks["units"][0] == "table units"
    assert chunks["observation"].shape == (96, 96, 3) and chunks["observation"].std() > 10


def test_places_are_drawn_on_a_plane_and_everything_else_over_time(tmp_path):
    """Two dimensions of an environment are a place, as Push-T's are; of a file that none is named for, and
    of the robot whose actions are velocities, nobody knows."""
    demos = open_demos(str(write_demos(tmp_path / "points.hdf5")))
    normalizer = data.fit_normalizer(demos)
    windows, description = windows_of(demos, 4, 0, normalizer), demos.description()
    shown = lambda environments: pictures(Guesser(4, 0, action_dim=2), windows, normalizer, description, 0,
                                          environments)
    assert shown({None: {"id": "gym_pusht/PushT-v0"}})["chunks"]["xy"] == (0, 1)
    assert shown({})["chunks"]["xy"] is None

    class Batches:  # a set that knows of no episodes
        batch = staticmethod(windows.batch)

        def __len__(self):
            return 20

    chunks = pictures(Guesser(4, 0, action_dim=2), Batches(), normalizer, {"source": "given"}, 0)["chunks"]
    assert chunks["names"] == [] and chunks["instruction"] == "" and chunks["trace"].shape[-1] == 2
    fast = open_demos("tabletop_velocity", episodes=3, cache=tmp_path)
    normalizer = data.fit_normalizer(fast)
    chunks = pictures(Guesser(4, 0), windows_of(fast, 4, 0, normalizer), normalizer, fast.description(), 0,
                      {None: "tabletop_velocity"})["chunks"]
    assert chunks["xy"] is None and chunks["units"][0] == "table units / s" and chunks["hz"] == 5.0


def test_of_several_robots_the_body_and_its_order_are_shown(tmp_path):
    """In the shared vector the gripper stands before the place; in the robot's own order it is last."""
    table = open_demos("tabletop", episodes=3, cache=tmp_path)
    places = ([30, 31, 10], list(range(table.state_dim)))
    demos = MixedDemos({"table": (table, *places)})
    normalizer = data.fit_normalizer(demos)
    windows = windows_of(demos, 4, 0, normalizer)
    chunks = pictures(Guesser(4, 0, action_names=()), windows, normalizer, demos.description(), 0,
                      {"table": "tabletop"})["chunks"]
    assert chunks["trace"].shape[-1] == 3 and chunks["names"] == list(tabletop.ACTION_NAMES)
    rows = table.actions[table.rows(table.train_episodes)]
    shown = chunks["demonstrated"][0]
    assert np.isclose(rows, shown, atol=1e-5).all(1).any()  # a row of the data, in its order


def test_the_report_of_a_run_names_its_data_and_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python3", "train.py", "--steps", "2"])
    demos = write_demos(tmp_path / "six points.hdf5", action_dim=4)
    result = train.main(command(demos, tmp_path / "out", steps=2, eval_every=0))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Data"].startswith(f"{demos}: 6 episodes, 99 steps")
    assert facts["Command"] == "python train.py --steps 2"
    assert facts["Actions"] == "4 dimensions at 10 Hz, in the units of the data"
    heading = re.search("<h1>(.*?)</h1>", page)[1]
    assert f"Mean error of sampled actions: {result['action_error']:.3g}" in heading
    block = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert block["chunks"][0]["xy"] is None and len(block["chunks"][0]["ranges"]) == 4
    assert block["chunks"][0]["demonstrated"]["shape"] == [8, 4]


def test_samples_of_a_generative_model_stand_beside_the_data():
    class Points:
        shape = (2,)

        def __len__(self):
            return 600

        def batch(self, indices):
            return {"x": indices[:, None].repeat(1, 2).float()}

    seen = []

    def sample(batch, generator, trace):
        seen.append(batch)
        trace.extend([batch["x"] + 1, batch["x"]])
    shown = pictures(types.SimpleNamespace(sample=sample), Points(), None, {}, 0)["samples"]
    assert shown["trace"].shape == (2, 500, 2) and shown["data"].shape == (600, 2)
    assert shown["labels"] == ["step 1", "step 2"] and len(seen[0]["x"]) == 500
