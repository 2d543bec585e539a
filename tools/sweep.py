"""Sweep environment variables of the trainer with Optuna; every trial is the real command.

    python tools/sweep.py space.txt --trials 20 --workers 2
    python tools/sweep.py space.txt --trials 20 --storage postgresql://user@host/db    # first machine
    python tools/sweep.py space.txt --join --storage postgresql://user@host/db         # every other machine
    python tools/sweep.py space.txt --show

SPACE is a text file, one setting per line (# starts a comment):
    MATRIX_LR        log 0.01 0.05          # log-uniform       uniform LO HI: uniform
    TTT_LORA_RANK    int 32 128 step 16     # whole numbers     logint LO HI: log-uniform whole numbers
    LQER_TOP_K       choice 1 2 3 5         # one of
    VOCAB_SIZE       = 8192                 # fixed for all trials

The study lives in a database (SQLite beside the trials, or any Optuna storage URL)
under --study: the same command again goes on where it stopped. A trial is one run per
seed (--seeds), its value is the mean of --metric in summary.json; with --prune a
hopeless trial is stopped early by its metrics.jsonl. A trial that fails is kept with
its last log lines; one whose worker was killed is kept, too, and its settings run again
(--retries).
"""

from __future__ import annotations

import argparse
import ctypes
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
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    SCRIPT,
    ToolError,
    command_line,
    need,
    read_events,
    relative,
    run_cli,
    table,
    write_atomic,
)

BEAT_SECONDS, GRACE_SECONDS, POLL_SECONDS = 10, 60, 0.5
LOG_LINES, MAX_RESPAWNS = 12, 20
SAMPLERS = ("tpe", "random")
HOST = f"{socket.gethostname()}:{os.getpid()}"


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
        low, high, *step = self.values
        if self.kind in ("int", "logint"):
            log = self.kind == "logint"
            return str(trial.suggest_int(self.name, int(low), int(high), step=int(step[0]) if step else 1,
                                         log=log))
        return repr(trial.suggest_float(self.name, low, high, log=self.kind == "log",
                                        step=step[0] if step else None))

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
        raise ToolError(
            f"cannot read the space {relative(path)}: {error.strerror}; see --help for its form") from None
    space = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line.replace("=", " = ", 1), comments=True)
        except ValueError as error:
            raise ToolError(f"line {number} of {relative(path)}: {error}") from None
        if words:
            space.append(read_setting(words, f"line {number} of {relative(path)}"))
    names = [s.name for s in space]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ToolError(f"{relative(path)} names {twice[0]} twice: keep one line")
    if not any(s.kind != "=" for s in space):
        raise ToolError(f"{relative(path)} varies nothing: give at least one setting a range or a choice")
    if "SEED" in names:
        raise ToolError(
            f"{relative(path)} names SEED: seeds are repeats of one trial, give them with --seeds")
    return space


def read_setting(words: list[str], where: str) -> Setting:
    """One line of a space, checked."""
    name, kind, values = words[0], words[1] if len(words) > 1 else "", words[2:]
    if kind == "=" and len(values) == 1 or kind == "choice" and len(values) > 1:
        return Setting(name, kind, tuple(values))
    known = ("log", "uniform", "int", "logint")
    if kind not in known:
        raise ToolError(
            f"{where}: '{' '.join(words)}' must be NAME = VALUE, NAME choice A B…, or NAME with one of "
            f"{', '.join(known)} and LO HI [step S]")
    if len(values) not in (2, 4) or len(values) == 4 and (values[2] != "step" or kind.startswith("log")):
        raise ToolError(f"{where}: {name} {kind} needs LO HI, and for uniform and int optionally step S")
    try:
        numbers = tuple(float(v) for v in (values[:2] if len(values) == 2 else [*values[:2], values[3]]))
    except ValueError:
        raise ToolError(f"{where}: {' '.join(values)} are not numbers") from None
    if not numbers[0] < numbers[1] or kind.startswith("log") and numbers[0] <= 0:
        raise ToolError(f"{where}: {name} {kind} {values[0]} {values[1]}: LO must be below HI"
                        + (" and above 0" if kind.startswith("log") else ""))
    return Setting(name, kind, numbers)


