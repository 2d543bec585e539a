"""Rows that differ from one configuration in one thing: paired differences, with errors.

    set -a; . configs/best.env; . my_sizes.env; set +a
    python tools/ablate.py runs/study --seeds 1 2 3
    python tools/ablate.py runs/study "no XSA" "hot: MATRIX_LR=0.05" --part trained
    python tools/ablate.py runs/study --artifact runs/demo/final_model.int6.ptz \\
        "none: TTT_LORA_LR=0" "half: TTT_STEP_SHARE=0.125" "short: TTT_SUFFIX=24"

The environment is the configuration, and every row changes some of its settings. A row
is "name: SETTING=value …", or a part of the name of a row known here; without any, all
known ones are run. Where they start:

--part trained   each trains anew; its averaged weights are scored (prequant_val_bpb).
--part scored    the weights of the configuration; the artifact is scored (val_bpb).
--artifact FILE  a trained artifact, which every row adapts to the same documents of
                 DATA_PATH's validation shards; TTT_ENABLED=0 is a row of sliding windows
                 at EVAL_STRIDE. To choose a learning rate, point DATA_PATH at held-out
                 training documents. The two halves are the even and the odd documents:
                 what is chosen on one can be reported on the other.

The table shows a row's difference to the configuration (with --artifact: to the first
row), paired over seeds (documents), with its standard error: negative means that the
change helps. A row that fails is named at once, with the error in its log. What is
finished is read, not run again: a folder with a run of other settings is refused, rows
on an artifact are kept by artifact, settings and documents.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    SCRIPT,
    Seeds,
    ToolError,
    command_line,
    error_line,
    load_run,
    need,
    relative,
    run_cli,
    table,
    write_atomic,
)

DONE = "ablate.json"  # in a run's folder once it has succeeded: the settings it was given
BASE = "the configuration"  # the row that the others are compared with
OWN_ROW = re.compile(r"([^:]+):((?:\s*[A-Z0-9_]+=\S*)*)\s*")  # name: SETTING=value …
LENGTHS = (0, 128, 256, 512, 1024, 2048, 10**9)
POSITIONS = (0, 48, 144, 336, 720, 1440, 10**9)

BIGRAM = "BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=64"
GROWING = "TRAIN_SEQ_SCHEDULE=128@0.3,256@0.7,512@1"
TRAINED = {
    "no U-Net skip gates": "SKIP_GATES_ENABLED=0",
    "no smear gate": "SMEAR_GATE_ENABLED=0",
    "no attention gate": "SPARSE_ATTN_GATE_ENABLED=0",
    "dense attention gate": "SPARSE_ATTN_GATE_ENABLED=0 GATED_ATTN_ENABLED=1",
    "projected attention gate": "SPARSE_ATTN_GATE_ENABLED=0 ATTN_OUT_GATE_ENABLED=1",
    "no XSA": "XSA_LAST_N=0",
    "no depth recurrence": "NUM_LOOPS=0",
    "no parallel lanes": "PARALLEL_START_LAYER=0",
    "ReLU squared": "NEGATIVE_SLOPE=0",
    "no scale by depth": "LN_SCALE=0",
    "bigram table": BIGRAM,
    "value embeddings": "VE_ENABLED=1 VE_DIM=64 VE_LAYERS=4,5",
    "untied head": "TIE_EMBEDDINGS=0",
    "no floor of the learning rate": "MIN_LR=0",
    "split learning rate, early x 0.7":
        "MATRIX_LR_EARLY=0.0182 MATRIX_LR_LATE=0.026 BANK_SPLIT=3",
    "no row normalisation in Muon": "MUON_ROW_NORMALIZE=0",
    "one quintic in Muon": "MUON_COEFFICIENTS=quintic",
    "no averaging": "EMA_DECAY=0",
    "coprime windows": "TRAIN_LOADER=coprime",
    "growing context": f"{GROWING} SEQ_CHANGE_WARMUP_STEPS=4",
    "growing context, no warm-ups": f"{GROWING} SEQ_CHANGE_WARMUP_STEPS=0",
    "bigram table, soft rounding": f"{BIGRAM} LATE_QAT_THRESHOLD=0.5 LATE_QAT_MIN_STEP=0",
}
BY_HAND = "QUANT_ALLOCATION=hand QUANT_TRELLIS=0"
SCORED = {
    "steps by hand": BY_HAND,
    "steps by hand, LQER": f"{BY_HAND} LQER_ENABLED=1",
    "steps by hand, LQER symmetric": f"{BY_HAND} LQER_ENABLED=1 LQER_ASYM_ENABLED=0",
    "steps by hand, LQER by gain": f"{BY_HAND} LQER_ENABLED=1 LQER_GAIN_SELECT=1",
    "steps by hand, AWQ": f"{BY_HAND} AWQ_LITE_ENABLED=1",
    "no trellis": "QUANT_TRELLIS=0",
    "logit calibration": "LOGIT_CALIB_ENABLED=1",
    "no test-time training": "TTT_ENABLED=0",
    "no phases": "PHASED_TTT_PREFIX_DOCS=0",
    "chunks of one size": "TTT_SHORT_SCORE_FIRST_ENABLED=0",
    "hidden-state cache": "TTT_CACHE_LAMBDA=0.25",
    "twice the context": "EVAL_SEQ_LEN=1024 TTT_EVAL_SEQ_LEN=1024",
    "longest first": "TTT_DOC_ORDER=length",
    "adapters: not Q": "TTT_Q_LORA=0",
    "adapters: not V": "TTT_V_LORA=0",
    "adapters: not K": "TTT_K_LORA=0",
    "adapters: not O": "TTT_O_LORA=0",
    "adapters: not the MLP": "TTT_MLP_LORA=0",
    "two steps a chunk": "TTT_GRAD_STEPS=2",
    "n-gram tilt": "NGRAM_TILT_ENABLED=1",
    "three experts that agree":
        "NGRAM_TILT_ENABLED=1 WITHIN_TAU=0.45 WITHIN_BOOST=0.75 "
        "WORD_TAU=0.65 WORD_BOOST=0.75 AGREE_ADD_BOOST=0.5",
    "n-gram corrector": "CORRECTOR_ALPHA=0.3 CORRECTOR_ORDERS=2,3,5",
}
PARTS = (  # part of the study, its rows, and the score in summary.json that it compares
    ("trained", TRAINED, "prequant_val_bpb"),
    ("scored", SCORED, "val_bpb"),
)
KNOWN = {**TRAINED, **SCORED}


# --- the rows


def chosen_rows(texts: list[str]) -> dict[str, str]:
    """{name: changes}: rows that are written out and known ones that are named; all known by default."""
    rows = {} if texts else dict(KNOWN)
    for text in texts:
        if own := OWN_ROW.fullmatch(text):
            found = {own[1].strip(): own[2].strip()}
        else:
            found = {name: changes for name, changes in KNOWN.items() if text in name}
        if not found:
            raise ToolError(f"'{text}' is no row: write 'name: SETTING=value …', or a part of "
                            f"one of these names: {', '.join(KNOWN)}")
        for name, changes in found.items():
            if rows.setdefault(name, changes) != changes:
                raise ToolError(f"the row {name} is given twice: choose another name")
    return rows


def settings_in(changes: str) -> dict[str, str]:
    """"A=1 B=2" -> {"A": "1", "B": "2"}"""
    return dict(change.split("=", 1) for change in changes.split())


def label_of(name: str) -> str:
    """A row's folder."""
    return "base" if name == BASE else re.sub(r"[^\w.-]+", "_", name)


