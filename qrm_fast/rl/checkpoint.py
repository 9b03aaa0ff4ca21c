"""What a run leaves on disk: checkpoints that plain transformers loads, and states to go on from."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Save weights (safetensors), config and tokenizer: a directory that plain transformers loads."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_state(path: Path, **parts: Any) -> None:
    """Write `parts` as one file. A crash leaves the old file or the new one, never half of one."""
    aside = path.with_suffix(".new")
    torch.save(parts, aside)
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any]:
    """The parts of a file of `save_state`. Raises FileNotFoundError where there is none."""
    return torch.load(path)
