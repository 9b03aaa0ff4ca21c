"""A token per row of a vocabulary head's distribution, and its log-probability, without [R, V] logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import as_for_linear
from .checks import FLOATS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .linear_logprobs import _logits, check_logit_options, token_statistics


class SampledTokens(NamedTuple):
    tokens: Tensor  # [R] int64
    logprobs: Tensor  # [R] float32


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> SampledTokens:
    """One draw per row from `softmax(hidden @ weight.T)`, in memory that does not grow with R * V.

    `hidden`: [R, D] floating, rows may be strided. `weight`: [V, D], same dtype. `uniforms`: [R] float64 in [0, 1),
    e.g. torch.rand. `bias`, `temperature`, `softcap`: as in `linear_logprobs`.

        z = softcap(hidden @ weight.T + bias) / temperature      p = softmax(z)
        tokens = the first v with p_0 + ... + p_v > uniforms     logprobs = log p_tokens

    The inverse of the distribution function (Devroye 1986, section III.2), with sums of float32 exponentials (float64
    for float64), in the order of the vocabulary: the same uniforms give the same tokens. A token of probability 0 is
    never drawn. `logprobs` has the very bits that `linear_logprobs` gives the same row and token, so a policy's ratio
    to what was sampled is exactly 1 until its weights change. Dtypes, accuracy and bits are those of that function.
    A row whose logits hold a NaN, or are all -inf, gives NaN and some token in [0, V). Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape, device or option, and, on CPU, ValueError for a uniform
    outside [0, 1); on CUDA that one counts as the nearest number inside.
    """
    hidden, weight, bias = as_for_linear(hidden, weight, bias)
    check = Checker()
    check("hidden", hidden, "T D", FLOATS, strided=True)
    check("weight", weight, "V D", (hidden.dtype,), strided=True)
    check("uniforms", uniforms, "T", (torch.float64,))
    if bias is not None:
        check("bias", bias, "V", (hidden.dtype,))
    if check.dims["V"] == 0:
        raise ValueError("weight must have at least one row, got [0, D]")
    number, per_row = check_logit_options(check, hidden.dtype, temperature, softcap)
    return SampledTokens(*_linear_sample(hidden, weight, uniforms, bias, number, per_row, softcap))


@constant_op("linear_sample")
def _linear_sample(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    z, _ = _logits(hidden, weight, bias, temperature, temperatures, softcap)
    upto = (z - z.amax(-1, keepdim=True)).double().exp().cumsum(-1)  # [R, V]
    total = upto[:, -1:].contiguous()
    last = torch.searchsorted(upto, total)  # of a probability above 0
    tokens = (
        torch.searchsorted(upto, uniforms[:, None] * total, right=True).minimum(last)[:, 0].clamp(0, len(weight) - 1)
    )
    return tokens, token_statistics(z, tokens, -1)[0]


@_linear_sample.register_fake
def _(hidden, weight, uniforms, *_):
    return torch.empty_like(uniforms, dtype=torch.int64), torch.empty_like(uniforms, dtype=acc_dtype(hidden.dtype))
