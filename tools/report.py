"""One HTML page about runs, which opens offline: what happened, where time and bytes went.

    python tools/report.py runs/demo                        # writes runs/demo/report.html
    python tools/report.py runs/seed_* --out report.html    # several runs, overlaid
    python tools/report.py runs/demo --png    # also one PNG per plot (needs Chromium)

On top a verdict per run: score, bytes and seconds against their limits, probes, compliant or
not. Curves come from metrics.jsonl, figures from summary.json; bytes and rounding error per
tensor from the run's artifact and weights, read by the run's own script. What a run did
not log is named and left out.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    ARTIFACT,
    ARTIFACT_LIMIT,
    FULL_TEXT,
    OWN_TO_EACH_RUN,
    STAGES,
    RunFiles,
    ToolError,
    as_environment,
    command_line,
    load_run,
    published,
    relative,
    run_cli,
    script_module,
    write_atomic,
)
from tools.diff import OF_A_PLACE, same
from tools.page import (
    RUN_COLOURS,
    Card,
    Cell,
    Folded,
    Group,
    Key,
    Meter,
    Panel,
    Section,
    Segment,
    Table,
    not_shown,
    picture,
    plot,
    render,
)

# Green: on the training clock; violet: on that of evaluation; grey: on neither.
PHASES = {  # phase of a run -> colour
    "train": "#1a8a4a", "calibrate": "#4fa66f", "quantise": "#7fbf8e", "pack": "#aed7b4",
    "sliding windows": "#a99af0", "test-time training": "#6a55d8",
    "compile and warm-up": "#5f6f86", "rehearsal": "#8d9bb0", "probes": "#b7c1cf",
    "rest": "#c8bfa8",
}
PARTS = ("#8fb3c9", "#3f87ad", "#1f5f86", "#d39b3c", "#97a1ae", "#c9ced6")  # of a step
KINDS = {  # kind of a tensor -> colour
    "attention": "#34699a",
    "MLP": "#2c7a6b",
    "embedding": "#a0702a",
    "script": "#5b6473",
    "other": "#7d6b8a",
}
CLOCKS = ("training budget", "evaluation budget", "outside the clocks")
BUDGETS = dict(zip(CLOCKS, ("MAX_WALLCLOCK_SECONDS", "EVAL_MAX_SECONDS")))
SECONDS = dict(zip(CLOCKS, ("train_seconds", "eval_seconds")))  # keys of summary.json
PROFILED = {  # stage of a profile event -> name, colour, dash
    "quantized": ("plain windows", "#7a8699", "dot"),
    "sliding": ("sliding windows", "#a99af0", "dash"),
    "ttt": ("test-time training", "#6a55d8", "solid"),
}
TARGETS = {"pr2135": ("the record, #2135", "#b7860b"), "pr1855": ("the base, #1855", "#8a7f6a")}
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
MOST_POINTS = 500  # of a curve; more steps are put together
LONG_RUN = 300  # steps; the curves of longer ones are first shown without their beginning


class Box(NamedTuple):
    """A rectangle of the treemap."""

    name: str
    how: str
    kind: str
    amount: int


class Page:
    """The runs, with the colour and the key of each."""

    def __init__(self, runs: list[RunFiles]):
        self.runs = runs
        self.many = len(runs) > 1
        self.colour = {id(run): colour for run, colour in zip(runs, RUN_COLOURS)}
        self.key = {id(run): f"run{i}" for i, run in enumerate(runs)}

    def curve(self, run: RunFiles, x: list, y: list, **options) -> dict:
        """A run's curve, as plotly.js takes it."""
        line = {"color": self.colour[id(run)], "width": 2, **options.pop("line", {})}
        defaults = {
            "type": "scatter",
            "name": run.name,
            "legendgroup": self.key[id(run)],
            "marker": {"size": 5},
            "mode": "lines+markers" if len(x) < 40 else "lines",
        }
        return {"x": x, "y": y, "line": line, **defaults, **options}

    def over_steps(self, run: RunFiles, steps: list, values: list, shown: str, **options) -> dict:
        """A run's curve over its steps, which can be drawn over its seconds as well."""
        second_at = clock_of(run)
        meta = {"seconds": [second_at(step) for step in steps]}
        hover = f"step %{{x}}: {shown}<extra>{escaped(run.name)}</extra>"
        return self.curve(run, steps, values, meta=meta, hovertemplate=hover, **options)


def escaped(text: str) -> str:
    """Text for a plot, which knows a few tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def short(value: float) -> float:
    """A figure with six digits: more cannot be seen in a plot."""
    return float(f"{value:.6g}")


def is_number(value) -> bool:
    """An event's figure can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def series(events, key: str) -> tuple[list, list]:
    """(steps, values) of the events that have a step and a number under the key."""
    drawn = [e for e in events if "step" in e and is_number(e.get(key))]
    steps = [e["step"] for e in drawn]
    return steps, [short(e[key]) for e in drawn]


