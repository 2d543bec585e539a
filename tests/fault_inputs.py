"""Bad inputs by a seeded generator, each tried as a user would, and judged.

    python tests/fault_inputs.py [COUNT] [SEED]      # default: 300 inputs of seed 0

A bad input must end within ten seconds in one line that says `error:` (exit status 2) or, from --check, in a
line `FAIL` for each thing that is wrong (exit status 1), of at most 500 characters, without a stack trace.
Nothing is trained, and no file is written but the run's own log. Good inputs that look odd are among them and
must be accepted. Most are tried in this process, every 60th also in one of its own. Prints a line for every
violation and counts by kind; exit status 0 only without violations.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import ROOT, TINY, documents, environment, make_data, tg, write_manifest, write_shard  # noqa: E402

from data import build as data_build  # noqa: E402
from data import check as data_check  # noqa: E402
from data import shards as data_shards  # noqa: E402

SECONDS = 10      # of the processor: a machine may be busy
HANGS = 300       # seconds of the clock, on a busy machine
BAD, GOOD, EITHER = "refused", "accepted", "refused or accepted"


@dataclass
class Case:
    """One input. changes: variables of the environment, None: taken out. spoil: what is done to the folder of
    data before. program: what is started with argv; the trainer, or a data tool."""

    kind: str
    what: str
    changes: dict = field(default_factory=dict)
    argv: tuple = ("--check",)
    expect: str = BAD
    spoil: Callable[[Path], None] | None = None
    program: Callable[[list], int] = tg.main


def generate(count: int, seed: int) -> list[Case]:
    """`count` cases, of every kind about as many; equal seeds give equal cases."""
    rng = random.Random(seed)
    makers = [endless(make(rng)) for make in KINDS]
    return [next(makers[i % len(makers)]) for i in range(count)]


def endless(cases: Iterator[Case]) -> Iterator[Case]:
    """A kind's cases; when it has told them all, from the beginning."""
    told = []
    for case in cases:
        told.append(case)
        yield case
    while True:
        yield from told


# --- settings


def one_setting(rng: random.Random) -> Iterator[Case]:
    """A value that is no value of its setting."""
    table = [f for f in tg.fields(tg.Settings) if f.default != ""]
    digits = "9" * 5000
    numbers = ["512x", "nan", "inf", "-inf", "1e308", "1e400", digits, "-" + digits, "0x10", "1,5", "1e"]
    while True:
        f = rng.choice(table)
        value = rng.choice(["yes", "2", "true", " ", "A" * 3000, "1\n2", "\udcff"])
        if type(f.default) in (int, float):
            value = rng.choice(numbers + [str(f.metadata["hi"] * 2 + 1), str(f.metadata["lo"] - 1)])
            if type(f.default) is int:
                value = rng.choice([value, "1.5", "1e30", "1e-3"])
        elif type(f.default) is str and not f.metadata["choices"]:
            value = rng.choice(["A" * 5000, "x\ny", "\x1b[31m", "," * 1001, "\x7f", "\udc80"])
        name = f.name.upper()
        yield Case("setting", f"{name}={value[:20]!r}", {name: value}, argv=rng.choice([(), ("--check",)]))


