"""Mutants of the data: bytes counted twice, validation documents in the training shards, validation tokens
where the model is made; each must be caught by the check that its test names (see test_probes.py)."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import settings, tg, whole_run, write_shard
from mutants import in_form, replace

from data import build, shards
from data import check as data_check


@pytest.fixture
def s(s):
    return in_form(s, "stream")


# --- bytes and data

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of good shards with a manifest, CaseOps tokens and a byte sidecar."""
    folder, rng = tmp_path_factory.mktemp("built"), np.random.default_rng(5)
    stock = "the River and a House of NASA were quiet; people said nothing to McDonald in Spring".split()
    texts = (" ".join(stock[i] for i in rng.integers(0, len(stock), 20 + n % 30)) for n in range(120))
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    recipe = build.Recipe(vocab=340, val_share=0.2, shard_tokens=4000, caseops=True)
    build.build([folder / "docs.jsonl"], folder / "out", recipe, report=lambda *_: None)
    return folder / "out"


@pytest.fixture
def shards_of(built, tmp_path):
    """(a copy of them to spoil, the settings for it)."""
    folder = shutil.copytree(built, tmp_path / "shards")
    vocab = json.loads((folder / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    return folder, settings(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", VOCAB_SIZE=vocab)


def spoil(path, change):
    """Rewrite a shard with change(values), its size kept."""
    write_shard(path, change(np.array(shards.read_shard(path))))


def data_findings(folder) -> str:
    return "\n".join(map(str, data_check.check(folder, custom=True).findings))


def test_good_data_passes(shards_of):
    folder, s = shards_of
    assert not data_findings(folder)
    tg.check_validation(s)
    tg.check_manifest(s)
    tg.check_manifest(dataclasses.replace(s, data_check="full"))


def test_bytes_of_bos(shards_of):
    """The sidecar counts a byte for every BOS."""
    folder, s = shards_of
    side, val = folder / "fineweb_val_bytes_000000.bin", folder / "fineweb_val_000000.bin"
    bos = np.array(shards.read_shard(val)) == tg.BOS
    spoil(side, lambda v: np.where(bos, 1, v))
    with pytest.raises(tg.UserError, match="counts 1 bytes for the BOS"):
        tg.Validation(s)
    assert "bytes for a BOS token" in data_findings(folder)


def test_bytes_of_operators(shards_of):
    """The sidecar counts tokens that stand for no text of their own, CaseOps' operators, as one byte."""
    folder, s = shards_of
    side, val = folder / "fineweb_val_bytes_000000.bin", folder / "fineweb_val_000000.bin"
    operators = (np.array(shards.read_shard(side)) == 0) & (np.array(shards.read_shard(val)) != tg.BOS)
    assert operators.sum() > 20
    spoil(side, lambda v: np.where(operators, 1, v))
    with pytest.raises(tg.UserError, match="the manifest says"):
        tg.Validation(s)
    with pytest.raises(tg.UserError, match="not the manifest|the manifest says"):
        tg.check_manifest(dataclasses.replace(s, data_check="full"))
    manifest = folder / "manifest.json"
    manifest.unlink()                       # and on folders that come without one, token by token
    assert "bytes for token" in data_findings(folder)


def plain(folder):
    """Without sidecar and stored hashes: bytes are counted by the tokenizer's table."""
    for pattern in ("fineweb_val_bytes_*", "document_hashes*"):
        for path in folder.glob(pattern):
            path.unlink()


def spaces_in_both(patch):
    """The space of a piece is counted in its bytes, and again where it leads."""
    def make(real):
        def from_sentencepiece(path, vocab_size):
            table = real(path, vocab_size)
            return dataclasses.replace(table, base=table.base + table.lead.astype(np.int16))
        return from_sentencepiece
    patch.setattr(tg.ByteTable, "from_sentencepiece", make(tg.ByteTable.from_sentencepiece))


def space_sign_as_three_bytes(patch):
    """U+2581 is counted as its own UTF-8 form."""
    def make(real):
        def from_sentencepiece(path, vocab_size):
            table = real(path, vocab_size)
            return dataclasses.replace(table, base=table.base + 3 * table.lead.astype(np.int16))
        return from_sentencepiece
    patch.setattr(tg.ByteTable, "from_sentencepiece", make(tg.ByteTable.from_sentencepiece))


@pytest.mark.parametrize("mutant", [spaces_in_both, space_sign_as_three_bytes])
def test_double_counted_spaces(shards_of, mutant, monkeypatch):
    folder, s = shards_of
    plain(folder)
    tg.check_validation(s)
    mutant(monkeypatch)
    with pytest.raises(tg.UserError, match="the byte rule counts"):
        tg.check_validation(s)


@pytest.mark.parametrize("hashes", [True, False])
def test_validation_documents_in_the_training_shards(shards_of, hashes):
    """The leak of the 1.04 results: validation documents among the training ones, in a shard of its own."""
    folder, s = shards_of
    s = dataclasses.replace(s, data_check="full")
    leaked = data_check.documents(np.array(shards.read_shard(folder / "fineweb_val_000000.bin")))[3]
    (folder / "manifest.json").unlink()
    stored = [folder / f"document_hashes_{kind}.bin" for kind in ("train", "val")]
    if hashes:
        stored[0].write_bytes(stored[0].read_bytes() + stored[1].read_bytes()[24:32])
    else:
        for path in stored:
            path.unlink()
    tail = np.array(shards.read_shard(sorted(folder.glob("fineweb_train_*"))[0]))[:200]
    write_shard(folder / "fineweb_train_000090.bin", np.concatenate([[tg.BOS], leaked, tail]))
    with pytest.raises(tg.UserError, match="1 validation documents are in the training shards"):
        tg.check_overlap(s)
    assert "validation document" in data_findings(folder)


# --- validation tokens where the model is made

def through_a_fresh_reader(s):
    return tg.Validation(s).tokens


def through_the_runs_own(patch):
    """The Validation object that the run will score later."""
    seen = []

    def make(real):
        def remember(self, s):
            seen.append(self)
            real(self, s)
        return remember
    replace(patch, tg.Validation, "__init__", make)
    return lambda s: seen[0].tokens


def through_the_files(s):
    return np.array(tg.read_shard(tg.list_shards(s.shards, "val")[0]))


def readers(patch):
    return {"fresh": through_a_fresh_reader, "own": through_the_runs_own(patch), "files": through_the_files}


def pipeline(s, folder):
    s = dataclasses.replace(s, artifact_dir=str(folder), ttt_enabled=False, sliding_window_enabled=False)
    whole_run(s)


@pytest.mark.parametrize("reader", ["fresh", "own", "files"])
def test_warm_up_on_validation_tokens(s, reader, tmp_path, monkeypatch):
    read = readers(monkeypatch)[reader]
    monkeypatch.setattr(tg.Trainer, "random_batch", lambda self, *_:
                        tg.packed_batch(read(self.s)[:self.tokens + 1], self.s.train_seq_len))
    with pytest.raises(RuntimeError, match="validation tokens are read"):
        pipeline(s, tmp_path)


@pytest.mark.parametrize("reader", ["fresh", "own", "files"])
def test_calibration_on_validation_tokens(s, reader, tmp_path, monkeypatch):
    read = readers(monkeypatch)[reader]
    monkeypatch.setattr(tg, "train", lambda *_: (tg.Clock(), SimpleNamespace(next=None, close=None)))
    replace(monkeypatch, tg, "calibrate", lambda real: lambda s, world, model, next_batch:
            real(s, world, model, lambda: tg.packed_batch(read(s)[:1025], s.train_seq_len)))
    with pytest.raises(RuntimeError, match="validation tokens are read"):
        pipeline(s, tmp_path)


@pytest.mark.parametrize("reader", ["fresh", "own", "files"])
def test_logit_calibration_on_validation_tokens(s, reader, tmp_path, monkeypatch):
    read = readers(monkeypatch)[reader]
    replace(monkeypatch, tg, "fit_calibration", lambda real: lambda s, model, tokens: real(s, model, read(s)))
    with pytest.raises(RuntimeError, match="validation tokens are read"):
        pipeline(dataclasses.replace(s, logit_calib_enabled=True), tmp_path)


def test_the_pipeline_as_it_is_passes(s, tmp_path):
    """With validation in training, which opens the seal for its own ledger only."""
    pipeline(dataclasses.replace(s, val_loss_every=2), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["val_bpb"] > 0
