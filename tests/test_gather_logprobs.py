"""gather_logprobs against log_softmax in float64, a table worked by hand, and its promises about bits, masks, ids."""

import math

import pytest
import torch
from accuracy import assert_no_further
from cuda_graph import replayed
from torch import Tensor

from qrm_fast import gather_logprobs
from qrm_fast.ops.gather_logprobs import _gather_logprobs, _gather_logprobs_backward
from qrm_fast.triton import gather_logprobs as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Columns around the vectors (16) and chunks (2048) of the CPU kernel.
SHAPES = [(0, 16), (1, 1), (2, 2), (63, 17), (33, 127), (5, 1000), (3, 2048), (4, 2049), (9, 6100), (2, 50257)]
SHAPES += [(2, 152064), (65537, 3)]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "everything": {"temperature": True, "softcap": 5.0},
}


def problem(t, v, dtype, temperature=1.0, softcap=None):
    """Logits up to about +-15; one row in seven is ignored, the first among them."""
    g = torch.Generator().manual_seed(t + v)
    logits = (4 * torch.randn(t, v, generator=g)).to(dtype)
    targets = torch.randint(v, (t,), generator=g)
    if t > 1:
        targets[::7] = -100
    if temperature is True:
        temperature = torch.rand(t, generator=g).to(torch.promote_types(dtype, torch.float32)) + 0.5
    return logits, {"targets": targets, "temperature": temperature, "softcap": softcap}


