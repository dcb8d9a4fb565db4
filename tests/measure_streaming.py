"""Streams a generated set that memory does not hold, and says what each process takes:

    python tests/measure_streaming.py large --gigabytes 20 --workers 2

Writes files of random pictures of two cameras into the folder, unless they are there, and reads all of them
once in shuffled order, as train.py does. Resident bytes are what the system reports (Linux): pages that
processes share count in each of them.
"""
import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import h5py
import numpy as np

import data
from demos.dataset import open_demos

STEPS, PER_FILE = 200, 2        # steps of an episode, episodes of a file


def write_set(folder, gigabytes, size=(240, 320)):
    """HDF5 files in robomimic's layout, not compressed. -> how many"""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, *size, 3), np.uint8)
    n_files = max(2, round(gigabytes * 1e9 / (PER_FILE * STEPS * 2 * noise[0].nbytes)))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        path = folder / f"{i:04d}.hdf5"
        if path.exists():
            continue
        with h5py.File(path, "w") as file:
            file.create_group("data").attrs["fps"] = 10.0
            for e in range(PER_FILE):
                group = file.create_group(f"data/demo_{e}")
                group["actions"] = rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32)
                group["obs/state"] = rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32)
                for camera in ("left", "right"):
                    group[f"obs/{camera}"] = noise[(np.arange(STEPS) + rng.integers(64)) % 64]
    return n_files


def resident(pid="self"):
    """Bytes of a process in memory now."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def open_files(pid, folder):
    """Files of the folder that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):      # closed in the meantime
            found.add(Path(os.readlink(link)))
    return {path.name for path in found if path.parent == folder}


def stream(folder, workers, batch_size, at_most=None):
    """One epoch. -> {"main": most resident bytes, "workers": [..], "files": [names that each has opened],
    "bytes": read, "seconds": of reading, "growth": bytes from the tenth batch on, of the process where it is
    largest}. Raises MemoryError where a process passes `at_most` bytes."""
    demos = open_demos(str(folder), "image", val_ratio=0.0, memory_gb=0.0)
    windows = data.Windows(demos, None, horizon=16, n_obs_steps=1, first_action=0)
    batches = len(windows) // batch_size
    most, files, tenth, done = {}, {}, {}, 0
    began = time.perf_counter()
    reading = data.batches(windows, batch_size, seed=0, workers=workers)
    for k, (_, batch) in zip(range(batches), reading):
        done += batch["images"].nbytes
        pids = [os.getpid(), *sorted(child.pid for child in multiprocessing.active_children())]
        for pid in pids:
            now = resident(pid)
            most[pid] = max(most.get(pid, 0), now)
            if k < 10:
                tenth[pid] = most[pid]
            files.setdefault(pid, set()).update(open_files(pid, folder))
            if at_most and now > at_most:
                raise MemoryError(f"{now / 1e9:.2f} GB in a process after {done / 1e9:.2f} GB")
    main, *others = most
    seconds = time.perf_counter() - began
    reading.close()                             # the workers end here
    return {"main": most[main], "workers": [most[pid] for pid in others],
            "files": [files[pid] for pid in others], "bytes": done, "seconds": seconds,
            "growth": max(most[pid] - tenth[pid] for pid in most)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    n_files = write_set(args.folder, args.gigabytes)
    found = stream(args.folder.resolve(), args.workers, args.batch_size, at_most=1.5e9)
    each = ", ".join(f"{x / 1e9:.2f}" for x in found["workers"])
    print(f"{n_files} files, {found['bytes'] / 1e9:.1f} GB read in {found['seconds']:.0f} s; resident at "
          f"most {found['main'] / 1e9:.2f} GB (main), {each} GB (workers); growth after ten batches "
          f"{found['growth'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
