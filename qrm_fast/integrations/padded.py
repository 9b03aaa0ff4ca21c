"""Padded functions of TRL, verl and OpenRLHF, by their names and signatures, on packed kernels.

A padded tensor [B, L] already is a packed one: B sequences of L rows under a mask. So nothing is gathered and nothing
waits for the device: the rows are flattened, the op takes the mask, and its result is viewed as [B, L].

Results are float32 (float64 for float64) where the originals keep 16 bits, and 0 where a mask is False, where the
originals leave what their formulas give there. Masks are bool, or numbers of which 0 is False. Advantages and whitened
rows are not differentiable.
"""

import torch
from torch import Tensor

from .. import gae, gather_logprobs, loss_weights, whiten
from ..ops.dtypes import acc_dtype
from ..ops.linear_logprobs import TokenLogprobs
from ..ops.moments import moments


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's: log_softmax of `logits` [..., V] at `labels` [...], of labels' shape; differentiable in logits.

    One read of the logits, one more backward. Labels of -100 give 0. `inplace_backward` has nothing to decide here.
    """
    return _statistics(logits, labels, 1.0).logprobs


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """TRL's: log_softmax of `logits` / temperature at `index`, [...] or [..., K] beside logits [..., V]; index's shape.

    Rows where `row_mask`, of index's shape, holds a 0 give 0 and are not read. Differentiable in logits. K columns cost
    what one does: log p_k = z_k - lse, and lse = z - log p of the largest of them.
    """
    several = index.ndim == logits.ndim
    targets = index
    if several:
        z = logits.gather(-1, index).to(acc_dtype(logits.dtype)) / temperature  # [..., K]
        top = z.detach().argmax(-1, keepdim=True)
        targets = index.gather(-1, top)[..., 0]
    idle = None
    if row_mask is not None:
        idle = (row_mask == 0).any(-1) if several else row_mask == 0
        targets = targets.masked_fill(idle, -100)
    logprobs = _statistics(logits, targets, temperature).logprobs
    if not several:
        return logprobs
    logprobs = z - (z.gather(-1, top) - logprobs[..., None])
    return logprobs if idle is None else logprobs.masked_fill(idle[..., None], 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """TRL's and verl's: the entropy in nats of each row of `logits` [..., V], [...]; differentiable in logits.

    No chunk is ever materialised, so `chunk_size` has nothing to decide here.
    """
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _statistics(logits, targets, 1.0).entropy


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """TRL's and verl's: (values - mean) / sqrt(var + 1e-8), plus the mean again without `shift_mean`; values' shape.

    Mean and unbiased variance are those of the rows where `mask`, of values' shape, is True. Where one such row or none
    is left they raise; here the variance is 0 and so are the results.
    """
    x, keep = values.flatten(), (mask != 0).flatten()
    whitened = whiten(x, mask=keep, unbiased=True)
    if not shift_mean:
        mean = moments(x, keep)[0, 1].to(whitened.dtype)
        whitened = (whitened + mean).where(keep, 0.0)
    return whitened.view(values.shape)


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """verl's: whitened advantages and returns, [B, L] each, of rewards, values and mask [B, L].

    Rows where the mask is False (observations, padding) carry the recurrence through.
    """
    rewards, values = _same_dtype(token_level_rewards, values)
    mask = (response_mask != 0).flatten()
    out = gae(rewards.flatten(), values.flatten(), row_bounds(values), gamma=float(gamma), lam=float(lam), mask=mask)
    return masked_whiten(out.advantages, mask).view(values.shape), out.returns.view(values.shape)


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """OpenRLHF's: advantages and returns, [B, L] each, of values, rewards and mask [B, L] (None: all rows).

    Rows where the mask is False count with reward and value 0 and the discount goes on over them: what OpenRLHF
    computes, there too.
    """
    rewards, values = _same_dtype(rewards, values)
    if action_mask is not None:
        rewards, values = (x.where(action_mask != 0, 0.0) for x in (rewards, values))
    out = gae(rewards.flatten(), values.flatten(), row_bounds(values), gamma=float(gamma), lam=float(lambd))
    return out.advantages.view(values.shape), out.returns.view(values.shape)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """verl's: the average of `loss_mat` [B, L] over `loss_mask` [B, L] that `loss_agg_mode` names, 0-d; differentiable.

    Modes are those of `loss_weights`, and "token-sum". Denominators left None are counted here, which on several ranks
    (`dp_size` > 1, by which the loss is multiplied) is refused. `loss_scale_factor` None: L. verl multiplies by the
    mask, here what it hides may be NaN.
    """
    mask = loss_mask != 0
    given = dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    return (loss_mat.where(mask, 0.0) * agg_weights(mask, loss_agg_mode, *given)).sum()


def agg_weights(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """The weights w [B, L] float32 with which `agg_loss` over `mask` [B, L] bool is the sum of w times the loss."""
    of_tokens = loss_agg_mode in ("token-mean", "token-sum")
    total = batch_num_tokens if of_tokens else global_batch_size
    if loss_agg_mode == "token-sum":
        total = 1
    if total is None and dp_size > 1:
        name = "batch_num_tokens" if of_tokens else "global_batch_size"
        raise ValueError(f"{name} must be given for {loss_agg_mode!r} where dp_size is {dp_size}, got None")
    weights = loss_weights(
        row_bounds(mask),
        mask=mask.flatten(),
        mode="token-mean" if of_tokens else loss_agg_mode,
        global_tokens=total if of_tokens else None,
        global_sequences=None if of_tokens else total,
        norm=(loss_scale_factor or mask.shape[-1]) if loss_agg_mode == "seq-mean-token-sum-norm" else None,
    )
    return weights.view(mask.shape) * dp_size


def row_bounds(x: Tensor) -> Tensor:
    """[B+1] int64: where the rows of a padded [B, L] begin and end, laid end to end."""
    num_sequences, width = x.shape
    return torch.arange(num_sequences + 1, device=x.device) * width


def _same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _statistics(logits: Tensor, targets: Tensor, temperature: float) -> TokenLogprobs:
    """`gather_logprobs` of [..., V]; a slice that cannot be flattened goes row by row: a copy would be its size."""
    if logits.ndim > 2 and not logits.is_contiguous():
        parts = [_statistics(*rows, temperature) for rows in zip(logits, targets, strict=True)]
        return TokenLogprobs(*(torch.stack(x) for x in zip(*parts, strict=True)))
    out = gather_logprobs(logits.flatten(0, -2), targets.flatten().long().contiguous(), temperature=temperature)
    return TokenLogprobs(*(x.view(targets.shape) for x in out))
