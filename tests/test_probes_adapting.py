"""Mutants of adapting: learning before scoring, scoring twice, adapters that are kept, phases on what is not
scored; each must be caught by the check that its test names (see test_probes.py)."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from conftest import sine_model, tg
from mutants import LEDGER, TTT, assert_caught, attention_one_ahead, findings, in_form, once, replace


@pytest.fixture(params=["stream", "field"])
def s(request, s):
    """The default way of adapting, and the field's."""
    return in_form(s, request.param)


class Silent:
    """A ledger that looks away."""

    def book(self, positions, losses):
        pass

    def require(self, positions):
        pass


@contextlib.contextmanager
def books_closed(ttt):
    real, ttt.ledger = ttt.ledger, Silent()
    yield
    ttt.ledger = real


def documents_end(ttt, starts, w) -> np.ndarray:
    """(B,) bool: the chunk is the last of its document."""
    lengths = dict(zip(ttt.val.documents.start.tolist(), ttt.lengths.tolist()))
    return w.begin + w.offset + w.count == np.array([lengths[int(a)] - 1 for a in starts])


def learn_before_scoring(patch, when):
    """One adapter step on a chunk ahead of its scoring, behind the ledger's back; when(ttt, starts, w)."""
    def make(real):
        def score_chunk(self, starts, w, adapter, cache, base=None):
            if adapter is not None and (rows := when(self, starts, w)).any():
                with books_closed(self), torch.enable_grad():
                    scored = real(self, starts, w, adapter, cache, base)
                    self.adapt(adapter, None, scored, torch.from_numpy(rows))
            return real(self, starts, w, adapter, cache, base)
        return score_chunk
    replace(patch, tg.PhasedTTT, "score_chunk", make)


def test_update_before_score(s, monkeypatch):
    learn_before_scoring(monkeypatch, lambda ttt, starts, w: w.count > 0)
    assert_caught(s, TTT)


def test_training_on_the_last_chunk_before_scoring_it(s, monkeypatch):
    learn_before_scoring(monkeypatch, documents_end)
    assert_caught(s, TTT)


def with_suffix(s):
    """The newest cached tokens are run again in front of every chunk."""
    return dataclasses.replace(s, ttt_suffix=24, ttt_step_share=0.1)


@once
def test_a_suffix_as_it_is_passes(s):
    assert not findings(with_suffix(s))


@once
def test_a_suffix_sees_nothing_later(s, monkeypatch):
    attention_one_ahead(monkeypatch)
    assert_caught(with_suffix(s), TTT)


@once
def test_a_suffix_that_is_booked_again(s, monkeypatch):
    def make(real):
        def window(*args):
            w = real(*args)
            again = np.minimum(w.offset, 4)
            return w._replace(offset=w.offset - again, count=w.count + again)
        return window
    replace(monkeypatch, tg, "chunk_window", make)
    s = dataclasses.replace(with_suffix(s), ttt_base_share=0)      # which would not fit the others' scores
    assert_caught(s, LEDGER, "not scored once each")


@once
def test_scores_overwritten_by_those_of_the_suffix(s, monkeypatch):
    """Adapters that have learnt from a token score it once more, behind the ledger's back."""
    def make(real):
        def score_chunk(self, starts, w, adapter, cache, base=None):
            scored = real(self, starts, w, adapter, cache, base)
            for row, start in enumerate(starts + w.begin):
                again = w.offset[row]
                self.ledger.loss[start:start + again] = scored.losses[row, :again].detach()
            return scored
        return score_chunk
    replace(monkeypatch, tg.PhasedTTT, "score_chunk", make)
    assert_caught(with_suffix(s), TTT)


def test_a_step_before_the_booking(s, monkeypatch):
    """The losses are computed, learnt from, and booked afterwards: the ledger refuses the step."""
    waiting, book = [], tg.Ledger.book
    monkeypatch.setattr(tg.Ledger, "book", lambda self, *entry: waiting.append((self, *entry)))

    def make(real):
        def adapt(self, *args):
            real(self, *args)
            for entry in waiting:
                book(*entry)
            waiting.clear()
        return adapt
    replace(monkeypatch, tg.PhasedTTT, "adapt", make)
    with pytest.raises(RuntimeError, match="not scored yet"):
        tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s)).run()


def twice(patch, first_pass):
    """Every group is worked through twice, with one adapter; first_pass(ttt) surrounds the first time."""
    made = {}
    replace(patch, tg.PhasedTTT, "adapter_for", lambda real: lambda self, rows:
            made.setdefault(rows, real(self, rows)))

    def make(real):
        def adapt_group(self, group):
            made.clear()
            with first_pass(self):
                real(self, group)
            real(self, group)
        return adapt_group
    replace(patch, tg.PhasedTTT, "adapt_group", make)


