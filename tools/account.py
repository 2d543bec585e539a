"""Where a step's time must go: FLOPs and bytes by group of operators, and their floor.

    python tools/bench.py --account

The groups call the trainer's own functions. On the meta device every operator is seen,
none is run: products give FLOPs, and each tensor read or written gives bytes. Two sums
of bytes bracket what a compiled step moves:

    least      what one perfect kernel for the group would move: inputs, outputs and
               their gradients
    unfused    every operator's inputs and outputs, as the framework would run them
               one by one

The floor is the larger of FLOPs / peak and least bytes / bandwidth; "unfused" the same
with the other sum.
"""
from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Callable, NamedTuple

from tools.common import table

H100 = (989e12, 3.35e12)  # dense bf16 FLOP/s, bytes/s of the SXM part, by its data sheet
CONTEXT = 480  # mean keys a query sees: documents as in FineWeb, cut at 2,048 tokens


class Case(NamedTuple):
    """One group of operators, ready to be counted or timed."""
    name: str
    times: tuple[int, int]  # how often a step runs it, without and with loops
    call: Callable  # () -> output tensors
    inputs: list  # what it reads; differentiated where they require a gradient
    flops: float = 0.0  # given for attention: the meta device has no fused kernels


@dataclass
class Line:
    """A group's counts per call, and its milliseconds where it was run."""
    name: str
    times: tuple[int, int]
    flops: float
    least: float
    unfused: float
    ms: float = float("nan")

    def floor(self, peak: float, bandwidth: float) -> float:
        return 1e3 * max(self.flops / peak, self.least / bandwidth)

    def bound(self, peak: float, bandwidth: float) -> float:
        return 1e3 * max(self.flops / peak, self.unfused / bandwidth)


