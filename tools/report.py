"""One HTML page about one or several runs that opens offline: what happened, where time and bytes went.

    python tools/report.py runs/demo                        # writes runs/demo/report.html
    python tools/report.py runs/seed_* --out report.html    # several runs, overlaid
    python tools/report.py runs/demo --png                  # also one PNG per figure (needs Chromium)

Curves come from metrics.jsonl, figures from summary.json. Bytes and rounding error per tensor come from the
event `tensors` where it is logged, else from the run's artifact and weights, read by the run's own script.
"""

from __future__ import annotations

import argparse
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
    RunFiles,
    ToolError,
    load_run,
    need,
    relative,
    run_cli,
    write_atomic,
)

RUN_COLOURS = ("#2563eb", "#dc6803", "#0e9384", "#9333ea", "#be123c", "#4d7c0f", "#475569", "#b45309")
PHASES = {  # phase of a run -> colour
    "compile and warm-up": "#cbd5e1",
    "rehearsal": "#94a3b8",
    "train": "#2563eb",
    "calibrate": "#0e9384",
    "quantise and pack": "#dc6803",
    "quantise": "#dc6803",
    "pack": "#eab308",
    "sliding windows": "#9333ea",
    "test-time training": "#be123c",
    "score": "#9333ea",
}
KINDS = {"attention": "#2563eb", "MLP": "#0e9384", "embedding": "#dc6803", "other": "#94a3b8"}
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
STAGES = (
    ("untrained_val_bpb", "untrained"),
    ("prequant_val_bpb", "averaged weights"),
    ("quantized_val_bpb", "quantised"),
    ("sliding_val_bpb", "sliding windows"),
    ("val_bpb", "final"),
)
QUIET = {"displaylogo": False, "responsive": True, "displayModeBar": False}
STYLE = """
*{box-sizing:border-box} body{margin:0;background:#f1f5f9;color:#0f172a;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 20px 60px} h1{font-size:26px;margin:0 0 2px}
.sub{color:#475569;margin:0 0 18px} h2{font-size:18px;margin:0 0 2px} p.what{color:#475569;
margin:0 0 8px;max-width:90ch}
section{background:#fff;border:1px solid #e2e8f0;border-radius:10px;
padding:18px 20px;margin:16px 0}
.tiles{display:grid;grid-template-columns:repeat(5,1fr);gap:12px;margin:0 0 16px}
.tile{background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:22px;white-space:nowrap;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:#475569;font-size:13px} .bad{background:#fef2f2;border-color:#fca5a5;color:#991b1b}
.scroll{overflow-x:auto} table{border-collapse:collapse;width:100%;font-size:12px;
font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 4px;border-bottom:1px solid #e2e8f0;white-space:nowrap}
th{color:#475569;font-weight:600}
th:first-child,td:first-child{text-align:left}
.dot{display:inline-block;width:10px;height:10px;border-radius:5px;
margin-right:7px} tr.mean td{font-weight:600} details{margin-top:8px} summary{cursor:pointer;color:#475569}
pre{font-size:12px;white-space:pre-wrap;margin:6px 0} .none{color:#64748b;font-style:italic}
"""


class Page:
    """The runs, their colours, and the plotting library."""

    def __init__(self, runs: list[RunFiles]):
        self.runs = runs
        self.go = need("plotly.graph_objects", "report")
        self.subplots = need("plotly.subplots", "report").make_subplots
        self.colour = {id(run): RUN_COLOURS[i % len(RUN_COLOURS)] for i, run in enumerate(runs)}

    def figure(self, height: int, rows: int = 1, columns: int = 1, titles=(), **options):
        """An empty figure in the page's style."""
        fig = self.subplots(rows=rows, cols=columns, subplot_titles=titles or None, **options)
        fig.update_layout(
            height=height,
            template="plotly_white",
            margin={"l": 70, "r": 20, "t": 34 if titles else 14, "b": 78},
            font={"family": "system-ui, Segoe UI, Roboto, Arial, sans-serif", "size": 13, "color": "#0f172a"},
            legend={
                "orientation": "h",
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
                "x": 0.5,
                "xanchor": "center",
            },
            hovermode="closest",
        )
        return fig

    def lines(self, fig, run: RunFiles, events, x: str, y: str, row: int, column: int, legend=False, **line):
        """One run's curve of y over x; events without y are left out."""
        points = [e for e in events if isinstance(e.get(y), (int, float)) and x in e]
        if points:
            fig.add_trace(
                self.go.Scatter(
                    x=[e[x] for e in points],
                    y=[e[y] for e in points],
                    name=run.name,
                    legendgroup=run.name,
                    showlegend=legend and len(self.runs) > 1,
                    mode="lines+markers" if len(points) < 40 else "lines",
                    marker={"size": 5},
                    line={"color": self.colour[id(run)], "width": 2, **line},
                ),
                row=row,
                col=column,
            )
        return bool(points)


