"""Rotations in the forms that robots and networks use. Every conversion goes through the matrix.

    quaternion_wxyz, _xyzw    real part first or last. Of any length but 0 on the way in; on the way out of
                              length 1, and its largest component is positive (not always the real part)
    axis_angle                angle (rad) times axis. On the way out the angle is 0 to 2 pi, since it follows
                              that quaternion
    matrix                    nine numbers, row by row
    rotation_6d               the first two rows of the matrix, one after the other (Diffusion Policy)
    rotation_6d_columns       its first two columns, one after the other (RDT)
    euler_xyz_intrinsic       three angles (rad) about the axes named, in this order, each about the axis as
                              the turns before have left it: Rx(a) Ry(b) Rz(c). All twelve orders
    euler_xyz_extrinsic       ... each about the axes that stand still: Rz(c) Ry(b) Rx(a)

All are right-handed: a positive angle about z takes x to y. Matrices turn column vectors. One rotation can
have two quaternions, angles or vectors (q and -q, a full turn apart): what is converted there and back is the
same rotation, not always the same numbers. The choices are those of pytorch3d
(transforms/rotation_conversions.py), which Diffusion Policy uses.
"""
import itertools

import torch
import torch.nn.functional as F

ORDERS = ["".join(axes) for axes in itertools.product("xyz", repeat=3)
          if axes[0] != axes[1] and axes[1] != axes[2]]
FORMS = {"quaternion_wxyz": 4, "quaternion_xyzw": 4, "axis_angle": 3, "matrix": 9, "rotation_6d": 6,
         "rotation_6d_columns": 6} | {
    f"euler_{order}_{kind}": 3 for order in ORDERS for kind in ("intrinsic", "extrinsic")}
TOLERANCE = 0.01                # of what is still a rotation: lengths and right angles


def convert(x, source, target):
    """(..., FORMS[source]) -> (..., FORMS[target]), float64."""
    return from_matrix(to_matrix(x.double(), source), target)


def to_matrix(x, form):
    """(..., FORMS[form]) float64 -> (..., 3, 3). Six numbers need not be at right angles, nor of length 1:
    Gram-Schmidt makes them so, since they may come out of a network."""
    if form == "matrix":
        return x.unflatten(-1, (3, 3))
    if form == "quaternion_xyzw":
        return matrix_of_quaternion(x.roll(1, -1))
    if form == "quaternion_wxyz":
        return matrix_of_quaternion(x)
    if form == "axis_angle":
        half = x.norm(dim=-1, keepdim=True) / 2
        return matrix_of_quaternion(torch.cat([half.cos(), x / 2 * torch.sinc(half / torch.pi)], -1))
    if form.startswith("rotation_6d"):
        first, second = x[..., :3], x[..., 3:]
        first = F.normalize(first, dim=-1)
        second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
        rows = torch.stack([first, second, torch.linalg.cross(first, second)], -2)
        return rows if form == "rotation_6d" else rows.mT
    axes, intrinsic = axes_of(form)
    a, b, c = (turn(axis, x[..., i]) for i, axis in enumerate(axes))
    return a @ b @ c if intrinsic else c @ b @ a


def from_matrix(matrix, form):
    """The inverse of to_matrix."""
    if form == "matrix":
        return matrix.flatten(-2)
    if form.startswith("rotation_6d"):
        return (matrix if form == "rotation_6d" else matrix.mT)[..., :2, :].flatten(-2)
    if form.startswith("euler"):
        axes, intrinsic = axes_of(form)
        return euler_angles(matrix, *axes) if intrinsic else euler_angles(matrix, *axes[::-1]).flip(-1)
    q = quaternion_of_matrix(matrix)
    if form == "quaternion_wxyz":
        return q
    if form == "quaternion_xyzw":
        return q.roll(-1, -1)
    real, axis = q[..., :1], q[..., 1:]
    sine = axis.norm(dim=-1, keepdim=True)
    ratio = 2 * torch.atan2(sine, real) / sine.clamp(min=1e-300)
    return axis * torch.where(sine < 1e-12, 2.0, ratio)         # the limit of no turn at all


