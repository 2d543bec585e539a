"""tools/pod.py: one command that is killed goes on, stops with a remedy, and ends with an archive. The steps
are stand-ins that count themselves; the demo itself is rehearsed by the long test."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from conftest import ROOT
from made_runs import make_run

from tools import pod
from tools.common import ToolError

SEEDS = (7, 8, 9)
# A stand-in for every program of the pod: it says what it was given, and makes what the real one makes.
PROGRAM = '''import json, os, shutil, sys, time
from pathlib import Path
here = Path(__file__).parent
name, words = Path(__file__).stem, sys.argv[1:]

def count(what):
    with open(here / "calls", "a") as calls:
        print(name, what, file=calls)

def given(option):
    return Path(words[words.index(option) + 1])

count("begins")
with open(here / "words", "a") as given_words:
    print(name, os.environ.get("DATA_CHECK", ""), *words, file=given_words)
time.sleep(float(os.environ.get("NAP", "0")))
if os.environ.get("BREAK") == name:
    print("Traceback (most recent call last):")
    sys.exit("error: the disk is full")
if name == "doctor":
    print(json.dumps({"findings": [{"state": os.environ.get("DOCTOR", "OK"), "what": "links",
                                    "found": "3 GB/s", "remedy": "take another pod"}]}))
if name == "trainer" and words != ["--check"]:
    out = Path(os.environ["ARTIFACT_DIR"])
    made = here / ("made_" + os.environ["SEED"])
    out.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("EVAL_ONLY_PATH"):
        seed = os.environ["SEED"]
        again = f"SEED={seed} ARTIFACT_DIR={out} EVAL_ONLY_PATH={out}/final_model.pt python {sys.argv[0]}"
        (out / "final_model.pt").write_text("weights")
        (out / "metrics.jsonl").write_text(json.dumps({"event": "go_on", "command": again}) + chr(10))
        count(f"trains {seed}")
    time.sleep(float(os.environ.get("NAP", "0")))
    for file in ("train.log", "final_model.int6.ptz", "summary.json", "metrics.jsonl"):
        shutil.copy(made / file, out / file)
if name == "compare":
    print("A is better")
    sys.exit(1)
if name == "report":
    given("--out").write_text("the page")
if name == "record":
    folder = given("--out") / "track" / "folder"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("a record")
count("ends")
'''
DRIVER = f'''import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tools import pod
from tools.common import run_cli
here = Path(__file__).parent
pod.PROGRAMS = {{name: here / (name + ".py") for name in pod.PROGRAMS}}
pod.launcher = lambda nproc: [sys.executable]
run_cli(pod.main)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Stand-ins of all programs, and three finished runs that their trainer can copy."""
    for name in pod.PROGRAMS:
        (tmp_path / f"{name}.py").write_text(PROGRAM)
    (tmp_path / "driver.py").write_text(DRIVER)
    for seed in SEEDS:
        make_run(tmp_path / f"made_{seed}", seed, 60 + seed)
    monkeypatch.setattr(pod, "PROGRAMS", {name: tmp_path / f"{name}.py" for name in pod.PROGRAMS})
    monkeypatch.setattr(pod, "launcher", lambda nproc: [sys.executable])
    monkeypatch.setattr(pod, "gigabytes", lambda made: 0.0)
    monkeypatch.setattr(pod, "SPARE_GB", 0)
    monkeypatch.delenv("DATA_PATH", raising=False)
    return tmp_path


def words(place, *more):
    return ["--rehearse", "--seeds", "7,8,9", "--out", str(place / "out"), *more]


def calls(place, what):
    return (place / "calls").read_text().splitlines().count(what)


def trained(place):
    """How often each seed was trained."""
    return [calls(place, f"trainer trains {n}") for n in SEEDS]


