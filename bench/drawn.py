"""The answers that every way to train is made to give, and how good they are."""

import math
from typing import NamedTuple

import torch

from .qwen2 import VOCABULARY

GROUP, LONGEST = 8, 526
WRONG, RIGHT, FIRST = 2, 3, 4  # the words "0" and "1", and the first that means nothing


class Data(NamedTuple):
    prompts: list[list[int]]
    answers: list[list[int]]  # GROUP to each prompt, in this order; the word before the last says whether it is right

    @property
    def num_actions(self) -> int:
        return sum(map(len, self.answers))

    @property
    def num_tokens(self) -> int:
        return self.num_actions + GROUP * sum(map(len, self.prompts))


def drawn(num_answers: int, prompt: int) -> Data:
    """Answers of log-normal length, half of each group right, to prompts of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(num_answers, generator=generator) * 0.7 + math.log(160)).clamp(8, LONGEST).long()

    def words(n: int) -> list[int]:
        return torch.randint(FIRST, VOCABULARY, (n,), generator=generator).tolist()

    prompts = [words(prompt) for _ in range(num_answers // GROUP)]
    return Data(prompts, [[*words(n - 2), (WRONG, RIGHT)[s % 2], 1] for s, n in enumerate(lengths.tolist())])
