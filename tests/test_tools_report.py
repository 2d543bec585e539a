"""tools/report.py and tools/page.py: the page holds the runs' figures and a verdict, stands alone, and draws
in a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
from made_runs import change, make_run

pytest.importorskip("plotly", reason="plotly is missing: pip install -r tools/requirements.txt")

from tools import page as look  # noqa: E402
from tools import report  # noqa: E402
from tools.common import ToolError, load_run, run_cli  # noqa: E402

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
TENSORS = [{"name": f"blocks.{i}.{part}.weight", "how": "gptq (int6)", "bytes": 900 + i,
            "error": 0.1 + i / 100} for i in range(3) for part in ("attn.c_q", "mlp.fc")]


def add_events(run, *events):
    with open(run / "metrics.jsonl", "a") as f:
        f.writelines(json.dumps({"time": 1.7e9, **e}) + "\n" for e in events)


def profile(stage, by, shift):
    return {"event": "profile", "stage": stage, "by": by, "edges": [0, 64, 256], "documents": [1, 2, 3],
            "tokens": [10, 20, 30], "bytes": [100, 200, 300], "nats": [90 + shift, 160 + shift, 210 + shift]}


@pytest.fixture
def whole(runs, monkeypatch):
    """Three runs with all that the page can show; bytes per tensor, which need the real script, are given."""
    parts = {"data": 1.0, "forward": 30.0, "backward": 60.0}
    stages = enumerate(("ttt", "sliding", "quantized"))
    rows = [profile(stage, by, n) for n, stage in stages for by in ("length", "position")]
    for run in runs:
        add_events(run, {"event": "step_time", "step": 100, "looping": True, "parts": parts}, *rows)
    monkeypatch.setattr(report, "tensors_of", lambda run: TENSORS)
    return runs


def cells(page: str) -> dict:
    """(run, key) -> text of the table's cells."""
    return {(m[1], m[2]): m[3] for m in re.finditer(r'<td data-run="([^"]*)" data-key="([^"]*)">([^<]*)</td>',
                                                    page)}


def verdicts(page: str) -> list[str]:
    """The word over every run."""
    return re.findall(r'<span class="badge">([^<]*)</span>', page)


def figures(page: str) -> dict:
    """The plots of a page by their key, as plotly.js takes them."""
    return json.loads(re.search(r'<script id="figures"[^>]*>(.*?)</script>', page, re.S)[1])


def report_on(*folders) -> str:
    """The page of some runs."""
    out = folders[0].parent / "page.html"
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text()


def agree(page: str, folders) -> int:
    """How many cells equal summary.json, all of them."""
    shown = cells(page)
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        for key, _, form in report.TABLE:
            assert shown[folder.name, key] == format(summary[key], form), (folder, key)
    return len(shown)


def test_the_page_shows_the_figures_of_summary_json(whole, tmp_path):
    out = tmp_path / "page.html"
    assert report.main([*map(str, whole), "--out", str(out)]) == 0
    page = out.read_text()
    assert agree(page, whole) == 3 * len(report.TABLE)
    for key in ("scores", "curves", "pace", "step_time", "timeline", "treemap", "rounding", "profiles"):
        assert f'id="{key}"' in page, key
    library = look.packed_library()
    assert page.count(library) == 1 and len(page) < 5_000_000
    assert not re.search(r"""https?:|(src|href)\s*=\s*["']?//|@import|url\(""", page.replace(library, ""))
    assert str(tmp_path) not in page


def test_missing_events_are_named_and_the_rest_is_drawn(runs, capsys):
    assert report.main([str(runs[0])]) == 0
    said = capsys.readouterr()
    assert "not shown: Where a step's time goes (no step_time events)" in said.out
    assert "no bytes per tensor" in said.err
    page = (runs[0] / "report.html").read_text()
    assert "Not shown: Where a step's time goes (no step_time events)" in html.unescape(page)
    assert 'id="curves"' in page


@pytest.mark.parametrize("left", [None, {"val_bpb": None, "quantized_val_bpb": 1.07, "steps": 9, "seed": 1}])
def test_a_run_that_is_not_finished_is_shown(runs, left):
    path = runs[0] / "summary.json"
    path.write_text(json.dumps(left)) if left else path.unlink()
    assert report.main([str(runs[0])]) == 0
    assert "unfinished" in (runs[0] / "report.html").read_text()


def test_a_damaged_log_is_one_line(runs, capsys):
    with open(runs[0] / "metrics.jsonl", "a") as f:
        f.write("[1]\n")
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: report.main([str(runs[0])]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: line ") and said.count("\n") == 1


def test_the_verdict_is_that_of_summary_probes_and_bytes(runs):
    assert verdicts(report_on(*runs)) == ["COMPLIANT"] * 3
    change(runs[0], "summary", compliant=False, not_compliant_because=["training took 601.0 s of 600 s"])
    change(runs[1], "probe", ok=False, figure="0.013 leaks")
    change(runs[2], "summary", total_bytes=16_000_001)
    page = report_on(*runs)
    assert verdicts(page) == ["NON-COMPLIANT"] * 3
    for reason in ("training took 601.0 s of 600 s", "probe C1: 0.013 leaks", "16,000,001 bytes are over"):
        assert f'<li class="bad">{reason}' in page


def test_a_run_without_a_score_says_how_it_ended(runs):
    for run, last in zip(runs, ({"event": "error", "text": "no memory"}, {"event": "interrupted"}, {})):
        (run / "summary.json").unlink()
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:13]) + json.dumps(last))
    page = report_on(*runs)
    assert verdicts(page) == ["FAILED", "STOPPED", "UNFINISHED"]
    assert '<li class="bad">no memory' in page and "step 1,000 <small>20% of training" in page


