"""Make a record folder from finished runs: records/<track>/<date>_<name>/.

    python tools/make_record.py runs/seed_* --name progressive_context --track record --author "A. Name" \\
        --github name --blurb "what is new" --lineage pr1855
    python tools/make_record.py runs/demo_* --name cpu_demo --track non_record

The folder gets README.md, submission.json, train_gpt.py (in the form that the runs counted: as their logs
hold it, lean, packed or both; --lean and --packed choose another form), requirements.txt, and per seed
train_seed<N>.log, metrics_seed<N>.jsonl and summary_seed<N>.json, with relative paths only. A run that ended
early and went on in its own folder makes one too; the README says what was run again. Runs that cannot make a
record are refused with the reason. Before the folder is put in place, its script is run inside it, in
eval-only mode, on an artifact of the runs, and its score is compared.

Tracks: record (8xH100, 600 s + 600 s, three seeds, the full validation set) and non_record (other hardware,
data or studies; labelled as such). Both keep the 16,000,000 bytes, one code, one configuration, and complete
coverage.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    ARTIFACT,
    ARTIFACT_LIMIT,
    OWN_TO_EACH_RUN,
    PACKED_START,
    ROOT,
    SOURCE_END,
    STAGES,
    UNLIKE_IS_FINE,
    RunFiles,
    ToolError,
    as_environment,
    command_line,
    load_run,
    published,
    relative,
    run_cli,
    table,
    unpack_script,
    write_atomic,
)

TRACKS = {"record": "track_10min_16mb", "non_record": "track_non_record_16mb"}
BUDGET_SECONDS, SEEDS_NEEDED, VAL_DOCUMENTS = 600.0, 3, 50_000
ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:[\w.+@~-]+/)+[\w.+@~-]*")
FORMS = {  # what a run may have counted as its script, and what the README calls it
    "readable": "readable script",
    "packed": "self-extracting form of the script",
    "lean": "lean script (without its part three, of which these settings use nothing)",
    "lean_packed": "self-extracting form of the lean script (without its part three, of which these settings "
                   "use nothing)",
}
SOURCE_MARK = ("[here the log holds the source of train_gpt.py: the file of that name has it, plain or "
               "packed, whole or without its part three]")


@dataclass(frozen=True)
class Record:
    """What the folder is made of."""

    runs: list[RunFiles]
    track: str
    source: bytes
    script: bytes
    form: str
    args: argparse.Namespace

    @property
    def best(self) -> RunFiles:
        return min(self.runs, key=lambda run: run.summary["val_bpb"])

    def values(self, key: str) -> list:
        """One summary figure of every run."""
        return [run.summary[key] for run in self.runs]

    def total(self, run: RunFiles) -> int:
        """Bytes that count: the artifact and the script as it is shipped here."""
        return run.summary["artifact_bytes"] + len(self.script)


# --- what is refused


def refuse(runs: list[RunFiles], why: str) -> None:
    """Stop with the runs and the reason."""
    raise ToolError(f"{', '.join(relative(run.folder) for run in runs)}: {why}")


def check_files(run: RunFiles) -> None:
    """Log, events and artifact are there, are the run's own, and the run scored what it packed."""
    keys = ("val_bpb", "val_loss", "artifact_bytes", "code_bytes", "eval_seconds", "tokens_scored", "seed",
            "settings")
    missing = [k for k in keys if k not in run.summary]
    if missing:
        refuse(
            [run],
            f"summary.json lacks {', '.join(missing)}: the run did not train, pack and score; run it whole",
        )
    if "train_seconds" not in run.summary or not run.last("train_end"):
        refuse([run], "it did not train (an eval-only run): give the run that trained")
    final, shown = run.last("final"), re.findall(r"^final val_bpb=([\d.]+)", run.log, re.M)
    if not final or not shown:
        refuse([run], "train.log or metrics.jsonl has no final line: the log is cut; give the whole log")
    if (abs(final["val_bpb"] - run.summary["val_bpb"]) > 1e-9
        or abs(float(shown[-1]) - run.summary["val_bpb"]) > 1e-6):
        refuse(
            [run],
            f"summary.json says val_bpb {run.summary['val_bpb']:.8f}, metrics.jsonl {final['val_bpb']:.8f}, "
            f"train.log {shown[-1]}: they are of different runs",
        )
    artifact = run.folder / ARTIFACT
    size = artifact.stat().st_size if artifact.is_file() else -1
    if size != run.summary["artifact_bytes"]:
        found = "is missing" if size < 0 else f"has {size:,} bytes"
        refuse([run], f"{ARTIFACT} {found}, summary.json says {run.summary['artifact_bytes']:,}: "
               "the artifact that was scored is needed")


