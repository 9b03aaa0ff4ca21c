"""Triton kernels of policy_loss: the policy-gradient loss of packed rows, its metrics and gradients in one pass.

Reads every [T] input once and writes the two gradients, 32 bytes per token in fp32 with every input given; nothing else
of length T exists. A program takes blocks of rows at a stride and keeps eight sums per lane until its last block is
done; a second launch adds the programs' in their order: no atomics, the same bits every time. Rows are loaded before it
is known which of them count, so that all loads of a block are in flight at once. gspo first takes a program per
sequence for the mean of its log-ratios, 16 bytes more per token. Terms are in float64 and rounded once: exp(d) - 1 - d
then keeps more digits than expm1 does in float32. `policy_terms`, `to_sum` and `store_sums` serve linear_policy_loss
too. Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.policy_loss import SAPO_TEMPERATURE_BELOW as TEMPERATURE_BELOW
from ..ops.policy_loss import PolicyMetrics, _policy_loss, scaled_derivative

NUM_SUMS = 1 + len(PolicyMetrics._fields)  # loss and metrics; the last is a maximum
ROWS = {"BT": 256, "num_warps": 4, "maxnreg": 128}  # without the bound, ptxas spills on sm_80 to fit in more programs
PROGRAMS = 1024  # some eight per SM; a constant, for the loss must not depend on how many SMs there are
SEQUENCE = {"BT": 512, "num_warps": 2}
SUM = {"BT": 1024, "num_warps": 4}
SCALED = {"BT": 4096, "num_warps": 4}
SAPO_TEMPERATURE_BELOW = tl.constexpr(TEMPERATURE_BELOW)


@triton.jit
def bounded(b_x):
    """A log-ratio as the exponentials take it: beyond +-20 it counts as 20; NaN stays."""
    return tl.where(b_x > 20.0, 20.0, tl.where(b_x < -20.0, -20.0, b_x))


@triton.jit
def exp_of_bounded(b_x):
    """e^x for |x| <= 700: 2^k (1 + r + r^2 q(r)) at r = x - k log 2, |r| < 0.35, q the best polynomial of degree 6.

    Relative errors are below 1e-11, that of e^x - 1 - x below 1e-10. No case of overflow to look for, as in the
    library's. tl.fma would round its constants to float32.
    """
    b_magic = b_x * 1.4426950408889634 + 6755399441055744.0  # its lowest bits are k
    b_r = (b_magic - 6755399441055744.0) * -0.6931471805599453 + b_x
    b_y = b_r * 2.4859589834589056e-05 + 0.00019899285575896282
    b_y = b_y * b_r + 0.001388885403566671
    b_y = b_y * b_r + 0.00833329846980059
    b_y = b_y * b_r + 0.04166666671901226
    b_y = b_y * b_r + 0.16666666719028936
    b_y = b_y * b_r + 0.5
    b_y = b_y * b_r + 1.0
    b_y = b_y * b_r + 1.0
    b_exponent = b_magic.to(tl.int64, bitcast=True) << 52
    return (b_y.to(tl.int64, bitcast=True) + b_exponent).to(tl.float64, bitcast=True)


@triton.jit
def policy_terms(
    b_logp,
    b_old,
    b_log_ratio,  # of the loss's ratio: logp - old, or gspo's mean of it over the sequence
    b_ref,  # or None
    b_advantage,
    ratio_low,
    ratio_high,
    dual_clip,
    kl_coef,
    KIND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
):
    """Float64 terms of rows: loss and the metrics but entropy, in the order of the sums; d loss / d logp.

    Clipped low and clipped high are masks. Comparisons are such that a NaN reaches both loss and derivative.
    """
    m_still = (b_log_ratio < -20.0) | (b_log_ratio > 20.0)
    b_ratio = exp_of_bounded(bounded(b_log_ratio))
    m_below, m_above = b_ratio < ratio_low, b_ratio > ratio_high
    if KIND == "ppo" or KIND == "gspo":
        # max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0, at most -A dual_clip. Of gspo's s exp(logp - sg logp)
        # value and slope are s.
        b_slope = -b_advantage * b_ratio
        b_clipped = -b_advantage * tl.where(m_below, ratio_low, tl.where(m_above, ratio_high, b_ratio))
        b_loss = tl.where(b_slope < b_clipped, b_clipped, b_slope)
        m_bounded = (b_advantage < 0) & (b_loss > -b_advantage * dual_clip)
        b_slope = tl.where((b_slope < b_clipped) | m_bounded | m_still, 0.0, b_slope)
        b_loss = tl.where(m_bounded, -b_advantage * dual_clip, b_loss)
    elif KIND == "sapo":
        # -A (4 / tau) sigmoid(tau (r - 1)), with the slope -4 A sigmoid(x) sigmoid(-x) r
        m_negative = b_advantage < 0
        b_x = tl.where(m_negative, SAPO_TEMPERATURE_BELOW * (1 - b_ratio), 1 - b_ratio)
        b_e = exp_of_bounded(tl.where(b_x < -700.0, -700.0, b_x))
        b_gate = 1 / (1 + b_e)
        b_loss = -4 * b_advantage * b_gate
        b_slope = tl.where(m_still, 0.0, b_loss * (b_e * b_gate) * b_ratio)
        b_loss = tl.where(m_negative, b_loss * (1 / SAPO_TEMPERATURE_BELOW), b_loss)
    else:
        # -scale A logp with cispo's scale clip(r, 1 - low, 1 + high), which has no gradient of its own
        b_slope = -b_advantage
        if KIND == "cispo":
            b_slope *= tl.where(m_below, ratio_low, tl.where(m_above, ratio_high, b_ratio))
        b_loss = b_slope * b_logp
    b_own = bounded(b_logp - b_old)
    b_approx_kl = exp_of_bounded(b_own) - 1 - b_own
    b_ref_kl = tl.zeros_like(b_logp)
    if b_ref is not None:
        b_d = b_logp - b_ref
        if KL_ESTIMATOR == "k1":
            b_ref_kl = b_d
            b_kl_slope = tl.full(b_d.shape, 1.0, tl.float64)
        elif KL_ESTIMATOR == "k2":
            b_ref_kl = b_d * b_d / 2
            b_kl_slope = b_d
        else:
            b_kl_slope = 1 - exp_of_bounded(-bounded(b_d))  # above 20 it is 1 in float32 all the same
            b_ref_kl = b_d - b_kl_slope
            if KL_ESTIMATOR == "unbiased":
                b_own_ratio = exp_of_bounded(b_own)
                b_ref_kl *= b_own_ratio
                b_kl_slope = b_own_ratio * b_d
        b_loss += kl_coef * tl.where(kl_coef != 0, b_ref_kl, 0.0)
        b_slope += kl_coef * tl.where(kl_coef != 0, b_kl_slope, 0.0)
    m_low, m_high = m_below & (b_advantage < 0), m_above & (b_advantage > 0)
    return (b_loss, m_low, m_high, b_approx_kl, b_ref_kl, b_ratio), b_slope


@triton.jit
def largest(b_x):
    """NaN where one is among them."""
    return tl.where(tl.max((b_x != b_x).to(tl.int32), 0) > 0, float("nan"), tl.max(b_x, 0))


@triton.jit
def to_sum(b_terms, b_entropy, b_weight, entropy_coef):
    """What rows add to the eight sums, the last of which is a maximum; terms of rows of weight 0 are finite."""
    b_loss, m_low, m_high, b_approx_kl, b_ref_kl, b_ratio = b_terms
    b_loss -= entropy_coef * tl.where(entropy_coef != 0, b_entropy, 0.0)
    b_largest = tl.where(b_weight != 0, b_ratio.to(tl.float32), 0.0)
    return (
        b_weight * b_loss,
        tl.where(m_low, b_weight, 0.0),
        tl.where(m_high, b_weight, 0.0),
        b_weight * b_approx_kl,
        b_weight * b_ref_kl,
        b_weight * b_ratio,
        b_weight * b_entropy,
        b_largest,
    )


@triton.jit
def store_sums(sums, i_b, num_blocks, b_sums):
    for i in tl.static_range(7):
        tl.store(sums + i * num_blocks + i_b, tl.sum(b_sums[i], 0))
    tl.store(sums + 7 * num_blocks + i_b, largest(b_sums[7]))


@triton.jit
def load_row(x, o_t, m_t):
    return tl.load(x + o_t, m_t, 0.0).to(tl.float64)


@triton.jit
def load_counted(x, o_t, m_t, m_counted):
    """0 in rows that do not count, whatever is there."""
    return tl.where(m_counted, tl.load(x + o_t, m_t), 0.0).to(tl.float64)


@triton.jit
def joined_sums(b_sums, b_more):
    a, b, c, d, e, f, g, b_top = b_sums
    b_top = tl.maximum(b_top, b_more[7], propagate_nan=tl.PropagateNan.ALL)
    return (
        a + b_more[0],
        b + b_more[1],
        c + b_more[2],
        d + b_more[3],
        e + b_more[4],
        f + b_more[5],
        g + b_more[6],
        b_top,
    )


@triton.jit
def policy_loss_rows(
    logprobs,  # [T]
    advantages,  # [T]
    entropy,  # [T] or None
    old_logprobs,  # [T] or None: logprobs
    ref_logprobs,  # [T] or None
    token_weights,  # [T] or None: mean_weight
    log_ratios,  # [T] for gspo, else None
    dlogprobs,  # [T]
    dentropy,  # [T] or None
    sums,  # [8, programs] float64
    num_rows,
    mean_weight,
    ratio_low,
    ratio_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    KIND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BT: tl.constexpr,
):
    i_p, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    b_zero = tl.zeros([BT], tl.float64)
    b_sums = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, tl.zeros([BT], tl.float32)
    for i_t in range(i_p * BT, num_rows, num_programs * BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < num_rows
        b_weight = tl.where(m_t, mean_weight, 0.0).to(tl.float64)
        if token_weights is not None:
            b_weight = load_row(token_weights, o_t, m_t)
        m_counted = b_weight != 0
        b_logp = load_counted(logprobs, o_t, m_t, m_counted)
        b_old = b_logp
        if old_logprobs is not None:
            b_old = load_counted(old_logprobs, o_t, m_t, m_counted)
        b_log_ratio = b_logp - b_old
        if log_ratios is not None:
            b_log_ratio = load_counted(log_ratios, o_t, m_t, m_counted)
        b_ref = None
        if ref_logprobs is not None:
            b_ref = load_counted(ref_logprobs, o_t, m_t, m_counted)
        b_advantage = load_counted(advantages, o_t, m_t, m_counted)
        b_entropy = tl.zeros_like(b_logp)
        if entropy is not None:
            b_entropy = load_counted(entropy, o_t, m_t, m_counted)
        b_terms, b_slope = policy_terms(
            b_logp,
            b_old,
            b_log_ratio,
            b_ref,
            b_advantage,
            ratio_low,
            ratio_high,
            dual_clip,
            kl_coef,
            KIND,
            KL_ESTIMATOR,
        )
        tl.store(dlogprobs + o_t, (b_weight * b_slope).to(tl.float32), m_t)
        if dentropy is not None:
            tl.store(dentropy + o_t, (-entropy_coef * b_weight).to(tl.float32), m_t)
        b_sums = joined_sums(b_sums, to_sum(b_terms, b_entropy, b_weight, entropy_coef))
    store_sums(sums, i_p, num_programs, b_sums)


@triton.jit(do_not_specialize=["num_rows"])
def policy_loss_log_ratios(
    logprobs,  # [T]
    old_logprobs,  # [T]
    token_weights,  # [T] or None
    cu_seqlens,  # [S+1]
    log_ratios,  # [T]: the mean of logp - old over those rows of a sequence that count, in each of its rows
    num_rows,
    BT: tl.constexpr,
):
    # Boundaries that a CPU kernel would refuse must not be read beyond the tensors.
    p_bos = cu_seqlens + tl.program_id(0)
    bos, eos = tl.maximum(tl.load(p_bos).to(tl.int64), 0), tl.minimum(tl.load(p_bos + 1).to(tl.int64), num_rows)
    b_sum = tl.zeros([BT], tl.float64)
    b_count = tl.zeros([BT], tl.float64)
    for i_t in range(bos, eos, BT):
        o_t = i_t + tl.arange(0, BT)
        m_counted = o_t < eos
        if token_weights is not None:
            m_counted = m_counted & (tl.load(token_weights + o_t, m_counted, 0.0) != 0)
        b_sum += load_row(logprobs, o_t, m_counted) - load_row(old_logprobs, o_t, m_counted)
        b_count += tl.where(m_counted, 1.0, 0.0)
    mean = tl.sum(b_sum, 0) / tl.maximum(tl.sum(b_count, 0), 1.0)
    for i_t in range(bos, eos, BT):
        o_t = i_t + tl.arange(0, BT)
        tl.store(log_ratios + o_t, tl.full([BT], 0.0, tl.float32) + mean.to(tl.float32), o_t < eos)


@triton.jit(do_not_specialize=["num_blocks"])
def policy_loss_sum(
    sums,  # [8, num_blocks] float64
    loss,  # []
    metrics,  # [7]
    num_blocks,
    BT: tl.constexpr,
):
    i_m = tl.program_id(0)
    b_sum = tl.zeros([BT], tl.float64)
    b_top = tl.zeros([BT], tl.float64)
    for i_b in range(0, num_blocks, BT):
        o_b = i_b + tl.arange(0, BT)
        b_here = tl.load(sums + i_m * num_blocks + o_b, o_b < num_blocks, 0.0)
        b_sum += b_here
        b_top = tl.where((b_here > b_top) | (b_here != b_here), b_here, b_top)
    total = tl.where(i_m == 7, largest(b_top), tl.sum(b_sum, 0)).to(tl.float32)
    if i_m == 0:
        tl.store(loss, total)
    else:
        tl.store(metrics + i_m - 1, total)


@triton.jit
def scale_derivative(
    grad_loss,  # []
    derivative,  # [numel]
    grad,  # [numel]
    numel,
    BT: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m = o < numel
    tl.store(grad + o, (tl.load(grad_loss) * tl.load(derivative + o, m)).to(grad.dtype.element_ty), m)


def forward(
    logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = len(logprobs)
    num_programs = min(triton.cdiv(num_rows, ROWS["BT"]), PROGRAMS)
    dlogprobs = torch.empty_like(advantages)
    dentropy = advantages.new_empty(0 if entropy is None else num_rows)
    sums = advantages.new_empty(NUM_SUMS, num_programs, dtype=torch.float64)
    with torch.cuda.device_of(logprobs):
        log_ratios = sequence_log_ratios(logprobs, old_logprobs, token_weights, cu_seqlens)
        if num_rows:
            policy_loss_rows[(num_programs,)](
                logprobs,
                advantages,
                entropy,
                old_logprobs,
                ref_logprobs,
                token_weights,
                log_ratios,
                dlogprobs,
                None if entropy is None else dentropy,
                sums,
                num_rows,
                1 / num_rows,
                1 - clip_low,
                1 + clip_high,
                dual_clip,
                kl_coef,
                entropy_coef,
                kind,
                kl_estimator,
                **ROWS,
            )
        return *totals(sums), dlogprobs, dentropy


def sequence_log_ratios(
    logprobs: Tensor, old_logprobs: Tensor | None, token_weights: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """gspo's log s [T], NaN in a row of no sequence; None where the ratio is the row's own or, on-policy, 1."""
    if cu_seqlens is None or old_logprobs is None:
        return None
    log_ratios = torch.full_like(logprobs, torch.nan, dtype=torch.float32)
    if len(cu_seqlens) > 1:
        policy_loss_log_ratios[(len(cu_seqlens) - 1,)](
            logprobs, old_logprobs, token_weights, cu_seqlens, log_ratios, len(logprobs), **SEQUENCE
        )
    return log_ratios


def totals(sums: Tensor) -> tuple[Tensor, Tensor]:
    """loss and metrics from the sums [8, programs]."""
    loss = sums.new_empty((), dtype=torch.float32)
    metrics = sums.new_empty(NUM_SUMS - 1, dtype=torch.float32)
    policy_loss_sum[(NUM_SUMS,)](sums, loss, metrics, sums.shape[1], **SUM)
    return loss, metrics


def scaled(grad_loss: Tensor, derivative: Tensor, x: Tensor) -> Tensor:
    grad, numel = x.new_empty(x.shape), x.numel()
    if numel:
        with torch.cuda.device_of(x):
            scale_derivative[(triton.cdiv(numel, SCALED["BT"]),)](grad_loss, derivative, grad, numel, **SCALED)
    return grad


_policy_loss.register_kernel("cuda")(forward)
scaled_derivative.register_kernel("cuda")(scaled)
