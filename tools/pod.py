"""From a bare rented machine to three seeds and a packed record, by one command.

    ./run.sh pod --name my_idea --author "A. Name" --github name    # a pod with 8 x H100
    ./run.sh pod --name my_idea --plan        # what it would take; nothing is begun
    ./run.sh pod --rehearse                   # the same way, tiny, on a CPU

Steps: doctor, fetch, check, a run per seed, compare, report, record, archive. Before
each stands what it will take; at the first that fails the pod stops and says what to do.
However it was ended, the same command goes on: finished steps are not done again, and a
seed that ended early goes on by the command which its run has logged. --out then holds
one archive to copy home: record folder, logs, summaries, artifacts, report; no shards.

Settings are taken from the environment, as everywhere, and must stay as they were.
Exit status: 0 when the archive is complete, 1 when a step failed, 2 on a mistake, 130
when it was interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.shards import MANIFEST, TRAIN, DataError, read_manifest
from data.variants import by_name
from tools import compare, doctor, make_record
from tools.common import (
    ARTIFACT,
    ROOT,
    SCRIPT,
    Seeds,
    ToolError,
    command_line,
    error_line,
    is_finished,
    json_object,
    load_run,
    read_events,
    relative,
    run_cli,
    table,
    write_atomic,
)
from tools.sweep import die_with_parent

STATE = "pod.json"
PROGRAMS = {  # what the steps start
    "doctor": ROOT / "tools" / "doctor.py",
    "fetch": ROOT / "data" / "fetch.py",
    "demo": ROOT / "data" / "demo.py",
    "check": ROOT / "data" / "check.py",
    "trainer": SCRIPT,
    "compare": ROOT / "tools" / "compare.py",
    "report": ROOT / "tools" / "report.py",
    "record": ROOT / "tools" / "make_record.py",
}
DEFAULTS = {
    "name": "",
    "seeds": [42, 314, 999],
    "track": "record",
    "train_shards": 80,
    "nproc": 0,
    "date": "",
    "author": "",
    "github": "",
    "blurb": "",
    "lineage": "",
    "vs": "",
    "price": 22.0,
}
FIXED = ("name", "seeds", "track", "train_shards", "nproc")  # of a pod that has begun
OF_ONE_RUN = (  # settings that the pod gives itself, or that would leave a stage out
    "SEED", "RUN_ID", "ARTIFACT_DIR", "RESUME", "EVAL_ONLY_PATH", "EVAL_ONLY_QUANTIZED_PATH",
    "QUANTIZE_ONLY", "PREQUANT_ONLY",
)
PACKAGES = {"scipy": "compare", "plotly": "report", "jinja2": "report"}  # and which step needs it
MAY_BE_SKIPPED = ("doctor", "check", "compare", "report")
AFTER_SEEDS = ("compare", "report", "record", "archive")
OF_A_SEED = ("train.log", "metrics.jsonl", "summary.json", ARTIFACT)  # in the archive
PATIENCE_SECONDS = 120  # for a run that was asked to end, and for one of an ended pod
LOOK_SECONDS = 0.1
REHEARSAL = {  # on top of configs/demo.env: every stage, little of it
    "NUM_LAYERS": 4,
    "MODEL_DIM": 64,
    "NUM_HEADS": 2,
    "NUM_LOOPS": 1,
    "LOOP_START": 1,
    "LOOP_END": 2,
    "PARALLEL_START_LAYER": 3,
    "XSA_LAST_N": 4,
    "MAX_WALLCLOCK_SECONDS": 0,
    "ITERATIONS": 4,
    "TRAIN_BATCH_TOKENS": 1024,
    "GPTQ_CALIBRATION_BATCHES": 1,
    "EVAL_SEQ_LEN": 256,
    "EVAL_STRIDE": 256,
    "TTT_EVAL_SEQ_LEN": 512,
    "TTT_CHUNK_SIZE": 512,
    "TTT_SUFFIX": 0,
    "TTT_LORA_RANK": 4,
    "TTT_LORA_ALPHA": 8,
    "COMPILE": 0,
    "CODE_FORM": "readable",
}

# What the estimates rest on. Nothing here was timed on eight GPUs.
SHARD_GB = 100e6 * 2 / 1e9  # 100 M tokens of two bytes (data/README.md)
VALIDATION_GB = 47_853_344 * 4 / 1e9  # a token and its count of bytes, two bytes each
NETWORK_GB_PER_SECOND = 0.1  # assumed
DISK_GB_PER_SECOND = 0.5  # assumed
SEARCH_TOKENS_PER_SECOND = 170e6  # of the search for overlap, one core (data/README.md)
START_MINUTES = 5  # assumed: checks, compilation and rehearsal of a run at full size
SPARE_GB = 4  # weights, artifacts, averages and logs of the runs, with room


class Failed(Exception):
    """A step has failed. Its text says how; `remedy` says what to do."""

    def __init__(self, found: str, remedy: str):
        super().__init__(found)
        self.remedy = remedy


@dataclass(frozen=True)
class Estimate:
    """What a step will take, and where that is from."""

    minutes: float | None
    source: str
    gigabytes: float = 0.0

    def money(self, price: float) -> str:
        """Dollars of the minutes at `price` dollars an hour."""
        return "?" if self.minutes is None else f"${self.minutes / 60 * price:.2f}"

    def time(self) -> str:
        """The minutes, as they are shown."""
        if self.minutes is None:
            return "an unknown time"
        return "< 1 min" if self.minutes < 1 else f"about {self.minutes:.0f} min"


@dataclass(frozen=True)
class Step:
    """One stage of the way: what it will take, and what it does."""

    name: str
    estimate: Callable[[], Estimate]
    run: Callable[[], str]  # returns what to say; raises Failed


def seconds_text(seconds: float) -> str:
    """Seconds, as they are shown."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


