"""Faults while a run is under way: what hangs, what cannot be written, who owns a folder, how it goes on."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, settings, summary, tg

from tools import make_record
from tools.common import load_run

SHORT = dict(ITERATIONS=2, WARMUP_STEPS=0, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)


def events(folder: Path, kind: str) -> list[dict]:
    """Every event of a kind; a line that is no strict JSON fails."""
    def refuse(word):
        raise ValueError(word)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [event for event in found if event["event"] == kind]


def start(monkeypatch, env: dict) -> int:
    """The script's main under this environment; its exit status."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    return tg.main([])


def open_run(folder: Path, world=None, **changes) -> tg.Run:
    return tg.Run(settings(ARTIFACT_DIR=folder, **changes), world or tg.World())


# --- what hangs


TRAINING = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as tg

tg.STOPPED = 4.0     # the time it has in a real job is tested below, on a made-up clock
world = tg.World.join(os.environ)
run = tg.Run(tg.Settings.from_env(os.environ), world)
for step in range(100_000):      # of a training that takes no time
    world.beat(f"step {{step}}")
    world.agree(float(step))
    time.sleep(0.05)
    if step == 100 and world.main:
        print("ready", flush=True)
"""


def stopped_rank(data, folder: Path):
    """Two ranks that train; one is stopped after some steps. (its pid, seconds until the end, output)."""
    (folder / "train_gpt.py").write_text(TRAINING)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen([sys.executable, *launcher, str(folder / "train_gpt.py")], text=True,
                           env=environment(data, ARTIFACT_DIR=folder), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    next(line for line in job.stdout if line.startswith("ready"))
    children = subprocess.run(["ps", "--ppid", str(job.pid), "-o", "pid="], capture_output=True, text=True)
    for pid in map(int, children.stdout.split()):
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, signal.SIGSTOP)
            begin = time.monotonic()
            output = job.communicate(timeout=600)[0]
            return pid, time.monotonic() - begin, output
    raise AssertionError("there is no rank 1")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_rank_is_named_and_the_job_ends(data, tmp_path):
    pid, seconds, output = stopped_rank(data, tmp_path)
    said = next(line for line in output.splitlines() if line.startswith("error: "))
    assert said.startswith("error: rank 1 (") and f"pid {pid}) has made no progress since step" in said
    assert seconds < 60 and output.count("error: rank") == 1
    assert "to go on: ARTIFACT_DIR=" in output and "torchrun --standalone --nproc_per_node=2" in output
    root_cause = output.partition("Root Cause")[2]
    assert f"(pid: {pid})" in root_cause                # and torchrun blames the right one
    assert events(tmp_path, "error")[0]["text"] in said


def test_a_mistake_that_all_ranks_see_is_said_once(data, tmp_path):
    """The launcher ends those that leave it to rank 0: no reason for a stack trace."""
    env = environment(data, ARTIFACT_DIR=tmp_path, DATA_PATH=tmp_path / "nowhere")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(ROOT / "train_gpt.py")], env=env, capture_output=True, text=True)
    assert done.stderr.count("error: ") == 1 and "Interrupted" not in done.stderr, done.stderr


@pytest.fixture
def signalled(monkeypatch):
    """Send the script a SIGTERM, as from now on, in place of the function of this name."""
    monkeypatch.setattr(tg, "SIGNALS", tg.Signals())

    def during(module, name):
        monkeypatch.setattr(module, name, lambda *_: tg.SIGNALS.receive(signal.SIGTERM, None))

    return during


def test_a_signal_while_a_run_ends_changes_nothing(tmp_path, signalled, monkeypatch, capsys):
    run = open_run(tmp_path)
    signalled(tg.time, "sleep")
    assert tg.end_early(tg.UserError("a mistake"), run, 1) == 143      # of the rank that waits in silence
    assert not capsys.readouterr().err
    monkeypatch.setattr(tg, "SIGNALS", tg.Signals())
    signalled(tg, "tell")
    assert tg.end_early(tg.UserError("a mistake"), run, 0) == 2
    assert events(tmp_path, "error")[0]["text"] == "a mistake"
    assert tg.end_early(tg.UserError("not finite"), run, 0) == 2      # the signal is no better reason


def test_a_signal_after_the_last_stage_changes_nothing(tmp_path, signalled, monkeypatch):
    stages = ("log_start", "check_before_start", "build_model", "Validation", "check_same_text",
              "make_artifact", "score_artifact")
    for name in stages:
        monkeypatch.setattr(tg, name, lambda *_: None)
    signalled(tg, "closing_block")
    run = open_run(tmp_path)
    tg.pipeline(run.s, run.world, run, "")
    assert tg.SIGNALS.number and (tmp_path / "summary.json").exists()


class Store(dict):
    """A rendezvous store."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return set(keys) <= set(self)

    def multi_get(self, keys):
        return [self[key] for key in keys]


