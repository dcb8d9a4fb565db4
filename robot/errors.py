"""What a user can get wrong, and files that are whole or not there.

Every mistake ends as a UserError: one line that says what, where and how to mend it. `run_command` prints it
and exits with status 2.
"""
import contextlib
import difflib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path


class UserError(Exception):
    """What a user can get wrong. The message is one line: what, where, how to mend it."""


def nearest(name, names):
    """", did you mean 'xyz'?" or nothing, as the end of a message."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], 1)
    return f", did you mean {close[0]!r}?" if close else ""


def hint(name, names):
    return nearest(name, names) or f"; known: {', '.join(map(str, names))}"


def one_line(error):
    return " ".join(str(error).split())


def fingerprint(*arrays):
    """A short text that changes with any number of these arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(memoryview(array.reshape(-1)).cast("B"))
    return digest.hexdigest()[:16]


@functools.lru_cache
def say_once(note):
    print(f"note: {note}", file=sys.stderr)


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
        aside.write_text(json.dumps(content, indent=1) + "\n")


def run_command(main):
    """Call main(); a user's mistake becomes one line on stderr and exit status 2."""
    try:
        main()
        return
    except UserError as e:
        message = str(e)
    except OSError as e:  # a disk that is full when metrics or the report are written
        message = (f"cannot write {e.filename or 'to --out'} ({e.strerror or e}): make room or choose "
                   f"another folder")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    # Printed only here: the progress bar went with the frames of the error, and has ended its line.
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)
