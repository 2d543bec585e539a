"""Will this machine complete a run? OK, WARN or FAIL for each need, with a remedy, in a minute.

    python tools/doctor.py                 # everything, with the settings of the environment
    python tools/doctor.py --quick         # without the rehearsal of a whole tiny run
    python tools/doctor.py --json          # the same for programs

Looked at: Python and packages, GPUs (count, kind, clock, temperature, other users),
matrix and memory speed against what the GPU should give, links between GPUs, the
attention backend and why, disk, memory, settings and data, and a rehearsal: train,
quantise, pack, read back, score and adapt a tiny model in a process of its own. Exit
status: 0 when nothing failed, 1 when something did.
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

if __package__ in (None, ""):  # run as a script: make `tools` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import ROOT, SCRIPT, ToolError, command_line, run_cli

OK, WARN, FAIL = "OK", "WARN", "FAIL"
# What a healthy GPU gives: bfloat16 TFLOP/s on 4096 x 4096 x 4096, GB/s copying, boost clock in MHz.
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
SLOW, FAR_TOO_SLOW = 0.9, 0.75  # shares of the above: below the first WARN, below the second FAIL
LINK_GBPS, HOT_CELSIUS = 150, 83  # bus bandwidth of an all-reduce over NVLink; warm but not throttled
HOST_BYTES_PER_RANK, REHEARSAL_SECONDS = 6 << 30, 45
TINY = dict(NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=2, NUM_KV_HEADS=1, MLP_MULT=2, VOCAB_SIZE=300,
            LOOP_START=1, LOOP_END=2, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4, CASEOPS_ENABLED=0,
            TRAIN_BATCH_TOKENS=1024, GRAD_ACCUM_STEPS=1, TRAIN_SEQ_LEN=64, MAX_WALLCLOCK_SECONDS=0,
            ITERATIONS=2, WARMUP_STEPS=1, EVAL_SEQ_LEN=64, EVAL_STRIDE=32, TTT_EVAL_SEQ_LEN=64,
            TTT_BATCH_SIZE=4, TTT_CHUNK_SIZE=32, TTT_LORA_RANK=4, TTT_LORA_ALPHA=8, COMPILE=0,
            PHASED_TTT_PREFIX_DOCS=4, PHASED_TTT_NUM_PHASES=1, GLOBAL_TTT_CHUNK_TOKENS=64,
            GLOBAL_TTT_BATCH_SEQS=2, GPTQ_CALIBRATION_BATCHES=1, VAL_BATCH_TOKENS=2048, VAL_LOSS_EVERY=0)


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    state: str
    what: str
    found: str
    remedy: str = ""


# --- software


def check_python() -> list[Finding]:
    """Python's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 10)
    return [Finding(OK if good else FAIL, "python", found, "" if good else "install Python 3.10 or later")]


def check_packages() -> list[Finding]:
    """Every package of requirements.txt: there, importable, and the tested version."""
    out = []
    gpu = bool(gpu_rows())
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, _, wanted = line.split("#")[0].strip().partition("==")
        if not name or (name.startswith("flash-attn") and not gpu):
            continue
        try:
            have = metadata.version(name)
            if not name.startswith("flash-attn"):  # the attention check runs those
                __import__({"sentencepiece": "sentencepiece"}.get(name, name.replace("-", "_")))
        except metadata.PackageNotFoundError:
            state = WARN if name.startswith("flash-attn") else FAIL
            out.append(Finding(state, name, "not installed", f"pip install {name}=={wanted}"))
            continue
        except Exception as error:  # a broken wheel raises anything
            out.append(Finding(FAIL, name, f"{have}, cannot be imported: {brief(error)}",
                               f"pip install --force-reinstall {name}=={wanted}"))
            continue
        same = have.split("+")[0] == wanted
        out.append(Finding(OK if same else WARN, name, have,
                           "" if same else f"tested with {wanted}; results may differ slightly"))
    return out


