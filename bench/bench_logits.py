"""What stands beside the heads: logits at hand and gathered Q, bound by memory, two heads at once, and sampling."""

from collections.abc import Callable

import torch
from torch import Tensor

from qrm_fast import gather_logprobs, linear_q_values, linear_sample, token_q

from .bench_heads import inputs, limit, of_logits
from .harness import Case, case, copy, gemm

CPU = {"num_tokens": 2048, "vocab": 32768}
CUDA = {"num_tokens": 16384, "vocab": 152064}


def compiled(function: Callable, *example: Tensor) -> Callable:
    """torch.compile of it for any number of rows, compiled by a few so that a measurement of memory finds it done."""
    fast = torch.compile(function, dynamic=True)
    fast(*(x[:8] for x in example))
    return fast


def logits_and_targets(device: torch.device, dtype: str, num_tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(num_tokens, vocab, dtype=getattr(torch, dtype), device=device)
    logits.normal_(0, 3, generator=generator)
    return logits, torch.randint(vocab, (num_tokens,), generator=generator, device=device)


def assert_exact(logits: Tensor, targets: Tensor) -> None:
    """64 rows against float64: within 2e-5, as the contract says of every head."""
    rows = torch.arange(0, len(targets), max(1, len(targets) // 64), device=targets.device)
    ours = gather_logprobs(logits, targets)
    for got, want in zip(ours, of_logits(logits[rows].double(), targets[rows]), strict=False):
        torch.testing.assert_close(got[rows].double(), want, rtol=0, atol=2e-5)


@case(
    cpu=[{"dtype": "float32", **CPU}, {"dtype": "bfloat16", **CPU}],
    cuda=[{"dtype": "float32", **CUDA}, {"dtype": "bfloat16", **CUDA}],
)
def gather_logprobs_forward(device: torch.device, dtype: str, num_tokens: int, vocab: int) -> Case:
    logits, targets = logits_and_targets(device, dtype, num_tokens, vocab)
    fast = compiled(of_logits, logits, targets)
    num_bytes = logits.nbytes + 24 * num_tokens
    return Case(
        {
            "qrm_fast": lambda: gather_logprobs(logits, targets),
            "log_softmax, gather, entropy": lambda: of_logits(logits, targets),
            "torch.compile of that": lambda: fast(logits, targets),
        },
        gate=lambda: assert_exact(logits, targets),
        baseline=copy(num_bytes, device),
        bytes=num_bytes,
    )


@case(cpu=[{"dtype": "bfloat16", **CPU}], cuda=[{"dtype": "bfloat16", **CUDA}])
def gather_logprobs_forward_backward(device: torch.device, dtype: str, num_tokens: int, vocab: int) -> Case:
    """The loss -mean(A logp) - 0.01 mean(H) and the gradient of the logits: two reads and a write of [T, V]."""
    logits, targets = logits_and_targets(device, dtype, num_tokens, vocab)
    logits.requires_grad_()
    advantages = torch.randn(num_tokens, generator=torch.Generator().manual_seed(1)).to(device)

    def step(head: Callable, x: Tensor = logits) -> Tensor:
        logprobs, entropy, *_ = head(x, targets[: len(x)])
        return torch.autograd.grad(-(advantages[: len(x)] * logprobs + 0.01 * entropy).mean(), x)[0]

    def first(count: int, dtype: torch.dtype) -> Tensor:
        return logits.detach()[:count].to(dtype).requires_grad_()

    fast = torch.compile(of_logits, dynamic=True)
    step(fast, first(8, logits.dtype))

    def gate() -> None:
        """64 rows against float64, as exact as one rounding."""
        want = step(of_logits, first(64, torch.float64))
        got = step(gather_logprobs, first(64, logits.dtype)).double()
        assert (got - want).norm() <= torch.finfo(logits.dtype).eps * want.norm()

    num_bytes = 3 * logits.nbytes + 48 * num_tokens
    return Case(
        {
            "qrm_fast": lambda: step(gather_logprobs),
            "autograd through log_softmax": lambda: step(of_logits),
            "torch.compile of that": lambda: step(fast),
        },
        gate,
        baseline=copy(num_bytes, device),
        bytes=num_bytes,
    )


@case(
    cpu=[{"dtype": "bfloat16", "num_tokens": 16384, "dim": 1536, "vocab": 16384}],
    cuda=[{"dtype": "bfloat16", "num_tokens": 16384, "dim": 3584, "vocab": 152064}],
)
def gathered_token_q(device: torch.device, dtype: str, num_tokens: int, dim: int, vocab: int) -> Case:
    """One row of a vocabulary head per action, beside the same by PyTorch, which writes the gathered rows."""
    hidden, head, targets = inputs(device, getattr(torch, dtype), num_tokens, dim, vocab)

    def gather_multiply_sum() -> Tensor:
        return (hidden.float() * head[targets].float()).sum(-1)

    def gate() -> None:
        rows = slice(0, 64)
        want = (hidden[rows].double() * head[targets[rows]].double()).sum(-1)
        torch.testing.assert_close(token_q(hidden, head, targets)[rows].double(), want, rtol=0, atol=2e-5)

    num_bytes = 2 * hidden.nbytes + 12 * num_tokens
    return Case(
        {"qrm_fast": lambda: token_q(hidden, head, targets), "gather, multiply, sum": gather_multiply_sum},
        gate,
        baseline=copy(num_bytes, device),
        bytes=num_bytes,
    )


@case(
    cpu=[
        {"dtype": dtype, "num_tokens": 1024, "policy_dim": 512, "q_dim": 512, "vocab": 32768}
        for dtype in ("float32", "bfloat16")
    ],
    cuda=[{"dtype": "bfloat16", "num_tokens": 16384, "policy_dim": 1536, "q_dim": 3584, "vocab": 151936}],
)
def linear_q_values_of_two_heads(
    device: torch.device, dtype: str, num_tokens: int, policy_dim: int, q_dim: int, vocab: int
) -> Case:
    """The baseline is one product as deep as both heads together. The error is the largest of any field in 64 rows."""
    policy = inputs(device, getattr(torch, dtype), num_tokens, policy_dim, vocab)
    critic = inputs(device, getattr(torch, dtype), num_tokens, q_dim, vocab)
    (policy_hidden, policy_weight, targets), (q_hidden, q_weight, _) = policy, critic
    tensors = policy_hidden, policy_weight, q_hidden, q_weight, targets

    def two_heads(policy_hidden, policy_weight, q_hidden, q_weight, targets) -> tuple[Tensor, ...]:
        logp, q = (policy_hidden @ policy_weight.T).log_softmax(-1), q_hidden @ q_weight.T
        p, taken = logp.exp(), targets[:, None]
        return (
            logp.gather(-1, taken)[:, 0],
            -(p * logp).sum(-1),
            q.gather(-1, taken)[:, 0],
            (p * q).sum(-1),
            q.logsumexp(-1),
        )

    def error(_: str, results: tuple[Tensor, ...]) -> float:
        rows = slice(0, 64)
        wide = (x.double() for x in (policy_hidden[rows], policy_weight, q_hidden[rows], q_weight))
        exact = two_heads(*wide, targets[rows])
        return max((x[rows].double() - y).abs().max().item() for x, y in zip(results, exact, strict=True))

    def gate() -> None:
        heads = (policy_hidden[:64], policy_weight), (q_hidden[:64], q_weight)
        allowed = max(limit(*head) for head in heads)
        assert (far := error("qrm_fast", linear_q_values(*tensors))) <= allowed, f"off by {far:.3g}, {allowed=:.3g}"

    dim = policy_dim + q_dim
    return Case(
        {"qrm_fast": lambda: linear_q_values(*tensors), "two heads, log_softmax, sums": lambda: two_heads(*tensors)},
        gate,
        baseline=gemm(torch.cat([policy_hidden, q_hidden], 1), torch.cat([policy_weight, q_weight], 1)),
        bytes=(num_tokens + vocab) * dim * policy_hidden.element_size() + 28 * num_tokens,
        flops=2 * num_tokens * dim * vocab,
        error=error,
    )


@case(
    cpu=[
        {"dtype": dtype, "num_rows": num_rows, "dim": 512, "vocab": 32768}
        for num_rows in (64, 16)
        for dtype in ("float32", "bfloat16")
    ],
    cuda=[{"dtype": "bfloat16", "num_rows": 512, "dim": 3584, "vocab": 152064}],
)
def linear_sample_step(device: torch.device, dtype: str, num_rows: int, dim: int, vocab: int) -> Case:
    """A token per row, as a decoder draws it, and its log-probability, whose error is the largest in 64 rows."""
    hidden, weight, _ = inputs(device, getattr(torch, dtype), num_rows, dim, vocab)
    uniforms = torch.rand(num_rows, dtype=torch.float64, device=device)

    def multinomial() -> tuple[Tensor, Tensor]:
        logp = (hidden @ weight.T).float().log_softmax(-1)
        tokens = torch.multinomial(logp.exp(), 1)
        return tokens[:, 0], logp.gather(-1, tokens)[:, 0]

    def error(_: str, results: tuple[Tensor, ...]) -> float:
        tokens, logprobs = (x[:64] for x in results)
        exact = (hidden[:64].double() @ weight.double().T).log_softmax(-1)
        return (logprobs - exact.gather(-1, tokens[:, None])[:, 0]).abs().max().item()

    def gate() -> None:
        far = error("qrm_fast", linear_sample(hidden, weight, uniforms))
        assert far <= limit(hidden[:64], weight), f"off by {far:.3g}"

    return Case(
        {"qrm_fast": lambda: linear_sample(hidden, weight, uniforms), "log_softmax, multinomial": multinomial},
        gate,
        baseline=gemm(hidden, weight),
        bytes=(num_rows + vocab) * dim * hidden.element_size() + 20 * num_rows,
        flops=2 * num_rows * dim * vocab,
        error=error,
    )