# --- children


class Children:
    """Starts the programs of the steps, one at a time, and ends them with the pod.

    A child holds the lock `running` as long as it lives: a pod that was killed leaves a
    run which is still saving its weights, and the next pod waits for that.
    """

    def __init__(self, out: Path):
        self.path = out / ".running"

    @contextmanager
    def held(self):
        """The lock's file, free of any child of an earlier pod. Failed when it does not
        come free."""
        with open(self.path, "w") as lock:
            end = time.monotonic() + PATIENCE_SECONDS
            if not take(lock):
                echo(b"waiting for what an earlier, killed pod has left running ...\n", True)
            while not take(lock):
                if time.monotonic() > end:
                    raise Failed("a program of an earlier, killed pod still runs",
                                 f"see what holds {self.path} (fuser), end it, start again")
                time.sleep(LOOK_SECONDS)
            yield lock

    def run(self, words: list, log: Path, env: dict, show: bool = True) -> int:
        """Run a command to its end; what it says is added to `log`, and shown. Returns
        its exit status."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with self.held() as lock, open(log, "ab") as out, open(log, "rb") as back:
            back.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                list(map(str, words)), env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),), preexec_fn=die_with_parent)
            try:
                while process.poll() is None:
                    time.sleep(LOOK_SECONDS)
                    echo(back.read(), show)
            except KeyboardInterrupt:
                self.end(process)
                raise
            finally:
                echo(back.read(), show)
        return process.returncode

    def end(self, process: subprocess.Popen) -> None:
        """Ask a child to end, and wait until it has saved what it has; insist when asked
        again or when it takes too long."""
        echo(b"\nending the step under way, which saves what it has ...\n", True)
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            process.terminate()
            process.wait(PATIENCE_SECONDS)
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def take(lock) -> bool:
    """Lock an open file, unless somebody else has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def echo(said: bytes, show: bool) -> None:
    """Bytes to the screen, if it still is there: a dropped terminal ends nothing."""
    if not said or not show:
        return
    with suppress(OSError, ValueError):
        sys.stdout.write(said.decode(errors="replace"))
        sys.stdout.flush()


# --- the pod and what is known of it