def check_space(space: list[Setting], args: argparse.Namespace) -> None:
    """The trainer itself accepts these names and values: asked before anything is started."""
    env = {**os.environ, **{s.name: s.middle() for s in space}}
    done = subprocess.run([sys.executable, args.script, "--check", "settings"], env=env, capture_output=True,
                          text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ToolError(f"{relative(args.script)} does not accept the space: "
                        f"{(said or ['no reason given'])[-1].removeprefix('error: ')}")


# --- the study


class Study:
    """The database's view of the sweep. A point is a WAITING trial until a worker takes
    it; only one can."""

    def __init__(self, args: argparse.Namespace, create: bool = True):
        self.args, self.optuna = args, need("optuna", "sweep")
        warnings.filterwarnings("ignore", category=self.optuna.exceptions.ExperimentalWarning)
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        self.states = self.optuna.trial.TrialState
        url = storage_url(args)
        if not args.storage:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        pruner = (self.optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=args.prune_after)
                  if args.prune else self.optuna.pruners.NopPruner())
        try:
            self.storage = self.open_storage(url, engine_kwargs=options, heartbeat_interval=BEAT_SECONDS,
                                             grace_period=args.grace)
            make = self.optuna.create_study if create else self.optuna.load_study
            more = {"direction": "minimize", "load_if_exists": True} if create else {}
            self.study = make(study_name=args.study, storage=self.storage, pruner=pruner, **more)
            self.id = self.storage.get_study_id_from_name(args.study)
        except KeyError:
            raise ToolError(f"there is no study {args.study} in that storage: start it without --join or "
                            "--show") from None
        except Exception as error:  # every database driver raises its own
            raise ToolError(f"cannot use the storage {hide_password(url)}: {type(error).__name__}: "
                            f"{str(error).splitlines()[0][:200]}") from None

    def open_storage(self, url: str, **options):
        """The database; tables that another process is making at this moment are waited for."""
        for attempt in range(10):
            try:
                return self.optuna.storages.RDBStorage(url, **options)
            except Exception as error:  # every database driver raises its own
                if attempt == 9 or not re.search("already exists|duplicate key|locked", str(error)):
                    raise
                time.sleep(1)

    def sampler(self, number: int):
        """A trial's sampler: with --sampler-seed its draws hang on the trial's number,
        not on the worker."""
        args, samplers = self.args, self.optuna.samplers
        seed = None if args.sampler_seed is None else zlib.crc32(f"{args.sampler_seed}/{number}".encode())
        if args.sampler == "random":
            return samplers.RandomSampler(seed)
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True,
                                   n_startup_trials=args.startup)

    def trials(self, *states) -> list:
        """Trials in these states, all when none are given."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def plan(self, count: int) -> int:
        """Enqueue points until the study has `count` (retries not counted). Returns how
        many were added."""
        have = sum("retry_of" not in t.user_attrs for t in self.trials())
        for i in range(have, count):
            self.study.enqueue_trial({}, user_attrs={"point": i})
        return max(count - have, 0)

    def take(self):
        """A waiting trial for this process alone, or None: the database lets only one
        process take it."""
        for waiting in self.trials(self.states.WAITING):
            if self.is_double(waiting):
                continue
            if self.storage.set_trial_state_values(waiting._trial_id, state=self.states.RUNNING):
                self.storage.record_heartbeat(waiting._trial_id)
                self.study.sampler = self.sampler(waiting.number)
                trial = self.optuna.trial.Trial(self.study, waiting._trial_id)
                trial.set_user_attr("worker", HOST)
                return trial
        return None

    def is_double(self, waiting) -> bool:
        """A second retry of one dead trial (two machines saw it die): the younger one
        is dropped, unrun."""
        of = waiting.user_attrs.get("retry_of")
        older = [t for t in self.trials() if of is not None and t.user_attrs.get("retry_of") == of
                 and t.number < waiting.number]
        if older:
            self.end(waiting._trial_id, self.states.FAIL,
                     error=f"dropped: trial {older[0].number} is the same retry")
        return bool(older)

    def end(self, trial_id: int, state, value: float | None = None, **attributes) -> bool:
        """Finish a trial, with attributes; False when another process was first."""
        try:
            for key, text in attributes.items():
                self.storage.set_trial_user_attr(trial_id, key, text)
            return self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return False

    def bury(self, worker: str, why: str, died: str = "killed") -> None:
        """A worker of this machine is gone: fail its trial with its last log lines."""
        for t in self.trials(self.states.RUNNING):
            if t.user_attrs.get("worker") == worker:
                self.end(t._trial_id, self.states.FAIL, died=died, error=f"{why}; {last_lines(t)}")

    def revive(self, retries: int) -> None:
        """Fail trials whose worker, on any machine, no longer answers; enqueue dead
        ones again, each once."""
        self.optuna.storages.fail_stale_trials(self.study)
        trials = self.trials()
        replaced = {t.user_attrs.get("retry_of") for t in trials}
        for t in trials:
            lost = t.state == self.states.FAIL and (t.user_attrs.get("died") or "error" not in t.user_attrs)
            attempt = t.user_attrs.get("attempt", 0) + (t.user_attrs.get("died") != "interrupted")
            if lost and t.number not in replaced and attempt <= retries:
                self.study.enqueue_trial(t.params,
                                         user_attrs={"point": t.user_attrs.get("point"), "retry_of": t.number,
                                                     "attempt": attempt,
                                                     "died_with": t.user_attrs.get("error")
                                                     or f"its worker stopped answering; {last_lines(t)}"})

    def open(self) -> int:
        """Trials that wait or run."""
        return len(self.trials(self.states.WAITING, self.states.RUNNING))


def storage_url(args: argparse.Namespace) -> str:
    """The study's database; a PostgreSQL URL that names no driver gets the one we install."""
    if args.storage:
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", args.storage)
    return f"sqlite:///{Path(args.out).resolve() / 'study.db'}"


