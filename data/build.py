"""Build token shards from documents.

    python data/build.py INPUT... --out DIR [--vocab N] [--caseops] [--tokenizer FILE | --bytes]

INPUT: .jsonl (also .xz, .zst, .gz), .parquet, .txt or .md files, or folders of them. Trains a lossless
tokenizer unless one is given, splits off validation documents, and writes shards, byte sidecars, document
hashes and a manifest. The output is the same for any number of workers. After an interruption of any kind the
same command goes on where it stopped; nothing appears in DIR under its final name before all is done.
"""
from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):        # run as a script: make `data` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from data import shards, sources, tokens
from data.shards import TOKENIZER, TRAIN, VAL, VAL_BYTES, DataError, need

WORK = ".build"                      # folder inside the output folder while building
SMALL = 20_000_000                   # bytes of input below which more of it becomes validation
FIELDS = {"ids": np.uint16, "bytes": np.uint16, "lengths": np.int64, "sizes": np.int64, "hashes": np.uint64}
SNAPSHOT_SECONDS = 20.0              # between two snapshots: so much work can be lost
MOST_TOKENIZER_MB = 1_000_000
MESSAGE_START, MESSAGE_END = 300, 165   # characters shown of a long error: with "error: " 480 at most
# Arrow's names of the columns whose values are text, bytes or nothing
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


@dataclass(frozen=True)
class Recipe:
    """All that the output depends on besides the input files."""
    vocab: int = 1024
    caseops: bool = False
    tokenizer: str = ""              # path of a model to use instead of training one
    bytes: bool = False              # the byte tokenizer
    split: str = "hash"              # "hash" or "first" (the first VAL_DOCS documents)
    val_share: float = 0.01
    text_field: str = "text"
    replace: bool = False
    field_rule: bool = False
    shard_tokens: int = shards.SHARD_TOKENS
    tokenizer_bytes: int = 50_000_000


# ----------------------------------------------------------------------------------------------------
# Work of one process
# ----------------------------------------------------------------------------------------------------
@dataclass
class Encoded:
    """Documents of one batch, BOS in front of each: ids and bytes (n,) uint16; the rest per document."""
    ids: np.ndarray
    bytes: np.ndarray
    lengths: np.ndarray              # int64, tokens
    sizes: np.ndarray                # int64, bytes of original UTF-8
    hashes: np.ndarray               # uint64
    repaired: int = 0                # documents with replaced characters
    empty: int = 0                   # documents without a single token, left out

    def select(self, mask: np.ndarray) -> Encoded:
        """The documents with a True in `mask`."""
        each = np.repeat(mask, self.lengths)
        return Encoded(self.ids[each], self.bytes[each], self.lengths[mask], self.sizes[mask],
                       self.hashes[mask])


class Encoder:
    """Turns batches into tokens; one per process."""

    def __init__(self, model: bytes, recipe: Recipe):
        self.tokenizer, self.recipe = tokens.Tokenizer(model, recipe.field_rule), recipe

    def __call__(self, batch: sources.Batch) -> Encoded:
        texts, repaired = sources.texts_of(batch, self.recipe.text_field, self.recipe.replace)
        try:
            ids, counts, lengths = self.tokenizer.encode(texts)
        except DataError as error:
            raise DataError(f"{batch.file}, near item {batch.first}: {error}") from None
        utf8 = [text.encode("utf-8") for text in texts]
        sizes = np.array([len(b) for b in utf8], np.int64)
        hashes = np.array([shards.text_hash(b) for b in utf8], np.uint64)
        done = Encoded(ids, counts, lengths, sizes, hashes)
        kept = lengths > 1
        if not kept.all():
            done = done.select(kept)
        self.verify(done, batch)
        done.repaired, done.empty = repaired, int((~kept).sum())
        return done

    def verify(self, done: Encoded, batch: sources.Batch) -> None:
        """Every byte of every document must be accounted for."""
        if not done.lengths.size or self.recipe.field_rule and not self.tokenizer.lossless:
            return
        sums = np.add.reduceat(done.bytes.astype(np.int64), np.cumsum(done.lengths) - done.lengths)
        wrong = np.flatnonzero(sums != done.sizes)
        if wrong.size:
            i = int(wrong[0])
            raise DataError(f"{batch.file}, near item {batch.first + i}: the tokens account for {sums[i]:,} "
                            f"bytes of {done.sizes[i]:,}; this tokenizer cannot be used")


