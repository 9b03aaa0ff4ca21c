"""Every public function as a call of the same inputs, which a test changes, copies and hands to two calls at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import qrm_fast
from qrm_fast import LogprobsPartial

LEAVES = 6


class Sizes(NamedTuple):
    tokens: int
    sequences: int
    steps: int
    hidden: int
    vocab: int
    width: int  # of padded rows


class Inputs(NamedTuple):
    """What the calls read; the first LEAVES of them get gradients."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    head: Tensor  # [D]
    logits: Tensor  # [T, V]
    logprobs: Tensor  # [T]
    values: Tensor  # [T]
    rows: Tensor  # [4, T]
    ratios: Tensor  # [T]
    steps: Tensor  # [K]
    answers: Tensor  # [S]
    prm_logits: Tensor  # [K, 2]
    padded: Tensor  # [S, width]
    real: Tensor  # [S, width]
    cu_seqlens: Tensor
    step_cu: Tensor
    step_ends: Tensor
    group_ids: Tensor
    targets: Tensor
    uniforms: Tensor  # [T] float64


def inputs(sizes: Sizes, seed: int, device: str) -> Inputs:
    """Random numbers and boundaries; a sequence may be empty or hold no step."""
    t, s, k, d, v, width = sizes
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def boundaries(end: int) -> Tensor:
        inner = torch.randint(end + 1, (s - 1,), generator=g)
        return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([end])])

    lengths = torch.randint(1, width + 1, (s, 1), generator=g)
    made = Inputs(
        hidden=randn(t, d),
        weight=randn(v, d),
        head=randn(d),
        logits=randn(t, v),
        logprobs=-torch.rand(t, generator=g),
        values=randn(t),
        rows=randn(4, t),
        ratios=randn(t).exp(),
        steps=randn(k),
        answers=torch.rand(s, generator=g),
        prm_logits=randn(k, 2),
        padded=randn(s, width),
        real=torch.arange(width) < lengths,
        cu_seqlens=boundaries(t),
        step_cu=boundaries(k),
        step_ends=torch.randperm(t, generator=g)[:k].sort().values,
        group_ids=torch.randint(s, (s,), generator=g) // 2,
        targets=torch.randint(v, (t,), generator=g),
        uniforms=torch.rand(t, generator=g, dtype=torch.float64),
    )
    return Inputs(*(x.to(device).requires_grad_(i < LEAVES) for i, x in enumerate(made)))


def shards(x: Inputs) -> list[LogprobsPartial]:
    half = len(x.weight) // 2
    return [
        qrm_fast.linear_logprobs_partial(x.hidden.detach(), part, x.targets, vocab_start=start)
        for start, part in ((0, x.weight.detach()[:half]), (half, x.weight.detach()[half:]))
    ]