class Job:
    """Heartbeats of several ranks on one made-up clock, without threads."""

    def __init__(self, monkeypatch, ranks=2):
        self.now, self.stopped, store = 0.0, set(), Store()
        monkeypatch.setattr(tg.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(tg.dist, "TCPStore", lambda *a, **k: None)
        monkeypatch.setattr(tg.dist, "PrefixStore", lambda *a: store)
        monkeypatch.setattr(tg, "process_state", lambda pid: ("T" if pid in self.stopped else "S", "1"))
        env = {"MASTER_ADDR": "here", "MASTER_PORT": "1"}
        self.beats = [tg.Heartbeat(tg.World(rank, ranks), env) for rank in range(ranks)]
        self.awake = set(range(ranks))
        self.pids(monkeypatch)

    def pids(self, monkeypatch):
        monkeypatch.setattr(tg.os, "getpid", lambda: self.speaking)

    def pass_time(self, seconds, work=()):
        """Ticks of those that are awake; `work`: ranks that make progress. Who is found to be stuck."""
        end = self.now + seconds
        while self.now < end:
            self.now += tg.TICK
            for rank in sorted(self.awake):
                self.speaking, beat = rank, self.beats[rank]
                if rank in work:
                    beat.world.beat(f"step {beat.world.pulse.beats}")
                if found := beat.turn(self.now):
                    return beat, found
        return None, []


def test_nobody_is_blamed_in_a_job_that_goes_on(monkeypatch):
    job = Job(monkeypatch, 3)
    assert not job.pass_time(400, work={0, 1, 2})[1]
    job.awake = {0, 1}                                 # a call that lets no thread run, in a live process
    assert not job.pass_time(50, work={0, 1})[1]
    job.awake = {0, 1, 2}
    assert not job.pass_time(100, work={0})[1]         # the others wait for it
    job.now += 3600                                    # all were suspended, and are continued
    assert not job.pass_time(40)[1]
    job.beats[2].leave()
    job.awake, job.stopped = {0, 1}, {2}               # done before the others
    assert not job.pass_time(200, work={0, 1})[1]


def test_a_stopped_process_is_found_within_the_minute(monkeypatch):
    job = Job(monkeypatch, 3)
    job.pass_time(20, work={0, 1, 2})
    job.awake, job.stopped, begin = {0, 2}, {1}, job.now
    beat, found = job.pass_time(100, work={0, 2})
    assert found == [1] and job.now - begin < 30
    assert "rank 1 (" in beat.describe(found) and "no progress since step 9" in beat.describe(found)


def test_a_rank_that_holds_up_the_others_is_found(monkeypatch):
    job = Job(monkeypatch, 3)
    job.pass_time(20, work={0, 1, 2})
    for rank in (0, 2):
        job.beats[rank].world.pulse.waiting = True
    begin = job.now
    assert job.pass_time(1000)[1] == [1] and 40 < job.now - begin < 60


def test_slow_steps_are_given_ten_times_their_length(monkeypatch):
    job = Job(monkeypatch)
    for _ in range(3):
        job.pass_time(2, work={0, 1})
        assert not job.pass_time(28)[1]
    begin = job.now
    beat, found = job.pass_time(1000)
    assert found == [0, 1] and 250 < job.now - begin < 330
    assert beat.describe(found).startswith("no rank has made progress since step")


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


def test_what_finds_another_place_makes_a_record_in_its_folder(tmp_path, s, monkeypatch):
    """The folder's disk is full from the first step on; later it has space again."""
    folder, model, write = tmp_path / "run", tg.GPT(s), tg.write_atomic
    monkeypatch.chdir(tmp_path)
    run = open_run(folder)
    run.save_summary()

    def full(path, data):
        if path.parent == folder:
            raise tg.UserError(f"cannot write {path}: No space left on device")
        write(path, data)

    monkeypatch.setattr(tg, "write_atomic", full)
    facts = tg.weight_facts(s, run.world, 7, 70.0, "")
    tg.save_weights(run, model, facts)
    rescued = tmp_path / f"final_model.{run.id}.pt"
    assert run.restart_setting() == {"EVAL_ONLY_PATH": str(rescued)}
    tg.write_artifact(run.s, run, tg.artifact_to_bytes({}, {}), tg.Clock())
    assert run.artifact == tmp_path / f"final_model.{run.id}.int6.ptz" and run.artifact.exists()
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
    assert (tmp_path / "train.log").read_text().startswith("whole\nto\nnext\n")


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
    (tg.AVERAGE, "EVAL_ONLY_PATH="), ("checkpoint/resume.3.0.pt", "RESUME=1"),
    (tg.WEIGHTS_NAME, "EVAL_ONLY_PATH="), (tg.ARTIFACT_NAME, "EVAL_ONLY_QUANTIZED_PATH=")])
