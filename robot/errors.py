"""A user's mistakes, each as one line, and files that are written whole or not at all.

Every mistake ends as a UserError: one line that says what, where and how to mend it. `run_command` prints it
and exits with status 2.
"""
import contextlib
import difflib
import errno
import functools
import hashlib
import json
import os
import stat
import sys
import warnings
from pathlib import Path


def one_line(foreign, most=200):
    """A text that is not ours (an error of a library, a name or a text in a file), for a message: on one
    line, without control characters, and cut if it is long."""
    text = " ".join(str(foreign)[:4 * most].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[:most - 4] + " ..."


def few(names, most=8):
    """Names from a file, for a message: the first ones, each cut where it is long; "nothing" if none."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name, 40) for name in names[:most]) + more or "nothing"


class UserError(Exception):
    """A user's mistake. The message is one line: what is wrong, where, and how to mend it. If it is too long,
    its middle is left out, since it begins with what is wrong and ends with how to mend it."""

    def __init__(self, message):
        text = one_line(message, 1_000_000)
        super().__init__(text if len(text) <= 380 else f"{text[:250]} ... {text[-125:]}")


def nearest(name, names):
    """", did you mean 'xyz'?" or nothing, as the end of a message."""
    close = difflib.get_close_matches(str(name)[:100], [str(n) for n in names], 1)
    return f", did you mean {one_line(close[0], 60)!r}?" if close else ""


def hint(name, names):
    return nearest(name, names) or f"; known: {few(names, 12)}"


def fingerprint(*arrays):
    """A short text that changes with any number of these arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(memoryview(array.reshape(-1)).cast("B"))
    return digest.hexdigest()[:16]


def say(note):
    print(f"note: {one_line(note, 390)}", file=sys.stderr)


@functools.lru_cache
def say_once(note):
    say(note)


def user_path(path):
    """A path as a user writes it: ~ is a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:        # ~nobody
        raise UserError(f"{path}: there is no such user, so no such home: write the path in full") from None


def input_file(path):
    """The path of a file to read. A pipe or a device may never end: it is refused, unread, with UserError."""
    path = user_path(path)
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(kind):
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(kind) else 'a pipe or a device'}, no file")
    return path


def input_text(path):
    """The content of a text file, read as UTF-8 whatever the locale is."""
    try:
        return input_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is no text in UTF-8 ({e.reason} at byte {e.start}): save it as UTF-8"
                        ) from None


@contextlib.contextmanager
def written_aside(path):
    """A name to write to; renamed to `path` at the end, removed on an error: `path` is whole or as it was."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())          # or a power cut could leave the new name with nothing in it
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}, make room or take another folder: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def write_json(path, content):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# How to mend what the operating system reports.
FULL = {number: "make room or choose another folder" for number in (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}
ADVICE = FULL | {errno.EACCES: "change its permissions or choose another",
                 errno.EPERM: "change its permissions or choose another", errno.EMFILE: "raise ulimit -n"}


def drop_output():
    """Do not try to write again at exit, where Python would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run_command(main):
    """Call main(). A user's mistake becomes one line on stderr and exit status 2; warnings of libraries
    become notes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a locale that lacks a character writes it as \\x..
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say_once(str(message))
        try:
            main()
            sys.stdout.flush()                  # here, so that a full disk or a closed pipe is noticed
            return
        except UserError as e:
            message = str(e)
        except BrokenPipeError:                 # `... | head` has seen enough
            drop_output()
            raise SystemExit(141) from None
        except OSError as e:                    # of files that are read or written as the command goes on
            where = f"cannot write {e.filename or 'to --out or the terminal'}" if e.errno in FULL else (
                e.filename or "a file or the terminal")
            message = f"{where}: {e.strerror or e}" + f": {ADVICE.get(e.errno)}" * (e.errno in ADVICE)
        except MemoryError as e:
            message = f"out of memory ({one_line(e)}): take less data, a smaller preset or a larger machine"
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    drop_output()
    # Printed only here: the progress bar went with the frames of the error, and has ended its line.
    print(one_line(f"{Path(sys.argv[0]).name}: {message}", 400), file=sys.stderr)
    raise SystemExit(2)
