"""What an HDF5 file says, as plain values: arrays under their own names, attributes as texts and numbers.

What h5py returns is not always what was stored: zeros where the source of a virtual data set is missing,
bytes or arrays where a text was meant, nothing for a broken link. Everything is read through these functions,
which raise UserError for what cannot be read rightly.
"""
import collections
import json
from pathlib import Path

import h5py
import numpy as np

from demos.episodes import Array, Episode, kind_of
from robot.errors import UserError, few, one_line
from robot.recording import INSTRUCTIONS

DEEPEST = 8                     # levels of groups in groups; a group may hold itself


def make_episode(path, name, inside, node, actions, obs, nodes, instruction="", **more):
    """The Episode of a group or file `node`, which is called `inside` in the file: `actions` and `obs` are
    names in it. `nodes` are those whose attributes count, the innermost first; `instruction` is taken where
    they have none. `more`: fields of Episode."""
    parts = dict(children(node, name))
    for part, kind in ((actions, h5py.Dataset), (obs, h5py.Group)):
        if not isinstance(parts[part], kind):
            holds = f"a group of {few(parts[part])}" if kind is h5py.Dataset else "an array"
            wanted = "one array (T, A)" if kind is h5py.Dataset else "a group of observations"
            raise UserError(f"{name}: '{part}' is {holds}, write {wanted}")
    notes, found = [], {f"{inside}/{obs}/{key}": x for key, x in walk(parts[obs], f"{name}: {obs}")}
    names = short_names([key.removeprefix(f"{inside}/{obs}/") for key in found])
    env = json_of(nodes, "env_args", notes)
    kwargs = env.get("env_kwargs") if isinstance(env.get("env_kwargs"), dict) else {}
    rates = (attribute(nodes, "fps"), env.get("control_freq"), kwargs.get("control_freq"))
    rate = next((rate for rate in rates if rate is not None), None)
    samples = attribute(nodes[:1], "num_samples")       # on the data group it would be another number
    beside = {key: x for key, x in parts.items() if key not in (actions, obs)}
    steps = {key: x for key, x in beside.items() if isinstance(x, h5py.Dataset) and x.shape}
    return Episode(
        file=str(path), name=name, actions=describe(f"{inside}/{actions}", parts[actions], name),
        obs={key: describe(at, x, name) for key, (at, x) in zip(names, found.items())},
        labels={key: describe(f"{inside}/{key}", x, name) for key, x in steps.items()},
        unread={key: "a group" if isinstance(x, h5py.Group) else "one value for all steps"
                for key, x in beside.items() if key not in steps and key not in INSTRUCTIONS},
        num_samples=None if samples is None else number(samples, f"{name}: num_samples"),
        fps=None if rate is None else number(rate, f"{name}: fps"),
        instruction=instruction_of(nodes, name, notes) or instruction,
        action_names=names_of(nodes, name, "action_names", "joint_names"), notes=notes, **more)


# ---- arrays


def children(group, where):
    """(name, array or group) of everything in a group. Raises UserError for a link that leads nowhere."""
    for key in group:
        try:
            node = group[key]
        except (KeyError, OSError):
            link = group.get(key, getlink=True)
            to = getattr(link, "filename", None) or getattr(link, "path", "what is not there")
            raise UserError(f"{where}: {one_line(key, 40)} is a broken link to {one_line(to, 80)}: put that "
                            f"back, or delete the link") from None
        if isinstance(node, (h5py.Dataset, h5py.Group)):
            yield key, node


def walk(group, where, above="", depth=0):
    """(path from `group` on, array) of all arrays in it and in its groups."""
    if depth > DEEPEST:
        raise UserError(f"{where} has groups in groups beyond {DEEPEST} levels, does one hold itself?")
    for key, node in children(group, where):
        if isinstance(node, h5py.Group):
            yield from walk(node, where, f"{above}{key}/", depth + 1)
        else:
            yield above + key, node


def short_names(paths):
    """An array goes by its last name where that is the only one, by its path where several are called so. The
    pictures of ALOHA, images/<camera>, keep the last name beside, say, depth/<camera>."""
    short = {path: path.removeprefix("images/") for path in paths}
    last = {path: name.rpartition("/")[2] for path, name in short.items()}
    count = collections.Counter(last.values())
    for path in paths:
        plain = short[path] == last[path] and (path == last[path] or last[path] not in paths)
        yield last[path] if plain or count[last[path]] == 1 else path


def describe(path, dataset, where):
    """The Array that lies at `path`. Raises UserError where its numbers are not all there."""
    shape, dtype = dataset.shape or (), dataset.dtype
    check_sources(dataset, f"{where}: {path}")
    if "/images/" in path and shape and (dtype.kind in "SO" or dtype == np.uint8 and len(shape) == 2):
        return Array(path, shape, dtype, "jpeg")
    kind, why = kind_of(path, shape, dtype)
    names = names_of([dataset], f"{where}: {path}", "names")
    if kind == "camera" and "/observations/" in path and "/images/" not in path:
        kind, why = "other", "not in observations/images"      # depth in false colours, a segmentation
    return Array(path, shape, dtype, kind, why, names)


