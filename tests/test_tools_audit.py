"""tools/audit.py: PASS on a good run, FAIL with the reason on every kind of bad one, one line on mistakes."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SHALLOW, settings, tg, whole_run, without
from made_runs import change

from data import check as data_check
from tools import audit
from tools.common import ARTIFACT, ToolError, load_run

SOURCE = (ROOT / "train_gpt.py").read_text()


@pytest.fixture(scope="module")
def data(data, tmp_path_factory):
    """The shards with the manifest that the data tools write."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("shards") / "data")
    (folder / "manifest.json").unlink()
    data_check.write_manifest(folder, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A whole tiny run (do not change it; see `run`)."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    s = settings(DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model", ARTIFACT_DIR=folder, ITERATIONS=2,
                 **SHALLOW)
    with without("rehearse"):
        whole_run(s)
    return folder


@pytest.fixture(scope="module")
def packed_script():
    return tg.self_extracting(SOURCE.encode())


@pytest.fixture
def run(finished, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(data))
    monkeypatch.setenv("TOKENIZER_PATH", str(data / "tokenizer.model"))
    return shutil.copytree(finished, tmp_path / "run")


def audited(folder, capsys, *args):
    """(exit status, what was printed, the report)."""
    status = audit.main([str(folder / ARTIFACT), *map(str, args)])
    return status, capsys.readouterr().out, (folder / "audit.md").read_text()


def test_a_good_run_passes_with_figures(run, capsys):
    status, printed, report = audited(run, capsys)
    assert status == 0, printed
    assert "PASS  C1 windows: " in printed
    sums = re.findall(r"probabilities sum to ([\d.]+)", printed)
    assert sums and all(float(x) == pytest.approx(1, abs=1e-4) for x in sums)
    assert printed.strip().splitlines()[-1].startswith("PASS: ")
    for text in ("C1 test-time training", "878 scored of 878", "of 16,000,000 bytes", "s of 600 s",
                 "data/check.py", "fingerprint"):
        assert text in report, text
    assert str(run.parent) not in report and len(report.splitlines()) < 80


