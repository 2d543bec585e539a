"""tools/bench.py: every group runs at small size and says what it found; no figure is judged."""

import json
import math

import pytest

from tools import bench
from tools.common import ToolError


def test_every_group_runs_and_writes_json(tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main(["--rounds", "1", "--size", "small", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    groups = {r["group"] for r in found["rows"]}
    assert groups == {"attention", "cross-entropy", "MLP", "train step", "GPTQ", "packing", "evaluation"}
    for row in found["rows"]:
        assert "cannot run" not in row["note"], row
        if row["ms"] is not None:
            assert row["ms"] > 0 and math.isfinite(row["ratio"]) and row["low"] <= row["ratio"] <= row["high"]
    assert [r["ratio"] for r in found["rows"] if r["note"] == "reference"] == [1.0] * 5


def test_a_contender_that_cannot_run_says_why():
    b = bench.Bench(1, True)

    def broken():
        raise RuntimeError("no such kernel\nmore")

    rows = b.race("x", {"good": lambda: None, "bad": broken})
    assert [r.name for r in rows] == ["bad", "good"] and rows[
        0
    ].note == "cannot run: RuntimeError: no such kernel"
    assert "no such kernel" in bench.show(rows)


@pytest.mark.parametrize(
    "words, reason", [(["speed"], "unknown group speed"), (["--rounds", "0"], "at least 1")]
)
def test_mistakes(words, reason):
    with pytest.raises(ToolError, match=reason):
        bench.main(words)
