"""Inputs are refused, or taken, for the right reason: a short form of fault_inputs.py, and row by row."""

import io
import json
import os

import fault_inputs
import numpy as np
import pytest
from conftest import documents, environment, make_data, run_script, settings, tg, write_manifest, write_shard

from data import check, sources, tokens
from data.shards import DataError

SPACE = "\u2581"


def test_sixty_bad_inputs_end_in_one_line(data, tmp_path):
    said = []
    cases = fault_inputs.generate(60, 11)
    assert {c.kind for c in cases} >= {"setting", "pair", "launcher", "path", "shard", "manifest", "artifact"}
    assert sum(c.expect == fault_inputs.GOOD for c in cases) >= 5
    assert fault_inputs.try_all(cases, data, tmp_path, lambda *words: said.append(words)) == [], said


@pytest.mark.parametrize("status, shown, fault", [
    (0, "", "accepted"),
    (2, "error: one\nerror: two\n", "2 lines"),
    (2, "Traceback (most recent call last):\nerror: x\n", "trace"),
    (1, "", "0 lines"),
    (2, "error: " + "x" * 600, "607 characters"),
    ("ZeroDivisionError", "", "ended by"),
])
def test_the_judge_sees_what_is_wrong(status, shown, fault):
    assert any(fault in f for f in fault_inputs.judge(fault_inputs.Case("x", "x"), status, "", shown))


# --- settings


def test_every_setting_is_bounded_on_both_sides():
    for f in tg.fields(tg.Settings):
        lo, hi = f.metadata["lo"], f.metadata["hi"]
        if type(f.default) in (int, float):
            assert lo <= f.default <= hi < 2**64, f.name
        elif type(f.default) is str:
            assert f.metadata["choices"] or hi, f.name


@pytest.mark.parametrize("text, number", [
    ("9007199254740993", 9007199254740993), ("1e3", 1000), (" 7 ", 7), ("+7", 7), ("007", 7), ("1_000", 1000),
    ("2.0", 2), ("1.5", None), ("", None), ("7x", None), ("nan", None), ("1e400", None), ("9" * 5000, None),
])
def test_whole_numbers_are_read_as_they_are(text, number):
    assert tg.whole_number(text) == number


def test_a_seed_is_kept_to_the_last_digit():
    assert tg.Settings.from_env({"SEED": "9007199254740993"}).seed == 9007199254740993


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert tg.Settings.from_env({"ARTIFACT_DIR": "~/x"}).artifact_dir == "/home/ann/x"
    assert tg.Settings.from_env({"ARTIFACT_DIR": "./~"}).artifact_dir == "./~"


STRANGERS = """
ENABLE_HTTPS ENABLE_AUTH PARALLEL_SEQ HEAD_NODE_IP GLOBAL_RANK MODEL_DIR DATASET_PATH NUM_THREADS
TRAIN_JOB_7_SERVICE_HOST TRAIN_JOB_7_SERVICE_PORT MODEL_PATH NUM_GPUS MATRIX_HOST LOOP_DEVICE
TOKEN_FILE""".split()


def test_names_of_other_programs_warn_and_pass():
    assert tg.Settings.from_env(dict.fromkeys(STRANGERS, "1")) == tg.Settings()
    assert set(tg.stray_names(dict.fromkeys(STRANGERS, "1"))) == set(STRANGERS)
    silent = "PATH HOME LANG OMP_NUM_THREADS NCCL_DEBUG RANK SEED MUONEQ_R TRIGRAM".split()
    assert not tg.stray_names(dict.fromkeys(silent, "1"))


@pytest.mark.parametrize("name, ours", [("LR", "MATRIX_LR"), ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"), (
    "MAX_STEPS", "ITERATIONS"), ("WEIGHT_DECAY", "MUON_WD")])
