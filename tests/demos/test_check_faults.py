"""demos/check.py, the doctor: a clean set has no finding, and every fault that is planted in it is named."""
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers import refused, write

from demos import check, doctor_cameras
from demos.doctor import at_least
from demos.findings import FINDINGS
from demos.generated import tabletop_file
from demos.motion import pairs_of

EPISODES, STEPS, HZ = 24, 60, 10
real = pytest.mark.skipif("DEMO_DATA" not in os.environ, reason="DEMO_DATA does not name the data sets")


def episode(e):
    """One of an arm whose joints follow their targets, in part, at every step; with two cameras that see
    them. The arrays of demo_e, which a fault may change."""
    rng = np.random.default_rng(e)
    time = np.arange(STEPS + e % 5)[:, None] / HZ
    speed, phase = rng.uniform(0.9, 1.1, 3), rng.uniform(0, 0.3, 3)
    target = np.sin(2 * np.pi * 0.4 * speed * time + phase)
    joint = np.empty_like(target)
    joint[0] = target[0]
    for t in range(1, len(time)):                   # half of the way in every step: two steps behind
        joint[t] = joint[t - 1] + 0.5 * (target[t - 1] - joint[t - 1])
    return {"actions": target, "obs/joint": joint, "obs/front": scene(joint, 0), "obs/hand": scene(joint, 1),
            "timestamp": time[:, 0]}


def scene(joint, camera):
    """(T, 16, 24, 3): a ground that is bright at one corner, each camera its own, and a spot that moves."""
    y, x = np.mgrid[:16, :24]
    ground = np.stack([6 * x + 4 * y, 2 * x, 3 * y] if camera == 0 else [2 * y, 120 - 4 * x, 150 - 3 * x], -1)
    frames = np.repeat(ground[None] + 20, len(joint), 0)
    for t, place in enumerate(joint[:, 0]):
        at = int(10 + 9 * place)
        frames[t, 6:9, at:at + 3] = 250
    return frames.astype(np.uint8)


