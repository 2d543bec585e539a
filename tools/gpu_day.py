"""The day a GPU is there: one command measures what waits for one, within 8 minutes.

    python tools/bench.py --gpu                          # everything, into runs/gpu_day
    python tools/bench.py --gpu --only steps ttt         # some parts
    python tools/bench.py --gpu --account account.json   # beside modelled times
    python tools/bench.py --gpu --rehearse               # every part, tiny, on a CPU

Parts, in this order: selftest, profile, steps (once per attention backend), quantise,
ttt, startup (cold, warm). Each has a process and a share of the time of its own: one
that fails, hangs or runs out of memory ends alone, and its first line of error is kept.
OUT/01_selftest.json and so on are written after every finding, OUT/gpu.md after every
part: a run that is cut still tells. Run again, it does what is not done yet.

One GPU stands for one rank of eight: a step is one micro-batch of 98,304 tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, Sequence

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.bench import FINEWEB_TARGETS, FULL, SMALL
from tools.common import (
    ROOT,
    SCRIPT,
    ToolError,
    command_line,
    json_object,
    relative,
    run_cli,
    table,
    write_atomic,
)

REHEARSAL = "REHEARSAL on CPU"
MARGIN_SECONDS = 8  # kept for the page and for ending a process that hangs
MACHINE, PAGE, MEMORY = "00_machine.json", "gpu.md", "07_memory.json"
BACKENDS = ("fa3", "fa4", "torch", "plain")
PLANS = {"without loops": False, "with loops": True}
ROUNDS, ROUND_STEPS = 12, 5  # of a training step; a round is timed as one
TINY = {**SMALL, "MODEL_DIM": 64, "TRAIN_BATCH_TOKENS": 512}  # of a rehearsal
TOP_KERNELS = 30
# FineWeb's validation has 50,000 documents with a mean of 957 tokens: here log-normal
MEDIAN_LENGTH, LENGTH_SPREAD = 580, 1.0


# --- what a part writes


class Record:
    """The JSON of one part, written anew after every finding: a cut part still tells."""

    def __init__(self, path: Path, **head):
        self.path = path
        self.data = head
        self.save()

    def put(self, **findings) -> None:
        """Add findings."""
        self.data.update(findings)
        self.save()

    def row(self, name: str, **values) -> None:
        """Add a row to the list of this name."""
        self.data.setdefault(name, []).append(values)
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)


def finite_only(value):
    """The same with null for every number that is not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite_only(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_only(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: dict) -> None:
    """Write a file of results."""
    write_atomic(path, json.dumps(finite_only(value), indent=1) + "\n")


def read_record(path: Path) -> dict:
    """What a part has written; empty where there is nothing, or no JSON object."""
    try:
        return json_object(path.read_bytes()) or {}
    except OSError:
        return {}


class NotHere(Exception):
    """A part cannot run on this machine: its text says why."""


def first_line(error: BaseException) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


# --- a part's process


class Lab:
    """What every part works with: the trainer's module, the device, settings, text."""

    def __init__(self, part: Part, record: Record):
        begin = time.perf_counter()
        sys.path.insert(0, str(ROOT))
        import torch

        import train_gpt

        self.torch, self.tg = torch, train_gpt
        self.part, self.record = part, record
        self.out = record.path.parent
        self.cache = Path(os.environ.get("GPU_DAY_CACHE", self.out / "cache"))
        self.rehearse = bool(record.data.get("rehearsal"))
        self.cuda = torch.cuda.is_available() and not self.rehearse
        if not (self.cuda or self.rehearse):
            raise ToolError(no_gpu(torch.__version__))
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.world = train_gpt.World(device=self.device)
        self.half = torch.float32 if self.rehearse else torch.bfloat16
        self.import_seconds = time.perf_counter() - begin

    @property
    def backend(self) -> str:
        """The part's backend of attention; else what the self tests chose, or auto."""
        found = read_record(self.out / "01_selftest.json")
        return self.part.backend or found.get("auto", "auto")

    def settings(self, **changes):
        """Settings of full size, or tiny ones, free of the caller's environment."""
        size = TINY if self.rehearse else FULL
        values = {"CASEOPS_ENABLED": 0, "GRAD_ACCUM_STEPS": 1, "CODE_FORM": "readable",
                  **size, **changes}
        return self.tg.Settings.from_env({k: str(v) for k, v in values.items()})

    def often(self, times: int) -> int:
        """So many times; once in a rehearsal."""
        return 1 if self.rehearse else times

    def sync(self) -> None:
        """Wait for the device."""
        self.tg.sync(self.device)

    def timed(self, run: Callable) -> tuple[object, float]:
        """(what a call returns, its seconds), the device drained before and after."""
        self.sync()
        begin = time.perf_counter()
        result = run()
        self.sync()
        return result, time.perf_counter() - begin

    def rounds(self, run: Callable, rounds: int, each: int = 1) -> list[float]:
        """Milliseconds of a call, by round; within one the host may run ahead."""

        def several():
            for _ in range(each):
                run()

        return [1e3 * self.timed(several)[1] / each for _ in range(rounds)]

    def forget_peak(self) -> None:
        """Begin to watch the GPU's memory anew."""
        if self.cuda:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Most GB that tensors had on the GPU since forget_peak(); 0 without one."""
        return self.torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    def text(self, lengths: Sequence[int], vocab_size: int, seed: int = 0):
        """Documents of these lengths, their ids by Zipf's law, and a last BOS."""
        np = self.tg.np
        drawn = np.random.default_rng(seed).zipf(1.2, sum(lengths) + 1)
        tokens = 2 + np.minimum(drawn, vocab_size - 3)
        tokens[np.cumsum([0, *lengths])] = self.tg.BOS
        return tokens.astype(np.uint16)

    def batches(self, s, count: int) -> list:
        """Micro-batches of packed documents, on the device."""
        size = s.batch_shape(1)[1]
        lengths, needed = [], count * size + 1
        while sum(lengths) < needed:
            lengths += document_lengths(64, seed=len(lengths))
        tokens = self.text(lengths, s.vocab_size)
        batches = []
        for begin in range(0, count * size, size):
            batch = self.tg.packed_batch(tokens[begin : begin + size + 1], s.train_seq_len)
            batches.append(batch.to(self.device))
        return batches

    def random_model(self, s):
        """The configuration's model, its matrices drawn: at the start half are zero."""
        torch = self.torch
        model = self.tg.build_model(s, self.world)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 3 and p.shape[1] * p.shape[2] > 1024:
                    p.normal_(0, p.shape[2] ** -0.5, generator=generator)
        return model


def document_lengths(count: int, longest: int = 10**6, seed: int = 0) -> list[int]:
    """Tokens of `count` documents, as FineWeb has them, each cut at `longest`."""
    import numpy as np

    spread = LENGTH_SPREAD * np.random.default_rng(seed).standard_normal(count)
    return np.clip(MEDIAN_LENGTH * np.exp(spread), 16, longest).astype(int).tolist()


def no_gpu(version: str) -> str:
    """Why it does not begin, and what to do."""
    return (f"no CUDA GPU is seen by torch {version}: run this where there is one, "
            "or add --rehearse, which runs every part at a tiny size on the CPU")


# --- 1 self tests

def heads_side_by_side(tg, x, kernel):
    """Queries, keys and values, (1, tokens, 16, 64)."""
    angle = x.fixed("angle", x.tokens, 8).float()
    weights = dict(qkv=x.drawn("qkv", 1024, 512, scale=512**-0.5), q_gain=x.drawn("gain", 8))
    rope = angle.cos(), angle.sin()
    heads = tg.normed_heads(x.drawn("x", 1, x.tokens, 512), weights, rope, 1.0, kernel=kernel)
    return x.lab.torch.cat(heads[:3], dim=2)


# Every kernel with a plain twin: name -> output, of the trainer's module, inputs and
# whether by the kernel. One entry more is all that a new kernel needs.
TWINS: dict[str, Callable] = {
    "capped cross-entropy": lambda tg, x, kernel: tg.capped_ce(
        x.drawn("logits", x.tokens, x.vocab, scale=4), x.ids(), 30.0, kernel),
    "LeakyReLU² MLP": lambda tg, x, kernel: tg.leaky_square_mlp(
        x.drawn("x", x.tokens, x.dim), x.drawn("up", x.hidden, x.dim, scale=x.dim**-0.5),
        x.drawn("down", x.dim, x.hidden, scale=x.hidden**-0.5), 0.5, kernel=kernel),
    "head and cross-entropy": lambda tg, x, kernel: tg.head_losses(
        x.drawn("hidden", x.tokens, x.dim), x.drawn("head", x.vocab, x.dim), x.ids(), 30.0, kernel),
    "queries, keys and values": heads_side_by_side,
    "attention without the own value": lambda tg, x, kernel: tg.remove_own_value(
        x.drawn("y", 1, x.tokens, 8, 64), x.drawn("v", 1, x.tokens, 4, 64), x.drawn("gate", 1, x.tokens, 8),
        kernel),
    "attention on kept keys": lambda tg, x, kernel: tg.attention_on_kept(
        x.drawn("q", 4, 96, 8, 64), x.drawn("k", 4, 96, 4, 64), x.drawn("v", 4, 96, 4, 64),
        x.fixed("old_k", 4, 2048, 4, 64), x.fixed("old_v", 4, 2048, 4, 64), 60, 1952, kernel),
}


class Inputs:
    """Seeded inputs of a kernel, by name: the same numbers in every dtype."""

    def __init__(self, lab: Lab, dtype):
        self.lab, self.dtype = lab, dtype
        s = lab.settings()
        self.tokens = s.train_batch_tokens // 4
        self.vocab, self.dim, self.hidden = s.vocab_size, s.model_dim, s.hidden_dim
        self.leaves: dict = {}  # what is differentiated
        self.others: dict = {}

    def generator(self, name: str):
        return self.lab.torch.Generator(self.lab.device).manual_seed(zlib.crc32(name.encode()))

    def normal(self, name: str, shape, scale: float):
        """Normal numbers that half precision has."""
        x = self.lab.torch.randn(shape, generator=self.generator(name), device=self.lab.device)
        return (scale * x).to(self.lab.half).to(self.dtype)

    def drawn(self, name: str, *shape, scale: float = 1.0):
        """An input that is differentiated; drawn once."""
        if name not in self.leaves:
            self.leaves[name] = self.normal(name, shape, scale).requires_grad_()
        return self.leaves[name]

    def fixed(self, name: str, *shape):
        """An input without a gradient; drawn once."""
        if name not in self.others:
            self.others[name] = self.normal(name, shape, 1.0)
        return self.others[name]

    def gradient(self, y):
        """One for the output y; drawn once."""
        if "dy" not in self.others:
            self.others["dy"] = self.normal("dy", y.shape, 1.0).to(y.dtype)
        return self.others["dy"]

    def ids(self):
        """A token (N,) for every row; drawn once."""
        if "ids" not in self.others:
            self.others["ids"] = self.lab.torch.randint(
                self.vocab, (self.tokens,), generator=self.generator("ids"), device=self.lab.device)
        return self.others["ids"]

    def results(self, call: Callable, kernel) -> list:
        """Output, then the gradients of all inputs."""
        y = call(self.lab.tg, self, kernel)
        leaves = list(self.leaves.values())
        gradients = self.lab.torch.autograd.grad(y, leaves, self.gradient(y))
        return [y.detach(), *gradients]


def self_tests(lab: Lab) -> None:
    """Every kernel against its plain twin, and every backend of attention."""
    lab.torch.set_float32_matmul_precision("highest")
    for name, call in TWINS.items():
        try:
            row = compare_twins(lab, call)
        except Exception as error:  # such as memory, or no Triton: the others may do
            traceback.print_exc()
            row = dict(fault=f"cannot run: {first_line(error)}")
        lab.record.row("kernels", kernel=name, **row)
    works = set()
    for name in ("plain", "torch", "fa3", "fa4"):  # last what takes longest to compile
        row = try_backend(lab, name)
        lab.record.row("attention", backend=name, **row)
        if not row["fault"]:
            works.add(name)
            # as resolve_attention does: the first of its order
            lab.record.put(auto=next(x for x in lab.tg.BACKENDS if x in works))


def distances(results: list, reference: list) -> tuple[float, float]:
    """Relative errors: of the output, and the largest of a gradient; NaN is largest."""
    errors = []
    for a, b in zip(results, reference, strict=True):
        errors.append(float((a.float() - b).norm() / b.norm()))
    return errors[0], max(errors[1:], key=lambda error: (error != error, error))


def compare_twins(lab: Lab, call: Callable) -> dict:
    """Errors of a kernel and of its twin against the twin in float32, their times, and
    the fault: an error more than three times the twin's."""
    reference = Inputs(lab, lab.torch.float32).results(call, False)
    row: dict = dict(fault="")
    errors = {}
    for prefix, kernel in (("twin_", False), ("", True)):
        inputs = Inputs(lab, lab.half)
        errors[prefix] = distances(inputs.results(call, kernel), reference)
        row[prefix + "forward"], row[prefix + "backward"] = errors[prefix]

        def run(inputs=inputs, kernel=kernel):
            inputs.results(call, kernel)

        row[prefix + "ms"] = min(lab.rounds(run, lab.often(5)))
    for way, error, bound in zip(("forward", "backward"), errors[""], errors["twin_"], strict=True):
        allowed = 3 * bound + 1e-4
        if not error <= allowed:  # NaN is none, either
            row["fault"] = f"{way} is off by {error:.2g}, allowed are {allowed:.2g}"
    return row


def try_backend(lab: Lab, name: str) -> dict:
    """Why a backend cannot run, or its time forward and backward in a step's shapes."""
    fault, seconds = lab.timed(lambda: lab.tg.attention_fault(name, lab.device))
    row = dict(fault=fault, test_seconds=seconds)
    if fault:
        return row
    try:
        row["ms"] = statistics.median(attention_times(lab, name))
    except Exception as error:
        traceback.print_exc()
        row["fault"] = f"passes its self test, fails at full size: {first_line(error)}"
    return row


def attention_times(lab: Lab, name: str) -> list[float]:
    """Milliseconds of one layer's attention, forward and backward, on a micro-batch."""
    s, x = lab.settings(), Inputs(lab, lab.half)
    batch = lab.batches(s, 1)[0]
    shape = (1, batch.x.size(1))
    q = x.drawn("q", *shape, s.num_heads, s.head_dim)
    k = x.drawn("k", *shape, s.num_kv_heads, s.head_dim)
    v = x.drawn("v", *shape, s.num_kv_heads, s.head_dim)

    def attend(tg, x, kernel):
        return tg.BACKENDS[kernel](q, k, v, batch.cu_seqlens, s.train_seq_len)

    x.results(attend, name)
    return lab.rounds(lambda: x.results(attend, name), lab.often(5))


# --- the start of a training, which several parts share


def start_training(lab: Lab):
    """(trainer, micro-batches): as a run starts; where the seconds went is recorded."""
    tg = lab.tg
    s = lab.settings(ATTN_BACKEND=lab.backend)
    reason, testing = lab.timed(lambda: tg.set_up(s, lab.world))
    model, building = lab.timed(lambda: tg.build_model(s, lab.world))
    trainer, preparing = lab.timed(lambda: tg.Trainer(s, lab.world, model))
    lab.record.put(attention=reason, startup={
        "backend": tg.ATTENTION,
        "cache": cache_state(lab),
        "imports": lab.import_seconds,
        "attention": testing,
        "initialisation": building + preparing,
    })
    return trainer, lab.batches(s, 4)


def compiled_mark(lab: Lab, name: str) -> Path:
    """A file that says: a plan's step was compiled into this cache."""
    return lab.cache / f"{lab.tg.ATTENTION}_{name.replace(' ', '_')}"


def cache_state(lab: Lab) -> str:
    """Whether compiled kernels of these steps were there before."""
    there = sum(compiled_mark(lab, name).exists() for name in PLANS)
    return {0: "fresh", len(PLANS): "reused"}.get(there, "partly reused")


def whole_step(trainer, batch, plan):
    """One step of training; its loss."""
    loss = trainer.micro_step(batch, plan)
    trainer.update(1.0, trainer.s.muon_momentum)
    return loss


def first_step(lab: Lab, trainer, batch, name: str) -> None:
    """The first step of a plan, which compiles it; its seconds are recorded."""
    plan = lab.tg.layer_plan(trainer.s, PLANS[name])
    seconds = lab.timed(lambda: whole_step(trainer, batch, plan))[1]
    lab.record.data["startup"][f"first step {name}"] = seconds
    lab.record.save()
    lab.cache.mkdir(parents=True, exist_ok=True)
    compiled_mark(lab, name).touch()


def start_up(lab: Lab) -> None:
    """Seconds to the first step, without and with loops."""
    trainer, batches = start_training(lab)
    for name in PLANS:
        first_step(lab, trainer, batches[0], name)


# --- 2 the step by kernels

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = ("product", "attention", "pointwise", "reduction", "own kernels", "other")
BY_NAME = (  # the first that is found in a kernel's name decides
    ("reduction", r"^triton_(red|per|mix|split_scan)"),
    ("product", r"^triton_tem"),
    ("pointwise", r"^triton_"),  # names of Inductor's may hold any operator's
    ("attention", r"flash|fmha|attention|sdpa"),
    ("product", r"gemm|nvjet|cutlass|cublas|splitk|gemv|dot_kernel"),
)


def kind_of(name: str, own: Sequence[str]) -> str:
    """A kernel's kind by its name; own: names of the trainer's Triton kernels."""
    if any(re.match(rf"{kernel}(\b|_\d)", name) for kernel in own):
        return "own kernels"
    lower = name.lower()
    return next((kind for kind, mark in BY_NAME if re.search(mark, lower)), "other")


def own_kernels(tg) -> list[str]:
    """Names of the trainer's own Triton kernels."""
    return [name for name in vars(tg) if name.endswith("_kernel")]


def read_trace(path: Path, categories: Sequence[str], calls: int, own: Sequence[str]) -> list[dict]:
    """Kernels of one call by a Chrome trace of several: name, kind, count, ms, most ms
    first. Raises ToolError where the trace has none."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    found: dict[str, list[float]] = {}
    for event in json.loads(text, strict=False)["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in categories:
            found.setdefault(event["name"], []).append(event["dur"] / 1e3)
    if not found:
        raise ToolError(f"the profiler saw no {categories[0]} in {calls} calls: CUPTI is missing, "
                        "or is not allowed here; times by kernel cannot be had")
    rows = []
    for name, times in found.items():
        rows.append({"name": name[:160], "kind": kind_of(name, own),
                     "count": len(times) / calls, "ms": sum(times) / calls})
    return sorted(rows, key=lambda row: -row["ms"])


def by_kind(rows: list[dict]) -> dict[str, dict]:
    """{kind: {kernels, ms}} of one call."""
    kinds: dict[str, dict] = {}
    for row in rows:
        kind = kinds.setdefault(row["kind"], {"kernels": 0.0, "ms": 0.0})
        kind["kernels"] += row["count"]
        kind["ms"] += row["ms"]
    return kinds


def profile_case(lab: Lab, case: str, run: Callable) -> None:
    """Record a case: wall time without the profiler, then its kernels by kind."""
    calls = lab.often(3)
    wall = statistics.median(lab.rounds(run, 4, calls))
    lab.record.row("cases", case=case, wall_ms=wall)
    try:
        found = profiled(lab, case, run, calls)
    except Exception as error:  # the profiler's own troubles end nothing else
        traceback.print_exc()
        found = dict(fault=first_line(error))
    lab.record.data["cases"][-1].update(found)
    lab.record.save()


def profiled(lab: Lab, case: str, run: Callable, calls: int) -> dict:
    """A case's kernels, per call; the trace is kept."""
    profiler = lab.torch.profiler
    with profiler.profile(activities=profiler.supported_activities()) as seen:
        for _ in range(calls):
            run()
        lab.sync()
    path = lab.out / f"trace_{case.replace(' ', '_')}.json.gz"
    seen.export_chrome_trace(str(path))
    categories = ("cpu_op",) if lab.rehearse else DEVICE_EVENTS
    rows = read_trace(path, categories, calls, own_kernels(lab.tg))
    return dict(trace=path.name, kernels=sum(row["count"] for row in rows),
                ms=sum(row["ms"] for row in rows), kinds=by_kind(rows), top=rows[:TOP_KERNELS])


def profiling(lab: Lab) -> None:
    """Kernels of a micro-batch's forward and backward, by plan, and of the update."""
    trainer, batches = start_training(lab)
    lab.record.put(context=mean_context(batches[1]))
    for name, looping in PLANS.items():
        drop_gradients(trainer)
        first_step(lab, trainer, batches[0], name)
        plan = lab.tg.layer_plan(trainer.s, looping)

        def forward_and_backward(plan=plan):
            drop_gradients(trainer)
            trainer.micro_step(batches[1], plan)

        profile_case(lab, name, forward_and_backward)
        if not looping:  # gradients are there: what else a step does
            profile_case(lab, "optimiser and average", lambda: repeated_update(trainer))


def drop_gradients(trainer) -> None:
    """As an update leaves them: a backward then writes, and adds nothing."""
    for p in trainer.model.parameters():
        p.grad = None


def repeated_update(trainer) -> None:
    """The optimiser's step on the gradients that are there, which it would drop."""
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    trainer.update(0.0, trainer.s.muon_momentum)
    for name, p in trainer.model.named_parameters():
        p.grad = gradients[name]


# --- 3 steps by backend


def mean_context(batch) -> float:
    """Keys that a query sees, on average."""
    lengths = batch.cu_seqlens.diff().double()
    return float((lengths * (lengths + 1)).sum() / 2 / lengths.sum())


# Dense bfloat16 FLOP/s of a GPU by its data sheet, by part of its name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40": 181e12, "RTX 4090": 165e12}


def peak_flops(lab: Lab) -> float:
    """FLOP/s of the device; 0: unknown."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in lab.world.device_name), 0.0)


def flops_per_token(s, slots: int, context: float) -> float:
    """FLOPs of one token's forward through `slots` executed layers, with attention over `context` tokens."""
    matrices = 2 * s.model_dim * (s.model_dim + s.kv_dim + s.hidden_dim)
    layers = slots * (matrices + 2 * s.model_dim * context)
    return 2 * (layers + s.vocab_size * s.model_dim)


def stepping(lab: Lab) -> None:
    """60 real training steps without and with loops, by one backend of attention."""
    fault = lab.tg.attention_fault(lab.backend, lab.device)
    if fault:
        raise NotHere(fault)
    trainer, batches = start_training(lab)
    for name in PLANS:
        first_step(lab, trainer, batches[0], name)
        lab.record.row("steps", plan=name, **time_steps(lab, trainer, batches, name))


def time_steps(lab: Lab, trainer, batches: list, name: str) -> dict:
    """Speed and memory of a plan's steps. Raises ToolError when the loss is not finite."""
    plan = lab.tg.layer_plan(trainer.s, PLANS[name])
    steps = lab.often(ROUND_STEPS)
    losses, turn = [], iter(batches * ROUNDS * steps)
    lab.forget_peak()

    def run():
        losses.append(whole_step(trainer, next(turn), plan))

    times = lab.rounds(run, ROUNDS, steps)
    loss = float(losses[-1])
    if not math.isfinite(loss):
        raise ToolError(f"the loss is {loss} after {len(losses)} steps {name}: "
                        "compare kernels and attention with their twins")
    ms = statistics.median(times)
    context = statistics.mean(mean_context(batch) for batch in batches)
    rate = trainer.tokens / ms * 1e3
    flops = 3 * flops_per_token(trainer.s, plan.slots, context)  # backward costs two forwards
    peak = peak_flops(lab)
    return dict(ms=ms, fastest=min(times), slowest=max(times), steps=len(losses),
                tokens_per_second=rate, context=context, loss=loss,
                mfu=rate * flops / peak if peak else None, gpu_gb=lab.peak_gb())


# --- 4 quantising


def quantising(lab: Lab) -> None:
    """Seconds of calibration, rounding and packing of a random model, on one GPU."""
    tg = lab.tg
    s = lab.settings(GPTQ_CALIBRATION_BATCHES=2, ATTN_BACKEND=lab.backend)
    if lab.rehearse:
        tg.SMALL_TENSOR = 1024  # else a tiny model has no matrix to round
    tg.set_up(s, lab.world)
    model = lab.random_model(s)
    turn = iter(lab.batches(s, 2))
    lab.forget_peak()
    curvature = stage(lab, "calibration, 2 micro-batches",
                      lambda: tg.calibrate(s, lab.world, model, lambda: next(turn)))
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    plain = lab.settings(QUANT_TRELLIS=0)
    rounded(lab, "column loop", plain, weights, curvature)
    q = rounded(lab, "trellis", s, weights, curvature)
    blob = stage(lab, "packing", lambda: tg.pack_model(s, q))
    lab.record.put(artifact_bytes=len(blob))
    back = stage(lab, "reading back", lambda: tg.read_artifact(s, blob, "the artifact"))
    for name, w in tg.dequantise(q).items():
        if not lab.torch.equal(back.weights[name], w):
            raise ToolError(f"{name} does not read back as it was packed: coder or decoder is wrong")


def stage(lab: Lab, name: str, run: Callable):
    """Time one stage; what it returns."""
    result, seconds = lab.timed(run)
    lab.record.row("stages", stage=name, seconds=seconds, gpu_gb=lab.peak_gb())
    return result


def rounded(lab: Lab, name: str, s, weights, curvature):
    """The quantised model, at the base step that would fill the limit."""
    tg = lab.tg
    quantiser = stage(lab, f"{name}: factors of the Hessians",
                      lambda: tg.Quantiser(s, weights, curvature, lab.world))
    room = 0.99 * tg.room_for_model(s)
    base_step = tg.base_step_for(quantiser.deviations, room, quantiser.finest)
    return stage(lab, name, lambda: quantiser(base_step))


# --- 5 test-time training


@dataclass(frozen=True)
class Form:
    """A way to score text. share: of the documents; the exact form fills a GPU with few."""

    name: str
    changes: dict
    adapts: bool = True
    share: float = 1.0


FORMS = (  # what is known first if time runs out; the suffixes share a graph
    Form("TTT_SUFFIX=72", {"TTT_SUFFIX": 72}),
    Form("TTT_SUFFIX=216", {"TTT_SUFFIX": 216}),
    Form("TTT_SUFFIX=24", {"TTT_SUFFIX": 24}),
    Form("TTT_SUFFIX=0", {"TTT_SUFFIX": 0}),
    Form("scoring only", {}, adapts=False),
    Form("exact (TTT_KV_REUSE=0)", {"TTT_KV_REUSE": 0, "TTT_BASE_SHARE": 0}, share=0.25),
)


def adapting(lab: Lab) -> None:
    """Targets a second of every form: on short documents as it is, then, which takes
    minutes the first time, compiled."""
    count, short, long = (8, 40, 60) if lab.rehearse else (64, 512, 2048)
    usual = lab.settings(ATTN_BACKEND=lab.backend)
    lab.tg.set_up(usual, lab.world)
    model = lab.random_model(usual)
    for compiling, longest in (("0", short), ("auto", long)):
        lengths = document_lengths(count, longest)
        for form in FORMS:
            s = lab.settings(COMPILE=compiling, **form.changes)
            try:
                row = time_form(lab, form, s, model, lengths[: int(form.share * count)])
            except Exception as error:  # such as memory: other forms may do
                traceback.print_exc()
                row = dict(fault=first_line(error))
            lab.record.row("forms", form=form.name, compile=compiling, longest=longest, **row)


def time_form(lab: Lab, form: Form, s, model, lengths: list[int]) -> dict:
    """Seconds of a first and of a second evaluation; targets a second of the latter."""
    tg = lab.tg
    val = tg.Validation.of(lab.text(lengths, s.vocab_size))
    everything = tg.np.arange(len(val.documents))
    lab.forget_peak()

    def evaluate():
        ttt = tg.PhasedTTT(s, lab.world, model, val)
        if form.adapts:
            return ttt.run()
        ttt.score_only(everything)
        return ttt.ledger.close(lab.world)

    first = lab.timed(evaluate)[1]
    score, seconds = lab.timed(evaluate)
    rate = score.tokens / seconds
    return dict(documents=len(lengths), targets=score.tokens, loss=score.loss,
                first_seconds=first, seconds=seconds, targets_per_second=rate,
                whole_validation_seconds=FINEWEB_TARGETS / 8 / rate, gpu_gb=lab.peak_gb())


# --- the parts


@dataclass(frozen=True)
class Part:
    """One thing to measure, in a process of its own."""

    number: int
    name: str
    share: float  # of the time that is left, against the parts that wait
    work: Callable[[Lab], None]
    backend: str = ""  # of attention; empty: the one that the self tests chose

    @property
    def stem(self) -> str:
        """Its files' name, without an ending."""
        return f"{self.number:02d}_{self.name}"


PARTS = (
    Part(1, "selftest", 2.5, self_tests),
    Part(2, "profile", 6.0, profiling),
    Part(3, "steps_fa3", 2.5, stepping, "fa3"),
    Part(3, "steps_fa4", 2.0, stepping, "fa4"),
    Part(3, "steps_torch", 2.5, stepping, "torch"),
    Part(3, "steps_plain", 1.0, stepping, "plain"),
    Part(4, "quantise", 2.0, quantising),
    Part(5, "ttt", 4.0, adapting),
    Part(6, "startup_cold", 0.5, start_up),
    Part(6, "startup_warm", 1.5, start_up),
)


def run_part(part: Part, out: Path) -> str:
    """Do a part in this process, and record it to its end; its last state."""
    machine = read_record(out / MACHINE)
    begin = time.perf_counter()
    record = Record(out / f"{part.stem}.json", part=part.name, state="running",
                    rehearsal=machine.get("rehearsal", ""), machine=machine, error="")
    state, error, lab = "done", "", None
    try:
        lab = Lab(part, record)
        part.work(lab)
    except NotHere as reason:
        state, error = "skipped", str(reason)
    except Exception as problem:
        traceback.print_exc()
        state, error = "failed", first_line(problem)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    gpu = most_gb(lab) if lab else 0.0
    record.put(state=state, error=error, seconds=time.perf_counter() - begin,
               memory={"gpu_gb": gpu, "host_gb": host})
    return state


def most_gb(lab: Lab) -> float:
    """The part's peak on the GPU: watching may have begun anew before each row."""
    peaks = [lab.peak_gb()]
    for rows in lab.record.data.values():
        if isinstance(rows, list):
            peaks += [row.get("gpu_gb", 0.0) for row in rows]
    return max(peaks)


def child() -> int:
    """Entry of a part's process: its name, and the folder."""
    name, out = sys.argv[1:3]
    part = next(part for part in PARTS if part.name == name)
    state = run_part(part, Path(out))
    sys.stdout.flush()
    sys.stderr.flush()
    # compilers' helpers may hang at the end: no time is lost to them
    os._exit(0 if state in ("done", "skipped") else 1)


# --- the command: parts one after the other


@dataclass(frozen=True)
class Day:
    """One run of the command."""

    out: Path
    parts: tuple[Part, ...]
    minutes: float
    rehearse: bool
    again: bool
    account: dict

    def file(self, part: Part, ending: str = "json") -> Path:
        return self.out / f"{part.stem}.{ending}"

    def finished(self, part: Part) -> bool:
        """Whether an earlier run, or this one, has done it."""
        return read_record(self.file(part)).get("state") == "done"

    @property
    def cache(self) -> Path:
        """Where compiled kernels are kept between parts: not among the results."""
        digest = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"gpu_day_{digest}"

    def environment(self) -> dict[str, str]:
        """Of a part's process."""
        env = dict(os.environ, GPU_DAY_CACHE=str(self.cache))
        env["TORCHINDUCTOR_CACHE_DIR"] = str(self.cache / "inductor")
        env["TRITON_CACHE_DIR"] = str(self.cache / "triton")
        env.pop("TRITON_INTERPRET", None)
        if self.rehearse:
            env.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
        return env


# In a process of its own: where a GPU takes one process at a time, this one must not
# be that one.
ASK_TORCH = """import json, torch
there = torch.cuda.is_available()
name = torch.cuda.get_device_name(0) if there else ""
print(json.dumps({"torch": torch.__version__, "device": name}))"""


def machine_facts(rehearse: bool, started: datetime) -> dict:
    """What the figures were measured on. Raises ToolError without a GPU."""
    said = said_by(sys.executable, "-c", ASK_TORCH, seconds=120)
    known = json_object(said.encode())
    if known is None:
        raise ToolError(f"{sys.executable} cannot import torch: pip install -r requirements.txt")
    if not (known["device"] or rehearse):
        raise ToolError(no_gpu(known["torch"]))
    return {
        "rehearsal": REHEARSAL if rehearse else "",
        "device": "CPU" if rehearse else known["device"],
        "torch": known["torch"],
        "driver": "no driver" if rehearse else driver_version(),
        "date": started.strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cores": os.cpu_count(),
    }


def said_by(*command: str, seconds: float = 20) -> str:
    """A command's first line of output; empty where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def driver_version() -> str:
    """Of the GPU's driver."""
    version = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f"driver {version or 'unknown'}"


def commit() -> str:
    """Of the working tree, + where files differ; without git the script's digest."""
    known = said_by("git", "describe", "--always", "--dirty=+", "--exclude=*")
    digest = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:10]
    return f"commit {known}" if known else f"no commit, train_gpt.py of SHA-256 {digest}"