def brief(error: BaseException | str, length: int = 160) -> str:
    """The first line of an error, not too long."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:length]


# --- GPUs


def gpu_rows() -> list[dict]:
    """What nvidia-smi says about every GPU; empty without one."""
    keys = ("index", "name", "temperature.gpu", "clocks.max.sm", "memory.total", "memory.used", "power.limit",
            "clocks_throttle_reasons.hw_thermal_slowdown", "driver_version")
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(keys)}",
                               "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [dict(zip(keys, (c.strip() for c in line.split(",")), strict=False))
            for line in done.stdout.splitlines() if line.strip()]


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
        return [Finding(WARN, "GPU", "none found", "a CPU runs the demo; for a real run rent 8 x H100 SXM")]
    names = sorted({r["name"] for r in rows})
    eight = len(rows) == 8 and all("H100" in n for n in names)
    out = [Finding(OK if eight else WARN, "GPU",
                   f"{len(rows)} x {', '.join(names)}, driver {rows[0]['driver_version']}",
                   "" if eight else "the record track is 8 x H100; elsewhere a run is a study")]
    for r in rows:
        label = f"GPU {r['index']}"
        if (number(r["temperature.gpu"]) > HOT_CELSIUS
            or "Active" == r["clocks_throttle_reasons.hw_thermal_slowdown"]):
            out.append(Finding(WARN, label, f"{r['temperature.gpu']} °C",
                               "it throttles: let it cool or take another pod"))
        if number(r["memory.used"]) > 1024:
            out.append(Finding(FAIL, label, f"{r['memory.used']} MiB are in use",
                               "end the process that uses it (nvidia-smi)"))
        healthy = healthy_of(r["name"])
        if healthy and number(r["clocks.max.sm"], healthy[2]) < 0.97 * healthy[2]:
            out.append(Finding(WARN, label, f"clock limited to {r['clocks.max.sm']} MHz of {healthy[2]}",
                               "the host limits it: take another pod"))
    return out


def healthy_of(name: str) -> tuple | None:
    """What a GPU of this name should give."""
    longest_first = sorted(HEALTHY, key=len, reverse=True)      # GH200 is no H200
    return next((HEALTHY[part] for part in longest_first if part in name), None)


def milliseconds(run: Callable, sync: Callable, repeats: int = 20) -> float:
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
    cuda = device.type == "cuda"
    n, dtype = (4096, torch.bfloat16) if cuda else (1024, torch.float32)
    sync = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * n**3 / milliseconds(lambda: a @ b, sync, 20 if cuda else 5) / 1e9
    x = torch.empty((1 << 30) if cuda else (1 << 26), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copied = 2 * x.numel() / milliseconds(lambda: y.copy_(x), sync, 20 if cuda else 5) / 1e6
    return flops, copied


def judge(what: str, figure: float, unit: str, expected: float | None) -> Finding:
    """A measured speed against the healthy one."""
    if expected is None:
        return Finding(OK, what, f"{figure:.3g} {unit} (nothing to compare with)")
    share = figure / expected
    state = OK if share >= SLOW else WARN if share >= FAR_TOO_SLOW else FAIL
    remedy = "" if state == OK else "this pod is slow and will lose steps: take another one"
    return Finding(state, what, f"{figure:.3g} {unit}, a healthy one gives {expected:g} ({share:.0%})",
                   remedy)


def check_speed() -> list[Finding]:
    """Matrix and memory speed of every GPU, or of the CPU."""
    import torch

    if not torch.cuda.is_available():
        if gpu_rows():
            return [Finding(FAIL, "torch and GPU", f"torch {torch.__version__} sees no GPU, nvidia-smi does",
                            "install a torch wheel for this driver's CUDA version")]
        flops, copied = speeds(torch, torch.device("cpu"))
        return [judge(f"CPU, {torch.get_num_threads()} threads: matrix", 1e3 * flops, "GFLOP/s", None),
                judge("CPU: memory", copied, "GB/s", None)]
    out = []
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        flops, copied = speeds(torch, device)
        healthy = healthy_of(torch.cuda.get_device_name(i)) or (None, None, None)
        out += [judge(f"GPU {i}: matrix", flops, "TFLOP/s", healthy[0]),
                judge(f"GPU {i}: memory", copied, "GB/s", healthy[1])]
    return out


LINK_PROGRAM = """
import os, time, torch, torch.distributed as dist
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
x = torch.ones(64 << 20, dtype=torch.bfloat16, device="cuda")
for _ in range(5): dist.all_reduce(x)
torch.cuda.synchronize(); begin = time.perf_counter()
for _ in range(20): dist.all_reduce(x)
torch.cuda.synchronize(); seconds = (time.perf_counter() - begin) / 20
if rank == 0: print("GBPS", 2 * (size - 1) / size * x.numel() * 2 / seconds / 1e9)
dist.destroy_process_group()
"""


def check_links() -> list[Finding]:
    """Bus bandwidth of an all-reduce of 128 MiB over all GPUs, in processes of their own."""
    count = len(gpu_rows())
    if count < 2:
        return []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "link.py"
        program.write_text(LINK_PROGRAM)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               f"--nproc_per_node={count}", str(program)], capture_output=True, text=True,
                              timeout=60)
    found = re.search(r"GBPS ([\d.]+)", done.stdout)
    if not found:
        return [Finding(FAIL, "links (NCCL)", brief((done.stderr.strip().splitlines() or ["no result"])[-1]),
                        "try NCCL_IB_DISABLE=1, or NCCL_NET=Socket; NCCL_DEBUG=INFO says more")]
    speed = float(found[1])
    good = speed >= LINK_GBPS
    return [
        Finding(
            OK if good else WARN,
            "links (NCCL)",
            f"{speed:.0f} GB/s all-reduce over {count} GPUs",
            ""
            if good
            else f"below {LINK_GBPS} GB/s: no NVLink, or NCCL chose badly; NCCL_DEBUG=INFO says which",
        )
    ]


# --- what the trainer says


def check_attention() -> list[Finding]:
    """The backend that would be used, and why."""
    import torch

    tg = trainer()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        name, why = tg.resolve_attention(os.environ.get("ATTN_BACKEND", "auto"), device)
    except tg.UserError as error:
        return [Finding(FAIL, "attention", brief(error), "ATTN_BACKEND=auto")]
    if device.type == "cpu":
        return [Finding(OK, "attention", f"{name}; the others need a CUDA GPU")]
    slow = name in ("torch", "plain")
    why = why.removeprefix(f"attention {name} ").strip()
    return [Finding(WARN if slow else OK, "attention", f"{name} {why}",
                    "install flash-attn (requirements.txt): steps are slower without it" if slow else "")]


def trainer():
    """train_gpt as a module; importing it does no work."""
    sys.path.insert(0, str(ROOT))
    import train_gpt

    return train_gpt


def check_settings_and_data() -> list[Finding]:
    """`train_gpt.py --check` with the present environment: one finding per line of it,
    a fault once."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    out = []
    for line in done.stdout.splitlines():
        state, _, rest = line.partition(" ")
        what, _, detail = rest.strip().partition(": ")
        if what not in ("device", "attention") and state in ("ok", "FAIL"):
            text, _, remedy = detail.partition("; ") if state == "FAIL" else (detail, "", "")
            if "does not exist" in text and not gpu_rows():
                remedy = "for the demo: python data/demo.py, then set -a; . configs/demo.env; set +a"
            if text not in [f.found for f in out if f.state == FAIL]:
                out.append(Finding(OK if state == "ok" else FAIL, what, text, remedy))
    if done.returncode == 2 or not out:
        said = (done.stderr.strip() or done.stdout.strip() or "no answer").splitlines()[-1]
        out.append(Finding(FAIL, "settings", brief(said.removeprefix("error: ")),
                           "correct it in the environment"))
    return out