def runs_in_log(run: RunFiles) -> list[RunFiles]:
    """One for each start in the log: an eval-only run in the same folder adds to it."""
    starts = [i for i, e in enumerate(run.events) if e.get("event") == "start"]
    bounds = [0, *starts[1:], len(run.events)]
    runs = []
    for begin, end in itertools.pairwise(bounds):
        runs.append(RunFiles(run.folder, run.summary, run.events[begin:end]))
    return runs


def settings_of(run: RunFiles) -> dict:
    """All settings of a run; from its log, where it has no summary yet."""
    if "settings" in run.summary:
        return run.summary["settings"]
    return {k: v for k, v in run.last("settings").items() if k not in ("event", "time")}


# --- a run's verdict


def failed_probes(run: RunFiles) -> dict[str, str]:
    """What the probes that failed have said."""
    return {name: found["figure"] for name, found in probes_of(run).items() if not found["ok"]}


def probes_of(run: RunFiles) -> dict[str, dict]:
    """ok and figure of every probe of the run's last evaluation."""
    last = runs_in_log(run)[-1]
    logged = {e["name"]: e for e in last.of("probe")}
    return logged or run.summary.get("probes", {})


def reasons_against(run: RunFiles) -> list[str]:
    """Why a run is NON-COMPLIANT; empty when nothing speaks against it so far."""
    summary = run.summary
    reasons = list(summary.get("not_compliant_because", ()))
    for name, figure in failed_probes(run).items():
        reasons.append(f"probe {name}: {figure}")
    if summary.get("total_bytes", 0) > ARTIFACT_LIMIT:
        reasons.append(f"{summary['total_bytes']:,} bytes are over the limit of {ARTIFACT_LIMIT:,}")
    if not reasons and not summary.get("compliant", "val_bpb" not in summary):
        reasons.append("its summary does not say that it is compliant")
    return reasons


def last_words(run: RunFiles) -> dict:
    """The event of an error or a signal that ended the last run in the log; else empty."""
    last = runs_in_log(run)[-1]
    ends = [e for e in last.events if e.get("event") in ("error", "interrupted", "final")]
    return ends[-1] if ends and ends[-1]["event"] != "final" else {}


def verdict(run: RunFiles) -> tuple[str, str]:
    """In a word, and how it looks: good, bad or open."""
    if reasons_against(run):
        return "NON-COMPLIANT", "bad"
    if words := last_words(run):
        return ("FAILED", "bad") if words["event"] == "error" else ("STOPPED", "open")
    if "val_bpb" in run.summary:
        return "COMPLIANT", "good"
    ended = runs_in_log(run)[-1].of("final")  # as it was told to, before the score
    return ("NOT SCORED" if ended else "UNFINISHED"), "open"


def figure_of(run: RunFiles) -> tuple[str, str]:
    """The best known of a run: its score, else that of a stage, else where training is."""
    for label, key in reversed(STAGES):
        if key in run.summary:
            what = "bits per byte" if key == "val_bpb" else f"bits per byte, {label}"
            return f"{run.summary[key]:.4f}", what
    progress = run.last("train")
    if not progress:
        return "–", "before the first step"
    loss = f"loss {progress['loss']:.3f}" if is_number(progress.get("loss")) else "no loss"
    return f"step {progress['step']:,}", f"{progress.get('used', 0.0):.0%} of training, {loss}"


def against_targets(run: RunFiles) -> list[str]:
    """How far a run is from published results; empty where it has scored another text."""
    notes = []
    for name, value in targets([run]).items():
        if "val_bpb" in run.summary:
            gap = run.summary["val_bpb"] - value
            side = "above" if gap > 0 else "below"
            notes.append(f"{abs(gap):.4f} {side} {TARGETS[name][0]} ({value:.4f})")
    return notes


def targets(runs: list[RunFiles]) -> dict[str, float]:
    """Means of published systems, where all of the competition's text was scored."""
    texts = [run.summary["bytes_scored"] for run in runs if "bytes_scored" in run.summary]
    if not texts or min(texts) < FULL_TEXT:
        return {}
    systems = published()
    return {
        name: statistics.fmean(seed["val_bpb"] for seed in systems[name]["runs"])
        for name in TARGETS
    }


