"""whiten: against exact sums, the masked_whiten of the trainers, and the promises of every op.

That a process group sees one batch is shown in test_moments.py.
"""

import math

import pytest
import torch
from accuracy import assert_as_accurate

from qrm_fast import whiten
from qrm_fast.ops.whiten import _whiten

LENGTHS = [0, 1, 2, 33, 1024, 1025, 20000]


def oracle(x, mask=None, center=True, unbiased=False, eps=1e-8):
    kept = x.double().tolist() if mask is None else x[mask].double().tolist()
    n = max(len(kept), 1)
    mean = math.fsum(kept) / n
    variance = math.fsum((v - mean) ** 2 for v in kept) / max(n - unbiased, 1)
    out = (x.double() - mean * center) / math.sqrt(variance + eps) if variance else torch.zeros_like(x).double()
    return out if mask is None else out.where(mask, 0.0)


def float32_path(x, mask=None, center=True, unbiased=False, eps=1e-8):
    """What one would write with PyTorch's own operators, in the dtype of the result."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    kept = x if mask is None else x[mask]
    if len(kept) < 2:
        return torch.zeros_like(x)
    y = (x - kept.mean() * center) * torch.rsqrt(kept.var(correction=int(unbiased)) + eps)
    return y if mask is None else y.where(mask, 0.0)


def inputs(num_tokens, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, generator=g).mul(3).add(10).to(dtype)
    return x.to(device), (torch.rand(num_tokens, generator=g) < 0.6).to(device)


def test_hand_computed():
    x = torch.tensor([1.0, 5.0, 99.0, 3.0])
    mask = torch.tensor([True, True, False, True])
    # mean 3, variance 8/3, or 4 unbiased
    assert whiten(x, mask=mask, unbiased=True, eps=0.0).tolist() == [-1, 1, 0, 0]
    assert whiten(x, mask=mask, unbiased=True, eps=0.0, center=False).tolist() == [0.5, 2.5, 0, 1.5]
    root = math.sqrt(8 / 3)
    torch.testing.assert_close(whiten(x, mask=mask), torch.tensor([-2 / root, 2 / root, 0, 0]))
    torch.testing.assert_close(whiten(x, mask=mask, eps=12 + 8 / 3), torch.tensor([-2, 2, 0, 0]) / math.sqrt(52 / 3))


@pytest.mark.parametrize("center", [False, True], ids=["scaled", "centred"])
@pytest.mark.parametrize("unbiased", [False, True], ids=["population", "unbiased"])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_agrees_with_the_definition(num_tokens, unbiased, center, device):
    x, mask = inputs(num_tokens, device=device)
    for options in {}, {"mask": mask}:
        options |= {"center": center, "unbiased": unbiased}
        exact, peer = oracle(x, **options), float32_path(x, **options)
        assert_as_accurate(whiten(x, **options), exact, peer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    x, mask = inputs(3000, dtype)
    result = whiten(x, mask=mask)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_accurate(result, oracle(x, mask), float32_path(x, mask))


def test_masked_rows_are_never_read(device):
    x, mask = inputs(5000, device=device)
    clean, *poisoned = (whiten(x.where(mask, poison), mask=mask) for poison in (0.0, math.nan, math.inf))
    assert not clean[~mask].any() and all(torch.equal(clean, p) for p in poisoned)


def test_nothing_to_scale(device):
    for dtype in [torch.float32] + [torch.float64] * (device == "cpu"):
        assert not whiten(torch.full((5000,), 0.1, dtype=dtype, device=device), center=False).any()
    one = torch.tensor([2.0], device=device)
    assert whiten(one, unbiased=True) == 0 and whiten(one, mask=one < 0) == 0


def test_rows_that_are_not_finite_stay_alone(device):
    x, _ = inputs(100, device=device)
    x[7], x[50] = math.nan, math.inf
    finite = x.isfinite()
    result = whiten(x)
    assert torch.equal(result.isfinite(), finite)
    assert torch.equal(result[finite], whiten(x, mask=finite)[finite])


@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_threads():
    x, mask = inputs(200_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in 1, 2, 2:
            torch.set_num_threads(num_threads)
            results.append(whiten(x, mask=mask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_offset_slices():
    x, mask = inputs(33)
    wide, wide_mask = torch.full((50,), math.nan), torch.ones(50, dtype=torch.bool)
    wide[5:38], wide_mask[5:38] = x, mask
    assert torch.equal(whiten(wide[5:38], mask=wide_mask[5:38]), whiten(x, mask=mask))


def test_not_differentiable():
    with pytest.raises(RuntimeError, match="is not differentiable"):
        whiten(torch.ones(3, requires_grad=True)).sum().backward()


def test_opcheck():
    stats = torch.tensor([[9.0, 0.5, 3.0]], dtype=torch.float64)
    torch.library.opcheck(_whiten.op, (inputs(9)[0], stats, None, True, False, 1e-8))
    x, mask = inputs(9, torch.bfloat16)
    torch.library.opcheck(_whiten.op, (x, stats, mask, False, True, 1e-8))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(whiten, fullgraph=True, dynamic=True)
    for num_tokens in 8, 2500, 2:
        x, mask = inputs(num_tokens)
        assert torch.equal(compiled(x, mask=mask, unbiased=True), whiten(x, mask=mask, unbiased=True))


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"x must be \[T\] .* got \[1, 3\] float32", {"x": torch.zeros(1, 3)}),
        (TypeError, r"x must be \[T\] .* got \[3\] int64", {"x": torch.tensor([1, 2, 3])}),
        (ValueError, "x must be dense in its last dimension, got stride 2", {"x": torch.zeros(6)[::2]}),
        (TypeError, r"mask must be \[T\] bool, got \[3\] int64", {"mask": torch.tensor([1, 0, 1])}),
        (ValueError, r"mask must be \[T\] bool with T = 3, got \[2\] bool", {"mask": torch.tensor([True, False])}),
        (ValueError, "eps must be >= 0, got -1.0", {"eps": -1.0}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        whiten(**{"x": torch.zeros(3)} | options)
