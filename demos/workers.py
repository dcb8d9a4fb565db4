"""Processes that read ahead: each reads files that no other reads, and every batch is put together here."""
import collections
import copy
import functools
import os
import sys

import numpy as np
import torch

from robot.errors import UserError

AHEAD = 3                       # batches that are being read while one is used


def owners(windows, workers):
    """Which worker reads each item, (items,) int64: that to which its file belongs, or its episode where
    there are fewer files than workers. All have about the same number of steps to read."""
    demos, of_episode = windows.demos, windows.episodes
    files = [demos.episodes[e].file for e in of_episode]
    names, unit = np.unique(files, return_inverse=True)
    unit = unit.reshape(-1) if len(names) >= workers else np.arange(len(files))
    steps = np.bincount(unit, weights=demos.lengths[of_episode])
    load, worker = np.zeros(workers), np.zeros(len(steps), np.int64)
    for i in np.argsort(-steps, kind="stable"):             # the longest first, to whom has least
        worker[i] = load.argmin()
        load[worker[i]] += steps[i]
    return torch.from_numpy(worker[unit])[windows.item_episode.cpu()]


def read_ahead(windows, stream, workers):
    """(indices, batch) for the indices of `stream`, as one process would make them. AHEAD batches and no more
    are in memory, however many workers there are."""
    owner, order, device = owners(windows, workers), collections.deque(), windows.device
    put = functools.partial(torch.Tensor.to, device=device, non_blocking=True)

    def wanted():
        for indices in stream:
            by_worker = owner[indices].argsort(stable=True)
            order.append((indices, by_worker.argsort()))
            # Lists: a tensor would be handed over by a thread that complains when its worker dies.
            yield from (indices[owner[indices] == w].tolist() for w in range(workers))

    # The loader hands its questions to the workers in turn. A generator of its own: it draws a seed for them,
    # which must not disturb the run's.
    loader = torch.utils.data.DataLoader(Parts(windows), batch_size=None, sampler=wanted(),
                                         num_workers=workers, prefetch_factor=AHEAD,
                                         pin_memory=device.type == "cuda",
                                         generator=torch.Generator(),
                                         worker_init_fn=own_group)
    parts = []
    for part in loader:
        if isinstance(part, UserError):
            raise part
        parts.append(part)
        if len(parts) == workers:
            indices, back = order.popleft()
            filled = [part for part in parts if part]
            yield indices, {key: torch.cat([put(part[key]) for part in filled])[put(back)]
                            for key in filled[0]}
            parts = []


class Parts(torch.utils.data.Dataset):
    """For DataLoader's workers: an "item" is a part of a batch, on the CPU, as a forked process has no GPU.
    An error is handed over like a part, because DataLoader would wrap its one line into a traceback."""

    def __init__(self, windows):
        self.windows = copy.copy(windows)
        self.windows.device = torch.device("cpu")

    def __getitem__(self, indices):
        try:
            return self.windows.batch(torch.tensor(indices)) if indices else {}
        except UserError as error:
            return error


def own_group(worker):
    """Ctrl-C and a SIGTERM to the group are for the main process to hear; it ends its workers itself."""
    os.setpgid(0, 0)
    sys.excepthook = lambda *_: None  # errors travel as parts; a lost connection is for the main process
