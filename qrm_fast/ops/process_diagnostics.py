"""What process rewards look like before they are hacked: where the worst step lies, and who gets the advantage."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .min_form_returns import check_steps, form_of
from .segments import sequence_ids, sequence_sum


class ProcessDiagnostics(NamedTuple):
    outcome: Tensor  # [S] float32
    worst_position: Tensor  # [S] float32, in (0, 1]
    effective_steps: Tensor  # [S] float32, at least 1
    one_step: Tensor  # 0-d float32, share of answers
    short: Tensor  # 0-d float32, share of answers
    one_step_mass: Tensor | None  # 0-d float32, share of |A|
    short_mass: Tensor | None  # 0-d float32, share of |A|


def process_diagnostics(
    step_rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 0.1,
    min_tokens: int = 8,
    advantages: Tensor | None = None,
) -> ProcessDiagnostics:
    """Statistics of a rollout's process rewards that move before its reward is hacked.

    `step_rewards`, `step_ends`: [K] as in `min_form_returns`. `cu_seqlens`: [S+1] int32 or int64. `advantages`: [T] of
    the results' dtype. Per sequence, [S], with w = softmax(-r / temperature) over its n steps:

        outcome          sum of w r, the soft minimum (PURE, arXiv 2504.15275, logs it)
        worst_position   (index of the worst step) / n, counted from 1, the first of equal ones
        effective_steps  exp(entropy of w): how many steps share the blame

    and over the batch, 0-d: `one_step` and `short`, the shares of answers with at most one step and with fewer than
    `min_tokens` rows; `one_step_mass` and `short_mass`, the shares of the sum of |A| that lie on those, None without
    `advantages`: a policy that learns to write empty answers shows there first. Rows of A that are not finite count
    nowhere; a share of nothing is 0. Without steps the three are 0, with a step reward that is not finite NaN. All are
    float32 (float64 for float64). Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device or a negative temperature, and, on CPU, ValueError
    where cu_seqlens do not start at 0 or decrease, do not end at T where `advantages` say what T is, or step_ends do
    not ascend within [0, T).
    """
    check = Checker()
    check_steps(check, step_rewards, step_ends, cu_seqlens)
    _, temperature = form_of("soft", temperature)
    if advantages is not None:
        check("advantages", advantages, "T", (acc_dtype(step_rewards.dtype),))
    per_sequence, shares = _process_diagnostics(
        step_rewards, step_ends, cu_seqlens, temperature, int(min_tokens), advantages
    )
    outcome, worst_position, effective_steps = per_sequence.unbind()
    one_step, short, *mass = shares.unbind()
    one_step_mass, short_mass = mass if advantages is not None else (None, None)
    return ProcessDiagnostics(outcome, worst_position, effective_steps, one_step, short, one_step_mass, short_mass)


@constant_op("process_diagnostics")
def _process_diagnostics(
    step_rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    min_tokens: int,
    advantages: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[3, S] per sequence and [4] shares."""
    num_steps = step_rewards.shape[0]
    cu = cu_seqlens.to(torch.int64)
    step_cu = torch.searchsorted(step_ends.to(torch.int64), cu)
    n, r = step_cu.diff(), step_rewards.double()
    i_seq = sequence_ids(step_cu, num_steps).clamp(max=max(n.shape[0] - 1, 0))  # [K]
    low = -torch.segment_reduce(-r, "max", offsets=step_cu, unsafe=True, initial=-torch.inf)
    excess = r - low[i_seq]
    scaled = (excess / temperature).where(excess != 0, 0.0)
    weights = torch.exp(-scaled)
    total = sequence_sum(weights, step_cu)
    outcome = sequence_sum(weights * r, step_cu) / total
    entropy = total.log() + sequence_sum((weights * scaled).where(weights != 0, 0.0), step_cu) / total
    k = torch.arange(num_steps, device=r.device)
    lowest = torch.where(excess == 0, k, num_steps).double()
    worst = -torch.segment_reduce(-lowest, "max", offsets=step_cu, unsafe=True, initial=-torch.inf)
    position = (worst - step_cu[:-1] + 1) / n
    broken = sequence_sum((~r.isfinite()).double(), step_cu) > 0
    per_sequence = torch.stack([outcome, position, entropy.exp()])
    per_sequence = per_sequence.masked_fill(broken, torch.nan).where(n > 0, 0.0)

    few = torch.stack([n <= 1, cu.diff() < min_tokens]).double()  # [2, S]
    shares = few.sum(1) / max(n.shape[0], 1)
    masses = torch.zeros_like(shares)
    if advantages is not None:
        mass = sequence_sum(advantages.double().abs().where(advantages.isfinite(), 0.0), cu)
        masses = (few * mass).sum(1) / mass.sum()
        masses = masses.where(mass.sum() > 0, 0.0)
    acc = acc_dtype(step_rewards.dtype)
    return per_sequence.to(acc), torch.cat([shares, masses]).to(acc)


@_process_diagnostics.register_fake
def _(step_rewards, step_ends, cu_seqlens, temperature, min_tokens, advantages):
    acc = acc_dtype(step_rewards.dtype)
    return step_rewards.new_empty(3, cu_seqlens.shape[0] - 1, dtype=acc), step_rewards.new_empty(4, dtype=acc)
