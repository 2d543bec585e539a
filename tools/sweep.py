"""Sweep environment variables of the trainer with Optuna; every trial is the real command.

    python tools/sweep.py space.txt --trials 20 --workers 2
    python tools/sweep.py space.txt --show
    # several machines; the first one makes the points:
    python tools/sweep.py space.txt --trials 20 --storage postgresql://user@host/db
    python tools/sweep.py space.txt --join --storage postgresql://user@host/db

SPACE is a text file, one setting per line (# starts a comment):
    MATRIX_LR        log 0.01 0.05          # log-uniform; or uniform LO HI
    TTT_LORA_RANK    int 32 128 step 16     # whole numbers; or, log-uniform, logint LO HI
    LQER_TOP_K       choice 1 2 3 5         # one of
    VOCAB_SIZE       = 8192                 # fixed for all trials

The study lives in a database (SQLite beside the trials, or any Optuna storage URL)
under --study: the same command again goes on where it stopped. A trial is one run per
seed (--seeds), its value is the mean of --metric in summary.json; with --prune a
hopeless trial is stopped early by its metrics.jsonl. A trial that fails is shown with
the error in its log, and kept with the log's last lines (results.csv); one whose sweep
was killed (--retries) or interrupted is kept, too, and its settings run again by
whichever machine works on the study.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools import page
from tools.common import (
    SCRIPT,
    Seeds,
    ToolError,
    command_line,
    error_line,
    need,
    read_events,
    relative,
    run_cli,
    table,
    write_atomic,
)

ALONE = "{python}"  # one process needs no launcher, whose trace would bury its error
SEVERAL = "{python} -m torch.distributed.run --standalone --nproc_per_node={nproc}"
GRACE_SECONDS = 60
POLL_SECONDS = 0.5
PROGRESS_PERCENT = 25  # a run's training, between two lines on the screen
STORAGE_TRIES, STORAGE_SECONDS = 5, 5  # a database may be away for a moment
LOG_LINES = 12
LAST_LINES = "last log lines: "
RANGES = ("log", "uniform", "int", "logint")  # kinds of a setting that lies in LO … HI
STATES = {  # state of a trial -> colour
    "complete": "#1a8a4a", "running": "#2f6fed", "pruned": "#d39b3c", "waiting": "#97a1ae",
    "fail": "#cf3457",
}
DOT, BEST = "#2f6fed", "#d17a00"  # colours of a trial, and of the best
MACHINE = socket.gethostname()


@dataclass(frozen=True)
class Setting:
    """One line of a space: how a setting is drawn."""

    name: str
    kind: str
    values: tuple

    def draw(self, trial) -> str:
        """The setting's value in this trial, as the environment wants it."""
        if self.kind == "=":
            return self.values[0]
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.values)
        low, high, *steps = self.values
        log = self.kind.startswith("log")
        if self.kind.endswith("int"):
            step = int(steps[0]) if steps else 1
            low, high = int(low), int(high)
            return str(trial.suggest_int(self.name, low, high, step=step, log=log))
        step = steps[0] if steps else None
        return repr(trial.suggest_float(self.name, low, high, log=log, step=step))

    def middle(self) -> str:
        """A value in the middle, to see whether the trainer takes it."""
        if self.kind in ("=", "choice"):
            return self.values[0]
        low, high = self.values[:2]
        return str(int(low)) if self.kind.endswith("int") else repr((low + high) / 2)


# --- the space