def check_memory() -> list[Finding]:
    """Host memory: loaders, Hessians and the packer of every rank."""
    try:
        info = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(), re.M))
        free = 1024 * int(info["MemAvailable"])
    except (OSError, KeyError):
        return [Finding(OK, "memory", "not known on this system")]
    need = HOST_BYTES_PER_RANK * max(len(gpu_rows()), 1)
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    out = [Finding(OK if free >= need else WARN, "memory", f"{free / 2**30:.0f} GiB free",
                   "" if free >= need else f"a full run likes {need / 2**30:.0f} GiB: end other programs")]
    if shm and shm < (64 << 20):
        out.append(Finding(WARN, "/dev/shm", f"{shm >> 20} MiB",
                           "start the container with --shm-size=1g: NCCL uses it"))
    return out


# --- the rehearsal


def tiny_data(folder: Path) -> dict:
    """Made-up shards and a byte tokenizer; the settings that name them."""
    import numpy as np
    import sentencepiece

    tg, rng = trainer(), np.random.default_rng(0)
    for name, documents in (("train_000000", 40), ("val_000000", 8)):
        tokens = np.concatenate([np.append(tg.BOS, np.resize(rng.integers(4, 300, 9), rng.integers(20, 120)))
                                 for _ in range(documents)])
        header = np.zeros(tg.SHARD_HEADER, "<i4")
        header[:3] = tg.SHARD_MAGIC, 1, len(tokens)
        (folder / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    (folder / "text").write_text("words to train a tokenizer with " * 50)
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"),
                                             model_prefix=str(folder / "tokenizer"), vocab_size=300,
                                             byte_fallback=True, model_type="bpe", pad_id=0, bos_id=1,
                                             eos_id=2, unk_id=3, minloglevel=2)
    # a corpus of its own, or the script would take it for a broken part of FineWeb
    subprocess.run([sys.executable, ROOT / "data" / "check.py", folder, "--custom", "--write-manifest"],
                   check=True, capture_output=True)
    return {"DATA_PATH": folder, "TOKENIZER_PATH": folder / "tokenizer.model", "ARTIFACT_DIR": folder / "run"}


