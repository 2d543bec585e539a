"""Forms of test-time training side by side: one model, one set of documents, differences.

    python tools/adapt.py runs/demo/final_model.int6.ptz --out runs/adapt \\
        'none: TTT_LORA_LR=0' 'fast: TTT_LORA_LR=1e-3' 'exact: TTT_KV_REUSE=0' \\
        'suffix: TTT_SUFFIX=24 TTT_STEP_SHARE=0.2'

Settings are the environment's, each row changes some of them; TTT_ENABLED=0 is a row of
sliding windows at EVAL_STRIDE. Documents come from the validation shards of DATA_PATH:
to choose a learning rate, point it at held-out training documents. Differences are
against the first row and against --reference, in nats per token, with standard errors
over documents; the two halves are the even and the odd documents, so that what is
chosen on one can be reported on the other. Rows already in the --out folder are read,
not run again, where artifact, settings and documents are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import ToolError, command_line, need, run_cli, table

LENGTHS = (0, 128, 256, 512, 1024, 2048, 10**9)
POSITIONS = (0, 48, 144, 336, 720, 1440, 10**9)


class Row(NamedTuple):
    """One form: its losses (targets,) in stream order, and the processor seconds it took."""

    name: str
    losses: np.ndarray
    seconds: float


def identity(s, artifact: Path, keep: tuple[int, int, int]) -> str:
    """What a row's losses depend on, in short: artifact, settings, choice of documents."""
    choices = repr((s, keep)).encode()
    return hashlib.sha256(artifact.read_bytes() + choices).hexdigest()


def measure(tg, s, artifact: Path, keep: tuple[int, int, int]) -> tuple[Row, np.ndarray]:
    """The row of settings s, and the documents' lengths.

    keep: how many documents, from the start, of how many tokens at least and at most.
    """
    world = tg.World.join({})
    tg.set_up(s, world)
    model = tg.build_model(s, world)
    val = tg.Validation(s)
    tg.open_artifact(s, world, model, artifact)
    documents = val.documents
    count, low, high = keep
    fits = (documents.length >= low) & (documents.length <= high)
    chosen = np.flatnonzero(fits)[:count]
    if len(chosen) < 2:
        raise ToolError(f"{len(chosen)} documents have {low} to {high} tokens: "
                        "raise --max-tokens")
    documents.start = documents.start[chosen]
    documents.length = documents.length[chosen]
    begin = time.process_time()
    count = tg.Hints.for_adapting if s.ttt_enabled else tg.Hints.for_windows
    val.hints = count(s, world, val)
    if s.ttt_enabled:
        books = tg.PhasedTTT(s, world, model, val)
        books.run()
    else:
        books = tg.Scorer(s, world, model)
        books.windows(val, s.eval_stride)
    seconds = time.process_time() - begin
    losses = books.ledger.loss.cpu().numpy()[books.ledger.expected]
    return Row("", losses, seconds), documents.length - 1


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where documents of these lengths begin in the stream of their targets."""
    return np.cumsum(lengths) - lengths


def paired(difference: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Mean per token of a difference (targets,); its standard error over documents."""
    sums = np.add.reduceat(difference, starts_of(lengths))
    targets, documents = lengths.sum(), len(lengths)
    mean = sums.sum() / targets
    spread = np.square(sums - mean * lengths).sum() * documents / max(documents - 1, 1)
    return mean, float(np.sqrt(spread)) / targets


def paired_text(row: Row, other: Row, lengths: np.ndarray, pick: np.ndarray) -> str:
    """Paired difference of two rows over the picked targets (bool): mean ± error."""
    inside = np.add.reduceat(pick.astype(int), starts_of(lengths))
    difference = (row.losses - other.losses)[pick]
    mean, error = paired(difference, inside[inside > 0])
    return f"{mean:+.4f} ± {error:.4f}"


def whole_table(rows: list[Row], lengths: np.ndarray, reference: Row) -> str:
    """All targets, and those of the even and of the odd documents."""
    first = rows[0]
    targets = lengths.sum()
    document = np.repeat(np.arange(len(lengths)), lengths)
    every = np.ones(targets, bool)
    even = document % 2 == 0
    odd = ~even
    head = ["row", "loss", f"against {first.name}", "even half", "odd half"]
    head += [f"against {reference.name}", "odd half", "CPU s", "targets/s"]
    cells = []
    for row in rows:
        against_first = [paired_text(row, first, lengths, pick) for pick in (every, even, odd)]
        against_other = [paired_text(row, reference, lengths, pick) for pick in (every, odd)]
        cells.append([
            row.name,
            f"{row.losses.mean():.4f}",
            *against_first,
            *against_other,
            f"{row.seconds:.0f}",
            f"{targets / row.seconds:.0f}",
        ])
    return table(head, cells, markdown=True)


