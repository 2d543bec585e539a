"""The long form of the faults: runs that are killed, stopped and resumed, bad inputs, odd fits.

    python tests/faults.py [kills|inputs|fits|resume|all] [--seed N] [--count N] [--jobs N]

kills    a small run is ended at a random moment, by SIGKILL, SIGTERM or SIGINT, alone or as
         two ranks; what it leaves is read, and the command that it gives is followed to the
         score; at last one rank of two is stopped
resume   a run is ended at a random step and resumed: artifact and scores are those of a run
         that was left alone, to the bit
inputs   tests/fault_inputs.py
fits     tests/fault_fits.py

The data are made up, and every folder is removed at the end. Prints a line for every case and
a table at the end; exit status 0 only without violations.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import random
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import ROOT, environment, events, log_of, make_data, settings, strict, summary, tg  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
STEPS = {1: 40, 2: 30}      # of a run, by its ranks: some seconds of training
COUNTS = {"kills": 60, "inputs": 300, "fits": 100, "resume": 3}
PATIENCE = 180              # seconds for a run of ten, on a busy machine
MOST_LOST = 60              # seconds of training that a kill may cost

# The script, with a new average every half second.
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(SCRIPT)!r}
import train_gpt as tg
tg.AverageKeeper.SECONDS = 0.5
code = tg.main([])
sys.stdout.flush()
os._exit(code)
"""


@dataclass
class Case:
    """One run to be ended. place: the event after which that happens, empty: any moment;
    share: of the time to choose from. whom: all processes, the launcher or one rank."""

    number: int
    ranks: int
    signal: signal.Signals
    whom: str
    place: str
    share: float
    changes: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return f"{self.signal.name}, {self.ranks} rank{'s'[:self.ranks - 1]}"


@dataclass
class Outcome:
    """What came of a case. where: what the run was doing; went_on: from what."""

    case: Case
    where: str = ""
    went_on: str = "-"
    faults: list = field(default_factory=list)
    seconds: float = 0.0


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
SIGNALS = (KILL, TERM, KILL, KILL, INT, KILL)
PLACES = ("", "", "rehearsal", "average", "train_end", "artifact", "score_quantized")


def generate(count: int, seed: int) -> list[Case]:
    """`count` cases, two of three by SIGKILL, half of them of two ranks; equal seeds give equal
    cases."""
    rng, cases = random.Random(seed), []
    for number in range(count):
        sent, ranks = SIGNALS[number % 6], 1 + number // 6 % 2
        choices = ("all", "one") if sent == KILL else ("all", "launcher", "one")
        whom = rng.choice(choices) if ranks > 1 else "all"
        changes = {"CHECKPOINT_EVERY_SECONDS": rng.choice((0, 0, 0.3))}
        place, share = rng.choice(PLACES), rng.random()
        cases.append(Case(number, ranks, sent, whom, place, share, changes))
    return cases


