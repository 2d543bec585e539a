"""Quantising: calibration, steps, low-rank repair, and the whole model there and back."""

import multiprocessing
import warnings

import fault_fits
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import events, settings, sine_model, tg, without
from test_rounding import NOT_DEFINITE, problem


class Log:
    def __init__(self):
        self.events = []

    def log(self, event, **values):
        self.events.append((event, values))


@pytest.mark.parametrize("allocation", ["fisher", "hand"])
def test_what_calibration_left_unusable_is_said_once(monkeypatch, allocation):
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s, run = settings(QUANT_ALLOCATION=allocation, LQER_ENABLED=0), Log()
    weights = tg.matrix_views({n: p.detach() for n, p in sine_model(s).named_parameters()})
    bad, worse = "blocks.0.mlp.fc.weight", "blocks.1.mlp.fc.weight"
    not_definite = torch.block_diag(NOT_DEFINITE, torch.eye(62))
    blob = tg.quantise_to_fit(s, tg.World(), run, weights, tg.Curvature({
        bad: not_definite, worse: torch.full((64, 64), torch.nan)}, {worse: torch.full((128,), torch.inf)}))
    assert set(tg.read_artifact(s, blob, "it").weights) == set(weights)
    told = [values for event, values in run.events if event == "curvature"]
    assert [x["matrices"] for x in told] == [[bad], [worse]]
    assert "damping 1 instead of 0.01" in told[0]["used"] and "not finite" in told[1]["used"]


# ---- degenerate weights


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_rows_without_spread_are_stored_as_they_are(bits):
    """By hand: of a constant row the step is its value, of a zero row nothing."""
    w = torch.tensor([[0.25] * 8, [-3.0] * 8, [0.0] * 8, [1e-9] * 8])
    scale = tg.row_steps(w, bits, 12.85)
    order, u, dead, _ = tg.hessian_factor(torch.eye(8)[None])
    codes = tg.round_in_order(w[None], scale[None].float(), order, u, dead, 2 ** (bits - 1) - 1)[0]
    assert torch.equal(codes * scale[:, None].float(), torch.tensor([0.25, -3, 0, 0])[:, None].expand(4, 8))
    assert not codes[2:].any()


def test_what_is_beyond_half_precision_is_its_largest_number():
    """Steps and small tensors alike: an infinity would be refused by the artifact's reader."""
    huge = torch.tensor([[1e30, -1e30], [1.0, 2.0]])
    stored = [tg.to_half(huge), tg.row_scales(huge, 6, 1e9)]
    stored += [*tg.quantise_rows(huge), *tg.lqer_asym(huge, huge, 2)]
    assert all(x.isfinite().all() for x in stored)
    assert tg.to_half(huge)[0].tolist() == [65504, -65504]
    assert torch.equal(tg.to_half(huge)[1], huge[1].half())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc.weight", "skip_weights"])      # codes, float16
def test_weights_that_are_not_finite_are_named(name, value):
    s = settings()
    weights = tg.matrix_views({n: p.detach() for n, p in sine_model(s).named_parameters()})
    weights[name].view(-1)[3] = value
    with pytest.raises(tg.UserError, match=f"^1 of .* weights of {name} are not finite: .* MATRIX_LR"):
        tg.Quantiser(s, weights, tg.Curvature({}))


def test_fits_of_degenerate_models_end_well():
    """Within the limit and read back bit for bit, or refused because no step would do."""
    ends = fault_fits.fits(8, seed=6)
    assert not set(ends) - {"fitted", "refused", "short"} and ends["fitted"] > 4, ends


