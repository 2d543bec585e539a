"""What torch.compile would run of the trainer's steps on an H100, counted on a machine without one.

    python tools/account.py                            # all cases, of the environment's settings
    python tools/account.py configs/best.env --case step --case step-loops --top 20
    python tools/account.py configs/best.env --json now.json --against docs/figures/account_1855.json
    python tools/account.py --read now.json --against before.json      # lowers nothing

Cases, at the size of one of 8 ranks:

    step          forward and backward of a training micro-batch, without loops
    step-loops    the same with loops
    chunk         a chunk of adaptation: TTT_BATCH_SIZE documents in the middle of a full
                  window of cached keys, TTT_SUFFIX tokens run again, forward (which
                  scores), backward and the adapters' step compiled; the step of an optimiser
                  with a state operator by operator
    score         one packed row of sliding-window scoring, forward only

The trainer's own Trainer, PhasedTTT and Scorer call the compiled model, dynamo,
AOTAutograd, the partitioner and Inductor's Triton back end run to their end, and the
kernels they would launch are counted instead of compiled.

Counted     kernels: the parts of Inductor's schedule (the generated code ends some of
            them by small launches more); bytes: each kernel reads what it loads of a
            buffer once and writes what it stores once, within itself it passes on for
            nothing; FLOPs of products, attention and the MLP's own kernels by their
            shapes; what the forward keeps for the backward, without parameters and inputs.
Modelled    a kernel's ms = the larger of bytes / (0.85 x 3.35 TB/s) and
            FLOPs / (0.75 x 989 TFLOP/s); packed documents let a query see 480 keys on
            average. No gaps between kernels, no cache hits from one to the next, no second
            reading by reductions that loop.
Left out    the optimiser, traffic between GPUs, hints of earlier text.

A sum of ms is for comparing two forms of a step, not for predicting one. It needs g++,
Triton and a CPU build of the PyTorch in requirements.txt; a case takes one to five minutes
of a core and less than 1 GB.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools import pretend
from tools.common import ROOT, SCRIPT, ToolError, command_line, relative, run_cli, table, write_atomic
from tools.lowering import Job, Kernel, Recorder, lower

RANKS = 8  # of the run whose micro-batch is counted
DOCUMENT = 800  # tokens of a made-up document: about FineWeb's mean


# --- the cases: the trainer's own functions, up to the compiled call


class Subject:
    """The trainer at its real size on the pretended GPU; a method a case, each to be called among fake
    tensors."""

    def __init__(self, tg, torch, s):
        self.tg, self.torch, self.s = tg, torch, s
        self.device = torch.device("cuda", 0)
        self.world = tg.World(device=self.device)
        tg.self_test = lambda name, device: ""  # of attention: it would run kernels
        tg.kernel_faults = lambda device: {}
        tg.sent = lambda x, device: x.to(device)  # what is made up cannot be pinned
        tg.set_up(s, self.world)
        if not tg.compiles(s, self.device):
            raise ToolError(f"with COMPILE={s.compile}, COMPUTE_DTYPE={s.compute_dtype} and ATTN_BACKEND="
                            f"{s.attn_backend} nothing is compiled: leave them at auto")

    def model(self):
        """The model with its parameters on the GPU; fake ones cannot be moved, only made there."""
        model = self.tg.GPT(self.s)
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                placed = self.torch.empty_like(p, device=self.device)
                setattr(module, name, self.torch.nn.Parameter(placed))
        model.compute_dtype = self.tg.pick_dtype(self.s.compute_dtype, self.device)
        return model

    def step(self, looping: bool) -> Job:
        """A training micro-batch."""
        tg, torch, s = self.tg, self.torch, self.s
        _, tokens = s.batch_shape(RANKS)
        trainer = tg.Trainer(s, self.world, self.model())
        with self.device:
            x, y = (torch.zeros((1, tokens), dtype=torch.int64) for _ in range(2))
            buckets = tokens // DOCUMENT // 64 + 1  # of document starts, padded as the loader does
            starts = torch.zeros(64 * buckets, dtype=torch.int32)
        batch = tg.Batch(x, y, starts, s.train_seq_len)
        if tg.LOADERS[s.train_loader].windowed:
            batch = batch.rows(s.train_seq_len)
        return Job([lambda: trainer.micro_step(batch, tg.layer_plan(s, looping))])

    def validation(self, documents: int, length: int):
        """A stand-in for Validation: so many documents of `length` tokens."""
        np = self.tg.np
        starts = np.arange(documents) * length
        tokens = np.zeros(documents * length + 1, np.uint16)
        lengths = np.full(documents, length)
        return SimpleNamespace(tokens=tokens, targets=tokens, target_bytes=tokens, hints=None, ledgers=0,
                               documents=SimpleNamespace(start=starts, length=lengths))

    def chunk(self) -> Job:
        """A chunk of adaptation at full size, the window before it full."""
        tg, torch, s = self.tg, self.torch, self.s
        *_, begin, end = tg.chunk_bounds(s, s.ttt_eval_seq_len + 2)
        val = self.validation(s.ttt_batch_size, 2 * end)
        model = self.model().requires_grad_(False)
        ttt = tg.PhasedTTT(s, self.world, model, val)
        compiled, ttt.losses = ttt.losses, model.losses
        ttt.adapt = lambda *_: None  # the step is counted by itself, below
        ttt.begin_round()
        rows = ttt.open_rows(tg.np.arange(s.ttt_batch_size))
        ttt.adapt_chunk(rows, 0, begin)  # not compiled: it only fills the cache
        ttt.losses = compiled

        def step():
            trained = rows.adapter.parameters()
            for p in trained:
                p.grad = torch.empty_like(p)
            losses = torch.empty(s.ttt_batch_size, device=self.device)
            if rows.optimiser is None:
                adapter = rows.adapter
                ttt.step(s, trained, adapter.exact(), adapter.sums(), adapter.steps, losses)
            else:
                tg.optimiser_step(rows.optimiser, trained)

        def adapted():
            rows.base = None  # its forward is a graph by itself
            ttt.adapt_chunk(rows, begin, end)

        forwards = [adapted]
        if rows.base is not None:
            forwards.insert(0, functools.partial(ttt.base_losses, rows, begin, end))
        if rows.optimiser is None:
            return Job([*forwards, step])
        return Job(forwards, step)

    def score(self) -> Job:
        """A packed row of documents, scored."""
        tg, s = self.tg, self.s
        scorer = tg.Scorer(s, self.world, self.model())
        length = min(DOCUMENT, s.eval_seq_len)
        count = scorer.capacity // length
        row = [(i * length, (i + 1) * length, i * length) for i in range(count)]
        val, plan = self.validation(count, length), tg.layer_plan(s, True)

        def scored():
            with self.torch.no_grad():
                scorer.score_row(row, val, plan, None)

        return Job([scored])


CASES = {
    "step": lambda subject: subject.step(False),
    "step-loops": lambda subject: subject.step(True),
    "chunk": Subject.chunk,
    "score": Subject.score,
}


# --- sums, tables and files


def sums(kernels: list[Kernel]) -> dict:
    """Kernels, GB, TFLOP and modelled ms."""
    read, written = (sum(getattr(k, side) for k in kernels) / 1e9 for side in ("read", "written"))
    tflop = sum(k.flops for k in kernels) / 1e12
    return dict(kernels=len(kernels), gb=read + written, read_gb=read, written_gb=written, tflop=tflop,
                ms=sum(k.ms for k in kernels))


def largest(kernels: list[Kernel], most: int) -> list[dict]:
    """The kernels that take longest together with their likes: `times` launches of `ms` each."""
    alike: dict[tuple, list[Kernel]] = {}
    for kernel in kernels:
        key = (kernel.graph, kernel.name, kernel.read, kernel.written)
        alike.setdefault(key, []).append(kernel)
    order = sorted(alike.values(), key=lambda some: -sum(k.ms for k in some))
    return [{"times": len(some), "ms": some[0].ms} | asdict(some[0]) for some in order[:most]]


def summary(recorder: Recorder, top: int) -> dict:
    """The figures of one case as they are written; kinds by falling ms."""
    by_kind: dict[str, list[Kernel]] = {}
    for kernel in recorder.kernels:
        by_kind.setdefault(kernel.kind, []).append(kernel)
    kinds = {kind: sums(kernels) for kind, kernels in by_kind.items()}
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"]))
    return sums(recorder.kernels) | {
        "launches": recorder.launches,
        "kept_gb": recorder.kept / 1e9,
        "trace_seconds": recorder.trace_seconds,
        "lower_seconds": recorder.lower_seconds,
        "kinds": kinds,
        "largest": largest(recorder.kernels, top),
    }


def show_case(name: str, case: dict) -> str:
    """The table of one case, and its largest kernels."""
    rows = []
    for kind, part in (*case["kinds"].items(), ("sum", case)):
        rows.append([kind, part["kernels"], *(f"{part[key]:.3f}" for key in ("gb", "tflop", "ms"))])
    lines = [f"\n{name}", table(["kind", "kernels", "GB", "TFLOP", "ms"], rows)]
    if "launches" in case:  # not in another program's account
        seconds = f"{case['trace_seconds']:.0f} s to trace, {case['lower_seconds']:.0f} s to lower"
        lines.append(f"launches of the generated code: {case['launches']}; kept for the backward: "
                     f"{case['kept_gb']:.2f} GB; {seconds}")
    if case.get("largest"):
        head = ["times", "ms", "read MB", "written MB", "GFLOP", "graph", "kind", "kernel", "of"]
        lines.append(table(head, map(kernel_row, case["largest"])))
    return "\n".join(lines)


def kernel_row(kernel: dict) -> list[str]:
    figures = [str(kernel["times"]), f"{kernel['ms']:.3f}"]
    for key, unit in (("read", 1e6), ("written", 1e6), ("flops", 1e9)):
        figures.append(f"{kernel[key] / unit:.1f}")
    return [*figures, kernel["graph"], kernel["kind"], kernel["name"][:48], kernel["what"][:90]]


CASE_NAMES = {"without loops": "step", "with loops": "step-loops"}  # other accounts' names
KIND_NAMES = {
    "linear_leaky_relu_square": "MLP, own kernel",
    "softcapped_ce": "cross-entropy, own kernel",
}


def read_account(path: str) -> dict:
    """A file of --json, or another account of its shape: {"cases": {case: {"kernels", "gb", "tflop", "ms",
    "kinds": {kind: the same}}}}."""
    try:
        data = json.loads(Path(path).read_text())
        cases = {CASE_NAMES.get(name, name): named_alike(case) for name, case in data["cases"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ToolError(f"{relative(path)} is no account ({type(error).__name__}: {error}): give a file that "
                        "python tools/account.py --json wrote") from None
    return data | {"cases": cases}


def named_alike(case: dict) -> dict:
    """A case with this tool's names of kinds; all is looked up once, so that what is missing shows."""
    kinds = {KIND_NAMES.get(kind, kind): part for kind, part in case["kinds"].items()}
    for part in (case, *kinds.values()):
        for key in ("kernels", "gb", "tflop", "ms"):
            float(part[key])
    for kernel in case.get("largest", ()):
        kernel_row(kernel)
    return case | {"kinds": kinds}


