"""Data tools: demo, building shards, their checks, fetching; small, on a CPU, without network."""

import contextlib
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, contents, settings, tg

from data import build, check, fetch, shards, sources, tokens
from data.build import Recipe
from data.shards import BOS, DataError
from data.variants import Variant

ODD = ["", " ", "  two  spaces  ", "\n\n\ttabs\tand\nlines \n", "literal \u2581 sign\u2581\u2581 again",
       "\u2581", "NUL \0 inside", "\ue001 \ue004\ue002 operators", "<s> <unk> <0x41> </s>",
       "Ünïcödé 中文字 العربية \U0001f600",
       "e\u0301 \ufb01 \uff21 \u200b\u3000\u00a0", "The HTTP of McDonald's iPhone"]


def words(seed: int, count: int) -> str:
    """Made-up English-like text that is the same everywhere."""
    rng = np.random.default_rng(seed)
    stock = ("The river and a House of NASA were quiet; people, however, said nothing to McDonald about 1984 "
             "or \"why\" Zoë's café (near Main Street) had closed again.\n\nIt was late").split(" ")
    return " ".join(stock[i] for i in rng.integers(0, len(stock), count))


def corpus() -> list[str]:
    """Documents with everything in them that has ever caused trouble."""
    return [words(i, 40 + i % 60) for i in range(150)] + [t for t in ODD if t]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in corpus()))
    return path


SMALL = {"vocab": 340, "val_share": 0.2, "shard_tokens": 4000}


@pytest.fixture(scope="module")
def built(jsonl, tmp_path_factory):
    """A folder of good shards (do not change it; see `copy`)."""
    out = tmp_path_factory.mktemp("built") / "out"
    build.build([jsonl], out, Recipe(**SMALL), report=lambda *_: None)
    return out


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copy"))


def all_documents(folder: Path, kind: str, model) -> list[str]:
    found = []
    for path in shards.list_shards(folder, kind):
        found += [model.decode(d) for d in check.documents(shards.read_shard(path))]
    return found


# ----------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["plain", "caseops", "byte"])
def model(request):
    if request.param == "byte":
        return tokens.Tokenizer(tokens.byte_model())
    return tokens.Tokenizer(tokens.train_bpe(corpus(), 340, request.param == "caseops"))


def test_own_tokenizers_are_lossless_and_count_every_byte(model):
    assert model.lossless
    texts = corpus() + ODD
    ids, counts, lengths = model.encode(texts)
    at = 0
    for text, n in zip(texts, lengths.tolist(), strict=True):
        assert ids[at] == BOS and counts[at] == 0
        assert model.decode(ids[at:at + n]) == text
        assert int(counts[at:at + n].sum()) == len(text.encode()) == model.decodable_bytes(ids[at:at + n])
        at += n
    assert at == ids.size == counts.size
    again = tokens.Tokenizer(model.model if hasattr(model, "model") else model.spm.serialized_model_proto())
    if again.kind != "byte":                       # a cache that forgets everything gives the same
        again.words.limits = 5, 50
        parts = [again.encode([t]) for t in texts]
        assert np.array_equal(np.concatenate([p[0] for p in parts]), ids)


def test_words_apart_equal_the_library_on_whole_texts(model):
    if model.kind == "byte":
        pytest.skip("no words")
    from data import caseops
    for text in corpus() + ODD:
        if "\u2581" in text:
            continue                               # the library takes it for a space
        whole = caseops.encode(text) if model.kind == "caseops" else text
        assert model.encode([text])[0].tolist() == [BOS] + model.spm.encode(whole)


def test_lossless_on_arbitrary_text(model):
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(hypothesis.strategies.text(max_size=40))
    def property_holds(text):
        ids, counts, _ = model.encode([text])
        assert model.decode(ids) == text
        assert int(counts.sum()) == len(text.encode())

    property_holds()


def test_vocabulary_bounds():
    for size in (256, 20_000):
        with pytest.raises(DataError, match=f"{size}.*must be 272..16384"):
            tokens.train_bpe(["text"], size)
    with pytest.raises(DataError, match="too little text"):
        tokens.train_bpe(["a b c"], 4096)


