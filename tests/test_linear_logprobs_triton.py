"""The Triton kernels of linear_logprobs, through their launchers: on a GPU, or in the interpreter.

The op itself is tested in test_linear_logprobs.py; its oracle and problems are used here. Interpreted blocks are those
of a Hopper GPU, for 16-bit inputs 128 rows by 256 columns, 128 columns with a softcap, by 64 of the depth.
"""

import math

import pytest
import torch
from test_linear_logprobs import OPTIONS, assert_no_further, make, naive

import qrm_fast
from qrm_fast.triton import linear_logprobs as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # rows past the last, non-finite rows
]

# Rows, depth and vocabulary around the blocks; an odd depth cannot be described to the copy engine.
SHAPES = [(5, 8, 1), (2, 3, 2), (63, 20, 17), (1, 64, 127), (2, 33, 1000), (0, 16, 1100), (3, 72, 1280), (63, 17, 2176)]
CASES = {
    "float32": (torch.float32, OPTIONS["plain"]),
    "float32-everything": (torch.float32, OPTIONS["everything"]),
    "bfloat16": (torch.bfloat16, OPTIONS["temperature"]),
    "bfloat16-everything": (torch.bfloat16, OPTIONS["everything"]),
    "float16": (torch.float16, OPTIONS["plain"]),
}


@pytest.fixture
def forward(triton_device):
    """logprobs, entropy, lse and the residual of lse, by the launcher."""

    def call(hidden, weight, bias, targets, temperature=1.0, softcap=None):
        per_row = isinstance(temperature, torch.Tensor)
        number, rows = (1.0, temperature.to(triton_device)) if per_row else (temperature, None)
        hidden, weight, targets = (x.to(triton_device) for x in (hidden, weight, targets))
        bias = bias if bias is None else bias.to(triton_device)
        return [x.cpu() for x in kernels.forward(hidden, weight, targets, bias, number, rows, softcap, -100)]

    return call


def in_dtype(dtype, tensors, rest):
    """The arguments of one problem with everything floating in `dtype`."""
    arguments = tensors | rest
    floating = [k for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return arguments | {k: arguments[k].to(dtype) for k in floating}


@pytest.mark.parametrize(("dtype", "options"), CASES.values(), ids=CASES)
def test_as_accurate_as_pytorch_in_float32(forward, dtype, options):
    """Over all shapes, for a few rows are a matter of luck. And within 2e-5; logprobs <= 0, entropy >= 0."""
    runs = []
    for shape in SHAPES:
        tensors, rest = make(*shape, dtype, **options)
        exact = naive(**in_dtype(torch.float64, tensors, rest))
        peer = naive(**in_dtype(torch.float32, tensors, rest))
        ours = forward(**tensors, **rest)
        assert (ours[0] <= 0).all() and (ours[1] >= 0).all()
        assert ((ours[2].double() + ours[3]) - exact[2]).abs().le(2e-5).all()
        runs.append(list(zip(ours, exact, peer, strict=False)))
    for field in zip(*runs, strict=True):
        ours, exact, peer = map(torch.cat, zip(*field, strict=True))
        assert ours.dtype == torch.float32
        assert_no_further(ours, exact, peer)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5)


def test_large_logits_and_masked_vocabulary(forward):
    """One logit 90 above the others; a block of nothing but -inf; a -inf target."""
    bias = torch.full((700,), -math.inf)
    bias[:200] = -100 + torch.rand(200)
    bias[7] += 90
    targets = torch.tensor([7, 8, 300])
    logprobs, entropy, _, _ = forward(torch.zeros(3, 8), torch.zeros(700, 8), bias, targets)
    exact = bias.double().log_softmax(-1)[targets]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-30)
    assert torch.isfinite(entropy).all()


def test_non_finite_rows_and_wild_targets_stay_alone(forward):
    """NaN in every field of such a row, 0 in an ignored one; no other row changes by a bit."""
    tensors, _ = make(9, 16, 300, torch.bfloat16, bias=True)
    targets = torch.tensor([3, 99, 299, 0, -100, 2, 3, 4, 5])
    clean = forward(**tensors, targets=targets)
    tensors["hidden"][0], tensors["hidden"][6], tensors["hidden"][4] = math.nan, math.inf, math.nan
    targets[[3, 7, 8]] = torch.tensor([300, -1, 2**40])
    dirty = forward(**tensors, targets=targets)
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x[[1, 2, 4, 5]], y[[1, 2, 4, 5]]) and y[4] == 0
        assert y[[0, 3, 6, 7, 8]].isnan().all()


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("dtype", "dim", "vocab"),
    [(torch.float32, 20, 130), (torch.bfloat16, 40, 2100), (torch.bfloat16, 41, 300)],
    ids=str,
)
def test_bits_of_a_row_do_not_depend_on_the_batch(forward, dtype, dim, vocab):
    tensors, rest = make(130, dim, vocab, dtype, bias=True, temperature=True)
    everything = forward(**tensors, **rest)
    for index in [torch.randperm(130), torch.tensor([129]), torch.arange(3, 66)]:
        part = tensors | {"hidden": tensors["hidden"][index]}
        got = forward(**part, targets=rest["targets"][index], temperature=rest["temperature"][index])
        for x, y in zip(everything, got, strict=True):
            assert torch.equal(x[index], y)


@pytest.mark.parametrize("stride", [16, 19])
def test_strided_rows_are_read_in_place(forward, stride):
    """Also where the stride forbids the copy engine, whose sums are the same."""
    tensors, rest = make(20, 16, 300, torch.bfloat16)
    wide = torch.full((40, stride), math.nan, dtype=torch.bfloat16)
    wide[::2, :16] = tensors["hidden"]
    strided = forward(**tensors | {"hidden": wide[::2, :16]}, **rest)
    for x, y in zip(forward(**tensors, **rest), strided, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "dim", "vocab"), [(300, 1000, 152064), (65537, 64, 32800)])
def test_at_the_size_of_models(num_rows, dim, vocab):
    """The vocabulary of Qwen2.5, and more than 2^31 logits: the last rows and columns are where offsets would wrap."""
    hidden = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16) / dim**0.5
    targets = torch.arange(vocab - num_rows, vocab, device="cuda").clamp(min=0)
    ours = qrm_fast.linear_logprobs(hidden, weight, targets)
    sample = torch.cat([torch.arange(100), torch.arange(num_rows - 100, num_rows)]).cuda()
    exact = naive(hidden[sample].double(), weight.double(), None, targets[sample], 1.0, None)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x[sample].double(), y, rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_public_function_on_cuda_runs_these_kernels(forward):
    """Eager, compiled and captured in a graph: the bits of the launcher, without waiting for the GPU."""
    tensors, rest = make(300, 72, 1000, torch.bfloat16, bias=True, temperature=True)
    want = forward(**tensors, **rest)
    arguments = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in (tensors | rest).items()}
    functions = [qrm_fast.linear_logprobs, torch.compile(qrm_fast.linear_logprobs, fullgraph=True, dynamic=True)]
    for function in functions:
        function(**arguments)
        torch.cuda.set_sync_debug_mode("error")
        got = function(**arguments)
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want, strict=False))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = qrm_fast.linear_logprobs(**arguments)
    graph.replay()
    assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want, strict=False))
