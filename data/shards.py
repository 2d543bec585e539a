"""Shared core of the data tools: the shard format, the manifest, document hashes and the split rules.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of values, zeros) followed by that many
little-endian uint16. Token shards and byte sidecars have the same layout. Every document starts with BOS (1).

A data folder holds
    fineweb_train_%06d.bin       training tokens
    fineweb_val_%06d.bin         validation tokens
    fineweb_val_bytes_%06d.bin   bytes of original text that each validation token stands for (BOS: 0)
    tokenizer.model              SentencePiece model (the byte tokenizer has one too)
    document_hashes_{train,val}.bin   uint64 per document, in order: hash of its original UTF-8 text
    manifest.json                what is in the folder, with a SHA-256 of every file
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
import sys
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
PAD, BOS, EOS, UNK = 0, 1, 2, 3      # the field's convention; ids below 4 are never text
VAL_DOCS = 50_000                    # THE split: so many first documents are validation. Nowhere else.
SHARD_TOKENS = 100_000_000           # tokens per training shard, as published
MAX_VALUE = 2 ** 16 - 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 26             # a larger one is none
MANIFEST_FORMAT = "parameter-golf-shards/1"
TOKENIZER = "tokenizer.model"
TRAIN, VAL, VAL_BYTES = "train", "val", "val_bytes"
KINDS = (TRAIN, VAL, VAL_BYTES)
_NAME = re.compile(r"fineweb_(train|val|val_bytes)_(\d+)\.bin$")


class DataError(Exception):
    """A mistake in data or arguments that a user can repair: what, where and how."""


def run_cli(main) -> None:
    """Run `main()` as a command: a DataError becomes one line and status 2, Ctrl-C 130."""
    try:
        sys.exit(main())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def in_shell(path, *inside) -> str:
    """A path as a command of a shell started here needs it.

    With `inside`, the path of that file in the repository.
    """
    if inside:
        path = os.path.relpath(Path(path).resolve().parent.parent.joinpath(*inside))
    return shlex.quote(str(path))


def need(module: str, purpose: str):
    """Import an optional library, or raise a DataError that says how to get it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(
            f"{purpose} needs the Python package {package}, "
            f"which cannot be imported ({error}); run: . .venv/bin/activate, where ./run.sh has made it, "
            f"or pip install {package} (or -r data/requirements.txt)") from None


# ----------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------
def shard_name(kind: str, index: int) -> str:
    """File name of shard `index` of `kind` (train, val or val_bytes)."""
    if kind not in KINDS:
        raise DataError(f"unknown kind of shard {kind!r}; known: {', '.join(KINDS)}")
    return f"fineweb_{kind}_{index:06d}.bin"


def parse_name(name: str):
    """(kind, index) of a shard's file name, or None; sidecars are a kind of their own."""
    match = _NAME.match(name)
    return (match[1], int(match[2])) if match else None


def list_shards(folder, kind: str) -> list[Path]:
    """Shards of one kind in a folder, by index; `val` does not match the byte sidecars."""
    found = []
    for path in Path(folder).iterdir():
        key = parse_name(path.name)
        if key and key[0] == kind:
            found.append((key, path))
    return [path for _, path in sorted(found)]


def atomic_write(path, *chunks) -> dict:
    """Write bytes-like chunks to `path`, whole or not at all; {"size", "sha256"}."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                file.write(view)
                digest.update(view)
                size += len(view)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path.name}: {error.strerror}; free some space in, "
                        f"or the rights to, the folder {path.parent}") from None
    return {"size": size, "sha256": digest.hexdigest()}


def file_sha256(path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def regular_size(path) -> int:
    """Size of a regular file; DataError for anything else: a pipe would be waited for, a device never end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{Path(path).name}: a folder, pipe or device, not a regular file; fetch or build it "
                        "again")
    return found.st_size