class Bench:
    """Where runs are started: their data, a folder for each, programs called `python` and
    `torchrun`."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_data(folder / "data")
        self.driver = folder / "driver.py"
        self.driver.write_text(DRIVER)
        # by ranks: seconds and summary of a run that is left alone
        self.whole: dict[int, tuple[float, dict]] = {}
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name, words in (("python", ()), ("torchrun", LAUNCHER[:2])):
            path = self.programs / name
            path.write_text(f'#!/bin/sh\nexec {" ".join([sys.executable, *words])} "$@"\n')
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def environment(self, name: str, ranks: int, **changes) -> dict:
        """Of a run in a folder of this name."""
        usual = {"ITERATIONS": STEPS[ranks], "TRAIN_LOG_EVERY": 1}
        return environment(self.data, **{**usual, "ARTIFACT_DIR": self.folder / name, **changes})

    def start(self, name: str, ranks: int, program: Path = SCRIPT, **changes) -> Job:
        """Start such a run."""
        launcher = LAUNCHER if ranks > 1 else ()
        words = [sys.executable, *launcher, str(program)]
        return Job(words, self.environment(name, ranks, **changes), self.folder / name)

    def command(self, case: Case, name: str) -> str:
        """How a user would have started a case's run."""
        known = {f.name.upper() for f in tg.fields(tg.Settings)}
        env = self.environment(name, case.ranks, **case.changes)
        words = [f"{k}={shlex.quote(v)}" for k, v in env.items() if k in known]
        launched = "torchrun --standalone --nproc_per_node=2"
        return " ".join([*words, launched if case.ranks > 1 else "python", SCRIPT.name])

    def follow(self, command: str, name: str) -> Job:
        """Start a command as it was printed, in a bare environment."""
        env = {"PATH": f"{self.programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return Job(["bash", "-c", command], env, self.folder / name)

    def left_alone(self, ranks: int) -> None:
        """Measure a run that nothing ends."""
        name, begin = f"whole{ranks}", time.monotonic()
        job = self.start(name, ranks)
        if job.wait(PATIENCE):
            raise RuntimeError(f"a run that is left alone has failed: {job.err[-2000:]}")
        self.whole[ranks] = time.monotonic() - begin, summary(job.folder)


class Job:
    """A command under way, in a session of its own. What it says is in files beside the
    folder of its run."""

    def __init__(self, words: list[str], env: dict, folder: Path):
        self.folder = folder
        self.files = folder.with_suffix(".out"), folder.with_suffix(".err")
        self.begin = time.monotonic()
        with open(self.files[0], "w") as out, open(self.files[1], "w") as err:
            self.process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=out, stderr=err,
                                            stdin=subprocess.DEVNULL, start_new_session=True)

    @property
    def out(self) -> str:
        return self.files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.files[1].read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """The exit status as a shell shows it; what lasts longer is killed, and has status 124."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            send(self.family(), KILL)
            self.process.wait()
            return 124
        return status if status >= 0 else 128 - status

    def runs(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[int]:
        """The command's process and all below it."""
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
        below = collections.defaultdict(list)
        for line in listed.stdout.splitlines():
            pid, parent = map(int, line.split())
            below[parent].append(pid)
        found = [self.process.pid]
        for pid in found:
            found += below[pid]
        return found

    def rank(self, number: int) -> list[int]:
        """The process of one rank, if there is one yet."""
        mark = f"\0RANK={number}\0".encode()
        return [pid for pid in self.family() if mark in content(f"/proc/{pid}/environ")]

    def wait_for_import(self) -> None:
        """Until the script's own first lines were run: before, Python itself answers a signal."""
        while self.runs() and b"/numpy/" not in content(f"/proc/{self.process.pid}/maps"):
            time.sleep(0.02)

    def wait_for(self, event: str) -> None:
        """Until the log tells of an event, or the run ends."""
        while self.runs() and not events(self.folder, event):
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until the log tells of a step, or the run ends."""
        while self.runs() and steps_of(self.folder) < step:
            time.sleep(0.01)

    def wait_until(self, moment: float) -> None:
        """Until so many seconds after the start, or the run's end."""
        while self.runs() and time.monotonic() < self.begin + moment:
            time.sleep(0.01)


def content(path: str) -> bytes:
    """Of a file that may be gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def send(pids: list[int], number: int) -> None:
    """A signal to those of these processes that are there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if tg.process_state(pid)[0] not in ("", "Z", "X")]


def wait_for_end(pids: list[int], seconds: float) -> list[int]:
    """Those of these processes that are still there after so many seconds; they are killed."""
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    late = alive(pids)
    send(late, KILL)
    return late


# --- what a run leaves


def steps_of(folder: Path) -> int:
    """Steps that the log tells of."""
    return max((e["step"] for e in events(folder, "train")), default=0)


def read_file(path: Path) -> None:
    """Read a file as the next run would; whatever it raises is a fault."""
    s = settings()
    if path.name == "metrics.jsonl":
        log_of(path.parent)
    elif path.suffix == ".json":
        strict(path.read_text())
    elif path.name.startswith("resume."):
        tg.unsealed(path, 1 << 30, "a checkpoint")
    elif path.suffix == ".pt":
        tg.read_weights(str(path), tg.GPT(s))
    elif path.suffix == ".ptz":
        tg.read_artifact(s, path.read_bytes(), path.name)


