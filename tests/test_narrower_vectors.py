"""Scans and losses on CPU by narrower vectors than this machine's best, which pass the tests marked `vectors`."""

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
KERNELS = ["gae", "discounted_returns", "vtrace", "min_gae", "policy_loss", "value_loss"]
TESTS = ["tests/test_scan.py", "tests/test_policy_loss.py", "tests/test_value_loss.py"]
# What the processor is said to have, by the last character of x86-64-v3 and x86-64-v4.
SUPPORTS = {"avx2": "((feature)[8] == '3')", "portable": "false"}

PLUGIN = """
import qrm_fast
import torch

torch.ops.load_library({library!r})  # takes the place of the kernels that qrm_fast registered
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The kernels built for each kind of vectors, side by side."""
    folder = tmp_path_factory.mktemp("kernels")
    sources = [ROOT / f"csrc/cpu/{name}.cpp" for name in KERNELS]
    command = ["c++", "-shared", "-fPIC", *runpy.run_path(str(ROOT / "setup.py"))["CXX"], *sources]
    command += [*(f"-I{path}" for path in include_paths()), f"-L{Path(torch.__file__).parent / 'lib'}"]
    command += ["-ltorch_cpu", "-ltorch", "-lc10", "-O1"]  # compiled soon, run briefly
    libraries = {vectors: folder / f"{vectors}.so" for vectors in SUPPORTS}
    builds = [
        subprocess.Popen([*map(str, command), "-o", library, f"-D__builtin_cpu_supports(feature)={SUPPORTS[vectors]}"])
        for vectors, library in libraries.items()
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    return libraries


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one width of vectors on this processor")
@pytest.mark.parametrize("vectors", SUPPORTS)
def test_narrower_vectors_keep_the_promises(libraries, tmp_path, vectors):
    (tmp_path / "narrower.py").write_text(PLUGIN.format(library=str(libraries[vectors])))
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "narrower", "-m", "vectors", *TESTS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
