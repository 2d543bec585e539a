"""Check a folder of shards before any time is spent on it.

    python data/check.py DIR [--tokenizer FILE] [--quick] [--custom] [--allow-overlap N] [--write-manifest]

Prints one line per finding (what, where, remedy) and what the folder holds; exit status 1 if anything is
wrong. --quick leaves out what has to read every token. A folder without a manifest must hold the published
FineWeb split (50,000 validation documents) unless --custom says that it is another corpus.
"""
from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):        # run as a script: make `data` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from data import shards, tokens
from data.shards import BOS, MANIFEST, TOKENIZER, TRAIN, VAL, VAL_BYTES, DataError
from data.variants import by_name
from data.wire import BYTE, CONTROL, UNKNOWN, UNUSED

AGAIN = "fetch or build it again"
NO_TEXT = (CONTROL, UNKNOWN, UNUSED)         # kinds of pieces that stand for none


@dataclass(frozen=True)
class Finding:
    """Something wrong: where (file, position in tokens or ""), what, and what to do about it."""
    file: str
    position: str
    message: str
    remedy: str

    def __str__(self):
        where = f"{self.file}, {self.position}" if self.position else self.file
        return f"{where}: {self.message}; {self.remedy}"


@dataclass
class Report:
    """Result of a check: findings (empty = good), notes for people, and the data's identity."""
    findings: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    fingerprint: str = ""
    documents: dict = field(default_factory=dict)       # per kind
    tokens: dict = field(default_factory=dict)
    counted_bytes: int = 0                              # by the sidecars
    decodable_bytes: int = 0                            # that the validation tokens determine
    tokenizer: tokens.Tokenizer | None = None

    def add(self, file, position, message, remedy):
        """Add a finding; `file` may be a path, of which the name is shown."""
        self.findings.append(Finding(Path(file).name, position, message, remedy))


def check(folder, tokenizer=None, full: bool = True, custom: bool = False, allow_overlap: int = 0) -> Report:
    """Check all there is in `folder`; never raises for faults of the data, they are in the report.

    tokenizer: path of the model to check against (default: tokenizer.model in the folder).
    full: read all tokens.
    custom: without a manifest, accept another split than the published one.
    allow_overlap: training documents equal to validation documents to put up with.
    """
    report = Report()
    files = find_files(Path(folder), report)
    if report.findings:
        return report
    manifest = load_manifest(Path(folder), report)
    data = open_shards(files, report)
    whole = not report.findings               # else counts would only say the same again, less clearly
    check_manifest(Path(folder), manifest, files, full, report)
    model = report.tokenizer = load_tokenizer(Path(folder), tokenizer, manifest, report)
    described = (manifest or {}).get("tokenizer") or {}
    vocab = model.vocab_size if model else described.get("vocab_size")
    if whole:
        check_split(manifest, data, custom, report)
    for path, ids in data[VAL] + (data[TRAIN] if full else []):
        check_tokens(path, ids, vocab, report)
    if whole:
        check_sidecars(data, model, manifest, full, report)
    if whole and full and model and not data[VAL_BYTES] and not report.findings:
        check_byte_rule(data, model, report)
    if full and not report.findings:
        check_hashes(Path(folder), data, model, manifest, report)
        check_overlap(data, allow_overlap, report)
    finish(data, manifest, whole, report)
    return report


def find_files(folder: Path, report: Report) -> dict:
    """Paths by kind; a finding where the folder or a kind is missing."""
    try:
        files = {kind: shards.list_shards(folder, kind) for kind in shards.KINDS}
    except OSError as error:
        report.add(folder, "", f"cannot be read ({error.strerror})", "give a folder with shards (DATA_PATH)")
        return {}
    for kind in (TRAIN, VAL):
        if not files[kind]:
            unfinished = (folder / ".build").is_dir()
            report.add(folder, "", f"no {shards.shard_name(kind, 0).replace('000000', '*')} in it" +
                       (": a build in it is unfinished" if unfinished else ""),
                       "run the same data/build.py command again" if unfinished else
                       "make shards with data/build.py or data/fetch.py, or correct the path")
    return files


