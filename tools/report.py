"""A run, or several side by side -> one HTML file: final figures, sampling from noise with a slider, rollouts
that play, curves.

train.py calls `write` at its end, sample.py after an evaluation, compare.py with several runs. The file needs
no network and no library: arrays travel as base64 float32 and pictures as PNG inside one JSON block; a script
draws them on canvases.
PAGE at the bottom is the page: style, sections, script. Sections without data are cut out between their
<!--name--> marks; {{name}} is filled in.
"""
import base64
import html
import json
import math
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np

MAX_STATES = 50        # states of a sampler that are kept: more cannot be told apart while they play
MAX_IMAGE_BYTES = 3e6  # fewer still for sampled images, because noise hardly compresses
MAX_ROLLOUTS = 8
MAX_POINTS = 800       # points per curve, each the mean of a group of rows

# title, {key in metrics.jsonl: name of its line}, options of the drawing
CURVES = [
    ("Training loss", {"loss": "loss"}, {"log": True, "smooth": True}),
    ("Validation loss", {"val_loss": "loss"}, {"log": True}),
    ("Success in closed loop", {"success": "success"}, {"percent": True}),
    ("Error of sampled actions", {"action_error": "error"}, {}),
    ("Gradient norm", {"grad_norm": "norm"}, {"log": True, "smooth": True}),
    ("Learning rate", {"lr": "rate"}, {}),
    ("Seconds per step", {"data_s": "data", "compute_s": "compute"}, {}),
    ("Samples per second", {"samples_per_s": "samples / s"}, {}),
]


def png(image):
    """(H, W) or (H, W, 3) uint8 -> bytes of a PNG file."""
    H, W = image.shape[:2]

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", W, H, 8, 2 if image.ndim == 3 else 0, 0, 0, 0)
    # Every row starts with the number of its filter. 0 (none) suits sprites of rendered frames: neighbouring
    # frames lie side by side, so deflate finds a row again in the frame before.
    rows = np.pad(image.reshape(H, -1), ((0, 0), (1, 0))).tobytes()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9))
            + chunk(b"IEND", b""))


def sprite(frames):
    """(T, H, W) or (T, H, W, 3) uint8 -> all frames in one picture, row by row, for the page to cut out."""
    T, H, W, *rgb = frames.shape
    columns = math.ceil(math.sqrt(T * H / W))  # nearly square: browsers limit the longer side of a picture
    rows = math.ceil(T / columns)
    sheet = np.zeros((rows * columns, H, W, *rgb), np.uint8)
    sheet[:T] = frames
    sheet = sheet.reshape(rows, columns, H, W, *rgb).swapaxes(1, 2).reshape(rows * H, columns * W, *rgb)
    uri = "data:image/png;base64," + base64.b64encode(png(sheet)).decode()
    return {"count": T, "columns": columns, "width": W, "height": H, "uri": uri}


