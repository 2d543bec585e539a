"""train_gpt.py: one script that trains, quantises, packs and scores a depth-recurrent
GPT (Parameter Golf).

    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the competition run
    python train_gpt.py --help        # every setting: default, range, meaning
    python train_gpt.py --check       # all that can be checked without training

600 s of training produce averaged weights; GPTQ rounds them to int6; the packed
artifact and this script stay under 16,000,000 bytes together; the artifact is read
back and scored in bits per byte (BPB), first by sliding windows, then by score-first
test-time training (TTT). Environment variables are the only configuration.

Chapters    PART ONE, the system     1 Story  2 Settings  3 Model  4 Optimiser
                                     5 Training  6 Quantise  7 Score  8 Adapt
            PART TWO, machinery      9 World  10 Data  11 Kernels  12 Pack  13 Counts
                                     14 Probes
            PART THREE, lineage      what the older systems did differently: it only
                                     adds, and can be cut off

Shape letters: B rows, T tokens, D model width, H query heads, K key/value heads, V
vocabulary, L layers, R x C a weight matrix (out, in), S executed layer slots (a
looped layer has several).
"""
from __future__ import annotations

import contextlib
import dataclasses
import decimal
import difflib
import fcntl
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import pickletools
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

if __name__ == "__main__":      # Ctrl-C while torch is imported ends in silence, not in a trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError as error:      # now, before anything is spent: nothing can be packed without it
    missing = "error: the package brotli is missing: pip install -r requirements.txt"
    raise SystemExit(missing) from error
try:
    import triton
    import triton.language as tl
except ImportError:               # the plain twins are complete without it
    triton = None

ARTIFACT_LIMIT = 16_000_000   # bytes: this script as shipped + the packed model
MOST_ARTIFACT = 1 << 26       # bytes of a file that is read as one
CANONICAL_VAL_DOCS = 50_000   # documents of FineWeb's validation split
BUDGET_SECONDS = 600.0        # for all up to the artifact, and as many for the evaluation
BOS = 1                       # begins every document, in every tokenizer of the field
RMS_EPS = 1.1920929e-07       # float32 machine epsilon
LN2 = math.log(2.0)
ARTIFACT_NAME = "final_model.int6.ptz"
WEIGHTS_NAME = "final_model.pt"


class UserError(Exception):
    """A mistake the user can fix: its text carries value, bound and remedy, and is
    shown alone."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


def one_line(text: str, most: int = 480) -> str:
    """The text as one printable line; of more than `most` characters the middle is
    left out."""
    plain = "".join(c if c.isprintable() else "?" for c in text[:most] + text[most:][-most:])
    half = most // 2 - 2
    return plain if len(plain) <= most else f"{plain[:half]} … {plain[-half:]}"


class Interrupted(BaseException):
    """A signal ended the run: what to say; status: the exit status, 130 or 143. It is
    no Exception, so that no guard around a report or a reader takes it for a fault of
    its own."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.status = 128 + number


# ============================================================================================================
# PART ONE: the system. What a competitor reads and changes.
# ============================================================================================================


# ============================================================================================================
# 1  Story: the whole run, told straight down
# ============================================================================================================

# Where to look. A token enters train_loop from the stream and becomes a loss in GPT.losses. Curriculum
# decides the context, the loop and the rate of every step; layer_plan makes of the loop an order of layers.
# The 600 s of training hold train_loop and compress, those of the evaluation score_artifact from its clock
# on. A new gate has a shape in GPT.shapes, a role in ROLES, its use in GPT.attend and its switch in Settings.

def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Entry: 0 when all went well, 1 when --check found something or the script
    failed, 2 on a user's mistake, 130 or 143 when interrupted."""
    rank, run = 0, None
    SIGNALS.install()
    open_screens()
    try:
        if "--help" in argv or "-h" in argv:
            print_help()
            return 0
        check_temporary_folder()
        if list(argv[:1]) == ["--check"]:
            return check_command(" ".join(argv[1:]))
        if argv:
            raise UserError(f"unknown argument {argv[0]}: settings come from the environment, "
                            "see --help")
        rank = launcher_ranks(os.environ).rank
        s = Settings.from_env(os.environ)
        world = World.join(os.environ)
        attention_reason = set_up(s, world)
        run = Run(s, world)
        pipeline(s, world, run, attention_reason)
        run.close()
        world.leave()
        return 0
    except (Exception, Interrupted) as error:
        return end_early(error, run, rank)


def pipeline(s: Settings, world: World, run: Run, attention_reason: str) -> None:
    """train -> average -> quantise -> pack -> read back -> score: the whole story."""
    log_start(s, world, run)
    check_before_start(s, world, run, attention_reason)
    world.beat("set-up")
    model = build_model(s, world)
    val = Validation(s)
    check_same_text(run, val)
    if not s.eval_only_quantized_path:
        make_artifact(s, world, run, model, val)
    if not (s.quantize_only or s.prequant_only):
        path = Path(s.eval_only_quantized_path or run.dir / ARTIFACT_NAME)
        score_artifact(s, world, run, model, val, path)
    closing_block(s, world, run, val)
    run.save_summary()


def make_artifact(s: Settings, world: World, run: Run, model: GPT, val: Validation) -> None:
    """Train, average, quantise, pack, all on the training clock; then, off it, the score
    of the averaged weights."""
    with Validation.seal():      # nothing in here can learn from a validation token
        clock, stream = train(s, world, run, model, val)
        for study in STUDIES:
            study.after_training(s, world, run, model, val)
        if not s.prequant_only:
            compress(s, world, run, model, clock, stream.next)
    remove_safety_copies(run)
    stream.close()
    if not s.quantize_only:
        world.beat("scoring")
        score = Scorer(s, world, model).windows(val, s.eval_seq_len)
        check_score("prequant", score)
        run.log("score_prequant", val_loss=score.loss, val_bpb=score.bpb)
        run.summary["prequant_val_bpb"] = score.bpb
        run.save_summary()


def train(s: Settings, world: World, run: Run, model: GPT, val: Validation) -> tuple[Clock, Prefetch]:
    """Averaged weights into the model, by training or from EVAL_ONLY_PATH; the clock and
    the stream that quantising goes on with."""
    drop_ballast(run)      # of a run that was killed
    if s.eval_only_path:
        facts = read_weights(s.eval_only_path, model)
        stream = Prefetch(open_train_stream(s, world, s.batch_shape(world.size)[1]), world.device)
        return take_over(s, run, facts), stream
    state = read_checkpoint(s, world, run) if s.resume else None
    if state:
        run.summary["untrained_val_bpb"] = state["untrained_val_bpb"]
    if world.main:
        check_disk(run.dir, bytes_of_results(s), ballast=True)

    # before the clock starts: compile every graph, and see how long packing takes
    trainer = Trainer(s, world, model)
    world.beat("warm-up")
    run.log("warm_up", seconds=trainer.warm_up())
    world.beat("rehearsal")
    reserve, warning = reserved(s, rehearse(s, world, run, trainer))
    if warning:
        run.log("warning", text=warning)

    def validate(step: int, looping: bool) -> None:
        score = Scorer(s, world, model).windows(val, s.eval_seq_len, looping)
        run.log("validation", step=step, val_loss=score.loss, val_bpb=score.bpb)
        if step == 0:
            run.summary["untrained_val_bpb"] = score.bpb

    try:
        with SIGNALS.held():
            trained = train_loop(s, world, run, trainer, reserve, validate, state)
            if not trained.facts["stopped"]:
                model.load_state_dict(trainer.ema)
                save_weights(run, model, trained.facts)
            if trained.signal:
                world.barrier()      # rank 0 has written its file before any rank ends
                end = trained.facts["stopped"] or "ended"
                raise SIGNALS.error(f"training was {end}", trained.signal)
    finally:
        drop_ballast(run)
    training_reports(s, run, trainer, trained)
    run.save_summary()
    run.note_go_on()
    return trained.clock, trained.stream


def train_loop(s: Settings, world: World, run: Run, trainer: Trainer, reserve: float,
               validate: Callable, state: Mapping[str, Any] | None = None) -> Trained:
    """To ITERATIONS, until a step would pass MAX_WALLCLOCK_SECONDS - reserve, or until
    a signal. validate(step, looping) scores the weights off the clock; state: of the
    checkpoint to go on from. UserError when loss or gradient stop being finite."""
    curriculum, pace = Curriculum(s), Pace(s, reserve)
    step = go_on_from(state, trainer, curriculum) if state else 0
    stream = open_stream(s, world, trainer.tokens, state["batches"] if state else 0)
    progress = Progress(s, world, run, trainer.model, pace.budget)
    progress.epochs = int(stream.epoch)
    looping = curriculum.loops(step, 0.0)
    # graphs that were not warmed up take minutes in between
    beat = "step" if s.warmup_steps or not compiles(s, world.device) else "compiling-step"
    world.beat(f"{beat} {step}")
    world.barrier()
    clock = Clock(s.max_wallclock_seconds)
    clock.start -= state["seconds"] if state else 0.0
    watch, keeper = FiniteWatch(), AverageKeeper(s, world, run, trainer, clock)
    checkpoints = Checkpoints(s, world, run, trainer, watch, clock)
    while True:
        if s.val_loss_every and step % s.val_loss_every == 0:
            off_the_clock(world, clock, lambda: validate(step, looping))
        elapsed, stop, bad = world.agree_step(clock.elapsed(), SIGNALS.number, watch.first_bad())
        pace.observe(step, elapsed)
        ended = pace.ended(step)
        if ended or stop or bad:
            break
        checkpoints.offer(step, elapsed, curriculum, stream)
        # the step: on how long a context, with or without loops, at which rate
        share = pace.progress(step)
        length, looping, lr = curriculum.at(step, share)
        plan = layer_plan(s, looping)
        trainer.measure(share)
        losses = [trainer.micro_step(stream.next(length), plan) for _ in range(trainer.accum)]
        world.beat(f"{beat} {step + 1}")
        norm = trainer.update(lr, muon_momentum(s, step))
        step += 1
        loss = sum(losses) / trainer.accum
        # what is kept and logged of it
        watch.record(step, loss, norm)
        keeper.offer(step)
        world.beat(f"{beat} {step}")
        progress.events(step, stream, trainer, looping)
        if pace.near_end():
            sync(world.device)            # the host must not run ahead of the GPU
        progress.report(step, clock, loss, norm, lr, plan)
    sync(world.device)
    seconds = clock.elapsed()
    stopped = "" if ended else f"stopped at step {step}"
    bad = end_of_steps(world, trainer, watch, step)
    keeper.close(step, "" if bad else stopped)
    if bad:
        raise watch.error(bad)
    if stopped:
        checkpoints.write(step, curriculum, stream)
    facts = weight_facts(s, world, step, seconds, stopped)
    run.log("train_end", steps=step, seconds=seconds, step_ms=facts["step_ms"], epochs=stream.epoch,
            tokens=step * s.train_batch_tokens)
    run.summary.update(steps=step, step_ms=facts["step_ms"])
    return Trained(clock, stream, facts, stop)


def compress(s: Settings, world: World, run: Run, model: GPT, clock: Clock, next_batch: Callable) -> None:
    """Calibrate, quantise, pack and write the artifact, still on the training clock."""
    begin = clock.elapsed()
    world.beat("calibrating")
    curvature = calibrate(s, world, model, next_batch)
    sync(world.device)
    calibrated = clock.elapsed()
    world.beat("quantising")
    weights = matrix_views({n: p.detach() for n, p in model.named_parameters()})
    blob = quantise_to_fit(s, world, run, weights, curvature, clock if run.time_known else None)
    if s.logit_calib_enabled:
        blob = calibrate_logits(s, world, run, blob)
    seconds, size = world.agree(write_artifact(s, run, blob, clock) if world.main else None)
    run.log("artifact", bytes=size, total=check_size(size, shipped_form(s)), train_seconds=seconds,
            calibrate_s=calibrated - begin, quantise_and_pack_s=seconds - calibrated)
    run.note_go_on()


def score_artifact(s: Settings, world: World, run: Run, model: GPT, val: Validation, path: Path) -> None:
    """Score the artifact by plain windows, sliding windows and TTT."""
    world.beat("scoring")
    judge_artifact(s, world, run, model, path)
    log_probes(s, world, run, model)
    clock = Clock(s.eval_max_seconds)
    open_artifact(s, world, model, path)       # once more, on the clock
    scorer = Scorer(s, world, model)
    alone = not (s.sliding_window_enabled or s.ttt_enabled)
    with contextlib.nullcontext() if alone else clock.exclude():      # else it is a diagnostic
        val.hints = Hints.build(s, world, val, False) if alone else None
        score = scorer.windows(val, s.eval_seq_len)
    log_score(run, "quantized", score, scorer.ledger, clock)
    if s.sliding_window_enabled:
        val.hints = Hints.build(s, world, val, False)
        score = scorer.windows(val, s.eval_stride)
        log_score(run, "sliding", score, scorer.ledger, clock)
    if s.ttt_enabled:
        score = adapt_and_score(s, world, run, model, val, clock)
    book_result(s, run, val, score, clock)


def judge_artifact(s: Settings, world: World, run: Run, model: GPT, path: Path) -> None:
    """UserError unless the file is whole, within the limit and of this run; its marks of
    NON-COMPLIANT go into the summary."""
    count_up(run, "evaluation_runs")
    size, mark, digest = open_artifact(s, world, model, path)
    expected = run.summary.get("artifact_digest", digest)
    if world.main and digest != expected:
        raise UserError(f"{path} is not the artifact that this run wrote (digest {digest}, not "
                        f"{expected}): quantise again, with EVAL_ONLY_PATH")
    total = check_size(size, shipped_form(s))
    run.summary.update(artifact_bytes=size, total_bytes=total, artifact_digest=digest)
    for reason in filter(None, mark.split("; ")):
        run.not_compliant(reason)
    run.save_summary()


def adapt_and_score(s: Settings, world: World, run: Run, model: GPT, val: Validation, clock: Clock) -> Score:
    """Score-first test-time training: what has been scored may be learnt from."""
    if val.hints is None or "stream" not in (s.ttt_doc_order, s.ngram_doc_order):
        val.hints = Hints.build(s, world, val, True)
    log_adaptation(s, run, val, clock)

    def trace(event: str, **values) -> None:
        if event == "give_up":
            run.log("watchdog", **values)
        if event == "warning":
            run.log("warning", **values)

    ttt = PhasedTTT(s, world, model, val, trace, clock)
    score = ttt.run()
    log_score(run, "ttt", score, ttt.ledger, clock)
    return score


def book_result(s: Settings, run: Run, val: Validation, score: Score, clock: Clock) -> None:
    """The last score is the result; the evaluation clock ends here."""
    seconds = clock.elapsed()
    check_budget(run, "evaluation", seconds, "EVAL_MAX_SECONDS", s.eval_max_seconds)
    scored_bytes = int(score.byte_sum)
    run.log("coverage", targets=score.tokens, bytes=scored_bytes, documents=len(val.documents),
            complete=True, seconds_off_the_clock=clock.excluded)
    run.summary.update(val_bpb=score.bpb, val_loss=score.loss, eval_seconds=seconds,
                       tokens_scored=score.tokens, bytes_scored=scored_bytes, byte_rule=val.rule)
    run.save_summary()
    with run.guarded("the score by decodable bytes"):
        log_decodable_score(s, run, score)


# ============================================================================================================
# 2  Settings: one frozen table, read once from the environment
# ============================================================================================================

# Bounds of settings that have none of their own; of text: its characters.
MOST = {int: 10 ** 9, float: 1e6, str: 1000}


def knob(default, doc, lo=None, hi=None, group=None, choices=()):
    """A setting: default (its type is the setting's type), meaning with unit,
    inclusive bounds. group: heading of --help over this one and those that follow."""
    if hi is None:
        hi = MOST.get(type(default))
    if lo is None and type(default) is float:
        lo = -hi
    return field(default=default, metadata=dict(doc=doc, lo=lo, hi=hi, group=group, choices=choices))


def choice(words, doc, group=None):
    """A setting that is one of some words, the first by default."""
    choices = words.split()
    return knob(choices[0], doc, group=group, choices=choices)


@dataclass(frozen=True)
class Settings:
    """Every setting of the script. The environment name is the field's name in
    capitals."""
    # --- run
    run_id: str = knob("", "name of the run; by default date and a random tag", group="run")
    seed: int = knob(1337, "seed of weights, adapters and data order", 0, 2 ** 63 - 1)
    artifact_dir: str = knob("", "folder of the run's files (default: runs/<RUN_ID>)")
    max_wallclock_seconds: float = knob(
        600.0, "training budget in s, artifact included; above 600 NON-COMPLIANT; 0: none", 0)
    eval_max_seconds: float = knob(
        600.0, "evaluation budget in s, kept by TTT; above 600 NON-COMPLIANT; 0: none", 0)
    iterations: int = knob(
        20000, "most optimiser steps; without a budget the schedule's length", 0)
    train_log_every: int = knob(
        500, "steps between progress lines; the first ten always show", 0)
    val_loss_every: int = knob(0, "steps between validations, from step 0 on; 0: none", 0)
    checkpoint_every_seconds: float = knob(
        0.0, "s between checkpoints, in a run without a budget; 0: none", 0)
    resume: bool = knob(
        False, "go on from the checkpoint in ARTIFACT_DIR, to the bit; without a budget")
    eval_only_path: str = knob(
        "", "averaged weights (.pt) to quantise, pack and score; no training")
    eval_only_quantized_path: str = knob("", "artifact (.ptz) to score, nothing else")
    quantize_only: bool = knob(False, "stop when the artifact is written")
    prequant_only: bool = knob(False, "stop after scoring the averaged weights")
    # --- device
    attn_backend: str = choice(
        "auto fa3 fa4 torch plain", "kernel of attention", group="device")
    compile: str = choice("auto 0 1", "torch.compile; auto: on a GPU")
    compute_dtype: str = choice(
        "auto float32 bfloat16", "activations; auto: bfloat16 on GPUs")
    muon_dtype: str = choice(
        "auto float32 bfloat16", "Muon and its traffic; auto: as above")
    fused_ce_enabled: bool = knob(True, "fused cross-entropy kernel on a GPU")
    # --- data
    data_dir: str = knob("./data/", "folder that the next two default to", group="data")
    data_path: str = knob("", "folder with fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = knob("", "SentencePiece model of the shards")
    vocab_size: int = knob(8192, "tokens in the vocabulary", 2, 65536)
    caseops_enabled: bool = knob(True, "shards of the CaseOps tokenizer, with byte sidecar")
    data_check: str = choice(
        "quick full", "data before training; full: every byte and document")
    train_loader: str = choice("stream docpack", "every target once; or the field's")
    train_batch_tokens: int = knob(786432, "tokens of one optimiser step, all ranks", 1)
    train_seq_len: int = knob(2048, "documents are cut to this many tokens", 2, 2 ** 24)
    train_seq_schedule: str = knob(
        "", "growing context: length@progress, …; the largest is TRAIN_SEQ_LEN")
    seq_change_warmup_steps: int = knob(
        32, "steps of a learning-rate ramp after a change; 0: none", 0)
    grad_accum_steps: int = knob(0, "micro-batches of a step and rank; 0: 8 / ranks", 0)
    val_batch_tokens: int = knob(524288, "tokens of a scoring batch, in 8 micro-batches", 8)
    val_doc_fraction: float = knob(
        1.0, "share of the validation documents; below 1 it is no result", 0, 1)
    # --- model
    num_layers: int = knob(11, "physical layers", 1, 256, group="model")
    model_dim: int = knob(512, "width", 8, 65536)
    num_heads: int = knob(8, "query heads", 1, 1024)
    num_kv_heads: int = knob(4, "key/value heads", 1, 1024)
    mlp_mult: float = knob(4.0, "hidden units of the MLP per channel", 0.01, 256)
    negative_slope: float = knob(0.5, "slope of the MLP's squared LeakyReLU below 0", 0, 1)
    logit_softcap: float = knob(30.0, "logits are cap * tanh(z / cap)", 1e-3)
    asym_logit_rescale: bool = knob(
        False, "in evaluation, two caps: for positive and negative logits")
    rope_base: float = knob(10000.0, "rotary base", 1, 1e12)
    rope_dims: int = knob(16, "rotated channels of a head; 0: all", 0)
    qk_gain_init: float = knob(5.0, "initial gain of the normalised queries, per head")
    xsa_last_n: int = knob(
        11, "last layers whose attention output is made orthogonal to its value", 0)
    num_loops: int = knob(2, "extra passes over layers LOOP_START..LOOP_END", 0, 1000)
    loop_start: int = knob(3, "first layer of the loop", 0)
    loop_end: int = knob(5, "last layer of the loop", 0)
    enable_looping_at: float = knob(
        0.35, "share of training's time after which loops run", 0, 1)
    parallel_start_layer: int = knob(
        8, "decoder layers from here on have two lanes; 0: none", 0)
    gate_window: int = knob(12, "channels that the smear and attention gates read", 1)
    smear_gate_enabled: bool = knob(True, "mix the previous token's embedding in")
    smear_gate_bos_fix: bool = knob(True, "never across a BOS")
    sparse_attn_gate_enabled: bool = knob(
        True, "gate heads by GATE_WINDOW channels of the block input")
    sparse_attn_gate_scale: float = knob(0.5, "slope of that gate")
    tied_embed_init_std: float = knob(0.005, "initial spread of the embedding", 0)
    # --- optimiser
    matrix_lr: float = knob(0.026, "Muon's learning rate", 0, group="optimiser")
    tied_embed_lr: float = knob(0.03, "AdamW's learning rate of the tied embedding", 0)
    scalar_lr: float = knob(0.02, "AdamW's learning rate of scales, gates and mixes", 0)
    beta1: float = knob(0.9, "AdamW", 0, 0.999999)
    beta2: float = knob(0.99, "AdamW", 0, 0.999999)
    adam_eps: float = knob(1e-8, "AdamW", 0)
    adam_wd: float = knob(0.02, "decoupled weight decay of scales, gates and mixes", 0)
    embed_wd: float = knob(0.085, "decoupled weight decay of the embedding", 0)
    muon_wd: float = knob(0.095, "decoupled weight decay of the matrices", 0)
    muon_momentum: float = knob(0.97, "momentum after its warm-up", 0, 0.999999)
    muon_momentum_warmup_start: float = knob(0.92, "momentum at step 0", 0, 0.999999)
    muon_momentum_warmup_steps: int = knob(1500, "steps of the momentum's warm-up", 0)
    grad_clip_norm: float = knob(0.3, "largest norm of the gradient; 0: no clipping", 0)
    grad_clip_mode: str = choice(
        "global per_rank", "clip the average; or, as the field, each rank's")
    warmup_steps: int = knob(20, "steps on random tokens that compile, then undone", 0)
    warmdown_frac: float = knob(
        0.85, "last share of training, with a falling learning rate", 0, 1)
    min_lr: float = knob(0.1, "lowest learning rate, as a share of the peak", 0, 1)
    ema_decay: float = knob(0.9965, "averaging of the weights, per step", 0, 0.999999)
    # --- quantise and pack
    quant_allocation: str = choice(
        "fisher hand", "steps by curvature; or by bits, sigmas", group="quantise")
    quant_trellis: bool = knob(
        True, "trellis-coded quantisation, 8 states, with fisher steps")
    matrix_bits: int = knob(6, "bits of the matrices (hand)", 2, 8)
    embed_bits: int = knob(7, "bits of the embedding (hand)", 2, 8)
    matrix_clip_sigmas: float = knob(
        12.85, "range of codes in standard deviations of a row (hand)", 0.1)
    attn_clip_sigmas: float = knob(13.0, "the same for attention matrices", 0.1)
    mlp_clip_sigmas: float = knob(11.5, "the same for MLP matrices", 0.1)
    embed_clip_sigmas: float = knob(14.0, "the same for the embedding", 0.1)
    awq_lite_enabled: bool = knob(False, "finer codes for the columns that matter most")
    awq_lite_bits: int = knob(8, "their bits", 2, 8)
    awq_lite_group_size: int = knob(64, "columns of a group", 1)
    awq_lite_group_top_k: int = knob(1, "groups, over all matrices", 1)
    gated_attn_quant_gate: bool = knob(True, "attention gates as int8 per row, not float16")
    gptq_calibration_batches: int = knob(
        16, "training micro-batches, of all ranks, behind the Hessians", 1)
    gptq_reserve_seconds: str = knob(
        "auto", "least s of the budget for quantising and packing; auto: rehearsed")
    lqer_enabled: bool = knob(False, "low-rank repair of the largest rounding errors")
    lqer_rank: int = knob(4, "its rank", 1, 65536)
    lqer_top_k: int = knob(3, "how many matrices get it", 0)
    lqer_asym_group: int = knob(64, "values that share a scale in the 4-bit factor", 1)
    logit_calib_enabled: bool = knob(
        False, "fit scale and 14 biases of the quantised logits in training")
    logit_calib_tokens: int = knob(100000, "training targets for it", 1)
    logit_calib_stride: int = knob(64, "targets scored in a window of EVAL_SEQ_LEN", 1)
    logit_calib_batch_seqs: int = knob(8, "windows of one step", 1)
    logit_calib_epochs: int = knob(1, "passes over them", 1)
    logit_calib_lr: float = knob(0.003, "learning rate", 0)
    logit_calib_l2: float = knob(0.01, "pull towards no calibration", 0)
    fit_margin_bytes: int = knob(
        4096, "the fitter stops this close to the limit", 256, 10 ** 7)
    code_form: str = choice(
        "auto readable packed lean lean_packed",
        "the script that ships and counts. packed: self-extracting; lean: without part three, "
        "where no setting needs it; auto: the smallest")
    # --- score
    eval_seq_len: int = knob(
        2048, "tokens of a window of the sliding evaluation", 2, 2 ** 24, group="score")
    eval_stride: int = knob(64, "tokens between two windows of one document", 1)
    sliding_window_enabled: bool = knob(True, "score the artifact by sliding windows")
    eval_kv_reuse: bool = knob(
        True, "keep keys and values beyond the window; 0: encode again")
    ttt_enabled: bool = knob(True, "score the artifact with score-first test-time training")
    ttt_eval_seq_len: int = knob(2048, "context of TTT, in tokens", 2, 2 ** 24)
    ttt_kv_reuse: bool = knob(
        True, "keep earlier keys and values; 0: encode the context again")
    ttt_suffix: int = knob(0, "newest cached tokens run again, with gradient, before a chunk", 0)
    ttt_shared_a: bool = knob(True, "one frozen A for all documents, only B is adapted")
    ttt_doc_order: str = choice(
        "stream length", "adapt in the stream's order; or longest first, as the field")
    ttt_chunk_size: int = knob(48, "tokens scored between two adapter steps", 1)
    ttt_short_score_first_enabled: bool = knob(
        True, "other chunks at the start of a document; with order length: for short ones")
    ttt_short_score_first_steps: str = knob(
        "8000:24", "position (order length: longest document) up to which:chunk, …")
    ttt_batch_size: int = knob(64, "documents adapted side by side", 1, 65536)
    ttt_lora_rank: int = knob(80, "rank of the adapters", 1, 65536)
    ttt_lora_alpha: float = knob(144.0, "adapters are scaled by alpha / rank", 0)
    ttt_lora_lr: float = knob(8e-5, "learning rate of the adapters", 0)
    ttt_step_nats: float = knob(
        0.0, "nats that a step's rate promises to take off its chunk's loss; 0: TTT_LORA_LR", 0, 1)
    ttt_q_lora: bool = knob(True, "adapt queries")
    ttt_k_lora: bool = knob(True, "adapt keys")
    ttt_v_lora: bool = knob(True, "adapt values")
    ttt_o_lora: bool = knob(True, "adapt the attention output (from the block input)")
    ttt_mlp_lora: bool = knob(True, "adapt the MLP")
    ttt_head_lora: bool = knob(True, "adapt the output head")
    ttt_optimizer: str = choice("normalised adam", "steps: gradient over its RMS; or AdamW")
    ttt_local_lr_mult: float = knob(1.0, "factor on TTT_LORA_LR", 0)
    ttt_beta1: float = knob(0.0, "AdamW's first moment, or SGD's momentum", 0, 0.999999)
    ttt_beta2: float = knob(0.99, "AdamW's second moment", 0, 0.999999)
    ttt_weight_decay: float = knob(0.5, "weight decay of the adapters", 0)
    ttt_grad_steps: int = knob(1, "adapter steps per chunk", 1)
    ttt_train_min_doc_len: int = knob(
        0, "shorter documents only get scored; with order length alone", 0)
    ttt_train_max_doc_len: int = knob(
        0, "so do longer ones (order stream: tokens beyond); 0: none", 0)
    ttt_cache_lambda: float = knob(
        0.0, "weight in scores of what followed like hidden states before; 0: none", 0, 1)
    ttt_cache_theta: float = knob(36.0, "how fast a state's say falls with its distance", 0)
    ttt_warm_start_a: bool = knob(True, "keep A from document to document; B restarts at 0")
    phased_ttt_prefix_docs: int = knob(
        2500, "documents that, once scored, adapt the base weights", 0)
    phased_ttt_num_phases: int = knob(3, "in how many phases", 1)
    global_ttt_lr: float = knob(0.001, "SGD on the base weights: peak learning rate", 0)
    global_ttt_momentum: float = knob(0.9, "its momentum", 0, 0.999999)
    global_ttt_epochs: int = knob(1, "passes over the documents already scored", 1)
    global_ttt_chunk_tokens: int = knob(32768, "tokens of one step of its learning rate", 2)
    global_ttt_batch_seqs: int = knob(32, "sequences of one batch", 1)
    global_ttt_grad_clip: float = knob(1.0, "largest gradient norm; 0: no clipping", 0)
    ngram_tilt_enabled: bool = knob(
        False, "tilt scores towards what followed the same context before")
    ngram_doc_order: str = choice("scored stream", "what counts grow by")
    token_order: int = knob(16, "token expert: length of context with hint", 1, 1024)
    token_threshold: float = knob(0.8, "it speaks from this confidence on", 0)
    token_boost: float = knob(2.625, "nats added to its hint's logit", 0)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Read and check every setting; a name nothing reads stops the run with the
        nearest right one."""
        known = {f.name.upper(): f for f in fields(cls)}
        env = without_old_names(env, known)
        refuse_misspelt(env, known)
        values = {f.name: parse_setting(f, env[name]) for name, f in known.items() if name in env}
        s = cls(**values)
        s.check_consistency()
        return s

    def check_consistency(self) -> None:
        """Refuse settings that contradict each other; every chapter knows its own."""
        check_model(self)
        check_scoring(self)
        check_adapt(self)
        check_counts(self)
        check_run(self)
        check_training(self)
        check_quantise(self)
        check_code_form(self)

    def batch_shape(self, world_size: int) -> tuple[int, int]:
        """(micro-batches per step and rank, tokens of one micro-batch), checked
        against the ranks."""
        accum = self.grad_accum_steps or max(1, 8 // world_size)
        batch, parts = self.train_batch_tokens, world_size * accum
        if batch % parts:
            raise UserError(f"TRAIN_BATCH_TOKENS={batch} is not divisible by {world_size} ranks x "
                            f"{accum} micro-batches: choose a multiple of {parts}, or another "
                            "GRAD_ACCUM_STEPS")
        tokens = batch // parts
        if self.train_seq_schedule or LOADERS[self.train_loader].windowed:
            for _, length in context_stages(self):
                if tokens % length:
                    raise UserError(f"TRAIN_BATCH_TOKENS={batch} makes micro-batches of {tokens} "
                                    f"tokens, no rows of {length}: choose a multiple of "
                                    f"{parts * length}")
        return accum, tokens

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def shards(self) -> Path:
        """DATA_PATH, else the folder that data/fetch.py makes, else the field's place
        for it."""
        if self.data_path:
            return Path(self.data_path)
        folder, name = Path(self.data_dir), f"sp{self.vocab_size}"
        fetched = folder / (f"{name}_caseops" if self.caseops_enabled else name)
        if fetched.is_dir():
            return fetched
        if not self.caseops_enabled:
            return folder / "datasets" / f"fineweb10B_{name}"
        return (folder / f"datasets/fineweb10B_{name}_caseops/datasets/datasets"
                / f"fineweb10B_{name}_lossless_caps_caseops_v1_reserved")

    @property
    def tokenizer(self) -> Path:
        """TOKENIZER_PATH, else the one beside the shards, else the field's place for
        it."""
        if self.tokenizer_path:
            return Path(self.tokenizer_path)
        beside, folder, v = self.shards / "tokenizer.model", Path(self.data_dir), self.vocab_size
        if beside.is_file():
            return beside
        if not self.caseops_enabled:
            return folder / "tokenizers" / f"fineweb_{v}_bpe.model"
        return (folder / f"datasets/fineweb10B_sp{v}_caseops/datasets/tokenizers"
                / f"fineweb_{v}_bpe_lossless_caps_caseops_v1_reserved.model")

    @property
    def first_chunks(self) -> str:
        """Chunks of TTT that differ from TTT_CHUNK_SIZE, as length:chunk, …; may be
        empty."""
        return self.ttt_short_score_first_steps if self.ttt_short_score_first_enabled else ""

    def as_env(self) -> dict:
        """Every setting under its environment name, JSON types."""
        return {f.name.upper(): getattr(self, f.name) for f in fields(self)}

    def to_be_stored(self, values: Mapping) -> dict:
        """Of settings and values those that a file names; one that it does not had
        its default."""
        return dict(values)

    def changed(self) -> dict:
        """The settings that differ from their defaults."""
        defaults = {f.name.upper(): f.default for f in fields(self)}
        return {name: value for name, value in self.as_env().items() if value != defaults[name]}

    def beyond_the_system(self) -> list[str]:
        """Names of settings that ask for more than parts one and two have."""
        return []


def chunk_steps(s: Settings) -> list[tuple[float, int]]:
    """(position, or length of a group's longest document, up to which; chunk); the
    last bound is infinite."""
    steps, text = [], s.first_chunks
    for part in listed(text.replace("=", ":")):
        step = whole_numbers(part.replace(":", ",", 1))
        if len(step) != 2 or min(step) < 1:
            raise UserError(f"TTT_SHORT_SCORE_FIRST_STEPS={text} must be length:chunk, "
                            "as 256:8,2000:24")
        steps.append((step[0], step[1]))
    return sorted(steps) + [(math.inf, s.ttt_chunk_size)]


def schedule(text: str, otherwise, kind: type = int) -> list[tuple[float, float]]:
    """Stages (progress at which it ends, value) of "value@progress, …", by rising
    progress; the last one goes on to the end. Without text one stage of `otherwise`.
    UserError unless values and shares are above 0."""
    stages = []
    for part in listed(text):
        value, _, end = part.partition("@")
        good = is_number(value) and is_number(end) and 0 < float(end) <= 1
        if not good or float(value) <= 0 or kind(float(value)) != float(value):
            raise UserError(f"the stage {part} must be value@progress with 0 < progress <= 1, "
                            "as 1024@0.1")
        stages.append((float(end), kind(float(value))))
    if not stages:
        return [(1.0, otherwise)]
    stages.sort()
    if stages[-1][0] < 1:
        stages.append((1.0, stages[-1][1]))
    return stages


def listed(text: str) -> list[str]:
    """The entries of "a, b, …"; empty ones are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


def context_stages(s: Settings) -> list[tuple[float, int]]:
    """Longest segment of training, by share of the budget."""
    return schedule(s.train_seq_schedule, s.train_seq_len)


# ============================================================================================================
# 3  Model: one forward for training, scoring and adaptation
# ============================================================================================================

def check_model(s: Settings) -> None:
    """Refuse sizes that do not fit together."""
    if s.model_dim % s.num_heads:
        raise UserError(f"MODEL_DIM={s.model_dim} is not divisible by NUM_HEADS={s.num_heads}: "
                        f"choose a multiple of {s.num_heads}")
    if s.num_heads % s.num_kv_heads:
        raise UserError(f"NUM_HEADS={s.num_heads} is not divisible by NUM_KV_HEADS="
                        f"{s.num_kv_heads}: choose a divisor")
    if s.head_dim % 2:
        raise UserError(f"MODEL_DIM={s.model_dim} over NUM_HEADS={s.num_heads} is odd: "
                        "rotary embedding needs it even")
    if s.rope_dims % 2 or s.rope_dims > s.head_dim:
        raise UserError(f"ROPE_DIMS={s.rope_dims} does not fit: it must be even and at most "
                        f"the head width {s.head_dim}")
    if s.gate_window > s.model_dim:
        raise UserError(f"GATE_WINDOW={s.gate_window} exceeds MODEL_DIM={s.model_dim}: lower it")
    if s.hidden_dim < 1:
        raise UserError(f"MLP_MULT={s.mlp_mult:g} leaves no hidden unit of MODEL_DIM="
                        f"{s.model_dim}: raise it")
    if s.num_loops and not s.loop_start <= s.loop_end < s.num_layers:
        raise UserError(f"LOOP_START={s.loop_start} <= LOOP_END={s.loop_end} < NUM_LAYERS="
                        f"{s.num_layers} does not hold: correct them, or set NUM_LOOPS=0")
    slots = s.num_layers + s.num_loops * (s.loop_end - s.loop_start + 1)
    if slots > MOST_SLOTS:
        raise UserError(f"NUM_LOOPS={s.num_loops} makes {slots} executed layers: "
                        f"at most {MOST_SLOTS}, lower it")
    weights = sum(map(math.prod, GPT.shapes(s).values()))
    if weights > MOST_WEIGHTS:
        raise UserError(f"MODEL_DIM={s.model_dim}, NUM_LAYERS={s.num_layers}, MLP_MULT="
                        f"{s.mlp_mult:g} and VOCAB_SIZE={s.vocab_size} make {weights:,} "
                        f"weights: at most {MOST_WEIGHTS:,}, lower them")


# Role of every parameter; one without a role stops the run. matrix: Muon; the others: AdamW.
ROLES = {
    "tok_emb": "embed",
    "qo_bank": "matrix",
    "kv_bank": "matrix",
    "mlp_up_bank": "matrix",
    "mlp_down_bank": "matrix",
    "attn_scale": "small",
    "mlp_scale": "small",
    "resid_mix": "small",
    "q_gain": "small",
    "attn_gate_w": "small",
    "skip_weights": "small",
    "skip_gates": "small",
    "parallel_post_lambdas": "small",
    "parallel_resid_lambdas": "small",
    "smear_gate": "small",
    "smear_lambda": "small",
    "softcap_pos": "cap",
    "softcap_neg": "cap",
}
# The field's names: one tensor per layer, where ours are stacked.
PER_LAYER = {
    "attn_scale": "blocks.{}.attn_scale",
    "mlp_scale": "blocks.{}.mlp_scale",
    "resid_mix": "blocks.{}.resid_mix",
    "q_gain": "blocks.{}.attn.q_gain",
    "attn_gate_w": "blocks.{}.attn.attn_gate_w",
}
WHOLE = {"tok_emb": "tok_emb.weight", "smear_gate": "smear_gate.weight"}
BANKS = {   # bank -> field's names of its first and second half (or of all its layers)
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}


def field_views(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the field's names (`blocks.3.attn.q_gain`,
    `tok_emb.weight`, …), as views."""
    views = {}
    for name, p in params.items():
        if name in PER_LAYER:
            for layer in range(len(p)):
                views[PER_LAYER[name].format(layer)] = p[layer]
        else:
            views[WHOLE.get(name, name)] = p
    return views


def matrix_views(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """field_views with the banks split into matrices (`blocks.3.mlp.fc.weight`)."""
    views = field_views(params)
    for bank, names in BANKS.items():
        if bank not in views:
            continue
        parts = views.pop(bank).chunk(len(names))
        for name, part in zip(names, parts):
            for layer in range(len(part)):
                views[f"blocks.{layer}.{name}"] = part[layer]
    return views


class Plan(NamedTuple):
    """Order in which the layers run: encoder outputs are pushed, decoder layers pop
    them as skips."""
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def slots(self) -> int:
        return len(self.encoder) + len(self.decoder)


def layer_plan(s: Settings, looping: bool) -> Plan:
    """0 1 2 | 3 4 5 | 3 4 5 | 3 4 5 | 6 … 10 when looping, else 0 … 10; cut in halves."""
    order = tuple(range(s.num_layers))
    if looping and s.num_loops:
        loop = order[s.loop_start:s.loop_end + 1]
        order = order[:s.loop_start] + loop * (s.num_loops + 1) + order[s.loop_end + 1:]
    half = len(order) // 2
    return Plan(order[:half], order[half:])


class LayerWeights(NamedTuple):
    """One layer's weights in the activations' dtype; None: it has none of that kind."""
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    up: Tensor
    down: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor
    resid_mix: Tensor
    q_gain: Tensor
    post: Tensor | None      # (2, 2): by how much attention, and the MLP, write to each lane
    resid: Tensor | None     # (2,): by how much each lane is kept
    gate: Tensor | None


@dataclass
class Forward:
    """What one forward carries from layer to layer."""
    layers: list[LayerWeights]
    x0: Tensor
    rope: tuple[Tensor, Tensor]
    layout: Layout | None
    adapter: BoundAdapter | None
    hook: Callable | None
    cache: KeyCache | None

    def observe(self, kind: str, layer: int, x: Tensor) -> None:
        """Hand an activation to the forward hook, if there is one."""
        if self.hook is not None:
            self.hook(kind, layer, x)

    def adapted(self, y: Tensor, kind: str, slot: int, x: Tensor) -> Tensor:
        """y with the adapter's delta for this slot, which reads x, if there is one."""
        if self.adapter is None:
            return y
        return self.adapter.add(y, kind, slot, x)


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis; no learned scale."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the first 2 x (table width) channels. x (B, T, heads, D)."""
    cos, sin = (table[:, None, :].to(x.dtype) for table in rope)
    half = cos.size(-1)
    first = x[..., :half]
    second = x[..., half:2 * half]
    rest = x[..., 2 * half:]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: attention output y (B, T, H, D) minus its projection on the token's own v
    (B, T, K, D)."""
    direction = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
    grouped = y.unflatten(2, (v.size(2), -1))
    share = (grouped * direction).sum(-1, keepdim=True)
    return (grouped - share * direction).flatten(2, 3)


def soft_cap(z: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """cap · tanh(z / cap), with one cap for positive and one for negative z."""
    cap = torch.where(z > 0, pos, neg)
    return cap * torch.tanh(z / cap)


class GPT(nn.Module):
    """The depth-recurrent GPT. Parameters are stacked over layers and kept in
    float32; `compute_dtype` is the activations'. Every forward takes a Plan, so
    recurrence is an argument, not a state."""

    def __init__(self, s: Settings, generator: torch.Generator | None = None):
        super().__init__()
        self.s = s
        self.compute_dtype = torch.float32
        self.calibration: tuple[Tensor, Tensor] | None = None      # of capped logits: scale (), bias (V,)
        for name, shape in self.shapes(s).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.init_weights(generator)

    @classmethod
    def shapes(cls, s: Settings) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name; what is off has no parameter."""
        d, layers = s.model_dim, s.num_layers
        plan = layer_plan(s, True)
        skips = min(len(plan.encoder), len(plan.decoder))
        shapes = dict(
            tok_emb=(s.vocab_size, d),
            qo_bank=(2 * layers, d, d),
            kv_bank=(2 * layers, s.kv_dim, d),
            mlp_up_bank=(layers, s.hidden_dim, d),
            mlp_down_bank=(layers, d, s.hidden_dim),
            attn_scale=(layers, d),
            mlp_scale=(layers, d),
            resid_mix=(layers, 2, d),
            q_gain=(layers, s.num_heads),
            skip_weights=(skips, d),
            parallel_post_lambdas=(layers, 2, 2),
            parallel_resid_lambdas=(layers, 2),
            skip_gates=(skips, d))
        if s.smear_gate_enabled:
            shapes.update(smear_gate=(1, s.gate_window), smear_lambda=(1,))
        if s.asym_logit_rescale:
            shapes.update(softcap_pos=(), softcap_neg=())
        if s.sparse_attn_gate_enabled:
            shapes["attn_gate_w"] = (layers, s.num_heads, s.gate_window)
        return shapes

    def initial_values(self) -> dict[str, float]:
        """Parameters that begin at one value; the others begin at 0 or are drawn."""
        cap = self.s.logit_softcap
        return dict(
            attn_scale=1, mlp_scale=1, q_gain=self.s.qk_gain_init, skip_weights=1,
            parallel_post_lambdas=1, parallel_resid_lambdas=1.1, softcap_pos=cap, softcap_neg=cap)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """Orthogonal inputs, zero outputs: every block starts as the identity."""
        self.tok_emb.normal_(0, self.s.tied_embed_init_std, generator=generator)
        for matrix in (*self.qo_bank[:self.s.num_layers], *self.kv_bank, *self.mlp_up_bank):
            nn.init.orthogonal_(matrix, generator=generator)
        for name, value in self.initial_values().items():
            if hasattr(self, name):
                getattr(self, name).fill_(value)
        self.resid_mix[:, 0] = 1

    # --- pieces

    def unbound(self, name: str) -> Sequence[Tensor | None]:
        """A stacked parameter by layer, in the activations' dtype. Unbound once in a
        forward: its gradient is then one stack, not a sum of zeros."""
        p = getattr(self, name, None)
        if p is None:
            return [None] * self.s.num_layers
        return p.to(self.compute_dtype).unbind(0)

    def layer_weights(self) -> list[LayerWeights]:
        """The weights of every layer."""
        layers = self.s.num_layers
        qo = self.unbound("qo_bank")
        kv = self.unbound("kv_bank")
        stacks = (
            qo[:layers], kv[:layers], kv[layers:], qo[layers:],
            self.unbound("mlp_up_bank"), self.unbound("mlp_down_bank"),
            self.unbound("attn_scale"), self.unbound("mlp_scale"),
            self.unbound("resid_mix"), self.unbound("q_gain"),
            self.unbound("parallel_post_lambdas"), self.unbound("parallel_resid_lambdas"),
            self.unbound("attn_gate_w"))
        return [LayerWeights(*weights) for weights in zip(*stacks)]

    def rope(self, length: int, device, start: int = 0, context: int = 0) -> tuple[Tensor, Tensor]:
        """cos, sin (length, R/2) of positions from start on; context: the longest row."""
        dims = self.s.rope_dims or self.s.head_dim
        channel = torch.arange(0, dims, 2, dtype=torch.float32, device=device)
        inverse = 1.0 / (self.rope_base(max(length, context)) ** (channel / dims))
        position = torch.arange(start, start + length, dtype=torch.float32, device=device)
        angle = position[:, None] * inverse
        return angle.cos(), angle.sin()

    def rope_base(self, longest: int) -> float:
        """Base of the rotary angles for rows of at most `longest` tokens."""
        return self.s.rope_base

    def embed(self, ids: Tensor, layout: Layout | None, before: Tensor | None = None,
              hook: Callable | None = None) -> Tensor:
        """Normalised embeddings (B, T, D), mixed with those of the tokens before.
        before (B, 2): the tokens ahead of ids, where the rows go on from a cache."""
        length = ids.size(1)
        if before is not None:
            ids = torch.cat((before[:, -1:], ids), dim=1)
        x = self.look_up(ids, hook)
        if self.s.smear_gate_enabled:
            x = self.smear(x, self.smears_into(ids, layout))
        x = rms(x)
        return x if before is None else x[:, -length:]

    def look_up(self, ids: Tensor, hook: Callable | None) -> Tensor:
        """The rows of the embedding (B, T, D) for tokens ids (B, T)."""
        x = F.embedding(ids, self.tok_emb).to(self.compute_dtype)
        if hook is not None:
            hook("embedding", -1, x)
        return x

    def same_segment(self, ids: Tensor, layout: Layout | None) -> Tensor | None:
        """(1, T - 1) bool: the token before is of the same segment; None: all are."""
        if layout is None or not layout.isolate:
            return None
        starts = torch.zeros(ids.size(1) + 1, dtype=torch.bool, device=ids.device)
        return ~starts.index_fill(0, layout.cu_seqlens.long(), True)[None, 1:-1]

    def smears_into(self, ids: Tensor, layout: Layout | None) -> Tensor | None:
        """(B or 1, T - 1) bool: tokens that take in the one before; None: all do."""
        same = self.same_segment(ids, layout)
        if not self.s.smear_gate_bos_fix:
            return same
        inside = ids[:, 1:] != BOS
        return inside if same is None else inside & same

    def smear(self, x: Tensor, into: Tensor | None) -> Tensor:
        """x (B, T, D) with the previous token's mixed in, where `into` allows it."""
        last = x[:, :-1] if into is None else x[:, :-1] * into[..., None]
        gate = torch.sigmoid(F.linear(x[:, 1:, :self.s.gate_window], self.smear_gate.to(x.dtype)))
        mixed = x[:, 1:] + gate * self.smear_lambda.to(x.dtype) * last
        return torch.cat((x[:, :1], mixed), dim=1)

    def attend(self, forward: Forward, layer: int, slot: int, x: Tensor) -> Tensor:
        """Attention branch of a layer on its normalised input x (B, T, D)."""
        s, weights = self.s, forward.layers[layer]
        q_flat, k, v = self.project(forward, layer, slot, x)
        q, k, v = (flat.unflatten(2, (-1, s.head_dim)) for flat in (q_flat, k, v))
        q = rotate(rms(q), forward.rope) * weights.q_gain[:, None]
        k = rotate(rms(k), forward.rope)
        keys, values = (k, v) if forward.cache is None else forward.cache.extend(slot, k, v)
        y = attention(q, keys, values, forward.layout)
        if layer >= s.num_layers - s.xsa_last_n:
            y = remove_own_value(y, v)
        if weights.gate is not None:
            y = y * self.head_gate(weights.gate, x, q_flat)[..., None]
        y = y.flatten(2)
        forward.observe("heads", layer, y)
        # the adapter of the output reads the block input, not the heads
        out = forward.adapted(F.linear(y, weights.o), "o", slot, x)
        forward.observe("attn_out", layer, out)
        return out

    def project(self, forward: Forward, layer: int, slot: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H·D), keys and values (B, T, K·D) of a layer's input x."""
        weights = forward.layers[layer]
        q = forward.adapted(F.linear(x, weights.q), "q", slot, x)
        k = forward.adapted(F.linear(x, weights.k), "k", slot, x)
        v = forward.adapted(F.linear(x, weights.v), "v", slot, x)
        for kind, seen in (("attn_in", x), ("q_out", q), ("k_out", k), ("v_out", v)):
            forward.observe(kind, layer, seen)
        return q, k, v

    def head_gate(self, weight: Tensor, x: Tensor, q_flat: Tensor) -> Tensor:
        """Gate (B, T, H) of the heads by the first channels of x; 1/2 at the start."""
        logit = F.linear(x[..., :weight.size(-1)], weight)
        return torch.sigmoid(self.s.sparse_attn_gate_scale * logit)

    def feed_forward(self, forward: Forward, layer: int, slot: int, x: Tensor) -> Tensor:
        """MLP branch of a layer on its normalised input x (B, T, D)."""
        weights, slope = forward.layers[layer], self.s.negative_slope
        if forward.hook is None:
            rows = x.flatten(0, 1)
            out = leaky_square_mlp(rows, weights.up, weights.down, slope).view(x.shape)
        else:      # the same in steps that can be seen
            up = F.linear(x, weights.up)
            hidden = F.leaky_relu(up, slope).square()
            out = F.linear(hidden, weights.down)
            for kind, seen in (("mlp_in", x), ("up_out", up), ("mlp_act", hidden), ("mlp_out", out)):
                forward.observe(kind, layer, seen)
        return forward.adapted(out, "mlp", slot, x)

    def block(self, forward: Forward, layer: int, slot: int, x: Tensor) -> Tensor:
        """A layer on the one residual stream x (B, T, D)."""
        weights, scale = forward.layers[layer], self.depth_scale(layer)
        x = weights.resid_mix[0] * x + weights.resid_mix[1] * forward.x0
        x = x + weights.attn_scale * self.attend(forward, layer, slot, rms(x) * scale)
        return x + weights.mlp_scale * self.feed_forward(forward, layer, slot, rms(x) * scale)

    def branches(self, forward: Forward, layer: int, slot: int, lane0: Tensor,
                 lane1: Tensor) -> tuple[Tensor, ...]:
        """Lane 0 mixed with x0, what attention makes of it, what the MLP of lane 1."""
        weights, scale = forward.layers[layer], self.depth_scale(layer)
        mixed = weights.resid_mix[0] * lane0 + weights.resid_mix[1] * forward.x0
        attended = weights.attn_scale * self.attend(forward, layer, slot, rms(mixed) * scale)
        fed = weights.mlp_scale * self.feed_forward(forward, layer, slot, rms(lane1) * scale)
        return mixed, attended, fed

    def lanes(self, forward: Forward, layer: int, slot: int, lane0: Tensor,
              lane1: Tensor) -> tuple[Tensor, Tensor]:
        """Attention reads lane 0, the MLP lane 1; each writes to both."""
        _, attended, fed = self.branches(forward, layer, slot, lane0, lane1)
        keep0, keep1 = forward.layers[layer].resid
        attended_to, fed_to = forward.layers[layer].post
        attended_to0, attended_to1 = attended_to
        fed_to0, fed_to1 = fed_to
        return (keep0 * lane0 + attended_to0 * attended + fed_to0 * fed,
                keep1 * lane1 + attended_to1 * attended + fed_to1 * fed)

    def depth_scale(self, layer: int) -> float:
        """Factor on the input of both branches of a layer."""
        return 1 / math.sqrt(layer + 1)

    def merge_skip(self, j: int, x: Tensor, skip: Tensor) -> Tensor:
        """U-Net skip number j into the stream x; a gate of 1 keeps the stream."""
        skip = self.skip_weights[j].to(x.dtype) * skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[j].to(x.dtype)))

    # --- the forward

    def begin(self, ids: Tensor, layout: Layout | None, adapter: Adapter | None, hook: Callable | None,
              cache: KeyCache | None) -> Forward:
        """All that the layers of one forward share; its x0 is where they start from."""
        start = 0 if cache is None else cache.position
        window = 0 if cache is None else cache.window
        x = self.embed(ids, layout, cache.last if start else None, hook)
        rope = self.rope(ids.size(1), ids.device, start, window)
        bound = None if adapter is None else adapter.bind(x.dtype)
        return Forward(self.layer_weights(), x, rope, layout, bound, hook, cache)

    def hidden(self, ids: Tensor, plan: Plan, layout: Layout | None = None, adapter: Adapter | None = None,
               hook: Callable | None = None, cache: KeyCache | None = None) -> Tensor:
        """Final normalised hidden state (B, T, D) of tokens ids (B, T). layout:
        documents of a packed row (None: each row is causal). adapter: low-rank
        deltas. hook(kind, layer, x) sees the activations. cache: the rows go on where
        it ends."""
        forward = self.begin(ids, layout, adapter, hook, cache)
        x, skips = forward.x0, []
        for slot, layer in enumerate(plan.encoder):
            x = self.block(forward, layer, slot, x)
            skips.append(x)
        x = self.decode(forward, plan, x, skips)
        out = rms(x)
        for kind, seen in (("x0", forward.x0), ("pre_final_norm", x), ("head_in", out)):
            forward.observe(kind, -1, seen)
        return out

    def is_parallel(self, layer: int) -> bool:
        """Whether a layer works on two lanes."""
        return 0 < self.s.parallel_start_layer <= layer

    def decode(self, forward: Forward, plan: Plan, x: Tensor, skips: list[Tensor]) -> Tensor:
        """The decoder on the encoder's output x, with its skips; late layers on lanes."""
        lanes = None
        for j, layer in enumerate(plan.decoder):
            slot = len(plan.encoder) + j
            has_skip = skips and j < len(self.skip_weights)
            if lanes is None and self.is_parallel(layer):
                lanes = x, x
            if lanes is None:
                x = self.merge_skip(j, x, skips.pop()) if has_skip else x
                x = self.block(forward, layer, slot, x)
            elif self.is_parallel(layer):
                lane0 = self.merge_skip(j, lanes[0], skips.pop()) if has_skip else lanes[0]
                lanes = self.lanes(forward, layer, slot, lane0, lanes[1])
            elif has_skip:
                skips.pop()          # the one stream no longer reaches the output
        return x if lanes is None else self.join(*lanes)

    def join(self, lane0: Tensor, lane1: Tensor) -> Tensor:
        """The stream that two lanes leave behind."""
        return 0.5 * (lane0 + lane1)

    @staticmethod
    def head_name(s: Settings) -> str:
        """The field's name of the output projection: it is the input embedding."""
        return "tok_emb.weight"

    def head_weight(self) -> Tensor:
        """The output projection (V, D)."""
        return self.tok_emb

    def raw_logits(self, hidden: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Logits (B, T, V) before the soft cap."""
        z = F.linear(hidden, self.head_weight().to(hidden.dtype))
        if adapter is None:
            return z
        return adapter.bind(hidden.dtype, head=True).add(z, "head", 0, hidden)

    def logits(self, hidden: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Logits (B, T, V) float32 as they are scored: capped and calibrated."""
        z = self.raw_logits(hidden, adapter).float()
        if self.s.asym_logit_rescale:      # as published, nothing trains the two caps
            z = soft_cap(z, self.softcap_pos.detach(), self.softcap_neg.detach())
        else:
            z = self.s.logit_softcap * torch.tanh(z / self.s.logit_softcap)
        if self.calibration is None:
            return z
        scale, bias = self.calibration
        return scale * z + bias

    def scores_plain_logits(self, adapter: Adapter | None, training: bool) -> bool:
        """Whether a loss has to go through `logits`; else one kernel caps and scores."""
        two_caps = self.s.asym_logit_rescale and not training
        return two_caps or self.calibration is not None

    def losses(self, ids: Tensor, targets: Tensor, plan: Plan, layout: Layout | None = None,
               adapter: Adapter | None = None, hook: Callable | None = None, cache: KeyCache | None = None,
               training: bool = False) -> Tensor:
        """Cross-entropy of every target in nats, (B, T) float32; of targets (N, B,
        T), N tokens a place, the first's have a graph. training: as published,
        without the two caps."""
        hidden = self.hidden(ids, plan, layout, adapter, hook, cache)
        if self.scores_plain_logits(adapter, training):
            z = self.logits(hidden, adapter)
            loss = functools.partial(F.cross_entropy, reduction="none")
        else:
            z = self.raw_logits(hidden, adapter)
            kernel = None if self.s.fused_ce_enabled else False      # None: where it can run
            loss = functools.partial(capped_ce, cap=self.s.logit_softcap, kernel=kernel)
        z = z.flatten(0, 1)
        places = targets[None] if targets.dim() == ids.dim() else targets
        first, *others = places.flatten(1).unbind(0)
        if cache is not None and cache.states:
            cache.extend(cache.STATES, F.normalize(hidden, dim=-1), first.view_as(ids))
        scored = [loss(z, first)]
        for tokens in others:
            scored.append(loss(z.detach(), tokens))
        return torch.stack(scored).view(targets.shape)

    def flops_per_token(self, plan: Plan, context: float) -> float:
        """FLOPs of one token's forward, with attention over `context` tokens."""
        s = self.s
        matrices = 2 * s.model_dim * (s.model_dim + s.kv_dim + s.hidden_dim)
        layers = plan.slots * (matrices + 2 * s.model_dim * context)
        return 2 * (layers + s.vocab_size * s.model_dim)


# ============================================================================================================
# 4  Optimiser: Muon for the banks, AdamW for the rest
# ============================================================================================================

POLAR_EXPRESS = (   # (a, b, c) of X <- aX + (bA + cA^2)X with A = XX', one triple per iteration
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(g: Tensor, dtype: torch.dtype = torch.bfloat16,
                  coefficients: Sequence[tuple] = POLAR_EXPRESS) -> Tensor:
    """Matrices g (…, R, C), in `dtype`, with singular values near 1 (0.86 … 1.14)."""
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_direction(g: Tensor, buf: Tensor, momentum: float, row_normalize: bool = True,
                   coefficients: Sequence[tuple] = POLAR_EXPRESS, nesterov: bool = True) -> Tensor:
    """Update of matrices (n, R, C) by gradient g and momentum buf, which is changed."""
    g = g.to(buf.dtype)
    buf.mul_(momentum).add_(g)
    update = g.add(buf, alpha=momentum) if nesterov else buf
    if row_normalize:
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return orthogonalise(update, buf.dtype, coefficients)


def muon_apply(p: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """Decoupled decay and the step of matrices p (n, R, C); tall ones take a longer."""
    longer = math.sqrt(max(1, p.size(-2) / p.size(-1)))
    p.mul_(1 - lr * weight_decay)
    p.add_(update.to(p.dtype), alpha=-lr * longer)


class Optimiser:
    """Owns all gradient traffic. Each rank orthogonalises its share of every bank:
    reduce-scatter of all banks -> norm and clip of the averaged gradient -> direction
    of the own matrices, gathered while the next bank is worked on -> every rank
    applies the same update. Small gradients travel as one tensor."""

    def __init__(self, s: Settings, world: World, params: Mapping[str, nn.Parameter], dtype: torch.dtype):
        self.s, self.world = s, world
        if strangers := [name for name in params if name not in ROLES]:
            raise UserError(f"parameters {strangers} have no role: add a row to ROLES")
        by_role: dict[str, list] = {role: [] for role in ROLES.values()}
        for name, p in params.items():
            by_role[ROLES[name]].append(p)
        self.names = {p: name for name, p in params.items()}
        self.banks = sorted(by_role["matrix"], key=lambda p: -p.numel())
        groups, self.small = [], []
        for role, (lr, weight_decay) in self.adam_rates().items():
            if by_role[role]:
                groups.append(dict(params=by_role[role], lr=lr, peak=lr, weight_decay=weight_decay))
                self.small += by_role[role]
        self.adam = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), eps=s.adam_eps,
                                      fused=world.device.type == "cuda")
        self.momentum = []      # of as many matrices a rank; the last rank's are padded
        for p in self.banks:
            share = -(-len(p) // world.size)
            self.momentum.append(torch.zeros(share, *p.shape[1:], dtype=dtype, device=p.device))

    def adam_rates(self) -> dict[str, tuple[float, float]]:
        """(peak rate, weight decay) by role; the logit caps are not trained, as published."""
        s = self.s
        return {"embed": (s.tied_embed_lr, s.embed_wd), "small": (s.scalar_lr, s.adam_wd)}

    @torch.no_grad()
    def step(self, lr_share: float, momentum: float) -> Tensor:
        """Reduce, clip, update, clear the gradients; the norm before clipping."""
        for p in (*self.banks, *self.small):      # a plan may leave rows unused, never a whole tensor
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        # as the field, per rank: one with an unusual batch then counts for less
        if self.s.grad_clip_mode == "per_rank":
            norm = self.clip([p.grad for p in self.banks], World())
            shards = self.reduce()
        else:
            shards = self.reduce()
            norm = self.clip(shards, self.world)
        updates = []
        for bank, g in enumerate(shards):
            updates.append(self.gather(self.direction(bank, g, momentum)))
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * lr_share
        self.adam.step()
        for bank, arrived in enumerate(updates):
            self.apply(bank, arrived()[:len(self.banks[bank])], self.s.matrix_lr * lr_share)
        for p in (*self.banks, *self.small):
            p.grad = None
        return norm

    def direction(self, bank: int, g: Tensor, momentum: float) -> Tensor:
        """Update of this rank's matrices of a bank from their averaged gradient g."""
        return muon_direction(g, self.momentum[bank], momentum)

    def apply(self, bank: int, update: Tensor, lr: float) -> None:
        """Step of all matrices (n, R, C) of a bank."""
        muon_apply(self.banks[bank], update, lr, self.s.muon_wd)

    def reduce(self) -> list[Tensor]:
        """Average the gradients; small ones in place, own matrices are returned."""
        size = self.world.size
        if size == 1:
            return [p.grad for p in self.banks]
        shards, works = [], []
        for p, buf in zip(self.banks, self.momentum):
            full = buf.new_zeros(len(buf) * size, *p.shape[1:])
            full[:len(p)] = p.grad
            shards.append(torch.empty_like(buf))
            works.append(dist.reduce_scatter_tensor(shards[-1], full, async_op=True))
        flat = torch.cat([p.grad.flatten() for p in self.small])
        dist.all_reduce(flat)
        averaged = flat.div_(size).split([p.numel() for p in self.small])
        for p, g in zip(self.small, averaged):
            p.grad.copy_(g.view_as(p))
        for work, shard in zip(works, shards):
            work.wait()
            shard.div_(size)
        return shards

    def clip(self, matrices: list[Tensor], world: World) -> Tensor:
        """Scale small gradients and matrices, shared by `world`; the norm before."""
        small = [p.grad for p in self.small]
        squares = world.total(sum(g.float().square().sum() for g in matrices))
        norm = (squares + sum(g.square().sum() for g in small)).sqrt()
        if self.s.grad_clip_norm > 0:
            factor = (self.s.grad_clip_norm / (norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_(matrices + small, factor)
        return norm

    def gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Begin to collect all ranks' shares; what is returned waits for them."""
        if self.world.size == 1:
            return lambda: own
        full = own.new_empty(len(own) * self.world.size, *own.shape[1:])
        work = dist.all_gather_into_tensor(full, own.contiguous(), async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return full
        return arrived

    def never_trained(self) -> list[str]:
        """Parameters, or rows, that no gradient reached: their moment is still 0."""
        touched = {}
        for p, buf in zip(self.banks, self.momentum):
            touched[p] = self.gather(buf.flatten(1).any(1).byte())()[:len(p)]
        for p in self.small:
            moment = self.adam.state[p]["exp_avg_sq"]
            touched[p] = moment.flatten() if p.dim() < 2 else moment.flatten(1).any(1)
        # parameters that are in no optimiser at all, then those with rows that never moved
        untouched = [name for p, name in self.names.items() if p not in touched]
        for p, rows in touched.items():
            idle = (rows == 0).nonzero().flatten().tolist()
            if len(idle) == len(rows) > 0:
                untouched.append(self.names[p])
            elif idle:
                some = f"{len(idle)} of {len(rows)} rows, the first {idle[:20]}"
                untouched.append(f"{self.names[p]} {some}")
        return untouched


# ============================================================================================================
# 5  Training: schedule, warm-up and rewind, average
# ============================================================================================================

def check_training(s: Settings) -> None:
    """Refuse a schedule without its longest stage, and a reserve that leaves no time."""
    longest = max(length for _, length in context_stages(s))
    if longest != s.train_seq_len:
        raise UserError(f"TRAIN_SEQ_LEN={s.train_seq_len} is not {longest}, the longest stage of "
                        f"TRAIN_SEQ_SCHEDULE={s.train_seq_schedule}: make them equal")
    if s.train_seq_schedule and LOADERS[s.train_loader].windowed:
        raise UserError(f"TRAIN_LOADER={s.train_loader} has windows of one length: "
                        "TRAIN_SEQ_SCHEDULE needs stream or docpack")
    reserve, budget = s.gptq_reserve_seconds, s.max_wallclock_seconds
    if reserve == "auto":
        return
    if not is_number(reserve) or float(reserve) < 0:
        raise UserError(f"GPTQ_RESERVE_SECONDS={reserve} must be a number of seconds >= 0, or auto")
    if 0 < budget <= float(reserve):
        raise UserError(f"GPTQ_RESERVE_SECONDS={reserve} leaves nothing of MAX_WALLCLOCK_SECONDS="
                        f"{budget:g} to train in: lower it")


def stage_at(stages: list[tuple[float, float]], progress: float):
    """The value of the first stage that has not ended."""
    return next(value for end, value in stages if min(progress, 1.0) <= end)


def lr_share(s: Settings, progress: float) -> float:
    """Share of the peak rate: flat, then linear over WARMDOWN_FRAC, at least MIN_LR."""
    if s.warmdown_frac <= 0 or progress < 1 - s.warmdown_frac:
        return 1.0
    return max((1 - progress) / s.warmdown_frac, s.min_lr)


def muon_momentum(s: Settings, step: int) -> float:
    """Momentum at a step: linear warm-up over MUON_MOMENTUM_WARMUP_STEPS."""
    if step >= s.muon_momentum_warmup_steps:
        return s.muon_momentum
    share = step / s.muon_momentum_warmup_steps
    return (1 - share) * s.muon_momentum_warmup_start + share * s.muon_momentum


class Pace:
    """How far training is, and whether another step fits in: by the budget less its
    reserve, or without one by ITERATIONS."""

    def __init__(self, s: Settings, reserve: float):
        self.iterations = s.iterations
        self.budget = s.max_wallclock_seconds - reserve if s.max_wallclock_seconds else 0.0
        self.elapsed = 0.0
        self.step_seconds = 0.0      # falls slowly: after a quick step a slow one may come

    def observe(self, step: int, elapsed: float) -> None:
        """Seconds of training before a step, the same on all ranks."""
        if step:
            self.step_seconds = max(elapsed - self.elapsed, 0.9 * self.step_seconds)
        self.elapsed = elapsed

    def ended(self, step: int) -> bool:
        """Whether this step would be one too many."""
        if self.budget and self.elapsed + self.step_seconds > self.budget:
            return True
        return step >= self.iterations

    def near_end(self) -> bool:
        """Whether fewer than ten steps are left."""
        return 0 < self.budget < self.elapsed + 10 * self.step_seconds

    def progress(self, step: int) -> float:
        """Share of training that is done, 0 to 1."""
        return min(self.elapsed / self.budget, 1.0) if self.budget else step / self.iterations


class Curriculum:
    """What changes while training goes on: longest segment, loop, learning rate."""

    def __init__(self, s: Settings):
        self.s, self.stages = s, context_stages(s)
        self.length = 0
        self.changed: int | None = None        # step at which the length changed

    def at(self, step: int, progress: float) -> tuple[int, bool, float]:
        """(longest segment, whether loops run, share of the rate) of a step, in order."""
        length = stage_at(self.stages, progress)
        if length != self.length:
            self.changed = step or None
            self.length = length
        lr, ramp = self.rate(progress), self.s.seq_change_warmup_steps
        if self.changed is not None and ramp:
            lr *= min((step - self.changed + 1) / ramp, 1.0)
        return length, self.loops(step, progress), lr

    def rate(self, progress: float) -> float:
        """Share of the peak learning rate at this share of training."""
        return lr_share(self.s, progress)

    def loops(self, step: int, progress: float) -> bool:
        """Whether the looped layers run more than once then."""
        return self.s.num_loops > 0 and progress >= self.s.enable_looping_at

    def graphs(self) -> list[tuple[int, bool]]:
        """(longest segment, whether loops run): pairs in the order of training."""
        changes = [0.0, self.s.enable_looping_at]
        changes += [math.nextafter(end, 2) for end, _ in self.stages[:-1]]
        pairs = []
        for progress in sorted(changes):
            pairs.append((stage_at(self.stages, progress), self.loops(0, progress)))
        return list(dict.fromkeys(pairs))

    def state(self) -> dict:
        """What a run that goes on later must know of it."""
        return {"length": self.length, "changed": self.changed}


class Trainer:
    """Model, optimiser and average: the one train step, also of the warm-up."""

    def __init__(self, s: Settings, world: World, model: GPT):
        self.s, self.world, self.model = s, world, model
        self.accum, self.tokens = s.batch_shape(world.size)
        self.losses = compiled(s, world.device, model.losses, fullgraph=True)
        self.to_measure = [0.1, 0.5, 0.9]              # shares of training whose next step is timed
        self.parts: dict[str, float] | None = None     # on a measured step: ms by part
        self.rewind()

    def rewind(self) -> None:
        """Forget optimiser state and average: start from the model's present weights."""
        dtype = pick_dtype(self.s.muon_dtype, self.world.device, self.model.compute_dtype)
        self.optimiser = Optimiser(self.s, self.world, dict(self.model.named_parameters()), dtype)
        self.ema = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def micro_step(self, batch: Batch, plan: Plan) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, nats per token."""
        self.charge("data")
        if batch.cu_seqlens is not None and compiles(self.s, self.world.device):
            torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        layout = batch.layout(batch.cut or self.s.train_seq_len)
        loss = self.losses(batch.x, batch.y, plan, layout, training=True).mean()
        self.charge("forward")
        (loss / self.accum).backward()
        self.charge("backward")
        return loss.detach()

    def update(self, lr: float, momentum: float) -> Tensor:
        """Step at a share of the peak rate, then average; the norm before clipping."""
        norm = self.optimiser.step(lr, momentum)
        self.charge("optimiser")
        weights = [p.detach() for p in self.model.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.s.ema_decay)
        self.charge("average")
        return norm

    def measure(self, progress: float) -> None:
        """Make the next step a measured one, when it is time."""
        if self.to_measure and progress >= self.to_measure[0]:
            self.to_measure = [share for share in self.to_measure if share > progress]
            sync(self.world.device)
            self.parts, self.watch = {}, Clock()

    def charge(self, part: str) -> None:
        """On a measured step: charge the ms since the last call to this part."""
        if self.parts is not None:
            sync(self.world.device)
            self.parts[part] = self.parts.get(part, 0.0) + 1e3 * self.watch.elapsed()
            self.watch = Clock()

    def warm_up(self) -> float:
        """Compile and run every graph on random tokens, undo it; the seconds it took."""
        s, clock = self.s, Clock()
        generator = torch.Generator().manual_seed(s.seed + self.world.rank)
        with weights_kept(self.model):
            for length, looping in Curriculum(s).graphs():
                self.warm_graph(length, layer_plan(s, looping), generator)
        self.rewind()
        sync(self.world.device)
        return clock.elapsed()

    def warm_graph(self, length: int, plan: Plan, generator: torch.Generator) -> None:
        """WARMUP_STEPS steps on random tokens, cut at this length."""
        for _ in range(self.s.warmup_steps):
            for _ in range(self.accum):
                self.micro_step(self.random_batch(generator, length), plan)
            self.update(1.0, self.s.muon_momentum)

    def random_batch(self, generator: torch.Generator, length: int = 0) -> Batch:
        """Random tokens in the loader's shape, cut at `length` (0: TRAIN_SEQ_LEN)."""
        s = self.s
        tokens = torch.randint(2, s.vocab_size, (self.tokens + 1,), generator=generator).numpy()
        tokens[::max(2, s.train_seq_len // 2)] = BOS
        batch = packed_batch(tokens, length or s.train_seq_len)
        if LOADERS[s.train_loader].windowed:
            batch = batch.rows(s.train_seq_len)
        return batch.to(self.world.device)

    def finite(self) -> bool:
        """Whether weights and average are, on this rank."""
        tensors = [*self.ema.values(), *self.model.parameters()]
        return all(bool(t.detach().isfinite().all()) for t in tensors)

    def tensors(self) -> dict[str, Any]:
        """Weights, average and optimiser of this rank, not copied."""
        return {"weights": {n: p.detach() for n, p in self.model.named_parameters()},
                "average": self.ema, "momentum": self.optimiser.momentum,
                "adam": self.optimiser.adam.state_dict()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what tensors() gave; UserError when it is of another model."""
        own = self.tensors()
        try:
            for part in ("weights", "average"):
                for name, tensor in own[part].items():
                    tensor.copy_(state[part][name])
            for buf, saved in zip(own["momentum"], state["momentum"], strict=True):
                buf.copy_(saved)
            self.optimiser.adam.load_state_dict(state["adam"])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"the checkpoint does not fit this model ({type(error).__name__}: "
                            f"{plain(error, 100)}): start anew without RESUME") from error


class Trained(NamedTuple):
    """What training leaves behind beside the Trainer's average."""
    clock: Clock
    stream: Prefetch
    facts: dict            # see weight_facts
    signal: int            # the number of a signal that asked for the end of the run; 0: none did


def reserved(s: Settings, rehearsed: float) -> tuple[float, str]:
    """Seconds of the budget kept for quantising and packing, and a warning or "". As
    rehearsed, but at most half: a slow machine still trains, and reports the overrun.
    At least what is asked for; the field's commands ask for too little."""
    budget = s.max_wallclock_seconds
    if not budget:
        return 0.0, ""
    auto = s.gptq_reserve_seconds == "auto"
    asked = 0.0 if auto else float(s.gptq_reserve_seconds)
    kept = max(asked, min(rehearsed, budget / 2))
    need = f"quantising and packing were rehearsed in {rehearsed:.1f} s: {kept:.1f} s are kept"
    if kept < rehearsed:
        return kept, f"{need}, for MAX_WALLCLOCK_SECONDS={budget:g} is less than twice that"
    if auto or asked >= kept:
        return kept, ""
    return kept, f"{need}, not GPTQ_RESERVE_SECONDS={asked:g}"


# ============================================================================================================
# 6  Quantise: Hessians, GPTQ, low-rank repair
# ============================================================================================================

def check_quantise(s: Settings) -> None:
    """Refuse what has no effect on steps by curvature."""
    if s.awq_lite_enabled and s.quant_allocation != "hand":
        raise UserError("AWQ_LITE_ENABLED=1 changes steps that are set by hand, not by "
                        f"QUANT_ALLOCATION={s.quant_allocation}: set QUANT_ALLOCATION=hand "
                        "or leave it out")


SMALL_TENSOR = 65536      # tensors of at most this many elements are stored as float16
HALF_LARGEST = 65504.0    # float16's


class Curvature(NamedTuple):
    """What calibration learns of the matrices, by name: an error E costs about 1/2
    sum_r g_r E_r H E_r'."""
    hessians: Mapping[str, Tensor]        # H (C, C): x'x over all visits and tokens of a mean micro-batch
    fisher: Mapping[str, Tensor] = {}     # g (R): (dL/dy)^2, mean over visits and tokens; absent: all alike


class HessianHook:
    """A forward's hook that sums x'x of every matrix input, each visit counted, and
    (dL/dy)^2 of outputs."""

    INPUTS = {"attn_in": "blocks.{}.attn.c_q.weight", "heads": "blocks.{}.attn.proj.weight",
              "mlp_in": "blocks.{}.mlp.fc.weight", "mlp_act": "blocks.{}.mlp.proj.weight"}
    OUTPUTS = {"q_out": "blocks.{}.attn.c_q.weight", "k_out": "blocks.{}.attn.c_k.weight",
               "v_out": "blocks.{}.attn.c_v.weight", "attn_out": "blocks.{}.attn.proj.weight",
               "up_out": "blocks.{}.mlp.fc.weight", "mlp_out": "blocks.{}.mlp.proj.weight",
               "embedding": "embedding"}

    def __init__(self, s: Settings):
        self.head = GPT.head_name(s)
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.outputs: list[tuple[str, Tensor]] = []
        self.batches = self.tokens = 0

    def __call__(self, kind: str, layer: int, x: Tensor) -> None:
        if name := self.head if kind == "head_in" else self.INPUTS.get(kind, "").format(layer):
            flat = x.detach().flatten(0, -2).float()
            if name in self.sums:
                self.sums[name].addmm_(flat.mT, flat)
            else:
                self.sums[name] = flat.mT @ flat
        if x.requires_grad and kind in self.OUTPUTS:
            self.outputs.append((self.OUTPUTS[kind].format(layer), x))

    @torch.no_grad()
    def add_squares(self, model: GPT, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> None:
        """One backward pass from labels drawn from the model itself (Fisher's, not
        the data's, gradients); exact expectations at the logits. Gradients of weights
        are never formed."""
        cap, head = model.s.logit_softcap, model.head_weight()
        z = model.raw_logits(hidden).float().flatten(0, 1)
        if model.s.asym_logit_rescale:
            cap = torch.where(z > 0, model.softcap_pos, model.softcap_neg)
        squash = (z / cap).tanh_()
        p = (cap * squash).softmax(-1)
        slope = 1 - squash.square_()
        squares = {self.head: (p * (1 - p) * slope.square()).sum(0)}
        drawn = torch.rand(len(p), 1, generator=generator, device=p.device)      # alike in pieces and whole
        label = torch.searchsorted(p.cumsum(1), drawn).clamp_max_(p.size(1) - 1)
        d_logits = p.scatter_add_(1, label, -torch.ones_like(label, dtype=p.dtype)).mul_(slope)
        d_hidden = (d_logits.to(hidden.dtype) @ head.to(hidden.dtype)).view_as(hidden)
        names, outputs = zip(*self.outputs)
        for name, dx in zip(names, torch.autograd.grad(hidden, outputs, d_hidden)):
            dx2 = dx.flatten(0, 1).float().square()
            if name == "embedding":      # of rows as looked up, whatever is done with them then
                rows = p.new_zeros(len(model.tok_emb))
                dx2 = rows.index_add_(0, ids.flatten(), dx2.mean(1))
            else:
                dx2 = dx2.sum(0) / names.count(name)
            squares[name] = squares.get(name, 0) + dx2
        self.squares = {name: self.squares.get(name, 0) + x for name, x in squares.items()}
        self.outputs.clear()
        self.tokens += ids.numel()

    def finish(self, world: World | None = None) -> Curvature:
        """Mean over all ranks' batches; c_k and c_v share c_q's Hessian (see
        input_of)."""
        world = world or World()
        batches, tokens = world.total(torch.tensor([self.batches, self.tokens], dtype=torch.float64,
                                                   device=world.device)).tolist()
        means = {name: world.total(h).div_(batches) for name, h in self.sums.items()}
        fisher = {name: world.total(x).div_(tokens) for name, x in self.squares.items()}
        if fisher:      # the embedding also costs where it is read: alike in all columns, as damping is
            read = fisher.pop("embedding") * (tokens / batches)
            if self.head == "tok_emb.weight":
                h, g = means[self.head].diagonal(), fisher[self.head]
                written, damp = g * h.mean(), read.mean() / g.mean()
                h += damp
                read = (written + read) / h.mean()
            fisher["tok_emb.weight"] = read
        return Curvature(means, fisher)


CALIBRATION_TOKENS = 16384    # in one pass with a graph: 98,304 hold about 68 GB by count, these 11


def pieces(batch: Batch, most: int) -> Iterator[Batch]:
    """Inputs of a batch in parts of at most `most` tokens: rows, or a packed row cut
    at its segments and, if it can be, where documents begin: then the parts know all
    that the whole does."""
    cu, begin, total = batch.cu_seqlens, 0, batch.x.size(1)
    if cu is None:
        yield from (Batch(x, x, None, total) for x in batch.x.split(max(1, most // total)))
        return
    bounds = cu.unique().tolist()
    while begin < total:
        near = [b for b in bounds if begin < b <= begin + most] or [min(b for b in bounds if b > begin)]
        end = max([b for b in near if b == total or batch.x[0, b] == BOS] or near)
        x = batch.x[:, begin:end]
        yield Batch(x, x, cu[(cu >= begin) & (cu <= end)] - begin, batch.max_seqlen)
        begin = end


def calibrate(s: Settings, world: World, model: GPT, next_batch: Callable[[], Batch]) -> Curvature:
    """Curvature over GPTQ_CALIBRATION_BATCHES training micro-batches, shared out over
    the ranks, loops on."""
    hook, plan, fisher = HessianHook(s), layer_plan(s, True), s.quant_allocation == "fisher"
    generator = torch.Generator(world.device).manual_seed(s.seed + world.rank)
    for _ in range(-(-s.gptq_calibration_batches // world.size)):
        for part in pieces(next_batch().to(world.device), CALIBRATION_TOKENS):
            with torch.set_grad_enabled(fisher):
                hidden = model.hidden(part.x, plan, part.layout(s.train_seq_len), hook=hook)
            if fisher:
                hook.add_squares(model, part.x, hidden, generator)
        hook.batches += 1
    return hook.finish(world)


def to_half(x: Tensor) -> Tensor:
    """float16; what is beyond its range becomes its largest number: no artifact holds
    infinities."""
    return x.float().clamp(-HALF_LARGEST, HALF_LARGEST).half()


def row_scales(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """fp16 step of every row of w (…, R, C): clip_sigmas standard deviations span the
    codes. As published it is 0 for a row without spread."""
    return to_half(clip_sigmas * w.float().std(dim=-1) / (2 ** (bits - 1) - 1))


def row_steps(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """row_scales, but a row without spread has its largest magnitude as step."""
    step = row_scales(w, bits, clip_sigmas)
    return torch.where(step > 0, step, to_half(w.abs().amax(dim=-1)))


def inverse_factor(h: Tensor) -> Tensor:
    """Upper U (n, C, C) with U'U = inverse of h: h = F F' with F upper, U = inverse
    of F, by halves."""
    half = h.size(-1) // 2
    if half < 256:
        factor = torch.linalg.cholesky(h.flip(-2, -1)).flip(-2, -1)
        eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device).expand_as(h)
        return torch.linalg.solve_triangular(factor, eye, upper=True)
    u, after = torch.zeros_like(h), inverse_factor(h[:, half:, half:])
    x = h[:, :half, half:] @ after.mT
    before = inverse_factor(h[:, :half, :half] - x @ x.mT)
    u[:, :half, :half], u[:, half:, half:], u[:, :half, half:] = before, after, -(before @ x) @ after
    return u


MOST_DAMPING = 100.0      # as much as a setting may ask for: columns are then all but alone


DAMPING = 0.01         # of a Hessian, as a share of its mean diagonal


def hessian_factor(h: Tensor, damp: float | Tensor = DAMPING, falling: bool = True) -> tuple[Tensor, ...]:
    """For H (n, C, C), damped by a share (n, 1) of its mean diagonal: the columns'
    order (by falling diagonal, or as they are), upper U with U'U = inverse of H in
    that order, the dead columns, and the U_jj of the falling order: the inverse
    deviation of a column's input given those after it. float64 on a GPU, where
    float32 products may round to TF32."""
    h = h.double() if h.is_cuda else h.clone()
    diag = h.diagonal(dim1=-2, dim2=-1)          # a view: writing it writes h
    dead = diag == 0
    diag[dead] = 1
    diag += damp * diag.mean(dim=-1, keepdim=True)
    order = diag.argsort(dim=-1, descending=True, stable=True)
    u = inverse_factor(torch.stack([m[o][:, o] for m, o in zip(h, order)]))
    ratio = torch.empty_like(diag).scatter_(-1, order, u.diagonal(dim1=-2, dim2=-1))
    u = u if falling else inverse_factor(h)
    return order if falling else order.sort().values, u.float(), dead, ratio.float()


def damped_factor(h: Tensor, damp: Tensor,
                  falling: bool = True) -> tuple[tuple[Tensor, ...], Tensor]:
    """hessian_factor of every matrix of h (n, C, C), and the damping (n, 1) that it
    took: what is asked for, or ten times more until the matrix can be factored;
    infinite where nothing helps and the identity stands for it."""
    try:
        found = hessian_factor(h, damp, falling)
        if all(part.isfinite().all() for part in found) and found[3].min() > 0:
            return found, damp
    except torch.linalg.LinAlgError:
        pass
    if len(h) > 1:
        each = [damped_factor(*one, falling) for one in zip(h.split(1), damp.split(1))]
        parts, damps = zip(*each)
        return tuple(torch.cat(part) for part in zip(*parts)), torch.cat(damps)
    if damp.item() < MOST_DAMPING:
        return damped_factor(h, (10 * damp).clamp_min(1e-6), falling)
    eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device)[None]
    return hessian_factor(eye, 0.0, falling), torch.full_like(damp, math.inf)


@torch.no_grad()
def round_in_order(w: Tensor, step: Tensor, order: Tensor, u: Tensor, dead: Tensor, top: int,
                   trellis: bool = False, block: int = 128) -> Tensor:
    """GPTQ (Frantar et al. 2022): codes (n, R, C) int8 within ±top of w under steps
    (n, R), column after column in `order`, each one's error passed on to those still
    to come. order (n, C), u (n, C, C), dead (n, C) are hessian_factor's; where
    columns have steps too, w and u come divided by them."""
    nothing = dead[:, None] | (step == 0)[..., None]      # rows below the smallest step are zero
    w, step = w.masked_fill(nothing, 0), step[:, None].clamp_min(1e-30)
    t = torch.stack([m[:, o].mT for m, o in zip(w, order)])      # (n, C, R): a column is contiguous
    diag = u.diagonal(dim1=-2, dim2=-1)[..., None]               # an error e of column j costs (e / diag_j)^2
    unit = u / diag                                              # rows scaled to a unit diagonal
    codes, columns = torch.empty_like(t, dtype=torch.int8), t.size(1)
    state = torch.zeros_like(t[:, 0], dtype=torch.long)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        if trellis:
            q, error, state = trellis_block(t[:, begin:end] / step, unit[:, begin:end, begin:end],
                                            diag[:, begin:end] ** -2, state)
            error *= step
        else:
            q, error = plain_block(t[:, begin:end], step, unit[:, begin:end, begin:end], top)
        codes[:, begin:end] = q
        t[:, end:] -= unit[:, begin:end, end:].mT @ error
    return torch.stack([c[o].mT for c, o in zip(codes, order.argsort(dim=-1))])


def plain_block(t: Tensor, step: Tensor, unit: Tensor, top: int, tile: int = 16) -> tuple[Tensor, Tensor]:
    """Round columns t (n, C, R) one after the other: (codes, errors). t is used up."""
    codes, error = torch.empty_like(t), torch.empty_like(t)
    for left in range(0, t.size(1), tile):
        right = min(left + tile, t.size(1))
        for j in range(left, right):
            codes[:, j:j + 1] = q = (t[:, j:j + 1] / step).round().clamp_(-top, top)
            error[:, j:j + 1] = e = t[:, j:j + 1] - q * step
            if j + 1 < right:
                t[:, j + 1:right] -= unit[:, j, j + 1:right, None] * e
        t[:, right:] -= unit[:, left:right, right:].mT @ error[:, left:right]
    return codes, error


# Trellis-coded quantisation (Marcellin and Fischer 1990), Ungerboeck's 8 states. In state s a code k means
# k + (s & 1) / 2 steps, and its parity chooses the next state: a row's path sees a grid of half steps at the
# rate of whole ones.
TRELLIS = np.array([[s >> 1 ^ 5 * (s & 1) ^ 2 * parity for parity in (0, 1)] for s in range(8)], np.uint8)
# arrivals of each state: two (state, parity) each
ARRIVALS = np.array([np.argwhere(TRELLIS == to) for to in range(8)]).transpose(1, 2, 0)


def trellis_block(t: Tensor, unit: Tensor, slope: Tensor, state: Tensor,
                  tile: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest path through columns t (n, C, R), in steps, from state (n, R):
    (codes, errors, end state). slope (n, C, 1): cost of a column's squared error.
    Each of 8 states keeps a survivor with its feedback."""
    (from0, odd0), (from1, odd1) = (torch.from_numpy(a).to(t.device) for a in ARRIVALS)
    half0, half1, odd0, odd1 = (x.to(t.dtype)[:, None] / 2 for x in (from0 & 1, from1 & 1, odd0, odd1))
    cost = torch.full((t.size(0), 8, t.size(2)), torch.inf, device=t.device).scatter_(1, state[:, None], 0)
    rest, tiles = t[:, :, None].expand(-1, -1, 8, -1), []          # (n, C, states, R)

    def arrive(x, before, half, odd, slope):
        y = x - half
        k = (y / 2 - odd).round_().clamp_(-63, 62).add_(odd).mul_(2)
        e = y - k
        return k, e, torch.addcmul(before, e, e * slope)

    for left in range(0, t.size(1), tile):
        x, rest, path = rest[:, :tile], rest[:, tile:], []
        right = left + x.size(1)
        for j in range(left, right):
            x0, x1 = x.index_select(2, from0), x.index_select(2, from1)
            k0, e0, c0 = arrive(x0[:, 0], cost[:, from0], half0, odd0, slope[:, j, None])
            k1, e1, c1 = arrive(x1[:, 0], cost[:, from1], half1, odd1, slope[:, j, None])
            second = c1 < c0
            cost, e = torch.minimum(c0, c1), torch.where(second, e1, e0)
            path.append((torch.where(second, k1, k0), e, torch.where(second, from1[:, None], from0[:, None])))
            x = torch.where(second[:, None], x1[:, 1:], x0[:, 1:])
            x -= unit[:, j, j + 1:right, None, None] * e[:, None]
        at, traced = torch.arange(8, device=t.device)[:, None].expand_as(cost), []
        for k, e, parent in reversed(path):
            traced.append((k.gather(1, at), e.gather(1, at)))
            at = parent.gather(1, at)
        codes, errors = (torch.stack(v, 1) for v in zip(*reversed(traced)))      # (n, tile, states, R)
        tiles.append((codes, errors, at))
        rest = rest.gather(2, at[:, None].expand_as(rest))
        rest = rest - (unit[:, left:right, right:].mT @ errors.flatten(2)).view_as(rest)
    at = end = cost.argmin(1, keepdim=True)
    best = []
    for codes, errors, start in reversed(tiles):
        pick = at[:, None].expand(-1, codes.size(1), -1, -1)
        best.append([v.gather(2, pick)[:, :, 0] for v in (codes, errors)])
        at = start.gather(1, at)
    codes, errors = (torch.cat(v, 1) for v in zip(*reversed(best)))
    return codes, errors, end[:, 0]


@torch.no_grad()
def gptq_protected(w: Tensor, h: Tensor, steps: tuple[Tensor, Tensor], bits: tuple[int, int],
                   fine: Tensor, damp: float = DAMPING) -> Tensor:
    """Codes (R, C) int8 of one matrix by GPTQ, with the second steps and bits in the
    columns `fine` (C)."""
    (order, u, dead, _), _ = damped_factor(h.float()[None], h.new_tensor([[damp]]))
    order, u, dead = order[0], u[0], dead[0]
    w = w.float().masked_fill(dead | (steps[0] == 0)[:, None], 0)
    t, codes = w[:, order].mT.contiguous(), torch.empty_like(w.mT)
    for j, column in enumerate(order.tolist()):
        which = int(fine[column])
        step, top = steps[which].float().clamp_min(1e-30), 2 ** (bits[which] - 1) - 1
        codes[column] = q = (t[j] / step).round().clamp_(-top, top)
        t[j + 1:] -= (u[j, j + 1:] / u[j, j])[:, None] * (t[j] - q * step)
    return codes.mT.to(torch.int8).contiguous()


def input_rms(s: Settings, name: str, h: Tensor, tokens: int = 1) -> Tensor:
    """rms (C) of a matrix's input columns from its Hessian, a mean over micro-batches
    of so many tokens."""
    slots = sum(layer_plan(s, True), ())
    visits = slots.count(int(name.split(".")[1])) if name.startswith("blocks.") else 1
    return (h.diagonal() / (visits * tokens)).sqrt()


def group_scores(w: Tensor, rms: Tensor, size: int) -> Tensor:
    """How much each whole group of `size` columns of w (R, C) moves the output: rms
    of input · mean |w|."""
    return (rms * w.float().abs().mean(dim=0))[:len(rms) // size * size].view(-1, size).sum(dim=1)


def protect(s: Settings, out: Quantised, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor],
            names: Sequence[str], coarser: float) -> None:
    """AWQ-lite: the groups of columns with the highest scores of all matrices get
    codes of AWQ_LITE_BITS."""
    size, scores = s.awq_lite_group_size, []
    for name in names:
        w = weights[name]
        if input_of(name) in hessians and storage_of(s, name, w).bits < s.awq_lite_bits:
            values = group_scores(w, input_rms(s, name, hessians[input_of(name)]), size).tolist()
            scores += [(value, name, i * size) for i, value in enumerate(values)]
    chosen: dict[str, list[int]] = {}
    for _, name, start in sorted(scores, key=lambda x: -x[0])[:s.awq_lite_group_top_k]:
        chosen.setdefault(name, []).append(start)
    for name, starts in chosen.items():
        w, stored = weights[name].float(), storage_of(s, name, weights[name])
        fine = torch.isin(torch.arange(w.size(1)) // size * size, torch.tensor(starts))
        high = row_steps(w, s.awq_lite_bits, stored.clip * coarser)
        steps, bits = (out.tensors[name + ".scale"].to(w.device), high), (stored.bits, s.awq_lite_bits)
        codes = gptq_protected(w, hessians[input_of(name)], steps, bits, fine)
        out.tensors.update({name + ".q": codes.cpu(), name + ".awqg_s_hi": high.cpu(),
                            name + ".awqg_start": torch.tensor(starts, dtype=torch.int16),
                            name + ".awqg_size": torch.tensor([size], dtype=torch.int16)})
        out.meta[name] += f"+awqgrpint{s.awq_lite_bits}"


def quantise_rows(w: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """w (R, C) -> int8 codes and fp16 steps (R): the largest magnitude of a row gets
    the largest code."""
    top = 2 ** (bits - 1) - 1
    scale = to_half(w.float().abs().amax(dim=1) / top)
    return divide_round(w, scale[:, None], -top, top), scale


def divide_round(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """round(w / scale) to int8 in [low, high], halves to even; 0 where the fp16 scale
    is 0."""
    scale = scale.float()
    return torch.where(scale > 0, w.float() / scale, 0.0).round().clamp(low, high).to(torch.int8)


def lqer_asym(a: Tensor, b: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a (R, k) in 2 bits, one step; b (k, C) in 4, a step per `group` values: (qA, sA
    (1), qB, sB (n))."""
    scale_a = to_half(a.float().abs().amax() / 1.5)[None]
    flat = b.float().reshape(-1, group)
    scale_b = to_half(flat.abs().amax(dim=1) / 7.5)
    qb = divide_round(flat, scale_b[:, None], -8, 7).view(b.shape)
    return divide_round(a, scale_a, -2, 1), scale_a, qb, scale_b


def asym_values(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (R, k), (k, C) float32 that lqer_asym's codes and steps stand for."""
    b = qb.float().view(len(sb), -1) * sb.float()[:, None]
    return qa * sa.float(), b.view(qb.shape)


def asym_signs(a: Tensor, b: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Factors a (R, k), b (k, C), each pair with the sign that lqer_asym stores with
    the smaller error: its codes reach further down than up. As they are where both
    signs are alike."""
    costs = []
    for sign in (1, -1):
        x, y = asym_values(*lqer_asym(sign * a, sign * b, group))
        x, y, u, v = x.double(), y.double(), sign * a.double(), sign * b.double()
        shared = (x * u).sum(0) * (y * v).sum(1)      # of the stored pair with the true one
        costs.append(x.square().sum(0) * y.square().sum(1) - 2 * shared)
    sign = torch.where(costs[1] < costs[0], -1.0, 1.0)
    return a * sign, b * sign[:, None]


@torch.no_grad()
def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best a (R, r) = U S, b (r, C) = V' of an error matrix, by the smaller Gram
    matrix in float64. The sign of a pair, LAPACK's choice, becomes a rule: the
    largest number of a column of a is negative."""
    e = error.double()
    if e.size(0) < e.size(1):
        u = torch.linalg.eigh(e @ e.mT).eigenvectors[:, -rank:].flip(1)
        sv = (u.mT @ e).norm(dim=1)
        a, b = u * sv, (u.mT @ e) / sv.clamp_min(1e-300)[:, None]
    else:
        v = torch.linalg.eigh(e.mT @ e).eigenvectors[:, -rank:].flip(1)
        a, b = e @ v, v.mT
    largest = a.gather(0, a.abs().argmax(0, keepdim=True))
    sign = torch.where(largest > 0, -1.0, 1.0)
    return (a * sign).float(), (b * sign.mT).float().contiguous()


@dataclass
class Quantised:
    """Flat tensors, how each weight is stored, and the unit of the stored steps. A
    weight is fp16 `<name>`, int8 rows `.gq`, `.gs`, or codes `.q` with steps: fp16
    rows `.scale`, or int8 eighths of an octave of rows `.row` and of columns `.col`
    (one for all matrices of a Hessian); perhaps factors `.lqA…`."""
    tensors: dict[str, Tensor]
    meta: dict[str, str]
    unit: float = 1.0


EMBEDDINGS = {"tok_emb.weight"}      # tables that are looked up


class Storage(NamedTuple):
    """How a tensor is stored: gate, half or gptq; its bits and clip_sigmas."""
    kind: str
    bits: int
    clip: float = 0.0


def storage_of(s: Settings, name: str, w: Tensor) -> Storage:
    """By the settings for its kind. Tables that are looked up and their projections
    have no Hessian: GPTQ then rounds each code by itself."""
    if s.gated_attn_quant_gate and name.endswith("attn_gate_w") and w.dim() == 2 and 32 <= w.numel() <= 8192:
        return Storage("gate", 8)
    if w.numel() <= SMALL_TENSOR:
        return Storage("half", 16)
    if name in EMBEDDINGS:
        return Storage("gptq", s.embed_bits, s.embed_clip_sigmas)
    if ".mlp." in name:
        return Storage("gptq", s.matrix_bits, s.mlp_clip_sigmas)
    clip = s.attn_clip_sigmas if ".attn." in name else s.matrix_clip_sigmas
    return Storage("gptq", s.matrix_bits, clip)


OCTAVE = 8             # stored steps are eighths of an octave
FISHER_FLOOR = 0.03    # smallest sensitivity of a row, as a share of its matrix's mean
TOP_CODE = 126         # the coder's escapes are above
BATCH_ROWS = 8192      # rows of equal matrices that are rounded together


def input_of(name: str) -> str:
    """The first matrix of those that read the same input: they share a Hessian and
    steps of columns."""
    return name.replace("attn.c_k", "attn.c_q").replace("attn.c_v", "attn.c_q")


def octaves(eighths: Tensor) -> Tensor:
    """Steps float32 from stored int8 ones."""
    return torch.exp2(eighths.double() / OCTAVE).float()


class Quantiser:
    """A model's weights, ready to be quantised at any fineness: what does not depend
    on it is computed once. Ranks share the matrices, those of one Hessian together;
    equal shapes are one batch."""

    @torch.no_grad()
    def __init__(self, s: Settings, weights: Mapping[str, Tensor], curvature: Curvature,
                 world: World | None = None):
        self.s, self.weights = s, weights
        self.world = world = world or World()
        self.hessians, fisher = ({n: x for n, x in part.items() if x.isfinite().all()}
                                 for part in (curvature.hessians, curvature.fisher))
        self.names = [n for n, w in weights.items() if storage_of(s, n, w).kind == "gptq"]
        self.fisher = s.quant_allocation == "fisher" and bool(self.names)
        self.trellis = self.fisher and s.quant_trellis
        inputs: dict[str, list[str]] = {}
        for name in self.names:
            inputs.setdefault(input_of(name), []).append(name)
        costs = [sum((len(w) + w.size(1) / 3) * w.size(1) ** 2 for w in map(weights.get, group))
                 for group in inputs.values()]
        keys = [list(inputs)[i] for i in sorted(share_out(costs, world.size)[world.rank])]
        self.own = [n for key in keys for n in inputs[key]]
        # what calibration left that is not used as it is: matrix -> what is done instead
        self.unusual = {n: "sensitivities that are not finite: as fine as the others on average"
                        for n in curvature.fisher if n not in fisher}
        self.unusual.update((n, "a Hessian that is not finite: the identity instead")
                            for n in curvature.hessians if n not in self.hessians)
        self.factors: dict[str, tuple[Tensor, ...]] = {}
        for width in sorted({weights[n].size(1) for n in keys}):
            self.factorise([n for n in keys if weights[n].size(1) == width])
        for part in world.gather(self.unusual):
            self.unusual.update(part)
        self.steps = self.allocate(fisher) if self.fisher else {}
        for key, (order, u, dead, _) in self.factors.items():
            self.factors[key] = order, u / self.columns_of(key)[order], dead
        self.deviations = sum(world.gather(sum(map(self.deviations_of, self.own), np.zeros(511))))
        # beyond this nine codes in ten would be in rows whose steps cannot shrink; hand: the settings' steps
        below = self.deviations.cumsum()
        low = np.searchsorted(below, 0.1 * below[-1]) - len(below) // 2
        self.finest = 2 ** (low / OCTAVE) / (TOP_CODE / 4) if self.fisher else 1.0

    def factorise(self, names: list[str]) -> None:
        """The factors of these matrices' Hessians, all of one width; without one: of
        the identity."""
        weights = [self.weights[n] for n in names]
        eye = torch.eye(weights[0].size(1), device=weights[0].device)
        h = torch.stack([self.hessians.get(n, eye) for n in names])
        found, taken = damped_factor(h, h.new_full((len(h), 1), DAMPING), falling=not self.trellis)
        self.factors.update(zip(names, zip(*found)))
        for name, damping in zip(names, taken[:, 0].tolist()):
            if damping > 2 * DAMPING:
                self.unusual[name] = (f"a Hessian that cannot be factored: damping {damping:g} instead "
                                      f"of {DAMPING:g}")

    def allocate(self, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored steps, `.row` and `.col`, with step^2 g_row d_col the same for all
        weights of all matrices, d being the variance of a column's input given the
        columns that GPTQ rounds after it."""
        rows, columns, level = {}, {}, {}
        for name in self.own:
            if (key := input_of(name)) not in columns:
                ratio = self.factors[key][3].double().log2()      # of d^-1/2
                level[key] = ratio.mean()
                columns[key] = (ratio - level[key]).cpu()
            if name in fisher:
                g = fisher[name].double()
                g = g.clamp_min(max(FISHER_FLOOR * g.mean().item(), 1e-30))
                rows[name] = (level[key] - g.log2() / 2).cpu()
        rows, columns = ({n: x for part in self.world.gather(found) for n, x in part.items()}
                         for found in (rows, columns))
        size = {n: self.weights[n].double().square().mean(1).clamp_min(1e-20).log2().cpu() / 2
                for n in self.names}
        known = [(rows[n] - size[n]).mean() for n in rows]
        for n in set(size) - set(rows):      # not measured: as fine for its weights as the others on average
            rows[n] = size[n] + (sum(known) / len(known) if known else 0)
        middle = torch.cat([rows[n] for n in self.names]).mean()
        steps = {**{n + ".row": rows[n] - middle for n in self.names},
                 **{n + ".col": columns[n] for n in self.names if n in columns}}
        return {n: (OCTAVE * x).round().clamp(-127, 127).to(torch.int8) for n, x in steps.items()}

    def columns_of(self, name: str) -> Tensor:
        """Step of every column (C) against the others."""
        w = self.weights[name]
        return octaves(self.steps.get(input_of(name) + ".col", torch.zeros(w.size(1)))).to(w.device)

    def rows_of(self, name: str, unit: float) -> Tensor:
        """Stored steps of the rows (R): fp16 by hand; or int8, then raised until no
        code is over the top."""
        w = self.weights[name].float()
        if not self.fisher:
            stored = storage_of(self.s, name, w)
            return row_steps(w, stored.bits, stored.clip * unit)
        largest = (w / self.columns_of(name)).abs().amax(1) / (0.9 * TOP_CODE * unit)
        least = (OCTAVE * largest.clamp_min(1e-9).log2()).ceil().clamp(-127, 127).to(torch.int8)
        return torch.maximum(self.steps[name + ".row"].to(w.device), least)

    def deviations_of(self, name: str) -> np.ndarray:
        """How many codes have which standard deviation at unit 1: counts (511) by
        eighths of an octave around 1, taking a code's variance as that of its row
        times that of its column."""
        rows = octaves(self.steps[name + ".row"]) if self.fisher else self.rows_of(name, 1.0).float()
        w = self.weights[name].float() / self.columns_of(name)
        rows = rows.to(w.device)[:, None]
        power = (w / rows.clamp_min(1e-30)).square().clamp_max(1e30)
        power = power.masked_fill(rows == 0, 0)
        rows, columns = power.mean(1), power.mean(0) / power.mean().clamp_min(1e-20)
        counts = ((OCTAVE / 2 * x.clamp_min(1e-20).log2()).round().add(128).clamp(0, 255).int().bincount(
            minlength=256) for x in (rows, columns))
        return np.convolve(*(x.cpu().numpy() for x in counts))

    @torch.no_grad()
    def __call__(self, unit: float = 1.0) -> Quantised:
        """The whole model on every rank, all steps times `unit`."""
        out = Quantised(dict(self.steps), {}, unit if self.fisher else 1.0)
        how = f"gptq ({'trellis' if self.trellis else 'fisher'})"
        for name, w in self.weights.items():
            stored = storage_of(self.s, name, w)
            if stored.kind == "gptq":
                out.meta[name] = how if self.fisher else f"gptq (int{stored.bits})"
            elif stored.kind == "gate":
                out.tensors[name + ".gq"], out.tensors[name + ".gs"] = (t.cpu() for t in quantise_rows(w))
                out.meta[name] = "gate_int8_row"
            else:
                out.tensors[name], out.meta[name] = to_half(w).cpu(), "passthrough (float16)"
        batches: dict[tuple, list[str]] = {}
        for name in self.own:
            w = self.weights[name]
            batches.setdefault((w.shape, storage_of(self.s, name, w).bits), []).append(name)
        done: dict[str, Tensor] = {}
        for (shape, bits), names in batches.items():
            for at in range(0, len(names), count := max(1, BATCH_ROWS // shape[0])):
                self.round(done, names[at:at + count], bits, unit)
        for part in self.world.gather(done):
            out.tensors.update(part)
        if self.s.awq_lite_enabled:
            protect(self.s, out, self.weights, self.hessians, self.names, unit)
        if self.s.lqer_enabled:
            self.repair(out)
        return out

    def round(self, done: dict, names: list[str], bits: int, unit: float) -> None:
        """Codes and rows' steps of equally shaped matrices into `done`."""
        w = torch.stack([self.weights[n].float() for n in names])
        order, u, dead = (torch.stack(x) for x in zip(*(self.factors[input_of(n)] for n in names)))
        rows = torch.stack([self.rows_of(n, unit) for n in names])
        if self.fisher:
            w = w / torch.stack([self.columns_of(n) for n in names])[:, None]
            codes = round_in_order(w, octaves(rows) * unit, order, u, dead, TOP_CODE, self.trellis)
        else:
            codes, rows = self.round_by_hand(w, rows, (order, u, dead), bits, unit)
        for end, stack in ((".row" if self.fisher else ".scale", rows), (".q", codes)):
            # clones, because a pickled view takes its whole stack along
            done.update((n + end, x.clone()) for n, x in zip(names, stack.cpu()))

    def round_by_hand(self, w: Tensor, rows: Tensor, factors: Sequence[Tensor], bits: int,
                      unit: float) -> tuple[Tensor, Tensor]:
        """(codes, steps of rows) of matrices w (n, R, C) under steps rows (n, R) that
        settings gave."""
        return round_in_order(w, rows.float(), *factors, 2 ** (bits - 1) - 1), rows

    def repair(self, out: Quantised) -> None:
        """LQER: low-rank factors for the matrices with the largest rounding errors."""
        decoded = dequantise(out)
        errors = {}
        for name in self.names:
            w = self.weights[name]
            errors[name] = w.float() - decoded[name].to(w.device)
        for name in self.to_repair(errors):
            form, factors = self.pack_factors(name, *low_rank(errors[name], self.s.lqer_rank))
            out.tensors.update(factors)
            out.meta[name] += "+" + form

    def to_repair(self, errors: Mapping[str, Tensor]) -> list[str]:
        """The LQER_TOP_K matrices of the largest errors (R, C)."""
        sizes = {name: error.norm().item() for name, error in errors.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])
        return [name for name in largest[:self.s.lqer_top_k] if sizes[name] > 0]

    def pack_factors(self, name: str, a: Tensor, b: Tensor) -> tuple[str, dict[str, Tensor]]:
        """(form, tensors) in which the factors a (R, r), b (r, C) of a matrix are stored:
        asymmetric where b falls into whole groups of LQER_ASYM_GROUP values."""
        group = self.s.lqer_asym_group
        if b.numel() % group:
            return symmetric_factors(name, a, b)
        parts = lqer_asym(*asym_signs(a, b, group), group)
        ends = ("lqA_a", "lqAs_a", "lqB_a", "lqBs_a")
        return "lqer_asym", {f"{name}.{end}": part.cpu() for end, part in zip(ends, parts)}


def symmetric_factors(name: str, a: Tensor, b: Tensor, bits: int = 4) -> tuple[str, dict[str, Tensor]]:
    """Form and tensors of factors with one step for each of their rows."""
    parts = (*quantise_rows(a, bits), *quantise_rows(b, bits))
    ends = ("lqA", "lqAs", "lqB", "lqBs")
    return "lqer", {f"{name}.{end}": part.cpu() for end, part in zip(ends, parts)}


def factors_of(t: Mapping[str, Tensor], name: str) -> Tensor | float:
    """The product (R, C) of a matrix's stored factors; 0 where it has none."""
    if name + ".lqA_a" in t:
        a, b = asym_values(*(t[f"{name}.lq{end}_a"] for end in ("A", "As", "B", "Bs")))
        return a @ b
    if name + ".lqA" in t:
        a, b = (t[f"{name}.lq{x}"] * t[f"{name}.lq{x}s"].float()[:, None] for x in "AB")
        return a @ b
    return 0.0


def half_steps(codes: np.ndarray) -> np.ndarray:
    """Which of the codes (R, C) stand half a step higher: a walk from state 0 through
    every row."""
    return state_bits(np.ascontiguousarray(codes.T), TRELLIS).T


def dequantise(q: Quantised) -> dict[str, Tensor]:
    """The float32 weights that a quantised model stands for, by name."""
    weights, t = {}, q.tensors
    for name, how in q.meta.items():
        if name in t:
            weights[name] = t[name].float()
            continue
        if name + ".row" in t:
            w = t[name + ".q"].float()
            if "trellis" in how:
                w += 0.5 * torch.from_numpy(half_steps(t[name + ".q"].numpy()))
            w *= (q.unit * octaves(t[name + ".row"]))[:, None] * octaves(t[input_of(name) + ".col"])
        else:
            codes, steps = (name + end for end in ((".gq", ".gs") if name + ".gq" in t else (".q", ".scale")))
            w = t[codes] * t[steps].float()[:, None]
        for start in t.get(name + ".awqg_start", torch.empty(0)).tolist():
            group = slice(start, start + int(t[name + ".awqg_size"]))
            w[:, group] = t[name + ".q"][:, group] * t[name + ".awqg_s_hi"].float()[:, None]
        weights[name] = w + factors_of(t, name)
    return weights


@torch.no_grad()
def load_weights(model: GPT, weights: Mapping[str, Tensor], origin: str, names=matrix_views) -> None:
    """Copy weights, under the names that `names` gives, into the model; UserError
    unless they fit."""
    views = names({n: p.data for n, p in model.named_parameters()})
    wrong = sorted(set(views) ^ set(weights)) or [n for n in views if views[n].shape != weights[n].shape]
    if wrong:
        raise UserError(f"{origin} does not fit the model that the settings describe: {len(wrong)} tensors "
                        f"differ ({', '.join(wrong[:3])}…); use the settings it was made with")
    for name, view in views.items():
        view.copy_(weights[name])


# --- logit calibration: scaled and shifted by what a token looks like

CALIBRATION_STREAM = "calibration"    # in the artifact: 1 + 14 float32
CALIBRATION_REACH = 0.5               # a category moves its tokens' logits by at most this much


@functools.cache
def token_categories(path: Path, vocab_size: int) -> Tensor:
    """(V, 14) of 0 and 1: by length in bytes, by leading space and by the kind of
    characters."""
    sp, rows = load_tokenizer(path), []
    for i in range(vocab_size):
        nothing = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        piece = "" if nothing else sp.id_to_piece(i)
        text = chr(int(piece[3:5], 16)) if sp.is_byte(i) else piece.lstrip("\u2581")
        size = 1 if sp.is_byte(i) else len(text.encode())
        rows.append([*(size == n for n in (1, 2, 3, 4)), 5 <= size <= 8, size >= 9, piece[:1] == "\u2581",
                     "\n" in text or "\r" in text, any(c.isdigit() for c in text),
                     bool(text) and not any(c.isalnum() or c.isspace() for c in text),
                     any(c.isalpha() for c in text), text.islower(), text.isupper(),
                     text[:1].isupper() and text[1:].islower()])
    return torch.tensor(rows, dtype=torch.float32)


def calibrated_by(s: Settings, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scale () and bias (V,) of capped logits that the 15 numbers raw stand for."""
    bias = token_categories(s.tokenizer, s.vocab_size).to(raw.device) @ raw[1:]
    return 0.9 + 0.2 * torch.sigmoid(raw[0]), bias


def fit_calibration(s: Settings, model: GPT, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """The 15 numbers that serve the model best on training tokens (N,), and every
    step's loss."""
    device, seen, stride = model.tok_emb.device, [], s.logit_calib_stride
    raw = torch.zeros(15, device=device, requires_grad=True)
    optimiser = torch.optim.AdamW([raw], lr=s.logit_calib_lr, weight_decay=0)
    total = min(s.logit_calib_tokens, len(tokens) - 1)
    blocks = np.arange(0, total, stride)              # each window scores one block, after what fits before
    for i in [*range(0, len(blocks), s.logit_calib_batch_seqs)] * s.logit_calib_epochs:
        first = blocks[i:i + s.logit_calib_batch_seqs, None]
        at = np.maximum(first - s.eval_seq_len + stride, 0) + np.arange(s.eval_seq_len)
        scored = torch.from_numpy((at >= first) & (at < np.minimum(first + stride, total))).to(device)
        x, y = (torch.from_numpy(tokens[np.minimum(at + j, len(tokens) - 1)].astype(np.int64)).to(device)
                for j in (0, 1))
        with torch.no_grad():
            z = model.logits(model.hidden(x, layer_plan(s, True))[scored])
        scale, bias = calibrated_by(s, raw)
        seen.append(loss := F.cross_entropy(scale * z + bias, y[scored]))
        optimiser.zero_grad()
        (loss + s.logit_calib_l2 * (raw[1:].square().mean() + (scale - 1) ** 2)).backward()
        optimiser.step()
        with torch.no_grad():
            raw[1:].clamp_(-CALIBRATION_REACH, CALIBRATION_REACH)
    return raw.detach(), torch.stack(seen).detach()


def calibrate_logits(s: Settings, world: World, run: Run, blob: bytes) -> bytes:
    """The artifact with its own model's calibration, fitted in training; as it was
    without room."""
    values = None
    if world.main:
        model = build_model(s, world)
        load_weights(model, read_artifact(s, blob, ARTIFACT_NAME).weights, ARTIFACT_NAME)
        raw, losses = fit_calibration(s, model, read_shard(list_shards(s.shards, "train")[0]))
        values = raw.cpu().numpy().astype("<f4").tobytes()
        run.log("logit_calibration", steps=len(losses), train_loss=losses.mean().item(), values=raw.tolist())
    header, streams = artifact_from_bytes(blob, ARTIFACT_NAME)
    whole = artifact_to_bytes(header, {**streams, CALIBRATION_STREAM: world.agree(values)})
    if len(whole) + code_bytes(shipped_form(s)) + MARK_BYTES + LZMA_SLACK <= ARTIFACT_LIMIT:
        return whole
    run.log("settings_without_effect", LOGIT_CALIB_ENABLED="no room for the calibration in the artifact")
    return blob


# ============================================================================================================
# 7  Score: the ledger and sliding windows
# ============================================================================================================

def check_scoring(s: Settings) -> None:
    """Refuse windows that would leave targets out."""
    if s.eval_stride > s.eval_seq_len:
        raise UserError(f"EVAL_STRIDE={s.eval_stride} exceeds EVAL_SEQ_LEN={s.eval_seq_len}: "
                        "lower it")


class Score(NamedTuple):
    """Sums over scored targets: nats, bytes, targets."""
    loss_sum: float
    byte_sum: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte: the one formula."""
        return self.loss_sum / LN2 / self.byte_sum


@dataclass(frozen=True)
class Booked:
    """Validation tokens whose every target is on the books; nothing else of them may
    be trained on."""
    tokens: np.ndarray


PROFILE_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)

EARLY = "an adapter step on a target that is not scored yet would break the rules"


class LedgerError(RuntimeError):
    """What the books of an evaluation refuse."""


class Ledger:
    """The books of one evaluation: every target's loss, once. What breaks the rules
    raises, on every rank."""

    def __init__(self, val: Validation, device: torch.device):
        val.ledgers += 1
        self.val, n = val, len(val.tokens) - 1
        self.loss = torch.zeros(n, device=device)
        self.count = torch.zeros(n, dtype=torch.int32, device=device)
        self.early = torch.zeros((), dtype=torch.bool, device=device)
        self.expected = np.zeros(n, dtype=bool)
        for start, length in zip(val.documents.start, val.documents.length):
            self.expected[start:start + length - 1] = True

    def book(self, positions: Tensor, losses: Tensor) -> None:
        """Enter the losses (n,) of the targets after input positions (n,)."""
        self.count.index_add_(0, positions, torch.ones_like(positions, dtype=torch.int32))
        self.loss[positions] = losses.detach().float()

    def require(self, positions: Tensor) -> None:
        """Note whether all these targets are on the books: check_early() says so,
        nothing waits here."""
        self.early |= (self.count[positions] == 0).any()

    def check_early(self, world: World) -> None:
        """Raise, on every rank, when one of them has asked for a target that was not
        on the books."""
        if world.total(self.early.int()):
            raise LedgerError(EARLY)

    def booked(self, documents: np.ndarray, world: World) -> Booked:
        """The tokens of these documents, if all ranks together have scored every
        target of theirs."""
        self.check_early(world)
        count = world.total(self.count.clone()).cpu().numpy()
        spans = [(int(self.val.documents.start[d]), int(self.val.documents.length[d])) for d in documents]
        for start, length in spans:
            if not (count[start:start + length - 1] == 1).all():
                raise LedgerError(f"targets of the document at {start} are not scored once each: training "
                                  "on it would break the rules")
        return Booked(np.concatenate([self.val.tokens[a:a + n] for a, n in spans]))

    def close(self, world: World) -> Score:
        """Sum over ranks; raises unless every expected target was scored, once,
        before any step on it."""
        self.check_early(world)
        count = world.total(self.count).cpu().numpy()
        self.total = loss = world.total(self.loss.double()).cpu().numpy()
        if len(wrong := np.flatnonzero(count != self.expected)):
            at = wrong[0]
            raise LedgerError(f"coverage is broken: {len(wrong):,} targets, the first at {at}, were scored "
                              f"{count[at]} times instead of {int(self.expected[at])}")
        self.val.ledgers -= 1
        target_bytes = self.val.target_bytes[self.expected].sum()
        return Score(float(loss.sum()), float(target_bytes), int(self.expected.sum()))

    def profiles(self) -> Iterator[dict]:
        """After close(): documents, targets, bytes, nats by a document's length, and
        by position in it."""
        start, length = self.val.documents.start, self.val.documents.length - 1
        cuts = start[:, None] + np.minimum(length[:, None], [*PROFILE_EDGES, 1 << 62])
        sums = [np.diff(np.append(0, x.cumsum())[cuts]) for x in (self.val.target_bytes, self.total)]
        parts = dict(zip(("tokens", "bytes", "nats"), (np.diff(cuts), *sums)))     # each (documents, buckets)
        belongs = np.eye(len(PROFILE_EDGES), dtype=int)[np.searchsorted(PROFILE_EDGES, length, "right") - 1]
        for by, documents, total in (("position", parts["tokens"] > 0, lambda x: x.sum(0)),
                                     ("length", belongs, lambda x: x.sum(1) @ belongs)):
            yield {"by": by, "edges": PROFILE_EDGES, "documents": documents.sum(0).tolist(),
                   **{k: total(x).tolist() for k, x in parts.items()}}


def sliding_windows(total: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows over `total` positions as (begin, end, first scored position): the
    first scores all it sees, later ones their last `stride` positions; each position
    once."""
    later = range(stride, total - seq_len + stride, stride)
    return [(0, min(seq_len, total), 0),
            *((begin, min(begin + seq_len, total), begin + seq_len - stride) for begin in later)]


Window = tuple[int, int, int]       # absolute positions: begin, end, first scored


def pack_rows(windows: list[Window], capacity: int) -> list[list[Window]]:
    """Windows, longest first, filled one after the other into rows of at most
    `capacity` tokens."""
    rows, used = [], capacity
    for w in sorted(windows, key=lambda w: w[0] - w[1]):
        used += w[1] - w[0]
        if used > capacity or not rows:
            rows.append([])
            used = w[1] - w[0]
        rows[-1].append(w)
    return rows


class Scorer:
    """Scores a model on validation documents: packed rows, no attention across
    documents."""

    def __init__(self, s: Settings, world: World, model: GPT):
        self.s, self.world, self.model = s, world, model
        self.losses = compiled(s, world.device, model.losses, fullgraph=True)
        self.fixed = compiles(s, world.device)            # compiled graphs want one row length
        self.capacity = max(s.eval_seq_len, s.val_batch_tokens // 8)

    @torch.no_grad()
    def windows(self, val: Validation, stride: int, looping: bool = True) -> Score:
        """Score every document by windows of EVAL_SEQ_LEN at this stride, or beyond
        those on cached keys."""
        s, ledger = self.s, Ledger(val, self.world.device)
        self.ledger = ledger              # the books of the latest evaluation
        starts, targets = val.documents.start, val.documents.length - 1
        longer = (targets > s.eval_seq_len) & (s.eval_kv_reuse and stride < s.eval_seq_len)
        windows = [(a + b, a + e, a + f) for a, n in zip(starts[~longer].tolist(), targets[~longer].tolist())
                   for b, e, f in sliding_windows(n, s.eval_seq_len, stride)]
        rows, plan = pack_rows(windows, self.capacity), layer_plan(s, looping)
        widths = [sum(end - begin for begin, end, _ in row) for row in rows]
        for i in share_out(widths, self.world.size)[self.world.rank]:
            self.world.beat(f"scoring row {i}")
            self.score_row(rows[i], val, plan, ledger)
        if longer.any():
            self.once(val, np.flatnonzero(longer), stride, ledger)
        return ledger.close(self.world)

    def once(self, val: Validation, documents: np.ndarray, stride: int, ledger: Ledger) -> None:
        """Documents computed once, `stride` tokens at a time, on the keys a window
        would reach."""
        s = dataclasses.replace(self.s, ttt_eval_seq_len=self.s.eval_seq_len, ttt_chunk_size=stride,
                                ttt_short_score_first_enabled=False, ttt_cache_lambda=0)
        still = PhasedTTT(s, self.world, self.model, val, ledger=ledger)
        still.level = NO_ADAPTATION
        self.model.requires_grad_(False)       # as in adaptation, so that it has the same graphs
        for group in still.own_share(grouped(s, documents, still.lengths)):
            still.adapt_group(group)
        self.model.requires_grad_(True)

    def score_row(self, row: list[Window], val: Validation, plan: Plan, ledger: Ledger) -> None:
        """One forward; book the scored part of each window."""
        lengths = np.array([e - b for b, e, _ in row])
        at = np.concatenate([np.arange(b, e) for b, e, _ in row])
        scored = np.flatnonzero(np.concatenate([np.arange(b, e) >= f for b, e, f in row]))
        pad = self.capacity - len(at) if self.fixed else 0
        total, longest = len(at) + pad, self.s.eval_seq_len
        filler = np.arange(len(at) + longest, total, longest)       # padding is cut like documents
        bounds = np.concatenate([[0], np.cumsum(lengths), filler, [total]]).astype(np.int32)
        ids = np.pad(val.tokens[at].astype(np.int64), (0, pad))
        targets = np.pad(val.targets[at].astype(np.int64), (0, pad))
        x, y, cu = (torch.from_numpy(a).to(self.world.device) for a in (ids[None], targets[None], bounds))
        if self.fixed:
            torch._dynamo.mark_dynamic(cu, 0)
        forward = functools.partial(self.losses, plan=plan, layout=Layout(cu, longest, isolate=True))
        losses = tilted_losses(self.s, forward, x, y, np.pad(at, (0, pad))[None], val.hints)[1][0]
        positions, keep = (torch.from_numpy(i).to(losses.device) for i in (at[scored], scored))
        ledger.book(positions, losses[keep])


# ============================================================================================================
# 8  Adapt: score-first test-time training
# ============================================================================================================

def check_adapt(s: Settings) -> None:
    """Refuse adaptation that could not work, or would let later text reach earlier."""
    largest = max(chunk for _, chunk in chunk_steps(s))
    if largest > s.ttt_eval_seq_len:
        raise UserError(f"TTT_CHUNK_SIZE={s.ttt_chunk_size}, or a chunk of "
                        f"TTT_SHORT_SCORE_FIRST_STEPS={s.first_chunks}, exceeds TTT_EVAL_SEQ_LEN="
                        f"{s.ttt_eval_seq_len}: lower it")
    if s.ttt_doc_order == "stream" and s.ttt_warm_start_a and not s.ttt_shared_a:
        raise UserError("TTT_DOC_ORDER=stream, TTT_WARM_START_A=1 and TTT_SHARED_A=0 let A carry "
                        "what later documents taught it to earlier ones: set TTT_WARM_START_A=0 "
                        "or TTT_DOC_ORDER=length")
    if s.ttt_doc_order == "stream" and s.ttt_train_min_doc_len:
        raise UserError(f"TTT_TRAIN_MIN_DOC_LEN={s.ttt_train_min_doc_len} asks where a document "
                        "ends before it is read, which TTT_DOC_ORDER=stream does not allow: set "
                        "TTT_TRAIN_MIN_DOC_LEN=0 or TTT_DOC_ORDER=length")
    if s.ttt_enabled and not any(getattr(s, f"ttt_{kind}_lora") for kind in ADAPTED):
        raise UserError("TTT_ENABLED=1 has nothing to adapt: set a TTT_*_LORA to 1, "
                        "or TTT_ENABLED=0")
    if s.ttt_cache_lambda and not s.ttt_kv_reuse:
        raise UserError(f"TTT_CACHE_LAMBDA={s.ttt_cache_lambda:g} needs cached keys, not "
                        "TTT_KV_REUSE=0: set it to 1")
    if s.ttt_suffix and not s.ttt_kv_reuse:
        raise UserError(f"TTT_SUFFIX={s.ttt_suffix} needs cached keys, not TTT_KV_REUSE=0: "
                        "set it to 1")
    if s.ttt_step_nats and s.ttt_optimizer != "normalised":
        raise UserError(f"TTT_STEP_NATS={s.ttt_step_nats:g} needs TTT_OPTIMIZER=normalised, not "
                        f"{s.ttt_optimizer}: set one of them")


def log_adaptation(s: Settings, run: Run, val: Validation, clock: Clock) -> None:
    """What adapts to what, into the log."""
    lengths = val.documents.length
    *phases, _ = ttt_rounds(s, lengths)
    steps = sum(len(phase_steps(s, int(lengths[phase.train_on].sum()))) for phase in phases)
    learn_from = "none, no step is taken"
    if steps:
        which = {"stream": "first", "length": "longest"}[s.ttt_doc_order]
        learn_from = f"the {which} {len(phases[-1].train_on):,} documents"
    run.log("ttt", order=s.ttt_doc_order, kv_reuse=s.ttt_kv_reuse, optimiser=s.ttt_optimizer,
            base_weights_learn_from=learn_from, base_weight_steps=steps,
            ngram_hints=0 if val.hints is None else len(val.hints.at), elapsed=clock.elapsed())
    if s.phased_ttt_prefix_docs and len(phases) < s.phased_ttt_num_phases:
        run.log("settings_without_effect", PHASED_TTT_NUM_PHASES=f"{len(lengths):,} documents make "
                f"{len(phases)} phases of {s.phased_ttt_num_phases}")


ADAPTED = ("q", "k", "v", "o", "mlp", "head")       # what a TTT_*_LORA switches


class BoundAdapter(NamedTuple):
    """An Adapter unbound for one forward: A and B per kind and slot."""
    a: dict
    b: dict
    scale: float

    def add(self, y: Tensor, kind: str, slot: int, x: Tensor) -> Tensor:
        """y (B, T, out) + scale * x A' B' for x (B, T, in); y itself when this kind
        is not adapted."""
        if kind not in self.a:
            return y
        a = self.a[kind][slot]
        low = F.linear(x, a) if a.dim() == 2 else torch.bmm(x, a.mT)
        return y + self.scale * torch.bmm(low, self.b[kind][slot].mT)


class Adapter:
    """Low-rank adapters for `rows` documents side by side: per kind A (S, rows, r,
    in) uniform(±1/sqrt(in)), the same for each, and B (S, rows, out, r) zero: a fresh
    one changes nothing. S counts executed slots; the head has one. With TTT_SHARED_A
    A is (S, r, in) and frozen."""

    def __init__(self, s: Settings, plan: Plan, rows: int, device="cpu"):
        self.s = s
        self.scale = s.ttt_lora_alpha / s.ttt_lora_rank
        outputs = dict.fromkeys(ADAPTED, s.model_dim)
        outputs.update(k=s.kv_dim, v=s.kv_dim, head=s.vocab_size)
        # no nn.Parameters: torch.compile would make a graph for every number of rows
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for kind, out in outputs.items():
            if not getattr(s, f"ttt_{kind}_lora"):
                continue
            slots = 1 if kind == "head" else plan.slots
            each = (slots,) if s.ttt_shared_a else (slots, rows)
            self.a[kind] = torch.empty(*each, s.ttt_lora_rank, s.model_dim, device=device,
                                       requires_grad=not s.ttt_shared_a)
            self.b[kind] = torch.zeros(slots, rows, out, s.ttt_lora_rank, device=device,
                                       requires_grad=True)
        self.draw_a()

    def parameters(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values()]

    def trained(self) -> list[Tensor]:
        """What a step changes, each (S, rows, …)."""
        return [p for p in self.parameters() if p.requires_grad]

    @torch.no_grad()
    def keep(self, rows: slice) -> None:
        """Go on with these documents only (A is shared)."""
        for kind, b in self.b.items():
            kept = b[:, rows].clone(memory_format=torch.contiguous_format)
            self.b[kind] = kept.requires_grad_()

    @torch.no_grad()
    def draw_a(self) -> None:
        """Fresh A, drawn on the CPU: every device starts from the same numbers."""
        generator = torch.Generator().manual_seed(self.s.seed)
        for a in self.a.values():
            drawn = torch.empty(a.size(0), *a.shape[-2:]).uniform_(-1, 1, generator=generator)
            drawn = drawn / math.sqrt(a.size(-1))
            a.copy_(drawn if self.s.ttt_shared_a else drawn[:, None])

    @torch.no_grad()
    def reset(self) -> None:
        """Start new documents: B back to zero; A kept (warm start) or drawn anew."""
        for b in self.b.values():
            b.zero_()
        if not self.s.ttt_warm_start_a:
            self.draw_a()

    def bind(self, dtype: torch.dtype, head: bool = False) -> BoundAdapter:
        """For one forward: the trunk's, or the head's."""
        def unbound(side: dict) -> dict:
            wanted = [kind for kind in side if (kind == "head") == head]
            return {kind: side[kind].to(dtype).unbind(0) for kind in wanted}
        return BoundAdapter(unbound(self.a), unbound(self.b), self.scale)


class KeyCache:
    """Keys and values that earlier forwards of B documents left behind, cut from
    their graph: per slot (B, P, K, D). The next forward sees `seen` of them, up to
    index `end`; beyond lies the suffix, which it runs again and overwrites. position:
    the document's tokens before the forward; last (B, 2): the nearest of them.
    states: slot STATES keeps final hidden states (B, P, D) of length 1 and the tokens
    that came next (B, P)."""
    STATES = -1

    def __init__(self, window: int, states: bool = False):
        self.window = window
        self.states = states
        self.position = 0
        self.seen = 0
        self.end = 0
        self.last: Tensor | None = None
        self.old: dict[int, tuple[Tensor, Tensor]] = {}
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.sealed: tuple[Tensor, dict] | None = None

    def extend(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that a forward's queries may see, its own last."""
        if slot in self.old:      # cut here: views would need other graphs
            old_k, old_v = self.old[slot]
            first = self.end - self.seen
            k = torch.cat((old_k.narrow(1, first, self.seen), k), dim=1)
            v = torch.cat((old_v.narrow(1, first, self.seen), v), dim=1)
        self.new[slot] = (k.detach(), v.detach())
        return k, v

    def seal(self, ids: Tensor) -> None:
        """The forward over tokens ids (B, T) was scored: the keys it saw are those to
        keep."""
        self.sealed = (ids, self.new)
        self.new = {}

    def advance(self, chunk: int, suffix: int = 0) -> int:
        """The chunk is over. The next forward runs the newest `suffix` tokens again,
        and then `chunk` new ones, on the older keys that the window holds beside
        them; returns how many again. Where fewer than two lie ahead of the suffix,
        all are run, on the graph of a document's beginning; any other length of the
        suffix shares one graph."""
        ids, self.old = self.sealed
        self.sealed = None
        text = ids if self.last is None else torch.cat((self.last, ids), dim=1)
        keys = self.seen + ids.size(1)
        room = self.window - chunk
        again = min(suffix, room)
        self.end = keys - again
        self.seen = min(self.end, room - again)
        self.position += ids.size(1) - again
        if self.seen < 2:
            self.position, self.seen, self.last, self.old = 0, 0, None, {}
            return min(keys, room)
        self.last = text[:, :text.size(1) - again][:, -2:].contiguous()
        return again

    def keep(self, rows: slice) -> None:
        """Go on with these documents only."""
        for slot, (k, v) in self.old.items():
            self.old[slot] = (k[rows].clone(), v[rows].clone())
        if self.last is not None:
            self.last = self.last[rows]


@dataclass(frozen=True)
class Scored:
    """A chunk on the books: adapt() takes nothing else, so it cannot see ahead.
    losses (B, W) with their graph, the chunk's in the last columns; `again`
    recomputes them after a step."""
    losses: Tensor
    chunk: int
    positions: Tensor
    again: Callable[[], Tensor]


# --- which tokens, documents and phases, in which order

class ChunkWindow(NamedTuple):
    """A chunk of B documents, per row: the first input (relative to the document),
    the first scored column, how many are scored (0: it has ended); W columns."""
    begin: np.ndarray
    offset: np.ndarray
    count: np.ndarray
    width: int


def chunk_window(s: Settings, targets: np.ndarray, begin: int, end: int,
                 again: int | None) -> ChunkWindow:
    """The chunk [begin, end) of documents of `targets` (B,), with `again` inputs
    before it. None, without cached keys: what TTT_EVAL_SEQ_LEN reaches from the
    chunk's end; in the field's order from the document's, where that comes first."""
    last = np.minimum(end, targets)
    count = np.maximum(last - begin, 0)
    if again is None:
        known_end = last if s.ttt_doc_order == "length" else end
        first = np.maximum(known_end - s.ttt_eval_seq_len, 0)
        width = min(end, s.ttt_eval_seq_len)
    else:
        first = begin - again
        width = end - first
    first = np.where(count > 0, first, 0)
    offset = np.where(count > 0, begin - first, 0)
    return ChunkWindow(first, offset, count, width)


def chunk_bounds(s: Settings, length: int) -> list[int]:
    """Where the chunks of a group begin whose longest document has `length` tokens,
    and the last one's end. In stream order sizes go by position, so that no later
    document has a say in how an earlier one is cut; in the field's by `length`."""
    steps, bounds = chunk_steps(s), [0]
    if s.ttt_doc_order == "length":
        steps = [(math.inf, next(chunk for bound, chunk in steps if length <= bound))]
    for bound, chunk in steps:
        while bounds[-1] < min(bound, length - 1):
            bounds.append(bounds[-1] + min(chunk, s.ttt_eval_seq_len))
    return bounds


def trained_rows(s: Settings, targets: np.ndarray, end: int) -> np.ndarray:
    """(B,) bool: which documents learn from a chunk ending at `end`: those going on,
    within TTT_TRAIN_*_DOC_LEN; in stream order by the position, as no end is known."""
    most = s.ttt_train_max_doc_len or math.inf
    goes_on = targets > end
    if s.ttt_doc_order == "stream":
        return goes_on & (end < most)
    return goes_on & (targets + 1 >= s.ttt_train_min_doc_len) & (targets < most)


def rows_kept_for(batch: int, live: int) -> int:
    """Rows for `live` documents left: `batch` halved while they fit in, but not to 1,
    a graph of its own."""
    while live <= batch // 2 > 1:
        batch //= 2
    return batch


class Round(NamedTuple):
    """Groups of documents between which no state passes, in the order of work, and
    those on which the base weights are trained afterwards (none in the last)."""
    groups: list[np.ndarray]
    train_on: np.ndarray | None


def grouped(s: Settings, documents: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Documents (their numbers) in groups of at most TTT_BATCH_SIZE of similar
    lengths, longest first. In stream order of about equal size: a single document
    would need a graph of its own."""
    if not len(documents):
        return []
    order = documents[np.argsort(lengths[documents], kind="stable")]
    size = s.ttt_batch_size
    cuts = range(size, len(order), size) if s.ttt_doc_order == "length" else -(-len(order) // size)
    return sorted(np.array_split(order, cuts), key=lambda group: -lengths[group].max())


def ttt_rounds(s: Settings, lengths: np.ndarray) -> list[Round]:
    """The groups of all documents, cut at the phases. TTT_DOC_ORDER=stream: round i
    holds the i-th part of the stream's first documents, so that none is influenced by
    a later one. length: as in the field the longest come first, and a phase trains on
    the shortest groups scored so far."""
    phases = s.phased_ttt_num_phases if s.phased_ttt_prefix_docs else 0
    bounds = [s.phased_ttt_prefix_docs * (i + 1) // phases for i in range(phases)]
    everything, rounds = np.arange(len(lengths)), []
    if s.ttt_doc_order == "stream":
        begin = 0
        for end in bounds:
            if begin < end <= len(lengths):
                rounds.append(Round(grouped(s, everything[begin:end], lengths), everything[:end]))
                begin = end
        return rounds + [Round(grouped(s, everything[begin:], lengths), None)]
    current, done = [], []
    for group in grouped(s, everything, lengths):
        current.append(group)
        done.append(group)
        if len(rounds) < phases and sum(map(len, done)) >= bounds[len(rounds)]:
            by_length = np.concatenate(sorted(done, key=lambda g: lengths[g].max()))
            rounds.append(Round(current, by_length[:bounds[len(rounds)]]))
            current = []
    return rounds + [Round(current, None)]


# --- one step

# Nats off its own chunk's loss beyond which a step's promise is not believed, and what it is then cut to.
# A trained 135M model on cached keys gained most at .3 to .6 and lost from 2 on; encoded exactly, by AdamW,
# it still gained at 2.7.
MOST_NATS, MOST_NATS_ADAM, SAFE_NATS = 1.25, 4.0, 0.3
MOST_RATE = 0.01       # of TTT_STEP_NATS, where gradients vanish; toy models liked .008


@torch.no_grad()
def normalised_step(s: Settings, params: list[Tensor], losses: Tensor) -> Tensor:
    """A step of every document's matrices (S, rows, R, C), each along its gradient
    over the gradient's RMS: no state. To first order a rate of 1 lowers the document's
    loss (rows,) by the sum of N * RMS over its matrices of N entries. The rate is
    TTT_LORA_LR, or what promises TTT_STEP_NATS, though no more than a quarter of the
    loss. Returns which rows (bool) were shortened."""
    sizes = [p.grad.square().mean(dim=(-2, -1)).sqrt() for p in params]
    promised = torch.zeros_like(losses)
    for p, size in zip(params, sizes):
        promised += p.size(-2) * p.size(-1) * size.sum(0)
    if s.ttt_step_nats:
        fall = (losses / 4).clamp(max=s.ttt_step_nats)
        rates = (fall / promised.clamp(min=1e-30)).clamp(max=MOST_RATE)
        shortened = torch.zeros_like(promised, dtype=torch.bool)
    else:
        lr = s.ttt_lora_lr * s.ttt_local_lr_mult
        shortened = lr * promised > MOST_NATS
        rates = torch.where(shortened, SAFE_NATS / promised, lr)
    for p, size in zip(params, sizes):
        p.mul_(1 - rates[:, None, None] * s.ttt_weight_decay)
        p.addcmul_(p.grad, (rates / (size + 1e-12))[..., None, None], value=-1)
    return shortened


@torch.no_grad()
def optimiser_step(optimiser: torch.optim.Optimizer, params: list[Tensor]) -> Tensor:
    """The optimiser's step, to the bit; but where it promises a document more than
    MOST_NATS_ADAM, the part of it that promises SAFE_NATS. Returns where (rows,)."""
    before = [p.clone() for p in params]
    optimiser.step()
    moves = [((old - p) * p.grad).sum(dim=(0, 2, 3)) for p, old in zip(params, before)]
    promise = torch.stack(moves).sum(0)
    shortened = promise > MOST_NATS_ADAM
    part = (SAFE_NATS / promise)[:, None, None]
    for p, old in zip(params, before):
        p.copy_(torch.where(shortened[:, None, None], torch.lerp(old, p, part), p))
    return shortened


# --- the evaluation

# What the watchdog gives up, more at each level, when the evaluation would outlast its budget.
GIVE_UP = ("nothing", "further phases on the base weights", "phases and two thirds of TTT_SUFFIX",
           "phases and TTT_SUFFIX", "phases and adaptation")
NO_ADAPTATION = len(GIVE_UP) - 1
WATCH_EVERY = 8             # chunks between two looks at the clock


def suffixes(s: Settings) -> tuple[int, ...]:
    """Tokens that are run again at every level of GIVE_UP."""
    return s.ttt_suffix, s.ttt_suffix, s.ttt_suffix // 3, 0, 0


class PhasedTTT:
    """Score-first phased test-time training: each document has its own adapter, which
    booked chunks alone adapt; between rounds the base weights are trained on whole
    booked documents. clock: the evaluation's, watched so that every target is scored
    in time. trace(event, **values) observes: lora, reset, chunk, sgd_step, phase,
    give_up, warning."""

    def __init__(self, s: Settings, world: World, model: GPT, val: Validation, trace: Callable | None = None,
                 clock: Clock | None = None, ledger: Ledger | None = None):
        self.s, self.world, self.model, self.val = s, world, model, val
        self.trace = trace or (lambda event, **values: None)
        self.clock = clock
        self.plan = layer_plan(s, True)
        self.lengths = val.documents.length
        self.losses = compiled(s, world.device, model.losses, fullgraph=True, dynamic=True)
        self.ledger = ledger or Ledger(val, world.device)
        self.level = 0
        self.kept: Adapter | None = None
        self.shortened = torch.zeros((), dtype=torch.int64, device=world.device)
        self.spent = 0.0            # seconds of adaptation, without phases and waiting
        self.done = 0.0             # token-passes in them
        self.left = np.zeros(len(GIVE_UP))      # those still to do, at every level
        self.phase_pace = 0.0       # seconds a token of a phase
        self.phase_tokens = 0       # still to train on

    def costs(self, group: np.ndarray) -> np.ndarray:
        """Predicted token-passes of a group at every level; a backward is two."""
        s, longest = self.s, int(self.lengths[group].max())
        bounds = np.array(chunk_bounds(s, longest))
        window = np.minimum(bounds[1:], s.ttt_eval_seq_len)
        columns = np.tile(window, (len(GIVE_UP), 1))
        if s.ttt_kv_reuse:
            columns = np.minimum(window, np.diff(bounds) + np.array(suffixes(s))[:, None])
        passes = 3.0 * columns.sum(1)
        passes[NO_ADAPTATION] = longest
        return len(group) * passes

    def own_share(self, groups: list[np.ndarray]) -> list[np.ndarray]:
        """This rank's share of the groups."""
        costs = [self.costs(group)[self.level] for group in groups]
        share = share_out(costs, self.world.size)[self.world.rank]
        return [groups[i] for i in sorted(share)]

    def run(self) -> Score:
        """Score every document once; the weights stay as the last phase left them."""
        rounds = ttt_rounds(self.s, self.lengths)
        shares = [self.own_share(r.groups) for r in rounds]
        self.left = sum(map(self.costs, itertools.chain(*shares)), self.left)
        self.phase_tokens = sum(int(self.lengths[r.train_on].sum()) for r in rounds[:-1])
        self.model.requires_grad_(False)        # but in a phase
        for r, share in zip(rounds, shares):
            self.begin_round()
            for group in share:
                self.adapt_group(group)
            level = max(self.world.gather(self.level))      # all take part in a phase or none
            if level > self.level:
                self.give_up(level, by="another rank")
            if r.train_on is not None and self.level == 0:
                self.phase(r.train_on)
        self.model.requires_grad_(True)
        shortened = int(self.world.total(self.shortened))
        if shortened:
            self.trace("warning", text=f"{shortened:,} adapter steps promised more than this model can "
                       "gain and were shortened: lower TTT_LORA_LR, or set TTT_STEP_NATS=0.5")
        return self.ledger.close(self.world)

    def begin_round(self) -> None:
        """Nothing passes from round to round; within one, A may."""
        self.kept = None
        if self.s.ttt_doc_order == "length" and not self.s.ttt_shared_a:
            self.kept = self.adapter_for(self.s.ttt_batch_size)

    def watch(self) -> None:
        """Give up as little as lets the predicted end lie within EVAL_MAX_SECONDS."""
        if self.clock is None or not self.clock.budget:
            return
        now = self.clock.elapsed()
        pace = self.spent / self.done if self.done else 0.0
        ends = now + pace * self.left
        ends[0] += self.phase_pace * self.phase_tokens
        fits = (i for i in range(self.level, NO_ADAPTATION) if ends[i] < self.clock.budget)
        level = next(fits, NO_ADAPTATION)
        if level > self.level:
            self.give_up(level, elapsed=now, predicted_end=ends[self.level])

    def give_up(self, level: int, **why) -> None:
        """From now on do without what GIVE_UP names at this level."""
        self.trace("give_up", what=GIVE_UP[level], **why)
        self.level = level

    def count_work(self, work: np.ndarray, since: Clock) -> None:
        """Work of these costs is done: update the prediction and act on it."""
        sync(self.world.device)
        self.spent += since.elapsed()
        self.done += work[self.level]
        self.left = self.left - work
        self.watch()

    def adapter_for(self, rows: int) -> Adapter:
        """The kept one, reset, where it has as many rows; else a fresh one."""
        if self.kept is not None and rows == self.s.ttt_batch_size:
            self.kept.reset()
            self.trace("reset", adapter=self.kept)
            return self.kept
        adapter = Adapter(self.s, self.plan, rows, self.world.device)
        self.trace("lora", adapter=adapter)
        return adapter

    def optimiser(self, adapter: Adapter) -> torch.optim.Optimizer | None:
        """AdamW over a group's adapters; none for the stateless rule."""
        s = self.s
        if s.ttt_optimizer == "normalised":
            return None
        lr = s.ttt_lora_lr * s.ttt_local_lr_mult
        fused = self.world.device.type == "cuda"
        return torch.optim.AdamW(adapter.trained(), lr, (s.ttt_beta1, s.ttt_beta2), eps=1e-10,
                                 weight_decay=s.ttt_weight_decay, fused=fused)

    def adapt_group(self, group: np.ndarray) -> None:
        """Score a group's documents chunk by chunk, adapting those that go on."""
        self.watch()
        s, learns = self.s, self.level < NO_ADAPTATION
        starts, targets = self.val.documents.start[group], self.lengths[group] - 1
        if len(group) == 1 < s.ttt_batch_size:      # an empty row beside it: a graph less
            starts, targets = np.repeat(starts, 2), np.append(0, targets)
        adapter = self.adapter_for(len(starts)) if learns else None
        optimiser = self.optimiser(adapter) if learns else None
        cached = s.ttt_kv_reuse or not learns
        cache = KeyCache(s.ttt_eval_seq_len, states=s.ttt_cache_lambda > 0) if cached else None
        shrinks = cached and optimiser is None and (s.ttt_shared_a or not learns)
        bounds = chunk_bounds(s, int(self.lengths[group].max()))
        costs, counted, since = self.costs(group), 0, Clock()
        for n, (begin, end) in enumerate(zip(bounds, bounds[1:]), start=1):
            self.world.beat(f"adapting to chunk {n} of {len(group)} documents")
            again = 0 if cached else None
            if cached and begin:
                again = cache.advance(end - begin, suffixes(s)[self.level])
            live = int((targets > begin).sum())
            kept = rows_kept_for(s.ttt_batch_size, live)
            if shrinks and kept < len(targets):         # the longest documents come last
                rows = slice(-kept, None)
                starts, targets = starts[rows], targets[rows]
                for keeper in (cache,) if adapter is None else (cache, adapter):
                    keeper.keep(rows)
            with torch.set_grad_enabled(adapter is not None):       # at every level: a graph less
                window = chunk_window(s, targets, begin, end, again)
                scored = self.score_chunk(starts, window, adapter, cache)
                later = trained_rows(s, targets, end)
                if later.any() and self.level < NO_ADAPTATION:
                    self.adapt(adapter, optimiser, scored, self.on_device(later))
            if n % WATCH_EVERY == 0 or end == bounds[-1]:
                self.count_work(costs * (end - counted) / bounds[-1], since)
                counted, since = end, Clock()

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.world.device)

    def score_chunk(self, starts: np.ndarray, w: ChunkWindow, adapter: Adapter | None,
                    cache: KeyCache | None) -> Scored:
        """One forward over the chunk and its context; booked before anything learns."""
        column = np.arange(w.width)
        valid = column < (w.offset + w.count)[:, None]
        at = np.where(valid, (starts + w.begin)[:, None] + column, 0)
        x, y = (self.on_device(np.where(valid, tokens[at], 0).astype(np.int64))
                for tokens in (self.val.tokens, self.val.targets))

        def forward(x: Tensor = x, y: Tensor = y) -> Tensor:
            return self.losses(x, y, self.plan, None, adapter, None, cache)

        losses, booked = tilted_losses(self.s, forward, x, y, at, self.val.hints)
        if cache is not None and cache.states:
            booked = mixed_with_cache(self.s, booked, cache)
        counted = valid & (column >= w.offset[:, None])
        positions = self.on_device(at[counted])
        keep = self.on_device(np.flatnonzero(counted))
        self.ledger.book(positions, booked.flatten()[keep])
        if cache is not None:      # of the forward that was scored, whatever the steps do
            cache.seal(x)
        self.trace("chunk", x=x, y=y, losses=booked.detach(), offsets=w.offset, counts=w.count, width=w.width,
                   at=at, counted=counted)
        return Scored(losses, int(w.count.max()), positions, forward)

    def adapt(self, adapter: Adapter, optimiser: torch.optim.Optimizer | None, scored: Scored,
              later: Tensor) -> None:
        """TTT_GRAD_STEPS steps of the documents in `later` on their booked chunk."""
        self.ledger.require(scored.positions)
        losses, trained = scored.losses, adapter.trained()
        for step in range(self.s.ttt_grad_steps):
            if step:
                losses = scored.again()
            of_chunk = losses[:, -scored.chunk:].mean(dim=1) * later
            of_chunk.sum().backward(inputs=trained)
            if optimiser is None:
                shortened = normalised_step(self.s, trained, of_chunk.detach())
            else:
                shortened = optimiser_step(optimiser, trained)
            self.shortened += shortened.sum()
            for p in trained:      # at once: tensors that have one are a graph more
                p.grad = None

    # --- the base weights

    def phase(self, documents: np.ndarray) -> None:
        """Train the base weights on these documents, all of them booked."""
        booked, clock = self.ledger.booked(documents, self.world), Clock()
        self.global_phase(booked)
        sync(self.world.device)
        self.phase_pace = clock.elapsed() / len(booked.tokens)
        self.phase_tokens -= int(self.lengths[documents].sum())

    def global_phase(self, booked: Booked) -> None:
        """SGD on all base weights over booked documents."""
        tokens = booked.tokens
        chunks = -(-(len(tokens) - 1) // self.s.global_ttt_chunk_tokens)
        params = self.model.requires_grad_(True).parameters()
        optimiser = torch.optim.SGD(params, momentum=self.s.global_ttt_momentum)
        for c, begin, end in phase_steps(self.s, len(tokens)):
            self.world.beat(f"adapting the base weights, chunk {c + 1}")
            optimiser.param_groups[0]["lr"] = self.global_lr(c, chunks)
            self.global_step(tokens[begin:end + 1], optimiser)
        self.model.requires_grad_(False)
        self.trace("phase", model=self.model, tokens=tokens)

    def global_lr(self, c: int, chunks: int) -> float:
        """Learning rate of chunk c: a cosine to the last chunk."""
        return self.s.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * c / max(chunks - 1, 1)))

    def global_step(self, tokens: np.ndarray, optimiser: torch.optim.SGD) -> None:
        """One momentum step on a run of tokens, which the ranks share by whole
        documents, or rows."""
        s, world, total = self.s, self.world, len(tokens) - 1
        starts = np.unique(np.append(self.row_starts(tokens), (0, total)))
        fair = np.array([world.rank, world.rank + 1]) * total // world.size
        begin, end = starts[np.searchsorted(starts, fair)]
        loss = torch.zeros((), device=world.device)
        if end > begin:
            batch = self.rows_of(tokens[begin:end + 1]).to(world.device)
            losses = self.model.losses(batch.x, batch.y, self.plan, batch.layout(batch.max_seqlen))
            loss = losses.sum() / total
            loss.backward()
        norm = total_gradients(world, self.model, s.global_ttt_grad_clip)
        optimiser.step()
        optimiser.zero_grad()
        self.trace("sgd_step", loss=world.total(loss.detach().clone()), n_tokens=total, grad_norm=norm,
                   lr=optimiser.param_groups[0]["lr"])

    def row_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where a run of tokens may be cut for the ranks: at its documents."""
        return np.flatnonzero(tokens[:-1] == BOS)

    def rows_of(self, tokens: np.ndarray) -> Batch:
        """The batch of a rank's tokens: packed documents of at most EVAL_SEQ_LEN."""
        return packed_batch(tokens, self.s.eval_seq_len)


def total_gradients(world: World, model: GPT, clip: float) -> Tensor:
    """Sum all gradients over the ranks and clip their norm (0: no clipping); returns
    the norm before."""
    for p in model.parameters():
        p.grad = world.total(torch.zeros_like(p) if p.grad is None else p.grad)
    return nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)


def phase_steps(s: Settings, tokens: int) -> list[tuple[int, int, int]]:
    """The steps of the base weights in a phase over so many tokens: chunk, first
    input, end. As published the last chunk is left out, unless it is alone."""
    size, length, steps = s.global_ttt_chunk_tokens, s.eval_seq_len, []
    chunks = -(-(tokens - 1) // size)
    for c in range(max(chunks - 1, 1)):
        rows = min(size, tokens - 1 - c * size) // length
        firsts = list(range(0, rows, s.global_ttt_batch_seqs))
        cuts = [c * size + row * length for row in (*firsts, rows)]
        steps += s.global_ttt_epochs * [(c, *pair) for pair in zip(cuts, cuts[1:])]
    return steps


# --- beside the adapters

@torch.no_grad()
def mixed_with_cache(s: Settings, losses: Tensor, cache: KeyCache) -> Tensor:
    """Losses (B, T) once the model's probability p is mixed with what earlier places
    of the document say. Place i says the token that came after it, with weight a_i =
    exp(TTT_CACHE_THETA (cos(h_i, h_t) - 1)); all together count w = min(0.6,
    TTT_CACHE_LAMBDA max a_i): (1 - w) p + w sum(a_i [i's token is the target]) /
    sum(a_i), which sums to 1 over the vocabulary."""
    past, said = cache.new[cache.STATES]
    h, targets = (x[:, -losses.size(1):] for x in (past, said))
    place = torch.arange(past.size(1), device=h.device)
    earlier = place < place[-h.size(1):, None]          # what came after t itself is the target
    a = torch.exp(s.ttt_cache_theta * (h.float() @ past.float().mT - 1)) * earlier
    agrees = said[:, None] == targets[..., None]
    chance = (a * agrees).sum(-1) / a.sum(-1).clamp(min=1e-30)
    w = (s.ttt_cache_lambda * a.amax(-1)).clamp(max=0.6)
    return -torch.log((1 - w) * torch.exp(-losses) + w * chance)


# ============================================================================================================
# PART TWO: machinery behind plain doors. A reader may stop before it.
# ============================================================================================================


# ============================================================================================================
# 9  World, clocks, log, and what is kept on disk
# ============================================================================================================

def check_run(s: Settings) -> None:
    """Refuse stages that exclude each other, and to go on where it cannot be done."""
    if s.eval_only_path and s.eval_only_quantized_path:
        raise UserError(f"EVAL_ONLY_PATH={s.eval_only_path} and EVAL_ONLY_QUANTIZED_PATH="
                        f"{s.eval_only_quantized_path} are both set: keep one")
    if s.quantize_only and s.prequant_only:
        raise UserError("QUANTIZE_ONLY=1 and PREQUANT_ONLY=1 leave nothing to make: keep one")
    if s.eval_only_quantized_path and (s.quantize_only or s.prequant_only):
        raise UserError(f"EVAL_ONLY_QUANTIZED_PATH={s.eval_only_quantized_path} scores an artifact, "
                        "which QUANTIZE_ONLY and PREQUANT_ONLY leave out: set both to 0")
    budget, every = s.max_wallclock_seconds, s.checkpoint_every_seconds
    if every and budget:
        raise UserError(f"CHECKPOINT_EVERY_SECONDS={every:g} has no effect under "
                        f"MAX_WALLCLOCK_SECONDS={budget:g}: a run with a budget keeps averages; "
                        "set one of them to 0")
    if not s.resume:
        return
    if budget:
        raise UserError(f"RESUME=1 would spend MAX_WALLCLOCK_SECONDS={budget:g} twice: a run with a "
                        "budget goes on by EVAL_ONLY_PATH=…/checkpoint/average.pt")
    if s.eval_only_path or s.eval_only_quantized_path:
        raise UserError("RESUME=1 trains: leave EVAL_ONLY_PATH and EVAL_ONLY_QUANTIZED_PATH out")
    if not s.artifact_dir:
        raise UserError("RESUME=1 goes on in a folder: set ARTIFACT_DIR to that of the run")


def without_old_names(env: Mapping[str, str], known: Mapping) -> dict[str, str]:
    """The variables under today's names; without empty ones (but where an empty text
    means something) and without those that set nothing here."""
    env = {k: v for k, v in env.items() if v or (k in known and is_free_text(known[k]))}
    for name, (only, why) in NO_SETTINGS.items():
        value = env.pop(name, "")
        if name == "EMBEDDING_DIM" and is_number(env.get("MODEL_DIM", "")):
            only = float(env["MODEL_DIM"])
        if value and only is not None and (float(value) if is_number(value) else value) != only:
            raise UserError(f"{name}={value} is not to be had here, only {only}: {why}")
    for old, names in ALIASES.items():
        if value := env.pop(old, ""):
            meant = dict(zip(names.split(), translate(old, value)))
            env = {**meant, **env}      # a setting's own name counts
    if any(env.get(name, idle) != idle for name, idle in BY_HAND.items()):
        env.setdefault("QUANT_ALLOCATION", "hand")
    return env


def refuse_misspelt(env: Mapping[str, str], known: Mapping) -> None:
    """UserError for a variable that must have been meant for this script, with the
    nearest right name."""
    for name in env:
        if name not in known and (nearest := looks_like_ours(name, known)) is not None:
            raise UserError(f"unknown setting {name}: the nearest known one is {nearest} "
                            "(python train_gpt.py --help lists all); if it is of another program, "
                            f"start this one by: env -u {name} python train_gpt.py")


def set_up(s: Settings, world: World) -> str:
    """Seeds, arithmetic, attention backend: once per process. Returns why this
    backend."""
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high" if world.device.type == "cuda" else "highest")
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launcher_ranks(os.environ).local_size))
    torch._dynamo.config.recompile_limit = 64      # plans, grad modes and batch shapes share one code object
    torch.fx.experimental._config.use_duck_shape = False       # sizes that are equal by chance stay apart
    global ATTENTION
    ATTENTION, why = resolve_attention(s.attn_backend, world.device)
    names = world.gather(ATTENTION)
    if len(set(names)) > 1:
        raise UserError(f"the ranks would use different attention kernels {names}; this one: {why}. Set "
                        "ATTN_BACKEND to one that runs everywhere")
    return why


def pick_dtype(choice: str, device: torch.device, default: torch.dtype | None = None) -> torch.dtype:
    """The dtype a setting names; auto: `default`, else bfloat16 on a GPU and float32
    on a CPU."""
    if choice == "auto":
        return default or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return getattr(torch, choice)


def compiles(s: Settings, device: torch.device) -> bool:
    """Whether to use torch.compile. Plain attention, which float32 takes too, cannot
    be traced."""
    plain = ATTENTION == "plain" or pick_dtype(s.compute_dtype, device) == torch.float32
    if s.compile == "1" and plain:
        raise UserError("COMPILE=1 cannot trace plain attention (ATTN_BACKEND=plain, a CPU, or COMPUTE_DTYPE="
                        "float32): set COMPILE=auto")
    return s.compile != "0" and device.type == "cuda" and not plain


def compiled(s: Settings, device: torch.device, fn: Callable, **options) -> Callable:
    """fn through torch.compile where that is wanted."""
    return torch.compile(fn, **options) if compiles(s, device) else fn


def build_model(s: Settings, world: World) -> GPT:
    """The seeded model on this rank's device: every rank draws the same weights."""
    model = GPT(s, torch.Generator().manual_seed(s.seed)).to(world.device)
    model.compute_dtype = pick_dtype(s.compute_dtype, world.device)
    return model


def is_free_text(f) -> bool:
    """Whether an empty value means something: not for numbers, flags and choices."""
    return type(f.default) is str and not f.metadata["choices"]


def is_number(text: str) -> bool:
    """True when float() reads it as a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def whole_number(text: str) -> int | None:
    """The whole number that the text writes, exactly; 1e3 is one too. None when it
    writes none."""
    if re.fullmatch(r" *[+-]?[0-9][0-9_]{0,29} *", text):
        return int(text.replace("_", ""))
    if len(text) > 40 or not is_number(text):
        return None
    value = decimal.Decimal(text.strip().replace("_", ""))
    return int(value) if value == value.to_integral_value() else None


def whole_numbers(text: str) -> list[int]:
    """The numbers of "9,10": 0 to a thousand million, at most 64; none when the text
    is anything else."""
    parts = text.replace(" ", "").split(",")
    good = len(parts) <= 64 and all(re.fullmatch("[0-9]{1,9}", part) for part in parts)
    return [int(part) for part in parts] if good else []


def parse_setting(f, text: str):
    """The typed value of one setting; UserError with value, bound and remedy when it
    is not one."""
    name, meta, kind = f.name.upper(), f.metadata, type(f.default)
    choices = ("0", "1") if kind is bool else meta["choices"]
    if choices and text not in choices:
        raise UserError(f"{name}={text} must be {' or '.join(choices)}")
    if kind is bool:
        return text == "1"
    if kind is str:
        return parse_text(name, text, meta["hi"])
    value = whole_number(text) if kind is int else float(text) if is_number(text) else None
    if value is None:
        raise UserError(f"{name}={text} must be {'a whole number' if kind is int else 'a number'}")
    lo, hi = meta["lo"], meta["hi"]
    if not lo <= value <= hi:
        raise UserError(f"{name}={text} is out of range: it must be at least {lo} and at most {hi}")
    return value


def parse_text(name: str, text: str, most: int) -> str:
    """A setting that is text, a path with ~ expanded; UserError for what no file or
    log line can be named."""
    bad = ""
    if len(text) > most or not text.isprintable():
        bad = f"be at most {most:,} printable characters"
    elif name == "RUN_ID" and (len(text) > 100 or text[:1] == "." or set(text) & set("/\\")):
        bad = "be the name of a folder: at most 100 characters, no slash and no dot in front"
    elif name.endswith(("_PATH", "_DIR")):
        text = os.path.expanduser(text)
        if text[:1] == "~":
            bad = "begin with another folder: there is no such user; a folder of that name is ./~"
        elif any(len(os.fsencode(part)) > 255 for part in text.split("/")):
            bad = "have names of at most 255 bytes in it: choose a shorter one"
    if bad:
        raise UserError(f"{name}={text[:80]} must {bad}")
    return text


MOST_SLOTS = 1024             # executed layers
MOST_ORDER = 64               # of an n-gram
MOST_WEIGHTS = 2 ** 31        # of a model

BY_HAND = {"AWQ_LITE_ENABLED": "0"}     # what changes steps that are set by hand -> its idle value
LEFT_OUT = "left out: no published system gained by it"
# Names of the field's commands that set nothing here: (the one value they may have, None: any; why).
NO_SETTINGS = {name: (only, why) for only, why, names in (
    (None, "lossless all of them: our own coder takes their place", "COMPRESSOR"),
    (None, "always so: all targets are scored, by the calibrated loss, hints on the clock, graphs warmed up",
     "EVAL_INCLUDE_TAIL LOGIT_CALIB_APPLY_TTT_UPDATE NGRAM_HINT_PRECOMPUTE_OUTSIDE COMPILE_SHAPE_WARMUP "
     "COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_LOOP_MODES"),
    (None, "the field's scripts get nothing from it either",
     "ROPE_TRAIN_SEQ_LEN TTT_EVAL_BATCHES MUON_BETA2 SWA_ENABLED SWA_EVERY CONTROL_TENSOR_NAME_PATTERNS"),
    (None, "part of something left out",
     "GLOBAL_TTT_MUON_NESTEROV GLOBAL_TTT_MUON_NS_STEPS MUON_HUBER_DELTA TTT_OUTPUT_DIR "
     "TTT_HEARTBEAT_SECONDS TTT_SHORT_BETA2 TTT_SHORT_LORA_LR TTT_SHORT_LORA_RANK TTT_SHORT_WEIGHT_DECAY "
     "TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_MOMENTUM"),
    (0, LEFT_OUT, "DTG_ENABLED FORCE_STOP_STEP GATED_ATTENTION GATED_XSA GLOBAL_TTT_DOC_LIMIT "
     "GRAD_CENTRALIZE LABEL_SMOOTH LAWA_ENABLED LR_FLOOR MIDRUN_CAP_LOG_UPDATES MTP_NUM_HEADS "
     "MUON_HUBER_WD OPTROT_ENABLED QAT_ENABLED SLOT_ENABLED TRIGRAM TTT_DOC_LIMIT "
     "TTT_GRAD_STEPS_CLEAN TTT_LORA_EMA_DECAY TTT_SHORT_LORA_ENABLED TTT_WARM_START_MEAN_ENABLED "
     "VALUE_RESIDUAL"),
    (1, LEFT_OUT, "WD_TAPER_FINAL_MULT"), ("sgd", LEFT_OUT, "GLOBAL_TTT_OPTIMIZER"),
    (0, "set EVAL_ONLY_QUANTIZED_PATH to the artifact instead", "TTT_EVAL_ONLY"),
    (0, "set WARMDOWN_FRAC to its share of the steps you expect", "WARMDOWN_ITERS"),
    (1, "built in", "GPTQ_ENABLED USE_GPTQ SDCLIP_ENABLED TTT_UPDATE_EVERY"),
    (0, "built in", "SPARSE_ATTN_GATE_INIT_STD"), (0.01, "built in", "GATED_ATTN_INIT_STD"),
    (512, "embeddings are as wide as the model", "EMBEDDING_DIM"),
    ("wallclock", "always by the training budget", "TRAIN_SEQ_SCHEDULE_MODE"),
) for name in names.split()}
ALIASES = {   # old name -> the settings it stands for
    "PHASED_TTT_ENABLED": "TTT_ENABLED", "TTT_MASK": "TTT_Q_LORA TTT_V_LORA",
    "RECUR_LAYERS": "LOOP_START LOOP_END NUM_LOOPS",
    "SDCLIP_K": "MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS",
    "SDCLIP_K_INT6": "MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS",
    "SDCLIP_K_EMBED": "EMBED_CLIP_SIGMAS", "SDCLIP_K_INT8": "EMBED_CLIP_SIGMAS",
    "QUANT_CLIP_RANGE": "MATRIX_BITS", "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
    "GPTQ_CALIB_SAMPLES": "GPTQ_CALIBRATION_BATCHES", "GPTQ_CALIB_BATCHES": "GPTQ_CALIBRATION_BATCHES",
    "GPTQ_RESERVE_MS": "GPTQ_RESERVE_SECONDS"}
TTT_MASKS = {"all": "11", "baseline_all": "11", "no_q": "01", "no_v": "10", "no_qv": "00"}   # adapt Q, V


CUT_OFF = "older systems need more, which a lean script leaves out: run the whole one"


def translate(old: str, value: str) -> Sequence[str]:
    """The values of the settings that an old name stands for."""
    try:
        if old == "RECUR_LAYERS":      # they run once more after the last of them
            layers = whole_numbers(value)
            if all(b == a + 1 for a, b in zip(layers, layers[1:])):
                return str(layers[0]), str(layers[-1]), "1"
            raise ValueError
        if old == "QUANT_CLIP_RANGE":
            return str(int(math.log2(int(value))) + 2),
        if old == "GPTQ_RESERVE_MS":
            return str(float(value) / 1e3),
        return TTT_MASKS[value] if old == "TTT_MASK" else [value] * 3
    except (LookupError, ValueError) as error:
        forms = {"RECUR_LAYERS": "consecutive layers, as 3,4,5", "TTT_MASK": f"one of {', '.join(TTT_MASKS)}"}
        raise UserError(f"{old}={value} must be {forms.get(old, 'a whole number')}") from error


# First words of settings that other programs' variables begin with as well.
COMMON_WORDS = set("""
    adam agree artifact asym attn awq beta1 beta2 checkpoint code compile compute data embed enable
    eval fit fused gate gated global grad head label late logit matrix max min model num parallel
    quant resume run scalar seed seq skip sliding tie token tokenizer train val vocab warmup word""".split())
# Last words of the variables of images, schedulers and launchers.
PLATFORM_WORDS = set("""
    addr address auth cache compiler count cpus data device devices dir file gpus home host hosts
    https id image ip job jobs key mode name node nodes path pid pod port ports procs rank region
    root secret seq service set size threads token type url user uuid version workers""".split())
# What others call a setting of ours, and its name here.
OTHER_NAMES = {name: ours for ours, names in {
    "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR": "LR LEARNING_RATE MUON_LR ADAM_LR MAX_LR",
    "MUON_WD, EMBED_WD and ADAM_WD": "WD WEIGHT_DECAY",
    "TRAIN_BATCH_TOKENS": "BATCH BATCH_SIZE TOTAL_BATCH_SIZE TRAIN_BATCH_SIZE DEVICE_BATCH_SIZE",
    "ITERATIONS or MAX_WALLCLOCK_SECONDS": "STEPS NUM_STEPS MAX_STEPS NUM_ITERS MAX_ITERS EPOCHS",
    "TRAIN_SEQ_LEN and EVAL_SEQ_LEN": "SEQ_LEN BLOCK_SIZE CONTEXT_LENGTH MAX_SEQ_LEN",
    "NUM_LAYERS": "N_LAYER N_LAYERS LAYERS DEPTH", "MODEL_DIM": "DIM N_EMBD D_MODEL WIDTH",
    "NUM_HEADS": "N_HEAD N_HEADS HEADS", "GRAD_CLIP_NORM": "GRAD_CLIP CLIP_NORM",
}.items() for name in names.split()}


def our_words() -> set[str]:
    """First words that only settings of ours have."""
    return {f.name.split("_")[0] for f in fields(Settings) if "_" in f.name} - COMMON_WORDS


def looks_like_ours(name: str, known: Mapping) -> str | None:
    """The nearest known setting when `name` must have been meant for this script,
    else None. It is nearly a setting's, or made of our words alone and ends in none
    of a platform's."""
    if name in OTHER_NAMES:
        return None
    words = name.lower().split("_")
    if {"port", "service"} & set(words[1:]):      # of a scheduler's services
        return None
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.86 if len(name) > 4 else 1.0)
    if words[-1] in PLATFORM_WORDS:
        return close[0] if close and words[-1] in close[0].lower().split("_")[-1] else None
    if not close and len(words) > 1 and name.isupper():
        ours = {word for other in (*known, *NO_SETTINGS) for word in other.lower().split("_")}
        if words[0] in our_words() or ours.issuperset(words):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None


def stray_names(env: Mapping[str, str]) -> dict[str, str]:
    """Variables that nothing here reads though they are like settings, or what others
    call them, and what to say of each; twenty at most. from_env refuses those that
    must have been meant."""
    known = {f.name.upper() for f in fields(Settings)}
    begins = our_words() | COMMON_WORDS
    strays = {}
    for name in sorted(set(env) - known - {*NO_SETTINGS, *ALIASES}):
        like_ours = "_" in name and name.isupper() and name.split("_")[0].lower() in begins
        if name in OTHER_NAMES:
            strays[name] = f"not read; here it is {OTHER_NAMES[name]}"
        elif like_ours or difflib.get_close_matches(name, known, cutoff=0.84):
            strays[name] = "not read; no setting"
    return dict(itertools.islice(strays.items(), 20))


def print_help() -> None:
    """Every setting with default, range and meaning."""
    print(__doc__.split("Chapters")[0])
    for f in fields(Settings):
        meta = f.metadata
        if meta["group"]:
            print(f"\n{meta['group'].upper()}")
        bounds = "|".join(meta["choices"])
        if type(f.default) in (int, float):
            bounds = f"{meta['lo']:g} to {meta['hi']:g}"
        default = int(f.default) if isinstance(f.default, bool) else f.default
        print(f"  {f.name.upper():34} {default!s:>10}  {meta['doc']}" + (f"  [{bounds}]" if bounds else ""))
    print("\nACCEPTED OLD NAMES")
    for old, names in ALIASES.items():
        print(f"  {old:34} read as {names.replace(' ', ', ')}")
    for name, (only, why) in NO_SETTINGS.items():
        if why != CUT_OFF:
            print(f"  {name:34} {'no effect' if only is None else f'only {only}'}: {why}")


class Ranks(NamedTuple):
    """What the launcher tells a process: its number, how many there are, and both on
    this machine."""
    rank: int
    size: int
    local: int
    local_size: int


def launcher_ranks(env: Mapping[str, str]) -> Ranks:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process without them.
    UserError when they do not fit together, or the other ranks could not be found."""
    remedy = ("start by torchrun, or without them: env -u RANK -u WORLD_SIZE -u LOCAL_RANK "
              "-u LOCAL_WORLD_SIZE python train_gpt.py")

    def read(name: str, otherwise: int, lo: int, hi: int) -> int:
        text = env.get(name, str(otherwise))
        if not re.fullmatch("[0-9]{1,9}", text) or not lo <= int(text) <= hi:
            among = "" if name == "WORLD_SIZE" else f" for WORLD_SIZE={env.get('WORLD_SIZE', 1)}"
            raise UserError(f"{name}={text[:40]} must be a whole number from {lo} to {hi}{among}: "
                            f"{remedy}")
        return int(text)

    size = read("WORLD_SIZE", 1, 1, 65536)
    local_size = read("LOCAL_WORLD_SIZE", 1, 1, size)
    rank = read("RANK", 0, 0, size - 1)
    here = local_size if "LOCAL_WORLD_SIZE" in env else size
    local = read("LOCAL_RANK", 0, 0, here - 1)
    if size > 1:
        if "RANK" not in env or not env.get("MASTER_ADDR", "").strip():
            raise UserError(f"WORLD_SIZE={size} needs RANK and MASTER_ADDR, by which ranks find "
                            f"each other: {remedy}")
        read("MASTER_PORT", 0, 1, 65535)
    return Ranks(rank, size, local, local_size)


def find_master(env: Mapping[str, str]) -> None:
    """UserError unless MASTER_ADDR is the name or number of a machine."""
    try:
        socket.getaddrinfo(env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR={env['MASTER_ADDR'][:80]} is no machine's name "
                        f"({in_a_line(error):.80}): set it to rank 0's") from error


# First word of what a rank does -> seconds without progress of any rank, and seconds of
# waiting in a collective, after which something hangs: the latter more, for it is not known
# who is to blame. In evaluation a rank may wait long for those that have more to score.
PATIENCE = {
    "step": (45.0, 60.0),
    "scoring": (250.0, 1800.0),
    "adapting": (250.0, 1800.0),
    "checking": (1500.0, 1800.0),
}
USUAL_PATIENCE = (250.0, 300.0)


class Pulse:
    """What this rank does and how far it is: set by its main thread, read by its
    heartbeat."""

    def __init__(self):
        self.doing, self.beats, self.at = "set-up", 0, time.monotonic()
        self.longest: dict[str, float] = {}     # seconds between two beats, by first word
        self.waiting = False                    # in a collective
        self.ending = False                     # the heartbeat is about to end this process
        self.wait = 0.0                         # the collectives' time limit in force, in seconds

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` follows."""
        now, word = time.monotonic(), doing.split()[0]
        if word == self.doing.split()[0]:
            self.longest[word] = max(self.longest.get(word, 0.0), now - self.at)
        self.doing, self.at = doing, now
        self.beats += 1

    def limits(self) -> tuple[float, float]:
        """PATIENCE now: the usual before the first step, then at least ten of the
        longest."""
        word = self.doing.split()[0]
        progress, wait = PATIENCE.get(word, USUAL_PATIENCE)
        least = 10 * self.longest[word] if word in self.longest else USUAL_PATIENCE[0]
        return max(progress, least), max(wait, 1.2 * least)


@dataclass(frozen=True)
class World:
    """The ranks of this run; one rank is the same code. Collectives are no-ops when
    size is 1."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)
    threads: list[Heartbeat] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def join(cls, env: Mapping[str, str]) -> World:
        """Join the launcher's process group: NCCL (and gloo for host values) on GPUs,
        gloo on a CPU."""
        rank, size, local, _ = launcher_ranks(env)
        device = torch.device("cpu")
        if gpus := torch.cuda.device_count():
            if local >= gpus:
                raise UserError(f"LOCAL_RANK={local} but there are {gpus} GPUs here: lower --nproc_per_node")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            find_master(env)
            try:
                dist.init_process_group(backend, timeout=timedelta(seconds=USUAL_PATIENCE[1]))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"the ranks cannot meet at MASTER_ADDR={env['MASTER_ADDR']}, MASTER_PORT="
                                f"{env['MASTER_PORT']} ({in_a_line(error):.120}): free the port, or start by "
                                "torchrun") from error
        world = cls(rank, size, device)
        if size > 1:
            world.threads.append(Heartbeat(world, env))
            world.threads[0].start()
        return world

    def beat(self, doing: str) -> None:
        """Progress was made; `doing`, such as "step 812", follows: a job that hangs
        is ended."""
        self.pulse.beat(doing)
        wait = self.pulse.limits()[1]
        set_wait = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
        if set_wait and wait != self.pulse.wait and dist.is_initialized():
            self.pulse.wait = wait
            set_wait(timedelta(seconds=wait))

    @contextlib.contextmanager
    def waiting(self):
        """Inside, this rank is not to blame when nothing goes on."""
        self.pulse.waiting = True
        yield
        self.pulse.waiting = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over ranks, in place."""
        if self.size > 1:
            with self.waiting():
                dist.all_reduce(x)
        return x

    def agree(self, value):
        """Rank 0's value on every rank (through host memory, so the GPU queue is not
        drained)."""
        if self.size == 1:
            return value
        if type(value) is float:      # a clock
            box = torch.tensor(value, dtype=torch.float64)
            with self.waiting():
                dist.broadcast(box, 0)
            return box.item()
        box = [value]
        with self.waiting():
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def agree_step(self, elapsed: float, stop: int, bad_step: int) -> tuple[float, int, int]:
        """What all ranks must know before a step, through host memory: rank 0's
        seconds, the number of a signal that any rank received (0: none), the first
        step that went wrong on any rank (0: none)."""
        if self.size == 1:
            return elapsed, stop, bad_step
        never = -math.inf
        mine = [elapsed if self.main else never, stop, -bad_step or never]
        box = torch.tensor(mine, dtype=torch.float64)
        with self.waiting():
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        elapsed, stop, bad = box.tolist()
        return elapsed, int(stop), 0 if bad == never else int(-bad)

    def gather(self, value) -> list:
        """[value of rank 0, value of rank 1, …] on every rank."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        with self.waiting():
            dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        self.agree(0.0)

    def leave(self) -> None:
        """This rank is done: the others need not watch it any more."""
        for thread in self.threads:
            thread.leave()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


TICK = 2.0       # seconds between two signs of life
STOPPED = 20.0   # seconds without one after which a stopped process of this machine is given up
SILENT = 45.0    # and one of another; one that runs here may be in a call that lets no thread run


def process_state(pid: int) -> tuple[str, str]:
    """(state letter, time of its start) of a process of this machine; empty where not
    known."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "", ""


class Heartbeat(threading.Thread):
    """Tells the other ranks, over the rendezvous store, that this process lives and
    what it does; ends the job when one of them falls silent or nothing goes on. Under
    torchrun its agent keeps the store, so that any rank may hang. tell(line) says
    why, on one rank."""

    def __init__(self, world: World, env: Mapping[str, str]):
        super().__init__(name="heartbeat", daemon=True)
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=10), wait_for_workers=False)
        attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"heartbeat{attempt}", store)
        self.world, self.over, self.ticks = world, threading.Event(), 0
        self.tell: Callable[[str], None] = lambda line: tell(f"error: {line}")
        self.signs: dict[int, dict] = {}      # the latest of every rank
        self.heard: dict[int, float] = {}     # when it came
        self.moved = time.monotonic()         # when any rank made progress
        self.last = time.monotonic()          # when this thread ran

    def run(self) -> None:
        while not self.over.wait(TICK):
            # without an answer of the store the collectives' time limits remain
            with contextlib.suppress(RuntimeError):
                stuck = self.turn(time.monotonic())
                if stuck and not self.over.is_set():
                    self.end_job(stuck)

    def turn(self, now: float) -> list[int]:
        """One look at the others; the ranks that hold up the job."""
        if now - self.last > 5 * TICK:      # it slept, perhaps with all others: count from now
            self.moved, self.heard = now, dict.fromkeys(self.heard, now)
        self.last = now
        self.exchange(now)
        return self.stuck(now)

    def leave(self) -> None:
        """This rank ends as it should."""
        self.over.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(str(self.world.rank), json.dumps({"left": True}))

    def exchange(self, now: float) -> None:
        """Give this rank's sign of life, and read those of all."""
        pulse, pid = self.world.pulse, os.getpid()
        self.ticks += 1
        mine = {
            "host": platform.node(), "pid": pid, "begun": process_state(pid)[1],
            "tick": self.ticks, "doing": pulse.doing, "beats": pulse.beats,
            "waiting": pulse.waiting, "limit": pulse.limits()[0]}
        self.store.set(str(self.world.rank), json.dumps(mine))
        keys = [str(rank) for rank in range(self.world.size)]
        if not self.store.check(keys):
            return
        for rank, text in enumerate(self.store.multi_get(keys)):
            sign, before = json.loads(text), self.signs.get(rank, {})
            if sign != before:
                self.heard[rank] = now
            if sign.get("beats") != before.get("beats"):
                self.moved = now
            self.signs[rank] = sign

    def here(self, rank: int) -> str:
        """State letter of a rank's process if it runs on this machine, else nothing."""
        sign = self.signs[rank]
        state, begun = process_state(sign["pid"])
        return state if (sign["host"], sign["begun"]) == (platform.node(), begun) else ""

    def stuck(self, now: float) -> list[int]:
        """The ranks that hold up the job: silent ones, or when nobody makes progress
        those that wait for no other and are the least far."""
        at_work = [rank for rank, sign in self.signs.items() if "left" not in sign]
        silent = []
        for rank in at_work:
            quiet, state = now - self.heard[rank], self.here(rank)
            patience = {"T": STOPPED, "t": STOPPED, "": SILENT}.get(state, math.inf)
            if quiet > patience:
                silent.append(rank)
        limit = max([self.signs[rank]["limit"] for rank in at_work], default=math.inf)
        if silent or now - self.moved <= limit:
            return silent
        busy = [rank for rank in at_work if not self.signs[rank]["waiting"]] or at_work
        least = min(self.signs[rank]["beats"] for rank in busy)
        return [rank for rank in busy if self.signs[rank]["beats"] == least]

    def describe(self, stuck: Sequence[int]) -> str:
        """Who made no progress since when, in one line."""
        if len(stuck) == self.world.size:
            return f"no rank has made progress since {self.signs[0]['doing']}"
        said = "rank {} ({host}, pid {pid}) has made no progress since {doing}"
        return "; ".join(said.format(rank, **self.signs[rank]) for rank in stuck)

    def end_job(self, stuck: Sequence[int]) -> None:
        """Say it, on one rank; end what is stopped, then this process: when the
        others have seen it too, and later than those that are to blame, so that the
        launcher names them."""
        self.world.pulse.ending = True
        well = sorted(set(range(self.world.size)) - set(stuck)) or [0]
        if self.world.rank == well[0]:
            self.tell(self.describe(stuck))
            self.kill_stopped(stuck)
        time.sleep((2 if self.world.rank in stuck else 3) * TICK)
        self.kill_stopped(stuck)
        os._exit(1)

    def kill_stopped(self, stuck: Sequence[int]) -> None:
        """SIGKILL to those of these ranks whose processes, on this machine, are
        stopped."""
        for rank in stuck:
            if self.here(rank) in ("T", "t"):
                with contextlib.suppress(OSError):
                    os.kill(self.signs[rank]["pid"], signal.SIGKILL)


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Item indices per rank, longest first to the least loaded: by arithmetic, so the
    same on every rank."""
    load, share = [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        r = load.index(min(load))
        load[r] += costs[i]
        share[r].append(i)
    return share


class Signals:
    """What SIGINT (Ctrl-C) and SIGTERM do: the first ends training after the step
    under way, and anything else at once by Interrupted; a second, a second or more
    later, ends the process at once (one request often arrives twice: torchrun passes
    on what it gets).

    SIGHUP, of a terminal that is gone, is ignored. torchrun takes it for an order to
    end, passes it on and kills the ranks 30 s later, so there it counts as SIGTERM.
    To train on under torchrun, start it by nohup with
    TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT."""

    def __init__(self):
        self.number, self.when, self.waits = 0, 0.0, False

    def install(self) -> None:
        """Listen from now on; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            launched = "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(signal.SIGHUP, self.receive if launched else signal.SIG_IGN)

    def receive(self, number: int, frame) -> None:
        """The handler of a signal, between two instructions of the main thread."""
        if number not in (signal.SIGINT, signal.SIGTERM):
            number = signal.SIGTERM
        if self.number:
            if time.monotonic() - self.when > 1:
                os._exit(128 + number)
            return
        self.number, self.when = int(number), time.monotonic()
        if not self.waits:
            raise self.error("the run was interrupted")

    def error(self, what: str, number: int = 0) -> Interrupted:
        """The exception that ends the run, for the signal received here or on another
        rank."""
        number = number or self.number
        if not self.number:
            self.number, self.when = number, time.monotonic()     # what comes now is the second
        return Interrupted(f"{what} by {signal.Signals(number).name}", number)

    @contextlib.contextmanager
    def held(self):
        """Inside, a signal only sets `number`; what was not obeyed by the end raises
        there."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.number:
            raise self.error("the run was interrupted")


SIGNALS = Signals()


class Clock:
    """Seconds since its start against a budget. Training: every step, calibration,
    GPTQ, packing, up to the file on disk. Evaluation: from opening it to the last
    byte scored. `excluded`: seconds not charged."""

    def __init__(self, budget: float = 0.0, now: Callable[[], float] = time.perf_counter):
        self.now, self.start, self.budget, self.excluded = now, now(), budget, 0.0

    def elapsed(self) -> float:
        return self.now() - self.start - self.excluded

    @contextlib.contextmanager
    def exclude(self):
        """Time spent inside is not charged, but kept in `excluded` for the log."""
        begin = self.now()
        yield
        self.excluded += self.now() - begin


def sync(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_atomic(path: Path, data: bytes, amend: Callable[[], bytes] | None = None) -> None:
    """Write a file completely or not at all: temporary name in the same folder,
    flushed, then renamed. amend(): called before the renaming; what it returns takes
    the data's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            if amend is not None and (amended := amend()) != data:
                f.seek(0)
                f.truncate()
                f.write(amended)
                f.flush()
                os.fsync(f.fileno())
        os.chmod(temp, 0o644)
        os.replace(temp, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or set ARTIFACT_DIR") from error
    finally:
        Path(temp).unlink(missing_ok=True)


def file_size(path: Path, most: int, what: str) -> int:
    """Bytes of a regular file of at most `most`, known before it is opened: a pipe
    would wait for ever, a device never end. what: what it should be, for messages.
    UserError for anything else."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it should be {what}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no regular file; it should be {what}")
    if found.st_size > most:
        raise UserError(f"{path} has {found.st_size:,} bytes, at most {most:,} are read; it should "
                        f"be {what}")
    return found.st_size


def read_bounded(path: Path, most: int, what: str) -> bytes:
    """All bytes of a file that file_size() takes."""
    file_size(path, most, what)
    try:
        with open(path, "rb") as f:
            return f.read(most)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it should be {what}") from error


def read_json(path: Path, what: str, most: int = 1 << 26) -> dict:
    """The object in a JSON file; UserError when it holds anything else."""
    try:
        found = json.loads(read_bounded(path, most, what))
    except (ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{path} is damaged ({why}); it should be {what}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; it should be {what}")
    return found


SUMMARY_KEYS = ("val_bpb val_loss sliding_val_bpb quantized_val_bpb prequant_val_bpb artifact_bytes "
                "code_bytes total_bytes steps step_ms train_seconds eval_seconds tokens_scored "
                "bytes_scored").split()
# What a summary keeps when quantising or evaluation is run again in the folder of a training.
TRAINING_KEYS = ("steps step_ms train_seconds stopped seed world_size device torch model_params "
                 "code_sha256 untrained_val_bpb prequant_val_bpb data_fingerprint val_fingerprint "
                 "training_not_compliant_because artifact_digest quantising_runs "
                 "evaluation_runs").split()
# Files of writes that were killed.
LEFTOVER = re.compile(r"\.(.+\.(pt|ptz|json)\.\w{8}|space\.\d+|ballast|average\.previous)")


def of_training(summary: Mapping, path: Path) -> dict:
    """What a run that goes on keeps of the summary at path; UserError for values of
    strange types."""
    kept = {k: summary[k] for k in TRAINING_KEYS if summary.get(k) is not None}
    for name, value in kept.items():
        texts = name == "training_not_compliant_because"
        good = isinstance(value, list) and all(isinstance(x, str) for x in value) if texts else (
            isinstance(value, (int, float, str)) and (not name.endswith("_runs") or type(value) is int))
        if not good:
            raise UserError(f"{path} is damaged: {name} is {plain(value, 40)}; move it away")
    return kept


def lock_folder(folder: Path):
    """The open file whose lock says that this run owns the folder; whatever ends the
    process frees it. None where the disk knows no locks. UserError when another live
    run has it."""
    path = folder / ".lock"
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read(100).strip() or "its process is starting"
            raise UserError(f"ARTIFACT_DIR={folder} is in use by a live run ({who}): wait until "
                            "it ends, or choose another folder") from error
        except OSError:
            file.close()
            return None
        with contextlib.suppress(OSError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {platform.node()}")
                file.flush()
                return file
        file.close()      # the run that had it has just removed the file: take a new one


def home_of(s: Settings) -> Path | None:
    """The folder of the run whose weights or artifact this one goes on with, if any."""
    path = Path(s.eval_only_path or s.eval_only_quantized_path)
    if not path.name:
        return None
    return path.parent.parent if path.parent.name == "checkpoint" else path.parent


class Journal:
    """A file of lines that never ends a run: what cannot be written waits in memory,
    at most MOST bytes of it, and is tried again with every line."""
    MOST = 8 << 20

    def __init__(self, path: Path, fresh: bool = False):
        if fresh:
            open(path, "wb").close()
        self.path, self.file = path, open(path, "ab", buffering=0)
        self.unwritten, self.fault, self.told = b"", "", False

    def write(self, text: str) -> None:
        """Append the text, or keep it and note the fault."""
        self.unwritten += text.encode("utf-8", "replace")
        self.fault = ""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        except (OSError, ValueError) as error:
            self.fault = str(error)
            if len(self.unwritten) > self.MOST:
                self.unwritten = self.unwritten[-self.MOST // 2:].partition(b"\n")[2]


def finite_only(value):
    """The value with None in place of every float that JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: finite_only(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_only(v) for v in value]
    return value


def to_json(value, **options) -> str:
    """Valid JSON of anything: no NaN, and what it does not know as text."""
    return json.dumps(finite_only(value), default=str, **options)


class Run:
    """The run's folder and its one voice: text to train.log and the screen, JSON
    lines to metrics.jsonl. Nothing that cannot be written or shown ends the run."""

    def __init__(self, s: Settings, world: World):
        name = s.run_id or time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
        self.s, self.world, self.id = s, world, world.agree(name)
        self.dir = Path(s.artifact_dir or Path("runs") / self.id)
        self.live = sys.stdout.isatty() and world.main
        self.summary = {**dict.fromkeys(SUMMARY_KEYS), "compliant": True, "not_compliant_because": []}
        self.text = self.metrics = self.lock = None
        self.screen_failed = False
        self.time_known = True      # that of training, which quantising goes on with
        self.command, self.command_at = "", 0.0
        self.resumes = s.resume
        # when those files were written that are not this run's own
        self.before = {} if self.resumes else {p: self.written(p) for p in self.ways_on()}
        again = bool(self.resumes or s.eval_only_path or s.eval_only_quantized_path)
        for thread in world.threads:
            thread.tell = self.hung
        if not world.main:
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.dir)
            earlier = self.check_folder(again)
            self.open_journals(fresh=not again)
        except UserError:
            self.close()
            raise
        except OSError as error:
            raise UserError(f"cannot write into ARTIFACT_DIR={self.dir}: {error.strerror}") from error
        if self.lock is None:
            self.warn(f"{self.dir} cannot be locked: start no other run in it")
        else:
            for path in [*self.dir.glob(".*"), *self.dir.glob("checkpoint/.*")]:
                if LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        if self.goes_on():
            self.summary.update(of_training(earlier, self.dir / "summary.json"))
            for reason in self.summary.get("training_not_compliant_because", ()):
                self.not_compliant(str(reason))

    def open_journals(self, fresh: bool) -> None:
        """train.log and metrics.jsonl, anew or to be appended to."""
        names = ("train.log", "metrics.jsonl")
        self.text, self.metrics = (Journal(self.dir / name, fresh) for name in names)

    def goes_on(self) -> bool:
        """Whether what is quantised or scored is this folder's own, or training is
        resumed."""
        home = home_of(self.s)
        return self.resumes or (home is not None and home.resolve() == self.dir.resolve())

    def check_folder(self, again: bool) -> dict:
        """The summary that lies in the folder; UserError unless this run may write
        there."""
        for name in ("summary.json", WEIGHTS_NAME, ARTIFACT_NAME):
            if (self.dir / name).is_dir():
                raise UserError(f"{self.dir / name} is a folder: move it away")
        if not again and (self.dir / WEIGHTS_NAME).exists():
            raise UserError(f"ARTIFACT_DIR={self.dir} holds the weights of an earlier run: choose another "
                            "folder; to score those, set EVAL_ONLY_PATH as well")
        path = self.dir / "summary.json"
        earlier = read_json(path, "the summary of a run") if again and path.exists() else {}
        if earlier.get("steps") is not None and not self.goes_on():
            raise UserError(f"ARTIFACT_DIR={self.dir} holds the summary of a training run, which this one "
                            "would replace: choose another folder")
        return earlier

    def close(self) -> None:
        """Give the folder back."""
        if self.lock is not None:
            with contextlib.suppress(OSError):
                (self.dir / ".lock").unlink()
            self.lock.close()
            self.lock = None

    def not_compliant(self, reason: str) -> None:
        """Mark the run: its log, summary and closing block say why it is no result."""
        if reason in self.summary["not_compliant_because"]:
            return
        self.summary["compliant"] = False
        self.summary["not_compliant_because"].append(reason)
        self.log("NON-COMPLIANT", reason=reason)

    def warn(self, text: str) -> None:
        """A warning, in the log and on screen."""
        self.log("warning", text=text)

    def log(self, event: str, quiet: bool = False, **values) -> None:
        """A line `event key=value …` on screen and in train.log, an object in
        metrics.jsonl; rank 0 only."""
        if self.text is None:
            return
        self.write(self.metrics, to_json({"event": event, "time": round(time.time(), 3), **values}))
        line = " ".join([event, *(f"{k}={human(v)}" for k, v in values.items())])
        self.write(self.text, line)
        if not quiet:
            self.say(line)
        with self.guarded("the command to go on"):
            self.note_go_on(every=5.0)      # a checkpoint may have come

    def write(self, journal: Journal, line: str) -> None:
        """A line into one of the files; the first that cannot be written is warned of."""
        journal.write(line + "\n")
        if journal.fault and not journal.told:
            journal.told = True
            self.warn(f"{journal.path} cannot be written ({journal.fault}): its lines wait in "
                      "memory and are tried again; the run goes on")

    def show(self, text: str) -> None:
        """Put text on the screen if that works."""
        try:
            print(text, end="", flush=True)
        except (OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError) or sys.stdout.closed:      # for ever
                sys.stdout, self.live = open(os.devnull, "w"), False
            if not self.screen_failed:
                self.screen_failed = True
                self.warn(f"the screen cannot be written ({error}): see train.log")

    def say(self, line: str) -> None:
        """A line on the screen only (clears a live progress line first)."""
        if self.world.main:
            self.show(("\r\033[K" if self.live else "") + line + "\n")

    def progress(self, line: str) -> None:
        """Overwrite the live line on a terminal; nothing elsewhere."""
        if self.live:
            self.show("\r\033[K" + line[:shutil.get_terminal_size().columns - 1])

    def save_summary(self) -> None:
        """What is known so far: written after every stage, so that a crash loses no
        score."""
        if self.world.main:
            with self.guarded("the summary"):
                write_atomic(self.dir / "summary.json", to_json(self.summary, indent=1).encode())

    @contextlib.contextmanager
    def guarded(self, what: str):
        """Inside, a failure is a warning: reports and decorations never end a run."""
        try:
            yield
        except Exception as error:
            self.warn(f"{what} failed ({in_a_line(error)}): the run goes on without")

    # --- going on after an early end

    def ways_on(self) -> dict[Path, dict[str, str]]:
        """Files that a run can be continued from, best first, and the settings that
        do so."""
        artifact, weights = self.dir / ARTIFACT_NAME, self.dir / WEIGHTS_NAME
        ways = {artifact: {"EVAL_ONLY_QUANTIZED_PATH": str(artifact)},
                weights: {"EVAL_ONLY_PATH": str(weights)}}
        checkpoints = self.dir / "checkpoint"
        if not self.s.max_wallclock_seconds:
            ways[self.dir / POINTER] = {"RESUME": "1"}
        average = checkpoints / "average.pt"
        ways[average] = {"EVAL_ONLY_PATH": str(average)}
        return ways

    @staticmethod
    def written(path: Path) -> int:
        """When a file was written, in ns; 0 if it is not there."""
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return 0

    def way_on(self) -> dict[str, str]:
        """The settings that go on from the best file that this run has written, if
        any."""
        for path, how in self.ways_on().items():
            if self.written(path) not in (0, self.before.get(path)):
                return how
        return {}

    def go_on(self) -> str:
        """The command that goes on from what is on disk; without that the one that
        started it."""
        changed, how = changed_environment(self.s), self.way_on()
        if not how:
            return starting_command(changed)
        left_out = ["EVAL_ONLY_PATH", "EVAL_ONLY_QUANTIZED_PATH", "RESUME"]
        if "EVAL_ONLY_QUANTIZED_PATH" in how:      # there is nothing to stop at before the score
            left_out += ["QUANTIZE_ONLY", "PREQUANT_ONLY"]
        changed = {k: v for k, v in changed.items() if k not in left_out}
        return starting_command({**changed, "ARTIFACT_DIR": str(self.dir), **how})

    def note_go_on(self, every: float = 0.0) -> None:
        """Log that command when it has changed: it is then known even after a kill.
        every: look again after so many seconds only."""
        if self.text is None or time.monotonic() - self.command_at < every:
            return
        self.command_at, command = time.monotonic(), self.go_on()
        if command != self.command:
            self.command = command
            self.log("go_on", quiet=True, command=command)

    def failed(self, line: str, trace: str = "", again: bool = True, event: str = "error") -> None:
        """The last words of a run that ends early, on any rank: the error, its trace
        in the log alone, and the command to go on. again: whether the same command
        may help while nothing is on disk."""
        tell(f"{event}: {line}")
        if self.text is None:      # not rank 0: beside its lines, where the folder is shared
            with contextlib.suppress(OSError):
                self.open_journals(fresh=False)
        self.log(event, quiet=True, text=line, **({"trace": trace} if trace else {}))
        with self.guarded("the command to go on"):
            if again or self.way_on():
                self.note_go_on()
                tell(f"to go on: {self.go_on()}")

    def hung(self, line: str) -> None:
        """What the heartbeat calls before it ends this process."""
        with contextlib.suppress(Exception):
            self.failed(line)


def tell(line: str) -> None:
    """A line on stderr if that works."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def in_a_line(error: BaseException) -> str:
    """Type and text of an exception, on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def changed_environment(s: Settings) -> dict[str, str]:
    """The settings that differ from their defaults as a shell would set them."""
    shown = {}
    for name, value in s.changed().items():
        if isinstance(value, (bool, float)) and float(value).is_integer():
            value = int(value)
        shown[name] = str(value)
    return shown


def starting_command(changed: Mapping[str, str]) -> str:
    """The command that starts this script as it was started, under these settings."""
    env, script = os.environ, "train_gpt.py"
    if sys.argv[0].endswith(".py"):
        path = Path(sys.argv[0])
        here = path.is_absolute() and path.is_relative_to(Path.cwd())
        script = shlex.quote(str(path.relative_to(Path.cwd()) if here else path))
    start, size = f"python {script}", env.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in env:
        nodes, here = env.get("GROUP_WORLD_SIZE", "1"), env.get("LOCAL_WORLD_SIZE", "1")
        where = "--standalone" if nodes == "1" else f"--nnodes={nodes} …"
        start = f"torchrun {where} --nproc_per_node={here} {script}"
    elif size != "1":
        start = f"RANK=… WORLD_SIZE={size} MASTER_ADDR=… MASTER_PORT=… {start}"
    words = [f"{name}={shlex.quote(value)}" for name, value in changed.items()]
    return " ".join([*words, start])


def plain(value, most: int) -> str:
    """A value as one line of at most so many characters of printable ASCII, for
    messages."""
    text = re.sub("[^ -~]", "?", f"{value!s:.{most + 1}}")
    return text if len(text) <= most else text[:most - 3] + "..."


def human(value) -> str:
    """A value as the log shows it: floats short, single words bare, the rest as JSON."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.6g}"
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:.1f}"
    if isinstance(value, str) and " " not in value and (value.isprintable() or not value):
        return value
    return to_json(value, ensure_ascii=False, separators=(",", ":"))


def public_settings(values: Mapping) -> dict:
    """Settings without the paths of this machine."""
    return {k: v for k, v in values.items() if not k.endswith(("_PATH", "_DIR"))}


def closest_system(s: Settings) -> tuple[str, dict] | None:
    """The configuration beside this script nearest to the settings, and what differs
    as [here, there]."""
    found, mine = [], s.as_env()
    for path in sorted(Path(__file__).parent.glob("configs/pr*.env")):
        lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        with contextlib.suppress(UserError):       # written for another version of this script
            told = dict(line.split("=", 1) for line in lines if "=" in line)
            theirs = Settings.from_env(told).as_env()
            compared = {*told, *s.changed()} & set(mine) - {"RUN_ID", "SEED"}
            found.append((path.stem, {k: [mine[k], theirs[k]] for k in compared if mine[k] != theirs[k]}))
    if not found:
        return None
    _, differs = min(found, key=lambda x: len(x[1]))
    return ", ".join(name for name, d in found if d == differs), public_settings(differs)


def log_start(s: Settings, world: World, run: Run) -> None:
    """What runs, where: into the log before anything else."""
    parameters = sum(map(math.prod, GPT.shapes(s).values()))
    settings, dtype = public_settings(s.as_env()), pick_dtype(s.compute_dtype, world.device)
    run.log("start", run_id=run.id, device=world.device_name, world_size=world.size, torch=torch.__version__,
            python=platform.python_version(), dtype=str(dtype), attention=ATTENTION,
            parameters=parameters)
    run.log("settings", quiet=True, **settings)
    run.log("changed_settings", quiet=True, **public_settings(s.changed()))
    if ignored := {k: why for k, (_, why) in NO_SETTINGS.items() if k in os.environ}:
        run.log("settings_without_effect", **ignored)
    if strays := stray_names(os.environ):
        run.log("unknown_names", **strays)
    with run.guarded("the search for the closest system"):
        if near := closest_system(s):
            name, differs = near
            run.log("closest_system", name=name, differences=len(differs))
            run.log("differences", quiet=True, **differs)
    source = script_source()
    digest = hashlib.sha256(source).hexdigest()
    form = shipped_form(s)
    run.log("code", bytes=len(source), form=form, shipped=code_bytes(form), sha256=digest)
    if world.main and run.summary.get("code_sha256") != digest:      # else the log has it already
        encoding = "latin-1" if source.startswith(b"# coding: latin-1") else "utf-8"
        run.write(run.text, source.decode(encoding) + "\n" + "=" * 100)
    run.summary.update(code_bytes=code_bytes(form), code_form=form)
    compare_with_training(run, dict(
        seed=s.seed, world_size=world.size, device=world.device_name, torch=torch.__version__,
        model_params=parameters, code_sha256=digest, code_form=form, settings=settings))


MAY_DIFFER = ("RUN_ID", "QUANTIZE_ONLY", "PREQUANT_ONLY", "RESUME", "settings", "seed")


def compare_with_training(run: Run, here: dict) -> None:
    """Facts and settings into the summary; a warning of those that are not as in the
    summary beside the file that is quantised or scored. In a run's own folder the
    summary keeps what was true of its training."""
    differing = {}
    with run.guarded("the comparison with training"):
        differing = differences_from_training(run, here)
    if differing:
        run.warn("not as in the summary beside the weights: " + "; ".join(
            f"{name}={here} here, {there} there" for name, (here, there) in differing.items()))
    if run.goes_on():
        run.summary["not_as_in_training"] = differing
        here = {k: v for k, v in here.items() if k == "settings" or k not in run.summary}
    run.summary.update(here)


def differences_from_training(run: Run, here: Mapping) -> dict[str, list]:
    """What of it is not as in the summary beside the weights or artifact: [here,
    there] by name."""
    home = home_of(run.s)
    if home is None or not run.world.main:
        return {}
    path, there = home / "summary.json", {}
    summary = read_json(path, "the summary of a run") if path.exists() else {}
    there.update(summary)
    there.update(summary.get("settings", {}))
    for name, (_, trained) in summary.get("not_as_in_training", {}).items():
        there[name] = trained      # scored differently before: training is what counts
    differing = {}
    for name, value in {**here, **here["settings"]}.items():
        if name not in MAY_DIFFER and there.get(name, value) != value:
            differing[name] = [value, there[name]]
    return differing


# Dense bfloat16 FLOP/s of a GPU, by part of its name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
              "L40": 181e12, "RTX 4090": 165e12}


class Progress:
    """Tells how training goes: in the log now and then, on a terminal all the time."""

    def __init__(self, s: Settings, world: World, run: Run, model: GPT, budget: float):
        self.s, self.world, self.run, self.model, self.budget = s, world, run, model, budget
        self.last = (0, 0.0)               # step and seconds of the line before
        self.epochs = 0                    # that have ended
        peaks = (flops for part, flops in PEAK_FLOPS.items() if part in world.device_name)
        self.peak = world.size * next(peaks, 0.0)

    def events(self, step: int, stream: Prefetch, trainer: Trainer, looping: bool) -> None:
        """Log the end of an epoch, and where the time of a measured step went."""
        if int(stream.epoch) > self.epochs:
            self.epochs = int(stream.epoch)
            tokens = step * self.s.train_batch_tokens
            self.run.log("epoch_end", epoch=self.epochs, step=step, tokens=tokens)
        if trainer.parts:
            self.run.log("step_time", quiet=True, step=step, looping=looping, parts=trainer.parts)
            trainer.parts = None

    def report(self, step: int, clock: Clock, loss: Tensor, norm: Tensor, lr: float, plan: Plan) -> None:
        """A line in the log (ten steps, then every TRAIN_LOG_EVERY), else on a
        terminal, two a second."""
        s = self.s
        logged = step <= 10 or (s.train_log_every and step % s.train_log_every == 0)
        if not logged and not (self.run.live and clock.elapsed() - self.last[1] > 0.5):
            return
        loss = self.world.total(loss.clone()).item() / self.world.size if logged else loss.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            return                     # FiniteWatch ends the run; JSON has no word for it
        elapsed = clock.elapsed()      # after the loss, for which the host has waited
        steps, seconds = step - self.last[0], max(elapsed - self.last[1], 1e-9)
        self.last = (step, elapsed)
        rate, looping = s.train_batch_tokens * steps / seconds, plan.slots > s.num_layers
        used = elapsed / self.budget if self.budget else step / max(s.iterations, 1)
        v = {"ms": 1e3 * seconds / max(steps, 1), "ms_mean": 1e3 * elapsed / step, "tok_s": round(rate),
             "elapsed": elapsed, "used": min(used, 1.0), "eta": elapsed * (1 / max(used, 1e-9) - 1)}
        if self.peak:      # backward costs two forwards; in documents a query sees half the window at most
            v["mfu"] = rate * 3 * self.model.flops_per_token(plan, s.train_seq_len / 2) / self.peak
        mfu = f" mfu {v['mfu']:.0%}" if "mfu" in v else ""
        line = (f"step {step:5d}  loss {loss:7.4f}  {v['ms']:7.1f} ms/step (mean {v['ms_mean']:.1f})  "
                f"{v['tok_s']:,} tok/s{mfu}  {v['used']:4.0%} of budget, {v['eta']:.0f} s left"
                + ("  looping" if looping else ""))
        if not logged:
            return self.run.progress(line)
        self.run.log("train", quiet=True, step=step, loss=loss, norm=norm.item(), lr=lr, looping=looping, **v)
        self.run.say(line)


class FiniteWatch:
    """Notices the first step whose loss or gradient is not finite without waiting for
    the GPU: flags travel to pinned memory and are read once they have arrived, a few
    steps late."""

    def __init__(self):
        self.flying, self.bad = deque(), 0

    def record(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at a step's loss and gradient norm, scalars on the device."""
        flag, arrived = torch.isfinite(loss) & torch.isfinite(norm), None
        if flag.is_cuda:
            box = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag = box.copy_(flag, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.flying.append((step, flag, arrived))

    def first_bad(self, wait: bool = False) -> int:
        """The first bad step (from 1 on) among those whose flags are here, else 0;
        wait: for all flags."""
        while self.flying and not self.bad:
            step, flag, arrived = self.flying[0]
            if arrived is not None and not wait and not arrived.query():
                break
            if arrived is not None:
                arrived.synchronize()
            self.flying.popleft()
            if not flag.item():
                self.bad = step
        return self.bad

    @staticmethod
    def error(step: int) -> UserError:
        """What ends a run whose loss or gradient was not finite at this step."""
        return UserError(f"the loss or the gradient is not finite at step {step}: lower MATRIX_LR or "
                         "SCALAR_LR, or look for the cause with COMPUTE_DTYPE=float32; an average in the "
                         "folder's checkpoint/ is finite, of an earlier step")


def off_the_clock(world: World, clock: Clock, work: Callable[[], None]) -> None:
    """Do the work while the clock stands; steps that are queued on a GPU are charged
    before."""
    sync(world.device)
    with clock.exclude():
        work()
        sync(world.device)


def end_of_steps(world: World, trainer: Trainer, watch: FiniteWatch, step: int) -> int:
    """After the last step, the first one that went wrong on any rank, or left weights
    that are not finite."""
    bad = watch.first_bad(wait=True) or (0 if trainer.finite() else step)
    return world.agree_step(0.0, 0, bad)[2]


def training_reports(s: Settings, run: Run, trainer: Trainer, trained: Trained) -> None:
    """What was idle in training, into the log. It comes after the weights are saved,
    and ends no run."""
    if not trained.facts["steps"]:
        return
    with run.guarded("the report on parameters without gradients"):
        if untouched := trainer.optimiser.never_trained():
            run.log("never_trained", parameters=untouched)


AVERAGE = Path("checkpoint") / "average.pt"     # in the run's folder


class AverageKeeper:
    """Keeps a finite average of the weights on disk while training goes on: rank 0
    copies it on the device, a thread beside training checks and writes it. The newest
    two stay until the artifact is written: final_model.pt may be damaged, or lie
    elsewhere, as long as nothing has been made of it."""

    SECONDS = 25.0         # between two copies: on a slow disk, too, the newest is less than a minute old

    def __init__(self, s: Settings, world: World, run: Run, trainer: Trainer, clock: Clock):
        self.s, self.world, self.run, self.clock, self.average = s, world, run, clock, trainer.ema
        self.writer, self.job, self.last, self.fault = ThreadPoolExecutor(1), None, -math.inf, ""
        self.copy: dict[str, Tensor] = {}
        self.written, self.warned = "", False      # what the thread has written since the log was told

    def offer(self, step: int) -> None:
        """After a step: copy the average when it is time and the writer is idle."""
        self.tell()
        now = time.monotonic()
        if self.world.main and now - self.last >= self.SECONDS and (self.job is None or self.job.done()):
            self.last = now
            self.start(step, f"average of step {step}")

    def tell(self) -> None:
        """Log what the thread has done; a fault once."""
        if self.written:
            self.run.log("average", quiet=True, of=self.written)
            self.written = ""
            self.run.note_go_on()      # after a kill only the log can tell
        if self.fault and not self.warned:
            self.warned = True
            self.run.log("warning", text=f"an average could not be kept beside training ({self.fault})")

    def start(self, step: int, stopped: str) -> None:
        """Copy the average, in the order of the GPU's queue, and let the thread write
        it."""
        if not self.copy:
            self.copy = {n: torch.empty_like(t) for n, t in self.average.items()}
        torch._foreach_copy_(list(self.copy.values()), list(self.average.values()))
        ready = None
        if self.world.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        facts = weight_facts(self.s, self.world, step, self.clock.elapsed(), stopped)
        self.job = self.writer.submit(self.write, ready, facts)

    def write(self, ready, facts: dict) -> None:
        """In the thread: check and write the copy; a fault is kept for the log,
        training goes on."""
        try:
            tensors = to_host(self.copy, ready)
            if not all(bool(t.isfinite().all()) for t in tensors.values()):
                return
            path = self.run.dir / AVERAGE
            data = weights_to_bytes(self.s, tensors, facts)
            with contextlib.suppress(OSError):     # no average yet, or a file system without hard links
                twin = path.with_name(".average.previous")
                twin.unlink(missing_ok=True)
                os.link(path, twin)
                os.replace(twin, path.with_name("average.previous.pt"))
            write_atomic(path, data)
            self.written = facts["stopped"]
        except Exception as error:
            self.fault = self.fault or f"{type(error).__name__}: {plain(error, 200)}"

    def close(self, step: int, stopped: str) -> None:
        """Wait for the writer; before, write the average at which training was
        stopped."""
        self.world.beat("saving the average")
        wait_for(self.job)
        if step and stopped and self.world.main:
            self.start(step, stopped)
            wait_for(self.job)
        self.writer.shutdown()
        self.tell()


def wait_for(job) -> None:
    """Wait for a thread's job, if there is one."""
    if job is not None:
        job.result()


def to_host(tensors: Mapping[str, Tensor], ready) -> dict[str, Tensor]:
    """The tensors on the host. On a GPU once `ready` has passed, by a stream of its
    own: no step waits."""
    if ready is None:
        return dict(tensors)
    stream = torch.cuda.Stream(next(iter(tensors.values())).device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        return {n: t.cpu() for n, t in tensors.items()}


def weight_facts(s: Settings, world: World, steps: int, seconds: float, stopped: str) -> dict:
    """What a file of weights says of its training; stopped: empty for a training that
    went to its end."""
    return {"steps": steps, "train_seconds": seconds, "step_ms": 1e3 * seconds / max(steps, 1),
            "stopped": stopped, "seed": s.seed, "world_size": world.size}


# --- checkpoints to go on from, for runs without a time budget

POINTER = Path("checkpoint") / "resume.json"     # in the run's folder: which checkpoint is whole


class Checkpoints:
    """Writes all that a training must know to go on to the bit: every rank its own
    file, so that no shared disk is needed, then rank 0 the pointer. A kill in between
    leaves the checkpoint before."""

    def __init__(self, s: Settings, world: World, run: Run, trainer: Trainer, watch: FiniteWatch,
                 clock: Clock):
        self.s, self.world, self.run, self.trainer = s, world, run, trainer
        self.watch, self.clock, self.last = watch, clock, None
        self.wanted = s.checkpoint_every_seconds > 0 and not s.max_wallclock_seconds

    def offer(self, step: int, elapsed: float, curriculum: Curriculum, stream: Prefetch) -> None:
        """Before a step, `elapsed` seconds on rank 0's clock: write one when it is
        time."""
        if self.last is None:
            self.last = elapsed
        elif elapsed - self.last >= self.s.checkpoint_every_seconds:
            self.write(step, curriculum, stream)
            self.last = elapsed

    def write(self, step: int, curriculum: Curriculum, stream: Prefetch) -> None:
        """Write one, on all ranks; without space, or with weights that are not
        finite, the last one stays."""
        if not self.wanted or not step:
            return
        fault = ""
        before = self.world.pulse.doing
        self.world.beat(f"saving a checkpoint of step {step}")
        try:
            if self.watch.first_bad(wait=True) or not self.trainer.finite():
                raise ValueError("weights that are not finite")
            state = self.state(step, curriculum, stream)
            write_atomic(checkpoint_path(self.run, step, self.world.rank), sealed(state))
        except (UserError, OSError, ValueError, RuntimeError, MemoryError) as error:
            fault = plain(error, 200)
        faults = list(filter(None, self.world.gather(fault)))
        pointer = json.dumps({"step": step, "world_size": self.world.size})
        if self.world.main and not faults:
            try:
                write_atomic(self.run.dir / POINTER, pointer.encode())
            except (UserError, OSError) as error:
                faults = [plain(error, 200)]
        faults = self.world.agree(faults)
        self.world.beat(before)
        if faults:
            return self.run.log("warning", text=f"no checkpoint at step {step}: {faults[0]}")
        self.run.log("checkpoint", quiet=True, step=step)
        remove_checkpoints(self.run, keep=step)

    def state(self, step: int, curriculum: Curriculum, stream: Prefetch) -> dict:
        """All that this rank must know to go on after this step."""
        device = self.world.device
        return {**self.trainer.tensors(), "settings": training_settings(self.s, self.world), "step": step,
                "seconds": self.clock.elapsed(), "batches": stream.given, "curriculum": curriculum.state(),
                "untrained_val_bpb": self.run.summary.get("untrained_val_bpb"),
                "random": torch.get_rng_state(),
                "random_gpu": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def checkpoint_path(run: Run, step: int, rank: int) -> Path:
    """The file of one rank's checkpoint after a step."""
    return run.dir / "checkpoint" / f"resume.{step}.{rank}.pt"


def remove_checkpoints(run: Run, keep: int = -1) -> None:
    """Remove this rank's checkpoints but that of one step."""
    for path in (run.dir / "checkpoint").glob(f"resume.*.{run.world.rank}.pt"):
        if path != checkpoint_path(run, keep, run.world.rank):
            with contextlib.suppress(OSError):
                path.unlink()


def remove_safety_copies(run: Run) -> None:
    """Once the artifact and final_model.pt are there: remove averages and
    checkpoints. On every rank."""
    if not run.world.agree((run.dir / "final_model.pt").is_file()):
        return
    remove_checkpoints(run)
    with contextlib.suppress(OSError):
        for name in (AVERAGE, AVERAGE.with_name("average.previous.pt"), POINTER):
            if run.world.main:
                (run.dir / name).unlink(missing_ok=True)
        (run.dir / "checkpoint").rmdir()      # not while another rank's or somebody else's files are in it


def training_settings(s: Settings, world: World) -> dict:
    """The settings on which a step of training depends: they must be the same to go
    on."""
    names = ["SEED", "ITERATIONS", "COMPUTE_DTYPE", "MUON_DTYPE"]
    for group in ("data", "model", "optimiser"):
        names += [n for n in group_names(group) if not n.startswith(("DATA_", "TOKENIZER_", "VAL_"))]
    everything = s.as_env()
    return {**{n: everything[n] for n in names}, "WORLD_SIZE": world.size}


def read_checkpoint(s: Settings, world: World, run: Run) -> dict:
    """This rank's part of the checkpoint in the run's folder; UserError when there is
    none that fits."""
    path, again = run.dir / POINTER, "start anew without RESUME, in another ARTIFACT_DIR"
    step, fault = 0, ""
    if world.main:
        try:
            told = read_json(path, "a checkpoint's", 1000)
            step, size = told["step"], told["world_size"]
            if type(step) is not int or type(size) is not int:
                raise ValueError("steps and ranks are no numbers")
            if size != world.size:
                fault = f"RESUME=1: {path} is of {size} ranks, these are {world.size}: start as many"
        except (UserError, OSError, ValueError, LookupError, TypeError) as error:
            fault = f"RESUME=1 finds no checkpoint at {path} ({type(error).__name__}): {again}"
    step, fault = world.agree((step, fault))
    if fault:
        raise UserError(fault)
    path = checkpoint_path(run, step, world.rank)
    state = unsealed(path, 5 * bytes_of_weights(s) + (16 << 20), f"RESUME=1: {path}", must=True)
    theirs, differ = state.get("settings", {}), []
    for name, here in training_settings(s, world).items():
        if theirs.get(name) != here:
            differ.append(f"{name}={plain(theirs.get(name), 40)} there, {here} here")
    if differ:
        raise UserError(f"RESUME=1: {path.name} is of another training: {'; '.join(differ[:4])}; {again}")
    run.log("resume", step=step, seconds=state["seconds"])
    return state


def go_on_from(state: Mapping[str, Any], trainer: Trainer, curriculum: Curriculum) -> int:
    """Put everything where the checkpoint had it; the step to go on after."""
    trainer.restore(state)
    vars(curriculum).update(state["curriculum"])
    torch.set_rng_state(state["random"])
    if state["random_gpu"] is not None:
        torch.cuda.set_rng_state(state["random_gpu"], trainer.world.device)
    return state["step"]


SEAL = b"blake2b:"     # then 64 hexadecimal digits: the comment that ends a sealed archive
SEAL_BYTES = len(SEAL) + 64
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", *(
    f"torch {kind}Storage" for kind in "Byte Char Short Int Long Half BFloat16 Float Double Bool".split())}
MOST_PICKLED = 2 << 20     # bytes; all but tensors: 30 kB of the default model, 0.9 MB of one of 256 layers
ZIP_END = 22           # bytes of a zip's last record without its comment


def sealed(box: dict) -> bytes:
    """torch.save's archive of `box` with a digest of all of it as the archive's
    comment, which torch.load passes over: torch itself does not check the sums that
    an archive holds."""
    out = io.BytesIO()
    torch.save(box, out)
    body = out.getvalue()[:-2] + struct.pack("<H", SEAL_BYTES)
    return body + seal_of(body)


def seal_of(body: bytes) -> bytes:
    """The comment that ends a sealed archive of these bytes."""
    return SEAL + hashlib.blake2b(body, digest_size=32).hexdigest().encode()


def unsealed(path: str | Path, most: int, what: str, must: bool = False) -> dict:
    """What sealed() wrote to a file of at most `most` bytes. UserError, one line that
    begins with `what`, for all else: within seconds, and before anything is
    unpickled. An archive without a digest passes with a warning, for files of earlier
    versions have none; not if it must have one."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise ValueError(f"it is no file of at most {most:,} bytes")
        data = Path(path).read_bytes()
        if not has_seal(data):
            if must:
                raise ValueError("it is damaged, or of another kind")
            print(f"warning: {what}: it is of an earlier version, without a digest", file=sys.stderr)
        check_records(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of odd pickles: a refusal is one line
            box = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(box, dict):
            raise ValueError("it holds something else")
        return box
    except Exception as error:     # zipfile, pickletools and torch.load raise many types for a foreign file
        why = plain(getattr(error, "strerror", None) or error, 100)
        raise UserError(f"{what}: {type(error).__name__}, {why}; give the file as a run wrote it") from error


def has_seal(data: bytes) -> bool:
    """Whether an archive ends with the digest of what precedes it; ValueError: with a
    wrong one, or it is no archive that torch.save has written."""
    last_record = b"PK\5\6"
    if data[-ZIP_END - SEAL_BYTES:][:4] == last_record:
        if data[-SEAL_BYTES:] != seal_of(data[:-SEAL_BYTES]):
            raise ValueError("it is damaged: its digest does not fit")
        return True
    if data[-ZIP_END:][:4] != last_record or data[-2:] != bytes(2):
        raise ValueError("it is damaged, or of another kind")
    return False


def check_records(data: bytes) -> None:
    """ValueError unless an archive unfolds to no more than it is: nothing compressed,
    and pickles that are short and hardly repeat a tuple: one that holds another
    twice, and so on, is hashed for ever."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    records = archive.infolist()
    pickles = [r for r in records if r.filename.endswith(".pkl")]
    if (any(r.compress_type != zipfile.ZIP_STORED for r in records)
            or sum(r.file_size for r in records) > len(data)
            or sum(r.file_size for r in pickles) > MOST_PICKLED):
        raise ValueError("it unfolds to more than it should")
    for record in pickles:
        before, tuples, repeated = "", set(), 0
        for at, (op, place, _) in enumerate(pickletools.genops(archive.read(record))):
            if op.name == "PROTO" and at or "GLOBAL" in op.name and place not in PICKLED:
                raise ValueError("it asks for more than tensors")
            if "PUT" in op.name and before.startswith("TUPLE"):
                tuples.add(place)
            repeated += "GET" in op.name and place in tuples
            before = op.name
        if repeated > 16:      # the optimiser's state repeats four
            raise ValueError("it unfolds to more than it should")


def weights_to_bytes(s: Settings, params: Mapping[str, Tensor], facts: dict) -> bytes:
    """The file of weights: under the field's names, with their architecture and facts
    of their training."""
    weights = {n: p.detach().cpu() for n, p in field_views(dict(params)).items()}
    return sealed({"architecture": s.to_be_stored(architecture(s)), "weights": weights, "facts": facts})


def save_weights(run: Run, model: GPT, facts: dict) -> None:
    """The averaged weights, the moment training ends: whatever fails later, they are
    on disk. Without space in the run's folder other places are tried; without any the
    run goes on with the weights in memory."""
    if not run.world.main:
        return
    drop_ballast(run)
    data = weights_to_bytes(model.s, dict(model.named_parameters()), facts)
    elsewhere = f"final_model.{run.id}.pt"
    for place in (lambda: run.dir / "final_model.pt", lambda: Path.cwd() / elsewhere,
                  lambda: Path(tempfile.gettempdir()) / elsewhere):
        try:
            path = place()
            write_atomic(path, data)
        except (UserError, OSError) as error:
            run.log("warning", text=f"the weights cannot be saved there ({plain(error, 300)})")
            continue
        if path.parent != run.dir:
            run.log("warning", text=f"the weights were saved as {path}: EVAL_ONLY_PATH={path} goes on")
        return
    run.log("warning", text="the weights could not be saved anywhere: they are only in memory")


def read_weights(path: str, model: GPT) -> dict:
    """Averaged weights saved by an earlier run into the model; what the file says of
    their training (see weight_facts; {}: an earlier version's file). UserError, one
    short line, for anything else."""
    what, again = f"EVAL_ONLY_PATH={plain(path, 80)}", "give a run's final_model.pt"
    views = field_views({n: p.data for n, p in model.named_parameters()})
    most = bytes_of_weights(model.s) + 1024 * len(views) + (1 << 20)
    box = unsealed(path, most, f"{what} holds no averaged weights of this script")
    weights, theirs, facts = (box.get(key, {}) for key in ("weights", "architecture", "facts"))
    if not (isinstance(weights, dict) and are_settings(theirs) and are_facts(facts)):
        raise UserError(f"{what} holds no averaged weights of this script: {again}")
    check_architecture(model.s, theirs, f"{what} holds weights")
    if strangers := set(weights) ^ set(views):
        raise UserError(f"{what} does not fit the model that the settings describe: {len(strangers)} tensors "
                        f"({plain(min(strangers, key=str), 60)}, …) are missing or too much; {again}")
    for name, view in views.items():
        w = weights[name]
        if not isinstance(w, Tensor) or (w.dtype, w.layout) != (torch.float32, torch.strided):
            raise UserError(f"{what} holds {name} in another form than float32 numbers; {again}")
        if w.shape != view.shape or not w.isfinite().all():
            raise UserError(f"{what} holds {name} in another shape, or not finite; {again}")
    load_weights(model, weights, what, field_views)
    return facts


def are_settings(values) -> bool:
    """Whether these are values of settings by name."""
    return isinstance(values, dict) and all(
        type(k) is str and type(v) in (bool, int, float, str) for k, v in values.items())


def are_facts(facts) -> bool:
    """Whether a file's facts are such as weight_facts gives, or none at all."""
    kinds = {"steps": int, "train_seconds": float, "step_ms": float, "stopped": str, "seed": int,
             "world_size": int}
    if facts == {}:
        return True
    if not isinstance(facts, dict) or {k: type(v) for k, v in facts.items()} != kinds:
        return False
    numbers = [v for v in facts.values() if not isinstance(v, str)]
    return all(0 <= v < 2 ** 63 for v in numbers) and facts["stopped"] == plain(facts["stopped"], 40)


def take_over(s: Settings, run: Run, facts: Mapping) -> Clock:
    """The training clock that quantising goes on with. In the folder of the run that
    trained it has run for as long as the weights say; else the time is not known."""
    clock, seconds = Clock(s.max_wallclock_seconds), facts.get("train_seconds")
    run.time_known = run.goes_on() and seconds is not None
    if run.time_known:
        clock.start -= seconds
        keys = ("steps", "step_ms", "stopped")
        told = {k: facts[k] for k in keys if facts.get(k) not in (None, "")}
        if run.summary.get("steps") is None:      # killed in training: nothing has said it yet
            run.log("train_end", seconds=seconds, **told)
        run.summary.update(told)
        run.log("going_on", train_seconds=seconds, **told)
    return clock


def check_budget(run: Run, what: str, seconds: float, name: str, setting: float) -> None:
    """Over its setting (0: none) or the competition's budget a run is NON-COMPLIANT."""
    for budget, of in ((BUDGET_SECONDS, "the competition's"), (setting or math.inf, name)):
        if seconds > budget:
            run.not_compliant(f"{what} took {seconds:.1f} s of {of} {budget:g} s")
            return


def marked(blob: bytes, why: str) -> bytes:
    """The artifact, telling whoever scores it why it is NON-COMPLIANT, in at most
    MARK_BYTES more."""
    header, streams = artifact_from_bytes(blob, ARTIFACT_NAME)
    both = filter(None, [header.get("not_compliant"), plain_mark(why)[:MARK_BYTES - 32]])
    header["not_compliant"] = plain_mark("; ".join(both))
    return artifact_to_bytes(header, streams)


def plain_mark(text: str) -> str:
    """A mark as it is written and read: bounded ASCII that takes one byte each in
    JSON."""
    return re.sub(r'[^ -~]|["\\]', "?", text[:MARK_BYTES])


def write_artifact(s: Settings, run: Run, blob: bytes, clock: Clock) -> tuple[float, int]:
    """Put the artifact on disk, on rank 0; seconds of training's clock, and bytes. It
    is judged when its bytes are on disk, and gets its name only with the mark and the
    summary that tell the verdict: no kill comes between."""
    def judged() -> bytes:
        nonlocal blob, seconds
        seconds = clock.elapsed()
        if not run.time_known:
            run.not_compliant("the weights come from EVAL_ONLY_PATH: their training time is not known")
        else:
            check_budget(run, "training, calibration and packing (for which GPTQ_RESERVE_SECONDS keeps time)",
                         seconds, "MAX_WALLCLOCK_SECONDS", s.max_wallclock_seconds)
        of_scoring = study_reasons(s)
        of_training = [why for why in run.summary["not_compliant_because"] if why not in of_scoring]
        if of_training:
            blob = marked(blob, "; ".join(of_training))
        run.summary.update(
            artifact_bytes=len(blob), artifact_digest=digest_of(blob).hex(),
            total_bytes=len(blob) + code_bytes(shipped_form(s)), train_seconds=seconds,
            training_not_compliant_because=of_training)
        run.save_summary()
        return blob

    seconds = 0.0
    count_up(run, "quantising_runs")
    write_atomic(run.dir / ARTIFACT_NAME, blob, judged)
    return seconds, len(blob)


def count_up(run: Run, key: str) -> None:
    """One more run of a stage that can be run again in the same folder."""
    run.summary[key] = run.summary.get(key, 0) + 1


def open_artifact(s: Settings, world: World, model: GPT, path: Path) -> tuple[int, str, str]:
    """The weights of the artifact at path into the model; its size, mark and digest."""
    blob = read_bounded(path, MOST_ARTIFACT, "a run's final_model.int6.ptz") if world.main else None
    blob = world.agree(blob)
    found = read_artifact(s, blob, path.name)
    load_weights(model, found.weights, path.name)
    raw = found.calibration
    model.calibration = None if raw is None else calibrated_by(s, raw.to(world.device))
    return len(blob), found.mark, digest_of(blob).hex()


def log_score(run: Run, stage: str, score: Score, ledger: Ledger, clock: Clock) -> None:
    """A stage's score, into the summary at once, and off the clock its profiles."""
    check_score(stage, score)
    run.log(f"score_{stage}", val_loss=score.loss, val_bpb=score.bpb, elapsed=clock.elapsed())
    run.summary[f"{stage}_val_bpb"] = score.bpb
    with clock.exclude():
        run.save_summary()
        with run.guarded(f"the profiles of {stage}"):
            for profile in ledger.profiles():
                run.log("profile", quiet=True, stage=stage, **profile)


def log_decodable_score(s: Settings, run: Run, score: Score) -> None:
    """The score by the bytes that the text has: normalising tokenizers lose some that the
    rule counts."""
    decodable = read_manifest(s).get("decodable_val_bytes")
    if decodable and s.val_doc_fraction == 1:
        bpb = run.summary["val_bpb_decodable"] = score.loss_sum / LN2 / decodable
        run.log("honest_bytes", counted=int(score.byte_sum), decodable=decodable,
                val_bpb_decodable=bpb)


def check_score(stage: str, score: Score) -> None:
    """A score that is not finite is none."""
    if not math.isfinite(score.bpb):
        raise UserError(f"the score of the stage {stage} is {score.bpb}: the weights are of no use "
                        "(too large a learning rate, or a damaged file); train again, with a lower "
                        "MATRIX_LR")


TEXT_BASELINE_LIMIT = 8 << 20     # bytes of validation text that general-purpose compressors can manage


def text_baselines(s: Settings, val: Validation) -> dict[str, float]:
    """Bits per byte of general-purpose compressors on the validation text, when it is
    short enough."""
    if s.caseops_enabled or val.target_bytes.sum() > TEXT_BASELINE_LIMIT:     # CaseOps text is transformed
        return {}
    sp, documents = load_tokenizer(s.tokenizer), zip(val.documents.start, val.documents.length)
    pieces = (val.tokens[a + 1:a + n] for a, n in documents)
    text = "\n".join(sp.decode(piece[piece != BOS].tolist()) for piece in pieces).encode()
    return {"brotli-11": 8 * len(brotli.compress(text, quality=11)) / len(text),
            "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)}


def closing_block(s: Settings, world: World, run: Run, val: Validation) -> None:
    """Every score, size and time, and one last line that is easy to grep."""
    summary = run.summary
    run.say("\n" + "-" * 72)
    for label, key in (("untrained", "untrained_val_bpb"), ("averaged weights", "prequant_val_bpb"),
                       ("quantised", "quantized_val_bpb"), ("sliding windows", "sliding_val_bpb"),
                       ("test-time training", "ttt_val_bpb")):
        if summary.get(key) is not None:
            run.say(f"{label:28} {summary[key]:10.5f} BPB")
    summary["text_baselines"] = {}
    if world.main:
        with run.guarded("the comparison with text compressors"):
            summary["text_baselines"] = text_baselines(s, val)
    for label, bpb in summary["text_baselines"].items():
        run.say(f"{label + ' on the same text':28} {bpb:10.5f} bits per byte")
    if summary["artifact_bytes"]:
        run.say(f"{'artifact + script':28} {summary['artifact_bytes']:,} + {summary['code_bytes']:,} = "
                f"{summary['total_bytes']:,} of {ARTIFACT_LIMIT:,} bytes")
    for reason in summary["not_compliant_because"]:
        run.say(f"NON-COMPLIANT: {reason}")
    run.say("-" * 72)
    keys = ("val_bpb", "sliding_val_bpb", "quantized_val_bpb", "total_bytes", "steps", "train_seconds",
            "eval_seconds", "tokens_scored", "seed")
    run.log("final", **{k: summary[k] for k in keys if summary[k] is not None})


# What takes less memory, by the first word of what a rank was doing.
LESS_MEMORY = {"scoring": "lower VAL_BATCH_TOKENS", "adapting": "lower TTT_BATCH_SIZE",
               "quantising": "free memory on the host"}


def open_screens() -> None:
    """A screen of ASCII gets ? for what it cannot show; one that is closed is
    replaced by none."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or GPU had no more memory to give."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    said = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(words in text for words in said)


def end_early(error: BaseException, run: Run | None, rank: int) -> int:
    """Say in one line why the run ends, and how to go on; the exit status."""
    if SIGNALS.number and not isinstance(error, Interrupted):
        # a collective broke because another rank obeyed first
        error = SIGNALS.error("the run was interrupted")
    pulse = run.world.pulse if run is not None else Pulse()
    if rank:
        time.sleep(2)     # rank 0 says it, unless it alone did not see the mistake
    if pulse.ending:      # the heartbeat has said why and is about to end this process
        time.sleep(60)
    if isinstance(error, BrokenPipeError) and run is None:      # as in --help | head
        sys.stdout = open(os.devnull, "w")
        return 0
    status, line, trace = getattr(error, "status", 2), str(error), ""
    if is_out_of_memory(error):
        word = pulse.doing.split()[0]
        less = LESS_MEMORY.get(word, "raise GRAD_ACCUM_STEPS, or lower TRAIN_BATCH_TOKENS")
        why = f"{in_a_line(error):.160}"
        line = f"out of memory at \"{pulse.doing}\" on rank {rank} ({why}): {less}"
    elif not isinstance(error, UserError) and not hasattr(error, "status"):
        status, line = 1, in_a_line(error)
        trace = "".join(traceback.format_exception(error))
    event = "error"
    if isinstance(error, Interrupted):
        event = "interrupted"
        if rank:      # rank 0 has said it
            return status
    if run is None:
        tell(f"{event}: {line}")
        if trace:      # there is no log yet
            tell(trace)
        return status
    run.failed(line, trace, again=not isinstance(error, UserError), event=event)
    run.close()
    return status


# ============================================================================================================
# 10  Data: shards, training streams, validation documents, bytes per token
# ============================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256    # 256 little-endian int32, then uint16 tokens


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one shard, (N,) uint16, mapped not loaded. UserError when it is
    missing, foreign or cut."""
    path, again = Path(path), "fetch or build the data again"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):       # a pipe would wait for ever
            raise UserError(f"{path} is no token shard but a folder, pipe or device; {again}")
        size, header = found.st_size, np.fromfile(path, dtype="<u4", count=SHARD_HEADER)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}; {again}") from error
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is no token shard: it starts with {header[:2].tolist()}, expected "
                        f"[{SHARD_MAGIC}, {SHARD_VERSION}]; {again}")
    count = int(header[2])
    expected = 4 * SHARD_HEADER + 2 * count
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes but its header promises {expected:,}: "
                        f"{'truncated' if size < expected else 'too long'}; {again}")
    if count < 2:
        raise UserError(f"{path} holds {count} tokens: at least 2 are needed; {again}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER)


def list_shards(folder: Path, kind: str) -> list[Path]:
    """Sorted `fineweb_<kind>_*.bin` of a folder; kind is train, val or val_bytes.
    UserError when none."""
    folder = Path(folder)
    if kind == "val" and Validation.sealed:
        raise RuntimeError(SEALED)
    found = sorted(folder.glob(f"fineweb_{kind}_*.bin"))
    found = [p for p in found if kind != "val" or "_bytes_" not in p.name]
    if not found:
        what = f"has no fineweb_{kind}_*.bin" if folder.is_dir() else "does not exist"
        raise UserError(f"DATA_PATH={folder} {what}: data/README.md says how to fetch or build shards")
    return found


def read_tokens(s: Settings, kind: str, most: int | None = None) -> dict[Path, np.ndarray]:
    """Tokens of all shards of a kind, by path, mapped. Refused unless the first
    `most` tokens of each hold documents, the first of them whole (published shards
    are cut anywhere), and ids of the vocabulary."""
    shards = {path: read_shard(path) for path in list_shards(s.shards, kind)}
    for i, (path, whole) in enumerate(shards.items()):
        tokens = whole[:most]
        for bad, fault in (
            (tokens[0] == 0, f"starts with 0, not with BOS (id {BOS}): it is a byte sidecar, not tokens"),
            (not has_bos(whole), f"holds no BOS (id {BOS}): documents cannot be told apart"),
            (i == 0 and tokens[0] != BOS,
             f"starts with token {tokens[0]}, not BOS (id {BOS}): its first document is cut"),
        ):
            if bad:
                raise UserError(f"{path} {fault}; build the shards again, with a BOS before every document")
        check_ids(path, tokens, s.vocab_size)
    return shards


def has_bos(tokens: np.ndarray, block: int = 1_000_000) -> bool:
    """Whether a BOS is among the tokens, of which no more than needed are read."""
    return any((tokens[a:a + block] == BOS).any() for a in range(0, len(tokens), block))


def check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Refuse tokens of a shard that are not of the vocabulary."""
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(f"{path} holds token {tokens[at]} at position {at} but VOCAB_SIZE={vocab_size}: set "
                        "VOCAB_SIZE and TOKENIZER_PATH to those it was made with")


def read_sidecars(s: Settings, shards: Mapping[Path, np.ndarray]) -> np.ndarray | None:
    """Bytes of every token (N,) int64 of these shards by their sidecars; None where
    there are no sidecars."""
    sidecars = [path.with_name(path.name.replace("_val_", "_val_bytes_")) for path in shards]
    if not any(path.exists() for path in sidecars):
        return None
    for path, tokens in zip(sidecars, shards.values()):
        counts, wrong = read_shard(path), "the byte sidecar belongs to other shards; fetch both again"
        if len(counts) != len(tokens):
            raise UserError(f"{path} has {len(counts):,} entries for {len(tokens):,} tokens: {wrong}")
        if (at := np.flatnonzero((tokens == BOS) & (counts != 0))).size:
            raise UserError(f"{path} counts {counts[at[0]]} bytes for the BOS at position {at[0]}: {wrong}")
    out = np.concatenate([read_shard(path) for path in sidecars]).astype(np.int64)
    told = manifest_total(s, "val_bytes", "text_bytes")
    if told not in (None, out.sum()) or not out.any():
        says = "which cannot be" if told is None else f"the manifest says {told:,}"
        raise UserError(f"the sidecars of {s.shards} count {out.sum():,} bytes, {says}: damaged or of other "
                        "shards; fetch both again")
    return out


def read_manifest(s: Settings) -> dict:
    """The folder's manifest.json, written by the data tools; empty when there is
    none, or one of another program. UserError when it is damaged."""
    path, remedy = s.shards / "manifest.json", "fetch or build the data again"
    if not path.exists():
        return {}
    manifest = read_json(path, f"the data tools' manifest: {remedy}")
    if not {"files", "fingerprint"} <= set(manifest):
        return {}
    if fault := manifest_fault(manifest):
        raise UserError(f"{path} is damaged ({fault}): {remedy}")
    return manifest


def manifest_fault(manifest: Mapping) -> str:
    """What in a manifest is not as the data tools write it; empty: nothing."""
    if not isinstance(manifest["files"], list) or not isinstance(manifest["fingerprint"], str):
        return "files is no list, or the fingerprint no text"
    for i, entry in enumerate(manifest["files"]):
        if not isinstance(entry, dict):
            return f"file {i} is no object"
        if not all(isinstance(entry.get(key), str) for key in ("name", "kind")):
            return f"file {i} has no name or no kind"
        if not all(is_count(entry.get(key, 0)) for key in ("size", "tokens", "documents", "text_bytes")):
            return f"file {i} counts what is no whole number"
    for key in ("split", "tokenizer"):      # no tokenizer: null
        if not isinstance(manifest.get(key) or {}, dict):
            return f"{key} is no object"
    if not is_count(manifest.get("decodable_val_bytes") or 0):
        return "decodable_val_bytes is no whole number"
    return ""


def is_count(value) -> bool:
    """Whether a value from JSON is a whole number of 0 or more."""
    return type(value) is int and 0 <= value < 2 ** 63


def manifest_total(s: Settings, kind: str, what: str) -> int | None:
    """Sum of an entry over the manifest's files of a kind; None where it is not told."""
    told = [entry.get(what) for entry in read_manifest(s).get("files", ()) if entry["kind"] == kind]
    return None if not told or None in told else sum(told)


@dataclass(frozen=True)
class Layout:
    """Documents of a packed row: cu_seqlens (n,) int32 starts, then the total as
    padding; longest piece. isolate: a segment that begins inside a document is not
    smeared with the token packed before it either."""
    cu_seqlens: Tensor
    max_seqlen: int
    isolate: bool = False


class Batch(NamedTuple):
    """x, y (B, T) int64; of a packed row: segment bounds, its longest piece, the cut,
    its tokens."""
    x: Tensor
    y: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    cut: int = 0
    tokens: np.ndarray | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on the device; from pinned memory without waiting."""
        def move(t):
            placed = t is None or t.device.type == device.type
            return t if placed else t.pin_memory().to(device, non_blocking=True)
        return self._replace(x=move(self.x), y=move(self.y), cu_seqlens=move(self.cu_seqlens))

    def rows(self, length: int) -> Batch:
        """The same tokens as rows of this length, documents not kept apart."""
        return Batch(self.x.view(-1, length), self.y.view(-1, length), None, length)

    def layout(self, cap: int) -> Layout | None:
        """Document layout; `cap` bounds a piece's length and is fixed, so that
        compiled graphs are reused."""
        return None if self.cu_seqlens is None else Layout(self.cu_seqlens, cap)


def segment_bounds(bos: np.ndarray, total: int, max_len: int, bucket: int = 64) -> tuple[np.ndarray, int]:
    """Attention segments of a row of `total` tokens: (cu_seqlens int32, longest
    segment). A segment starts at 0, at each BOS, every max_len (0: never) tokens of a
    document; padded with `total` to whole `bucket`s."""
    starts = np.unique(np.concatenate([[0], np.asarray(bos, dtype=np.int64)]))
    lengths = np.diff(np.append(starts, total))
    if max_len > 0:
        pieces = -(-lengths // max_len)
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + within * max_len
        lengths = np.diff(np.append(starts, total))
    padded = -(-(len(starts) + 1) // bucket) * bucket
    bounds = np.full(padded, total, dtype=np.int32)
    bounds[:len(starts)] = starts
    return bounds, int(lengths.max())


def packed_batch(tokens: np.ndarray, max_len: int) -> Batch:
    """n + 1 consecutive tokens as one packed row of n inputs and targets, segmented
    by document."""
    t = torch.from_numpy(tokens.astype(np.int64))
    bounds, longest = segment_bounds(np.flatnonzero(tokens[:-1] == BOS), len(tokens) - 1, max_len)
    return Batch(t[None, :-1], t[None, 1:], torch.from_numpy(bounds), longest, max_len, tokens)


class Stream:
    """Micro-batches of one rank, in an order that the files fix. max_len: of a
    segment or a window."""
    windowed = False      # rows of whole windows, without document bounds

    def __init__(self, files, *, world_size: int, rank: int, tokens: int, max_len: int,
                 vocab_size: int = 65536):
        self.vocab_size = vocab_size
        self.shards = [read_shard(f) for f in files]
        self.ends = np.cumsum([len(x) for x in self.shards])
        self.world_size, self.rank, self.tokens, self.max_len = world_size, rank, tokens, max_len
        self.batches = 0

    @property
    def epoch(self) -> float:
        """Tokens that all ranks have taken, over those there are."""
        return self.batches * self.world_size * self.tokens / int(self.ends[-1])

    def next(self) -> Batch:
        """The next micro-batch; UserError when it holds an id that is not of the
        vocabulary."""
        batch, self.batches = self.cut(), self.batches + 1
        if max(int(batch.x.max()), int(batch.y.max())) >= self.vocab_size:
            for tokens in self.shards:
                check_ids(Path(tokens.filename), tokens, self.vocab_size)
        return batch

    def skip(self, batches: int) -> None:
        """Pass over so many batches, as an interrupted run has done."""
        for _ in range(batches):
            self.next()


class TokenStream(Stream):
    """All shards as one endless stream, for any number of ranks: every target once
    per epoch, in order."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        if self.ends[-1] < self.tokens + 1:
            raise UserError(f"{self.ends[-1]:,} training tokens are no micro-batch: lower TRAIN_BATCH_TOKENS")

    def cut(self) -> Batch:
        start, count, parts = (self.batches * self.world_size + self.rank) * self.tokens, self.tokens + 1, []
        while count > 0:
            start %= int(self.ends[-1])      # the stream wraps at the end of the last shard
            i = int(np.searchsorted(self.ends, start, side="right"))
            begin = start - int(self.ends[i]) + len(self.shards[i])
            parts.append(np.asarray(self.shards[i][begin:begin + count]))
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return packed_batch(np.concatenate(parts), self.max_len)

    def skip(self, batches: int) -> None:
        self.batches += batches      # where a batch lies follows from its number


class DocPackStream(Stream):
    """The field's: ranks cut a span of (tokens + 1) x world_size from a shard; a
    shorter rest is dropped."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        self.span, self.shard = (self.tokens + 1) * self.world_size, 0
        self.first = [int(np.argmax(x == BOS)) for x in self.shards]
        self.cursor = self.first[0]
        if all(f + self.span > len(x) for f, x in zip(self.first, self.shards)):
            raise UserError(f"no shard holds {self.span:,} tokens from a BOS on: use TRAIN_LOADER=stream")

    def cut(self) -> Batch:
        while self.cursor + self.span > len(self.shards[self.shard]):
            self.shard = (self.shard + 1) % len(self.shards)
            self.cursor = self.first[self.shard]
        begin = self.cursor + self.rank * (self.tokens + 1)
        self.cursor += self.span
        return packed_batch(np.asarray(self.shards[self.shard][begin:begin + self.tokens + 1]), self.max_len)


LOADERS: dict[str, type[Stream]] = {"stream": TokenStream, "docpack": DocPackStream}


def open_train_stream(s: Settings, world: World, tokens: int) -> Stream:
    """The training stream that TRAIN_LOADER names, for micro-batches of `tokens`
    tokens."""
    return LOADERS[s.train_loader](
        list_shards(s.shards, "train"), world_size=world.size, rank=world.rank, tokens=tokens,
        max_len=s.train_seq_len, vocab_size=s.vocab_size)


def open_stream(s: Settings, world: World, tokens: int, given: int) -> Prefetch:
    """The training stream, read ahead, after so many batches of this rank."""
    stream = open_train_stream(s, world, tokens)
    stream.skip(given)
    epoch = stream.epoch
    ahead = Prefetch(stream, world.device)
    ahead.given, ahead.epoch = given, epoch
    return ahead


class Prefetch:
    """Batches read ahead in one thread, in the stream's order. given: how many were
    given out, also before an interruption; epoch: of the last of them."""

    def __init__(self, stream: Stream, device: torch.device, depth: int = 4):
        self.stream, self.device, self.epoch, self.given = stream, device, 0.0, 0
        self.reader = ThreadPoolExecutor(1)
        self.ahead = deque(self.reader.submit(self.read) for _ in range(depth))

    def read(self) -> tuple[Batch, float]:
        return self.stream.next().to(self.device), self.stream.epoch

    def next(self, cut: int = 0) -> Batch:
        """The next batch; a packed one cut at `cut` tokens, also where it was read
        ahead with another."""
        if cut:
            self.stream.max_len = cut
        batch, self.epoch = self.ahead.popleft().result()      # raises what the thread raised
        self.given += 1
        self.ahead.append(self.reader.submit(self.read))
        stale = cut and batch.tokens is not None and batch.cut != cut
        return packed_batch(batch.tokens, cut).to(self.device) if stale else batch

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes behind each token. base (V) int16; lead (V): the piece begins with
    a space; boundary (V): control, unknown or unused, after which a leading space is
    not counted."""
    base: np.ndarray
    lead: np.ndarray
    boundary: np.ndarray

    @classmethod
    def from_sentencepiece(cls, path: Path, vocab_size: int) -> ByteTable:
        sp = load_tokenizer(path)
        if sp.vocab_size() != vocab_size:
            raise UserError(f"tokenizer {path} has {sp.vocab_size()} tokens but VOCAB_SIZE={vocab_size}: set "
                            "them to the pair that the shards were made with")
        base, lead, boundary = (np.zeros(vocab_size, kind) for kind in (np.int16, bool, bool))
        for i in range(vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                boundary[i] = True
            elif sp.is_byte(i):
                base[i] = 1
            else:
                piece = sp.id_to_piece(i)
                lead[i] = piece.startswith("\u2581")
                base[i] = len(piece.removeprefix("\u2581").encode())   # only the first one stands for a space
        return cls(base, lead, boundary)

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes (int64) of each target token after its previous token."""
        return self.base[target].astype(np.int64) + (self.lead[target] & ~self.boundary[prev])


MOST_MODEL, A_MODEL = 1 << 26, "the SentencePiece model of the shards"


def load_tokenizer(path: Path):
    """The SentencePiece model at path; UserError when it is missing or damaged."""
    import sentencepiece
    if not Path(path).exists():
        raise UserError(f"TOKENIZER_PATH={path} does not exist: see data/README.md, or set TOKENIZER_PATH")
    model = read_bounded(Path(path), MOST_MODEL, A_MODEL)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
    except RuntimeError as error:
        raise UserError(f"TOKENIZER_PATH={path} is no SentencePiece model, or damaged: set it to the "
                        "one that the shards were made with") from error


class Documents:
    """Documents of a token stream: each runs from its BOS to, and including, the next
    BOS (its last target). start, length (n,) int64; document d predicts length - 1
    targets from as many inputs, from start on."""

    def __init__(self, tokens: np.ndarray):
        starts = np.flatnonzero(tokens == BOS)
        lengths = np.diff(np.append(starts, len(tokens) - 1)) + 1
        keep = lengths > 1                      # a BOS that ends the stream predicts nothing
        self.start, self.length = starts[keep], lengths[keep]

    def __len__(self) -> int:
        return len(self.start)

    def sample(self, fraction: float, seed: int) -> Documents:
        """A random share of the documents, in stream order."""
        if fraction < 1:
            keep = sorted(random.Random(seed).sample(range(len(self)), max(1, round(len(self) * fraction))))
            self.start, self.length = self.start[keep], self.length[keep]
        return self


SEALED = "validation tokens are read while the model is made, outside of scoring: that would break the rules"


class Validation:
    """The validation stream: tokens (N,) uint16, bytes of targets (N - 1,) int64,
    documents, byte rule. While a run trains, calibrates and packs it is sealed: only
    an open ledger gets at the tokens."""
    sealed, ledgers = False, 0
    hints: Hints | None = None      # set for the evaluations whose scores n-gram counts tilt
    other_targets: np.ndarray | None = None      # a probe's, in place of the stream's

    @classmethod
    @contextlib.contextmanager
    def seal(cls):
        """Inside, reading validation tokens raises unless a ledger is open."""
        cls.sealed = True
        try:
            yield
        finally:
            cls.sealed = False

    @property
    def tokens(self) -> np.ndarray:
        if self.sealed and not self.ledgers:
            raise RuntimeError(SEALED)
        return self.stream

    @property
    def targets(self) -> np.ndarray:
        """What is scored after every input (N - 1,)."""
        return self.tokens[1:] if self.other_targets is None else self.other_targets

    def __init__(self, s: Settings):
        shards = read_tokens(s, "val")
        self.stream = np.concatenate(list(shards.values()))
        counts = read_sidecars(s, shards)
        if counts is not None:
            self.rule, self.target_bytes = "sidecar", counts[1:]
        elif s.caseops_enabled:
            raise UserError(f"CASEOPS_ENABLED=1 needs the byte sidecars of {s.shards}: fetch them, or set 0")
        else:
            table = ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size)
            self.rule, self.target_bytes = "table", table.count(self.tokens[:-1], self.tokens[1:])
        self.documents = Documents(self.tokens).sample(s.val_doc_fraction, s.seed)
        spans = zip(self.documents.start.tolist(), self.documents.length.tolist())
        if not any(self.target_bytes[a:a + n - 1].any() for a, n in spans):
            raise UserError(f"the validation documents of {s.shards} are empty: not a byte is there to be "
                            "predicted; fetch or build the data again, or raise VAL_DOC_FRACTION")

    def open_for_study(self, run: Run, why: str) -> np.ndarray:
        """The one door past the seal: marks the run NON-COMPLIANT, then hands out the
        tokens."""
        run.not_compliant(why)
        return self.stream

    @classmethod
    def of(cls, tokens: np.ndarray, targets: np.ndarray | None = None) -> Validation:
        """A made-up stream, one byte a token: for probes. Nothing of it is sealed."""
        val = cls.__new__(cls)
        val.sealed, val.other_targets = False, targets
        val.stream, val.rule, val.documents = tokens.astype(np.uint16), "made up", Documents(tokens)
        val.target_bytes = (tokens[1:] != BOS).astype(np.int64)
        return val


# ============================================================================================================
# 11  Kernels: each beside its plain twin
# ============================================================================================================

HALF = (torch.bfloat16, torch.float16)


def use_triton(wanted: bool | None, sensible: bool) -> bool:
    """Triton or not: as the caller wants it, else where it is sensible for the input
    and installed."""
    if wanted and triton is None:
        raise UserError("kernel=True asks for Triton, which is not installed: `pip install triton`, or leave "
                        "it None to use the plain PyTorch twin")
    return (sensible and triton is not None) if wanted is None else wanted


def operator(fake: Callable, gradient: Callable | None = None) -> Callable:
    """Makes a function a custom operator, which torch.compile keeps whole. fake:
    inputs -> empty outputs.

    gradient, for a function of tensors and one last number: (gradient of the first
    output, all tensors of the inputs, outputs, that number) -> the gradients of the
    first inputs; the others have none. """
    def save(ctx, inputs, output):
        *tensors, ctx.number = inputs
        ctx.save_for_backward(*tensors, *output)

    def backward(ctx, dy, *_):
        grads = gradient(dy, *ctx.saved_tensors, ctx.number)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))

    def wrap(function):
        # a name of this module's own: a second copy of the script would take the first one's operators away
        space = re.sub(r"\W", "_", function.__module__).strip("_")
        made = torch.library.custom_op(f"golf_{space}::{function.__name__}", function, mutates_args=())
        made.register_fake(fake)
        if gradient is not None:
            made.register_autograd(backward, setup_context=save)
        return made
    return wrap


if triton is not None:
    @triton.jit
    def ce_forward_kernel(logits_ptr, targets_ptr, loss_ptr, lse_ptr, cap, V, BLOCK: tl.constexpr):
        """One row a program: loss and log Σ exp of s = cap·tanh(x/cap) - cap =
        -2·cap·sigmoid(-2x/cap).

        The shift by cap cancels in the loss; the running maximum keeps any cap exact.
        """
        row = tl.program_id(0).to(tl.int64)             # N·V passes 2**31 at 262,144 tokens of 8,192
        logits_ptr += row * V
        peak, total = -float("inf"), 0.0
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            s = tl.where(cols < V, -2 * cap / (1 + tl.exp(x * (2 / cap))), -float("inf"))
            new_peak = tl.maximum(peak, tl.max(s, 0))
            total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(s - new_peak), 0)
            peak = new_peak
        lse = peak + tl.log(total)
        x = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32)
        tl.store(lse_ptr + row, lse)
        tl.store(loss_ptr + row, lse + 2 * cap / (1 + tl.exp(x * (2 / cap))))

    @triton.jit
    def ce_backward_kernel(logits_ptr, targets_ptr, lse_ptr, dloss_ptr, grad_ptr, cap, V,
                           BLOCK: tl.constexpr):
        """grad = dloss · (softmax(s) - onehot) · ds/dx, where ds/dx = 4u(1 - u) for u
        = sigmoid(-2x/cap)."""
        row = tl.program_id(0).to(tl.int64)
        target, lse, dloss = tl.load(targets_ptr + row), tl.load(lse_ptr + row), tl.load(dloss_ptr + row)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
            u = 1 / (1 + tl.exp(x * (2 / cap)))
            p = tl.exp(-2 * cap * u - lse) - tl.where(cols == target, 1.0, 0.0)
            grad = dloss * p * (4 * u * (1 - u))
            tl.store(grad_ptr + row * V + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)

    @triton.jit
    def mlp_kernel(a_ptr, b_ptr, h_ptr, out_ptr, M, N, K, b_stride_k, b_stride_n, slope,
                   BACKWARD: tl.constexpr, KEEP_H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, GROUP: tl.constexpr):
        """A (M, K), B (K, N) -> out (M, N) = act(A@B), h = A@B if KEEP_H; if
        BACKWARD, out = (A@B)·act'(h).

        Programs run down GROUP row tiles before the next column tile: tiles of A and
        B are met again in L2. """
        pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
        first = pid // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        tile_m = first + pid % (GROUP * tiles_n) % height
        tile_n = pid % (GROUP * tiles_n) // height
        rows, cols, inner = tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
        # The tile's origin is one int64 scalar (M·N may pass 2**31), the rest int32: fewer registers.
        below = M - tile_m * BM
        origin = (tile_m * BM).to(tl.int64)
        # Rows and columns out of range wrap round and are never stored: only the K loop needs a mask.
        a_ptrs = a_ptr + origin * K + (rows % below)[:, None] * K + inner[None, :]
        b_ptrs = b_ptr + inner[:, None] * b_stride_k + (cols % N)[None, :] * b_stride_n
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            a = tl.load(a_ptrs, mask=inner[None, :] < K - k, other=0.0)
            b = tl.load(b_ptrs, mask=inner[:, None] < K - k, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            a_ptrs += BK
            b_ptrs += BK * b_stride_k
        h_ptr += origin * N
        out_ptr += origin * N
        at = rows[:, None] * N + cols[None, :]
        inside = (rows < below)[:, None] & (cols < N)[None, :]
        if BACKWARD:
            h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
            out = acc * tl.where(h > 0, 2 * h, 2 * slope * slope * h)
        else:
            if KEEP_H:
                tl.store(h_ptr + at, acc.to(h_ptr.dtype.element_ty), mask=inside)
            leaky = tl.where(acc > 0, acc, slope * acc)
            out = leaky * leaky
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


# --- softcapped cross-entropy

def ce_launch(V: int) -> dict:
    """Block and warps for rows of V logits: up to 8,192 a row is one trip, 32 values
    a thread."""
    block = min(triton.next_power_of_2(V), 8192)
    return dict(BLOCK=block, num_warps=min(8, max(1, block // 256)))


@operator(fake=lambda dloss, logits, targets, lse, cap: [logits.new_empty(logits.shape)])
def ce_backward(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float) -> list[Tensor]:
    """dloss (N) -> [gradient (N, V) in the logits' dtype]; the softmax is recomputed
    from logits and lse."""
    N, V = logits.shape
    grad = torch.empty((N, V), device=logits.device, dtype=logits.dtype)
    if N:
        ce_backward_kernel[(N,)](logits.contiguous(), targets.contiguous(), lse, dloss.contiguous(), grad,
                                 cap, V, **ce_launch(V))
    return [grad]


def per_row(logits: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Room for two float32 numbers of every row."""
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))


@operator(fake=per_row, gradient=lambda dloss, logits, targets, loss, lse, cap:
          ce_backward(dloss, logits, targets, lse, cap))
def ce_forward(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """logits (N, V), targets (N) int64 -> losses (N) and log Σ exp of the shifted
    logits (N), float32."""
    N, V = logits.shape
    loss, lse = per_row(logits)
    if N:
        ce_forward_kernel[(N,)](logits.contiguous(), targets.contiguous(), loss, lse, cap, V, **ce_launch(V))
    return loss, lse


def capped_ce(logits: Tensor, targets: Tensor, cap: float, kernel: bool | None = None) -> Tensor:
    """Cross-entropy of cap·tanh(logits/cap): logits (N, V) bf16 or f32, targets (N)
    int64 -> (N) float32.

    The fused kernel reads the logits once and writes nothing of their size; the plain
    twin is float32. """
    if use_triton(kernel, logits.is_cuda):
        return ce_forward(logits, targets, float(cap))[0]
    return F.cross_entropy(cap * torch.tanh(logits.float() / cap), targets, reduction="none")


# --- leaky-ReLU² MLP

# 128×256 tiles keep 128 accumulators a thread; 3 stages take 144 of an H100's 227 KB of shared memory. Fixed,
# not autotuned: the choice would depend on timing, and the last bits of a run with it.
MLP_TILE = dict(BM=128, BN=256, BK=64, GROUP=8, num_warps=8, num_stages=3)


def mlp_launch(a: Tensor, b: Tensor, h: Tensor, out: Tensor, slope: float, backward: bool, keep_h: bool):
    """Run mlp_kernel on A = a (M, K) contiguous and B = b (K, N) of any strides."""
    (M, K), N = a.shape, b.shape[1]
    tiles = triton.cdiv(M, MLP_TILE["BM"]) * triton.cdiv(N, MLP_TILE["BN"])
    if tiles:
        mlp_kernel[(tiles,)](a, b, h, out, M, N, K, *b.stride(), slope, BACKWARD=backward, KEEP_H=keep_h,
                             **MLP_TILE)


def hidden_pair(x: Tensor, up: Tensor, slope: float, keep_h: bool) -> tuple[Tensor, Tensor]:
    """Room for h, without rows unless it is kept, and for a (N, m)."""
    N, m = x.shape[0], up.shape[0]
    return x.new_empty(N if keep_h else 0, m), x.new_empty(N, m)


@operator(fake=hidden_pair)
def mlp_up(x: Tensor, up: Tensor, slope: float, keep_h: bool) -> tuple[Tensor, Tensor]:
    """x (N, d), up (m, d) -> h = x @ upᵀ (N, m), or (0, m) unless keep_h, and a =
    leaky(h)² (N, m)."""
    h, a = hidden_pair(x, up, slope, keep_h)
    mlp_launch(x.contiguous(), up.mT, h, a, slope, backward=False, keep_h=keep_h)
    return h, a


@operator(fake=lambda dy, down, h, slope: torch.empty_like(h))
def mlp_dh(dy: Tensor, down: Tensor, h: Tensor, slope: float) -> Tensor:
    """dy (N, d), down (d, m), h (N, m) -> dh = (dy @ down) · act'(h) (N, m)."""
    dh = torch.empty_like(h)
    mlp_launch(dy.contiguous(), down, h, dh, slope, backward=True, keep_h=False)
    return dh


class LeakySquareMLP(torch.autograd.Function):
    """The whole MLP as one node, because dh = (dy @ down) · act'(h) is only fused
    where dy is at hand.

    Both h and a are kept for backward: 8 passes over an (N, m) matrix (write h, a,
    dh; read h once, a and dh twice), the least there is. Keeping h alone halves the
    memory held but writes a once more, a ninth pass; keeping a alone loses the sign
    of h. """
    @staticmethod
    def forward(ctx, x, up, down, slope):
        h, a = mlp_up(x, up, slope, True)
        ctx.save_for_backward(x, up, down, h, a)
        ctx.slope = slope
        return a @ down.mT

    @staticmethod
    def backward(ctx, dy):
        x, up, down, h, a = ctx.saved_tensors
        need_x, need_up, need_down, _ = ctx.needs_input_grad        # adaptation freezes the weights
        dh = mlp_dh(dy, down, h, ctx.slope) if need_x or need_up else None
        return (dh @ up if need_x else None, dh.mT @ x if need_up else None,
                dy.mT @ a if need_down else None, None)


def leaky_square_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, kernel: bool | None = None) -> Tensor:
    """leaky_relu(x @ upᵀ, slope)² @ downᵀ: x (N, d), up (m, d), down (d, m) of one
    dtype -> (N, d).

    Triton fuses the activation (in backward, its derivative) into the matrix product
    before it: bf16 in and out, sums in float32. The other products are cuBLAS's. """
    if not use_triton(kernel, x.is_cuda and x.dtype in HALF):
        return F.leaky_relu(x @ up.mT, slope).square() @ down.mT
    if torch.is_grad_enabled() and (x.requires_grad or up.requires_grad or down.requires_grad):
        return LeakySquareMLP.apply(x, up, down, float(slope))
    return mlp_up(x, up, float(slope), False)[1] @ down.mT


# --- attention

ATTENTION = "plain"         # the backend in use: set it to the name that resolve_attention returns
FLASH: dict = {}            # backend name -> its imported module, filled by attention_fault
PACKAGES = {                # backend name -> (names that its module goes by, how to get it)
    "fa3": ("flash_attn_interface flash_attn_3.flash_attn_interface",
            "FlashAttention 3's wheel for this torch and CUDA (Hopper)"),
    "fa4": ("flash_attn.cute.interface",
            "pip install flash-attn-4, see requirements.txt (Hopper or Blackwell)"),
    "torch": ("torch.nn.attention.varlen", "pip install 'torch>=2.10' with CUDA (Ampere or newer)")}


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """Causal attention: q (B, T, H, D), k, v (B, T', K, D) with H a multiple of K ->
    (B, T, H, D).

    layout None: each row is one document; if T' > T, the queries are the last T of
    its T' positions (cached keys). Otherwise the rows, laid end to end, are cut at
    layout.cu_seqlens (int32, its end padded with the total) into documents of at most
    layout.max_seqlen, and nothing is seen across a cut. Raises UserError if T' < T or
    if a layout meets T' != T. """
    if k.shape[1] < q.shape[1] or (layout is not None and k.shape[1] != q.shape[1]):
        raise UserError(f"attention got {q.shape[1]} queries and {k.shape[1]} keys a row: under a layout "
                        "they must be equal, without one keys may be more; pass layout=None with cached keys")
    # Flash kernels exist in half precision on CUDA only; float32 (parity, tests) takes the exact road.
    name = ATTENTION if q.is_cuda and q.dtype in HALF else "plain"
    cu, longest = (None, k.shape[1]) if layout is None else (layout.cu_seqlens, layout.max_seqlen)
    return BACKENDS[name](q, k, v, cu, longest)


# Every backend: q (B, T, H, D), k, v (B, T', K, D), cu (n + 1) int32 or None, the longest key sequence
# -> (B, T, H, D). All align the causal mask bottom-right.
def attend_fa3(q, k, v, cu, longest):
    """FlashAttention-3: registers its own custom ops, so torch.compile traces it as
    it is."""
    if cu is None:
        y = FLASH["fa3"].flash_attn_func(q, k, v, causal=True)
    else:
        y = FLASH["fa3"].flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, cu,
                                                longest, longest, causal=True)
    return (y[0] if isinstance(y, tuple) else y).view(q.shape)      # early releases return (y, lse)


def attend_fa4(q, k, v, cu, longest):
    """FlashAttention-4, behind our own custom op: its Python cannot be traced."""
    if cu is None:
        return fa4_forward(q, k, v, None, longest)[0]
    return fa4_forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, longest)[0].view(q.shape)


def attend_torch(q, k, v, cu, longest):
    """PyTorch's own kernels: SDPA for plain causal squares, else the FlashAttention-2
    inside varlen_attn."""
    (B, T, H, _), keys = q.shape, k.shape[1]
    if cu is None and T == keys:
        return plain_rows(q, k, v)
    rows = torch.arange(B + 1, device=q.device, dtype=torch.int32) if cu is None else None
    cu_q, cu_k = (cu, cu) if rows is None else (rows * T, rows * keys)
    y = FLASH["torch"].varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k,
                                   T if cu is None else longest, longest, window_size=(-1, 0),
                                   enable_gqa=H != k.shape[2])
    return y.view(q.shape)


def attend_plain(q, k, v, cu, longest):
    """The twin the others are held to: SDPA on any device and dtype, one document at
    a time where packed."""
    if cu is None:
        return plain_rows(q, k, v)
    rows = [x.flatten(0, 1)[None] for x in (q, k, v)]
    bounds = cu.tolist()                                # the padding at its end is segments of length zero
    parts = [plain_rows(*(x[:, a:b] for x in rows)) for a, b in zip(bounds, bounds[1:]) if b > a]
    return torch.cat(parts, dim=1).view(q.shape)


BACKENDS = {"fa3": attend_fa3, "fa4": attend_fa4, "torch": attend_torch, "plain": attend_plain}


def plain_rows(q, k, v) -> Tensor:
    """Rows that are one document each: q (B, T, H, D), k, v (B, T', K, D) -> (B, T,
    H, D), through SDPA."""
    T, keys, mask = q.shape[1], k.shape[1], None
    if T != keys:                                       # is_causal is aligned top-left
        mask = torch.arange(keys - T, keys, device=q.device)[:, None] >= torch.arange(keys, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


# FlashAttention-4 registers no custom ops, and PyTorch 2.13's activate_flash_attention_impl
# unpacks two results where 4.0.0b36 returns five: so we call its two inner functions ourselves, by keyword.
signature = functools.cache(inspect.signature)      # reading one takes longer than launching a kernel


def fa4_call(name: str, *tensors, cu, longest):
    """_flash_attn_fwd or _flash_attn_bwd, with those of our options that the
    installed release knows."""
    function = getattr(FLASH["fa4"], name)
    options = dict(causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu,
                   max_seqlen_q=None if cu is None else longest, max_seqlen_k=None if cu is None else longest,
                   return_lse=True)
    known = signature(function).parameters
    return function(*tensors, **{key: value for key, value in options.items() if key in known})


@operator(fake=lambda dy, q, k, v, *_: [x.new_empty(x.shape) for x in (q, k, v)])
def fa4_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, y: Tensor, lse: Tensor,
                 longest: int) -> list[Tensor]:
    """dy, q, y (…, H, D), k, v (…, K, D) -> dq, dk, dv."""
    grads = fa4_call("_flash_attn_bwd", q, k, v, y, dy.contiguous(), lse, cu=cu, longest=longest)
    return [g.contiguous() for g in grads[:3]]


def fa4_outputs(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Empty y and log Σ exp of the shapes that fa4_forward returns, for tracing."""
    *rows, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*rows, H, T), dtype=torch.float32)


@operator(fake=fa4_outputs, gradient=fa4_backward)
def fa4_forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """Rows (B, T, H, D) with cu None, or packed (N, H, D) -> y like q, and log Σ exp
    (B, H, T) or (H, N)."""
    y, lse = fa4_call("_flash_attn_fwd", q, k, v, cu=cu, longest=longest)[:2]
    return y.contiguous(), lse.contiguous()


def self_test(name: str, device: torch.device) -> str:
    """How a loaded backend fails, empty if it does not: forward and backward against
    the plain twin, on 128 queries, 8 query and 4 key heads of 64, in bfloat16.

    Packed with a padded end, square, with cached keys; through torch.compile without
    graph breaks. What the model would meet in its first step is met here, in seconds.
    """
    backend = torch.compile(BACKENDS[name], fullgraph=True, dynamic=False, backend="aot_eager")
    for keys, bounds in ((128, [0, 40, 41, 128, 128]), (128, None), (192, None)):
        random, results = torch.Generator().manual_seed(0), []
        q, k, v, dy = (torch.randn(1, T, heads, 64, generator=random).to(device, torch.bfloat16)
                       for T, heads in ((128, 8), (keys, 4), (keys, 4), (128, 8)))
        cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        for attend in (backend, attend_plain):
            with torch.enable_grad():
                y = attend(*leaves, cu, keys)
            results.append([x.detach().float() for x in (y, *torch.autograd.grad(y, leaves, dy))])
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(*results))
        if not error < 0.03:                            # bf16 gives 0.005; NaN fails too
            return f"differs from the plain twin by {error:.1%} (bound 3%) at keys, cu = {keys, bounds}"
    return ""


def attention_fault(name: str, device: torch.device) -> str:
    """Why backend `name` cannot run on `device`, in one line; empty if it can. Loads
    it into FLASH."""
    if name == "plain":
        return ""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA GPU, the device is {device}"
    fault = ""
    for module in PACKAGES[name][0].split():
        try:
            FLASH[name] = importlib.import_module(module)
            return self_test(name, device)
        except Exception as error:                      # third-party kernels fail in every way there is
            first_line = (str(error).strip() or "no message").splitlines()[0][:160]
            fault = fault or f"{type(error).__name__}: {first_line}"
    return fault


def resolve_attention(choice: str, device) -> tuple[str, str]:
    """ATTN_BACKEND auto, fa3, fa4, torch or plain -> (the backend that runs on
    `device`, why in one line).

    Auto takes the first without an attention_fault. Raises UserError for an unknown
    choice and for a forced one that cannot run. The caller stores the name in
    ATTENTION. """
    if choice not in ("auto", *BACKENDS):
        raise UserError(f"ATTN_BACKEND={choice} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    passed_over = []
    for name in BACKENDS if choice == "auto" else (choice,):
        fault = attention_fault(name, torch.device(device))
        if not fault:
            how = "chosen" if choice == "auto" else "forced"
            return name, "; ".join((f"attention {name} ({how})", *passed_over))
        passed_over.append(f"not {name}: {fault}")
    raise UserError(f"ATTN_BACKEND={choice} cannot run here: {fault}. Install {PACKAGES[choice][1]}, "
                    "or set ATTN_BACKEND=auto")


# ============================================================================================================
# 12  Pack: the artifact is one file of checked streams, without pickle
# ============================================================================================================

def check_code_form(s: Settings) -> None:
    """Refuse to ship the script without what its settings need."""
    if s.code_form.startswith("lean") and (names := s.beyond_the_system()):
        raise UserError(f"CODE_FORM={s.code_form} leaves out what {', '.join(names)} needs: "
                        "set CODE_FORM=auto")


# --- container

MAGIC, ARTIFACT_VERSION = b"\x93PGOLF\r\n", 3    # a high byte and a line end: text-mode copies are noticed
PREFIX = struct.Struct("<8sHI8s")                # magic, version, bytes of JSON, digest of all that follows


def digest_of(data: bytes) -> bytes:
    """64-bit checksum."""
    return hashlib.blake2b(data, digest_size=8).digest()


def artifact_to_bytes(header: dict, streams: Mapping[str, bytes]) -> bytes:
    """PREFIX, JSON {"header", "streams": [[name, bytes], …]}, streams; equal input,
    equal bytes."""
    root = {"header": header, "streams": [[name, len(data)] for name, data in streams.items()]}
    text = json.dumps(root, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    body = b"".join([text, *streams.values()])
    return PREFIX.pack(MAGIC, ARTIFACT_VERSION, len(text), digest_of(body)) + body


def artifact_from_bytes(blob: bytes, origin: str) -> tuple[dict, dict[str, bytes]]:
    """The (header, streams) that artifact_to_bytes was given; UserError for anything
    foreign, cut or altered. Nothing is allocated beyond the blob's own size."""
    def refuse(what):
        raise UserError(f"{origin}: {what}; copy it again from where it was written, or write it again")

    if blob[:8] != MAGIC or len(blob) < PREFIX.size:
        refuse(f"is no artifact of this trainer (starts with {blob[:8]!r}, not {MAGIC!r}) or is cut off")
    _, version, at, digest = PREFIX.unpack_from(blob)
    body, streams = blob[PREFIX.size:], {}
    if version != ARTIFACT_VERSION:
        refuse(f"has format version {version}, this script reads {ARTIFACT_VERSION}")
    if digest_of(body) != digest:
        refuse(f"is cut off or damaged ({len(blob):,} bytes, checksum)")
    try:
        root = json.loads(body[:at])
        for name, size in root["streams"]:
            streams[str(name)], at = body[at:at + int(size)], at + int(size)
            if not 0 <= int(size) <= at <= len(body):
                raise ValueError(f"stream {name} of {size} bytes")
        if at != len(body):
            raise ValueError(f"{len(body) - at} bytes too many")
        return dict(root["header"]), streams
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        refuse(f"has a header that cannot be read ({type(error).__name__})")


# --- bytes

def byte_shuffle(data: bytes, stride: int) -> bytes:
    """bytes -> same length: all bytes at positions 0 mod stride, then 1 mod stride, …"""
    return b"".join(data[i::stride] for i in range(stride))


def byte_unshuffle(data: bytes, stride: int) -> bytes:
    """Inverse of byte_shuffle."""
    out, begin = bytearray(len(data)), 0
    for i in range(stride):
        end = begin + len(range(i, len(data), stride))
        out[i::stride], begin = data[begin:end], end
    return bytes(out)


def brotli_pack(data: bytes, stride: int = 1) -> bytes:
    """bytes -> bytes. stride: bytes per item (2 for float16)."""
    return brotli.compress(byte_shuffle(data, stride), quality=11, lgwin=24)


def brotli_unpack(blob: bytes, size: int, stride: int = 1) -> bytes:
    """Inverse of brotli_pack for `size` bytes of data. UserError if the blob holds
    anything else; whatever it claims, it is not expanded much beyond `size`."""
    try:
        reader = brotli.Decompressor()
        data = reader.process(blob, output_buffer_limit=size + 1)
        if len(data) != size or not reader.is_finished():
            raise brotli.error(f"{len(data)} bytes, and {'no' if reader.is_finished() else 'more'} to come")
    except brotli.error as error:
        raise UserError(f"compressed stream ({len(blob)} bytes, for {size}): {error}: damaged or written "
                        "with other settings; write the file again") from error
    return byte_unshuffle(data, stride)


def split_bytes(blob: bytes, sizes: Sequence[int], dtype: str = "i1") -> list[np.ndarray]:
    """Arrays of these sizes that brotli_pack was given one after the other."""
    stride = np.dtype(dtype).itemsize
    flat = np.frombuffer(brotli_unpack(blob, stride * sum(sizes), stride), dtype).copy()
    return np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []


# --- contexts

Sides = tuple[np.ndarray, np.ndarray]  # row_ctx (R), col_ctx (C) of one code matrix

# A context says how large a code is expected to be, in eighths of an octave: for rows 7 octaves upwards from
# an rms of 1/4, for columns 1.5 octaves to either side.
ROW_LEVELS, COLUMN_REACH = 56, 12


def code_level(codes: np.ndarray, axis: int | None = None) -> np.ndarray:
    """log2 of the rms of codes along an axis, int in eighths of an octave."""
    power = np.mean(np.square(codes, dtype=np.float32), axis=axis, dtype=np.float64)
    return np.rint(OCTAVE / 2 * np.log2(np.maximum(power, 1 / 16))).astype(int)


def code_levels(codes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Side information of codes (R, C), int8 (1 + R + C): the level of all, and by
    how many quarters of an octave the rms of each row and column differs from what
    rows (R) and columns (C) predict."""
    parts = [code_level(codes)[None]]
    for axis, predicted in ((1, rows), (0, columns)):
        beyond = code_level(codes, axis) - predicted
        parts.append(np.rint((beyond - np.median(beyond)) / 2).clip(-127, 127))
    return np.concatenate(parts).astype(np.int8)


def scale_contexts(levels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Sides:
    """(row_ctx (R), col_ctx (C)) of one code matrix from what the decoder has, by
    integers alone: its code_levels and what they were measured against."""
    whole, *beyond = np.split(levels.astype(np.int32), [1, 1 + len(rows)])
    rows, columns = (x + 2 * more for x, more in zip((rows, columns), beyond))
    rows, columns = (x - np.sort(x)[len(x) // 2] for x in (rows, columns))
    return ((rows + whole + 2 * OCTAVE).clip(0, ROW_LEVELS - 1),
            columns.clip(-COLUMN_REACH, COLUMN_REACH) + COLUMN_REACH)


# --- guesses

# The rows of an embedding share directions: what has been read of a row tells something of its next code. A
# row is taken as a sum of RANK factors, its shares in them unknown, plus noise; the guess is the recursive
# least-squares estimate, and only what differs from it is coded.
RANK, RIDGE, GAIN_BITS, TALL = 8, 1024, 24, 8


def shared_factors(codes: np.ndarray) -> np.ndarray | None:
    """Factors int8 (RANK, C) of codes (R, C) with at least TALL rows a column; None
    where they do not pay. Noise has the variance RIDGE in units of a share's."""
    if len(codes) < TALL * codes.shape[1] or codes.shape[1] <= RANK:
        return None
    rms = np.sqrt(np.square(codes, dtype=np.float32).mean(1, keepdims=True)).clip(0.25)
    size, axes = np.linalg.eigh((codes / rms).T @ (codes / rms))
    excess = np.maximum(size[-RANK:] / size[:-RANK].mean() - 1, 0)
    factors = np.rint(np.sqrt(RIDGE * excess) * axes[:, -RANK:]).T.clip(-127, 127).astype(np.int8)
    before, after = (np.square(x / rms).mean(0) + 1e-9 for x in (codes, residues(codes, factors)))
    return factors if len(codes) / 2 * np.log2(before / after).sum() > 8 * factors.size else None


class Guesser:
    """The next code of every row, by the factors (r, C) and the codes so far. In
    integers, but for gains that are computed by single operations and exact sums,
    which round alike on all machines."""

    def __init__(self, factors: np.ndarray, rows: int):
        self.factors, self.gains = factors.astype(np.int64), []
        self.sums, spread = np.zeros((len(factors), rows), np.int64), np.eye(len(factors)) / RIDGE
        for column in factors.T.astype(float):
            gain = np.array([math.fsum(row) for row in spread * column])
            self.gains.append(np.rint(gain * 2.0 ** GAIN_BITS).astype(np.int64))
            spread = spread - gain[:, None] * gain / (1 + math.fsum(gain * column))

    def guess(self, j: int) -> np.ndarray:
        """Column j, int8 (rows)."""
        guess = self.gains[j] @ self.sums + (1 << GAIN_BITS - 1) >> GAIN_BITS
        return guess.clip(-127, 127).astype(np.int8)

    def learn(self, j: int, codes: np.ndarray) -> None:
        """Take in column j's true codes, int8 (rows)."""
        self.sums += self.factors[:, j, None] * codes


def residues(codes: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    """int8 (R, C): by how much codes (R, C) differ from what their factors let
    expect, modulo 256."""
    if factors is None:
        return codes
    guesser, out = Guesser(factors, len(codes)), np.empty_like(codes)
    for j in range(codes.shape[1]):
        out[:, j] = codes[:, j] - guesser.guess(j)
        guesser.learn(j, codes[:, j])
    return out


# --- tables

PROB_BITS = 12
PROB_ONE = 1 << PROB_BITS
NO_LEVEL = 255        # a table of its own
ESCAPES = (128, 127)  # uint8 codes standing for even and odd ones listed apart: a trellis walks on parity


@functools.cache
def normal_table(level: int, odd: int) -> np.ndarray:
    """Frequencies (256), PROB_ONE in all, of codes as uint8 around -odd / 2 with a
    deviation of level eighths of an octave above 1/4. In decimal arithmetic, which is
    the same on all machines."""
    with decimal.localcontext(decimal.Context(prec=12)):
        narrow = (decimal.Decimal(16 - level) / 4 * decimal.Decimal(2).ln()).exp() / 2
        centre = decimal.Decimal(odd) / 2
        weight = np.array([int((-narrow * (k + centre) ** 2).exp() * 10 ** 9) for k in range(-128, 128)])
    weight = np.roll(weight, -128)
    weight[ESCAPES,] = 0
    freq, left = np.divmod(weight * (PROB_ONE - 2), weight.sum())
    freq[ESCAPES,] = 1
    freq[np.argsort(-left, kind="stable")[:PROB_ONE - freq.sum()]] += 1
    return freq


def fold(count: np.ndarray, rare: np.ndarray) -> np.ndarray:
    """Counts (256) with those of the rare codes (256) given to the escapes of their
    parity."""
    kept = np.where(rare, 0, count)
    for parity, escape in enumerate(ESCAPES):
        kept[escape] = (count * rare)[parity::2].sum()
    return kept


def fitted_table(count: np.ndarray) -> np.ndarray:
    """Frequencies (256), PROB_ONE in all, for counts (256) of codes as uint8. Rare
    ones get none: a slot costs the others 1 / PROB_ONE, and listing a code apart
    costs about a byte a piece."""
    kept = fold(count, listed_apart(6 * PROB_ONE * count >= count.sum()))
    freq = np.maximum(kept * PROB_ONE // kept.sum(), kept > 0)
    while (excess := freq.sum() - PROB_ONE) != 0:
        step = -1 if excess > 0 else 1
        gain = kept * np.log2(np.maximum(freq + step, 1) / np.maximum(freq, 1))  # bits won by moving a slot
        freq[np.where((kept > 0) & (freq + step > 0), gain, -np.inf).argmax()] += step
    return freq


def listed_apart(freq: np.ndarray) -> np.ndarray:
    """Which codes a table (…, 256) of frequencies does not hold: the others, and what
    escapes stand for."""
    rare = freq == 0
    rare[..., ESCAPES] = True
    return rare


def choose_table(count: np.ndarray, odd: int) -> tuple[int, np.ndarray]:
    """(level, frequencies) of the normal table nearest to counts (256); level
    NO_LEVEL where one of their own is worth the six bits that a frequency takes."""
    def bits(freq):
        rare = listed_apart(freq)
        return fold(count, rare) @ (PROB_BITS - np.log2(np.maximum(freq, 1))) + 8 * (count @ rare)

    code = np.arange(256, dtype=np.uint8).view(np.int8) + odd / 2
    power = count @ code ** 2 / max(count.sum(), 1)
    near = round(2 * OCTAVE + OCTAVE / 2 * math.log2(max(power, 1 / 16)))
    level, freq = min(((k, normal_table(k, odd)) for k in range(max(near - 1, 0), near + 2)),
                      key=lambda x: bits(x[1]))
    own = fitted_table(count) if count.any() else freq
    return (NO_LEVEL, own) if bits(own) + 6 * np.count_nonzero(own) < bits(freq) else (level, freq)


# --- codes

# rANS (Duda 2013; interleaved as in Giesen 2014). A lane is one state; it codes a row, and all lanes go
# through the columns together. Rows of all tensors with equal C are stacked, and lanes live on from batch to
# batch: Python's loop is (rows / lanes) x columns long whatever the number of tensors, a lane costs 4 bytes.
LOW, LANES = 1 << 16, 1024
CODES_HEAD = struct.Struct("<HHII")  # lanes, K, listed codes, bytes of (own tables, listed codes) packed


def lane_count(size: int) -> int:
    """Lanes for so many codes."""
    return min(LANES, 1 + (size >> 14))


def equal_widths(sides: Sequence[Sides], factors: Mapping[int, np.ndarray]) -> Iterator[tuple]:
    """Tensors by C, those with factors alone. Yields tensor numbers (T), owner (R) in
    0…T-1, row_ctx (R), col_ctx (C, T), factors or None."""
    groups = {}
    for i, (_, columns) in enumerate(sides):
        groups.setdefault((len(columns), i if i in factors else len(sides)), []).append(i)
    for (_, first), ids in sorted(groups.items()):
        rows, columns = zip(*(sides[i] for i in ids))
        owner = np.repeat(np.arange(len(ids)), [len(r) for r in rows])
        rows, columns = np.concatenate(rows).astype(np.int32), np.stack(columns, 1).astype(np.int32)
        yield ids, owner, rows, columns, factors.get(first)


def count_contexts(sides: Sequence[Sides], trellis: np.ndarray | None) -> int:
    """K: contexts are 0…K-1, twice as many with a trellis."""
    return max(int(max(r) + max(c)) for r, c in sides) + 1 << (trellis is not None)


def next_state(state: np.ndarray, codes: np.ndarray, trellis: np.ndarray) -> np.ndarray:
    """Next trellis states (n) from states (n) and codes (n) uint8: only the parity of
    a code counts."""
    return trellis.take(state << 1 | codes & 1)


def state_bits(codes: np.ndarray, trellis: np.ndarray) -> np.ndarray:
    """The low bit of the trellis state before each of the codes (C, n): a walk from
    state 0 down a column."""
    bits, state = np.empty(codes.shape, np.uint8), np.zeros(codes.shape[1], np.uint8)
    for bit, column in zip(bits, codes.view(np.uint8)):
        bit[:] = state & 1
        state = next_state(state, column, trellis)
    return bits


def rans_encode(lanes: np.ndarray, index: np.ndarray, freq: np.ndarray, start: np.ndarray) -> list:
    """Push a batch, last column first. lanes (n) uint32 in place, index (C, n) into
    freq, start -> words."""
    freq, start, x, words = freq.take(index), start.take(index), lanes.copy(), []
    for f, s in zip(freq[::-1], start[::-1]):
        full = np.flatnonzero(x >> 32 - PROB_BITS >= f)
        words.append((x[full] & 0xFFFF).astype("<u2"))
        x[full] >>= 16
        quotient = x // f
        x = (quotient << PROB_BITS) + (x - quotient * f) + s
    lanes[:] = x
    return words


class Decoder:
    """What of a blob of codes has not been read: lanes (n) uint32, words (W) uint16,
    listed codes (N) uint8. table: code << 24 | frequency - 1 << 12 | slot - start."""

    def __init__(self, lanes: np.ndarray, words: np.ndarray, listed: np.ndarray, table: np.ndarray,
                 trellis: np.ndarray | None):
        self.lanes, self.words, self.listed, self.table = lanes, words, listed, table
        self.trellis = trellis

    def reveal(self, symbols: np.ndarray) -> None:
        """Put listed codes in the place of escapes."""
        marked = (symbols == ESCAPES[0]) | (symbols == ESCAPES[1])
        count = np.count_nonzero(marked)
        if count > self.listed.size:
            raise UserError("a listed weight code is missing: damaged; write the file again")
        symbols[marked], self.listed = self.listed[:count], self.listed[count:]

    def batch(self, slots: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
        """Pop codes (C, n) uint8. slots (C, n) uint32: where a context begins in the
        table."""
        count, read = slots.shape[1], 0
        codes, x, state = np.empty(slots.shape, np.uint8), self.lanes[:count], np.zeros(count, np.uint8)
        guesser = None if factors is None else Guesser(factors, count)
        for j, slot in enumerate(slots):
            if self.trellis is not None:
                slot += (state & 1).astype(np.uint32) << PROB_BITS
            entry = self.table.take(slot + (x & PROB_ONE - 1))
            codes[j] = entry >> 24
            x = ((entry >> PROB_BITS & PROB_ONE - 1) + 1) * (x >> PROB_BITS) + (entry & PROB_ONE - 1)
            low = np.flatnonzero(x < LOW)
            if low.size > self.words.size - read:
                raise UserError("weight codes end too soon: damaged or other settings; write the file again")
            x[low] = x[low] << 16 | self.words[read:read + low.size]
            read += low.size
            if guesser is not None:
                self.reveal(codes[j])
                codes[j] += guesser.guess(j).view(np.uint8)
                guesser.learn(j, codes[j].view(np.int8))
            if self.trellis is not None:
                state = next_state(state, codes[j], self.trellis)
        self.lanes[:count], self.words = x, self.words[read:]
        if guesser is None:
            self.reveal(codes)
        return codes


def encode_codes(codes: Sequence[np.ndarray], sides: Sequence[Sides], trellis: np.ndarray | None = None,
                 factors: Mapping[int, np.ndarray] = {}) -> bytes:
    """Codes [int8 (R, C), …] -> bytes. sides [(row_ctx (R), col_ctx (C)), …]: the
    context of a code is the sum of its two, 0…255; nothing may be empty. trellis:
    uint8 (states, 2), next state by parity of the code; rows start in state 0, and
    the state's low bit doubles the contexts (then 0…127). factors: by number, those
    of tensors whose residues are coded."""
    count, lanes = count_contexts(sides, trellis), lane_count(sum(c.size for c in codes))
    batches = []  # (C, n) uint16: context << 8 | code as uint8
    for ids, owner, rows, columns, shared in equal_widths(sides, factors):
        stack = np.concatenate([codes[i] for i in ids])
        shown = residues(stack, shared).view(np.uint8)
        for part in (slice(at, at + lanes) for at in range(0, len(rows), lanes)):
            context = columns[:, owner[part]] + rows[part]
            if trellis is not None:
                context = 2 * context + state_bits(np.ascontiguousarray(stack[part].T), trellis)
            batches.append((context << 8 | shown[part].T).astype(np.uint16))
    counts = sum(np.bincount(b.ravel(), minlength=count << 8) for b in batches).reshape(count, 256)
    levels, freq = zip(*(choose_table(n, i & (trellis is not None)) for i, n in enumerate(counts)))
    freq = np.stack(freq)
    rare = listed_apart(freq)
    listed = b"".join(b[rare.take(b)].astype(np.uint8).tobytes() for b in batches)
    alias = np.where(rare, np.tile(ESCAPES, 128), np.arange(256)) + 256 * np.arange(count)[:, None]
    pushed, start = (a.astype(np.uint32).take(alias) for a in (freq, np.cumsum(freq, 1) - freq))
    states, words = np.full(lanes, LOW, np.uint32), []
    for batch in reversed(batches):
        words += rans_encode(states[:batch.shape[1]], batch, pushed, start)
    own = freq[np.array(levels) == NO_LEVEL].astype("<u2").tobytes()
    front = brotli_pack(byte_shuffle(own, 2) + listed)
    return b"".join([CODES_HEAD.pack(lanes, count, len(listed), len(front)), bytes(levels), front,
                     states.astype("<u4").tobytes(), *(w.tobytes() for w in reversed(words))])


def decode_codes(blob: bytes, sides: Sequence[Sides], trellis: np.ndarray | None = None,
                 factors: Mapping[int, np.ndarray] = {}) -> list[np.ndarray]:
    """Inverse of encode_codes -> [int8 (R, C), …]. UserError if the rest is not the
    encoder's or the blob is damaged: all words must be used up and all states be back
    where the encoder began."""
    def check(good, what):
        if not good:
            raise UserError(f"weight codes: {what}: damaged or other settings; write the file again")

    count, size, out = count_contexts(sides, trellis), sum(len(r) * len(c) for r, c in sides), {}
    lanes, stored, n_listed, n_front = CODES_HEAD.unpack(blob[:CODES_HEAD.size].ljust(CODES_HEAD.size, b"\0"))
    levels, front = blob[CODES_HEAD.size:CODES_HEAD.size + count], CODES_HEAD.size + count + n_front
    rest = len(blob) - front - 4 * lanes
    check(lanes == lane_count(size) and stored == count and n_listed <= size and rest >= 0 and rest % 2 == 0,
          f"header {lanes, stored, n_listed, n_front} for {count} contexts, {size} codes, {len(blob)} bytes")
    owns = 512 * levels.count(NO_LEVEL)
    raw = brotli_unpack(blob[front - n_front:front], owns + n_listed)
    own = iter(np.frombuffer(byte_unshuffle(raw[:owns], 2), "<u2").reshape(-1, 256).astype(np.int64))
    freq = np.stack([next(own) if level == NO_LEVEL else normal_table(level, i & (trellis is not None))
                     for i, level in enumerate(levels)])
    check((freq.sum(1) == PROB_ONE).all(), f"a table does not sum to {PROB_ONE}")
    slot_owner = np.repeat(np.arange(freq.size), freq.ravel())                   # context << 8 | code
    offset = np.arange(slot_owner.size) - (np.cumsum(freq) - freq.ravel())[slot_owner]
    table = ((slot_owner & 255) << 24 | freq.ravel()[slot_owner] - 1 << PROB_BITS | offset).astype(np.uint32)
    decoder = Decoder(np.frombuffer(blob, "<u4", lanes, front).astype(np.uint32),
                      np.frombuffer(blob, "<u2", offset=len(blob) - rest),
                      np.frombuffer(raw, np.uint8)[owns:], table, trellis)
    for ids, owner, rows, columns, shared in equal_widths(sides, factors):
        stack = np.empty((len(rows), len(columns)), np.uint8)
        for part in (slice(at, at + lanes) for at in range(0, len(rows), lanes)):
            context = columns[:, owner[part]] + rows[part]
            slots = context.astype(np.uint32) << PROB_BITS + (trellis is not None)
            stack[part] = decoder.batch(slots, shared).T
        out.update((i, stack[owner == t].view(np.int8)) for t, i in enumerate(ids))
    check(not decoder.words.size and not decoder.listed.size and (decoder.lanes == LOW).all(),
          "states do not return to the start")
    return [out[i] for i in range(len(sides))]


# rows (R), columns (C) of each matrix: how large codes are expected to be against each other, in eighths of
# an octave, by what the decoder has
Predicted = Sequence[tuple[np.ndarray, np.ndarray]]


def pack_codes(codes: Sequence[np.ndarray], predicted: Predicted,
               trellis: np.ndarray | None = None) -> tuple[dict[str, bytes], list[int]]:
    """Codes [int8 (R, C), …] as streams, and the numbers of the matrices that have
    factors."""
    factors = {i: found for i, c in enumerate(codes) if (found := shared_factors(c)) is not None}
    levels = [code_levels(residues(c, factors.get(i)), *predicted[i]) for i, c in enumerate(codes)]
    sides = [scale_contexts(x, *p) for x, p in zip(levels, predicted)]
    return {FACTOR_STREAM: brotli_pack(b"".join(x.tobytes() for x in factors.values())),
            LEVEL_STREAM: brotli_pack(b"".join(x.tobytes() for x in levels)),
            CODE_STREAM: encode_codes(codes, sides, trellis, factors) if codes else b""}, list(factors)


def unpack_codes(streams: Mapping[str, bytes], tall: Sequence[int], predicted: Predicted,
                 trellis: np.ndarray | None = None) -> list[np.ndarray]:
    """Inverse of pack_codes, `tall` being the numbers that it gave; UserError for
    anything else."""
    found = split_bytes(streams[FACTOR_STREAM], [RANK * len(predicted[i][1]) for i in tall])
    levels = split_bytes(streams[LEVEL_STREAM], [1 + len(rows) + len(columns) for rows, columns in predicted])
    sides = [scale_contexts(x, *p) for x, p in zip(levels, predicted)]
    factors = {i: x.reshape(RANK, -1) for i, x in zip(tall, found)}
    return decode_codes(streams[CODE_STREAM], sides, trellis, factors) if sides else []


# --- the model in the container

LEVEL_STREAM, FACTOR_STREAM, CODE_STREAM, HALF_STREAM, BYTE_STREAM = "levels factors codes half bytes".split()


def architecture(s: Settings) -> dict:
    """The settings that give a weight its meaning; an artifact is only read under the
    same ones."""
    names = [n for n in group_names("model") if "INIT" not in n and n != "ENABLE_LOOPING_AT"]
    everything = s.as_env()
    return {n: everything[n] for n in ["VOCAB_SIZE", "TRAIN_SEQ_LEN", *names]}


def group_names(group: str) -> list[str]:
    """The settings of one of --help's groups, in capitals."""
    names, current = [], ""
    for f in fields(Settings):
        current = f.metadata["group"] or current
        if current == group:
            names.append(f.name.upper())
    return names


def stored_tensors(s: Settings, meta: Mapping[str, str]) -> list[tuple[str, str, tuple]]:
    """(key, dtype, shape) of every tensor of a Quantised model in file order, from
    settings and `meta`."""
    out = []
    blank = {name: torch.empty(shape, device="meta") for name, shape in GPT.shapes(s).items()}
    views = matrix_views(blank)
    if set(meta) != set(views):
        raise ValueError(f"other tensors: {sorted(set(meta) ^ set(views))[:3]}")
    for name, w in views.items():
        shape, how = tuple(w.shape), meta[name]
        if how.startswith(("gptq", "gate")) and len(shape) != 2:
            raise ValueError(f"{name} {shape} as {how}, which is for matrices")
        if how.startswith("gptq"):
            out.append((name + ".q", "int8", shape))
            if how.startswith("gptq (int"):
                out.append((name + ".scale", "half", shape[:1]))
            else:
                out.append((name + ".row", "int8", shape[:1]))
                out += [(name + ".col", "int8", shape[1:])] if input_of(name) == name else []
            (rows, columns), r = shape, min(s.lqer_rank, *shape)
            groups = r * columns // s.lqer_asym_group
            if "+awqgrp" in how:
                out.append((name + ".awqg_s_hi", "half", shape[:1]))
            if how.endswith("+lqer_asym"):
                out += [(name + ".lqA_a", "int8", (rows, r)), (name + ".lqAs_a", "half", (1,)),
                        (name + ".lqB_a", "int8", (r, columns)), (name + ".lqBs_a", "half", (groups,))]
            elif how.endswith("+lqer"):
                out += [(name + ".lqA", "int8", (rows, r)), (name + ".lqAs", "half", (rows,)),
                        (name + ".lqB", "int8", (r, columns)), (name + ".lqBs", "half", (r,))]
        elif how == "gate_int8_row":
            out += [(name + ".gq", "int8", shape), (name + ".gs", "half", shape[:1])]
        else:
            out.append((name, "half", shape))
    return out


def pack_model(s: Settings, q: Quantised) -> bytes:
    """A quantised model as the bytes of an artifact."""
    entries = stored_tensors(s, q.meta)
    shapes = {key[:-2]: shape for key, _, shape in entries if key.endswith(".q")}
    codes = [q.tensors[n + ".q"].numpy() for n in shapes]
    streams, tall = pack_codes(codes, *coding_plan(q, shapes))
    for stream, kind, stride in ((HALF_STREAM, "half", 2), (BYTE_STREAM, "int8", 1)):
        part = [q.tensors[key].numpy().tobytes() for key, dtype, _ in entries
                if dtype == kind and not key.endswith(".q")]
        streams[stream] = brotli_pack(b"".join(part), stride)
    ways = {how: [n for n in q.meta if q.meta[n] == how] for how in q.meta.values()}    # few ways, many names
    header = {"architecture": s.to_be_stored(architecture(s)), "meta": ways, "factors": tall,
              "storage": {n: getattr(s, n) for n in STORAGE},
              "groups": {key: x.tolist() for key, x in q.tensors.items() if x.dtype == torch.int16},
              "unit": q.unit}
    return artifact_to_bytes(header, streams)


def coding_plan(q: Quantised, shapes: Mapping[str, tuple]) -> tuple[list, np.ndarray | None]:
    """What coder and decoder know of code matrices, by name: [(rows (R), columns
    (C)), …] how large codes are expected to be against each other, in eighths of an
    octave, and the trellis, if any."""
    predicted = [tuple(-q.tensors.get(key, torch.zeros(size)).int().numpy() for key, size in
                       zip((n + ".row", input_of(n) + ".col"), shape)) for n, shape in shapes.items()]
    return predicted, TRELLIS if any("trellis" in q.meta[n] for n in shapes) else None


def check_architecture(s: Settings, theirs: Mapping, what: str) -> None:
    """Refuse weights whose architecture() is not that of the settings. A setting that
    the file does not name is younger than the file and had its default; one that only
    the file names must have been off."""
    default, mine = architecture(Settings()), architecture(s)
    found = {**default, **theirs}
    wrong = []
    for name, there in found.items():
        if (there != mine[name]) if name in mine else there:
            wrong.append(f"{plain(name, 40)}={plain(there, 24)} there, {mine.get(name, 'unknown')} here")
    if not theirs:
        wrong = ["it names no settings"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what} of another configuration: {plain('; '.join(wrong[:3]), 150)}{more}; use the "
                        "settings it was made with")


STORAGE = ("lqer_rank", "lqer_asym_group")     # settings that a file says for itself


class Artifact(NamedTuple):
    """What an artifact holds."""
    model: Quantised
    weights: dict[str, Tensor]       # what it stands for, by name
    calibration: Tensor | None       # the 15 numbers of calibrated_by
    mark: str                        # why it is NON-COMPLIANT; empty if it is not


def read_artifact(s: Settings, blob: bytes, origin: str) -> Artifact:
    """What an artifact's bytes hold; UserError when they are damaged, of another
    configuration or nonsense. A right checksum proves nothing: what the file says is
    checked before memory or time is spent on it."""
    header, streams = artifact_from_bytes(blob, origin)
    try:
        check_architecture(s, header.get("architecture", {}), f"{origin} is an artifact")
        q, mark = read_model(s, header, streams), header.get("not_compliant", "")
        weights = dequantise(q)
        if not all(w.isfinite().all() for w in weights.values()) or not isinstance(mark, str):
            raise ValueError("weights that are not finite, or a mark that is no text")
        return Artifact(q, weights, read_calibration(streams), plain_mark(mark))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError,
            MemoryError) as error:      # well-formed, but not ours
        raise UserError(f"{origin} has contents that do not fit together ({type(error).__name__}: "
                        f"{error!s:.200}): write it again") from error


def read_calibration(streams: Mapping[str, bytes]) -> Tensor | None:
    """The numbers (15) of an artifact's calibration, within fit_calibration's bounds;
    None: it has none."""
    if CALIBRATION_STREAM not in streams:
        return None
    raw = torch.tensor(np.frombuffer(streams[CALIBRATION_STREAM], "<f4"))
    if len(raw) != 15 or not raw.isfinite().all() or raw[1:].abs().max() > CALIBRATION_REACH:
        raise ValueError(f"{len(raw)} numbers that are no calibration")
    return raw


def with_storage(s: Settings, stored: Mapping) -> Settings:
    """The settings, but those of STORAGE as a file says; ValueError for what no user
    could have set."""
    try:
        values = {f.name: parse_setting(f, str(stored[f.name])) for f in fields(s) if f.name in STORAGE}
    except UserError as error:
        raise ValueError(str(error)) from error
    if values != stored:
        raise ValueError(f"storage {stored}")
    return dataclasses.replace(s, **values)


def read_groups(groups: Mapping[str, list], shapes: Mapping[str, tuple],
                meta: Mapping[str, str]) -> dict[str, Tensor]:
    """AWQ-lite's groups of columns as tensors: where each begins, and the columns of
    one. They may not overlap or go beyond the matrix."""
    protected = {n: shape[1] for n, shape in shapes.items() if "+awqgrp" in meta[n]}
    if set(groups) != {n + end for n in protected for end in (".awqg_start", ".awqg_size")}:
        raise ValueError(f"groups {sorted(groups)[:4]}")
    for name, columns in protected.items():
        starts, (size,) = groups[name + ".awqg_start"], groups[name + ".awqg_size"]
        if len(set(starts)) < len(starts) or not set(starts) <= set(range(0, columns - size + 1, size)):
            raise ValueError(f"groups of {name}")
    return {key: torch.tensor(x, dtype=torch.int16) for key, x in groups.items()}


def read_model(s: Settings, header: Mapping, streams: Mapping[str, bytes]) -> Quantised:
    """The Quantised model of an artifact's header and streams."""
    s = with_storage(s, header["storage"])
    if not 0 < header["unit"] < math.inf:
        raise ValueError(f"unit {header['unit']}")
    q = Quantised({}, {name: how for how, names in header["meta"].items() for name in names}, header["unit"])
    if len(q.meta) != sum(map(len, header["meta"].values())):
        raise ValueError("a tensor that is stored twice")
    entries = stored_tensors(s, q.meta)
    shapes = {key[:-2]: shape for key, _, shape in entries if key.endswith(".q")}
    q.tensors.update(read_groups(header["groups"], shapes, q.meta))
    for stream, kind, dtype in ((HALF_STREAM, "half", "<f2"), (BYTE_STREAM, "int8", "i1")):
        part = [(key, shape) for key, how, shape in entries if how == kind and not key.endswith(".q")]
        pieces = split_bytes(streams[stream], [math.prod(shape) for _, shape in part], dtype)
        q.tensors.update({key: torch.from_numpy(x.reshape(shape)) for (key, shape), x in zip(part, pieces)})
    tall = header["factors"]
    if tall != sorted(set(tall) & set(range(len(shapes)))):
        raise ValueError(f"factors of {tall}")
    codes = unpack_codes(streams, tall, *coding_plan(q, shapes))
    q.tensors.update({n + ".q": torch.from_numpy(c.reshape(shapes[n])) for n, c in zip(shapes, codes)})
    return q


def self_extracting(source: bytes) -> bytes:
    """A script that runs `source` from its compressed form: what a record may ship.
    Bytes stand in a latin-1 string, so only five need an escape; linecache is filled
    so that Triton and tracebacks find the lines."""
    packed = lzma.compress(source, format=lzma.FORMAT_RAW, filters=SCRIPT_FILTERS)
    for byte, escape in zip((b"\\", b'"', b"\n", b"\r", b"\0"), (b"\\\\", b'\\"', b"\\n", b"\\r", b"\\x00")):
        packed = packed.replace(byte, escape)
    return (PACKED_START + b"import lzma,linecache\n"
            b"s=lzma.decompress(\"" + packed + b"\".encode('latin-1'),3,None,"
            + repr(SCRIPT_FILTERS).encode() + b").decode()\nn=__file__+'#'\n"
            b"linecache.cache[n]=(len(s),None,s.splitlines(True),n)\nexec(compile(s,n,'exec'))\n")


PACKED_START = b"# coding: latin-1\n"
SCRIPT_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0,
                   "dict_size": 1 << 20}]


def lean(source: bytes) -> bytes:
    """The script that is running without part three, from the bar above its banner to
    the closing block; names of its settings stay, each with its default alone. A lean
    script stays as it is."""
    part = re.search(rb"(?ms)^# =+\n# PART THREE.*?(?=^if __name__ ==)", source)
    if part is None:
        return source
    system = {f.name for f in fields(Settings.__base__)}
    only = {f.name.upper(): f.default for f in fields(Settings) if f.name not in system}
    only |= {old: only[names] for old, names in ALIASES.items() if names in only}
    lines = [b"NO_SETTINGS.update((name, (only, CUT_OFF)) for name, only in dict("]
    for name, value in only.items():
        if isinstance(value, bool) or is_number(str(value)):
            value = float(value)      # as from_env compares it
        lines.append(f"    {name}={value!r},".encode())
    lines.append(b").items())\n\n\n")
    return source[:part.start()] + b"\n".join(lines) + source[part.end():]


CODE_FORMS = ("readable", "packed", "lean", "lean_packed")


@functools.cache
def script_source() -> bytes:
    """The file that is running, read once."""
    return Path(__file__).read_bytes()


def shipped_form(s: Settings) -> str:
    """Which of CODE_FORMS is shipped and counted. A packed script stays what it is."""
    if script_source().startswith(PACKED_START):
        return "lean_packed" if Settings.__base__ is object else "packed"
    if s.code_form == "auto":
        return "packed" if s.beyond_the_system() else "lean_packed"
    return s.code_form


@functools.cache
def code_bytes(form: str = "readable") -> int:
    """Size of the script that is running, in this one of CODE_FORMS; a packed one is
    so already."""
    if form not in CODE_FORMS:
        raise ValueError(f"{form} is none of {CODE_FORMS}: ask shipped_form()")
    source = script_source()
    if source.startswith(PACKED_START):
        return len(source)
    if form.startswith("lean"):
        source = lean(source)
    return len(self_extracting(source) if form.endswith("packed") else source)


def check_size(artifact: int, form: str = "readable") -> int:
    """Artifact plus script in bytes; UserError when it is over the limit."""
    total = artifact + code_bytes(form)
    if total > ARTIFACT_LIMIT:
        raise UserError(f"artifact {artifact:,} + {form} script {code_bytes(form):,} = {total:,} bytes is "
                        f"{total - ARTIFACT_LIMIT:,} over the limit of {ARTIFACT_LIMIT:,}: make the model "
                        "smaller, or ship the smallest script (CODE_FORM=auto)")
    return total


def estimate_bytes(deviations: np.ndarray, unit: float = 1.0) -> float:
    """Bytes of codes of these deviations (see Quantiser) at this unit, each coded as
    a Gaussian."""
    octave = (np.arange(len(deviations)) - len(deviations) // 2) / OCTAVE - math.log2(unit)
    sigma = np.exp2(np.minimum(octave, math.log2(TOP_CODE / 4)))
    return float(deviations @ np.log2(1 + 2 * math.pi * math.e * sigma ** 2)) / 16


def unit_for(deviations: np.ndarray, size: float, finest: float) -> float:
    """The finest unit, not below `finest`, at which the codes are estimated to take
    at most size bytes."""
    unit = finest
    for _ in range(40):      # a doubling saves at most one bit per code: never too far
        bits = 8 * (estimate_bytes(deviations, unit) - size) / max(deviations.sum(), 1)
        unit *= 2 ** min(max(bits, 0), 1)
    return unit


LZMA_SLACK = 256   # bytes: another liblzma may pack the script a little worse
MARK_BYTES = 256   # for what makes a run NON-COMPLIANT when its artifact is fitted already
HALF_BYTES = 1.7   # of a float16 number, shuffled and by brotli; measured on the demo: 1.69
GUESSED = 0.93     # what guesses leave of an embedding's codes; measured on small trained models: 0.92, 0.94


def expected_size(s: Settings) -> str:
    """What the artifact will weigh, from the settings alone: as if all weights were
    Gaussian. Errors passed on by GPTQ cost about as many bytes as contexts win.
    UserError below two bits a code."""
    blank = {name: torch.empty(shape, device="meta") for name, shape in GPT.shapes(s).items()}
    codes, coded, other, fisher = 0, 0.0, 0, s.quant_allocation == "fisher"
    for name, w in matrix_views(blank).items():
        stored = storage_of(s, name, w)
        if stored.kind == "gptq":
            codes, other = codes + w.numel(), other + sum(w.shape)
            share = GUESSED if w.size(0) >= TALL * w.size(1) else 1.0
            step = 4 / TOP_CODE if fisher else stored.clip / (2 ** (stored.bits - 1) - 1)      # at the finest
            coded += share * estimate_bytes(np.array([w.numel()]), step)
        else:
            other += HALF_BYTES * w.numel()
    room = ARTIFACT_LIMIT - code_bytes(shipped_form(s)) - other
    if room < codes / 4:
        raise UserError(f"{codes:,} weights would get {8 * room / max(codes, 1):.2f} bits each in what the "
                        f"limit of {ARTIFACT_LIMIT:,} bytes leaves; make the model smaller")
    if coded < room:
        return (f"about {coded + other:,.0f} bytes, {room - coded:,.0f} under the limit"
                + f", with {codes:,} weights at their finest" * (fisher and codes > 0))
    return (f"about {room + other:,.0f} bytes: {codes:,} weights fitted to the limit, at about "
            f"{8 * room / codes:.2f} bits each")


def quantise_to_fit(s: Settings, world: World, run: Run, weights: Mapping[str, Tensor],
                    curvature: Curvature, clock: Clock | None = None) -> bytes:
    """Quantise and pack as finely as the limit allows, less at most a margin. Every
    rank returns the artifact's bytes. A size that no step reaches is a UserError.
    clock: training's; once something fits, no further try that would pass its
    budget."""
    quantiser = Quantiser(s, weights, curvature, world)
    for how in sorted(set(quantiser.unusual.values())):
        matrices = [n for n, x in quantiser.unusual.items() if x == how]
        run.log("curvature", how=how, matrices=matrices)
    script = code_bytes(shipped_form(s))
    cap = (ARTIFACT_LIMIT - script - MARK_BYTES - 1024 * s.logit_calib_enabled      # which come later
           - LZMA_SLACK * shipped_form(s).endswith("packed"))
    finest, deviations = quantiser.finest, quantiser.deviations
    # bytes beyond the estimate: not known before the first try, exact enough after it
    overhead, best, over, under = 0.001 * cap, b"", 0.0, math.inf
    for attempt in range(12):
        margin = s.fit_margin_bytes
        unit = unit_for(deviations, cap - margin / 2 - overhead, finest)
        if not over < unit < under:      # between two tries; while nothing fits: far beyond
            unit = math.sqrt(max(over, finest) * under) if best else over * 2 ** attempt
        watch = Clock()
        world.beat(f"quantising try {attempt + 1}")
        q = quantiser(unit)
        quantised = watch.elapsed()
        blob = world.agree(pack_model(s, q) if world.main else None)
        run.log("pack", bytes=len(blob), code_bytes=script, total=len(blob) + script, unit=unit,
                quantise_s=quantised, pack_s=watch.elapsed() - quantised)
        overhead = len(blob) - estimate_bytes(deviations, unit)
        if len(blob) > cap:
            over = max(over, unit)
        else:
            best, under = max(best, blob, key=len), min(under, unit)
            if unit <= finest or len(blob) >= cap - margin:
                break
        late = clock is not None and 0 < clock.budget < clock.elapsed() + 1.2 * watch.elapsed()
        if best and world.agree(late):
            break
    for setting, mark in (("AWQ_LITE_ENABLED", "awqgrp"), ("LQER_ENABLED", "lqer")):
        if getattr(s, setting.lower()) and not any(mark in how for how in q.meta.values()):
            run.log("settings_without_effect", **{setting: "no matrix qualifies"})
    check_size(len(best or blob), shipped_form(s))
    if not best:
        raise UserError(f"the artifact of {len(blob):,} bytes is over the {cap:,} that script, calibration "
                        "and packing leave of the limit: make the model smaller, or LOGIT_CALIB_ENABLED=0")
    return best


# ============================================================================================================
# 13  Counts of earlier text: the score leans towards what followed the same context before
# ============================================================================================================

def check_counts(s: Settings) -> None:
    """Refuse a tilt by which no expert ever speaks."""
    if s.ngram_tilt_enabled and not experts_in_use(s):
        thresholds = " or ".join(expert.threshold.upper() for expert in EXPERTS.values())
        raise UserError("NGRAM_TILT_ENABLED=1 has no expert in use: "
                        f"lower {thresholds} to at most 1")


# --- n-gram tilt: the score leans towards what followed the same context earlier

ODD = np.uint64(0x9E3779B97F4A7C15)     # products with it spread over the upper bits
COUNT_IN_PARTS = 1 << 20                # from so many items on: threads share the work


def scramble(x: np.ndarray) -> np.ndarray:
    """A 64-bit key of each integer."""
    x = (x.astype(np.uint64) + np.uint64(1)) * ODD
    return (x ^ x >> np.uint64(32)) * ODD


def span_keys(x: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Keys (m,) of the spans x[first:end] of keys x (n,): sums of x[j] ODD^(j - end)."""
    inverse = np.uint64(pow(int(ODD), -1, 1 << 64))
    power = np.multiply.accumulate(np.append(np.uint64(1), np.full(len(x), ODD)))
    sums = np.append(np.uint64(0), np.cumsum(x * power[:-1]))
    power = np.multiply.accumulate(np.append(np.uint64(1), np.full(len(x), inverse)), out=power)
    return (sums[end] - sums[first]) * power[end]


def earlier_in_group(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of items sorted by key: how many that count come before each one of its key,
    and where keys begin."""
    new = np.append(np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1])
    seen, begin = np.cumsum(counts) - counts, np.flatnonzero(new)
    return seen - np.repeat(seen[begin], np.diff(np.append(begin, len(keys)))), new


def online_counts(keys: np.ndarray, tokens: np.ndarray, learns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Before each of n items, in this order: the token that followed its context
    (key) most often and its share of them, (n,) each, 0 where there was none. The
    first to reach a count keeps it. Only items with `learns` are counted. Sorted
    instead of hashed, in parts of the keys that share nothing."""
    hint, confidence = np.zeros(len(keys), tokens.dtype), np.zeros(len(keys), np.float32)
    parts = 1 if len(keys) < COUNT_IN_PARTS else 32
    part_of = (keys >> np.uint64(59)).astype(np.uint8) * (parts > 1)

    def count(part: int) -> None:
        items = np.flatnonzero(part_of == part)
        bits = np.uint64(63 - len(items).bit_length())
        bucket = (keys[items] << np.uint64(5) >> bits).astype(np.int64)
        items = items[(np.bincount(bucket) > 1)[bucket]]            # long contexts rarely come again
        items = items[np.argsort(keys[items], kind="stable")]       # by context, then in time
        k, t, w = keys[items], tokens[items], learns[items]
        (total, new), pairs = earlier_in_group(k, w), scramble(k) ^ scramble(t)
        by_pair = np.argsort(pairs, kind="stable")
        level = np.empty(len(k), np.int64)       # group, and the count that this item brings its token to
        level[by_pair] = earlier_in_group(pairs[by_pair], w[by_pair])[0] + 1
        level = (np.cumsum(new) << 32) + level * w
        highest = np.append(0, np.maximum.accumulate(level))[:-1]
        record = np.maximum.accumulate(np.where(w & (level > highest), np.arange(len(k)), 0))
        seen = np.flatnonzero(total)
        hint[items[seen]] = t[record[seen - 1]]
        top = (highest[seen] & 0xFFFFFFFF).astype(np.float32)
        confidence[items[seen]] = top / total[seen].astype(np.float32)

    list((map if parts == 1 else ThreadPoolExecutor(os.cpu_count()).map)(count, range(parts)))
    return hint, confidence


class Expert(NamedTuple):
    """A way to guess the next token from earlier text, and the settings that use it."""
    threshold: str      # speaks from this confidence on
    boost: str          # nats added to its hint's logit
    count: Callable     # (settings, tokens (n + 1)) -> hint (n,), confidence (n,) float32 of the targets


def counted(targets: np.ndarray, items, keys: np.ndarray, learns: np.ndarray,
            asks) -> tuple[np.ndarray, np.ndarray]:
    """Hint and confidence (n,) of the targets (n,) by online_counts of some items; 0
    unless one `asks`."""
    hint = np.zeros(len(targets), targets.dtype)
    confidence = np.zeros(len(targets), np.float32)
    hint[items], confidence[items] = online_counts(keys, targets[items], learns[items])
    return np.where(asks, hint, 0), np.where(asks, confidence, 0)


def count_tokens(s: Settings, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What followed the same TOKEN_ORDER - 1 tokens earlier."""
    n, known = len(tokens) - 1, s.token_order - 1
    skip = min(max(known - 1, 0), n)         # targets without a whole context
    code = scramble(np.arange(s.vocab_size))
    keys = np.zeros(n - skip, np.uint64)
    for i in range(known):
        keys *= ODD
        keys += code[tokens[i:i + len(keys)]]
    return counted(tokens[1:], slice(skip, n), keys, np.ones(n, bool), True)


EXPERTS = {"token": Expert("token_threshold", "token_boost", count_tokens)}


def experts_in_use(s: Settings) -> dict[str, tuple[float, float]]:
    """(least confidence, boost in nats) of every n-gram expert in use, in the order
    that decides ties."""
    found = {}
    for name, expert in EXPERTS.items():
        threshold = getattr(s, expert.threshold)
        if threshold <= 1:
            found[name] = threshold, getattr(s, expert.boost)
    return found


def ngram_experts(s: Settings, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hint (n,) and confidence (n,) float32 of every expert in use, for the targets
    tokens[1:]; each from earlier tokens alone. Confidence 0: no hint."""
    return {name: EXPERTS[name].count(s, tokens) for name in experts_in_use(s)}


@dataclass(frozen=True)
class Hints:
    """Where an expert's gate is open: input positions `at` (m,) rising; per expert
    hint (E, m) and confidence (E, m) float32, 0 where its own gate is closed."""
    at: np.ndarray
    hint: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, s: Settings, tokens: np.ndarray) -> Hints:
        """For the targets tokens[1:], counted in this order."""
        hint, confidence = (np.stack(side) for side in zip(*ngram_experts(s, tokens).values()))
        for row, (tau, _) in zip(confidence, experts_in_use(s).values()):
            row[row < np.float32(tau)] = 0      # as published: 9 of 20 open a gate of 0.45
        at = np.flatnonzero(confidence.any(0))
        return cls(at, hint[:, at], confidence[:, at])

    @classmethod
    def build(cls, s: Settings, world: World, val: Validation, adapting: bool) -> Hints | None:
        """For the windows, or for adapting: counted once by rank 0 and handed to all.
        None when off. Counts grow as the documents are scored: one causal order for
        the whole score."""
        if not s.ngram_tilt_enabled:
            return None
        found, lengths = None, val.documents.length
        order = np.arange(len(lengths))
        if adapting and "stream" not in (s.ttt_doc_order, s.ngram_doc_order):
            order = np.concatenate([group for r in ttt_rounds(s, lengths) for group in r.groups])
        if world.main:
            starts, ends = val.documents.start[order], np.cumsum(lengths[order] - 1)
            text = [val.tokens[a + 1:a + n] for a, n in zip(starts, lengths[order])]
            found = cls.of(s, np.concatenate([val.tokens[starts[:1]], *text]))
            document = np.searchsorted(ends, found.at, side="right")      # from this order to the stream's
            at = found.at + (starts - np.append(0, ends[:-1]))[document]
            sort = np.argsort(at)
            found = cls(at[sort], found.hint[:, sort], found.confidence[:, sort])
        return world.agree(found)

    def find(self, at: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hints (E, …) int64 and confidences (E, …) at input positions (…)."""
        hint, confidence = (np.zeros((len(self.hint), *at.shape), kind) for kind in (np.int64, np.float32))
        i = np.searchsorted(self.at, at)
        known = i < len(self.at)
        known[known] = self.at[i[known]] == at[known]
        hint[:, known], confidence[:, known] = self.hint[:, i[known]], self.confidence[:, i[known]]
        return torch.from_numpy(hint).to(device), torch.from_numpy(confidence).to(device)

    @staticmethod
    def choose(s: Settings, q: Tensor, hints: Tensor, confidences: Tensor) -> tuple[Tensor, ...]:
        """The expert's hint (…), -1 where its gate is closed, the model's probability
        of it and its boost in nats. hints, confidences, and q, the model's
        probability of the hint, are (1, …)."""
        speaks = confidences[0] > 0
        hint = hints[0].where(speaks, -1)
        chance = q[0].double() * speaks
        return hint, chance, s.token_boost * speaks.double()


def tilt(s: Settings, losses: Tensor, targets: Tensor, hints: Tensor, confidences: Tensor) -> Tensor:
    """Losses (…) of the targets (…) once a hint got more probability: p'(a) is
    proportional to p(a) exp(boost [a = hint]), which sums to 1. losses (1 + E, …): of
    the target and of every hint."""
    q = torch.exp(-losses[1:].double()).clamp(1e-12, 1 - 1e-12)
    hint, chance, boost = Hints.choose(s, q, hints, confidences)
    return (losses[0] - boost * (targets == hint) + torch.log1p(chance * torch.expm1(boost))).float()


def tilted_losses(s: Settings, losses: Callable, ids: Tensor, targets: Tensor, at: np.ndarray,
                  hints: Hints | None) -> tuple[Tensor, Tensor]:
    """(losses to learn from, losses to book), (B, T) each, of the targets after input
    positions at (B, T): the same without hints. losses(ids, targets): the model."""
    if hints is None:
        return (plain := losses(ids, targets)), plain
    hint, confidence = hints.find(at, ids.device)
    every = losses(ids, torch.cat((targets[None], hint)))
    return every[0], tilt(s, every.detach(), targets, hint, confidence)


# ============================================================================================================
# 14  Probes and checks: what is proved before the first step and before the evaluation clock
# ============================================================================================================

def check_before_start(s: Settings, world: World, run: Run, attention_reason: str) -> None:
    """All that can be checked before anything is spent, into the log; UserError at the
    first that fails."""
    for reason in study_reasons(s):
        run.not_compliant(reason)
    if world.device.type == "cpu" and not s.eval_only_quantized_path and (slow := slow_batch(s)):
        run.warn(slow)
    world.beat("checking")
    for finding in run_checks(s, world, run.dir, attention_reason):
        run.log("check", what=finding.name, detail=finding.figure)
        if not finding.ok:
            raise UserError(finding.figure)
        if finding.name == "data fingerprint":
            run.summary.setdefault("data_fingerprint", finding.figure)
    run.save_summary()


class Finding(NamedTuple):
    """Something that was put to the test: a line of --check, or a probe."""
    name: str
    ok: bool
    figure: str


class Study:
    """A mode that breaks the rules, for study only: every run of it is marked
    NON-COMPLIANT."""

    def reason(self, s: Settings) -> str:
        """Why the score of these settings, whatever the training, is no result; empty
        if it may be one."""
        return ""

    def after_training(self, s: Settings, world: World, run: Run, model: GPT, val: Validation) -> None:
        """What is done with the averaged weights before they are quantised."""

    def before_probing(self, s: Settings, world: World, model: GPT, tokens: np.ndarray) -> None:
        """The same with a probe's tokens (N,), briefly, before its windows are scored."""


class PartOfValidation(Study):
    """Only a share of the documents is scored."""

    def reason(self, s: Settings) -> str:
        if s.val_doc_fraction == 1:
            return ""
        return f"VAL_DOC_FRACTION={s.val_doc_fraction:g}: only a part of the documents is scored"


STUDIES: list[Study] = [PartOfValidation()]


def study_reasons(s: Settings) -> list[str]:
    """Why the score of these settings, whatever the training, is no result."""
    return [reason for study in STUDIES if (reason := study.reason(s))]


# --- probes: evidence for the four conditions, from the functions that score

def probe_documents(s: Settings) -> tuple[list[int], list[int]]:
    """Lengths of six documents, and two tokens of the fourth after which streams are
    made to differ: inside a chunk in its middle, and inside its last one, beyond
    every window. The first is a phase's; of the others fourth and fifth are adapted
    together, then the rest, which the sixth leaves early. Rows, filled longest first,
    hold windows of later documents right ahead of earlier ones: the second of the
    fifth ahead of that of the first, the third document ahead of the second."""
    longest, stride = max(s.eval_seq_len, s.ttt_eval_seq_len), s.eval_stride
    chunk = next(size for bound, size in chunk_steps(s) if longest + 2 * stride <= bound)
    chunks = (longest + stride) // chunk + 1
    lengths = [s.eval_seq_len + stride // 4 + 1, 2 * chunk + 3, 2 * chunk + 4,
               chunks * chunk + chunk // 2 + 1, s.eval_seq_len + stride // 4 + 2, chunk + chunk // 2 + 2]
    return lengths, [n * chunk + chunk // 4 for n in (chunks // 2, chunks)]


class Variant(NamedTuple):
    """A stream that differs from another in all that comes after a cut: its tokens,
    what is scored after each of them, and the places (input positions) whose scores
    must not notice."""
    tokens: np.ndarray
    targets: np.ndarray
    kept: np.ndarray


def probe_streams(s: Settings, order: str) -> tuple[np.ndarray, list[Variant]]:
    """A made-up stream, and a variant for each cut. order=length: later are the
    document's own tokens and shorter documents' groups. The last place before a cut
    is scored on the token that came there in the first stream: a look at its own
    target or beyond shows at full strength, even in one layer."""
    (lengths, cuts), rng = probe_documents(s), np.random.default_rng(s.seed)
    phrase = rng.integers(4, s.vocab_size, 7)      # repeated, where counts of earlier text shall have a say
    one = np.concatenate([np.append(BOS, np.resize(phrase, n - 1) if s.ngram_tilt_enabled
                                    else rng.integers(4, s.vocab_size, n - 1)) for n in lengths])
    document, start, others = np.repeat(np.arange(len(lengths)), lengths), sum(lengths[:3]), []
    for cut in cuts:
        later = np.arange(len(one)) > start + cut
        if order == "length":
            shorter = ~np.isin(document, np.argsort(lengths, kind="stable")[-2:])
            later = np.where(document == 3, later, shorter)
        other = np.where(later & (one != BOS), 4 + (one - 3) % (s.vocab_size - 4), one)
        targets = other[1:].copy()
        targets[start + cut] = one[start + cut + 1]
        others.append(Variant(other, targets, np.flatnonzero(~later[:-1])))
    return one, others


def shortened_stream(s: Settings, one: np.ndarray) -> list[Variant]:
    """The same for the stream `one` whose fourth document ends earlier, within its
    last chunk: its neighbours in the batch and the chunks of every group are the
    same. None where chunks are too short for that."""
    lengths, cuts = probe_documents(s)
    end, cut = sum(lengths[:4]), lengths[3] - 1 - cuts[1]
    other = np.delete(one, np.s_[end - cut:end])
    return [Variant(other, other[1:], np.arange(end - cut - 1))] if cut > 0 else []


@contextlib.contextmanager
def weights_kept(model: GPT):
    """Whatever is done inside, the weights are as before afterwards."""
    before = {n: p.clone() for n, p in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
        model.requires_grad_(True)


def run_probes(s: Settings, world: World, model: GPT) -> list[Finding]:
    """C1-C4 on made-up tokens, through Scorer and PhasedTTT as the settings have
    them; C1 on every rank, C2 by all together. What the ledger refuses fails a probe.
    The model's weights are as before afterwards."""
    local, threads, probes, booked = World(device=world.device), torch.get_num_threads(), [], []
    if not compiles(s, world.device):      # many small steps: windows of eight chunks show the same
        window = max(8 * chunk_steps(s)[0][1] + s.ttt_suffix, s.eval_stride)
        s = dataclasses.replace(s, eval_seq_len=min(window, s.eval_seq_len),
                                ttt_eval_seq_len=min(window, s.ttt_eval_seq_len))
        torch.set_num_threads(1)           # and threads would wait for each other at every step
    try:
        with weights_kept(model):
            probes += probe_causality(s, local, model, booked)
            probes += probe_normalisation(s, world, model)
        figure, ok = f"{sum(booked):,} targets booked once each, before any step on them", True
    except LedgerError as error:
        figure, ok = str(error), False
    finally:
        torch.set_num_threads(threads)
    return [*probes, Finding("C3 C4 ledger", ok, figure)]


def log_probes(s: Settings, world: World, run: Run, model: GPT) -> None:
    """Evidence for C1-C4 into log and summary; a condition that fails makes the run
    NON-COMPLIANT."""
    clock, probes = Clock(), run_probes(s, world, model)
    run.summary["probes"] = {p.name: {"ok": p.ok, "figure": p.figure} for p in probes}
    for p in probes:
        run.log("probe", name=p.name, ok=p.ok, figure=p.figure)
        if not p.ok:
            run.not_compliant(f"the probe {p.name} failed: {p.figure}")
    run.log("probes", seconds=clock.elapsed())


def probe_causality(s: Settings, world: World, model: GPT, booked: list[int]) -> Iterator[Finding]:
    """C1: earlier scores stay the same, to the bit, whatever comes later. booked:
    targets per evaluation."""
    row = min(s.eval_seq_len, 4 * min(size for _, size in chunk_steps(s)))     # of a phase's training
    ttt = dataclasses.replace(s, ttt_batch_size=4, phased_ttt_num_phases=1, phased_ttt_prefix_docs=1,
                              eval_seq_len=row, global_ttt_chunk_tokens=row)

    def windows(val: Validation, stride: int) -> Ledger:
        for study in STUDIES:
            study.before_probing(s, world, model, val.tokens)
        scorer = Scorer(s, world, model)
        val.hints = Hints.build(s, world, val, False)
        scorer.windows(val, stride)
        return scorer.ledger

    def adapted(val: Validation) -> Ledger:
        val.hints = Hints.build(ttt, world, val, True)
        evaluation = PhasedTTT(ttt, world, model, val)
        evaluation.run()
        return evaluation.ledger

    def losses(evaluate: Callable, tokens: np.ndarray,
               targets: np.ndarray | None = None) -> Tensor:
        with weights_kept(model):
            found = evaluate(Validation.of(tokens, targets)).loss.cpu()
        booked.append(len(found))
        return found

    if s.ttt_enabled and compiles(s, world.device):      # for what the watchdog may fall back on
        val = Validation.of(probe_streams(ttt, "stream")[0])
        val.hints, evaluation = Hints.build(ttt, world, val, True), PhasedTTT(ttt, world, model, val)
        evaluation.level = NO_ADAPTATION
        evaluation.run()
    evaluations = [("windows", functools.partial(windows, stride=s.eval_seq_len), s, "stream")]
    if s.sliding_window_enabled:
        evaluations.append(("sliding windows", functools.partial(windows, stride=s.eval_stride), s, "stream"))
    if s.ttt_enabled:
        evaluations.append(("test-time training", adapted, ttt, s.ttt_doc_order))
    for name, evaluate, settings, order in evaluations:
        one, others = probe_streams(settings, order)
        if evaluate is adapted and order == "stream":
            others += shortened_stream(settings, one)
        first, seen, noise = losses(evaluate, one), [], 0.0
        for other, targets, kept in others:
            found = losses(evaluate, other, targets)
            gap = (found - first[:len(found)]).abs()
            seen.append((len(kept), gap[kept].max().item(), gap.max().item()))
        counts, earlier, rest = zip(*seen)
        figure = (f"largest change {max(earlier):g} over {sum(counts):,} earlier targets, "
                  f"{max(rest):.3f} over later ones")
        if max(earlier) > 0 and world.device.type == "cuda":      # kernels that add in any order
            noise = max((losses(evaluate, one) - first).abs().max().item() for _ in range(3))
            figure += f"; the same stream four times differs by {noise:g}"
        yield Finding(f"C1 {name}", max(earlier) <= 2 * noise < min(rest), figure)


def probe_hints(s: Settings) -> tuple[Hints, bool]:
    """Hints for the documents BOS 4 5 6 v, v = 0, 1, …, each as if it alone followed
    a text that repeats BOS 4 5 6 7; and whether they were the same for every v, as
    they are when no target is read."""
    text = np.tile(np.array([BOS, 4, 5, 6, 7], np.uint16), s.token_order // 5 + 4)
    found = []
    for v in range(s.vocab_size):
        text[-1] = v
        hints = Hints.of(s, text)
        found.append(Hints(*(x[..., hints.at >= len(text) - 5] for x in vars(hints).values())))
    ok = all(np.array_equal(a, b) for h in found for a, b in zip(vars(h).values(), vars(found[0]).values()))
    at = [h.at - len(text) + 5 * (v + 1) for v, h in enumerate(found)]
    return Hints(np.concatenate(at), *(np.concatenate([vars(h)[name] for h in found], axis=1)
                                       for name in ("hint", "confidence"))), ok


def probe_normalisation(s: Settings, world: World, model: GPT) -> Iterator[Finding]:
    """C2: exp(-loss) of every possible next token, as the books have it, sums to 1:
    one document per token of the vocabulary, scored by windows and by adapters that
    have learnt from its first two targets. The sum is over equal hidden states, to
    the bit: no adapter begins with what another group learnt, and half precision,
    which rounds rotary angles along a row, scores every document in a row of its
    own."""
    tokens = np.tile(np.array([BOS, 4, 5, 6, 7]), s.vocab_size + 1)[:-4]
    tokens[4::5] = np.arange(s.vocab_size)
    val, half = Validation.of(tokens), model.compute_dtype in HALF
    scorer = Scorer(dataclasses.replace(s, compile="0") if half else s, world, model)
    scorer.capacity = 5 if half else scorer.capacity
    if s.ngram_tilt_enabled:
        val.hints, ok = probe_hints(s)
        yield Finding("C1 n-gram hints", ok, f"{'the same' if ok else 'not the same'} for each of "
                      f"{s.vocab_size:,} targets")
    scorer.windows(val, s.eval_seq_len)
    books = {"windows": scorer.ledger}
    if s.ttt_enabled:
        ttt = dataclasses.replace(
            s, ttt_chunk_size=2, ttt_short_score_first_enabled=False, phased_ttt_prefix_docs=0,
            ttt_batch_size=256, ttt_lora_rank=4, ttt_lora_alpha=8.0, ttt_lora_lr=0.001,
            ttt_doc_order="stream", ttt_warm_start_a=False, ttt_train_min_doc_len=0, ttt_train_max_doc_len=0,
            ttt_cache_theta=min(s.ttt_cache_theta, 1.0))
        evaluation = PhasedTTT(ttt, world, model, val)
        evaluation.run()
        books["test-time training"] = evaluation.ledger
    for name, ledger in books.items():
        total = np.exp(-ledger.total[3::5]).sum()
        yield Finding(f"C2 {name}", bool(abs(total - 1) < 1e-4),
                      f"{s.vocab_size:,} probabilities sum to {total:.7f}")


def check_command(which: str) -> int:
    """--check: one line per finding; 1 when something is wrong. --check settings
    needs no data."""
    if which not in ("", "settings", "data"):
        raise UserError(f"--check {which} must be --check, --check settings or --check data")
    s = Settings.from_env(os.environ)
    ranks = launcher_ranks({"WORLD_SIZE": str(max(1, torch.cuda.device_count())), "RANK": "0",
                            "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **os.environ})
    if not s.eval_only_quantized_path:
        s.batch_shape(ranks.size)
    print(f"ok    settings: {len(s.changed())} differ from the defaults")
    for name, what in stray_names(os.environ).items():
        print(f"warn  {name}: {what}")
    if which == "settings":
        return 0
    findings = run_checks(s, World.join({}), Path(s.artifact_dir or "runs"))
    if which == "data":
        others = ("made before", "device", "attention", "batch", "folder", "disk", "size")
        findings = [f for f in findings if f.name not in others]
    else:
        forms = (f"{form} {code_bytes(form):,}" for form in CODE_FORMS)
        print(f"ok    script: {shipped_form(s)} counts, in bytes: {', '.join(forms)}")
    for f in findings:
        print(f"{'ok   ' if f.ok else 'FAIL '} {f.name}: {f.figure}")
    return int(any(not f.ok for f in findings))


def check_train_shards(s: Settings) -> str:
    """Headers of all training shards and the first million tokens of each;
    DATA_CHECK=full: all tokens."""
    shards = read_tokens(s, "train", None if s.data_check == "full" else 1_000_000)
    return f"{len(shards)} shards, {sum(map(len, shards.values())):,} tokens"


def check_validation(s: Settings) -> str:
    """The whole validation set: headers, BOS, ids, bytes, and the split: canonical,
    or a manifest's own."""
    val, manifest = Validation(s), read_manifest(s)
    documents, told = int((val.tokens == BOS).sum()), manifest_total(s, "val", "documents")
    if told not in (None, documents):
        raise UserError(f"the validation shards of {s.shards} hold {documents:,} documents (BOS tokens), the "
                        f"manifest says {told:,}: fetch or build the data again")
    canonical = not manifest or (manifest.get("split") or {}).get("rule") == "first"
    if canonical and documents != CANONICAL_VAL_DOCS:
        raise UserError(f"{s.shards} holds {documents:,} validation documents, the canonical split has "
                        f"{CANONICAL_VAL_DOCS:,}: the rest may be trained on; fetch the data again, or for a "
                        f"corpus of your own: python data/check.py {s.shards} --custom --write-manifest")
    check_byte_rule(s, val)
    return (f"{len(val.tokens) - 1:,} targets, {len(val.documents):,} documents, "
            f"{int(val.target_bytes.sum()):,} bytes by {val.rule}")


def check_same_text(run: Run, val: Validation) -> None:
    """The validation text's fingerprint into the summary; UserError where a run goes
    on with another text."""
    counts = val.target_bytes.astype("<i4")
    fingerprint = digest_of(val.stream.tobytes() + counts.tobytes()).hex()
    before = run.summary.setdefault("val_fingerprint", fingerprint)
    if before != fingerprint:
        raise UserError(f"the validation text or its bytes ({fingerprint}) are not those of the run in "
                        f"{run.dir} ({before}): set DATA_PATH to its own, or another ARTIFACT_DIR")


def check_byte_rule(s: Settings, val: Validation) -> None:
    """The bytes counted for all targets against the text that they decode to: by the
    table at most 1 % more (the published rule takes three bytes for a U+2581 that is
    not a piece's first character), by sidecars at most half as much again (a
    tokenizer that normalises text loses some). Token by token, so that their order
    does not matter: a token decodes to the same bytes everywhere but behind a
    boundary, where a leading space may be dropped."""
    table = ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size)
    sp, target = load_tokenizer(s.tokenizer), val.tokens[1:]
    behind = table.boundary[val.tokens[:-1]]
    words = np.flatnonzero(~table.lead & (table.base > 0))
    word = next(([i] for i in words.tolist() if not sp.is_byte(i)), [])
    behind_word = len(sp.decode(word).encode())
    at_start = np.bincount(target[behind], minlength=s.vocab_size)
    elsewhere = np.bincount(target[~behind], minlength=s.vocab_size)
    counted, text = int(val.target_bytes.sum()), 0
    for i in np.flatnonzero((at_start + elsewhere) * ~table.boundary).tolist():
        first = other = 1
        if not sp.is_byte(i):      # a byte alone decodes to a sign of three bytes
            first = len(sp.decode([i]).encode())
            other = len(sp.decode([*word, i]).encode()) - behind_word
        text += int(at_start[i]) * first + int(elsewhere[i]) * other
    if counted > (1.01 if val.rule == "table" else 1.5) * text:
        raise UserError(f"the byte rule counts {counted:,} bytes in {text:,}: scores would be too "
                        "good; use shards with byte sidecars, or a tokenizer without pieces of "
                        "several spaces")


def check_manifest(s: Settings) -> str:
    """Files, sizes and tokenizer against the manifest, and overlap; returns the
    data's fingerprint."""
    def sha256(path: Path, most: int) -> str:
        return hashlib.sha256(read_bounded(path, most, A_MODEL)).hexdigest()

    manifest, folder = read_manifest(s), s.shards
    begins = "fineweb_val" if s.eval_only_quantized_path else "fineweb_"
    files = {e["name"]: e for e in manifest.get("files", ()) if e["name"].startswith(begins)}
    present = {p.name: p for p in folder.glob(f"{begins}*.bin")}
    for name in sorted(set(files) ^ set(present)) if manifest else ():
        what = "is missing" if name in files else "is not listed"
        raise UserError(f"{folder / name} {what}, says manifest.json: fetch or build the data again")
    for name, entry in files.items():
        path, size = present[name], present[name].stat().st_size
        if not ("size" in entry and isinstance(entry.get("sha256"), str)):
            raise UserError(f"{folder}/manifest.json lacks size or SHA-256 of {name}: fetch or "
                            "build the data again")
        if size != entry["size"]:
            raise UserError(f"{path} has {size:,} bytes, the manifest says {entry['size']:,}: fetch it again")
        if s.data_check == "full" and sha256(path, size) != entry["sha256"]:
            raise UserError(f"{path} is damaged, its SHA-256 is not the manifest's: fetch or build it again")
    told = (manifest.get("tokenizer") or {}).get("sha256")
    if told and s.tokenizer.is_file() and sha256(s.tokenizer, MOST_MODEL) != told:
        raise UserError(f"TOKENIZER_PATH={s.tokenizer} is not the tokenizer of {folder}: set it to its own")
    if not s.eval_only_quantized_path:
        check_overlap(s)
    if manifest:
        return manifest["fingerprint"][:16]
    sizes = "".join(f"{name} {present[name].stat().st_size}\n" for name in sorted(present))
    return f"sizes-{hashlib.sha256(sizes.encode()).hexdigest()[:16]} (no manifest.json)"


def check_overlap(s: Settings) -> None:
    """No validation document among the training documents, by the stored 64-bit
    hashes of their text; without those by hashes of their tokens, in the shard next
    to the split or, with DATA_CHECK=full, in all."""
    stored = [s.shards / f"document_hashes_{kind}.bin" for kind in ("train", "val")]
    if by_text := all(p.is_file() for p in stored):
        train_docs, val_docs = (np.fromfile(p, "<u8") for p in stored)
        shared = np.flatnonzero(np.isin(train_docs, val_docs))
        where = f"training document {shared[0]:,}" if len(shared) else ""
    else:
        known = {h for f in list_shards(s.shards, "val") for _, h in document_hashes(read_shard(f))}
        searched = list_shards(s.shards, "train")[:None if s.data_check == "full" else 1]
        shared = [f"{f.name} at token {at:,}" for f in searched for at, h in document_hashes(read_shard(f))
                  if h in known]
        where = shared[0] if shared else ""
    if len(shared):
        raise UserError(f"{len(shared):,} validation documents are in the training shards of {s.shards} "
                        f"(first: {where}): a score on them is worth nothing; fetch or build the data again")
    for kind, hashes in (("train", train_docs), ("val", val_docs)) if by_text else ():
        told = manifest_total(s, kind, "documents")
        if told not in (None, len(hashes)):
            raise UserError(f"{s.shards}/document_hashes_{kind}.bin has {len(hashes):,} documents, "
                            f"the manifest says {told:,}: fetch or build the data again")


def document_hashes(tokens: np.ndarray):
    """(position of its BOS, 64-bit hash of the tokens after it) of every document
    with at least one token."""
    starts, raw = np.flatnonzero(tokens == BOS), memoryview(np.ascontiguousarray(tokens)).cast("B")
    for a, b in zip(starts.tolist(), np.append(starts[1:], len(tokens)).tolist()):
        if b - a > 1:
            yield a, hashlib.blake2b(raw[2 * a + 2:2 * b], digest_size=8).digest()


def check_temporary_folder() -> None:
    """UserError unless there is one, in which torch keeps what it compiles."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError("no temporary folder can be written: set TMPDIR to a folder that can") from error


def check_folder(folder: Path) -> str:
    """The names of a run's files are free; UserError where a folder stands in the way."""
    for name in ("train.log", "metrics.jsonl", "summary.json", "final_model.pt", ARTIFACT_NAME):
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder: move it away or set ARTIFACT_DIR")
    return str(folder)


def check_made_before(s: Settings) -> str:
    """The weights or the artifact that the run begins with: a file, and an artifact's
    header."""
    if s.eval_only_path:
        size = file_size(Path(s.eval_only_path), 16 * MOST_WEIGHTS, "a run's final_model.pt")
        return f"EVAL_ONLY_PATH, {size:,} bytes"
    path = Path(s.eval_only_quantized_path)
    blob = read_bounded(path, MOST_ARTIFACT, "a run's final_model.int6.ptz")
    header, _ = artifact_from_bytes(blob, path.name)
    theirs = header.get("architecture")
    check_architecture(s, theirs if isinstance(theirs, dict) else {}, f"{path.name} is an artifact")
    return f"EVAL_ONLY_QUANTIZED_PATH, {len(blob):,} bytes"


def check_disk(folder: Path, need: int, ballast: bool = False) -> str:
    """The folder can be written and really has `need` bytes: they are reserved, then
    given back, or kept as ballast until there is something to write in their
    place."""
    probe = folder / (BALLAST if ballast else f".space.{os.getpid()}")
    kept = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, need)
                kept = ballast
            elif shutil.disk_usage(folder).free < need:
                raise OSError(28, "No space left on device")
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise UserError(f"ARTIFACT_DIR={folder} cannot take {need:,} bytes ({error.strerror}; {free:,} "
                        "free): free space or set ARTIFACT_DIR to another disk") from error
    finally:
        if not kept:
            with contextlib.suppress(OSError):
                probe.unlink()
    return f"{need:,} bytes can be written"


BALLAST = ".ballast"     # in the run's folder: what the weights will take


def drop_ballast(run: Run) -> None:
    """Give the space that check_disk keeps back, for what is written next."""
    if run.world.main:
        with contextlib.suppress(OSError):
            (run.dir / BALLAST).unlink(missing_ok=True)


def bytes_of_weights(s: Settings) -> int:
    """Bytes of the model's weights in float32."""
    return 4 * sum(map(math.prod, GPT.shapes(s).values()))


def bytes_of_results(s: Settings) -> int:
    """Weights, artifact twice, logs."""
    return bytes_of_weights(s) + 2 * ARTIFACT_LIMIT + (8 << 20)


FULL_BATCH = 1 << 19      # tokens of a step from which on only a GPU is fast enough


def slow_batch(s: Settings) -> str:
    """What is to be said when a CPU is given a GPU's batch; nothing for a small one."""
    if s.train_batch_tokens < FULL_BATCH:
        return ""
    return (f"TRAIN_BATCH_TOKENS={s.train_batch_tokens:,} on a CPU: a step may take many "
            "minutes; for a small run use configs/demo.env")


def check_device(s: Settings, world: World) -> str:
    """Where it runs; UserError where the machine has GPUs that torch does not see."""
    text = f"{world.device_name}, {torch.get_num_threads()} host threads"
    if world.device.type != "cpu":
        return text
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    meant = hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles")
    if not meant and (gpus := listed_gpus()):
        raise UserError(f"nvidia-smi lists {gpus} GPUs but torch {torch.__version__} sees none: "
                        "install a torch build for this driver, or set CUDA_VISIBLE_DEVICES= to "
                        "use the CPU")
    slow = slow_batch(s)
    return f"{text}; WARNING: {slow}" if slow and not s.eval_only_quantized_path else text


def listed_gpus() -> int:
    """GPUs that the driver knows of; 0 without a driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def run_checks(s: Settings, world: World, folder: Path, attention_why: str = "") -> list[Finding]:
    """Every check of the mode, in the order a user would fix them. attention_why:
    tried already."""
    written = bytes_of_results(s)
    if not (s.eval_only_path or s.eval_only_quantized_path):
        written += 3 * bytes_of_weights(s)      # two averages beside training, and the one being written
    checks = {
        "device": lambda: check_device(s, world),
        "attention": lambda: attention_why or resolve_attention(s.attn_backend, world.device)[1],
        "batch": lambda: "{} ranks x {} micro-batches of {:,} tokens".format(
            world.size, *s.batch_shape(world.size)),
        "folder": lambda: check_folder(folder),
        "disk": lambda: check_disk(folder, written),
        "size": lambda: expected_size(s),
        "training shards": lambda: check_train_shards(s),
        "validation shards": lambda: check_validation(s),
        "tokenizer": lambda: f"{s.tokenizer.name}, "
                             f"{len(ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size).base)} tokens",
        "data fingerprint": lambda: check_manifest(s)}
    if s.eval_only_quantized_path:
        del checks["batch"], checks["training shards"]
    if s.eval_only_path or s.eval_only_quantized_path:
        checks = {"made before": lambda: check_made_before(s), **checks}
    findings = []
    for what, check in checks.items():
        try:
            findings.append(Finding(what, True, check()))
        except UserError as error:
            findings.append(Finding(what, False, str(error)))
        except OSError as error:
            findings.append(Finding(what, False, f"cannot read {error.filename}: {error.strerror}; check its "
                                    "permissions"))
    return findings


def rehearse(s: Settings, world: World, run: Run, trainer: Trainer) -> float:
    """A dry run, at full size on random weights, of what follows training; the
    seconds to reserve."""
    begin, model, generator = Clock(), trainer.model, torch.Generator().manual_seed(s.seed)
    with torch.no_grad():
        weights = {n: (torch.randn(p.shape, generator=generator) * 0.02).to(p.device)
                   for n, p in model.named_parameters()}
    batch, one = trainer.random_batch(generator), dataclasses.replace(s, gptq_calibration_batches=world.size)
    calibrate(one, world, model, lambda: batch)               # the first pass allocates; the second is timed
    sync(world.device)
    clock = Clock()
    curvature = calibrate(one, world, model, lambda: batch)
    sync(world.device)
    seconds = clock.elapsed() * -(-s.gptq_calibration_batches // world.size)
    if s.logit_calib_enabled:
        few, tokens = 2 * s.logit_calib_batch_seqs * s.logit_calib_stride, batch.x.flatten().cpu().numpy()
        clock = Clock()
        fit_calibration(dataclasses.replace(s, logit_calib_tokens=few, logit_calib_epochs=1), model, tokens)
        seconds += clock.elapsed() * s.logit_calib_epochs * max(1, s.logit_calib_tokens / few)
    clock = Clock()
    quantiser = Quantiser(s, matrix_views(weights), curvature, world)
    setting_up = clock.elapsed()
    q = quantiser(unit_for(quantiser.deviations, 0.99 * (ARTIFACT_LIMIT - code_bytes(shipped_form(s))),
                           quantiser.finest))
    packing = Clock()
    blob = world.agree(pack_model(s, q) if world.main else None)
    # the fitter takes about three tries; 100 MB/s for saving the weights; a quarter to spare
    saving = sum(4 * p.numel() for p in model.parameters()) / 1e8
    need = seconds + 3 * clock.elapsed() - 2 * setting_up + saving
    reading = Clock()
    back = read_artifact(s, blob, "the rehearsal's artifact").weights
    if s.logit_calib_enabled:      # it works on a second model, read back from the artifact
        load_weights(build_model(s, world), back, "the rehearsal's artifact")
        need += reading.elapsed()
    reserve = world.agree(1.0 + 1.25 * need)
    if any(not torch.equal(back[n], w) for n, w in dequantise(q).items()):
        raise RuntimeError("the packed model does not read back as it was written")
    probing = Clock()
    failed = [p for p in run_probes(s, world, model) if not p.ok and not p.name.startswith("C1")]
    # blocks start as the identity: C1 has nothing to see yet
    if failed and not study_reasons(dataclasses.replace(s, val_doc_fraction=1.0)):
        raise RuntimeError(f"the scorer's probes fail on the untrained model: {failed}")
    run.log("rehearsal", calibrate_s=seconds, quantise_s=packing.start - clock.start,
            pack_s=packing.elapsed() - probing.elapsed(), score_s=probing.elapsed(),
            random_artifact_bytes=len(blob), reserve_s=reserve, seconds=begin.elapsed())
    return reserve


# ============================================================================================================
# PART THREE: lineage. What the older systems did differently; all above runs, and is the same, without it.
# ============================================================================================================

# --- settings

COMMON_SETTINGS = {f.name.upper(): f for f in fields(Settings)}
BY_HAND["QUANT_CLIP"] = "sigmas"
ALIASES["MUONEQ_R"] = "MUON_ROW_NORMALIZE"


@dataclass(frozen=True)
class LineageSettings(Settings):
    """The settings of older systems beside the others."""
    train_loader: str = choice("stream docpack shuffled coprime", "stream: every target once; or the field's")
    ttt_optimizer: str = choice("normalised adam sgd", "steps: the gradient over its RMS, AdamW, or SGD")
    parallel_lanes: str = choice("mixed separate", "lanes write to both; or stay apart and are blended",
                                 group="model")
    ln_scale: bool = knob(True, "block inputs are scaled by 1 / sqrt(layer + 1)")
    parallel_final_lane: str = choice("mean mlp attn", "which mixed lane is read at the end")
    skip_gates_enabled: bool = knob(True, "gate the U-Net skips")
    skip_rows: str = choice("looped physical", "skips: half of the looped order, or of the physical layers")
    skip_into_lanes: bool = knob(True, "skips that come after the lanes began join lane 0; 0: they are lost")
    smear_gate_kind: str = choice("window channels", "one strength by GATE_WINDOW channels; one each")
    bigram_vocab_size: int = knob(0, "rows of a hashed table of token pairs, added to the embedding", 0)
    bigram_dim: int = knob(128, "its width", 1, 65536)
    ve_enabled: bool = knob(False, "value embeddings: a second token table, added to values")
    ve_dim: int = knob(128, "its width", 1, 65536)
    ve_layers: str = knob("9,10", "layers whose values it is added to")
    gated_attn_enabled: bool = knob(False, "gate each head by the whole block input instead")
    attn_out_gate_enabled: bool = knob(False, "gate each head by 2 sigmoid of GATE_WINDOW channels instead")
    attn_out_gate_src: str = choice("proj q", "it reads the block input or raw queries")
    rope_yarn: bool = knob(False, "rescale the rotary base beyond TRAIN_SEQ_LEN (NTK scaling)")
    tie_embeddings: bool = knob(True, "the input embedding is the output projection")
    embed_lr: float = knob(0.6, "AdamW's learning rate of an untied input embedding", 0, group="optimiser")
    head_lr: float = knob(0.008, "AdamW's learning rate of an untied output head", 0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations (more than 5 run as 5)", 1)
    muon_row_normalize: bool = knob(True, "normalise each row of the update before Newton-Schulz")
    muon_coefficients: str = choice("polar quintic", "Polar Express, or one quintic for all iterations")
    matrix_lr_early: float = knob(0.0, "MATRIX_LR of the layers before BANK_SPLIT; 0: no split", 0)
    matrix_lr_late: float = knob(0.0, "MATRIX_LR of the others; 0: MATRIX_LR", 0)
    bank_split: int = knob(5, "the first late layer", 0)
    split_lr_target: str = choice("update gradient", "the split scales it; gradient: published, to no effect")
    midrun_cap_schedule: str = knob("", "caps on the share of the learning rate: cap@progress, …")
    recur_start_step: int = knob(0, "step at which loops begin; 0: by ENABLE_LOOPING_AT", 0)
    late_qat_threshold: float = knob(0.0, "share of the learning rate below which the projections of bigram "
                                     "and value embeddings train softly rounded; 0: never", 0, 1)
    late_qat_min_step: int = knob(2000, "and not before this step", 0)
    prequant_ttt_enabled: bool = knob(False, "study, NON-COMPLIANT: train on validation tokens last")
    prequant_ttt_epochs: int = knob(10, "passes over them", 1)
    prequant_ttt_lr: float = knob(0.00045, "AdamW's learning rate", 0)
    prequant_ttt_cosine_decay: bool = knob(True, "down to a tenth of it, epoch by epoch")
    prequant_ttt_batch_seqs: int = knob(32, "rows of TRAIN_SEQ_LEN in a batch", 1)
    prequant_ttt_grad_clip: float = knob(1.0, "largest gradient norm", 0)
    prequant_ttt_freeze_blocks: int = knob(1, "first layers that stay as they are", 0)
    prequant_ttt_form: str = choice("sharded overlapping", "ranks share rows; or all train on all, unfrozen")
    quant_clip: str = choice("sigmas percentile", "those sigmas; or the best of five percentiles of a row",
                             group="quantise")
    lqer_scope: str = choice("all mlp attn embed", "which matrices may get a low-rank repair")
    lqer_gain_select: bool = knob(False, "choose them by the error it removes, not by the error there is")
    lqer_asym_enabled: bool = knob(True, "asymmetric factors; 0: symmetric ones")
    lqer_factor_bits: int = knob(4, "bits of the symmetric ones", 2, 8)
    ttt_short_doc_len: int = knob(2000, "the one step when TTT_SHORT_SCORE_FIRST_STEPS is empty", 0,
                                  group="score")
    ttt_short_chunk_size: int = knob(24, "its chunk; 0: none", 0)
    global_ttt_respect_doc_boundaries: bool = knob(True, "base weights learn without attention across "
                                                   "documents; 0: from rows of EVAL_SEQ_LEN")
    global_ttt_warmup_chunks: int = knob(0, "chunks of linear warm-up of GLOBAL_TTT_LR", 0)
    global_ttt_warmup_start_lr: float = knob(0.0, "learning rate at its start", 0)
    corrector_alpha: float = knob(0.0, "n-gram posterior added to the logits of TTT; 0: none", 0)
    corrector_orders: str = knob("8", "its orders, as 2,3,5")
    ngram_gates: str = choice("previous open_word target", "who speaks when; target: NON-COMPLIANT")
    ngram_choice: str = choice("model confidence", "what weighs hints: probability, or own confidence")
    ngram_boost_gamma: float = knob(0.0, "boosts shrink by (1 - the hint's probability) to this power", 0)
    within_tau: float = knob(99.0, "the same for the expert of the open word's next token", 0)
    within_boost: float = knob(0.0, "nats added to its hint's logit", 0)
    word_order: int = knob(4, "expert of the next word's first token: order in words", 1, 1024)
    word_normalize: str = choice("strip_punct_lower lower identity", "equal words")
    word_tau: float = knob(99.0, "it speaks from this confidence on; above 1: never", 0)
    word_boost: float = knob(0.0, "nats added to its hint's logit", 0)
    agree_add_boost: float = knob(0.0, "more nats when another expert gives the same hint", 0)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """VE_LAYERS as numbers."""
        return tuple(whole_numbers(self.ve_layers))

    @property
    def first_chunks(self) -> str:
        """The older form has one step, of TTT_SHORT_DOC_LEN."""
        steps = super().first_chunks
        if steps or not self.ttt_short_score_first_enabled or not self.ttt_short_chunk_size:
            return steps
        return f"{self.ttt_short_doc_len}:{self.ttt_short_chunk_size}"

    def beyond_the_system(self) -> list[str]:
        beyond = []
        for name, value in self.changed().items():
            common = COMMON_SETTINGS.get(name)
            choices = common.metadata["choices"] if common else ()
            if not common or (choices and value not in choices):
                beyond.append(name)
        if self.first_chunks != super().first_chunks:
            beyond.append("TTT_SHORT_DOC_LEN")
        return beyond

    def to_be_stored(self, values: Mapping) -> dict:
        """Settings of older systems only where they are on: the file is the same
        without this part."""
        changed = self.changed()
        return {name: v for name, v in values.items() if name in COMMON_SETTINGS or name in changed}

    def check_consistency(self) -> None:
        super().check_consistency()
        check_lineage(self)


def check_lineage(s: LineageSettings) -> None:
    """Refuse settings of older systems that do not go together."""
    if s.rope_yarn and (s.rope_dims or s.head_dim) == 2:
        raise UserError("ROPE_YARN=1 has no exponent for 2 rotated channels: raise ROPE_DIMS or "
                        "set ROPE_YARN=0")
    if s.bigram_vocab_size == 1:
        raise UserError("BIGRAM_VOCAB_SIZE=1 leaves no row for pairs: set 0, or more")
    layers = s.value_layers
    if s.ve_enabled and not (layers and max(layers) < s.num_layers and len({*layers}) == len(layers)):
        raise UserError(f"VE_LAYERS={s.ve_layers} must be layers below NUM_LAYERS={s.num_layers}, "
                        "each once: as 9,10")
    if s.matrix_lr_early and not s.matrix_lr:
        raise UserError(f"MATRIX_LR_EARLY={s.matrix_lr_early:g} is relative to MATRIX_LR=0: raise that")
    if s.sparse_attn_gate_enabled + s.gated_attn_enabled + s.attn_out_gate_enabled > 1:
        raise UserError("more than one attention gate is on: keep one of SPARSE_ATTN_GATE_ENABLED, "
                        "GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED and set the others to 0")
    schedule(s.midrun_cap_schedule, 1.0, float)
    orders = whole_numbers(s.corrector_orders.strip(","))
    if s.corrector_orders and not (orders and 0 < min(orders) <= max(orders) <= MOST_ORDER):
        raise UserError(f"CORRECTOR_ORDERS={s.corrector_orders} must be whole numbers from 1 to "
                        f"{MOST_ORDER}, as 2,3,5")
    if s.quant_clip != "sigmas" and s.quant_allocation != "hand":
        raise UserError(f"QUANT_CLIP={s.quant_clip} changes steps that are set by hand, not by "
                        f"QUANT_ALLOCATION={s.quant_allocation}: set that to hand or leave it out")


Settings = LineageSettings


# --- model

ROLES.update(
    lm_head="head",
    bigram_embed="embed",
    ve_embed="embed",
    attn_gate_proj="small",
    lane_merge="small",
    smear_channels="small",
    bigram_proj="small",
    bigram_scale="small",
    ve_proj="small",
    ve_scale="small",
    ve_layer_scales="small",
)
PER_LAYER.update(
    ve_layer_scales="ve_layer_scales.{}",
    attn_gate_proj="blocks.{}.attn.attn_gate_proj.weight",
)
WHOLE.update(
    lm_head="lm_head.weight",
    smear_channels="smear.gate",
    bigram_embed="bigram.embed.weight",
    bigram_proj="bigram.proj.weight",
    bigram_scale="bigram.scale",
    ve_embed="ve_shared.embed.weight",
    ve_proj="ve_shared.proj.weight",
    ve_scale="ve_shared.scale",
)
EMBEDDINGS.update(("lm_head.weight", "bigram.embed.weight", "ve_shared.embed.weight"))
# Parameters in the order of their making: sums over all of them are taken in it.
PARAMETER_ORDER = (
    "tok_emb qo_bank kv_bank mlp_up_bank mlp_down_bank attn_scale mlp_scale resid_mix q_gain skip_weights "
    "parallel_post_lambdas parallel_resid_lambdas lane_merge lm_head skip_gates smear_gate smear_lambda "
    "smear_channels bigram_embed bigram_scale bigram_proj ve_embed ve_scale ve_proj ve_layer_scales "
    "softcap_pos softcap_neg attn_gate_w attn_gate_proj").split()


def pair_rows(ids: Tensor, rows: int, same_segment: Tensor | None = None) -> Tensor:
    """Row of a hashed table for each token of ids (B, T) and the one before it, where
    same_segment (1, T - 1) lets them meet; the last row where nothing goes before.
    int32 arithmetic, wrapping."""
    now = ids.int()
    row = (36313 * now[:, 1:] ^ 27191 * now[:, :-1]) % (rows - 1)
    if same_segment is not None:
        row = row.where(same_segment, rows - 1)
    return F.pad(row, (1, 0), value=rows - 1).long()


def look_up(ids: Tensor, table: Tensor, proj: Tensor | None, scale: Tensor, dtype: torch.dtype,
            sharpness: Tensor | None = None) -> Tensor:
    """scale · proj table[ids], (B, T, out); proj (out, w) or None; sharpness: proj is
    rounded softly."""
    x = F.embedding(ids, table).to(dtype)
    if proj is not None:
        if sharpness is not None:
            proj = soft_round(proj, sharpness)
        x = F.linear(x, proj.to(dtype))
    return x * scale.to(dtype)


def soft_round(w: Tensor, sharpness: Tensor) -> Tensor:
    """w (R, C) near its six-bit grid, with a gradient: a sigmoid of this slope in
    place of each step. The step of a row is its largest magnitude over 31, but at
    least 1/31."""
    step = (w.abs().amax(dim=-1, keepdim=True) / 31).clamp_min(1 / 31)
    z = w / step
    low = z.floor()
    return (low + torch.sigmoid(sharpness * (z - low - 0.5))).clamp(-31, 31) * step


@dataclass
class LineageForward(Forward):
    """values: what the tokens add to the values of a layer, (B, T, K·D), by layer."""
    values: dict[int, Tensor] = field(default_factory=dict)


class LineageGPT(GPT):
    """The models before the looped one: tables of tokens and of pairs, other lanes,
    gates, heads, angles."""

    def __init__(self, s: Settings, generator: torch.Generator | None = None):
        super().__init__(s, generator)
        self.rope_length = 0                         # tokens that the rotary table was once made for
        self.sharpness: Tensor | None = None         # of soft rounding, in late training

    @classmethod
    def shapes(cls, s: Settings) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(s)
        d, layers = s.model_dim, s.num_layers
        if s.skip_rows == "physical":
            for name in ("skip_weights", "skip_gates"):
                shapes[name] = (layers // 2, d)
        if not s.skip_gates_enabled:
            del shapes["skip_gates"]
        if s.parallel_lanes == "separate":
            del shapes["parallel_post_lambdas"], shapes["parallel_resid_lambdas"]
            if 0 < s.parallel_start_layer < layers:
                shapes["lane_merge"] = ()
        if not s.tie_embeddings:
            shapes["lm_head"] = (s.vocab_size, d)
        if s.smear_gate_enabled and s.smear_gate_kind == "channels":
            del shapes["smear_gate"], shapes["smear_lambda"]
            shapes["smear_channels"] = (d,)
        if s.bigram_vocab_size:
            shapes.update(table_shapes("bigram", s.bigram_vocab_size, s.bigram_dim, d))
        if s.ve_enabled:
            shapes.update(table_shapes("ve", s.vocab_size, s.ve_dim, s.kv_dim))
            shapes["ve_layer_scales"] = (len(s.value_layers), 1)
        if s.gated_attn_enabled:
            shapes["attn_gate_w"] = (layers, s.num_heads, d)
        if s.attn_out_gate_enabled:
            shapes["attn_gate_proj"] = (layers, s.num_heads, s.gate_window)
        return {name: shapes[name] for name in PARAMETER_ORDER if name in shapes}

    def initial_values(self) -> dict[str, float]:
        return super().initial_values() | dict(
            lane_merge=0.5, bigram_scale=0.05, ve_scale=0.1, ve_layer_scales=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        super().init_weights(generator)
        if self.s.gated_attn_enabled:
            self.attn_gate_w.normal_(0, 0.01, generator=generator)
        if hasattr(self, "bigram_proj"):     # of table and projection one starts at 0: both would stay there
            nn.init.orthogonal_(self.bigram_proj, generator=generator)
        if self.s.ve_enabled:
            self.ve_embed.normal_(0, 0.01, generator=generator)

    def layer_weights(self) -> list[LayerWeights]:
        layers = super().layer_weights()
        if not self.s.attn_out_gate_enabled:
            return layers
        gates = self.unbound("attn_gate_proj")
        return [w._replace(gate=gate) for w, gate in zip(layers, gates)]

    def rope_base(self, longest: int) -> float:
        """With ROPE_YARN the base grows with the longest row so far."""
        s = self.s
        longest = max(longest, self.rope_length)
        if not s.rope_yarn or longest <= s.train_seq_len:
            return s.rope_base
        dims = s.rope_dims or s.head_dim
        return s.rope_base * (longest / s.train_seq_len) ** (dims / (dims - 2))

    def embed(self, ids: Tensor, layout: Layout | None, before: Tensor | None = None,
              hook: Callable | None = None) -> Tensor:
        s, dtype, length = self.s, self.compute_dtype, ids.size(1)
        channels = s.smear_gate_enabled and s.smear_gate_kind == "channels"
        if not channels and not s.bigram_vocab_size:
            return super().embed(ids, layout, before, hook)
        if before is not None:      # two tokens: a bigram of the last one may be smeared
            ids = torch.cat((before[:, -2 if s.bigram_vocab_size else -1:], ids), dim=1)
        x = self.look_up(ids, hook)
        if s.bigram_vocab_size:
            rows = pair_rows(ids, s.bigram_vocab_size, self.same_segment(ids, layout))
            proj = getattr(self, "bigram_proj", None)
            x = x + look_up(rows, self.bigram_embed, proj, self.bigram_scale, dtype, self.sharpness)
        if channels:
            x = self.smear(rms(x), self.smears_into(ids, layout))
        elif s.smear_gate_enabled:
            x = rms(self.smear(x, self.smears_into(ids, layout)))
        else:
            x = rms(x)
        return x if before is None else x[:, -length:]

    def smear(self, x: Tensor, into: Tensor | None) -> Tensor:
        """With SMEAR_GATE_KIND=channels: one strength for each channel, the same for
        all tokens."""
        if self.s.smear_gate_kind == "window":
            return super().smear(x, into)
        last = x[:, :-1] if into is None else x[:, :-1] * into[..., None]
        gate = torch.sigmoid(self.smear_channels.to(x.dtype))
        return (1 - gate) * x + gate * F.pad(last, (0, 0, 1, 0))

    def token_values(self, ids: Tensor) -> dict[int, Tensor]:
        """What the tokens ids (B, T) add to the values of a layer, (B, T, K·D), by
        layer."""
        if not self.s.ve_enabled:
            return {}
        dtype, proj = self.compute_dtype, getattr(self, "ve_proj", None)
        shared = look_up(ids, self.ve_embed, proj, self.ve_scale, dtype, self.sharpness)
        scales = self.ve_layer_scales.to(dtype)
        return {i: shared * scale for i, scale in zip(self.s.value_layers, scales)}

    def begin(self, ids: Tensor, *how) -> Forward:
        c = super().begin(ids, *how)
        if not self.s.ve_enabled:
            return c
        return LineageForward(
            c.layers, c.x0, c.rope, c.layout, c.adapter, c.hook, c.cache, self.token_values(ids))

    def project(self, c: Forward, i: int, slot: int, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(c, i, slot, n)
        if self.s.ve_enabled and i in c.values:
            v = v + c.values[i]
        return q, k, v

    def head_gate(self, weight: Tensor, n: Tensor, q_raw: Tensor) -> Tensor:
        s = self.s
        if s.attn_out_gate_enabled:
            source = q_raw if s.attn_out_gate_src == "q" else n
            return 2 * torch.sigmoid(F.linear(source[..., :weight.size(-1)], weight))
        if s.gated_attn_enabled:
            return torch.sigmoid(F.linear(n, weight))
        return super().head_gate(weight, n, q_raw)

    def decode(self, c: Forward, plan: Plan, x: Tensor, skips: list[Tensor]) -> Tensor:
        """With PARALLEL_LANES=separate: lanes begin with the skip in both, and later
        skips may be lost."""
        if self.s.parallel_lanes == "mixed":
            return super().decode(c, plan, x, skips)
        lanes = None
        for j, i in enumerate(plan.decoder):
            slot = len(plan.encoder) + j
            has_skip = skips and j < len(self.skip_weights)
            skip = skips.pop() if has_skip else None
            if has_skip and lanes is None:
                x = self.merge_skip(j, x, skip)
            elif has_skip and self.is_parallel(i) and self.s.skip_into_lanes:
                lanes = self.merge_skip(j, lanes[0], skip), lanes[1]
            if self.is_parallel(i):
                lane0, lane1 = lanes or (x, x)
                mixed, attended, fed = self.branches(c, i, slot, lane0, lane1)
                lanes = mixed + attended, lane1 + fed
            elif lanes is None:
                x = self.block(c, i, slot, x)
        return x if lanes is None else self.join(*lanes)


    def join(self, lane0: Tensor, lane1: Tensor) -> Tensor:
        if self.s.parallel_lanes == "separate":
            return torch.lerp(lane1, lane0, self.lane_merge.to(lane0.dtype))
        if self.s.parallel_final_lane == "mean":
            return super().join(lane0, lane1)
        return lane1 if self.s.parallel_final_lane == "mlp" else lane0

    def depth_scale(self, i: int) -> float:
        return super().depth_scale(i) if self.s.ln_scale else 1.0

    def merge_skip(self, j: int, x: Tensor, skip: Tensor) -> Tensor:
        if self.s.skip_gates_enabled:
            return super().merge_skip(j, x, skip)
        return x + self.skip_weights[j].to(x.dtype) * skip

    @staticmethod
    def head_name(s: Settings) -> str:
        return "tok_emb.weight" if s.tie_embeddings else "lm_head.weight"

    def head_weight(self) -> Tensor:
        return self.tok_emb if self.s.tie_embeddings else self.lm_head

    def logits(self, hidden: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Corrected by counts, where an adapter has some."""
        z = super().logits(hidden, adapter)
        return z if adapter is None or adapter.bias is None else z + adapter.bias

    def scores_plain_logits(self, adapter: Adapter | None, training: bool) -> bool:
        corrected = adapter is not None and adapter.bias is not None
        return corrected or super().scores_plain_logits(adapter, training)


def table_shapes(table: str, rows: int, width: int, out: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a table of `rows` rows that is looked up, of its scale, and of its
    projection to `out`."""
    shapes = {f"{table}_embed": (rows, width), f"{table}_scale": ()}
    if width != out:
        shapes[f"{table}_proj"] = (out, width)
    return shapes


GPT = LineageGPT


# --- adaptation

class Corrector:
    """n-gram posterior of one row of a batch; it learns the targets of a chunk once
    they are booked."""

    def __init__(self, s: Settings):
        self.alpha = s.corrector_alpha
        self.orders = sorted({int(n) for n in s.corrector_orders.split(",") if n})
        self.counts, self.history = np.ones(s.vocab_size), []
        self.followers: dict[tuple, dict[int, int]] = {}

    def context(self, order: int) -> tuple:
        return order, *self.history[max(len(self.history) - order + 1, 0):]

    def bias(self) -> np.ndarray:
        """What the logits of the next token get (V,): alpha log q of the unigrams,
        and for every order that knows the context, of the tokens seen there, alpha
        times what it says beyond that."""
        log_q = np.log(self.counts / self.counts.sum())
        bias = self.alpha * log_q
        for order in self.orders if self.history else ():
            if seen := self.followers.get(self.context(order)):
                tokens, counts = (np.array(list(x)) for x in (seen.keys(), seen.values()))
                share = np.log((counts + 1) / (counts.sum() + len(log_q)))
                bias[tokens] += self.alpha * (share - log_q[tokens])
        return bias

    def learn(self, tokens: list[int]) -> None:
        for token in tokens:
            for order in self.orders:
                seen = self.followers.setdefault(self.context(order), {})
                seen[token] = seen.get(token, 0) + 1
            self.history.append(token)
            self.counts[token] += 1


class LineageAdapter(Adapter):
    """An adapter whose rows have counts of earlier text."""

    def __init__(self, s: Settings, plan: Plan, rows: int, device="cpu"):
        super().__init__(s, plan, rows, device)
        self.correctors: list[Corrector] = []
        self.bias: Tensor | None = None     # theirs for a chunk, (rows, 1, V) bfloat16: added to the logits

    def keep(self, rows: slice) -> None:
        super().keep(rows)
        self.correctors = self.correctors[rows]


class LineageTTT(PhasedTTT):
    """Adaptation by SGD, and scores corrected by counts."""

    def begin_round(self) -> None:
        self.correctors: list[Corrector] = []
        super().begin_round()

    def optimiser(self, adapter: Adapter) -> torch.optim.Optimizer | None:
        s = self.s
        if s.ttt_optimizer != "sgd":
            return super().optimiser(adapter)
        lr = s.ttt_lora_lr * s.ttt_local_lr_mult
        return torch.optim.SGD(adapter.trained(), lr, momentum=s.ttt_beta1, weight_decay=s.ttt_weight_decay)

    def adapter_for(self, rows: int) -> Adapter:
        """As published, a row's counts pass from document to document in length
        order; in stream order its last document may come later in the stream."""
        adapter = super().adapter_for(rows)
        if self.s.corrector_alpha:
            if self.s.ttt_doc_order == "stream" or not self.correctors:
                self.correctors = [Corrector(self.s) for _ in range(self.s.ttt_batch_size)]
            adapter.correctors = self.correctors[:rows]
        return adapter

    def global_lr(self, c: int, chunks: int) -> float:
        """After GLOBAL_TTT_WARMUP_CHUNKS of a linear warm-up."""
        s, warm = self.s, self.s.global_ttt_warmup_chunks
        if c >= warm:
            return super().global_lr(c - warm, chunks - warm)
        share = c / max(warm - 1, 1)
        return (1 - share) * s.global_ttt_warmup_start_lr + share * s.global_ttt_lr

    def row_starts(self, tokens: np.ndarray) -> np.ndarray:
        if self.s.global_ttt_respect_doc_boundaries:
            return super().row_starts(tokens)
        return np.arange(0, len(tokens) - 1, self.s.eval_seq_len)

    def rows_of(self, tokens: np.ndarray) -> Batch:
        batch = super().rows_of(tokens)
        if self.s.global_ttt_respect_doc_boundaries:
            return batch
        return batch.rows(self.s.eval_seq_len)

    def score_chunk(self, starts: np.ndarray, w: ChunkWindow, adapter: Adapter | None,
                    cache: KeyCache | None) -> Scored:
        """The counts correct the chunk's logits; they learn its targets once these
        are booked."""
        if adapter is None or not adapter.correctors:
            return super().score_chunk(starts, w, adapter, cache)
        bias = torch.from_numpy(np.stack([corrector.bias() for corrector in adapter.correctors]))
        adapter.bias = bias.to(self.world.device, torch.bfloat16)[:, None]
        scored = super().score_chunk(starts, w, adapter, cache)
        first = starts + w.begin + w.offset + 1
        for corrector, begin, count in zip(adapter.correctors, first, w.count):
            corrector.learn(self.val.tokens[begin:begin + count].tolist())
        return scored


Adapter = LineageAdapter
PhasedTTT = LineageTTT


# --- optimiser

QUINTIC = 5 * ((3.4445, -4.7750, 2.0315),)


def split_rates(s: Settings, bank: Tensor) -> Tensor | None:
    """Factor on each matrix (n, 1, 1) of a bank by its layer, relative to MATRIX_LR;
    None without a split."""
    if not s.matrix_lr_early:
        return None
    layers = torch.arange(len(bank), device=bank.device) % s.num_layers
    early = s.matrix_lr_early / s.matrix_lr
    late = (s.matrix_lr_late or s.matrix_lr) / s.matrix_lr
    return torch.where(layers < s.bank_split, early, late)[:, None, None]


class LineageOptimiser(Optimiser):
    """Other coefficients of Muon, rates that differ by layer, and an output head of
    its own."""

    def __init__(self, s: Settings, world: World, params: Mapping[str, nn.Parameter], dtype: torch.dtype):
        super().__init__(s, world, params, dtype)
        self.split = [split_rates(s, bank) for bank in self.banks]

    def adam_rates(self) -> dict[str, tuple[float, float]]:
        rates = super().adam_rates()
        if self.s.tie_embeddings:
            return rates
        return {"embed": (self.s.embed_lr, self.s.embed_wd), "head": (self.s.head_lr, self.s.embed_wd),
                "small": rates["small"]}

    def direction(self, bank: int, g: Tensor, momentum: float) -> Tensor:
        s, split, buf = self.s, self.split[bank], self.momentum[bank]
        if split is not None and s.split_lr_target == "gradient":
            own = split[len(buf) * self.world.rank:][:len(buf)]
            g[:len(own)] *= own
        coefficients = QUINTIC if s.muon_coefficients == "quintic" else POLAR_EXPRESS
        return muon_direction(g, buf, momentum, s.muon_row_normalize, coefficients[:s.muon_backend_steps])

    def apply(self, bank: int, u: Tensor, lr: float) -> None:
        split = self.split[bank]
        if split is not None and self.s.split_lr_target == "update":
            u = u * split
        super().apply(bank, u, lr)


Optimiser = LineageOptimiser


# --- training

class LineageCurriculum(Curriculum):
    """Loops that begin at a step."""

    def loops(self, step: int, progress: float) -> bool:
        s = self.s
        if not s.recur_start_step:
            return super().loops(step, progress)
        return s.num_loops > 0 and step >= s.recur_start_step

    def rate(self, progress: float) -> float:
        """At most the value of the last point of MIDRUN_CAP_SCHEDULE that is passed,
        before: of its first."""
        share = super().rate(progress)
        if not self.s.midrun_cap_schedule:
            return share
        points = schedule(self.s.midrun_cap_schedule, 1.0, float)
        caps = [points[0][1]]
        caps += [cap for at, cap in points[:-1] if at <= progress]
        return min(share, caps[-1])

    def graphs(self) -> list[tuple[int, bool]]:
        if not self.s.recur_start_step:
            return super().graphs()
        lengths = [length for _, length in self.stages]      # by the clock, loops by the step: any pair
        return list(itertools.product(lengths, (False, True)))


class LineageTrainer(Trainer):
    """Late in training the projections of bigram and value embeddings are rounded
    softly."""

    def rewind(self) -> None:
        super().rewind()
        self.steps = 0
        self.began: int | None = None              # after so many steps
        self.sharpness: Tensor | None = None       # a tensor: one graph for all values

    def set_sharpness(self, sharpness: float | None) -> None:
        """Slope of the rounding from now on; None: there is none."""
        device = self.world.device
        self.sharpness = None if sharpness is None else torch.full((), sharpness, device=device)

    def sharpness_after(self, steps: int, lr: float) -> float | None:
        """Slope after so many steps, the last one at this share of the rate; None
        before rounding begins."""
        s = self.s
        if self.began is None and lr < s.late_qat_threshold and steps >= s.late_qat_min_step:
            self.began = steps
        return None if self.began is None else 1 + 15 * min((steps - self.began) / 500, 1.0)

    def micro_step(self, batch: Batch, plan: Plan) -> Tensor:
        self.model.sharpness = self.sharpness
        try:
            return super().micro_step(batch, plan)
        finally:
            self.model.sharpness = None

    def update(self, lr: float, momentum: float) -> Tensor:
        norm = super().update(lr, momentum)
        self.steps += 1
        self.set_sharpness(self.sharpness_after(self.steps, lr))
        return norm

    def warm_graph(self, length: int, plan: Plan, generator: torch.Generator) -> None:
        super().warm_graph(length, plan, generator)
        if not self.s.late_qat_threshold:
            return
        for _ in range(self.s.warmup_steps):
            self.set_sharpness(1.0)
            for _ in range(self.accum):
                self.micro_step(self.random_batch(generator, length), plan)
            self.update(1.0, self.s.muon_momentum)

    def tensors(self) -> dict[str, Any]:
        began = -1 if self.began is None else self.began
        return super().tensors() | {"rounding": torch.tensor([self.steps, began])}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.steps, began = state["rounding"].tolist()
        self.began = None if began < 0 else began
        self.set_sharpness(self.sharpness_after(self.steps, 1.0))


Curriculum = LineageCurriculum
Trainer = LineageTrainer


# --- quantising

@torch.no_grad()
def clip_search(w: Tensor, order: Tensor, u: Tensor, dead: Tensor, bits: int,
                coarser: float = 1.0) -> tuple[Tensor, Tensor]:
    """(codes, fp16 steps (n, R)) of matrices w (n, R, C): of five percentiles of
    |row| as largest code, each with a pass of GPTQ, the one with the least squared
    error. As published no step is below 1 / top."""
    top, tried = 2 ** (bits - 1) - 1, []
    for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        scale = to_half((w.abs().quantile(share, dim=-1) / top).clamp_min(1 / top) * coarser)
        codes = round_in_order(w, scale.float(), order, u, dead, top)
        tried.append(((w - codes * scale[..., None].float()).square().mean(dim=(-2, -1)), codes, scale))
    error, codes, scales = (torch.stack(x) for x in zip(*tried))
    best = error.argmin(0), torch.arange(len(w), device=w.device)
    return codes[best], scales[best]


class LineageQuantiser(Quantiser):
    """Steps by a search over percentiles, other choices and another form of repairs."""

    def round_by_hand(self, w: Tensor, rows: Tensor, factors: Sequence[Tensor], bits: int,
                      unit: float) -> tuple[Tensor, Tensor]:
        if self.s.quant_clip == "percentile":
            return clip_search(w, *factors, bits, unit)
        return super().round_by_hand(w, rows, factors, bits, unit)

    def to_repair(self, errors: Mapping[str, Tensor]) -> list[str]:
        """Within LQER_SCOPE; with LQER_GAIN_SELECT those whose error shrinks most."""
        s, gains = self.s, {}
        part_of_name = {"all": "", "mlp": ".mlp.", "attn": ".attn.", "embed": "tok_emb"}[s.lqer_scope]
        errors = {name: error for name, error in errors.items() if part_of_name in name}
        if not s.lqer_gain_select:
            return super().to_repair(errors)
        for name, error in errors.items():
            _, factors = self.pack_factors(name, *low_rank(error, s.lqer_rank))
            left = error.cpu() - factors_of(factors, name)
            gains[name] = error.norm().item() - left.norm().item()
        best = sorted(gains, key=lambda name: -gains[name])
        return [name for name in best[:s.lqer_top_k] if gains[name] > 0]

    def pack_factors(self, name: str, a: Tensor, b: Tensor) -> tuple[str, dict[str, Tensor]]:
        """With LQER_ASYM_ENABLED=0 all are symmetric."""
        if self.s.lqer_asym_enabled and b.numel() % self.s.lqer_asym_group == 0:
            return super().pack_factors(name, a, b)
        return symmetric_factors(name, a, b, self.s.lqer_factor_bits)


Quantiser = LineageQuantiser


# --- counts of earlier text: experts of words

@functools.cache
def word_pieces(path: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray, Callable]:
    """Which tokens begin a word and which belong to none (V,), and the decoder."""
    sp, breaks = load_tokenizer(path), {*range(9, 21), 36}     # ids, as published, of bytes that end a word
    return (np.array([sp.id_to_piece(i).startswith("\u2581") for i in range(vocab_size)]),
            np.array([i == BOS or (i in breaks and sp.is_byte(i)) for i in range(vocab_size)]), sp.decode)


class Words(NamedTuple):
    """Where words lie among the targets (n,). begins, opened, outside: the target
    begins a word; one is open before it; it belongs to none. start: target at which
    its word begins."""
    begins: np.ndarray
    opened: np.ndarray
    outside: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, s: Settings, targets: np.ndarray) -> Words:
        starts, boundary, _ = word_pieces(s.tokenizer, s.vocab_size)
        outside = boundary[targets]
        opened = np.append(False, ~outside[:-1])
        begins = ~outside & (starts[targets] | ~opened)
        start = np.maximum.accumulate(np.where(begins, np.arange(len(targets)), 0))
        return cls(begins, opened, outside, start)


def count_within(s: Settings, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What continued the same open word earlier."""
    targets = tokens[1:]
    w = Words.of(s, targets)
    learns = w.opened & ~w.outside & ~w.begins
    items = np.flatnonzero(w.opened)
    keys = span_keys(scramble(np.arange(s.vocab_size))[targets], w.start[items - 1], items)
    return counted(targets, items, keys, learns, learns if s.ngram_gates == "target" else w.opened)


def count_words(s: Settings, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first token of the word that followed the same WORD_ORDER - 1 words earlier."""
    targets, depth = tokens[1:], s.word_order - 1
    w = Words.of(s, targets)
    at = np.arange(len(targets))
    word = open_words(s, targets, w.start, w.outside)       # number of the open word, up to here
    ends = ~w.outside & np.append(w.begins[1:] | w.outside[1:], True) & (word > 0)
    closed = np.append(0, word[ends])
    unfinished = np.append(0, word[:-1] * ~w.outside[:-1])
    before = np.append(0, np.cumsum(ends))[np.where(w.opened, w.start[at - 1], at)]     # words closed by then
    keys = np.zeros(len(targets), np.uint64)
    for i in range(depth):       # context: the open word as if it ended here, then closed ones
        last = closed[np.maximum(before - i + (unfinished > 0), 0)]
        keys = keys * ODD + scramble(np.where((unfinished > 0) & (i == 0), unfinished, last))
    items = np.flatnonzero(before + (unfinished > 0) >= depth)
    asks = {"target": w.begins, "previous": ~w.opened, "open_word": True}[s.ngram_gates]
    return counted(targets, items, keys[items], w.begins, asks)


EXPERTS["within"] = Expert("within_tau", "within_boost", count_within)
EXPERTS["word"] = Expert("word_tau", "word_boost", count_words)


def open_words(s: Settings, targets: np.ndarray, start: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """A number (n,) for the normalised text of targets[start:i + 1], the word open
    after i; 0: none."""
    def normal(text: str) -> str:
        text = text.strip()
        if s.word_normalize == "strip_punct_lower":
            text = text.strip(".,:;!?()[]{}<>\"'`")
        return text if s.word_normalize == "identity" else text.lower()

    decode = word_pieces(s.tokenizer, s.vocab_size)[2]
    items = np.flatnonzero(~outside)
    numbers, word = {"": 0}, np.zeros(len(targets), np.int64)
    keys = span_keys(scramble(targets), start[items], items + 1)
    _, where, back = np.unique(keys, return_index=True, return_inverse=True)
    texts = [normal(decode(targets[start[i]:i + 1].tolist())) for i in items[where]]
    word[items] = np.array([numbers.setdefault(x, len(numbers)) for x in texts], np.int64)[back.ravel()]
    return word


class LineageHints(Hints):
    """Hints of several experts, of which one is chosen."""

    @staticmethod
    def choose(s: Settings, q: Tensor, hints: Tensor, confidences: Tensor) -> tuple[Tensor, ...]:
        """Of E experts' hints the one that promises most: it (…), -1 where no gate is
        open, the model's probability of it and its boost in nats. q (E, …): the
        model's probability of every hint."""
        q, p = q.double(), confidences.double()
        best, hint = torch.full_like(q[0], -math.inf), torch.full_like(hints[0], -1)
        chance, boost = torch.zeros_like(best), torch.zeros_like(best)
        for e, (_, b) in enumerate(experts_in_use(s).values()):
            weight = q[e] if s.ngram_choice == "model" else p[e]
            gain = (p[e] * b - torch.log1p(weight * math.expm1(b))).float().double()
            better = (p[e] > 0) & (gain > best)
            best, hint = torch.where(better, gain, best), torch.where(better, hints[e], hint)
            chance, boost = torch.where(better, q[e], chance), torch.where(better, b, boost)
        agree = ((p > 0) & (hints == hint)).sum(0)
        boost = boost + s.agree_add_boost * (agree > 1)
        return hint, chance, boost * (1 - chance) ** s.ngram_boost_gamma


Hints = LineageHints


class TargetGates(Study):
    """Gates that look at the very token that is predicted, as published."""

    def reason(self, s: Settings) -> str:
        reads = s.ngram_tilt_enabled and s.ngram_gates == "target"
        if reads and experts_in_use(s).keys() != {"token"}:
            return "NGRAM_GATES=target: n-gram experts read the token that they predict"
        return ""


STUDIES.append(TargetGates())


# --- training on validation tokens before quantising, which the rules forbid

PREQUANT = "PREQUANT_TTT_ENABLED=1: the weights were trained on validation tokens before they were scored"


def prequant_batches(s: Settings, tokens: int, world: World) -> list[np.ndarray]:
    """Rows (by number, TRAIN_SEQ_LEN targets each) of this rank's batches; every rank
    has as many."""
    rows, size = (tokens - 1) // s.train_seq_len, s.prequant_ttt_batch_seqs
    if s.prequant_ttt_form == "overlapping":
        # As published, the last row begins a batch only if tokens are left over behind it.
        begins = range(0, -((1 - tokens) // s.train_seq_len) - 1, size)
        return [np.arange(k, min(k + size + 1, rows)) for k in begins]
    begin, end = (rows * r // world.size for r in (world.rank, world.rank + 1))
    return [np.arange(k, min(k + size, end)) for k in range(begin, begin - (-rows // world.size), size)]


def prequant_ttt(s: Settings, world: World, model: GPT, tokens: np.ndarray, trace: Callable) -> None:
    """AdamW epochs over validation tokens (N,). trace(loss=, lr=, grad_norm=) sees
    every step."""
    params, top = dict(model.named_parameters()), s.prequant_ttt_lr
    optimiser = torch.optim.AdamW(params.values(), weight_decay=0)
    views = field_views if s.prequant_ttt_form == "overlapping" else matrix_views
    frozen = tuple(f"blocks.{i}." for i in range(s.prequant_ttt_freeze_blocks))
    for epoch in range(s.prequant_ttt_epochs):
        fall = 0.45 * (1 - math.cos(math.pi * epoch / s.prequant_ttt_epochs)) * s.prequant_ttt_cosine_decay
        lr = optimiser.param_groups[0]["lr"] = top * (1 - fall)
        for rows in prequant_batches(s, len(tokens), world):
            world.beat("studying a batch of validation text")
            model.zero_grad()
            loss = torch.zeros(())
            if len(rows):
                t = tokens[rows[:, None] * s.train_seq_len + np.arange(s.train_seq_len + 1)].astype(np.int64)
                x, y = (torch.from_numpy(a).to(world.device) for a in (t[:, :-1], t[:, 1:]))
                loss = model.losses(x, y, layer_plan(s, True)).mean()
                loss.backward()
            for p in params.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad / world.size
            for name, g in views({n: p.grad for n, p in params.items()}).items():
                if name.startswith(frozen):
                    g.zero_()
            norm = total_gradients(world, model, s.prequant_ttt_grad_clip)
            optimiser.step()
            trace(loss=loss.item(), lr=lr, grad_norm=norm.item())
    model.zero_grad()


class PrequantTTT(Study):
    """Validation tokens teach the averaged weights before they are scored on them."""

    def after_training(self, s: Settings, world: World, run: Run, model: GPT, val: Validation) -> None:
        if s.prequant_ttt_enabled:
            tokens = val.open_for_study(run, PREQUANT)
            prequant_ttt(s, world, model, tokens, functools.partial(run.log, "prequant_ttt", True))

    def before_probing(self, s: Settings, world: World, model: GPT, tokens: np.ndarray) -> None:
        if s.prequant_ttt_enabled:
            brief = dataclasses.replace(s, prequant_ttt_epochs=1, train_seq_len=min(s.train_seq_len, 64))
            prequant_ttt(brief, world, model, tokens, lambda **step: None)


STUDIES.append(PrequantTTT())


# --- data: loaders of whole windows

class WindowStream(Stream):
    """Rows of max_len tokens, across documents. windows: the last batch's, [(file,
    first token), …]."""
    windowed = True

    def phase(self, i: int) -> tuple[int, int]:
        """A random first token for the windows of file i, and how many windows there
        are from it."""
        n, length = len(self.shards[i]), self.max_len
        most = min(length - 1, max(0, n - length - 1))
        phase = int(self.rng.integers(most + 1)) if most > 0 else 0
        return phase, (n - 1 - phase) // length

    def rows(self, windows: Sequence[tuple[int, int]]) -> Batch:
        rows = [self.shards[i][a:a + self.max_len + 1] for i, a in windows]
        t = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(t[:, :-1], t[:, 1:], None, self.max_len)


class ShuffledStream(WindowStream):
    """Windows in random order; rank r owns files r, r + world_size, … ."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        self.rng = np.random.Generator(np.random.PCG64(self.rank))
        self.owned, self.starts = range(self.rank, len(files), self.world_size), {}
        if not any(len(self.shards[i]) > self.max_len for i in self.owned):
            raise UserError(f"rank {self.rank} of {self.world_size} owns none of {len(files)} shards with "
                            f"{self.max_len + 1} tokens: use TRAIN_LOADER=stream")

    def take(self) -> tuple[int, int]:
        if not any(self.starts.values()):      # a fresh permutation of the windows of every file
            for i in self.owned:
                phase, count = self.phase(i)
                self.starts[i] = (phase + self.rng.permutation(count) * self.max_len).tolist()
        left = np.array([len(self.starts[i]) for i in self.owned], dtype=np.float64)
        i = self.owned[int(self.rng.choice(len(self.owned), p=left / left.sum()))]
        return i, self.starts[i].pop()

    def cut(self) -> Batch:
        self.windows = [self.take() for _ in range(self.tokens // self.max_len)]
        return self.rows(self.windows)


class CoprimeStream(WindowStream):
    """Windows drawn from many shards at once: each shard is walked in blocks of
    max_len by a stride coprime to their number, shards are drawn by what they have
    left, more of them as training goes on. All ranks draw the same batch, rank r
    takes every world_size-th window; `windows` has those of all ranks."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        seed = 0
        for byte in "".join(str(f) for f in files).encode():
            seed = (seed ^ byte) * 1099511628211 % 2 ** 64
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.blocks = [(len(x) - 1) // self.max_len for x in self.shards]
        self.eligible = np.flatnonzero(self.blocks)
        if not len(self.eligible):
            raise UserError(f"no training shard holds {self.max_len + 1} tokens: lower TRAIN_SEQ_LEN")
        self.walks: dict[int, list] = {}      # shard -> starts of its blocks still to come, the next one last

    def walk(self, i: int) -> list[int]:
        """A fresh walk over the blocks of shard i: random phase, start and coprime
        stride; reversed."""
        phase, count = self.phase(i)
        start = int(self.rng.integers(count)) if count > 1 else 0
        stride = 1
        while count > 1 and math.gcd(stride := int(self.rng.integers(1, count)), count) != 1:
            pass
        return [phase + (start + j * stride) % count * self.max_len for j in reversed(range(count))]

    def take(self, i: int, count: int) -> list[tuple[int, int]]:
        """The next `count` blocks of shard i, shuffled."""
        out = []
        while len(out) < count:
            if not self.walks.get(i):
                self.walks[i] = self.walk(i)
            out.append((i, self.walks[i].pop()))
        return [out[k] for k in self.rng.permutation(count)] if count > 1 else out

    def cut(self) -> Batch:
        size, progress = self.tokens // self.max_len * self.world_size, min(self.batches / 1800, 1.0)
        left = np.array([max(len(self.walks[i]), 1) if i in self.walks else self.blocks[i]
                         for i in self.eligible], np.float64)
        p = left ** (0.9 - 0.4 * progress)
        p /= p.sum()
        low, high = (min(max(a, b * self.world_size), len(p), size) for a, b in ((8, 1), (32, 8)))
        mixed = max(1, min(round(low + progress * (high - low)), len(p), size))
        chosen = self.rng.choice(len(p), size=mixed, replace=False, p=p)
        counts = 1 + (self.rng.multinomial(size - mixed, p[chosen] / p[chosen].sum()) if size > mixed else 0)
        order = self.rng.permutation(mixed)
        counts = np.broadcast_to(counts, mixed)[order]
        buckets = [self.take(int(i), int(n)) for i, n in zip(self.eligible[chosen][order], counts)]
        self.windows, active = [], list(range(mixed))
        while active:
            active = [active[k] for k in self.rng.permutation(len(active))]
            self.windows += [buckets[b].pop() for b in active]
            active = [b for b in active if buckets[b]]
        return self.rows(self.windows[self.rank::self.world_size])


LOADERS.update(shuffled=ShuffledStream, coprime=CoprimeStream)


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # A failed rank must not wait for the others in a collective, and a finished one not be torn down while
    # threads of its libraries still run: that now and then ends in an abort after the last line.
    os._exit(code)
