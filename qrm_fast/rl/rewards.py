"""Reward streams: what a response earned, per token or as a whole."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import PackedBatch, token_q
from .attention import packed_hidden
from .verifiers import find_verifier


def q_scores(q_rm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Q [T] of every action of a packed batch, read where the Q-RM has consumed the action."""
    hidden = packed_hidden(q_rm, batch)[batch.action_index + 1]  # [T, D]
    return token_q(hidden, q_rm.score.weight, bias=q_rm.score.bias)


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
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    rows = zip(texts, finished, labels, strict=True)
    return torch.tensor([float(done and is_right(text, label)) for text, done, label in rows])
