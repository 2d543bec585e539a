"""tools/bench.py: every group runs at small size and says what it found; no figure is judged."""

import json
import math

import pytest

from tools import bench
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