def two_settings(rng: random.Random) -> Iterator[Case]:
    """Settings that contradict each other, or whose lists hold what they must not."""
    rows = """
    QUANTIZE_ONLY=1 PREQUANT_ONLY=1|QUANTIZE_ONLY=1 EVAL_ONLY_QUANTIZED_PATH=a|LOOP_START=3 LOOP_END=2
    PREQUANT_ONLY=1 EVAL_ONLY_QUANTIZED_PATH=a|EVAL_ONLY_PATH=a EVAL_ONLY_QUANTIZED_PATH=b|NUM_LOOPS=100000
    ROPE_DIMS=2 ROPE_YARN=1|ROPE_DIMS=3|ROPE_DIMS=64|MODEL_DIM=66 NUM_HEADS=4|NUM_HEADS=3|NUM_KV_HEADS=3
    NUM_LOOPS=1000 LOOP_END=3|LOOP_END=99|RECUR_LAYERS=0,9999999999|RECUR_LAYERS=1,3|RECUR_LAYERS=,
    RECUR_LAYERS=2,1|RECUR_LAYERS=x|CORRECTOR_ORDERS=,|CORRECTOR_ORDERS=0|CORRECTOR_ORDERS=2,x
    CORRECTOR_ORDERS=99999|CORRECTOR_ORDERS=2,,3|VE_ENABLED=1 VE_LAYERS=|VE_ENABLED=1 VE_LAYERS=1,1
    VE_ENABLED=1 VE_LAYERS=9|VE_ENABLED=1 VE_LAYERS=-1|TTT_SHORT_SCORE_FIRST_STEPS=1:2:3
    TTT_SHORT_SCORE_FIRST_STEPS=0:8|TTT_SHORT_SCORE_FIRST_STEPS=8:99999999999999999999|EVAL_STRIDE=65
    TTT_SHORT_SCORE_FIRST_STEPS=a|TRAIN_SEQ_SCHEDULE=64|TRAIN_SEQ_SCHEDULE=32@0.5,1e9@1
    TRAIN_SEQ_SCHEDULE=64@2|TRAIN_SEQ_SCHEDULE=@|MIDRUN_CAP_SCHEDULE=1@0
    MIDRUN_CAP_SCHEDULE=nan@1|GPTQ_RESERVE_SECONDS=soon|GPTQ_RESERVE_SECONDS=-1|GPTQ_RESERVE_MS=nan|TTT_MASK=x
    GPTQ_RESERVE_SECONDS=9 MAX_WALLCLOCK_SECONDS=9|QUANT_CLIP_RANGE=0|QUANT_CLIP_RANGE=1e3|EMBEDDING_DIM=96
    MODEL_DIM=512x EMBEDDING_DIM=512|TTT_EVAL_ONLY=1|WARMDOWN_ITERS=10|GPTQ_ENABLED=0|BIGRAM_VOCAB_SIZE=1
    SDCLIP_K=x|SDCLIP_K=-1|TRAIN_BATCH_TOKENS=1021 GRAD_ACCUM_STEPS=2|TTT_CHUNK_SIZE=128|GATE_WINDOW=65
    GATED_ATTN_ENABLED=1|ATTN_OUT_GATE_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1
    MLP_MULT=0.01
    TTT_CACHE_LAMBDA=0.5 TTT_KV_REUSE=0|AWQ_LITE_ENABLED=1 QUANT_ALLOCATION=fisher|NGRAM_TILT_ENABLED=1
    TOKEN_THRESHOLD=2|MODEL_DIM=65536 NUM_HEADS=1024 MLP_MULT=256|TTT_DOC_ORDER=stream TTT_TRAIN_MIN_DOC_LEN=5
    TTT_Q_LORA=0 TTT_K_LORA=0 TTT_V_LORA=0 TTT_O_LORA=0 TTT_MLP_LORA=0 TTT_HEAD_LORA=0
    TRAIN_LOADER=shuffled TRAIN_SEQ_SCHEDULE=32@0.5,64@1|BIGRAM_VOCAB_SIZE=999999999 BIGRAM_DIM=65536"""
    pairs = [row.strip() for line in rows.split("\n") for row in line.split("|") if row.strip()]
    pairs.remove("TOKEN_THRESHOLD=2")
    pairs[pairs.index("NGRAM_TILT_ENABLED=1")] += " TOKEN_THRESHOLD=2"
    for row in rng.sample(pairs, len(pairs)):
        yield Case("pair", row, dict(pair.split("=", 1) for pair in row.split()))


def misspelt_names(rng: random.Random) -> Iterator[Case]:
    """A setting's name with two letters swapped, one left out, or one twice."""
    names = [f.name.upper() for f in tg.fields(tg.Settings) if len(f.name) > 7]
    while True:
        name = rng.choice(names)
        i = rng.randrange(1, len(name) - 1)
        swapped = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
        changed = rng.choice([swapped, name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:]])
        if changed not in names and changed != name:
            yield Case("misspelt name", changed, {changed: "1"}, argv=("--check", "settings"))


