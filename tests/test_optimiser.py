"""Muon, AdamW groups, clipping, schedules."""

import pytest
import torch
from conftest import LANES, settings, sine_model, tg, tokens


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


@pytest.mark.parametrize("tied, rates, still", [
    (1, {}, []), (1, dict(EMBED_LR=0, HEAD_LR=0), []), (1, dict(TIED_EMBED_LR=0), ["tok_emb"]),
    (0, {}, []), (0, dict(HEAD_LR=0), ["lm_head"]), (0, dict(EMBED_LR=0, TIED_EMBED_LR=0), ["tok_emb"])])
def test_every_parameter_moves_and_an_untied_head_by_its_own_rate(tied, rates, still):
    s = settings(TIE_EMBEDDINGS=tied, **rates)
    model = sine_model(s)
    optimiser = tg.Optimiser(s, tg.World(), dict(model.named_parameters()), torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model)
    optimiser.step(1.0, 0.9)
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == still
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_is_not_declared_stops_the_run():
    model = sine_model(settings())
    with pytest.raises(tg.UserError, match="newcomer is not declared: add a row to PARAMETERS"):
        tg.Optimiser(
            settings(),
            tg.World(),
            {**dict(model.named_parameters()), "newcomer": model.tok_emb},
            torch.float32,
        )


def train_steps(s, count=3):
    """A trainer after a few steps, and its starting weights."""
    model = sine_model(s)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer, x = tg.Trainer(s, tg.World(), model), tokens(1, 65)
    for _ in range(count):
        trainer.micro_step(tg.Batch(x[:, :-1], x[:, 1:], None, 64), tg.layer_plan(s, True))
        trainer.update(1.0, 0.9)
    return trainer, before


def test_split_rate_scales_the_step_of_early_layers_and_the_published_form_does_not():
    ends = {}
    for target, early in (("update", 0.0), ("update", 0.013), ("gradient", 0.013)):
        s = settings(
            MATRIX_LR=0.026, MATRIX_LR_EARLY=early, BANK_SPLIT=2, MUON_WD=0, SPLIT_LR_TARGET=target
        )
        trainer, before = train_steps(s, 1)
        ends[target, early] = trainer.model.kv_bank.data - before["kv_bank"]
    whole, split, gradient = ends.values()
    factor = torch.tensor([0.5, 0.5, 1, 1] * 2)[:, None, None]
    assert torch.allclose(split, whole * factor, atol=1e-6)
    assert torch.allclose(gradient, whole, atol=1e-5)


def reached(trainer, name):
    """Of every row of a parameter, whether a gradient has reached it."""
    optimiser, p = trainer.optimiser, getattr(trainer.model, name)
    moments = dict(zip(optimiser.banks, optimiser.momentum))
    moments |= {q: optimiser.adam.state[q]["exp_avg_sq"] for q in optimiser.small}
    return [bool(row.any()) for row in torch.atleast_1d(moments[p])]


def test_a_skip_that_is_lost_gets_no_gradient():
    s = settings(**LANES, SKIP_INTO_LANES=0, NUM_LOOPS=0)
    trainer, _ = train_steps(s)
    assert reached(trainer, "skip_weights") == reached(trainer, "skip_gates") == [True, False]
    assert all(all(reached(trainer, n)) for n in ("qo_bank", "kv_bank", "resid_mix", "lane_merge"))


def test_the_two_caps_of_evaluation_are_not_trained():
    trainer, _ = train_steps(settings(ASYM_LOGIT_RESCALE=1))
    assert not {trainer.model.softcap_pos, trainer.model.softcap_neg} & set(trainer.optimiser.small)


@pytest.mark.parametrize("changes, shares", [({}, [1, 0.55]), ({"PREQUANT_TTT_COSINE_DECAY": 0}, [1, 1]),
                                             ({"PREQUANT_TTT_GRAD_CLIP": 1e-9}, [1, 0.55])])
def test_training_before_quantising_lowers_its_rate_and_clips(changes, shares):
    """AdamW's step does not go with the gradient's size, until its epsilon weighs more."""
    s = settings(PREQUANT_TTT_ENABLED=1, PREQUANT_TTT_EPOCHS=2, PREQUANT_TTT_LR=1e-3, TRAIN_SEQ_LEN=32,
                 PREQUANT_TTT_FREEZE_BLOCKS=0, **changes)
    model, rates = sine_model(s), []
    before = model.tok_emb.detach().clone()
    tg.prequant_ttt(s, tg.World(), model, tokens(97).numpy(), lambda lr, **_: rates.append(lr / 1e-3))
    assert rates == pytest.approx(shares)
    moved = (model.tok_emb - before).abs().max().item()
    assert 1e-9 < moved < 1e-4 if "PREQUANT_TTT_GRAD_CLIP" in changes else 5e-4 < moved < 5e-3
