"""Fetch published shards, checked and with a manifest.

    python data/fetch.py VARIANT [--train-shards N] [--out DIR] [--repository ID | --hub FOLDER]

The validation split always comes whole; --train-shards takes the first N training
shards (80 are 8 B tokens, the usual training set). Files that are complete are not
fetched again, and broken transfers go on where they stopped. --hub reads from a local
folder laid out like the repository (a copy on a volume, say) instead of the network.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `data` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data import check, shards, tokens
from data.shards import BOS, TOKENIZER, TRAIN, VAL, VAL_BYTES, DataError
from data.variants import VARIANTS, Variant, by_name


class LocalHub:
    """A folder laid out like a hub repository."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"--hub {folder}: no such folder")

    def files(self) -> dict:
        """Path in the repository -> size in bytes."""
        found = (p for p in self.folder.rglob("*") if p.is_file())
        return {p.relative_to(self.folder).as_posix(): p.stat().st_size for p in found}

    def get(self, name: str, target: Path) -> None:
        """Copy one file to `target`, which appears whole or not at all."""
        temporary = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(self.folder / name, temporary)
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            reason = f"cannot be copied ({error.strerror})"
            raise DataError(f"{name}: {reason}; check disk and rights") from None


class Hub:
    """A data set repository on the Hugging Face hub; its library transfers, resumes and
    shows progress."""

    def __init__(self, repository: str, work: Path):
        self.library = shards.need("huggingface_hub", "fetching shards")
        self.repository = repository
        self.work = work

    def files(self) -> dict:
        """Path in the repository -> size in bytes."""
        hub = self.library.HfApi()
        try:
            info = hub.dataset_info(self.repository, files_metadata=True)
        except Exception as error:  # the library's network layer keeps changing its classes
            raise self.explain(error) from None
        return {f.rfilename: f.size for f in info.siblings}

    def get(self, name: str, target: Path) -> None:
        """Fetch one file to `target`; an interrupted transfer goes on next time."""
        options = {"repo_type": "dataset", "local_dir": self.work}
        try:
            path = self.library.hf_hub_download(self.repository, name, **options)
        except Exception as error:
            raise self.explain(error) from None
        os.replace(path, target)

    def explain(self, error: Exception) -> DataError:
        """A message that tells being offline from a wrong name."""
        kind = type(error).__name__
        text = " ".join(str(error).split())[:160]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            return DataError(f"{self.repository} on the hub: {kind} ({status}): {text}; "
                             "check --repository, or log in with `hf auth login` "
                             "if it is private")
        if isinstance(error, OSError) and error.errno == 28:
            return DataError("no space left on the disk; free some, "
                             "the same command then goes on")
        return DataError(f"the hub cannot be reached ({kind}: {text}); check the network "
                         "(and HF_HUB_OFFLINE), then run the same command again; "
                         "offline, use --hub FOLDER with a copy or data/build.py")


def shards_in(variant: Variant, remote: dict) -> dict[str, list[str]]:
    """{kind: the paths in the repository of its shards, by index}."""
    prefix = variant.folder + "/"
    paths = {kind: [] for kind in shards.KINDS}
    for path in sorted(remote):
        name = path.removeprefix(prefix)
        if name == path or "/" in name:
            continue
        if key := shards.parse_name(name):
            paths[key[0]].append(path)
    return paths


def plan(variant: Variant, remote: dict, train_shards: int) -> list[tuple]:
    """(kind, path in the repository) to fetch, validation first.

    DataError if the repository lacks some.
    """
    paths = shards_in(variant, remote)
    train, val, sidecars = paths[TRAIN], paths[VAL], paths[VAL_BYTES]
    if not val or len(train) < train_shards:
        raise DataError(f"{variant.name}: the repository has {len(train)} training and "
                        f"{len(val)} validation shards in {variant.folder}; "
                        f"{train_shards} training shards were asked for: "
                        "lower --train-shards or name another --repository")
    if variant.sidecar and len(sidecars) != len(val):
        raise DataError(f"{variant.name}: {len(sidecars)} byte sidecars for "
                        f"{len(val)} validation shards in {variant.folder}; "
                        "a score needs them: name another --repository")
    if variant.tokenizer not in remote:
        raise DataError(f"{variant.name}: no {variant.tokenizer} in it; "
                        "name another --repository")
    wanted = [(VAL, path) for path in val]
    wanted += [(VAL_BYTES, path) for path in sidecars]
    wanted += [(TRAIN, path) for path in train[:train_shards]]
    return wanted


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return path.stat().st_size if path.exists() else -1


