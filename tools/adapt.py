"""Ways of test-time training side by side: the same model, the same documents, paired
differences.

    python tools/adapt.py runs/demo/final_model.int6.ptz --out runs/adapt --max-tokens 1000 \\
        'none: TTT_LORA_LR=0' 'fast: TTT_LORA_LR=1e-3' 'exact: TTT_KV_REUSE=0 TTT_LORA_LR=1e-3'

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
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script: make `tools` and `train_gpt` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import ToolError, need, run_cli, table

LENGTHS = (0, 128, 256, 512, 1024, 2048, 10**9)
POSITIONS = (0, 48, 144, 336, 720, 1440, 10**9)


class Row(NamedTuple):
    """One way: its losses (targets,) in stream order, and the processor seconds it took."""

    name: str
    losses: np.ndarray
    seconds: float


def identity(s, artifact: Path, keep: tuple[int, int, int]) -> str:
    """What a row's losses depend on, in short: artifact, settings, choice of documents."""
    return hashlib.sha256(artifact.read_bytes() + repr((s, keep)).encode()).hexdigest()


def measure(tg, s, artifact: Path, keep: tuple[int, int, int]) -> tuple[Row, np.ndarray]:
    """The row of settings s, and the documents' lengths. keep: their number, fewest and
    most tokens."""
    world = tg.World.join({})
    tg.set_up(s, world)
    model, val, (count, low, high) = tg.build_model(s, world), tg.Validation(s), keep
    tg.open_artifact(s, world, model, artifact)
    documents = val.documents
    chosen = np.flatnonzero((documents.length >= low) & (documents.length <= high))[:count]
    if len(chosen) < 2:
        raise ToolError(f"{len(chosen)} documents have {low} to {high} tokens: raise --max-tokens")
    documents.start, documents.length = documents.start[chosen], documents.length[chosen]
    begin = time.process_time()
    val.hints = tg.Hints.build(s, world, val, s.ttt_enabled)
    if s.ttt_enabled:
        books = tg.PhasedTTT(s, world, model, val)
        books.run()
    else:
        books = tg.Scorer(s, world, model)
        books.windows(val, s.eval_stride)
    seconds = time.process_time() - begin
    return Row("", books.ledger.loss.cpu().numpy()[books.ledger.expected], seconds), documents.length - 1


def paired(difference: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Mean of a difference (targets,) per token, and its standard error over documents
    of these lengths."""
    sums = np.add.reduceat(difference, np.cumsum(lengths) - lengths)
    mean, n = sums.sum() / lengths.sum(), len(lengths)
    spread = np.square(sums - mean * lengths).sum() * n / max(n - 1, 1)
    return mean, float(np.sqrt(spread)) / lengths.sum()


def shown(row: Row, other: Row, lengths: np.ndarray, pick: np.ndarray) -> str:
    """Paired difference of two rows over the picked targets (bool), as mean ± standard
    error."""
    inside = np.add.reduceat(pick.astype(int), np.cumsum(lengths) - lengths)
    mean, error = paired((row.losses - other.losses)[pick], inside[inside > 0])
    return f"{mean:+.4f} ± {error:.4f}"


def report(rows: list[Row], lengths: np.ndarray, reference: Row) -> str:
    """Three tables: the whole with its halves, by document length, by position in the
    document."""
    first, every = rows[0], np.ones(lengths.sum(), bool)
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    halves = [document % 2 == h for h in (0, 1)]
    head = ("row", "loss", f"against {first.name}", "even half", "odd half", f"against {reference.name}",
            "odd half", "CPU s", "targets/s")
    whole = table(head, [
        (r.name, f"{r.losses.mean():.4f}", *(shown(r, first, lengths, p) for p in (every, *halves)),
         *(shown(r, reference, lengths, p) for p in (every, halves[1])), f"{r.seconds:.0f}",
         f"{len(every) / r.seconds:.0f}") for r in rows], markdown=True)

    def curve(what: str, of: np.ndarray, bounds: tuple) -> str:
        spans = [(a, b, (of >= a) & (of < b)) for a, b in zip(bounds, bounds[1:])]
        spans = [(f"{a}-{b}" if b < bounds[-1] else f"{a}-", pick) for a, b, pick in spans if pick.any()]
        return table((what, "documents", *(r.name for r in rows[1:])), [
            (name, len(np.unique(document[pick])), *(shown(r, first, lengths, pick) for r in rows[1:]))
            for name, pick in spans], markdown=True)

    return "\n\n".join((f"{len(lengths)} documents, {lengths.sum():,} targets", whole,
                        curve("length", lengths[document], LENGTHS), curve("position", position, POSITIONS)))


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path, help="a run's final_model.int6.ptz")
    parser.add_argument("rows", nargs="+", help="'name: SETTING=value …'; the first is what gains refer to")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps each row's losses")
    parser.add_argument("--documents", type=int, default=200, help="how many, from the stream's start")
    parser.add_argument("--min-tokens", type=int, default=2, help="shortest document")
    parser.add_argument("--max-tokens", type=int, default=10**9, help="longest document")
    parser.add_argument("--reference", help="name of the row that the others are held against (the last)")
    args = parser.parse_args(arguments)
    need("torch", "this tool")
    import train_gpt as tg

    rows, lengths = [], None
    args.out.mkdir(parents=True, exist_ok=True)
    for text in args.rows:
        name, _, settings = text.partition(":")
        path = args.out / f"{name.strip().replace(' ', '_')}.npz"
        env = {**os.environ, **dict(pair.split("=", 1) for pair in settings.split()), "EVAL_MAX_SECONDS": "0"}
        keep = (args.documents, args.min_tokens, args.max_tokens)
        try:
            s = tg.Settings.from_env(env)
            key = identity(s, args.artifact, keep)
            if not path.is_file() or str(np.load(path).get("key")) != key:
                row, spans = measure(tg, s, args.artifact, keep)
                np.savez(path, losses=row.losses, seconds=row.seconds, lengths=spans, key=key)
        except tg.UserError as error:
            raise ToolError(f"row {name}: {error}") from None
        kept = np.load(path)
        if lengths is not None and not np.array_equal(lengths, kept["lengths"]):
            raise ToolError(f"row {name} was measured on other documents: keep the data settings the same")
        lengths = kept["lengths"]
        rows.append(Row(name.strip(), kept["losses"].astype(np.float64), float(kept["seconds"])))
        print(f"{name}: {rows[-1].losses.mean():.4f} nats, {rows[-1].seconds:.1f} CPU s", flush=True)
    named = {r.name: r for r in rows}
    if args.reference and args.reference not in named:
        raise ToolError(f"--reference {args.reference} is none of the rows {', '.join(named)}")
    text = report(rows, lengths, named[args.reference] if args.reference else rows[-1])
    (args.out / "report.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