def load_manifest(folder: Path, report: Report):
    """The manifest or None; a damaged one is a finding."""
    try:
        return shards.read_manifest(folder)
    except DataError as error:
        report.add(MANIFEST, "", str(error), "see there")
        return None


def open_shards(files: dict, report: Report) -> dict:
    """kind -> list of (path, uint16 values) of the shards that can be read."""
    data = {kind: [] for kind in shards.KINDS}
    for kind, paths in files.items():
        for path in paths:
            try:
                data[kind].append((path, shards.read_shard(path)))
            except DataError as error:
                name, _, rest = str(error).partition(": ")
                message, _, remedy = rest.rpartition("; ")
                report.add(name, "", message, remedy)
    return data


def check_manifest(folder: Path, manifest, files: dict, full: bool, report: Report) -> None:
    """The manifest's fingerprint, and files against it: presence, size, and with `full` the SHA-256."""
    if not manifest:
        report.notes.append("no manifest.json: origin unknown, hashes not checked")
        return
    if is_fingerprint(manifest["fingerprint"]):
        report.fingerprint = manifest["fingerprint"]
    else:
        report.add(MANIFEST, "", "its fingerprint is not 64 hexadecimal digits: damaged", AGAIN)
    listed = {f["name"]: f for f in manifest["files"]}
    present = {p.name: p for paths in files.values() for p in paths}
    for name in sorted(present.keys() - listed.keys()):
        report.add(name, "", "not in manifest.json: it comes from elsewhere", "move it out of the folder")
    for name, entry in sorted(listed.items()):
        path = present.get(name)
        if not path:
            report.add(name, "", "listed in manifest.json but not there", AGAIN)
        elif path.stat().st_size != entry["size"]:
            report.add(name, "", f"{path.stat().st_size:,} bytes, the manifest says {entry['size']:,}", AGAIN)
        elif full and readable(path) and shards.file_sha256(path) != entry["sha256"]:
            report.add(name, "", "its SHA-256 differs from the manifest's: damaged or exchanged", AGAIN)


def is_fingerprint(text: str) -> bool:
    """True for 64 hexadecimal digits, as shards.fingerprint makes them; nothing else may be printed."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def readable(path: Path) -> bool:
    """True if the file can be opened; why not has been reported before."""
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def load_tokenizer(folder: Path, path, manifest, report: Report):
    """The tokenizer, or None where there is none; checked against the manifest's hash and vocabulary."""
    path = Path(path) if path else folder / TOKENIZER
    if not path.exists():
        if manifest and manifest.get("tokenizer"):
            report.add(path, "", "the tokenizer is missing", "copy it there, or name it with --tokenizer")
        else:
            report.notes.append("no tokenizer: ids and bytes not checked against one")
        return None
    try:
        shards.regular_size(path)
        model = tokens.Tokenizer(path.read_bytes())
    except (DataError, OSError) as error:
        report.add(path, "", str(error), "use the tokenizer the shards were made with")
        return None
    entry = (manifest or {}).get("tokenizer") or {}
    if entry.get("sha256") and shards.file_sha256(path) != entry["sha256"]:
        report.add(path, "", f"not the tokenizer the shards were made with ({model.vocab_size:,} pieces; the "
                   f"manifest names one of {entry['vocab_size']:,} pieces with SHA-256 "
                   f"{entry['sha256'][:16]}…)", "use that one (TOKENIZER_PATH)")
        return None
    return model


