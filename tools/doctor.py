"""Will this machine complete a run? OK, WARN or FAIL for each need, and a remedy.

    python tools/doctor.py            # everything, with the settings of the environment
    python tools/doctor.py --quick    # without the rehearsal of a whole tiny run
    python tools/doctor.py --no-data  # before the shards are fetched
    python tools/doctor.py --json     # the same for programs

Looked at: Python and packages, GPUs (count, kind, clock, temperature, other users),
matrix and memory speed against what the GPU should give, links between GPUs, the
attention backend and why, disk, memory, settings and data, and a rehearsal: train,
quantise, pack, read back, score and adapt a tiny model in a process of its own.

Exit status: 0 when nothing failed, 1 when something did.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Callable

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import ROOT, SCRIPT, ToolError, command_line, run_cli, write_shard

OK, WARN, FAIL = "OK", "WARN", "FAIL"
PAINT = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m"}
GPU_KEYS = (  # what is asked of nvidia-smi
    "index",
    "name",
    "temperature.gpu",
    "clocks.max.sm",
    "memory.total",
    "memory.used",
    "power.limit",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "driver_version",
)
# What a healthy GPU gives: bfloat16 TFLOP/s on 4096 x 4096 x 4096, GB/s copying,
# boost clock in MHz.
HEALTHY = {
    "H100 PCIe": (330, 1400, 1755),
    "H100": (560, 2500, 1980),
    "H200": (560, 3700, 1980),
    "GH200": (560, 3000, 1980),
    "B200": (1100, 5500, 1965),
    "A100": (220, 1300, 1410),
    "L40": (110, 650, 2490),
    "RTX 4090": (130, 800, 2520),
}
SLOW = 0.9  # share of the above: below it WARN
FAR_TOO_SLOW = 0.75  # below it FAIL
LINK_GBPS = 150  # bus bandwidth of an all-reduce over NVLink
HOT_CELSIUS = 83  # warm but not throttled
HOST_BYTES_PER_RANK = 6 << 30
REHEARSAL_SECONDS = 150
OF_DATA = ("training shards", "validation shards", "tokenizer", "data fingerprint")  # rows
TINY = dict(
    NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=2, NUM_KV_HEADS=1, MLP_MULT=2, VOCAB_SIZE=300,
    LOOP_START=1, LOOP_END=2, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4,
    CASEOPS_ENABLED=0, TRAIN_BATCH_TOKENS=1024, GRAD_ACCUM_STEPS=1, TRAIN_SEQ_LEN=64,
    MAX_WALLCLOCK_SECONDS=0, ITERATIONS=2, WARMUP_STEPS=1, COMPILE=0,
    VAL_BATCH_TOKENS=2048, VAL_LOSS_EVERY=0, GPTQ_CALIBRATION_BATCHES=1,
    EVAL_SEQ_LEN=64, EVAL_STRIDE=32, TTT_EVAL_SEQ_LEN=64, TTT_BATCH_SIZE=4,
    TTT_CHUNK_SIZE=32, TTT_LORA_RANK=4, TTT_LORA_ALPHA=8, PHASED_TTT_PREFIX_DOCS=4,
    PHASED_TTT_NUM_PHASES=1, GLOBAL_TTT_CHUNK_TOKENS=64, GLOBAL_TTT_BATCH_SEQS=2,
)


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    state: str
    what: str
    found: str
    remedy: str = ""


def expect(good: bool, what: str, found: str, remedy: str, bad: str = WARN) -> Finding:
    """A row that is OK, without a remedy, where `good`, else `bad` with it."""
    return Finding(OK, what, found) if good else Finding(bad, what, found, remedy)


def ask(command: list, **options) -> subprocess.CompletedProcess:
    """Run a command to its end and keep what it says."""
    return subprocess.run(command, capture_output=True, text=True, **options)


# --- software


def check_python() -> list[Finding]:
    """Python's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 10)
    return [expect(good, "python", found, "install Python 3.10 or later", FAIL)]


def check_packages() -> list[Finding]:
    """Every package of requirements.txt: there, importable, and the tested version."""
    out = []
    gpu = bool(gpu_rows())
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, _, wanted = line.split("#")[0].strip().partition("==")
        if name and (gpu or not name.startswith("flash-attn")):
            out.append(check_package(name, wanted))
    return out