def notes_of(run: RunFiles) -> list[tuple[str, str]]:
    """(look, text) of what speaks against a run, of its probes, and of what else to know."""
    notes = [("bad", reason) for reason in reasons_against(run)]
    if words := last_words(run):
        notes.append(("bad", words.get("text", "")))
    probes = probes_of(run)
    if probes and not failed_probes(run):
        passed = f"all {len(probes)} probes passed" if len(probes) > 1 else "its probe passed"
        notes.append(("good", passed))
    elif "val_bpb" in run.summary and not probes:
        notes.append(("open", "no probe was logged"))
    notes += [("plain", text) for text in against_targets(run)]
    last = run.events[-1] if run.events else {}
    if "val_bpb" not in run.summary and "time" in last:
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last["time"]))
        notes.append(("plain", f"last sign of life at {moment}"))
    if count := len(run.of("warning")):
        notes.append(("open", f"{count} warning{'s' if count > 1 else ''}, see below"))
    return notes


def bytes_meter(run: RunFiles) -> list[Meter]:
    """Artifact and script against the limit."""
    summary = run.summary
    if "total_bytes" not in summary:
        return []
    parts = [Segment("artifact", summary["artifact_bytes"], KINDS["attention"]),
             Segment("script", summary["code_bytes"], KINDS["script"])]
    of = f"of {ARTIFACT_LIMIT:,}"
    return [Meter("bytes", f"{summary['total_bytes']:,}", parts, ARTIFACT_LIMIT, of)]


def segments_of(run: RunFiles, clock: str) -> list[Segment]:
    """The phases of one clock that took any time, and what the clock has beyond them."""
    segments = [Segment(name, s, PHASES[name]) for name, s in phases(run)[clock] if s > 0]
    charged = run.summary.get(SECONDS.get(clock, ""), 0.0)
    rest = charged - sum(segment.amount for segment in segments)
    if rest > 0.05:
        segments.append(Segment("rest", rest, PHASES["rest"]))
    return segments


def budget_of(run: RunFiles, clock: str) -> float:
    """Seconds that a run may take on one clock; 0: as many as it likes."""
    return settings_of(run).get(BUDGETS.get(clock, "")) or 0.0


def clock_meter(run: RunFiles, clock: str) -> list[Meter]:
    """The phases on one clock against its budget."""
    segments = segments_of(run, clock)
    if not segments:
        return []
    budget = budget_of(run, clock)
    seconds = f"{sum(segment.amount for segment in segments):.1f} s"
    limit = f"of {budget:g} s" if budget else "no budget is set"
    return [Meter(clock.split()[0], seconds, segments, budget, limit)]


def card_of(page: Page, run: RunFiles) -> Card:
    """The verdict over a run."""
    word, look = verdict(run)
    name = run.name + (f", seed {run.seed}" if "seed" in run.summary else "")
    meters = [
        *bytes_meter(run),
        *clock_meter(run, CLOCKS[0]),
        *clock_meter(run, CLOCKS[1]),
    ]
    figure, caption = figure_of(run)
    colour = page.colour[id(run)] if page.many else ""
    return Card(word, look, name, colour, figure, caption, meters, notes_of(run), page.key[id(run)])


# --- curves over steps and seconds


def clock_of(run: RunFiles) -> Callable[[int], float]:
    """The training second at a step: straight lines between those that were logged."""
    known = {0: 0.0}
    for event in run.of("train"):
        if is_number(event.get("elapsed")):
            known[event["step"]] = event["elapsed"]
    end = run.last("train_end")
    if end.get("steps"):
        known[end["steps"]] = end["seconds"]
    steps = sorted(known)

    def second_at(step: int) -> float:
        i = min(max(bisect.bisect_left(steps, step), 1), len(steps) - 1)
        if not i:
            return 0.0
        left, right = steps[i - 1], steps[i]
        pace = (known[right] - known[left]) / (right - left)
        return short(known[left] + (step - left) * pace)

    return second_at


def losses_of(run: RunFiles) -> tuple[list[int], list[float]]:
    """(steps, losses) of every step; of the logged ones, where a script logged no more."""
    found = run.losses() or dict(zip(*series(run.of("train"), "loss")))
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS: each is the mean of as many steps, at the last of them."""
    size = -(-len(steps) // MOST_POINTS)
    if size <= 1:
        return steps, values
    begins = range(0, len(steps), size)
    ends = [min(begin + size, len(steps)) for begin in begins]
    means = [short(statistics.fmean(values[b:e])) for b, e in zip(begins, ends)]
    return [steps[end - 1] for end in ends], means


def smoothed(values: list[float]) -> list[float]:
    """Means over a twelfth of the curve around every point, less near its ends."""
    out = []
    for i in range(len(values)):
        reach = min(len(values) // 24, i, len(values) - 1 - i)
        out.append(short(statistics.fmean(values[i - reach : i + reach + 1])))
    return out


def loop_start(run: RunFiles) -> int:
    """The first logged step with the loop's extra passes; 0: none, or all."""
    logged = [*run.of("train"), *run.of("step_time")]
    start = min((e["step"] for e in logged if e.get("looping")), default=0)
    return start if start > 1 else 0


