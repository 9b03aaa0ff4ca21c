"""Advantages over packed sequences: bound by memory, so the limit is a copy of the same bytes."""

import torch

from qrm_fast import gae

from .harness import Case, case, copy


@case(
    cpu=[{"num_sequences": 1, "mean_len": 1 << 20}, {"num_sequences": 512, "mean_len": 2048}],
    cuda=[{"num_sequences": n, "mean_len": (1 << 24) // n} for n in (1, 8192, 1 << 20)],
)
def packed_gae(device: torch.device, num_sequences: int, mean_len: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * mean_len, (num_sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    num_tokens, longest = int(lengths.sum()), int(lengths.max())
    rewards, values = torch.randn(2, num_tokens, generator=generator).to(device)

    def ours():
        return gae(rewards, values, cu_seqlens, gamma=1.0, lam=0.95)

    def padded():
        """What trainers do: one step per column of a [S, longest] batch, zeros at the end."""
        real = torch.arange(longest, device=device) < cu_seqlens.diff()[:, None]  # [S, longest]
        r, v = (torch.zeros(real.shape, device=device).masked_scatter_(real, x) for x in (rewards, values))
        advantages = torch.zeros_like(r)
        advantage = next_value = torch.zeros_like(r[:, 0])
        for t in reversed(range(longest)):
            advantage = advantages[:, t] = r[:, t] + next_value - v[:, t] + 0.95 * advantage
            next_value = v[:, t]
        return advantages[real], (advantages + v)[real]

    def gate():
        """Close to the float64 kernel, which the tests hold against the reference: rounding over some 20 steps."""
        wide = gae(rewards.cpu().double(), values.cpu().double(), cu_seqlens.cpu(), gamma=1.0, lam=0.95)
        for got, want in zip(ours(), wide, strict=True):
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-4)

    providers = {"qrm_fast": ours}
    if longest <= 8192:  # more columns take minutes
        providers["padded, a step per column"] = padded
    num_bytes = 16 * num_tokens + 8 * num_sequences
    return Case(providers, gate, limit=copy(num_bytes, device), bytes=num_bytes)
