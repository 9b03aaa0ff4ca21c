"""Triton kernels of linear_logprobs: log-probability and entropy of hidden states under a vocabulary head.

Forward: a program multiplies BT hidden rows with one split of the vocabulary, BV columns at a time, in float32
accumulators; bias, softcap, temperature and the online fold into (max, sum, weighted sum) happen in registers, so a
logit is never rounded to 16 bits and never written. V is cut into splits from V alone, their statistics are merged in
order by a second launch, 12 bytes per row and 2048 columns; a row's bits depend on that row, weight and bias.
2 T D V FLOP. Programs run through GROUP blocks of rows for one split before the next split: a wave of programs then
reads as many weight tiles as hidden tiles, about 15 MB each for D = 3584, and both stay in L2, where one block of rows
per wave would read all of weight T / BT times.

Backward: ROWS rows and COLUMNS columns at a time, the logits are multiplied again, and dZ leaves the accumulators in
hidden's dtype, divided by a power of 2 of its row so that 16 bits hold it whatever the size of the loss; `product` then
adds dZ W and dZ^T X in float32. For 16-bit inputs tensor cores need a 16-bit dZ: its rounding, 2^-9 of each element in
bfloat16, is about that of the gradient itself. 6 T D V FLOP. A row's dZ W runs over V in order, in blocks of fixed
shape: its bits are its own. Rows without gradient enter dW as zeros, whatever they hold.
Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_logprobs import _backward, _forward
from .product import GROUP, blocks, capability, describable, grouped, load_block, multiply, operand

SPLIT = 2048  # columns that one program folds, a multiple of every BV
ROWS, COLUMNS = 16384, 8192  # of dZ that are held at a time: 268 MB in 16 bits
MERGE = {"BT": 128, "num_warps": 4}
SCALE = {"BT": 4, "BD": 512, "num_warps": 4}


@triton.jit
def store_block(
    x, stride, i_r, i_c, num_rows, num_columns, b, DESCRIBED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Block b [BR, BC] to rows from i_r and columns i_c of x on, in its dtype; what lies outside is left out."""
    if DESCRIBED:
        x.store([i_r, i_c], b.to(x.dtype))
    else:
        o_r = i_r + tl.arange(0, BR)
        o_c = i_c + tl.arange(0, BC)
        p = x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        tl.store(p, b.to(x.dtype.element_ty), (o_r < num_rows)[:, None] & (o_c < num_columns)[None, :])


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
def target_column(b_target, i_v, BV: tl.constexpr):
    """The target's column within the block from i_v on, -1 where it is elsewhere."""
    return tl.where((b_target >= i_v) & (b_target < i_v + BV), b_target - i_v, -1).to(tl.int32)


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
    kept,  # [T, V] or None: e^(z - top), or z where tops is None
    tops,  # [blocks of columns, T] or None: the top of each block of BV columns
    stride_hidden,
    stride_weight,
    stride_kept,
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
    i_t, i_s = grouped(tl.program_id(0), tl.cdiv(num_rows, BT), tl.cdiv(vocab, SPLIT), GROUP)
    i_t *= BT
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
        b_here = target_column(b_target, i_v, BV)
        if tl.max(b_here, 0) >= 0:
            b_target_logit += tl.sum(tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_z, 0.0), 1)
        b_top = tl.max(b_z, 1)
        b_origin = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_shift = b_z - b_origin[:, None]
        b_e = tl.exp2(1.4426950408889634 * b_shift)
        if tops is not None:
            tl.store(tops + i_v // BV * num_rows + o_t, b_origin, m_t)
        if kept is not None:
            b_kept = b_z if tops is None else b_e
            store_block(kept, stride_kept, i_t, i_v, num_rows, vocab, b_kept, DESCRIBED, BT, BV)
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


@triton.jit
def gradient(b_z, b_g, b_a, b_e, b_lse, b_lse_residual, b_temperature, softcap, b_here, BV: tl.constexpr):
    """g 1[v = target] - p (a + e log p), p = exp(z - lse), times the softcap's slope; b_here: the target's column."""
    b_logp = b_z - b_lse[:, None]
    if b_lse_residual is not None:
        b_logp -= b_lse_residual[:, None]
    # where p is 0 its logarithm may be -inf
    b_d = -tl.exp2(1.4426950408889634 * b_logp) * (b_a[:, None] + b_e[:, None] * tl.maximum(b_logp, -1000.0))
    b_d += tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_g[:, None], 0.0)
    if softcap is not None:
        b_y = b_z / softcap
        if b_temperature is not None:
            b_y *= b_temperature[:, None]
        b_d *= 1 - b_y * b_y
    return b_d


