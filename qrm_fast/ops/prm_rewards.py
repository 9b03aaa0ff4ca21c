"""Step rewards from the logits of a two-class process reward model."""

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype


def prm_rewards(logits: Tensor) -> Tensor:
    """The reward of every step, [K] float32 (float64 for float64), in [-1, 1].

    `logits`: [K, 2] floating, rows may be strided; class 1 is "correct".

        r = softmax(z)[1] - softmax(z)[0] = tanh((z[1] - z[0]) / 2)

    (PURE, arXiv 2504.15275: the difference of the two probabilities; there it is rounded to bfloat16, here the logits
    are widened first). Not differentiable. Raises TypeError or ValueError for a wrong dtype or shape.
    """
    Checker()("logits", logits, "K 2", FLOATS, strided=True)
    return _prm_rewards(logits)


@constant_op("prm_rewards", on_every_device=True)
def _prm_rewards(logits: Tensor) -> Tensor:
    wrong, right = logits.double().unbind(1)
    return torch.tanh((right - wrong) / 2).to(acc_dtype(logits.dtype))


@_prm_rewards.register_fake
def _(logits):
    return logits.new_empty(logits.shape[0], dtype=acc_dtype(logits.dtype))
