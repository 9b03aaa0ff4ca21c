"""linear_q_values against materialised logits in float64, a table worked by hand, and its promises about bits, ids."""

import math

import pytest
import torch
from accuracy import assert_no_further
from cuda_graph import replayed
from torch import Tensor

from qrm_fast import linear_logprobs, linear_q_values, token_q
from qrm_fast.ops.linear_q_values import QValues, _linear_q_values
from qrm_fast.triton import linear_q_values as triton_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # rows past the last, non-finite rows
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ["policy_hidden", "policy_weight", "q_hidden", "q_weight"]
# Depths that differ and are odd, vocabularies around the blocks of both kernels; rows beyond one block.
SHAPES = [(5, 8, 4, 1), (2, 3, 20, 2), (63, 20, 33, 127), (0, 16, 16, 1100), (160, 17, 40, 2176), (9, 520, 24, 3000)]
LARGE = [(3, 5, 4, v) for v in (17, 1000, 1100, 1280, 32000, 50257, 151936, 152064)] + [
    (1, 4, 5, 17),
    (65537, 2, 3, 17),
]
OPTIONS = {"plain": {}, "everything": {"temperature": True, "beta": 0.3}}


def problem(t, dp, dq, v, dtype, temperature=1.0, beta=1.0):
    """Random heads whose logits reach about +-15; one row in seven is ignored, the first among them."""
    g = torch.Generator().manual_seed(t + v)
    tensors = {
        "policy_hidden": torch.randn(t, dp, generator=g).to(dtype),
        "policy_weight": (torch.randn(v, dp, generator=g) * 4 / dp**0.5).to(dtype),
        "q_hidden": torch.randn(t, dq, generator=g).to(dtype),
        "q_weight": (torch.randn(v, dq, generator=g) * 4 / dq**0.5).to(dtype),
    }
    targets = torch.randint(v, (t,), generator=g)
    if t > 1:
        targets[::7] = -100
    if temperature is True:
        temperature = torch.rand(t, generator=g).to(torch.promote_types(dtype, torch.float32)) + 0.5
    return tensors | {"targets": targets, "temperature": temperature, "beta": beta}


def cast(arguments, dtype):
    return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


def oracle(policy_hidden, policy_weight, q_hidden, q_weight, targets, temperature=1.0, beta=1.0):
    """Both heads materialised."""
    z = policy_hidden @ policy_weight.T / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp, q = z.log_softmax(-1), q_hidden @ q_weight.T
    keep = targets != -100
    taken = targets.where(keep, 0)[:, None]
    results = (
        logp.gather(-1, taken)[:, 0],
        -(logp.exp() * logp).sum(-1),
        q.gather(-1, taken)[:, 0],
        (logp.exp() * q).sum(-1),
        beta * (q / beta).logsumexp(-1),
    )
    return [torch.where(keep, x, 0) for x in results]


