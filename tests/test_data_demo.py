"""data/demo.py: a small corpus made here, checked, and made again where it is damaged."""

import os
import time

import pytest
from conftest import ROOT, contents

import train_gpt as tg
from data import check, demo
from data.shards import DataError


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.long)])
def test_demo(tmp_path, capsys, monkeypatch, share):
    """Of every third of the library's files, or of all."""
    some = demo.stdlib_files()[::share]
    monkeypatch.setattr(demo, "stdlib_files", lambda: some)
    start = time.process_time()                     # not the clock: the machine may be busy
    assert demo.make_demo(tmp_path / "demo", 400)
    assert time.process_time() - start < 40
    start = time.process_time()
    assert not demo.make_demo(tmp_path / "demo", 400)
    assert time.process_time() - start < 1
    report = check.check(tmp_path / "demo")
    assert not report.findings and report.counted_bytes == report.decodable_bytes <= 200_000
    assert 0.01 < report.documents["val"] / report.documents["train"] < 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    packed = demo.read_manifest(tmp_path / "demo")["compressors"]
    assert 2 < packed["brotli-11"] < packed["xz -9e"] < 3.5
    assert demo.main(["--out", str(tmp_path / "demo"), "--vocab", "400"]) == 0
    assert f"in bits a byte: brotli-11 {packed['brotli-11']:.3f}, xz" in capsys.readouterr().out


def test_the_documents_order_is_that_of_their_hashes():
    docs = [f"{i} " * 500 for i in range(500)]
    sides, share = demo.split(docs)
    assert demo.split(docs[::-1]) == (sides, share)
    assert sides["train"] != [doc for doc in docs if doc in sides["train"]]


def test_a_busy_machine_trains_the_demo_as_long_as_a_quiet_one():
    lines = (ROOT / "configs" / "demo.env").read_text().splitlines()
    settings = tg.Settings.from_env(dict(line.split("=") for line in lines if "=" in line and line[0] != "#"))
    pace = tg.Pace(settings, reserve=0.0)
    half = settings.iterations // 2
    pace.observe(half, elapsed=1e5)
    assert pace.progress(half) == 0.5 and not pace.ended(half) and pace.ended(2 * half)
    assert settings.eval_max_seconds == 0           # else the watchdog of adaptation looks at the clock


def test_a_damaged_demo_is_made_again_and_equally(tmp_path, monkeypatch):
    """Of a part of the library's files."""
    some = demo.stdlib_files()[::6]
    monkeypatch.setattr(demo, "stdlib_files", lambda: some)
    assert demo.make_demo(tmp_path / "demo", 400)
    first = contents(tmp_path / "demo")
    os.truncate(tmp_path / "demo" / "fineweb_val_000000.bin", 3000)
    assert demo.make_demo(tmp_path / "demo", 400)
    assert contents(tmp_path / "demo") == first
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_demo_does_not_replace_other_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="not a demo folder"):
        demo.make_demo(tmp_path / "mine")
