"""What a run keeps on disk: its folder, its log, files of weights, the artifact and its mark; full disks."""

import errno
import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, events, facts_of, open_run, settings, sine_model, summary, tg

# --- files of weights


FACTS = {"steps": 4, "train_seconds": 2.5, "step_ms": 625.0, "stopped": "", "seed": 1, "world_size": 1}


def good_box(s):
    weights = {n: p.detach() for n, p in tg.field_views(dict(sine_model(s).named_parameters())).items()}
    return {"architecture": tg.architecture(s), "weights": weights, "facts": FACTS}


def saved(box):
    out = io.BytesIO()
    torch.save(box, out)
    return out.getvalue()


def refuses(path, s=None):
    """The file is refused within seconds, in one short line, which is returned."""
    begin = time.monotonic()
    with pytest.raises(tg.UserError) as caught:
        tg.read_weights(str(path), tg.GPT(s or settings()))
    text = str(caught.value)
    assert len(text) <= 480 and text.isprintable() and "EVAL_ONLY_PATH=" in text
    assert time.monotonic() - begin < 10
    return text


def test_weights_and_facts_come_back_and_torch_reads_the_file(tmp_path):
    s = settings()
    path, model = tmp_path / "w.pt", tg.GPT(s)
    path.write_bytes(tg.sealed(good_box(s)))
    assert tg.read_weights(str(path), model) == FACTS
    twin = dict(sine_model(s).named_parameters())
    assert all(torch.equal(p, twin[n]) for n, p in model.named_parameters())
    assert facts_of(path) == FACTS


def test_a_setting_that_is_younger_than_the_file_had_its_default(tmp_path):
    box, path = good_box(settings()), tmp_path / "old.pt"
    del box["architecture"]["ROPE_BASE"]
    path.write_bytes(tg.sealed(box))
    assert tg.read_weights(str(path), tg.GPT(settings())) == FACTS
    assert "ROPE_BASE=10000.0 there, 500.0 here" in refuses(path, settings(ROPE_BASE=500))


def test_a_file_without_a_digest_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(saved(good_box(settings())))
    assert "not as train_gpt.sealed writes it" in refuses(path)


