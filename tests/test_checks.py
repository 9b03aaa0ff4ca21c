"""The checks of the public functions: each sentence with what was expected and what came."""

import re

import pytest
import torch
from torch.autograd import forward_ad

import qrm_fast
from qrm_fast.ops.checks import BOOL, FLOATS, INT64, INTS, Checker

T4 = torch.zeros(4)


def refuses(error: type, sentence: str):
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


@pytest.mark.parametrize(
    ("x", "shape", "dtypes", "error", "sentence"),
    [
        (1.5, "T", FLOATS, TypeError, "x must be a tensor [T], got float"),
        (None, "T D", FLOATS, TypeError, "x must be a tensor [T, D], got NoneType"),
        (T4.int(), "T", INT64, TypeError, "x must be [T] int64, got [4] int32"),
        (T4, "T", INTS, TypeError, "x must be [T] int32 or int64, got [4] float32"),
        (T4.long(), "T", BOOL, TypeError, "x must be [T] bool, got [4] int64"),
        (T4, "T D", (torch.float32,), ValueError, "x must be [T, D] float32, got [4] float32"),
        (T4, "3", (torch.float32,), ValueError, "x must be [3] float32, got [4] float32"),
        (T4[:0], "S+1", (torch.float32,), ValueError, "x must have S+1 entries for some S >= 0, got [0] float32"),
        (T4, "2P+1", (torch.float32,), ValueError, "x must have 2P+1 entries for some P >= 0, got [4] float32"),
        (T4[::2], "T", FLOATS, ValueError, "x must be dense in its last dimension, got stride 2"),
        (T4.expand(2, 4), "T D", FLOATS, ValueError, "x must be contiguous, got strides [0, 1]"),
        (T4.to("meta").double(), "T", FLOATS, None, None),
    ],
)
def test_one_tensor(x, shape, dtypes, error, sentence):
    check = Checker()
    if error is None:
        check("x", x, shape, dtypes)
    else:
        with refuses(error, sentence):
            check("x", x, shape, dtypes)


def test_dimensions_bind_once_and_hold():
    check = Checker()
    check("x", torch.zeros(6, 3), "T D", FLOATS)
    check("cu_seqlens", torch.zeros(5, dtype=torch.int32), "2P+1", INTS)
    check("margin", torch.zeros(2), "P", FLOATS)
    check("boundaries", T4, "S+1", FLOATS)
    assert check.dims == {"T": 6, "D": 3, "P": 2, "S": 3}
    with refuses(ValueError, "mask must be [T] bool with T = 6, got [5] bool"):
        check("mask", torch.zeros(5, dtype=torch.bool), "T", BOOL)
    with refuses(ValueError, "margin must be [2P+1] float32 with 2P+1 = 5, got [4] float32"):
        check("margin", T4, "2P+1", (torch.float32,))


def test_the_first_tensor_fixes_the_device():
    check = Checker()
    check("x", T4, "T", FLOATS)
    with refuses(ValueError, "y must be on cpu like the other arguments, got meta"):
        check("y", T4.to("meta"), "T", FLOATS)


def test_rows_may_be_strided_where_the_op_says_so():
    wide = torch.zeros(4, 6)
    Checker()("x", wide[:, :3], "T D", FLOATS, strided=True)
    Checker()("x", wide[::2], "T D", FLOATS, strided=True)
    with refuses(ValueError, "x must be contiguous, got strides [6, 1]"):
        Checker()("x", wide[:, :3], "T D", FLOATS)
    with refuses(ValueError, "x must be dense in its last dimension, got stride 2"):
        Checker()("x", wide[:, ::2], "T D", FLOATS, strided=True)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 3), (3, 1)])
def test_sizes_zero_and_one_are_dense(shape):
    Checker()("x", torch.zeros(shape), "T D", FLOATS)


def test_one_column_is_dense_whatever_its_stride():
    Checker()("x", torch.zeros(4, 6)[:, ::6], "T D", FLOATS, strided=True)


@pytest.mark.gpu
def test_float64_is_refused_on_cuda():
    with refuses(TypeError, "x must not be float64 on CUDA: the kernels accumulate in float32 there"):
        Checker()("x", T4.double().cuda(), "T", FLOATS)


TANGENTS = {
    "linear_logprobs": lambda x: (
        qrm_fast.linear_logprobs(x, torch.ones(9, 4), torch.zeros(4, dtype=torch.int64)).logprobs
    ),
    "policy_loss": lambda x: qrm_fast.policy_loss(x[:, 0].contiguous(), torch.ones(4)).loss,
    "gae": lambda x: qrm_fast.gae(x[:, 0].contiguous(), torch.zeros(4), torch.tensor([0, 4])).advantages,
    "whiten": lambda x: qrm_fast.whiten(x[:, 0].contiguous()),
}


@pytest.mark.parametrize("name", TANGENTS)
def test_forward_mode_is_refused_where_it_would_be_dropped(name):
    x = torch.randn(4, 4)
    with pytest.raises(NotImplementedError, match="must have no forward-mode tangent, which would be dropped"):
        torch.func.jvp(TANGENTS[name], (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        TANGENTS[name](x)
        with pytest.raises(NotImplementedError, match="must have no forward-mode tangent"):
            TANGENTS[name](forward_ad.make_dual(x, torch.ones_like(x)))
