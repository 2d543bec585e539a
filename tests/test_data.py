"""Data: shards, training streams, validation documents, bytes per token, the folder and its manifest."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import documents, make_data, settings, tg, write_manifest, write_shard

from data import check


@pytest.fixture
def shards(tmp_path):
    return [
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", documents(n, i)) for i, n in enumerate((9, 4, 7))
    ]


def test_stream_gives_every_target_once_per_epoch_for_any_number_of_ranks(shards):
    whole = np.concatenate([tg.read_shard(f) for f in shards])
    count = len(whole)
    for ranks in (1, 2, 3):
        streams = [
            tg.TokenStream(shards, world_size=ranks, rank=r, tokens=32, max_len=16) for r in range(ranks)
        ]
        batches = [b for _ in range(-(-count // (32 * ranks)) + 1) for b in (s.next() for s in streams)]
        x, y = (torch.cat([b[i][0] for b in batches])[:count].numpy() for i in (0, 1))
        assert (x == whole).all() and (y == np.roll(whole, -1)).all()


WINDOWS = dict(tokens=48, max_len=16)
STREAMS = {
    tg.TokenStream: dict(tokens=40, max_len=16),
    tg.DocPackStream: dict(tokens=40, max_len=16),
    tg.ShuffledStream: WINDOWS,
    tg.CoprimeStream: WINDOWS,
}


def same(a: tg.Batch, b: tg.Batch) -> bool:
    return all(p is q is None or torch.equal(p, q) for p, q in zip(a[:3], b[:3]))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", STREAMS)
def test_the_files_fix_the_order_over_several_epochs(shards, kind, rank):
    ranks = (rank, rank, 1 - rank)
    first, second, other = (kind(shards, world_size=2, rank=r, **STREAMS[kind]) for r in ranks)
    batches = [(first.next(), second.next(), other.next()) for _ in range(60)]
    assert first.epoch == second.epoch > 2
    assert all(same(a, b) and not same(a, c) for a, b, c in batches)
    assert not any(same(a[0], b[0]) for a, b in zip(batches, batches[1:]))


def test_the_order_of_the_stream_does_not_depend_on_the_ranks(shards):
    one, two = (tg.TokenStream(shards, world_size=n, rank=n - 1, tokens=40, max_len=16) for n in (1, 2))
    for _ in range(60):
        first, second = one.next(), one.next()
        assert same(two.next(), second) and not same(first, second) and one.epoch == two.epoch


def test_shards_are_looked_for_in_data_dir(tmp_path):
    s = settings(DATA_DIR=tmp_path)
    assert s.shards.is_relative_to(tmp_path) and s.tokenizer.is_relative_to(tmp_path)
    fetched = tmp_path / f"sp{s.vocab_size}"
    fetched.mkdir()
    assert s.shards == fetched and s.tokenizer.is_relative_to(tmp_path)


@pytest.mark.parametrize("kind", STREAMS)
def test_an_epoch_is_the_tokens_of_all_shards(shards, kind):
    stream = kind(shards, world_size=1, rank=0, **STREAMS[kind])
    total = sum(len(tg.read_shard(f)) for f in shards)
    assert stream.epoch == 0
    taken = sum(stream.next().x.numel() for _ in range(200))
    assert stream.epoch == taken / total > 4


def test_how_often_the_text_was_seen_is_logged(data, tmp_path):
    s = settings(DATA_PATH=data, TRAIN_BATCH_TOKENS=2048, ITERATIONS=12)
    events, world = [], tg.World()

    class Log:
        live, summary, dir = False, {}, tmp_path

        def log(self, event, **values):
            events.append((event, values))

        def say(self, text):
            pass

        def note_go_on(self):
            pass

    trainer = tg.Trainer(s, world, tg.build_model(s, world))
    trained = tg.train_loop(s, world, Log(), trainer, 0.0, lambda *_: None)
    trained.stream.close()
    total = sum(len(tg.read_shard(f)) for f in tg.list_shards(data, "train"))
    assert dict(events)["train_end"]["epochs"] == 12 * 2048 / total


def test_segments_start_at_documents_and_are_cut(shards):
    batch = tg.TokenStream(shards, world_size=1, rank=0, tokens=256, max_len=16).next()
    bounds = np.unique(batch.cu_seqlens.numpy())
    assert bounds[0] == 0 and bounds[-1] == 256 and np.diff(bounds).max() <= 16 == batch.max_seqlen
    assert set(np.flatnonzero(batch.x[0].numpy() == tg.BOS)) <= set(bounds)


def test_docpack_span_that_ends_exactly_at_the_shards_end_is_used(tmp_path):
    f = write_shard(tmp_path / "a.bin", np.append(tg.BOS, np.arange(4, 4 + 65)))  # two spans of 33
    stream = tg.DocPackStream([f], world_size=1, rank=0, tokens=32, max_len=0)
    first, second, again = (stream.next().x for _ in range(3))
    assert first[0, 0] == tg.BOS and second[0, 0] == 4 + 32 and torch.equal(first, again)


def test_shuffled_shard_barely_longer_than_a_window(tmp_path):
    f = write_shard(tmp_path / "a.bin", np.append(tg.BOS, np.arange(4, 4 + 32)))
    stream = tg.ShuffledStream([f], world_size=1, rank=0, tokens=32, max_len=32)
    assert [stream.next().x[0, 0].item() for _ in range(3)] == [tg.BOS] * 3


def test_prefetch_keeps_the_order_and_hands_errors_over(shards):
    plain = tg.TokenStream(shards, world_size=1, rank=0, tokens=32, max_len=16)
    ahead = tg.Prefetch(
        tg.TokenStream(shards, world_size=1, rank=0, tokens=32, max_len=16), torch.device("cpu")
    )
    for _ in range(30):
        assert torch.equal(plain.next().x, ahead.next().x) and ahead.epoch == plain.epoch
    ahead.close()

    class Broken:
        epoch = 0.0

        def skip(self, batches):
            assert batches == 0

        def next(self):
            raise tg.UserError("the disk went away")

    with pytest.raises(tg.UserError, match="went away"):
        tg.Prefetch(Broken(), torch.device("cpu")).next()


def test_spoilt_sidecars_are_refused(built):
    folder, s = built
    path = folder / "fineweb_val_bytes_000000.bin"
    counts = np.array(tg.read_shard(path))
    write_shard(path, counts[::-1])
    with pytest.raises(tg.UserError, match="for the BOS at position"):
        tg.Validation(s)
    write_shard(path, counts)
    files = [dict(name=path.name, kind="val_bytes", text_bytes=int(counts.sum()) + 1)]
    write_manifest(folder, files=files)
    with pytest.raises(tg.UserError, match="the manifest says"):
        tg.Validation(s)
    shutil.copy(path, folder / "fineweb_val_000000.bin")
    with pytest.raises(tg.UserError, match="it is a byte sidecar"):
        tg.Validation(s)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-10]), "truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "no token shard"),
        (lambda f: write_shard(f, documents(3, 0), magic=7), "no token shard"),
        (lambda f: write_shard(f, documents(3, 0), count=10**9), "truncated"),
        (lambda f: f.unlink(), "cannot be read"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, spoil, words):
    f = write_shard(tmp_path / "x.bin", documents(3, 0))
    spoil(f)
    with pytest.raises(tg.UserError, match=words):
        tg.read_shard(f)


def test_documents_cover_the_stream():
    tokens = documents(9, 5)
    docs = tg.Documents(tokens)
    covered = np.concatenate([np.arange(a, a + n - 1) for a, n in zip(docs.start, docs.length)])
    assert (covered == np.arange(len(tokens) - 1)).all()
    assert len(tg.Documents(np.append(tokens, tg.BOS))) == len(docs)  # a last BOS alone predicts nothing


def test_validation_counts_bytes_by_sidecar_or_table(s, data, tmp_path):
    val = tg.Validation(s)
    assert val.rule == "sidecar" and val.target_bytes.sum() == (val.tokens[1:] != tg.BOS).sum()
    for f in Path(data).glob("fineweb_val_0*.bin"):
        (tmp_path / f.name).write_bytes(f.read_bytes())
    table = tg.Validation(tg.dataclasses.replace(s, data_path=str(tmp_path)))
    assert table.rule == "table"
    with pytest.raises(tg.UserError, match="needs the byte sidecar"):
        tg.Validation(tg.dataclasses.replace(s, data_path=str(tmp_path), caseops_enabled=True))
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", val.tokens[:-3])
    with pytest.raises(tg.UserError, match="belongs to other shards"):
        tg.Validation(tg.dataclasses.replace(s, data_path=str(tmp_path)))


# --- the data folder against its manifest


@pytest.fixture
def built(data, tmp_path):
    """Settings and folder of a whole data set with its manifest."""
    folder = tmp_path / "built"
    shutil.copytree(data, folder)
    write_manifest(folder)
    return folder, settings(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", DATA_CHECK="full")


def test_a_good_folder_passes_and_names_its_fingerprint(built):
    folder, s = built
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert tg.check_manifest(s) == fingerprint[:16] and "14 documents" in tg.check_validation(s)
    (folder / "manifest.json").unlink()
    assert "no manifest.json" in tg.check_manifest(s)


@pytest.mark.parametrize("manifest", [True, False])
def test_few_validation_documents_are_not_the_canonical_split(built, manifest):
    folder, s = built
    write_manifest(folder, split=dict(rule="first"))
    if not manifest:
        (folder / "manifest.json").unlink()
    with pytest.raises(tg.UserError, match="14 validation documents, the canonical split has 50,000"):
        tg.check_validation(s)


def plant(folder):
    """One validation document among the training documents."""
    val = np.array(tg.read_shard(folder / "fineweb_val_000000.bin"))
    docs = tg.Documents(val)
    a, n = int(docs.start[3]), int(docs.length[3])
    train = np.array(tg.read_shard(folder / "fineweb_train_000001.bin"))
    write_shard(folder / "fineweb_train_000001.bin", np.concatenate([train, val[a : a + n - 1]]))
    write_manifest(folder)


def near_the_split(folder):
    """The first training shard begins with the last validation document."""
    path = folder / "fineweb_train_000000.bin"
    val = np.array(tg.read_shard(folder / "fineweb_val_000000.bin"))
    last = val[int(np.flatnonzero(val == tg.BOS)[-1]) :]
    write_shard(path, np.concatenate([last, tg.read_shard(path)]))
    write_manifest(folder)


def test_quick_checks_search_the_shard_next_to_the_split(built):
    folder, s = built
    near_the_split(folder)
    with pytest.raises(tg.UserError, match="fineweb_train_000000.bin at token 0"):
        tg.check_manifest(tg.dataclasses.replace(s, data_check="quick"))


def flip(folder):
    raw = bytearray((folder / "fineweb_train_000000.bin").read_bytes())
    raw[1500] ^= 1
    (folder / "fineweb_train_000000.bin").write_bytes(raw)


def hashes(folder):
    for kind, values in (("train", [5, 6, 7]), ("val", [8, 6])):
        np.array(values, "<u8").tofile(folder / f"document_hashes_{kind}.bin")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (plant, "1 validation documents are in the training shards.*fineweb_train_000001.bin at token"),
        (hashes, "1 validation documents are in the training shards.*training document 1"),
        (flip, "fineweb_train_000000.bin is damaged, its SHA-256"),
        (lambda f: (f / "fineweb_train_000001.bin").unlink(), "fineweb_train_000001.bin is missing"),
        (lambda f: write_shard(f / "fineweb_train_000009.bin", documents(2, 1)), "000009.bin is not listed"),
        (lambda f: write_shard(f / "fineweb_train_000001.bin", documents(2, 1)), "the manifest says"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"other"), "is not the tokenizer of"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ],
)
def test_a_spoilt_folder_is_refused(built, spoil, words):
    folder, s = built
    spoil(folder)
    with pytest.raises(tg.UserError, match=words):
        tg.check_manifest(s)


@pytest.mark.parametrize("loader", "stream docpack shuffled coprime".split())
def test_an_id_beyond_the_vocabulary_is_seen_when_it_is_read(loader, tmp_path):
    for i in range(2):
        shard = documents(20, i)
        shard[len(shard) // 2] = 300 if i else 299
        path = write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shard)
    s = settings(DATA_PATH=tmp_path, TRAIN_LOADER=loader)
    stream = tg.open_train_stream(s, tg.World(), 64)
    with pytest.raises(tg.UserError, match=f"{path} holds token 300 at position {len(shard) // 2} but"):
        for _ in range(2 * len(shard)):
            stream.next()


def test_a_shard_that_begins_with_a_long_document(data, tmp_path):
    text = np.full(1_000_001, 9)
    text[0] = tg.BOS
    write_shard(tmp_path / "fineweb_train_000000.bin", np.append(text, documents(5, 0)))
    path = write_shard(tmp_path / "fineweb_train_000001.bin", np.append(text[1:], documents(5, 1)))
    for how in ("quick", "full"):
        assert "2 shards" in tg.check_train_shards(settings(DATA_PATH=tmp_path, DATA_CHECK=how))
    write_shard(path, text[1:])
    with pytest.raises(tg.UserError, match="holds no BOS"):
        tg.check_train_shards(settings(DATA_PATH=tmp_path))


def test_a_header_of_more_tokens_than_an_int32_counts(tmp_path):
    path = write_shard(tmp_path / "x.bin", documents(3, 0), count=10 - 2**31)
    with pytest.raises(tg.UserError, match="promises 4,294,968,340: truncated"):
        tg.read_shard(path)


# --- the byte rule


SPACES = "\u2581" * 4      # as a tokenizer writes four spaces


def odd_tokenizer(folder, symbols):
    """A tokenizer with pieces that begin with several spaces."""
    import sentencepiece as spm

    model = io.BytesIO()
    text = ["some words to train a tokenizer with"] * 50
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, user_defined_symbols=symbols,
        minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture
def tabled(tmp_path):
    """A folder without sidecars whose tokenizer has a piece of four spaces: (folder, settings, tokenizer)."""
    folder = make_data(tmp_path / "tabled")
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    sp = odd_tokenizer(folder, [SPACES])
    write_manifest(folder)
    return folder, settings(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model"), sp


def findings(folder) -> str:
    return "\n".join(map(str, check.check(folder).findings))


def test_a_good_table_passes(tabled):
    folder, s, sp = tabled
    docs = [[tg.BOS, *sp.encode("some words to train é ü a tokenizer")]] * 60
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(docs))
    write_manifest(folder)
    assert "60 documents" in tg.check_validation(s) and not findings(folder)


@pytest.mark.parametrize("odd_first", [True, False])
def test_the_byte_rule_is_checked_on_all_documents(tabled, odd_first):
    folder, s, sp = tabled
    plain = [[tg.BOS, *sp.encode("some words to train a tokenizer with")]] * 400
    odd = [[tg.BOS, *sp.encode("some"), *[sp.piece_to_id(SPACES)] * 40]] * 20
    docs = odd + plain if odd_first else plain + odd
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(docs))
    write_manifest(folder)
    with pytest.raises(tg.UserError, match="the byte rule counts"):
        tg.check_validation(s)
    assert "the byte rule counts" in findings(folder)


def test_validation_without_a_word_is_refused(tabled):
    folder, s, _ = tabled
    write_shard(folder / "fineweb_val_000000.bin", np.full(20, tg.BOS))
    write_manifest(folder)
    with pytest.raises(tg.UserError, match="the validation documents of .* are empty"):
        tg.Validation(s)
    assert "all its documents are empty" in findings(folder)


def test_stored_hashes_that_were_cut(tmp_path):
    folder = make_data(tmp_path / "hashed")
    s = settings(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model")
    for kind, count, first in (("train", 120, 0), ("val", 14, 500)):
        np.arange(first, first + count, dtype="<u8").tofile(folder / f"document_hashes_{kind}.bin")
    tg.check_manifest(s)
    assert not findings(folder)
    os.truncate(folder / "document_hashes_train.bin", 8 * 119)
    with pytest.raises(tg.UserError, match="hashes_train.bin has 119 documents, the manifest says 120"):
        tg.check_manifest(s)
    assert "119 hashes for 120 documents" in findings(folder)


def test_batches_read_ahead_are_cut_anew_and_nothing_is_lost(tmp_path):
    shard = write_shard(tmp_path / "fineweb_train_000000.bin", documents(60, 0))

    def stream(cut):
        return tg.TokenStream([shard], world_size=1, rank=0, tokens=128, max_len=cut)

    ahead, steady = tg.Prefetch(stream(16), torch.device("cpu")), {cut: stream(cut) for cut in (16, 64)}
    try:
        for k in range(9):
            cut = 16 if k < 4 else 64
            got, want = ahead.next(cut), {c: s.next() for c, s in steady.items()}[cut]
            assert torch.equal(got.x, want.x) and torch.equal(got.cu_seqlens, want.cu_seqlens)
            assert got.cut == cut and got.layout(got.cut).max_seqlen == cut
    finally:
        ahead.close()
