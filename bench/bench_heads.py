"""Heads over a vocabulary: bound by arithmetic, so the limit is the fastest whole GEMM of the same run."""

from collections.abc import Callable

import torch
from torch import Tensor

from qrm_fast import linear_logprobs, linear_policy_loss, policy_loss

from .harness import Case, case, gemm

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


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers write: log-probability and entropy of materialised logits."""
    logp = (hidden @ weight.T).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def assert_exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """64 rows against float64: within 2e-5, as the contract says."""
    rows = torch.arange(0, len(targets), max(1, len(targets) // 64), device=targets.device)
    ours = linear_logprobs(hidden, weight, targets)
    exact = naive(hidden[rows].double(), weight.double(), targets[rows])
    for got, want in zip(ours, exact, strict=False):
        torch.testing.assert_close(got[rows].double(), want, rtol=0, atol=2e-5)


def compiled(device: torch.device, function: Callable) -> dict[str, Callable]:
    """The same through torch.compile, where its logits fit beside ours."""
    return {"torch.compile of it": torch.compile(function)} if device.type == "cuda" else {}


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


GATED = slice(0, 256)  # rows of a backward pass that the gate looks at


@case(cpu=[{"dtype": "float32", **CPU}, {"dtype": "bfloat16", **CPU}], cuda=CUDA)
def linear_logprobs_forward(device: torch.device, dtype: str, **shape: int) -> Case:
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    in_16_bits = {f"{dtype} GEMM": lambda: hidden @ weight.T} if dtype != "float32" else {}
    return Case(
        {
            "qrm_fast": lambda: linear_logprobs(hidden, weight, targets),
            "log_softmax, gather, entropy": lambda: naive(hidden, weight, targets),
            **compiled(device, lambda: naive(hidden, weight, targets)),
        },
        gate=lambda: assert_exact(hidden, weight, targets),
        limit=gemm(hidden, weight) if device.type == "cuda" else gemm(hidden.float(), weight.float()) | in_16_bits,
        bytes=(t * d + v * d) * hidden.element_size() + 20 * t,
        flops=2 * t * d * v,
    )


@case(cpu=[{"dtype": "float32", **CPU}], cuda=CUDA)
def linear_logprobs_forward_backward(device: torch.device, dtype: str, **shape: int) -> Case:
    """The loss -mean(A logp) - 0.01 mean(H) and its gradients of hidden and weight: 4 GEMMs without kept logits."""
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    advantages = torch.randn(t, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def step(head: Callable, leaves: tuple[Tensor, ...] = leaves, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        logprobs, entropy, *_ = head(*leaves, targets[rows])
        return torch.autograd.grad(-(advantages[rows] * logprobs + 0.01 * entropy).mean(), leaves)

    def gate() -> None:
        ours, theirs = (lambda *x, head=head: step(head, x, GATED) for head in (linear_logprobs, naive))
        assert_gradients_exact(ours, theirs, hidden[GATED], weight)

    return Case(
        {
            "qrm_fast": lambda: step(linear_logprobs),
            "autograd through log_softmax": lambda: step(naive),
            **compiled(device, lambda: step(naive)),
        },
        gate,
        limit=gemm(hidden.detach(), weight.detach()),
        limits_worth=4,
        bytes=2 * (t * d + v * d) * hidden.element_size() + 24 * t,
        flops=8 * t * d * v,
    )


@case(cpu=[{"dtype": "float32", **CPU}], cuda=CUDA)
def linear_policy_loss_forward_backward(device: torch.device, dtype: str, **shape: int) -> Case:
    """The clipped PPO loss with an entropy bonus and its gradients of hidden and weight, in three GEMMs."""
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    generator = torch.Generator().manual_seed(1)
    advantages, noise = (torch.randn(t, generator=generator).to(device) for _ in range(2))
    old = linear_logprobs(hidden, weight, targets).logprobs + 0.1 * noise
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def ours(leaves: tuple[Tensor, ...] = leaves, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        loss = linear_policy_loss(
            *leaves, targets[rows], advantages[rows], old_logprobs=old[rows], entropy_coef=0.01
        ).loss
        return torch.autograd.grad(loss, leaves)

    def two_ops(head: Callable, leaves: tuple[Tensor, ...] = leaves, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        logprobs, entropy, *_ = head(*leaves, targets[rows])
        loss = policy_loss(
            logprobs.float(), advantages[rows], entropy=entropy.float(), old_logprobs=old[rows], entropy_coef=0.01
        ).loss
        return torch.autograd.grad(loss, leaves)

    def gate() -> None:
        assert_gradients_exact(lambda *x: ours(x, GATED), lambda *x: two_ops(naive, x, GATED), hidden[GATED], weight)

    return Case(
        {
            "qrm_fast": ours,
            "qrm_fast, linear_logprobs and policy_loss": lambda: two_ops(linear_logprobs),
            "autograd through log_softmax": lambda: two_ops(naive),
        },
        gate,
        limit=gemm(hidden.detach(), weight.detach()),
        limits_worth=3,
        bytes=2 * (t * d + v * d) * hidden.element_size() + 24 * t,
        flops=6 * t * d * v,
    )
