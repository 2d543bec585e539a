"""tools/sweep.py: spaces, a sweep that is ended, failures, pruning, many machines on PostgreSQL."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="optuna is missing: pip install -r tools/requirements.txt")

from tools import page, sweep  # noqa: E402
from tools.common import ROOT, ToolError  # noqa: E402

# A stand-in for the trainer: its score is a formula of a setting; it refuses, fails or lingers when told to.
# While there is a file `hold`, no trial but the first goes on.
TRAINER = """import json, os, sys, time
from pathlib import Path
if "--check" in sys.argv:
    if "TYPO" in os.environ:
        sys.exit("error: unknown setting TYPO: did you mean MATRIX_LR?")
    sys.exit(0)
x = float(os.environ.get("MATRIX_LR", "1"))
out = Path(os.environ["ARTIFACT_DIR"])
for _ in range(3000):
    if out.name.startswith("trial_0000") or not (out.parents[1] / "hold").exists():
        break
    time.sleep(0.02)
with open(out / "metrics.jsonl", "w", buffering=1) as f:
    for n in range(1, 6):
        f.write(json.dumps({"event": "train", "step": n, "used": n / 5, "loss": (x - 0.03) ** 2}) + chr(10))
        time.sleep(float(os.environ.get("NAP", "0.02")))
print("the trainer says", x, flush=True)
if os.environ.get("FAIL") == "1":
    sys.exit("error: out of memory")
(out / "summary.json").write_text(json.dumps({"val_bpb": (x - 0.03) ** 2 + int(os.environ["SEED"]) / 1e6}))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "space.txt").write_text("MATRIX_LR log 0.001 0.1   # the one\nNAP = 0.02\n")
    return tmp_path


def words(place, *more):
    return [str(place / "space.txt"), "--out", str(place / "out"), "--script", str(place / "trainer.py"),
            *map(str, more)]


def study(place, url=None, name="space"):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(study_name=name, storage=url or f"sqlite:///{place / 'out' / 'study.db'}")


def check_points(found, count):
    """Every point was completed exactly once; every dead trial has exactly one retry."""
    complete = [t for t in found.trials if t.state.name == "COMPLETE"]
    assert sorted(t.user_attrs["point"] for t in complete) == list(range(count))
    assert all(t.state.name in ("COMPLETE", "FAIL") for t in found.trials)
    dead = [t for t in found.trials if t.state.name == "FAIL"]
    retried = [t.system_attrs["retry_history"][-1] for t in complete if "retry_history" in t.system_attrs]
    assert sorted(retried) == [t.number for t in dead]
    return complete, dead


def silence(place):
    """The last sign of life of every running trial was long ago."""
    with sqlite3.connect(place / "out" / "study.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")


def end_in_the_middle(process, found, sign, deadline, completed=0):
    """End a sweep while a trial runs and some are complete; the trials that it leaves behind."""
    while time.monotonic() < deadline and process.poll() is None:
        states = [t.state.name for t in found.get_trials(deepcopy=False) if "log" in t.user_attrs]
        if "RUNNING" in states and states.count("COMPLETE") >= completed:
            os.kill(process.pid, sign)
            process.wait(60)
            return [t.number for t in found.trials if t.state.name == "RUNNING"]
        time.sleep(0.05)
    raise AssertionError("no trial ran")


@pytest.mark.parametrize("line, kind, values", [("MATRIX_LR log 0.01 0.1", "log", (0.01, 0.1)),
                                                ("RANK int 2 8 step 2", "int", (2.0, 8.0, 2.0)),
                                                ("TOP choice 1 2 3", "choice", ("1", "2", "3")),
                                                ("VOCAB=8192", "=", ("8192",)),
                                                ('NAME = "a b"', "=", ("a b",))])
def test_space_lines(tmp_path, line, kind, values):
    (tmp_path / "s").write_text(f"# comment\n\n{line}\nOTHER uniform 0 1\n")
    assert sweep.read_space(tmp_path / "s")[0] == sweep.Setting(line.replace("=", " ").split()[0], kind,
                                                                values)


