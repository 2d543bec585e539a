"""tools/adapt.py: paired differences with their errors, rows that are kept, mistakes in one line."""

import numpy as np
import pytest
from conftest import settings, tg

from tools import adapt
from tools.common import ARTIFACT, ToolError


def test_a_paired_difference_and_its_error():
    lengths = np.array([10, 30, 20])
    per_document = np.repeat([0.1, 0.1, 0.1], lengths)
    assert adapt.paired(per_document, lengths) == (pytest.approx(0.1), pytest.approx(0.0))
    draws = np.random.default_rng(0)
    drawn = (np.repeat(draws.normal(size=3), lengths) for _ in range(2000))
    means, errors = zip(*(adapt.paired(x, lengths) for x in drawn))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.2)


def test_rows_are_measured_once_and_compared(data, tmp_path, monkeypatch, capsys):
    s = settings(DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model")
    for name, value in s.changed().items():
        monkeypatch.setenv(name, str(int(value)) if isinstance(value, bool) else str(value))
    model = tg.build_model(s, tg.World())
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    hessians = {n: tg.torch.eye(w.size(-1)) for n, w in weights.items()}
    (tmp_path / ARTIFACT).write_bytes(tg.pack_model(s, tg.Quantiser(s, weights, tg.Curvature(hessians))()))
    call = [str(tmp_path / ARTIFACT), "none: TTT_LORA_LR=0", "fast:", "--out", str(tmp_path / "rows"),
            "--max-tokens", "100"]
    assert adapt.main(call) == 0
    first = capsys.readouterr().out
    assert "against none" in first and "| position |" in first
    real = adapt.measure
    monkeypatch.setattr(adapt, "measure", None)
    assert adapt.main([*call, "--reference", "none"]) == 0
    measured = []
    monkeypatch.setattr(adapt, "measure", lambda tg, s, *more: measured.append(s) or real(tg, s, *more))
    call[2] = "fast: NGRAM_TILT_ENABLED=1 TTT_SUFFIX=20 TTT_STEP_SHARE=0.1"
    assert adapt.main(call) == 0 and [s.ngram_tilt_enabled for s in measured] == [True]
    assert capsys.readouterr().out != first
    assert adapt.main(call) == 0 and len(measured) == 1
    with pytest.raises(ToolError, match="--reference nothing is none of the rows none, fast"):
        adapt.main([*call, "--reference", "nothing"])
