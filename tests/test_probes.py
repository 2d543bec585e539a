"""Mutants: the rule violations of the contest's history, injected one at a time; each must be caught.

Every test names the check that has to catch its mutant (a probe, the ledger, a data check), so that a check
that is removed or weakened fails the tests of its mutants, whatever else would have noticed.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHALLOW, TINY, sine_model, tg
from mutants import (
    LEDGER,
    SLIDING,
    TTT,
    TTT_SUM,
    WINDOWS,
    WINDOWS_SUM,
    assert_caught,
    attention_one_ahead,
    findings,
    in_form,
    once,
    replace,
    scoring,
)


@pytest.fixture(params=["stream", "field"])
def s(request, s):
    """The default way of adapting, and the field's."""
    return in_form(s, request.param)


# --- the unmutated system

@pytest.mark.parametrize("changes", [
    {}, dict(eval_kv_reuse=False, ttt_enabled=False), dict(eval_stride=64, val_batch_tokens=64)], ids=str)
def test_the_script_as_it_is_passes(s, changes):
    deep = {name.lower(): TINY[name] for name in SHALLOW}
    s = dataclasses.replace(scoring(s, ttt=True), **deep, **changes)
    model = sine_model(s)
    before = [p.detach().clone() for p in model.parameters()]
    probes = tg.run_probes(s, tg.World(), model)
    assert all(p.ok for p in probes), probes
    names = [p.name for p in probes]
    assert len(set(names)) == len(names) and WINDOWS in names and (TTT in names) == s.ttt_enabled
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --- packed scoring: what a document sees of others

def smear_without_any_mask(patch):
    """SmearGate mixes in whatever was packed before, document or not."""
    def make(real):
        def embed(self, ids, layout, *more):
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(tg, "BOS", -1)
                return real(self, ids, None, *more)
        return embed
    replace(patch, tg.GPT, "embed", make)


def smear_between_windows(patch):
    """The BOS mask is there, but a window that begins inside a document is smeared with its neighbour."""
    replace(patch, tg.GPT, "embed", lambda real: lambda self, ids, layout, *more:
            real(self, ids, None, *more))


def attention_across_documents(patch):
    """The row's layout never reaches the kernel."""
    replace(patch, tg, "attention", lambda real: lambda q, k, v, layout=None: real(q, k, v))


@once
@pytest.mark.parametrize("mutant", [smear_without_any_mask, smear_between_windows, attention_across_documents,
                                    attention_one_ahead])
def test_windows_see_nothing_later(s, mutant, monkeypatch):
    mutant(monkeypatch)
    assert_caught(dataclasses.replace(scoring(s), eval_kv_reuse=False), WINDOWS, SLIDING)


@once
@pytest.mark.parametrize("mutant", [smear_between_windows, attention_across_documents])
def test_windows_that_the_probes_shorten_see_their_neighbours(s, mutant, monkeypatch):
    mutant(monkeypatch)
    assert_caught(dataclasses.replace(
        scoring(s), eval_kv_reuse=False, eval_seq_len=512, ttt_eval_seq_len=512, eval_stride=64,
        val_batch_tokens=16384), WINDOWS, SLIDING)


@once
def test_cached_windows_see_nothing_later(s, monkeypatch):
    attention_one_ahead(monkeypatch)
    assert_caught(scoring(s), SLIDING)


def test_adaptation_sees_nothing_later(s, monkeypatch):
    attention_one_ahead(monkeypatch)
    assert_caught(s, TTT)


def attention_sees(ahead):
    """Every query also sees the token `ahead` places after it, and nothing else that is later."""
    def mutant(patch):
        def rows(q, k, v):
            T, keys = q.shape[1], k.shape[1]
            back = torch.arange(keys - T, keys)[:, None] - torch.arange(keys)
            seen, groups = (back >= 0) | (back == -ahead), q.shape[2] // k.shape[2]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        patch.setattr(tg, "plain_rows", rows)
    return mutant


def embedding_holds(ahead):
    """A token's embedding holds a tenth of the one `ahead` places after it."""
    def mutant(patch):
        def make(real):
            def embed(self, ids, layout, *more):
                x = real(self, ids, layout, *more)
                return x + 0.1 * F.pad(x[:, ahead:], (0, 0, 0, x.size(1) - x[:, ahead:].size(1)))
            return embed
        replace(patch, tg.GPT, "embed", make)
    return mutant


