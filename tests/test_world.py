"""World and clocks: ranks that hang, memory and devices that are not there, signals, launchers."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    documents,
    environment,
    events,
    facts_of,
    open_run,
    run_script,
    settings,
    sine_model,
    tg,
)

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
    if step == 100 and world.main:      # each has given a sign of life
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
    assert "to go on: ARTIFACT_DIR=" in output and " --standalone --nproc_per_node=2" in output
    root_cause = output.partition("Root Cause")[2]
    assert f"(pid: {pid})" in root_cause                # and torchrun blames the right one
    assert events(tmp_path, "error")[0]["text"] in said


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


@pytest.mark.parametrize("doing", ["set-up", "warm-up of graph 1 of 1"])
def test_the_end_of_compiling_is_progress(monkeypatch, doing):
    job = Job(monkeypatch)
    with job.beats[0].world.compiling(), job.beats[1].world.compiling():
        for beat in job.beats:
            beat.world.beat(doing)
        assert not job.pass_time(400)[1]
    assert not job.pass_time(20)[1]


@pytest.mark.parametrize("word", tg.PATIENCE)
def test_compiling_never_shortens_patience(word):
    pulse = tg.Pulse()
    pulse.beat(f"{word} 1")
    progress, wait = pulse.limits()
    pulse.compiling = True
    assert pulse.limits()[0] >= progress and pulse.limits()[1] >= wait


def test_compiling_may_take_a_quarter_of_an_hour(monkeypatch):
    job = Job(monkeypatch)
    with job.beats[0].world.compiling(), job.beats[1].world.compiling():
        for beat in job.beats:
            beat.world.beat("warm-up of graph 1 of 2")
        assert not job.pass_time(850)[1]
    begin = job.now
    job.pass_time(2, work={0, 1})
    assert job.pass_time(2000)[1] == [0, 1] and job.now - begin < 350


def test_slow_steps_are_given_ten_times_their_length(monkeypatch):
    job = Job(monkeypatch)
    for _ in range(3):
        job.pass_time(2, work={0, 1})
        assert not job.pass_time(28)[1]
    begin = job.now
    beat, found = job.pass_time(1000)
    assert found == [0, 1] and 250 < job.now - begin < 330
    assert beat.describe(found).startswith("no rank has made progress since step")


# --- memory and devices


@pytest.mark.parametrize("error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_one_line_with_a_remedy(tmp_path, capsys, error):
    run = open_run(tmp_path)
    run.world.beat("adapting to chunk 3")
    assert tg.end_early(error, run, 0) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith('error: out of memory at "adapting to chunk 3"') and "TTT_BATCH_SIZE" in said[0]
    assert said[1].startswith("to go on: ") and len(said) == 2


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


def test_screens_that_are_closed_end_nothing():
    for arguments in ("--help", "--check settings"):
        done = subprocess.run(f"{sys.executable} train_gpt.py {arguments} >&- 2>&-", shell=True, cwd=ROOT)
        assert done.returncode == 0


# --- signals


PATIENT = """
import sys; sys.path.insert(0, '.'); import train_gpt as t
t.rehearse = lambda *a: 0.0
after = t.Progress.report
def report(self, step, *rest):
    after(self, step, *rest)
    print('did', step, flush=True)
t.Progress.report = report
code = t.main([])
sys.stdout.flush()
t.os._exit(code)
"""


def test_a_signal_stops_training_after_the_step_and_a_lost_terminal_does_not(data, tmp_path):
    env = environment(data, ARTIFACT_DIR=tmp_path, WARMUP_STEPS=0,
                      TRAIN_LOG_EVERY=500, ITERATIONS=1_000_000)
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


# --- launchers


@pytest.mark.parametrize("env, ranks", [
    ({}, (0, 1, 0)),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (0, 1, 0)),
    ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a",
      "MASTER_PORT": "29500"}, (9, 16, 1)),
])
def test_what_launchers_say(env, ranks):
    assert tg.launcher_ranks(env) == ranks


def test_a_start_with_a_bad_launcher_ends_at_once(data):
    status, shown = run_script(environment(data, RANK="abc", WORLD_SIZE=""))
    assert status == 2 and shown.startswith("error: WORLD_SIZE= must be") and shown.count("\n") == 1


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
    stages = ("log_start", "log_checks", "check_same_text", "make_artifact", "score_artifact")
    for name in stages:
        monkeypatch.setattr(tg, name, lambda *_: None)
    signalled(tg, "closing_block")
    run = open_run(tmp_path)
    tg.pipeline(run.s, run.world, run, None, None, [])
    assert tg.SIGNALS.number and (tmp_path / "summary.json").exists()


# --- how far it is


def test_every_long_stage_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s = settings(QUANT_ALLOCATION="fisher", TTT_KV_REUSE=1, PHASED_TTT_PREFIX_DOCS=2)
    world, heard = tg.World(), {}

    def hear(doing, done):
        heard.setdefault(re.sub(r"\d+( of \d+)?", "N", doing), []).append(done)

    world.pulse.show = hear
    model, val = sine_model(s), tg.Validation.of(documents(9, 1))
    tg.Scorer(s, world, model).windows(val, s.eval_stride)
    tg.PhasedTTT(s, world, model, val).run()
    batch = tg.packed_batch(documents(9, 2)[:513], s.train_seq_len)
    curvature = tg.calibrate(s, world, model, lambda: batch)
    tg.Quantiser(s, tg.matrix_views(dict(model.named_parameters())), curvature, world)()
    tg.Trainer(s, world, model).warm_up()
    assert set(heard) == {"scoring row N", "adapting to chunk N", "calibrating on batch N",
                          "adapting the base weights, step N", "quantising batch N", "warm-up of graph N"}
    assert all(0 <= done < 1 for shares in heard.values() for done in shares)
    assert all(shares == sorted(shares) for shares in heard.values())
    assert max(heard["adapting to chunk N"]) > 0.3


def test_a_stage_is_logged_twice_a_minute_with_the_seconds_that_are_left(tmp_path, monkeypatch):
    run, now = open_run(tmp_path), [100.0]
    monkeypatch.setattr(tg.time, "monotonic", lambda: now[0])
    for n in range(80):
        run.world.beat(f"scoring row {n}", 0.2 + n / 100)
        now[0] += 1
    run.world.beat("scoring row 0", 0.0)      # of another evaluation
    now[0] += 40
    run.world.beat("scoring row 1", 0.5)
    said = [(e["doing"], e["done"], e["seconds_left"]) for e in events(tmp_path, "progress")]
    assert said == [("scoring row 30", 0.5, pytest.approx(50)), ("scoring row 60", 0.8, pytest.approx(20)),
                    ("scoring row 1", 0.5, pytest.approx(40))]
