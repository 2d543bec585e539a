"""tools/doctor.py: verdicts and remedies, with what the machine says made up."""

import json
import subprocess
import sys
import types

import pytest
from conftest import environment, run_here

from tools import doctor
from tools.doctor import FAIL, OK, WARN, Finding

H100 = {"index": "0", "name": "NVIDIA H100 80GB HBM3", "temperature.gpu": "41", "clocks.max.sm": "1980",
        "memory.total": "81559", "memory.used": "4", "power.limit": "700.00",
        "clocks_throttle_reasons.hw_thermal_slowdown": "Not Active", "driver_version": "570.1"}


@pytest.fixture
def gpus(monkeypatch):
    """Eight made-up GPUs; change their fields."""
    rows = [{**H100, "index": str(i)} for i in range(8)]
    monkeypatch.setattr(doctor, "gpu_rows", lambda: rows)
    return rows


def states(findings):
    return [f.state for f in findings]


def test_eight_good_gpus(gpus):
    assert states(doctor.check_gpus()) == [OK]


@pytest.mark.parametrize("key, value, state, remedy", [("temperature.gpu", "90", WARN, "cool"),
                                                       ("memory.used", "20000", FAIL, "end the process"),
                                                       ("clocks.max.sm", "1200", WARN, "another pod"),
                                                       ("temperature.gpu", "[N/A]", OK, "")])
def test_a_bad_gpu_is_named_with_its_remedy(gpus, key, value, state, remedy):
    gpus[3][key] = value
    found = doctor.check_gpus()
    assert found[-1].state == state and remedy in found[-1].remedy
    assert state == OK or found[-1].what == "GPU 3"


def test_no_gpu_is_a_warning_and_nothing_breaks(monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert doctor.gpu_rows() == [] and states(doctor.check_gpus()) == [WARN] and doctor.check_links() == []


def test_speed_is_judged_against_the_kind():
    healthy = doctor.healthy_of("NVIDIA H100 80GB HBM3")
    assert (healthy == doctor.HEALTHY["H100"] and doctor.healthy_of("NVIDIA H100 PCIe")
            == doctor.HEALTHY["H100 PCIe"])
    for figure, state in ((560, OK), (500, WARN), (400, FAIL)):
        assert doctor.judge("GPU 0: matrix", figure, "TFLOP/s", healthy[0]).state == state
    assert doctor.judge("x", 1.0, "GB/s", None).state == OK
    assert doctor.healthy_of("NVIDIA GH200 480GB") is doctor.HEALTHY["GH200"]
    assert doctor.healthy_of("NVIDIA H200") is doctor.HEALTHY["H200"] and doctor.healthy_of("T4") is None


def test_packages_missing_or_other_versions(monkeypatch):
    have = {"torch": "2.13.0+cu128", "numpy": "1.0"}

    def version(name):
        if name not in have:
            raise doctor.metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "gpu_rows", lambda: [])
    monkeypatch.setattr(doctor, "ROOT", doctor.ROOT)
    found = {f.what: f for f in doctor.check_packages()}
    assert found["torch"].state == OK and found["numpy"].state == WARN and found["brotli"].state == FAIL
    assert found["brotli"].remedy.startswith("pip install brotli==") and "flash-attn-4" not in found


def test_findings_of_the_trainer_are_taken_over(monkeypatch):
    said = ("ok    settings: 3 differ from the defaults\nok    disk: 1 bytes free\n"
            "FAIL  training shards: a.bin is truncated; fetch the data again\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a,
                        **k: types.SimpleNamespace(stdout=said, stderr="", returncode=1))
    assert doctor.check_settings_and_data() == [Finding(OK, "settings", "3 differ from the defaults"),
                                                Finding(OK, "disk", "1 bytes free"),
                                                Finding(FAIL, "training shards", "a.bin is truncated",
                                                        "fetch the data again")]
    monkeypatch.setattr(
        doctor.subprocess,
        "run",
        lambda *a, **k: types.SimpleNamespace(
            stdout="", stderr="error: MATRX_LR is unknown: did you mean MATRIX_LR?\n", returncode=2
        ),
    )
    assert "did you mean" in doctor.check_settings_and_data()[0].found


def test_a_check_that_breaks_is_a_finding(monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA driver gone")

    monkeypatch.setattr(doctor, "CHECKS", {"GPU": broken, "python": doctor.check_python})
    assert doctor.main(["--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["fail"] == 1 and said["findings"][0]["found"] == "RuntimeError: CUDA driver gone"


def test_the_rehearsal_tells_what_failed(monkeypatch):
    monkeypatch.setattr(doctor, "trainer", lambda: types.SimpleNamespace(fields=lambda s: [], Settings=None))
    monkeypatch.setattr(doctor, "tiny_data", lambda folder: {})
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a,
                        **k: types.SimpleNamespace(stdout="step 1\n",
                                                   stderr="Traceback\nRuntimeError: no kernel image\n",
                                                   returncode=1))
    found = doctor.check_rehearsal()
    assert states(found) == [FAIL] and found[0].found == "RuntimeError: no kernel image"


def test_the_rehearsal_runs_every_stage(monkeypatch):
    monkeypatch.setattr(doctor, "REHEARSAL_SECONDS", 600)      # the machine of a test may be busy
    found = doctor.check_rehearsal()
    assert states(found) == [OK], found


def test_quick_on_this_machine():
    done = subprocess.run([sys.executable, doctor.__file__, "--quick", "--json"], capture_output=True,
                          text=True)
    found = {f["what"]: f["state"] for f in json.loads(done.stdout)["findings"]}
    assert found["python"] == OK and {"torch", "memory", "attention", "settings"} <= set(found)
    assert done.returncode == int("FAIL" in found.values())


def test_without_data_nothing_is_said_of_them(tmp_path, monkeypatch):
    _, said = run_here(environment(tmp_path / "none"), "--check")
    rows = [row for row in map(doctor.read_check_line, said.splitlines()) if row]
    assert {row.what for row in rows if row.state == FAIL} == set(doctor.OF_DATA)
    monkeypatch.setattr(doctor, "CHECKS", {"all": lambda: rows})
    assert states(doctor.examine(quick=True, data=False)) == [OK] * (len(rows) - len(doctor.OF_DATA))