def pack(array):
    """Any array -> its shape and its numbers as base64 of little-endian float32; NaN and inf survive."""
    array = np.ascontiguousarray(array, dtype="<f4")
    return {"shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}


def _number(value):
    """JSON has no NaN: whatever is not a finite number becomes null. Five digits are enough to draw."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def _mean(values):
    finite = [v for v in values if v is not None]
    return _number(sum(finite) / len(finite)) if finite else None


def _rows(metrics, key):
    """Rows that hold `key`, by step. A resumed run may repeat a step: the later row counts."""
    rows = {row["step"]: row for row in metrics if "step" in row and row.get(key) is not None}
    return [rows[step] for step in sorted(rows)]


def _line(metrics, key, name, smooth=False):
    rows = _rows(metrics, key)
    y = [_number(row[key]) for row in rows]
    group = max(1, math.ceil(len(y) / MAX_POINTS))
    line = {"name": name, "bad": [row["step"] for row, value in zip(rows, y) if value is None],
            "x": [row["step"] for row in rows[::group]],
            "y": [_mean(y[i:i + group]) for i in range(0, len(y), group)]}
    if smooth and len(y) > 40:
        reach = len(line["y"]) // 40
        line["mean"] = [_mean(line["y"][max(0, i - reach):i + reach + 1]) for i in range(len(line["y"]))]
    if key == "success" and group == 1:
        line["interval"] = [[_number(v) for v in row.get("interval") or ()] for row in rows]
    return line


def _charts(metrics):
    charts = []
    for title, keys, options in CURVES:
        lines = [_line(metrics, key, name, options.get("smooth")) for key, name in keys.items()]
        if any(line["x"] for line in lines):
            charts.append({"title": title, "lines": lines} | options)
    rows = _rows(metrics, "loss_t")
    if rows:
        n = len(rows[0]["loss_t"])
        lines = [_line([{"step": row["step"], "loss": row["loss_t"][i]} for row in rows], "loss",
                       f"t {i / n:.2g}\u2013{(i + 1) / n:.2g}:") for i in range(n)]
        charts.insert(min(2, len(charts)), {"title": "Loss by t", "lines": lines, "log": True})
    return charts


def _spread(count, limit):
    """Indices of at most `limit` of `count` things, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _range(*parts):
    """(values, tail), ... -> [lowest, highest] to show; a share `tail` at either end may lie outside."""
    parts = [(np.asarray(values, np.float64), tail) for values, tail in parts]
    parts = [(values[np.isfinite(values)], tail) for values, tail in parts]
    ends = [np.quantile(values, [tail, 1 - tail]) for values, tail in parts if values.size] or [[0, 1]]
    low, high = np.min(ends), np.max(ends)
    margin = 0.06 * (high - low) or 0.5
    return [float(low - margin), float(high + margin)]


def _view(*parts, extent=None):
    """(points (..., 2), tail), ... -> window [left, right, bottom, top]; a picture's extent is inside it."""
    view = []
    for d in (0, 1):
        ends = [] if extent is None else extent[2 * d:2 * d + 2]
        span = _range(*[(points[..., d], tail) for points, tail in parts], (ends, 0))
        # An axis may run the other way, such as the rows of a picture.
        view += span[::-1] if len(ends) and ends[0] > ends[1] else span
    return view


def _chunks(chunks, beside=()):
    """`beside`: chunks of other runs that are shown on the same scale, `chunks` among them."""
    trace = np.asarray(chunks["trace"], dtype=np.float32)
    S, N, Tp, A = trace.shape
    keep = _spread(S, MAX_STATES)
    # Chunks are put in order along the main direction in which the finished ones differ and coloured in this
    # order, so that each of several modes has a hue of its own.
    ends = np.nan_to_num(trace[-1].reshape(N, -1).astype(np.float64), posinf=0, neginf=0)
    place = np.linalg.svd(ends - ends.mean(0), full_matrices=False)[0][:, 0]
    image, extent, xy = chunks.get("observation"), chunks.get("extent"), chunks.get("xy")
    # Which end comes first is open: the one on the left, so that runs beside each other agree on it.
    first = ends.reshape(N, Tp, A)[..., 0 if xy is None else xy[0]].mean(1)
    order = np.argsort(place * (-1 if place @ first < 0 else 1))
    trace = trace[keep][:, order]
    out = {"labels": [str(chunks["labels"][k]) for k in keep], "xy": xy, "extent": extent,
           "image": None if image is None else sprite(np.asarray(image)[None]),
           "executed": chunks.get("executed") or (0, Tp)}
    # All finished chunks are in sight, but only nine tenths of the noise: its tails would shrink the rest. So
    # would the outliers of a run that has learned little, in those beside it.
    outside = 0.02 if len(beside) > 1 else 0
    ends = [(np.asarray(other["trace"])[k], tail) for other in beside or [chunks]
            for k, tail in ((-1, outside), (0, 0.05))]
    if xy is None:
        out["ranges"] = [_range(*[(states[..., d], tail) for states, tail in ends]) for d in range(A)]
    else:
        trace = trace[..., list(xy)]
        out["view"] = _view(*[(states[..., list(xy)], tail) for states, tail in ends], extent=extent)
    return out | {"trace": pack(trace), "name": chunks.get("name", "")}


def _all_chunks(sets):
    """Those of the same `group` (one environment) share their scale."""
    groups = [[other for other in sets if other.get("group") == chunks.get("group")
               and np.shape(other["trace"])[-1] == np.shape(chunks["trace"])[-1]] for chunks in sets]
    return [_chunks(chunks, beside) for chunks, beside in zip(sets, groups)]


def _tiles(images):
    """(..., C, H, W) in [-1, 1] -> sprite of all of them."""
    images = np.asarray(images, dtype=np.float32)
    images = np.nan_to_num(images.reshape(-1, *images.shape[-3:]), nan=-1)
    pixels = np.rint(np.clip(images, -1, 1) * 127.5 + 127.5).astype(np.uint8)
    return sprite(pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1))


