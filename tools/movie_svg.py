"""movie.py's picture as an animated SVG: a film of the table seen from above.

It is crisp at any size, right in light and dark, and plays inside an <img>. All animations are SMIL, on one
clock, because CSS cannot animate the points of a line. A viewer who asks for reduced motion sees the finished
chunks instead, and so does one whose program cannot animate.

Map: when (Clock) -> colours (PAINT, style) -> numbers to text (path, box) -> what moves (Picture) -> what
does not (scenery) -> svg.
"""
import dataclasses
from xml.sax.saxutils import escape

import numpy as np

from robot import tabletop


@dataclasses.dataclass
class Clock:
    """When, in seconds."""
    film: object                        # movie.Film
    noise: float = 1.2                  # the noise stands still
    forming: float = 5.0                # it becomes actions
    ways: float = 2.6                   # all chunks stand still
    choice: float = 1.6                 # one remains
    tick: float = 0.16                  # one control step; a little slower than the robot
    end: float = 2.6                    # the result stands still
    fade: float = 0.4                   # in at the beginning, out at the end

    def __post_init__(self):
        S = len(self.film.states) - 1
        self.at_state = self.noise + self.forming * np.arange(S + 1) / S
        self.chosen = self.at_state[-1] + self.ways
        self.at_step = self.chosen + self.choice + self.tick * np.arange(len(self.film.scenes))
        self.total = self.at_step[-1] + self.end


SCALE, LEFT, TOP = 300, 20, 104         # in pixels: half the table, and where it begins
WIDTH, HEIGHT = 2 * (SCALE + LEFT), 2 * SCALE + TOP + LEFT
LINES = {-1: "left", 1: "right", 0: "none"}     # classes of the chunks, by the side on which they pass

rgb = "#{:02x}{:02x}{:02x}".format
PAINT = (  # selector, property, in light, in dark
    ("text", "fill", "#1f2328", "#f0f6fc"),
    (".small", "fill", "#59636e", "#9198a1"),
    (".mark", "fill", "#4c6b42", "#8fb58a"),
    (".success", "fill", "#2f7a3d", "#6fd08c"),
    (".card", "fill", "#ffffff", "#151b23"),
    (".card", "stroke", "#d1d9e0", "#3d444d"),
    (".table", "fill", "#f0ece3", "#262c36"),
    (".zone", "fill", "#dce8d4", "#23392b"),
    (".zone", "stroke", "#8aa97c", "#4d7a58"),
    (".wall", "fill", "#57534e", "#9198a1"),
    (".red", "fill", *2 * [rgb(*tabletop.RED)]),
    (".blue", "fill", *2 * [rgb(*tabletop.BLUE)]),
    (".red, .blue", "stroke", "none", "#a3acb8"),
    (".hand", "fill", "#24292f", "#f0f6fc"),
    (".hand", "stroke", "#ffffff", "#262c36"),
    # Violet and orange can be told apart with any kind of colour blindness, and no block has either colour.
    ("g.left", "stroke", "#6d28d9", "#b392f0"),
    ("tspan.left", "fill", "#6d28d9", "#b392f0"),
    ("g.right", "stroke", "#c2570c", "#ffa657"),
    ("tspan.right", "fill", "#c2570c", "#ffa657"),
    ("g.none", "stroke", "#8b857a", "#8b949e"),
    ("tspan.none", "fill", "#6e6960", "#9aa4af"))
SHAPES = """
text { font: 600 27px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.small, .count { font-size: 21px }
.count { text-anchor: end }
.mark { font-size: 22px; text-anchor: middle }
.small, .mark { font-weight: 400 }
.card, .zone, .hand, .red, .blue { stroke-width: 2 }
.asked { stroke-width: 5 }
.line { fill: none; stroke-width: 3; opacity: 0.8; stroke-linejoin: round; stroke-linecap: round }
.later { opacity: 0 }
.whole { stroke-width: 4; opacity: 0.5 }
.done { stroke-width: 8 }
.still { display: none }
@media (prefers-reduced-motion: reduce) { .moving { display: none } .still { display: inline } }
"""


