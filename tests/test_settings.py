"""Settings: names, bounds, contradictions, the record's command, and configurations of published systems."""

import math
import os
import re

import pytest
import torch
from conftest import CONFIGS, ROOT, load_config, run_script, settings, tg

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


# --- reading the environment


def test_every_setting_is_bounded_on_both_sides():
    for f in tg.fields(tg.Settings):
        lo, hi = f.metadata["lo"], f.metadata["hi"]
        if type(f.default) in (int, float):
            assert lo <= f.default <= hi < 2**64, f.name
        elif type(f.default) is str:
            assert f.metadata["choices"] or hi, f.name


@pytest.mark.parametrize("text, number", [
    ("9007199254740993", 9007199254740993), ("1e3", 1000), (" 7 ", 7), ("+7", 7), ("007", 7), ("1_000", 1000),
    ("2.0", 2), ("1.5", None), ("", None), ("7x", None), ("nan", None), ("1e400", None), ("9" * 5000, None),
])
def test_whole_numbers_are_read_as_they_are(text, number):
    assert tg.whole_number(text) == number


def test_a_seed_is_kept_to_the_last_digit():
    assert tg.Settings.from_env({"SEED": "9007199254740993"}).seed == 9007199254740993


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert tg.Settings.from_env({"ARTIFACT_DIR": "~/x"}).artifact_dir == "/home/ann/x"
    assert tg.Settings.from_env({"ARTIFACT_DIR": "./~"}).artifact_dir == "./~"


def test_names_of_other_programs_warn_and_pass():
    assert tg.Settings.from_env(dict.fromkeys(STRANGERS, "1")) == tg.Settings()
    assert set(tg.stray_names(dict.fromkeys(STRANGERS, "1"))) == set(STRANGERS)
    silent = "PATH HOME LANG OMP_NUM_THREADS NCCL_DEBUG RANK SEED MUONEQ_R TRIGRAM".split()
    assert not tg.stray_names(dict.fromkeys(silent, "1"))


@pytest.mark.parametrize("name, ours", [("LR", "MATRIX_LR"), ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"), (
    "MAX_STEPS", "ITERATIONS"), ("WEIGHT_DECAY", "MUON_WD")])
def test_what_others_call_a_setting_is_told_its_name_here(name, ours):
    assert tg.Settings.from_env({name: "8"}) == tg.Settings()
    assert ours in tg.stray_names({name: "8"})[name]


def test_the_check_shows_strangers_in_a_line_each(monkeypatch, capsys):
    monkeypatch.setenv("LR", "0.02")
    assert tg.main(["--check", "settings"]) == 0
    assert "warn  LR: not read; here it is MATRIX_LR" in capsys.readouterr().out


def test_a_misspelling_says_how_to_leave_it_out():
    with pytest.raises(tg.UserError, match="MODEL_DIMS: .* is MODEL_DIM .*: env -u MODEL_DIMS python"):
        tg.Settings.from_env({"MODEL_DIMS": "512"})


def test_an_error_is_one_short_printable_line():
    text = str(tg.UserError("first\nsecond\x1b[31m" + "y" * 1_000_000 + "; the remedy"))
    assert text.isprintable() and len(text) <= 500
    assert text.startswith("first?second") and text.endswith("; the remedy")


def test_help_on_a_screen_of_ascii():
    status, shown = run_script({**os.environ, "PYTHONIOENCODING": "ascii"}, "--help")
    assert status == 0 and "MODEL_DIM" in shown and "Traceback" not in shown and shown.isascii()


STRANGERS = """
ENABLE_HTTPS ENABLE_AUTH PARALLEL_SEQ HEAD_NODE_IP GLOBAL_RANK MODEL_DIR DATASET_PATH NUM_THREADS
TRAIN_JOB_7_SERVICE_HOST TRAIN_JOB_7_SERVICE_PORT MODEL_PATH NUM_GPUS MATRIX_HOST LOOP_DEVICE
TOKEN_FILE""".split()


# --- older names and mechanisms


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


# --- the published systems' configurations: they parse, and have the published size


SYSTEMS = [name for name in CONFIGS if name.startswith("pr")]


@pytest.mark.parametrize("name", SYSTEMS)
def test_published_parameter_count(name):
    s = tg.Settings.from_env(load_config(name))
    text = (ROOT / "configs" / f"{name}.env").read_text().replace("\n# ", " ")
    published = int(re.search(r"([\d,]+) parameters", text).group(1).replace(",", ""))
    assert sum(math.prod(shape) for shape in tg.GPT.shapes(s).values()) == published
    with torch.device("meta"):
        model = tg.GPT(s)
    assert sum(p.numel() for p in model.parameters()) == published
    assert set(dict(model.named_parameters())) <= set(tg.PARAMETERS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_authors_command_works_alone_and_changes_nothing_after_its_configuration(name):
    text = (ROOT / "configs" / f"{name}.env").read_text()
    lines = re.findall(r"^#   (\S+=.*)$", text, re.M)
    command = dict(pair.split("=", 1) for line in lines for pair in line.split())
    assert command
    tg.Settings.from_env(command)
    config = load_config(name)
    alone, both = (tg.Settings.from_env(env).as_env() for env in (config, {**config, **command}))
    # what they keep of the clock is a least here: what the rehearsal needs is kept in any case
    assert {k for k in alone if alone[k] != both[k]} <= {"GPTQ_RESERVE_SECONDS"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_name_of_a_configuration_is_known(name):
    known = {f.name.upper() for f in tg.fields(tg.Settings)}
    known |= set(tg.NO_SETTINGS) | set(tg.ALIASES)
    assert set(load_config(name)) <= known


def test_best_is_the_default_and_names_every_choice():
    best, default = load_config("best"), tg.Settings()
    assert tg.Settings.from_env(best) == default
    # an idea that is off needs no line
    choices = {f.name.upper() for f in tg.fields(default) if f.name.endswith("_enabled") and f.default}
    record = tg.Settings.from_env(load_config("pr1855")).as_env()      # which the defaults start from
    choices |= {name for name, value in default.as_env().items() if value != record[name]}
    assert choices <= set(best) | {"LQER_ASYM_ENABLED"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_small_sizes_keep_the_mechanisms(name):
    full, small = (tg.Settings.from_env(load_config(*names)) for names in ((name,), (name, "small")))
    assert set(tg.GPT.shapes(full)) == set(tg.GPT.shapes(small))
    assert tg.layer_plan(full, True) == tg.layer_plan(small, True)
    switches = [f.name for f in tg.fields(full) if f.name.endswith("_enabled") or f.metadata["choices"]]
    assert [getattr(full, n) for n in switches] == [getattr(small, n) for n in switches]
    assert len(tg.context_stages(full)) == len(tg.context_stages(small))