def header_bytes(count: int) -> np.ndarray:
    """The 256 int32 in front of `count` values."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header


def write_shard(path, values) -> dict:
    """Write integers in [0, 65535] as a shard; returns {"size", "sha256", "tokens"}."""
    values = np.asarray(values)
    name = Path(path).name
    if values.size >= 2 ** 31:
        raise DataError(f"{name}: {values.size:,} values do not fit the header's int32; "
                        "use smaller shards")
    if values.dtype != np.dtype("<u2"):
        if values.size and (values.min() < 0 or values.max() > MAX_VALUE):
            raise DataError(f"{name}: value outside 0..{MAX_VALUE} (min {values.min()}, "
                            f"max {values.max()}); shards hold uint16")
        values = values.astype("<u2")
    info = atomic_write(path, header_bytes(values.size), np.ascontiguousarray(values))
    return {**info, "tokens": int(values.size)}


def read_shard(path) -> np.ndarray:
    """Values of a shard as a read-only uint16 memory map; DataError for anything but a whole, valid shard."""
    path = Path(path)
    try:
        size = regular_size(path)
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
        header = np.frombuffer(raw[:len(raw) // 4 * 4], dtype="<u4")
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror}); check that it exists and its "
                        "permissions") from None
    if header.size < HEADER_INTS:
        raise DataError(f"{path.name}: {size} bytes, shorter than the {HEADER_BYTES}-byte header; "
                        "fetch or build it again")
    if header[0] != MAGIC or header[1] != VERSION:
        raise DataError(f"{path.name}: byte 0: magic {header[0]}, version {header[1]}; expected {MAGIC}, "
                        f"{VERSION}: not a token shard, or damaged; fetch or build it again")
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        kind = "truncated" if size < HEADER_BYTES + 2 * count else "too long"
        raise DataError(f"{path.name}: {kind}: the header promises {count:,} tokens = "
                        f"{HEADER_BYTES + 2 * count:,} bytes, the file has {size:,}; fetch or build it again")
    if count == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


# ----------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------
def text_hash(utf8: bytes) -> int:
    """64-bit content hash of a document: 8-byte BLAKE2b of its UTF-8, little-endian."""
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def hash_in_validation(value: int, share: float) -> bool:
    """Split by content: True for a `share` of all 64-bit hashes.

    Equal documents always go to the same side. The hash is scrambled first, so that the
    split is independent of other uses of its low or high bits.
    """
    return (value * 0x9E3779B97F4A7C15 % 2 ** 64) < int(share * 2 ** 64)


def hex_hash(value: int) -> str:
    """16 hexadecimal digits of a document hash, as the manifest shows it."""
    return f"{int(value):016x}"


# ----------------------------------------------------------------------------------------------------
# Manifest
# ----------------------------------------------------------------------------------------------------
def fingerprint(files: list[dict], tokenizer_sha256: str | None) -> str:
    """Identity of a data set: SHA-256 of lines "<sha256> <name>".

    Those of its shards, sorted, then its tokenizer's.
    """
    shards = [f for f in files if f.get("kind") in KINDS]
    lines = sorted(f"{f['sha256']} {f['name']}" for f in shards)
    lines.append(f"{tokenizer_sha256 or '-'} {TOKENIZER}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_manifest(folder, manifest: dict) -> dict:
    """Complete `manifest` with format and fingerprint, write it, and return it."""
    sha = (manifest.get("tokenizer") or {}).get("sha256")
    identity = fingerprint(manifest["files"], sha)
    manifest = {"format": MANIFEST_FORMAT, "fingerprint": identity, **manifest}
    text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
    atomic_write(Path(folder) / MANIFEST, text.encode())
    return manifest


def read_manifest(folder):
    """The manifest of a folder, None where there is none; DataError where it cannot be understood."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        if regular_size(path) > MANIFEST_BYTES:
            raise ValueError(f"more than {MANIFEST_BYTES:,} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{MANIFEST} in {folder} cannot be read ({str(error)[:200]}); delete it and build or "
                        "fetch again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        shown = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{MANIFEST} in {folder}: format {shown!r}, expected {MANIFEST_FORMAT!r}; another "
                        "program or version made it: move it away and run data/check.py --write-manifest")
    if fault := manifest_fault(manifest):
        raise DataError(f"{MANIFEST} in {folder} is damaged ({fault}); delete it and build or fetch again")
    return manifest


def manifest_fault(manifest: dict) -> str:
    """What in a manifest is not as write_manifest leaves it; empty: nothing."""
    def is_count(value):
        return type(value) is int and 0 <= value < 2 ** 63

    if not isinstance(manifest.get("files"), list) or not isinstance(manifest.get("fingerprint"), str):
        return "files is no list, or the fingerprint no text"
    for i, entry in enumerate(manifest["files"]):
        if not isinstance(entry, dict):
            return f"file {i} is no object"
        if not all(isinstance(entry.get(key), str) for key in ("name", "kind", "sha256")):
            return f"file {i} lacks name, kind or sha256"
        if not is_count(entry.get("size")):
            return f"file {i} lacks its size"
        if not all(is_count(entry.get(key, 0)) for key in ("tokens", "documents", "text_bytes")):
            return f"file {i} counts what is no whole number"
    if not isinstance(manifest.get("variant", ""), str):
        return "variant is no text"
    for key in ("split", "tokenizer"):      # no tokenizer: null
        if not isinstance(manifest.get(key) or {}, dict):
            return f"{key} is no object"
    described = manifest.get("tokenizer") or {"vocab_size": 0, "sha256": ""}
    if not is_count(described.get("vocab_size")) or not isinstance(described.get("sha256"), str):
        return "the tokenizer lacks vocab_size or sha256"
    return ""