def check_split(manifest, data: dict, custom: bool, report: Report) -> None:
    """The number of validation documents, and of tokens where they are published facts."""
    found = sum(int((ids == BOS).sum()) for _, ids in data[VAL])
    split = (manifest or {}).get("split") or {}
    canonical = split.get("rule") == "first" or not manifest and not custom
    name = data[VAL][0][0] if data[VAL] else VAL
    if canonical and found != shards.VAL_DOCS:
        report.add(name, "", f"{found:,} validation documents (BOS tokens); the competition's split is the "
                   f"first {shards.VAL_DOCS:,}: scores on anything else do not count, and the others may be "
                   "in the training shards",
                   f"{AGAIN}; for a corpus of your own use data/build.py or --custom")
    variant = by_name((manifest or {}).get("variant", ""))
    count = sum(ids.size for _, ids in data[VAL])
    if canonical and variant and variant.val_targets and count - variant.val_targets not in (0, 1):
        report.add(name, "",
                   f"{count:,} validation tokens; published: {variant.val_targets:,} to be predicted", AGAIN)


def check_tokens(path: Path, ids: np.ndarray, vocab, report: Report) -> None:
    """One token shard: BOS in its place, no id outside the vocabulary."""
    if not ids.size:
        report.add(path, "", "no tokens in it", AGAIN)
        return
    kind, index = shards.parse_name(path.name)
    if ids[0] == 0 and kind == VAL:
        report.add(path, "token 0", "id 0 instead of BOS (1): this is a byte sidecar, not tokens",
                   f"restore the token shard; sidecars are called {shards.shard_name(VAL_BYTES, index)}")
        return
    if kind == VAL and (ids == BOS).all():
        report.add(path, "", "all its documents are empty: there is nothing to be predicted", AGAIN)
        return
    if not (ids == BOS).any():
        report.add(path, "", f"no BOS (id {BOS}) in {ids.size:,} tokens: documents cannot be told apart",
                   "build the shards with BOS in front of every document")
        return
    # published training shards are cut anywhere, so only the first of each kind has to begin a document
    if ids[0] != BOS and index == 0:
        report.add(path, "token 0",
                   f"id {int(ids[0])} instead of BOS ({BOS}): the shard does not begin with a document",
                   AGAIN)
    if vocab:
        highest = int(ids.max())
        if highest >= vocab:
            at = int(np.argmax(ids >= vocab))
            report.add(path, f"token {at:,}",
                       f"id {int(ids[at])} (highest: {highest}) is outside the vocabulary of {vocab:,}",
                       "use the tokenizer the shards were made with, or build them again")


def check_sidecars(data: dict, model, manifest, full: bool, report: Report) -> None:
    """Byte sidecars against the validation shards and the tokenizer; sums the bytes."""
    sidecars = {shards.parse_name(p.name)[1]: (p, values) for p, values in data[VAL_BYTES]}
    texts = {f["name"]: f.get("text_bytes") for f in (manifest or {}).get("files", [])}
    if not sidecars and model and model.kind == tokens.CASEOPS:
        report.add(shards.shard_name(VAL_BYTES, 0), "", "missing: a CaseOps score needs the byte sidecar",
                   AGAIN)
    for path, ids in data[VAL]:
        index = shards.parse_name(path.name)[1]
        if index not in sidecars:
            if sidecars:
                report.add(shards.shard_name(VAL_BYTES, index), "", f"missing: the sidecar of {path.name}",
                           AGAIN)
            continue
        side, values = sidecars.pop(index)
        if values.size != ids.size:
            report.add(side, "", f"{values.size:,} values for the {ids.size:,} tokens of {path.name}: it "
                       "belongs to other shards", AGAIN)
            continue
        if check_sidecar(path, ids, side, values, model, full, report):
            total = int(values.sum(dtype=np.int64))
            report.counted_bytes += total
            if texts.get(side.name) not in (None, total):
                report.add(side, "", f"its bytes sum to {total:,}, the documents have {texts[side.name]:,}",
                           AGAIN)
    for path, _ in sidecars.values():
        report.add(path, "", "a sidecar without its validation shard", AGAIN)


