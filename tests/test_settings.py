"""Settings: names, bounds, contradictions, and the command of the record that the defaults follow."""

import pytest
from conftest import settings, tg

# The run command of the record that the defaults follow, as its authors published it.
RECORD_COMMAND = """
VOCAB_SIZE=8192 CASEOPS_ENABLED=1 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1
PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=3 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1
MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0 EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48
WARMUP_STEPS=20 MUON_BACKEND_STEPS=5 GLOBAL_TTT_MOMENTUM=0.9 WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99
TTT_WEIGHT_DECAY=0.5 TTT_LORA_RANK=80 SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5
GPTQ_CALIBRATION_BATCHES=16 VAL_LOSS_EVERY=0 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1
GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4
LQER_ASYM_GROUP=64 LQER_TOP_K=3 FUSED_CE_ENABLED=1 COMPRESSOR=pergroup NCCL_NET=Socket
"""


def test_the_records_command_works_verbatim_and_equals_the_defaults():
    s = tg.Settings.from_env(dict(pair.split("=") for pair in RECORD_COMMAND.split()))
    # ours is measured, so that nothing ends after 600 s; and steps set by curvature need no repair
    assert s.changed() == {"GPTQ_RESERVE_SECONDS": "0.5", "LQER_ENABLED": True}


@pytest.mark.parametrize("asked, budget, rehearsed, kept, words", [
    ("auto", 600, 20.0, 20.0, ""),
    ("auto", 30, 20.0, 15.0, "for MAX_WALLCLOCK_SECONDS=30 is less"),
    ("0.5", 600, 20.0, 20.0, "not GPTQ_RESERVE_SECONDS=0.5"),
    ("0", 600, 20.0, 20.0, "not GPTQ_RESERVE_SECONDS=0"),
    ("50", 600, 20.0, 50.0, ""),
    ("18", 30, 20.0, 18.0, "18.0 s are kept, for MAX_WALLCLOCK_SECONDS=30 is less"),
    ("0.5", 0, 20.0, 0.0, ""),
])
def test_what_packing_needs_is_kept_whatever_is_asked_for(asked, budget, rehearsed, kept, words):
    s = tg.Settings.from_env({"GPTQ_RESERVE_SECONDS": asked, "MAX_WALLCLOCK_SECONDS": str(budget)})
    seconds, warning = tg.reserved(s, rehearsed)
    assert seconds == kept and words in warning and bool(words) == bool(warning)


def test_a_mask_leaves_adapters_out_unless_they_are_named():
    s = tg.Settings.from_env({"TTT_MASK": "no_qv", "TTT_V_LORA": "1"})
    assert s.changed() == {"TTT_Q_LORA": False}


def test_full_size_model_has_the_published_parameters():
    assert sum(map(tg.math.prod, tg.GPT.shapes(tg.Settings()).values())) == 35_945_671
    assert tg.layer_plan(tg.Settings(), True) == ((0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10))