def read_space(path: Path) -> list[Setting]:
    """The settings of a space file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ToolError(f"cannot read the space {relative(path)}: {error.strerror}; "
                        "see --help for its form") from None
    space = []
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {relative(path)}"
        try:
            words = shlex.split(line.replace("=", " = ", 1), comments=True)
        except ValueError as error:
            raise ToolError(f"{where}: {error}") from None
        if words:
            space.append(read_setting(words, where))
    names = [s.name for s in space]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ToolError(f"{relative(path)} names {twice[0]} twice: keep one line")
    if all(s.kind == "=" for s in space):
        raise ToolError(f"{relative(path)} varies nothing: "
                        "give at least one setting a range or a choice")
    if "SEED" in names:
        raise ToolError(f"{relative(path)} names SEED: "
                        "seeds are repeats of one trial, give them with --seeds")
    return space


def read_setting(words: list[str], where: str) -> Setting:
    """One line of a space, checked."""
    name, kind, values = words[0], "".join(words[1:2]), words[2:]
    if kind == "=" and len(values) == 1 or kind == "choice" and len(values) > 1:
        return Setting(name, kind, tuple(values))
    if kind not in RANGES:
        raise ToolError(f"{where}: '{' '.join(words)}' must be NAME = VALUE, "
                        "NAME choice A B…, or NAME with one of "
                        f"{', '.join(RANGES)} and LO HI [step S]")
    logarithmic = kind.startswith("log")
    stepped = len(values) == 4 and values[2] == "step" and not logarithmic
    if len(values) != 2 and not stepped:
        raise ToolError(f"{where}: {name} {kind} needs LO HI, "
                        "and for uniform and int optionally step S")
    given = [values[0], values[1], *values[3:]]
    try:
        numbers = tuple(float(v) for v in given)
    except ValueError:
        raise ToolError(f"{where}: {' '.join(values)} are not numbers") from None
    low, high = numbers[:2]
    if not low < high or logarithmic and low <= 0:
        bound = " and above 0" if logarithmic else ""
        raise ToolError(f"{where}: {name} {kind} {values[0]} {values[1]}: "
                        f"LO must be below HI{bound}")
    return Setting(name, kind, numbers)


def check_space(space: list[Setting], args: argparse.Namespace) -> None:
    """The trainer itself accepts these names and values: asked before a start."""
    env = {**os.environ, **{s.name: s.middle() for s in space}}
    command = [sys.executable, args.script, "--check", "settings"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if not done.returncode:
        return
    said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
    reason = said[-1].removeprefix("error: ")
    raise ToolError(f"{relative(args.script)} does not accept the space: {reason}")


# --- the study


class NothingWaits(Exception):
    """Every point of the study is taken."""


def open_study(args: argparse.Namespace, create: bool = True):
    """The study in its database, made when it is not there and `create`. It runs points that
    wait (see `plan`), and makes none of its own: two processes never share or add one."""
    optuna = need("optuna", "sweep")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    class Study(optuna.Study):
        taken = None  # ID of the newest trial that this process took

        def _pop_waiting_trial_id(self) -> int:
            trial_id = super()._pop_waiting_trial_id()
            if trial_id is None:
                raise NothingWaits
            self.taken = trial_id
            # Optuna's first sign of life comes later; without one a trial never counts as silent.
            self._storage.record_heartbeat(trial_id)
            number = self._storage.get_trial_number_from_id(trial_id)
            self.sampler = sampler_of(optuna.samplers, number, args)
            return trial_id

    url = storage_url(args)
    if not args.storage:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    try:
        storage = open_storage(optuna.storages, url, args)
        if create:
            optuna.create_study(storage=storage, study_name=args.study, load_if_exists=True)
        return Study(args.study, storage, pruner=pruner_of(optuna.pruners, args))
    except KeyError:
        raise ToolError(f"there is no study {args.study} in that storage: "
                        "start it without --join or --show") from None
    except Exception as error:  # every database driver raises its own
        reason = str(error).splitlines()[0][:200]
        raise ToolError(f"cannot use the storage {hide_password(url)}: "
                        f"{type(error).__name__}: {reason}") from None


def open_storage(storages, url: str, args: argparse.Namespace):
    """The database; tables that another process makes just now are waited for."""
    options = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
    for attempt in range(10):
        try:
            storage = storages.RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=max(1, args.grace // 6),
                grace_period=args.grace,
                failed_trial_callback=retry_of(storages, args.retries),
            )
            if url.startswith("sqlite"):
                lock_before_reading(storage.engine)
            return storage
        except Exception as error:  # every database driver raises its own
            passing = re.search("already exists|duplicate key|locked", str(error))
            if attempt == 9 or not passing:
                raise
            time.sleep(1)


def retry_of(storages, retries: int):
    """What enqueues the point of a dead trial again: --retries times, those not counted that
    an interrupted sweep left behind."""
    run_again = storages.RetryFailedTrialCallback()

    def retry(study, trial) -> None:
        history = [*trial.system_attrs.get("retry_history", []), trial.number]
        deaths = set(history) - set(trial.user_attrs.get("interrupted", []))
        if len(deaths) <= retries:
            run_again(study, trial)
            return
        point = trial.user_attrs.get("point", trial.number)
        print(f"[{MACHINE}] point {point} was given up: its sweep died {len(deaths)} times", flush=True)

    return retry


def lock_before_reading(engine) -> None:
    """SQLite's transactions take its lock when they begin. By default they take it when they
    first write: two workers could both read that a trial waits, and both run it."""
    event = need("sqlalchemy", "sweep").event

    @event.listens_for(engine, "connect")
    def begin_is_ours(connection, _):
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before


def pruner_of(pruners, args: argparse.Namespace):
    """What stops trials early."""
    if args.prune:
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=args.prune_after)
    return pruners.NopPruner()


def sampler_of(samplers, number: int, args: argparse.Namespace):
    """A trial's sampler: --sampler-seed ties its draws to its number."""
    seed = None
    if args.sampler_seed is not None:
        seed = zlib.crc32(f"{args.sampler_seed}/{number}".encode())
    if args.sampler == "random":
        return samplers.RandomSampler(seed)
    return samplers.TPESampler(
        seed=seed,
        multivariate=True,
        constant_liar=True,
        n_startup_trials=args.startup,
    )


