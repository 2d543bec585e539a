"""The public reference numbers, where they lie beside the repository; tests/test_golden.py stands alone."""

import subprocess
import sys

import pytest
from conftest import ROOT

FIXTURES = ROOT.parent / "shared" / "parity"


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no reference numbers beside the repository")
def test_the_reference_numbers_hold():
    done = subprocess.run(
        [sys.executable, "tests/parity.py", str(FIXTURES)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
