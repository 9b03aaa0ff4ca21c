"""Advantage estimators for `algorithm.adv_estimator`: padded [B, T] in and out, as verl calls them.

`token_level_rewards`: [B, T] floating. `response_mask`: [B, T], 0 on padding and on tokens that the policy did not
write. `config`: verl's `algorithm`; its entry `qrm` holds our options (`+algorithm.qrm.operator=hard`). `index`: [B],
the prompts' ids. Each returns (advantages, returns), [B, T] float32 and 0 where the mask is; neither has a gradient.

A reward on a token under the mask, as of an answer that ends in a tool's output, counts at the trainable one before it.
Only `qrm_q` leaves such a score out: it is a return, which is not added to another.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ... import from_padded, group_advantages, min_form_returns, process_advantages, q_token_rewards
from ..padded import compute_gae_advantage_return, row_bounds
from ..rewards import onto_trainable

Estimate = tuple[Tensor, Tensor]


def qrm_min_form(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any) -> Estimate:
    """Min-form returns of process rewards (PURE, arXiv 2504.15275): every rewarded token, and the last, ends a step.

    Options: `operator` ("soft", "hard", "revmin", "causal_soft", "sum", "mean") and `temperature`, of
    `min_form_returns`.
    """
    options = _options(config, operator="soft", temperature=0.1)
    rewards, mask = _trainable(token_level_rewards, response_mask, config)
    cu_seqlens, r = from_padded(mask, rewards)
    step_ends = (r != 0).index_fill(0, last_rows(cu_seqlens), True).nonzero()[:, 0]
    returns = min_form_returns(r[step_ends], step_ends, cu_seqlens, num_tokens=len(r), **options).returns
    return _padded(returns, mask)


def qrm_pure(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> Estimate:
    """`process_advantages` of two streams: the last token of an answer holds the verifier's outcome, 1 or 0, every
    other rewarded token the process reward of the step that it ends; the last step reaches to the end of the answer.

    Options: those of `process_advantages` of the same name, and `outcomes`, False where no verifier spoke. Presets
    "paper" and "verl" need `max_gen_len` (`+algorithm.qrm.max_gen_len=${data.max_response_length}`).
    """
    options = _options(
        config,
        **dict(preset="paper", operator="soft", temperature=0.1, max_gen_len=None, outcomes=True),
        **dict(process_coef=None, outcome_coef=None, mask_step_ends=None),
    )
    rewards, mask = _trainable(token_level_rewards, response_mask, config)
    cu_seqlens, r = from_padded(mask, rewards)
    last = last_rows(cu_seqlens)
    outcomes = None
    if options.pop("outcomes"):
        outcomes = r.new_zeros(len(mask)).masked_scatter(cu_seqlens.diff() > 0, r[last])
        r = r.index_fill(0, last, 0.0)
    step_ends = (r != 0).nonzero()[:, 0]
    step_rewards = r[step_ends]
    answer = torch.bucketize(step_ends, cu_seqlens[1:].long(), right=True)
    is_last_step = torch.ones_like(answer, dtype=torch.bool)
    is_last_step[:-1] = answer[1:] != answer[:-1]
    step_ends = torch.where(is_last_step, cu_seqlens[1:][answer].long() - 1, step_ends)
    ids = _group_ids(index, mask)
    options |= dict(outcome_rewards=outcomes, num_tokens=len(r))
    advantages = process_advantages(step_rewards, step_ends, cu_seqlens, ids, **options)
    return _padded(advantages, mask)


def qrm_q(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> Estimate:
    """Scores of a Q-RM as advantages (arXiv 2505.23363): they are returns already, with nothing left to sum.

    Options: `center`, `scope`, `eos_rescore`, `min_std` and `eps`, of `q_token_rewards`.
    """
    options = _options(config, center=False, scope="batch", eos_rescore="none", min_std=0.0, eps=1e-8)
    _refuse_kl_in_reward(config)
    mask = response_mask != 0
    cu_seqlens, q = from_padded(mask, token_level_rewards.float())
    ids = _group_ids(index, mask) if options["scope"] == "group" else None
    return _padded(q_token_rewards(q, cu_seqlens, group_ids=ids, **options), mask)


def qrm_rloo(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> Estimate:
    """verl's `rloo` (arXiv 2402.14740): the answer's reward less the mean of the others', on each of its tokens."""
    _options(config)
    return _of_answers(token_level_rewards, response_mask, index, "rloo")


