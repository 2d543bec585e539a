"""How much faster is each fast road than its plain twin? Ratios from one run, CPU or GPU.

    python tools/bench.py                          # every group
    python tools/bench.py ngram gptq               # some of them
    python tools/bench.py --rounds 9 --json bench.json
    python tools/bench.py --gpu --help             # the day a GPU is there: tools/gpu_day.py
    # bytes and seconds of five coders:
    python tools/bench.py --coders runs/NAME/final_model.int6.ptz

Within a group the contenders take turns, round after round, so that a machine that
slows down slows all of them; the ratio is the median over rounds of (reference time /
contender time): 2.0 means twice as fast. Only ratios of one run mean something;
milliseconds of two machines, or of a busy one, do not.
"""

from __future__ import annotations

import argparse
import functools
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

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

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
    write_shard,
)

NAN = float("nan")
SMALL = dict(
    NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2, VOCAB_SIZE=512,
    LOOP_START=1, LOOP_END=2, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4,
    TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=256, VAL_BATCH_TOKENS=8192,
    EVAL_SEQ_LEN=256, EVAL_STRIDE=64, GPTQ_CALIBRATION_BATCHES=2,
    TTT_EVAL_SEQ_LEN=256, TTT_BATCH_SIZE=4, TTT_CHUNK_SIZE=64, TTT_LORA_RANK=8,
    TTT_LORA_ALPHA=16, PHASED_TTT_PREFIX_DOCS=0,
)
FULL = dict(  # one micro-batch of the competition's run
    TRAIN_BATCH_TOKENS=98304, PHASED_TTT_PREFIX_DOCS=0,
)
FINEWEB_TARGETS = 47_851_520  # of the validation split, about


@dataclass(frozen=True)
class Row:
    """One contender's result; without figures it did not run, and `note` says why."""

    group: str
    name: str
    ms: float = NAN
    ratio: float = NAN
    low: float = NAN
    high: float = NAN
    note: str = ""


class Bench:
    """The trainer's module, the device, and settings of a size that suits it."""

    def __init__(self, rounds: int, small: bool | None):
        sys.path.insert(0, str(ROOT))
        import torch

        import train_gpt

        self.torch = torch
        self.tg = train_gpt
        self.rounds = rounds
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.small = not self.cuda if small is None else small
        self.world = train_gpt.World(device=self.device)
        self.half = torch.bfloat16 if self.cuda else torch.float32
        self.settings = self.with_settings()
        try:
            train_gpt.ATTENTION = train_gpt.resolve_attention("auto", self.device)[0]
        except train_gpt.UserError as error:
            raise ToolError(str(error)) from error
        torch.manual_seed(0)

    def with_settings(self, **changes):
        """Settings of the chosen size, free of the caller's environment."""
        size = SMALL if self.small else FULL
        values = {"CASEOPS_ENABLED": 0, "GRAD_ACCUM_STEPS": 1, **size, **changes}
        return self.tg.Settings.from_env({k: str(v) for k, v in values.items()})

    def random(self, *shape, grad=False):
        """Normal numbers in the activations' dtype."""
        x = self.torch.randn(*shape, device=self.device, dtype=self.half)
        return x.requires_grad_(grad)

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
        """Time all contenders in turns; the first is the reference.

        One that cannot run has a row without figures. notes: {contender: text}.
        """
        notes = notes or {}
        rows = []
        times: dict[str, list[float]] = {}
        for name, run in contenders.items():
            try:
                run()  # compiles, allocates, and shows whether it can run
                times[name] = []
            except Exception as error:
                said = str(error).splitlines()[0][:80]
                note = f"cannot run: {type(error).__name__}: {said}"
                rows.append(Row(group, name, note=note))
        order = list(times)
        for _ in range(self.rounds):
            for name in order:
                times[name].append(self.once(contenders[name]))
            order.reverse()
        reference = next(iter(times), "")
        for name, mine in times.items():
            pairs = zip(times[reference], mine, strict=True)
            ratios = sorted(theirs / own for theirs, own in pairs)
            note = notes.get(name, "reference" if name == reference else "")
            median, ratio = statistics.median(mine), statistics.median(ratios)
            rows.append(Row(group, name, median, ratio, ratios[0], ratios[-1], note))
        return rows


# --- the groups


