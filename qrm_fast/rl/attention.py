"""Packed attention: one function in transformers' interface, and the backbone that runs on it."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from ..packing import PackedBatch, pack

if find_spec("flash_attn"):
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
else:
    flash_attn_varlen_func = None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, as transformers' attention interface calls it.

    `query`: [1, Hq, N, D], `key`, `value`: [1, Hk, N, D]. `cu_seq_lens_q`: [S+1], shared by keys. Returns
    [1, N, Hq, D]. 16-bit CUDA tensors go through flash_attn where installed, else torch's varlen_attn; everything
    else through one SDPA call per run of equally long sequences, a view of the packed rows, which is exact.
    Generation passes `attention_mask` [B, 1, Lq, Lk] instead of `cu_seq_lens_q`.

    Raises ValueError without either, and for what not every path can compute: dropout, softcap, attention sinks
    (`s_aux`), a sliding window shorter than the longest sequence.
    """
    if dropout or softcap or s_aux is not None or (sliding_window and max_length_q > sliding_window):
        raise ValueError(
            "packed attention computes plain causal attention, expected dropout 0, no softcap, no sinks and no sliding "
            f"window below the longest sequence {max_length_q}, got {dropout}, {softcap}, "
            f"{'no' if s_aux is None else len(s_aux)} sinks and {sliding_window}"
        )
    if cu_seq_lens_q is None:
        if attention_mask is None:
            raise ValueError("packed attention needs cu_seq_lens_q (or, to generate, a 4-D mask), got neither")
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    if not q.is_cuda or q.element_size() > 2:
        return _attention_by_length(q, k, v, cu_seq_lens_q, scaling)[None], None
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    attended: Any
    if flash_attn_varlen_func is not None:
        attended = flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scaling, causal=True)
    else:
        attended = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return attended[None], None


def _attention_by_length(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """[N, H, D] -> [N, Hq, D]. Neighbours of equal length share one call: pack them sorted to need few."""
    out = []
    bos = 0
    lengths, repeats = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
    for length, repeat in zip(lengths.tolist(), repeats.tolist(), strict=True):
        eos = bos + length * repeat
        rows = [x[bos:eos].unflatten(0, (repeat, length)).transpose(1, 2) for x in (q, k, v)]  # [R, H, L, D]
        attended = F.scaled_dot_product_attention(
            rows[0], rows[1], rows[2], is_causal=True, scale=scaling, enable_gqa=True
        )
        out.append(attended.transpose(1, 2).flatten(0, 1))
        bos = eos
    return torch.cat(out)


AttentionInterface.register("qrm_packed", packed_attention)


def packed_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Final-norm hidden states [N, D] of the backbone over a packed batch; the model's own head is never called."""
    cu_seqlens = batch.cu_seqlens.to(torch.int32)
    return (
        without_adapters(model)
        .base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
        .last_hidden_state[0]
    )


def without_adapters(model: Any) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, whose layers carry the adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_no_leak(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless packed sequences are independent and causal in this model, on this device.

    Two sequences of three tokens; changing the first must leave every bit of the second's hidden states, changing
    the second's last token must leave every bit of the rows before it.
    """
    was_training = model.training
    model.eval()

    def hidden(first: list[int], second: list[int]) -> Tensor:
        return packed_hidden(model, pack([first, second], [1, 1], device=model.device))

    before = hidden([1, 2, 3], [4, 5, 6])
    if not torch.equal(before[3:], hidden([7, 8, 9], [4, 5, 6])[3:]):
        raise RuntimeError(
            f"{type(model).__name__} is not independent of the packing: changing one sequence changed its neighbour's "
            "hidden states, by attention that ignores the boundaries or by layers that compute a token by what else "
            "is in the batch, as experts do"
        )
    if not torch.equal(before[:5], hidden([1, 2, 3], [4, 5, 7])[:5]):
        raise RuntimeError("packed attention is not causal: changing a token changed the hidden states before it")
    model.train(was_training)
