"""Rounding: GPTQ and the trellis."""

import fault_fits
import pytest
import torch
from conftest import tg
from parity import gptq


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
    assert loss(w, gptq(w, h, scale, 4), scale, h) < 0.6 * loss(w, rounded, scale, h)


def test_gptq_is_rounding_when_columns_do_not_interact():
    w, _ = problem()
    scale = tg.row_scales(w, 6, 12.85)
    assert torch.equal(gptq(w, torch.eye(96), scale, 6), tg.divide_round(w, scale[:, None], -31, 31))


@pytest.mark.parametrize("block", [16, 40, 128, 1000])
def test_blocks_only_change_the_order_of_sums(block):
    w, h = problem()
    scale = tg.row_scales(w, 6, 12.85)
    # one code at the edge between two, which last bits decide, changes what follows in its row: 1 of 24
    assert (gptq(w, h, scale, 6, block=block) == gptq(w, h, scale, 6)).float().mean() > 0.9


def test_a_batch_is_its_matrices_and_dead_columns_are_zero():
    (w0, h0), (w1, h1) = problem(seed=0), problem(seed=1)
    h1[5], h1[:, 5] = 0, 0
    w, h = torch.stack([w0, w1]), torch.stack([h0, h1])
    scale = tg.row_scales(w, 6, 12.85)
    both = gptq(w, h, scale, 6)
    for i in range(2):
        assert (both[i] == gptq(w[i], h[i], scale[i], 6)).float().mean() > 0.9
    assert not both[1][:, 5].any() and both[0][:, 5].any()


def test_a_dead_column_is_damped_as_a_live_one():
    """A dead column's diagonal becomes 1 before the mean that sets the damping: seen in the factor."""
    h = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    order, u, dead, _ = tg.hessian_factor(h[None], 0.01)
    assert order.tolist() == [[0, 1, 2]] and dead.tolist() == [[False, True, False]]
    assert torch.allclose(u[0].diagonal(), (torch.tensor([4.0, 1.0, 1.0]) + 0.02) ** -0.5)


NOT_DEFINITE = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # eigenvalues -0.5 and 2.5: damping 0.5 and more helps


def test_a_hessian_that_cannot_be_factored_is_damped_ten_times_more():
    """Until it can be; its neighbours in the batch as they were asked for."""
    h = torch.stack([torch.eye(2), NOT_DEFINITE, 3 * torch.eye(2)])
    found, taken = tg.damped_factor(h, 0.01)
    assert taken == pytest.approx([0.01, 1.0, 0.01])
    for i, damp in enumerate(taken):
        alone = tg.hessian_factor(h[i:i + 1], damp)
        assert all(torch.equal(part[i], one[0]) for part, one in zip(found, alone, strict=True))


@pytest.mark.parametrize("make", fault_fits.HESSIANS)
@pytest.mark.parametrize("damp", [1e-6, 0.01])
def test_every_hessian_leaves_a_factor(make, damp):
    """Few calibration rows, dead inputs, none at all, tiny, huge and broken ones."""
    h = make(64, torch.Generator().manual_seed(0))
    (order, u, dead, ratio), (taken,) = tg.damped_factor(h[None], damp)
    assert order.sort().values.tolist() == [list(range(64))]
    assert u.isfinite().all() and ratio.isfinite().all() and (ratio > 0).all()
    assert (taken == torch.inf) == (not h.isfinite().all())
    assert make is not fault_fits.usual or taken == damp


# ---- trellis


def test_the_trellis_spends_errors_where_they_cost_least():
    """Columns of unlike curvature: the weighted error is below that of a walk that takes all as alike."""
    g = torch.Generator().manual_seed(0)
    t, slope = 4 * torch.randn(1, 512, 64, generator=g), torch.exp2(3 * torch.randn(1, 512, 1, generator=g))
    state, unit, cost = torch.zeros(1, 64, dtype=torch.long), torch.eye(512)[None], []
    for weights in (slope, torch.ones_like(slope)):
        _, error, _ = tg.trellis_block(t, unit, weights, state)
        cost.append((slope * error.square()).sum().item())
    assert cost[0] < 0.9 * cost[1]


def walk(codes):
    """Half steps by the definition: one row, one state, one code at a time."""
    out = torch.zeros(codes.shape)
    for r, row in enumerate(codes.tolist()):
        state = 0
        for c, code in enumerate(row):
            out[r, c] = (state & 1) / 2
            state = tg.TRELLIS[state, code % 2].item()
    return out