@pytest.mark.parametrize(
    "env, words",
    [
        ({"ITERATOINS": "5"}, ["ITERATOINS", "ITERATIONS"]),
        ({"TTT_LORA_RANKS": "5"}, ["TTT_LORA_RANKS", "TTT_LORA_RANK"]),
        ({"MATRIX_RATE": "5"}, ["MATRIX_RATE", "MATRIX_"]),
        ({"MODEL_DIM": "510"}, ["MODEL_DIM=510", "NUM_HEADS=8", "multiple of 8"]),
        ({"NUM_KV_HEADS": "3"}, ["NUM_KV_HEADS=3", "NUM_HEADS=8"]),
        ({"LOOP_END": "11"}, ["LOOP_END=11", "NUM_LAYERS=11"]),
        ({"ROPE_DIMS": "128"}, ["ROPE_DIMS=128", "64"]),
        ({"BETA2": "1.5"}, ["BETA2=1.5", "0.999999"]),
        ({"SEED": "-1"}, ["SEED=-1", "at least 0"]),
        ({"SEED": "1.5"}, ["SEED=1.5", "whole number"]),
        ({"MATRIX_LR": "fast"}, ["MATRIX_LR=fast", "number"]),
        ({"MATRIX_LR": "nan"}, ["MATRIX_LR=nan", "number"]),
        ({"TIE_EMBEDDINGS": "yes"}, ["TIE_EMBEDDINGS=yes", "0 or 1"]),
        ({"GATED_ATTN_ENABLED": "1"}, ["SPARSE_ATTN_GATE_ENABLED", "GATED_ATTN_ENABLED"]),
        ({"EVAL_STRIDE": "4096"}, ["EVAL_STRIDE=4096", "EVAL_SEQ_LEN=2048"]),
        ({"TTT_CHUNK_SIZE": "4096"}, ["TTT_CHUNK_SIZE=4096", "TTT_EVAL_SEQ_LEN=2048"]),
        ({"GPTQ_RESERVE_SECONDS": "600"}, ["GPTQ_RESERVE_SECONDS=600", "MAX_WALLCLOCK_SECONDS=600"]),
        ({"GPTQ_RESERVE_MS": "soon"}, ["GPTQ_RESERVE_MS=soon", "number"]),
        ({"QUANT_CLIP_RANGE": "-5"}, ["QUANT_CLIP_RANGE=-5", "whole number"]),
        ({"VE_ENABLED": "1", "VE_LAYERS": "²"}, ["VE_LAYERS=²", "below NUM_LAYERS=11"]),
        ({"VE_ENABLED": "1", "VE_LAYERS": "9,9"}, ["VE_LAYERS=9,9", "each once"]),
        ({"TTT_SHORT_SCORE_FIRST_STEPS": "²:8"}, ["TTT_SHORT_SCORE_FIRST_STEPS=²:8", "256:8"]),
        ({"TTT_MASK": "no_k"}, ["TTT_MASK=no_k", "no_qv"]),
        ({"TTT_EVAL_ONLY": "1"}, ["TTT_EVAL_ONLY=1", "EVAL_ONLY_QUANTIZED_PATH"]),
        ({"NUM_LOOPS": "500"}, ["NUM_LOOPS=500", "1511 executed layers", "1024"]),
        ({"MODEL_DIM": "65536", "MLP_MULT": "256"}, ["MODEL_DIM=65536", "weights", "2,147,483,648"]),
        ({"QUANTIZE_ONLY": "1", "PREQUANT_ONLY": "1"}, ["QUANTIZE_ONLY=1", "PREQUANT_ONLY=1", "keep one"]),
        ({"RESUME": "1"}, ["RESUME=1", "MAX_WALLCLOCK_SECONDS=600", "EVAL_ONLY_PATH"]),
        ({"CHECKPOINT_EVERY_SECONDS": "60"}, ["CHECKPOINT_EVERY_SECONDS=60", "MAX_WALLCLOCK_SECONDS=600"]),
        ({"TTT_SHARED_A": "0"}, ["TTT_SHARED_A=0", "TTT_WARM_START_A=0", "TTT_DOC_ORDER=length"]),
        ({"TTT_CACHE_LAMBDA": "0.5", "TTT_KV_REUSE": "0"}, ["TTT_CACHE_LAMBDA=0.5", "TTT_KV_REUSE=0"]),
        ({"TRAIN_SEQ_SCHEDULE": "512@0.5"}, ["TRAIN_SEQ_LEN=2048", "TRAIN_SEQ_SCHEDULE=512@0.5", "512,"]),
        ({"AWQ_LITE_ENABLED": "1", "QUANT_ALLOCATION": "fisher"}, ["AWQ_LITE_ENABLED=1", "=hand"]),
        ({"NGRAM_TILT_ENABLED": "1", "TOKEN_THRESHOLD": "2"}, ["TOKEN_THRESHOLD", "at most 1"]),
        ({"TRAIN_SEQ_SCHEDULE_MODE": "step"}, ["TRAIN_SEQ_SCHEDULE_MODE=step", "only wallclock"]),
    ],
)
def test_bad_settings_name_value_bound_and_remedy(env, words):
    with pytest.raises(tg.UserError) as caught:
        tg.Settings.from_env(env)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "NCCL_NET", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR", "RANK", "LANG"]
)
def test_other_programs_variables_pass(name):
    assert tg.Settings.from_env({name: "x"}) == tg.Settings()


@pytest.mark.parametrize("name", "TOKEN_TAU LOOP_PASSES QUANT_BITS EVAL_TAIL HEAD_WD".split())
def test_names_that_begin_like_ours_are_refused(name):
    with pytest.raises(tg.UserError, match=f"unknown setting {name}: the nearest known one is "):
        tg.Settings.from_env({name: "1"})


def test_empty_values_change_nothing():
    every = {f.name.upper(): "" for f in tg.fields(tg.Settings) if not tg.is_free_text(f)}
    assert tg.Settings.from_env(every) == tg.Settings()
    assert tg.Settings.from_env({"TTT_MASK": "no_q", "TTT_Q_LORA": ""}).changed() == {"TTT_Q_LORA": False}
    assert tg.Settings.from_env({"TTT_SHORT_SCORE_FIRST_STEPS": ""}).ttt_short_score_first_steps == ""


def test_embeddings_are_as_wide_as_the_model():
    tg.Settings.from_env({"MODEL_DIM": "256", "EMBEDDING_DIM": "256"})
    with pytest.raises(tg.UserError, match="EMBEDDING_DIM=512"):
        tg.Settings.from_env({"MODEL_DIM": "256", "EMBEDDING_DIM": "512"})


@pytest.mark.parametrize(
    "value, shown", [(1e-7, "1e-07"), (0.00045, "0.00045"), (3.2852334, "3.285233"), (0.0, "0")]
)
def test_the_log_shows_small_numbers_as_they_are(value, shown):
    assert tg.human(value) == shown


def test_batch_must_divide_and_says_how():
    with pytest.raises(tg.UserError, match="TRAIN_BATCH_TOKENS=1000 is not divisible by 3 ranks"):
        settings(TRAIN_BATCH_TOKENS=1000).batch_shape(3)
    with pytest.raises(tg.UserError, match="multiple of 64"):
        settings(TRAIN_BATCH_TOKENS=100, TRAIN_LOADER="shuffled").batch_shape(1)
    assert tg.Settings().batch_shape(8) == (1, 98304)
    assert tg.Settings().batch_shape(1) == (8, 98304)


def test_help_lists_every_setting(capsys):
    assert tg.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {f.name.upper()} " in shown for f in tg.fields(tg.Settings))
