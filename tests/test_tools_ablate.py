"""tools/ablate.py: the table's arithmetic, and that every row is a configuration the script accepts."""

import pytest
from conftest import load_config

import train_gpt as t
from tools import ablate


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


def test_a_finished_run_is_not_run_again(tmp_path):
    (tmp_path / "summary.json").write_text('{"val_bpb": 1.5}')
    assert ablate.run(tmp_path, "NO_SUCH_SETTING_AT_ALL=1") == {"val_bpb": 1.5}


def test_a_failing_run_leaves_its_log_and_no_result(tmp_path):
    assert ablate.run(tmp_path, "MODEL_DIM=7") is None
    assert "error: MODEL_DIM=7" in (tmp_path / "output.log").read_text()