def _samples(samples):
    trace, data, field = np.asarray(samples["trace"], np.float32), samples.get("data"), samples.get("field")
    is_image = trace.ndim == 5
    limit = 2 + int(MAX_IMAGE_BYTES / trace[0].size) if is_image else MAX_STATES
    keep = _spread(len(trace), min(limit, MAX_STATES))
    out = {"labels": [str(samples["labels"][k]) for k in keep], "n": trace.shape[1],
           "name": samples.get("name", "")}
    if is_image:
        return out | {"images": _tiles(trace[keep]), "data": None if data is None else _tiles(data)}
    data = np.zeros((0, 2)) if data is None else np.asarray(data)
    out |= {"points": pack(trace[keep]), "data": pack(data),
            "view": _view((data, 0), (trace[-1], 0.005), (trace[0], 0.01))}
    if field is not None:
        field = np.asarray(field, np.float32)[keep]
        out |= {"field": pack(field), "field_extent": samples["field_extent"],
                "longest": _range((np.linalg.norm(field, axis=-1), 0.02))[1]}
    return out


def _rollouts(rollouts):
    view = _view(*[(np.asarray(r["path"]), 0) for r in rollouts if "path" in r])  # one for all: comparable
    out = []
    for r in rollouts:
        shown = ("outcome", "instruction", "seed", "name", "scene")
        entry = {key: str(r[key]) for key in shown if r.get(key) is not None}
        entry |= {"frames": sprite(np.asarray(r["frames"]))} if "frames" in r else {"path": pack(r["path"])}
        out.append(entry | {"success": bool(r["success"]), "view": view})
    return out


def _text(key, value):
    """A figure as a reader wants it; `success` and its interval are shares of the episodes."""
    if isinstance(value, (list, tuple)):
        return (" to " if key.endswith("interval") else ", ").join(_text(key, v) for v in value)
    if isinstance(value, float) and key.endswith(("success", "interval")):
        return f"{100 * value:.3g} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(content, prefix=""):
    """Nested dict -> rows of an HTML table; the keys of an inner dict follow its own after a dot."""
    rows = ""
    for key, value in content.items():
        if isinstance(value, dict):
            rows += _table(value, f"{prefix}{key}.")
        else:
            text = _text(str(key), value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
            name, text = html.escape(f"{prefix}{key}"), html.escape(text)
            rows += f"<tr><th scope=row>{name}</th><td>{text}</td></tr>\n"
    return rows


def _tables(tables):
    """[(title, [row])] with a dict per row -> HTML tables; a column is what any of the rows has."""
    out = ""
    for title, rows in tables:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        head = "".join(f"<th scope=col>{html.escape(str(key))}</th>" for key in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(_text(str(key), row.get(key, '')))}</td>"
                                        for key in columns) + "</tr>\n" for row in rows)
        out += (f"<h2>{html.escape(title)}</h2><div class=wide><table>\n<tr>{head}</tr>\n{body}"
                "</table></div>\n")
    return out


def _listed(one_or_several):
    several = [one_or_several] if isinstance(one_or_several, dict) else one_or_several or []
    return [entry for entry in several if np.size(entry["trace"])]


def _failures(outcomes):
    """{outcome: episodes} -> rows of the failures, the most frequent first, with their share of all failures.
    """
    failures = {name: n for name, n in outcomes.items() if name != "success" and n}
    rows = ""
    for name, n in sorted(failures.items(), key=lambda item: -item[1]):
        share = f"{100 * n / sum(failures.values()):.0f}"
        rows += (f"<tr><th scope=row>{html.escape(str(name))}</th><td>{n}</td><td>{share} %</td>"
                 f"<td class=bar aria-hidden=true><i style='width:{share}%'></i></td></tr>\n")
    return rows