_encoder = None


def start_worker(model: bytes, recipe: Recipe, parent: int) -> None:
    """Prepare a worker process; it ends by itself should its parent be killed."""
    global _encoder

    def watch():              # `parent` is told, not asked for: it may be gone by now
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _encoder = Encoder(model, recipe)


def work(batch: sources.Batch) -> Encoded:
    """Encode a batch in a worker process."""
    return _encoder(batch)


def encode_all(batches, model: bytes, recipe: Recipe, workers: int):
    """(batch, Encoded) for all batches, in order, whatever the number of workers."""
    if workers <= 1:
        encoder = Encoder(model, recipe)
        for batch in batches:
            yield encoder(batch)
        return
    # spawned, not forked: no state of this process can leak into the workers
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker,
                               (model, recipe, os.getpid()))
    waiting = collections.deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * workers:       # bounds memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process ended unexpectedly, probably for lack of memory; run the same "
                        "command again to go on, with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------
class Side:
    """Training or validation documents on their way into shards, each shard holding whole documents."""

    def __init__(self, kind: str, folder: Path, limit: int):
        self.kind, self.folder, self.limit = kind, folder, limit
        self.files, self.hashes, self.pending, self.tokens = [], [], [], 0

    def add(self, part: Encoded) -> None:
        """Append documents; writes shards as they fill up."""
        if part.lengths.size:
            self.pending.append(part)
            self.hashes.append(part.hashes)
            self.tokens += part.ids.size
        if self.tokens > self.limit:
            self.write(last=False)

    def joined(self) -> Encoded:
        """All pending documents in one piece."""
        return Encoded(*(np.concatenate([np.zeros(0, dtype), *(getattr(p, name) for p in self.pending)])
                         for name, dtype in FIELDS.items()))

    def write(self, last: bool) -> None:
        """Write full shards, and at the end what is left."""
        part = self.joined()
        while part.ids.size > self.limit or last and part.ids.size:
            fits = max(1, int(np.searchsorted(np.cumsum(part.lengths), self.limit, side="right")))
            self.write_shard(part.select(np.arange(part.lengths.size) < fits))
            part = part.select(np.arange(part.lengths.size) >= fits)
        self.pending, self.tokens = [part], part.ids.size

    def write_shard(self, part: Encoded) -> None:
        """One shard, with its sidecar on the validation side."""
        index = sum(f["kind"] == self.kind for f in self.files)
        outputs = [(self.kind, part.ids)] + ([(VAL_BYTES, part.bytes)] if self.kind == VAL else [])
        for kind, values in outputs:
            name = shards.shard_name(kind, index)
            self.files.append({
                "name": name, "kind": kind, **shards.write_shard(self.folder / name, values),
                "documents": int(part.lengths.size), "text_bytes": int(part.sizes.sum()),
                "first_document": shards.hex_hash(part.hashes[0]),
                "last_document": shards.hex_hash(part.hashes[-1])})


