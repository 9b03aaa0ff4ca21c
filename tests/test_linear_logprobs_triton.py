"""The Triton kernels of linear_logprobs, through their launchers: on a GPU, or in the interpreter.

The op itself is tested in test_linear_logprobs.py; its oracle and problems are used here. Interpreted blocks are those
of a Hopper GPU, for 16-bit inputs 128 rows by 256 columns, 128 columns with a softcap, by 64 of the depth.
"""

import math

import pytest
import torch
from accuracy import assert_as_tensor_cores, assert_no_further, head_limit
from cuda_graph import replayed
from test_linear_logprobs import OPTIONS, make, make_up_to_30, naive, of_logits

import qrm_fast
from qrm_fast.triton import linear_logprobs as kernels
from qrm_fast.triton import linear_logprobs_backward as backward_kernels
from qrm_fast.triton import product

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # rows past the last, non-finite rows
]

# Rows, depth and vocabulary around the blocks; an odd depth cannot be described to the copy engine.
SHAPES = [(5, 8, 1), (2, 3, 2), (63, 20, 17), (1, 64, 127), (2, 33, 1000), (0, 16, 1100), (3, 72, 1280), (63, 17, 2176)]
CASES = {
    "float32": (torch.float32, OPTIONS["everything"]),
    "bfloat16": (torch.bfloat16, OPTIONS["temperature"]),
    "bfloat16-everything": (torch.bfloat16, OPTIONS["everything"]),
    "float16": (torch.float16, OPTIONS["plain"]),
}


class ByTriton(torch.autograd.Function):
    """The op through the launchers of its Triton kernels."""

    @staticmethod
    def forward(ctx, device, hidden, weight, bias, targets, temperature, softcap):
        per_row = isinstance(temperature, torch.Tensor)
        number, rows = (1.0, temperature.to(device)) if per_row else (temperature, None)
        hidden, weight, targets = (x.to(device) for x in (hidden, weight, targets))
        ctx.arguments = (
            hidden,
            weight,
            targets,
            None if bias is None else bias.to(device),
            number,
            rows,
            softcap,
            -100,
        )
        results = kernels.forward(*ctx.arguments)
        ctx.results = results[1:]
        ctx.mark_non_differentiable(*results[2:])
        return tuple(x.cpu() for x in results)

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, *_):
        device = ctx.arguments[0].device
        upstream = (x.to(device).contiguous() for x in (grad_logprobs, grad_entropy))
        needs = ctx.needs_input_grad[1:4]
        grads = backward_kernels.backward(*upstream, *ctx.arguments, *ctx.results, *needs)
        grads = [x.cpu() if need else None for x, need in zip(grads, needs, strict=True)]
        return None, *grads, None, None, None


@pytest.fixture
def forward(triton_device):
    """logprobs, entropy, lse and the residual of lse, by the launchers; differentiable in the first two."""

    def call(hidden, weight, bias, targets, temperature=1.0, softcap=None):
        return ByTriton.apply(triton_device, hidden, weight, bias, targets, temperature, softcap)

    return call


def in_dtype(dtype, tensors, rest):
    """The arguments of one problem with everything floating in `dtype`."""
    arguments = tensors | rest
    floating = [k for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return arguments | {k: arguments[k].to(dtype) for k in floating}


@pytest.mark.parametrize(("dtype", "options"), CASES.values(), ids=CASES)
def test_results_as_accurate_as_pytorch_in_float32(forward, dtype, options):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_up_to_30(forward, dtype, triton_device):
    tensors, rest = make_up_to_30(40, 64, 1100, dtype)
    limit = head_limit(64, 30.0) if triton_device == "cuda" else 2e-5
    for got, want in zip(forward(**tensors, **rest), naive(**in_dtype(torch.float64, tensors, rest)), strict=False):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=limit)