def hide_password(url: str) -> str:
    """A storage URL without its password."""
    head, at, tail = url.rpartition("@")
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.split(':')[0]}@{tail}" if at else "sqlite:///…/" + url.rsplit("/", 1)[-1]


def last_lines(trial) -> str:
    """The end of a trial's newest log, where this machine can read it."""
    path = trial.user_attrs.get("log", "")
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return f"its log {path or '(none yet)'} is not on this machine"
    lines = [line.split("\r")[-1] for line in text.splitlines() if line.strip()]
    return "last log lines: " + " | ".join(lines[-LOG_LINES:])[-1500:]


# --- one trial


class Failed(Exception):
    """The trainer ended without a result."""


PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only


def die_with_parent() -> None:
    """In the child, before exec: a group of its own, and SIGTERM when its parent dies,
    however it dies."""
    os.setsid()
    if PRCTL:
        PRCTL(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def stop(process: subprocess.Popen) -> None:
    """End a trainer and its ranks: ask, then insist."""
    for sign, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def progress_of(folder: Path) -> tuple[int, float] | None:
    """(per cent of the budget used, score) of a run under way: validation BPB where
    logged, else the loss."""
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
        return used, validated[-1]["val_bpb"]
    tail = [e["loss"] for e in train[-5:]]
    return used, statistics.fmean(tail)


def run_seed(study: Study, trial, settings: dict, seed: int, args, prune: bool) -> float:
    """One run of the trainer; its metric. Raises Failed, or TrialPruned."""
    folder = Path(args.out) / f"trial_{trial.number:04d}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "worker.log"
    trial.set_user_attr("log", str(log))
    env = {**os.environ, **settings, "SEED": str(seed), "ARTIFACT_DIR": str(folder), "RUN_ID": folder.name}
    command = [*shlex.split(args.launch.format(python=sys.executable, nproc=args.nproc)), args.script]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env,
                                   preexec_fn=die_with_parent)
        reported = 0
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                now = progress_of(folder) if prune else None
                if now and now[0] > reported and math.isfinite(now[1]):
                    reported = now[0]
                    trial.report(now[1], reported)
                    if trial.should_prune():
                        raise study.optuna.TrialPruned
        finally:
            stop(process)
    if process.returncode:
        raise Failed(f"exit status {process.returncode}")
    try:
        value = float(json.loads((folder / "summary.json").read_text())[args.metric])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failed(f"no {args.metric} in summary.json ({type(error).__name__})") from None
    if not math.isfinite(value):
        raise Failed(f"{args.metric} is {value}")
    return value


