"""robot/rotations.py: what each form means, and that all of them mean the same rotation."""
import math

import pytest
import torch

from robot.rotations import FORMS, convert, from_matrix, no_rotation, to_matrix


def angles_near_0_and_pi():
    """Axis-angle vectors: 200 random ones, and turns of almost and exactly 0 and pi about random axes."""
    draw = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(200, 3, generator=draw, dtype=torch.float64), dim=-1)
    angle = math.pi * torch.rand(200, 1, generator=draw, dtype=torch.float64)
    near = torch.tensor([0, 1e-12, 1e-9, 1e-6, 1e-4, math.pi, math.pi - 1e-9, math.pi - 1e-6, math.pi - 1e-3])
    return torch.cat([axis * angle, *(axis[:20] * a for a in near.double())])


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_is_the_same_rotation(form):
    x = angles_near_0_and_pi()
    matrix = to_matrix(x, "axis_angle")
    assert (matrix @ matrix.mT - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-12
    assert (torch.linalg.det(matrix) - 1).abs().max() < 1e-12
    y = from_matrix(matrix, form)
    assert y.shape == (len(x), FORMS[form]) and not no_rotation(y, form).any()
    assert (to_matrix(y, form) - matrix).abs().max() < 1e-7
    assert (to_matrix(y.float().double(), form) - matrix).abs().max() < 1e-6          # stored as float32


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("euler")])
def test_euler_angles_where_two_axes_fall_together(form):
    """b a quarter turn (0 for xyx and its like): a and c are not known apart, the rotation is."""
    edge = [0.0, math.pi] if form.split("_")[1][0] == form.split("_")[1][2] else [math.pi / 2, -math.pi / 2]
    x = torch.tensor([[a, b, c] for a in (-2.0, 0.3) for b in edge for c in (-1.0, 0.0, 2.5)]).double()
    matrix = to_matrix(x, form)
    back = from_matrix(matrix, form)
    assert back.isfinite().all() and (to_matrix(back, form) - matrix).abs().max() < 1e-6


def test_a_quarter_turn_about_z_in_every_form():
    """It takes x to y, and y to -x."""
    half = math.sqrt(0.5)
    by_hand = {"quaternion_wxyz": [half, 0, 0, half], "quaternion_xyzw": [0, 0, half, half],
               "axis_angle": [0, 0, math.pi / 2], "matrix": [0, -1, 0, 1, 0, 0, 0, 0, 1],
               "rotation_6d": [0, -1, 0, 1, 0, 0], "rotation_6d_columns": [0, 1, 0, -1, 0, 0],
               "euler_xyz_intrinsic": [0, 0, math.pi / 2], "euler_zyx_extrinsic": [math.pi / 2, 0, 0]}
    for form, numbers in by_hand.items():
        x = torch.tensor(numbers, dtype=torch.float64)
        turned = to_matrix(x, form) @ torch.tensor([1.0, 0, 0]).double()
        assert torch.allclose(turned, torch.tensor([0, 1.0, 0]).double(), atol=1e-12), form
        for other, want in by_hand.items():
            want = torch.tensor(want, dtype=torch.float64)
            assert torch.allclose(convert(x, form, other), want, atol=1e-9), (form, other)


def test_the_order_of_turns():
    """A quarter turn about x, then one about z. The first takes y to z, where the room's z axis leaves it.
    About the body's z axis, which lies along -y by then, it goes on to -x."""
    x = torch.tensor([math.pi / 2, 0, math.pi / 2], dtype=torch.float64)
    y = torch.tensor([0, 1.0, 0]).double()
    assert torch.allclose(to_matrix(x, "euler_xyz_extrinsic") @ y, torch.tensor([0, 0, 1.0]).double())
    assert torch.allclose(to_matrix(x, "euler_xyz_intrinsic") @ y, torch.tensor([-1.0, 0, 0]).double())


def test_six_numbers_out_of_a_network_become_a_rotation():
    """The direction of the first three is kept, the others are turned at a right angle to it."""
    x = torch.tensor([[3.0, 0, 0, 5.0, 2.0, 0]]).double()
    assert torch.allclose(to_matrix(x, "rotation_6d"), torch.eye(3).double())
    assert torch.allclose(to_matrix(2 * x, "rotation_6d_columns"), torch.eye(3).double())


@pytest.mark.parametrize("form, numbers, wrong", [
    ("quaternion_wxyz", [0, 0, 0, 0], True), ("quaternion_xyzw", [0, 0, 0, 1.005], False),
    ("quaternion_xyzw", [0.5, 0.5, 0.5, 0.8], True), ("axis_angle", [0, 90.0, 0], True),
    ("axis_angle", [0, 6.28, 0], False), ("euler_xyz_intrinsic", [0, 45.0, 0], True),
    ("rotation_6d", [1, 0, 0, 0, 1, 0], False), ("rotation_6d", [1, 0, 0, 1, 0, 0], True),
    ("rotation_6d_columns", [2, 0, 0, 0, 1, 0], True), ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, 1], False),
    ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, -1], True), ("matrix", [1, 0, 0, 0, 1, 0, 0, 0.1, 1], True)])
def test_no_rotations(form, numbers, wrong):
    rows = torch.tensor([FORMS[form] * [0.0], numbers], dtype=torch.float32)
    assert no_rotation(rows, form)[1].item() == wrong