def shared_cases(ours, theirs, name: str) -> list[str]:
    """The cases that both have; ToolError when there is none."""
    shared = [case for case in ours if case in theirs]
    if not shared:
        raise ToolError(f"{name} has none of the cases {', '.join(ours)}, only {', '.join(theirs)}: choose "
                        "another file, or by --case")
    return shared


def compare(ours: dict, theirs: dict, name: str) -> str:
    """Our figures over theirs, case by case and kind by kind; "-" where one side has none."""
    lines = []
    for case in shared_cases(ours, theirs, name):
        mine, other = ours[case], theirs[case]
        rows = []
        for kind in dict.fromkeys([*mine["kinds"], *other["kinds"]]):
            rows.append([kind, *ratios(mine["kinds"].get(kind), other["kinds"].get(kind))])
        rows.append(["sum", *ratios(mine, other)])
        head = ["kind", "kernels", "ratio", "GB", "ratio", "TFLOP", "ratio", "ms", "ratio"]
        lines += [f"\n{case}, against {name}", table(head, rows)]
    return "\n".join(lines)


def ratios(mine: dict | None, other: dict | None) -> list[str]:
    """For each figure ours, and ours over theirs."""
    cells = []
    for key, form in (("kernels", "d"), ("gb", ".3f"), ("tflop", ".3f"), ("ms", ".3f")):
        own, their = (mine or {}).get(key, 0), (other or {}).get(key, 0)
        cells += [format(own, form), f"{own / their:.3f}" if their else "-"]
    return cells


