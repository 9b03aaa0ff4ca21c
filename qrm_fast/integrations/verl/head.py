"""`linear_logprobs` behind verl's fused head: the plugin `qrm_fast_head`, for `model.use_fused_kernels=True`.

Both of verl's names for it are changed, that of `impl_backend` "torch" and that of "triton"; what was asked of Liger,
of a head split over ranks, or as a sum stays verl's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import Tensor

from ... import linear_logprobs
from .hooks import after_import, hooked

# The rows [R] that a batch's loss reads, None for all of them.
_read: ContextVar[Tensor | None] = ContextVar("read", default=None)


@contextmanager
def rows_read(rows: Tensor | None) -> Iterator[None]:
    """Inside, only these rows [R] int64 of the packed hidden states are put through the head: the others give 0."""
    token = _read.set(rows)
    try:
        yield
    finally:
        _read.reset(token)


def fused_head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of `labels` [N], both [N] float32. `hidden`: [N, D]. `weight`: [V, D]."""
    rows = _read.get()
    if rows is None:
        logprobs, entropy, _ = linear_logprobs(hidden, weight, labels.long(), temperature=float(temperature))
        return logprobs, entropy
    rows = rows.to(hidden.device)
    chosen = hidden.index_select(0, rows), weight, labels.long()[rows]
    logprobs, entropy, _ = linear_logprobs(*chosen, temperature=float(temperature))
    nothing = logprobs.new_zeros(len(hidden))
    return nothing.index_copy(0, rows, logprobs), nothing.index_copy(0, rows, entropy)


@after_import("verl.utils.experimental.torch_functional", "FusedLinearForPPO of impl_backend=torch by linear_logprobs")
def _(module: ModuleType) -> None:
    owner = module.FusedLinearForPPO
    theirs = hooked(owner, "forward", "self hidden_states vocab_weights input_ids temperature")

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        if self.impl_backend != "torch":
            return theirs(self, hidden_states, vocab_weights, input_ids, temperature)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        logprobs, entropy = fused_head(hidden, vocab_weights, input_ids.reshape(-1), temperature)
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape)

    owner.forward = forward


@after_import("verl.utils.kernel.linear_cross_entropy", "that of impl_backend=triton, linear_cross_entropy, too")
def _(module: ModuleType) -> None:
    taken = "hidden weight labels temperature reduction dist_process_group"
    hooked(module.LinearCrossEntropy, "forward", f"ctx {taken}")
    theirs = module.linear_cross_entropy

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if reduction.lower() != "none" or dist_process_group is not None:
            return theirs(hidden, weight, labels, temperature, reduction, dist_process_group)
        return fused_head(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature)

    module.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