def arm(path, change=lambda e, demo: None, attrs=lambda e: {}, **said):
    """A set of this arm. change(e, demo) plants something in its arrays, attrs(e) adds attributes."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"fps": HZ} | said)
        for e in range(EPISODES):
            demo = episode(e)
            demo = change(e, demo) or demo
            group = data.create_group(f"demo_{e}")
            group.attrs.update({"language_instruction": "wave"} | attrs(e))
            for key, x in demo.items():
                group[key] = x if x.dtype == np.uint8 else x.astype(np.float64 if key == "timestamp" else
                                                                    np.float32)
        file["mask/train"] = np.array([f"demo_{e}".encode() for e in range(EPISODES - 4)])
        file["mask/valid"] = np.array([f"demo_{e}".encode() for e in range(EPISODES - 4, EPISODES)])
    return path


def found(path, **more):
    return [(f.name, f.level, f.line()) for f in check.examine(path, **more).findings]


def test_a_clean_set_has_no_finding(tmp_path, capsys):
    path = arm(tmp_path / "a.hdf5")
    assert found(path) == []
    check.main([str(path)])
    report = capsys.readouterr().out
    assert report.endswith("nothing looks wrong\n")
    assert "3 of 3 actions go with a state: actions[0] -> joint[0] after 2 (r 0." in report


# ---- one fault each: (name of the finding, its level, words of the line, what plants it)


def each(key, plant, episodes=None):
    """plant(x) -> x in an array of these episodes, or of all."""
    def change(e, demo):
        if episodes is None or e in episodes:
            demo[key] = plant(demo[key])
    return change


def column(key, d, plant, episodes=None):
    def put(x):
        x = x.copy()
        x[:, d] = plant(x[:, d])
        return x
    return each(key, put, episodes)


def cut(e, demo, rows):
    return {key: x[rows] for key, x in demo.items()}


def turning(turn):
    """A joint that turns on and on, written from 0 to one turn."""
    def change(e, demo):
        angle = 0.1 * turn * np.arange(len(demo["actions"])) + 0.01 * turn * e
        demo["obs/joint"] = np.column_stack([demo["obs/joint"], angle % turn])
    return change


def spike(x):
    x[7] = 200
    return x


def late(steps):
    """The actions become the state of `steps` before."""
    def change(e, demo):
        joint = demo["obs/joint"]
        demo["actions"] = np.concatenate([joint[:1]] * steps + [joint])[:len(joint)]
    return change


def slow(e, demo):
    target = demo["actions"]
    demo["obs/joint"] = np.concatenate([target[:1]] * 7 + [target])[:len(target)]


def waits(e, demo):
    if e % 3 == 0:
        return {key: np.concatenate([x[:1]] * 8 + [x]) if key != "timestamp" else np.arange(len(x) + 8) / HZ
                for key, x in demo.items()}


def copied(e, demo):
    return episode(3) if e in (9, 22) else None


def exchanged(e, demo):
    if e in (4, 11):
        demo["obs/front"], demo["obs/hand"] = demo["obs/hand"], demo["obs/front"]


def beginning(e, demo):
    if e == 6:
        demo["obs/joint"] = demo["obs/joint"].copy()
        demo["obs/joint"][:3, 1] = -3.0


FAULTS = {
    "constant": ("constant dimension", "note", "'joint' is constant in dimension 1",
                 column("obs/joint", 1, lambda x: 0 * x + 2)),
    "near-constant": ("near-constant dimension", "fault", "'joint' is near-constant (within 0.0001) in "
                      "dimension 2",
                      column("obs/joint", 2, lambda x: 2e-5 * x)),
    "spikes": ("spikes", "fault", "'joint' has 98 % of its values within 2% of its range in dimension 0",
               column("obs/joint", 0, spike, [5])),
    "idle": ("idle start", "fault", "33% of the episodes do not move in their first 5 steps", waits),
    "radians": ("angle wrap", "note", "'joint' leaps by about 6.283 (2 pi) in dimension 3, ",
                turning(2 * np.pi)),
    "degrees": ("angle wrap", "note", "'joint' leaps by about 360 (degrees) in dimension 3, ", turning(360)),
    "same step": ("late action", "fault", "actions repeat the state of the same step: actions[0] -> joint[0]",
                  late(0)),
    "before": ("late action", "fault", "actions repeat the state of 2 steps before: actions[0] -> joint[0]",
               late(2)),
    "duplicates": ("duplicate episodes", "fault", "2 repeat another number by number, such as demo_3, "
                   "demo_9, demo_22, 1 across the split", copied),
    "gap": ("dropped frames", "fault", "1 gaps in the time stamps of 1 of 24 episodes: demo_8",
            lambda e, demo: cut(e, demo, np.delete(np.arange(60), 30)) if e == 8 else None),
    "backwards": ("dropped frames", "fault", "time stands still or runs backwards in 1 of 24 episodes: "
                  "demo_2",
                  each("timestamp", lambda x: np.where(np.arange(len(x)) == 9, x[8], x), [2])),
    "mixed stamps": ("mixed rates", "fault", "time stamps are 2 times as far apart, or as close, in 2 of 24 "
                     "episodes: demo_1, demo_3", each("timestamp", lambda x: 2 * x, [1, 3])),
    "wrong rate": ("mixed rates", "fault", "'fps' says 10 Hz, the time stamps (in ms) 15 Hz",
                   each("timestamp", lambda x: 1000 * x * HZ / 15)),
    "length": ("outlier length", "fault", "1 of 24 episodes: demo_7 (17 steps, the median is 62)",
               lambda e, demo: cut(e, demo, slice(17)) if e == 7 else None),
    "speed": ("outlier speed", "fault", "1 of 24 episodes: demo_5 (",
              each("obs/joint", lambda x: x / 5, [5])),
    "start": ("outlier start", "fault", "1 of 24 episodes begin ", beginning),
    "black": ("black camera", "fault", "'hand' shows nothing brighter than 16 in 2 of 24 episodes",
              each("obs/hand", lambda x: x // 30, [3, 4])),
    "one colour": ("black camera", "fault", "'front' shows a single colour in 1 of 24 episodes",
                   each("obs/front", lambda x: 0 * x + 90, [9])),
    "frozen": ("frozen camera", "fault", "'front' stands still while the robot moves, in 1 of 24 episodes, "
               "such as demo_10 from step ", each("obs/front", lambda x: np.concatenate(
                   [x[:20], np.repeat(x[20:21], len(x) - 20, 0)]), [10])),
    "swapped": ("swapped cameras", "fault", "'front' and 'hand' look like each other in 2 of 24 episodes: "
                "demo_4, demo_11", exchanged),
    "mirrored": ("changed camera", "fault", "'front' is mirrored in 1 of 24 episodes: demo_12",
                 each("obs/front", lambda x: x[:, :, ::-1], [12])),
    "turned": ("changed camera", "fault", "'hand' is upside down in 1 of 24 episodes: demo_13",
               each("obs/hand", lambda x: x[:, ::-1], [13])),
    "colours": ("changed camera", "fault", "'hand' is with red and blue exchanged in 1 of 24 episodes: "
                "demo_1",
                each("obs/hand", lambda x: x[..., ::-1], [1])),
    "clipped": ("clipped actions", "fault", "in dimension 1, in 4 of 4 held-out episodes",
                column("actions", 1, lambda x: 2 * x, range(20, 24))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named_and_nothing_else_is(fault, tmp_path):
    name, level, words, change = FAULTS[fault]
    seen = found(arm(tmp_path / "a.hdf5", change))
    line, = [line for n, at, line in seen if (n, at) == (name, level)]
    assert line.startswith(f"{name}: ") and words in line and len(line) <= 420, line
    does, mend = FINDINGS[name]
    assert does in line and line.endswith(mend)
    assert {n for n, _, _ in seen} == {name}, seen


def test_wraps_of_actions_are_no_mere_note(tmp_path):
    def change(e, demo):
        turning(360)(e, demo)
        demo["actions"] = np.column_stack([demo["actions"], demo["obs/joint"][:, 3]])
    assert ("angle wrap", "fault") in {(n, level) for n, level, _ in found(arm(tmp_path / "a.hdf5", change))}


@pytest.mark.parametrize("horizon, level", [(16, None), (64, "note"), (200, "fault")])
def test_padding_is_judged_at_the_horizon_asked_for(horizon, level, tmp_path):
    seen = [(n, at) for n, at, _ in found(arm(tmp_path / "a.hdf5"), horizon=horizon) if n == "padding"]
    assert seen == ([("padding", level)] if level else [])


def test_a_state_that_follows_beyond_a_chunk(tmp_path):
    path = arm(tmp_path / "a.hdf5", slow)
    assert found(path) == []
    (name, level, line), = found(path, horizon=6)
    assert (name, level) == ("slow state", "fault") and "actions[2] -> joint[2] after 7 steps" in line


def test_rates_and_instructions_that_differ(tmp_path):
    def no_stamps(e, demo):
        del demo["timestamp"]
    seen = found(arm(tmp_path / "a.hdf5", no_stamps, lambda e: {"fps": 20.0} if e == 3 else {}))
    assert [(n, at) for n, at, _ in seen] == [("mixed rates", "fault")]
    assert "episodes say 10, 20 Hz" in seen[0][2]
    said = {e: {"language_instruction": ""} for e in (2, 5)}
    seen = found(arm(tmp_path / "b.hdf5", attrs=lambda e: said.get(e, {})))
    assert [(n, at) for n, at, _ in seen] == [("missing instruction", "fault")]
    assert "2 of 24 episodes have no instruction" in seen[0][2]


def test_a_few_held_out_actions_beyond_the_others_are_chance(tmp_path):
    """One of four that reach beyond 20 others is no finding: at either end each has a chance of 1 in 21."""
    path = arm(tmp_path / "a.hdf5", column("actions", 1, lambda x: 2 * x, [21]))
    report = check.examine(path)
    assert report.findings == [] and 0.1 < report.facts["clipped"] < 0.3
    assert at_least(1, 4, 2 / 21) == pytest.approx(1 - (19 / 21)**4)
    assert at_least(1, 1, 1.0) == 1 and at_least(500, 5000, 0.01) < 1e-100 < at_least(50, 5000, 0.01)


def test_velocities_go_with_the_change_of_a_state():
    rng = np.random.default_rng(0)
    velocity = np.convolve(rng.normal(size=600), np.ones(8) / 8, "same")[:, None]
    place = 0.1 * (np.cumsum(velocity, 0) - velocity)           # at t: what has been done before t
    pair, = pairs_of(velocity, place, np.array([300, 300]), 10)
    assert (pair.state, pair.kind, pair.lag) == (0, "velocity", 1) and pair.r > 0.99


def test_what_has_no_state_or_hardly_a_step_goes_with_nothing():
    actions = np.random.default_rng(0).normal(size=(40, 2))
    assert pairs_of(actions, np.zeros((40, 0)), np.array([40]), 10) == []
    assert pairs_of(np.ones((4, 2)), np.ones((4, 2)), np.array([2, 2]), 10) == []


def test_no_correlation_crosses_from_one_episode_to_the_next():
    """The state of every episode is the action of the one before, at the same step."""
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(40, 30, 1)).cumsum(1)
    state = np.roll(actions, 1, axis=0)
    assert pairs_of(actions.reshape(-1, 1), state.reshape(-1, 1), np.full(40, 30), 30) == []


# ---- the command


def test_json_says_the_same(tmp_path, capsys):
    path = arm(tmp_path / "a.hdf5", FAULTS["mirrored"][3])
    check.main([str(path), "--json"])
    said = json.loads(capsys.readouterr().out)
    finding, = said["findings"]
    assert finding["name"] == "changed camera" and finding["episodes"] == ["a.hdf5:demo_12"]
    assert (finding["does"], finding["mend"]) == FINDINGS["changed camera"] and said["must_be_mended"] == []
    assert said["episodes"] == 24 and said["lag"][0] == {
        "action": 0, "state": ["joint", 0], "kind": "position", "steps": 2, "r": said["lag"][0]["r"]}
    assert said["keys"]["front"]["shape"] == [16, 24, 3] and said["keys"]["joint"]["becomes"] == "state"


def test_the_page_shows_every_dimension_and_camera(tmp_path):
    path = arm(tmp_path / "a <b>.hdf5", FAULTS["mirrored"][3])
    check.main([str(path), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 6 and page.count("class=one") == 6 * 4 and page.count("<img") == 2 * 6
    assert "actions[2]</b>" in page and "joint[0]</b>" in page and "24 of 24 episodes" in page
    assert "changed camera: &#x27;front&#x27; is mirrored in 1 of 24 episodes: demo_12" in page
    assert "a &lt;b&gt;.hdf5" in page and "<b>.hdf5" not in page
    assert "http" not in page and "<script" not in page
    lines = page.split("class=all d='")[1].split("'")[0].split("M")[1:]
    assert len(lines) == 24                                                 # one thin line an episode
    numbers = np.array(lines[0].split(), float).reshape(-1, 2)          # x in 0 .. 300, y in 0 .. 110, down
    target = episode(0)["actions"][:, 0]
    assert len(numbers) == 60 and abs(np.corrcoef(numbers[:, 1], target)[0, 1] + 1) < 1e-3


def test_pictures_are_sampled_where_there_are_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor_cameras, "PICTURES", 40)
    steps = doctor_cameras.sample(np.full(24, 60), 2)
    assert len(steps) == 10 and set(map(tuple, steps.values())) == {(0, 59)} and {0, 23} <= set(steps)
    check.main([str(arm(tmp_path / "a.hdf5"))])
    assert "pictures of 10 of 24 episodes are looked at" in capsys.readouterr().out


@pytest.mark.parametrize("argv, named", [(["--horizon", "0"], ["--horizon 0"]), (["--html"], ["--html"])])
def test_wrong_flags(argv, named, tmp_path, capsys):
    path = write(tmp_path / "a.hdf5")
    refused(capsys, lambda: check.main([str(path), *argv]), *named)


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    path = write(tmp_path / "a.hdf5")
    refused(capsys, lambda: check.main([str(path), "--html", str(path / "page.html")]), "cannot write")


@real
@pytest.mark.parametrize("name, notes", [
    ("g1_bottle_image", set()), ("g1_bottle_lowdim", set()),
    ("lift_scripted_lowdim", {"constant dimension", "rate"}), ("pusht_lowdim", {"angle wrap"}),
    ("pusht_image", {"angle wrap"})])
def test_real_sets_are_clean(name, notes):
    """Their notes are true: the script of lift never turns the hand, and its rate is said nowhere; the angle
    of Push-T's block goes from 0 to 2 pi."""
    seen = found(Path(os.environ["DEMO_DATA"]) / f"{name}.hdf5")
    assert {(n, level) for n, level, _ in seen} == {(n, "note") for n in notes}


def test_the_built_in_task_is_clean():
    report = check.examine(tabletop_file(cameras=True, rollouts=60, seed=0, cache=None))
    assert report.wrong == [] and report.level("fault") == []
