"""The report: what the file says and holds, read back without a browser, and what it does in a headless
Chromium."""
import base64
import html.parser
import json
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest

from robot.errors import UserError
from tools import charts, drawing, report, words


def decode_png(content):
    """PNG without row filters -> (H, W, channels) uint8; checks the CRC of every chunk."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at:at + 8])
        body = content[at + 8:at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    W, H, depth, color_type, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert depth == 8 and rest == [0, 0, 0] and kind == b"IEND"
    channels = {0: 1, 2: 3}[color_type]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(H, 1 + W * channels)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(H, W, channels)


def cut(sprite, k):
    """The k-th frame of a sprite, cut out the way the page does it."""
    sheet = decode_png(base64.b64decode(sprite["uri"].removeprefix("data:image/png;base64,")))
    y, x = k // sprite["columns"] * sprite["height"], k % sprite["columns"] * sprite["width"]
    return sheet[y:y + sprite["height"], x:x + sprite["width"]]


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


def write(tmp_path, title="run", **content):
    """-> text of the page, its data block."""
    report.write(tmp_path / "report.html", title, **content)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # nothing is left beside it
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return page, json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class Structure(html.parser.HTMLParser):
    """Ids, and every attribute that could load something; fails when a tag is not closed in its place."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.loads = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loads += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def content(seed=0):
    """Arguments of `write` with something in every section."""
    r = np.random.default_rng(seed)
    metrics = [{"step": step, "loss": 1 / (1 + step), "lr": 1e-3, "grad_norm": 1.0, "data_s": 0.01,
                "compute_s": 0.1, "samples_per_s": 640.0} for step in range(0, 1000, 10)]
    metrics += [{"step": step, "val_loss": 0.5, "action_error": 0.1, "success": 0.5, "interval": [0.4, 0.6],
                 "loss_t": [0.1 * (i + 1) for i in range(10)]} for step in (500, 990)]
    return {
        "metrics": metrics,
        "result": {"success": 0.75, "interval": [0.66, 0.82], "episodes": 100,
                   "outcomes": {"success": 75, "stuck at the wall": 20, "wrong block": 5}},
        "config": {"model": "dp_cnn", "train": {"lr": 1e-3}},
        "about": {"Data": "tabletop: 3 episodes", "Command": "python train.py --model dp_cnn"},
        "chunks": {"trace": r.normal(size=(6, 5, 8, 2)), "xy": (0, 1), "executed": (1, 5),
                   "labels": [f"k = {5 - k}" for k in range(6)],
                   "observation": r.integers(0, 256, (12, 12, 3), np.uint8), "extent": (-1, 1, 1, -1)},
        "rollouts": [{"frames": r.integers(0, 256, (7, 10, 14, 3), np.uint8), "success": True, "seed": 3},
                     {"path": r.normal(size=(9, 2)), "success": False, "outcome": "stuck at the wall"}],
        "samples": {"trace": r.normal(size=(4, 30, 2)), "labels": list("abcd"),
                    "data": r.normal(size=(50, 2)), "field_extent": (-2, 2),
                    "field": np.broadcast_to(r.normal(size=(5, 5, 2)), (4, 5, 5, 2))},
    }


def other_content(seed=0):
    """The same, with the other kinds of chunks and samples: every dimension over time beside the pictures of
    two cameras, images."""
    r = np.random.default_rng(seed)
    given = content(seed)
    cameras = {name: r.integers(0, 256, (8, 12, 3), np.uint8) for name in ("cam_high", "cam_wrist")}
    given["chunks"] |= {"xy": None, "extent": None, "observation": None, "cameras": cameras, "hz": 10.0,
                        "demonstrated": r.normal(size=(8, 2)), "names": ["shoulder", "elbow"],
                        "instruction": "lift the cup"}
    given["samples"] = {"trace": r.uniform(-1, 1, (4, 9, 3, 6, 6)), "labels": list("abcd"),
                        "data": r.uniform(-1, 1, (5, 3, 6, 6))}
    return given