class Pod:
    """One way from a machine to an archive: options, settings, and the state on disk."""

    def __init__(self, out: Path, options: dict, rehearse: bool, skip: list[str]):
        self.out, self.options, self.rehearse, self.skip = out, options, rehearse, skip
        self.children = Children(out)
        self.env = {**os.environ, **(rehearsal_settings() if rehearse else own_paths())}
        self.settings = read_settings(self.env)
        self.state = {"options": options, "rehearse": rehearse, "steps": {}}
        self.gpus = doctor.gpu_rows()
        self.nproc = options["nproc"] or (1 if rehearse else max(len(self.gpus), 1))

    # --- files

    def place(self, path: Path) -> str:
        """A path for a child, which runs in the repository."""
        path = path.resolve()
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)

    def log(self, step: str) -> Path:
        """Where a step's words are kept."""
        return self.out / "logs" / f"{step.replace(' ', '_')}.log"

    def seed_folder(self, seed: int) -> Path:
        """Where a seed's run writes."""
        return self.out / f"seed_{seed}"

    def seed_folders(self) -> list[str]:
        """The folders of all seeds, for a child."""
        return [self.place(self.seed_folder(seed)) for seed in self.options["seeds"]]

    @property
    def archive(self) -> Path:
        return self.out / f"{self.options['name']}.tar.gz"

    @property
    def shards(self) -> Path:
        """The folder of the shards: the caller's own, or where they are fetched to."""
        return self.own_shards or ROOT / self.settings.data_dir / self.variant

    @property
    def own_shards(self) -> Path | None:
        """Shards that are not fetched: of DATA_PATH, or in the field's place for them."""
        if self.rehearse:
            return None
        place = ROOT / self.settings.shards
        given = bool(self.settings.data_path)
        return place if given or place.is_dir() and place.name != self.variant else None

    @property
    def variant(self) -> str:
        """The published data that the settings need; of a rehearsal the demo's."""
        if self.rehearse:
            return "demo"
        return f"sp{self.settings.vocab_size}" + "_caseops" * bool(self.settings.caseops_enabled)

    # --- the state

    def load(self) -> None:
        """Take up the state on disk. ToolError where the pod began otherwise."""
        known = read_state(self.out)
        now = self.identity()
        if known.get("identity"):
            for name, was in known["identity"].items():
                if now.get(name) != was:
                    raise ToolError(
                        f"{self.out} began with {name} {shown(was)}, now it is "
                        f"{shown(now.get(name))}: make it as it was, or choose another --out")
            self.state = known
        self.state.update(options=self.options, identity=now)
        self.save()

    def identity(self) -> dict:
        """What must stay as it was: seeds come from one script and one configuration."""
        changed = {k: v for k, v in self.settings.as_env().items() if k in self.settings.changed()}
        script = hashlib.sha256(PROGRAMS["trainer"].read_bytes()).hexdigest()[:16]
        return {"script sha256": script, "settings": json.loads(json.dumps(changed)),
                "rehearsal": self.rehearse}

    def save(self) -> None:
        """Write the state."""
        write_atomic(self.out / STATE, json.dumps(self.state, indent=1) + "\n")

    def is_done(self, step: str) -> bool:
        """The step was finished, and what it made has not been deleted since."""
        if "seconds" not in self.state["steps"].get(step, {}):
            return False
        if step == "doctor":
            return self.state["steps"][step].get("machine") == machine()
        if step == "fetch":
            return fetched(self)
        return not step.startswith("seed ") or finished(self.seed_folder(int(step.split()[1])))

    def forget(self, steps: tuple) -> None:
        """Steps that must be done again."""
        for step in steps:
            self.state["steps"].pop(step, None)

    def seconds_of(self, step: str) -> float:
        """What a finished step took when it was last run to its end."""
        return self.state["steps"][step]["seconds"]

    def note(self, step: str, **facts) -> None:
        """Add to what is known of a step."""
        self.state["steps"].setdefault(step, {}).update(facts)
        self.save()

    def spend(self, step: str, seconds: float) -> None:
        """Book the time of a try, whatever came of it."""
        spent = self.state.setdefault("spent", {})
        spent[step] = round(spent.get(step, 0.0) + seconds, 1)
        self.save()

    def say(self, text: str) -> None:
        """A line for the screen and for logs/pod.log."""
        echo(f"{text}\n".encode(), True)
        with open(self.log("pod"), "a") as log:
            log.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    # --- what the steps share

    def call(self, step: str, words: list, show: bool = True, fine=(0,), **env) -> int:
        """Run one of PROGRAMS, the first word, by this Python. Failed unless its status
        is one of `fine`."""
        command = [sys.executable, PROGRAMS[words[0]], *words[1:]]
        log = self.log(step)
        status = self.children.run(command, log, {**self.env, **env}, show)
        if status not in fine:
            without = f", or add --skip {step}" if step in MAY_BE_SKIPPED else ""
            raise Failed(f"exit status {status}: {error_line(log.read_text(errors='replace'))}",
                         f"mend that (all of it: {log}){without}; the same command then goes on")
        return status


def read_state(out: Path) -> dict:
    """pod.json of a folder; empty where there is none. ToolError where it is damaged."""
    try:
        state = json_object((out / STATE).read_bytes())
    except FileNotFoundError:
        return {}
    if state is None or "steps" not in state:
        raise ToolError(f"{out / STATE} is damaged: delete it; finished seeds are taken up again")
    return state


def shown(value) -> str:
    """A value of the state, in a message."""
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "(all defaults)"
    return str(value)


def own_paths() -> dict[str, str]:
    """The caller's settings of places, whole: the children run in the repository."""
    names = [name for name in ("DATA_PATH", "TOKENIZER_PATH", "DATA_DIR") if os.environ.get(name)]
    return {name: str(Path(os.environ[name]).resolve()) for name in names}


