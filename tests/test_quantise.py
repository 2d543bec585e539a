"""GPTQ, low-rank repair, and the whole model there and back."""

import pytest
import torch
from conftest import settings, sine_model, tg


def problem(rows=24, columns=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    x = torch.randn(512, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    return w, x.mT @ x / 512


def loss(w, codes, scale, h):
    e = w - codes * scale[:, None].float()
    return ((e @ h) * e).sum().item()


def test_gptq_beats_rounding_under_its_hessian():
    w, h = problem()
    scale = tg.row_scales(w, 4, 3.0)
    rounded = tg.divide_round(w, scale[:, None], -7, 7)
    assert loss(w, tg.gptq(w, h, scale, 4), scale, h) < 0.6 * loss(w, rounded, scale, h)


def test_gptq_is_rounding_when_columns_do_not_interact():
    w, _ = problem()
    scale = tg.row_scales(w, 6, 12.85)
    assert torch.equal(tg.gptq(w, torch.eye(96), scale, 6), tg.divide_round(w, scale[:, None], -31, 31))


@pytest.mark.parametrize("block", [16, 40, 128, 1000])
def test_blocks_only_change_the_order_of_sums(block):
    w, h = problem()
    scale = tg.row_scales(w, 6, 12.85)
    assert (tg.gptq(w, h, scale, 6, block=block) == tg.gptq(w, h, scale, 6)).float().mean() > 0.995


def test_a_batch_is_its_matrices_and_dead_columns_are_zero():
    (w0, h0), (w1, h1) = problem(seed=0), problem(seed=1)
    h1[5], h1[:, 5] = 0, 0
    w, h = torch.stack([w0, w1]), torch.stack([h0, h1])
    scale = tg.row_scales(w, 6, 12.85)
    both = tg.gptq(w, h, scale, 6)
    for i in range(2):
        assert (both[i] == tg.gptq(w[i], h[i], scale[i], 6)).float().mean() > 0.999
    assert not both[1][:, 5].any() and both[0][:, 5].any()


def test_a_dead_column_is_damped_as_a_live_one():
    """A dead column's diagonal becomes 1 before the mean that sets the damping: seen in the factor."""
    h = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    order, u, dead = tg.hessian_factor(h[None], 0.01)
    assert order.tolist() == [[0, 1, 2]] and dead.tolist() == [[False, True, False]]
    assert torch.allclose(u[0].diagonal(), (torch.tensor([4.0, 1.0, 1.0]) + 0.02) ** -0.5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_low_rank_is_the_best_approximation(shape):
    e = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a, b = tg.low_rank(e, 4)
    best = torch.linalg.svdvals(e)[4:].norm()
    assert torch.allclose((e - a @ b).norm(), best, rtol=1e-4)


def quantised(monkeypatch, **changes):
    """The tiny model quantised with every matrix above the size limit, and its float weights."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s = settings(**changes)
    model = sine_model(s)
    x = torch.randint(4, 300, (1, 512), generator=torch.Generator().manual_seed(0))
    hessians = tg.calibrate(s, tg.World(), model, lambda: tg.Batch(x, x, None, 512))
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    return s, model, weights, tg.quantise(s, weights, hessians)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(LQER_ASYM_ENABLED=0),
        dict(LQER_ENABLED=0),
        dict(TIE_EMBEDDINGS=0),
        dict(GATED_ATTN_QUANT_GATE=0),
    ],
)
def test_the_model_there_and_back(monkeypatch, changes):
    s, model, weights, q = quantised(monkeypatch, **changes)
    back = tg.dequantise(q)
    assert set(back) == set(weights)
    for name, w in weights.items():
        bound = 0.16 if "gptq" in q.meta[name] else 0.01 if "gate" in q.meta[name] else 1e-3
        assert (back[name] - w).norm() <= bound * w.norm() + 1e-6, name
    other = tg.GPT(s)
    tg.load_weights(other, back, "test")
    x = torch.randint(4, 300, (1, 64), generator=torch.Generator().manual_seed(1))
    plan = tg.layer_plan(s, True)
    a, b = (m.losses(x, x.roll(-1, 1), plan).mean() for m in (model, other))
    assert (a - b).abs() < 0.1


def test_low_rank_repair_lowers_the_error_of_the_worst(monkeypatch):
    _, _, weights, plain = quantised(monkeypatch, LQER_ENABLED=0)
    _, _, _, repaired = quantised(monkeypatch, LQER_ENABLED=1, LQER_TOP_K=2)
    names = [n for n, how in repaired.meta.items() if "lqer" in how]
    assert len(names) == 2
    for n in names:
        a, b = ((tg.dequantise(q)[n] - weights[n]).norm() for q in (plain, repaired))
        assert b < a


def test_hessians_are_summed_over_visits_and_divided_by_batches():
    s = settings(GPTQ_CALIBRATION_BATCHES=3)
    model, x = sine_model(s), torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    batch = tg.Batch(x, x, None, 40)
    inputs = {}
    model.hidden(
        x, tg.layer_plan(s, True), tap=lambda kind, i, v: inputs.setdefault((kind, i), []).append(v[0])
    )
    h = tg.calibrate(s, tg.World(), model, lambda: batch)
    visits = inputs["attn_in", 1]
    assert len(visits) == 2  # layer 1 is inside the loop
    assert torch.allclose(h["blocks.1.attn.c_q.weight"], sum(v.mT @ v for v in visits), rtol=1e-4, atol=1e-4)
    assert torch.equal(h["blocks.1.attn.c_k.weight"], h["blocks.1.attn.c_q.weight"])
