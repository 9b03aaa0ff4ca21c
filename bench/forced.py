"""Sampling of answers whose lengths and tokens are known: every token is drawn, what was drawn makes room for the
answer that was to be. So several ways to train compute on the same answers, and pay for sampling them."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import Rollout, TransformersEngine

Answers = dict[tuple[int, ...], list[list[int]]]  # to each prompt


class ForcedEngine(TransformersEngine):
    """The loop's engine."""

    def __init__(self, policy: Policy, answers: Answers, **options: Any) -> None:
        super().__init__(policy, [], **options)
        self.answers = answers

    def generate(self, prompts: list[list[int]], **options: Any) -> Rollout:
        answers = [answer for prompt in prompts for answer in self.answers[tuple(prompt)]]
        lengths = [*map(len, answers), 1]  # the last: of a row without an answer
        self.lengths = torch.tensor(lengths, device=self.model.device)
        sampled = super().generate(prompts, **options)
        assert list(map(len, sampled.responses)) == list(map(len, answers)), "an answer was not as long as it was to be"
        return Rollout(answers, sampled.logprobs, [True] * len(answers))

    def _stops(self, token: Tensor, answer: Tensor, age: Tensor) -> Tensor:
        return age + 1 >= self.lengths[answer]


class Ended(StoppingCriteria):
    """For transformers' `generate`: row r ends after `lengths[r]` tokens behind its prompt."""

    def __init__(self, prompt: int, lengths: Tensor) -> None:
        self.ends = prompt + lengths

    def __call__(self, input_ids: Tensor, scores: object, **options: object) -> Tensor:
        return input_ids.shape[1] >= self.ends
