"""Wrong inputs of every kind, to every command: exit 0, or exit 2 and one line. Nothing hangs, nothing fills
the memory, nothing is unpickled.

    pytest -k fuzz                 400 inputs in a minute
    FUZZ=5000 pytest -k fuzz       more of them; FUZZ_FROM=7 FUZZ=1: that of seed 7 alone, for debugging

Every input goes to a command in a forked child, which has all modules already.
"""
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import fuzz_inputs
import pytest
import torch
from fuzz_inputs import KINDS, Base, Case
from tqdm import tqdm

from robot.errors import run_command, say_once

SECONDS, LINE, BYTES = 20, 400, 1.5 * 2**30     # a child may take so much; the parent has half a GB already
NAMES = {getattr(fuzz_inputs, name).main: f"{name}.py"
         for name in ("train", "sample", "check", "convert", "bench", "compare")}


@dataclass
class Child:
    case: Case
    folder: Path
    pid: int = 0

    def start(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)     # of fork beside threads: it uses none
            self.pid = os.fork()
        if not self.pid:
            self.run()
        return self

    def run(self):
        """The command, as a shell would start it in the folder. Never returns."""
        status = 1
        try:
            os.chdir(self.folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            sys.stdout = open(1, "w", encoding="utf-8", buffering=1)
            sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace")
            sys.stdin = open(os.devnull)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(SECONDS)               # ends the process, whatever it waits for
            resource.setrlimit(resource.RLIMIT_AS, (memory(0) + 4 * 2**30,) * 2)    # for the machine's sake
            os.environ.update({"ACTION_DIFFUSION_CACHE": str(self.folder / "cache")} | self.case.environ)
            torch.set_num_threads(1)            # the threads of the parent do not exist here
            say_once.cache_clear()
            sys.argv = [NAMES[self.case.main], *self.case.argv]
            run_command(lambda: self.case.main(list(self.case.argv)))
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def verdict(self, before, wait=False):
        """What is wrong with how the child ended, "" if nothing; None while it runs. before: bytes in memory
        of the parent."""
        done, status, used = os.wait4(self.pid, 0 if wait else os.WNOHANG)
        if not done:
            return None
        code, (error, printed) = os.waitstatus_to_exitcode(status), self.texts()
        lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", error)]
        lines = [line for line in lines if line and "step/s" not in line]
        said = [line for line in lines if not line.startswith("note:")]
        wrong = {"hangs": code == -signal.SIGALRM, "traceback": "Traceback" in error + printed,
                 "unpickled": (self.folder / "UNPICKLED").exists(),
                 f"{used.ru_maxrss / 2**20:.1f} GB": 1024 * used.ru_maxrss - before > BYTES,
                 f"exit {code}": code not in (0, 2), f"exit {code} with {len(said)} lines":
                 len(said) != (code == 2), "too long a line": any(len(line) > LINE for line in lines),
                 "no name before it": not all(line.startswith(NAMES[self.case.main]) for line in said),
                 "left a .part file": any(self.folder.rglob("*.part"))}
        found = [what for what, true in wrong.items() if true]
        return f"{found[0]}: {' | '.join(said)[-300:]}" if found else ""

    def texts(self):
        return [(self.folder / name).read_text(encoding="utf-8", errors="replace")
                for name in ("stderr", "stdout")]

    def __str__(self):
        return f"{NAMES[self.case.main]} {' '.join(map(str, self.case.argv))[-300:]} {self.case.environ}"


def memory(field):
    """Bytes of this process: 0 = address space, 1 = in memory."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE")


def assert_accepted(case, folder):
    """The command takes it: exit status 0."""
    folder.mkdir(parents=True, exist_ok=True)
    child = Child(case, folder).start()
    wrong = child.verdict(memory(1), wait=True)
    error, printed = child.texts()
    assert not wrong and f"{NAMES[case.main]}:" not in error, f"{child}\n{wrong}\n{error[-500:]}"
    return printed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    if tqdm.monitor:                # a thread that may hold tqdm's lock at the moment of a fork
        tqdm.monitor.exit()
        tqdm.monitor = None
    folder = tmp_path_factory.mktemp("base")
    return Base(folder, lambda main, argv: assert_accepted(Case(main, argv), folder / "made"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux's /proc says what a process takes")
def test_fuzz(base, tmp_path):
    before, running, wrong = memory(1), {}, {}
    first, count = (int(os.environ.get(name, default)) for name, default in (("FUZZ_FROM", 0), ("FUZZ", 400)))
    seeds = iter(range(first, first + count))
    while (seed := next(seeds, None)) is not None or running:
        if seed is not None:
            folder = tmp_path / str(seed)
            folder.mkdir()
            case = KINDS[seed % len(KINDS)](random.Random(seed), base, folder)
            running[seed] = Child(case, folder).start()
        while len(running) > 1 or seed is None and running:     # two at a time
            for number, child in list(running.items()):
                verdict = child.verdict(before)
                if verdict is not None:
                    wrong |= {number: f"{child}: {verdict}"} if verdict else {}
                    shutil.rmtree(running.pop(number).folder, ignore_errors=not verdict)
            time.sleep(0.002)
    lines = [f"{seed}: {what}" for seed, what in sorted(wrong.items())]
    assert not wrong, "\n".join([f"{len(wrong)} of {count}:", *lines])


@pytest.mark.parametrize("kind", ["hdf5", "aloha", "image_sets", "checkpoint"])
def test_what_is_not_changed_is_taken(kind, base, tmp_path, monkeypatch):
    """Or the inputs above would be refused for another reason than their fault."""
    monkeypatch.setattr(fuzz_inputs, "spoil_file", lambda *_: None)
    for seed in range(20, 26):
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert_accepted(getattr(fuzz_inputs, kind)(random.Random(seed), base, folder), folder)


def test_weights_that_are_not_changed_are_taken(base, tmp_path):
    torch.save(base.weights, tmp_path / "weights.pt")
    assert_accepted(fuzz_inputs.from_weights(base, tmp_path / "weights.pt"), tmp_path)


def shout(*lines, status=2):
    print(*lines, sep="\n", file=sys.stderr)
    raise SystemExit(status)


@pytest.mark.parametrize("main, verdict", [
    (lambda argv: None, ""), (lambda argv: shout("note: x", "x.py: one line"), ""),
    (lambda argv: pickle.loads(pickle.dumps(fuzz_inputs.Payload())), "unpickled"),
    (lambda argv: time.sleep(9), "hangs"), (lambda argv: 1 / 0, "traceback"),
    (lambda argv: len(b"x" * 3 * 2**28), " GB"), (lambda argv: shout("x.py: killed", status=1), "exit 1"),
    (lambda argv: shout("x.py: one", "and two"), "exit 2 with 2 lines"),
    (lambda argv: shout(), "exit 2 with 0"),
    (lambda argv: shout("x.py: one", status=0), "exit 0 with 1"), (lambda argv: shout("one"), "no name"),
    (lambda argv: shout("x.py: " + "y" * 400), "too long"),
    (lambda argv: shout("note: " + "y" * 400, "x.py: one"), "too long"),
    (lambda argv: Path("checkpoint.pt.1.part").touch(), "left a .part")])
def test_what_is_wrong_with_a_command_is_noticed(main, verdict, tmp_path, monkeypatch):
    monkeypatch.setitem(NAMES, main, "x.py")
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2)
    monkeypatch.setattr(sys.modules[__name__], "BYTES", 2**27)
    found = Child(Case(main, []), tmp_path).start().verdict(memory(1), wait=True)
    assert verdict in found and bool(found) == bool(verdict), found


def test_a_pipe_is_refused_unread_wherever_a_file_is_expected(base, tmp_path):
    os.mkfifo(tmp_path / "pipe.hdf5")
    pipe, main = str(tmp_path / "pipe.hdf5"), {name: module for module, name in NAMES.items()}
    for command, argv in (("check", [pipe]), ("check", [str(tmp_path)]), ("train", base.command(data=pipe)),
                          ("train", base.command() + ["--config", pipe]), ("sample", [pipe]),
                          ("train", base.command() + ["--init", pipe]),
                          ("sample", [str(base.policy), "--config", pipe, "--device", "cpu"])):
        child = Child(Case(main[f"{command}.py"], argv), tmp_path).start()
        assert not child.verdict(memory(1), wait=True), child
        assert "a pipe or a device" in child.texts()[0], child
