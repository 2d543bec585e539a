"""Adapt: score-first test-time training: order, causality, determinism."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import documents, settings, sine_model, tg

EXACT = dict(ttt_kv_reuse=False, ttt_warm_start_a=True, ttt_optimizer="adam", ttt_doc_order="length")
FORMS = dict(fast={}, exact=EXACT, suffix=dict(ttt_suffix=20, ttt_step_share=0.1))
every_form = pytest.mark.parametrize("s", FORMS, indirect=True)
fast_form = pytest.mark.parametrize("s", ["fast"], indirect=True)


@pytest.fixture(params=["fast", "exact"])
def s(request, s):
    """Every test below holds for the default form of adapting and for the field's, some for a suffix too."""
    return changed(s, **FORMS[request.param])


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


@every_form
def test_the_same_score_every_time(s):
    assert run(s)[1] == run(s)[1]


def ranks_as_threads(size) -> list[tg.World]:
    """The worlds of `size` ranks that meet in this process."""
    barrier, box = threading.Barrier(size, timeout=300), [None] * size

    class Rank(tg.World):
        def gather(self, value):
            barrier.wait()
            box[self.rank] = value
            barrier.wait()
            return list(box)

        def agree(self, value):
            return self.gather(value)[0]

        def total(self, x):
            return x.copy_(sum(self.gather(x.clone())))

    return [Rank(rank, size) for rank in range(size)]


@every_form
def test_any_number_of_ranks_gives_the_same_score(s):
    """With the warm start off; phases on the base weights included."""
    s = changed(s, ttt_warm_start_a=False, ttt_doc_order="stream", ttt_batch_size=2)

    def bpb(world):
        return tg.PhasedTTT(s, world, sine_model(s), tg.Validation(s)).run().bpb

    alone = bpb(tg.World())
    for size in (2, 3):
        with ThreadPoolExecutor(size) as pool:
            assert all(abs(x - alone) < 2e-5 for x in pool.map(bpb, ranks_as_threads(size)))


@every_form
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


@every_form
def test_later_tokens_of_a_document_never_change_its_earlier_scores(s):
    s = changed(s, phased_ttt_prefix_docs=0)
    val = tg.Validation(s)
    longest = int(np.argmax(val.documents.length))
    cut = int(val.documents.start[longest]) + 40
    a, _ = run(s, val)
    other = tg.Validation(s)
    other.stream = val.tokens.copy()
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
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation.of(documents(3, 0)))
    assert np.allclose([ttt.global_lr(c, 5) for c in range(5)], [0.01, 0.1, 0.1, 0.05, 0.0])


@fast_form
@pytest.mark.parametrize("suffix", [0, 1, 10, 40])
def test_cached_keys_are_the_full_forward(s, suffix):
    """Chunk after chunk on cached keys, nothing learned: the losses of the documents scored whole."""
    s = changed(s, ttt_lora_lr=0.0, phased_ttt_prefix_docs=0, ttt_eval_seq_len=256, ttt_suffix=suffix,
                ttt_short_score_first_steps="1:1,20:7,50:9")
    fast, _ = run(s)
    whole, _ = run(changed(s, ttt_kv_reuse=False))
    assert torch.allclose(fast.ledger.loss, whole.ledger.loss, atol=3e-5)


def test_cached_keys_fit_the_queries_whatever_rescales_the_rotary_base(s):
    """With ROPE_YARN the base depends on the context, not on how far a chunk lies in its document."""
    s = changed(s, rope_yarn=True, ttt_eval_seq_len=256)
    model, plan = sine_model(s), tg.layer_plan(s, True)
    x = torch.randint(4, 300, (1, 160), generator=torch.Generator().manual_seed(0))
    cache, losses = tg.KeyCache(256), []
    with torch.no_grad():
        for c in range(0, 160, 16):
            losses.append(model.losses(x[:, c:c + 16], x[:, c:c + 16], plan, cache=cache))
            cache.seal(x[:, c:c + 16])
            cache.advance(16)
        model.rope_length = 256
        assert torch.allclose(torch.cat(losses, 1), model.losses(x, x, plan), atol=3e-5)


def test_cached_keys_end_at_the_window(s):
    """Keys older than the window are dropped: a change before it leaves the losses beyond it alone."""
    shallow = changed(
        s, num_layers=1, xsa_last_n=1, num_loops=0, parallel_start_layer=0, smear_gate_enabled=False
    )
    model, plan = sine_model(shallow), tg.layer_plan(shallow, False)
    x = torch.randint(4, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, :8] = 9

    def last_chunk(tokens):
        cache = tg.KeyCache(24)
        for c in range(0, 64, 8):
            loss = model.losses(tokens[:, c:c + 8], tokens[:, c:c + 8], plan, cache=cache)
            cache.seal(tokens[:, c:c + 8])
            cache.advance(8)
        assert cache.position == 64 and cache.seen == 16
        assert cache.end == 16 + 8 + 8  # moved to the front for the seventh
        assert all(k.size(1) == 48 for k, _ in cache.kept.values())
        return loss
    assert torch.equal(last_chunk(x), last_chunk(other))