def check_package(name: str, wanted: str) -> Finding:
    """One package. Attention kernels are run, not imported, by their own check."""
    kernels = name.startswith("flash-attn")
    install = f"{name}=={wanted}"
    have = ""
    try:
        have = metadata.version(name)
        if not kernels:
            __import__(name.replace("-", "_"))
    except metadata.PackageNotFoundError:
        state = WARN if kernels else FAIL
        return Finding(state, name, "not installed", f"pip install {install}")
    except Exception as error:  # a broken wheel raises anything
        found = f"{have}, cannot be imported: {brief(error)}"
        return Finding(FAIL, name, found, f"pip install --force-reinstall {install}")
    remedy = f"tested with {wanted}; results may differ slightly"
    return expect(have.split("+")[0] == wanted, name, have, remedy)


def brief(error: BaseException | str, length: int = 160) -> str:
    """The first line of an error, not too long."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:length]


# --- GPUs


def gpu_rows() -> list[dict]:
    """What nvidia-smi says about every GPU; empty without one."""
    query = f"--query-gpu={','.join(GPU_KEYS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = ask(command, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = []
    for line in done.stdout.splitlines():
        if line.strip():
            cells = [cell.strip() for cell in line.split(",")]
            rows.append(dict(zip(GPU_KEYS, cells)))
    return rows


def number(text: str, default: float = 0.0) -> float:
    """A figure of nvidia-smi, which may say [N/A]."""
    try:
        return float(text)
    except ValueError:
        return default


def check_gpus() -> list[Finding]:
    """Count, kind, temperature, clock, and whether someone else uses them."""
    rows = gpu_rows()
    if not rows:
        remedy = "a CPU runs the demo; for a real run rent 8 x H100 SXM"
        return [Finding(WARN, "GPU", "none found", remedy)]
    names = sorted({r["name"] for r in rows})
    eight = len(rows) == 8 and all("H100" in n for n in names)
    found = f"{len(rows)} x {', '.join(names)}, driver {rows[0]['driver_version']}"
    remedy = "the record track is 8 x H100; elsewhere a run is a study"
    out = [expect(eight, "GPU", found, remedy)]
    for row in rows:
        out += check_gpu(row)
    return out


def check_gpu(row: dict) -> list[Finding]:
    """What is wrong with one GPU, by its row of nvidia-smi."""
    label = f"GPU {row['index']}"
    celsius, used, clock = (
        row["temperature.gpu"], row["memory.used"], row["clocks.max.sm"])
    throttled = row["clocks_throttle_reasons.hw_thermal_slowdown"] == "Active"
    out = []
    if throttled or number(celsius) > HOT_CELSIUS:
        remedy = "it throttles: let it cool or take another pod"
        out.append(Finding(WARN, label, f"{celsius} °C", remedy))
    if number(used) > 1024:
        remedy = "end the process that uses it (nvidia-smi)"
        out.append(Finding(FAIL, label, f"{used} MiB are in use", remedy))
    healthy = healthy_of(row["name"])
    if healthy and number(clock, healthy[2]) < 0.97 * healthy[2]:
        found = f"clock limited to {clock} MHz of {healthy[2]}"
        remedy = "the host limits it: take another pod"
        out.append(Finding(WARN, label, found, remedy))
    return out


def healthy_of(name: str) -> tuple | None:
    """What a GPU of this name should give."""
    for part in sorted(HEALTHY, key=len, reverse=True):  # longest first: GH200 is no H200
        if part in name:
            return HEALTHY[part]
    return None


def milliseconds(run: Callable, sync: Callable, repeats: int) -> float:
    """Median time of run()."""
    times = []
    for _ in range(3):
        run()
    for _ in range(repeats):
        sync()
        begin = time.perf_counter()
        run()
        sync()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


def speeds(torch, device) -> tuple[float, float]:
    """(TFLOP/s of a matrix product, GB/s of a copy) of one device."""
    if device.type == "cuda":
        n, dtype, nbytes, repeats = 4096, torch.bfloat16, 1 << 30, 20
    else:
        n, dtype, nbytes, repeats = 1024, torch.float32, 1 << 26, 5

    def sync():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    flops = 2 * n**3 / milliseconds(lambda: a @ b, sync, repeats) / 1e9
    x = torch.empty(nbytes, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copied = 2 * nbytes / milliseconds(lambda: y.copy_(x), sync, repeats) / 1e6
    return flops, copied


def judge(what: str, figure: float, unit: str, expected: float | None) -> Finding:
    """A measured speed against the healthy one."""
    found = f"{figure:.3g} {unit}"
    if expected is None:
        return Finding(OK, what, f"{found} (nothing to compare with)")
    share = figure / expected
    found += f", a healthy one gives {expected:g} ({share:.0%})"
    remedy = "this pod is slow and will lose steps: take another one"
    bad = WARN if share >= FAR_TOO_SLOW else FAIL
    return expect(share >= SLOW, what, found, remedy, bad)


def check_speed() -> list[Finding]:
    """Matrix and memory speed of every GPU, or of the CPU."""
    import torch

    if not torch.cuda.is_available():
        if gpu_rows():
            found = f"torch {torch.__version__} sees no GPU, nvidia-smi does"
            remedy = "install a torch wheel for this driver's CUDA version"
            return [Finding(FAIL, "torch and GPU", found, remedy)]
        flops, copied = speeds(torch, torch.device("cpu"))
        threads = torch.get_num_threads()
        return [
            judge(f"CPU, {threads} threads: matrix", 1e3 * flops, "GFLOP/s", None),
            judge("CPU: memory", copied, "GB/s", None),
        ]
    out = []
    for i in range(torch.cuda.device_count()):
        flops, copied = speeds(torch, torch.device("cuda", i))
        healthy = healthy_of(torch.cuda.get_device_name(i)) or (None, None, None)
        out.append(judge(f"GPU {i}: matrix", flops, "TFLOP/s", healthy[0]))
        out.append(judge(f"GPU {i}: memory", copied, "GB/s", healthy[1]))
    return out


LINK_PROGRAM = """
import os, time, torch, torch.distributed as dist
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
x = torch.ones(64 << 20, dtype=torch.bfloat16, device="cuda")
for _ in range(5):
    dist.all_reduce(x)
