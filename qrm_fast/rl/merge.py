"""An adapter merged into its base: a whole checkpoint, which needs neither peft nor the base any more."""

from pathlib import Path

import torch

from .checkpoint import save_checkpoint
from .models import load_policy, load_token_model, num_labels
from .tokenizers import adapter_base, load_tokenizer


def merge(spec: str, out: str, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the model that the adapter at `spec`, a policy's or a reward model's, makes of its base to `out`.

    Raises ValueError for a model without an adapter and an `out` that holds files.
    """
    if spec.startswith("scratch:") or adapter_base(spec) is None:
        raise ValueError(f"{spec} must be an adapter, got a model that has none to merge")
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ValueError(f"out must be a new or an empty directory, got {out}")
    tokenizer = load_tokenizer(spec)
    labels = num_labels(spec)
    if labels:
        save_checkpoint(load_token_model(spec, tokenizer, num_labels=labels, dtype=dtype), tokenizer, out)
    else:
        save_checkpoint(load_policy(spec, tokenizer, dtype=dtype), tokenizer, out)
