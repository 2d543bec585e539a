"""What each mechanism is worth: runs unlike one configuration in one thing, by seed.

    set -a; . configs/best.env; . my_sizes.env; set +a
    python tools/ablate.py runs/ablation --seeds 1 2 3

The environment is the configuration, and every row changes what it names. Rows of
TRAINED are trained and scored by their averaged weights (prequant_val_bpb); rows of
SCORED start from the weights of the base and are scored by the artifact (val_bpb).
Finished runs of the same settings are taken up again, others are run anew; a folder
with a finished run of other settings is refused. The table shows the paired difference
over seeds with its standard error: negative means that the change helps. A run that
fails is named at once, with the error in its log.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    SCRIPT,
    ToolError,
    command_line,
    error_line,
    load_run,
    relative,
    run_cli,
    write_atomic,
)

DONE = "ablate.json"  # in a run's folder once it has succeeded: the settings it was given
BASE = "the configuration"  # the row that the others are compared with

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


def run(folder: Path, changes: str, **more: str) -> dict | None:
    """The summary of one run, run now unless it is there.

    changes: "SETTING=value …". None when it failed; its log stays.
    """
    env = {**os.environ, **settings_in(changes), **more, "ARTIFACT_DIR": str(folder)}
    if not is_done(folder, env):
        shutil.rmtree(folder, ignore_errors=True)  # what was cut short cannot go on
        folder.mkdir(parents=True)
        command = [sys.executable, str(SCRIPT)]
        with open(folder / "output.log", "w") as log:
            done = subprocess.run(command, env=env, stdout=log, stderr=log)
        if done.returncode:
            tell_why(folder, done.returncode)
            return None
        given = given_settings(folder, env)
        write_atomic(folder / DONE, json.dumps(given, indent=1))
    return load_run(folder).summary


def tell_why(folder: Path, status: int) -> None:
    """A line about a run that has failed, by the error in its log."""
    log = folder / "output.log"
    reason = error_line(log.read_text(errors="replace"))
    print(f"FAILED {relative(folder)}: exit status {status}: {reason} (all of it: {relative(log)})",
          file=sys.stderr, flush=True)


def settings_in(changes: str) -> dict[str, str]:
    """"A=1 B=2" -> {"A": "1", "B": "2"}"""
    return dict(change.split("=", 1) for change in changes.split())


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


def table(results: dict, base: str, key: str, seeds: list[int]) -> list[str]:
    """Markdown: score of the base, then every row's paired difference ± standard error.

    results: {row: a summary, or None, for every seed}.
    """
    of_base = results[base]
    lines = ["| change | BPB | difference | seeds |", "|---|---|---|---|"]
    for name, runs in results.items():
        values, differences = [], []
        for summary, other in zip(runs, of_base):
            value = (summary or {}).get(key)
            reference = (other or {}).get(key)
            if value is not None and reference is not None:
                values.append(value)
                differences.append(value - reference)
        count = f"{len(values)} of {len(seeds)}"
        if not values:
            lines.append(f"| {name} | failed | | {count} |")
            continue
        shown = "" if name == base else mean_and_error(differences)
        lines.append(f"| {name} | {mean(values):.4f} | {shown} | {count} |")
    return lines


def mean_and_error(differences: list[float]) -> str:
    """Mean ± standard error, the latter where there are two."""
    count = len(differences)
    if count == 1:
        return f"{differences[0]:+.4f}"
    error = stdev(differences) / count**0.5
    return f"{mean(differences):+.4f} ± {error:.4f}"


def study_part(part: str, rows: dict, args: argparse.Namespace, pool) -> dict:
    """Run one part's rows: {row: a summary by seed, None where a run failed}.

    Seed by seed, so that an interrupted study has whole rows.
    """
    weights = args.out / "trained" / "base"
    trained = part == "trained"

    def train(seed: int) -> dict | None:
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
            label = "base" if name == BASE else name.replace(" ", "_").replace(",", "")
            folder = args.out / part / label / str(seed)
            jobs[name].append(pool.submit(run, folder, changes, **given))
    results = {}
    for name, row in jobs.items():
        results[name] = [job.result() for job in row]
    return results


def study(args: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
    """Run what is asked for and print the tables."""
    for part, known, key in PARTS:
        if args.part not in (part, "both"):
            continue
        rows = {BASE: ""}
        for name, changes in known.items():
            if not args.rows or any(word in name for word in args.rows):
                rows[name] = changes
        results = study_part(part, rows, args, pool)
        lines = [f"\n{key}", *table(results, BASE, key, args.seeds)]
        print("\n".join(lines), flush=True)


def main() -> int:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder of the runs")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--workers", type=int, default=1, help="runs side by side")
    add("--part", choices=("trained", "scored", "both"), default="both")
    add("--rows", nargs="*", help="only rows whose name contains one of these")
    args = parser.parse_args()

    with ThreadPoolExecutor(args.workers) as pool:
        try:
            study(args, pool)
        except ToolError:
            # what has begun ends, the rest is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return 0


if __name__ == "__main__":
    run_cli(main)