def test_published_caseops_sidecar_is_reproduced(recorded):
    folder = recorded("caseops")
    fixture = json.loads(folder.texts["sidecar"])
    arrays = {name: x.numpy() for name, x in folder.arrays("sidecar").items()}
    texts = [d["text"] for d in fixture["docs"]]
    raw = (folder.path / fixture["model"]).read_bytes()
    ids, counts, lengths = tokens.Tokenizer(raw, field_rule=True).encode(texts)
    assert np.array_equal(ids, arrays["tokens"]) and np.array_equal(counts, arrays["bytes"])
    assert np.array_equal(np.cumsum(lengths), arrays["offsets"][1:])
    model = tokens.Tokenizer(raw)
    assert not model.lossless and model.kind == "caseops"
    parts = np.split(ids, arrays["offsets"][1:-1])
    assert sum(map(model.decodable_bytes, parts)) == fixture["totals"]["decoded"]
    for text, part in zip(texts, parts, strict=True):        # by default every byte counts
        if part.size > 1:
            assert int(model.encode([text])[1].sum()) == len(text.encode())


@pytest.mark.parametrize("name", ["small_nfkc", "small_identity"])
def test_byte_rule_fixtures(name, recorded):
    folder = recorded("bpb")
    fixture = json.loads(folder.texts[name])
    model = tokens.Tokenizer((folder.path / f"{name}.model").read_bytes())
    assert model.lossless == (name == "small_identity")
    ids, counts, _ = model.encode([t["text"] for t in fixture["texts"]])
    assert np.array_equal(ids, folder.arrays(name)["ids"])
    if model.lossless:
        assert int(counts.sum()) == sum(t["utf8"] for t in fixture["texts"])


def test_published_shards_are_read(recorded):
    path = recorded("caseops").path
    ids = shards.read_shard(path / "fineweb_val_000000.bin")
    values = shards.read_shard(path / "fineweb_val_bytes_000000.bin")
    assert ids.size == values.size and not values[ids == BOS].any() and (ids == BOS).sum() == 30


# ----------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------
def test_nothing_is_lost_and_sides_are_apart(built):
    manifest = shards.read_manifest(built)
    model = tokens.Tokenizer((built / "tokenizer.model").read_bytes())
    found = {kind: all_documents(built, kind, model) for kind in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(corpus())
    assert not set(found["train"]) & set(found["val"])
    for kind, texts in found.items():
        mine = [f for f in manifest["files"] if f["kind"] == kind]
        assert sum(f["text_bytes"] for f in mine) == sum(len(t.encode()) for t in texts)
        assert sum(f["documents"] for f in mine) == len(texts)
        stored = np.fromfile(built / f"document_hashes_{kind}.bin", "<u8").tolist()
        assert stored == [shards.text_hash(t.encode()) for t in texts]
        assert mine[0]["first_document"] == shards.hex_hash(stored[0])
    assert len(shards.list_shards(built, "train")) > 2
    for path in shards.list_shards(built, "train"):
        ids = shards.read_shard(path)
        assert ids[0] == BOS and ids.size <= 4000
    assert not (built / ".build").exists()
    assert not check.check(built).findings


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst", ".parquet", "folder"])
def test_every_input_format_gives_the_same_shards(ending, built, tmp_path):
    texts = corpus()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    path = tmp_path / f"docs{ending}"
    if ending == "folder":
        path = tmp_path / "texts"
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:04d}.txt").write_bytes(text.encode())
    elif ending == ".parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"text": texts, "other": list(range(len(texts)))}), path)
    else:
        if ending.endswith("zst"):
            lines = pytest.importorskip("zstandard").ZstdCompressor().compress(lines)
        pack = {".jsonl.xz": lzma.compress, ".jsonl.gz": gzip.compress}.get(ending, bytes)
        path.write_bytes(pack(lines))
    build.build([path], tmp_path / "out", Recipe(**SMALL), report=lambda *_: None)
    first, second = contents(built), contents(tmp_path / "out")
    del first["manifest.json"], second["manifest.json"]
    assert first == second


def test_workers_and_batches_do_not_change_the_output(built, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 5000)
    build.build([jsonl], tmp_path / "out", Recipe(**SMALL), workers=2, report=lambda *_: None)
    assert contents(tmp_path / "out") == contents(built)


