"""The scans over packed sequences as one table: what test_scan.py promises of all of them."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from grids import cu_seqlens
from torch import Tensor

import qrm_fast
from qrm_fast.ops.discounted_returns import _discounted_returns
from qrm_fast.ops.gae import _gae
from qrm_fast.ops.min_gae import _min_gae
from qrm_fast.ops.vtrace import _vtrace


class Scan(NamedTuple):
    """`op(columns, cu, **options)` and `reference`, its PyTorch reference, give a tuple of results [T]."""

    num_columns: int
    op: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]


def _gae_reference(columns, cu, gamma=1.0, lam=0.95, bootstrap=None, mask=None):
    return _gae.reference(*columns, cu, gamma, lam, None, bootstrap, mask)


def _returns_reference(columns, cu, gamma=1.0, bootstrap=None, mask=None):
    return (_discounted_returns.reference(*columns, cu, gamma, bootstrap, mask),)


def _vtrace_reference(columns, cu, gamma=1.0, lam=1.0, rho_bar=1.0, c_bar=1.0, bootstrap=None, mask=None):
    return _vtrace.reference(*columns, cu, gamma, lam, rho_bar, c_bar, bootstrap, mask)


def _min_reference(columns, cu, lam=0.95, bootstrap=None, mask=None):
    return _min_gae.reference(*columns, cu, lam, bootstrap, mask)


SCANS = {
    "gae": Scan(2, lambda columns, cu, **o: tuple(qrm_fast.gae(*columns, cu, **o)), _gae_reference),
    "discounted_returns": Scan(
        1, lambda columns, cu, **o: (qrm_fast.discounted_returns(*columns, cu, **o),), _returns_reference
    ),
    "vtrace": Scan(3, lambda columns, cu, **o: tuple(qrm_fast.vtrace(*columns, cu, **o)), _vtrace_reference),
    "min_gae": Scan(2, lambda columns, cu, **o: tuple(qrm_fast.min_gae(*columns, cu, **o)), _min_reference),
}


def loop(name: str, columns: Tensor, bootstrap: float | None, decay: float) -> Tensor:
    """The recurrence over one sequence in Python's floats, [results, T] float64, with gamma or lam = decay."""
    no_end = torch.inf if name == "min_gae" else 0.0
    x = next_value = next_target = no_end if bootstrap is None else bootstrap
    if name in ("gae", "vtrace"):
        x = 0.0
    ahead, results = x, []
    for r, *rest in reversed(list(zip(*columns.double().tolist(), strict=True))):
        if name == "discounted_returns":
            x = r + decay * x
            results.append([x])
            continue
        v, *ratio = rest
        if name == "gae":
            x = r + next_value - v + decay * x
            results.append([x, x + v])
        elif name == "vtrace":
            rho = ratio[0] if ratio[0] < 1 else 1.0
            advantage = rho * (r + next_target - v)
            x = rho * (r + next_value - v) + decay * rho * x
            next_target = v + x
            results.append([next_target, advantage])
        else:
            q = r if r < ahead or r != r else ahead
            ahead = (1 - decay) * v + (decay * q if decay else 0.0)
            results.append([q - v, q])
        next_value = v
    return torch.tensor(results[::-1], dtype=torch.float64).T


class Problem(NamedTuple):
    columns: Tensor  # [columns, T]
    cu: Tensor
    mask: Tensor  # [T], holes in it
    bootstrap: Tensor  # [S]
    lengths: list[int]

    def sequences(self) -> list[Tensor]:
        """Rows of each sequence."""
        return [torch.arange(bos, eos) for bos, eos in itertools.pairwise(self.cu.tolist())]

    def take(self, order: list[int]) -> "Problem":
        """These sequences, packed in this order."""
        rows = torch.cat([torch.arange(0), *(self.sequences()[i] for i in order)])
        lengths = [self.lengths[i] for i in order]
        return Problem(self.columns[:, rows], cu_seqlens(lengths), self.mask[rows], self.bootstrap[order], lengths)


def problem(scan: str, lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Normal rewards and values, ratios around 1; of min_gae two rewards in three are +inf, rows without a step."""
    g = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    columns = torch.randn(3, num_tokens, generator=g)
    columns[2] = (columns[2] / 2).exp()
    if scan == "min_gae":
        columns[0, torch.rand(num_tokens, generator=g) < 2 / 3] = torch.inf
    mask = torch.rand(num_tokens, generator=g) < 0.6
    bootstrap = torch.randn(len(lengths), generator=g).to(torch.promote_types(dtype, torch.float32))
    return Problem(columns[: SCANS[scan].num_columns].to(dtype), cu_seqlens(lengths), mask, bootstrap, lengths)


def loops(name: str, p: Problem, decay: float, bootstrap: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """`loop` over every sequence; masked rows are left out of it and hold 0."""
    out = torch.zeros(1 if name == "discounted_returns" else 2, len(p.mask), dtype=torch.float64)
    for i, rows in enumerate(p.sequences()):
        kept = rows if mask is None else rows[mask[rows]]
        if len(kept):
            out[:, kept] = loop(name, p.columns[:, kept], None if bootstrap is None else bootstrap[i].item(), decay)
    return out


def decays(scan: str, decay: float) -> dict[str, float]:
    """Options under which a row's weight falls by this factor per row (of vtrace at most by it)."""
    return {"gamma": decay} if scan == "discounted_returns" else {"lam": decay}