def run_trial(study: Study, trial, space: list[Setting], args) -> str:
    """Run a trial to its end in the database. Returns what to say about it."""
    settings = {s.name: s.draw(trial) for s in space}
    values = []
    try:
        for n, seed in enumerate(args.seeds):
            values.append(run_seed(study, trial, settings, seed, args, prune=args.prune and n == 0))
            trial.set_user_attr(f"{args.metric}_seed{seed}", values[-1])
    except study.optuna.TrialPruned:
        study.end(trial._trial_id, study.states.PRUNED, pruned_at=f"{trial.number}: behind the median")
        return "pruned"
    except Failed as error:
        frozen = study.storage.get_trial(trial._trial_id)
        study.end(trial._trial_id, study.states.FAIL, error=f"{error}; {last_lines(frozen)}")
        return f"FAILED: {error}"
    study.end(trial._trial_id, study.states.COMPLETE, statistics.fmean(values))
    return f"{args.metric} {statistics.fmean(values):.6f}" + (f" ± {statistics.stdev(values):.6f}"
                                                              if len(values) > 1 else "")


def worker(args: argparse.Namespace) -> int:
    """Take waiting trials until none waits. The heartbeat tells other machines that
    this one lives."""
    study, space = Study(args, create=False), read_space(args.space)
    while (trial := study.take()) is not None:
        shown = {s.name: s.draw(trial) for s in space if s.kind != "="}
        print(f"[{HOST}] trial {trial.number} starts: " + " ".join(f"{k}={v}" for k, v in shown.items()),
              flush=True)
        done = threading.Event()

        def beat(trial_id=trial._trial_id, done=done):
            while not done.wait(BEAT_SECONDS):
                study.storage.record_heartbeat(trial_id)

        threading.Thread(target=beat, daemon=True).start()
        try:
            said = run_trial(study, trial, space, args)
        finally:
            done.set()
        print(f"[{HOST}] trial {trial.number} {said}", flush=True)
    return 0


# --- all workers of this machine


