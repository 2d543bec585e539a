"""What the tools share: errors a user can act on, atomic writes, tables, and the files of a run.

A run's folder holds train.log (text, with the source of the script), metrics.jsonl (one object per event) and
summary.json; final_model.int6.ptz is the artifact. See train_gpt.py for who writes what.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import lzma
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
ARTIFACT = "final_model.int6.ptz"
ARTIFACT_LIMIT = 16_000_000  # bytes of script and artifact together, the competition's cap
FULL_TEXT = 100_000_000  # bytes; fewer are not the competition's 50,000 documents
OWN_TO_EACH_RUN = ("SEED", "RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH")
UNLIKE_IS_FINE = {*OWN_TO_EACH_RUN, "TRAIN_LOG_EVERY", "EVAL_ONLY_PATH", "EVAL_ONLY_QUANTIZED_PATH"}
STAGES = (  # what is scored in the course of a run, and its key in summary.json
    ("averaged weights", "prequant_val_bpb"),
    ("quantised", "quantized_val_bpb"),
    ("sliding windows", "sliding_val_bpb"),
    ("final", "val_bpb"),
)
SOURCE_END = "\n" + "=" * 100 + "\n"
PACKED_START = b"# coding: latin-1\n"  # how a self-extracting script begins
PACKED_FORM = re.compile(  # all of it: the compressed text and its filters are literals
    re.escape(PACKED_START.decode() + "import lzma,linecache\n")
    + r"""s=lzma\.decompress\((".*")\.encode\('latin-1'\),3,None,(\[.*\])\)\.decode\(\)\n"""
    + re.escape("n=__file__+'#'\nlinecache.cache[n]=(len(s),None,s.splitlines(True),n)\n"
                "exec(compile(s,n,'exec'))\n"))


class ToolError(Exception):
    """A mistake the user can repair: its text names value, bound and remedy, and is shown alone."""


def command_line(text: str) -> argparse.ArgumentParser:
    """A parser whose --help shows `text` as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


class Seeds(argparse.Action):
    """The option --seeds 1 2 3, or 1,2,3, as a list of int; give it nargs="+"."""

    def __call__(self, parser, namespace, values, option=None):
        words = ",".join(values).split(",")
        if not all(re.fullmatch(r"\d+", word) for word in words) or len(set(words)) < len(words):
            raise ToolError(f"{option} {' '.join(values)}: give every seed once, as 1 2 3 or 1,2,3, "
                            "and put other words before the option")
        setattr(namespace, self.dest, [int(word) for word in words])


def run_cli(main) -> None:
    """Run `main()` as a command: a ToolError or an OSError becomes one line and status 2, Ctrl-C 130."""
    try:
        sys.exit(main())
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as in … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        place = f" ({relative(error.filename)})" if error.filename else ""
        print(f"error: {error.strerror}{place}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def need(module: str, purpose: str):
    """Import a library, or a ToolError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ToolError(f"{purpose} needs the package {module.split('.')[0]} ({error}): "
                        ". .venv/bin/activate, or pip install -r tools/requirements.txt") from None


def error_line(text: str) -> str:
    """Why a program failed, by what it said: its last `error: …` line, else its last
    exception, else its last line. torchrun's own account of a failed rank tells less."""
    lines = [line.split("\r")[-1].strip() for line in text.splitlines()]
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines if line]
    own = [line for line in lines if re.match(r"(error|interrupted): |(FAIL|WRONG) ", line)]
    raised = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Exit|Interrupt)\b(: |$)", line)
              and "ChildFailedError" not in line]
    best = (own or raised or lines or ["it said nothing"])[-1]
    return best[:300]


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write a file completely or not at all."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
            os.chmod(temp, 0o644)
            os.replace(temp, path)
        except BaseException:
            os.unlink(temp)
            raise
    except OSError as error:
        raise ToolError(
            f"cannot write {relative(path)}: {error.strerror}; choose another place or free space") from None
    return path


def relative(path: Path | str) -> str:
    """A path as it is shown and written: relative to the working folder, else its last two parts."""
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    try:
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return Path(*path.parts[-2:]).as_posix() if len(path.parts) > 2 else path.name