def gradients(function, dtype, tensors, rest, scale):
    """Of a random combination of logprobs and entropy, `scale` times as large, and a few rows without either."""
    arguments = in_dtype(dtype, tensors, rest)
    if function is not naive:
        arguments |= rest  # temperatures are float32 there
    leaves = [k for k, x in tensors.items() if x is not None]
    for k in leaves:
        arguments[k] = arguments[k].detach().requires_grad_()
    logprobs, entropy, *_ = function(**arguments)
    generator = torch.Generator().manual_seed(1)
    g, e = (torch.randn(logprobs.shape, generator=generator) * scale for _ in range(2))
    g[3::5] = e[3::5] = 0
    loss = (logprobs * g.to(logprobs) + entropy * e.to(logprobs)).sum()
    return torch.autograd.grad(loss, [arguments[k] for k in leaves])


def assert_gradients(forward, dtype, shapes, options, scale=1.0):
    """In the mean square over all shapes: for float32 1.1 times PyTorch's error and one rounding. For 16 bits, whose dZ
    tensor cores need in 16 bits, at most a third of the error of PyTorch's path in that dtype, or one rounding."""
    errors = []
    for shape in shapes:
        tensors, rest = make(*shape, dtype, **options)
        exact = gradients(naive, torch.float64, tensors, rest, scale)
        peer = gradients(naive, dtype, tensors, rest, scale)
        for got, want, other in zip(gradients(forward, dtype, tensors, rest, scale), exact, peer, strict=True):
            assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
            size = want.norm() + 1e-300
            errors.append(torch.stack([((x.double() - want) / size).norm() for x in (got, other)]))
    error, peer_error = torch.stack(errors).square().mean(0).sqrt()
    rounding = torch.finfo(dtype).eps
    limit = 1.1 * peer_error + rounding if dtype == torch.float32 else max(peer_error / 3, rounding)
    assert error <= limit, f"off by {error:.3g}, PyTorch by {peer_error:.3g}"


@pytest.mark.parametrize(("dtype", "options"), CASES.values(), ids=CASES)
def test_gradients(forward, dtype, options):
    """Of the size that a mean over many tokens has, as far as the dtype of the result can hold it."""
    shapes = [(5, 8, 1), (63, 20, 17), (1, 64, 127), (130, 72, 300)]
    assert_gradients(forward, dtype, shapes, options, scale=1e-3 if dtype == torch.float16 else 1e-6)


def test_float16_holds_the_gradient_of_a_small_loss(forward):
    """Upstream gradients of 1e-5, large weights: dZ would underflow, hidden's gradient does not."""
    tensors, rest = make(63, 20, 300, torch.float16)
    leaf = (tensors["hidden"] / 1024).requires_grad_()
    weight = tensors["weight"] * 1024
    exact_leaf = leaf.detach().double().requires_grad_()
    for x, w in (leaf, weight), (exact_leaf, weight.double()):
        logprobs = (forward if x is leaf else naive)(x, w, None, **rest)[0]
        (logprobs.sum() * 1e-5).backward()
    assert (leaf.grad.double() - exact_leaf.grad).norm() <= 1e-3 * exact_leaf.grad.norm()


