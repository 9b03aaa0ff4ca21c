"""Packed attention: one function in transformers' interface, the backbone that runs on it, the proof that it may."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from inspect import signature
from itertools import groupby
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

# torch 2.11 has no such option, and takes fewer heads of keys without it.
_FEWER_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

# What `packed_inputs` says of the batch that it has open, for models that do not hand it down.
_running: ContextVar[dict[str, Any] | None] = ContextVar("running", default=None)


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
    cu_seq_lens_k: Tensor | None = None,
    key_rows: Tensor | None = None,
    max_length_k: int = 0,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, as transformers' attention interface calls it.

    `query`: [1, Hq, N, D], `key`, `value`: [1, Hk, N, D]. `cu_seq_lens_q`, `cu_seq_lens_k`: [S+1], rows of queries and
    of keys of each sequence; `key_rows`: [M], which rows these keys are where prompts are shared, and the queries are
    a sequence's last rows. Returns [1, N, Hq, D]. With `sliding_window` W a query sees itself and the W - 1 keys before
    it; `softcap` c makes a score z c tanh(z / c); `s_aux` [Hq] are the scores of attention sinks. 16-bit CUDA tensors
    go through flash_attn where installed, else torch's varlen_attn, unless they need what neither computes; everything
    else through one call per run of equally long sequences. Generation passes `attention_mask` [B, 1, Lq, Lk], where
    neighbouring columns are neighbouring positions, instead of `cu_seq_lens_q`.

    Raises ValueError without either, and for dropout.
    """
    if dropout:
        raise ValueError(f"packed attention has no dropout, expected 0, got {dropout}")
    options: dict[str, Any] = dict(scaling=scaling, softcap=softcap, sinks=s_aux)
    if cu_seq_lens_q is None and attention_mask is None:
        batch = _running.get() or {}
        cu_seq_lens_q, cu_seq_lens_k = batch.get("cu_seq_lens_q"), batch.get("cu_seq_lens_k")
        key_rows, max_length_k = batch.get("key_rows"), batch.get("max_length_k", 0)
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        if attention_mask is None:
            raise ValueError("packed attention needs cu_seq_lens_q and _k (or, to generate, a 4-D mask), got neither")
        num_queries, num_keys = attention_mask.shape[-2:]
        if sliding_window and num_keys > sliding_window:
            attention_mask = attention_mask & _window(num_queries, num_keys, sliding_window, query.device)
        return _attend(query, key, value, attention_mask, **options).transpose(1, 2), None
    window = sliding_window if sliding_window and max_length_k > sliding_window else None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    attended: Any
    if not q.is_cuda or q.element_size() > 2 or s_aux is not None or (softcap and flash_attn_varlen_func is None):
        attended = _attend_by_length(q, k, v, cu_seq_lens_q, cu_seq_lens_k, window, options)
        return attended[None], None
    if key_rows is not None:
        k, v = k[key_rows], v[key_rows]  # [M, H, D]; the gradient of a shared row adds up in a fixed order
    # Both kernels align the last query with the last key, so the queries may be fewer.
    bounds = (cu_seq_lens_q, cu_seq_lens_k, max_length_k, max_length_k)
    window_size = (-1 if window is None else window - 1, 0)
    if flash_attn_varlen_func is not None:
        attended = flash_attn_varlen_func(
            q, k, v, *bounds, softmax_scale=scaling, causal=True, window_size=window_size, softcap=softcap or 0.0
        )
    else:
        attended = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window_size, **_FEWER_KEYS)
    return attended[None], None


def _attend_by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    """[N, H, D] -> [N, Hq, D]. Neighbours of equal length share one call: pack them sorted to need few.

    A sequence with more keys than queries begins with the first keys of the last one before it that has as many.
    """
    own, whole = cu_seq_lens_q.diff().tolist(), cu_seq_lens_k.diff().tolist()
    runs = [(length, num_keys, len(list(run))) for (length, num_keys), run in groupby(zip(own, whole, strict=True))]
    # one split and one cat, whose gradients are one of the other; a slice's would be as large as all rows
    rows = zip(*(x.split([length * repeat for length, _, repeat in runs]) for x in (q, k, v)), strict=True)
    out, first = [], (k, v)  # whose beginning the sequences that follow share
    for (length, num_keys, repeat), pieces in zip(runs, rows, strict=True):
        queries, keys, values = (x.unflatten(0, (repeat, length)).transpose(1, 2) for x in pieces)  # [R, H, L, D]
        if num_keys == length:
            first = keys[-1:], values[-1:]
        else:
            shared = (x[:, :, : num_keys - length].expand(repeat, -1, -1, -1) for x in first)
            keys, values = (torch.cat(pair, 2) for pair in zip(shared, (keys, values), strict=True))
        masked = num_keys > length or (window and length > window)
        mask = _window(length, num_keys, window or num_keys, q.device) if masked else None
        out.append(_attend(queries, keys, values, mask, **options).transpose(1, 2).flatten(0, 1))
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
        if q.shape[2] == 1 and not causal and q.shape[1] > 2 * k.shape[1]:
            # a query of every head: those that share keys read them once, which for two of them is no faster
            together = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, Hk, Hq / Hk, D]
            attended = F.scaled_dot_product_attention(together, k, v, attn_mask=mask, scale=scaling)
            return attended.reshape(*q.shape[:3], -1)
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
    attention = dict(
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens if batch.whole_cu_seqlens is None else batch.whole_cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        key_rows=batch.whole_rows,
    )
    with _open(attention):
        yield dict(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            **attention,
        )


@contextmanager
def _open(attention: dict[str, Any] | None) -> Iterator[None]:
    running = _running.set(attention)
    try:
        yield
    finally:
        _running.reset(running)


def reopened() -> AbstractContextManager[None]:
    """The batch that `packed_inputs` has open now, for what is computed again when it is closed."""
    return _open(_running.get())


def inside_packed_inputs() -> bool:
    return _running.get() is not None


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


@torch.no_grad()
def shares_prompts(model: Any, num_tokens: int) -> bool:
    """Whether the model computes of answers that share a prompt what it computes of each with a prompt of its own.

    Up to `num_tokens` in each sequence. Where it does not, a warning says so. `check_packing` comes first.
    """
    plain = without_adapters(model)
    device, training = plain.device, plain.training
    generator = torch.Generator().manual_seed(2)
    num_ids = plain.get_input_embeddings().num_embeddings
    sequences, prompt_lens = [], []
    for prompt_len in (max(2, num_tokens // 2), 2):
        prompt = torch.randint(num_ids, (prompt_len,), generator=generator).tolist()
        for num_new in (1, num_tokens - prompt_len, max(1, num_tokens // 4)):
            sequences.append(prompt + torch.randint(num_ids, (max(0, num_new),), generator=generator).tolist())
            prompt_lens.append(prompt_len)
    model.eval()
    try:
        apart, together = (pack(sequences, prompt_lens, share_prompts=x, device=device) for x in (False, True))
        expected, got = (packed_hidden(model, batch)[batch.action_index] for batch in (apart, together))
        _check_close(got, expected, "answers must be the same with their prompt shared")
    except Exception as error:  # also of its own code, which need not take more keys than queries
        said = " ".join(str(error).split())
        warnings.warn(f"{type(plain).__name__} reads the prompt of every answer anew: {said}", stacklevel=2)
        return False
    finally:
        model.train(training)
    return True


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
