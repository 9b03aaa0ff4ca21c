"""Logits of hidden states under a vocabulary head, in the accumulators they were made in, for all kernels of heads.

Bias, softcap and temperature are applied in float32 there, so that a logit is never rounded to 16 bits.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .product import load_block

SPLIT = 2048  # columns that one program folds, a multiple of every BV
MERGE = {"BT": 128, "num_warps": 4}  # of kernels that finish rows


class Head(NamedTuple):
    """What makes logits: a head, the rows it reads, and their targets."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    bias: Tensor | None  # [V]
    temperatures: Tensor | None  # [T]; None: all of them are 1
    softcap: float | None

    def rows(self, rows: slice) -> "Head":
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows], temperatures=temperatures)


def per_row(temperature: float, temperatures: Tensor | None, targets: Tensor) -> Tensor | None:
    """[T] temperatures, None where all of them are 1."""
    if temperatures is None and temperature != 1:
        return torch.full_like(targets, temperature, dtype=torch.float32)
    return temperatures


@triton.jit
def tanh(x):
    """Below 0.25 its series: there 1 - exp(-2 x) cancels."""
    b_e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    b_far = (1 - b_e) / (1 + b_e)
    b_s = x * x
    b_near = x + x * b_s * (-1 / 3 + b_s * (2 / 15 + b_s * (-17 / 315 + b_s * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, b_near, tl.where(x < 0, -b_far, b_far))


@triton.jit
def logits(
    rows,  # hidden, as the next one a matrix of load_block
    columns,  # weight
    bias,
    softcap,
    b_temperature,
    i_t,
    i_v,
    DESCRIBED: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """softcap(hidden @ weight.T + bias) / temperature of rows from i_t and columns from i_v on, -inf past the last."""
    b_z = tl.zeros([BT, BV], tl.float32)
    for i_d in range(0, rows[3], BD):
        b_h = load_block(rows, i_t, i_d, DESCRIBED, BT, BD)
        b_w = load_block(columns, i_v, i_d, DESCRIBED, BV, BD)
        b_z = tl.dot(b_h, b_w.T, b_z, input_precision="ieee")  # [BT, BV]
    o_v = i_v + tl.arange(0, BV)
    vocab = columns[2]
    if bias is not None:
        b_z += tl.load(bias + o_v, o_v < vocab, 0.0).to(tl.float32)[None, :]
    if softcap is not None:
        b_z = softcap * tanh(b_z / softcap)
    if b_temperature is not None:
        b_z = b_z / b_temperature[:, None]
    if i_v + BV > vocab:
        b_z = tl.where((o_v < vocab)[None, :], b_z, float("-inf"))
    return b_z


@triton.jit
def load_temperature(temperatures, o_t, m_t):
    """None where all of them are 1."""
    b_temperature = None
    if temperatures is not None:
        b_temperature = tl.load(temperatures + o_t, m_t, 1.0)
    return b_temperature


@triton.jit
def target_column(b_target, i_v, BV: tl.constexpr):
    """The target's column within the block from i_v on, -1 where it is elsewhere."""
    return tl.where((b_target >= i_v) & (b_target < i_v + BV), b_target - i_v, -1).to(tl.int32)


@triton.jit
def picked(b_z, b_here, BV: tl.constexpr):
    """z at each row's column b_here, 0 where that is -1."""
    b_picked = tl.zeros_like(b_here).to(tl.float32)
    if tl.max(b_here, 0) >= 0:
        b_picked = tl.sum(tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_z, 0.0), 1)
    return b_picked


@triton.jit
def rescale(b_max, b_sum, b_top):
    """e^(max - top) and max - top; a sum of 0 is no column."""
    b_shift = tl.where(b_sum == 0, 0.0, b_max - b_top)
    return tl.exp(b_shift), b_shift