@pytest.mark.parametrize("seed", [28, 82])
def test_a_fit_whose_estimate_is_no_guide_ends_within_the_limit(seed):
    """28: the size jumps where the steps first fit, and finer ones fit again. 82: low-rank repairs of
    everything, and the file hardly shrinks until the steps are huge."""
    assert fault_fits.one_fit(seed) == "fitted"


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_low_rank_is_the_best_approximation(shape):
    e = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a, b = tg.low_rank(e, 4)
    best = torch.linalg.svdvals(e)[4:].norm()
    assert torch.allclose((e - a @ b).norm(), best, rtol=1e-4)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_sign_of_a_repair_is_a_rule_not_lapacks_choice(monkeypatch, shape):
    """Whichever signs the eigenvectors come with, the same factors are stored."""
    s, e = settings(LQER_ASYM_GROUP=8), torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weights = tg.matrix_views({n: p.detach() for n, p in sine_model(s).named_parameters()})
    quantiser = tg.Quantiser(s, weights, tg.Curvature({}))
    real, stored = torch.linalg.eigh, []
    for sign in (1, -1):
        def eigh(gram, sign=sign):
            values, vectors = real(gram)
            return torch.return_types.linalg_eigh((values, sign * vectors))
        monkeypatch.setattr(torch.linalg, "eigh", eigh)
        form, tensors = quantiser.pack_factors(*tg.low_rank(e, 4))
        stored.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(*stored, strict=True))
    assert (e - tg.STORAGE[form].restore(0.0, 1.0, *tensors)).norm() < e.norm()


def test_each_pair_of_factors_gets_the_sign_that_is_stored_better():
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(40, 4, generator=g), torch.randn(4, 24, generator=g)

    def errors(a, b):      # of every pair on its own
        x, y = tg.asym_values(*tg.lqer_asym(a, b, 8))
        return torch.stack([(a[:, [i]] @ b[[i]] - x[:, [i]] @ y[[i]]).norm() for i in range(4)])

    both = torch.stack((errors(a, b), errors(-a, -b)))
    signed = tg.asym_signs(a, b, 8)
    assert torch.allclose(errors(*signed), both.min(0).values) and both[0].ne(both[1]).any()
    assert torch.allclose(signed[0] @ signed[1], a @ b, atol=1e-5)


