"""tools/account.py: what is counted of functions whose bytes and FLOPs are known, ratios, refusals."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import account, pretend
from tools.common import ToolError
from tools.lowering import BANDWIDTH, PEAK, Kernel, rule_for, shapes_seen

ROOT = Path(__file__).resolve().parent.parent


def why_not() -> str:
    """Why nothing can be lowered here; empty if it can."""
    try:
        pretend.check_machine(*pretend.installed_torch())
    except ToolError as error:
        return str(error)
    return ""


needs_lowering = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can")


def in_a_process_of_its_own(text: str) -> dict:
    """The last line that a program prints, read as JSON; it can import the tools."""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


BY_HAND = """
import json
from tools import pretend
from tools.lowering import Job, lower
torch = pretend.begin()

def normed(x, scale):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return y * scale

def overlapping(x):
    return x[:, :1024] - x[:, 512:1536]

def head(x, weight, scale):
    return torch.nn.functional.linear(normed(x, scale), weight).float().sum()

def counted(function, *shapes, dtype=torch.bfloat16):
    def prepare():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
        compiled = torch.compile(function, fullgraph=True)
        if function is not head:
            tensors = [t.detach() for t in tensors]
        return Job([lambda: compiled(*tensors)], lambda: tensors[0].detach().mul(2).sum())
    recorder = lower(prepare)
    kernels = [[k.graph, k.kind, k.read, k.written, k.flops] for k in recorder.kernels]
    return dict(kernels=kernels, kept=recorder.kept, launches=recorder.launches)

print(json.dumps([counted(normed, (1024, 512), (512,)), counted(overlapping, (64, 4096)),
                  counted(head, (1024, 512), (2048, 512), (512,))]))
"""


@needs_lowering
def test_known_functions_count_as_by_hand():
    normed, shifted, head = in_a_process_of_its_own(BY_HAND)
    n, d, m = 1024, 512, 2048
    # a norm is one reduction: reads x and the scale once, though x is used twice; writes y. Then what runs
    # one by one: twice x, and its sum
    eager = [["eager", "eager", 2 * n * d, 2 * n * d, 0], ["eager", "eager", 2 * n * d, 2, 0]]
    assert normed["kernels"] == [["forward", "reduction", 2 * (n * d + d), 2 * n * d, 0], *eager]
    assert normed["kept"] == 0 and normed["launches"] == 1
    # of two slices that overlap, what both have is read once
    assert shifted["kernels"][0] == ["forward", "pointwise", 2 * 64 * 1536, 2 * 64 * 1024, 0]
    products = [k for k in head["kernels"] if k[1] == "product"]
    assert [k[0] for k in products] == ["forward", "backward", "backward"]
    assert all(k[4] == 2 * n * d * m for k in products)
    assert products[0][2:4] == [2 * (n * d + m * d), 2 * n * m]
    assert head["launches"] == len(head["kernels"]) - 2
    # the normed x for the weight's gradient and the rows' 1 / rms; the weight, a parameter, is there anyway
    assert head["kept"] == 2 * n * d + 2 * n


TINY_CASES = """
import json, sys
sys.path.insert(0, "tests")
from tools import account, pretend
from tools.lowering import lower
torch = pretend.begin()
import train_gpt as tg
from conftest import FEW_LAYERS, TINY
env = {**TINY, **FEW_LAYERS, "NUM_LOOPS": 0, "TTT_SUFFIX": 4, "TTT_STEP_SHARE": 0.25}
s = tg.Settings.from_env({k: str(v) for k, v in env.items()})
subject = account.Subject(tg, torch, s)
cases = {}
for name in ("step", "chunk", "score"):
    cases[name] = account.summary(lower(lambda: account.CASES[name](subject)), 1)