def test_every_flipped_bit_is_noticed(tmp_path):
    s = settings()
    good, path = tg.sealed(good_box(s)), tmp_path / "w.pt"
    places = [*range(0, len(good), len(good) // 20), *range(len(good) - 100, len(good), 5)]
    for i, at in enumerate(places):
        bad = bytearray(good)
        bad[at] ^= 1 << i % 8
        path.write_bytes(bad)
        refuses(path)
    for cut in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        refuses(path)
    path.write_bytes(good + b"x")
    refuses(path)


def with_weight(value):
    """A good file's contents with one tensor replaced."""
    box = good_box(settings())
    box["weights"]["blocks.0.attn.q_gain"] = value
    return box


GAIN = torch.ones(2)      # of two heads


CONTENTS = {
    "nan": lambda: with_weight(GAIN * float("nan")), "infinite": lambda: with_weight(GAIN / 0),
    "boolean": lambda: with_weight(GAIN > 0), "complex": lambda: with_weight(GAIN + 1j),
    "half": lambda: with_weight(GAIN.half()), "sparse": lambda: with_weight(GAIN.to_sparse()),
    "a number": lambda: with_weight(1.0), "other shape": lambda: with_weight(torch.ones(3)),
    "huge view": lambda: with_weight(torch.ones(1).expand(10 ** 12)),
    "missing": lambda: {**good_box(settings()), "weights": {}},
    "list": lambda: [1, 2], "text": lambda: "weights", "none": lambda: dict.fromkeys(good_box(settings())),
    "architecture 5": lambda: {**good_box(settings()), "architecture": 5},
    "tensor setting": lambda: {**good_box(settings()), "architecture": {"NUM_LAYERS": torch.ones(9)}},
    "no architecture": lambda: {**good_box(settings()), "architecture": {}},
    "unknown setting": lambda: {**good_box(settings()), "architecture": {
        **tg.architecture(settings()), "X" * 10 ** 5 + "\n": "y" * 10 ** 5}},
    "no facts": lambda: {**good_box(settings()), "facts": {}},
    "long name": lambda: {**good_box(settings()), "weights": {"n\n" * 10 ** 5: GAIN}},
    "odd names": lambda: {**good_box(settings()), "weights": {1: GAIN, "a": GAIN, None: GAIN}},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_other_contents_are_refused_in_one_line(tmp_path, name):
    path = tmp_path / "w.pt"
    path.write_bytes(tg.sealed(CONTENTS[name]()))
    refuses(path)


def deep_tuples(levels=60):
    """A short pickle of one tuple that holds another twice, and so on: as a key it is hashed for ever."""
    out = b"\x80\x02}" + b")q\x00"
    for i in range(levels):
        out += b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    return out + b"K\x01s."


def archive(pickled, compression=zipfile.ZIP_STORED, more=b""):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        z.writestr("archive/data.pkl", pickled)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data/0", more)
    return out.getvalue()


def test_archives_that_unfold_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    nested = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    for data in (archive(deep_tuples()), archive(nested), archive(b"\x80\x02K\x01.", zipfile.ZIP_DEFLATED,
                 bytes(50 << 20)), archive(pickle.dumps(print)), archive(b""), b"PK\5\6" + bytes(18), b""):
        path.write_bytes(data)
        refuses(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large.pt", "wb") as f:
        f.truncate(1 << 40)
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "nowhere", tmp_path / "large.pt",
                 "x" * 5000, "a\0b"):
        refuses(path)


def test_a_setting_that_a_file_lacks_had_its_default():
    s = settings()
    theirs = tg.architecture(s)
    tg.check_architecture(s, {**theirs, "OLD_MECHANISM": False}, "it")
    with pytest.raises(tg.UserError, match="OLD_MECHANISM=2 there, unknown here"):
        tg.check_architecture(s, {**theirs, "OLD_MECHANISM": 2}, "it")
    del theirs["SMEAR_GATE_ENABLED"]
    tg.check_architecture(s, theirs, "it")
    with pytest.raises(tg.UserError, match="SMEAR_GATE_ENABLED=True there, False here"):
        tg.check_architecture(settings(SMEAR_GATE_ENABLED=0), theirs, "it")


# --- what cannot be written


class Full:
    """A file on a disk that is full until `room` is set."""

    def __init__(self, file):
        self.file, self.room = file, False

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:7])      # a short write


def test_a_full_disk_loses_no_line_and_is_said_once(tmp_path, capsys):
    run = open_run(tmp_path)
    run.log("before", n=0)
    full = run.text.file = Full(run.text.file)
    for n in range(3):
        run.log("during", n=n)
    full.room = True
    run.log("after", n=1)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("warning", "go_on"))] == [
        "before n=0", "during n=0", "during n=1", "during n=2", "after n=1"]
    assert capsys.readouterr().out.count("No space left") == 1
    full.room = False
    for _ in range(300):
        run.log("much", text="x" * 50_000)
    assert len(run.text.unwritten) <= run.text.MOST


