"""Score-first test-time training: order, causality, determinism."""

import numpy as np
import pytest
import torch
from conftest import settings, sine_model, tg


def run(s, val=None, trace=None):
    val = val or tg.Validation(s)
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), val, trace)
    return ttt, ttt.run()


def changed(s, **changes):
    return tg.dataclasses.replace(s, **changes)


def test_adaptation_helps_on_text_that_repeats_itself(s):
    _, still = run(changed(s, ttt_lora_lr=0.0, phased_ttt_prefix_docs=0))
    _, adapted = run(changed(s, ttt_lora_lr=0.001, phased_ttt_prefix_docs=0))
    assert adapted.loss < still.loss


def test_without_learning_it_is_plain_scoring(s):
    s = changed(s, ttt_lora_lr=0.0, phased_ttt_prefix_docs=0, ttt_eval_seq_len=256)
    ttt, score = run(s)
    val, plan, model = ttt.val, ttt.plan, sine_model(s)
    for a, n in zip(val.documents.start, val.documents.length):
        doc = torch.from_numpy(val.tokens[a : a + n].astype(np.int64))[None]
        with torch.no_grad():
            alone = model.losses(doc[:, :-1], doc[:, 1:], plan)[0]
        assert torch.allclose(ttt.ledger.loss[a : a + n - 1], alone, atol=3e-5)


def test_the_same_score_every_time(s):
    assert run(s)[1] == run(s)[1]


def test_every_target_is_scored_once_before_anything_learns_from_it(s):
    events = []
    real_adapt, real_book = tg.PhasedTTT.adapt, tg.Ledger.book
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tg.Ledger, "book", lambda self, at, losses: (events.append("book"), real_book(self, at, losses))
        )
        patch.setattr(tg.PhasedTTT, "adapt", lambda self, *a: (events.append("adapt"), real_adapt(self, *a)))
        _, score = run(s)
    assert score.tokens == len(tg.Validation(s).tokens) - 1
    assert all(before == "book" for before, event in zip(events, events[1:]) if event == "adapt")
    assert 0 < events.count("adapt") < events.count("book")  # the last chunk of a group never trains


def test_later_tokens_of_a_document_never_change_its_earlier_scores(s):
    s = changed(s, phased_ttt_prefix_docs=0)
    val = tg.Validation(s)
    longest = int(np.argmax(val.documents.length))
    cut = int(val.documents.start[longest]) + 40
    a, _ = run(s, val)
    other = tg.Validation(s)
    other.tokens = val.tokens.copy()
    other.tokens[cut + 1 : cut + 20] = 9
    b, _ = run(s, other)
    start = int(val.documents.start[longest])
    assert torch.equal(a.ledger.loss[start:cut], b.ledger.loss[start:cut])
    assert not torch.equal(a.ledger.loss[cut : cut + 20], b.ledger.loss[cut : cut + 20])


def test_phases_train_on_scored_documents_only_and_change_the_base(s):
    seen = []
    ttt, _ = run(s, trace=lambda event, **v: seen.append((event, v)))
    phases = [v["tokens"] for event, v in seen if event == "phase"]
    assert len(phases) == 2 and len(phases[0]) < len(phases[1])
    assert [v["lr"] for event, v in seen if event == "sgd_step"]
    before = sine_model(s)
    assert not torch.equal(ttt.model.qo_bank, before.qo_bank)


def test_ranks_share_groups_by_arithmetic():
    share = tg.share_out([5, 1, 1, 1, 1, 1], 2)
    assert share == [[0], [1, 2, 3, 4, 5]] and share == tg.share_out([5, 1, 1, 1, 1, 1], 2)


def test_several_steps_and_sgd(s):
    scores = {
        run(changed(s, ttt_optimizer=o, ttt_grad_steps=n))[1].loss for o in ("adam", "sgd") for n in (1, 2)
    }
    assert len(scores) == 4


def test_learning_rate_of_the_base_weights():
    s = settings(GLOBAL_TTT_LR=0.1, GLOBAL_TTT_WARMUP_CHUNKS=2, GLOBAL_TTT_WARMUP_START_LR=0.01)
    ttt = tg.PhasedTTT.__new__(tg.PhasedTTT)
    ttt.s = s
    assert np.allclose([ttt.global_lr(c, 5) for c in range(5)], [0.01, 0.1, 0.1, 0.05, 0.0])