# --- one run


def run(folder: Path, changes: str, **more: str) -> dict:
    """The summary of one run, run now unless it is there.

    changes: "SETTING=value …". {"error": why} when it failed; its log stays.
    """
    env = {**os.environ, **settings_in(changes), **more, "ARTIFACT_DIR": str(folder)}
    if not is_done(folder, env):
        shutil.rmtree(folder, ignore_errors=True)  # what was cut short cannot go on
        folder.mkdir(parents=True)
        command = [sys.executable, str(SCRIPT)]
        with open(folder / "output.log", "w") as log:
            done = subprocess.run(command, env=env, stdout=log, stderr=log)
        if done.returncode:
            return {"error": why_it_failed(folder, done.returncode)}
        given = given_settings(folder, env)
        write_atomic(folder / DONE, json.dumps(given, indent=1))
    return load_run(folder).summary


def why_it_failed(folder: Path, status: int) -> str:
    """The error in a failed run's log, in a line that is also said at once."""
    log = folder / "output.log"
    said = error_line(log.read_text(errors="replace"))
    reason = f"exit status {status}: {said} (all of it: {relative(log)})"
    print(f"FAILED {relative(folder)}: {reason}", file=sys.stderr, flush=True)
    return reason


def given_settings(folder: Path, env: dict) -> dict[str, str]:
    """Those settings of the folder's run that the environment sets."""
    names = load_run(folder).summary["settings"]
    return {k: env[k] for k in sorted(names) if k in env}


