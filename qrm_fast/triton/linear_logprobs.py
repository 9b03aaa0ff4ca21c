"""Triton kernels of linear_logprobs: log-probability and entropy of hidden states under a vocabulary head.

Forward: a program multiplies BT hidden rows with one split of the vocabulary, BV columns at a time, in float32
accumulators; bias, softcap, temperature and the online fold into (max, sum, weighted sum) happen in registers, so a
logit is never rounded to 16 bits and never written. V is cut into splits from V alone, their statistics are merged in
order by a second launch, 12 bytes per row and 2048 columns; a row's bits depend on that row, weight and bias.
2 T D V FLOP. Programs run through GROUP blocks of rows for one split before the next split: a wave of programs then
reads as many weight tiles as hidden tiles, about 15 MB each for D = 3584, and both stay in L2, where one block of rows
per wave would read all of weight T / BT times.
Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

from ..ops.linear_logprobs import _forward

SPLIT = 2048  # columns that one program folds, a multiple of every BV
GROUP = 16  # blocks of rows that share a split's weight tiles
MERGE = {"BT": 128, "num_warps": 4}


def blocks(dtype: torch.dtype, capability: int, described: bool, capped: bool) -> dict[str, int]:
    """Block sizes of a product with float32 accumulators, for a GPU of this major compute capability.

    128 x 256 accumulators fill the register file of a multiprocessor. Pointers instead of descriptors, or a softcap,
    take registers of their own: half the columns then. 3 buffers of 128 x 128 fit into the 99 KB of the small GPUs.
    """
    if dtype == torch.float32:
        return {"BT": 64, "BV": 64, "BD": 16, "num_warps": 8, "num_stages": 3}
    if capability in (9, 10):
        launch = {"BT": 128, "BV": 256 if described else 128, "BD": 64, "num_warps": 8, "num_stages": 4}
    else:
        launch = {"BT": 128, "BV": 128, "BD": 64, "num_warps": 8, "num_stages": 3}
    if capped:
        launch["BV"] //= 2
    return launch


@triton.jit
def load_block(x, stride, i_r, i_c, num_rows, num_columns, DESCRIBED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Block [BR, BC] of x from row i_r and column i_c on, 0 outside; x is a descriptor or a pointer."""
    if DESCRIBED:
        return x.load([i_r, i_c])
    else:
        o_r = i_r + tl.arange(0, BR)
        o_c = i_c + tl.arange(0, BC)
        p = x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        return tl.load(p, (o_r < num_rows)[:, None] & (o_c < num_columns)[None, :], 0.0)


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
    hidden,
    weight,
    bias,
    softcap,
    b_temperature,
    stride_hidden,
    stride_weight,
    i_t,
    i_v,
    num_rows,
    vocab,
    dim,
    DESCRIBED: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """softcap(hidden @ weight.T + bias) / temperature of rows from i_t and columns from i_v on, -inf past the last."""
    b_z = tl.zeros([BT, BV], tl.float32)
    for i_d in range(0, dim, BD):
        b_h = load_block(hidden, stride_hidden, i_t, i_d, num_rows, dim, DESCRIBED, BT, BD)
        b_w = load_block(weight, stride_weight, i_v, i_d, vocab, dim, DESCRIBED, BV, BD)
        b_z = tl.dot(b_h, b_w.T, b_z, input_precision="ieee")  # [BT, BV]
    o_v = i_v + tl.arange(0, BV)
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
def merged(b_max, b_sum, b_weighted, b_max2, b_sum2, b_weighted2):
    """Statistics max z, sum e^(z - max), sum (z - max) e^(z - max) of two sets of columns; a sum of 0 is no column."""
    b_top = tl.maximum(b_max, b_max2)
    b_shift = tl.where(b_sum == 0, 0.0, b_max - b_top)
    b_shift2 = tl.where(b_sum2 == 0, 0.0, b_max2 - b_top)
    b_scale, b_scale2 = tl.exp(b_shift), tl.exp(b_shift2)
    b_weighted = b_scale * (b_weighted + b_shift * b_sum) + b_scale2 * (b_weighted2 + b_shift2 * b_sum2)
    return b_top, b_scale * b_sum + b_scale2 * b_sum2, b_weighted