def check_kinds(study, space: list[Setting]) -> None:
    """Refuse a space that draws a setting otherwise than the study's trials did, beyond its bounds."""
    for trial in study.get_trials(deepcopy=False):
        for setting in space:
            if setting.kind == "=" or setting.name not in trial.distributions:
                continue
            earlier = kind_of(trial.distributions[setting.name])
            now = setting.kind
            if now == "choice":
                now = shlex.join(["choice", *setting.values])
            if earlier != now:
                raise ToolError(f"{setting.name} was {earlier} in study {study.study_name}, now {now}: "
                                "kind and choices cannot change in a study; give another --study")


def kind_of(distribution) -> str:
    """How a trial drew a setting, in the words of a space: its kind, and the choices."""
    kind = type(distribution).__name__
    if kind == "CategoricalDistribution":
        return shlex.join(["choice", *distribution.choices])
    if kind == "IntDistribution":
        return "logint" if distribution.log else "int"
    return "log" if distribution.log else "uniform"


def plan(study, count: int) -> int:
    """Enqueue points until the study has `count`; returns how many were added.

    Retries of a point do not count.
    """
    have = sum("failed_trial" not in t.system_attrs for t in study.trials)
    for i in range(have, count):
        study.enqueue_trial({}, user_attrs={"point": i})
    return max(count - have, 0)


def in_state(study, *names: str) -> list:
    """The study's trials in these states."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in names]


def storage_url(args: argparse.Namespace) -> str:
    """The study's database; a PostgreSQL URL without a driver gets the one we install."""
    if args.storage:
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", args.storage)
    return f"sqlite:///{Path(args.out).resolve() / 'study.db'}"


def hide_password(url: str) -> str:
    """A storage URL without its password."""
    head, at, tail = url.rpartition("@")
    if not at:
        return "sqlite:///…/" + url.rsplit("/", 1)[-1]
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.split(':')[0]}@{tail}"