def is_done(folder: Path, env: dict) -> bool:
    """The folder holds a finished run of these settings; a ToolError for one of others."""
    try:
        wanted = given_settings(folder, env)
    except (ToolError, KeyError):  # not there, or cut short
        return False
    if not (folder / DONE).is_file():
        raise ToolError(
            f"{relative(folder)} holds a finished run, but not its settings ({DONE}): "
            "choose another folder, or delete it to run it again")
    known = json.loads((folder / DONE).read_text())
    names = sorted({*known, *wanted})
    unlike = [k for k in names if known.get(k) != wanted.get(k)]
    if unlike:
        pairs = [f"{k}={known.get(k)}, now {wanted.get(k)}" for k in unlike[:4]]
        raise ToolError(
            f"{relative(folder)} holds a run of other settings ({', '.join(pairs)}): "
            "choose another folder")
    return True


# --- trained and scored, by seed


def run_part(part: str, rows: dict, args: argparse.Namespace, pool) -> dict[str, list[dict]]:
    """Run one part's rows: {row: a summary by seed}.

    Seed by seed, so that an interrupted study has whole rows.
    """
    weights = args.out / "trained" / "base"
    trained = part == "trained"

    def train(seed: int) -> dict:
        return run(weights / str(seed), "", SEED=str(seed), PREQUANT_ONLY="1")

    if not trained:  # every seed's weights first
        list(pool.map(train, args.seeds))
    jobs: dict[str, list] = {name: [] for name in rows}
    for seed in args.seeds:
        given = {"SEED": str(seed)}
        if trained:
            given["PREQUANT_ONLY"] = "1"
        else:
            given["EVAL_ONLY_PATH"] = str(weights / str(seed) / "final_model.pt")
        for name, changes in rows.items():
            folder = args.out / part / label_of(name) / str(seed)
            jobs[name].append(pool.submit(run, folder, changes, **given))
    results = {}
    for name, row in jobs.items():
        results[name] = [job.result() for job in row]
    return results


def seeds_report(results: dict[str, list[dict]], key: str, args: argparse.Namespace) -> str:
    """The table of one part, and why runs failed. results: {row: a summary by seed}."""
    rows, failures = [], []
    for name, summaries in results.items():
        rows.append(Row(name, np.array([summary.get(key, np.nan) for summary in summaries])))
        failed = [f"{name}: {summary['error']}" for summary in summaries if "error" in summary]
        failures += failed[:1]
    pairs = [np.isfinite(row.scores - rows[0].scores).sum() for row in rows]
    counts = [f"{count} of {len(args.seeds)}" for count in pairs]
    lengths = np.ones(len(args.seeds), int)
    shown = paired_table(rows, lengths, args.reference, {}, {"seeds": counts})
    return "\n\n".join([key, shown, *failures])


def study(args: argparse.Namespace, pool: ThreadPoolExecutor) -> list[str]:
    """Run the parts that are asked for; their tables, which are printed as they come."""
    chosen = chosen_rows(args.rows)
    folders = [label_of(name) for name in (BASE, *chosen)]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise ToolError(f"two rows would share the folder {twice[0]}: choose another name")
    own = [name for name in chosen if name not in KNOWN]
    if own and args.part == "both":
        raise ToolError(f"the row {own[0]} is your own: say --part trained or --part scored")
    reports = []
    for part, known, key in PARTS:
        rows = {BASE: ""}
        for name, changes in chosen.items():
            if name in known or name not in KNOWN:
                rows[name] = changes
        if args.part not in (part, "both") or len(rows) == 1:
            continue
        results = run_part(part, rows, args, pool)
        reports.append(seeds_report(results, key, args))
        print("\n" + reports[-1], flush=True)
    return reports