def good_settings(rng: random.Random) -> Iterator[Case]:
    """What looks odd and is right."""
    good = """SEED=9007199254740993|SEED=1e3|SEED=9223372036854775807|SEED=0|SEED=+5|ITERATIONS=1e3
    RUN_ID=a-b_c.1|RUN_ID=lr=0.02,seed=1|MATRIX_LR=2.6e-2|MATRIX_LR=.026|VAL_LOSS_EVERY=1000000000
    CORRECTOR_ORDERS=2, 3,5|CORRECTOR_ORDERS=|CORRECTOR_ORDERS=8,
    RECUR_LAYERS=1,2|RECUR_LAYERS=2|VE_ENABLED=1 VE_LAYERS=0,3
    TTT_SHORT_SCORE_FIRST_STEPS=256:8,2000=16
    ENABLE_HTTPS=1|ENABLE_AUTH=true|PARALLEL_SEQ=3|HEAD_NODE_IP=10.0.0.1|GLOBAL_RANK=0|MODEL_DIR=/models
    DATASET_PATH=/data|NUM_THREADS=8|TRAIN_JOB_7_SERVICE_HOST=10.1.1.1|MODEL_NAME=x|NUM_GPUS=8|HF_TOKEN=x
    TOKEN_FILE=/run/token|LOOP_DEVICE=/dev/loop0|MATRIX_URL=https://x|EVAL_JOB_ID=7|LR=0.02|BATCH_SIZE=8
    WORLD_SIZE=1 RANK=0 LOCAL_RANK=0|SLURM_JOB_ID=5|OMP_NUM_THREADS=1|MLP_MULT=3|ROPE_DIMS=0|ROPE_DIMS=2
    NUM_LOOPS=0 LOOP_START=9 LOOP_END=1|TRAIN_SEQ_SCHEDULE=32@0.5,64@1
    EMBEDDING_DIM=64|GPTQ_RESERVE_SECONDS=0|TTT_MASK=no_qv|COMPRESSOR=lzma|CASEOPS_ENABLED=0|LOGIT_SOFTCAP=1e6|WANDB_MODE=off"""
    rows = [row.strip() for row in good.replace("\n", "|").split("|")]
    odd = [Case("good setting", "a home", {"ARTIFACT_DIR": "~/x"}), Case("good setting", "spaces", {
        "ARTIFACT_DIR": "a b/ü"}), Case("good setting", "no value", {"MODEL_DIM": "", "RUN_ID": ""})]
    for row in rng.sample(rows, len(rows)):
        parts = row.split(" ") if row.count("=") > 1 and "@" not in row and ", " not in row else [row]
        odd.append(Case("good setting", row, dict(part.split("=", 1) for part in parts)))
    for case in rng.sample(odd, len(odd)):
        case.argv, case.expect = ("--check", "settings"), GOOD
        yield case


# --- launchers, arguments, paths


