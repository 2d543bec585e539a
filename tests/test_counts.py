"""Counts of earlier text in the score: n-gram hints, the corrector, and what the probes say about them."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
    environment,
    load_config,
    run_here,
    settings,
    shallow,
    sine_model,
    summary,
    tg,
    without,
)

WORDS = dict(within_tau=0.45, within_boost=0.75, word_tau=0.65, word_boost=0.75, agree_add_boost=0.5)
FIELD = dict(ttt_kv_reuse=False, ttt_warm_start_a=True, ttt_optimizer="adam", ttt_doc_order="length")


@pytest.fixture
def s(s):
    return dataclasses.replace(shallow(s), ngram_tilt_enabled=True)


def one_by_one(tokens, order):
    """Hint and confidence of the token expert from a dictionary, token after token."""
    tables, found = {}, []
    for i in range(1, len(tokens)):
        context = tuple(tokens[max(i - order + 1, 0):i])
        hint = (0, 0.0)
        if len(context) == order - 1:
            counts, best = tables.setdefault(context, ({}, [0, 0]))
            if counts:
                hint = best[0], np.float32(best[1]) / np.float32(sum(counts.values()))
            counts[tokens[i]] = counts.get(tokens[i], 0) + 1
            if counts[tokens[i]] > best[1]:
                best[:] = tokens[i], counts[tokens[i]]
        found.append(hint)
    return tuple(map(np.array, zip(*found, strict=True)))


@pytest.mark.parametrize("parts_from", [100, 1 << 20])
@pytest.mark.parametrize("order", [1, 2, 4, 16])
def test_the_token_expert_counts_as_a_dictionary_does(s, order, parts_from, monkeypatch):
    """Counted in parts of the keys, or all at once."""
    monkeypatch.setattr(tg, "COUNT_IN_PARTS", parts_from)
    tokens = np.random.default_rng(order).integers(1, 12, 3000).astype(np.uint16)
    tokens[1500:2200] = tokens[:700]
    got = tg.ngram_experts(dataclasses.replace(s, token_order=order), tokens)["token"]
    for mine, theirs in zip(got, one_by_one(tokens.tolist(), order), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("changes", [
    {}, WORDS, dict(WORDS, ngram_gates="open_word", ngram_choice="confidence"),
    FIELD, dict(corrector_alpha=0.3, corrector_orders="2,3"), dict(FIELD, corrector_alpha=0.3)], ids=str)
def test_causal_counts_pass_every_probe(s, changes):
    s = dataclasses.replace(s, **changes)
    probes = tg.run_probes(s, tg.World(), sine_model(s))
    assert all(p.ok for p in probes), probes
    assert "C1 n-gram hints" in [p.name for p in probes]


@pytest.mark.parametrize("changes,caught", [
    (dict(WORDS, ngram_gates="target"), ("C1 n-gram hints", "C2 windows", "C2 test-time training")),
    (dict(FIELD, ngram_doc_order="stream"), ("C1 test-time training",)),
    (dict(ngram_tilt_enabled=False, prequant_ttt_enabled=True), ("C1 windows",))], ids=str)
def test_published_violations_fail_their_probes(s, changes, caught):
    """Gates that read the target; counts in another order than the scores; training before scoring."""
    s = dataclasses.replace(s, **changes)
    failed = {p.name for p in tg.run_probes(s, tg.World(), sine_model(s)) if not p.ok}
    also = {"C1 n-gram hints", "C1 sliding windows", "C2 sliding windows"}
    assert set(caught) <= failed <= {*caught, *also}


@pytest.mark.parametrize("tau, hits, asked", [(0.45, 9, 20), (0.65, 13, 20), (0.7, 7, 10), (0.8, 4, 5)])
@pytest.mark.parametrize("expert", ["token_threshold", "within_tau", "word_tau"])
def test_a_confidence_of_exactly_the_threshold_opens_the_gate(s, expert, tau, hits, asked, monkeypatch):
    """As published: a float32 ratio is compared with the threshold as a float32."""
    off = dict(token_threshold=2.0, within_tau=2.0, word_tau=2.0)
    s = dataclasses.replace(s, **{**off, expert: tau})
    share = np.float32(hits) / np.float32(asked)
    below = np.nextafter(share, np.float32(0))
    monkeypatch.setattr(tg, "ngram_experts", lambda *_: {
        expert: (np.array([5, 6, 7]), np.array([below, share, 1], np.float32))})
    assert tg.Hints.of(s, np.arange(4)).at.tolist() == [1, 2]


def test_every_threshold_in_use_is_one_of_those_tested():
    """Thresholds above 1 switch an expert off."""
    seen = set()
    for name in CONFIGS:
        s = tg.Settings.from_env(load_config(name))
        if s.ngram_tilt_enabled:
            seen |= {tau for tau, _ in tg.experts_in_use(s).values()}
    assert seen and seen <= {0.45, 0.65, 0.7, 0.8}


def test_hints_change_the_score_but_not_what_adapters_learn_from(s, data):
    val, s = tg.Validation(s), dataclasses.replace(s, token_order=3)
    model, losses = sine_model(s), {}
    for hints in (None, tg.Hints.for_adapting(s, tg.World(), val)):
        chunks, val.hints = [], hints
        ttt = tg.PhasedTTT(s, tg.World(), model, val, lambda event, chunks=chunks, **v: chunks.append(v))
        window = tg.chunk_window(np.array([16, 16]), 0, 16, rerun=0)
        scored = ttt.score_chunk(val.documents.start[:2], window, None, tg.KeyCache(64))
        losses[hints is None] = scored.losses, ttt.ledger.loss[:16].clone()
    assert torch.equal(losses[True][0], losses[False][0])
    assert not torch.equal(losses[True][1], losses[False][1])


def test_documents_outside_the_limits_do_not_adapt(s, data):
    s, val = dataclasses.replace(
        s, ngram_tilt_enabled=False, phased_ttt_prefix_docs=0, ttt_doc_order="length"), tg.Validation(s)

    def losses(**changes):
        ttt = tg.PhasedTTT(dataclasses.replace(s, **changes), tg.World(), sine_model(s), val)
        ttt.run()
        return ttt.ledger.loss

    plain, limited = losses(ttt_lora_lr=0.0), losses(ttt_train_min_doc_len=60, ttt_train_max_doc_len=100)
    adapted = losses()
    for begin, n in zip(val.documents.start, val.documents.length, strict=True):
        targets = slice(begin, begin + n - 1)
        inside = 60 <= n <= 100
        assert torch.allclose(limited[targets], (adapted if inside else plain)[targets], atol=1e-5)
        assert inside or n <= 17 or not torch.allclose(adapted[targets], plain[targets], atol=1e-5)


def test_the_only_door_to_sealed_tokens_marks_the_run(s):
    val, marks = tg.Validation(s), []

    class Run:
        not_compliant = marks.append

    with tg.Validation.seal():
        with pytest.raises(RuntimeError, match="break the rules"):
            _ = val.tokens
        assert len(val.open_for_study(Run, "study")) and marks == ["study"]


def test_an_artifact_of_a_study_says_so_wherever_it_is_scored(data, tmp_path):
    """Pre-quantisation training, gates that leak and a calibration in one run; then its artifact alone."""
    first, again = tmp_path / "first", tmp_path / "again"
    with without("rehearse"):
        status, text = run_here(environment(
            data, ARTIFACT_DIR=first, PREQUANT_TTT_ENABLED=1, PREQUANT_TTT_EPOCHS=1, LOGIT_CALIB_ENABLED=1,
            LOGIT_CALIB_TOKENS=500, NGRAM_TILT_ENABLED=1, NGRAM_GATES="target", WITHIN_TAU=0.5,
            TTT_ENABLED=0))
    assert status == 0, text
    then = summary(first)
    assert not then["compliant"] and "NON-COMPLIANT" in (first / "train.log").read_text()
    reasons = " ".join(then["not_compliant_because"])
    assert tg.PREQUANT in reasons and "NGRAM_GATES=target" in reasons and "C1 windows" in reasons
    header, streams = tg.artifact_from_bytes((first / tg.ARTIFACT_NAME).read_bytes(), "it")
    assert header["not_compliant"] == tg.PREQUANT and len(streams[tg.CALIBRATION_STREAM]) == 60
    status, text = run_here(environment(
        data, ARTIFACT_DIR=again, EVAL_ONLY_QUANTIZED_PATH=first / tg.ARTIFACT_NAME, TTT_ENABLED=0,
        SLIDING_WINDOW_ENABLED=0))
    assert status == 0, text
    now = summary(again)
    assert now["not_compliant_because"] == [tg.PREQUANT]
    assert now["quantized_val_bpb"] == pytest.approx(then["quantized_val_bpb"], rel=1e-6)


@pytest.mark.parametrize("env,words", [
    (dict(NGRAM_TILT_ENABLED=1, TOKEN_THRESHOLD=2), "no expert"),
    (dict(CORRECTOR_ORDERS="2,x"), "whole numbers")])
def test_settings_that_make_no_sense_are_refused(env, words):
    with pytest.raises(tg.UserError, match=words):
        settings(**env)