def test_trellis_codes_are_decoded_as_they_were_chosen():
    """The errors that the encoder feeds back are those of the decoder's weights, in an uneven block."""
    g = torch.Generator().manual_seed(0)
    t, state = 3 * torch.randn(2, 70, 5, generator=g), torch.zeros(2, 5, dtype=torch.long)
    unit = torch.eye(70) + 0.1 * torch.randn(2, 70, 70, generator=g).triu(1)
    codes, errors, end = tg.trellis_block(t, unit, torch.ones(2, 70, 1), state)
    for m in range(2):
        rows = codes[m].mT.to(torch.int8)
        half = torch.from_numpy(tg.half_steps(rows.numpy()).astype("float32")) / 2
        assert torch.equal(half, walk(rows))
        # e_j = t_j - sum_{i<j} unit_ij e_i - value_j, so unit' e = t - value
        assert torch.allclose(unit[m].mT @ errors[m], t[m] - (rows + half).mT, atol=1e-4)
    assert end.shape == (2, 5) and end.max() < 8


def test_trellis_beats_rounding_at_the_same_step():
    """On a Gaussian source: 8 states win about 1 dB of the 1.53 that any quantiser can."""
    t = 4 * torch.randn(1, 1024, 64, generator=torch.Generator().manual_seed(0))
    order, u = torch.arange(1024)[None], torch.eye(1024)[None]
    dead, step, error = torch.zeros(1, 1024, dtype=torch.bool), torch.ones(1, 64), []
    for trellis in (False, True):
        codes = tg.round_in_order(t.mT, step, order, u, dead, 126, trellis)[0]
        value = codes + (torch.from_numpy(tg.half_steps(codes.numpy())) / 2 if trellis else 0)
        error.append((t[0].mT - value).square().mean().item())
        assert codes.float().std() == pytest.approx(4, rel=0.05)
    assert error[0] == pytest.approx(1 / 12, rel=0.05) and error[1] < 0.81 * error[0]


@pytest.mark.parametrize("trellis", [False, True])
def test_rows_in_turns_take_up_the_errors_of_others(monkeypatch, trellis):
    """tr(E' G E H) falls under the G that they go by, and nothing changes where rows do not interact."""
    monkeypatch.setattr(tg, "COLUMNS_AT_ONCE", 32)      # three blocks: turns overlap
    (w, h), rows = problem(rows=40), torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    mixed = rows @ torch.randn(40, 40, generator=torch.Generator().manual_seed(2)) / 40**0.5
    w, step = w[None], torch.full((1, 40), 0.4)
    order, u, dead, _ = tg.hessian_factor(h[None], falling=not trellis)
    alone = tg.round_in_order(w, step, order, u, dead, tg.TOP_CODE, trellis, block=32)

    def cost(codes, g):
        e = w[0] - 0.4 * (tg.on_trellis(codes[0]) if trellis else codes[0].float())
        return ((g @ e @ h) * e).sum()

    for g, share in ((mixed.mT @ mixed / 200, 0.85), (torch.diag(1 + torch.rand(40)), 1.0)):
        feedback = tg.row_feedback(g)
        codes = tg.round_in_turns(w, step, order, u, dead, feedback.mix[None], trellis)
        assert cost(codes, g) <= share * cost(alone, g)
        assert (feedback.sensitivity <= g.diagonal() * 1.0001).all()
    assert (codes == alone).float().mean() > 0.9      # last bits decide some


@pytest.mark.parametrize("trellis", [False, True])
def test_turns_cost_no_more_at_a_width_that_blocks_do_not_divide(monkeypatch, trellis):
    """Rows that do not interact, 2 · 37 columns: three even blocks, and the cost of rows rounded at once."""
    monkeypatch.setattr(tg, "COLUMNS_AT_ONCE", 32)
    w, h = problem(rows=64, columns=74)
    step, mix = torch.full((1, 64), 0.4), torch.zeros(1, 64, 64)
    order, u, dead, _ = tg.hessian_factor(h[None], falling=not trellis)
    alone = tg.round_in_order(w[None], step, order, u, dead, tg.TOP_CODE, trellis, block=25)
    codes = tg.round_in_turns(w[None], step, order, u, dead, mix, trellis)
    costs = [loss(w, tg.on_trellis(c[0]) if trellis else c[0], step[0], h) for c in (codes, alone)]
    assert codes.shape == alone.shape and costs[0] == pytest.approx(costs[1], rel=0.02), costs