# --- the figures: each returns a figure, or None when no run logged what it needs


def scores(page: Page):
    """BPB after each stage."""
    fig, labels = page.figure(120 + 34 * len(page.runs) + 130), [label for _, label in STAGES]
    for run in page.runs:
        have = [(label, run.summary[key]) for key, label in STAGES[1:] if key in run.summary]
        fig.add_trace(
            page.go.Scatter(
                x=[v for _, v in have],
                y=[label for label, _ in have],
                mode="lines+markers+text" if len(page.runs) == 1 else "lines+markers",
                name=run.name,
                text=[f"{v:.4f}" for _, v in have],
                textposition="middle right",
                showlegend=len(page.runs) > 1,
                marker={"size": 11, "color": page.colour[id(run)]},
                line={"color": page.colour[id(run)], "width": 1.5},
                cliponaxis=False,
            )
        )
    fig.update_yaxes(categoryorder="array", categoryarray=labels[:0:-1], automargin=True)
    fig.update_xaxes(title="bits per byte (lower is better)")
    return fig if fig.data else None


def curves(page: Page):
    """Training loss and validation BPB over steps; a dotted line where the loop starts."""
    fig = page.figure(360, 1, 2, ("training loss, nats per token", "validation, bits per byte"))
    for run in page.runs:
        train = run.of("train")
        page.lines(fig, run, train, "step", "loss", 1, 1, legend=True)
        ends = [(0, "untrained_val_bpb"), (run.summary.get("steps", 0), "prequant_val_bpb")]
        points = {n: run.summary[key] for n, key in ends if key in run.summary}
        points = {**points, **{e["step"]: e["val_bpb"] for e in run.of("validation")}}
        page.lines(fig, run, [{"step": n, "v": v} for n, v in sorted(points.items())], "step", "v", 1, 2)
        start = next((e["step"] for e in train if e.get("looping")), None)
        if start and not all(e.get("looping") for e in train):
            fig.add_vline(
                x=start, line={"color": page.colour[id(run)], "dash": "dot", "width": 1}, row=1, col=1
            )
    fig.update_xaxes(title="step")
    return fig if fig.data else None


def pace(page: Page):
    """Learning rate and step time."""
    fig = page.figure(320, 1, 2, ("learning rate, share of the peak", "ms per step since the line before"))
    for run in page.runs:
        page.lines(fig, run, run.of("train"), "step", "lr", 1, 1, legend=True, shape="hv")
        page.lines(fig, run, run.of("train"), "step", "ms", 1, 2)
    fig.update_xaxes(title="step")
    fig.update_yaxes(rangemode="tozero")
    return fig if fig.data else None


def step_parts(page: Page):
    """Where a step's time goes, from the event step_time."""
    parts: dict[str, list] = {}
    for run in page.runs:
        for e in run.of("step_time"):
            for name, ms in e.get("parts", {}).items():
                parts.setdefault(name, []).append((f"{run.name}, step {e.get('step', '?')}", ms))
    if not parts:
        return None
    fig = page.figure(120 + 30 * max(map(len, parts.values())))
    for (name, values), colour in zip(parts.items(), RUN_COLOURS, strict=False):
        fig.add_trace(
            page.go.Bar(
                y=[y for y, _ in values],
                x=[ms for _, ms in values],
                name=name,
                orientation="h",
                marker={"color": colour},
            )
        )
    fig.update_layout(barmode="stack")
    fig.update_xaxes(title="ms")
    fig.update_yaxes(automargin=True, autorange="reversed")
    return fig