torch.cuda.synchronize()
begin = time.perf_counter()
for _ in range(20):
    dist.all_reduce(x)
torch.cuda.synchronize()
seconds = (time.perf_counter() - begin) / 20
moved = 2 * (size - 1) / size * x.numel() * 2
if rank == 0:
    print("GBPS", moved / seconds / 1e9)
dist.destroy_process_group()
"""


def check_links() -> list[Finding]:
    """Bus bandwidth of an all-reduce of 128 MiB over all GPUs, in its own processes."""
    count = len(gpu_rows())
    if count < 2:
        return []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "link.py"
        program.write_text(LINK_PROGRAM)
        command = [*launcher, f"--nproc_per_node={count}", str(program)]
        done = ask(command, timeout=60)
    what = "links (NCCL)"
    figure = re.search(r"GBPS ([\d.]+)", done.stdout)
    if not figure:
        said = (done.stderr.strip() or "no result").splitlines()[-1]
        remedy = "try NCCL_IB_DISABLE=1, or NCCL_NET=Socket; NCCL_DEBUG=INFO says more"
        return [Finding(FAIL, what, brief(said), remedy)]
    speed = float(figure[1])
    found = f"{speed:.0f} GB/s all-reduce over {count} GPUs"
    remedy = (f"below {LINK_GBPS} GB/s: no NVLink, or NCCL chose badly; "
              "NCCL_DEBUG=INFO says which")
    return [expect(speed >= LINK_GBPS, what, found, remedy)]


# --- what the trainer says


def check_attention() -> list[Finding]:
    """The backend that would be used, and why."""
    import torch

    tg = trainer()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    wanted = os.environ.get("ATTN_BACKEND", "auto")
    try:
        name, why = tg.resolve_attention(wanted, device)
    except tg.UserError as error:
        remedy = "pip install -r requirements.txt" if wanted == "auto" else "ATTN_BACKEND=auto"
        return [Finding(FAIL, "attention", brief(error), remedy)]
    if not gpu:
        return [Finding(OK, "attention", f"{name}; the others need a CUDA GPU")]
    fast = name not in ("torch", "plain")
    why = why.removeprefix(f"attention {name} ").strip()
    remedy = "install flash-attn (requirements.txt): steps are slower without it"
    return [expect(fast, "attention", f"{name} {why}", remedy)]


def read_check_line(line: str) -> Finding | None:
    """A line of `--check` as a row; None for lines that other checks speak about."""
    state, _, rest = line.partition(" ")
    what, _, detail = rest.strip().partition(": ")
    if what in ("device", "attention") or state not in ("ok", "FAIL"):
        return None
    if state == "FAIL":
        state, (found, _, remedy) = FAIL, detail.partition("; ")
    else:
        state, found, remedy = OK, detail, ""
    if "does not exist" in found and not gpu_rows():
        remedy = ("for the demo: python data/demo.py, "
                  "then set -a; . configs/demo.env; set +a")
    return Finding(state, what, found, remedy)


def trainer():
    """train_gpt as a module; importing it does no work."""
    sys.path.insert(0, str(ROOT))
    import train_gpt

    return train_gpt


def check_settings_and_data() -> list[Finding]:
    """`train_gpt.py --check` in this environment: a finding per line, a fault once."""
    done = ask([sys.executable, str(SCRIPT), "--check"], cwd=ROOT, timeout=120)
    out = []
    failed = set()
    for line in done.stdout.splitlines():
        row = read_check_line(line)
        if row is None or row.found in failed:
            continue
        out.append(row)
        if row.state == FAIL:
            failed.add(row.found)
    if done.returncode == 2 or not out:
        said = (done.stderr.strip() or done.stdout.strip() or "no answer").splitlines()
        found = brief(said[-1].removeprefix("error: "))
        out.append(Finding(FAIL, "settings", found, "correct it in the environment"))
    return out


def check_memory() -> list[Finding]:
    """Host memory: loaders, Hessians and the packer of every rank."""
    try:
        text = Path("/proc/meminfo").read_text()
        info = dict(re.findall(r"^(\w+):\s+(\d+)", text, re.M))
        free = 1024 * int(info["MemAvailable"])
    except (OSError, KeyError):
        return [Finding(OK, "memory", "not known on this system")]
    wanted = HOST_BYTES_PER_RANK * max(len(gpu_rows()), 1)
    found = f"{free / 2**30:.0f} GiB free"
    remedy = f"a full run likes {wanted / 2**30:.0f} GiB: end other programs"
    out = [expect(free >= wanted, "memory", found, remedy)]
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    if size and size < (64 << 20):
        remedy = "start the container with --shm-size=1g: NCCL uses it"
        out.append(Finding(WARN, "/dev/shm", f"{size >> 20} MiB", remedy))
    return out


# --- the rehearsal


def tiny_data(folder: Path) -> dict:
    """Made-up shards and a byte tokenizer; the settings that name them."""
    import numpy as np
    import sentencepiece

    tg = trainer()
    rng = np.random.default_rng(0)

    def document():
        words = rng.integers(4, 300, 9)
        return np.append(tg.BOS, np.resize(words, rng.integers(20, 120)))

    for name, count in (("train_000000", 40), ("val_000000", 8)):
        tokens = np.concatenate([document() for _ in range(count)])
        write_shard(tg, folder / f"fineweb_{name}.bin", tokens)
    text = folder / "text"
    text.write_text("words to train a tokenizer with " * 50)
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        **ids,
    )
    # a corpus of its own, or the script would take it for a broken part of FineWeb
    tool = ROOT / "data" / "check.py"
    command = [sys.executable, tool, folder, "--custom", "--write-manifest"]
    ask(command, check=True)
    return {
        "DATA_PATH": folder,
        "TOKENIZER_PATH": folder / "tokenizer.model",
        "ARTIFACT_DIR": folder / "run",
    }


def rehearsal_environment(folder: Path) -> dict[str, str]:
    """The environment with tiny settings; the caller's choice of hardware stays."""
    tg = trainer()
    own = {f.name.upper() for f in tg.fields(tg.Settings)} - {
        "ATTN_BACKEND", "COMPUTE_DTYPE"}
    env = {k: v for k, v in os.environ.items() if k not in own}
    settings = {**TINY, **tiny_data(folder), "OMP_NUM_THREADS": 1}
    return env | {k: str(v) for k, v in settings.items()}


