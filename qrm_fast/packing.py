"""Packing: token lists and padded tensors to packed rows and back.

There are two layouts: one row per model token, and one row per action. `pack` builds both; every op of this package
takes the action layout.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _host  # type: ignore[attr-defined]
from .ops.checks import BOOL, FLOATS, INTS, Checker
from .ops.dtypes import acc_dtype
from .ops.segments import check_boundaries


class PackedBatch(NamedTuple):
    """S sequences of prompt and response: N model tokens, T response tokens ("actions").

    Model layout, one row per token. `targets[i]` is the token that row i predicts, `input_ids[i + 1]`, and -100 on the
    last row of each sequence; `action_mask[i]` says whether that token belongs to the response.

    Action layout, one row per response token. `action_index[t]` is the model row that *predicts* action t: a policy
    head or a critic reads `hidden[action_index]`. The state that has *consumed* the action is the row after it: a
    scalar Q-head reads `hidden[action_index + 1]`. `targets[action_index]` are the actions.

    Where prompts are shared, the rows of a sequence may begin with the *last* token of its prompt: those before it are
    rows of the first of its neighbours with that prompt. Whole, it is rows `whole_rows[a:b]` from a, b =
    `whole_cu_seqlens[s : s + 2]`. What is said above stays true: the row that predicts an answer's first action is its
    own.
    """

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, from 0 in each sequence, or from where its own rows begin
    cu_seqlens: Tensor  # [S+1] int32, rows of each sequence in the model layout
    targets: Tensor  # [N] int64
    action_mask: Tensor  # [N] bool
    action_index: Tensor  # [T] int64, ascending
    action_cu_seqlens: Tensor  # [S+1] int32, rows of each sequence in the action layout
    seq_ids: Tensor  # [T] int64, the sequence of each action
    max_seqlen: int  # tokens of the longest sequence, its prompt included
    whole_rows: Tensor | None = None  # [M] int64, M tokens of all sequences; None where no row is shared
    whole_cu_seqlens: Tensor | None = None  # [S+1] int32, the same


def pack(
    sequences: list[list[int]],
    prompt_lens: list[int],
    *,
    share_prompts: bool = False,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Token lists to one packed batch in both layouts.

    `sequences`: S lists of token ids, prompt and response together (end-of-sequence token included). `prompt_lens`: S
    ints; the first `prompt_lens[s]` tokens of sequence s are its prompt, the rest are its actions. An empty response
    is legal, and so is an empty batch. With `share_prompts` neighbours with equal prompts of P tokens share the rows of
    the first P - 1: of G answers (P - 1) (G - 1) rows fewer. The attention has to know: `qrm_fast.rl.attention`. The
    copies to a CUDA device are asynchronous.

    Raises ValueError unless 1 <= prompt_lens[s] <= len(sequences[s]), every id is >= 0 and the sequences have fewer
    than 2^31 tokens; TypeError for anything that is not a list (or tuple) of ints. The message names the sequence.
    """
    device = torch.device(device)
    fields = _host.pack(sequences, prompt_lens, share_prompts)

    def moved(array: object) -> Tensor:
        x = torch.from_numpy(array)
        # from pinned memory the copies queue behind the device's work instead of waiting for it
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    return PackedBatch._make(x if x is None or isinstance(x, int) else moved(x) for x in fields)


def unpack(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Packed rows to one tensor per sequence.

    `x`: [T, ...] any dtype. `cu_seqlens`: [S+1] int32 or int64. Returns S views of x, [len_s, ...]: gradients flow.
    Reads cu_seqlens on the host, which waits for the device on CUDA.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and ValueError where cu_seqlens do not start at
    0, decrease, or do not end at T.
    """
    _check_rows(x, cu_seqlens)
    return list(x.split(_lengths(cu_seqlens, x.shape[0])))


def from_padded(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Padded tensors to packed rows: the positions where the mask is True, in order, sequence after sequence.

    `mask`: [B, L] bool, or integers of which 0 is False, as TRL and verl carry them; padding may be on either side, and
    the mask may have holes. `tensors`: any number of [B, L, ...], any dtype. Returns (cu_seqlens [B+1] int32, then each
    tensor's rows [T, ...]). Gradients flow.
    Counts the mask on the host, which waits for the device on CUDA and breaks a compiled graph.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and ValueError for 2^31 positions or more.
    """
    check = Checker()
    check("mask", mask, "B L", (*BOOL, *INTS), strided=True)
    if mask.numel() >= 2**31:
        raise ValueError(f"mask must have fewer than 2^31 positions, cu_seqlens being int32, got {mask.numel()}")
    mask = mask != 0
    for i, x in enumerate(tensors):
        name = f"tensors[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [B, L, ...], got {type(x).__name__}")
        if x.shape[:2] != mask.shape:
            raise ValueError(f"{name} must be [B, L, ...] with [B, L] = {list(mask.shape)}, got {list(x.shape)}")
        if x.device != mask.device:
            raise ValueError(f"{name} must be on {mask.device} like mask, got {x.device}")
    rows, columns = mask.nonzero(as_tuple=True)
    ends = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends]), *(x[rows, columns] for x in tensors)


