"""Training that cannot be lost: signals, numbers that are not finite, averages beside training, files of
weights, full disks, reports that fail, and going on from a checkpoint."""

import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile

import pytest
import torch
from conftest import ROOT, environment, settings, sine_model, tg

QUIET = dict(WARMUP_STEPS=0, TRAIN_LOG_EVERY=500, ITERATIONS=8)
TERM = int(signal.SIGTERM)


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """No signal is pending, and nothing is rehearsed: these tests are about training."""
    monkeypatch.setattr(tg, "SIGNALS", tg.Signals())
    monkeypatch.setattr(tg, "rehearse", lambda *_: 0.0)


def start(data, folder, **changes):
    """Settings, run and model of a training in a folder."""
    s = settings(DATA_PATH=data, ARTIFACT_DIR=folder, **{**QUIET, **changes})
    run = tg.Run(s, tg.World())
    return s, run, tg.build_model(s, tg.World())


def learn(data, folder, **changes):
    """Train as the script does: the folder's model, clock and stream."""
    s, run, model = start(data, folder, **changes)
    try:
        clock, stream = tg.train(s, tg.World(), run, model, None)
    finally:
        run.close()
    stream.close()
    return model, clock, stream


def at_step(monkeypatch, step, act):
    """Do something when a step has been taken."""
    after = tg.Progress.events

    def events(self, now, *rest):
        after(self, now, *rest)
        if now == step:
            act()

    monkeypatch.setattr(tg.Progress, "events", events)


def stop_at(monkeypatch, step):
    at_step(monkeypatch, step, lambda: setattr(tg.SIGNALS, "number", TERM))