@fast_form
def test_a_suffix_over_the_whole_window_is_exact_encoding(s):
    """The same chunks and steps, in documents of up to twice the window."""
    s = changed(s, phased_ttt_prefix_docs=0)
    for steps in (dict(ttt_lora_lr=0.001), dict(ttt_step_share=0.1)):
        exact, _ = run(changed(s, ttt_kv_reuse=False, **steps))
        covering, _ = run(changed(s, ttt_suffix=64, **steps))
        partial, _ = run(changed(s, ttt_suffix=20, **steps))
        assert torch.allclose(exact.ledger.loss, covering.ledger.loss, atol=1e-5)
        assert not torch.allclose(exact.ledger.loss, partial.ledger.loss, atol=1e-3)


def test_which_tokens_a_cache_runs_again():
    """A window of 24, a suffix of 12; at first less than a suffix is there, at last the chunk leaves none."""
    cache, tokens, seen = tg.KeyCache(24), torch.arange(100)[None], []
    end = again = 0
    for chunk in (1, 7, 8, 8, 8, 16):
        if end:
            again = cache.advance(chunk, 12)
        last = None if cache.last is None else cache.last[0].tolist()
        seen.append((again, cache.position, cache.seen, last))
        cache.seal(tokens[:, end - again:end + chunk])
        end += chunk
    assert seen == [(0, 0, 0, None), (1, 0, 0, None), (8, 0, 0, None), (12, 4, 4, [2, 3]),
                    (12, 12, 4, [10, 11]), (8, 0, 0, None)]


def gradients(rows=3):
    """Two kinds of adapters with gradients of different sizes."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, rows, *shape, generator=generator) for n, shape in ((2, (5, 4)), (1, (9, 4)))]
    for scale, p in zip((2.0, 0.4), params):
        p.grad = scale * torch.randn(p.shape, generator=generator)
    return params


def falls(params, before) -> list[float]:
    """What a step from `before` promised every document, to first order."""
    return sum(((old - p) * p.grad).sum(dim=(0, 2, 3)) for p, old in zip(params, before)).tolist()


def first_step(s, params, losses):
    """normalised_step of matrices that have taken none before."""
    squares = [torch.zeros_like(p) for p in params]
    return tg.normalised_step(s, params, params, squares, torch.zeros(()), losses)


def stepped(params, losses, **changes):
    """What a step promised, and which rows were shortened."""
    before = [p.clone() for p in params]
    shortened = first_step(settings(TTT_WEIGHT_DECAY=0, **changes), params, torch.tensor(losses))
    return falls(params, before), shortened.tolist()


def test_a_step_promises_what_was_asked_for():
    """A share of each document's own loss; the second has no gradient. A rate of 0 is none."""
    params = gradients()
    before = [p.clone() for p in params]
    for p in params:
        p.grad[:, 1] = 0
    for rate in (dict(TTT_STEP_SHARE=0.2, TTT_LORA_LR=0), dict(TTT_LORA_LR=0)):
        assert stepped(params, [3.0, 3.0, 0.8], **rate) == ([0, 0, 0], [False] * 3)
    promised, shortened = stepped(params, [3.0, 3.0, 0.8], TTT_STEP_SHARE=0.2)
    assert promised == pytest.approx([0.6, 0, 0.16], rel=1e-5) and not any(shortened)
    assert all(torch.equal(p[:, 1], old[:, 1]) for p, old in zip(params, before))
    for p in params:
        p.grad *= 1e-6
    total = sum(p.grad.abs().sum((0, 2, 3)) for p in params)
    assert stepped(params, [3.0] * 3, TTT_STEP_SHARE=0.2)[0] == pytest.approx(
        (tg.MOST_RATE * total).tolist(), rel=1e-4)


def test_exact_encoding_leaves_nothing_to_run_again():
    assert tg.suffix_at(settings(TTT_SUFFIX=8), 0) == 8
    assert tg.suffix_at(settings(TTT_SUFFIX=8, TTT_KV_REUSE=0), 0) == 0


def test_a_step_that_promises_too_much_is_shortened():
    """To the most that it may promise of its own loss, so that more of a rate never means less of a step."""
    params, losses = gradients(), [3.0, 3.0, 0.3]
    usual, shortened = stepped(params, losses, TTT_LORA_LR=0.004)
    most = [tg.MOST_SHARE * loss for loss in losses]
    assert usual[0] < most[0] and usual[1] < most[1] and shortened == [False, False, True]
    assert stepped(params, losses, TTT_LORA_LR=0.008)[0] == pytest.approx(
        [2 * usual[0], 2 * usual[1], most[2]], rel=1e-4)
    promised, shortened = stepped(params, losses, TTT_LORA_LR=10)
    assert promised == pytest.approx(most, rel=1e-4) and all(shortened)