def test_going_on_after_every_possible_stop(built, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 9000)
    out, add, limit = tmp_path / "out", build.Output.add, 0

    def stop_after(self, part):
        add(self, part)
        if self.counts["batches"] > limit:
            raise RuntimeError("stopped")

    monkeypatch.setattr(build.Output, "add", stop_after)
    while not (out / "manifest.json").exists():
        limit += 1                                  # every attempt comes one batch further
        try:
            build.build([jsonl], out, Recipe(**SMALL), report=lambda *_: None, pause=-1)
        except RuntimeError:
            assert limit < 50
            assert not any(out.glob("*.bin"))
    assert limit > 5 and contents(out) == contents(built)


def environment(process: Path) -> bytes:
    """Environment of a running process, b"" if it is gone or another user's."""
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_kill_and_restart_by_command(built, jsonl, tmp_path):
    command = [sys.executable, str(ROOT / "data/build.py"), str(jsonl), "--out", str(tmp_path / "out"),
               *"--vocab 340 --val-share 0.2 --shard-tokens 4000 --workers 2 --snapshot-seconds 0".split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "DATA_TEST_MARK": str(tmp_path)})
    deadline = time.time() + 30
    while process.poll() is None and time.time() < deadline:
        if list(tmp_path.glob("out/.build/tokenizer*")):
            break
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    listing, mark = Path("/proc"), str(tmp_path).encode()
    deadline = time.time() + 60                     # orphaned workers notice within a second, or never were
    while orphans := [p for p in listing.glob("[0-9]*") if mark in environment(p)]:
        assert time.time() < deadline, orphans
        time.sleep(0.1)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(built)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "complete already" in again.stdout


def test_first_documents_split_drops_training_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "VAL_DOCS", 20)
    texts = corpus()
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts + texts[:3]))
    manifest = build.build([path], tmp_path / "out", Recipe(vocab=340, split="first"), report=lambda *_: None)
    model = tokens.Tokenizer((tmp_path / "out/tokenizer.model").read_bytes())
    assert all_documents(tmp_path / "out", "val", model) == texts[:20]
    assert all_documents(tmp_path / "out", "train", model) == texts[20:]
    assert manifest["source"]["duplicates_of_validation"] == 3
    assert not check.check(tmp_path / "out").findings


@pytest.mark.parametrize("line, message", [
    (b"{not json}", "docs.jsonl, line 2: not JSON"), (b'{"body": "x"}', "no string 'text'.*--text-field"),
    (b'{"text": "\xff"}', "line 2: .*--invalid replace"),
    (b'{"text": "\\ud800"}', "line 2: .*--invalid replace"),
    (b"[1]", "no string 'text'")])