def attention(b: Bench) -> list[Row]:
    """Every backend that runs here, forward and backward on packed documents."""
    total, longest = (1024, 256) if b.small else (16384, 2048)
    q = b.random(1, total, 8, 64, grad=True)
    k = b.random(1, total, 4, 64, grad=True)
    v = b.random(1, total, 4, 64, grad=True)
    every = longest // 2
    int32 = b.torch.int32
    cuts = b.torch.arange(0, total + 1, every, dtype=int32, device=b.device)
    dy = b.random(1, total, 8, 64)

    def run(backend):
        b.torch.autograd.grad(backend(q, k, v, cuts, longest), (q, k, v), dy)

    contenders, skipped = {}, []
    for name in sorted(b.tg.BACKENDS, key=lambda n: n != "plain"):
        fault = b.tg.attention_fault(name, b.device)
        if fault:
            skipped.append(Row("attention", name, note=f"not here: {fault[:90]}"))
        else:
            contenders[name] = functools.partial(run, b.tg.BACKENDS[name])
    return b.race("attention", contenders) + skipped


def twins(b: Bench, group: str, call: Callable, leaves) -> list[Row]:
    """A fused kernel and its plain twin, forward and backward."""

    def run(kernel):
        b.torch.autograd.grad(call(kernel).float().sum(), leaves)

    contenders = {"plain twin": lambda: run(False)}
    skipped = []
    if b.cuda and b.tg.triton is not None:
        contenders["fused kernel"] = lambda: run(True)
    else:
        reason = "not here: it needs a CUDA GPU and triton"
        skipped.append(Row(group, "fused kernel", note=reason))
    return b.race(group, contenders) + skipped


def ce(b: Bench) -> list[Row]:
    """Softcapped cross-entropy."""
    n, vocab = (1024, 512) if b.small else (32768, 8192)
    logits = b.random(n, vocab, grad=True)
    targets = b.torch.randint(vocab, (n,), device=b.device)

    def losses(kernel):
        return b.tg.capped_ce(logits, targets, 30.0, kernel)

    return twins(b, "cross-entropy", losses, (logits,))


def mlp(b: Bench) -> list[Row]:
    """The leaky-ReLU² MLP."""
    n, d, m = (1024, 128, 256) if b.small else (65536, 512, 2048)
    x = b.random(n, d, grad=True)
    up = b.random(m, d, grad=True)
    down = b.random(d, m, grad=True)

    def output(kernel):
        return b.tg.leaky_square_mlp(x, up, down, 0.5, kernel=kernel)

    return twins(b, "MLP", output, (x, up, down))


def step(b: Bench) -> list[Row]:
    """The train step of one micro-batch, from forward to average, with and without loops."""
    contenders = {}
    ways = {"": 0, ", compiled": 1} if b.cuda else {"": 0}
    for label, compile_it in ways.items():
        s = b.with_settings(COMPILE=compile_it)
        trainer = b.tg.Trainer(s, b.world, b.model(s))
        batch = trainer.random_batch(b.torch.Generator().manual_seed(0))

        def run(plan, trainer=trainer, batch=batch):
            trainer.micro_step(batch, plan)
            trainer.update(0.0, 0.9)

        looping, straight = b.tg.layer_plan(s, True), b.tg.layer_plan(s, False)
        contenders[f"with loops{label}"] = functools.partial(run, looping)
        contenders[f"without loops{label}"] = functools.partial(run, straight)
    return b.race("train step", contenders)


def column_loop(torch, w, h, scale, top: int, block: int = 128):
    """GPTQ as its paper's code has it, column by column, through an explicit inverse.

    w (O, I), its Hessian h (I, I), scale (O,) -> codes (O, I) int8 within ±top.
    """
    order = h.diagonal().argsort(descending=True)
    w = w[:, order].clone()
    h = h[order][:, order].clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
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
    h = x.mT @ x / x.size(1)
    scale = b.tg.row_scales(w, 6, 12.85)

    def rounded(picked: slice, trellis: bool = False):
        order, u, dead, _ = b.tg.hessian_factor(h[picked], falling=not trellis)
        top = b.tg.TOP_CODE if trellis else 31
        steps = scale[picked].float()
        return b.tg.round_in_order(w[picked], steps, order, u, dead, top, trellis)

    def columns_of_each():
        for i in range(count):
            column_loop(b.torch, w[i], h[i], scale[i].float(), 31)

    def one_by_one():
        for i in range(count):
            rounded(slice(i, i + 1))

    every = slice(None)
    contenders = {
        "column loop": columns_of_each,
        "one by one": one_by_one,
        "batched": lambda: rounded(every),
        "trellis": lambda: rounded(every, trellis=True),
    }
    return b.race("GPTQ", contenders)


