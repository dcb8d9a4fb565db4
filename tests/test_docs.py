"""The pages of docs/: their code runs and computes what they claim, their links and commands are real."""
import argparse
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from robot.models import load_module
from robot.processing import Processing
from robot.rotations import FORMS
from robot.steps import STEPS
from tools.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page):
    """[(language, text)] of the fenced blocks of docs/<page>."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)


def run_page(page, folder, checks):
    """Save the blocks of a page that begin with a file name, run its other Python blocks in one program, then
    `checks`, which sees their names. -> what the program printed"""
    program = []
    for language, text in blocks(page):
        name = re.match(r"# ([\w.]+\.(?:py|yaml))\n", text)
        if name:
            (folder / name[1]).write_text(text)
        elif language == "python":
            program.append(text)
    assert program
    (folder / "program.py").write_text("\n".join([*program, checks]))
    paths = os.pathsep.join([str(ROOT), str(folder)])
    done = subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extending(tmp_path):
    said = run_page("extending.md", tmp_path, """
# a label: (T,) bool in the file, for the steps -1 .. 14 of the window at step 20, clamped to 0 .. 29
e = demos.train_episodes[0]
with h5py.File("reach.hdf5") as file:
    success = file[f"data/demo_{e}/success"][:].astype(float)
assert 0 < success.sum() < 30
assert tuple(batch["success"].shape) == (30, 16, 1) and batch["success"].dtype == torch.float32
for t in (0, 20, 29):
    steps = np.clip(np.arange(t - 1, t + 15), 0, 29)
    assert batch["success"][t, :, 0].tolist() == success[steps].tolist()
assert list(demos.state_keys) == ["goal", "pos"]

# a format
assert counted.lengths.tolist() == [10] * 3 and counted.fps == 25
assert counted.instructions == ["count upwards"] * 3
assert counted.actions[:, 0].tolist() == [100.0 * i + t for i in range(3) for t in range(10)]
assert (counted.state == -counted.actions).all()
from demos import check
check.main(["episode_*.npz"])      # knows it, too, and takes none of it for images
assert counted.labels[:, 0].tolist() == [0.0] * 8 + [1, 1] + [0] * 8 + [1, 1] + [0] * 8 + [1, 1]

# an environment: what goes straight to the goal arrives, what stands still does not
from robot.rollout import closed_loop
class Walk:
    description, latency, speed = {}, [0.0], 1
    def reset(self): pass
    def act(self, obs): return self.speed * (obs["goal"] - obs["pos"])
still = Walk()
still.speed = 0
assert closed_loop(Walk(), {"id": "reach"}, 50, 0)["success"] == 1
assert closed_loop(still, "reach", 50, 0)["success"] < 0.1
film = closed_loop(Walk(), "reach", 3, 0)["rollouts"][0]["frames"]
assert film.shape[1:] == (64, 64, 3) and len({frame.tobytes() for frame in film}) > 1

# a step: an angle and back
assert np.allclose(turned, [[0.1, np.sin(3), np.cos(3), 0.5]], atol=1e-6)
assert np.allclose(turning.undo_state(turned)["joints"], [[0.1, 3, 0.5]], atol=1e-6)

# a head: the policy learns the task, and the head to tell when it is done
import json
rows = [json.loads(line) for line in open("out/reach/metrics.jsonl")]
curve = [row["loss_success"] for row in rows if "loss_success" in row]
share = demos.labels.mean()         # a head that always says the same has this entropy as its loss, 0.6
assert curve[-1] < 0.75 * -(share * np.log(share) + (1 - share) * np.log(1 - share)), curve
assert result["success"] >= 0.8, result
assert odds[0] < -0.5 and odds[1] > 0.5, odds
from robot.errors import UserError
try:
    Policy.load("out/reach")
except UserError as e:
    assert "module=" in str(e)
else:
    raise AssertionError("weights of another class were loaded")
""")
    assert "episode_*.npz: 3 episodes, 30 steps at 25 Hz" in said and "must be mended" not in said


def test_the_example_of_data_md(tmp_path):
    said = run_page("data.md", tmp_path, """
assert demos.state_keys == {"gripper_pos": 3} and demos.camera_keys == ["front_camera"]
assert demos.lengths.tolist() == [50, 60, 70, 80, 90] and demos.fps == 10
assert demos.instructions == ["wander about"] * 5 and demos.action_dim == 3
with h5py.File("my_robot.hdf5") as file:
    last, front = file["data/demo_4/actions"][:], file["data/demo_4/obs/front_camera"][:]
