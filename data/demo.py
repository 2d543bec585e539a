"""Make the demo corpus: real English from the Python installation, as shards.

    python data/demo.py [--out DIR] [--vocab N]

Documentation topics, docstrings and long comments of the standard library are cut into
documents, cleaned of duplicates and of what is not prose, split by document hash, and
written in the field's shard format with a tokenizer trained on the training part. Takes
about ten seconds; a second call finds the folder complete.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import lzma
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import textwrap
import warnings
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `data` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from data import tokens
from data.shards import (
    MANIFEST,
    TOKENIZER,
    TRAIN,
    VAL,
    VAL_BYTES,
    DataError,
    atomic_write,
    hash_in_validation,
    hex_hash,
    read_manifest,
    run_cli,
    shard_name,
    text_hash,
    write_manifest,
    write_shard,
)

SKIP = {  # folders
    "test", "tests", "idle_test", "site-packages", "dist-packages", "encodings",
    "__pycache__", "_bundled", "lib2to3", "pydoc_data", "turtledemo",
}
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIN_CHARACTERS = 200
MAX_CHARACTERS = 8000
VAL_SHARE = 0.035
VAL_BYTES_MAX = 190_000  # little validation text, so that a CPU scores it in seconds


def stdlib_files() -> list[Path]:
    """Python files of the standard library worth reading, sorted, as paths in its folder."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in SKIP)
        inside = Path(folder).relative_to(root)
        found += [inside / name for name in files if name.endswith(".py")]
    return sorted(found, key=lambda p: p.as_posix())