def gaussian_codes(torch, seed: int, shape: tuple[int, int]):
    """Made-up codes (int8 array) with the spread that quantised weights have."""
    generator = torch.Generator().manual_seed(seed)
    values = 2.4 * torch.randn(shape, generator=generator)
    return values.round().to(torch.int8).numpy()


def pack(b: Bench) -> list[Row]:
    """Packing Gaussian codes by our coder and by brotli, and reading them back."""
    import brotli

    shapes = [(512, 128)] * 4
    if not b.small:
        shapes = [(512, 512)] * 22 + [(2048, 512), (512, 2048)] * 11
    codes = [gaussian_codes(b.torch, seed, shape) for seed, shape in enumerate(shapes)]
    predicted = [(0 * c[:, 0].astype(int), 0 * c[0].astype(int)) for c in codes]
    raw = b"".join(c.tobytes() for c in codes)

    def ours():
        return b.tg.pack_codes(codes, predicted)

    def theirs():
        return brotli.compress(raw, quality=11, lgwin=24)

    streams, tall = ours()
    blob = theirs()
    sizes = {"brotli": len(blob), "ours": sum(map(len, streams.values()))}
    packing = {"pack, brotli": theirs, "pack, ours": ours}
    unpacking = {
        "unpack, brotli": lambda: brotli.decompress(blob),
        "unpack, ours": lambda: b.tg.unpack_codes(streams, tall, predicted),
    }
    rows = []
    for contenders in (packing, unpacking):
        notes = {name: f"{sizes[name.split()[1]]:,} bytes" for name in contenders}
        rows += b.race("packing", contenders, notes)
    return rows


def made_up_documents(b: Bench, folder: Path, vocab_size: int):
    """A few documents of random tokens, written as validation shards; their tokens."""
    import numpy as np

    count, length = (4, 600) if b.small else (64, 800)
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(count):
        documents.append(np.append(b.tg.BOS, rng.integers(4, vocab_size, length)))
    tokens = np.concatenate(documents)
    token_bytes = np.where(tokens == b.tg.BOS, 0, 3)
    write_shard(b.tg, folder / "fineweb_val_000000.bin", tokens)
    write_shard(b.tg, folder / "fineweb_val_bytes_000000.bin", token_bytes)
    return tokens


def ttt(b: Bench) -> list[Row]:
    """Evaluation of a few documents: one pass, sliding windows, score-first adaptation."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        changes = {} if b.small else {"COMPILE": 0}
        s = b.with_settings(DATA_PATH=folder, **changes)
        tokens = made_up_documents(b, folder, s.vocab_size)
        val = b.tg.Validation(s)
        model = b.model(s)
        scorer = b.tg.Scorer(s, b.world, model)
        contenders = {
            "one pass": lambda: scorer.windows(val, s.eval_seq_len),
            "sliding windows": lambda: scorer.windows(val, s.eval_stride),
            "test-time training": lambda: b.tg.PhasedTTT(s, b.world, model, val).run(),
        }
        notes = dict.fromkeys(contenders, f"{len(tokens):,} tokens")
        return b.race("evaluation", contenders, notes)


def repetitive_tokens(n: int):
    """(n,) ids by Zipf's law, three in a hundred in passages that were there before."""
    import numpy as np

    tokens = np.minimum(np.random.default_rng(0).zipf(1.2, n), 8191).astype(np.uint16)
    half = n // 2
    for begin in range(half, n - 60, 1000):
        earlier = begin - half
        tokens[begin : begin + 60] = tokens[earlier : earlier + 60]
    return tokens


