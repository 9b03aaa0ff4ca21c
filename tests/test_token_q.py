"""token_q against plain autograd in float64, tables worked out by hand, and its promises about bits, masks and ids."""

import math

import pytest
import torch
from grids import NUM_ROWS
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import qrm_fast
from qrm_fast.ops.token_q import _token_q, _token_q_backward
from qrm_fast.triton import token_q as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {  # gathered head, bias, final norm
    "scalar": (False, False, False),
    "scalar-bias-norm": (False, True, True),
    "gathered": (True, False, False),
    "gathered-bias-norm": (True, True, True),
}
# Rows around the block of the backward sums (128), columns around the lanes of the dot product (64). One column is left
# to the table: there the norm's gradient is nothing but cancellation.
SHAPES = [*((num_tokens, 40, 7) for num_tokens in NUM_ROWS), (300, 2, 1), (300, 63, 3), (300, 65, 290), (40, 1000, 5)]


def problem(num_tokens, dim, num_ids, dtype, form, seed=0):
    """Arguments of token_q; one row in eight is ignored in the gathered form."""
    gathered, bias, norm = FORMS[form]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    num_ids = num_ids if gathered else 1
    targets = torch.randint(num_ids, (num_tokens,), generator=g)
    targets[torch.rand(num_tokens, generator=g) < 1 / 8] = -100
    return {
        "hidden": normal(num_tokens, dim),
        "head": normal(num_ids, dim),
        "targets": targets if gathered else None,
        "bias": normal(num_ids) if bias else None,
        "norm_weight": 1 + normal(dim) / 4 if norm else None,
    }


def oracle(hidden, head, targets=None, *, bias=None, norm_weight=None, norm_eps=1e-6):
    x = hidden
    if norm_weight is not None:
        x = norm_weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm_eps))
    if targets is None:
        targets = torch.zeros(len(hidden), dtype=torch.int64)
    counted = targets != -100
    ids = targets[counted]
    q = (x[counted] * head[ids]).sum(-1) + (0 if bias is None else bias[ids])
    return torch.zeros(len(hidden), dtype=q.dtype).index_put((counted,), q)