def to_padded(
    x: Tensor, cu_seqlens: Tensor, width: int, *, side: Literal["left", "right"] = "right", fill: float = 0
) -> Tensor:
    """Packed rows to one padded row of positions per sequence, the inverse of `from_padded`.

    `x`: [T, ...] any dtype. `cu_seqlens`: [S+1] int32 or int64. `width`: positions per sequence, at least the longest
    sequence. `side`: where the padding goes. `fill`: its value, one that x's dtype can hold. Returns
    [S, width, ...] in x's dtype. Gradients flow. Reads nothing on the host when x is on CUDA.

    Raises TypeError or ValueError for a wrong dtype, shape, device or side, and, on CPU, ValueError where cu_seqlens
    do not start at 0, decrease, or do not end at T, and for a sequence longer than width. On CUDA and in a compiled
    graph such a sequence fails PyTorch's own index check.
    """
    _check_rows(x, cu_seqlens)
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    _check_boundaries(cu_seqlens, x.shape[0], width)
    lengths, num_sequences = cu_seqlens.diff(), len(cu_seqlens) - 1
    sequence = torch.arange(num_sequences, device=x.device).repeat_interleave(lengths, output_size=x.shape[0])  # [T]
    column = torch.arange(x.shape[0], device=x.device) - cu_seqlens[sequence]  # [T]
    if side == "left":
        column = column + width - lengths[sequence]
        # A negative index would wrap around; this one fails.
        column = torch.where(column < 0, width, column)
    return x.new_full((num_sequences, width, *x.shape[1:]), fill).index_put((sequence, column), x)


def per_token(x: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The value of each sequence on each of its rows: out[t] = x[s] for cu_seqlens[s] <= t < cu_seqlens[s+1].

    `x`: [S] any dtype. `cu_seqlens`: [S+1] int32 or int64. `num_tokens`: T, an argument because reading it from
    cu_seqlens would wait for the device. Returns [T] in x's dtype. Differentiable: the gradient of x[s] is the sum
    over its rows, in a fixed order, accumulated in float32 (float64 for float64).

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError where cu_seqlens do not
    start at 0, decrease, or do not end at num_tokens.
    """
    check = Checker()
    check("x", x, "S", (*FLOATS, *INTS, *BOOL))
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    _check_boundaries(cu_seqlens, num_tokens)
    return _PerToken.apply(x, cu_seqlens.diff(), num_tokens)


def plan_microbatches(
    lengths: list[int], *, max_tokens: int, num_ranks: int = 1, cost: Literal["linear", "attention"] = "linear"
) -> list[list[list[int]]]:
    """Micro-batches of at most `max_tokens` tokens, equally many on every rank: `plan[rank][micro-batch]` = sequences.

    `lengths`: S ints, the tokens of each sequence. Every sequence is planned once, by its index; inside a micro-batch
    the indices ascend. Where there are fewer sequences than micro-batches the last ones of a rank are []. No sequences
    give no micro-batches. Every rank computes the same plan.

    Their number is small first: never more than best-fit decreasing needs (11/9 of the fewest, asymptotically). Ranks
    wait for each other at each micro-batch, so the plan then lowers the sum over micro-batches of the dearest one on
    any rank, and after it the dearest of all. Neither is ever above longest-first greedy's (LPT) where its bins keep
    to the budget. `cost` of a sequence of n tokens: "linear" n; "attention" n (24576 + n), in proportion to the
    24 D^2 n + 2 D n^2 FLOP of a dense decoder layer of width D = 2048 with causal attention.

    Raises ValueError for a sequence over the budget, naming it, and for a max_tokens outside [1, 2^31), a num_ranks
    below 1 or an unknown cost; TypeError where the lengths are not a list (or tuple) of ints.
    """
    if not 1 <= max_tokens < 2**31:
        raise ValueError(f"max_tokens must be in [1, 2^31), the range of int32 cu_seqlens, got {max_tokens}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    if cost not in ("linear", "attention"):
        raise ValueError(f"cost must be 'linear' or 'attention', got {cost!r}")
    return _host.plan_microbatches(lengths, max_tokens, num_ranks, cost == "attention")


class _PerToken(torch.autograd.Function):
    """repeat_interleave, whose own backward adds with float atomics on CUDA."""

    @staticmethod
    def forward(ctx, x: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(lengths)
        return x.repeat_interleave(lengths, output_size=num_tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (lengths,) = ctx.saved_tensors
        acc = acc_dtype(grad.dtype)
        return torch.segment_reduce(grad.to(acc), "sum", lengths=lengths, unsafe=True).to(grad.dtype), None, None


def _check_rows(x: Tensor, cu_seqlens: Tensor) -> None:
    check = Checker()
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [T, ...], got {type(x).__name__}")
    if x.ndim == 0:
        raise ValueError("x must be [T, ...], got a 0-d tensor")
    if x.device != check.device:
        raise ValueError(f"x must be on {check.device} like cu_seqlens, got {x.device}")


def _check_boundaries(cu_seqlens: Tensor, num_rows: int, width: int | None = None) -> None:
    """Check the boundaries where reading them costs no wait: in host memory, outside a compiled graph."""
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        for s, length in enumerate(_lengths(cu_seqlens, num_rows)):
            if width is not None and length > width:
                raise ValueError(f"sequence {s} has {length} rows, more than the width, {width}")


def _lengths(cu_seqlens: Tensor, num_rows: int) -> list[int]:
    cu_seqlens = cu_seqlens.cpu()
    check_boundaries(cu_seqlens, num_rows)
    return cu_seqlens.diff().tolist()
