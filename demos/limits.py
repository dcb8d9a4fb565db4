"""Sizes that a file declares, before anything is read."""
import contextlib
import math
import os
from pathlib import Path

from robot.errors import UserError


def memory():
    """Bytes that this process may use: those of the machine, or what its container is allowed."""
    found = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):      # the file says "max" where there is no limit
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found)


def refuse_beyond_memory(what, need, mend):
    """UserError if `need` bytes are more than there are."""
    if need > memory():
        raise UserError(f"{what} would take {need / 1e9:,.1f} GB, the memory is {memory() / 1e9:,.1f} GB: "
                        f"{mend}")
