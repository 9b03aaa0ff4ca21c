"""Triton kernels of linear_policy_loss: the policy-gradient loss of hidden states and its gradients in three products.

The coefficient of a row's gradient depends on that row's log-probability alone. A block of rows therefore leaves its
logits behind while they are folded in float32: for 16-bit inputs as e^(z - top) in float16, with the top of each row
and block of columns, for float32 inputs as they are. Statistics, target logits and entropy come from the accumulators,
never from what is kept. Then dZ takes their place, in hidden's dtype, and is multiplied into dX and dW before the next
block. 6 T D V FLOP; beside them 2 bytes per logit are written, read, written, and read by both products.
A block has at least 4096 rows where 1.45 GB hold them: each block after the first reads and writes float32 dW.
gspo's coefficient depends on whole sequences, whose ends the host does not know: more rows than one block then take the
four products of linear_logprobs. Block sizes have been compiled, not yet timed on a GPU.
"""

from collections.abc import Callable

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_policy_loss import _forward
from ..ops.policy_loss import _policy_loss
from .linear_logprobs import (
    MERGE,
    _aot,
    fold,
    fold_blocks,
    gradient,
    gradients,
    largest,
    linear_logprobs_fold,
    linear_logprobs_merge,
    per_row,
    row_factors,
    scaled_hidden,
)
from .linear_logprobs import (
    forward as linear_logprobs,
)
from .product import capability, describable, multiply

KEPT_BYTES = 1_450_000_000
HEIGHT = 128  # of the rows over which one program turns logits into dZ
DZ = {"BT": 8, "num_warps": 4}


