"""Packed attention: one function in transformers' interface, the backbone that runs on it, the proof that it may."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from ..packing import PackedBatch, pack

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # not installed, not built for this machine, or flash-attn-4, whose package has the same name
    flash_attn_varlen_func = None

# Boundaries and the largest length of the batch that `packed_inputs` has open, for models that do not hand them down.
_running: ContextVar[tuple[Tensor | None, int]] = ContextVar("running", default=(None, 0))


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
    [1, N, Hq, D]. With `sliding_window` W a query sees itself and the W - 1 keys before it; `softcap` c makes a score z
    c tanh(z / c); `s_aux` [Hq] are the scores of attention sinks. 16-bit CUDA tensors go through flash_attn where
    installed, else torch's varlen_attn, unless they need what neither computes; everything else through one call per
    run of equally long sequences, a view of the packed rows. Generation passes `attention_mask` [B, 1, Lq, Lk], where
    neighbouring columns are neighbouring positions, instead of `cu_seq_lens_q`.

    Raises ValueError without either, and for dropout.
    """
    if dropout:
        raise ValueError(f"packed attention has no dropout, expected 0, got {dropout}")
    options: dict[str, Any] = dict(scaling=scaling, softcap=softcap, sinks=s_aux)
    if cu_seq_lens_q is None and attention_mask is None:
        cu_seq_lens_q, max_length_q = _running.get()
    if cu_seq_lens_q is None:
        if attention_mask is None:
            raise ValueError("packed attention needs cu_seq_lens_q (or, to generate, a 4-D mask), got neither")
        num_queries, num_keys = attention_mask.shape[-2:]
        if sliding_window and num_keys > sliding_window:
            attention_mask = attention_mask & _window(num_queries, num_keys, sliding_window, query.device)
        return _attend(query, key, value, attention_mask, **options).transpose(1, 2), None
    window = sliding_window if sliding_window and max_length_q > sliding_window else None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    window_size = (-1 if window is None else window - 1, 0)
    attended: Any
    if not q.is_cuda or q.element_size() > 2 or s_aux is not None or (softcap and flash_attn_varlen_func is None):
        attended = _attend_by_length(q, k, v, cu_seq_lens_q, window, options)
    elif flash_attn_varlen_func is not None:
        attended = flash_attn_varlen_func(
            q, k, v, *bounds, softmax_scale=scaling, causal=True, window_size=window_size, softcap=softcap or 0.0
        )
    else:
        attended = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window_size, enable_gqa=True)
    return attended[None], None


def _attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, options: dict[str, Any]
) -> Tensor:
    """[N, H, D] -> [N, Hq, D]. Neighbours of equal length share one call: pack them sorted to need few."""
    out = []
    bos = 0
    lengths, repeats = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
    for length, repeat in zip(lengths.tolist(), repeats.tolist(), strict=True):
        eos = bos + length * repeat
        rows = [x[bos:eos].unflatten(0, (repeat, length)).transpose(1, 2) for x in (q, k, v)]  # [R, H, L, D]
        mask = _window(length, length, window, q.device) if window and length > window else None
        out.append(_attend(rows[0], rows[1], rows[2], mask, **options).transpose(1, 2).flatten(0, 1))
        bos = eos
    return torch.cat(out)


