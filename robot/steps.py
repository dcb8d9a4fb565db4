"""Steps between a robot's numbers and a network's; processing.py puts them together.

Each changes the last axis of a float64 tensor, and knows its inverse. A step has parse(spec, where),
width(dim, where) -> numbers after it, do(x), which may raise UserError, and undo(x). A new one is such a
class and a line in STEPS.
"""
from dataclasses import dataclass

import torch

from .errors import UserError, hint, one_line
from .rotations import FORMS, convert, no_rotation

# ----------------------------------------------------------------------------------------------------------
# The steps


@dataclass
class Linear:
    """y = x factor + offset at these numbers: units, gripper scales, signs of joints (factor -1)."""
    at: list
    factor: list
    offset: list

    @classmethod
    def parse(cls, spec, where):
        check_keys(spec, where, ("at", "factor"), ("offset",))
        at = indices(spec["at"], f"{where}: at")
        factor, offset = (numbers(spec.get(key, 0), len(at), f"{where}: {key}")
                          for key in ("factor", "offset"))
        if 0 in factor:
            raise UserError(f"{where}: factor: 0 cannot be undone")
        return cls(at, factor, offset)

    def width(self, dim, where):
        within(self.at, dim, where)
        return dim

    def do(self, x):
        return changed(x, self.at, lambda y: y * y.new_tensor(self.factor) + y.new_tensor(self.offset))

    def undo(self, x):
        return changed(x, self.at, lambda y: (y - y.new_tensor(self.offset)) / y.new_tensor(self.factor))


@dataclass
class AlohaGripper:
    """ALOHA's gripper, from what its driver reports (0 closed, 1 open: metres, scaled) to the angle of its
    motor, 0 to 1 of the range that pi0 was trained on. A horn on the motor moves the fingers by an arm: gap,
    horn and arm are a triangle. openpi's aloha_policy.py (src/openpi/policies), which clips the sine too."""
    at: list
    HORN, ARM = 0.022, 0.036                    # m
    OPEN, CLOSED = 0.058, 0.01844               # m, what the driver calls 1 and 0
    LOW, HIGH = 0.5476, 1.6296                  # rad, what pi0 calls 0 and 1

    @classmethod
    def parse(cls, spec, where):
        check_keys(spec, where, ("at",))
        return cls(indices(spec["at"], f"{where}: at"))

    def width(self, dim, where):
        within(self.at, dim, where)
        return dim

    def do(self, x):
        def angle(reported):
            gap = reported * (self.OPEN - self.CLOSED) + self.CLOSED
            sine = (self.HORN**2 + gap**2 - self.ARM**2) / (2 * self.HORN * gap)
            return (sine.clamp(-1, 1).asin() - self.LOW) / (self.HIGH - self.LOW)
        return changed(x, self.at, angle)

    def undo(self, x):
        def reported(angle):
            sine = (angle * (self.HIGH - self.LOW) + self.LOW).sin()
            gap = self.HORN * sine + (self.ARM**2 - self.HORN**2 * (1 - sine**2)).sqrt()
            return (gap - self.CLOSED) / (self.OPEN - self.CLOSED)
        return changed(x, self.at, reported)


@dataclass
class Rotation:
    """A rotation that begins at number `at`, in another form; see rotations.py."""
    at: int
    source: str
    target: str

    @classmethod
    def parse(cls, spec, where):
        check_keys(spec, where, ("at", "from", "to"))
        for key in ("from", "to"):
            if spec[key] not in list(FORMS):            # a list: what stands there may be no text
                raise UserError(f"{where}: {key}: {one_line(repr(spec[key]), 60)} is no form of a rotation"
                                f"{hint(spec[key], FORMS)}")
        if type(spec["at"]) is not int:
            raise UserError(f"{where}: at: {one_line(repr(spec['at']), 60)} should be its first number")
        return cls(*indices(spec["at"], f"{where}: at"), spec["from"], spec["to"])

    def width(self, dim, where):
        within([self.at + FORMS[self.source] - 1], dim, f"{where}: {self.source} from {self.at} on")
        return dim + FORMS[self.target] - FORMS[self.source]

    def replace(self, x, source, target):
        before, part, after = x.split([self.at, FORMS[source], x.shape[-1] - self.at - FORMS[source]], -1)
        return torch.cat([before, convert(part, source, target), after], -1)

    def do(self, x):
        part = x[..., self.at:self.at + FORMS[self.source]]
        wrong = no_rotation(part, self.source).flatten()
        if wrong.any():
            row = int(wrong.nonzero()[0])
            shown = ", ".join(f"{v:.3g}" for v in part.reshape(len(wrong), -1)[row].tolist())
            raise UserError(f"[{shown}] (row {row}) is no rotation, {self.source}: correct the data, or the "
                            f"form and place that processing: names")
        return self.replace(x, self.source, self.target)

    def undo(self, x):
        return self.replace(x, self.target, self.source)