def assert_as_accurate(function, dtype, problems):
    """Over all rows no further from float64 than both heads in float32 (float64: to 1e-12)."""
    acc = torch.promote_types(dtype, torch.float32)
    runs = [(function(**p), oracle(**cast(p, torch.float64)), oracle(**cast(p, acc))) for p in problems]
    for i, name in enumerate(QValues._fields):
        got, exact, peer = (torch.cat([run[k][i] for run in runs]) for k in range(3))
        assert got.dtype == acc, name
        assert_no_further(got, exact, peer)
    for logprobs, entropy, *_ in (run[0] for run in runs):
        assert (logprobs <= 0).all() and (entropy >= 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_two_heads_in_float32(dtype, options):
    assert_as_accurate(linear_q_values, dtype, [problem(*shape, dtype, **options) for shape in SHAPES])


def test_sizes_in_use():
    assert_as_accurate(linear_q_values, torch.float32, [problem(*shape, torch.float32) for shape in LARGE])


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_large_logits(level):
    """Both heads near +-100, one entry of each 90 above the others: nothing overflows, logp is exact and at most 0."""
    generator = torch.Generator().manual_seed(0)
    policy_weight, q_weight = level + torch.rand(2, 1100, 1, generator=generator)
    policy_weight[7] += 90
    q_weight[9] += 90
    p = {"policy_weight": policy_weight, "q_weight": q_weight, "targets": torch.tensor([7, 8, 9])}
    p |= {"policy_hidden": torch.ones(3, 1), "q_hidden": torch.ones(3, 1)}
    got, want = linear_q_values(**p), oracle(**cast(p, torch.float64))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-30)
    assert (got.logprobs <= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_reaches_what_depends_on_it(name):
    """One element of a row or of a column of either head; what does not read it stays finite."""
    p = problem(40, 24, 40, 3000, torch.float32, beta=0.5)
    p[name][5, 3] = math.nan
    for got, want in zip(linear_q_values(**p), oracle(**cast(p, torch.float64)), strict=True):
        assert torch.equal(got.isnan(), want.isnan())


def test_more_than_2_31_logits():
    """All but the first and the last rows are ignored."""
    p = problem(65537, 3, 2, 32800, torch.float32)
    rows = torch.cat([torch.arange(50), torch.arange(65487, 65537)])
    p["targets"] = torch.full((65537,), -100).index_fill(0, rows, 32799)
    some = {k: x[rows] if isinstance(x, Tensor) and "weight" not in k else x for k, x in p.items()}
    for x, y in zip(linear_q_values(**p), linear_q_values(**some), strict=True):
        assert torch.equal(x[rows], y) and (x[50:65487] == 0).all()


def assert_table(op):
    """p = [1/8, 1/4, 5/8] under logits [0, log 2, log 5], Q = [8, -4, 0]; the second row is ignored."""
    hidden = torch.tensor([[1.0, 0.0], [math.nan, math.nan]])
    policy_weight = torch.tensor([[0.0, 0], [math.log(2), 1], [math.log(5), -1]])
    q_weight = torch.tensor([[8.0], [-4.0], [0.0]])
    got = op(hidden, policy_weight, hidden[:, :1], q_weight, torch.tensor([1, -100]), 1.0, None, 4.0, -100)
    entropy = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    soft_value = 4 * math.log(math.exp(2) + math.exp(-1) + 1)
    want = torch.tensor([[x, 0] for x in (-math.log(4), entropy, -4, 1 - 1, soft_value)])
    torch.testing.assert_close(torch.stack(got).cpu(), want)


@pytest.mark.parametrize("op", [_linear_q_values, _linear_q_values.reference], ids=["kernel", "reference"])
def test_table(op):
    assert_table(op)


def test_agrees_with_the_ops_for_each_head():
    p = problem(40, 24, 40, 3000, torch.bfloat16, **OPTIONS["everything"])
    out = linear_q_values(**p)
    policy = linear_logprobs(p["policy_hidden"], p["policy_weight"], p["targets"], temperature=p["temperature"])
    torch.testing.assert_close(out[:2], policy[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.q, token_q(p["q_hidden"], p["q_weight"], p["targets"]), rtol=1e-6, atol=1e-6)


def assert_rows_stand_alone(function, t, v, dtype):
    """Reordered, alone, and with something else between the rows in memory: the same bits; so for strided weights."""
    p = problem(t, 24, 40, v, dtype, **OPTIONS["everything"])
    everything = function(**p)
    for rows in torch.randperm(t), torch.tensor([t - 2]):
        part = {k: x[rows] if isinstance(x, Tensor) and "weight" not in k else x for k, x in p.items()}
        for name in NAMES:
            wide = torch.full((len(part[name]), 2, part[name].shape[1] + 8), math.nan, dtype=dtype)
            wide[:, 1, : part[name].shape[1]] = part[name]
            part[name] = wide[:, 1, : part[name].shape[1]]
        for x, y in zip(everything, function(**part), strict=True):
            assert torch.equal(x[rows], y)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_depend_on_the_row_alone(dtype):
    threads = torch.get_num_threads()
    for n in 1, 3:
        torch.set_num_threads(n)
        assert_rows_stand_alone(linear_q_values, 300, 2100, dtype)
    torch.set_num_threads(threads)


def assert_non_finite_rows_stay_alone(function, v):
    """A column that the policy masks (-inf) may hold any Q; a row of NaN is NaN; no other row changes."""
    p = problem(9, 8, 8, v, torch.float32)
    p["policy_hidden"][:, 0] = 1
    p["policy_weight"][v - 1] = 0
    p["policy_weight"][v - 1, 0] = -math.inf
    p["q_weight"][v - 1] = 50
    p["targets"].clamp_(max=v - 2)
    out = function(**p)
    kept = {k: x[:-1] if "weight" in k else x for k, x in p.items()}
    for got, want in zip(out[:4], oracle(**cast(kept, torch.float64))[:4], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    dirty = p | {"policy_hidden": p["policy_hidden"].clone(), "q_hidden": p["q_hidden"].clone()}
    dirty["policy_hidden"][1], dirty["q_hidden"][2], dirty["q_hidden"][0] = math.nan, math.nan, math.nan
    got = function(**dirty)
    for x, y in zip(out, got, strict=True):
        assert torch.equal(x[[0, 3, 4, 5, 6, 7, 8]], y[[0, 3, 4, 5, 6, 7, 8]])
    assert all(got[i][1].isnan() for i in (0, 1, 3)) and all(got[i][2].isnan() for i in (2, 3, 4))


def test_non_finite_rows_stay_alone():
    assert_non_finite_rows_stay_alone(linear_q_values, 700)


def test_not_differentiable():
    p = problem(3, 4, 4, 5, torch.float32)
    p["q_hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="is not differentiable"):
        linear_q_values(**p).q.sum().backward()


def test_opcheck():
    for options in OPTIONS.values():
        *tensors, targets, temperature, beta = problem(7, 5, 4, 11, torch.float32, **options).values()
        per_row = temperature if isinstance(temperature, Tensor) else None
        torch.library.opcheck(_linear_q_values.op, (*tensors, targets, 0.9, per_row, beta, -100))


def test_compiles_for_any_length():
    compiled = torch.compile(linear_q_values, fullgraph=True, dynamic=True)
    for t, stance in (12, "default"), (30, "fail_on_recompile"):
        p = problem(t, 8, 20, 40, torch.float32, beta=0.5)
        with torch.compiler.set_stance(stance):
            got = compiled(**p)
        assert all(torch.equal(x, y) for x, y in zip(got, linear_q_values(**p), strict=True))


def test_autocast_behaves_as_for_linear():
    p = problem(9, 16, 8, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_q_values(**p)
    assert all(torch.equal(x, y) for x, y in zip(inside, linear_q_values(**cast(p, torch.bfloat16)), strict=True))


@pytest.fixture
def by_triton(triton_device):
    def function(*, temperature=1.0, beta=1.0, **tensors):
        per_row = isinstance(temperature, Tensor)
        arguments = [x if triton_device == "cpu" else x.to(triton_device) for x in tensors.values()]
        number, rows = (1.0, temperature.to(triton_device)) if per_row else (temperature, None)
        return [x.cpu() for x in triton_kernels.forward(*arguments, number, rows, beta, -100)]

    return function


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, "everything"), (torch.bfloat16, "plain"), (torch.float16, "everything")],
    ids=str,
)
def test_triton_no_further_from_float64_than_two_heads_in_float32(by_triton, dtype, options):
    """The float32 problem is small: its blocks are."""
    shapes = [(5, 8, 4, 1), (0, 8, 8, 5), (63, 20, 33, 127)]
    shapes.append((9, 24, 40, 300) if dtype == torch.float32 else (9, 72, 40, 2176))
    assert_as_accurate(by_triton, dtype, [problem(*shape, dtype, **OPTIONS[options]) for shape in shapes])


def test_triton_table(triton_device):
    assert_table(lambda *a: triton_kernels.forward(*(x.to(triton_device) if isinstance(x, Tensor) else x for x in a)))


@pytest.mark.unpoisoned
def test_triton_bits_of_a_row_depend_on_the_row_alone(by_triton):
    assert_rows_stand_alone(by_triton, 130, 200, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_folds_agree(dtype, by_triton, triton_device, monkeypatch):
    """csrc/cuda's, where it serves, and Triton's: Q of a target to the bit, over several of their splits."""
    p = problem(150, 72, 40, 4300, dtype, **OPTIONS["everything"])
    if not triton_kernels.compiled(*(p[name].to(triton_device) for name in NAMES)):
        pytest.skip("no compiled fold for this device")
    ours = by_triton(**p)
    monkeypatch.setattr(triton_kernels, "compiled", lambda *_: False)
    others = by_triton(**p)
    torch.testing.assert_close(ours, others, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours[2], others[2])


def test_triton_non_finite_rows_stay_alone(by_triton):
    assert_non_finite_rows_stay_alone(by_triton, 200)


@pytest.mark.parametrize("op", ["triton", "reference"])
def test_targets_outside_where_a_kernel_cannot_raise(by_triton, op):
    """NaN in every field of that row."""
    p = problem(9, 8, 8, 50, torch.float32)
    p["targets"] = torch.tensor([50, 1, -1, 2, -101, 3, 2**40, 49, -100])
    *tensors, targets, _, _ = p.values()
    reference = _linear_q_values.reference
    got = by_triton(**p) if op == "triton" else reference(*tensors, targets, 1.0, None, 1.0, -100)
    for x in got:
        assert x.isnan().tolist() == [True, False] * 3 + [True, False, False] and x[8] == 0


@pytest.mark.gpu
def test_public_function_on_cuda_runs_the_triton_kernels_without_waiting(by_triton):
    p = problem(300, 72, 136, 5000, torch.bfloat16, **OPTIONS["everything"])
    want = by_triton(**p)
    p = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in p.items()}
    for f in linear_q_values, torch.compile(linear_q_values, fullgraph=True, dynamic=True):
        f(**p)
        torch.cuda.set_sync_debug_mode("error")
        got = f(**p)
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want, strict=True))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(replayed(lambda: linear_q_values(**p)), want, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_logits_on_cuda():
    p = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in problem(16384, 64, 72, 152064, torch.bfloat16).items()}
    rows = torch.cat([torch.arange(50), torch.arange(16334, 16384)]).cuda()
    some = {k: x[rows] if isinstance(x, Tensor) and "weight" not in k else x for k, x in p.items()}
    for x, y in zip(linear_q_values(**p), oracle(**cast(some, torch.float64)), strict=True):
        torch.testing.assert_close(x[rows].double(), y, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy_hidden": torch.zeros(4)}, ValueError, r"policy_hidden must be \[T, Dp\] .*, got \[4\] float32"),
        (
            {"policy_weight": torch.zeros(5, 4)},
            ValueError,
            r"policy_weight must be \[V, Dp\] .* with Dp = 3, got \[5, 4\]",
        ),
        ({"policy_weight": torch.zeros(0, 3), "q_weight": torch.zeros(0, 2)}, ValueError, "at least one row"),
        ({"q_hidden": torch.zeros(4, 2).bfloat16()}, TypeError, "q_hidden must be .* float32, got .* bfloat16"),
        ({"q_weight": torch.zeros(6, 2)}, ValueError, r"q_weight must be \[V, Dq\] float32 with V = 5, got \[6, 2\]"),
        ({"q_weight": torch.zeros(2, 5).T}, ValueError, "q_weight must be dense in its last dimension"),
        ({"targets": torch.zeros(4)}, TypeError, r"targets must be \[T\] int64, got \[4\] float32"),
        ({"targets": torch.tensor([0, 1, 5, 2])}, ValueError, r"targets must be in \[0, 5\) or -100, got 5 at row 2"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"beta": -1.0}, ValueError, "beta must be positive, got -1.0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "policy_hidden": torch.zeros(4, 3),
        "policy_weight": torch.zeros(5, 3),
        "q_hidden": torch.zeros(4, 2),
        "q_weight": torch.zeros(5, 2),
        "targets": torch.tensor([0, 1, 2, -100]),
    }
    with pytest.raises(error, match=message):
        linear_q_values(**(arguments | change))
