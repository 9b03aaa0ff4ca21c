"""The block logic of the CUDA scans, built as a program for the CPU: see scan_units.cpp."""

import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_estimator(tmp_path):
    flags = runpy.run_path(str(ROOT / "setup.py"))["CXX"]
    program = tmp_path / "scan_units"
    subprocess.run(["c++", *flags, str(ROOT / "tests/scan_units.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