@dataclass
class RobosuiteAxisAngle:
    """A quaternion (x, y, z, w) that begins at number `at`, as angle times axis. As robosuite's
    quat2axisangle, on which LIBERO's policies are trained: w keeps its sign, so that the angle is 0 to 2 pi,
    and the two quaternions of a rotation give two vectors. (`rotation` gives one.)"""
    at: int

    @classmethod
    def parse(cls, spec, where):
        check_keys(spec, where, ("at",))
        return cls(indices(spec["at"], f"{where}: at")[0])

    def width(self, dim, where):
        within([self.at + 3], dim, where)
        return dim - 1

    def do(self, x):
        before, axis, w, after = x.split([self.at, 3, 1, x.shape[-1] - self.at - 4], -1)
        w = w.clamp(-1, 1)
        length = (1 - w * w).sqrt()                 # 0: no turn, whatever the axis
        turn = torch.where(length == 0, 0.0, axis * 2 * w.acos() / length)
        return torch.cat([before, turn, after], -1)

    def undo(self, x):
        before, turn, after = x.split([self.at, 3, x.shape[-1] - self.at - 3], -1)
        half = turn.norm(dim=-1, keepdim=True) / 2
        return torch.cat([before, turn / 2 * torch.sinc(half / torch.pi), half.cos(), after], -1)


STEPS = {"linear": Linear, "rotation": Rotation, "aloha_gripper": AlohaGripper,
         "robosuite_axis_angle": RobosuiteAxisAngle}


def changed(x, at, function):
    x = x.clone()
    x[..., at] = function(x[..., at])
    return x


# ----------------------------------------------------------------------------------------------------------
# Reading the description


def check_keys(spec, where, needed, optional=()):
    """UserError unless spec is a dict with the `needed` keys and no others than these and the `optional`:
    what is not known would be left out in silence."""
    known = (*needed, *optional)
    if not isinstance(spec, dict):
        raise UserError(f"{where}: {one_line(repr(spec), 60)} should be KEY: VALUE with {', '.join(known)}")
    for key in spec:
        if key not in known:
            raise UserError(f"{where}: unknown key {one_line(repr(key), 60)}{hint(key, known)}")
    for key in needed:
        if key not in spec:
            raise UserError(f"{where}: lacks {key!r}")


def indices(value, where):
    """`at:` of a step: which numbers of a vector, one or several, none twice -> a list of indices."""
    found = value if isinstance(value, list) else [value]
    if not found or not all(type(n) is int and n >= 0 for n in found) or len(set(found)) < len(found):
        raise UserError(f"{where}: {one_line(repr(value), 60)} should say which numbers, counted from 0, for "
                        f"example [6, 13]")
    return found


def numbers(value, n, where):
    """n numbers, or one that counts for all."""
    found = value if isinstance(value, list) else [value] * n
    if len(found) != n or not all(type(x) in (int, float) and abs(x) < 1e30 for x in found):
        raise UserError(f"{where}: {one_line(repr(value), 60)} should be a number, or a list of {n}")
    return [float(x) for x in found]


def within(at, dim, where):
    if max(at, default=-1) >= dim:
        raise UserError(f"{where}: number {max(at)} does not exist, there are {dim}, counted from 0")


def parse_steps(spec, where):
    """[{name: {..}}, ..] -> [(step, where it stands)]"""
    if not isinstance(spec, list):
        raise UserError(f"{where}: should be a list of steps, - NAME: {{..}}, with {', '.join(STEPS)}")
    steps = []
    for i, item in enumerate(spec):
        at = f"{where}: step {i + 1}"
        if not isinstance(item, dict) or len(item) != 1:
            raise UserError(f"{at}: {one_line(repr(item), 60)} should be one step, NAME: {{..}}")
        (name, values), = item.items()
        if name not in STEPS:
            late = " (delta comes last, and only among the actions)" if name == "delta" else ""
            raise UserError(f"{at}: {one_line(repr(name), 60)} is no step{late}{hint(name, STEPS)}")
        steps.append((STEPS[name].parse(values, f"{at} ({name})"), f"{at} ({name})"))
    return steps


def part(spec, key):
    found = spec.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"processing: {key}: {one_line(repr(found), 60)} should be KEY: VALUE")
    return found


def do(steps, x, name):
    """x after all steps, float32; `name` says in an error what it is."""
    x = x.double()
    try:
        for step, _ in steps:
            x = step.do(x)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return x.float()


def undo(steps, x):
    x = x.double()
    for step, _ in reversed(steps):
        x = step.undo(x)
    return x.float()