def unreadable(folder: Path) -> list[str]:
    """Files of a run that cannot be read."""
    faults = []
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_dir():
            continue
        try:
            read_file(path)
        except Exception as error:
            faults.append(f"{path.name} cannot be read: {tg.in_a_line(error)}")
    return faults


def leftovers(folder: Path) -> list[str]:
    return [f"{path.name} is left over" for path in folder.rglob(".*") if path.name != ".keep"]


def lost(folder: Path, moment: float) -> list[str]:
    """What is wrong when a training of two steps, ended at this moment, has left no weights
    that are at most MOST_LOST seconds older."""
    ends = [folder / tg.ARTIFACT_NAME, folder / tg.WEIGHTS_NAME]
    if steps_of(folder) < 2 or any(path.exists() for path in ends):
        return []
    average = folder / tg.AVERAGE
    if not average.exists():
        return [f"after {steps_of(folder)} steps there is no average"]
    age = moment - average.stat().st_mtime
    return [f"the average is {age:.0f} s old"] if age > MOST_LOST else []


PROGRESS = {      # the last thing that a log tells of, and what the run does then
    "final": "at its end", "artifact": "in evaluation", "train": "in training",
    "rehearsal": "in training", "start": "in set-up"}


def doing(folder: Path) -> str:
    """How far the log of a run got."""
    logged = {e["event"] for e in log_of(folder)}
    found = [where for event, where in PROGRESS.items() if event in logged]
    where = found[0] if found else "before its log"
    if where == "in training" and (folder / tg.WEIGHTS_NAME).exists():
        where = "in quantising"
    return f"{where}, step {steps_of(folder)}" if where == "in training" else where


# --- one case


def strike(job: Job, case: Case, length: float) -> tuple[list[int], bool]:
    """End a job, of about `length` seconds, as the case says: the processes that it had, and
    whether it had ended before."""
    if case.signal == INT:
        job.wait_for_import()
    if case.place:
        job.wait_for(case.place)
        job.wait_until(time.monotonic() - job.begin + case.share / 2)
    else:
        job.wait_until(case.share * length)
    family = job.family()
    one = job.rank(1)
    whom = {"all": family, "launcher": family[:1], "one": one or family}[case.whom]
    ended = not job.runs()
    send(whom, case.signal)
    return family, ended


def next_command(job: Job, start: str) -> str:
    """The command to go on: the one on the screen, else the last in the log; `start` if there
    is none yet."""
    shown = [line for line in job.err.splitlines() if line.startswith("to go on: ")]
    logged = events(job.folder, "go_on")
    if shown:
        return shown[-1].removeprefix("to go on: ")
    return logged[-1]["command"] if logged else start


def way_of(command: str) -> str:
    """By which file a command goes on, for the table."""
    for name, way in (("EVAL_ONLY_QUANTIZED_PATH=", "artifact"), ("RESUME=1", "checkpoint"),
                      ("average.pt", "average"), ("EVAL_ONLY_PATH=", "weights")):
        if name in command:
            return way
    return "start"


def judge_end(case: Case, job: Job, status: int, ended: bool) -> list[str]:
    """Exit status and last words. ended: before anything was sent."""
    faults, right = [], [0 if ended else 128 + case.signal]
    if doing(job.folder) == "at its end":      # it may have been too late
        right.append(0)
    if case.ranks == 1 and status not in right:
        faults.append(f"exit status {status}, not {right[0]}")
    if case.ranks == 1 and "Traceback" in job.err:
        faults.append("a stack trace on stderr")
    if status == 124:
        faults.append(f"it did not end within {PATIENCE} s")
    return faults