def _window(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """[Lq, Lk]: whether a query, one of the last columns, sees a key: itself or one of the window - 1 before it."""
    column = torch.arange(num_keys, device=device)
    distance = column[num_keys - num_queries :, None] - column
    return (distance >= 0) & (distance < window)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """[B, Hq, Lq, D]. No mask is the causal one. SDPA, but for the caps and sinks that it does not compute."""
    if not softcap and sinks is None:
        causal = mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * scaling  # [B, Hq, Lq, Lk]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _window(scores.shape[2], scores.shape[3], scores.shape[3], scores.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


AttentionInterface.register("qrm_packed", packed_attention)


@contextmanager
def packed_inputs(batch: PackedBatch) -> Iterator[dict[str, Any]]:
    """What a model is called with over a packed batch, [1, N]; models that hand no boundaries down find them too."""
    cu_seqlens = batch.cu_seqlens.to(torch.int32)
    running = _running.set((cu_seqlens, batch.max_seqlen))
    try:
        yield dict(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
    finally:
        _running.reset(running)


def inside_packed_inputs() -> bool:
    return _running.get()[0] is not None


def packed_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Final-norm hidden states [N, D] of the backbone over a packed batch; the model's own head is never called."""
    with packed_inputs(batch) as inputs:
        return backbone(model)(**inputs).last_hidden_state[0]


def backbone(model: Any) -> PreTrainedModel:
    """The model below the head, adapters in its layers included."""
    plain = without_adapters(model)
    return plain.model if plain.base_model is plain else plain.base_model


def without_adapters(model: Any) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, whose layers carry the adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Rounding by another order of operations is some 1e-6 of a float32 hidden state's norm; a leak or a wrong mask is .1 of
# it and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.no_grad()
def check_packing(model: Any, num_tokens: int) -> None:
    """Raise ValueError unless the model computes of packed sequences what it computes of each alone, in both modes.

    Alone: by transformers' own attention. Up to `num_tokens` per sequence, the longest that will occur, since windows
    and rotary embeddings change with the length.
    """
    plain = without_adapters(model)
    name, training, device = type(plain).__name__, plain.training, plain.device
    generator = torch.Generator().manual_seed(0)
    num_ids = plain.get_input_embeddings().num_embeddings
    lengths = [max(2, num_tokens // 2), max(3, num_tokens), 2]
    sequences = [torch.randint(num_ids, (n,), generator=generator).tolist() for n in lengths]
    try:
        batch = pack(sequences, [1, 1, 1], device=device)
        with of_transformers(name, plain):
            packed = packed_hidden(model.eval(), batch)
            plain.set_attn_implementation("eager" if _needs_eager(plain) else "sdpa")
            alone = [backbone(model)(torch.tensor([row], device=device), use_cache=False) for row in sequences]
            plain.set_attn_implementation("qrm_packed")
            once, again = (packed_hidden(model.train(), batch) for _ in range(2))
        if not packed.isfinite().all():
            raise ValueError(f"the hidden states of {name} must be finite, got NaN or infinity: its weights are broken")
        expected = torch.cat([out.last_hidden_state[0] for out in alone])
        _check_close(packed, expected, f"{name} must compute packed sequences as it does each alone")
        if not torch.equal(once, again):
            raise ValueError(f"{name} must compute the same twice in training mode, got hidden states that differ")
        _check_close(once, packed, f"{name} must compute in training mode what it does in evaluation mode")
    finally:
        plain.set_attn_implementation("qrm_packed")
        model.train(training)


@contextmanager
def of_transformers(name: str, model: PreTrainedModel | None = None) -> Iterator[None]:
    """Say in one sentence what transformers, or code that a checkpoint brings, has against our use of `name`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        own = model is not None and not model._supports_attention_backend
        own |= isinstance(error, KeyError) and error.args == ("qrm_packed",)
        reason = "its code takes no attention but its own" if own else "its code fails"
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name} cannot be trained on packed sequences: {reason} ({said})") from error


def _needs_eager(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return not model._supports_sdpa or bool(getattr(config, "attn_logit_softcapping", None))


def _check_close(got: Tensor, expected: Tensor, what: str) -> None:
    norm = expected.float().norm(dim=-1)
    distance = (got - expected).float().norm(dim=-1) / norm.clamp(min=norm.mean())  # that of a padding token may be 0
    if not distance.max() <= TOLERANCE[got.dtype]:
        raise ValueError(f"{what}, got hidden states that differ by {distance.max():.2g} of their norm")