@pytest.mark.parametrize("text, reason", [("A log 0 1", "above 0"), ("A uniform 2 1", "LO must be below HI"),
                                          ("A normal 0 1", "log, uniform, int, logint"),
                                          ("A log 1 x", "not numbers"), ("A uniform 0", "needs LO HI"),
                                          ("A = 1", "varies nothing"),
                                          ('A = "1', "line 1 .* No closing quotation"),
                                          ("A uniform 0 1\nA = 2", "names A twice"),
                                          ("SEED int 1 3", "--seeds")])
def test_bad_spaces_are_refused(tmp_path, text, reason):
    (tmp_path / "s").write_text(text)
    with pytest.raises(ToolError, match=reason):
        sweep.read_space(tmp_path / "s")


def test_the_trainer_is_asked_before_anything_starts(place):
    (place / "space.txt").write_text("TYPO uniform 0 1\n")
    with pytest.raises(ToolError, match="did you mean MATRIX_LR"):
        sweep.main(words(place))
    assert not (place / "out").exists()


@pytest.mark.parametrize("module", ["jinja2", "plotly.offline"])
def test_what_the_page_needs_is_looked_for_before_anything_starts(place, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ToolError, match="the page of results needs the package"):
        sweep.main(words(place))
    assert not (place / "out").exists()


def style_of(html):
    """The style sheet of a page."""
    return html.split("<style>")[1].split("</style>")[0]


