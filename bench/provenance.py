"""What a figure needs beside it: commit, hardware, versions, date."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from qrm_fast import doctor

ROOT = Path(__file__).parent.parent


def hardware(device: str) -> str:
    """One line that names the machine: "Intel Xeon ..., 2 threads, avx512" or "NVIDIA H200"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{doctor.cpu_model()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def provenance(device: str) -> dict:
    """COMMIT in the environment names the commit of a tree without git; whether it has changes is then not known."""
    named = os.environ.get("COMMIT")
    changes = None if named else _git("status", "--porcelain", "--", "qrm_fast", "csrc", "bench", "setup.py")
    return {
        "commit": named or _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: doctor.version(name) for name in ("triton", "transformers", "numpy")},
            "nvcc": doctor.nvcc_version(),
            "driver": doctor.driver_version(),
        },
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