def write(path, title, metrics=(), result=None, config=None, chunks=None, rollouts=(), samples=None,
          tables=()):
    """Write the report to `path` (aside first, then renamed). What is not given is left out of the page.

    metrics   dicts of metrics.jsonl: `step` with loss, lr, grad_norm, data_s, compute_s, samples_per_s, or
              with val_loss, action_error, success, interval [low, high], loss_t (means in equal buckets of t)
    result    dict of final figures; its `outcomes` {outcome: episodes} become the table of failures
    config    dict, may be nested; folded away
    chunks    trace (S, N, Tp, A): N chunks at each of S states from noise to actions, in data units;
              labels: S strings; xy: the two dimensions that are plane coordinates, or None: curves over time.
              Optional: executed (start, stop) steps; observation (H, W, 3) uint8; its extent (left, right,
              bottom, top) in action units (y down: bottom > top). Without extent or xy it stands beside
    rollouts  dicts: frames (T, H, W, 3) uint8 or path (T, 2); success; optional outcome, instruction, seed.
              The first 8 are shown with every frame they have, so thin long episodes before
    Several runs: chunks and samples may be lists, each with a `name`, chunks also with a `group` whose scale
    they share; rollouts with `name` and `scene`, those of one scene beside each other, and all are shown; and
    tables    [(title, rows)], a row a dict {column: value}
    samples   trace (S, N, 2) points or (S, N, C, H, W) images in [-1, 1]; labels: S strings. Optional: data,
              the same without S; field (S, G, G, 2), rows along y, columns along x, over field_extent (low,
              high) in both
    Raises OSError when the folder is not there or cannot be written.
    """
    result = result or {}
    data = {
        "charts": _charts(metrics),
        "chunks": _all_chunks(_listed(chunks)),
        "rollouts": _rollouts([r for i, r in enumerate(rollouts) if i < MAX_ROLLOUTS or "scene" in r]),
        "samples": [_samples(one) for one in _listed(samples)],
    }
    fill = {
        "title": html.escape(title),
        "tables": _tables(tables),
        "result": _table({key: value for key, value in result.items() if key != "outcomes"}),
        "failures": _failures(result.get("outcomes") or {}),
        "config": _table(config or {}),
        # "</script>" inside a string would end the block, so no "<" may stand in it.
        "data": json.dumps(data, allow_nan=False, default=lambda v: v.tolist()).replace("<", "\\u003c"),
    }
    page = PAGE
    for name, content in (data | fill).items():
        page = re.sub(f"<!--{name}-->(.*?)<!--/{name}-->", r"\1" if content else "", page, flags=re.DOTALL)
    # In one pass: a title that itself contains {{data}} is not filled in again.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], page)
    aside = Path(f"{path}.tmp")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>