def loss_curves(page: Page, run: RunFiles) -> list[dict]:
    """The loss of every step, faint; its running mean; a mark where the loop begins."""
    steps, losses = thinned(*losses_of(run))
    if not steps:
        return []
    shown = "%{y:.4f} nats"
    if len(steps) < 24:
        return [page.over_steps(run, steps, losses, shown)]
    raw = page.over_steps(
        run, steps, losses, shown, mode="lines", opacity=0.35, line={"width": 1}, showlegend=False)
    mean = smoothed(losses)
    traces = [raw, page.over_steps(run, steps, mean, shown + ", running mean", mode="lines")]
    if start := loop_start(run):
        at = min(bisect.bisect_left(steps, start), len(steps) - 1)
        mark = {"size": 11, "symbol": "diamond", "line": {"width": 1.5, "color": "#ffffff"}}
        traces.append(page.over_steps(
            run, [steps[at]], [mean[at]], "the loop's extra passes begin", mode="markers",
            marker={**mark, "color": page.colour[id(run)]}, showlegend=False))
    return traces


def validation_points(run: RunFiles) -> tuple[list[int], list[float]]:
    """(steps, BPB) of the untrained model, in training, and of the averaged weights."""
    points = {}
    if "untrained_val_bpb" in run.summary:
        points[0] = run.summary["untrained_val_bpb"]
    points.update(zip(*series(run.of("validation"), "val_bpb")))
    if "prequant_val_bpb" in run.summary:  # what counts in the end
        points[run.summary.get("steps", 0)] = run.summary["prequant_val_bpb"]
    steps = sorted(points)
    return steps, [short(points[step]) for step in steps]


def padded(low: float, high: float) -> list[float]:
    """The range of an axis with some room at both ends."""
    room = 0.06 * (high - low) or 0.01 * abs(high)
    return [short(low - room), short(high + room)]


def after_the_start(traces: list[dict]) -> dict:
    """The range of y without the steep first tenth of many steps; empty for few."""
    points = [(x, y) for trace in traces for x, y in zip(trace["x"], trace["y"])]
    last = max((x for x, _ in points), default=0)
    later = [y for x, y in points if x >= last / 10]
    if last < LONG_RUN or not later:
        return {}
    return {"range": padded(min(later), max(later))}


def target_lines(page: Page, ends: tuple, upright: bool = False) -> list[dict]:
    """Dashed lines at published results, from one end to the other."""
    lines = []
    for name, value in targets(page.runs).items():
        label, colour = TARGETS[name]
        across, along = [value, value], list(ends)
        x, y = (across, along) if upright else (along, across)
        lines.append({
            "type": "scatter",
            "x": x,
            "y": y,
            "mode": "lines",
            "name": label,
            "line": {"color": colour, "width": 1.5, "dash": "dash"},
            "hovertemplate": f"{label}: {value:.5f} BPB<extra></extra>",
        })
    return lines


def target_keys(page: Page) -> list[Key]:
    """The legend of those lines."""
    return [Key(f"{TARGETS[name][0]}: {value:.5f}", TARGETS[name][1], "dash line")
            for name, value in targets(page.runs).items()]


def validation_curves(page: Page) -> list[dict]:
    """Validation of every run, and the published results."""
    traces = []
    last = 0
    for run in page.runs:
        steps, values = validation_points(run)
        if steps:
            traces.append(page.over_steps(
                run, steps, values, "%{y:.5f} BPB", mode="lines+markers", marker={"size": 7}))
            last = max(last, steps[-1])
    if traces:
        longest = max(trace["meta"]["seconds"][-1] for trace in traces)
        for line in target_lines(page, (0, last)):
            traces.append({**line, "meta": {"seconds": [0, longest]}})
    return traces


def stepped_panel(key: str, title: str, traces: list[dict], **y) -> list[Panel]:
    """A panel over steps; none without a curve."""
    if not any(trace["x"] for trace in traces):
        return []
    return [plot(key, title, traces, x={"title": "step", "rangemode": "tozero"}, y=y, switch=True)]


def curves(page: Page) -> list[Panel]:
    """Training loss and validation BPB."""
    losses = [trace for run in page.runs for trace in loss_curves(page, run)]
    scored = validation_curves(page)
    return [
        *stepped_panel("loss", "training loss, nats per token", losses, **after_the_start(losses)),
        *stepped_panel("validation", "validation, bits per byte", scored, **after_the_start(scored)),
    ]