CALLS: dict[str, Callable[[Inputs], object]] = {
    "clip_delta": lambda x: qrm_fast.clip_delta(x.steps, x.step_cu),
    "discounted_returns": lambda x: qrm_fast.discounted_returns(x.rows[0], x.cu_seqlens),
    "from_padded": lambda x: qrm_fast.from_padded(x.real, x.padded),
    "gae": lambda x: qrm_fast.gae(x.rows[0], x.rows[1], x.cu_seqlens),
    "gather_logprobs": lambda x: qrm_fast.gather_logprobs(x.logits, x.targets),
    "group_advantages": lambda x: qrm_fast.group_advantages(x.answers, x.group_ids),
    "implicit_rewards": lambda x: qrm_fast.implicit_rewards(x.rows[0], x.rows[1]),
    "informative_groups": lambda x: qrm_fast.informative_groups(x.answers, x.group_ids),
    "linear_logprobs": lambda x: qrm_fast.linear_logprobs(x.hidden, x.weight, x.targets),
    "linear_logprobs_partial": lambda x: shards(x)[0],
    "linear_policy_loss": lambda x: qrm_fast.linear_policy_loss(x.hidden, x.weight, x.targets, x.rows[0]),
    "linear_q_values": lambda x: qrm_fast.linear_q_values(
        x.hidden.detach(), x.weight.detach(), x.hidden.detach(), x.weight.detach(), x.targets
    ),
    "linear_sample": lambda x: qrm_fast.linear_sample(x.hidden.detach(), x.weight.detach(), x.uniforms),
    "loss_weights": lambda x: qrm_fast.loss_weights(x.cu_seqlens, num_tokens=len(x.targets)),
    "merge_logprobs": lambda x: qrm_fast.merge_logprobs(
        LogprobsPartial(*map(torch.stack, zip(*shards(x), strict=True)))
    ),
    "min_form_returns": lambda x: qrm_fast.min_form_returns(
        x.steps, x.step_ends, x.cu_seqlens, num_tokens=len(x.targets)
    ),
    "min_gae": lambda x: qrm_fast.min_gae(x.rows[0], x.rows[1], x.cu_seqlens),
    "pack": lambda _: qrm_fast.pack([[2, 3, 4, 5, 1], [6, 7, 1]], [1, 1]),
    "pairwise_q_loss": lambda x: qrm_fast.pairwise_q_loss(x.values, x.cu_seqlens),
    "per_token": lambda x: qrm_fast.per_token(x.answers, x.cu_seqlens, len(x.targets)),
    "plan_microbatches": lambda _: qrm_fast.plan_microbatches([4, 2], max_tokens=4),
    "policy_loss": lambda x: qrm_fast.policy_loss(x.logprobs, x.rows[0]),
    "prm_rewards": lambda x: qrm_fast.prm_rewards(x.prm_logits),
    "process_advantages": lambda x: qrm_fast.process_advantages(
        x.steps, x.step_ends, x.cu_seqlens, x.group_ids, max_gen_len=8, num_tokens=len(x.targets)
    ),
    "process_diagnostics": lambda x: qrm_fast.process_diagnostics(x.steps, x.step_ends, x.cu_seqlens),
    "progress_rewards": lambda x: qrm_fast.progress_rewards(x.steps, x.answers, x.step_cu),
    "q_advantages": lambda x: qrm_fast.q_advantages(x.rows[0], x.rows[1], x.cu_seqlens),
    "q_head_advantages": lambda x: qrm_fast.q_head_advantages(x.hidden.detach(), x.head.detach(), x.cu_seqlens),
    "q_token_rewards": lambda x: qrm_fast.q_token_rewards(x.rows[0], x.cu_seqlens),
    "to_padded": lambda x: qrm_fast.to_padded(x.rows[0], x.cu_seqlens, len(x.targets)),
    "token_q": lambda x: qrm_fast.token_q(x.hidden, x.head),
    "unpack": lambda x: qrm_fast.unpack(x.rows[0], x.cu_seqlens),
    "value_loss": lambda x: qrm_fast.value_loss(x.values, x.rows[0]),
    "vtrace": lambda x: qrm_fast.vtrace(x.rows[0], x.rows[1], x.ratios, x.cu_seqlens),
    "whiten": lambda x: qrm_fast.whiten(x.rows[0]),
}


def in_16_bits(x: Inputs) -> Inputs:
    return x._replace(hidden=x.hidden.bfloat16(), weight=x.weight.bfloat16(), head=x.head.bfloat16())


for name in (
    "linear_logprobs",
    "linear_policy_loss",
    "linear_q_values",
    "linear_sample",
    "q_head_advantages",
    "token_q",
):
    CALLS[f"{name} in 16 bits"] = lambda x, call=CALLS[name]: call(in_16_bits(x))


def tensors(result: object) -> list[Tensor]:
    """Those of a result, of its parts, and so on."""
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in tensors(part)] if isinstance(result, (tuple, list)) else []


def outcome(name: str, x: Inputs) -> list[Tensor]:
    """What a function returns, then the gradients of the sum of it."""
    results = tensors(CALLS[name](x))
    summed = [r.sum() for r in results if r.requires_grad]
    grads = torch.autograd.grad(summed, [y for y in x if y.requires_grad], allow_unused=True) if summed else ()
    return [r.detach() for r in results] + [g for g in grads if g is not None]