def qrm_grpo(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **_: Any
) -> Estimate:
    """verl's `grpo` (arXiv 2402.03300), or Dr. GRPO (arXiv 2503.20783) where `norm_adv_by_std_in_grpo` is False."""
    _options(config)
    normed = config is None or config.get("norm_adv_by_std_in_grpo", True)
    return _of_answers(token_level_rewards, response_mask, index, "grpo" if normed else "dr_grpo")


def qrm_gae(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, values: Any = None, **_: Any
) -> Estimate:
    """verl's `gae` (arXiv 1506.02438) with `gamma` and `lam` of `config`, whitened. `values`: [B, T], of a critic.

    verl hands a registered estimator no values; `compute_advantage` does with the change that this package makes to it.
    Needs `critic.enable=True`, which verl sets by itself for `gae` alone.
    """
    _options(config)
    if values is None:
        raise ValueError("qrm_gae needs the values of a critic, set critic.enable=True, got None")
    rewards, mask = _trainable(token_level_rewards, response_mask)
    return compute_gae_advantage_return(rewards, values, mask, config["gamma"], config["lam"])


ESTIMATORS = (qrm_min_form, qrm_pure, qrm_q, qrm_rloo, qrm_grpo, qrm_gae)


def _options(config: Any, **defaults: Any) -> dict[str, Any]:
    given = (config.get("qrm") if config is not None else None) or {}
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"algorithm.qrm takes {', '.join(defaults) or 'nothing'} here, got {', '.join(unknown)}")
    return defaults | {name: given[name] for name in given}


def _trainable(rewards: Tensor, response_mask: Tensor, config: Any = None) -> tuple[Tensor, Tensor]:
    """[B, T] float32 rewards, each on a trainable token (`onto_trainable`), and the mask as bool."""
    _refuse_kl_in_reward(config)
    mask, r = response_mask != 0, rewards.float()
    moved = onto_trainable(r.flatten(), row_bounds(r), mask.flatten())
    return moved.view(r.shape), mask


def _refuse_kl_in_reward(config: Any) -> None:
    if config is not None and config.get("use_kl_in_reward", False):
        raise ValueError(
            "algorithm.use_kl_in_reward must be False here, for it makes every token a rewarded one: put the KL into "
            "the loss, actor_rollout_ref.actor.use_kl_loss=True"
        )


def last_rows(cu_seqlens: Tensor) -> Tensor:
    """The last packed row of every answer that has one."""
    return cu_seqlens[1:][cu_seqlens.diff() > 0].long() - 1


def _padded(rows: Tensor, mask: Tensor) -> Estimate:
    padded = rows.new_zeros(mask.shape).masked_scatter(mask, rows)
    return padded, padded


def _of_answers(token_level_rewards: Tensor, response_mask: Tensor, index: Any, kind: str) -> Estimate:
    mask = response_mask != 0
    rewards, ids = token_level_rewards.float().sum(1), _group_ids(index, mask)
    advantages = group_advantages(rewards, ids, kind=kind)
    if kind == "dr_grpo":  # verl compares a lone answer with 0
        lone = torch.bincount(ids, minlength=len(ids))[ids] == 1
        advantages = torch.where(lone, rewards, advantages)
    padded = torch.where(mask, advantages[:, None], 0.0)
    return padded, padded


def _group_ids(index: Iterable[Any] | None, mask: Tensor) -> Tensor:
    """[B] int64 on mask's device: equal where the prompts are."""
    if index is None:
        raise ValueError("answers to one prompt must share an entry of `uid`, which this batch of verl's lacks")
    seen: dict[Any, int] = {}
    ids = [seen.setdefault(prompt, len(seen)) for prompt in (index.tolist() if hasattr(index, "tolist") else index)]
    return torch.tensor(ids, dtype=torch.int64, device=mask.device)