def test_bad_documents(line, message, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        build.build([path], tmp_path / "out", Recipe(bytes=True), report=lambda *_: None)


def parquet_of(path: Path, arrays: dict) -> None:
    """A Parquet file of these pyarrow arrays."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(arrays), path)


@pytest.mark.parametrize("unit, zone", [("s", None), ("us", "Nowhere/Atall"), ("ms", "UTC")])
def test_a_column_of_times_is_refused_in_one_line(unit, zone, tmp_path):
    pa = pytest.importorskip("pyarrow")
    far = 2 ** 60                                   # beyond the last year of Python's dates
    parquet_of(tmp_path / "times.parquet", {"text": pa.array([far], pa.timestamp(unit, zone))})
    with pytest.raises(DataError, match="times.parquet: column 'text' holds timestamp.*--text-field"):
        build.build([tmp_path], tmp_path / "out", Recipe(bytes=True), report=lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_every_type_of_text_column_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    texts = [f"text {i}" for i in range(40)]
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]
    columns = [pa.array(texts, kind) for kind in kinds] + [pa.array(texts).dictionary_encode()]
    for i, column in enumerate(columns):
        parquet_of(tmp_path / f"{i}.parquet", {"text": column})
    recipe = Recipe(bytes=True, val_share=0.3)
    manifest = build.build([tmp_path], tmp_path / "out", recipe, report=lambda *_: None)
    assert manifest["source"]["documents"] == len(columns) * len(texts)


@pytest.mark.parametrize("value", ["nan", "1e400", "-1", "0", "much"])
def test_megabytes_for_the_tokenizer_are_bounded(value, tmp_path):
    with pytest.raises(DataError, match=f"--tokenizer-mb {value}: must be .* above 0, at most 1,000,000"):
        build.main([str(tmp_path), "--out", str(tmp_path / "out"), f"--tokenizer-mb={value}"])


def test_a_long_error_is_one_bounded_line(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"\x1b[2J\n" + 100_000 * "k": 1}) + "\n")
    with pytest.raises(DataError) as caught:
        build.main([str(path), "--out", str(tmp_path / "out"), "--bytes", "--workers", "1"])
    said = str(caught.value)
    assert said.isprintable() and len("error: " + said) <= 480
    assert "line 1: no string 'text'" in said and said.endswith("name the field with --text-field")
    assert build.one_line("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert len(build.one_line(10_000 * "\0")) <= 473


def test_invalid_characters_are_replaced_on_request(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"".join(b'{"text": "n%d \xff \\ud83d"}\n' % i for i in range(50)))
    recipe = Recipe(bytes=True, replace=True, val_share=0.3)
    manifest = build.build([path], tmp_path / "out", recipe, report=print)
    assert manifest["source"]["repaired"] == 50
    texts = all_documents(tmp_path / "out", "val", tokens.Tokenizer(tokens.byte_model()))
    assert texts and all(t.endswith("\ufffd \ufffd") for t in texts)


def test_truncated_archive_is_an_error(tmp_path):
    path = tmp_path / "docs.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "good"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="docs.jsonl.xz: damaged"):
        build.build([path], tmp_path / "out", Recipe(bytes=True), report=lambda *_: None)


def test_command_line_errors_are_one_line(tmp_path, built):
    for arguments in (["build.py", str(tmp_path / "none"), "--out", str(tmp_path / "o")],
                      ["build.py", str(tmp_path), "--out", str(tmp_path / "o")],
                      ["build.py", str(ROOT / "data/README.md"), "--out", str(built)],
                      ["fetch.py", "sp8193"], ["fetch.py", "byte260"],
                      ["fetch.py", "sp1024", "--hub", str(tmp_path / "none"), "--out", str(tmp_path / "f")]):
        done = subprocess.run([sys.executable, str(ROOT / "data" / arguments[0]), *arguments[1:]],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done


# ----------------------------------------------------------------------------------------------------
# Checking: every fault is found, by name and place
# ----------------------------------------------------------------------------------------------------
def rewrite(path: Path, change) -> None:
    """Write a shard again with changed values (and a right header)."""
    values = np.array(shards.read_shard(path))
    shards.write_shard(path, change(values))


def set_value(at, value):
    def change(values):
        values[at] = value
        return values
    return change


def plant(folder: Path) -> None:
    """Put a validation document into the last training shard."""
    document = check.documents(shards.read_shard(shards.list_shards(folder, "val")[0]))[1]
    rewrite(shards.list_shards(folder, "train")[-1], lambda v: np.concatenate([v, [BOS], document]))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for path in folder.glob("document_hashes*"):
        path.unlink()


def swap(first: Path, second: Path) -> None:
    """Exchange two files."""
    first.rename(first.parent / "x")
    second.rename(first)
    (first.parent / "x").rename(second)


TRAIN1, TRAIN99 = "fineweb_train_000001.bin", "fineweb_train_000099.bin"
VAL0, SIDE0, SIDE1 = "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "fineweb_val_bytes_000001.bin"
VAL9 = "fineweb_val_000009.bin"
# name: what to do to a folder; the file that data/check.py names, and its message; the trainer's message
FAULTS = {
    "truncated": (lambda f: os.truncate(f / VAL0, 2000), VAL0, "truncated: the header promises",
                  f"{VAL0} .*has 2,000 bytes but its header promises .* truncated"),
    "truncated training": (lambda f: os.truncate(f / TRAIN1, 2000), TRAIN1, "truncated: the header promises",
                           f"{TRAIN1} .*has 2,000 bytes but its header promises .* truncated"),
    "too short": (lambda f: os.truncate(f / VAL0, 100), VAL0, "shorter than the 1024-byte header",
                  f"{VAL0} is no token shard"),
    "magic": (lambda f: (f / VAL0).write_bytes(b"\0\0\0\0" + (f / VAL0).read_bytes()[4:]), VAL0, "magic 0",
              f"{VAL0} is no token shard: it starts with .0, 1., expected"),
    "swapped sidecars": (lambda f: swap(f / SIDE0, f / SIDE1), SIDE0, "belongs to other shards",
                         f"{SIDE0} has .* entries for .* belongs to other shards"),
    "sidecar for tokens": (lambda f: swap(f / VAL0, f / SIDE0), VAL0, "this is a byte sidecar",
                           f"{VAL0} starts with 0, .* it is a byte sidecar"),
    "sidecar globbed": (lambda f: shutil.copy(f / SIDE0, f / VAL9), VAL9, "this is a byte sidecar",
                        f"{VAL9} starts with 0, .* it is a byte sidecar"),
    "sidecar value": (lambda f: rewrite(f / SIDE0, set_value(7, 99)), SIDE0, "token 7: 99 bytes for token",
                      "count .* bytes, the manifest says"),
    "no sidecar": (lambda f: (f / SIDE0).unlink(), SIDE0, "missing|not there",
                   f"{SIDE0} cannot be read: No such file"),
    "no BOS": (lambda f: rewrite(f / VAL0, lambda v: v[v != BOS]), VAL0, "no BOS", f"{VAL0} holds no BOS"),
    "no BOS, training": (lambda f: rewrite(f / TRAIN1, lambda v: v[v != BOS]), TRAIN1, "no BOS",
                         f"{TRAIN1} holds no BOS"),
    "first BOS gone": (lambda f: rewrite(f / VAL0, set_value(0, 50)), VAL0, "token 0: id 50 instead of BOS",
                       f"{VAL0} starts with token 50, not BOS"),
    "one BOS gone": (lambda f: rewrite(f / VAL0, lambda v: set_value(np.flatnonzero(v == BOS)[2], 50)(v)), "",
                     "BOS tokens on the val side", "documents, the manifest says"),
    "vocabulary": (lambda f: rewrite(f / VAL0, set_value(123, 340)), VAL0,
                   "token 123: id 340 .* vocabulary of 340",
                   f"{VAL0} holds token 340 at position 123 but VOCAB_SIZE=340"),
    "vocabulary, training": (lambda f: rewrite(f / TRAIN1, set_value(123, 340)), TRAIN1,
                             "token 123: id 340 .* vocabulary of 340",
                             f"{TRAIN1} holds token 340 at position 123 but VOCAB_SIZE=340"),
    "planted": (plant, "fineweb_train", "a training document that is a validation document",
                "bytes, the manifest says"),
    "missing shard": (lambda f: (f / TRAIN1).unlink(), TRAIN1, "not there", f"{TRAIN1} is missing"),
    "foreign shard": (lambda f: shutil.copy(f / VAL0, f / TRAIN99), TRAIN99, "comes from elsewhere",
                      f"{TRAIN99} is not listed"),
    "tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(tokens.byte_model()), "tokenizer.model",
                  "not the tokenizer the shards were made with", "has 260 tokens but VOCAB_SIZE=340"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model", "missing",
                     "TOKENIZER_PATH=.* does not exist"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "", "no fineweb_train_", "has no fineweb_train_"),
    "manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json", "cannot be read",
                 "manifest.json is damaged"),
}
ONLY_BY_MANIFEST = {"missing shard", "foreign shard", "tokenizer", "no tokenizer", "manifest", "one BOS gone",
                    "no sidecar"}


def refusals(folder: Path, **changes) -> list[str]:
    """What the trainer says about a folder of data before the first step."""
    s = settings(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", VOCAB_SIZE=340, **changes)
    return [f.figure for f in tg.run_checks(s, tg.World(), folder.parent / "runs", "plain") if not f.ok]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("manifest", [True, False])
def test_fault_is_found(fault, manifest, copy):
    inject, file, message, refusal = FAULTS[fault]
    if not manifest:
        if fault in ONLY_BY_MANIFEST:
            pytest.skip("only a manifest can tell")
        no_manifest(copy)
    assert not check.check(copy, custom=True).findings
    assert not manifest or not refusals(copy)
    inject(copy)
    found = [str(f) for f in check.check(copy, custom=True).findings]
    if fault == "planted" and manifest:             # then the file's hash gives it away first
        assert any("SHA-256 differs" in f or "bytes, the manifest says" in f for f in found)
    else:
        assert any(re.search(message, f) and f.startswith(file) for f in found), found
    assert check.main([str(copy), "--custom"]) == 1
    if manifest:
        said = refusals(copy)
        assert any(re.search(refusal, text) for text in said), said


@contextlib.contextmanager
def as_ordinary_user():
    """Give up the right of root to read everything, where the tests have it."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("file", [VAL0, TRAIN1, "tokenizer.model", "manifest.json",
                                  "document_hashes_train.bin"])
