"""What a process reward model reads: answers in which one separator closes every step (PURE, arXiv 2504.15275)."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .. import PackedBatch
from .control_tokens import text_ids
from .data import STEP
from .models import num_token_ids

SEPARATOR = "\n"  # of PURE's published PRM and of TRL's PRMTrainer; a checkpoint of ours names its own


def separator_of(config: PreTrainedConfig) -> str:
    """The text that closed every step in the training of the PRM with this configuration."""
    return getattr(config, "step_separator", SEPARATOR)


def separator_id(tokenizer: PreTrainedTokenizerBase, separator: str) -> int:
    """The one token of `separator`. Raises ValueError where it is none or several: a PRM is read at a token."""
    ids = text_ids(tokenizer, separator)
    if len(ids) != 1:
        raise ValueError(f"separator must be one token of the tokenizer, got {separator!r}, {len(ids)} tokens")
    return ids[0]


def ends_a_step(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[V] bool: the tokens whose text ends with a blank line, alone or behind other characters (".", ":", ")").

    Raises ValueError for a tokenizer without such a token, whose answers would all be one step.
    """
    texts = tokenizer.batch_decode([[i] for i in range(num_token_ids(tokenizer))], clean_up_tokenization_spaces=False)
    ends = torch.tensor([text.endswith(STEP) for text in texts])
    if not ends.any():
        raise ValueError("the tokenizer must have a token that ends with a blank line, which ends a step, got none")
    return ends


def find_steps(batch: PackedBatch, ends: Tensor, separator: int) -> tuple[PackedBatch, Tensor]:
    """`batch` as a PRM reads it, and the action that closes each step, [K] int64 ascending.

    `ends`: [V] bool of `ends_a_step`. A step is closed by such a token, the last one by the last action of an answer,
    whatever that is: EOS, a blank line, or where max_new_tokens cut. In the PRM's input each of these is `separator`,
    so that lengths and positions stay (spelled out in docs/methods.md).
    """
    closes = ends[batch.targets[batch.action_index]]  # [T]
    last = batch.action_cu_seqlens[1:][batch.action_cu_seqlens.diff() > 0] - 1
    closes[last.long()] = True
    step_ends = closes.nonzero()[:, 0]
    input_ids = batch.input_ids.clone()
    input_ids[batch.action_index[step_ends] + 1] = separator
    return batch._replace(input_ids=input_ids), step_ends
