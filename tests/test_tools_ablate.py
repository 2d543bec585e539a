"""tools/ablate.py: the table's arithmetic, and that every row is a configuration the script accepts."""

import json

import pytest
from conftest import load_config
from made_runs import make_run

import train_gpt as t
from tools import ablate
from tools.common import ToolError


def test_differences_are_paired_over_the_seeds_both_runs_have():
    runs = {"base": [{"b": 2.0}, {"b": 3.0}, {"b": 4.0}],
            "worse": [{"b": 2.1}, None, {"b": 4.3}], "dead": [None, None, None]}
    lines = ablate.table(runs, "base", "b", [1, 2, 3])
    assert lines[2:] == ["| base | 3.0000 |  | 3 of 3 |", "| worse | 3.2000 | +0.2000 ± 0.1000 | 2 of 3 |",
                         "| dead | failed | | 0 of 3 |"]


@pytest.mark.parametrize("changes", [*ablate.TRAINED.values(), *ablate.SCORED.values()])
def test_every_row_is_accepted_and_changes_something(changes):
    base = load_config("best")
    changed = dict(change.split("=", 1) for change in changes.split())
    small = {"TRAIN_SEQ_LEN": "512"} if "TRAIN_SEQ_SCHEDULE" in changed else {}
    row = t.Settings.from_env({**base, **small, **changed})
    assert row != t.Settings.from_env({**base, **small})


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A stand-in that refuses a used folder, as the real one does, and finishes unless DIE is set."""
    script = tmp_path / "trainer.py"
    script.write_text('''import json, os
from pathlib import Path
out = Path(os.environ["ARTIFACT_DIR"])
assert not (out / "final_model.pt").exists()
(out / "final_model.pt").write_text("weights")
summary = {"val_bpb": None, "seed": 1, "settings": {"MATRIX_LR": 0.02, "SEED": 1}}
(out / "summary.json").write_text(json.dumps(summary))
(out / "metrics.jsonl").write_text('{"event": "start"}\\n')
if "DIE" in os.environ:
    os._exit(9)
(out / "summary.json").write_text(json.dumps({**summary, "val_bpb": float(os.environ["MATRIX_LR"])}))
(out / "metrics.jsonl").write_text('{"event": "start"}\\n{"event": "final", "val_bpb": 1, "seed": 1}\\n')
''')
    monkeypatch.setattr(ablate, "SCRIPT", script)
    return tmp_path / "study" / "row" / "1"


def test_a_finished_run_is_not_run_again(trainer):
    assert ablate.run(trainer, "MATRIX_LR=0.5", SEED="1")["val_bpb"] == 0.5
    (trainer / "final_model.pt").write_text("the same")
    assert ablate.run(trainer, "MATRIX_LR=0.5", SEED="1")["val_bpb"] == 0.5
    assert (trainer / "final_model.pt").read_text() == "the same"


def test_a_run_cut_short_is_run_again(trainer):
    assert ablate.run(trainer, "MATRIX_LR=0.5 DIE=1") is None
    assert (trainer / "summary.json").is_file() and (trainer / "final_model.pt").is_file()
    assert ablate.run(trainer, "MATRIX_LR=0.5")["val_bpb"] == 0.5


def test_a_finished_run_of_other_settings_is_refused(trainer):
    ablate.run(trainer, "MATRIX_LR=0.5", SEED="1")
    with pytest.raises(ToolError, match="other settings .MATRIX_LR=0.5, now 0.6.: choose another folder"):
        ablate.run(trainer, "MATRIX_LR=0.6", SEED="1")
    (trainer / ablate.DONE).unlink()
    with pytest.raises(ToolError, match="but not its settings"):
        ablate.run(trainer, "MATRIX_LR=0.5", SEED="1")
    assert json.loads((trainer / "summary.json").read_text())["val_bpb"] == 0.5


def test_a_refusal_ends_the_study_with_its_reason(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "trained" / "base" / "1", 1)
    monkeypatch.setattr(ablate.sys, "argv", ["ablate.py", str(tmp_path), "--seeds", "1", "--rows", "no XSA",
                                             "--part", "scored"])
    with pytest.raises(ToolError, match="holds a finished run"):
        ablate.main()
    assert folder.is_dir() and not (tmp_path / "scored").exists()


def test_a_failing_run_leaves_its_log_and_no_result_and_says_why(tmp_path, capsys):
    assert ablate.run(tmp_path, "MODEL_DIM=7") is None
    assert "error: MODEL_DIM=7" in (tmp_path / "output.log").read_text()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("FAILED ") and "exit status 2: error: MODEL_DIM=7" in said[0]