def devices_of(slot: int, args: argparse.Namespace) -> dict:
    """The GPUs of one worker: the next --nproc of the visible ones, so that workers do
    not share one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        listed = subprocess.run("nvidia-smi -L 2>/dev/null | grep -c '^GPU'", shell=True, capture_output=True,
                                text=True)
        visible = ",".join(map(str, range(int(listed.stdout.strip() or 0))))
    gpus = [g for g in visible.split(",") if g]
    if not gpus:
        return {}
    mine = gpus[slot * args.nproc : (slot + 1) * args.nproc]
    if len(mine) < args.nproc:
        raise ToolError(
            f"{args.workers} workers x --nproc {args.nproc} need {args.workers * args.nproc} GPUs, "
            f"{len(gpus)} are visible: lower one of them")
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def coordinate(args: argparse.Namespace, words: list[str]) -> None:
    """Keep --workers workers busy until no trial waits or runs; bury and replace the
    ones that die."""
    study = Study(args)
    if not args.join:
        added = study.plan(args.trials)
        print(f"study {args.study}: {len(study.trials())} trials, {added} new", flush=True)
    study.revive(args.retries)
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--worker"]
    slots: dict[int, subprocess.Popen] = {}
    started = 0
    try:
        while True:
            for slot, process in list(slots.items()):
                if process.poll() is not None:
                    name = f"{socket.gethostname()}:{process.pid}"
                    if process.returncode:
                        print(f"worker {name} died (status {process.returncode}); its trial is run again",
                              flush=True)
                        study.bury(name, f"worker {name} died with status {process.returncode}")
                    del slots[slot]
            study.revive(args.retries)
            waiting = len(study.trials(study.states.WAITING))
            for slot in [i for i in range(args.workers) if i not in slots][:waiting]:
                started += 1
                if started > args.workers + MAX_RESPAWNS + args.trials:
                    raise ToolError("workers die faster than they finish trials: --show has their last lines")
                env = {**os.environ, **devices_of(slot, args)}
                slots[slot] = subprocess.Popen(command, env=env, preexec_fn=die_with_parent)
            if not slots and not study.open():
                return
            time.sleep(POLL_SECONDS)
    finally:
        for process in slots.values():
            stop(process)
            study.bury(f"{socket.gethostname()}:{process.pid}", "the sweep was interrupted", "interrupted")


# --- results


def rows_of(study: Study, args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """The table: finished trials by value, then the rest."""
    names = sorted({name for t in study.trials() for name in t.params})
    rows = []
    for t in sorted(study.trials(), key=lambda t: (t.value is None, t.value or 0.0, t.number)):
        seeds = [v for k, v in t.user_attrs.items() if k.startswith(f"{args.metric}_seed")]
        spread = f"{statistics.stdev(seeds):.6f}" if len(seeds) > 1 else ""
        note = t.user_attrs.get("error", "")
        if "retry_of" in t.user_attrs:
            note = f"retry of trial {t.user_attrs['retry_of']}. {note}".strip()
        done = t.value is not None and t.state == study.states.COMPLETE
        rows.append([str(t.number), t.state.name, f"{t.value:.6f}" if done else "", spread,
                     *(show(t.params.get(n, "")) for n in names), note])
    return ["trial", "state", args.metric, "std", *names, "note"], rows


def show(value) -> str:
    """A parameter as the table shows it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def results(args: argparse.Namespace) -> str:
    """Print the table; write results.csv and results.html. Returns the last line."""
    study = Study(args, create=False)
    head, rows = rows_of(study, args)
    brief = [[cell if len(cell) <= 76 else cell[:26] + " … " + cell[-47:] for cell in row] for row in rows]
    print(table(head, brief))
    out = Path(args.out)
    csv = "\n".join(",".join('"' + c.replace('"', "'") + '"' if set(c) & set(',"\n') else c for c in row)
                    for row in [head, *rows])
    write_atomic(out / "results.csv", csv + "\n")
    write_atomic(out / "results.html", plots(study, args))
    count = {s.name.lower(): len(study.trials(s)) for s in study.states}
    states = ", ".join(f"{n} {name}" for name, n in count.items() if n)
    return f"{states}; {relative(out / 'results.csv')}, {relative(out / 'results.html')}"


