"""The pictures of docs/, drawn without a plotting library from the CSV files beside them.

    python tools/plots.py            # write docs/figures/*.svg
    python tools/plots.py --check    # write nothing; status 1 if a picture is out of date

A picture brings its own background, so it reads on a light and on a dark page. To change a figure,
edit its CSV file and run this; to add one, add a line to FIGURES.
"""
from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Callable
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.common import ROOT, command_line, run_cli, write_atomic  # noqa: E402

FOLDER = ROOT / "docs" / "figures"
WIDTH = 860                       # of every picture, in pixels
STYLE = """
svg { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif }
.title { font-size: 15px; font-weight: 600 }
.bold { font-weight: 600 }
.curve { fill: none; stroke-width: 2 }
.arrow { fill: none; stroke: #5d6877; stroke-width: 1.5 }
.page { fill: #ffffff; stroke: #d7dce3 }
.cool { fill: #eef3fb; stroke: #9db7de }
.warm { fill: #fbf1e9; stroke: #dfb08f }
.ink { fill: #1b2430 }
.soft { fill: #5d6877 }
.rule { stroke: #d7dce3 }
.zero { stroke: #8a94a3 }
.blue { fill: #2563c9; stroke: #2563c9 }
.red { fill: #c2502e; stroke: #c2502e }
.grey { fill: #8a94a3; stroke: #8a94a3 }
@media (prefers-color-scheme: dark) {
.arrow { stroke: #9aa6b5 }
.page { fill: #12171f; stroke: #323b48 }
.cool { fill: #1b2a42; stroke: #41608f }
.warm { fill: #3a2a20; stroke: #8a6145 }
.ink { fill: #e4e9f0 }
.soft { fill: #9aa6b5 }
.rule { stroke: #323b48 }
.zero { stroke: #6b7686 }
.blue { fill: #7fb0ff; stroke: #7fb0ff }
.red { fill: #f09a78; stroke: #f09a78 }
}
"""


# --- marks: each returns one SVG element; `look` names classes of STYLE


def text(x: float, y: float, words: str, look: str = "ink", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} class="{look}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} class="{look}"/>'