def follow(bench: Bench, name: str, ranks: int, command: str) -> list[str]:
    """Go on by the command; what is wrong with that."""
    job = bench.follow(command, name)
    status, faults = job.wait(PATIENCE), []
    if status:
        return [f"status {status} of {command}: {job.err.strip()[-600:]}"]
    if not any(line.startswith("final val_bpb=") for line in job.out.splitlines()):
        faults.append(f"no final line of {command}")
    faults += unreadable(job.folder) + leftovers(job.folder)
    score = summary(job.folder).get("val_bpb")
    right = bench.whole[ranks][1]["val_bpb"]
    if not score or score != right and way_of(command) in ("artifact", "checkpoint", "start"):
        faults.append(f"the score is {score}, of the run left alone {right}")
    return faults


def record(bench: Bench, name: str, scored_before: bool) -> list[str]:
    """What is wrong with the record that a folder makes."""
    out = bench.folder / f"{name}.records"
    words = [str(ROOT / "tools" / "make_record.py"), str(bench.folder / name), "--name", "again",
             "--track", "non_record", "--date", "2026-01-01", "--out", str(out),
             "--skip-run", "a test"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [f"make_record refuses: {done.stderr.strip()[-300:]}"]
    readme = (out / "track_non_record_16mb" / "2026-01-01_again" / "README.md").read_text()
    said = "the evaluation was run 2 times" in readme
    if said != scored_before:
        return [f"the record says {said} of an evaluation before, there was {scored_before}"]
    return []


def kill(bench: Bench, case: Case) -> Outcome:
    """Start a run, end it, and judge what it leaves and how it goes on."""
    name, result = f"kill{case.number}", Outcome(case)
    program = bench.driver if case.signal == KILL else SCRIPT
    job = bench.start(name, case.ranks, program, **case.changes)
    family, ended = strike(job, case, bench.whole[case.ranks][0])
    moment = time.time()
    status = job.wait(PATIENCE)
    if late := wait_for_end(family, 60):
        result.faults.append(f"{len(late)} processes lived on for a minute")
    result.where = doing(job.folder)
    result.faults += judge_end(case, job, status, ended)
    result.faults += unreadable(job.folder) + lost(job.folder, moment)
    if result.where != "at its end":
        command = next_command(job, bench.command(case, name))
        result.went_on = way_of(command)
        scored = result.went_on == "artifact" and "evaluation_runs" in summary(job.folder)
        result.faults += follow(bench, name, case.ranks, command)
        if result.went_on == "artifact" and not result.faults:
            result.faults += record(bench, name, scored)
    return result


def stop(bench: Bench, case: Case) -> Outcome:
    """One rank of two is stopped in training: it is named, the job ends within a minute, and
    goes on."""
    name, result = f"stop{case.number}", Outcome(case)
    job = bench.start(name, 2, bench.driver)
    job.wait_for("average")
    family, one = job.family(), job.rank(1)
    result.where = doing(job.folder)
    send(one, signal.SIGSTOP)
    begin = time.monotonic()
    status = job.wait(PATIENCE)
    late = wait_for_end(family, 5)
    if time.monotonic() - begin > 60 or late or not status:
        seconds = time.monotonic() - begin
        result.faults.append(f"status {status} after {seconds:.0f} s, {len(late)} left")
    named = f"error: rank 1 ({platform.node()}, pid {one[0]}) has made no progress"
    if named not in job.err:
        result.faults.append("the stopped rank is not named")
    command = next_command(job, "")
    result.went_on = way_of(command)
    result.faults += unreadable(job.folder) + follow(bench, name, 2, command)
    return result


# --- to the bit


SAME = ("artifact_digest", "val_bpb", "sliding_val_bpb", "quantized_val_bpb",
        "prequant_val_bpb", "steps")


def resume(bench: Bench, case: Case) -> Outcome:
    """A run is ended at a step and resumed: artifact and score are those of the run left alone."""
    name, result = f"resume{case.number}", Outcome(case)
    job = bench.start(name, case.ranks, CHECKPOINT_EVERY_SECONDS=1e-6)
    step = 3 + int(case.share * (STEPS[case.ranks] - 8))
    job.wait_for_step(step)
    family = job.family()
    send(family if case.signal == KILL else family[:1], case.signal)
    job.wait(PATIENCE)
    wait_for_end(family, 60)
    result.where = doing(job.folder)
    again = bench.start(name, case.ranks, CHECKPOINT_EVERY_SECONDS=1e-6, RESUME=1)
    if status := again.wait(PATIENCE):
        result.faults.append(f"status {status}: {again.err.strip()[-600:]}")
        return result
    result.went_on = f"step {events(job.folder, 'resume')[0]['step']}"
    here, there = summary(job.folder), bench.whole[case.ranks][1]
    for key in SAME:
        if here[key] is None or here[key] != there[key]:
            result.faults.append(f"{key}={here[key]}, of the run left alone {there[key]}")
    ours, right = (bench.folder / n / tg.ARTIFACT_NAME for n in (name, f"whole{case.ranks}"))
    if ours.read_bytes() != right.read_bytes():
        result.faults.append("the artifact is another")
    return result


def resumed_cases(count: int, seed: int) -> list[Case]:
    """`count` random steps for each signal and number of ranks."""
    rng, cases = random.Random(seed), []
    for sent in (KILL, TERM):
        for ranks in (1, 2):
            for _ in range(count):
                cases.append(Case(len(cases), ranks, sent, "all", "train", rng.random()))
    return cases


# --- all of them


def tried(act, bench: Bench, case: Case) -> Outcome:
    """What came of a case, told in a line at once."""
    begin = time.monotonic()
    try:
        result = act(bench, case)
    except Exception:
        result = Outcome(case, faults=[traceback.format_exc()])
    result.seconds = time.monotonic() - begin
    to = f" to {case.whom}" if case.ranks > 1 else ""
    verdict = "VIOLATION" if result.faults else "ok"
    print(f"{verdict:9} {act.__name__} {case.number}: {case.kind}{to} {result.where}; went on from "
          f"{result.went_on} ({result.seconds:.1f} s)", flush=True)
    for fault in result.faults:
        print(f"          {fault}", flush=True)
    return result


def table(results: list[tuple[str, Outcome]]) -> None:
    """Counts and seconds by kind."""
    groups = collections.defaultdict(list)
    for act, result in results:
        groups[f"{act}: {result.case.kind}"].append(result)
        groups[f"{act}: ended {result.where.split(',')[0]}"].append(result)
        groups[f"{act}: went on from {result.went_on.split()[0]}"].append(result)
    print(f"\n{'':40} cases  faults  seconds")
    for kind, rows in sorted(groups.items()):
        faults = sum(bool(row.faults) for row in rows)
        print(f"{kind:40} {len(rows):5}  {faults:6}  {sum(row.seconds for row in rows):7.1f}")


def try_runs(kind: str, count: int, seed: int, jobs: int) -> list[tuple[str, Outcome]]:
    """The cases of one kind, `jobs` at a time."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for ranks in (1, 2):
            bench.left_alone(ranks)
        acts = [(resume, case) for case in resumed_cases(count, seed)]
        if kind == "kills":
            acts = [(kill, case) for case in generate(count, seed)]
            acts.append((stop, Case(count, 2, signal.SIGSTOP, "one", "average", 0.0)))
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(lambda x: tried(x[0], bench, x[1]), acts))
        return [(act.__name__, result) for (act, _), result in zip(acts, results, strict=True)]


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", nargs="?", choices=(*COUNTS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help=f"cases, by default {COUNTS}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    args = parser.parse_args(argv)
    results, faults = [], 0
    for kind in COUNTS if args.kind == "all" else (args.kind,):
        count = args.count or COUNTS[kind]
        if kind in ("inputs", "fits"):
            program = Path(__file__).with_name(f"fault_{kind}.py")
            words = [sys.executable, str(program), str(count), str(args.seed)]
            faults += bool(subprocess.call(words))
        else:
            results += try_runs(kind, count, args.seed, args.jobs)
    if results:
        table(results)
    faults += sum(bool(result.faults) for _, result in results)
    print(f"{faults} violations")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