def check_sidecar(path: Path, ids, side: Path, values, model, full: bool, report: Report) -> bool:
    """One sidecar, value by value; True if it is good. Adds up the decodable bytes."""
    wrong = np.flatnonzero((ids == BOS) & (values != 0))
    if wrong.size:
        report.add(side, f"token {int(wrong[0]):,}",
                   f"{int(values[wrong[0]])} bytes for a BOS token: it belongs to other tokens than those of "
                   f"{path.name}, or was exchanged with them", AGAIN)
        return False
    if not values.any():
        report.add(side, "", "it counts no bytes at all", AGAIN)
        return False
    if not full or not model or int(ids.max()) >= model.vocab_size:
        return True
    if not model.lossless:
        report.decodable_bytes += sum(model.decodable_bytes(d) for d in documents(ids))
        return True
    expected = model.count(ids)
    wrong = np.flatnonzero(expected != values)
    if wrong.size:
        at = int(wrong[0])
        report.add(side, f"token {at:,}",
                   f"{int(values[at])} bytes for token {int(ids[at])}, which stands for {int(expected[at])} "
                   f"({wrong.size:,} such): not the sidecar of {path.name}", AGAIN)
        return False
    report.decodable_bytes += int(expected.sum())
    return True


def check_byte_rule(data: dict, model, report: Report) -> None:
    """Without sidecars a score counts bytes by the published table, to which only a piece's first U+2581 is a
    space: at most 1 % more than the pieces spell, over all documents."""
    silent = np.array([kind in NO_TEXT for _, kind in model.spec.pieces])
    byte = np.array([kind == BYTE for _, kind in model.spec.pieces])
    lead = np.array([name.startswith(tokens.SPACE) for name, _ in model.spec.pieces]) & ~silent
    behind = [name.removeprefix(tokens.SPACE) for name, _ in model.spec.pieces]
    table = np.array([len(text.encode()) for text in behind])
    own = np.array([len(text.replace(tokens.SPACE, " ").encode()) for text in behind])
    table, own = (np.where(silent, 0, np.where(byte, 1, sizes)) for sizes in (table, own))
    counted = decoded = 0
    for _, ids in data[VAL]:
        spaces = int((lead[ids[1:]] & ~silent[ids[:-1]]).sum())
        counted += int(table[ids[1:]].sum()) + spaces
        decoded += int(own[ids[1:]].sum()) + spaces
    if counted > 1.01 * decoded:
        report.add(data[VAL][0][0], "",
                   f"the byte rule counts {counted:,} bytes in {decoded:,}: scores would be too good",
                   "build the shards again with sidecars, or with a tokenizer that has no pieces of several "
                   "spaces")


def documents(ids: np.ndarray) -> list[np.ndarray]:
    """The documents of one shard without their BOS; what stands before the first BOS is left out."""
    starts = np.flatnonzero(ids == BOS)
    ends = np.append(starts, ids.size)[1:]
    return [ids[a + 1:b] for a, b in zip(starts, ends, strict=True)]


def check_hashes(folder: Path, data: dict, model, manifest, report: Report) -> None:
    """Stored hashes: as many as documents, validation's against the decoded texts and training's hashes."""
    stored = {kind: folder / f"document_hashes_{kind}.bin" for kind in (TRAIN, VAL)}
    if not all(p.is_file() for p in stored.values()):
        return
    try:
        hashes = {kind: np.fromfile(p, "<u8") for kind, p in stored.items()}
    except OSError as error:
        report.add(error.filename, "", f"cannot be read ({error.strerror})", "check its permissions")
        return
    for kind, path in stored.items():
        told = [f.get("documents") for f in (manifest or {}).get("files", []) if f["kind"] == kind]
        if told and None not in told and sum(told) != hashes[kind].size:
            report.add(path, "", f"{hashes[kind].size:,} hashes for {sum(told):,} documents", AGAIN)
    if model and model.lossless:
        texts = [model.decode(d) for _, ids in data[VAL] for d in documents(ids)]
        found = np.array([shards.text_hash(t.encode("utf-8", "replace")) for t in texts], np.uint64)
        wrong = found != hashes[VAL] if found.size == hashes[VAL].size else np.ones(1, bool)
        if wrong.any():
            report.add(stored[VAL], f"document {int(np.argmax(wrong)):,}",
                       "the decoded text has another hash than when the shards were made", AGAIN)
    both = np.flatnonzero(np.isin(hashes[TRAIN], hashes[VAL]))
    if both.size:
        report.add(stored[TRAIN], f"document {int(both[0]):,}",
                   f"{both.size:,} training documents are validation documents",
                   "build the shards again: data/build.py keeps the sides apart")