def quantised(monkeypatch, **changes):
    """The tiny model quantised with every matrix above the size limit, and its float weights."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s = settings(**changes)
    model = sine_model(s)
    x = torch.randint(4, 300, (1, 512), generator=torch.Generator().manual_seed(0))
    curvature = tg.calibrate(s, tg.World(), model, lambda: tg.Batch(x, x, None, 512))
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    quantiser = tg.Quantiser(s, weights, curvature)
    six_bits = quantiser.deviations.sum() * 6 / 8
    base_step = tg.base_step_for(quantiser.deviations, six_bits, quantiser.finest)
    return s, model, weights, quantiser(base_step)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(LQER_ASYM_ENABLED=0),
        dict(QUANT_TRELLIS=0),
        dict(QUANT_ALLOCATION="hand"),
        dict(TIE_EMBEDDINGS=0),
        dict(GATED_ATTN_QUANT_GATE=0),
    ],
)
def test_the_model_there_and_back(monkeypatch, changes):
    s, model, weights, q = quantised(monkeypatch, **changes)
    back = tg.dequantise(q)
    assert set(back) == set(weights)
    for name, w in weights.items():
        if q.forms[name] in ("gptq (fisher)", "gptq (trellis)"):
            continue  # what matters little may be stored as coarsely as it likes: the loss below tells
        bound = 0.16 if "gptq" in q.forms[name] else 0.01 if "gate" in q.forms[name] else 1e-3
        assert (back[name] - w).norm() <= bound * w.norm() + 1e-6, name
    other = tg.GPT(s)
    tg.load_weights(other, back, "test")
    x = torch.randint(4, 300, (1, 64), generator=torch.Generator().manual_seed(1))
    plan = tg.layer_plan(s, True)
    a, b = (m.losses(x, x.roll(-1, 1), plan).mean() for m in (model, other))
    assert (a - b).abs() < 0.1


def test_low_rank_repair_lowers_the_error_of_the_worst(monkeypatch):
    _, _, weights, plain = quantised(monkeypatch, LQER_ENABLED=0, QUANT_ALLOCATION="hand")
    _, _, _, repaired = quantised(monkeypatch, LQER_ENABLED=1, LQER_TOP_K=2, QUANT_ALLOCATION="hand")
    names = [n for n, form in repaired.forms.items() if "lqer" in form]
    assert len(names) == 2
    for n in names:
        a, b = ((tg.dequantise(q)[n] - weights[n]).norm() for q in (plain, repaired))
        assert b < a


def test_hessians_are_summed_over_visits_and_divided_by_batches():
    s = settings(GPTQ_CALIBRATION_BATCHES=3)
    model, x = sine_model(s), torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    batch = tg.Batch(x, x, None, 40)
    inputs = {}
    model.final_hidden(
        x, tg.layer_plan(s, True), hook=lambda kind, i, v: inputs.setdefault((kind, i), []).append(v[0])
    )
    h = tg.calibrate(s, tg.World(), model, lambda: batch).hessians
    visits = inputs["attn_in", 1]
    assert len(visits) == 2  # layer 1 is inside the loop
    assert torch.allclose(h["blocks.1.attn.c_q.weight"], sum(v.mT @ v for v in visits), rtol=1e-4, atol=1e-4)
    assert tg.input_of("blocks.1.attn.c_k.weight") == "blocks.1.attn.c_q.weight" in h


# ---- steps by curvature


def test_every_code_has_the_same_slope(monkeypatch):
    """step^2 g_row d_col is one constant over all matrices, up to the rounding of both steps."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s, g = settings(), torch.Generator().manual_seed(0)
    weights = tg.matrix_views({n: p.detach() for n, p in sine_model(s).named_parameters()})
    names = [n for n, w in weights.items() if tg.precision_of(s, n, w).coded]
    fisher = {n: (0.1 + torch.rand(len(weights[n]), generator=g)) * 2.0**i for i, n in enumerate(names)}
    hessians = {
        n: problem(columns=weights[n].size(1), seed=i)[1] * 2.0 ** (i % 5)
        for i, n in enumerate(names)
        if tg.input_of(n) == n
    }
    quantiser = tg.Quantiser(s, weights, tg.Curvature(hessians, fisher))
    constants = []
    for n in names:
        d = tg.hessian_factor(hessians[tg.input_of(n)][None])[3][0] ** -2
        rows, columns = (tg.octaves(quantiser.steps[k]) for k in (n + ".row", tg.input_of(n) + ".col"))
        constants.append(((rows[:, None] * columns) ** 2 * fisher[n][:, None] * d).log2().flatten())
    spread = torch.cat(constants)
    assert spread.max() - spread.min() < 2 * 2 / 8 + 0.01  # two factors, squared, each within 1/16 octave
    assert sum(n + ".col" in quantiser.steps for n in names) == len({tg.input_of(n) for n in names})


def test_fisher_is_the_expected_square_of_the_gradient():
    """At one matrix's output, against gradients of single tokens' losses at many drawn labels."""
    s = settings(QUANT_ALLOCATION="fisher")
    model, x = sine_model(s), torch.randint(4, 300, (1, 10), generator=torch.Generator().manual_seed(0))
    plan, draws = tg.layer_plan(s, True), 60
    model.tok_emb.data *= 4
    hook, generator = tg.HessianHook(s), torch.Generator().manual_seed(1)
    for _ in range(draws):
        hook.add_squares(model, x, model.final_hidden(x, plan, hook=hook), generator)
        hook.batches += 1
    fisher = hook.finish().fisher
    seen = []

    def hook_of_mlp(kind, layer, v):
        if kind == "mlp_out" and layer == 0:
            seen.append(v)

    hidden = model.final_hidden(x, plan, hook=hook_of_mlp)
    p = model.logits(hidden)[0].log_softmax(-1)
    want = torch.zeros(64)
    for t in range(10):
        for label in torch.multinomial(p[t].exp(), 25, replacement=True, generator=generator).tolist():
            want += torch.autograd.grad(p[t, label], seen, retain_graph=True)[0][0].square().sum(0) / 25
    got = fisher["blocks.0.mlp.proj.weight"] * 10
    assert torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.93
    assert got.sum() == pytest.approx(want.sum().item(), rel=0.25)
    assert fisher["tok_emb.weight"].shape == (300,) and (fisher["tok_emb.weight"] > 0).all()


