"""Which arrays of the episodes are used, and what becomes of the others."""
import math
from dataclasses import dataclass

from robot.errors import UserError, nearest, one_line
from robot.steps import check_keys

# Names that a batch already has, see data.Windows.
TAKEN = ("actions", "action_mask", "state", "images", "text", "control_hz", "action_valid", "state_valid")

# States that only a simulator knows: robomimic's name of them, and LeRobot's.
SIMULATED = ("object", "observation.environment_state")

LINE = 380                      # characters of a line that is meant to be read


@dataclass
class Keys:
    state: list                 # in the order in which they stand side by side
    cameras: list
    unused: dict                # name -> why

    def lines(self, labels=()):
        """"used: a, b; not used: c (why), d, e (why)", on more than one line where that is too long."""
        reasons = {}
        for key, why in self.unused.items():
            if key not in labels:
                reasons.setdefault(why, []).append(one_line(key, 60))
        used = fill("used: ", [one_line(key, 60) for key in ["actions", *self.state, *self.cameras, *labels]])
        left = fill("not used: ", [f"{', '.join(keys[i:i + 4])} ({why})" for why, keys in reasons.items()
                                   for i in range(0, len(keys), 4)])
        whole = "; ".join(used + left)
        return [whole] if len(whole) < LINE else used + left


def fill(title, items):
    """Lines of at most LINE characters that name all items."""
    lines = []
    for item in items:
        if lines and len(lines[-1]) + len(item) < LINE - 2:
            lines[-1] += f", {item}"
        else:
            lines.append(title + item)
    return lines


def sort_keys(episodes, obs, text=False, extra=()):
    """Keys by their kind in all episodes, as far as the first one has them. obs, text: see open_demos."""
    first, kinds = episodes[0], {}
    for e in episodes:
        for key, array in e.obs.items():
            if kinds.get(key, "other") == "other":
                kinds[key] = array.kind
    keys = Keys([], [], {})
    for key in sorted(kinds):
        why = ""
        if key not in first.obs:
            why = f"{first.name} lacks it"
        elif kinds[key] == "other":
            why = first.obs[key].why
        elif kinds[key] != "state":
            why = "" if obs == "image" else "a camera: obs=image sees it"
        elif key in extra:          # a policy that was shown what it has to tell would learn nothing
            why = "a label"
        elif key in SIMULATED and obs == "image":
            why = "only a simulator knows it"
        elif key == "goal" and obs == "image" and text:     # which says in numbers what that says in words
            why = "the instruction says it"
        if why:
            keys.unused[key] = why
        else:
            (keys.state if kinds[key] == "state" else keys.cameras).append(key)
    return keys


def beside(first):
    """{name: why} of what lies beside the actions and is not used unless it is named."""
    return {key: "not an observation; a label if extra names it" for key in first.labels} | first.unread


def choose_keys(episodes, obs, text, shape_meta, extra):
    """Keys: named by shape_meta, or else found by their kind. Raises UserError."""
    first = episodes[0]
    if shape_meta:
        keys = keys_of_shape_meta(first, shape_meta)
        named = {*keys.state, *keys.cameras}
        keys.unused = {key: "not in shape_meta" for key in first.obs if key not in named}
    else:
        if obs == "auto":
            obs = "image" if any(x.is_camera for x in first.obs.values()) else "lowdim"
        if obs not in ("lowdim", "image"):
            raise UserError(f"obs is 'lowdim' or 'image', not {obs!r}{nearest(obs, ('lowdim', 'image'))}")
        keys = sort_keys(episodes, obs, text, extra)
        if not (keys.cameras if obs == "image" else keys.state):
            wanted = "camera, uint8 (T, H, W, 3)" if obs == "image" else "state, float (T, D)"
            has = [f"{key} ({why})" for key, why in keys.unused.items()]
            raise UserError(f"{first.name} has no {wanted}, which the policy needs; its observations: "
                            + one_line(", ".join([*keys.state, *has]) or "none"))
    keys.unused |= beside(first)
    return keys


def check_shape_meta(meta):
    """Raises UserError unless meta is {"obs": {key: {"shape": [..], "type": "rgb" or "low_dim"}}, "action":
    {"shape": [..]}}; `type` and `action` may be left out."""
    check_keys(meta, "shape_meta", (), ("obs", "action"))
    if not meta.get("obs"):
        raise UserError("shape_meta: names no observation; leave it out to take all, or add obs: {KEY: ..}")
    if not isinstance(meta["obs"], dict):
        raise UserError(f"shape_meta: obs: {one_line(repr(meta['obs']), 60)} should be KEY: {{shape: ..}}")
    parts = {"action": meta["action"]} if "action" in meta else {}
    parts |= {f"obs: {key}": part for key, part in meta["obs"].items()}
    for name, part in parts.items():
        check_keys(part, f"shape_meta: {name}", (), ("shape",) if name == "action" else ("shape", "type"))
        shape, kind = part.get("shape"), part.get("type", "low_dim")
        if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n > 0 for n in shape):
            raise UserError(f"shape_meta: {name}: shape should be a list such as [3] or, of a camera, "
                            f"[3, H, W], not {one_line(repr(shape), 60)}")
        if kind not in ("rgb", "low_dim"):
            raise UserError(f"shape_meta: {name}: type is rgb or low_dim, not {one_line(repr(kind), 60)}")


def keys_of_shape_meta(first, shape_meta):
    check_shape_meta(shape_meta)
    wanted = {key: (m.get("type", "low_dim"), tuple(m["shape"])) for key, m in shape_meta["obs"].items()}
    actions = tuple(shape_meta["action"]["shape"]) if "action" in shape_meta else first.actions.shape[1:]
    if actions != first.actions.shape[1:]:
        raise UserError(f"shape_meta: actions have shape {list(actions)}, but in {first.name} "
                        f"{list(first.actions.shape[1:])}: correct it")
    for key, (kind, shape) in wanted.items():
        array = first.obs.get(key)
        if array is None or (kind, array.kind) == ("rgb", "jpeg"):
            continue                    # `faults` names a missing key; JPEGs show their size once decoded
        has = (3, *array.shape[1:3]) if kind == "rgb" else array.shape[1:] or (1,)
        if kind == "rgb" and array.kind == "camera" and shape[:1] == (3,) and len(shape) == 3:
            continue                    # open_demos compares the size, when pictures may have been resized
        if shape != has or (kind == "rgb") != (array.kind == "camera"):
            has = f"{one_line(array.dtype, 60)} {list(array.shape[1:])}"
            raise UserError(f"shape_meta: '{key}' is {kind} {list(shape)}, but in {first.name} {has} per "
                            f"step: correct it (rgb is [3, H, W])")
    return Keys(*[[key for key in wanted if wanted[key][0] == kind] for kind in ("low_dim", "rgb")], {})


def check_extra(extra):
    for name, dim in extra.items():
        if name in TAKEN:
            raise UserError(f"extra: a batch has its own '{name}': give the label another name in the file")
        if type(dim) is not int or dim < 1:
            raise UserError(f"extra: {name}: {dim!r} should be how many numbers a step has, for example 1")


def width(array):
    """Numbers per step."""
    return math.prod(array.shape[1:])
