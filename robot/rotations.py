"""Rotations in the forms that robots and networks use."""


def convert(x, source, target):
    """(..., numbers of source) -> (..., numbers of target), float64, by way of the matrix."""
    raise NotImplementedError


def width(form):
    """How many numbers a form has."""
    raise NotImplementedError


def check_rotations(x, form, where):
    """UserError for what is no rotation."""
    raise NotImplementedError
