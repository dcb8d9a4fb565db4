"""What holds for the project as a whole: the shape of a model file, its independence, tags, names, links."""
import ast
import dataclasses
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from robot.models import MODELS
from tools import options

ROOT = Path(options.__file__).parent.parent
FOLDERS = ("*", "robot/*", "demos/*", "tools/**/*", "examples/*", "docs/*", "tests/**/*", "configs/*",
           ".ci/*")
FILES = sorted(path for pattern in FOLDERS for path in ROOT.glob(pattern)
               if path.suffix in (".py", ".md", ".yaml", ".txt") or path.parent.name == ".ci")
named = lambda path: str(path.relative_to(ROOT))
each_model = pytest.mark.parametrize("name", MODELS)


def source(name):
    return (ROOT / f"{name}.py").read_text()


@each_model
def test_equations_of_the_docstring_are_tagged_in_the_code(name):
    text = source(name)
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    stated = [int(n) for n in re.findall(r"^ +\[(\d+)\]", docstring, re.M)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    tagged = {int(n) for comment in comments for n in re.findall(r"(?<![\w\])])\[(\d+)\]", comment)}
    assert stated == list(range(1, len(stated) + 1)) and stated, f"{name}.py numbers its equations {stated}"
    assert not set(stated) - tagged, f"{name}.py: no line carries {sorted(set(stated) - tagged)}"
    assert not tagged - set(stated), f"{name}.py: the docstring does not have {sorted(tagged - set(stated))}"


@each_model
def test_a_model_file_imports_torch_numpy_and_the_standard_library(name):
    """At its top. A function may ask for an optional package, but none for a file of this project."""
    def imported(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0] if not node.level else "."

    tree = ast.parse(source(name))
    assert set(imported(tree.body)) <= set(sys.stdlib_module_names) | {"torch", "numpy"}
    assert not set(imported(ast.walk(tree))) & {".", "tests", *(path.stem for path in ROOT.glob("*.py"))}


# Who may import whom. Model files import nothing of the project; tools may import all but make no circle.
MAY_IMPORT = {"robot": {"robot"}, "demos": {"demos", "robot"}, "data": {"demos", "robot"},
              "train": {"data", "robot", "tools"}, "sample": {"demos", "robot", "tools"},
              "tools": {"tools", "robot", "demos", "data", "train", "sample", *MODELS}, "examples": {"robot"},
              **{name: set() for name in MODELS}}
CODE = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for pattern in ("*.py", "robot/*.py", "demos/*.py", "tools/*.py", "tools/peers/*.py", "examples/*.py")
        for path in ROOT.glob(pattern)}


