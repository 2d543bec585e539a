"""One HTML page about one or several runs that opens offline: what happened, where time
and bytes went.

    python tools/report.py runs/demo                        # writes runs/demo/report.html
    python tools/report.py runs/seed_* --out report.html    # several runs, overlaid
    python tools/report.py runs/demo --png                  # also one PNG per figure (needs Chromium)

Curves come from metrics.jsonl, figures from summary.json; bytes and rounding error per
tensor from the run's artifact and weights, read by the run's own script. What a run did
not log is named and left out.
"""

from __future__ import annotations

import html
import importlib.util
import math
import os
import statistics
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable from anywhere
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
    write_atomic,
)

# Colours carry white text and stand on white: contrast of at least 4.5 (the two greys aside).
RUN_COLOURS = ("#2563eb", "#b45309", "#0f766e", "#9333ea", "#be123c", "#4d7c0f", "#475569", "#0369a1")
PHASES = {  # phase of a run -> colour
    "train": "#2563eb", "calibrate": "#0f766e", "quantise": "#b45309", "pack": "#854d0e",
    "sliding windows": "#9333ea", "test-time training": "#be123c",
    "compile and warm-up": "#64748b", "rehearsal": "#94a3b8", "probes": "#cbd5e1",
}
KINDS = {"attention": "#2563eb", "MLP": "#0f766e", "embedding": "#b45309", "script": "#475569",
         "other": "#64748b"}
