"""The forward: causality, documents, adapters, recurrence. Numbers: test_golden and the parity runner."""

import pytest
import torch
from conftest import LANES, TABLES, settings, sine_model, tg, tokens

GATES = [
    dict(),
    dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1),
    dict(SPARSE_ATTN_GATE_ENABLED=0, ATTN_OUT_GATE_ENABLED=1, ATTN_OUT_GATE_SRC="q"),
    dict(
        SPARSE_ATTN_GATE_ENABLED=0,
        SMEAR_GATE_ENABLED=0,
        SKIP_GATES_ENABLED=0,
        TIE_EMBEDDINGS=0,
        PARALLEL_START_LAYER=0,
    ),
    dict(KEY_OFFSET=1),
]


@pytest.mark.parametrize("changes", GATES)
@pytest.mark.parametrize("looping", [False, True])
def test_later_tokens_never_change_earlier_losses(changes, looping):
    s = settings(**changes)
    model, plan, x = sine_model(s), tg.layer_plan(s, looping), tokens(2, 33)
    other = x.clone()
    other[:, 20:] = tokens(2, 13, seed=1)
    with torch.no_grad():
        a, b = (model.losses(t[:, :-1], t[:, 1:], plan) for t in (x, other))
    assert torch.equal(a[:, :19], b[:, :19]) and not torch.allclose(a[:, 19:], b[:, 19:])


@pytest.mark.parametrize("changes", GATES)
def test_packed_documents_score_as_if_alone(changes):
    s = settings(**changes)
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(1, 48)
    x[0, [0, 17, 40]] = tg.BOS
    y = x.roll(-1, 1)
    layout = tg.Layout(torch.tensor([0, 17, 40, 48, 48, 48], dtype=torch.int32), 23)
    with torch.no_grad():
        packed = model.losses(x, y, plan, layout)
        alone = [model.losses(x[:, a:b], y[:, a:b], plan) for a, b in ((0, 17), (17, 40), (40, 48))]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=2e-5)


def test_keys_hand_on_what_is_not_rotated_within_a_document():
    s = settings(KEY_OFFSET=1)
    model, x = sine_model(s), tokens(2, 12)
    x[0, [0, 5]] = tg.BOS
    k = torch.randn(2, 12, 1, 32, generator=torch.Generator().manual_seed(0))
    forward = model.begin(x, None, None, None, None)
    shifted = tg.offset_keys(k, forward, 0)
    first, turned = torch.zeros(2, 12, dtype=torch.bool), slice(0, s.rope_dims)
    first[0, [0, 5]] = first[1, 0] = True
    assert torch.equal(shifted[..., turned], k[..., turned])
    own, before = k[..., s.rope_dims:], k.roll(1, 1)[..., s.rope_dims:]
    assert torch.equal(shifted[..., s.rope_dims:], torch.where(first[..., None, None], own, before))
    with pytest.raises(tg.UserError, match="KEY_OFFSET=1 finds no channel .* ROPE_DIMS=32"):
        settings(KEY_OFFSET=1, ROPE_DIMS=32)


def test_keys_of_a_suffix_take_what_is_handed_on_from_the_kept_ones():
    """The suffix is run again by the same weights: chunk by chunk it is the whole row."""
    s = settings(KEY_OFFSET=1)
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(2, 40)
    x[:, 0] = tg.BOS
    y, cache, parts, rerun = x.roll(-1, 1), tg.KeyCache(96), [], 0
    with torch.no_grad():
        whole = model.losses(x, y, plan)
        for a, b in ((0, 10), (10, 21), (21, 30), (30, 40)):
            if a:
                rerun = cache.advance(b - a, suffix=6)
            if a == 21:      # a document has ended
                cache.keep(slice(-1, None))
                x, y, whole = x[-1:], y[-1:], whole[-1:]
                parts = [part[-1:] for part in parts]
            inputs = slice(a - rerun, b)
            parts.append(model.losses(x[:, inputs], y[:, inputs], plan, cache=cache)[:, rerun:])
            cache.seal(x[:, inputs])
    assert rerun == 6 and torch.allclose(whole, torch.cat(parts, 1), atol=2e-5)


def test_fresh_adapter_changes_nothing_and_rows_are_independent():
    s = settings()
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(3, 20)
    adapter = tg.Adapter(s, plan, 3)
    y = x.roll(-1, 1)
    base = model.losses(x, y, plan)
    assert torch.equal(base, model.losses(x, y, plan, adapter=adapter))
    for b in adapter.b.values():
        b.data[:, 1] = 0.1
    changed = (model.losses(x, y, plan, adapter=adapter) - base).abs().amax(1)
    assert changed[1] > 1e-3 and changed[[0, 2]].max() < 1e-5
    adapter.reset()
    assert torch.equal(base, model.losses(x, y, plan, adapter=adapter))