@triton.jit
def linear_logprobs_fold(
    hidden,  # [T, D]
    weight,  # [V, D]
    targets,  # [T]
    bias,  # [V] or None
    temperatures,  # [T] or None
    softcap,  # or None
    maxima,  # [splits, T], as the next two: the statistics of each split
    sums,
    weighteds,
    target_logits,  # [T]
    stride_hidden,
    stride_weight,
    num_rows,
    vocab,
    dim,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    i_p = tl.program_id(0)
    num_blocks, num_splits = tl.cdiv(num_rows, BT), tl.cdiv(vocab, SPLIT)
    i_group = i_p // (GROUP * num_splits)
    height = tl.minimum(num_blocks - i_group * GROUP, GROUP)
    i_p -= i_group * GROUP * num_splits
    i_t, i_s = (i_group * GROUP + i_p % height) * BT, i_p // height
    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, -1)
    b_temperature = None
    if temperatures is not None:
        b_temperature = tl.load(temperatures + o_t, m_t, 1.0)

    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_weighted = tl.zeros([BT], tl.float32)
    b_target_logit = tl.zeros([BT], tl.float32)
    for i_v in range(i_s * SPLIT, tl.minimum(i_s * SPLIT + SPLIT, vocab), BV):
        b_z = logits(
            hidden,
            weight,
            bias,
            softcap,
            b_temperature,
            stride_hidden,
            stride_weight,
            i_t,
            i_v,
            num_rows,
            vocab,
            dim,
            DESCRIBED,
            BT,
            BV,
            BD,
        )
        b_here = tl.where((b_target >= i_v) & (b_target < i_v + BV), b_target - i_v, -1).to(tl.int32)
        if tl.max(b_here, 0) >= 0:
            b_target_logit += tl.sum(tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_z, 0.0), 1)
        b_top = tl.max(b_z, 1)
        b_shift = b_z - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None]
        b_e = tl.exp2(1.4426950408889634 * b_shift)
        # where e is 0 the shift may be -inf
        b_max, b_sum, b_weighted = merged(
            b_max, b_sum, b_weighted, b_top, tl.sum(b_e, 1), tl.sum(b_e * tl.maximum(b_shift, -1000.0), 1)
        )
    o = i_s.to(tl.int64) * num_rows + o_t
    tl.store(maxima + o, b_max, m_t)
    tl.store(sums + o, b_sum, m_t)
    tl.store(weighteds + o, b_weighted, m_t)
    m_split = (b_target >= i_s * SPLIT) & (b_target < i_s * SPLIT + SPLIT)
    tl.store(target_logits + o_t, b_target_logit, m_t & m_split)