def test_what_an_earlier_run_has_kept_is_not_overwritten(tmp_path, name, setting):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / name).write_text("")
    (tmp_path / "train.log").write_text("its log")
    with pytest.raises(tg.UserError, match=f"an earlier run has kept: .* set {setting}"):
        open_run(tmp_path)
    assert (tmp_path / "train.log").read_text() == "its log"


@pytest.mark.parametrize("text", ["{", "[]", "null", "5", "[" * 100_000], ids=lambda text: text[:6])
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


# --- the mark


def late_clock(seconds: float) -> tg.Clock:
    clock = tg.Clock(600.0)
    clock.start -= seconds
    return clock


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


# --- the score, and what comes after it


def test_a_score_that_is_not_finite_is_an_error(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(tg.UserError, match="score of the stage sliding is nan"):
        tg.log_score(run, "sliding", tg.Score(float("nan"), 10.0, 5), None, tg.Clock())
    assert not events(tmp_path, "score_sliding")


@pytest.fixture(scope="module")
def lost(data, tmp_path_factory):
    """A run that was lost when its artifact was written and its evaluation began: folder, stderr, status."""
    folder, patch = tmp_path_factory.mktemp("lost") / "a run", pytest.MonkeyPatch()
    said = []
    with patch.context() as patched:
        patched.setattr(tg, "log_probes", lambda *_: (_ for _ in ()).throw(RuntimeError("lost\npod")))
        patched.setattr(tg, "tell", said.append)
        patched.setattr(tg.sys, "argv", ["train_gpt.py"])
        status = start(patched, environment(data, ARTIFACT_DIR=folder, **SHORT))
    return folder, said, status


def command_environment(line: str) -> dict:
    """The settings that a printed command sets, beside those that every process here has."""
    words = shlex.split(line.removeprefix("to go on: "))
    assert words[-2:] == ["python", "train_gpt.py"]
    return {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **dict(w.split("=", 1) for w in words[:-2])}


def test_an_unexpected_end_is_two_lines_and_its_trace_is_in_the_log(lost):
    folder, said, status = lost
    assert status == 1 and said[0] == "error: RuntimeError: lost pod" and len(said) == 2
    assert "Traceback" in events(folder, "error")[0]["trace"]
    restarts = [shlex.split(event["command"])[-3] for event in events(folder, "go_on")]
    artifact = f"EVAL_ONLY_QUANTIZED_PATH={folder / tg.ARTIFACT_NAME}"
    assert restarts[-2:] == [f"EVAL_ONLY_PATH={folder / tg.WEIGHTS_NAME}", artifact]
    assert said[1] == f"to go on: {events(folder, 'go_on')[-1]['command']}"


def test_going_on_by_the_printed_command_makes_a_record(lost, data, tmp_path, monkeypatch, capsys):
    folder, said, _ = lost
    before = summary(folder)

    def broken(*_):
        raise ValueError("no such text")

    monkeypatch.setattr(tg, "closest_system", broken)          # what decorates fails
    monkeypatch.setattr(tg.Ledger, "profiles", broken)
    monkeypatch.setattr(tg, "run_probes", lambda *_: [])
    assert start(monkeypatch, {**command_environment(said[1]), "EVAL_STRIDE": "32"}) == 0
    after = summary(folder)
    assert after["val_bpb"] > 0 and after["compliant"]
    for key in ("steps", "step_ms", "train_seconds", "artifact_digest"):
        assert after[key] == before[key] is not None, key
    assert after["evaluation_runs"] == 2 and after["quantising_runs"] == 1
    assert after["not_as_in_training"] == {"EVAL_STRIDE": [32, 16]}
    warnings = [event["text"] for event in events(folder, "warning")]
    assert any("EVAL_STRIDE=32 here, 16 there" in text for text in warnings)
    assert sum("no such text" in text for text in warnings) == 2
    assert len(events(folder, "train_end")) == 1 and len(events(folder, "final")) == 1
    assert load_run(folder).source() == (ROOT / "train_gpt.py").read_bytes()
    made = make_record.main([str(folder), "--name", "again", "--track", "non_record", "--date", "2026-01-01",
                             "--out", str(tmp_path), "--skip-run", "a test"])
    readme = (tmp_path / "track_non_record_16mb" / "2026-01-01_again" / "README.md").read_text()
    assert made == 0 and "the evaluation was run 2 times" in readme and "EVAL_STRIDE=16 in training" in readme


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_into_head_with_its_log_on_a_full_disk(lost, data, tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    artifact = lost[0] / tg.ARTIFACT_NAME
    env = environment(data, ARTIFACT_DIR=tmp_path, EVAL_ONLY_QUANTIZED_PATH=artifact, **SHORT)
    done = subprocess.run(["bash", "-c", f"{sys.executable} train_gpt.py | head -3; exit ${{PIPESTATUS[0]}}"],
                          env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert summary(tmp_path)["val_bpb"] > 0 and len(done.stdout.splitlines()) == 3
    assert len(events(tmp_path, "warning")) == 2 and events(tmp_path, "final")


def test_an_artifact_that_is_not_the_one_written_is_refused(lost, tmp_path, monkeypatch, data):
    folder, said, _ = lost
    path = folder / tg.ARTIFACT_NAME
    blob = path.read_bytes()
    try:
        path.write_bytes(tg.marked(blob, "another one"))
        assert start(monkeypatch, command_environment(said[1])) == 2
        assert "is not the artifact that this run wrote" in events(folder, "error")[-1]["text"]
    finally:
        path.write_bytes(blob)


def test_quantising_goes_on_with_the_training_clock(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"training_not_compliant_because": ["it was late"]}))
    facts = {"steps": 7, "train_seconds": 500.0, "step_ms": 3.5, "stopped": "average of step 7"}
    run = open_run(tmp_path, EVAL_ONLY_PATH=tmp_path / "checkpoint" / "average.pt")
    clock = tg.take_over(run.s, run, facts)
    assert run.time_known and 500 <= clock.elapsed() < 510
    assert run.summary["steps"] == 7 and run.summary["stopped"] == "average of step 7"
    assert events(tmp_path, "train_end")[0]["seconds"] == 500
    assert run.summary["not_compliant_because"] == ["it was late"]      # nothing washes it out
    tg.take_over(run.s, run, {**facts, "stopped": ""})      # weights of a training that was not
    assert run.summary["stopped"] is None
    elsewhere = open_run(tmp_path / "b", EVAL_ONLY_PATH=tmp_path / "checkpoint" / "average.pt")
    assert tg.take_over(elsewhere.s, elsewhere, facts).elapsed() < 10 and not elsewhere.time_known


def test_the_way_on_is_the_best_that_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tg.sys, "argv", ["some/train_gpt.py"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    run = open_run(Path("run"), TRAIN_SEQ_SCHEDULE="32@0.5, 64@1", TRAIN_LOADER="stream")
    commands = []
    for name in ("", "checkpoint/average.pt", "checkpoint/resume.3.0.pt", "final_model.pt", tg.ARTIFACT_NAME):
        if name:
            (tmp_path / "run" / name).write_bytes(b"x")
        commands.append(run.go_on())
    assert all("TRAIN_SEQ_SCHEDULE='32@0.5, 64@1'" in command for command in commands)
    assert all(command.endswith("python some/train_gpt.py") for command in commands)
    restarts = ["EVAL_ONLY_PATH=run/checkpoint/average.pt", "RESUME=1", "EVAL_ONLY_PATH=run/final_model.pt",
            "EVAL_ONLY_QUANTIZED_PATH=run/final_model.int6.ptz"]
    assert [restart in command for restart, command in zip(restarts, commands[1:], strict=True)] == [True] * 4
    assert not any(restart in commands[0] for restart in restarts)
    run.close()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    fresh = open_run(Path("other"), MAX_WALLCLOCK_SECONDS=100)
    assert fresh.go_on().endswith("torchrun --nnodes=2 … --nproc_per_node=4 some/train_gpt.py")


def test_a_resumed_run_offers_no_artifact_of_before_on_any_rank(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in (tg.ARTIFACT_NAME, tg.AVERAGE, "checkpoint/resume.3.0.pt"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    said = []

    class First(tg.World):
        def agree(self, value):
            said.append(value)
            return value

    class Second(tg.World):
        def agree(self, value):
            return said.pop(0)

    runs = [open_run(tmp_path, First(0, 2), RESUME=1), open_run(tmp_path, Second(1, 2), RESUME=1)]
    for run in runs:
        assert run.restart_setting() == {"RESUME": "1"}
        run.checkpoint_fits = False
        assert run.restart_setting() == {"EVAL_ONLY_PATH": str(tmp_path / tg.AVERAGE)}


def test_an_error_after_resume_does_not_advise_the_same_command(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "resume.3.0.pt").write_text("")
    run = open_run(tmp_path, RESUME=1)
    run.failed("a mistake", again=False)
    assert "to go on" not in capsys.readouterr().err
    run.checkpoint_fits = False
    (tmp_path / tg.AVERAGE).write_text("")
    run.failed("a mistake", again=False)
    assert "EVAL_ONLY_PATH=" in capsys.readouterr().err


def test_training_goes_on_with_its_own_data(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"data_fingerprint": "its own"}))
    run = open_run(tmp_path, RESUME=1)
    tg.check_same_data(run.s, run, "its own")
    with pytest.raises(tg.UserError, match="the data .another. are not those of the training"):
        tg.check_same_data(run.s, run, "another")
    tg.check_same_data(settings(EVAL_ONLY_PATH="x"), run, "another")
    assert "(another)" in events(tmp_path, "warning")[0]["text"]


def test_a_score_stays_until_there_is_another(tmp_path):
    before = {"val_bpb": 1.5, "compliant": False, "evaluation_runs": 1}
    (tmp_path / "summary.json").write_text(json.dumps(before))
    run = open_run(tmp_path, EVAL_ONLY_QUANTIZED_PATH=tmp_path / tg.ARTIFACT_NAME)
    tg.count_up(run, "evaluation_runs")
    run.save_summary()
    assert summary(tmp_path) == {**before, "evaluation_runs": 2}
    text = SimpleNamespace(documents=[], rule="table")
    tg.book_result(run.s, run, text, tg.Score(10.0, 5.0, 5), tg.Clock())
    assert summary(tmp_path)["compliant"] and summary(tmp_path)["val_bpb"] != 1.5


def test_scoring_an_artifact_needs_space_for_its_log_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tg, "check_disk", lambda folder, need: asked.append(need))
    for changes in ({"EVAL_ONLY_QUANTIZED_PATH": tmp_path / "x"}, {}):
        tg.run_checks(settings(DATA_PATH=tmp_path, **changes), tg.World(), tmp_path, "plain")
    assert asked[0] == tg.LOG_BYTES < asked[1]


def test_a_checkpoint_is_no_file_of_weights():
    with pytest.raises(tg.UserError, match="is a checkpoint: set RESUME=1"):
        tg.check_made_before(settings(EVAL_ONLY_PATH="run/checkpoint/resume.3.0.pt"))


@pytest.mark.parametrize("error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_one_line_with_a_remedy(tmp_path, capsys, error):
    run = open_run(tmp_path)
    run.world.beat("adapting to chunk 3")
    assert tg.end_early(error, run, 0) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith('error: out of memory at "adapting to chunk 3"') and "TTT_BATCH_SIZE" in said[0]
    assert said[1].startswith("to go on: ") and len(said) == 2


# --- devices and settings that cannot act


def test_gpus_that_torch_does_not_see_are_a_fault(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho 'GPU 1: NVIDIA H100'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(tg.UserError, match="lists 2 GPUs but torch .* sees none"):
        tg.check_device(settings(), tg.World())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")      # hidden on purpose
    assert "WARNING" not in tg.check_device(settings(), tg.World())
    full = settings(TRAIN_BATCH_TOKENS=786432)
    assert "TRAIN_BATCH_TOKENS=786,432 on a CPU" in tg.check_device(full, tg.World())


@pytest.mark.parametrize("chunk, prefix", [(32, 4), (64, 4), (100, 9), (200, 14)])
def test_steps_of_the_base_weights_are_foretold(s, monkeypatch, chunk, prefix):
    s = tg.dataclasses.replace(s, global_ttt_chunk_tokens=chunk, phased_ttt_prefix_docs=prefix)
    taken, val = [], tg.Validation(s)
    monkeypatch.setattr(tg.PhasedTTT, "global_step", lambda *_: taken.append(1))
    ttt = tg.PhasedTTT(s, tg.World(), tg.GPT(s), val)
    starts, lengths = val.documents.start[:prefix], val.documents.length[:prefix]
    booked = tg.Booked(np.concatenate([val.tokens[a:a + n] for a, n in zip(starts, lengths, strict=True)]))
    ttt.global_phase(booked)
    assert len(taken) == len(tg.phase_steps(s, len(booked.tokens)))
    assert (chunk < s.eval_seq_len) == (not taken)


def test_an_artifact_is_scored_on_the_text_of_its_run(lost, data):
    """Another text, or other bytes behind the same tokens, would give another score without a word."""
    folder = lost[0]
    s = settings(DATA_PATH=data, ARTIFACT_DIR=folder, EVAL_ONLY_QUANTIZED_PATH=folder / tg.ARTIFACT_NAME)
    run = tg.Run(s, tg.World())
    try:
        run.summary["val_fingerprint"] = "another"
        with pytest.raises(tg.UserError, match="are not those of the run"):
            tg.check_same_text(run, tg.Validation(s))
    finally:
        run.close()


def test_screens_that_are_closed_end_nothing():
    for arguments in ("--help", "--check settings"):
        done = subprocess.run(f"{sys.executable} train_gpt.py {arguments} >&- 2>&-", shell=True, cwd=ROOT)
        assert done.returncode == 0
