"""tools/common.py: what it reads of a run, and how it refuses what is damaged."""

import pytest
from conftest import tg
from made_runs import SCRIPT, change

from tools import common
from tools.common import ToolError


@pytest.mark.parametrize("said, why", [
    ("step 1\nerror: MODEL_DIM=7 must be even\nto go on: python x.py\n", "error: MODEL_DIM=7 must be even"),
    ("Traceback (most recent call last):\n[rank3]: torch.OutOfMemoryError: CUDA\nw.ChildFailedError: \n",
     "torch.OutOfMemoryError: CUDA"),
    ("error: first\nerror: second\nValueError: other\nbye\n", "error: second"),
    ("interrupted: the run was interrupted by SIGTERM\n", "interrupted: the run was interrupted by SIGTERM"),
    ("progress 1\rprogress 2\nkilled", "killed"), ("", "it said nothing")])
def test_why_a_program_failed(said, why):
    assert common.error_line(said) == why


def test_source_in_the_log_is_the_script(runs):
    assert common.load_run(runs[0]).source() == SCRIPT


@pytest.mark.parametrize("old, new", [(b"import lzma,", b"import evil,lzma,"), (b'".enc', b'"+evil()+"".enc'),
                                      (b"s=lzma.decompress(\"", b"s=lzma.decompress(\"\\x07"),
                                      (b",'exec'))\n", b",'exec'))\nevil()\n")])
def test_a_packed_script_of_another_form_is_not_unpacked(old, new):
    packed = tg.self_extracting(SCRIPT)
    assert common.unpack_script(packed) == tg.without_comments(SCRIPT) and packed.count(old) == 1
    with pytest.raises(ToolError, match="not of the form"):
        common.unpack_script(packed.replace(old, new))


def test_a_last_line_still_being_written_is_left_out(runs):
    with open(runs[0] / "metrics.jsonl", "a") as f:
        f.write('{"event": "tr')
    assert common.load_run(runs[0]).events[-1]["event"] == "final"


def test_damage_and_absence_are_named(runs, tmp_path):
    with pytest.raises(ToolError, match="no folder"):
        common.load_run(tmp_path / "nothing")
    (runs[0] / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(ToolError, match="line 1 of .* no JSON"):
        common.load_run(runs[0])
    (runs[1] / "summary.json").unlink()
    with pytest.raises(ToolError, match="did not finish"):
        common.load_run(runs[1])


@pytest.mark.parametrize("line", [b"[1]", b"null", b'{"event": "\xff"}', b'{"a": ' + 100_000 * b"["],
                         ids=["list", "null", "no UTF-8", "deep"])
def test_a_line_that_is_no_object_is_named(line, runs):
    metrics, summary = runs[0] / "metrics.jsonl", runs[1] / "summary.json"
    whole = metrics.read_bytes()
    count = whole.count(b"\n")
    metrics.write_bytes(whole + line + b"\n")
    with pytest.raises(ToolError, match=f"line {count + 1} of .* is no JSON object: the file is damaged"):
        common.read_events(metrics)
    metrics.write_bytes(whole + line)             # as a last line that is still being written
    assert len(common.read_events(metrics)) == count
    summary.write_bytes(line)
    with pytest.raises(ToolError, match="summary.json is no JSON object: the file is damaged"):
        common.load_run(runs[1])


def test_a_run_that_was_cut_after_a_stage_did_not_finish(runs):
    change(runs[0], "summary", val_bpb=None)      # killed between the final line and the last summary
    (runs[1] / "metrics.jsonl").write_text('{"event": "start"}\n')
    with open(runs[2] / "metrics.jsonl", "a") as f:
        f.write('{"event": "start"}\n')           # an eval-only run that was cut
    for run in runs:
        with pytest.raises(ToolError, match="did not finish"):
            common.load_run(run)
        assert common.load_run(run, finished=False).folder == run


def test_paths_are_shown_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.relative(tmp_path / "a" / "b") == "a/b"
    assert common.relative("/somewhere/else/far/away") == "far/away"


def test_write_atomic_leaves_nothing_behind(tmp_path):
    common.write_atomic(tmp_path / "x" / "y.txt", "hello")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["y.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="cannot write"):
        common.write_atomic(tmp_path / "file" / "y.txt", "hello")
