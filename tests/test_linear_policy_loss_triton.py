"""The Triton kernels of linear_policy_loss behind the public function: on a GPU, or in the interpreter.

Blocks of rows are cut to 128 here. The op itself is tested in test_linear_policy_loss.py, whose problems are used.
"""

import math

import pytest
import torch
from cuda_graph import replayed
from test_linear_policy_loss import OPTIONS, make, naive, ours, run

from qrm_fast import linear_policy_loss
from qrm_fast.ops import linear_policy_loss as op
from qrm_fast.triton import linear_logprobs as head_kernels
from qrm_fast.triton import linear_policy_loss as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # rows past the last, non-finite rows
]
SHAPES = [(0, 5, 7), (1, 3, 1), (63, 20, 127), (140, 16, 300)]  # for float32 fewer columns: its blocks are 64 wide
CASES = [
    (torch.float32, "ppo"),
    (torch.float32, "everything"),
    (torch.bfloat16, "ppo"),
    (torch.bfloat16, "everything"),
    (torch.bfloat16, "gspo"),
    (torch.bfloat16, "gspo-on-policy"),
    (torch.bfloat16, "cispo"),
    (torch.float16, "reinforce"),
    (torch.bfloat16, "sapo"),
    (torch.float32, "gspo-dual"),
]


class ByTriton(torch.autograd.Function):
    """The op through its launcher, whose gradients are those of the loss."""

    @staticmethod
    def forward(ctx, device, *arguments):
        outputs = kernels.forward(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments))
        loss, metrics, logprobs, entropy, *gradients = (x.cpu() for x in outputs)
        ctx.mark_non_differentiable(metrics, logprobs, entropy)
        ctx.num_inputs, ctx.gradients = len(arguments), gradients
        ctx.dtype = arguments[0].dtype
        return loss, metrics, logprobs, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = [None] * ctx.num_inputs
        for place, gradient in zip((0, 1, 8), ctx.gradients, strict=True):
            if ctx.needs_input_grad[1 + place]:
                assert gradient.dtype == torch.float32
                grads[place] = (grad_loss * gradient).to(ctx.dtype)
        return None, *grads


@pytest.fixture(autouse=True)
def by_triton(triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "KEPT_BYTES", 0)
    monkeypatch.setattr(op, "_forward", lambda *arguments: ByTriton.apply(triton_device, *arguments))