def rehearsal_settings() -> dict[str, str]:
    """configs/demo.env, made smaller still."""
    lines = (ROOT / "configs" / "demo.env").read_text().splitlines()
    demo = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {**demo, **{name: str(value) for name, value in REHEARSAL.items()}}


def read_settings(env: dict):
    """The trainer's Settings of an environment; ToolError as the trainer would refuse."""
    trainer = doctor.trainer()
    for name in OF_ONE_RUN:
        if env.get(name):
            raise ToolError(f"{name}={env[name]} is set, which the pod sets for each run: unset {name}")
    try:
        return trainer.Settings.from_env(env)
    except trainer.UserError as error:
        raise ToolError(str(error)) from None


# --- the steps


def machine() -> str:
    """What tells this machine from another: a pod may go on elsewhere, from its disk."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def bad(what: str, found: str, remedy: str) -> doctor.Finding:
    """A finding that stops the pod."""
    return doctor.Finding(doctor.FAIL, what, found, remedy)


def machine_findings(pod: Pod) -> list[doctor.Finding]:
    """What stands against beginning at all, before anything is paid for."""
    out = []
    for package, step in PACKAGES.items():
        if step not in pod.skip and importlib.util.find_spec(package) is None:
            out.append(bad(package, f"not installed; {step} needs it",
                           "pip install -r tools/requirements.txt"))
    needed = SPARE_GB * (not pod.rehearse)
    if not fetched(pod):
        needed += gigabytes(pod)
        if not pod.rehearse and importlib.util.find_spec("huggingface_hub") is None:
            out.append(bad("huggingface_hub", "not installed; fetch needs it",
                           "pip install -r data/requirements.txt"))
    free = shutil.disk_usage(pod.out).free / 1e9
    if free < needed:
        out.append(bad("disk", f"{free:.1f} GB are free, {needed:.1f} are needed",
                       "free some, rent a larger disk, or --train-shards fewer"))
    if pod.options["track"] == "record":
        out += track_findings(pod)
    return out


def track_findings(pod: Pod) -> list[doctor.Finding]:
    """What the record track would refuse at the end."""
    other = "or --track non_record, which takes any machine and any budget"
    out = []
    names = [row["name"] for row in pod.gpus]
    if len(names) != 8 or pod.nproc != 8 or not all("H100" in name for name in names):
        found = f"{pod.nproc} processes on {len(names)} GPUs ({', '.join(sorted(set(names))) or 'none'})"
        out.append(bad("track", found, f"rent 8 x H100, {other}"))
    for name in ("MAX_WALLCLOCK_SECONDS", "EVAL_MAX_SECONDS"):
        value = getattr(pod.settings, name.lower())
        if not 0 < value <= make_record.BUDGET_SECONDS:
            remedy = f"set it to at most {make_record.BUDGET_SECONDS:g}, {other}"
            out.append(bad("track", f"{name}={value:g}", remedy))
    count, needed = len(pod.options["seeds"]), make_record.SEEDS_NEEDED
    if count < needed:
        out.append(bad("track", f"{count} seeds", f"give at least {needed}, {other}"))
    return out


def run_doctor(pod: Pod) -> str:
    """The doctor's checks, without those of data that are not there yet."""
    log = pod.log("doctor")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    words = ["doctor", "--json", "--no-data", *["--quick"] * pod.rehearse]
    pod.call("doctor", words, show=False, fine=(0, 1))
    answers = [json_object(line) for line in log.read_bytes().splitlines() if line.startswith(b"{")]
    rows = (answers or [{}])[-1].get("findings", [])
    findings = [doctor.Finding(**row) for row in rows] + machine_findings(pod)
    for finding in findings:
        pod.say(doctor.shown(finding, False))
    for finding in findings:
        if finding.state == doctor.FAIL:
            raise Failed(f"{finding.what}: {finding.found}", finding.remedy)
    pod.note("doctor", machine=machine())
    return f"{len(findings)} findings, none of them FAIL"


def fetched(pod: Pod) -> bool:
    """The shards are there already, whole: fetch.py writes the manifest last."""
    if pod.own_shards:
        return True  # the check judges them
    try:
        manifest = read_manifest(pod.shards) or {"files": []}
    except DataError:
        return False
    count = sum(f["kind"] == TRAIN for f in manifest["files"])
    return count >= (1 if pod.rehearse else pod.options["train_shards"])