def embedding_times_three(patch):
    """A mechanism that this script does not have."""
    real = tg.GPT.embed
    patch.setattr(tg.GPT, "embed", lambda *args: 3 * real(*args))


MECHANISMS = [
    {}, dict(SMEAR_GATE_ENABLED=0), dict(SMEAR_GATE_KIND="channels"),
    dict(VE_ENABLED=1, VE_LAYERS="1,3", VE_DIM=16), dict(BIGRAM_VOCAB_SIZE=40, BIGRAM_DIM=16),
    dict(BIGRAM_VOCAB_SIZE=40, BIGRAM_DIM=64, SMEAR_GATE_KIND="channels"),
    dict(LOGIT_SOFTCAP=2), dict(ASYM_LOGIT_RESCALE=1), dict(LN_SCALE=0, SKIP_GATES_ENABLED=0),
    dict(PARALLEL_LANES="separate"), dict(PARALLEL_FINAL_LANE="attn"), dict(PARALLEL_FINAL_LANE="mlp"),
    dict(NUM_LAYERS=1, NUM_LOOPS=0, PARALLEL_START_LAYER=0, XSA_LAST_N=0), embedding_times_three]


@pytest.mark.parametrize("mechanism, tied", [
    *((m, 0) for m in MECHANISMS), ({}, 1), (dict(ASYM_LOGIT_RESCALE=1), 1), (embedding_times_three, 1)],
    ids=lambda value: getattr(value, "__name__", str(value)))
def test_sensitivities_of_embedding_and_head_are_autograds(mechanism, tied, monkeypatch):
    """For every mechanism between a looked-up row and the loss: what a row costs where it is read, against
    the gradient of the same drawn labels (every token occurs once, so that a row's is a place's), and where
    it is written, against the expectation over all labels."""
    changes = mechanism if isinstance(mechanism, dict) else {}
    if not isinstance(mechanism, dict):
        mechanism(monkeypatch)
    s = settings(QUANT_ALLOCATION="fisher", TIE_EMBEDDINGS=tied, VOCAB_SIZE=100, **changes)
    model, x, hook = sine_model(s), torch.arange(20, 100, 6)[None], tg.HessianHook(s)
    if s.asym_logit_rescale:
        model.softcap_pos.data.fill_(1.5)
        model.softcap_neg.data.fill_(0.7)
    plan = tg.layer_plan(s, True)
    hidden = model.final_hidden(x, plan, hook=hook)
    hook.add_squares(model, x, hidden, torch.Generator().manual_seed(0))
    hook.batches = 1
    curvature = hook.finish()

    hidden = model.final_hidden(x, plan)
    head = (model.tok_emb if tied else model.lm_head).detach()
    z = (hidden[0] @ head.T).detach().requires_grad_()
    monkeypatch.setattr(model, "raw_logits", lambda hidden, adapter=None: hidden)
    log_p = model.logits(z).log_softmax(-1)
    drawn = torch.rand(len(z), 1, generator=torch.Generator().manual_seed(0))
    label = torch.searchsorted(log_p.exp().cumsum(1), drawn)
    d_z = torch.autograd.grad(log_p.gather(1, label).sum(), z, retain_graph=True)[0]
    read = torch.autograd.grad(hidden, model.tok_emb, (d_z @ head)[None])[0].square().mean(1)
    written = torch.zeros(100)
    for i in range(100):      # d log p_i / dz at all places at once
        d_z = torch.autograd.grad(log_p[:, i].sum(), z, retain_graph=True)[0]
        written += (log_p[:, i, None].exp() * d_z.square()).sum(0).detach() / len(z)

    def same(got, want):
        assert (got - want).abs().max() < 1e-3 * want.max() and (read > 0).sum() == len(z)

    if tied:      # both in one: the Hessian's diagonal takes the mean cost of reading along
        h = hidden.detach().square().sum((0, 1)).mean()
        same(curvature.fisher["tok_emb.weight"], (written * h + read) / (h + read.mean() / written.mean()))
    else:
        same(curvature.fisher["tok_emb.weight"], read)
        same(curvature.fisher["lm_head.weight"], written)