:root {
  color-scheme: light dark;
  --ground: #fcfcfb; --ink: #1d2024; --soft: #5d646e; --rule: #dfe1e4; --panel: #f0f1f3;
  --first: #0067a8; --second: #c65300;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --ink: #e6e8eb; --soft: #9ba3ae; --rule: #30343a; --panel: #202429;
    --first: #5ab4ec; --second: #f0a03c;
  }
}
* { box-sizing: border-box; }
/* The scroll bar is always there: it must not change the width after the canvases have been drawn. */
html { overflow-y: scroll; background: var(--ground); color: var(--ink); }
body { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 2rem; font-size: 1.5rem; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.125rem; font-weight: 600; }
h3 { margin: 1.5rem 0 .5rem; font-size: .875rem; font-weight: 400; color: var(--soft); }
figcaption b, figure > b { font-size: .875rem; font-weight: 600; overflow-wrap: anywhere; }
section { margin: 0 0 3rem; min-width: 0; }
body > .grid { margin-bottom: 3rem; }
body > .grid:not(:has(section)) { display: none; }
.grid > section { margin: 0; }
p { margin: 0 0 1rem; max-width: 48rem; color: var(--soft); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; overflow-wrap: anywhere; }
output, figcaption span { font-size: .8125rem; color: var(--soft); font-variant-numeric: tabular-nums; }
canvas { display: block; width: 100%; border-radius: 4px; touch-action: pan-y; }
:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
.grid { display: grid; gap: 1.5rem 2rem; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.many { gap: 1.5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(max(9rem, 22%), 1fr)); }
.many .player { gap: .4rem; }
.many .player button { min-width: 3.4rem; padding: .25rem; }
.many .player output { display: none; }
@media (min-width: 720px) { .beside { grid-template-columns: 3fr 1fr; } }
.stage { max-width: 600px; }
.reading { display: block; min-height: 2.5em; }
.reading span { white-space: nowrap; }
.player { display: flex; gap: .75rem; align-items: center; margin: .5rem 0; }
.player input { flex: 1; min-width: 0; height: 1.75rem; margin: 0; accent-color: var(--first); }
.player output { text-align: right; }
button {
  min-width: 4rem; padding: .25rem .5rem; border: 1px solid var(--rule); border-radius: 4px;
  background: var(--panel); color: var(--ink); font: inherit; font-size: .875rem; cursor: pointer;
}
table { width: 100%; max-width: 36rem; border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { width: 40%; font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0 0 2rem; }
.wide table { width: auto; max-width: none; }
.wide th, .wide td { width: auto; padding-right: 1.5rem; white-space: nowrap; }
.bar { width: 30%; }
.bar i { display: block; height: .6rem; background: var(--second); }
summary { cursor: pointer; margin-bottom: .75rem; }
</style>
</head>
<body>
<h1>{{title}}</h1>
<noscript><p>Pictures and curves are drawn by a script inside this file; scripts are off here.</p></noscript>
<!--tables--><section id="tables">
{{tables}}</section><!--/tables-->
<div class="grid">
<!--result--><section id="result"><h2>Result</h2><table>
{{result}}</table></section><!--/result-->
<!--failures--><section id="failures"><h2>Where failures end</h2><table>
{{failures}}</table></section><!--/failures-->
</div>
<!--chunks--><section id="chunks"><h2>From noise to actions</h2>
<p>Action chunks sampled for one observation, at every state of the sampler. Each chunk has its own colour;
large dots are the steps that are executed.</p>
<div class="grid"></div></section><!--/chunks-->
<!--samples--><section id="samples"><h2>From noise to samples</h2>
<div class="grid"></div></section><!--/samples-->
<!--rollouts--><section id="rollouts"><h2>Rollouts</h2>
<div class="player"><button type="button">Play all</button></div>
<div class="grid many"></div></section><!--/rollouts-->
<!--charts--><section id="charts"><h2>Training</h2>
<p>Against optimiser steps. Point at a curve, tap it, or use the arrow keys on it to read its values.</p>
<div class="grid"></div></section><!--/charts-->
<!--config--><details id="config"><summary>Configuration</summary><table>
{{config}}</table></details><!--/config-->
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const range = count => Array.from({length: count}, (_, i) => i);
const floats = packed => new Float32Array(Uint8Array.from(atob(packed.data), c => c.charCodeAt(0)).buffer);
const compact = new Intl.NumberFormat("en", {notation: "compact"});
const show = value => value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3
  ? (+value.toPrecision(2)).toExponential() : String(+value.toPrecision(3));

// Blue to amber keeps its order for colour-blind eyes, and every step stands out on either ground.
const HUES = [[47, 111, 222], [132, 95, 214], [204, 84, 152], [230, 112, 58], [214, 154, 0]];
function hue(n, count) {
  const at = n / Math.max(1, count - 1) * (HUES.length - 1), i = Math.min(Math.floor(at), HUES.length - 2);
  return `rgb(${HUES[i].map((c, d) => Math.round(c + (at - i) * (HUES[i + 1][d] - c))).join()})`;
}

function add(parent, tag, attributes = {}, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return parent.appendChild(node);
}

// A canvas as wide as its parent, drawn in CSS pixels and backed by the pixels of the screen: crisp lines.
const redraws = [];
const redrawAll = () => redraws.forEach(redraw => redraw());
addEventListener("resize", redrawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
function canvas(parent, label, heightFor, draw) {
  const node = add(parent, "canvas", {role: "img", "aria-label": label});
  function redraw() {
    const width = node.clientWidth, height = Math.round(heightFor(width)), ratio = devicePixelRatio || 1;
    node.style.height = height + "px";
    node.width = Math.round(width * ratio);
    node.height = Math.round(height * ratio);
    const pen = node.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    draw(pen, width, height);
  }
  redraws.push(redraw);
  redraw();
  return redraw;
}

// Play button, slider and label over states; starts at the last, finished one. Returns its play function.
function player(parent, name, labels, seen, period = clamp(4000 / labels.length, 60, 400)) {
  const bar = add(parent, "div", {class: "player"}), last = labels.length - 1;
  const button = add(bar, "button", {type: "button"});
  const slider = add(bar, "input", {type: "range", min: 0, max: last, "aria-label": name});
  const output = add(bar, "output", {"aria-live": "off"});
  output.style.minWidth = Math.max(...labels.map(label => label.length)) + "ch";
  let timer = null;
  function seek(k) {
    slider.value = k;
    slider.ariaValueText = output.textContent = labels[k];
    seen(k);
  }
  function run(on) {
    clearInterval(timer);
    timer = on ? setInterval(step, period) : null;
    button.textContent = on ? "Pause" : "Play";
    button.ariaLabel = `${button.textContent} ${name}`;
  }
  const step = () => +slider.value < last ? seek(+slider.value + 1) : run(false);
  const play = () => { if (+slider.value === last) seek(0); run(true); };
  button.onclick = () => timer === null ? play() : run(false);
  slider.oninput = () => { run(false); seek(+slider.value); };
  bar.hidden = last < 1;
  run(false);
  seek(last);
  return play;
}

// A sprite -> function that draws its k-th frame.
function picture(sprite) {
  const image = new Image();
  image.onload = redrawAll;
  image.src = sprite.uri;
  return (pen, k, x, y, width, height) => {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, k % sprite.columns * sprite.width, Math.floor(k / sprite.columns) * sprite.height,
                  sprite.width, sprite.height, x, y, width, height);
  };
}
// A canvas with `count` frames of a sprite in a square, from frame first() on.
function tiles(parent, label, sprite, count, first) {
  const across = Math.ceil(Math.sqrt(count)), ratio = sprite.height / sprite.width, gap = count > 1 ? 2 : 0;
  const image = picture(sprite);
  return canvas(parent, label, width => width / across * ratio * Math.ceil(count / across), (pen, width) => {
    const w = width / across, h = w * ratio;
    for (const n of range(count))
      image(pen, first() + n, n % across * w, Math.floor(n / across) * h, w - gap, h - gap);
  });
}

// Data units -> pixels, for a view [left, right, bottom, top] whose axes may run either way.
const scaleX = ([left, right], width) => x => (x - left) / (right - left) * width;
const scaleY = ([, , bottom, top], height) => y => (top - y) / (top - bottom) * height;
const heightOf = ([left, right, bottom, top]) => width =>
  width * clamp(Math.abs((top - bottom) / (right - left)), .4, 1.5);
function trail(pen, points) {
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(x, y));
  pen.stroke();
}
function dot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  pen.fill();
}
function frame(pen, width, height) {
  pen.strokeStyle = color("rule");
  pen.strokeRect(.5, .5, width - 1, height - 1);
}

