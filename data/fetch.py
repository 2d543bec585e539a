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

if __package__ in (None, ""):        # run as a script: make `data` importable from anywhere
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
            raise DataError(f"{name}: cannot be copied ({error.strerror}); check disk and rights") from None


class Hub:
    """A data set repository on the Hugging Face hub; its library transfers, resumes and
    shows progress."""

    def __init__(self, repository: str, work: Path):
        self.library = shards.need("huggingface_hub", "fetching shards")
        self.repository, self.work = repository, work

    def files(self) -> dict:
        """Path in the repository -> size in bytes."""
        try:
            info = self.library.HfApi().dataset_info(self.repository, files_metadata=True)
        except Exception as error:            # the library's network layer keeps changing its classes
            raise self.explain(error) from None
        return {f.rfilename: f.size for f in info.siblings}

    def get(self, name: str, target: Path) -> None:
        """Fetch one file to `target`; an interrupted transfer goes on next time."""
        try:
            path = self.library.hf_hub_download(self.repository, name, repo_type="dataset",
                                                local_dir=self.work)
        except Exception as error:
            raise self.explain(error) from None
        os.replace(path, target)

    def explain(self, error: Exception) -> DataError:
        """A message that tells being offline from a wrong name."""
        kind, text = type(error).__name__, " ".join(str(error).split())[:160]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            return DataError(f"{self.repository} on the hub: {kind} ({status}): {text}; check --repository, "
                             "or log in with `hf auth login` if it is private")
        if isinstance(error, OSError) and error.errno == 28:
            return DataError("no space left on the disk; free some, the same command then goes on")
        return DataError(f"the hub cannot be reached ({kind}: {text}); check the network (and "
                         "HF_HUB_OFFLINE), then run the same command again; offline, use --hub FOLDER with a "
                         "copy or data/build.py")


def plan(variant: Variant, remote: dict, train_shards: int) -> list[tuple]:
    """(kind, path in the repository) to fetch, validation first. DataError if the
    repository lacks some."""
    prefix = variant.folder + "/"
    names = {kind: [] for kind in shards.KINDS}
    for path in sorted(remote):
        key = shards.parse_name(path[len(prefix):]) if path.startswith(prefix) else None
        if key and "/" not in path[len(prefix):]:
            names[key[0]].append(path)
    wanted = names[TRAIN][:train_shards]
    if not names[VAL] or len(wanted) < train_shards:
        raise DataError(f"{variant.name}: the repository has {len(names[TRAIN])} training and "
                        f"{len(names[VAL])} validation shards in {variant.folder}; {train_shards} training "
                        "shards were asked for: lower --train-shards or name another --repository")
    if variant.sidecar and len(names[VAL_BYTES]) != len(names[VAL]):
        raise DataError(f"{variant.name}: {len(names[VAL_BYTES])} byte sidecars for {len(names[VAL])} "
                        f"validation shards in {variant.folder}; a score needs them: name another "
                        "--repository")
    if variant.tokenizer not in remote:
        raise DataError(f"{variant.name}: no {variant.tokenizer} in it; name another --repository")
    return ([(VAL, p) for p in names[VAL]] + [(VAL_BYTES, p) for p in names[VAL_BYTES]]
            + [(TRAIN, p) for p in wanted])


def fetch(variant: Variant, out, source, train_shards: int, report=print) -> dict:
    """Bring a variant into folder `out` and check it; returns the manifest. `source`: a
    Hub or LocalHub."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    remote = source.files()
    wanted = plan(variant, remote, train_shards)
    old = {f["name"]: f for f in (shards.read_manifest(out) or {"files": []})["files"]}
    files = []
    for number, (kind, path) in enumerate(wanted, 1):
        target = out / Path(path).name
        entry, here = old.get(target.name), target.stat().st_size if target.exists() else -1
        if not entry or not here == entry["size"] == remote[path]:
            if here != remote[path]:
                report(f"[{number}/{len(wanted)}] {target.name} ({remote[path] / 1e6:,.1f} MB)")
                source.get(path, target)
            entry = describe(kind, target)
        files.append(entry)
    if not (out / TOKENIZER).exists() or (out / TOKENIZER).stat().st_size != remote[variant.tokenizer]:
        source.get(variant.tokenizer, out / TOKENIZER)
    return finish(variant, out, files, report)


def describe(kind: str, path: Path) -> dict:
    """Manifest entry of a shard. DataError if it is damaged: then it is removed, to be
    fetched again."""
    try:
        values = shards.read_shard(path)
    except DataError:
        path.unlink()
        raise
    entry = {"name": path.name, "kind": kind, "size": path.stat().st_size, "sha256": shards.file_sha256(path),
             "tokens": int(values.size)}
    if kind == VAL_BYTES:
        return {**entry, "text_bytes": int(values.sum(dtype="int64"))}
    return {**entry, "documents": int((values == BOS).sum())}


def finish(variant: Variant, out: Path, files: list, report) -> dict:
    """Write the manifest and run the quick check."""
    model = tokens.Tokenizer((out / TOKENIZER).read_bytes())
    info = {"size": (out / TOKENIZER).stat().st_size, "sha256": shards.file_sha256(out / TOKENIZER)}
    manifest = shards.write_manifest(out, {
        "variant": variant.name, "repository": variant.repository, "files": files,
        "tokenizer": model.describe(info), "split": {"rule": "first", "val_docs": variant.val_docs}})
    listed = {f["name"] for f in files}
    for path in [p for kind in shards.KINDS for p in shards.list_shards(out, kind)]:
        if path.name not in listed:
            report(f"note: {path.name} is there from before and not part of what was asked for")
    result = check.check(out, full=False)
    if result.findings:
        raise DataError("; ".join(map(str, result.findings)))
    return manifest


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variant", help=", ".join(v.name for v in VARIANTS))
    parser.add_argument("--train-shards", type=int, default=80, help="training shards of 100 M tokens (80)")
    parser.add_argument("--out", help="folder (data/VARIANT)")
    parser.add_argument("--repository", help="another hub repository, laid out the same way")
    parser.add_argument("--hub", help="local folder laid out like the repository")
    args = parser.parse_args(arguments)
    variant = by_name(args.variant)
    if not variant:
        raise DataError(f"unknown variant {args.variant!r}; known: {', '.join(v.name for v in VARIANTS)}")
    if args.train_shards < 1:
        raise DataError(f"--train-shards {args.train_shards}: must be 1 or more")
    if not variant.repository:
        raise DataError(f"{variant.name} was announced but never put on the hub; make it from documents: "
                        "python data/build.py DOCUMENTS --bytes --split first --out DIR")
    if args.repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        raise DataError(f"--repository {args.repository!r}: must look like owner/name")
    out = Path(args.out) if args.out else Path(__file__).resolve().parent / variant.name
    source = LocalHub(args.hub) if args.hub else Hub(args.repository or variant.repository, out / ".hub")
    manifest = fetch(variant, out, source, args.train_shards)
    shutil.rmtree(out / ".hub", ignore_errors=True)           # the library's records of transfers
    count = sum(f["tokens"] for f in manifest["files"] if f["kind"] == TRAIN)
    print(f"{variant.name}: {count:,} training tokens in {out.name}; fingerprint "
          f"{manifest['fingerprint'][:16]}")
    print(f"next: python {shards.in_shell(__file__, 'data', 'check.py')} {shards.in_shell(out)}")
    return 0


if __name__ == "__main__":
    shards.run_cli(main)