def test_what_others_call_a_setting_is_told_its_name_here(name, ours):
    assert tg.Settings.from_env({name: "8"}) == tg.Settings()
    assert ours in tg.stray_names({name: "8"})[name]


def test_the_check_shows_strangers_in_a_line_each(monkeypatch, capsys):
    monkeypatch.setenv("LR", "0.02")
    assert tg.main(["--check", "settings"]) == 0
    assert "warn  LR: not read; here it is MATRIX_LR" in capsys.readouterr().out


def test_a_misspelling_says_how_to_leave_it_out():
    with pytest.raises(tg.UserError, match="MODEL_DIMS: .* is MODEL_DIM .*: env -u MODEL_DIMS python"):
        tg.Settings.from_env({"MODEL_DIMS": "512"})


def test_an_error_is_one_short_printable_line():
    text = str(tg.UserError("first\nsecond\x1b[31m" + "y" * 1_000_000 + "; the remedy"))
    assert text.isprintable() and len(text) <= 500
    assert text.startswith("first?second") and text.endswith("; the remedy")


def test_help_on_a_screen_of_ascii():
    status, shown = run_script({**os.environ, "PYTHONIOENCODING": "ascii"}, "--help")
    assert status == 0 and "MODEL_DIM" in shown and "Traceback" not in shown and shown.isascii()


# --- launchers and folders


@pytest.mark.parametrize("env, ranks", [
    ({}, (0, 1, 0, 1)),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (0, 1, 0, 1)),
    ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a",
      "MASTER_PORT": "29500"}, (9, 16, 1, 8)),
])
def test_what_launchers_say(env, ranks):
    assert tg.launcher_ranks(env) == ranks


def test_scoring_an_artifact_needs_no_training_batch(data, tmp_path):
    (tmp_path / "a.ptz").write_bytes(b"none")
    for path, refused in (("", True), (str(tmp_path / "a.ptz"), False)):
        s = settings(DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model", EVAL_ONLY_QUANTIZED_PATH=path)
        found = tg.run_checks(s, tg.World(size=7), tmp_path, "plain")
        assert any("TRAIN_BATCH_TOKENS" in f.figure for f in found if not f.ok) == refused


@pytest.mark.parametrize("make", [
    lambda p: p.write_text("[]"),
    lambda p: p.write_text("{"),
    lambda p: p.write_text("[" * 100_000),
    lambda p: p.mkdir(),
    lambda p: os.mkfifo(p),
])
def test_a_broken_summary_is_named(make, tmp_path):
    make(tmp_path / "summary.json")
    with pytest.raises(tg.UserError, match="summary.json"):
        tg.Run(settings(ARTIFACT_DIR=tmp_path, EVAL_ONLY_PATH="x"), tg.World())


def test_a_folder_in_the_artifacts_place_is_found_before_training(data, tmp_path):
    (tmp_path / tg.ARTIFACT_NAME).mkdir()
    found = tg.run_checks(settings(DATA_PATH=data), tg.World(), tmp_path, "plain")
    assert [f.figure for f in found if f.name == "folder" and not f.ok] == [
        f"{tmp_path / tg.ARTIFACT_NAME} is a folder: move it away or set ARTIFACT_DIR"]


def test_without_a_temporary_folder(monkeypatch, capsys):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tg.tempfile, "gettempdir", nowhere)
    assert tg.main(["--check", "settings"]) == 2
    assert capsys.readouterr().err.startswith("error: no temporary folder can be written: set TMPDIR")


# --- data


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
    sp = odd_tokenizer(folder, [SPACE * 4])
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
    odd = [[tg.BOS, *sp.encode("some"), *[sp.piece_to_id(SPACE * 4)] * 40]] * 20
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


def test_a_start_with_a_bad_launcher_ends_at_once(data):
    status, shown = run_script(environment(data, RANK="abc", WORLD_SIZE=""))
    assert status == 2 and shown.startswith("error: WORLD_SIZE= must be") and shown.count("\n") == 1
