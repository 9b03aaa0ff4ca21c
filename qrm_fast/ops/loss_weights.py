"""The weight of every token in the loss, for the ways the field averages over tokens and sequences."""

import torch
from torch import Tensor

from .checks import BOOL, INTS, Checker
from .constant_op import constant_op
from .segments import ascending, check_boundaries, sequence_ids

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


@constant_op("loss_weights", on_every_device=True)
def _loss_weights(
    cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int, mode: str, total: float, norm: float
) -> Tensor:
    """`total` is the mode's denominator, 0 to count it here."""
    check_boundaries(cu_seqlens, num_tokens)
    of_tokens, per_sequence = mode == "token-mean", mode == "seq-mean-token-mean"
    denominator = cu_seqlens.new_full((), total or num_tokens, dtype=torch.float64)
    if per_sequence or not (total or of_tokens):
        counts = _counts(cu_seqlens, mask, num_tokens)  # [S]
        denominator = denominator if total else (counts > 0).sum().double()
        denominator = denominator * counts if per_sequence else denominator
    elif mask is not None and not total:
        denominator = mask.sum().double()
    weight = (1 / (denominator * norm)).float()
    if per_sequence:
        behind = weight.new_full((1,), torch.nan)  # rows behind the last boundary
        weights = torch.cat([weight, behind]).index_select(0, sequence_ids(cu_seqlens, num_tokens))
    else:
        weights = weight.repeat(num_tokens)
    return weights if mask is None else weights.where(mask, 0.0)


def _counts(cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int) -> Tensor:
    """[S] int64: the rows of each sequence, or those where `mask` is True."""
    bounds = ascending(cu_seqlens, num_tokens)
    if mask is None:
        return bounds.diff()
    before = mask.new_zeros(num_tokens + 1, dtype=torch.int64)  # rows of the mask before each one
    torch.cumsum(mask, 0, out=before[1:])
    return before[bounds].diff()


@_loss_weights.register_fake
def _(cu_seqlens, mask, num_tokens, mode, total, norm):
    return cu_seqlens.new_empty(num_tokens, dtype=torch.float32)
