"""Triton kernels of token_q: Q-values of taken actions, final RMSNorm included.

Forward reads each hidden row once, and of a vocabulary head only the rows of the actions taken: 2 D bytes per token in
bf16 with a scalar head, 4 D with a gathered one, for 2 D FLOP. Normalised states and logits are never written.
Backward: `token_q_backward_rows` writes hidden's gradient, rank-1 in the head, and the factor with which each row
enters the other gradients; one more read of the hidden rows sums those. Sums over rows run in fixed blocks of rows and
are combined in the blocks' order by a second launch: no atomics, the same bits every time. For a vocabulary head the
rows are sorted stably by action. Of an action whose rows cross blocks, the block where they begin keeps its piece in
`tails` and every later block in `heads`.
Block sizes give each thread 16-byte loads in bf16. They have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.token_q import IGNORE_INDEX, _token_q, _token_q_backward

BLOCK_ROWS = 128  # of one partial sum over rows
ALONG_ROWS = {"BT": 4, "BD": 512, "num_warps": 4}
OVER_ROWS = {"BT": 8, "BD": 256, "num_warps": 4}
ROW_BY_ROW = {"BD": 256, "num_warps": 1}


@triton.jit
def row_ids(targets, o_t, m_t, num_ids, IGNORE: tl.constexpr):
    """The head's row of each token, whether the token is ignored, whether its id lies in the head."""
    b_id = o_t * 0
    if targets is not None:
        b_id = tl.load(targets + o_t, m_t, IGNORE)
    return b_id, b_id == IGNORE, (b_id >= 0) & (b_id < num_ids)


@triton.jit
def row_sums(
    hidden, head, norm_weight, stride_hidden, stride_head, o_t, b_id, m_t, dim, BT: tl.constexpr, BD: tl.constexpr
):
    """sum_d h_d norm_d w_d and sum_d h_d^2; a row outside `m_t` is not read and gives 0."""
    b_product = tl.zeros([BT, BD], tl.float32)
    b_square = tl.zeros([BT, BD], tl.float32)
    for i_d in range(0, dim, BD):
        o_d = i_d + tl.arange(0, BD)
        m = m_t[:, None] & (o_d < dim)[None, :]
        b_h = tl.load(hidden + o_t[:, None] * stride_hidden + o_d[None, :], m, 0.0).to(tl.float32)  # [BT, BD]
        b_w = tl.load(head + b_id[:, None] * stride_head + o_d[None, :], m, 0.0).to(tl.float32)  # [BT, BD]
        if norm_weight is not None:
            b_w *= tl.load(norm_weight + o_d, o_d < dim, 0.0).to(tl.float32)[None, :]
        b_product += b_h * b_w
        b_square += b_h * b_h
    return tl.sum(b_product, 1), tl.sum(b_square, 1)


