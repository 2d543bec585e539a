"""How much faster is each fast road than its plain twin? Ratios from one run, on a CPU
or a GPU.

    python tools/bench.py                          # every group
    python tools/bench.py ngram gptq    # some: attention, ce, mlp, step, gptq, pack, ttt, ngram, caseops
    python tools/bench.py --rounds 9 --json bench.json
    python tools/bench.py --account --size full    # counted FLOPs, bytes, floors; measured too on a GPU
    python tools/bench.py --coders runs/NAME/final_model.int6.ptz    # bytes and seconds of five coders

Within a group the contenders take turns, round after round, so that a machine that
slows down slows all of them; the ratio is the median over rounds of (reference time /
contender time): 2.0 means twice as fast. Only ratios of one run mean something;
milliseconds of two machines, or of a busy one, do not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

if __package__ in (None, ""):  # run as a script: make `tools` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.account import account
from tools.common import (
    ROOT,
    ToolError,
    as_environment,
    command_line,
    load_run,
    relative,
    run_cli,
    table,
    write_atomic,
)

SMALL = dict(NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2, VOCAB_SIZE=512,
             LOOP_START=1, LOOP_END=2, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4,
             TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=256, EVAL_SEQ_LEN=256, EVAL_STRIDE=64,
             TTT_EVAL_SEQ_LEN=256, TTT_BATCH_SIZE=4, TTT_CHUNK_SIZE=64, TTT_LORA_RANK=8, TTT_LORA_ALPHA=16,
             VAL_BATCH_TOKENS=8192, GPTQ_CALIBRATION_BATCHES=2, PHASED_TTT_PREFIX_DOCS=0)
FULL = dict(TRAIN_BATCH_TOKENS=98304, PHASED_TTT_PREFIX_DOCS=0)  # one micro-batch of the competition's run


@dataclass(frozen=True)
class Row:
    """One contender's result."""

    group: str
    name: str
    ms: float
    ratio: float
    low: float
    high: float
    note: str = ""


class Bench:
    """The trainer's module, the device, and settings of a size that suits it."""

    def __init__(self, rounds: int, small: bool | None):
        sys.path.insert(0, str(ROOT))
        import torch

        import train_gpt

        self.torch, self.tg, self.rounds = torch, train_gpt, rounds
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.small = not self.cuda if small is None else small
        self.world = train_gpt.World(device=self.device)
        self.half = torch.bfloat16 if self.cuda else torch.float32
        self.settings = self.with_settings()
        train_gpt.ATTENTION = train_gpt.resolve_attention("auto", self.device)[0]
        torch.manual_seed(0)

    def with_settings(self, **changes):
        """Settings of the chosen size, free of the caller's environment."""
        base = {"CASEOPS_ENABLED": 0, "GRAD_ACCUM_STEPS": 1, **(SMALL if self.small else FULL), **changes}
        return self.tg.Settings.from_env({k: str(v) for k, v in base.items()})

    def random(self, *shape, grad=False):
        """Normal numbers in the activations' dtype."""
        return self.torch.randn(*shape, device=self.device, dtype=self.half).requires_grad_(grad)

    def model(self, s):
        """A seeded model on the device."""
        return self.tg.build_model(s, self.world)

    def once(self, run: Callable) -> float:
        """Milliseconds of one call, the GPU drained before and after."""
        self.tg.sync(self.device)
        begin = time.perf_counter()
        run()
        self.tg.sync(self.device)
        return 1e3 * (time.perf_counter() - begin)

    def race(self, group: str, contenders: dict[str, Callable], notes=None) -> list[Row]:
        """Time all contenders in turns; the first is the reference. One that cannot run
        says why."""
        rows, ready = [], {}
        for name, run in contenders.items():
            try:
                run()  # compiles, allocates, and shows whether it can run
                ready[name] = run
            except Exception as error:
                rows.append(Row(group, name, float("nan"), float("nan"), float("nan"), float("nan"),
                                f"cannot run: {type(error).__name__}: {str(error).splitlines()[0][:80]}"))
        times: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(self.rounds):
            order = list(ready) if turn % 2 == 0 else list(ready)[::-1]
            for name in order:
                times[name].append(self.once(ready[name]))
        for i, name in enumerate(times):
            reference = next(iter(times.values()))
            ratios = sorted(a / b for a, b in zip(reference, times[name], strict=False))
            note = (notes or {}).get(name, "reference" if i == 0 else "")
            rows.append(Row(group, name, statistics.median(times[name]), statistics.median(ratios), ratios[0],
                            ratios[-1], note() if callable(note) else note))
        return rows


