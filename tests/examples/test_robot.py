"""examples/robot.py as it is: the policy in a thread and in a process, which is killed and started again."""
import importlib.util
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from helpers import refused

import train

SPEC = importlib.util.spec_from_file_location("example_robot", ROOT / "examples" / "robot.py")
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(folder / "cache"))
        train.main(["--model", "dp_cnn", "--steps", "1", "--demos", "4", "--batch_size", "4", "--episodes",
                    "0", "--out", str(folder / "out"), "--set", "down_dims=[8, 16]"])
    return folder / "out"


def test_the_policy_in_a_thread(run, capsys):
    """Ten times as fast as the robot's own pace: a step is 10 ms, and the loop keeps it."""
    began = time.monotonic()
    result, = example.main([str(run), "--episodes", "1", "--speed", "10", "--device", "cpu"])
    seconds = time.monotonic() - began
    assert result["steps"] == 80 and seconds >= 0.8 and result["delays"] and min(result["delays"]) >= 1
    said = capsys.readouterr().out
    assert re.search(r"episode 0: (timeout|wall|wrong) in 80 steps; delays \d+ \(median\) to \d+ steps; "
                     r"held still in \d+ steps; act took [\d.]+ ms at most; \d+ steps began late", said), said


def test_a_robot_of_another_pace_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(example.Robot, "hz", 50)
    example.main([str(run), "--episodes", "1", "--speed", "10", "--device", "cpu", "--strategy", "wait"])
    assert "the policy learned from 10 steps per second, the robot makes 50" in capsys.readouterr().err


def test_a_loop_that_was_late_does_not_hurry(monkeypatch):
    now, slept = [0.0], []
    monkeypatch.setattr(example.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(example.time, "sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    clock = example.Clock(10)
    for busy in (0.02, 0.35, 0.02):
        now[0] += busy
        clock.wait()
    assert slept == pytest.approx([0.08, 0, 0.08]) and (clock.late, clock.steps) == (1, 3)


def test_the_robot_stands_still_when_it_is_told_to():
    robot = example.Robot()
    observation = robot.start(seed=3)
    before = observation["robot0_eef_pos"].copy()
    for last in (None, np.array([0.3, 0.3, 1.0], np.float32)):
        action = robot.hold(observation, last)
        assert action.shape == (3,) and action[2] == (-1 if last is None else 1)
        observation, done = robot.step(action)
        assert np.allclose(observation["robot0_eef_pos"], before, atol=1e-6) and not done
    assert observation["instruction"] in example.Tabletop(1).reset(seed=3)[1]["instruction"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def start_server(run, port):
    return subprocess.Popen([sys.executable, "examples/robot.py", "--serve", str(run), "--port", str(port),
                             "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_served_policy_is_killed_and_started_again(run):
    """The arm does what is left of its chunk, holds still while nobody answers, and goes on by itself."""
    port, said = free_port(), []
    server = start_server(run, port)
    try:
        assert f"is served at 127.0.0.1:{port}" in server.stdout.readline()
        worker = example.reach(f"127.0.0.1:{port}", timeout=1.0)
        policy = example.RealTime(worker, "rtc", example.Robot.hold, say=said.append)
        robot = example.Robot()
        state = {"observation": robot.start(0), "deadline": time.monotonic() + 60}

        def until(condition):
            while not condition():
                assert time.monotonic() < state["deadline"], said
                began = time.monotonic()
                action = policy.act(state["observation"])
                assert time.monotonic() - began < 0.5, "act waited for the network"
                state["observation"], _ = robot.step(action)
                time.sleep(0.01)
        until(lambda: len(policy.delays) >= 3)
        server.kill()
        server.wait()
        held = policy.held
        until(lambda: policy.held >= held + 10)
        place = state["observation"]["robot0_eef_pos"]
        until(lambda: policy.held >= held + 20)
        assert np.allclose(state["observation"]["robot0_eef_pos"], place, atol=1e-6)
        assert any(f"the policy at 127.0.0.1:{port} is lost" in line for line in said)
        chunks, server = len(policy.delays), start_server(run, port)
        until(lambda: len(policy.delays) > chunks)
        assert said[-1].endswith("a chunk is there, the arm goes on")
        policy.close()
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("argv, named", [
    ([], "give either a run, as in out/dp_cnn, or --connect HOST:PORT"),
    (["out/x", "--connect", "a:1"], "give either a run"), (["--serve"], "give either a run"),
    (["nowhere"], "there is no nowhere; give the --out folder"),
    (["--connect", "here"], "'here' is no address"),
    (["x", "--speed", "0"], "--speed 0.0 must be from 0.01 to 1000"),
    (["x", "--sped", "1"], "did you mean 'speed'"),
])
def test_mistakes_are_one_line(argv, named, capsys):
    refused(capsys, lambda: example.main(argv), named)


def test_an_unknown_strategy_and_a_silent_address_are_named(run, monkeypatch, capsys):
    argv = [str(run), "--strategy", "rct", "--device", "cpu"]
    refused(capsys, lambda: example.main(argv), "did you mean 'rtc'")
    with pytest.raises(example.UserError, match="nobody answers at 127.0.0.1:9 .*start the server"):
        example.reach("127.0.0.1:9", 0.5, patience=0)