@pytest.mark.parametrize("packed", [True, False])
def test_calibration_in_pieces_is_calibration_of_the_whole(monkeypatch, packed):
    """Packed rows are cut at documents, others by rows: Hessians and Fisher are those of one pass."""
    s = settings(QUANT_ALLOCATION="fisher", GPTQ_CALIBRATION_BATCHES=2, TRAIN_SEQ_LEN=32)
    model, rng = sine_model(s), np.random.default_rng(0)
    tokens = rng.integers(4, 300, 257).astype(np.uint16)
    tokens[[0, 20, 45, 70, 90, 150, 200]] = tg.BOS
    batch = tg.packed_batch(tokens, 32)
    if not packed:
        x = batch.x[:, :256].view(8, 32)
        batch = tg.Batch(x, x, None, 32)
    found = []
    for most in (10_000, 64):
        monkeypatch.setattr(tg, "CALIBRATION_TOKENS", most)
        parts = [part.x.numel() for part in tg.pieces(batch, most)]
        assert sum(parts) == 256 and max(parts) <= most and (len(parts) == 1) == (most > 256)
        found.append(tg.calibrate(s, tg.World(), model, lambda: batch))
    for whole, parts in zip(*((c.hessians, c.fisher) for c in found), strict=True):
        for name, x in whole.items():
            assert (parts[name] - x).abs().max() <= 3e-6 * x.abs().max(), name  # float32, other positions


def test_a_document_longer_than_a_piece_is_cut_at_its_segments():
    tokens = np.full(401, 7, np.uint16)
    tokens[[0, 30, 350]] = tg.BOS
    parts = list(tg.pieces(tg.packed_batch(tokens, 32), 100))
    assert [part.x.size(1) for part in parts] == [30, 96, 96, 96, 82]
    for part in parts:
        assert part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == part.x.size(1)


# ---- kinds of matrices, measured


def random_batch(seed: int) -> tg.Batch:
    x = torch.randint(4, 96, (4, 64), generator=torch.Generator().manual_seed(seed))
    return tg.Batch(x, x, None, 64)


def matrices_of(model) -> dict:
    return tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})


def wrong_curvature(monkeypatch, **changes):
    """(settings, curvature) of a tiny sine_model without room for its finest codes; the curvature thinks far
    too much of an MLP's first matrix, and that the errors of an attention's output rows all add up."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 500)
    s = settings(**fault_fits.SMALL, GPTQ_CALIBRATION_BATCHES=1, **changes)
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", tg.code_bytes(tg.shipped_form(s)))
    curvature = tg.calibrate(s, tg.World(), sine_model(s), lambda: random_batch(0))
    for name, g in curvature.outputs.items():
        assert torch.allclose(g.diagonal(), curvature.fisher[name], rtol=1e-4)
    for name, g in (*curvature.fisher.items(), *curvature.outputs.items()):
        if name.endswith("mlp.fc.weight"):
            g *= 256
    for name, g in curvature.outputs.items():
        if name.endswith("attn.proj.weight"):
            alike = torch.outer(g.diagonal().sqrt(), g.diagonal().sqrt())
            g.copy_(0.1 * g.diagonal().diag() + 0.9 * alike)
    return s, curvature


def measured_model(monkeypatch):
    """(quantiser, measure) of wrong_curvature's model."""
    s, curvature = wrong_curvature(monkeypatch)
    model, seeds = sine_model(s), iter(range(1, 99))
    measure = tg.Measure.of(s, tg.World(), model, lambda: random_batch(next(seeds)))
    return tg.Quantiser(s, matrices_of(model), curvature), measure