class Output:
    """The folder being built: both sides, the split, the statistics, and a snapshot to go on from."""

    def __init__(self, work_folder: Path, recipe: Recipe, key: str):
        self.folder, self.recipe, self.key = work_folder, recipe, key
        self.sides = {kind: Side(kind, work_folder, recipe.shard_tokens) for kind in (TRAIN, VAL)}
        self.counts = {"batches": 0, "documents": 0, "empty": 0, "repaired": 0, "duplicates_of_validation": 0}
        self.load()

    def add(self, part: Encoded) -> None:
        """Distribute one batch, in input order."""
        if self.recipe.split == "first":
            number = self.counts["documents"] + np.arange(part.lengths.size)
            is_val = number < shards.VAL_DOCS
        else:
            share = self.recipe.val_share
            is_val = np.array([shards.hash_in_validation(int(h), share) for h in part.hashes], bool)
        if is_val.any():
            self.sides[VAL].add(part.select(is_val))
        if not is_val.all():
            train = part.select(~is_val)
            # a training document with the text of a validation document would be a leak: it is dropped
            leak = np.isin(train.hashes, self.validation_hashes()) if self.recipe.split == "first" else None
            if leak is not None and leak.any():
                self.counts["duplicates_of_validation"] += int(leak.sum())
                train = train.select(~leak)
            self.sides[TRAIN].add(train)
        self.counts["batches"] += 1
        self.counts["documents"] += int(part.lengths.size)
        self.counts["empty"] += part.empty
        self.counts["repaired"] += part.repaired

    def validation_hashes(self) -> np.ndarray:
        """Hashes of all validation documents; complete when the first training document comes."""
        return np.concatenate([np.zeros(0, np.uint64), *self.sides[VAL].hashes])

    def save(self) -> None:
        """Snapshot for going on after an interruption; replaces the one before in one move."""
        state = {"key": self.key, "counts": self.counts,
                 "files": {kind: side.files for kind, side in self.sides.items()}}
        arrays = {"state": np.frombuffer(json.dumps(state).encode(), np.uint8)}
        for kind, side in self.sides.items():
            part = side.joined()
            for name in FIELDS:
                arrays[f"{kind}.{name}"] = getattr(part, name)
            arrays[f"{kind}.all"] = np.concatenate([np.zeros(0, np.uint64), *side.hashes])
        temporary = self.folder / "state.tmp.npz"
        try:
            np.savez(temporary, **arrays)
        except OSError as error:
            raise DataError(f"cannot save the state of the build: {error.strerror}; free some disk space and "
                            "run the same command again") from None
        os.replace(temporary, self.folder / "state.npz")

    def load(self) -> None:
        """Take up a snapshot of the same build, if there is one."""
        path = self.folder / "state.npz"
        if not path.exists():
            return
        with np.load(path) as arrays:
            state = json.loads(arrays["state"].tobytes())
            if state["key"] != self.key:
                return
            self.counts = state["counts"]
            for kind, side in self.sides.items():
                part = Encoded(*(arrays[f"{kind}.{name}"] for name in FIELDS))
                side.files, side.hashes = state["files"][kind], [arrays[f"{kind}.all"]]
                side.pending, side.tokens = [part], part.ids.size

    def finish(self) -> None:
        """Write what is left; refuses a build with an empty side."""
        for kind, side in self.sides.items():
            side.write(last=True)
            if not side.files:
                remedy = (
                    f"the split takes the first {shards.VAL_DOCS:,} documents; use --split hash for small "
                    "corpora" if self.recipe.split == "first" else
                    f"a share of {self.recipe.val_share:g} of {self.counts['documents']:,} documents; change "
                    "--val-share or add documents")
                raise DataError(f"no {'training' if kind == TRAIN else 'validation'} documents: {remedy}")
            hashes = np.concatenate(side.hashes).astype("<u8")
            shards.atomic_write(self.folder / f"document_hashes_{kind}.bin", hashes)


