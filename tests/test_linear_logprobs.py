"""linear_logprobs against log_softmax in float64, and the promises about bits, masks, memory offsets and errors."""

import math

import pytest
import torch
from accuracy import assert_no_further
from torch import Tensor

from qrm_fast import linear_logprobs
from qrm_fast.ops.linear_logprobs import _backward, _forward

# Not the full product: one shape for each V, and one beyond each block size of the CPU kernel.
SHAPES = [
    pytest.param(t, d, v, id=f"T{t}-D{d}-V{v}")
    for t, d, v in [
        (5, 8, 1),
        (2, 3, 2),
        (63, 20, 17),
        (20, 64, 127),
        (97, 33, 1000),
        (0, 16, 1100),
        (7, 16, 1100),
        (1, 3, 1280),
        (130, 17, 2176),
        (40, 520, 3000),  # depth beyond two passes of the product, vocabulary beyond one split
        (40, 1100, 100),  # depth beyond what a pass holds, also of pairs
        (40, 1101, 100),  # the last of a pair missing
        (1300, 9, 1500),  # rows beyond one unit of work
        (20, 5, 8100),  # vocabulary beyond one slab of the backward pass
    ]
]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "everything": {"bias": True, "temperature": True, "softcap": 5.0},
}


def make(t: int, d: int, v: int, dtype: torch.dtype, bias=False, temperature=1.0, softcap=None) -> tuple[dict, dict]:
    """Random tensors and options; logits reach about +-15."""
    generator = torch.Generator().manual_seed(t + d + v)
    acc = torch.promote_types(dtype, torch.float32)
    tensors = {
        "hidden": torch.randn(t, d, generator=generator).to(dtype),
        "weight": (torch.randn(v, d, generator=generator) * 4 / d**0.5).to(dtype),
        "bias": torch.randn(v, generator=generator).to(dtype) if bias else None,
    }
    targets = torch.randint(v, (t,), generator=generator)
    if t > 1:
        targets[::7] = -100
    if temperature is True:
        temperature = torch.rand(t, generator=generator).to(acc) + 0.5
    return tensors, {"targets": targets, "temperature": temperature, "softcap": softcap}