def run_fetch(pod: Pod) -> str:
    """The published shards, or the demo's."""
    if pod.rehearse:
        pod.call("fetch", ["demo"])
        return f"the demo's data are in {relative(pod.shards)}"
    if fetched(pod):
        return f"{relative(pod.shards)} is taken as it is"
    if not by_name(pod.variant):
        raise Failed(f"there are no published shards for VOCAB_SIZE={pod.settings.vocab_size} "
                     f"CASEOPS_ENABLED={int(pod.settings.caseops_enabled)}",
                     "set DATA_PATH and TOKENIZER_PATH to your own (data/README.md)")
    pod.call("fetch", ["fetch", pod.variant, "--train-shards", pod.options["train_shards"],
                       "--out", pod.place(pod.shards)])
    return f"shards in {relative(pod.shards)}"


def run_check(pod: Pod) -> str:
    """Every token once, then all that the trainer can check before its first step."""
    env = {"DATA_CHECK": "full"}
    if (pod.shards / MANIFEST).is_file():
        pod.call("check", ["check", pod.place(pod.shards)])
        env = {}
    pod.call("check", ["trainer", "--check"], **env)
    return "data and settings are good"


def run_compare(pod: Pod) -> str:
    """Whether it is a win, into compare.txt."""
    other = others_of(pod)
    if not other or len(pod.options["seeds"]) < 2:
        return "left out: it needs two seeds, and --vs with something to compare them with"
    log = pod.log("compare")
    log.unlink(missing_ok=True)
    other += ["--unlike"] * pod.rehearse
    pod.call("compare", ["compare", *pod.seed_folders(), "--vs", *other], fine=(0, 1))
    said = log.read_text()
    write_atomic(pod.out / "compare.txt", said)
    first = said.splitlines()[0] if said else "nothing said"
    return f"{first} (as expected: a few steps beside the demo's 200)" if pod.rehearse else first


def others_of(pod: Pod) -> list[str]:
    """What the seeds are compared with: --vs, else the record; none elsewhere."""
    if pod.rehearse:
        return [demo_record()]
    usual = "pr2135" if pod.options["track"] == "record" else ""
    return shlex.split(pod.options["vs"] or usual)


def demo_record() -> str:
    """The record folder of the demo, which the rehearsal is put beside."""
    folders = sorted((ROOT / "records" / make_record.TRACKS["non_record"]).glob("*demo*"))
    return folders[-1].relative_to(ROOT).as_posix() if folders else "pr2135"


def run_report(pod: Pod) -> str:
    """The page about all seeds."""
    page = pod.out / "report.html"
    pod.call("report", ["report", *pod.seed_folders(), "--out", pod.place(page)])
    return f"{page} opens offline"


def run_record(pod: Pod) -> str:
    """The record folder; its script scores the best artifact again, inside it."""
    told = [f"--{key}={pod.options[key]}" for key in ("author", "github", "blurb", "lineage")
            if pod.options[key]]
    words = ["record", *pod.seed_folders(), "--name", pod.options["name"], "--track", pod.options["track"],
             "--date", pod.options["date"], "--out", pod.place(pod.out / "records"), "--force", *told]
    pod.call("record", words)
    return f"record folder in {pod.out / 'records'}"


# --- a seed


def train_words(pod: Pod) -> list[str]:
    """What starts the trainer on all GPUs."""
    return [*launcher(pod.nproc), pod.place(PROGRAMS["trainer"])]


def launcher(nproc: int) -> list[str]:
    """This Python's torchrun; one process needs none, whose trace would bury what the script says."""
    if nproc == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]


def go_on_command(folder: Path, log: Path) -> str:
    """The last command to go on that a run has logged or printed; empty without one."""
    with suppress(ToolError):
        events = read_events(folder / "metrics.jsonl")
        logged = [e.get("command", "") for e in events if e.get("event") == "go_on"]
        if logged:
            return logged[-1]
    with suppress(OSError):
        printed = re.findall(r"^to go on: (.+)$", log.read_text(errors="replace"), re.M)
        return printed[-1] if printed else ""
    return ""


def parse_command(command: str) -> tuple[dict[str, str], list[str]]:
    """A command to go on -> its settings, and its words with this Python's programs."""
    words = shlex.split(command)
    settings = {}
    while words and re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    name = re.sub(r"^python[\d.]*$", "python", Path(words[0]).name) if words else ""
    if name not in programs or "…" in words:
        raise Failed(f"its command to go on cannot be started here: {command}",
                     "give it by hand, in the repository; then the same pod command goes on")
    return settings, [*programs[name], *words[1:]]


