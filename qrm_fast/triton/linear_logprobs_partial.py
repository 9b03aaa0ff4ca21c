"""Triton kernels of linear_logprobs_partial: what one shard of a vocabulary contributes to the softmax of each row.

The product and its fold are those of linear_logprobs, whose splits are then joined in order: 2 T D V FLOP, 12 bytes per
row and split. Ids become columns of the shard on the device; nothing waits for it.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_logprobs_partial import _linear_logprobs_partial
from .linear_logprobs import fold, merged_splits
from .logits import MERGE, Head, per_row


@triton.jit(do_not_specialize=["stride_statistics", "num_rows"])
def linear_logprobs_join(
    statistics,  # [3, splits, T]
    targets,  # [T]
    joined_max,  # [T]
    joined_sum,  # [T]
    joined_weighted,  # [T]
    stride_statistics,
    num_rows,
    num_splits,
    ignore_index,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_max, b_sum, b_weighted = merged_splits(statistics, stride_statistics, num_rows, num_splits, o_t, m_t)
    m_ignored = tl.load(targets + o_t, m_t, ignore_index) == ignore_index
    tl.store(joined_max + o_t, tl.where(m_ignored, float("-inf"), b_max), m_t)
    tl.store(joined_sum + o_t, tl.where(m_ignored, 0.0, b_sum), m_t)
    tl.store(joined_weighted + o_t, tl.where(m_ignored, 0.0, b_weighted), m_t)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_start: int,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    top, total, weighted = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    target_logits = hidden.new_full((num_rows,), torch.nan, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(hidden):
            here = (targets >= vocab_start) & (targets < vocab_start + vocab) & (targets != ignore_index)
            columns = torch.where(here, targets - vocab_start, -1)
            head = Head(hidden, weight, columns, bias, per_row(temperature, temperatures, targets), softcap)
            statistics = fold(head, target_logits)
            linear_logprobs_join[(triton.cdiv(num_rows, MERGE["BT"]),)](
                *(statistics, targets, top, total, weighted),
                *(statistics.stride(0), num_rows, statistics.shape[1], ignore_index),
                **MERGE,
            )
    return top, total, weighted, target_logits


_linear_logprobs_partial.register_kernel("cuda")(forward)
