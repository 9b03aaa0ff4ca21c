"""Triton launch of vtrace: its rule of scan.py; 32 bytes per token in fp32, 20 in short sequences."""

from torch import Tensor

from ..ops.vtrace import _vtrace
from . import scan


def launch(
    rewards: Tensor,
    values: Tensor,
    ratios: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    bootstrap: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    columns = rewards, values, ratios
    targets, advantages = scan.launch(
        "vtrace", columns, cu_seqlens, bootstrap, mask, gamma, gamma * lam, rho_bar, c_bar
    )
    return targets, advantages


scan.register(_vtrace, launch)
