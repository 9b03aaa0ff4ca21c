"""q_advantages on CUDA: the kernels of q_token_rewards, given the critic's values too."""

from torch import Tensor

from ..ops.moments import moments
from ..ops.q_advantages import _q_advantages
from .q_token_rewards import run


def launch(
    q: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    stats: Tensor | None,
    value_stats: Tensor | None,
    mask: Tensor | None,
    value_coef: float,
    value_normalize: bool,
    center: bool,
    rescore: bool,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    min_std: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Without statistics each sequence has its own."""
    stats = moments(q, mask, cu_seqlens) if stats is None else stats
    if values is not None and value_normalize and value_stats is None:
        value_stats = moments(values, mask, cu_seqlens)
    penalty = logprobs, ref_logprobs, kl_coef, kl_estimator
    advantages, returns = run(
        q, values, cu_seqlens, stats, value_stats, mask, value_coef, center, rescore, *penalty, min_std, eps
    )
    return returns.clone() if advantages is None else advantages, returns


_q_advantages.register_kernel("cuda")(launch)
