"""Does a run keep the contest's rules? Probes on its artifact, and its files: PASS or FAIL.

    python tools/audit.py ARTIFACT                  # the script as the run's log holds it
    python tools/audit.py ARTIFACT my_script.py     # another one
    python tools/audit.py ARTIFACT --full --out report.md    # every byte of the data, too
    # changes that you have looked at:
    python tools/audit.py ARTIFACT --read train Trainer.update

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
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Callable, NamedTuple

if __package__ in (None, ""):  # run as a script: make `tools` and `data` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    ARTIFACT,
    ARTIFACT_LIMIT,
    SCRIPT,
    RunFiles,
    ToolError,
    as_environment,
    load_run,
    relative,
    run_cli,
    script_module,
    unpack_script,
    write_atomic,
)
from tools.make_record import counted_form, script_in_form

BUDGET_SECONDS = 600.0
VAL_DOCUMENTS = 50_000
PATHS = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH")
JUDGES = (  # this repository's own, as is every probe_*
    "Booked", "LedgerError", "Ledger", "Finding", "run_probes", "weights_kept",
)
# Whatever these chapters of train_gpt.py (the first words of their titles), and these sections of its
# part three, define guards the rules: no probe of an artifact can speak for it.
CHAPTERS = ("Story", "Training", "Score", "Adapt", "World", "Data", "Counts", "Probes",
            "Key", "Adapting")
SECTIONS = ("training", "adaptation", "data", "counts")
GUARDS = (
    "calibrate", "calibrate_logits", "fit_calibration", "quantise_to_fit", "code_bytes",
    "check_size", "Settings.from_env", "UserError", "ARTIFACT_LIMIT", "BOS", "imports",
    "statements",
)
# A change that makes use of one of these, or of a guard, guards the rules too.
DOORS = (
    "stream", "sealed", "ledgers", "target_bytes", "open", "Path", "fromfile", "memmap",
    "load", "os", "sys", "io", "exec", "eval", "compile", "getattr", "setattr", "globals",
    "vars", "inspect", "importlib", "__import__", "__dict__", "gc",
)
CONDITIONS = {
    "C1": "The prediction of a token depends on the artifact and the tokens before it only.",
    "C2": "It is a full distribution over the vocabulary, fixed before the token is revealed.",
    "C3": "A token is scored before anything learns from it.",
    "C4": "One pass from left to right: each token is scored exactly once.",
}
METHOD = {
    "C1": "every later token of a made-up stream is changed; "
          "earlier losses must be equal bit by bit",
    "C2": "every token of the vocabulary is scored as the next one; "
          "probabilities must sum to 1 within 1e-4",
    "C3": "the ledger refuses a step on targets that are not on its books",
    "C4": "the ledger refuses to enter a target twice, and to close with one missing",
}
ORDERS = {  # TTT_DOC_ORDER -> what it means for C1
    "stream": "nothing later in the stream influences an earlier document",
    "length": "longest documents first, as in the field: "
              "C1 holds in the order of scoring",
}


class Check(NamedTuple):
    """One row of the report. ok None: could not be looked at, or only worth knowing."""

    section: str
    what: str
    ok: bool | None
    figure: str


class Audit(NamedTuple):
    """What is audited: the artifact, its run, the script and the environment."""

    artifact: Path
    run: RunFiles | None  # None when the artifact stands alone
    script: bytes
    origin: str
    env: dict


# --- the script, and the judges


def put_judges(module, trusted) -> None:
    """Give the audited module the ledger and the probes of `trusted`."""

    def define(nodes: list) -> None:
        flag = __future__.annotations.compiler_flag
        tree = ast.Module(nodes, [])
        exec(compile(tree, trusted.__file__, "exec", flag, True), vars(module))

    judges = []
    for node in ast.parse(SCRIPT.read_bytes()).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if node.name in JUDGES or node.name.startswith("probe_"):
            judges.append(node)
        elif node.name == "Validation":
            validation = node
    define(judges)
    methods = [n for n in validation.body if isinstance(n, ast.FunctionDef)]
    made_up = next(n for n in methods if n.name == "of")
    made_up.decorator_list = []
    define([made_up])
    module.Validation.of = classmethod(vars(module).pop("of"))


def probe(audit: Audit) -> list[Check]:
    """The four conditions on the artifact's weights, and the data.

    The audited script is imported last, so that the kernels it registers are its own.
    """
    with (
        script_module(SCRIPT.read_bytes(), "trusted_script") as trusted,
        script_module(audit.script, "audited_script") as tg,
    ):
        try:
            put_judges(tg, trusted)
            s = tg.Settings.from_env(audit.env)
            world = tg.World.join({})
            tg.set_up(s, world)
            model = tg.build_model(s, world)
            mark = tg.open_artifact(s, world, model, audit.artifact)[1]
        except (AttributeError, NameError) as error:
            reason = f"{audit.origin} is no script of this kind ({error})"
            raise ToolError(reason) from None
        except tg.UserError as error:
            raise ToolError(str(error)) from None
        marked = []
        if mark:
            what = "the artifact calls itself compliant"
            marked.append(Check("flags", what, False, mark))
        data = data_checks(trusted, s.val_doc_fraction == 1, audit)
        return [*judged(tg, s, world, model), *marked, *data]


def judged(tg, s, world, model) -> list[Check]:
    """What the probes find; any failure, such as a refusal of the ledger, is a finding."""
    try:
        found = tg.run_probes(s, world, model)
    except Exception as error:
        plain = type(error) is RuntimeError
        why = str(error) if plain else f"{type(error).__name__}: {error}"
        return [Check("conditions", "probes", False, why)]
    return [Check("conditions", p.name, p.ok, p.figure) for p in found]


# --- the script against this repository's


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The same syntax tree; its docstrings are gone."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, documented):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


class Definitions:
    """What a script defines, per name: its syntax, without docstrings and comments.

    Names are Class.method for what a class holds, imports, and statements.
    """

    def __init__(self, source: bytes):
        self.nodes = defaultdict(list)
        self.syntax = defaultdict(list)
        try:
            tree = without_docstrings(ast.parse(source))
        except (SyntaxError, ValueError) as error:
            raise ToolError(f"the script cannot be read ({error})") from None
        self.collect(tree.body, "")

    def collect(self, body: list, owner: str) -> None:
        """Enter the statements of the module, or of the class `owner`."""
        prefix = f"{owner}." if owner else ""
        at_top = not owner
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            assigned = isinstance(node, (ast.Assign, ast.AnnAssign))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.enter(prefix + node.name, node)
            elif isinstance(node, ast.ClassDef) and at_top:
                inside, node.body = node.body, []
                self.enter(node.name, node)
                self.collect(inside, node.name)
            elif assigned and isinstance(targets[0], ast.Name):
                for target in targets:
                    self.enter(prefix + ast.unparse(target), node)
            elif isinstance(node, ast.If) and at_top and not node.orelse:
                inside, node.body = node.body, []  # definitions for where Triton is
                self.enter("statements", node)
                self.collect(inside, "")
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and at_top:
                self.enter("imports", node)
            else:
                self.enter(owner or "statements", node)

    def enter(self, name: str, node: ast.AST) -> None:
        """Note one definition; of a name defined twice both count, in their order."""
        self.nodes[name].append(node)
        self.syntax[name].append(ast.dump(node))

    def uses(self, name: str) -> set[str]:
        """The names and attributes that a definition mentions."""
        used = set()
        for definition in self.nodes.get(name, ()):
            for node in ast.walk(definition):
                if isinstance(node, ast.Name):
                    used.add(node.id)
                elif isinstance(node, ast.Attribute):
                    used.add(node.attr)
        return used


@functools.cache
def definitions_here() -> tuple[Definitions, set[str]]:
    """Those of this repository's script, and the names among them that guard the rules.

    These are GUARDS, and all that CHAPTERS and SECTIONS define.
    """
    whole = SCRIPT.read_bytes()
    system, _, lineage = whole.decode().partition("\n# PART THREE")
    chapters = re.split(r"^# \d+  (\w+).*$", system, flags=re.M)[1:]
    sections = re.split(r"^# --- (\w+).*$", lineage, flags=re.M)[1:]
    guards = set(GUARDS)
    for parts, guarding in ((chapters, CHAPTERS), (sections, SECTIONS)):
        texts = dict.fromkeys(parts[::2], "")
        for title, text in zip(parts[::2], parts[1::2]):
            texts[title] += text
        for title in guarding:
            guards.update(Definitions(texts[title].encode()).syntax)
    return Definitions(whole), guards


@functools.cache
def lean_definitions_here() -> Definitions:
    """Those of this repository's script in its lean form, without its part three."""
    with script_module(SCRIPT.read_bytes(), "trusted_script") as trusted:
        return Definitions(trusted.lean(SCRIPT.read_bytes()))


