"""Triton kernels of linear_q_values: a policy head and a Q head over the same vocabulary, in one sweep of it.

A program multiplies BT rows of both hidden states with one split of both weights, BV columns at a time. The policy's
logits become e^(z - max) in the registers they were accumulated in; the Q head's product then runs beside them, and is
folded against them before either leaves: sums of e, z e, e Q, and of e^(Q / beta). No logit is rounded to 16 bits and
none is written. V is cut into splits from V alone, whose sums are merged in order by a second launch; a row's bits
depend on that row and the weights. 2 T (Dp + Dq) V FLOP, 24 bytes per row and split. On Hopper
csrc/cuda/q_values_fold.cu, where it is compiled, folds 16-bit inputs instead. Block sizes have been compiled, not yet
timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_q_values import _linear_q_values
from .logits import MERGE, SPLIT, load_temperature, logits, per_row, picked, rescale, target_column
from .product import GROUP, blocks, capability, compiled, describable, grouped, operand

COMPILED_SPLIT = 2112  # 11 tiles of csrc/cuda/q_values_fold.cu


@triton.jit(do_not_specialize=["stride_sums", "num_rows"])
def linear_q_values_fold(
    policy_hidden,  # [T, Dp]
    policy_weight,  # [V, Dp]
    q_hidden,  # [T, Dq]
    q_weight,  # [V, Dq]
    targets,  # [T]
    temperatures,  # [T] or None
    sums,  # [6, splits, T]: max z, sums of e, (z - max) e, e Q; max Q / beta, sum of e^(Q / beta - max)
    target_logits,  # [2, T]: z and Q
    stride_policy_hidden,
    stride_policy_weight,
    stride_q_hidden,
    stride_q_weight,
    stride_sums,
    num_rows,
    vocab,
    policy_dim,
    q_dim,
    beta,
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
    b_temperature = load_temperature(temperatures, o_t, m_t)
    policy_rows = (policy_hidden, stride_policy_hidden, num_rows, policy_dim)
    policy_columns = (policy_weight, stride_policy_weight, vocab, policy_dim)
    q_rows, q_columns = (q_hidden, stride_q_hidden, num_rows, q_dim), (q_weight, stride_q_weight, vocab, q_dim)

    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_weighted = tl.zeros([BT], tl.float32)
    b_expected = tl.zeros([BT], tl.float32)
    b_q_max = tl.full([BT], float("-inf"), tl.float32)
    b_q_sum = tl.zeros([BT], tl.float32)
    b_target_z = tl.zeros([BT], tl.float32)
    b_target_q = tl.zeros([BT], tl.float32)
    for i_v in range(i_s * SPLIT, tl.minimum(i_s * SPLIT + SPLIT, vocab), BV):
        b_here = target_column(b_target, i_v, BV)
        b_z = logits(policy_rows, policy_columns, None, None, b_temperature, i_t, i_v, DESCRIBED, BT, BV, BD)
        b_target_z += picked(b_z, b_here, BV)
        b_top = tl.maximum(b_max, tl.max(b_z, 1))
        b_z -= tl.where(b_top == float("-inf"), 0.0, b_top)[:, None]
        b_e = tl.exp2(1.4426950408889634 * b_z)
        b_scale, b_shift = rescale(b_max, b_sum, b_top)
        # where e is 0 the shift may be -inf
        b_weighted = b_scale * (b_weighted + b_shift * b_sum) + tl.sum(b_e * tl.maximum(b_z, -1000.0), 1)
        b_sum = b_scale * b_sum + tl.sum(b_e, 1)
        b_max = b_top

        b_q = logits(q_rows, q_columns, None, None, None, i_t, i_v, DESCRIBED, BT, BV, BD)
        b_target_q += picked(b_q, b_here, BV)
        b_expected = b_scale * b_expected + tl.sum(tl.where(b_e == 0, 0.0, b_e * b_q), 1)
        b_q = b_q / beta
        b_q_top = tl.maximum(b_q_max, tl.max(b_q, 1))
        b_q_scale, _ = rescale(b_q_max, b_q_sum, b_q_top)
        b_q -= tl.where(b_q_top == float("-inf"), 0.0, b_q_top)[:, None]
        b_q_sum = b_q_scale * b_q_sum + tl.sum(tl.exp2(1.4426950408889634 * b_q), 1)
        b_q_max = b_q_top

    p_sums = sums + i_s.to(tl.int64) * num_rows + o_t
    b_sums = (b_max, b_sum, b_weighted, b_expected, b_q_max, b_q_sum)
    for i in tl.static_range(6):
        tl.store(p_sums, b_sums[i], m_t)
        p_sums += stride_sums
    m_split = m_t & (b_target >= i_s * SPLIT) & (b_target < tl.minimum(i_s * SPLIT + SPLIT, vocab))
    tl.store(target_logits + o_t, b_target_z, m_split)
    tl.store(target_logits + num_rows + o_t, b_target_q, m_split)


@triton.jit(do_not_specialize=["stride_sums", "num_rows"])
def linear_q_values_merge(
    sums,  # [6, splits, T]
    target_logits,  # [2, T]
    targets,  # [T]
    results,  # [5, T]: logprobs, entropy, q, expected_q, soft_value
    stride_sums,
    num_rows,
    vocab,
    num_splits,
    beta,
    ignore_index,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_weighted = tl.zeros([BT], tl.float32)
    b_expected = tl.zeros([BT], tl.float32)
    b_q_max = tl.full([BT], float("-inf"), tl.float32)
    b_q_sum = tl.zeros([BT], tl.float32)
    p_split = sums + o_t
    for _ in range(0, num_splits):
        p_sums = p_split
        b_max2 = tl.load(p_sums, m_t, 0.0)
        p_sums += stride_sums
        b_sum2 = tl.load(p_sums, m_t, 0.0)
        p_sums += stride_sums
        b_top = tl.maximum(b_max, b_max2)
        b_scale, b_shift = rescale(b_max, b_sum, b_top)
        b_scale2, b_shift2 = rescale(b_max2, b_sum2, b_top)
        b_weighted2 = tl.load(p_sums, m_t, 0.0)
        p_sums += stride_sums
        b_weighted = b_scale * (b_weighted + b_shift * b_sum) + b_scale2 * (b_weighted2 + b_shift2 * b_sum2)
        b_expected = b_scale * b_expected + b_scale2 * tl.load(p_sums, m_t, 0.0)
        p_sums += stride_sums
        b_sum = b_scale * b_sum + b_scale2 * b_sum2
        b_max = b_top
        b_q_max2 = tl.load(p_sums, m_t, 0.0)
        b_q_sum2 = tl.load(p_sums + stride_sums, m_t, 0.0)
        b_q_top = tl.maximum(b_q_max, b_q_max2)
        b_scale, _ = rescale(b_q_max, b_q_sum, b_q_top)
        b_scale2, _ = rescale(b_q_max2, b_q_sum2, b_q_top)
        b_q_sum = b_scale * b_q_sum + b_scale2 * b_q_sum2
        b_q_max = b_q_top
        p_split += num_rows
    b_target = tl.load(targets + o_t, m_t, 0)
    m_ignored = b_target == ignore_index
    m_inside = (b_target >= 0) & (b_target < vocab)
    b_log_sum = tl.log(b_sum)
    b_logprob = (tl.load(target_logits + o_t, m_t & m_inside, 0.0) - b_max) - b_log_sum
    b_entropy = b_log_sum - b_weighted / b_sum
    outputs = (
        tl.where(b_logprob > 0, 0.0, b_logprob),
        tl.where(b_entropy < 0, 0.0, b_entropy),
        tl.load(target_logits + num_rows + o_t, m_t & m_inside, 0.0),
        b_expected / b_sum,
        beta * (b_q_max + tl.log(b_q_sum)),
    )
    p_results = results + o_t
    for i in tl.static_range(5):
        tl.store(p_results, tl.where(m_ignored, 0.0, tl.where(m_inside, outputs[i], float("nan"))), m_t)
        p_results += num_rows


def forward(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    beta: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    num_rows, vocab = len(targets), len(q_weight)
    tensors = policy_hidden, policy_weight, q_hidden, q_weight
    results = policy_hidden.new_empty(5, num_rows, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(targets):
            target_logits = policy_hidden.new_empty(2, num_rows, dtype=torch.float32)
            sums = fold(tensors, targets, per_row(temperature, temperatures, targets), beta, target_logits)
            linear_q_values_merge[(triton.cdiv(num_rows, MERGE["BT"]),)](
                *(sums, target_logits, targets, results),
                *(sums.stride(0), num_rows, vocab, sums.shape[1], beta, ignore_index),
                **MERGE,
            )
    return tuple(x.clone() for x in results)


def fold(
    tensors: tuple[Tensor, ...], targets: Tensor, temperatures: Tensor | None, beta: float, target_logits: Tensor
) -> Tensor:
    """Sums [6, splits, T] of every split; writes both logits [2, T] of those targets that are columns."""
    policy_hidden, policy_weight, q_hidden, _ = tensors
    (num_rows, policy_dim), vocab = policy_hidden.shape, len(policy_weight)
    in_cuda = compiled(*tensors)
    num_splits = triton.cdiv(vocab, COMPILED_SPLIT if in_cuda else SPLIT)
    sums = policy_hidden.new_empty(6, num_splits, num_rows, dtype=torch.float32)
    if in_cuda:
        torch.ops.qrm_fast.q_values_fold(*tensors, targets, temperatures, beta, sums, target_logits)
        return sums
    described = describable(*tensors)
    launch = launch_of(policy_hidden.dtype, capability(policy_hidden), described)
    linear_q_values_fold[(triton.cdiv(num_rows, launch["BT"]) * num_splits,)](
        *(operand(x, described, launch[("BT", "BV")[i % 2]], launch["BD"]) for i, x in enumerate(tensors)),
        targets,
        temperatures,
        sums,
        target_logits,
        *(x.stride(0) for x in (*tensors, sums)),
        num_rows,
        vocab,
        policy_dim,
        q_hidden.shape[1],
        beta,
        described,
        SPLIT,
        GROUP,
        **launch,
    )
    return sums


def launch_of(dtype: torch.dtype, capability: int, described: bool) -> dict[str, int]:
    """Those of the product, with half the columns, for two blocks share the registers; pointers take theirs too."""
    launch = blocks(dtype, capability, described)
    return {**launch, "BV": launch["BV"] // 2, "BD": min(launch["BD"], 64 if described else 32)}


_linear_q_values.register_kernel("cuda")(forward)
