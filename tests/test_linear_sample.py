"""linear_sample: the distribution function in float64, the bits of linear_logprobs, and the promises of every op."""

import math

import pytest
import torch
from cuda_graph import replayed
from torch import Tensor

from qrm_fast import linear_logprobs, linear_sample
from qrm_fast.ops.linear_sample import _linear_sample
from qrm_fast.triton import linear_logprobs as triton_logprobs
from qrm_fast.triton import linear_sample as triton_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1, 1), (3, 5, 7), (17, 33, 96), (40, 64, 97), (33, 16, 481), (130, 24, 2500)]  # rows, dim, vocab
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # rows past the last, non-finite rows
]

OPTIONS = {
    "plain": {},
    "everything": {"temperature": 0.7, "softcap": 8.0, "bias": True},
    "temperature per row": {"temperature": True},
}


def inputs(shape, dtype=torch.float32, device="cpu", seed=0) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim, vocab = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=g).to(dtype)
    weight = (torch.randn(vocab, dim, generator=g) * 3 / math.sqrt(dim)).to(dtype)
    uniforms = torch.rand(rows, generator=g, dtype=torch.float64)
    return hidden.to(device), weight.to(device), uniforms.to(device)


def options_of(case: str, hidden: Tensor, weight: Tensor) -> dict:
    options = dict(OPTIONS[case])
    g = torch.Generator().manual_seed(9)
    if options.get("bias"):
        options["bias"] = torch.randn(len(weight), generator=g).to(weight)
    if options.get("temperature") is True:
        acc = torch.promote_types(hidden.dtype, torch.float32)
        options["temperature"] = torch.rand(len(hidden), generator=g, dtype=acc).add(0.5).to(hidden.device)
    return options


def distribution(hidden, weight, *, bias=None, temperature=1.0, softcap=None) -> Tensor:
    """[R, V + 1] float64: what lies below each token."""
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None].double() if isinstance(temperature, Tensor) else temperature)
    return torch.cat([z.new_zeros(len(z), 1), z.softmax(-1).cumsum(-1)], 1)


@pytest.fixture(params=["kernel", "reference", "triton"])
def on(request, monkeypatch, triton_device):
    """The device of the kernels that the public function now builds on."""
    if request.param == "triton":
        monkeypatch.setattr("qrm_fast.ops.linear_sample._linear_sample", triton_kernels.forward)
    elif request.param == "reference":
        monkeypatch.setattr("qrm_fast.ops.linear_sample._linear_sample", _linear_sample.reference)
    return triton_device if request.param == "triton" else "cpu"


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_where_the_distribution_function_passes_the_uniform(dtype, shape, case, on, request):
    if request.node.callspec.params["on"] == "triton":
        if dtype == torch.float64:
            pytest.skip("CUDA takes no float64")
        if not torch.cuda.is_available():  # the interpreter is slow
            shape = min(shape[0], 3), shape[1], shape[2]
    hidden, weight, uniforms = inputs(shape, dtype, on)
    options = options_of(case, hidden, weight)
    tokens, logprobs = linear_sample(hidden, weight, uniforms, **options)
    upto = distribution(hidden, weight, **options)
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    assert (upto.gather(1, tokens[:, None])[:, 0] <= uniforms + slack).all()
    assert (upto.gather(1, tokens[:, None] + 1)[:, 0] > uniforms - slack).all()
    expected = linear_logprobs(hidden, weight, tokens, **options).logprobs
    assert logprobs.dtype == expected.dtype
    torch.testing.assert_close(logprobs, expected)


def test_by_hand(on):
    """p = (1/8, 1/2, 0, 3/8), whose distribution function is 1/8, 5/8, 5/8, 1."""
    weight = torch.tensor([[1.0], [4.0], [0.0], [3.0]], device=on).log()
    uniforms = torch.tensor([0.0, 0.124, 0.126, 0.624, 0.626, 0.999], dtype=torch.float64)
    tokens, logprobs = linear_sample(torch.ones(6, 1, device=on), weight, uniforms.to(on))
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3]
    torch.testing.assert_close(logprobs.exp().cpu(), torch.tensor([1, 1, 4, 4, 3, 3]) / 8)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_logprob_has_the_bits_of_linear_logprobs(dtype, case):
    for shape in SHAPES:
        hidden, weight, uniforms = inputs(shape, dtype)
        options = options_of(case, hidden, weight)
        tokens, logprobs = linear_sample(hidden, weight, uniforms, **options)
        assert torch.equal(logprobs, linear_logprobs(hidden, weight, tokens, **options).logprobs)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_logprob_has_the_bits_of_linear_logprobs_by_triton(dtype, case, triton_device):
    hidden, weight, uniforms = inputs((66, 72, 2500), dtype, triton_device)
    options = options_of(case, hidden, weight)
    number, rows = options.get("temperature", 1.0), None
    if isinstance(number, Tensor):
        number, rows = 1.0, number
    head = options.get("bias"), number, rows, options.get("softcap")
    tokens, logprobs = triton_kernels.forward(hidden, weight, uniforms, *head)
    assert torch.equal(logprobs, triton_logprobs.forward(hidden, weight, tokens, *head, -100)[0])