def pace(page: Page) -> list[Panel]:
    """Learning rate, step time and the gradient's norm."""
    drawn = (
        ("lr", "learning rate, share of the peak", "%{y:.3f}", {}),
        ("ms", "ms per step since the line before", "%{y:.1f} ms", {}),
        ("norm", "norm of the gradient before clipping", "%{y:.3f}", {}),
    )
    panels = []
    for key, title, shown, line in drawn:
        traces = []
        for run in page.runs:
            steps, values = series(run.of("train"), key)
            traces.append(page.over_steps(run, steps, values, shown, line=line))
        panels += stepped_panel(key, title, traces, rangemode="tozero")
    return panels


# --- scores by stage


def scores(page: Page) -> list[Panel]:
    """BPB after each stage."""
    labels = [label for label, _ in STAGES]
    traces = []
    for run in page.runs:
        scored = {label: run.summary[key] for label, key in STAGES if key in run.summary}
        if not scored:
            continue
        values = list(scored.values())
        traces.append(page.curve(
            run,
            values,
            list(scored),
            mode="lines+markers" if page.many else "lines+markers+text",
            marker={"size": 10},
            text=[f"{value:.4f}" for value in values],
            textposition="top center",
            cliponaxis=False,
            line={"width": 1.5},
            hovertemplate=f"%{{y}}: %{{x:.5f}} BPB<extra>{escaped(run.name)}</extra>",
        ))
    if not traces:
        return []
    traces += target_lines(page, (labels[0], labels[-1]), upright=True)
    drawn = [value for trace in traces for value in trace["x"]]
    x = {"title": "bits per byte (lower is better)", "range": padded(min(drawn), max(drawn))}
    y = {"categoryorder": "array", "categoryarray": labels[::-1]}
    margin = {"l": 46, "r": 34, "t": 16, "b": 40}
    return [plot("stages", "", traces, 210 + 6 * len(page.runs), x, y, margin=margin)]


# --- bars of time


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


def timeline(page: Page) -> list[Group]:
    """Per clock a bar of phases for every run, against the budget."""
    groups = []
    for clock in CLOCKS:
        meters = []
        for run in page.runs:
            if parts := segments_of(run, clock):
                meters.append(bar_of(page, run, run.name, parts, "s", budget_of(run, clock)))
        groups.append(Group(clock, meters))
    return groups


def bar_of(page: Page, run: RunFiles, label: str, parts: list[Segment], unit: str,
           limit: float = 0.0) -> Meter:
    """A bar whose parts are listed in its text."""
    text = f"{sum(part.amount for part in parts):,.1f} {unit}"
    amounts = " + ".join(part.shown for part in parts)
    return Meter(label, text, parts, limit, f"= {amounts}", page.key[id(run)])


def colours_of_parts(page: Page) -> dict[str, str]:
    """The parts of a timed step, by colour."""
    timed = [e for run in page.runs for e in run.of("step_time")]
    return dict(zip(dict.fromkeys(name for e in timed for name in e["parts"]), itertools.cycle(PARTS)))


def step_parts(page: Page) -> list[Group]:
    """Where a step's time goes, per run, from the event step_time."""
    colours = colours_of_parts(page)
    groups = []
    for run in page.runs:
        meters = []
        for event in run.of("step_time"):
            label = f"step {event['step']:,}{', looping' if event.get('looping') else ''}"
            parts = [Segment(name, ms, colours[name]) for name, ms in event["parts"].items()]
            meters.append(bar_of(page, run, label, parts, "ms"))
        groups.append(Group(run.name if page.many else "", meters, page.key[id(run)]))
    return groups


def keys_of(colours: dict[str, str], groups: list[Group]) -> list[Key]:
    """A legend of what the bars have."""
    meters = [meter for group in groups for meter in group.meters]
    there = {part.name for meter in meters for part in meter.segments}
    return [Key(name, colour) for name, colour in colours.items() if name in there]


# --- bytes and rounding error


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


def treemap(page: Page, tensors: dict) -> list[Panel]:
    """Per run, bytes of its artifact by tensor, and of the script."""
    return [
        treemap_of(page, run, boxes_of(run, tensors[run.folder]))
        for run in page.runs if tensors.get(run.folder)
    ]


