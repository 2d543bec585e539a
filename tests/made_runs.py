"""Made-up runs that look like real ones, for the tests of the tools."""

import hashlib
import inspect
import json
from pathlib import Path

from conftest import tg

from tools import common

# A stand-in for the trainer: it packs itself, and scores by an artifact's first byte. A line of it is for
# older systems, which the setting OLDER asks for.
PACKING = f"""import ast, io, json, lzma, os, sys, tokenize
from pathlib import Path

PACKED_START, SCRIPT_FILTERS = {tg.PACKED_START!r}, {tg.SCRIPT_FILTERS!r}

{inspect.getsource(tg.without_comments)}
{inspect.getsource(tg.self_extracting)}

def lean(source):
    return source.replace(b"# of older systems\\n", b"")
"""
SCRIPT = PACKING.encode() + b"""
# of older systems
if __name__ == "__main__":
    if sys.argv[1:] == ["--check", "settings"]:
        sys.exit("error: CODE_FORM=lean leaves out what OLDER needs" if os.environ.get("OLDER") else 0)
    if os.environ.get("BREAK"):
        sys.exit("error: BREAK is set")
    blob = Path(os.environ["EVAL_ONLY_QUANTIZED_PATH"]).read_bytes()
    out = Path(os.environ["ARTIFACT_DIR"])
    out.mkdir(parents=True, exist_ok=True)
    summary = {"val_bpb": 1 + blob[0] / 1000, "tokens_scored": 47853343}
    (out / "summary.json").write_text(json.dumps(summary))
"""


def made_summary(seed: int, score: float, size: int, code: int, settings: dict) -> dict:
    """summary.json of a full run on 8 H100."""
    own = {"SEED": seed, "RUN_ID": ""}
    budget = {"MAX_WALLCLOCK_SECONDS": 600.0, "EVAL_MAX_SECONDS": 600.0, "VAL_DOC_FRACTION": 1.0}
    scores = {"prequant_val_bpb": score + 0.005, "quantized_val_bpb": score + 0.013, "untrained_val_bpb": 3.4}
    scores.update(sliding_val_bpb=score + 0.01, val_bpb=score, val_loss=score * 2.188)
    sizes = {"code_bytes": code, "artifact_bytes": size, "total_bytes": size + code}
    times = {"steps": 4900 + seed, "step_ms": 120.5, "train_seconds": 599.1, "eval_seconds": 480.0}
    where = {"world_size": 8, "device": "NVIDIA H100 80GB HBM3", "torch": "2.9.1", "model_params": 35_944_602}
    covered = {"tokens_scored": 47_853_343, "bytes_scored": 151_080_891, "compliant": True, "seed": seed}
    changed = {"MATRIX_LR": 0.026, "SLIDING_WINDOW_ENABLED": True, **settings}
    return {**scores, **sizes, **times, **where, **covered, "settings": {**own, **budget, **changed}}


def made_events(s: dict, digest: str) -> list[dict]:
    """metrics.jsonl of the same run."""
    size, code = s["artifact_bytes"], s["code_bytes"]
    line = {"event": "train", "norm": 0.3, "lr": 1.0, "ms": 120.0, "ms_mean": 120.5, "tok_s": 6_500_000}
    train = [{**line, "step": n, "loss": 7 - n / 1000, "looping": n > 1800, "elapsed": n * 0.12,
              "used": n / 5000} for n in (1, 2, 500, 1000, 2000, 3000, 4000)]
    covered = {"targets": 47_853_343, "bytes": 151_080_891, "documents": 50_000, "complete": True}
    packed = {"event": "pack", "bytes": size, "code_bytes": code, "quantise_s": 2.1, "pack_s": 3.1}
    return [{"event": "start", "device": s["device"], "world_size": s["world_size"], "attention": "fa3"},
            {"event": "changed_settings", "SEED": s["seed"], "MATRIX_LR": 0.028, "COMPILE": "1"},
            {"event": "code", "bytes": code, "compressed": 400, "sha256": digest},
            {"event": "check", "what": "training shards", "detail": "80 shards, 8,000,000,058 tokens"},
            {"event": "check", "what": "validation shards", "detail": "47,853,343 targets, 50,000 documents"},
            {"event": "check", "what": "tokenizer", "detail": "tokenizer.model, 8192 tokens"},
            {"event": "warm_up", "seconds": 84.0},
            {"event": "rehearsal", "calibrate_s": 4.0, "reserve_s": 12.0, "seconds": 9.0},
            {"event": "validation", "step": 0, "val_loss": 9.0, "val_bpb": 3.4},
            *train,
            {"event": "validation", "step": 4000, "val_loss": 2.4, "val_bpb": 1.09},
            {"event": "train_end", "steps": s["steps"], "seconds": 589.0, "step_ms": 120.5},
            packed,
            {"event": "artifact", "bytes": size, "total": size + code, "calibrate_s": 4.1},
            {"event": "score_prequant", "val_loss": 2.33, "val_bpb": s["prequant_val_bpb"]},
            {"event": "score_quantized", "val_loss": 2.34, "val_bpb": s["quantized_val_bpb"]},
            {"event": "score_sliding", "val_loss": 2.34, "val_bpb": s["sliding_val_bpb"], "elapsed": 70.0},
            {"event": "score_ttt", "val_loss": s["val_loss"], "val_bpb": s["val_bpb"], "elapsed": 480.0},
            {"event": "coverage", **covered},
            {"event": "probe", "name": "C1", "ok": True, "figure": 0.0},
            {"event": "final", "val_bpb": s["val_bpb"], "seed": s["seed"]}]


def make_run(folder: Path, seed: int, bpb: int = 60, size: int = 1000, script=SCRIPT, settings=None,
             **changes):
    """A run's folder as the trainer leaves it; its score is 1 + bpb / 1000; `changes` go into its summary."""
    folder.mkdir(parents=True)
    summary = {**made_summary(seed, 1 + bpb / 1000, size, len(script), settings or {}), **changes}
    digest = hashlib.sha256(script).hexdigest()
    stamped = [{"time": 1.7e9 + i, **e} for i, e in enumerate(made_events(summary, digest))]
    head = f"start run_id=x device=x\ncode bytes={len(script)} compressed=400 sha256={digest}\n"
    tail = f"check what=disk detail=/mnt/data/shards/a\nfinal val_bpb={summary['val_bpb']:.6f} seed={seed}\n"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in stamped))
    source = script.decode("latin-1" if script.startswith(tg.PACKED_START) else "utf-8")
    (folder / "train.log").write_text(head + source + common.SOURCE_END + tail)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / common.ARTIFACT).write_bytes(bytes([bpb]) * size)
    return folder


def change(folder: Path, file: str, **values) -> None:
    """Change keys of a run's summary.json, or of one event of its metrics.jsonl (file = the event)."""
    if file == "summary":
        path = folder / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return
    path = folder / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**e, **(values if e["event"] == file else {})}) + "\n"
                            for e in events))