def phases(run: RunFiles) -> dict[str, list[tuple[str, float]]]:
    """The seconds of a run by clock: outside both, training budget, evaluation budget."""

    def between(a, b):
        times = [run.last(a).get("time"), run.last(b).get("time")]
        return times[1] - times[0] if None not in times else 0.0

    rehearsal = run.last("rehearsal")
    outside = [
        ("compile and warm-up", run.last("warm_up").get("seconds", 0.0)),
        ("rehearsal", rehearsal.get("seconds", between("warm_up", "rehearsal") if rehearsal else 0.0)),
    ]
    end, artifact = run.last("train_end"), run.last("artifact")
    training = [("train", end.get("seconds", 0.0)), ("calibrate", artifact.get("calibrate_s", 0.0))]
    if "quantise_s" in artifact:
        training += [("quantise", artifact["quantise_s"]), ("pack", artifact.get("pack_s", 0.0))]
    else:
        training.append(("quantise and pack", artifact.get("quantise_and_pack_s", 0.0)))
    sliding, ttt = run.last("score_sliding").get("elapsed", 0.0), run.last("score_ttt").get("elapsed")
    total = run.summary.get("eval_seconds", 0.0)
    evaluation = [("sliding windows", sliding)]
    evaluation.append(("test-time training", ttt - sliding) if ttt else ("score", max(total - sliding, 0.0)))
    return {"outside the clocks": outside, "training budget": training, "evaluation budget": evaluation}


def timeline(page: Page):
    """Seconds by phase against the two budgets."""
    clocks = ("training budget", "evaluation budget", "outside the clocks")
    fig = page.figure(160 + 28 * len(page.runs), 1, 3, clocks, horizontal_spacing=0.03, shared_yaxes=True)
    seen = set()
    for run in page.runs:
        for column, clock in enumerate(clocks, 1):
            for phase, seconds in phases(run)[clock]:
                if seconds > 0:
                    fig.add_trace(
                        page.go.Bar(
                            y=[run.name],
                            x=[seconds],
                            name=phase,
                            legendgroup=phase,
                            showlegend=phase not in seen,
                            orientation="h",
                            marker={"color": PHASES[phase]},
                            hovertemplate=f"{phase}: %{{x:.1f}} s<extra>{html.escape(run.name)}</extra>",
                        ),
                        row=1,
                        col=column,
                    )
                    seen.add(phase)
    if not seen:
        return None
    for column, key in ((1, "MAX_WALLCLOCK_SECONDS"), (2, "EVAL_MAX_SECONDS")):
        for budget in {run.summary.get("settings", {}).get(key) for run in page.runs} - {None, 0, 0.0}:
            fig.add_vline(x=budget, line={"color": "#b91c1c", "width": 2, "dash": "dash"}, row=1, col=column)
    fig.update_layout(
        barmode="stack",
    )
    fig.update_xaxes(title="seconds", rangemode="tozero")
    fig.update_yaxes(automargin=True, autorange="reversed")
    return fig


def kind_of(name: str) -> str:
    """What a tensor belongs to."""
    return next(
        (
            kind
            for part, kind in (
                (".attn.", "attention"),
                (".mlp.", "MLP"),
                ("emb", "embedding"),
                ("lm_head", "embedding"),
            )
            if part in name
        ),
        "other",
    )


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def treemap(page: Page, tensors: dict):
    """Bytes of one artifact by tensor, and the script."""
    run, items = next(((r, tensors[r.folder]) for r in page.runs if tensors.get(r.folder)), (None, None))
    if not items:
        return None
    artifact, script = run.summary.get("artifact_bytes", 0), run.summary.get("code_bytes", 0)
    known = sum(t["bytes"] for t in items)
    rows = [(t["name"], t["how"], kind_of(t["name"]), t["bytes"]) for t in items]
    rows += [
        ("header and tables", "", "other", max(artifact - known, 0)),
        ("train_gpt.py", "script", "other", script),
    ]
    kinds = sorted({kind for _, _, kind, _ in rows})
    sums = {kind: sum(r[3] for r in rows if r[2] == kind) for kind in kinds}
    total = sum(sums.values())
    fig = page.figure(520)
    fig.add_trace(
        page.go.Treemap(
            ids=["all", *kinds, *(f"{r[2]}/{r[0]}" for r in rows)],
            labels=[
                "artifact and script",
                *kinds,
                *(r[0].replace("blocks.", "").removesuffix(".weight") for r in rows),
            ],
            parents=["", *["all"] * len(kinds), *(r[2] for r in rows)],
            branchvalues="total",
            values=[total, *(sums[k] for k in kinds), *(r[3] for r in rows)],
            customdata=["", *[""] * len(kinds), *(r[1] for r in rows)],
            texttemplate="%{label}<br>%{value:,.0f} B",
            hovertemplate="%{label}<br>%{value:,.0f} B, %{percentRoot:.1%}<br>%{customdata}<extra></extra>",
            marker={
                "colors": ["#e2e8f0", *(KINDS[k] for k in kinds), *(KINDS[r[2]] for r in rows)],
                "line": {"color": "#ffffff", "width": 1},
            },
            textfont={"size": 13},
        )
    )
    fig.update_layout(margin={"l": 4, "r": 4, "t": 8, "b": 4})
    return fig


