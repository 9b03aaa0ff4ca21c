"""What a figure needs beside it: commit, hardware, versions, date."""

import datetime
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
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "qrm_fast", "csrc", "bench", "setup.py")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
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
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
