"""Training: schedules, the budget, the warm-up; and that it cannot be lost: numbers that are not finite,
averages beside training, full disks, and going on from a checkpoint."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TABLES, events, facts_of, free_port, settings, sine_model, tg, tokens

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
    after = tg.Progress.report

    def report(self, now, *rest):
        after(self, now, *rest)
        if now == step:
            act()

    monkeypatch.setattr(tg.Progress, "report", report)


def stop_at(monkeypatch, step):
    at_step(monkeypatch, step, lambda: setattr(tg.SIGNALS, "number", TERM))


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
    logged = events(tmp_path, "losses")
    assert [len(e["losses"]) for e in logged] == [1] * 10 + [len(steps) - 10]
    assert logged[-1]["step"] == len(steps) and logged[9]["losses"] == [pytest.approx(
        events(tmp_path, "train")[9]["loss"], abs=5e-5)]
    tg.read_weights(str(tmp_path / tg.AVERAGE), tg.GPT(settings()))


class OnDevice(torch.Tensor):
    """A number that says it is on a GPU."""

    is_cuda = True


class Arrival:
    """A GPU's event, which happens when a test says so."""

    made = []

    def record(self):
        self.here = False
        self.made.append(self)

    def query(self):
        return self.here

    def synchronize(self):
        self.here = True


def watch_on_a_gpu(monkeypatch) -> tg.FiniteWatch:
    empty = torch.empty
    monkeypatch.setattr(tg.torch, "empty", lambda *shape, pin_memory, **more: empty(*shape, **more))
    monkeypatch.setattr(tg.torch.cuda, "Event", Arrival)
    monkeypatch.setattr(Arrival, "made", [])
    return tg.FiniteWatch()


def test_flags_are_read_when_they_have_arrived(monkeypatch):
    watch = watch_on_a_gpu(monkeypatch)
    one = torch.tensor(1.0).as_subclass(OnDevice)
    for step, loss in enumerate((one, one, one * float("nan"), one), 1):
        watch.record(step, loss, one)
    assert watch.first_bad() == 0
    for arrival in Arrival.made[1:]:
        arrival.here = True
    assert watch.first_bad() == 0             # the first is not here, and they are read in their order
    Arrival.made[0].here = True
    assert watch.first_bad() == 3


def test_all_flags_are_waited_for_at_the_end(monkeypatch):
    watch = watch_on_a_gpu(monkeypatch)
    for step, loss in enumerate((1.0, float("inf")), 1):
        watch.record(step, torch.tensor(loss).as_subclass(OnDevice), torch.tensor(1.0))
    assert watch.first_bad() == 0 and watch.first_bad(wait=True) == 2 == watch.first_bad()


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


# --- full disks

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


@pytest.mark.parametrize("full", [1, 2])
def test_weights_find_another_place_when_the_disk_is_full(data, tmp_path, monkeypatch, full):
    monkeypatch.setattr(tg.tempfile, "gettempdir", lambda: str(tmp_path))
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
    if full == 2:
        assert "only in memory" in warned
        return
    (found,) = tmp_path.glob("run-*/final_model.pt")
    assert f"EVAL_ONLY_PATH={found}" in warned
    twin = tg.GPT(settings())
    tg.read_weights(str(found), twin)
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), model.parameters()))


ONE_LAYER = dict(NUM_LAYERS=1, NUM_LOOPS=0, LOOP_START=0, LOOP_END=0, PARALLEL_START_LAYER=0, XSA_LAST_N=1)


def test_a_model_of_one_layer_without_skips_is_trained(data, tmp_path):
    learn(data, tmp_path, **ONE_LAYER)
    assert (tmp_path / "final_model.pt").exists() and not events(tmp_path, "warning")


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


def test_a_resumed_run_validates_with_the_loops_of_one_left_alone(data, tmp_path, monkeypatch):
    """Loops run from step 3 of 8 on; the checkpoint is of step 5, at which a validation is due."""
    seen, score = [], tg.Score(1.0, 1.0, 1)
    monkeypatch.setattr(tg.Scorer, "windows", lambda self, val, stride, looping:
                        seen.append(looping) or score)
    changes = {**GOING_ON, "VAL_LOSS_EVERY": 1, "ENABLE_LOOPING_AT": 0.35}
    learn(data, tmp_path / "whole", **{**changes, "CHECKPOINT_EVERY_SECONDS": 0})
    assert seen == 4 * [False] + 5 * [True]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(tg.Interrupted):
            learn(data, tmp_path / "two", **changes)
    monkeypatch.setattr(tg, "SIGNALS", tg.Signals())
    seen.clear()
    learn(data, tmp_path / "two", RESUME=1, **changes)
    assert seen == 4 * [True]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(data, tmp_path, monkeypatch):
    write, killed = tg.write_atomic, []

    def deadly(path, content):
        if path.name == "resume.5.pt":
            killed.append(path)
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(tg, "write_atomic", deadly)
    with pytest.raises(KeyboardInterrupt):
        learn(data, tmp_path, **GOING_ON)
    s, run, _ = start(data, tmp_path, RESUME=1, **GOING_ON)
    assert killed and tg.read_checkpoint(s, tg.World(), run)["step"] == 4


