"""tools/gpu_day.py: its parts at a tiny size, and what becomes of one that fails, hangs or dies."""

import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import tg

from tools import bench, gpu_day
from tools.common import ToolError, run_cli

MACHINE = {"rehearsal": gpu_day.REHEARSAL, "device": "CPU", "torch": "2.x", "driver": "no driver",
           "date": "2026-01-01 00:00 UTC", "commit": "commit 1234567", "cores": 2}


def day_of(out, *names, account=None, minutes=1.0, again=False):
    out.mkdir(exist_ok=True)
    (out / gpu_day.MACHINE).write_text(json.dumps(MACHINE))
    return gpu_day.Day(out, gpu_day.chosen_parts(names), minutes, True, again, account or {})


def lab_of(day):
    """What the first part of a day works with."""
    record = gpu_day.Record(day.file(day.parts[0]), rehearsal=gpu_day.REHEARSAL)
    return gpu_day.Lab(day.parts[0], record)


def rehearsed(day, monkeypatch):
    """Every part of a day in this process: {name: its record}."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", tg.SMALL_TENSOR)      # a part lowers it
    found = {}
    for part in day.parts:
        gpu_day.run_part(part, day.out)
        found[part.name] = gpu_day.read_record(day.file(part))
    return found


def test_training_parts_rehearsed(tmp_path, monkeypatch):
    """Self tests, kernels by kind, timed steps and start-ups: every figure is there, and on the page."""
    account = {"with loops": {"kernels": 10, "ms": 2.0, "kinds": {
        "product": {"kernels": 4, "ms": 0.5}, "mlp_up": {"kernels": 2, "ms": 1.5}}}}
    names = ("selftest", "profile", "steps_plain", "startup_warm")
    day = day_of(tmp_path / "out", *names, account=account)
    found = rehearsed(day, monkeypatch)
    assert {name: data["error"] for name, data in found.items()} == dict.fromkeys(names, "")
    assert all(data["state"] == "done" and data["rehearsal"] for data in found.values())
    kernels = found["selftest"]["kernels"]
    assert [row["kernel"] for row in kernels] == list(gpu_day.TWINS)
    if tg.triton is not None:
        assert [row["fault"] for row in kernels] == [""] * len(kernels)
        assert all(0 <= row["forward"] < 1e-4 and 0 <= row["backward"] < 1e-4 for row in kernels)
    faults = {row["backend"]: row["fault"] for row in found["selftest"]["attention"]}
    assert faults["plain"] == "" and "needs a CUDA GPU" in faults["fa3"]
    assert found["selftest"]["auto"] == "plain"
    cases = [case["case"] for case in found["profile"]["cases"]]
    assert cases == ["without loops", "optimiser and average", "with loops"]
    with_loops = found["profile"]["cases"][-1]
    assert with_loops["ms"] == pytest.approx(sum(k["ms"] for k in with_loops["kinds"].values()))
    for row in found["steps_plain"]["steps"]:
        assert row["steps"] == gpu_day.ROUNDS and row["fastest"] <= row["ms"] <= row["slowest"]
        assert row["tokens_per_second"] == pytest.approx(512e3 / row["ms"])
    caches = [found[name]["startup"]["cache"] for name in names[1:]]
    assert caches == ["fresh", "reused", "reused"]
    page = gpu_day.page(day)
    assert page.startswith("REHEARSAL on CPU: CPU, torch 2.x, no driver, 2026-01-01 00:00 UTC, commit 12345")
    for title in ("Self tests", "The training step by kernels", "Training steps", "Start-up"):
        assert f"## REHEARSAL on CPU: {title}" in page
    assert "modelled ms" in page and "own kernels" in page and "needs a CUDA GPU" in page


def test_quantising_and_adapting_rehearsed(tmp_path, monkeypatch):
    day = day_of(tmp_path / "out", "quantise", "ttt")
    found = rehearsed(day, monkeypatch)
    assert [data["error"] for data in found.values()] == ["", ""]
    stages = [row["stage"] for row in found["quantise"]["stages"]]
    factors = "factors of the Hessians"
    assert stages[1:] == [f"column loop: {factors}", "column loop", f"trellis: {factors}", "trellis",
                          "packing", "reading back"]
    assert 10_000 < found["quantise"]["artifact_bytes"] < 1_000_000
    forms = found["ttt"]["forms"]
    assert [row["form"] for row in forms] == 2 * [form.name for form in gpu_day.FORMS]
    assert all("fault" not in row and row["targets_per_second"] > 0 for row in forms)
    # what is scored is the same text; what adapts to it scores it differently
    losses = {row["form"]: row["loss"] for row in forms}
    assert losses["scoring only"] != losses["TTT_SUFFIX=72"]
    page = gpu_day.page(day)
    assert "Artifact of a random model" in page and "exact (TTT_KV_REUSE=0)" in page


STAND_INS = {      # programs in place of parts: they get the path of their JSON
    "selftest": "write(state='done', kernels=[])",
    "profile": "write(state='running', rows=1); raise RuntimeError('no kernels\\nmore')",
    "quantise": "write(state='running', rows=2); time.sleep(60)",
    "ttt": "print('Fatal: stack smashed', flush=True); os.kill(os.getpid(), 11)",
    "startup_warm": "write(state='done')",
}
WRITER = """import json, os, sys, time
def write(**data):
    machine = json.loads(open(sys.argv[2]).read())
    head = dict(part='x', rehearsal=machine['rehearsal'], machine=machine, error='', seconds=1)
    open(sys.argv[1], 'w').write(json.dumps({**head, **data}))
    with open(sys.argv[1] + '.runs', 'a') as runs:
        runs.write('x')