def make_up_to_30(t: int, d: int, v: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """The same with logits that reach +-30."""
    tensors, rest = make(t, d, v, dtype)
    largest = (tensors["hidden"].double() @ tensors["weight"].double().T).abs().max()
    return tensors | {"weight": (tensors["weight"].double() * (30 / largest)).to(dtype)}, rest


def of_logits(z, targets, temperature=1.0, softcap=None):
    """logprobs, entropy, lse by log_softmax, in the dtype of the logits."""
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    keep = targets != -100
    logprobs = logp.gather(-1, targets.where(keep, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return tuple(torch.where(keep, x, 0) for x in (logprobs, entropy, z.logsumexp(-1)))


def naive(hidden, weight, bias, targets, temperature, softcap):
    """The same of materialised logits, in hidden's dtype."""
    return of_logits(torch.nn.functional.linear(hidden, weight, bias), targets, temperature, softcap)


def run(function, tensors, options, dtype):
    """Results and gradients of a random combination of logprobs and entropy, with the inputs in `dtype`."""
    leaves = {k: None if x is None else x.detach().to(dtype).requires_grad_() for k, x in tensors.items()}
    acc = torch.promote_types(dtype, torch.float32)
    options = {k: x.to(acc) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}
    results = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    g, e = (torch.randn(results[0].shape, generator=generator).to(results[0].device) for _ in range(2))
    (results[0] * g + results[1] * e).sum().backward()
    return [*results, *(x.grad for x in leaves.values() if x is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("t", "d", "v"), SHAPES)
def test_as_accurate_as_pytorch(t, d, v, dtype, options):
    """16-bit inputs are compared with PyTorch in float32 on the same values: results are never rounded to 16 bits."""
    tensors, rest = make(t, d, v, dtype, **options)
    ours = run(linear_logprobs, tensors, rest, dtype)
    exact = run(naive, tensors, rest, torch.float64)
    peer = run(naive, tensors, rest, torch.promote_types(dtype, torch.float32))
    for i, (x, y, z) in enumerate(zip(ours, exact, peer, strict=True)):
        assert x.dtype == (torch.promote_types(dtype, torch.float32) if i < 3 else dtype)
        assert_no_further(x, y, z.to(x.dtype))
    assert (ours[0] <= 0).all() and (ours[1] >= 0).all()


def test_literal_values():
    """Logits [0, log 2, log 5]: p = [1/8, 1/4, 5/8]."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(2), 1.0], [math.log(5), -1.0]])
    result = linear_logprobs(hidden, weight, torch.tensor([1, -100]))
    entropy = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    torch.testing.assert_close(result.logprobs, torch.tensor([-math.log(4), 0.0]))
    torch.testing.assert_close(result.entropy, torch.tensor([entropy, 0.0]) * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(result.lse, torch.tensor([math.log(8), 0.0]))
    result.logprobs.sum().backward()
    expected = weight[1] - (weight[1] / 4 + weight[2] * 5 / 8)
    torch.testing.assert_close(hidden.grad, torch.stack([expected, torch.zeros(2)]))


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_large_logits(level):
    """All logits near +-100, one of them 90 above the others: nothing overflows, logp stays exact and at most 0."""
    generator = torch.Generator().manual_seed(0)
    bias = level + torch.rand(1100, generator=generator)
    bias[7] += 90
    hidden, weight = torch.zeros(2, 4), torch.zeros(1100, 4)
    result = linear_logprobs(hidden, weight, torch.tensor([7, 8]), bias=bias)
    exact = bias.double().log_softmax(-1)[[7, 8]]
    torch.testing.assert_close(result.logprobs.double(), exact, rtol=1e-6, atol=1e-30)
    assert (result.logprobs <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_up_to_30(dtype):
    """The contract: within 2e-5, and gradients of 16-bit inputs at most a third as far off as PyTorch's in 16 bits."""
    tensors, rest = make_up_to_30(63, 64, 2176, dtype)
    ours, peer = (run(function, tensors, rest, dtype) for function in (linear_logprobs, naive))
    exact = run(naive, tensors, rest, torch.float64)
    for got, want in zip(ours[:3], exact, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    assert (ours[0] <= 0).all()
    for got, want, other in zip(ours[3:], exact[3:], peer[3:], strict=True):
        error, peer_error = ((x.double() - want).norm() for x in (got, other))
        assert error <= peer_error / (1 if dtype == torch.float32 else 3), f"{error:.3g}, PyTorch {peer_error:.3g}"


def test_later_calls_of_other_shapes_change_nothing():
    first, other = make(63, 20, 1000, torch.float32), make(9, 520, 3000, torch.bfloat16, bias=True)
    want = run(linear_logprobs, *first, torch.float32)
    run(linear_logprobs, *other, torch.bfloat16)
    for x, y in zip(want, run(linear_logprobs, *first, torch.float32), strict=True):
        assert torch.equal(x, y)


def test_masked_vocabulary_and_non_finite_rows():
    """-inf logits have probability 0; a NaN or inf row is NaN by itself and touches no other."""
    tensors, _ = make(9, 16, 300, torch.float32, bias=True)
    tensors["bias"][100:] = -math.inf
    targets = torch.tensor([3, 99, 100, 0, 1, 2, 3, 4, 5])
    clean = linear_logprobs(**tensors, targets=targets)
    exact = naive(*(tensors[k].double() for k in ("hidden", "weight")), tensors["bias"].double(), targets, 1.0, None)
    torch.testing.assert_close(clean.logprobs.double(), exact[0], rtol=1e-6, atol=1e-5)
    assert clean.logprobs[2] == -math.inf and torch.isfinite(clean.entropy).all()

    def with_gradient(hidden):
        leaf = hidden.clone().requires_grad_()
        out = linear_logprobs(**tensors | {"hidden": leaf}, targets=targets)
        return *out, *torch.autograd.grad((out.logprobs + out.entropy).sum(), leaf)

    dirty = tensors["hidden"].clone()
    dirty[4], dirty[6] = math.nan, math.inf
    bad = torch.tensor([4, 6])
    good = torch.tensor([0, 1, 2, 3, 5, 7, 8])
    for x, y in zip(with_gradient(tensors["hidden"]), with_gradient(dirty), strict=True):
        assert torch.equal(x[good], y[good]) and torch.isnan(y[bad]).all()


def test_idle_rows_are_never_read():
    """A row that is ignored, or that gets no gradient, may hold NaN: no gradient sees it."""
    tensors, _ = make(6, 8, 50, torch.float32)
    tensors["hidden"][[0, 3]] = math.nan
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    targets = torch.tensor([-100, 1, 2, 3, 4, 5])
    result = linear_logprobs(hidden, weight, targets)
    assert all(x[0] == 0 for x in result) and torch.isnan(result.logprobs[3])
    keep = torch.tensor([True, True, True, False, True, True])
    result.logprobs[keep].sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert torch.equal(hidden.grad[[0, 3]], torch.zeros(2, 8)) and (hidden.grad[1] != 0).any()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    """Alone, reordered, among other rows, on one thread or two: the same results and gradient of hidden."""
    tensors, rest = make(1100, 40, 2500, dtype, bias=True, temperature=True)

    def rows(index):
        hidden = tensors["hidden"][index].clone().requires_grad_()
        out = linear_logprobs(
            hidden,
            tensors["weight"],
            rest["targets"][index],
            bias=tensors["bias"],
            temperature=rest["temperature"][index],
        )
        (out.logprobs * 0.5 - out.entropy * 0.1).sum().backward()
        return [*out, hidden.grad]

    everything = rows(torch.arange(1100))
    threads = torch.get_num_threads()
    for index in [torch.randperm(1100), torch.arange(1100), torch.tensor([977]), torch.arange(500, 563)]:
        torch.set_num_threads(1 if len(index) == 1100 else threads)
        for x, y in zip(everything, rows(index), strict=True):
            assert torch.equal(x[index], y)
    torch.set_num_threads(threads)


def test_weight_gradient_is_deterministic():
    tensors, rest = make(500, 40, 3000, torch.float32)
    first, second = (run(linear_logprobs, tensors, rest, torch.float32)[4] for _ in range(2))
    assert torch.equal(first, second)


def test_more_than_2_31_logits():
    """T * V = 65537 * 32800 > 2^31: the last rows and the last columns are where an int32 offset would wrap.

    Only the sample has a gradient, which spares the others' time.
    """
    hidden, weight = torch.randn(65537, 2), torch.randn(32800, 2)
    sample = torch.cat([torch.arange(100), torch.arange(65437, 65537)])
    leaves, wide = ([x.to(to).requires_grad_() for x in (hidden, weight)] for to in (torch.float32, torch.float64))
    result = linear_logprobs(*leaves, torch.full((65537,), 32799))
    exact = (wide[0][sample] @ wide[1].T).log_softmax(-1)[:, -1]
    torch.testing.assert_close(result.logprobs[sample].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(result.logprobs).all()
    got, want = (torch.autograd.grad(x.sum(), y) for x, y in ((result.logprobs[sample], leaves), (exact, wide)))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("v", [32000, 50257, 151936, 152064])
def test_vocabularies_in_use(v):
    """Beyond many splits and slabs, none of which these sizes are a multiple of."""
    tensors, rest = make(3, 5, v, torch.float32, bias=True)
    rest["targets"] = torch.tensor([0, v - 1, v // 2])
    ours, exact = run(linear_logprobs, tensors, rest, torch.float32), run(naive, tensors, rest, torch.float64)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pitch", "first"), [(24, 12), (24, 1), (15, 3)])  # also in the middle of a pair of bfloat16
def test_strided_rows(dtype, pitch, first):
    tensors, rest = make(40, 12, 100, dtype)
    ours = run(linear_logprobs, tensors, rest, dtype)
    strided = []
    for name in "hidden", "weight":
        wide = torch.full((len(tensors[name]), pitch), math.nan, dtype=dtype)
        wide[:, first : first + 12] = tensors[name]
        strided.append(wide[:, first : first + 12].detach().requires_grad_())
    result = linear_logprobs(*strided, rest["targets"])
    for x, y in zip(ours[:3], result, strict=True):
        assert torch.equal(x, y)
    result.logprobs.sum().backward()
    assert all(x.grad.shape[1] == 12 and torch.isfinite(x.grad).all() for x in strided)


def test_frozen_inputs_cost_nothing():
    """Only the gradients that are needed are formed; a head whose weight is tied to another use gets its share."""
    tensors, rest = make(20, 8, 30, torch.float32, bias=True)
    g = torch.ones(20)
    out = _forward(*(tensors[k] for k in ("hidden", "weight")), rest["targets"], None, 1.0, None, None, -100)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        grads = _backward(
            g,
            g,
            tensors["hidden"],
            tensors["weight"],
            rest["targets"],
            tensors["bias"],
            1.0,
            None,
            None,
            -100,
            *out[1:],
            *needs,
        )
        assert [x.numel() > 0 for x in grads] == list(needs)
    tied = tensors["weight"].clone().requires_grad_()
    linear_logprobs(tied[rest["targets"].clamp(min=0)], tied, rest["targets"]).logprobs.sum().backward()
    other = tensors["weight"].double().requires_grad_()
    naive(other[rest["targets"].clamp(min=0)], other, None, rest["targets"], 1.0, None)[0].sum().backward()
    torch.testing.assert_close(tied.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_registration():
    tensors, rest = make(7, 5, 11, torch.float32, bias=True)
    leaves = [x.requires_grad_() for x in tensors.values()]
    arguments = (*leaves[:2], rest["targets"], leaves[2], 0.7, None, 3.0, -100)
    torch.library.opcheck(_forward, arguments)
    g = torch.randn(7)
    out = [x.detach() for x in _forward(*arguments)]
    hidden, weight, bias = (x.detach() for x in leaves)
    same = (hidden, weight, rest["targets"], bias, 0.7, None, 3.0, -100)
    torch.library.opcheck(_backward, (g, g, *same, *out[1:], True, False, True))


def test_gradcheck():
    tensors, rest = make(8, 5, 11, torch.float64, bias=True, temperature=True, softcap=4.0)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(hidden, weight, bias):
        return linear_logprobs(hidden, weight, bias=bias, **rest)[:2]

    assert torch.autograd.gradcheck(function, leaves)


def test_lse_is_not_differentiable():
    tensors, rest = make(3, 4, 5, torch.float32)
    out = linear_logprobs(tensors["hidden"].requires_grad_(), tensors["weight"], rest["targets"])
    assert not out.lse.requires_grad


def test_compiles_without_breaks_for_any_length():
    @torch.compile(fullgraph=True, dynamic=True)
    def step(hidden, weight, targets):
        out = linear_logprobs(hidden, weight, targets, temperature=0.9)
        return (out.logprobs - 0.1 * out.entropy).sum()

    for t in (12, 30):
        tensors, rest = make(t, 8, 40, torch.float32)
        eager, compiled = (tensors["hidden"].clone().requires_grad_() for _ in range(2))
        out = linear_logprobs(eager, tensors["weight"], rest["targets"], temperature=0.9)
        (out.logprobs - 0.1 * out.entropy).sum().backward()
        step(compiled, tensors["weight"], rest["targets"]).backward()
        torch.testing.assert_close(compiled.grad, eager.grad)


def test_autocast_behaves_as_for_linear():
    tensors, rest = make(9, 16, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprobs(tensors["hidden"], tensors["weight"], rest["targets"])
    outside = linear_logprobs(tensors["hidden"].bfloat16(), tensors["weight"].bfloat16(), rest["targets"])
    assert torch.equal(inside.logprobs, outside.logprobs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 2, 3)}, ValueError, r"hidden must be \[T, D\].*got \[4, 2, 3\] float32"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \[V, D\] float32 with D = 3, got \[5, 4\]"),
        ({"weight": torch.zeros(5, 3).bfloat16()}, TypeError, "weight must be .*float32, got .*bfloat16"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "at least one row"),
        ({"targets": torch.zeros(4)}, TypeError, r"targets must be \[T\] int64, got \[4\] float32"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, "targets must be .* T = 4, got"),
        ({"targets": torch.tensor([0, 1, 5, 2])}, ValueError, r"targets must be in \[0, 5\) or -100, got 5 at row 2"),
        ({"targets": torch.tensor([0, -1, 4, 2])}, ValueError, "got -1 at row 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[V\] float32 with V = 5"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": torch.ones(4, dtype=torch.float64)}, TypeError, r"temperature must be \[T\] float32"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive or None, got -1.0"),
        ({"hidden": torch.zeros(3, 4).T}, ValueError, "hidden must be dense in its last dimension"),
        ({"hidden": torch.zeros(4, 3, device="meta")}, ValueError, "must be on meta like the other arguments"),
        ({"hidden": [[0.0] * 3] * 4}, TypeError, "hidden must be a tensor"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 1, 2, -100])}
    with pytest.raises(error, match=message):
        linear_logprobs(**(arguments | change))