def test_steps_add_up_in_float32():
    """Forwards in bfloat16 read what the same steps make of a float32 adapter, rounded; those of rows that go
    on are as if they had been alone; a reset forgets the steps."""
    s, random = settings(TTT_STEP_SHARE=0.25, TTT_WARM_START_A=0), torch.Generator().manual_seed(0)
    plan = tg.layer_plan(s, True)
    wide, narrow = (tg.Adapter(s, plan, 5, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    alone, fresh = (tg.Adapter(s, plan, 3) for _ in range(2))

    def compare(*others):
        for p, exact, *same in zip(narrow.parameters(), narrow.exact(), *others, strict=True):
            assert torch.equal(p, exact.bfloat16()) and all(torch.equal(exact, x) for x in same)

    compare(wide.parameters())
    for rows in (slice(None), slice(-3, None), slice(-3, None)):
        for adapter in (wide, narrow):
            adapter.keep(rows)
        for p, *twins in zip(narrow.parameters(), wide.parameters(), alone.parameters()):
            p.grad = torch.randn(p.shape, generator=random).bfloat16()
            for twin in twins:
                twin.grad = p.grad[:, -twin.size(1):].float()
        for adapter in (wide, narrow, alone):
            losses = torch.ones(adapter.b["q"].size(1))
            tg.normalised_step(
                s, adapter.parameters(), adapter.exact(), adapter.sums(), adapter.steps, losses)
        compare(wide.parameters())
    compare(alone.parameters())
    assert all(p.any() for p in alone.parameters())
    narrow.reset()
    compare(fresh.parameters())


RULES = {
    "rate": lambda params: first_step(settings(TTT_LORA_LR=0.004), params, torch.ones(3)),
    "share": lambda params: first_step(settings(TTT_STEP_SHARE=0.2), params, torch.ones(3)),
    "AdamW": lambda params: tg.optimiser_step(torch.optim.AdamW(params, lr=0.05), params),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("worse", [1e4, float("nan"), float("inf")])
def test_a_documents_gradient_moves_no_other(rule, worse):
    """However wrong it is; one that is not finite adapts nothing."""
    params, twins = gradients(), gradients()
    before = [p[:, 1].clone() for p in params]
    for p in params:
        p.grad[:, 1] *= worse
        p.grad[0, 1, 0, 0] *= 2
    shortened = RULES[rule](params)
    usual = RULES[rule](twins)
    assert shortened[0] == usual[0] and shortened[2] == usual[2]
    for p, twin, old in zip(params, twins, before):
        assert torch.equal(p[:, [0, 2]], twin[:, [0, 2]]) and p.isfinite().all()
        if not np.isfinite(worse):
            assert shortened[1] and torch.allclose(p[:, 1], old, rtol=1e-3)


def test_the_rms_reaches_back_and_leaves_a_gradient_out_that_is_not_finite():
    """At a fixed rate two steps are AdamW's without momentum; a document with a gradient that is not finite
    goes on afterwards as if it had been none."""
    s = settings(TTT_LORA_LR=1e-4, TTT_BETA2=0.9, TTT_HEAD_LORA=0)
    adapter = tg.Adapter(s, tg.layer_plan(s, True), 2)
    twin = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    adam = torch.optim.AdamW(twin, lr=1e-4, betas=(0.0, 0.9), eps=1e-12, weight_decay=s.ttt_weight_decay)
    random = torch.Generator().manual_seed(0)
    for spoilt in (False, True, False):
        for p, other in zip(adapter.parameters(), twin):
            p.grad = torch.randn(p.shape, generator=random)
            p.grad[:, 1] *= float("nan") if spoilt else 1
            other.grad = p.grad.nan_to_num(nan=0.0)
        adam.step()
        losses = torch.full((2,), 1e9)      # no step promises too much of them
        tg.normalised_step(s, adapter.parameters(), adapter.exact(), adapter.sums(), adapter.steps, losses)
    for p, other in zip(adapter.parameters(), twin):
        assert torch.allclose(p[:, 0], other[:, 0], rtol=1e-5, atol=1e-9)
        assert p.isfinite().all() and torch.allclose(p[:, 1], other[:, 1], rtol=1e-3, atol=1e-8)


def test_the_heads_steps_are_by_matrix():
    """A row with a thousandth of the others' gradient takes a thousandth of their step; elsewhere a full
    one."""
    s = settings(TTT_LORA_LR=1e-4, TTT_WEIGHT_DECAY=0)
    adapter = tg.Adapter(s, tg.layer_plan(s, True), 2)
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
        p.grad[:, :, 0] = 1e-3
    losses = torch.full((2,), 1e9)      # no step promises too much of them
    tg.normalised_step(s, adapter.parameters(), adapter.exact(), adapter.sums(), adapter.steps, losses)
    for kind, b in adapter.b.items():
        expected = 1e-3 if kind == "head" else 1.0
        share = b[:, :, 0].mean() / b[:, :, 1].mean()
        assert float(share.detach()) == pytest.approx(expected, rel=1e-3)


def head_step(vocabulary: int, others: int):
    """A step of share 0.2 of `others` adapters and the head's B, 24 of whose tokens have a gradient: what
    each of them promises, the head last, and the head's rows of those tokens."""
    random, s = torch.Generator().manual_seed(0), settings(TTT_STEP_SHARE=0.2, TTT_WEIGHT_DECAY=0)
    head = torch.zeros(1, 2, vocabulary, 4)
    head.grad = torch.zeros_like(head)
    head.grad[:, :, :24] = torch.randn(1, 2, 24, 4, generator=random)
    params = [torch.zeros(1, 2, 5, 4) for _ in range(others)] + [head]
    for p in params[:-1]:
        p.grad = torch.randn(p.shape, generator=random)
    before = [p.clone() for p in params]
    squares = [torch.zeros_like(p) for p in params[:-1]] + [torch.zeros(1, 2, 1, 1)]
    tg.normalised_step(s, params, params, squares, torch.zeros(()), torch.tensor([0.3, 0.05]))
    promised = [falls([p], [old]) for p, old in zip(params, before)]
    return np.array(promised), head[:, :, :24]


def test_the_heads_step_comes_on_top_and_does_not_grow_with_the_vocabulary():
    """Others promise the share by themselves; the head does where it is alone (its A has no gradient yet)."""
    share = pytest.approx([0.06, 0.01], rel=1e-5)
    promised, seen = head_step(tg.HEAD_ROWS, others=3)
    assert promised[:-1].sum(0) == share and min(promised[-1]) > 1e-3
    assert torch.equal(seen, head_step(6 * tg.HEAD_ROWS, others=3)[1])
    assert not torch.allclose(seen, head_step(tg.HEAD_ROWS // 4, others=3)[1], rtol=0.1)
    assert head_step(8192, others=0)[0][0] == share


def with_gradients(s, rows=2, scale=1.0, seed=0):
    """Fresh adapters whose every matrix has a gradient."""
    random, adapter = torch.Generator().manual_seed(seed), tg.Adapter(s, tg.layer_plan(s, True), rows)
    for p in adapter.parameters():
        p.grad = scale * torch.randn(p.shape, generator=random)
    return adapter

def step(s, adapter, losses=3.0):
    losses = torch.full((adapter.b["head"].size(1),), losses) if isinstance(losses, float) else losses
    return tg.normalised_step(s, adapter.parameters(), adapter.exact(), adapter.sums(), adapter.steps, losses)

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_whose_gradient_is_not_finite_stops_its_document_alone(bad):
    s = settings(TTT_STEP_SHARE=0.25)
    adapter, twin = with_gradients(s), with_gradients(s)
    before = [p.clone() for p in adapter.exact()]
    adapter.b["head"].grad[0, 1, 7, 0] = bad
    assert step(s, adapter).tolist() == [False, True]
    step(s, twin)
    for p, other, old in zip(adapter.exact(), twin.exact(), before):
        assert torch.equal(p[:, 0], other[:, 0]) and torch.equal(p[:, 1], old[:, 1])

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_makes_no_step(bad):
    s = settings(TTT_STEP_SHARE=0.25)
    adapter = with_gradients(s)
    before = [p.clone() for p in adapter.exact()]
    assert step(s, adapter, torch.tensor([3.0, bad])).tolist() == [False, True]
    for p, old in zip(adapter.exact(), before):
        assert torch.equal(p[:, 1], old[:, 1]) and p.isfinite().all()

@pytest.mark.parametrize("vocabulary", [300, 1024, 3000])
def test_the_heads_rms_is_over_1024_rows_and_fades(vocabulary):
    s = settings(TTT_BETA2=0.5)
    first, second = torch.ones(1, 2, vocabulary, 4), 3 * torch.ones(1, 2, vocabulary, 4)
    square = tg.with_squares(s, torch.zeros(1, 2, 1, 1), first)
    of_one = vocabulary / min(vocabulary, 1024)
    assert square.flatten().tolist() == pytest.approx([of_one] * 2)
    assert tg.with_squares(s, square, second).flatten().tolist() == pytest.approx([9.5 * of_one] * 2)

def test_a_reset_forgets_sums_of_squares():
    s = settings(TTT_STEP_SHARE=0.25, TTT_WARM_START_A=0)
    used, fresh = with_gradients(s, scale=30.0), with_gradients(s, seed=1)
    step(s, used)
    used.reset()
    for p, other in zip(used.parameters(), fresh.parameters()):
        p.grad = other.grad.clone()
    for adapter in (used, fresh):
        step(s, adapter)
    assert all(torch.equal(p, other) for p, other in zip(used.exact(), fresh.exact()))

def test_a_rate_far_too_large_is_cut_by_what_the_head_promises_too():
    """Others' gradients are next to nothing: the head's promise alone passes what is believed."""
    s = settings(TTT_LORA_LR=1, TTT_WEIGHT_DECAY=0)
    adapter = with_gradients(s)
    for p in adapter.parameters():
        p.grad *= 1.0 if p is adapter.b["head"] else 1e-4
    before = [p.clone() for p in adapter.exact()]
    assert step(s, adapter).all()
    promised = sum(((old - new) * p.grad).sum((0, 2, 3))
                   for p, old, new in zip(adapter.parameters(), before, adapter.exact()))
    assert promised.max() <= 1.001 * tg.MOST_SHARE * 3


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimisers_step_is_its_own_unless_it_promises_too_much(make):
    params, twins = gradients(), gradients()
    tg.optimiser_step(make(params, lr=0.01), params)
    make(twins, lr=0.01).step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins))
    before, twins = ([p.clone() for p in params] for _ in range(2))
    for p, twin in zip(params, twins):
        p.grad *= torch.tensor([1.0, 0, 1.0])[:, None, None]
        twin.grad = p.grad.clone()
    make(twins, lr=1, weight_decay=0).step()
    asked = falls(twins, before)
    assert min(asked[0], asked[2]) > 2 * tg.MOST_NATS
    assert tg.optimiser_step(make(params, lr=1, weight_decay=0), params).tolist() == [True, False, True]
    assert falls(params, before) == pytest.approx([tg.SAFE_NATS, 0, tg.SAFE_NATS], rel=1e-3)
    for p, old in zip(params, before):
        p.copy_(old)
    lr = 5 / asked[0]       # a nat more than is believed
    tg.optimiser_step(make(params, lr=lr, weight_decay=0), params)
    assert falls(params, before)[0] == pytest.approx(tg.MOST_NATS - 1, rel=1e-3)


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_a_rate_far_too_large_does_little_harm(s, lr):
    """The best is 0.001. What a step may promise was measured on models that have learnt more."""
    warnings = []
    s = changed(s, phased_ttt_prefix_docs=0)
    _, still = run(changed(s, ttt_lora_lr=0.0))
    _, adapted = run(changed(s, ttt_lora_lr=lr),
                     trace=lambda event, **v: warnings.append(v["text"]) if event == "warning" else None)
    assert adapted.loss < still.loss + 0.3
    assert len(warnings) == 1 and "lower TTT_LORA_LR" in warnings[0]
    assert ("TTT_STEP_SHARE" in warnings[0]) == (s.ttt_optimizer == "normalised")


@every_form
def test_a_documents_score_does_not_depend_on_its_group(s):
    s = changed(s, ttt_warm_start_a=False, phased_ttt_prefix_docs=0, ttt_kv_reuse=True,
                ttt_optimizer="normalised")
    a, _ = run(s)
    b, _ = run(changed(s, ttt_batch_size=1))
    assert torch.allclose(a.ledger.loss, b.ledger.loss, atol=1e-4)


@every_form
def test_in_stream_order_nothing_later_influences_an_earlier_document(s):
    s = changed(s, ttt_doc_order="stream", ttt_kv_reuse=True, ttt_optimizer="normalised")
    val, other = tg.Validation(s), tg.Validation(s)
    cut = int(val.documents.start[9])
    other.stream = val.tokens.copy()
    other.tokens[cut + 1:] = np.where(val.tokens[cut + 1:] == tg.BOS, tg.BOS, 7)
    a, b = (run(s, v)[0].ledger.loss for v in (val, other))
    assert torch.equal(a[:cut], b[:cut]) and not torch.equal(a[cut:], b[cut:])


def test_rounds_hold_every_document_once_and_train_on_scored_ones(s):
    for order in ("stream", "length"):
        rounds = tg.ttt_rounds(changed(s, ttt_doc_order=order), tg.Validation(s).documents.length)
        assert sorted(np.concatenate([g for r in rounds for g in r.groups])) == list(range(14))
        scored = set()
        for r in rounds:
            scored |= set(np.concatenate(r.groups))
            assert r.train_on is None or set(r.train_on) <= scored
        assert [r.train_on is None for r in rounds] == [False] * (len(rounds) - 1) + [True]


def test_chunks_by_length_or_by_position():
    s = settings(TTT_SHORT_SCORE_FIRST_STEPS="60=32, 10:4,", TTT_CHUNK_SIZE=48)
    assert tg.chunk_rules(s) == [(10, 4), (60, 32), (float("inf"), 48)]
    assert tg.chunk_bounds(s, 150) == [0, 4, 8, 12, 44, 76, 124, 172]
    assert tg.chunk_bounds(s, 13) == [0, 4, 8, 12]
    field = changed(s, ttt_doc_order="length")
    assert tg.chunk_bounds(field, 60) == [0, 32, 64] and tg.chunk_bounds(field, 61) == [0, 48, 96]
    with pytest.raises(tg.UserError, match="TTT_SHORT_SCORE_FIRST_STEPS=600-3"):
        settings(TTT_SHORT_SCORE_FIRST_STEPS="600-3")


@every_form
@pytest.mark.parametrize("at", [560, pytest.param(680, marks=pytest.mark.long)])
def test_where_later_documents_end_is_nothing_to_earlier_ones(s, at):
    """A BOS moves; computed in float64, as rows of other shapes add in another order. Earlier: all targets
    before the first place that differs, the last document's own beginning among them."""
    s = changed(s, ttt_doc_order="stream", ttt_warm_start_a=False, ttt_batch_size=2,
                ttt_short_score_first_steps="40:8,100:12")
    lengths = [30, 120, 45, 90, 130, 80, 140, 60]
    tokens = np.tile(np.arange(4, 20), 50)[:sum(lengths)]
    tokens[np.cumsum(lengths) - lengths] = tg.BOS
    moved = tokens.copy()
    moved[[635, at]] = 9, tg.BOS          # where the last document begins
    losses = []
    for stream in (tokens, moved):
        model = sine_model(s)
        model.compute_dtype = torch.float64
        ttt = tg.PhasedTTT(s, tg.World(), model, tg.Validation.of(stream))
        ttt.run()
        losses.append(ttt.ledger.loss)
    first = min(635, at)
    gap = (losses[0] - losses[1]).abs()
    assert gap[:first - 1].max() < 2e-5 < 1e-3 < gap[first - 1:].max()


@pytest.mark.parametrize("spent, level", [(1.0, 0), (4.4, 0), (4.6, tg.NO_ADAPTATION)])
def test_the_watchdog_predicts_from_adaptation_alone(s, spent, level):
    """Half of 100 s is gone, most of it in phases and waiting: what counts is the pace of the groups done. Of
    what is left 5 s are kept for the end."""
    given_up = []
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s), lambda event, **v: given_up.append(v),
                       tg.Clock(100, now=iter([0.0, 50.0]).__next__))
    group = np.arange(4)
    watch, costs = ttt.watch, ttt.watch.costs(group)
    watch.spent, watch.done, watch.left = spent, costs[0], 10 * costs
    watch.check_time()
    assert watch.level == level and len(given_up) == (level > 0)


def test_nothing_is_given_up_once_all_is_scored(s):
    watch = tg.Watchdog(s, tg.World(), np.array([9]), tg.Clock(100, now=iter([0.0, 97.0]).__next__), None)
    watch.spent, watch.done = 90.0, 1.0
    watch.check_time()
    assert watch.level == 0


@pytest.mark.parametrize("now, level", [(591.0, 0), (593.0, tg.NO_ADAPTATION)])
def test_eight_seconds_of_ten_minutes_are_kept(s, now, level):
    clock = tg.Clock(600, now=iter([0.0, now]).__next__)
    watch = tg.Watchdog(s, tg.World(), np.array([9]), clock, lambda event, **v: None)
    watch.done, watch.left = 1.0, np.ones(len(tg.LEVELS))
    watch.check_time()
    assert watch.level == level


def test_a_share_of_the_model_without_adapters_is_a_pass_more(s):
    group = np.arange(4)
    with_it, without = (tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s)).watch.costs(group)
                        for s in (s, changed(s, ttt_base_share=0)))
    longest = tg.Validation(s).documents.length[group].max()
    assert (with_it - without)[:tg.NO_ADAPTATION] == pytest.approx([4.0 * longest] * tg.NO_ADAPTATION)
    assert with_it[tg.NO_ADAPTATION] == without[tg.NO_ADAPTATION]