def last_lines(trial) -> str:
    """The end of a trial's newest log, where this machine can read it."""
    path = trial.user_attrs.get("log", "")
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return f"its log {path or '(none yet)'} is not on this machine"
    lines = [line.split("\r")[-1] for line in text.splitlines() if line.strip()]
    return LAST_LINES + " | ".join(lines[-LOG_LINES:])[-1500:]


# --- one trial


class Failed(Exception):
    """The trainer ended without a result."""


PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only


def die_with_parent() -> None:
    """In the child, before exec: a group of its own, SIGTERM when its parent dies."""
    os.setsid()
    if PRCTL:
        PRCTL(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def stop(process: subprocess.Popen) -> None:
    """End a trainer and its ranks: ask, then insist."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def progress_of(folder: Path) -> tuple[int, str, float] | None:
    """(per cent of the budget used, kind of score, score) of a run under way.

    The score is the validation's BPB where it is logged, else the loss.
    """
    try:
        events = read_events(folder / "metrics.jsonl")
    except ToolError:
        return None
    train = [e for e in events if e.get("event") == "train"]
    validated = [e for e in events if e.get("event") == "validation" and e.get("step")]
    if not train:
        return None
    used = round(100 * train[-1]["used"])
    if validated:
        return used, "BPB", validated[-1]["val_bpb"]
    return used, "loss", statistics.fmean(e["loss"] for e in train[-5:])


def metric_of(folder: Path, metric: str) -> float:
    """A finished run's metric; Failed when it has none, or none that is finite."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        value = summary.get(metric)
    except (OSError, ValueError, AttributeError):
        raise Failed("no readable summary.json") from None
    if not isinstance(value, (int, float)):
        scores = [name for name in summary if name.endswith("_bpb") and summary[name] is not None]
        raise Failed(f"no {metric}, but {', '.join(scores) or 'no score at all'}: choose --metric")
    if not math.isfinite(value):
        raise Failed(f"{metric} is {value}")
    return value


@dataclass(frozen=True)
class Worker:
    """Runs one trial at a time, on the GPUs that `devices` names."""

    args: argparse.Namespace
    space: list[Setting]
    devices: dict[str, str]
    stopping: threading.Event  # set: the sweep ends, and its trials with it

    def work(self) -> None:
        """Run waiting trials until none waits or runs, on any machine."""
        study = open_study(self.args, create=False)
        failures = 0  # of the storage, one after the other
        while not self.stopping.is_set():
            try:
                if not in_state(study, "WAITING", "RUNNING"):
                    return
                self.run_next(study)
                failures = 0
            except NothingWaits:
                failures = 0
                time.sleep(POLL_SECONDS)
            except Exception as error:
                if not is_of_storage(error):
                    raise
                failures += 1
                if failures == STORAGE_TRIES:
                    raise ToolError(
                        f"the storage failed {failures} times on end ({error_line(str(error))}): "
                        "the same command goes on once it answers") from None
                print(f"[{MACHINE}] the storage failed; once more in {STORAGE_SECONDS} s", flush=True)
                self.stopping.wait(STORAGE_SECONDS)

    def run_next(self, study) -> None:
        """Run one waiting trial. Raises NothingWaits, and what is wrong with the run or the storage."""
        own_errors = []

        def objective(trial) -> float:
            try:
                return self.run_trial(trial)
            except Exception as error:
                own_errors.append(error)
                raise

        study.taken = None
        try:
            study.optimize(objective, n_trials=1, catch=(Failed,))
        except Exception as error:
            # Optuna hands on the run's own error once it has noted it. Any other one means that
            # it could note nothing: mostly as the trial has ended in the storage already.
            if study.taken is None or error in own_errors:
                raise
            trial = study._storage.get_trial(study.taken)
            if not trial.state.is_finished():
                raise
            print(f"[{MACHINE}] trial {trial.number} was given up by another sweep; its result is dropped",
                  flush=True)

    def run_trial(self, trial) -> float:
        """The mean metric of a trial's seeds. Raises Failed, or TrialPruned."""
        label = f"[{MACHINE}] trial {trial.number}"
        settings = {s.name: s.draw(trial) for s in self.space}
        drawn = [f"{s.name}={settings[s.name]}" for s in self.space if s.kind != "="]
        print(f"{label} starts: {' '.join(drawn)}", flush=True)
        trial.set_user_attr("worker", f"{MACHINE}:{os.getpid()}")
        metric = self.args.metric
        values = []
        try:
            for seed in self.args.seeds:
                prune = self.args.prune and not values  # by the first seed alone
                values.append(self.run_seed(trial, settings, seed, prune))
                trial.set_user_attr(f"{metric}_seed{seed}", values[-1])
        except Failed as error:
            trial.set_user_attr("error", f"{error}; {last_lines(trial)}")
            print(f"{label} FAILED: {error}", flush=True)
            raise
        except SystemExit:
            interrupted = trial.user_attrs.get("interrupted", [])  # earlier runs of the point
            trial.set_user_attr("interrupted", [*interrupted, trial.number])
            raise
        mean = statistics.fmean(values)
        spread = f" ± {statistics.stdev(values):.6f}" if len(values) > 1 else ""
        print(f"{label} {metric} {mean:.6f}{spread}", flush=True)
        return mean

    def run_seed(self, trial, settings: dict, seed: int, prune: bool) -> float:
        """One run of the trainer; its metric. Raises Failed, or TrialPruned."""
        args = self.args
        folder = Path(args.out) / f"trial_{trial.number:04d}_seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "worker.log"
        trial.set_user_attr("log", str(log))
        env = {**os.environ, **self.devices, **settings, "SEED": str(seed)}
        env |= {"ARTIFACT_DIR": str(folder), "RUN_ID": folder.name}
        launch = args.launch.format(python=sys.executable, nproc=args.nproc)
        command = [*shlex.split(launch), args.script]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                preexec_fn=die_with_parent,
            )
            try:
                self.watch(process, folder, trial, prune)
            finally:
                stop(process)
        if process.returncode:
            said = error_line(log.read_text(errors="replace"))
            raise Failed(f"exit status {process.returncode}: {said}")
        return metric_of(folder, args.metric)

    def watch(self, process: subprocess.Popen, folder: Path, trial, prune: bool) -> None:
        """Wait for a run's end, show how far it is, and report that to a trial that may be pruned.

        Raises TrialPruned when it is hopeless; SystemExit when the sweep ends, which leaves
        the trial to be run again.
        """
        label = f"[{MACHINE}] trial {trial.number}"
        shown = reported = 0
        while not has_ended(process, POLL_SECONDS):
            if self.stopping.is_set():
                raise SystemExit
            used, kind, score = progress_of(folder) or (0, "loss", math.nan)
            if used >= shown + PROGRESS_PERCENT:
                shown = used - used % PROGRESS_PERCENT
                doing = f"{used} % of its training" if used < 100 else "trained, now it quantises and scores"
                print(f"{label}: {doing}, {kind} {score:.4f}", flush=True)
            if prune and used > reported and math.isfinite(score):
                reported = used
                trial.report(score, used)
                if trial.should_prune():
                    print(f"{label} pruned at {used} %", flush=True)
                    raise need("optuna", "sweep").TrialPruned