# --- on one artifact, by document


def measure(tg, s, args: argparse.Namespace) -> dict:
    """Losses (targets,) in stream order under settings s, the documents' lengths in
    targets, and the processor seconds it took."""
    world = tg.World.join({})
    tg.set_up(s, world)
    model = tg.build_model(s, world)
    val = tg.Validation(s)
    tg.open_artifact(s, world, model, args.artifact)
    documents = val.documents
    fits = (documents.length >= args.min_tokens) & (documents.length <= args.max_tokens)
    chosen = np.flatnonzero(fits)[: args.documents]
    if len(chosen) < 2:
        raise ToolError(f"{len(chosen)} documents have {args.min_tokens} to {args.max_tokens} "
                        "tokens: raise --max-tokens")
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
    return {"losses": losses, "lengths": documents.length - 1, "seconds": seconds}


def measured(tg, name: str, changes: str, seed: int | None, args: argparse.Namespace) -> dict:
    """What `measure` says of a row, read back where it is there."""
    env = {**os.environ, **settings_in(changes), "EVAL_MAX_SECONDS": "0"}
    if seed is not None:
        env["SEED"] = str(seed)
    try:
        s = tg.Settings.from_env(env)
        choices = s, args.documents, args.min_tokens, args.max_tokens
        identity = hashlib.sha256(args.artifact.read_bytes() + repr(choices).encode())
        folder = args.out / "adapted" / label_of(name)
        path = folder / f"{s.seed}-{identity.hexdigest()[:16]}.npz"
        if not path.is_file():
            figures = io.BytesIO()
            np.savez(figures, **measure(tg, s, args))
            write_atomic(path, figures.getvalue())
    except tg.UserError as error:
        raise ToolError(f"row {name}: {error}") from None
    return dict(np.load(path))


def adapt(args: argparse.Namespace) -> str:
    """Measure the rows on the artifact. Three tables: the whole with its halves, by document length,
    by position in it."""
    need("torch", "--artifact")
    import train_gpt as tg

    rows, lengths = [], None
    speeds: dict[str, list[str]] = {"CPU s": [], "targets/s": []}
    for name, changes in chosen_rows(args.rows).items():
        by_seed = [measured(tg, name, changes, seed, args) for seed in args.seeds or [None]]
        for figures in by_seed:
            lengths = figures["lengths"] if lengths is None else lengths
            if not np.array_equal(lengths, figures["lengths"]):
                raise ToolError(f"row {name} was measured on other documents: "
                                "keep the data settings the same")
        losses = np.mean([figures["losses"].astype(np.float64) for figures in by_seed], 0)
        seconds = sum(float(figures["seconds"]) for figures in by_seed)
        rows.append(Row(name, losses))
        speeds["CPU s"].append(f"{seconds:.0f}")
        speeds["targets/s"].append(f"{len(by_seed) * len(losses) / seconds:.0f}")
        print(f"{name}: {losses.mean():.4f} nats, {seconds:.1f} CPU s", flush=True)
    even = np.arange(len(lengths)).repeat(lengths) % 2 == 0
    halves = {"even half": even, "odd half": ~even}
    length = lengths.repeat(lengths)
    position = np.arange(lengths.sum()) - starts_of(lengths).repeat(lengths)
    return "\n\n".join([
        f"{len(lengths)} documents, {lengths.sum():,} targets; nats a target",
        paired_table(rows, lengths, args.reference, halves, speeds),
        curve_table("length", length, LENGTHS, rows, lengths),
        curve_table("position", position, POSITIONS, rows, lengths),
    ])


# --- paired differences


class Row(NamedTuple):
    """A row's scores (targets,): nats of each target, document after document; or BPB of
    each seed, NaN where a run failed."""

    name: str
    scores: np.ndarray


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where documents of these lengths begin in the stream of their targets."""
    return np.cumsum(lengths) - lengths


def paired(difference: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Mean per target of a difference (targets,); its standard error over documents
    (seeds, each of one target), NaN where there is only one."""
    sums = np.add.reduceat(difference, starts_of(lengths))
    targets, documents = lengths.sum(), len(lengths)
    mean = sums.sum() / targets
    if documents == 1:
        return mean, np.nan
    spread = np.square(sums - mean * lengths).sum() * documents / (documents - 1)
    return mean, float(np.sqrt(spread)) / targets


