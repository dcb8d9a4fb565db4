"""The picture that goes with demos/check.py: one HTML file that needs no network and no script. Every
dimension over time, every episode a thin line, and the first frames of every camera."""
import html

import numpy as np

from demos.png import data_uri
from robot.errors import one_line, written_aside
from robot.looks import spread

POINTS = 64                     # of a line
BUDGET = 300_000                # points of a page, about 2 MB: of many episodes or dimensions fewer are drawn
MOST_DIMENSIONS = 150
HIGHLIGHTS = 4                  # episodes in colour: those that findings name, then the first ones
FRAMES = 6                      # of a camera
WIDTH, HEIGHT = 300, 110        # of a chart, in its own units

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1d2024; --soft: #5d646e; --rule: #dfe1e4;
  --c0: #0067a8; --c1: #c65300; --c2: #2a7f3e; --c3: #8a3fa0; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --ink: #e6e8eb; --soft: #9ba3ae;
  --rule: #30343a; --c0: #5ab4ec; --c1: #f0a03c; --c2: #6cc784; --c3: #cf8fe0; } }
* { box-sizing: border-box; }
html { background: var(--ground); color: var(--ink); }
body { max-width: 1160px; margin: 0 auto; padding: 1.5rem 1rem 4rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.375rem; overflow-wrap: anywhere; } h2 { font-size: 1.125rem; margin: 2.5rem 0 .75rem; }
h1, h2 { font-weight: 600; line-height: 1.25; }
p, li { max-width: 60rem; overflow-wrap: anywhere; } p, small, figcaption { color: var(--soft); }
li { margin: 0 0 .5rem; } ul { padding-left: 1.25rem; }
pre { overflow-x: auto; font-size: .8125rem; line-height: 1.4; padding: .75rem;
  border: 1px solid var(--rule); }
figure { margin: 0; min-width: 0; } figcaption { font-size: .8125rem; overflow-wrap: anywhere; }
.grid { display: grid; gap: 1.25rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.frames { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.frames img { display: block; width: 100%; image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; border-bottom: 1px solid var(--rule); }
path { fill: none; vector-effect: non-scaling-stroke; }
.all { stroke: var(--soft); stroke-width: .6; opacity: .35; } .one { stroke-width: 1.6; }
.key { display: inline-block; margin-right: 1rem; } .key::before { content: ""; display: inline-block;
  width: 1.2em; height: .2em; margin-right: .4em; vertical-align: middle; background: var(--c); }
"""


def write(path, report):
    """Raises UserError if the file cannot be written."""
    text = page(report)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def page(report):
    say = html.escape
    title = report.lines[0] if report.lines else str(report.facts["path"])
    parts = ["<!DOCTYPE html><html lang=en><meta charset=utf-8>"
             "<meta name=viewport content='width=device-width'>"
             f"<title>{say(one_line(title, 100))}</title><style>{STYLE}</style><h1>{say(title)}</h1>"]
    for head, lines in report.sections():
        if lines:
            items = "".join(f"<li>{say(line)}" for line in lines[:50])
            parts.append(f"<h2>{head.capitalize()}</h2><ul>{items}</ul>")
    if not report.wrong and not report.level("fault"):
        parts.append("<p>Nothing looks wrong.</p>")
    parts.append(f"<pre>{say(chr(10).join(report.lines[1:]))}</pre>")
    if report.found:
        chosen = highlighted(report)
        parts += cameras(report, chosen)
        parts += charts(report.found, chosen)
    return "\n".join(parts) + "\n"


def highlighted(report):
    named = [e for finding in report.level("fault") for e in finding.episodes[:2]]
    return list(dict.fromkeys([*named, *range(len(report.found.lengths))]))[:HIGHLIGHTS]


def cameras(report, chosen):
    for camera, of_episode in report.seen.items():
        shown = [e for e in dict.fromkeys([*chosen, *of_episode]) if e in of_episode][:FRAMES]
        yield f"<h2>{html.escape(one_line(camera, 80))}</h2><div class=frames>"
        for e in shown:
            yield (f"<figure><img alt='' src='{data_uri(of_episode[e].first)}'><figcaption>"
                   f"{html.escape(report.found.named([e]))}, step 0</figcaption></figure>")
        yield "</div>"


def charts(found, chosen):
    total = sum(x.shape[1] for x in found.numbers.values())
    shown = min(total, MOST_DIMENSIONS)
    most = max(10, BUDGET // (POINTS * max(1, shown)))
    count = len(found.lengths)
    thin = spread(count, most)
    keys = "".join(f"<span class=key style='--c: var(--c{i})'>{html.escape(found.named([e]))}</span>"
                   for i, e in enumerate(chosen))
    some = f", the first {shown} of {total} dimensions" * (shown < total)
    yield (f"<h2>Every dimension over time</h2><p>{len(thin)} of {count} episodes{some}; in colour: {keys}"
           f"</p><div class=grid>")
    longest = found.lengths[np.union1d(thin, chosen)].max()
    left = shown
    for key, x in found.numbers.items():
        names = found.episodes[0].action_names if key == "actions" else ()
        for d in range(min(left, x.shape[1])):
            name = f" {names[d]}" if len(names) == x.shape[1] else ""
            yield chart(found, f"{key}[{d}]{name}", key, d, thin, chosen, longest)
        left -= min(left, x.shape[1])
    yield "</div>"


def chart(found, title, key, d, thin, chosen, longest):
    column = found.numbers[key][:, d]
    finite = column[np.isfinite(column)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)

    def line(e):
        y = column[found.rows(e)].astype(np.float64)
        steps = spread(len(y), POINTS)
        steps = steps[np.isfinite(y[steps])]
        across = (WIDTH * steps / max(1, longest - 1)).round(1)
        up = HEIGHT - 2 - (HEIGHT - 4) * ((y[steps] - low) / (high - low) if high > low else 0.5 + 0 * steps)
        return "M" + " ".join(f"{a:g} {b:.0f}" for a, b in zip(across, up)) if len(steps) else ""
    seconds = longest / found.fps
    paths = f"<path class=all d='{''.join(map(line, thin))}'/>" + "".join(
        f"<path class=one style='stroke: var(--c{i})' d='{line(e)}'/>" for i, e in enumerate(chosen))
    label = html.escape(title, quote=True)
    return (f"<figure><svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{label}'>{paths}</svg>"
            f"<figcaption><b>{html.escape(one_line(title, 60))}</b> {low:.4g} to {high:.4g}, 0 to "
            f"{seconds:.3g} s</figcaption></figure>")
