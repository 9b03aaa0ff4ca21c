"""Hidden states to advantages: the scalar Q-head and the normalisation of each sequence in one call."""

from torch import Tensor

from .autocast import as_for_linear
from .checks import BOOL, FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .moments import moments
from .q_token_rewards import EOS_RESCORES, _q_token_rewards
from .token_q import _token_q


def q_head_advantages(
    hidden: Tensor,
    head: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    center: bool = False,
    eos_rescore: str = "none",
    min_std: float = 0.0,
    eps: float = 1e-8,
) -> Tensor:
    """The advantage of every action, [T] float32 (float64 for float64), in one launch.

    `hidden`: [T, D] floating, rows may be strided, the state that has consumed the action (after the final norm).
    `head`: [D] or [1, D] of its dtype. `cu_seqlens`: [S+1] int32 or int64. `mask`: [T] bool; rows where it is False are
    not read, count nowhere and give 0.

        q_t = h_t . head        A = q normalised by its own sequence

    as `token_q` followed by `q_token_rewards` with scope "sequence", whose options these are: A_t = (q_t - mu if center
    else q_t) / (max(sigma, min_std) + eps), then the EOS re-score (Q-RM, arXiv 2505.23363, with the statistics of each
    answer, so that no answer waits for the batch). A row's bits depend on its own sequence and the head alone. A row
    that is not finite is left out of mu and sigma and shows in its own sequence only. Under autocast the tensors are
    cast as for F.linear. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device or an unknown option, and, on CPU, ValueError
    where cu_seqlens do not start at 0, decrease, or do not end at T.
    """
    hidden, head = as_for_linear(hidden, head)
    check = Checker()
    check("hidden", hidden, "T D", FLOATS, strided=True)
    if isinstance(head, Tensor) and head.ndim == 2:
        check("head", head, "1 D", (hidden.dtype,))
        head = head[0]
    check("head", head, "D", (hidden.dtype,))
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if mask is not None:
        check("mask", mask, "T", BOOL)
    if eos_rescore not in EOS_RESCORES:
        raise ValueError(f"eos_rescore must be one of {', '.join(EOS_RESCORES)}, got {eos_rescore!r}")
    if not min_std >= 0 or not eps >= 0:
        raise ValueError(f"min_std and eps must be >= 0, got {min_std} and {eps}")
    rescore_last = eos_rescore == "mean"
    return _q_head_advantages(hidden, head, cu_seqlens, mask, bool(center), rescore_last, float(min_std), float(eps))


@constant_op("q_head_advantages")
def _q_head_advantages(
    hidden: Tensor,
    head: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    center: bool,
    rescore_last: bool,
    min_std: float,
    eps: float,
) -> Tensor:
    q = _token_q(hidden, head[None], None, None, None, 0.0)
    stats = moments(q, mask, cu_seqlens)
    return _q_token_rewards(q, cu_seqlens, stats, mask, center, rescore_last, None, None, 0.0, "abs", min_std, eps)


@_q_head_advantages.register_fake
def _(hidden, head, cu_seqlens, mask, center, rescore_last, min_std, eps):
    return hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
