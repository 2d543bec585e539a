"""The tools on a real run of the real trainer, at tiny size: what it writes is what they read."""

import json
import shutil

import pytest
from conftest import ROOT, SHALLOW, environment, run_here, tg

from tools import compare, make_record, report
from tools.common import ARTIFACT, load_run
from tools.common import ROOT as TOOLS_ROOT


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    code, said = run_here(environment(data, ARTIFACT_DIR=folder, VAL_LOSS_EVERY=2, **SHALLOW))
    assert code == 0, said
    return folder


def test_the_log_holds_the_script(run):
    assert load_run(run).source() == (ROOT / "train_gpt.py").read_bytes() and TOOLS_ROOT == ROOT


def test_the_report_reads_everything_the_run_wrote(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    page, summary = out.read_text(), json.loads((run / "summary.json").read_text())
    assert f'data-key="val_bpb">{summary["val_bpb"]:.8f}<' in page
    for key in ("scores", "curves", "pace", "step_time", "timeline", "treemap", "profiles"):
        assert f'id="{key}"' in page, key
    assert "no bytes per tensor" not in capsys.readouterr().err
    items = report.tensors_of(load_run(run))
    assert sum(t["bytes"] for t in items) <= summary["artifact_bytes"]
    assert sum(t["bytes"] for t in items) > 0.9 * summary["artifact_bytes"]


def test_no_rounding_error_against_weights_that_were_trained_further(run, tmp_path):
    assert any(t["error"] is not None for t in report.tensors_of(load_run(run)))
    marked = shutil.copytree(run, tmp_path / "marked")
    header, streams = tg.artifact_from_bytes((run / ARTIFACT).read_bytes(), "the artifact")
    (marked / ARTIFACT).write_bytes(tg.artifact_to_bytes({**header, "not_compliant": tg.PREQUANT}, streams))
    assert all(t["error"] is None for t in report.tensors_of(load_run(marked)))


def test_a_record_of_it_scores_the_same_inside_its_folder(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(data))
    monkeypatch.setenv("TOKENIZER_PATH", str(data / "tokenizer.model"))
    words = [str(run), "--name", "tiny", "--track", "non_record", "--lean", "--packed", "--out",
             str(tmp_path), "--date", "2026-05-01"]
    assert make_record.main(words) == 0
    folder = tmp_path / "track_non_record_16mb" / "2026-05-01_tiny"
    script = (folder / "train_gpt.py").read_bytes()
    assert script == tg.self_extracting(tg.lean((ROOT / "train_gpt.py").read_bytes()))
    assert json.loads((folder / "submission.json").read_text())["bytes_code"] == len(script)
    text = "".join(path.read_text() for path in folder.iterdir() if path.name != "train_gpt.py")
    assert not [place for place in (str(data), str(ROOT), str(tmp_path)) if place in text]
    found = compare.read_results(str(folder))
    assert [r.bpb for r in found] == [json.loads((run / "summary.json").read_text())["val_bpb"]]