def check_sources(dataset, where, depth=0):
    """HDF5 reads zeros where the source of a virtual data set is missing or too small."""
    if not dataset.shape or not dataset.is_virtual:
        return
    mapped = 0
    for source in dataset.virtual_sources():
        file, inside = source.file_name, source.dset_name
        beside = Path(dataset.file.filename).parent / file
        path = dataset.file.filename if file == "." else beside if beside.exists() else file
        missing = f"{where}: its source {one_line(inside, 60)} in {one_line(file, 80)}"
        if not Path(path).exists():
            raise UserError(f"{missing} is missing: put that file back, or write the numbers themselves")
        try:
            with h5py.File(path, "r") as other:
                found = other[inside]
                if too_small(found, source):
                    raise UserError(f"{missing} is {found.shape}, which is less than is taken from it")
                if depth < DEEPEST:
                    check_sources(found, where, depth + 1)
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{missing} cannot be read: {one_line(error, 120)}") from None
        mapped += source.vspace.get_select_npoints()
    if mapped < dataset.size:
        raise UserError(f"{where}: its sources have {mapped} of {dataset.size} numbers, the rest is nowhere")


def too_small(found, source):
    """Whether an array has less than a virtual data set takes from it."""
    if source.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        return found.size < source.vspace.get_select_npoints()
    _, last = source.src_space.get_select_bounds()
    return len(last) != len(found.shape) or any(i >= n for i, n in zip(last, found.shape))


# ---- attributes


def attribute(nodes, *names):
    """The first value that is not empty; None if there is none."""
    for node, key in ((node, key) for node in nodes for key in names if key in node.attrs):
        value = node.attrs[key]
        if not isinstance(value, h5py.Empty):
            return value
    return None


def number(value, where):
    """One number: as such, in an array of one element, or as a text."""
    try:
        one, = np.ravel(value)
        return float(one)
    except (TypeError, ValueError):
        raise UserError(f"{where} is {one_line(value, 60)!r}, write one number") from None


def plain(value, where):
    """One number or text that can be compared."""
    values = np.ravel(value)
    if isinstance(value, h5py.Empty) or len(values) != 1 or values.dtype.kind not in "iufbSUO":
        raise UserError(f"{where} is {one_line(value, 60)!r}, write one number or name")
    return values[0].item() if hasattr(values[0], "item") else values[0]


def texts(value, where):
    """The texts of an attribute or array: a text, bytes, or several of them."""
    found = []
    for one in np.ravel(np.asarray(value, dtype=object)):
        try:
            one = one.decode() if isinstance(one, bytes) else one
            one.encode()        # h5py leaves bytes that are no UTF-8 in a str as lone surrogates
        except (UnicodeError, AttributeError):
            raise UserError(f"{where} is {one_line(repr(one), 60)}, write a text in UTF-8") from None
        found.append(one)
    return found


def json_of(nodes, name, notes):
    """The dict of a JSON attribute; {} if there is none or it is something else, which is noted."""
    value = attribute(nodes, name)
    try:
        found = json.loads(value) if value is not None else {}
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"attribute '{name}' is no JSON object and is not read")
        return {}
    return found


def instruction_of(nodes, where, notes):
    """The instruction of the innermost node that has one; "" if none has."""
    for node in nodes:
        said = attribute([node], *INSTRUCTIONS)
        inside = [node[key] for key in INSTRUCTIONS if isinstance(node.get(key), h5py.Dataset)]
        inside = [x for x in inside if h5py.check_string_dtype(x.dtype) and x.shape is not None]
        said = inside[0][()] if said is None and inside else said
        if said is None:        # RoboCasa, LIBERO
            said = json_of([node], "ep_meta", notes).get("lang")
        if said is None:        # LIBERO may have it in letters, which belong together
            said = json_of([node], "problem_info", notes).get("language_instruction")
            said = "".join(said) if isinstance(said, list) and all(isinstance(s, str) for s in said) else said
        found = [] if said is None else texts(said, f"{where}: the instruction")
        found = [text for text in dict.fromkeys(found) if text.strip()]
        if len(found) > 1:
            notes.append(f"the instruction is said in {len(found)} ways, the first is taken")
        if found:
            return found[0]
    return ""


def names_of(nodes, where, *attributes):
    """Names of numbers: an attribute that is a list of texts, or one text in JSON; [] if there is none."""
    value = attribute(nodes, *attributes)
    found = [] if value is None else texts(value, f"{where}: {attributes[0]}")
    if len(found) == 1 and found[0].lstrip().startswith("["):
        try:
            found = [str(name) for name in json.loads(found[0])]
        except (ValueError, RecursionError):
            text = one_line(found[0], 60)
            raise UserError(f"{where}: {attributes[0]} is {text!r}, no list of names") from None
    return found
