"""Heads over a vocabulary: bound by arithmetic, so they stand beside the fastest library GEMM of the run.

The error of a forward pass is the largest distance of a log-probability from float64's in 64 rows; of a backward pass,
the relative distance of a gradient from float64's (Frobenius norm), the larger of hidden's and weight's.
"""

from collections.abc import Callable, Collection
from functools import cache, partial

import torch
from torch import Tensor

from qrm_fast import linear_logprobs, linear_policy_loss, policy_loss

from . import rivals
from .harness import Case, case, gemm

CONTRACT = 2e-5  # what a log-probability, an entropy or a Q may be off by, but for tensor cores
CPU = {"num_tokens": 2048, "dim": 512, "vocab": 32768}
CUDA = [  # the heads of 7B and 1.5B models
    {"dtype": "bfloat16", "num_tokens": 16384, "dim": 3584, "vocab": 152064},
    {"dtype": "bfloat16", "num_tokens": 16384, "dim": 1536, "vocab": 151936},
]


def inputs(device: torch.device, dtype: torch.dtype, num_tokens: int, dim: int, vocab: int) -> tuple[Tensor, ...]:
    """hidden [T, D], weight [V, D] with logits of about unit size, targets [T]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, dim, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, dim, generator=generator) / dim**0.5).to(device, dtype)
    return hidden, weight, torch.randint(vocab, (num_tokens,), generator=generator).to(device)


def of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers write: log-probability and entropy of logits, in their dtype."""
    logp = logits.log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return of_logits(hidden @ weight.T, targets)