PROFILED = {  # stage of a profile event -> name, colour, dash
    "quantized": ("plain windows", "#64748b", "dot"),
    "sliding": ("sliding windows", "#9333ea", "dash"),
    "ttt": ("test-time training", "#be123c", "solid"),
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


class Page:
    """The runs, their colours, and the plotting library."""

    def __init__(self, runs: list[RunFiles]):
        self.runs, self.many = runs, len(runs) > 1
        self.go = need("plotly.graph_objects", "report")
        self.subplots = need("plotly.subplots", "report").make_subplots
        self.colour = {id(run): RUN_COLOURS[i % len(RUN_COLOURS)] for i, run in enumerate(runs)}

    def figure(self, height: int, titles=("",), rows: int = 1, legend: bool | None = None, **options):
        """An empty figure in the page's style: a panel per title in `rows` rows, the
        legend at the bottom."""
        legend = self.many if legend is None else legend
        titled = any(titles)
        fig = self.subplots(rows, -(-len(titles) // rows), subplot_titles=titles if titled else None,
                            **options)
        margin = {"l": 64, "r": 24, "t": 34 if titled else 12, "b": 84 if legend else 48}
        fig.update_layout(height=height + margin["t"] + margin["b"], template="plotly_white", margin=margin,
                          font={"family": FONT, "size": 13, "color": "#0f172a"}, hovermode="closest",
                          legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom",
                                  "x": 0.5, "xanchor": "center", "traceorder": "normal"})
        fig.update_annotations(font={"size": 14})
        fig.update_xaxes(title_font_size=13)
        fig.update_yaxes(title_font_size=13, automargin=True)
        return fig

    def add(self, fig, run: RunFiles, x, y, column: int = 1, row: int = 1, **options) -> None:
        """A run's curve; runs share a legend entry over all panels, shown with the
        first one."""
        shown = options.pop("showlegend", self.many and (row, column) == (1, 1))
        options = {"name": run.name, "legendgroup": run.name, "marker": {"size": 5},
                   "mode": "lines+markers" if len(x) < 40 else "lines", **options}
        options["line"] = {"color": self.colour[id(run)], "width": 2, **options.get("line", {})}
        fig.add_trace(self.go.Scatter(x=x, y=y, showlegend=shown, **options), row=row, col=column)


def series(events, y: str) -> tuple[list, list]:
    """(steps, values) of the events that have a number under y."""
    points = [(e["step"], e[y]) for e in events if isinstance(e.get(y), (int, float)) and "step" in e]
    return [p[0] for p in points], [p[1] for p in points]


# --- the figures: each returns a figure, or None when no run logged what it needs


def scores(page: Page):
    """BPB after each stage."""
    fig = page.figure(170 + 10 * len(page.runs))
    for run in page.runs:
        have = [(label, run.summary[key]) for label, key in STAGES if key in run.summary]
        if have:
            page.add(fig, run, [v for _, v in have], [label for label, _ in have], cliponaxis=False,
                     mode="lines+markers" + ("" if page.many else "+text"), marker={"size": 11},
                     text=[f"{v:.4f}" for _, v in have], textposition="top center", line={"width": 1.5},
                     hovertemplate="%{y}: %{x:.5f} BPB")
    fig.update_yaxes(categoryorder="array", categoryarray=[label for label, _ in STAGES][::-1])
    fig.update_xaxes(title_text="bits per byte (lower is better)")
    return fig if fig.data else None


def curves(page: Page):
    """Training loss and validation BPB over steps; a dotted line where the loop starts."""
    fig = page.figure(250, ("training loss, nats per token", "validation, bits per byte"))
    for run in page.runs:
        train = run.of("train")
        page.add(fig, run, *series(train, "loss"), hovertemplate="step %{x}: %{y:.4f} nats")
        ends = [(0, "untrained_val_bpb"), (run.summary.get("steps", 0), "prequant_val_bpb")]
        points = {n: run.summary[key] for n, key in ends if key in run.summary}
        points |= {e["step"]: e["val_bpb"] for e in run.of("validation")}
        steps = sorted(points)
        page.add(fig, run, steps, [points[n] for n in steps], 2, hovertemplate="step %{x}: %{y:.5f} BPB")
        looped = [e["step"] for e in (*train, *run.of("step_time")) if e.get("looping")]
        if (start := min(looped, default=0)) > 1:
            fig.add_vline(x=start, line={"color": page.colour[id(run)], "dash": "dot", "width": 1}, row=1,
                          col=1)
    fig.update_xaxes(title_text="step")
    return fig if any(len(trace.x) for trace in fig.data) else None


def pace(page: Page):
    """Learning rate and step time."""
    fig = page.figure(210, ("learning rate, share of the peak", "ms per step since the line before"))
    for run in page.runs:
        page.add(fig, run, *series(run.of("train"), "lr"), line={"shape": "hv"})
        page.add(fig, run, *series(run.of("train"), "ms"), 2, hovertemplate="step %{x}: %{y:.1f} ms")
    fig.update_xaxes(title_text="step")
    fig.update_yaxes(rangemode="tozero")
    return fig if any(len(trace.x) for trace in fig.data) else None


def stacked(page: Page, fig, rows: list[tuple[str, str, float]], colours: dict, unit: str,
            column: int = 1) -> None:
    """Horizontal bars of parts: (bar, part, amount); a part is in the legend once."""
    seen = {trace.name for trace in fig.data}
    for part in dict.fromkeys(part for _, part, _ in rows):
        mine = [(bar, amount) for bar, p, amount in rows if p == part]
        fig.add_trace(page.go.Bar(y=[bar for bar, _ in mine], x=[amount for _, amount in mine], name=part,
                                  orientation="h", legendgroup=part, showlegend=part not in seen,
                                  marker={"color": colours[part]},
                                  text=[f"{amount:,.3g}" if amount < 100 else f"{amount:,.0f}" for _,
                                        amount in mine], textposition="inside", insidetextanchor="middle",
                                  textangle=0,
                                  hovertemplate=f"{part}: %{{x:.1f}} {unit}<extra>%{{y}}</extra>"), row=1,
                      col=column)
    fig.update_layout(barmode="stack", uniformtext={"minsize": 10, "mode": "hide"})
    fig.update_xaxes(title_text=unit, rangemode="tozero")
    fig.update_yaxes(autorange="reversed")


def step_parts(page: Page):
    """Where a step's time goes, from the event step_time."""
    rows = [
        (f"{run.name + ', ' if page.many else ''}step {e['step']}{', looping' if e.get('looping') else ''} ",
         part, ms) for run in page.runs for e in run.of("step_time") for part, ms in e["parts"].items()]
    if not rows:
        return None
    fig = page.figure(20 + 30 * len({bar for bar, _, _ in rows}), legend=True)
    parts = dict.fromkeys(part for _, part, _ in rows)
    stacked(page, fig, rows, dict(zip(parts, RUN_COLOURS, strict=False)), "ms")
    return fig


def runs_in_log(run: RunFiles) -> list[RunFiles]:
    """One for each start in the log: an eval-only run into the same folder goes on with
    its log."""
    starts = [i for i, e in enumerate(run.events) if e.get("event") == "start"]
    bounds = [0, *starts[1:], len(run.events)]
    return [RunFiles(run.folder, run.summary, run.events[a:b])
            for a, b in zip(bounds, bounds[1:], strict=False)]


def phases(run: RunFiles) -> dict[str, list[tuple[str, float]]]:
    """The seconds of a run by clock: training budget, evaluation budget, outside both.
    Where a log holds several runs: of the last that trained, and of the last
    evaluation."""
    logged = runs_in_log(run)
    run, last = next((r for r in reversed(logged) if r.of("train_end")), logged[-1]), logged[-1]
    packs, sliding = run.of("pack"), last.last("score_sliding").get("elapsed", 0.0)
    total = last.summary.get("eval_seconds") or 0.0
    return {"training budget": [("train", run.last("train_end").get("seconds", 0.0)),
                                ("calibrate", run.last("artifact").get("calibrate_s", 0.0)),
                                ("quantise", sum(e.get("quantise_s", 0.0) for e in packs)),
                                ("pack", sum(e.get("pack_s", 0.0) for e in packs))],
            "evaluation budget": [("sliding windows", sliding),
                                  ("test-time training", max(total - sliding, 0.0))],
            "outside the clocks": [("compile and warm-up", run.last("warm_up").get("seconds", 0.0)),
                                   ("rehearsal", run.last("rehearsal").get("seconds", 0.0)),
                                   ("probes", last.last("probes").get("seconds", 0.0))]}


def timeline(page: Page):
    """Seconds by phase against the two budgets."""
    clocks = ("training budget", "evaluation budget", "outside the clocks")
    fig = page.figure(20 + 34 * len(page.runs), clocks, legend=True, horizontal_spacing=0.04,
                      shared_yaxes=True)
    for column, clock in enumerate(clocks, 1):
        rows = [(run.name + " ", phase, s) for run in page.runs for phase, s in phases(run)[clock] if s > 0]
        stacked(page, fig, rows, PHASES, "s", column)
    for column, key in ((1, "MAX_WALLCLOCK_SECONDS"), (2, "EVAL_MAX_SECONDS")):
        for budget in {run.summary.get("settings", {}).get(key) for run in page.runs} - {None, 0, 0.0}:
            fig.add_vline(x=budget, line={"color": "#b91c1c", "width": 2, "dash": "dash"}, row=1, col=column)
    return fig if fig.data else None


def kind_of(name: str) -> str:
    """What a tensor belongs to."""
    parts = {".attn.": "attention", ".mlp.": "MLP", "emb": "embedding", "lm_head": "embedding"}
    return next((kind for part, kind in parts.items() if part in name), "other")


def treemap(page: Page, tensors: dict):
    """Bytes of one artifact by tensor, and the script."""
    run, items = next(((r, tensors[r.folder]) for r in page.runs if tensors.get(r.folder)), (None, None))
    if not items:
        return None
    rest = max(run.summary.get("artifact_bytes", 0) - sum(t["bytes"] for t in items), 0)
    rows = [(t["name"].replace("blocks.", "").removesuffix(".weight"), t["how"], kind_of(t["name"]),
             t["bytes"]) for t in items]
    rows += [("header and tables", "", "other", rest), ("train_gpt.py", "", "script",
                                                        run.summary["code_bytes"])]
    kinds = sorted({kind for _, _, kind, _ in rows})
    sums = [sum(r[3] for r in rows if r[2] == kind) for kind in kinds]
    colours = ["#e2e8f0", *(KINDS[k] for k in kinds), *(KINDS[r[2]] for r in rows)]
    fig = page.figure(500, legend=False)
    fig.add_trace(page.go.Treemap(
        ids=["all", *kinds, *(f"{r[2]}/{r[0]}" for r in rows)],
        labels=[f"artifact and script of {html.escape(run.name)}", *kinds, *(r[0] for r in rows)],
        parents=["", *["all"] * len(kinds), *(r[2] for r in rows)], branchvalues="total",
        values=[sum(sums), *sums, *(r[3] for r in rows)], texttemplate="%{label}<br>%{value:,.0f} B",
        customdata=["", *[""] * len(kinds), *(r[1] for r in rows)],
        marker={"colors": colours, "line": {"color": "#fff", "width": 1}},
        hovertemplate="%{label}<br>%{value:,.0f} B, %{percentRoot:.1%}<br>%{customdata}<extra></extra>",
        textfont={"size": 13, "color": ["#0f172a", *["#ffffff"] * (len(colours) - 1)]}))
    fig.update_layout(margin={"l": 4, "r": 4, "t": 8, "b": 4}, height=520)
    return fig


def rounding(page: Page, tensors: dict):
    """Relative rounding error of every quantised matrix, by layer."""
    matrices: dict[str, dict] = {}
    for run in page.runs:
        for t in tensors.get(run.folder) or ():
            layer = next((int(part) for part in t["name"].split(".") if part.isdigit()), None)
            if t.get("error") is not None and layer is not None and t["how"].startswith("gptq"):
                parts = (p for p in t["name"].split(".") if not p.isdigit() and p not in ("blocks", "weight"))
                kind = ".".join(parts)
                matrices.setdefault(kind, {}).setdefault(id(run),
                                                         []).append((layer, 100 * t["error"], t["how"]))
    if not matrices:
        return None
    kinds = sorted(matrices)
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    fig = page.figure(190 * rows, [*kinds, *[""] * (rows * columns - len(kinds))], rows, shared_yaxes=True,
                      vertical_spacing=0.4 / rows, horizontal_spacing=0.04)
    for i, kind in enumerate(kinds):
        for run in page.runs:
            points = sorted(matrices[kind].get(id(run), ()))
            marks = ["diamond" if "lqer" in how else "circle" for _, _, how in points]
            page.add(fig, run, [p[0] for p in points], [p[1] for p in points], 1 + i % columns,
                     1 + i // columns, text=[p[2] for p in points], marker={"size": 8, "symbol": marks},
                     hovertemplate="layer %{x}: %{y:.2f} %<br>%{text}")
    layers = {layer for by_run in matrices.values() for points in by_run.values() for layer, _, _ in points}
    fig.update_xaxes(dtick=1 if max(layers) < 16 else None)
    fig.update_xaxes(title_text="layer", row=rows)
    fig.update_yaxes(rangemode="tozero", ticksuffix=" %")
    return fig


def profiles(page: Page):
    """BPB by document length and by position in the document, per scoring stage, from
    the event profile."""
    titles = {"length": "by length of the document, tokens",
              "position": "by position in the document, tokens"}
    found = [(run, e) for run in page.runs for e in run.of("profile")]
    sides = [by for by in titles if any(e["by"] == by for _, e in found)]
    if not sides:
        return None
    fig = page.figure(290, [titles[by] for by in sides], legend=True)
    for run, e in found:
        edges, total = e["edges"], sum(e["bytes"])
        keep = [i for i, size in enumerate(e["bytes"]) if size > 0]
        labels = [f"{a}–{b - 1}" for a, b in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]} –"]
        name, colour, dash = PROFILED[e["stage"]]
        page.add(fig, run, [f"{labels[i]}<br><i>{e['bytes'][i] / total:.0%}</i>" for i in keep],
                 [e["nats"][i] / math.log(2) / e["bytes"][i] for i in keep], 1 + sides.index(e["by"]),
                 name=f"{run.name}, {name}" if page.many else name, legendgroup=f"{id(run)}{name}",
                 showlegend=e["by"] == sides[0],
                 line={"dash": dash, **({} if page.many else {"color": colour})},
                 customdata=[[e["tokens"][i], e["documents"][i]] for i in keep],
                 hovertemplate="%{y:.4f} BPB<br>%{customdata[0]:,} tokens, %{customdata[1]:,} documents")
    fig.update_yaxes(title_text="bits per byte", col=1)
    fig.update_xaxes(type="category", tickangle=0, tickfont_size=11)
    return fig


