"""What is refused before the first step, and why: a short form of fault_inputs.py, and checks row by row."""

import fault_inputs
import pytest
from conftest import settings, tg


def test_sixty_bad_inputs_end_in_one_line(data, tmp_path):
    said = []
    cases = fault_inputs.generate(60, 11)
    assert {c.kind for c in cases} >= {"setting", "pair", "launcher", "path", "shard", "manifest", "artifact"}
    assert sum(c.expect == fault_inputs.GOOD for c in cases) >= 5
    assert fault_inputs.try_all(cases, data, tmp_path, lambda *words: said.append(words)) == [], said


@pytest.mark.parametrize("status, shown, fault", [
    (0, "", "accepted"),
    (2, "error: one\nerror: two\n", "2 lines"),
    (2, "Traceback (most recent call last):\nerror: x\n", "trace"),
    (1, "", "0 lines"),
    (2, "error: " + "x" * 600, "607 characters"),
    ("ZeroDivisionError", "", "ended by"),
])
def test_the_judge_sees_what_is_wrong(status, shown, fault):
    assert any(fault in f for f in fault_inputs.judge(fault_inputs.Case("x", "x"), status, "", shown))


def test_scoring_an_artifact_needs_no_training_batch(data, tmp_path):
    (tmp_path / "a.ptz").write_bytes(b"none")
    for path, refused in (("", True), (str(tmp_path / "a.ptz"), False)):
        s = settings(DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model", EVAL_ONLY_QUANTIZED_PATH=path)
        found = tg.run_checks(s, tg.World(size=7), tmp_path, "plain")
        assert any("TRAIN_BATCH_TOKENS" in f.figure for f in found if not f.ok) == refused


def test_a_folder_in_the_artifacts_place_is_found_before_training(data, tmp_path):
    (tmp_path / tg.ARTIFACT_NAME).mkdir()
    found = tg.run_checks(settings(DATA_PATH=data), tg.World(), tmp_path, "plain")
    assert [f.figure for f in found if f.name == "folder" and not f.ok] == [
        f"{tmp_path / tg.ARTIFACT_NAME} is a folder: move it away or set ARTIFACT_DIR"]


def test_without_a_temporary_folder(monkeypatch, capsys):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tg.tempfile, "gettempdir", nowhere)
    assert tg.main(["--check", "settings"]) == 2
    assert capsys.readouterr().err.startswith("error: no temporary folder can be written: set TMPDIR")