def largest_changes(s) -> dict[str, float]:
    """What each of C1's probes says changed at earlier targets."""
    probes = tg.run_probes(s, tg.World(), sine_model(s))
    return {p.name: float(p.figure.split()[2]) for p in probes if p.figure.startswith("largest change")}


@pytest.fixture
def one_layer(s):
    """Settings of a model of one layer, scored in every way."""
    return dataclasses.replace(s, num_layers=1, num_loops=0, xsa_last_n=0, parallel_start_layer=0,
                               sliding_window_enabled=True)


def test_one_layer_as_it_is_passes(one_layer):
    assert set(largest_changes(one_layer).values()) == {0.0}


@pytest.mark.parametrize("mutant, ahead", [(attention_sees, 1), (attention_sees, 2), (attention_sees, 3),
                                           (embedding_holds, 1)])
def test_one_layer_shows_a_leak_at_full_strength(one_layer, mutant, ahead, monkeypatch):
    """Of the scored target itself (one ahead of the input), of the next token and of the one after it. Where
    a leak counts, a loss of about ln 300 moves by far more than a thousandth; rounding, by a millionth."""
    mutant(ahead)(monkeypatch)
    changes = largest_changes(one_layer)
    assert set(changes) == {WINDOWS, SLIDING, TTT} and min(changes.values()) > 1e-3, changes


@once
@pytest.mark.parametrize("changes", [
    dict(eval_kv_reuse=False, val_batch_tokens=64), dict(ttt_kv_reuse=True, ttt_cache_lambda=0.5),
    dict(ngram_tilt_enabled=True)], ids=str)
def test_one_layer_shows_a_leak_however_it_is_scored(one_layer, changes, monkeypatch):
    """In packed rows, beside the cache mixture and under the n-gram tilt."""
    s = dataclasses.replace(one_layer, **changes)
    attention_sees(1)(monkeypatch)
    changed = largest_changes(s)
    assert min(changed[name] for name in (WINDOWS, SLIDING, TTT)) > 1e-3, changed


@once
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_one_layer_shows_what_is_read_from_the_targets(one_layer, ahead, monkeypatch):
    """The hidden state holds a target that it is given. Its own: its probabilities sum to far more than 1,
    which is C2's to see; a later one is seen by C1."""
    def make(real):
        def losses(self, ids, targets, *args, **more):
            given = F.embedding(targets.view(-1, *ids.shape)[0], self.tok_emb)[:, ahead:]
            with pytest.MonkeyPatch.context() as inner:
                replace(inner, tg.GPT, "embed", lambda embed: lambda *a:
                        embed(*a) + F.pad(given, (0, 0, 0, ids.size(1) - given.size(1))))
                return real(self, ids, targets, *args, **more)
        return losses
    replace(monkeypatch, tg.GPT, "losses", make)
    if ahead:
        assert min(largest_changes(one_layer).values()) > 1e-3
    else:
        assert_caught(one_layer, WINDOWS_SUM, TTT_SUM)


# --- distributions that are none

def with_losses(patch, change):
    """GPT.losses with change(logits (B, T, V) float32, targets (B, T)) in place of the cross-entropy."""
    def losses(self, ids, targets, plan, layout=None, adapter=None, cache=None):
        hidden = self.final_hidden(ids, plan, layout, adapter, cache=cache)
        return change(self.logits(hidden, adapter), targets)
    patch.setattr(tg.GPT, "losses", losses)


def cross_entropy(z, targets):
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def tilt_gated_by_the_target(patch):
    """A normalised tilt of one hinted token, applied only where the target belongs to a class of tokens."""
    def change(z, targets):
        tilted = z.clone()
        tilted[..., 8] += 1.0
        return torch.where(targets % 4 == 0, cross_entropy(tilted, targets), cross_entropy(z, targets))
    with_losses(patch, change)


def gold_token_only(patch):
    """The probability of the target from its own logit alone."""
    with_losses(patch, lambda z, targets: -F.logsigmoid(z.gather(-1, targets[..., None])[..., 0]))


def buckets_instead_of_tokens(patch):
    """Normalised over 64 hash buckets: every token of a bucket claims all of the bucket's mass."""
    def change(z, targets):
        p = z.softmax(-1)
        mass = p.new_zeros(*p.shape[:-1], 64).index_add(-1, torch.arange(p.size(-1)) % 64, p)
        return -mass.gather(-1, targets[..., None] % 64)[..., 0].log()
    with_losses(patch, change)