def test_settings_that_differ_are_named_and_no_others(runs):
    settings = json.loads((runs[0] / "summary.json").read_text())["settings"]
    change(runs[0], "summary", settings={**settings, "MATRIX_LR": 0.05, "ARTIFACT_DIR": "elsewhere"})
    found = re.findall(r'data-setting="(\w+)" data-run="s42">([^<]*)', report_on(*runs))
    assert found == [("MATRIX_LR", "0.05"), ("SEED", "42")]


def test_published_results_are_drawn_for_their_own_text_alone(runs):
    def names(page):
        return {trace.get("name") for trace in figures(page)["stages"]["data"]}

    page = report_on(runs[0])
    assert "the record, #2135" in names(page) and "0.0035 above the record, #2135 (1.0565)" in page
    change(runs[0], "summary", bytes_scored=80_000)
    page = report_on(runs[0])
    assert names(page) == {"s42"} and "#2135" not in page and "another text" in page


def test_the_loss_of_every_step_is_drawn_over_steps_and_seconds(runs):
    every = [7 - step / 1000 for step in range(1, 4001)]
    add_events(runs[0], {"event": "losses", "step": 2000, "losses": every[:2000]},
               {"event": "losses", "step": 4000, "losses": [*every[2000:3998], None, every[-1]]})
    page = report_on(runs[0])
    raw, mean, loop = figures(page)["loss"]["data"]
    assert len(raw["x"]) == points_of(raw) == report.MOST_POINTS and raw["x"][-1] == 4000
    assert raw["y"][0] == pytest.approx(7 - 0.0045, abs=1e-4)      # of the first eight steps
    assert raw["meta"]["seconds"][-1] == pytest.approx(4000 * 0.12)
    assert max(abs(a - b) for a, b in zip(raw["y"], mean["y"])) < 1e-3      # a straight line stays one
    assert loop["x"] == [2000] and 'data-axis="seconds"' in page


def points_of(trace):
    """Points of a curve that have step, second and value."""
    return len(set(zip(trace["x"], trace["meta"]["seconds"], trace["y"])))


def test_colours_tell_runs_from_phases_and_kinds():
    others = [*report.PHASES.values(), *report.PARTS, *report.KINDS.values()]
    assert len({*look.RUN_COLOURS, *report.PHASES.values()}) == len(look.RUN_COLOURS) + len(report.PHASES)
    assert not set(look.RUN_COLOURS) & set(others)


def test_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "a<b>&", 1)
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert "a<b>" not in page and "a&lt;b&gt;&amp;" in page


def test_phases_add_up(runs):
    clocks = report.phases(load_run(runs[0]))
    assert sum(s for _, s in clocks["training budget"]) == pytest.approx(589.0 + 4.1 + 5.2)
    assert sum(s for _, s in clocks["evaluation budget"]) == pytest.approx(480.0)


def test_phases_of_a_log_with_an_eval_only_run_behind(runs):
    alone = report.phases(load_run(runs[0]))
    add_events(runs[0], {"event": "start"}, {"event": "pack", "quantise_s": 50.0, "pack_s": 60.0},
               {"event": "artifact", "calibrate_s": 70.0}, {"event": "score_sliding", "elapsed": 90.0},
               {"event": "probes", "seconds": 3.0}, {"event": "final"})
    both = report.phases(load_run(runs[0]))
    assert both["training budget"] == alone["training budget"]
    assert both["evaluation budget"] == [("sliding windows", 90.0), ("test-time training", 390.0)]
    assert ("probes", 3.0) in both["outside the clocks"]


def test_each_run_has_a_treemap_of_its_bytes(whole):
    plots = figures(report_on(*whole))
    for i, run in enumerate(whole):
        tree = plots[f"bytes-run{i}"]["data"][0]
        size = json.loads((run / "summary.json").read_text())["code_bytes"]
        assert tree["values"][tree["labels"].index("train_gpt.py")] == size
        assert tree["values"][0] == sum(v for v, p in zip(tree["values"], tree["parents"]) if p == "all")


def test_too_many_runs(runs):
    with pytest.raises(ToolError, match="at most 8"):
        report.main([str(runs[0])] * 9)


def browse(page, *options):
    """The page in a headless browser; the network leads nowhere."""
    return subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                           "--window-size=1280,4200", "--virtual-time-budget=10000",
                           "--disable-background-networking", "--disable-component-update", "--no-first-run",
                           "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()],
                          capture_output=True, text=True, timeout=600)


@pytest.mark.long
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")
def test_in_a_real_browser(whole, tmp_path):
    out, picture = tmp_path / "page.html", tmp_path / "page.png"
    report.main([*map(str, whole), "--out", str(out)])
    watched = tmp_path / "watched.html"      # the page, and a list of all it asked for
    watched.write_text(out.read_text().replace("</body>", """<script>setTimeout(() => {
        const asked = performance.getEntriesByType("resource").map(e => e.name);
        document.body.dataset.asked = asked.filter(n => !/^(data|blob):/.test(n)).join(" ");
    }, 3000)</script></body>"""))
    dom = browse(watched, "--dump-dom").stdout
    assert agree(dom, whole) == 3 * len(report.TABLE)
    assert dom.count("js-plotly-plot") == len(figures(out.read_text())) and dom.count("main-svg") >= 8
    assert 'data-asked=""' in dom
    browse(out, f"--screenshot={picture}")
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == 1280
