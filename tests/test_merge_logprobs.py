"""merge_logprobs: tables worked by hand and the errors; its accuracy is tested with linear_logprobs_partial."""

import math

import pytest
import torch

from qrm_fast import LogprobsPartial, merge_logprobs
from qrm_fast.ops.merge_logprobs import _merge_logprobs

INF, NAN = math.inf, math.nan


def fields(*shards):
    """[R, T] fields from one list of (max, sumexp, sum_z_exp, target_logit) rows per shard."""
    return LogprobsPartial(*torch.tensor(shards).permute(2, 0, 1).contiguous())


def test_table():
    """p = [1/8, 1/4, 5/8] in two shards, the first column alone; a -inf target; an ignored row; two rows of NaN."""
    two, five = math.log(2), math.log(5)
    first = [(0.0, 1.0, 0.0, NAN), (0.0, 1.0, 0.0, NAN), (-INF, 0.0, 0.0, NAN), *[(-INF, NAN, NAN, NAN)] * 2]
    second = [(five, 1.4, -0.4 * (five - two), two), (0.0, 1.0, 0.0, -INF), (-INF, 0.0, 0.0, NAN), (1.0, 1.0, 0.0, 1.0)]
    second.append((-INF, NAN, NAN, NAN))
    entropy = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    want = [[-math.log(4), -INF, 0, NAN, NAN], [entropy, two, 0, NAN, NAN], [math.log(8), two, 0, NAN, NAN]]
    for shards in (first, second), (second, first):
        got = torch.stack(merge_logprobs(fields(*shards)))
        torch.testing.assert_close(got, torch.tensor(want), equal_nan=True)


def held(*shards):
    """Four rows whose target only the given number of three shards holds."""
    target = torch.full((3, 4), NAN)
    for row, number in enumerate(shards):
        target[:number, row] = -1.0
    return LogprobsPartial(torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4), target)


def test_targets_that_not_exactly_one_shard_holds(monkeypatch):
    """An error, or NaN where nothing can be raised."""
    for shards, number in ((1, 0, 1, 1), 0), ((1, 2, 1, 1), 2):
        sentence = f"must lie in one shard, got {number} of 3 shards that hold the target of row 1"
        with pytest.raises(ValueError, match=sentence):
            merge_logprobs(held(*shards))
    monkeypatch.setattr("qrm_fast.ops.merge_logprobs.at_hand", lambda x: False)
    for out in merge_logprobs(held(1, 0, 2, 1)):
        assert out.isnan().tolist() == [False, True, True, False]


def test_far_apart_shards():
    """A shard of -1e4 beside one of +1e4 adds nothing, and a result of zero rows has none."""
    out = merge_logprobs(fields([(1e4, 2.0, 0.0, 1e4)], [(-1e4, 3.0, -1.0, NAN)]))
    torch.testing.assert_close(torch.cat(out), torch.tensor([-math.log(2), math.log(2), 1e4 + math.log(2)]))
    assert all(len(x) == 0 for x in merge_logprobs(LogprobsPartial(*torch.empty(4, 2, 0))))


def test_strided_fields_are_read_in_place():
    gathered = torch.rand(3, 4, 5)
    gathered[:, 3] = NAN
    gathered[1, 3] = 0.5
    for x, y in zip(
        merge_logprobs(LogprobsPartial(*gathered.unbind(1))),
        merge_logprobs(LogprobsPartial(*gathered.transpose(0, 1).contiguous())),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.unpoisoned
def test_bits_of_a_row_do_not_depend_on_the_batch():
    """More shards than a sum over them takes one by one."""
    partials = torch.rand(4, 9, 700)
    partials[3, 1:] = NAN
    whole = merge_logprobs(LogprobsPartial(*partials))
    for rows in torch.randperm(700), torch.tensor([699]):
        part = merge_logprobs(LogprobsPartial(*partials[:, :, rows].contiguous()))
        assert all(torch.equal(x[rows], y) for x, y in zip(whole, part, strict=True))


def test_opcheck():
    for dtype in torch.float32, torch.float64:
        torch.library.opcheck(_merge_logprobs.op, tuple(x.to(dtype) for x in held(1, 1, 1, 1)))


def test_bad_input():
    good = held(1, 1, 1, 1)
    for error, sentence, change in [
        (
            TypeError,
            r"partials.max must be \[R, T\] float32 or float64, got .* bfloat16",
            dict(max=good.max.bfloat16()),
        ),
        (ValueError, r"partials.max must be \[R, T\] .*, got \[4\]", dict(max=good.max[0])),
        (ValueError, r"partials.sumexp must be .* with T = 4, got \[3, 3\]", dict(sumexp=good.max[:, :3])),
        (TypeError, "partials.sum_z_exp must be .* float32, got .* float64", dict(sum_z_exp=good.max.double())),
        (ValueError, "partials.target_logit must be dense in its last", dict(target_logit=torch.zeros(4, 3).T)),
    ]:
        with pytest.raises(error, match=sentence):
            merge_logprobs(good._replace(**change))
    with pytest.raises(ValueError, match=r"at least one shard, got \[0, T\]"):
        merge_logprobs(LogprobsPartial(*torch.empty(4, 0, 3)))
