"""More than 2^31 hidden elements: offsets that 32 bits would wrap. On the CPU the same of a few rows.

The last rows of a large tensor have the bits that they have by themselves, where every offset is small. Rows further
apart than that are in test_token_q.py and test_q_head_advantages.py, as views of a sparse file.
"""

import pytest
import torch

from qrm_fast import q_head_advantages, token_q

pytestmark = pytest.mark.unpoisoned
DIM, LAST = 2048, 700  # rows at the end, of which the last two sequences


@pytest.fixture
def hidden(device):
    """[T, D] bfloat16, on a GPU 4.3 GB and some."""
    num_rows = (2**31 // DIM if device == "cuda" else 2000) + LAST
    return torch.randn(num_rows, DIM, device=device, dtype=torch.bfloat16)


@pytest.mark.parametrize("gathered", [False, True])
def test_token_q_and_its_gradients(hidden, device, gathered):
    num_rows = len(hidden)
    head = torch.randn(5 if gathered else 1, DIM, device=device, dtype=torch.bfloat16)
    targets = torch.arange(num_rows, device=device) % 5 if gathered else None
    norm_weight = torch.rand(DIM, device=device, dtype=torch.bfloat16)
    grad_q = torch.zeros(num_rows, device=device)
    grad_q[-LAST:] = torch.randn(LAST, device=device)

    def results(rows: slice) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden[rows], head, norm_weight)]
        ids = None if targets is None else targets[rows]
        q = token_q(leaves[0], leaves[1], ids, norm_weight=leaves[2])
        return [q.detach(), *torch.autograd.grad(q, leaves, grad_q[rows])]

    (q, dhidden, *whole), (own_q, own_dhidden, *own) = results(slice(None)), results(slice(-LAST, None))
    assert torch.equal(q[-LAST:], own_q) and torch.equal(dhidden[-LAST:], own_dhidden)
    assert not dhidden[:-LAST].any()
    for x, y in zip(whole, own, strict=True):  # sums over the rows that have a gradient, in other blocks
        assert (x - y).norm() <= torch.finfo(x.dtype).eps * y.norm()


def test_q_head_advantages(hidden, device):
    head = torch.randn(DIM, device=device, dtype=torch.bfloat16)
    num_rows = len(hidden)
    cu_seqlens = torch.tensor([0, 1000, num_rows - LAST, num_rows - 300, num_rows], device=device)
    whole = q_head_advantages(hidden, head, cu_seqlens, center=True, eos_rescore="mean")
    own = q_head_advantages(
        hidden[-LAST:], head, torch.tensor([0, LAST - 300, LAST], device=device), center=True, eos_rescore="mean"
    )
    assert torch.equal(whole[-LAST:], own)