def check_coverage(run: RunFiles) -> None:
    """Every validation target was scored exactly once."""
    coverage, s = run.last("coverage"), run.summary
    if not coverage.get("complete") or s["settings"].get("VAL_DOC_FRACTION", 1) != 1:
        refuse([run],
               f"coverage is incomplete (VAL_DOC_FRACTION={s['settings'].get('VAL_DOC_FRACTION')}, complete="
               f"{coverage.get('complete')}): every validation target must be scored once")
    if coverage["targets"] != s["tokens_scored"]:
        refuse([run],
               f"{s['tokens_scored']:,} tokens scored, but coverage counts {coverage['targets']:,} targets")


def check_alike(runs: list[RunFiles]) -> bytes:
    """One code, one configuration, different seeds, one kind of machine and data. Returns the code."""
    first = runs[0]
    for run in runs:
        digest = hashlib.sha256(run.source()).hexdigest()
        logged = run.last("code").get("sha256")
        if len({e.get("sha256") for e in run.of("code")}) > 1:
            refuse([run], "it was quantised or scored again by another script than the one that trained: "
                   "score it again with that one, which train.log holds")
        if digest != logged:
            refuse([run],
                   f"the source in train.log has sha256 {digest[:12]}…, the log says {str(logged)[:12]}…: "
                   "the log was changed")
        if logged != first.last("code")["sha256"]:
            refuse([first, run], f"they ran different code (sha256 {first.last('code')['sha256'][:12]}… and "
                   f"{logged[:12]}…): a mean comes from one script")
        mine, theirs = run.summary["settings"], first.summary["settings"]
        unlike = [k for k in mine if k not in UNLIKE_IS_FINE and mine[k] != theirs.get(k)]
        if unlike:
            pairs = ", ".join(f"{k}={theirs.get(k)} and {mine[k]}" for k in unlike[:4])
            refuse([first, run],
                   f"they ran different configurations ({pairs}): a mean comes from one configuration")
        for key in ("world_size", "device", "tokens_scored", "bytes_scored", "torch", "data_fingerprint"):
            if run.summary.get(key) != first.summary.get(key):
                refuse([first, run], f"{key} differs ({first.summary.get(key)} and {run.summary.get(key)}): "
                       "a mean comes from one kind of machine and one validation set")
        shards = [e["detail"] for r in (first, run) for e in r.of("check") if e["what"] == "training shards"]
        if len(set(shards)) > 1:
            refuse([first, run], f"they trained on different data ({' and '.join(shards)}): use one")
    seeds = [run.seed for run in runs]
    twice = sorted({s for s in seeds if seeds.count(s) > 1})
    if twice:
        refuse([r for r in runs if r.seed in twice],
               f"seed {twice[0]} is there twice: every run needs its own seed")
    return first.source()


def check_record_track(runs: list[RunFiles]) -> None:
    """What only the record track asks for."""
    if len(runs) < SEEDS_NEEDED:
        refuse(
            runs,
            f"{len(runs)} runs: the record track needs {SEEDS_NEEDED} seeds; run more, or --track non_record",
        )
    for run in runs:
        check_record_run(run)