def definitions_like(script: bytes) -> Definitions:
    """Those of this repository's script, lean where the given one is."""
    lean = re.search(rb"^NO_SETTINGS\.update", script, re.M)      # of the names that are cut off
    return lean_definitions_here() if lean else definitions_here()[0]


def names_match(name: str, names) -> bool:
    """A definition is among the names, itself or by its class."""
    return name in names or name.split(".")[0] in names


def script_rows(script: bytes, read: list[str]) -> list[Check]:
    """The definitions that differ from this repository's script.

    read: names of those that somebody has read by eye.
    """
    try:
        source = unpack_script(script)
    except ToolError:  # another unpacker than ours: read as it stands
        source = script
    ours, guards = definitions_like(source), definitions_here()[1]
    theirs = Definitions(source)
    names = dict.fromkeys([*ours.syntax, *theirs.syntax])
    changed = [n for n in names if ours.syntax.get(n) != theirs.syntax.get(n)]
    for name in read:
        if not any(names_match(n, [name]) for n in changed):
            raise ToolError(f"--read {name}: nothing of that name differs "
                            "from this repository's script")
    watched = guards | set(DOORS)

    def guarding(name: str) -> bool:
        new_uses = theirs.uses(name) - ours.uses(name)
        return names_match(name, guards) or bool(watched & new_uses)

    seen = [n for n in changed if names_match(n, read)]
    unseen = [n for n in changed if n not in seen]
    unread = [n for n in unseen if guarding(n)]
    others = [n for n in unseen if n not in unread]
    figure = "as in this repository's script"
    if unread:
        figure = (f"{', '.join(unread)}: not this repository's; "
                  "read these by eye, then pass --read NAME…")
    elif seen:
        figure += ", but for those read by eye"
    rows = [Check("script", "definitions that guard the rules", not unread, figure)]
    if seen:
        rows.append(Check("script", "read by eye, says --read", None, ", ".join(seen)))
    if others:
        what = "other definitions that differ"
        rows.append(Check("script", what, None, ", ".join(others)))
    return rows


