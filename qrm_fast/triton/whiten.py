"""Triton kernel of whiten: one read and one write of every row, 8 bytes in fp32, 9 with a mask."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.whiten import _whiten

LAUNCH = {"BT": 1024, "num_warps": 4}


@triton.jit
def whiten(
    x,  # [T]
    stats,  # [1, 3]
    mask,  # [T] or None
    whitened,  # [T]
    num_rows,
    ddof,
    eps,
    CENTER: tl.constexpr,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    m_kept = m_t
    if mask is not None:
        m_kept = m_t & (tl.load(mask + o_t, m_t, 0) != 0)
    count = tl.load(stats)
    variance = tl.load(stats + 2) / tl.maximum(count - ddof, 1.0)
    b_x = tl.load(x + o_t, m_kept, 0.0).to(tl.float64)
    if CENTER:
        b_x -= tl.load(stats + 1)
    # By select: no spread gives 0, whatever the row.
    b_y = tl.where(variance == 0.0, 0.0, b_x / tl.sqrt(variance + eps))
    tl.store(whitened + o_t, tl.where(m_kept, b_y, 0.0).to(tl.float32), m_t)


def launch(x: Tensor, stats: Tensor, mask: Tensor | None, center: bool, unbiased: bool, eps: float) -> Tensor:
    num_rows = x.shape[0]
    whitened = torch.empty_like(x, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(x):
            whiten[(triton.cdiv(num_rows, LAUNCH["BT"]),)](
                x, stats, mask, whitened, num_rows, int(unbiased), eps, CENTER=center, **LAUNCH
            )
    return whitened


_whiten.register_kernel("cuda")(launch)
