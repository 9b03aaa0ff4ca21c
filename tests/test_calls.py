"""Every public function captured in a CUDA graph, and twice at once; on the CPU in two threads, without a graph."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calls import CALLS, Sizes, inputs, outcome
from cuda_graph import captured
from torch import Tensor

import qrm_fast

FOR_THE_HOST = {"from_padded", "pack", "plan_microbatches", "unpack"}  # their results' shapes depend on the data
SIZES = {"cpu": Sizes(700, 12, 40, 24, 120, 70), "cuda": Sizes(5000, 40, 300, 72, 3000, 300)}
CAPTURABLE = sorted(CALLS.keys() - FOR_THE_HOST)


def test_every_public_function_is_called():
    called = {name for name in CALLS if "16 bits" not in name}
    assert called == {name for name in qrm_fast.__all__ if not isinstance(getattr(qrm_fast, name), type)}


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_nothing_reads_the_data(name):
    """As a GPU's, data on the meta device cannot be read without an error; gradients neither."""
    assert all(x.is_meta for x in outcome(name, inputs(SIZES["cpu"], 0, "meta")))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", CAPTURABLE)
def test_three_replays_over_changed_inputs(name, device):
    """Boundaries, groups and targets change too. On the CPU each replay is a call: nothing is left of the last."""
    x = inputs(SIZES[device], 0, device)
    outcome(name, x)
    replay = captured(lambda: outcome(name, x)) if device == "cuda" else lambda: outcome(name, x)
    for seed in 1, 2, 3:
        changed = inputs(SIZES[device], seed, device)
        with torch.no_grad():
            for old, new in zip(x, changed, strict=True):
                old.copy_(new)
        assert_same(replay(), outcome(name, changed))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", sorted(CALLS))
def test_two_at_once(name, device):
    """On two streams, on the CPU in two threads, over different inputs: the bits of one after the other."""
    problems = [inputs(SIZES[device], seed, device) for seed in (1, 2)]
    want = [outcome(name, x) for x in problems]
    if device == "cpu":
        with ThreadPoolExecutor(2) as pool:
            got = [[x] for x in pool.map(lambda x: outcome(name, x), problems)]
    else:
        streams = [torch.cuda.Stream() for _ in problems]
        got = [[] for _ in problems]
        torch.cuda.synchronize()
        for _ in range(10):
            for results, stream, x in zip(got, streams, problems, strict=True):
                with torch.cuda.stream(stream):
                    results.append(outcome(name, x))
        torch.cuda.synchronize()
    for results, expected in zip(got, want, strict=True):
        for result in results:
            assert_same(result, expected)
