"""Flags of a command. Each of their mistakes is one line that names the flag."""
import argparse
import math
import os
import sys

from .errors import UserError, nearest, one_line

SEEDS = (0, 2**32 - 1)          # as NumPy's: whatever a seed is multiplied with here still fits into 64 bits


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose mistakes are UserErrors that name the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{one_line(message, 300)}; see {self.prog} --help") from None

    def parse(self, argv, ranges=None):
        """ranges {flag: (least, most)} of the numbers among them."""
        argv = sys.argv[1:] if argv is None else argv
        for word in argv:
            if word.startswith("--") and word.endswith("=--"):      # argparse makes an empty list of it
                self.error(f"argument {word[:-3]}: -- is no value")
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [name.lstrip("-") for action in self._actions for name in action.option_strings]
            name = one_line(unknown[0].split("=")[0], 100)
            guess = nearest(name.lstrip("-"), flags)
            raise UserError(f"unknown argument {name}{guess}; see {self.prog} --help")
        check_ranges(vars(args), ranges or {})
        return args


def check_ranges(values, ranges):
    """values {name: number, or several}: each of `ranges` {name: (least, most)} is finite and within them."""
    for name, (least, most) in ranges.items():
        value = values.get(name)
        for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if not (least <= number <= most and math.isfinite(number)):
                limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise UserError(f"--{name} {number} must be {limit}")


def environ_number(name, default):
    """A whole number, at least 0, from an environment variable: torchrun sets these."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={one_line(text, 60)} in the environment is no whole number: leave it to "
                        f"torchrun")
    return int(text)