def test_the_whole_way(place, capsys):
    assert pod.main(words(place, "--price", "36")) == 0
    said = capsys.readouterr().out
    assert "[4/10] seed 7: about 1 min, $0.60" in said and "an estimate, not measured" in said
    assert "OK    seed 9: 1.069000 BPB" in said and "OK    compare: A is better" in said
    with tarfile.open(place / "out" / "rehearsal.tar.gz") as tar:
        names = set(tar.getnames())
    for name in ("records/track/folder/README.md", "report.html", "compare.txt", "pod.json",
                 "logs/seed_7.log", *(f"seed_{n}/{file}" for n in SEEDS for file in pod.OF_A_SEED)):
        assert f"rehearsal/{name}" in names
    assert not [name for name in names if name.endswith((".pt", ".bin"))]
    # again: nothing is run a second time
    assert pod.main(words(place)) == 0
    assert trained(place) == [1, 1, 1] and calls(place, "record ends") == 1


def test_the_record_track_on_eight_gpus(place, monkeypatch, capsys):
    from test_tools_doctor import H100

    launched = []
    monkeypatch.setattr(pod.doctor, "gpu_rows", lambda: [{**H100, "index": str(i)} for i in range(8)])
    monkeypatch.setattr(pod, "launcher", lambda nproc: launched.append(nproc) or [sys.executable])
    monkeypatch.setattr(pod, "fetched", lambda made: (place / "words").read_text().count("fetch ") > 0)
    (place / "words").write_text("")
    arguments = ["--name", "idea", "--seeds", "7,8,9", "--out", str(place / "out"), "--author", "A. Name"]
    assert pod.main(arguments) == 0
    said = (place / "words").read_text()
    assert "fetch  sp8192_caseops --train-shards 80 --out data/sp8192_caseops" in said
    assert launched == [8, 8, 8] and "--vs pr2135" in said and "--unlike" not in said
    record = [line for line in said.splitlines() if line.startswith("record ")]
    assert len(record) == 1 and "--name idea --track record" in record[0] and "--author=A. Name" in record[0]
    assert "at $22/h" in capsys.readouterr().out and (place / "out" / "idea.tar.gz").is_file()


def test_shards_of_ones_own_are_not_fetched_and_read_whole(place, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(place))
    arguments = ["--name", "own", "--track", "non_record", "--seeds", "7,8,9", "--out", str(place / "out")]
    assert pod.main(arguments) == 0
    said = (place / "words").read_text()
    assert "trainer full --check" in said and "fetch" not in said and "compare" not in said


def test_killed_at_random_moments_it_goes_on(place):
    chance = random.Random(4)
    env = {**os.environ, "NAP": "0.05"}
    command = [sys.executable, str(place / "driver.py"), *words(place)]
    done, moment = place / "calls", 0
    done.write_text("")
    for sign in (signal.SIGKILL, signal.SIGTERM):
        moment += chance.randint(6, 11)
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(done.read_text().splitlines()) < moment:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sign)
        assert process.wait(60) == (-9 if sign == signal.SIGKILL else 130)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "out" / "rehearsal.tar.gz").is_file()
    # what was trained is not trained again: the logged command goes on from it
    assert trained(place) == [1, 1, 1]
    assert calls(place, "record ends") == 1


def test_a_seed_that_ended_early_goes_on_by_its_own_command(place, capsys, monkeypatch):
    monkeypatch.setenv("BREAK", "trainer")
    assert pod.main(words(place)) == 1
    said = capsys.readouterr().out
    assert "FAIL  check: exit status 1: error: the disk is full" in said
    assert "the same command then goes on" in said
    assert "to go on: ./run.sh pod --rehearse" in said and not calls(place, "trainer trains 7")
    monkeypatch.delenv("BREAK")
    folder = place / "out" / "seed_7"
    folder.mkdir(parents=True)
    command = f"SEED=7 ARTIFACT_DIR={folder} EVAL_ONLY_PATH={folder}/final_model.pt python {place}/trainer.py"
    (folder / "metrics.jsonl").write_text(json.dumps({"event": "go_on", "command": command}) + "\n")
    assert pod.main(words(place)) == 0
    assert "seed 7 ended early and goes on: quantises the weights" in capsys.readouterr().out
    assert trained(place) == [0, 1, 1]


