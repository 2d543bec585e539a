"""Does a run keep the contest's rules? Probes on its artifact, and what its files say:
PASS or FAIL.

    python tools/audit.py runs/demo/final_model.int6.ptz               # the script as the run's log holds it
    python tools/audit.py runs/demo/final_model.int6.ptz my_script.py  # another one
    python tools/audit.py ARTIFACT --out report.md --full              # every byte of the data, too
    python tools/audit.py ARTIFACT --read learn Trainer.update         # changes that you have looked at

The probes (C1-C4, see train_gpt.py) run on the artifact's weights through the script's
own scoring functions, with the settings of the summary.json beside the artifact, or of
the environment when there is none. They and the ledger are always those of this
repository: a script cannot vouch for itself. What leaves no trace in an artifact
(validation tokens read while the model was made) is looked for in the script: every
definition that differs from this repository's train_gpt.py is named, and those that
guard the rules fail the audit until somebody has read them by eye and says so with
--read. From the run's files: coverage, arithmetic of the score, budgets, sizes,
compliance flags, and the data where it can be reached (DATA_PATH and TOKENIZER_PATH of
the environment come before the run's).

Writes a report beside the artifact (audit.md). Exit status: 0 PASS, 1 FAIL, 2 a mistake
in the call.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import functools
import hashlib
import importlib.util
import lzma
import math
import os
import re
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

if __package__ in (None, ""):  # run as a script: make `tools` and `data` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    ARTIFACT,
    ARTIFACT_LIMIT,
    SCRIPT,
    RunFiles,
    ToolError,
    load_run,
    need,
    relative,
    run_cli,
    write_atomic,
)
from tools.make_record import pack_script

BUDGET_SECONDS, VAL_DOCUMENTS = 600.0, 50_000
PATHS = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH")
# this repository's own, as is every probe_*
JUDGES = ("Booked", "LedgerError", "Ledger", "Finding", "run_probes", "weights_kept")
# Whatever these chapters of train_gpt.py define guards the rules: no probe of an artifact can speak for it.
CHAPTERS = ("Run", "Data", "Training", "Score", "Adapt", "Checks", "Main")
GUARDS = ("calibrate", "calibrate_logits", "fit_calibration", "quantise_to_fit", "code_bytes", "check_size",
          "Settings.from_env", "UserError", "ARTIFACT_LIMIT", "BOS", "imports", "statements")
# A change that makes use of one of these, or of a guard, guards the rules too, wherever it stands.
DOORS = ("stream", "sealed", "ledgers", "target_bytes", "open", "Path", "fromfile", "memmap", "load", "os",
         "sys", "io", "exec", "eval", "compile", "getattr", "setattr", "globals", "vars", "inspect",
         "importlib", "__import__", "__dict__", "gc")
CONDITIONS = {
    "C1": "The prediction of a token depends on the artifact and the tokens before it only.",
    "C2": "It is a full distribution over the vocabulary, fixed before the token is revealed.",
    "C3": "A token is scored before anything learns from it.",
    "C4": "One pass from left to right: each token is scored exactly once.",
}
METHOD = {
    "C1": "every later token of a made-up stream is changed; earlier losses must be equal bit by bit",
    "C2": "every token of the vocabulary is scored as the next one; probabilities must sum to 1 within 1e-4",
    "C3": "the ledger refuses a step on targets that are not on its books",
    "C4": "the ledger refuses to enter a target twice, and to close with one missing",
}


class Check(NamedTuple):
    """One row of the report. ok None: could not be looked at, or only worth knowing."""

    section: str
    what: str
    ok: bool | None
    figure: str


class Audit(NamedTuple):
    """What is audited: the artifact, its run (None when it stands alone), the script
    and the environment."""

    artifact: Path
    run: RunFiles | None
    script: bytes
    origin: str
    env: dict


# --- the script, and the judges


@contextmanager
def module_of(source: bytes, name: str):
    """A script as a module; importing it does no work."""
    need("torch", "the audit")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_bytes(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                raise ToolError(f"the script cannot be imported ({type(error).__name__}: {error})") from None
            yield module
        finally:
            del sys.modules[name]


def put_judges(module, trusted) -> None:
    """Give the audited module the ledger and the probes of `trusted`."""
    definitions = [n for n in ast.parse(SCRIPT.read_bytes()).body
                   if isinstance(n, (ast.FunctionDef, ast.ClassDef))]

    def define(nodes: list) -> None:
        flag = __future__.annotations.compiler_flag
        exec(compile(ast.Module(nodes, []), trusted.__file__, "exec", flag, True), vars(module))

    define([n for n in definitions if n.name in JUDGES or n.name.startswith("probe_")])
    validation = next(n for n in definitions if n.name == "Validation")
    made_up = next(n for n in validation.body if isinstance(n, ast.FunctionDef) and n.name == "of")
    made_up.decorator_list = []
    define([made_up])
    module.Validation.of = classmethod(vars(module).pop("of"))


def probe(audit: Audit) -> list[Check]:
    """The four conditions on the artifact's weights, and the data. The audited script
    is imported last, so that the kernels it registers are its own."""
    with module_of(SCRIPT.read_bytes(), "trusted_script") as trusted:
        with module_of(audit.script, "audited_script") as tg:
            try:
                put_judges(tg, trusted)
                s = tg.Settings.from_env(audit.env)
                world = tg.World.join({})
                tg.set_up(s, world)
                model = tg.build_model(s, world)
                mark = tg.open_artifact(s, world, model, audit.artifact)[1]
            except (AttributeError, NameError) as error:
                raise ToolError(f"{audit.origin} is no script of this kind ({error})") from None
            except tg.UserError as error:
                raise ToolError(str(error)) from None
            marked = [Check("flags", "the artifact calls itself compliant", False, mark)] if mark else []
            data = data_checks(trusted, s.val_doc_fraction == 1, audit)
            return [*judged(tg, s, world, model), *marked, *data]


def judged(tg, s, world, model) -> list[Check]:
    """What the probes find; a refusal of the ledger, or any other failure, is a finding."""
    try:
        found = tg.run_probes(s, world, model)
    except Exception as error:
        why = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
        return [Check("conditions", "probes", False, why)]
    return [Check("conditions", p.name, p.ok, p.figure) for p in found]


# --- the script against this repository's


def shell_of(source: bytes) -> tuple[str, str]:
    """(a self-extracting script's code without its longest text, that text)."""
    tree = ast.parse(source)
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    longest = max(texts, key=lambda n: len(n.value))
    text, longest.value = longest.value, ""
    return ast.dump(tree), text


def unpacked(source: bytes) -> bytes:
    """The readable script inside a self-extracting one, of which nothing is run; others
    as they are, also those that another unpacker than this repository's surrounds."""
    if not source.startswith(b"# coding: latin-1\n"):
        return source
    with module_of(SCRIPT.read_bytes(), "trusted_script") as trusted:
        try:
            shell, text = shell_of(source)
            if shell == shell_of(trusted.self_extracting(b"x" * 999))[0]:
                return lzma.decompress(text.encode("latin-1"), lzma.FORMAT_RAW, None, trusted.SCRIPT_FILTERS)
        except (ValueError, SyntaxError, lzma.LZMAError):
            pass
    return source


class Definitions:
    """What a script defines: per name (Class.method for what a class holds; imports;
    statements) its syntax, without docstrings and comments."""

    def __init__(self, source: bytes):
        self.nodes, self.syntax = defaultdict(list), defaultdict(list)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise ToolError(f"the script cannot be read ({error})") from None
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if documented and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        self.collect(tree.body, "")

    def collect(self, body: list, owner: str) -> None:
        """Enter the statements of the module, or of the class `owner`."""
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.enter(f"{owner}.{node.name}" if owner else node.name, node)
            elif isinstance(node, ast.ClassDef) and not owner:
                inside, node.body = node.body, []
                self.enter(node.name, node)
                self.collect(inside, node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(targets[0], ast.Name):
                for name in map(ast.unparse, targets):
                    self.enter(f"{owner}.{name}" if owner else name, node)
            elif isinstance(node, ast.If) and not owner and not node.orelse:
                inside, node.body = node.body, []       # definitions for where Triton is
                self.enter("statements", node)
                self.collect(inside, "")
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and not owner:
                self.enter("imports", node)
            else:
                self.enter(owner or "statements", node)

    def enter(self, name: str, node: ast.AST) -> None:
        """Note one definition; of a name that is defined twice both count, in their order."""
        self.nodes[name].append(node)
        self.syntax[name].append(ast.dump(node))

    def uses(self, name: str) -> set[str]:
        """The names and attributes that a definition mentions."""
        inside = [n for node in self.nodes.get(name, ()) for n in ast.walk(node)]
        return {n.id if isinstance(n, ast.Name) else n.attr for n in inside
                if isinstance(n, (ast.Name, ast.Attribute))}


@functools.cache
def definitions_here() -> tuple[Definitions, set[str]]:
    """Those of this repository's script, and the names among them that guard the rules:
    GUARDS, and all that CHAPTERS define."""
    whole = SCRIPT.read_bytes()
    parts = re.split(r"^# \d+  (\w+).*$", whole.decode(), flags=re.M)
    chapters = {title: text for title, text in zip(parts[1::2], parts[2::2])}
    named = (Definitions(chapters[title].encode()).syntax for title in CHAPTERS)
    return Definitions(whole), {*GUARDS, *(name for names in named for name in names)}


def script_rows(script: bytes, read: list[str]) -> list[Check]:
    """The definitions that differ from this repository's script. read: names of those
    read by eye."""
    (ours, guards), theirs = definitions_here(), Definitions(unpacked(script))
    names = dict.fromkeys([*ours.syntax, *theirs.syntax])
    changed = [n for n in names if ours.syntax.get(n) != theirs.syntax.get(n)]
    for name in read:
        if not any(name in (n, n.split(".")[0]) for n in changed):
            raise ToolError(f"--read {name}: nothing of that name differs from this repository's script")
    watched = guards | set(DOORS)

    def guarding(name: str) -> bool:
        new_uses = theirs.uses(name) - ours.uses(name)
        return name in guards or name.split(".")[0] in guards or bool(watched & new_uses)

    eyed = [n for n in changed if n in read or n.split(".")[0] in read]
    unread = [n for n in changed if guarding(n) and n not in eyed]
    others = [n for n in changed if n not in eyed and n not in unread]
    what, figure = "definitions that guard the rules", "as in this repository's script"
    if unread:
        figure = f"{', '.join(unread)}: not this repository's; read these by eye, then pass --read NAME…"
    elif eyed:
        figure += ", but for those read by eye"
    rows = [Check("script", what, not unread, figure)]
    for label, found in (("read by eye, says --read", eyed), ("other definitions that differ", others)):
        if found:
            rows.append(Check("script", label, None, ", ".join(found)))
    return rows


# --- what the run's files say


def conditions_logged(run: RunFiles) -> list[Check]:
    """The probes that the run itself made before its evaluation."""
    logged = run.summary.get("probes") or {}
    bad = [f"{name}: {p['figure']}" for name, p in logged.items() if not p["ok"]]
    if not logged:
        return [Check("conditions", "probes of the run itself", None, "none in its summary")]
    return [Check("conditions", "probes of the run itself", not bad,
                  "; ".join(bad) or f"all {len(logged)} passed before its evaluation")]


def coverage(run: RunFiles) -> list[Check]:
    """Every target once, and the one formula."""
    s, event = run.summary, run.last("coverage")
    checks = []
    promised = next((e["detail"] for e in reversed(run.of("check")) if e["what"] == "validation shards"), "")
    targets = promised.split(" ")[0].replace(",", "")
    scored, said = s.get("tokens_scored"), event.get("targets")
    complete = bool(event.get("complete")) and said == scored and scored
    figure = "the log has no coverage"
    if said:
        figure = f"{said:,} targets, {event.get('documents', 0):,} documents"
    checks.append(Check("coverage", "every target scored once", bool(complete), figure))
    if targets.isdigit() and scored:
        checks.append(Check("coverage", "targets of the validation shards", int(targets) == scored,
                            f"{scored:,} scored of {int(targets):,}"))
    if scored and s.get("bytes_scored") and s.get("val_bpb"):
        bpb = s["val_loss"] / math.log(2) * scored / s["bytes_scored"]
        checks.append(Check(
            "coverage", "arithmetic of the score", math.isclose(bpb, s["val_bpb"], rel_tol=1e-9),
            f"{s['val_loss']:.6f} nats x {scored:,} targets / ln 2 / {s['bytes_scored']:,} bytes = "
            f"{bpb:.8f}, summary {s['val_bpb']:.8f}"))
    fraction, documents = s["settings"].get("VAL_DOC_FRACTION", 1), event.get("documents")
    checks.append(Check("coverage", "whole validation set", fraction == 1, f"VAL_DOC_FRACTION={fraction:g}"))
    official = None if documents != VAL_DOCUMENTS else True
    checks.append(Check("coverage", "the contest's 50,000 documents", official,
                        f"{documents:,} documents" if documents else "unknown"))
    return checks


def budgets(run: RunFiles) -> list[Check]:
    """Training with everything up to the artifact, and evaluation, in 600 s each."""
    checks = []
    for what, key in (("training, calibration and packing", "train_seconds"), ("evaluation", "eval_seconds")):
        seconds = run.summary.get(key)
        ok, figure = None, "not in this run"
        if seconds is not None:
            ok, figure = seconds <= BUDGET_SECONDS, f"{seconds:.1f} s of {BUDGET_SECONDS:g} s"
        checks.append(Check("budgets", what, ok, figure))
    given_up = run.of("watchdog") + run.of("give_up")
    if given_up:
        what = given_up[-1].get("what", "something")
        checks.append(Check("budgets", "given up by the watchdog", None, what))
    return checks


def sizes(audit: Audit) -> list[Check]:
    """Artifact and script: under the limit, and the ones that were counted and run."""
    artifact, run = audit.artifact.stat().st_size, audit.run
    packed = run is not None and run.summary.get("code_form") == "packed"
    script = len(pack_script(audit.script) if packed else audit.script)
    checks = [Check("sizes", "artifact + script", artifact + script <= ARTIFACT_LIMIT,
                    f"{artifact:,} + {script:,}{' (packed)' * packed} = {artifact + script:,} of "
                    f"{ARTIFACT_LIMIT:,} bytes")]
    if run is None:
        return checks
    said = run.summary.get("artifact_bytes")
    checks.append(Check("sizes", "the artifact that the run counted", said == artifact,
                        f"{artifact:,} bytes, summary {said if said is None else format(said, ',')}"))
    ran, digest = run.last("code").get("sha256"), hashlib.sha256(audit.script).hexdigest()
    checks.append(Check("sizes", "the script that ran", None if ran is None else ran == digest,
                        f"SHA-256 {digest[:16]}…, log {'unknown' if ran is None else ran[:16] + '…'}"))
    return checks


def flags(run: RunFiles) -> list[Check]:
    """What the run says about itself."""
    s = run.summary
    logged = [e.get("reason", "") for e in run.of("NON-COMPLIANT")]
    reasons = "; ".join(dict.fromkeys([*(s.get("not_compliant_because") or ()), *logged]))
    ok = s.get("compliant") is True and not reasons
    figure = reasons or ("yes" if ok else "no: it used a mode that breaks the rules")
    checks = [Check("flags", "the run calls itself compliant", ok, figure)]
    settings, changed = s["settings"], run.last("changed_settings")
    if settings.get("TTT_ENABLED"):
        order = settings.get("TTT_DOC_ORDER")
        how = {"stream": "nothing later in the stream influences an earlier document",
               "length": "longest documents first, as in the field: C1 holds in the order of scoring"}
        checks.append(Check("flags", f"TTT_DOC_ORDER={order}", None, how.get(order, "unknown")))
    names = [k for k in changed if k not in ("event", "time", "SEED", "RUN_ID")]
    checks.append(Check("flags", "machine", None, f"{s.get('world_size')} x {s.get('device')}"))
    text = ", ".join(f"{k}={changed[k]}" for k in names)
    checks.append(Check("flags", "settings changed", None, text or "none"))
    return checks


def data_checks(tg, whole: bool, audit: Audit) -> list[Check]:
    """The folder of shards: manifest, split, overlap, byte counts; not looked at where
    it is out of reach."""
    known = (*PATHS, "VOCAB_SIZE", "CASEOPS_ENABLED", "DATA_CHECK")
    s = tg.Settings.from_env({k: audit.env[k] for k in known if k in audit.env})
    if not any(s.shards.glob("fineweb_val_*.bin")):
        return [Check("data", "shards", None, "out of reach: set DATA_PATH and TOKENIZER_PATH to check them")]
    checks = [finding("data", "validation shards and bytes", lambda: tg.check_validation(s), tg),
              finding("data", "manifest, split, overlap", lambda: tg.check_manifest(s), tg)]
    said = audit.run.summary.get("bytes_scored") if audit.run and whole else None
    if said is not None and checks[0].ok:
        val = tg.Validation(s)
        count = int(val.target_bytes.sum())
        checks.append(Check("data", "bytes that the score divides by", said == count,
                            f"{count:,} by {val.rule}, summary {said:,}"))
    logged = audit.run.summary.get("data_fingerprint") if audit.run else None
    if logged and checks[1].ok:
        same = logged == checks[1].figure
        checks.append(Check("data", "the data of the run", same, f"fingerprint {logged}"))
    return checks + data_tool(s.shards, s.tokenizer, s.data_check == "full")


def data_tool(folder: Path, tokenizer: Path, full: bool) -> list[Check]:
    """data/check.py on the folder: headers, sidecar against tokens, hashes."""
    from data import check as data_check

    report = data_check.check(folder, tokenizer, full=full, custom=True)
    first = "; ".join(map(str, report.findings[:2]))
    return [Check("data", f"data/check.py{'' if full else ' --quick'}", not report.findings,
                  first or f"no findings, {sum(report.tokens.values()):,} tokens")]


def finding(section: str, what: str, look: Callable[[], str], tg) -> Check:
    """A check of the trainer's as a row."""
    try:
        return Check(section, what, True, look())
    except tg.UserError as error:
        return Check(section, what, False, str(error))


# --- the whole


def open_audit(args: argparse.Namespace) -> Audit:
    """Everything that is looked at, or a ToolError."""
    artifact = Path(args.artifact)
    if artifact.is_dir():
        artifact = artifact / ARTIFACT
    if not artifact.is_file():
        raise ToolError(f"{relative(artifact)} does not exist: give a run's {ARTIFACT}")
    alone = not (artifact.parent / "summary.json").is_file()
    run = None if alone else load_run(artifact.parent)
    if run and "settings" not in run.summary:
        shown = relative(artifact.parent / "summary.json")
        raise ToolError(f"{shown} has no settings: the run did not finish")
    if args.script:
        path = Path(args.script)
        if not path.is_file():
            raise ToolError(f"{relative(path)} does not exist: give the script that made the artifact")
        script, origin = path.read_bytes(), relative(path)
    elif run:
        script, origin = run.source(), "the script in train.log"
    else:
        script, origin = SCRIPT.read_bytes(), "this repository's script"
    if run:
        env = {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in run.summary["settings"].items()}
        env.update({k: os.environ[k] for k in PATHS if os.environ.get(k)})
        env.update(EVAL_ONLY_PATH="", EVAL_ONLY_QUANTIZED_PATH="")
    else:
        env = dict(os.environ)
    env["DATA_CHECK"] = "full" if args.full else "quick"
    return Audit(artifact, run, script, origin, env)


def look(audit: Audit) -> list[Check]:
    """Every check, in the order of the report."""
    found = probe(audit)
    conditions = [c for c in found if c.section == "conditions"]
    files = [Check("files", "summary.json, metrics.jsonl, train.log", None, "none beside the artifact")]
    if audit.run:
        files = [*conditions_logged(audit.run), *coverage(audit.run), *budgets(audit.run), *flags(audit.run)]
    rest = [c for c in found if c.section != "conditions"]      # the artifact's own mark, and the data
    return [*conditions, *files, *sizes(audit), *rest]


def report_text(audit: Audit, checks: list[Check], headline: str) -> str:
    """The report, in markdown."""
    score = audit.run.summary.get("val_bpb") if audit.run else None
    judge = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    lines = [f"# Compliance: {relative(audit.artifact)}", "", f"**{headline}**", "",
             f"Script: {audit.origin}, {len(audit.script):,} bytes. "
             + (f"Score: {score:.8f} BPB. " if score else "")
             + f"Probes and ledger: this repository's (SHA-256 {judge[:16]}…).", "",
             "| condition | what it asks | how it was tried |", "| --- | --- | --- |"]
    lines += [f"| {c} | {text} | {METHOD[c]} |" for c, text in CONDITIONS.items()]
    mark = {True: "ok", False: "**FAIL**", None: "note"}
    for section in dict.fromkeys(c.section for c in checks):
        rows = [c for c in checks if c.section == section]
        lines += ["", f"## {section.capitalize()}", "", "| | check | figure |", "| --- | --- | --- |"]
        lines += [f"| {mark[c.ok]} | {c.what} | {c.figure.replace('|', '/')} |" for c in rows]
    return "\n".join(lines) + "\n"


def main(arguments=None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", help=f"a run's {ARTIFACT}, or its folder")
    parser.add_argument("script", nargs="?", help="the script (default: as the run's train.log holds it)")
    parser.add_argument("--out", help="where the report goes (default: audit.md beside the artifact)")
    parser.add_argument("--read", nargs="+", action="extend", default=[], metavar="NAME",
                        help="definitions of the script (a class: all of it) that you have read by eye")
    parser.add_argument("--full", action="store_true", help="read every byte of the data")
    args = parser.parse_args(arguments)
    audit = open_audit(args)
    checks = [*look(audit), *script_rows(audit.script, args.read)]
    failed, passed = [c for c in checks if c.ok is False], [c for c in checks if c.ok]
    proofs = ("conditions", "script")
    shown = failed or [c for c in passed if c.section in proofs or c.what == "artifact + script"]
    headline = (f"FAIL: {len(failed)} of {len(failed) + len(passed)} checks" if failed else
                f"PASS: {len(passed)} checks") + f", {len(checks) - len(failed) - len(passed)} notes"
    out = Path(args.out or audit.artifact.parent / "audit.md")
    path = write_atomic(out, report_text(audit, checks, headline))
    for c in shown:
        print(f"{'FAIL' if failed else 'PASS'}  {c.what}: {c.figure}")
    print(f"{headline}; report: {relative(path)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