# --- the command


def environment(config: str | None) -> dict[str, str]:
    """The environment's settings, with those of an env file over them."""
    env = dict(os.environ)
    if config is None:
        return env
    for number, line in enumerate(Path(config).read_text().splitlines(), start=1):
        for word in shlex.split(line, comments=True):
            name, equals, value = word.partition("=")
            if not equals or not name.isidentifier():
                raise ToolError(f"{relative(config)}, line {number}: {word!r} is no NAME=VALUE: give a file "
                                "such as configs/best.env")
            env[name] = value
    return env


def parse(arguments) -> argparse.Namespace:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.env", help="settings (default: the environment's)")
    add("--case", action="append", metavar="NAME",
        help=f"any of {', '.join(CASES)}; may be repeated (default: all)")
    add("--top", type=int, default=10, metavar="N",
        help="show and write the N kernels that take longest with their likes (default 10)")
    add("--json", metavar="FILE", help="write the figures there")
    add("--against", metavar="FILE", help="print ratios to such a file")
    add("--read", metavar="FILE", help="take the figures from such a file instead of lowering")
    add("--code", metavar="FOLDER", help="write the generated code of every case there")
    args = parser.parse_args(arguments)
    for name in args.case or ():
        if name not in CASES:
            raise ToolError(f"--case {name} is unknown: choose from {', '.join(CASES)}")
    if args.top < 0:
        raise ToolError(f"--top {args.top} must be at least 0")
    if args.read and (args.config or args.json or args.code):
        raise ToolError("--read lowers nothing: leave CONFIG.env, --json and --code out")
    return args


def measure(args: argparse.Namespace, wanted: list[str]) -> dict:
    """Lower the cases one after the other, printing each; the account as it is written."""
    env = environment(args.config)
    torch = pretend.begin()
    sys.path.insert(0, str(ROOT))
    import train_gpt as tg

    try:
        s = tg.Settings.from_env(env)
        subject = Subject(tg, torch, s)
        cases = {}
        for name in wanted:
            folder = Path(args.code) / name if args.code else None
            recorder = lower(functools.partial(CASES[name], subject), folder)
            cases[name] = summary(recorder, args.top)
            print(show_case(name, cases[name]), flush=True)
    except tg.UserError as error:
        raise ToolError(str(error)) from None
    return {
        "what": f"{args.config or 'the settings of the environment'}, one of {RANKS} ranks, counted by "
                "tools/account.py",
        "torch": torch.__version__,
        "script": hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:16],
        "settings": tg.public_settings(s.changed()),
        "cases": cases,
    }


def show_file(path: str, wanted, top: int) -> dict:
    """The account in a file, cut to the wanted cases; they are printed."""
    account = read_account(path)
    account["cases"] = {name: case for name, case in account["cases"].items() if name in wanted}
    for name, case in account["cases"].items():
        print(show_case(name, case | {"largest": case.get("largest", [])[:top]}))
    return account


def main(arguments=None) -> int:
    """Entry."""
    args = parse(arguments)
    wanted = args.case or list(CASES)
    other = read_account(args.against) if args.against else None
    if other is not None:
        shared_cases(wanted, other["cases"], relative(args.against))
    account = show_file(args.read, wanted, args.top) if args.read else measure(args, wanted)
    if args.json:
        write_atomic(Path(args.json), json.dumps(account, indent=1) + "\n")
        print(f"wrote {relative(args.json)}")
    if other is not None:
        print(compare(account["cases"], other["cases"], relative(args.against)))
    return 0


if __name__ == "__main__":
    run_cli(main)