def test_two_epochs_of_which_the_last_is_scored(s, monkeypatch):
    """Documents are kept to one size, so that none leaves its group and the adapter fits twice."""
    replace(monkeypatch, tg.Adapter, "keep", lambda real: lambda self, rows: None)
    s = dataclasses.replace(s, ttt_kv_reuse=False)
    twice(monkeypatch, books_closed)
    assert_caught(s, TTT)


def test_two_epochs_both_booked(s, monkeypatch):
    twice(monkeypatch, lambda ttt: contextlib.nullcontext())
    assert_caught(dataclasses.replace(s, ttt_kv_reuse=False), LEDGER, "not scored once each")


@once
def test_an_adapter_that_is_not_reset_between_documents(s, monkeypatch):
    """A group begins with what the group before it learnt, which in stream order may have come later."""
    kept = []

    def make(real):
        def adapter_for(self, rows):
            adapter = real(self, rows)
            with torch.no_grad():
                for kind, b in (kept[-1].b.items() if kept else ()):
                    both = slice(min(b.size(1), rows))
                    adapter.b[kind][:, both] = b[:, both]
            kept[:] = [adapter]
            return adapter
        return adapter_for
    replace(monkeypatch, tg.PhasedTTT, "adapter_for", make)
    # within a round alone: a phase on the base weights forgets it
    replace(monkeypatch, tg.PhasedTTT, "global_phase", lambda real: lambda self, booked: (
        kept.clear(), real(self, booked)))
    assert_caught(s, TTT)


@once
@pytest.mark.parametrize("owner", [tg.Adapter, tg.KeyCache])
def test_rows_of_a_document_that_has_ended_are_kept(s, owner, monkeypatch):
    """As documents leave a group, the adapters or keys of the wrong ones stay."""
    replace(monkeypatch, owner, "keep", lambda real: lambda self, rows:
            real(self, slice(0, -rows.start or None)))
    assert_caught(s, TTT)


@once
def test_a_document_is_too_long_to_be_adapted_before_it_has_ended(s, monkeypatch):
    """In stream order: whether a document's first chunks are learnt from depends on where it ends."""
    lengths, cuts = tg.probe_documents(s)
    s = dataclasses.replace(s, ttt_train_max_doc_len=(lengths[3] + cuts[1]) // 2)
    assert not findings(s)
    replace(monkeypatch, tg, "trained_rows", lambda real: lambda s, targets, end:
            real(s, targets, end) & (targets < s.ttt_train_max_doc_len))
    assert_caught(s, TTT)


def after_adapt(patch, then):
    """then(ttt, scored) after every adapter step."""
    def make(real):
        def adapt(self, adapter, optimiser, scored, later):
            real(self, adapter, optimiser, scored, later)
            with torch.no_grad():
                then(self, scored)
        return adapt
    replace(patch, tg.PhasedTTT, "adapt", make)


def counted(scored, losses):
    """The losses of the chunk's targets that the forward's rows hold, by their number."""
    return losses.flatten()[-len(scored.positions):]


def test_rescoring_with_the_better_of_two(s, monkeypatch):
    after_adapt(monkeypatch, lambda ttt, scored: ttt.ledger.book(
        scored.positions, torch.minimum(*(counted(scored, x) for x in (scored.losses, scored.again())))))
    assert_caught(s, LEDGER, "not scored once each")


def test_rescoring_behind_the_ledgers_back(s, monkeypatch):
    def overwrite(ttt, scored):
        at = scored.positions
        ttt.ledger.loss[at] = torch.minimum(ttt.ledger.loss[at], counted(scored, scored.again()))
    after_adapt(monkeypatch, overwrite)
    assert_caught(s, TTT)


def test_phase_on_documents_that_are_not_scored(s, monkeypatch):
    replace(monkeypatch, tg, "ttt_rounds", lambda real: lambda s, lengths:
            [r._replace(train_on=np.arange(len(lengths))) for r in real(s, lengths)])
    assert_caught(s, LEDGER, "not scored once each")


def test_base_weights_trained_on_the_stream_before_it_is_scored(s, monkeypatch):
    """What the field called pre-quantisation TTT: epochs on the validation stream, then its scores."""
    def make(real):
        def run(self):
            self.global_phase(tg.Booked(self.val.tokens))
            return real(self)
        return run
    replace(monkeypatch, tg.PhasedTTT, "run", make)
    assert_caught(s, TTT)