def check_rehearsal() -> list[Finding]:
    """Every stage of a run at tiny size, through the real command."""
    what = "rehearsal"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        env = rehearsal_environment(folder)
        command = [sys.executable, str(SCRIPT)]
        try:
            done = ask(command, env=env, cwd=ROOT, timeout=REHEARSAL_SECONDS)
        except subprocess.TimeoutExpired:
            found = f"not done after {REHEARSAL_SECONDS} s"
            remedy = ("the machine hangs or is very busy: "
                      "end other programs, or take another")
            return [Finding(FAIL, what, found, remedy)]
        seconds = time.perf_counter() - begin
        if done.returncode == 0 and (folder / "run" / "summary.json").is_file():
            stages = "train, quantise, pack, read back, score, adapt"
            return [Finding(OK, what, f"{stages}: all ran, {seconds:.0f} s")]
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    errors = [line for line in lines if re.match(r"(error: |\w*Error\b)", line)]
    said = (errors or lines[-1:])[0]
    remedy = "a real run would fail there, too: repair that first"
    return [Finding(FAIL, what, brief(said), remedy)]


CHECKS: dict[str, Callable] = {
    "python": check_python,
    "packages": check_packages,
    "GPU": check_gpus,
    "memory": check_memory,
    "speed": check_speed,
    "links": check_links,
    "attention": check_attention,
    "settings and data": check_settings_and_data,
    "rehearsal": check_rehearsal,
}