def has_study(path):
    """Whether a sweep has made its study, by reading alone: opened by Optuna it would get tables as well."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("select count(*) from studies").fetchone()[0] > 0
    except sqlite3.OperationalError:
        return False


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_ended_loses_and_doubles_nothing(place, sign, capsys):
    (place / "hold").touch()
    command = words(place, "--trials", 4, "--workers", 2, "--seeds", "1", "2")
    first = subprocess.Popen([sys.executable, sweep.__file__, *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    database = place / "out" / "study.db"
    while not has_study(database):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.1)
    left = end_in_the_middle(first, study(place), sign, deadline, completed=1)
    (place / "hold").unlink()
    assert left and first.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130}[sign]
    silence(place)
    assert sweep.main(command) == 0
    complete, dead = check_points(study(place), 4)
    assert [t.number for t in dead] == left
    for t in complete:
        assert t.value == pytest.approx((t.params["MATRIX_LR"] - 0.03) ** 2 + 1.5e-6)
    said, csv = capsys.readouterr().out, (place / "out" / "results.csv").read_text()
    assert f"4 complete, {len(dead)} fail" in said and csv.count("\n") == 1 + 4 + len(dead)
    assert csv.count("its sweep was killed or fell silent; ") == len(dead)
    html = (place / "out" / "results.html").read_text()
    assert "BEST OF 4" in html and 'id="plot-setting-MATRIX_LR"' in html and len(html) < 5_000_000
    assert style_of(html) == style_of(page.render("a report", "", [], []))


def test_a_failed_trial_keeps_its_last_lines_and_is_not_repeated(place, capsys):
    (place / "space.txt").write_text("FAIL choice 0 1\nMATRIX_LR = 0.02\n")
    assert sweep.main(words(place, "--trials", 4, "--sampler-seed", 3, "--sampler", "random")) == 0
    states = {t.params["FAIL"]: t for t in study(place).trials}
    assert len(study(place).trials) == 4 and set(states) == {"0", "1"}
    assert states["1"].state.name == "FAIL" and "out of memory" in states["1"].user_attrs["error"]
    assert "the trainer says" in states["1"].user_attrs["error"]
    shown = capsys.readouterr().out
    assert "exit status 1: error: out of memory" in shown and "last log lines" not in shown
    assert "last log lines: " in (place / "out" / "results.csv").read_text()


def test_the_same_command_goes_on(place, capsys):
    assert sweep.main(words(place, "--trials", 1)) == 0
    assert sweep.main(words(place, "--trials", 2)) == 0
    assert sweep.main(words(place, "--trials", 2)) == 0
    check_points(study(place), 2)
    assert sweep.main(words(place, "--show")) == 0
    assert capsys.readouterr().out.count("COMPLETE") == 1 + 2 + 2 + 2


@pytest.mark.parametrize("earlier, now, reason", [
    ("choice 0.01 0.02", "choice 0.01 0.03", "was choice 0.01 0.02 in study space, now choice"),
    ("log 0.01 0.1", "uniform 0.01 0.1", "was log .* now uniform"),
    ("int 1 3", "uniform 1 3", "was int .* now uniform"),
    ("logint 1 3", "int 1 3", "was logint .* now int"),
    ("uniform 1 3", "uniform 2 5 step 1", ""), ("choice 1 2", "choice 1 2", "")])
def test_a_study_draws_a_setting_in_one_way(place, earlier, now, reason):
    (place / "space.txt").write_text(f"MATRIX_LR {earlier}\n")
    known = sweep.open_study(sweep.parse(words(place)))
    sweep.plan(known, 1)
    sweep.read_space(place / "space.txt")[0].draw(known.ask())
    (place / "space.txt").write_text(f"MATRIX_LR {now}\n")
    goes_on = contextlib.nullcontext()
    with pytest.raises(ToolError, match=f"MATRIX_LR {reason}.*another --study") if reason else goes_on:
        sweep.check_kinds(known, sweep.read_space(place / "space.txt"))


def test_two_machines_may_make_the_tables_at_once(place, monkeypatch):
    calls = []

    class Late(optuna.storages.RDBStorage):
        def __init__(self, *a, **k):
            calls.append(1)
            if len(calls) < 3:
                raise RuntimeError("(sqlite3.OperationalError) table alembic_version already exists")
            super().__init__(*a, **k)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Late)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    assert sweep.plan(sweep.open_study(sweep.parse(words(place))), 2) == 2 and len(calls) == 3


def test_only_one_process_takes_a_trial_and_none_makes_its_own(place):
    args = sweep.parse(words(place))
    one, two = sweep.open_study(args), sweep.open_study(args)
    sweep.plan(one, 1)
    assert one.ask().number == 0
    for known in (one, two):
        with pytest.raises(sweep.NothingWaits):
            known.ask()
    assert [t.state.name for t in one.trials] == ["RUNNING"]


def test_a_trial_is_run_again_whose_sweep_ended_as_it_took_it(place):
    known = sweep.open_study(sweep.parse(words(place)))
    sweep.plan(known, 1)
    known.ask()
    silence(place)
    optuna.storages.fail_stale_trials(known)
    assert [t.state.name for t in known.trials] == ["FAIL", "WAITING"]


def test_interruptions_are_not_counted_as_retries(place, capsys):
    """With one retry a point is given up at the second kill; what was interrupted in between is free."""
    (place / "space.txt").write_text("MATRIX_LR log 0.001 0.1\nNAP = 9\n")
    known = sweep.open_study(sweep.parse(words(place, "--retries", 1)))
    sweep.plan(known, 1)
    stopping = threading.Event()
    stopping.set()
    space = sweep.read_space(place / "space.txt")
    worker = sweep.Worker(sweep.parse(words(place)), space, {}, stopping)
    for interrupted in (True, False, True, False):
        trial = known.ask()
        if interrupted:
            with pytest.raises(SystemExit):
                worker.run_trial(trial)
        assert "was given up" not in capsys.readouterr().out
        silence(place)
        optuna.storages.fail_stale_trials(known)
    assert [t.state.name for t in known.trials] == ["FAIL"] * 4
    assert "point 0 was given up: its sweep died 2 times" in capsys.readouterr().out


def test_many_processes_share_the_trials_of_one_file(place):
    """Each is taken once, and each dead one is retried once, though all look at the same time."""
    args = sweep.parse(words(place))
    sweep.plan(sweep.open_study(args), 20)

    def take_all(_):
        known, taken = sweep.open_study(args), []
        with contextlib.suppress(sweep.NothingWaits):
            while True:
                taken.append(known.ask().number)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = itertools.chain(*pool.map(take_all, range(4)))
    assert sorted(taken) == list(range(20))
    known = [sweep.open_study(args) for _ in range(4)]
    silence(place)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(optuna.storages.fail_stale_trials, known))
    retried = [t.system_attrs["retry_history"] for t in known[0].trials if t.state.name == "WAITING"]
    assert sorted(retried) == [[number] for number in range(20)]


def test_a_trial_without_the_score_says_which_it_has(tmp_path):
    (tmp_path / "summary.json").write_text('{"val_bpb": null, "prequant_val_bpb": 1.5}')
    with pytest.raises(sweep.Failed, match="no val_bpb, but prequant_val_bpb: choose --metric"):
        sweep.metric_of(tmp_path, "val_bpb")
    assert sweep.metric_of(tmp_path, "prequant_val_bpb") == 1.5


def test_a_trial_that_another_sweep_gave_up_does_not_end_this_one(place, monkeypatch, capsys):
    metric_of, retried = sweep.metric_of, []

    def lose_first(*given):
        if not retried:  # the other sweep: it found no sign of life
            silence(place)
            other = sweep.open_study(sweep.parse(words(place)))
            optuna.storages.fail_stale_trials(other)
            retried.extend(t.number for t in other.trials if t.state.name == "WAITING")
        return metric_of(*given)

    monkeypatch.setattr(sweep, "metric_of", lose_first)
    assert sweep.main(words(place, "--trials", 2)) == 0
    _, dead = check_points(study(place), 2)
    assert len(dead) == 1 and retried
    said = capsys.readouterr().out
    assert "trial 0 was given up by another sweep; its result is dropped" in said
    assert "2 complete, 1 fail" in said


@pytest.mark.parametrize("failures", [sweep.STORAGE_TRIES - 1, sweep.STORAGE_TRIES])
def test_a_storage_may_be_away_for_a_moment(place, monkeypatch, failures):
    look_for_silent, left = optuna.storages.fail_stale_trials, [None] * failures

    def away(known):
        if left:
            left.pop()
            raise optuna.exceptions.StorageInternalError("the server is gone")
        look_for_silent(known)

    monkeypatch.setattr(sweep, "STORAGE_SECONDS", 0)
    monkeypatch.setattr(optuna.storages, "fail_stale_trials", away)
    goes_on = contextlib.nullcontext()
    ends = pytest.raises(ToolError, match="failed 5 times on end .the server is gone")
    with ends if failures == sweep.STORAGE_TRIES else goes_on:
        sweep.main(words(place, "--trials", 1))
    completed = [t.state.name for t in study(place).trials] == ["COMPLETE"]
    assert completed == (failures < sweep.STORAGE_TRIES)


def test_a_hopeless_trial_is_pruned(place, capsys):
    (place / "space.txt").write_text("MATRIX_LR uniform 0.001 0.002\nNAP = 0.3\n")
    sweep.open_study(sweep.parse(words(place)))
    for _ in range(5):  # five good trials of the past
        steps = {used: 1e-6 for used in (20, 40, 60, 80, 100)}
        study(place).add_trial(optuna.create_trial(value=1e-6, intermediate_values=steps))
    assert sweep.main(words(place, "--trials", 6, "--prune", "--prune-after", 10)) == 0
    assert study(place).trials[-1].state.name == "PRUNED"
    assert "5 complete, 1 pruned" in capsys.readouterr().out


def test_storage_that_cannot_be_used(place):
    with pytest.raises(ToolError, match="cannot use the storage .*someone@nowhere"):
        sweep.main(words(place, "--storage", "postgresql://someone:secret@nowhere.invalid/db"))


# --- the real trainer


@pytest.fixture
def tiny_environment(tmp_path, data):
    """Environment of a tiny run of the real trainer."""
    from conftest import environment

    env = environment(data)
    for name in ("SEED", "MATRIX_LR"):
        env.pop(name, None)
    return env


def real_sweep(tmp_path, env, *more, url=None):
    """8 trials, 2 workers; the sweep is killed in the middle and goes on."""
    (tmp_path / "real.txt").write_text("MATRIX_LR log 0.005 0.1\nTTT_LORA_RANK choice 2 4\n")
    command = [sys.executable, str(Path(sweep.__file__)), str(tmp_path / "real.txt"), "--out",
               str(tmp_path / "out"), "--trials", "8", "--workers", "2", "--grace", "30", *more]
    with open(tmp_path / "sweep.log", "w") as log:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        storage = url or f"sqlite:///{tmp_path / 'out' / 'study.db'}"
        found = None
        while found is None and time.monotonic() < deadline:
            try:
                found = study(tmp_path, storage, "real")
            except Exception:
                time.sleep(0.5)
        left = end_in_the_middle(process, found, signal.SIGKILL, time.monotonic() + 600, completed=2)
        again = subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=900)
    assert again.returncode == 0, (tmp_path / "sweep.log").read_text()
    complete, dead = check_points(found, 8)
    assert [t.number for t in dead] == left and len(complete) == 8
    for t in complete:
        summary = json.loads((tmp_path / "out" / f"trial_{t.number:04d}_seed1337"
                              / "summary.json").read_text())
        assert summary["val_bpb"] == t.value and summary["settings"]["MATRIX_LR"] == t.params["MATRIX_LR"]
    print((tmp_path / "sweep.log").read_text())


@pytest.mark.long
def test_eight_real_trials_in_a_sweep_that_is_killed_sqlite(tmp_path, tiny_environment):
    real_sweep(tmp_path, tiny_environment)


def postgres_programs():
    """Folder of initdb and pg_ctl, or None."""
    found = shutil.which("initdb")
    folders = ([Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"),
                                                         reverse=True))
    return next((f for f in folders if (f / "initdb").exists()), None)


@pytest.fixture
def postgres(tmp_path_factory):
    """URL of a fresh PostgreSQL server on loopback, as an ordinary user."""
    programs = postgres_programs()
    if not programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2 is missing: pip install -r tools/requirements.txt")
    folder = Path("/tmp") / f"sweep_postgres_{os.getpid()}"
    folder.mkdir()
    user = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def run(*command):
        subprocess.run([*user, *map(str, command)], check=True, cwd="/", stdout=subprocess.DEVNULL)

    try:
        run(programs / "initdb", "-D", folder / "db", "-A", "trust", "-U", "sweep")
        run(programs / "pg_ctl", "-D", folder / "db", "-w", "-l", folder / "log", "-o",
            f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}", "start")
        yield f"postgresql+psycopg2://sweep@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*user, str(programs / "pg_ctl"), "-D", str(folder / "db"), "-m", "immediate", "stop"],
                       cwd="/", stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_eight_real_trials_in_a_sweep_that_is_killed_postgres(tmp_path, tiny_environment, postgres):
    real_sweep(tmp_path, tiny_environment, "--storage", postgres.replace("+psycopg2", ""), url=postgres)


@pytest.mark.long
def test_a_second_machine_joins_on_postgres(place, postgres):
    (place / "space.txt").write_text("MATRIX_LR log 0.001 0.1\nNAP = 0.3\n")
    first = subprocess.Popen([sys.executable, sweep.__file__,
                              *words(place, "--trials", 8, "--storage", postgres)])
    time.sleep(8)
    second = subprocess.Popen([sys.executable, sweep.__file__,
                               *words(place, "--join", "--storage", postgres)])
    assert (first.wait(180), second.wait(180)) == (0, 0)
    complete, dead = check_points(study(place, postgres), 8)
    assert not dead and len({t.user_attrs["worker"] for t in complete}) >= 2
