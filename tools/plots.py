"""The pictures of docs/, drawn without a plotting library from the CSV files beside them.

    python tools/plots.py            # write docs/figures/*.svg
    python tools/plots.py --check    # write nothing; status 1 if a picture is not what its CSV file says

A picture brings its own background, so it reads on a light and on a dark page. To change a figure, edit its
CSV file and run this; to add one, add a line to FIGURES.
"""
from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.common import ROOT, command_line, run_cli, write_atomic  # noqa: E402

FOLDER = ROOT / "docs" / "figures"
WIDTH = 860                       # of every picture, in pixels
STYLE = """
svg { font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; font-size: 13px }
.page { fill: #ffffff; stroke: #d7dce3 } .ink { fill: #1b2430 } .soft { fill: #5d6877 }
.rule { stroke: #d7dce3 } .zero { stroke: #8a94a3 } .title { font-size: 15px; font-weight: 600 }
.bold { font-weight: 600 } .blue { fill: #2563c9; stroke: #2563c9 } .red { fill: #c2502e; stroke: #c2502e }
.grey { fill: #8a94a3; stroke: #8a94a3 } .curve { fill: none; stroke-width: 2 }
.card { fill: #eef3fb; stroke: #9db7de } .warm { fill: #fbf1e9; stroke: #dfb08f }
.arrow { stroke: #5d6877; stroke-width: 1.5; fill: none }
@media (prefers-color-scheme: dark) {
.page { fill: #12171f; stroke: #323b48 } .ink { fill: #e4e9f0 } .soft { fill: #9aa6b5 }
.rule { stroke: #323b48 } .zero { stroke: #6b7686 } .blue { fill: #7fb0ff; stroke: #7fb0ff }
.red { fill: #f09a78; stroke: #f09a78 } .card { fill: #1b2a42; stroke: #41608f }
.warm { fill: #3a2a20; stroke: #8a6145 } .arrow { stroke: #9aa6b5 }
}
"""


# --- marks


