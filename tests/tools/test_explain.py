"""explain.py: what it says of a run is what the run did, and EQUATIONS.md is what the model files say."""
import contextlib
import io
import os
import re
import types

import pytest
import torch
import torch.nn.functional as F
from test_house import MODELS, ROOT, each_model, source

from tools import equations, explain
from tools.watch import Watch, attention_of, pattern
import pi0
import train
from robot.models import load_module


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """{model: what --explain prints}; it leaves nothing in its folder, and does not train."""
    texts, before = {}, os.getcwd()

    def text(name):
        if name not in texts:
            folder, out = tmp_path_factory.mktemp(name), io.StringIO()
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(out):
                    train.main(["--model", name, "--explain", "--device", "cpu"])
            finally:
                os.chdir(before)
            assert not list(folder.iterdir())
            texts[name] = out.getvalue()
        return texts[name]
    return text


def section(text, title):
    """Lines of the section that begins with `title`."""
    return re.search(rf"^{title}.*?\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)[1].splitlines()


# -- every model file ----------------------------------------------------------------------------------------


@each_model
def test_every_line_that_is_named_is_the_line_where_it_happens(name, printed):
    lines, carrying, calls = source(name).splitlines(), equations.computed(source(name)), 0
    for row in section(printed(name), "LOSS") + section(printed(name), "SAMPLE"):
        found = re.match(rf" +{name}\.py:(\d+) +(.*)", row)
        if not found:
            assert re.match(r" +(\d+ times:|->)", row), row
            continue
        number, text = int(found[1]), found[2]
        own = re.match(r"[\w., ]+?(?: x \d+)?: (\w+) \((\d+)\)", text)
        if own:                                     # a class of the file: where it begins
            assert lines[int(own[2]) - 1].startswith(f"class {own[1]}("), row
        equation = re.match(r"((?:\[\d+\])+) (.*?)(?: \.\.\.|  |$)", text)
        if equation:
            numbers = {int(n) for n in re.findall(r"\d+", equation[1])}
            assert numbers <= set(carrying[number][3]) and equation[2] in lines[number - 1], row
        else:
            assert "(" in lines[number - 1], row    # a call
            calls += 1
    assert calls > 3


@each_model
def test_the_equations_that_ran_are_named(name, printed):
    """Every number of the docstring has its row; noising runs in `loss`, and something only in `sample`."""
    rows = [re.match(r"  (.{5}).{60}  (.{24})([\d, ]+)$", row).groups()
            for row in section(printed(name), "EQUATIONS")]
    assert [int(number.strip(" []")) for number, *_ in rows] == list(equations.stated(source(name)))
    assert any("loss" in met for _, met, _ in rows) and any("sample" in met for _, met, _ in rows)
    tags = equations.tagged(source(name))
    for number, met, lines in rows:
        assert re.fullmatch(r"-|building|loss|sample|\w+, \w+|building, loss, sample", met.strip())
        assert all(int(number.strip(" []")) in tags[int(n)] for n in lines.split(", "))


@each_model
def test_parameters_of_the_parts_add_up(name, printed):
    counts = [int(re.search(r" ([\d,]+)", row.strip().partition(" ")[2])[1].replace(",", ""))
              for row in section(printed(name), "PARAMETERS")]
    assert sum(counts[:-1]) == counts[-1] and f"{counts[-1]:,} parameters" in printed(name).splitlines()[0]


@each_model
def test_the_batch_is_shown_with_its_axes(name, printed):
    text = "\n".join(section(printed(name), "BATCH"))
    if "data_shape" in vars(load_module(name).Config()):
        assert re.search(r"x +\(5, ", text)
        return
    for key, axes in (("actions", "B, Tp, A"), ("action_mask", "B, Tp"), ("state", "B, To, S")):
        found = re.search(rf"{key} +\((.*?)\) +{axes}  ", text)
        assert found and len(found[1].split(",")) == len(axes.split(",")) and found[1].startswith("5, ")
    assert section(printed(name), "TIMELINE")


# -- masks ---------------------------------------------------------------------------------------------------


def test_the_masks_of_the_transformer_are_those_of_its_docstring(printed):
    text = printed("dp_transformer")
    own = re.search(r"attention of transformer.blocks.\*.self_attn, .*\n((?: +[x. ]+\n)+)", text)
    rows = [line.split() for line in own[1].splitlines()]
    assert rows == [["x"] * (i + 1) + ["."] * (15 - i) for i in range(16)]
    cross = re.search(r"softmax of transformer.blocks.\*.cross_attn, .*\n(.*\n.*\n.*)\n", text)[1]
    keys, first, others = (row.split() for row in cross.splitlines())
    assert keys[:2] == ["2", "1"]                                   # the step and o0, o1
    assert first == ["1", "x", "."] and others[:3] == ["15", "x", "x"]  # a0 does not see the newest


def test_the_masks_of_pi0_are_those_of_its_docstring(printed):
    """Prefix, state and actions: three blocks, and the padding of the text is seen by nobody."""
    found = re.findall(r"expert.layers.\*, .*\n +([\d ]+) +keys\n +(1 .*)\n +(16 .*?) +\(", printed("pi0"))
    (keys, state, actions), = found
    real, padding, *suffix = keys.split()
    config = pi0.Config()
    prefix = 2 * (config.vit_size // config.patch_size) ** 2 + config.text_len
    assert suffix == ["1", "16"] and int(real) + int(padding) == prefix
    assert state.split() == ["1", "x", ".", "x", "."] and actions.split() == ["16", "x", ".", "x", "x"]


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "none"])
def test_probabilities_of_the_fused_attention(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    given = {"bool": {"attn_mask": lower}, "causal": {"is_causal": True}, "none": {},
             "float": {"attn_mask": torch.zeros(5, 5).masked_fill(~lower, -torch.inf)}}[kind]
    p = attention_of(q, k, v, **given)
    assert torch.allclose(p @ v, F.scaled_dot_product_attention(q, k, v, **given), atol=1e-6)
    seen = pattern(p > 0)
    assert seen.tolist() == (lower.tolist() if kind != "none" else [[True] * 5])


def test_patterns_of_grouped_queries_and_of_heads():
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    grouped = lower.repeat(2, 1).expand(3, 2, 8, 4)                 # (B, kv heads, group x N, M)
    heads_last = lower[:, None].expand(3, 4, 6, 4)                  # (B, N, H, M)
    for seen in (grouped, heads_last, lower.expand(3, 2, 4, 4)):
        assert pattern(seen).tolist() == lower.tolist()


def test_a_picture_groups_what_is_alike_and_thins_out_what_is_large():
    seen = torch.ones(6, 7, dtype=torch.bool)
    seen[:4, 5:] = False
    assert explain.picture(seen) == ["        5 2  keys", "      4 x .",
                                     "      2 x x  (left: how many queries)"]
    large = explain.picture(torch.ones(100, 100, dtype=torch.bool).tril(), limit=5)
    assert [line.split() for line in large[:5]] == [["x"] * (i + 1) + ["."] * (4 - i) for i in range(5)]
    assert "100 x 100" in large[5]


# -- the tree ------------------------------------------------------------------------------------------------


TOY = '''"""Toy.

    [1]  y = 2 x
    [2]  the table
"""
import torch.nn as nn

TABLE = {
    "a": lambda x: x + 1,                                           # [2]
    "b": lambda x: x - 1,
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.q(x) + self.k(x))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def loss(self, x, which):
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
            y = (2 *                                                # [1]
                 x)
        return TABLE[which](y)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_model.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "toy_model", raising=False)
    import toy_model
    return toy_model


@pytest.mark.parametrize("which, reached", [("a", {1, 2}), ("b", {1})])
def test_what_happens_in_a_toy(which, reached, toy):
    model = toy.Toy()
    x = torch.randn(5, 4)
    want = model.loss(x, which)
    with Watch(toy.__file__, model) as watch:
        assert torch.equal(model.loss(x, which), want)              # watching changes nothing
    assert watch.reached == reached and watch.masks == {}
    at = lambda text: TOY[:TOY.index(text)].count("\n") + 1
    rows = [re.sub(r" +", " ", row) for row in explain.tree(watch.root.inside, "toy.py")]
    assert rows[:4] == [
        " 2 times:",
        f"toy.py:{at('x = layer(x)')} layers.0 x 3: Layer ({at('class Layer')}) (5, 4) -> (5, 4)",
        f"toy.py:{at('return self.drop')} q, k: Linear (5, 4) -> (5, 4)",
        f"toy.py:{at('y = (2')} [1] y = (2 * ... (5, 4)"]
    table = f'toy.py:{at("lambda x: x + 1")} [2] "a": lambda x: x + 1, (5, 4)'
    assert rows[4:] == ([table] if which == "a" else [])
    assert not model.layers[0]._forward_hooks and not model.layers[0]._forward_pre_hooks


def test_timelines():
    released = types.SimpleNamespace(first_action=-1, pred_horizon=4, n_obs_steps=2, n_action_steps=2)
    assert [line.split() for line in explain.timeline(released)] == [
        ["step", "-1", "0", "1", "2"], ["observed", "x", "x", ".", "."], ["predicted", *"xxxx"],
        ["executed", ".", "x", "x", "."]]
    now = types.SimpleNamespace(first_action=0, pred_horizon=50, n_obs_steps=2, n_action_steps=50)
    step, observed, predicted, executed = explain.timeline(now)
    assert predicted[11:] == "." + "x" * 50 == executed[11:] and observed[11:] == "xx" + "." * 49
    assert step[11 + 1] == "0" and step[11 + 11] == "1"             # now, and 10 steps from now


# -- the map of the equations --------------------------------------------------------------------------------


def test_equations_md_is_what_the_files_say(capsys):
    explain.main(["--map"])
    assert capsys.readouterr().out == (ROOT / "EQUATIONS.md").read_text(), \
        "python -m tools.explain --map > EQUATIONS.md"


def test_every_equation_of_the_map_has_its_text_and_its_lines():
    text = equations.equation_map(ROOT)
    rows = re.findall(r"^\| \[(\d+)\] \| `(.+)` \| (.+) \|$", text, re.M)
    assert len(rows) == sum(len(equations.stated(source(name))) for name in MODELS)
    for number, _, links in rows:
        for line, name, again in re.findall(r"\[(\d+)\]\((\w+\.py)#L(\d+)\)", links):
            assert line == again and f"[{number}]" in source(name[:-3]).splitlines()[int(line) - 1]
        assert links.count("#L") == links.count("[") >= 1