# --- what the run's files say


def conditions_logged(run: RunFiles) -> list[Check]:
    """The probes that the run itself made before its evaluation."""
    logged = run.summary.get("probes") or {}
    bad = [f"{name}: {p['figure']}" for name, p in logged.items() if not p["ok"]]
    ok, figure = not bad, "; ".join(bad)
    if not logged:
        ok, figure = None, "none in its summary"
    elif not bad:
        figure = f"all {len(logged)} passed before its evaluation"
    return [Check("conditions", "probes of the run itself", ok, figure)]


def promised_targets(run: RunFiles) -> int | None:
    """The targets that the check of the validation shards counted; None: not logged."""
    details = [e["detail"] for e in run.of("check") if e["what"] == "validation shards"]
    if not details:
        return None
    number = details[-1].split(" ")[0].replace(",", "")
    return int(number) if number.isdigit() else None


def score_check(s: dict) -> Check:
    """The score of a summary, worked out again from what it was made of."""
    nats, targets, nbytes = s["val_loss"], s["tokens_scored"], s["bytes_scored"]
    bpb = nats / math.log(2) * targets / nbytes
    figure = (f"{nats:.6f} nats x {targets:,} targets / ln 2 / {nbytes:,} bytes = "
              f"{bpb:.8f}, summary {s['val_bpb']:.8f}")
    ok = math.isclose(bpb, s["val_bpb"], rel_tol=1e-9)
    return Check("coverage", "arithmetic of the score", ok, figure)


