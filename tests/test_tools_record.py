"""tools/make_record.py: good runs make a folder, and every bad case is refused with its reason."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
from conftest import tg
from made_runs import SCRIPT, change, make_run

from tools import make_record
from tools.common import ARTIFACT, ROOT, ToolError, unpack_script

KEYS = {"author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "val_loss_std",
        "val_bpb_std", "seeds", "seed_results", "artifact_bytes_mean", "artifact_bytes_max", "bytes_total",
        "train_steps_mean", "step_avg_ms_mean", "hardware", "pytorch_version"}


def make(folders, out, *more):
    words = [*map(str, folders), "--name", "test", "--out", str(out), "--date", "2026-05-01", "--nproc", "1",
             *more]
    return make_record.main(words)


def test_a_good_record(runs, tmp_path, capsys):
    assert make(runs, tmp_path / "records", "--author", "A. Person", "--lineage", "pr1855") == 0
    folder = tmp_path / "records" / "track_10min_16mb" / "2026-05-01_test"
    names = {p.name for p in folder.iterdir()}
    assert names == {"README.md", "submission.json", "train_gpt.py", "requirements.txt",
                     *(f"{a}_seed{n}.{b}" for n in (42, 0, 1234)
                       for a, b in (("train", "log"), ("metrics", "jsonl"), ("summary", "json")))}
    assert (folder / "train_gpt.py").read_bytes() == SCRIPT
    s = json.loads((folder / "submission.json").read_text())
    assert (KEYS <= set(s) and s["val_bpb"] == pytest.approx(1.061)
            and s["val_bpb_std"] == pytest.approx(0.001))
    assert s["seed_results"]["42"]["artifact_bytes"] == 1000 and s["bytes_total"] == 1000 + len(SCRIPT)
    text = "".join(p.read_text() for p in folder.iterdir())
    assert str(tmp_path) not in text and "/mnt/" not in text
    readme = (folder / "README.md").read_text()
    for part in ("1.06000000", "1.06200000", "pr1855", "SEED=$seed", "MATRIX_LR=0.028", "scored exactly once",
                 "inside this folder in eval-only mode"):
        assert part in readme, part
    assert "+0.0e+00" in capsys.readouterr().out
    with pytest.raises(ToolError, match="exists: choose another"):
        make(runs, tmp_path / "records")
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_packed_script_is_what_is_run_and_counted(runs, tmp_path):
    assert make(runs, tmp_path / "records", "--packed", "--with-artifact", "--check", "all") == 0
    folder = tmp_path / "records" / "track_10min_16mb" / "2026-05-01_test"
    script = (folder / "train_gpt.py").read_bytes()
    assert script.startswith(b"# coding: latin-1") and (folder / ARTIFACT).read_bytes() == bytes([60]) * 1000
    s = json.loads((folder / "submission.json").read_text())
    assert s["bytes_code"] == len(script) and s["bytes_total"] == 1000 + len(script)


def test_runs_that_counted_the_packed_script_ship_it(runs, tmp_path, capsys):
    for run in runs:
        change(run, "summary", code_form="packed")
    assert make(runs, tmp_path / "records") == 0
    folder = tmp_path / "records" / "track_10min_16mb" / "2026-05-01_test"
    assert (folder / "train_gpt.py").read_bytes() == make_record.script_in_form(SCRIPT, "packed")
    here = len(make_record.script_in_form(SCRIPT, "packed"))
    said = f"s42 counted {len(SCRIPT):,} bytes of packed script, here it has {here:,}"
    assert said in capsys.readouterr().out


def test_no_word_about_the_packed_size_where_it_is_the_counted_one(runs, tmp_path, capsys):
    for run in runs:
        size = len(make_record.script_in_form(SCRIPT, "packed"))
        change(run, "summary", code_form="packed", code_bytes=size)
    assert make(runs, tmp_path / "records") == 0 and "counted" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["lean", "lean_packed"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_lean_script_is_shipped_where_it_was_counted_or_asked_for(tmp_path, form, counted):
    shipped = make_record.script_in_form(SCRIPT, form)
    lean = SCRIPT.replace(b"# of older systems\n", b"")
    inside = lean if form == "lean" else tg.without_comments(lean)
    assert unpack_script(shipped) == inside != SCRIPT
    run = make_run(tmp_path / "r", 1)
    if counted:
        change(run, "summary", code_form=form, code_bytes=len(shipped))
    asked = [] if counted else [f"--{word}" for word in form.split("_")]
    assert make([run], tmp_path / "records", "--track", "non_record", *asked) == 0
    folder = tmp_path / "records" / "track_non_record_16mb" / "2026-05-01_test"
    assert (folder / "train_gpt.py").read_bytes() == shipped
    readme = (folder / "README.md").read_text()
    what = {"lean": "is the lean script", "lean_packed": "is the self-extracting form of the lean script"}
    digest = hashlib.sha256(SCRIPT).hexdigest()
    assert what[form] in readme and f"{len(shipped):,} bytes, sha256" in readme
    assert f"logs name the whole script, {len(SCRIPT):,} bytes, sha256 `{digest}`" in readme


def test_settings_that_need_the_whole_script_ship_it(tmp_path):
    run = make_run(tmp_path / "r", 1, settings={"OLDER": "1"})
    with pytest.raises(ToolError, match="--lean cannot be: .* leaves out what OLDER needs"):
        make([run], tmp_path / "records", "--track", "non_record", "--lean")
    assert make([run], tmp_path / "records", "--track", "non_record") == 0


def test_runs_that_counted_different_forms_make_no_record(runs, tmp_path):
    change(runs[1], "summary", code_form="packed")
    with pytest.raises(ToolError, match="counted the script as packed and readable"):
        make(runs, tmp_path / "records")


def test_a_packed_script_that_ran_cannot_become_lean(tmp_path):
    run = make_run(tmp_path / "r", 1, script=make_record.script_in_form(SCRIPT, "packed"), code_form="packed")
    with pytest.raises(ToolError, match="--lean needs runs of the readable one"):
        make([run], tmp_path / "records", "--track", "non_record", "--lean")


@pytest.mark.parametrize("ran_packed", [False, True])
def test_a_packed_script_is_called_so_and_its_source_is_named(tmp_path, ran_packed):
    packed = make_record.script_in_form(SCRIPT, "packed")
    inside = unpack_script(packed)
    assert inside == tg.without_comments(SCRIPT) and unpack_script(SCRIPT) == SCRIPT
    run = make_run(tmp_path / "r", 1, script=packed if ran_packed else SCRIPT)
    assert make([run], tmp_path / "records", "--track", "non_record", "--packed") == 0
    readme = (tmp_path / "records" / "track_non_record_16mb" / "2026-05-01_test" / "README.md").read_text()
    assert "readable script" not in readme
    assert f"self-extracting form of the script, {len(packed):,} bytes" in readme
    digest = hashlib.sha256(inside).hexdigest()
    assert f"source inside it, without comments, {len(inside):,} bytes, has sha256 `{digest}`" in readme
    named = "the self-extracting form" if ran_packed else f"the whole script, {len(SCRIPT):,} bytes, sha256"
    assert f"the logs name {named}" in readme


def test_the_commands_are_read_by_a_shell_as_they_were_meant(tmp_path):
    run = make_run(tmp_path / "r", 1)
    schedule, many = "32@0.5, 64@1", {f"SETTING_{i}": "a value, " * 4 for i in range(9)}
    change(run, "changed_settings", TRAIN_SEQ_SCHEDULE=schedule, **many)
    make([run], tmp_path / "records", "--track", "non_record")
    readme = (tmp_path / "records" / "track_non_record_16mb" / "2026-05-01_test" / "README.md").read_text()
    block = readme.split("```bash\n")[1]
    command = block[block.index("export "):block.index("export DATA_PATH")]
    assert len(command.splitlines()) > 3 and max(map(len, command.splitlines())) < 110
    done = subprocess.run(["bash", "-ec", command + "env -0"], capture_output=True, text=True, env={})
    got = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    assert {k: got[k] for k in many} == many and got["TRAIN_SEQ_SCHEDULE"] == schedule
    assert got["MATRIX_LR"] == "0.028"


def test_paths_of_this_machine_are_found_and_addresses_are_none(monkeypatch):
    monkeypatch.setattr(make_record.Path, "cwd", lambda: make_record.Path("/"))
    monkeypatch.setenv("HOME", "/")
    assert not make_record.has_machine_path("see https://example.org/a//b and /x/y")
    assert make_record.without_absolute("https://example.org") == "https://example.org"
    monkeypatch.setenv("HOME", "/home/ann")
    assert make_record.has_machine_path('{"a": "/home/ann/data"}')
    assert make_record.has_machine_path("DATA=/home/ann/data")
    assert not make_record.has_machine_path("https://example.org/home/ann/data or /home/anna/data")


def test_one_run_of_a_study_makes_a_non_record(tmp_path):
    run = make_run(tmp_path / "r", 1, compliant=False, device="CPU", world_size=1, train_seconds=3000.0)
    assert make([run], tmp_path / "records", "--track", "non_record", "--blurb", "a study") == 0
    readme = (tmp_path / "records" / "track_non_record_16mb" / "2026-05-01_test" / "README.md").read_text()
    assert "NON-COMPLIANT" in readme and "Non-record track" in readme


def settings_of(run, **values):
    change(run, "summary", settings={**json.loads((run / "summary.json").read_text())["settings"], **values})


def rescript(run, tmp_path):
    """The same run of another script."""
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    make_run(run, 0, 61, script=SCRIPT + b"# changed\n")


def score_again(run):
    """An evaluation of the same run by another script."""
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"event": "code", "sha256": "0" * 64}) + "\n")
        f.write(json.dumps({"event": "final", "val_bpb": 1.06}) + "\n")


BAD = {"mixed configurations": (lambda r, t: settings_of(r[1], MATRIX_LR=0.03), r"MATRIX_LR=0.026 and 0.03"),
       "mixed code": (lambda r, t: rescript(r[1], t), "ran different code"),
       "scored by another script": (lambda r, t: score_again(r[0]), "by another script than the one that"),
       "over size": (lambda r, t: [make_run(t / f"b{n}", n, size=15_999_900) and None for n in (1, 2, 3)],
                     "over the limit"),
       "training over time": (lambda r, t: change(r[2], "summary", train_seconds=600.4),
                              "train_seconds is 600.40"),
       "evaluation over time": (lambda r, t: change(r[2], "summary", eval_seconds=639.9),
                                "eval_seconds is 639.90"),
       "incomplete coverage": (lambda r, t: change(r[0], "coverage", complete=False),
                               "coverage is incomplete"),
       "a part of the validation set": (lambda r, t: change(r[0], "coverage", documents=10_000),
                                        "10,000 documents"),
       "tokens dropped": (lambda r, t: change(r[0], "summary", tokens_scored=47_851_520),
                          "47,851,520 tokens scored"),
       "non-compliant": (lambda r, t: change(r[0], "summary", compliant=False), "NON-COMPLIANT"),
       "a failed probe": (lambda r, t: change(r[0], "probe", ok=False), "the probe C1 failed"),
       "missing log": (lambda r, t: (r[0] / "train.log").unlink(), "has no train.log"),
       "cut log": (lambda r, t: (r[0] / "train.log").write_text("start\n"), "no final line"),
       "missing artifact": (lambda r, t: (r[1] / ARTIFACT).unlink(), "final_model.int6.ptz is missing"),
       "unfinished": (lambda r, t: (r[1] / "summary.json").unlink(), "did not finish"),
       "another score in the log": (lambda r, t: change(r[0], "summary", val_bpb=1.05),
                                    "they are of different runs"),
       "other hardware": (lambda r, t: [change(x, "summary", device="NVIDIA A100") for x in r],
                          "8 x NVIDIA A100"),
       "mixed data": (lambda r, t: change(r[1], "check", detail="1499 shards"), "different data"),
       "a seed twice": (lambda r, t: change(r[1], "summary", seed=42), "seed 42 is there twice")}


@pytest.mark.parametrize("case", BAD)
def test_bad_cases_are_refused_with_the_reason(runs, tmp_path, case):
    spoil, reason = BAD[case]
    spoil(runs, tmp_path)
    folders = [tmp_path / f"b{n}" for n in (1, 2, 3)] if case == "over size" else runs
    with pytest.raises(ToolError, match=reason):
        make(folders, tmp_path / "records", "--packed")
    assert not list((tmp_path / "records").rglob("*.py"))


def test_two_seeds_are_no_record(runs, tmp_path):
    with pytest.raises(ToolError, match="needs 3 seeds"):
        make(runs[:2], tmp_path / "records")


def test_a_changed_log_is_refused(runs, tmp_path):
    log = runs[0] / "train.log"
    log.write_text(log.read_text().replace("blob[0] / 1000", "blob[0] / 2000"))
    with pytest.raises(ToolError, match="the log was changed"):
        make(runs, tmp_path / "records")


def test_a_score_that_does_not_repeat_makes_no_folder(runs, tmp_path):
    (runs[0] / ARTIFACT).write_bytes(bytes([63]) * 1000)
    with pytest.raises(ToolError, match="scores 1.06300000 BPB"):
        make(runs, tmp_path / "records")
    assert list((tmp_path / "records" / "track_10min_16mb").iterdir()) == []


def test_a_script_that_fails_inside_its_folder(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("BREAK", "1")
    with pytest.raises(ToolError, match="failed inside its folder .*BREAK is set"):
        make(runs, tmp_path / "records")


@pytest.mark.parametrize("folder", sorted((ROOT / "records").glob("track_*/2*")), ids=lambda p: p.name)
def test_a_record_of_this_repository_is_whole(folder):
    s = json.loads((folder / "submission.json").read_text())
    assert hashlib.sha256((folder / "train_gpt.py").read_bytes()).hexdigest() == s["code_sha256"]
    for seed, result in s["seed_results"].items():
        summary = json.loads((folder / f"summary_seed{seed}.json").read_text())
        assert summary["val_bpb"] == result["val_bpb"] and f"{result['val_bpb']:.8f}" in (
            folder / "README.md").read_text()
        logged = re.search(r"final val_bpb=([\d.]+)", (folder / f"train_seed{seed}.log").read_text())
        assert float(logged[1]) == pytest.approx(result["val_bpb"], abs=1e-6)
        events = map(json.loads, (folder / f"metrics_seed{seed}.jsonl").read_text().splitlines())
        assert {"step_time", "profile", "final"} <= {event["event"] for event in events}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000


def test_mistakes_end_with_status_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, make_record.__file__, str(tmp_path / "none"), "--name", "x"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
