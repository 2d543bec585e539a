"""The page that report.py and sweep.py fill: one HTML file, light or dark, which opens offline.

What it looks like stands in page.html; what is on it is handed over as the tuples below.
A plot is what plotly.js takes, as dictionaries; the library lies in the page, compressed.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from pathlib import Path
from typing import NamedTuple

from tools.common import ToolError, need

TEMPLATE = "page.html"
# Of runs, on white and on black; none is also the colour of a phase, a part or a kind of tensor.
RUN_COLOURS = (
    "#2f6fed", "#c2500c", "#0b8793", "#9b4bd8", "#cf3457", "#6d7f0d", "#c23a96", "#8a5d3b",
)
FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"
# On the page the style sheet recolours these for a dark screen.
INK, LINE = "#1e293b", "#dbe2ec"
AXIS = {
    "gridcolor": LINE,
    "zeroline": False,
    "ticks": "outside",  # unseen: room between axis and words
    "ticklen": 5,
    "tickcolor": "rgba(0,0,0,0)",
    "automargin": True,
    "title": {"font": {"size": 12}, "standoff": 8},
}
LAYOUT = {
    "font": {"family": FONT, "size": 12, "color": INK},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 46, "r": 14, "t": 8, "b": 40},
    "hovermode": "closest",
    "showlegend": False,
}


class Segment(NamedTuple):
    """A part of a bar."""

    name: str
    amount: float
    colour: str

    @property
    def shown(self) -> str:
        """Its name, and its amount to three digits or more."""
        amount = f"{self.amount:,.0f}" if self.amount >= 100 else f"{self.amount:.3g}"
        return f"{self.name} {amount}"


class Meter(NamedTuple):
    """A bar of segments, with its limit where there is one; `text` says its sum."""

    label: str
    text: str
    segments: list[Segment]
    limit: float = 0.0
    of: str = ""  # what `text` is a part of
    run: str = ""  # the key of its run

    @property
    def total(self) -> float:
        return sum(segment.amount for segment in self.segments)

    @property
    def over(self) -> bool:
        """Whether the limit is passed."""
        return 0 < self.limit < self.total

    def share(self, amount: float, longest: float = 0.0) -> str:
        """An amount as a share of the bar's length: of limit, sum or `longest`."""
        whole = max(self.limit, self.total, longest)
        return f"{100 * amount / whole:.2f}%" if whole else "0%"


class Card(NamedTuple):
    """A verdict: in one word (look: good, bad or open), with figure, meters and reasons."""

    verdict: str
    look: str
    name: str
    colour: str
    figure: str
    caption: str
    meters: list[Meter] = []
    notes: list[tuple[str, str]] = []  # (look, or plain, text)
    run: str = ""


class Key(NamedTuple):
    """An entry of a legend. look: box, disc, star, or solid, dash or dot and "line"."""

    name: str
    colour: str
    look: str = "box"


class Panel(NamedTuple):
    """A plot: traces and layout as plotly.js takes them.

    `switch`: its x axis is steps, and every trace has its seconds as meta.seconds.
    """

    key: str
    title: str
    traces: list[dict]
    layout: dict
    switch: bool = False
    run: str = ""


class Cell(NamedTuple):
    """A cell of a table; the marks become data- attributes."""

    text: str
    colour: str = ""
    marks: dict[str, str] = {}


class Table(NamedTuple):
    """Head and rows; the last row may be one of means."""

    head: list[str]
    rows: list[list[Cell]]
    mean: bool = False
    words: bool = False  # cells are aligned to the left


class Group(NamedTuple):
    """Meters under a heading, on one scale; `run`: the key of the run, if all are of one."""

    heading: str
    meters: list[Meter]
    run: str = ""

    @property
    def longest(self) -> float:
        """The length of the scale."""
        return max(max(meter.total, meter.limit) for meter in self.meters)


class Folded(NamedTuple):
    """Text that a click unfolds: [(heading, lines), …]."""

    title: str
    parts: list[tuple[str, str]]


class Section(NamedTuple):
    """A part of the page: what of the following it has, in this order.

    One with none of it is left out, and `missing` says why.
    """

    key: str
    title: str
    sentence: str
    missing: str
    legend: list[Key] = []
    panels: list[Panel] = []
    groups: list[Group] = []
    table: Table | None = None
    folded: Folded | None = None

    @property
    def is_empty(self) -> bool:
        meters = any(group.meters for group in self.groups)
        return not (self.panels or meters or self.table)

    @property
    def switches(self) -> bool:
        """Whether a plot can be drawn over steps and over seconds."""
        return any(panel.switch for panel in self.panels)


def plot(key: str, title: str, traces: list[dict], height: int = 260, x: dict | None = None,
         y: dict | None = None, margin: dict | None = None, switch: bool = False, run: str = "") -> Panel:
    """A panel in the page's style; x, y, margin: what is not as usual. height: in pixels."""
    layout = {**LAYOUT, "height": height, "xaxis": axis_of(x or {}), "yaxis": axis_of(y or {})}
    if margin:
        layout["margin"] = margin
    return Panel(key, title, traces, layout, switch, run)


def axis_of(own: dict) -> dict:
    """An axis in the page's style; its title is given as text."""
    axis = {**AXIS, **own}
    if "title" in own:
        axis["title"] = {**AXIS["title"], "text": own["title"]}
    return axis


def not_shown(sections: list[Section]) -> list[str]:
    """The titles of sections that are left out, with the reason."""
    return [f"{s.title} ({s.missing})" for s in sections if s.is_empty]


@functools.cache
def packed_library() -> str:
    """plotly.js as base64 of gzip: 1.9 of its 4.8 MB."""
    source = need("plotly.offline", "the page").get_plotlyjs()
    return base64.b64encode(gzip.compress(source.encode(), 9, mtime=0)).decode()


def figures_json(sections: list[Section]) -> str:
    """Every plot by its key, as it may stand in a script element."""
    figures = {}
    for section in sections:
        for panel in section.panels:
            figures[panel.key] = {"data": panel.traces, "layout": panel.layout}
    text = json.dumps(figures, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def render(title: str, sentence: str, cards: list[Card], sections: list[Section],
           runs: list[tuple[str, Key]] = ()) -> str:
    """The whole page; nothing in it points outside.

    runs: (key, entry of the legend) of each that can be switched on and off.
    """
    jinja2 = need("jinja2", "the page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = [section for section in sections if not section.is_empty]
    has_plots = any(section.panels for section in shown)
    return environment.get_template(TEMPLATE).render(
        title=title,
        sentence=sentence,
        cards=cards,
        sections=shown,
        missing=not_shown(sections),
        runs=runs,
        figures=figures_json(shown),
        library=packed_library() if has_plots else "",
    )


def picture(panel: Panel) -> bytes:
    """A plot as PNG, with its title and a legend."""
    need("kaleido", "--png")
    title = {"text": panel.title, "x": 0.02}
    below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
    layout = {
        **panel.layout,
        "height": panel.layout["height"] + 110,
        "margin": {**panel.layout["margin"], "t": 48, "b": 100},
        "paper_bgcolor": "#ffffff",
        "title": title,
        "showlegend": True,
        "legend": below,
    }
    figure = {"data": panel.traces, "layout": layout}
    try:
        io = need("plotly.io", "--png")
        return io.to_image(figure, "png", width=1160, scale=2, validate=False)
    except Exception as error:  # kaleido raises its own types without a browser
        raise ToolError(
            f"no PNG could be drawn ({type(error).__name__}): "
            "--png needs Chrome or Chromium (apt-get install chromium); "
            "the HTML page is complete without it") from None