def test_hidden_is_scaled_by_the_largest_of_many_blocks(triton_device):
    """Past the first 512 blocks of rows; rows of scale 0 or NaN become 0."""
    tops = torch.zeros(600, device=triton_device)
    tops[5], tops[599] = 2.0, 8.0
    hidden = torch.full((4, 8), 3.0, device=triton_device)
    scale = torch.tensor([8.0, 2.0, 0.0, math.nan], device=triton_device)
    hidden[2:] = math.nan
    scaled, top = backward_kernels.scaled_hidden(hidden, scale, tops)
    assert top == 8 and (scaled == torch.tensor([[3], [0.75], [0], [0]], device=triton_device)).all()
    assert backward_kernels.scaled_hidden(hidden, torch.zeros_like(scale), 0 * tops)[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_over_several_chunks(forward, dtype, monkeypatch):
    """Of the vocabulary and of the rows, the last of each cut short."""
    monkeypatch.setattr(backward_kernels, "COLUMNS", 128)
    monkeypatch.setattr(backward_kernels, "ROWS", 128)
    assert_gradients(forward, dtype, [(140, 24, 300)], OPTIONS["everything"])


def test_rows_without_gradient_never_leak(forward):
    """They are ignored, or their upstream gradients are 0, and may hold NaN; a wild target spoils its own row alone."""
    tensors, _ = make(9, 16, 300, torch.bfloat16, bias=True)
    targets = torch.tensor([3, 99, 299, 300, -100, 2, 3, 4, 5])
    keep = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1])

    def grads(hidden, rows):
        leaves = [x.requires_grad_() for x in (hidden[rows].clone(), tensors["weight"], tensors["bias"])]
        logprobs, entropy, *_ = forward(*leaves, targets[rows])
        return torch.autograd.grad([logprobs, entropy], leaves, [keep[rows] * 0.1, keep[rows] * 0.2])

    want = grads(tensors["hidden"], torch.tensor([1, 2, 5, 7, 8]))
    dirty = tensors["hidden"].clone()
    dirty[0], dirty[4], dirty[6] = math.nan, math.nan, math.inf
    got = grads(dirty, torch.arange(9))
    assert torch.equal(got[0][[1, 2, 5, 7, 8]], want[0]) and got[0][3].isnan().all()
    assert (got[0][[0, 4, 6]] == 0).all()
    for x, y in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x, y)