def events(folder, kind):
    def no_constant(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [e for e in (json.loads(x, parse_constant=no_constant) for x in lines) if e["event"] == kind]


def facts_of(path):
    return torch.load(path, weights_only=True)["facts"]


# --- signals

PATIENT = """
import sys; sys.path.insert(0, '.'); import train_gpt as t
t.rehearse = lambda *a: 0.0
after = t.Progress.events
def events(self, step, *rest):
    after(self, step, *rest)
    print('did', step, flush=True)
t.Progress.events = events
code = t.main([])
sys.stdout.flush()
t.os._exit(code)
"""


def test_a_signal_stops_training_after_the_step_and_a_lost_terminal_does_not(data, tmp_path):
    env = environment(data, ARTIFACT_DIR=tmp_path, **{**QUIET, "ITERATIONS": 1_000_000})
    process = subprocess.Popen([sys.executable, "-c", PATIENT], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    next(line for line in process.stdout if line == "did 2\n")
    process.send_signal(signal.SIGHUP)
    next(line for line in process.stdout if line == "did 9\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in err
    last = [line for line in out.splitlines() if line.startswith("did ")][-1:]
    step = int(last[0].split()[1]) if last else 9
    assert f"training was stopped at step {step} by SIGINT" in err
    facts = facts_of(tmp_path / tg.AVERAGE)
    assert facts["stopped"] == f"stopped at step {step}" and facts["steps"] == step
    assert not (tmp_path / "final_model.pt").exists() and not (tmp_path / tg.BALLAST).exists()


def child(act):
    """A process that listens to signals and acts: (its id, the pipe into which it says that it is ready)."""
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return pid, ours
    code = 99
    try:
        signals = tg.Signals()
        signals.install()
        act(signals, lambda: os.write(theirs, b"!"))
    except tg.Interrupted as stop:
        code = stop.status
    finally:
        os._exit(code)


def ends(act, *sent, until_the_end=0):
    """The exit status of such a process after these signals; the last may be sent again and again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)      # a fork beside torch's threads
        pid, ours = child(act)
    os.read(ours, 1)
    os.close(ours)
    for number in sent:
        os.kill(pid, number)
        time.sleep(0.05)
    while until_the_end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        os.kill(pid, until_the_end)
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_a_signal_does_outside_of_training_and_what_a_second_one_does():
    def evaluation(signals, ready):
        ready()
        time.sleep(60)

    def long_step(signals, ready):
        with signals.held():
            ready()
            time.sleep(600)

    def short_step(signals, ready):
        with signals.held():
            ready()
            time.sleep(0.3)
        time.sleep(60)

    assert ends(evaluation, signal.SIGHUP, signal.SIGTERM) == 143
    assert ends(short_step, signal.SIGINT, signal.SIGINT) == 130      # one request that came twice
    begin = time.monotonic()
    assert ends(long_step, signal.SIGTERM, until_the_end=signal.SIGINT) == 130
    assert time.monotonic() - begin < 300


def test_a_guard_around_a_report_does_not_swallow_an_interruption():
    assert not issubclass(tg.Interrupted, Exception)


# --- numbers that are not finite

@pytest.mark.parametrize("last", [False, True])
def test_a_step_that_is_not_finite_ends_training_and_is_named(data, tmp_path, monkeypatch, last):
    update, steps = tg.Trainer.update, []

    def poisoned(self, *shares):
        steps.append(1)
        if len(steps) == 12 and not last:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        norm = update(self, *shares)
        if len(steps) == 13 and last:     # nothing can be seen in loss and gradient
            next(iter(self.ema.values())).fill_(float("inf"))
        return norm

    monkeypatch.setattr(tg.Trainer, "update", poisoned)
    with pytest.raises(tg.UserError, match=f"not finite at step {13 if last else 12}: lower MATRIX_LR"):
        learn(data, tmp_path, ITERATIONS=13)
    assert len(steps) == (13 if last else 12) and not (tmp_path / "final_model.pt").exists()
    assert len(events(tmp_path, "train")) == 10
    tg.read_weights(str(tmp_path / tg.AVERAGE), tg.GPT(settings()))


def test_flags_are_read_when_they_have_arrived():
    class Arrival:
        def __init__(self):
            self.here = False

        def query(self):
            return self.here

        def synchronize(self):
            self.here = True

    watch, arrivals = tg.FiniteWatch(), [Arrival() for _ in range(3)]
    for step, good in enumerate((True, False, True), 1):
        watch.flying.append((step, torch.tensor(good), arrivals[step - 1]))
    assert watch.first_bad() == 0 and len(watch.flying) == 3
    arrivals[0].here = True
    assert watch.first_bad() == 0 and len(watch.flying) == 2
    assert watch.first_bad(wait=True) == 2 == watch.first_bad()


# --- averages beside training

def test_averages_are_on_disk_while_training_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tg.AverageKeeper, "SECONDS", 0.0)
    monkeypatch.setattr(tg.AverageKeeper, "start", lambda self, *x, go=tg.AverageKeeper.start: (
        go(self, *x), self.finish()))
    seen = {}

    def look():
        for name in ("average.pt", "average.previous.pt"):
            path = tmp_path / "checkpoint" / name
            model = tg.GPT(settings())
            seen[name] = tg.read_weights(str(path), model)
            assert any(p.detach().any() for p in model.parameters())

    at_step(monkeypatch, 5, look)
    learn(data, tmp_path)
    assert seen["average.pt"]["stopped"] == "average of step 5" and seen["average.pt"]["steps"] == 5
    assert seen["average.previous.pt"]["stopped"] == "average of step 4"
    assert facts_of(tmp_path / "final_model.pt")["stopped"] == "" and events(tmp_path, "average")


def keeper(folder, run=None):
    class Log:
        dir, lines = folder, []

        def log(self, event, quiet=False, **values):
            self.lines.append(values)

        def warn(self, text, once=None):
            self.lines.append({"text": text})

        def note_go_on(self):
            pass

    class Holder:
        ema = {n: p.detach() for n, p in sine_model(settings()).named_parameters()}

    return tg.AverageKeeper(settings(), tg.World(), Log(), Holder, tg.Clock()), Holder.ema, Log.lines


def test_an_average_that_is_not_finite_or_cannot_be_written_leaves_the_older(tmp_path, monkeypatch):
    kept, ema, lines = keeper(tmp_path)
    kept.offer(1)
    kept.finish()
    before = (tmp_path / tg.AVERAGE).read_bytes()
    next(iter(ema.values())).view(-1)[0] = float("nan")
    kept.start(2, "average of step 2")
    kept.finish()
    next(iter(ema.values())).view(-1)[0] = 0
    monkeypatch.setattr(tg, "write_atomic", lambda *_: (_ for _ in ()).throw(tg.UserError("No space left")))
    kept.close(3, "stopped at step 3")
    assert (tmp_path / tg.AVERAGE).read_bytes() == before
    assert "No space left" in lines[-1]["text"]


def test_averages_go_once_the_artifact_and_the_weights_are_there(data, tmp_path):
    _, run, _ = start(data, tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / tg.AVERAGE).write_bytes(b"weights")
    tg.remove_safety_copies(run)
    assert (tmp_path / tg.AVERAGE).exists()      # nothing else holds the weights
    (tmp_path / "final_model.pt").write_bytes(b"weights")
    tg.remove_safety_copies(run)
    assert not (tmp_path / "checkpoint").exists()


# --- weights files

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
    assert len(text) <= 300 and text.isprintable() and "EVAL_ONLY_PATH=" in text
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


# --- full disks, and reports that fail

def test_the_space_for_the_weights_is_kept_until_they_are_written(data, tmp_path, monkeypatch):
    sizes, write = [], tg.write_atomic

    def watched(path, content):
        ballast = tmp_path / tg.BALLAST
        sizes.append((path.name, ballast.stat().st_size if ballast.exists() else 0))
        write(path, content)

    monkeypatch.setattr(tg, "write_atomic", watched)
    learn(data, tmp_path)
    need = tg.bytes_of_results(settings())
    assert sizes[0] == ("average.pt", need) and ("final_model.pt", 0) in sizes
    assert not (tmp_path / tg.BALLAST).exists()


@pytest.mark.parametrize("full, place", [(1, "here"), (2, "temp"), (3, None)])
def test_weights_find_another_place_when_the_disk_is_full(data, tmp_path, monkeypatch, full, place):
    for name in ("here", "temp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tg.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    write, failed = tg.write_atomic, []

    def no_space(path, content):
        if path.name.startswith("final_model") and len(failed) < full:
            failed.append(path)
            raise tg.UserError(f"cannot write {path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(tg, "write_atomic", no_space)
    model, _, _ = learn(data, tmp_path / "run")      # the run goes on in any case
    warned = " ".join(e["text"] for e in events(tmp_path / "run", "warning"))
    assert warned.count("No space left") == full
    if place is None:
        assert "only in memory" in warned
        return
    (found,) = (tmp_path / place).glob("final_model.*.pt")
    assert f"EVAL_ONLY_PATH={found}" in warned
    twin = tg.GPT(settings())
    tg.read_weights(str(found), twin)
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), model.parameters()))


ONE_LAYER = dict(NUM_LAYERS=1, NUM_LOOPS=0, LOOP_START=0, LOOP_END=0, PARALLEL_START_LAYER=0, XSA_LAST_N=1)


def test_a_model_of_one_layer_without_skips_is_reported_on(data, tmp_path):
    learn(data, tmp_path, **ONE_LAYER)
    assert (tmp_path / "final_model.pt").exists() and not events(tmp_path, "warning")


def test_a_report_that_fails_is_a_warning_after_the_weights(data, tmp_path, monkeypatch):
    def broken(self):
        assert (tmp_path / "final_model.pt").exists()
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tg.Optimiser, "never_trained", broken)
    learn(data, tmp_path)
    assert "out of luck" in events(tmp_path, "warning")[0]["text"]


# --- going on from a checkpoint

GOING_ON = dict(CHECKPOINT_EVERY_SECONDS=1e-6, EMA_DECAY=0.9, MUON_MOMENTUM_WARMUP_STEPS=10)
KINDS = {
    "docpack": dict(TRAIN_SEQ_SCHEDULE="32@0.5,64@1", SEQ_CHANGE_WARMUP_STEPS=3, TRAIN_LOADER="docpack"),
    "coprime": dict(TRAIN_LOADER="coprime", BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8, LATE_QAT_THRESHOLD=0.9,
                    LATE_QAT_MIN_STEP=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_one_left_alone(data, tmp_path, monkeypatch, kind):
    changes = {**GOING_ON, **KINDS[kind]}
    whole, _, stream = learn(data, tmp_path / "whole", **{**changes, "CHECKPOINT_EVERY_SECONDS": 0})
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(tg.Interrupted, match="stopped at step 5 by SIGTERM") as stop:
            learn(data, tmp_path / "two", **changes)
        assert stop.value.status == 143
    monkeypatch.setattr(tg, "SIGNALS", tg.Signals())
    torch.manual_seed(0)      # as another process would have it
    resumed, clock, again = learn(data, tmp_path / "two", RESUME=1, **changes)
    assert events(tmp_path / "two", "resume")[0]["step"] == 5
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    assert again.given == stream.given and again.epoch == stream.epoch
    later = [x.ahead.popleft().result()[0].x for x in (stream, again)]      # what calibration would read
    assert torch.equal(*later)
    ends = [events(tmp_path / name, "train_end")[-1] for name in ("whole", "two")]
    assert ends[0]["steps"] == ends[1]["steps"] and ends[0]["epochs"] == ends[1]["epochs"]
    assert clock.elapsed() > events(tmp_path / "two", "resume")[0]["seconds"] > 0


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(data, tmp_path, monkeypatch):
    write, killed = tg.write_atomic, []

    def deadly(path, content):
        if path.name == "resume.5.0.pt":
            killed.append(path)
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(tg, "write_atomic", deadly)
    with pytest.raises(KeyboardInterrupt):
        learn(data, tmp_path, **GOING_ON)
    s, run, _ = start(data, tmp_path, RESUME=1, **GOING_ON)
    assert killed and tg.read_checkpoint(s, tg.World(), run)["step"] == 4


def test_a_checkpoint_that_one_rank_cannot_write_is_none(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tg.World, "gather", lambda self, fault: [fault, "rank 1: No space left"])
    learn(data, tmp_path, **{**GOING_ON, "ITERATIONS": 3})
    assert not list(tmp_path.glob("checkpoint/resume.*"))
    said = [event["text"] for event in events(tmp_path, "warning")]
    assert said == ["no checkpoint at step 1: rank 1: No space left"]      # once


def test_resume_is_refused_where_it_cannot_go_on(data, tmp_path, monkeypatch):
    for changes, word in ((dict(MAX_WALLCLOCK_SECONDS=60), "MAX_WALLCLOCK_SECONDS=60"),
                          (dict(EVAL_ONLY_PATH="x.pt"), "EVAL_ONLY_PATH"),
                          (dict(ARTIFACT_DIR=""), "ARTIFACT_DIR")):
        with pytest.raises(tg.UserError, match=word):
            settings(**{"RESUME": 1, "ARTIFACT_DIR": tmp_path, **changes})
    with pytest.raises(tg.UserError, match="finds no checkpoint"):
        learn(data, tmp_path / "empty", RESUME=1)
    stop_at(monkeypatch, 2)
    with pytest.raises(tg.Interrupted):
        learn(data, tmp_path / "r", **GOING_ON)
    for changes, word in ((dict(SEED=5), "SEED=1337 there, 5 here"), (dict(NUM_LOOPS=0), "NUM_LOOPS=1 there"),
                          (dict(ITERATIONS=99), "ITERATIONS=8 there")):
        with pytest.raises(tg.UserError, match=word):
            learn(data, tmp_path / "r", RESUME=1, **{**GOING_ON, **changes})
    whole = tmp_path / "r" / "checkpoint" / "resume.2.0.pt"
    box = torch.load(whole, weights_only=True)
    box["settings"]["WORLD_SIZE"] = 2
    whole.write_bytes(tg.sealed(box))
    with pytest.raises(tg.UserError, match="WORLD_SIZE=2 there, 1 here"):
        learn(data, tmp_path / "r", RESUME=1, **GOING_ON)
    whole.write_bytes(whole.read_bytes()[:-1])
    s, run, _ = start(data, tmp_path / "r", RESUME=1, **GOING_ON)
    average = f"EVAL_ONLY_PATH={tmp_path / 'r' / tg.AVERAGE}"
    with pytest.raises(tg.UserError, match=f"resume.2.0.pt: it is damaged.*quantise by {average}"):
        tg.read_checkpoint(s, tg.World(), run)
    assert average in run.go_on() and "RESUME" not in run.go_on()


def test_a_training_that_was_resumed_to_its_end_was_not_stopped(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(tg.Interrupted):
            learn(data, tmp_path, **GOING_ON)
    monkeypatch.setattr(tg, "SIGNALS", tg.Signals())
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 2, "stopped": "stopped at step 2"}))
    learn(data, tmp_path, RESUME=1, **GOING_ON)
    ended = json.loads((tmp_path / "summary.json").read_text())
    assert ended["steps"] == 8 and ended["stopped"] is None


TWO_RANKS = """
import os, sys; sys.path[:0] = ['.', 'tests']
from pathlib import Path
from conftest import tg
from test_faults_training import GOING_ON, QUIET, settings
folder, data = Path(sys.argv[1]), sys.argv[2]
world = tg.World.join(os.environ)
tg.rehearse = lambda *a: 0.0
after = tg.Progress.events
def events(self, step, *rest):
    after(self, step, *rest)
    if self.run.dir.name == 'two' and not self.s.resume and step == 5 and world.rank == 1:
        os.kill(os.getpid(), tg.signal.SIGTERM)      # one rank alone is asked to end
tg.Progress.events = events
def learn(name, **more):
    s = settings(DATA_PATH=data, ARTIFACT_DIR=folder / name, **{**QUIET, **GOING_ON, **more})
    tg.SIGNALS = tg.Signals()
    tg.SIGNALS.install()
    tg.train(s, world, tg.Run(s, world), tg.build_model(s, world), None)[1].close()
learn('whole')
try:
    learn('two')
    status = 0
except tg.Interrupted as stop:
    status = stop.status
learn('two', RESUME=1)
sys.stdout.flush()
os._exit(status)
"""


def test_two_ranks_stop_together_and_go_on_to_the_bit(data, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        ranks.append(subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(tmp_path), str(data)], cwd=ROOT,
                                      env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    out = [process.communicate(timeout=600)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], out
    before = tmp_path / "two" / "checkpoint" / "average.previous.pt"      # of the run that was resumed
    assert facts_of(before)["stopped"] == "stopped at step 5"
    assert events(tmp_path / "two", "resume")[0]["step"] == 5
    whole, two = (torch.load(tmp_path / name / "final_model.pt", weights_only=True)["weights"]
                  for name in ("whole", "two"))
    assert all(torch.equal(w, two[n]) for n, w in whole.items())