def style():
    light, dark = ("\n".join(f"{selector} {{ {what}: {colours[i]} }}" for selector, what, *colours in PAINT)
                   for i in (0, 1))
    return f"{SHAPES}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def short(number):
    return f"{round(float(number), 1) + 0:g}"       # + 0: no "-0"


def pixels(points):
    """Table units (..., 2) -> pixels; y points down there."""
    return np.asarray(points) * [SCALE, -SCALE] + [LEFT + SCALE, TOP + SCALE]


def path(points):
    return " ".join(f"{short(x)},{short(y)}" for x, y in pixels(points))


def box(name, centre, half, radius=0, inner=""):
    (x, y), (w, h) = pixels(centre) - np.multiply(half, SCALE), 2 * SCALE * np.asarray(half)
    return (f'<rect class="{name}" x="{short(x)}" y="{short(y)}" width="{short(w)}" height="{short(h)}" '
            f'rx="{radius}">{inner}</rect>')


class Picture:
    """All that moves; still: the same without any animation, at the moment when all chunks are finished."""

    def __init__(self, film, still=False):
        self.film, self.clock, self.still = film, Clock(film), still

    def group(self):
        end = self.clock.total
        fade = self.animate("opacity", [0, self.clock.fade, end - self.clock.fade, end], [0, 1, 1, 0])
        parts = [*self.captions(), '<g clip-path="url(#table)">', *self.chunks(), *self.executed(),
                 *self.blocks(), self.gripper(), "</g>"]
        return "\n".join([f'<g class="{"still" if self.still else "moving"}">{fade}', *parts, "</g>"])

    def animate(self, attribute, times, values, smooth=False, move=False):
        """`values` of the attribute at `times`, held before and after. smooth: eased in between. move: the
        values are translations."""
        times, values = [0, *times, self.clock.total], [values[0], *values, values[-1]]
        more = ' type="translate"' if move else ""
        if smooth:
            more += f' calcMode="spline" keySplines="{";".join([".4 0 .5 1"] * (len(times) - 1))}"'
        return self.tag("animateTransform" if move else "animate", attribute, times, values, more)

    def between(self, start, end):
        """Seen from start to end only."""
        times, values = ([0, end], [1, 0]) if start == 0 else ([0, start, end], [0, 1, 0])
        return self.tag("animate", "opacity", times, values, ' calcMode="discrete"')

    def tag(self, name, attribute, times, values, more):
        if self.still:
            return ""
        keys = ";".join(f"{t / self.clock.total:.5f}".rstrip("0").rstrip(".") for t in times)
        return (f'<{name} attributeName="{attribute}" dur="{self.clock.total:.2f}s" repeatCount="indefinite" '
                f'keyTimes="{keys}" values="{";".join(map(str, values))}"{more}/>')

    def captions(self):
        film, clock = self.film, self.clock
        S, Ta, at = len(film.states) - 1, film.executed, clock.at_state
        left, right = counts(film)
        neither = len(film.sides) - left - right
        ways = "two ways round the wall"
        shown = [(0, at[0], f"noise: {len(film.sides)} chunks, one observation")]
        shown += [(at[k], at[k + 1], f"denoising step {k + 1} of {S}") for k in range(S)]
        shown += [(at[-1], clock.chosen, ways),
                  (clock.chosen, clock.at_step[0], f"one of them is executed for {Ta} steps"),
                  (clock.at_step[0], clock.at_step[-1], f"every {Ta} steps the policy looks again"),
                  (clock.at_step[-1], clock.total, '<tspan class="success">success</tspan>')]
        for start, end, text in shown:
            if text == ways or not self.still:
                yield (f'<text x="{LEFT}" y="80" opacity="{int(text == ways)}">{self.between(start, end)}'
                       f'{text}</text>')
        yield (f'<text class="count" x="{WIDTH - LEFT}" y="42">{self.between(at[-1], clock.at_step[0])}'
               f'<tspan class="left">{left} left</tspan>, <tspan class="right">{right} right</tspan>'
               + f', <tspan class="none">{neither} neither</tspan>' * (neither > 0) + "</text>")

    def chunks(self):
        """The chunks of the first look, from noise on."""
        film, clock = self.film, self.clock
        first, formed = clock.at_state[[0, -1]]
        times = [first, (first + 2 * formed) / 3, formed, clock.chosen, clock.chosen + clock.fade]
        looks = self.animate("opacity", times, [0.3, 0.4, 0.8, 0.8, 0.15])  # noise covers all: it stays faint
        looks += self.animate("stroke-width", [first, formed], [1.5, 3])
        for side, name in LINES.items():
            yield f'<g class="line {name}">{looks}'
            for i in np.flatnonzero(film.sides == side):
                states = [path(state[i]) for state in film.states]
                forms = self.animate("points", clock.at_state, states, smooth=True)
                yield f'<polyline points="{states[-1]}">{forms}</polyline>'
            yield "</g>"

    def executed(self):
        """The executed chunk of every look: bold until the next look, then faint."""
        film, clock = self.film, self.clock
        starts = [clock.chosen, *(clock.at_step[step] for step, _ in film.looks[1:]), clock.at_step[-1]]
        for (_, chunk), start, end in zip(film.looks, starts, starts[1:]):
            if self.still:
                return
            fade = min(0.2, (end - start) / 3)
            seen = self.animate("opacity", [start, start + fade, end - fade, end], [0, 1, 1, 0.4])
            yield (f'<g class="line later {LINES[film.sides[0]]}">{seen}'
                   f'<polyline class="whole" points="{path(chunk)}"/>'
                   f'<polyline class="done" points="{path(chunk[:film.executed])}"/></g>')

    def blocks(self):
        for i, name in enumerate(("red", "blue")):
            places = np.array([scene["object"][2 * i:2 * i + 2] for scene in self.film.scenes])
            yield box(name, places[0], tabletop.BLOCK, 6, self.travel(places))

    def gripper(self):
        """As tabletop.py draws it: a palm, and two fingers that stand outside a block when open."""
        places = np.array([scene["robot0_eef_pos"] for scene in self.film.scenes])
        aperture = np.array([scene["robot0_gripper_qpos"][0] for scene in self.film.scenes])
        parts = [box("hand", places[0] + [0, 0.1], (0.16, 0.025), 5)]
        for side in (-1, 1):
            finger = np.column_stack([side * (0.03 + 0.1 * aperture), np.full_like(aperture, 0.04)])
            parts.append(box("hand", places[0] + finger[0], (0.028, 0.065), 5, self.travel(finger)))
        return f'<g>{self.travel(places)}{"".join(parts)}</g>'

    def travel(self, places):
        """Moves a shape along places (n, 2), one for each control step; it is drawn at the first."""
        away = (places - places[0]) * [SCALE, -SCALE]
        if not away.any():
            return ""
        steps = [f"{short(x)},{short(y)}" for x, y in away]
        return self.animate("transform", self.clock.at_step, steps, move=True)