def results(f, arguments, dtype, grad_q):
    """q and the gradients of every floating argument, computed by `f` in `dtype`."""
    arguments = {
        k: v.to(dtype).clone().requires_grad_() if v is not None and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    q = f(**arguments)
    inputs = [v for v in arguments.values() if v is not None and v.requires_grad]
    return [q.detach(), *torch.autograd.grad(q, inputs, grad_q.to(q.dtype))]


def rms(x):
    return x.double().square().mean().sqrt()


def assert_no_further(dtype, problems, token_q=qrm_fast.token_q, slack=1.0):
    """q and its gradients are no further from float64 than autograd in float32, rounded once to `dtype`.

    Root mean square over all problems, relative to each one's values (or to 1, where a few of them nearly cancel): on
    a single short problem the worse path is often right by luck. One rounding to the result's dtype is granted, as in
    accuracy.py.
    """
    errors = []  # [problems, outputs, ours and PyTorch's]
    for arguments in problems:
        grad_q = torch.randn(len(arguments["hidden"]), generator=torch.Generator().manual_seed(1))
        ours = results(token_q, arguments, dtype, grad_q)
        exact = results(oracle, arguments, torch.float64, grad_q)
        eager = results(oracle, arguments, torch.float32, grad_q)
        assert [x.dtype for x in ours] == [torch.float32] + [dtype] * (len(exact) - 1)
        assert [x.shape for x in ours] == [x.shape for x in exact]
        errors.append(
            [
                [rms(x - want) / max(rms(want), 1) for x in (got, peer.to(got.dtype))] if want.numel() else [0, 0]
                for got, want, peer in zip(ours, exact, eager, strict=True)
            ]
        )
    rounding = torch.tensor([torch.finfo(x.dtype).eps for x in ours])
    error, peer_error = torch.tensor(errors).square().mean(0).sqrt().unbind(1)
    assert (error <= slack * peer_error.maximum(rounding)).all(), (
        f"off by {error}, PyTorch by {peer_error}, {rounding=}"
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_autograd(dtype, form):
    assert_no_further(dtype, [problem(*shape, dtype, form, seed) for shape in SHAPES for seed in range(4)])


def test_scalar_table():
    hidden = torch.tensor([[1.0, 2], [3, -1], [0, 0]], requires_grad=True)
    head = torch.tensor([2.0, -1], requires_grad=True)
    bias = torch.tensor([0.5], requires_grad=True)
    q = qrm_fast.token_q(hidden, head, bias=bias)
    assert q.tolist() == [0.5, 7.5, 0.5]
    assert torch.equal(q, qrm_fast.token_q(hidden, head[None], bias=bias))
    q.backward(torch.tensor([1.0, 2, 5]))
    assert hidden.grad.tolist() == [[2, -1], [4, -2], [10, -5]]
    assert head.grad.tolist() == [7, 0]
    assert bias.grad.tolist() == [8]


def test_gathered_table():
    hidden = torch.tensor([[1.0, 2], [3, -1], [5, 5], [1, 1]], requires_grad=True)
    head = torch.tensor([[1.0, 0], [0, 1], [2, 2]], requires_grad=True)
    bias = torch.tensor([1.0, 0, -1], requires_grad=True)
    q = qrm_fast.token_q(hidden, head, torch.tensor([2, 0, -100, 2]), bias=bias)
    assert q.tolist() == [5, 4, 0, 3]
    q.backward(torch.tensor([1.0, 2, 3, 4]))
    assert hidden.grad.tolist() == [[2, 2], [2, 0], [0, 0], [8, 8]]
    assert head.grad.tolist() == [[6, -2], [0, 0], [5, 6]]
    assert bias.grad.tolist() == [2, 0, 5]


def test_norm_table():
    """mean(3^2, 4^2) + 12.5 = 5^2."""
    norm_weight = torch.tensor([1.0, 2], requires_grad=True)
    head = torch.tensor([1.0, 1], requires_grad=True)
    q = qrm_fast.token_q(torch.tensor([[3.0, 4]]), head, norm_weight=norm_weight, norm_eps=12.5)
    torch.testing.assert_close(q, torch.tensor([11 / 5]))
    q.sum().backward()
    torch.testing.assert_close(norm_weight.grad, torch.tensor([3 / 5, 4 / 5]))
    torch.testing.assert_close(head.grad, torch.tensor([3 / 5, 8 / 5]))


@pytest.mark.parametrize("norm_class", [Qwen2RMSNorm, LlamaRMSNorm])
def test_norm_is_that_of_transformers(norm_class):
    norm = norm_class(16, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    head = torch.nn.Linear(16, 1)
    hidden = torch.randn(5, 16)
    q = qrm_fast.token_q(hidden, head.weight, bias=head.bias, norm_weight=norm.weight, norm_eps=1e-5)
    torch.testing.assert_close(q, head(norm(hidden))[:, 0])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    arguments = problem(6, 5, 3, torch.float64, form)
    inputs = [v.requires_grad_() for v in arguments.values() if v is not None and v.is_floating_point()]

    def f(*inputs):
        values = iter(inputs)
        return qrm_fast.token_q(
            **{k: next(values) if k != "targets" and v is not None else v for k, v in arguments.items()}
        )

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("targets", ["one", "all", "few"])
def test_sums_of_actions_that_cross_blocks(targets):
    """The head's gradient where one action fills every block, where none repeats, and where few end inside a block."""
    g = torch.Generator().manual_seed(2)
    problems = [problem(1000, 24, 1000, torch.float32, "gathered-bias-norm", seed) for seed in range(8)]
    for arguments in problems:
        arguments["targets"] = {
            "one": torch.full((1000,), 3),
            "all": torch.randperm(1000, generator=g),
            "few": torch.randint(5, (1000,), generator=g),
        }[targets]
    assert_no_further(torch.float32, problems)


@pytest.mark.parametrize("needed", ["hidden", "head", "bias", "norm_weight"])
def test_each_gradient_alone(needed):
    arguments = problem(200, 40, 7, torch.float32, "gathered-bias-norm")
    grad_q = torch.randn(200)
    everything = results(qrm_fast.token_q, arguments, torch.float32, grad_q)[1:]
    leaf = arguments[needed].clone().requires_grad_()
    (grad,) = torch.autograd.grad(qrm_fast.token_q(**{**arguments, needed: leaf}), leaf, grad_q)
    assert torch.equal(grad, everything[["hidden", "head", "bias", "norm_weight"].index(needed)])


def assert_idle_rows_never_leak(token_q, arguments):
    """NaN in a row that is ignored, or whose upstream gradient is 0, reaches no gradient."""
    num_tokens = len(arguments["hidden"])
    grad_q = torch.randn(num_tokens)
    ignored = (
        torch.zeros(num_tokens, dtype=torch.bool) if arguments["targets"] is None else arguments["targets"] == -100
    )
    idle = torch.arange(num_tokens) % 3 == 0
    grad_q[idle] = 0
    clean = results(token_q, arguments, torch.float32, grad_q)
    arguments["hidden"][idle | ignored] = math.nan
    dirty = results(token_q, arguments, torch.float32, grad_q)
    assert dirty[0][idle & ~ignored].isnan().all() and (dirty[0][ignored] == 0).all()
    for a, b in zip(clean[1:], dirty[1:], strict=True):
        assert torch.equal(a, b)
    assert (dirty[1][idle | ignored] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_upstream_gradient_never_leak(form):
    assert_idle_rows_never_leak(qrm_fast.token_q, problem(150, 40, 7, torch.float32, form))


def assert_rows_stand_alone(token_q, arguments, dtype):
    """Rows shuffled, one by one, and in parts keep their bits."""
    num_tokens = len(arguments["hidden"])
    grad_q = torch.randn(num_tokens)
    q, dhidden, *_ = results(token_q, arguments, dtype, grad_q)
    order = torch.randperm(num_tokens)
    for rows in order, order[:1], order[:7], torch.arange(num_tokens // 3, num_tokens - 2):
        part = {**arguments, "hidden": arguments["hidden"][rows]}
        if part["targets"] is not None:
            part["targets"] = part["targets"][rows]
        q_part, dhidden_part, *_ = results(token_q, part, dtype, grad_q[rows])
        assert torch.equal(q_part, q[rows]) and torch.equal(dhidden_part, dhidden[rows])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_the_row_alone(dtype, form):
    assert_rows_stand_alone(qrm_fast.token_q, problem(301, 200, 9, dtype, form), dtype)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("form", ["scalar-bias-norm", "gathered-bias-norm"])
def test_bits_do_not_depend_on_threads(form):
    arguments = problem(1000, 700, 9, torch.float32, form)
    grad_q = torch.randn(1000)
    threads = torch.get_num_threads()
    runs = []
    for n in 1, 2, 3:
        torch.set_num_threads(n)
        runs.append(results(qrm_fast.token_q, arguments, torch.float32, grad_q))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def assert_strided_as_dense(token_q, arguments):
    grad_q = torch.randn(len(arguments["hidden"]))
    dense = results(token_q, arguments, torch.bfloat16, grad_q)
    for i, name in enumerate(["hidden", "head"]):
        x = arguments[name]
        wide = torch.full((2 * len(x), x.shape[1] + 3), math.nan, dtype=x.dtype)
        wide[::2, 1:-2] = x
        leaf = wide[::2, 1:-2].requires_grad_()
        q = token_q(**{**arguments, name: leaf})
        (grad,) = torch.autograd.grad(q, leaf, grad_q)
        assert torch.equal(q, dense[0]) and torch.equal(grad, dense[1 + i])


@pytest.mark.parametrize("form", ["scalar-bias-norm", "gathered-bias-norm"])
def test_strided_rows_are_read_in_place(form):
    assert_strided_as_dense(qrm_fast.token_q, problem(50, 33, 7, torch.bfloat16, form))


@pytest.mark.unpoisoned
def test_offsets_beyond_32_bits():
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))  # two touched pages of 4 GiB
    far.fill_(1)
    far[1] = 2
    ones = torch.ones(64, dtype=torch.bfloat16)
    assert qrm_fast.token_q(far, ones).tolist() == [64, 128]
    assert qrm_fast.token_q(ones.expand(3, 64), far, torch.tensor([1, 0, 1])).tolist() == [128, 64, 128]


def test_autocast_casts_as_linear_does():
    arguments = problem(9, 40, 7, torch.float32, "gathered-bias-norm")
    grad_q = torch.randn(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(qrm_fast.token_q, arguments, torch.float32, grad_q)
        double = qrm_fast.token_q(torch.ones(1, 2).double(), torch.ones(2).double())
    want = results(qrm_fast.token_q, arguments, torch.bfloat16, grad_q)
    assert double.dtype == torch.float64
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_second_derivative_raises():
    hidden = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(qrm_fast.token_q(hidden, torch.randn(4)).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("form", ["scalar", "gathered-bias-norm"])
def test_opcheck(form):
    arguments = problem(5, 4, 3, torch.float32, form)
    hidden, head, targets, bias, norm_weight = arguments.values()
    backward = torch.randn(5), hidden, head, targets, norm_weight, 1e-6
    for needs in (True, True, True, norm_weight is not None), (False,) * 4:
        torch.library.opcheck(_token_q_backward, (*backward, *needs))
    leaves = [x if x is None else x.clone().requires_grad_() for x in (hidden, head, bias, norm_weight)]
    torch.library.opcheck(_token_q, (*leaves[:2], targets, *leaves[2:], 1e-6))


def test_compiles_forward_and_backward_with_one_graph_for_every_length():
    compiled = torch.compile(qrm_fast.token_q, fullgraph=True, dynamic=True)
    for num_tokens, stance in (17, "default"), (64, "fail_on_recompile"):
        arguments = problem(num_tokens, 40, 7, torch.float32, "gathered-bias-norm")
        grad_q = torch.randn(num_tokens)
        with torch.compiler.set_stance(stance):
            got = results(compiled, arguments, torch.float32, grad_q)
        for a, b in zip(got, results(qrm_fast.token_q, arguments, torch.float32, grad_q), strict=True):
            assert torch.equal(a, b)


LUCK = 1.5  # the interpreter is slow: too few problems for the luck of single sums to average out


class ByTriton(torch.autograd.Function):
    """The op through the launchers of its Triton kernels: on the GPU, or in the interpreter."""

    @staticmethod
    def forward(ctx, device, hidden, head, targets, bias, norm_weight):
        arguments = [x if x is None else x.to(device) for x in (hidden, head, targets, bias, norm_weight)]
        ctx.arguments = arguments
        return triton_kernels.forward(*arguments, 1e-6).to(hidden.device)

    @staticmethod
    def backward(ctx, grad_q):
        hidden, head, targets, bias, norm_weight = ctx.arguments
        needs = [True, True, bias is not None, norm_weight is not None]
        grads = triton_kernels.backward(grad_q.to(hidden.device), hidden, head, targets, norm_weight, 1e-6, *needs)
        dhidden, dhead, dbias, dnorm = (
            g.to(grad_q.device) if need else None for g, need in zip(grads, needs, strict=True)
        )
        return None, dhidden, dhead, None, dbias, dnorm


@pytest.fixture
def by_triton(triton_device, monkeypatch):
    """token_q through the launchers, with sums over rows cut into blocks of 16 rows instead of 128."""
    monkeypatch.setattr(triton_kernels, "BLOCK_ROWS", 16)
    return lambda hidden, head, targets=None, *, bias=None, norm_weight=None: ByTriton.apply(
        triton_device, hidden, head, targets, bias, norm_weight
    )


@pytest.mark.parametrize(
    "dtype, form", [*((torch.float32, form) for form in FORMS), (torch.bfloat16, "gathered-bias-norm")], ids=str
)
def test_triton_no_further_from_float64_than_autograd(by_triton, dtype, form):
    """Rows around the blocks of both kinds (4 and 16), columns beyond one block of each kind (512 and 256)."""
    shapes = [(0, 8, 3), (1, 40, 7), (33, 40, 3), (64, 1, 2), (40, 65, 50), (9, 515, 4)]
    if FORMS[form][2]:
        shapes.remove((64, 1, 2))
    assert_no_further(
        dtype, [problem(*shape, dtype, form, seed) for shape in shapes for seed in range(2)], by_triton, LUCK
    )


@pytest.mark.parametrize("targets", ["one", "all", "few"])
def test_triton_sums_of_actions_that_cross_blocks(by_triton, targets):
    g = torch.Generator().manual_seed(3)
    problems = [problem(70, 24, 70, torch.float32, "gathered-bias-norm", seed) for seed in range(2)]
    for arguments in problems:
        arguments["targets"] = {
            "one": torch.full((70,), 69),
            "all": torch.randperm(70, generator=g),
            "few": torch.randint(3, (70,), generator=g) * 30,
        }[targets]
    assert_no_further(torch.float32, problems, by_triton, LUCK)


@pytest.mark.parametrize("form", FORMS)
def test_triton_rows_without_upstream_gradient_never_leak(by_triton, form):
    assert_idle_rows_never_leak(by_triton, problem(20, 40, 7, torch.float32, form))


@pytest.mark.unpoisoned
def test_triton_bits_of_a_row_depend_on_the_row_alone(by_triton):
    assert_rows_stand_alone(by_triton, problem(21, 70, 9, torch.bfloat16, "gathered-bias-norm"), torch.bfloat16)


def test_triton_reads_strided_rows_in_place(by_triton):
    assert_strided_as_dense(by_triton, problem(21, 33, 7, torch.bfloat16, "gathered-bias-norm"))


def test_triton_marks_targets_outside_the_head(by_triton):
    """NaN in that row of q and of hidden's gradient; nothing else is touched, and the head's last row is read."""
    arguments = problem(40, 8, 5, torch.float32, "gathered-bias-norm")
    outside = torch.arange(40) % 4 == 0
    wrong = torch.tensor([5, -1, -2, -101, 2**40]).repeat(2)
    arguments["targets"] = torch.arange(40).remainder(5).masked_scatter(outside, wrong)
    grad_q = torch.randn(40)
    q, dhidden, *others = results(by_triton, arguments, torch.float32, grad_q)
    assert q[outside].isnan().all() and dhidden[outside].isnan().all()
    inside = {**arguments, "hidden": arguments["hidden"][~outside], "targets": arguments["targets"][~outside]}
    want_q, want_dhidden, *want = results(by_triton, inside, torch.float32, grad_q[~outside])
    assert torch.equal(q[~outside], want_q) and torch.equal(dhidden[~outside], want_dhidden)
    for a, b in zip(others, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_public_function_on_cuda_runs_the_triton_kernels_without_waiting():
    arguments = problem(300, 700, 9, torch.bfloat16, "gathered-bias-norm")
    grad_q = torch.randn(300)
    want = results(lambda **a: ByTriton.apply("cuda", *a.values()), arguments, torch.bfloat16, grad_q)
    compiled = torch.compile(qrm_fast.token_q, fullgraph=True, dynamic=True)
    arguments = {k: v.cuda() for k, v in arguments.items()}
    for f in qrm_fast.token_q, compiled:
        results(f, arguments, torch.bfloat16, grad_q.cuda())
        torch.cuda.set_sync_debug_mode("error")
        got = results(f, arguments, torch.bfloat16, grad_q.cuda())
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_target_outside_the_head():
    hidden, head = torch.zeros(3, 4), torch.zeros(5, 4)
    for wrong in 5, -1, -101, 2**40:
        with pytest.raises(ValueError, match=rf"targets must be in \[0, V = 5\) or -100, got {wrong} in row 1"):
            qrm_fast.token_q(hidden, head, torch.tensor([0, wrong, 4]))


def test_bad_input():
    hidden, head, ids = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    gathered = dict(hidden=hidden, head=head, targets=ids)
    for error, sentence, change in [
        (TypeError, r"hidden must be a tensor \[T, D\], got list", dict(hidden=[[1.0]])),
        (ValueError, r"hidden must be \[T, D\] .*, got \[1, 3, 4\] float32", dict(hidden=hidden[None])),
        (TypeError, r"hidden must be \[T, D\] .*, got \[3, 4\] int64", dict(hidden=hidden.long())),
        (ValueError, "hidden must be dense in its last dimension, got stride 3", dict(hidden=torch.zeros(4, 3).T)),
        (TypeError, r"head must be \[V, D\] float32, got \[5, 4\] bfloat16", dict(head=head.bfloat16())),
        (ValueError, r"head must be \[V, D\] float32 with D = 4, got \[5, 3\]", dict(head=torch.zeros(5, 3))),
        (ValueError, r"head must be \[D\] or \[1, D\] without targets, got \[5, 4\]", dict(targets=None)),
        (ValueError, r"head must have at least one row, got \[0, D\]", dict(head=head[:0])),
        (TypeError, r"targets must be \[T\] int64, got \[3\] int32", dict(targets=ids.int())),
        (ValueError, r"targets must be \[T\] int64 with T = 3, got \[2\] int64", dict(targets=ids[:2])),
        (ValueError, r"bias must be \[V\] float32 with V = 5, got \[1\]", dict(bias=torch.zeros(1))),
        (ValueError, r"norm_weight must be \[D\] float32 with D = 4, got \[5\]", dict(norm_weight=torch.zeros(5))),
        (ValueError, "head must be on cpu", dict(head=head.to("meta"))),
    ]:
        with pytest.raises(error, match=sentence):
            qrm_fast.token_q(**{**gathered, **change})