def ngram(b: Bench) -> list[Row]:
    """Hints of the token expert, by sorting against a dictionary.

    At full size also all of a stream as long as FineWeb's validation split, by which
    the evaluation's clock is charged.
    """
    group = "n-gram hints"
    s = b.with_settings(NGRAM_TILT_ENABLED=1, VOCAB_SIZE=8192)
    tokens = repetitive_tokens(50_000 if b.small else 1_000_000)

    def by_dictionary():
        return hints_by_dictionary(tokens.tolist(), s.token_order)

    contenders = {
        "dictionary, token after token": by_dictionary,
        "sorted": lambda: b.tg.ngram_experts(s, tokens),
    }
    rows = b.race(group, contenders, {"sorted": f"{len(tokens):,} positions"})
    if not b.small:
        whole = repetitive_tokens(FINEWEB_TARGETS + 1)
        whole[::957] = b.tg.BOS  # about 50,000 documents
        val = b.tg.Validation.of(whole)
        ms = b.once(lambda: b.tg.Hints.for_windows(s, b.world, val))
        note = f"{FINEWEB_TARGETS:,} positions, {os.cpu_count()} cores"
        rows.append(Row(group, "the whole stream", ms, note=note))
    return rows


def hints_by_dictionary(tokens: list[int], order: int) -> list[int]:
    """The token that followed each context of order - 1 tokens most often so far.

    This is what sorting replaces.
    """
    tables: dict[tuple, dict[int, int]] = {}
    best: dict[tuple, int] = {}
    hints = []
    for i in range(order - 1, len(tokens)):
        context, token = tuple(tokens[i - order + 1 : i]), tokens[i]
        hint = best.get(context, -1)
        hints.append(hint)
        counts = tables.setdefault(context, {})
        counts[token] = counts.get(token, 0) + 1
        if counts[token] > counts.get(hint, 0):
            best[context] = token
    return hints


def caseops(b: Bench) -> list[Row]:
    """The lossless case transform against a loop over characters, by document."""
    from pydoc_data.topics import topics

    from data import caseops

    every = 4 if b.small else 1
    texts = [topics[name] for name in sorted(topics)][::every]
    encoded = [caseops.encode(text) for text in texts]
    if [encode_by_character(text) for text in texts] != encoded:
        raise ToolError("caseops.encode and the loop over characters differ: "
                        "one of them is wrong")
    size = sum(map(len, texts)) / len(texts)
    note = f"{len(texts)} English documents, {size:,.0f} characters on average"

    def run(transform, documents):
        for document in documents:
            transform(document)

    by_character = {"encode": encode_by_character, "decode": caseops._decode_spelled_out}
    by_arrays = {"encode": caseops.encode, "decode": caseops.decode}
    rows = []
    for way, given in (("encode", texts), ("decode", encoded)):
        slow, fast = f"{way}, by character", f"{way}, arrays"
        contenders = {
            slow: functools.partial(run, by_character[way], given),
            fast: functools.partial(run, by_arrays[way], given),
        }
        rows += b.race("CaseOps", contenders, {fast: note})
    return rows


def is_letter(character: str) -> bool:
    """An ASCII letter, the only kind whose case is folded."""
    return "a" <= character <= "z" or "A" <= character <= "Z"


def encode_word(word: str) -> str:
    """A run of ASCII letters with its capitals folded, as CaseOps writes it."""
    if len(word) > 1 and word.isupper():
        return "\ue002" + word.lower()
    out = []
    for k, letter in enumerate(word):
        mark = "\ue003" if k else "\ue001"
        out.append(mark + letter.lower() if letter.isupper() else letter)
    return "".join(out)


def encode_by_character(text: str) -> str:
    """CaseOps as a plain loop over characters: `caseops.encode` is measured against it."""
    out = []
    i = 0
    while i < len(text):
        end = i
        while end < len(text) and is_letter(text[end]):
            end += 1
        if end > i:
            out.append(encode_word(text[i:end]))
            i = end
            continue
        reserved = "\ue001" <= text[i] <= "\ue004"
        out.append("\ue004" + text[i] if reserved else text[i])
        i += 1
    return "".join(out)


def gaussian_model(tg, torch):
    """A quantised model of full size whose columns are log-normal at 0.25 octave."""
    s = tg.Settings.from_env({"QUANT_ALLOCATION": "hand"})
    generator = torch.Generator().manual_seed(0)
    shapes = {}
    for name, shape in tg.GPT.shapes(s).items():
        shapes[name] = torch.empty(shape, device="meta")
    weights = {}
    for name, view in tg.matrix_views(shapes).items():
        weights[name] = torch.randn(view.shape, generator=generator)
    for w in weights.values():
        octaves = 0.25 * torch.randn(w.shape[-1:], generator=generator)
        w *= octaves.exp2()
    return tg.Quantiser(s, weights, tg.Curvature({}))()