def treemap_of(page: Page, run: RunFiles, boxes: list[Box]) -> Panel:
    """One run's treemap."""
    sums = dict.fromkeys(sorted({box.kind for box in boxes}), 0)
    for box in boxes:
        sums[box.kind] += box.amount
    kinds = list(sums)
    colours = [KINDS[kind] for kind in [*kinds, *(box.kind for box in boxes)]]
    shown = "%{label}<br>%{value:,.0f} B"
    trace = {
        "type": "treemap",
        "ids": ["all", *kinds, *(f"{box.kind}/{box.name}" for box in boxes)],
        "labels": ["artifact and script", *kinds, *(box.name for box in boxes)],
        "parents": ["", *["all"] * len(kinds), *(box.kind for box in boxes)],
        "values": [sum(sums.values()), *sums.values(), *(box.amount for box in boxes)],
        "customdata": ["", *[""] * len(kinds), *(box.how for box in boxes)],
        "branchvalues": "total",
        "texttemplate": shown,
        "hovertemplate": shown + ", %{percentRoot:.1%}<br>%{customdata}<extra></extra>",
        "textfont": {"size": 12, "color": ["#7a8699", *["#ffffff"] * len(colours)]},
        "marker": {"colors": ["rgba(127,127,127,0.15)", *colours], "line": {"width": 1, "color": "#c9d3e0"}},
        "root": {"color": "rgba(0,0,0,0)"},
        "tiling": {"pad": 2},
        "pathbar": {"visible": False},
    }
    total = f"{sum(sums.values()):,} bytes"
    title = f"{run.name}: {total}" if page.many else total
    margin = {"l": 0, "r": 0, "t": 0, "b": 0}
    key = f"bytes-{page.key[id(run)]}"
    return plot(key, title, [trace], 420, margin=margin, run=page.key[id(run)])


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


def rounding(page: Page, tensors: dict) -> list[Panel]:
    """Relative rounding error of every quantised matrix, by layer: a panel per kind."""
    matrices = {id(r): errors_by_layer(tensors.get(r.folder) or []) for r in page.runs}
    kinds = sorted(set().union(*matrices.values()))
    top = max((e for of in matrices.values() for rows in of.values() for _, e, _ in rows), default=1)
    panels = []
    for kind in kinds:
        traces = []
        for run in page.runs:
            points = sorted(matrices[id(run)].get(kind, ()))
            ways = [how for _, _, how in points]
            marks = ["diamond" if "lqer" in how else "circle" for how in ways]
            traces.append(page.curve(
                run,
                [layer for layer, _, _ in points],
                [short(error) for _, error, _ in points],
                text=ways,
                mode="lines+markers",
                marker={"size": 7, "symbol": marks},
                hovertemplate="layer %{x}: %{y:.2f} %<br>%{text}"
                              f"<extra>{escaped(run.name)}</extra>",
            ))
        whole_layers = {"title": "layer", "dtick": 1} if len(traces[0]["x"]) < 16 else {"title": "layer"}
        y = {"range": [0, 1.1 * top], "ticksuffix": " %"}
        panels.append(plot(f"rounding-{kind}", kind, traces, 190, whole_layers, y))
    return panels


# --- the score by document


def profile_curve(page: Page, run: RunFiles, event: dict) -> dict:
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
        values.append(short(event["nats"][i] / math.log(2) / size))
        counts.append([event["tokens"][i], event["documents"][i]])
    stage, colour, dash = PROFILED[event["stage"]]
    line = {"dash": dash} if page.many else {"dash": dash, "color": colour}
    hover = "%{y:.4f} BPB<br>%{customdata[0]:,} tokens, %{customdata[1]:,} documents"
    return page.curve(
        run,
        labels,
        values,
        name=f"{run.name}, {stage}" if page.many else stage,
        line=line,
        customdata=counts,
        hovertemplate=f"{hover}<extra>{stage}</extra>",
    )


def profiles(page: Page) -> list[Panel]:
    """BPB by document length and by position in the document, per scoring stage."""
    titles = {
        "length": "by length of the document, tokens",
        "position": "by position in the document, tokens",
    }
    panels = []
    for side, title in titles.items():
        traces = []
        for run in page.runs:
            latest = {e["stage"]: e for e in run.of("profile") if e["by"] == side}
            traces += [profile_curve(page, run, event) for event in latest.values()]
        if traces:
            x = {"type": "category", "tickfont": {"size": 10}}
            y = {"title": "bits per byte"}
            panels.append(plot(f"profile-{side}", title, traces, 300, x, y))
    return panels


def profile_keys(page: Page) -> list[Key]:
    """Stages by colour; with many runs these have the colours, and stages are dashed."""
    there = {e["stage"] for run in page.runs for e in run.of("profile")}
    return [
        Key(name, "#7a8699" if page.many else colour, f"{dash} line")
        for stage, (name, colour, dash) in PROFILED.items() if stage in there
    ]


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


def without_low_bits(tg, codes) -> tuple:
    """What is coded of a code matrix (R, C), and the bytes of it that are stored as they
    are: low bits of wide rows, which scripts before artifact version 5 did not have."""
    if not hasattr(tg, "low_bits"):
        return codes, 0.0
    low = tg.low_bits(codes)
    return codes >> low[:, None], float(low.sum()) * codes.shape[1] / 8


