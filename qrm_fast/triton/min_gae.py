"""Triton launch of min_gae: its rule of scan.py; 24 bytes per token in fp32, 16 in short sequences."""

from torch import Tensor

from ..ops.min_gae import _min_gae
from . import scan


def launch(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, lam: float, bootstrap: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    advantages, returns = scan.launch("min_gae", (rewards, values), cu_seqlens, bootstrap, mask, 1 - lam, lam)
    return advantages, returns


scan.register(_min_gae, launch)
