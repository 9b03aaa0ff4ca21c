"""A reward manager that scores tokens with a Q-RM, or steps with a process reward model, and gives verl [B, T]."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from ... import PackedBatch, pack, plan_microbatches, unpack
from ..credit import ProcessCredit, QRMCredit, check_model
from .estimators import last_rows

SMALLEST = torch.finfo(torch.float32).tiny


class TokenRewardManager(NaiveRewardManager):
    """`reward.reward_manager.name=qrm_token`, for the estimators `qrm_q`, `qrm_min_form` and `qrm_pure`.

    Options are entries of `reward.reward_kwargs`: `q_rm` or `prm`, a checkpoint of the policy's vocabulary;
    `step_token`, which a PRM reads where a step ends, by default the separator that its checkpoint names; `verifier`,
    True to put verl's own score of the answer on its last token, where `qrm_pure` looks for it (the last step's reward
    then stands on the token before, and an empty last step has none); `device`; `max_tokens` of a packed forward pass.

    A Q-RM scores every token. A PRM scores each step where it ends, at a blank line and at the last token; a score of
    exactly 0, which would be no step end to an estimator, is sent as the smallest float32. Answers that wait together
    are scored together.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score, *args, **kwargs)
        options = dict(config.reward.get("reward_kwargs") or {})
        self.verifier = options.pop("verifier", False)
        self.device = options.pop("device", "cpu")
        self.max_tokens = options.pop("max_tokens", 16384)
        step_token = options.pop("step_token", None)
        models = {name: options.pop(name, None) for name in ("q_rm", "prm")}
        if options or sum(path is not None for path in models.values()) != 1:
            raise ValueError(
                "reward.reward_kwargs of qrm_token must name a q_rm or a prm and may set step_token, verifier, "
                f"device and max_tokens, got {', '.join(config.reward.get('reward_kwargs') or {}) or 'nothing'}"
            )
        if models["q_rm"] is not None and self.verifier:
            raise ValueError("verifier belongs to a prm, whose steps leave the last token to it, got it with a q_rm")
        self.rows: Callable[[PackedBatch], Tensor]
        if models["q_rm"] is not None:
            self.rows = scorer = QRMCredit(models["q_rm"], tokenizer).scorer
            self.model = scorer.model
        else:
            prm = ProcessCredit(models["prm"], tokenizer, step_token=step_token)
            self.rows, self.model = partial(self._of_steps, prm), prm.model
        self.num_tokens_checked = 0
        self.waiting: list[tuple[list[int], list[int], asyncio.Future]] = []
        self.lock = asyncio.Lock()

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Of one answer of verl's a score per response token, as a list."""
        row = data[-1:].batch
        prompt_mask, response_mask = (
            row["attention_mask"][0].bool().split([row["prompts"].shape[1], row["responses"].shape[1]])
        )
        prompt, response = row["prompts"][0][prompt_mask].tolist(), row["responses"][0][response_mask].tolist()
        verified = await super().run_single(data) if self.verifier else {"reward_extra_info": {}}
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, response, future))
        await asyncio.sleep(0)  # the other answers of this batch come to wait
        async with self.lock:
            if not future.done():
                await self._score_those_waiting()
        scores = future.result()
        if self.verifier and scores:
            scores[-1] = float(verified["reward_score"])
        return verified | {"reward_score": scores}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[Sequence[float]]) -> Tensor:
        """[B, T] float32: the scores of `run_single` on the response tokens of each answer, 0 on padding."""
        responses = data.batch["responses"]
        mask = data.batch["attention_mask"][:, -responses.shape[1] :].bool()
        rows = torch.tensor([score for answer in scores for score in answer], dtype=torch.float32)
        return torch.zeros(responses.shape, device=mask.device).masked_scatter(mask, rows.to(mask.device))

    async def _score_those_waiting(self) -> None:
        waiting, self.waiting = self.waiting, []
        prompts, responses, futures = zip(*waiting, strict=True)
        try:
            scored = await asyncio.to_thread(self.score, prompts, responses)
        except Exception as error:
            for future in futures:
                future.set_exception(error)
        else:
            for future, scores in zip(futures, scored, strict=True):
                future.set_result(scores)

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[float]]:
        """A score for each token of each response, forward passes packed.

        Raises ValueError for answers past the model's positions, and where it does not compute packed sequences of
        their length as it does each alone.
        """
        scored: list[list[float]] = [[] for _ in responses]
        sizes = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        self.num_tokens_checked = check_model(self.model, self.device, max(sizes), self.num_tokens_checked)
        for answers in plan_microbatches(sizes, max_tokens=max(self.max_tokens, *sizes))[0]:
            sequences = [prompts[i] + responses[i] for i in answers]
            batch = pack(sequences, [len(prompts[i]) for i in answers], device=self.device)
            rows = unpack(self.rows(batch).float().cpu(), batch.action_cu_seqlens.cpu())
            for i, row in zip(answers, rows, strict=True):
                scored[i] = row.tolist()
        return scored

    def _of_steps(self, prm: ProcessCredit, batch: PackedBatch) -> Tensor:
        """[T]: the reward of a step where it ends, 0 elsewhere."""
        rewards, ends = prm.step_rewards(batch)
        rewards = torch.where(rewards == 0, SMALLEST, rewards)
        if self.verifier:
            rewards, ends = _leave_the_last(rewards, ends, batch.action_cu_seqlens)
        return rewards.new_zeros(len(ends)).masked_scatter(ends, rewards)


def _leave_the_last(rewards: Tensor, ends: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The step of each answer's last token moved to the token before, or dropped where there is none without a step.

    `rewards`: [K]. `ends`: [T] bool, where each step ends. `cu_seqlens`: [S+1].
    """
    last = last_rows(cu_seqlens)
    alone = torch.isin(last, cu_seqlens[:-1])
    taken = alone | ends[(last - 1).clamp(min=0)]
    moved = ends.clone()
    moved[last] = False
    kept = torch.ones_like(ends)
    kept[last[taken]] = False
    moved[last[~taken] - 1] = True
    return rewards[kept[ends]], moved