def test_unreadable_file_is_found(file, built):
    with tempfile.TemporaryDirectory() as temp:     # pytest's own folders are closed to other users
        folder = Path(shutil.copytree(built, Path(temp) / "copy"))
        for path in (Path(temp), folder):
            path.chmod(0o755)
        (folder.parent / "runs").mkdir()
        (folder.parent / "runs").chmod(0o777)
        (folder / file).chmod(0)
        with as_ordinary_user():
            found = [str(f) for f in check.check(folder).findings]
            said = refusals(folder)
        assert len(found) == 1 and found[0].startswith(file) and "Permission denied" in found[0], found
        assert any(file in text and "ermission" in text for text in said), said


@pytest.mark.parametrize("value", ["", "0" * 63, "0" * 64 + "\n", "\x1b[2J\n" + "0" * 60],
                         ids=["empty", "short", "newline", "escape"])
def test_a_fingerprint_that_is_none_is_a_finding_and_not_printed(value, copy, capsys):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": value}))
    assert check.main([str(copy), "--quick"]) == 1
    said = capsys.readouterr().out
    assert "WRONG manifest.json: its fingerprint is not 64 hexadecimal digits" in said
    assert "1 findings" in said and "\x1b" not in said and "0" * 60 not in said


def test_small_validation_set_is_not_canonical(copy):
    """10,000 documents offered as the canonical split: by a folder as published, and by a manifest."""
    rewrite(copy / VAL0, lambda _: np.tile(np.uint16([BOS, 9]), 10_000))
    for path in sorted(copy.glob("fineweb_val_*"))[1:]:
        path.unlink()
    no_manifest(copy)
    for _ in range(2):
        found = [str(f) for f in check.check(copy).findings]
        said = refusals(copy)
        assert len(found) == 1 and "10,000 validation documents" in found[0]
        assert "the competition's split is the first 50,000" in found[0]
        assert len(said) == 1 and "10,000 validation documents, the canonical split has 50,000" in said[0]
        check.write_manifest(copy, None)
        manifest = shards.read_manifest(copy)
        shards.write_manifest(copy, {**manifest, "split": {"rule": "first"}})


