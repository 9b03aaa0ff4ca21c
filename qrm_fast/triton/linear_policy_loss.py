"""Triton kernels of linear_policy_loss: the policy-gradient loss of hidden states and its gradients in three products.

The coefficient of a row's gradient depends on that row's log-probability alone. A block of rows therefore leaves its
logits behind while they are folded in float32: for 16-bit inputs as e^(z - top) in float16, with the top of each row
and block of columns, for float32 inputs as they are. Statistics, target logits and entropy come from the accumulators,
never from what is kept. One launch then finishes the rows: log-probability, entropy, the terms of policy_loss, their
sums and the row's factors of dZ. Then dZ takes the place of what is kept, in hidden's dtype, and is multiplied into dX
and dW before the next block: six launches a block. 6 T D V FLOP; beside them 2 bytes per logit are written, read,
written, and read by both products. A block has at least 4096 rows where 1.45 GB hold them: each block after the first
reads and writes float32 dW.
gspo's coefficient depends on whole sequences, whose ends the host does not know. Where old log-probabilities are given
(without them every ratio is 1), rows that fit into one block take three launches more, and more rows than that the four
products of linear_logprobs. Block sizes have been compiled, not yet timed on a GPU.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_policy_loss import _forward
from .linear_logprobs import finished_rows, fold, fold_blocks, merge
from .linear_logprobs import forward as linear_logprobs
from .linear_logprobs_backward import gradient, gradients, load_factors, new_factors, scaled_hidden, store_factors
from .logits import MERGE, Head, load_temperature, per_row
from .policy_loss import NUM_SUMS, load_row, policy_terms, sequence_log_ratios, store_sums, to_sum, totals
from .policy_loss import forward as policy_loss
from .product import multiply

KEPT_BYTES = 1_450_000_000
HEIGHT = 128  # of the rows over which one program turns logits into dZ
DZ = {"BT": 8, "num_warps": 4}


class Policy(NamedTuple):
    """What the loss reads beside log-probabilities and entropy."""

    advantages: Tensor  # [T], as the next three
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    token_weights: Tensor  # 0 in ignored rows
    cu_seqlens: Tensor | None
    kind: str
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    def rows(self, rows: slice) -> "Policy":
        return Policy(*(None if x is None else x[rows] for x in self[:4]), *self[4:])


@triton.jit(do_not_specialize=["stride_statistics", "stride_factors", "stride_sums", "num_rows"])
def linear_policy_loss_rows(
    statistics,  # [3, splits, T]
    target_logits,  # [T]
    targets,  # [T]
    temperatures,  # [T] or None
    advantages,  # [T]
    old_logprobs,  # [T] or None
    ref_logprobs,  # [T] or None
    token_weights,  # [T]
    log_ratios,  # [T] for gspo with old_logprobs, else None
    logprobs,  # [T], as the next three written here
    entropy,
    lse,
    lse_residual,
    factors,  # [4, T] and the next one: see store_factors
    tops,  # [programs]
    sums,  # [8, programs of all blocks of rows] float64
    stride_statistics,
    stride_factors,
    stride_sums,
    num_rows,
    vocab,
    num_splits,
    ratio_low,
    ratio_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    KIND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_weight = load_row(token_weights, o_t, m_t)
    m_idle = b_weight == 0
    b_target = tl.load(targets + o_t, m_t, 0)
    b_logp, b_entropy, b_lse, b_residual = finished_rows(
        statistics, target_logits, b_target, m_idle, stride_statistics, num_rows, vocab, num_splits, o_t, m_t
    )
    tl.store(logprobs + o_t, b_logp, m_t)
    tl.store(entropy + o_t, b_entropy, m_t)
    tl.store(lse + o_t, b_lse, m_t)
    tl.store(lse_residual + o_t, b_residual, m_t)

    b_wide = b_logp.to(tl.float64)
    b_old, b_ref = b_wide, None
    if old_logprobs is not None:
        b_old = load_row(old_logprobs, o_t, ~m_idle)
    b_log_ratio = b_wide - b_old
    if log_ratios is not None:
        b_log_ratio = load_row(log_ratios, o_t, ~m_idle)
    if ref_logprobs is not None:
        b_ref = load_row(ref_logprobs, o_t, ~m_idle)
    b_advantage = load_row(advantages, o_t, ~m_idle)
    b_terms, b_slope = policy_terms(
        b_wide, b_old, b_log_ratio, b_ref, b_advantage, ratio_low, ratio_high, dual_clip, kl_coef, KIND, KL_ESTIMATOR
    )
    store_sums(sums, i_b, stride_sums, to_sum(b_terms, b_entropy.to(tl.float64), b_weight, entropy_coef))

    b_g, b_e = (b_weight * b_slope).to(tl.float32), (-entropy_coef * b_weight).to(tl.float32)
    b_temperature = load_temperature(temperatures, o_t, m_t)
    m_inside = (b_target >= 0) & (b_target < vocab)
    m_idle |= (b_g == 0) & (b_e == 0)
    store_factors(factors, tops, i_b, stride_factors, o_t, m_t, b_g, b_e, b_entropy, b_temperature, m_idle, m_inside)


@triton.jit
def log_of_kept(b_e):
    """log e of an exponential in [0, 1] that was kept in float16, whose rounding is 2^-11: within 1e-5, exact at 1.

    log2 of 0 is -127: -inf would have no slope. The library's logarithm takes three times the instructions.
    """
    b_bits = b_e.to(tl.int32, bitcast=True)
    b_x = ((b_bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1  # e = 2^k (1 + x)
    b_y = tl.fma(b_x, 0.046385353, -0.196269622)
    b_y = tl.fma(b_y, b_x, 0.417595773)
    b_y = tl.fma(b_y, b_x, -0.709662819)
    b_y = tl.fma(b_y, b_x, 1.441965616)
    return 0.6931471805599453 * tl.fma(b_y, b_x, ((b_bits >> 23) - 127).to(tl.float32))


@triton.jit(do_not_specialize=["stride_factors", "num_rows"])
def linear_policy_loss_dz(
    kept,  # [T, V]
    tops,  # [blocks of columns, T] or None, as linear_logprobs_fold writes both
    targets,  # [T]
    temperatures,  # [T] or None
    softcap,  # or None
    factors,  # [4, T]
    lse,  # [T]
    lse_residual,  # [T], or None: there is no entropy bonus nor softcap, and a 16-bit dz does not feel it
    dz,  # [T, V], dZ / scale, in the place of kept
    bias_sums,  # [blocks of rows, V] or None, sums of dZ over each block
    stride_factors,
    stride_dz,
    num_rows,
    vocab,
    HEIGHT: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    num_blocks = tl.cdiv(num_rows, HEIGHT)
    i_b, i_c = (tl.program_id(0) % num_blocks).to(tl.int64), (tl.program_id(0) // num_blocks).to(tl.int64)
    o_v = i_c * BV + tl.arange(0, BV)
    b_sum = tl.zeros([BV], tl.float32)
    for i_t in range(0, HEIGHT, BT):
        o_t = i_b * HEIGHT + i_t + tl.arange(0, BT)
        m_t = o_t < num_rows
        m = m_t[:, None] & (o_v < vocab)[None, :]
        o = o_t[:, None] * stride_dz + o_v[None, :]
        b_here = tl.load(targets + o_t, m_t, -1) - i_c * BV
        b_temperature = load_temperature(temperatures, o_t, m_t)
        b_scale, b_g, b_a, b_e = load_factors(factors, stride_factors, o_t, m_t)
        b_lse = tl.load(lse + o_t, m_t, 0.0)
        b_z = tl.load(kept + o, m, 0.0).to(tl.float32)  # [BT, BV]
        tl.debug_barrier()  # dz overwrites it
        if lse_residual is None:
            # -a p + g 1[v = target], p = e^(z - top) e^(top - lse)
            b_top = tl.load(tops + i_c * num_rows + o_t, m_t, 0.0)
            b_d = -b_z * (b_a * tl.exp(b_top - b_lse))[:, None]
            b_d += tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_g[:, None], 0.0)
        else:
            b_residual = tl.load(lse_residual + o_t, m_t, 0.0)
            b_p = None
            if tops is not None:
                b_top = tl.load(tops + i_c * num_rows + o_t, m_t, 0.0)
                b_p = b_z * tl.exp(b_top - b_lse - b_residual)[:, None]
                b_z = log_of_kept(b_z) + b_top[:, None]
            b_d = gradient(b_z, b_p, b_g, b_a, b_e, b_lse, b_residual, b_temperature, softcap, b_here, BV)
        b_d = tl.where((b_scale > 0)[:, None], b_d, 0.0)
        if bias_sums is not None:
            b_sum += tl.sum(tl.where(m, b_d * b_scale[:, None], 0.0), 0)
        tl.store(dz + o, b_d.to(dz.dtype.element_ty), m)
    if bias_sums is not None:
        tl.store(bias_sums + i_b * vocab + o_v, b_sum, o_v < vocab)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    num_rows, vocab = len(targets), len(weight)
    keep = targets != ignore_index
    token_weights = keep.float() / keep.sum().clamp(min=1) if token_weights is None else token_weights.where(keep, 0)
    policy = Policy(
        *(advantages, old_logprobs, ref_logprobs, token_weights, None if old_logprobs is None else cu_seqlens),
        *(kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef),
    )
    height = rows_per_block(num_rows, hidden.shape[1], vocab, hidden.element_size())
    with torch.cuda.device_of(hidden):
        temperatures = per_row(temperature, temperatures, targets)
        head = Head(hidden, weight, targets, bias, temperatures, softcap)
        if any(needs) and num_rows > 0 and (policy.cu_seqlens is None or num_rows <= height):
            return in_blocks(height, head, policy, *needs)
        head = head._replace(targets=targets.where(token_weights != 0, ignore_index))
        logprobs, *results = linear_logprobs(*head[:4], 1.0, temperatures, softcap, ignore_index)
        loss, metrics, *upstream = policy_loss(logprobs, advantages, results[0], *policy[1:])
        grads = gradients(torch.float32, head, ignore_index, upstream, results, *needs)
        return loss, metrics, logprobs, results[0], *grads


def rows_per_block(num_rows: int, dim: int, vocab: int, item_bytes: int) -> int:
    """All rows, or as many blocks of 128 as KEPT_BYTES hold, a few less where dX then fills its last wave better."""
    most = max(1, KEPT_BYTES // (item_bytes * vocab) // 128)
    if num_rows <= most * 128:
        return num_rows
    columns, programs = triton.cdiv(dim, 256), 132  # of an H100 or H200

    def fullness(blocks: int) -> float:
        pairs = triton.cdiv(blocks, 2) * 2  # as Hopper's clusters multiply them
        return blocks * columns / (triton.cdiv(pairs * columns, programs) * programs)

    return 128 * max(range(triton.cdiv(most * 7, 8), most + 1), key=fullness)


def in_blocks(
    height: int, head: Head, policy: Policy, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    """loss, metrics, logprobs, entropy and the gradients, `height` rows at a time."""
    hidden, weight, softcap = head.hidden, head.weight, head.softcap
    num_rows, vocab = len(hidden), len(weight)
    narrow = hidden.dtype != torch.float32
    plain = narrow and softcap is None and policy.entropy_coef == 0
    results = [hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(4)]
    sums = hidden.new_empty(NUM_SUMS, triton.cdiv(num_rows, MERGE["BT"]), dtype=torch.float64)
    dx = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=torch.float32)
    dw = hidden.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    db = hidden.new_zeros(vocab if need_bias else 0, dtype=torch.float32)
    width = fold_blocks(head, kept=True)["BV"]
    dz_rows = hidden.new_empty(height, triton.cdiv(vocab, 8) * 8)
    for row in range(0, num_rows, height):
        rows = slice(row, min(num_rows, row + height))
        part = head.rows(rows)
        dz = dz_rows[: len(part.targets), :vocab]
        kept = dz.view(torch.float16) if narrow else dz
        tops = hidden.new_empty(triton.cdiv(vocab, width), len(dz), dtype=torch.float32) if narrow else None
        finished = [r[rows] for r in results]
        factors, scale_tops = finish_rows(part, policy.rows(rows), kept, tops, finished, sums[:, row // MERGE["BT"] :])
        num_blocks = triton.cdiv(len(dz), HEIGHT)
        bias_sums = hidden.new_empty(num_blocks, vocab, dtype=torch.float32) if need_bias else None
        linear_policy_loss_dz[(num_blocks * triton.cdiv(vocab, width),)](
            kept,
            tops,
            part.targets,
            part.temperatures,
            softcap,
            factors,
            finished[2],
            None if plain else finished[3],
            dz,
            bias_sums,
            factors.stride(0),
            dz.stride(0),
            len(dz),
            vocab,
            HEIGHT,
            BV=width,
            **DZ,
        )
        if need_hidden:
            multiply(dz, weight, dx[rows], factors[0], added=False, transposed=False)
        if need_weight:
            x, top = scaled_hidden(part.hidden, factors[0], scale_tops)
            multiply(dz, x, dw, top, added=row > 0, transposed=True)
        if need_bias:
            db += bias_sums.sum(0)
    return *totals(sums), *results[:2], dx, dw, db


def finish_rows(
    head: Head, policy: Policy, kept: Tensor, tops: Tensor | None, results: list[Tensor], sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Folds the logits of a block of rows, leaving them in `kept`, and writes its rows' `results` and `sums`.

    Returns what store_factors writes.
    """
    num_rows = len(head.targets)
    target_logits = torch.empty_like(results[0])
    statistics = fold(head, target_logits, kept, tops)
    log_ratios = None
    if policy.cu_seqlens is not None:
        logprobs, *_ = merge(statistics, target_logits, head, ignore_index=-1)
        log_ratios = sequence_log_ratios(logprobs, policy.old_logprobs, policy.token_weights, policy.cu_seqlens)
    factors, scale_tops = new_factors(num_rows, target_logits)
    linear_policy_loss_rows[(len(scale_tops),)](
        statistics,
        target_logits,
        head.targets,
        head.temperatures,
        *policy[:4],
        log_ratios,
        *results,
        factors,
        scale_tops,
        sums,
        statistics.stride(0),
        factors.stride(0),
        sums.stride(0),
        num_rows,
        len(head.weight),
        statistics.shape[1],
        1 - policy.clip_low,
        1 + policy.clip_high,
        policy.dual_clip,
        policy.kl_coef,
        policy.entropy_coef,
        policy.kind,
        policy.kl_estimator,
        **MERGE,
    )
    return factors, scale_tops


_forward.register_kernel("cuda")(forward)
