"""linear_logprobs_partial and its merge: a head cut into shards, in one process and in two, against the whole head."""

import itertools
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_no_further
from cuda_graph import replayed
from test_linear_logprobs import make, naive

from qrm_fast import LogprobsPartial, linear_logprobs, linear_logprobs_partial, merge_logprobs
from qrm_fast.ops.linear_logprobs_partial import _linear_logprobs_partial
from qrm_fast.triton import linear_logprobs_partial as triton_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # ignored rows
]

CUTS = [0, 1, 130, 2200, 3000]  # four unequal shards, one of a single column and one beyond a split of the kernel


def stacked(partials):
    return LogprobsPartial(*map(torch.stack, zip(*partials, strict=True)))


def sharded(hidden, weight, bias, targets, *, cuts=CUTS, **options):
    parts = []
    for begin, end in itertools.pairwise(cuts):
        shard = weight[begin:end], None if bias is None else bias[begin:end]
        parts.append(linear_logprobs_partial(hidden, shard[0], targets, vocab_start=begin, bias=shard[1], **options))
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "temperature": True, "softcap": 5.0}], ids=["plain", "everything"]
)
def test_four_shards_merge_to_the_whole(options, dtype):
    """No further from float64 than log_softmax of float32 logits; no more is one shard alone."""
    acc = torch.promote_types(dtype, torch.float32)
    runs = []
    for t in 0, 1, 63:
        tensors, rest = make(t, 64, 3000, dtype, **options)
        merged = (merge_logprobs(stacked(sharded(*tensors.values(), **rest, cuts=cuts))) for cuts in (CUTS, [0, 3000]))
        runs.append([*merged, *(naive(**cast(tensors | rest, to)) for to in (torch.float64, acc))])
    for i in range(3):
        *results, exact, peer = (torch.cat([run[k][i] for run in runs]) for k in range(4))
        for got in results:
            assert got.dtype == acc and ((got <= 0).all() if i == 0 else True)
            assert_no_further(got, exact, peer)


def cast(arguments, dtype):
    floating = {k: x.to(dtype) for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return arguments | floating


def assert_table(op):
    """Logits [0, log 2, log 5, -inf]; the target is column 1; the second row is ignored."""
    hidden = torch.tensor([[1.0, 0.0], [math.nan, math.nan]])
    weight = torch.tensor([[0.0, 0], [math.log(2), 1], [math.log(5), -1], [0, 0]])
    bias = torch.tensor([0.0, 0, 0, -math.inf])
    inf, nan = math.inf, math.nan
    for begin, end, want in [
        (0, 2, [math.log(2), 1.5, -math.log(2) / 2, math.log(2)]),
        (2, 3, [math.log(5), 1, 0, nan]),
        (3, 4, [-inf, 0, 0, nan]),
    ]:
        shard = weight[begin:end].contiguous(), torch.tensor([1, -100]), begin, bias[begin:end].contiguous()
        got = torch.stack(op(hidden, *shard, 1.0, None, None, -100)).cpu()
        torch.testing.assert_close(got, torch.tensor([want, [-inf, 0, 0, nan]]).T, equal_nan=True)


@pytest.mark.parametrize(
    "op", [_linear_logprobs_partial, _linear_logprobs_partial.reference], ids=["kernel", "reference"]
)
def test_table(op):
    assert_table(op)


def test_targets_outside_the_shard_change_nothing_else():
    tensors, _ = make(6, 8, 40, torch.float32)
    inside, outside = torch.arange(6), torch.tensor([-1, 47, 2**40, -(2**63), 46, 5])
    first = linear_logprobs_partial(tensors["hidden"], tensors["weight"], inside + 6, vocab_start=6)
    second = linear_logprobs_partial(tensors["hidden"], tensors["weight"], outside, vocab_start=6)
    for x, y in zip(first[:3], second[:3], strict=True):
        assert torch.equal(x, y)
    assert first.target_logit.isfinite().all() and second.target_logit.isnan().all()


def test_non_finite_rows_stay_alone():
    tensors, _ = make(6, 8, 300, torch.float32)
    targets = torch.tensor([0, -100, 299, 5, 7, 130])
    clean = sharded(**tensors, targets=targets, cuts=[0, 100, 300])
    tensors["hidden"][3], tensors["hidden"][1], tensors["hidden"][4] = math.nan, math.nan, math.inf
    dirty = sharded(**tensors, targets=targets, cuts=[0, 100, 300])
    good, bad = torch.tensor([0, 1, 2, 5]), torch.tensor([3, 4])
    for x, y in zip(clean, dirty, strict=True):
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a[good], b[good], rtol=0, atol=0, equal_nan=True)
    for x, y in zip(merge_logprobs(stacked(clean)), merge_logprobs(stacked(dirty)), strict=True):
        assert torch.equal(x[good], y[good]) and y[bad].isnan().all()


@pytest.mark.unpoisoned
def test_bits_of_a_row_do_not_depend_on_the_batch():
    tensors, rest = make(300, 40, 2500, torch.bfloat16, bias=True, temperature=True)
    wide = torch.full((300, 2, 40), math.nan, dtype=torch.bfloat16)
    wide[:, 0] = tensors["hidden"]

    def rows(hidden, index):
        options = {"bias": tensors["bias"], "temperature": rest["temperature"][index], "vocab_start": 100}
        return linear_logprobs_partial(hidden[index], tensors["weight"], rest["targets"][index], **options)

    everything = rows(tensors["hidden"], torch.arange(300))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for hidden, index in (tensors["hidden"], torch.randperm(300)), (wide[:, 0], slice(200, 201)):
        for x, y in zip(everything, rows(hidden, index), strict=True):
            torch.testing.assert_close(x[index], y, rtol=0, atol=0, equal_nan=True)
    torch.set_num_threads(threads)