"""


@pytest.fixture
def stand_ins(monkeypatch):
    """Parts whose processes are STAND_INS, and little time for all of them."""

    def command_of(part, day):
        program = WRITER + STAND_INS[part.name]
        return [sys.executable, "-c", program, str(day.file(part)), str(day.out / gpu_day.MACHINE)]

    parts = tuple(gpu_day.Part(part.number, part.name, 1.0, part.work) for part in gpu_day.PARTS
                  if part.name in STAND_INS)
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    monkeypatch.setattr(gpu_day, "command_of", command_of)
    monkeypatch.setattr(gpu_day, "MARGIN_SECONDS", 0)


def test_a_part_that_fails_hangs_or_dies_ends_alone(tmp_path, stand_ins, monkeypatch, capsys):
    day = day_of(tmp_path / "out", minutes=0.1)
    assert gpu_day.run_day(day, time.monotonic()) == 1
    ends = {}
    for part in gpu_day.PARTS:
        data = gpu_day.read_record(day.file(part))
        ends[part.name] = (data["state"], data["error"])
    assert ends["selftest"] == ends["startup_warm"] == ("done", "")
    assert ends["profile"] == ("failed", "ended with status 1: RuntimeError: no kernels")
    assert ends["quantise"][0] == "cut" and "its share of the time" in ends["quantise"][1]
    assert ends["ttt"] == ("crashed", "ended by SIGSEGV: Fatal: stack smashed")
    # what they had found is kept, and the page tells all of it
    assert gpu_day.read_record(tmp_path / "out" / "04_quantise.json")["rows"] == 2
    page = (tmp_path / "out" / gpu_day.PAGE).read_text()
    assert "RuntimeError: no kernels" in page and "SIGSEGV" in page
    assert page.strip() in capsys.readouterr().out

    # run again: what is done is not done again
    for name in STAND_INS:
        monkeypatch.setitem(STAND_INS, name, "write(state='done')")
    assert gpu_day.run_day(day, time.monotonic()) == 0
    runs = {path.name[3:-len(".json.runs")]: path.read_text() for path in day.out.glob("*.runs")}
    assert runs == {"selftest": "x", "profile": "xx", "quantise": "xx", "ttt": "x", "startup_warm": "x"}
    again = day_of(tmp_path / "out", "selftest", again=True)
    gpu_day.run_day(again, time.monotonic())
    assert (day.out / "01_selftest.json.runs").read_text() == "xx"


def test_a_command_that_is_ended_still_tells(tmp_path, stand_ins, monkeypatch):
    def ended(*args):
        raise SystemExit(143)

    day = day_of(tmp_path / "out", "quantise", "ttt")
    path = day.file(day.parts[0])
    monkeypatch.setattr(gpu_day, "launch", ended)
    with pytest.raises(SystemExit):
        gpu_day.run_day(day, time.monotonic())
    assert gpu_day.read_record(path)["state"] == "cut" and not day.file(day.parts[1]).exists()
    assert "the command was ended" in (day.out / gpu_day.PAGE).read_text()


def test_a_page_that_cannot_be_made_ends_nothing(tmp_path, stand_ins, monkeypatch):
    monkeypatch.setattr(gpu_day, "page", lambda day: 1 / 0)
    day = day_of(tmp_path / "out", "selftest")
    assert gpu_day.run_day(day, time.monotonic()) == 0
    assert "ZeroDivisionError" in (day.out / gpu_day.PAGE).read_text()


def test_settings_and_batches_of_full_size(tmp_path):
    """What no rehearsal makes: the competition's size, in every combination that a part asks for."""
    lab = lab_of(day_of(tmp_path / "out", "ttt"))
    lab.rehearse = False
    for form in gpu_day.FORMS:
        for compiling in ("0", "auto"):
            s = lab.settings(COMPILE=compiling, **form.changes)
            assert s.ttt_batch_size == 64 and s.ttt_eval_seq_len == 2048
    for backend in ("auto", *gpu_day.BACKENDS):
        s = lab.settings(ATTN_BACKEND=backend, GPTQ_CALIBRATION_BATCHES=2)
        assert (s.num_layers, s.model_dim, s.vocab_size) == (11, 512, 8192)
    assert not lab.settings(QUANT_TRELLIS=0).quant_trellis
    first, second = lab.batches(s, 2)
    assert first.x.shape == (1, 98304) and not first.x.equal(second.x)
    assert 500 < gpu_day.mean_context(first) < 800 and first.x.max() < 8192
    lengths = gpu_day.document_lengths(64, 2048)
    val = tg.Validation.of(lab.text(lengths, s.vocab_size))
    assert (val.documents.length - 1).tolist() == lengths


