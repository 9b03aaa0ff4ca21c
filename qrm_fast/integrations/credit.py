"""Token-level credit of a trainer's answers: by a Q-RM or a process reward model, and by the trainer's own rewards."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import PackedBatch, per_token, prm_rewards, process_advantages, q_token_rewards
from ..ops.moments import moments
from ..rl.attention import check_packing
from ..rl.models import check_context, load_prm, load_q_rm
from ..rl.prm import ends_a_step, find_steps, separator_id, separator_of
from ..rl.scorer import StepScorer, TokenScorer
from ..rl.tokenizers import check_same_vocabulary, load_tokenizer


class Answers(NamedTuple):
    """The S answers of one generation, T actions in all, before a trainer updates on them."""

    batches: Sequence[PackedBatch]  # their sequences in order, some in each
    cu_seqlens: Tensor  # [S+1] int32, the actions of each answer
    group_ids: Tensor  # [S] int64, the prompt of each
    rewards: Tensor  # [S] float32, the trainer's rewards, NaN where there is none
    advantages: Tensor  # [S] float32, what the trainer made of them

    def longest(self) -> int:
        """Tokens of the longest sequence, its prompt included."""
        return max(batch.max_seqlen for batch in self.batches)


class Credit(Protocol):
    def __call__(self, answers: Answers) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [T] of the actions, and 0-d metrics by name."""


class QRMCredit:
    """A_t = coef * r_t + outcome_coef * A of the answer, r the normalised scores of a Q-RM (arXiv 2505.23363).

    `q_rm`: a checkpoint, as `qrm-fast train-rm` writes it. `tokenizer`: the policy's. `center`, `scope`,
    `eos_rescore` are those of `q_token_rewards`; the scale does not fall below `min_std_share` of the first batch's,
    for a Q-RM that is satisfied lets it collapse. `outcome_coef` mixes in the trainer's own advantages.

    Raises ValueError for a checkpoint that is no Q-RM, one of another vocabulary, and one that does not compute packed
    sequences as it does each alone.
    """

    def __init__(
        self,
        q_rm: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        coef: float = 1.0,
        outcome_coef: float = 0.0,
        center: bool = True,
        scope: str = "batch",
        eos_rescore: str = "none",
        min_std_share: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_same_vocabulary(tokenizer, load_tokenizer(q_rm))
        self.scorer = TokenScorer(load_q_rm(q_rm, tokenizer, dtype=dtype), reads_action=True)
        self.coef, self.outcome_coef, self.min_std_share = coef, outcome_coef, min_std_share
        self.options: dict[str, Any] = dict(center=center, scope=scope, eos_rescore=eos_rescore)
        self.min_std: float | None = None
        self.num_tokens_checked = 0

    def __call__(self, answers: Answers) -> tuple[Tensor, dict[str, Tensor]]:
        device, longest = answers.rewards.device, answers.longest()
        self.num_tokens_checked = check_model(self.scorer.model, device, longest, self.num_tokens_checked)
        q = torch.cat([self.scorer(batch) for batch in answers.batches])  # [T]
        if self.min_std is None:
            count, _, m2 = moments(q, process_group=_all_ranks())[0].unbind()
            self.min_std = self.min_std_share * (m2 / count.clamp(min=1)).sqrt().item()
        rewards = q_token_rewards(
            q,
            answers.cu_seqlens,
            group_ids=answers.group_ids if self.options["scope"] == "group" else None,
            min_std=self.min_std,
            process_group=_all_ranks() if self.options["scope"] == "batch" else None,
            **self.options,
        )
        advantages = self.coef * rewards
        if self.outcome_coef:
            advantages += self.outcome_coef * per_token(answers.advantages, answers.cu_seqlens, len(q))
        return advantages, {"q_mean": q.mean(), "q_std": q.std(correction=0)}


class ProcessCredit:
    """`process_advantages` of a process reward model and of the trainer's rewards (PURE, arXiv 2504.15275).

    `prm`: a token classifier with two labels, as `qrm-fast train-rm --kind prm` writes it or PURE published it.
    `tokenizer`: the policy's. A step ends at a token whose text ends with a blank line, and at the last token of the
    answer; the model reads `step_token` in that place, None: the separator that its checkpoint names. `preset`,
    `operator`, `temperature`, `max_gen_len` and the coefficients are those of `process_advantages`. `outcomes`: the
    trainer's rewards are verified answers, 1 or 0, and take part.

    Raises ValueError for a checkpoint that is no such model, one of another vocabulary, a tokenizer without tokens for
    steps and the model's separator, and a model that does not compute packed sequences as it does each alone.
    """

    def __init__(
        self,
        prm: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        preset: str = "paper",
        outcomes: bool = True,
        step_token: str | None = None,
        operator: str = "soft",
        temperature: float = 0.1,
        max_gen_len: int | None = None,
        process_coef: float | None = None,
        outcome_coef: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_same_vocabulary(tokenizer, load_tokenizer(prm))
        self.model = load_prm(prm, tokenizer, dtype=dtype)
        self.scorer = StepScorer(self.model)
        separator = separator_of(self.model.config) if step_token is None else step_token
        self.separator = separator_id(tokenizer, separator)
        self.ends_a_step = ends_a_step(tokenizer)
        self.outcomes = outcomes
        self.options: dict[str, Any] = dict(preset=preset, operator=operator, temperature=temperature)
        self.options |= dict(max_gen_len=max_gen_len, process_coef=process_coef, outcome_coef=outcome_coef)
        self.num_tokens_checked = 0

    def __call__(self, answers: Answers) -> tuple[Tensor, dict[str, Tensor]]:
        device, longest = answers.rewards.device, answers.longest()
        self.num_tokens_checked = check_model(self.model, device, longest, self.num_tokens_checked)
        step_rewards, ends = (torch.cat(x) for x in zip(*map(self.step_rewards, answers.batches), strict=True))
        rewards = answers.rewards
        advantages = process_advantages(
            step_rewards,
            ends.nonzero()[:, 0],
            answers.cu_seqlens,
            answers.group_ids,
            outcome_rewards=rewards.nan_to_num(0.0) if self.outcomes else None,
            has_answer=~rewards.isnan() if self.outcomes else None,
            num_tokens=len(ends),
            process_group=_all_ranks(),
            **self.options,
        )
        num_steps = step_rewards.new_tensor(len(step_rewards) / len(rewards))
        return advantages, {"step_reward_mean": step_rewards.mean(), "steps_per_answer": num_steps}

    def step_rewards(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Rewards [K] of the steps of a batch, and for each of its T actions whether it ends one."""
        read, rows = find_steps(batch, self.ends_a_step.to(batch.targets.device), self.separator)
        ends = torch.zeros_like(batch.action_index, dtype=torch.bool).index_fill(0, rows, True)
        return prm_rewards(self.scorer(read, rows)), ends


def check_model(model: Any, device: torch.device | str, longest: int, num_tokens_checked: int) -> int:
    """Move `model` to `device`; where a sequence is longer than those before, see that it may be packed.

    Returns the length that has been checked. Raises ValueError for one past the model's positions, or a leak.
    """
    model.to(device)
    if longest <= num_tokens_checked:
        return num_tokens_checked
    check_context(model, longest)
    check_packing(model, longest)
    return longest


def _all_ranks() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