# ----------------------------------------------------------------------------------------------------
# The build
# ----------------------------------------------------------------------------------------------------
def build(inputs, out, recipe: Recipe, workers: int = 1, report=print,
          pause: float = SNAPSHOT_SECONDS) -> dict:
    """Build shards of the documents in `inputs` in folder `out`; returns the manifest. Raises DataError.

    pause: seconds between snapshots for going on after an interruption.
    """
    out = Path(out)
    check_recipe(recipe)
    files = sources.find_inputs(inputs, skip=out)
    key = build_key(files, recipe)
    manifest = finished(out, key)
    if manifest:
        report(f"{out} is complete already")
        return manifest
    check_columns(files, recipe.text_field)
    folder = out / WORK
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out}: {error.strerror}; choose another --out") from None
    output = Output(folder, recipe, key)
    model = get_tokenizer(folder, files, recipe, key, report)
    skip = output.counts["batches"]
    if skip:
        report(f"going on after document {output.counts['documents']:,}")
    batches = (b for i, b in enumerate(sources.batches(files, recipe.text_field)) if i >= skip)
    saved, bar = time.monotonic(), progress_bar()
    for part in encode_all(batches, model, recipe, workers):
        output.add(part)
        bar(int(part.sizes.sum()))
        if time.monotonic() - saved > pause:
            output.save()
            saved = time.monotonic()
    bar(None)
    output.finish()
    return publish(out, folder, output, files, model, key)


def check_recipe(recipe: Recipe) -> None:
    """Refuse contradictory settings before any work."""
    if recipe.bytes and (recipe.tokenizer or recipe.caseops):
        raise DataError("--bytes cannot be combined with --tokenizer or --caseops; choose one")
    if not 0 < recipe.val_share < 1:
        raise DataError(f"--val-share {recipe.val_share:g}: must be above 0 and below 1")
    if not 1000 <= recipe.shard_tokens < 2 ** 31:
        raise DataError(f"--shard-tokens {recipe.shard_tokens}: must be 1,000 to 2,147,483,647")
    if recipe.tokenizer and not Path(recipe.tokenizer).is_file():
        raise DataError(f"--tokenizer {recipe.tokenizer}: no such file")


def check_columns(files, field: str) -> None:
    """Refuse Parquet columns of another type than text before any work.

    The values of some, as times out of range, could not even be read to be refused.
    """
    for path in files:
        if sources.kind_of(path) != "parquet":
            continue
        for kind in column_types(path, field):
            if not holds_text(kind):
                raise DataError(f"{path}: column {field!r} holds {kind}, not text; name the column of text "
                                "with --text-field")