def curve_table(
    what: str, of: np.ndarray, bounds: tuple, rows: list[Row], lengths: np.ndarray
) -> str:
    """Gains over the first row where a figure `of` each target lies within two bounds."""
    first, others = rows[0], rows[1:]
    document = np.repeat(np.arange(len(lengths)), lengths)
    cells = []
    for low, high in itertools.pairwise(bounds):
        pick = (of >= low) & (of < high)
        if not pick.any():
            continue
        span = f"{low}-" if high == bounds[-1] else f"{low}-{high}"
        count = len(np.unique(document[pick]))
        gains = [paired_text(row, first, lengths, pick) for row in others]
        cells.append([span, count, *gains])
    return table([what, "documents", *(r.name for r in others)], cells, markdown=True)


def report(rows: list[Row], lengths: np.ndarray, reference: Row) -> str:
    """Three tables: the whole with its halves, by document length, by position in it."""
    length = np.repeat(lengths, lengths)
    position = np.arange(lengths.sum()) - np.repeat(starts_of(lengths), lengths)
    parts = [
        f"{len(lengths)} documents, {lengths.sum():,} targets",
        whole_table(rows, lengths, reference),
        curve_table("length", length, LENGTHS, rows, lengths),
        curve_table("position", position, POSITIONS, rows, lengths),
    ]
    return "\n\n".join(parts)


def kept_row(tg, text: str, args: argparse.Namespace) -> tuple[Row, np.ndarray]:
    """A row of the command line and its documents' lengths, read back or measured."""
    name, _, settings = text.partition(":")
    path = args.out / f"{name.strip().replace(' ', '_')}.npz"
    env = dict(os.environ)
    env.update(pair.split("=", 1) for pair in settings.split())
    env["EVAL_MAX_SECONDS"] = "0"
    keep = (args.documents, args.min_tokens, args.max_tokens)
    try:
        s = tg.Settings.from_env(env)
        key = identity(s, args.artifact, keep)
        if not path.is_file() or str(np.load(path).get("key")) != key:
            row, lengths = measure(tg, s, args.artifact, keep)
            figures = {"losses": row.losses, "seconds": row.seconds, "lengths": lengths}
            np.savez(path, key=key, **figures)
    except tg.UserError as error:
        raise ToolError(f"row {name}: {error}") from None
    kept = np.load(path)
    losses = kept["losses"].astype(np.float64)
    return Row(name.strip(), losses, float(kept["seconds"])), kept["lengths"]


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("artifact", type=Path, help="a run's final_model.int6.ptz")
    add("rows", nargs="+",
        help="'name: SETTING=value …'; the first is what gains refer to")
    add("--out", type=Path, required=True, help="folder that keeps each row's losses")
    add("--documents", type=int, default=200, help="how many, from the stream's start")
    add("--min-tokens", type=int, default=2, help="shortest document")
    add("--max-tokens", type=int, default=10**9, help="longest document")
    add("--reference", help="name of the row that others are held against (the last)")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    """Entry."""
    args = parse(arguments)
    need("torch", "this tool")
    import train_gpt as tg

    rows: list[Row] = []
    lengths = None
    args.out.mkdir(parents=True, exist_ok=True)
    for text in args.rows:
        row, of_row = kept_row(tg, text, args)
        if lengths is not None and not np.array_equal(lengths, of_row):
            raise ToolError(f"row {row.name} was measured on other documents: "
                            "keep the data settings the same")
        lengths = of_row
        rows.append(row)
        figures = f"{row.losses.mean():.4f} nats, {row.seconds:.1f} CPU s"
        print(f"{row.name}: {figures}", flush=True)
    named = {row.name: row for row in rows}
    reference = args.reference or rows[-1].name
    if reference not in named:
        raise ToolError(f"--reference {reference} is none of the rows {', '.join(named)}")
    text = report(rows, lengths, named[reference])
    (args.out / "report.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