def examine(quick: bool, data: bool = True) -> list[Finding]:
    """Every check; one that breaks is itself a finding. data: judge the shards, too."""
    out = []
    for what, check in CHECKS.items():
        if quick and what in ("rehearsal", "links", "speed"):
            continue
        try:
            out += check()
        except SystemExit as error:
            remedy = "pip install -r requirements.txt"
            out.append(Finding(FAIL, what, brief(error), remedy))
        except Exception as error:  # whatever breaks here would break a run
            found = f"{type(error).__name__}: {brief(error)}"
            out.append(Finding(FAIL, what, found, "repair this first"))
    return [finding for finding in out if data or finding.what not in OF_DATA]


def shown(finding: Finding, coloured: bool) -> str:
    """A row for the screen, wrapped; the remedy stands on lines of its own."""
    state = f"{finding.state:5}"
    if coloured:
        state = f"{PAINT[finding.state]}{state}\033[0m"
    wrap = textwrap.TextWrapper(82, break_long_words=False, break_on_hyphens=False)
    lines = wrap.wrap(finding.found)
    wrap.initial_indent = "-> "
    lines += wrap.wrap(finding.remedy)
    return f"{state}{finding.what:28}" + ("\n" + 33 * " ").join(lines)


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true",
        help="only what takes a few seconds: no speed, no rehearsal")
    add("--no-data", action="store_true", help="without shards and tokenizer")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    if not SCRIPT.is_file():
        raise ToolError(f"{SCRIPT.name} is not beside tools/: "
                        "run the doctor of a whole checkout")
    begin = time.perf_counter()
    findings = examine(args.quick, not args.no_data)
    states = [f.state for f in findings]
    count = {state: states.count(state) for state in (OK, WARN, FAIL)}
    if args.json:
        figures = {"findings": [asdict(f) for f in findings]}
        figures |= {state.lower(): n for state, n in count.items()}
        print(json.dumps(figures))
    else:
        for finding in findings:
            print(shown(finding, sys.stdout.isatty()))
        seconds = time.perf_counter() - begin
        verdict = "ready"
        if count[FAIL]:
            verdict = "this machine will not complete a run as it is"
        counts = ", ".join(f"{n} {state}" for state, n in count.items())
        print(f"\n{counts}, {seconds:.0f} s: {verdict}")
    return int(count[FAIL] > 0)


if __name__ == "__main__":
    run_cli(main)
