"""One HTML page about runs, which opens offline: what happened, where time and bytes went.

    python tools/report.py runs/demo                        # writes runs/demo/report.html
    python tools/report.py runs/seed_* --out report.html    # several runs, overlaid
    python tools/report.py runs/demo --png    # also one PNG per figure (needs Chromium)

Curves come from metrics.jsonl, figures from summary.json; bytes and rounding error per
tensor from the run's artifact and weights, read by the run's own script. What a run did
not log is named and left out.
"""

from __future__ import annotations

import html
import itertools
import math
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    ARTIFACT,
    ARTIFACT_LIMIT,
    OWN_TO_EACH_RUN,
    STAGES,
    RunFiles,
    ToolError,
    as_environment,
    command_line,
    load_run,
    need,
    relative,
    run_cli,
    script_module,
    write_atomic,
)

# They carry white text and stand on white: contrast of at least 4.5 (two greys aside).
RUN_COLOURS = (
    "#2563eb", "#b45309", "#0f766e", "#9333ea", "#be123c", "#4d7c0f", "#475569", "#0369a1",
)
PHASES = {  # phase of a run -> colour
    "train": "#2563eb", "calibrate": "#0f766e", "quantise": "#b45309", "pack": "#854d0e",
    "sliding windows": "#9333ea", "test-time training": "#be123c",
    "compile and warm-up": "#64748b", "rehearsal": "#94a3b8", "probes": "#cbd5e1",
}
KINDS = {  # kind of a tensor -> colour
    "attention": "#2563eb",
    "MLP": "#0f766e",
    "embedding": "#b45309",
    "script": "#475569",
    "other": "#64748b",
}
CLOCKS = ("training budget", "evaluation budget", "outside the clocks")
PROFILED = {  # stage of a profile event -> name, colour, dash
    "quantized": ("plain windows", "#64748b", "dot"),
    "sliding": ("sliding windows", "#9333ea", "dash"),
    "ttt": ("test-time training", "#be123c", "solid"),
}
LEGEND_BELOW = {
    "orientation": "h",
    "yref": "container",
    "y": 0,
    "yanchor": "bottom",
    "x": 0.5,
    "xanchor": "center",
    "traceorder": "normal",
}
TABLE = (  # key of summary.json, label, format
    ("val_bpb", "final BPB", ".8f"),
    ("val_loss", "nats/token", ".5f"),
    ("sliding_val_bpb", "sliding", ".5f"),
    ("quantized_val_bpb", "quantised", ".5f"),
    ("prequant_val_bpb", "averaged", ".5f"),
    ("steps", "steps", ",d"),
    ("step_ms", "ms/step", ".1f"),
    ("train_seconds", "train s", ".1f"),
    ("eval_seconds", "eval s", ".1f"),
    ("artifact_bytes", "artifact", ",d"),
    ("code_bytes", "script", ",d"),
    ("total_bytes", "total B", ",d"),
    ("tokens_scored", "tokens", ",d"),
)
FONT = "system-ui, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"
QUIET = {"displaylogo": False, "responsive": True, "displayModeBar": False}
STYLE = """
*{box-sizing:border-box} :root{color-scheme:light}
body{margin:0;background:#f1f5f9;color:#0f172a;font:15px/1.5 FONT}
main{max-width:1200px;margin:0 auto;padding:28px 20px 60px} h1{font-size:26px;margin:0 0 2px}
.sub{color:#475569;margin:0 0 18px} h2{font-size:18px;margin:0 0 2px}
p.what{color:#475569;margin:0 0 8px;max-width:100ch}
section{background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:18px 20px;margin:16px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:0 0 16px}
.tile{background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:20px;white-space:nowrap;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:#475569;font-size:13px} .bad{background:#fef2f2;border-color:#fca5a5;color:#991b1b}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:12px;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 4px;border-bottom:1px solid #e2e8f0;white-space:nowrap}
th{color:#475569;font-weight:600} th:first-child,td:first-child{text-align:left}
.dot{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:7px}
tr.mean td{font-weight:600}
details{margin-top:8px} summary{cursor:pointer;color:#475569}
pre{font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0} .none{color:#475569}
""".replace("FONT", FONT)


class Bar(NamedTuple):
    """A part of a horizontal bar: the bar's label, the part's name and its size."""

    label: str
    part: str
    amount: float


class Box(NamedTuple):
    """A rectangle of the treemap."""

    name: str
    how: str
    kind: str
    amount: int


class Section(NamedTuple):
    """A part of the page; without a figure, `missing` says what no run has logged."""

    key: str
    title: str
    sentence: str
    figure: object
    missing: str