def stream_shares(tg, s, q) -> dict[str, dict[str, float]]:
    """Per coded stream of a quantised model: what each tensor puts into it, uncoded."""
    shares: dict[str, dict[str, float]] = {}
    low_bits: dict[str, float] = {}
    for stream, shapes in tg.stored_tensors(s, q.forms).items():
        parts = shares.setdefault(stream, {})
        for key in shapes:
            owners = [name for name in q.forms if key == name or key.startswith(name + ".")]
            owner = max(owners, key=len)
            array = q.tensors[key].numpy()
            amount = array.nbytes
            if stream == tg.CODE_STREAM:
                array, low = without_low_bits(tg, array)
                if low:
                    low_bits[owner] = low_bits.get(owner, 0.0) + low
                amount = entropy_bytes(array)
            parts[owner] = parts.get(owner, 0.0) + amount
    if low_bits:
        shares[tg.LOW_STREAM] = low_bits
    return shares


def rounding_errors(tg, s, run: RunFiles, q) -> dict[str, float]:
    """‖W - Ŵ‖ / ‖W‖ per tensor, when the averaged weights lie beside the artifact."""
    path = run.folder / "final_model.pt"
    if not path.is_file():
        return {}

    class Blank(tg.GPT):
        """A model that is not initialised: all of its weights are read."""

        def init_weights(self, generator):
            pass

    model = Blank(s)
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


# --- tables


def run_row(page: Page, run: RunFiles, columns: list) -> list[Cell]:
    """A run's row of the table."""
    state = f"seed {run.seed}" if "val_bpb" in run.summary else "unfinished"
    cells = [Cell(f"{run.name} ({state})", page.colour[id(run)] if page.many else "")]
    for key, _, form in columns:
        value = format(run.summary[key], form) if key in run.summary else "–"
        cells.append(Cell(value, marks={"run": run.name, "key": key}))
    return cells


def mean_row(runs: list[RunFiles], columns: list) -> list[Cell]:
    """The row of means; whole numbers are rounded."""
    cells = [Cell("mean")]
    for key, _, form in columns:
        mean = statistics.fmean(summary_values(runs, key))
        cells.append(Cell(format(round(mean) if form == ",d" else mean, form)))
    return cells


def summary_table(page: Page) -> Table | None:
    """Every run's figures, equal to summary.json."""
    columns = [row for row in TABLE if summary_values(page.runs, row[0])]
    rows = [run_row(page, run, columns) for run in page.runs]
    if page.many and columns:
        rows.append(mean_row(page.runs, columns))
    return Table(["run", *(label for _, label, _ in columns)], rows, mean=page.many)


