"""Corrupted boundaries under NVIDIA's compute-sanitizer: no kernel reads or writes outside its tensors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).parents[1]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{CUDA_HOME}/bin")


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer beside the CUDA compiler")
def test_corrupted_boundaries_reach_no_foreign_memory():
    command = [SANITIZER, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "86"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-k", "inside_its_tensors or inside_their_tensors or broken_boundaries or out_of_range", "tests"]
    # Each tensor in memory of its own: in PyTorch's pool a neighbour's memory would be taken for the tensor's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
