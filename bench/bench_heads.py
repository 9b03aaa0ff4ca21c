"""Heads over a vocabulary: bound by arithmetic, so the limit is the fastest whole GEMM of the same run."""

import torch
from torch import Tensor

from qrm_fast import linear_logprobs, linear_policy_loss, policy_loss

from .harness import Case, case, gemm

SHAPE = {"num_tokens": 2048, "dim": 512, "vocab": 32768}


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


@case(cpu=[{"dtype": "float32", **SHAPE}, {"dtype": "bfloat16", **SHAPE}])
def linear_logprobs_forward(device: torch.device, dtype: str, **shape: int) -> Case:
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    return Case(
        {
            "qrm_fast": lambda: linear_logprobs(hidden, weight, targets),
            "log_softmax, gather, entropy": lambda: naive(hidden, weight, targets),
        },
        gate=lambda: assert_exact(hidden, weight, targets),
        limit=gemm(hidden.float(), weight.float())
        | ({"bfloat16 GEMM": lambda: hidden @ weight.T} if dtype != "float32" else {}),
        bytes=(t * d + v * d) * hidden.element_size() + 20 * t,
        flops=2 * t * d * v,
    )


@case(cpu=[{"dtype": "float32", **SHAPE}])
def linear_logprobs_forward_backward(device: torch.device, dtype: str, **shape: int) -> Case:
    """The loss -mean(A logp) - 0.01 mean(H) and its gradients of hidden and weight: 4 GEMMs without kept logits."""
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    advantages = torch.randn(t, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def step(head) -> tuple[Tensor, ...]:
        logprobs, entropy, *_ = head(hidden, weight, targets)
        return torch.autograd.grad(-(advantages * logprobs + 0.01 * entropy).mean(), leaves)

    def gate() -> None:
        for got, want in zip(step(linear_logprobs), step(naive), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()

    return Case(
        {"qrm_fast": lambda: step(linear_logprobs), "autograd through log_softmax": lambda: step(naive)},
        gate,
        limit=gemm(hidden.detach(), weight.detach()),
        limits_worth=4,
        bytes=2 * (t * d + v * d) * hidden.element_size() + 24 * t,
        flops=8 * t * d * v,
    )


@case(cpu=[{"dtype": "float32", **SHAPE}])
def linear_policy_loss_forward_backward(device: torch.device, dtype: str, **shape: int) -> Case:
    """The clipped PPO loss with an entropy bonus and its gradients of hidden and weight, in three GEMMs."""
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    generator = torch.Generator().manual_seed(1)
    advantages, noise = (torch.randn(t, generator=generator).to(device) for _ in range(2))
    old = linear_logprobs(hidden, weight, targets).logprobs + 0.1 * noise
    options = {"old_logprobs": old, "entropy_coef": 0.01}
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def ours() -> tuple[Tensor, ...]:
        loss = linear_policy_loss(hidden, weight, targets, advantages, **options).loss
        return torch.autograd.grad(loss, leaves)

    def two_ops(head) -> tuple[Tensor, ...]:
        logprobs, entropy, *_ = head(hidden, weight, targets)
        return torch.autograd.grad(policy_loss(logprobs, advantages, entropy=entropy, **options).loss, leaves)

    def gate() -> None:
        for got, want in zip(ours(), two_ops(naive), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()

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