def table(head: Sequence[str], rows: Iterable[Sequence], markdown: bool = False) -> str:
    """Text table, columns aligned (right where every cell looks like a number)."""
    rows = [[str(c) for c in row] for row in rows]
    right = [bool(rows) and all(re.fullmatch(r"[-+−<]?[\d.,eE+-]+%?|[-–]?", row[i]) for row in rows)
             for i in range(len(head))]
    width = [max(len(line[i]) for line in [list(head), *rows]) for i in range(len(head))]

    def line(cells):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, width, right, strict=False)]
        return "| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip()

    rule = (["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(width, right, strict=False)] if markdown
            else ["-" * w for w in width])
    return "\n".join([line(head), line(rule), *map(line, rows)])


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, read once."""

    folder: Path
    summary: dict
    events: tuple[dict, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def seed(self) -> int:
        return self.summary.get("seed", -1)

    def of(self, event: str) -> list[dict]:
        """Every event of one kind, in order."""
        return [e for e in self.events if e.get("event") == event]

    def last(self, event: str) -> dict:
        """The last event of one kind; empty when there is none."""
        return next((e for e in reversed(self.events) if e.get("event") == event), {})

    def losses(self) -> dict[int, float]:
        """The loss of every step that the events have, by step; without those that are not finite."""
        found = {}
        for event in self.of("losses"):
            first = event["step"] - len(event["losses"]) + 1
            found.update((first + i, x) for i, x in enumerate(event["losses"]) if x is not None)
        return found

    @functools.cached_property
    def log(self) -> str:
        """train.log, or a ToolError."""
        try:
            return (self.folder / "train.log").read_bytes().decode()
        except OSError as error:
            raise ToolError(f"{relative(self.folder)} has no train.log ({error.strerror}): "
                            "give the folder of a finished run") from None

    def source(self) -> bytes:
        """The script as it stands in train.log: what really ran."""
        begin = re.search(r"^code bytes=\d+.*\n", self.log, re.M)
        end = self.log.find(SOURCE_END, begin.end()) if begin else -1
        if end < 0:
            raise ToolError(f"{relative(self.folder / 'train.log')} does not hold the script's source: "
                            "it is cut or of another script")
        text = self.log[begin.end() : end]
        return text.encode("latin-1" if text.startswith(PACKED_START.decode()) else "utf-8")


def read_events(path: Path) -> tuple[dict, ...]:
    """The events of a metrics.jsonl; a last line that is still being written is left out.

    Raises ToolError where the file cannot be read, or a line is no JSON object in UTF-8.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ToolError(f"cannot read {relative(path)}: {error.strerror}; give the folder of a run") from None
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        event = json_object(line)
        if event is not None:
            events.append(event)
        elif number < len(lines):
            raise ToolError(f"line {number} of {relative(path)} is no JSON object: the file is damaged")
    return tuple(events)


def json_object(text: bytes) -> dict | None:
    """The JSON object that is written there in UTF-8; None if it is anything else, or nested too deeply."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) else None


def load_run(folder: Path | str, finished: bool = True) -> RunFiles:
    """A run's summary and events. `finished`: insist on the log's final line, and on a summary.json,
    which is written after every stage, that has all which this line names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ToolError(f"{relative(folder)} is no folder: give the folder of a run, such as runs/NAME")
    try:
        known = json_object((folder / "summary.json").read_bytes())
    except OSError:
        if finished:
            raise ToolError(f"{relative(folder)} has no summary.json: the run did not finish") from None
        known = {}
    if known is None:
        raise ToolError(f"{relative(folder / 'summary.json')} is no JSON object: the file is damaged")
    summary = {key: value for key, value in known.items() if value is not None}  # None: not reached
    run = RunFiles(folder, summary, read_events(folder / "metrics.jsonl"))
    if finished and not is_finished(run):
        raise ToolError(f"{relative(folder)} has no final line of its last run: the run did not finish")
    return run


def is_finished(run: RunFiles) -> bool:
    """The last run in the log came to its final line, and summary.json is of its end, not of a stage."""
    ends = [e for e in run.events if e.get("event") in ("start", "final")]
    said = set(ends[-1]) - {"event", "time"} if ends else set()
    return bool(ends) and ends[-1]["event"] == "final" and said <= set(run.summary)


def as_environment(settings: dict) -> dict[str, str]:
    """The settings of a summary.json as environment variables."""
    return {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in settings.items()}


def published() -> dict:
    """Published results per seed, by name (pr1855, …)."""
    data = json.loads((Path(__file__).parent / "published.json").read_text())
    return {k: v for k, v in data.items() if isinstance(v, dict)}


@contextmanager
def script_module(source: bytes, name: str):
    """A trainer's source as a module, which is forgotten after; importing does no work."""
    need("torch", "a script's own functions")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_bytes(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise ToolError(f"the script cannot be imported ({reason})") from None
            yield module
        finally:
            del sys.modules[name]


def unpack_script(script: bytes) -> bytes:
    """The source inside a self-extracting script, of which nothing is run; a readable one
    is its own. Raises ToolError for any other unpacker than the one train_gpt.py writes."""
    if not script.startswith(PACKED_START):
        return script
    refusal = ToolError("the packed script is not of the form that train_gpt.py writes: "
                        "run the readable one")
    found = PACKED_FORM.fullmatch(script.decode("latin-1"))
    if not found:
        raise refusal
    try:
        packed, filters = map(ast.literal_eval, found.groups())
        return lzma.decompress(packed.encode("latin-1"), lzma.FORMAT_RAW, None, filters)
    except (ValueError, SyntaxError, TypeError, lzma.LZMAError):
        raise refusal from None


def write_shard(tg, path: Path, values) -> None:
    """Token ids, or bytes by token (n,), as a shard of the trainer `tg`."""
    header = tg.np.zeros(tg.SHARD_HEADER, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(values)
    path.write_bytes(header.tobytes() + values.astype("<u2").tobytes())