def input_key(vocab: int) -> str:
    """Hash of all that the result depends on: input files, this code, versions."""
    spm = tokens.need("sentencepiece", "the demo corpus")
    root = Path(sysconfig.get_paths()["stdlib"])
    here = Path(__file__).parent
    code = [(here / name).read_bytes() for name in ("demo.py", "tokens.py", "shards.py")]
    parts = [code, sys.version_info[:3], vocab, getattr(spm, "__version__", "?")]
    parts += [(p.as_posix(), (root / p).stat().st_size) for p in stdlib_files()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def docstrings_in(top: ast.AST) -> str:
    """The docstrings of a class or function and of all inside it, each with its name."""
    found = []
    for node in ast.walk(top):
        if isinstance(node, DOCUMENTED) and (doc := ast.get_docstring(node)):
            found.append(f"{node.name}: {doc}")
    return "\n\n".join(found)


def module_texts(source: str):
    """Texts of one module: docstring, one per top-level class or function, comments.

    Classes and functions that say little share a text.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    yield ast.get_docstring(tree) or ""
    short = []
    for top in tree.body:
        if not isinstance(top, DOCUMENTED):
            continue
        text = docstrings_in(top)
        if len(text) >= MIN_CHARACTERS:
            yield text
        else:
            short.append(text)
    yield "\n\n".join(filter(None, short))
    blocks = []
    for block in re.findall(r"(?:^[ \t]*#[^\n]*\n){3,}", source, flags=re.MULTILINE):
        block = re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE)
        blocks.append(block.strip())
    yield "\n\n".join(blocks)


def raw_texts():
    """All candidate texts in a fixed order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("LICENSE.txt", "LICENSE"):
        if (root / name).is_file():
            yield (root / name).read_text(encoding="utf-8", errors="replace")
    for path in stdlib_files():
        try:
            yield from module_texts((root / path).read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # for another Python version, or not UTF-8
            continue


def tidy(text: str) -> str:
    """Drop examples, rulers, trailing blanks, indentation, all but one empty line."""
    dropped = re.compile(r"\s*(>>>|\.\.\. |[-=*~_#+]{4,}\s*$)")
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    kept = "\n".join(line for line in lines if not dropped.match(line))
    return re.sub(r"\n{3,}", "\n\n", textwrap.dedent(kept)).strip()


def cut(text: str) -> list[str]:
    """Split at paragraphs into pieces of at most about MAX_CHARACTERS."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if pieces[-1] and len(pieces[-1]) + len(paragraph) > MAX_CHARACTERS:
            pieces.append("")
        pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
    return pieces


def is_prose(text: str) -> bool:
    """Mostly letters and spaces, words of ordinary length, some of the commonest words."""
    plain = sum(c.isalpha() or c.isspace() for c in text)
    words = text.split()
    common = sum(w.lower() in COMMON for w in words)
    if plain < 0.8 * len(text) or common < 0.15 * len(words):
        return False
    return len(text) < 12 * len(words)


COMMON = frozenset({
    "the", "a", "an", "of", "to", "in", "is", "and", "or", "that", "be", "for", "it",
    "this", "with", "as", "are", "if", "not", "by", "on", "from", "which", "will", "can",
    "may", "must", "should", "has", "have", "was", "when", "then", "than", "but", "at",
    "all", "any", "its",
})


def documents() -> list[str]:
    """The demo's documents, in order, without near duplicates.

    Near: the first 150 letters and digits are equal.
    """
    kept, seen = [], set()
    for text in raw_texts():
        for piece in cut(tidy(text)):
            key = re.sub(r"\W+", "", piece.lower())[:150]
            if len(piece) < MIN_CHARACTERS or key in seen or not is_prose(piece):
                continue
            seen.add(key)
            # a docstring may hold escapes for lone surrogates, which no UTF-8 text can
            kept.append(piece.encode("utf-8", "replace").decode("utf-8"))
    return kept


def split(docs: list[str]) -> tuple[dict[str, list[str]], float]:
    """({TRAIN: documents, VAL: documents}, the share of the latter), by their hashes.

    Also in the order of their hashes: a module's documents follow one another, and a
    training batch of them alone would say little.
    """
    size = sum(len(doc.encode()) for doc in docs)
    if size < 300_000:
        raise DataError(f"only {size:,} bytes of prose in this Python installation "
                        "(300,000 needed): its library has no docstrings; "
                        "use another Python, or data/build.py on own texts")
    share = min(VAL_SHARE, VAL_BYTES_MAX / size)
    sides = {TRAIN: [], VAL: []}
    for doc in sorted(docs, key=lambda doc: text_hash(doc.encode())):
        held_out = hash_in_validation(text_hash(doc.encode()), share)
        sides[VAL if held_out else TRAIN].append(doc)
    return sides, share


def write_side(folder: Path, kind: str, docs: list[str], tokenizer) -> list[dict]:
    """Write one side's shards and document hashes; their entries in the manifest."""
    ids, counts, _ = tokenizer.encode(docs)
    hashes = [text_hash(doc.encode()) for doc in docs]
    common = {
        "documents": len(docs),
        "text_bytes": int(counts.sum(dtype=np.int64)),
        "first_document": hex_hash(hashes[0]),
        "last_document": hex_hash(hashes[-1]),
    }
    outputs = {kind: ids}
    if kind == VAL:
        outputs[VAL_BYTES] = counts
    entries = []
    for name, values in outputs.items():
        file = shard_name(name, 0)
        written = write_shard(folder / file, values)
        entries.append({"name": file, "kind": name, **written, **common})
    atomic_write(folder / f"document_hashes_{kind}.bin", np.array(hashes, dtype="<u8"))
    return entries


def compressors(docs: list[str]) -> dict[str, float]:
    """Bits a byte that text compressors need for these documents, laid end to end."""
    brotli = tokens.need("brotli", "the demo corpus")
    text = "".join(docs).encode()
    packed = {
        "brotli-11": brotli.compress(text, quality=11, lgwin=24),
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(blob) / len(text) for name, blob in packed.items()}


def build(folder: Path, vocab: int, key: str) -> dict:
    """Write the demo into an empty folder; returns the manifest."""
    sides, share = split(documents())
    model = tokens.train_bpe(sides[TRAIN], vocab)
    info = atomic_write(folder / TOKENIZER, model)
    tokenizer = tokens.Tokenizer(model)
    files = []
    for kind, docs in sides.items():
        files += write_side(folder, kind, docs, tokenizer)
    return write_manifest(folder, {
        "variant": "demo",
        "input_key": key,
        "files": files,
        "tokenizer": tokenizer.describe(info),
        "split": {"rule": "hash", "share": share},
        "compressors": compressors(sides[VAL]),
    })


def is_complete(folder: Path, key: str) -> bool:
    """True when `folder` holds this very demo, with every file in its full size."""
    try:
        manifest = read_manifest(folder)
        if not manifest or manifest.get("input_key") != key:
            return False
        sizes = {f["name"]: f["size"] for f in manifest["files"]}
        sizes[TOKENIZER] = manifest["tokenizer"]["size"]
        return all((folder / n).stat().st_size == size for n, size in sizes.items())
    except (DataError, OSError, KeyError):
        return False


def make_demo(out, vocab: int = 1024) -> bool:
    """Make the demo in folder `out` unless it is there; True when it was made now.

    The folder appears whole or not at all, built beside its place and renamed. Two
    calls at once are safe.
    """
    out, key = Path(out), input_key(vocab)
    if is_complete(out, key):
        return False
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise DataError(f"{out} exists and is not a demo folder; "
                        "choose another --out or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        made = temporary / "new"
        made.mkdir()
        build(made, vocab, key)
        if out.exists():
            out.rename(temporary / "old")
        made.rename(out)
    except OSError as error:
        if not is_complete(out, key):  # unless another process was faster
            reason = f"{error.strerror}; try another --out"
            raise DataError(f"cannot write the demo to {out}: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    folder = Path(__file__).resolve().parent / "demo"
    add("--out", default=str(folder), help="folder to make")
    add("--vocab", type=int, default=1024, help="size of the tokenizer (default 1024)")
    args = parser.parse_args(arguments)
    made = make_demo(args.out, args.vocab)
    manifest = read_manifest(args.out)
    shown = []
    for f in manifest["files"]:
        if f["kind"] in (TRAIN, VAL):
            shown.append(f"{f['kind']} {f['documents']:,} documents, "
                         f"{f['tokens']:,} tokens, {f['text_bytes']:,} bytes")
    print(f"{'made' if made else 'found'} demo: {'; '.join(shown)}")
    packed = ", ".join(f"{name} {bits:.3f}" for name, bits in manifest["compressors"].items())
    print(f"the validation text alone, by text compressors, in bits a byte: {packed}")
    return 0


if __name__ == "__main__":
    run_cli(main)