def launchers(rng: random.Random) -> Iterator[Case]:
    """Variables of a launcher that do not fit together."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    values = ["", "abc", "-2", "1.5", "99999999999999999999", "0x1", " 1 1", "½"]
    together = [
        dict(RANK="3", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500"), dict(RANK="1"),
        dict(RANK="0", WORLD_SIZE="2"), dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost"), dict(LOCAL_RANK="1"), dict(WORLD_SIZE="0"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="", MASTER_PORT="29500"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="port"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="99999")]
    while True:
        changes = {rng.choice(names): rng.choice(values)} if rng.random() < 0.6 else rng.choice(together)
        yield Case("launcher", str(changes), changes, argv=())


def arguments(rng: random.Random) -> Iterator[Case]:
    """Words of the command line that mean nothing."""
    for argv in ("foo", "--check foo", "--check settings data", "--chekc", "train", "-x", "--"):
        yield Case("argument", argv, argv=tuple(argv.split()))


def paths(rng: random.Random) -> Iterator[Case]:
    """Paths to nothing, to folders, pipes and devices, of names that no file can have."""
    odd = ["missing", "folder", "pipe", "/dev/zero", "/dev/null", "empty", "junk", "huge"]
    odd += ["n" * 300, "junk/x", "x\ny"]
    names = "EVAL_ONLY_QUANTIZED_PATH EVAL_ONLY_PATH TOKENIZER_PATH DATA_PATH ARTIFACT_DIR RUN_ID".split()
    cases = [(name, value) for name in names for value in odd]
    cases += [("RUN_ID", value) for value in ("../x", "a/b", "..", ".", "a\tb", "a\\b")]
    cases += [("ARTIFACT_DIR", value) for value in ("/proc/x", "a/" * 3000, "~nobody-of-this-name/x")]
    fine = {("ARTIFACT_DIR", "missing"), ("ARTIFACT_DIR", "folder")}
    fine |= {("RUN_ID", value) for value in odd if value.isalpha() and len(value) < 100}
    # what weights hold is looked at when they are read
    fine |= {("EVAL_ONLY_PATH", value) for value in ("empty", "junk", "huge")}
    for name, value in rng.sample(cases, len(cases)):
        expect = GOOD if (name, value) in fine else BAD
        yield Case("path", f"{name}={value[:40]!r}", {name: value}, expect=expect)


# --- files of data


def shard(name: str, change: Callable[[np.ndarray], np.ndarray], **header) -> Callable[[Path], None]:
    """Rewrite one shard with change(tokens)."""

    def spoil(folder: Path) -> None:
        path = folder / f"fineweb_{name}.bin"
        tokens = change(np.array(tg.read_shard(path)))
        write_shard(path, tokens, **header)

    return spoil


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Rewrite a file with change(bytes)."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file was."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [spoil(folder) for spoil in spoils]


def put(tokens: np.ndarray, at: int, value: int) -> np.ndarray:
    tokens[at] = value
    return tokens


def shards(rng: random.Random) -> Iterator[Case]:
    """Shards and sidecars that are cut, foreign, or of other tokens."""
    train, val, side = "train_000001", "val_000000", "val_bytes_000000"
    cases = {
        "cut": raw(f"fineweb_{train}.bin", lambda b: b[: rng.randrange(len(b) - 1)]),
        "too long": raw(f"fineweb_{train}.bin", lambda b: b + b"xx"),
        "magic": shard(train, lambda t: t, magic=7),
        "promises 2^31+10": shard(train, lambda t: t, count=-(2**31) + 10),
        "promises -1": shard(train, lambda t: t, count=-1),
        "promises 0": shard(train, lambda t: t, count=0),
        "no BOS": shard(train, lambda t: np.where(t == 1, 5, t)),
        "first document cut": shard("train_000000", lambda t: t[1:]),
        "id behind the vocabulary": shard(train, lambda t: put(t, rng.randrange(2, len(t)), 300)),
        "a pipe": instead(f"fineweb_{train}.bin", os.mkfifo),
        "a folder": instead(f"fineweb_{val}.bin", Path.mkdir),
        "a device": instead(f"fineweb_{train}.bin", lambda p: p.symlink_to("/dev/zero")),
        "empty file": raw(f"fineweb_{val}.bin", lambda b: b""),
        "validation of BOS alone": both(shard(val, lambda t: t * 0 + 1), shard(side, lambda t: t * 0)),
        "id of validation": shard(val, lambda t: put(t, 7, 65535)),
        "sidecar in its place": both(shard(val, lambda t: np.where(t == 1, 0, 2))),
        "sidecar cut": shard(side, lambda t: t[:-3]),
        "sidecar of zeros": shard(side, lambda t: t * 0),
        "sidecar shifted": shard(side, lambda t: np.roll(t, 1)),
        "sidecar a pipe": instead(f"fineweb_{side}.bin", os.mkfifo),
        "no validation": lambda folder: (folder / f"fineweb_{val}.bin").unlink(),
        "no training": lambda folder: [p.unlink() for p in folder.glob("fineweb_train_*")],
        "a header of noise": raw(f"fineweb_{train}.bin", lambda b: rng.randbytes(1024) + b[1024:]),
        "long document": lambda folder: write_shard(folder / f"fineweb_{train}.bin", np.append(
            np.full(1_000_001, 9), documents(5, 3))),
    }
    while True:
        what = rng.choice(list(cases))
        program = rng.choice([tg.main, check_folder])
        good = GOOD if what == "long document" else BAD
        spoil = both(lambda folder: (folder / "manifest.json").unlink(), cases[what], CUSTOM[good == GOOD])
        check = ("--check", "data")
        argv = check if good == GOOD else rng.choice([check, ()])
        yield Case("shard", what, {"DATA_CHECK": "full"} if good == BAD else {}, spoil=spoil, expect=good,
                   argv=argv if program == tg.main else (), program=program)


def check_folder(_: list) -> int:
    """data/check.py on the folder of the environment."""
    return data_check.main([os.environ["DATA_PATH"], "--custom"])


# A folder of 14 validation documents needs a manifest that says so.
CUSTOM = {True: write_manifest, False: lambda folder: None}


def manifests(rng: random.Random) -> Iterator[Case]:
    """Manifests with one node exchanged: those that matter are refused, none makes a trace."""
    values = [None, 1, -1, 1.5, "x", [], {}, [None], [{}], True, 10**30, float("nan"), "9" * 5000]
    bad = {
        "null": "null", "a number": "1", "a list": "[]", "text": '"x"', "nothing": "", "cut": '{"files": [',
        "nested": "[" * 100_000, "nested objects": '{"a":' * 100_000, "noise": "\x00\xff",
        "huge number": "1" + "0" * 100_000}
    named = [("files", None), ("files", {}), ("files", [None]), ("files", [1]), ("files", [[]])]
    named += [("files", [{}]), ("files", []), ("split", 1), ("split", "first"), ("tokenizer", [1])]
    named += [("fingerprint", None), ("fingerprint", 7), ("decodable_val_bytes", "many")]
    places = [("files", 0, "size"), ("files", 1, "name"), ("files", 2, "sha256"), ("files", 2, "kind")]
    places += [("variant",), ("files", 3, "text_bytes"), ("files", 2, "documents"), ("tokenizer", "sha256")]
    places += [("tokenizer", "vocab_size"), ("split", "rule"), ("split",)]
    while True:
        program = rng.choice([tg.main, tg.main, check_folder])
        argv = ("--check", "data") if program == tg.main else ()
        pick = rng.random()
        if pick < 0.35:
            what = rng.choice(list(bad))
            yield Case("manifest", what, spoil=text_of_manifest(bad[what]), argv=argv, program=program)
        elif pick < 0.7:
            key, value = rng.choice(named)
            yield Case("manifest", f"{key}={value!r}", spoil=key_of_manifest((key,), value), argv=argv,
                       program=tg.main if key == "decodable_val_bytes" else program,
                       expect=BAD if argv or key != "decodable_val_bytes" else EITHER)
        else:
            where, value = rng.choice(places), rng.choice(values)
            yield Case("manifest", f"{where}={str(value)[:20]}", spoil=key_of_manifest(where, value),
                       argv=argv, program=program, expect=EITHER)


def text_of_manifest(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(text, encoding="latin-1")


def key_of_manifest(where: tuple, value) -> Callable[[Path], None]:
    """Exchange one value of the manifest."""

    def spoil(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = node = json.loads(path.read_text())
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = value
        path.write_text(json.dumps(manifest))

    return spoil


def leaks(rng: random.Random) -> Iterator[Case]:
    """Stored hashes of documents that are too few, too many, or shared."""
    for cut in (8, 80, -8):
        for kind in ("train", "val"):
            yield Case("hashes", f"{kind} {cut}", spoil=stored_hashes(kind, cut), argv=("--check", "data"))
    yield Case("hashes", "whole", spoil=stored_hashes("val", 0), argv=("--check", "data"), expect=GOOD)


def stored_hashes(kind: str, cut: int) -> Callable[[Path], None]:
    """Hashes of all documents, with `cut` bytes fewer (below 0: more) of a kind."""

    def spoil(folder: Path) -> None:
        told = json.loads((folder / "manifest.json").read_text())["files"]
        for each, first in (("train", 1000), ("val", 9000)):
            count = sum(f["documents"] for f in told if f["kind"] == each)
            count -= (cut // 8) * (each == kind)
            np.arange(first, first + count, dtype="<u8").tofile(folder / f"document_hashes_{each}.bin")

    return spoil


def tokenizers(rng: random.Random) -> Iterator[Case]:
    """Tokenizers that are damaged or of another vocabulary."""
    noise = rng.randbytes(3000)
    changes = {"cut": lambda b: b[:100], "empty": lambda b: b"", "noise": lambda b: noise,
               "text": lambda b: b"hello world\n" * 50, "twice": lambda b: b + b"\xff\xff"}
    for what, change in changes.items():
        for program in (tg.main, check_folder):
            yield Case("tokenizer", what, spoil=raw("tokenizer.model", change), program=program,
                       argv=("--check", "data") if program == tg.main else ())
    for size in ("299", "301", "8192"):
        yield Case("tokenizer", f"VOCAB_SIZE={size}", {"VOCAB_SIZE": size})


def artifacts(rng: random.Random) -> Iterator[Case]:
    """Files that begin like an artifact, with a right checksum, and are none."""
    junk = [None, 1, "x", [], {}, {"a": 1}, [[]], -1, 1e300, "9" * 3000]
    s = tg.Settings.from_env({k: str(v) for k, v in TINY.items()})
    while True:
        keys = ("forms", "factors", "sizes", "base_step", "not_compliant")
        header = {key: rng.choice(junk) for key in keys}
        header["architecture"] = rng.choice([tg.architecture(s), rng.choice(junk)])
        names = rng.sample(["levels", "codes", "half"], 2)
        streams = {name: rng.randbytes(rng.randrange(200)) for name in names}
        blob = tg.artifact_to_bytes(header, streams)
        damage = rng.random()
        if damage < 0.3:
            blob = blob[: rng.randrange(len(blob))]
        elif damage < 0.6:
            at = rng.randrange(len(blob))
            blob = blob[:at] + bytes([blob[at] ^ 1 << rng.randrange(8)]) + blob[at + 1:]
        whole = damage >= 0.6 and header["architecture"] == tg.architecture(s)
        yield Case("artifact", f"{len(blob)} bytes", {"EVAL_ONLY_QUANTIZED_PATH": "made.ptz"},
                   argv=() if whole else ("--check",),
                   spoil=lambda folder, blob=blob: (folder.parent / "work/made.ptz").write_bytes(blob))


def sources(rng: random.Random) -> Iterator[Case]:
    """Documents that data/build.py cannot take, and some that it must."""

    def columns(values):
        import pyarrow
        import pyarrow.parquet
        return lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)

    def lines(text):
        return lambda path: path.write_text(text)

    fine = '{"text": "words to be kept"}\n' * 40
    bad = {
        "a.parquet": columns([1, 2, 3]),
        "b.parquet": columns([["a"], ["b"]]),
        "c.parquet": columns([1.5, None]),
        "d.parquet": lines("PAR1"),
        "e.jsonl": lines('{"text": 5}\n'),
        "f.jsonl": lines('{"other": "x"}\n'),
        "g.jsonl": lines("[" * 100_000),
        "h.jsonl": lines("nothing of JSON\n"),
        "i.jsonl": lines("null\n"),
        "j.jsonl": lines(""),
        "k.jsonl": os.mkfifo,
        "l.jsonl": Path.mkdir,
        "m.jsonl.gz": lines("x"),
    }
    good = {
        "n.jsonl": lines('{"text": null}\n' + several(fine)),
        "o.jsonl": lines(several(fine) + json.dumps({"text": "a" + " " * 70_000 + "b"})),
    }
    rows = [(*row, BAD) for row in bad.items()] + [(*row, GOOD) for row in good.items()]
    if importlib.util.find_spec("pyarrow") is None:
        rows = [row for row in rows if not row[0].endswith(".parquet")]
    for name, make, expect in rng.sample(rows, len(rows)):
        yield Case("document", name, argv=(name,), expect=expect, program=build_from,
                   spoil=lambda folder, name=name, make=make: make(folder.parent / "work" / name))


def several(line: str) -> str:
    return "".join(line.replace("kept", f"kept {i}") for i in range(40))


def build_from(argv: list) -> int:
    """data/build.py with the byte tokenizer."""
    return data_build.main([*argv, "--out", "built", "--bytes", "--val-share", "0.2", "--workers", "1"])


KINDS = (one_setting, two_settings, misspelt_names, good_settings, launchers, paths, shards, manifests, leaks,
         tokenizers, artifacts, sources, one_setting, arguments)


# --- trying and judging


class TooSlow(BaseException):
    """It hangs."""


def too_slow(*_) -> None:
    raise TooSlow


def attempt(case: Case, data: Path, place: Path, apart: bool = False) -> tuple[list[str], float]:
    """What is wrong with how a case ended, and the seconds it took. apart: in a process of its own."""
    folder, work = place / "data", place / "work"
    for path in (folder, work):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(data, folder)
    surroundings(work)
    if case.spoil:
        case.spoil(folder)
    env = {**environment(folder), **case.changes}
    before, begin = listing(work), time.process_time()
    out, err = io.StringIO(), io.StringIO()
    if apart:
        command = [sys.executable, str(ROOT / "train_gpt.py"), *case.argv]
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=HANGS)
        status, out, err = done.returncode, io.StringIO(done.stdout), io.StringIO(done.stderr)
    else:
        status = run(case, env, work, out, err)
    seconds = time.process_time() - begin
    faults = judge(case, status, out.getvalue(), err.getvalue())
    new = {name for name in listing(work) ^ before if not name.startswith(("runs/", "built/"))}
    if new and case.expect == BAD:
        faults.append(f"files changed: {sorted(new)[:3]}")
    made = [name for name in listing(work) if name.endswith((".pt", ".ptz")) and name.startswith("runs/")]
    if seconds > SECONDS:
        faults.append(f"{seconds:.1f} s of the processor")
    return faults + [f"made {name}" for name in made], seconds


def surroundings(work: Path) -> None:
    """A working folder with the odd things that paths may name."""
    (work / "folder").mkdir(parents=True)
    os.mkfifo(work / "pipe")
    (work / "empty").touch()
    (work / "junk").write_bytes(bytes(range(256)) * 10)
    with open(work / "huge", "wb") as f:
        f.truncate(1 << 32)


def listing(folder: Path) -> set:
    """Files below a folder, with their sizes; a refused run may leave an empty folder or its log."""
    files = (p for p in folder.rglob("*") if not p.is_dir())
    return {str(p.relative_to(folder)) for p in files if p.name not in ("train.log", "metrics.jsonl")}


def run(case: Case, env: dict, work: Path, out, err):
    """The exit status of a case, or the trace of what came out of it."""
    home, kept = os.getcwd(), dict(os.environ)
    signal.signal(signal.SIGALRM, too_slow)
    try:
        os.chdir(work)
        os.environ.clear()
        os.environ.update({k: v for k, v in env.items() if v is not None})
        signal.alarm(HANGS)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return case.program(list(case.argv))
    except data_shards.DataError as error:      # as run_cli shows it
        print(f"error: {error}", file=err)
        return 2
    except SystemExit as error:
        return error.code
    except TooSlow:
        return f"a hang of {HANGS} s"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        os.environ.clear()
        os.environ.update(kept)
        os.chdir(home)


def judge(case: Case, status, out: str, err: str) -> list[str]:
    """What is wrong with an exit status and what was shown."""
    shown = (out + "\n" + err).splitlines()
    said = [line for line in shown if line.startswith(("error:", "FAIL ", "WRONG "))]
    faults = [] if status in (0, 1, 2) else [f"ended by: {str(status)[-300:]}"]
    if status == 0 and case.expect == BAD:
        faults.append("accepted")
    if status in (1, 2) and case.expect == GOOD:
        faults.append(f"refused: {said}")
    if status == 2 and len(said) != 1 or status == 1 and not said:
        faults.append(f"{len(said)} lines of error: {said[:4]}")
    if status == 0 and said:
        faults.append(f"exit status 0, but {said[0]}")
    if any(len(line) > 500 or not line.isprintable() for line in said):
        faults.append(f"an odd line of {max(map(len, said))} characters")
    if "Traceback" in out + err:
        faults.append("a stack trace")
    if "\nstep" in out or "val_bpb=" in out:
        faults.append("something was trained or scored")
    return faults


def try_all(cases: list[Case], data: Path, place: Path, say: Callable = print, apart: int = 0) -> list[str]:
    """Try every case, each `apart`-th of the trainer's also in a process of its own (0: none); the
    violations, and a table of counts and seconds by kind through `say`."""
    importlib.import_module("torch._dynamo")      # seconds at a run's start that no input is to blame for
    violations, kinds = [], collections.defaultdict(list)
    again = [Case(**{**vars(case), "kind": "own process"}) for case in cases if case.program is tg.main]
    for i, case in enumerate([*cases, *(again[::apart] if apart else ())]):
        faults, seconds = attempt(case, data, place, case.kind == "own process")
        kinds[case.kind].append(seconds)
        for fault in faults:
            violations.append(f"{i}: {case.kind} {case.what}: {fault}")
            say("VIOLATION", violations[-1])
    for kind, seconds in sorted(kinds.items()):
        say(f"{kind:15} {len(seconds):4} inputs, {sum(seconds):6.1f} s, longest {max(seconds):.2f} s")
    return violations


def main(argv: list) -> int:
    """Command line: [COUNT] [SEED]."""
    count, seed = (int(x) for x in [*argv, "300", "0"][:2]) if len(argv) != 1 else (int(argv[0]), 0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "made")
        violations = try_all(generate(count, seed), data, Path(folder), apart=60)
    print(f"{count} inputs of seed {seed}, {len(violations)} violations, {time.monotonic() - begin:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