def test_commands_to_go_on_as_they_are_logged():
    command = ("SEED=1 NAME='a b' EVAL_ONLY_PATH=x/checkpoint/average.pt "
               "torchrun --standalone --nproc_per_node=8 t.py")
    settings, words = pod.parse_command(command)
    assert settings == {"SEED": "1", "NAME": "a b", "EVAL_ONLY_PATH": "x/checkpoint/average.pt"}
    assert words == [*pod.launcher(8), "t.py"]
    assert words[1:4] == ["-m", "torch.distributed.run", "--standalone"] and len(pod.launcher(1)) == 1
    for python in ("python", ".venv/bin/python", "'/a b/python3.11'"):
        assert pod.parse_command(f"SEED=2 {python} t.py") == ({"SEED": "2"}, [*pod.launcher(1), "t.py"])
        several = f"{python} -m torch.distributed.run --standalone --nproc_per_node=8 t.py"
        assert pod.parse_command(several) == ({}, [*pod.launcher(8), "t.py"])
    assert "its training stays short" in pod.way_on(settings, pod.Path("runs/x"))
    with pytest.raises(pod.Failed, match="cannot be started here"):
        pod.parse_command("RANK=… WORLD_SIZE=2 torchrun --nnodes=2 … --nproc_per_node=8 t.py")


def test_a_bad_machine_stops_it_with_the_remedy_before_anything_is_paid(place, capsys, monkeypatch):
    monkeypatch.setenv("DOCTOR", "FAIL")
    assert pod.main(words(place)) == 1
    assert "FAIL  doctor: links: 3 GB/s\n      -> take another pod" in capsys.readouterr().out
    assert not calls(place, "demo begins") and not calls(place, "trainer begins")
    assert pod.main(words(place, "--skip", "doctor")) == 0


def test_a_seed_that_no_record_takes_stops_it_before_the_next(place, capsys):
    (place / "made_7" / pod.ARTIFACT).write_bytes(b"short")
    assert pod.main(words(place)) == 1
    assert "no record would take it" in capsys.readouterr().out and not calls(place, "trainer trains 8")


def test_the_record_track_is_refused_where_it_cannot_be(place, capsys):
    arguments = ["--name", "x", "--out", str(place / "out"), "--seeds", "7,8"]
    assert pod.main(arguments) == 1
    said = capsys.readouterr().out
    assert "0 GPUs (none)" in said and "rent 8 x H100" in said and "2 seeds" in said


def test_after_a_failure_the_finished_seeds_can_be_copied_home(place, capsys, monkeypatch):
    monkeypatch.setenv("BREAK", "report")
    assert pod.main(words(place)) == 1
    assert "so far: " in capsys.readouterr().out and (place / "out" / "rehearsal.tar.gz").is_file()
    assert not calls(place, "record begins")


def test_a_seed_that_was_deleted_is_run_again_and_all_that_tells_of_it(place):
    assert pod.main(words(place)) == 0
    shutil.rmtree(place / "out" / "seed_8")
    assert pod.main(words(place)) == 0
    assert trained(place) == [1, 2, 1]
    assert calls(place, "record ends") == calls(place, "compare begins") == 2


def test_on_another_machine_the_doctor_is_asked_again_and_nothing_else(place, monkeypatch):
    assert pod.main(words(place)) == 0
    monkeypatch.setattr(pod, "machine", lambda: "another")
    assert pod.main(words(place)) == 0
    assert calls(place, "doctor ends") == 2
    assert trained(place) == [1, 1, 1] and calls(place, "record ends") == 1


def test_a_seed_is_estimated_by_the_last_whole_one(place, capsys):
    pod.main(words(place))
    assert "[5/10] seed 8: < 1 min, $0.00 (as seed 7 took)" in capsys.readouterr().out