def has_ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process ends within these seconds."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


def is_of_storage(error: BaseException | None) -> bool:
    """Whether an error is the database's, or was raised while one was handled."""
    kinds = (
        need("optuna", "sweep").exceptions.StorageInternalError,
        need("sqlalchemy", "sweep").exc.OperationalError,
    )
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__context__
    return False


def visible_gpus() -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    count = "nvidia-smi -L 2>/dev/null | grep -c '^GPU'"
    listed = subprocess.run(count, shell=True, capture_output=True, text=True)
    return [str(i) for i in range(int(listed.stdout.strip() or 0))]


# --- all workers of this machine


def devices_of(slot: int, args: argparse.Namespace) -> dict:
    """The GPUs of one worker, shared with no other: the next --nproc visible ones."""
    gpus = visible_gpus()
    if not gpus:
        return {}
    mine = gpus[slot * args.nproc : (slot + 1) * args.nproc]
    if len(mine) < args.nproc:
        raise ToolError(
            f"{args.workers} workers x --nproc {args.nproc} "
            f"need {args.workers * args.nproc} GPUs, "
            f"{len(gpus)} are visible: lower one of them")
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def coordinate(args: argparse.Namespace, space: list[Setting]) -> None:
    """Keep --workers workers busy until no trial waits or runs."""
    devices = [devices_of(slot, args) for slot in range(args.workers)]
    study = open_study(args, create=not args.join)
    check_kinds(study, space)
    if not args.join:
        added = plan(study, args.trials)
        print(f"study {args.study}: {len(study.trials)} trials, {added} new", flush=True)
    if in_state(study, "RUNNING"):
        print(f"trials of another sweep are waited for; after {args.grace} s without a sign "
              "of life they are run again", flush=True)
    stopping = threading.Event()
    with ThreadPoolExecutor(args.workers) as pool:
        working = [pool.submit(Worker(args, space, own, stopping).work) for own in devices]
        try:
            for worker in as_completed(working):
                worker.result()
        except KeyboardInterrupt:  # or SIGTERM
            print("stopping: the same command goes on later", file=sys.stderr, flush=True)
            raise
        finally:
            stopping.set()