def hash_documents(paths_and_ids):
    """Yield per shard (path, positions, hashes uint64) of its documents, BOS left out; positions in tokens.

    A document that goes on in the next shard is joined when that shard follows by number, and belongs to the
    shard where it begins; then it is yielded on its own. Documents without tokens are left out.
    """
    carried, previous = None, None
    for path, ids in paths_and_ids:
        _, index = shards.parse_name(path.name)
        starts = np.flatnonzero(ids == BOS)
        head = ids[:int(starts[0])] if starts.size else ids
        if carried is not None and previous == index - 1:
            carried[2].append(head.tobytes())
        if carried is not None and (starts.size or previous != index - 1):
            yield carried[0], *hashed([carried[1]], [b"".join(carried[2])])
            carried = None
        previous = index
        if not starts.size:
            continue
        raw = memoryview(np.ascontiguousarray(ids)).cast("B")
        edges = (2 * starts).tolist()
        yield path, *hashed(starts[:-1], [raw[a + 2:b] for a, b in zip(edges, edges[1:], strict=False)])
        carried = path, int(starts[-1]), [bytes(raw[edges[-1] + 2:])]
    if carried is not None:
        yield carried[0], *hashed([carried[1]], [b"".join(carried[2])])


def hashed(positions, contents):
    """(positions, 64-bit BLAKE2b) of the non-empty contents."""
    digests = b"".join([hashlib.blake2b(c, digest_size=8).digest() for c in contents])
    filled = np.array([len(c) > 0 for c in contents], bool)
    return np.asarray(positions, np.int64)[filled], np.frombuffer(digests, "<u8")[filled]


def check_overlap(data: dict, allowed: int, report: Report) -> None:
    """No training document may have the tokens of a validation document."""
    start, size = time.monotonic(), sum(ids.size for _, ids in data[TRAIN])
    val = np.concatenate([np.zeros(0, np.uint64), *(h for _, _, h in hash_documents(data[VAL]))])
    found, first = 0, None
    for path, positions, hashes in hash_documents(data[TRAIN]):
        hits = np.flatnonzero(np.isin(hashes, val))
        found += hits.size
        if hits.size and first is None:
            first = path, int(positions[hits[0]])
    seconds = max(time.monotonic() - start, 1e-9)
    report.notes.append(f"overlap: {found:,} of the training documents are validation documents "
                        f"({size / 1e6 / seconds:,.0f} M tokens/s)")
    if found > allowed:
        report.add(first[0], f"token {first[1]:,}",
                   f"a training document that is a validation document ({found:,} in all)",
                   "the split is wrong: scores would be too good; build or fetch the shards again (or accept "
                   "so many with --allow-overlap)")


def finish(data: dict, manifest, whole: bool, report: Report) -> None:
    """Counts, and the comparison of byte rules."""
    for kind in (TRAIN, VAL):
        report.tokens[kind] = sum(ids.size for _, ids in data[kind])
    listed = (manifest or {}).get("files", [])
    for kind in (TRAIN, VAL):
        expected = sum(f.get("documents", 0) for f in listed if f["kind"] == kind)
        found = sum(int((ids == BOS).sum()) for _, ids in data[kind])
        report.documents[kind] = found
        if manifest and whole and expected != found:
            report.add(data[kind][0][0] if data[kind] else kind, "",
                       f"{found:,} BOS tokens on the {kind} side, but {expected:,} documents in the manifest",
                       AGAIN)
    counted, decodable = report.counted_bytes, report.decodable_bytes
    if counted and decodable:
        if counted > 1.5 * decodable:
            report.add(
                "fineweb_val_bytes_*.bin", "",
                f"{counted:,} bytes are counted where the tokens decode to {decodable:,}: "
                "scores would be too good", AGAIN)
        better = f": the field's rule makes scores {counted / decodable - 1:.3%} better than decodable bytes"
        report.notes.append(f"bytes: {counted:,} counted, {decodable:,} that the tokens determine"
                            + (better if counted != decodable else ""))


