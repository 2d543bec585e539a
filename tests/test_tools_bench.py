"""tools/bench.py: every group runs at small size and says what it found; no figure is judged."""

import json
import math

import pytest

from tools import account, bench
from tools.common import ToolError


@pytest.mark.long
def test_every_group_runs_and_writes_json(tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main(["--rounds", "1", "--size", "small", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    groups = {r["group"] for r in found["rows"]}
    assert groups == {
        "attention",
        "cross-entropy",
        "MLP",
        "train step",
        "GPTQ",
        "packing",
        "evaluation",
        "n-gram hints",
        "CaseOps",
    }
    for row in found["rows"]:
        assert "cannot run" not in row["note"], row
        if row["ms"] is not None:
            assert row["ms"] > 0 and math.isfinite(row["ratio"]) and row["low"] <= row["ratio"] <= row["high"]
    assert [r["ratio"] for r in found["rows"] if r["note"] == "reference"] == [1.0] * 8


def test_the_dictionary_gives_the_hints_that_sorting_gives():
    b, order = bench.Bench(1, True), 3
    tokens = b.tg.np.random.default_rng(0).integers(1, 6, 500).astype("uint16")
    s = b.with_settings(NGRAM_TILT_ENABLED=1, TOKEN_ORDER=order)
    hints, confidence = b.tg.ngram_experts(s, tokens)["token"]
    slow = bench.hints_by_dictionary(tokens.tolist(), order)
    assert [h if h > 0 else 0 for h in slow] == hints[order - 2:].tolist() and confidence.any()


def test_a_contender_that_cannot_run_says_why():
    b = bench.Bench(1, True)

    def broken():
        raise RuntimeError("no such kernel\nmore")

    rows = b.race("x", {"good": lambda: None, "bad": broken})
    assert [r.name for r in rows] == ["bad",
                                      "good"] and rows[0].note == "cannot run: RuntimeError: no such kernel"
    assert "no such kernel" in bench.show(rows)


@pytest.mark.parametrize("words, reason", [(["speed"], "unknown group speed"),
                                           (["--coders", "no.ptz"], "is no file"),
                                           (["--rounds", "0"], "at least 1")])
def test_mistakes(words, reason):
    with pytest.raises(ToolError, match=reason):
        bench.main(words)


def test_coders_agree_on_an_artifact(tmp_path, monkeypatch):
    """Five coders on a small model's codes: every one gives them back, and ours is the smallest."""
    b = bench.Bench(1, True)
    monkeypatch.setattr(b.tg, "SMALL_TENSOR", 1000)
    shapes = b.tg.matrix_views({n: p.detach() for n, p in b.model(b.settings).named_parameters()})
    weights = {n: b.torch.randn(w.shape) for n, w in shapes.items()}
    q = b.tg.Quantiser(b.settings, weights, b.tg.Curvature({}))(0.3)
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(b.tg.pack_model(b.settings, q))
    (tmp_path / "summary.json").write_text(json.dumps({"settings": b.settings.as_env()}))
    (tmp_path / "metrics.jsonl").write_text('{"event": "final"}\n')
    lines = [line.split("|") for line in bench.coders(b, str(path)).splitlines() if line.startswith("| ")]
    sizes = {line[1].strip(): int(line[2].replace(",", "")) for line in lines[2:]}
    assert len(sizes) >= 4 and min(sizes, key=sizes.get) == "ours, side bytes counted"


def test_account_counts_what_the_formulas_say():
    b = bench.Bench(1, True)
    s, n = b.settings, 512
    lines = {line.name: line for line in (account.count(b.torch, case)
                                          for case in account.train_cases(b.tg, b.torch, s, b.torch.device(
                                              "meta"), n, 8))}
    d, m, v = s.model_dim, s.hidden_dim, s.vocab_size
    assert lines["MLP"].flops == 12 * n * d * m and lines["head product"].flops == 6 * n * d * v
    assert lines["Q, K, V projections"].flops == 6 * n * d * (d + 2 * s.kv_dim)
    # one kernel for x + scale * branch reads both and the scale, writes the sum; the backward reads them and
    # the sum's gradient, writes three gradients: bf16
    assert lines["scale and add"].least == 2 * (2 * (2 * n * d + d) + 2 * n * d + 2 * n * d + d)
    for line in lines.values():
        assert line.unfused >= 0.99 * line.least > 0, line
        assert math.isclose(line.floor(1e12, 2e12), 1e-9 * max(line.flops, line.least / 2))
    slots = b.tg.layer_plan(s, True).slots
    model = b.tg.GPT(s).flops_per_token(b.tg.layer_plan(s, True), 0) * 3 * n
    gates = 6 * n * slots * s.gate_window * s.num_heads + 4 * (n - 1) * s.gate_window   # heads and smear
    other = ("attention", "Muon's direction")
    products = sum(x.flops * x.times[1] for name, x in lines.items() if name not in other)
    assert products == model + gates


def test_account_prints_every_table(capsys):
    assert bench.main(["--account", "--size", "small", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    for what in ("training step, without loops", "training step, with loops", "test-time training", "GPTQ"):
        assert f"\n{what}\n" in shown
    assert shown.count("\nsum ") == 4