def column_types(path: Path, field: str) -> list:
    """The Arrow types of a Parquet file's columns of one name; none if it is damaged."""
    parquet = need("pyarrow.parquet", f"reading {path.name}")
    lib = need("pyarrow.lib", f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            return [column.type for column in file.schema_arrow if column.name == field]
    except (OSError, lib.ArrowException):         # the error of reading it names the damage
        return []


def holds_text(kind) -> bool:
    """True if values of this Arrow type come as text, bytes or None."""
    types = need("pyarrow.types", "reading Parquet files")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in TEXT_TYPES or types.is_fixed_size_binary(kind)


def build_key(files, recipe: Recipe) -> str:
    """Hash of everything the output depends on."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    model = shards.file_sha256(recipe.tokenizer) if recipe.tokenizer else ""
    fields = {**vars(recipe), "tokenizer": model}
    return hashlib.sha256(repr((stats, sorted(fields.items()))).encode()).hexdigest()


def finished(out: Path, key: str):
    """The manifest, if `out` holds this very build. Refuses folders with other shards in them."""
    if not out.is_dir():
        return None
    manifest = shards.read_manifest(out)
    if manifest and manifest.get("input_key") == key:
        return manifest
    if manifest or not (out / WORK).is_dir() and any(map(shards.parse_name, os.listdir(out))):
        raise DataError(f"{out} holds shards of another build (other inputs or settings); choose another "
                        "--out or delete it")
    return None


def get_tokenizer(folder: Path, files, recipe: Recipe, key: str, report) -> bytes:
    """The tokenizer: given, made, or trained on the training documents (once, kept for continued builds)."""
    if recipe.bytes:
        return tokens.byte_model()
    if recipe.tokenizer:
        return Path(recipe.tokenizer).read_bytes()
    path = folder / f"tokenizer.{key[:16]}.model"
    if not path.is_file():
        report(f"training a {'CaseOps ' if recipe.caseops else ''}tokenizer of {recipe.vocab:,} pieces")
        texts = training_texts(files, recipe)
        model = tokens.train_bpe(texts, recipe.vocab, recipe.caseops, recipe.tokenizer_bytes)
        shards.atomic_write(path, model)
    return path.read_bytes()


def training_texts(files, recipe: Recipe):
    """Texts of the training side, in order: a tokenizer must not have seen validation text."""
    number = 0
    for batch in sources.batches(files, recipe.text_field):
        for text in sources.texts_of(batch, recipe.text_field, recipe.replace)[0]:
            if not text:                          # empty documents are left out and not counted
                continue
            number += 1
            if recipe.split == "first":
                is_val = number <= shards.VAL_DOCS
            else:
                is_val = shards.hash_in_validation(shards.text_hash(text.encode()), recipe.val_share)
            if not is_val:
                yield text


def publish(out: Path, folder: Path, output: Output, files, model: bytes, key: str) -> dict:
    """Move the finished files to their places, the manifest last."""
    tokenizer = tokens.Tokenizer(model)
    info = shards.atomic_write(folder / TOKENIZER, model)
    parts = [f for side in output.sides.values() for f in side.files]
    hash_files = [f"document_hashes_{kind}.bin" for kind in (TRAIN, VAL)]
    for name in [*(f["name"] for f in parts), *hash_files, TOKENIZER]:
        if (folder / name).exists():             # else moved before an interruption
            os.replace(folder / name, out / name)
    recipe, counts = output.recipe, output.counts
    split = {"rule": recipe.split}
    split.update({"val_docs": shards.VAL_DOCS} if recipe.split == "first" else {"share": recipe.val_share})
    manifest = {
        "variant": variant_name(tokenizer), "input_key": key, "files": parts,
        "tokenizer": tokenizer.describe(info), "split": split,
        "decodable_val_bytes": decodable(out, parts, tokenizer),
        "source": {"files": [{"name": p.name, "size": p.stat().st_size} for p in files],
                   **{k: v for k, v in counts.items() if k != "batches"}}}
    written = shards.write_manifest(out, manifest)
    shutil.rmtree(folder)
    return written


def variant_name(tokenizer: tokens.Tokenizer) -> str:
    """Short name as the field uses it: sp8192, sp8192_caseops, byte260."""
    if tokenizer.kind == tokens.BYTES:
        return f"byte{tokenizer.vocab_size}"
    return f"sp{tokenizer.vocab_size}" + ("_caseops" if tokenizer.kind == tokens.CASEOPS else "")


def decodable(out: Path, parts: list[dict], tokenizer: tokens.Tokenizer) -> int:
    """Bytes of validation text that the tokens determine: not all if the tokenizer normalises."""
    val = [f for f in parts if f["kind"] == VAL]
    if tokenizer.lossless:
        return sum(f["text_bytes"] for f in val)
    total = 0
    for f in val:
        ids = shards.read_shard(out / f["name"])
        for document in np.split(ids, np.flatnonzero(ids == shards.BOS)[1:]):
            total += tokenizer.decodable_bytes(document[1:])
    return total


def progress_bar():
    """A function that takes numbers of bytes done, and None at the end; draws a bar on terminals."""
    try:
        from tqdm import tqdm
    except ImportError:                           # only a bar
        return lambda size: None
    bar = tqdm(unit="B", unit_scale=True, desc="text", disable=None)
    return lambda size: bar.close() if size is None else bar.update(size)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def megabytes(text: str) -> float:
    """The value of --tokenizer-mb, at least one byte; DataError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-6 <= value <= MOST_TOKENIZER_MB:    # nan is refused too
        raise DataError(f"--tokenizer-mb {text}: must be a number above 0, at most {MOST_TOKENIZER_MB:,}")
    return value


def one_line(message: str) -> str:
    """An error's text as one printable line; of a long one the beginning, and the end with the remedy."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    if len(shown) > MESSAGE_START + MESSAGE_END:
        shown = f"{shown[:MESSAGE_START]} ... {shown[-MESSAGE_END:]}"
    return shown


def parse(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description="Build token shards from documents.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files or folders of documents")
    parser.add_argument("--out", required=True, help="folder for the shards")
    parser.add_argument("--vocab", type=int, default=1024, help="pieces of the tokenizer to train (1024)")
    parser.add_argument("--caseops", action="store_true", help="lossless case transform before tokenising")
    parser.add_argument("--tokenizer", default="", help="SentencePiece model to use instead of training one")
    parser.add_argument("--bytes", action="store_true", help="byte tokenizer (vocabulary 260)")
    parser.add_argument("--split", choices=("hash", "first"), default="hash",
                        help=f"validation: by document hash, or the first {shards.VAL_DOCS:,} documents")
    parser.add_argument("--val-share", type=float, default=None,
                        help="share of documents for validation with --split hash (0.01; below 20 MB: 0.1)")
    parser.add_argument("--text-field", default="text", help="JSON field or Parquet column (text)")
    parser.add_argument("--invalid", choices=("error", "replace"), default="error",
                        help="what to do with invalid Unicode: stop, or put U+FFFD")
    parser.add_argument("--field-bytes", action="store_true",
                        help="leave white space that a tokenizer strips uncounted, as published sidecars do")
    parser.add_argument("--shard-tokens", type=int, default=shards.SHARD_TOKENS, help="tokens per shard")
    parser.add_argument("--tokenizer-mb", type=megabytes, default=50,
                        help="MB of text to train the tokenizer on (50)")
    parser.add_argument("--snapshot-seconds", type=float, default=SNAPSHOT_SECONDS,
                        help=f"work that an interruption may cost ({SNAPSHOT_SECONDS:g} s)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (all cores)")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    """Command line; the text of a DataError from here is one printable line."""
    try:
        return run(arguments)
    except DataError as error:
        raise DataError(one_line(str(error))) from None


def run(arguments) -> int:
    """Build as the command line says, and print what was made."""
    args, start = parse(arguments), time.monotonic()
    share = args.val_share
    if share is None:
        size = sum(p.stat().st_size for p in sources.find_inputs(args.inputs, skip=args.out))
        share = 0.1 if size < SMALL else 0.01
    recipe = Recipe(args.vocab, args.caseops, args.tokenizer, args.bytes, args.split, share, args.text_field,
                    args.invalid == "replace", args.field_bytes, args.shard_tokens,
                    int(args.tokenizer_mb * 1e6))
    manifest = build(args.inputs, args.out, recipe, max(1, args.workers), pause=args.snapshot_seconds)
    seconds = time.monotonic() - start
    for kind in (TRAIN, VAL):
        mine = [f for f in manifest["files"] if f["kind"] == kind]
        totals = {key: sum(f[key] for f in mine) for key in ("documents", "tokens", "text_bytes")}
        print(f"{kind}: {len(mine)} shards, {totals['documents']:,} documents, {totals['tokens']:,} tokens, "
              f"{totals['text_bytes']:,} bytes of text")
    size = sum(f["text_bytes"] for f in manifest["files"] if f["kind"] != VAL_BYTES)
    print(f"{manifest['variant']} in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.1f} MB/s of text); "
          f"fingerprint {manifest['fingerprint'][:16]}")
    print(f"next: python {shards.in_shell(__file__, 'data', 'check.py')} {shards.in_shell(args.out)}")
    return 0


if __name__ == "__main__":
    shards.run_cli(main)