def quantised_run(b: Bench, path: str, env: dict):
    """A run's final_model.pt at the hand clips, by GPTQ on the shards of DATA_PATH.

    Matrices above 4,096 elements are coded.
    """
    tg = b.tg
    s = tg.Settings.from_env({**env, "QUANT_ALLOCATION": "hand"})
    tg.SMALL_TENSOR = 4096
    model = tg.build_model(s, b.world)
    tg.read_weights(path, model)
    stream = tg.open_train_stream(s, b.world, s.batch_shape(1)[1])
    curvature = tg.calibrate(s, b.world, model, stream.next)
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    return tg.Quantiser(s, weights, curvature)()


def codes_of(b: Bench, source: str):
    """Codes to compare coders on, and what coder and decoder know of them.

    source: an artifact, a run's final_model.pt, or `full`. Returns {name: int8 array},
    then the two parts of the trainer's coding plan.
    """
    tg, path = b.tg, Path(source)
    if source == "full":
        q = gaussian_model(tg, b.torch)
    else:
        env = as_environment(load_run(path.parent).summary["settings"])
        for name in {"DATA_PATH", "TOKENIZER_PATH"} & os.environ.keys():
            env[name] = os.environ[name]
        if source.endswith(".ptz"):
            s = tg.Settings.from_env(env)
            q = tg.read_artifact(s, path.read_bytes(), relative(source)).model
        else:
            q = quantised_run(b, source, env)
    codes = {k[:-2]: t.numpy() for k, t in q.tensors.items() if k.endswith(".q")}
    shapes = {name + ".q": array.shape for name, array in codes.items()}
    return codes, *tg.coding_plan(q, shapes)


def seconds_of(run: Callable) -> tuple[object, float]:
    """(what a call returns, the seconds it took)."""
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def lrzip(files: dict[str, bytes]) -> tuple[int, float, float]:
    """(bytes, seconds to pack, to unpack) of lrzip -z -L9, a file for each group."""
    size = packing = unpacking = 0
    with tempfile.TemporaryDirectory() as temp:
        path, packed = Path(temp) / "codes", Path(temp) / "codes.lrz"

        def run(*options):
            subprocess.run(["lrzip", "-q", *options], check=True, capture_output=True)

        for data in files.values():
            path.write_bytes(data)
            packing += seconds_of(lambda: run("-z", "-L9", "-N0", "-f", str(path)))[1]
            size += packed.stat().st_size
            path.unlink()
            unpacking += seconds_of(lambda: run("-d", "-N0", str(packed)))[1]
            if path.read_bytes() != data:
                raise ToolError("lrzip did not give back what it was given")
            packed.unlink()
    return size, packing, unpacking


def bytes_by_kind(codes: dict) -> dict[str, bytes]:
    """The codes of all layers put together by kind of matrix."""
    groups: dict[str, bytes] = {}
    for name, array in codes.items():
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        groups[kind] = groups.get(kind, b"") + array.tobytes()
    return groups