def write_manifest(folder: Path, tokenizer) -> None:
    """Make a manifest for shards that came without one, from what is there."""
    files = []
    for kind in shards.KINDS:
        for path in shards.list_shards(folder, kind):
            ids = shards.read_shard(path)
            entry = {"name": path.name, "kind": kind, "size": path.stat().st_size,
                     "sha256": shards.file_sha256(path), "tokens": int(ids.size)}
            files.append({**entry, "documents": int((ids == BOS).sum())} if kind != VAL_BYTES else
                         {**entry, "text_bytes": int(ids.sum(dtype=np.int64))})
    path = Path(tokenizer) if tokenizer else folder / TOKENIZER
    entry = None
    if path.is_file():
        info = {"size": path.stat().st_size, "sha256": shards.file_sha256(path)}
        entry = tokens.Tokenizer(path.read_bytes()).describe(info)
    found = sum(f["documents"] for f in files if f["kind"] == VAL)
    shards.write_manifest(folder, {"variant": "found", "files": files, "tokenizer": entry,
                                   "split": {"rule": "first" if found == shards.VAL_DOCS else "unknown"}})


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="folder with shards")
    parser.add_argument("--tokenizer", help="SentencePiece model (tokenizer.model in the folder)")
    parser.add_argument("--quick", action="store_true", help="only what need not read every token")
    parser.add_argument("--custom", action="store_true", help="without a manifest: not the published split")
    parser.add_argument("--allow-overlap", type=int, default=0, metavar="N",
                        help="training documents equal to validation documents to put up with (0)")
    parser.add_argument("--write-manifest", action="store_true",
                        help="make manifest.json if the folder is good")
    args = parser.parse_args(arguments)
    report = check(args.folder, args.tokenizer, not args.quick, args.custom, args.allow_overlap)
    for finding in report.findings:
        print(f"WRONG {finding}")
    for note in report.notes:
        print(f"note  {note}")
    for kind in report.tokens:
        print(f"{kind:5} {report.documents[kind]:,} documents, {report.tokens[kind]:,} tokens")
    if not report.findings and args.write_manifest:
        if (Path(args.folder) / MANIFEST).exists():
            raise DataError(f"{args.folder} has a manifest already")
        write_manifest(Path(args.folder), args.tokenizer)
    print(f"{len(report.findings)} findings" if report.findings else
          f"good: fingerprint {report.fingerprint or 'none (no manifest)'}")
    if not report.findings:
        tell_next(Path(args.folder), args.tokenizer, args.custom, report.tokenizer)
    return 1 if report.findings else 0


def tell_next(folder: Path, path, custom: bool, tokenizer) -> None:
    """Print the commands that come after a good check."""
    shell = shards.in_shell
    if custom and not (folder / MANIFEST).exists():
        print(f"next: python {shell(__file__, 'data', 'check.py')} {shell(folder)} --custom --write-manifest"
              + (f" --tokenizer {shell(path)}" if path else ""))
    elif tokenizer:
        env = (f"DATA_PATH={shell(folder)} TOKENIZER_PATH={shell(path or folder / TOKENIZER)} "
               f"VOCAB_SIZE={tokenizer.vocab_size} CASEOPS_ENABLED={int(tokenizer.kind == tokens.CASEOPS)}")
        train = shell(__file__, "train_gpt.py")
        print(f"next: (set -a; . {shell(__file__, 'configs', 'demo.env')}; {env}; python {train})")
        print(f"on GPUs: {env} torchrun --standalone --nproc_per_node=8 {train}")


if __name__ == "__main__":
    shards.run_cli(main)