def way_on(settings: dict[str, str], folder: Path) -> str:
    """By what a run goes on, in words; empty when it begins anew."""
    anew = f"to train it anew instead: delete {folder}"
    if settings.get("EVAL_ONLY_QUANTIZED_PATH"):
        return "goes on: scores the artifact that it has packed"
    if settings.get("RESUME"):
        return "goes on from its newest checkpoint"
    if settings.get("EVAL_ONLY_PATH", "").endswith("average.pt"):
        return f"goes on from the last average of its weights: its training stays short; {anew}"
    if settings.get("EVAL_ONLY_PATH"):
        return "goes on: quantises the weights that it has trained"
    return ""


def finished(folder: Path) -> bool:
    """A run came to its final line there."""
    with suppress(ToolError):
        return is_finished(load_run(folder, finished=False))
    return False


def run_seed(pod: Pod, seed: int) -> str:
    """One run of the trainer, begun or gone on with; refused when no record takes it."""
    folder, step = pod.seed_folder(seed), f"seed {seed}"
    log = pod.log(step)
    whole = False
    if not finished(folder):
        whole = True
        settings, words = {"SEED": str(seed), "ARTIFACT_DIR": pod.place(folder)}, train_words(pod)
        if command := go_on_command(folder, log):
            settings, words = parse_command(command)
            if way := way_on(settings, folder):
                whole = False
                pod.say(f"{step} ended early and {way}")
        status = pod.children.run(words, log, {**pod.env, **settings})
        if not finished(folder):
            said = error_line(log.read_text(errors="replace"))
            raise Failed(f"exit status {status}: {said}",
                         "mend that; the same command then goes on with what the run has kept "
                         f"(or delete {folder} to train this seed anew)")
    run = load_run(folder)
    try:
        make_record.check_files(run)
        make_record.check_coverage(run)
        if pod.options["track"] == "record":
            make_record.check_record_run(run)
    except ToolError as error:
        raise Failed(f"no record would take it: {error}",
                     f"no further seed is paid for; mend the cause and delete {folder}, "
                     "or begin another pod with --track non_record") from None
    pod.note(step, whole=whole)  # its time tells what the next seed will take
    s = run.summary
    return f"{s['val_bpb']:.6f} BPB, {s['artifact_bytes']:,} bytes of artifact"


# --- the archive


def archive_files(out: Path) -> list[Path]:
    """What is copied home, of what is there."""
    names = [STATE, "compare.txt", "report.html"]
    found = [out / name for name in names]
    for folder in sorted(out.glob("seed_*")):
        found += [folder / name for name in OF_A_SEED]
    for folder in ("logs", "records"):
        found += sorted((out / folder).rglob("*"))
    return [path for path in found if path.is_file()]


def write_archive(pod: Pod) -> str:
    """The archive, whole or not at all."""
    temporary = pod.archive.with_name(f".{pod.archive.name}.part")
    try:
        with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
            for path in archive_files(pod.out):
                tar.add(path, arcname=f"{pod.options['name']}/{path.relative_to(pod.out).as_posix()}")
        os.replace(temporary, pod.archive)
    finally:
        temporary.unlink(missing_ok=True)
    size = pod.archive.stat().st_size / 1e6
    return (f"{pod.archive} ({size:.1f} MB) has record folder, logs, summaries, artifacts "
            "and report; shards and unpacked weights stay here")


# --- estimates


def gigabytes(pod: Pod) -> float:
    """Size of the shards, by count; 0 for the demo's."""
    return 0.0 if pod.rehearse else pod.options["train_shards"] * SHARD_GB + VALIDATION_GB


def estimate_fetch(pod: Pod) -> Estimate:
    if fetched(pod):
        return Estimate(0.0, "the shards are there")
    if pod.rehearse:
        return Estimate(0.5, "data/demo.py: ten seconds on two CPU cores")
    size = gigabytes(pod)
    source = f"GB: tokens x 2 bytes; minutes: {NETWORK_GB_PER_SECOND:g} GB/s, assumed"
    return Estimate(size / NETWORK_GB_PER_SECOND / 60, source, size)


def estimate_check(pod: Pod) -> Estimate:
    if pod.rehearse:
        return Estimate(0.5, "seen on two CPU cores")
    tokens = pod.options["train_shards"] * 100e6
    seconds = gigabytes(pod) / DISK_GB_PER_SECOND + tokens / SEARCH_TOKENS_PER_SECOND
    source = (f"170 M tokens/s (data/README.md); assumed: {DISK_GB_PER_SECOND:g} GB/s of disk, "
              "1 min to start")
    return Estimate(seconds / 60 + 1, source)