def check_record_run(run: RunFiles) -> None:
    """What the record track asks of every run."""
    s, settings = run.summary, run.summary["settings"]
    if not s.get("compliant"):
        refuse(
            [run],
            "NON-COMPLIANT: the run used a mode that breaks the rules; only --track non_record takes it",
        )
    if s["world_size"] != 8 or "H100" not in s["device"]:
        refuse([run], f"it ran on {s['world_size']} x {s['device']}: the record track is 8 x H100; "
               "use --track non_record")
    failed = [e.get("name", "?") for e in run.of("probe") if e.get("ok") is False]
    if failed:
        refuse([run], f"the probe {failed[0]} failed: the log itself says that a rule was broken")
    for key, budget in (("train_seconds", "MAX_WALLCLOCK_SECONDS"), ("eval_seconds", "EVAL_MAX_SECONDS")):
        if s[key] > BUDGET_SECONDS or not 0 < settings.get(budget, 0) <= BUDGET_SECONDS:
            refuse([run], f"{key} is {s[key]:.2f} with {budget}={settings.get(budget)}: over the "
                   f"{BUDGET_SECONDS:g} s of the record track")
    documents = run.last("coverage").get("documents")
    if documents != VAL_DOCUMENTS:
        refuse([run], f"{documents:,} documents were scored: the competition's validation set has "
               f"{VAL_DOCUMENTS:,}; use --track non_record")


def check_size(record: Record) -> None:
    """Script as shipped and artifact are within the limit, for every seed."""
    for run in record.runs:
        total = record.total(run)
        if total > ARTIFACT_LIMIT:
            how = "" if record.form == "lean_packed" else " or ship a smaller script (--lean, --packed)"
            refuse(
                [run],
                f"artifact {run.summary['artifact_bytes']:,} + script {len(record.script):,} = {total:,} "
                f"is {total - ARTIFACT_LIMIT:,} over the limit of {ARTIFACT_LIMIT:,} bytes: pack less{how}",
            )


def check_lineage(word: str) -> None:
    """ToolError unless it is empty, a published system, or a sentence."""
    if word and word.lower().replace("#", "pr") not in published() and len(word) < 12:
        raise ToolError(f"--lineage {word} is none of {', '.join(published())}: or describe it in a sentence")


def gather(args: argparse.Namespace) -> Record:
    """Read the runs and check everything that can be checked without running."""
    if not re.fullmatch(r"[\w.+-]+", args.name):
        raise ToolError(f"--name {args.name} must be letters, digits, _ . + -: it becomes a folder's name")
    check_lineage(args.lineage)
    runs = [load_run(folder) for folder in args.runs]
    for run in runs:
        check_files(run)
        check_coverage(run)
    source = check_alike(runs)
    if args.track == "record":
        check_record_track(runs)
    form = shipped_form(runs, source, args)
    script = script_in_form(source, form)
    record = Record(sorted(runs, key=lambda r: r.seed), TRACKS[args.track], source, script, form, args)
    check_size(record)
    for run in runs:
        counted = run.summary["code_bytes"]
        if counted != len(script):
            print(f"note: {relative(run.folder)} counted {counted:,} bytes of {counted_form(run)} script, "
                  f"here it has {len(script):,}: what is shipped here counts")
    return record


def counted_form(run: RunFiles) -> str:
    """Which of FORMS the run counted as its script."""
    return run.summary.get("code_form", "readable")


def shipped_form(runs: list[RunFiles], source: bytes, args: argparse.Namespace) -> str:
    """Which of FORMS is shipped: what the runs counted, or what --lean and --packed ask for."""
    counted = sorted({counted_form(run) for run in runs})
    if len(counted) > 1 or counted[0] not in FORMS:
        refuse(runs, f"they counted the script as {' and '.join(counted)}: a mean comes from one form")
    form = counted[0]
    if args.lean or args.packed:
        form = "_".join(word for word in ("lean", "packed") if getattr(args, word))
    if source.startswith(PACKED_START):      # it cannot be anything else any more
        if args.lean and not counted[0].startswith("lean"):
            refuse(runs, "they ran the packed whole script: --lean needs runs of the readable one")
        form = counted[0] if counted[0].endswith("packed") else "packed"
    elif args.lean and not counted[0].startswith("lean"):
        for run in runs:
            check_lean(run, source)
    return form


