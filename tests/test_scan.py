"""What gae, discounted_returns, vtrace and min_gae promise alike: accuracy, bits, masks, infinities, boundaries."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from grids import LENGTHS
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import SCANS, decays, loop, loops, problem

from qrm_fast import from_padded, to_padded

LONG = [30_000, 5, 8192, 0, 8193, 16384, 40_001, 1, 150_000, 6]  # around and far beyond blocks of 8192 rows
every_scan = pytest.mark.parametrize("name", SCANS)


def assert_close_where_finite(ours, exact, peer, slack=1):
    """Infinities are the same; what is finite is no further from float64 than PyTorch."""
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite])
    assert_as_accurate(ours[finite], exact[finite], peer[finite], slack=slack)


@pytest.mark.vectors
@every_scan
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_no_further_from_float64_than_pytorch(name, lengths, decay):
    scan, p = SCANS[name], problem(name, lengths)
    for options in {}, {"bootstrap": p.bootstrap}, {"bootstrap": p.bootstrap, "mask": p.mask}:
        exact = loops(name, p, decay, **options)
        options = options | decays(name, decay)
        peer = scan.reference(p.columns, p.cu, **options)
        for results in zip(scan.op(p.columns, p.cu, **options), exact, peer, strict=True):
            assert_close_where_finite(*results)


@pytest.mark.vectors
@every_scan
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(name, dtype):
    scan, p = SCANS[name], problem(name, [3, 1, 7, 63, 65], dtype)
    options = {"bootstrap": p.bootstrap, "mask": p.mask}
    exact = scan.reference(p.columns.double(), p.cu, bootstrap=p.bootstrap.double(), mask=p.mask)
    peer = scan.reference(p.columns, p.cu, **options)
    # float64 cannot be carried wider, and a tree rounds elsewhere than one row after the other
    slack = 4 if dtype == torch.float64 else 1
    for results in zip(scan.op(p.columns, p.cu, **options), exact, peer, strict=True):
        assert results[0].dtype == p.bootstrap.dtype
        assert_close_where_finite(*results, slack=slack)


@pytest.mark.vectors
@every_scan
def test_masked_rows_are_never_read_and_leave_no_trace(name):
    """NaN and infinity in a hole change no bit; a sequence with holes has the bits of the one without those rows."""
    scan, p = SCANS[name], problem(name, [5, 9, 0, 40, 3, 700, 4])
    p.mask[-4:] = False  # one sequence is nothing but holes
    whole = scan.op(p.columns, p.cu, bootstrap=p.bootstrap, mask=p.mask)
    for poison in math.nan, math.inf, -math.inf:
        poisoned = scan.op(p.columns.where(p.mask, poison), p.cu, bootstrap=p.bootstrap, mask=p.mask)
        assert all(map(torch.equal, whole, poisoned))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), p.mask.cumsum(0)])[p.cu.long()]
    short = scan.op(p.columns[:, p.mask], ends, bootstrap=p.bootstrap)
    for with_holes, without in zip(whole, short, strict=True):
        assert torch.equal(with_holes[p.mask], without) and not with_holes[~p.mask].any()


@every_scan
def test_an_all_masked_batch_gives_zeros(name):
    scan, p = SCANS[name], problem(name, [4, 0, 9000])
    nothing = torch.zeros_like(p.mask)
    results = scan.op(torch.full_like(p.columns, math.nan), p.cu, bootstrap=p.bootstrap, mask=nothing)
    assert not any(result.any() for result in results)


@every_scan
def test_sequences_with_and_without_a_bootstrap_mix(name):
    """A bootstrap of 0, of min_gae of infinity, has the bits of none."""
    scan, p = SCANS[name], problem(name, [9, 1, 0, 70, 9000, 3])
    given, none = torch.tensor([True, False] * 3), math.inf if name == "min_gae" else 0.0
    mixed = scan.op(p.columns, p.cu, bootstrap=p.bootstrap.where(given, none), mask=p.mask)
    every = scan.op(p.columns, p.cu, bootstrap=p.bootstrap, mask=p.mask)
    rows = given.repeat_interleave(p.cu.diff())
    for ours, with_one, without in zip(mixed, every, scan.op(p.columns, p.cu, mask=p.mask), strict=True):
        assert torch.equal(ours, with_one.where(rows, without)) and not torch.equal(with_one, without)


@pytest.mark.unpoisoned
@every_scan
@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=10), data=st.data())
def test_bits_do_not_depend_on_the_packing(name, lengths, data):
    """Packed, one by one, shuffled, and through a padded batch."""
    scan, p = SCANS[name], problem(name, lengths)
    packed = scan.op(p.columns, p.cu, bootstrap=p.bootstrap, mask=p.mask)
    order = data.draw(st.permutations(range(len(lengths))))
    shuffled = p.take(order)
    moved = scan.op(shuffled.columns, shuffled.cu, bootstrap=shuffled.bootstrap, mask=shuffled.mask)
    alone = [p.take([i]) for i in range(len(lengths))]
    alone = [scan.op(a.columns, a.cu, bootstrap=a.bootstrap, mask=a.mask) for a in alone]
    width = max(lengths)
    real = to_padded(torch.ones(sum(lengths), dtype=torch.bool), p.cu, width)
    cu, mask, *columns = from_padded(real, *(to_padded(x, p.cu, width, fill=math.nan) for x in (p.mask, *p.columns)))
    padded = scan.op(columns, cu, bootstrap=p.bootstrap, mask=mask)
    rows = torch.cat([torch.arange(0), *(p.sequences()[i] for i in order)])
    for field, result in enumerate(packed):
        assert torch.equal(moved[field], result[rows])
        assert torch.equal(torch.cat([a[field] for a in alone]), result)
        assert torch.equal(padded[field], result)


@pytest.mark.vectors
@pytest.mark.unpoisoned
@every_scan
def test_bits_of_long_sequences_do_not_depend_on_packing_or_threads(name):
    scan, p = SCANS[name], problem(name, LONG)
    threads = torch.get_num_threads()
    for options in {}, {"bootstrap": p.bootstrap, "mask": p.mask}:
        try:
            results = []
            for num_threads in 1, 2, 4, 2:
                torch.set_num_threads(num_threads)
                results.append(torch.stack(scan.op(p.columns, p.cu, **options, **decays(name, 0.999))))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])
        for i, rows in enumerate(p.sequences()):
            a = p.take([i])
            own = {"bootstrap": a.bootstrap, "mask": a.mask} if options else {}
            alone = torch.stack(scan.op(a.columns, a.cu, **own, **decays(name, 0.999)))
            assert torch.equal(alone, results[0][:, rows])


@pytest.mark.vectors
@every_scan
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
def test_blocks_of_long_sequences_join(name, decay):
    """Past 8192 rows, and across a hole that fills whole blocks, the results are those of a loop."""
    scan, p = SCANS[name], problem(name, [40_000])
    p.mask[10_000:30_000] = False
    for kept, options in (slice(None), {}), (p.mask, {"mask": p.mask}):
        ours = scan.op(p.columns, p.cu, bootstrap=p.bootstrap, **options, **decays(name, decay))
        for result, want in zip(ours, loop(name, p.columns[:, kept], p.bootstrap.item(), decay), strict=True):
            got, finite = result[kept], want.isfinite()
            assert torch.equal(got[~finite].double(), want[~finite])
            assert (got[finite] - want[finite]).abs().max() <= 1.2e-7 * want[finite].abs().max()  # a rounding


@pytest.mark.vectors
@every_scan
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinite_rewards_reach_what_a_loop_lets_them_reach(name, bad, decay):
    """Also across blocks of 8192 rows, where a decay of 0.5 per row has long underflowed."""
    scan, p = SCANS[name], problem(name, [7, 9000, 9])
    p.columns[0].nan_to_num_(posinf=0.5)
    clean = scan.op(p.columns, p.cu, **decays(name, decay))
    p.columns[0, 8950] = bad
    results = scan.op(p.columns, p.cu, **decays(name, decay))
    rows = torch.arange(len(p.mask))
    untouched = (rows < 7) | (rows > 8950)
    for ours, before, want in zip(results, clean, loop(name, p.columns[:, 7:9007], None, decay), strict=True):
        assert torch.equal(ours[untouched], before[untouched])
        ours = ours[7:9007]
        assert ((ours == want) | (ours.isnan() & want.isnan()) | (ours.isfinite() & want.isfinite())).all()


@every_scan
def test_ten_million_rows(name):
    """One sequence, at its end, in the middle and at its start: what is 1500 rows ahead weighs less than 1e-33."""
    scan, p = SCANS[name], problem(name, [10_000_000])
    results = scan.op(p.columns, p.cu, **decays(name, 0.95))
    for first, last, trusted in (0, 3000, 1500), (5_000_000, 5_003_000, 1500), (9_997_000, 10_000_000, 3000):
        for ours, want in zip(results, loop(name, p.columns[:, first:last], None, 0.95), strict=True):
            got, want = ours[first : first + trusted], want[:trusted]
            finite = want.isfinite()
            assert torch.equal(got[~finite].double(), want[~finite])
            torch.testing.assert_close(got[finite].double(), want[finite], rtol=1e-6, atol=1e-6)


@every_scan
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offset_slices_and_index_dtypes(name, dtype):
    """Columns at any offset of a larger tensor, whose other rows are NaN: no row outside is used."""
    scan, p = SCANS[name], problem(name, [3, 2, 4, 11])
    expected = scan.op(p.columns, p.cu)
    for offset in 0, 1, 7:
        wide = torch.full((len(p.columns), 40), math.nan)
        wide[:, offset : offset + 20] = p.columns
        assert all(map(torch.equal, scan.op(wide[:, offset : offset + 20], p.cu.to(dtype)), expected))


@every_scan
def test_not_differentiable(name):
    scan, p = SCANS[name], problem(name, [3, 2])
    with pytest.raises(RuntimeError, match="is not differentiable"):
        scan.op(p.columns.requires_grad_(), p.cu)[0].sum().backward()


@every_scan
@pytest.mark.parametrize(
    "error, message, cu",
    [
        (ValueError, "cu_seqlens must start at 0, got 1", [1, 3, 5]),
        (ValueError, "cu_seqlens must not decrease, got 4 then 2 at index 2", [0, 4, 2, 5]),
        (ValueError, "cu_seqlens must end at the number of packed rows, 5, got 4", [0, 2, 4]),
        (TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64, got \[3\] float32", [0.0, 2.0, 5.0]),
    ],
)
def test_bad_boundaries(name, error, message, cu):
    p = problem(name, [3, 2])
    with pytest.raises(error, match=message):
        SCANS[name].op(p.columns, torch.tensor(cu))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [1, 49_999, 50_000, 66_666, 99_999, 100_000, 199_999])
def test_one_bad_boundary_among_many(bad, dtype):
    """The check goes by vectors, in a part per thread: also where these meet."""
    cu = torch.arange(200_001, dtype=dtype)
    rows = torch.zeros(1, 200_000)
    SCANS["discounted_returns"].op(rows, cu)
    cu[bad] = cu[bad + 1] + 1
    with pytest.raises(ValueError, match=f"got {bad + 2} then {bad + 1} at index {bad + 1}"):
        SCANS["discounted_returns"].op(rows, cu)


@every_scan
@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"bootstrap must be \[S\] float32 with S = 2, got \[1\] float32", {"bootstrap": torch.zeros(1)}),
        (TypeError, r"bootstrap must be \[S\] float32, got \[2\] int64", {"bootstrap": torch.zeros(2).long()}),
        (TypeError, r"mask must be \[T\] bool, got \[5\] float32", {"mask": torch.zeros(5)}),
        (ValueError, r"mask must be \[T\] bool with T = 5, got \[4\] bool", {"mask": torch.zeros(4, dtype=torch.bool)}),
    ],
)
def test_bad_options(name, error, message, options):
    p = problem(name, [3, 2])
    with pytest.raises(error, match=message):
        SCANS[name].op(p.columns, p.cu, **options)