def test_one_file_that_loads_nothing(tmp_path):
    page, _ = write(tmp_path, **content())
    structure = Structure(page)
    ids = "about result failures chunks samples rollouts training charts config data"
    assert structure.ids == ids.split()
    assert structure.loads == ["data:,"]  # the empty icon
    assert not re.search(r"https?://|//\w+\.\w+/|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page
    assert "{{" not in page.split("<script")[0] and "<!--" not in page


def test_empty_report_has_no_sections(tmp_path):
    page, data = write(tmp_path)
    assert Structure(page).ids == ["data"]
    assert data == {"charts": [], "chunks": [], "rollouts": [], "samples": []}


def test_text_is_escaped(tmp_path):
    bad = "</script><b>&\"' {{data}} \\1 <!--result-->"
    page, data = write(tmp_path, title=bad, config={bad: bad}, result={"outcomes": {bad: 1}},
                       about={bad: bad},
                       rollouts=[{"path": [[0, 0], [1, 1]], "success": False, "instruction": bad}])
    assert "<b>" not in page
    assert data["rollouts"][0]["instruction"] == bad
    # The title of the window and of the page, the failure, twice in the configuration, twice above it.
    assert page.count("&lt;/script&gt;&lt;b&gt;&amp;&quot;&#x27; {{data}} \\1 &lt;!--result--&gt;") == 7
    Structure(page)


def test_arrays_and_frames_come_back(tmp_path):
    given = content()
    _, data = write(tmp_path, **given)
    frames = given["rollouts"][0]["frames"]
    for k in range(len(frames)):
        np.testing.assert_array_equal(cut(data["rollouts"][1]["frames"], k), frames[k])  # after the failure
    np.testing.assert_array_equal(cut(data["chunks"][0]["image"], 0), given["chunks"]["observation"])
    for packed, want in ((data["rollouts"][0]["path"], given["rollouts"][1]["path"]),
                         (data["samples"][0]["points"], given["samples"]["trace"]),
                         (data["samples"][0]["field"], given["samples"]["field"])):
        np.testing.assert_array_equal(unpack(packed), want.astype("f4"))
    # Chunks are reordered for their colours, in the same way in every state.
    trace, want = unpack(data["chunks"][0]["trace"]), given["chunks"]["trace"].astype("f4")
    order = [next(j for j in range(5) if np.array_equal(want[-1, j], chunk)) for chunk in trace[-1]]
    assert sorted(order) == list(range(5))
    np.testing.assert_array_equal(trace, want[:, order])


def test_sampled_images(tmp_path):
    """-1 is black and 1 is white; tile s * N + n is sample n in state s; one channel stays one channel."""
    trace = np.linspace(-1, 1, 3 * 2)[:, None, None, None].repeat(4, 2).repeat(5, 3).reshape(3, 2, 1, 4, 5)
    _, data = write(tmp_path, samples={"trace": trace, "labels": ["a", "b", "c"], "data": trace[0]})
    tiles = np.stack([cut(data["samples"][0]["images"], k) for k in range(6)])
    np.testing.assert_array_equal(tiles[:, 0, 0, 0], [0, 51, 102, 153, 204, 255])
    assert tiles.shape == (6, 4, 5, 1) and data["samples"][0]["data"]["count"] == 2


def test_two_modes_get_the_two_ends_of_the_colours(tmp_path):
    side = np.array([1, -1, 1, -1, 1, -1])
    trace = side[:, None, None] + np.random.default_rng(0).normal(0, 0.1, (2, 6, 4, 2))
    _, data = write(tmp_path, chunks={"trace": trace, "xy": None, "labels": ["noise", "actions"]})
    signs = np.sign(unpack(data["chunks"][0]["trace"])[-1, :, 0, 0]).tolist()
    assert signs in ([1, 1, 1, -1, -1, -1], [-1, -1, -1, 1, 1, 1])


def test_the_view_follows_the_picture_and_ignores_what_diverged(tmp_path):
    trace = np.zeros((2, 4, 3, 3))
    trace[:, 1] = np.nan
    trace[:, 2] = np.inf
    chunks = {"trace": trace, "xy": (0, 2), "labels": ["a", "b"], "extent": (0, 512, 512, 0),
              "observation": np.zeros((4, 4, 3), np.uint8)}
    _, data = write(tmp_path, chunks=chunks)
    assert data["chunks"][0]["view"] == [0, 512, 512, 0]  # y runs down, as in the picture
    assert data["chunks"][0]["outside"] == 0.5  # neither NaN nor infinity is in it
    assert np.isnan(unpack(data["chunks"][0]["trace"])[0]).sum() == 6
    noisy = np.random.default_rng(0).normal(0, 1e5, trace.shape)
    noisy[-1] = 512
    noisy[-1, 2, 1:] = 600  # of 12 finished steps 2 leave the picture, which fills its frame all the same
    wide = write(tmp_path, chunks=chunks | {"trace": noisy})[1]["chunks"][0]
    assert wide["view"] == [0, 512, 512, 0] and wide["outside"] == pytest.approx(1 / 6)
    for broken in (np.full((2, 4, 3, 3), np.nan), np.zeros((2, 4, 3, 3))):
        write(tmp_path, chunks=chunks | {"trace": broken, "extent": None})
        write(tmp_path, chunks=chunks | {"trace": broken, "xy": None})


def test_many_states_are_thinned_with_both_ends_kept(tmp_path):
    trace = np.arange(1000.0)[:, None, None].repeat(2, 2)
    _, data = write(tmp_path, samples={"trace": trace, "labels": [str(k) for k in range(1000)]})
    labels = data["samples"][0]["labels"]
    assert len(labels) == drawing.MAX_STATES and (labels[0], labels[-1]) == ("0", "999")
    assert unpack(data["samples"][0]["points"])[:, 0, 0].tolist() == [float(k) for k in labels]
    images = np.zeros((100, 64, 3, 32, 32), np.float32)  # 20 MB of pixels
    _, data = write(tmp_path, samples={"trace": images, "labels": [""] * 100})
    assert 10 < len(data["samples"][0]["labels"]) < 20


def test_curves(tmp_path):
    metrics = [{"step": 20, "loss": 0.5}, {"step": 10, "loss": float("nan")},
               {"step": 30, "loss": float("inf")}, {"step": 40, "loss": 0.25},
               {"step": 20, "loss": 0.75},  # logged again after a resume
               {"step": 40, "success": 0.5, "interval": [0.25, 0.75], "loss_t": [1.0, float("nan")]},
               {"step": 60, "success": 1.0, "interval": [0.75, 1.0], "loss_t": [2.0, 0.5]}]
    _, data = write(tmp_path, metrics=metrics)
    loss, success, by_t = data["charts"]
    assert loss["lines"][0]["x"] == [10, 20, 30, 40] and loss["lines"][0]["y"] == [None, 0.75, None, 0.25]
    assert loss["lines"][0]["bad"] == [10, 30]
    assert success["lines"][0]["interval"] == [[0.25, 0.75], [0.75, 1.0]]
    assert [line["y"] for line in by_t["lines"]] == [[1.0, 2.0], [None, 0.5]]


def test_what_was_logged_once_is_a_number_and_no_curve(tmp_path):
    metrics = [{"step": 1500, "loss": 0.25, "data_s": 0.5, "lr": float("nan")},
               {"step": 1500, "val_loss": 2.0, "success": 0.5, "loss_t": [1.0, 3.0, None, 2.0]}]
    page, data = write(tmp_path, metrics=metrics, result={"success": 0.5})
    by_t, = data["charts"]  # one evaluation: a curve over t
    assert by_t["axis"] == "t" and by_t["title"] == "Loss by t, at step 1,500"
    assert by_t["lines"][0]["x"] == [0.125, 0.375, 0.625, 0.875]
    assert by_t["lines"][0]["y"] == [1.0, 3.0, None, 2.0]
    numbers = page.split("<table id=\"numbers\">")[1].split("</table>")[0]
    assert dict(re.findall(r"<th scope=row>(.*?)</th><td>(.*?)</td>", numbers)) == {
        "Training loss": "0.25 (step 1,500)", "Validation loss": "2 (step 1,500)",
        "Learning rate": "not finite (step 1,500)", "Seconds per step, data": "0.5 (step 1,500)"}
    assert "numbers" not in Structure(write(tmp_path, **content())[0]).ids


def test_long_curves_are_means_of_groups(tmp_path):
    metrics = [{"step": step, "loss": float(step % 2)} for step in range(10 * charts.MAX_POINTS)]
    line = write(tmp_path, metrics=metrics)[1]["charts"][0]["lines"][0]
    assert set(line["y"]) == {0.5} and len(line["x"]) == charts.MAX_POINTS
    assert line["x"][:2] == [0, 10] and set(line["mean"]) == {0.5}


def test_tables(tmp_path):
    page, _ = write(tmp_path, **content())
    rows = dict(re.findall(r"<th scope=row>(.*?)</th><td>(.*?)</td>", page))
    assert rows["Success"] == "75 %" and rows["95 % interval"] == "66 % to 82 %" and rows["Episodes"] == "100"
    assert rows["train.lr"] == "0.001"
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    assert facts == [("Data", "tabletop: 3 episodes"), ("Command", "python train.py --model dp_cnn")]


def test_failures_are_shares_of_all_episodes(tmp_path):
    page, _ = write(tmp_path, result={"outcomes": {"success": 98, "wall": 2, "timeout": 0}})
    table = page.split("<section id=\"failures\">")[1].split("</section>")[0]
    cells = re.findall(r"<th scope=row>(.*?)</th><td>(.*?)</td>", table)
    assert cells == [("2 of 100 ended at the wall", "2 %")]
    assert re.findall(r"width:(.*?)%", table) == ["2"]
    table = words.failure_table({"outcomes": {"success": 3, "lost": 1}, "outcomes_arm": {"a": 1, "b": 4}})
    assert re.findall(r"<th scope=row>(.*?)</th><td>(.*?)</td>", table) == [
        ("1 of 4 ended as: lost", "25 %"), ("arm: 4 of 5 ended as: b", "80 %"),
        ("arm: 1 of 5 ended as: a", "20 %")]
    assert "failures" not in Structure(write(tmp_path, result={"outcomes": {"success": 5}})[0]).ids


@pytest.mark.parametrize("result, said", [
    ({"success": 0.98, "interval": [0.93, 0.9945], "episodes": 100, "score": 0.98, "action_error": 0.08},
     ["98 of 100 episodes succeeded (95 % interval 93 to 99 %)"]),
    ({"success": 0.0, "interval": [0.0, 0.0713], "episodes": 50, "score": 0.613},
     ["0 of 50 episodes succeeded (95 % interval 0 to 7 %), mean score 0.613"]),
    ({"success_a": 0.5, "interval_a": [0.2, 0.8], "episodes_a": 8, "success_b": 1.0, "episodes_b": 8},
     ["a: 4 of 8 episodes succeeded (95 % interval 20 to 80 %)", "b: 8 of 8 episodes succeeded"]),
    ({"success": None, "interval": None, "episodes": 20, "score": -0.5, "return": -31.25},
     ["Mean score -0.5, mean return -31.2 in 20 episodes"]),
    ({"distance": 0.01234, "floor": 0.0009}, ["Energy distance to held-out data: 0.0123 (floor 0.0009)"]),
    ({"distance": 2.0, "floor": 1.0, "accuracy_samples": 0.875, "accuracy_real": 0.96},
     ["Energy distance to held-out data: 2 (floor 1)",
      "The class asked for is recognised in 87.5 % of the samples (96 % of real images)"]),
    ({"val_loss": 1.0, "action_error": 0.0321, "error_of_mean": 0.2, "error_of_staying": 0.05},
     ["Mean error of sampled actions: 0.0321 (staying in place 0.05, the mean action 0.2)"]),
    ({"val_loss": 1.0}, [])])
def test_the_headline_is_the_result(result, said, tmp_path):
    assert words.headlines(result) == said
    page, _ = write(tmp_path, title="dp_cnn (tiny)", result=result)
    heading = re.search(r"<h1>(.*?)</h1>", page)[1]
    assert re.findall(r"<span>(.*?)</span>", heading) == (said or ["dp_cnn (tiny)"])
    assert ("<p>dp_cnn (tiny)</p>" in page) == bool(said)


def test_data_units_command_and_date(monkeypatch):
    monkeypatch.setattr(words.sys, "orig_argv", ["/usr/bin/python3", "train.py", "--data", "my file.hdf5"])
    table = {"source": "tabletop", "fps": 10.0, "action_dim": 3, "lengths": [30, 5], "valid_episodes": [1],
             "action_names": ["target_x", "target_y", "gripper"]}
    facts = words.about(table)
    assert facts["Data"] == "tabletop: 2 episodes, 35 steps, 1 of the episodes held out"
    assert "target_x (table units)" in facts["Actions"] and "at 10 Hz" in facts["Actions"]
    assert facts["Command"] == "python train.py --data 'my file.hdf5'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["Date"])
    arm = table | {"source": "arm.hdf5", "action_dim": 26, "action_names": [], "fps": 30.0}
    assert words.about(arm)["Actions"] == "26 dimensions at 30 Hz, in the units of the data"
    assert words.about(table, table, arm)["Data"].count("episodes, 35 steps") == 2  # once for each set
    points = words.about({"source": "moons", "shape": [2], "n_classes": 2, "items": 18000})
    assert points["Data"] == "moons: 18,000 training items (2-D points of 2 classes)"
    assert "Actions" not in points
    assert words.about({"source": "given"})["Data"] == "given"


def compared(seed=0):
    """Two runs side by side: chunks and samples with names, rollouts by scene, a table."""
    one, two = content(seed), content(seed + 1)
    two["chunks"] |= {"trace": 3 * np.random.default_rng(9).normal(size=(3, 5, 8, 2)), "labels": list("xyz")}
    scenes = [r | {"name": name, "scene": f"seed {i}"} for i in range(2) for name, given in
              (("left run", one), ("right run", two)) for r in given["rollouts"][i:i + 1]]
    named = lambda section: [given[section] | {"name": name, "group": "table"}
                             for name, given in (("left run", one), ("right run", two))]
    rows = [{"run": "left run", "success": "9 of 10"}, {"run": "right <run>", "p50 ms": 1.5}]
    return {"chunks": named("chunks"), "samples": named("samples"), "rollouts": scenes,
            "tables": [("Policies in here", rows)]}


def test_runs_side_by_side(tmp_path):
    """One scale for the chunks of a group; a table with every column; rollouts know their scene."""
    given = compared()
    page, data = write(tmp_path, **given)
    assert Structure(page).ids == "tables chunks samples rollouts data".split()
    for section in ("chunks", "samples"):
        assert [one["name"] for one in data[section]] == ["left run", "right run"]
    assert data["chunks"][0]["view"] == data["chunks"][1]["view"] == [-1, 1, 1, -1]
    for chunks in given["chunks"]:
        chunks["extent"] = None
    data = write(tmp_path, **given)[1]
    assert data["chunks"][0]["view"] == data["chunks"][1]["view"]
    alone = write(tmp_path, chunks=given["chunks"][0])[1]["chunks"][0]["view"]
    assert alone != data["chunks"][0]["view"]
    left, right, bottom, top = data["chunks"][0]["view"]
    ends = given["chunks"][1]["trace"][-1]
    low, high = np.quantile(ends[..., 0], [0.03, 0.97])
    assert left < low and right > high
    given["chunks"][1]["group"] = "elsewhere"
    apart = write(tmp_path, **given)[1]["chunks"]
    assert apart[0]["view"] == alone != apart[1]["view"]
    assert [(r["scene"], r["name"]) for r in data["rollouts"]] == [  # the scene where they failed first
        (f"seed {i}", name) for i in (1, 0) for name in ("left run", "right run")]
    cells = re.findall(r"<t[hd](?: scope=col)?>(.*?)</t[hd]>", page.split("<section id=\"tables\">")[1])[:9]
    assert cells == ["run", "success", "p50 ms", "left run", "9 of 10", "", "right &lt;run&gt;", "", "1.5"]


def test_all_rollouts_of_a_comparison_are_kept(tmp_path):
    rollout = {"path": [[0, 0], [1, 1]], "success": True, "name": "a"}
    rollouts = [rollout | {"scene": f"seed {i}"} for i in range(12)]
    assert len(write(tmp_path, rollouts=rollouts)[1]["rollouts"]) == 12
    for r in rollouts:
        r.pop("scene")
    assert len(write(tmp_path, rollouts=rollouts)[1]["rollouts"]) == report.MAX_ROLLOUTS


def test_failures_come_first_among_the_films(tmp_path):
    rollouts = [{"path": [[0, 0], [1, 1]], "success": i not in (7, 9), "seed": i, "outcome": "wall"}
                for i in range(10)]
    shown = write(tmp_path, rollouts=rollouts)[1]["rollouts"]
    assert [int(r["seed"]) for r in shown] == [7, 9, 0, 1, 2, 3, 4, 5]
    assert shown[0]["outcome"] == "ended at the wall"
    silent = [{"path": [[0, 0], [1, 1]], "success": False, "outcome": "unknown"}]  # nobody said
    assert write(tmp_path, rollouts=silent)[1]["rollouts"][0]["success"] is None


def test_over_time_the_scale_is_that_of_the_finished_chunks(tmp_path):
    """Noise is wider than what an arm does in one chunk; a joint that rests does not fill its panel."""
    r = np.random.default_rng(0)
    trace = r.normal(0, 100, (3, 32, 8, 2))
    trace[-1, ..., 0] = r.uniform(-30, 30, (32, 8))
    trace[-1, ..., 1] = 5 + r.uniform(-1e-3, 1e-3, (32, 8))
    demonstrated = np.stack([np.linspace(0, 50, 8), np.full(8, 5.0)], 1)
    demonstrated[-1] = np.nan  # the episode has ended
    chunks = {"trace": trace, "xy": None, "labels": "abc", "demonstrated": demonstrated}
    drawn = write(tmp_path, chunks=chunks)[1]["chunks"][0]
    (low, high), (low_rest, high_rest) = drawn["ranges"]
    assert -50 < low < -29 and demonstrated[-2, 0] < high < 60
    assert 10 < high_rest - low_rest < 40 and (low_rest + high_rest) / 2 == pytest.approx(5, abs=0.1)
    np.testing.assert_array_equal(unpack(drawn["demonstrated"]), demonstrated.astype("f4"))
    assert drawn["names"] == ["action 0", "action 1"]


def test_pictures_of_all_cameras(tmp_path):
    """They stand beside the chunks, under their names; a large one is thinned."""
    large = np.arange(480 * 640 * 3, dtype=np.uint32).reshape(480, 640, 3).astype(np.uint8)
    given = other_content()
    given["chunks"]["cameras"] |= {"cam_large": large}
    cameras = write(tmp_path, **given)[1]["chunks"][0]["cameras"]
    assert [c["name"] for c in cameras] == ["cam_high", "cam_wrist", "cam_large"]
    np.testing.assert_array_equal(cut(cameras[1]["image"], 0), given["chunks"]["cameras"]["cam_wrist"])
    np.testing.assert_array_equal(cut(cameras[2]["image"], 0), large[::2, ::2])


def test_files_of_the_page_are_narrow():
    for path in report.PAGE.iterdir():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        wrong = [i for i, line in lines if len(line) > 110 or line != line.rstrip()]
        assert not wrong, f"{path.name}, lines {wrong}"


def test_the_left_one_of_two_modes_comes_first(tmp_path):
    """So that the same colour means the same side in runs beside each other."""
    for sign in (1, -1):
        side = sign * np.array([1, -1, 1, -1])
        trace = np.zeros((1, 4, 5, 2))
        trace[..., 0] = side[:, None] + np.random.default_rng(0).normal(0, 0.1, (1, 4, 5))
        _, data = write(tmp_path, chunks={"trace": trace, "xy": (0, 1), "labels": ["end"]})
        assert np.sign(unpack(data["chunks"][0]["trace"])[0, :, 0, 0]).tolist() == [-1, -1, 1, 1]


def test_numbers_of_numpy(tmp_path):
    step, loss = np.int64(7), np.float32(0.5)
    metrics = [{"step": step, "loss": loss}, {"step": step + 1, "loss": loss}]
    result = {"success": np.float64(0.5), "episodes": np.int64(8)}
    page, data = write(tmp_path, metrics=metrics, result=result,
                       config={"betas": np.array([0.9, 0.95])},
                       chunks={"trace": np.zeros((2, 1, 3, 2)), "labels": [0, 1], "xy": np.array([0, 1]),
                               "executed": (np.int64(0), np.int64(2))})
    assert data["charts"][0]["lines"][0]["x"] == [7, 8]
    assert data["charts"][0]["lines"][0]["y"] == [0.5, 0.5]
    assert "<span>4 of 8 episodes succeeded</span>" in page
    assert data["chunks"][0]["xy"] == [0, 1] and data["chunks"][0]["executed"] == [0, 2]
    assert "<td>50 %</td>" in page and "<td>0.9, 0.95</td>" in page


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(UserError, match="report.html"):
        report.write(tmp_path / "file" / "report.html", "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# In a browser: Chromium driven through chromedriver's WebDriver protocol, which is JSON over HTTP.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Browser:
    def __init__(self, port, profile):
        self.root = f"http://127.0.0.1:{port}"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     "--disable-dev-shm-usage", "--force-device-scale-factor=2", f"--user-data-dir={profile}"]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
                   "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.send("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.root += f"/session/{session['sessionId']}"

    def send(self, method, path, body=None):
        body = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.root + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def run(self, script):
        return self.send("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script, seconds=20):
        """Until the script's value is true; -> that value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"still not true after {seconds} s: {script}"
            time.sleep(0.05)
        return value

    def press(self, selector, key=None):
        """A real click on an element, or a key typed into it."""
        found = self.send("POST", "/element", {"using": "css selector", "value": selector})
        path = f"/element/{next(iter(found.values()))}"
        action, body = ("value", {"text": key}) if key else ("click", {})
        return self.send("POST", f"{path}/{action}", body)

    def emulate(self, command, **params):
        return self.send("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": params})

    def log(self):
        """Messages of the console, without the hints on speed that reading pixels back here provokes."""
        entries = self.send("POST", "/se/log", {"type": "browser"})
        return [entry for entry in entries if entry["source"] != "rendering"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen([DRIVER, f"--port={port}"], **quiet)
    browser = None
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        browser = Browser(port, tmp_path_factory.mktemp("profile"))
        yield browser
    finally:
        if browser:
            browser.send("DELETE", "")  # closes Chromium as well
        driver.terminate()
        driver.wait()


def pixels(selector):
    return f"return document.querySelector('{selector}').toDataURL()"


@pytest.mark.parametrize("given", [content, other_content])
def test_slider_and_play_in_a_browser(tmp_path, browser, given):
    write(tmp_path, **given())
    # The reply comes after the load event, and that waits for the pictures inside the page.
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    for section, last in (("#chunks", 5), ("#samples", 3), ("#rollouts figure", 8)):
        slider, button = f"{section} input", f"{section} button"
        canvas = f"{section.split()[0]} figure:has(.player) canvas"
        value = f"return document.querySelector('{slider}').value"
        finished = browser.run(pixels(canvas))
        assert browser.run(value) == str(last)
        browser.press(slider, "\ue012")  # left arrow
        assert browser.run(value) == str(last - 1)
        assert browser.run(pixels(canvas)) != finished
        browser.press(slider, "\ue010")  # end
        assert browser.run(pixels(canvas)) == finished
        browser.press(button)  # from the last state, so it starts over
        assert browser.run(f"return document.querySelector('{button}').textContent") == "Pause"
        browser.wait(f"return document.querySelector('{slider}').value === '{last}' && "
                     f"document.querySelector('{button}').textContent === 'Play'")
        assert browser.run(pixels(canvas)) == finished
    browser.press("#rollouts > .player button")
    buttons = "[...document.querySelectorAll('#rollouts figure button')]"
    assert browser.run(f"return {buttons}.map(button => button.textContent)") == ["Pause", "Pause"]
    reading = "return document.querySelector('#charts output').textContent"
    assert browser.run(reading).startswith("step 990")
    browser.press("#charts canvas", "\ue012")
    assert browser.run(reading).startswith("step 980")
    assert browser.log() == []


def test_runs_side_by_side_in_a_browser(tmp_path, browser):
    """Each has its slider; a button plays all; films of one scene stand in one grid."""
    write(tmp_path, **compared())
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    shown = "return [...document.querySelectorAll('{}')].map(node => node.{})"
    for section, last in (("#chunks", ["5", "2"]), ("#samples", ["3", "3"])):
        assert browser.run(shown.format(f"{section} figure > b", "textContent")) == ["left run", "right run"]
        assert browser.run(shown.format(f"{section} input", "value")) == last
        browser.press(f"{section} > .player button")
        assert browser.run(shown.format(f"{section} figure button", "textContent")) == ["Pause", "Pause"]
        browser.wait(f"return [...document.querySelectorAll('{section} figure button')]"
                     ".every(node => node.textContent === 'Play')")
        assert browser.run(shown.format(f"{section} input", "value")) == last
    assert browser.run(shown.format("#rollouts h3", "textContent")) == ["seed 1", "seed 0"]
    assert browser.run("return [...document.querySelectorAll('#rollouts h3 + .many')]"
                       ".map(grid => grid.children.length)") == [2, 2]
    browser.emulate("setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.run("return document.documentElement.scrollWidth") == 360
    browser.emulate("clearDeviceMetricsOverride")
    assert browser.log() == []


@pytest.mark.parametrize("xy, extent, sign", [(None, None, -1), ((0, 1), None, -1),
                                              ((0, 1), (0, 2, 2, 0), 1)])
def test_states_are_drawn_where_they_are(tmp_path, browser, xy, extent, sign):
    """A chunk that rises from 0 to 2 moves up over the states, and down where the picture's y runs down."""
    trace = np.arange(3.0)[:, None, None, None].repeat(4, 2).repeat(2, 3)
    ends = np.array([[0.0, 0.0], [2.0, 2.0]] * 2)  # over time they bring all states into the range
    write(tmp_path, chunks={"trace": trace, "xy": xy, "labels": ["0", "1", "2"], "extent": extent,
                            "observation": np.full((2, 2, 3), 128, np.uint8), "demonstrated": ends})
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    heights = browser.run("""
        const canvas = document.querySelector("#chunks figure:has(.player) canvas");
        const slider = document.querySelector("#chunks input");
        return [0, 1, 2].map(k => {
          slider.value = k;
          slider.oninput();
          const {data, width} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          let sum = 0, count = 0;
          for (let i = 0; i < data.length; i += 4)
            if (data[i + 2] > data[i] + 100) { sum += Math.floor(i / 4 / width); count++; }  // blue dots
          return sum / count;
        })""")
    first, second = np.diff(heights) * sign
    assert first > 20 and second == pytest.approx(first, abs=3)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_width_and_themes_in_a_browser(tmp_path, browser, theme):
    """Nothing is wider than a phone; canvases hold device pixels; a change of theme reaches the canvases."""
    long = "text_without_any_space_" * 5
    write(tmp_path, title=long, **content() | {"config": {long: long}})
    browser.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.emulate("setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    browser.press("#config summary")
    assert browser.run("return document.documentElement.scrollWidth") == 360
    assert browser.run("return innerWidth") == 360
    canvases = "[...document.querySelectorAll('canvas')]"
    assert browser.run(f"return {canvases}.every(node => node.width === 2 * node.clientWidth)")
    ground = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (theme == "dark")
    before = browser.run(pixels("#charts canvas"))
    other = {"light": "dark", "dark": "light"}[theme]
    browser.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": other}])
    browser.wait(f"return document.querySelector('#charts canvas').toDataURL() !== {json.dumps(before)}")
    assert browser.log() == []


def test_broken_and_empty_data_in_a_browser(tmp_path, browser):
    """Not finite, one state, one point, all zero: the page still draws, without a message in the console."""
    row = {"step": 0, "loss": np.nan, "lr": 0.0, "val_loss": 2.0, "success": 1.0, "interval": [1.0, 1.0]}
    write(tmp_path, metrics=[row, row | {"step": 1, "loss": 1.0}],
          chunks={"trace": np.full((1, 1, 4, 2), np.nan), "xy": (0, 1), "labels": ["only"]},
          samples={"trace": np.zeros((1, 3, 2)), "labels": ["only"], "field": np.zeros((1, 3, 3, 2)),
                   "field_extent": (-1, 1)}, rollouts=[{"path": np.zeros((1, 2)), "success": True}])
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    readings = browser.run("return [...document.querySelectorAll('#charts output')].map(o => o.textContent)")
    assert readings[0] == "step 1 \u25cf loss 1; logged values not finite: 1, first at step 0"
    assert readings[2] == "step 1 \u25cf success 100 % (100 % to 100 %)"
    broken = np.full((1, 1, 4, 2), np.nan)
    write(tmp_path, chunks={"trace": broken, "xy": None, "labels": ["only"], "demonstrated": broken[0, 0]})
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    write(tmp_path)
    browser.send("POST", "/url", {"url": (tmp_path / "report.html").as_uri()})
    assert browser.log() == []
