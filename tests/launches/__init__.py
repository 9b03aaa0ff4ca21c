"""Launches of the Triton kernels: a file X.py calls the launchers of qrm_fast/triton/X.py on meta tensors.

`launches(capability)` makes those of a training step on such a GPU, with every option, and those of odd sizes without
options. Each is compiled, so a call that leads to no other machine code is not worth its time: where only loads differ,
dtypes take turns over the architectures.
"""

import contextlib
from functools import partial
from types import ModuleType
from unittest import mock

import torch

from qrm_fast.triton import linear_logprobs as heads

T, D, V = 16384, 3584, 152064  # tokens, hidden, vocabulary
K, S = 2048, 512  # steps, sequences
ODD_T, ODD_D, ODD_V, ODD_K, ODD_S = 10007, 1001, 32003, 999, 37
MANY = 5000  # sequences that are sorted by group, not compared
WIDEST_V = 1 << 28  # a vocabulary for which there must still be a grid: y and z end at 65,535

fp16, bf16, fp32, fp64, i32, i64, flags = (
    partial(torch.empty, dtype=dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
)


@contextlib.contextmanager
def compiled_fold(module: ModuleType):
    """The module's launches where csrc/cuda folds for it, 256 columns at a time with a softcap, too."""

    def fold(head, *_, **__):
        return head.hidden.new_empty(3, -(-len(head.weight) // heads.SPLIT), len(head.targets)).float()

    with mock.patch.object(heads, "compiled", lambda *_: True), mock.patch.object(module, "fold", fold):
        yield