@fast_form
@pytest.mark.parametrize("level, suffix", [(2, 7), (3, 0)])
def test_the_watchdog_shortens_the_suffix_before_it_gives_up_adapting(s, level, suffix):
    """Half of 100 s is gone; 45 are enough at this level, whose scores are those of its suffix."""
    s = changed(s, ttt_suffix=21, phased_ttt_prefix_docs=0)
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s),
                       clock=tg.Clock(100, now=iter([0.0, 50.0]).__next__))
    left = sum(map(ttt.watch.costs, np.arange(14)[:, None]))
    assert left[0] == left[1] > left[2] > left[3] > left[4]
    ttt.watch.spent, ttt.watch.done, ttt.watch.left = 44 / left[level], 1.0, left
    ttt.watch.check_time()
    assert ttt.watch.level == level
    ttt.watch.clock = None
    ttt.run()
    assert torch.equal(ttt.ledger.loss, run(changed(s, ttt_suffix=suffix))[0].ledger.loss)


@every_form
@pytest.mark.parametrize("budget, given_up", [(1e9, None), (0.5, "adaptation")])
def test_the_watchdog_scores_everything_in_time(s, budget, given_up):
    """A clock that runs a second per look: with half a second left all is given up, nothing skipped."""
    ticks, events = iter(range(10**9)), []
    clock = tg.Clock(budget, now=lambda: float(next(ticks)))
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s),
                       lambda event, **v: events.append((event, v)), clock)
    assert ttt.run().tokens == len(ttt.val.tokens) - 1
    what = [v["what"] for event, v in events if event == "give_up"]
    assert (what == []) if given_up is None else what[-1].endswith(given_up)


