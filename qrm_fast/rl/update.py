"""One step of an optimiser over the micro-batches of a mini-batch, for the policy and for a critic."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import PackedBatch, PolicyMetrics, loss_weights, value_loss
from ..ops.moments import moments
from . import ranks
from .config import Config
from .optimizer import AdamW
from .policy import Policy
from .recompute import recomputed
from .scorer import TokenScorer


class MicroBatch(NamedTuple):
    """Answers that share one forward and backward pass, and what the loss reads of their T actions."""

    batch: PackedBatch
    advantages: Tensor  # [T] float32
    returns: Tensor  # [T] float32
    old_logprobs: Tensor  # [T] float32
    ref_logprobs: Tensor | None  # [T] float32


class Denominators(NamedTuple):
    """What a mini-batch's losses are divided by: its even share of all counts, so that micro-batches add up exactly."""

    num_answers: float
    num_actions: float


class Sums(NamedTuple):
    """Of one step: sums over its micro-batches, a maximum, and the norm of the gradient before it was scaled down.

    Sums and maximum are those of this process, the gradient that of all.
    """

    loss: Tensor  # 0-d
    weight: Tensor  # 0-d, of all tokens
    metrics: PolicyMetrics
    grad_norm: Tensor  # 0-d
    logprobs: Tensor  # [T] of its tokens, by the policy before it moved


def update(
    policy: Policy,
    optimizer: AdamW,
    minibatch: Iterable[MicroBatch],
    denominators: Denominators,
    config: Config,
    lr: float,
) -> Sums:
    """Move the policy by the gradient of the mini-batch's loss."""
    in_loss = config.kl_in == "loss" and config.kl_coef > 0
    rows, all_logprobs = [], []
    for batch, advantages, _, old_logprobs, ref_logprobs in minibatch:
        weights = weights_of(batch, denominators, config)  # [T]
        with activations(policy, config):
            loss, logprobs, _, metrics = policy.loss(
                batch,
                advantages,
                old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs,
                token_weights=weights,
                temperature=config.temperature,
                kind=config.algorithm,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                kl_coef=config.kl_coef if in_loss else 0.0,
                kl_estimator=config.kl_estimator if in_loss else "k3",
                entropy_coef=config.entropy_coef,
            )
        loss.backward()
        rows.append(torch.stack([loss.detach(), weights.sum(), *metrics]))
        all_logprobs.append(logprobs.detach())
    table = torch.stack(rows)
    loss, weight, *additive = table[:, :-1].sum(0)
    metrics = PolicyMetrics._make([*additive, table[:, -1].max()])
    return Sums(loss, weight, metrics, optimizer.step(lr, config.max_grad_norm), torch.cat(all_logprobs))


def update_critic(
    critic: TokenScorer,
    optimizer: AdamW,
    minibatch: Iterable[MicroBatch],
    denominators: Denominators,
    config: Config,
    lr: float,
) -> Tensor:
    """Move the critic towards the returns. Returns the norm of its gradient before it was scaled down, 0-d."""
    for batch, _, returns, *_ in minibatch:
        with activations(critic, config):
            values = critic(batch)
        value_loss(values, returns, token_weights=weights_of(batch, denominators, config)).backward()
    return optimizer.step(lr, config.max_grad_norm)


def activations(module: Policy | TokenScorer, config: Config) -> AbstractContextManager[None]:
    """What a forward pass keeps for its backward pass: all, or layers' inputs alone."""
    return recomputed(module.model) if config.recompute else nullcontext()


def weights_of(batch: PackedBatch, denominators: Denominators, config: Config) -> Tensor:
    """Weight [T] of every action in the loss of its mini-batch."""
    return loss_weights(
        batch.action_cu_seqlens,
        mode=config.loss_mode,
        global_tokens=denominators.num_actions,
        global_sequences=denominators.num_answers,
        norm=config.max_new_tokens if config.loss_mode == "seq-mean-token-sum-norm" else None,
        num_tokens=len(batch.action_index),
    )


def means(steps: list[Sums], critic_norms: list[Tensor]) -> dict[str, Tensor]:
    """What is reported of an iteration: the loss of a step on average, and means over the tokens trained on.

    `policy/skipped` counts the steps whose gradient was not finite, which changed nothing, the critic's among them.
    """
    norms = torch.stack([*(step.grad_norm for step in steps), *critic_norms])
    table = torch.stack([torch.stack([step.loss, step.weight, *step.metrics]) for step in steps])
    table = ranks.gather(table).flatten(0, 1)  # [processes and steps, numbers]
    loss, weight, *additive, _ = table.sum(0)
    names = ("clipfrac_low", "clipfrac_high", "approx_kl", "ref_kl", "ratio", "entropy")
    return {
        "policy/loss": loss / len(steps),
        **{f"policy/{name}": x / weight for name, x in zip(names, additive, strict=True)},
        "policy/ratio_max": table[:, -1].max(),
        "policy/grad_norm": steps[-1].grad_norm,
        "policy/skipped": (~norms.isfinite()).sum(),
        **({"critic/grad_norm": critic_norms[-1]} if critic_norms else {}),
    }


def disagreement(first: Sums, sampled: Tensor) -> dict[str, Tensor]:
    """How far the sampler is from the policy it stands for, over the tokens of an iteration's first step.

    `sampled`: [T] float32, the log-probabilities of sampling, of which the first are those of that step.
    """
    distance = (first.logprobs - sampled[: len(first.logprobs)]).abs()
    count = torch.full_like(first.weight, len(distance))
    rows = ranks.gather(torch.stack([distance.sum(), count, F.pad(distance, (0, 1)).amax()]))
    total, num_tokens, _ = rows.sum(0)
    return {"rollout/logratio_mean_abs": total / num_tokens, "rollout/logratio_max_abs": rows[:, 2].amax()}


def report(
    advantages: Tensor, steps: list[Sums], critic_norms: list[Tensor], own: dict[str, Tensor], num_answers: int
) -> dict[str, float]:
    """What an iteration measured, of all processes; `own` is averaged over them, each with its `num_answers`.

    Waits for the device.
    """
    count, mean, squares = moments(advantages, process_group=ranks.world())[0]
    stats = {"advantage/mean": mean, "advantage/std": (squares / count).sqrt(), **means(steps, critic_norms)}
    values = torch.stack([x.to(mean) for x in own.values()])
    stats |= zip(own, ranks.mean(values, num_answers), strict=True)
    return dict(zip(stats, torch.stack([x.to(mean) for x in stats.values()]).tolist(), strict=True))