def rounding(page: Page, tensors: dict):
    """Relative rounding error of every quantised matrix, by layer."""
    matrices: dict[str, list] = {}
    for run in page.runs:
        for t in tensors.get(run.folder) or ():
            if t.get("error") is not None and layer_of(t["name"]) is not None and t["how"].startswith("gptq"):
                kind = ".".join(
                    p for p in t["name"].split(".") if not p.isdigit() and p not in ("blocks", "weight")
                )
                matrices.setdefault(kind, []).append((run, layer_of(t["name"]), t["error"], t["how"]))
    if not matrices:
        return None
    kinds = sorted(matrices)
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    fig = page.figure(
        60 + 210 * rows,
        rows,
        columns,
        kinds,
        shared_yaxes=True,
        vertical_spacing=0.5 / (rows + 1),
        horizontal_spacing=0.04,
    )
    for i, kind in enumerate(kinds):
        for run in page.runs:
            points = sorted((layer, error, how) for r, layer, error, how in matrices[kind] if r is run)
            fig.add_trace(
                page.go.Scatter(
                    x=[p[0] for p in points],
                    y=[100 * p[1] for p in points],
                    text=[p[2] for p in points],
                    name=run.name,
                    mode="lines+markers",
                    marker={"size": 7, "symbol": ["diamond" if "lqer" in p[2] else "circle" for p in points]},
                    line={"color": page.colour[id(run)]},
                    legendgroup=run.name,
                    showlegend=i == 0 and len(page.runs) > 1,
                    hovertemplate="layer %{x}: %{y:.2f} %<br>%{text}<extra></extra>",
                ),
                row=1 + i // columns,
                col=1 + i % columns,
            )
    fig.update_xaxes(dtick=1 if max(layer_of_max(matrices), 1) < 16 else None)
    fig.update_xaxes(title="layer", row=rows)
    fig.update_yaxes(rangemode="tozero", ticksuffix=" %")
    return fig


def layer_of_max(matrices: dict) -> int:
    """The highest layer there is."""
    return max(layer for points in matrices.values() for _, layer, _, _ in points)


def profiles(page: Page):
    """BPB by document length and by position in the document, per scoring stage, from the event profile."""
    found = [(run, e) for run in page.runs for e in run.of("profile")]
    sides = [by for by in ("length", "position") if any(e.get("by") == by for _, e in found)]
    if not sides:
        return None
    titles = {"length": "by document length, tokens", "position": "by position in the document, tokens"}
    fig = page.figure(380, 1, len(sides), [titles[by] for by in sides])
    dashes = {"quantized": "dot", "sliding": "dash", "ttt": "solid"}
    for run, e in found:
        edges, pairs = e["edges"], list(zip(e["nats"], e["bytes"], strict=False))
        keep = [i for i, (_, size) in enumerate(pairs) if size > 0]
        labels = [
            f"{edges[i]}–{edges[i + 1] - 1}" if i + 1 < len(edges) else f"≥ {edges[i]}"
            for i in range(len(pairs))
        ]
        fig.add_trace(
            page.go.Scatter(
                x=[labels[i] for i in keep],
                y=[pairs[i][0] / math.log(2) / pairs[i][1] for i in keep],
                mode="lines+markers",
                name=f"{run.name}: {e['stage']}" if len(page.runs) > 1 else e["stage"],
                legendgroup=f"{id(run)}{e['stage']}",
                showlegend=e["by"] == sides[0],
                line={
                    "color": page.colour[id(run)]
                    if len(page.runs) > 1
                    else PHASES.get(
                        {"ttt": "test-time training", "sliding": "sliding windows"}.get(e["stage"]), "#94a3b8"
                    ),
                    "dash": dashes.get(e["stage"], "solid"),
                },
                customdata=[[e["tokens"][i], e["bytes"][i]] for i in keep],
                hovertemplate="%{x}: %{y:.4f} BPB<br>%{customdata[0]:,} tokens<extra></extra>",
            ),
            row=1,
            col=1 + sides.index(e["by"]),
        )
    fig.update_yaxes(title="bits per byte")
    fig.update_xaxes(type="category")
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
        module = importlib.util.module_from_spec(spec)
        sys.modules["run_script"] = module
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules["run_script"]


