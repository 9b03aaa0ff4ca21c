"""Answers judged by a verifier."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ... import group_advantages, per_token
from ...ops.gae import Advantages
from ..config import Config
from ..data import Example, Prompt
from ..rollout import Rollout
from ..verifiers import find_verifier
from .credit import Model, Packed, at_the_end


class Verifier:
    """Answers judged right or wrong, beside the other answers to the prompt; a token's advantage is its answer's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.models: list[Model] = []

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> Tensor:
        config, device = self.config, group_ids.device
        known = [s for s, example in enumerate(examples) if isinstance(example, Example)]
        labels = [example.label for example in examples if isinstance(example, Example)]
        responses, finished = [rollout.responses[s] for s in known], [rollout.finished[s] for s in known]
        rewards = verified(config.verifier, self.tokenizer, responses, finished, labels)
        self.mean_reward = rewards.sum() / max(len(known), 1)
        self.known = torch.zeros(len(examples), dtype=torch.bool).index_fill(0, torch.tensor(known).long(), True)
        self.rewards = torch.zeros(len(examples)).masked_scatter(self.known, rewards).to(device)  # [S]
        self.known, self.right = self.known.to(device), self.rewards  # [S], [S]: what was judged, and right
        if config.overlong_tokens:
            lengths = torch.tensor([float(len(response)) for response in rollout.responses], device=device)
            over = (lengths - (config.max_new_tokens - config.overlong_tokens)) / config.overlong_tokens
            self.rewards = self.rewards - over.clamp(0, 1).where(self.known, 0.0)
        if config.baseline == "none":
            self.advantages = self.rewards
        else:  # answers to one prompt are all judged, or none is: then they are equal
            self.advantages = group_advantages(self.rewards, group_ids, kind=config.baseline)  # [S]
        return self.advantages

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        """[T]: the last token of an answer earns what the answer did."""
        return at_the_end(self.rewards[packed.answers], packed)

    def of_tokens(self, packed: Packed) -> Advantages:
        rows = per_token(self.advantages[packed.answers], packed.cu_seqlens, len(packed.logprobs))  # [T]
        return Advantages(rows, rows)

    def metrics(self) -> dict[str, Tensor]:
        return {"reward/mean": self.mean_reward}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def verified(
    verifier: str,
    tokenizer: PreTrainedTokenizerBase,
    responses: list[list[int]],
    finished: list[bool],
    labels: list[str],
) -> Tensor:
    """[S] float32: 1 where a response ended by itself and `verifier` (a name in VERIFIERS) finds it right, else 0.

    Raises ValueError for an unknown verifier.
    """
    is_right = find_verifier(verifier)
    texts = answer_texts(tokenizer, responses, finished)
    rows = zip(texts, finished, labels, strict=True)
    return torch.tensor([float(done and is_right(text, label)) for text, done, label in rows])


def answer_texts(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]], finished: list[bool]) -> list[str]:
    """The texts of responses, without the tokens that ended them."""
    written = [response[:-1] if done else response for response, done in zip(responses, finished, strict=True)]
    return tokenizer.batch_decode(written, skip_special_tokens=True) if written else []  # it takes [] for one row