def imports_of(module):
    """Modules of the project that `module` imports, at its top or later inside a function."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(CODE[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, (node.module or "").split("."))])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in CODE or f"{name}.__init__" in CODE)


def test_the_top_level_holds_the_models_and_three_files():
    top = {name for name in CODE if "." not in name}
    assert top == {*MODELS, "data", "train", "sample"}


@pytest.mark.parametrize("module", sorted(CODE))
def test_imports_run_downwards(module):
    room = module.split(".")[0]
    outside = {name for name in imports_of(module) if name.split(".")[0] not in MAY_IMPORT[room]}
    assert not outside, f"{module} imports {outside}"
    if room == "robot":  # so that the folder may be copied under any name
        absolute = [node for node in ast.walk(ast.parse(CODE[module].read_text())) if isinstance(
            node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in MAY_IMPORT]
        assert not absolute, f"{module}: from {absolute[0].module}: write it as a relative import"


def test_imports_make_no_circle():
    graph = {module: {name if name in CODE else f"{name}.__init__" for name in imports_of(module)} - {module}
             for module in CODE}
    # A package's __init__ is run by whoever imports one of its modules: what it imports does not lead back.
    graph = {module: {name for name in to if not name.endswith("__init__")} for module, to in graph.items()}
    done, above = set(), []

    def visit(module):
        assert module not in above, " -> ".join([*above[above.index(module):], module])
        if module not in done:
            above.append(module)
            for name in sorted(graph[module]):
                visit(name)
            done.add(above.pop())

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("module", sorted(CODE))
def test_a_function_fits_on_a_screen(module):
    long = {node.name: node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse(CODE[module].read_text())) if isinstance(node, ast.FunctionDef)}
    assert max(long.values(), default=0) <= 80, max(long, key=long.get)


@pytest.mark.parametrize("module", sorted(CODE))
def test_text_files_are_utf_8_whatever_the_locale(module):
    for node in ast.walk(ast.parse(CODE[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            text = called == "open" and "b" not in "".join(map(ast.unparse, node.args[1:2])) or \
                re.search(r"(?<!^self)\.(read|write)_text$", called)
            assert not text or "encoding" in {word.arg for word in node.keywords}, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", sorted(set(CODE) - set(MODELS) - {"data", "robot.tabletop"}))
def test_every_command_ends_in_one_line(module):
    """Those that torchrun starts end as one process of several has to."""
    starts = "run_command(main)"
    if module in ("train", "tools.subtask"):
        starts = f"with distributed.whole_exit():\n    {starts}"
    for node in ast.parse(CODE[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            assert [ast.unparse(statement) for statement in node.body] == [starts]


def test_the_loop_and_its_files_stay_short():
    lines = {name: len(CODE[name].read_text().splitlines()) for name in ("train", "data", "sample")}
    assert lines["train"] <= 350 and lines["data"] <= 350 and lines["sample"] <= 150, lines


@each_model
def test_a_model_file_alone_in_a_folder_runs(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", f"import {name}; {name}.main(steps=2)"], cwd=tmp_path,
                          env=alone | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d.*expect|expect.*\d", done.stdout, re.S), "it prints a number and the one to expect"


@each_model
def test_a_model_file_offers_what_train_and_sample_use(name):
    module = importlib.import_module(name)
    for method in ("loss", "sample", "param_groups"):
        assert callable(getattr(module.Model, method)), method
    assert callable(module.main) and module.PRESETS["tiny"] is not None
    for preset, overrides in module.PRESETS.items():
        assert isinstance(module.Config(**overrides), module.Config), preset
    known = {field.name for field in dataclasses.fields(options.Options)}
    for preset, recipe in getattr(module, "RECIPES", {}).items():
        assert preset in module.PRESETS and not set(recipe) - known, preset


@each_model
def test_the_parts_of_a_model_file_stand_in_the_order_of_all(name):
    text = source(name)
    lines = text.splitlines()
    at = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            at[node.name] = node.lineno
            if node.name == "Config":
                fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            at[node.targets[0].id] = node.lineno
            if node.targets[0].id == "Model":
                at["its class"] = at[node.value.id]
    order = ["Config", "its class", "Model", "PRESETS", "main"]
    assert sorted(order, key=at.__getitem__) == order
    bare = [field.target.id for field in fields if not lines[field.lineno - 2].strip().startswith("#")
            and "  # " not in lines[field.lineno - 1]]
    assert not bare, f"{name}.Config: without a comment (meaning, unit, source): {bare}"


def test_what_has_the_same_name_in_two_model_files_is_the_same_or_says_how_it_differs():
    versions = {}                                   # {name: {text: (file, docstring)}}
    for name in MODELS:
        text = source(name)
        for node in ast.parse(text).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name not in ("Config", "main"):
                part = ast.get_source_segment(text, node)
                versions.setdefault(node.name, {})[part] = (name, ast.get_docstring(node) or "")
    silent = {part: [file for file, docstring in found.values() if "differ" not in docstring]
              for part, found in versions.items()}
    silent = {part: files for part, files in silent.items() if len(files) > 1}
    assert not silent, f"different texts of the same name: {silent}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_lines_and_paths(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{named(path)}:{number}"
        if path.suffix != ".md":                    # a table row cannot be broken
            assert len(line) <= 110, f"{where} has {len(line)} columns"
        path_of_a_machine = re.search(r"(?<![\w.])/(?:work|home|root|tmp|Users)/", line)
        assert not path_of_a_machine, f"{where}: a path of one machine"
        assert line == line.rstrip(), f"{where} ends in blanks"