@every_form
def test_a_share_of_the_model_without_adapters_is_mixed_in(s):
    """Of its probabilities; and what adapters learn does not depend on it."""
    s = changed(s, ttt_base_share=0, phased_ttt_prefix_docs=0, ttt_eval_seq_len=256)
    adapted, base, mixed = (run(changed(s, **changes))[0].ledger.loss for changes in (
        {}, dict(ttt_lora_lr=0, ttt_step_share=0), dict(ttt_base_share=0.3)))
    assert not torch.allclose(adapted, base, atol=0.01)
    expected = -(0.7 * torch.exp(-adapted) + 0.3 * torch.exp(-base)).log()
    assert torch.allclose(mixed, expected, atol=1e-4)


@every_form
def test_a_cache_mixture_is_what_it_says(s):
    """Against one made place by place from all earlier hidden states, with nothing learned."""
    s = changed(s, ttt_kv_reuse=True, ttt_lora_lr=0.0, phased_ttt_prefix_docs=0,
                ttt_eval_seq_len=256, ttt_cache_lambda=0.4, ttt_cache_theta=3.0, ttt_base_share=0)
    ttt, _ = run(s)
    model, documents = sine_model(s), ttt.val.documents
    for a, n in zip(documents.start[:4], documents.length):
        doc = torch.from_numpy(ttt.val.tokens[a:a + n].astype(np.int64))
        with torch.no_grad():
            hidden = model.final_hidden(doc[None, :-1], ttt.plan)
            p = torch.exp(-model.losses(doc[None, :-1], doc[None, 1:], ttt.plan)[0])
        h = hidden[0] / hidden[0].norm(dim=-1, keepdim=True)
        for t in range(1, n - 1):
            weights = torch.exp(3.0 * (h[:t] @ h[t] - 1))
            said = torch.zeros(s.vocab_size).index_add(0, doc[1:t + 1], weights) / weights.sum()
            w = min(0.6, 0.4 * weights.max().item())
            p[t] = (1 - w) * p[t] + w * said[doc[t + 1]]
        assert torch.allclose(ttt.ledger.loss[a:a + n - 1], -p.log(), atol=1e-4)


