"""value_loss against plain autograd in float64, a table worked by hand, and its promises about bits and masks."""

import math

import pytest
import torch
from accuracy import assert_no_further
from cuda_graph import replayed
from grids import NUM_ROWS

from qrm_fast import value_loss
from qrm_fast.ops.policy_loss import scaled_derivative
from qrm_fast.ops.value_loss import _value_loss
from qrm_fast.triton import value_loss as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [*NUM_ROWS, 9000, 65537]  # 9000 rows are three blocks of the kernel
OPTIONS = {
    "plain": dict(clipped=False, weighted=False),
    "weights": dict(clipped=False, weighted=True),
    "clip": dict(clipped=True, weighted=False),
    "clip-weights": dict(clipped=True, weighted=True),
}


def problem(num_tokens, dtype, *, clipped, weighted, seed=0):
    """Arguments of value_loss with both sides of the clip reached; a third of the rows masked if weighted."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.promote_types(dtype, torch.float32)
    values, returns, moved, weight = torch.randn(4, num_tokens, generator=g, dtype=torch.float64)
    keywords = {"old_values": (values + 0.5 * moved).to(dtype), "clip": 0.25} if clipped else {}
    if weighted:
        keywords["token_weights"] = (weight.masked_fill(weight < -0.4, 0) / max(num_tokens, 1)).to(acc)
    return values.to(dtype), returns.to(acc), keywords


def oracle(values, returns, *, old_values=None, clip=None, token_weights=None):
    """The loss as PyTorch users write it, for autograd; rows of weight 0 are dropped."""
    w = torch.ones_like(values) / max(len(values), 1) if token_weights is None else token_weights
    rows = w != 0
    loss = (values[rows] - returns[rows]) ** 2
    if clip is not None:
        old = old_values[rows]
        inside = torch.min(torch.max(values[rows], old - clip), old + clip)
        loss = torch.max(loss, (inside - returns[rows]) ** 2)
    return (w[rows] * loss).sum()


def results(function, arguments, dtype):
    """The loss and the gradient of values for an upstream gradient of 3, computed in `dtype`."""
    values, returns, keywords = arguments
    acc = torch.promote_types(dtype, torch.float32)
    leaf = values.detach().to(dtype).requires_grad_()
    dtypes = {"old_values": dtype, "token_weights": acc}
    keywords = {k: v.to(dtypes[k]) if k in dtypes else v for k, v in keywords.items()}
    loss = function(leaf, returns.to(acc), **keywords)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3))
    return loss.detach()[None], grad


def assert_as_accurate(function, dtype, options, sizes):
    acc = torch.promote_types(dtype, torch.float32)
    problems = [problem(n, dtype, **options, seed=seed) for n in sizes for seed in range(4)]
    runs = [(results(function, p, dtype), results(oracle, p, torch.float64), results(oracle, p, acc)) for p in problems]
    for i, expected in enumerate((acc, dtype)):
        got, exact, peer = (torch.cat([run[k][i] for run in runs]) for k in range(3))
        assert got.dtype == expected
        assert_no_further(got, exact, peer.to(expected))


@pytest.mark.vectors
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_autograd(dtype, options):
    assert_as_accurate(value_loss, dtype, options, SIZES)


def assert_table(op):
    """clip 1: unclipped; clipped with the larger error; clipped, yet with the smaller one; a tie; masked."""
    values = torch.tensor([1.5, 4.0, 4.0, 2.0, math.nan])
    returns = torch.tensor([0.0, 0.0, 8.0, 1.0, math.inf])
    old = torch.tensor([1.0, 5.5, 2.0, -1.0, math.nan])
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    loss, derivative = op(values, returns, old, weights, 1.0)
    # errors 1.5; 4 and 4.5; -4 and -5; 1 and -1; nothing
    assert loss == 2.25 + 2 * 4.5**2 + 25 + 1
    assert derivative.tolist() == [3, 0, 0, 2, 0]
    loss, derivative = op(values[:4], returns[:4], None, None, math.inf)
    assert loss == (2.25 + 16 + 16 + 1) / 4 and derivative.tolist() == [0.75, 2, -2, 0.5]


@pytest.mark.vectors
@pytest.mark.parametrize("op", [_value_loss, _value_loss._init_fn], ids=["kernel", "reference"])
def test_table(op):
    assert_table(op)


@pytest.mark.vectors
@pytest.mark.parametrize("op", [_value_loss, _value_loss._init_fn], ids=["kernel", "reference"])
def test_not_a_number_is_not_dropped(op):
    x = torch.zeros(3, 20)
    for i in range(3):
        dirty = x.clone()
        dirty[i, 17] = math.nan
        assert op(*dirty, None, 0.5)[0].isnan()


@pytest.mark.vectors
def test_no_rows_and_no_counted_rows():
    for n in 0, 5:
        rows = torch.full((n,), math.nan).requires_grad_()
        loss = value_loss(rows, rows.detach(), token_weights=torch.zeros(n))
        assert loss == 0 and (torch.autograd.grad(loss, rows)[0] == 0).all()
    assert value_loss(torch.empty(0), torch.empty(0)) == 0


def test_micro_batches_add_up():
    values, returns, keywords = problem(9000, torch.float64, **OPTIONS["clip-weights"])
    parts = []
    for rows in slice(0, 7), slice(7, 5000), slice(5000, 9000):
        part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        parts.append(value_loss(values[rows], returns[rows], **part))
    torch.testing.assert_close(sum(parts), value_loss(values, returns, **keywords))


@pytest.mark.vectors
@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_threads_or_on_other_rows():
    arguments = problem(30000, torch.float32, **OPTIONS["clip-weights"])
    threads = torch.get_num_threads()
    runs = []
    for n in 1, 2, 3:
        torch.set_num_threads(n)
        runs.append(results(value_loss, arguments, torch.float32))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    order = torch.randperm(30000)[:1234]
    values, returns, keywords = arguments
    shuffled = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    _, grad = results(value_loss, (values[order], returns[order], shuffled), torch.float32)
    assert torch.equal(grad, runs[0][1][order])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    values, returns, keywords = problem(7, torch.float64, **options)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, returns, **keywords), values.requires_grad_())


def test_second_derivative_raises():
    values = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(value_loss(values, torch.zeros(4)), values, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_opcheck():
    values, returns, keywords = problem(5, torch.bfloat16, **OPTIONS["clip-weights"])
    torch.library.opcheck(
        _value_loss, (values.requires_grad_(), returns, keywords["old_values"], keywords["token_weights"], 0.25)
    )
    torch.library.opcheck(_value_loss, (values.detach(), returns, None, None, math.inf))


def test_compiles_forward_and_backward_with_one_graph_for_every_length():
    compiled = torch.compile(value_loss, fullgraph=True, dynamic=True)
    for n, stance in (17, "default"), (64, "fail_on_recompile"):
        arguments = problem(n, torch.float32, **OPTIONS["clip-weights"])
        with torch.compiler.set_stance(stance):
            got = results(compiled, arguments, torch.float32)
        for a, b in zip(got, results(value_loss, arguments, torch.float32), strict=True):
            assert torch.equal(a, b)


class ByTriton(torch.autograd.Function):
    """The op through the launcher of its Triton kernels: on the GPU, or in the interpreter."""

    @staticmethod
    def forward(ctx, device, values, returns, old_values, token_weights, clip):
        tensors = [x if x is None else x.detach().to(device) for x in (values, returns, old_values, token_weights)]
        loss, derivative = triton_kernels.forward(*tensors, clip)
        ctx.save_for_backward(derivative.to(values.device), values)
        return loss.to(values.device)

    @staticmethod
    def backward(ctx, grad_loss):
        return None, scaled_derivative(grad_loss, *ctx.saved_tensors), *(None,) * 4


@pytest.fixture
def by_triton(triton_device, monkeypatch):
    """value_loss through the launcher, with programs of 32 rows instead of 1024."""
    monkeypatch.setitem(triton_kernels.ROWS, "BT", 32)
    return lambda values, returns, *, old_values=None, clip=math.inf, token_weights=None: ByTriton.apply(
        triton_device, values, returns, old_values, token_weights, clip
    )


@pytest.mark.parametrize("options", ["plain", "clip-weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_no_further_from_float64_than_autograd(by_triton, dtype, options):
    assert_as_accurate(by_triton, dtype, OPTIONS[options], NUM_ROWS)


def test_triton_table_and_not_a_number(triton_device):
    assert_table(lambda *a: [x.cpu() for x in triton_kernels.forward(*(on(x, triton_device) for x in a))])
    for i in range(3):
        dirty = torch.zeros(3, 20)
        dirty[i, 17] = math.nan
        assert triton_kernels.forward(*dirty.to(triton_device), None, 0.5)[0].isnan()


def on(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.mark.gpu
def test_public_function_on_cuda_runs_the_triton_kernels_without_waiting():
    values, returns, keywords = problem(3000, torch.bfloat16, **OPTIONS["clip-weights"])
    want = triton_kernels.forward(
        *(on(x, "cuda") for x in (values, returns, keywords["old_values"], keywords["token_weights"])), 0.25
    )
    arguments = values.cuda(), returns.cuda(), {k: on(v, "cuda") for k, v in keywords.items()}
    for f in value_loss, torch.compile(value_loss, fullgraph=True, dynamic=True):
        results(f, arguments, torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error")
        loss, grad = results(f, arguments, torch.bfloat16)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(loss[0], want[0]) and torch.equal(grad, (3 * want[1]).bfloat16())
    loss, grad = replayed(lambda: results(value_loss, arguments, torch.bfloat16))
    assert torch.equal(loss[0], want[0]) and torch.equal(grad, (3 * want[1]).bfloat16())


def test_bad_input():
    x = torch.zeros(3)
    for error, sentence, change in [
        (ValueError, r"values must be \[T\] .*, got \[3, 1\] float32", dict(values=x[:, None])),
        (TypeError, r"values must be \[T\] .*, got \[3\] int64", dict(values=x.long())),
        (TypeError, r"returns must be \[T\] float32, got \[3\] bfloat16", dict(returns=x.bfloat16())),
        (ValueError, r"returns must be \[T\] float32 with T = 3, got \[2\]", dict(returns=x[:2])),
        (ValueError, "returns must not require grad", dict(returns=x.clone().requires_grad_())),
        (TypeError, "old_values must be .* float32, got .* float64", dict(old_values=x.double(), clip=0.1)),
        (TypeError, "token_weights must be .* float32, got .* bool", dict(token_weights=x.bool())),
        (ValueError, "token_weights must be on cpu", dict(token_weights=x.to("meta"))),
        (ValueError, "go together, got clip 0.1 without old_values", dict(clip=0.1)),
        (ValueError, "go together, got old_values without clip", dict(old_values=x)),
        (ValueError, "clip must be positive or None, got 0.0", dict(old_values=x, clip=0.0)),
    ]:
        with pytest.raises(error, match=sentence):
            value_loss(**{**dict(values=x, returns=x), **change})