def eager(inputs, constants, options):
    """What trainers do: the product in the inputs' dtype, everything after it in float32."""
    logits = torch.nn.functional.linear(inputs["hidden"], inputs["weight"], inputs.get("bias")).float()
    return naive({"hidden": logits, "weight": torch.eye(logits.shape[1])}, constants, options)


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_as_accurate_as_autograd(dtype, options):
    """Loss and metrics within 2e-5. Gradients in the mean square: float32's as close to float64 as PyTorch's path, and
    the few roundings that a row's coefficient takes from its log-probability; for 16 bits at most a third of the error
    of PyTorch's path in that dtype, or one rounding."""
    errors = []
    for t, d, v in SHAPES:
        shape = (t, d, v // 2 + 1 if dtype == torch.float32 else v)
        inputs, constants, rest = make(*shape, dtype, **OPTIONS[options])
        result = run(ours, inputs, constants, rest, dtype)
        exact = run(naive, inputs, constants, rest, torch.float64)
        peer = run(eager, inputs, constants, rest, dtype)
        for got, want in zip(result[:2], exact, strict=False):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
        for got, want, other in zip(result[2:], exact[2:], peer[2:], strict=True):
            assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
            scale = max(want.norm(), want.numel() ** 0.5 / max(1, shape[0]), 1e-30)
            errors.append(torch.stack([(x.double() - want).norm() / scale for x in (got, other)]))
    error, peer_error = torch.stack(errors).square().mean(0).sqrt()
    rounding = torch.finfo(dtype).eps
    limit = 1.1 * peer_error + 8 * rounding if dtype == torch.float32 else max(peer_error / 3, rounding)
    assert error <= limit, f"off by {error:.3g}, PyTorch by {peer_error:.3g}"


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dim", [24, 25], ids=["described", "pointers"])
def test_same_logprobs_as_the_head_and_as_its_two_parts(triton_device, dim, biased):
    """The very bits of linear_logprobs, so that every ratio to them is 1; three products give the gradients of four to
    the rounding of 16 bits. Rows of 25 are off multiples of 16 bytes: pointers, and other blocks, then."""
    inputs, constants, rest = make(140, dim, 300, torch.bfloat16, kl_coef=0.1, entropy_coef=0.01)
    inputs |= {"bias": torch.linspace(-1, 1, 300, dtype=torch.bfloat16)} if biased else {}
    constants = {k: x.float() for k, x in constants.items()}
    leaves = {k: x.requires_grad_() for k, x in inputs.items()}
    out = linear_policy_loss(**leaves, **constants, **rest)
    of_head = {k: x.detach().to(triton_device) for k, x in (inputs | {"targets": rest["targets"]}).items()}
    places = (of_head.get(k) for k in ("hidden", "weight", "targets", "bias"))
    head = [x.cpu() for x in head_kernels.forward(*places, 1.0, None, None, -100)]
    assert torch.equal(out.logprobs, head[0]) and torch.equal(out.entropy, head[1])
    again = linear_policy_loss(**leaves, **constants | {"old_logprobs": head[0]}, **rest)
    assert again.metrics.ratio_max == 1 and again.metrics.approx_kl == 0
    frozen = linear_policy_loss(**{k: x.detach() for k, x in inputs.items()}, **constants, **rest)
    assert torch.equal(frozen.loss, out.loss.detach()) or (frozen.loss - out.loss).abs() < 1e-6
    torch.testing.assert_close(torch.stack(frozen.metrics), torch.stack(out.metrics))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_idle_rows_and_wild_targets(dtype):
    """Ignored rows and rows of weight 0 may hold NaN. A wild target is NaN in the loss, and in its own row alone."""
    inputs, constants, rest = make(12, 8, 50, dtype, entropy_coef=0.1)
    constants = {k: x.float() for k, x in constants.items()} | {"token_weights": torch.full((12,), 0.1)}
    constants["token_weights"][[0, 7]] = 0
    idle = torch.tensor([0, 4, 7])
    clean = run(ours, {k: x.clone() for k, x in inputs.items()}, constants, rest, dtype)
    for x in (inputs["hidden"], constants["advantages"], constants["old_logprobs"]):
        x[idle] = math.nan
    dirty = run(ours, inputs, constants, rest, dtype)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert (dirty[2][idle] == 0).all()
    rest["targets"][2] = 50
    loss, _, dx, dw = run(ours, inputs, constants, rest, dtype)
    others = torch.arange(12) != 2
    assert loss.isnan() and dx[2].isnan().all() and torch.equal(dx[others], dirty[2][others]) and dw.isfinite().all()


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 70), (torch.bfloat16, 260)], ids=str)
def test_bits(dtype, vocab):
    """Twice the same; a row's log-probability and hidden gradient do not depend on its neighbours or its block."""
    inputs, constants, rest = make(140, 24, vocab, dtype)
    constants = {k: x.float() for k, x in constants.items()} | {"token_weights": torch.full((140,), 0.01)}

    def rows(index):
        leaves = {"hidden": inputs["hidden"][index].clone().requires_grad_(), "weight": inputs["weight"].clone()}
        leaves["weight"].requires_grad_()
        part = {k: x[index] for k, x in constants.items()}
        out = linear_policy_loss(**leaves, targets=rest["targets"][index], **part)
        return out.loss, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, list(leaves.values()))

    everything = rows(torch.arange(140))
    assert all(torch.equal(x, y) for x, y in zip(everything, rows(torch.arange(140)), strict=True))
    index = torch.randperm(140)[:100]
    for x, y in zip(rows(index)[1:4], everything[1:4], strict=True):
        assert torch.equal(x, y[index])


def test_only_needed_gradients_are_formed():
    inputs, constants, rest = make(20, 8, 30, torch.float32, extra=True)
    constants = {k: x.float() for k, x in constants.items()}
    together = run(ours, inputs, constants, rest, torch.float32)[2:]
    for k, want in zip(inputs, together, strict=True):
        leaf = inputs[k].clone().requires_grad_()
        out = linear_policy_loss(**inputs | {k: leaf}, **constants, **rest)
        assert torch.equal(torch.autograd.grad(2 * out.loss, leaf)[0], want)


@pytest.mark.gpu
def test_rows_beyond_one_block_at_the_size_of_models(monkeypatch):
    """2^31 logits, more rows than are kept at a time, no wait for the GPU, captured in a graph, and little memory."""
    monkeypatch.undo()
    num_rows, dim, vocab = 16384, 512, 152064
    hidden = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16) / dim**0.5).requires_grad_()
    targets = torch.randint(vocab, (num_rows,), device="cuda")
    advantages = torch.randn(num_rows, device="cuda")

    def step():
        loss = linear_policy_loss(hidden, weight, targets, advantages, entropy_coef=0.01).loss
        return torch.autograd.grad(loss, [hidden, weight])

    step()
    torch.cuda.synchronize()
    before, _ = torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    got = step()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= 1.5e9 + 4 * (vocab + 2 * num_rows) * dim + 2 * weight.nbytes
    out = op.linear_logprobs_forward(hidden, weight, targets, None, 1.0, None, None, -100)
    scale = 1 / num_rows
    want = op.linear_logprobs_backward(
        -advantages * scale, torch.full_like(advantages, -0.01 * scale), hidden, weight, targets, None, 1.0, None, None,
        -100, *(x.detach() for x in out[1:]), True, True, False,
    )  # fmt: skip
    for x, y in zip(got, want, strict=False):
        assert (x - y).norm() <= 2**-7 * y.norm()
    assert all(torch.equal(x, y) for x, y in zip(replayed(step), got, strict=True))
