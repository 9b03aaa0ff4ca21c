"""The scans on CUDA: csrc/cuda alone serves them, and an installation that was built without nvcc refuses them there.

Their references, loops over rows in Python, would take hours of a device in silence.
"""

from functools import partial

import torch

SCANS = "discounted_returns", "gae", "min_gae", "vtrace"
NEEDS_NVCC: set[str] = set()  # the ops that this installation refuses on CUDA


def refuse_scans_on_cuda(remedy: str) -> None:
    for name in SCANS:
        torch.library.impl(f"qrm_fast::{name}", "cuda", partial(_refuse, name, remedy))
        NEEDS_NVCC.add(f"qrm_fast::{name}")


def _refuse(name: str, remedy: str, *args) -> None:
    raise RuntimeError(f"{name} on CUDA is compiled by nvcc, and this installation was built without it; {remedy}")
