"""Folders of recorded numbers: plain, as they were made, or packed, as they lie in tests/parity.

Plain: a folder holds `X.json`, its arrays in `X.safetensors`, and what the fixtures read as files
(shards, tokenizers). Packed: `FOLDER.xz` holds the texts and arrays of a folder, `files.xz` the files of
all folders; they are read in memory, and only the files are put into a temporary folder.

A packed array keeps its type and every value's bits, in the smallest type that can hold them. Large arrays
that are only compared with may be thinned: every n-th entry and the largest are kept, the others are NaN.
"""
from __future__ import annotations

import json
import lzma
import tempfile
from pathlib import Path

import numpy as np
import torch

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
RAW = {"BF16": "<u2", "BOOL": "|u1"}  # as numpy sees the bytes, where it has no such type
NARROWER = {
    "F32": ("F16",),
    "I64": ("I8", "U8", "I16", "U16", "I32"),
    "I32": ("I8", "U8", "I16", "U16"),
    "I16": ("I8", "U8"),
    "U16": ("U8",),
}
FILES = "files.xz"  # shards and tokenizers of all packed folders
FACTS = "facts.json"  # the reference's defaults, beside the folders
# Bytes of one plane say nothing about their position, so no context is spent on it.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
SMALL = 64  # arrays of fewer entries are not thinned


def raw_type(kind: str) -> np.dtype:
    """The numpy type of the bytes of a stored type ("F32", …)."""
    return np.dtype(RAW.get(kind) or f"<{kind[0].lower()}{int(kind[1:]) // 8}")


def to_tensor(raw: np.ndarray, kind: str, shape) -> torch.Tensor:
    """A tensor of the type `kind` from a flat array of its bytes."""
    if not raw.size:
        return torch.empty(shape, dtype=TYPES[kind])
    data = bytearray(np.ascontiguousarray(raw))
    return torch.frombuffer(data, dtype=TYPES[kind]).reshape(shape)


def to_raw(tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """The name of a tensor's type, and its bytes as a flat numpy array."""
    kind = next(k for k, dtype in TYPES.items() if dtype == tensor.dtype)
    flat = tensor.contiguous().flatten()
    if kind in RAW:
        flat = flat.view(torch.int16 if kind == "BF16" else torch.uint8)
    return kind, flat.numpy().view(raw_type(kind))


# --------------------------------------------------------------------------------------
# Plain
# --------------------------------------------------------------------------------------
def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Arrays of a safetensors file by name: 8 bytes of length, a JSON header, the bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data[start + begin:start + end], raw_type(entry["dtype"]))
        arrays[name] = to_tensor(raw, entry["dtype"], entry["shape"])
    return arrays


def write_safetensors(path: Path, arrays: dict[str, torch.Tensor]) -> None:
    """The counterpart of read_safetensors."""
    header, parts, at = {}, [], 0
    for name, tensor in arrays.items():
        kind, raw = to_raw(tensor)
        offsets = [at, at + raw.nbytes]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(raw.tobytes())
        at += raw.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


class Arrays(dict):
    """A fixture's arrays by name; `names` are those that were read."""

    def __init__(self, arrays: dict[str, torch.Tensor]):
        super().__init__(arrays)
        self.names = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, otherwise=None):
        return self[name] if name in self else otherwise

    def items(self):
        return [(name, self[name]) for name in self]


class Folder:
    """A plain fixture folder.

    `path` is where its files lie; `texts` are its JSON texts by stem; `compared` are addresses and sizes of
    what was compared with.
    """

    thinned = False

    def __init__(self, path: Path):
        self.path, self.loaded, self.compared = path, {}, set()
        texts = {p.stem: p.read_bytes() for p in sorted(path.glob("*.json"))}
        self.texts = {stem: text.decode(errors="replace") for stem, text in texts.items()}

    @property
    def name(self) -> str:
        return self.path.name

    def arrays(self, stem: str) -> Arrays:
        """The arrays of one fixture by name; none if it has none."""
        if stem not in self.loaded:
            self.loaded[stem] = Arrays(self.load(stem))
        return self.loaded[stem]

    def compared_whole(self, stem: str) -> set[str]:
        """Names of the arrays of a fixture that were compared with, each as a whole."""
        arrays = self.arrays(stem)
        places = {name: (tensor.data_ptr(), tensor.numel()) for name, tensor in dict.items(arrays)}
        return {name for name, place in places.items() if place in self.compared}

    def load(self, stem: str) -> dict[str, torch.Tensor]:
        path = self.path / f"{stem}.safetensors"
        return read_safetensors(path) if path.exists() else {}

    def forget(self) -> None:
        """Free the arrays; they are read again when they are needed."""
        self.loaded, self.compared = {}, set()


