"""tools/report.py: the page holds the runs' figures, stands alone, and draws in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
from made_runs import change, make_run

pytest.importorskip("plotly", reason="plotly is missing: pip install -r tools/requirements.txt")

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
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", outside)
    assert str(tmp_path) not in page


def test_missing_events_are_named_and_the_rest_is_drawn(runs, capsys):
    assert report.main([str(runs[0])]) == 0
    said = capsys.readouterr()
    assert "not shown: Where a step's time goes (no step_time events)" in said.out
    assert "no bytes per tensor" in said.err
    page = (runs[0] / "report.html").read_text()
    assert "Not shown: Where a step&#x27;s time goes (no step_time events)" in page
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


def test_non_compliant_is_said(runs):
    change(runs[0], "summary", compliant=False)
    report.main([str(runs[0])])
    assert "NON-COMPLIANT" in (runs[0] / "report.html").read_text()


def test_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "a<b>&", 1)
    report.main([str(run)])
    assert "a<b>" not in (run / "report.html").read_text().split("<main>")[1].split("<section>")[0]


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
    assert dom.count("js-plotly-plot") >= 8 and dom.count("main-svg") >= 8
    assert 'data-asked=""' in dom
    browse(out, f"--screenshot={picture}")
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == 1280