def fetch(variant: Variant, out, source, train_shards: int, report=print) -> dict:
    """Bring a variant into folder `out` and check it; returns the manifest.

    source: a Hub or LocalHub.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    remote = source.files()
    wanted = plan(variant, remote, train_shards)
    old = shards.read_manifest(out) or {"files": []}
    known = {f["name"]: f for f in old["files"]}
    files = []
    for number, (kind, path) in enumerate(wanted, 1):
        target = out / Path(path).name
        entry = known.get(target.name)
        here = size_of(target)
        if here != remote[path]:
            megabytes = f"{remote[path] / 1e6:,.1f} MB"
            report(f"[{number}/{len(wanted)}] {target.name} ({megabytes})")
            source.get(path, target)
            entry = None
        if not entry or entry["size"] != here:
            entry = describe(kind, target)
        files.append(entry)
    if size_of(out / TOKENIZER) != remote[variant.tokenizer]:
        source.get(variant.tokenizer, out / TOKENIZER)
    return finish(variant, out, files, report)


def describe(kind: str, path: Path) -> dict:
    """Manifest entry of a shard.

    DataError if it is damaged: then it is removed, to be fetched again.
    """
    try:
        values = shards.read_shard(path)
    except DataError:
        path.unlink()
        raise
    entry = {
        "name": path.name,
        "kind": kind,
        "size": path.stat().st_size,
        "sha256": shards.file_sha256(path),
        "tokens": int(values.size),
    }
    if kind == VAL_BYTES:
        return {**entry, "text_bytes": int(values.sum(dtype="int64"))}
    return {**entry, "documents": int((values == BOS).sum())}


def finish(variant: Variant, out: Path, files: list, report) -> dict:
    """Write the manifest and run the quick check."""
    path = out / TOKENIZER
    model = tokens.Tokenizer(path.read_bytes())
    info = {"size": path.stat().st_size, "sha256": shards.file_sha256(path)}
    manifest = shards.write_manifest(out, {
        "variant": variant.name,
        "repository": variant.repository,
        "files": files,
        "tokenizer": model.describe(info),
        "split": {"rule": "first", "val_docs": variant.val_docs},
    })
    listed = {f["name"] for f in files}
    for kind in shards.KINDS:
        for path in shards.list_shards(out, kind):
            if path.name not in listed:
                report(f"note: {path.name} is there from before "
                       "and not part of what was asked for")
    result = check.check(out, full=False)
    if result.findings:
        raise DataError("; ".join(map(str, result.findings)))
    return manifest


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    known = ", ".join(v.name for v in VARIANTS)
    add("variant", help=known)
    add("--train-shards", type=int, default=80,
        help="training shards of 100 M tokens (80)")
    add("--out", help="folder (data/VARIANT)")
    add("--repository", help="another hub repository, laid out the same way")
    add("--hub", help="local folder laid out like the repository")
    args = parser.parse_args(arguments)
    variant = by_name(args.variant)
    if not variant:
        raise DataError(f"unknown variant {args.variant!r}; known: {known}")
    if args.train_shards < 1:
        raise DataError(f"--train-shards {args.train_shards}: must be 1 or more")
    if not variant.repository:
        raise DataError(f"{variant.name} was announced but never put on the hub; "
                        "make it from documents: "
                        "python data/build.py DOCUMENTS --bytes --split first --out DIR")
    if args.repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        raise DataError(f"--repository {args.repository!r}: must look like owner/name")
    out = Path(args.out or Path(__file__).resolve().parent / variant.name)
    records = out / ".hub"  # the library's, of its transfers
    if args.hub:
        source = LocalHub(args.hub)
    else:
        source = Hub(args.repository or variant.repository, records)
    manifest = fetch(variant, out, source, args.train_shards)
    shutil.rmtree(records, ignore_errors=True)
    count = sum(f["tokens"] for f in manifest["files"] if f["kind"] == TRAIN)
    fingerprint = manifest["fingerprint"][:16]
    print(f"{variant.name}: {count:,} training tokens in {out.name}; "
          f"fingerprint {fingerprint}")
    print(f"next: python {shards.in_shell(__file__, 'data', 'check.py')} {shards.in_shell(out)}")
    return 0


if __name__ == "__main__":
    shards.run_cli(main)