def coder_table(rows: list[tuple]) -> str:
    """Markdown; rows: (coder, bytes, seconds to encode, to decode), ours last."""
    ours = rows[-1][1]
    lines = [["coder", "bytes", "ours / its", "encode s", "decode s"], ["---"] * 5]
    for name, size, encoding, decoding in rows:
        share = f"{ours / size:.4f}"
        lines.append([name, f"{size:,}", share, f"{encoding:.2f}", f"{decoding:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def coders(b: Bench, source: str) -> str:
    """The same codes by five coders, as Markdown: bytes, seconds; all are read back."""
    import lzma

    import brotli

    tg = b.tg
    codes, predicted, trellis = codes_of(b, source)
    arrays = list(codes.values())
    raw = b"".join(array.tobytes() for array in arrays)
    lzma_options = {"preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
    filters = [{"id": lzma.FILTER_LZMA2, **lzma_options}]
    raw_lzma = {"format": lzma.FORMAT_RAW, "filters": filters}
    general = {
        "brotli-11": (
            lambda: brotli.compress(raw, quality=11, lgwin=24),
            brotli.decompress,
        ),
        "byte-shuffled brotli-11": (
            lambda: tg.brotli_pack(raw, 2),
            lambda blob: tg.brotli_unpack(blob, len(raw), 2),
        ),
        "lzma -9e, lc=lp=pb=0": (
            lambda: lzma.compress(raw, **raw_lzma),
            lambda blob: lzma.decompress(blob, **raw_lzma),
        ),
    }
    rows = []
    for name, (pack_up, unpack) in general.items():
        blob, encoding = seconds_of(pack_up)
        back, decoding = seconds_of(lambda unpack=unpack, blob=blob: unpack(blob))
        if back != raw:
            raise ToolError(f"{name} did not give back what it was given")
        rows.append((name, len(blob), encoding, decoding))
    note = "\n\nlrzip is not on this machine: no row."
    if shutil.which("lrzip"):
        rows.append(("lrzip -z -L9 per group", *lrzip(bytes_by_kind(codes))))
        note = ""
    (streams, tall), encoding = seconds_of(
        lambda: tg.pack_codes(arrays, predicted, trellis))
    back, decoding = seconds_of(
        lambda: tg.unpack_codes(streams, tall, predicted, trellis))
    if b"".join(array.tobytes() for array in back) != raw:
        raise ToolError("our coder did not give back what it was given")
    size = sum(map(len, streams.values()))
    rows.append(("ours, side bytes counted", size, encoding, decoding))
    return f"{len(raw):,} codes of {relative(source)}\n\n{coder_table(rows)}{note}"


GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "attention": attention,
    "ce": ce,
    "mlp": mlp,
    "step": step,
    "gptq": gptq,
    "pack": pack,
    "ttt": ttt,
    "ngram": ngram,
    "caseops": caseops,
}


def show(rows: list[Row]) -> str:
    """The table; what did not run has no figures."""
    cells = []
    for r in rows:
        figures = [f"{r.ms:.3g}", f"{r.ratio:.2f}", f"{r.low:.2f}", f"{r.high:.2f}"]
        shown = ["" if figure == "nan" else figure for figure in figures]
        cells.append([r.group, r.name, *shown, r.note])
    head = ["group", "contender", "ms", "ratio", "lowest", "highest", "note"]
    return table(head, cells)


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("groups", nargs="*", metavar="GROUP",
        help=f"any of {', '.join(GROUPS)} (default: all)")
    add("--rounds", type=int, default=7,
        help="times each contender runs (default 7)")
    add("--size", choices=("auto", "small", "full"), default="auto",
        help="auto: full on a GPU")
    add("--coders", metavar="FILE",
        help="five coders on the codes of an artifact, a final_model.pt, or `full`")
    add("--json", metavar="FILE", help="write the figures there, too")
    add("--gpu", action="store_true",
        help="everything that waits for a GPU, within 8 minutes: see --gpu --help")
    args = parser.parse_args(arguments)
    unknown = [g for g in args.groups if g not in GROUPS]
    if unknown:
        raise ToolError(f"unknown group {unknown[0]}: choose from {', '.join(GROUPS)}")
    if args.rounds < 1:
        raise ToolError(f"--rounds {args.rounds} must be at least 1")
    if args.coders and args.coders != "full" and not Path(args.coders).is_file():
        raise ToolError(f"--coders {args.coders} is no file: "
                        "give an artifact, a final_model.pt, or full")
    return args


def device_name(b: Bench) -> str:
    """What the figures were measured on."""
    if b.cuda:
        return b.torch.cuda.get_device_name(0)
    return f"CPU, {b.torch.get_num_threads()} threads"


def as_json(b: Bench, rows: list[Row]) -> str:
    """The figures for programs; one that is missing is null."""
    clean = []
    for row in rows:
        clean.append({k: None if v != v else v for k, v in asdict(row).items()})
    return json.dumps({
        "device": device_name(b),
        "torch": b.torch.__version__,
        "rounds": b.rounds,
        "size": "small" if b.small else "full",
        "rows": clean,
    }, indent=1) + "\n"


def main(arguments=None) -> int:
    """Entry."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--gpu" in words:
        from tools import gpu_day  # it takes sizes from here

        return gpu_day.main([word for word in words if word != "--gpu"])
    args = parse(words)
    small = {"auto": None, "small": True, "full": False}[args.size]
    b = Bench(args.rounds, small)
    size = "small" if b.small else "full"
    print(f"{device_name(b)}, torch {b.torch.__version__}, {size} size, "
          f"{args.rounds} rounds", flush=True)
    if args.coders:
        print(coders(b, args.coders))
        return 0
    rows = []
    for name in args.groups or GROUPS:
        rows += GROUPS[name](b)
    print(show(rows))
    if args.json:
        write_atomic(Path(args.json), as_json(b, rows))
        print(f"wrote {relative(args.json)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