# --- results


def row_of(trial, names: list[str], metric: str) -> list[str]:
    """A trial's row of the table."""
    notes = trial.user_attrs
    state = trial.state.name
    done = trial.value is not None and state == "COMPLETE"
    by_seed = [v for k, v in notes.items() if k.startswith(f"{metric}_seed")]
    note = notes.get("error", "")
    if state == "FAIL" and not note:
        note = f"its sweep was killed or fell silent; {last_lines(trial)}"
    if history := trial.system_attrs.get("retry_history"):
        note = f"retry of trial {history[-1]}. {note}".strip()
    return [
        str(trial.number),
        state,
        f"{trial.value:.6f}" if done else "",
        f"{statistics.stdev(by_seed):.6f}" if len(by_seed) > 1 else "",
        *(show(trial.params.get(name, "")) for name in names),
        note,
    ]


def names_in(trials: list) -> list[str]:
    """The settings that any of the trials drew."""
    return sorted(set().union(*(t.params for t in trials)))


def rows_of(study, args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """The table: finished trials by value, then the rest."""

    def best_first(trial) -> tuple:
        return trial.value is None, trial.value or 0.0, trial.number

    trials = sorted(study.trials, key=best_first)
    names = names_in(trials)
    head = ["trial", "state", args.metric, "std", *names, "note"]
    return head, [row_of(trial, names, args.metric) for trial in trials]


def show(value) -> str:
    """A parameter as the table shows it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shortened(cell: str) -> str:
    """A cell for the screen: a reason without the log behind it, and not too long."""
    cell = cell.split(f"; {LAST_LINES}")[0]
    return cell if len(cell) <= 100 else cell[:50] + " … " + cell[-47:]


def csv_line(cells: list[str]) -> str:
    """Cells as a line of CSV, quoted where they hold a comma, a quote or a line end."""
    out = []
    for cell in cells:
        if set(cell) & set(',"\n'):
            cell = '"' + cell.replace('"', "'") + '"'
        out.append(cell)
    return ",".join(out) + "\n"


def results(args: argparse.Namespace) -> str:
    """Print the table; write results.csv and results.html. Returns the last line."""
    study = open_study(args, create=False)
    head, rows = rows_of(study, args)
    print(table(head, [list(map(shortened, row)) for row in rows]))
    csv, html = Path(args.out) / "results.csv", Path(args.out) / "results.html"
    write_atomic(csv, "".join(map(csv_line, [head, *rows])))
    write_atomic(html, results_page(study, args))
    if len(args.seeds) == 1:
        print("one seed a trial: small differences may be noise; --seeds 1 2 3 repeats every trial")
    counts = [f"{count} {state}" for state, count in counts_of(study).items()]
    return f"{', '.join(counts)}; {relative(csv)}, {relative(html)}"


def counts_of(study) -> dict[str, int]:
    """How many trials are in each state that any is in."""
    return dict(sorted(Counter(t.state.name.lower() for t in study.trials).items()))


# --- the page


def results_page(study, args: argparse.Namespace) -> str:
    """The best trial, the history, a plot per setting, and every trial, on an offline page."""
    done = in_state(study, "COMPLETE")
    metric = args.metric
    parts = [
        page.Section(
            "history", "Trials in order", "The line is the best so far; the star is the best of all.",
            "no trial has finished", panels=history_panels(done, metric)),
        page.Section(
            "settings", "By setting", "A trial per dot; later ones are darker, the star is the best.",
            "no trial has finished",
            panels=[setting_panel(done, name, metric) for name in names_in(done)]),
        page.Section(
            "trials", "Every trial", "Finished ones by value. results.csv has the notes in full.",
            "there is none", table=trial_table(study, args)),
    ]
    sentence = f"{metric} of {len(done)} finished trials, lower is better"
    return page.render(args.study, sentence, [best_card(study, done, args)], parts)


def best_card(study, done: list, args: argparse.Namespace) -> page.Card:
    """The best trial with its settings, and how far the sweep is."""
    counts = counts_of(study)
    segments = [page.Segment(state, count, STATES[state]) for state, count in counts.items()]
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    meters = [page.Meter("trials", text, segments)]
    if not done:
        return page.Card("NO RESULT YET", "open", args.study, "", "–", args.metric, meters)
    best = best_of(done)
    notes = [("plain", f"{name}={show(value)}") for name, value in sorted(best.params.items())]
    name, figure = f"trial {best.number}", f"{best.value:.5f}"
    return page.Card(f"BEST OF {len(done)}", "good", name, "", figure, args.metric, meters, notes)


def best_of(done: list):
    """The trial of the least value."""
    return min(done, key=lambda trial: trial.value)


def star(x, best) -> dict:
    """A mark over the best trial."""
    return {
        "type": "scatter",
        "x": [x],
        "y": [best.value],
        "mode": "markers",
        "marker": {"symbol": "star", "size": 15, "color": BEST},
        "hovertemplate": f"trial {best.number}, the best: %{{y:.6f}}<extra></extra>",
    }


def history_panels(done: list, metric: str) -> list[page.Panel]:
    """Values in the order of the trials, and the best so far; none without a trial."""
    if not done:
        return []
    numbers = [t.number for t in done]
    values = [t.value for t in done]
    shown = "trial %{x}: %{y:.6f}<extra></extra>"
    traces = [
        {
            "type": "scatter", "x": numbers, "y": list(itertools.accumulate(values, min)),
            "mode": "lines", "line": {"shape": "hv", "color": BEST, "width": 2}, "hoverinfo": "skip",
        },
        {
            "type": "scatter", "x": numbers, "y": values, "mode": "markers",
            "marker": {"size": 8, "color": DOT}, "hovertemplate": shown,
        },
        star(best_of(done).number, best_of(done)),
    ]
    x = {"title": "trial", "dtick": 1} if max(numbers) < 16 else {"title": "trial"}
    return [page.plot("history", "", traces, 280, x, {"title": metric})]


def setting_panel(done: list, name: str, metric: str) -> page.Panel:
    """Value over one setting; later trials are darker."""
    drawn = [t for t in done if name in t.params]
    numbers = [t.number for t in drawn]
    newest = max(numbers)
    traces = [{
        "type": "scatter",
        "x": [t.params[name] for t in drawn],
        "y": [t.value for t in drawn],
        "mode": "markers",
        "text": [f"trial {number}" for number in numbers],
        "marker": {
            "size": 9,
            "color": DOT,
            "opacity": [0.3 + 0.7 * number / max(newest, 1) for number in numbers],
        },
        "hovertemplate": "%{text}: %{y:.6f}<br>" + name + "=%{x}<extra></extra>",
    }]
    best = best_of(drawn)
    traces.append(star(best.params[name], best))
    x = {}
    drawn_from = best.distributions[name]
    if choices := getattr(drawn_from, "choices", None):
        x = {"type": "category", "categoryorder": "array", "categoryarray": list(choices)}
    elif drawn_from.log:
        x = {"type": "log", "title": "logarithmic"}
    return page.plot(f"setting-{name}", name, traces, 240, x, {"title": metric})


def trial_table(study, args: argparse.Namespace) -> page.Table | None:
    """The table of results; reasons are shortened."""
    head, rows = rows_of(study, args)
    cells = [[page.Cell(shortened(text)) for text in row] for row in rows]
    return page.Table(head, cells, words=True) if rows else None


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("space", help="text file with the settings to vary")
    add("--trials", type=int, default=20,
        help="points the study shall have in all (default 20)")
    add("--workers", type=int, default=1, help="trials at a time on this machine")
    add("--nproc", type=int, default=1, help="processes (GPUs) of one run")
    add("--seeds", nargs="+", action=Seeds, default=[1337],
        help="1 2 3, or 1,2,3: repeats of a trial")
    add("--metric", default="val_bpb", help="key of summary.json to minimise")
    add("--study", default="", help="its name (default: the space file's)")
    add("--storage", default="", help="Optuna storage URL (default: SQLite in --out)")
    add("--join", action="store_true",
        help="add no points: work on those of another machine's study")
    add("--prune", action="store_true", help="stop trials that are behind the median")
    add("--prune-after", type=int, default=30, metavar="PERCENT",
        help="of the budget, before which nothing is pruned")
    add("--sampler", choices=("tpe", "random"), default="tpe")
    add("--sampler-seed", type=int, help="makes a single worker's draws repeatable")
    add("--startup", type=int, default=10, help="random points before TPE proposes")
    add("--retries", type=int, default=3,
        help="how often a point whose sweep was killed is run again (interruptions do not count)")
    add("--grace", type=int, default=GRACE_SECONDS,
        help="seconds without a sign of life after which a sweep counts as dead")
    add("--launch", help="what starts the script (python; torchrun where --nproc is more than 1)")
    add("--script", default=str(SCRIPT), help="the trainer")
    add("--out", default="", help="folder of the trials (default: runs/<study>)")
    add("--show", action="store_true", help="only the results so far")
    args = parser.parse_args(arguments)
    least = {"trials": 1, "workers": 1, "nproc": 1, "grace": 6, "retries": 0}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ToolError(f"--{name} {getattr(args, name)} must be at least {bound}")
    args.launch = args.launch or (ALONE if args.nproc == 1 else SEVERAL)
    args.study = args.study or Path(args.space).stem
    args.out = args.out or str(Path("runs") / args.study)
    return args


def main(arguments=None) -> int:
    """Entry."""
    args = parse(arguments)
    if not args.show:
        space = read_space(args.space)
        check_space(space, args)
        for module in ("jinja2", "plotly.offline"):  # not looked for after hours of trials only
            need(module, "the page of results")
        coordinate(args, space)
    print(results(args))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    run_cli(main)