# --- the groups


def attention(b: Bench) -> list[Row]:
    """Every backend that runs here, forward and backward on packed documents."""
    total, longest = (1024, 256) if b.small else (16384, 2048)
    q, k, v = b.random(1, total, 8, 64, grad=True), *(b.random(1, total, 4, 64, grad=True) for _ in range(2))
    cuts = b.torch.arange(0, total + 1, longest // 2, dtype=b.torch.int32, device=b.device)
    dy = b.random(1, total, 8, 64)

    def run(backend):
        b.torch.autograd.grad(backend(q, k, v, cuts, longest), (q, k, v), dy)

    contenders, skipped = {}, []
    for name in sorted(b.tg.BACKENDS, key=lambda n: n != "plain"):
        fault = b.tg.attention_fault(name, b.device)
        if fault:
            skipped.append(Row("attention", name, *[float("nan")] * 4, f"not here: {fault[:90]}"))
        else:
            contenders[name] = lambda f=b.tg.BACKENDS[name]: run(f)
    return b.race("attention", contenders) + skipped


def twins(b: Bench, group: str, call: Callable, leaves) -> list[Row]:
    """A fused kernel and its plain twin, forward and backward."""

    def run(kernel):
        b.torch.autograd.grad(call(kernel).float().sum(), leaves)

    contenders = {"plain twin": lambda: run(False)}
    if b.cuda and b.tg.triton is not None:
        contenders["fused kernel"] = lambda: run(True)
    rows = b.race(group, contenders)
    return (rows if len(contenders) > 1 else rows + [Row(group, "fused kernel", *[float("nan")] * 4,
                                                         "not here: it needs a CUDA GPU and triton")])


def ce(b: Bench) -> list[Row]:
    """Softcapped cross-entropy."""
    n, vocab = (1024, 512) if b.small else (32768, 8192)
    logits = b.random(n, vocab, grad=True)
    targets = b.torch.randint(vocab, (n,), device=b.device)
    return twins(b, "cross-entropy", lambda kernel: b.tg.capped_ce(logits, targets, 30.0, kernel), (logits,))


def mlp(b: Bench) -> list[Row]:
    """The leaky-ReLU² MLP."""
    n, d, m = (1024, 128, 256) if b.small else (65536, 512, 2048)
    x, up, down = b.random(n, d, grad=True), b.random(m, d, grad=True), b.random(d, m, grad=True)
    return twins(b, "MLP", lambda kernel: b.tg.leaky_square_mlp(x, up, down, 0.5, kernel), (x, up, down))


def step(b: Bench) -> list[Row]:
    """The train step of one micro-batch: forward, backward, optimiser, average; with
    and without loops."""
    contenders = {}
    for label, compile_it in (("", "0"), (", compiled", "1")):
        if compile_it == "1" and not b.cuda:
            continue
        s = b.with_settings(COMPILE=compile_it)
        trainer = b.tg.Trainer(s, b.world, b.model(s))
        batch = trainer.random_batch(b.torch.Generator().manual_seed(0))
        for looping in (True, False):
            plan = b.tg.layer_plan(s, looping)

            def run(trainer=trainer, batch=batch, plan=plan):
                trainer.micro_step(batch, plan)
                trainer.update(0.0, 0.9)

            contenders[("with loops" if looping else "without loops") + label] = run
    return b.race("train step", contenders)


def column_loop(torch, w, h, scale, top: int, block: int = 128):
    """GPTQ as its paper's code has it: one matrix, column by column, through an
    explicit inverse of H."""
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order].clone(), h[order][:, order].clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    for begin in range(0, w.size(1), block):
        end = min(begin + block, w.size(1))
        error = torch.empty_like(w[:, begin:end])
        for j in range(begin, end):
            codes[:, j] = (w[:, j] / scale).round().clamp(-top, top)
            error[:, j - begin] = (w[:, j] - codes[:, j] * scale) / u[j, j]
            w[:, j:end] -= error[:, j - begin, None] * u[j, j:end]
        w[:, end:] -= error @ u[begin:end, end:]
    return codes[:, order.argsort()].to(torch.int8)


