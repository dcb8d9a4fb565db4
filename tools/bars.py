"""Successes of a comparison as a picture: bars with 95 % Wilson intervals, for a page in light or dark."""
from html import escape

from robot.errors import written_aside
from robot.rollout import wilson

WIDTH, LEFT, RIGHT, TOP = 640, 190, 24, 84      # pixels: of the picture, of the names, of the margin, above
BAR, GAP = 13, 15                               # height of a bar, distance between tasks
COLOURS = (("#c2570c", "#ffa657"), ("#6d28d9", "#b392f0"), ("#2f7a3d", "#6fd08c"), ("#2d55cd", "#7aa2f7"),
           ("#b02a5b", "#f58fb5"), ("#59636e", "#9198a1"), ("#8a6d00", "#d9b842"))     # on white, on black


def write_bars(counts, path):
    """counts {task: {model: (successes, episodes)}} -> the file. The expert is no bar but a line across those
    of its task: it is what there is to reach."""
    with written_aside(path) as aside:
        aside.write_text(bars(counts), encoding="utf-8")


def bars(counts):
    models = [model for model in dict.fromkeys(m for found in counts.values() for m in found)
              if model != "expert"]
    group = BAR * len(models) + GAP
    height = TOP + group * len(counts) + 34
    scale = (WIDTH - LEFT - RIGHT) / 100
    parts = [grid(scale, TOP, TOP + group * len(counts)), legend(models, counts)]
    said = []
    for row, (task, found) in enumerate(counts.items()):
        y = TOP + group * row + GAP / 2
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{y + (group - GAP) / 2 + 5:.1f}">{escape(task)}'
                     f'</text>')
        for i, model in enumerate(models):
            if found.get(model, (0, 0))[1]:
                parts.append(bar(i, y + BAR * i, scale, *found[model]))
                said.append(f"{task}: {model} {found[model][0]} of {found[model][1]}")
        if "expert" in found:
            x = LEFT + scale * 100 * found["expert"][0] / found["expert"][1]
            parts.append(f'<path class="expert" d="M{x:.1f} {y - 3:.1f}V{y + group - GAP + 3:.1f}"/>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-labelledby="title about">',
        f'<title id="title">Success in closed loop</title><desc id="about">{escape("; ".join(said))}</desc>',
        style(len(models)),
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="16"/>',
        '<text x="24" y="34" class="title">Success in closed loop, % (95 % intervals)</text>',
        *parts, "</svg>", ""])


def bar(i, y, scale, successes, episodes):
    low, high = (LEFT + 100 * scale * share for share in wilson(successes, episodes))
    width, middle = 100 * scale * successes / episodes, y + BAR / 2
    return (f'<rect class="m{i}" x="{LEFT}" y="{y + 1:.1f}" width="{width:.1f}" height="{BAR - 2}"/>'
            f'<path class="interval" d="M{low:.1f} {middle:.1f}H{high:.1f}'
            f'M{low:.1f} {middle - 3:.1f}v6M{high:.1f} {middle - 3:.1f}v6"/>')


def grid(scale, top, bottom):
    lines = [f'<path class="grid" d="M{LEFT + scale * x:.1f} {top}V{bottom}"/>'
             f'<text x="{LEFT + scale * x:.1f}" y="{bottom + 20}" class="tick">{x}</text>'
             for x in range(0, 101, 25)]
    return "\n".join(lines)


def legend(models, counts):
    parts, x = [], 24
    for i, model in enumerate(models):
        parts.append(f'<rect class="m{i}" x="{x}" y="52" width="12" height="12"/>'
                     f'<text x="{x + 18}" y="63">{escape(model)}</text>')
        x += 40 + 8 * len(model)
    if any("expert" in found for found in counts.values()):
        parts.append(f'<path class="expert" d="M{x + 6} 50v16"/>'
                     f'<text x="{x + 18}" y="63">scripted expert</text>')
    return "\n".join(parts)


def style(n):
    def rules(dark, text, faint, card, edge):
        fills = "\n".join(f".m{i} {{ fill: {COLOURS[i % len(COLOURS)][dark]} }}" for i in range(n))
        return (f"text {{ fill: {text} }}\n.tick {{ fill: {faint} }}\n"
                f".card {{ fill: {card}; stroke: {edge} }}\n.grid {{ stroke: {edge} }}\n"
                f".interval, .expert {{ stroke: {text} }}\n{fills}")
    light = rules(0, "#1f2328", "#59636e", "#ffffff", "#d1d9e0")
    dark = rules(1, "#f0f6fc", "#9198a1", "#151b23", "#3d444d")
    return f"""<style>
text {{ font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }}
.title {{ font-size: 18px; font-weight: 600 }}
.name {{ text-anchor: end }}
.tick {{ text-anchor: middle; font-size: 12px }}
.interval {{ fill: none; stroke-width: 1.5 }}
.expert {{ stroke-width: 3; stroke-dasharray: 4 2 }}
{light}
@media (prefers-color-scheme: dark) {{
{dark}
}}
</style>"""