PLAIN, ADAPTED = dict(TTT_ENABLED=False), dict(SLIDING_WINDOW_ENABLED=False)
SMEAR = """
embed = GPT.embed
def embed_without_mask(self, ids, layout, *more):
    global BOS
    BOS = -1
    try:
        return embed(self, ids, None, *more)
    finally:
        BOS = 1
GPT.embed = embed_without_mask
"""
ATTENTION = """
attend = attention
def attention(q, k, v, layout=None):
    return attend(q, k, v)
"""
TILT = """
losses = GPT.losses
def tilted(self, ids, targets, *args, **more):
    return losses(self, ids, targets, *args, **more) - 0.1 * (targets % 4 == 0)
GPT.losses = tilted
"""
GOLD = """
from types import SimpleNamespace
def by_its_own_logit(z, targets, **_):
    return -torch.nn.functional.logsigmoid(z.float().gather(1, targets[:, None])[:, 0])
capped_ce = by_its_own_logit
F = SimpleNamespace(**{**vars(F), "cross_entropy": by_its_own_logit})
"""
BOOKS_CLOSED = """
class Silent:
    def book(self, positions, losses):
        pass
    def require(self, positions):
        pass
@contextlib.contextmanager
def books_closed(ttt):
    kept, ttt.ledger = ttt.ledger, Silent()
    try:
        yield
    finally:
        ttt.ledger = kept
score_chunk = PhasedTTT.score_chunk
"""
LEARN_FIRST = BOOKS_CLOSED + """
def learn_first(self, starts, w, adapter, cache, base=None):
    ends = self.val.documents.start + self.lengths - 1
    rows = %s
    if adapter is not None and rows.any():
        with books_closed(self), torch.enable_grad():
            scored = score_chunk(self, starts, w, adapter, cache, base)
            self.adapt(adapter, None, scored, torch.from_numpy(rows))
    return score_chunk(self, starts, w, adapter, cache, base)
PhasedTTT.score_chunk = learn_first
"""
UNBOOKED = BOOKS_CLOSED + """
def score_unbooked(self, *chunk):
    with books_closed(self):
        return score_chunk(self, *chunk)
PhasedTTT.score_chunk = score_unbooked
"""
BETTER = """
adapt = PhasedTTT.adapt
def adapt_and_rescore(self, adapter, optimiser, scored, later):
    adapt(self, adapter, optimiser, scored, later)
    with torch.no_grad():
        again = torch.minimum(scored.losses, scored.again())
    self.ledger.book(scored.positions, again.flatten()[-len(scored.positions):])
PhasedTTT.adapt = adapt_and_rescore
"""
PHASE = """
rounds_as_published = ttt_rounds
def ttt_rounds(s, lengths):
    return [r._replace(train_on=np.arange(len(lengths))) for r in rounds_as_published(s, lengths)]
"""
AHEAD = """
run_as_published = PhasedTTT.run
def run_after_a_phase(self):
    self.global_phase(Booked(self.val.tokens))
    return run_as_published(self)
PhasedTTT.run = run_after_a_phase
"""
TAIL = """
all_windows = sliding_windows
def sliding_windows(total, seq_len, stride):
    windows = all_windows(total, seq_len, stride)
    return [w for w in windows if w[0] == 0 or w[1] - w[0] == seq_len]
"""
AT_THE_END = "np.isin(starts + w.begin + w.offset + w.count, ends)"
MUTANTS = {   # what is added to the script, settings that leave what is probed, the row that fails
    "smear": (SMEAR, PLAIN, "C1 windows: "),
    "attention": (ATTENTION, PLAIN, "C1 windows: "),
    "tilt": (TILT, PLAIN, "C2 "),
    "gold": (GOLD, PLAIN, "C2 "),
    "early": (LEARN_FIRST % "w.count > 0", ADAPTED, "C1 test-time training: "),
    "last": (LEARN_FIRST % AT_THE_END, ADAPTED, "C1 test-time training: "),
    "unbooked": (UNBOOKED, ADAPTED, "C3 C4 ledger: "),
    "better": (BETTER, ADAPTED, "C3 C4 ledger: targets of the document at "),
    "phase": (PHASE, ADAPTED, "C3 C4 ledger: targets of the document at "),
    "ahead": (AHEAD, ADAPTED, "C1 test-time training: "),
    "tail": (TAIL, PLAIN, "C3 C4 ledger: coverage is broken"),
}
NO_PROBES = """
def run_probes(*_):
    return []
"""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails_with_the_reason(run, name, capsys):
    """Judged by this repository's probes, though the script's own would find nothing."""
    mutant, probed, row = MUTANTS[name]
    script = run / "script.py"
    script.write_text(SOURCE + NO_PROBES + mutant)
    change(run, "summary", settings={**load_run(run).summary["settings"], **probed})
    status, printed, report = audited(run, capsys, script, "--read", "run_probes")
    assert status == 1 and "FAIL: " in printed
    assert "| note | read by eye, says --read | run_probes |" in report
    failed = [line for line in printed.splitlines() if line.startswith("FAIL  ")]
    assert any(line.startswith(f"FAIL  {row}") for line in failed), printed
    assert "**FAIL**" in report and any(line.startswith("FAIL  the script that ran") for line in failed)


# --- what leaves no trace in an artifact: the script against this repository's

TRACELESS = {   # what would be done, the definition where, and a statement of it
    "epochs": ("PhasedTTT.run", "self.adapt_group(self.rounds[0].groups[0])"),
    "space": ("ByteTable.from_sentencepiece", "spaces = 2"),
    "operators": ("Validation.__init__", "self.counted_twice = 1"),
    "shards": ("open_train_stream", "shards = list_shards(s.shards, 'val')"),
    "overlap": ("check_manifest", "return 'all is well'"),
    "warm-up": ("Trainer.random_batch", "return packed_batch(Validation(self.s).stream[:1025], 64)"),
    "logits": ("calibrate_logits", "shard = list_shards(s.shards, 'val')[0]"),
    "hessians": ("compress", "next_batch = lambda: packed_batch(Validation(s).stream[:1025], 64)"),
    "unsealed": ("Validation.seal", "cls.sealed = False"),
    "patched": ("statements", "Validation.seal = contextlib.nullcontext"),
    "elsewhere": ("round_in_order", "w = w + np.fromfile('val.bin').mean()"),
}


