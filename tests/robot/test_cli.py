"""robot/cli.py: flags, numbers and what torchrun leaves in the environment."""
import math

import pytest
import torch
from helpers import refused

from robot.cli import SEEDS, Parser, check_ranges, environ_number
from robot import models
from robot.errors import UserError, say_once
from robot.models import pick_device


def parser():
    made = Parser(description="a command")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--minutes", type=float, default=5.0)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    return made


RANGES = {"seed": SEEDS, "minutes": (0.001, math.inf), "seeds": SEEDS, "absent": (0, 1)}


@pytest.mark.parametrize("argv, named", [
    (["--seed", "many"], ["--seed", "'many'", "--help"]), (["--sed", "1"], ["--sed", "did you mean 'seed'"]),
    (["--seed"], ["--seed", "expected one argument"]), (["--seed", "-1"], ["--seed -1", "0 to 4294967295"]),
    (["--seed", str(2**32)], ["--seed 4294967296"]), (["--seed", "9" * 5000], ["--seed", "999 ..."]),
    (["--minutes", "nan"], ["--minutes nan", "at least 0.001"]), (["--minutes", "inf"], ["--minutes inf"]),
    (["--minutes", "0"], ["--minutes 0.0"]), (["--seeds", "1", "-2"], ["--seeds -2"]),
    (["--seed=--"], ["--seed", "no value"]), (["a\nb"], ["unknown argument a b"]),
    (["--" + "x" * 9999], ["unknown argument"])])
def test_every_mistake_is_one_line(argv, named, capsys):
    assert len(refused(capsys, lambda: parser().parse(argv, RANGES), *named)) <= 400


def test_both_ends_of_a_range_belong_to_it():
    args = parser().parse(["--seed", str(2**32 - 1), "--minutes", "0.001", "--seeds", "0", "7"], RANGES)
    assert (args.seed, args.minutes, args.seeds) == (2**32 - 1, 0.001, [0, 7])
    check_ranges({"seed": None}, RANGES)            # a flag that was not given


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "\u00b2", "\u0661", "9" * 20])
def test_numbers_of_the_environment(text, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert environ_number("LOCAL_RANK", 0) == 3 and environ_number("NO_SUCH_NUMBER", 5) == 5
    monkeypatch.setenv("LOCAL_RANK", text)
    with pytest.raises(UserError, match="LOCAL_RANK=.* is no whole number"):
        pick_device("cpu", "float32")


@pytest.fixture
def cpu(monkeypatch):
    """A function that makes this CPU one of which Linux says these words, or, with None, nothing."""
    def its(words):
        def read_text(*_, **__):
            if words is None:
                raise FileNotFoundError
            return words
        monkeypatch.setattr(models.Path, "read_text", read_text)
        models.cpu_has_bfloat16.cache_clear()
        say_once.cache_clear()
    yield its
    monkeypatch.undo()
    models.cpu_has_bfloat16.cache_clear()


@pytest.mark.parametrize("words, has", [
    ("flags : avx2 avx512_bf16", True), ("Features : asimd bf16", True), ("flags : avx2 avx512f", False),
    (None, None)])
def test_a_cpu_without_bfloat16_is_named(words, has, cpu, capsys):
    cpu(words)
    assert models.cpu_has_bfloat16() is has
    pick_device("cpu", "float32")
    assert not capsys.readouterr().err
    assert pick_device("cpu", "bfloat16")[1] == torch.bfloat16
    said = "note: --dtype bfloat16: this CPU has no instructions for it, float32 may be much faster\n"
    assert capsys.readouterr().err == (said if has is False else "")


def test_only_gpus_have_numbers():
    with pytest.raises(UserError, match="--device cpu:1: only cuda has numbers"):
        pick_device("cpu:1", "float32")