@triton.jit
def linear_logprobs_rows(
    grad_logprobs,  # [T]
    grad_entropy,  # [T]
    entropy,  # [T]
    targets,  # [T]
    temperatures,  # [T] or None
    scale,  # [T], a power of 2 next to the row's dZ; 0 for an idle row, NaN for a wild target
    at_target,  # [T], as the next two: what `gradient` calls g, a, e, for dZ / scale
    at_all,
    at_logp,
    num_rows,
    vocab,
    ignore_index,
    BT: tl.constexpr,
):
    """dL/dz = g (1[v = target] - p) - e p (log p + H), by rows."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, ignore_index)
    b_g = tl.load(grad_logprobs + o_t, m_t, 0.0)
    b_e = tl.load(grad_entropy + o_t, m_t, 0.0)
    m_idle = (b_target == ignore_index) | ((b_g == 0) & (b_e == 0))
    m_inside = (b_target >= 0) & (b_target < vocab)
    if temperatures is not None:
        b_temperature = tl.load(temperatures + o_t, m_t, 1.0)
        b_g, b_e = b_g / b_temperature, b_e / b_temperature
    b_scale = ((tl.abs(b_g) + tl.abs(b_e)).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    b_scale = tl.where(b_scale > 2.0**100, 1.0, tl.maximum(b_scale, 2.0**-100))  # not of inf and NaN
    b_g, b_e = b_g / b_scale, b_e / b_scale
    m_active = m_inside & ~m_idle
    tl.store(scale + o_t, tl.where(m_idle, 0.0, tl.where(m_inside, b_scale, float("nan"))), m_t)
    tl.store(at_target + o_t, tl.where(m_active, b_g, 0.0), m_t)
    tl.store(at_all + o_t, tl.where(m_active, b_g + b_e * tl.load(entropy + o_t, m_t, 0.0), 0.0), m_t)
    tl.store(at_logp + o_t, tl.where(m_active, b_e, 0.0), m_t)


@triton.jit
def linear_logprobs_dz(
    hidden,  # [T, D]
    weight,  # [V, D]
    targets,  # [T]
    bias,  # [V] or None
    temperatures,  # [T] or None
    softcap,  # or None
    scale,  # [T]
    at_target,  # [T], as the next two: g, a and e of `gradient`
    at_all,
    at_logp,
    lse,  # [T]
    lse_residual,  # [T], or None: a 16-bit dz does not feel it
    dz,  # [T, columns], dZ / scale of the columns from first_column on
    bias_sums,  # [blocks of rows, V] or None, sums of dZ over each block
    stride_hidden,
    stride_weight,
    stride_dz,
    num_rows,
    vocab,
    dim,
    first_column,
    num_columns,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    i_b, i_s = grouped(tl.program_id(0), tl.cdiv(num_rows, BT), tl.cdiv(num_columns, SPLIT), GROUP)
    i_t = i_b * BT
    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, -1)
    b_temperature = None
    if temperatures is not None:
        b_temperature = tl.load(temperatures + o_t, m_t, 1.0)
    m_active = tl.load(scale + o_t, m_t, 0.0) > 0
    b_g = tl.load(at_target + o_t, m_t, 0.0)
    b_a = tl.load(at_all + o_t, m_t, 0.0)
    b_e = tl.load(at_logp + o_t, m_t, 0.0)
    b_lse = tl.load(lse + o_t, m_t, 0.0)
    b_lse_residual = None
    if lse_residual is not None:
        b_lse_residual = tl.load(lse_residual + o_t, m_t, 0.0)
    for i_c in range(i_s * SPLIT, tl.minimum(i_s * SPLIT + SPLIT, num_columns), BV):
        i_v = first_column + i_c
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
        b_here = target_column(b_target, i_v, BV)
        b_d = gradient(b_z, b_g, b_a, b_e, b_lse, b_lse_residual, b_temperature, softcap, b_here, BV)
        b_d = tl.where(m_active[:, None], b_d, 0.0)
        if bias_sums is not None:
            o_c = i_c + tl.arange(0, BV)
            o = i_b.to(tl.int64) * vocab + first_column + o_c
            b_scale = tl.load(scale + o_t, m_t & m_active, 0.0)
            b_sum = tl.sum(b_d * b_scale[:, None], 0)
            tl.store(bias_sums + o, b_sum, o_c < num_columns)
        store_block(dz, stride_dz, i_t, i_c, num_rows, num_columns, b_d, DESCRIBED, BT, BV)


@triton.jit
def linear_logprobs_scaled_hidden(
    hidden,  # [T, D]
    scale,  # [T]
    top,  # []
    scaled,  # [T, D], hidden scale / top; 0 in rows without gradient, whatever they hold
    stride_hidden,
    stride_scaled,
    num_rows,
    dim,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_scale = tl.load(scale + o_t, o_t < num_rows, 0.0)
    m = (o_t < num_rows)[:, None] & (o_d < dim)[None, :]
    m_active = m & (b_scale > 0)[:, None]
    b_h = tl.load(hidden + o_t[:, None] * stride_hidden + o_d[None, :], m_active, 0.0).to(tl.float32)  # [BT, BD]
    b_h = tl.where(m_active, b_h * (b_scale / tl.load(top))[:, None], 0.0)
    tl.store(scaled + o_t[:, None] * stride_scaled + o_d[None, :], b_h.to(scaled.dtype.element_ty), m)


def fold(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    target_logits: Tensor,
    kept: Tensor | None = None,
    tops: Tensor | None = None,
) -> Tensor:
    """Statistics [3, splits, T] of every split; writes the logits of those targets that are columns.

    `kept` [T, V] receives the logits, or their exponentials where `tops` receives what they are relative to.
    """
    (num_rows, dim), vocab = hidden.shape, weight.shape[0]
    num_splits = triton.cdiv(vocab, SPLIT)
    statistics = hidden.new_empty(3, num_splits, num_rows, dtype=torch.float32)
    described = describable(hidden, weight)
    launch = fold_blocks(hidden.dtype, capability(hidden), described, softcap is not None, kept is not None)
    linear_logprobs_fold[(triton.cdiv(num_rows, launch["BT"]) * num_splits,)](
        operand(hidden, described, launch["BT"], launch["BD"]),
        operand(weight, described, launch["BV"], launch["BD"]),
        targets,
        bias,
        per_row(temperature, temperatures, targets),
        softcap,
        *statistics,
        target_logits,
        None if kept is None else operand(kept, described, launch["BT"], launch["BV"]),
        tops,
        hidden.stride(0),
        weight.stride(0),
        0 if kept is None else kept.stride(0),
        num_rows,
        vocab,
        dim,
        described,
        SPLIT,
        GROUP,
        **launch,
    )
    return statistics


def fold_blocks(dtype: torch.dtype, capability: int, described: bool, capped: bool, kept: bool) -> dict[str, int]:
    halved = capped or (kept and not described)
    return blocks(dtype, capability, described, halved=halved, stored=kept and described)


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


def backward(grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(hidden.dtype, grad_logprobs, grad_entropy, hidden, *rest)


def gradients(
    dtype: torch.dtype,
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias in `dtype`; an empty [0] tensor where one is not needed."""
    (num_rows, dim), vocab = hidden.shape, weight.shape[0]
    dx = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=torch.float32)
    grad_weight = hidden.new_empty(weight.shape if need_weight else 0, dtype=dtype)
    grad_bias = hidden.new_empty(vocab if need_bias else 0, dtype=dtype)
    if num_rows == 0:
        return dx.to(dtype), grad_weight.zero_(), grad_bias.zero_()
    temperatures = per_row(temperature, temperatures, targets)
    with torch.cuda.device_of(hidden):
        scale, *factors = row_factors(grad_logprobs, grad_entropy, entropy, targets, temperatures, vocab, ignore_index)
        top = largest(scale)
        x = scaled_hidden(hidden, scale, top) if need_weight else None
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
                dz = dz_rows[: rows.stop - row, : len(w)]
                linear_logprobs_dz[(triton.cdiv(len(dz), height) * triton.cdiv(len(w), SPLIT),)](
                    operand(hidden[rows], described, height, launch["BD"]),
                    operand(weight, described, launch["BV"], launch["BD"]),
                    targets[rows],
                    bias,
                    None if temperatures is None else temperatures[rows],
                    softcap,
                    *(v[rows] for v in (scale, *factors, lse)),
                    lse_residual[rows] if dz.dtype == torch.float32 else None,
                    operand(dz, described, height, launch["BV"]),
                    None if bias_sums is None else bias_sums[row // height :],
                    hidden.stride(0),
                    weight.stride(0),
                    dz.stride(0),
                    len(dz),
                    vocab,
                    dim,
                    column,
                    len(w),
                    described,
                    SPLIT,
                    GROUP,
                    **launch,
                )
                if need_hidden:
                    multiply(dz, w, dx[rows], scale[rows], added=column > 0, transposed=False)
                if need_weight:
                    multiply(dz, x[rows], dw_rows[: len(w)], top, added=row > 0, transposed=True)
            if need_weight:
                grad_weight[column : column + COLUMNS].copy_(dw_rows[: len(w)])
        if need_bias:
            grad_bias.copy_(bias_sums.sum(0))
    return dx.to(dtype), grad_weight, grad_bias


def dz_blocks(dtype: torch.dtype, capability: int, described: bool, crowded: bool) -> dict[str, int]:
    """Half the columns where their epilogue would not fit into the registers that the accumulators leave."""
    return blocks(dtype, capability, described, halved=crowded, stored=described)


def row_factors(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    entropy: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    vocab: int,
    ignore_index: int,
) -> list[Tensor]:
    """scale, at_target, at_all, at_logp of linear_logprobs_rows, [T] each."""
    num_rows = len(targets)
    results = [torch.empty_like(grad_logprobs) for _ in range(4)]
    linear_logprobs_rows[(triton.cdiv(num_rows, MERGE["BT"]),)](
        grad_logprobs, grad_entropy, entropy, targets, temperatures, *results, num_rows, vocab, ignore_index, **MERGE
    )
    return results


def largest(scale: Tensor) -> Tensor:
    """The largest of the rows' scales, 1 where no row has a gradient."""
    top = scale.nan_to_num(0.0).amax()
    return torch.where(top > 0, top, 1.0)


def scaled_hidden(hidden: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    """hidden scale / top [T, D] in rows that the copy engine can load, 0 in rows without gradient."""
    num_rows, dim = hidden.shape
    scaled = hidden.new_empty(num_rows, triton.cdiv(dim, 8) * 8)[:, :dim]
    linear_logprobs_scaled_hidden[(triton.cdiv(num_rows, SCALE["BT"]), triton.cdiv(dim, SCALE["BD"]))](
        hidden, scale, top, scaled, hidden.stride(0), scaled.stride(0), num_rows, dim, **SCALE
    )
    return scaled


def per_row(temperature: float, temperatures: Tensor | None, targets: Tensor) -> Tensor | None:
    """[T] temperatures, None where all of them are 1."""
    if temperatures is None and temperature != 1:
        return torch.full_like(targets, temperature, dtype=torch.float32)
    return temperatures


_forward.register_kernel("cuda")(forward)
_backward.register_kernel("cuda")(backward)


def _types(dtype: str, launch: dict[str, int], described: bool) -> dict[str, str]:
    types = {"kept": "*fp32" if dtype == "fp32" else "*fp16", "tops": "*fp32"}
    types |= dict.fromkeys(("bias", "hidden", "weight", "dz", "scaled"), f"*{dtype}") | {"targets": "*i64"}
    if described:
        types["hidden"] = f"tensordesc<{dtype}[{launch['BT']},{launch['BD']}]>"
        types["weight"] = f"tensordesc<{dtype}[{launch['BV']},{launch['BD']}]>"
        types["dz"] = f"tensordesc<{dtype}[{launch['BT']},{launch['BV']}]>"
        types["kept"] = f"tensordesc<fp16[{launch['BT']},{launch['BV']}]>"
    statistics = ("maxima", "sums", "weighteds", "target_logits", "logprobs", "entropy", "lse", "lse_residual")
    gradients = ("scale", "at_target", "at_all", "at_logp", "bias_sums", "grad_logprobs", "grad_entropy", "top")
    types |= dict.fromkeys((*statistics, *gradients, "temperatures"), "*fp32") | {"softcap": "fp32"}
    types |= dict.fromkeys(("num_rows", "vocab", "num_splits", "ignore_index", "first_column", "num_columns"), "i32")
    return types | dict.fromkeys(
        ("stride_hidden", "stride_weight", "stride_kept", "stride_dz", "stride_scaled", "dim"), "i32:16"
    )


def _aot(kernel, dtype: str, capability: int, described=True, crowded=False, kept=False, **constants) -> tuple:
    """One configuration as tests/test_build.py compiles it: without a GPU, for one architecture."""
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if kernel is linear_logprobs_dz:
        launch = dz_blocks(torch_dtype, capability // 10, described, crowded)
    else:
        launch = fold_blocks(torch_dtype, capability // 10, described, crowded, kept)
        if not kept:
            constants |= {"kept": None, "tops": None}
    if kernel is linear_logprobs_dz and dtype != "fp32":
        constants["lse_residual"] = None
    if not crowded:
        constants |= {"softcap": None} if kernel is linear_logprobs_fold else {"softcap": None, "bias_sums": None}
    types = _types(dtype, launch, described)
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    constants |= launch | {"DESCRIBED": described, "SPLIT": SPLIT, "GROUP": GROUP}
    return kernel, types, constants, options, dtype != "fp32", capability


def _aot_rows(kernel, launch: dict[str, int]) -> tuple:
    blocks = {name: size for name, size in launch.items() if name != "num_warps"}
    return kernel, _types("bf16", {}, False), blocks, launch["num_warps"], False


AOT = [
    _aot(linear_logprobs_fold, "bf16", 80, described=False),
    _aot(linear_logprobs_fold, "bf16", 90),
    _aot(linear_logprobs_fold, "bf16", 100),
    _aot(linear_logprobs_fold, "fp32", 90, described=False, crowded=True),
    _aot(linear_logprobs_dz, "bf16", 80, described=False),
    _aot(linear_logprobs_dz, "bf16", 90),
    _aot(linear_logprobs_dz, "bf16", 90, crowded=True),
    _aot(linear_logprobs_dz, "bf16", 100),
    _aot(linear_logprobs_dz, "fp32", 90, described=False, crowded=True),
    _aot_rows(linear_logprobs_merge, MERGE),
    _aot_rows(linear_logprobs_rows, MERGE),
    _aot_rows(linear_logprobs_scaled_hidden, SCALE),
]