@triton.jit
def linear_policy_loss_dz(
    kept,  # [T, V]
    tops,  # [blocks of columns, T] or None, as linear_logprobs_fold writes both
    targets,  # [T]
    temperatures,  # [T] or None
    softcap,  # or None
    scale,  # [T]
    at_target,  # [T], as the next two: g, a and e of `gradient`; at_logp None: e is 0
    at_all,
    at_logp,
    lse,  # [T]
    lse_residual,  # [T]
    dz,  # [T, V], dZ / scale, in the place of kept
    bias_sums,  # [blocks of rows, V] or None, sums of dZ over each block
    stride_dz,
    num_rows,
    vocab,
    HEIGHT: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    i_b, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_v = i_c * BV + tl.arange(0, BV)
    b_sum = tl.zeros([BV], tl.float32)
    for i_t in range(0, HEIGHT, BT):
        o_t = i_b * HEIGHT + i_t + tl.arange(0, BT)
        m_t = o_t < num_rows
        m = m_t[:, None] & (o_v < vocab)[None, :]
        o = o_t[:, None] * stride_dz + o_v[None, :]
        b_here = tl.load(targets + o_t, m_t, -1) - i_c * BV
        b_temperature = None
        if temperatures is not None:
            b_temperature = tl.load(temperatures + o_t, m_t, 1.0)
        b_scale = tl.load(scale + o_t, m_t, 0.0)
        b_g = tl.load(at_target + o_t, m_t, 0.0)
        b_a = tl.load(at_all + o_t, m_t, 0.0)
        b_lse = tl.load(lse + o_t, m_t, 0.0)
        b_z = tl.load(kept + o, m, 0.0).to(tl.float32)  # [BT, BV]
        tl.debug_barrier()  # dz overwrites it
        if at_logp is None:
            # -a p + g 1[v = target], p = e^(z - top) e^(top - lse)
            b_top = tl.load(tops + i_c * num_rows + o_t, m_t, 0.0)
            b_d = -b_z * (b_a * tl.exp(b_top - b_lse))[:, None]
            b_d += tl.where(tl.arange(0, BV)[None, :] == b_here[:, None], b_g[:, None], 0.0)
        else:
            if tops is not None:
                b_top = tl.load(tops + i_c * num_rows + o_t, m_t, 0.0)
                b_z = tl.log(tl.where(b_z == 0, 1e-37, b_z)) + b_top[:, None]  # -inf would have no slope
            b_e = tl.load(at_logp + o_t, m_t, 0.0)
            b_residual = tl.load(lse_residual + o_t, m_t, 0.0)
            b_d = gradient(b_z, b_g, b_a, b_e, b_lse, b_residual, b_temperature, softcap, b_here, BV)
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
    if token_weights is None:
        token_weights = keep.float() / keep.sum().clamp(min=1)
    else:
        keep = keep & (token_weights != 0)
    targets = targets.where(keep, ignore_index)
    constants = [advantages, None, old_logprobs, ref_logprobs, token_weights.where(keep, 0)]
    options = (cu_seqlens, kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    temperatures = per_row(temperature, temperatures, targets)

    def loss_of(rows: slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = [None if x is None else x[rows] for x in constants]
        tokens[1] = entropy
        return _policy_loss(logprobs, *tokens, *options)

    height = rows_per_block(num_rows, hidden.shape[1], vocab, hidden.element_size())
    with torch.cuda.device_of(hidden):
        if not any(needs) or num_rows == 0 or (cu_seqlens is not None and height < num_rows):
            head = (hidden, weight, targets, bias, 1.0, temperatures, softcap, ignore_index)
            logprobs, *others = linear_logprobs(*head)
            loss, metrics, *upstream = loss_of(slice(None), logprobs, others[0])
            return loss, metrics, logprobs, others[0], *gradients(torch.float32, *upstream, *head, *others, *needs)
        head = (hidden, weight, targets, bias, temperatures, softcap, ignore_index)
        return in_blocks(height, entropy_coef != 0, loss_of, *head, *needs)


def rows_per_block(num_rows: int, dim: int, vocab: int, item_bytes: int) -> int:
    """All rows, or as many blocks of 128 as KEPT_BYTES hold, a few less where dX then fills its last wave better."""
    most = max(1, KEPT_BYTES // (item_bytes * vocab) // 128)
    if num_rows <= most * 128:
        return num_rows
    columns, programs = triton.cdiv(dim, 256), 132  # of an H100 or H200

    def fullness(blocks: int) -> float:
        return blocks * columns / (triton.cdiv(blocks * columns, programs) * programs)

    return 128 * max(range(triton.cdiv(most * 7, 8), most + 1), key=fullness)


def in_blocks(
    height: int,
    has_bonus: bool,
    loss_of: Callable[[slice, Tensor, Tensor], tuple[Tensor, ...]],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """loss, metrics, logprobs, entropy and the gradients, `height` rows at a time."""
    num_rows, vocab = len(hidden), len(weight)
    narrow = hidden.dtype != torch.float32
    results = [hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(4)]
    dx = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=torch.float32)
    dw = hidden.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    db = hidden.new_zeros(vocab if need_bias else 0, dtype=torch.float32)
    width = fold_blocks(hidden.dtype, capability(hidden), describable(hidden, weight), softcap is not None, kept=True)[
        "BV"
    ]
    dz_rows = hidden.new_empty(height, triton.cdiv(vocab, 8) * 8)
    loss, metrics = None, None
    for row in range(0, num_rows, height):
        rows = slice(row, min(num_rows, row + height))
        x, ids = hidden[rows], targets[rows]
        t = None if temperatures is None else temperatures[rows]
        dz = dz_rows[: len(x), :vocab]
        kept = dz.view(torch.float16) if narrow else dz
        tops = hidden.new_empty(triton.cdiv(vocab, width), len(x), dtype=torch.float32) if narrow else None
        target_logits = hidden.new_empty(len(x), dtype=torch.float32)
        statistics = fold(x, weight, ids, bias, 1.0, t, softcap, target_logits, kept, tops)
        logprobs, entropy, lse, residual = (r[rows] for r in results)
        linear_logprobs_merge[(triton.cdiv(len(x), MERGE["BT"]),)](
            *statistics,
            target_logits,
            ids,
            logprobs,
            entropy,
            lse,
            residual,
            len(x),
            vocab,
            statistics.shape[1],
            ignore_index,
            **MERGE,
        )
        part, sums, g, e = loss_of(rows, logprobs, entropy)
        loss = part if loss is None else loss + part
        metrics = sums if metrics is None else torch.cat([metrics[:-1] + sums[:-1], metrics[-1:].maximum(sums[-1:])])
        scale, at_target, at_all, at_logp = row_factors(g, e, entropy, ids, t, vocab, ignore_index)
        num_blocks = triton.cdiv(len(x), HEIGHT)
        bias_sums = hidden.new_empty(num_blocks, vocab, dtype=torch.float32) if need_bias else None
        plain = narrow and softcap is None and not has_bonus
        linear_policy_loss_dz[(num_blocks, triton.cdiv(vocab, width))](
            kept,
            tops,
            ids,
            t,
            softcap,
            scale,
            at_target,
            at_all,
            None if plain else at_logp,
            lse,
            residual,
            dz,
            bias_sums,
            dz.stride(0),
            len(x),
            vocab,
            HEIGHT,
            BV=width,
            **DZ,
        )
        if need_hidden:
            multiply(dz, weight, dx[rows], scale, added=False, transposed=False)
        if need_weight:
            top = largest(scale)
            multiply(dz, scaled_hidden(x, scale, top), dw, top, added=row > 0, transposed=True)
        if need_bias:
            db += bias_sums.sum(0)
    return loss, metrics, *results[:2], dx, dw, db


_forward.register_kernel("cuda")(forward)


def _aot_dz(dtype: str, width: int, **constants) -> tuple:
    """One configuration as tests/test_build.py compiles it: without a GPU, for every architecture."""
    types = dict.fromkeys(linear_policy_loss_dz.arg_names, "*fp32") | {"targets": "*i64", "softcap": "fp32"}
    types |= {"kept": "*fp32" if dtype == "fp32" else "*fp16", "dz": f"*{dtype}", "stride_dz": "i32:16"}
    types |= dict.fromkeys(("num_rows", "vocab"), "i32")
    constants |= {"HEIGHT": HEIGHT, "BT": DZ["BT"], "BV": width}
    return linear_policy_loss_dz, types, constants, DZ["num_warps"], False


AOT = [
    _aot(linear_logprobs_fold, "bf16", 80, described=False, kept=True),
    _aot(linear_logprobs_fold, "bf16", 90, kept=True),
    _aot(linear_logprobs_fold, "bf16", 100, kept=True),
    _aot_dz("bf16", 256, temperatures=None, softcap=None, at_logp=None, bias_sums=None),
    _aot_dz("bf16", 256),
    _aot_dz("fp32", 64, tops=None),
]
