"""The weight of every token in the loss, for the ways the field averages over tokens and sequences."""

import torch
from torch import Tensor

from .checks import BOOL, INTS, Checker
from .constant_op import constant_op
from .segments import sequence_ids, sequence_sum

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def loss_weights(
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    mode: str = "token-mean",
    global_tokens: float | None = None,
    global_sequences: float | None = None,
    norm: float | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """[T] float32 weights w with which loss = sum over t of w_t loss_t is the average that `mode` names.

    `cu_seqlens`: [S+1] int32 or int64. `mask`: [T] bool; rows where it is False weigh 0 and count nowhere. With n_i the
    counted rows of sequence i:

        token-mean               w = 1 / global_tokens
        seq-mean-token-mean      w = 1 / (global_sequences n_i)
        seq-mean-token-sum       w = 1 / global_sequences
        seq-mean-token-sum-norm  w = 1 / (global_sequences norm)

    (the names are verl's; Dr. GRPO, arXiv 2503.20783, is the last with norm the longest allowed response; verl's own
    does not divide by the number of sequences: give global_sequences = 1 for it). Losses of micro-batches and ranks add
    up to that of the whole batch when each is given the whole batch's `global_tokens` or `global_sequences`, of which
    a mode reads its own; None counts this call's rows, or its sequences with at least one counted row.

    `num_tokens` is T; None takes it from `mask`, else reads cu_seqlens[-1], which waits for the device on CUDA. Raises
    TypeError or ValueError for a wrong dtype, shape or device, an unknown mode, a denominator that is not positive, a
    norm missing from its mode or given to another, and, on CPU, ValueError where cu_seqlens do not start at 0,
    decrease, or do not end at T.
    """
    check = Checker()
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if mask is not None:
        check("mask", mask, "T", BOOL)
        if num_tokens is not None and num_tokens != mask.shape[0]:
            raise ValueError(f"num_tokens must be the length of mask, {mask.shape[0]}, got {num_tokens}")
        num_tokens = mask.shape[0]
    elif num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (norm is not None) != (mode == MODES[-1]):
        raise ValueError(f"norm must be given for mode {MODES[-1]!r} only, got {norm} for {mode!r}")
    for name, value in ("global_tokens", global_tokens), ("global_sequences", global_sequences), ("norm", norm):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    total = global_tokens if mode == "token-mean" else global_sequences
    return _loss_weights(cu_seqlens, mask, num_tokens, mode, float(total or 0), float(norm or 1))


@constant_op("loss_weights")
def _loss_weights(
    cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int, mode: str, total: float, norm: float
) -> Tensor:
    """`total` is the mode's denominator, 0 to count it here."""
    counted = cu_seqlens.new_ones(num_tokens, dtype=torch.bool) if mask is None else mask
    counts = sequence_sum(counted.double(), cu_seqlens)  # [S]
    i_seq = sequence_ids(cu_seqlens, num_tokens)
    here = counts.sum() if mode == "token-mean" else (counts > 0).sum()
    per_row: Tensor | float = 1.0
    if mode == "seq-mean-token-mean":
        per_row = torch.cat([counts, counts.new_full((1,), torch.nan)])[i_seq]  # rows behind the last boundary
    return (1 / ((total or here) * norm * per_row * counted)).where(counted, 0.0).float()


@_loss_weights.register_fake
def _(cu_seqlens, mask, num_tokens, mode, total, norm):
    return cu_seqlens.new_empty(num_tokens, dtype=torch.float32)
