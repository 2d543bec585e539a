"""Take a run elsewhere: its curves to TensorBoard or Weights & Biases, its artifact to a hub and back.

    python tools/export.py runs/mine runs/other --tensorboard runs/tensorboard
    python tools/export.py runs/mine --wandb my_project
    python tools/export.py runs/mine --upload me/my_model          # private; --public for all
    python tools/export.py --download me/my_model runs/fetched

Curves are what metrics.jsonl holds: every figure of the steps and validations, and the
scores at the last step. Up go artifact, summary.json, metrics.jsonl and train.log with
relative paths, and a card; what comes down is checked against its summary. Needed for
each, and only for it: tensorboard, wandb, huggingface_hub.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    ARTIFACT,
    SOURCE_END,
    RunFiles,
    ToolError,
    command_line,
    json_object,
    load_run,
    relative,
    run_cli,
    write_atomic,
)
from tools.make_record import clean_json, without_absolute

FILES = (ARTIFACT, "summary.json", "metrics.jsonl", "train.log")
CARD = "README.md"
AT_THE_END = re.compile(r"score_\w+|final|train_end|artifact")  # events that no step stands beside
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Point:
    """One figure of a curve. time: seconds since 1970."""

    tag: str
    step: int
    value: float
    time: float | None


def need_package(module: str, package: str, purpose: str):
    """Import an optional library, or a ToolError with the command that gets it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ToolError(f"{purpose} needs the package {package} ({error}): pip install {package}") from None


# --- curves


def points(run: RunFiles) -> list[Point]:
    """Every figure of metrics.jsonl with its step, in order."""
    out = []
    step = 0
    for event in run.events:
        kind = event.get("event", "")
        if isinstance(event.get("step"), int):
            step = event["step"]
        elif not AT_THE_END.fullmatch(kind):
            continue
        for name, value in event.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and name not in ("step", "time", "seed"):
                out.append(Point(f"{kind}/{name}", step, float(value), event.get("time")))
    out += [Point("losses/loss", step, loss, None) for step, loss in run.losses().items()]
    if not out:
        raise ToolError(f"{relative(run.folder)} has no figures in its metrics.jsonl: "
                        "give the folder of a run that has trained or scored")
    return out


def to_tensorboard(runs: list[RunFiles], folder: Path) -> str:
    """A folder of event files per run."""
    library = need_package("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    for run in runs:
        place = folder / run.name
        if place.is_dir() and any(place.iterdir()):
            raise ToolError(f"{relative(place)} holds an earlier export: delete it, or choose another folder")
    count = 0
    for run in runs:
        curves = points(run)
        writer = library.SummaryWriter(log_dir=str(folder / run.name))
        for point in curves:
            writer.add_scalar(point.tag, point.value, point.step, walltime=point.time)
        writer.add_text("summary", f"    {json.dumps(clean_json(run.summary), indent=1)}")
        writer.close()
        count += len(curves)
    return f"wrote {count:,} points of {len(runs)} runs; to see them: tensorboard --logdir {relative(folder)}"


def to_wandb(runs: list[RunFiles], project: str) -> str:
    """A run of the project per run; the step is a figure of its own, as steps may repeat
    where a run went on from a checkpoint."""
    wandb = need_package("wandb", "wandb", "--wandb")
    count = 0
    for run in runs:
        curves = points(run)
        there = wandb.init(project=project, name=run.name, config=run.summary.get("settings", {}))
        there.define_metric("step")
        there.define_metric("*", step_metric="step")
        for row in rows_of(curves):
            there.log(row)
        figures = {k: v for k, v in run.summary.items() if isinstance(v, (int, float))}
        there.summary.update(figures)
        there.finish()
        count += len(curves)
    return f"sent {count:,} points of {len(runs)} runs to {project}"


def rows_of(curves: list[Point]) -> list[dict]:
    """Points that follow one another and have one step, together: {tag: value, step}."""
    rows: list[dict] = []
    for point in curves:
        if not rows or rows[-1]["step"] != point.step or point.tag in rows[-1]:
            rows.append({"step": point.step})
        rows[-1][point.tag] = point.value
    return rows


# --- a hub, there and back


def clean_log(run: RunFiles) -> str:
    """train.log with its source and with relative paths around it."""
    begin = re.search(r"^code bytes=\d+.*\n", run.log, re.M)
    end = run.log.find(SOURCE_END, begin.end()) if begin else -1
    if end < 0:
        return without_absolute(run.log)
    head, source, tail = run.log[: begin.end()], run.log[begin.end() : end], run.log[end:]
    return without_absolute(head) + source + without_absolute(tail)


def card(run: RunFiles) -> str:
    """A README for the repository; every figure is from the summary."""
    s = run.summary
    score = f"{s['val_bpb']:.6f} bits per byte" if "val_bpb" in s else "not scored"
    device = f"{s.get('world_size', 1)} x {s.get('device', 'unknown device')}"
    lines = [f"# {run.name}"]
    if not s.get("compliant"):
        lines.append("**NON-COMPLIANT**: a mode that breaks the challenge's rules was on.")
    lines += [
        f"{score} (seed {run.seed}, {device}), artifact of {s['artifact_bytes']:,} bytes; made by "
        "train_gpt.py, whose source is in train.log.",
        "To score it again, with the same data and the settings of summary.json:",
        f"```bash\nEVAL_ONLY_QUANTIZED_PATH={ARTIFACT} python train_gpt.py\n```",
    ]
    return "\n\n".join(lines) + "\n"


def prepare(run: RunFiles, folder: Path) -> None:
    """What is uploaded, in a folder of its own."""
    artifact = run.folder / ARTIFACT
    if not artifact.is_file() or "artifact_bytes" not in run.summary:
        raise ToolError(f"{relative(run.folder)} has no {ARTIFACT}: give a run that has packed its artifact")
    check_artifact(run.folder, run.summary)
    (folder / ARTIFACT).write_bytes(artifact.read_bytes())
    (folder / "summary.json").write_text(json.dumps(clean_json(run.summary), indent=1) + "\n")
    lines = [json.dumps(clean_json(event)) + "\n" for event in run.events]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "train.log").write_bytes(clean_log(run).encode())
    (folder / CARD).write_text(card(run))