# --------------------------------------------------------------------------------------
# Packed
# --------------------------------------------------------------------------------------
class PackedFolder(Folder):
    """A folder of a packed set; its files were put into `path`."""

    def __init__(self, packed: Path, path: Path):
        self.packed, self.path, self.loaded, self.compared = packed, path, {}, set()
        self.texts = self.read()[0]["texts"]
        self.path.mkdir(parents=True, exist_ok=True)  # the way to a sibling's files leads through it

    def read(self) -> tuple[dict, bytes]:
        """(header, bytes of the arrays)"""
        data = lzma.decompress(self.packed.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        self.thinned = any(entry["step"] > 1 for entry in header["arrays"])
        return header, data[start:]

    def load(self, stem: str) -> dict[str, torch.Tensor]:
        header, data = self.read()
        found = {}
        for stored, entries in by_stored_type(header["arrays"]).items():
            total = sum(entry["count"] for entry in entries)
            width = raw_type(stored).itemsize
            planes = np.frombuffer(data[:total * width], np.uint8).reshape(width, total)
            values = np.ascontiguousarray(planes.T).view(raw_type(stored)).flatten()
            data = data[total * width:]
            for entry in entries:
                part, values = np.split(values, [entry["count"]])
                found.setdefault(entry["stem"], {})[entry["name"]] = restored(part, entry)
        self.loaded = {other: Arrays(found.get(other, {})) for other in self.texts}
        return self.loaded[stem]


def by_stored_type(entries: list[dict]) -> dict[str, list[dict]]:
    """The entries in the order in which their bytes lie."""
    return {kind: [e for e in entries if e["stored"] == kind]
            for kind in sorted({e["stored"] for e in entries})}


def restored(part: np.ndarray, entry: dict) -> torch.Tensor:
    """The array of one entry from its stored values."""
    kind = entry["dtype"]
    if entry["stored"] != kind:
        part = part.astype(raw_type(kind))
    if entry["step"] > 1:
        whole = np.full(int(np.prod(entry["shape"])), np.nan, raw_type(kind))
        whole[::entry["step"]] = part[:-1]
        whole[entry["peak"]] = part[-1]
        part = whole
    return to_tensor(part, kind, entry["shape"])


def narrowed(kind: str, raw: np.ndarray) -> tuple[str, np.ndarray]:
    """The values in the smallest type that gives the same bits back."""
    for smaller in NARROWER.get(kind, ()):
        with np.errstate(all="ignore"):
            short = raw.astype(raw_type(smaller))
        if short.astype(raw.dtype).tobytes() == raw.tobytes():
            return smaller, short
    return kind, raw


def pack_folder(folder: Folder, target: Path, keep: dict[str, set], thin: dict[str, set], step: int) -> None:
    """Write a folder's texts and the arrays named in `keep` (by stem); those in `thin` by every step-th."""
    entries, parts = [], {}
    for stem in folder.texts:
        fresh = folder.load(stem)  # a checker may have changed what it was given
        for name in sorted(keep[stem]):
            tensor = fresh[name]
            kind, raw = to_raw(tensor)
            entry = {"stem": stem, "name": name, "dtype": kind, "shape": list(tensor.shape), "step": 1}
            if step > 1 and name in thin[stem] and raw.size >= SMALL and kind in ("F32", "F64"):
                if np.isnan(raw).any():
                    raise ValueError(f"{folder.name}/{stem} {name} holds NaN: it cannot be thinned")
                entry["step"], entry["peak"] = step, int(np.abs(raw).argmax())
                raw = np.append(raw[::step], raw[entry["peak"]])
            entry["stored"], raw = narrowed(kind, raw)
            entry["count"] = raw.size
            entries.append(entry)
            parts[stem, name] = raw
    header = json.dumps({"texts": folder.texts, "arrays": entries}, separators=(",", ":")).encode()
    data = [len(header).to_bytes(8, "little"), header]
    for stored, group in by_stored_type(entries).items():
        values = np.concatenate([parts[e["stem"], e["name"]] for e in group])
        width = raw_type(stored).itemsize
        data.append(values.view(np.uint8).reshape(-1, width).T.tobytes())
    target.write_bytes(lzma.compress(b"".join(data), filters=FILTERS))


def pack_files(root: Path, target: Path) -> None:
    """Write everything of a plain set that is read as a file, by its path below `root`."""
    paths = [p for p in sorted(root.glob("*/**/*")) if p.is_file()]
    paths = [p for p in paths if p.suffix not in (".json", ".safetensors")]
    if (root / FACTS).exists():
        paths.append(root / FACTS)
    contents = [p.read_bytes() for p in paths]
    listed = [[p.relative_to(root).as_posix(), len(c)] for p, c in zip(paths, contents, strict=True)]
    header = json.dumps(listed).encode()
    data = len(header).to_bytes(8, "little") + header + b"".join(contents)
    target.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def unpack_files(packed: Path, target: Path) -> None:
    """Put the files of a packed set below `target`."""
    data = lzma.decompress(packed.read_bytes())
    at = 8 + int.from_bytes(data[:8], "little")
    for name, size in json.loads(data[8:at]):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[at:at + size])
        at += size


class FixtureSet:
    """All folders of a set, or the one folder that `root` is. Used in a `with`: files are temporary."""

    def __init__(self, root: Path):
        self.root, self.temporary = root, None
        self.packed = sorted(p for p in root.glob("*.xz") if p.name != FILES)

    def __enter__(self) -> FixtureSet:
        if self.packed:
            self.temporary = tempfile.TemporaryDirectory(prefix="parity-")
            self.files = Path(self.temporary.name)
            if (self.root / FILES).exists():
                unpack_files(self.root / FILES, self.files)
        return self

    def __exit__(self, *_) -> None:
        if self.temporary:
            self.temporary.cleanup()

    def folders(self) -> list[Folder]:
        """The folders by name; a plain set may itself be one."""
        if self.packed:
            return [self.folder(p.stem) for p in self.packed]
        within = {p.parent for p in self.root.glob("*/*.json")}
        return [Folder(p) for p in (self.root, *sorted(within))]

    def folder(self, name: str) -> Folder:
        """One folder by its name."""
        if self.packed:
            return PackedFolder(self.root / f"{name}.xz", self.files / name)
        return Folder(self.root / name)

    def defaults(self) -> dict | None:
        """The reference's defaults of all settings, where the set names them."""
        places = [self.files] if self.packed else [self.root, self.root.parent]
        for place in places:
            if (place / FACTS).exists():
                return json.loads((place / FACTS).read_text())["env_settings"]
        return None
