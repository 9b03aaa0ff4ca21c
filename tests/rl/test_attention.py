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
    spec = importlib.util.spec_from_file_location("qrm_fast.rl.attention_elsewhere", here.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.flash_attn_varlen_func is not None) == (request.param == "flash_attn")
    monkeypatch.setattr(module, "varlen_attn", noting("varlen_attn"))
    monkeypatch.setattr(module, "_attend_by_length", noting("by length"))
    yield module
    AttentionInterface.register("qrm_packed", here.packed_attention)


def attend(attention, dtype, kind, **options):
    query = torch.empty(1, 4, 6, 8, dtype=dtype).as_subclass(kind)
    key, value = (torch.empty(1, 2, 6, 8, dtype=dtype).as_subclass(kind) for _ in range(2))
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    out, _ = attention.packed_attention(
        None, query, key, value, None, scaling=0.5, cu_seq_lens_q=bounds, max_length_q=4, **options
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


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, OnCuda), (torch.bfloat16, torch.Tensor)])
def test_all_else_goes_by_length(attention, calls, dtype, kind):
    attend(attention, dtype, kind)
    assert [name for name, *_ in calls] == ["by length"]
