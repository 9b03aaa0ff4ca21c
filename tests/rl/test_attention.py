"""Which kernel serves packed attention: flash_attn where it is installed. Shown by stand-ins for it and for CUDA."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from transformers import AttentionInterface

from qrm_fast import pack
from qrm_fast.rl import attention as here


class OnCuda(torch.Tensor):
    """A tensor of this CPU that says it is not."""

    is_cuda = True


@pytest.fixture
def calls():
    """(kernel, its arguments) of every call of a kernel."""
    return []


@pytest.fixture(params=["flash_attn", "none", "namesake", "built for no GPU"])
def attention(request, monkeypatch, calls):
    """The module as an installation imports it, its kernels replaced by ones that note.

    flash-attn-4 is a package of the same name without these functions; flash_attn built without CUDA fails to import.
    """

    def noting(name):
        return lambda query, *rest, **options: calls.append((name, query, rest, options)) or query.clone()

    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__ = ModuleSpec("flash_attn", None)
    if request.param == "flash_attn":
        stand_in.flash_attn_varlen_func = noting("flash_attn")
    if request.param == "built for no GPU":
        stand_in.__getattr__ = lambda name: exec("import flash_attn_2_cuda")
    monkeypatch.setitem(sys.modules, "flash_attn", None if request.param == "none" else stand_in)
    module = imported_anew()
    assert (module.flash_attn_varlen_func is not None) == (request.param == "flash_attn")
    monkeypatch.setattr(module, "varlen_attn", noting("varlen_attn"))
    monkeypatch.setattr(module, "_attend_by_length", noting("by length"))
    yield module
    AttentionInterface.register("qrm_packed", here.packed_attention)


def imported_anew():
    spec = importlib.util.spec_from_file_location("qrm_fast.rl.attention_elsewhere", here.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_varlen_attn_of_torch_2_11_has_no_option_for_fewer_heads_of_keys(monkeypatch):
    def older(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return query.clone()

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    attend(imported_anew(), torch.bfloat16, OnCuda)
    AttentionInterface.register("qrm_packed", here.packed_attention)


def attend(attention, dtype, kind, **options):
    query = torch.empty(1, 4, 6, 8, dtype=dtype).as_subclass(kind)
    key, value = (torch.empty(1, 2, 6, 8, dtype=dtype).as_subclass(kind) for _ in range(2))
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    out, _ = attention.packed_attention(
        None,
        query,
        key,
        value,
        None,
        scaling=0.5,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_k=4,
        **options,
    )
    assert out.shape == (1, 6, 4, 8)
    return bounds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_on_cuda_go_through_flash_attn_where_it_is_installed(attention, calls, dtype):
    bounds = attend(attention, dtype, OnCuda)
    ((name, query, (key, value, *rest), options),) = calls
    assert query.shape == (6, 4, 8) and key.shape == value.shape == (6, 2, 8)
    assert rest[0] is bounds and rest[1] is bounds and rest[2:] == [4, 4]
    if attention.flash_attn_varlen_func is None:
        assert name == "varlen_attn"
        assert options == {"scale": 0.5, "window_size": (-1, 0), "enable_gqa": True}
    else:
        assert name == "flash_attn" and options.pop("softcap") == 0.0
        assert options == {"softmax_scale": 0.5, "causal": True, "window_size": (-1, 0)}


@pytest.mark.parametrize(
    ("option", "flash", "other"),
    [
        (dict(sliding_window=3), dict(window_size=(2, 0), softcap=0.0), dict(window_size=(2, 0))),
        (dict(sliding_window=4), dict(window_size=(-1, 0), softcap=0.0), dict(window_size=(-1, 0))),
        (dict(softcap=30.0), dict(window_size=(-1, 0), softcap=30.0), None),
        (dict(s_aux=torch.zeros(4)), None, None),
    ],
)
def test_what_a_kernel_does_not_compute_goes_by_length(attention, calls, option, flash, other):
    attend(attention, torch.bfloat16, OnCuda, **option)
    ((name, *_, options),) = calls
    expected = other if attention.flash_attn_varlen_func is None else flash
    if expected is None:
        assert name == "by length"
    else:
        assert name != "by length" and options.items() >= expected.items()


def varlen(query, key, value, cu_q, cu_k, max_q, max_k, **options):
    """What both kernels say that they compute: the last query and the last key of a sequence are one position."""
    left, right = options["window_size"]
    scale = options.get("scale") or options["softmax_scale"]
    assert right == 0 and max(cu_k.diff()) <= max_k and max(cu_q.diff()) <= max_q
    out = torch.empty_like(query)
    for s in range(len(cu_q) - 1):
        q, k, v = query[cu_q[s] : cu_q[s + 1]], key[cu_k[s] : cu_k[s + 1]], value[cu_k[s] : cu_k[s + 1]]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[cu_q[s] : cu_q[s + 1]] = torch.einsum("hqk,khd->qhd", probabilities, v.float()).to(out.dtype)
    return out


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_kernels_that_take_fewer_queries_than_keys_share_prompts(attention, monkeypatch, sliding_window):
    """By a kernel's contract, written out, and by this CPU's way: the same numbers of the same rows."""
    prompt = [5, 6, 7, 8, 9]
    answers = [[*prompt, 1, 2], prompt, [*prompt, 3, 4, 3], [2, 1, 1], [2, 1, 4, 4]]
    batch = pack(answers, [5, 5, 5, 2, 2], share_prompts=True)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, n, len(batch.input_ids), 8, generator=generator).bfloat16() for n in (4, 2, 2)]
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    if attention.flash_attn_varlen_func is not None:
        monkeypatch.setattr(attention, "flash_attn_varlen_func", varlen)
    options = dict(
        scaling=0.5,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.whole_cu_seqlens,
        key_rows=batch.whole_rows,
        max_length_k=batch.max_seqlen,
        sliding_window=sliding_window,
    )
    on_cuda, _ = attention.packed_attention(None, *(x.as_subclass(OnCuda) for x in rows), None, **options)
    here_, _ = here.packed_attention(None, *(x.float() for x in rows), None, **options)
    torch.testing.assert_close(on_cuda.as_subclass(torch.Tensor).float(), here_, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, OnCuda), (torch.bfloat16, torch.Tensor)])
def test_all_else_goes_by_length(attention, calls, dtype, kind):
    attend(attention, dtype, kind)
    assert [name for name, *_ in calls] == ["by length"]


@pytest.mark.parametrize("num_keys_of", [1, 2, 4, 8])
def test_decoding_reads_the_keys_of_several_heads_as_each_alone(num_keys_of):
    """One query of 8 heads a row, with 3 columns in front that a row does not see, against a softmax by hand."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(5, heads, n, 4, generator=generator) for heads, n in ((8, 1), (num_keys_of, 9), (num_keys_of, 9))
    )
    seen = (torch.arange(9) >= torch.tensor([0, 3, 0, 1, 8])[:, None])[:, None, None]
    got, _ = here.packed_attention(torch.nn.Identity(), q, k, v, seen, scaling=0.7)
    keys, values = (x.repeat_interleave(8 // num_keys_of, 1) for x in (k, v))
    weights = (0.7 * q @ keys.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(got, (weights @ values).transpose(1, 2))