def gptq(b: Bench) -> list[Row]:
    """Rounding with Hessians: the usual column loop, one matrix at a time, equal shapes
    as one batch, and the trellis, whose columns are rounded along eight paths."""
    count, rows, columns = (4, 128, 128) if b.small else (8, 512, 2048)
    w = b.torch.randn(count, rows, columns, device=b.device)
    x = b.torch.randn(count, 2 * columns, columns, device=b.device)
    h, scale = x.mT @ x / x.size(1), b.tg.row_scales(w, 6, 12.85)

    def rounded(w, h, scale, trellis=False):
        order, u, dead, _ = b.tg.hessian_factor(h, falling=not trellis)
        top = b.tg.TOP_CODE if trellis else 31
        return b.tg.round_in_order(w, scale.float(), order, u, dead, top, trellis)

    return b.race("GPTQ", {
        "column loop": lambda: [column_loop(b.torch, w[i], h[i], scale[i].float(), 31) for i in range(count)],
        "one by one": lambda: [rounded(w[i:i + 1], h[i:i + 1], scale[i:i + 1]) for i in range(count)],
        "batched": lambda: rounded(w, h, scale), "trellis": lambda: rounded(w, h, scale, trellis=True)})


def pack(b: Bench) -> list[Row]:
    """Packing Gaussian codes by our coder and by brotli, and reading them back."""
    import brotli

    shapes = [(512, 128)] * 4 if b.small else [(512, 512)] * 22 + [(2048, 512), (512, 2048)] * 11
    codes = [(2.4 * b.torch.randn(shape, generator=b.torch.Generator().manual_seed(i))).round().to(
        b.torch.int8).numpy() for i, shape in enumerate(shapes)]
    predicted, raw = [(0 * c[:, 0].astype(int), 0 * c[0].astype(int)) for c in codes], b"".join(
        c.tobytes() for c in codes)
    streams, tall = b.tg.pack_codes(codes, predicted)
    blob = brotli.compress(raw, quality=11, lgwin=24)
    notes = {f"{what}, {name}": f"{size:,} bytes" for what in ("pack", "unpack")
             for name, size in (("brotli", len(blob)), ("ours", sum(map(len, streams.values()))))}
    return (b.race("packing", {"pack, brotli": lambda: brotli.compress(raw, quality=11, lgwin=24),
                               "pack, ours": lambda: b.tg.pack_codes(codes, predicted)}, notes)
            + b.race("packing", {"unpack, brotli": lambda: brotli.decompress(blob),
                                 "unpack, ours": lambda: b.tg.unpack_codes(streams, tall, predicted)}, notes))


def ttt(b: Bench) -> list[Row]:
    """Evaluation of a few documents: one pass, sliding windows, and score-first adaptation."""
    import numpy as np

    with tempfile.TemporaryDirectory() as temp:
        folder, count, length = Path(temp), *((4, 600) if b.small else (64, 800))
        s = b.with_settings(DATA_PATH=folder, **({} if b.small else {"COMPILE": 0}))
        rng = np.random.default_rng(0)
        tokens = np.concatenate([np.append(b.tg.BOS, rng.integers(4, s.vocab_size, length))
                                 for _ in range(count)])
        for name, values in (("val", tokens), ("val_bytes", np.where(tokens == b.tg.BOS, 0, 3))):
            header = np.zeros(b.tg.SHARD_HEADER, "<i4")
            header[:3] = b.tg.SHARD_MAGIC, b.tg.SHARD_VERSION, len(values)
            (folder / f"fineweb_{name}_000000.bin").write_bytes(header.tobytes() + values.astype(
                "<u2").tobytes())
        val = b.tg.Validation(s)
        model = b.model(s)
        scorer = b.tg.Scorer(s, b.world, model)
        return b.race("evaluation", {"one pass": lambda: scorer.windows(val, s.eval_seq_len),
                                     "sliding windows": lambda: scorer.windows(val, s.eval_stride),
                                     "test-time training": lambda: b.tg.PhasedTTT(
                                         s, b.world, model, val).run()},
                      {name: f"{len(tokens):,} tokens"
                       for name in ("one pass", "sliding windows", "test-time training")})