def text(x: float, y: float, words: str, look: str = "ink", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{look}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{look}"/>'


def dot(x: float, y: float, look: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{look}"/>'


def box(x: float, y: float, width: float, height: float, look: str) -> str:
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8" '
            f'class="{look}"/>')


def picture(height: float, title: str, marks: list[str]) -> str:
    """The whole file: marks on a page of WIDTH x height with a title."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">')
    page = box(0.5, 0.5, WIDTH - 1, height - 1, "page")
    return "\n".join([head, f"<style>{STYLE}</style>", page, text(24, 32, title, "ink title"),
                      *marks, "</svg>"]) + "\n"


# --- scales


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers within [low, high]."""
    rough = (high - low) / 6
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def scale(low: float, high: float, start: float, end: float):
    """A function from values to pixels: low lies at `start`, high at `end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


# --- kinds of pictures


def intervals(rows: list[dict], title: str, axis: str) -> str:
    """A row per line of the file: its mean with two standard errors, coloured where they leave out zero.

    Columns: a name, a mean, its standard error; a fourth, if it holds single numbers, is shown as text.
    """
    name, mean, error, *more = rows[0]
    extra = more[0] if len(more) == 1 else None
    values = [(float(row[mean]), float(row[error])) for row in rows]
    low = min(0.0, min(m - 2 * e for m, e in values))
    high = max(0.0, max(m + 2 * e for m, e in values))
    left, right = 330, WIDTH - (120 if extra else 40)
    x = scale(low, high, left, right)
    top, pitch = 62, 22
    bottom = top + pitch * len(rows)
    marks = [line(x(t), top, x(t), bottom, "rule" if t else "zero")
             for t in ticks(low, high)]
    marks += [text(x(t), bottom + 18, f"{t:+.3g}" if t else "0", "soft", "middle")
              for t in ticks(low, high)]
    if extra:
        marks.append(text(WIDTH - 24, top - 8, extra, "soft", "end"))
    for i, (row, (m, e)) in enumerate(zip(rows, values)):
        y = top + pitch * (i + 0.5)
        look = "grey" if abs(m) <= 2 * e else "red" if m > 0 else "blue"
        marks.append(text(left - 14, y + 4, row[name], "ink", "end"))
        marks.append(line(x(m - 2 * e), y, x(m + 2 * e), y, look))
        marks.append(dot(x(m), y, look))
        if extra:
            marks.append(text(WIDTH - 24, y + 4, row[extra], "ink", "end"))
    marks.append(text(WIDTH / 2, bottom + 42, axis, "soft", "middle"))
    return picture(bottom + 60, title, marks)


def curves(rows: list[dict], title: str, axis: str) -> str:
    """A curve per name over x, with a standard error at each point; the values on a logarithmic scale.

    Columns: name, x, value, standard error.
    """
    name, across, value, error = rows[0]
    top, bottom, left, right = 62, 330, 90, WIDTH - 220
    xs = [float(row[across]) for row in rows]
    ys = [float(row[value]) for row in rows]
    x = scale(min(xs) - 0.1, max(xs) + 0.1, left, right)
    y = scale(math.log(min(ys) / 1.3), math.log(max(ys) * 1.3), bottom, top)
    marks = []
    for level in (10, 20, 50, 100, 200, 500, 1000):
        if min(ys) / 1.3 < level < max(ys) * 1.3:
            height = y(math.log(level))
            marks += [line(left, height, right, height, "rule"),
                      text(left - 10, height + 4, str(level), "soft", "end")]
    marks += [text(x(at), bottom + 20, f"{at:g}", "soft", "middle") for at in sorted(set(xs))]
    for look, who in zip(("red", "blue", "grey"), dict.fromkeys(row[name] for row in rows)):
        mine = [row for row in rows if row[name] == who]
        places = [(x(float(row[across])), y(math.log(float(row[value])))) for row in mine]
        path = " L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        marks.append(f'<path d="M{path}" class="{look} curve" style="fill:none"/>')
        for row, (px, py) in zip(mine, places):
            v, e = float(row[value]), float(row[error])
            marks.append(line(px, y(math.log(v - e)), px, y(math.log(v + e)), look))
            marks.append(dot(px, py, look))
        marks.append(text(places[-1][0] + 14, places[-1][1] + 4, who))
    marks.append(text((left + right) / 2, bottom + 44, axis, "soft", "middle"))
    return picture(bottom + 62, title, marks)


STAGES = (  # of a run: name, what it does, and which clock it is on
    ("Try everything", "checks, and a rehearsal", "of all later stages", ""),
    ("Train", "until the clock says", "stop; keep an average", "warm"),
    ("Quantise", "36 million weights to", "about 3.5 bits each", "warm"),
    ("Pack", "one file under 16 MB,", "script included", "warm"),
    ("Read back", "only this file is", "scored from here on", "card"),
    ("Score", "sliding windows over", "every document", "card"),
    ("Adapt", "score a piece, then learn", "from it; next piece", "card"),
    ("Result", "bits per byte: lower wins;", "log, summary, verdict", ""),
)


def pipeline(rows: list[dict], title: str, axis: str) -> str:
    """The stages of a run, left to right in two rows, on the two clocks of the competition. No file."""
    marks, width, height, gap = [], 188, 76, 20
    for i, (name, first, second, clock) in enumerate(STAGES):
        row, column = divmod(i, 4)
        left = 24 + column * (width + gap)
        top = 84 + row * (height + 76)
        marks += [box(left, top, width, height, clock or "page"),
                  text(left + 14, top + 24, name, "ink bold"),
                  text(left + 14, top + 44, first, "soft"),
                  text(left + 14, top + 60, second, "soft")]
        if column < 3:
            start = f"M{left + width + 3} {top + height / 2}"
            marks.append(f'<path d="{start} h{gap - 6} m-6 -4 l6 4 l-6 4" class="arrow"/>')
    marks += ['<path d="M742 160 v28 H118 v42 m-4 -6 l4 6 l4 -6" class="arrow"/>',
              text(232, 74, "training budget: 600 s, up to the file on disk", "soft"),
              text(232, 226, "evaluation budget: 600 s, from opening the file to the last byte", "soft")]
    return picture(336, title, marks)


ON_OFF = "BPB above the defaults, two standard errors over three seeds; right of 0: the change hurts"
FIGURES = {  # name of the picture: (how, title, axis); its numbers lie in the CSV file of the same name
    "pipeline": (pipeline, "What one run does", ""),
    "ablation": (intervals, "Mechanisms on and off: width 128, 80 steps, two CPU cores", ON_OFF),
    "ablation_600_steps": (intervals, "Six of them over 600 steps", ON_OFF),
    "ablation_quantising": (intervals, "Quantising on and off, at equal bytes", ON_OFF),
    "ablation_scoring": (intervals, "Scoring and adaptation on and off", ON_OFF),
    "quantising": (curves, "What rounding costs a well-trained model: SmolLM2-135M, CPU",
                   "bits a weight (real bytes); upwards: KL to the unrounded model, mnat a token"),
    "adapting": (intervals, "Adaptation against the exact form: SmolLM2-135M, CPU",
                 "nats a token above exact, same documents, two standard errors; left of 0: better"),
}


def draw(name: str) -> str:
    """The SVG text of one of FIGURES."""
    how, title, axis = FIGURES[name]
    path = FOLDER / f"{name}.csv"
    rows = []
    if how is not pipeline:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    return how(rows, title, axis)


def main(arguments=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for name in FIGURES:
        path, new = FOLDER / f"{name}.svg", draw(name)
        if path.exists() and path.read_text() == new:
            continue
        stale.append(path.name)
        if not check:
            write_atomic(path, new)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    run_cli(main)
