"""What differs between two runs or two configurations: settings, script, data, machine, scores.

    python tools/diff.py runs/old runs/new
    python tools/diff.py configs/pr1855.env configs/pr2135.env
    python tools/diff.py configs/best.env runs/mine
    python tools/diff.py records/TRACK/FOLDER/summary_seed42.json runs/mine

A and B are folders of runs (finished or not), summaries (.json), or configurations
(.env, completed by the script's defaults). Only what differs is shown. Exit status, as
of diff: 0 when nothing differs, 1 when something does, 2 on a mistake.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    STAGES,
    ToolError,
    as_environment,
    command_line,
    json_object,
    load_run,
    relative,
    run_cli,
    table,
)

OF_A_PLACE = ("RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY_PATH",
              "EVAL_ONLY_QUANTIZED_PATH", "RESUME")  # tell of a machine or a run's course
FACTS = (  # a row's name, and its key in summary.json
    ("data fingerprint", "data_fingerprint"),
    ("hardware", "device"),
    ("processes", "world_size"),
    ("torch", "torch"),
    ("script's form", "code_form"),
    ("compliant", "compliant"),
)
FIGURES = (
    *((f"BPB, {label}", key) for label, key in STAGES),
    ("nats per token", "val_loss"),
    ("steps", "steps"),
    ("ms per step", "step_ms"),
    ("training seconds", "train_seconds"),
    ("evaluation seconds", "eval_seconds"),
    ("artifact bytes", "artifact_bytes"),
    ("script bytes", "code_bytes"),
    ("tokens scored", "tokens_scored"),
    ("bytes scored", "bytes_scored"),
)
LONGEST = 44  # characters of a cell


@dataclass(frozen=True)
class Side:
    """One of the two: its settings as text, and what else is known."""

    name: str
    settings: dict[str, str]
    facts: dict[str, str]
    figures: dict[str, float]


def read_side(word: str) -> Side:
    """A run's folder, a summary, or a configuration."""
    path = Path(word)
    if path.suffix in (".env", ".json") and not path.is_file():
        raise ToolError(f"{word} does not exist: give a run's folder, a summary, or a configuration")
    if path.is_dir():
        run = load_run(path, finished=False)
        if not run.summary:
            raise ToolError(f"{relative(path)} has no summary.json: that run has not scored anything yet")
        return side_of(relative(path), run.summary, run.last("code").get("sha256", ""))
    if path.suffix == ".env":
        return Side(relative(path), configured(path), {}, {})
    if path.suffix == ".json":
        summary = json_object(path.read_bytes())
        if not summary or not isinstance(summary.get("settings"), dict):
            raise ToolError(f"{relative(path)} is no summary of a run: give one that has settings")
        return side_of(relative(path), summary, "")
    raise ToolError(f"{word} is no folder, no .env and no .json: give a run's folder, such as runs/NAME, "
                    "or a configuration, such as configs/best.env")


def side_of(name: str, summary: dict, script: str) -> Side:
    """A side from a run's summary. script: the SHA-256 in its log, where that was read."""
    facts = {"script sha256": (script or summary.get("code_sha256") or "")[:16]}
    for label, key in FACTS:
        facts[label] = as_text(summary.get(key))
    given = summary.get("settings")
    settings = as_environment(given if isinstance(given, dict) else {})
    numbers = {label: summary.get(key) for label, key in FIGURES}
    figures = {label: value for label, value in numbers.items() if isinstance(value, (int, float))}
    return Side(name, settings, facts, figures)


def configured(path: Path) -> dict[str, str]:
    """A configuration's settings with the script's defaults, as text."""
    given = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quote that is not closed
            words = ["?"]
        if not words:
            continue
        name, equals, value = words[-1].partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ToolError(f"line {number} of {relative(path)} is no NAME=VALUE: {line.strip()[:60]}; "
                            "correct it")
        given[name] = value
    from tools import doctor  # it can import the script

    trainer = doctor.trainer()
    try:
        return as_environment(trainer.Settings.from_env(given).as_env())
    except trainer.UserError as error:
        raise ToolError(f"{relative(path)}: {error}") from None


def as_text(value) -> str:
    """A value of a summary, as it is shown."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def same(a: str, b: str) -> bool:
    """Equal as text, or as numbers."""
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False


def shortened(text: str) -> str:
    """A cell, not too long."""
    return text if len(text) <= LONGEST else text[: LONGEST - 2] + " …"


def ending(name: str) -> str:
    """A path, its beginning left out where it is long."""
    return name if len(name) <= LONGEST else "…" + name[2 - LONGEST :]


def differing(a: dict[str, str], b: dict[str, str]) -> list[list[str]]:
    """Rows of what differs; what a side does not know is shown as -."""
    rows = []
    for name in [*a, *(name for name in b if name not in a)]:
        left, right = a.get(name) or "-", b.get(name) or "-"
        if not same(left, right):
            rows.append([name, shortened(left), shortened(right), ""])
    return rows


def figure_rows(a: Side, b: Side) -> list[list[str]]:
    """Rows of figures that differ, with B - A where both know them."""
    rows = []
    for label, _ in FIGURES:
        left, right = a.figures.get(label), b.figures.get(label)
        if left == right:
            continue
        known = left is not None and right is not None
        rows.append([label, number(left), number(right), f"{right - left:+.6g}" if known else ""])
    return rows


def number(value: float | None) -> str:
    """A figure: whole ones in full, others to six places."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6f}"


def rows_of(a: Side, b: Side) -> list[list[str]]:
    """All that differs: settings first, then facts and figures, where both are runs."""
    settings = [{k: v for k, v in side.settings.items() if k not in OF_A_PLACE} for side in (a, b)]
    rows = sorted(differing(*settings))
    if a.facts and b.facts:
        rows += differing(a.facts, b.facts) + figure_rows(a, b)
    return rows


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("a", metavar="A", help="a run's folder, a summary, or a configuration")
    parser.add_argument("b", metavar="B", help="the other one")
    args = parser.parse_args(arguments)
    a, b = read_side(args.a), read_side(args.b)
    rows = rows_of(a, b)
    if not rows:
        print("nothing differs")
        return 0
    heads = [f"A: {ending(a.name)}", f"B: {ending(b.name)}"]
    print(table(["what differs", *heads, "B - A"], rows))
    return 1


if __name__ == "__main__":
    run_cli(main)