def size(tensors) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def counter(torch):
    """A dispatch mode that sums FLOPs of products and bytes of every operator that is
    no view."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.flops = self.bytes = 0.0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            leaves = tree_leaves((args, kwargs, out))
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            makes = any(isinstance(x, torch.Tensor) for x in tree_leaves(out))
            name = op.overloadpacket
            if name in flop_registry:
                self.flops += flop_registry[name](*args, **(kwargs or {}), out_val=out)
            idle = name in (torch.ops.aten.detach, torch.ops.aten.empty)
            if makes and not op.is_view and not idle:
                self.bytes += size(tensors)
            return out

    return Counter()


def run(torch, case: Case) -> float:
    """One call, forward and, where inputs are differentiated, backward; returns the
    least bytes to move."""
    out = case.call()
    least = moved = size(case.inputs) + size(out)
    leaves = [x for x in case.inputs if x.requires_grad]
    if leaves:  # backward reads inputs and the outputs' gradients, writes the inputs'
        ones = [torch.ones_like(y) for y in out]
        grads = torch.autograd.grad(out, leaves, ones, allow_unused=True)
        least += moved + size(g for g in grads if g is not None)
    return least


def count(torch, case: Case) -> Line:
    """Counts of one call whose tensors are on the meta device. A fused attention moves
    the least bytes."""
    with counter(torch) as mode:
        least = run(torch, case)
    unfused = least if case.flops else mode.bytes
    return Line(case.name, case.times, case.flops or mode.flops, least, unfused)


def train_cases(tg, torch, s, device, tokens: int, share: int) -> list[Case]:
    """The groups of one rank's training step.

    tokens: of one micro-batch; share: this rank has 1/share of Muon's matrices.
    """
    half, d = torch.bfloat16, s.model_dim
    plans = [tg.layer_plan(s, looping) for looping in (False, True)]
    slots = tuple(plan.slots for plan in plans)
    skips = tuple(min(len(p.encoder), len(p.decoder)) for p in plans)
    both = tuple(2 * n for n in slots)

    def leaf(*shape):
        return torch.zeros(shape, dtype=half, device=device, requires_grad=True)

    model = tg.GPT(s).to(device)
    model.compute_dtype = half
    ids = torch.zeros((1, tokens), dtype=torch.int64, device=device)
    x, x0, branch, n, skip = (leaf(1, tokens, d) for _ in range(5))
    mix, scale = leaf(2, d), leaf(d)
    up, down = leaf(s.hidden_dim, d), leaf(d, s.hidden_dim)
    flat, logits = leaf(tokens, d), leaf(tokens, s.vocab_size)

    def embedded():
        return [model.embed(ids, None)]

    def mixed():
        z = mix[0] * x + mix[1] * x0
        return [z, tg.rms(z) * 0.5]

    def mlp():
        return [tg.leaky_square_mlp(flat, up, down, 0.5)]

    def losses():
        return [tg.capped_ce(logits, ids[0], 30.0)]

    once = (1, 1)
    head_inputs = [n, model.tok_emb]
    return [
        Case("embedding, smear, norm", once, embedded, [model.tok_emb]),
        Case("residual mix and norm", slots, mixed, [x, x0, mix]),
        Case("norm before the MLP", slots, lambda: [tg.rms(x) * 0.5], [x]),
        *attention_cases(tg, s, model, leaf, n, slots),
        Case("scale and add", both, lambda: [x + scale * branch], [x, scale, branch]),
        Case("MLP", slots, mlp, [flat, up, down]),
        Case("U-Net skips", skips, lambda: [model.merge_skip(0, x, skip)], [x, skip]),
        Case("head product", once, lambda: [model.raw_logits(n)], head_inputs),
        Case("cross-entropy", once, losses, [logits]),
        *optimiser_cases(tg, torch, s, device, share),
    ]


def attention_cases(tg, s, model, leaf: Callable, n, slots: tuple) -> list[Case]:
    """The groups of one attention; n (1, tokens, D): its normalised input."""
    tokens, d, kv = n.size(1), s.model_dim, s.kv_dim
    rope = model.rope(tokens, n.device)
    heads = (1, tokens, -1, s.head_dim)
    y, q = (leaf(1, tokens, s.num_heads, s.head_dim) for _ in range(2))
    k, v = (leaf(1, tokens, s.num_kv_heads, s.head_dim) for _ in range(2))
    wq, wk, wv, wo = leaf(d, d), leaf(kv, d), leaf(kv, d), leaf(d, d)
    gain, gate = leaf(s.num_heads), leaf(s.num_heads, s.gate_window)
    scores = 4 * tokens * CONTEXT * d  # two products forward; backward has five of them

    def projected():
        return [tg.F.linear(n, w) for w in (wq, wk, wv)]

    def rotated():
        queries = tg.rotate(tg.rms(q.view(heads)), rope) * gain[:, None]
        return [queries, tg.rotate(tg.rms(k.view(heads)), rope)]

    def attended():
        return [tg.attention(q, k, v)]

    def gated():
        return [tg.remove_own_value(y, v) * model.head_gate(gate, n, n)[..., None]]

    return [
        Case("Q, K, V projections", slots, projected, [n, wq, wk, wv]),
        Case("q/k norm, rotary, gain", slots, rotated, [q, k, gain]),
        Case("attention", slots, attended, [q, k, v], flops=3.5 * scores),
        Case("XSA and head gate", slots, gated, [y, v, n, gate]),
        Case("attention output", slots, lambda: [tg.F.linear(n, wo)], [n, wo]),
    ]


def optimiser_cases(tg, torch, s, device, share: int) -> list[Case]:
    """Muon on this rank's share of the banks, its step on all, Adam and the average."""
    shapes = tg.GPT.shapes(s)
    banks = [shape for name, shape in shapes.items() if tg.ROLES[name] == "matrix"]
    every = sum(tg.math.prod(shape) for shape in shapes.values())
    rest = every - sum(tg.math.prod(shape) for shape in banks)

    def zeros(shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    own = [(-(-shape[0] // share), *shape[1:]) for shape in banks]
    g = [zeros(shape, torch.bfloat16) for shape in own]
    buf = [torch.zeros_like(x) for x in g]
    weights = [zeros(shape) for shape in banks]
    u = [zeros(shape, torch.bfloat16) for shape in banks]
    small = torch.nn.Parameter(zeros((rest,)))
    small.grad = zeros((rest,))
    adam = torch.optim.AdamW([small], foreach=False)
    average, params = zeros((every,)), zeros((every,))

    def directions():
        return [tg.muon_direction(a, b, 0.95) for a, b in zip(g, buf, strict=True)]

    def apply():
        for p, a in zip(weights, u, strict=True):
            tg.muon_apply(p, a, 0.01, 0.1)
        return weights

    def adam_step():
        adam.step()
        return [small.detach()] * 3          # it writes the parameter and two moments

    def averaged():
        return [average.lerp_(params, 0.01)]

    once, no_grad = (1, 1), torch.no_grad()
    return [
        Case("Muon's direction", once, no_grad(directions), g + buf),
        Case("Muon's step", once, no_grad(apply), weights + u),
        Case("AdamW", once, adam_step, [small.detach()] * 4),
        Case("average", once, no_grad(averaged), [average, params]),
    ]


def ttt_cases(tg, torch, s, device, documents: int) -> list[Case]:
    """One step of test-time training: a chunk of `documents` scored over a full cache,
    and its backward."""
    plan, chunk = tg.layer_plan(s, True), tg.chunk_rules(s)[0][1]
    model = tg.GPT(s).to(device).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    adapter = tg.Adapter(s, plan, documents, device)
    cache = tg.KeyCache(s.ttt_eval_seq_len)
    held = s.ttt_eval_seq_len - chunk
    keys = (documents, held, s.num_kv_heads, s.head_dim)
    for slot in range(plan.slots):
        pair = (torch.zeros(keys, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.old[slot] = tuple(pair)
    cache.position = cache.seen = cache.end = held
    cache.last = torch.zeros((documents, 2), dtype=torch.int64, device=device)
    ids = torch.zeros((documents, chunk), dtype=torch.int64, device=device)

    def losses():
        return [model.losses(ids, ids, plan, None, adapter, None, cache)]

    chunk_losses = torch.ones(documents, device=device)

    def step():
        for p in adapter.trained():
            p.grad = torch.zeros_like(p)
        tg.normalised_step(s, adapter.trained(), chunk_losses)
        return [p.detach() for p in adapter.trained()]

    name = f"score and adapt {documents} x {chunk} tokens, {held:,} cached keys"
    cached = itertools.chain.from_iterable(cache.old.values())
    read = [*adapter.trained(), *model.parameters(), *cached]
    trained = [p.detach() for p in adapter.trained()]
    return [
        Case(name, (1, 1), losses, read),
        Case("step of all B", (1, 1), step, trained * 2),
    ]


def gptq_cases(tg, torch, s, device) -> list[Case]:
    """Hessians of one micro-batch's inputs are products; here the rounding itself, per
    shape of matrix."""
    shapes = {"queries and outputs": (2 * s.num_layers, s.model_dim, s.model_dim),
              "keys and values": (2 * s.num_layers, s.kv_dim, s.model_dim),
              "MLP up": (s.num_layers, s.hidden_dim, s.model_dim),
              "MLP down": (s.num_layers, s.model_dim, s.hidden_dim),
              "embedding": (1, s.vocab_size, s.model_dim)}

    def rounds(count, rows, columns):
        w = torch.ones((count, rows, columns), device=device)
        h = torch.eye(columns, device=device).expand(count, columns, columns)
        step = torch.ones((count, rows), device=device)

        def gptq():
            order, u, dead, _ = tg.hessian_factor(h)
            return [tg.round_in_order(w, step, order, u, dead, 31)]
        return Case("", (1, 1), gptq, [w, h, step])

    return [rounds(*shape)._replace(name=f"GPTQ, {name}") for name, shape in shapes.items()]


def show(lines: list[Line], peak: float, bandwidth: float, looping: bool) -> str:
    """The table of one step; counts and times are those of all calls of a group, the
    last row their sums."""
    rows, sums = [], [0.0] * 7
    for line in lines:
        n = line.times[looping]
        floor = line.floor(peak, bandwidth)
        unfused = line.bound(peak, bandwidth)
        counts = [line.flops / 1e9, line.least / 1e9, line.unfused / 1e9]
        each = [*counts, floor, unfused, unfused - floor, line.ms]
        figures = [n * x for x in each]
        sums = [a + b for a, b in zip(sums, figures, strict=True)]
        rows.append([line.name, n, *figures])
    rows.append(["sum", "", *sums])
    head = ["group", "times", "GFLOP", "least GB", "unfused GB", "floor ms"]
    head += ["unfused ms", "gap ms", "measured ms"]
    cells = []
    for name, times, gflop, *rest in rows:
        shown = ["" if x != x else f"{x:,.3f}" for x in rest]
        cells.append([name, times, f"{gflop:,.1f}", *shown])
    return table(head, cells)


def account(b, counts_only: bool) -> str:
    """The tables of a training step, of a step of test-time training, and of GPTQ. b:
    tools.bench.Bench."""
    tg, torch, s, meta = b.tg, b.torch, b.settings, b.torch.device("meta")
    tokens, documents = s.train_batch_tokens, s.ttt_batch_size
    peak, bandwidth = H100
    steps = {
        "training step": lambda device: train_cases(tg, torch, s, device, tokens, 8),
        "test-time training": lambda device: ttt_cases(tg, torch, s, device, documents),
        "GPTQ": lambda device: gptq_cases(tg, torch, s, device),
    }
    speeds = f"{peak / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.2f} TB/s"
    parts = [f"floors at {speeds} (H100), {tokens:,} tokens"]
    for what, cases in steps.items():
        lines = [count(torch, case) for case in cases(meta)]
        if not counts_only:
            for line, case in zip(lines, cases(b.device), strict=True):
                fast = case
                if b.cuda:
                    fast = case._replace(call=torch.compile(case.call))
                run(torch, fast)
                once = functools.partial(b.once, functools.partial(run, torch, fast))
                line.ms = min(once() for _ in range(b.rounds))
        names = {what: True}
        if what == "training step":
            names = {f"{what}, without loops": False, f"{what}, with loops": True}
        for name, looping in names.items():
            parts.append(f"\n{name}\n{show(lines, peak, bandwidth, looping)}")
    return "\n".join(parts)