def test_planted_document_without_a_manifest_is_found_by_the_trainers_full_check(copy):
    plant(copy)
    no_manifest(copy)
    check.write_manifest(copy, None)                # which knows nothing of where the shards come from
    assert not refusals(copy, DATA_CHECK="quick")
    assert re.search("1 validation documents are in the training shards.*at token",
                     " ".join(refusals(copy, DATA_CHECK="full")))


def test_quick_check_finds_planted_document_by_stored_hashes(copy):
    train, val = copy / "document_hashes_train.bin", copy / "document_hashes_val.bin"
    train.write_bytes(train.read_bytes()[:-8] + val.read_bytes()[8:16])
    assert any("are validation documents" in str(f) for f in check.check(copy).findings)


def test_document_across_two_shards_is_seen(tmp_path):
    """A validation document that a training shard boundary cuts in two is still found."""
    document = np.arange(10, 60)
    shards.write_shard(tmp_path / VAL0, np.concatenate([[BOS], document, [BOS], document + 1]))
    first = np.concatenate([[BOS, 5, 6, BOS], document[:20]])
    shards.write_shard(tmp_path / "fineweb_train_000000.bin", first)
    shards.write_shard(tmp_path / "fineweb_train_000001.bin", np.concatenate([document[20:], [BOS, 9, 9]]))
    found = [str(f) for f in check.check(tmp_path, custom=True).findings]
    assert len(found) == 1 and found[0].startswith("fineweb_train_000000.bin, token 3")