// Runs beside each other: a button that plays them all. Returns where it was put.
function playAll(section, plays) {
  const bar = add(section, "div", {class: "player"});
  add(bar, "button", {type: "button"}, "Play all").onclick = () => plays.forEach(play => play());
  return bar;
}
function drawAll(section, sets, drawOne) {
  const grid = section.querySelector(".grid"), plays = sets.map(one => drawOne(grid, one, sets.length === 1));
  if (plays.length > 1) grid.before(playAll(section, plays));
}

function drawChunks(grid, chunks, alone) {
  const values = floats(chunks.trace), [S, N, T, A] = chunks.trace.shape, [start, stop] = chunks.executed;
  const columns = width => clamp(Math.floor(width / 150), 1, A), onPlane = chunks.xy !== null;
  const background = onPlane && chunks.extent && chunks.image ? picture(chunks.image) : null;
  const figure = add(grid, "figure", {class: onPlane ? "stage" : ""});
  const name = [chunks.name, "state of the sampler"].filter(Boolean).join(", ");
  if (chunks.name) add(figure, "b", {}, chunks.name);
  let k = S - 1;
  // Chunk n in state k: dots, and a line that fades in as the chunk takes shape.
  function drawChunk(pen, n, place) {
    const points = range(T).map(i => place(i, ((k * N + n) * T + i) * A));
    pen.strokeStyle = pen.fillStyle = hue(n, N);
    pen.globalAlpha = .1 + .6 * k / Math.max(1, S - 1);
    trail(pen, points);
    pen.globalAlpha = 1;
    points.forEach(([x, y], i) => dot(pen, x, y, i >= start && i < stop ? 2.6 : 1.3));
  }
  function drawPlane(pen, width, height) {
    const X = scaleX(chunks.view, width), Y = scaleY(chunks.view, height), box = chunks.extent;
    frame(pen, width, height);
    if (background) background(pen, 0, X(box[0]), Y(box[3]), X(box[1]) - X(box[0]), Y(box[2]) - Y(box[3]));
    for (const n of range(N)) drawChunk(pen, n, (i, at) => [X(values[at]), Y(values[at + 1])]);
  }
  function drawDimensions(pen, width, height) {
    const across = columns(width), w = (width + 12) / across - 12, h = height / Math.ceil(A / across) - 34;
    chunks.ranges.forEach(([low, high], d) => {
      const X = scaleX([-1, T], w), Y = scaleY([0, 0, low, high], h);
      pen.save();
      pen.translate(d % across * (w + 12), Math.floor(d / across) * (h + 34) + 20);
      pen.fillStyle = color("soft");
      pen.fillText(`action ${d}:  ${show(low)} to ${show(high)}`, 0, -6);
      frame(pen, w, h);
      pen.rect(0, 0, w, h);
      pen.clip();
      for (const n of range(N)) drawChunk(pen, n, (i, at) => [X(i), Y(values[at + d])]);
      pen.restore();
    });
  }
  const redraw = onPlane ? canvas(figure, "action chunks", heightOf(chunks.view), drawPlane)
    : canvas(figure, "action chunks", width => 150 * Math.ceil(A / columns(width)), drawDimensions);
  const play = player(figure, name, chunks.labels, state => { k = state; redraw(); });
  if (chunks.image && !background) {
    if (alone) grid.classList.add("beside");
    const beside = add(grid, "figure");
    tiles(beside, "observation", chunks.image, 1, () => 0);
    add(beside, "figcaption", {}, "Observation");
  }
  return play;
}