def test_adapters_learn_the_plain_loss_beside_a_cache_mixture(s):
    """What they learn is the same, so documents' second chunks differ by the mixture alone."""
    learnt = []
    s = changed(s, ttt_kv_reuse=True, phased_ttt_prefix_docs=0)
    for weight in (0.0, 0.4):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            real = tg.PhasedTTT.adapt
            patch.setattr(tg.PhasedTTT, "adapt", lambda self, adapter, *a, seen=seen, real=real: (
                real(self, adapter, *a), seen.append(sum(b.abs().sum().item() for b in adapter.b.values()))))
            ttt, score = run(changed(s, ttt_cache_lambda=weight))
        learnt.append((seen, score.loss))
    assert learnt[0][0] == learnt[1][0] and learnt[0][1] != learnt[1][1]


def test_a_cache_mixture_needs_cached_keys():
    with pytest.raises(tg.UserError, match="TTT_CACHE_LAMBDA=0.5 needs .*, not TTT_KV_REUSE=0: set"):
        settings(TTT_CACHE_LAMBDA=0.5, TTT_KV_REUSE=0)


def test_a_phase_on_few_tokens_trains_all_the_same(s):
    """The last chunk is left out as published, unless there is no other."""
    steps = []
    run(changed(s, phased_ttt_num_phases=1, global_ttt_chunk_tokens=100_000),
        trace=lambda event, **v: steps.append(v["n_tokens"]) if event == "sgd_step" else None)
    assert steps