def test_each_command_prints_the_next_one(tmp_path):
    """From a folder of texts to the trainer's own check with nothing but what was printed."""
    texts = tmp_path / "my texts"
    texts.mkdir()
    for i, text in enumerate(corpus()[:60]):
        (texts / f"{i}.txt").write_text(text)
    command = f"{sys.executable} {ROOT}/data/build.py 'my texts' --out 'own data' --vocab 340 --caseops"
    said = []
    for _ in range(3):
        env = {k: v for k, v in os.environ.items() if k.startswith(("PATH", "OMP", "HOME"))}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done
        said.append(done.stdout)
        command = next((li[6:] for li in done.stdout.splitlines() if li.startswith("next: ")), "")
        command = command.replace("train_gpt.py", "train_gpt.py --check data")
    assert "good: fingerprint" in said[1] and "VOCAB_SIZE=340 CASEOPS_ENABLED=1 torchrun" in said[1]
    assert "ok    data fingerprint" in said[2] and "340 tokens" in said[2] and not command


def test_write_manifest(copy, capsys):
    no_manifest(copy)
    assert check.main([str(copy), "--custom"]) == 0
    assert f"check.py {copy} --custom --write-manifest\n" in capsys.readouterr().out
    assert check.main([str(copy), "--custom", "--write-manifest"]) == 0
    assert not check.check(copy).findings and check.check(copy).fingerprint


# ----------------------------------------------------------------------------------------------------
# Fetch
# ----------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(built, tmp_path, monkeypatch):
    """A folder laid out like a hub repository, with the built shards in it."""
    val = sum(f["documents"] for f in shards.read_manifest(built)["files"] if f["kind"] == "val")
    monkeypatch.setattr(shards, "VAL_DOCS", val)
    variant = Variant("test", "owner/name", "datasets/x", "tokenizers/t.model", 340, sidecar=True)
    folder = tmp_path / "hub" / "datasets" / "x"
    shutil.copytree(built, folder)
    (tmp_path / "hub/tokenizers").mkdir()
    shutil.move(folder / "tokenizer.model", tmp_path / "hub/tokenizers/t.model")
    (folder / "manifest.json").unlink()
    return variant, tmp_path / "hub", tmp_path / "got"


def test_fetch(hub, built):
    variant, folder, out = hub
    said = []
    manifest = fetch.fetch(variant, out, fetch.LocalHub(folder), 2, said.append)
    assert len(shards.list_shards(out, "train")) == 2 and len(said) == len(manifest["files"])
    assert (out / VAL0).read_bytes() == (built / VAL0).read_bytes()
    os.truncate(out / VAL0, 1500)                   # an interrupted transfer: only that file comes again
    said.clear()
    assert fetch.fetch(variant, out, fetch.LocalHub(folder), 3, said.append) != manifest
    assert [s.split()[1] for s in said] == [VAL0, "fineweb_train_000002.bin"]
    assert not check.check(out).findings


def test_fetch_refuses_what_is_not_there_or_damaged(hub):
    variant, folder, out = hub
    with pytest.raises(DataError, match="lower --train-shards"):
        fetch.fetch(variant, out, fetch.LocalHub(folder), 500, print)
    os.truncate(folder / "datasets/x" / VAL0, 1500)
    with pytest.raises(DataError, match="truncated"):
        fetch.fetch(variant, out, fetch.LocalHub(folder), 1, print)
    assert not (out / "manifest.json").exists()


def test_offline_message():
    pytest.importorskip("huggingface_hub")
    error = fetch.Hub("owner/name", Path("x")).explain(ConnectionError("no route"))
    assert "cannot be reached" in str(error) and "--hub FOLDER" in str(error)


def test_many_spaces_keep_their_bytes():
    text = "a" + " " * 70_000 + "b"
    spread = tokens.within_uint16(np.array([1, 70_000, 1]), text)
    assert spread.sum() == 70_002 and spread.max() <= 65_535
    assert tokens.within_uint16(np.array([1, 2, 70_000]), text).tolist() == [1, 4467, 65_535]
    with pytest.raises(DataError, match="a document of 1 tokens and 70,001 bytes"):
        tokens.within_uint16(np.array([70_001]), text)


def test_null_text_is_an_empty_document():
    lines = [json.dumps(record).encode() for record in ({"text": None}, {"text": "x"})]
    assert sources.texts_of(sources.Batch("a.jsonl", 1, "json", lines)) == (["", "x"], 0)
    with pytest.raises(DataError, match="row 1: column 'text' holds int, not text"):
        sources.texts_of(sources.Batch("a.parquet", 1, "text", [5]))