def entropy_bytes(codes) -> float:
    """Bytes of a code matrix under its own symbols' frequencies: what a coder without contexts needs."""
    import numpy as np

    counts = np.unique(codes, return_counts=True)[1].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def tensors_of(run: RunFiles) -> list[dict]:
    """name, how, bytes and error of every tensor. Tensors share the coded streams: each gets its part of
    a stream's real length, by the entropy of its codes (matrices) or by its size (the rest)."""
    if run.of("tensors"):
        return run.last("tensors")["items"]
    blob = (run.folder / ARTIFACT).read_bytes()
    with script_of(run) as tg:
        s = tg.Settings.from_env(
            {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in run.summary["settings"].items()}
        )
        q = tg.unpack_model(s, blob, "the artifact")
        streams = tg.artifact_from_bytes(blob, "the artifact")[1]
        errors = rounding_errors(tg, s, run, q)
        share: dict[str, dict[str, float]] = {}
        for key, dtype, _ in tg.stored_tensors(s, q.meta):
            name = next(
                n for n in sorted(q.meta, key=len, reverse=True) if key == n or key.startswith(n + ".")
            )
            array = q.tensors[key].numpy()
            stream = (
                tg.CODE_STREAM
                if key.endswith(".q")
                else tg.HALF_STREAM
                if dtype == "half"
                else tg.BYTE_STREAM
            )
            part = share.setdefault(stream, {})
            part[name] = part.get(name, 0.0) + (entropy_bytes(array) if key.endswith(".q") else array.nbytes)
    size: dict[str, float] = dict.fromkeys(q.meta, 0.0)
    for stream, parts in share.items():
        for name, amount in parts.items():
            size[name] += len(streams.get(stream, b"")) * amount / max(sum(parts.values()), 1e-9)
    return [
        {"name": n, "how": how, "bytes": round(size[n]), "error": errors.get(n)} for n, how in q.meta.items()
    ]


def rounding_errors(tg, s, run: RunFiles, q) -> dict[str, float]:
    """‖W - Ŵ‖ / ‖W‖ per tensor, when the averaged weights lie beside the artifact."""
    path = run.folder / "final_model.pt"
    if not path.is_file():
        return {}
    model = tg.GPT(s)
    with tg.torch.no_grad():
        tg.read_weights(str(path), model)
    exact = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    return {
        n: float((exact[n].float() - w).norm() / exact[n].float().norm().clamp_min(1e-12))
        for n, w in tg.dequantise(q).items()
        if n in exact
    }


def all_tensors(runs: list[RunFiles]) -> dict:
    """tensors_of every run that can tell; a run that cannot is named and left out."""
    out = {}
    for run in runs:
        try:
            out[run.folder] = tensors_of(run)
        except (
            Exception
        ) as error:  # an old script, a missing file: the rest of the page does not depend on it
            print(
                f"note: no bytes per tensor for {relative(run.folder)} ({type(error).__name__}: {error})",
                file=sys.stderr,
            )
    return out


# --- the page


