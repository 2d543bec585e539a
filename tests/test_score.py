"""The ledger, windows, and the scorer."""

import json

import numpy as np
import pytest
import torch
from conftest import events, open_run, sine_model, tg


@pytest.mark.parametrize("total", [1, 15, 16, 63, 64, 65, 80, 81, 200])
@pytest.mark.parametrize("seq_len, stride", [(64, 16), (64, 64), (64, 1), (16, 5)])
def test_windows_score_every_position_once(total, seq_len, stride):
    windows = tg.sliding_windows(total, seq_len, stride)
    scored = np.concatenate([np.arange(first, end) for _, end, first in windows])
    assert (scored == np.arange(total)).all()
    assert all(end - begin <= seq_len and begin <= first for begin, end, first in windows)
    assert len(windows) == 1 if total <= seq_len else len(windows) > 1


def test_rows_hold_every_window_and_respect_the_capacity():
    windows = [(0, n, 0) for n in (5, 60, 64, 3, 33, 64, 1)]
    rows = tg.pack_rows(windows, 64)
    assert sorted(w for r in rows for w in r) == sorted(windows) and len(rows) == 4
    assert all(r and sum(end - begin for begin, end, _ in r) <= 64 for r in rows)


def ledger(s):
    val = tg.Validation(s)
    return val, tg.Ledger(val, torch.device("cpu"))


def test_a_target_is_booked_once(s):
    val, books = ledger(s)
    books.book(torch.arange(len(val.tokens) - 1), torch.ones(len(val.tokens) - 1))
    books.book(torch.tensor([3]), torch.ones(1))
    with pytest.raises(RuntimeError, match="the first at 3, were scored 2 times"):
        books.close(tg.World())


def test_a_missing_target_breaks_the_coverage(s):
    val, books = ledger(s)
    n = len(val.tokens) - 1
    books.book(torch.arange(n - 1), torch.ones(n - 1))
    with pytest.raises(RuntimeError, match="coverage is broken: 1 targets"):
        books.close(tg.World())


def test_only_booked_documents_can_be_trained_on(s):
    val, books = ledger(s)
    a, n = int(val.documents.start[1]), int(val.documents.length[1])
    books.book(torch.arange(a, a + n - 2), torch.ones(n - 2))
    with pytest.raises(RuntimeError, match="not scored once each"):
        books.booked(np.array([1]), tg.World())
    books.book(torch.tensor([a + n - 2]), torch.ones(1))
    assert (books.booked(np.array([1]), tg.World()).tokens == val.tokens[a : a + n]).all()