@triton.jit(do_not_specialize=["num_rows"])
def token_q_forward(
    hidden,  # [T, D]
    head,  # [V, D]
    targets,  # [T] or None
    bias,  # [V] or None
    norm_weight,  # [D] or None
    q,  # [T]
    stride_hidden,
    stride_head,
    num_rows,
    num_ids,
    dim,
    eps,
    IGNORE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_id, m_ignored, m_inside = row_ids(targets, o_t, m_t, num_ids, IGNORE)
    m_read = m_t & m_inside
    b_q, b_square = row_sums(hidden, head, norm_weight, stride_hidden, stride_head, o_t, b_id, m_read, dim, BT, BD)
    if norm_weight is not None:
        b_q *= tl.rsqrt(b_square / dim + eps)
    if bias is not None:
        b_q += tl.load(bias + b_id, m_read, 0.0).to(tl.float32)
    tl.store(q + o_t, tl.where(m_ignored, 0.0, tl.where(m_inside, b_q, float("nan"))), m_t)


@triton.jit(do_not_specialize=["num_rows"])
def token_q_backward_rows(
    grad_q,  # [T]
    hidden,
    head,
    targets,
    norm_weight,
    grad_hidden,  # [T, D] or None
    factor,  # [T], grad_q / rms(hidden); 0 for a row without gradient
    stride_hidden,
    stride_head,
    num_rows,
    num_ids,
    dim,
    eps,
    IGNORE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_id, m_ignored, m_inside = row_ids(targets, o_t, m_t, num_ids, IGNORE)
    b_factor = tl.load(grad_q + o_t, m_t, 0.0)
    m_idle = m_ignored | (b_factor == 0)
    m_read = m_t & m_inside & ~m_idle
    b_along = tl.zeros([BT], tl.float32)
    if norm_weight is not None:
        b_product, b_square = row_sums(
            hidden, head, norm_weight, stride_hidden, stride_head, o_t, b_id, m_read, dim, BT, BD
        )
        b_rstd = tl.rsqrt(b_square / dim + eps)
        b_factor *= b_rstd
        b_along = b_factor * b_rstd * b_rstd * b_product / dim
    tl.store(factor + o_t, tl.where(m_read, b_factor, 0.0), m_t)
    if grad_hidden is not None:
        # g rstd (norm w - xhat (xhat . norm w) / D) with xhat = rstd h, or g w without an RMSNorm
        for i_d in range(0, dim, BD):
            o_d = i_d + tl.arange(0, BD)
            m = m_read[:, None] & (o_d < dim)[None, :]
            b_w = tl.load(head + b_id[:, None] * stride_head + o_d[None, :], m, 0.0).to(tl.float32)  # [BT, BD]
            b_grad = b_factor[:, None] * b_w
            if norm_weight is not None:
                b_norm = tl.load(norm_weight + o_d, o_d < dim, 0.0).to(tl.float32)  # [BD]
                b_h = tl.load(hidden + o_t[:, None] * stride_hidden + o_d[None, :], m, 0.0).to(tl.float32)
                b_grad = b_grad * b_norm[None, :] - b_along[:, None] * b_h
            b_grad = tl.where(m_idle[:, None], 0.0, tl.where(m_inside[:, None], b_grad, float("nan")))
            tl.store(grad_hidden + o_t[:, None] * dim + o_d[None, :], b_grad, m_t[:, None] & (o_d < dim)[None, :])


@triton.jit(do_not_specialize=["num_rows", "block_rows"])
def token_q_column_sums(
    x,  # [T, D]
    factor,  # [T] or None; a row of factor 0 is not read
    head,  # [V, D] or None
    targets,
    sums,  # [blocks, D], sum of factor_t x_t head[a_t] over the rows t of each block
    stride_x,
    stride_head,
    num_rows,
    num_ids,
    dim,
    block_rows,
    IGNORE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < dim
    b_sum = tl.zeros([BT, BD], tl.float32)
    for i_r in range(0, block_rows, BT):
        o_r = i_r + tl.arange(0, BT)
        o_t = i_b * block_rows + o_r
        m_t = (o_r < block_rows) & (o_t < num_rows)
        b_factor = tl.full([BT], 1.0, tl.float32)
        if factor is not None:
            b_factor = tl.load(factor + o_t, m_t, 0.0)
            m_t = m_t & (b_factor != 0)
        m = m_t[:, None] & m_d[None, :]
        b_x = tl.load(x + o_t[:, None] * stride_x + o_d[None, :], m, 0.0).to(tl.float32)  # [BT, BD]
        if head is not None:
            b_id, _, _ = row_ids(targets, o_t, m_t, num_ids, IGNORE)
            b_x *= tl.load(head + b_id[:, None] * stride_head + o_d[None, :], m, 0.0).to(tl.float32)
        b_sum += b_factor[:, None] * b_x
    tl.store(sums + i_b * dim + o_d, tl.sum(b_sum, 0), m_d)


@triton.jit(do_not_specialize=["num_rows"])
def token_q_segment_sums(
    x,  # [T, D]
    factor,  # [T] or None; a row of factor 0 is not read
    order,  # [T], rows sorted by action
    ids,  # [T], their actions
    norm_weight,
    sums,  # [V, D], zero: norm * sum of factor_t x_t over the rows t of each action that lies in one block
    heads,  # [blocks, D]
    tails,  # [blocks, D]
    stride_x,
    num_rows,
    num_ids,
    dim,
    block_rows,
    BD: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < dim
    b_norm = tl.full([BD], 1.0, tl.float32)
    if norm_weight is not None:
        b_norm = tl.load(norm_weight + o_d, m_d, 0.0).to(tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    bos = i_b * block_rows
    i_before = tl.load(ids + bos - 1, bos > 0, -1)
    i_id = tl.load(ids + bos)
    for i_r in range(bos, tl.minimum(bos + block_rows, num_rows)):
        i_t = tl.load(order + i_r)
        b_factor = 1.0
        num_columns = dim
        if factor is not None:
            b_factor = tl.load(factor + i_t)
            num_columns = tl.where(b_factor != 0, dim, 0)
        b_sum += b_factor * tl.load(x + i_t * stride_x + o_d, o_d < num_columns, 0.0).to(tl.float32)  # [BD]
        i_next = tl.load(ids + i_r + 1, i_r + 1 < num_rows, -1)
        if (i_next != i_id) | (i_r + 1 == bos + block_rows):
            m_store = m_d & (i_id >= 0) & (i_id < num_ids)
            m_head = m_store & (i_id == i_before)
            m_tail = m_store & (i_id != i_before) & (i_id == i_next)
            m_whole = m_store & (i_id != i_before) & (i_id != i_next)
            tl.store(heads + i_b * dim + o_d, b_sum, m_head)
            tl.store(tails + i_b * dim + o_d, b_sum, m_tail)
            tl.store(sums + i_id * dim + o_d, b_sum * b_norm, m_whole)
            b_sum = tl.zeros([BD], tl.float32)
        i_id = i_next


@triton.jit(do_not_specialize=["num_rows"])
def token_q_segment_joins(
    ids,
    norm_weight,
    sums,  # [V, D], as above for the actions whose rows cross blocks
    heads,
    tails,
    num_rows,
    num_ids,
    dim,
    block_rows,
    BD: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    eos = i_b * block_rows + block_rows
    i_id = tl.load(ids + eos - 1, eos <= num_rows, -1)
    i_before = tl.load(ids + eos - block_rows - 1, eos > block_rows, -1)
    num_heads = 0
    while (eos < num_rows) & (tl.load(ids + eos, eos < num_rows, -1) == i_id):
        num_heads += 1
        eos += block_rows
    m_d = (o_d < dim) & (i_id >= 0) & (i_id < num_ids) & (i_id != i_before) & (num_heads > 0)
    b_sum = tl.load(tails + i_b * dim + o_d, m_d, 0.0)  # [BD]
    for i_h in range(0, num_heads):
        b_sum += tl.load(heads + (i_b + 1 + i_h) * dim + o_d, m_d, 0.0)
    if norm_weight is not None:
        b_sum *= tl.load(norm_weight + o_d, m_d, 0.0).to(tl.float32)
    tl.store(sums + i_id * dim + o_d, b_sum, m_d)


def forward(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> Tensor:
    num_rows, dim = hidden.shape
    q = hidden.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(hidden):
            token_q_forward[(triton.cdiv(num_rows, ALONG_ROWS["BT"]),)](
                hidden,
                head,
                targets,
                bias,
                norm_weight,
                q,
                hidden.stride(0),
                head.stride(0),
                num_rows,
                head.shape[0],
                dim,
                norm_eps,
                IGNORE_INDEX,
                **ALONG_ROWS,
            )
    return q


def backward(
    grad_q: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_rows, dim), num_ids = hidden.shape, head.shape[0]
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_head = hidden.new_zeros(head.shape if need_head else 0)
    grad_bias = hidden.new_zeros(num_ids if need_bias else 0)
    grad_norm = hidden.new_zeros(dim if need_norm else 0)
    if num_rows == 0:
        return grad_hidden, grad_head, grad_bias, grad_norm
    with torch.cuda.device_of(hidden):
        factor = torch.empty_like(grad_q)
        token_q_backward_rows[(triton.cdiv(num_rows, ALONG_ROWS["BT"]),)](
            grad_q,
            hidden,
            head,
            targets,
            norm_weight,
            grad_hidden if need_hidden else None,
            factor,
            hidden.stride(0),
            head.stride(0),
            num_rows,
            num_ids,
            dim,
            norm_eps,
            IGNORE_INDEX,
            **ALONG_ROWS,
        )
        if need_norm:
            grad_norm.copy_(_column_sums(hidden, factor, head, targets))
        if targets is None and need_head:
            sums = _column_sums(hidden, factor)
            grad_head.copy_(sums if norm_weight is None else sums * norm_weight)
        if targets is None and need_bias:
            grad_bias.copy_(_column_sums(grad_q[:, None]))
        if targets is not None and (need_head or need_bias):
            ids, order = targets.sort(stable=True)
            if need_head:
                _segment_sums(hidden, factor, order, ids, norm_weight, grad_head)
            if need_bias:
                _segment_sums(grad_q[:, None], None, order, ids, None, grad_bias[:, None])
    return grad_hidden, grad_head, grad_bias, grad_norm


def _column_sums(
    x: Tensor, factor: Tensor | None = None, head: Tensor | None = None, targets: Tensor | None = None
) -> Tensor:
    """[D] float32: the sum of factor_t x_t head[a_t], first within blocks of rows, then over the blocks."""
    for block_rows in BLOCK_ROWS, triton.cdiv(x.shape[0], BLOCK_ROWS):
        num_rows, dim = x.shape
        num_blocks = triton.cdiv(num_rows, block_rows)
        sums = x.new_empty(num_blocks, dim, dtype=torch.float32)
        token_q_column_sums[(num_blocks, triton.cdiv(dim, OVER_ROWS["BD"]))](
            x,
            factor,
            head,
            targets,
            sums,
            x.stride(0),
            0 if head is None else head.stride(0),
            num_rows,
            1 if head is None else head.shape[0],
            dim,
            block_rows,
            IGNORE_INDEX,
            **OVER_ROWS,
        )
        x, factor, head, targets = sums, None, None, None
    return sums[0]


def _segment_sums(
    x: Tensor, factor: Tensor | None, order: Tensor, ids: Tensor, norm_weight: Tensor | None, sums: Tensor
) -> None:
    """Writes norm_weight * sum of factor_t x_t over the rows of each action to that action's row of `sums` [V, D]."""
    num_rows, dim = x.shape
    num_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    heads, tails = x.new_empty(2, num_blocks, dim, dtype=torch.float32)
    grid = num_blocks, triton.cdiv(dim, ROW_BY_ROW["BD"])
    sizes = num_rows, sums.shape[0], dim, BLOCK_ROWS
    token_q_segment_sums[grid](
        x, factor, order, ids, norm_weight, sums, heads, tails, x.stride(0), *sizes, **ROW_BY_ROW
    )
    token_q_segment_joins[grid](ids, norm_weight, sums, heads, tails, *sizes, **ROW_BY_ROW)


_token_q.register_kernel("cuda")(forward)
_token_q_backward.register_kernel("cuda")(backward)
