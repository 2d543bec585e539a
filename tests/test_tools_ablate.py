"""tools/ablate.py: the tables' arithmetic, what is kept, mistakes in a line; the script accepts every row."""

import argparse
import json

import numpy as np
import pytest
from conftest import load_config, settings, tg
from made_runs import make_run

import train_gpt as t
from tools import ablate
from tools.common import ARTIFACT, ToolError


def cells(text):
    """The table's cells, row by row, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_differences_are_paired_over_the_seeds_both_runs_have():
    dead = {"error": "exit status 2: error: too wide"}
    runs = {"base": [{"b": 2.0}, {"b": 3.0}, {"b": 4.0}],
            "worse": [{"b": 2.1}, dead, {"b": 4.3}], "dead": [dead] * 3}
    args = argparse.Namespace(seeds=[1, 2, 3], reference="worse")
    report = ablate.seeds_report(runs, "b", args)
    assert cells(report) == [["base", "3.0000", "", "-0.2000 ± 0.1000", "3 of 3"],
                             ["worse", "3.2000", "+0.2000 ± 0.1000", "", "2 of 3"],
                             ["dead", "failed", "", "", "0 of 3"]]
    assert report.endswith("dead: exit status 2: error: too wide")


def test_a_paired_difference_and_its_error():
    lengths = np.array([10, 30, 20])
    per_document = np.repeat([0.1, 0.1, 0.1], lengths)
    assert ablate.paired(per_document, lengths) == (pytest.approx(0.1), pytest.approx(0.0))
    draws = np.random.default_rng(0)
    drawn = (np.repeat(draws.normal(size=3), lengths) for _ in range(2000))
    means, errors = zip(*(ablate.paired(x, lengths) for x in drawn))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.2)


def test_rows_are_written_out_or_named():
    assert ablate.chosen_rows([]) == {**ablate.TRAINED, **ablate.SCORED}
    rows = ablate.chosen_rows(["hot: MATRIX_LR=0.05 LOOP=3:4,5", "no XSA", "adapters: not Q", "as it is:"])
    assert rows == {"hot": "MATRIX_LR=0.05 LOOP=3:4,5", "no XSA": "XSA_LAST_N=0",
                    "adapters: not Q": "TTT_Q_LORA=0", "as it is": ""}
    with pytest.raises(ToolError, match="'hot: MATRIX_LR' is no row"):
        ablate.chosen_rows(["hot: MATRIX_LR"])
    with pytest.raises(ToolError, match="the row hot is given twice"):
        ablate.chosen_rows(["hot: MATRIX_LR=0.05", "hot: MATRIX_LR=0.06"])
    with pytest.raises(ToolError, match="two rows would share the folder base"):
        ablate.main(["nowhere", "base: MATRIX_LR=0.05"])


def test_an_option_of_the_other_kind_of_study_is_refused():
    for words, option, where in (["--artifact", "x", "--part", "scored"], "part", "without"), (
        ["--min-tokens", "9"], "min-tokens", "with"
    ):
        with pytest.raises(ToolError, match=f"--{option} acts only {where} --artifact"):
            ablate.parse(["out", *words])


def test_seeds_are_written_either_way():
    assert [ablate.parse(["out", "--seeds", *words]).seeds for words in (["1", "2"], ["1,2"])] == [[1, 2]] * 2
    for words in (["1,2,", "3"], ["1", "1"], ["x"]):
        with pytest.raises(ToolError, match="give every seed once"):
            ablate.parse(["out", "--seeds", *words])


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
    assert "exit status 9" in ablate.run(trainer, "MATRIX_LR=0.5 DIE=1")["error"]
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


def test_a_refusal_ends_the_study_with_its_reason(tmp_path):
    folder = make_run(tmp_path / "trained" / "base" / "1", 1)
    with pytest.raises(ToolError, match="holds a finished run"):
        ablate.main([str(tmp_path), "--seeds", "1", "--part", "scored", "no trellis"])
    assert folder.is_dir() and not (tmp_path / "scored").exists()


def test_a_failing_run_leaves_its_log_and_no_result_and_says_why(tmp_path, capsys):
    failed = ablate.run(tmp_path, "MODEL_DIM=7")
    assert failed["error"].startswith("exit status 2: error: MODEL_DIM=7")
    assert "error: MODEL_DIM=7" in (tmp_path / "output.log").read_text()
    assert capsys.readouterr().err == f"FAILED {ablate.relative(tmp_path)}: {failed['error']}\n"


def test_rows_on_an_artifact_are_measured_once_and_compared(data, tmp_path, monkeypatch, capsys):
    s = settings(DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model")
    for name, value in s.changed().items():
        monkeypatch.setenv(name, str(int(value)) if isinstance(value, bool) else str(value))
    model = tg.build_model(s, tg.World())
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    hessians = {n: tg.torch.eye(w.size(-1)) for n, w in weights.items()}
    (tmp_path / ARTIFACT).write_bytes(tg.pack_model(s, tg.Quantiser(s, weights, tg.Curvature(hessians))()))
    call = [str(tmp_path / "rows"), "--artifact", str(tmp_path / ARTIFACT), "--max-tokens", "100",
            "none: TTT_LORA_LR=0", "fast:"]
    assert ablate.main(call) == 0
    first = capsys.readouterr().out
    assert "against none" in first and "even half" in first and "| position |" in first
    assert (tmp_path / "rows" / "report.md").read_text() in first
    real = ablate.measure
    monkeypatch.setattr(ablate, "measure", None)
    assert ablate.main([*call, "--reference", "fast"]) == 0
    assert "against fast" in capsys.readouterr().out
    measured = []
    monkeypatch.setattr(ablate, "measure", lambda tg, s, args: measured.append(s) or real(tg, s, args))
    changed = [*call[:-1], "fast: NGRAM_TILT_ENABLED=1 TTT_SUFFIX=20 TTT_STEP_SHARE=0.1"]
    assert ablate.main(changed) == 0 and [s.ngram_tilt_enabled for s in measured] == [True]
    assert capsys.readouterr().out != first
    assert ablate.main([*changed, "--seeds", f"{s.seed},7"]) == 0
    assert [(s.seed, s.ttt_lora_lr > 0) for s in measured[1:]] == [(7, False), (7, True)]
    with pytest.raises(ToolError, match="--reference nothing is none of the rows none, fast"):
        ablate.main([*call, "--reference", "nothing"])
    with pytest.raises(ToolError, match="row fast: MATRIX_LR=x"):
        ablate.main([*call[:-1], "fast: MATRIX_LR=x"])
