"""Mutants: the rule violations of the contest's history, injected one at a time; each must be caught.

Every test names the check that has to catch its mutant (a probe, the ledger, a data check), so that a check
that is removed or weakened fails the tests of its mutants, whatever else would have noticed.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, settings, sine_model, tg, write_shard

sys.path.insert(0, str(ROOT))

from data import build, shards  # noqa: E402
from data import check as data_check  # noqa: E402

WINDOWS, SLIDING, TTT = "C1 windows", "C1 sliding windows", "C1 test-time training"
WINDOWS_SUM, TTT_SUM = "C2 windows", "C2 test-time training"
LEDGER = "C3 C4 ledger"
once = pytest.mark.parametrize("s", ["stream"], indirect=True)      # where adapting plays no part
FIELD = dict(ttt_kv_reuse=False, ttt_shared_a=False, ttt_optimizer="adam", ttt_doc_order="length")


@pytest.fixture(params=["stream", "field"])
def s(request, s):
    """The default way of adapting, and the field's, without the sliding windows (see `scoring`)."""
    s = dataclasses.replace(s, sliding_window_enabled=False)
    return s if request.param == "stream" else dataclasses.replace(s, **FIELD)


def scoring(s, *, ttt=False):
    """The same settings for mutants of plain scoring: sliding windows, adaptation only where it is judged."""
    return dataclasses.replace(s, sliding_window_enabled=True, ttt_enabled=ttt)


def findings(s) -> list[str]:
    """What the probes have to say against the script as it is now."""
    return [f"{p.name}: {p.figure}" for p in tg.run_probes(s, tg.World(), sine_model(s)) if not p.ok]


def assert_caught(s, *by: str) -> None:
    found = findings(s)
    assert all(any(b in f for f in found) for b in by), f"expected {by}, found {found}"


def replace(patch, owner, name, make):
    """Put make(the real thing) in its place."""
    patch.setattr(owner, name, make(getattr(owner, name)))


# --- the unmutated system

@pytest.mark.parametrize("changes", [
    {}, dict(eval_kv_reuse=False, ttt_enabled=False), dict(eval_stride=64, val_batch_tokens=64)], ids=str)
def test_the_script_as_it_is_passes(s, changes):
    s = dataclasses.replace(scoring(s, ttt=True), **changes)
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


def attention_one_ahead(patch):
    """The causal mask is off by one."""
    def rows(q, k, v):
        T, keys = q.shape[1], k.shape[1]
        back = torch.arange(keys - T, keys)[:, None] - torch.arange(keys)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=back >= -1, enable_gqa=True).transpose(1, 2)
    patch.setattr(tg, "plain_rows", rows)


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
    def losses(self, ids, targets, plan, layout=None, adapter=None, hook=None, cache=None):
        return change(self.logits(self.hidden(ids, plan, layout, adapter, hook, cache), adapter), targets)
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
    s = dataclasses.replace(s, sliding_window_enabled=False)

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
        def losses(self, ids, targets, plan, layout=None, adapter=None, hook=None, cache=None):
            plain = real(self, ids, targets, plan, layout, None, hook, cache)
            if adapter is None:
                return plain
            return torch.minimum(plain, real(self, ids, targets, plan, layout, adapter, hook, cache))
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
        def extend(self, slot, k, v):
            keys, values = real(self, slot, k, v)
            if slot == self.STATES:
                self.new[slot] = keys, values.roll(-1, 1)
            return keys, values
        return extend
    replace(monkeypatch, tg.KeyCache, "extend", make)
    assert_caught(mixing(s), TTT_SUM)


# --- order of scoring and learning

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
        def score_chunk(self, starts, w, adapter, cache):
            if adapter is not None and (rows := when(self, starts, w)).any():
                with books_closed(self), torch.enable_grad():
                    self.adapt(adapter, None, real(self, starts, w, adapter, cache), torch.from_numpy(rows))
            return real(self, starts, w, adapter, cache)
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
    assert_caught(with_suffix(s), LEDGER, "not scored once each")


@once
def test_scores_overwritten_by_those_of_the_suffix(s, monkeypatch):
    """Adapters that have learnt from a token score it once more, behind the ledger's back."""
    def make(real):
        def score_chunk(self, starts, w, adapter, cache):
            scored = real(self, starts, w, adapter, cache)
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


