"""A run that was killed or lost goes on by the command in its log: the short form of tests/faults.py."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
from conftest import ROOT, SHALLOW, environment, events, open_run, run_here, settings, summary, tg, without
from faults import KILL, Bench

from tools import make_record
from tools.common import load_run

LONG = dict(ITERATIONS=100_000, WARMUP_STEPS=0, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def killed(bench):
    """The folder that a run has left which was killed in training."""
    job = bench.start("killed", 1, **LONG)
    job.wait_for("average")
    job.wait_for_step(3)
    faults.send(job.family(), KILL)
    assert job.wait(60) == 137
    shutil.copytree(job.folder, bench.folder / "kept")
    return bench.folder / "kept"


@pytest.fixture
def left(killed, tmp_path):
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / "left")


def now(folder):
    """When its last file was written."""
    return max(path.stat().st_mtime for path in folder.rglob("*"))


def test_all_that_a_killed_run_has_left_can_be_read(left):
    assert faults.doing(left) == f"in training, step {faults.steps_of(left)}"
    assert faults.unreadable(left) == faults.lost(left, now(left)) == []


def test_it_goes_on_by_the_command_in_its_log(bench, killed):
    command = events(killed, "go_on")[-1]["command"]
    assert faults.way_of(command) == "average" and "ITERATIONS=100000" in command
    job = bench.follow(command, "killed")
    assert job.wait(120) == 0, job.err
    assert job.out.splitlines()[-1].startswith("final val_bpb=") and "Traceback" not in job.err
    assert faults.unreadable(job.folder) == faults.leftovers(job.folder) == []
    assert 0 < summary(job.folder)["steps"] <= faults.steps_of(killed)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOILS = {
    "average.pt cannot be read": lambda folder: flip(folder / tg.AVERAGE),
    "metrics.jsonl cannot be read": lambda folder: (folder / "metrics.jsonl").write_text("{}\n{\n"),
    "NaN in JSON": lambda folder: (folder / "metrics.jsonl").write_text('{"event": NaN}\n'),
    "summary.json cannot be read": lambda folder: (folder / "summary.json").write_text("{"),
    "final_model.int6.ptz cannot be read":
        lambda folder: (folder / tg.ARTIFACT_NAME).write_bytes(b"artifact")}


@pytest.mark.parametrize("fault", SPOILS)
def test_a_file_that_cannot_be_read_is_a_fault(left, fault):
    SPOILS[fault](left)
    assert any(fault in found for found in faults.unreadable(left))


def test_lost_training_is_a_fault(left):
    moment = now(left)
    assert "s old" in faults.lost(left, moment + faults.MOST_LOST + 60)[0]
    (left / tg.AVERAGE).unlink()
    assert "there is no average" in faults.lost(left, moment)[0]


def test_a_bad_end_is_a_fault(left, monkeypatch):
    job = faults.Job(["sh", "-c", "echo Traceback >&2; exit 1"], dict(os.environ), left)
    case = faults.generate(12, 0)[1]
    assert case.signal == faults.TERM and case.ranks == 1
    found = faults.judge_end(case, job, job.wait(60), ended=False)
    assert found == ["exit status 1, not 143", "a stack trace on stderr"]
    with open(left / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"event": "go_on", "command": "the last"}) + "\n")
    assert faults.next_command(job, "the start") == "the last"


# --- a run that is lost when its evaluation begins


SHORT = dict(SHALLOW, ITERATIONS=2, WARMUP_STEPS=0, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)


@pytest.fixture(scope="module")
def lost(data, tmp_path_factory):
    """A run that was lost when its artifact was written and its evaluation began: folder, stderr, status."""
    folder, patch = tmp_path_factory.mktemp("lost") / "a run", pytest.MonkeyPatch()
    said = []
    with patch.context() as patched, without("rehearse"):
        patched.setattr(tg, "log_probes", lambda *_: (_ for _ in ()).throw(RuntimeError("lost\npod")))
        patched.setattr(tg, "tell", said.append)
        patched.setattr(tg.sys, "argv", ["train_gpt.py"])
        status, _ = run_here(environment(data, ARTIFACT_DIR=folder, **SHORT))
    return folder, said, status


def command_environment(line: str) -> dict:
    """The settings that a printed command sets, beside those that every process here has."""
    words = shlex.split(line.removeprefix("to go on: "))
    assert words[-2:] == [tg.this_python(), "train_gpt.py"]
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

    monkeypatch.setattr(tg, "profiles", broken)                # what decorates fails
    monkeypatch.setattr(tg, "run_probes", lambda *_: [])
    assert run_here({**command_environment(said[1]), "EVAL_STRIDE": "32"})[0] == 0
    after = summary(folder)
    assert after["val_bpb"] > 0 and after["compliant"]
    for key in ("steps", "step_ms", "train_seconds", "artifact_digest"):
        assert after[key] == before[key] is not None, key
    assert after["evaluation_runs"] == 2 and after["quantising_runs"] == 1
    assert after["not_as_in_training"] == {"EVAL_STRIDE": [32, 16]}
    warnings = [event["text"] for event in events(folder, "warning")]
    assert any("EVAL_STRIDE=32 here, 16 there" in text for text in warnings)
    assert sum("no such text" in text for text in warnings) == 1
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
        assert run_here(command_environment(said[1]))[0] == 2
        assert "is not the artifact that this run wrote" in events(folder, "error")[-1]["text"]
    finally:
        path.write_bytes(blob)


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


# --- what a going-on run takes over


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
    for name in ("", "checkpoint/average.pt", "checkpoint/resume.3.pt", "final_model.pt", tg.ARTIFACT_NAME):
        if name:
            (tmp_path / "run" / name).write_bytes(b"x")
        commands.append(run.go_on())
    assert all("TRAIN_SEQ_SCHEDULE='32@0.5, 64@1'" in command for command in commands)
    assert all(command.endswith("python some/train_gpt.py") for command in commands)
    monkeypatch.setattr(tg.sys, "executable", f"{os.getcwd()}/my env/python")     # not the shell's
    assert run.go_on().endswith("'my env/python' some/train_gpt.py")
    restarts = ["EVAL_ONLY_PATH=run/checkpoint/average.pt", "RESUME=1", "EVAL_ONLY_PATH=run/final_model.pt",
            "EVAL_ONLY_QUANTIZED_PATH=run/final_model.int6.ptz"]
    assert [restart in command for restart, command in zip(restarts, commands[1:], strict=True)] == [True] * 4
    assert not any(restart in commands[0] for restart in restarts)
    run.close()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    fresh = open_run(Path("other"), MAX_WALLCLOCK_SECONDS=100)
    assert fresh.go_on().endswith("'my env/python' -m torch.distributed.run --nnodes=2 … --nproc_per_node=4 "
                                  "some/train_gpt.py")
    monkeypatch.setattr(tg.shutil, "which", lambda name: f"{os.getcwd()}/my env/{name}")
    assert fresh.go_on().endswith(" python -m torch.distributed.run --nnodes=2 … --nproc_per_node=4 "
                                  "some/train_gpt.py")


def test_a_resumed_run_offers_no_artifact_of_before_on_any_rank(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in (tg.ARTIFACT_NAME, tg.AVERAGE, "checkpoint/resume.3.pt"):
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


def test_a_checkpoint_from_before_a_setting_was_made_had_its_default(tmp_path):
    run = open_run(tmp_path, RESUME=1)
    (tmp_path / "checkpoint").mkdir()
    made_with = tg.training_settings(run.s, run.world)
    del made_with["SMEAR_GATE_BOS_FIX"]
    (tmp_path / "checkpoint" / "resume.3.pt").write_bytes(tg.sealed({"settings": made_with}))
    assert tg.newest_checkpoint(run.s, run.world, run)["settings"] == made_with
    other = settings(RESUME=1, ARTIFACT_DIR=tmp_path, SMEAR_GATE_BOS_FIX=0)
    with pytest.raises(tg.UserError, match="SMEAR_GATE_BOS_FIX=True there, False here"):
        tg.newest_checkpoint(other, run.world, run)


def test_an_error_after_resume_does_not_advise_the_same_command(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "resume.3.pt").write_text("")
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
        tg.check_made_before(settings(EVAL_ONLY_PATH="run/checkpoint/resume.3.pt"))