def dot(x: float, y: float, look: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{look}"/>'


def box(x: float, y: float, width: float, height: float, look: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} rx="8" class="{look}"/>'


def arrow(path: str) -> str:
    """A path and, at its end, a head that points right."""
    return f'<path d="{path} m-6 -4 l6 4 l-6 4" class="arrow"/>'


def picture(height: float, title: str, marks: list[str]) -> str:
    """The whole file: `marks` on a page of WIDTH x height under a title."""
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    name = f'role="img" aria-label="{escape(title)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {name}>',
        f"<style>{STYLE}</style>",
        box(0.5, 0.5, WIDTH - 1, height - 1, "page"),
        text(24, 32, title, "ink title"),
        *marks,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


# --- scales and figures


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers within [low, high]."""
    rough = (high - low) / 6
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * many for many in (1, 2, 5, 10) if unit * many >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [step * count for count in range(first, last + 1)]


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A function from values to pixels: low lies at `start`, high at `end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def read_figures(name: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of docs/figures/<name>.csv."""
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


# --- kinds of pictures: each takes the name of its CSV file, a title and the words at the axis


def intervals(name: str, title: str, axis: str) -> str:
    """A row per line of the file: a mean and two standard errors, coloured where they leave out zero.

    Columns: a name, the mean, its standard error; a fourth, if it is the last, stands at the right.
    """
    head, rows = read_figures(name)
    remark = len(head) == 4
    ranges = [(float(row[1]) - 2 * float(row[2]), float(row[1]) + 2 * float(row[2])) for row in rows]
    low = min(0.0, min(start for start, _ in ranges))
    high = max(0.0, max(end for _, end in ranges))
    x = scale(low, high, 330, WIDTH - (120 if remark else 40))
    top, pitch = 62, 22
    bottom = top + pitch * len(rows)
    marks = []
    for value in ticks(low, high):
        at = x(value)
        marks.append(line(at, top, at, bottom, "rule" if value else "zero"))
        marks.append(text(at, bottom + 18, f"{value:+.3g}" if value else "0", "soft", "middle"))
    for count, (row, (start, end)) in enumerate(zip(rows, ranges)):
        y = top + pitch * (count + 0.5)
        look = "red" if start > 0 else "blue" if end < 0 else "grey"
        marks.append(text(316, y + 4, row[0], "ink", "end"))
        marks.append(line(x(start), y, x(end), y, look))
        marks.append(dot(x(float(row[1])), y, look))
        if remark:
            marks.append(text(WIDTH - 24, y + 4, row[3], "ink", "end"))
    if remark:
        marks.append(text(WIDTH - 24, top - 8, head[3], "soft", "end"))
    marks.append(text(WIDTH / 2, bottom + 42, axis, "soft", "middle"))
    return picture(bottom + 60, title, marks)


def curve(points: list[list[str]], x: Callable, y: Callable, look: str) -> list[str]:
    """One curve through rows of (name, x, value, standard error), with its name at the end."""
    places, bars = [], []
    for _, across, value, error in points:
        value, error = float(value), float(error)
        places.append((x(float(across)), y(math.log(value))))
        bars.append((y(math.log(value - error)), y(math.log(value + error))))
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    marks = [f'<polyline points="{path}" class="{look} curve" style="fill: none"/>']
    for (px, py), (low, high) in zip(places, bars):
        marks.append(line(px, low, px, high, look))
        marks.append(dot(px, py, look))
    end_x, end_y = places[-1]
    return [*marks, text(end_x + 14, end_y + 4, points[0][0])]


def curves(name: str, title: str, axis: str) -> str:
    """A curve per name over x, with standard errors; the values on a logarithmic scale.

    Columns: name, x, value, standard error.
    """
    _, rows = read_figures(name)
    top, bottom, left, right = 62, 330, 90, WIDTH - 220
    across = sorted({float(row[1]) for row in rows})
    values = [float(row[2]) for row in rows]
    low, high = min(values) / 1.3, max(values) * 1.3
    x = scale(across[0] - 0.1, across[-1] + 0.1, left, right)
    y = scale(math.log(low), math.log(high), bottom, top)
    marks = [text(x(value), bottom + 20, f"{value:g}", "soft", "middle") for value in across]
    for level in (10, 20, 50, 100, 200, 500, 1000):
        if low < level < high:
            height = y(math.log(level))
            marks.append(line(left, height, right, height, "rule"))
            marks.append(text(left - 10, height + 4, str(level), "soft", "end"))
    names = list(dict.fromkeys(row[0] for row in rows))
    for look, who in zip(("red", "blue", "grey"), names):
        marks += curve([row for row in rows if row[0] == who], x, y, look)
    marks.append(text((left + right) / 2, bottom + 44, axis, "soft", "middle"))
    return picture(bottom + 62, title, marks)


STAGES = (  # of a run: name, what it does in two lines, and the colour of its clock
    ("Try everything", "checks, and a rehearsal", "of all later stages", "page"),
    ("Train", "until the clock says", "stop; average weights", "warm"),
    ("Quantise", "36 million weights to", "about 3.5 bits each", "warm"),
    ("Pack", "one file under 16 MB,", "script included", "warm"),
    ("Read back", "only this file is", "scored from here on", "cool"),
    ("Score", "sliding windows over", "every document", "cool"),
    ("Adapt", "score a piece, then learn", "from it; next piece", "cool"),
    ("Result", "bits per byte: lower wins;", "log, summary, limit check", "page"),
)


def pipeline(name: str, title: str, axis: str) -> str:
    """STAGES from left to right in two rows, under the two clocks of the competition; no CSV file."""
    width, height, gap = 188, 76, 20
    marks = [
        text(232, 74, "training budget: 600 s, up to the file on disk", "soft"),
        text(232, 226, "evaluation budget: 600 s, from opening the file to the last byte", "soft"),
        '<path d="M742 160 v28 H118 v42 m-4 -6 l4 6 l4 -6" class="arrow"/>',
    ]
    for count, (stage, first, second, clock) in enumerate(STAGES):
        row, column = divmod(count, 4)
        left = 24 + column * (width + gap)
        top = 84 + row * (height + 76)
        marks.append(box(left, top, width, height, clock))
        marks.append(text(left + 14, top + 24, stage, "ink bold"))
        marks.append(text(left + 14, top + 44, first, "soft"))
        marks.append(text(left + 14, top + 60, second, "soft"))
        if column < 3:
            marks.append(arrow(f"M{left + width + 3} {top + height / 2} h{gap - 6}"))
    return picture(336, title, marks)


ON_OFF = "BPB above the defaults, two standard errors over three seeds; right of 0: the change hurts"
FIGURES = {  # name of the picture and of its CSV file: (kind, title, words at the axis)
    "pipeline": (pipeline, "What one run does", ""),
    "ablation": (intervals, "Mechanisms on and off: width 128, 80 steps, two CPU cores", ON_OFF),
    "ablation_600_steps": (intervals, "Six of them over 600 steps", ON_OFF),
    "ablation_quantising": (intervals, "Quantising on and off, at equal bytes", ON_OFF),
    "ablation_scoring": (intervals, "Scoring and adaptation on and off", ON_OFF),
    "quantising": (
        curves,
        "What rounding costs a well-trained model: SmolLM2-135M, CPU",
        "bits a weight (real bytes); upwards: KL to the unrounded model, mnat a token",
    ),
    "adapting": (
        intervals,
        "Adaptation against the exact form: SmolLM2-135M, CPU",
        "nats a token above exact, same documents, two standard errors; left of 0: better",
    ),
}


def draw(name: str) -> str:
    """The SVG text of one of FIGURES."""
    kind, title, axis = FIGURES[name]
    return kind(name, title, axis)


def main(arguments=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for name in FIGURES:
        path = FOLDER / f"{name}.svg"
        drawn = draw(name)
        if path.exists() and path.read_text() == drawn:
            continue
        stale.append(path.name)
        if not check:
            write_atomic(path, drawn)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    run_cli(main)