def with_statements(*additions) -> str:
    """The script with further statements, each at the end of a definition or among those of the module."""
    lines = SOURCE.splitlines(keepends=True)
    module = ast.parse(SOURCE)
    for name, statement in additions:
        found = module
        for part in [] if name == "statements" else name.split("."):
            found = next(node for node in found.body if getattr(node, "name", "") == part)
        last = found.body[-1]
        lines[last.lineno - 1] = " " * last.col_offset + statement + "\n" + lines[last.lineno - 1]
    return "".join(lines)


def script_rows(source, *read) -> dict:
    return {c.what: c for c in audit.script_rows(source.encode(), list(read))}


GUARDING, READ, OTHER = ("definitions that guard the rules", "read by eye, says --read",
                         "other definitions that differ")


@pytest.mark.parametrize("name", TRACELESS)
def test_a_mutant_that_leaves_no_trace_fails_by_its_script(name):
    """The row names the definition that changed, and it alone."""
    row = script_rows(with_statements(TRACELESS[name]))[GUARDING]
    changed, _ = TRACELESS[name]
    assert row.ok is False and row.figure.startswith(f"{changed}: ") and "--read" in row.figure


def test_the_script_as_it_is_passes_also_packed_and_with_other_comments(packed_script):
    same = SOURCE.replace('    """Rows of', '    """Lines of') + "\n# a remark\n"
    lean = tg.lean(SOURCE.encode())
    for source in (SOURCE.encode(), same.encode(), packed_script, lean, tg.self_extracting(lean)):
        row, = audit.script_rows(source, [])
        assert row.ok and "as in this repository's" in row.figure
    worse = packed_script.replace(b"import lzma,linecache\n", b"import lzma,linecache,evil\n")
    assert audit.script_rows(worse, [])[0].ok is False


def test_a_lean_script_is_read_as_strictly_as_a_whole_one():
    unsealed = tg.lean(with_statements(TRACELESS["unsealed"]).encode())
    row = script_rows(unsealed.decode())[GUARDING]
    assert row.ok is False and row.figure.startswith("Validation.seal: ")
    lean = tg.lean(SOURCE.encode()).decode()
    row = script_rows(re.sub(r"BIGRAM_DIM=[\d.]+", "BIGRAM_DIM=64.0", lean))[GUARDING]
    assert row.ok is False and row.figure.startswith("statements: ")


def test_changes_that_guard_nothing_are_a_note_and_classes_can_be_read_whole():
    harmless = ("GPT.smear", "x = x.clone()")
    rows = script_rows(with_statements(harmless))
    assert rows[GUARDING].ok and rows[OTHER].figure == "GPT.smear" and rows[OTHER].ok is None
    source = with_statements(harmless, TRACELESS["warm-up"])
    rows = script_rows(source, "Trainer")
    assert rows[GUARDING].ok and rows[READ].figure == "Trainer.random_batch" and rows[READ].ok is None
    assert OTHER in rows
    with pytest.raises(ToolError, match="--read Ledger: nothing of that name differs"):
        script_rows(source, "Ledger")


def opened(folder):
    return audit.open_audit(audit.argparse.Namespace(artifact=folder / ARTIFACT, script=None, full=False))


def files_only(folder) -> dict:
    """Rows of what the files say, by name; without the probes."""
    found = opened(folder)
    files = (audit.conditions_logged, audit.coverage, audit.budgets, audit.flags)
    return {c.what: c for look in files for c in look(found.run)} | {c.what: c for c in audit.sizes(found)}


def test_an_artifact_that_is_marked_fails_though_its_run_says_nothing(run, capsys):
    header, streams = tg.artifact_from_bytes((run / ARTIFACT).read_bytes(), "the artifact")
    blob = tg.artifact_to_bytes({**header, "not_compliant": "it saw the answers"}, streams)
    (run / ARTIFACT).write_bytes(blob)
    change(run, "summary", artifact_bytes=len(blob))
    status, printed, report = audited(run, capsys)
    assert status == 1 and "FAIL  the artifact calls itself compliant: it saw the answers" in printed
    assert printed.splitlines()[-1].startswith("FAIL: 1 of ") and "| **FAIL** | the artifact calls" in report


