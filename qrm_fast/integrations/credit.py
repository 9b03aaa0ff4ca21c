"""Token-level credit of a trainer's answers: by a Q-RM or a process reward model, and by the trainer's own rewards."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from .. import PackedBatch, per_token, prm_rewards, process_advantages, q_token_rewards
from ..rl.attention import check_packing, packed_hidden
from ..rl.models import check_context, load_q_rm, load_token_model
from ..rl.scorer import TokenScorer
from ..rl.tokenizers import check_same_vocabulary, load_tokenizer


class Answers(NamedTuple):
    """The S answers of one generation, T actions in all, before a trainer updates on them."""

    batches: Sequence[PackedBatch]  # their sequences in order, some in each
    cu_seqlens: Tensor  # [S+1] int32, the actions of each answer
    group_ids: Tensor  # [S] int64, the prompt of each
    rewards: Tensor  # [S] float32, the trainer's rewards, NaN where there is none
    advantages: Tensor  # [S] float32, what the trainer made of them


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
        self.num_tokens_checked = _check_model(self.scorer.model, answers, self.num_tokens_checked)
        q = torch.cat([self.scorer(batch) for batch in answers.batches])  # [T]
        if self.min_std is None:
            self.min_std = self.min_std_share * q.std(correction=0).item()
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

    `prm`: a token classifier with two labels, 1 for a right step. `tokenizer`: the policy's. A step ends at a token
    whose text ends in `separator`, and at the last token of the answer; the model reads `step_token` in its place, one
    token, as PURE's was trained. `preset`, `operator`, `temperature`, `max_gen_len` and the coefficients are those of
    `process_advantages`. `outcomes`: the trainer's rewards are verified answers, 1 or 0, and take part.

    Raises ValueError for a checkpoint that is no such model, one of another vocabulary, a step_token that is not one
    token, and a model that does not compute packed sequences as it does each alone.
    """

    def __init__(
        self,
        prm: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        preset: str = "paper",
        outcomes: bool = True,
        separator: str = "\n\n",
        step_token: str = "\n",
        operator: str = "soft",
        temperature: float = 0.1,
        max_gen_len: int | None = None,
        process_coef: float | None = None,
        outcome_coef: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = AutoConfig.from_pretrained(prm)
        name = (config.architectures or ["a model of unknown architecture"])[0]
        if not name.endswith(("ForTokenClassification", "ForTokenScores")) or config.num_labels != 2:
            raise ValueError(f"{prm} must be a token classifier with two labels, got {name}, {config.num_labels}")
        check_same_vocabulary(tokenizer, load_tokenizer(prm))
        self.model = load_token_model(prm, tokenizer, num_labels=2, dtype=dtype).eval().requires_grad_(False)
        ids = tokenizer.encode(step_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"step_token must be one token of the tokenizer, got {step_token!r}, {len(ids)} tokens")
        self.step_id = ids[0]
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.separators = torch.tensor([i for i, text in enumerate(texts) if text.endswith(separator)])
        self.outcomes = outcomes
        self.options: dict[str, Any] = dict(preset=preset, operator=operator, temperature=temperature)
        self.options |= dict(max_gen_len=max_gen_len, process_coef=process_coef, outcome_coef=outcome_coef)
        self.num_tokens_checked = 0

    def __call__(self, answers: Answers) -> tuple[Tensor, dict[str, Tensor]]:
        self.num_tokens_checked = _check_model(self.model, answers, self.num_tokens_checked)
        scored, ends = zip(*map(self.step_rewards, answers.batches), strict=True)
        step_rewards = torch.cat(scored)  # [K]
        step_ends = torch.cat(ends).nonzero()[:, 0]  # [K]
        rewards = answers.rewards
        advantages = process_advantages(
            step_rewards,
            step_ends,
            answers.cu_seqlens,
            answers.group_ids,
            outcome_rewards=rewards.nan_to_num(0.0) if self.outcomes else None,
            has_answer=~rewards.isnan() if self.outcomes else None,
            num_tokens=sum(len(batch.action_index) for batch in answers.batches),
            process_group=_all_ranks(),
            **self.options,
        )
        return advantages, {
            "step_reward_mean": step_rewards.mean(),
            "steps": step_rewards.new_tensor(len(step_rewards)),
        }

    def step_rewards(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Rewards [K] of the steps of a batch, and for each of its T actions whether it ends one."""
        rows = batch.action_index + 1  # of the actions themselves
        ends = torch.isin(batch.input_ids[rows], self.separators.to(rows.device))
        filled = batch.action_cu_seqlens.diff() > 0
        ends[batch.action_cu_seqlens[1:][filled].long() - 1] = True
        rows = rows[ends]
        hidden = packed_hidden(self.model, batch._replace(input_ids=batch.input_ids.index_fill(0, rows, self.step_id)))
        return prm_rewards(self.model.score(hidden[rows])), ends


def _check_model(model: Any, answers: Answers, num_tokens_checked: int) -> int:
    """Move `model` to the answers; where one is longer than those before, see that it may be packed. Tokens checked."""
    model.to(answers.rewards.device)
    longest = max(batch.max_seqlen for batch in answers.batches)
    if longest <= num_tokens_checked:
        return num_tokens_checked
    check_context(model, longest)
    check_packing(model, longest)
    return longest


def _all_ranks() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