print(json.dumps(cases))
"""


@needs_lowering
@pytest.mark.long
def test_the_trainers_own_cases_are_lowered():
    cases = in_a_process_of_its_own(TINY_CASES)
    assert list(cases) == ["step", "chunk", "score"]
    for name, case in cases.items():
        ways = 1 if name == "score" else 2      # a kernel for each way, forward and backward
        attention = "attention on kept keys, own kernel" if name == "chunk" else "attention"
        assert case["kinds"][attention]["kernels"] == ways * 2       # two layers
        assert case["kinds"]["MLP, own kernel"]["kernels"] == ways * 2
        assert case["kinds"]["cross-entropy, own kernel"]["kernels"] == ways
        assert "eager" not in case["kinds"]
        assert (case["kept_gb"] > 0) == (name != "score") and case["lower_seconds"] > 0
        assert case["gb"] == pytest.approx(sum(kind["gb"] for kind in case["kinds"].values()))
        assert len(case["largest"]) == 1


def test_time_is_that_of_the_narrower_road():
    read, flops = BANDWIDTH / 1e3, PEAK / 500
    assert Kernel("forward", "pointwise", "x", read / 2, read / 2).ms == pytest.approx(1)
    assert Kernel("forward", "product", "x", read / 2, read / 2, flops).ms == pytest.approx(2)


def test_flops_of_operators_by_their_shapes():
    def flops(name, inputs, outputs):
        return rule_for(name).flops(inputs, outputs)

    assert flops("extern_kernels.mm", [[8, 3], [3, 5]], [[8, 5]]) == 2 * 8 * 3 * 5
    assert flops("extern_kernels.addmm", [[5], [8, 3], [3, 5]], [[8, 5]]) == 2 * 8 * 3 * 5
    assert flops("extern_kernels.bmm", [[2, 8, 3], [2, 3, 5]], [[2, 8, 5]]) == 2 * 2 * 8 * 3 * 5
    q, k = [4, 6, 8, 64], [4, 20, 4, 64]      # 6 queries a row; the first sees 15 keys, the last 20
    forward = flops("flash_attn_3::_flash_attn_forward", [q, k, k], [q])
    assert forward == sum(4 * 4 * 8 * 64 * keys for keys in range(15, 21))
    assert flops("flash_attn_3::_flash_attn_backward", [q, q, k, k], []) == 2.5 * forward
    own, kept = [4, 6, 4, 64], [4, 14, 4, 64]       # the same keys, of which 14 were there before
    assert flops("golf_train_gpt::kept_keys_forward", [q, own, own, kept, kept], [q]) == forward
    on_own = sum(4 * 4 * 8 * 64 * keys for keys in range(1, 7))
    assert flops("golf_train_gpt::kept_keys_backward", [q, q, own, own, kept, kept], []) == (
        1.5 * forward + 2 * on_own)
    assert rule_for("golf_train_gpt::something_new").kind == "other operator"


def test_of_kept_keys_only_those_that_are_seen_are_read():
    graph = SimpleNamespace(sizevars=SimpleNamespace(optimization_hint=lambda size, fallback: size))
    names = [SimpleNamespace(name=name) for name in ("q", "old_k", "first", "seen")]
    overload = SimpleNamespace(_schema=SimpleNamespace(arguments=names))
    operator = SimpleNamespace(op_overload=overload, constant_args=[3, 14])
    tensors = [SimpleNamespace(get_size=lambda size=size: size) for size in ([4, 6, 8, 64], [4, 40, 4, 64])]
    assert shapes_seen(graph, operator, tensors) == [[4, 6, 8, 64], [4, 14, 4, 64]]
    assert shapes_seen(graph, SimpleNamespace(), tensors) == [[4, 6, 8, 64], [4, 40, 4, 64]]


def an_account(**kinds) -> dict:
    """Kinds given as (kernels, GB, TFLOP, ms)."""
    parts = {kind: dict(zip(("kernels", "gb", "tflop", "ms"), figures)) for kind, figures in kinds.items()}
    total = {key: sum(part[key] for part in parts.values()) for key in ("kernels", "gb", "tflop", "ms")}
    return total | {"kinds": parts}


def test_ratios_of_two_accounts(tmp_path, capsys):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    step = an_account(product=(3, 4.0, 2.0, 6.0), pointwise=(1, 1.0, 0.0, 1.0))
    ours.write_text(json.dumps({"cases": {"step": step, "score": step}}))
    other = an_account(product=(2, 5.0, 2.0, 8.0), softcapped_ce=(2, 1.0, 0.0, 2.0))
    theirs.write_text(json.dumps({"cases": {"without loops": other}}))
    assert account.main(["--read", str(ours), "--against", str(theirs)]) == 0
    shown = capsys.readouterr().out.partition("step, against")[2]
    lines = [line.split() for line in shown.splitlines()[3:]]
    assert lines[0] == ["product", "3", "1.500", "4.000", "0.800", "2.000", "1.000", "6.000", "0.750"]
    assert lines[1] == ["pointwise", "1", "-", "1.000", "-", "0.000", "-", "1.000", "-"]
    assert lines[2][-8:] == ["0", "0.000", "0.000", "0.000", "0.000", "-", "0.000", "0.000"]
    assert lines[3] == ["sum", "4", "1.000", "5.000", "0.833", "2.000", "1.000", "7.000", "0.700"]
    assert len(lines) == 4      # of the case that both have
    with pytest.raises(ToolError, match="none of the cases score, only step: choose"):
        account.main(["--case", "score", "--against", str(theirs)])


def test_the_peers_account_is_of_this_shape():
    cases = account.read_account(str(ROOT / "docs/figures/account_1855.json"))["cases"]
    assert list(cases) == ["step", "step-loops"]
    for case in cases.values():
        assert set(case["kinds"]) <= {"product", "attention", "pointwise", "reduction", "MLP, own kernel",
                                      "cross-entropy, own kernel"}
        for key in ("kernels", "gb", "tflop", "ms"):
            assert case[key] == pytest.approx(sum(kind[key] for kind in case["kinds"].values()), abs=0.01)


def test_settings_of_a_file_stand_over_the_environments(tmp_path, monkeypatch):
    config = tmp_path / "x.env"
    config.write_text("# sizes\nNUM_LAYERS=4   # few\nTTT_SHORT_SCORE_FIRST_STEPS='8000:24'\n"
                      "TRAIN_SEQ_SCHEDULE=\n")
    monkeypatch.setenv("NUM_LAYERS", "5")
    monkeypatch.setenv("MODEL_DIM", "64")
    env = account.environment(str(config))
    assert (env["NUM_LAYERS"], env["MODEL_DIM"], env["TRAIN_SEQ_SCHEDULE"]) == ("4", "64", "")
    config.write_text("NUM_LAYERS=4\nset -e\n")
    with pytest.raises(ToolError, match="line 2: 'set' is no NAME=VALUE"):
        account.environment(str(config))


@pytest.mark.parametrize("words, reason", [
    (["--case", "speed"], "--case speed is unknown: choose from step, step-loops, chunk, score"),
    (["--top", "-1"], "--top -1 must be at least 0"),
    (["--read", "a.json", "--json", "b.json"], "leave CONFIG.env, --json and --code out"),
    ([], "torch is imported already"),
])
def test_mistakes(words, reason):
    with pytest.raises(ToolError, match=reason):
        account.main(words)


@pytest.mark.parametrize("text", ["{", "{}", '{"cases": {"step": {"kinds": {}}}}', '{"cases": 3}'])
def test_files_that_are_no_accounts(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ToolError, match="is no account .*--json wrote"):
        account.read_account(str(path))


def test_machines_that_cannot_pretend(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    with pytest.raises(ToolError, match=r"torch 2.9.1.cpu has another Inductor than 2.13"):
        pretend.check_machine("2.9.1+cpu", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToolError, match="apt-get install"):
        pretend.check_machine("2.13.0+cpu", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match="pip install triton"):
        pretend.check_machine("2.13.0+cpu", tmp_path)
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    with pytest.raises(ToolError, match="is a GPU build"):
        pretend.check_machine("2.13.0", tmp_path)


def test_without_a_compiler_it_is_one_line(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tools/account.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "g++" in done.stderr