def test_not_differentiable():
    tensors, rest = make(3, 4, 5, torch.float32)
    partial = linear_logprobs_partial(tensors["hidden"].requires_grad_(), tensors["weight"], **rest, vocab_start=0)
    with pytest.raises(RuntimeError, match="is not differentiable"):
        partial.sumexp.sum().backward()


def test_opcheck():
    tensors, rest = make(7, 5, 11, torch.float32, bias=True, temperature=True)
    hidden, weight, bias = tensors.values()
    for arguments in (bias, 1.0, rest["temperature"], 3.0, -100), (None, 0.7, None, None, -100):
        torch.library.opcheck(
            _linear_logprobs_partial.op, (hidden, weight, rest["targets"].clamp(min=0) + 4, 4, *arguments)
        )


def test_compiles_with_its_merge_for_any_length():
    @torch.compile(fullgraph=True, dynamic=True)
    def score(hidden, weight, targets):
        parts = [
            linear_logprobs_partial(hidden, weight[i : i + 20], targets, vocab_start=i, temperature=0.9)
            for i in (0, 20)
        ]
        return merge_logprobs(stacked(parts))

    for t, stance in (12, "default"), (30, "fail_on_recompile"):
        tensors, rest = make(t, 8, 40, torch.float32)
        with torch.compiler.set_stance(stance):
            got = score(tensors["hidden"], tensors["weight"], rest["targets"])
        want = linear_logprobs(tensors["hidden"], tensors["weight"], rest["targets"], temperature=0.9)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def gathered_on_two_ranks(rank, address, tensors, rest, results):
    """A process that holds one of two unequal shards: every rank gets the whole answer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    begin, end = [0, 37, 100][rank : rank + 2]
    partial = linear_logprobs_partial(
        tensors["hidden"], tensors["weight"][begin:end], vocab_start=begin, bias=tensors["bias"][begin:end], **rest
    )
    parts = [torch.empty(4, len(tensors["hidden"])) for _ in range(2)]
    dist.all_gather(parts, torch.stack(partial))
    results[rank] = torch.stack(merge_logprobs(LogprobsPartial(*torch.stack(parts).unbind(1))))
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    tensors, rest = make(9, 16, 100, torch.float32, bias=True, temperature=True)
    results = torch.full((2, 3, 9), math.nan).share_memory_()
    torch.multiprocessing.spawn(
        gathered_on_two_ranks, (f"file://{tmp_path / 'rendezvous'}", tensors, rest, results), nprocs=2
    )
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], torch.stack(linear_logprobs(**tensors, **rest)))


def test_triton_table(triton_device):
    assert_table(lambda *a: triton_kernels.forward(*(on(x, triton_device) for x in a)))


def on(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_four_shards_merge_to_the_whole(triton_device, dtype):
    """Each shard's fields agree with the CPU kernel's; merged they are as exact as the whole in float32."""
    tensors, rest = make(9, 20, 2200, dtype, bias=True, temperature=True, softcap=5.0)
    options = 1.0, rest["temperature"], 5.0, -100
    parts, want = [], []
    for begin, end in itertools.pairwise([0, 1, 130, 2180, 2200]):
        shard = tensors["hidden"], tensors["weight"][begin:end], rest["targets"], begin, tensors["bias"][begin:end]
        parts.append(triton_kernels.forward(*(on(x, triton_device) for x in (*shard, *options))))
        want.append(_linear_logprobs_partial(*shard, *options))
        for got, expected in zip(parts[-1], want[-1], strict=True):
            torch.testing.assert_close(got.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    got = [x.cpu() for x in merge_logprobs(stacked(parts))]
    arguments = tensors | rest
    exact, peer = (naive(**cast(arguments, to)) for to in (torch.float64, torch.float32))
    for i in range(3):
        assert_no_further(got[i], exact[i], peer[i])


@pytest.mark.gpu
def test_public_functions_on_cuda_run_the_triton_kernels_without_waiting():
    tensors, rest = make(300, 72, 3000, torch.bfloat16, bias=True, temperature=True)
    arguments = {k: on(x, "cuda") for k, x in (tensors | rest).items()}
    want = merge_logprobs(stacked(sharded(*tensors.values(), **rest)))
    sharded(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    got = merge_logprobs(stacked(sharded(**arguments)))
    torch.cuda.set_sync_debug_mode("default")
    again = replayed(lambda: merge_logprobs(stacked(sharded(**arguments))))
    for x, y, z in zip(got, want, again, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=2e-5)
        assert torch.equal(x, z)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \[V, D\] float32 with D = 3, got \[5, 4\]"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "at least one row"),
        ({"targets": torch.zeros(4)}, TypeError, r"targets must be \[T\] int64, got \[4\] float32"),
        ({"vocab_start": -1}, ValueError, "vocab_start must be >= 0, got -1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 1, 2, -100])}
    with pytest.raises(error, match=message):
        linear_logprobs_partial(**(arguments | {"vocab_start": 0} | change))