def test_profiles_are_sums_over_documents_and_positions(s):
    val, books = ledger(s)
    n = len(val.tokens) - 1
    books.book(torch.arange(n), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    books.close(tg.World())
    edges = tg.PROFILE_EDGES
    seen = {by: [set() for _ in edges] for by in ("length", "position")}
    expected = {by: {k: [0] * len(edges) for k in ("tokens", "bytes", "nats")} for by in seen}
    for d, (start, length) in enumerate(zip(val.documents.start, val.documents.length - 1)):
        for i in range(length):
            for by, where in (("length", length), ("position", i)):
                bucket = sum(where >= e for e in edges) - 1
                seen[by][bucket].add(d)
                amounts = 1, int(val.target_bytes[start + i]), float(books.loss[start + i])
                for k, amount in zip(("tokens", "bytes", "nats"), amounts):
                    expected[by][k][bucket] += amount
    for profile in tg.profiles(books):
        by = profile["by"]
        assert profile["documents"] == [len(x) for x in seen[by]] and min(profile["documents"][:2]) > 0
        for k, x in expected[by].items():
            assert profile[k] == pytest.approx(x), (by, k)
        json.dumps(profile)


def test_bpb_is_bits_over_bytes():
    score = tg.Score(8 * tg.LN2, 4.0, 2)
    assert (score.bpb, score.loss) == (2.0, 4 * tg.LN2)


@pytest.mark.parametrize("stride", [16, 64])
def test_scorer_equals_document_by_document_windows(s, stride):
    s = tg.dataclasses.replace(s, eval_kv_reuse=False)
    model, val = sine_model(s), tg.Validation(s)
    got = tg.Scorer(s, tg.World(), model).windows(val, stride)
    total, plan = 0.0, tg.layer_plan(s, True)
    for a, n in zip(val.documents.start, val.documents.length):
        doc = torch.from_numpy(val.tokens[a : a + n].astype(np.int64))
        for b, e, f in tg.sliding_windows(n - 1, s.eval_seq_len, stride):
            with torch.no_grad():
                total += (
                    model.losses(doc[None, b:e], doc[None, b + 1 : e + 1], plan)[0, f - b :]
                    .double()
                    .sum()
                    .item()
                )
    assert got.tokens == len(val.tokens) - 1 and got.byte_sum == val.target_bytes.sum()
    assert abs(got.loss_sum - total) < 1e-5 * total


def test_scores_do_not_depend_on_what_is_packed_beside(s):
    """Other documents later in the stream leave a document's losses bit-equal when its row is the same."""
    model, val = sine_model(s), tg.Validation(s)
    scorer, books = tg.Scorer(s, tg.World(), model), tg.Ledger(val, torch.device("cpu"))
    windows = [(0, 40, 0), (40, 64, 40)]
    plan = tg.layer_plan(s, True)
    with torch.no_grad():
        scorer.score_row(windows, val, plan, books)
        first = books.loss[:40].clone()
        val.stream = val.tokens.copy()
        val.tokens[42:66] = 7
        books = tg.Ledger(val, torch.device("cpu"))
        scorer.score_row(windows, val, plan, books)
    assert torch.equal(first, books.loss[:40]) and books.loss[45:60].any()


def test_a_document_beyond_the_window_costs_one_pass(s, monkeypatch):
    """The sliding evaluation on cached keys, against windows that are encoded again: the same scores for
    documents within the window and for the first window of longer ones, a forward token per target. In
    float64: rows of other lengths add in another order, which float32 shows in the sixth digit."""
    val, model, books, passes = tg.Validation(s), sine_model(s), [], []
    model.compute_dtype = torch.float64
    losses = tg.GPT.losses
    monkeypatch.setattr(tg.GPT, "losses", lambda self, ids, *a, **k: (
        passes.append(ids.numel()), losses(self, ids, *a, **k))[1])
    for reuse in (True, False):
        scorer = tg.Scorer(tg.dataclasses.replace(s, eval_kv_reuse=reuse, eval_stride=8), tg.World(), model)
        scorer.windows(val, 8)
        books.append(scorer.ledger.loss)
        passes.append(0)
    targets = len(val.tokens) - 1
    first = np.concatenate([np.arange(n - 1) < s.eval_seq_len for n in val.documents.length])
    assert 0 < first.sum() < targets
    gap = (books[0] - books[1]).abs()
    assert gap[first].max() < 2e-5 < 1e-3 < gap.max()
    cut = passes.index(0)
    assert sum(passes[:cut]) < targets + 8 * len(val.documents) and sum(passes[cut:]) > 2 * targets


@pytest.mark.parametrize("seconds, setting, reason", [
    (599.0, 0, None), (599.0, 900, None), (601.0, 0, "the competition's 600 s"),
    (601.0, 900, "the competition's 600 s"), (31.0, 30, "EVAL_MAX_SECONDS 30 s"), (29.0, 30, None)])
def test_a_raised_setting_raises_no_budget(seconds, setting, reason):
    marks = []

    class Run:
        not_compliant = marks.append

    tg.check_budget(Run, "evaluation", seconds, "EVAL_MAX_SECONDS", setting)
    assert marks == ([f"evaluation took {seconds:.1f} s of {reason}"] if reason else [])


def test_a_score_that_is_not_finite_is_an_error(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(tg.UserError, match="score of the stage sliding is nan"):
        tg.log_score(run, "sliding", tg.Score(float("nan"), 10.0, 5), None, tg.Clock())
    assert not events(tmp_path, "score_sliding")
