"""prm_rewards: literal values, float64, and the promises of every op."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from grids import far_apart

from qrm_fast import prm_rewards
from qrm_fast.ops.prm_rewards import _prm_rewards


def test_literal_values():
    odds = [[0.0, 0.0], [0.0, math.log(3)], [math.log(3), 0.0], [-5.0, 995.0], [math.inf, 0.0]]
    torch.testing.assert_close(prm_rewards(torch.tensor(odds)), torch.tensor([0, 0.5, -0.5, 1, -1]))
    assert prm_rewards(torch.tensor([[math.inf, math.inf], [math.nan, 0.0]])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_steps", [0, 1, 33, 5000])
def test_no_further_from_float64_than_the_softmax(num_steps, dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("no float64 on CUDA")
    logits = torch.randn(num_steps, 2, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype).to(device)
    acc = torch.promote_types(dtype, torch.float32)
    z = logits.double().cpu()
    exact = torch.tanh((z[:, 1] - z[:, 0]) / 2)
    peer = logits.to(acc).softmax(1)
    result = prm_rewards(logits)
    assert result.dtype == acc
    assert_as_accurate(result, exact, peer[:, 1] - peer[:, 0])


@pytest.mark.unpoisoned
def test_strided_rows_and_bits():
    logits = torch.randn(9000, 2)
    wide = torch.full((9000, 7), math.nan)
    wide[:, 3:5] = logits
    whole = prm_rewards(logits)
    assert torch.equal(prm_rewards(wide[:, 3:5]), whole)
    assert torch.equal(prm_rewards(logits[77:80]), whole[77:80])


def test_offsets_beyond_int32(tmp_path):
    logits = torch.randn(6, 2).bfloat16()
    assert torch.equal(prm_rewards(far_apart(logits, tmp_path / "logits")), prm_rewards(logits))


def test_not_differentiable():
    with pytest.raises(RuntimeError, match="is not differentiable"):
        prm_rewards(torch.zeros(3, 2, requires_grad=True)).sum().backward()


def test_opcheck():
    torch.library.opcheck(_prm_rewards.op, (torch.randn(5, 2),))
    torch.library.opcheck(_prm_rewards.op, (torch.randn(3, 4, dtype=torch.bfloat16)[:, 1:3],))


@pytest.mark.parametrize(
    "error, message, logits",
    [
        (ValueError, r"logits must be \[K, 2\] .*, got \[4\] float32", torch.zeros(4)),
        (ValueError, r"logits must be \[K, 2\] .*, got \[4, 3\] float32", torch.zeros(4, 3)),
        (TypeError, r"logits must be \[K, 2\] .*, got \[4, 2\] int64", torch.zeros(4, 2, dtype=torch.int64)),
        (ValueError, "logits must be dense in its last dimension, got stride 4", torch.zeros(2, 4).T),
    ],
)
def test_bad_input(error, message, logits):
    with pytest.raises(error, match=message):
        prm_rewards(logits)