def mean_spread(values: list[float], form: str) -> str:
    """A mean, with its standard deviation when there are several."""
    text = format(statistics.fmean(values), form)
    return text + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def tiles(page: Page) -> str:
    """The figures one looks at first."""
    done = [run for run in page.runs if "val_bpb" in run.summary]
    cells = []
    if done:
        take = {
            k: [r.summary[k] for r in done if k in r.summary]
            for k in ("val_bpb", "total_bytes", "train_seconds", "eval_seconds", "steps")
        }
        cells.append(
            (
                mean_spread(take["val_bpb"], ".4f"),
                "bits per byte" + (", mean of runs" if len(done) > 1 else ""),
            )
        )
        if take["total_bytes"]:
            left = ARTIFACT_LIMIT - max(take["total_bytes"])
            cells.append((f"{max(take['total_bytes']):,}", f"bytes with the script; {left:,} to spare"))
        for key, what in (
            ("train_seconds", "s of training budget"),
            ("eval_seconds", "s of evaluation budget"),
        ):
            if take[key]:
                cells.append((f"{max(take[key]):.1f}", what + (" (longest)" if len(done) > 1 else "")))
        if take["steps"]:
            cells.append((f"{statistics.fmean(take['steps']):,.0f}", "optimiser steps"))
    out = "".join(
        f'<div class="tile"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in cells
    )
    bad = [run.name for run in page.runs if run.summary.get("compliant") is False]
    banner = (
        f'<section class="bad"><b>NON-COMPLIANT</b>: {html.escape(", ".join(bad))}</section>' if bad else ""
    )
    return f'{banner}<div class="tiles">{out}</div>'


def summary_table(page: Page) -> str:
    """Every run's figures, equal to summary.json."""
    keys = [t for t in TABLE if any(t[0] in run.summary for run in page.runs)]
    head = "".join(f"<th>{html.escape(label)}</th>" for _, label, _ in keys)
    rows = []
    for run in page.runs:
        cells = "".join(
            f'<td data-run="{html.escape(run.name)}" data-key="{key}">'
            + (format(run.summary[key], form) if key in run.summary else "–")
            + "</td>"
            for key, _, form in keys
        )
        dot = f'<span class="dot" style="background:{page.colour[id(run)]}"></span>'
        seed = f" (seed {run.seed})" if "seed" in run.summary else " (unfinished)"
        rows.append(f"<tr><td>{dot}{html.escape(run.name + seed)}</td>{cells}</tr>")
    if len(page.runs) > 1:
        means = []
        for key, _, form in keys:
            values = [run.summary[key] for run in page.runs if key in run.summary]
            mean = statistics.fmean(values)
            means.append(f"<td>{format(round(mean) if form == ',d' else mean, form)}</td>")
        rows.append(f'<tr class="mean"><td>mean</td>{"".join(means)}</tr>')
    return (
        f'<section><h2>Runs</h2><div class="scroll"><table><tr><th>run</th>{head}</tr>'
        f"{''.join(rows)}</table></div>{details(page)}</section>"
    )


def details(page: Page) -> str:
    """Settings that differ from the defaults, checks and warnings, folded away."""
    parts = []
    for run in page.runs:
        skip = {"event", "time", *OWN_TO_EACH_RUN}
        changed = [f"{k}={v}" for k, v in run.last("changed_settings").items() if k not in skip]
        start = {k: v for k, v in run.last("start").items() if k not in ("event", "time", "run_id")}
        lines = [" ".join(f"{k}={v}" for k, v in start.items()), " ".join(changed)]
        lines += [f"{e['what']}: {e['detail']}" for e in run.of("check")]
        lines += [f"WARNING {e.get('text', '')}" for e in run.of("warning")]
        text = html.escape("\n".join(line for line in lines if line))
        parts.append(f"<b>{html.escape(run.name)}</b><pre>{text}</pre>")
    warnings = sum(len(run.of("warning")) for run in page.runs)
    label = "machine, settings, checks" + (f" and {warnings} warning(s)" if warnings else "")
    return f"<details><summary>{label}</summary>{''.join(parts)}</details>"