def estimate_seed(pod: Pod) -> Estimate:
    """As the last finished seed took, else the two budgets and an assumed start."""
    names = [f"seed {seed}" for seed in pod.options["seeds"]]
    done = [name for name in names if pod.is_done(name) and pod.state["steps"][name].get("whole")]
    if done:
        return Estimate(pod.seconds_of(done[-1]) / 60, f"as {done[-1]} took")
    if pod.rehearse:
        return Estimate(1.0, "seen on two CPU cores")
    budgets = pod.settings.max_wallclock_seconds, pod.settings.eval_max_seconds
    if not all(budgets):
        return Estimate(None, "no time budget is set")
    source = f"at most both budgets; {START_MINUTES} min to start, assumed: never timed on 8 GPUs"
    return Estimate(sum(budgets) / 60 + START_MINUTES, source)


def estimate_record(pod: Pod) -> Estimate:
    if pod.rehearse:
        return Estimate(1.0, "seen on two CPU cores")
    if not pod.settings.eval_max_seconds:
        return Estimate(None, "no time budget is set")
    source = f"one evaluation at most; {START_MINUTES} min to start, assumed"
    return Estimate(pod.settings.eval_max_seconds / 60 + START_MINUTES, source)


def steps_of(pod: Pod) -> list[Step]:
    """The whole way, in order, without what is skipped."""

    def assumed(minutes: float) -> Callable[[], Estimate]:
        return lambda: Estimate(minutes, "assumed")

    def of_seed(seed: int) -> Step:
        return Step(f"seed {seed}", lambda: estimate_seed(pod), lambda: run_seed(pod, seed))

    steps = [
        Step("doctor", assumed(2), lambda: run_doctor(pod)),
        Step("fetch", lambda: estimate_fetch(pod), lambda: run_fetch(pod)),
        Step("check", lambda: estimate_check(pod), lambda: run_check(pod)),
        *map(of_seed, pod.options["seeds"]),
        Step("compare", assumed(0.5), lambda: run_compare(pod)),
        Step("report", assumed(0.5), lambda: run_report(pod)),
        Step("record", lambda: estimate_record(pod), lambda: run_record(pod)),
        Step("archive", assumed(0.5), lambda: write_archive(pod)),
    ]
    return [step for step in steps if step.name not in pod.skip]


def plan_text(pod: Pod, steps: list[Step]) -> str:
    """What every step will take, or has taken, and the sum of what is left."""
    price = pod.options["price"]
    rows, minutes = [], 0.0
    for number, step in enumerate(steps, 1):
        if pod.is_done(step.name):
            took = seconds_text(pod.seconds_of(step.name))
            rows.append([number, step.name, "", "done", "", f"took {took}"])
            continue
        e = step.estimate()
        minutes += e.minutes or 0.0
        size = f"{e.gigabytes:.1f}" if e.gigabytes else ""
        rows.append([number, step.name, size, e.time(), e.money(price), e.source])
    head = ["", "step", "GB", "takes", f"at ${price:g}/h", "where the figure is from"]
    left = f"left: about {minutes:.0f} min, ${minutes / 60 * price:.2f}: an estimate, not measured"
    return f"{table(head, rows)}\n{left}"


# --- all of it


def outcome(step: Step) -> str:
    """What a step has to say at its end; Failed, whatever went wrong in it."""
    try:
        return step.run()
    except ToolError as error:
        raise Failed(str(error), "the same command then goes on") from None
    except OSError as error:
        raise Failed(f"{error.strerror or error} ({error.filename or 'no file named'})",
                     "free space or mend the rights; the same command then goes on") from None


def go(pod: Pod, steps: list[Step]) -> None:
    """Every step that is not done, in order; Failed at the first that fails."""
    for number, step in enumerate(steps, 1):
        label = f"[{number}/{len(steps)}] {step.name}"
        if pod.is_done(step.name) and step.name != "archive":
            continue
        e = step.estimate()
        size = f"{e.gigabytes:.1f} GB, " if e.gigabytes else ""
        pod.say(f"{label}: {size}{e.time()}, {e.money(pod.options['price'])} ({e.source})")
        if step.name.startswith("seed "):
            pod.forget(AFTER_SEEDS)  # they would tell of another run
        begin = time.monotonic()
        try:
            said = outcome(step)
        except Failed as error:
            pod.say(f"FAIL  {step.name}: {error}\n      -> {error.remedy}")
            raise
        finally:
            seconds = time.monotonic() - begin
            pod.spend(step.name, seconds)
        pod.note(step.name, seconds=round(seconds, 1), said=said)
        cost = seconds / 3600 * pod.options["price"]
        pod.say(f"OK    {step.name}: {said} ({seconds_text(seconds)}, ${cost:.2f})")


def keep_what_is_there(pod: Pod) -> None:
    """After a failure: an archive of the seeds that are finished, if any."""
    if any(finished(pod.seed_folder(seed)) for seed in pod.options["seeds"]):
        with suppress(OSError):
            pod.say(f"so far: {write_archive(pod)}")


