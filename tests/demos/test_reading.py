"""Files that stay open."""
import pickle

from demos import reading
from demos.reading import OpenFiles


class File:
    def __init__(self, path):
        self.path, self.closed = path, False

    def close(self):
        self.closed = True


def test_a_file_is_opened_once_and_the_oldest_is_closed(monkeypatch):
    monkeypatch.setattr(reading, "MOST_OPEN", 2)
    files = OpenFiles(File)
    a, b = files["a"], files["b"]
    assert files["a"] is a and not a.closed
    c = files["c"]
    assert a.closed and not b.closed and files["a"] is not a
    files.close()
    assert b.closed and c.closed and files["c"] is not c


def test_every_process_opens_files_of_its_own(monkeypatch):
    """After a fork the position in a file would be shared, and a handle cannot be pickled."""
    files = OpenFiles(File)
    a = files["a"]
    assert pickle.loads(pickle.dumps(files)).files == {} and files["a"] is a
    monkeypatch.setattr(reading.os, "getpid", lambda: -1)
    assert files["a"] is not a and not a.closed