# --- bytes and data

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of good shards with a manifest, CaseOps tokens and a byte sidecar."""
    folder, rng = tmp_path_factory.mktemp("built"), np.random.default_rng(5)
    stock = "the River and a House of NASA were quiet; people said nothing to McDonald in Spring".split()
    texts = (" ".join(stock[i] for i in rng.integers(0, len(stock), 20 + n % 30)) for n in range(120))
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    recipe = build.Recipe(vocab=340, val_share=0.2, shard_tokens=4000, caseops=True)
    build.build([folder / "docs.jsonl"], folder / "out", recipe, report=lambda *_: None)
    return folder / "out"


@pytest.fixture
def shards_of(built, tmp_path):
    """(a copy of them to spoil, the settings for it)."""
    folder = shutil.copytree(built, tmp_path / "shards")
    vocab = json.loads((folder / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    return folder, settings(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", VOCAB_SIZE=vocab)


def spoil(path, change):
    """Rewrite a shard with change(values), its size kept."""
    write_shard(path, change(np.array(shards.read_shard(path))))


def data_findings(folder) -> str:
    return "\n".join(map(str, data_check.check(folder, custom=True).findings))


def test_good_data_passes(shards_of):
    folder, s = shards_of
    assert not data_findings(folder)
    tg.check_validation(s)
    tg.check_manifest(s)
    tg.check_manifest(dataclasses.replace(s, data_check="full"))


def test_bytes_of_bos(shards_of):
    """The sidecar counts a byte for every BOS."""
    folder, s = shards_of
    side, val = folder / "fineweb_val_bytes_000000.bin", folder / "fineweb_val_000000.bin"
    bos = np.array(shards.read_shard(val)) == tg.BOS
    spoil(side, lambda v: np.where(bos, 1, v))
    with pytest.raises(tg.UserError, match="counts 1 bytes for the BOS"):
        tg.Validation(s)
    assert "bytes for a BOS token" in data_findings(folder)


def test_bytes_of_operators(shards_of):
    """The sidecar counts tokens that stand for no text of their own, CaseOps' operators, as one byte."""
    folder, s = shards_of
    side, val = folder / "fineweb_val_bytes_000000.bin", folder / "fineweb_val_000000.bin"
    operators = (np.array(shards.read_shard(side)) == 0) & (np.array(shards.read_shard(val)) != tg.BOS)
    assert operators.sum() > 20
    spoil(side, lambda v: np.where(operators, 1, v))
    with pytest.raises(tg.UserError, match="the manifest says"):
        tg.Validation(s)
    with pytest.raises(tg.UserError, match="not the manifest|the manifest says"):
        tg.check_manifest(dataclasses.replace(s, data_check="full"))
    manifest = folder / "manifest.json"
    manifest.unlink()                       # and on folders that come without one, token by token
    assert "bytes for token" in data_findings(folder)


def plain(folder):
    """Without sidecar and stored hashes: bytes are counted by the tokenizer's table."""
    for pattern in ("fineweb_val_bytes_*", "document_hashes*"):
        for path in folder.glob(pattern):
            path.unlink()


def spaces_in_both(patch):
    """The space of a piece is counted in its bytes, and again where it leads."""
    def make(real):
        def from_sentencepiece(path, vocab_size):
            table = real(path, vocab_size)
            return dataclasses.replace(table, base=table.base + table.lead.astype(np.int16))
        return from_sentencepiece
    patch.setattr(tg.ByteTable, "from_sentencepiece", make(tg.ByteTable.from_sentencepiece))


def space_sign_as_three_bytes(patch):
    """U+2581 is counted as its own UTF-8 form."""
    def make(real):
        def from_sentencepiece(path, vocab_size):
            table = real(path, vocab_size)
            return dataclasses.replace(table, base=table.base + 3 * table.lead.astype(np.int16))
        return from_sentencepiece
    patch.setattr(tg.ByteTable, "from_sentencepiece", make(tg.ByteTable.from_sentencepiece))


