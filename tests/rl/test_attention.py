"""Which kernel serves packed attention: flash_attn where it is installed. Shown by stand-ins for it and for CUDA."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from transformers import AttentionInterface

from qrm_fast.rl import attention as here


class OnCuda(torch.Tensor):
    """A tensor of this CPU that says it is not."""

    is_cuda = True


@pytest.fixture
def calls():
    """(kernel, its arguments) of every call of a kernel."""
    return []


@pytest.fixture(params=[True, False], ids=["flash_attn", "no flash_attn"])
def attention(request, monkeypatch, calls):
    """The module as an installation with or without flash_attn imports it, its kernels replaced by ones that note."""

    def noting(name):
        return lambda query, *rest, **options: calls.append((name, query, rest, options)) or query.clone()

    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__ = ModuleSpec("flash_attn", None)
    stand_in.flash_attn_varlen_func = noting("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in if request.param else None)
    spec = importlib.util.spec_from_file_location("qrm_fast.rl.attention_elsewhere", here.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.flash_attn_varlen_func is stand_in.flash_attn_varlen_func) == request.param
    monkeypatch.setattr(module, "varlen_attn", noting("varlen_attn"))
    monkeypatch.setattr(module, "_attention_by_length", noting("by length"))
    yield module
    AttentionInterface.register("qrm_packed", here.packed_attention)


def attend(attention, dtype, kind):
    query = torch.empty(1, 4, 6, 8, dtype=dtype).as_subclass(kind)
    key, value = (torch.empty(1, 2, 6, 8, dtype=dtype).as_subclass(kind) for _ in range(2))
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    out, _ = attention.packed_attention(
        None, query, key, value, None, scaling=0.5, cu_seq_lens_q=bounds, max_length_q=4
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
        assert name == "flash_attn" and options == {"softmax_scale": 0.5, "causal": True}


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, OnCuda), (torch.bfloat16, torch.Tensor)])
def test_all_else_goes_by_length(attention, calls, dtype, kind):
    attend(attention, dtype, kind)
    assert [name for name, *_ in calls] == ["by length"]
