"""tools/diff.py: what differs is shown, and nothing else."""

import pytest
from conftest import ROOT
from made_runs import change, make_run

from tools import diff
from tools.common import ToolError


def rows(text):
    """Name of a row -> its cells."""
    found = {}
    for line in text.splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        found[name] = cells
    return found


def test_two_runs(tmp_path, capsys):
    a = make_run(tmp_path / "a", 1, 60, settings={"TTT_LORA_RANK": 96}, data_fingerprint="abc")
    settings = {"TTT_LORA_RANK": 128, "MATRIX_LR": 0.03}
    b = make_run(tmp_path / "b", 2, 58, settings=settings, data_fingerprint="abd", script=b"print(1)\n")
    assert diff.main([str(a), str(b)]) == 1
    found = rows(capsys.readouterr().out)
    assert found["TTT_LORA_RANK"] == ["96", "128"] and found["MATRIX_LR"] == ["0.026", "0.03"]
    assert found["SEED"] == ["1", "2"] and found["data fingerprint"] == ["abc", "abd"]
    assert found["BPB, final"] == ["1.060000", "1.058000", "-0.002"]
    assert len(found["script sha256"][0]) == 16 and found["steps"] == ["4,901", "4,902", "+1"]
    for same in ("MAX_WALLCLOCK_SECONDS", "hardware", "RUN_ID", "artifact bytes", "compliant"):
        assert same not in found, same


def test_a_run_has_no_difference_from_itself(tmp_path, capsys):
    a = make_run(tmp_path / "a", 1)
    assert diff.main([str(a), str(a)]) == 0 and capsys.readouterr().out == "nothing differs\n"
    change(a, "summary", world_size=1, device="CPU")
    assert diff.main([str(a), str(make_run(tmp_path / "b", 1))]) == 1
    assert set(rows(capsys.readouterr().out)) == {"hardware", "processes"}


def test_configurations_are_completed_by_the_defaults(tmp_path, capsys):
    one, two = tmp_path / "one.env", tmp_path / "two.env"
    one.write_text("# a comment\nexport MATRIX_LR=0.03   # why\nMIN_LR=0.1\n")
    two.write_text("MATRIX_LR='0.030'\nTTT_LORA_RANK=48\n")
    assert diff.main([str(one), str(two)]) == 1
    found = rows(capsys.readouterr().out)
    assert "TTT_LORA_RANK" in found and found["TTT_LORA_RANK"][1] == "48" and "MATRIX_LR" not in found
    assert diff.main([str(ROOT / "configs" / "best.env"), str(ROOT / "configs" / "best.env")]) == 0


def test_a_run_and_a_configuration(tmp_path, capsys):
    run = make_run(tmp_path / "a", 1, settings={"TTT_LORA_RANK": 3})
    (tmp_path / "x.env").write_text("TTT_LORA_RANK=4\n")
    assert diff.main([str(run), str(tmp_path / "x.env")]) == 1
    found = rows(capsys.readouterr().out)
    assert found["TTT_LORA_RANK"] == ["3", "4"] and "hardware" not in found


@pytest.mark.parametrize("name, text, words", [("x.env", "MATRIX LR\n", "line 1 of .* is no NAME=VALUE"),
                                               ("x.env", "MATRIX_LRR=1\n", "MATRIX_LR"),
                                               ("x.env", "A='1\n", "line 1 of .* is no NAME=VALUE"),
                                               ("x.json", "[]", "no summary of a run"),
                                               ("x.txt", "", "is no folder, no .env and no .json")])
def test_mistakes_are_one_clear_line(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ToolError, match=words):
        diff.main([str(tmp_path / name), str(tmp_path / name)])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ToolError, match="none.env does not exist"):
        diff.main([str(tmp_path / "none.env"), str(tmp_path)])
    with pytest.raises(ToolError, match="metrics.jsonl.*give the folder of a run"):
        diff.main([str(tmp_path), str(tmp_path)])