def oracle(logits, *, targets, temperature=1.0, softcap=None):
    """As PyTorch users write it, for autograd."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    keep = targets != -100
    logprobs = logp.gather(-1, targets.where(keep, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return tuple(torch.where(keep, x, 0) for x in (logprobs, entropy, z.logsumexp(-1)))


def results(function, logits, options, dtype, upstream=None):
    """logprobs, entropy, lse and the gradient of logits for random upstream gradients, computed in `dtype`."""
    acc = torch.promote_types(dtype, torch.float32)
    options = {k: x.to(acc) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}
    leaf = logits.detach().to(dtype).requires_grad_()
    out = function(leaf, **options)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, len(logits), generator=g) if upstream is None else upstream
    (grad,) = torch.autograd.grad(list(out[:2]), leaf, [x.to(acc) for x in upstream])
    return [*(x.detach() for x in out[:3]), grad]


def assert_as_accurate(function, dtype, problems):
    """Results and gradient over all problems; PyTorch's path runs in the dtype of the sums."""
    acc = torch.promote_types(dtype, torch.float32)
    runs = [
        (results(function, *p, dtype), results(oracle, *p, torch.float64), results(oracle, *p, acc)) for p in problems
    ]
    for i, expected in enumerate((acc, acc, acc, dtype)):
        got, exact, peer = (torch.cat([run[k][i].flatten() for run in runs]) for k in range(3))
        assert got.dtype == expected
        assert_no_further(got, exact, peer.to(expected))
    for logprobs, entropy, *_ in (run[0] for run in runs):
        assert (logprobs <= 0).all() and (entropy >= 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_pytorch(dtype, options):
    assert_as_accurate(gather_logprobs, dtype, [problem(*shape, dtype, **options) for shape in SHAPES])


def test_table():
    """Logits [0, log 2, log 5]: p = [1/8, 1/4, 5/8]."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [7, 8, 9]], requires_grad=True)
    out = gather_logprobs(logits, torch.tensor([1, -100]))
    entropy = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    torch.testing.assert_close(torch.stack(out), torch.tensor([[-math.log(4), 0], [entropy, 0], [math.log(8), 0]]))
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    torch.testing.assert_close(grad, torch.tensor([[-1 / 8, 3 / 4, -5 / 8], [0, 0, 0]]))
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    want = [-p * (math.log(p) + entropy) for p in (1 / 8, 1 / 4, 5 / 8)]
    torch.testing.assert_close(grad, torch.tensor([want, [0, 0, 0]]))


def test_reference():
    """What serves a device without a kernel: the same numbers, and NaN where the CPU kernel raises."""
    logits, options = problem(9, 50, torch.float64, temperature=True, softcap=5.0)
    arguments = logits, options["targets"], 1.0, options["temperature"], 5.0, -100
    out = _gather_logprobs(*arguments)
    torch.testing.assert_close(_gather_logprobs._init_fn(*arguments), out)
    g = torch.randn(2, 9, dtype=torch.float64)
    backward = (*g, *arguments, *out[1:])
    torch.testing.assert_close(_gather_logprobs_backward._init_fn(*backward), _gather_logprobs_backward(*backward))
    for x in _gather_logprobs._init_fn(logits, torch.tensor([50, -1, -101, *range(6)]), 1.0, None, None, -100):
        assert x[:3].isnan().all() and x[3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_up_to_30(dtype):
    """Within the 2e-5 of the contract."""
    logits, options = problem(63, 2176, torch.float32)
    logits = (logits * (30 / logits.abs().max())).to(dtype)
    for got, want in zip(gather_logprobs(logits, **options), oracle(logits.double(), **options), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_large_logits(level):
    """All logits near +-100, one of them 90 above: nothing overflows, logp stays exact and at most 0."""
    logits = level + torch.rand(1, 3000, generator=torch.Generator().manual_seed(0))
    logits[0, 7] += 90
    out = gather_logprobs(logits.expand(2, 3000), torch.tensor([7, 8]))
    torch.testing.assert_close(out.logprobs.double(), logits[0].double().log_softmax(-1)[[7, 8]], rtol=1e-6, atol=1e-30)
    assert (out.logprobs <= 0).all()


def assert_masked_and_non_finite_rows(function, v):
    """-inf logits have probability 0; a NaN or inf row is NaN by itself, touches no other, and may stay idle."""
    logits, _ = problem(9, v, torch.float32)
    logits[:, v // 2 :] = -math.inf
    targets = torch.tensor([3, v // 2 - 1, v // 2, 0, 1, 2, -100, 4, 5])
    out = function(logits, targets)
    exact = oracle(logits.double(), targets=targets)
    torch.testing.assert_close(out[0].double(), exact[0], rtol=1e-6, atol=1e-5)
    assert out[0][2] == -math.inf and out[1].isfinite().all()

    dirty = logits.clone()
    dirty[4, 1], dirty[8, 2], dirty[6] = math.nan, math.inf, math.nan
    bad, good = torch.tensor([4, 8]), torch.tensor([0, 1, 2, 3, 5, 6, 7])
    for x, y in zip(out[:3], function(dirty, targets)[:3], strict=True):
        assert torch.equal(x[good], y[good]) and y[bad].isnan().all()
    upstream = torch.randn(2, 9)
    upstream[:, [2, *bad]] = 0
    clean = results(function, logits, {"targets": targets}, torch.float32, upstream)[3]
    idle = results(function, dirty, {"targets": targets}, torch.float32, upstream)[3]
    assert torch.equal(clean, idle) and (idle[[2, 4, 6, 8]] == 0).all() and (clean[0] != 0).any()


def test_masked_vocabulary_and_non_finite_rows():
    assert_masked_and_non_finite_rows(gather_logprobs, 3000)


def assert_rows_stand_alone(function, t, v, dtype):
    """Reordered, alone, in parts, and with something else between the rows in memory: the same bits."""
    logits, options = problem(t, v, dtype, temperature=True)
    upstream = torch.randn(2, t)
    everything = results(function, logits, options, dtype, upstream)
    for rows in torch.randperm(t), torch.tensor([t - 2]), torch.arange(t // 3, t):
        wide = torch.full((len(rows), 2, v + 1), math.nan, dtype=dtype)
        wide[:, 1, :v] = logits[rows]
        part = {k: x[rows] if isinstance(x, Tensor) else x for k, x in options.items()}
        for same in logits[rows], wide[:, 1, :v]:
            got = results(function, same, part, dtype, upstream[:, rows])
            assert all(torch.equal(x[rows], y) for x, y in zip(everything, got, strict=True))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_depend_on_the_row_alone(dtype):
    threads = torch.get_num_threads()
    runs = []
    for n in 1, 3:
        torch.set_num_threads(n)
        assert_rows_stand_alone(gather_logprobs, 60, 2500, dtype)
        runs.append(results(gather_logprobs, *problem(60, 2500, dtype), dtype))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.unpoisoned
def test_offsets_beyond_32_bits():
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))  # two touched pages of 4 GiB
    far.fill_(0)
    far[1, 5] = 3
    out = gather_logprobs(far, torch.tensor([5, 5]))
    torch.testing.assert_close(out.logprobs, torch.tensor([-math.log(64), 3 - math.log(63 + math.exp(3))]))


def test_gradcheck():
    logits, options = problem(6, 5, torch.float64, temperature=True, softcap=4.0)
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, **options)[:2], logits.requires_grad_())


def test_lse_and_second_derivatives_are_not_differentiable():
    logits, options = problem(3, 5, torch.float32)
    out = gather_logprobs(logits.requires_grad_(), **options)
    assert not out.lse.requires_grad
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_opcheck():
    logits, options = problem(5, 4, torch.float32, temperature=True)
    for per_row, softcap in (None, None), (options["temperature"], 3.0):
        arguments = options["targets"], 0.7, per_row, softcap, -100
        torch.library.opcheck(_gather_logprobs, (logits.clone().requires_grad_(), *arguments))
        out = _gather_logprobs(logits, *arguments)
        torch.library.opcheck(_gather_logprobs_backward, (*torch.randn(2, 5), logits, *arguments, *out[1:]))


def test_compiles_forward_and_backward_with_one_graph_for_every_length():
    compiled = torch.compile(gather_logprobs, fullgraph=True, dynamic=True)
    for t, stance in (17, "default"), (64, "fail_on_recompile"):
        logits, options = problem(t, 40, torch.float32)
        with torch.compiler.set_stance(stance):
            got = results(compiled, logits, options, torch.float32)
        for a, b in zip(got, results(gather_logprobs, logits, options, torch.float32), strict=True):
            assert torch.equal(a, b)


class ByTriton(torch.autograd.Function):
    """The op through the launchers of its Triton kernels: on the GPU, or in the interpreter."""

    @staticmethod
    def forward(ctx, device, logits, targets, temperature, softcap):
        number, per_row = (1.0, temperature.to(device)) if isinstance(temperature, Tensor) else (temperature, None)
        # .to would close the gaps between rows
        logits = logits.detach() if device == "cpu" else logits.detach().to(device)
        arguments = logits, targets.to(device), number, per_row, softcap, -100
        logprobs, entropy, lse, residual = triton_kernels.forward(*arguments)
        ctx.arguments = *arguments, entropy, lse, residual
        ctx.mark_non_differentiable(lse)
        return logprobs.cpu(), entropy.cpu(), lse.cpu()

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _):
        device = ctx.arguments[0].device
        grad = triton_kernels.backward(grad_logprobs.to(device), grad_entropy.to(device), *ctx.arguments)
        return None, grad.cpu(), None, None, None


@pytest.fixture
def by_triton(triton_device):
    def function(logits, targets, *, temperature=1.0, softcap=None):
        return ByTriton.apply(triton_device, logits, targets, temperature, softcap)

    return function


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, "everything"),
        (torch.float32, "plain"),
        (torch.bfloat16, "temperature"),
        (torch.float16, "plain"),
    ],
    ids=str,
)
def test_triton_no_further_from_float64_than_pytorch(by_triton, dtype, options):
    """Columns around the blocks of both kernels (8192 and 4096) and less than one lane each."""
    shapes = [(0, 16), (1, 1), (2, 2), (9, 127), (2, 4096), (3, 9001), (2, 16384)]
    assert_as_accurate(by_triton, dtype, [problem(*shape, dtype, **OPTIONS[options]) for shape in shapes])


def test_triton_masked_vocabulary_and_non_finite_rows(by_triton):
    assert_masked_and_non_finite_rows(by_triton, 9000)


@pytest.mark.unpoisoned
def test_triton_bits_of_a_row_depend_on_the_row_alone(by_triton):
    assert_rows_stand_alone(by_triton, 9, 1000, torch.bfloat16)


def test_triton_marks_targets_outside(by_triton):
    """NaN in every field and in the gradient of that row, and in no other."""
    logits, _ = problem(9, 50, torch.float32)
    targets = torch.tensor([50, 1, -1, 2, -101, 3, 2**40, 49, -100])
    outside = torch.tensor([0, 2, 4, 6])
    out = results(by_triton, logits, {"targets": targets}, torch.float32)
    want = results(gather_logprobs, logits, {"targets": targets.index_fill(0, outside, -100)}, torch.float32)
    inside = torch.tensor([1, 3, 5, 7, 8])
    for x, y in zip(out, want, strict=True):
        assert x[outside].isnan().all()
        torch.testing.assert_close(x[inside], y[inside])


@pytest.mark.gpu
def test_public_function_on_cuda_runs_the_triton_kernels_without_waiting(by_triton):
    logits, options = problem(300, 20001, torch.bfloat16, temperature=True, softcap=5.0)
    want = results(by_triton, logits, options, torch.bfloat16)
    compiled = torch.compile(gather_logprobs, fullgraph=True, dynamic=True)
    logits, upstream = logits.cuda(), torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).cuda()
    options = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in options.items()}
    for f in gather_logprobs, compiled:
        results(f, logits, options, torch.bfloat16, upstream)
        torch.cuda.set_sync_debug_mode("error")
        got = results(f, logits, options, torch.bfloat16, upstream)
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    got = replayed(lambda: results(gather_logprobs, logits, options, torch.bfloat16, upstream))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_logits_on_cuda():
    logits = torch.zeros(16, 2**28, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    out = gather_logprobs(logits, torch.full((16,), 2**28 - 1, device="cuda"))
    assert (out.logprobs == -28 * math.log(2)).all()
    out.logprobs.sum().backward()
    assert (logits.grad[:, -1] == 1).all() and (logits.grad[:, :-1].abs() < 1e-7).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, r"logits must be a tensor \[T, V\], got list"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits must be \[T, V\] .*, got \[4\] float32"),
        ({"logits": torch.zeros(4, 5).long()}, TypeError, r"logits must be \[T, V\] .*, got \[4, 5\] int64"),
        ({"logits": torch.zeros(4, 0)}, ValueError, r"logits must have at least one column, got \[T, 0\]"),
        ({"logits": torch.zeros(5, 4).T}, ValueError, "logits must be dense in its last dimension, got stride 4"),
        ({"targets": torch.zeros(4)}, TypeError, r"targets must be \[T\] int64, got \[4\] float32"),
        ({"targets": torch.zeros(5).long()}, ValueError, r"targets must be \[T\] int64 with T = 4, got \[5\]"),
        ({"targets": torch.tensor([0, 1, 5, 2])}, ValueError, r"targets must be in \[0, 5\) or -100, got 5 at row 2"),
        ({"targets": torch.tensor([0, -1, 4, 2])}, ValueError, "got -1 at row 1"),
        ({"ignore_index": 9}, ValueError, r"targets must be in \[0, 5\) or 9, got -100 at row 3"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive, got -1.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be \[T\] float32 with T = 4, got \[3\]"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
        ({"targets": torch.zeros(4, device="meta").long()}, ValueError, "targets must be on cpu"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.zeros(4, 5), "targets": torch.tensor([0, 1, 2, -100])}
    with pytest.raises(error, match=message):
        gather_logprobs(**(arguments | change))