function drawSamples(grid, samples) {
  const figure = add(grid, "figure", {class: "stage"});
  const name = [samples.name, "state of the sampler"].filter(Boolean).join(", ");
  if (samples.name) add(figure, "b", {}, samples.name);
  const [points, known, field] = [samples.points, !samples.images && samples.data, samples.field]
    .map(packed => packed && floats(packed));
  let k = samples.labels.length - 1;
  function drawPoints(pen, width, height) {
    const X = scaleX(samples.view, width), Y = scaleY(samples.view, height);
    const dots = (values, from, count, radius) => range(count).forEach(
      i => dot(pen, X(values[from + 2 * i]), Y(values[from + 2 * i + 1]), radius));
    frame(pen, width, height);
    pen.fillStyle = color("soft");
    pen.globalAlpha = .5;
    dots(known, 0, known.length / 2, 1.2);
    pen.fillStyle = pen.strokeStyle = color("second");
    if (field) drawField(pen, X, Y);
    pen.globalAlpha = .9;
    pen.fillStyle = color("first");
    dots(points, 2 * k * samples.n, samples.n, 2.2);
  }
  function drawField(pen, X, Y) {  // the longest arrow spans one cell of the grid
    const G = samples.field.shape[1], [low, high] = samples.field_extent, cell = (high - low) / (G - 1);
    for (const i of range(G * G)) {
      const at = 2 * (k * G * G + i), x = low + i % G * cell, y = low + Math.floor(i / G) * cell;
      const [dx, dy] = [field[at], field[at + 1]].map(v => v / samples.longest * cell);
      const along = (forward, aside) => [X(x + forward * dx - aside * dy), Y(y + forward * dy + aside * dx)];
      trail(pen, [along(0, 0), along(.7, 0)]);
      trail(pen, [along(.7, .14), along(1, 0), along(.7, -.14)]);
      pen.fill();
    }
  }
  const redraw = samples.images ? tiles(figure, "samples", samples.images, samples.n, () => k * samples.n)
    : canvas(figure, "samples", heightOf(samples.view), drawPoints);
  const play = player(figure, name, samples.labels, state => { k = state; redraw(); });
  if (samples.images && samples.data) {
    const beside = add(grid, "figure", {class: "stage"});
    tiles(beside, "training data", samples.data, samples.data.count, () => 0);
    add(beside, "figcaption", {}, "Training data");
  }
  return play;
}

function drawRollouts(section, rollouts) {
  const scenes = {};
  function gridOf(scene) {
    if (!scene) return section.querySelector(".many");
    if (!scenes[scene]) {
      add(section, "h3", {}, scene);
      scenes[scene] = add(section, "div", {class: "grid many"});
    }
    return scenes[scene];
  }
  const plays = rollouts.map((rollout, index) => {
    const figure = add(gridOf(rollout.scene), "figure"), name = `rollout ${index + 1}`;
    const path = rollout.path && floats(rollout.path), count = path ? path.length / 2 : rollout.frames.count;
    let k = count - 1;
    function drawPath(pen, width, height) {
      const X = scaleX(rollout.view, width), Y = scaleY(rollout.view, height);
      const points = range(k + 1).map(i => [X(path[2 * i]), Y(path[2 * i + 1])]);
      frame(pen, width, height);
      pen.strokeStyle = pen.fillStyle = color(rollout.success ? "first" : "second");
      trail(pen, points);
      dot(pen, ...points[k], 4);
    }
    const redraw = path ? canvas(figure, name, heightOf(rollout.view), drawPath)
      : tiles(figure, name, rollout.frames, 1, () => k);
    const play = player(figure, name, range(count).map(String), state => { k = state; redraw(); }, 100);
    const caption = add(figure, "figcaption", {}, rollout.scene ? "" : rollout.instruction);
    if (rollout.name) add(caption, "b", {}, rollout.name);
    const end = rollout.success ? "\u2713 success" : `\u2717 ${rollout.outcome || "failure"}`;
    add(caption, "div", {style: `color: var(--${rollout.success ? "first" : "second"})`}, end);
    if (rollout.seed && !rollout.scene) add(caption, "span", {}, `seed ${rollout.seed}`);
    return play;
  });
  section.querySelector("button").onclick = () => plays.forEach(play => play());
}

function ticks(low, high, count, log) {
  const decades = range(40).map(e => 10 ** (e - 20)), marks = [1, 2, 5].flatMap(m => decades.map(p => m * p));
  const inside = (log === true ? [decades, marks] : []).map(set => set.filter(m => m >= low && m <= high))
    .find(set => set.length > 1);
  if (inside) return inside;
  const step = marks.sort((a, b) => a - b).find(mark => mark >= (high - low) / count);
  return range(count + 1).map(i => (Math.ceil(low / step) + i) * step).filter(mark => mark <= high);
}