def test_kinds_are_planned_by_what_they_do_to_predictions(monkeypatch):
    quantiser, measure = measured_model(monkeypatch)
    before = {n: w.clone() for n, w in quantiser.weights.items()}
    size = quantiser.deviations.sum() * 3 / 8
    found = tg.plan_by_measure(quantiser, measure, size)
    assert all(torch.equal(w, before[n]) for n, w in quantiser.weights.items())
    assert found["used"] and found["kl_after"] < 0.8 * found["kl_before"], found
    assert found["levels"]["mlp.fc.weight"] == min(found["levels"].values()) < 0.3
    assert found["in_turns"] == list(quantiser.in_turns)
    assert found["in_turns"] and "attn.proj.weight" not in found["in_turns"]      # it would lose by them
    # a sketch is what the file holds, but for the trellis
    assert measure.kl(tg.dequantise(quantiser(1e-4)), 1) < 1e-3 * found["kl_after"]


def test_a_plan_that_does_not_win_is_dropped(monkeypatch):
    quantiser, measure = measured_model(monkeypatch)
    steps, size = quantiser.steps, quantiser.deviations.sum() * 3 / 8
    real, judged = measure.kl, iter((1.0, 1.5))
    monkeypatch.setattr(measure, "kl", lambda w, text: next(judged) if text else real(w, text))
    found = tg.plan_by_measure(quantiser, measure, size)
    assert not found["used"] and (found["kl_before"], found["kl_after"]) == (1.0, 1.5)
    assert all(torch.equal(x, steps[key]) for key, x in quantiser.steps.items()) and not quantiser.in_turns


def test_with_room_for_everything_nothing_is_measured(monkeypatch):
    quantiser, measure = measured_model(monkeypatch)
    off = tg.dataclasses.replace(quantiser.s, quant_measured=False)
    assert tg.Measure.wanted(quantiser.s) and not tg.Measure.wanted(off)
    assert "finest" in tg.plan_by_measure(quantiser, measure, 1e9)["why"]
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", 16_000_000)
    s = quantiser.s
    assert tg.Measure.of(s, tg.World(), sine_model(s), None) is None
    assert not tg.calibrate(s, tg.World(), sine_model(s), lambda: random_batch(0)).outputs


@pytest.mark.parametrize("why", ["131 rows", "G that is not finite"])
def test_only_kinds_that_can_take_turns_are_tried_in_turns(monkeypatch, why):
    kind = "mlp.fc.weight"
    s, curvature = wrong_curvature(monkeypatch, MLP_MULT=4.1 if why == "131 rows" else 4)
    of_kind = [g for n, g in curvature.outputs.items() if tg.kind_of(n) == kind]
    assert bool(of_kind) == (s.hidden_dim % tg.ROW_TURNS == 0)      # else none is summed
    for g in of_kind:
        g[0, 1] = torch.nan
    model, seeds, falling = sine_model(s), iter(range(1, 99)), iter(range(99, 0, -1))
    measure = tg.Measure.of(s, tg.World(), model, lambda: random_batch(next(seeds)))
    monkeypatch.setattr(measure, "kl", lambda weights, text: next(falling))      # whatever is tried is kept
    quantiser = tg.Quantiser(s, matrices_of(model), curvature)
    found = tg.plan_by_measure(quantiser, measure, quantiser.deviations.sum() * 3 / 8)
    others = {tg.kind_of(n) for n in curvature.outputs} - {kind}
    assert found["in_turns"] == sorted(others) and len(others) == 5
    assert {tg.kind_of(n) for n in quantiser.names if quantiser.takes_turns(n)} == others


