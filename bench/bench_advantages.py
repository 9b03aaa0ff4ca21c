"""Advantages over packed sequences: bound by memory, so they stand beside a copy of the same bytes.

It copies into memory that is there already. Results are fresh memory, which the operating system must hand out
and zero first; "copy into fresh memory" is what that costs a copy. In the cases with kept memory malloc keeps what is
freed: there both write pages that the process has.
"""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qrm_fast import discounted_returns, gae, min_gae, q_head_advantages, q_token_rewards, token_q, vtrace

from .harness import KEPT_MEMORY, Case, Provider, case, copy
from .rivals import Rival, available

NUM_TOKENS = 1 << 24
SEGMENTS = ["1 x 16777216", "16384 x 1024", "1048576 x 16", "log-normal", "log-normal, long"]
REAL = "GSM8K answers"
if "DATA" in os.environ:  # the folder that has them, `make bench DATA=DIR`; without it there is no such case
    SEGMENTS.append(REAL)


def boundaries(segments: str, num_tokens: int) -> Tensor:
    """[S+1]: equal lengths; those of real answers, again and again; or log-normal ones.

    The latter have a median of 150 tokens, and one in a thousand is longer than 6,000; long, of 8,100 and 178,000.
    """
    if " x " in segments:
        return torch.arange(0, num_tokens + 1, min(num_tokens, int(segments.split(" x ")[1])))
    if segments == REAL:
        lengths = torch.tensor(answer_lengths(Path(os.environ["DATA"]) / "gsm8k_pairs.jsonl"))
        lengths = lengths.repeat(num_tokens // int(lengths.sum()) + 1)
    else:
        median, deviation = (9, 1.0) if "long" in segments else (5, 1.2)
        spread = torch.randn(num_tokens // 64, generator=torch.Generator().manual_seed(0))
        lengths = (median + deviation * spread).exp().long() + 1
    ends = lengths.cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends[ends < num_tokens], torch.tensor([num_tokens])])


def answer_lengths(pairs: Path) -> list[int]:
    """Words and signs, in the place of a tokenizer's, of the answers of preference pairs."""
    rows = map(json.loads, pairs.read_text(encoding="utf-8").splitlines())
    return [len(re.findall(r"\w+|[^\w\s]", row[side])) for row in rows for side in ("chosen", "rejected")]


def columns(count: int, num_tokens: int, device: torch.device) -> Tensor:
    return torch.randn(count, num_tokens, generator=torch.Generator().manual_seed(0)).to(device)


def into_fresh_memory(num_bytes: int, device: torch.device) -> dict[str, Provider]:
    source = torch.ones(num_bytes // 8, device=device)
    return {"copy into fresh memory": source.clone}


def assert_as_float64(got: tuple[Tensor, ...], wide: tuple[Tensor, ...]) -> None:
    """Close to the float64 kernel, which the tests hold against the reference: rounding over some 20 steps."""
    for ours, want in zip(got, wide, strict=True):
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=1e-4)


def packed(device: torch.device, segments: str, num_tokens: int) -> Case:
    """gae, with nothing beside it."""
    cu_seqlens = boundaries(segments, num_tokens).to(device)
    rewards, values = columns(2, num_tokens, device)
    ours = partial(gae, rewards, values, cu_seqlens, gamma=1.0, lam=0.95)

    def gate():
        assert_as_float64(ours(), gae(rewards.cpu().double(), values.cpu().double(), cu_seqlens.cpu(), lam=0.95))

    num_bytes = 16 * num_tokens
    return Case({"qrm_fast": ours}, gate, baseline=copy(num_bytes, device), bytes=num_bytes)


@case(cpu=[{"segments": s} for s in SEGMENTS], cuda=[{"segments": s} for s in SEGMENTS])
def packed_gae(device: torch.device, segments: str) -> Case:
    built = packed(device, segments, NUM_TOKENS)
    if device.type == "cpu":
        built.providers |= into_fresh_memory(built.bytes, device)
    return built


@case(environment=KEPT_MEMORY, cpu=[{"segments": s} for s in SEGMENTS])
def packed_gae_in_kept_memory(device: torch.device, segments: str) -> Case:
    return packed(device, segments, NUM_TOKENS)


COLUMNS = {"min_gae": (2, 2), "discounted_returns": (1, 1), "vtrace": (3, 2)}  # that it reads and writes