def skip_reason(day: Day, part: Part) -> str:
    """Why a part need not, or cannot, run; empty if it should."""
    tests = read_record(day.out / "01_selftest.json")
    for row in tests.get("attention", []):
        if row["backend"] == part.backend and row["fault"]:
            return row["fault"]
    if part.name == "startup_cold":
        for other in PARTS:
            start = read_record(day.file(other)).get("startup", {})
            of_ours = start.get("backend") == tests.get("auto", start.get("backend"))
            complete = all(f"first step {plan}" in start for plan in PLANS)
            if start.get("cache") == "fresh" and of_ours and complete and other is not part:
                return f"{other.stem} has started on a fresh cache"
    return ""


def time_limit(day: Day, part: Part, left: float) -> float:
    """Seconds a part may take of those left: its share against all that wait."""
    waiting = part.share
    for other in day.parts[day.parts.index(part) + 1 :]:
        if (day.again or not day.finished(other)) and not skip_reason(day, other):
            waiting += other.share
    return max(left, 0.0) * part.share / waiting


def command_of(part: Part, day: Day) -> list[str]:
    """The command line of a part's process."""
    return [sys.executable, str(Path(__file__).resolve()), part.name, str(day.out.resolve())]


def launch(command: list[str], log: Path, limit: float, env: dict[str, str]) -> int | None:
    """A process's exit status; None: it was ended after `limit` seconds."""
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=env, start_new_session=True)
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=5)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass  # it has ended, or the kernel is not done with it: others can go on


