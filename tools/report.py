"""A run, or several side by side -> one HTML file: the result, sampling from noise with a slider, rollouts
that play, curves.

train.py calls `write` at its end, sample.py after an evaluation, tools/compare.py with several runs. The file
needs no network and no library: arrays travel as base64 float32 and pictures as PNG inside one JSON block; a
script draws them on canvases.

What the page says in words comes from words.py, what it draws from drawing.py and charts.py. The page itself
is in page/: page.html, its style, and the scripts, which are put into it in the order of SCRIPTS. Sections
without data are cut out between their <!--name--> marks; {{name}} is filled in.
"""
import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np

from robot.errors import written_aside
from tools import words
from tools.charts import charts_and_numbers
from tools.drawing import all_chunks, films_for_page, samples_for_page
from tools.pictures import pictures

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("canvas", "chunks", "samples", "films", "charts")
MAX_ROLLOUTS = 8


def write_of_run(run, result, rollouts, environments):
    """report.html of a run of train.py. environments: see train.arenas."""
    shown = pictures(run.shown, run.held_out if len(run.held_out) else run.items, run.normalizer,
                     run.description, run.options.seed, environments)
    write(run.out / "report.html", f"{run.options.model} ({run.options.preset})", run.rows, result,
          dataclasses.asdict(run.config), rollouts=rollouts, about=words.about(run.description), **shown)


def write(path, title, metrics=(), result=None, config=None, chunks=None, rollouts=(), samples=None,
          tables=(), about=None):
    """Write the report to `path` (aside first, then renamed). What is not given is left out of the page.

    metrics   dicts of metrics.jsonl: `step` with loss, lr, grad_norm, data_s, compute_s, samples_per_s, or
              with val_loss, action_error, success, interval [low, high], loss_t (means in equal buckets of t)
    result    dict of final figures, that of result.json: the headline says what it found; its `outcomes`
              {outcome: episodes} become the table of failures
    config    dict, may be nested; folded away
    about     {label: text} below the headline: data, units, command, date (words.about makes it)
    chunks    trace (S, N, Tp, A): N chunks at each of S states from noise to actions, in data units;
              labels: S strings; xy: the two dimensions that are plane coordinates, or None: every dimension
              over time. Optional: executed (start, stop) steps, of which start is now; names and units, A
              strings each; hz: steps per second; instruction; cameras {name: (H, W, 3) uint8}, beside it.
              On a plane: observation (H, W, 3) uint8, drawn below the chunks where extent (left, right,
              bottom, top) says, in action units (y down: bottom > top); without extent it stands beside.
              Over time: demonstrated (Tp, A), NaN where there is none
    rollouts  dicts: frames (T, H, W, 3) uint8 or path (T, 2); success; optional outcome, instruction, seed.
              Failures come first; 8 are shown with every frame they have, so thin long episodes before
    Several runs: chunks and samples may be lists, each with a `name`, chunks also with a `group` whose scale
    they share; rollouts with `name` and `scene`, those of one scene beside each other, and all are shown; and
    tables    [(title, rows)], a row a dict {column: value}
    samples   trace (S, N, 2) points or (S, N, C, H, W) images in [-1, 1]; labels: S strings. Optional: data,
              the same without S; field (S, G, G, 2), rows along y, columns along x, over field_extent (low,
              high) in both
    Raises UserError when `path` cannot be written.
    """
    result = result or {}
    charts, numbers = charts_and_numbers(metrics, known=result)
    films = films_for_page(rollouts)
    data = {
        "charts": charts,
        "chunks": all_chunks(listed(chunks)),
        "rollouts": [film for i, film in enumerate(films) if i < MAX_ROLLOUTS or "scene" in film],
        "samples": [samples_for_page(one) for one in listed(samples)],
    }
    said = words.headlines(result, tables)
    fill = {
        "title": html.escape(title),
        "headline": "".join(f"<span>{html.escape(sentence)}</span>" for sentence in said or [title]),
        "run": html.escape(title) if said else "",
        "about": words.about_list(about or {}),
        "tables": words.comparison_tables(tables),
        "result": words.result_table(result),
        "failures": words.failure_table(result),
        "numbers": words.number_table(numbers),
        "training": bool(charts or numbers),
        "config": words.config_table(config or {}),
        # "</script>" inside a string would end the block, so no "<" may stand in it.
        "data": json.dumps(data, allow_nan=False, default=lambda v: v.tolist()).replace("<", "\\u003c"),
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    for name, content in (data | fill).items():
        page = re.sub(f"<!--{name}-->(.*?)<!--/{name}-->", r"\1" if content else "", page, flags=re.DOTALL)
    # In one pass: a title that itself contains {{data}} is not filled in again.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], page)
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")


def listed(one_or_several):
    several = [one_or_several] if isinstance(one_or_several, dict) else one_or_several or []
    return [entry for entry in several if np.size(entry["trace"])]