def test_kinds_in_turns_keep_their_share_of_the_bytes(monkeypatch):
    """The mean logarithm of a kind's sensitivities, and with it of its steps, is that of rows alone."""
    s, curvature = wrong_curvature(monkeypatch)
    feedback = tg.Quantiser(s, matrices_of(sine_model(s)), curvature).feedback
    kinds = tg.names_by(tg.kind_of, feedback)
    assert len(kinds) == 6
    for names in kinds.values():
        alone = torch.cat([curvature.fisher[n] for n in names]).log2()
        in_turns = torch.cat([feedback[n].sensitivity for n in names]).log2()
        assert in_turns.mean().item() == pytest.approx(alone.mean().item(), abs=1e-3)
        assert (in_turns - alone).abs().max() > 0.1


def test_a_run_without_room_rehearses_all_kinds_in_turns_and_logs_them(monkeypatch, data, tmp_path):
    monkeypatch.setattr(tg, "SMALL_TENSOR", 500)
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", tg.code_bytes("readable") + tg.MARK_BYTES + 16_000)
    tiny = {**fault_fits.SMALL, "VOCAB_SIZE": 300, "FIT_MARGIN_BYTES": 1000, "TRAIN_BATCH_TOKENS": 128,
            "ITERATIONS": 1, "WARMUP_STEPS": 0, "CODE_FORM": "readable", "QUANTIZE_ONLY": 1}
    s = settings(DATA_PATH=data, ARTIFACT_DIR=tmp_path, **tiny)
    walked, rehearsed = [], []      # shapes of matrices in turns on the trellis

    def in_turns(w, *args, real=tg.round_in_turns):
        walked.extend(len(w) * [w.shape[1:]] * args[-1])
        return real(w, *args)

    def rehearse(*args, real=tg.rehearse):
        seconds = real(*args)
        rehearsed.extend(walked)
        return seconds

    monkeypatch.setattr(tg, "round_in_turns", in_turns)
    monkeypatch.setattr(tg, "rehearse", rehearse)
    run, model = tg.Run(s, tg.World()), tg.build_model(s, tg.World())
    with without("run_probes"):
        tg.make_artifact(s, tg.World(), run, model, None)
    run.close()
    inner = [w.shape for n, w in matrices_of(model).items()
             if n.startswith("blocks") and tg.precision_of(s, n, w).coded]
    assert sorted(rehearsed) == sorted(inner)
    (found,) = events(tmp_path, "kinds")
    assert found["used"] == (found["kl_after"] < found["kl_before"])
    assert bool(found["used"] and found["in_turns"]) == (len(walked) > len(rehearsed))


def in_ranks(count: int, work, folder) -> list:
    """[work(world) of rank 0, of rank 1, …], each in a process of its own."""
    def rank(number: int) -> None:
        torch.set_num_threads(1)      # a fork's OpenMP has lost its threads
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=count)
        torch.save(work(tg.World(number, count)), folder / f"{number}.pt")
        dist.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank, args=(number,), daemon=True) for number in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)      # a fork beside torch's threads
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"{number}.pt") for number in range(count)]


def test_ranks_measure_kinds_together(monkeypatch, tmp_path):
    """Two write the artifact that one does, from a plan by the same KL of the same text. A kind of 131 rows
    takes no turns."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    s, curvature = wrong_curvature(monkeypatch, QUANT_TRELLIS=0, MLP_MULT=4.1)
    batches = [random_batch(seed) for seed in range(1, 17)]

    def artifact(world):
        own, model = iter(batches[world.rank::world.size]), sine_model(s)
        measure = tg.Measure.of(s, world, model, lambda: next(own))
        quantiser = tg.Quantiser(s, matrices_of(model), curvature, world)
        found = tg.plan_by_measure(quantiser, measure, 12_000)
        return found, tg.quantise_once(Log(), quantiser, 0.04)

    one, two = artifact(tg.World()), in_ranks(2, artifact, tmp_path)
    assert one[0]["used"] and one[0]["in_turns"] and "mlp.fc.weight" not in one[0]["in_turns"]
    assert two == [one, one]
