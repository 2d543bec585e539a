"""Muon, AdamW groups, clipping, schedules."""

import pytest
import torch
from conftest import settings, sine_model, tg


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalise_pushes_singular_values_to_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(tg.orthogonalise(g, torch.float32))
    assert values.min() > 0.8 and values.max() < 1.2


def gradients(model, scale=1.0):
    for k, p in enumerate(model.parameters()):
        p.grad = scale * torch.sin(torch.arange(p.numel(), dtype=torch.float32) + k).view(p.shape)


def test_clip_bounds_the_norm_and_leaves_small_gradients_alone():
    for scale, clipped in ((1.0, True), (1e-6, False)):
        s = settings(GRAD_CLIP_NORM=0.3)
        model = sine_model(s)
        optimiser = tg.Optimiser(s, tg.World(), dict(model.named_parameters()), torch.float32)
        gradients(model, scale)
        before = torch.cat([p.grad.flatten() for p in model.parameters()])
        norm = optimiser.clip(optimiser.reduce(), optimiser.world)
        after = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(norm, before.norm(), rtol=1e-5)
        assert (
            torch.allclose(after.norm(), torch.tensor(0.3), rtol=1e-4)
            if clipped
            else torch.equal(before, after)
        )


def test_both_clip_modes_agree_on_one_rank():
    ends = []
    for mode in ("global", "per_rank"):
        s = settings(GRAD_CLIP_MODE=mode)
        model = sine_model(s)
        optimiser = tg.Optimiser(s, tg.World(), dict(model.named_parameters()), torch.float32)
        gradients(model)
        optimiser.step(1.0, 0.9)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-6)


@pytest.mark.parametrize("tied", [0, 1])
def test_every_parameter_moves_and_head_is_trained_when_untied(tied):
    s = settings(TIE_EMBEDDINGS=tied)
    model = sine_model(s)
    optimiser = tg.Optimiser(s, tg.World(), dict(model.named_parameters()), torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model)
    optimiser.step(1.0, 0.9)
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_without_a_role_stops_the_run():
    model = sine_model(settings())
    with pytest.raises(tg.UserError, match="newcomer"):
        tg.Optimiser(
            settings(),
            tg.World(),
            {**dict(model.named_parameters()), "newcomer": model.tok_emb},
            torch.float32,
        )


def test_schedules():
    s = settings(
        WARMDOWN_FRAC=0.5,
        MIN_LR=0.1,
        MUON_MOMENTUM=0.97,
        MUON_MOMENTUM_WARMUP_START=0.92,
        MUON_MOMENTUM_WARMUP_STEPS=10,
        ENABLE_LOOPING_AT=0.35,
    )
    assert [tg.warmdown_share(s, p) for p in (0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.1]
    assert [round(tg.muon_momentum(s, k), 6) for k in (0, 5, 10, 99)] == [0.92, 0.945, 0.97, 0.97]
    assert [tg.Curriculum(s).loops(0, p) for p in (0.34, 0.35)] == [False, True]


def test_a_step_is_taken_only_if_it_fits_into_the_budget():
    pace = tg.Pace(settings(MAX_WALLCLOCK_SECONDS=100, ITERATIONS=1000), reserve=20)
    for step, elapsed in enumerate((0, 2, 4, 5)):
        pace.observe(step, elapsed)
    assert pace.step_seconds == pytest.approx(1.8)      # of the slower step before, not of the last
    assert pace.progress(3) == 5 / 80 and not pace.ended(3) and not pace.near_end()
    pace.observe(50, 78.5)
    pace.step_seconds = 1.4
    assert pace.near_end() and not pace.ended(50)
    pace.step_seconds = 1.6
    assert pace.ended(50)


def test_without_a_budget_iterations_decide():
    pace = tg.Pace(settings(ITERATIONS=10), reserve=20)
    pace.observe(5, 1e9)
    assert pace.progress(5) == 0.5 and not pace.ended(9) and pace.ended(10) and not pace.near_end()


def test_warm_up_is_undone(s):
    model = sine_model(s)
    trainer = tg.Trainer(s, tg.World(), model)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.warm_up()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(torch.equal(e, q) for e, q in zip(trainer.ema.values(), before))
    assert not trainer.optimiser.adam.state and all(not m.any() for m in trainer.optimiser.momentum)