def paired_text(row: Row, other: Row, lengths: np.ndarray, pick: np.ndarray) -> str:
    """Paired difference of two rows over those picked targets (bool) that both have:
    mean ± error."""
    difference = row.scores - other.scores
    pick = pick & np.isfinite(difference)
    inside = np.add.reduceat(pick.astype(int), starts_of(lengths))
    if not pick.any():
        return ""
    mean, error = paired(difference[pick], inside[inside > 0])
    return f"{mean:+.4f}" if np.isnan(error) else f"{mean:+.4f} ± {error:.4f}"


def paired_table(
    rows: list[Row], lengths: np.ndarray, reference: str | None, halves: dict, columns: dict
) -> str:
    """Markdown: every row's score, and its differences to the first row and to `reference`, if there.

    halves: {heading: which targets (bool)}; columns: {heading: more cells by row}.
    """
    first = rows[0]
    named = {row.name: row for row in rows}
    others = [name for name in dict.fromkeys([first.name, reference]) if name in named]
    every = np.ones(len(first.scores), bool)
    picks = {"": every, **halves}
    head = ["row", "score"]
    head += [heading or f"against {other}" for other in others for heading in picks]
    lines = []
    for number, row in enumerate(rows):
        common = row.scores[np.isfinite(row.scores - first.scores)]
        line = [row.name, f"{common.mean():.4f}" if len(common) else "failed"]
        for other in others:
            for pick in picks.values():
                shown = paired_text(row, named[other], lengths, pick)
                line.append("" if row.name == other else shown)
        lines.append([*line, *(cells[number] for cells in columns.values())])
    return table([*head, *columns], lines, markdown=True)


def curve_table(
    what: str, of: np.ndarray, bounds: tuple, rows: list[Row], lengths: np.ndarray
) -> str:
    """Gains over the first row where a figure `of` each target lies within two bounds."""
    first, others = rows[0], rows[1:]
    document = np.arange(len(lengths)).repeat(lengths)
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


# --- the command

WITH_ARTIFACT = ("documents", "min_tokens", "max_tokens")  # options that act there only
WITHOUT_ARTIFACT = ("part", "workers")


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder that keeps what was run")
    add("rows", nargs="*", help="'name: SETTING=value …', or a part of a known row's name")
    add("--seeds", nargs="+", action=Seeds,
        help="repeats of every row: 1 2 3 (the default) or 1,2,3; an artifact's: the environment's")
    add("--reference", metavar="ROW", help="differences to this row, too")
    add("--part", choices=("trained", "scored", "both"), default="both")
    add("--workers", type=int, default=1, help="runs side by side")
    add("--artifact", type=Path, help="a run's final_model.int6.ptz, to adapt")
    add("--documents", type=int, default=200, help="how many, from the stream's start")
    add("--min-tokens", type=int, default=2, help="shortest document")
    add("--max-tokens", type=int, default=10**9, help="longest document")
    args = parser.parse_intermixed_args(arguments)  # rows may follow options
    for name in WITHOUT_ARTIFACT if args.artifact else WITH_ARTIFACT:
        if getattr(args, name) != parser.get_default(name):
            where = "without" if args.artifact else "with"
            raise ToolError(f"--{name.replace('_', '-')} acts only {where} --artifact: leave it out")
    return args


def main(arguments=None) -> int:
    """Entry."""
    args = parse(arguments)
    if args.artifact and not args.rows:
        raise ToolError("--artifact needs rows, such as 'none: TTT_LORA_LR=0' 'fast:'")
    names = [*([] if args.artifact else [BASE]), *chosen_rows(args.rows)]
    if args.reference not in (None, *names):
        raise ToolError(f"--reference {args.reference} is none of the rows {', '.join(names)}")
    if args.artifact:
        reports = [adapt(args)]
        print(reports[0])
    else:
        args.seeds = args.seeds or [1, 2, 3]
        with ThreadPoolExecutor(args.workers) as pool:
            try:
                reports = study(args, pool)
            except ToolError:
                # what has begun ends, the rest is not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    write_atomic(args.out / "report.md", "\n\n".join(reports) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
