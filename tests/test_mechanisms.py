"""Mechanisms of the published systems that are off by default: each does what it says, whatever is on."""

import numpy as np
import pytest
import torch
from conftest import documents, run_script, settings, sine_model, summary, tg, write_shard
from conftest import environment as environment_of

TABLES = dict(
    BIGRAM_VOCAB_SIZE=50, BIGRAM_DIM=12, VE_ENABLED=1, VE_DIM=10, VE_LAYERS="1,3", SMEAR_GATE_KIND="channels"
)
LANES = dict(PARALLEL_LANES="separate", PARALLEL_START_LAYER=2, SKIP_ROWS="physical")
CASES = (
    TABLES,
    {**TABLES, "SMEAR_GATE_BOS_FIX": 0, "BIGRAM_DIM": 64, "VE_DIM": 32},
    {**LANES, "SKIP_INTO_LANES": 0},
    {**LANES, "ASYM_LOGIT_RESCALE": 1, "NEGATIVE_SLOPE": 0.3},
)


def tokens(rows, count, seed=0):
    return torch.randint(4, 300, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", CASES)
def test_scored_segments_know_nothing_of_their_neighbours(changes):
    s = settings(**changes)
    model, plan, x = sine_model(s), tg.layer_plan(s, True), tokens(1, 48)
    y, cuts = x.roll(-1, 1), (0, 17, 40, 48)
    layout = tg.Layout(torch.tensor([*cuts, 48], dtype=torch.int32), 23, isolate=True)
    with torch.no_grad():
        packed = model.losses(x, y, plan, layout)
        alone = [model.losses(x[:, a:b], y[:, a:b], plan) for a, b in zip(cuts, cuts[1:])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=2e-5)


@pytest.mark.parametrize("changes", CASES)
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


@pytest.mark.parametrize("changes", CASES)
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


def test_report_names_what_no_gradient_reached():
    s = settings(**LANES, SKIP_INTO_LANES=0, NUM_LOOPS=0)
    trainer, _ = train_steps(s)
    idle = dict(entry.partition(" ")[::2] for entry in trainer.optimiser.never_trained())
    assert idle["skip_weights"] == idle["skip_gates"] == "1 of 2 rows, the first [1]"
    assert not {"qo_bank", "kv_bank", "resid_mix", "lane_merge"} & set(idle)


def test_report_names_what_no_optimiser_has():
    trainer, _ = train_steps(settings(ASYM_LOGIT_RESCALE=1))
    assert {"softcap_pos", "softcap_neg"} <= set(trainer.optimiser.never_trained())


def test_soft_rounding_is_for_training_only_and_gets_sharper():
    s = settings(**TABLES, LATE_QAT_THRESHOLD=0.5, LATE_QAT_MIN_STEP=2)
    model, x, plan = sine_model(s), tokens(1, 20), tg.layer_plan(s, True)
    plain = model.losses(x, x.roll(-1, 1), plan)
    model.sharpness = torch.tensor(1.0)
    soft = model.losses(x, x.roll(-1, 1), plan, training=True)
    assert not torch.allclose(plain, soft, atol=1e-4)
    trainer = tg.Trainer(s, tg.World(), model)
    got = [trainer.sharpness_after(k, lr) for k, lr in ((1, 0.1), (2, 0.6), (3, 0.4), (4, 0.9), (600, 0.9))]
    assert got[:3] == [None, None, 1.0] and 1 < got[3] < got[4] == 16


def test_batches_read_ahead_are_cut_anew_and_nothing_is_lost(tmp_path):
    shard = write_shard(tmp_path / "fineweb_train_000000.bin", documents(60, 0))

    def stream(cut):
        return tg.TokenStream([shard], world_size=1, rank=0, tokens=128, max_len=cut)

    ahead, steady = tg.Prefetch(stream(16), torch.device("cpu")), {cut: stream(cut) for cut in (16, 64)}
    try:
        for k in range(9):
            cut = 16 if k < 4 else 64
            got, want = ahead.next(cut), {c: s.next() for c, s in steady.items()}[cut]
            assert torch.equal(got.x, want.x) and torch.equal(got.cu_seqlens, want.cu_seqlens)
            assert got.cut == cut and got.layout(got.cut).max_seqlen == cut
    finally:
        ahead.close()


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(TRAIN_SEQ_SCHEDULE="16@0.5,32@1"), "TRAIN_SEQ_LEN=64 is not 32, the longest stage"),
        (dict(TRAIN_SEQ_SCHEDULE="64"), "must be value@progress"),
        (dict(TRAIN_SEQ_SCHEDULE="64@1", TRAIN_LOADER="shuffled"), "windows of one length"),
        (dict(VE_ENABLED=1, VE_LAYERS="3,4"), "VE_LAYERS=3,4 must be layers below NUM_LAYERS=4"),
        (dict(BIGRAM_VOCAB_SIZE=1), "leaves no row"),
        (dict(SLOT_ENABLED=1), "SLOT_ENABLED=1 is not to be had"),
        (dict(WARMDOWN_ITERS=3500), "set WARMDOWN_FRAC"),
        (dict(RECUR_LAYERS="1,3"), "RECUR_LAYERS=1,3 must be consecutive"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(changes, text):
    with pytest.raises(tg.UserError, match=text):
        settings(**changes)


def test_old_names_stand_for_ours():
    s = tg.Settings.from_env(
        dict(RECUR_LAYERS="3,4", GPTQ_RESERVE_MS="9000", QUANT_CLIP_RANGE="15", SDCLIP_K="11", MUONEQ_R="0",
             MLP_CLIP_SIGMAS="9", SLOT_ENABLED="0", TTT_LORA_EMA_DECAY="0.0", GPTQ_CALIB_SAMPLES="8")
    )
    assert (s.loop_start, s.loop_end, s.num_loops) == (3, 4, 1)
    assert (s.gptq_reserve_seconds, s.matrix_bits, s.gptq_calibration_batches) == ("9.0", 5, 8)
    assert (s.matrix_clip_sigmas, s.mlp_clip_sigmas, s.muon_row_normalize) == (11, 9, False)


@pytest.mark.long
def test_one_and_two_ranks_agree_with_all_of_them(data, tmp_path):
    every = dict(
        TABLES, **LANES, ASYM_LOGIT_RESCALE=1, MATRIX_LR_EARLY=0.01, BANK_SPLIT=2,
        LATE_QAT_THRESHOLD=0.9, LATE_QAT_MIN_STEP=2, TRAIN_SEQ_SCHEDULE="16@0.4,64@1", RECUR_START_STEP=2,
        SEQ_CHANGE_WARMUP_STEPS=2, QUANTIZE_ONLY=1, TTT_ENABLED=0, MUON_DTYPE="float32", WARMUP_STEPS=0,
        GRAD_CLIP_NORM=0, AWQ_LITE_ENABLED=1,
    )
    weights = []
    for ranks in (1, 2):
        env = environment_of(data, **every, ARTIFACT_DIR=tmp_path / str(ranks), GRAD_ACCUM_STEPS=2 // ranks)
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        status, output = run_script(env, launcher=launcher if ranks > 1 else ())
        assert status == 0, output
        assert summary(tmp_path / str(ranks))["steps"] == 4
        weights.append(torch.load(tmp_path / str(ranks) / "final_model.pt", weights_only=True)["weights"])
    assert "bigram.embed.weight" in weights[0] and "softcap_pos" in weights[0]
    for name, one in weights[0].items():
        assert np.allclose(one, weights[1][name], atol=2e-4), name


def test_a_run_counts_the_form_of_the_script_that_it_names(data, tmp_path):
    few = dict(QUANTIZE_ONLY=1, TTT_ENABLED=0, ITERATIONS=1)
    status, output = run_script(environment_of(data, CODE_FORM="packed", ARTIFACT_DIR=tmp_path, **few))
    assert status == 0, output
    s = summary(tmp_path)
    assert s["code_form"] == "packed" and s["code_bytes"] == tg.code_bytes("packed")
    assert s["total_bytes"] == (tmp_path / "final_model.int6.ptz").stat().st_size + s["code_bytes"]
