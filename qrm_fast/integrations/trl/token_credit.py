"""A token's advantage for GRPO, where TRL has one per answer."""

from typing import Any

import torch
from torch import Tensor

from ... import PackedBatch, from_padded
from ..credit import Answers, Credit
from .hooks import GRPO, HOOKS, check_order, find_hook


class TokenCredit:
    """Mixin before GRPOTrainer: a token's advantage comes from `credit`, in the place of its answer's.

        class Trainer(TokenCredit, PackedForward, GRPOTrainer): ...
        Trainer(..., credit=QRMCredit("path/of/q_rm", tokenizer))

    `credit` is called once per generation, on the packed answers, and returns advantages [T] and metrics, which are
    logged as credit/NAME. They reach TRL's loss as its (B, T) advantages, 0 wherever no action is: padding, truncated
    completions that TRL masks, tool output. TRL's reward statistics and its table of completions stay those of
    `reward_funcs`. With several processes each must hold whole groups.

    Raises TypeError beside a trainer whose loss takes one advantage per answer (RLOO), Moved where TRL's hooks are not
    those that this was written for.
    """

    accelerator: Any
    model: Any
    args: Any
    reward_weights: Tensor
    num_generations: int
    num_generations_eval: int
    _metrics: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_order(cls, TokenCredit, "_generate_and_score_completions")

    def __init__(self, *args: Any, credit: Credit, **options: Any) -> None:
        for name in HOOKS:
            if name.startswith(GRPO):
                find_hook(name)
        if not isinstance(self, find_hook(GRPO)):
            raise TypeError(f"TokenCredit needs a GRPOTrainer, whose loss takes token advantages, got {type(self)}")
        super().__init__(*args, **options)
        self.credit = credit

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's [S, F]; their weighted sum is kept, NaN where no function scored the answer."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        start = self.accelerator.process_index * len(prompts)
        self._earned = total.masked_fill(rewards.isnan().all(1), torch.nan)[start : start + len(prompts)]
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        completion_mask = out["completion_mask"]
        num_answers, width = completion_mask.shape
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        _check_groups(num_answers, group_size)

        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        mask = torch.cat([out["prompt_mask"], completion_mask], 1)
        is_action = torch.cat([torch.zeros_like(out["prompt_mask"]), out.get("tool_mask", completion_mask)], 1)
        is_action = is_action.bool() & mask.bool()
        step = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        parts = zip(ids.split(step), mask.split(step), is_action.split(step), strict=True)
        batches, columns = zip(*(pack_padded(*part) for part in parts), strict=True)
        lengths = torch.cat([batch.action_cu_seqlens.diff() for batch in batches])
        answers = Answers(
            batches=batches,
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)]),
            group_ids=torch.arange(num_answers, device=ids.device) // group_size,
            rewards=self._earned.to(ids.device),
            advantages=out["advantages"],
        )
        with torch.no_grad():
            advantages, metrics = self.credit(answers)
        row = torch.arange(num_answers, device=ids.device).repeat_interleave(lengths)
        column = torch.cat(columns) - out["prompt_ids"].shape[1]
        out["advantages"] = advantages.new_zeros(num_answers, width).index_put((row, column), advantages)
        for name, value in metrics.items():
            self._metrics[mode][f"credit/{name}"].append(self.accelerator.gather(value).mean().item())
        return out


def _check_groups(num_answers: int, group_size: int) -> None:
    if num_answers % group_size:
        raise ValueError(f"a process must hold whole groups of {group_size} answers, got {num_answers} answers")


def pack_padded(input_ids: Tensor, mask: Tensor, is_action: Tensor) -> tuple[PackedBatch, Tensor]:
    """The packed batch of padded rows, and the column [T] of every action.

    `input_ids`: [B, L] int64. `mask`: [B, L], nonzero on tokens. `is_action`: [B, L] bool, tokens that were chosen; the
    first token of a row, which nothing predicts, is none. Waits for the device on CUDA.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    cu_seqlens, ids, chosen = from_padded(mask, input_ids, is_action)
    lengths = cu_seqlens.diff()
    last = cu_seqlens[1:][lengths > 0] - 1
    targets = ids.roll(-1).index_fill(0, last.long(), -100)
    action_mask = chosen.roll(-1).index_fill(0, last.long(), False)
    index = action_mask.nonzero()[:, 0]
    seq_ids = rows[index]
    ends = torch.bincount(seq_ids, minlength=len(mask)).cumsum(0, dtype=torch.int32)
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(len(ids), device=ids.device) - cu_seqlens[rows],
        cu_seqlens=cu_seqlens,
        targets=targets,
        action_mask=action_mask,
        action_index=index,
        action_cu_seqlens=torch.cat([ends.new_zeros(1), ends]),
        seq_ids=seq_ids,
        max_seqlen=int(lengths.max()),
    )
    return batch, columns[index + 1]