def packed_scan(device: torch.device, op: str, segments: str) -> Case:
    num_inputs, num_outputs = COLUMNS[op]
    inputs = columns(3, NUM_TOKENS, device)
    inputs[2].div_(10).exp_()  # ratios
    wide = inputs[:num_inputs].cpu().double()
    cu_seqlens = boundaries(segments, NUM_TOKENS).to(device)
    call = {"min_gae": min_gae, "discounted_returns": partial(discounted_returns, gamma=0.95), "vtrace": vtrace}[op]
    ours = partial(call, *inputs[:num_inputs], cu_seqlens)

    def gate():
        got, want = ours(), call(*wide, cu_seqlens.cpu())
        assert_as_float64(*(((x,) if isinstance(x, Tensor) else x) for x in (got, want)))

    num_bytes = 4 * (num_inputs + num_outputs) * NUM_TOKENS
    return Case({"qrm_fast": ours}, gate, baseline=copy(num_bytes, device), bytes=num_bytes)


OTHERS = [{"op": op, "segments": "16384 x 1024"} for op in COLUMNS]
case(cpu=OTHERS, cuda=OTHERS)(packed_scan)


@case(environment=KEPT_MEMORY, cpu=OTHERS)
def packed_scan_in_kept_memory(device: torch.device, op: str, segments: str) -> Case:
    return packed_scan(device, op, segments)


@case(cuda=[{"num_tokens": 1 << 16, "calls": 1000}])
def gae_calls(device: torch.device, num_tokens: int, calls: int) -> Case:
    """Many calls without a pause: their milliseconds are the microseconds of one, in Python or in a CUDA graph."""
    cu_seqlens = boundaries(f"{num_tokens // 1024} x 1024", num_tokens).to(device)
    rewards, values = columns(2, num_tokens, device)
    once = partial(gae, rewards, values, cu_seqlens, lam=0.95)

    def often(provider: Provider) -> Provider:
        def repeated():
            for _ in range(calls):
                results = provider()
            return results

        return repeated

    once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        often(once)()
    providers: dict[str, Provider] = {"qrm_fast": often(once), "qrm_fast, in a CUDA graph": graph.replay}

    def gate():
        assert_as_float64(once(), gae(rewards.cpu().double(), values.cpu().double(), cu_seqlens.cpu(), lam=0.95))

    baseline = {f"{name}, {calls} times": often(way) for name, way in copy(16 * num_tokens, device).items()}
    return Case(providers, gate, baseline=baseline, bytes=16 * num_tokens * calls)


# rewards, values, whether a row is one [S, W] to a way to advantages and returns [S, W] or [S, W, 1]
Padded = Callable[[Tensor, Tensor, Tensor], Provider]


def last(real: Tensor) -> Tensor:
    """Whether a token [S, W] is its sequence's last."""
    return real & ~torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)


def torchrl_vectorised() -> Padded:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def prepared(rewards: Tensor, values: Tensor, real: Tensor) -> Provider:
        done = last(real)[..., None]
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)[..., None]
        return partial(
            vec_generalized_advantage_estimate, 1.0, 0.95, values[..., None], after, rewards[..., None], done, done
        )

    return prepared


def rl_triton() -> Padded:
    from rl_triton import compute_gae

    def prepared(rewards: Tensor, values: Tensor, real: Tensor) -> Provider:
        ended = last(real).float()

        def both() -> tuple[Tensor, Tensor]:
            advantages = compute_gae(rewards, values, ended, gamma=1.0, lambda_=0.95)
            return advantages, advantages + values

        return both

    return prepared


def verl_loop() -> Padded:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    return lambda rewards, values, real: partial(compute_gae_advantage_return, rewards, values, real.float(), 1.0, 0.95)


def openrlhf_loop() -> Padded:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    function = partial(RemoteExperienceMaker.get_advantages_and_returns, None)
    return lambda rewards, values, real: partial(function, values, rewards, real, 1.0, 0.95)


