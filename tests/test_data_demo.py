"""data/demo.py: a small corpus made here, checked, and made again where it is damaged."""

import os
import time

import pytest
from conftest import contents

from data import check, demo
from data.shards import DataError


def test_demo(tmp_path):
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