@every_form
def test_the_watchdog_gives_up_within_a_group(s):
    """All documents are one group of many chunks; the clock runs out while it is adapted."""
    s = changed(s, ttt_batch_size=64, phased_ttt_prefix_docs=0, ttt_chunk_size=4,
                ttt_short_score_first_enabled=False)
    steps, widths, ticks = [], [], iter(range(10**9))

    def trace(event, **values):
        if event == "chunk":
            widths.append(values["width"])

    with pytest.MonkeyPatch.context() as patch:
        real = tg.PhasedTTT.adapt
        patch.setattr(tg.PhasedTTT, "adapt", lambda self, *a: (steps.append(1), real(self, *a)))
        clock = tg.Clock(2, now=lambda: float(next(ticks)))      # a second per look
        ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s), trace, clock)
        assert ttt.run().tokens == len(ttt.val.tokens) - 1
    assert ttt.watch.level == tg.NO_ADAPTATION and len(steps) == tg.WATCH_EVERY
    assert set(widths[tg.WATCH_EVERY + 1:]) == {4}       # on cached keys, after one that fills them


@pytest.mark.parametrize("levels, after", [((0, 0), (0, 0)), ((0, 3), (1, 3)), ((2, 0), (2, 1))])
def test_a_slow_rank_costs_the_others_the_phases_alone(s, levels, after):
    def have_time(world):
        ttt = tg.PhasedTTT(s, world, sine_model(s), tg.Validation(s))
        ttt.watch.level = levels[world.rank]
        return ttt.watch.all_have_time(), ttt.watch.level

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(have_time, ranks_as_threads(2)))
    assert found == [(max(levels) == 0, level) for level in after]