def naive_in_float32(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits are cast to float32, after a product in the dtype of hidden."""
    return of_logits((hidden @ weight.T).float(), targets)


def float32_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Products in hidden's dtype whose float32 sums leave as they are: only CUDA offers them, and without gradient."""
    return of_logits(torch.mm(hidden, weight.T, out_dtype=torch.float32), targets)


def eager(device: torch.device, dtype: str) -> dict[str, rivals.Head]:
    """What PyTorch offers; torch.compile where its logits fit beside ours."""
    ways: dict[str, rivals.Head] = {"log_softmax, gather, entropy": naive}
    if dtype != "float32":
        ways["the same of logits.float()"] = naive_in_float32
    if device.type == "cuda":
        ways["torch.compile of that"] = torch.compile(list(ways.values())[-1])
    return ways


def exact_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """64 rows, and their logprobs and entropy in float64."""
    rows = torch.arange(0, len(targets), max(1, len(targets) // 64), device=targets.device)
    with torch.no_grad():
        return rows, list(naive(hidden[rows].double(), weight.double(), targets[rows]))


def limit(hidden: Tensor, weight: Tensor) -> float:
    """How far the contract lets these rows be off: 2e-5, and on tensor cores, which truncate, D/16 2^-24 |z|."""
    if hidden.device.type == "cpu" or hidden.element_size() > 2:
        return CONTRACT
    return CONTRACT + hidden.shape[1] / 16 * 2**-24 * (hidden @ weight.T).abs().max().item()


def assert_exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """64 rows against float64, within the contract's limit."""
    rows, exact = exact_rows(hidden, weight, targets)
    atol = limit(hidden[rows], weight)
    for got, want in zip(linear_logprobs(hidden, weight, targets), exact, strict=False):
        torch.testing.assert_close(got[rows].double(), want, rtol=0, atol=atol)


Loss = Callable[..., Tensor]  # slice of rows, their logprobs [T], their entropy [T] to a sum over these rows


def gradients(loss: Loss, head: rivals.Head, leaves: tuple[Tensor, ...], targets: Tensor, rows: slice) -> tuple:
    """Of hidden, of these rows, and of weight."""
    return torch.autograd.grad(loss(rows, *head(*leaves, targets[rows])[:2]), leaves)


def exact_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, 512 rows at a time."""
    hidden, weight = hidden.detach().double(), weight.detach().double().requires_grad_()
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for i in range(0, len(hidden), 512):
        rows = slice(i, i + 512)
        of_hidden[rows], part = gradients(loss, naive, (hidden[rows].requires_grad_(), weight), targets, rows)
        of_weight += part
    return of_hidden, of_weight


def gradient_error(
    loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, without_entropy: Collection[str]
) -> Callable[[str, tuple[Tensor, ...]], float]:
    """The `error` of a case; the ways `without_entropy` are held to the loss without it."""

    @cache
    def exact(has_entropy: bool) -> tuple[Tensor, Tensor]:
        return exact_gradients(loss if has_entropy else lambda *x: loss(*x[:2]), hidden, weight, targets)

    def error(way: str, gradients: tuple[Tensor, ...]) -> float:
        pairs = zip(gradients, exact(way not in without_entropy), strict=True)
        return max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)

    return error


def assert_gradients_exact(ours: Callable, theirs: Callable, hidden: Tensor, weight: Tensor) -> None:
    """`ours` and `theirs` give the gradients of (hidden, weight); the truth is theirs of float32 copies.

    float32 within 1e-5 of it; 16 bits no further from it than theirs in 16 bits.
    """

    def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()

    exact, same = leaves(torch.float32), leaves(hidden.dtype)
    for got, eager, want in zip(ours(*same), theirs(*same), theirs(*exact), strict=True):
        error, allowed = (got.float() - want).norm(), (eager.float() - want).norm()
        assert error <= max(allowed if got.element_size() < 4 else 0, 1e-5 * want.norm())


def clipped(logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor, token_weights: Tensor) -> Tensor:
    """The clipped PPO loss by its formula."""
    ratio = (logprobs - old_logprobs).exp()
    return (token_weights * torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))).sum()


GATED = slice(0, 256)  # rows of a backward pass that the gate looks at


@case(cpu=[{"dtype": "float32", **CPU}, {"dtype": "bfloat16", **CPU}], cuda=CUDA)
def linear_logprobs_forward(device: torch.device, dtype: str, **shape: int) -> Case:
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    with_entropy, without, absent = rivals.heads(device)
    heads = {"qrm_fast": linear_logprobs} | eager(device, dtype) | with_entropy | without
    if device.type == "cuda":
        heads["log_softmax, gather, entropy of torch.mm(out_dtype=float32)"] = float32_logits
    in_16_bits = {f"library GEMM: torch.mm in {dtype}": lambda: hidden @ weight.T} if dtype != "float32" else {}

    def error(_: str, results: tuple[Tensor, ...]) -> float:
        rows, (exact, _) = exact_rows(hidden, weight, targets)
        return (results[0][rows].double() - exact).abs().max().item()

    return Case(
        {name: partial(head, hidden, weight, targets) for name, head in heads.items()},
        gate=lambda: assert_exact(hidden, weight, targets),
        baseline=gemm(hidden, weight) if device.type == "cuda" else gemm(hidden.float(), weight.float()) | in_16_bits,
        bytes=(t * d + v * d) * hidden.element_size() + 20 * t,
        flops=2 * t * d * v,
        error=error,
        absent=absent,
    )


@case(cpu=[{"dtype": "float32", **CPU}], cuda=CUDA)
def linear_logprobs_forward_backward(device: torch.device, dtype: str, **shape: int) -> Case:
    """The loss -mean(A logp) - 0.01 mean(H) and its gradients of hidden and weight: 4 GEMMs without kept logits."""
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    advantages = torch.randn(t, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss(rows: slice, logprobs: Tensor, entropy: Tensor | None = None) -> Tensor:
        return -(advantages[rows] * logprobs + (0 if entropy is None else 0.01 * entropy)).sum() / t

    with_entropy, without, absent = rivals.heads(device)
    heads = {"qrm_fast": linear_logprobs} | eager(device, dtype) | with_entropy | without

    def gate() -> None:
        ours, theirs = (
            lambda *x, head=head: gradients(loss, head, x, targets, GATED) for head in (linear_logprobs, naive)
        )
        assert_gradients_exact(ours, theirs, hidden[GATED], weight)

    return Case(
        {name: partial(gradients, loss, head, leaves, targets, slice(None)) for name, head in heads.items()},
        gate,
        baseline=gemm(hidden.detach(), weight.detach()),
        num_baselines=4,
        bytes=2 * (t * d + v * d) * hidden.element_size() + 24 * t,
        flops=8 * t * d * v,
        error=gradient_error(loss, hidden, weight, targets, without),
        absent=absent,
    )


@case(cpu=[{"dtype": "float32", **CPU}], cuda=CUDA)
def linear_policy_loss_forward_backward(device: torch.device, dtype: str, **shape: int) -> Case:
    """The clipped PPO loss with an entropy bonus and its gradients of hidden and weight, in three GEMMs.

    Eight answers of equal length with one advantage each, for the rival that takes no other.
    """
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    generator = torch.Generator().manual_seed(1)
    of_answers, noise = (torch.randn(n, generator=generator).to(device) for n in (8, t))
    advantages, token_weights = of_answers.repeat_interleave(t // 8), torch.full_like(noise, 1 / t)
    old = linear_logprobs(hidden, weight, targets).logprobs + 0.1 * noise
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss(rows: slice, logprobs: Tensor, entropy: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        a, o, w = (x[rows].to(dtype) for x in (advantages, old, token_weights))
        if dtype == torch.float64:  # the truth, where CUDA's kernels refuse it
            return clipped(logprobs, a, o, w) - 0.01 * (0 if entropy is None else (w * entropy).sum())
        bonus = {} if entropy is None else {"entropy": entropy.to(dtype), "entropy_coef": 0.01}
        return policy_loss(logprobs.to(dtype), a, old_logprobs=o, token_weights=w, **bonus).loss

    def ours(leaves: tuple[Tensor, ...] = leaves, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        a, o, w = (x[rows] for x in (advantages, old, token_weights))
        out = linear_policy_loss(*leaves, targets[rows], a, old_logprobs=o, token_weights=w, entropy_coef=0.01)
        return torch.autograd.grad(out.loss, leaves)

    def gate() -> None:
        def theirs(*leaves: Tensor) -> tuple[Tensor, ...]:
            return gradients(loss, naive, leaves, targets, GATED)

        assert_gradients_exact(lambda *x: ours(x, GATED), theirs, hidden[GATED], weight)

    with_entropy, without, absent = rivals.heads(device)
    whole, more = rivals.available(rivals.LOSSES_WITHOUT_ENTROPY)
    heads = {"qrm_fast, linear_logprobs and policy_loss": linear_logprobs} | eager(device, dtype) | with_entropy
    ways = {"qrm_fast": ours}
    for name, head in (heads | without).items():
        ways[name] = partial(gradients, loss, head, leaves, targets, slice(None))
    for name, function in whole.items():
        ways[name] = lambda function=function: torch.autograd.grad(function(*leaves, targets, of_answers, old), leaves)

    return Case(
        ways,
        gate,
        baseline=gemm(hidden.detach(), weight.detach()),
        num_baselines=3,
        bytes=2 * (t * d + v * d) * hidden.element_size() + 24 * t,
        flops=6 * t * d * v,
        error=gradient_error(loss, hidden, weight, targets, without | whole),
        absent=absent | more,
    )
