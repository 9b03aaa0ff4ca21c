"""Instructions that each kernel executes per row: `EMULATED=90 PYTHONPATH=tests python -m ptx.instructions`.

The launches are those of tests/launches, at the sizes below and with data in the place of meta tensors; a kernel's row
is a token of the batch. What is counted are the instructions of a warp in PTX, before ptxas, and per row those of a
thread, 32 for a warp's one: to compare kernels and their versions with, not to predict times.
"""

import importlib
import os
import shutil
from functools import partial
from pathlib import Path

import launches
import torch

from . import cuda_launches, triton_launches

SIZES = {"T": 512, "D": 128, "V": 640, "WIDEST_V": 640, "K": 64, "S": 16, "MANY": 512}
SIZES |= {"ODD_T": 511, "ODD_D": 121, "ODD_V": 613, "ODD_K": 61, "ODD_S": 7}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
DTYPES |= {"i32": torch.int32, "i64": torch.int64, "flags": torch.bool}


def filled(*shape, dtype: torch.dtype) -> torch.Tensor:
    """Normal values; integers are boundaries, ends of steps, ids of groups or of the vocabulary, by their number."""
    if dtype.is_floating_point:
        return torch.randn(*shape).to(dtype)
    if dtype == torch.bool:
        return torch.rand(*shape) < 0.8
    (n,) = shape
    total = SIZES["ODD_T"] if n in (SIZES["ODD_K"], SIZES["ODD_S"] + 1) else SIZES["T"]
    if n - 1 in (SIZES["S"], SIZES["ODD_S"], SIZES["MANY"]):
        return (torch.arange(n) * total // (n - 1)).to(dtype)
    if n in (SIZES["K"], SIZES["ODD_K"]):
        return (torch.arange(1, n + 1) * total // n - 1).to(dtype)
    return (torch.arange(n) // 8 if n in (SIZES["S"], SIZES["ODD_S"]) else torch.arange(n) % SIZES["V"]).to(dtype)


def main() -> None:
    capability = int(os.environ["EMULATED"])
    triton_launches.install(capability)
    triton_launches.SCHEDULES = 1
    torch.manual_seed(0)
    for name, size in SIZES.items():
        setattr(launches, name, size)
    for name, dtype in DTYPES.items():
        setattr(launches, name, partial(filled, dtype=dtype))
    for file in sorted(Path(launches.__file__).parent.glob("[!_]*.py")):
        importlib.import_module(f"launches.{file.stem}").launches(capability)
    print(f"{'Triton kernel':<32}{'launches':>9}{'instructions':>14}{'per row':>9}")
    for name, count in sorted(triton_launches.counts.items()):
        per_row = 32 * count.instructions / count.launches / SIZES["T"]
        print(f"{name:<32}{count.launches:>9}{count.instructions:>14}{per_row:>9.0f}")
    if shutil.which("nvcc"):
        lengths = 16, 40, 256, 1 << 14
        print(f"{'CUDA scan, per row of sequences of':<36}" + "".join(f"{n:>7}" for n in lengths))
        for op in cuda_launches.COLUMNS:
            per_row = [cuda_launches.instructions_per_row(op, n) for n in lengths]
            print(f"{op:<36}" + "".join(f"{n:>7.0f}" for n in per_row))


if __name__ == "__main__":
    main()
