"""Mistakes as one line, files that are whole or not there, and what is no file to read."""
import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, refused, write

from demos.generated import new_hdf5
from robot.errors import (UserError, few, hint, input_file, input_text, one_line, run_command, say, say_once,
                          user_path, written_aside)


def test_written_aside_keeps_what_was_there(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(UserError, match="cannot write"), written_aside(path / "below a file"):
        pass


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "result.hdf5"
    path.write_text("old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="make room or take another folder: .* No space left"):
        with new_hdf5(path) as file:
            file["x"] = np.zeros(1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def raising(error):
    def main():
        raise error
    return main


def test_foreign_text_is_one_line_that_has_an_end():
    assert one_line("a\nb\u2028c\td") == "a b c d"
    assert one_line("red \x1b[31m \udcff \u00e4") == "red ?[31m ? \u00e4"
    assert one_line("x" * 60_000) == "x" * 196 + " ..." and one_line("abcdefgh", 8) == "abcdefgh"
    assert few([]) == "nothing" and few("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"
    assert few(["y" * 100]) == "y" * 36 + " ..."
    assert hint("zzz", [f"name{i}" for i in range(40)]).endswith("name11 and 28 more")


def test_a_long_message_keeps_what_is_wrong_and_how_to_mend_it():
    text = str(UserError("the file\n" + "y" * 60_000 + "\x1b: copy it again"))
    assert len(text) <= 380 and text.startswith("the file yyy") and text.endswith("y?: copy it again")
    assert str(UserError("z" * 380)) == "z" * 380 and len(str(UserError("z" * 381))) <= 380


def test_a_note_is_one_line(capsys):
    say("of\nan attribute " + "z" * 60_000)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("note: of an attribute zzz") and len(line) <= 400


@pytest.mark.parametrize("error, named, unsaid", [
    (PermissionError(errno.EACCES, "Permission denied", "a.yaml"), ["a.yaml", "change its perm"], "write"),
    (OSError(errno.ENOSPC, "No space left", "out/x"), ["cannot write out/x", "make room"], "permissions"),
    (OSError(errno.ENOSPC, "No space left"), ["cannot write to --out", "make room"], "None"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 5000), ["nnn"], "make room"),
    (MemoryError("Unable to allocate 1 TiB"), ["out of memory", "1 TiB"], "write"),
    (UserError("a mistake"), ["a mistake"], "write")])
def test_what_the_system_says_is_one_line(error, named, unsaid, capsys):
    line = refused(capsys, raising(error), *named)
    assert unsaid not in line and len(line) <= 400


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "closed"), 141)])
def test_ctrl_c_and_a_closed_pipe_end_quietly(error, status, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(error))
    assert stopped.value.code == status and capsys.readouterr() == ("", "")


def test_what_libraries_say_becomes_a_note(capsys):
    def main():
        warnings.warn("overflow\nin a cast", RuntimeWarning)
        raise UserError("a mistake")
    say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            run_command(main)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "note: overflow in a cast" and last.endswith(": a mistake")


def test_a_command_whose_output_nobody_reads_ends_quietly(tmp_path):
    """Also in a locale that has only ASCII."""
    path = write(tmp_path / "a.hdf5", edit=lambda file: file["data/demo_0"].attrs.update(
        language_instruction="gr\u00fcn"))
    command = [sys.executable, "-m", "demos.check", path]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ascii_only = buffered | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and "gr\\xfcn" in done.stdout and done.stderr == ""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == ""
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr


def test_what_is_no_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes("gr\u00fcn".encode())
    (tmp_path / "latin").write_bytes("gr\u00fcn".encode("latin-1"))
    assert input_file(tmp_path / "file") == tmp_path / "file" and input_text(tmp_path / "file") == "gr\u00fcn"
    assert user_path("~") == Path.home()
    for path, named in ((tmp_path / "pipe", "a pipe or a device"), ("/dev/zero", "a pipe or a device"),
                        (tmp_path, "a folder"), (tmp_path / "none", "No such file"),
                        ("~nouser/x", "no such user"), ("x" * 5000, "too long"), ("a\0b", "null")):
        with pytest.raises(UserError, match=named):
            input_file(path)
    with pytest.raises(UserError, match="no text in UTF-8"):
        input_text(tmp_path / "latin")