def test_a_summary_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    monkeypatch.setattr(tg.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    run.save_summary()
    assert "I/O error" in events(tmp_path, "warning")[0]["text"]


@pytest.mark.parametrize("fault", [
    BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error"),
    ValueError("I/O operation on closed file")])
def test_a_screen_that_is_gone_ends_nothing(tmp_path, monkeypatch, fault):
    class Gone:
        closed = False

        def write(self, text):
            raise fault

        isatty = flush = fileno = lambda self: 0

    run = open_run(tmp_path)
    monkeypatch.setattr(tg.sys, "stdout", Gone())
    run.log("one", a=1)
    run.log("two", a=1)
    assert events(tmp_path, "two") and len(events(tmp_path, "warning")) == 1


def test_what_json_cannot_say_is_null(tmp_path):
    run = open_run(tmp_path)
    run.log("odd", a=float("nan"), b=[1.0, float("inf")], c={"d": -np.inf}, e=np.float32(2), f=Path("x"))
    (event,) = events(tmp_path, "odd")
    assert event["a"] is None and event["b"] == [1.0, None] and event["c"] == {"d": None}
    run.summary["val_bpb"] = float("nan")
    run.save_summary()
    assert summary(tmp_path)["val_bpb"] is None
    run.log("text", words="two\nlines", word="a\x1bb")
    text = (tmp_path / "train.log").read_text()
    assert "\x1b" not in text and [line.split()[0] for line in text.splitlines()] == ["odd", "go_on", "text"]


# --- whose a folder is


def test_a_folder_has_one_live_run(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(tg.UserError, match=rf"in use by a live run \(pid {os.getpid()} on "):
        open_run(tmp_path)
    for name in (".final_model.pt.abcd_123", ".summary.json.abcdefgh", ".space.77", "mine.txt", ".keep"):
        (tmp_path / name).write_text("")
    run.close()
    again = open_run(tmp_path)      # the next owner takes away what killed writes have left
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"train.log", "metrics.jsonl", ".lock", "mine.txt", ".keep"}
    again.close()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_ends_with_its_process(tmp_path):
    code = f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import fcntl, pathlib, signal\n" \
           f"f = open({str(tmp_path / '.lock')!r}, 'a+'); fcntl.flock(f, fcntl.LOCK_EX)\n" \
           "print('locked', flush=True); signal.pause()"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(tg.UserError, match="in use by a live run"):
        open_run(tmp_path)
    other.kill()
    other.wait()
    open_run(tmp_path).close()


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tg.fcntl, "flock", unsupported)
    open_run(tmp_path)
    assert "cannot be locked" in events(tmp_path, "warning")[0]["text"]


@pytest.mark.parametrize("text", [
    "{", "[]", "null", "5", "[" * 100_000, '{"evaluation_runs": "x"}', '{"steps": {}}',
    '{"training_not_compliant_because": 3}', '{"training_not_compliant_because": [3]}'],
    ids=lambda text: text[:12])
def test_a_summary_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(tg.UserError, match="summary.json is damaged"):
        open_run(tmp_path, EVAL_ONLY_PATH=tmp_path / tg.WEIGHTS_NAME)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", ["summary.json", "train.log", tg.ARTIFACT_NAME])