def first_error(log: Path) -> str:
    """The first line of a log that speaks of an error, else the last one."""
    lines = log.read_text(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    for line in lines:
        if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|.*\b([Ff]atal|[Aa]borted)\b|error:", line):
            return line[:240]
    return lines[-1][:240] if lines else "it said nothing"


def book(day: Day, part: Part, **end) -> None:
    """Record the end of a part that does not do so itself, beside what it has found."""
    machine = read_record(day.out / MACHINE)
    head = {"part": part.name, "rehearsal": machine.get("rehearsal", ""), "machine": machine}
    Record(day.file(part), **{**head, **read_record(day.file(part)), **end})


def how_it_ended(status: int | None, seconds: float, log: Path) -> dict:
    """State and error of a part whose process could not say itself."""
    if status is None:
        return {"state": "cut", "error": f"its share of the time, {seconds:.0f} s, was over"}
    if status < 0:
        name = signal.Signals(-status).name
        return {"state": "crashed", "error": f"ended by {name}: {first_error(log)}"}
    return {"state": "failed", "error": f"ended with status {status}: {first_error(log)}"}


def do_part(day: Day, part: Part, deadline: float) -> None:
    """Run one part, or say why not."""
    reason = skip_reason(day, part)
    limit = time_limit(day, part, deadline - time.monotonic())
    if day.file(part).exists():
        day.file(part).replace(day.file(part, "earlier.json"))
    if reason:
        book(day, part, state="skipped", error=reason)
    elif limit < 1:
        book(day, part, state="cut", error="no time was left for it")
    else:
        run_process(day, part, limit)
    data = read_record(day.file(part))
    tail = f": {data['error']}" if data["error"] else ""
    print(f"{part.name}: {data['state']}, {data.get('seconds', 0):.0f} s{tail}", flush=True)


def run_process(day: Day, part: Part, limit: float) -> None:
    """A part in its process, at most `limit` seconds, with its end on record."""
    if part.name == "startup_cold":
        shutil.rmtree(day.cache, ignore_errors=True)
    begin, log = time.monotonic(), day.file(part, "log")
    try:
        status = launch(command_of(part, day), log, limit, day.environment())
    except BaseException:  # Ctrl-C, or asked to end
        book(day, part, state="cut", error="the command was ended", seconds=time.monotonic() - begin)
        raise
    seconds = time.monotonic() - begin
    if read_record(day.file(part)).get("state") in (None, "running"):
        book(day, part, seconds=seconds, **how_it_ended(status, seconds, log))


def run_day(day: Day, started: float) -> int:
    """All parts, a page after each; 0 if none failed."""
    deadline = started + 60 * day.minutes - MARGIN_SECONDS
    if not any(day.file(part).exists() for part in PARTS):
        shutil.rmtree(day.cache, ignore_errors=True)  # of an earlier folder of this name
    for part in day.parts:
        if day.finished(part) and not day.again:
            print(f"{part.name}: done before", flush=True)
            continue
        try:
            do_part(day, part, deadline)
        finally:
            write_json(day.out / MEMORY, memory_of_parts(day))
            write_page(day)
    print(f"\n{write_page(day)}\nwrote {relative(day.out / PAGE)}")
    states = [read_record(day.file(part)).get("state") for part in day.parts]
    return 0 if all(state in ("done", "skipped") for state in states) else 1


def write_page(day: Day) -> str:
    """The page, written; a fault in it is written in its place, and ends nothing."""
    try:
        text = page(day)
    except Exception:
        text = f"the page cannot be made, the JSON files are whole:\n{traceback.format_exc()}"
    write_atomic(day.out / PAGE, text + "\n")
    return text


def memory_of_parts(day: Day) -> dict:
    """{part: peak GB of GPU and host}, of the parts that came to an end."""
    machine = read_record(day.out / MACHINE)
    found = {}
    for part in PARTS:
        memory = read_record(day.file(part)).get("memory")
        if memory:
            found[part.name] = memory
    return {"rehearsal": machine.get("rehearsal", ""), "machine": machine, "parts": found}


# --- the page


def shown(value, form: str = ",.3g") -> str:
    """A number as the tables show it; nothing for none."""
    return "" if value is None else format(value, form)


def grid(head: Sequence[str], rows: list) -> str:
    """A table in Markdown; a bar in a cell would end it."""
    clean = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return table(head, clean, markdown=True)


def page(day: Day) -> str:
    """All that is known so far, as Markdown. Its first line says of what."""
    machine = read_record(day.out / MACHINE)
    facts = [machine["device"], f"torch {machine['torch']}", machine["driver"],
             machine["date"], machine["commit"]]
    mark = f"{machine['rehearsal']}: " if machine["rehearsal"] else ""
    found = {part.name: read_record(day.file(part)) for part in PARTS}
    sections = [mark + ", ".join(facts), parts_table(found, machine)]
    if mark:
        sections.insert(1, "Figures of a rehearsal mean nothing; operators within operators count twice.")
    for title, write in SECTIONS.items():
        body = write(found, day.account)
        if body:
            sections.append(f"## {mark}{title}\n\n{body}")
    return "\n\n".join(sections)


def parts_table(found: dict, machine: dict) -> str:
    """Every part: how it ended, its seconds and its memory."""
    rows = []
    for name, data in found.items():
        if not data:
            continue
        memory, note = data.get("memory", {}), data["error"]
        if data["machine"]["commit"] != machine["commit"]:
            note = f"{data['machine']['commit']} on {data['machine']['date']} {note}"
        rows.append([name, data["state"], shown(data.get("seconds"), ".1f"),
                     shown(memory.get("gpu_gb"), ".2f"), shown(memory.get("host_gb"), ".2f"),
                     note])
    return grid(["part", "end", "s", "GPU GB", "host GB", "note"], rows)


def selftest_section(found: dict, account: dict) -> str:
    """Kernels against twins; backends of attention."""
    data, rows, backends = found.get("selftest", {}), [], []
    for row in data.get("kernels", []):
        figures = [shown(row.get(key), ".2g") for key in
                   ("forward", "backward", "twin_forward", "twin_backward")]
        rows.append([row["kernel"], row["fault"] or "as its twin", *figures,
                     shown(row.get("ms")), shown(row.get("twin_ms"))])
    for row in data.get("attention", []):
        backends.append([row["backend"], row["fault"] or "runs", shown(row.get("ms")),
                         shown(row["test_seconds"], ".1f")])
    parts = []
    if rows:
        head = ["kernel", "verdict", "forward", "backward", "twin forward", "twin backward",
                "ms", "twin ms"]
        parts.append("Errors against the twin in float32; ms forward and backward.\n\n"
                     + grid(head, rows))
    if backends:
        head = ["attention", "verdict", "ms", "self test s"]
        parts.append(f"{grid(head, backends)}\n\nThe others use: {data.get('auto', 'auto')}.")
    return "\n\n".join(parts)


def modelled_kinds(case: dict) -> dict[str, dict]:
    """A case of the account by our kinds: what is neither of them is an own kernel."""
    kinds: dict[str, dict] = {}
    for name, values in case.get("kinds", {}).items():
        kind = kinds.setdefault(name if name in KINDS else "own kernels", {"kernels": 0, "ms": 0})
        kind["kernels"] += values["kernels"]
        kind["ms"] += values["ms"]
    return kinds


def kinds_table(case: dict, account: dict) -> str:
    """Measured kernels and ms by kind; beside the modelled ones where there are some."""
    model = account.get(case["case"], {})
    modelled = modelled_kinds(model)
    lines = [(kind, case["kinds"].get(kind), modelled.get(kind)) for kind in KINDS]
    lines.append(("sum", case, model or None))
    rows = []
    for name, seen, expected in lines:
        seen, expected = seen or {}, expected or {}
        if not (seen or expected):
            continue
        row = [name, shown(seen.get("kernels"), ",.0f"), shown(seen.get("ms"), ",.3f")]
        if model:
            both = seen.get("ms") and expected.get("ms")
            ratio = seen["ms"] / expected["ms"] if both else None
            row += [shown(expected.get("kernels"), ",.0f"), shown(expected.get("ms"), ",.3f"),
                    shown(ratio, ".2f")]
        rows.append(row)
    head = ["kind", "kernels", "measured ms"]
    return grid(head + ["modelled kernels", "modelled ms", "ratio"] if model else head, rows)


def profile_section(found: dict, account: dict) -> str:
    """Each case by kind, then its longest kernels."""
    parts = []
    for case in found.get("profile", {}).get("cases", []):
        if "kinds" not in case:
            parts.append(f"### {case['case']}: {case['wall_ms']:,.2f} ms\n\n"
                         f"{case.get('fault', 'It was cut before its kernels were counted.')}")
            continue
        rows = []
        for row in case["top"]:
            rows.append([row["name"][:100], row["kind"], shown(row["count"], ",.1f"),
                         shown(row["ms"], ",.3f"), shown(row["ms"] / case["ms"], ".1%")])
        idle = case["wall_ms"] - case["ms"]
        parts.append(f"### {case['case']}: {case['wall_ms']:,.2f} ms, of them {idle:,.2f} "
                     f"without a kernel\n\n{kinds_table(case, account)}\n\n"
                     + grid(["kernel", "kind", "count", "ms", "share"], rows))
    if parts:
        keys = found.get("profile", {}).get("context", 0)
        parts.insert(0, "Forward and backward of one micro-batch, per call; the trainer's update "
                     f"apart. A query sees {keys:,.0f} keys; the account counts on 480.")
    return "\n\n".join(parts)


def steps_section(found: dict, account: dict) -> str:
    """Speed of the training step by backend and plan."""
    rows = []
    for backend in BACKENDS:
        for row in found.get(f"steps_{backend}", {}).get("steps", []):
            rows.append([backend, row["plan"], row["steps"], shown(row["ms"], ",.2f"),
                         shown(row["fastest"], ",.2f"), shown(row["slowest"], ",.2f"),
                         shown(row["tokens_per_second"], ",.0f"), shown(row["mfu"], ".1%"),
                         shown(row["gpu_gb"], ".2f"), shown(row["context"], ",.0f")])
    head = ["attention", "plan", "steps", "ms", "fastest", "slowest", "tokens/s", "MFU",
            "GPU GB", "keys a query"]
    if not rows:
        return ""
    return ("Medians over rounds of steps of one micro-batch, the whole optimiser on one device."
            f"\n\n{grid(head, rows)}")


def quantise_section(found: dict, account: dict) -> str:
    """Seconds by stage."""
    data, rows = found.get("quantise", {}), []
    for row in data.get("stages", []):
        rows.append([row["stage"], shown(row["seconds"], ".2f"), shown(row["gpu_gb"], ".2f")])
    if not rows:
        return ""
    size = data.get("artifact_bytes")
    return (grid(["stage", "s", "GPU GB"], rows)
            + f"\n\nArtifact of a random model: {shown(size, ',') or 'not reached'} bytes.")


def ttt_section(found: dict, account: dict) -> str:
    """Targets a second by form."""
    rows = []
    for row in found.get("ttt", {}).get("forms", []):
        form = "as it is" if row["compile"] == "0" else "compiled"
        rows.append([row["form"], form, row.get("fault", ""), row.get("documents", ""), row["longest"],
                     shown(row.get("targets_per_second"), ",.0f"),
                     shown(row.get("first_seconds"), ".1f"), shown(row.get("seconds"), ".2f"),
                     shown(row.get("whole_validation_seconds"), ",.0f"),
                     shown(row.get("gpu_gb"), ".2f")])
    if not rows:
        return ""
    head = ["form", "way", "fault", "documents", "longest", "targets/s", "first s", "second s",
            "8 ranks, s", "GPU GB"]
    return (f"8 ranks, s: {FINEWEB_TARGETS:,} targets at eight times this speed, an estimate; "
            f"phases on the base weights are not in it.\n\n{grid(head, rows)}")


def startup_section(found: dict, account: dict) -> str:
    """Seconds to the first step of every part that trains."""
    rows = []
    for name, data in found.items():
        start = data.get("startup")
        if not start:
            continue
        keys = ("imports", "attention", "initialisation", *(f"first step {plan}" for plan in PLANS))
        seconds = [start.get(key) for key in keys]
        first = sum(seconds[:4]) if None not in seconds[:4] else None
        rows.append([name, start["cache"], *(shown(x, ".1f") for x in seconds), shown(first, ".1f")])
    head = ["part", "cache", "imports", "set-up, attention's test", "initialisation",
            *(f"first step {plan}" for plan in PLANS), "sum to the first step"]
    return f"Seconds.\n\n{grid(head, rows)}" if rows else ""


SECTIONS: dict[str, Callable[[dict, dict], str]] = {
    "Self tests": selftest_section,
    "The training step by kernels": profile_section,
    "Training steps": steps_section,
    "Quantising": quantise_section,
    "Test-time training": ttt_section,
    "Start-up": startup_section,
}


# --- the command line


def read_account(path: str) -> dict:
    """{case: {kernels, ms, kinds}} of a JSON that tools/account.py wrote, or ToolError."""
    try:
        data = json_object(Path(path).read_bytes()) or {}
        cases = data["cases"]
        for case in cases.values():
            float(case["kernels"] + case["ms"])
            modelled_kinds(case)
        return cases
    except OSError as error:
        raise ToolError(f"--account {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ToolError(f"--account {path} has no cases with kernels, ms and kinds ({first_line(error)}): "
                        "give the JSON that tools/account.py wrote") from None


def chosen_parts(words: Sequence[str]) -> tuple[Part, ...]:
    """The parts whose names begin with one of the words; all without words."""
    for word in words:
        if not any(part.name.startswith(word) for part in PARTS):
            names = ", ".join(part.name for part in PARTS)
            raise ToolError(f"--only {word} is no part: choose from {names}, or their beginnings")
    return tuple(part for part in PARTS if not words or part.name.startswith(tuple(words)))


def parse(arguments) -> Day:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER",
        help="folder of the results (default: runs/gpu_day, or runs/gpu_day_rehearsal)")
    add("--minutes", type=float, default=8, help="time for everything (default 8)")
    add("--only", nargs="+", default=[], metavar="PART", help="some parts, or their beginnings")
    add("--again", action="store_true", help="also parts that are done")
    add("--account", metavar="FILE", help="a JSON of tools/account.py to set beside")
    add("--rehearse", action="store_true", help="every part, tiny, on the CPU")
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        raise ToolError(f"--minutes {args.minutes:g} must be above 0")
    usual = "runs/gpu_day_rehearsal" if args.rehearse else "runs/gpu_day"
    account = read_account(args.account) if args.account else {}
    return Day(Path(args.out or usual), chosen_parts(args.only), args.minutes, args.rehearse,
               args.again, account)


def check_same_kind(day: Day) -> None:
    """Refuse to mix a rehearsal with measurements."""
    earlier = read_record(day.out / MACHINE)
    if earlier and bool(earlier.get("rehearsal")) != day.rehearse:
        what = "a rehearsal" if earlier.get("rehearsal") else "measurements of a GPU"
        raise ToolError(f"{relative(day.out)} holds {what}: choose another --out")


def main(arguments=None) -> int:
    """Entry of `python tools/bench.py --gpu`."""
    started, now = time.monotonic(), datetime.now(timezone.utc)
    day = parse(arguments)
    check_same_kind(day)
    machine = machine_facts(day.rehearse, now)
    write_json(day.out / MACHINE, machine)
    # asked to end, it ends the part that runs, too
    usual = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run_day(day, started)
    finally:
        signal.signal(signal.SIGTERM, usual)


if __name__ == "__main__":
    run_cli(child)
