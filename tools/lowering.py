"""Counts what Inductor would launch: the kernels of a lowered function, their bytes and FLOPs.

To be used on the pretended GPU of tools/pretend.py. Dynamo, AOTAutograd, the partitioner and
Inductor run to their end; the wrapper and the source of every kernel are written, and instead of
compiling them the kernels are counted. `elements` says how the bytes of a kernel are found, RULES
where FLOPs come from.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NamedTuple
from unittest import mock

from tools.common import ToolError

BANDWIDTH = 0.85 * 3.35e12  # bytes a second that a kernel of an H100 may reach
PEAK = 0.75 * 989e12  # FLOP/s that a bf16 product may reach
PACKED_KEYS = 480  # mean keys a query of packed documents sees: FineWeb's, cut at 2,048 tokens
SAMPLE = 1 << 17  # addresses listed where several loads of a kernel overlap


class Lowered(Exception):
    """Raised by the compiled function in place of running: all has been lowered and counted."""


@dataclass
class Kernel:
    """One launch."""

    graph: str  # forward, backward, or eager: an operator that was not compiled
    kind: str
    name: str
    read: float  # bytes
    written: float  # bytes
    flops: float = 0.0
    what: str = ""  # source operators, or shapes

    @property
    def ms(self) -> float:
        """Modelled: the longer of its memory traffic and its arithmetic."""
        return 1e3 * max((self.read + self.written) / BANDWIDTH, self.flops / PEAK)


# --- operators that Inductor does not write itself

Shapes = list[list[int]]


class Rule(NamedTuple):
    """Kind and FLOPs of the operators whose name matches; flops(shapes of the inputs, of the outputs)."""

    pattern: str
    kind: str
    flops: Callable[[Shapes, Shapes], float]


def no_flops(inputs: Shapes, outputs: Shapes) -> float:
    return 0.0


def product_flops(inputs: Shapes, outputs: Shapes) -> float:
    """(…, M, K) x (…, K, N), the last two inputs: a bias may come first."""
    return 2.0 * math.prod(outputs[0]) * inputs[-2][-1]


def keys_seen(q: list[int], k: list[int]) -> float:
    """Mean keys a query sees: q (B, T, H, Dh) in rows on cached keys k (B, T', K, Dh), both ending together;
    of packed documents q is (tokens, H, Dh)."""
    if len(q) == 3 or q[0] == 1:
        return PACKED_KEYS
    return k[1] - (q[1] - 1) / 2


def attention_flops(inputs: Shapes, outputs: Shapes) -> float:
    """Two products of every query with the keys it sees; inputs begin with q, k, v."""
    q, k = inputs[:2]
    return 4.0 * math.prod(q) * keys_seen(q, k)


def attention_backward_flops(inputs: Shapes, outputs: Shapes) -> float:
    """Five products; inputs begin with the output's gradient, q, k, v."""
    return 2.5 * attention_flops(inputs[1:], outputs)


def kept_keys_flops(inputs: Shapes, outputs: Shapes) -> float:
    """Two products of every query with the kept keys that are seen and its own; inputs: q, k, v, and of the
    kept ones what is seen."""
    q, _, _, kept, _ = inputs
    return 4.0 * math.prod(q) * (kept[1] + (q[1] + 1) / 2)


def kept_keys_backward_flops(inputs: Shapes, outputs: Shapes) -> float:
    """Three products for dq, four with its own keys for theirs; inputs: dy, and those of the forward."""
    q = inputs[1]
    return 1.5 * kept_keys_flops(inputs[1:6], outputs) + 8.0 * math.prod(q) * (q[1] + 1) / 2


def by_rows_flops(inputs: Shapes, outputs: Shapes) -> float:
    """One product of x (N, d) and rows (m, d)."""
    return 2.0 * math.prod(inputs[0]) * inputs[1][0]


def mlp_dh_flops(inputs: Shapes, outputs: Shapes) -> float:
    """dy (N, d), down (d, m)."""
    return 2.0 * math.prod(inputs[0]) * inputs[1][1]


MLP, CROSS_ENTROPY = "MLP, own kernel", "cross-entropy, own kernel"
OWN_VALUE, OTHER = "own value, own kernel", "other operator"
HEADS = "queries, keys and values, own kernel"
KEPT_KEYS = "attention on kept keys, own kernel"
EAGER = "eager"  # kind and graph of what is not compiled
RULES = (
    Rule(r"\b(mm|addmm|bmm|baddbmm)\b", "product", product_flops),
    Rule("flash_attn_forward", "attention", attention_flops),
    Rule("flash_attn_backward", "attention", attention_backward_flops),
    Rule("mlp_up", MLP, by_rows_flops),
    Rule("mlp_dh", MLP, mlp_dh_flops),
    Rule(r"\bce_of_head", CROSS_ENTROPY, by_rows_flops),
    Rule(r"\bce_(forward|backward)", CROSS_ENTROPY, no_flops),
    Rule("own_value", OWN_VALUE, no_flops),
    Rule("qkv_product", HEADS, by_rows_flops),
    Rule("kept_keys_forward", KEPT_KEYS, kept_keys_flops),
    Rule("kept_keys_backward", KEPT_KEYS, kept_keys_backward_flops),
)


def rule_for(name: str) -> Rule:
    """The first rule that matches; an operator without one moves bytes only."""
    for rule in RULES:
        if re.search(rule.pattern, name):
            return rule
    return Rule("", OTHER, no_flops)


# --- bytes


def size_of(graph, sizes) -> float:
    """Entries of a tensor of these sizes, which may be symbols: then of the sizes it was traced with."""
    return math.prod(graph.sizevars.optimization_hint(s, fallback=128) for s in sizes)


def shape_of(graph, tensor) -> list[int]:
    return [graph.sizevars.optimization_hint(s, fallback=128) for s in tensor.get_size()]


def bytes_of(graph, tensor) -> float:
    return size_of(graph, tensor.get_size()) * tensor.get_dtype().itemsize


def elements(graph, accesses) -> float:
    """Entries of one buffer that the loads, or the stores, of a kernel touch; each counts once. Where several
    overlap, their addresses are compared; loads by index, and of whole buffers, count in full."""
    from torch._inductor.dependencies import MemoryDep

    accesses = list(accesses)
    listed = all(isinstance(a, MemoryDep) and not a.is_indirect() for a in accesses)
    if len(accesses) == 1 or not listed:
        return sum(size_of(graph, [a.get_numel()]) for a in accesses)
    return distinct([sampled_addresses(graph, a) for a in accesses])


class Sample(NamedTuple):
    """Addresses of an access's first rows, each once, and how many times as many it has."""

    addresses: object
    scale: float


def distinct(samples: list[Sample]) -> float:
    """Entries that the samples touch together; samples of unequal shares of their access cannot be compared,
    and are added."""
    import numpy

    scale = samples[0].scale
    if all(math.isclose(sample.scale, scale) for sample in samples):
        together = numpy.unique(numpy.concatenate([sample.addresses for sample in samples]))
        return scale * len(together)
    return sum(sample.scale * len(sample.addresses) for sample in samples)


def sampled_addresses(graph, access) -> Sample:
    """The addresses of a direct access over the first rows of its loops."""
    import numpy
    import sympy

    sizes = [graph.sizevars.optimization_hint(s, fallback=128) for s in access.size]
    if not sizes:
        return Sample(numpy.zeros(1, int), 1.0)
    rows = min(sizes[0], max(1, SAMPLE // math.prod(sizes[1:])))
    if 1024 < rows < sizes[0]:
        rows -= rows % 1024  # whole rows of the flattened tensors
    loops = (rows, *sizes[1:])
    index = access.index.replace(lambda e: type(e).__name__ == "Identity", lambda e: e.args[0])
    others = [s for s in index.free_symbols if s not in access.var_names]
    index = index.subs({s: graph.sizevars.optimization_hint(s, fallback=128) for s in others})
    meaning = {"FloorDiv": lambda a, b: a // b, "ModularIndexing": lambda a, b, c: a // b % c}
    address = sympy.lambdify(access.var_names, index, modules=[meaning, "numpy"])
    grid = numpy.meshgrid(*map(numpy.arange, loops), indexing="ij", sparse=True)
    return Sample(numpy.unique(address(*grid)), sizes[0] / rows)


# --- the kernels of a graph


@dataclass
class Recorder:
    """What was counted of one case; while `installed`, Inductor hands its graphs over here."""

    folder: Path | None = None  # for the generated code
    kernels: list[Kernel] = field(default_factory=list)
    kept: float = 0.0  # bytes that the forward leaves for the backward
    trace_seconds: float = 0.0
    lower_seconds: float = 0.0
    launches: int = 0  # that the text of the wrappers makes
    names: dict[str, str] = field(default_factory=dict)  # of Inductor's kernels, by node
    lowering_since: float = 0.0
    outputs: list[tuple[str, float]] = field(default_factory=list)  # of the forward: see held_by_outputs

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """In the place of Inductor's last step, which compiles and loads."""
        from torch._inductor.codegen.triton import TritonScheduling
        from torch._inductor.graph import GraphLowering

        define, run = TritonScheduling.define_kernel, GraphLowering.run

        def define_kernel(scheduling, source, schedule, kernel):
            name = define(scheduling, source, schedule, kernel)
            for node in schedule:
                if hasattr(node, "get_name"):
                    self.names[node.get_name()] = name
            return name

        def timed_run(graph, *inputs):
            self.lowering_since = time.perf_counter()
            self.names.clear()  # every graph counts its nodes from 0
            return run(graph, *inputs)

        with (
            mock.patch.object(TritonScheduling, "define_kernel", define_kernel),
            mock.patch.object(GraphLowering, "run", timed_run),
            mock.patch.object(GraphLowering, "_compile_to_module", self.take_over),
        ):
            yield

    @property
    def take_over(self):
        """What Inductor is to call when a graph is lowered: write the code, count, give back a module that
        refuses to run."""
        recorder = self

        class Module:
            __file__ = "not written"

            @staticmethod
            def call(*_):
                raise Lowered

        def compile_to_module(graph):
            code = graph.codegen()[0].value
            recorder.lower_seconds += time.perf_counter() - recorder.lowering_since
            recorder.count(graph, code)
            return Module

        return compile_to_module

    def count(self, graph, code: str) -> None:
        """All kernels of a graph whose wrapper is `code`."""
        direction = "backward" if graph.is_backward else "forward"
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{direction}.py").write_text(code)
        if graph.is_backward:
            incoming = sum(name.startswith("tangents_") for name in graph.graph_inputs)
            handed_over = len(graph.graph_inputs) - incoming
            first = len(self.outputs) - handed_over
            self.kept += sum(dict(self.outputs[first:]).values())
        else:
            self.outputs = held_by_outputs(graph)
        self.launches += launches_in(code)
        for node in graph.scheduler.nodes:
            kernel = self.kernel(graph, node, direction)
            if kernel is not None and kernel.read + kernel.written > 0:
                self.kernels.append(kernel)

    def kernel(self, graph, node, direction: str) -> Kernel | None:
        """The launch of one node of Inductor's schedule; None: it launches nothing."""
        from torch._inductor import ir, scheduler

        if isinstance(node, scheduler.NopKernelSchedulerNode):
            return None
        if isinstance(node.node, (ir.MultiOutput, ir.MutationOutput, ir.TMADescriptor)):
            return None
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            return operator_kernel(graph, node, direction)
        if node.get_device().type == "cpu":  # a number that becomes a tensor
            return None
        parts = node.get_nodes()
        kind = "reduction" if any(part.is_reduction() for part in parts) else "pointwise"
        name = next((self.names[p.get_name()] for p in parts if p.get_name() in self.names), "unnamed")
        read, written = traffic(graph, node)
        return Kernel(direction, kind, name, read, written, what=origins(graph, parts))

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Count operators that run one by one: each reads its inputs and writes its outputs."""
        from torch.utils._python_dispatch import TorchDispatchMode

        recorder = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                out = op(*args, **(kwargs or {}))
                kernel = eager_kernel(op, (args, kwargs), out)
                if kernel is not None:
                    recorder.kernels.append(kernel)
                return out

        with Counting():
            yield


LAUNCHES = (
    r"\.run\(",  # Triton kernels
    r"\bextern_kernels\.\w+\(",
    r"\btorch\.ops\.[\w.]+\(",
    r"\.sum\(dim=0\)",  # ends a reduction over both axes, with a cast
    r"\.to\(torch\.",
)


def launches_in(code: str) -> int:
    """Launches in the text of a wrapper, the small ones too that are no part of the schedule."""
    body = code[code.find("def call("):]
    return sum(len(re.findall(pattern, body)) for pattern in LAUNCHES)


def held_by_outputs(graph) -> list[tuple[str, float]]:
    """(buffer, its bytes) of every output of a forward; what it leaves for the backward comes last. Views
    hold the whole buffer; what the caller holds anyway, and numbers, count as 0."""
    held = []
    for output in graph.graph_outputs:
        name = output.maybe_get_name() or ""  # a number has none
        buffer = None if name in graph.graph_inputs else graph.try_get_buffer(name)
        held.append((name, bytes_of(graph, buffer) if buffer is not None else 0.0))
    return held


def traffic(graph, node) -> tuple[float, float]:
    """Bytes that a kernel of Inductor's own reads and writes. What it only passes on within itself costs
    nothing, a buffer costs no more than it holds, and one that is written counts as written only."""
    inside = node.read_writes
    written_names = {access.name for access in inside.writes}
    return (bytes_accessed(graph, inside.reads, written_names),
            bytes_accessed(graph, inside.writes, set()))


def bytes_accessed(graph, accesses, left_out: set[str]) -> float:
    """Bytes of loads or stores, by buffer; `left_out`: names of buffers that do not count."""
    from torch._inductor.dependencies import WeakDep

    by_buffer = defaultdict(set)
    for access in accesses:
        inside = access.name in graph.removed_buffers or access.name in left_out
        if not inside and not isinstance(access, WeakDep):
            by_buffer[access.name].add(access)
    total = 0.0
    for name, of_buffer in by_buffer.items():
        # what an operator has changed goes by a new name
        buffer = graph.try_get_buffer(graph.scheduler.mutation_real_name.get(name, name))
        if buffer is not None and buffer.has_tensor_output():
            most = size_of(graph, buffer.get_size())
            total += min(most, elements(graph, of_buffer)) * buffer.get_dtype().itemsize
    return total


def origins(graph, parts) -> str:
    """The largest loop of a kernel and the source operators it stands for."""
    loops, operators = [], set()
    for part in parts:
        sizes = part.group[1] if isinstance(getattr(part, "group", None), tuple) else ()
        if isinstance(sizes, (tuple, list)):
            loops.append([int(size_of(graph, [size])) for size in sizes])
        for origin in part.node.origins if part.node else ():
            operators.add(short_name(str(origin.target)))
    largest = max(loops, key=math.prod, default=[])
    return f"{largest} {' '.join(sorted(operators))}"


def short_name(target: str) -> str:
    """aten.mul.Tensor -> mul."""
    parts = target.split(".")
    return parts[-2] if len(parts) > 1 else target


def flat(items) -> Iterator:
    """The members of nested lists."""
    for item in items:
        if isinstance(item, (list, tuple)):
            yield from flat(item)
        else:
            yield item


def operator_kernel(graph, node, direction: str) -> Kernel:
    """A product, an attention or another operator that is called whole: it reads its inputs and writes its
    outputs and what it changes, each once."""
    from torch._inductor import ir

    op = node.node
    name = str(getattr(op, "op_overload", None) or getattr(op, "python_kernel_name", ""))
    if isinstance(op, ir.UserDefinedTritonKernel):
        name = op.get_kernel_and_metadata()[0].fn.__name__
    inputs = [x for x in flat(op.inputs) if hasattr(x, "get_size") and hasattr(x, "get_name")]
    outputs, changed = outputs_of(node)
    given = shapes_seen(graph, op, inputs)
    passed = {}
    for x, shape in zip(inputs, given):
        key = x.get_name(), tuple(x.get_size()), x.get_layout().offset
        passed[key] = math.prod(shape) * x.get_dtype().itemsize
    read, written = 0.0, sum(bytes_of(graph, x) for x in outputs)
    for (buffer, *_), moved in passed.items():
        if buffer in changed:
            written += moved
        else:
            read += moved
    made = [shape_of(graph, x) for x in outputs]
    rule = rule_for(name)
    flops = rule.flops(given, made)
    return Kernel(direction, rule.kind, name, read, written, flops, f"{given} -> {made}")


def shapes_seen(graph, op, inputs: list) -> Shapes:
    """Shapes of an operator's inputs; of kept keys, `old_…`, of which it is told how many are `seen`, of that
    part."""
    shapes = [shape_of(graph, x) for x in inputs]
    schema = getattr(getattr(op, "op_overload", None), "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    if "seen" in names:
        seen = graph.sizevars.optimization_hint(op.constant_args[-1], fallback=128)
        for name, shape in zip(names, shapes):
            if name.startswith("old_"):
                shape[1] = seen
    return shapes


def outputs_of(node) -> tuple[list, set[str]]:
    """(tensors that an operator makes, names of the buffers that it changes)."""
    from torch._inductor import ir

    made, changed = [], set()
    for buffer in node.get_outputs():
        changed.update(buffer.get_mutations())
        for user in buffer.users:
            part = getattr(user.node, "node", None)
            if isinstance(part, ir.MultiOutput):
                made.append(part)
    layout = node.node.layout
    if not made and isinstance(layout, ir.Layout) and not isinstance(layout, ir.NoneLayout):
        made = [node.node]
    return made, changed


def eager_kernel(op, inputs, out) -> Kernel | None:
    """The launch of one operator that is not compiled; None for views and what moves nothing."""
    import torch
    from torch.utils._pytree import tree_leaves

    made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    idle = op.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.empty, torch.ops.aten.empty_like)
    if op.is_view or idle or not made:
        return None
    seen = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    read = sum(x.numel() * x.element_size() for x in seen)
    written = sum(x.numel() * x.element_size() for x in made)
    shapes = [list(x.shape) for x in (*seen, *made)]
    return Kernel(EAGER, EAGER, str(op.overloadpacket), read, written, what=str(shapes))


# --- one case


class Job(NamedTuple):
    """A case, made ready among fake tensors."""

    compiled: list[Callable[[], object]]  # calls that reach what torch.compile has made, and end there
    eager: Callable[[], object] | None = None  # what is run beside it, operator by operator


def lower(prepare: Callable[[], Job], folder: Path | None = None) -> Recorder:
    """Lower and count one case. folder: where the generated code goes, if anywhere."""
    import torch
    from torch._subclasses import FakeTensorMode

    torch._dynamo.reset()
    recorder = Recorder(folder)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder.installed():
        job = prepare()
        begin = time.perf_counter()
        for call in job.compiled:
            try:
                call()
            except Lowered:
                recorder.trace_seconds = time.perf_counter() - begin - recorder.lower_seconds
            else:
                raise ToolError("nothing was compiled: leave COMPILE at auto")
        if job.eager is not None:
            with recorder.eager():
                job.eager()
    return recorder
