"""tools/compare.py: the statistics against scipy and against figures worked out by hand."""

import json
import math
import statistics

import pytest

stats = pytest.importorskip("scipy.stats", reason="scipy is missing: pip install -r tools/requirements.txt")

from made_runs import make_run  # noqa: E402

from tools import compare  # noqa: E402
from tools.common import ToolError  # noqa: E402

PR1855 = (1.05989454, 1.06124613, 1.06208695)
PR2135 = (1.05679341, 1.05610947, 1.05662016)


def test_published_systems_against_scipy_and_by_hand():
    a, b = compare.read_group(["pr2135"], "A"), compare.read_group(["#1855"], "B")
    assert tuple(r.bpb for r in a) == PR2135 and tuple(r.bpb for r in b) == PR1855
    result = compare.analyse(a, b)
    v = result["bpb"]
    # by hand: means 1.05650768 and 1.061075873, variances 1.264324e-7 and 1.223421e-6
    error = math.sqrt((1.264324e-7 + 1.223421e-6) / 3)
    assert v.gain == pytest.approx(0.00456819, abs=1e-8)
    assert v.t == pytest.approx(0.00456819 / error, rel=1e-5)
    assert v.t == pytest.approx(6.810, abs=1e-3) and v.df == pytest.approx(2.41, abs=5e-3)
    by_scipy = stats.ttest_ind(PR1855, PR2135, equal_var=False, alternative="greater")
    assert v.p == pytest.approx(by_scipy.pvalue, rel=1e-12) and v.p == pytest.approx(0.00629, abs=1e-5)
    half = stats.t.ppf(0.975, v.df) * error
    assert (v.low, v.high) == pytest.approx((v.gain - half, v.gain + half), rel=1e-4)


def test_the_strict_rule_asks_more_than_a_gain():
    result = compare.analyse(compare.read_group(["pr2135"], "A"), compare.read_group(["pr1855"], "B"))
    nats = result["nats"]
    assert result["measured"] and nats.gain == pytest.approx(0.009997, abs=1e-6)
    left = [2.31265572, 2.311159, 2.31227656]
    right = [2.31944212 - 0.005, 2.32239991 - 0.005, 2.32423994 - 0.005]
    expected = stats.ttest_ind(right, left, equal_var=False, alternative="greater").pvalue
    assert nats.p_rule == pytest.approx(expected, rel=1e-9) and expected == pytest.approx(0.0293, abs=1e-4)
    assert (result["rule"], result["mean_rule"], result["practice"]) == (False, True, True)


def test_official_p_of_the_last_row_is_reproduced():
    result = compare.analyse(compare.read_group(["pr2135"], "A"), compare.read_group(["pr2014"], "B"))
    assert result["bpb"].p == pytest.approx(0.014, abs=5e-4)


def test_seeds_needed_is_the_first_number_that_passes():
    a, b = [1.0570, 1.0568, 1.0572], [1.0600, 1.0604, 1.0596, 1.0601, 1.0599]
    n = compare.seeds_needed(a, b, 0.0023, 0.01)
    va, vb, gain = (statistics.variance(a), statistics.variance(b) / 5,
                    statistics.fmean(b) - statistics.fmean(a) - 0.0023)

    def p(n):
        error = va / n + vb
        return stats.t.sf(gain / math.sqrt(error), error**2 / ((va / n) ** 2 / (n - 1) + vb**2 / 4))

    assert n and n > 2 and p(n) < 0.01 <= p(n - 1)
    assert compare.seeds_needed(a, b, 0.0040, 0.01) is None


def test_nats_are_derived_where_they_are_not_known():
    result = compare.analyse(compare.read_group(["1.0571", "1.0566"], "A"),
                             compare.read_group(["pr1855"], "B"))
    assert not result["measured"] and result["ratio"] == pytest.approx(2.18837, abs=1e-4)
    assert result["nats"].gain == pytest.approx(result["bpb"].gain * result["ratio"])


def test_paired_on_shared_seeds_only():
    a, b = compare.read_group(["pr2135"], "A"), compare.read_group(["pr2014"], "B")
    seeds, gain, p, _ = compare.paired(a, b)
    order = [1.05679341, 1.05610947, 1.05662016], [1.05807084, 1.05740567, 1.05730104]
    assert seeds == [0, 42, 314] and gain == pytest.approx(0.00108485, abs=1e-7)
    assert p == pytest.approx(stats.ttest_rel(order[1], order[0], alternative="greater").pvalue)
    assert compare.paired(compare.read_group(["1.1", "1.2"], "A"), b) is None