def test_time_is_shared_among_the_parts_that_wait(tmp_path):
    day = day_of(tmp_path / "out")
    limits = [gpu_day.time_limit(day, part, 480) for part in day.parts]
    shares = [part.share for part in day.parts]
    assert limits[0] == pytest.approx(480 * shares[0] / sum(shares))
    assert limits[-1] == 480      # the last may take what is left
    # backends that cannot run leave their time to the others
    tests = {"attention": [{"backend": name, "fault": "no GPU"} for name in ("fa3", "fa4")]}
    (day.out / "01_selftest.json").write_text(json.dumps(tests))
    without = sum(part.share for part in day.parts[1:] if part.backend not in ("fa3", "fa4"))
    assert gpu_day.time_limit(day, day.parts[1], 440) == pytest.approx(440 * shares[1] / without)


def test_a_cold_start_is_not_measured_twice(tmp_path):
    day = day_of(tmp_path / "out", "startup")
    cold, warm = day.parts
    assert gpu_day.skip_reason(day, cold) == ""
    start = {"cache": "fresh", "backend": "fa3", "first step without loops": 1.0}
    path = day.out / "02_profile.json"
    path.write_text(json.dumps({"startup": start}))
    assert gpu_day.skip_reason(day, cold) == ""      # it was cut before its second graph
    path.write_text(json.dumps({"startup": {**start, "first step with loops": 1.0}}))
    assert "02_profile" in gpu_day.skip_reason(day, cold) and gpu_day.skip_reason(day, warm) == ""
    (day.out / "01_selftest.json").write_text(json.dumps({"auto": "torch"}))
    assert gpu_day.skip_reason(day, cold) == ""      # that was of another backend


@pytest.mark.parametrize("wrong", [1.001, 0.0, float("nan")])
def test_a_kernel_that_errs_is_named(tmp_path, wrong):
    """A stand-in kernel whose gradient is off, zero or NaN, beside one that is right."""
    lab = lab_of(day_of(tmp_path / "out", "selftest"))

    def doubled(tg, x, kernel):
        a, b = x.drawn("a", 4, 3), x.drawn("b", 4, 3)
        return a * 2 + (b * (wrong if kernel == "wrong" else 1)).sum() + 0 * x.ids()[0]

    assert gpu_day.compare_twins(lab, doubled)["fault"] == ""
    row = gpu_day.compare_twins(lab, lambda tg, x, kernel: doubled(tg, x, "wrong" if kernel else ""))
    assert row["fault"].startswith("forward is off by") or row["fault"].startswith("backward is off by")
    lab.record.put(kernels=[row])
    assert json.loads(lab.record.path.read_text(), parse_constant=pytest.fail)["kernels"]


def test_a_profiler_without_kernels_ends_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "read_trace", lambda *args: 1 / 0)
    day = day_of(tmp_path / "out", "profile")
    lab = lab_of(day)
    for case in gpu_day.PLANS:
        gpu_day.profile_case(lab, case, lambda: time.sleep(0.001))
    cases = gpu_day.read_record(day.file(day.parts[0]))["cases"]
    assert [case["case"] for case in cases] == list(gpu_day.PLANS)
    assert all(case["wall_ms"] >= 1 and "ZeroDivisionError" in case["fault"] for case in cases)
    lab.record.put(state="done", error="", machine=MACHINE)
    assert "ZeroDivisionError: division by zero" in gpu_day.page(day)


@pytest.mark.skipif(tg.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: bench.main(["--gpu", "--out", str(tmp_path / "out")]))
    said = capsys.readouterr()
    assert end.value.code == 2 and not (tmp_path / "out").exists() and said.out == ""
    assert said.err.startswith("error: no CUDA GPU is seen by torch") and said.err.count("\n") == 1
    assert "--rehearse" in said.err


