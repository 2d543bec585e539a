"""Read documents: .jsonl (plain, .xz, .zst, .gz), .parquet, and text files (.txt, .md), one document each.

Documents come in batches whose limits depend on the input alone, never on timing or the number of workers:
that is what makes the output reproducible and a stopped build continuable.
"""
from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

from data.shards import DataError, need

JSONL = (".jsonl", ".jsonl.xz", ".jsonl.zst", ".jsonl.gz")
TEXT = (".txt", ".md")
BATCH_BYTES = 1 << 21


@dataclass(frozen=True)
class Batch:
    """Some raw documents in a row: lines of JSON, or text (bytes or str)."""
    file: str                   # for messages: the file's name, or for text files the folder's
    first: int                  # number of the first item in it, from 1
    kind: str                   # "json" or "text"
    items: list                 # bytes (json, text files) or str (parquet)
    names: list | None = None   # names of text files


def find_inputs(paths, skip=None) -> list[Path]:
    """The input files named, or found in the folders named, in a fixed order; none in folder `skip`."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and kind_of(p) and not hidden(p, path)]
            found += sorted(inside, key=lambda p: p.relative_to(path).as_posix())
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif not path.is_file():
            raise DataError(f"{path}: a pipe or device; copy what it gives into a file")
        elif not kind_of(path):
            raise DataError(f"{path}: unknown kind of file; known: {', '.join(JSONL + ('.parquet',) + TEXT)}")
        else:
            found.append(path)
    skip = Path(skip).resolve() if skip else None
    found = [p for p in found if skip not in p.resolve().parents] if skip else found
    if not found:
        raise DataError(f"no documents in {', '.join(map(str, paths))}: looked for files ending in "
                        f"{', '.join(JSONL + ('.parquet',) + TEXT)}")
    return found


def hidden(path: Path, root: Path) -> bool:
    """True for files in hidden folders or with hidden names below `root`."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def kind_of(path: Path):
    """json, parquet, text, or None for files of other kinds."""
    name = path.name.lower()
    for kind, endings in (("json", JSONL), ("parquet", (".parquet",)), ("text", TEXT)):
        if name.endswith(endings):
            return kind
    return None


def open_lines(path: Path):
    """A binary stream of a possibly compressed file."""
    ending = path.suffix.lower()
    if ending == ".xz":
        return lzma.open(path, "rb")
    if ending == ".gz":
        return gzip.open(path, "rb")
    if ending == ".zst":
        zstandard = need("zstandard", f"reading {path.name}")
        reader = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
        return io.BufferedReader(reader, 1 << 20)
    return open(path, "rb", buffering=1 << 20)


def batches(files: list[Path], field: str = "text"):
    """All documents of `files` as Batches of about BATCH_BYTES, in order."""
    texts = []
    for path in files:
        kind = kind_of(path)
        if kind == "text":
            texts.append(path)
            if sum(p.stat().st_size for p in texts) >= BATCH_BYTES or len(texts) == 256:
                yield text_batch(texts)
                texts = []
            continue
        if texts:                                  # keep the order of the files
            yield text_batch(texts)
            texts = []
        yield from (json_batches(path) if kind == "json" else parquet_batches(path, field))
    if texts:
        yield text_batch(texts)


def text_batch(paths: list[Path]) -> Batch:
    """One Batch of whole text files."""
    items = []
    for path in paths:
        try:
            items.append(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return Batch(paths[0].parent.name, 1, "text", items, [p.name for p in paths])


def json_batches(path: Path):
    """Batches of whole lines."""
    first = 1
    try:
        with open_lines(path) as stream:
            while lines := stream.readlines(BATCH_BYTES):
                yield Batch(path.name, first, "json", lines)
                first += len(lines)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: damaged or unreadable after line {first - 1} ({error}); get it "
                        "again") from None
    except Exception as error:                     # the zstandard library has a class of its own
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"{path}: damaged after line {first - 1} ({error}); get it again") from None


def parquet_batches(path: Path, field: str):
    """Batches of rows of the text column."""
    parquet, first = need("pyarrow.parquet", f"reading {path.name}"), 1
    lib = need("pyarrow.lib", f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise DataError(f"{path}: no column {field!r}; it has {', '.join(file.schema_arrow.names)}: "
                                "name one with --text-field")
            for part in file.iter_batches(batch_size=512, columns=[field]):
                rows = part.column(0).to_pylist()
                yield Batch(path.name, first, "text", rows)
                first += len(rows)
    except (OSError, lib.ArrowException) as error:
        raise DataError(f"{path}: damaged or unreadable after row {first - 1} ({error}); get it "
                        "again") from None


def texts_of(batch: Batch, field: str = "text", replace: bool = False):
    """(texts, number with invalid characters) of a batch; empty documents come as "".

    Raises DataError for what is not a document. replace: put U+FFFD for invalid UTF-8 and lone surrogates.
    """
    texts, repaired = [], 0
    for i, item in enumerate(batch.items):
        unit = "line" if batch.kind == "json" else "row"
        where = batch.names[i] if batch.names else f"{batch.file}, {unit} {batch.first + i}"
        try:
            text = decode_item(batch.kind, item, field, where)
            text.encode("utf-8")
        except UnicodeError as error:
            if not replace:
                raise DataError(f"{where}: {error}; repair it, or put U+FFFD there by --invalid "
                                "replace") from None
            text, repaired = repair(batch.kind, item, field, where), repaired + 1
        texts.append(text)
    return texts, repaired


def decode_item(kind: str, item, field: str, where: str) -> str:
    """The text of one raw document."""
    if kind == "text":
        if item is None:
            return ""
        if not isinstance(item, (str, bytes)):
            raise DataError(f"{where}: column {field!r} holds {type(item).__name__}, not text; name the "
                            "column of text with --text-field")
        return item if isinstance(item, str) else item.decode("utf-8")
    if not item.strip():
        return ""
    try:
        record = json.loads(item)
    except UnicodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({str(error)[:200]}); remove or repair the line") from None
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(record, dict) and field in record and text is None:
        return ""                                 # as an empty value of Parquet: left out
    if not isinstance(text, str):
        names = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no string {field!r} in it (found: {names}); name the field with "
                        "--text-field")
    return text


def repair(kind: str, item, field: str, where: str) -> str:
    """The text of an item with U+FFFD for whatever is not valid Unicode."""
    if isinstance(item, bytes):
        item = item.decode("utf-8", "replace").encode("utf-8")
    text = decode_item(kind, item, field, where)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