def drive(pod: Pod, command: str) -> int:
    """Go the whole way; the exit status. command: what goes on after an early end."""
    with open(pod.out / ".lock", "w") as lock:
        if not take(lock):
            raise ToolError(f"another pod runs in {pod.out}: wait for it, or choose another --out")
        pod.load()
        steps = steps_of(pod)
        pod.say(f"{len(pod.options['seeds'])} seeds on {pod.nproc} processes, into {pod.out}\n"
                f"{plan_text(pod, steps)}")
        try:
            go(pod, steps)
        except Failed:
            keep_what_is_there(pod)
            pod.say(f"to go on: {command}")
            return 1
        except KeyboardInterrupt:
            pod.say(f"interrupted; to go on: {command}")
            return 130
        total = sum(pod.state["spent"].values())
        pod.say(f"done: copy {pod.archive} home, then give the machine back "
                f"(all tries together took {seconds_text(total)}, "
                f"${total / 3600 * pod.options['price']:.2f}; a killed one is not counted)")
    return 0


def parse(arguments) -> argparse.Namespace:
    """Command line; what is not given is None, and then as before or a default."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--name", help="of the record's folder and the archive")
    add("--seeds", nargs="+", action=Seeds, help="default 42 314 999")
    add("--track", choices=sorted(make_record.TRACKS), help="default record: 8 x H100, 600 s, three seeds")
    add("--author", help="who submits it")
    add("--github", help="their GitHub id")
    add("--blurb", help="one or two sentences: what is new")
    add("--lineage", help="the published system it stands on, or a sentence")
    add("--vs", help="what it is compared with (default pr2135, of non_record none)")
    add("--price", type=float, help="dollars an hour of the whole machine (default 22)")
    add("--train-shards", type=int, help="of 100 M tokens (default 80, which is all)")
    add("--nproc", type=int, help="processes of a run (default: one per GPU)")
    add("--out", help="folder of everything (default runs/pod, or runs/pod_rehearsal)")
    add("--skip", nargs="+", default=[], choices=MAY_BE_SKIPPED, help="steps to leave out")
    add("--plan", action="store_true", help="only say what it would take")
    add("--rehearse", action="store_true", help="tiny, on a CPU, with the demo's data")
    return parser.parse_args(arguments)


def options_of(args: argparse.Namespace, known: dict) -> dict:
    """What was given now, else what the pod began with, else the defaults; checked."""
    given = {key: getattr(args, key, None) for key in DEFAULTS if getattr(args, key, None) is not None}
    for key in FIXED:
        if key in given and known and given[key] != known.get(key):
            raise ToolError(f"--{key.replace('_', '-')} was {known.get(key)} when this pod began, now it is "
                            f"{given[key]}: leave it, or choose another --out")
    rehearsal = {"name": "rehearsal", "track": "non_record", "price": 0.0} if args.rehearse else {}
    options = {**DEFAULTS, **rehearsal, **known, **given}
    options["date"] = options["date"] or datetime.date.today().isoformat()
    if not re.fullmatch(r"[\w.+-]+", options["name"]) and not args.plan:
        raise ToolError(f"--name {options['name']!r}: give one of letters, digits, _ . + -: "
                        "the record's folder and the archive are called so")
    least = {"train_shards": 1, "nproc": 0, "price": 0}
    for key, bound in least.items():
        if options[key] < bound:
            raise ToolError(f"--{key.replace('_', '-')} {options[key]} must be at least {bound}")
    return options


def check_words(pod: Pod) -> None:
    """ToolError where a later step would refuse a word of the command line."""
    make_record.check_lineage(pod.options["lineage"])
    if other := others_of(pod):
        compare.read_group(other, "--vs")


@contextmanager
def signals():
    """Inside, SIGTERM ends the pod as Ctrl-C does, and a dropped terminal ends nothing."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def main(arguments=None) -> int:
    """Command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(words)
    out = Path(args.out or ("runs/pod_rehearsal" if args.rehearse else "runs/pod"))
    options = options_of(args, read_state(out).get("options", {}))
    pod = Pod(out, options, args.rehearse, args.skip)
    if args.plan:
        pod.state = {**pod.state, **read_state(out)}
        print(plan_text(pod, steps_of(pod)))
        return 0
    check_words(pod)
    pod.log("pod").parent.mkdir(parents=True, exist_ok=True)
    with signals():
        return drive(pod, f"./run.sh pod {shlex.join(words)}".strip())


if __name__ == "__main__":
    run_cli(main)