def test_run_folders_are_read_and_other_text_is_said(tmp_path, capsys):
    words = []
    for seed, bpb in ((1, 2.0), (2, 2.1), (3, 2.05)):
        folder = tmp_path / f"r{seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"seed": seed, "val_bpb": bpb, "val_loss": 2 * bpb,
                                                         "bytes_scored": 1000, "compliant": True}))
        (folder / "metrics.jsonl").write_text('{"event": "final"}\n')
        words.append(str(folder))
    with pytest.raises(ToolError, match="unlike runs: .*did not score the same .* or --unlike"):
        compare.main([*words, "--vs", "pr1855"])
    assert compare.main([*words, "--vs", "pr1855", "--unlike"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("WARNING: A is worse by 0.9889 BPB") and "did not score the same" in first
    with pytest.raises(ToolError, match="twice"):
        compare.main([words[0], words[0], "--vs", "pr1855"])
    with pytest.raises(ToolError, match="A names .*r1 twice"):
        compare.main([words[0], words[0] + "/../r1/", "--vs", "pr1855"])
    record = tmp_path / "record"
    record.mkdir()
    results = {"1": {"val_bpb": 2.0}, "4": {"val_bpb": 2.2}}
    (record / "submission.json").write_text(json.dumps({"seed_results": results}))
    with pytest.raises(ToolError, match="A has seed 1 twice .record/1, 2.00000000 BPB, and r1, "):
        compare.main([str(record), words[0], "--vs", "pr1855"])
    assert len(compare.read_group([str(record), words[1]], "A")) == 3


def made(tmp_path, name, scores, **changes):
    """Three made-up runs of a side."""
    return [str(make_run(tmp_path / f"{name}{i}", i, bpb, **changes)) for i, bpb in enumerate(scores)]


@pytest.mark.parametrize("scores, answer", [
    ((40, 41, 42), "A is better by 0.0200 BPB, p = 8.2e-06: the record rule is met."),
    ((52, 54, 57), "A is better by 0.0067 BPB, p = 0.015: not yet a record, 2 more seeds of A."),
    ((59, 60, 61), "A is better by 0.0010 BPB, p = 0.14: less than the 0.005 nats"),
    ((62, 63, 64), "A is worse by 0.0020 BPB, p = 0.96: no gain."),
])
def test_the_first_line_is_the_answer(scores, answer, tmp_path, capsys):
    a = made(tmp_path, "a", scores, settings={"MATRIX_LR": 0.03})      # a new setting is no fault
    compare.main([*a, "--vs", *made(tmp_path, "b", (60, 61, 62))])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith(answer) and second == ""


@pytest.mark.parametrize("changes, words", [
    ({"settings": {"MATRIX_LR": 0.03}}, "A: a0 has MATRIX_LR=0.026, a9 has 0.03"),
    ({"script": b"print(1)\n"}, "A: a0 and a9 ran different scripts"),
    ({"device": "NVIDIA A100"}, "hardware: 8 x H100, 8 x NVIDIA A100 and 8 x H100"),
    ({"data_fingerprint": "abc"}, "data: abc and def"),
    ({"settings": {"MAX_WALLCLOCK_SECONDS": 900.0}}, "training seconds: 600.0, 900.0 and 600.0"),
])
def test_unlike_runs_are_refused_unless_told(changes, words, tmp_path, capsys):
    a = [*made(tmp_path, "a", (40, 41)), str(make_run(tmp_path / "a9", 9, 42, **changes))]
    both = [*a, "--vs", *made(tmp_path, "b", (60, 61, 62), data_fingerprint="def")]
    with pytest.raises(ToolError, match="unlike runs: ") as refused:
        compare.main(both)
    assert words in str(refused.value) and "--unlike" in str(refused.value)
    compare.main([*both, "--unlike"])
    assert capsys.readouterr().out.startswith("WARNING: A is better by 0.0200 BPB")


def test_published_systems_may_be_put_together_but_not_named_twice():
    assert len(compare.read_group(["pr1855", "pr2135"], "B")) == 6
    with pytest.raises(ToolError, match="B has seed .* twice"):
        compare.read_group(["pr1855", "#1855"], "B")


@pytest.mark.parametrize("words, text", [(["nowhere", "--vs", "pr1855"], "known are pr1610"),
                                         (["99", "98", "--vs", "pr1855"], "no plausible score"),
                                         (["pr1741", "--vs", "pr1855"], "at least 2"),
                                         (["pr1855"], "two sides")])
def test_mistakes_are_one_clear_line(words, text):
    with pytest.raises(ToolError, match=text):
        compare.main(words)
