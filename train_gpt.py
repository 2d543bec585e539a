"""train_gpt.py: one script that trains, quantises, packs and scores a depth-recurrent
GPT (Parameter Golf).

    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the competition run
    python train_gpt.py --help        # every setting: default, range, meaning
    python train_gpt.py --check       # all that can be checked without training

600 s make the artifact: training, averaging, rounding (GPTQ on a trellis, about 3.5
bits a weight) and packing. With this script it stays under 16,000,000 bytes; it is
read back and scored in bits per byte (BPB), first by sliding windows, then by
score-first test-time training (TTT). Environment variables are the only configuration.

Chapters    PART ONE, the system     1 Story  2 Settings  3 Model  4 Optimiser
                                     5 Training  6 Quantise  7 Score  8 Adapt
            PART TWO, machinery      9 World  10 Data  11 Kernels  12 Pack  13 Counts
                                     14 Probes  15 Rounding  17 Key cache, watchdog
                                     16, 18 Quantising, adapting as the records do
            PART THREE, lineage      what the older systems did differently: it only
                                     adds, and can be cut off

Shape letters: B rows, T tokens, D model width, H query heads, K key/value heads, Dh
head width, V vocabulary, L layers, S executed layer slots (a looped layer has
several), R x C a weight matrix (out, in), r rank of an adapter or repair, E experts,
P cached tokens, W tokens of a chunk with its context, n and N any number of things.
"""
from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import decimal
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
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
import tokenize
import traceback
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

if __name__ == "__main__":
    # Ctrl-C while torch is imported ends in silence, not in a trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if importlib.util.find_spec("torch") is None:
        print(f"error: {sys.executable} has no torch: . .venv/bin/activate, or pip install -r "
              "requirements.txt", file=sys.stderr)
        sys.exit(2)

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
MOST_READ = 1 << 26           # bytes of a file that is read as one
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


def one_line(value, most: int = 480) -> str:
    """A value as one printable line; of more than `most` characters the middle is left
    out."""
    text = str(value)
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


# ========================================
# PART ONE: the system. What a competitor reads and changes.
# ========================================


# ========================================
# 1  Story: the whole run, told straight down
# ========================================

# Where to look. A token enters train_loop from the stream and becomes a loss in GPT.losses. Curriculum
# decides the context, the loop and the rate of every step; layer_plan makes of the loop an order of layers.
# Calibration and all evaluations run with the loops on.
#
# The 600 s of training begin at the barrier in train_loop and end when compress has written the artifact. All
# in between is charged (steps, files, waiting, reports, studies) but for validations. The 600 s of evaluation
# begin at the clock in score_artifact, before it reads the artifact, and end with the last score; the score
# by plain windows, a diagnostic, and reports are not charged.
#
# A new parameter needs a setting, a row of PARAMETERS and its use: CONTRIBUTING.md adds one.
#
# What the story takes from later chapters:
#   World        this rank among the others: sums, barriers, agree (all hear rank 0), beat (a sign of life)
#   Run          the run's folder, its log and its summary
#   Clock        seconds of a budget; time inside exclude() is not charged
#   FiniteWatch, AverageKeeper, Checkpoints   what keeps a training from being lost
#   Prefetch     the stream: next(length) gives a Batch of documents cut to that many tokens
#   Batch        tokens x, targets y (B, T); layout() says who in a packed row may see whom (Layout)
#   Validation   the validation text: tokens, documents, bytes; sealed while a run trains
#   Scorer       scores by windows, as PhasedTTT does while it adapts: each target once, in a Ledger
#   KeyCache, Watchdog   what adaptation keeps of earlier tokens; what it gives up to end in time
#   Hints        guesses of n-gram counts that scores are tilted by; None: they are not
#   Study        a mode that breaks the rules and says so (NON-COMPLIANT)
#
# Seams: a small method that seems to decide nothing, or an argument that nothing reads, is there for
# subclasses further down, which take over the names: what runs as GPT is LineageGPT.

def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Entry; the story is `pipeline`. 0 when all went well, 1 when --check found something
    or the script failed, 2 on a user's mistake, 130 or 143 when interrupted."""
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
        findings = check_before_start(s, world, set_up(s, world))
        model, val = build_model(s, world), Validation(s)
        run = Run(s, world)      # only now is there a folder
        pipeline(s, world, run, model, val, findings)
        run.close()
        world.leave()
        return 0
    except (Exception, Interrupted) as error:
        return end_early(error, run, rank)


def pipeline(s: Settings, world: World, run: Run, model: GPT, val: Validation,
             findings: Sequence[Finding]) -> None:
    """train -> average -> quantise -> pack -> read back -> score: the whole story."""
    log_start(s, world, run)
    log_checks(s, run, findings)
    check_same_text(run, val)
    if not s.eval_only_quantized_path:
        make_artifact(s, world, run, model, val)
    if not (s.quantize_only or s.prequant_only):
        path = Path(s.eval_only_quantized_path or run.artifact)
        score_artifact(s, world, run, model, val, path)
    SIGNALS.wait()      # all is done: nothing is left to interrupt
    closing_block(run)
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
    world.from_main(check_disk, run.dir, bytes_of_results(s), True)

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
    given = state["batches"] if state else 0
    stream = Prefetch(open_train_stream(s, world, trainer.tokens), world.device, given)
    reports = Progress(s, world, run, trainer.times, pace.budget)
    last = max(step - 1, 0)      # a validation scores by the loops of the step before it
    looping = curriculum.loops(last, pace.progress(last))
    # graphs that were not warmed up take minutes in between
    beat = "step" if s.warmup_steps or not compiles(s, world.device) else "compiling-step"
    world.beat(f"{beat} {step}")
    world.barrier()
    clock = Clock(s.max_wallclock_seconds, state["seconds"] if state else 0.0)
    finite_watch = FiniteWatch()
    keeper = AverageKeeper(s, world, run, trainer, clock)
    checkpoints = Checkpoints(s, world, run, trainer, finite_watch, clock)
    while True:
        if s.val_loss_every and step % s.val_loss_every == 0:
            off_the_clock(world, clock, lambda: validate(step, looping))
        first_bad = finite_watch.first_bad()
        elapsed, stop, bad = world.agree_step(clock.elapsed(), SIGNALS.number, first_bad)
        pace.observe(step, elapsed)
        ended = pace.ended(step)
        if ended or stop or bad:
            break
        checkpoints.offer(step, elapsed, curriculum, stream)
        # the step: on how long a context, with or without loops, at which rate
        progress = pace.progress(step)
        length, looping, rate_share = curriculum.advance(step, progress)
        plan = layer_plan(s, looping)
        trainer.times.measure(progress)
        losses = [trainer.micro_step(stream.next(length), plan) for _ in range(trainer.accum)]
        world.beat(f"{beat} {step + 1}")
        norm = trainer.update(rate_share, muon_momentum(s, step))
        step += 1
        loss = sum(losses) / trainer.accum
        finite_watch.record(step, loss, norm)
        keeper.offer(step)
        world.beat(f"{beat} {step}")
        if pace.near_end():
            sync(world.device)            # the host must not run ahead of the GPU
        reports.report(step, clock, loss, norm, rate_share, plan)
    sync(world.device)
    seconds = clock.elapsed()
    stopped = "" if ended else f"stopped at step {step}"
    bad = reports.end(trainer, finite_watch, step)
    keeper.close(step, "" if bad else stopped)
    if bad:
        raise finite_watch.error(bad)
    if stopped:
        checkpoints.write(step, curriculum, stream)
    facts = weight_facts(s, world, step, seconds, stopped)
    log_train_end(s, run, facts, stream.epoch)
    return Trained(clock, stream, facts, stop)


def compress(s: Settings, world: World, run: Run, model: GPT, clock: Clock, next_batch: Callable) -> None:
    """Calibrate, quantise, pack and write the artifact, still on the training clock."""
    begin = clock.elapsed()
    world.beat("calibrating")
    curvature = calibrate(s, world, model, next_batch)
    sync(world.device)
    calibrated = clock.elapsed()
    weights = matrix_views({n: p.detach() for n, p in model.named_parameters()})
    measure = Measure.of(s, world, model, next_batch)
    world.beat("quantising")
    blob = quantise_to_fit(s, world, run, weights, curvature, clock if run.time_known else None, measure)
    if s.logit_calib_enabled:
        blob = calibrate_logits(s, world, run, blob)
    seconds, size = world.from_main(write_artifact, s, run, blob, clock)
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
        val.hints = Hints.for_windows(s, world, val) if alone else None
        score = scorer.windows(val, s.eval_seq_len)
    log_score(run, "quantized", score, scorer.ledger, clock)
    if s.sliding_window_enabled:
        val.hints = Hints.for_windows(s, world, val)
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
    if val.hints is None or Hints.orders_differ(s):
        val.hints = Hints.for_adapting(s, world, val)
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
    run.scored_before = {}
    run.save_summary()


# ========================================
# 2  Settings: one frozen table, read once from the environment
# ========================================

# Bounds of settings that have none of their own; of text: its characters.
MOST = {int: 10 ** 9, float: 1e6, str: 1000}
GPUS = 8      # of the competition's machine


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
    # --- data
    data_dir: str = knob("./data/", "folder that the next two default to", group="data")
    data_path: str = knob("", "folder with fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = knob("", "SentencePiece model of the shards")
    vocab_size: int = knob(8192, "tokens in the vocabulary", 2, 65536)
    caseops_enabled: bool = knob(True, "shards of the CaseOps tokenizer, with byte sidecar")
    data_check: str = choice(
        "quick full", "checks of the data; full: every byte and document")
    train_loader: str = choice("stream docpack", "every target once; or as published")
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
    key_offset: bool = knob(
        False, "the other channels of a key are those of the token before, in its document")
    qk_gain_init: float = knob(5.0, "initial gain of the normalised queries, per head", 0.01)
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
    quant_measured: bool = knob(
        True, "steps by KL measured on training text, kind by kind of matrix; errors passed on "
        "among rows where that wins (fisher)")
    matrix_bits: int = knob(6, "bits of the matrices (hand)", 2, 8)
    embed_bits: int = knob(7, "bits of the embedding (hand)", 2, 8)
    matrix_clip_sigmas: float = knob(
        12.85, "range of codes in standard deviations of a row (hand)", 0.1)
    attn_clip_sigmas: float = knob(13.0, "the same for attention matrices", 0.1)
    mlp_clip_sigmas: float = knob(11.5, "the same for MLP matrices", 0.1)
    embed_clip_sigmas: float = knob(14.0, "the same for the embedding", 0.1)
    awq_lite_enabled: bool = knob(False, "8-bit codes for the columns that matter most")
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
    ttt_suffix: int = knob(
        72, "newest cached tokens run again, with gradient, before a chunk", 0)
    ttt_doc_order: str = choice(
        "stream length", "adapt in the stream's order; or longest first, as the field")
    ttt_chunk_size: int = knob(48, "tokens scored between two adapter steps", 1)
    ttt_short_score_first_enabled: bool = knob(
        True, "other chunks at the start of a document; with order length: for short ones")
    ttt_short_score_first_steps: str = knob(
        "8000:24", "until:chunk, …: size of chunks up to that token of a document; order "
        "length: in groups of documents up to that length")
    ttt_batch_size: int = knob(64, "documents adapted side by side", 1, 65536)
    ttt_lora_rank: int = knob(80, "rank of the adapters", 1, 65536)
    ttt_lora_alpha: float = knob(144.0, "adapters are scaled by alpha / rank", 0)
    ttt_lora_lr: float = knob(
        8e-5, "learning rate of the adapters where TTT_STEP_SHARE=0; 0: they learn nothing", 0)
    ttt_step_share: float = knob(
        0.35, "share of its chunk's loss that a normalised step promises to take off, the head "
        "on top; 0: the rate is TTT_LORA_LR", 0, 0.5)
    ttt_base_share: float = knob(
        0.15, "share of the model without adapters in adapted scores; 0: none", 0, 0.5)
    ttt_q_lora: bool = knob(True, "adapt queries")
    ttt_k_lora: bool = knob(True, "adapt keys")
    ttt_v_lora: bool = knob(True, "adapt values")
    ttt_o_lora: bool = knob(True, "adapt the attention output (from the block input)")
    ttt_mlp_lora: bool = knob(True, "adapt the MLP")
    ttt_head_lora: bool = knob(True, "adapt the output head")
    ttt_optimizer: str = choice("normalised adam", "gradient over its running RMS; or AdamW")
    ttt_local_lr_mult: float = knob(1.0, "factor on TTT_LORA_LR", 0)
    ttt_beta1: float = knob(0.0, "AdamW's first moment", 0, 0.999999)
    ttt_beta2: float = knob(0.99, "how far back the gradients' RMS reaches", 0, 0.999999)
    ttt_weight_decay: float = knob(0.5, "weight decay of the adapters", 0)
    ttt_grad_steps: int = knob(1, "adapter steps per chunk", 1)
    ttt_train_min_doc_len: int = knob(
        0, "shorter documents only get scored; with order length alone", 0)
    ttt_train_max_doc_len: int = knob(
        0, "so do longer ones (order stream: tokens beyond); 0: none", 0)
    ttt_cache_lambda: float = knob(
        0.0, "weight in scores of what followed like hidden states before; 0: none", 0, 1)
    ttt_cache_theta: float = knob(36.0, "how fast a state's say falls with its distance", 0)
    ttt_warm_start_a: bool = knob(
        True, "with order length: keep A from document to document; B restarts at 0")
    phased_ttt_prefix_docs: int = knob(
        2500, "documents that, once scored, adapt the base weights", 0)
    phased_ttt_num_phases: int = knob(3, "in how many phases", 1)
    global_ttt_lr: float = knob(0.001, "SGD on the base weights: peak learning rate", 0)
    global_ttt_momentum: float = knob(0.9, "its momentum", 0, 0.999999)
    global_ttt_epochs: int = knob(1, "passes over the documents already scored", 1)
    global_ttt_chunk_tokens: int = knob(32768, "tokens learnt at one rate, which then falls", 2)
    global_ttt_batch_seqs: int = knob(32, "sequences of one batch", 1)
    global_ttt_grad_clip: float = knob(1.0, "largest gradient norm; 0: no clipping", 0)
    ngram_tilt_enabled: bool = knob(
        False, "tilt scores towards what followed the same context before")
    ngram_doc_order: str = choice(
        "scored stream", "documents are counted as scored; or in the stream's order")
    token_order: int = knob(16, "token expert: length of context with hint", 1, 1024)
    token_threshold: float = knob(0.8, "it speaks from this confidence on", 0)
    token_boost: float = knob(2.625, "nats added to its hint's logit", 0)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Read and check every setting; a name nothing reads stops the run with the
        nearest right one."""
        known = {f.name.upper(): f for f in fields(cls)}
        env = own_variables(env, known)
        values = {f.name: parse_setting(f, env[name]) for name, f in known.items() if name in env}
        s = cls(**values)
        s.check_consistency()
        return s

    def check_consistency(self) -> None:
        """Refuse settings that contradict each other; every chapter knows its own."""
        check_model(self)
        check_scoring(self)
        check_counts(self)
        check_run(self)
        check_training(self)
        check_quantise(self)
        check_code_form(self)

    def batch_shape(self, world_size: int) -> tuple[int, int]:
        """(micro-batches per step and rank, tokens of one micro-batch), checked
        against the ranks."""
        accum = self.grad_accum_steps or max(1, GPUS // world_size)
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
    def num_skips(self) -> int:
        plan = layer_plan(self, True)
        return min(len(plan.encoder), len(plan.decoder))

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return Path(self.data_path) if self.data_path else default_shards(self)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's model."""
        return Path(self.tokenizer_path) if self.tokenizer_path else default_tokenizer(self)

    @property
    def first_chunks(self) -> str:
        """Chunks of TTT that differ from TTT_CHUNK_SIZE, as length:chunk, …"""
        return self.ttt_short_score_first_steps if self.ttt_short_score_first_enabled else ""

    def as_env(self) -> dict:
        """Every setting under its environment name, JSON types."""
        return {f.name.upper(): getattr(self, f.name) for f in fields(self)}

    def to_be_stored(self, values: Mapping) -> dict:
        """Of settings and values those that a file names; others had their default. A seam."""
        return dict(values)

    def changed(self) -> dict:
        """The settings that differ from their defaults."""
        defaults = {f.name.upper(): f.default for f in fields(self)}
        return {name: value for name, value in self.as_env().items() if value != defaults[name]}

    def beyond_the_system(self) -> list[str]:
        """Names of settings that ask for more than parts one and two have: a seam."""
        return []


def context_stages(s: Settings) -> list[tuple[float, int]]:
    """Longest segment of training, by share of the budget."""
    return schedule(s.train_seq_schedule, s.train_seq_len)


# ========================================
# 3  Model: one forward for training, scoring and adaptation
# ========================================

class Parameter(NamedTuple):
    """A parameter, declared once: all that walks over a model's weights goes by it."""
    shape: str            # sizes, as settings name them: "2*num_layers model_dim"
    role: str = "small"   # matrix: Muon trains it; embed, small: AdamW; cap: nothing does
    start: Any = 0        # a number, broadcast; a setting's name; or what draws it
    names: str = ""       # in published checkpoints, {} is the layer, a bank has several; "": as here
    on: str = ""          # the setting that switches it on; "": always there
    stored: str = ""      # gate: as GATED_ATTN_QUANT_GATE says; "": by size

    @property
    def of_layer(self) -> bool:
        return self.role == "small" and self.shape.split()[:1] == ["num_layers"]


def draw_orthogonal(p: Tensor, s: Settings, generator: torch.Generator | None) -> None:
    """Every matrix of a bank (matrices, out, in)."""
    for matrix in p:
        nn.init.orthogonal_(matrix, generator=generator)


# Inputs are orthogonal and outputs zero: at the start no branch adds anything to the stream.
PARAMETERS = {
    "tok_emb": Parameter(
        "vocab_size model_dim", "embed", names="tok_emb.weight",
        start=lambda p, s, generator: p.normal_(0, s.tied_embed_init_std, generator=generator)),
    "qo_bank": Parameter(
        "2*num_layers model_dim model_dim", "matrix",
        lambda p, s, generator: draw_orthogonal(p[:s.num_layers], s, generator),
        "blocks.{}.attn.c_q.weight blocks.{}.attn.proj.weight"),
    "kv_bank": Parameter("2*num_layers kv_dim model_dim", "matrix", draw_orthogonal,
                         "blocks.{}.attn.c_k.weight blocks.{}.attn.c_v.weight"),
    "mlp_up_bank": Parameter("num_layers hidden_dim model_dim", "matrix", draw_orthogonal,
                             "blocks.{}.mlp.fc.weight"),
    "mlp_down_bank": Parameter("num_layers model_dim hidden_dim", "matrix",
                               names="blocks.{}.mlp.proj.weight"),
    "attn_scale": Parameter("num_layers model_dim", start=1, names="blocks.{}.attn_scale"),
    "mlp_scale": Parameter("num_layers model_dim", start=1, names="blocks.{}.mlp_scale"),
    # at first only the stream, not x0
    "resid_mix": Parameter("num_layers 2 model_dim", start=((1,), (0,)), names="blocks.{}.resid_mix"),
    "q_gain": Parameter("num_layers num_heads", start="qk_gain_init", names="blocks.{}.attn.q_gain"),
    "skip_weights": Parameter("num_skips model_dim", start=1),
    # by how much attention, and the MLP, write to each lane; by how much each is kept
    "parallel_post_lambdas": Parameter("num_layers 2 2", start=1),
    "parallel_resid_lambdas": Parameter("num_layers 2", start=1.1),
    "skip_gates": Parameter("num_skips model_dim"),
    "smear_gate": Parameter("1 gate_window", names="smear_gate.weight", on="smear_gate_enabled"),
    "smear_lambda": Parameter("1", on="smear_gate_enabled"),
    "softcap_pos": Parameter("", "cap", "logit_softcap", on="asym_logit_rescale"),
    "softcap_neg": Parameter("", "cap", "logit_softcap", on="asym_logit_rescale"),
    "attn_gate_w": Parameter("num_layers num_heads gate_window", on="sparse_attn_gate_enabled",
                             names="blocks.{}.attn.attn_gate_w", stored="gate"),
}


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


@dataclass
class Forward:
    """What the layers of one forward share."""
    layers: list[dict[str, Tensor]]  # GPT.layer_weights
    x0: Tensor                       # (B, T, D): the embeddings, which every layer may mix in
    rope: tuple[Tensor, Tensor]      # cos, sin (T, rotated channels / 2)
    layout: Layout | None            # documents of a packed row; None: rows are causal
    adapter: BoundAdapter | None     # low-rank deltas of TTT
    hook: Callable | None            # hook(kind, layer, x) sees activations
    cache: KeyCache | None           # keys and values of earlier tokens
    first: Tensor | None = None      # (B or 1, T) bool: tokens that nothing comes before

    def observe(self, kind: str, layer: int, x: Tensor) -> None:
        """Hand an activation to the forward hook, if there is one."""
        if self.hook is not None:
            self.hook(kind, layer, x)

    def adapted(self, y: Tensor, kind: str, slot: int, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """y with the adapter's delta for this slot, which reads x, if there is one;
        scale (channels of y): what y was multiplied by."""
        if self.adapter is None:
            return y
        return self.adapter.add(y, kind, slot, x, scale)


def soft_cap(z: Tensor, cap: float | Tensor, below: Tensor | None = None) -> Tensor:
    """cap · tanh(z / cap); below: the cap of negative z."""
    if below is not None:
        cap = torch.where(z > 0, cap, below)
    return cap * torch.tanh(z / cap)


def candidate_losses(loss: Callable, z: Tensor, candidates: Tensor) -> Tensor:
    """Losses (N, n) of N candidate tokens at each of n positions, by logits z (n, V).
    Only the first candidates, the targets, have a graph."""
    first, *others = candidates.unbind(0)
    scored = [loss(z, first)]
    for tokens in others:
        scored.append(loss(z.detach(), tokens))
    return torch.stack(scored)


class GPT(nn.Module):
    """The depth-recurrent GPT. Parameters are stacked over layers and kept in
    float32; `compute_dtype` is the activations'. Every forward takes a Plan, so
    recurrence is an argument, not a state."""

    def __init__(self, s: Settings, generator: torch.Generator | None = None):
        super().__init__()
        self.s = s
        self.compute_dtype = torch.float32
        self.calibration: tuple[Tensor, Tensor] | None = None      # of capped logits: scale (), bias (V,)
        shapes = self.shapes(s)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.of_layers = [name for name in shapes if PARAMETERS[name].of_layer]
        with one_thread():
            self.init_weights(generator)

    @classmethod
    def shapes(cls, s: Settings) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name; what is off has no parameter."""
        there = {name: p for name, p in PARAMETERS.items() if not p.on or getattr(s, p.on)}
        return {name: declared_shape(s, p.shape) for name, p in there.items()}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """Draw them as PARAMETERS says, in its order."""
        for name, p in self.named_parameters():
            begin_as(PARAMETERS[name].start, p, self.s, generator)

    # --- pieces

    def layer_weights(self, scaled: bool) -> list[dict[str, Tensor]]:
        """The weights of every layer in the activations' dtype: its parameters by name, and
        the matrices qkv, o, up, down. scaled: o and down hold attn_scale and mlp_scale, so
        that no scaled output is written. Unbound once in a forward: the gradient of a stack
        is then one stack, not a sum of zeros."""
        q, o = self.qo_bank.chunk(2)
        k, v = self.kv_bank.chunk(2)
        down = self.mlp_down_bank
        if scaled:
            o = self.attn_scale[:, :, None] * o
            down = self.mlp_scale[:, :, None] * down
        # one product of qkv reads the input once
        stacks = dict(qkv=torch.cat((q, k, v), dim=1), o=o, up=self.mlp_up_bank, down=down)
        for name in self.of_layers:
            stacks[name] = getattr(self, name)
        layers: list[dict] = [{} for _ in range(self.s.num_layers)]
        for name, stack in stacks.items():
            for weights, own in zip(layers, stack.to(self.compute_dtype).unbind(0)):
                weights[name] = own
        return layers

    def rope(self, length: int, device, start: int = 0, context: int = 0) -> tuple[Tensor, Tensor]:
        """cos, sin (length, rotated channels / 2) of positions from start on; context:
        the longest row."""
        dims = self.s.rope_dims or self.s.head_dim
        channel = torch.arange(0, dims, 2, dtype=torch.float32, device=device)
        inverse = 1.0 / (self.rope_base(max(length, context)) ** (channel / dims))
        position = torch.arange(start, start + length, dtype=torch.float32, device=device)
        angle = position[:, None] * inverse
        return angle.cos(), angle.sin()

    def rope_base(self, longest: int) -> float:
        """Base of the rotary angles; longest: of the rows, in tokens, a seam."""
        return self.s.rope_base

    def embed(self, ids: Tensor, layout: Layout | None, before: Tensor | None = None,
              hook: Callable | None = None) -> Tensor:
        """Normalised embeddings (B, T, D), mixed with those of the tokens before.
        before (B, 2): the tokens ahead of ids, where the rows go on from a cache; the
        nearest is mixed in."""
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
        return ~self.first_tokens(ids, layout)[:, 1:]

    def first_tokens(self, ids: Tensor, layout: Layout | None) -> Tensor:
        """(B or 1, T) bool: the token begins its document, or its segment of a packed row."""
        if layout is None:
            return ids == BOS
        starts = torch.zeros(ids.size(1) + 1, dtype=torch.bool, device=ids.device)
        return starts.index_fill(0, layout.cu_seqlens.long(), True)[None, :-1]

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

    def attend(self, forward: Forward, layer: int, slot: int, x: Tensor, add: bool = False) -> Tensor:
        """Attention branch of a layer on x (B, T, D), which it normalises; add: onto x."""
        s, weights, onto = self.s, forward.layers[layer], x if add else None
        q, k, v, logits, normed = self.project(forward, layer, slot, x)
        if s.key_offset:
            k = offset_keys(k, forward, slot)
        if forward.cache is None:
            y = attention(q, k, v, forward.layout)
        else:
            y = forward.cache.attend(slot, q, k, v)
        gate = self.head_gate(logits)
        if layer >= s.num_layers - s.xsa_last_n:
            y = remove_own_value(y, v, gate)
        elif gate is not None:
            y = y * gate[..., None]
        y = y.flatten(2)
        forward.observe("heads", layer, y)
        # the adapter of the output reads the block input, not the heads
        if forward.hook is None:
            out = product_onto(onto, y, weights["o"])
        else:      # the same in steps that can be seen
            plain = F.linear(y, weights["o"])
            forward.observe("attn_out", layer, plain)
            out = add_scaled(onto, weights["attn_scale"], plain)
        return out if normed is None else forward.adapted(out, "o", slot, normed, weights["attn_scale"])

    def project(self, forward: Forward, layer: int, slot: int, x: Tensor) -> tuple[Tensor, ...]:
        """What attention needs of x (B, T, D): queries (B, T, H, Dh), keys, values (B, T, K, Dh), logits
        (B, T, H) of the heads' gates or None; rms(x), None where only the kernel needs it. Norms,
        product, rotation and gain are in normed_heads."""
        def change(normed: Tensor, *parts: Tensor) -> list[Tensor]:
            parts = [forward.adapted(part, kind, slot, normed) for kind, part in zip("qkv", parts)]
            for kind, seen in zip(("attn_in", "q_out", "k_out", "v_out"), (normed, *parts)):
                forward.observe(kind, layer, seen)
            return parts

        untouched = forward.hook is None and forward.adapter is None
        return normed_heads(x, forward.layers[layer], forward.rope, self.depth_scale(layer),
                            None if untouched else change)

    def head_gate(self, logits: Tensor | None) -> Tensor | None:
        """Gate (B, T, H) of the heads, if there is one; 1/2 at the start."""
        return None if logits is None else torch.sigmoid(self.s.sparse_attn_gate_scale * logits)

    def feed_forward(self, forward: Forward, layer: int, slot: int, x: Tensor, add: bool = False) -> Tensor:
        """MLP branch of a layer on x (B, T, D), which it normalises; add: onto x."""
        weights, slope, scale = forward.layers[layer], self.s.negative_slope, self.depth_scale(layer)
        if forward.hook is None:
            rows = x.flatten(0, 1)
            out = leaky_square_mlp(rows, weights["up"], weights["down"], slope, scale, add).view(x.shape)
        else:      # the same, step by step
            normed = rms(x, scale)
            up = F.linear(normed, weights["up"])
            act = F.leaky_relu(up, slope).square()
            plain = F.linear(act, weights["down"])
            for kind, seen in (("mlp_in", normed), ("up_out", up), ("mlp_act", act), ("mlp_out", plain)):
                forward.observe(kind, layer, seen)
            out = add_scaled(x if add else None, weights["mlp_scale"], plain)
        if forward.adapter is None:
            return out
        return forward.adapted(out, "mlp", slot, rms(x, scale), weights["mlp_scale"])

    def block(self, forward: Forward, layer: int, slot: int, x: Tensor) -> Tensor:
        """A layer on the one residual stream x (B, T, D)."""
        weights = forward.layers[layer]
        x = blend((x, weights["resid_mix"][0]), (forward.x0, weights["resid_mix"][1]))
        x = self.attend(forward, layer, slot, x, add=True)
        return self.feed_forward(forward, layer, slot, x, add=True)

    def branches(self, forward: Forward, layer: int, slot: int, lane0: Tensor,
                 lane1: Tensor) -> tuple[Tensor, ...]:
        """Lane 0 mixed with x0, what attention makes of it, what the MLP of lane 1."""
        weights = forward.layers[layer]
        mixed = blend((lane0, weights["resid_mix"][0]), (forward.x0, weights["resid_mix"][1]))
        attended = self.attend(forward, layer, slot, mixed)
        fed = self.feed_forward(forward, layer, slot, lane1)
        return mixed, attended, fed

    def lanes(self, forward: Forward, layer: int, slot: int, lane0: Tensor,
              lane1: Tensor) -> tuple[Tensor, Tensor]:
        """Attention reads lane 0, the MLP lane 1; each writes to both."""
        _, attended, fed = self.branches(forward, layer, slot, lane0, lane1)
        weights = forward.layers[layer]
        return mix_lanes(lane0, lane1, attended, fed, weights["parallel_resid_lambdas"],
                         weights["parallel_post_lambdas"])

    def depth_scale(self, layer: int) -> float:
        """Factor on the input of both branches of a layer."""
        return 1 / math.sqrt(layer + 1)

    def merge_skip(self, j: int, x: Tensor, skip: Tensor) -> Tensor:
        """U-Net skip number j into the stream x; a gate of 1 keeps the stream."""
        gate = torch.sigmoid(self.skip_gates[j])
        return blend((x, gate), (skip, (1 - gate) * self.skip_weights[j]))

    # --- the forward

    def begin(self, ids: Tensor, layout: Layout | None, adapter: Adapter | None, hook: Callable | None,
              cache: KeyCache | None) -> Forward:
        """All that the layers of one forward share; its x0 is where they start from."""
        start = 0 if cache is None else cache.position
        window = 0 if cache is None else cache.window
        x = self.embed(ids, layout, cache.last if start else None, hook)
        rope = self.rope(ids.size(1), ids.device, start, window)
        bound = None if adapter is None else adapter.bind(x.dtype)
        weights = self.layer_weights(scaled=hook is None)
        first = self.first_tokens(ids, layout) if self.s.key_offset else None
        return Forward(weights, x, rope, layout, bound, hook, cache, first)

    def final_hidden(self, ids: Tensor, plan: Plan, layout: Layout | None = None,
                     adapter: Adapter | None = None, hook: Callable | None = None,
                     cache: KeyCache | None = None) -> Tensor:
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
        """The decoder on the encoder's output x, with its skips. Once a layer has split
        the stream into two lanes, one that knows no lanes (a loop may come back to it)
        is left out."""
        lanes = None
        for j, layer in enumerate(plan.decoder):
            slot = len(plan.encoder) + j
            skip = skips.pop() if skips and j < len(self.skip_weights) else None
            if self.is_parallel(layer):
                lanes = self.enter_lanes(j, x, lanes, skip)
                lanes = self.lanes(forward, layer, slot, *lanes)
            elif lanes is None:
                x = x if skip is None else self.merge_skip(j, x, skip)
                x = self.block(forward, layer, slot, x)
        return x if lanes is None else self.join(*lanes)

    def enter_lanes(self, j: int, x: Tensor, lanes: tuple[Tensor, Tensor] | None,
                    skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both lanes, at first the stream x, with skip number j in lane 0."""
        lane0, lane1 = lanes or (x, x)
        return lane0 if skip is None else self.merge_skip(j, lane0, skip), lane1

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
        caps = [self.s.logit_softcap]
        if self.s.asym_logit_rescale:
            caps = [self.softcap_pos.detach(), self.softcap_neg.detach()]
        z = soft_cap(z, *caps)
        if self.calibration is None:
            return z
        scale, bias = self.calibration
        return scale * z + bias

    def scores_plain_logits(self, adapter: Adapter | None, training: bool) -> bool:
        """Whether a loss has to go through `logits`; else one kernel caps and scores.
        adapter: a seam."""
        two_caps = self.s.asym_logit_rescale and not training
        return two_caps or self.calibration is not None

    def losses(self, ids: Tensor, targets: Tensor, plan: Plan, layout: Layout | None = None,
               adapter: Adapter | None = None, cache: KeyCache | None = None,
               training: bool = False) -> Tensor:
        """Cross-entropy in nats, float32, of the targets (B, T), or of N candidate tokens at
        each position (N, B, T), of which only the first have a graph.
        training: with one cap."""
        hidden = self.final_hidden(ids, plan, layout, adapter, cache=cache)
        cap = self.s.logit_softcap
        plain = self.scores_plain_logits(adapter, training)
        if training and not plain:
            head = self.head_weight().to(hidden.dtype)
            scored = head_losses(hidden.flatten(0, 1), head, targets.flatten(), cap)
            return scored.view(targets.shape)
        if plain:
            z = self.logits(hidden, adapter)
            loss = functools.partial(F.cross_entropy, reduction="none")
        else:
            z = self.raw_logits(hidden, adapter)
            loss = functools.partial(capped_ce, cap=cap)
        candidates = targets if targets.dim() > ids.dim() else targets[None]
        if cache is not None and cache.states:
            cache.remember(hidden, candidates[0])
        scored = candidate_losses(loss, z.flatten(0, 1), candidates.flatten(1))
        return scored.view(targets.shape)

# ========================================
# 4  Optimiser: Muon for the banks, AdamW for the rest
# ========================================


POLAR_EXPRESS = (   # (a, b, c) of X <- aX + (bA + cA^2)X with A = XX', one triple per iteration
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(g: Tensor, dtype: torch.dtype = torch.bfloat16,
                  coefficients: Sequence[tuple] = POLAR_EXPRESS) -> Tensor:
    """Matrices g (…, R, C), in `dtype`, with singular values near 1: most 0.86 … 1.14."""
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


def role_of(name: str) -> str:
    """What trains a parameter; UserError if it is not declared."""
    if name not in PARAMETERS:
        raise UserError(f"the parameter {name} is not declared: add a row to PARAMETERS")
    return PARAMETERS[name].role


class Optimiser:
    """Owns all gradient traffic of training. Each rank orthogonalises its part of
    every bank: reduce-scatter of all banks -> norm and clip of the averaged gradient
    -> direction of the own matrices, gathered while the next bank is worked on ->
    every rank applies the same update. Small gradients travel as one tensor."""

    def __init__(self, s: Settings, world: World, params: Mapping[str, nn.Parameter], dtype: torch.dtype):
        self.s, self.world = s, world
        by_role: dict[str, list] = {parameter.role: [] for parameter in PARAMETERS.values()}
        for name, p in params.items():
            by_role[role_of(name)].append(p)
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
            each = -(-len(p) // world.size)
            self.momentum.append(torch.zeros(each, *p.shape[1:], dtype=dtype, device=p.device))

    def adam_rates(self) -> dict[str, tuple[float, float]]:
        """(peak rate, weight decay) by role; the logit caps are not trained, as published."""
        s = self.s
        return {"embed": (s.tied_embed_lr, s.embed_wd), "small": (s.scalar_lr, s.adam_wd)}

    @torch.no_grad()
    def step(self, rate_share: float, momentum: float) -> Tensor:
        """Reduce, clip, update at a share of the peak rates, clear the gradients; the
        norm before clipping."""
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
            group["lr"] = group["peak"] * rate_share
        self.adam.step()
        for bank, arrived in enumerate(updates):
            self.apply(bank, arrived()[:len(self.banks[bank])], self.s.matrix_lr * rate_share)
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


# ========================================
# 5  Training: schedule, warm-up and rewind, average
# ========================================

def stage_at(stages: list[tuple[float, float]], progress: float):
    """The value of the first stage that has not ended."""
    return next(value for end, value in stages if min(progress, 1.0) <= end)


def warmdown_share(s: Settings, progress: float) -> float:
    """Share of the peak rate: flat, then linear over WARMDOWN_FRAC, at least MIN_LR."""
    if s.warmdown_frac <= 0 or progress < 1 - s.warmdown_frac:
        return 1.0
    return max((1 - progress) / s.warmdown_frac, s.min_lr)


def muon_momentum(s: Settings, step: int) -> float:
    """Momentum at a step: linear warm-up over MUON_MOMENTUM_WARMUP_STEPS."""
    if step >= s.muon_momentum_warmup_steps:
        return s.muon_momentum
    done = step / s.muon_momentum_warmup_steps
    return (1 - done) * s.muon_momentum_warmup_start + done * s.muon_momentum


class Pace:
    """How far training is, and whether another step fits in: by the budget less its
    reserve, or without one by ITERATIONS."""

    FORGET = 0.9      # a step's seconds fall no faster: after a quick one a slow one may come
    NEAR_END = 10     # steps

    def __init__(self, s: Settings, reserve: float):
        self.iterations = s.iterations
        self.budget = s.max_wallclock_seconds - reserve if s.max_wallclock_seconds else 0.0
        self.elapsed = 0.0
        self.step_seconds = 0.0

    def observe(self, step: int, elapsed: float) -> None:
        """Seconds of training before a step, the same on all ranks."""
        if step:
            self.step_seconds = max(elapsed - self.elapsed, self.FORGET * self.step_seconds)
        self.elapsed = elapsed

    def ended(self, step: int) -> bool:
        """Whether this step would be one too many."""
        if self.budget and self.elapsed + self.step_seconds > self.budget:
            return True
        return step >= self.iterations

    def near_end(self) -> bool:
        """Whether fewer than NEAR_END steps are left."""
        return 0 < self.budget < self.elapsed + self.NEAR_END * self.step_seconds

    def progress(self, step: int) -> float:
        """Share of training that is done, 0 to 1."""
        if self.budget:
            return min(self.elapsed / self.budget, 1.0)
        return step / max(self.iterations, 1)


class Curriculum:
    """What changes while training goes on: longest segment, loop, learning rate."""

    def __init__(self, s: Settings):
        self.s, self.stages = s, context_stages(s)
        self.length = 0
        self.changed: int | None = None        # step at which the length changed

    def advance(self, step: int, progress: float) -> tuple[int, bool, float]:
        """(longest segment, whether loops run, share of the peak rate) of this step; it
        remembers when the length changed."""
        length = stage_at(self.stages, progress)
        if length != self.length:
            self.changed = step or None
            self.length = length
        rate_share = self.rate_share(progress)
        ramp = self.s.seq_change_warmup_steps
        if self.changed is not None and ramp:
            rate_share *= min((step - self.changed + 1) / ramp, 1.0)
        return length, self.loops(step, progress), rate_share

    def rate_share(self, progress: float) -> float:
        """Share of the peak learning rate at this share of training."""
        return warmdown_share(self.s, progress)

    def loops(self, step: int, progress: float) -> bool:
        """Whether the looped layers run more than once then. step: a seam."""
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
        self.losses = compiled(s, world.device, model.losses, fullgraph=True, dynamic=False)
        self.times = StepTimes(world)
        self.rewind()

    def rewind(self) -> None:
        """Forget optimiser state and average: start from the model's present weights."""
        dtype = pick_dtype(self.s.muon_dtype, self.world.device, self.model.compute_dtype)
        self.optimiser = Optimiser(self.s, self.world, dict(self.model.named_parameters()), dtype)
        self.ema = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def micro_step(self, batch: Batch, plan: Plan) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, nats per token."""
        self.times.charge("data")
        if batch.cu_seqlens is not None and compiles(self.s, self.world.device):
            torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        layout = batch.layout(batch.cut or self.s.train_seq_len)
        loss = self.losses(batch.x, batch.y, plan, layout, training=True).mean()
        self.times.charge("forward")
        (loss / self.accum).backward()
        self.times.charge("backward")
        return loss.detach()

    def update(self, rate_share: float, momentum: float) -> Tensor:
        """Step at a share of the peak rate, then average; the norm before clipping."""
        norm = self.optimiser.step(rate_share, momentum)
        self.times.charge("optimiser")
        weights = [p.detach() for p in self.model.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.s.ema_decay)
        self.times.charge("average")
        return norm

    def warm_up(self) -> float:
        """Compile and run every graph on random tokens, undo it; the seconds it took."""
        s, clock = self.s, Clock()
        generator = torch.Generator().manual_seed(s.seed + self.world.rank)
        with weights_kept(self.model), self.world.compiling():
            for length, looping in self.world.each("warm-up of graph", Curriculum(s).graphs()):
                self.warm_graph(length, layer_plan(s, looping), generator)
        self.rewind()
        sync(self.world.device)
        return clock.elapsed()

    def warm_graph(self, length: int, plan: Plan, generator: torch.Generator) -> None:
        """WARMUP_STEPS steps on random tokens, cut at this length."""
        for step in range(self.s.warmup_steps):
            size = 128 if step % 2 else 1024      # attention has other kernels for many documents
            for _ in range(self.accum):
                self.micro_step(self.random_batch(generator, length, size), plan)
            self.update(1.0, self.s.muon_momentum)

    def random_batch(self, generator: torch.Generator, length: int = 0, size: int = 1024) -> Batch:
        """Random documents in the loader's shape, cut at `length` (0: TRAIN_SEQ_LEN)."""
        s = self.s
        tokens = torch.randint(2, s.vocab_size, (self.tokens + 1,), generator=generator).numpy()
        tokens[::size] = BOS
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

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what tensors() gave; UserError when it is of another model."""
        restore_tensors(self, state)


class Trained(NamedTuple):
    """What training leaves behind beside the Trainer's average."""
    clock: Clock
    stream: Prefetch
    facts: dict            # see weight_facts
    signal: int            # the number of a signal that asked for the end of the run; 0: none did


# ========================================
# 6  Quantise: Hessians, steps by curvature, what is stored
# ========================================

# --- calibration: what training data says about the matrices

class Curvature(NamedTuple):
    """What calibration learns: an error E of a matrix costs about 1/2 sum_r g_r E_r H
    E_r'."""
    # H (C, C): x'x over all visits and tokens of a micro-batch
    hessians: Mapping[str, Tensor]
    # g (R): mean (dL/dy)^2; absent: all alike
    fisher: Mapping[str, Tensor] = {}
    # G (R, R): mean dL/dy' dL/dy, where errors are passed on among rows
    outputs: Mapping[str, Tensor] = {}


class HessianHook:
    """A forward hook: sums x'x of the matrices' inputs and (dL/dy)^2 of outputs."""

    INPUTS = {"attn_in": "attn.c_q", "heads": "attn.proj",
              "mlp_in": "mlp.fc", "mlp_act": "mlp.proj"}
    OUTPUTS = {"q_out": "attn.c_q", "k_out": "attn.c_k", "v_out": "attn.c_v",
               "attn_out": "attn.proj", "up_out": "mlp.fc", "mlp_out": "mlp.proj"}

    def __init__(self, s: Settings):
        self.head = GPT.head_name(s)
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] | None = {} if Measure.wanted(s) else None
        self.outputs: list[tuple[str, Tensor]] = []
        self.batches = self.tokens = 0

    def __call__(self, kind: str, layer: int, x: Tensor) -> None:
        """x (…, C): what a layer has of this kind, on one visit."""
        if kind in self.INPUTS or kind == "head_in":
            name = self.head
            if kind != "head_in":
                name = f"blocks.{layer}.{self.INPUTS[kind]}.weight"
            add_product(self.sums, name, x.detach().flatten(0, -2).float())
        if x.requires_grad and kind in self.OUTPUTS:
            self.outputs.append((f"blocks.{layer}.{self.OUTPUTS[kind]}.weight", x))
        elif x.requires_grad and kind == "embedding":
            self.outputs.append((kind, x))

    @torch.no_grad()
    def add_squares(self, model: GPT, ids: Tensor, hidden: Tensor,
                    generator: torch.Generator) -> None:
        """One backward pass from labels drawn from the model itself (Fisher's, not
        the data's, gradients); gradients of weights are never formed."""
        d_logits, expected = drawn_gradient(model, hidden, generator)
        head = model.head_weight().to(hidden.dtype)
        d_hidden = (d_logits.to(hidden.dtype) @ head).view_as(hidden)
        squares = {self.head: expected}
        names, outputs = zip(*self.outputs)
        for name, dy in zip(names, torch.autograd.grad(hidden, outputs, d_hidden)):
            dy = dy.flatten(0, 1).float()
            square = dy.square()
            if name == "embedding":      # of rows as looked up
                rows = square.new_zeros(len(model.tok_emb))
                square = rows.index_add_(0, ids.flatten(), square.mean(1))
            else:
                square = square.sum(0) / names.count(name)
                if self.products is not None and dy.size(1) % ROW_TURNS == 0:
                    add_product(self.products, name, dy / names.count(name) ** 0.5)
            squares[name] = squares.get(name, 0) + square
        for name, square in squares.items():
            self.squares[name] = self.squares.get(name, 0) + square
        self.outputs.clear()
        self.tokens += ids.numel()

    def finish(self, world: World | None = None) -> Curvature:
        """Mean over all ranks' batches; c_k and c_v share c_q's Hessian."""
        world = world or World()
        counts = torch.tensor([self.batches, self.tokens], dtype=torch.float64)
        batches, tokens = world.total(counts.to(world.device)).tolist()
        hessians, fisher = {}, {}
        for name, h in self.sums.items():
            hessians[name] = world.total(h).div_(batches)
        for name, squares in self.squares.items():
            fisher[name] = world.total(squares).div_(tokens)
        outputs = {}
        for name, product in (self.products or {}).items():
            outputs[name] = world.total(product).div_(tokens)
        if not fisher:
            return Curvature(hessians)
        # of a micro-batch, like H
        looked_up = fisher.pop("embedding") * (tokens / batches)
        if self.head == "tok_emb.weight":      # tied: a product's weight, too
            h, multiplied = hessians[self.head], fisher[self.head]
            hessians[self.head], looked_up = tied_curvature(h, multiplied, looked_up)
        fisher["tok_emb.weight"] = looked_up
        return Curvature(hessians, fisher, outputs)


def drawn_gradient(model: GPT, hidden: Tensor,
                   generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """dL/dlogits (N, V) for drawn labels, and the sum of expected squares (V)."""
    z = model.raw_logits(hidden).float().flatten(0, 1)
    cap = model.s.logit_softcap
    if model.s.asym_logit_rescale:
        cap = torch.where(z > 0, model.softcap_pos, model.softcap_neg)
    squash = (z / cap).tanh_()
    p = (cap * squash).softmax(-1)
    slope = 1 - squash.square_()
    expected = (p * (1 - p) * slope.square()).sum(0)
    # a number per position: alike in pieces and whole
    drawn = torch.rand(len(p), 1, generator=generator, device=p.device)
    label = torch.searchsorted(p.cumsum(1), drawn).clamp_max_(p.size(1) - 1)
    p.scatter_add_(1, label, -torch.ones_like(label, dtype=p.dtype))
    return p.mul_(slope), expected


CALIBRATION_TOKENS = 16384    # in a pass with a graph: they hold about 11 GB


def calibrate(s: Settings, world: World, model: GPT,
              next_batch: Callable[[], Batch]) -> Curvature:
    """Over GPTQ_CALIBRATION_BATCHES training micro-batches of all ranks, loops on."""
    hook, plan = HessianHook(s), layer_plan(s, True)
    fisher = s.quant_allocation == "fisher"
    generator = torch.Generator(world.device).manual_seed(s.seed + world.rank)
    for _ in world.each("calibrating on batch", range(-(-s.gptq_calibration_batches // world.size))):
        for part in pieces(next_batch().to(world.device), CALIBRATION_TOKENS):
            with torch.set_grad_enabled(fisher):
                layout = part.layout(s.train_seq_len)
                hidden = model.final_hidden(part.x, plan, layout, hook=hook)
            if fisher:
                hook.add_squares(model, part.x, hidden, generator)
        hook.batches += 1
    return hook.finish(world)


# --- steps: the distance of two codes

# weight = (code + half) * base_step * 2^(row / 8) * 2^(column / 8). Stored: an integer code per weight, an
# int8 exponent per row and per column, one base_step per file. half is 0 or 1/2: the state of the trellis
# says which, and follows from the codes before ("gptq (trellis)", the default; chapter 15).
OCTAVE = 8                # stored int8 steps are eighths of an octave
HALF_LARGEST = 65504.0    # float16's


def octaves(eighths: Tensor) -> Tensor:
    """Factors of steps, 2^(e / 8), float32, of exponents e int8."""
    return torch.exp2(eighths.double() / OCTAVE).float()


def to_eighths(log2: Tensor) -> Tensor:
    """Exponents int8, eighths of an octave, of log2 factors."""
    return (OCTAVE * log2).round().clamp(-127, 127).to(torch.int8)


def to_half(x: Tensor) -> Tensor:
    """float16; beyond its range its largest number: no artifact holds infinities."""
    return x.float().clamp(-HALF_LARGEST, HALF_LARGEST).half()


def quantise_rows(w: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """w (R, C) -> int8 codes, the largest for a row's largest, and fp16 steps (R)."""
    top = 2 ** (bits - 1) - 1
    scale = to_half(w.float().abs().amax(dim=1) / top)
    return divide_round(w, scale[:, None], -top, top), scale


def divide_round(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """round(w / scale) to int8 in [low, high], halves to even; 0 where scale is 0."""
    scale = scale.float()
    ratio = torch.where(scale > 0, w.float() / scale, 0.0)
    return ratio.round().clamp(low, high).to(torch.int8)


# --- what is stored of a weight: quantiser, packer, reader and size forecast go by this table

CODE_STREAM = "codes"     # of the artifact: int8 or int16, entropy-coded
HALF_STREAM = "half"      # float16
BYTE_STREAM = "bytes"     # int8


@dataclass(frozen=True)
class Storage:
    """What is stored of a weight, or beside it. tensors: of each the end of its name,
    stream, shape (see stored_shape); restore(weight so far, base step, *tensors) is
    the float32 weight."""
    tensors: tuple[tuple[str, str, str], ...]
    restore: Callable[..., Tensor]

    def keys(self, name: str) -> list[str]:
        """Names of a weight's tensors; columns' steps belong to its input."""
        ends = [end for end, _, _ in self.tensors]
        return [(input_of(name) if end == ".col" else name) + end for end in ends]


@dataclass
class Quantised:
    """A model as it is stored."""
    tensors: dict[str, Tensor]
    forms: dict[str, str]       # each weight's, of STORAGE, or as `gptq (int6)+lqer`
    base_step: float = 1.0      # stored int8 steps are relative to it

    def add(self, name: str, form: str, tensors: Sequence[Tensor]) -> None:
        """Store a weight, or something beside it."""
        for key, x in zip(STORAGE[form].keys(name), tensors):
            self.tensors[key] = x.cpu()
        before = self.forms.get(name)
        self.forms[name] = f"{before}+{form}" if before else form


def dequantise(q: Quantised) -> dict[str, Tensor]:
    """The float32 weights that a quantised model stands for, by name."""
    weights = {}
    for name, forms in q.forms.items():
        w = None
        for form in forms.split("+"):
            tensors = [q.tensors[key] for key in STORAGE[form].keys(name)]
            w = STORAGE[form].restore(w, q.base_step, *tensors)
        weights[name] = w
    return weights


def by_rows(codes: Tensor, steps: Tensor) -> Tensor:
    """Weights (R, C) of codes under fp16 steps (R)."""
    return codes * steps.float()[:, None]


def by_curvature(base_step: float, codes: Tensor, rows: Tensor,
                 columns: Tensor) -> Tensor:
    """Weights (R, C) of codes under steps of rows (R) and columns (C) in octaves."""
    return codes * ((base_step * octaves(rows))[:, None] * octaves(columns))


def on_trellis(codes: Tensor) -> Tensor:
    """Codes with the half steps that the trellis adds."""
    return codes + 0.5 * torch.from_numpy(half_steps(codes.numpy()))


# form: what is stored, and how the weight w comes back of it
CODES = (".q", CODE_STREAM, "RC")
CURVATURE = (CODES, (".row", BYTE_STREAM, "R"), (".col", BYTE_STREAM, "C"))
STORAGE = {
    "passthrough (float16)": Storage(
        (("", HALF_STREAM, "all"),),
        lambda w, base, x: x.float()),
    "gate_int8_row": Storage(
        ((".gq", BYTE_STREAM, "RC"), (".gs", HALF_STREAM, "R")),
        lambda w, base, codes, steps: by_rows(codes, steps)),
    "gptq (fisher)": Storage(
        CURVATURE,
        lambda w, base, codes, *steps: by_curvature(base, codes, *steps)),
    "gptq (trellis)": Storage(
        CURVATURE,
        lambda w, base, codes, *steps: by_curvature(base, on_trellis(codes), *steps)),
}


class Precision(NamedTuple):
    """A weight's form; for steps by hand, bits and range in deviations of a row."""
    form: str
    bits: int = 16
    clip_sigmas: float = 0.0

    @property
    def coded(self) -> bool:
        """Whether it is rounded to entropy-coded codes."""
        return self.form.startswith("gptq")


SMALL_TENSOR = 65536                 # of no more elements: stored as float16
GATE_SIZES = range(32, 8193)         # elements of gates that GATED_ATTN_QUANT_GATE means


def precision_of(s: Settings, name: str, w: Tensor) -> Precision:
    """How a weight is stored. One without a Hessian is rounded code by code."""
    gate = parameter_of(name).stored == "gate" and w.dim() == 2
    if gate and w.numel() in GATE_SIZES and s.gated_attn_quant_gate:
        return Precision("gate_int8_row")
    if w.numel() <= SMALL_TENSOR:
        return Precision("passthrough (float16)")
    if s.quant_allocation == "hand":
        return precision_by_hand(s, name)
    return Precision("gptq (trellis)" if s.quant_trellis else "gptq (fisher)")


def input_of(name: str) -> str:
    """The first matrix of this input: they share a Hessian and columns' steps."""
    return name.replace("attn.c_k", "attn.c_q").replace("attn.c_v", "attn.c_q")


# --- the whole model

FISHER_FLOOR = 0.03    # a row's smallest sensitivity, by its matrix's mean
NO_FISHER = 1e-30      # in place of a sensitivity of 0
NO_WEIGHT = 1e-20      # in place of 0: a row's mean square, its largest weight in steps
BATCH_ROWS = 8192      # rows of equal matrices that are rounded together
TOP_CODE = 32766       # int16; trellis codes come in pairs
LARGEST_CODE = 0.9 * TOP_CODE        # of a row's largest weight: feedback may add to it


def names_by(kind: Callable, names: Sequence[str] | Mapping) -> dict[Any, list[str]]:
    """{kind: its names}, both in the order of the names."""
    groups = {}
    for name in names:
        groups.setdefault(kind(name), []).append(name)
    return groups


class Quantiser:
    """A model's weights, ready to be quantised at any fineness. Ranks share the
    matrices, those of one Hessian together; equal shapes are one batch."""

    @torch.no_grad()
    def __init__(self, s: Settings, weights: Mapping[str, Tensor],
                 curvature: Curvature, world: World | None = None):
        self.s, self.weights, self.world = s, weights, world or World()
        self.precision = {n: precision_of(s, n, w) for n, w in weights.items()}
        self.names = [n for n, p in self.precision.items() if p.coded]
        self.trellis = any(p.form == "gptq (trellis)" for p in self.precision.values())
        # what calibration left that is not used as it is: matrix -> what is done instead
        self.unusual: dict[str, str] = {}
        self.fisher = self.finite(
            curvature.fisher,
            "sensitivities that are not finite: as fine as the others on average")
        self.hessians = self.finite(
            curvature.hessians, "a Hessian that is not finite: the identity instead")
        self.own = share_matrices(weights, self.names, self.world)
        # factors: by input order, u and dead of round_in_order
        self.factors, self.ratios, damped = factor_hessians(
            weights, self.hessians, self.own, falling=not self.trellis)
        self.unusual.update(damped)
        for part in self.world.gather(self.unusual):
            self.unusual.update(part)
        self.plan()

    def plan(self) -> None:
        """Allocate all steps."""
        self.steps = self.allocate(self.fisher, self.ratios) if self.names else {}
        self.deviations = code_deviations(self)
        self.finest = finest_step(self.deviations)

    def finite(self, tensors: Mapping[str, Tensor],
               instead: str) -> dict[str, Tensor]:
        """Those that are; of the others it is noted what is done instead."""
        out = {name: x for name, x in tensors.items() if x.isfinite().all()}
        self.unusual.update((name, instead) for name in tensors if name not in out)
        return out

    def allocate(self, fisher: Mapping[str, Tensor],
                 ratios: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Exponents `.row`, `.col` that make step^2 g_row d_col equal for all weights; g: a
        row's Fisher, d: the variance of a column's input given those rounded later,
        1 / ratio^2."""
        rows, columns, level = {}, {}, {}      # log2, of this rank's matrices
        for name in self.own:
            key = input_of(name)
            if key not in columns:
                ratio = ratios[key].double().log2()
                level[key] = ratio.mean()
                columns[key] = (ratio - level[key]).cpu()
            if name in fisher:
                g = fisher[name].double()
                g = g.clamp_min(max(FISHER_FLOOR * g.mean().item(), NO_FISHER))
                rows[name] = (level[key] - g.log2() / 2).cpu()
        for other_rows, other_columns in self.world.gather((rows, columns)):
            rows.update(other_rows)
            columns.update(other_columns)
        sizes = {}      # rms of rows
        for name in self.names:
            power = self.weights[name].double().square().mean(1)
            sizes[name] = power.clamp_min(NO_WEIGHT).log2().cpu() / 2
        offsets = [(rows[n] - sizes[n]).mean() for n in rows]
        for name in sizes.keys() - rows.keys():      # as fine as the others on average
            rows[name] = sizes[name] + sum(offsets) / max(len(offsets), 1)
        middle = torch.cat([rows[n] for n in self.names]).mean()
        steps = {n + ".row": rows[n] - middle for n in self.names}
        steps.update((key + ".col", x) for key, x in columns.items())
        return {key: to_eighths(x) for key, x in steps.items()}

    def columns_of(self, name: str) -> Tensor:
        """Step of every column (C) against the others."""
        steps = self.steps[input_of(name) + ".col"]
        return octaves(steps).to(self.weights[name].device)

    def planned_rows(self, name: str) -> Tensor:
        """Step of every row (R) at base step 1, as allocated."""
        return octaves(self.steps[name + ".row"])

    def rows_of(self, name: str, base_step: float) -> Tensor:
        """Stored steps of rows (R): the allocated ones, or larger, such that no code is
        over the top."""
        w = self.weights[name].float()
        largest = (w / self.columns_of(name)).abs().amax(1)
        least = (largest / (LARGEST_CODE * base_step)).clamp_min(NO_WEIGHT).log2()
        least = to_eighths((OCTAVE * least).ceil() / OCTAVE)
        return torch.maximum(self.steps[name + ".row"].to(w.device), least)

    @torch.no_grad()
    def __call__(self, base_step: float = 1.0) -> Quantised:
        """The whole model on every rank, all steps times `base_step`."""
        q = Quantised({}, {}, base_step if self.names else 1.0)
        rounded = {}
        for part in self.world.gather(self.round_own(base_step)):
            rounded.update(part)
        for name, w in self.weights.items():
            form = self.precision[name].form
            if form == "gate_int8_row":
                tensors = quantise_rows(w)
            elif name in rounded:
                tensors = *rounded[name], *self.stored_columns(name)
            else:
                tensors = [to_half(w)]
            q.add(name, form, tensors)
        return q

    def stored_columns(self, name: str) -> list[Tensor]:
        """Steps of columns, as they are stored beside a matrix's codes and rows' steps."""
        return [self.steps[input_of(name) + ".col"]]

    def round_own(self, base_step: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and rows' steps of this rank's matrices, on the CPU."""
        rounded, batches = {}, []
        for (shape, *_), names in names_by(self.batch_of, self.own).items():
            count = max(1, BATCH_ROWS // shape[0])
            batches += [names[begin:begin + count] for begin in range(0, len(names), count)]
        for batch in self.world.each("quantising batch", batches):
            codes, rows = self.round(batch, base_step)
            for name, part, steps in zip(batch, codes.cpu(), rows.cpu()):
                # without the memory of the whole stack
                rounded[name] = narrow(part).clone(), steps.clone()
        return rounded

    def batch_of(self, name: str) -> tuple:
        """Shape, and what else is alike in matrices that are rounded together."""
        return self.weights[name].shape, self.precision[name].bits

    def stacked(self, names: list[str], base_step: float) -> tuple[Tensor, ...]:
        """Of equally shaped matrices w (n, R, C) and rows' steps (n, R); order, u and
        dead of their Hessians."""
        w = torch.stack([self.weights[n].float() for n in names])
        rows = torch.stack([self.rows_of(n, base_step) for n in names])
        factors = zip(*(self.factors[input_of(n)] for n in names))
        return w, rows, *(torch.stack(part) for part in factors)

    def round(self, names: list[str], base_step: float) -> tuple[Tensor, Tensor]:
        """Codes (n, R, C) and rows' steps (n, R) of equally shaped matrices."""
        w, rows, order, u, dead = self.stacked(names, base_step)
        columns = torch.stack([self.columns_of(n) for n in names])
        w = w / columns[:, None]
        u = u / columns.gather(1, order)[:, None]
        steps = octaves(rows) * base_step
        return self.codes_of(names, w, steps, order, u, dead), rows

    def codes_of(self, names: list[str], w: Tensor, steps: Tensor, *factors: Tensor) -> Tensor:
        """round_in_order's codes of what the matrices are in steps of columns."""
        return round_in_order(w, steps, *factors, TOP_CODE, self.trellis)


# ========================================
# 7  Score: the ledger and sliding windows
# ========================================

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
    """Validation tokens whose targets are all on the books, so training may use
    them."""
    tokens: np.ndarray


EARLY = "an adapter step on a target that is not scored yet would break the rules"


class LedgerError(RuntimeError):
    """What the books of an evaluation refuse."""


class Ledger:
    """The books of one evaluation: every target's loss, once. A breach of the rules
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
        ones = torch.ones_like(positions, dtype=torch.int32)
        self.count.index_add_(0, positions, ones)
        self.loss[positions] = losses.detach().float()

    def require(self, positions: Tensor) -> None:
        """Note for check_early whether all these targets are on the books."""
        self.early |= (self.count[positions] == 0).any()

    def check_early(self, world: World) -> None:
        """Raise when a rank has asked for a target that was not on the books."""
        if world.total(self.early.int()):
            raise LedgerError(EARLY)

    def booked(self, documents: np.ndarray, world: World) -> Booked:
        """The tokens of these documents, if the ranks have scored all their targets."""
        self.check_early(world)
        count = world.total(self.count.clone()).cpu().numpy()
        tokens = []
        starts, lengths = self.val.documents.start, self.val.documents.length
        for start, length in zip(starts[documents], lengths[documents]):
            if not (count[start:start + length - 1] == 1).all():
                raise LedgerError(f"targets of the document at {start} are not scored "
                                  "once each: training on it would break the rules")
            tokens.append(self.val.tokens[start:start + length])
        return Booked(np.concatenate(tokens))

    def close(self, world: World) -> Score:
        """Sum over ranks; raises unless every expected target was scored once, before
        any step on it."""
        self.check_early(world)
        count = world.total(self.count).cpu().numpy()
        self.total = world.total(self.loss.double()).cpu().numpy()
        wrong = np.flatnonzero(count != self.expected)
        if len(wrong):
            at = wrong[0]
            raise LedgerError(
                f"coverage is broken: {len(wrong):,} targets, the first at {at}, "
                f"were scored {count[at]} times instead of {int(self.expected[at])}")
        self.val.ledgers -= 1
        target_bytes = self.val.target_bytes[self.expected].sum()
        return Score(float(self.total.sum()), float(target_bytes), int(self.expected.sum()))


Window = tuple[int, int, int]       # positions: begin, end, first scored


def sliding_windows(total: int, seq_len: int, stride: int) -> list[Window]:
    """The first window scores all it sees, later ones their last `stride` positions."""
    windows = [(0, min(seq_len, total), 0)]
    for begin in range(stride, total - seq_len + stride, stride):
        end = begin + seq_len
        windows.append((begin, min(end, total), end - stride))
    return windows


def pack_rows(windows: list[Window], capacity: int) -> list[list[Window]]:
    """Windows, longest first, put into rows of at most `capacity` tokens."""
    rows, used = [], capacity
    for begin, end, first in sorted(windows, key=lambda w: w[0] - w[1]):
        used += end - begin
        if used > capacity or not rows:
            rows.append([])
            used = end - begin
        rows[-1].append((begin, end, first))
    return rows


class Scorer:
    """Scores a model on documents in packed rows; they do not see one another."""

    def __init__(self, s: Settings, world: World, model: GPT):
        self.s, self.world, self.model = s, world, model
        self.losses = compiled(s, world.device, model.losses, fullgraph=True, dynamic=False)
        self.fixed = compiles(s, world.device)      # compiled graphs want one row length
        self.capacity = max(s.eval_seq_len, s.val_batch_tokens // GPUS)

    @torch.no_grad()
    def windows(self, val: Validation, stride: int, looping: bool = True) -> Score:
        """Score all documents by windows of EVAL_SEQ_LEN at this stride; longer ones
        on cached keys if EVAL_KV_REUSE."""
        s, ledger = self.s, Ledger(val, self.world.device)
        self.ledger = ledger      # the books of the latest evaluation
        targets = val.documents.length - 1
        cached = targets > s.eval_seq_len
        cached &= s.eval_kv_reuse and stride < s.eval_seq_len
        windows = []
        for d in np.flatnonzero(~cached):
            start = int(val.documents.start[d])
            for window in sliding_windows(int(targets[d]), s.eval_seq_len, stride):
                windows.append(tuple(start + position for position in window))
        rows, plan = pack_rows(windows, self.capacity), layer_plan(s, looping)
        widths = []
        for row in rows:
            widths.append(sum(end - begin for begin, end, _ in row))
        own = share_out(widths, self.world.size)[self.world.rank]
        for i in self.world.each("scoring row", own):
            self.score_row(rows[i], val, plan, ledger)
        if cached.any():
            self.score_cached(val, np.flatnonzero(cached), stride, ledger)
        return ledger.close(self.world)

    def score_cached(self, val: Validation, documents: np.ndarray, stride: int,
                     ledger: Ledger) -> None:
        """Compute documents once, `stride` tokens at a time, on the keys a window
        reaches: what chapter 8 does with a chunk, but nothing adapts."""
        s = dataclasses.replace(
            self.s, ttt_eval_seq_len=self.s.eval_seq_len, ttt_chunk_size=stride,
            ttt_short_score_first_enabled=False, ttt_cache_lambda=0)
        PhasedTTT(s, self.world, self.model, val, ledger=ledger).score_only(documents)

    def score_row(self, row: list[Window], val: Validation, plan: Plan,
                  ledger: Ledger) -> None:
        """One forward; book the scored part of each window."""
        spans = [np.arange(begin, end) for begin, end, _ in row]
        marked = [span >= first for span, (_, _, first) in zip(spans, row)]
        scored = np.flatnonzero(np.concatenate(marked))
        lengths = [len(span) for span in spans]
        used, longest = sum(lengths), self.s.eval_seq_len
        total = self.capacity if self.fixed else used
        at = np.pad(np.concatenate(spans), (0, total - used))
        filler = np.arange(used + longest, total, longest)       # padding, cut alike
        bounds = np.concatenate([[0], np.cumsum(lengths), filler, [total]])
        device = self.world.device
        cu = torch.from_numpy(bounds.astype(np.int32)).to(device)
        x, y = (torch.from_numpy(tokens[at].astype(np.int64))[None].to(device)
                for tokens in (val.tokens, val.targets))
        if self.fixed:
            torch._dynamo.mark_dynamic(cu, 0)
        layout = Layout(cu, longest, isolate=True)
        forward = functools.partial(self.losses, plan=plan, layout=layout)
        losses = tilted_losses(self.s, forward, x, y, at[None], val.hints)[1][0]
        booked = torch.from_numpy(at[scored]).to(device)
        ledger.book(booked, losses[torch.from_numpy(scored).to(device)])


# ========================================
# 8  Adapt: score-first test-time training
# ========================================

ADAPTED = ("q", "k", "v", "o", "mlp", "head")       # what a TTT_*_LORA switches


class BoundAdapter(NamedTuple):
    """An Adapter unbound for one forward: A and B per kind and slot."""
    a: dict
    b: dict
    scale: float

    def add(self, y: Tensor, kind: str, slot: int, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """y (B, T, out) + scale * x A' B' for x (B, T, in); y itself when this kind
        is not adapted. scale (out): times this as well, a seam of the model."""
        if kind not in self.a:
            return y
        low = torch.bmm(x, self.a[kind][slot].mT)
        delta = self.scale * torch.bmm(low, self.b[kind][slot].mT)
        return y + (delta if scale is None else scale * delta)


class Adapter:
    """Low-rank adapters for `rows` documents side by side: per kind A (S, rows, r, in),
    at first uniform(±1/sqrt(in)) and the same for each, and B (S, rows, out, r), at first
    zero: a fresh one changes nothing. S counts executed slots; the head has one. Forwards
    read both in `dtype`; steps add up in float32. squares: sums of the squares of `steps`
    gradients, which fade by TTT_BETA2."""

    def __init__(self, s: Settings, plan: Plan, rows: int, device="cpu", dtype=torch.float32):
        self.s, self.dtype = s, dtype
        self.scale = s.ttt_lora_alpha / s.ttt_lora_rank
        outputs = dict.fromkeys(ADAPTED, s.model_dim)
        outputs.update(k=s.kv_dim, v=s.kv_dim, head=s.vocab_size)
        # no nn.Parameters: torch.compile would make a graph for every number of rows
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.exact_a: dict[str, Tensor] = {}
        self.exact_b: dict[str, Tensor] = {}
        self.squares: list[Tensor] = []
        self.steps = torch.zeros((), device=device)
        for kind, out in outputs.items():
            if not getattr(s, f"ttt_{kind}_lora"):
                continue
            slots = 1 if kind == "head" else plan.slots
            a = torch.empty(slots, rows, s.ttt_lora_rank, s.model_dim, device=device)
            b = torch.zeros(slots, rows, out, s.ttt_lora_rank, device=device)
            self.hold(kind, a, b)
        self.draw_a()

    def hold(self, kind: str, a: Tensor, b: Tensor) -> None:
        """Take A and B, float32."""
        self.exact_a[kind], self.exact_b[kind] = a, b
        self.a[kind] = a.to(self.dtype).detach().requires_grad_()
        self.b[kind] = b.to(self.dtype).detach().requires_grad_()

    def parameters(self) -> list[Tensor]:
        """What a step changes, each (S, rows, …)."""
        return [*self.a.values(), *self.b.values()]

    def exact(self) -> list[Tensor]:
        """The same in float32."""
        return [*self.exact_a.values(), *self.exact_b.values()]

    def sums(self) -> list[Tensor]:
        """squares, like exact(); of the head's B one number, as rows of unseen tokens
        should make no full step."""
        head = self.exact_b.get("head")
        if not self.squares:
            self.squares = [p.new_zeros((*p.shape[:2], 1, 1) if p is head else p.shape)
                            for p in self.exact()]
        return self.squares

    @torch.no_grad()
    def keep(self, rows: slice) -> None:
        """Go on with these documents only."""
        def kept(x: Tensor) -> Tensor:
            return x[:, rows].clone(memory_format=torch.contiguous_format)
        for kind, a in self.exact_a.items():
            self.hold(kind, kept(a), kept(self.exact_b[kind]))
        self.squares = [kept(square) for square in self.squares]

    @torch.no_grad()
    def draw_a(self) -> None:
        """Fresh A, drawn on the CPU: every device starts from the same numbers."""
        generator = torch.Generator().manual_seed(self.s.seed)
        for kind, a in self.exact_a.items():
            drawn = torch.empty(a.size(0), 1, *a.shape[-2:]).uniform_(-1, 1, generator=generator)
            a.copy_(drawn / math.sqrt(a.size(-1)))
            self.a[kind].copy_(a)

    def bind(self, dtype: torch.dtype, head: bool = False) -> BoundAdapter:
        """For one forward: the trunk's, or the head's."""
        def unbound(side: dict) -> dict:
            wanted = [kind for kind in side if (kind == "head") == head]
            return {kind: side[kind].to(dtype).unbind(0) for kind in wanted}
        return BoundAdapter(unbound(self.a), unbound(self.b), self.scale)


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


def chunk_window(targets: np.ndarray, begin: int, end: int, rerun: int) -> ChunkWindow:
    """The chunk [begin, end) of documents of `targets` (B,), on cached keys: the
    forward takes `rerun` inputs before it as well."""
    first = np.full_like(targets, begin - rerun)
    return window_from(first, targets, begin, end, end - begin + rerun)


def window_from(first: np.ndarray, targets: np.ndarray, begin: int, end: int,
                width: int) -> ChunkWindow:
    """The chunk [begin, end) in rows of `width` whose inputs begin at first (B,)."""
    count = np.maximum(np.minimum(end, targets) - begin, 0)
    first = np.where(count > 0, first, 0)
    offset = np.where(count > 0, begin - first, 0)
    return ChunkWindow(first, offset, count, width)


class ChunkRule(NamedTuple):
    """Up to the position `until` in a document (TTT_DOC_ORDER=length: in groups whose
    longest document has at most so many tokens) chunks have `chunk` tokens."""
    until: float
    chunk: int


def chunk_bounds(s: Settings, length: int) -> list[int]:
    """Where the chunks of a group begin whose longest document has `length` tokens,
    and the last one's end. In stream order sizes go by position, so that no later
    document has a say in how an earlier one is cut; in the field's by `length`."""
    rules, bounds = chunk_rules(s), [0]
    if s.ttt_doc_order == "length":
        chunk = next(rule.chunk for rule in rules if length <= rule.until)
        rules = [ChunkRule(math.inf, chunk)]
    for until, chunk in rules:
        while bounds[-1] < min(until, length - 1):
            bounds.append(bounds[-1] + min(chunk, s.ttt_eval_seq_len))
    return bounds


# --- one step

@torch.no_grad()
def normalised_step(s: Settings, params: list[Tensor], exact: list[Tensor], squares: list[Tensor],
                    steps: Tensor, losses: Tensor) -> Tensor:
    """One step of each document's matrices (S, rows, R, C). Direction: gradient / running RMS.
    Rate: such that to first order its loss (rows,) falls by TTT_STEP_SHARE of it (at rate 1 it
    falls by gradient times direction); what the head's B adds comes on top. None where a gradient
    is not finite. exact: the matrices in float32; squares, steps: see Adapter. Returns whose step
    was shortened (rows,)."""
    steps.mul_(s.ttt_beta2).add_(1)

    def rms_of(square: Tensor) -> Tensor:
        return (square / steps).sqrt() + 1e-12

    promised, on_top = torch.zeros_like(losses), torch.zeros_like(losses)
    for p, square in zip(params, squares):
        gradient = p.grad.float()
        along = gradient.square() / rms_of(with_squares(s, square, gradient))
        in_share = square.shape == p.shape or len(params) <= 2      # else the head's B
        (promised if in_share else on_top).add_(along.sum(dim=(0, 2, 3)))
    whole = promised + on_top
    rates, shortened = step_rates(s, promised if s.ttt_step_share else whole, losses)
    broken = ~(whole.isfinite() & losses.isfinite())
    rates = rates.masked_fill(broken, 0)[:, None, None]
    for p, wide, square in zip(params, exact, squares):
        gradient = p.grad.float().masked_fill(broken[:, None, None], 0)
        square.copy_(with_squares(s, square, gradient))
        wide.mul_(1 - rates * s.ttt_weight_decay).sub_(rates * gradient / rms_of(square))
        if p.dtype != wide.dtype:      # else one tensor
            p.copy_(wide)
    return shortened | broken


# --- the evaluation

@dataclass
class GroupRows:
    """A group's documents, a row each, the longest last: where they begin in the
    stream, how many targets they have. adapter None: they are scored only; cache None:
    every chunk's context is encoded again. base: the same without adapters, see
    TTT_BASE_SHARE."""
    starts: np.ndarray
    targets: np.ndarray
    adapter: Adapter | None = None
    optimiser: torch.optim.Optimizer | None = None
    cache: KeyCache | None = None
    base: GroupRows | None = None

    def keep_last(self, rows: int) -> None:
        """Go on with the longest documents only."""
        last = slice(-rows, None)
        self.starts, self.targets = self.starts[last], self.targets[last]
        for part in (self.adapter, self.cache):
            if part is not None:
                part.keep(last)


class PhasedTTT:
    """Score-first phased test-time training: each document has its own adapter, which
    booked chunks alone adapt; between rounds the base weights are trained on whole
    booked documents. clock: the evaluation's, watched so that every target is scored
    in time. trace(event, **values) observes: lora, reset, chunk, sgd_step, phase,
    give_up, warning."""

    def __init__(self, s: Settings, world: World, model: GPT, val: Validation,
                 trace: Callable | None = None, clock: Clock | None = None,
                 ledger: Ledger | None = None):
        self.s, self.world, self.model, self.val = s, world, model, val
        self.trace = trace or (lambda event, **values: None)
        self.plan = layer_plan(s, True)
        self.lengths = val.documents.length
        self.watch = Watchdog(s, world, self.lengths, clock, self.trace)
        self.losses = compiled(s, world.device, model.losses, fullgraph=True, dynamic=True)
        self.step = compiled(s, world.device, normalised_step, fullgraph=True, dynamic=True)
        self.ledger = ledger or Ledger(val, world.device)
        self.shortened = torch.zeros((), dtype=torch.int64, device=world.device)

    def own_share(self, groups: list[np.ndarray]) -> list[np.ndarray]:
        """This rank's share of the groups."""
        costs = [self.watch.costs(group)[self.watch.level] for group in groups]
        share = share_out(costs, self.world.size)[self.world.rank]
        return [groups[i] for i in sorted(share)]

    def run(self) -> Score:
        """Score every document once; the weights stay as the last phase left them."""
        rounds = ttt_rounds(self.s, self.lengths)
        shares = [self.own_share(r.groups) for r in rounds]
        self.watch.expect(itertools.chain(*shares), [r.train_on for r in rounds[:-1]])
        self.model.requires_grad_(False)        # but in a phase
        for r, share in zip(rounds, shares):
            self.begin_round()
            for group in share:
                self.adapt_group(group)
            if r.train_on is not None and self.watch.all_have_time():
                self.phase(r.train_on)
        self.model.requires_grad_(True)
        warn_of_shortened_steps(self.s, int(self.world.total(self.shortened)), self.trace)
        return self.ledger.close(self.world)

    def score_only(self, documents: np.ndarray) -> None:
        """Book these documents without adapting to them."""
        self.watch.level = NO_ADAPTATION
        self.model.requires_grad_(False)       # as in adaptation, for the same graphs
        own = self.own_share(grouped(self.s, documents, self.lengths))
        self.watch.expect(own, [])
        for group in own:
            self.adapt_group(group)
        self.model.requires_grad_(True)

    def begin_round(self) -> None:
        """Nothing passes from round to round."""

    def adapter_for(self, rows: int) -> Adapter:
        """A fresh one for so many documents."""
        adapter = Adapter(self.s, self.plan, rows, self.world.device, self.model.compute_dtype)
        self.trace("lora", adapter=adapter)
        return adapter

    def optimiser(self, adapter: Adapter) -> torch.optim.Optimizer | None:
        """Of a group's adapters; None: normalised_step."""
        return None

    def adapt_group(self, group: np.ndarray) -> None:
        """Score a group's documents by chunks, adapting those that go on."""
        self.watch.check_time()
        rows = self.open_rows(group)
        bounds = chunk_bounds(self.s, int(self.lengths[group].max()))
        costs, counted, since = self.watch.costs(group), 0, Clock()
        for n, (begin, end) in enumerate(zip(bounds, bounds[1:]), start=1):
            self.world.beat(f"adapting to chunk {n} of {len(bounds) - 1}", self.watch.share())
            self.adapt_chunk(rows, begin, end)
            if n % WATCH_EVERY == 0 or end == bounds[-1]:
                self.watch.count_work(costs * (end - counted) / bounds[-1], since)
                counted, since = end, Clock()

    def open_rows(self, group: np.ndarray) -> GroupRows:
        """A row for each document of a group, nothing learnt yet."""
        s = self.s
        starts, targets = self.val.documents.start[group], self.lengths[group] - 1
        if len(group) == 1 < s.ttt_batch_size:      # 1 row would compile another graph
            starts, targets = np.repeat(starts, 2), np.append(0, targets)
        rows = GroupRows(starts, targets)
        rows.cache = KeyCache(s.ttt_eval_seq_len, states=s.ttt_cache_lambda > 0)
        if self.watch.level < NO_ADAPTATION:
            rows.adapter = self.adapter_for(len(starts))
            rows.optimiser = self.optimiser(rows.adapter)
            if s.ttt_base_share:
                rows.base = GroupRows(starts, targets, cache=KeyCache(s.ttt_eval_seq_len))
        return rows

    def shrink_to_live(self, rows: GroupRows, begin: int) -> None:
        """Drop documents that end by `begin`."""
        live = int((rows.targets > begin).sum())
        kept = rows_kept_for(self.s.ttt_batch_size, live)
        if kept < len(rows.targets):
            rows.keep_last(kept)

    def next_window(self, rows: GroupRows, begin: int, end: int) -> ChunkWindow:
        """What the forward over the chunk [begin, end) takes in."""
        rerun = 0
        if begin:
            suffix = suffix_at(self.s, self.watch.level) if rows.adapter is not None else 0
            rerun = rows.cache.advance(end - begin, suffix)
        self.shrink_to_live(rows, begin)
        return chunk_window(rows.targets, begin, end, rerun)

    def adapt_chunk(self, rows: GroupRows, begin: int, end: int) -> None:
        """Score the chunk [begin, end) of every row; those that go on learn from it."""
        base = self.base_losses(rows, begin, end)
        window = self.next_window(rows, begin, end)
        cache = rows.cache
        with torch.set_grad_enabled(rows.adapter is not None):      # at every level: one graph
            scored = self.score_chunk(rows.starts, window, rows.adapter, cache, base)
            later = trained_rows(self.s, rows.targets, end)
            if later.any() and self.watch.level < NO_ADAPTATION:
                self.adapt(rows.adapter, rows.optimiser, scored, self.on_device(later))
                if cache is not None:
                    cache.new = {}      # left by forwards after a step

    def on_device(self, x: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(x), self.world.device)

    def tokens_of(self, starts: np.ndarray, w: ChunkWindow) -> tuple:
        """A window's inputs and targets (B, W), their places in the stream, which are scored."""
        column = np.arange(w.width)
        valid = column < (w.offset + w.count)[:, None]
        at = np.where(valid, (starts + w.begin)[:, None] + column, 0)
        x, y = (self.on_device(np.where(valid, tokens[at], 0).astype(np.int64))
                for tokens in (self.val.tokens, self.val.targets))
        return x, y, at, valid & (column >= w.offset[:, None])

    def of_scored(self, losses: Tensor, counted: np.ndarray) -> Tensor:
        """Losses (N,) of the scored targets, row by row, of losses (B, W)."""
        return losses.detach().flatten()[self.on_device(np.flatnonzero(counted))]

    def base_losses(self, rows: GroupRows, begin: int, end: int) -> Tensor | None:
        """Losses (N,) of the chunk's targets without adapters, if they count."""
        base = rows.base
        if base is None or self.watch.level == NO_ADAPTATION:
            return None
        window = self.next_window(base, begin, end)
        x, y, at, counted = self.tokens_of(base.starts, window)
        forward = functools.partial(self.losses, plan=self.plan, cache=base.cache)
        with torch.no_grad():
            _, losses = tilted_losses(self.s, forward, x, y, at, self.val.hints)
        base.cache.seal(x)
        return self.of_scored(losses, counted)

    def score_chunk(self, starts: np.ndarray, w: ChunkWindow, adapter: Adapter | None,
                    cache: KeyCache | None, base: Tensor | None = None) -> Scored:
        """One forward over the chunk and its context; booked before anything learns, mixed
        with base (N,)."""
        x, y, at, counted = self.tokens_of(starts, w)

        def forward(x: Tensor = x, y: Tensor = y) -> Tensor:
            return self.losses(x, y, self.plan, None, adapter, cache)

        # to learn from, and to book
        losses, booked = tilted_losses(self.s, forward, x, y, at, self.val.hints)
        if cache is not None and cache.states:
            booked = mixed_with_cache(self.s, booked, cache)
        positions, scores = self.on_device(at[counted]), self.of_scored(booked, counted)
        if base is not None:
            scores = mixed_with_base(self.s, scores, base)
        self.ledger.book(positions, scores)
        if cache is not None:      # of the scored forward: steps run more
            cache.seal(x)
        self.trace("chunk", x=x, y=y, losses=booked.detach(), offsets=w.offset,
                   counts=w.count, width=w.width, at=at, counted=counted)
        return Scored(losses, int(w.count.max()), positions, forward)

    def adapt(self, adapter: Adapter, optimiser: torch.optim.Optimizer | None,
              scored: Scored, later: Tensor) -> None:
        """TTT_GRAD_STEPS steps of the documents in `later` on their booked chunk."""
        self.ledger.require(scored.positions)
        losses, trained = scored.losses, adapter.parameters()
        for step in range(self.s.ttt_grad_steps):
            if step:
                losses = scored.again()
            # rows that go on have the whole chunk, and it ends their inputs
            of_chunk = losses[:, -scored.chunk:].mean(dim=1) * later
            of_chunk.sum().backward(inputs=trained)
            if optimiser is None:
                shortened = self.step(self.s, trained, adapter.exact(), adapter.sums(),
                                      adapter.steps, of_chunk.detach())
            else:
                shortened = optimiser_step(optimiser, trained)
            self.shortened += shortened.sum()
            for p in trained:      # at once: with one left the forward would compile again
                p.grad = None

    # --- the base weights

    def phase(self, documents: np.ndarray) -> None:
        """Train the base weights on these documents, all of them booked."""
        booked, clock = self.ledger.booked(documents, self.world), Clock()
        self.global_phase(booked)
        sync(self.world.device)
        self.watch.phase_pace = clock.elapsed() / len(booked.tokens)
        self.watch.phase_tokens -= int(self.lengths[documents].sum())

    def global_phase(self, booked: Booked) -> None:
        """SGD on all base weights over booked documents."""
        tokens = booked.tokens
        chunks = math.ceil((len(tokens) - 1) / self.s.global_ttt_chunk_tokens)
        params = self.model.requires_grad_(True).parameters()
        optimiser = torch.optim.SGD(params, momentum=self.s.global_ttt_momentum)
        steps = phase_steps(self.s, len(tokens))
        for c, begin, end in self.world.each("adapting the base weights, step", steps):
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
            layout = batch.layout(batch.max_seqlen)
            loss = self.model.losses(batch.x, batch.y, self.plan, layout).sum() / total
            loss.backward()
        norm = total_gradients(world, self.model, s.global_ttt_grad_clip)
        optimiser.step()
        optimiser.zero_grad()
        self.trace("sgd_step", loss=world.total(loss.detach().clone()), n_tokens=total,
                   grad_norm=norm, lr=optimiser.param_groups[0]["lr"])

    def row_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where a run of tokens may be cut for the ranks: at its documents."""
        return np.flatnonzero(tokens[:-1] == BOS)

    def rows_of(self, tokens: np.ndarray) -> Batch:
        """The batch of a rank's tokens: packed documents of at most EVAL_SEQ_LEN."""
        return packed_batch(tokens, self.s.eval_seq_len)


# ========================================
# PART TWO: machinery behind plain doors. A reader may stop before it.
# ========================================


# ========================================
# 9  World, clocks, log, and what is kept on disk
# ========================================

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


def own_variables(env: Mapping[str, str], known: Mapping) -> dict[str, str]:
    """The variables under today's names, without those that set nothing here. UserError
    for one that must have been meant for this script."""
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
    for name in env:
        if name not in known and (nearest := looks_like_ours(name, known)) is not None:
            raise UserError(f"unknown setting {name}: the nearest known one is {nearest} "
                            "(python train_gpt.py --help lists all); if it is of another program, "
                            f"start this one by: env -u {name} python train_gpt.py")
    return env


def set_up(s: Settings, world: World) -> str:
    """Seeds, arithmetic and attention of this process; why this attention, and which kernels not."""
    global ATTENTION
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high" if world.device.type == "cuda" else "highest")
    if world.device.type == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # more wait for the slowest of them in every operation, long where another program
            # is busy; and the last bits hang on how many there are
            torch.set_num_threads(1)
    # plans, grad modes and batch shapes share one code object
    torch._dynamo.config.recompile_limit = 64
    # settings that are floats are constants: as symbols they take longer to compile
    torch._dynamo.config.specialize_float = True
    # sizes that are equal by chance stay apart
    torch.fx.experimental._config.use_duck_shape = False
    with world.compiling():
        world.beat("set-up")
        ATTENTION, why = resolve_attention(s.attn_backend, world.device)
        names = world.gather(ATTENTION)
        if len(set(names)) > 1:
            raise UserError(f"the ranks would use different attention kernels {names}; this one: "
                            f"{why}. Set ATTN_BACKEND to one that runs everywhere")
        if world.device.type == "cuda" and triton is not None:
            for faults in world.gather(kernel_faults(world.device)):
                FAULTY.update(faults)
    return "; ".join([why, *(f"without the kernel {name}: {fault}" for name, fault in FAULTY.items())])


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep freed activations: giving them back and faulting them in again
    takes longer than what is computed with them. MALLOC_* of the environment win; another
    C library goes its own way."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)     # the largest that it takes
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


@contextlib.contextmanager
def one_thread():
    """Inside, torch computes on one thread: many small products and factorisations only wait
    for the others, and their last bits hang on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pick_dtype(choice: str, device: torch.device,
               default: torch.dtype | None = None) -> torch.dtype:
    """The dtype a setting names. auto: `default`, else by the device."""
    if choice == "auto":
        return default or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return getattr(torch, choice)


def compiles(s: Settings, device: torch.device) -> bool:
    """Whether to use torch.compile, which cannot trace plain attention."""
    plain = ATTENTION == "plain" or pick_dtype(s.compute_dtype, device) == torch.float32
    if s.compile == "1" and plain:
        raise UserError("COMPILE=1 cannot trace plain attention (ATTN_BACKEND=plain, a CPU, "
                        "or COMPUTE_DTYPE=float32): set COMPILE=auto")
    return s.compile != "0" and device.type == "cuda" and not plain


def compiled(s: Settings, device: torch.device, fn: Callable, **options) -> Callable:
    """fn through torch.compile where that is wanted."""
    return torch.compile(fn, **options) if compiles(s, device) else fn


def build_model(s: Settings, world: World) -> GPT:
    """The seeded model on this rank's device: every rank draws the same weights."""
    model = GPT(s, torch.Generator().manual_seed(s.seed)).to(world.device)
    model.compute_dtype = pick_dtype(s.compute_dtype, world.device)
    return model


def total_gradients(world: World, model: GPT, clip: float) -> Tensor:
    """Sum all gradients over the ranks and clip their norm (0: no clipping); returns
    the norm before."""
    for p in model.parameters():
        p.grad = world.total(torch.zeros_like(p) if p.grad is None else p.grad)
    return nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)


# --- reading settings

def is_free_text(f) -> bool:
    """Whether an empty value means something."""
    return type(f.default) is str and not f.metadata["choices"]


def is_number(text: str) -> bool:
    """Whether float() reads a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def whole_number(text: str) -> int | None:
    """The whole number that the text writes, to the last digit, 1e3 too; else None."""
    if len(text) > 40 or not is_number(text):
        return None
    value = decimal.Decimal(text)
    return int(value) if value == value.to_integral_value() else None


def whole_numbers(text: str) -> list[int]:
    """The numbers of "9,10", at most 64; none of any other text."""
    parts = text.replace(" ", "").split(",")
    good = len(parts) <= 64 and all(re.fullmatch("[0-9]{1,9}", part) for part in parts)
    return [int(part) for part in parts] if good else []


def parse_setting(f, text: str):
    """The typed value of one setting; UserError when the text is none."""
    name, kind = f.name.upper(), type(f.default)
    lo, hi = f.metadata["lo"], f.metadata["hi"]
    choices = ("0", "1") if kind is bool else f.metadata["choices"]
    if choices and text not in choices:
        raise UserError(f"{name}={text} must be {' or '.join(choices)}")
    if kind is bool:
        return text == "1"
    if kind is str:
        return parse_text(name, text, hi)
    if kind is int:
        value, what = whole_number(text), "a whole number"
    else:
        value, what = float(text) if is_number(text) else None, "a number"
    if value is None:
        raise UserError(f"{name}={text} must be {what}")
    if not lo <= value <= hi:
        raise UserError(f"{name}={text} is out of range: it must be at least {lo} and at most {hi}")
    return value


def parse_text(name: str, text: str, most: int) -> str:
    """A setting that is text, of a path with ~ expanded."""
    rule = ""
    if len(text) > most or not text.isprintable():
        rule = f"be at most {most:,} printable characters"
    elif name == "RUN_ID" and (len(text) > 100 or text[:1] == "." or set(text) & set("/\\")):
        rule = "be the name of a folder: at most 100 characters, no slash and no dot in front"
    elif name.endswith(("_PATH", "_DIR")):
        text = os.path.expanduser(text)
        if text[:1] == "~":
            rule = "begin with another folder: there is no such user; a folder of that name is ./~"
        elif any(len(os.fsencode(part)) > 255 for part in text.split("/")):
            rule = "have names of at most 255 bytes in it: choose a shorter one"
    if rule:
        raise UserError(f"{name}={text[:80]} must {rule}")
    return text


MOST_SLOTS = 1024             # executed layers
MOST_ORDER = 64               # of an n-gram
MOST_WEIGHTS = 2 ** 31        # of a model

BY_HAND = {"AWQ_LITE_ENABLED": "0"}     # what changes steps that are set by hand -> its idle value
LEFT_OUT = "left out: no published system gained by it"
CUT_OFF = "older systems need more, which a lean script leaves out: run the whole one"
# The field's names that set nothing here: (the one value they may have, None: any; why).
NO_SETTINGS = {name: (only, why) for only, why, names in (
    (None, "lossless all of them: our own coder takes their place", "COMPRESSOR"),
    (0, "every document trains its own A", "TTT_SHARED_A"),
    (None, "always so: all targets are scored, by the calibrated loss, with graphs warmed up", """
     COMPILE_SHAPE_WARMUP COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_LOOP_MODES
     EVAL_INCLUDE_TAIL LOGIT_CALIB_APPLY_TTT_UPDATE NGRAM_HINT_PRECOMPUTE_OUTSIDE"""),
    (None, "the field's scripts get nothing from it either", """
     CONTROL_TENSOR_NAME_PATTERNS MUON_BETA2 ROPE_TRAIN_SEQ_LEN SWA_ENABLED SWA_EVERY
     TTT_EVAL_BATCHES"""),
    (None, "part of something left out", """
     GLOBAL_TTT_MUON_NESTEROV GLOBAL_TTT_MUON_NS_STEPS MUON_HUBER_DELTA TTT_HEARTBEAT_SECONDS
     TTT_OUTPUT_DIR TTT_SHORT_BETA2 TTT_SHORT_LORA_LR TTT_SHORT_LORA_RANK TTT_SHORT_WEIGHT_DECAY
     TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_MOMENTUM"""),
    (0, LEFT_OUT, """
     DTG_ENABLED FORCE_STOP_STEP GATED_ATTENTION GATED_XSA GLOBAL_TTT_DOC_LIMIT GRAD_CENTRALIZE
     LABEL_SMOOTH LAWA_ENABLED LR_FLOOR MIDRUN_CAP_LOG_UPDATES MTP_NUM_HEADS MUON_HUBER_WD
     OPTROT_ENABLED QAT_ENABLED SLOT_ENABLED TRIGRAM TTT_DOC_LIMIT TTT_GRAD_STEPS_CLEAN
     TTT_LORA_EMA_DECAY TTT_SHORT_LORA_ENABLED TTT_WARM_START_MEAN_ENABLED VALUE_RESIDUAL"""),
    (1, LEFT_OUT, "WD_TAPER_FINAL_MULT"),
    ("sgd", LEFT_OUT, "GLOBAL_TTT_OPTIMIZER"),
    (0, "set EVAL_ONLY_QUANTIZED_PATH to the artifact instead", "TTT_EVAL_ONLY"),
    (0, "set WARMDOWN_FRAC to its share of the steps you expect", "WARMDOWN_ITERS"),
    (1, "built in", "FUSED_CE_ENABLED GPTQ_ENABLED USE_GPTQ SDCLIP_ENABLED TTT_UPDATE_EVERY"),
    (0, "built in", "SPARSE_ATTN_GATE_INIT_STD"),
    (0.01, "built in", "GATED_ATTN_INIT_STD"),
    (8, "built in", "AWQ_LITE_BITS"),
    (512, "embeddings are as wide as the model", "EMBEDDING_DIM"),
    ("wallclock", "always by the training budget", "TRAIN_SEQ_SCHEDULE_MODE"),
) for name in names.split()}
ALIASES = {   # old name -> the settings it stands for
    "GPTQ_CALIB_BATCHES": "GPTQ_CALIBRATION_BATCHES",
    "GPTQ_CALIB_SAMPLES": "GPTQ_CALIBRATION_BATCHES",
    "GPTQ_RESERVE_MS": "GPTQ_RESERVE_SECONDS",
    "PHASED_TTT_ENABLED": "TTT_ENABLED",
    "QUANT_CLIP_RANGE": "MATRIX_BITS",
    "RECUR_LAYERS": "LOOP_START LOOP_END NUM_LOOPS",
    "SDCLIP_K": "MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS",
    "SDCLIP_K_EMBED": "EMBED_CLIP_SIGMAS",
    "SDCLIP_K_INT6": "MATRIX_CLIP_SIGMAS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS",
    "SDCLIP_K_INT8": "EMBED_CLIP_SIGMAS",
    "TTT_MASK": "TTT_Q_LORA TTT_V_LORA",
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
}
# Whether Q and V are adapted.
TTT_MASKS = {"all": "11", "baseline_all": "11", "no_q": "01", "no_v": "10", "no_qv": "00"}


def translate(old: str, value: str) -> Sequence[str]:
    """The values of the settings that an old name stands for."""
    form = "a whole number"
    try:
        if old == "RECUR_LAYERS":      # they run once more after the last of them
            form = "consecutive layers, as 3,4,5"
            layers = whole_numbers(value)
            if layers != list(range(layers[0], layers[0] + len(layers))):
                raise ValueError
            return str(layers[0]), str(layers[-1]), "1"
        if old == "TTT_MASK":
            form = f"one of {', '.join(TTT_MASKS)}"
            return TTT_MASKS[value]
        if old == "QUANT_CLIP_RANGE":
            return str(int(math.log2(int(value))) + 2),
        if old == "GPTQ_RESERVE_MS":
            return str(float(value) / 1e3),
        return [value] * 3
    except (LookupError, ValueError) as error:
        raise UserError(f"{old}={value} must be {form}") from error


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
    """The setting that `name` must have been meant for, by likeness or by words of ours."""
    words = name.lower().split("_")
    if name in OTHER_NAMES or {"port", "service"} & set(words[1:]):      # or of a scheduler's services
        return None
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.86 if len(name) > 4 else 1.0)
    if words[-1] in PLATFORM_WORDS:
        return close[0] if close and words[-1] in close[0].lower().split("_")[-1] else None
    if not close and len(words) > 1 and name.isupper():
        vocabulary = set("_".join([*known, *NO_SETTINGS]).lower().split("_"))
        if words[0] in our_words() or vocabulary.issuperset(words):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None


def stray_names(env: Mapping[str, str]) -> dict[str, str]:
    """Variables like settings that nothing reads, and what to say of each; at most 20."""
    known = {f.name.upper() for f in fields(Settings)}
    first_words = our_words() | COMMON_WORDS
    strays = {}
    for name in sorted(set(env) - known - {*NO_SETTINGS, *ALIASES}):
        like_ours = "_" in name and name.isupper() and name.split("_")[0].lower() in first_words
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
        default = f.default
        if meta["group"]:
            print(f"\n{meta['group'].upper()}")
        bounds = ""
        if meta["choices"]:
            bounds = f"  [{'|'.join(meta['choices'])}]"
        elif type(default) in (int, float):
            bounds = f"  [{meta['lo']} to {meta['hi']}]"
        default = int(default) if type(default) is bool else default
        print(f"  {f.name.upper():34} {default!s:>10}  {meta['doc']}{bounds}")
    print("\nACCEPTED OLD NAMES")
    for old, names in ALIASES.items():
        print(f"  {old:34} read as {names.replace(' ', ', ')}")
    for name, (only, why) in NO_SETTINGS.items():
        if why != CUT_OFF:
            print(f"  {name:34} {'no effect' if only is None else f'only {only}'}: {why}")


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


def chunk_rules(s: Settings) -> list[ChunkRule]:
    """By rising `until`; the last has no end and is TTT_CHUNK_SIZE."""
    rules, text = [], s.first_chunks
    for part in listed(text.replace("=", ":")):
        rule = whole_numbers(part.replace(":", ",", 1))
        if len(rule) != 2 or min(rule) < 1:
            raise UserError(f"TTT_SHORT_SCORE_FIRST_STEPS={text} must be length:chunk, "
                            "as 256:8,2000:24")
        rules.append(ChunkRule(*rule))
    return sorted(rules) + [ChunkRule(math.inf, s.ttt_chunk_size)]


# --- settings that do not go together

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
    if s.key_offset and s.rope_dims in (0, s.head_dim):
        raise UserError(f"KEY_OFFSET=1 finds no channel that ROPE_DIMS={s.rope_dims} does not "
                        f"rotate: set that between 2 and {s.head_dim - 2}, or KEY_OFFSET=0")
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


def check_quantise(s: Settings) -> None:
    """Refuse what has no effect on steps by curvature."""
    if s.awq_lite_enabled and s.quant_allocation != "hand":
        raise UserError("AWQ_LITE_ENABLED=1 changes steps that are set by hand, "
                        f"not by QUANT_ALLOCATION={s.quant_allocation}: "
                        "set QUANT_ALLOCATION=hand or leave it out")


def check_scoring(s: Settings) -> None:
    """Refuse windows that would leave targets out, and adaptation that could not work or
    would let later text reach earlier."""
    if s.eval_stride > s.eval_seq_len:
        raise UserError(f"EVAL_STRIDE={s.eval_stride} exceeds EVAL_SEQ_LEN={s.eval_seq_len}: "
                        "lower it")
    largest = max(rule.chunk for rule in chunk_rules(s))
    if largest > s.ttt_eval_seq_len:
        raise UserError(f"TTT_CHUNK_SIZE={s.ttt_chunk_size}, or a chunk of "
                        f"TTT_SHORT_SCORE_FIRST_STEPS={s.first_chunks}, exceeds TTT_EVAL_SEQ_LEN="
                        f"{s.ttt_eval_seq_len}: lower it")
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


# --- the ranks

class Ranks(NamedTuple):
    """What the launcher tells a process."""
    rank: int
    size: int
    local: int           # rank among those on this machine


LAUNCH = ("start by torchrun, or without them: env -u RANK -u WORLD_SIZE -u LOCAL_RANK "
          "-u LOCAL_WORLD_SIZE python train_gpt.py")


def launcher_number(env: Mapping[str, str], name: str, default: int, lo: int, hi: int) -> int:
    """A number that the launcher sets, from lo to hi."""
    text = env.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or not lo <= int(text) <= hi:
        raise UserError(f"{name}={text[:40]} must be a whole number from {lo} to {hi}: {LAUNCH}")
    return int(text)


def launcher_ranks(env: Mapping[str, str]) -> Ranks:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process without them."""
    size = launcher_number(env, "WORLD_SIZE", 1, 1, 65536)
    local_size = launcher_number(env, "LOCAL_WORLD_SIZE", 1, 1, size)
    most_local = local_size if "LOCAL_WORLD_SIZE" in env else size
    rank = launcher_number(env, "RANK", 0, 0, size - 1)
    local = launcher_number(env, "LOCAL_RANK", 0, 0, most_local - 1)
    if size > 1:
        if "RANK" not in env or not env.get("MASTER_ADDR", "").strip():
            raise UserError(f"WORLD_SIZE={size} needs RANK and MASTER_ADDR, by which ranks find "
                            f"each other: {LAUNCH}")
        launcher_number(env, "MASTER_PORT", 0, 1, 65535)
    return Ranks(rank, size, local)


# First word of what a rank does -> seconds without progress of any rank, and of waiting in a
# collective (where nobody knows who is to blame), after which something hangs.
PATIENCE = {
    "step": (45.0, 60.0),
    "scoring": (250.0, 1800.0),
    "adapting": (250.0, 1800.0),
    "checking": (1500.0, 1800.0),
    "compiling-step": (900.0, 1200.0),
}
USUAL_PATIENCE = (250.0, 300.0)
COMPILING_PATIENCE = PATIENCE["compiling-step"]     # a large graph gives no sign of life


class Pulse:
    """What this rank does and how far it is, for its heartbeat."""

    def __init__(self):
        self.doing, self.beats, self.at = "set-up", 0, time.monotonic()
        self.longest: dict[str, float] = {}     # seconds between two beats, by first word
        self.waiting = False                    # in a collective
        self.compiling = False                  # graphs that are new
        self.ending = False                     # the heartbeat is about to end this process
        self.wait = 0.0                         # the collectives' time limit in force, in seconds
        self.show: Callable[[str, float], None] | None = None      # hears what is done, and what share of it

    def beat(self, doing: str) -> None:
        now = time.monotonic()
        word = doing.split()[0]
        if word == self.doing.split()[0]:
            self.longest[word] = max(self.longest.get(word, 0.0), now - self.at)
        self.doing, self.at = doing, now
        self.beats += 1

    def limits(self) -> tuple[float, float]:
        """PATIENCE now; at least ten of the longest so far."""
        word = self.doing.split()[0]
        progress, wait = PATIENCE.get(word, USUAL_PATIENCE)
        if self.compiling:
            progress = max(progress, COMPILING_PATIENCE[0])
            wait = max(wait, COMPILING_PATIENCE[1])
        least = 10 * self.longest[word] if word in self.longest else USUAL_PATIENCE[0]
        return max(progress, least), max(wait, 1.2 * least)


@dataclass
class World:
    """The ranks of this run; one rank is the same code."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)

    @classmethod
    def join(cls, env: Mapping[str, str]) -> World:
        """Join the launcher's process group."""
        rank, size, local = launcher_ranks(env)
        world = cls(rank, size)
        if gpus := torch.cuda.device_count():
            if local >= gpus:
                raise UserError(f"LOCAL_RANK={local} but there are {gpus} GPUs here: lower "
                                "--nproc_per_node")
            world.device = torch.device("cuda", local)
            torch.cuda.set_device(world.device)
        if size == 1:
            return world
        address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        try:
            socket.getaddrinfo(address, port)      # torch would look for the machine for minutes
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                                    timeout=timedelta(seconds=USUAL_PATIENCE[1]))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the ranks cannot meet at MASTER_ADDR={address[:80]}, MASTER_PORT="
                            f"{port} ({in_a_line(error):.120}): set them to rank 0's machine and "
                            "a free port, or start by torchrun") from error
        world.heartbeat = Heartbeat(world, env)
        world.heartbeat.start()
        return world

    def beat(self, doing: str, done: float = 0.0) -> None:
        """Progress was made; `doing`, such as "step 812", follows. done: the share of it all
        that is done, if it is known."""
        self.pulse.beat(doing)
        if self.pulse.show is not None:
            self.pulse.show(doing, done)
        wait = self.pulse.limits()[1]
        set_wait = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
        if set_wait and wait != self.pulse.wait and dist.is_initialized():
            self.pulse.wait = wait
            set_wait(timedelta(seconds=wait))

    def each(self, doing: str, items: Sequence) -> Iterator:
        """The items one by one, a beat ahead of each."""
        for n, item in enumerate(items):
            self.beat(f"{doing} {n + 1} of {len(items)}", n / len(items))
            yield item

    @contextlib.contextmanager
    def compiling(self):
        """Inside, from the next beat on, graphs may be compiled for minutes."""
        before = self.pulse.compiling
        self.pulse.compiling = True
        try:
            yield
        finally:
            self.pulse.beat(self.pulse.doing)      # that it has ended is progress
            self.pulse.compiling = before

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
        """Rank 0's value on every rank. The GPU's queue is not drained."""
        if self.size == 1:
            return value
        box = [value]
        with self.waiting():
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def from_main(self, make: Callable, *args):
        """What make(*args) gives on rank 0, on every rank."""
        return self.agree(make(*args) if self.main else None)

    def agree_step(self, elapsed: float, stop: int, bad_step: int) -> tuple[float, int, int]:
        """Before a step, for all ranks: rank 0's seconds, the number of a signal and the
        first step that went wrong, on any rank (0: none)."""
        if self.size == 1:
            return elapsed, stop, bad_step
        never = -math.inf
        ours = [elapsed if self.main else never, stop, -bad_step or never]
        largest = torch.tensor(ours, dtype=torch.float64)
        with self.waiting():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        elapsed, stop, bad = largest.tolist()
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
        self.agree(None)

    def leave(self) -> None:
        """The others need not watch this rank any more."""
        if self.heartbeat is not None:
            self.heartbeat.leave()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


TICK = 2.0       # seconds between two signs of life
STOPPED = 20.0   # seconds without one after which a stopped process of this machine is given up
SILENT = 45.0    # and one of another; one that runs here may be in a call that lets no thread run


def process_state(pid: int) -> tuple[str, str]:
    """(state letter, start) of a process of this machine; empty where not known."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "", ""


class Heartbeat(threading.Thread):
    """Gives the other ranks signs of life, and ends the job when one falls silent or
    nothing goes on. The rendezvous store carries the signs: torchrun's agent keeps it, so
    that any rank may hang. tell(line) says why, on one rank."""

    def __init__(self, world: World, env: Mapping[str, str]):
        super().__init__(name="heartbeat", daemon=True)
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=10), wait_for_workers=False)
        attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"heartbeat{attempt}", store)
        self.world = world
        self.over = threading.Event()
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
            self.moved = now
            self.heard = dict.fromkeys(self.heard, now)
        self.last = now
        self.exchange(now)
        return self.stuck(now)

    def leave(self) -> None:
        self.over.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(str(self.world.rank), json.dumps({"left": True}))

    def exchange(self, now: float) -> None:
        """Give this rank's sign of life, and read those of all."""
        pulse = self.world.pulse
        pid = os.getpid()
        sign = {"host": platform.node(), "pid": pid, "begun": process_state(pid)[1], "at": now,
                "doing": pulse.doing, "beats": pulse.beats, "waiting": pulse.waiting,
                "limit": pulse.limits()[0]}
        self.store.set(str(self.world.rank), json.dumps(sign))
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

    def state_here(self, rank: int) -> str:
        """State letter of a rank's process; empty if it runs elsewhere."""
        sign = self.signs[rank]
        state, begun = process_state(sign["pid"])
        return state if (sign["host"], sign["begun"]) == (platform.node(), begun) else ""

    def stuck(self, now: float) -> list[int]:
        """The ranks that hold up the job: silent ones, or when nobody makes progress the
        least far of those that wait for no other."""
        at_work = {rank: sign for rank, sign in self.signs.items() if "left" not in sign}
        patience = {"T": STOPPED, "t": STOPPED, "": SILENT}
        silent = [rank for rank in at_work
                  if now - self.heard[rank] > patience.get(self.state_here(rank), math.inf)]
        limit = max([sign["limit"] for sign in at_work.values()], default=math.inf)
        if silent or now - self.moved <= limit:
            return silent
        busy = [rank for rank, sign in at_work.items() if not sign["waiting"]] or list(at_work)
        least = min(at_work[rank]["beats"] for rank in busy)
        return [rank for rank in busy if at_work[rank]["beats"] == least]

    def describe(self, stuck: Sequence[int]) -> str:
        """Who made no progress since when, in one line."""
        if len(stuck) == self.world.size:
            return f"no rank has made progress since {self.signs[0]['doing']}"
        text = "rank {} ({host}, pid {pid}) has made no progress since {doing}"
        return "; ".join(text.format(rank, **self.signs[rank]) for rank in stuck)

    def end_job(self, stuck: Sequence[int]) -> None:
        """Say it, on one rank; end what is stopped, then this process: after the ranks
        to blame, so that the launcher names them."""
        self.world.pulse.ending = True
        rank = self.world.rank
        healthy = set(range(self.world.size)) - set(stuck)
        if rank == min(healthy, default=0):
            with contextlib.suppress(Exception):
                self.tell(self.describe(stuck))
            self.kill_stopped(stuck)
        time.sleep((2 if rank in stuck else 3) * TICK)
        self.kill_stopped(stuck)
        os._exit(1)

    def kill_stopped(self, stuck: Sequence[int]) -> None:
        """SIGKILL to those of them that are stopped, on this machine."""
        for rank in stuck:
            if self.state_here(rank) in ("T", "t"):
                with contextlib.suppress(OSError):
                    os.kill(self.signs[rank]["pid"], signal.SIGKILL)


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Item indices per rank, longest first to the least loaded."""
    load = [0.0] * ranks
    share = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        r = load.index(min(load))
        load[r] += costs[i]
        share[r].append(i)
    return share


# --- signals and clocks

class Signals:
    """The first SIGINT (Ctrl-C) or SIGTERM ends training after the step under way, all
    else by Interrupted; a second ends the process, unless it follows within a second (by
    torchrun one request often arrives twice). SIGHUP, of a terminal that is gone, is
    ignored, but under torchrun, which kills its ranks 30 s later, it counts as SIGTERM."""

    def __init__(self):
        self.number = 0        # of the first signal
        self.when = 0.0        # it came, by the monotonic clock
        self.waits = False     # only remember it: inside held(), and at the end of a run

    def install(self) -> None:
        """Listen from now on; only a process's main thread can."""
        self.waits = False
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            launched = "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(signal.SIGHUP, self.receive if launched else signal.SIG_IGN)

    def receive(self, number: int, frame) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        if self.number:
            if time.monotonic() - self.when > 1:
                os._exit(128 + number)
            return
        self.number, self.when = int(number), time.monotonic()
        if not self.waits:
            raise self.error("the run was interrupted")

    def error(self, what: str, number: int = 0) -> Interrupted:
        """What ends the run, for the signal received here or on another rank."""
        if not self.number:      # what comes from now on is the second
            self.number, self.when = number, time.monotonic()
        number = number or self.number
        return Interrupted(f"{what} by {signal.Signals(number).name}", number)

    def wait(self) -> None:
        """From now on a signal only sets `number`."""
        self.waits = True

    @contextlib.contextmanager
    def held(self):
        """Inside, a signal waits; the end raises what was not obeyed."""
        self.wait()
        try:
            yield
        finally:
            self.waits = False
        if self.number:
            raise self.error("the run was interrupted")


SIGNALS = Signals()


class Clock:
    """Seconds since its start against a budget. Training: all up to the artifact on disk.
    Evaluation: from opening it to the last byte scored. `excluded`: not charged."""

    def __init__(self, budget: float = 0.0, spent: float = 0.0,
                 now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.start = now() - spent
        self.budget = budget
        self.excluded = 0.0

    def elapsed(self) -> float:
        return self.now() - self.start - self.excluded

    @contextlib.contextmanager
    def exclude(self):
        """Time spent inside is not charged, but kept for the log."""
        begin = self.now()
        yield
        self.excluded += self.now() - begin


def sync(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- files

def write_atomic(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or set "
                        "ARTIFACT_DIR") from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file if it is there and that works."""
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def refused(what: str, remedy: str):
    """Inside, whatever a foreign file makes its reader raise becomes a UserError."""
    try:
        yield
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{what}: {one_line(why, 160)}; {remedy}") from error


def file_size(path: Path, most: int, what: str) -> int:
    """Bytes of a regular file of at most `most`; UserError for anything else, before it
    is opened: a pipe would wait for ever, a device never end. what: it should be."""
    with refused(f"{path} cannot be read", f"it should be {what}"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > most:
            raise ValueError(f"it has {status.st_size:,} bytes, at most {most:,} are read")
        return status.st_size


def read_bounded(path: Path, most: int, what: str) -> bytes:
    """All bytes of a file that file_size() takes."""
    file_size(path, most, what)
    with refused(f"{path} cannot be read", f"it should be {what}"):
        return path.read_bytes()


def read_json(path: Path, what: str) -> dict:
    """The object in a JSON file; UserError when it holds anything else."""
    data = read_bounded(path, MOST_READ, what)
    with refused(f"{path} is damaged", f"it should be {what}"):
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value


def finite_only(value):
    """The value with None for every float that JSON cannot say."""
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


def in_a_line(error: BaseException) -> str:
    """Type and text of an exception, bounded."""
    return f"{type(error).__name__}: {one_line(' '.join(str(error).split()), 300)}"


def human(value) -> str:
    """A value for the log: floats short, single words bare, the rest as JSON."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.6g}"
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:.1f}"
    if isinstance(value, str) and " " not in value and (value.isprintable() or not value):
        return value
    return to_json(value, ensure_ascii=False, separators=(",", ":"))


def tell(line: str) -> None:
    """A line on stderr if that works."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


# --- the run's folder and its log

# What a summary keeps when quantising or evaluation is run again in the folder of a training.
TRAINING_KEYS = ("run_id steps step_ms train_seconds stopped seed world_size device torch "
                 "model_params code_sha256 untrained_val_bpb prequant_val_bpb data_fingerprint "
                 "val_fingerprint training_not_compliant_because artifact_digest quantising_runs "
                 "evaluation_runs").split()
# Files of writes that were killed.
LEFTOVER = re.compile(r"\.(.+\.(pt|ptz|json)(\.\w{8})+|space\.\d+|ballast)")
AVERAGE = Path("checkpoint") / "average.pt"     # in the run's folder


def read_summary(folder: Path) -> dict:
    """The summary of the run in a folder; empty when there is none."""
    path = folder / "summary.json"
    return read_json(path, "the summary of a run") if path.exists() else {}


def of_training(summary: Mapping, path: Path) -> dict:
    """What a run that goes on keeps of the summary at path; UserError if it is damaged."""
    kept = {k: summary[k] for k in TRAINING_KEYS if summary.get(k) is not None}
    for name, value in kept.items():
        good = isinstance(value, int if name.endswith("_runs") else (int, float, str))
        if name == "training_not_compliant_because":
            good = isinstance(value, list) and all(isinstance(x, str) for x in value)
        if not good:
            raise UserError(f"{path} is damaged: {name} is {value}; move it away")
    return kept


def lock_folder(folder: Path):
    """The open file whose lock says that this run owns the folder; None where the disk
    knows no locks. UserError when another live run has it."""
    path = folder / ".lock"
    for _ in range(10):
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(100).strip() or "its process is starting"
            raise UserError(f"ARTIFACT_DIR={folder} is in use by a live run ({owner}): wait "
                            "until it ends, or choose another folder") from error
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
    return None


def home_of(s: Settings) -> Path | None:
    """The folder of the run whose training, weights or artifact this one goes on with,
    if any: where the file lies, or ARTIFACT_DIR if write_somewhere put it elsewhere."""
    if s.resume:
        return Path(s.artifact_dir)
    path = Path(s.eval_only_path or s.eval_only_quantized_path)
    if not path.name:
        return None
    run_id = read_summary(Path(s.artifact_dir)).get("run_id") if s.artifact_dir else None
    if run_id and path.parent == elsewhere(run_id):
        return Path(s.artifact_dir)
    return path.parent.parent if path.parent.name == "checkpoint" else path.parent


def elsewhere(run_id: str) -> Path:
    """The folder for a run's results when its own is full."""
    return Path(tempfile.gettempdir()).absolute() / f"run-{run_id}"


def write_somewhere(run: Run, name: str, data: bytes) -> Path | None:
    """Write a result into the run's folder, or elsewhere: its path; None: nowhere."""
    for folder in (run.dir, elsewhere(run.summary["run_id"])):
        try:
            write_atomic(folder / name, data)
            return folder / name
        except UserError as error:
            run.warn(f"{name} cannot be saved there ({error})")
    return None


class Journal:
    """A file of lines that never ends a run: what cannot be written waits in memory and
    is tried again with every line."""
    MOST = 8 << 20

    def __init__(self, path: Path, fresh: bool = False):
        if fresh:
            open(path, "wb").close()
        self.path = path
        self.file = open(path, "ab", buffering=0)
        self.unwritten = b""
        self.lock = threading.Lock()      # averages are written by a thread

    def write(self, line: str) -> str:
        """Append the line, or keep it and say why."""
        with self.lock:
            self.unwritten += f"{line}\n".encode("utf-8", "replace")
            try:
                while self.unwritten:
                    written = self.file.write(self.unwritten)
                    self.unwritten = self.unwritten[written:]
            except (OSError, ValueError) as error:
                if len(self.unwritten) > self.MOST:
                    self.unwritten = self.unwritten[-self.MOST // 2:].partition(b"\n")[2]
                return str(error)
        return ""

    def mend(self) -> None:
        """Cut off the last line if a kill tore it."""
        with contextlib.suppress(OSError):
            if self.path.is_file():
                os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)


def folder_of(s: Settings, run_id: str) -> Path:
    """The folder of the files of the run of this name."""
    return Path(s.artifact_dir or Path("runs") / run_id)


class Run:
    """The run's folder and its one voice: text to train.log and the screen, JSON lines to
    metrics.jsonl. Nothing that cannot be written or shown ends the run."""

    def __init__(self, s: Settings, world: World):
        name = s.run_id or time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
        self.s, self.world, self.id = s, world, world.agree(name)
        self.dir = folder_of(s, self.id)
        self.home = world.from_main(home_of, s)
        self.weights, self.artifact = self.dir / WEIGHTS_NAME, self.dir / ARTIFACT_NAME
        self.live = sys.stdout.isatty() and world.main
        # what is not reached is not in it
        self.summary = dict(compliant=True, not_compliant_because=[], run_id=self.id)
        self.text = self.metrics = self.lock = None
        self.warned = set()         # what was warned of, and is not again
        self.time_known = True      # that of training, which quantising goes on with
        self.scored_before = {}     # the summary on disk, until there is a new score
        self.checkpoint_fits = True     # one that RESUME begins with
        self.summary_kept = True    # what is known is on disk
        self.command = ""           # the last one that was logged, to go on
        self.started = 0            # by the disk's clock in ns: files written before are another run's
        if world.main:
            world.pulse.show = Stages(self)
        if world.heartbeat is not None:
            world.heartbeat.tell = self.failed
        try:
            if world.main:
                self.open_folder()
        except UserError:
            self.close()
            raise
        except OSError as error:
            raise UserError(f"cannot write into ARTIFACT_DIR={self.dir}: "
                            f"{error.strerror or error}") from error
        self.started = world.agree(self.started)

    # --- the folder

    def open_folder(self) -> None:
        """Lock, journals, and what the summary says of a training that goes on. UserError
        unless this run may write there."""
        self.dir.mkdir(parents=True, exist_ok=True)
        check_folder(self.dir)
        self.lock = lock_folder(self.dir)
        earlier = self.check_earlier_run()
        if self.lock is not None:
            self.started = os.fstat(self.lock.fileno()).st_mtime_ns
        self.open_journals(fresh=self.home is None)
        self.text.mend()
        self.metrics.mend()
        if self.lock is None:
            self.warn(f"{self.dir} cannot be locked: start no other run in it")
        else:
            for path in [*self.dir.glob(".*"), *self.dir.glob("checkpoint/.*")]:
                if LEFTOVER.fullmatch(path.name):
                    remove(path)
        if self.goes_on():
            self.summary.update(of_training(earlier, self.dir / "summary.json"))
            if self.s.eval_only_quantized_path and earlier.get("val_bpb") is not None:
                self.scored_before = earlier
            for reason in self.summary.get("training_not_compliant_because", ()):
                self.not_compliant(reason)

    def open_journals(self, fresh: bool) -> None:
        self.text = Journal(self.dir / "train.log", fresh)
        self.metrics = Journal(self.dir / "metrics.jsonl", fresh)

    def goes_on(self) -> bool:
        """Whether this folder's own training, weights or artifact is gone on with."""
        return self.home is not None and self.home.resolve() == self.dir.resolve()

    def check_earlier_run(self) -> dict:
        """The summary of a run gone on with; UserError unless this run may write there."""
        if self.home is None:
            for name, value in self.restart_setting().items():      # at most one
                raise UserError(f"ARTIFACT_DIR={self.dir} holds what an earlier run has kept: "
                                f"choose another; to go on with it, set {name}={value} as well")
            return {}
        earlier = read_summary(self.dir)
        if earlier.get("steps") is not None and not self.goes_on():
            raise UserError(f"ARTIFACT_DIR={self.dir} holds the summary of a training, which "
                            "this run would replace: choose another")
        return earlier

    def close(self) -> None:
        if self.lock is not None:
            remove(self.dir / ".lock")
            self.lock.close()
            self.lock = None

    def save_summary(self) -> None:
        """What is known so far: after every stage, so that a crash loses no score."""
        if not self.world.main:
            return
        summary = self.summary
        if self.scored_before:
            summary = {**self.scored_before, "evaluation_runs": summary.get("evaluation_runs")}
        self.summary_kept = False
        with self.guarded("the summary"):
            write_atomic(self.dir / "summary.json", to_json(summary, indent=1).encode())
            self.summary_kept = True

    # --- the log and the screen

    def log(self, event: str, quiet: bool = False, **values) -> None:
        """A line `event key=value …` on screen and in train.log, JSON to metrics.jsonl;
        rank 0."""
        if self.text is None:
            return
        moment = round(time.time(), 3)
        self.write(self.metrics, to_json({"event": event, "time": moment, **values}))
        line = " ".join([event, *(f"{k}={human(v)}" for k, v in values.items())])
        self.write(self.text, line)
        if not quiet:
            self.say(line)
        with contextlib.suppress(Exception):
            self.note_go_on()      # a checkpoint may have come

    def write(self, journal: Journal, line: str) -> None:
        if fault := journal.write(line):
            self.warn(f"{journal.path} cannot be written ({fault}): its lines wait in memory "
                      "and are tried again; the run goes on", once=journal)

    def say(self, line: str, end: str = "\n") -> None:
        """A line on rank 0's screen if that works, in place of a live one."""
        if not self.world.main:
            return
        try:
            print(("\r\033[K" if self.live else "") + line, end=end, flush=True)
        except (OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError) or sys.stdout.closed:      # for ever
                sys.stdout = open(os.devnull, "w")
                self.live = False
            self.warn(f"the screen cannot be written ({error}): see train.log", once="screen")

    def progress(self, line: str) -> None:
        """Overwrite the live line on a terminal; nothing elsewhere."""
        if self.live:
            self.say(line[:shutil.get_terminal_size().columns - 1], end="")

    def warn(self, text: str, once=None) -> None:
        """A warning, in log and on screen; of a matter named by `once` the first only."""
        if once is None or once not in self.warned:
            self.warned.add(once)
            self.log("warning", text=text)

    def not_compliant(self, reason: str) -> None:
        """Mark the run: log, summary and closing block say why it is no result."""
        if reason not in self.summary["not_compliant_because"]:
            self.summary["compliant"] = False
            self.summary["not_compliant_because"].append(reason)
            self.log("NON-COMPLIANT", reason=reason)

    @contextlib.contextmanager
    def guarded(self, what: str):
        """Inside, a failure is a warning: reports and decorations never end a run."""
        try:
            yield
        except Exception as error:
            self.warn(f"{what} failed ({in_a_line(error)}): the run goes on without")

    # --- going on after an early end

    def restart_setting(self) -> dict[str, str]:
        """The setting that goes on from the best file of this run, if any."""
        files = [("EVAL_ONLY_PATH", self.weights)]
        if self.summary_kept:      # else only the weights say how they were trained
            files.insert(0, ("EVAL_ONLY_QUANTIZED_PATH", self.artifact))
        if not self.s.max_wallclock_seconds and self.checkpoint_fits:
            files += [("RESUME", path) for path in checkpoints_in(self.dir)]
        files.append(("EVAL_ONLY_PATH", self.dir / AVERAGE))
        for name, path in files:
            own = self.s.resume and path.parent.name == "checkpoint"      # it goes on with them
            with contextlib.suppress(OSError):
                if path.stat().st_mtime_ns >= self.started or own:
                    return {name: "1" if name == "RESUME" else str(path)}
        return {}

    def go_on(self) -> str:
        """The command that goes on from what is on disk, else that starts anew."""
        changed = {k: str(int(v) if type(v) is bool else v) for k, v in self.s.changed().items()}
        restart = self.restart_setting()
        if not restart:
            return starting_command(changed)
        left_out = ["EVAL_ONLY_PATH", "EVAL_ONLY_QUANTIZED_PATH", "RESUME"]
        if "EVAL_ONLY_QUANTIZED_PATH" in restart:      # nothing to stop at before the score
            left_out += ["QUANTIZE_ONLY", "PREQUANT_ONLY"]
        changed = {k: v for k, v in changed.items() if k not in left_out}
        return starting_command({**changed, "ARTIFACT_DIR": str(self.dir), **restart})

    def note_go_on(self) -> None:
        """Log that command when it has changed: it is read after a kill."""
        if self.text is None:
            return
        command = self.go_on()
        if command != self.command:
            self.command = command
            self.log("go_on", quiet=True, command=command)

    def failed(self, line: str, trace: str = "", again: bool = True,
               event: str = "error") -> None:
        """The last words of a run: the error, its trace in the log alone, the command to
        go on. again: whether to start anew may help."""
        tell(f"{event}: {line}")
        if self.text is None:      # not rank 0: beside its lines, where the folder is shared
            with contextlib.suppress(OSError):
                self.open_journals(fresh=False)
        self.log(event, quiet=True, text=line, **({"trace": trace} if trace else {}))
        with self.guarded("the command to go on"):
            restart = self.restart_setting()
            same = self.s.resume and "RESUME" in restart      # it would fail again
            if again or restart and not same:
                tell(f"to go on: {self.go_on()}")


def this_python() -> str:
    """How a shell calls this Python: by its name where that finds it, else by its path."""
    name = os.path.basename(sys.executable)
    if shutil.which(name) == sys.executable:
        return name
    return shlex.quote(sys.executable.removeprefix(f"{os.getcwd()}/"))


def starting_command(changed: Mapping[str, str]) -> str:
    """The command that starts this script as it was started, under these settings."""
    env, python, script = os.environ, this_python(), "train_gpt.py"
    if sys.argv[0].endswith(".py"):
        script = shlex.quote(sys.argv[0].removeprefix(f"{os.getcwd()}/"))
    start = f"{python} {script}"
    size = env.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in env:      # torchrun started it
        nodes, local = env.get("GROUP_WORLD_SIZE", "1"), env.get("LOCAL_WORLD_SIZE", "1")
        where = "--standalone" if nodes == "1" else f"--nnodes={nodes} …"
        start = f"{python} -m torch.distributed.run {where} --nproc_per_node={local} {script}"
    elif size != "1":
        start = f"RANK=… WORLD_SIZE={size} MASTER_ADDR=… MASTER_PORT=… {start}"
    words = [f"{name}={shlex.quote(value)}" for name, value in changed.items()]
    return " ".join([*words, start])


# --- what the log says at the start

def public_settings(values: Mapping) -> dict:
    """Settings without the paths of this machine."""
    return {k: v for k, v in values.items() if not k.endswith(("_PATH", "_DIR"))}


def log_start(s: Settings, world: World, run: Run) -> None:
    """What runs, where: into the log before anything else."""
    parameters = sum(map(math.prod, GPT.shapes(s).values()))
    settings = public_settings(s.as_env())
    dtype = pick_dtype(s.compute_dtype, world.device)
    run.log("start", run_id=run.id, device=world.device_name, world_size=world.size,
            torch=torch.__version__, python=platform.python_version(), dtype=str(dtype),
            attention=ATTENTION, parameters=parameters)
    run.log("settings", quiet=True, **settings)
    run.log("changed_settings", quiet=True, **public_settings(s.changed()))
    if ignored := {k: why for k, (_, why) in NO_SETTINGS.items() if k in os.environ}:
        run.log("settings_without_effect", **ignored)
    if strays := stray_names(os.environ):
        run.log("unknown_names", **strays)
    source = script_source()
    form = shipped_form(s)
    digest = hashlib.sha256(source).hexdigest()
    shipped = code_bytes(form)
    run.log("code", bytes=len(source), form=form, shipped=shipped, sha256=digest)
    if world.main and run.summary.get("code_sha256") != digest:      # else the log has it
        encoding = "latin-1" if source.startswith(b"# coding: latin-1") else "utf-8"
        run.write(run.text, source.decode(encoding) + "\n" + "=" * 100)
    run.summary.update(code_bytes=shipped, code_form=form)
    compare_with_training(run, dict(
        seed=s.seed, world_size=world.size, device=world.device_name, torch=torch.__version__,
        model_params=parameters, code_sha256=digest, code_form=form, settings=settings))


MAY_DIFFER = ("RUN_ID", "QUANTIZE_ONLY", "PREQUANT_ONLY", "RESUME", "settings", "seed")


def compare_with_training(run: Run, here: dict) -> None:
    """Facts and settings into the summary, and a warning of those that training did not
    have. In a run's own folder the summary keeps what was true of its training."""
    differing = {}
    with run.guarded("the comparison with training"):
        there = in_training(run)
        for name, value in {**here, **here["settings"]}.items():
            if name not in MAY_DIFFER and there.get(name, value) != value:
                differing[name] = [value, there[name]]
    if differing:
        run.warn("not as in the summary beside the weights: " + "; ".join(
            f"{name}={here} here, {there} there" for name, (here, there) in differing.items()))
    if run.goes_on():
        run.summary["not_as_in_training"] = differing
        here = {k: v for k, v in here.items() if k == "settings" or k not in run.summary}
    run.summary.update(here)


def in_training(run: Run) -> dict:
    """Facts and settings, by name, of the training that this run goes on with."""
    if run.home is None or not run.world.main:
        return {}
    summary = read_summary(run.home)
    there = {**summary, **summary.get("settings", {})}
    for name, (_, trained) in summary.get("not_as_in_training", {}).items():
        there[name] = trained      # scored differently before: training is what counts
    return there


# --- watching training

class Progress:
    """Says how training goes: in the log now and then, on a terminal all the time."""

    def __init__(self, s: Settings, world: World, run: Run, times: StepTimes, budget: float):
        self.s, self.world, self.run, self.times, self.budget = s, world, run, times, budget
        self.last = (0, 0.0)               # step and seconds of the line before
        self.losses: list[Tensor] = []     # of the steps since then, on the device

    def report(self, step: int, clock: Clock, loss: Tensor, norm: Tensor, rate_share: float,
               plan: Plan) -> None:
        """A line in the log (ten steps, then every TRAIN_LOG_EVERY), or two a second on a
        terminal; and the parts of a measured step."""
        s = self.s
        looping = plan.slots > s.num_layers
        if self.times.parts:
            self.run.log("step_time", quiet=True, step=step, looping=looping,
                         parts=self.times.parts)
            self.times.parts = None
        self.losses.append(loss)
        logged = step <= 10 or (s.train_log_every and step % s.train_log_every == 0)
        if not logged and not (self.run.live and clock.elapsed() - self.last[1] > 0.5):
            return
        loss = self.log_losses(step) if logged else loss.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            return                     # FiniteWatch ends the run; JSON has no word for it
        pace = self.pace(step, clock.elapsed())
        of = "budget" if self.budget else "the steps"
        line = (f"step {step:5d}  loss {loss:7.4f}  {pace['ms']:7.1f} ms/step "
                f"(mean {pace['ms_mean']:.1f})  {pace['tok_s']:,} tok/s  "
                f"{pace['used']:4.0%} of {of}, {pace['eta']:.0f} s left")
        line += "  looping" * looping
        if not logged:
            return self.run.progress(line)
        self.run.log("train", quiet=True, step=step, loss=loss, norm=norm.item(),
                     lr=rate_share, looping=looping, **pace)
        self.run.say(line)

    def log_losses(self, step: int) -> float:
        """Log the loss of every step since the line before, mean over the ranks; that of
        this step, the last of them."""
        losses = (self.world.total(torch.stack(self.losses)) / self.world.size).tolist()
        self.losses = []
        self.run.log("losses", quiet=True, step=step, losses=[round(x, 4) for x in losses])
        return losses[-1]

    def end(self, trainer: Trainer, watch: FiniteWatch, step: int) -> int:
        """After the last step, which is logged: the first that went wrong on any rank; 0: none."""
        if self.losses:
            self.log_losses(step)
        bad = watch.first_bad(wait=True) or (0 if trainer.finite() else step)
        return self.world.agree_step(0.0, 0, bad)[2]

    def pace(self, step: int, elapsed: float) -> dict[str, float]:
        """Speed since the line before, and how far the training is."""
        steps = step - self.last[0]
        seconds = max(elapsed - self.last[1], 1e-9)
        self.last = (step, elapsed)
        rate = self.s.train_batch_tokens * steps / seconds
        used = elapsed / self.budget if self.budget else step / self.s.iterations
        return {"ms": 1e3 * seconds / steps, "ms_mean": 1e3 * elapsed / step,
                "tok_s": round(rate), "elapsed": elapsed, "used": min(used, 1.0),
                "eta": elapsed * (1 / used - 1)}


class Stages:
    """Says how far a stage is that has no lines of its own: on a terminal all the time, in
    the log now and then."""
    LOG_EVERY, SHOW_EVERY = 30.0, 0.5      # seconds

    def __init__(self, run: Run):
        self.run = run
        self.stage = ""
        self.begun, self.before = 0.0, 0.0      # when, and what share was done by then
        self.done = 0.0
        self.logged = self.shown = 0.0

    def __call__(self, doing: str, done: float) -> None:
        now = time.monotonic()
        stage = re.sub(r"\d", "", doing)
        if stage != self.stage or done < self.done:
            self.stage, self.begun, self.before = stage, now, done
            self.logged = now
        self.done = done
        if done <= self.before or now - self.shown < self.SHOW_EVERY:
            return
        self.shown = now
        left = (1 - done) * (now - self.begun) / (done - self.before)
        if now - self.logged >= self.LOG_EVERY:
            self.logged = now
            self.run.log("progress", doing=doing, done=done, seconds_left=left)
        else:
            self.run.progress(f"{doing}  {done:4.0%}, {left:.0f} s left")


class FiniteWatch:
    """Notices the first step whose loss or gradient is not finite, a few steps late: flags
    are read once they have arrived on the host."""

    def __init__(self):
        self.flying = deque()
        self.bad = 0

    def record(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at a step's loss and gradient norm, scalars on the device."""
        flag = torch.isfinite(loss) & torch.isfinite(norm)
        arrived = None
        if flag.is_cuda:
            box = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag = box.copy_(flag, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.flying.append((step, flag, arrived))

    def first_bad(self, wait: bool = False) -> int:
        """The first bad step whose flag is here, else 0; wait: for all flags."""
        while self.flying and not self.bad:
            step, flag, arrived = self.flying[0]
            if arrived is not None:
                if not wait and not arrived.query():
                    break
                arrived.synchronize()
            self.flying.popleft()
            if not flag.item():
                self.bad = step
        return self.bad

    @staticmethod
    def error(step: int) -> UserError:
        return UserError(f"the loss or the gradient is not finite at step {step}: lower "
                         "MATRIX_LR or SCALAR_LR, or look for the cause with COMPUTE_DTYPE="
                         "float32")


def off_the_clock(world: World, clock: Clock, work: Callable[[], None]) -> None:
    """Do the work while the clock stands; steps queued on a GPU are charged before."""
    sync(world.device)
    with clock.exclude():
        work()
        sync(world.device)


class StepTimes:
    """Where the time of some steps of a training goes."""

    def __init__(self, world: World):
        self.world = world
        self.to_measure = [0.1, 0.5, 0.9]              # shares of training whose next step is timed
        self.parts: dict[str, float] | None = None     # on a measured step: ms by part

    def measure(self, progress: float) -> None:
        """Make the next step a measured one, when it is time."""
        if self.to_measure and progress >= self.to_measure[0]:
            self.to_measure = [share for share in self.to_measure if share > progress]
            sync(self.world.device)
            self.parts, self.stopwatch = {}, Clock()

    def charge(self, part: str) -> None:
        """On a measured step: charge the ms since the last call to this part."""
        if self.parts is not None:
            sync(self.world.device)
            self.parts[part] = self.parts.get(part, 0.0) + 1e3 * self.stopwatch.elapsed()
            self.stopwatch = Clock()


# --- averages beside training

class AverageKeeper:
    """Keeps a finite average of the weights on disk: rank 0 copies it on the device, a
    thread checks and writes it. The newest two stay until the artifact is written."""

    SECONDS = 25.0         # between two copies: the newest is then less than a minute old

    def __init__(self, s: Settings, world: World, run: Run, trainer: Trainer, clock: Clock):
        self.s, self.world, self.run, self.clock = s, world, run, clock
        self.average = trainer.ema
        self.writer = ThreadPoolExecutor(1)
        self.job = None
        self.copy: dict[str, Tensor] = {}
        self.last = -math.inf

    def offer(self, step: int) -> None:
        """After a step: copy the average when it is time and the writer is idle."""
        if self.job is not None and self.job.done():
            self.finish()
        due = time.monotonic() - self.last >= self.SECONDS
        if self.world.main and due and self.job is None:
            self.start(step, f"average of step {step}")

    def start(self, step: int, stopped: str) -> None:
        """Copy the average, in the GPU's queue, and let the thread write it."""
        self.last = time.monotonic()
        if not self.copy:
            self.copy = {n: torch.empty_like(t) for n, t in self.average.items()}
        torch._foreach_copy_(list(self.copy.values()), list(self.average.values()))
        stream = contextlib.nullcontext()
        if self.world.device.type == "cuda":      # to the host by a stream of its own: no step waits
            own = torch.cuda.Stream(self.world.device)
            own.wait_stream(torch.cuda.current_stream(self.world.device))
            stream = torch.cuda.stream(own)
        facts = weight_facts(self.s, self.world, step, self.clock.elapsed(), stopped)
        self.job = self.writer.submit(self.write, stream, facts)

    def write(self, stream, facts: dict) -> str:
        """In the thread: write the copy if it is finite; what was written."""
        with stream:
            tensors = {n: t.cpu() for n, t in self.copy.items()}
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            return ""
        path = self.run.dir / AVERAGE
        previous = path.with_name("average.previous.pt")
        data = weights_to_bytes(self.s, tensors, facts)
        remove(previous)
        with contextlib.suppress(OSError):     # no average yet, or a file system without hard links
            os.link(path, previous)
        write_atomic(path, data)
        self.run.note_go_on()      # at once: a kill may come before the next line
        return facts["stopped"]

    def finish(self) -> None:
        """Wait for the thread, and log what it has done."""
        if self.job is None:
            return
        try:
            if written := self.job.result():
                self.run.log("average", quiet=True, of=written)
        except Exception as error:
            why = in_a_line(error)
            self.run.warn(f"an average could not be kept beside training ({why})", once="average")
        self.job = None

    def close(self, step: int, stopped: str) -> None:
        """Wait for the writer; then write the average at which training was stopped."""
        self.world.beat("saving the average")
        self.finish()
        if step and stopped and self.world.main:
            self.start(step, stopped)
            self.finish()
        self.writer.shutdown()


def weight_facts(s: Settings, world: World, steps: int, seconds: float, stopped: str) -> dict:
    """What a file of weights says of its training; stopped: how it ended early."""
    return {"steps": steps, "train_seconds": seconds, "step_ms": 1e3 * seconds / max(steps, 1),
            "stopped": stopped, "seed": s.seed, "world_size": world.size}


# --- checkpoints to go on from, for runs without a time budget

class Checkpoints:
    """Writes all that a training must know to go on to the bit; rank 0 alone does."""

    def __init__(self, s: Settings, world: World, run: Run, trainer: Trainer, watch: FiniteWatch,
                 clock: Clock):
        self.s, self.world, self.run, self.trainer = s, world, run, trainer
        self.watch, self.clock = watch, clock
        self.last = None

    def offer(self, step: int, elapsed: float, curriculum: Curriculum, stream: Prefetch) -> None:
        """Before a step, at `elapsed` seconds: write one when it is time."""
        if self.last is None:
            self.last = elapsed
        elif elapsed - self.last >= self.s.checkpoint_every_seconds:
            self.write(step, curriculum, stream)
            self.last = elapsed

    def write(self, step: int, curriculum: Curriculum, stream: Prefetch) -> None:
        """Write one; without space, or with weights that are not finite, the last stays."""
        if not self.s.checkpoint_every_seconds or not step:
            return
        before = self.world.pulse.doing
        self.world.beat(f"saving a checkpoint of step {step}")
        own = [part.cpu() for part in self.trainer.optimiser.momentum]
        made_with = self.s.to_be_stored(training_settings(self.s, self.world))
        state = {
            **self.trainer.tensors(),
            "momentum": self.world.gather(own),
            "settings": {**made_with, "WORLD_SIZE": self.world.size},
            "step": step,
            "seconds": self.clock.elapsed(),
            "batches": stream.given,
            "curriculum": curriculum.state(),
            "untrained_val_bpb": self.run.summary.get("untrained_val_bpb")}
        fault = self.world.from_main(self.write_file, state)
        self.world.beat(before)
        if fault:
            return self.run.warn(f"no checkpoint at step {step}: {fault}", once="checkpoint")
        self.run.log("checkpoint", quiet=True, step=step)

    def write_file(self, state: dict) -> str:
        """Why it cannot be written, else nothing."""
        try:
            if self.watch.first_bad(wait=True) or not self.trainer.finite():
                return "weights that are not finite"
            path = self.run.dir / "checkpoint" / f"resume.{state['step']}.pt"
            write_atomic(path, sealed(state))
        except (UserError, ValueError, RuntimeError, MemoryError) as error:
            return one_line(error, 200)
        for older in checkpoints_in(self.run.dir):
            if older != path:
                remove(older)
        return ""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, by rising step."""
    steps = {}
    for path in folder.glob("checkpoint/resume.*.pt"):
        step = path.name.split(".")[1]
        if step.isdecimal():
            steps[path] = int(step)
    return sorted(steps, key=steps.get)


def remove_safety_copies(run: Run) -> None:
    """Remove, on rank 0, averages and checkpoints, once the weights are there."""
    if not run.world.main or not (run.dir / WEIGHTS_NAME).is_file():
        return
    for path in [*checkpoints_in(run.dir), *run.dir.glob("checkpoint/average*.pt")]:
        remove(path)
    with contextlib.suppress(OSError):
        (run.dir / "checkpoint").rmdir()      # unless files of others are in it


def training_settings(s: Settings, world: World) -> dict:
    """The settings on which a step depends."""
    names = ["SEED", "ITERATIONS", "COMPUTE_DTYPE", "MUON_DTYPE"]
    for group in ("data", "model", "optimiser"):
        names += group_names(group)
    where = ("DATA_", "TOKENIZER_", "VAL_")
    values = {k: v for k, v in s.as_env().items() if k in names and not k.startswith(where)}
    return {**values, "WORLD_SIZE": world.size}


def read_checkpoint(s: Settings, world: World, run: Run) -> dict:
    """The newest checkpoint, with this rank's momentum; UserError when none fits."""
    run.checkpoint_fits = False
    state = world.from_main(newest_checkpoint, s, world, run)
    state["momentum"] = state["momentum"][world.rank]
    run.checkpoint_fits = True
    run.log("resume", step=state["step"], seconds=state["seconds"])
    return state


def newest_checkpoint(s: Settings, world: World, run: Run) -> dict:
    """What Checkpoints wrote last."""
    again = "start anew without RESUME, in another ARTIFACT_DIR"
    if (run.dir / AVERAGE).is_file():
        again += f", or quantise by EVAL_ONLY_PATH={run.dir / AVERAGE}"
    found = checkpoints_in(run.dir)
    if not found:
        raise UserError(f"RESUME=1 finds no checkpoint in {run.dir / 'checkpoint'}: {again}")
    path = found[-1]
    most = CHECKPOINT_COPIES * bytes_of_weights(s) + SMALL_PARTS
    state = unsealed(path, most, f"RESUME=1: {path}", again)
    ours, usual = training_settings(s, world), training_settings(Settings(), world)
    check_made_with(ours, usual, state.get("settings"), f"RESUME=1: {path.name} is", again)
    return state


def go_on_from(state: Mapping[str, Any], trainer: Trainer, curriculum: Curriculum) -> int:
    """Put everything where the checkpoint had it; the step to go on after."""
    trainer.restore(state)
    vars(curriculum).update(state["curriculum"])
    return state["step"]


@torch.no_grad()
def restore_tensors(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Copy a checkpoint's state into the trainer's tensors() and its AdamW."""
    own = trainer.tensors()
    try:
        for part in ("weights", "average"):
            for name, tensor in own[part].items():
                tensor.copy_(state[part][name])
        for buf, saved in zip(own["momentum"], state["momentum"], strict=True):
            buf.copy_(saved)
        trainer.optimiser.adam.load_state_dict(state["adam"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit this model ({type(error).__name__}: "
                        f"{error}): start anew without RESUME") from error


# --- what is declared of parameters

def declared_shape(s: Settings, shape: str) -> tuple[int, ...]:
    """A Parameter's shape under these settings."""
    sizes = []
    for size in shape.split():
        factors = [int(x) if x.isdigit() else getattr(s, x) for x in size.split("*")]
        sizes.append(math.prod(factors))
    return tuple(sizes)


def begin_as(start, p: Tensor, s: Settings, generator: torch.Generator | None) -> None:
    """Give a parameter its first values, by Parameter.start."""
    if callable(start):
        start(p, s, generator)
    else:
        p.copy_(torch.tensor(getattr(s, start) if isinstance(start, str) else start))


def field_views(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the field's names (`blocks.3.attn.q_gain`,
    `tok_emb.weight`, …), as views: one per layer, where ours are stacked."""
    views = {}
    for name, p in params.items():
        parameter = PARAMETERS[name]
        if parameter.role == "matrix":
            views[name] = p
        elif "{}" in parameter.names:
            for layer in range(len(p)):
                views[parameter.names.format(layer)] = p[layer]
        else:
            views[parameter.names or name] = p
    return views


def matrix_views(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """field_views with the banks split into matrices (`blocks.3.mlp.fc.weight`)."""
    views = field_views(params)
    for bank in params:
        if PARAMETERS[bank].role != "matrix":
            continue
        names = PARAMETERS[bank].names.split()
        parts = views.pop(bank).chunk(len(names))
        for name, part in zip(names, parts):
            for layer in range(len(part)):
                views[name.format(layer)] = part[layer]
    return views


@functools.cache
def parameter_of(view: str) -> Parameter:
    """The declaration behind a name of matrix_views."""
    pattern = re.sub(r"\.\d+\b", ".{}", view)
    for name, parameter in PARAMETERS.items():
        if pattern in (parameter.names or name).split():
            return parameter
    raise KeyError(f"{view} is of no row of PARAMETERS")


# --- files of weights

SEAL = b"blake2b:"     # then 64 hexadecimal digits: the comment that ends a sealed archive
SEAL_BYTES = len(SEAL) + 64
AS_WRITTEN = "give the file as a run wrote it"
SMALL_PARTS = 16 << 20     # bytes that a file of weights may have beside them
CHECKPOINT_COPIES = 5      # of the weights: they, average, momentum and AdamW's moments


def sealed(box: dict) -> bytes:
    """torch.save's archive of `box`, which does not check its sums, with a digest of it
    as its comment, which torch.load passes over."""
    out = io.BytesIO()
    torch.save(box, out)
    body = out.getvalue()[:-2] + struct.pack("<H", SEAL_BYTES)
    return body + seal_of(body)


def seal_of(body: bytes) -> bytes:
    """The comment that ends a sealed archive of these bytes."""
    return SEAL + hashlib.blake2b(body, digest_size=32).hexdigest().encode()


def unsealed(path: Path, most: int, what: str, remedy: str = AS_WRITTEN) -> dict:
    """What sealed() wrote to a file of at most `most` bytes. UserError for all else, at
    once: nothing is unpickled before its digest fits."""
    with refused(what, remedy):
        data = read_bounded(path, most, "a file that a run wrote")
        if data[-SEAL_BYTES:] != seal_of(data[:-SEAL_BYTES]):
            raise ValueError("it is damaged, or not as train_gpt.sealed writes it")
        return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def weights_to_bytes(s: Settings, params: Mapping[str, Tensor], facts: dict) -> bytes:
    """The file of weights, with their architecture and facts of their training."""
    weights = {n: p.detach().cpu() for n, p in field_views(dict(params)).items()}
    made_with = s.to_be_stored(architecture(s))
    return sealed({"architecture": made_with, "weights": weights, "facts": facts})


def save_weights(run: Run, model: GPT, facts: dict) -> None:
    """The averaged weights to disk; without space for them the run goes on all the same."""
    path = None
    if run.world.main:
        drop_ballast(run)
        data = weights_to_bytes(model.s, dict(model.named_parameters()), facts)
        path = write_somewhere(run, WEIGHTS_NAME, data)
        if path is None:
            run.warn("the weights could not be saved anywhere: they are only in memory")
        elif path != run.weights:
            run.warn(f"the weights were saved as {path}: EVAL_ONLY_PATH={path} "
                     f"ARTIFACT_DIR={run.dir} goes on")
    run.weights = run.world.agree(path) or run.weights


def read_weights(path: str, model: GPT) -> dict:
    """A file of averaged weights into the model; its facts (see weight_facts)."""
    what = f"EVAL_ONLY_PATH={path}"
    box = unsealed(Path(path), bytes_of_weights(model.s) + SMALL_PARTS, what)
    with refused(what, AS_WRITTEN):
        weights, facts = box["weights"], box["facts"]
        check_architecture(model.s, box["architecture"], "it holds weights")
        form = (torch.float32, torch.strided)
        odd = [n for n, w in weights.items() if (w.dtype, w.layout) != form]
        if not odd:
            load_weights(model, weights, "it", field_views)
            odd = [n for n, w in weights.items() if not w.isfinite().all()]
        if odd:
            raise ValueError(f"{odd[0]} is not of finite float32 numbers")
        if set(facts) != set(weight_facts(model.s, World(), 0, 0.0, "")):
            raise ValueError("it does not say how the weights were trained")
    return facts


def take_over(s: Settings, run: Run, facts: Mapping) -> Clock:
    """The training clock that quantising goes on with. Only in the folder of the run that
    trained is the time known: it is what the weights say."""
    run.time_known = run.goes_on()
    seconds = facts["train_seconds"] if run.time_known else 0.0
    clock = Clock(s.max_wallclock_seconds, seconds)
    if run.time_known:
        steps, step_ms = facts["steps"], facts["step_ms"]
        if "steps" not in run.summary:      # killed in training: nothing has said it yet
            run.log("train_end", steps=steps, seconds=seconds, step_ms=step_ms)
        run.summary.update(steps=steps, step_ms=step_ms, stopped=facts["stopped"] or None)
    return clock


@torch.no_grad()
def load_weights(model: GPT, weights: Mapping[str, Tensor], origin: str,
                 names: Callable = matrix_views) -> None:
    """Copy weights, named as by `names`, into the model; UserError unless they fit."""
    views = names({n: p.data for n, p in model.named_parameters()})
    wrong = sorted(set(views) ^ set(weights))
    if not wrong:
        wrong = [n for n in views if views[n].shape != weights[n].shape]
    if wrong:
        raise UserError(f"{origin} does not fit the settings' model: "
                        f"{len(wrong)} tensors differ ({', '.join(wrong[:3])}…); "
                        "use the settings it was made with")
    for name, view in views.items():
        view.copy_(weights[name])


# --- the artifact, its verdict and its scores

def check_budget(run: Run, what: str, seconds: float, name: str, setting: float) -> None:
    """Over its setting (0: none) or the competition's budget a run is NON-COMPLIANT."""
    for budget, of in ((BUDGET_SECONDS, "the competition's"), (setting or math.inf, name)):
        if seconds > budget:
            run.not_compliant(f"{what} took {seconds:.1f} s of {of} {budget:g} s")
            return


def marked(blob: bytes, why: str) -> bytes:
    """The artifact with a mark, of at most MARK_BYTES, why it is NON-COMPLIANT."""
    header, streams = artifact_from_bytes(blob, ARTIFACT_NAME)
    reasons = filter(None, [header.get("not_compliant"), plain_mark(why)[:MARK_BYTES - 32]])
    header["not_compliant"] = plain_mark("; ".join(reasons))
    return artifact_to_bytes(header, streams)


def plain_mark(text: str) -> str:
    """A mark as it is written and read: bounded ASCII, one byte each in JSON."""
    return re.sub(r'[^ -~]|["\\]', "?", text[:MARK_BYTES])


def write_artifact(s: Settings, run: Run, blob: bytes, clock: Clock) -> tuple[float, int]:
    """On rank 0: seconds of training's clock, and bytes. The artifact is judged when its
    bytes are on disk, and gets its name only when mark and summary say the verdict: no
    kill comes between."""
    count_up(run, "quantising_runs")
    unjudged = write_somewhere(run, f".{ARTIFACT_NAME}.unjudged", blob)
    if unjudged is None:
        raise UserError("the artifact could not be saved anywhere: free space in ARTIFACT_DIR="
                        f"{run.dir}, which needs {len(blob):,} bytes")
    path = unjudged.with_name(ARTIFACT_NAME)
    seconds = clock.elapsed()
    if not run.time_known:
        run.not_compliant("the weights come from EVAL_ONLY_PATH: their training time is not "
                          "known")
    else:
        check_budget(run, "training, calibration and packing (for which GPTQ_RESERVE_SECONDS "
                     "keeps time)", seconds, "MAX_WALLCLOCK_SECONDS", s.max_wallclock_seconds)
    of_scoring = study_reasons(s)
    of_training = [why for why in run.summary["not_compliant_because"] if why not in of_scoring]
    if of_training:
        blob = marked(blob, "; ".join(of_training))
        write_atomic(unjudged, blob)
    run.summary.update(
        artifact_bytes=len(blob), artifact_digest=digest_of(blob).hex(),
        total_bytes=len(blob) + code_bytes(shipped_form(s)), train_seconds=seconds,
        training_not_compliant_because=of_training)
    run.save_summary()
    os.replace(unjudged, path)
    if path != run.artifact:
        run.warn(f"the artifact was saved as {path}")
        run.artifact = path
    return seconds, len(blob)


def count_up(run: Run, key: str) -> None:
    """One more run of a stage that can be run again in the same folder."""
    run.summary[key] = run.summary.get(key, 0) + 1


def open_artifact(s: Settings, world: World, model: GPT, path: Path) -> tuple[int, str, str]:
    """The weights of the artifact at path into the model; its size, mark and digest."""
    blob = world.from_main(read_bounded, path, MOST_READ, f"a run's {ARTIFACT_NAME}")
    artifact = read_artifact(s, blob, path.name)
    load_weights(model, artifact.weights, path.name)
    raw = artifact.calibration
    model.calibration = None if raw is None else calibrated_by(s, raw.to(world.device))
    return len(blob), artifact.mark, digest_of(blob).hex()


def log_score(run: Run, stage: str, score: Score, ledger: Ledger, clock: Clock) -> None:
    """A stage's score, into the summary at once, and off the clock its profiles."""
    check_score(stage, score)
    run.log(f"score_{stage}", val_loss=score.loss, val_bpb=score.bpb, elapsed=clock.elapsed())
    run.summary[f"{stage}_val_bpb"] = score.bpb
    with clock.exclude():
        run.save_summary()
        with run.guarded(f"the profiles of {stage}"):
            for profile in profiles(ledger):
                run.log("profile", quiet=True, stage=stage, **profile)


def check_score(stage: str, score: Score) -> None:
    """UserError for a score that is not finite."""
    if not math.isfinite(score.bpb):
        raise UserError(f"the score of the stage {stage} is {score.bpb}: the weights are of no "
                        "use (too large a learning rate?); train again, with a lower MATRIX_LR")


def closing_block(run: Run) -> None:
    """Every score, size and time, and one last line that is easy to grep."""
    summary = {k: v for k, v in run.summary.items() if v is not None}
    run.say("\n" + "-" * 72)
    for label, stage in (("untrained", "untrained"), ("averaged weights", "prequant"),
                         ("quantised", "quantized"), ("sliding windows", "sliding"),
                         ("test-time training", "ttt")):
        if f"{stage}_val_bpb" in summary:
            run.say(f"{label:28} {summary[f'{stage}_val_bpb']:10.5f} BPB")
    if summary.get("artifact_bytes"):
        run.say(f"{'artifact + script':28} {summary['artifact_bytes']:,} + "
                f"{summary['code_bytes']:,} = {summary['total_bytes']:,} of {ARTIFACT_LIMIT:,} "
                f"bytes, script {summary['code_form']}")
    run.say(f"{'files for report.py':28} {run.dir}")
    for reason in summary["not_compliant_because"]:
        run.say(f"NON-COMPLIANT: {reason}")
    run.say("-" * 72)
    keys = ("val_bpb", "sliding_val_bpb", "quantized_val_bpb", "total_bytes", "steps",
            "train_seconds", "eval_seconds", "tokens_scored", "seed")
    run.log("final", **{k: summary[k] for k in keys if k in summary})


PROFILE_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)


def profiles(ledger: Ledger) -> Iterator[dict]:
    """Of closed books: documents, targets, bytes and nats by position in a document, and by
    a document's length."""
    start, length = ledger.val.documents.start, ledger.val.documents.length - 1
    cuts = start[:, None] + np.minimum(length[:, None], [*PROFILE_EDGES, 1 << 62])
    amounts = {"tokens": np.diff(cuts)}      # each (documents, buckets)
    for name, values in (("bytes", ledger.val.target_bytes), ("nats", ledger.total)):
        before = np.append(0, values.cumsum())
        amounts[name] = np.diff(before[cuts])
    reached = amounts["tokens"] > 0
    sums = {name: x.sum(0).tolist() for name, x in amounts.items()}
    yield {"by": "position", "edges": PROFILE_EDGES, "documents": reached.sum(0).tolist(), **sums}
    bucket = np.searchsorted(PROFILE_EDGES, length, "right") - 1     # of the whole document
    within = bucket[:, None] == np.arange(len(PROFILE_EDGES))
    sums = {name: (x.sum(1) @ within).tolist() for name, x in amounts.items()}
    documents = within[length > 0].sum(0).tolist()
    yield {"by": "length", "edges": PROFILE_EDGES, "documents": documents, **sums}


def log_train_end(s: Settings, run: Run, facts: dict, epochs: float) -> None:
    """Length and speed of a training, into log and summary."""
    steps, step_ms = facts["steps"], facts["step_ms"]
    run.log("train_end", steps=steps, seconds=facts["train_seconds"], step_ms=step_ms,
            epochs=epochs, tokens=steps * s.train_batch_tokens)
    run.summary.update(steps=steps, step_ms=step_ms, stopped=facts["stopped"] or None)


def log_adaptation(s: Settings, run: Run, val: Validation, clock: Clock) -> None:
    """How often the base weights learn, and which settings cannot act, into the log."""
    lengths = val.documents.length
    *phases, _ = ttt_rounds(s, lengths)
    steps = sum(len(phase_steps(s, int(lengths[phase.train_on].sum()))) for phase in phases)
    run.log("ttt", phases=len(phases), base_weight_steps=steps, elapsed=clock.elapsed())
    idle = {}
    if s.ttt_step_share and s.ttt_lora_lr:
        why = f"TTT_STEP_SHARE={s.ttt_step_share:g} sets each step's rate: set it to 0 for a fixed one"
        idle = {name: why for name in ("TTT_LORA_LR", "TTT_LOCAL_LR_MULT") if name in s.changed()}
    if s.phased_ttt_prefix_docs and len(phases) < s.phased_ttt_num_phases:
        idle["PHASED_TTT_NUM_PHASES"] = f"{len(lengths):,} documents make {len(phases)} phases"
    if idle:
        run.log("settings_without_effect", **idle)


# --- the end of a process

# What takes less memory, by the first word of what a rank was doing; else it was training.
LESS_MEMORY = {"scoring": "lower VAL_BATCH_TOKENS", "adapting": "lower TTT_BATCH_SIZE",
               "measuring": "set QUANT_MEASURED=0", "quantising": "free memory on the host"}


def open_screens() -> None:
    """A screen of ASCII gets ? for what it cannot show; a closed one is replaced."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):
            getattr(sys, name).reconfigure(errors="replace")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or GPU had no more memory to give."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    words = re.search("out of memory|can(no|')t allocate memory", str(error), re.IGNORECASE)
    return isinstance(error, (RuntimeError, OSError)) and words is not None


def account_of(error: BaseException, doing: str, rank: int) -> tuple[int, str, str]:
    """Of an error: the exit status, it in a line, and its trace if that is all that is known."""
    if isinstance(error, Interrupted):
        return error.status, str(error), ""
    if isinstance(error, UserError):
        return 2, str(error), ""
    if is_out_of_memory(error):
        less = LESS_MEMORY.get(doing.split()[0], "raise GRAD_ACCUM_STEPS, or lower TRAIN_BATCH_TOKENS")
        return 2, f"out of memory at \"{doing}\" on rank {rank} ({in_a_line(error):.160}): {less}", ""
    return 1, in_a_line(error), "".join(traceback.format_exception(error))


def end_early(error: BaseException, run: Run | None, rank: int) -> int:
    """Say in one line why the run ends, and how to go on; the exit status."""
    SIGNALS.wait()      # a signal cannot end the end
    if SIGNALS.number and not isinstance(error, (UserError, Interrupted)):
        # a collective broke because another rank obeyed first
        error = SIGNALS.error("the run was interrupted")
    pulse = run.world.pulse if run is not None else Pulse()
    if rank:
        time.sleep(2)     # rank 0 says it, unless it alone did not see the mistake
    if pulse.ending:      # the heartbeat has said why and is about to end this process
        time.sleep(60)
    if rank and SIGNALS.number:      # rank 0 has said it, and the launcher ends the others
        return 128 + SIGNALS.number
    if isinstance(error, BrokenPipeError) and run is None:      # as in --help | head
        sys.stdout = open(os.devnull, "w")
        return 0
    event = "interrupted" if isinstance(error, Interrupted) else "error"
    status, line, trace = account_of(error, pulse.doing, rank)
    if run is None:
        tell(f"{event}: {line}")
        if trace:      # there is no log yet
            tell(trace)
    else:
        run.failed(line, trace, again=not isinstance(error, UserError), event=event)
        run.close()
    return status


# ========================================
# 10  Data: shards, training streams, validation documents, bytes per token
# ========================================

# A shard is 256 little-endian int32, then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256
MOST_OF_A_SHARD = 1 << 40     # bytes
AGAIN = "fetch or build the data again"


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one shard, (N,) uint16, mapped; UserError when it is missing or damaged."""
    path = Path(path)
    size = file_size(path, MOST_OF_A_SHARD, f"a token shard: {AGAIN}")
    with refused(f"{path} is no token shard", AGAIN):
        header = np.fromfile(path, dtype="<u4", count=SHARD_HEADER)
        begins = header[:2].tolist()
        if begins != [SHARD_MAGIC, SHARD_VERSION]:
            raise ValueError(f"it starts with {begins}, expected [{SHARD_MAGIC}, {SHARD_VERSION}]")
        count = int(header[2])
        expected = 4 * SHARD_HEADER + 2 * count
        if size != expected:
            fault = "truncated" if size < expected else "too long"
            raise ValueError(f"it has {size:,} bytes but its header promises {expected:,}: {fault}")
        if count < 2:
            raise ValueError(f"it holds {count} tokens: at least 2 are needed")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER)


def default_shards(s: Settings) -> Path:
    """Without DATA_PATH: the folder that data/fetch.py makes, else the field's place for
    it."""
    folder, name = Path(s.data_dir), f"sp{s.vocab_size}"
    fetched = folder / (f"{name}_caseops" if s.caseops_enabled else name)
    if fetched.is_dir():
        return fetched
    if not s.caseops_enabled:
        return folder / "datasets" / f"fineweb10B_{name}"
    return (folder / f"datasets/fineweb10B_{name}_caseops/datasets/datasets"
            / f"fineweb10B_{name}_lossless_caps_caseops_v1_reserved")


def default_tokenizer(s: Settings) -> Path:
    """Without TOKENIZER_PATH: the one beside the shards, else the field's place for it."""
    beside, folder, v = s.shards / "tokenizer.model", Path(s.data_dir), s.vocab_size
    if beside.is_file():
        return beside
    if not s.caseops_enabled:
        return folder / "tokenizers" / f"fineweb_{v}_bpe.model"
    return (folder / f"datasets/fineweb10B_sp{v}_caseops/datasets/tokenizers"
            / f"fineweb_{v}_bpe_lossless_caps_caseops_v1_reserved.model")


def list_shards(folder: Path, kind: str) -> list[Path]:
    """Sorted `fineweb_<kind>_*.bin` of a folder; kind is train or val."""
    folder = Path(folder)
    if kind == "val" and Validation.sealed:
        raise RuntimeError(SEALED)
    paths = sorted(p for p in folder.glob(f"fineweb_{kind}_*.bin") if "_bytes_" not in p.name)
    if not paths:
        fault = f"has no fineweb_{kind}_*.bin" if folder.is_dir() else "does not exist"
        raise UserError(f"DATA_PATH={folder} {fault}: data/README.md says how to get shards")
    return paths


def read_tokens(s: Settings, kind: str, most: int | None = None) -> dict[Path, np.ndarray]:
    """Tokens of all shards of a kind, by path, mapped. Refused unless each holds
    documents, the first of them whole (published shards are cut anywhere), and the first
    `most` tokens are of the vocabulary."""
    shards = {}
    block = 1_000_000
    for path in list_shards(s.shards, kind):
        tokens = read_shard(path)
        fault = ""
        if tokens[0] == 0:
            fault = f"starts with 0, not with BOS (id {BOS}): it is a byte sidecar, not tokens"
        elif not any((tokens[a:a + block] == BOS).any() for a in range(0, len(tokens), block)):
            fault = f"holds no BOS (id {BOS}): documents cannot be told apart"
        elif not shards and tokens[0] != BOS:
            fault = f"starts with token {tokens[0]}, not BOS (id {BOS}): its document is cut"
        if fault:
            raise UserError(f"{path} {fault}; build the shards again, each document after a BOS")
        check_ids(path, tokens[:most], s.vocab_size)
        shards[path] = tokens
    return shards


def check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Refuse tokens of a shard that are not of the vocabulary."""
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(f"{path} holds token {tokens[at]} at position {at} but VOCAB_SIZE="
                        f"{vocab_size}: set it and TOKENIZER_PATH to those it was made with")


def read_sidecars(s: Settings, shards: Mapping[Path, np.ndarray]) -> np.ndarray | None:
    """Bytes of every token (N,) int64 of these shards; None without sidecars."""
    paths = [path.with_name(path.name.replace("_val_", "_val_bytes_")) for path in shards]
    if not any(path.exists() for path in paths):
        return None
    counts = []
    remedy = "the byte sidecar belongs to other shards; fetch both again"
    for path, tokens in zip(paths, shards.values()):
        count = read_shard(path)
        if len(count) != len(tokens):
            raise UserError(f"{path} has {len(count):,} entries for {len(tokens):,} tokens: "
                            f"{remedy}")
        if (at := np.flatnonzero((tokens == BOS) & (count != 0))).size:
            raise UserError(f"{path} counts {count[at[0]]} bytes for the BOS at position "
                            f"{at[0]}: {remedy}")
        counts.append(count.astype(np.int64))
    total = int(sum(count.sum() for count in counts))
    expected = manifest_total(s, "val_bytes", "text_bytes")
    if not total or expected not in (None, total):
        fault = "which cannot be" if expected is None else f"the manifest says {expected:,}"
        raise UserError(f"the sidecars of {s.shards} count {total:,} bytes, {fault}: {remedy}")
    return np.concatenate(counts)


def read_manifest(s: Settings) -> dict:
    """The folder's manifest.json; empty when there is none, or one of another program."""
    path = s.shards / "manifest.json"
    if not path.exists():
        return {}
    manifest = read_json(path, f"the data tools' manifest: {AGAIN}")
    if not {"files", "fingerprint"} <= set(manifest):
        return {}
    with refused(f"{path} is damaged", AGAIN):
        texts = [manifest["fingerprint"]]
        counts = [manifest.get("decodable_val_bytes") or 0]
        objects = [manifest.get("split") or {}, manifest.get("tokenizer") or {}]
        for entry in manifest["files"]:
            texts += entry["name"], entry["kind"]
            counts += [entry.get(key, 0) for key in ("size", "tokens", "documents", "text_bytes")]
        wrong = [x for x in texts if not isinstance(x, str)]
        wrong += [x for x in counts if type(x) is not int or not 0 <= x < 2 ** 63]
        wrong += [x for x in objects if not isinstance(x, dict)]
        if wrong:
            raise ValueError(f"{wrong[0]} in it is not what it should be")
    return manifest


def manifest_total(s: Settings, kind: str, what: str) -> int | None:
    """Sum of an entry over the manifest's files of a kind; None where one lacks it."""
    entries = [e.get(what) for e in read_manifest(s).get("files", ()) if e["kind"] == kind]
    return sum(entries) if entries and None not in entries else None


@dataclass(frozen=True)
class Layout:
    """Documents of a packed row: cu_seqlens (n,) int32 starts, padded with the total;
    longest piece. isolate: nor is a piece smeared with the token packed before it."""
    cu_seqlens: Tensor
    max_seqlen: int
    isolate: bool = False


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x (CPU) on the device, without waiting for the device."""
    if x.device.type == device.type:
        return x
    return x.pin_memory().to(device, non_blocking=True)


class Batch(NamedTuple):
    """x, y (B, T) int64; of a packed row: bounds, its longest piece, the cut, its tokens."""
    x: Tensor
    y: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    cut: int = 0
    tokens: np.ndarray | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on the device; from pinned memory without waiting."""
        cu_seqlens = None if self.cu_seqlens is None else sent(self.cu_seqlens, device)
        return self._replace(x=sent(self.x, device), y=sent(self.y, device), cu_seqlens=cu_seqlens)

    def rows(self, length: int) -> Batch:
        """The same tokens as rows of this length, documents not kept apart."""
        return Batch(self.x.view(-1, length), self.y.view(-1, length), None, length)

    def layout(self, cap: int) -> Layout | None:
        """Documents; `cap` bounds a piece's length: it is fixed, as graphs need it."""
        return None if self.cu_seqlens is None else Layout(self.cu_seqlens, cap)


def segment_bounds(bos: np.ndarray, total: int, max_len: int,
                   bucket: int = 64) -> tuple[np.ndarray, int]:
    """Attention segments of a row of `total` tokens: (cu_seqlens int32, padded with
    `total` to whole `bucket`s; longest). One starts at 0, at each BOS, and every max_len
    (0: never) tokens of a document."""
    starts = np.unique(np.append(0, bos)).astype(np.int64)
    if max_len > 0:
        ends = np.append(starts[1:], total)
        starts = np.concatenate([np.arange(a, b, max_len) for a, b in zip(starts, ends)])
    buckets = len(starts) // bucket + 1      # room for the last end, too
    bounds = np.full(buckets * bucket, total, dtype=np.int32)
    bounds[:len(starts)] = starts
    return bounds, int(np.diff(bounds).max())


def packed_batch(tokens: np.ndarray, max_len: int) -> Batch:
    """n + 1 tokens as one packed row of n inputs and targets, cut by document."""
    t = torch.from_numpy(tokens.astype(np.int64))
    bos = np.flatnonzero(tokens[:-1] == BOS)
    bounds, longest = segment_bounds(bos, len(tokens) - 1, max_len)
    return Batch(t[None, :-1], t[None, 1:], torch.from_numpy(bounds), longest, max_len, tokens)


def pieces(batch: Batch, most: int) -> Iterator[Batch]:
    """Inputs of a batch, at most `most` tokens each: rows, or a packed row cut at
    segments, if it can be where documents begin: then nothing is lost."""
    cu, begin, total = batch.cu_seqlens, 0, batch.x.size(1)
    if cu is None:
        for x in batch.x.split(max(1, most // total)):
            yield Batch(x, x, None, total)
        return
    bounds = cu.unique().tolist()
    while begin < total:
        later = [b for b in bounds if b > begin]
        near = [b for b in later if b <= begin + most] or later[:1]
        documents = [b for b in near if b == total or batch.x[0, b] == BOS]
        end = max(documents or near)
        x = batch.x[:, begin:end]
        yield Batch(x, x, cu[(cu >= begin) & (cu <= end)] - begin, batch.max_seqlen)
        begin = end


class Stream:
    """Micro-batches of one rank, in an order that the files fix."""
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
        """The next micro-batch; UserError for an id that is not of the vocabulary."""
        batch = self.cut()
        self.batches += 1
        if max(int(batch.x.max()), int(batch.y.max())) >= self.vocab_size:
            for tokens in self.shards:
                check_ids(Path(tokens.filename), tokens, self.vocab_size)
        return batch

    def skip(self, batches: int) -> None:
        """Pass over so many batches, as an interrupted run has done."""
        for _ in range(batches):
            self.next()


class TokenStream(Stream):
    """All shards as one endless stream: every target once per epoch, on any number of
    ranks."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        if self.ends[-1] < self.tokens + 1:
            raise UserError(f"{self.ends[-1]:,} training tokens are no micro-batch: lower "
                            "TRAIN_BATCH_TOKENS")

    def cut(self) -> Batch:
        start = (self.batches * self.world_size + self.rank) * self.tokens
        missing = self.tokens + 1
        parts = []
        while missing > 0:
            start %= int(self.ends[-1])      # the stream wraps at the end of the last shard
            i = int(np.searchsorted(self.ends, start, side="right"))
            begin = start - int(self.ends[i]) + len(self.shards[i])
            part = np.asarray(self.shards[i][begin:begin + missing])
            parts.append(part)
            start += len(part)
            missing -= len(part)
        return packed_batch(np.concatenate(parts), self.max_len)

    def skip(self, batches: int) -> None:
        self.batches += batches      # where a batch lies follows from its number


class DocPackStream(Stream):
    """The field's: ranks cut (tokens + 1) x world_size from a shard; a short rest is
    dropped."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        self.span = (self.tokens + 1) * self.world_size
        self.shard = 0
        self.first = [int(np.argmax(x == BOS)) for x in self.shards]
        self.cursor = self.first[0]
        if all(f + self.span > len(x) for f, x in zip(self.first, self.shards)):
            raise UserError(f"no shard holds {self.span:,} tokens from a BOS on: use "
                            "TRAIN_LOADER=stream")

    def cut(self) -> Batch:
        while self.cursor + self.span > len(self.shards[self.shard]):
            self.shard = (self.shard + 1) % len(self.shards)
            self.cursor = self.first[self.shard]
        begin = self.cursor + self.rank * (self.tokens + 1)
        self.cursor += self.span
        tokens = self.shards[self.shard][begin:begin + self.tokens + 1]
        return packed_batch(np.asarray(tokens), self.max_len)


LOADERS: dict[str, type[Stream]] = {"stream": TokenStream, "docpack": DocPackStream}


def open_train_stream(s: Settings, world: World, tokens: int) -> Stream:
    """The stream that TRAIN_LOADER names, for micro-batches of `tokens` tokens."""
    return LOADERS[s.train_loader](
        list_shards(s.shards, "train"), world_size=world.size, rank=world.rank, tokens=tokens,
        max_len=s.train_seq_len, vocab_size=s.vocab_size)


class Prefetch:
    """Batches read ahead in one thread, in the stream's order. given: how many were
    given out, also before an interruption; epoch: of the last of them."""

    def __init__(self, stream: Stream, device: torch.device, given: int = 0, depth: int = 4):
        stream.skip(given)
        self.stream, self.device, self.given, self.epoch = stream, device, given, stream.epoch
        # else the thread would begin on the first GPU
        place = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.reader = ThreadPoolExecutor(1, initializer=place)
        self.ahead = deque(self.reader.submit(self.read) for _ in range(depth))

    def read(self) -> tuple[Batch, float]:
        return self.stream.next().to(self.device), self.stream.epoch

    def next(self, cut: int = 0) -> Batch:
        """The next batch; a packed one cut at `cut` tokens, even if it was read otherwise."""
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
    """UTF-8 bytes of each token: base (V) int16, and one more for a piece that begins
    with a space, lead (V), unless a control, unknown or unused one, boundary (V), is
    before it."""
    base: np.ndarray
    lead: np.ndarray
    boundary: np.ndarray

    @classmethod
    def from_sentencepiece(cls, path: Path, vocab_size: int) -> ByteTable:
        sp = load_tokenizer(path)
        if sp.vocab_size() != vocab_size:
            raise UserError(f"tokenizer {path} has {sp.vocab_size()} tokens but VOCAB_SIZE="
                            f"{vocab_size}: set them to the pair that the shards were made with")
        base, lead, boundary = (np.zeros(vocab_size, kind) for kind in (np.int16, bool, bool))
        for i in range(vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                boundary[i] = True
            elif sp.is_byte(i):
                base[i] = 1
            else:
                piece = sp.id_to_piece(i)
                lead[i] = piece.startswith("\u2581")      # only the first one stands for a space
                base[i] = len(piece.removeprefix("\u2581").encode())
        return cls(base, lead, boundary)

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes (int64) of each target token after its previous token."""
        return self.base[target].astype(np.int64) + (self.lead[target] & ~self.boundary[prev])


A_MODEL = "the SentencePiece model of the shards"


def load_tokenizer(path: Path):
    """The SentencePiece model at path; UserError when it is missing or damaged."""
    import sentencepiece
    if not Path(path).exists():
        raise UserError(f"TOKENIZER_PATH={path} does not exist: see data/README.md, or set it")
    model = read_bounded(Path(path), MOST_READ, A_MODEL)
    with refused(f"TOKENIZER_PATH={path} is damaged", f"set it to {A_MODEL}"):
        return sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")


class Documents:
    """Documents of a token stream, from BOS to next BOS (the last target). start, length
    (n,) int64; length - 1 targets."""

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
            count = max(1, round(len(self) * fraction))
            keep = sorted(random.Random(seed).sample(range(len(self)), count))
            self.start, self.length = self.start[keep], self.length[keep]
        return self


SEALED = "validation tokens are read while the model is made, which would break the rules"


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
            raise UserError(f"CASEOPS_ENABLED=1 needs the byte sidecars of {s.shards}: fetch "
                            "them, or set it to 0")
        else:
            table = ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size)
            self.rule, self.target_bytes = "table", table.count(self.tokens[:-1], self.tokens[1:])
        self.documents = Documents(self.tokens).sample(s.val_doc_fraction, s.seed)
        spans = zip(self.documents.start.tolist(), self.documents.length.tolist())
        if not any(self.target_bytes[a:a + n - 1].any() for a, n in spans):
            raise UserError(f"the validation documents of {s.shards} are empty: nothing is to be "
                            f"predicted; {AGAIN}, or raise VAL_DOC_FRACTION")

    def open_for_study(self, run: Run, why: str) -> np.ndarray:
        """The one door past the seal: marks the run NON-COMPLIANT."""
        run.not_compliant(why)
        return self.stream

    @classmethod
    def of(cls, tokens: np.ndarray, targets: np.ndarray | None = None) -> Validation:
        """A made-up stream, one byte a token: for probes. Nothing of it is sealed."""
        val = cls.__new__(cls)
        val.sealed = False
        val.rule = "made up"
        val.other_targets = targets
        val.stream = tokens.astype(np.uint16)
        val.documents = Documents(tokens)
        val.target_bytes = (tokens[1:] != BOS).astype(np.int64)
        return val


# ========================================
# 11  Kernels: each beside its plain twin
# ========================================

HALF = (torch.bfloat16, torch.float16)


FAULTY: dict[str, str] = {}     # kernels that kernel_faults found: this process does without


def use_triton(kernel: str, wanted: bool | None, sensible: bool) -> bool:
    """As the caller wants it, else where it is sensible, Triton is installed and the kernel works."""
    if wanted and triton is None:
        raise UserError("kernel=True needs Triton: `pip install triton`, or leave it None")
    works = triton is not None and kernel not in FAULTY
    return (sensible and works) if wanted is None else wanted


# a name of this module's own: a second copy of the script has its own operators
OPERATORS = "golf_" + re.sub(r"\W", "_", __name__).strip("_")


def operator(shapes: Callable, **options) -> Callable:
    """Makes of a function an operator that torch.compile keeps whole. shapes(the same
    arguments): room for its results, by which the compiler plans."""
    def decorate(function: Callable) -> Callable:
        name = f"{OPERATORS}::{function.__name__}"
        made = torch.library.custom_op(name, function, mutates_args=(), **options)
        made.register_fake(shapes)
        return made
    return decorate


def room(x: Tensor) -> Tensor:
    """For a result like x, contiguous."""
    return x.new_empty(x.shape)


def save_all(ctx, inputs, output):
    """What the gradient of an operator of some tensors and a number needs."""
    *tensors, ctx.number = inputs
    ctx.save_for_backward(*tensors, *output)


def jit(kernel: Callable) -> Callable:
    """A kernel as Triton compiles it; without Triton nothing calls it."""
    return kernel if triton is None else triton.jit(kernel)


def jit_for_any(*names: str) -> Callable:
    """jit of a kernel that is not compiled anew by what divides these numbers."""
    def decorate(kernel: Callable) -> Callable:
        return kernel if triton is None else triton.jit(kernel, do_not_specialize=names)
    return decorate


@jit
def ce_forward_kernel(logits_ptr, targets_ptr, loss_ptr, lse_ptr, cap, V, BLOCK: tl.constexpr):
    """One row a program: loss and log Σ exp of s = cap·tanh(x/cap) - cap =
    -2·cap·sigmoid(-2x/cap). The shift by cap cancels in the loss."""
    row = tl.program_id(0).to(tl.int64)     # N·V passes 2**31 at 262,144 tokens of 8,192
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
    score = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, lse + 2 * cap / (1 + tl.exp(score * (2 / cap))))


@jit
def ce_backward_kernel(logits_ptr, targets_ptr, lse_ptr, dloss_ptr, grad_ptr, cap, V,
                       BLOCK: tl.constexpr):
    """grad = dloss · (softmax(s) - onehot) · ds/dx, where ds/dx = 4u(1 - u) for u =
    sigmoid(-2x/cap)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    dloss = tl.load(dloss_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
        u = 1 / (1 + tl.exp(x * (2 / cap)))
        p = tl.exp(-2 * cap * u - lse) - tl.where(cols == target, 1.0, 0.0)
        grad = dloss * p * (4 * u * (1 - u))
        tl.store(grad_ptr + row * V + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)


@jit
def product_tile(a_ptr, b_ptr, M, N, K, stride_k, stride_n, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, GROUP: tl.constexpr):
    """Of A (M, K) @ B (K, N) this program's tile, and its number down and across. Programs run
    down GROUP row tiles before the next column tile: tiles of A and B are met again in L2."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % height
    tile_n = pid % (GROUP * tiles_n) // height
    rows = tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # the tile's origin is one int64 scalar (M·N may pass 2**31), the rest int32: fewer registers
    origin = (tile_m * BM).to(tl.int64)
    # rows and columns out of range wrap round, never stored: only the K loop needs a mask
    a_ptrs = a_ptr + origin * K + (rows % (M - tile_m * BM))[:, None] * K + inner[None, :]
    b_ptrs = b_ptr + inner[:, None] * stride_k + (cols % N)[None, :] * stride_n
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptrs, mask=inner[None, :] < K - k, other=0.0)
        b = tl.load(b_ptrs, mask=inner[:, None] < K - k, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BK
        b_ptrs += BK * stride_k
    return acc, tile_m, tile_n


@jit
def mlp_kernel(a_ptr, b_ptr, factor_ptr, act_ptr, signs_ptr, out_ptr, slope, M, N, K, stride_k, stride_n,
               BACKWARD: tl.constexpr, KEEP_SIGNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, GROUP: tl.constexpr):
    """A (M, K), B (K, N), factor (M), P = factor · A@B -> out (M, N) = act(P), and P's signs if
    KEEP_SIGNS; if BACKWARD, out = P·act'(h), h from act(h) and signs."""
    acc, tile_m, tile_n = product_tile(a_ptr, b_ptr, M, N, K, stride_k, stride_n, BM, BN, BK, GROUP)
    rows = tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    below = M - tile_m * BM
    origin = (tile_m * BM).to(tl.int64)
    acc *= tl.load(factor_ptr + origin + rows, mask=rows < below, other=0.0)[:, None]
    at = rows[:, None] * N + cols[None, :]
    inside_m = (rows < below)[:, None]
    inside = inside_m & (cols < N)[None, :]
    # a byte's signs are of columns BN / 8 apart: one thread has them
    width = tl.cdiv(N, BN) * (BN // 8)
    byte = tile_n * (BN // 8) + tl.arange(0, BN // 8)
    signs_ptrs = signs_ptr + origin * width + rows[:, None] * width + byte[None, :]
    bit = tl.arange(0, 8)[None, :, None]
    if BACKWARD:
        signs = tl.load(signs_ptrs, mask=inside_m, other=0).to(tl.int32)
        positive = (signs[:, None, :] >> bit & 1) == 1
        acc = tl.reshape(tl.reshape(acc, (BM, 8, BN // 8)) * tl.where(positive, 2.0, -2 * slope), (BM, BN))
        act = tl.load(act_ptr + origin * N + at, mask=inside, other=0.0).to(tl.float32)
        out = acc * tl.sqrt(act)
    else:
        if KEEP_SIGNS:
            positive = tl.reshape(acc > 0, (BM, 8, BN // 8)).to(tl.int32)
            tl.store(signs_ptrs, tl.sum(positive << bit, 1).to(tl.uint8), mask=inside_m)
        leaky = tl.where(acc > 0, acc, slope * acc)
        out = leaky * leaky
    tl.store(out_ptr + origin * N + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit_for_any("T", "M")
def qkv_kernel(x_ptr, qkv_ptr, factor_ptr, gain_ptr, cos_ptr, sin_ptr, out_ptr, slope_ptr, T, eps, M, N, K,
               stride_k, stride_n, GAINED: tl.constexpr, NORMED: tl.constexpr, WIDTH: tl.constexpr,
               ANGLES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               GROUP: tl.constexpr):
    """Heads of factor · x (M, K) @ qkv (K, N) -> out (M, N): the first NORMED over their RMS, the first
    GAINED of them times gain, turned by positions that begin anew every T rows. slope (M, NORMED): what
    x @ qkv was multiplied by before it was turned."""
    acc, tile_m, tile_n = product_tile(x_ptr, qkv_ptr, M, N, K, stride_k, stride_n, BM, BN, BK, GROUP)
    origin = (tile_m * BM).to(tl.int64)
    row = tl.arange(0, BM)
    inside = (row < M - tile_m * BM)[:, None]
    factor = tl.load(factor_ptr + origin + row[:, None], mask=inside, other=0.0)
    TILE_HEADS: tl.constexpr = BN // WIDTH
    head = tile_n * TILE_HEADS + tl.arange(0, TILE_HEADS)[None, :]
    heads = tl.reshape(factor * acc, (BM, TILE_HEADS, WIDTH))
    gain = tl.load(gain_ptr + head, mask=head < GAINED, other=1.0).to(tl.float32)
    scale = gain * tl.where(head < NORMED, tl.rsqrt(tl.sum(heads * heads, 2) / WIDTH + eps), 1.0)
    at = row[:, None] * NORMED + head
    tl.store(slope_ptr + origin * NORMED + at, factor * scale, mask=inside & (head < NORMED))
    # channels c and c + ANGLES are a pair; a head's first ANGLES pairs are turned
    BLOCKS: tl.constexpr = BN // (2 * ANGLES)
    pairs = tl.reshape(heads * scale[:, :, None], (BM, BLOCKS, 2, ANGLES))
    first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    col = tile_n * BN + 2 * ANGLES * tl.arange(0, BLOCKS)[:, None]
    turned = (col % WIDTH == 0) & (col < NORMED * WIDTH)
    angle = ((origin + row) % T)[:, None, None] * ANGLES + tl.arange(0, ANGLES)
    cos = tl.where(turned, tl.load(cos_ptr + angle), 1.0)
    sin = tl.where(turned, tl.load(sin_ptr + angle), 0.0)
    pairs = tl.join(first * cos + second * sin, second * cos - first * sin)
    out = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (BM, BN)).to(out_ptr.dtype.element_ty)
    col = tile_n * BN + tl.arange(0, BN)
    tl.store(out_ptr + origin * N + row[:, None] * N + col, out, mask=inside & (col < N))


@jit
def head_kernel(hidden_ptr, head_ptr, targets_ptr, grad_ptr, total_ptr, target_ptr, cap, M, N, K, stride_k,
                stride_n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """Of logits x = hidden (M, K) @ head (K, N), which are not written, and s = cap·tanh(x/cap):
    e^s · ds/dx (M, N), each row's total of e^s in a tile, the target's x."""
    x, tile_m, tile_n = product_tile(hidden_ptr, head_ptr, M, N, K, stride_k, stride_n, BM, BN, BK, GROUP)
    origin = (tile_m * BM).to(tl.int64)
    row = tl.arange(0, BM)
    col = tl.arange(0, BN)
    inside_m = row < M - tile_m * BM
    inside_n = (col < N - tile_n * BN)[None, :]
    target = (tl.load(targets_ptr + origin + row, mask=inside_m, other=-1) - tile_n * BN).to(tl.int32)
    chosen = tl.sum(tl.where(col[None, :] == target[:, None], x, 0.0), 1)
    tl.store(target_ptr + origin + row, chosen, mask=inside_m & (target >= 0) & (target < BN))
    tanh = 1 - 2 / (1 + tl.exp(x * (2 / cap)))
    power = tl.where(inside_n, tl.exp(cap * tanh), 0.0)
    tl.store(total_ptr + (origin + row) * tl.cdiv(N, BN) + tile_n, tl.sum(power, 1), mask=inside_m)
    grad = (power * (1 - tanh * tanh)).to(grad_ptr.dtype.element_ty)
    at = origin * N + tile_n * BN + row[:, None] * N + col[None, :]
    tl.store(grad_ptr + at, grad, mask=inside_m[:, None] & inside_n)


@jit
def own_value_kernel(y_ptr, v_ptr, gate_ptr, out_ptr, N, v_stride, HEADS: tl.constexpr,
                     GROUP: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Tokens of one key head a program: out = gate · (y - <y, u> u) for its GROUP
    query heads, u the direction of the token's own value."""
    # a tile's origin is one int64 scalar, the rest int32: fewer registers
    origin = tl.program_id(0).to(tl.int64) * BN
    key_head = tl.program_id(1)
    row = tl.arange(0, BN)
    channel = tl.arange(0, BW)
    present = row < N - origin
    inside = present[:, None] & (channel < WIDTH)[None, :]
    v_ptr += origin * v_stride + key_head * WIDTH
    v = tl.load(v_ptr + row[:, None] * v_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    u = v / tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)[:, None]
    at = row[:, None] * (HEADS * WIDTH) + channel[None, :]
    for member in tl.static_range(GROUP):
        first = origin * HEADS + key_head * GROUP + member
        y = tl.load(y_ptr + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + first + row * HEADS, mask=present, other=0.0).to(tl.float32)
        out = gate[:, None] * (y - tl.sum(y * u, 1)[:, None] * u)
        tl.store(out_ptr + first * WIDTH + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def own_value_backward_kernel(dout_ptr, y_ptr, v_ptr, gate_ptr, dy_ptr, dv_ptr, dgate_ptr, N,
                              v_stride, HEADS: tl.constexpr, GROUP: tl.constexpr,
                              WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """The gradients of y, v (rows of KEY_HEADS · WIDTH) and gate, tiles as above."""
    origin = tl.program_id(0).to(tl.int64) * BN
    key_head = tl.program_id(1)
    row = tl.arange(0, BN)
    channel = tl.arange(0, BW)
    present = row < N - origin
    inside = present[:, None] & (channel < WIDTH)[None, :]
    v_ptr += origin * v_stride + key_head * WIDTH
    v = tl.load(v_ptr + row[:, None] * v_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)
    u = v / length[:, None]
    du = tl.zeros((BN, BW), dtype=tl.float32)
    at = row[:, None] * (HEADS * WIDTH) + channel[None, :]
    for member in tl.static_range(GROUP):
        first = origin * HEADS + key_head * GROUP + member
        y = tl.load(y_ptr + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + first * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + first + row * HEADS, mask=present, other=0.0).to(tl.float32)
        along_y = tl.sum(y * u, 1)
        along_dout = tl.sum(dout * u, 1)
        dgate = tl.sum(dout * y, 1) - along_y * along_dout
        tl.store(dgate_ptr + first + row * HEADS, dgate.to(dgate_ptr.dtype.element_ty), mask=present)
        dy = gate[:, None] * (dout - along_dout[:, None] * u)
        tl.store(dy_ptr + first * WIDTH + at, dy.to(dy_ptr.dtype.element_ty), mask=inside)
        du -= gate[:, None] * (along_dout[:, None] * y + along_y[:, None] * dout)
    dv = (du - tl.sum(du * u, 1)[:, None] * u) / length[:, None]
    dv_ptr += (origin * (HEADS // GROUP) + key_head) * WIDTH
    dv_at = row[:, None] * (HEADS // GROUP * WIDTH) + channel[None, :]
    tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@jit
def see_keys(q, k_ptr, v_ptr, count, newest, peak, total, acc, scale, KEY_WIDTH: tl.constexpr,
             WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Online softmax of queries (rows, BW) over `count` keys, each up to its `newest`."""
    channel = tl.arange(0, BW)
    for start in range(0, count, BN):
        key = start + tl.arange(0, BN)
        inside = (key < count)[:, None] & (channel < WIDTH)[None, :]
        at = key[:, None] * KEY_WIDTH + channel[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (key < count)[None, :] & (key[None, :] <= newest[:, None])
        score = tl.where(seen, score, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        p = tl.exp(score - new_peak[:, None])
        shrunk = tl.exp(peak - new_peak)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = new_peak
    return peak, total, acc


@jit
def places(T, room, first, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
           BM: tl.constexpr, BW: tl.constexpr):
    """Of a program's BM queries: token, number, channels (rows, BW) and which are there; of their
    document's kept keys from `first` on, and of its own, where this head begins."""
    document = tl.program_id(1).to(tl.int64) // KEY_HEADS
    key_head = tl.program_id(1) % KEY_HEADS
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = row // GROUP
    number = token * (KEY_HEADS * GROUP) + key_head * GROUP + row % GROUP
    channel = tl.arange(0, BW)
    inside = (token < T)[:, None] & (channel < WIDTH)[None, :]
    queries_before = document * T * (KEY_HEADS * GROUP)
    at = queries_before * WIDTH + number[:, None] * WIDTH + channel[None, :]
    old = ((document * room + first) * KEY_HEADS + key_head) * WIDTH
    own = (document * T * KEY_HEADS + key_head) * WIDTH
    return token, queries_before + number, at, inside, old, own


@jit_for_any("T", "room", "first", "seen")
def kept_keys_kernel(q_ptr, k_ptr, v_ptr, old_k_ptr, old_v_ptr, y_ptr, lse_ptr, T, room, first, seen,
                     scale, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Queries of one document that share a key head, BM a program: over `seen` kept keys from
    `first` on, then causally over the forward's own."""
    KEY_WIDTH: tl.constexpr = KEY_HEADS * WIDTH
    token, query, at, inside, old, own = places(T, room, first, KEY_HEADS, GROUP, WIDTH, BM, BW)
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    peak = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BW), tl.float32)
    peak, total, acc = see_keys(q, old_k_ptr + old, old_v_ptr + old, seen, token + seen, peak, total, acc,
                                scale, KEY_WIDTH, WIDTH, BN, BW)
    peak, total, acc = see_keys(q, k_ptr + own, v_ptr + own, T, token, peak, total, acc,
                                scale, KEY_WIDTH, WIDTH, BN, BW)
    y = acc / total[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + query, peak + tl.log(total), mask=token < T)


@jit
def query_gradient(q, dy, lse, along, k_ptr, v_ptr, count, newest, dq, scale, KEY_WIDTH: tl.constexpr,
                   WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """dq (rows, BW) with what `count` keys add; along: <dy, y> of each row."""
    channel = tl.arange(0, BW)
    for start in range(0, count, BN):
        key = start + tl.arange(0, BN)
        inside = (key < count)[:, None] & (channel < WIDTH)[None, :]
        at = key[:, None] * KEY_WIDTH + channel[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (key < count)[None, :] & (key[None, :] <= newest[:, None])
        p = tl.where(seen, tl.exp(score - lse[:, None]), 0.0)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        d_score = p * (dp - along[:, None]) * scale
        dq += tl.dot(d_score.to(k.dtype), k, input_precision="ieee")
    return dq


@jit_for_any("T", "room", "first", "seen")
def kept_keys_dq_kernel(dy_ptr, q_ptr, k_ptr, v_ptr, old_k_ptr, old_v_ptr, y_ptr, lse_ptr, dq_ptr, T,
                        room, first, seen, scale, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr,
                        WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """The gradient of the queries, tiles as above."""
    KEY_WIDTH: tl.constexpr = KEY_HEADS * WIDTH
    token, query, at, inside, old, own = places(T, room, first, KEY_HEADS, GROUP, WIDTH, BM, BW)
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    along = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    lse = tl.load(lse_ptr + query, mask=token < T, other=0.0)
    dq = tl.zeros((BM, BW), tl.float32)
    dq = query_gradient(q, dy, lse, along, old_k_ptr + old, old_v_ptr + old, seen, token + seen, dq,
                        scale, KEY_WIDTH, WIDTH, BN, BW)
    dq = query_gradient(q, dy, lse, along, k_ptr + own, v_ptr + own, T, token, dq,
                        scale, KEY_WIDTH, WIDTH, BN, BW)
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@jit_for_any("T")
def own_keys_gradient_kernel(dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dk_ptr, dv_ptr, T, scale,
                             KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                             BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """The gradients of the forward's own keys and values, BN a program; kept ones have none."""
    document = tl.program_id(1).to(tl.int64) // KEY_HEADS
    key_head = tl.program_id(1) % KEY_HEADS
    key = tl.program_id(0) * BN + tl.arange(0, BN)
    channel = tl.arange(0, BW)
    inside_keys = (key < T)[:, None] & (channel < WIDTH)[None, :]
    at_keys = (document * T * KEY_HEADS + key_head) * WIDTH
    at_keys = at_keys + key[:, None] * (KEY_HEADS * WIDTH) + channel[None, :]
    k = tl.load(k_ptr + at_keys, mask=inside_keys, other=0.0)
    v = tl.load(v_ptr + at_keys, mask=inside_keys, other=0.0)
    queries_before = document * T * (KEY_HEADS * GROUP)
    dk = tl.zeros((BN, BW), tl.float32)
    dv = tl.zeros((BN, BW), tl.float32)
    for start in range(0, T * GROUP, BM):
        row = start + tl.arange(0, BM)
        token = row // GROUP
        query = token * (KEY_HEADS * GROUP) + key_head * GROUP + row % GROUP
        inside = (token < T)[:, None] & (channel < WIDTH)[None, :]
        at = queries_before * WIDTH + query[:, None] * WIDTH + channel[None, :]
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
        y = tl.load(y_ptr + at, mask=inside, other=0.0)
        along = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
        lse = tl.load(lse_ptr + queries_before + query, mask=token < T, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        seen = (token < T)[None, :] & (key[:, None] <= token[None, :])
        p = tl.where(seen, tl.exp(score - lse[None, :]), 0.0)
        dv += tl.dot(p.to(dy.dtype), dy, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
        d_score = p * (dp - along[None, :]) * scale
        dk += tl.dot(d_score.to(q.dtype), q, input_precision="ieee")
    tl.store(dk_ptr + at_keys, dk.to(dk_ptr.dtype.element_ty), mask=inside_keys)
    tl.store(dv_ptr + at_keys, dv.to(dv_ptr.dtype.element_ty), mask=inside_keys)


# 128×256 tiles keep 128 accumulators a thread; 3 stages take 144 of an H100's 227 KB of shared
# memory. Autotuning would let the last bits of a run depend on timing.
PRODUCT_TILE = dict(BM=128, BN=256, BK=64, GROUP=8, num_warps=8, num_stages=3)


def product_launch(kernel, a: Tensor, b: Tensor, *arguments, **sizes) -> None:
    """Run a kernel above on the tiles of A = a (M, K) and B = b (K, N) of any strides."""
    (M, K), N = a.shape, b.shape[1]
    tiles = triton.cdiv(M, PRODUCT_TILE["BM"]) * triton.cdiv(N, PRODUCT_TILE["BN"])
    if tiles:
        kernel[(tiles,)](a.contiguous(), b, *arguments, M, N, K, *b.stride(), **sizes, **PRODUCT_TILE)


# --- softcapped cross-entropy

def ce_launch(V: int) -> dict:
    """For rows of V logits: up to 8,192 a row is one trip, 32 values a thread."""
    block = min(triton.next_power_of_2(V), 8192)
    return dict(BLOCK=block, num_warps=min(8, max(1, block // 256)))


@operator(lambda dloss, logits, *_: room(logits))
def ce_backward(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    """dloss (N) -> gradient (N, V) in the logits' dtype; the softmax is recomputed."""
    N, V = logits.shape
    grad = room(logits)
    if N:
        ce_backward_kernel[(N,)](logits.contiguous(), targets.contiguous(), lse,
                                 dloss.contiguous(), grad, cap, V, **ce_launch(V))
    return grad


def room_per_row(logits, *_):
    """Loss and log-sum-exp: (N,) float32 of logits (N, V)."""
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, room(loss)


@operator(room_per_row)
def ce_forward(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """logits (N, V), targets (N) int64 -> losses and log Σ exp, (N) float32."""
    N, V = logits.shape
    loss, lse = room_per_row(logits)
    if N:
        ce_forward_kernel[(N,)](logits.contiguous(), targets.contiguous(), loss, lse, cap, V, **ce_launch(V))
    return loss, lse


def ce_gradient(ctx, dloss, _):
    """Of the logits alone."""
    logits, targets, _, lse = ctx.saved_tensors
    return ce_backward(dloss, logits, targets, lse, ctx.number), None, None


ce_forward.register_autograd(ce_gradient, setup_context=save_all)


def capped_ce(logits: Tensor, targets: Tensor, cap: float, kernel: bool | None = None) -> Tensor:
    """Cross-entropy of cap·tanh(logits/cap): logits (N, V) bf16 or f32, targets (N) int64
    -> (N) float32. The kernel writes nothing of the logits' size."""
    if use_triton("cross-entropy", kernel, logits.is_cuda):
        return ce_forward(logits, targets, float(cap))[0]
    return F.cross_entropy(soft_cap(logits.float(), cap), targets, reduction="none")


def room_for_head(hidden, head, *_):
    """Loss and Σ e^s of every row, and the logits' gradient."""
    return *room_per_row(hidden), hidden.new_empty(hidden.shape[0], head.shape[0])


@operator(room_for_head)
def ce_of_head(hidden: Tensor, head: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, d), head (V, d), targets (N) int64 -> losses, Σ e^s, and Σ e^s · d loss /
    d logits (N, V) like hidden."""
    score, _, grad = room_for_head(hidden, head)
    totals = score.new_empty(len(score), triton.cdiv(head.shape[0], PRODUCT_TILE["BN"]))
    product_launch(head_kernel, hidden, head.mT, targets.contiguous(), grad, totals, score, cap)
    total = totals.sum(1)
    s = soft_cap(score, cap)
    # not a difference of rounded numbers: p - 1 may be small
    at_target = (s.exp() - total) * (1 - (s / cap).square())
    grad.scatter_(1, targets[:, None], at_target[:, None].to(grad.dtype))
    return total.log() - s, total, grad


class HeadLosses(torch.autograd.Function):
    """Head and cross-entropy as one node: in place of the logits their gradient is written;
    what comes back multiplies rows of the small factors."""

    @staticmethod
    def forward(ctx, hidden, head, targets, cap):
        losses, total, gradient = ce_of_head(hidden, head, targets, cap)
        ctx.save_for_backward(hidden, head, total, gradient)
        return losses

    @staticmethod
    def backward(ctx, d_losses):
        hidden, head, total, gradient = ctx.saved_tensors
        share = (d_losses / total)[:, None]
        d_hidden = (share * (gradient @ head)).to(hidden.dtype)
        d_head = gradient.mT @ (share * hidden).to(hidden.dtype)
        return d_hidden, d_head, None, None


def head_losses(hidden: Tensor, head: Tensor, targets: Tensor, cap: float,
                kernel: bool | None = None) -> Tensor:
    """capped_ce of the logits hidden (N, d) @ head (V, d)ᵀ, in training."""
    e_cap_is_finite = cap < 70 and hidden.dtype != torch.float16
    # a tile of float32 is too large for some GPUs
    fits = hidden.is_cuda and hidden.dtype == torch.bfloat16
    if e_cap_is_finite and use_triton("head", kernel, fits) and torch.is_grad_enabled():
        return HeadLosses.apply(hidden, head, targets, float(cap))
    return capped_ce(F.linear(hidden, head), targets, cap, kernel)


# --- norms and rotation: with a backward of their own, which reads little again

def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays, in float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + RMS_EPS)


class ScaledNorm(torch.autograd.Function):
    """The gradient is made from the output: the input need not be kept."""

    @staticmethod
    def forward(ctx, x, scale):
        inverse = inverse_rms(x)
        y = (x.float() * (scale * inverse)).to(x.dtype)
        ctx.scale = scale
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, inverse = ctx.saved_tensors
        normed = y.float() / ctx.scale
        wide = dy.float()
        along = (wide * normed).mean(-1, keepdim=True)
        return ((wide - along * normed) * (ctx.scale * inverse)).to(dy.dtype), None


def rms(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · x / sqrt(mean(x^2) + eps) over the last axis; nothing in it is learnt."""
    return ScaledNorm.apply(x, scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, Dh) with channel c and c + half of the first 2·half turned by an
    angle of the token; cos, sin (T, half)."""
    width, half = x.size(-1), cos.size(-1)
    groups = -(-width // (2 * half))
    channel = torch.arange(width, device=x.device)
    turned = channel < 2 * half
    sign = torch.where(channel % (2 * half) < half, 1, -1)
    cos = torch.where(turned, cos.repeat(1, 2 * groups)[:, :width], 1)
    sin = torch.where(turned, sign * sin.repeat(1, 2 * groups)[:, :width], 0)
    padded = F.pad(x, (0, 2 * half * groups - width))
    # the halves of every 2·half channels exchanged: a view for the compiler, where a cat is a kernel
    partner = padded.unflatten(-1, (groups, 2, half)).flip(-2).flatten(-3)[..., :width]
    return x * cos[:, None] + partner * sin[:, None]


class NormedRotated(torch.autograd.Function):
    """All in float32, and the gain's gradient from sums over a head that the norm's
    gradient needs anyway."""

    @staticmethod
    def forward(ctx, x, cos, sin, gain):
        y = rotate(x.float() * inverse_rms(x), cos, sin)
        ctx.save_for_backward(x, cos, sin, gain)
        return (y if gain is None else y * gain[:, None]).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, cos, sin, gain = ctx.saved_tensors
        inverse = inverse_rms(x)
        normed = x.float() * inverse
        turned_back = rotate(dy.float(), cos, -sin)
        along = (turned_back * normed).mean(-1, keepdim=True)
        dx = (turned_back - along * normed) * inverse
        if gain is None:
            return dx.to(x.dtype), None, None, None
        d_gain = x.size(-1) * along.sum((0, 1, 3))
        return (dx * gain[:, None]).to(x.dtype), None, None, d_gain.to(gain.dtype)


# --- queries, keys and values: the input's norm, the product, and what its heads go through

def normed_count(qkv: Tensor, q_gain: Tensor) -> int:
    """How many heads are queries or keys: as many values as keys follow."""
    return (qkv.shape[0] * len(q_gain) // qkv.shape[1] + len(q_gain)) // 2


def room_for_heads(x, qkv, factor, q_gain, *_):
    """Heads (B, T, heads, Dh), and the normed ones' slope float32."""
    width = x.shape[2] // len(q_gain)
    heads = x.new_empty(*x.shape[:2], qkv.shape[0] // width, width)
    return heads, factor.new_empty(*x.shape[:2], normed_count(qkv, q_gain))


# in whatever layout: else the compiler makes cos and sin anew for every layer
@operator(room_for_heads, tags=(torch.Tag.flexible_layout,))
def qkv_product(x: Tensor, qkv: Tensor, factor: Tensor, q_gain: Tensor, cos: Tensor,
                sin: Tensor) -> tuple[Tensor, Tensor]:
    """qkv_kernel of x (B, T, d), qkv (n, d), factor (B, T, 1), q_gain (H), cos, sin (T, angles)."""
    heads, slope = room_for_heads(x, qkv, factor, q_gain)
    rows = [y.contiguous() for y in (factor, q_gain, cos, sin)]
    product_launch(qkv_kernel, x.flatten(0, 1), qkv.mT, *rows, heads, slope, x.shape[1], RMS_EPS,
                   GAINED=len(q_gain), NORMED=slope.shape[2], WIDTH=heads.shape[3], ANGLES=cos.shape[1])
    return heads, slope


def heads_gradient(dy, y, gain, slope, cos, sin):
    """y (B, T, heads, Dh): heads over their RMS, times gain (heads), turned; slope (B, T, heads, 1): what x
    was multiplied by before -> gradients of x and gain, 0 of a gain of 0."""
    gain = gain.float()[:, None]
    wide = rotate(dy.float(), cos, -sin)
    normed = rotate(y.float(), cos, -sin) / torch.where(gain == 0, 1, gain)
    along = (wide * normed).mean(-1, keepdim=True)
    return ((wide - along * normed) * slope).to(y.dtype), (y.size(-1) * along.sum((0, 1, 3))).to(y.dtype)


class NormedHeads(torch.autograd.Function):
    """As in the MLP the input's norm stands behind the product; gradients come from what attention reads."""

    @staticmethod
    def forward(ctx, x, qkv, gate, q_gain, cos, sin, scale):
        factor = scale * inverse_rms(x)
        heads, slope = qkv_product(x, qkv, factor, q_gain, cos, sin)
        logits = (F.linear(x[..., :gate.size(1)], gate) * factor).to(x.dtype)
        ctx.scale = scale
        ctx.save_for_backward(x, qkv, gate, factor, heads, q_gain, slope, cos, sin)
        return *heads.tensor_split((len(q_gain), slope.size(2)), 2), logits

    @staticmethod
    def backward(ctx, dq, dk, dv, d_logits):
        x, qkv, gate, factor, heads, q_gain, slope, cos, sin = ctx.saved_tensors
        q, k, _ = heads.tensor_split((len(q_gain), slope.size(2)), 2)
        slope_q, slope_k = slope[..., None].tensor_split((len(q_gain),), 2)
        dq, d_gain = heads_gradient(dq, q, q_gain, slope_q, cos, sin)
        dk, _ = heads_gradient(dk, k, q_gain.new_ones(k.size(2)), slope_k, cos, sin)
        dv = (dv.flatten(2) * factor).to(x.dtype)
        d_logits = (d_logits * factor).to(x.dtype)
        d_rows = torch.cat((dq.flatten(2), dk.flatten(2), dv), -1)
        # so few operations on a channel that the compiler writes nothing in between
        wide = (d_rows @ qkv).float() + F.pad(d_logits @ gate, (0, x.size(-1) - gate.size(1)))
        normed = x * factor
        along = (wide * normed / (x.size(-1) * ctx.scale ** 2)).sum(-1, keepdim=True)
        rows = x.flatten(0, 1)
        d_qkv = d_rows.flatten(0, 1).mT @ rows
        d_gate = d_logits.flatten(0, 1).mT @ rows[:, :gate.size(1)]
        return (wide - along * normed).to(x.dtype), d_qkv, d_gate, d_gain, None, None, None


def normed_heads(x: Tensor, weights: dict[str, Tensor], rope: tuple[Tensor, Tensor], scale: float,
                 change: Callable | None = None, kernel: bool | None = None) -> tuple[Tensor | None, ...]:
    """Of rms(x, scale), x (B, T, d), a layer's queries (B, T, H, Dh), with their gain, and keys
    (B, T, K, Dh), both over their heads' RMS and turned, values, logits (B, T, H) of gates or None, and
    itself, where it is made. change(itself, three products): what goes on in the products' place."""
    qkv, q_gain, gate = weights["qkv"], weights["q_gain"], weights.get("attn_gate_w")
    width = x.size(-1) // len(q_gain)
    fits = PRODUCT_TILE["BN"] % width == 0 and width % (2 * rope[0].size(-1)) == 0
    sensible = x.is_cuda and x.dtype in HALF
    if change is None and fits and use_triton("queries, keys and values", kernel, sensible):
        read = qkv.new_zeros(8, 8) if gate is None else gate
        *heads, logits = NormedHeads.apply(x, qkv, read, q_gain, *rope, scale)
        return *heads, None if gate is None else logits, None
    normed = rms(x, scale)
    bounds = x.size(-1), normed_count(qkv, q_gain) * width
    parts = F.linear(normed, qkv).tensor_split(bounds, dim=-1)
    if change is not None:
        parts = change(normed, *parts)
    q, k, v = (part.unflatten(2, (-1, width)) for part in parts)
    q = NormedRotated.apply(q, *rope, q_gain)
    k = NormedRotated.apply(k, *rope, None)
    return q, k, v, None if gate is None else F.linear(normed[..., :gate.size(1)], gate), normed


def offset_keys(k: Tensor, forward: Forward, slot: int) -> Tensor:
    """Keys k (B, T, K, Dh), turned; the channels that do not turn are those of the token before,
    in its document: what follows a token is then found by that token."""
    turned, own = k.tensor_split([2 * forward.rope[0].size(-1)], dim=-1)
    ahead = own[:, :1] if forward.cache is None else forward.cache.key_ahead(slot, own)
    before = torch.cat((ahead, own[:, :-1]), dim=1)
    before = torch.where(forward.first[..., None, None], own, before)
    return torch.cat((turned, before), dim=-1)


# --- sums of streams: the factors' gradients from one more reading of what was summed

class Blend(torch.autograd.Function):
    """Half of the arguments are streams (B, T, D), the other half their factors (D)."""

    @staticmethod
    def forward(ctx, *streams_and_factors):
        ctx.save_for_backward(*streams_and_factors)
        half = len(streams_and_factors) // 2
        terms = [stream * factor.to(stream.dtype)
                 for stream, factor in zip(streams_and_factors[:half], streams_and_factors[half:])]
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def backward(ctx, dy):
        half = len(ctx.saved_tensors) // 2
        streams = ctx.saved_tensors[:half]
        factors = ctx.saved_tensors[half:]
        # no cast to float32 before the sums: the compiler would write what it has cast
        d_streams = [dy * factor.to(dy.dtype) for factor in factors]
        d_factors = [(dy * stream).sum((0, 1), dtype=torch.float32).to(factor.dtype)
                     for stream, factor in zip(streams, factors)]
        return *d_streams, *d_factors


def blend(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of streams (B, T, D), each times its factor (D)."""
    streams, factors = zip(*terms)
    views = [stream.view_as(stream) for stream in streams]     # dynamo refuses one tensor given twice
    return Blend.apply(*views, *factors)


class MixLanes(torch.autograd.Function):
    """Eight gradients from one reading of two lanes, two branches and what comes back."""

    @staticmethod
    def forward(ctx, lane0, lane1, attended, fed, keep, post):
        ctx.save_for_backward(lane0, lane1, attended, fed, keep, post)
        mixed0 = keep[0] * lane0 + post[0, 0] * attended + post[1, 0] * fed
        mixed1 = keep[1] * lane1 + post[0, 1] * attended + post[1, 1] * fed
        return mixed0, mixed1

    @staticmethod
    def backward(ctx, d_mixed0, d_mixed1):
        lane0, lane1, attended, fed, keep, post = ctx.saved_tensors
        products = (d_mixed0 * lane0, d_mixed1 * lane1,
                    d_mixed0 * attended, d_mixed1 * attended, d_mixed0 * fed, d_mixed1 * fed)
        # a token's sums first: they join the kernel that has its row at hand
        rows = torch.stack([product.sum(-1, dtype=torch.float32).flatten() for product in products])
        totals = rows.sum(-1)
        d_keep = totals[:2]
        d_post = totals[2:].view(2, 2)
        d_attended = post[0, 0] * d_mixed0 + post[0, 1] * d_mixed1
        d_fed = post[1, 0] * d_mixed0 + post[1, 1] * d_mixed1
        return (keep[0] * d_mixed0, keep[1] * d_mixed1, d_attended, d_fed,
                d_keep.to(keep.dtype), d_post.to(post.dtype))


def mix_lanes(lane0: Tensor, lane1: Tensor, attended: Tensor, fed: Tensor, keep: Tensor,
              post: Tensor) -> tuple[Tensor, Tensor]:
    """Both lanes (B, T, D), kept by keep (2), after attention and MLP have written
    their branches to both, by post (2 branches, 2 lanes)."""
    view = lane0.view_as(lane0)     # both may be the stream that has just been split, see blend
    return MixLanes.apply(view, lane1, attended, fed, keep, post)


# --- attention without the token's own value

def own_value_launch(kernel, y: Tensor, v: Tensor, *pointers: Tensor) -> None:
    """Run a kernel above on y (B, T, H, Dh), v (B, T, K, Dh) as in_rows leaves it, and
    what else it reads and writes, in its order."""
    heads, width = y.shape[2:]
    rows, key_heads = y.shape[0] * y.shape[1], v.shape[2]
    if rows:
        block = 16
        kernel[(triton.cdiv(rows, block), key_heads)](
            *pointers, rows, v.stride(1), HEADS=heads, GROUP=heads // key_heads, WIDTH=width,
            BN=block, BW=triton.next_power_of_2(width), num_warps=8)


def in_rows(v: Tensor) -> Tensor:
    """v (B, T, K, Dh) with rows of K · Dh at equal distances; a slice of wider rows is."""
    regular = v.stride(3) == 1 and v.stride(2) == v.size(3)
    regular = regular and (v.size(0) == 1 or v.stride(0) == v.size(1) * v.stride(1))
    return v if regular else v.contiguous()


@operator(lambda y, v, gate: room(y))
def own_value_removed(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """y (B, T, H, Dh), v (B, T, K, Dh), gate (B, T, H) -> like y."""
    y, v, gate = y.contiguous(), in_rows(v), gate.contiguous()
    out = room(y)
    own_value_launch(own_value_kernel, y, v, y, v, gate, out)
    return out


@operator(lambda dout, y, v, gate: (room(y), room(v), room(gate)))
def own_value_gradients(dout: Tensor, y: Tensor, v: Tensor,
                        gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dout (B, T, H, Dh) -> the gradients of y, v and gate."""
    dout, y, v, gate = dout.contiguous(), y.contiguous(), in_rows(v), gate.contiguous()
    dy, dv, dgate = room(y), room(v), room(gate)
    own_value_launch(own_value_backward_kernel, y, v, dout, y, v, gate, dy, dv, dgate)
    return dy, dv, dgate


def keep_inputs(ctx, inputs, output):
    """What the gradient of own_value_removed needs."""
    ctx.save_for_backward(*inputs)


own_value_removed.register_autograd(
    lambda ctx, dout: own_value_gradients(dout, *ctx.saved_tensors), setup_context=keep_inputs)


def remove_own_value(y: Tensor, v: Tensor, gate: Tensor | None = None,
                     kernel: bool | None = None) -> Tensor:
    """XSA: attention output y (B, T, H, Dh) minus its projection on the token's own v
    (B, T, K, Dh), times the heads' gate (B, T, H)."""
    if use_triton("own value", kernel, y.is_cuda):
        gate = y.new_ones(y.shape[:3]) if gate is None else gate
        return own_value_removed(y, v, gate)
    direction = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
    grouped = y.unflatten(2, (v.size(2), -1))
    along = (grouped * direction).sum(-1, keepdim=True)
    rest = (grouped - along * direction).flatten(2, 3)
    return rest if gate is None else rest * gate[..., None]


# --- leaky-ReLU² MLP

def room_for_hidden(x, up, factor, slope, keep_signs):
    """a (N, m) and signs, eight a byte, for whole tiles; without rows unless they are kept."""
    N, m = x.shape[0], up.shape[0]
    tile = PRODUCT_TILE["BN"]
    signs = x.new_empty(N if keep_signs else 0, -(-m // tile) * tile // 8, dtype=torch.uint8)
    return x.new_empty(N, m), signs


@operator(room_for_hidden)
def mlp_up(x: Tensor, up: Tensor, factor: Tensor, slope: float, keep_signs: bool) -> tuple[Tensor, Tensor]:
    """x (N, d), up (m, d), factor (N, 1) float32, h = factor · x @ upᵀ -> a = leaky(h)² (N, m)
    and h's signs."""
    a, signs = room_for_hidden(x, up, factor, slope, keep_signs)
    product_launch(mlp_kernel, x, up.mT, factor, a, signs, a, slope, BACKWARD=False, KEEP_SIGNS=keep_signs)
    return a, signs


@operator(lambda dy, down, factor, a, *_: room(a))
def mlp_dh(dy: Tensor, down: Tensor, factor: Tensor, a: Tensor, signs: Tensor, slope: float) -> Tensor:
    """dy (N, d), down (d, m), mlp_up's factor and results -> factor · (dy @ down) · act'(h)."""
    dh = room(a)
    product_launch(mlp_kernel, dy, down, factor, a, signs, dh, slope, BACKWARD=True, KEEP_SIGNS=False)
    return dh


class LeakySquareMLP(torch.autograd.Function):
    """Norm and MLP as one node: dh = (dy @ down) · act'(h) is only fused where dy is at hand.
    Of h its signs are kept; the root of a rounded a is nearer to |leaky(h)| than a rounded h.
    The norm's factor stands behind the product: nothing normalised is written."""

    @staticmethod
    def forward(ctx, x, up, down, slope, scale, add):
        inverse = inverse_rms(x)
        a, signs = mlp_up(x, up, scale * inverse, slope, True)
        ctx.save_for_backward(x, inverse, up, down, a, signs)
        ctx.numbers = slope, scale, add
        return torch.addmm(x, a, down.mT) if add else a @ down.mT

    @staticmethod
    def backward(ctx, dy):
        x, inverse, up, down, a, signs = ctx.saved_tensors
        slope, scale, add = ctx.numbers
        _, need_up, need_down, *_ = ctx.needs_input_grad    # adaptation freezes the weights
        dh = mlp_dh(dy, down, scale * inverse, a, signs, slope)
        wide = (dh @ up).float()
        dx = wide - x * inverse.square() * (wide * x).mean(-1, keepdim=True)
        return ((dx + dy if add else dx).to(x.dtype),
                dh.mT @ x if need_up else None,
                dy.mT @ a if need_down else None,
                None, None, None)


def leaky_square_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, scale: float = 1.0,
                     add: bool = False, kernel: bool | None = None) -> Tensor:
    """leaky_relu(rms(x, scale) @ upᵀ, slope)² @ downᵀ: x (N, d), up (m, d), down (d, m) of one
    dtype -> (N, d), onto x if add. Triton fuses norm and activation into the product between."""
    if not use_triton("MLP", kernel, x.is_cuda and x.dtype in HALF):
        hidden = F.leaky_relu(rms(x, scale) @ up.mT, slope).square()
    elif torch.is_grad_enabled() and (x.requires_grad or up.requires_grad or down.requires_grad):
        return LeakySquareMLP.apply(x, up, down, float(slope), scale, add)
    else:
        hidden = mlp_up(x, up, scale * inverse_rms(x), float(slope), False)[0]
    return torch.addmm(x, hidden, down.mT) if add else hidden @ down.mT


def product_onto(onto: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, in) @ weightᵀ, onto a stream (B, T, out) if that is given."""
    if onto is None:
        return F.linear(x, weight)
    return torch.addmm(onto.flatten(0, 1), x.flatten(0, 1), weight.mT).view(onto.shape)


def add_scaled(onto: Tensor | None, scale: Tensor, x: Tensor) -> Tensor:
    """scale · x, onto a stream if that is given."""
    return scale * x if onto is None else onto + scale * x


# --- attention

ATTENTION = "plain"     # the backend in use: what resolve_attention returned
FLASH: dict = {}        # backend name -> its imported module, filled by attention_fault
PACKAGES = {            # backend name -> (names that its module goes by, how to get it)
    "fa3": ("flash_attn_interface flash_attn_3.flash_attn_interface",
            "FlashAttention 3's wheel for this torch and CUDA (Hopper)"),
    "fa4": ("flash_attn.cute.interface",
            "pip install flash-attn-4, see requirements.txt (Hopper or Blackwell)"),
    "torch": ("torch.nn.attention.varlen",
              "pip install 'torch>=2.10' with CUDA (Ampere or newer)"),
}


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """Causal attention: q (B, T, H, Dh), k, v (B, T', K, Dh) -> (B, T, H, Dh). Without a
    layout each row is one document, the queries the last T of its T' positions (cached
    keys). With one the rows, laid end to end, are cut at its cu_seqlens into documents;
    nothing is seen across a cut."""
    if k.shape[1] < q.shape[1] or (layout is not None and k.shape[1] != q.shape[1]):
        raise UserError(f"attention got {q.shape[1]} queries and {k.shape[1]} keys a row: under a "
                        "layout they must be equal; pass layout=None with cached keys")
    # flash kernels exist in half precision on CUDA only
    name = ATTENTION if q.is_cuda and q.dtype in HALF else "plain"
    if layout is None:
        return BACKENDS[name](q, k, v, None, k.shape[1])
    return BACKENDS[name](q, k, v, layout.cu_seqlens, layout.max_seqlen)


# Every backend: q (B, T, H, Dh), k, v (B, T', K, Dh), cu (n + 1) int32 or None, the longest
# key sequence -> (B, T, H, Dh). All align the causal mask bottom-right.
def attend_fa3(q, k, v, cu, longest):
    """FlashAttention-3: its own custom ops let torch.compile trace it as it is."""
    module = FLASH["fa3"]
    if cu is None:
        y = module.flash_attn_func(q, k, v, causal=True)
    else:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        y = module.flash_attn_varlen_func(*flat, cu, cu, longest, longest, causal=True)
    y = y[0] if isinstance(y, tuple) else y     # early releases return (y, lse)
    return y.view(q.shape)


def attend_fa4(q, k, v, cu, longest):
    """FlashAttention-4, behind our own custom op: its Python cannot be traced."""
    if cu is None:
        return fa4_forward(q, k, v, None, longest)[0]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    return fa4_forward(*flat, cu, longest)[0].view(q.shape)


def attend_torch(q, k, v, cu, longest):
    """PyTorch's own kernels: SDPA for plain squares, else the varlen FlashAttention-2."""
    (B, T, H, _), keys = q.shape, k.shape[1]
    if cu is None and T == keys:
        return plain_rows(q, k, v)
    cu_q, cu_k, longest_q = cu, cu, longest
    if cu is None:
        rows = torch.arange(B + 1, device=q.device, dtype=torch.int32)
        cu_q, cu_k, longest_q = rows * T, rows * keys, T
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    y = FLASH["torch"].varlen_attn(*flat, cu_q, cu_k, longest_q, longest,
                                   window_size=(-1, 0), enable_gqa=H != k.shape[2])
    return y.view(q.shape)


def attend_plain(q, k, v, cu, longest):
    """The twin the others are held to: SDPA, document by document where packed."""
    if cu is None:
        return plain_rows(q, k, v)
    q_rows, k_rows, v_rows = (x.flatten(0, 1)[None] for x in (q, k, v))
    bounds = cu.tolist()
    parts = []
    for a, b in zip(bounds, bounds[1:]):
        if b > a:     # the padding is segments of length zero
            parts.append(plain_rows(q_rows[:, a:b], k_rows[:, a:b], v_rows[:, a:b]))
    return torch.cat(parts, dim=1).view(q.shape)


BACKENDS = {"fa3": attend_fa3, "fa4": attend_fa4, "torch": attend_torch, "plain": attend_plain}


def plain_rows(q, k, v) -> Tensor:
    """SDPA of rows that are one document each, as a backend without cu."""
    T, keys = q.shape[1], k.shape[1]
    mask = None
    if T != keys:     # is_causal is aligned top-left
        key = torch.arange(keys, device=q.device)
        mask = torch.arange(keys - T, keys, device=q.device)[:, None] >= key
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


# --- attention on kept keys, which are read where they lie: neither joined with new ones, nor given gradients

KEPT_KEYS_TILE = dict(BM=64, BN=64, num_warps=4, num_stages=3)


def kept_keys_launch(kernel, rows: int, q: Tensor, key_heads: int, *arguments) -> None:
    """Run a kernel above on tiles of `rows` rows (BM or BN of them each), for every document
    and key head."""
    B, T, heads, width = q.shape
    if B * T:
        tiles = triton.cdiv(rows, KEPT_KEYS_TILE["BM"])
        kernel[(tiles, B * key_heads)](
            *arguments, width ** -0.5, KEY_HEADS=key_heads, GROUP=heads // key_heads, WIDTH=width,
            BW=triton.next_power_of_2(width), **KEPT_KEYS_TILE)


@operator(lambda q, *_: (room(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
def kept_keys_forward(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, first: int,
                      seen: int) -> tuple[Tensor, Tensor]:
    """q (B, T, H, Dh), k, v (B, T, K, Dh), old_k, old_v (B, P, K, Dh), of which `seen` from
    `first` on are seen -> y like q, log Σ exp (B, T, H) float32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y, lse = room(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    T, heads, key_heads = q.shape[1], q.shape[2], k.shape[2]
    kept_keys_launch(kept_keys_kernel, T * (heads // key_heads), q, key_heads, q, k, v, old_k, old_v, y,
                     lse, T, old_k.shape[1], first, seen)
    return y, lse


@operator(lambda dy, q, k, v, *_: (room(q), room(k), room(v)))
def kept_keys_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor,
                       y: Tensor, lse: Tensor, first: int, seen: int) -> tuple[Tensor, Tensor, Tensor]:
    """dy, y (B, T, H, Dh) -> the gradients of q, k and v."""
    dy, q, k, v = dy.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = room(q), room(k), room(v)
    T, heads, key_heads = q.shape[1], q.shape[2], k.shape[2]
    kept_keys_launch(kept_keys_dq_kernel, T * (heads // key_heads), q, key_heads, dy, q, k, v, old_k,
                     old_v, y, lse, dq, T, old_k.shape[1], first, seen)
    kept_keys_launch(own_keys_gradient_kernel, T, q, key_heads, dy, q, k, v, y, lse, dk, dv, T)
    return dq, dk, dv


def keep_seen(ctx, inputs, output):
    """What the gradient of kept_keys_forward needs."""
    *tensors, ctx.first, ctx.seen = inputs
    ctx.save_for_backward(*tensors, *output)


def kept_keys_gradient(ctx, dy, _):
    """Of q, k and v."""
    gradients = kept_keys_backward(dy, *ctx.saved_tensors, ctx.first, ctx.seen)
    return *gradients, None, None, None, None


kept_keys_forward.register_autograd(kept_keys_gradient, setup_context=keep_seen)


def joined(k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, first: int,
           seen: int) -> tuple[Tensor, Tensor]:
    """k, v (B, T, …) behind `seen` of old_k, old_v (B, P, …) from `first` on."""
    return (torch.cat((old_k.narrow(1, first, seen), k), dim=1),
            torch.cat((old_v.narrow(1, first, seen), v), dim=1))


def attention_on_kept(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor, first: int,
                      seen: int, kernel: bool | None = None) -> Tensor:
    """Causal attention of q (B, T, H, Dh) on k, v (B, T, K, Dh) and, ahead of them, `seen`
    of the kept old_k, old_v (B, P, K, Dh) from `first` on, which have no gradient."""
    sensible = q.is_cuda and q.dtype in HALF and ATTENTION != "plain"
    if use_triton("kept keys", kernel, sensible):
        return kept_keys_forward(q, k, v, old_k, old_v, first, seen)[0]
    return attention(q, *joined(k, v, old_k, old_v, first, seen))


# FlashAttention-4 registers no custom ops, and PyTorch 2.13's activate_flash_attention_impl
# unpacks two results where 4.0.0b36 returns five: we call its inner functions, by keyword.
signature = functools.cache(inspect.signature)    # reading one takes longer than launching a kernel


def fa4_call(name: str, *tensors, cu, longest):
    """_flash_attn_fwd or _flash_attn_bwd with those of our options that it knows."""
    function = getattr(FLASH["fa4"], name)
    options = dict(causal=True, return_lse=True)
    if cu is not None:
        options.update(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
    known = signature(function).parameters
    return function(*tensors, **{key: value for key, value in options.items() if key in known})


@operator(lambda dy, q, k, v, *_: [room(q), room(k), room(v)])
def fa4_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, y: Tensor,
                 lse: Tensor, longest: int) -> list[Tensor]:
    """dy, q, y (…, H, D), k, v (…, K, D) -> dq, dk, dv."""
    grads = fa4_call("_flash_attn_bwd", q, k, v, y, dy.contiguous(), lse, cu=cu, longest=longest)
    return [g.contiguous() for g in grads[:3]]


def fa4_room(q, *_):
    """The output, like q, and its log-sum-exp (…, H, T) float32."""
    *rows, T, H, _ = q.shape
    return room(q), q.new_empty((*rows, H, T), dtype=torch.float32)


@operator(fa4_room)
def fa4_forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None,
                longest: int) -> tuple[Tensor, Tensor]:
    """Rows (B, T, H, Dh) with cu None, or packed (N, H, Dh) -> y like q, and log Σ exp
    (B, H, T) or (H, N)."""
    y, lse = fa4_call("_flash_attn_fwd", q, k, v, cu=cu, longest=longest)[:2]
    return y.contiguous(), lse.contiguous()


def fa4_gradient(ctx, dy, _):
    """Of q, k, v alone."""
    return *fa4_backward(dy, *ctx.saved_tensors, ctx.number), None, None


fa4_forward.register_autograd(fa4_gradient, setup_context=save_all)


def self_test(name: str, device: torch.device) -> str:
    """How a loaded backend fails, empty if it does not: forward and backward against the
    plain twin, packed with a padded end, square, with cached keys, and compiled as in
    training and adaptation."""
    backend = torch.compile(BACKENDS[name], fullgraph=True, dynamic=False, backend="aot_eager")
    for keys, bounds in ((128, [0, 40, 41, 128, 128]), (128, None), (192, None)):
        random = torch.Generator().manual_seed(0)
        shapes = (128, 8), (keys, 4), (keys, 4), (128, 8)
        q, k, v, dy = (torch.randn(1, *shape, 64, generator=random).to(device, torch.bfloat16)
                       for shape in shapes)
        cu = bounds and torch.tensor(bounds, dtype=torch.int32, device=device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        for x in leaves if cu is None else ():      # chunks are of any length
            torch._dynamo.mark_dynamic(x, 1)
        results = []
        for attend in (backend, attend_plain):
            with torch.enable_grad():
                y = attend(*leaves, cu, keys)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        if fault := unlike_twin(*results):
            return f"{fault} at {keys} keys, cu = {bounds}"
    return ""


@torch.no_grad()
def unlike_twin(results: Sequence[Tensor], twins: Sequence[Tensor]) -> str:
    """How far results in bfloat16 are off; empty: no farther than rounding takes them, 0.7 %."""
    errors = [float((x.float() - twin.float()).norm() / twin.float().norm())
              for x, twin in zip(results, twins)]
    worst = max(errors, key=lambda error: (error != error, error))     # NaN is
    return "" if worst < 0.03 else f"differs from the plain twin by {worst:.1%} (bound 3%)"


def kernel_faults(device: torch.device) -> dict[str, str]:
    """What is wrong with our own kernels on `device`, by name: each against its plain twin, forward and
    backward."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        x = scale * torch.randn(shape, generator=random)
        return x.to(device, torch.bfloat16).requires_grad_()

    def side_by_side(x, qkv, q_gain, kernel):
        weights = dict(qkv=qkv, q_gain=q_gain)
        return torch.cat(normed_heads(x, weights, rope, 1.0, kernel=kernel)[:3], dim=2)

    rows, width, vocab = 200, 512, 8192
    ids = torch.randint(vocab, (rows,), generator=random).to(device)
    angle = torch.randn(rows, 8, generator=random).to(device)
    rope = angle.cos(), angle.sin()
    kept = draw(4, 512, 4, 64).detach()
    up, down = draw(2048, width, scale=0.04), draw(width, 2048, scale=0.02)
    qkv = draw(1024, width, scale=0.04)
    y, v, gate = draw(1, rows, 8, 64), draw(1, rows, 4, 64), draw(1, rows, 8)
    queries, keys, values = draw(4, 96, 8, 64), draw(4, 96, 4, 64), draw(4, 96, 4, 64)
    trials = {     # name: function, what it has gradients of, what else it reads
        "cross-entropy": (capped_ce, [draw(rows, vocab, scale=4)], [ids, 30.0]),
        "head": (head_losses, [draw(rows, width), draw(vocab, width)], [ids, 30.0]),
        "MLP": (leaky_square_mlp, [draw(rows, width), up, down], [0.5]),
        "queries, keys and values": (side_by_side, [draw(1, rows, width), qkv, draw(8)], []),
        "own value": (remove_own_value, [y, v, gate], []),
        "kept keys": (attention_on_kept, [queries, keys, values], [kept, kept, 60, 400]),
    }
    faults = {}
    for name, (function, leaves, others) in trials.items():
        results = []
        try:
            for kernel in (True, False):
                y = function(*leaves, *others, kernel=kernel)
                weight = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
                results.append([y, *torch.autograd.grad((y.float() * weight).sum(), leaves)])
            fault = unlike_twin(*results)
        except Exception as error:     # kernels fail in every way there is
            fault = in_a_line(error)[:160]
        if fault:
            faults[name] = fault
    return faults


def attention_fault(name: str, device: torch.device) -> str:
    """Why a backend cannot run on `device`; empty: it can, and is in FLASH."""
    if name == "plain":
        return ""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA GPU, the device is {device}"
    fault = ""
    for module in PACKAGES[name][0].split():
        try:
            FLASH[name] = importlib.import_module(module)
            return self_test(name, device)
        except Exception as error:     # third-party kernels fail in every way there is
            fault = fault or in_a_line(error)[:160]
    return fault


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of that generation or a later one, for which there are fast kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def resolve_attention(choice: str, device) -> tuple[str, str]:
    """ATTN_BACKEND -> (what runs on `device`, why); auto: the first without a fault."""
    if choice not in ("auto", *BACKENDS):
        names = ", ".join(BACKENDS)
        raise UserError(f"ATTN_BACKEND={choice} is unknown; choose one of auto, {names}")
    device, passed_over = torch.device(device), []
    for name in BACKENDS if choice == "auto" else (choice,):
        fault = attention_fault(name, device)
        if not fault and choice == "auto" and name == "plain" and is_hopper(device):
            raise UserError(f"no fast attention runs on this GPU ({'; '.join(passed_over)}): "
                            f"install {PACKAGES['fa4'][1]}, or set ATTN_BACKEND=plain, many "
                            "times slower")
        if not fault:
            by = "chosen" if choice == "auto" else "forced"
            return name, "; ".join((f"attention {name} ({by})", *passed_over))
        passed_over.append(f"not {name}: {fault}")
    raise UserError(f"ATTN_BACKEND={choice} cannot run here: {fault}. "
                    f"Install {PACKAGES[choice][1]}, or set ATTN_BACKEND=auto")


# ========================================
# 12  Pack: the artifact is one file of checked streams, without pickle
# ========================================

def check_code_form(s: Settings) -> None:
    """Refuse to ship the script without what its settings need."""
    if s.code_form.startswith("lean") and (names := s.beyond_the_system()):
        raise UserError(f"CODE_FORM={s.code_form} leaves out what "
                        f"{', '.join(names)} needs: set CODE_FORM=auto")


Array = np.ndarray


# --- container

MAGIC = b"\x93PGOLF\r\n"             # copies in text mode are noticed
ARTIFACT_VERSION = 5
PREFIX = struct.Struct("<8sHI8s")    # magic, version, bytes of JSON, digest of the rest


def digest_of(data: bytes) -> bytes:
    """64-bit checksum."""
    return hashlib.blake2b(data, digest_size=8).digest()


def artifact_to_bytes(header: dict, streams: Mapping[str, bytes]) -> bytes:
    """PREFIX, JSON {"header", "streams": [[name, bytes], …]}, streams."""
    sizes = [[name, len(data)] for name, data in streams.items()]
    root = {"header": header, "streams": sizes}
    text = json.dumps(root, sort_keys=True, allow_nan=False, separators=(",", ":"))
    text = text.encode()
    body = b"".join([text, *streams.values()])
    return PREFIX.pack(MAGIC, ARTIFACT_VERSION, len(text), digest_of(body)) + body


def artifact_from_bytes(blob: bytes, origin: str) -> tuple[dict, dict[str, bytes]]:
    """artifact_to_bytes' (header, streams); UserError for what is foreign, cut or altered."""
    with refused(f"{origin} is no whole artifact", "copy it again, or write it again"):
        if blob[:8] != MAGIC or len(blob) < PREFIX.size:
            raise ValueError(f"it starts with {blob[:8]!r}, not {MAGIC!r}, or is cut off")
        _, version, begin, digest = PREFIX.unpack_from(blob)
        body = blob[PREFIX.size:]
        if version != ARTIFACT_VERSION:
            raise ValueError(f"its format is {version}, this script reads {ARTIFACT_VERSION}")
        if digest_of(body) != digest:
            raise ValueError(f"its {len(blob):,} bytes are not those of its checksum")
        root, streams = json.loads(body[:begin]), {}
        for name, size in root["streams"]:
            end = begin + int(size)
            if not begin <= end <= len(body):
                raise ValueError(f"the stream {name} ends beyond the file")
            streams[str(name)] = body[begin:end]
            begin = end
        if begin != len(body):
            raise ValueError("it has bytes too many")
        return dict(root["header"]), streams


# --- bytes

def byte_shuffle(data: bytes, stride: int) -> bytes:
    """All bytes at positions 0 mod stride, then those at 1 mod stride, …"""
    return b"".join(data[i::stride] for i in range(stride))


def byte_unshuffle(data: bytes, stride: int) -> bytes:
    """Inverse of byte_shuffle."""
    out, begin = bytearray(len(data)), 0
    for i in range(stride):
        end = begin + len(out[i::stride])
        out[i::stride] = data[begin:end]
        begin = end
    return bytes(out)


def brotli_pack(data: bytes, stride: int = 1) -> bytes:
    """stride: bytes per item (2 for float16)."""
    return brotli.compress(byte_shuffle(data, stride), quality=11, lgwin=24)


def brotli_unpack(blob: bytes, size: int, stride: int = 1) -> bytes:
    """Inverse of brotli_pack, for `size` bytes: no more is expanded."""
    reader = brotli.Decompressor()
    data = reader.process(blob, output_buffer_limit=size + 1)
    if len(data) != size or not reader.is_finished():
        raise ValueError(f"a stream of {len(blob)} bytes gives {len(data)}, not {size}")
    return byte_unshuffle(data, stride)


def split_bytes(blob: bytes, sizes: Sequence[int], dtype: str = "i1") -> list[Array]:
    """Arrays of these sizes that brotli_pack was given one after the other."""
    stride = np.dtype(dtype).itemsize
    data = brotli_unpack(blob, stride * sum(sizes), stride)
    return np.split(np.frombuffer(data, dtype).copy(), np.cumsum(sizes)[:-1])


# --- contexts: how large a code is expected to be, in eighths of an octave

Sides = tuple[Array, Array]  # contexts of rows (R), of columns (C)
ROW_LEVELS = 56       # of a row: 7 octaves upwards from an rms of 1/4
COLUMN_REACH = 12     # of a column: 1.5 octaves to either side


def code_level(codes: Array, axis: int | None = None) -> Array:
    """log2 of the rms of codes along an axis, int in eighths of an octave."""
    power = np.mean(np.square(codes, dtype=np.float32), axis=axis, dtype=np.float64)
    return np.rint(OCTAVE / 2 * np.log2(np.maximum(power, 1 / 16))).astype(int)


def code_levels(codes: Array, rows: Array, columns: Array) -> Array:
    """Of codes (R, C), int8 (1 + R + C): the level of all; by how many quarters of an
    octave rows and columns differ from what is predicted of rows (R), columns (C)."""
    parts = [code_level(codes)[None]]
    for axis, predicted in ((1, rows), (0, columns)):
        excess = code_level(codes, axis) - predicted
        excess = excess - np.median(excess)
        parts.append(np.rint(excess / 2).clip(-127, 127))
    return np.concatenate(parts).astype(np.int8)


def scale_contexts(levels: Array, rows: Array, columns: Array) -> Sides:
    """The contexts of a code matrix, by integers alone: inverse of code_levels."""
    overall, *excess = np.split(levels.astype(np.int32), [1, 1 + len(rows)])
    sides = []
    for predicted, quarters in zip((rows, columns), excess):
        level = predicted + 2 * quarters
        sides.append(level - np.sort(level)[len(level) // 2])
    rows, columns = sides
    rows = (rows + overall + 2 * OCTAVE).clip(0, ROW_LEVELS - 1)
    return rows, columns.clip(-COLUMN_REACH, COLUMN_REACH) + COLUMN_REACH


# --- guesses

# The rows of an embedding share directions: what has been read of a row tells of its next code. A row is
# taken as a sum of RANK factors, its shares in them unknown, plus noise; the guess is the recursive
# least-squares estimate, and only what differs from it is coded.
RANK = 8
RIDGE = 1024       # the noise's variance in units of a share's
GAIN_BITS = 24     # gains are integers of this many fractional bits
TALL = 8           # rows a column has at least where factors may pay


def shared_factors(codes: Array) -> Array | None:
    """Factors int8 (RANK, C) of codes (R, C); None where they do not pay."""
    if len(codes) < TALL * codes.shape[1] or codes.shape[1] <= RANK:
        return None
    power = np.square(codes, dtype=np.float32).mean(1, keepdims=True)
    rms = np.sqrt(power).clip(0.25)
    size, axes = np.linalg.eigh((codes / rms).T @ (codes / rms))
    noise = size[:-RANK].mean().clip(1e-9)      # codes may all be 0
    excess = np.maximum(size[-RANK:] / noise - 1, 0)
    factors = np.rint(np.sqrt(RIDGE * excess) * axes[:, -RANK:]).T
    factors = factors.clip(-127, 127).astype(np.int8)
    before = np.square(codes / rms).mean(0) + 1e-9
    after = np.square(residues(codes, factors) / rms).mean(0) + 1e-9
    bits = len(codes) / 2 * np.log2(before / after).sum()
    return factors if bits > 8 * factors.size else None


class Guesser:
    """The next code of every row, by the factors (r, C) and the codes so far. In
    integers, but for gains from exact sums, which round alike on all machines."""

    def __init__(self, factors: Array, rows: int):
        self.factors = factors.astype(np.int64)
        self.sums = np.zeros((len(factors), rows), np.int64)
        self.gains = []
        covariance = np.eye(len(factors)) / RIDGE
        for column in factors.T.astype(float):
            gain = np.array([math.fsum(row) for row in covariance * column])
            self.gains.append(np.rint(gain * 2.0 ** GAIN_BITS).astype(np.int64))
            shrink = gain[:, None] * gain / (1 + math.fsum(gain * column))
            covariance = covariance - shrink

    def guess(self, j: int) -> Array:
        """Column j, int8 (rows)."""
        half = 1 << GAIN_BITS - 1
        guess = self.gains[j] @ self.sums + half >> GAIN_BITS
        return guess.clip(-127, 127).astype(np.int8)

    def observe(self, j: int, codes: Array) -> None:
        """Take in column j's true codes, int8 (rows)."""
        self.sums += self.factors[:, j, None] * codes


def residues(codes: Array, factors: Array | None) -> Array:
    """int8 (R, C): codes (R, C) less what their factors let expect, modulo 256."""
    if factors is None:
        return codes
    guesser, out = Guesser(factors, len(codes)), np.empty_like(codes)
    for j in range(codes.shape[1]):
        out[:, j] = codes[:, j] - guesser.guess(j)
        guesser.observe(j, codes[:, j])
    return out


# --- tables: how often the codes of a context occur

PROB_BITS = 12
PROB_ONE = 1 << PROB_BITS
OWN_TABLE = 255       # in the place of a level: the table is in the file
ESCAPES = (128, 127)  # uint8 codes for even and odd ones that are listed apart


@functools.cache
def normal_table(level: int, odd: int) -> Array:
    """Frequencies (256), PROB_ONE in all, of codes as uint8 around -odd / 2 with a
    deviation of level eighths of an octave above 1/4; alike on all machines."""
    with decimal.localcontext(decimal.Context(prec=12)):
        narrow = (decimal.Decimal(16 - level) / 4 * decimal.Decimal(2).ln()).exp() / 2
        centre = decimal.Decimal(odd) / 2
        density = [(-narrow * (k + centre) ** 2).exp() for k in range(-128, 128)]
        weight = np.array([int(x * 10 ** 9) for x in density])
    weight = np.roll(weight, -128)
    weight[ESCAPES,] = 0
    freq, left = np.divmod(weight * (PROB_ONE - 2), weight.sum())
    freq[ESCAPES,] = 1
    missing = PROB_ONE - freq.sum()
    freq[np.argsort(-left, kind="stable")[:missing]] += 1
    return freq


def fold(count: Array, rare: Array) -> Array:
    """Counts (256), those of rare codes (256) given to their parity's escape."""
    folded = np.where(rare, 0, count)
    for parity, escape in enumerate(ESCAPES):
        folded[escape] = (count * rare)[parity::2].sum()
    return folded


def fitted_table(count: Array) -> Array:
    """Frequencies (256), PROB_ONE in all, for counts (256). Rare codes get none: a slot
    costs the others 1 / PROB_ONE, listing a code apart a byte."""
    count = fold(count, listed_apart(6 * PROB_ONE * count >= count.sum()))
    freq = np.maximum(count * PROB_ONE // count.sum(), count > 0)
    while (excess := freq.sum() - PROB_ONE) != 0:
        step = -1 if excess > 0 else 1
        bits_won = count * np.log2(np.maximum(freq + step, 1) / np.maximum(freq, 1))
        movable = (count > 0) & (freq + step > 0)
        freq[np.where(movable, bits_won, -np.inf).argmax()] += step
    return freq


def listed_apart(freq: Array) -> Array:
    """Which codes are not held by tables (…, 256) of frequencies."""
    rare = freq == 0
    rare[..., ESCAPES] = True
    return rare


def choose_table(count: Array, odd: int) -> tuple[int, Array]:
    """(level, frequencies) of the normal table nearest to counts (256); OWN_TABLE where
    their own is worth the six bits that a frequency takes."""
    def bits(freq):
        rare = listed_apart(freq)
        each = PROB_BITS - np.log2(np.maximum(freq, 1))
        return fold(count, rare) @ each + 8 * (count @ rare)

    code = np.arange(256, dtype=np.uint8).view(np.int8) + odd / 2
    power = count @ code ** 2 / max(count.sum(), 1)
    near = round(2 * OCTAVE + OCTAVE / 2 * math.log2(max(power, 1 / 16)))
    levels = range(max(near - 1, 0), near + 2)
    level = min(levels, key=lambda x: bits(normal_table(x, odd)))
    freq = normal_table(level, odd)
    if count.any():
        own = fitted_table(count)
        if bits(own) + 6 * np.count_nonzero(own) < bits(freq):
            return OWN_TABLE, own
    return level, freq


# --- codes

# rANS (Duda 2013; interleaved as in Giesen 2014). A lane is one state; it codes a row, and all lanes go
# through the columns together. Rows of all tensors with equal C are stacked, and lanes live on from batch
# to batch: Python's loop is (rows / lanes) x columns long, and a lane costs 4 bytes.
LOW, LANES = 1 << 16, 1024
CODES_HEAD = struct.Struct("<HHII")  # lanes, contexts, listed codes, bytes in front


def lane_count(size: int) -> int:
    """Lanes for so many codes."""
    return min(LANES, 1 + (size >> 14))


class Stack(NamedTuple):
    """Code matrices of one width C, their rows below one another."""
    ids: list[int]            # numbers of the T matrices
    owner: Array              # (R) which of them a row belongs to, 0…T-1
    rows: Array               # (R) row contexts
    columns: Array            # (C, T) column contexts
    factors: Array | None     # (RANK, C), of a matrix that is stacked alone

    def batches(self, lanes: int) -> Iterator[tuple[slice, Array]]:
        """(which rows, their contexts (C, n)), a row for each lane."""
        for begin in range(0, len(self.rows), lanes):
            part = slice(begin, begin + lanes)
            yield part, self.columns[:, self.owner[part]] + self.rows[part]


def stacked(sides: Sequence[Sides], factors: Mapping[int, Array]) -> Iterator[Stack]:
    """All matrices by width, those with factors alone."""
    groups = {}
    for i, (_, columns) in enumerate(sides):
        alone = i if i in factors else len(sides)
        groups.setdefault((len(columns), alone), []).append(i)
    for (_, alone), ids in sorted(groups.items()):
        rows, columns = zip(*(sides[i] for i in ids))
        owner = np.repeat(np.arange(len(ids)), [len(r) for r in rows])
        rows = np.concatenate(rows).astype(np.int32)
        columns = np.stack(columns, 1).astype(np.int32)
        yield Stack(ids, owner, rows, columns, factors.get(alone))


def count_contexts(sides: Sequence[Sides], trellis: bool) -> int:
    """How many contexts there are, twice as many with a trellis."""
    last = max(int(max(rows) + max(columns)) for rows, columns in sides)
    return last + 1 << trellis


def next_state(state: Array, codes: Array) -> Array:
    """Next trellis states (n) after codes (n), by their parity."""
    return TRELLIS.take(state << 1 | codes & 1)


def state_bits(codes: Array) -> Array:
    """The trellis states' low bits before each of the codes (C, n), from state 0."""
    bits = np.empty(codes.shape, np.uint8)
    state = np.zeros(codes.shape[1], np.uint8)
    for bit, column in zip(bits, codes):
        bit[:] = state & 1
        state = next_state(state, column)
    return bits


def rans_encode(lanes: Array, index: Array, freq: Array, start: Array) -> list[Array]:
    """Push a batch, last column first: lanes (n) uint32 in place, index (C, n) into
    freq, start -> words."""
    x, words = lanes.copy(), []
    for symbols in index[::-1]:
        f = freq.take(symbols)
        full = np.flatnonzero(x >> 32 - PROB_BITS >= f)
        words.append((x[full] & 0xFFFF).astype("<u2"))
        x[full] >>= 16
        quotient = x // f
        x = (quotient << PROB_BITS) + (x - quotient * f) + start.take(symbols)
    lanes[:] = x
    return words


def encode_codes(codes: Sequence[Array], sides: Sequence[Sides], trellis: bool = False,
                 factors: Mapping[int, Array] = {}) -> bytes:
    """Codes [int8 (R, C), …] -> bytes; nothing may be empty. A code's context is the sum
    of its sides, 0…255; with a trellis twice that plus the state's low bit. factors: by
    number, of tensors whose residues are coded."""
    count = count_contexts(sides, trellis)
    lanes = lane_count(sum(matrix.size for matrix in codes))
    batches = []  # (C, n) uint16: context << 8 | code as uint8
    for stack in stacked(sides, factors):
        true = np.concatenate([codes[i] for i in stack.ids])
        coded = residues(true, stack.factors).view(np.uint8)
        for part, context in stack.batches(lanes):
            if trellis:
                context = 2 * context + state_bits(np.ascontiguousarray(true[part].T))
            batches.append((context << 8 | coded[part].T).astype(np.uint16))
    counts = np.zeros(count << 8, int)
    for batch in batches:
        counts += np.bincount(batch.ravel(), minlength=count << 8)
    counts = counts.reshape(count, 256)
    tables = [choose_table(n, i & trellis) for i, n in enumerate(counts)]
    levels = bytes(level for level, _ in tables)
    freq = np.stack([table for _, table in tables])
    rare = listed_apart(freq)
    own = [table for level, table in tables if level == OWN_TABLE]
    own = np.array(own, "<u2").tobytes()
    listed = [batch[rare.take(batch)].astype(np.uint8) for batch in batches]
    listed = b"".join(x.tobytes() for x in listed)
    front = brotli_pack(byte_shuffle(own, 2) + listed)
    pushed = np.where(rare, np.tile(ESCAPES, 128), np.arange(256))
    pushed += 256 * np.arange(count)[:, None]
    start = np.cumsum(freq, 1) - freq
    freq, start = (table.astype(np.uint32).take(pushed) for table in (freq, start))
    states, words = np.full(lanes, LOW, np.uint32), []
    for batch in reversed(batches):
        words += rans_encode(states[:batch.shape[1]], batch, freq, start)
    head = CODES_HEAD.pack(lanes, count, len(listed), len(front))
    words = np.concatenate(words[::-1]).tobytes()
    return b"".join([head, levels, front, states.astype("<u4").tobytes(), words])


@dataclass
class Decoder:
    """What of a blob of codes has not been read."""
    lanes: Array     # (n) uint32
    words: Array     # (W) uint16
    listed: Array    # (N) uint8
    table: Array     # of lookup_table
    trellis: bool

    def batch(self, slots: Array, factors: Array | None) -> Array:
        """Pop codes (C, n) uint8; slots (C, n) uint32: where contexts begin."""
        n = slots.shape[1]
        x, state = self.lanes[:n], np.zeros(n, np.uint8)
        codes = np.empty(slots.shape, np.uint8)
        guesser = None if factors is None else Guesser(factors, n)
        for j, (slot, code) in enumerate(zip(slots, codes)):
            if self.trellis:
                slot += (state & 1).astype(np.uint32) << PROB_BITS
            entry = self.table.take(slot + (x & PROB_ONE - 1))
            code[:] = entry >> 24
            width = (entry >> PROB_BITS & PROB_ONE - 1) + 1
            x = width * (x >> PROB_BITS) + (entry & PROB_ONE - 1)
            low = np.flatnonzero(x < LOW)
            escaped = np.flatnonzero((code == ESCAPES[0]) | (code == ESCAPES[1]))
            if low.size > self.words.size or escaped.size > self.listed.size:
                raise ValueError("the codes end too soon")
            x[low] = x[low] << 16 | self.words[:low.size]
            code[escaped] = self.listed[:escaped.size]
            self.words = self.words[low.size:]
            self.listed = self.listed[escaped.size:]
            if guesser is not None:
                code += guesser.guess(j).view(np.uint8)
                guesser.observe(j, code.view(np.int8))
            if self.trellis:
                state = next_state(state, code)
        self.lanes[:n] = x
        return codes


def lookup_table(freq: Array) -> Array:
    """Of every slot, from frequencies (contexts, 256), uint32: code << 24 |
    frequency - 1 << 12 | slot - the code's first slot."""
    freq = freq.ravel()
    symbol = np.repeat(np.arange(freq.size), freq)      # context << 8 | code
    offset = np.arange(symbol.size) - (np.cumsum(freq) - freq)[symbol]
    code, width = symbol & 255, freq[symbol]
    entry = code << 24 | width - 1 << PROB_BITS | offset
    return entry.astype(np.uint32)


def read_tables(levels: bytes, front: bytes, listed: int,
                trellis: bool) -> tuple[Array, Array]:
    """Frequencies (contexts, 256), and as many listed codes uint8."""
    own_size = 512 * levels.count(OWN_TABLE)
    data = brotli_unpack(front, own_size + listed)
    own = np.frombuffer(byte_unshuffle(data[:own_size], 2), "<u2").astype(np.int64)
    own = iter(own.reshape(-1, 256))
    tables = []
    for i, level in enumerate(levels):
        if level == OWN_TABLE:
            tables.append(next(own))
        else:
            tables.append(normal_table(level, i & trellis))
    freq = np.stack(tables)
    if (freq.sum(1) != PROB_ONE).any():
        raise ValueError(f"a table of codes does not sum to {PROB_ONE}")
    return freq, np.frombuffer(data, np.uint8)[own_size:]


def decode_codes(blob: bytes, sides: Sequence[Sides], trellis: bool = False,
                 factors: Mapping[int, Array] = {}) -> list[Array]:
    """Inverse of encode_codes; ValueError for anything else: all words must be used up and
    all states be back where the encoder began."""
    count = count_contexts(sides, trellis)
    size = sum(len(rows) * len(columns) for rows, columns in sides)
    head = CODES_HEAD.unpack(blob[:CODES_HEAD.size].ljust(CODES_HEAD.size, b"\0"))
    lanes, stored, n_listed, n_front = head
    front = CODES_HEAD.size + count      # where it begins
    states = front + n_front
    words = states + 4 * lanes
    rest = len(blob) - words
    expected = lanes == lane_count(size) and stored == count and n_listed <= size
    if not expected or rest < 0 or rest % 2:
        raise ValueError(f"header {head} for {count} contexts, {size} codes, {len(blob)} bytes")
    levels = blob[CODES_HEAD.size:front]
    freq, listed = read_tables(levels, blob[front:states], n_listed, trellis)
    decoder = Decoder(
        lanes=np.frombuffer(blob, "<u4", lanes, states).astype(np.uint32),
        words=np.frombuffer(blob, "<u2", offset=words),
        listed=listed, table=lookup_table(freq), trellis=trellis)
    out = {}
    for stack in stacked(sides, factors):
        codes = np.empty((len(stack.rows), len(stack.columns)), np.uint8)
        for part, context in stack.batches(lanes):
            slots = context.astype(np.uint32) << PROB_BITS + trellis
            codes[part] = decoder.batch(slots, stack.factors).T
        for t, i in enumerate(stack.ids):
            out[i] = codes[stack.owner == t].view(np.int8)
    if decoder.words.size or decoder.listed.size or (decoder.lanes != LOW).any():
        raise ValueError("the coder's states do not return to the start")
    return [out[i] for i in range(len(sides))]


# A row whose codes are not all int8 is wide: its lowest bits are stored as they are, for nothing can be told
# of them, and what is left is coded, as if that were its codes.
MOST_LOW_BITS = 8


def low_bits(codes: Array) -> Array:
    """How many low bits of each row of codes (R, C) are not coded, int8 (R)."""
    largest = np.maximum(codes.max(1), ~codes.min(1))
    needed = np.frexp(largest.astype(float))[1]      # bits without the sign
    return np.maximum(needed - 7, 0).astype(np.int8)


def bit_planes(low: Sequence[Array]) -> Iterator[tuple[int, int, Array]]:
    """(matrix, bit, its rows that have it), the lowest bit first, of low_bits' [(R), …]."""
    for i, counts in enumerate(low):
        for bit in range(counts.max()):
            yield i, bit, np.flatnonzero(counts > bit)


def take_low_bits(codes: Sequence[Array], low: Sequence[Array]) -> bytes:
    """The low bits of codes [(R, C), …], so many of every row, plane by plane."""
    planes = [np.packbits(codes[i][rows] >> bit & 1) for i, bit, rows in bit_planes(low)]
    return b"".join(plane.tobytes() for plane in planes)


def give_low_bits(codes: Sequence[Array], low: Sequence[Array], data: bytes) -> list[Array]:
    """The codes again, int16 where rows are wide, of what was coded of them [int8 (R, C), …]."""
    whole, begin = [], 0
    for part, counts in zip(codes, low):
        whole.append(part.astype(np.int16) << counts[:, None] if counts.any() else part)
    for i, bit, rows in bit_planes(low):
        count = len(rows) * codes[i].shape[1]
        plane = np.frombuffer(data[begin:begin + -(-count // 8)], np.uint8)
        plane = np.unpackbits(plane, count=count).reshape(len(rows), -1)
        whole[i][rows] |= plane.astype(np.int16) << bit
        begin += -(-count // 8)
    if begin != len(data):
        raise ValueError(f"{len(data)} bytes of low bits, not {begin}")
    return whole


# of each matrix, for rows (R) and columns (C): how large codes are expected to be against each other, in
# eighths of an octave, by what the decoder has
Predicted = Sequence[tuple[Array, Array]]


def pack_codes(codes: Sequence[Array], predicted: Predicted,
               trellis: bool = False) -> tuple[dict[str, bytes], list[int]]:
    """Codes [int8 or int16 (R, C), …] as streams, and which matrices have factors."""
    low = [low_bits(matrix) for matrix in codes]
    bits = take_low_bits(codes, low)
    codes = [(x >> n[:, None]).astype(np.int8) for x, n in zip(codes, low)]
    predicted = without_low_bits(predicted, low)
    factors, levels = {}, []
    for i, matrix in enumerate(codes):
        shared = shared_factors(matrix)
        if shared is not None:
            factors[i] = shared
        levels.append(code_levels(residues(matrix, shared), *predicted[i]))
    sides = [scale_contexts(x, *p) for x, p in zip(levels, predicted)]
    streams = {}
    for stream, arrays in ((FACTOR_STREAM, factors.values()), (LEVEL_STREAM, levels),
                           (WIDE_STREAM, low)):
        streams[stream] = brotli_pack(b"".join(x.tobytes() for x in arrays))
    streams[LOW_STREAM] = bits
    streams[CODE_STREAM] = b""
    if codes:
        streams[CODE_STREAM] = encode_codes(codes, sides, trellis, factors)
    return streams, list(factors)


def without_low_bits(predicted: Predicted, low: Sequence[Array]) -> Predicted:
    """What is expected of the part of the codes that is coded."""
    return [(rows - OCTAVE * counts, columns)
            for (rows, columns), counts in zip(predicted, low)]


def unpack_codes(streams: Mapping[str, bytes], tall: Sequence[int], predicted: Predicted,
                 trellis: bool = False) -> list[Array]:
    """Inverse of pack_codes, `tall` having factors."""
    sizes = [RANK * len(predicted[i][1]) for i in tall]
    flat = split_bytes(streams[FACTOR_STREAM], sizes)
    factors = {i: x.reshape(RANK, -1) for i, x in zip(tall, flat)}
    low = split_bytes(streams[WIDE_STREAM], [len(rows) for rows, _ in predicted])
    if any(counts.min() < 0 or counts.max() > MOST_LOW_BITS for counts in low if counts.size):
        raise ValueError("rows of codes that are wider than any")
    predicted = without_low_bits(predicted, low)
    sizes = [1 + len(rows) + len(columns) for rows, columns in predicted]
    levels = split_bytes(streams[LEVEL_STREAM], sizes)
    sides = [scale_contexts(x, *p) for x, p in zip(levels, predicted)]
    if not sides:
        return []
    codes = decode_codes(streams[CODE_STREAM], sides, trellis, factors)
    return give_low_bits(codes, low, streams[LOW_STREAM])


# --- the model in the container

LEVEL_STREAM, FACTOR_STREAM = "levels", "factors"
WIDE_STREAM, LOW_STREAM = "wide", "low_bits"
PLAIN_STREAMS = {HALF_STREAM: "<f2", BYTE_STREAM: "i1"}      # for brotli
SIZES = ("lqer_rank", "lqer_asym_group")      # settings that a file says for itself


def architecture(s: Settings) -> dict:
    """The settings that give a weight its meaning: no others read an artifact."""
    everything = s.as_env()
    names = ["VOCAB_SIZE", "TRAIN_SEQ_LEN"]
    for name in group_names("model"):
        if "INIT" not in name and name != "ENABLE_LOOPING_AT":
            names.append(name)
    return {name: everything[name] for name in names}


def group_names(group: str) -> list[str]:
    """The settings of one of --help's groups, in capitals."""
    names, current = [], ""
    for f in fields(Settings):
        current = f.metadata["group"] or current
        if current == group:
            names.append(f.name.upper())
    return names


def check_architecture(s: Settings, theirs: Mapping, what: str) -> None:
    """Refuse weights of another architecture()."""
    check_made_with(architecture(s), architecture(Settings()), theirs, what,
                    "use the settings it was made with")


def check_made_with(ours: Mapping, usual: Mapping, theirs: Any, what: str, remedy: str) -> None:
    """Refuse a file of other settings than ours. One that the file does not name had its
    usual value; one that only the file names must be off."""
    wrong = []
    theirs = theirs if isinstance(theirs, dict) else {}
    for name, there in {**usual, **theirs}.items():
        here = ours.get(name, "unknown")
        if there != here and (name in ours or there):
            wrong.append(f"{one_line(name, 40)}={one_line(there, 24)} there, {here} here")
    if not theirs:
        wrong = ["it names no settings"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what} of another configuration: {'; '.join(wrong[:3])}{more}; {remedy}")


def coding_plan(q: Quantised, shapes: Mapping[str, tuple]) -> tuple[Predicted, bool]:
    """What coder and decoder know of the codes `<name>.q`: how large they are expected to
    be, by their steps, and whether they walk the trellis."""
    predicted, names = [], [key.removesuffix(".q") for key in shapes]
    for name, (rows, columns) in zip(names, shapes.values()):
        steps = (q.tensors.get(name + ".row", torch.zeros(rows)),
                 q.tensors.get(input_of(name) + ".col", torch.zeros(columns)))
        predicted.append(tuple(-x.int().numpy() for x in steps))
    return predicted, any("trellis" in q.forms[name] for name in names)


def pack_model(s: Settings, q: Quantised) -> bytes:
    """A quantised model as the bytes of an artifact."""
    stored = stored_tensors(s, q.forms)
    codes = [q.tensors[key].numpy() for key in stored[CODE_STREAM]]
    streams, tall = pack_codes(codes, *coding_plan(q, stored[CODE_STREAM]))
    for stream, dtype in PLAIN_STREAMS.items():
        data = b"".join(q.tensors[key].numpy().tobytes() for key in stored[stream])
        streams[stream] = brotli_pack(data, np.dtype(dtype).itemsize)
    forms = names_by(q.forms.get, q.forms)      # few forms, many names
    header = {"architecture": s.to_be_stored(architecture(s)), "forms": forms,
              "factors": tall, "base_step": q.base_step,
              "sizes": {name: getattr(s, name) for name in SIZES}}
    return artifact_to_bytes(header, streams)


def read_model(s: Settings, header: Mapping, streams: Mapping[str, bytes]) -> Quantised:
    """Its inverse, of an artifact's header and streams."""
    sizes, base_step = header["sizes"], header["base_step"]
    tall = header["factors"]
    whole = all(type(x) is int and x > 0 for x in sizes.values())
    if set(sizes) != {*SIZES} or not whole:
        raise ValueError(f"sizes {sizes}")
    if not 0 < base_step < math.inf:
        raise ValueError(f"base step {base_step}")
    q = Quantised({}, {}, base_step)
    for form, names in header["forms"].items():
        if not q.forms.keys().isdisjoint(names):
            raise ValueError("a tensor that is stored twice")
        q.forms.update(dict.fromkeys(names, form))
    stored = stored_tensors(dataclasses.replace(s, **sizes), q.forms)
    for stream, dtype in PLAIN_STREAMS.items():
        shapes = stored[stream]
        lengths = [math.prod(shape) for shape in shapes.values()]
        parts = split_bytes(streams[stream], lengths, dtype)
        for (key, shape), part in zip(shapes.items(), parts):
            q.tensors[key] = torch.from_numpy(part.reshape(shape))
    shapes = stored[CODE_STREAM]
    if tall != sorted(set(tall) & set(range(len(shapes)))):
        raise ValueError(f"factors of {tall}")
    codes = unpack_codes(streams, tall, *coding_plan(q, shapes))
    q.tensors.update((key, torch.from_numpy(x)) for key, x in zip(shapes, codes))
    return q


class Artifact(NamedTuple):
    """What an artifact holds."""
    model: Quantised
    weights: dict[str, Tensor]       # what it stands for, by name
    calibration: Tensor | None       # the 15 numbers of calibrated_by
    mark: str                        # why it is NON-COMPLIANT; empty if it is not


def read_artifact(s: Settings, blob: bytes, origin: str) -> Artifact:
    """What an artifact's bytes hold; UserError when they are damaged, of another
    configuration or nonsense, before memory or time is spent on them."""
    header, streams = artifact_from_bytes(blob, origin)
    check_architecture(s, header.get("architecture"), f"{origin} is an artifact")
    with refused(f"{origin} has contents that do not fit together", "write it again"):
        q = read_model(s, header, streams)
        mark = header.get("not_compliant", "")
        weights = dequantise(q)
        finite = all(w.isfinite().all() for w in weights.values())
        if not finite or not isinstance(mark, str):
            raise ValueError("weights that are not finite, or a mark that is no text")
        return Artifact(q, weights, read_calibration(streams), plain_mark(mark))


def read_calibration(streams: Mapping[str, bytes]) -> Tensor | None:
    """An artifact's calibration (15), within fit_calibration's bounds, if any."""
    if CALIBRATION_STREAM not in streams:
        return None
    raw = torch.tensor(np.frombuffer(streams[CALIBRATION_STREAM], "<f4"))
    good = len(raw) == 1 + CATEGORIES and raw.isfinite().all()
    if not good or raw[1:].abs().max() > CALIBRATION_REACH:
        raise ValueError(f"{len(raw)} numbers that are no calibration")
    return raw


def stored_shape(s: Settings, shape: Sequence[int], letters: str) -> tuple[int, ...]:
    """A tensor's shape by letters: a weight's R and C, its factors' rank k, the
    groups g of their values. ValueError where only a matrix has such."""
    if letters == "all":
        return tuple(shape)
    rows, columns = shape
    rank = min(s.lqer_rank, rows, columns)
    groups = rank * columns // s.lqer_asym_group
    sizes = {"R": rows, "C": columns, "k": rank, "g": groups, "1": 1}
    return tuple(sizes[letter] for letter in letters)


def stored_tensors(s: Settings, forms: Mapping[str, str]) -> dict[str, dict[str, tuple]]:
    """{stream: {tensor: shape}} in the file's order; ValueError for other weights."""
    streams: dict[str, dict] = {CODE_STREAM: {}, HALF_STREAM: {}, BYTE_STREAM: {}}
    views = blank_views(s)
    if set(forms) != set(views):
        raise ValueError(f"other tensors: {sorted(set(forms) ^ set(views))[:3]}")
    for name, w in views.items():
        parts = forms[name].split("+")
        if len(set(parts)) < len(parts):
            raise ValueError(f"{name} as {forms[name]}")
        for form in parts:
            storage = STORAGE[form]
            for key, (_, stream, letters) in zip(storage.keys(name), storage.tensors):
                streams[stream][key] = stored_shape(s, w.shape, letters)
    return streams


def blank_views(s: Settings) -> dict[str, Tensor]:
    """The model's weights as they are named in files, without memory."""
    shapes = GPT.shapes(s)
    return matrix_views({n: torch.empty(shapes[n], device="meta") for n in shapes})


# --- the script as it is shipped

def without_comments(source: bytes) -> bytes:
    """The same program without comments and docstrings, but for the module's. What is
    left stays in its line, as tracebacks name it."""
    text = source.decode()
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            said, *others = node.body
            if others:      # else it is the body
                for number in range(said.lineno, said.end_lineno + 1):
                    lines[number - 1] = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column].rstrip()
    return "\n".join(lines).encode()


def self_extracting(source: bytes) -> bytes:
    """A script that runs `source`, less its comments, from its compressed form, a latin-1
    string with escapes. linecache is filled for Triton and tracebacks."""
    packed = lzma.compress(without_comments(source), format=lzma.FORMAT_RAW,
                           filters=SCRIPT_FILTERS)
    escapes = {b"\\": b"\\\\", b'"': b'\\"', b"\n": b"\\n", b"\r": b"\\r",
               b"\0": b"\\x00"}
    for byte, escape in escapes.items():
        packed = packed.replace(byte, escape)
    return (PACKED_START + b"import lzma,linecache\n"
            b"s=lzma.decompress(\"" + packed + b"\".encode('latin-1'),3,None,"
            + repr(SCRIPT_FILTERS).encode() + b").decode()\nn=__file__+'#'\n"
            b"linecache.cache[n]=(len(s),None,s.splitlines(True),n)\nexec(compile(s,n,'exec'))\n")


PACKED_START = b"# coding: latin-1\n"
SCRIPT_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME,
                   "lc": 4, "pb": 0, "dict_size": 1 << 20}]


def lean(source: bytes) -> bytes:
    """A script without part three; its settings' names stay, each with its default alone."""
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
    """Which of CODE_FORMS is shipped and counted. A packed script stays so."""
    if script_source().startswith(PACKED_START):
        return "lean_packed" if Settings.__base__ is object else "packed"
    if s.code_form == "auto":
        return "packed" if s.beyond_the_system() else "lean_packed"
    return s.code_form


@functools.cache
def code_bytes(form: str = "readable") -> int:
    """Size of the running script in one of CODE_FORMS, or as it is if packed."""
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
    script = code_bytes(form)
    total = artifact + script
    over = total - ARTIFACT_LIMIT
    if over > 0:
        raise UserError(f"artifact {artifact:,} + {form} script {script:,} = {total:,} bytes "
                        f"is {over:,} over the limit of {ARTIFACT_LIMIT:,}: make the model "
                        "smaller, or ship the smallest script (CODE_FORM=auto)")
    return total


# --- fitting the limit

LZMA_SLACK = 256   # bytes: another liblzma may pack the script a little worse
MARK_BYTES = 256   # for what makes a run NON-COMPLIANT when its artifact is fitted
CALIBRATION_BYTES = 1024     # for logit calibration, with room to spare
MOST_TRIES = 12
FIRST_OVERHEAD = 0.001       # share of the size beyond its estimate; then the last try's
SLOWEST_TRY = 1.2            # a try's time, by that of the one before
HALF_BYTES = 1.7   # of a float16 number in the file; measured on the demo: 1.69
GUESSED = 0.93     # what guesses leave of an embedding's codes; measured: 0.92, 0.94
ROWS_LEFT_OUT = 0.1    # share of codes that a base step below the finest would change
LARGEST_DEVIATION = TOP_CODE / 4     # of codes: few Gaussian ones are over the top
DEVIATION_BINS = 255   # of rows and of columns: eighths of an octave around 1


def code_deviations(quantiser: Quantiser) -> np.ndarray:
    """deviations_of summed over all matrices of all ranks."""
    counts = np.zeros(2 * DEVIATION_BINS - 1)
    for name in quantiser.own:
        counts = counts + deviations_of(quantiser, name)
    return sum(quantiser.world.gather(counts))


def deviations_of(quantiser: Quantiser, name: str) -> np.ndarray:
    """How many codes of a matrix have which deviation at base step 1: counts by eighths of an
    octave around 1."""
    w = quantiser.weights[name].float() / quantiser.columns_of(name)
    rows = quantiser.planned_rows(name).to(w.device)[:, None]
    power = (w / rows.clamp_min(1e-30)).square().clamp_max(1e30)
    power = power.masked_fill(rows == 0, 0)
    row_counts = count_levels(power.mean(1))
    column_counts = count_levels(power.mean(0) / power.mean().clamp_min(1e-20))
    # taken as a row's times a column's: logarithms add, so their counts convolve
    return np.convolve(row_counts, column_counts)


def count_levels(power: Tensor) -> np.ndarray:
    """Counts (DEVIATION_BINS) of mean squares (N) by deviation, in eighths of an
    octave; bin DEVIATION_BINS // 2 is 1."""
    level = (OCTAVE / 2 * power.clamp_min(NO_WEIGHT).log2()).round() + DEVIATION_BINS // 2
    level = level.clamp(0, DEVIATION_BINS - 1).int()
    return level.bincount(minlength=DEVIATION_BINS).cpu().numpy()


def finest_step(deviations: Array) -> float:
    """The base step below which most rows' steps stay, their codes being at the top."""
    if not deviations.any():
        return 1.0
    below = deviations.cumsum()
    level = np.searchsorted(below, ROWS_LEFT_OUT * below[-1]) - len(below) // 2
    return 2 ** (level / OCTAVE) / LARGEST_DEVIATION


def estimate_bytes(deviations: Array, base_step: float = 1.0) -> float:
    """Bytes of codes of these deviations (see deviations_of), coded as Gaussians."""
    level = np.arange(len(deviations)) - len(deviations) // 2
    octave = level / OCTAVE - math.log2(base_step)
    sigma = np.exp2(np.minimum(octave, math.log2(LARGEST_DEVIATION)))
    return float(deviations @ np.log2(1 + 2 * math.pi * math.e * sigma ** 2)) / 16


def base_step_for(deviations: Array, size: float, finest: float) -> float:
    """The finest base step, from `finest`, for which estimate_bytes is at most size."""
    base_step = finest
    for _ in range(40):      # a doubling saves at most one bit per code: never too far
        excess = estimate_bytes(deviations, base_step) - size
        bits = 8 * excess / max(deviations.sum(), 1)
        base_step *= 2 ** min(max(bits, 0), 1)
    return base_step


def fitter_tries(quantiser: Quantiser, size: float) -> int:
    """How often a model is packed until it fits, about: once where as fine as it can be it is
    far under the limit."""
    return 1 if estimate_bytes(quantiser.deviations, quantiser.finest) < 0.9 * size else 3


def expected_size(s: Settings) -> str:
    """What the artifact will weigh, if all weights were Gaussian. UserError below two
    bits a code."""
    views = blank_views(s)
    precision = {name: precision_of(s, name, w) for name, w in views.items()}
    stored = stored_tensors(s, {name: p.form for name, p in precision.items()})
    codes, halves, small = (sum(map(math.prod, shapes.values()))
                            for shapes in stored.values())
    other = HALF_BYTES * halves + small
    fisher = s.quant_allocation == "fisher"
    coded = 0.0      # bytes, at the finest
    for name, p in precision.items():
        if p.coded:
            rows, columns = views[name].shape
            share = GUESSED if rows >= TALL * columns else 1.0
            finest = 1 / LARGEST_DEVIATION
            if not fisher:
                finest = p.clip_sigmas / (2 ** (p.bits - 1) - 1)
            coded += share * estimate_bytes(np.array([rows * columns]), finest)
    room = ARTIFACT_LIMIT - code_bytes(shipped_form(s)) - other
    bits = 8 * room / max(codes, 1)
    if room < codes / 4:
        raise UserError(f"{codes:,} weights would get {bits:.2f} bits each in what the "
                        f"limit of {ARTIFACT_LIMIT:,} bytes leaves; "
                        "make the model smaller")
    if coded < room:
        note = f", with {codes:,} weights at their finest" if fisher and codes else ""
        return (f"about {coded + other:,.0f} bytes, "
                f"{room - coded:,.0f} under the limit{note}")
    return (f"about {room + other:,.0f} bytes: {codes:,} weights fitted to the limit, "
            f"at about {bits:.2f} bits each")


def room_for_model(s: Settings) -> int:
    """Bytes an artifact may have when it is fitted: marks and calibration come later."""
    form = shipped_form(s)
    room = ARTIFACT_LIMIT - code_bytes(form) - MARK_BYTES
    if s.logit_calib_enabled:
        room -= CALIBRATION_BYTES
    return room - LZMA_SLACK if form.endswith("packed") else room


def quantise_once(run: Run, quantiser: Quantiser, base_step: float) -> bytes:
    """The artifact of one base step, on every rank."""
    s, world = quantiser.s, quantiser.world
    watch = Clock()
    q = quantiser(base_step)
    quantised = watch.elapsed()
    blob = world.from_main(pack_model, s, q)
    script = code_bytes(shipped_form(s))
    run.log("pack", bytes=len(blob), code_bytes=script, total=len(blob) + script,
            base_step=base_step, quantise_s=quantised,
            pack_s=watch.elapsed() - quantised)
    return blob


def quantise_to_fit(s: Settings, world: World, run: Run, weights: Mapping[str, Tensor],
                    curvature: Curvature, clock: Clock | None = None,
                    measure: Measure | None = None) -> bytes:
    """The artifact, on every rank: as fine as the limit allows, less at most a margin.
    UserError for a size that no step reaches. clock: training's; once something fits, no
    try that would pass its budget. measure: for plan_by_measure."""
    clock = clock or Clock()
    quantiser = Quantiser(s, weights, curvature, world)
    for instead in sorted(set(quantiser.unusual.values())):
        matrices = [name for name, x in quantiser.unusual.items() if x == instead]
        run.log("curvature", used=instead, matrices=matrices)
    cap, margin = room_for_model(s), s.fit_margin_bytes
    if measure:
        world.beat("measuring kinds")
        run.log("kinds", **plan_by_measure(quantiser, measure, cap))
    finest, deviations = quantiser.finest, quantiser.deviations
    overhead = FIRST_OVERHEAD * cap      # bytes beyond the estimate
    best, over, under = b"", 0.0, math.inf      # base steps: too fine, coarse enough
    for attempt in range(MOST_TRIES):
        if under < 1.01 * over:
            alike = estimate_bytes(deviations, over) - estimate_bytes(deviations, under)
            if alike < margin / 4:
                over = 0.0      # the size jumps here: a finer step may fit all the same
        base_step = base_step_for(deviations, cap - margin / 2 - overhead, finest)
        creeps = not best and attempt > MOST_TRIES // 2      # the estimate is no guide here
        if creeps or not over < base_step < under:
            base_step = over * 2 ** attempt      # while nothing fits: far beyond
            if best:
                base_step = math.sqrt(max(over, finest) * under)
        watch = Clock()
        world.beat(f"quantising try {attempt + 1}")
        blob = quantise_once(run, quantiser, base_step)
        overhead = len(blob) - estimate_bytes(deviations, base_step)
        if len(blob) > cap:
            over = max(over, base_step)
        else:
            best, under = max(best, blob, key=len), min(under, base_step)
            if base_step <= finest or len(blob) >= cap - margin:
                break
        next_ends = clock.elapsed() + SLOWEST_TRY * watch.elapsed()
        if best and world.agree(0 < clock.budget < next_ends):
            break
    if not best:
        raise UserError(f"the artifact of {len(blob):,} bytes is over the limit, of which script, "
                        f"calibration and packing leave {cap:,}: make the model smaller, or set "
                        "LOGIT_CALIB_ENABLED=0")
    return best


# ========================================
# 13  Counts of earlier text: the score leans towards what followed the same context before
# ========================================

def check_counts(s: Settings) -> None:
    """Refuse a tilt by which no expert ever speaks."""
    if s.ngram_tilt_enabled and not experts_in_use(s):
        thresholds = " or ".join(expert.threshold.upper() for expert in EXPERTS.values())
        raise UserError("NGRAM_TILT_ENABLED=1 has no expert in use: "
                        f"lower {thresholds} to at most 1")


ODD = np.uint64(0x9E3779B97F4A7C15)     # products with it spread over the upper bits
COUNT_IN_PARTS = 1 << 20                # from so many items on: threads share the work
Guesses = tuple[Array, Array]           # hint (n,) and confidence (n,) float32; 0, 0: none


def scramble(x: Array) -> Array:
    """A 64-bit key of each integer."""
    x = (x.astype(np.uint64) + np.uint64(1)) * ODD
    return (x ^ x >> np.uint64(32)) * ODD


def earlier_in_group(keys: Array, learns: Array) -> tuple[Array, Array]:
    """Of items sorted by key: how many of its key with `learns` come before each, and
    whether it is the first."""
    new = np.append(np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1])
    begin = np.flatnonzero(new)
    earlier = np.cumsum(learns) - learns
    size = np.diff(np.append(begin, len(keys)))
    return earlier - np.repeat(earlier[begin], size), new


def repeated(keys: Array, items: Array) -> Array:
    """Items whose key may come twice (long contexts rarely do), sorted by it, then in
    time."""
    bits = np.uint64(63 - len(items).bit_length())
    bucket = keys[items] << np.uint64(5) >> bits
    bucket = bucket.astype(np.int64)
    items = items[(np.bincount(bucket) > 1)[bucket]]
    return items[np.argsort(keys[items], kind="stable")]


def leading_tokens(keys: Array, tokens: Array, learns: Array) -> Guesses:
    """online_counts of items sorted by key."""
    total, new = earlier_in_group(keys, learns)
    pairs = scramble(keys) ^ scramble(tokens)
    by_pair = np.argsort(pairs, kind="stable")
    before, _ = earlier_in_group(pairs[by_pair], learns[by_pair])
    count = np.empty(len(keys), np.int64)
    count[by_pair] = before + 1           # to which this item brings its token
    level = np.cumsum(new) << 32          # a later key is above all earlier ones
    level += count * learns
    highest = np.append(0, np.maximum.accumulate(level))[:-1]
    leads = np.where(learns & (level > highest), np.arange(len(keys)), 0)
    leader = np.append(0, np.maximum.accumulate(leads))[:-1]
    most = (highest & 0xFFFFFFFF).astype(np.float32)
    share = most / np.maximum(total, 1).astype(np.float32)
    known = total > 0
    return tokens[leader] * known, share * known


def online_counts(keys: Array, tokens: Array, learns: Array) -> Guesses:
    """Before each of n items, in this order: the token that followed its context (key)
    most often, and its share of them; the first to reach a count keeps it. Only items
    with `learns` are counted."""
    hint = np.zeros(len(keys), tokens.dtype)
    confidence = np.zeros(len(keys), np.float32)

    def count(items: Array) -> None:
        items = repeated(keys, items)
        guesses = leading_tokens(keys[items], tokens[items], learns[items])
        hint[items], confidence[items] = guesses

    if len(keys) < COUNT_IN_PARTS:
        count(np.arange(len(keys)))
        return hint, confidence
    part = (keys >> np.uint64(59)).astype(np.uint8)      # parts share nothing
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda i: count(np.flatnonzero(part == i)), range(32)))
    return hint, confidence


class Expert(NamedTuple):
    """A way to guess the next token from earlier text: names of settings, and how."""
    threshold: str      # speaks from this confidence on
    boost: str          # nats added to its hint's logit
    count: Callable     # (settings, tokens (n + 1)) -> Guesses of the targets tokens[1:]


def count_tokens(s: Settings, tokens: Array) -> Guesses:
    """What followed the same TOKEN_ORDER - 1 tokens earlier."""
    n, context = len(tokens) - 1, s.token_order - 1
    skip = min(max(context - 1, 0), n)         # targets without a whole context
    code = scramble(np.arange(s.vocab_size))
    keys = np.zeros(n - skip, np.uint64)
    for i in range(context):
        keys *= ODD
        keys += code[tokens[i:i + len(keys)]]
    every = np.ones(n - skip, bool)
    hint, confidence = online_counts(keys, tokens[1 + skip:], every)
    return np.pad(hint, (skip, 0)), np.pad(confidence, (skip, 0))


EXPERTS = {"token": Expert("token_threshold", "token_boost", count_tokens)}


def experts_in_use(s: Settings) -> dict[str, tuple[float, float]]:
    """(least confidence, boost in nats) of the experts; the order decides ties."""
    used = {}
    for name, expert in EXPERTS.items():
        threshold = getattr(s, expert.threshold)
        if threshold <= 1:
            used[name] = threshold, getattr(s, expert.boost)
    return used


def ngram_experts(s: Settings, tokens: Array) -> dict[str, Guesses]:
    """Of every expert in use, for the targets tokens[1:]."""
    return {name: EXPERTS[name].count(s, tokens) for name in experts_in_use(s)}


@dataclass(frozen=True)
class Hints:
    """Where an expert speaks: input positions `at` (m,) rising; per expert hint (E, m)
    and confidence (E, m) float32, 0 where it is silent."""
    at: Array
    hint: Array
    confidence: Array

    @classmethod
    def of(cls, s: Settings, tokens: Array) -> Hints:
        """For the targets tokens[1:]."""
        guesses = ngram_experts(s, tokens).values()
        hint, confidence = map(np.stack, zip(*guesses))
        for row, (least, _) in zip(confidence, experts_in_use(s).values()):
            row[row < np.float32(least)] = 0     # as published: 9 of 20 reach 0.45
        at = np.flatnonzero(confidence.any(0))
        return cls(at, hint[:, at], confidence[:, at])

    @classmethod
    def for_windows(cls, s: Settings, world: World, val: Validation) -> Hints | None:
        """Counted in the stream's order, by rank 0; None where nothing is tilted."""
        if not s.ngram_tilt_enabled:
            return None
        return world.from_main(cls.in_order, s, val, np.arange(len(val.documents)))

    @classmethod
    def for_adapting(cls, s: Settings, world: World, val: Validation) -> Hints | None:
        """The same for TTT, counted in the order in which it scores the documents."""
        if not cls.orders_differ(s):
            return cls.for_windows(s, world, val)
        groups = []
        for ttt_round in ttt_rounds(s, val.documents.length):
            groups += ttt_round.groups
        return world.from_main(cls.in_order, s, val, np.concatenate(groups))

    @staticmethod
    def orders_differ(s: Settings) -> bool:
        """Whether TTT counts the documents in another order than the windows do."""
        return s.ngram_tilt_enabled and "stream" not in (s.ttt_doc_order, s.ngram_doc_order)

    @classmethod
    def in_order(cls, s: Settings, val: Validation, order: Array) -> Hints:
        """Counted document by document in this order; positions are the stream's."""
        start = val.documents.start[order]
        targets = val.documents.length[order] - 1
        text = [val.tokens[a + 1:a + 1 + n] for a, n in zip(start, targets)]
        hints = cls.of(s, np.concatenate([val.tokens[start[:1]], *text]))
        end = np.cumsum(targets)
        document = np.searchsorted(end, hints.at, side="right")
        at = hints.at + (start - (end - targets))[document]
        sort = np.argsort(at)
        return cls(at[sort], hints.hint[:, sort], hints.confidence[:, sort])

    def find(self, at: Array, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hints (E, …) int64 and confidences (E, …) at input positions (…)."""
        hint = np.zeros((len(self.hint), *at.shape), np.int64)
        confidence = np.zeros(hint.shape, np.float32)
        i = np.searchsorted(self.at, at)
        known = i < len(self.at)
        known[known] = self.at[i[known]] == at[known]
        hint[:, known] = self.hint[:, i[known]]
        confidence[:, known] = self.confidence[:, i[known]]
        return torch.from_numpy(hint).to(device), torch.from_numpy(confidence).to(device)

    @staticmethod
    def choose(s: Settings, q: Tensor, hints: Tensor,
               confidences: Tensor) -> tuple[Tensor, ...]:
        """The hint (…), -1 where the expert is silent, its probability in the model and
        its boost in nats, of hints, confidences and q (1, …)."""
        speaks = confidences[0] > 0
        boost = s.token_boost * speaks.double()
        return hints[0].where(speaks, -1), q[0].double() * speaks, boost


def tilt(s: Settings, losses: Tensor, targets: Tensor, hints: Tensor,
         confidences: Tensor) -> Tensor:
    """Losses (…) of the targets under p'(a) = p(a) exp(boost [a = hint]) / normaliser.
    losses (1 + E, …): of the target and of every hint."""
    q = torch.exp(-losses[1:].double()).clamp(1e-12, 1 - 1e-12)
    hint, chance, boost = Hints.choose(s, q, hints, confidences)
    normaliser = torch.log1p(chance * torch.expm1(boost))
    return (losses[0] - boost * (targets == hint) + normaliser).float()


def tilted_losses(s: Settings, losses: Callable, ids: Tensor, targets: Tensor,
                  at: Array, hints: Hints | None) -> tuple[Tensor, Tensor]:
    """(losses to learn from, losses to book) of the targets after input positions
    at (B, T): the same without hints. losses(ids, targets): the model."""
    if hints is None:
        plain = losses(ids, targets)
        return plain, plain
    hint, confidence = hints.find(at, ids.device)
    every = losses(ids, torch.cat((targets[None], hint)))
    return every[0], tilt(s, every.detach(), targets, hint, confidence)


# --- what followed like hidden states in the same document

MOST_OF_CACHE = 0.6     # largest weight of earlier places beside the model's own probability


@torch.no_grad()
def mixed_with_cache(s: Settings, losses: Tensor, cache: KeyCache) -> Tensor:
    """Losses (B, T) once the model's probability p is mixed with what earlier places
    of the document say. Place i says the token that came after it, with weight a_i =
    exp(TTT_CACHE_THETA (cos(h_i, h_t) - 1)); all together count w =
    min(MOST_OF_CACHE, TTT_CACHE_LAMBDA max a_i): (1 - w) p + w sum(a_i [i's token is
    the target]) / sum(a_i), which sums to 1 over the vocabulary."""
    past, said = cache.remembered()
    h, targets = (x[:, -losses.size(1):] for x in (past, said))
    place = torch.arange(past.size(1), device=h.device)
    earlier = place < place[-h.size(1):, None]      # what came after t itself is the target
    a = torch.exp(s.ttt_cache_theta * (h.float() @ past.float().mT - 1)) * earlier
    agrees = said[:, None] == targets[..., None]
    chance = (a * agrees).sum(-1) / a.sum(-1).clamp(min=1e-30)
    w = (s.ttt_cache_lambda * a.amax(-1)).clamp(max=MOST_OF_CACHE)
    return -torch.log((1 - w) * torch.exp(-losses) + w * chance)


def mixed_with_base(s: Settings, losses: Tensor, base: Tensor) -> Tensor:
    """Losses (N,) once a target's adapted probability is mixed with the base model's:
    (1 - TTT_BASE_SHARE) p + TTT_BASE_SHARE p_base, which sums to 1 over the vocabulary.
    A step that went too far costs less, so steps may be longer."""
    share = s.ttt_base_share
    return -torch.logaddexp(math.log1p(-share) - losses, math.log(share) - base)


# ========================================
# 14  Probes and checks: what is proved before the first step and before the evaluation clock
# ========================================

def check_before_start(s: Settings, world: World, attention_reason: str) -> list[Finding]:
    """All that can be checked before a model or a folder is made; UserError for the first
    thing that is wrong."""
    world.beat("checking")
    if world.main:
        with contextlib.suppress(OSError, ValueError):
            print("checking settings, machine and data", flush=True)
    findings = run_checks(s, world, folder_of(s, s.run_id), attention_reason)
    for finding in findings:
        if not finding.ok:
            raise UserError(finding.figure)
    world.beat("set-up")
    return findings


def log_checks(s: Settings, run: Run, findings: Sequence[Finding]) -> None:
    """What was found, and how the run breaks the rules, into the log. UserError when it goes
    on with other data than its own."""
    for reason in study_reasons(s):
        run.not_compliant(reason)
    for finding in findings:
        run.log("check", what=finding.name, detail=finding.figure)
        if finding.name == "data fingerprint":
            check_same_data(s, run, finding.figure)
    run.save_summary()


class Finding(NamedTuple):
    """A line of --check, or what a probe says."""
    name: str
    ok: bool
    figure: str


class Study:
    """A mode that breaks the rules: every run of it is marked NON-COMPLIANT."""

    def reason(self, s: Settings) -> str:
        """Why a score with these settings is no result; empty if it may be one."""
        return ""

    def after_training(self, s: Settings, world: World, run: Run, model: GPT,
                       val: Validation) -> None:
        """What is done with the averaged weights."""

    def before_probing(self, s: Settings, world: World, model: GPT,
                       tokens: np.ndarray) -> None:
        """The same with a probe's tokens (N,), briefly."""


class PartOfValidation(Study):
    """Only a share of the documents is scored."""

    def reason(self, s: Settings) -> str:
        share = s.val_doc_fraction
        return f"VAL_DOC_FRACTION={share:g}: only a part is scored" if share < 1 else ""


STUDIES: list[Study] = [PartOfValidation()]


def study_reasons(s: Settings) -> list[str]:
    """Why a score with these settings is no result."""
    return list(filter(None, (study.reason(s) for study in STUDIES)))


# --- probes: evidence for the four conditions, from the functions that score

def run_probes(s: Settings, world: World, model: GPT) -> list[Finding]:
    """C1-C4 on made-up tokens, through Scorer and PhasedTTT as the settings have them: C1
    on every rank, C2 by all together."""
    small = not compiles(s, world.device)
    if small:
        # windows of eight chunks show the same
        window = max(8 * chunk_rules(s)[0].chunk + suffix_at(s, 0), s.eval_stride)
        s = dataclasses.replace(s, eval_seq_len=min(window, s.eval_seq_len),
                                ttt_eval_seq_len=min(window, s.ttt_eval_seq_len))
    longest = dict(world.pulse.longest)
    around = one_thread() if small else world.compiling()
    with around, weights_kept(model):
        findings = probe_conditions(s, world, model)
    world.pulse.longest = longest      # what compiling took here is no measure of an evaluation
    return findings


def probe_conditions(s: Settings, world: World, model: GPT) -> list[Finding]:
    """One after the other; a ledger that refuses something ends them."""
    findings, booked, refusal = [], [], ""
    alone = World(device=world.device, pulse=world.pulse)
    try:
        findings.extend(probe_causality(s, alone, model, booked))
        findings.extend(probe_normalisation(s, world, model))
    except LedgerError as error:
        refusal = str(error)
    figure = f"{sum(booked):,} targets booked once each, before any step on them"
    return [*findings, Finding("C3 C4 ledger", not refusal, refusal or figure)]


def log_probes(s: Settings, world: World, run: Run, model: GPT) -> None:
    """Evidence for C1-C4 into log and summary; one that fails: NON-COMPLIANT."""
    clock = Clock()
    probes = run_probes(s, world, model)
    run.summary["probes"] = {p.name: {"ok": p.ok, "figure": p.figure} for p in probes}
    for p in probes:
        run.log("probe", name=p.name, ok=p.ok, figure=p.figure)
        if not p.ok:
            run.not_compliant(f"the probe {p.name} failed: {p.figure}")
    run.log("probes", seconds=clock.elapsed())


@contextlib.contextmanager
def weights_kept(model: GPT):
    """Whatever is done inside, the weights are as before afterwards."""
    before = {n: p.clone() for n, p in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
        model.requires_grad_(True)


def probe_causality(s: Settings, world: World, model: GPT,
                    booked: list[int]) -> Iterator[Finding]:
    """C1: earlier scores stay the same, to the bit. booked: targets per evaluation."""
    shortest = min(rule.chunk for rule in chunk_rules(s))
    row = min(s.eval_seq_len, 4 * shortest)      # of a phase's training
    ttt = dataclasses.replace(
        s, ttt_batch_size=4, phased_ttt_num_phases=1, phased_ttt_prefix_docs=1,
        eval_seq_len=row, global_ttt_chunk_tokens=row)

    def by_windows(val: Validation, stride: int = s.eval_seq_len) -> Ledger:
        for study in STUDIES:
            study.before_probing(s, world, model, val.tokens)
        scorer = Scorer(s, world, model)
        val.hints = Hints.for_windows(s, world, val)
        scorer.windows(val, stride)
        return scorer.ledger

    def by_adapting(val: Validation, level: int = 0) -> Ledger:
        val.hints = Hints.for_adapting(ttt, world, val)
        evaluation = PhasedTTT(ttt, world, model, val)
        evaluation.watch.level = level
        evaluation.run()
        return evaluation.ledger

    if s.ttt_enabled and compiles(s, world.device):
        meet_full_groups(s, world, model)
    change = functools.partial(probe_change, model, booked)
    streams = probe_streams(s, "stream")
    yield change("C1 windows", by_windows, *streams)
    if s.sliding_window_enabled:
        sliding = functools.partial(by_windows, stride=s.eval_stride)
        yield change("C1 sliding windows", sliding, *streams)
    if s.ttt_enabled:
        one, variants = probe_streams(ttt, s.ttt_doc_order)
        if s.ttt_doc_order == "stream":
            variants += shortened_stream(ttt, one)
        if compiles(s, world.device):      # the graphs that the watchdog may fall back on
            first = NO_PHASES + 1 if suffix_at(s, 0) else NO_ADAPTATION
            for level in range(first, len(LEVELS)):
                by_adapting(Validation.of(one), level)
        yield change("C1 test-time training", by_adapting, one, variants)


def meet_full_groups(s: Settings, world: World, model: GPT) -> None:
    """Adapt to as many made-up documents as a group has: the compiler chooses by
    the first sizes that a graph meets."""
    chunk = chunk_rules(s)[0].chunk
    length = min(suffix_at(s, 0) + 4 * chunk, s.ttt_eval_seq_len)
    random = np.random.default_rng(0)
    tokens = random.integers(4, s.vocab_size, (s.ttt_batch_size, length))
    tokens[:, 0] = BOS
    val = Validation.of(tokens.flatten())
    val.hints = Hints.for_adapting(s, world, val)
    PhasedTTT(dataclasses.replace(s, phased_ttt_prefix_docs=0), world, model, val).run()


class Variant(NamedTuple):
    """A stream that differs from another after a cut: its tokens, what is scored
    after each, and the places (input positions) whose scores must not notice."""
    tokens: np.ndarray
    targets: np.ndarray
    kept: np.ndarray


def probe_change(model: GPT, booked: list[int], name: str, evaluate: Callable,
                 one: np.ndarray, variants: list[Variant]) -> Finding:
    """Whether the scores of a stream and its variants are equal where they must be,
    and differ elsewhere. evaluate(validation): the books."""
    def losses(tokens: np.ndarray, targets: np.ndarray | None = None) -> Tensor:
        with weights_kept(model):
            loss = evaluate(Validation.of(tokens, targets)).loss
        booked.append(len(loss))
        return loss

    first = losses(one)
    places, noise = 0, 0.0
    earlier, anywhere = [], []
    for variant in variants:
        again = losses(variant.tokens, variant.targets)
        change = (again - first[:len(again)]).abs()
        places += len(variant.kept)
        earlier.append(change[variant.kept].max().item())
        anywhere.append(change.max().item())
    figure = (f"largest change {max(earlier):g} over {places:,} earlier targets, "
              f"{max(anywhere):.3f} over later ones")
    if max(earlier) > 0 and first.is_cuda:      # kernels that add in any order
        noise = max((losses(one) - first).abs().max().item() for _ in range(3))
        figure += f"; the same stream four times differs by {noise:g}"
    return Finding(name, max(earlier) <= 2 * noise < min(anywhere), figure)


def probe_documents(s: Settings) -> tuple[list[int], list[int]]:
    """Lengths of six documents, and two tokens of the fourth after which streams differ:
    in a chunk in its middle, and in its last one, past every window. The first is a
    phase's; fourth and fifth are adapted together, then the rest."""
    longest, stride = max(s.eval_seq_len, s.ttt_eval_seq_len), s.eval_stride
    chunk = next(rule.chunk for rule in chunk_rules(s) if longest + 2 * stride <= rule.until)
    chunks = (longest + stride) // chunk + 1
    lengths = [
        s.eval_seq_len + stride // 4 + 1,
        2 * chunk + 3,
        2 * chunk + 4,
        chunks * chunk + chunk // 2 + 1,
        s.eval_seq_len + stride // 4 + 2,
        chunk + chunk // 2 + 2,
    ]
    return lengths, [n * chunk + chunk // 4 for n in (chunks // 2, chunks)]


def probe_streams(s: Settings, order: str) -> tuple[np.ndarray, list[Variant]]:
    """A made-up stream, and a variant for each cut. order=length: later are the
    document's own tokens and shorter documents. The last place before a cut is scored on
    the first stream's token: a look at it shows at full strength."""
    lengths, cuts = probe_documents(s)
    rng = np.random.default_rng(s.seed)
    phrase = rng.integers(4, s.vocab_size, 7)
    documents = []
    for n in lengths:
        text = np.resize(phrase, n - 1)      # repeated, for counts of earlier text to have a say
        if not s.ngram_tilt_enabled:
            text = rng.integers(4, s.vocab_size, n - 1)
        documents.append(np.append(BOS, text))
    one = np.concatenate(documents)
    document = np.repeat(np.arange(len(lengths)), lengths)
    longest = np.isin(document, np.argsort(lengths, kind="stable")[-2:])
    variants = []
    for cut in cuts:
        last = sum(lengths[:3]) + cut
        later = np.arange(len(one)) > last
        if order == "length":
            later = np.where(document == 3, later, ~longest)
        next_token = 4 + (one - 3) % (s.vocab_size - 4)
        other = np.where(later & (one != BOS), next_token, one)
        targets = other[1:].copy()
        targets[last] = one[last + 1]
        variants.append(Variant(other, targets, np.flatnonzero(~later[:-1])))
    return one, variants


def shortened_stream(s: Settings, one: np.ndarray) -> list[Variant]:
    """A variant whose fourth document ends earlier, within its last chunk; none where
    chunks are too short for that."""
    lengths, cuts = probe_documents(s)
    end, cut = sum(lengths[:4]), lengths[3] - 1 - cuts[1]
    other = np.delete(one, np.s_[end - cut:end])
    return [Variant(other, other[1:], np.arange(end - cut - 1))] if cut > 0 else []


def probe_normalisation(s: Settings, world: World, model: GPT) -> Iterator[Finding]:
    """C2: exp(-loss) of every possible next token, as the books have it, sums to 1: one
    document per token, scored by windows and by adapters that have learnt from its first
    two targets, over hidden states equal to the bit."""
    tokens = np.tile(np.array([BOS, 4, 5, 6, 7]), s.vocab_size + 1)[:-4]
    tokens[4::5] = np.arange(s.vocab_size)
    val = Validation.of(tokens)
    if s.ngram_tilt_enabled:
        val.hints, same = probe_hints(s)
        figure = "the same" if same else "not the same"
        yield Finding("C1 n-gram hints", same, f"{figure} for each of {s.vocab_size:,} targets")
    scorer = Scorer(s, world, model)
    if model.compute_dtype in HALF:      # it rounds angles along a row: one for every document
        scorer = Scorer(dataclasses.replace(s, compile="0"), world, model)
        scorer.capacity = 5
    scorer.windows(val, s.eval_seq_len)
    yield probe_sum("C2 windows", scorer.ledger)
    if s.ttt_enabled:
        rate = s.ttt_lora_lr if s.ttt_step_share else 0.001      # another would be another graph
        ttt = dataclasses.replace(
            s, ttt_chunk_size=2, ttt_short_score_first_enabled=False, ttt_batch_size=256,
            ttt_lora_rank=4, ttt_lora_alpha=4 * s.ttt_lora_alpha / s.ttt_lora_rank,
            ttt_lora_lr=rate or 0.001, ttt_warm_start_a=False, ttt_train_min_doc_len=0,
            ttt_train_max_doc_len=0, ttt_doc_order="stream", phased_ttt_prefix_docs=0,
            ttt_cache_theta=min(s.ttt_cache_theta, 1.0))
        evaluation = PhasedTTT(ttt, world, model, val)
        evaluation.run()
        yield probe_sum("C2 test-time training", evaluation.ledger)


def probe_sum(name: str, ledger: Ledger) -> Finding:
    """Of the documents' fourth targets, as they are booked."""
    p = np.exp(-ledger.total[3::5])
    total = float(p.sum())
    return Finding(name, abs(total - 1) < 1e-4, f"{len(p):,} probabilities sum to {total:.7f}")


def probe_hints(s: Settings) -> tuple[Hints, bool]:
    """Hints for the documents BOS 4 5 6 v, each as if it alone followed repeats of BOS 4
    5 6 7; and whether they are the same for every token v."""
    text = np.tile(np.array([BOS, 4, 5, 6, 7], np.uint16), s.token_order // 5 + 4)
    begin, documents = len(text) - 5, []
    for v in range(s.vocab_size):
        text[-1] = v
        hints = Hints.of(s, text)
        rows = np.vstack([hints.at - begin, hints.hint, hints.confidence])     # float64
        documents.append(rows[:, hints.at >= begin])
    same = all(np.array_equal(rows, documents[0]) for rows in documents)
    at = [rows[0] + 5 * v for v, rows in enumerate(documents)]
    at = np.concatenate(at).astype(np.int64)
    hint, confidence = np.split(np.concatenate(documents, axis=1)[1:], 2)
    return Hints(at, hint, confidence), same


# --- checks: what is known before the first step

def check_command(which: str) -> int:
    """--check: one line per finding; 1 when something is wrong."""
    if which not in ("", "settings", "data"):
        raise UserError(f"--check {which} is unknown: --check, --check settings or --check data")
    s = Settings.from_env(os.environ)
    launcher = {"WORLD_SIZE": str(max(1, torch.cuda.device_count())), "RANK": "0",
                "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    ranks = launcher_ranks({**launcher, **os.environ})
    if not s.eval_only_quantized_path:
        s.batch_shape(ranks.size)
    print(f"ok    settings: {len(s.changed())} differ from the defaults")
    for name, what in stray_names(os.environ).items():
        print(f"warn  {name}: {what}")
    if which == "settings":
        return 0
    folder = folder_of(s, s.run_id)
    findings = run_checks(s, World.join({}), folder, ranks=ranks.size)
    if which == "data":
        of_data = "training shards", "validation shards", "tokenizer", "data fingerprint"
        findings = [f for f in findings if f.name in of_data]
    else:
        forms = ", ".join(f"{form} {code_bytes(form):,}" for form in CODE_FORMS)
        print(f"ok    script: {shipped_form(s)} counts, in bytes: {forms}")
    for f in findings:
        print(f"{'ok   ' if f.ok else 'FAIL '} {f.name}: {f.figure}")
    return int(any(not f.ok for f in findings))


def run_checks(s: Settings, world: World, folder: Path,
               attention_why: str = "", ranks: int = 0) -> list[Finding]:
    """Every check of the mode, in the order a user would fix them. ranks: of the run,
    if they are not yet there."""
    ranks = ranks or world.size
    written = LOG_BYTES if s.eval_only_quantized_path else bytes_of_results(s)
    if not (s.eval_only_path or s.eval_only_quantized_path):
        written += 3 * bytes_of_weights(s)      # two averages, and one being written
    checks = {
        "made before": lambda: check_made_before(s),
        "device": lambda: check_device(s, world),
        "attention": lambda: (
            attention_why or resolve_attention(s.attn_backend, world.device)[1]),
        "batch": lambda: "{} ranks x {} micro-batches of {:,} tokens".format(
            ranks, *s.batch_shape(ranks)),
        "folder": lambda: check_folder(folder),
        "disk": lambda: check_disk(folder, written) if world.main else "rank 0 looks",
        "size": lambda: expected_size(s),
        "training shards": lambda: check_train_shards(s),
        "validation shards": lambda: check_validation(s),
        "tokenizer": lambda: check_tokenizer(s),
        "data fingerprint": lambda: check_manifest(s),
    }
    if s.eval_only_quantized_path:
        del checks["batch"], checks["training shards"]
    elif not s.eval_only_path:
        del checks["made before"]
    findings = []
    for what, check in checks.items():
        try:
            findings.append(Finding(what, True, check()))
        except UserError as error:
            findings.append(Finding(what, False, str(error)))
        except OSError as error:
            fault = f"cannot read {error.filename}: {error.strerror}; check its permissions"
            findings.append(Finding(what, False, fault))
    return findings


def check_tokenizer(s: Settings) -> str:
    """A SentencePiece model of VOCAB_SIZE tokens: its name and size."""
    table = ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size)
    return f"{s.tokenizer.name}, {len(table.base)} tokens"


def check_train_shards(s: Settings) -> str:
    """Headers and first tokens of all training shards; DATA_CHECK=full: all tokens."""
    shards = read_tokens(s, "train", None if s.data_check == "full" else 1_000_000)
    return f"{len(shards)} shards, {sum(map(len, shards.values())):,} tokens"


def check_validation(s: Settings) -> str:
    """The whole validation set, and the split: canonical, or a manifest's own."""
    val, manifest = Validation(s), read_manifest(s)
    documents = int((val.tokens == BOS).sum())
    check_documents(s, "val", documents, f"{s.shards}/fineweb_val_*.bin")
    canonical = not manifest or (manifest.get("split") or {}).get("rule") == "first"
    if canonical and documents != CANONICAL_VAL_DOCS:
        raise UserError(f"{s.shards} holds {documents:,} validation documents, the canonical "
                        f"split has {CANONICAL_VAL_DOCS:,}: {AGAIN}, or for a corpus of your own: "
                        f"python data/check.py {s.shards} --custom --write-manifest")
    check_byte_rule(s, val)
    return (f"{len(val.tokens) - 1:,} targets, {len(val.documents):,} documents, "
            f"{int(val.target_bytes.sum()):,} bytes by {val.rule}")


def check_documents(s: Settings, kind: str, documents: int, where: str | Path) -> None:
    """As many as the manifest says, where it does."""
    expected = manifest_total(s, kind, "documents")
    if expected not in (None, documents):
        raise UserError(f"{where} has {documents:,} documents, the manifest says "
                        f"{expected:,}: {AGAIN}")


def check_same_text(run: Run, val: Validation) -> None:
    """The validation text's fingerprint into the summary: a run goes on with its own."""
    counts = val.target_bytes.astype("<i4")
    fingerprint = digest_of(val.stream.tobytes() + counts.tobytes()).hex()
    before = run.summary.setdefault("val_fingerprint", fingerprint)
    if before != fingerprint:
        raise UserError(f"the validation text or its bytes ({fingerprint}) are not those of the "
                        f"run in {run.dir} ({before}): set DATA_PATH to its own, or another "
                        "ARTIFACT_DIR")


def check_same_data(s: Settings, run: Run, fingerprint: str) -> None:
    """The data's fingerprint into the summary: RESUME goes on with its own."""
    before = run.summary.setdefault("data_fingerprint", fingerprint)
    if before == fingerprint or s.eval_only_quantized_path:
        return
    text = f"the data ({fingerprint}) are not those of the training in {run.dir} ({before})"
    if s.resume:
        raise UserError(f"{text}: set DATA_PATH to its own, or another ARTIFACT_DIR")
    run.warn(text)


def check_byte_rule(s: Settings, val: Validation) -> None:
    """The counted bytes against the text that they decode to: by the table at most 1 %
    more (the published rule takes three bytes for a U+2581 within a piece), by sidecars
    at most half as much again (a tokenizer that normalises loses some)."""
    counted, text = int(val.target_bytes.sum()), decoded_bytes(s, val)
    if counted > (1.01 if val.rule == "table" else 1.5) * text:
        raise UserError(f"the byte rule counts {counted:,} bytes in {text:,}: scores would be "
                        "too good; use shards with byte sidecars, or a tokenizer without "
                        "pieces of several spaces")


def decoded_bytes(s: Settings, val: Validation) -> int:
    """Bytes that the targets decode to, one by one: the same everywhere but behind a
    boundary, where a leading space may be dropped."""
    table = ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size)
    sp = load_tokenizer(s.tokenizer)
    target, behind = val.tokens[1:], table.boundary[val.tokens[:-1]]
    at_start = np.bincount(target[behind], minlength=s.vocab_size)
    elsewhere = np.bincount(target[~behind], minlength=s.vocab_size)
    words = np.flatnonzero(~table.lead & (table.base > 0))
    word = next(([i] for i in words.tolist() if not sp.is_byte(i)), [])
    behind_word = len(sp.decode(word).encode())
    total = 0
    for i in np.flatnonzero((at_start + elsewhere) * ~table.boundary).tolist():
        first = other = 1
        if not sp.is_byte(i):      # a byte alone decodes to a sign of three bytes
            first = len(sp.decode([i]).encode())
            other = len(sp.decode([*word, i]).encode()) - behind_word
        total += int(at_start[i]) * first + int(elsewhere[i]) * other
    return total


def check_manifest(s: Settings) -> str:
    """Files, tokenizer and overlap; the data's fingerprint."""
    manifest = read_manifest(s)
    begins = "fineweb_val" if s.eval_only_quantized_path else "fineweb_"
    present = {p.name: p for p in sorted(s.shards.glob(f"{begins}*.bin"))}
    if manifest:
        files = {e["name"]: e for e in manifest["files"] if e["name"].startswith(begins)}
        check_files(s, files, present)
    expected = (manifest.get("tokenizer") or {}).get("sha256")
    if expected and s.tokenizer.is_file():
        if sha256_of(s.tokenizer, MOST_READ) != expected:
            raise UserError(f"TOKENIZER_PATH={s.tokenizer} is not the tokenizer of {s.shards}: "
                            "set it to its own")
    if not s.eval_only_quantized_path:
        check_overlap(s)
    if manifest:
        return manifest["fingerprint"][:16]
    sizes = "".join(f"{name} {path.stat().st_size}\n" for name, path in present.items())
    return f"sizes-{hashlib.sha256(sizes.encode()).hexdigest()[:16]} (no manifest.json)"


def sha256_of(path: Path, most: int) -> str:
    """Of a file of at most `most` bytes, in hexadecimal; UserError if it is larger."""
    return hashlib.sha256(read_bounded(path, most, A_MODEL)).hexdigest()


def check_files(s: Settings, files: Mapping, present: Mapping[str, Path]) -> None:
    """The manifest's entries against the files; with DATA_CHECK=full every byte."""
    for name in sorted(set(files) ^ set(present)):
        what = "is missing" if name in files else "is not listed"
        raise UserError(f"{s.shards / name} {what}, says manifest.json: {AGAIN}")
    for name, path in present.items():
        expected, digest = (files[name].get(key) for key in ("size", "sha256"))
        size = path.stat().st_size
        if expected is None or not isinstance(digest, str):
            raise UserError(f"{s.shards}/manifest.json lacks size or SHA-256 of {name}: {AGAIN}")
        if size != expected:
            raise UserError(f"{path} has {size:,} bytes, the manifest says {expected:,}: {AGAIN}")
        if s.data_check == "full" and sha256_of(path, size) != digest:
            raise UserError(f"{path} is damaged, its SHA-256 is not the manifest's: {AGAIN}")


def check_overlap(s: Settings) -> None:
    """No validation document is among the training documents, by stored hashes of their
    text, else of their tokens."""
    stored = {kind: s.shards / f"document_hashes_{kind}.bin" for kind in ("train", "val")}
    hashes = {}
    if all(p.is_file() for p in stored.values()):
        hashes = {kind: np.fromfile(p, "<u8") for kind, p in stored.items()}
        at = np.flatnonzero(np.isin(hashes["train"], hashes["val"]))
        shared = [f"training document {i:,}" for i in at]
    else:
        shared = shared_documents(s)
    if shared:
        raise UserError(f"{len(shared):,} validation documents are in the training shards of "
                        f"{s.shards} (first: {shared[0]}): {AGAIN}")
    for kind, values in hashes.items():
        check_documents(s, kind, len(values), stored[kind])


def shared_documents(s: Settings) -> list[str]:
    """Where validation documents are in the training shard next to the split; full: in
    any."""
    known = set()
    for path in list_shards(s.shards, "val"):
        known.update(value for _, value in document_hashes(read_shard(path)))
    shared = []
    searched = list_shards(s.shards, "train")
    for path in searched if s.data_check == "full" else searched[:1]:
        for at, value in document_hashes(read_shard(path)):
            if value in known:
                shared.append(f"{path.name} at token {at:,}")
    return shared


def document_hashes(tokens: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """(position of its BOS, 64-bit hash) of every document with a token."""
    starts = np.flatnonzero(tokens == BOS)
    raw = memoryview(np.ascontiguousarray(tokens)).cast("B")
    for a, b in itertools.pairwise([*starts.tolist(), len(tokens)]):
        if b - a > 1:
            yield a, digest_of(raw[2 * a + 2:2 * b])


def check_temporary_folder() -> None:
    """torch keeps there what it compiles."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError("no temporary folder can be written: set TMPDIR to one") from error


def check_folder(folder: Path) -> str:
    """The names of a run's files are free: a pipe would wait for a reader."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"ARTIFACT_DIR={folder} is no folder: choose another")
    files = (".lock", "train.log", "metrics.jsonl", "summary.json", WEIGHTS_NAME, ARTIFACT_NAME)
    faults = {name: "a folder" for name in files if (folder / name).is_dir()}
    faults |= {name: "a pipe" for name in files if (folder / name).is_fifo()}
    if (folder / "checkpoint").exists() and not (folder / "checkpoint").is_dir():
        faults["checkpoint"] = "no folder"
    for name, fault in faults.items():
        raise UserError(f"{folder / name} is {fault}: move it away or set ARTIFACT_DIR")
    return str(folder)


def check_made_before(s: Settings) -> str:
    """The weights or the artifact that the run begins with."""
    if s.eval_only_path:
        if Path(s.eval_only_path).name.startswith("resume."):
            raise UserError(f"EVAL_ONLY_PATH={s.eval_only_path} is a checkpoint: set RESUME=1 and "
                            "ARTIFACT_DIR of its run instead")
        size = file_size(Path(s.eval_only_path), 16 * MOST_WEIGHTS, "a run's final_model.pt")
        return f"EVAL_ONLY_PATH, {size:,} bytes"
    path = Path(s.eval_only_quantized_path)
    blob = read_bounded(path, MOST_READ, "a run's final_model.int6.ptz")
    header, _ = artifact_from_bytes(blob, path.name)
    check_architecture(s, header.get("architecture"), f"{path.name} is an artifact")
    return f"EVAL_ONLY_QUANTIZED_PATH, {len(blob):,} bytes"


def check_disk(folder: Path, need: int, ballast: bool = False) -> str:
    """The folder really has `need` bytes: they are reserved, then given back, or kept as
    ballast until there is something to write in their place. A folder that is not there is
    not made: the nearest above it is on the same disk."""
    place = folder
    while not os.path.isdir(place) and place != place.parent:
        place = place.parent
    reserved_file = place / (BALLAST if ballast else f".space.{os.getpid()}")
    kept = False
    try:
        with open(reserved_file, "wb") as f:
            if not ballast:
                remove(reserved_file)      # a process that is killed leaves nothing
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, need)
                kept = ballast
            elif shutil.disk_usage(place).free < need:
                raise OSError(28, "No space left on device")
    except OSError as error:
        free = shutil.disk_usage(place).free
        raise UserError(f"ARTIFACT_DIR={folder} cannot take {need:,} bytes ({error.strerror}; "
                        f"{free:,} free): free space or set it to another disk") from error
    finally:
        if not kept:
            remove(reserved_file)
    return f"room for {need:,} bytes"


BALLAST = ".ballast"     # in the run's folder: what the weights will take


def drop_ballast(run: Run) -> None:
    """Give that space back."""
    if run.world.main:
        remove(run.dir / BALLAST)


def bytes_of_weights(s: Settings) -> int:
    """Bytes of the model's weights in float32."""
    return 4 * sum(map(math.prod, GPT.shapes(s).values()))


LOG_BYTES = 8 << 20      # of a long run


def bytes_of_results(s: Settings) -> int:
    """Weights, artifact twice, logs."""
    return bytes_of_weights(s) + 2 * ARTIFACT_LIMIT + LOG_BYTES


FULL_BATCH = 1 << 19      # tokens of a step from which on only a GPU is fast enough


def check_device(s: Settings, world: World) -> str:
    """Where it runs: not on a CPU beside GPUs that torch does not see."""
    text = f"{world.device_name}, {torch.get_num_threads()} host thread(s)"
    if world.device.type != "cpu":
        return text
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    if visible not in ("", "-1", "NoDevFiles") and (gpus := listed_gpus()):
        raise UserError(f"nvidia-smi lists {gpus} GPUs but torch {torch.__version__} sees none: "
                        "install a torch build for this driver, or set CUDA_VISIBLE_DEVICES= "
                        "to use the CPU")
    if s.train_batch_tokens >= FULL_BATCH and not s.eval_only_quantized_path:
        text += (f"; WARNING: TRAIN_BATCH_TOKENS={s.train_batch_tokens:,} on a CPU: a step may "
                 "take minutes; for a small run use configs/demo.env")
    return text


def listed_gpus() -> int:
    """GPUs that the driver knows of; 0 without a driver."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True,
                                 timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


# --- the rehearsal: what follows training, before the first step

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


def rehearse(s: Settings, world: World, run: Run, trainer: Trainer) -> float:
    """A dry run on random weights of what follows training; the seconds to reserve."""
    begin, model = Clock(), trainer.model
    generator = torch.Generator().manual_seed(s.seed)
    with torch.no_grad():
        weights = {n: (torch.randn(p.shape, generator=generator) * 0.02).to(p.device)
                   for n, p in model.named_parameters()}
    batch = trainer.random_batch(generator)
    calibrating, curvature = rehearse_calibration(s, world, model, batch)
    clock = Clock()
    quantiser = Quantiser(s, matrix_views(weights), curvature, world)
    size = 0.99 * (ARTIFACT_LIMIT - code_bytes(shipped_form(s)))
    measure = Measure.of(s, world, model, lambda: batch)
    if measure:
        plan_by_measure(quantiser, measure, size)
        quantiser.plan({}, [*map(kind_of, quantiser.outputs)])      # the slowest
    setting_up = clock.elapsed()
    q = quantiser(base_step_for(quantiser.deviations, size, quantiser.finest))
    quantised = clock.elapsed()
    blob = world.from_main(pack_model, s, q)
    packed = clock.elapsed()
    tries = fitter_tries(quantiser, size)
    # weights are saved at 100 MB/s; a quarter to spare
    need = calibrating + setting_up + tries * (packed - setting_up) + bytes_of_weights(s) / 1e8
    back = read_artifact(s, blob, "the rehearsal's artifact").weights
    if s.logit_calib_enabled:      # it works on a second model, read back from the artifact
        load_weights(build_model(s, world), back, "the rehearsal's artifact")
        need += clock.elapsed() - packed
    reserve = world.agree(1.0 + 1.25 * need)
    if any(not torch.equal(back[n], w) for n, w in dequantise(q).items()):
        raise RuntimeError("the packed model does not read back as it was written")
    probing = Clock()
    failed = [p for p in run_probes(s, world, model) if not p.ok]
    failed = [p for p in failed if not p.name.startswith("C1")]     # blocks are the identity yet
    if failed and not study_reasons(dataclasses.replace(s, val_doc_fraction=1.0)):
        raise RuntimeError(f"the scorer's probes fail on the untrained model: {failed}")
    run.log("rehearsal", calibrate_s=calibrating, quantise_s=quantised,
            pack_s=packed - quantised, score_s=probing.elapsed(),
            random_artifact_bytes=len(blob), reserve_s=reserve, seconds=begin.elapsed())
    return reserve


def rehearse_calibration(s: Settings, world: World, model: GPT,
                         batch: Batch) -> tuple[float, Curvature]:
    """Seconds that calibration, of matrices and logits, will take; its Hessians."""
    one = dataclasses.replace(s, gptq_calibration_batches=world.size)
    calibrate(one, world, model, lambda: batch)      # the first pass allocates
    sync(world.device)
    clock = Clock()
    curvature = calibrate(one, world, model, lambda: batch)
    sync(world.device)
    seconds = clock.elapsed() * -(-s.gptq_calibration_batches // world.size)
    if s.logit_calib_enabled:
        few = 2 * s.logit_calib_batch_seqs * s.logit_calib_stride
        short = dataclasses.replace(s, logit_calib_tokens=few, logit_calib_epochs=1)
        clock = Clock()
        fit_calibration(short, model, batch.x.flatten().cpu().numpy())
        passes = s.logit_calib_epochs * max(1, s.logit_calib_tokens / few)
        seconds += clock.elapsed() * passes
    return seconds, curvature


# ========================================
# 15  Rounding: GPTQ and the trellis, column by column
# ========================================

# --- curvature

def add_product(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add x'x of rows x (tokens, C)."""
    if name in sums:
        sums[name].addmm_(x.mT, x)
    else:
        sums[name] = x.mT @ x


def tied_curvature(h: Tensor, written: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """H' (C, C) and g' (V) of an embedding that is the head as well. An error E of
    row v costs written_v E H E' at the head and read_v |E|^2, alike in all columns,
    where it is looked up. One product g'_v E H' E' stands for both: the shape of H'
    is that of the mean row, and each row's mean over columns is its own.

        H'   = H + I mean(read) / mean(written)
        g'_v = (written_v mean(diag H) + read_v) / mean(diag H')
    """
    tied = h.clone()
    tied.diagonal().add_(read.mean() / written.mean())
    both = written * h.diagonal().mean() + read
    return tied, both / tied.diagonal().mean()


# --- columns in turn

# GPTQ (Frantar et al. 2022): columns are rounded in turn, later ones take up the errors.

DAMPING = 0.01            # of a Hessian, as a share of its mean diagonal
MOST_DAMPING = 100.0      # columns are then all but alone
COLUMNS_AT_ONCE = 128     # beyond them errors are passed on together
SMALLEST_HALVED = 512     # columns of a Hessian that is factored by halves


def inverse_factor(h: Tensor) -> Tensor:
    """Upper U (n, C, C) with U'U = inverse of h, by halves: h = F F', U = inverse of
    F."""
    half = h.size(-1) // 2
    if h.size(-1) < SMALLEST_HALVED:
        factor = torch.linalg.cholesky(h.flip(-2, -1)).flip(-2, -1)
        eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device).expand_as(h)
        return torch.linalg.solve_triangular(factor, eye, upper=True)
    u, after = torch.zeros_like(h), inverse_factor(h[:, half:, half:])
    x = h[:, :half, half:] @ after.mT
    before = inverse_factor(h[:, :half, :half] - x @ x.mT)
    u[:, :half, :half] = before
    u[:, half:, half:] = after
    u[:, :half, half:] = -(before @ x) @ after
    return u


def hessian_factor(h: Tensor, damp: float = DAMPING,
                   falling: bool = True) -> tuple[Tensor, ...]:
    """For H (n, C, C), damped by a share of its mean diagonal: the columns' order (by
    falling diagonal, or as they are), upper U with U'U = inverse of H in that order,
    the dead columns, and the U_jj of the falling order: the inverse deviation of a
    column's input given those after it. float64 on a GPU: float32 may be TF32."""
    h = h.double() if h.is_cuda else h.clone()
    diag = h.diagonal(dim1=-2, dim2=-1)          # a view: writing it writes h
    dead = diag == 0
    diag[dead] = 1
    diag += damp * diag.mean(dim=-1, keepdim=True)
    order = diag.argsort(dim=-1, descending=True, stable=True)
    u = inverse_factor(torch.stack([m[o][:, o] for m, o in zip(h, order)]))
    ratio = torch.empty_like(diag).scatter_(-1, order, u.diagonal(dim1=-2, dim2=-1))
    if not falling:
        u, order = inverse_factor(h), order.sort().values
    return order, u.float(), dead, ratio.float()


def damped_factor(h: Tensor, damp: float = DAMPING,
                  falling: bool = True) -> tuple[tuple[Tensor, ...], list[float]]:
    """hessian_factor of h (n, C, C), and each one's damping: ten times more until it
    can be factored; infinite where nothing helps and the identity stands for it."""
    try:
        parts = hessian_factor(h, damp, falling)
        finite = all(part.isfinite().all() for part in parts)
        ratio = parts[-1]
        if finite and ratio.min() > 0:
            return parts, [damp] * len(h)
    except torch.linalg.LinAlgError:
        pass
    if len(h) > 1:
        parts, damps = zip(*(damped_factor(m, damp, falling) for m in h.split(1)))
        return tuple(torch.cat(part) for part in zip(*parts)), sum(damps, [])
    if damp < MOST_DAMPING:
        return damped_factor(h, 10 * damp, falling)
    eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device)[None]
    return hessian_factor(eye, 0.0, falling), [math.inf]


def narrow(codes: Tensor) -> Tensor:
    """As int8 where all of them are, as most are."""
    short = codes.to(torch.int8)
    return short if torch.equal(short.to(codes.dtype), codes) else codes


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """UserError if some are not finite."""
    for name, w in weights.items():
        bad = w.numel() - int(w.isfinite().sum())
        if bad:
            raise UserError(f"{bad:,} of {w.numel():,} weights of {name} are not finite: train "
                            "again with a lower MATRIX_LR or SCALAR_LR")


def share_matrices(weights: Mapping[str, Tensor], names: list[str],
                   world: World) -> list[str]:
    """Names of this rank's matrices: those of one Hessian together, costs shared
    evenly."""
    groups = list(names_by(input_of, names).values())
    costs = []
    for group in groups:
        columns = weights[group[0]].size(1)
        rows = sum(len(weights[name]) for name in group)
        # a row takes C^2 to round, a Hessian C^3 / 3 to factor
        costs.append((rows + len(group) * columns / 3) * columns ** 2)
    own = share_out(costs, world.size)[world.rank]
    return sum((groups[i] for i in sorted(own)), [])


def factor_hessians(weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor],
                    own: list[str], falling: bool) -> tuple[dict, dict, dict]:
    """damped_factor of the Hessians of the matrices `own`, all of one width at once, the
    identity where there is none. By input (order, u, dead); the inverse deviations (C)
    given the columns that GPTQ rounds later; what was done where damping was not enough."""
    factors, ratios, damped = {}, {}, {}
    inputs = names_by(input_of, own)
    by_width = names_by(lambda key: weights[key].size(1), inputs)
    for columns, keys in by_width.items():
        eye = torch.eye(columns, device=weights[keys[0]].device)
        h = torch.stack([hessians.get(key, eye) for key in keys])
        (*parts, ratio), damps = damped_factor(h, falling=falling)
        factors.update(zip(keys, zip(*parts)))
        ratios.update(zip(keys, ratio))
        for key, damp in zip(keys, damps):
            if damp > DAMPING:
                damped[key] = ("a Hessian that cannot be factored: damping "
                               f"{damp:g} instead of {DAMPING:g}")
    return factors, ratios, damped


@torch.no_grad()
def round_in_order(w: Tensor, step: Tensor, order: Tensor, u: Tensor, dead: Tensor,
                   top: int, trellis: bool = False, block: int = COLUMNS_AT_ONCE) -> Tensor:
    """Codes (n, R, C), int8 or int16, within ±top of w under steps (n, R). order (n, C),
    u (n, C, C), dead (n, C) are hessian_factor's; where columns have steps too, w and
    u come divided by them."""
    t, step, diag, feedback = columns_in_order(w, step, order, u, dead)
    codes = torch.empty_like(t, dtype=torch.int8 if top < 128 else torch.int16)
    state = torch.zeros_like(t[:, 0], dtype=torch.long)
    for begin in range(0, t.size(1), block):
        end = min(begin + block, t.size(1))
        x, inner = t[:, begin:end], feedback[:, begin:end, begin:end]
        if trellis:
            slope = diag[:, begin:end] ** -2
            q, error, state = trellis_block(x / step, inner, slope, state)
            error *= step
        else:
            q, error = plain_block(x, step, inner, top)
        codes[:, begin:end] = q
        t[:, end:] -= feedback[:, begin:end, end:].mT @ error
    return as_they_were(codes, order)


def columns_in_order(w: Tensor, step: Tensor, order: Tensor, u: Tensor,
                     dead: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For rounding: columns (n, C, R) in their order, steps (n, 1, R), diag (n, C, 1) and
    feedback (n, C, C): an error e of a column costs (e / diag)^2, and later ones take up
    feedback times it."""
    zero = dead[:, None] | (step == 0)[..., None]
    w, step = w.masked_fill(zero, 0), step[:, None].clamp_min(1e-30)
    t = torch.stack([m[:, o].mT for m, o in zip(w, order)])
    diag = u.diagonal(dim1=-2, dim2=-1)[..., None]
    return t, step, diag, u / diag


def as_they_were(codes: Tensor, order: Tensor) -> Tensor:
    """Codes (n, R, C) of columns_in_order."""
    return torch.stack([c[o].mT for c, o in zip(codes, order.argsort(dim=-1))])


def plain_block(t: Tensor, step: Tensor, feedback: Tensor, top: int,
                tile: int = 16) -> tuple[Tensor, Tensor]:
    """Round columns t (n, C, R), which is used up, in turn: (codes, errors)."""
    codes, error = torch.empty_like(t), torch.empty_like(t)
    for left in range(0, t.size(1), tile):
        right = min(left + tile, t.size(1))
        for j in range(left, right):
            column = t[:, j:j + 1]
            q = (column / step).round().clamp_(-top, top)
            e = column - q * step
            codes[:, j:j + 1] = q
            error[:, j:j + 1] = e
            t[:, j + 1:right] -= feedback[:, j, j + 1:right, None] * e
        t[:, right:] -= feedback[:, left:right, right:].mT @ error[:, left:right]
    return codes, error


# Trellis-coded quantisation (Marcellin and Fischer 1990), Ungerboeck's 8 states. In state s a code k
# means k + (s & 1) / 2 steps, and its parity chooses the next state: a row's path sees a grid of half
# steps at the rate of whole ones.
TRELLIS = np.array([                  # next state, of an even and of an odd code
    [0, 2], [5, 7], [1, 3], [4, 6], [2, 0], [7, 5], [3, 1], [6, 4]], np.uint8)
# two edges into every state: (edge, state before or parity, state)
ARRIVALS = np.stack([np.argwhere(TRELLIS == state) for state in range(8)], axis=-1)


def half_steps(codes: np.ndarray) -> np.ndarray:
    """Which of the codes (R, C) stand half a step higher: rows start in state 0."""
    return state_bits(np.ascontiguousarray(codes.T)).T


class Arrival(NamedTuple):
    """The best path into every state, (n, 8, R) each: its whole cost, its last code
    and error, in steps, and the state before."""
    cost: Tensor
    code: Tensor
    error: Tensor
    parent: Tensor


def trellis_edges(like: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The two edges into every state: the state before (8), the half step there
    (8, 1) and half the code's parity (8, 1)."""
    edges = []
    for source, parity in torch.from_numpy(ARRIVALS).to(like.device):
        half, odd = ((x.to(like.dtype) / 2)[:, None] for x in (source & 1, parity))
        edges.append((source, half, odd))
    return edges


def trellis_block(t: Tensor, feedback: Tensor, slope: Tensor, state: Tensor,
                  tile: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest path through columns t (n, C, R), in steps, from state (n, R):
    (codes, errors, end state). slope (n, C, 1): cost of a squared error. Each state
    keeps its best path, and what that path's feedback made of later columns."""
    edges = trellis_edges(t)
    cost = torch.full((t.size(0), 8, t.size(2)), torch.inf, device=t.device)
    cost.scatter_(1, state[:, None], 0)
    rest = t[:, :, None].expand(-1, -1, 8, -1)          # (n, C, 8, R)
    tiles = []
    for left in range(0, t.size(1), tile):
        right = min(left + tile, t.size(1))
        x, path = rest[:, :tile], []
        for j in range(left, right):
            arrival = extend_survivors(edges, x[:, 0], cost, slope[:, j, None])
            path.append(arrival)
            cost = arrival.cost
            x = of_parents(x[:, 1:], arrival.parent)
            x -= feedback[:, j, j + 1:right, None, None] * arrival.error[:, None]
        codes, errors, start = trace_back(path)
        tiles.append((codes, errors, start))
        rest = of_parents(rest[:, tile:], start)
        passed_on = feedback[:, left:right, right:].mT @ errors.flatten(2)
        rest = rest - passed_on.view_as(rest)
    end = cost.argmin(1, keepdim=True)
    codes, errors = join_tiles(tiles, end)
    return codes, errors, end[:, 0]


def extend_survivors(edges: Sequence[tuple], column: Tensor, cost: Tensor,
                     slope: Tensor) -> Arrival:
    """The cheaper of the two edges into every state, through a column (n, 8, R) as
    each state's path left it, after costs (n, 8, R)."""
    arrivals = []
    for source, half, odd in edges:
        y = column.index_select(1, source) - half
        pair = (y / 2 - odd).round_().clamp_(-TOP_CODE // 2, TOP_CODE // 2 - 1)
        code = pair.add_(odd).mul_(2)      # of this edge's parity
        error = y - code
        total = torch.addcmul(cost[:, source], error, error * slope)
        arrivals.append(Arrival(total, code, error, source[:, None]))
    first, second = arrivals
    better = second.cost < first.cost
    return Arrival(*(torch.where(better, b, a) for a, b in zip(first, second)))


def of_parents(columns: Tensor, parent: Tensor) -> Tensor:
    """Columns (n, C, 8, R) as the states' parents (n, 8, R) hold them."""
    return columns.gather(2, parent[:, None].expand_as(columns))


def trace_back(path: Sequence[Arrival]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and errors (n, tile, 8, R) of the paths that end in each state, and the
    states (n, 8, R) where they began."""
    states = torch.arange(8, device=path[0].cost.device)
    at = states[:, None].expand_as(path[0].cost)
    codes, errors = [], []
    for arrival in reversed(path):
        codes.append(arrival.code.gather(1, at))
        errors.append(arrival.error.gather(1, at))
        at = arrival.parent.gather(1, at)
    return torch.stack(codes[::-1], 1), torch.stack(errors[::-1], 1), at


def join_tiles(tiles: Sequence[tuple[Tensor, Tensor, Tensor]],
               end: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and errors (n, C, R) of the one path that ends in states `end`
    (n, 1, R), from trace_back's of every tile."""
    codes, errors, at = [], [], end
    for tile_codes, tile_errors, start in reversed(tiles):
        pick = at[:, None].expand(-1, tile_codes.size(1), -1, -1)
        codes.append(tile_codes.gather(2, pick)[:, :, 0])
        errors.append(tile_errors.gather(2, pick)[:, :, 0])
        at = start.gather(1, at)
    return torch.cat(codes[::-1], 1), torch.cat(errors[::-1], 1)


# --- steps of kinds of matrices, by what they do to predictions

def kind_of(name: str) -> str:
    """`attn.c_q.weight` of any layer's."""
    return re.sub(r"^blocks\.\d+\.", "", name)


# Curvature is a local and separable picture of the loss: of all matrices of a kind, it is right up to a
# factor. That is measured.
MEASURED_BATCHES = 8        # training micro-batches of all ranks; as many others judge
MEASURED_TOKENS = 2048      # of each
LARGEST_LEVEL = 8.0         # by which a sensitivity may change


class Measure:
    """How far predictions on training text move when weights are replaced. The second
    of two texts is for judging."""

    def __init__(self, s: Settings, world: World, model: GPT, next_batch: Callable[[], Batch]):
        self.s, self.world, self.model = s, world, model
        self.views = matrix_views({n: p.detach() for n, p in model.named_parameters()})
        # this rank's pieces of each, with what the model expects of them
        self.texts: list[list[tuple[Batch, Tensor]]] = []
        for _ in range(2):
            batches = [next_batch() for _ in range(-(-MEASURED_BATCHES // world.size))]
            parts = [next(pieces(batch.to(world.device), MEASURED_TOKENS)) for batch in batches]
            self.texts.append([(part, self.log_probs(part)) for part in parts])

    @classmethod
    def of(cls, s: Settings, world: World, model: GPT,
           next_batch: Callable[[], Batch]) -> Measure | None:
        """None where it is not wanted."""
        if not cls.wanted(s):
            return None
        world.beat("measuring kinds")
        return cls(s, world, model, next_batch)

    @staticmethod
    def wanted(s: Settings) -> bool:
        """Not where all codes, int16 at most, fit at their finest."""
        codes = sum(w.numel() for n, w in blank_views(s).items() if precision_of(s, n, w).coded)
        tight = 2 * codes > room_for_model(s)
        return tight and s.quant_measured and s.quant_allocation == "fisher"

    @torch.no_grad()
    def log_probs(self, part: Batch) -> Tensor:
        """What the model expects after tokens, (tokens, V)."""
        layout = part.layout(self.s.train_seq_len)
        hidden = self.model.final_hidden(part.x, layer_plan(self.s, True), layout)
        return self.model.logits(hidden).flatten(0, 1).log_softmax(-1)

    def kl(self, weights: Mapping[str, Tensor], text: int) -> float:
        """nats per token of all ranks' text 0 or 1, with these weights in the place of the
        model's; the model is left as it was."""
        kept = {name: self.views[name].clone() for name in weights}
        for name, w in weights.items():
            self.views[name].copy_(w)
        found = []
        for part, expected in self.texts[text]:
            moved = self.log_probs(part)
            found.append(((expected.exp() * (expected - moved)).sum().item(), len(expected)))
        for name, w in kept.items():
            self.views[name].copy_(w)
        totals, tokens = zip(*itertools.chain(*self.world.gather(found)))
        return math.fsum(totals) / sum(tokens)


def plan_by_measure(quantiser: MeasuredQuantiser, measure: Measure, size: float) -> dict[str, Any]:
    """Plan the steps of a file of `size` bytes again by the KL of every kind of matrices,
    and keep the plan if it leaves less KL on other text. What was found, for the log."""
    def kl(weights: Mapping[str, Tensor], kind: str) -> float:
        return measure.kl({n: weights[n] for n in names if kind_of(n) == kind}, 0)

    names = quantiser.names
    if estimate_bytes(quantiser.deviations, quantiser.finest) <= size:
        return {"used": False, "why": "all codes are at their finest"}
    counts = {}
    for kind, members in names_by(kind_of, names).items():
        counts[kind] = sum(quantiser.weights[n].numel() for n in members)
    alone = quantiser.sketch(size)
    found = {kind: kl(alone, kind) for kind in counts}
    before = measure.kl(alone, 1)
    candidates = sorted({kind_of(n) for n in names if n in quantiser.outputs})
    in_turns = []
    if candidates:
        quantiser.plan({}, candidates)
        taken_up = quantiser.sketch(size)
        for kind in candidates:
            less = kl(taken_up, kind)
            if less < found[kind]:
                found[kind] = less
                in_turns.append(kind)
    levels = kind_levels(found, counts)
    quantiser.plan(levels, in_turns)
    after = measure.kl(quantiser.sketch(size), 1)
    if not after < before:
        quantiser.plan()
    return {"used": after < before, "kl_before": before, "kl_after": after,
            "levels": levels, "in_turns": in_turns}


def kind_levels(found: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """By kind: its share of the KL by its share of the weights, for at the best steps all
    weights cost the same."""
    mean = sum(found.values()) / sum(counts.values())
    levels = {}
    for kind, kl in found.items():
        level = kl / counts[kind] / mean if mean > 0 else 1.0
        levels[kind] = min(max(level, 1 / LARGEST_LEVEL), LARGEST_LEVEL)
    return levels


# --- feedback among rows

# Errors of a row are made good by later rows as errors of a column by later columns, through the Fisher
# matrix of outputs (as in YAQA, arXiv 2505.22988). Rows of one turn are rounded at once.
ROW_TURNS = 8          # of as many rows each: every eighth, for neighbours are the most alike
ROWS_APART = 0.2       # shrinks what an estimate says of two different rows


class RowFeedback(NamedTuple):
    """How rows of a matrix take up errors of others."""
    mix: Tensor             # (R, R), of round_in_turns
    sensitivity: Tensor     # (R), of errors that later rows take up


def row_feedback(g: Tensor) -> RowFeedback:
    """For G (R, R), tr(E' G E) being the cost of rows' errors E in a column. With
    G = F F', F upper in the order of the turns, a turn b costs
    |F_bb' (E_b + mix E_before)|^2."""
    g = g.double()
    g = torch.lerp(g, g.diagonal().diag(), ROWS_APART)
    least = max(FISHER_FLOOR * g.diagonal().mean().item(), NO_FISHER)
    g.diagonal().clamp_min_(least)
    turns = torch.arange(len(g), device=g.device) % ROW_TURNS
    order = turns.argsort(stable=True)
    factor = torch.linalg.cholesky(g[order][:, order].flip(-2, -1)).flip(-2, -1)
    mix, sensitivity, begin = torch.zeros_like(g), torch.empty_like(g[0]), 0
    for count in turns.bincount().tolist():
        end = begin + count
        own, before = factor[begin:end, begin:end], factor[:begin, begin:end]
        mixed = torch.linalg.solve_triangular(own.mT, before.mT, upper=False)
        mix[order[begin:end, None], order[:begin]] = mixed
        sensitivity[order[begin:end]] = own.square().sum(1)
        begin = end
    return RowFeedback(mix.float(), sensitivity.float())


@torch.no_grad()
def round_in_turns(w: Tensor, step: Tensor, order: Tensor, u: Tensor, dead: Tensor,
                   mix: Tensor, trellis: bool) -> Tensor:
    """round_in_order's codes (n, R, C), every turn of rows taking up the errors of those
    before it by mix (n, R, R). A turn is a block of columns behind the one before:
    they are rounded at the same time, as one batch."""
    t, step, diag, feedback = columns_in_order(w, step, order, u, dead)
    count = -(-t.size(1) // COLUMNS_AT_ONCE)
    block = -(-t.size(1) // count)
    more = count * block - t.size(1)      # columns of no cost fill the last block
    t, diag = F.pad(t, (0, 0, 0, more)), F.pad(diag, (0, 0, 0, more), value=torch.inf)
    feedback = F.pad(feedback, (0, more, 0, more))
    source, error = t.clone(), torch.zeros_like(t)
    codes = torch.empty_like(t, dtype=torch.int16)
    state = torch.zeros_like(t[:, 0], dtype=torch.long)
    for wave in range(count + ROW_TURNS - 1):
        places, parts = [], []
        for turn in range(max(0, wave - count + 1), min(ROW_TURNS, wave + 1)):
            begin, rows = (wave - turn) * block, slice(turn, None, ROW_TURNS)
            columns = slice(begin, begin + block)
            x = t[:, columns, rows] + error[:, columns] @ mix[:, rows].mT
            places.append((columns, rows))
            parts.append((x, step[..., rows], feedback[:, columns, columns],
                          diag[:, columns], state[:, rows]))
        x, steps, inner, diags, states = (torch.cat(part) for part in zip(*parts))
        if trellis:
            q, e, states = trellis_block(x / steps, inner, diags ** -2, states)
            e *= steps
        else:
            q, e = plain_block(x.clone(), steps, inner, TOP_CODE)
        value = x - inner.mT @ e
        n = len(t)
        found = q.split(n), e.split(n), value.split(n), states.split(n)
        for (columns, rows), *parts in zip(places, *found):
            codes[:, columns, rows], passed_on, part, state[:, rows] = parts
            error[:, columns, rows] = source[:, columns, rows] - part
            later = slice(columns.stop, None)
            t[:, later, rows] -= feedback[:, columns, later].mT @ passed_on
    return as_they_were(codes[:, :order.size(1)], order)


class MeasuredQuantiser(Quantiser):
    """Steps can be planned again, and matrices of some kinds be rounded in turns."""

    levels: Mapping[str, float] = {}      # by kind, what sensitivities are multiplied by
    in_turns: Sequence[str] = ()          # kinds whose rows take turns

    def __init__(self, s: Settings, weights: Mapping[str, Tensor],
                 curvature: Curvature, world: World | None = None):
        check_weights(weights)
        super().__init__(s, weights, curvature, world)
        # G of the matrices whose rows can take turns, of all ranks
        self.outputs = {n: g for n, g in curvature.outputs.items()
                        if n in self.fisher and g.isfinite().all()}

    def plan(self, levels: Mapping[str, float] = {}, in_turns: Sequence[str] = ()) -> None:
        self.levels, self.in_turns = levels, in_turns
        if in_turns:
            self.feedback      # here, for the ranks gather in it
        super().plan()

    @functools.cached_property
    def feedback(self) -> dict[str, RowFeedback]:
        """Of this rank's matrices; sensitivities as large, by kind, as those of rows that
        are alone: kinds keep their share of the bytes."""
        found = {n: row_feedback(self.outputs[n]) for n in self.own if n in self.outputs}
        ratios = {}
        for name, feedback in found.items():
            ratio = self.fisher[name].clamp_min(1e-30) / feedback.sensitivity
            ratios[name] = ratio.log2().mean().item()
        for part in self.world.gather(ratios):
            ratios.update(part)
        for kind, names in names_by(kind_of, sorted(ratios)).items():
            scale = 2 ** (math.fsum(ratios[n] for n in names) / len(names))
            for name in found.keys() & set(names):
                mix, sensitivity = found[name]
                found[name] = RowFeedback(mix, sensitivity * scale)
        return found

    def takes_turns(self, name: str) -> bool:
        """Whether its rows do."""
        return kind_of(name) in self.in_turns and name in self.feedback

    def allocate(self, fisher: Mapping[str, Tensor],
                 ratios: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scaled = {}
        for name, g in fisher.items():
            if self.takes_turns(name):
                g = self.feedback[name].sensitivity
            scaled[name] = g * self.levels.get(kind_of(name), 1.0)
        return super().allocate(scaled, ratios)

    def batch_of(self, name: str) -> tuple:
        return *super().batch_of(name), self.takes_turns(name)

    def codes_of(self, names: list[str], w: Tensor, steps: Tensor, *factors: Tensor) -> Tensor:
        if not self.takes_turns(names[0]):
            return super().codes_of(names, w, steps, *factors)
        mix = torch.stack([self.feedback[n].mix for n in names])
        return round_in_turns(w, steps, *factors, mix, self.trellis)

    @torch.no_grad()
    def sketch(self, size: float) -> dict[str, Tensor]:
        """The float32 weights of a file of about `size` bytes, rounded without a trellis:
        good enough to compare plans by."""
        base_step = base_step_for(self.deviations, size, self.finest)
        self.trellis, walks = False, self.trellis
        rounded = {}
        for part in self.world.gather(self.round_own(base_step)):
            rounded |= part
        self.trellis = walks
        weights = {}
        for name, (codes, rows) in rounded.items():
            weights[name] = by_curvature(base_step, codes, rows, *self.stored_columns(name))
        return weights


Quantiser = MeasuredQuantiser


# ========================================
# 16  Quantising as the records do: steps by hand, finer columns, low-rank repair, calibrated logits
# ========================================

# --- what is stored: steps of rows as float16, finer codes in marked columns, low-rank repairs

for bits in range(2, 9):
    STORAGE[f"gptq (int{bits})"] = Storage(
        (CODES, (".scale", HALF_STREAM, "R")),
        lambda w, base, codes, steps: by_rows(codes, steps))
    STORAGE[f"awqgrpint{bits}"] = Storage(
        (CODES, (".awqg_s_hi", HALF_STREAM, "R"), (".awqg_fine", BYTE_STREAM, "C")),
        lambda w, base, codes, steps, fine:
            torch.where(fine != 0, by_rows(codes, steps), w))
STORAGE["lqer_asym"] = Storage(
    ((".lqA_a", BYTE_STREAM, "Rk"), (".lqAs_a", HALF_STREAM, "1"),
     (".lqB_a", BYTE_STREAM, "kC"), (".lqBs_a", HALF_STREAM, "g")),
    lambda w, base, *tensors: w + torch.matmul(*asym_values(*tensors)))
STORAGE["lqer"] = Storage(
    ((".lqA", BYTE_STREAM, "Rk"), (".lqAs", HALF_STREAM, "R"),
     (".lqB", BYTE_STREAM, "kC"), (".lqBs", HALF_STREAM, "k")),
    lambda w, base, a, sa, b, sb: w + by_rows(a, sa) @ by_rows(b, sb))


# --- steps by hand

def precision_by_hand(s: Settings, name: str) -> Precision:
    """Bits and range of a matrix by its kind."""
    bits, clip_sigmas = s.matrix_bits, s.matrix_clip_sigmas
    if parameter_of(name).role in ("embed", "head"):      # tables
        bits, clip_sigmas = s.embed_bits, s.embed_clip_sigmas
    elif ".mlp." in name:
        clip_sigmas = s.mlp_clip_sigmas
    elif ".attn." in name:
        clip_sigmas = s.attn_clip_sigmas
    return Precision(f"gptq (int{bits})", bits, clip_sigmas)


def row_scales(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """fp16 step of every row of w (…, R, C): clip_sigmas deviations span the codes.
    As published, 0 for a row without spread."""
    return to_half(clip_sigmas * w.float().std(dim=-1) / (2 ** (bits - 1) - 1))


def row_steps(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """row_scales, but a row without spread has its largest magnitude as step."""
    step = row_scales(w, bits, clip_sigmas)
    return torch.where(step > 0, step, to_half(w.abs().amax(dim=-1)))


AWQ_BITS = 8      # as published


class RecordQuantiser(Quantiser):
    """Steps by hand (QUANT_ALLOCATION=hand), finer codes in some columns, and low-rank
    repair. Seams: round_by_hand, to_repair, pack_factors."""

    @property
    def by_hand(self) -> bool:
        return self.s.quant_allocation == "hand"

    def allocate(self, fisher: Mapping[str, Tensor],
                 ratios: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if self.by_hand else super().allocate(fisher, ratios)

    def columns_of(self, name: str) -> Tensor:
        """By hand all columns are alike."""
        if not self.by_hand:
            return super().columns_of(name)
        w = self.weights[name]
        return torch.ones(w.size(1), device=w.device)

    def stored_columns(self, name: str) -> list[Tensor]:
        return [] if self.by_hand else super().stored_columns(name)

    def rows_of(self, name: str, base_step: float) -> Tensor:
        """By hand fp16 steps."""
        if not self.by_hand:
            return super().rows_of(name, base_step)
        precision = self.precision[name]
        return row_steps(self.weights[name].float(), precision.bits,
                         precision.clip_sigmas * base_step)

    def planned_rows(self, name: str) -> Tensor:
        return self.rows_of(name, 1.0).float() if self.by_hand else super().planned_rows(name)

    def plan(self, *changes) -> None:
        """By hand the settings' steps are the finest."""
        super().plan(*changes)
        if self.by_hand:
            self.finest = 1.0

    @torch.no_grad()
    def __call__(self, base_step: float = 1.0) -> Quantised:
        q = super().__call__(base_step)
        if self.by_hand:
            q.base_step = 1.0      # it is in the rows' steps
        if self.s.awq_lite_enabled:
            self.protect(q, base_step)
        if self.s.lqer_enabled:
            self.repair(q)
        return q

    def round(self, names: list[str], base_step: float) -> tuple[Tensor, Tensor]:
        if not self.by_hand:
            return super().round(names, base_step)
        w, rows, *factors = self.stacked(names, base_step)
        return self.round_by_hand(w, rows, factors, self.precision[names[0]].bits, base_step)

    def round_by_hand(self, w: Tensor, rows: Tensor, factors: Sequence[Tensor], bits: int,
                      base_step: float) -> tuple[Tensor, Tensor]:
        """Codes of w (n, R, C), and the steps rows (n, R) that settings gave."""
        return round_in_order(w, rows.float(), *factors, 2 ** (bits - 1) - 1), rows

    def protect(self, q: Quantised, base_step: float) -> None:
        """AWQ-lite: groups of columns with the highest scores get AWQ_BITS."""
        s, weights = self.s, self.weights
        size, high_bits = s.awq_lite_group_size, AWQ_BITS
        groups = []      # (score, matrix, first column)
        for name in self.names:
            h = self.hessians.get(input_of(name))
            if h is not None and self.precision[name].bits < high_bits:
                scores = group_scores(weights[name], input_rms(s, name, h), size)
                for i, score in enumerate(scores.tolist()):
                    groups.append((score, name, i * size))
        groups.sort(key=lambda group: -group[0])
        # (C) int8: 1 in the columns that are chosen
        fine: dict[str, Tensor] = {}
        for _, name, begin in groups[:s.awq_lite_group_top_k]:
            columns = torch.zeros(weights[name].size(1), dtype=torch.int8)
            fine.setdefault(name, columns)[begin:begin + size] = 1
        for name, chosen in fine.items():
            w, precision = weights[name].float(), self.precision[name]
            high = row_steps(w, high_bits, precision.clip_sigmas * base_step)
            steps = q.tensors[name + ".scale"].to(w.device), high
            h, bits = self.hessians[input_of(name)], (precision.bits, high_bits)
            codes = gptq_protected(w, h, steps, bits, chosen)
            q.add(name, f"awqgrpint{high_bits}", [codes, high, chosen])

    def repair(self, q: Quantised) -> None:
        """LQER: low-rank factors for matrices with the largest rounding errors."""
        decoded, errors = dequantise(q), {}
        for name in self.names:
            w = self.weights[name]
            errors[name] = w.float() - decoded[name].to(w.device)
        for name in self.to_repair(errors):
            q.add(name, *self.pack_factors(*low_rank(errors[name], self.s.lqer_rank)))

    def to_repair(self, errors: Mapping[str, Tensor]) -> list[str]:
        """The LQER_TOP_K matrices of the largest errors (R, C)."""
        sizes = {name: error.norm().item() for name, error in errors.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])
        return [name for name in largest[:self.s.lqer_top_k] if sizes[name] > 0]

    def pack_factors(self, a: Tensor, b: Tensor) -> tuple[str, Sequence[Tensor]]:
        """Form and tensors of the factors a (R, k), b (k, C) of a matrix: asymmetric
        where b falls into whole groups of LQER_ASYM_GROUP values."""
        group = self.s.lqer_asym_group
        if b.numel() % group:
            return symmetric_factors(a, b)
        return "lqer_asym", lqer_asym(*asym_signs(a, b, group), group)


Quantiser = RecordQuantiser


# --- finer codes for the columns that matter most: AWQ-lite

def input_rms(s: Settings, name: str, h: Tensor, tokens: int = 1) -> Tensor:
    """rms (C) of a matrix's input, from its Hessian: a mean over so many tokens."""
    slots = sum(layer_plan(s, True), ())
    visits = slots.count(int(name.split(".")[1])) if name.startswith("blocks.") else 1
    return (h.diagonal() / (visits * tokens)).sqrt()


def group_scores(w: Tensor, rms: Tensor, size: int) -> Tensor:
    """rms of input · mean |w|, of each whole group of columns of w (R, C)."""
    score = rms * w.float().abs().mean(dim=0)
    whole = len(rms) // size * size
    return score[:whole].view(-1, size).sum(dim=1)


@torch.no_grad()
def gptq_protected(w: Tensor, h: Tensor, steps: tuple[Tensor, Tensor],
                   bits: tuple[int, int], fine: Tensor) -> Tensor:
    """GPTQ's codes (R, C) int8 of one matrix, with the second steps and bits in the
    columns `fine` (C)."""
    order, u, dead, _ = (part[0] for part in damped_factor(h.float()[None])[0])
    w = w.float().masked_fill(dead | (steps[0] == 0)[:, None], 0)
    t, codes = w[:, order].mT.contiguous(), torch.empty_like(w.mT)
    for j, column in enumerate(order.tolist()):
        kind = int(fine[column])
        step, top = steps[kind].float().clamp_min(1e-30), 2 ** (bits[kind] - 1) - 1
        q = (t[j] / step).round().clamp_(-top, top)
        codes[column] = q
        t[j + 1:] -= (u[j, j + 1:] / u[j, j])[:, None] * (t[j] - q * step)
    return codes.mT.to(torch.int8).contiguous()


# --- low-rank repair of rounding errors: LQER

@torch.no_grad()
def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best a (R, k) = U S, b (k, C) = V' of an error matrix, by the smaller Gram
    matrix. The sign of a pair is a rule, not LAPACK's: a column's largest number is
    negative."""
    e = error.double()
    if e.size(0) < e.size(1):
        u = torch.linalg.eigh(e @ e.mT).eigenvectors[:, -rank:].flip(1)
        b = u.mT @ e
        length = b.norm(dim=1)
        a, b = u * length, b / length.clamp_min(1e-300)[:, None]
    else:
        v = torch.linalg.eigh(e.mT @ e).eigenvectors[:, -rank:].flip(1)
        a, b = e @ v, v.mT
    largest = a.gather(0, a.abs().argmax(0, keepdim=True))
    sign = torch.where(largest > 0, -1.0, 1.0)
    return (a * sign).float(), (b * sign.mT).float().contiguous()


def symmetric_factors(a: Tensor, b: Tensor,
                      bits: int = 4) -> tuple[str, Sequence[Tensor]]:
    """Form and tensors of factors with one step for each of their rows."""
    return "lqer", (*quantise_rows(a, bits), *quantise_rows(b, bits))


def lqer_asym(a: Tensor, b: Tensor, group: int) -> tuple[Tensor, ...]:
    """a (R, k) in 2 bits, one step; b (k, C) in 4, a step per `group` values. Codes
    reach from -2 to 1 and from -8 to 7: the largest number is half way between."""
    scale_a = to_half(a.float().abs().amax() / 1.5)[None]
    flat = b.float().reshape(-1, group)
    scale_b = to_half(flat.abs().amax(dim=1) / 7.5)
    qb = divide_round(flat, scale_b[:, None], -8, 7).view(b.shape)
    return divide_round(a, scale_a, -2, 1), scale_a, qb, scale_b


def asym_values(qa: Tensor, sa: Tensor, qb: Tensor,
                sb: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (R, k), (k, C) float32 that these codes and steps stand for."""
    b = qb.float().view(len(sb), -1) * sb.float()[:, None]
    return qa * sa.float(), b.view(qb.shape)


def asym_signs(a: Tensor, b: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Factors a (R, k), b (k, C), each pair with the sign that lqer_asym stores with
    the smaller error: its codes reach further down than up."""
    costs = []
    for sign in (1, -1):
        stored = asym_values(*lqer_asym(sign * a, sign * b, group))
        x, y = (part.double() for part in stored)
        # the true pair's part in the stored one
        shared = (x * a * sign).sum(0) * (y * b * sign).sum(1)
        costs.append(x.square().sum(0) * y.square().sum(1) - 2 * shared)
    sign = torch.where(costs[1] < costs[0], -1.0, 1.0)
    return a * sign, b * sign[:, None]


# --- logit calibration: scaled and shifted by what a token looks like

CATEGORIES = 14                       # of token_categories
CALIBRATION_STREAM = "calibration"    # in the artifact: 1 + CATEGORIES float32
CALIBRATION_REACH = 0.5               # most that a category adds to logits


@functools.cache
def token_categories(path: Path, vocab_size: int) -> Tensor:
    """(V, CATEGORIES) of 0 and 1: length in bytes, leading space, kind of letters."""
    sp, rows = load_tokenizer(path), []
    for i in range(vocab_size):
        nothing = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        piece = "" if nothing else sp.id_to_piece(i)
        text = chr(int(piece[3:5], 16)) if sp.is_byte(i) else piece.lstrip("\u2581")
        size = 1 if sp.is_byte(i) else len(text.encode())
        rows.append([size == 1, size == 2, size == 3, size == 4, 5 <= size <= 8, size >= 9,
                     piece[:1] == "\u2581",
                     "\n" in text or "\r" in text,
                     any(c.isdigit() for c in text),
                     bool(text) and not any(c.isalnum() or c.isspace() for c in text),
                     any(c.isalpha() for c in text),
                     text.islower(),
                     text.isupper(),
                     text[:1].isupper() and text[1:].islower()])
    return torch.tensor(rows, dtype=torch.float32)


def calibrated_by(s: Settings, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scale () in 0.9…1.1 and bias (V) of capped logits that raw (15) stands for."""
    bias = token_categories(s.tokenizer, s.vocab_size).to(raw.device) @ raw[1:]
    return 0.9 + 0.2 * torch.sigmoid(raw[0]), bias


def fit_calibration(s: Settings, model: GPT, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """The 15 numbers that serve the model best on training tokens (N,), and the
    losses. A window scores LOGIT_CALIB_STRIDE tokens, after what fits before."""
    device, stride = model.tok_emb.device, s.logit_calib_stride
    losses = []
    raw = torch.zeros(1 + CATEGORIES, device=device, requires_grad=True)
    optimiser = torch.optim.AdamW([raw], lr=s.logit_calib_lr, weight_decay=0)
    total = min(s.logit_calib_tokens, len(tokens) - 1)
    blocks = np.arange(0, total, stride)
    batch = s.logit_calib_batch_seqs
    for i in [*range(0, len(blocks), batch)] * s.logit_calib_epochs:
        first = blocks[i:i + batch, None]
        begin = np.maximum(first - s.eval_seq_len + stride, 0)
        at = begin + np.arange(s.eval_seq_len)
        scored = (at >= first) & (at < np.minimum(first + stride, total))
        pairs = tokens[np.minimum(np.stack((at, at + 1)), len(tokens) - 1)]
        x, y = torch.from_numpy(pairs.astype(np.int64)).to(device)
        scored = torch.from_numpy(scored).to(device)
        with torch.no_grad():
            hidden = model.final_hidden(x, layer_plan(s, True))
            z = model.logits(hidden[scored])
        scale, bias = calibrated_by(s, raw)
        loss = F.cross_entropy(scale * z + bias, y[scored])
        losses.append(loss)
        penalty = raw[1:].square().mean() + (scale - 1) ** 2
        optimiser.zero_grad()
        (loss + s.logit_calib_l2 * penalty).backward()
        optimiser.step()
        with torch.no_grad():
            raw[1:].clamp_(-CALIBRATION_REACH, CALIBRATION_REACH)
    return raw.detach(), torch.stack(losses).detach()


def calibrate_logits(s: Settings, world: World, run: Run, blob: bytes) -> bytes:
    """The artifact with its model's calibration; as it was without room."""
    values = None
    if world.main:
        model = build_model(s, world)
        artifact = read_artifact(s, blob, ARTIFACT_NAME)
        load_weights(model, artifact.weights, ARTIFACT_NAME)
        first = list_shards(s.shards, "train")[0]
        raw, losses = fit_calibration(s, model, read_shard(first))
        values = raw.cpu().numpy().astype("<f4").tobytes()
        run.log("logit_calibration", steps=len(losses),
                train_loss=losses.mean().item(), values=raw.tolist())
    header, streams = artifact_from_bytes(blob, ARTIFACT_NAME)
    streams[CALIBRATION_STREAM] = world.agree(values)
    whole = artifact_to_bytes(header, streams)
    script = code_bytes(shipped_form(s)) + LZMA_SLACK
    if len(whole) + script + MARK_BYTES <= ARTIFACT_LIMIT:
        return whole
    run.log("settings_without_effect",
            LOGIT_CALIB_ENABLED="no room for it in the artifact")
    return blob


# ========================================
# 17  Key cache: keys that earlier forwards left behind; a watchdog over the evaluation's budget
# ========================================

class KeyCache:
    """Keys and values that earlier forwards of B documents left behind, cut from
    their graph: per slot (B, P, K, Dh), oldest first, with room for more at the end.
    For the next forward:

        a document's tokens   ... out of sight | seen | suffix | chunk ...
        kept keys             ... ---------------------------->
        the forward's inputs                          |-------------->

    It sees `seen` kept keys, up to index `end`, and makes those of the suffix anew.
    position: the document's tokens ahead of its inputs; last (B, 2): the nearest of
    them. states: final hidden states are kept as well. ahead: by slot, the channels of the
    key of the nearest token ahead that an offset hands on."""
    STATES = -1      # the slot of states (B, P, D), of length 1, and of tokens after them (B, P)

    def __init__(self, window: int, states: bool = False):
        self.window = window
        self.states = states
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: dict[int, Tensor] = {}      # by slot, channels before their offset
        self.sealed: tuple[Tensor, dict, dict] | None = None
        self.begin_again()

    def begin_again(self) -> None:
        """The next forward sees no keys but its own, as at a document's beginning."""
        self.position = 0
        self.seen = 0
        self.end = 0
        self.last: Tensor | None = None
        self.ahead: dict[int, Tensor] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a forward's queries on all keys that they may see, its own last."""
        self.new[slot] = (k.detach(), v.detach())
        if slot not in self.kept:
            return attention(q, k, v)
        # whole, and cut there: views would need other graphs
        return attention_on_kept(q, k, v, *self.kept[slot], self.end - self.seen, self.seen)

    def key_ahead(self, slot: int, own: Tensor) -> Tensor:
        """What a key offset hands to a forward's first token, (B, 1, K, channels); own: what
        the forward's keys hand on."""
        self.own[slot] = own.detach()
        return self.ahead.get(slot, own[:, :1])

    def remember(self, hidden: Tensor, tokens: Tensor) -> None:
        """Keep final hidden states (B, T, D) and the tokens (B, T) that follow them."""
        self.new[self.STATES] = (F.normalize(hidden.detach(), dim=-1), tokens)

    def remembered(self) -> tuple[Tensor, Tensor]:
        """The states and tokens that a forward may see, its own last."""
        states, tokens = self.new[self.STATES]
        if self.STATES not in self.kept:
            return states, tokens
        return joined(states, tokens, *self.kept[self.STATES], self.end - self.seen, self.seen)

    def seal(self, ids: Tensor) -> None:
        """The forward over tokens ids (B, T) was scored: the keys it saw are those to
        keep."""
        self.sealed = (ids, self.new, self.own)
        self.new, self.own = {}, {}

    def advance(self, chunk: int, suffix: int = 0) -> int:
        """The chunk is over: the next forward runs the newest `suffix` tokens again, if
        the window has room for them beside `chunk` new ones. Returns how many it runs
        again: all where fewer than two keys lie ahead of the suffix, as a document's
        beginning has a graph already; any other suffix shares one graph."""
        ids, new, own = self.sealed
        self.sealed = None
        keys = self.seen + ids.size(1)
        room = self.window - chunk
        rerun = min(suffix, room)
        seen = min(keys, room) - rerun
        if seen < 2:
            self.begin_again()
            return min(keys, room)
        self.slide(ids, rerun)
        self.write(new, ids.size(1))
        self.end += ids.size(1) - rerun
        self.seen = seen
        last = ids.size(1) - rerun - 1
        self.ahead = {slot: x[:, last:last + 1].clone() for slot, x in own.items()}
        return rerun

    def write(self, new: dict, length: int) -> None:
        """Put a forward's keys behind those that it saw, which move to the front where
        the room is used up: seldom, so that hardly a key is copied."""
        room = 2 * self.window
        begin = self.end - self.seen
        end = self.end if self.end + length <= room else self.seen
        for slot, pair in new.items():
            if slot not in self.kept:
                self.kept[slot] = tuple(x.new_empty(x.size(0), room, *x.shape[2:]) for x in pair)
            for kept, x in zip(self.kept[slot], pair):
                if end < self.end:
                    kept[:, :end] = kept[:, begin:self.end].clone()
                kept[:, end:end + length] = x
        self.end = end

    def slide(self, ids: Tensor, rerun: int) -> None:
        """The next inputs begin `rerun` tokens before the end of the scored ids (B, T)."""
        self.position += ids.size(1) - rerun
        text = ids if self.last is None else torch.cat((self.last, ids), dim=1)
        ahead = text[:, :text.size(1) - rerun]
        self.last = ahead[:, -2:].contiguous()

    def keep(self, rows: slice) -> None:
        """Go on with these documents only."""
        for slot, (k, v) in self.kept.items():
            self.kept[slot] = (k[rows].clone(), v[rows].clone())
        self.ahead = {slot: x[rows].clone() for slot, x in self.ahead.items()}
        if self.last is not None:
            self.last = self.last[rows]


# --- groups of documents, and rounds of groups

class Round(NamedTuple):
    """Groups of documents between which no state passes, in the order of work, and
    those on which the base weights are trained afterwards (none in the last)."""
    groups: list[np.ndarray]
    train_on: np.ndarray | None


def ttt_rounds(s: Settings, lengths: np.ndarray) -> list[Round]:
    """The groups of all documents, cut at the phases: each follows so many scored
    documents as its bound says."""
    phases = s.phased_ttt_num_phases if s.phased_ttt_prefix_docs else 0
    bounds = [s.phased_ttt_prefix_docs * (i + 1) // phases for i in range(phases)]
    if s.ttt_doc_order == "stream":
        return rounds_by_stream(s, lengths, bounds)
    return rounds_by_length(s, lengths, bounds)


def grouped(s: Settings, documents: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Documents (their numbers) in groups of at most TTT_BATCH_SIZE of similar
    lengths, longest first. In stream order of about equal size: a single document
    would compile another graph."""
    if not len(documents):
        return []
    order = documents[np.argsort(lengths[documents], kind="stable")]
    size = s.ttt_batch_size
    if s.ttt_doc_order == "length":
        groups = np.array_split(order, range(size, len(order), size))
    else:
        groups = np.array_split(order, math.ceil(len(order) / size))
    return sorted(groups, key=lambda group: -lengths[group].max())


def rounds_by_stream(s: Settings, lengths: np.ndarray, bounds: list[int]) -> list[Round]:
    """Round i holds the i-th part of the stream's first documents, so that none is
    influenced by a later one."""
    everything, rounds, begin = np.arange(len(lengths)), [], 0
    for end in bounds:
        if begin < end <= len(lengths):
            rounds.append(Round(grouped(s, everything[begin:end], lengths), everything[:end]))
            begin = end
    return rounds + [Round(grouped(s, everything[begin:], lengths), None)]


def trained_rows(s: Settings, targets: np.ndarray, end: int) -> np.ndarray:
    """(B,) bool: which documents learn from a chunk ending at `end`: those going on,
    within TTT_TRAIN_*_DOC_LEN; in stream order by the position, as no end is known."""
    most = s.ttt_train_max_doc_len or math.inf
    goes_on = targets > end
    if s.ttt_doc_order == "stream":
        return goes_on & (end < most)
    return goes_on & (targets + 1 >= s.ttt_train_min_doc_len) & (targets < most)


def rows_kept_for(batch: int, live: int) -> int:
    """Rows for `live` documents left: `batch` halved while they fit in, never down to 1,
    which would compile another graph."""
    while live <= batch // 2 > 1:
        batch //= 2
    return batch


# --- the watchdog

class Level(NamedTuple):
    """What the watchdog gives up when the evaluation would outlast its budget; thirds
    of TTT_SUFFIX that are left."""
    given_up: str
    suffix_thirds: int


LEVELS = (
    Level("nothing", 3),
    Level("further phases on the base weights", 3),
    Level("phases and two thirds of TTT_SUFFIX", 1),
    Level("phases and TTT_SUFFIX", 0),
    Level("phases and adaptation", 0),
)
NO_PHASES, NO_ADAPTATION = 1, len(LEVELS) - 1
WATCH_EVERY = 8             # chunks between two looks at the clock
ENDING_SECONDS, ENDING_SHARE = 8.0, 0.05     # of the budget: waiting for other ranks, sums, books


def suffix_at(s: Settings, level: int) -> int:
    """Tokens that are run again; none where all are, for want of a cache."""
    return s.ttt_suffix * LEVELS[level].suffix_thirds // 3 if s.ttt_kv_reuse else 0


class Watchdog:
    """Keeps adaptation within the evaluation's budget: predicts its end, and gives up as
    little as it can. trace(event, **values) hears of it."""

    def __init__(self, s: Settings, world: World, lengths: np.ndarray, clock: Clock | None,
                 trace: Callable):
        self.s, self.world, self.lengths, self.clock, self.trace = s, world, lengths, clock, trace
        self.level = 0
        self.spent = 0.0            # seconds of adaptation, without phases and waiting
        self.done = 0.0             # token-passes in them
        self.left = np.zeros(len(LEVELS))       # those still to do, at every level
        self.phase_pace = 0.0       # seconds a token of a phase
        self.phase_tokens = 0       # still to train on

    def expect(self, groups: Iterator[np.ndarray], phases: list[np.ndarray]) -> None:
        """All that is to do: this rank's groups, and documents that phases train on."""
        for group in groups:
            self.left = self.left + self.costs(group)
        self.phase_tokens = sum(int(self.lengths[documents].sum()) for documents in phases)

    def costs(self, group: np.ndarray) -> np.ndarray:
        """Predicted token-passes of a group at every level; a backward is two."""
        s, longest = self.s, int(self.lengths[group].max())
        bounds = np.array(chunk_bounds(s, longest))
        window = np.minimum(bounds[1:], s.ttt_eval_seq_len)
        passes = []
        for level in range(NO_ADAPTATION):
            inputs = np.diff(bounds) + suffix_at(s, level)
            columns = np.minimum(window, inputs) if s.ttt_kv_reuse else window
            passes.append(3.0 * columns.sum() + (longest if s.ttt_base_share else 0))
        return len(group) * np.array([*passes, longest])

    def share(self) -> float:
        """What share of all there is to do, at the present level, is done."""
        left = max(self.left[self.level], 0.0)
        return self.done / (self.done + left) if self.done else 0.0

    def all_have_time(self) -> bool:
        """Whether there is a phase: with all ranks, or none of them from here on."""
        if max(self.world.gather(self.level)) and not self.level:
            self.give_up(NO_PHASES, by="another rank")
        return self.level < NO_PHASES

    def check_time(self) -> None:
        """Give up as little as lets the predicted end lie within EVAL_MAX_SECONDS, less
        what the end takes."""
        all_scored = self.done and self.left.max() < 0.5
        if self.clock is None or not self.clock.budget or all_scored:
            return
        now = self.clock.elapsed()
        pace = self.spent / self.done if self.done else 0.0
        ends = now + pace * self.left
        ends[0] += self.phase_pace * self.phase_tokens
        latest = self.clock.budget - min(ENDING_SECONDS, ENDING_SHARE * self.clock.budget)
        fits = (i for i in range(self.level, NO_ADAPTATION) if ends[i] < latest)
        level = next(fits, NO_ADAPTATION)
        if level > self.level:
            self.give_up(level, elapsed=now, predicted_end=ends[self.level])

    def give_up(self, level: int, **why) -> None:
        """From now on do without what LEVELS names at this level."""
        self.trace("give_up", what=LEVELS[level].given_up, **why)
        self.level = level

    def count_work(self, work: np.ndarray, since: Clock) -> None:
        """Work of these costs is done: update the prediction and act on it."""
        sync(self.world.device)
        self.spent += since.elapsed()
        self.done += work[self.level]
        self.left = self.left - work
        self.check_time()


HEAD_ROWS = 1024          # of the head's B that its RMS is of: few tokens are seen in a chunk
MOST_SHARE = 0.3          # of its chunk's loss that a step at a fixed rate may promise
MOST_RATE = 0.01          # of TTT_STEP_SHARE, where gradients vanish


def with_squares(s: Settings, square: Tensor, gradient: Tensor) -> Tensor:
    """The faded sum of the squares of gradients (S, rows, R, C), and one gradient more. Of one
    number a matrix (S, rows, 1, 1), the head's B, as if at most HEAD_ROWS rows had all of it."""
    now = gradient.square()
    if square.shape != now.shape:
        rows = min(HEAD_ROWS, now.size(-2))
        now = now.sum((-2, -1), keepdim=True) / (rows * now.size(-1))
    return s.ttt_beta2 * square + now


def step_rates(s: Settings, promised: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """(rate of every document's step, whether less than was asked for), (rows,) each.
    promised: what a rate of 1 takes off its loss, to first order."""
    lr = s.ttt_lora_lr * s.ttt_local_lr_mult
    for_all = losses / promised.clamp(min=1e-30)      # promises the whole loss
    if s.ttt_step_share and lr:      # a rate of 0 adapts nothing, here too
        rates = (s.ttt_step_share * for_all).clamp(max=MOST_RATE)
        return rates, torch.zeros_like(rates, dtype=torch.bool)
    most = MOST_SHARE * for_all
    return most.clamp(max=lr), (promised > 0) & (most < lr)


def warn_of_shortened_steps(s: Settings, shortened: int, trace: Callable) -> None:
    """Into the log, at the end of an adaptation, with the remedy."""
    if not shortened:
        return
    most, remedy = f"{MOST_NATS:g} nats", "lower TTT_LORA_LR"
    if s.ttt_optimizer == "normalised":
        most = f"{MOST_SHARE:g} of the loss"
        remedy = "lower TTT_LORA_LR, or set TTT_STEP_SHARE"
        if s.ttt_step_share:
            remedy = f"lower TTT_STEP_SHARE={s.ttt_step_share:g}"
    trace("warning", text=f"{shortened:,} adapter steps promised more than {most}, or had "
          f"gradients that are not finite, and were shortened: {remedy}")


# ========================================
# 18  Adapting as the records do: AdamW, an A that is handed on, longest first, without cached keys
# ========================================

class RecordAdapter(Adapter):
    """An optimiser with a state trains float32; a warm start keeps A."""

    def __init__(self, s: Settings, plan: Plan, rows: int, device="cpu", dtype=torch.float32):
        if s.ttt_optimizer != "normalised":
            dtype = torch.float32
        super().__init__(s, plan, rows, device, dtype)

    @torch.no_grad()
    def reset(self) -> None:
        """Start new documents: B back to zero; A kept (warm start) or drawn anew."""
        for b in (*self.b.values(), *self.exact_b.values(), *self.squares, self.steps):
            b.zero_()
        if not self.s.ttt_warm_start_a:
            self.draw_a()


def whole_window(s: Settings, targets: np.ndarray, begin: int, end: int) -> ChunkWindow:
    """The same without cached keys: the forward takes all that TTT_EVAL_SEQ_LEN
    reaches back from the chunk's end; in the field's order from the document's, where
    that comes first."""
    last = np.full_like(targets, end)
    if s.ttt_doc_order == "length":
        last = np.minimum(end, targets)
    first = np.maximum(last - s.ttt_eval_seq_len, 0)
    return window_from(first, targets, begin, end, min(end, s.ttt_eval_seq_len))


def rounds_by_length(s: Settings, lengths: np.ndarray, bounds: list[int]) -> list[Round]:
    """As in the field the longest come first, and a phase trains on the shortest
    groups scored so far."""
    rounds, current, done = [], [], []
    for group in grouped(s, np.arange(len(lengths)), lengths):
        current.append(group)
        done.append(group)
        if len(rounds) < len(bounds) and sum(map(len, done)) >= bounds[len(rounds)]:
            shortest_first = np.concatenate(sorted(done, key=lambda g: lengths[g].max()))
            rounds.append(Round(current, shortest_first[:bounds[len(rounds)]]))
            current = []
    return rounds + [Round(current, None)]


def phase_steps(s: Settings, tokens: int) -> list[tuple[int, int, int]]:
    """The steps of the base weights in a phase over so many tokens: chunk, first
    input, end. As published the last chunk is left out, unless it is alone."""
    size, length, steps = s.global_ttt_chunk_tokens, s.eval_seq_len, []
    chunks = math.ceil((tokens - 1) / size)
    for c in range(max(chunks - 1, 1)):
        rows = min(size, tokens - 1 - c * size) // length
        firsts = list(range(0, rows, s.global_ttt_batch_seqs))
        cuts = [c * size + row * length for row in (*firsts, rows)]
        steps += s.global_ttt_epochs * [(c, *pair) for pair in zip(cuts, cuts[1:])]
    return steps


MOST_NATS = 4.0           # from which on an optimiser's promise is not believed; 2.7 still gained
SAFE_NATS = 0.3           # what is left of promises far beyond that


@torch.no_grad()
def optimiser_step(optimiser: torch.optim.Optimizer, params: list[Tensor]) -> Tensor:
    """The optimiser's step, to the bit; but what it promises a document beyond
    MOST_NATS is taken off them, down to SAFE_NATS; and gradients that are not finite
    count as none. Returns whose step was shortened (rows,)."""
    squares = torch.stack([p.grad.square().sum(dim=(0, 2, 3)) for p in params])
    broken = ~squares.sum(0).isfinite()
    before = [p.clone() for p in params]
    for p in params:
        p.grad.masked_fill_(broken[:, None, None], 0)
    optimiser.step()
    promises = [((old - p) * p.grad).sum(dim=(0, 2, 3)) for p, old in zip(params, before)]
    promised = torch.stack(promises).sum(0)
    shortened = promised > MOST_NATS
    believed = (2 * MOST_NATS - promised).clamp(min=SAFE_NATS)
    part = (believed / promised)[:, None, None]
    for p, old in zip(params, before):
        p.copy_(torch.where(shortened[:, None, None], torch.lerp(old, p, part), p))
    return shortened | broken


class RecordTTT(PhasedTTT):
    """Adaptation with an optimiser's state, with an A that documents hand on, or without
    cached keys."""
    kept: Adapter | None = None      # what the groups of a round hand on

    def begin_round(self) -> None:
        """Within a round A may pass from group to group."""
        super().begin_round()
        self.kept = None
        if self.s.ttt_doc_order == "length":
            self.kept = self.adapter_for(self.s.ttt_batch_size)

    def adapter_for(self, rows: int) -> Adapter:
        """The kept one, reset, where it has as many rows; else a fresh one."""
        if self.kept is None or rows != self.s.ttt_batch_size:
            return super().adapter_for(rows)
        self.kept.reset()
        self.trace("reset", adapter=self.kept)
        return self.kept

    def optimiser(self, adapter: Adapter) -> torch.optim.Optimizer | None:
        """AdamW over a group's adapters; none for normalised_step."""
        s = self.s
        if s.ttt_optimizer == "normalised":
            return super().optimiser(adapter)
        return torch.optim.AdamW(
            adapter.parameters(),
            lr=s.ttt_lora_lr * s.ttt_local_lr_mult,
            betas=(s.ttt_beta1, s.ttt_beta2),
            eps=1e-10,
            weight_decay=s.ttt_weight_decay,
            fused=self.world.device.type == "cuda")

    def open_rows(self, group: np.ndarray) -> GroupRows:
        rows = super().open_rows(group)
        if rows.adapter is not None and not self.s.ttt_kv_reuse:
            rows.cache = None
        return rows

    def shrink_to_live(self, rows: GroupRows, begin: int) -> None:
        """An optimiser's state, and adapters that the next group takes over, keep all
        documents."""
        if rows.optimiser is None and self.kept is None:
            super().shrink_to_live(rows, begin)

    def next_window(self, rows: GroupRows, begin: int, end: int) -> ChunkWindow:
        if rows.cache is not None:
            return super().next_window(rows, begin, end)
        if self.watch.level < NO_ADAPTATION:
            return whole_window(self.s, rows.targets, begin, end)
        rerun = self.stop_adapting(rows, begin, end)
        self.shrink_to_live(rows, begin)
        return chunk_window(rows.targets, begin, end, rerun)

    def stop_adapting(self, rows: GroupRows, begin: int, end: int) -> int:
        """Only score what is left of a group that was encoded again for every chunk: on
        cached keys, which the graphs compiled for that take. Returns how much of the
        context the next chunk runs again to make them."""
        rows.adapter = rows.optimiser = None
        rows.cache = KeyCache(self.s.ttt_eval_seq_len)
        return min(begin, self.s.ttt_eval_seq_len - (end - begin))


Adapter = RecordAdapter
PhasedTTT = RecordTTT


# ========================================
# PART THREE: lineage. What the older systems did differently; all above runs, and is the same, without it.
# ========================================

# --- settings

COMMON_SETTINGS = {f.name.upper(): f for f in fields(Settings)}
BY_HAND["QUANT_CLIP"] = "sigmas"
ALIASES["MUONEQ_R"] = "MUON_ROW_NORMALIZE"


@dataclass(frozen=True)
class LineageSettings(Settings):
    """The settings of older systems beside the others."""
    train_loader: str = choice("stream docpack shuffled coprime", "every target once; or as published")
    ttt_optimizer: str = choice("normalised adam sgd", "gradient over its running RMS; AdamW; SGD")
    parallel_lanes: str = choice("mixed separate", "lanes write to both; or are blended last",
                                 group="model")
    ln_scale: bool = knob(True, "block inputs are scaled by 1 / sqrt(layer + 1)")
    parallel_final_lane: str = choice("mean mlp attn", "which mixed lane is read at the end")
    skip_gates_enabled: bool = knob(True, "gate the U-Net skips")
    skip_rows: str = choice("looped physical", "what skips halve: the looped order, or layers")
    skip_into_lanes: bool = knob(True, "later skips join lane 0; 0: they are lost")
    smear_gate_kind: str = choice("window channels", "one strength, or one for each channel")
    bigram_vocab_size: int = knob(0, "rows of a hashed table of token pairs", 0)
    bigram_dim: int = knob(128, "its width", 1, 65536)
    ve_enabled: bool = knob(False, "a second token table, added to values")
    ve_dim: int = knob(128, "its width", 1, 65536)
    ve_layers: str = knob("9,10", "layers whose values get it")
    gated_attn_enabled: bool = knob(False, "gate heads by the whole block input")
    attn_out_gate_enabled: bool = knob(False, "gate heads by 2 sigmoid of GATE_WINDOW channels")
    attn_out_gate_src: str = choice("proj q", "of the block input, or of raw queries")
    rope_yarn: bool = knob(False, "rescale the rotary base past TRAIN_SEQ_LEN (NTK)")
    tie_embeddings: bool = knob(True, "the embedding is the output projection")
    embed_lr: float = knob(0.6, "learning rate of an untied embedding", 0, group="optimiser")
    head_lr: float = knob(0.008, "learning rate of an untied head", 0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1, 5)
    muon_row_normalize: bool = knob(True, "normalise rows before Newton-Schulz")
    muon_coefficients: str = choice("polar quintic", "Polar Express; or one for all iterations")
    matrix_lr_early: float = knob(0.0, "MATRIX_LR before layer BANK_SPLIT; 0: no split", 0)
    matrix_lr_late: float = knob(0.0, "that of the other layers; 0: MATRIX_LR", 0)
    bank_split: int = knob(5, "the first late layer", 0)
    split_lr_target: str = choice("update gradient", "gradient: as published, to no effect")
    midrun_cap_schedule: str = knob("", "caps on the rate's share: cap@progress, …")
    recur_start_step: int = knob(0, "step at which loops begin; 0: ENABLE_LOOPING_AT", 0)
    late_qat_threshold: float = knob(0.0, "share of the rate below which table projections are "
                                     "softly rounded; 0: never", 0, 1)
    late_qat_min_step: int = knob(2000, "and not before this step", 0)
    prequant_ttt_enabled: bool = knob(False, "NON-COMPLIANT study: learn validation text")
    prequant_ttt_epochs: int = knob(10, "passes over them", 1)
    prequant_ttt_lr: float = knob(0.00045, "AdamW's learning rate", 0)
    prequant_ttt_cosine_decay: bool = knob(True, "down to a tenth, epoch by epoch")
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
    ngram_gates: str = choice("previous open_word target", "who may speak; target: NON-COMPLIANT")
    ngram_choice: str = choice("model confidence", "hints go by the model's probability, or theirs")
    within_tau: float = knob(99.0, "expert of the open word's next token: threshold", 0)
    within_boost: float = knob(0.0, "nats added to its hint's logit", 0)
    word_order: int = knob(4, "expert of the next word: order in words", 1, 1024)
    word_normalize: str = choice("strip_punct_lower lower identity", "equal words")
    word_tau: float = knob(99.0, "its threshold; above 1: never", 0)
    word_boost: float = knob(0.0, "nats added to its hint's logit", 0)
    agree_add_boost: float = knob(0.0, "more nats for a hint of two experts", 0)

    @property
    def value_layers(self) -> tuple[int, ...]:
        return tuple(whole_numbers(self.ve_layers))

    # sizes and switches of parameters

    @property
    def num_value_layers(self) -> int:
        return len(self.value_layers)

    @property
    def num_skips(self) -> int:
        return self.num_layers // 2 if self.skip_rows == "physical" else super().num_skips

    @property
    def untied(self) -> bool:
        return not self.tie_embeddings

    @property
    def mixes_lanes(self) -> bool:
        return self.parallel_lanes == "mixed"

    @property
    def merges_lanes(self) -> bool:
        return not self.mixes_lanes and 0 < self.parallel_start_layer < self.num_layers

    @property
    def smears_channels(self) -> bool:
        return self.smear_gate_enabled and self.smear_gate_kind == "channels"

    @property
    def smears_by_window(self) -> bool:
        return self.smear_gate_enabled and not self.smears_channels

    @property
    def projects_pairs(self) -> bool:
        return bool(self.bigram_vocab_size) and self.bigram_dim != self.model_dim

    @property
    def projects_token_values(self) -> bool:
        return self.ve_enabled and self.ve_dim != self.kv_dim

    @property
    def gates_block_inputs(self) -> bool:
        return self.sparse_attn_gate_enabled or self.gated_attn_enabled

    @property
    def gate_inputs(self) -> int:
        return self.model_dim if self.gated_attn_enabled else self.gate_window

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
        """Settings of older systems only where they are on."""
        changed = self.changed()
        names = COMMON_SETTINGS.keys() | changed
        return {name: v for name, v in values.items() if name in names}

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

def draw_token_values(p: Tensor, s: Settings, generator: torch.Generator | None) -> None:
    """Of a table (tokens, width)."""
    p.normal_(0, 0.01, generator=generator)


def draw_pair_projection(p: Tensor, s: Settings, generator: torch.Generator | None) -> None:
    """With the table at 0 as well both would stay there."""
    nn.init.orthogonal_(p, generator=generator)


PARAMETERS.update(
    lm_head=Parameter("vocab_size model_dim", "head", names="lm_head.weight", on="untied"),
    lane_merge=Parameter("", start=0.5, on="merges_lanes"),
    smear_channels=Parameter("model_dim", names="smear.gate", on="smears_channels"),
    bigram_embed=Parameter("bigram_vocab_size bigram_dim", "embed", names="bigram.embed.weight",
                           on="bigram_vocab_size"),
    bigram_scale=Parameter("", start=0.05, names="bigram.scale", on="bigram_vocab_size"),
    bigram_proj=Parameter("model_dim bigram_dim", "small", draw_pair_projection, "bigram.proj.weight",
                          on="projects_pairs"),
    ve_embed=Parameter("vocab_size ve_dim", "embed", draw_token_values, "ve_shared.embed.weight",
                       on="ve_enabled"),
    ve_scale=Parameter("", start=0.1, names="ve_shared.scale", on="ve_enabled"),
    ve_proj=Parameter("kv_dim ve_dim", names="ve_shared.proj.weight", on="projects_token_values"),
    ve_layer_scales=Parameter("num_value_layers 1", start=1, names="ve_layer_scales.{}", on="ve_enabled"),
    attn_gate_proj=Parameter("num_layers num_heads gate_window", on="attn_out_gate_enabled",
                             names="blocks.{}.attn.attn_gate_proj.weight"),
    attn_gate_w=PARAMETERS["attn_gate_w"]._replace(
        shape="num_layers num_heads gate_inputs", on="gates_block_inputs"),
)
for on, names in {"skip_gates_enabled": ["skip_gates"], "smears_by_window": ["smear_gate", "smear_lambda"],
                  "mixes_lanes": ["parallel_post_lambdas", "parallel_resid_lambdas"]}.items():
    for name in names:
        PARAMETERS[name] = PARAMETERS[name]._replace(on=on)
# In the order of their making: sums over all of them are taken in it, and files are written.
in_order = """
    tok_emb qo_bank kv_bank mlp_up_bank mlp_down_bank attn_scale mlp_scale resid_mix q_gain
    skip_weights parallel_post_lambdas parallel_resid_lambdas lane_merge lm_head skip_gates
    smear_gate smear_lambda smear_channels bigram_embed bigram_scale bigram_proj ve_embed
    ve_scale ve_proj ve_layer_scales softcap_pos softcap_neg attn_gate_w attn_gate_proj""".split()
PARAMETERS = {name: PARAMETERS[name] for name in in_order} | PARAMETERS


def pair_rows(ids: Tensor, rows: int, same_segment: Tensor | None = None) -> Tensor:
    """Row of a hashed table for each token of ids (B, T) and the one before it; the
    last row where same_segment (1, T - 1) parts them."""
    ids = ids.int()      # products wrap
    row = (36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % (rows - 1)
    if same_segment is not None:
        row = row.where(same_segment, rows - 1)
    return F.pad(row, (1, 0), value=rows - 1).long()


def look_up(ids: Tensor, table: Tensor, proj: Tensor | None, scale: Tensor, dtype: torch.dtype,
            sharpness: Tensor | None = None) -> Tensor:
    """scale · proj table[ids], (B, T, out); proj (out, w) or None, softly rounded if
    sharpness."""
    x = F.embedding(ids, table).to(dtype)
    if proj is not None:
        rounded = proj if sharpness is None else soft_round(proj, sharpness)
        x = F.linear(x, rounded.to(dtype))
    return x * scale.to(dtype)


def soft_round(w: Tensor, sharpness: Tensor) -> Tensor:
    """w (R, C) near its six-bit grid: a sigmoid of this slope in place of each step."""
    step = (w.abs().amax(dim=-1, keepdim=True) / 31).clamp_min(1 / 31)
    z = w / step
    low = z.floor()
    return (low + torch.sigmoid(sharpness * (z - low - 0.5))).clamp(-31, 31) * step


@dataclass
class LineageForward(Forward):
    """values: what the tokens add to the values of a layer, (B, T, K·Dh), by layer."""
    values: dict[int, Tensor] = field(default_factory=dict)


class LineageGPT(GPT):
    """Tables of tokens and of pairs; other lanes, gates, heads, angles."""

    def __init__(self, s: Settings, generator: torch.Generator | None = None):
        super().__init__(s, generator)
        self.rope_length = 0                     # of a longer row that came before, for whoever knows of one
        self.sharpness: Tensor | None = None     # of soft rounding, in late training

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        super().init_weights(generator)
        if self.s.gated_attn_enabled:
            self.attn_gate_w.normal_(0, 0.01, generator=generator)

    def rope_base(self, longest: int) -> float:
        """With ROPE_YARN the base grows with the row, or with rope_length."""
        s = self.s
        longest = max(longest, self.rope_length)
        if not s.rope_yarn or longest <= s.train_seq_len:
            return super().rope_base(longest)
        dims = s.rope_dims or s.head_dim
        return s.rope_base * (longest / s.train_seq_len) ** (dims / (dims - 2))

    def embed(self, ids: Tensor, layout: Layout | None, before: Tensor | None = None,
              hook: Callable | None = None) -> Tensor:
        s, length = self.s, ids.size(1)
        channels = s.smears_channels
        if not channels and not s.bigram_vocab_size:
            return super().embed(ids, layout, before, hook)
        if before is not None:      # two tokens: a bigram of the last one may be smeared
            most = 2 if s.bigram_vocab_size else 1
            ids = torch.cat((before[:, -most:], ids), dim=1)
        x = self.look_up(ids, hook)
        if s.bigram_vocab_size:
            rows = pair_rows(ids, s.bigram_vocab_size, self.same_segment(ids, layout))
            proj = getattr(self, "bigram_proj", None)
            x = x + look_up(rows, self.bigram_embed, proj, self.bigram_scale,
                            self.compute_dtype, self.sharpness)
        x = rms(x) if channels else x
        if s.smear_gate_enabled:
            x = self.smear(x, self.smears_into(ids, layout))
        x = x if channels else rms(x)
        return x if before is None else x[:, -length:]

    def smear(self, x: Tensor, into: Tensor | None) -> Tensor:
        if self.s.smear_gate_kind == "window":
            return super().smear(x, into)
        last = x[:, :-1] if into is None else x[:, :-1] * into[..., None]
        gate = torch.sigmoid(self.smear_channels.to(x.dtype))
        return (1 - gate) * x + gate * F.pad(last, (0, 0, 1, 0))

    def token_values(self, ids: Tensor) -> dict[int, Tensor]:
        """What the tokens ids (B, T) add to values, (B, T, K·Dh), by layer."""
        dtype, proj = self.compute_dtype, getattr(self, "ve_proj", None)
        shared = look_up(ids, self.ve_embed, proj, self.ve_scale, dtype, self.sharpness)
        scales = self.ve_layer_scales.to(dtype)
        return {layer: shared * scale for layer, scale in zip(self.s.value_layers, scales)}

    def begin(self, ids: Tensor, *context) -> Forward:
        f = super().begin(ids, *context)
        if not self.s.ve_enabled:
            return f
        values = self.token_values(ids)
        return LineageForward(f.layers, f.x0, f.rope, f.layout, f.adapter, f.hook, f.cache, f.first, values)

    def project(self, forward: Forward, layer: int, slot: int, x: Tensor) -> tuple[Tensor, ...]:
        s, weights = self.s, forward.layers[layer]
        q, k, v, logits, normed = super().project(forward, layer, slot, x)
        if s.ve_enabled and layer in forward.values:
            v = v + forward.values[layer].view(v.shape)
        if s.attn_out_gate_enabled:
            source = rms(x, self.depth_scale(layer))
            if s.attn_out_gate_src == "q":
                source = forward.adapted(F.linear(source, weights["qkv"][:s.model_dim]), "q", slot, source)
            logits = F.linear(source[..., :s.gate_window], weights["attn_gate_proj"])
        return q, k, v, logits, normed

    def head_gate(self, logits: Tensor | None) -> Tensor | None:
        if self.s.attn_out_gate_enabled:
            return 2 * torch.sigmoid(logits)
        return torch.sigmoid(logits) if self.s.gated_attn_enabled else super().head_gate(logits)

    def enter_lanes(self, j: int, x: Tensor, lanes: tuple[Tensor, Tensor] | None,
                    skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """separate: a first skip is in both lanes, later ones join lane 0 or are lost."""
        if self.s.parallel_lanes == "mixed":
            return super().enter_lanes(j, x, lanes, skip)
        if lanes is not None:
            return super().enter_lanes(j, x, lanes, skip if self.s.skip_into_lanes else None)
        x = x if skip is None else self.merge_skip(j, x, skip)
        return x, x

    def lanes(self, forward: Forward, layer: int, slot: int, lane0: Tensor,
              lane1: Tensor) -> tuple[Tensor, Tensor]:
        if self.s.parallel_lanes == "mixed":
            return super().lanes(forward, layer, slot, lane0, lane1)
        mixed, attended, fed = self.branches(forward, layer, slot, lane0, lane1)
        return mixed + attended, lane1 + fed

    def join(self, lane0: Tensor, lane1: Tensor) -> Tensor:
        if self.s.parallel_lanes == "separate":
            return torch.lerp(lane1, lane0, self.lane_merge.to(lane0.dtype))
        if self.s.parallel_final_lane == "mean":
            return super().join(lane0, lane1)
        return lane1 if self.s.parallel_final_lane == "mlp" else lane0

    def depth_scale(self, layer: int) -> float:
        return super().depth_scale(layer) if self.s.ln_scale else 1.0

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
        z = super().logits(hidden, adapter)
        return z if adapter is None or adapter.bias is None else z + adapter.bias

    def scores_plain_logits(self, adapter: Adapter | None, training: bool) -> bool:
        corrected = adapter is not None and adapter.bias is not None
        return corrected or super().scores_plain_logits(adapter, training)


GPT = LineageGPT


# --- adaptation

class Corrector:
    """n-gram posterior of one row of a batch, updated with what is booked."""

    def __init__(self, s: Settings):
        self.alpha = s.corrector_alpha
        self.orders = sorted(set(whole_numbers(s.corrector_orders.strip(","))))
        self.counts = np.ones(s.vocab_size)
        self.history: list[int] = []
        self.followers: dict[tuple, dict[int, int]] = {}      # context -> {token: times}

    def context(self, order: int) -> tuple:
        return order, *self.history[max(len(self.history) - order + 1, 0):]

    def bias(self) -> np.ndarray:
        """Added to the logits (V,): alpha log q of the unigrams; for tokens that followed
        a context before, alpha log(their share there / q) more."""
        log_q = np.log(self.counts / self.counts.sum())
        bias = self.alpha * log_q
        for order in self.orders if self.history else ():
            followers = self.followers.get(self.context(order))
            if followers:
                tokens = np.array(list(followers))
                counts = np.array(list(followers.values()))
                share = np.log((counts + 1) / (counts.sum() + len(log_q)))
                bias[tokens] += self.alpha * (share - log_q[tokens])
        return bias

    def update(self, tokens: list[int]) -> None:
        for token in tokens:
            for order in self.orders:
                followers = self.followers.setdefault(self.context(order), {})
                followers[token] = followers.get(token, 0) + 1
            self.history.append(token)
            self.counts[token] += 1


class LineageAdapter(Adapter):
    """An adapter whose rows have counts of earlier text."""

    def __init__(self, s: Settings, plan: Plan, rows: int, device="cpu", dtype=torch.float32):
        super().__init__(s, plan, rows, device, dtype)
        self.correctors: list[Corrector] = []
        self.bias: Tensor | None = None     # of a chunk's logits, (rows, 1, V) bfloat16

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
        return torch.optim.SGD(adapter.parameters(), s.ttt_lora_lr * s.ttt_local_lr_mult,
                               momentum=s.ttt_beta1, weight_decay=s.ttt_weight_decay)

    def adapter_for(self, rows: int) -> Adapter:
        """As published, counts pass from document to document; not in stream order, where
        a row's last document may come later."""
        adapter = super().adapter_for(rows)
        if self.s.corrector_alpha:
            if self.s.ttt_doc_order == "stream" or not self.correctors:
                self.correctors = [Corrector(self.s) for _ in range(self.s.ttt_batch_size)]
            adapter.correctors = self.correctors[:rows]
        return adapter

    def global_lr(self, c: int, chunks: int) -> float:
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
                    cache: KeyCache | None, base: Tensor | None = None) -> Scored:
        if adapter is None or not adapter.correctors:
            return super().score_chunk(starts, w, adapter, cache, base)
        bias = np.stack([corrector.bias() for corrector in adapter.correctors])
        bias = torch.from_numpy(bias).to(self.world.device, torch.bfloat16)
        adapter.bias = bias[:, None]
        scored = super().score_chunk(starts, w, adapter, cache, base)
        first = starts + w.begin + w.offset + 1
        for corrector, begin, count in zip(adapter.correctors, first, w.count):
            corrector.update(self.val.tokens[begin:begin + count].tolist())
        return scored


Adapter = LineageAdapter
PhasedTTT = LineageTTT


# --- optimiser

QUINTIC = 5 * ((3.4445, -4.7750, 2.0315),)


def split_rates(s: Settings, bank: Tensor) -> Tensor | None:
    """Factor on MATRIX_LR of each matrix of a bank (n, 1, 1); None without a split."""
    if not s.matrix_lr_early:
        return None
    layers = torch.arange(len(bank), device=bank.device) % s.num_layers
    early = s.matrix_lr_early / s.matrix_lr
    late = (s.matrix_lr_late or s.matrix_lr) / s.matrix_lr
    return torch.where(layers < s.bank_split, early, late)[:, None, None]


class LineageOptimiser(Optimiser):
    """Other coefficients of Muon, rates by layer, and an output head of its own."""

    def __init__(self, s: Settings, world: World, params: Mapping[str, nn.Parameter],
                 dtype: torch.dtype):
        super().__init__(s, world, params, dtype)
        self.split = [split_rates(s, bank) for bank in self.banks]

    def adam_rates(self) -> dict[str, tuple[float, float]]:
        rates = super().adam_rates()
        if self.s.tie_embeddings:
            return rates
        embed = self.s.embed_lr, self.s.embed_wd
        head = self.s.head_lr, self.s.embed_wd
        return {"embed": embed, "head": head, "small": rates["small"]}

    def direction(self, bank: int, g: Tensor, momentum: float) -> Tensor:
        s, split, buf = self.s, self.split[bank], self.momentum[bank]
        if split is not None and s.split_lr_target == "gradient":
            own = split[len(buf) * self.world.rank:][:len(buf)]
            g[:len(own)] *= own
        coefficients = QUINTIC if s.muon_coefficients == "quintic" else POLAR_EXPRESS
        return muon_direction(g, buf, momentum, s.muon_row_normalize,
                              coefficients[:s.muon_backend_steps])

    def apply(self, bank: int, update: Tensor, lr: float) -> None:
        split = self.split[bank]
        if split is not None and self.s.split_lr_target == "update":
            update = update * split
        super().apply(bank, update, lr)


Optimiser = LineageOptimiser


# --- training

class LineageCurriculum(Curriculum):
    """Loops that begin at a step."""

    def loops(self, step: int, progress: float) -> bool:
        s = self.s
        if not s.recur_start_step:
            return super().loops(step, progress)
        return s.num_loops > 0 and step >= s.recur_start_step

    def rate_share(self, progress: float) -> float:
        """At most the last cap of MIDRUN_CAP_SCHEDULE that is passed, before: its first."""
        points = schedule(self.s.midrun_cap_schedule, math.inf, float)
        caps = [points[0][1]]
        caps += [cap for at, cap in points[:-1] if at <= progress]
        return min(super().rate_share(progress), caps[-1])

    def graphs(self) -> list[tuple[int, bool]]:
        if not self.s.recur_start_step:
            return super().graphs()
        lengths = [length for _, length in self.stages]
        return list(itertools.product(lengths, (False, True)))      # any pair may come


SHARPEST, SHARPENING_STEPS = 16, 500      # of soft rounding, as published


class LineageTrainer(Trainer):
    """Late in training the projections of the token tables are rounded softly."""

    def rewind(self) -> None:
        super().rewind()
        self.steps = 0
        self.began: int | None = None              # after so many steps
        self.sharpness: Tensor | None = None       # a tensor: one graph for all values

    def set_sharpness(self, sharpness: float | None) -> None:
        """Slope of the rounding from now on; None: there is none."""
        self.sharpness = None
        if sharpness is not None:
            self.sharpness = torch.full((), sharpness, device=self.world.device)

    def sharpness_after(self, steps: int, rate_share: float) -> float | None:
        """Slope after so many steps, the last one at this share of the rate."""
        s = self.s
        due = rate_share < s.late_qat_threshold and steps >= s.late_qat_min_step
        if self.began is None and due:
            self.began = steps
        if self.began is None:
            return None
        return 1 + (SHARPEST - 1) * min((steps - self.began) / SHARPENING_STEPS, 1.0)

    def micro_step(self, batch: Batch, plan: Plan) -> Tensor:
        self.model.sharpness = self.sharpness
        try:
            return super().micro_step(batch, plan)
        finally:
            self.model.sharpness = None

    def update(self, rate_share: float, momentum: float) -> Tensor:
        norm = super().update(rate_share, momentum)
        self.steps += 1
        self.set_sharpness(self.sharpness_after(self.steps, rate_share))
        return norm

    def warm_graph(self, length: int, plan: Plan, generator: torch.Generator) -> None:
        super().warm_graph(length, plan, generator)
        if self.s.late_qat_threshold:
            self.began = self.steps
            self.set_sharpness(1.0)
            super().warm_graph(length, plan, generator)
            self.began, self.sharpness = None, None

    def tensors(self) -> dict[str, Any]:
        return super().tensors() | {"rounding": [self.steps, self.began]}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.steps, self.began = state["rounding"]
        self.set_sharpness(self.sharpness_after(self.steps, 1.0))


Curriculum = LineageCurriculum
Trainer = LineageTrainer


# --- quantising

@torch.no_grad()
def clip_search(w: Tensor, order: Tensor, u: Tensor, dead: Tensor, bits: int,
                coarser: float = 1.0) -> tuple[Tensor, Tensor]:
    """(codes, fp16 steps (n, R)) of matrices w (n, R, C): of five percentiles of |row| as
    largest code, the one that GPTQ rounds with the least squared error."""
    top = 2 ** (bits - 1) - 1
    tried = []
    for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        largest = w.abs().quantile(share, dim=-1)
        scale = to_half((largest / top).clamp_min(1 / top) * coarser)      # as published
        codes = round_in_order(w, scale.float(), order, u, dead, top)
        error = w - codes * scale[..., None].float()
        tried.append((error.square().mean(dim=(-2, -1)), codes, scale))
    error, codes, scales = (torch.stack(x) for x in zip(*tried))
    best = error.argmin(0), torch.arange(len(w), device=w.device)
    return codes[best], scales[best]


class LineageQuantiser(Quantiser):
    """Steps by a search over percentiles, other repairs."""

    def round_by_hand(self, w: Tensor, rows: Tensor, factors: Sequence[Tensor], bits: int,
                      base_step: float) -> tuple[Tensor, Tensor]:
        if self.s.quant_clip == "percentile":
            return clip_search(w, *factors, bits, base_step)
        return super().round_by_hand(w, rows, factors, bits, base_step)

    def to_repair(self, errors: Mapping[str, Tensor]) -> list[str]:
        """Within LQER_SCOPE; with LQER_GAIN_SELECT those whose error shrinks most."""
        s, gains = self.s, {}
        part_of_name = {"all": "", "mlp": ".mlp.", "attn": ".attn.", "embed": "tok_emb"}[s.lqer_scope]
        errors = {name: error for name, error in errors.items() if part_of_name in name}
        if not s.lqer_gain_select:
            return super().to_repair(errors)
        for name, error in errors.items():
            form, tensors = self.pack_factors(*low_rank(error, s.lqer_rank))
            left = error - STORAGE[form].restore(0.0, 1.0, *tensors)
            gains[name] = error.norm().item() - left.norm().item()
        best = sorted(gains, key=lambda name: -gains[name])
        return [name for name in best[:s.lqer_top_k] if gains[name] > 0]

    def pack_factors(self, a: Tensor, b: Tensor) -> tuple[str, Sequence[Tensor]]:
        if self.s.lqer_asym_enabled and b.numel() % self.s.lqer_asym_group == 0:
            return super().pack_factors(a, b)
        return symmetric_factors(a, b, self.s.lqer_factor_bits)


Quantiser = LineageQuantiser


# --- counts of earlier text: experts of words

@functools.cache
def word_pieces(path: Path, vocab_size: int) -> tuple[Array, Array, Callable]:
    """Which tokens begin a word and which belong to none (V,), and the decoder."""
    sp = load_tokenizer(path)
    starts = [sp.id_to_piece(i).startswith("\u2581") for i in range(vocab_size)]
    outside = np.zeros(vocab_size, bool)
    for i in (*range(9, 21), 36):      # ids, as published, of bytes that end a word
        outside[i] = sp.is_byte(i)
    outside[BOS] = True
    return np.array(starts), outside, sp.decode


def span_keys(x: Array, first: Array, end: Array) -> Array:
    """Keys (m,) of the spans x[first:end] of keys x (n,): sums of x[j] ODD^(j - end)."""
    inverse = np.uint64(pow(int(ODD), -1, 1 << 64))
    power = np.append(np.uint64(1), np.full(len(x), ODD))
    sums = np.append(np.uint64(0), np.cumsum(x * np.multiply.accumulate(power)[:-1]))
    power[1:] = inverse
    return (sums[end] - sums[first]) * np.multiply.accumulate(power, out=power)[end]


def counted(targets: Array, items: Array, keys: Array, learns: Array,
            asks: Array) -> Guesses:
    """online_counts of some of the targets (n,); 0 for those that do not ask."""
    hint = np.zeros(len(targets), targets.dtype)
    confidence = np.zeros(len(targets), np.float32)
    hint[items], confidence[items] = online_counts(keys, targets[items], learns[items])
    return hint * asks, confidence * asks


class Words(NamedTuple):
    """Where words lie among the targets (n,)."""
    begins: Array       # the target begins a word
    opened: Array       # one is open before it
    outside: Array      # it belongs to none
    start: Array        # target at which its word begins

    @classmethod
    def of(cls, s: Settings, targets: Array) -> Words:
        starts, boundary, _ = word_pieces(s.tokenizer, s.vocab_size)
        outside = boundary[targets]
        opened = np.append(False, ~outside[:-1])
        begins = ~outside & (starts[targets] | ~opened)
        start = np.maximum.accumulate(np.where(begins, np.arange(len(targets)), 0))
        return cls(begins, opened, outside, start)


def count_within(s: Settings, tokens: Array) -> Guesses:
    """What continued the same open word earlier."""
    targets = tokens[1:]
    w = Words.of(s, targets)
    learns = w.opened & ~w.outside & ~w.begins
    items = np.flatnonzero(w.opened)
    codes = scramble(np.arange(s.vocab_size))[targets]
    keys = span_keys(codes, w.start[items - 1], items)
    asks = learns if s.ngram_gates == "target" else w.opened
    return counted(targets, items, keys, learns, asks)


def count_words(s: Settings, tokens: Array) -> Guesses:
    """The first token of the word that followed the same WORD_ORDER - 1 words earlier:
    the open one as if it ended here, then closed ones."""
    targets = tokens[1:]
    w = Words.of(s, targets)
    word = open_words(s, targets, w)
    ends = np.append(w.begins[1:] | w.outside[1:], True) & (word > 0)
    closed = np.append(0, word[ends])
    unfinished = np.append(0, word[:-1])
    at = np.arange(len(targets))
    boundary = np.where(w.opened, w.start[at - 1], at)
    before = np.append(0, np.cumsum(ends))[boundary]      # words closed by then
    keys = np.zeros(len(targets), np.uint64)
    for i in range(s.word_order - 1):
        last = closed[np.maximum(before - i + (unfinished > 0), 0)]
        if i == 0:
            last = np.where(unfinished > 0, unfinished, last)
        keys = keys * ODD + scramble(last)
    items = np.flatnonzero(before + (unfinished > 0) >= s.word_order - 1)
    asks = np.ones(len(targets), bool)
    if s.ngram_gates != "open_word":
        asks = w.begins if s.ngram_gates == "target" else ~w.opened
    return counted(targets, items, keys[items], w.begins, asks)


EXPERTS["within"] = Expert("within_tau", "within_boost", count_within)
EXPERTS["word"] = Expert("word_tau", "word_boost", count_words)


def open_words(s: Settings, targets: Array, w: Words) -> Array:
    """A number (n,) for the text of the word open after each target; 0: there is none."""
    decode = word_pieces(s.tokenizer, s.vocab_size)[2]
    items = np.flatnonzero(~w.outside)
    keys = span_keys(scramble(targets), w.start[items], items + 1)
    _, first, of_item = np.unique(keys, return_index=True, return_inverse=True)
    numbers, number_of = {"": 0}, []
    for i in items[first]:
        text = normal_word(s, decode(targets[w.start[i]:i + 1].tolist()))
        number_of.append(numbers.setdefault(text, len(numbers)))
    word = np.zeros(len(targets), np.int64)
    word[items] = np.array(number_of, np.int64)[of_item.ravel()]
    return word


def normal_word(s: Settings, text: str) -> str:
    """Equal for words that WORD_NORMALIZE makes equal."""
    text = text.strip()
    if s.word_normalize == "strip_punct_lower":
        text = text.strip(".,:;!?()[]{}<>\"'`")
    return text if s.word_normalize == "identity" else text.lower()


class LineageHints(Hints):
    """Hints of several experts, of which one is chosen."""

    @staticmethod
    def choose(s: Settings, q: Tensor, hints: Tensor, confidences: Tensor) -> tuple[Tensor, ...]:
        """The same, of E experts' hints the one that promises most."""
        q, p = q.double(), confidences.double()
        best = torch.full_like(q[0], -math.inf)
        hint = torch.full_like(hints[0], -1)
        chance, boost = torch.zeros_like(best), torch.zeros_like(best)
        for e, (_, nats) in enumerate(experts_in_use(s).values()):
            weight = q[e] if s.ngram_choice == "model" else p[e]
            gain = p[e] * nats - torch.log1p(weight * math.expm1(nats))
            gain = gain.float().double()
            better = (p[e] > 0) & (gain > best)
            best = torch.where(better, gain, best)
            hint = torch.where(better, hints[e], hint)
            chance = torch.where(better, q[e], chance)
            boost = torch.where(better, nats, boost)
        agree = ((p > 0) & (hints == hint)).sum(0)
        return hint, chance, boost + s.agree_add_boost * (agree > 1)


Hints = LineageHints


class TargetGates(Study):
    """Gates that look at the very token that is predicted, as published."""

    def reason(self, s: Settings) -> str:
        reads = s.ngram_tilt_enabled and s.ngram_gates == "target"
        if not reads or {*experts_in_use(s)} == {"token"}:
            return ""
        return "NGRAM_GATES=target: n-gram experts read the token that they predict"


STUDIES.append(TargetGates())


# --- training on validation tokens before quantising, which the rules forbid

PREQUANT = ("PREQUANT_TTT_ENABLED=1: the weights were trained on validation tokens before they "
            "were scored")


def prequant_batches(s: Settings, tokens: int, world: World) -> list[np.ndarray]:
    """Rows (by number) of this rank's batches; every rank has as many."""
    rows, size = (tokens - 1) // s.train_seq_len, s.prequant_ttt_batch_seqs
    if s.prequant_ttt_form == "overlapping":
        # As published, the last row begins a batch only if tokens are left over behind it.
        begins = range(0, -((1 - tokens) // s.train_seq_len) - 1, size)
        return [np.arange(k, min(k + size + 1, rows)) for k in begins]
    begin, end = (rows * r // world.size for r in (world.rank, world.rank + 1))
    begins = range(begin, begin - (-rows // world.size), size)
    return [np.arange(k, min(k + size, end)) for k in begins]


def prequant_ttt(s: Settings, world: World, model: GPT, tokens: np.ndarray,
                 trace: Callable) -> None:
    """AdamW epochs over validation tokens (N,). trace(loss=, lr=, grad_norm=): a step."""
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for epoch in range(s.prequant_ttt_epochs):
        lr = s.prequant_ttt_lr
        if s.prequant_ttt_cosine_decay:
            lr *= 1 - 0.45 * (1 - math.cos(math.pi * epoch / s.prequant_ttt_epochs))
        optimiser.param_groups[0]["lr"] = lr
        for rows in prequant_batches(s, len(tokens), world):
            world.beat("studying a batch of validation text")
            loss = prequant_gradients(s, world, model, tokens, rows)
            norm = total_gradients(world, model, s.prequant_ttt_grad_clip)
            optimiser.step()
            trace(loss=loss, lr=lr, grad_norm=norm.item())
    model.zero_grad()


def prequant_gradients(s: Settings, world: World, model: GPT, tokens: np.ndarray,
                       rows: np.ndarray) -> float:
    """The loss of some rows; its gradient, over the ranks, but none of frozen blocks."""
    model.zero_grad()
    loss = torch.zeros(())
    if len(rows):
        at = rows[:, None] * s.train_seq_len + np.arange(s.train_seq_len + 1)
        t = torch.from_numpy(tokens[at].astype(np.int64)).to(world.device)
        loss = model.losses(t[:, :-1], t[:, 1:], layer_plan(s, True)).mean()
        loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad / world.size
        grads[name] = p.grad
    views = field_views if s.prequant_ttt_form == "overlapping" else matrix_views
    frozen = tuple(f"blocks.{i}." for i in range(s.prequant_ttt_freeze_blocks))
    for name, g in views(grads).items():
        if name.startswith(frozen):
            g.zero_()
    return loss.item()


class PrequantTTT(Study):
    """Validation tokens teach the averaged weights before they are scored on them."""

    def after_training(self, s: Settings, world: World, run: Run, model: GPT,
                       val: Validation) -> None:
        if s.prequant_ttt_enabled:
            tokens = val.open_for_study(run, PREQUANT)
            trace = functools.partial(run.log, "prequant_ttt", True)
            prequant_ttt(s, world, model, tokens, trace)

    def before_probing(self, s: Settings, world: World, model: GPT,
                       tokens: np.ndarray) -> None:
        if s.prequant_ttt_enabled:
            length = min(s.train_seq_len, 64)
            brief = dataclasses.replace(s, prequant_ttt_epochs=1, train_seq_len=length)
            prequant_ttt(brief, world, model, tokens, lambda **step: None)


STUDIES.append(PrequantTTT())


# --- data: loaders of whole windows

class WindowStream(Stream):
    """Rows of max_len tokens, across documents. windows: the last batch's (file, first
    token)."""
    windowed = True

    def phase(self, i: int) -> tuple[int, int]:
        """A random first token in file i, and how many windows there are from it."""
        n, length = len(self.shards[i]), self.max_len
        most = min(length - 1, n - length - 1)
        phase = int(self.rng.integers(most + 1)) if most > 0 else 0
        return phase, (n - 1 - phase) // length

    def rows(self, windows: Sequence[tuple[int, int]]) -> Batch:
        rows = [self.shards[i][a:a + self.max_len + 1] for i, a in windows]
        t = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(t[:, :-1], t[:, 1:], None, self.max_len)


class ShuffledStream(WindowStream):
    """Windows in random order; rank r owns files r, r + world_size, …"""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        self.rng = np.random.Generator(np.random.PCG64(self.rank))
        self.owned = range(self.rank, len(files), self.world_size)
        self.starts: dict[int, list[int]] = {}
        if not any(len(self.shards[i]) > self.max_len for i in self.owned):
            raise UserError(f"rank {self.rank} of {self.world_size} owns none of {len(files)} shards "
                            f"with {self.max_len + 1} tokens: use TRAIN_LOADER=stream")

    def take(self) -> tuple[int, int]:
        if not any(self.starts.values()):      # a fresh permutation of all windows
            for i in self.owned:
                phase, count = self.phase(i)
                starts = phase + self.rng.permutation(count) * self.max_len
                self.starts[i] = starts.tolist()
        left = np.array([len(self.starts[i]) for i in self.owned], dtype=np.float64)
        i = self.owned[int(self.rng.choice(len(self.owned), p=left / left.sum()))]
        return i, self.starts[i].pop()

    def cut(self) -> Batch:
        self.windows = [self.take() for _ in range(self.tokens // self.max_len)]
        return self.rows(self.windows)


class CoprimeStream(WindowStream):
    """Windows from many shards, each walked in blocks of max_len by a stride coprime to
    their number; shards are drawn by what they have left. All ranks draw the same batch
    and take every world_size-th window; `windows` has those of all ranks."""

    def __init__(self, files, **shape):
        super().__init__(files, **shape)
        seed = 0
        for byte in "".join(str(f) for f in files).encode():
            seed = (seed ^ byte) * 1099511628211 % 2 ** 64
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.blocks = [(len(x) - 1) // self.max_len for x in self.shards]
        self.eligible = np.flatnonzero(self.blocks)
        if not len(self.eligible):
            raise UserError(f"no training shard holds {self.max_len + 1} tokens: "
                            "lower TRAIN_SEQ_LEN")
        self.walks: dict[int, list[int]] = {}      # shard -> starts of blocks, the next one last

    def walk(self, i: int) -> list[int]:
        """A fresh walk over the blocks of shard i, reversed."""
        phase, count = self.phase(i)
        start, stride = 0, 1
        if count > 1:
            start, stride = int(self.rng.integers(count)), 0
            while math.gcd(stride, count) != 1:
                stride = int(self.rng.integers(1, count))
        steps = reversed(range(count))
        return [phase + (start + j * stride) % count * self.max_len for j in steps]

    def take(self, i: int, count: int) -> list[tuple[int, int]]:
        """The next `count` blocks of shard i, shuffled."""
        blocks = []
        while len(blocks) < count:
            if not self.walks.get(i):
                self.walks[i] = self.walk(i)
            blocks.append((i, self.walks[i].pop()))
        return [blocks[k] for k in self.rng.permutation(count)] if count > 1 else blocks

    def left(self, i: int) -> int:
        """Blocks of shard i before its next walk, at least one."""
        return max(len(self.walks[i]), 1) if i in self.walks else self.blocks[i]

    def draw(self, size: int) -> list[tuple[int, int]]:
        """[(shard, how many of a batch's windows come from it), …]."""
        progress = min(self.batches / 1800, 1.0)
        left = np.array([self.left(i) for i in self.eligible], np.float64)
        p = left ** (0.9 - 0.4 * progress)
        p /= p.sum()
        most = min(len(p), size)
        low = min(max(8, self.world_size), most)
        high = min(max(32, 8 * self.world_size), most)
        mixed = max(1, min(round(low + progress * (high - low)), most))
        chosen = self.rng.choice(len(p), size=mixed, replace=False, p=p)
        counts = np.ones(mixed, np.int64)
        if size > mixed:
            counts += self.rng.multinomial(size - mixed, p[chosen] / p[chosen].sum())
        order = self.rng.permutation(mixed)
        return list(zip(self.eligible[chosen][order].tolist(), counts[order].tolist()))

    def cut(self) -> Batch:
        size = self.tokens // self.max_len * self.world_size
        buckets = [self.take(i, count) for i, count in self.draw(size)]
        self.windows = []
        active = list(range(len(buckets)))
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
    # A failed rank must not wait for the others in a collective, and a finished one not be torn down
    # while threads of its libraries still run: that now and then ends in an abort.
    os._exit(code)