def differing_settings(runs: list[RunFiles]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs: name -> a value per run."""
    told = [as_environment(settings_of(run)) for run in runs]
    names = sorted({name for settings in told for name in settings} - set(OF_A_PLACE))
    out = {}
    for name in names:
        values = [settings.get(name, "–") for settings in told]
        known = [value for value, settings in zip(values, told) if settings]
        if not all(same(known[0], value) for value in known[1:]):
            out[name] = values
    return out


def settings_table(page: Page) -> Table | None:
    """A row per setting that differs, a column per run."""
    rows = []
    for name, values in differing_settings(page.runs).items():
        marks = [{"setting": name, "run": run.name} for run in page.runs]
        rows.append([Cell(name), *(Cell(v or "(empty)", marks=m) for v, m in zip(values, marks))])
    return Table(["setting", *(run.name for run in page.runs)], rows) if rows else None


def detail_lines(run: RunFiles) -> list[str]:
    """A run's machine, changed settings, checks and warnings."""
    left_out = ("event", "time", "run_id", *OWN_TO_EACH_RUN)
    lines = []
    for values in (run.last("start"), run.last("changed_settings")):
        pairs = [f"{k}={v}" for k, v in values.items() if k not in left_out]
        lines.append(" ".join(pairs))
    lines += [f"{e['what']}: {e['detail']}" for e in run.of("check") if e["what"] != "folder"]
    lines += [f"probe {name}: {found['figure']}" for name, found in probes_of(run).items()]
    lines += [f"WARNING {e.get('text', '')}" for e in run.of("warning")]
    lines += [f"NON-COMPLIANT: {e.get('reason', '')}" for e in run.of("NON-COMPLIANT")]
    return [line for line in lines if line]


def details(page: Page) -> Folded:
    """Settings that differ from the defaults, checks, probes and warnings, folded away."""
    warnings = sum(len(run.of("warning")) for run in page.runs)
    title = "machine, settings, checks, probes"
    if warnings:
        title += f" and {warnings} warning(s)"
    return Folded(title, [(run.name, "\n".join(detail_lines(run))) for run in page.runs])


# --- the page


def sections(page: Page) -> list[Section]:
    """The page in reading order."""
    tensors = all_tensors(page.runs)
    return [*tables(page), *course(page), *bars(page), *insides(page, tensors)]


def tables(page: Page) -> list[Section]:
    """The runs, and their settings where these may differ."""
    runs = Section("runs", "Runs", "", "", table=summary_table(page), folded=details(page))
    settings = Section(
        "settings", "Settings that differ",
        "Between the runs; those that only name a place or the run are left out.",
        "none", table=settings_table(page))
    return [runs, settings] if page.many else [runs]


def course(page: Page) -> list[Section]:
    """Scores and curves."""
    other_text = "" if targets(page.runs) else " Published results are of another text: no lines."
    return [
        Section(
            "scores", "Score by stage",
            "What quantising, windows and test-time training did to the score." + other_text,
            "no run was scored", legend=target_keys(page), panels=scores(page)),
        Section(
            "curves", "Learning curves",
            "The loss of every step, faint, and its running mean; a diamond where the loop's "
            "extra passes begin. The last validation is of the averaged weights. A double click "
            "shows a long run's first tenth, too.",
            "no progress lines", legend=target_keys(page), panels=curves(page)),
        Section(
            "pace", "Learning rate and pace",
            "Step time from line to line, not the running mean: drift shows.",
            "no progress lines", panels=pace(page)),
    ]


def bars(page: Page) -> list[Section]:
    """Where the time went."""
    times, parts = timeline(page), step_parts(page)
    return [
        Section(
            "step_time", "Where a step's time goes",
            "Steps early, halfway and late, timed part by part, "
            "waiting for the device after each part.",
            "no step_time events", legend=keys_of(colours_of_parts(page), parts), groups=parts),
        Section(
            "timeline", "Budgets",
            "Seconds by phase; a red line is the budget. "
            "What is outside the clocks is not charged.",
            "no phase was logged", legend=keys_of(PHASES, times), groups=times),
    ]


def insides(page: Page, tensors: dict) -> list[Section]:
    """What the artifact holds, and which text it predicts well."""
    return [
        Section(
            "treemap", "Bytes by tensor",
            "Click to zoom. Tensors share coded streams: "
            "each has its share of the stream's real length.",
            "the artifact is not there",
            legend=[Key(*kind) for kind in KINDS.items()], panels=treemap(page, tensors)),
        Section(
            "rounding", "Rounding error by layer",
            "‖W − Ŵ‖ / ‖W‖ of every matrix that GPTQ rounded; "
            "diamonds have a low-rank repair. Left out after pre-quantisation TTT: "
            "the saved weights are those before it.",
            "no matrix was rounded, or artifact and weights are not both there",
            panels=rounding(page, tensors)),
        Section(
            "profiles", "Score by document length and by position",
            "With and without test-time training; "
            "in italics the share of the text's bytes.",
            "no profile events", legend=profile_keys(page), panels=profiles(page)),
    ]


def machine_text(page: Page) -> str:
    """The line under the title: runs, their mean, machine, model."""
    first = page.runs[0].last("start")
    count = f"{len(page.runs)} run{'s' if page.many else ''}"
    words = [f"{count} on {first.get('world_size', '?')} × {first.get('device', 'unknown device')}"]
    if "parameters" in first:
        words.append(f"{first['parameters']:,} parameters")
    words += [f"{key} {first[key]}" for key in ("attention", "torch") if key in first]
    scored = summary_values(page.runs, "val_bpb")
    if len(scored) > 1:
        mean, spread = statistics.fmean(scored), statistics.stdev(scored)
        words.append(f"{len(scored)} scored {mean:.4f} ± {spread:.4f} BPB")
    return ", ".join(words)


def write_pngs(parts: list[Section], folder: Path) -> list[Path]:
    """One PNG per plot."""
    panels = [panel for part in parts for panel in part.panels]
    return [write_atomic(folder / f"report_{p.key}.png", picture(p)) for p in panels]


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
    add("--png", action="store_true", help="also write one PNG per plot beside it")
    args = parser.parse_args(arguments)
    most = len(RUN_COLOURS)
    if len(args.runs) > most:
        raise ToolError(f"{len(args.runs)} runs are too many to tell apart: "
                        f"give at most {most}")
    runs = [load_run(folder, finished=False) for folder in args.runs]
    page = Page(runs)
    parts = sections(page)
    cards = [card_of(page, run) for run in runs]
    keys = [(page.key[id(run)], Key(run.name, page.colour[id(run)], "disc")) for run in runs]
    title = args.title or shared_title(runs)
    text = render(title, machine_text(page), cards, parts, keys if page.many else ())
    out = Path(args.out) if args.out else runs[0].folder / "report.html"
    made = [write_atomic(out, text)]
    if args.png:
        made += write_pngs(parts, out.parent)
    said = f"made {', '.join(map(relative, made))}"
    if missing := not_shown(parts):
        said += f"; not shown: {', '.join(missing)}"
    print(said)
    return 0


if __name__ == "__main__":
    run_cli(main)
