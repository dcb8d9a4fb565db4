"""The equations of a model file: what its docstring states, and which lines carry their numbers."""
import ast
import io
import re
import tokenize
from pathlib import Path

from robot.models import MODELS

TAG = r"(?<![\w\])])\[(\d+)\]"  # [3], but neither x[3] nor f()[3] nor [3][3]


def stated(source):
    """{number: its first line in the docstring of a model file}"""
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    return {int(n): re.sub(r"\s{2,}", "   ", text.strip())
            for n, text in re.findall(r"^ +\[(\d+)\] +(.*)", docstring, re.M)}


def tagged(source):
    """{line: numbers that its comment carries}. A number counts behind code, or in a comment at the margin
    which stands above a definition; one in the middle of a sentence only refers to it."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        numbers = [int(n) for n in re.findall(TAG, token.string)] if token.type == tokenize.COMMENT else []
        if numbers and (token.line[:token.start[1]].strip() or token.start[1] == 0):
            found[token.start[0]] = numbers
    return found


def equations(source):
    """-> [(number, text, lines that carry it)]"""
    lines = tagged(source)
    return [(n, text, [line for line, numbers in lines.items() if n in numbers])
            for n, text in stated(source).items()]


def equation_map(folder):
    """EQUATIONS.md: a table per model file."""
    out = ["# From the papers' equations to the code", "",
           "The equations that open each model file (first line of each) and the lines that carry their",
           "number. Made by `python -m tools.explain --map > EQUATIONS.md`; a test compares."]
    for name in MODELS:
        path = Path(folder) / f"{name}.py"
        if path.exists():
            out += ["", f"## [{name}.py]({name}.py)", "", "| | equation | lines |", "|---|---|---|"]
            for n, text, lines in equations(path.read_text(encoding="utf-8")):
                text = text.replace("|", "\\|")
                links = ", ".join(f"[{line}]({name}.py#L{line})" for line in lines)
                out.append(f"| [{n}] | `{text}` | {links} |")
    return "\n".join(out) + "\n"


def statements(source):
    """{line: (first line, last line, names it assigns)} of the statement that a line belongs to; of a
    compound statement (for, if, with) its head."""
    found = {}
    for node in ast.walk(ast.parse(source)):        # outer ones come first and are overwritten by inner ones
        if isinstance(node, ast.stmt):
            last = node.body[0].lineno - 1 if getattr(node, "body", None) else node.end_lineno
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]
            for line in range(node.lineno, last + 1):
                found[line] = (node.lineno, last, names)
    return found


def computed(source):
    """{line: (first line, last line, names it assigns, numbers)} of the statements that carry a number."""
    of, found, lines = statements(source), {}, source.splitlines()
    for line, numbers in tagged(source).items():
        start = line
        while lines[line - 1].startswith("#"):      # at the margin: it means what is defined below
            line += 1
        first, last, names = of[line]
        # A table of lambdas at the margin: the number of one line is not that of the others.
        spread = start != line or lines[first - 1].startswith(" ")
        for n in range(first, last + 1) if spread else [line]:
            known = found.get(n, (0, 0, [], []))[3]
            found[n] = (first, last, names, known + [m for m in numbers if m not in known])
    return found