FINEWEB_TARGETS = 47_851_520      # of the validation split, about


def ngram(b: Bench) -> list[Row]:
    """Hints of the token expert by sorting against a dictionary; at full size also all
    of a stream as long as FineWeb's validation split, by which the evaluation's clock
    is charged."""
    import numpy as np

    s = b.with_settings(NGRAM_TILT_ENABLED=1, VOCAB_SIZE=8192)

    def stream(n: int):
        """Zipf's law, three tokens in a hundred in passages that were there before."""
        tokens = np.minimum(np.random.default_rng(0).zipf(1.2, n), 8191).astype(np.uint16)
        for begin in range(n // 2, n - 60, 1000):
            tokens[begin:begin + 60] = tokens[begin - n // 2:begin - n // 2 + 60]
        return tokens

    tokens = stream(50_000 if b.small else 1_000_000)
    sample = {"dictionary, token after token": lambda: hints_by_dictionary(tokens.tolist(), s.token_order),
              "sorted": lambda: b.tg.ngram_experts(s, tokens)}
    rows = b.race("n-gram hints", sample, {"sorted": f"{len(tokens):,} positions"})
    if not b.small:
        whole = stream(FINEWEB_TARGETS + 1)
        whole[::957] = b.tg.BOS      # about 50,000 documents
        val = b.tg.Validation.of(whole)
        ms = b.once(lambda: b.tg.Hints.build(s, b.world, val, False))
        rows.append(Row("n-gram hints", "the whole stream", ms, float("nan"), float("nan"), float("nan"),
                        f"{FINEWEB_TARGETS:,} positions, {os.cpu_count()} cores"))
    return rows


def hints_by_dictionary(tokens: list[int], order: int) -> list[int]:
    """The token that followed each context of order - 1 tokens most often so far: what
    sorting replaces."""
    tables: dict[tuple, dict[int, int]] = {}
    best: dict[tuple, int] = {}
    hints = []
    for i in range(order - 1, len(tokens)):
        context, token = tuple(tokens[i - order + 1:i]), tokens[i]
        hints.append(best.get(context, -1))
        counts = tables.setdefault(context, {})
        counts[token] = counts.get(token, 0) + 1
        if counts[token] > counts.get(hints[-1], 0):
            best[context] = token
    return hints


def caseops(b: Bench) -> list[Row]:
    """The lossless case transform against a loop over characters, both ways, document
    by document."""
    from pydoc_data.topics import topics

    from data import caseops

    texts = [topics[name] for name in sorted(topics)][:: 4 if b.small else 1]
    encoded = [caseops.encode(text) for text in texts]
    if [encode_by_character(text) for text in texts] != encoded:
        raise ToolError("caseops.encode and the loop over characters differ: one of them is wrong")
    size = sum(map(len, texts)) / len(texts)
    rows = []
    for way, loop, fast, given in (("encode", encode_by_character, caseops.encode, texts),
                                   ("decode", caseops._decode_spelled_out, caseops.decode, encoded)):
        contenders = {f"{way}, by character": lambda loop=loop, given=given: list(map(loop, given)),
                      f"{way}, arrays": lambda fast=fast, given=given: list(map(fast, given))}
        note = f"{len(texts)} English documents, {size:,.0f} characters on average"
        rows += b.race("CaseOps", contenders, {f"{way}, arrays": note})
    return rows


def encode_by_character(text: str) -> str:
    """CaseOps as a plain loop over characters: what `caseops.encode` is measured against."""
    out, i, n = [], 0, len(text)
    while i < n:
        if not ("a" <= text[i] <= "z" or "A" <= text[i] <= "Z"):
            out.append("\ue004" + text[i] if "\ue001" <= text[i] <= "\ue004" else text[i])
            i += 1
            continue
        end, capitals = i, 0
        while end < n and ("a" <= text[end] <= "z" or "A" <= text[end] <= "Z"):
            capitals += text[end] <= "Z"
            end += 1
        whole = capitals == end - i > 1
        if whole:
            out.append("\ue002")
        for k in range(i, end):
            if text[k] > "Z":
                out.append(text[k])
            else:
                out.append(("" if whole else "\ue003" if k > i else "\ue001") + text[k].lower())
        i = end
    return "".join(out)


def codes_of(b: Bench, source: str):
    """Codes to compare coders on, their names, and what coder and decoder know of them:
    an artifact's; those of a run's final_model.pt at the hand clips, by GPTQ on the
    training shards that DATA_PATH names, matrices above 4,096 elements; or `full`:
    Gaussian weights of full size, columns log-normal at 0.25 octave."""
    tg, torch = b.tg, b.torch
    if source == "full":
        s, rng = tg.Settings.from_env({"QUANT_ALLOCATION": "hand"}), torch.Generator().manual_seed(0)
        shapes = {n: torch.empty(shape, device="meta") for n, shape in tg.parameter_shapes(s).items()}
        weights = {n: torch.randn(w.shape, generator=rng) for n, w in tg.matrix_views(shapes).items()}
        for w in weights.values():
            w *= (0.25 * torch.randn(w.shape[-1:], generator=rng)).exp2()
        q = tg.Quantiser(s, weights, tg.Curvature({}))()
    else:
        paths = {k: os.environ[k] for k in ("DATA_PATH", "TOKENIZER_PATH") if k in os.environ}
        env = {**as_environment(load_run(Path(source).parent).summary["settings"]), **paths}
        if source.endswith(".ptz"):
            q = tg.read_artifact(tg.Settings.from_env(env), Path(source).read_bytes(), relative(source)).model
        else:
            s, tg.SMALL_TENSOR = tg.Settings.from_env({**env, "QUANT_ALLOCATION": "hand"}), 4096
            model = tg.build_model(s, b.world)
            tg.read_weights(source, model)
            stream = tg.open_train_stream(s, b.world, s.batch_shape(1)[1])
            curvature = tg.calibrate(s, b.world, model, stream.next)
            weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
            q = tg.Quantiser(s, weights, curvature)()
    shapes = {k[:-2]: tuple(t.shape) for k, t in q.tensors.items() if k.endswith(".q")}
    return {n: q.tensors[n + ".q"].numpy() for n in shapes}, *tg.coding_plan(q, shapes)


def lrzip(files: dict[str, bytes]) -> tuple[int, float, float]:
    """(bytes, seconds to pack, to unpack) of lrzip -z -L9, a file for each group, one
    after the other."""
    size = packing = unpacking = 0
    with tempfile.TemporaryDirectory() as temp:
        path, packed = Path(temp) / "codes", Path(temp) / "codes.lrz"
        for data in files.values():
            path.write_bytes(data)
            begin = time.perf_counter()
            command = ["lrzip", "-q", "-z", "-L9", "-N0", "-f", str(path)]
            subprocess.run(command, check=True, capture_output=True)
            packing, size = packing + time.perf_counter() - begin, size + packed.stat().st_size
            path.unlink()
            begin = time.perf_counter()
            subprocess.run(["lrzip", "-q", "-d", "-N0", str(packed)], check=True, capture_output=True)
            unpacking += time.perf_counter() - begin
            if path.read_bytes() != data:
                raise ToolError("lrzip did not give back what it was given")
            packed.unlink()
    return size, packing, unpacking


def coders(b: Bench, source: str) -> str:
    """The same codes by five coders, as Markdown: bytes, seconds to encode and decode;
    all are read back."""
    import lzma

    import brotli

    tg, (codes, predicted, trellis) = b.tg, codes_of(b, source)
    raw, rows, groups = b"".join(c.tobytes() for c in codes.values()), [], {}
    for name, c in codes.items():
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        groups[kind] = groups.get(kind, b"") + c.tobytes()
    plain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    general = {"brotli-11": (lambda: brotli.compress(raw, quality=11, lgwin=24), brotli.decompress),
               "byte-shuffled brotli-11": (lambda: tg.brotli_pack(raw, 2),
                                           lambda blob: tg.brotli_unpack(blob, len(raw), 2)),
               "lzma -9e, lc=lp=pb=0": (lambda: lzma.compress(raw, lzma.FORMAT_RAW, filters=plain),
                                        lambda blob: lzma.decompress(blob, lzma.FORMAT_RAW, filters=plain))}
    for name, (pack, unpack) in general.items():
        times = [time.perf_counter()]
        blob = pack()
        times.append(time.perf_counter())
        if unpack(blob) != raw:
            raise ToolError(f"{name} did not give back what it was given")
        rows.append([name, len(blob), times[1] - times[0], time.perf_counter() - times[1]])
    if shutil.which("lrzip"):
        rows.append(["lrzip -z -L9 per group", *lrzip(groups)])
    times = [time.perf_counter()]
    streams, tall = tg.pack_codes(list(codes.values()), predicted, trellis)
    times.append(time.perf_counter())
    back = tg.unpack_codes(streams, tall, predicted, trellis)
    rows.append(["ours, side bytes counted", sum(map(len, streams.values())), times[1] - times[0],
                 time.perf_counter() - times[1]])
    if b"".join(c.tobytes() for c in back) != raw:
        raise ToolError("our coder did not give back what it was given")
    ours, note = rows[-1][1], "" if shutil.which("lrzip") else "\n\nlrzip is not on this machine: no row."
    lines = [["coder", "bytes", "ours / its", "encode s", "decode s"], ["---"] * 5]
    lines += [[name, f"{size:,}", f"{ours / size:.4f}", f"{a:.2f}", f"{z:.2f}"] for name, size, a, z in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{len(raw):,} codes of {relative(source)}\n\n{text}{note}"


GROUPS: dict[str, Callable[[Bench], list[Row]]] = {"attention": attention, "ce": ce, "mlp": mlp, "step": step,
                                                   "gptq": gptq, "pack": pack, "ttt": ttt, "ngram": ngram,
                                                   "caseops": caseops}


def show(rows: list[Row]) -> str:
    """The table; what did not run has no figures."""

    def figure(value, form):
        return "" if value != value else format(value, form)

    return table(["group", "contender", "ms", "ratio", "lowest", "highest", "note"],
                 [[r.group, r.name, figure(r.ms, ".3g"), figure(r.ratio, ".2f"), figure(r.low, ".2f"),
                   figure(r.high, ".2f"), r.note] for r in rows])


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP",
                        help=f"any of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="times each contender runs (default 7)")
    parser.add_argument("--size", choices=("auto", "small", "full"), default="auto",
                        help="auto: full on a GPU")
    parser.add_argument("--account", action="store_true",
                        help="FLOPs, bytes and floors of every operator group instead")
    parser.add_argument("--coders", metavar="FILE",
                        help="five coders on the codes of an artifact, a final_model.pt, or `full`")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(arguments)
    unknown = [g for g in args.groups if g not in GROUPS]
    if unknown:
        raise ToolError(f"unknown group {unknown[0]}: choose from {', '.join(GROUPS)}")
    if args.rounds < 1:
        raise ToolError(f"--rounds {args.rounds} must be at least 1")
    if args.coders and args.coders != "full" and not Path(args.coders).is_file():
        raise ToolError(f"--coders {args.coders} is no file: give an artifact, a final_model.pt, or full")
    b = Bench(args.rounds, {"auto": None, "small": True, "full": False}[args.size])
    where = b.torch.cuda.get_device_name(0) if b.cuda else f"CPU, {b.torch.get_num_threads()} threads"
    print(
        f"{where}, torch {b.torch.__version__}, {'small' if b.small else 'full'} size, {args.rounds} rounds",
        flush=True)
    if args.coders:
        print(coders(b, args.coders))
        return 0
    if args.account:
        print(account(b, counts_only=not (b.cuda or b.small)))
        return 0
    rows = [row for name in args.groups or GROUPS for row in GROUPS[name](b)]
    print(show(rows))
    if args.json:
        clean = [{k: None if v != v else v for k, v in asdict(r).items()} for r in rows]
        write_atomic(Path(args.json), json.dumps({"device": where, "torch": b.torch.__version__,
                                                  "rounds": args.rounds, "size": "small" if b.small
                                                  else "full", "rows": clean}, indent=1) + "\n")
        print(f"wrote {relative(args.json)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