def test_a_folder_in_place_of_a_file_is_one_line(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(tg.UserError, match="ARTIFACT_DIR|move it away"):
        open_run(tmp_path)


# --- the artifact and its mark


def late_clock(seconds: float) -> tg.Clock:
    return tg.Clock(600.0, seconds)


def test_a_late_artifact_is_marked_before_it_has_its_name(tmp_path, monkeypatch):
    run, seen = open_run(tmp_path), []
    rename = os.replace

    def watched(source, target):
        if Path(target).name == tg.ARTIFACT_NAME:
            seen.append((Path(source).read_bytes(), summary(tmp_path)))
        rename(source, target)

    monkeypatch.setattr(tg.os, "replace", watched)
    blob = tg.artifact_to_bytes({}, {"codes": b"123"})
    seconds, size = tg.write_artifact(run.s, run, blob, late_clock(601))
    ((there, said),) = seen
    assert seconds > 601 and len(there) == size and "not_compliant" in tg.artifact_from_bytes(there, "it")[0]
    assert not said["compliant"] and said["train_seconds"] > 601
    assert said["artifact_digest"] == tg.digest_of((tmp_path / tg.ARTIFACT_NAME).read_bytes()).hex()
    tg.write_artifact(run.s, open_run(tmp_path / "in_time"), blob, late_clock(10))
    assert (tmp_path / "in_time" / tg.ARTIFACT_NAME).read_bytes() == blob


@pytest.mark.parametrize("mark", ["a\nb\x1b[2J", "x; " * 200_000, "é\u202e" * 40])
def test_a_mark_is_plain_and_short_wherever_it_comes_from(mark):
    plain = tg.plain_mark(mark)
    assert plain.isascii() and plain.isprintable() and 0 < len(plain) <= 256
    blob = tg.marked(tg.artifact_to_bytes({"not_compliant": mark}, {}), mark)
    assert len(tg.artifact_from_bytes(blob, "it")[0]["not_compliant"]) <= 256


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


def test_what_finds_another_place_makes_a_record_in_its_folder(tmp_path, s, monkeypatch):
    """The folder's disk is full from the first step on; later it has space again."""
    folder, model, write = tmp_path / "run", tg.GPT(s), tg.write_atomic
    monkeypatch.setattr(tg.tempfile, "gettempdir", lambda: str(tmp_path))
    run = open_run(folder)
    run.save_summary()

    def full(path, data):
        if path.parent == folder:
            raise tg.UserError(f"cannot write {path}: No space left on device")
        write(path, data)

    monkeypatch.setattr(tg, "write_atomic", full)
    facts = tg.weight_facts(s, run.world, 7, 70.0, "")
    tg.save_weights(run, model, facts)
    rescued = tmp_path / f"run-{run.id}" / tg.WEIGHTS_NAME
    assert run.restart_setting() == {"EVAL_ONLY_PATH": str(rescued)}
    tg.write_artifact(run.s, run, tg.artifact_to_bytes({}, {}), tg.Clock())
    assert run.artifact == rescued.with_name(tg.ARTIFACT_NAME) and run.artifact.exists()
    assert run.restart_setting() == {"EVAL_ONLY_PATH": str(rescued)}      # the summary could not be written
    run.close()
    monkeypatch.setattr(tg, "write_atomic", write)
    again = open_run(folder, EVAL_ONLY_PATH=rescued)
    assert tg.take_over(again.s, again, tg.read_weights(str(rescued), model)).elapsed() >= 70
    assert again.time_known and again.summary["steps"] == 7
    elsewhere = open_run(tmp_path / "other", EVAL_ONLY_PATH=rescued)
    assert not elsewhere.goes_on()


def test_a_line_that_a_kill_tore_does_not_spoil_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "whole"}\n{"event": "to')
    (tmp_path / "train.log").write_text("whole\nto")
    run = open_run(tmp_path, EVAL_ONLY_QUANTIZED_PATH=tmp_path / tg.ARTIFACT_NAME)
    run.log("next")
    assert events(tmp_path, "whole") and events(tmp_path, "next")
    assert (tmp_path / "train.log").read_text().startswith("whole\nnext\n")


def test_a_lock_that_is_always_another_file_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tg.os, "fstat", lambda _: SimpleNamespace(st_ino=-1, st_mtime_ns=0))
    assert tg.lock_folder(tmp_path) is None


@pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl"])
def test_a_pipe_in_place_of_a_file_is_one_line(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(tg.UserError, match=f"{name} is a pipe: move it away"):
        open_run(tmp_path)


def test_names_in_a_folder_that_are_taken(tmp_path):
    (tmp_path / ".final_model.pt.abcd1234").mkdir()      # like a leftover, but not to be removed
    open_run(tmp_path).close()
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(tg.UserError, match="checkpoint is no folder: move it away"):
        open_run(tmp_path)


@pytest.mark.parametrize("name, setting", [
    (tg.AVERAGE, "EVAL_ONLY_PATH="), ("checkpoint/resume.3.pt", "RESUME=1"),
    (tg.WEIGHTS_NAME, "EVAL_ONLY_PATH="), (tg.ARTIFACT_NAME, "EVAL_ONLY_QUANTIZED_PATH=")])
def test_what_an_earlier_run_has_kept_is_not_overwritten(tmp_path, name, setting):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / name).write_text("")
    (tmp_path / "train.log").write_text("its log")
    with pytest.raises(tg.UserError, match=f"an earlier run has kept: .* set {setting}"):
        open_run(tmp_path)
    assert (tmp_path / "train.log").read_text() == "its log"