def test_the_watchdog_gives_up_before_the_first_group_once_time_is_over(s):
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s),
                       clock=tg.Clock(100, now=iter([0.0, 100.0]).__next__))
    ttt.watch.check_time()
    assert ttt.watch.level == tg.NO_ADAPTATION


@pytest.mark.parametrize("tokens, level", [(400, 0), (600, 1)])
def test_the_watchdog_counts_the_phases_to_come(s, tokens, level):
    """Half of 100 s is left, and phases take 0.1 s a token."""
    ttt = tg.PhasedTTT(s, tg.World(), sine_model(s), tg.Validation(s),
                       clock=tg.Clock(100, now=iter([0.0, 50.0]).__next__))
    ttt.watch.phase_pace, ttt.watch.phase_tokens = 0.1, tokens
    ttt.watch.check_time()
    assert ttt.watch.level == level


def test_phases_are_timed_for_the_watchdog(s):
    ttt, _ = run(s)
    assert ttt.watch.phase_pace > 0 and ttt.watch.phase_tokens == 0
    assert np.allclose(ttt.watch.left, 0) and ttt.watch.spent > 0 and ttt.watch.done > 0


@pytest.mark.parametrize("order", ["stream", "length"])
def test_the_corrector_on_two_ranks(s, order):
    """The same score; but in length order, where as published counts pass from group to group, another."""
    s = changed(s, corrector_alpha=0.3, corrector_orders="2,3", ttt_doc_order=order, ttt_warm_start_a=False,
                phased_ttt_prefix_docs=0, ttt_batch_size=2)
    alone = run(s)[1].bpb
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda world: tg.PhasedTTT(s, world, sine_model(s), tg.Validation(s)).run().bpb,
                        ranks_as_threads(2))
        one, other = both
    assert one == other and (abs(one - alone) < 2e-5) == (order == "stream")


def test_limits_of_documents_that_adapt():
    targets = np.array([10, 50, 90])
    field = settings(TTT_DOC_ORDER="length", TTT_TRAIN_MIN_DOC_LEN=30, TTT_TRAIN_MAX_DOC_LEN=60)
    assert tg.trained_rows(field, targets, 8).tolist() == [False, True, False]
    stream = settings(TTT_TRAIN_MAX_DOC_LEN=60)
    assert tg.trained_rows(stream, targets, 8).tolist() == [True, True, True]
    assert tg.trained_rows(stream, targets, 64).tolist() == [False, False, False]
    with pytest.raises(tg.UserError, match="TTT_TRAIN_MIN_DOC_LEN=30 asks where a document ends"):
        settings(TTT_TRAIN_MIN_DOC_LEN=30)


def test_the_head_is_adapted_where_it_is_switched_on(s):
    s = changed(s, phased_ttt_prefix_docs=0)
    without = changed(s, ttt_head_lora=False)
    kinds, others = (set(tg.Adapter(form, tg.layer_plan(s, True), 2).b) for form in (s, without))
    assert kinds - others == {"head"} and run(s)[1].loss != run(without)[1].loss
    off = {f"TTT_{kind.upper()}_LORA": 0 for kind in tg.ADAPTED}
    with pytest.raises(tg.UserError, match="TTT_ENABLED=1 has nothing to adapt"):
        settings(**off)


def test_groups_shrink_to_few_sizes():
    assert [tg.rows_kept_for(64, live) for live in (64, 33, 32, 17, 2, 1)] == [64, 64, 32, 32, 2, 2]
    assert {tg.rows_kept_for(48, live) for live in range(1, 49)} == {48, 24, 12, 6, 3}


@fast_form
@pytest.mark.parametrize("chunk, prefix", [(32, 4), (64, 4), (100, 9), (200, 14)])
def test_steps_of_the_base_weights_are_foretold(s, monkeypatch, chunk, prefix):
    s = tg.dataclasses.replace(s, global_ttt_chunk_tokens=chunk, phased_ttt_prefix_docs=prefix)
    taken, val = [], tg.Validation(s)
    monkeypatch.setattr(tg.PhasedTTT, "global_step", lambda *_: taken.append(1))
    ttt = tg.PhasedTTT(s, tg.World(), tg.GPT(s), val)
    starts, lengths = val.documents.start[:prefix], val.documents.length[:prefix]
    booked = tg.Booked(np.concatenate([val.tokens[a:a + n] for a, n in zip(starts, lengths, strict=True)]))
    ttt.global_phase(booked)
    assert len(taken) == len(tg.phase_steps(s, len(booked.tokens)))
    assert (chunk < s.eval_seq_len) == (not taken)