@triton.jit
def linear_logprobs_merge(
    maxima,  # [splits, T]
    sums,
    weighteds,
    target_logits,  # [T]
    targets,  # [T]
    logprobs,  # [T]
    entropy,  # [T]
    lse,  # [T]
    lse_residual,  # [T]
    num_rows,
    vocab,
    num_splits,
    ignore_index,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_weighted = tl.zeros([BT], tl.float32)
    o = o_t
    for _ in range(0, num_splits):
        b_max2 = tl.load(maxima + o, m_t, 0.0)
        b_sum2 = tl.load(sums + o, m_t, 0.0)
        b_weighted2 = tl.load(weighteds + o, m_t, 0.0)
        b_max, b_sum, b_weighted = merged(b_max, b_sum, b_weighted, b_max2, b_sum2, b_weighted2)
        o += num_rows
    b_target = tl.load(targets + o_t, m_t, 0)
    m_ignored = b_target == ignore_index
    m_inside = (b_target >= 0) & (b_target < vocab)
    b_log_sum = tl.log(b_sum)
    b_lse = b_max + b_log_sum
    b_logprob = (tl.load(target_logits + o_t, m_t & m_inside, 0.0) - b_max) - b_log_sum
    b_entropy = b_log_sum - b_weighted / b_sum
    results = (
        tl.where(b_logprob > 0, 0.0, b_logprob),
        tl.where(b_entropy < 0, 0.0, b_entropy),
        b_lse,
        (b_max - b_lse) + b_log_sum,
    )
    outputs = (logprobs, entropy, lse, lse_residual)
    for i in tl.static_range(4):
        b = tl.where(m_ignored, 0.0, tl.where(m_inside, results[i], float("nan")))
        tl.store(outputs[i] + o_t, b, m_t)


def fold(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    target_logits: Tensor,
) -> Tensor:
    """Statistics [3, splits, T] of every split; writes the logits of those targets that are columns."""
    (num_rows, dim), vocab = hidden.shape, weight.shape[0]
    num_splits = triton.cdiv(vocab, SPLIT)
    statistics = hidden.new_empty(3, num_splits, num_rows, dtype=torch.float32)
    described = describable(hidden, weight)
    launch = blocks(hidden.dtype, capability(hidden), described, softcap is not None)
    linear_logprobs_fold[(triton.cdiv(num_rows, launch["BT"]) * num_splits,)](
        operand(hidden, described, launch["BT"], launch["BD"]),
        operand(weight, described, launch["BV"], launch["BD"]),
        targets,
        bias,
        per_row(temperature, temperatures, targets),
        softcap,
        *statistics,
        target_logits,
        hidden.stride(0),
        weight.stride(0),
        num_rows,
        vocab,
        dim,
        described,
        SPLIT,
        GROUP,
        **launch,
    )
    return statistics


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    results = [hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(4)]
    if num_rows == 0:
        return tuple(results)
    with torch.cuda.device_of(hidden):
        target_logits = hidden.new_empty(num_rows, dtype=torch.float32)
        statistics = fold(hidden, weight, targets, bias, temperature, temperatures, softcap, target_logits)
        linear_logprobs_merge[(triton.cdiv(num_rows, MERGE["BT"]),)](
            *statistics, target_logits, targets, *results, num_rows, vocab, statistics.shape[1], ignore_index, **MERGE
        )
    return tuple(results)


def capability(x: Tensor) -> int:
    """Major compute capability; the interpreter runs what a Hopper GPU runs."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def describable(*operands: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can load blocks of all of these [rows, columns]."""
    aligned = (x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in operands)
    return operands[0].element_size() == 2 and capability(operands[0]) >= 9 and all(aligned)


def operand(x: Tensor, described: bool, height: int, width: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [height, width]) if described else x


def per_row(temperature: float, temperatures: Tensor | None, targets: Tensor) -> Tensor | None:
    """[T] temperatures, None where all of them are 1."""
    if temperatures is None and temperature != 1:
        return torch.full_like(targets, temperature, dtype=torch.float32)
    return temperatures


_forward.register_kernel("cuda")(forward)


def _aot(kernel, dtype: str, capability: int, described=True, capped=False, **constants) -> tuple:
    """One configuration as tests/test_build.py compiles it: without a GPU, for one architecture."""
    launch = blocks({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], capability // 10, described, capped)
    types = dict.fromkeys(("bias", "hidden", "weight"), f"*{dtype}")
    if described:
        types["hidden"] = f"tensordesc<{dtype}[{launch['BT']},{launch['BD']}]>"
        types["weight"] = f"tensordesc<{dtype}[{launch['BV']},{launch['BD']}]>"
    statistics = ("maxima", "sums", "weighteds", "target_logits", "temperatures")
    types |= dict.fromkeys(statistics, "*fp32") | {"targets": "*i64", "softcap": "fp32"}
    types |= dict.fromkeys(("num_rows", "vocab"), "i32") | dict.fromkeys(
        ("stride_hidden", "stride_weight", "dim"), "i32:16"
    )
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    constants |= launch | {"DESCRIBED": described, "SPLIT": SPLIT, "GROUP": GROUP}
    if not capped:
        constants["softcap"] = None
    return kernel, types, constants, options, dtype != "fp32", capability


AOT = [
    _aot(linear_logprobs_fold, "bf16", 90, bias=None, temperatures=None),
    _aot(linear_logprobs_fold, "bf16", 80, described=False),
    _aot(linear_logprobs_fold, "bf16", 90),
    _aot(linear_logprobs_fold, "bf16", 100),
    _aot(linear_logprobs_fold, "bf16", 90, capped=True),
    _aot(linear_logprobs_fold, "bf16", 90, described=False),
    _aot(linear_logprobs_fold, "fp32", 90, described=False, capped=True),
    (
        linear_logprobs_merge,
        dict.fromkeys(linear_logprobs_merge.arg_names, "*fp32")
        | {"targets": "*i64"}
        | dict.fromkeys(("num_rows", "vocab", "num_splits", "ignore_index"), "i32"),
        {"BT": MERGE["BT"]},
        MERGE["num_warps"],
        False,
    ),
]