def coverage(run: RunFiles) -> list[Check]:
    """Every target once, and the one formula."""
    s, event = run.summary, run.last("coverage")
    checks = []

    def add(what: str, ok: bool | None, figure: str) -> None:
        checks.append(Check("coverage", what, ok, figure))

    scored, said = s.get("tokens_scored"), event.get("targets")
    documents = event.get("documents")
    complete = bool(event.get("complete") and said == scored and scored)
    figure = "the log has no coverage"
    if said:
        figure = f"{said:,} targets, {documents or 0:,} documents"
    add("every target scored once", complete, figure)
    promised = promised_targets(run)
    if promised is not None and scored:
        figure = f"{scored:,} scored of {promised:,}"
        add("targets of the validation shards", promised == scored, figure)
    if scored and s.get("bytes_scored") and s.get("val_bpb"):
        checks.append(score_check(s))
    fraction = s["settings"].get("VAL_DOC_FRACTION", 1)
    add("whole validation set", fraction == 1, f"VAL_DOC_FRACTION={fraction:g}")
    official = True if documents == VAL_DOCUMENTS else None
    figure = f"{documents:,} documents" if documents else "unknown"
    add("the contest's 50,000 documents", official, figure)
    return checks


def budgets(run: RunFiles) -> list[Check]:
    """Training with everything up to the artifact, and evaluation, in 600 s each."""
    checks = []
    clocks = {
        "training, calibration and packing": "train_seconds",
        "evaluation": "eval_seconds",
    }
    for what, key in clocks.items():
        seconds = run.summary.get(key)
        ok, figure = None, "not in this run"
        if seconds is not None:
            ok = seconds <= BUDGET_SECONDS
            figure = f"{seconds:.1f} s of {BUDGET_SECONDS:g} s"
        checks.append(Check("budgets", what, ok, figure))
    given_up = run.of("watchdog") + run.of("give_up")
    if given_up:
        what = given_up[-1].get("what", "something")
        checks.append(Check("budgets", "given up by the watchdog", None, what))
    return checks


def sizes(audit: Audit) -> list[Check]:
    """Artifact and script: under the limit, and the ones that were counted and run."""
    run = audit.run
    artifact = audit.artifact.stat().st_size
    form = "readable" if run is None else counted_form(run)
    script = len(script_in_form(audit.script, form))
    total = artifact + script
    note = "" if form == "readable" else f" ({form})"
    figure = f"{artifact:,} + {script:,}{note} = {total:,} of {ARTIFACT_LIMIT:,} bytes"
    checks = [Check("sizes", "artifact + script", total <= ARTIFACT_LIMIT, figure)]
    if run is None:
        return checks
    said = run.summary.get("artifact_bytes")
    shown = said if said is None else f"{said:,}"
    figure = f"{artifact:,} bytes, summary {shown}"
    what = "the artifact that the run counted"
    checks.append(Check("sizes", what, said == artifact, figure))
    digest = hashlib.sha256(audit.script).hexdigest()
    ran = run.last("code").get("sha256")
    ok = None if ran is None else ran == digest
    logged = "unknown" if ran is None else ran[:16] + "…"
    figure = f"SHA-256 {digest[:16]}…, log {logged}"
    checks.append(Check("sizes", "the script that ran", ok, figure))
    return checks