class Page:
    """The runs, their colours, and the plotting library."""

    def __init__(self, runs: list[RunFiles]):
        self.runs = runs
        self.many = len(runs) > 1
        self.go = need("plotly.graph_objects", "report")
        self.subplots = need("plotly.subplots", "report").make_subplots
        colours = itertools.cycle(RUN_COLOURS)
        self.colour = {id(run): colour for run, colour in zip(runs, colours)}

    def figure(
        self, height: int, titles=("",), rows: int = 1, legend: bool | None = None, **options
    ):
        """An empty figure in the page's style: a panel per title in `rows` rows."""
        legend = self.many if legend is None else legend
        columns = -(-len(titles) // rows)
        shown_titles = titles if any(titles) else None
        fig = self.subplots(rows, columns, subplot_titles=shown_titles, **options)
        top = 34 if shown_titles else 12
        bottom = 84 if legend else 48
        fig.update_layout(
            height=height + top + bottom,
            template="plotly_white",
            margin={"l": 64, "r": 24, "t": top, "b": bottom},
            font={"family": FONT, "size": 13, "color": "#0f172a"},
            hovermode="closest",
            legend=LEGEND_BELOW,
        )
        fig.update_annotations(font={"size": 14})
        fig.update_xaxes(title_font_size=13)
        fig.update_yaxes(title_font_size=13, automargin=True)
        return fig

    def add(
        self, fig, run: RunFiles, x, y, column: int = 1, row: int = 1, **options
    ) -> None:
        """A run's curve; its legend entry is for all panels, shown with the first one."""
        line = {"color": self.colour[id(run)], "width": 2, **options.pop("line", {})}
        defaults = {
            "name": run.name,
            "legendgroup": run.name,
            "marker": {"size": 5},
            "mode": "lines+markers" if len(x) < 40 else "lines",
            "showlegend": self.many and (row, column) == (1, 1),
        }
        curve = self.go.Scatter(x=x, y=y, line=line, **{**defaults, **options})
        fig.add_trace(curve, row=row, col=column)


def is_number(value) -> bool:
    """An event's figure can be drawn."""
    return isinstance(value, (int, float))


def series(events, key: str) -> tuple[list, list]:
    """(steps, values) of the events that have a step and a number under the key."""
    drawn = [e for e in events if "step" in e and is_number(e.get(key))]
    steps = [e["step"] for e in drawn]
    return steps, [e[key] for e in drawn]


# --- the figures: each returns a figure, or None when no run logged what it needs


def scores(page: Page):
    """BPB after each stage."""
    fig = page.figure(170 + 10 * len(page.runs))
    for run in page.runs:
        scored = {label: run.summary[key] for label, key in STAGES if key in run.summary}
        if not scored:
            continue
        values = list(scored.values())
        page.add(
            fig,
            run,
            values,
            list(scored),
            cliponaxis=False,
            mode="lines+markers" if page.many else "lines+markers+text",
            marker={"size": 11},
            text=[f"{value:.4f}" for value in values],
            textposition="top center",
            line={"width": 1.5},
            hovertemplate="%{y}: %{x:.5f} BPB",
        )
    last_stage_below = [label for label, _ in reversed(STAGES)]
    fig.update_yaxes(categoryorder="array", categoryarray=last_stage_below)
    fig.update_xaxes(title_text="bits per byte (lower is better)")
    return fig if fig.data else None


def validation_points(run: RunFiles) -> tuple[list[int], list[float]]:
    """(steps, BPB) of the untrained model, in training, and of the averaged weights."""
    points = {}
    if "untrained_val_bpb" in run.summary:
        points[0] = run.summary["untrained_val_bpb"]
    if "prequant_val_bpb" in run.summary:
        points[run.summary.get("steps", 0)] = run.summary["prequant_val_bpb"]
    for event in run.of("validation"):
        points[event["step"]] = event["val_bpb"]
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def has_points(fig) -> bool:
    """Some curve of the figure is not empty."""
    return any(len(trace.x) for trace in fig.data)


def curves(page: Page):
    """Training loss and validation BPB over steps; a dotted line where the loop starts."""
    titles = ("training loss, nats per token", "validation, bits per byte")
    fig = page.figure(250, titles)
    for run in page.runs:
        train = run.of("train")
        shown = "step %{x}: %{y:.4f} nats"
        page.add(fig, run, *series(train, "loss"), hovertemplate=shown)
        shown = "step %{x}: %{y:.5f} BPB"
        page.add(fig, run, *validation_points(run), column=2, hovertemplate=shown)
        stepped = [*train, *run.of("step_time")]
        start = min((e["step"] for e in stepped if e.get("looping")), default=0)
        if start > 1:
            dotted = {"color": page.colour[id(run)], "dash": "dot", "width": 1}
            fig.add_vline(x=start, line=dotted, row=1, col=1)
    fig.update_xaxes(title_text="step")
    return fig if has_points(fig) else None


def pace(page: Page):
    """Learning rate and step time."""
    titles = ("learning rate, share of the peak", "ms per step since the line before")
    fig = page.figure(210, titles)
    for run in page.runs:
        train = run.of("train")
        page.add(fig, run, *series(train, "lr"), line={"shape": "hv"})
        shown = "step %{x}: %{y:.1f} ms"
        page.add(fig, run, *series(train, "ms"), column=2, hovertemplate=shown)
    fig.update_xaxes(title_text="step")
    fig.update_yaxes(rangemode="tozero")
    return fig if has_points(fig) else None


def bar_text(amount: float) -> str:
    """An amount as it stands in a bar: three digits."""
    return f"{amount:,.3g}" if amount < 100 else f"{amount:,.0f}"


def stacked(
    page: Page, fig, bars: list[Bar], colours: dict, unit: str, column: int = 1
) -> None:
    """Horizontal bars of parts; a part is in the legend once."""
    in_legend = {trace.name for trace in fig.data}
    parts = dict.fromkeys(bar.part for bar in bars)
    for part in parts:
        mine = [bar for bar in bars if bar.part == part]
        trace = page.go.Bar(
            y=[bar.label for bar in mine],
            x=[bar.amount for bar in mine],
            name=part,
            orientation="h",
            legendgroup=part,
            showlegend=part not in in_legend,
            marker={"color": colours[part]},
            text=[bar_text(bar.amount) for bar in mine],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            hovertemplate=f"{part}: %{{x:.1f}} {unit}<extra>%{{y}}</extra>",
        )
        fig.add_trace(trace, row=1, col=column)
    fig.update_layout(barmode="stack", uniformtext={"minsize": 10, "mode": "hide"})
    fig.update_xaxes(title_text=unit, rangemode="tozero")
    fig.update_yaxes(autorange="reversed")


def timed_parts(run: RunFiles, prefix: str) -> list[Bar]:
    """The parts of the steps that a run timed."""
    bars = []
    for event in run.of("step_time"):
        looping = ", looping" if event.get("looping") else ""
        label = f"{prefix}step {event['step']}{looping} "
        bars += [Bar(label, part, ms) for part, ms in event["parts"].items()]
    return bars


def step_parts(page: Page):
    """Where a step's time goes, from the event step_time."""
    bars = []
    for run in page.runs:
        bars += timed_parts(run, f"{run.name}, " if page.many else "")
    if not bars:
        return None
    fig = page.figure(20 + 30 * len({bar.label for bar in bars}), legend=True)
    parts = dict.fromkeys(bar.part for bar in bars)
    colours = dict(zip(parts, RUN_COLOURS))
    stacked(page, fig, bars, colours, "ms")
    return fig


def runs_in_log(run: RunFiles) -> list[RunFiles]:
    """One for each start in the log: an eval-only run in the same folder adds to it."""
    starts = [i for i, e in enumerate(run.events) if e.get("event") == "start"]
    bounds = [0, *starts[1:], len(run.events)]
    runs = []
    for begin, end in itertools.pairwise(bounds):
        runs.append(RunFiles(run.folder, run.summary, run.events[begin:end]))
    return runs


def phases(run: RunFiles) -> dict[str, list[tuple[str, float]]]:
    """The seconds of a run by CLOCKS: [(phase, seconds), …].

    Where a log holds several runs: of the last that trained, and of the last evaluation.
    """
    logged = runs_in_log(run)
    last = logged[-1]
    trained = next((r for r in reversed(logged) if r.of("train_end")), last)
    packs = trained.of("pack")
    sliding = last.last("score_sliding").get("elapsed", 0.0)
    evaluation = last.summary.get("eval_seconds") or 0.0

    def seconds(of: RunFiles, event: str, key: str = "seconds") -> float:
        return of.last(event).get(key, 0.0)

    in_training = [
        ("train", seconds(trained, "train_end")),
        ("calibrate", seconds(trained, "artifact", "calibrate_s")),
        ("quantise", sum(e.get("quantise_s", 0.0) for e in packs)),
        ("pack", sum(e.get("pack_s", 0.0) for e in packs)),
    ]
    in_evaluation = [
        ("sliding windows", sliding),
        ("test-time training", max(evaluation - sliding, 0.0)),
    ]
    outside = [
        ("compile and warm-up", seconds(trained, "warm_up")),
        ("rehearsal", seconds(trained, "rehearsal")),
        ("probes", seconds(last, "probes")),
    ]
    return dict(zip(CLOCKS, (in_training, in_evaluation, outside)))


def phase_bars(runs: list[RunFiles], clock: str) -> list[Bar]:
    """The phases of one clock that took any time."""
    bars = []
    for run in runs:
        bars += [Bar(f"{run.name} ", *p) for p in phases(run)[clock] if p[1] > 0]
    return bars


def timeline(page: Page):
    """Seconds by phase against the two budgets."""
    height = 20 + 34 * len(page.runs)
    panels = {"horizontal_spacing": 0.04, "shared_yaxes": True}
    fig = page.figure(height, CLOCKS, legend=True, **panels)
    for column, clock in enumerate(CLOCKS, 1):
        stacked(page, fig, phase_bars(page.runs, clock), PHASES, "s", column)
    dashed = {"color": "#b91c1c", "width": 2, "dash": "dash"}
    settings = [run.summary.get("settings", {}) for run in page.runs]
    for column, key in ((1, "MAX_WALLCLOCK_SECONDS"), (2, "EVAL_MAX_SECONDS")):
        budgets = {s.get(key) for s in settings} - {None, 0, 0.0}
        for budget in budgets:
            fig.add_vline(x=budget, line=dashed, row=1, col=column)
    return fig if fig.data else None


def kind_of(name: str) -> str:
    """What a tensor belongs to."""
    if ".attn." in name:
        return "attention"
    if ".mlp." in name:
        return "MLP"
    return "embedding" if "emb" in name or "lm_head" in name else "other"


def boxes_of(run: RunFiles, tensors: list[dict]) -> list[Box]:
    """The tensors of one artifact, what they leave of it, and the script."""
    boxes = []
    for t in tensors:
        name = t["name"].replace("blocks.", "").removesuffix(".weight")
        boxes.append(Box(name, t["how"], kind_of(t["name"]), t["bytes"]))
    in_tensors = sum(box.amount for box in boxes)
    rest = max(run.summary.get("artifact_bytes", 0) - in_tensors, 0)
    boxes.append(Box("header and tables", "", "other", rest))
    boxes.append(Box("train_gpt.py", "", "script", run.summary["code_bytes"]))
    return boxes


def treemap(page: Page, tensors: dict):
    """Bytes of one artifact by tensor, and the script."""
    run = next((r for r in page.runs if tensors.get(r.folder)), None)
    if run is None:
        return None
    boxes = boxes_of(run, tensors[run.folder])
    sums = dict.fromkeys(sorted({box.kind for box in boxes}), 0)
    for box in boxes:
        sums[box.kind] += box.amount
    kinds = list(sums)
    kind_of_each = kinds + [box.kind for box in boxes]
    colours = ["#e2e8f0", *(KINDS[kind] for kind in kind_of_each)]
    white = ["#ffffff"] * (len(colours) - 1)
    root = f"artifact and script of {html.escape(run.name)}"
    shown = "%{label}<br>%{value:,.0f} B"
    fig = page.figure(500, legend=False)
    fig.add_trace(page.go.Treemap(
        ids=["all", *kinds, *(f"{box.kind}/{box.name}" for box in boxes)],
        labels=[root, *kinds, *(box.name for box in boxes)],
        parents=["", *["all"] * len(kinds), *(box.kind for box in boxes)],
        branchvalues="total",
        values=[sum(sums.values()), *sums.values(), *(box.amount for box in boxes)],
        texttemplate=shown,
        customdata=["", *[""] * len(kinds), *(box.how for box in boxes)],
        marker={"colors": colours, "line": {"color": "#fff", "width": 1}},
        hovertemplate=shown + ", %{percentRoot:.1%}<br>%{customdata}<extra></extra>",
        textfont={"size": 13, "color": ["#0f172a", *white]},
    ))
    fig.update_layout(margin={"l": 4, "r": 4, "t": 8, "b": 4}, height=520)
    return fig


def place_of(name: str) -> tuple[str, int | None]:
    """(kind, layer) of a matrix: blocks.3.attn.out.weight -> ("attn.out", 3)."""
    kind = []
    layer = None
    for part in name.split("."):
        if not part.isdigit():
            kind.append(part)
        elif layer is None:
            layer = int(part)
    return ".".join(part for part in kind if part not in ("blocks", "weight")), layer


def errors_by_layer(tensors: list[dict]) -> dict[str, list[tuple]]:
    """Per kind of matrix that GPTQ rounded: [(layer, error in per cent, how), …]."""
    points: dict[str, list[tuple]] = {}
    for t in tensors:
        kind, layer = place_of(t["name"])
        error = t.get("error")
        if error is not None and layer is not None and t["how"].startswith("gptq"):
            points.setdefault(kind, []).append((layer, 100 * error, t["how"]))
    return points


def rounding(page: Page, tensors: dict):
    """Relative rounding error of every quantised matrix, by layer."""
    matrices = {id(r): errors_by_layer(tensors.get(r.folder) or []) for r in page.runs}
    kinds = sorted(set().union(*matrices.values()))
    if not kinds:
        return None
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    titles = kinds + [""] * (rows * columns - len(kinds))
    panels = {"shared_yaxes": True, "vertical_spacing": 0.4 / rows}
    fig = page.figure(190 * rows, titles, rows, horizontal_spacing=0.04, **panels)
    last_layer = 0
    for i, kind in enumerate(kinds):
        for run in page.runs:
            points = sorted(matrices[id(run)].get(kind, ()))
            layers = [layer for layer, _, _ in points]
            ways = [how for _, _, how in points]
            marks = ["diamond" if "lqer" in how else "circle" for how in ways]
            page.add(
                fig,
                run,
                layers,
                [error for _, error, _ in points],
                column=1 + i % columns,
                row=1 + i // columns,
                text=ways,
                marker={"size": 8, "symbol": marks},
                hovertemplate="layer %{x}: %{y:.2f} %<br>%{text}",
            )
            last_layer = max([last_layer, *layers])
    fig.update_xaxes(dtick=1 if last_layer < 16 else None)
    fig.update_xaxes(title_text="layer", row=rows)
    fig.update_yaxes(rangemode="tozero", ticksuffix=" %")
    return fig


def add_profile(page: Page, fig, run: RunFiles, event: dict, column: int) -> None:
    """One profile event as a curve over its bins; empty bins are left out."""
    labels, values, counts = [], [], []
    edges, nbytes = event["edges"], event["bytes"]
    total = sum(nbytes)
    for i, size in enumerate(nbytes):
        if not size:
            continue
        span = f"{edges[i]} –"  # the last bin has no end
        if i + 1 < len(edges):
            span = f"{edges[i]}–{edges[i + 1] - 1}"
        labels.append(f"{span}<br><i>{size / total:.0%}</i>")
        values.append(event["nats"][i] / math.log(2) / size)
        counts.append([event["tokens"][i], event["documents"][i]])
    stage, colour, dash = PROFILED[event["stage"]]
    line = {"dash": dash}
    if not page.many:
        line["color"] = colour
    counted = "%{customdata[0]:,} tokens, %{customdata[1]:,} documents"
    page.add(
        fig,
        run,
        labels,
        values,
        column,
        name=f"{run.name}, {stage}" if page.many else stage,
        legendgroup=f"{id(run)}{stage}",
        showlegend=column == 1,
        line=line,
        customdata=counts,
        hovertemplate="%{y:.4f} BPB<br>" + counted,
    )


def profiles(page: Page):
    """BPB by document length and by position in the document, per scoring stage."""
    titles = {
        "length": "by length of the document, tokens",
        "position": "by position in the document, tokens",
    }
    found = []
    for run in page.runs:
        found += [(run, event) for event in run.of("profile")]
    logged = {event["by"] for _, event in found}
    sides = [side for side in titles if side in logged]
    if not sides:
        return None
    fig = page.figure(290, [titles[side] for side in sides], legend=True)
    for run, event in found:
        add_profile(page, fig, run, event, 1 + sides.index(event["by"]))
    fig.update_yaxes(title_text="bits per byte", col=1)
    fig.update_xaxes(type="category", tickangle=0, tickfont_size=11)
    return fig


# --- bytes and rounding error per tensor, from the run's own files


def entropy_bytes(codes) -> float:
    """Bytes of a code matrix under its own symbols' frequencies: what a coder without
    contexts needs."""
    import numpy as np

    counts = np.unique(codes, return_counts=True)[1].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def tensors_of(run: RunFiles) -> list[dict]:
    """name, how, bytes and error of every tensor.

    Tensors share the coded streams: each gets its part of a stream's real length, by the
    entropy of its codes (matrices) or by its size (the rest).
    """
    blob = (run.folder / ARTIFACT).read_bytes()
    with script_module(run.source(), "run_script") as tg:
        s = tg.Settings.from_env(as_environment(run.summary["settings"]))
        q = tg.read_artifact(s, blob, "the artifact").model
        header, streams = tg.artifact_from_bytes(blob, "the artifact")
        # a marked artifact's weights were trained on after final_model.pt was written
        errors = {} if header.get("not_compliant") else rounding_errors(tg, s, run, q)
        shares = stream_shares(tg, s, q)
    sizes = dict.fromkeys(q.forms, 0.0)
    for stream, parts in shares.items():
        length = len(streams.get(stream, b""))
        whole = max(sum(parts.values()), 1e-9)
        for name, amount in parts.items():
            sizes[name] += length * amount / whole
    rows = []
    for name, form in q.forms.items():
        error = errors.get(name)
        rows.append({"name": name, "how": form, "bytes": round(sizes[name]), "error": error})
    return rows


def stream_shares(tg, s, q) -> dict[str, dict[str, float]]:
    """Per coded stream of a quantised model: what each tensor puts into it, uncoded."""
    shares: dict[str, dict[str, float]] = {}
    for stream, shapes in tg.stored_tensors(s, q.forms).items():
        parts = shares.setdefault(stream, {})
        for key in shapes:
            owners = [name for name in q.forms if key == name or key.startswith(name + ".")]
            owner = max(owners, key=len)
            array = q.tensors[key].numpy()
            amount = entropy_bytes(array) if stream == tg.CODE_STREAM else array.nbytes
            parts[owner] = parts.get(owner, 0.0) + amount
    return shares


def rounding_errors(tg, s, run: RunFiles, q) -> dict[str, float]:
    """‖W - Ŵ‖ / ‖W‖ per tensor, when the averaged weights lie beside the artifact."""
    path = run.folder / "final_model.pt"
    if not path.is_file():
        return {}
    model = tg.GPT(s)
    with tg.torch.no_grad():
        tg.read_weights(str(path), model)
    weights = {name: p.detach().float() for name, p in model.named_parameters()}
    exact = tg.matrix_views(weights)
    errors = {}
    for name, rounded in tg.dequantise(q).items():
        if name in exact:
            norm = exact[name].norm().clamp_min(1e-12)
            errors[name] = float((exact[name] - rounded).norm() / norm)
    return errors


def all_tensors(runs: list[RunFiles]) -> dict:
    """tensors_of every run that can tell; a run that cannot is named and left out."""
    out = {}
    for run in runs:
        try:
            out[run.folder] = tensors_of(run)
        except Exception as error:  # an old script, a missing file: the rest stands
            reason = f"{type(error).__name__}: {error}"
            print(f"note: no bytes per tensor for {relative(run.folder)} ({reason})",
                  file=sys.stderr)
    return out


def summary_values(runs: list[RunFiles], key: str) -> list:
    """What the runs that know it have under a key of summary.json."""
    return [run.summary[key] for run in runs if key in run.summary]


def budget_text(runs: list[RunFiles], setting: str) -> str:
    """"of 600 s " where all runs have the same budget, else nothing."""
    settings = summary_values(runs, "settings")
    budgets = {values.get(setting) for values in settings}
    if len(budgets) != 1 or None in budgets:
        return ""
    return f"of {budgets.pop():g} s "


def tile_texts(page: Page) -> list[tuple[str, str]]:
    """(figure, what it is) of every tile."""
    runs = page.runs
    many = ", mean of runs" if page.many else ""
    longest = ", the longest run" if page.many else ""
    cells = []
    if scored := summary_values(runs, "val_bpb"):
        spread = f" ± {statistics.stdev(scored):.4f}" if len(scored) > 1 else ""
        mean = statistics.fmean(scored)
        cells.append((f"{mean:.4f}{spread}", "bits per byte" + many))
    if total := max(summary_values(runs, "total_bytes"), default=0):
        spare = f"{ARTIFACT_LIMIT - total:,} to spare"
        cells.append((f"{total:,} B", f"artifact and script; {spare}"))
    if seconds := max(summary_values(runs, "train_seconds"), default=0.0):
        bound = budget_text(runs, "MAX_WALLCLOCK_SECONDS")
        cells.append((f"{seconds:.1f} s", f"{bound}for training{longest}"))
    if seconds := max(summary_values(runs, "eval_seconds"), default=0.0):
        bound = budget_text(runs, "EVAL_MAX_SECONDS")
        cells.append((f"{seconds:.1f} s", f"{bound}for evaluation{longest}"))
    steps = summary_values(runs, "steps")
    step_ms = summary_values(runs, "step_ms")
    if steps and step_ms:
        pace_text = f"steps of {statistics.fmean(step_ms):,.0f} ms{many}"
        cells.append((f"{statistics.fmean(steps):,.0f}", pace_text))
    return cells


# --- the page


def tiles(page: Page) -> str:
    """The figures one looks at first, and a banner over runs that break a rule."""
    parts = []
    bad = [run.name for run in page.runs if run.summary.get("compliant") is False]
    if bad:
        names = html.escape(", ".join(bad))
        parts.append(f'<section class="bad"><b>NON-COMPLIANT</b>: {names}</section>')
    parts.append('<div class="tiles">')
    for figure, what in tile_texts(page):
        shown = f"<b>{html.escape(figure)}</b><span>{html.escape(what)}</span>"
        parts.append(f'<div class="tile">{shown}</div>')
    parts.append("</div>")
    return "".join(parts)


def run_row(page: Page, run: RunFiles, columns: list) -> str:
    """A run's row of the table."""
    state = f"seed {run.seed}" if "val_bpb" in run.summary else "unfinished"
    name = html.escape(run.name)
    dot = f'<span class="dot" style="background:{page.colour[id(run)]}"></span>'
    cells = [f"<td>{dot}{name} ({state})</td>"]
    for key, _, form in columns:
        value = format(run.summary[key], form) if key in run.summary else "–"
        cells.append(f'<td data-run="{name}" data-key="{key}">{value}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def mean_row(runs: list[RunFiles], columns: list) -> str:
    """The row of means; whole numbers are rounded."""
    cells = ["<td>mean</td>"]
    for key, _, form in columns:
        mean = statistics.fmean(summary_values(runs, key))
        shown = round(mean) if form == ",d" else mean
        cells.append(f"<td>{format(shown, form)}</td>")
    return f'<tr class="mean">{"".join(cells)}</tr>'


def summary_table(page: Page) -> str:
    """Every run's figures, equal to summary.json."""
    columns = [row for row in TABLE if summary_values(page.runs, row[0])]
    labels = ["run", *(label for _, label, _ in columns)]
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    rows = [f"<tr>{head}</tr>"]
    rows += [run_row(page, run, columns) for run in page.runs]
    if page.many:
        rows.append(mean_row(page.runs, columns))
    shown = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    return f"<section><h2>Runs</h2>{shown}{details(page)}</section>"


def detail_lines(run: RunFiles) -> list[str]:
    """A run's machine, changed settings, checks and warnings."""
    left_out = ("event", "time", "run_id", *OWN_TO_EACH_RUN)
    lines = []
    for values in (run.last("start"), run.last("changed_settings")):
        pairs = [f"{k}={v}" for k, v in values.items() if k not in left_out]
        lines.append(" ".join(pairs))
    lines += [f"{e['what']}: {e['detail']}" for e in run.of("check")]
    lines += [f"WARNING {e.get('text', '')}" for e in run.of("warning")]
    lines += [f"NON-COMPLIANT: {e.get('reason', '')}" for e in run.of("NON-COMPLIANT")]
    return [line for line in lines if line]


def details(page: Page) -> str:
    """Settings that differ from the defaults, checks and warnings, folded away."""
    parts = []
    for run in page.runs:
        text = html.escape("\n".join(detail_lines(run)))
        parts.append(f"<b>{html.escape(run.name)}</b><pre>{text}</pre>")
    warnings = sum(len(run.of("warning")) for run in page.runs)
    label = "machine, settings, checks"
    if warnings:
        label += f" and {warnings} warning(s)"
    return f"<details><summary>{label}</summary>{''.join(parts)}</details>"


def sections(page: Page) -> list[Section]:
    """The figures in reading order."""
    tensors = all_tensors(page.runs)
    return [
        Section(
            "scores", "Score by stage",
            "What quantising, windows and test-time training did to the score.",
            scores(page), "no run was scored"),
        Section(
            "curves", "Learning curves",
            "A dotted line: the first logged step with the loop's extra passes.",
            curves(page), "no progress lines"),
        Section(
            "pace", "Learning rate and pace",
            "Step time from line to line, not the running mean: drift shows.",
            pace(page), "no progress lines"),
        Section(
            "step_time", "Where a step's time goes",
            "Steps early, halfway and late, timed part by part, "
            "waiting for the device after each part.",
            step_parts(page), "no step_time events"),
        Section(
            "timeline", "Budgets",
            "Seconds by phase; the dashed line is the budget. "
            "What is outside the clocks is not charged.",
            timeline(page), "no phase was logged"),
        Section(
            "treemap", "Bytes by tensor",
            "Click to zoom. Tensors share coded streams: "
            "each has its share of the stream's real length.",
            treemap(page, tensors), "the artifact is not there"),
        Section(
            "rounding", "Rounding error by layer",
            "‖W − Ŵ‖ / ‖W‖ of every matrix that GPTQ rounded; "
            "diamonds have a low-rank repair. Left out after pre-quantisation TTT: "
            "the saved weights are those before it.",
            rounding(page, tensors), "artifact and its weights are not both there"),
        Section(
            "profiles", "Score by document length and by position",
            "With and without test-time training; "
            "in italics the share of the text's bytes.",
            profiles(page), "no profile events"),
    ]


def section_html(section: Section) -> str:
    """A section with its figure."""
    title = html.escape(section.title)
    sentence = html.escape(section.sentence)
    drawing = section.figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=section.key, config=QUIET)
    head = f'<h2>{title}</h2><p class="what">{sentence}</p>'
    return f"<section>{head}{drawing}</section>"


def not_shown(parts: list[Section]) -> list[str]:
    """The titles of sections without a figure, with the reason."""
    return [f"{p.title} ({p.missing})" for p in parts if p.figure is None]


def machine_text(page: Page) -> str:
    """The line under the title: runs, machine, model."""
    first = page.runs[0].last("start")
    count = f"{len(page.runs)} run{'s' if page.many else ''}"
    size, device = first.get("world_size", "?"), first.get("device", "unknown device")
    return ", ".join([
        f"{count} on {size} × {device}",
        f"{first.get('parameters', 0):,} parameters",
        f"attention {first.get('attention', '?')}",
        f"torch {first.get('torch', '?')}",
    ])


def build(page: Page, title: str, parts: list[Section]) -> str:
    """The whole page; nothing in it points outside."""
    title = html.escape(title)
    library = need("plotly.offline", "report").get_plotlyjs()
    pieces = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title>",
        '<meta name="viewport" content="width=device-width">',
        '<link rel="icon" href="data:,">',
        f"<style>{STYLE}</style><script>{library}</script></head>",
        f"<body><main><h1>{title}</h1>",
        f'<p class="sub">{html.escape(machine_text(page))}</p>',
        tiles(page),
        summary_table(page),
    ]
    pieces += [section_html(part) for part in parts if part.figure is not None]
    if missing := not_shown(parts):
        pieces.append(f'<p class="none">Not shown: {html.escape("; ".join(missing))}.</p>')
    pieces.append("</main></body></html>")
    return "".join(pieces)