# --- bytes and rounding error per tensor, from the run's own files


@contextmanager
def script_of(run: RunFiles):
    """The run's own script as a module; importing it does no work."""
    need("torch", "bytes per tensor")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run_script.py"
        path.write_bytes(run.source())
        spec = importlib.util.spec_from_file_location("run_script", path)
        module = sys.modules["run_script"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules["run_script"]


def entropy_bytes(codes) -> float:
    """Bytes of a code matrix under its own symbols' frequencies: what a coder without
    contexts needs."""
    import numpy as np

    counts = np.unique(codes, return_counts=True)[1].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def tensors_of(run: RunFiles) -> list[dict]:
    """name, how, bytes and error of every tensor. Tensors share the coded streams: each
    gets its part of a stream's real length, by the entropy of its codes (matrices) or
    by its size (the rest)."""
    blob = (run.folder / ARTIFACT).read_bytes()
    with script_of(run) as tg:
        s = tg.Settings.from_env(as_environment(run.summary["settings"]))
        q = tg.read_artifact(s, blob, "the artifact").model
        header, streams = tg.artifact_from_bytes(blob, "the artifact")
        # a marked artifact holds weights that were trained further after final_model.pt was written
        errors = {} if header.get("not_compliant") else rounding_errors(tg, s, run, q)
        share: dict[str, dict[str, float]] = {}
        for key, dtype, _ in tg.stored_tensors(s, q.meta):
            name = max((n for n in q.meta if key == n or key.startswith(n + ".")), key=len)
            codes, array = key.endswith(".q"), q.tensors[key].numpy()
            stream = tg.CODE_STREAM if codes else tg.HALF_STREAM if dtype == "half" else tg.BYTE_STREAM
            part = share.setdefault(stream, {})
            part[name] = part.get(name, 0.0) + (entropy_bytes(array) if codes else array.nbytes)
    size: dict[str, float] = dict.fromkeys(q.meta, 0.0)
    for stream, parts in share.items():
        for name, amount in parts.items():
            size[name] += len(streams.get(stream, b"")) * amount / max(sum(parts.values()), 1e-9)
    return [{"name": n, "how": how, "bytes": round(size[n]), "error": errors.get(n)}
            for n, how in q.meta.items()]


def rounding_errors(tg, s, run: RunFiles, q) -> dict[str, float]:
    """‖W - Ŵ‖ / ‖W‖ per tensor, when the averaged weights lie beside the artifact."""
    path = run.folder / "final_model.pt"
    if not path.is_file():
        return {}
    model = tg.GPT(s)
    with tg.torch.no_grad():
        tg.read_weights(str(path), model)
    exact = tg.matrix_views({n: p.detach().float() for n, p in model.named_parameters()})
    return {n: float((exact[n] - w).norm() / exact[n].norm().clamp_min(1e-12))
            for n, w in tg.dequantise(q).items() if n in exact}


def all_tensors(runs: list[RunFiles]) -> dict:
    """tensors_of every run that can tell; a run that cannot is named and left out."""
    out = {}
    for run in runs:
        try:
            out[run.folder] = tensors_of(run)
        except Exception as error:  # an old script, a missing file: the rest of the page stands without
            print(f"note: no bytes per tensor for {relative(run.folder)} ({type(error).__name__}: {error})",
                  file=sys.stderr)
    return out


# --- the page


def tiles(page: Page) -> str:
    """The figures one looks at first."""
    many = ", mean of runs" if page.many else ""

    def of(key):
        return [run.summary[key] for run in page.runs if key in run.summary]

    cells = []
    if scores := of("val_bpb"):
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        cells.append((f"{statistics.fmean(scores):.4f}{spread}", "bits per byte" + many))
    if total := max(of("total_bytes"), default=0):
        cells.append((f"{total:,} B", f"artifact and script; {ARTIFACT_LIMIT - total:,} to spare"))
    for key, what, setting in (("train_seconds", "training", "MAX_WALLCLOCK_SECONDS"),
                               ("eval_seconds", "evaluation", "EVAL_MAX_SECONDS")):
        if seconds := max(of(key), default=0.0):
            budgets = {settings.get(setting) for settings in of("settings")}
            bound = f"of {budgets.pop():g} s " if len(budgets) == 1 and None not in budgets else ""
            cells.append((f"{seconds:.1f} s", f"{bound}for {what}{', the longest run' if page.many else ''}"))
    if of("steps") and of("step_ms"):
        steps, ms = statistics.fmean(of("steps")), statistics.fmean(of("step_ms"))
        cells.append((f"{steps:,.0f}", f"steps of {ms:,.0f} ms{many}"))
    bad = html.escape(", ".join(run.name for run in page.runs if run.summary.get("compliant") is False))
    banner = f'<section class="bad"><b>NON-COMPLIANT</b>: {bad}</section>' if bad else ""
    tile = '<div class="tile"><b>{}</b><span>{}</span></div>'
    boxes = "".join(tile.format(*map(html.escape, cell)) for cell in cells)
    return f'{banner}<div class="tiles">{boxes}</div>'


def summary_table(page: Page) -> str:
    """Every run's figures, equal to summary.json."""
    keys = [t for t in TABLE if any(t[0] in run.summary for run in page.runs)]
    rows = []
    for run in page.runs:
        cells = "".join(f'<td data-run="{html.escape(run.name)}" data-key="{key}">'
                        + (format(run.summary[key], form) if key in run.summary else "–") + "</td>"
                        for key, _, form in keys)
        label = html.escape(run.name + (f" (seed {run.seed})" if "val_bpb" in run.summary
                                        else " (unfinished)"))
        rows.append(
            f'<tr><td><span class="dot" style="background:{page.colour[id(run)]}"></span>{label}</td>{cells}')
    if page.many:
        means = ((statistics.fmean(run.summary[key] for run in page.runs if key in run.summary), form)
                 for key, _, form in keys)
        cells = "".join(f"<td>{format(round(x) if form == ',d' else x, form)}</td>" for x, form in means)
        rows.append(f'<tr class="mean"><td>mean</td>{cells}')
    head = "".join(f"<th>{html.escape(label)}</th>" for _, label, _ in keys)
    return (
        f'<section><h2>Runs</h2><div class="scroll"><table><tr><th>run</th>{head}</tr>{"</tr>".join(rows)}'
        f"</tr></table></div>{details(page)}</section>")


def details(page: Page) -> str:
    """Settings that differ from the defaults, checks and warnings, folded away."""
    parts = []
    for run in page.runs:
        changed = {k: v for k, v in run.last("changed_settings").items() if k not in OWN_TO_EACH_RUN}
        lines = [" ".join(f"{k}={v}" for k, v in values.items() if k not in ("event", "time", "run_id"))
                 for values in (run.last("start"), changed)]
        lines += [f"{e['what']}: {e['detail']}" for e in run.of("check")]
        lines += [f"WARNING {e.get('text', '')}" for e in run.of("warning")]
        lines += [f"NON-COMPLIANT: {e.get('reason', '')}" for e in run.of("NON-COMPLIANT")]
        text = html.escape("\n".join(line for line in lines if line))
        parts.append(f"<b>{html.escape(run.name)}</b><pre>{text}</pre>")
    warnings = sum(len(run.of("warning")) for run in page.runs)
    label = "machine, settings, checks" + (f" and {warnings} warning(s)" if warnings else "")
    return f"<details><summary>{label}</summary>{''.join(parts)}</details>"


def sections(page: Page) -> list[tuple[str, str, str, object, str]]:
    """(id, title, sentence, figure or None, what is missing) in reading order."""
    tensors = all_tensors(page.runs)
    return [
        ("scores", "Score by stage", "What quantising, windows and test-time training did to the score.",
         scores(page), "no run was scored"),
        ("curves", "Learning curves", "A dotted line: the first logged step with the loop's extra passes.",
         curves(page), "no progress lines"),
        ("pace", "Learning rate and pace", "Step time from line to line, not the running mean: drift shows.",
         pace(page), "no progress lines"),
        ("step_time", "Where a step's time goes",
         "Steps early, halfway and late, timed part by part, waiting for the device after each part.",
         step_parts(page), "no step_time events"),
        ("timeline", "Budgets",
         "Seconds by phase; the dashed line is the budget. What is outside the clocks is not charged.",
         timeline(page), "no phase was logged"),
        ("treemap", "Bytes by tensor",
         "Click to zoom. Tensors share coded streams: each has its share of the stream's real length.",
         treemap(page, tensors), "the artifact is not there"),
        ("rounding", "Rounding error by layer",
         "‖W − Ŵ‖ / ‖W‖ of every matrix that GPTQ rounded; diamonds have a low-rank repair. "
         "Left out after pre-quantisation TTT: the saved weights are those before it.",
         rounding(page, tensors), "artifact and its weights are not both there"),
        ("profiles", "Score by document length and by position",
         "With and without test-time training; in italics the share of the text's bytes.",
         profiles(page), "no profile events"),
    ]


def build(page: Page, title: str, parts) -> str:
    """The whole page; nothing in it points outside."""
    body = [f'<section><h2>{html.escape(head)}</h2><p class="what">{html.escape(sentence)}</p>'
            + fig.to_html(full_html=False, include_plotlyjs=False, div_id=key, config=QUIET) + "</section>"
            for key, head, sentence, fig, _ in parts if fig is not None]
    if missing := [f"{head} ({why})" for _, head, _, fig, why in parts if fig is None]:
        body.append(f'<p class="none">Not shown: {html.escape("; ".join(missing))}.</p>')
    first = page.runs[0].last("start")
    facts = [f"{len(page.runs)} run{'s' if page.many else ''} on {first.get('world_size', '?')} × "
             f"{first.get('device', 'unknown device')}", f"{first.get('parameters', 0):,} parameters",
             f"attention {first.get('attention', '?')}", f"torch {first.get('torch', '?')}"]
    title, sub = html.escape(title), html.escape(", ".join(facts))
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style><script>{need('plotly.offline', 'report').get_plotlyjs()}</script></head>"
            f'<body><main><h1>{title}</h1><p class="sub">{sub}</p>{tiles(page)}{summary_table(page)}'
            f"{''.join(body)}</main></body></html>")