def counts(film):
    return [int((film.sides == side).sum()) for side in (-1, 1)]


def scenery(film):
    """What never moves."""
    yield f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="16"/>'
    yield f'<text class="small" x="{LEFT}" y="42">instruction: {escape(film.instruction)}</text>'
    yield box("table", (0, 0), (1, 1), 10)
    for name, zone in zip(("left", "right"), tabletop.ZONES):
        yield box("zone asked" if name in film.instruction else "zone", zone, tabletop.ZONE, 8)
        x, y = pixels(zone)
        yield f'<text class="mark" x="{short(x)}" y="{short(y + 7)}">{name}</text>'
    yield box("wall", (0, tabletop.WALL_Y), tabletop.WALL, 4)


def svg(film):
    left, right = counts(film)
    about = (f"A gripper on a table has to bring the {film.instruction}. {len(film.sides)} chunks form "
             f"out of noise: {left} pass a wall on the left, {right} on the right. One is executed, then the "
             f"next, until the block is where it belongs.")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-labelledby="title about">',
        f'<title id="title">Action chunks form out of noise</title><desc id="about">{escape(about)}</desc>',
        f"<style>{style()}</style>", f'<clipPath id="table">{box("", (0, 0), (1, 1), 10)}</clipPath>',
        *scenery(film), Picture(film).group(), Picture(film, still=True).group(), "</svg>"]) + "\n"
