"""The preference loss that trains a Q-RM: the gap between the mean token scores of two answers."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .checks import BOOL, FLOATS, INTS, Checker
from .dtypes import acc_dtype
from .segments import sequence_ids, sequence_sum


class PairLoss(NamedTuple):
    loss: Tensor  # 0-d float32
    margin: Tensor  # [P] float32
    accuracy: Tensor  # 0-d float32


def pairwise_q_loss(
    q: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None, beta: float = 0.2, gamma: float = 2.0
) -> PairLoss:
    """Q-RM's loss over packed pairs of answers: sequence 2i is the chosen one of pair i, sequence 2i+1 the rejected.

    `q`: [T] floating, one score per action. `cu_seqlens`: [2P+1] int32 or int64. `mask`: [T] bool; only rows where it
    is True count.

        margin_i = mean q over chosen_i - mean q over rejected_i
        loss = mean over counted pairs of softplus(gamma - beta margin_i)

    (Q-RM, arXiv 2505.23363: the Bradley-Terry likelihood of length-normalised returns, z_t and V*(s_0) replaced by the
    constant gamma). `margin` is [P]; `accuracy` is the share of counted pairs with margin > 0. All are float32 (float64
    for float64). A pair with an empty side has margin 0 and is not counted; with no pair left, loss and accuracy are 0.
    Differentiable in `q` through loss and margin, not through accuracy.

    Raises TypeError or ValueError for a wrong dtype, shape or device (an odd number of sequences among them), and, on
    CPU, ValueError where cu_seqlens do not start at 0, decrease, or do not end at T.
    """
    check = Checker()
    check("q", q, "T", FLOATS)
    check("cu_seqlens", cu_seqlens, "2P+1", INTS)
    if mask is not None:
        check("mask", mask, "T", BOOL)
    loss, margin, accuracy, _ = _pairwise_q_loss(q, cu_seqlens, mask, float(beta), float(gamma))
    return PairLoss(loss, margin, accuracy)


@torch.library.custom_op("qrm_fast::pairwise_q_loss", mutates_args=())
def _pairwise_q_loss(
    q: Tensor, cu_seqlens: Tensor, mask: Tensor | None, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = q.to(acc_dtype(q.dtype))
    mask = torch.ones_like(q, dtype=torch.bool) if mask is None else mask
    counts = sequence_sum(mask.to(q.dtype), cu_seqlens)  # [2P]
    means = sequence_sum(q.where(mask, 0.0), cu_seqlens) / counts  # [2P]
    counted = counts.view(-1, 2).all(1)  # [P]
    margin = (means[0::2] - means[1::2]).where(counted, 0.0)
    num_pairs = counted.sum().clamp(min=1)
    loss = softplus(gamma - beta * margin).where(counted, 0.0).sum() / num_pairs
    accuracy = (margin > 0).sum().to(q.dtype) / num_pairs
    return loss, margin, accuracy, counts.to(torch.int64)


@_pairwise_q_loss.register_fake
def _(q, cu_seqlens, mask, beta, gamma):
    acc = acc_dtype(q.dtype)
    num_sequences = cu_seqlens.shape[0] - 1
    scalar = q.new_empty((), dtype=acc)
    margin = q.new_empty(num_sequences // 2, dtype=acc)
    return scalar, margin, torch.empty_like(scalar), q.new_empty(num_sequences, dtype=torch.int64)


@torch.library.custom_op("qrm_fast::pairwise_q_loss_backward", mutates_args=())
def _pairwise_q_loss_backward(
    grad_loss: Tensor,
    grad_margin: Tensor,
    q: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    margin: Tensor,
    counts: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    counted = counts.view(-1, 2).all(1)
    # d loss / d margin_i = -beta sigmoid(gamma - beta margin_i) / counted pairs
    slope = -beta * torch.sigmoid(gamma - beta * margin) / counted.sum().clamp(min=1)
    grad = (grad_loss * slope + grad_margin).where(counted, 0.0)  # [P]
    per_row = torch.stack([grad, -grad], dim=1).flatten() / counts.clamp(min=1)  # [2P]
    per_row = per_row[sequence_ids(cu_seqlens, q.shape[0])]
    return (per_row if mask is None else per_row.where(mask, 0.0)).to(q.dtype)


@_pairwise_q_loss_backward.register_fake
def _(grad_loss, grad_margin, q, cu_seqlens, mask, margin, counts, beta, gamma):
    return torch.empty_like(q)


def _setup_context(ctx, inputs, output):
    q, cu_seqlens, mask, ctx.beta, ctx.gamma = inputs
    _, margin, accuracy, counts = output
    ctx.mark_non_differentiable(accuracy, counts)
    ctx.save_for_backward(q, cu_seqlens, mask, margin, counts)


def _backward(ctx, grad_loss, grad_margin, _grad_accuracy, _grad_counts):
    q, cu_seqlens, mask, margin, counts = ctx.saved_tensors
    grad = _pairwise_q_loss_backward(
        grad_loss, grad_margin.contiguous(), q, cu_seqlens, mask, margin, counts, ctx.beta, ctx.gamma
    )
    return grad, None, None, None, None


_pairwise_q_loss.register_autograd(_backward, setup_context=_setup_context)