def write_pngs(parts, folder: Path) -> list[Path]:
    """One PNG per figure."""
    need("kaleido", "--png")
    out = []
    for key, head, _, fig, _ in parts:
        if fig is None:
            continue
        top = fig.layout.margin.t + 44
        fig.update_layout(title={"text": head, "x": 0.01}, margin={"t": top}, height=fig.layout.height + 44)
        try:
            out.append(write_atomic(folder / f"report_{key}.png", fig.to_image("png", width=1160, scale=2)))
        except Exception as error:  # kaleido raises its own types when there is no browser
            raise ToolError(f"no PNG could be drawn ({type(error).__name__}): --png needs Chrome or Chromium "
                            "(apt-get install chromium); the HTML page is complete without it") from None
    return out


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument("--out", help="the page (default: report.html in the first run's folder)")
    parser.add_argument("--title", default="", help="its title (default: what the runs' names share)")
    parser.add_argument("--png", action="store_true", help="also write one PNG per figure beside it")
    args = parser.parse_args(arguments)
    if len(args.runs) > len(RUN_COLOURS):
        raise ToolError(f"{len(args.runs)} runs are too many to tell apart: give at most {len(RUN_COLOURS)}")
    runs = [load_run(folder, finished=False) for folder in args.runs]
    common = os.path.commonprefix([run.name for run in runs]).rstrip("_-")
    title = args.title or (common if len(common) > 2 or len(runs) == 1 else f"{len(runs)} runs")
    page = Page(runs)
    parts, out = sections(page), Path(args.out) if args.out else runs[0].folder / "report.html"
    write_atomic(out, build(page, title, parts))
    made = [out] + (write_pngs(parts, out.parent) if args.png else [])
    missing = [f"{head} ({why})" for _, head, _, fig, why in parts if fig is None]
    print(f"made {', '.join(map(relative, made))}" + (f"; not shown: {', '.join(missing)}" if missing
                                                      else ""))
    return 0


if __name__ == "__main__":
    run_cli(main)