def associative_scan() -> Padded:
    from torch._higher_order_ops.associative_scan import associative_scan

    def join(behind: tuple[Tensor, Tensor], row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return row[0] * behind[0], row[1] + row[0] * behind[1]

    @torch.compile(fullgraph=True)
    def scanned(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        delta = rewards + torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1) - values
        maps = torch.full_like(delta, 0.95), delta
        mode = "pointwise" if delta.is_cuda else "generic"  # the former is for CUDA only
        advantages = associative_scan(join, maps, 1, reverse=True, combine_mode=mode)[1]
        return advantages, advantages + values

    return lambda rewards, values, real: partial(scanned, rewards, values)


RIVALS = [
    Rival("torchrl", "vectorised", torchrl_vectorised),
    Rival("torch", "compiled associative scan", associative_scan),
    Rival("verl", "loop, advantages whitened too", verl_loop),
    Rival("openrlhf", "loop", openrlhf_loop),
]
RIVALS_FOR_CUDA = [Rival("rl-triton", "a program per row", rl_triton)]


@case(
    cpu=[{"num_sequences": 64, "width": 8192}],
    cuda=[{"num_sequences": 64, "width": 8192}],
)
def gae_beside_frameworks(device: torch.device, num_sequences: int, width: int) -> Case:
    """Sequences of 1 to `width` tokens: packed, and as the padded batch [S, width] that the frameworks hold."""
    lengths = torch.randint(1, width + 1, (num_sequences,), generator=torch.Generator().manual_seed(0))
    lengths[0] = width
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    num_tokens = int(lengths.sum())
    rewards, values = columns(2, num_tokens, device)
    real = torch.arange(width, device=device) < cu_seqlens.diff()[:, None]  # [S, width]

    def padded() -> tuple[Tensor, Tensor]:
        r, v = (torch.zeros(real.shape, device=device).masked_scatter_(real, x) for x in (rewards, values))
        return r, v

    def loop():
        """What trainers do: one step per column, zeros at the end."""
        r, v = padded()
        advantages = torch.zeros_like(r)
        advantage = next_value = torch.zeros_like(r[:, 0])
        for t in reversed(range(width)):
            advantage = advantages[:, t] = r[:, t] + next_value - v[:, t] + 0.95 * advantage
            next_value = v[:, t]
        return advantages[real], (advantages + v)[real]

    providers: dict[str, Provider] = {
        "qrm_fast": partial(gae, rewards, values, cu_seqlens, gamma=1.0, lam=0.95),
        "padded, a step per column": loop,
    }
    theirs, absent = available(RIVALS + RIVALS_FOR_CUDA if device.type == "cuda" else RIVALS)
    for way, prepare in theirs.items():
        providers[f"{way}, padded beforehand"] = prepare(*padded(), real)

    wide = gae(rewards.cpu().double(), values.cpu().double(), cu_seqlens.cpu(), lam=0.95)

    def error(way: str, results: tuple[Tensor, ...]) -> float:
        """The largest distance from float64; of whitened advantages only their returns'."""
        distances = [
            (x.view(real.shape)[real] if x.ndim > 1 else x).cpu().double() - y
            for x, y in zip(results, wide, strict=True)
        ]
        return max(d.abs().max().item() for d in distances["whitened" in way :])

    def gate():
        assert_as_float64(providers["qrm_fast"](), wide)

    num_bytes = 16 * num_tokens
    baseline = copy(num_bytes, device)
    return Case(providers, gate, baseline=baseline, bytes=num_bytes, error=error, absent=absent)


ANSWERS = ["128 each", "one of half the tokens, 128 each"]


@case(
    cpu=[{"num_tokens": 1 << 14, "dim": 3584, "answers": answers} for answers in ANSWERS],
    cuda=[{"num_tokens": 1 << 17, "dim": 3584, "answers": answers} for answers in ANSWERS],
)
def q_head(device: torch.device, num_tokens: int, dim: int, answers: str) -> Case:
    """bfloat16 hidden states to advantages: bound by reading them."""
    long = num_tokens // 2 if "half" in answers else 0
    lengths = torch.tensor([long] * bool(long) + [128] * ((num_tokens - long) // 128), device=device)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    hidden = torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    head = torch.randn(dim, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(device)

    def unfused() -> Tensor:
        return q_token_rewards(token_q(hidden, head), cu_seqlens, scope="sequence", center=True)

    def normalised(q: Tensor) -> Tensor:
        per_row = partial(torch.repeat_interleave, repeats=lengths, output_size=num_tokens)
        deviation = q - per_row(torch.segment_reduce(q, "mean", lengths=lengths))
        sigma = torch.segment_reduce(deviation.square(), "mean", lengths=lengths).sqrt()
        return deviation / (per_row(sigma) + 1e-8)

    ours = partial(q_head_advantages, hidden, head, cu_seqlens, center=True)
    wide = normalised(hidden.double() @ head.double()).cpu()

    def error(_: str, result: Tensor) -> float:
        return (result.cpu().double() - wide).abs().max().item()

    def gate() -> None:
        assert error("qrm_fast", ours()) <= 2 * error("unfused", unfused())

    num_bytes = 2 * num_tokens * dim + 4 * num_tokens
    return Case(
        {
            "qrm_fast": ours,
            "token_q, then q_token_rewards": unfused,
            "PyTorch": lambda: normalised((hidden @ head).float()),
        },
        gate,
        baseline=copy(num_bytes, device),
        bytes=num_bytes,
        error=error,
    )
