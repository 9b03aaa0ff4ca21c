"""The binary searches that the Triton kernels share, among boundaries past 2^31."""

import pytest
import torch
import triton
import triton.language as tl

from qrm_fast.triton.search import count_below, first_from, sequence_at, sequence_of, steps_of

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter


@triton.jit
def searches(bounds, rows, found, num_sequences, num_halvings, NUM_ROWS: tl.constexpr):
    o_t = tl.arange(0, NUM_ROWS)
    b_row = tl.load(rows + o_t)
    tl.store(found + o_t, sequence_of(bounds, b_row, num_sequences, num_halvings))
    tl.store(found + NUM_ROWS + o_t, count_below(bounds, num_sequences + 1, num_halvings, b_row))
    for i in range(0, NUM_ROWS):
        row = tl.load(rows + i)
        first, last = steps_of(bounds, num_sequences + 1, row, row)
        tl.store(found + 2 * NUM_ROWS + i, first_from(bounds, num_sequences + 1, row))
        tl.store(found + 3 * NUM_ROWS + i, first)
        tl.store(found + 4 * NUM_ROWS + i, last)
        tl.store(found + 5 * NUM_ROWS + i, sequence_at(bounds, row // 4, num_sequences, num_halvings, 1 << 40, 4))


def test_boundaries_beyond_int32(triton_device):
    far = 1 << 32
    bounds = torch.tensor([0, 3, far - 1, far + 5, far + 5, 1 << 40])
    rows = torch.tensor([0, 2, 3, far - 2, far - 1, far + 4, far + 5, (1 << 40) - 1])
    found = torch.full((6, len(rows)), -1, device=triton_device)
    searches[(1,)](bounds.to(triton_device), rows.to(triton_device), found, len(bounds) - 1, 3, NUM_ROWS=len(rows))
    below = torch.searchsorted(bounds, rows)
    assert torch.equal(found[0].cpu(), torch.searchsorted(bounds[1:], rows, right=True))
    assert torch.equal(found[1:5].cpu(), below.expand(4, -1))
    first_slots = torch.arange(len(bounds)) + bounds // 4
    assert torch.equal(found[5].cpu(), torch.searchsorted(first_slots, rows // 4, right=True) - 1)
