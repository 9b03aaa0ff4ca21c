"""Triton kernels of linear_logprobs_backward: gradients of a head for any gradient of logprobs and entropy.

ROWS rows and COLUMNS columns at a time, the logits are multiplied again, and dZ leaves the accumulators in hidden's
dtype, divided by a power of 2 of its row so that 16 bits hold it whatever the size of the loss; `product` then adds
dZ W and dZ^T X in float32. For 16-bit inputs tensor cores need a 16-bit dZ: its rounding, 2^-9 of each element in
bfloat16, is about that of the gradient itself. 6 T D V FLOP. A program makes one block of dZ: of 1024 rows there are
256 in COLUMNS columns, for the 132 SMs of an H200. A row's dZ W runs over V in order, in blocks of fixed shape: its
bits are its own. Rows without gradient enter dW as zeros, whatever they hold. On Hopper csrc/cuda/head_dz.cu, where it
is compiled, makes dZ of 16-bit inputs, unless the bias needs a gradient, with the same bits.
Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_logprobs import _backward
from .logits import MERGE, Head, load_temperature, logits, per_row, target_column
from .product import GROUP, blocks, capability, compiled, describable, grouped, multiply, operand, store_block

ROWS, COLUMNS = 16384, 8192  # of dZ that are held at a time: 268 MB in 16 bits
SCALE = {"BT": 4, "BD": 512, "num_warps": 4}


@triton.jit
def gradient(b_z, b_p, b_g, b_a, b_e, b_lse, b_lse_residual, b_temperature, softcap, b_here, BV: tl.constexpr):
    """g 1[v = target] - p (a + e log p), times the softcap's slope; b_here: the target's column.

    p is exp(z - lse) where it is None.
    """
    b_logp = b_z - b_lse[:, None]
    if b_lse_residual is not None:
        b_logp -= b_lse_residual[:, None]
    if b_p is None:
        b_p = tl.exp2(1.4426950408889634 * b_logp)
    # where p is 0 its logarithm may be -inf
    b_d = -b_p * (b_a[:, None] + b_e[:, None] * tl.maximum(b_logp, -1000.0))
    b_d += tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_g[:, None], 0.0)
    if softcap is not None:
        b_y = b_z / softcap
        if b_temperature is not None:
            b_y *= b_temperature[:, None]
        b_d *= 1 - b_y * b_y
    return b_d


@triton.jit
def store_factors(factors, tops, i_b, stride_factors, o_t, m_t, b_g, b_e, b_entropy, b_temperature, m_idle, m_inside):
    """By rows, for dL/dz = g (1[v = target] - p) - e p (log p + H) divided by the row's scale, [4, T]: that scale, a
    power of 2 next to the row's dZ, 0 for an idle row, NaN for a wild target; then what `gradient` calls g, a and e.
    The largest scale among them goes to tops[i_b]."""
    if b_temperature is not None:
        b_g, b_e = b_g / b_temperature, b_e / b_temperature
    b_scale = ((tl.abs(b_g) + tl.abs(b_e)).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    b_scale = tl.where(b_scale > 2.0**100, 1.0, tl.maximum(b_scale, 2.0**-100))  # not of inf and NaN
    b_g, b_e = b_g / b_scale, b_e / b_scale
    m_active = m_inside & ~m_idle
    p = factors + o_t
    tl.store(p, tl.where(m_idle, 0.0, tl.where(m_inside, b_scale, float("nan"))), m_t)
    p += stride_factors
    tl.store(p, tl.where(m_active, b_g, 0.0), m_t)
    p += stride_factors
    tl.store(p, tl.where(m_active, b_g + b_e * b_entropy, 0.0), m_t)
    p += stride_factors
    tl.store(p, tl.where(m_active, b_e, 0.0), m_t)
    tl.store(tops + i_b, tl.max(tl.where(m_active & m_t, b_scale, 0.0), 0))


@triton.jit
def load_factors(factors, stride_factors, o_t, m_t):
    """scale, g, a, e."""
    p_g = factors + o_t + stride_factors
    p_a = p_g + stride_factors
    b_scale, b_g = tl.load(factors + o_t, m_t, 0.0), tl.load(p_g, m_t, 0.0)
    return b_scale, b_g, tl.load(p_a, m_t, 0.0), tl.load(p_a + stride_factors, m_t, 0.0)


@triton.jit(do_not_specialize=["stride_factors", "num_rows"])
def linear_logprobs_rows(
    grad_logprobs,  # [T]
    grad_entropy,  # [T]
    entropy,  # [T]
    targets,  # [T]
    temperatures,  # [T] or None
    factors,  # [4, T], as the next one written by store_factors
    tops,  # [programs]
    stride_factors,
    num_rows,
    vocab,
    ignore_index,
    BT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, ignore_index)
    b_g = tl.load(grad_logprobs + o_t, m_t, 0.0)
    b_e = tl.load(grad_entropy + o_t, m_t, 0.0)
    b_entropy = tl.load(entropy + o_t, m_t, 0.0)
    b_temperature = load_temperature(temperatures, o_t, m_t)
    m_idle = (b_target == ignore_index) | ((b_g == 0) & (b_e == 0))
    m_inside = (b_target >= 0) & (b_target < vocab)
    store_factors(factors, tops, i_b, stride_factors, o_t, m_t, b_g, b_e, b_entropy, b_temperature, m_idle, m_inside)


@triton.jit(do_not_specialize=["stride_factors", "num_rows"])
def linear_logprobs_dz(
    hidden,  # [T, D]
    weight,  # [V, D]
    targets,  # [T]
    bias,  # [V] or None
    temperatures,  # [T] or None
    softcap,  # or None
    factors,  # [4, T]
    lse,  # [T]
    lse_residual,  # [T], or None: a 16-bit dz does not feel it
    dz,  # [T, columns], dZ / scale of the columns from first_column on
    bias_sums,  # [blocks of rows, V] or None, sums of dZ over each block
    stride_hidden,
    stride_weight,
    stride_factors,
    stride_dz,
    num_rows,
    vocab,
    dim,
    first_column,
    num_columns,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    i_b, i_s = grouped(tl.program_id(0), tl.cdiv(num_rows, BT), tl.cdiv(num_columns, BV), GROUP)
    i_t = i_b * BT
    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, -1)
    b_temperature = load_temperature(temperatures, o_t, m_t)
    b_scale, b_g, b_a, b_e = load_factors(factors, stride_factors, o_t, m_t)
    m_active = b_scale > 0
    b_lse = tl.load(lse + o_t, m_t, 0.0)
    b_lse_residual = None
    if lse_residual is not None:
        b_lse_residual = tl.load(lse_residual + o_t, m_t, 0.0)
    rows, columns = (hidden, stride_hidden, num_rows, dim), (weight, stride_weight, vocab, dim)
    # one pass; written without a loop, ptxas keeps values of the epilogue over the product, and spills on sm_90 and 100
    for i_c in range(i_s * BV, tl.minimum(i_s * BV + BV, num_columns), BV):
        i_v = first_column + i_c
        b_z = logits(rows, columns, bias, softcap, b_temperature, i_t, i_v, DESCRIBED, BT, BV, BD)
        b_here = target_column(b_target, i_v, BV)
        b_d = gradient(b_z, None, b_g, b_a, b_e, b_lse, b_lse_residual, b_temperature, softcap, b_here, BV)
        b_d = tl.where(m_active[:, None], b_d, 0.0)
        if bias_sums is not None:
            o_c = i_c + tl.arange(0, BV)
            o = i_b.to(tl.int64) * vocab + first_column + o_c
            b_sum = tl.sum(b_d * tl.load(factors + o_t, m_t & m_active, 0.0)[:, None], 0)
            tl.store(bias_sums + o, b_sum, o_c < num_columns)
        store_block((dz, stride_dz, num_rows, num_columns), i_t, i_c, b_d, DESCRIBED, BT, BV)


@triton.jit(do_not_specialize=["num_rows", "num_tops"])
def linear_logprobs_scaled_hidden(
    hidden,  # [T, D]
    scale,  # [T]
    tops,  # [blocks of rows], the largest scale of each
    top,  # [], the largest of all, 1 where no row has a gradient
    scaled,  # [T, D], hidden scale / top; 0 in rows without gradient, whatever they hold
    stride_hidden,
    stride_scaled,
    num_rows,
    dim,
    num_tops,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    b_top = tl.zeros([BD], tl.float32)
    for i_b in range(0, num_tops, BD):
        o_b = i_b + tl.arange(0, BD)
        b_top = tl.maximum(b_top, tl.load(tops + o_b, o_b < num_tops, 0.0))
    largest = tl.max(b_top, 0)
    largest = tl.where(largest > 0, largest, 1.0)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(top, largest)
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_scale = tl.load(scale + o_t, o_t < num_rows, 0.0)
    m = (o_t < num_rows)[:, None] & (o_d < dim)[None, :]
    m_active = m & (b_scale > 0)[:, None]
    b_h = tl.load(hidden + o_t[:, None] * stride_hidden + o_d[None, :], m_active, 0.0).to(tl.float32)  # [BT, BD]
    b_h = tl.where(m_active, b_h * (b_scale / largest)[:, None], 0.0)
    tl.store(scaled + o_t[:, None] * stride_scaled + o_d[None, :], b_h.to(scaled.dtype.element_ty), m)


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    entropy: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    *needs: bool,
) -> tuple[Tensor, ...]:
    head = Head(hidden, weight, targets, bias, per_row(temperature, temperatures, targets), softcap)
    upstream = grad_logprobs, grad_entropy
    return gradients(hidden.dtype, head, ignore_index, upstream, (entropy, lse, lse_residual), *needs)


def gradients(
    dtype: torch.dtype,
    head: Head,
    ignore_index: int,
    upstream: tuple[Tensor, Tensor],  # of logprobs and entropy
    results: tuple[Tensor, ...],  # entropy, lse, lse_residual
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight, bias in `dtype`; an empty [0] tensor where one is not needed."""
    hidden, weight, targets, _, temperatures, softcap = head
    entropy, lse, lse_residual = results
    (num_rows, dim), vocab = hidden.shape, len(weight)
    dx = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=torch.float32)
    grad_weight = hidden.new_empty(weight.shape if need_weight else 0, dtype=dtype)
    grad_bias = hidden.new_empty(vocab if need_bias else 0, dtype=dtype)
    if num_rows == 0:
        return dx.to(dtype), grad_weight.zero_(), grad_bias.zero_()
    with torch.cuda.device_of(hidden):
        factors, tops = new_factors(num_rows, lse)
        linear_logprobs_rows[(len(tops),)](
            *upstream, entropy, targets, temperatures, factors, tops, factors.stride(0), num_rows, vocab, ignore_index,
            **MERGE,
        )  # fmt: skip
        scale = factors[0]
        x, top = scaled_hidden(hidden, scale, tops) if need_weight else (None, None)
        described = describable(hidden, weight)
        launch = dz_blocks(hidden.dtype, capability(hidden), described, softcap is not None or need_bias)
        height = launch["BT"]
        bias_sums = hidden.new_empty(triton.cdiv(num_rows, height), vocab, dtype=torch.float32) if need_bias else None
        dz_rows = hidden.new_empty(min(num_rows, ROWS), triton.cdiv(min(vocab, COLUMNS), 8) * 8)
        dw_rows = hidden.new_empty(min(vocab, COLUMNS) if need_weight else 0, dim, dtype=torch.float32)
        for column in range(0, vocab, COLUMNS):
            w = weight[column : column + COLUMNS]
            for row in range(0, num_rows, ROWS):
                rows = slice(row, min(num_rows, row + ROWS))
                part = head.rows(rows)
                dz = dz_rows[: len(part.targets), : len(w)]
                part_sums = None if bias_sums is None else bias_sums[row // height :]
                part_results = lse[rows], lse_residual[rows]
                fill(dz, column, part, factors[:, rows], part_results, part_sums, launch)
                if need_hidden:
                    multiply(dz, w, dx[rows], scale[rows], added=column > 0, transposed=False)
                if need_weight:
                    multiply(dz, x[rows], dw_rows[: len(w)], top, added=row > 0, transposed=True)
            if need_weight:
                grad_weight[column : column + COLUMNS].copy_(dw_rows[: len(w)])
        if need_bias:
            grad_bias.copy_(bias_sums.sum(0))
    return dx.to(dtype), grad_weight, grad_bias


def fill(
    dz: Tensor,  # [T, columns]
    column: int,  # the first one
    head: Head,
    factors: Tensor,  # [4, T]
    results: tuple[Tensor, Tensor],  # lse, lse_residual
    bias_sums: Tensor | None,  # [blocks of rows, V]
    launch: dict[str, int],
) -> None:
    """dZ / scale of the vocabulary's columns from `column` on."""
    hidden, weight, targets, bias, temperatures, softcap = head
    (num_rows, num_columns), (vocab, dim) = dz.shape, weight.shape
    columns = slice(column, column + num_columns)
    if bias_sums is None and compiled(hidden, weight):
        part = hidden, weight[columns], targets, None if bias is None else bias[columns], temperatures, softcap
        torch.ops.qrm_fast.head_dz(*part, factors, results[0], column, dz)
        return
    described = describable(hidden, weight)
    linear_logprobs_dz[(triton.cdiv(num_rows, launch["BT"]) * triton.cdiv(num_columns, launch["BV"]),)](
        operand(hidden, described, launch["BT"], launch["BD"]),
        operand(weight, described, launch["BV"], launch["BD"]),
        targets,
        bias,
        temperatures,
        softcap,
        factors,
        results[0],
        results[1] if dz.dtype == torch.float32 else None,
        operand(dz, described, launch["BT"], launch["BV"]),
        bias_sums,
        hidden.stride(0),
        weight.stride(0),
        factors.stride(0),
        dz.stride(0),
        num_rows,
        vocab,
        dim,
        column,
        num_columns,
        described,
        GROUP,
        **launch,
    )


def dz_blocks(dtype: torch.dtype, capability: int, described: bool, crowded: bool) -> dict[str, int]:
    """Half the columns where their epilogue would not fit into the registers that the accumulators leave."""
    return blocks(dtype, capability, described, halved=crowded, stored=described)


def new_factors(num_rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what store_factors writes."""
    return like.new_empty(4, num_rows), like.new_empty(triton.cdiv(num_rows, MERGE["BT"]))


def scaled_hidden(hidden: Tensor, scale: Tensor, tops: Tensor) -> tuple[Tensor, Tensor]:
    """hidden scale / top [T, D] in rows that the copy engine can load, 0 in rows without gradient; and top []."""
    num_rows, dim = hidden.shape
    scaled, top = hidden.new_empty(num_rows, triton.cdiv(dim, 8) * 8)[:, :dim], scale.new_empty(())
    linear_logprobs_scaled_hidden[(triton.cdiv(num_rows, SCALE["BT"]), triton.cdiv(dim, SCALE["BD"]))](
        hidden, scale, tops, top, scaled, hidden.stride(0), scaled.stride(0), num_rows, dim, len(tops), **SCALE
    )
    return scaled, top


_backward.register_kernel("cuda")(backward)