def sections(page: Page) -> list[tuple[str, str, str, object, str]]:
    """(id, title, sentence, figure or None, what is missing) in reading order."""
    tensors = all_tensors(page.runs)
    return [
        ("scores", "Score by stage", "What each stage did to the score.", scores(page), "no run was scored"),
        (
            "curves",
            "Learning curves",
            "A dotted line marks the step from which the loop's extra passes run.",
            curves(page),
            "no progress lines",
        ),
        (
            "pace",
            "Learning rate and pace",
            "Instantaneous step time, not the running mean: drift shows.",
            pace(page),
            "no progress lines",
        ),
        (
            "step_time",
            "Where a step's time goes",
            "Measured with the GPU drained, on a few steps.",
            step_parts(page),
            "the runs logged no step_time events",
        ),
        (
            "timeline",
            "Budgets",
            "Seconds by phase; the dashed line is the budget. What is outside the clocks is not charged.",
            timeline(page),
            "no phase was logged",
        ),
        (
            "treemap",
            "Bytes by tensor",
            "The artifact of the first run and the script, as they count; click to zoom. Tensors "
            "share coded streams: each has its share of the stream's real length.",
            treemap(page, tensors),
            "neither a tensors event nor the artifact is there",
        ),
        (
            "rounding",
            "Rounding error by layer",
            "‖W − Ŵ‖ / ‖W‖ of every quantised matrix; diamonds have a low-rank repair.",
            rounding(page, tensors),
            "neither a tensors event nor artifact and weights are there",
        ),
        (
            "profiles",
            "Score by document length and by position",
            "Solid: with test-time training. Dashed: sliding windows without it.",
            profiles(page),
            "the runs logged no profile events",
        ),
    ]


def build(page: Page, title: str, parts) -> str:
    """The whole page; nothing in it points outside."""
    offline = need("plotly.offline", "report")
    body = []
    for key, head, sentence, fig, _ in parts:
        if fig is not None:
            drawing = fig.to_html(full_html=False, include_plotlyjs=False, div_id=key, config=QUIET)
            body.append(
                f'<section><h2>{html.escape(head)}</h2><p class="what">{html.escape(sentence)}</p>'
                f"{drawing}</section>"
            )
    missing = [f"{head} ({why})" for _, head, _, fig, why in parts if fig is None]
    if missing:
        body.append(f'<p class="none">Not shown: {html.escape("; ".join(missing))}.</p>')
    first = page.runs[0].last("start")
    count = f"{len(page.runs)} run{'s' if len(page.runs) > 1 else ''}"
    sub = f"{count} on {first.get('world_size', '?')} × {first.get('device', 'unknown device')}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style>"
        f"<script>{offline.get_plotlyjs()}</script></head><body><main><h1>{html.escape(title)}</h1>"
        f'<p class="sub">{html.escape(sub)}</p>{tiles(page)}{summary_table(page)}'
        f"{''.join(body)}</main></body></html>"
    )


def write_pngs(parts, folder: Path) -> list[Path]:
    """One PNG per figure."""
    need("kaleido", "--png")
    out = []
    for key, head, _, fig, _ in parts:
        if fig is None:
            continue
        fig.update_layout(title={"text": head, "x": 0.01}, margin={"t": fig.layout.margin.t + 44})
        try:
            out.append(
                write_atomic(folder / f"report_{key}.png", fig.to_image(format="png", width=1160, scale=2))
            )
        except Exception as error:  # kaleido raises its own types when there is no browser
            raise ToolError(
                f"no PNG could be drawn ({type(error).__name__}): --png needs Chrome or Chromium "
                "(apt-get install chromium); the HTML page is complete without it"
            ) from None
    return out


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument("--out", help="the page (default: report.html in the first run's folder)")
    parser.add_argument("--title", default="", help="its title (default: what the runs' names share)")
    parser.add_argument("--png", action="store_true", help="also write one PNG per figure beside it")
    args = parser.parse_args(arguments)
    if len(args.runs) > len(RUN_COLOURS):
        raise ToolError(f"{len(args.runs)} runs are too many to tell apart: give at most {len(RUN_COLOURS)}")
    runs = [load_run(folder, finished=False) for folder in args.runs]
    page = Page(runs)
    common = os.path.commonprefix([run.name for run in runs]).rstrip("_-")
    title = args.title or (common if len(common) > 2 or len(runs) == 1 else f"{len(runs)} runs")
    parts, out = sections(page), Path(args.out) if args.out else runs[0].folder / "report.html"
    write_atomic(out, build(page, title, parts))
    made = [out] + (write_pngs(parts, out.parent) if args.png else [])
    missing = [head for _, head, _, fig, _ in parts if fig is None]
    print(
        f"made {', '.join(map(relative, made))}"
        + (f"; not shown for want of events: {', '.join(missing)}" if missing else "")
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
