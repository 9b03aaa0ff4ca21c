"""Activation checkpointing: layers keep their input alone and are computed again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import reopened


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, what layers of `model` compute is kept for no backward pass. Results and gradients have the same bits.

    Raises ValueError where transformers does not know the model's layers.
    """
    layers: list[Any] = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"recompute needs layers that transformers can compute again, {type(model).__name__} has none")
    before = [(layer.training, layer.gradient_checkpointing) for layer in layers]
    try:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _again
        yield
    finally:
        for layer, (training, asked) in zip(layers, before, strict=True):
            layer.training, layer.gradient_checkpointing = training, asked


def _again(layer: Callable[..., Any], *inputs: Tensor) -> Any:
    inside = reopened()
    return checkpoint(
        layer,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn
        context_fn=lambda: (nullcontext(), inside),
    )
