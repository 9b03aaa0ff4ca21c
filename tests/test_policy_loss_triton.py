"""The Triton kernels of policy_loss behind the public function: on a GPU, or in the interpreter.

The op itself is tested in test_policy_loss.py, whose problems, oracle and checks are used. Here two programs
at most take blocks of 128 rows.
"""

import itertools
import math

import pytest
import test_policy_loss as op
import torch
import triton
import triton.language as tl
from cuda_graph import replayed
from test_policy_loss import OPTIONS, ours, problem

import qrm_fast
from qrm_fast.ops.policy_loss import scaled_derivative
from qrm_fast.triton import policy_loss as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # non-finite rows
]
SIZES = [33, 257]
CASES = [(torch.float32, name) for name in OPTIONS] + [(torch.bfloat16, "ppo-k3"), (torch.float16, "gspo")]


class ByTriton(torch.autograd.Function):
    """The op through its launchers, backward too."""

    @staticmethod
    def forward(ctx, device, *arguments):
        arguments = [x.detach().to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        loss, metrics, *derivatives = kernels.forward(*arguments)
        ctx.arguments, ctx.derivatives = arguments, derivatives
        ctx.mark_non_differentiable(metrics)
        return loss.cpu(), metrics.cpu()

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = [None] * len(ctx.arguments)
        for place, derivative in zip((0, 2), ctx.derivatives, strict=True):
            x = ctx.arguments[place]
            if x is not None:
                grads[place] = kernels.scaled(grad_loss.to(x.device), derivative, x).cpu()
        return None, *grads


@pytest.fixture(autouse=True)
def by_triton(triton_device, monkeypatch):
    for launch, size in (kernels.ROWS, 128), (kernels.SEQUENCE, 32), (kernels.SUM, 2), (kernels.SCALED, 128):
        monkeypatch.setitem(launch, "BT", size)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    monkeypatch.setattr(
        "qrm_fast.ops.policy_loss._policy_loss",
        lambda *arguments: (*ByTriton.apply(triton_device, *arguments), None, None),
    )


@triton.jit
def exponentials(x, y, n, BT: tl.constexpr):
    o = tl.arange(0, BT)
    tl.store(y + o, kernels.exp_of_bounded(tl.load(x + o, o < n, 0.0)), o < n)


def test_the_exponential_in_double(triton_device):
    x = torch.cat([torch.linspace(-20, 20, 1500), torch.linspace(-0.3, 0.3, 500), torch.tensor([-700.0, 0, 700])])
    x, y = x.double().to(triton_device), torch.empty(len(x), dtype=torch.float64, device=triton_device)
    exponentials[(1,)](x, y, len(x), BT=2048)
    torch.testing.assert_close(y, x.exp(), rtol=1e-11, atol=0)
    small = (x.abs() > 1e-3) & (x.abs() < 0.3)
    torch.testing.assert_close((y - 1 - x)[small], (x.expm1() - x)[small], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_no_further_from_float64_than_autograd(dtype, options):
    op.assert_no_further_than_autograd(dtype, SIZES, OPTIONS[options], num_seeds=1)


@pytest.mark.parametrize(
    "test",
    [
        op.test_table,
        op.test_table_of_cispo,
        op.test_table_of_gspo,
        op.test_table_of_gspo_with_dual_clip,
        op.test_table_of_sapo,
        op.test_table_of_the_unbiased_kl,
        op.test_small_log_ratios_keep_their_digits,
        op.test_nan_in_a_counted_row_is_seen,
        op.test_terms_of_coefficient_zero_cannot_spoil_the_loss,
        op.test_no_rows_and_no_counted_rows,
        op.test_a_ratio_that_would_overflow_counts_as_twenty,
        op.test_k3_stays_finite_far_from_the_reference,
        op.test_cispo_clips_below_where_it_is_asked_to,
    ],
    ids=lambda test: test.__name__,
)
def test_as_on_cpu(test):
    test()


@pytest.mark.parametrize("options", ["ppo-k3", "gspo"])
def test_masked_rows_never_leak(options):
    op.assert_masked_rows_never_leak(OPTIONS[options], math.nan)


@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_other_rows():
    """Twice the same; a row's gradients are its own, gspo's those of its sequence."""
    logprobs, advantages, keywords = problem(300, torch.float32, **OPTIONS["ppo-k3"])
    whole = ours((logprobs, advantages, keywords))
    assert all(torch.equal(a, b) for a, b in zip(ours((logprobs, advantages, keywords)), whole, strict=True))
    order = torch.randperm(300)[:90]
    shuffled = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    for a, b in zip(ours((logprobs[order], advantages[order], shuffled))[-2:], whole[-2:], strict=True):
        assert torch.equal(a, b[order])

    logprobs, advantages, keywords = problem(300, torch.float32, **OPTIONS["gspo"])
    whole = ours((logprobs, advantages, keywords))[-2]
    for bos, eos in list(itertools.pairwise(keywords["cu_seqlens"].tolist()))[::12]:
        part = {k: v[bos:eos] if op.is_floating(v) else v for k, v in keywords.items()}
        part["cu_seqlens"] = torch.tensor([0, eos - bos])
        assert torch.equal(ours((logprobs[bos:eos], advantages[bos:eos], part))[-2], whole[bos:eos])


def test_rows_of_no_sequence_are_nan():
    """Boundaries that a CPU kernel refuses: nothing beyond the tensors is read, and what has no ratio is NaN."""
    logprobs, advantages, keywords = problem(9, torch.float32, **OPTIONS["gspo"])
    keywords |= {"token_weights": None, "cu_seqlens": torch.tensor([-3, 4, 7])}
    loss, *_, grad, _ = ours((logprobs, advantages, keywords))
    assert loss.isnan() and grad[7:].isnan().all() and grad[:7].isfinite().all()
    keywords["cu_seqlens"] = torch.tensor([0, 12])
    inside = ours((logprobs, advantages, keywords))
    keywords["cu_seqlens"] = torch.tensor([0, 9])
    assert all(torch.equal(a, b) for a, b in zip(inside, ours((logprobs, advantages, keywords)), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["ppo-k3", "gspo"])
def test_public_function_on_cuda_runs_the_triton_kernels_without_waiting(options, monkeypatch):
    monkeypatch.undo()
    logprobs, advantages, keywords = problem(3000, torch.bfloat16, **OPTIONS[options])
    logprobs, advantages = logprobs.cuda().requires_grad_(), advantages.cuda()
    keywords = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}

    def step(function):
        out = function(logprobs, advantages, **keywords)
        return out.loss, torch.stack(out.metrics), torch.autograd.grad(3 * out.loss, logprobs)[0]

    compiled = torch.compile(qrm_fast.policy_loss, fullgraph=True, dynamic=True)
    for function in qrm_fast.policy_loss, compiled:
        step(function)
        torch.cuda.set_sync_debug_mode("error")
        loss, metrics, grad = step(function)
        torch.cuda.set_sync_debug_mode("default")
        given = [keywords[k] for k in ("entropy", "old_logprobs", "ref_logprobs", "token_weights")]
        want = kernels.forward(
            *(logprobs.detach(), advantages, *given, keywords.get("cu_seqlens"), keywords["kind"]),
            *(keywords.get("clip_low", 0.2), keywords.get("clip_high", 0.2), keywords.get("dual_clip", math.inf)),
            *(keywords["kl_coef"], "k3", keywords.get("entropy_coef", 0.0)),
        )
        assert torch.equal(loss, want[0]) and torch.equal(metrics, want[1])
        assert torch.equal(grad, scaled_derivative(torch.tensor(3.0, device="cuda"), want[2], logprobs.detach()))
    assert torch.equal(replayed(lambda: step(qrm_fast.policy_loss))[2], grad)
