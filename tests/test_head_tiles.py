"""The head kernels of every instruction set, built as a small program: see head_tiles.cpp."""

import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_instruction_set(tmp_path):
    flags = runpy.run_path(str(ROOT / "setup.py"))["CXX"]
    program = tmp_path / "head_tiles"
    subprocess.run(["c++", *flags, str(ROOT / "tests/head_tiles.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert {"portable float", "portable double"} <= set(done.stdout.splitlines())
