"""`linear_logprobs` in the place of the fused head that TRL's trainers share."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ... import linear_logprobs, linear_logprobs_partial, linear_policy_loss
from .hooks import COMPACT, FUSED_HEAD, HEAD, find_hook, warn_once


class use_linear_logprobs:
    """Put `linear_logprobs` into the fused head that TRL's trainers share (GRPO, RLOO, DPO, KTO, SFT, async GRPO).

    The plain call holds for the rest of the process: `use_linear_logprobs()`. As a context, `with
    use_linear_logprobs(): ...`, it ends with it; a backward pass may come later. Trainers that exist already are
    served as well. Results are TRL's to rounding; like TRL on devices with Triton, the head then scores positions with
    a label alone, on every device. Where TRL asks for what `linear_logprobs` does not compute (WPO's weights, the mean
    logit under a softcap, ZeRO-3's partitioned weights) its own head runs, with one warning.

    Raises Moved where TRL's head is not the one that this was written for.
    """

    def __init__(self) -> None:
        self.module = find_hook("trl.trainer.utils")
        if getattr(self.module, "_ChunkedLogProbFunction", None) is not LinearLogprobsHead:  # as in a nested call
            for name in (f"{HEAD}.forward", COMPACT, FUSED_HEAD):
                find_hook(name)
        self.before = (self.module._ChunkedLogProbFunction, self.module._use_triton)
        self.module._ChunkedLogProbFunction, self.module._use_triton = LinearLogprobsHead, _compact_everywhere

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.module._ChunkedLogProbFunction, self.module._use_triton = self.before


def _compact_everywhere(device: torch.device) -> bool:
    return True


class LinearLogprobsHead:
    """What TRL calls in the place of its `ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each, those not in `outputs` None.

        `hidden` [N, D], `weight` [V, D], `bias` [V], `targets` [N]; TRL's logits are cap(scale z) / temperature, which
        is scale cap'(z) / temperature with cap' of softcap / scale.
        """
        why = _not_ours(weight, softcap, outputs)
        if why:
            warn_once(why, "its own head")
            own = importlib.import_module("trl.kernels").ChunkedLogProbFunction
            return own.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
        weight, bias = _of_dtype(hidden, weight, bias)
        options = _head_options(bias, temperature, softcap, logit_scale)
        logprobs, entropy, _ = linear_logprobs(hidden, weight, targets, **options)
        mean_logits = is_top1 = None
        with torch.no_grad():
            if "mean_logits" in outputs:
                mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
                mean_logits = (mean if bias is None else mean + bias.float().mean()) * (logit_scale / temperature)
            if "is_top1" in outputs:
                part = linear_logprobs_partial(hidden, weight, targets, vocab_start=0, **options)
                is_top1 = part.target_logit >= part.max
        return logprobs, entropy if "entropy" in outputs else None, None, mean_logits, is_top1


class use_linear_policy_loss(use_linear_logprobs):
    """Inside it a forward pass computes the `linear_policy_loss` of its N scored positions, and its gradients.

    `rows`: the op's tensors [N] and options. The log-probabilities that come out are values, apart from the first: its
    gradient is the loss's. So the loss leaves the model the way its output does, before the eyes of every hook.
    """

    def __init__(self, rows: dict[str, Any]) -> None:
        super().__init__()
        self.module._ChunkedLogProbFunction = LinearPolicyLossHead(rows)


class LinearPolicyLossHead:
    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows = rows

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """(logprobs, entropy, None, None, None): what a loss of TRL's reads."""
        weight, bias = _of_dtype(hidden, weight, bias)
        options = _head_options(bias, temperature, softcap, logit_scale) | self.rows
        loss, logprobs, entropy, _ = linear_policy_loss(hidden, weight, targets, **options)
        carried = (loss - loss.detach()).to(logprobs.dtype)
        return logprobs + pad(carried[None], (0, len(logprobs) - 1)), entropy, None, None, None


def _of_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if torch.is_autocast_enabled(hidden.device.type):  # under it the op casts, as F.linear does
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _head_options(bias: Tensor | None, temperature: float, softcap: float | None, scale: float) -> dict[str, Any]:
    return dict(bias=bias, temperature=temperature / scale, softcap=softcap and softcap / scale)


def _not_ours(weight: Tensor, softcap: float | None, outputs: tuple[str, ...]) -> str | None:
    if hasattr(weight, "ds_id"):  # released after the forward pass, when autograd would need it
        return "the head's weight is partitioned by ZeRO-3"
    if "log_sum_sq_probs" in outputs:
        return "WPO's weights need the sum of squared probabilities"
    if "mean_logits" in outputs and softcap is not None:
        return "the mean of logits under a softcap is asked for"
    return None