def test_frequencies():
    """400,000 draws: chi-squared within 4 standard deviations of its mean."""
    num, vocab = 400_000, 1000
    hidden, weight, _ = inputs((1, 8, vocab))
    uniforms = torch.rand(num, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens, _ = linear_sample(hidden.expand(num, -1), weight, uniforms)
    expected = distribution(hidden, weight).diff()[0] * num
    often = expected > 5
    chi_squared = ((tokens.bincount(minlength=vocab) - expected) ** 2 / expected)[often].sum()
    degrees = int(often.sum()) - 1
    assert abs(chi_squared - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("u", [0.0, math.nextafter(1.0, 0.0)])
def test_a_token_of_probability_0_is_never_drawn(u, on):
    weight = torch.full((1500, 1), -math.inf, device=on)
    weight[[700, 701, 1202]] = 0.0
    tokens, logprobs = linear_sample(
        torch.ones(3, 1, device=on), weight, torch.full((3,), u, dtype=torch.float64, device=on)
    )
    assert (tokens == (700 if u == 0 else 1202)).all()
    torch.testing.assert_close(logprobs.cpu(), torch.full((3,), -math.log(3.0)))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(poison, on):
    hidden, weight, uniforms = inputs((20, 8, 700), device=on)
    clean = linear_sample(hidden, weight, uniforms)
    hidden[7] = poison
    tokens, logprobs = linear_sample(hidden, weight, uniforms)
    assert logprobs[7].isnan() and (tokens >= 0).all() and (tokens < 700).all()
    kept = torch.arange(20, device=on) != 7
    assert torch.equal(tokens[kept], clean.tokens[kept]) and torch.equal(logprobs[kept], clean.logprobs[kept])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_own_row_only(dtype):
    hidden, weight, uniforms = inputs((70, 40, 3000), dtype)
    whole = linear_sample(hidden, weight, uniforms)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, linear_sample(hidden, weight, uniforms), whole))
    finally:
        torch.set_num_threads(threads)
    for rows in slice(0, 1), slice(5, 30), slice(5, 41), slice(69, 70):
        alone = linear_sample(hidden[rows], weight, uniforms[rows])
        assert torch.equal(alone.tokens, whole.tokens[rows]) and torch.equal(alone.logprobs, whole.logprobs[rows])


def test_strided_rows_and_no_rows(on):
    hidden, weight, uniforms = inputs((20, 16, 300), device=on)
    expected = linear_sample(hidden[:, 3:11].contiguous(), weight[:, 2:10].contiguous(), uniforms)
    assert all(map(torch.equal, linear_sample(hidden[:, 3:11], weight[:, 2:10], uniforms), expected))
    tokens, logprobs = linear_sample(hidden[:0], weight, uniforms[:0])
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64


def test_not_differentiable():
    hidden, weight, uniforms = inputs((4, 8, 30))
    with pytest.raises(RuntimeError, match="is not differentiable"):
        linear_sample(hidden.requires_grad_(), weight, uniforms).logprobs.sum().backward()


def test_opcheck():
    hidden, weight, uniforms = inputs((9, 8, 130))
    torch.library.opcheck(_linear_sample.op, (hidden, weight, uniforms, weight[:, 0], 0.7, None, 5.0))
    torch.library.opcheck(_linear_sample.op, (hidden.bfloat16(), weight.bfloat16(), uniforms, None, 1.0, None, None))


def test_compiles_whole_and_for_any_number_of_rows():
    compiled = torch.compile(linear_sample, fullgraph=True, dynamic=True)
    for shape in (9, 8, 130), (31, 8, 130):
        hidden, weight, uniforms = inputs(shape)
        eager = linear_sample(hidden, weight, uniforms, temperature=0.7)
        assert all(map(torch.equal, compiled(hidden, weight, uniforms, temperature=0.7), eager))


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_nothing_waits_on_cuda_and_a_graph_captures_it():
    hidden, weight, uniforms = inputs((40, 64, 5000), torch.bfloat16, "cuda")
    linear_sample(hidden, weight, uniforms)
    torch.cuda.set_sync_debug_mode("error")
    direct = linear_sample(hidden, weight, uniforms)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, replayed(lambda: linear_sample(hidden, weight, uniforms)), direct))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, r"uniforms must be \[T\] float64, got \[4\] float32", {"uniforms": torch.rand(4)}),
        (ValueError, "uniforms must be .* with T = 4, got", {"uniforms": torch.rand(5, dtype=torch.float64)}),
        (
            ValueError,
            r"uniforms must be in \[0, 1\), got 1 at row 2",
            {"uniforms": torch.tensor([0, 0.5, 1, 0]).double()},
        ),
        (ValueError, r"uniforms must be in \[0, 1\), got nan", {"uniforms": torch.full((4,), math.nan).double()}),
        (ValueError, "temperature must be positive, got 0", {"temperature": 0}),
        (ValueError, "weight must have at least one row", {"weight": torch.zeros(0, 8)}),
        (TypeError, "weight must be .* float32", {"weight": torch.zeros(3, 8).bfloat16()}),
    ],
)
def test_bad_input(error, message, change):
    hidden, weight, uniforms = inputs((4, 8, 30))
    with pytest.raises(error, match=message):
        linear_sample(**{"hidden": hidden, "weight": weight, "uniforms": uniforms} | change)