def flags(run: RunFiles) -> list[Check]:
    """What the run says about itself."""
    s, settings = run.summary, run.summary["settings"]
    checks = []

    def add(what: str, ok: bool | None, figure: str) -> None:
        checks.append(Check("flags", what, ok, figure))

    logged = [e.get("reason", "") for e in run.of("NON-COMPLIANT")]
    because = s.get("not_compliant_because") or ()
    reasons = "; ".join(dict.fromkeys([*because, *logged]))
    ok = s.get("compliant") is True and not reasons
    said = "yes" if ok else "no: it used a mode that breaks the rules"
    add("the run calls itself compliant", ok, reasons or said)
    if settings.get("TTT_ENABLED"):
        order = settings.get("TTT_DOC_ORDER")
        add(f"TTT_DOC_ORDER={order}", None, ORDERS.get(order, "unknown"))
    add("machine", None, f"{s.get('world_size')} x {s.get('device')}")
    left_out = ("event", "time", "SEED", "RUN_ID")
    changed = run.last("changed_settings").items()
    text = ", ".join(f"{k}={v}" for k, v in changed if k not in left_out)
    add("settings changed", None, text or "none")
    return checks


def data_checks(tg, whole: bool, audit: Audit) -> list[Check]:
    """The folder of shards, where it can be reached: split, overlap, byte counts.

    whole: all documents were scored, so that bytes can be compared.
    """
    known = {*PATHS, "VOCAB_SIZE", "CASEOPS_ENABLED", "DATA_CHECK"}
    s = tg.Settings.from_env({k: v for k, v in audit.env.items() if k in known})
    if not any(s.shards.glob("fineweb_val_*.bin")):
        figure = "out of reach: set DATA_PATH and TOKENIZER_PATH to check them"
        return [Check("data", "shards", None, figure)]
    summary = audit.run.summary if audit.run else {}
    what = "validation shards and bytes"
    shards = finding("data", what, lambda: tg.check_validation(s), tg)
    what = "manifest, split, overlap"
    manifest = finding("data", what, lambda: tg.check_manifest(s), tg)
    checks = [shards, manifest]
    said = summary.get("bytes_scored") if whole else None
    if said is not None and shards.ok:
        val = tg.Validation(s)
        count = int(val.target_bytes.sum())
        figure = f"{count:,} by {val.rule}, summary {said:,}"
        what = "bytes that the score divides by"
        checks.append(Check("data", what, said == count, figure))
    logged = summary.get("data_fingerprint")
    if logged and manifest.ok:
        same = logged == manifest.figure
        figure = f"fingerprint {logged}"
        checks.append(Check("data", "the data of the run", same, figure))
    return checks + data_tool(s.shards, s.tokenizer, s.data_check == "full")


def data_tool(folder: Path, tokenizer: Path, full: bool) -> list[Check]:
    """data/check.py on the folder: headers, sidecar against tokens, hashes."""
    from data import check as data_check

    report = data_check.check(folder, tokenizer, full=full, custom=True)
    figure = f"no findings, {sum(report.tokens.values()):,} tokens"
    if report.findings:
        figure = "; ".join(map(str, report.findings[:2]))
    what = "data/check.py" if full else "data/check.py --quick"
    return [Check("data", what, not report.findings, figure)]


def finding(section: str, what: str, look: Callable[[], str], tg) -> Check:
    """A check of the trainer's as a row."""
    try:
        return Check(section, what, True, look())
    except tg.UserError as error:
        return Check(section, what, False, str(error))


def run_of(artifact: Path) -> RunFiles | None:
    """The finished run in the artifact's folder; None when there is no summary."""
    summary = artifact.parent / "summary.json"
    if not summary.is_file():
        return None
    run = load_run(artifact.parent)
    if "settings" not in run.summary:
        shown = relative(summary)
        raise ToolError(f"{shown} has no settings: the run did not finish")
    return run


def script_of(run: RunFiles | None, given: str | None) -> tuple[bytes, str]:
    """(the script to audit, what it is): the one given, else the run's, else ours."""
    if given:
        path = Path(given)
        if not path.is_file():
            raise ToolError(f"{relative(path)} does not exist: "
                            "give the script that made the artifact")
        return path.read_bytes(), relative(path)
    if run:
        return run.source(), "the script in train.log"
    return SCRIPT.read_bytes(), "this repository's script"