def test_every_adapter_kind_reaches_the_loss_and_can_be_switched_off():
    s = settings(TTT_MASK="no_qv")
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(2, 20)
    adapter = tg.Adapter(s, plan, 2)
    model.losses(x, x.roll(-1, 1), plan, adapter=adapter).sum().backward()
    assert set(adapter.b) == {"k", "o", "mlp", "head"}
    for b in adapter.b.values():
        assert (b.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("looping", [False, True])
def test_every_parameter_gets_a_gradient(looping):
    s = settings()
    model, x = sine_model(s), tokens(2, 20)
    model.losses(x, x.roll(-1, 1), tg.layer_plan(s, looping)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_recurrence_is_an_argument():
    s = settings()
    model, x = sine_model(s), tokens(1, 20)
    y = x.roll(-1, 1)
    on, off = (tg.layer_plan(s, looping) for looping in (True, False))
    first = model.losses(x, y, on)
    assert not torch.allclose(first, model.losses(x, y, off), atol=1e-3)
    assert torch.equal(first, model.losses(x, y, on))
    assert (on.encoder + on.decoder, off.encoder + off.decoder) == ((0, 1, 2, 1, 2, 3), (0, 1, 2, 3))


def test_taps_do_not_change_the_forward():
    s = settings()
    model, x, seen = sine_model(s), tokens(1, 20), []
    plan = tg.layer_plan(s, True)
    with_tap = model.final_hidden(x, plan, hook=lambda kind, layer, value: seen.append((kind, layer)))
    assert torch.allclose(with_tap, model.final_hidden(x, plan), atol=1e-6)
    assert [layer for kind, layer in seen if kind == "attn_in"] == list(plan.encoder + plan.decoder)


def test_a_cpu_computes_on_one_thread_unless_told(monkeypatch):
    for told, threads in ({}, 1), ({"OMP_NUM_THREADS": "2"}, 2):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        torch.set_num_threads(2)
        tg.set_up(settings(), tg.World())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)


def test_same_seed_same_weights():
    s = settings(MODEL_DIM=128)
    models = []
    for threads in (1, 2):      # nor do they hang on how many compute
        torch.set_num_threads(threads)
        models.append(tg.GPT(s, torch.Generator().manual_seed(7)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    a, b = models
    c = tg.GPT(s, torch.Generator().manual_seed(8))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.tok_emb, c.tok_emb)


def test_bfloat16_activations_stay_close():
    s = settings()
    model, x = sine_model(s), tokens(2, 40)
    y, plan = x.roll(-1, 1), tg.layer_plan(s, True)
    exact = model.losses(x, y, plan)
    model.compute_dtype = torch.bfloat16
    assert (model.losses(x, y, plan) - exact).abs().mean() < 0.05


# --- mechanisms of published systems that are off by default: each does what it says, whatever is on


MECHANISMS = (
    TABLES,
    {**TABLES, "SMEAR_GATE_BOS_FIX": 0, "KEY_OFFSET": 1, "BIGRAM_DIM": 64, "VE_DIM": 32},
    {**LANES, "SKIP_INTO_LANES": 0},
    {**LANES, "ASYM_LOGIT_RESCALE": 1, "NEGATIVE_SLOPE": 0.3},
)


@pytest.mark.parametrize("changes", MECHANISMS)
def test_scored_segments_know_nothing_of_their_neighbours(changes):
    s = settings(**changes)
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(1, 48)
    y, cuts = x.roll(-1, 1), (0, 17, 40, 48)
    layout = tg.Layout(torch.tensor([*cuts, 48], dtype=torch.int32), 23, isolate=True)
    with torch.no_grad():
        packed = model.losses(x, y, plan, layout)
        alone = [model.losses(x[:, a:b], y[:, a:b], plan) for a, b in zip(cuts, cuts[1:])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=2e-5)


@pytest.mark.parametrize("changes", MECHANISMS)
def test_cached_chunks_equal_the_whole_row(changes):
    s = settings(**changes)
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(2, 30)
    x[:, 13] = tg.BOS
    y, cache, parts = x.roll(-1, 1), tg.KeyCache(96), []
    with torch.no_grad():
        whole = model.losses(x, y, plan)
        for a, b in ((0, 10), (10, 21), (21, 30)):
            if a:
                cache.advance(b - a)
            parts.append(model.losses(x[:, a:b], y[:, a:b], plan, cache=cache))
            cache.seal(x[:, a:b])
    assert torch.allclose(whole, torch.cat(parts, 1), atol=2e-5)


@pytest.mark.parametrize("changes", MECHANISMS)
def test_each_mechanism_matters_and_every_new_parameter_is_trained(changes):
    s, plain = settings(**changes), settings()
    model, x = sine_model(s), tokens(2, 30)
    plan = tg.layer_plan(s, True)
    model.losses(x, x.roll(-1, 1), plan, training=True).mean().backward()
    new = set(tg.GPT.shapes(s)) - set(tg.GPT.shapes(plain))
    caps = {"softcap_pos", "softcap_neg"}
    assert new and all(getattr(model, n).grad.abs().sum() > 0 for n in new - caps)
    assert all(getattr(model, n).grad is None for n in new & caps)


def test_fresh_tables_change_nothing_but_learn():
    s = settings(BIGRAM_VOCAB_SIZE=50, BIGRAM_DIM=12, VE_ENABLED=1, VE_DIM=10, VE_LAYERS="1")
    plain, model = tg.GPT(settings()), tg.GPT(s)
    for name, p in plain.named_parameters():
        getattr(model, name).data.copy_(p.data)
    for m in (plain, model):      # with the outputs at zero every layer is the identity
        m.qo_bank.data.fill_(0.01)
    x, plan = tokens(2, 20), tg.layer_plan(s, True)
    mine, theirs = (m.losses(x, x.roll(-1, 1), plan) for m in (model, plain))
    assert torch.allclose(mine, theirs, atol=1e-6)
    mine.sum().backward()
    assert model.bigram_embed.grad.abs().sum() > 0 and model.ve_proj.grad.abs().sum() > 0