def write_pngs(parts: list[Section], folder: Path) -> list[Path]:
    """One PNG per figure."""
    need("kaleido", "--png")
    out = []
    for part in parts:
        fig = part.figure
        if fig is None:
            continue
        title = {"text": part.title, "x": 0.01}
        top = fig.layout.margin.t + 44  # room for the title
        height = fig.layout.height + 44
        fig.update_layout(title=title, margin={"t": top}, height=height)
        try:
            image = fig.to_image("png", width=1160, scale=2)
        except Exception as error:  # kaleido raises its own types without a browser
            raise ToolError(
                f"no PNG could be drawn ({type(error).__name__}): "
                "--png needs Chrome or Chromium (apt-get install chromium); "
                "the HTML page is complete without it") from None
        out.append(write_atomic(folder / f"report_{part.key}.png", image))
    return out


def shared_title(runs: list[RunFiles]) -> str:
    """What the runs' names share, else their number."""
    common = os.path.commonprefix([run.name for run in runs]).rstrip("_-")
    if len(common) > 2 or len(runs) == 1:
        return common
    return f"{len(runs)} runs"


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    add("--out", help="the page (default: report.html in the first run's folder)")
    add("--title", default="", help="its title (default: what the runs' names share)")
    add("--png", action="store_true", help="also write one PNG per figure beside it")
    args = parser.parse_args(arguments)
    most = len(RUN_COLOURS)
    if len(args.runs) > most:
        raise ToolError(f"{len(args.runs)} runs are too many to tell apart: "
                        f"give at most {most}")
    runs = [load_run(folder, finished=False) for folder in args.runs]
    page = Page(runs)
    parts = sections(page)
    out = Path(args.out) if args.out else runs[0].folder / "report.html"
    made = [write_atomic(out, build(page, args.title or shared_title(runs), parts))]
    if args.png:
        made += write_pngs(parts, out.parent)
    said = f"made {', '.join(map(relative, made))}"
    if missing := not_shown(parts):
        said += f"; not shown: {', '.join(missing)}"
    print(said)
    return 0


if __name__ == "__main__":
    run_cli(main)
