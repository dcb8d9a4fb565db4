"""How inputs go wrong: bytes, arrays, links, attributes, parts of nested dicts, all drawn from `rng`."""
import contextlib
import io
import math
import os
import shutil
import zipfile

import h5py
import numpy as np
import torch

# Numbers and texts that a flag, an attribute, a YAML value or a part of a checkpoint may be by mistake.
LONG = "a long text " * 5000
VALUES = (None, "", "x", "a\nb", LONG, "\u00e4\u2028\x1b[31m", 0, -1, 1, 3, 10**6, 2**31, 2**63, 2**64,
          10**400, 0.0, -0.5, 0.5, 1e-300, 1e30, 1e300, math.nan, math.inf, -math.inf, True, False, [], [0],
          [1, 2], [math.nan], ["x"], [[1], [2]], {}, {"x": 1}, {"shape": [1]})
WORDS = ("", "x", "a\nb", LONG, "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000,
         "0x10", "1_0", "\u0661", "true", "[1, 2]", "{a: 1}", "~nouser/x", "/dev/null", "/dev/full", ".",
         "..", "*", "\udcff", "%s%n", "--", "a=b", "tiny", "cpu")


def spoil_bytes(rng, path):
    """What a broken disk, an interrupted copy or a wrong program leaves."""
    data = bytearray(path.read_bytes())
    at, n = rng.randrange(len(data)), rng.choice((1, 4, 64, 1000))
    how = rng.randrange(7)
    if how < 2:
        for _ in range(rng.choice((1, 5, 50))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 2:
        data[at:at + n] = bytes(n)
    elif how == 3:
        data = data[:at]
    elif how == 4:
        data[at:at] = rng.randbytes(n)
    elif how == 5:
        del data[at:at + n]
    else:
        data = rng.choice((b"", b"not this\nformat", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", bytes(5000)))
    path.write_bytes(data)


def spoil_place(rng, path):
    """Something else stands where the file should be."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    how = rng.randrange(5)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path)
    elif how == 3:
        path.symlink_to("/dev/zero" if rng.random() < 0.5 else "/dev/full")


def other_array(rng, x):
    """Another type, another shape, other values."""
    x = np.asarray(x)
    how = rng.randrange(5)
    if how == 0 and x.size and x.dtype.kind == "f":
        x = x.copy()
        x.flat[rng.randrange(x.size)] = rng.choice((math.nan, math.inf, 1e38, 1e300, -1e9))
        return x
    if how == 1 and x.size and x.dtype.kind in "fiub":
        with np.errstate(all="ignore"):
            return x.astype(rng.choice(("i1", "i8", "u8", "?", "f2", "f8", "c8", "S3", "u1", "f4")))
    if how == 2:
        return rng.choice((np.float32(1), np.zeros(0), np.zeros((0, 3)), np.array(b"x"), np.array("x"),
                           np.zeros(3), np.zeros((len(x) if x.ndim else 1, 0)),
                           np.zeros((3, 2), [("a", "f4"), ("b", "i2")]), np.array(["one", "two"]),
                           np.array(LONG[:60000].encode())))
    if how == 3 and x.ndim:
        return rng.choice((x[:-1], x[:1], x[:0], x[None], x.T, x[..., None], x[..., :0], x.reshape(-1),
                           np.concatenate([x, x]), np.zeros_like(x)))
    value = rng.choice([v for v in VALUES if isinstance(v, (int, float)) and abs(v) < 2**63 or v != v])
    return np.full(x.shape, value)


def spoil_hdf5(rng, path):
    """One to three changes of groups, arrays, links and attributes."""
    with h5py.File(path, "a") as file:
        for _ in range(rng.choice((1, 1, 2, 3))):
            names = []
            file.visit(names.append)
            with contextlib.suppress(Exception):        # HDF5 itself refuses some of it
                spoil_node(rng, file, rng.choice(names), path)


def spoil_node(rng, file, name, path):
    node, how = file[name], rng.randrange(12)
    if how == 0:
        del file[name]
    elif how <= 3 and isinstance(node, h5py.Dataset):
        x = other_array(rng, node[()])
        del file[name]
        file[name] = x.astype("S") if x.dtype.kind == "U" else x
    elif how == 4:
        file.move(name, str(rng.choice(("data/demo_1000", "data/demo_x", "\u00e4\u00f6", "a b", "x" * 300,
                                        "data/demo_" + "9" * 30, name + "\n", "data/demo_0/obs/new"))))
    elif how == 5:
        del file[name]
        file[name] = rng.choice((h5py.SoftLink("/nowhere"), h5py.SoftLink("/"), h5py.SoftLink("/data"),
                                 h5py.ExternalLink("missing.hdf5", "/x"), h5py.ExternalLink(path.name, "/"),
                                 h5py.SoftLink("/" + name)))
    elif how == 6:
        del file[name]
        new = lambda **kind: lambda: file.create_dataset(name, **kind)
        rng.choice((lambda: file.create_group(name), new(data=h5py.Empty("f")),
                    new(shape=(5, 10**6, 10**6, 3), dtype="u1", chunks=(1, 64, 64, 3)),
                    new(shape=(10**12, 2), dtype="f4", chunks=(64, 2)),
                    new(shape=(5, 10**5, 10**5), dtype="f4", chunks=(1, 64, 64)),
                    new(shape=(3,), dtype=h5py.vlen_dtype("u1")), new(shape=(3,), dtype=h5py.ref_dtype),
                    new(shape=(5, 2), dtype=h5py.enum_dtype({"a": 1})),
                    lambda: file.create_virtual_dataset(name, virtual(rng))))()
    else:
        key = rng.choice(("fps", "num_samples", "language_instruction", "action_names", "env_args", "rollout",
                          "language", "other", "joint_names", "instruction"))
        value = rng.choice(VALUES + ("{", "[1]", '{"env_kwargs": 3}', "[" * 2000, "nan", b"\xff\xfe", '"x"'))
        node.attrs[key] = h5py.Empty("f") if value is None or value == {} else value


def virtual(rng):
    layout = h5py.VirtualLayout((5, 2), "f4")
    layout[:] = h5py.VirtualSource("missing.hdf5", "x", (5, 2))
    return layout


class Payload:
    """What a malicious file does when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch UNPICKLED",)


def spoil_tree(rng, tree):
    """Change something deep inside nested dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = rng.choice(list(keys))
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        value, how = tree[key], rng.randrange(6)
        if how == 0 and isinstance(tree, dict):
            del tree[key]
        elif how == 1 and isinstance(tree, dict):
            tree[rng.choice(("x", 3, str(key) + "_", LONG[:1000]))] = tree.pop(key)
        elif how == 2 and torch.is_tensor(value) and value.numel():
            tree[key] = torch.randn(rng.choice(((), (0,), (1,), (3, 2), (*value.shape, 1), value.shape[1:])))
        elif torch.is_tensor(value) and how < 5:
            tree[key] = rng.choice((value[..., None], value.double(), value.bool(), value * math.nan,
                                    value.flatten(), value[:0] if value.ndim else value,
                                    value.to(torch.complex64), value.half(), value.to("meta"), value * 1e30,
                                    value.to_sparse() if value.ndim else value))
        elif type(value) is int and how < 4:
            tree[key] = rng.choice((-value - 1, value + 1, 10**6, 2**40, 2**63, 0))
        else:
            tree[key] = rng.choice(VALUES)
        return


def bomb(path):
    """A few kilobytes that claim to be 5 GB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                  "shape": (5 * 10**5, 100, 100)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("x.npy", header.getvalue() + bytes(10**6))