@pytest.mark.parametrize("mutant", [spaces_in_both, space_sign_as_three_bytes])
def test_double_counted_spaces(shards_of, mutant, monkeypatch):
    folder, s = shards_of
    plain(folder)
    tg.check_validation(s)
    mutant(monkeypatch)
    with pytest.raises(tg.UserError, match="the byte rule counts"):
        tg.check_validation(s)


@pytest.mark.parametrize("hashes", [True, False])
def test_validation_documents_in_the_training_shards(shards_of, hashes):
    """The leak of the 1.04 results: validation documents among the training ones, in a shard of its own."""
    folder, s = shards_of
    s = dataclasses.replace(s, data_check="full")
    leaked = data_check.documents(np.array(shards.read_shard(folder / "fineweb_val_000000.bin")))[3]
    (folder / "manifest.json").unlink()
    stored = [folder / f"document_hashes_{kind}.bin" for kind in ("train", "val")]
    if hashes:
        stored[0].write_bytes(stored[0].read_bytes() + stored[1].read_bytes()[24:32])
    else:
        for path in stored:
            path.unlink()
    tail = np.array(shards.read_shard(sorted(folder.glob("fineweb_train_*"))[0]))[:200]
    write_shard(folder / "fineweb_train_000090.bin", np.concatenate([[tg.BOS], leaked, tail]))
    with pytest.raises(tg.UserError, match="1 validation documents are in the training shards"):
        tg.check_overlap(s)
    assert "validation document" in data_findings(folder)


# --- validation tokens where the model is made

def through_a_fresh_reader(s):
    return tg.Validation(s).tokens


def through_the_runs_own(patch):
    """The Validation object that the run will score later."""
    seen = []

    def make(real):
        def remember(self, s):
            seen.append(self)
            real(self, s)
        return remember
    replace(patch, tg.Validation, "__init__", make)
    return lambda s: seen[0].tokens


def through_the_files(s):
    return np.array(tg.read_shard(tg.list_shards(s.shards, "val")[0]))


def readers(patch):
    return {"fresh": through_a_fresh_reader, "own": through_the_runs_own(patch), "files": through_the_files}


def pipeline(s, folder):
    s = dataclasses.replace(s, artifact_dir=str(folder), ttt_enabled=False, sliding_window_enabled=False)
    tg.pipeline(s, tg.World(), tg.Run(s, tg.World()), "test")


@once
@pytest.mark.parametrize("reader", ["fresh", "own", "files"])
def test_warm_up_on_validation_tokens(s, reader, tmp_path, monkeypatch):
    read = readers(monkeypatch)[reader]
    monkeypatch.setattr(tg.Trainer, "random_batch", lambda self, *_:
                        tg.packed_batch(read(self.s)[:self.tokens + 1], self.s.train_seq_len))
    with pytest.raises(RuntimeError, match="validation tokens are read"):
        pipeline(s, tmp_path)


@once
@pytest.mark.parametrize("reader", ["fresh", "own", "files"])
def test_calibration_on_validation_tokens(s, reader, tmp_path, monkeypatch):
    read = readers(monkeypatch)[reader]
    monkeypatch.setattr(tg, "train", lambda *_: (tg.Clock(), SimpleNamespace(next=None, close=None)))
    replace(monkeypatch, tg, "calibrate", lambda real: lambda s, world, model, next_batch:
            real(s, world, model, lambda: tg.packed_batch(read(s)[:1025], s.train_seq_len)))
    with pytest.raises(RuntimeError, match="validation tokens are read"):
        pipeline(s, tmp_path)


@once
@pytest.mark.parametrize("reader", ["fresh", "own", "files"])
def test_logit_calibration_on_validation_tokens(s, reader, tmp_path, monkeypatch):
    read = readers(monkeypatch)[reader]
    replace(monkeypatch, tg, "fit_calibration", lambda real: lambda s, model, tokens: real(s, model, read(s)))
    with pytest.raises(RuntimeError, match="validation tokens are read"):
        pipeline(dataclasses.replace(s, logit_calib_enabled=True), tmp_path)


@once
def test_the_pipeline_as_it_is_passes(s, tmp_path):
    """With validation in training, which opens the seal for its own ledger only."""
    pipeline(dataclasses.replace(s, val_loss_every=2), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["val_bpb"] > 0