assert (demos.actions[-90:] == last).all() and (demos.state[-89:] == last[:-1]).all()
assert (demos.images(4, 7, 8)[0, 0] == front[7].transpose(2, 0, 1)).all()
""")
    assert "wander about" in said


def test_the_processing_shown_is_understood():
    """Every YAML of data.md and every step of its table; and its forms of rotations are all there are."""
    page = (ROOT / "docs" / "data.md").read_text()
    found = [yaml.safe_load(text)["processing"] for language, text in blocks("data.md")
             if language == "yaml" and text.startswith("processing:")]
    rows = [yaml.safe_load(step) for step in re.findall(r"^\| `(\w+: {.*?})` \|", page, re.M)]
    assert len(found) == 2 and {key for row in rows for key in row} == {*STEPS, "delta"}
    keys = {"qpos": 14, "robot0_eef_quat": 4}
    for spec in [*found, *({"actions": [row]} for row in rows)]:
        Processing(spec, keys, [name for name in spec.get("cameras", {}).values() if name]).action_dim(
            7 if spec is found[1] else 14)
    for form in FORMS:
        if not form.startswith("euler"):
            assert f"`{form}`" in page, form


def test_the_environments_shown_are_those_of_the_configurations():
    page = (ROOT / "docs" / "environments.md").read_text()
    shown = re.findall(r"`(configs/\w+\.yaml)`\):\n\n```yaml\n(.*?)^```", page, re.M | re.S)
    assert len(shown) == 3
    for config, text in shown:
        assert yaml.safe_load(text)["env"] == yaml.safe_load((ROOT / config).read_text())["env"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_of_a_page_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:                                          # as GitHub makes them of headings
            headings = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                        for heading in re.findall(r"^#+ (.*)$", target.read_text(), re.M)]
            assert anchor in headings, f"{page.name}: {link} is no heading of {target.name}"
    written = set(re.findall(r"^# ([\w.]+\.(?:py|yaml))$", text, re.M)) | {"FILE.yaml"}
    named = set(re.findall(r"(?<![\w/.<*-])((?:\w+/)*\w[\w-]*\.(?:py|yaml|txt|md))\b", text)) - written
    named |= set(re.findall(r"`((?:configs|demos|robot|tools|tests|docs)/[\w/]*)`", text))
    assert not [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]


def commands():
    """Those in fences without a language, and those in backticks: (page, argv), without variables."""
    found = []
    for page in PAGES:
        lines = [text.replace("\\\n", " ") for language, text in blocks(page.name) if not language]
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        lines += re.findall(r"`((?:[A-Z0-9_]+=\w+ )?(?:python|pytest|git|pip) [^`]*)`", prose)
        for line in "\n".join(lines).splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z0-9_]+=", word)]
            found += [pytest.param(page, words, id=f"{page.stem}: {' '.join(words)}")] if words else []
    return found


@pytest.mark.parametrize("page, argv", commands())
def test_a_command_is_understood(page, argv, monkeypatch):
    """Flags, models, presets and fields of Config exist; nothing is run."""
    monkeypatch.chdir(ROOT)                                 # --config is a path of the repository
    program, first, rest = argv[0], argv[1] if len(argv) > 1 else "", argv[2:]
    if program == "torchrun":                               # what it starts
        program, first, rest = "python", "train.py", argv[argv.index("train.py") + 1:]
    assert program in ("python", "pytest", "git", "pip")
    if program == "pytest" and "-k" in argv:
        file, = [word for word in argv if word.startswith("tests/")]
        assert re.search(rf"^def test_\w*{argv[argv.index('-k') + 1]}", (ROOT / file).read_text(), re.M)
    if program != "python":
        return
    if first == "train.py" and rest != ["--help"]:
        chosen, _ = parse_options(rest)
        if chosen.init and not chosen.model:                # its config.json says it
            return
        module = load_module(chosen.model)
        assert chosen.preset in module.PRESETS
        assert not set(chosen.set) - {field.name for field in dataclasses.fields(module.Config)}
    elif first == "-m" or first == "sample.py":
        module, rest = (rest[0], rest[1:]) if first == "-m" else ("sample", rest)
        assert_parsed(importlib.import_module(module), rest, monkeypatch)
    else:                                                   # a file run by itself
        assert (ROOT / first).exists()


def assert_parsed(module, argv, monkeypatch):
    """Its main gets as far as having parsed `argv`, without an error."""
    if module.__name__ == "robot.tabletop":                 # it takes no arguments
        assert not argv and callable(module.main)
        return

    class Parsed(Exception):
        pass

    def parse_and_stop(self, args=None, namespace=None, parse=argparse.ArgumentParser.parse_known_args):
        _, unknown = parse(self, argv, namespace)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    with pytest.raises(Parsed):
        module.main()