function drawChart(grid, {title, lines, log, percent}) {
  const figure = add(grid, "figure"), left = 52;
  add(figure, "figcaption", {}, title);
  const text = value => value === null ? "not finite"
    : percent ? `${+(100 * value).toPrecision(3)} %` : show(value);
  const tint = i => lines.length > 2 ? hue(i, lines.length) : color(["first", "second"][i]);
  const steps = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b), last = steps.length - 1;
  const values = lines.flatMap(line => [...line.y, ...(line.interval || []).flat()]).filter(v => v !== null);
  log = log && values.length > 0 && values.every(value => value > 0);
  let low = Math.min(...values, ...(log ? [] : [0])), high = Math.max(...values, percent ? 1 : low);
  if (!log && !percent) high *= 1.08;
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low, low + 1];
  let cursor = null;  // index into steps

  function draw(pen, width, height) {
    const at = log ? Math.log : value => value, bottom = height - 22;
    const X = step => left + 4 + (step - steps[0]) / (steps[last] - steps[0] || 1) * (width - left - 12);
    const Y = value => 6 + (at(high) - at(value)) / (at(high) - at(low)) * (bottom - 10);
    pen.textBaseline = "middle";
    pen.strokeStyle = color("rule");
    pen.fillStyle = color("soft");
    pen.textAlign = "right";
    for (const tick of ticks(low, high, 4, log)) {
      trail(pen, [[left, Y(tick)], [width, Y(tick)]]);
      pen.fillText(text(tick), left - 6, Y(tick));
    }
    for (const tick of last ? ticks(steps[0], steps[last], Math.floor(width / 90)) : steps) {
      pen.textAlign = X(tick) > width - 20 ? "right" : "center";
      pen.fillText(compact.format(tick), Math.min(X(tick), width), height - 8);
    }
    if (cursor !== null) trail(pen, [[X(steps[cursor]), 0], [X(steps[cursor]), bottom]]);
    pen.lineJoin = "round";
    lines.forEach((line, i) => {
      pen.strokeStyle = pen.fillStyle = tint(i);
      for (const ys of line.mean ? [line.y, line.mean] : [line.y]) {  // logged values faint behind their mean
        [pen.lineWidth, pen.globalAlpha] = line.mean && ys === line.y ? [1, .35] : [1.75, 1];
        pen.beginPath();
        ys.forEach((y, j) => {  // a value that is not finite breaks the line
          if (y !== null) pen[j && ys[j - 1] !== null ? "lineTo" : "moveTo"](X(line.x[j]), Y(y));
        });
        pen.stroke();
      }
      if (last < 40) line.y.forEach((y, j) => y !== null && dot(pen, X(line.x[j]), Y(y), 2.5));
      (line.interval || []).forEach((ends, j) => trail(pen, ends.map(end => [X(line.x[j]), Y(end)])));
    });
  }
  const redraw = canvas(figure, title, () => 190, draw), node = figure.querySelector("canvas");
  const reading = add(figure, "output", {class: "reading"});
  function read(to) {  // the values at the cursor; without one the last values
    cursor = to;
    const step = steps[to === null ? last : to], bad = lines.flatMap(line => line.bad);
    reading.textContent = `step ${step.toLocaleString("en")}`;
    lines.forEach((line, i) => {
      const j = line.x.indexOf(step), interval = line.interval && line.interval[j] || [];
      if (j < 0) return;
      reading.append(" ");
      const item = add(reading, "span");
      add(item, "i", {}, "\u25cf ").style.color = tint(i);
      item.append(`${line.name} ${text(line.y[j])}`, line.mean ? `, running mean ${text(line.mean[j])}` : "",
                  interval.length ? ` (${interval.map(text).join(" to ")})` : "");
    });
    if (bad.length) reading.append(`; logged values not finite: ${bad.length}, first at step ${bad[0]}`);
    redraw();
  }
  node.tabIndex = 0;
  node.onpointermove = node.onpointerdown = event => {
    const share = (event.offsetX - left - 4) / (node.clientWidth - left - 12);
    const step = steps[0] + share * (steps[last] - steps[0]), away = i => Math.abs(steps[i] - step);
    read(range(last + 1).reduce((best, i) => away(i) < away(best) ? i : best));
  };
  node.onpointerleave = node.onblur = () => read(null);
  node.onkeydown = event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) read(clamp((cursor === null ? last : cursor) + by, 0, last));
  };
  read(null);
}

if (data.chunks.length) drawAll(document.querySelector("#chunks"), data.chunks, drawChunks);
if (data.samples.length) drawAll(document.querySelector("#samples"), data.samples, drawSamples);
if (data.rollouts.length) drawRollouts(document.querySelector("#rollouts"), data.rollouts);
for (const chart of data.charts) drawChart(document.querySelector("#charts .grid"), chart);
</script>
</body>
</html>
"""