def check_lean(run: RunFiles, source: bytes) -> None:
    """The script itself says whether the run's settings need what a lean one leaves out."""
    env = {**os.environ, **as_environment(run.summary["settings"]), "CODE_FORM": "lean"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_gpt.py"
        path.write_bytes(source)
        done = subprocess.run([sys.executable, str(path), "--check", "settings"], capture_output=True,
                              text=True, cwd=folder, env=env)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        refuse([run], f"--lean cannot be: {said[-1] if said else 'its script does not know that form'}")


def script_in_form(source: bytes, form: str) -> bytes:
    """The script in one of FORMS, by its own functions; a packed script stays as it is."""
    makers = {"lean": "lean", "packed": "self_extracting"}
    functions = [maker for word, maker in makers.items() if word in form]
    if source.startswith(PACKED_START) or not functions:
        return source
    code = ("import sys,importlib.util as u;p=sys.argv[1];s=u.spec_from_file_location('t',p);"
            "m=u.module_from_spec(s);sys.modules['t']=m;s.loader.exec_module(m);b=open(p,'rb').read()\n"
            "for f in sys.argv[2:]:b=getattr(m,f)(b)\n"
            "sys.stdout.buffer.write(b)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_gpt.py"
        path.write_bytes(source)
        done = subprocess.run([sys.executable, "-c", code, str(path), *functions], capture_output=True,
                              cwd=folder)
    if done.returncode or not done.stdout:
        raise ToolError(f"the script could not make its {form} form: "
                        f"{done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout


# --- what is written


def without_absolute(text: str) -> str:
    """The text with every absolute path made relative: to the working folder, else its last part."""
    for place in (Path.cwd(), ROOT):
        if str(place) != "/":
            text = text.replace(f"{place}/", "")
    return ABSOLUTE.sub(lambda m: m[0] if m[0].startswith("/dev/") else m[0].rstrip("/").rsplit("/", 1)[1],
                        text)


def has_machine_path(text: str) -> bool:
    """Whether a path below the home or the working folder is left in the text."""
    places = {str(Path.home()), str(Path.cwd())} - {"/"}      # "/" would be found in every address
    return any(re.search(rf"(?<![\w.~-]){re.escape(place)}/", text) for place in places)


def clean_log(run: RunFiles) -> str:
    """train.log with relative paths, and a line in place of the source that lies beside it."""
    end = run.log.index(SOURCE_END)
    begin = re.search(r"^code bytes=\d+.*\n", run.log, re.M).end()
    head, tail = run.log[:begin], run.log[end + len(SOURCE_END) :]
    return without_absolute(head) + SOURCE_MARK + SOURCE_END + without_absolute(tail)


def clean_json(value):
    """A JSON value with relative paths."""
    if isinstance(value, dict):
        return {k: clean_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean_json(v) for v in value]
    return without_absolute(value) if isinstance(value, str) else value


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def submission(record: Record) -> dict:
    """submission.json with the keys of the field, made from the logs' figures."""
    args, runs, first = record.args, record.runs, record.runs[0].summary
    losses, scores, sizes = (record.values(key) for key in ("val_loss", "val_bpb", "artifact_bytes"))

    def seed_result(run: RunFiles) -> dict:
        s = run.summary
        return {"val_loss": s["val_loss"], "val_bpb": s["val_bpb"], "artifact_bytes": s["artifact_bytes"],
                "total_bytes": record.total(run), "steps": s["steps"], "step_avg_ms": round(s["step_ms"], 2),
                "train_time_s": round(s["train_seconds"], 2), "eval_time_s": round(s["eval_seconds"], 2)}

    return {"author": args.author, "github_id": args.github,
            "name": args.title or args.name.replace("_", " "), "blurb": args.blurb, "date": args.date,
            "track": record.track.removeprefix("track_"), "val_loss": round(statistics.fmean(losses), 8),
            "val_bpb": round(statistics.fmean(scores), 8), "val_loss_std": round(spread(losses), 8),
            "val_bpb_std": round(spread(scores), 8), "seeds": [run.seed for run in runs],
            "seed_results": {str(run.seed): seed_result(run) for run in runs},
            "artifact_bytes_mean": round(statistics.fmean(sizes)), "artifact_bytes_max": max(sizes),
            "bytes_code": len(record.script), "bytes_total": max(map(record.total, runs)),
            "train_steps_mean": round(statistics.fmean(record.values("steps")), 2),
            "step_avg_ms_mean": round(statistics.fmean(record.values("step_ms")), 2),
            "tokens_scored": first["tokens_scored"], "bytes_scored": first["bytes_scored"],
            "hardware": f"{first['world_size']} x {first['device']}",
            "pytorch_version": first.get("torch", ""),
            "attention": runs[0].last("start").get("attention", ""),
            "compliant": all(record.values("compliant")),
            "code_sha256": hashlib.sha256(record.script).hexdigest()}


def changed_settings(record: Record) -> dict:
    """The settings of the runs that differ from the script's defaults, as the environment takes them."""
    logged = {k: v for k, v in record.runs[0].last("changed_settings").items() if k.isupper()}
    return {k: int(v) if isinstance(v, (bool, float)) and v == int(v) else v for k, v in logged.items()
            if k not in OWN_TO_EACH_RUN}


def lineage(record: Record) -> str:
    """What it stands on, and by how much it differs from a published system."""
    word = record.args.lineage
    if not word:
        return "None named."
    name = word.lower().replace("#", "pr")
    if name not in published():
        return word
    system = published()[name]
    scores = [r["val_bpb"] for r in system["runs"]]
    if record.args.track != "record":
        return (
            f"{name}: {system['title']}. Its published figures are of other hardware or data: no comparison.")
    from tools import compare

    sides = [compare.read_group([str(r.folder) for r in record.runs], "A"), compare.read_group([name], "B")]
    mean = statistics.fmean(scores)
    return (f"{name}: {system['title']} ({len(scores)} seeds, mean {mean:.8f} BPB; {system['standing']})."
            "\n\n```\n" f"{compare.describe(*sides, compare.analyse(*sides))}\n```")


def compliance(record: Record) -> list[str]:
    """The evidence for the rules, as it stands in the logs."""
    out, probes = [], {}
    for run in record.runs:
        c, s = run.last("coverage"), run.summary
        out.append(f"seed {run.seed}: {c['targets']:,} targets in {c.get('documents', 0):,} documents scored "
                   f"exactly once ({c['bytes']:,} bytes); training and packing {s['train_seconds']:.1f} s, "
                   f"evaluation {s['eval_seconds']:.1f} s; {record.total(run):,} of {ARTIFACT_LIMIT:,} bytes")
        out += [f"seed {run.seed}: {line}" for line in run_again(s)]
        for e in run.of("probe"):
            said = f"{e['name']}: {e['figure']}, {'holds' if e['ok'] else 'FAILED'}"
            probes.setdefault(said, []).append(str(run.seed))
        out += [f"seed {run.seed}, warning in the log: {e.get('text', '')}" for e in run.of("warning")]
        out += [f"seed {run.seed} is **NON-COMPLIANT**: {e.get('reason', '')}"
                for e in run.of("NON-COMPLIANT")]
    out += [f"probe {said} (seed {', '.join(seeds)})" for said, seeds in probes.items()]
    if not all(record.values("compliant")):
        out.insert(0, "**NON-COMPLIANT**: not every run kept the rules; this is a study, no result")
    return out


def run_again(s: dict) -> list[str]:
    """What a summary says of stages that were run again, after the run had ended early."""
    lines = []
    if s.get("stopped"):
        lines.append(f"training ended early: {s['stopped']}")
    if s.get("quantising_runs", 1) > 1:
        times = s["quantising_runs"]
        lines.append(f"the weights were quantised {times} times; the artifact is of the last time")
    if s.get("evaluation_runs", 1) > 1:
        times = s["evaluation_runs"]
        lines.append(f"the evaluation was run {times} times; scores and seconds are of the last")
    if differing := s.get("not_as_in_training"):
        told = ", ".join(f"{k}={there} in training, then {here}" for k, (here, there) in differing.items())
        lines.append(f"what was not as in training: {told}")
    return lines


def reproduce(record: Record) -> str:
    """The commands that repeat a run, and its evaluation."""
    first = record.runs[0].summary
    exports = ["export"]
    for name, value in changed_settings(record).items():
        pair = f"{name}={shlex.quote(str(value))}"
        if len(exports[-1]) + len(pair) < 100:
            exports[-1] += f" {pair}"
        else:
            exports.append(f"    {pair}")
    world = first["world_size"]
    start = ("python train_gpt.py" if world == 1
             else f"torchrun --standalone --nproc_per_node={world} train_gpt.py")
    seeds = " ".join(str(run.seed) for run in record.runs)
    lines = ["pip install -r requirements.txt"]
    if exports != ["export"]:
        lines.append(" \\\n".join(exports))
    lines += [
        "export DATA_PATH=…/shards TOKENIZER_PATH=…/tokenizer.model    # the data described above",
        f"for seed in {seeds}; do SEED=$seed ARTIFACT_DIR=runs/seed_$seed {start}; done",
        f"EVAL_ONLY_QUANTIZED_PATH=runs/seed_{record.best.seed}/{ARTIFACT} {start}    # evaluation alone",
    ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def tables(record: Record, s: dict) -> list[str]:
    """Results by seed, and scores by stage."""
    rows = [[run.seed, f"{run.summary['val_bpb']:.8f}", f"{run.summary['val_loss']:.8f}",
             run.summary["steps"], f"{run.summary['step_ms']:.1f}", f"{run.summary['train_seconds']:.1f}",
             f"{run.summary['eval_seconds']:.1f}", f"{run.summary['artifact_bytes']:,}",
             f"{record.total(run):,}"] for run in record.runs]
    rows.append(["mean", f"{s['val_bpb']:.8f}", f"{s['val_loss']:.8f}", f"{s['train_steps_mean']:.0f}",
                 f"{s['step_avg_ms_mean']:.1f}",
                 *(f"{statistics.fmean(record.values(k)):.1f}" for k in ("train_seconds", "eval_seconds")),
                 f"{s['artifact_bytes_mean']:,}", f"{statistics.fmean(map(record.total, record.runs)):,.0f}"])
    head = ["seed", "BPB", "nats/token", "steps", "ms/step", "train s", "eval s", "artifact",
            "artifact + script"]
    stages = [[label, *(f"{run.summary[key]:.5f}" for run in record.runs)]
              for label, key in STAGES if all(key in run.summary for run in record.runs)]
    seeds = [f"seed {run.seed}" for run in record.runs]
    return [table(head, rows, markdown=True), table(["BPB after", *seeds], stages, markdown=True)]


def about_script(record: Record) -> str:
    """Which form the shipped script has, what is inside a packed one, and which script the logs name."""

    def sized(script: bytes) -> tuple[str, str]:
        return f"{len(script):,} bytes", f"sha256 `{hashlib.sha256(script).hexdigest()}`"

    size, digest = sized(record.script)
    text = f"`train_gpt.py` is the {FORMS[record.form]}, {size}, {digest}."
    inside = unpack_script(record.script)
    if record.source == record.script:
        named = "the self-extracting form" if record.form.endswith("packed") else "it"
    else:
        named = ", ".join(["the whole script", *sized(record.source)])
    if record.form.endswith("packed"):
        size, digest = sized(inside)
        return f"{text} The source inside it, without comments, {size}, has {digest}; the logs name {named}."
    return text if record.form == "readable" else f"{text} The logs name {named}."


def readme(record: Record, checked: str) -> str:
    """README.md of the folder; every figure comes from the logs."""
    s, args = submission(record), record.args
    said = {e["what"]: e["detail"] for e in record.runs[0].of("check")}
    train, val, tokenizer = (said.get(what, "not logged")
                             for what in ("training shards", "validation shards", "tokenizer"))
    data = (f"Training: {train}. Validation: {val}. Tokenizer: {tokenizer}. Fingerprint: "
            f"{record.runs[0].summary.get('data_fingerprint', 'not logged')}.")
    other = ("" if args.track == "record" else f"**Non-record track**, run on {s['hardware']}; trained on "
             f"{train}, scored on {val}: not comparable with the competition's leaderboard.\n\n")
    settings = ", ".join(f"`{k}={v}`" for k, v in changed_settings(record).items()) or "none"
    spread = "one seed"
    if len(record.runs) > 1:
        spread = f"mean of {len(record.runs)} seeds, standard deviation {s['val_bpb_std']:.5f}"
    parts = [
        f"# {s['name']}",
        other + (args.blurb or "No description was given."),
        f"**{s['val_bpb']:.5f} BPB** ({spread}), {s['val_loss']:.5f} nats per token, "
        f"at most {s['bytes_total']:,} bytes, on {s['hardware']}.",
        "## Results", *tables(record, s),
        "## Lineage", lineage(record),
        "## Data", data,
        "## Settings", f"Those that differ from the script's defaults: {settings}.",
        "## Compliance", "\n".join(f"- {line}" for line in compliance(record)),
        "## How to reproduce", reproduce(record), f"{about_script(record)} {checked}",
    ]
    return "\n\n".join(parts) + "\n"


def write_folder(record: Record, folder: Path, checked: str) -> None:
    """Every file of the record."""
    write_atomic(folder / "train_gpt.py", record.script)
    for run in record.runs:
        write_atomic(folder / f"train_seed{run.seed}.log", clean_log(run))
        events = "".join(json.dumps(clean_json(e)) + "\n" for e in run.events)
        write_atomic(folder / f"metrics_seed{run.seed}.jsonl", events)
        write_atomic(folder / f"summary_seed{run.seed}.json",
                     json.dumps(clean_json(run.summary), indent=1) + "\n")
    write_atomic(folder / "requirements.txt", (ROOT / "requirements.txt").read_bytes())
    write_atomic(folder / "submission.json", json.dumps(submission(record), indent=2,
                                                        ensure_ascii=False) + "\n")
    write_atomic(folder / "README.md", readme(record, checked))
    if record.args.with_artifact:
        shutil.copyfile(record.best.folder / ARTIFACT, folder / ARTIFACT)
    for path in folder.iterdir():
        if path.suffix in (".log", ".json", ".jsonl", ".md") and has_machine_path(path.read_text()):
            raise ToolError(f"{path.name} would hold a path of this machine: use relative paths in DATA_PATH")


# --- the packaged script is run


def eval_environment(run: RunFiles, out: Path) -> dict:
    """The run's settings for scoring its artifact again. Logs hold no paths: where the data lie is taken from
    the environment, as for a run in the present folder."""
    env = {**os.environ, **as_environment(run.summary["settings"])}
    for key, usual in (("DATA_PATH", ""), ("TOKENIZER_PATH", ""), ("DATA_DIR", "data")):
        if place := os.environ.get(key, usual):
            env[key] = str(Path(place).resolve())
    path = str((run.folder / ARTIFACT).resolve())
    return {**env, "EVAL_ONLY_PATH": "", "EVAL_ONLY_QUANTIZED_PATH": path, "ARTIFACT_DIR": str(out),
            "RUN_ID": "check", "PYTHONDONTWRITEBYTECODE": "1"}


def run_inside(record: Record, folder: Path, run: RunFiles) -> str:
    """Score a run's artifact with the packaged script inside its folder; compare. Returns a sentence."""
    world, tolerance = record.args.nproc or run.summary["world_size"], record.args.tolerance
    launcher = ([] if world == 1 else ["-m", "torch.distributed.run", "--standalone",
                                       f"--nproc_per_node={world}"])
    print(f"scoring {relative(run.folder)} again with the packaged script, inside its folder; the run's own "
          f"evaluation took {run.summary['eval_seconds']:.0f} s, checks come before it …", flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, *launcher, "train_gpt.py"], cwd=folder, capture_output=True,
                              text=True, env=eval_environment(run, Path(out)))
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            last = [line for line in lines if line.startswith("error: ")][:1] or lines[-3:]
            hint = "; set DATA_PATH and TOKENIZER_PATH as for the runs" if "_PATH=" in last[0] else ""
            raise ToolError(f"the packaged script failed inside its folder (exit status {done.returncode}): "
                            f"{' | '.join(last)}{hint}")
        again = json.loads((Path(out) / "summary.json").read_text())
    difference = again["val_bpb"] - run.summary["val_bpb"]
    if abs(difference) > tolerance or again["tokens_scored"] != run.summary["tokens_scored"]:
        raise ToolError(
            f"the packaged script scores {again['val_bpb']:.8f} BPB on {again['tokens_scored']:,} "
            f"tokens, the run said {run.summary['val_bpb']:.8f} on {run.summary['tokens_scored']:,}: more "
            f"than {tolerance:g} apart; the folder is not made")
    print(f"  {again['val_bpb']:.8f} BPB, the run said {run.summary['val_bpb']:.8f}: {difference:+.1e} "
          f"in {time.perf_counter() - begin:.0f} s")
    return (f"Run inside this folder in eval-only mode, it scored the artifact of seed {run.seed} at "
            f"{again['val_bpb']:.8f} BPB; the run had said {run.summary['val_bpb']:.8f}.")


def build(record: Record) -> Path:
    """Write the folder beside its place, run its script, then move it there."""
    args = record.args
    target = Path(args.out) / record.track / f"{args.date}_{args.name}"
    if target.exists() and not args.force:
        raise ToolError(f"{relative(target)} exists: choose another --name or --date, or give --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making_") as temp:
        folder = Path(temp) / target.name
        folder.mkdir()
        write_atomic(folder / "train_gpt.py", record.script)
        if args.skip_run:
            checked = f"It was not run again when this folder was made: {args.skip_run}."
        else:
            picked = record.runs if args.check == "all" else [record.best]
            checked = " ".join(run_inside(record, folder, run) for run in picked)
        write_folder(record, folder, checked)
        if target.exists():
            shutil.rmtree(target)
        os.rename(folder, target)
    return target


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    add("--name", required=True, help="short name, part of the folder's")
    add("--track", choices=sorted(TRACKS), default="record")
    add("--title", default="", help="the name people read (default: --name)")
    add("--author", default="", help="who submits it")
    add("--github", default="", help="their GitHub id")
    add("--blurb", default="", help="one or two sentences: what is new")
    add("--lineage", default="", help="the published system it stands on, or a sentence")
    add("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    add("--lean", action="store_true",
        help="ship the script without what only older systems need (default: the form that the runs counted)")
    add("--packed", action="store_true", help="ship the self-extracting form of it (default: the same)")
    add("--with-artifact", action="store_true", help="put the best run's artifact into the folder")
    add("--check", choices=("best", "all"), default="best", help="which artifacts are scored again")
    add("--nproc", type=int, default=0, help="processes of that run (default: as many as the runs had)")
    add("--tolerance", type=float, default=1e-4, help="BPB by which that score may differ (default 1e-4)")
    add("--skip-run", metavar="WHY", default="",
        help="do not score again; non_record only; WHY goes into the README")
    add("--out", default=str(ROOT / "records"), help="folder of all records")
    add("--force", action="store_true", help="replace a folder of the same name")
    args = parser.parse_args(arguments)
    if args.track == "record" and args.skip_run:
        raise ToolError("--skip-run is refused in the record track: the packaged script must be seen to run")
    if args.nproc < 0:
        raise ToolError(f"--nproc {args.nproc} must be at least 1, or 0 for as many as the runs had")
    try:
        args.date = datetime.date.fromisoformat(args.date).isoformat()
    except ValueError:
        raise ToolError(f"--date {args.date} must be a day as YYYY-MM-DD") from None
    folder = build(gather(args))
    if not args.author or not args.blurb:
        print("note: --author or --blurb is empty: a record to hand in needs both")
    print(f"made {relative(folder)}: " + ", ".join(sorted(p.name for p in folder.iterdir())))
    return 0


if __name__ == "__main__":
    run_cli(main)
