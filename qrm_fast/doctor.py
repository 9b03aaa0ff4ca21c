"""What is installed, and which file serves each op on each device: the text of `qrm-fast doctor`."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch._library.custom_ops import OPDEFS

from .ops.constant_op import SERVED_BY_REFERENCE
from .ops.scans import NEEDS_NVCC

PACKAGE = Path(__file__).parent
REBUILD = (
    "run `pip install --no-build-isolation .` beside the torch in use, or `python setup.py build_ext --inplace` in a "
    "source tree"
)


def add_nvcc() -> str:
    return (
        "install the CUDA toolkit or, from CUDA 13 on, its compiler alone by "
        f'`pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"`, and {REBUILD}'
    )


class Served(NamedTuple):
    """The files that serve one op; None where a device lacks a kernel and `fallback` serves it, or "needs nvcc"."""

    op: str
    cpu: str | None
    cuda: str | None
    fallback: str


def served() -> list[Served]:
    """One row per op of this package, as the dispatcher has it now."""
    return [_served(name) for name in sorted(OPDEFS) if name.startswith("qrm_fast::")]


def _served(op: str) -> Served:
    reference = Path(OPDEFS[op]._init_fn.__code__.co_filename).relative_to(PACKAGE.parent)
    dump = torch._C._dispatch_dump(op)

    def kernel(key: str) -> str | None:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
            return str(reference) if op in SERVED_BY_REFERENCE else None
        if key == "CUDA" and op in NEEDS_NVCC:
            return "needs nvcc"
        compiled = re.search(rf"^{key}: registered at \S*?(csrc/\w+/\w+\.\w+)", dump, re.MULTILINE)
        # A kernel registered from Python is Triton's and lies under the op's own stem or its reference's; the dump
        # names only PyTorch's file.
        stem = op.partition("::")[2]
        own = stem if (PACKAGE / f"triton/{stem}.py").exists() else reference.stem
        return compiled[1] if compiled else f"qrm_fast/triton/{own}.py"

    return Served(op.partition("::")[2], kernel("CPU"), kernel("CUDA"), str(reference))


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def nvcc_version() -> str | None:
    return _answer(r"release (\S+),", "nvcc", "--version")


def driver_version() -> str | None:
    return _answer(r"(\S+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _answer(pattern: str, *command: str) -> str | None:
    try:
        found = re.search(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found[1] if found else None


def main() -> None:
    """Print the versions, the devices and the table of ops."""
    simd = torch.backends.cpu.get_cpu_capability()
    facts = {
        "qrm_fast": f"{version('qrm_fast')}, in {PACKAGE}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "transformers", "numpy")},
        "nvcc": nvcc_version() or "not on the PATH",
        "cpu": f"{cpu_model()}, {torch.get_num_threads()} threads, {simd}",
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            facts[f"cuda:{i}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 30} GiB"
        facts["driver"] = driver_version() or "not found"
    else:
        facts["cuda"] = f"no device (torch built for CUDA {torch.version.cuda})" if torch.version.cuda else "no device"
    for name, value in facts.items():
        print(f"{name:<13} {value}")
    table = [("op", "CPU", "CUDA", "elsewhere"), *((s.op, s.cpu or "-", s.cuda or "-", s.fallback) for s in served())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n- : no kernel of its own; the reference in the last column serves that device.")
    if NEEDS_NVCC:
        print(f"needs nvcc: an error on CUDA tensors; {add_nvcc()}.")