@once
@pytest.mark.parametrize("mutant", [tilt_gated_by_the_target, gold_token_only, buckets_instead_of_tokens])
def test_probabilities_sum_to_one(s, mutant, monkeypatch):
    mutant(monkeypatch)
    assert_caught(s, WINDOWS_SUM, TTT_SUM)


@once
def test_half_precision_hides_no_excess(s, monkeypatch):
    """All probabilities are 3 % too large, where activations are rounded by as much."""
    s = dataclasses.replace(s, vocab_size=100, sliding_window_enabled=False)

    def sums():
        model = sine_model(s)
        model.compute_dtype = torch.bfloat16
        return list(tg.probe_normalisation(s, tg.World(), model))

    assert [(p.name, p.ok) for p in sums()] == [(WINDOWS_SUM, True), (TTT_SUM, True)]
    replace(monkeypatch, tg.Ledger, "book", lambda real: lambda self, at, losses:
            real(self, at, losses - np.log(1.03)))
    assert [(p.name, p.ok) for p in sums()] == [(WINDOWS_SUM, False), (TTT_SUM, False)]


def test_tilt_at_the_books(s, monkeypatch):
    """The tilt is applied between the forward and the ledger: only losses as they are booked show it."""
    def make(real):
        def book(self, positions, losses):
            targets = torch.from_numpy(self.val.tokens.astype(np.int64))[positions.cpu() + 1]
            real(self, positions, losses - 0.5 * (targets % 4 == 0))
        return book
    replace(monkeypatch, tg.Ledger, "book", make)
    assert_caught(s, WINDOWS_SUM, TTT_SUM)


def test_the_better_of_adapted_and_plain(s, monkeypatch):
    """Two forwards, the smaller loss is booked: a selection that depends on the target."""
    def make(real):
        def losses(self, ids, targets, plan, layout=None, adapter=None, cache=None):
            plain = real(self, ids, targets, plan, layout, None, cache)
            if adapter is None:
                return plain
            return torch.minimum(plain, real(self, ids, targets, plan, layout, adapter, cache))
        return losses
    replace(monkeypatch, tg.GPT, "losses", make)
    assert_caught(s, TTT_SUM)


def mixing(s):
    """The default way of adapting with a cache mixture whose hidden states all have a say."""
    return dataclasses.replace(s, ttt_cache_lambda=0.5, ttt_cache_theta=2.0)


@once
@pytest.mark.parametrize("changes", [{}, dict(ngram_tilt_enabled=True)], ids=str)
def test_the_cache_mixture_as_it_is_passes(s, changes):
    assert not findings(dataclasses.replace(mixing(s), **changes))


@once
def test_cache_mixture_of_seen_tokens_only(s, monkeypatch):
    """Tokens that the cache has seen gain, the others keep all the probability that the model gave them."""
    replace(monkeypatch, tg, "mixed_with_cache", lambda real: lambda s, losses, cache:
            torch.minimum(losses, real(s, losses, cache)))
    assert_caught(mixing(s), TTT_SUM)


@once
def test_cache_mixture_one_ahead(s, monkeypatch):
    """Every place says the token after the next one: the last place before the target says the target."""
    def make(real):
        def remembered(self):
            states, tokens = real(self)
            return states, tokens.roll(-1, 1)
        return remembered
    replace(monkeypatch, tg.KeyCache, "remembered", make)
    assert_caught(mixing(s), TTT_SUM)


# --- coverage

@once
def test_dropped_last_window(s, monkeypatch):
    replace(monkeypatch, tg, "sliding_windows", lambda real: lambda total, seq_len, stride:
            [w for w in real(total, seq_len, stride) if w[0] == 0 or w[1] - w[0] == seq_len])
    assert_caught(scoring(s), LEDGER, "coverage is broken")


def test_dropped_last_chunk(s, monkeypatch):
    def make(real):
        def window(first, targets, begin, end, width):
            w, whole = real(first, targets, begin, end, width), np.minimum(end, targets) == end
            return w._replace(count=np.where(whole, w.count, 0)) if whole.any() else w
        return window
    replace(monkeypatch, tg, "window_from", make)
    s = dataclasses.replace(s, phased_ttt_prefix_docs=0)
    with pytest.raises(RuntimeError, match="coverage is broken"):
        tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s)).run()