def plots(study: Study, args: argparse.Namespace) -> str:
    """History, and one panel per setting, on one offline page; later trials are darker."""
    go, sub = need("plotly.graph_objects", "sweep"), need("plotly.subplots", "sweep")
    done = [t for t in study.trials(study.states.COMPLETE)]
    names = sorted({n for t in done for n in t.params})
    if not done:
        return "<!doctype html><meta charset=utf-8><p>No trial has finished yet."
    best = [min(t.value for t in done[: i + 1]) for i in range(len(done))]
    titles = ["trials in order; the line is the best so far", *names]
    fig = sub.make_subplots(rows=1 + -(-len(names) // 3), cols=3, subplot_titles=titles,
                            vertical_spacing=0.12,
                            specs=[[{"colspan": 3}, None, None],
                                   *([{}] * 3 for _ in range(-(-len(names) // 3)))])
    fig.add_trace(go.Scatter(x=[t.number for t in done], y=[t.value for t in done], mode="markers"), row=1,
                  col=1)
    fig.add_trace(go.Scatter(x=[t.number for t in done], y=best, mode="lines", line={"shape": "hv"}), row=1,
                  col=1)
    for i, name in enumerate(names):
        row, column = 2 + i // 3, 1 + i % 3
        have = [t for t in done if name in t.params]
        shade = {"color": [t.number for t in have], "colorscale": [[0, "#93c5fd"], [1, "#1e3a8a"]]}
        fig.add_trace(go.Scatter(x=[t.params[name] for t in have], y=[t.value for t in have], mode="markers",
                                 text=[f"trial {t.number}" for t in have], marker=shade), row=row, col=column)
        dist = have[0].distributions[name]
        if getattr(dist, "log", False):
            fig.update_xaxes(type="log", row=row, col=column)
    fig.update_layout(template="plotly_white", showlegend=False, height=320 + 260 * (-(-len(names) // 3)),
                      title=f"{args.study}: {args.metric} of {len(done)} trials")
    return fig.to_html(include_plotlyjs=True, config={"displaylogo": False})


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("space", help="text file with the settings to vary")
    add("--trials", type=int, default=20, help="points the study shall have in all (default 20)")
    add("--workers", type=int, default=1, help="trials at a time on this machine")
    add("--nproc", type=int, default=1, help="processes (GPUs) of one run")
    add("--seeds", type=lambda t: [int(x) for x in t.split(",")], default=[1337],
        help="e.g. 1,2,3: repeats of a trial")
    add("--metric", default="val_bpb", help="key of summary.json to minimise")
    add("--study", default="", help="its name (default: the space file's)")
    add("--storage", default="", help="Optuna storage URL (default: SQLite in --out)")
    add("--join", action="store_true", help="add no points: work on those of another machine's study")
    add("--prune", action="store_true", help="stop trials that are behind the median")
    add("--prune-after", type=int, default=30, metavar="PERCENT",
        help="of the budget, before which nothing is pruned")
    add("--sampler", choices=SAMPLERS, default="tpe")
    add("--sampler-seed", type=int, help="makes a single worker's draws repeatable")
    add("--startup", type=int, default=10, help="random points before TPE proposes")
    add("--retries", type=int, default=1, help="how often a point whose worker died is run again")
    add("--grace", type=int, default=GRACE_SECONDS,
        help="seconds without a sign after which a worker elsewhere counts as dead")
    add("--launch", default="{python} -m torch.distributed.run --standalone --nproc_per_node={nproc}",
        help="what starts the script")
    add("--script", default=str(SCRIPT), help="the trainer")
    add("--out", default="", help="folder of the trials (default: runs/<study>)")
    add("--show", action="store_true", help="only the results so far")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for name, low in (("trials", 1), ("workers", 1), ("nproc", 1), ("grace", 1), ("retries", 0)):
        if getattr(args, name) < low:
            raise ToolError(f"--{name} {getattr(args, name)} must be at least {low}")
    args.study = args.study or Path(args.space).stem
    args.out = args.out or str(Path("runs") / args.study)
    return args


def main(arguments=None) -> int:
    """Entry."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(words)
    if args.worker:
        return worker(args)
    if not args.show:
        check_space(read_space(args.space), args)
        coordinate(args, words)
    print(results(args))
    return 0


if __name__ == "__main__":
    run_cli(main)
