"""Advantages over packed sequences: bound by memory, so the limit is a copy of the same bytes.

The limit copies into memory that is there already. Results are fresh memory, which the operating system must hand out
and zero first; "copy into fresh memory" is what that costs a copy.
"""

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from qrm_fast import discounted_returns, gae, min_gae, vtrace

from .harness import Case, Provider, case, copy

NUM_TOKENS = 1 << 24
SEGMENTS = ["1 x 16777216", "16384 x 1024", "1048576 x 16", "log-normal"]


def boundaries(segments: str, num_tokens: int) -> Tensor:
    """[S+1]: equal lengths, or a median of 150 tokens with one sequence in a thousand longer than 6,000."""
    if segments != "log-normal":
        return torch.arange(0, num_tokens + 1, int(segments.split(" x ")[1]))
    lengths = (5 + 1.2 * torch.randn(num_tokens // 64, generator=torch.Generator().manual_seed(0))).exp().long() + 1
    ends = lengths.cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends[ends < num_tokens], torch.tensor([num_tokens])])


def columns(count: int, num_tokens: int, device: torch.device) -> Tensor:
    return torch.randn(count, num_tokens, generator=torch.Generator().manual_seed(0)).to(device)


def into_fresh_memory(num_bytes: int, device: torch.device) -> dict[str, Provider]:
    source = torch.ones(num_bytes // 8, device=device)
    return {"copy into fresh memory": source.clone}


def assert_as_float64(got: tuple[Tensor, ...], wide: tuple[Tensor, ...]) -> None:
    """Close to the float64 kernel, which the tests hold against the reference: rounding over some 20 steps."""
    for ours, want in zip(got, wide, strict=True):
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=1e-4)


@case(cpu=[{"segments": s} for s in SEGMENTS], cuda=[{"segments": s} for s in SEGMENTS])
def packed_gae(device: torch.device, segments: str) -> Case:
    cu_seqlens = boundaries(segments, NUM_TOKENS).to(device)
    rewards, values = columns(2, NUM_TOKENS, device)
    ours = partial(gae, rewards, values, cu_seqlens, gamma=1.0, lam=0.95)

    def gate():
        assert_as_float64(ours(), gae(rewards.cpu().double(), values.cpu().double(), cu_seqlens.cpu(), lam=0.95))

    num_bytes = 16 * NUM_TOKENS
    providers = {"qrm_fast": ours} | (into_fresh_memory(num_bytes, device) if device.type == "cpu" else {})
    return Case(providers, gate, limit=copy(num_bytes, device), bytes=num_bytes)


@case(cpu=[{"segments": "16384 x 1024"}], cuda=[{"segments": "16384 x 1024"}])
def packed_scans(device: torch.device, segments: str) -> Case:
    """The other estimators beside gae, the bytes those of gae: discounted_returns moves half, vtrace 5/4."""
    cu_seqlens = boundaries(segments, NUM_TOKENS).to(device)
    rewards, values, noise = columns(3, NUM_TOKENS, device)
    ratios = (noise / 10).exp()
    providers: dict[str, Provider] = {
        "qrm_fast, min_gae": partial(min_gae, rewards, values, cu_seqlens, lam=0.95),
        "qrm_fast, gae": partial(gae, rewards, values, cu_seqlens, lam=0.95),
        "qrm_fast, discounted_returns": partial(discounted_returns, rewards, cu_seqlens, gamma=0.95),
        "qrm_fast, vtrace": partial(vtrace, rewards, values, ratios, cu_seqlens, lam=0.95),
    }

    def gate():
        r, v, ratio = (x.cpu().double() for x in (rewards, values, ratios))
        cu = cu_seqlens.cpu()
        assert_as_float64(min_gae(rewards, values, cu_seqlens, lam=0.95), min_gae(r, v, cu, lam=0.95))
        assert_as_float64(vtrace(rewards, values, ratios, cu_seqlens, lam=0.95), vtrace(r, v, ratio, cu, lam=0.95))
        assert_as_float64(
            (discounted_returns(rewards, cu_seqlens, gamma=0.95),), (discounted_returns(r, cu, gamma=0.95),)
        )

    num_bytes = 16 * NUM_TOKENS
    return Case(providers, gate, limit=copy(num_bytes, device), bytes=num_bytes)


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
    if find_spec("torchrl"):
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

        r, v = padded()
        done = (torch.arange(width, device=device) == cu_seqlens.diff()[:, None] - 1)[..., None]
        after = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)[..., None]
        providers["torchrl, vectorised, padded beforehand"] = partial(
            vec_generalized_advantage_estimate, 1.0, 0.95, v[..., None], after, r[..., None], done, done
        )

    def gate():
        wide = gae(rewards.cpu().double(), values.cpu().double(), cu_seqlens.cpu(), lam=0.95)
        for way in providers:
            results = providers[way]()
            assert_as_float64(
                tuple(x[real[..., None]] if x.ndim == 3 else x for x in results) if "torchrl" in way else results, wide
            )

    num_bytes = 16 * num_tokens
    return Case(providers, gate, limit=copy(num_bytes, device), bytes=num_bytes)