def check_artifact(folder: Path, summary: dict) -> str:
    """The artifact's SHA-256. ToolError unless it is what its summary says."""
    data = (folder / ARTIFACT).read_bytes()
    if len(data) != summary.get("artifact_bytes"):
        raise ToolError(f"{relative(folder / ARTIFACT)} has {len(data):,} bytes, its summary says "
                        f"{summary.get('artifact_bytes')}: it is damaged or of another run")
    checksum = hashlib.blake2b(data, digest_size=8).hexdigest()  # as the script keeps it
    if summary.get("artifact_digest", checksum) != checksum:
        raise ToolError(f"{relative(folder / ARTIFACT)} has other contents than its summary says "
                        f"({checksum}, not {summary['artifact_digest']}): it is damaged or of another run")
    return hashlib.sha256(data).hexdigest()


def hub_error(repository: str, error: Exception) -> ToolError:
    """What a hub's library raised, in a line: its classes keep changing."""
    said = " ".join(str(error).split())[:160]
    return ToolError(f"the hub did not do it for {repository} ({type(error).__name__}: {said}): "
                     "check the name, the network, and `hf auth login`")


def check_repository(name: str) -> None:
    """ToolError unless it is owner/name."""
    if not REPOSITORY.fullmatch(name):
        raise ToolError(f"{name} is no repository: give owner/name")


def upload(run: RunFiles, repository: str, public: bool) -> str:
    """A run's artifact, logs and card into a repository of the hub."""
    check_repository(repository)
    hub = need_package("huggingface_hub", "huggingface_hub", "--upload")
    with tempfile.TemporaryDirectory() as temporary:
        prepare(run, Path(temporary))
        try:
            api = hub.HfApi()
            api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=temporary, commit_message=f"run {run.name}")
        except Exception as error:
            raise hub_error(repository, error) from None
    size = run.summary["artifact_bytes"]
    return f"uploaded {ARTIFACT} ({size:,} bytes), {', '.join(FILES[1:])} and {CARD} to {repository}"


def download(repository: str, folder: Path) -> str:
    """The files of a run that was uploaded, checked."""
    check_repository(repository)
    hub = need_package("huggingface_hub", "huggingface_hub", "--download")
    if (folder / ARTIFACT).exists():
        raise ToolError(f"{relative(folder)} holds an artifact already: choose another folder")
    try:
        hub.snapshot_download(repository, local_dir=str(folder), allow_patterns=[*FILES, CARD])
    except Exception as error:
        raise hub_error(repository, error) from None
    try:
        summary = json_object((folder / "summary.json").read_bytes()) or {}
        digest = check_artifact(folder, summary)
    except FileNotFoundError as error:
        raise ToolError(f"{repository} has no {Path(error.filename).name}: no run was uploaded there "
                        "by this tool") from None
    write_atomic(folder / f"{ARTIFACT}.sha256", f"{digest}  {ARTIFACT}\n")
    score = f", {summary['val_bpb']:.6f} BPB by its summary" if "val_bpb" in summary else ""
    return (f"{relative(folder)} has {ARTIFACT} ({summary['artifact_bytes']:,} bytes{score}); to score it: "
            f"EVAL_ONLY_QUANTIZED_PATH={relative(folder / ARTIFACT)} python train_gpt.py")


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs, finished or not")
    add("--tensorboard", metavar="DIR", help="write event files there")
    add("--wandb", metavar="PROJECT", help="send them to this project")
    add("--upload", metavar="REPO", help="owner/name on the Hugging Face hub")
    add("--public", action="store_true", help="a new repository is for all to see")
    add("--download", nargs=2, metavar=("REPO", "FOLDER"), help="fetch what was uploaded")
    args = parser.parse_args(arguments)
    ways = [args.tensorboard, args.wandb, args.upload, args.download]
    if sum(map(bool, ways)) != 1:
        raise ToolError("say where to, once: --tensorboard DIR, --wandb PROJECT, --upload REPO "
                        "or --download REPO FOLDER")
    if args.download:
        if args.runs:
            raise ToolError(f"--download takes no RUN ({args.runs[0]}): give the repository and a folder")
        print(download(args.download[0], Path(args.download[1])))
        return 0
    return take_out(args)


def take_out(args: argparse.Namespace) -> int:
    """The runs that are named, to where it was said."""
    if not args.runs:
        raise ToolError("no run is named: give the folder of one, such as runs/NAME")
    runs = [load_run(folder, finished=False) for folder in args.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ToolError(f"two of the runs are called {max(names, key=names.count)}: export them one by one")
    if args.tensorboard:
        print(to_tensorboard(runs, Path(args.tensorboard)))
    elif args.wandb:
        print(to_wandb(runs, args.wandb))
    elif len(runs) > 1:
        raise ToolError(f"--upload {args.upload} takes one run, {len(runs)} are named: a repository each")
    else:
        print(upload(runs[0], args.upload, args.public))
    return 0


if __name__ == "__main__":
    run_cli(main)