@pytest.mark.parametrize("words, reason", [
    (["--only", "speed"], "--only speed is no part: choose from selftest"),
    (["--minutes", "0"], "must be above 0"),
    (["--account", "none.json"], "--account none.json: No such file"),
    (["--account", __file__], "has no cases with kernels, ms and kinds"),
])
def test_mistakes(words, reason):
    with pytest.raises(ToolError, match=reason):
        gpu_day.main(words)


def test_a_rehearsal_and_measurements_are_not_mixed(tmp_path):
    day = day_of(tmp_path / "out")
    with pytest.raises(ToolError, match="holds a rehearsal: choose another --out"):
        gpu_day.main(["--out", str(day.out)])


# names as profilers print them
KERNELS = {
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "product",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "product",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>": "product",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "product",
    "triton_tem_fused_mm_3": "product",
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<…>>>": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<…>": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90": "attention",
    "triton_poi_fused_add_mul_scaled_dot_product_attention_7": "pointwise",
    "triton_red_fused_mm_mean_pow_2": "reduction",
    "triton_per_fused__to_copy_sum_4": "reduction",
    "ce_forward_kernel": "own kernels",
    "mlp_kernel_0d1d2d": "own kernels",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "other",
    "Memset (Device)": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kinds_of_kernels(name):
    assert gpu_day.kind_of(name, ["ce_forward_kernel", "mlp_kernel"]) == KERNELS[name]


def test_a_trace_is_read_per_call(tmp_path):
    def event(name, dur, cat="kernel", ph="X"):
        return {"name": name, "dur": dur, "cat": cat, "ph": ph}

    path = tmp_path / "trace.json.gz"
    events = [event("mlp_kernel", 3000), event("mlp_kernel", 1000), event("nvjet_a", 500),
              event("Memset (Device)", 100, "gpu_memset"), event("aten::mm", 9e9, "cpu_op"),
              {"name": "process_name", "ph": "M"}]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    rows = gpu_day.read_trace(path, gpu_day.DEVICE_EVENTS, 2, ["mlp_kernel"])
    assert [(row["name"], row["kind"], row["count"], row["ms"]) for row in rows] == [
        ("mlp_kernel", "own kernels", 1, 2.0), ("nvjet_a", "product", 0.5, 0.25),
        ("Memset (Device)", "other", 0.5, 0.05)]
    case = {"case": "with loops", "kinds": gpu_day.by_kind(rows), "kernels": 2, "ms": 2.3}
    model = {"kernels": 3, "ms": 1.5, "kinds": {"mlp_up": {"kernels": 1, "ms": 0.75},
                                                "mlp_dh": {"kernels": 1, "ms": 0.25}}}
    lines = gpu_day.kinds_table(case, {"with loops": model}).splitlines()
    own = next(line for line in lines if "own kernels" in line)
    assert [cell.strip() for cell in own.split("|")[2:-1]] == ["1", "2.000", "2", "1.000", "2.00"]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events[4:]}).encode()))
    with pytest.raises(ToolError, match="the profiler saw no kernel in 2 calls"):
        gpu_day.read_trace(path, gpu_day.DEVICE_EVENTS, 2, [])


def test_made_up_documents_are_as_long_as_those_of_fineweb():
    lengths = tg.np.array(gpu_day.document_lengths(50_000))
    assert lengths.mean() == pytest.approx(957, rel=0.03)      # 47.85 million targets in 50,000
    assert lengths.min() >= 16 and max(gpu_day.document_lengths(1000, 300)) == 300


def test_the_driver_is_named(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_day.driver_version() == "driver 570.1"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_day.driver_version() == "driver unknown"
    assert Path(gpu_day.SCRIPT).is_file() and "commit" in gpu_day.commit()


@pytest.mark.long
def test_what_is_compiled_on_a_gpu_is_traced_whole(tmp_path, monkeypatch, tracing):
    """Steps and adaptation as a GPU would compile them, by dynamo alone: whole graphs, and few of them."""
    day = day_of(tmp_path / "out", "profile", "steps_plain", "ttt")
    graphs = {}
    for part in day.parts:
        before = tracing()
        gpu_day.run_part(part, day.out)
        data = gpu_day.read_record(day.file(part))
        assert data["state"] == "done" and not data["error"]
        assert all("fault" not in row for row in data.get("forms", []))
        graphs[part.name] = tracing() - before
    assert graphs["profile"] == 2 and graphs["steps_plain"] <= 2      # one a plan
    assert graphs["ttt"] <= 8