def test_each_gradient_alone(forward):
    tensors, rest = make(20, 8, 30, torch.float32, bias=True)
    together = gradients(forward, torch.float32, tensors, rest, 1)
    for k, want in zip(tensors, together, strict=True):
        leaf = tensors[k].clone().requires_grad_()
        logprobs, entropy, *_ = forward(**tensors | {k: leaf}, **rest)
        generator = torch.Generator().manual_seed(1)
        g, e = (torch.randn(20, generator=generator) for _ in range(2))
        g[3::5] = e[3::5] = 0
        (grad,) = torch.autograd.grad((logprobs * g + entropy * e).sum(), leaf)
        assert torch.equal(grad, want)


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

    def rows(index):
        hidden = tensors["hidden"][index].clone().requires_grad_()
        part = {
            **tensors,
            "hidden": hidden,
            "targets": rest["targets"][index],
            "temperature": rest["temperature"][index],
        }
        results = forward(**part)
        return *results, *torch.autograd.grad((results[0] * 0.5 - results[1] * 0.1).sum(), hidden)

    everything = rows(torch.arange(130))
    for index in [torch.randperm(130), torch.tensor([129]), torch.arange(3, 66)]:
        for x, y in zip(everything, rows(index), strict=True):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_folds_agree(dtype, triton_device, monkeypatch):
    """csrc/cuda's, where it serves, and Triton's: a target's logit to the bit, with every option."""
    tensors, rest = make(150, 72, 2500, dtype, bias=True, temperature=True)
    for softcap in None, 5.0:
        arguments = tensors["hidden"], tensors["weight"], rest["targets"], tensors["bias"], rest["temperature"]
        head = kernels.Head(*(x.to(triton_device) for x in arguments), softcap)
        if not kernels.compiled(head.hidden, head.weight):
            pytest.skip("no compiled fold for this device")
        results = []
        for compiled in True, False:
            monkeypatch.setattr(kernels, "compiled", lambda *_, compiled=compiled: compiled)
            target_logits = torch.zeros(150, device=triton_device)  # stays where a target is ignored
            results.append((kernels.fold(head, target_logits), target_logits))
        monkeypatch.undo()
        (ours, ours_targets), (others, others_targets) = results
        torch.testing.assert_close(ours, others, rtol=2e-6, atol=2e-6)
        assert torch.equal(ours_targets, others_targets)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_both_gradients_agree(softcap, triton_device, monkeypatch):
    """dZ and its two products by csrc/cuda, where it serves, and by Triton: the same bits."""
    tensors, rest = make(150, 72, 300, torch.bfloat16, bias=True, temperature=True)
    arguments = tensors["hidden"], tensors["weight"], rest["targets"], tensors["bias"], rest["temperature"]
    head = kernels.Head(*(x.to(triton_device) for x in arguments), softcap)
    if not product.compiled(head.hidden, head.weight):
        pytest.skip("no compiled product for this device")
    lse = kernels.forward(*head[:4], 1.0, *head[4:], -100)[2]
    factors = torch.randn(4, 150, device=triton_device)
    factors[0] = torch.randint(-3, 4, (150,)).exp2()  # scales
    factors[0, 3] = 0
    results = []
    for compiled in True, False:
        for module in backward_kernels, product:
            monkeypatch.setattr(module, "compiled", lambda *_, compiled=compiled: compiled)
        dz = torch.zeros(150, 304, dtype=torch.bfloat16, device=triton_device)[:, :300]
        dx, dw = (torch.full_like(x, 0.5, dtype=torch.float32) for x in (head.hidden, head.weight))
        launch = backward_kernels.dz_blocks(dz.dtype, 9, True, softcap is not None)
        backward_kernels.fill(dz, 0, head, factors, (lse, torch.zeros_like(lse)), None, launch)
        product.multiply(dz, head.weight, dx, factors[0], added=True, transposed=False)
        product.multiply(dz, head.hidden, dw, factors[0, 0], added=True, transposed=True)
        results.append((dz, dx, dw))
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "dim", "vocab"), [(300, 1000, 152064), (65537, 64, 32800)])
def test_at_the_size_of_models(num_rows, dim, vocab):
    """The vocabulary of Qwen2.5, and more than 2^31 logits: the last rows and columns are where offsets would wrap."""
    hidden = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16) / dim**0.5
    targets = torch.arange(vocab - num_rows, vocab, device="cuda").clamp(min=0)
    sample = torch.cat([torch.arange(100), torch.arange(num_rows - 100, num_rows)]).cuda()
    leaf, exact_leaf = hidden.requires_grad_(), hidden.detach()[sample].double().requires_grad_()
    ours = qrm_fast.linear_logprobs(leaf, weight, targets)
    z = exact_leaf @ weight.double().T
    exact, limit = of_logits(z, targets[sample]), head_limit(dim, z.detach().abs().max().item())
    peer = of_logits(torch.mm(hidden.detach()[sample], weight.T, out_dtype=torch.float32), targets[sample])
    for x, y, other in zip(ours, exact, peer, strict=True):
        assert_as_tensor_cores(x[sample].detach(), y.detach(), other, limit)
    ours.logprobs.sum().backward()
    exact[0].sum().backward()
    assert (leaf.grad[sample].double() - exact_leaf.grad).norm() <= 2**-8 * exact_leaf.grad.norm()


@pytest.mark.gpu
def test_public_function_on_cuda_runs_these_kernels(forward):
    """Eager, compiled and captured in a graph: the bits of the launcher, without waiting for the GPU."""
    tensors, rest = make(300, 72, 1000, torch.bfloat16, bias=True, temperature=True)
    want = forward(**tensors, **rest)
    arguments = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in (tensors | rest).items()}
    leaf = arguments["weight"].requires_grad_()

    def step(**arguments):
        results = qrm_fast.linear_logprobs(**arguments)
        return *results, (results.logprobs + results.entropy).sum()

    grads = []
    for function in step, torch.compile(step, fullgraph=True, dynamic=True):
        torch.autograd.grad(function(**arguments)[-1], leaf)
        torch.cuda.set_sync_debug_mode("error")
        *got, loss = function(**arguments)
        grads += torch.autograd.grad(loss, leaf)
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want, strict=False))
    assert torch.equal(*grads)

    def with_gradient():
        *results, loss = step(**arguments)
        return *results, *torch.autograd.grad(loss, leaf)

    *got, gradient = replayed(with_gradient)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want, strict=False)) and torch.equal(gradient, grads[0])