def matrix_of_quaternion(q):
    w, x, y, z = q.unbind(-1)
    s = 2 / (q * q).sum(-1)
    rows = [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
            s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
            s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quaternion_of_matrix(matrix):
    """(..., 3, 3) -> (..., 4), w x y z. Each row below is 4 q_i q; that of the largest q_i is taken, so that
    nothing small is divided by."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = matrix.flatten(-2).unbind(-1)
    rows = torch.stack([1 + xx + yy + zz, zy - yz, xz - zx, yx - xy,
                        zy - yz, 1 + xx - yy - zz, yx + xy, xz + zx,
                        xz - zx, yx + xy, 1 - xx + yy - zz, yz + zy,
                        yx - xy, zx + xz, zy + yz, 1 - xx - yy + zz], -1).unflatten(-1, (4, 4))
    squares = rows.diagonal(dim1=-2, dim2=-1)                               # 4 q_i^2
    largest = squares.argmax(-1, keepdim=True)
    row = rows.gather(-2, largest[..., None].expand(*largest.shape, 4)).squeeze(-2)
    return row / (2 * squares.gather(-1, largest).clamp(min=0.1).sqrt())


def axes_of(form):
    _, order, kind = form.split("_")
    return ["xyz".index(axis) for axis in order], kind == "intrinsic"


def turn(axis, angle):
    """Rotation about one axis: (...) -> (..., 3, 3)."""
    matrix = torch.eye(3, dtype=angle.dtype).expand(*angle.shape, 3, 3).clone()
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., i, i] = matrix[..., j, j] = angle.cos()
    matrix[..., i, j], matrix[..., j, i] = -angle.sin(), angle.sin()
    return matrix


def euler_angles(m, i, j, k):
    """Angles a, b, c with m = R_i(a) R_j(b) R_k(c). Where the first and the last axis fall together (b a
    quarter turn, or, for k = i, none), only their sum is known: then c is 0."""
    other = 3 - i - j
    sign = 1.0 if (j - i) % 3 == 1 else -1.0                    # whether i, j, other is a right-handed order
    if k == i:
        small = torch.hypot(m[..., i, j], m[..., i, other])
        b = torch.atan2(small, m[..., i, i])
        a = torch.atan2(m[..., j, i], -sign * m[..., other, i])
        c = torch.atan2(m[..., i, j], sign * m[..., i, other])
    else:
        small = torch.hypot(m[..., i, i], m[..., i, j])
        b = torch.atan2(sign * m[..., i, k], small)
        a = torch.atan2(-sign * m[..., j, k], m[..., k, k])
        c = torch.atan2(-sign * m[..., i, j], m[..., i, i])
    locked = small < 1e-7
    a = torch.where(locked, torch.atan2(sign * m[..., other, j], m[..., j, j]), a)
    return torch.stack([a, b, torch.where(locked, 0.0, c)], -1)


def no_rotation(x, form):
    """Which of (..., FORMS[form]) are no rotations: a quaternion that is not of length 1, a matrix or six
    numbers not at right angles or mirrored, angles beyond a full turn (degrees, perhaps). -> bool (...)"""
    x = x.double()
    if form.startswith("quaternion"):
        return (x.norm(dim=-1) - 1).abs() > TOLERANCE
    if form.startswith("euler"):
        return x.abs().amax(-1) > 4 * torch.pi
    if form == "axis_angle":
        return x.norm(dim=-1) > 4 * torch.pi
    rows = x.unflatten(-1, (-1, 3))
    squares = rows @ rows.mT - torch.eye(rows.shape[-2], dtype=x.dtype)
    wrong = squares.abs().flatten(-2).amax(-1) > TOLERANCE
    return wrong | (torch.linalg.det(rows) < 0) if form == "matrix" else wrong