def test_a_checkpoint_that_cannot_be_written_is_none(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tg.Checkpoints, "write_file", lambda self, state: "No space left")
    learn(data, tmp_path, **{**GOING_ON, "ITERATIONS": 3})
    assert not list(tmp_path.glob("checkpoint/resume.*"))
    said = [event["text"] for event in events(tmp_path, "warning")]
    assert said == ["no checkpoint at step 1: No space left"]      # once


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
    whole = tmp_path / "r" / "checkpoint" / "resume.2.pt"
    box = torch.load(whole, weights_only=True)
    box["settings"]["WORLD_SIZE"] = 2
    whole.write_bytes(tg.sealed(box))
    with pytest.raises(tg.UserError, match="WORLD_SIZE=2 there, 1 here"):
        learn(data, tmp_path / "r", RESUME=1, **GOING_ON)
    whole.write_bytes(whole.read_bytes()[:-1])
    s, run, _ = start(data, tmp_path / "r", RESUME=1, **GOING_ON)
    average = f"EVAL_ONLY_PATH={tmp_path / 'r' / tg.AVERAGE}"
    with pytest.raises(tg.UserError, match=f"resume.2.pt: it is damaged.*quantise by {average}"):
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
from test_training import GOING_ON, QUIET, settings
folder, data = Path(sys.argv[1]), sys.argv[2]
world = tg.World.join(os.environ)
tg.rehearse = lambda *a: 0.0
after = tg.Progress.report
def report(self, step, *rest):
    after(self, step, *rest)
    if self.run.dir.name == 'two' and not self.s.resume and step == 5 and world.rank == 1:
        os.kill(os.getpid(), tg.signal.SIGTERM)      # one rank alone is asked to end
tg.Progress.report = report
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
    port = free_port()
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


# --- schedules, the budget and the warm-up


def test_soft_rounding_is_for_training_only_and_gets_sharper():
    s = settings(**TABLES, LATE_QAT_THRESHOLD=0.5, LATE_QAT_MIN_STEP=2)
    model, x, plan = sine_model(s), tokens(1, 20), tg.layer_plan(s, True)
    plain = model.losses(x, x.roll(-1, 1), plan)
    model.sharpness = torch.tensor(1.0)
    soft = model.losses(x, x.roll(-1, 1), plan, training=True)
    assert not torch.allclose(plain, soft, atol=1e-4)
    trainer = tg.Trainer(s, tg.World(), model)
    got = [trainer.sharpness_after(k, lr) for k, lr in ((1, 0.1), (2, 0.6), (3, 0.4), (4, 0.9), (600, 0.9))]
    assert got[:3] == [None, None, 1.0] and 1 < got[3] < got[4] == 16


def test_schedules():
    s = settings(
        WARMDOWN_FRAC=0.5,
        MIN_LR=0.1,
        MUON_MOMENTUM=0.97,
        MUON_MOMENTUM_WARMUP_START=0.92,
        MUON_MOMENTUM_WARMUP_STEPS=10,
        ENABLE_LOOPING_AT=0.35,
    )
    assert [tg.warmdown_share(s, p) for p in (0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.1]
    assert [round(tg.muon_momentum(s, k), 6) for k in (0, 5, 10, 99)] == [0.92, 0.945, 0.97, 0.97]
    assert [tg.Curriculum(s).loops(0, p) for p in (0.34, 0.35)] == [False, True]


def test_a_step_is_taken_only_if_it_fits_into_the_budget():
    pace = tg.Pace(settings(MAX_WALLCLOCK_SECONDS=100, ITERATIONS=1000), reserve=20)
    for step, elapsed in enumerate((0, 2, 4, 5)):
        pace.observe(step, elapsed)
    assert pace.step_seconds == pytest.approx(1.8)      # of the slower step before, not of the last
    assert pace.progress(3) == 5 / 80 and not pace.ended(3) and not pace.near_end()
    pace.observe(50, 78.5)
    pace.step_seconds = 1.4
    assert pace.near_end() and not pace.ended(50)
    pace.step_seconds = 1.6
    assert pace.ended(50)


def test_without_a_budget_iterations_decide():
    pace = tg.Pace(settings(ITERATIONS=10), reserve=20)
    pace.observe(5, 1e9)
    assert pace.progress(5) == 0.5 and not pace.ended(9) and pace.ended(10) and not pace.near_end()


def test_warm_up_meets_few_and_many_documents(s, monkeypatch):
    counts, micro_step = [], tg.Trainer.micro_step

    def seen(self, batch, plan):
        counts.append(int((batch.x == tg.BOS).sum()))
        return micro_step(self, batch, plan)

    monkeypatch.setattr(tg.Trainer, "micro_step", seen)
    s = tg.dataclasses.replace(s, warmup_steps=2, train_batch_tokens=2048)
    tg.Trainer(s, tg.World(), sine_model(s)).warm_up()
    assert max(counts) >= 4 * min(counts) > 0


def test_warm_up_is_undone(s):
    model = sine_model(s)
    trainer = tg.Trainer(s, tg.World(), model)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.warm_up()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(torch.equal(e, q) for e, q in zip(trainer.ema.values(), before))
    assert not trainer.optimiser.adam.state and all(not m.any() for m in trainer.optimiser.momentum)
