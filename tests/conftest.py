"""What the tests share: a tiny model's settings, made-up shards, the script run as a user would, and
readers of what it leaves."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined: before the import
torch.set_num_threads(1)

import fixtures  # noqa: E402

import train_gpt as tg  # noqa: E402
from data import check  # noqa: E402

TINY = dict(
    NUM_LAYERS=4,
    MODEL_DIM=64,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    MLP_MULT=2,
    VOCAB_SIZE=300,
    LOOP_START=1,
    LOOP_END=2,
    NUM_LOOPS=1,
    PARALLEL_START_LAYER=3,
    XSA_LAST_N=4,
    CASEOPS_ENABLED=0,
    TRAIN_BATCH_TOKENS=1024,
    GRAD_ACCUM_STEPS=1,
    TRAIN_SEQ_LEN=64,
    MAX_WALLCLOCK_SECONDS=0,
    ITERATIONS=4,
    WARMUP_STEPS=1,
    EVAL_SEQ_LEN=64,
    EVAL_STRIDE=16,
    TTT_EVAL_SEQ_LEN=64,
    TTT_BATCH_SIZE=4,
    TTT_CHUNK_SIZE=16,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=8,
    TTT_LORA_LR=0.01,
    TTT_STEP_SHARE=0,
    TTT_SUFFIX=0,
    PHASED_TTT_PREFIX_DOCS=4,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=64,
    GLOBAL_TTT_BATCH_SEQS=2,
    GPTQ_CALIBRATION_BATCHES=2,
    MATRIX_BITS=6,
    VAL_BATCH_TOKENS=2048,
    EMA_DECAY=0.5,
    CODE_FORM="readable",  # nothing to compress before every run
)


# Mechanisms of the published systems that are off by default.
TABLES = dict(
    BIGRAM_VOCAB_SIZE=50, BIGRAM_DIM=12, VE_ENABLED=1, VE_DIM=10, VE_LAYERS="1,3", SMEAR_GATE_KIND="channels"
)


LANES = dict(PARALLEL_LANES="separate", PARALLEL_START_LAYER=2, SKIP_ROWS="physical")

# Two layers, one in a loop and one with parallel lanes, where the number of layers plays no part.
SHALLOW = dict(NUM_LAYERS=2, LOOP_START=0, LOOP_END=0, PARALLEL_START_LAYER=1, XSA_LAST_N=2)

# What is traced takes its time by the layer.
FEW_LAYERS = dict(SHALLOW, TTT_BATCH_SIZE=8, TTT_SHORT_SCORE_FIRST_STEPS="32:8", TTT_LORA_LR=0.001)

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.env") if p.stem not in ("demo", "small"))


# --- settings, models and made-up data


def load_config(*names: str) -> dict:
    """What a shell has in its environment after sourcing these configs/*.env one after the other."""
    lines = [f". {ROOT}/configs/{name}.env" for name in names]
    done = subprocess.run(["sh", "-ec", "\n".join(["set -a", *lines, "env -0"])], env={}, text=True,
                          capture_output=True, check=True)
    pairs = (entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {k: v for k, v in pairs if k not in ("PWD", "SHLVL", "_", "OLDPWD")}


def settings(**changes) -> tg.Settings:
    """The tiny settings with some changed."""
    return settings_of(tg, **changes)


def settings_of(script, **changes):
    """The tiny settings as a script reads them."""
    return script.Settings.from_env({k: str(v) for k, v in {**TINY, **changes}.items()})


def imported(path: Path):
    """Another form of the script, as a module."""
    name = f"script_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    script = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def shallow(s: tg.Settings) -> tg.Settings:
    """The same settings with two layers."""
    return dataclasses.replace(s, **{name.lower(): value for name, value in SHALLOW.items()})


def sine_model(s: tg.Settings) -> tg.GPT:
    """A model whose weights follow a formula, so that golden numbers do not hang on a random generator."""
    model = tg.GPT(s)
    with torch.no_grad():
        for k, (_, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (0.37 + 0.11 * k) + k).view(
                p.shape
            )
            p.copy_(wave * (0.5 if p.dim() < 3 else p.shape[-1] ** -0.5))
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Drawn tokens, none of which begins a document."""
    return torch.randint(4, 300, shape, generator=torch.Generator().manual_seed(seed))


def documents(count: int, seed: int, vocab: int = 300, lo: int = 5, hi: int = 150) -> np.ndarray:
    """A token stream of `count` documents: BOS, then text that repeats itself enough to be learnable."""
    rng, out = np.random.default_rng(seed), []

    def words(n):  # few tokens are frequent, as in a language
        return np.minimum(3 + rng.geometric(0.05, n), vocab - 1)

    for _ in range(count):
        body = np.resize(words(rng.integers(3, 12)), rng.integers(lo, hi))
        out += [np.array([tg.BOS]), np.where(rng.random(len(body)) < 0.1, words(len(body)), body)]
    return np.concatenate(out).astype(np.uint16)


def write_shard(
    path: Path, tokens: np.ndarray, magic: int = tg.SHARD_MAGIC, count: int | None = None
) -> Path:
    """A shard file; magic and count can be falsified."""
    header = np.zeros(tg.SHARD_HEADER, "<i4")
    header[:3] = magic, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def make_data(folder: Path) -> Path:
    """Training and validation shards with a byte sidecar, and a byte-fallback tokenizer of 300 tokens."""
    import sentencepiece as spm

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", documents(60, i))
    val = documents(14, 99)
    write_shard(folder / "fineweb_val_000000.bin", val)
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.where(val == tg.BOS, 0, 1))
    text = folder / "text.txt"
    text.write_text("some words to train a tokenizer with " * 50)
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes) -> None:
    """The manifest that the data tools write for shards they did not make, with some of it changed."""
    check.write_manifest(folder, None)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- order, failures and fixtures

# The longest begin: at the end no worker waits for another's last file.
FIRST = ("test_parity.py", "test_story.py", "test_ranks.py", "test_tools_audit.py", "test_probes_adapting.py",
         "test_compile_scoring.py", "test_adapt.py", "test_probes.py", "test_compile.py")


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


class FailuresAtOnce:
    """Names a test that failed when it fails, not when all are over."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED {report.nodeid}")


@pytest.hookimpl(trylast=True)      # after the terminal is there
def pytest_configure(config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:      # a worker has none
        config.pluginmanager.register(FailuresAtOnce(terminal))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def recorded():
    """Opens a folder of the packed reference numbers by its name."""
    with fixtures.FixtureSet(ROOT / "tests" / "parity") as found:
        yield found.folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three good runs, made up."""
    from made_runs import make_run  # it imports this file

    return [make_run(tmp_path / "runs" / f"s{seed}", seed, bpb)
            for seed, bpb in ((42, 60), (0, 61), (1234, 62))]


@pytest.fixture
def s(data) -> tg.Settings:
    return settings(DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model")


# --- runs, and what they leave


def environment(data: Path, **changes) -> dict:
    """The environment of a tiny run, free of the caller's own settings."""
    own = {f.name.upper() for f in tg.fields(tg.Settings)}
    base = {k: v for k, v in os.environ.items() if k not in own}
    tiny = {
        **TINY,
        "DATA_PATH": data,
        "TOKENIZER_PATH": data / "tokenizer.model",
        "OMP_NUM_THREADS": 1,
        **changes,
    }
    return {**base, **{k: str(v) for k, v in tiny.items()}}


def run_script(
    env: dict, *args: str, launcher: tuple = (), script: Path = ROOT / "train_gpt.py", timeout: float = 900
):
    """The script in a process of its own: (exit status, output)."""
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *args],
        env=env,
        cwd=ROOT,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@contextlib.contextmanager
def without(*names: str):
    """Inside, the script leaves out "rehearse" or "run_probes": seconds of every run."""
    idle = {"rehearse": 0.0, "run_probes": []}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(tg, name, lambda *_, result=idle[name]: result)
        yield


def run_here(env: dict, *args: str):
    """What run_script gives, from main in this process: the start of another takes seconds."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as screens:
        for name in set(os.environ) - set(env):
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        screens.enter_context(contextlib.redirect_stdout(shown))
        screens.enter_context(contextlib.redirect_stderr(shown))
        status = tg.main(args)
    return status, shown.getvalue()


def strict(text: str):
    """JSON without NaN; ValueError for anything else."""
    def refuse(word):
        raise ValueError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


def log_of(folder: Path) -> list[dict]:
    """The events in a run's log; ValueError for a complete line that is no strict JSON."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [strict(line) for line in lines]


def events(folder: Path, kind: str) -> list[dict]:
    """Those of one kind."""
    return [event for event in log_of(folder) if event["event"] == kind]


def open_run(folder: Path, world=None, **changes) -> tg.Run:
    """A run in a folder, with the tiny settings."""
    return tg.Run(settings(ARTIFACT_DIR=folder, **changes), world or tg.World())


def whole_run(s: tg.Settings, script=tg) -> None:
    """A run in this process, as main() has it."""
    world = script.World()
    findings = script.check_before_start(s, world, "test")
    model, val = script.build_model(s, world), script.Validation(s)
    script.pipeline(s, world, script.Run(s, world), model, val, findings)


def facts_of(path: Path) -> dict:
    """What a file of weights says of its training."""
    return torch.load(path, weights_only=True)["facts"]


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def contents(folder: Path) -> dict:
    """Name and bytes of a folder's files."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


# --- compilation as on a GPU


def masked_attention(q, k, v, cu, longest):
    """attend_plain's results without a loop over documents."""
    if cu is None:
        return tg.plain_rows(q, k, v)
    rows = [x.flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v)]
    at = torch.arange(rows[0].size(2), dtype=cu.dtype)
    document = torch.searchsorted(cu, at, right=True)
    mask = (document[:, None] == document) & (at[:, None] >= at)
    grouped = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(q.shape)


@pytest.fixture
def tracing(monkeypatch):
    """Compilation as on a GPU, by dynamo alone; yields the number of graphs made so far."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    tg.set_up(settings(), tg.World())
    # it remembers what operators give, which costs more here than it saves
    monkeypatch.setattr(torch._dynamo.config, "fake_tensor_cache_enabled", False)
    monkeypatch.setitem(tg.BACKENDS, "plain", masked_attention)
    monkeypatch.setattr(tg, "compiles", lambda s, device: s.compile != "0")
    monkeypatch.setattr(tg, "compiled", lambda s, device, fn, **how: torch.compile(
        fn, backend="eager", **how) if s.compile != "0" else fn)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