@pytest.mark.parametrize("more, env, text", [
    (["--seeds", "7,8"], {}, "--seeds was .7, 8, 9. when this pod began"),
    ([], {"TTT_ENABLED": "0"}, "began with settings .* now it is .*TTT_ENABLED"),
    ([], {"SEED": "3"}, "SEED=3 is set, which the pod sets for each run"),
    ([], {"MATRIX_LRR": "0.1"}, "MATRIX_LR"),
])
def test_what_must_stay_as_it_was(more, env, text, place, monkeypatch):
    monkeypatch.setenv("BREAK", "check")
    pod.main(words(place))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ToolError, match=text):
        pod.main(words(place, *more))


def test_whatever_goes_wrong_in_a_step_is_a_failure_with_a_remedy(place, capsys, monkeypatch):
    monkeypatch.setattr(pod, "write_archive", lambda made: open(place / "none" / "file"))
    assert pod.main(words(place)) == 1
    said = capsys.readouterr().out
    assert "FAIL  archive: No such file" in said and "then goes on" in said
    assert "to go on: ./run.sh pod" in said


def test_a_program_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(pod, "PATIENCE_SECONDS", 0.2)
    stubborn = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                "print(1, flush=True); time.sleep(60)")
    command = [sys.executable, "-c", stubborn]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.read(2) == b"1\n"
    pod.Children(tmp_path).end(process)
    assert process.returncode == -signal.SIGKILL


def test_what_a_killed_pod_has_left_running_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pod, "PATIENCE_SECONDS", 0.2)
    children = pod.Children(tmp_path)
    with open(children.path, "w") as lock:
        assert pod.take(lock)
        with pytest.raises(pod.Failed, match="still runs"):
            children.run(["true"], tmp_path / "log", {})
    assert children.run([sys.executable, "-c", "exit(3)"], tmp_path / "log", {}) == 3


def test_two_pods_do_not_share_a_folder(place):
    (place / "out").mkdir()
    with open(place / "out" / ".lock", "w") as lock:
        assert pod.take(lock)
        with pytest.raises(ToolError, match="another pod runs in"):
            pod.main(words(place))


def test_the_plan_is_an_estimate_and_begins_nothing(place, capsys):
    assert pod.main(["--plan", "--out", str(place / "none"), "--train-shards", "10"]) == 0
    said = capsys.readouterr().out
    assert "never timed on 8 GPUs" in said and "an estimate, not measured" in said
    assert not (place / "none").exists() and not (place / "calls").exists()


@pytest.mark.parametrize("arguments, text", [(["--track", "non_record"], "--name ''"),
                                             (["--name", "x", "--vs", "pr9"], "no folder, no figure"),
                                             (["--name", "x", "--lineage", "pr9"], "--lineage pr9 is none"),
                                             (["--rehearse", "--seeds", "1,1"], "every seed once"),
                                             (["--rehearse", "--price", "-1"], "must be at least 0")])
def test_mistakes_are_one_clear_line(arguments, text, tmp_path):
    with pytest.raises(ToolError, match=text):
        pod.main([*arguments, "--out", str(tmp_path / "out")])


@pytest.mark.long
def test_the_rehearsal_with_the_demo_is_killed_twice_and_ends_with_the_archive(tmp_path):
    command = [sys.executable, "tools/pod.py", "--rehearse", "--out", str(tmp_path / "out")]
    for seconds in (random.uniform(5, 40), random.uniform(5, 60)):
        process = subprocess.Popen(command, cwd=ROOT)
        time.sleep(seconds)
        process.kill()
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    with tarfile.open(tmp_path / "out" / "rehearsal.tar.gz") as tar:
        names = tar.getnames()
    assert len([name for name in names if name.endswith("submission.json")]) == 1
    assert len([name for name in names if name.endswith("final_model.int6.ptz")]) == 3