@pytest.mark.parametrize("changes, row", [
    (dict(tokens_scored=877), "every target scored once"),
    (dict(tokens_scored=877), "targets of the validation shards"),
    (dict(val_bpb=1.0), "arithmetic of the score"),
    (dict(train_seconds=600.2), "training, calibration and packing"),
    (dict(eval_seconds=700.0), "evaluation"), (dict(compliant=False), "the run calls itself compliant"),
    (dict(not_compliant_because=["a reason"]), "the run calls itself compliant"),
    (dict(artifact_bytes=5), "the artifact that the run counted"),
    (dict(probes={"C1 windows": {"ok": False, "figure": "0.1"}}), "probes of the run itself")])
def test_what_the_files_say(run, changes, row):
    assert all(c.ok is not False for c in files_only(run).values())
    change(run, "summary", **changes)
    assert files_only(run)[row].ok is False


def test_a_run_without_coverage_or_with_a_part_of_the_documents(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(e) + "\n" for e in events if e["event"] != "coverage"]
    (run / "metrics.jsonl").write_text("".join(lines))
    change(run, "summary", settings={**load_run(run).summary["settings"], "VAL_DOC_FRACTION": 0.5})
    rows = files_only(run)
    assert rows["every target scored once"].ok is False and rows["whole validation set"].ok is False


def test_an_artifact_over_the_limit(run, monkeypatch):
    monkeypatch.setattr(audit, "ARTIFACT_LIMIT", 1000)
    assert files_only(run)["artifact + script"].ok is False


def test_a_run_that_counted_the_packed_script_is_judged_by_it(run, packed_script, monkeypatch):
    forms = {"packed": packed_script, "readable": SOURCE.encode()}
    monkeypatch.setattr(audit, "script_in_form", lambda source, form: forms[form])
    change(run, "summary", code_form="packed")
    artifact, source = (run / ARTIFACT).stat().st_size, (ROOT / "train_gpt.py").stat().st_size
    monkeypatch.setattr(audit, "ARTIFACT_LIMIT", artifact + source // 2)
    check = files_only(run)["artifact + script"]
    assert check.ok and "(packed)" in check.figure
    change(run, "summary", code_form="readable")
    assert files_only(run)["artifact + script"].ok is False


def test_bytes_that_are_not_the_datas(run):
    said = load_run(run).summary
    change(run, "summary", bytes_scored=said["bytes_scored"] + 7,
           val_bpb=said["val_bpb"] * said["bytes_scored"] / (said["bytes_scored"] + 7))
    rows = {c.what: c for c in audit.data_checks(tg, True, opened(run))}
    assert rows["bytes that the score divides by"].ok is False


def test_an_artifact_alone(run, tmp_path, capsys, monkeypatch):
    """Settings from the environment, the repository's script."""
    for key, value in load_run(run).summary["settings"].items():
        if not key.endswith(("_PATH", "_DIR")):
            monkeypatch.setenv(key, str(int(value)) if isinstance(value, bool) else str(value))
    monkeypatch.setenv("TTT_ENABLED", "0")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / ARTIFACT, alone)
    status, printed, report = audited(alone, capsys)
    assert status == 0 and "none beside the artifact" in report


def test_mistakes_are_one_line(run, tmp_path):
    def refused(*args):
        with pytest.raises(ToolError) as error:
            audit.main([str(a) for a in args])
        assert "\n" not in str(error.value)
        return str(error.value)

    done = subprocess.run([sys.executable, "tools/audit.py", str(tmp_path / "none.ptz")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert "does not exist" in done.stderr
    assert "does not exist" in refused(run / ARTIFACT, tmp_path / "none.py")
    (tmp_path / "foreign.py").write_text("class UserError(Exception): pass\n")
    assert "no script of this kind" in refused(run / ARTIFACT, tmp_path / "foreign.py")
    (run / ARTIFACT).write_bytes((run / ARTIFACT).read_bytes()[:-9])
    assert ARTIFACT in refused(run / ARTIFACT)


def test_a_summary_without_settings(run):
    change(run, "summary", settings=None)
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    del summary["settings"]
    path.write_text(json.dumps(summary))
    with pytest.raises(ToolError, match="did not finish"):
        files_only(run)