# --- the whole


def open_audit(args: argparse.Namespace) -> Audit:
    """Everything that is looked at, or a ToolError."""
    artifact = Path(args.artifact)
    if artifact.is_dir():
        artifact = artifact / ARTIFACT
    if not artifact.is_file():
        raise ToolError(f"{relative(artifact)} does not exist: give a run's {ARTIFACT}")
    run = run_of(artifact)
    script, origin = script_of(run, args.script)
    env = dict(os.environ)
    if run:
        env = as_environment(run.summary["settings"])
        env.update({k: os.environ[k] for k in PATHS if os.environ.get(k)})
        env.update(EVAL_ONLY_PATH="", EVAL_ONLY_QUANTIZED_PATH="")
    env["DATA_CHECK"] = "full" if args.full else "quick"
    return Audit(artifact, run, script, origin, env)


def look(audit: Audit) -> list[Check]:
    """Every check, in the order of the report."""
    found = probe(audit)
    run = audit.run
    checks = [c for c in found if c.section == "conditions"]
    if run:
        checks += conditions_logged(run) + coverage(run) + budgets(run) + flags(run)
    else:
        what = "summary.json, metrics.jsonl, train.log"
        checks.append(Check("files", what, None, "none beside the artifact"))
    checks += sizes(audit)
    # the artifact's own mark, and the data
    return checks + [c for c in found if c.section != "conditions"]


def report_text(audit: Audit, checks: list[Check], headline: str) -> str:
    """The report, in markdown."""
    judge = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    facts = [f"Script: {audit.origin}, {len(audit.script):,} bytes."]
    if score := audit.run and audit.run.summary.get("val_bpb"):
        facts.append(f"Score: {score:.8f} BPB.")
    facts.append(f"Probes and ledger: this repository's (SHA-256 {judge[:16]}…).")
    lines = [
        f"# Compliance: {relative(audit.artifact)}",
        "",
        f"**{headline}**",
        "",
        " ".join(facts),
        "",
        "| condition | what it asks | how it was tried |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {c} | {text} | {METHOD[c]} |" for c, text in CONDITIONS.items()]
    mark = {True: "ok", False: "**FAIL**", None: "note"}
    sections = dict.fromkeys(c.section for c in checks)
    for section in sections:
        lines += ["", f"## {section.capitalize()}", ""]
        lines += ["| | check | figure |", "| --- | --- | --- |"]
        for c in checks:
            if c.section == section:
                figure = c.figure.replace("|", "/")
                lines.append(f"| {mark[c.ok]} | {c.what} | {figure} |")
    return "\n".join(lines) + "\n"


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("artifact", help=f"a run's {ARTIFACT}, or its folder")
    add("script", nargs="?",
        help="the script (default: as the run's train.log holds it)")
    add("--out", help="where the report goes (default: audit.md beside the artifact)")
    add("--read", nargs="+", action="extend", default=[], metavar="NAME",
        help="definitions of the script (a class: all of it) that you have read by eye")
    add("--full", action="store_true", help="read every byte of the data")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    """Entry."""
    args = parse(arguments)
    audit = open_audit(args)
    checks = [*look(audit), *script_rows(audit.script, args.read)]
    failed = [c for c in checks if c.ok is False]
    passed = [c for c in checks if c.ok]
    judged_count = len(failed) + len(passed)
    if failed:
        word, shown = "FAIL", failed
        headline = f"FAIL: {len(failed)} of {judged_count} checks"
    else:
        proofs = ("conditions", "script")
        word = "PASS"
        shown = [c for c in passed if c.section in proofs or c.what == "artifact + script"]
        headline = f"PASS: {len(passed)} checks"
    headline += f", {len(checks) - judged_count} notes"
    out = Path(args.out or audit.artifact.parent / "audit.md")
    path = write_atomic(out, report_text(audit, checks, headline))
    for c in shown:
        print(f"{word}  {c.what}: {c.figure}")
    print(f"{headline}; report: {relative(path)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
