"""Shapes that the tests share: aligned, odd, one, none, and large enough to leave every block size of the kernels.

Left out on purpose: products of these grids (an op takes the whole length grid or the whole row grid, not both), and
more than 2^31 elements, which a test names itself where a kernel's offsets can reach it.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

LENGTHS = [
    pytest.param(lengths, id=name)
    for name, lengths in {
        "none": [],
        "one-empty": [0],
        "one-token": [1],
        "odd": [3, 1, 7, 63, 65],
        "empty-between": [0, 5, 0, 0, 2, 0],
        "aligned": [64, 64, 128],
        "long-and-short": [1500, 1, 2],
        "many": [1 + i % 5 for i in range(200)],
    }.items()
]

NUM_ROWS = [0, 1, 2, 33, 64, 257]


def cu_seqlens(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """[S+1] boundaries of packed sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def far_apart(x: Tensor, path: Path) -> Tensor:
    """`x` [T, D] with 2^30 elements and some from row to row: past 2^31 in the fourth, of a sparse file."""
    stride = (1 << 30) + 8
    num_elements = len(x) * stride
    storage = torch.UntypedStorage.from_file(str(path), True, num_elements * x.element_size())
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, (stride, 1)).copy_(x)
