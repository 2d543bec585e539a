"""A run that is killed in training goes on by the command in its log: the short form of tests/faults.py."""

import json
import os
import shutil

import faults
import pytest
from conftest import summary, tg
from faults import KILL, Bench

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
    command = faults.events_of(killed, "go_on")[-1]["command"]
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