def check_rehearsal() -> list[Finding]:
    """Every stage of a run at tiny size, through the real command."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        own = {f.name.upper() for f in trainer().fields(trainer().Settings)}
        env = {k: v for k, v in os.environ.items() if k not in own}
        env.update({k: str(v) for k, v in {**TINY, **tiny_data(folder), "OMP_NUM_THREADS": 1}.items()})
        for name in ("ATTN_BACKEND", "COMPUTE_DTYPE"):
            if name in os.environ:
                env[name] = os.environ[name]
        try:
            done = subprocess.run([sys.executable, str(SCRIPT)], env=env, cwd=ROOT, capture_output=True,
                                  text=True, timeout=REHEARSAL_SECONDS)
        except subprocess.TimeoutExpired:
            return [Finding(FAIL, "rehearsal", f"not done after {REHEARSAL_SECONDS} s",
                            "the machine hangs or is very busy: end other programs, or take another")]
        seconds = time.perf_counter() - begin
        if done.returncode == 0 and (folder / "run" / "summary.json").is_file():
            return [Finding(OK, "rehearsal",
                            f"train, quantise, pack, read back, score, adapt: all ran, {seconds:.0f} s")]
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    said = next((line for line in lines if re.match(r"(error: |\w*Error\b)", line)), lines[-1])
    return [Finding(FAIL, "rehearsal", brief(said), "a real run would fail there, too: repair that first")]


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


def examine(quick: bool) -> list[Finding]:
    """Every check; one that breaks is itself a finding."""
    out = []
    for what, check in CHECKS.items():
        if quick and what in ("rehearsal", "links", "speed"):
            continue
        try:
            out += check()
        except SystemExit as error:
            out.append(Finding(FAIL, what, brief(error), "pip install -r requirements.txt"))
        except Exception as error:  # whatever breaks here would break a run
            out.append(Finding(FAIL, what, f"{type(error).__name__}: {brief(error)}", "repair this first"))
    return out


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true",
                        help="only what takes a few seconds: no speed, no rehearsal")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    if not SCRIPT.is_file():
        raise ToolError(f"{SCRIPT.name} is not beside tools/: run the doctor of a whole checkout")
    begin = time.perf_counter()
    findings = examine(args.quick)
    count = {state: sum(f.state == state for f in findings) for state in (OK, WARN, FAIL)}
    if args.json:
        print(json.dumps({"findings": [asdict(f) for f in findings],
                          **{k.lower(): n for k, n in count.items()}}))
    else:
        paint = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m"} if sys.stdout.isatty() else {}
        for f in findings:
            colour, plain = (paint[f.state], "\033[0m") if paint else ("", "")
            whole = {"width": 82, "break_long_words": False, "break_on_hyphens": False}
            lines = textwrap.wrap(f.found, **whole) + textwrap.wrap(f.remedy, initial_indent="-> ", **whole)
            print(f"{colour}{f.state:5}{plain}{f.what:28}" + ("\n" + 33 * " ").join(lines))
        print(
            f"\n{count[OK]} OK, {count[WARN]} WARN, {count[FAIL]} FAIL, {time.perf_counter() - begin:.0f} s: "
            + ("this machine will not complete a run as it is" if count[FAIL] else "ready"))
    return int(count[FAIL] > 0)


if __name__ == "__main__":
    run_cli(main)
