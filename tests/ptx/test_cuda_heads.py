"""Hopper's kernels of heads, as nvcc compiles them for sm_90a, under several schedules; without nvcc, none is."""

import math
import re
import shutil
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ptx import cuda_launches
from ptx.emulator import Fault

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
SPLIT, TILE, JOINT_SPLIT = 2048, 256, 2112  # columns


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    temperatures: Tensor | None = None
    softcap: float | None = None

    def rows(self, rows: slice) -> "Problem":
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows], temperatures=temperatures)

    def logits(self) -> Tensor:
        z = self.hidden.double() @ self.weight.double().T
        z = z if self.bias is None else z + self.bias.double()
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperatures is None else z / self.temperatures.double()[:, None]


class Results(NamedTuple):
    statistics: Tensor
    target_logits: Tensor
    kept: Tensor | None
    tops: Tensor | None
    running: Tensor | None

    def same(self, other: "Results") -> bool:
        return all(torch.equal(x, y) for x, y in zip(self, other, strict=True) if x is not None)

    def rows(self, rows: slice) -> "Results":
        return Results(*(x if x is None else x[..., rows] for x in self[:2]), None, None, None)


def problem(num_rows: int, vocab: int, dim: int, dtype=torch.bfloat16, options=(), softcap=None) -> Problem:
    """Rows start at multiples of 16 bytes, whatever dim is."""
    g = torch.Generator().manual_seed(0)
    width = math.ceil(dim / 8) * 8
    hidden = torch.randn(num_rows, width, generator=g).to(dtype)[:, :dim]
    weight = (torch.randn(vocab, width, generator=g) * 3 / dim**0.5).to(dtype)[:, :dim]
    bias = torch.randn(vocab, generator=g).to(dtype) if "bias" in options else None
    temperatures = torch.rand(num_rows, generator=g) + 0.5 if "temperatures" in options else None
    return Problem(hidden, weight, torch.randint(vocab, (num_rows,), generator=g), bias, temperatures, softcap)


def folded(p: Problem, seed: int, kept=False, running=False, **mutation) -> Results:
    num_rows, vocab = len(p.hidden), len(p.weight)
    tiles = math.ceil(vocab / TILE)
    results = Results(
        torch.full((3, math.ceil(vocab / SPLIT), num_rows), math.nan),
        torch.full((num_rows,), math.nan),
        torch.full((num_rows, math.ceil(vocab / 8) * 8), 7.0, dtype=torch.float16)[:, :vocab] if kept else None,
        torch.full((tiles, num_rows), math.nan) if kept else None,
        torch.full((2, tiles, num_rows), math.nan) if running else None,
    )
    cuda_launches.launched("head_fold", seed, *p, *results, **mutation)
    return results


def statistics(z: Tensor) -> Tensor:
    """[3, T]: maximum, sum e^(z - max), sum (z - max) e^(z - max)."""
    top = z.max(1).values
    shift = z - top[:, None]
    return torch.stack([top, shift.exp().sum(1), torch.where(shift > -1000, shift * shift.exp(), 0).sum(1)])


CASES = {
    "one row": problem(1, 300, 64),
    "one block of rows": problem(100, 256, 64, torch.float16),
    "a pair of blocks": problem(200, 520, 192, options=["temperatures"], softcap=5.0),
    "an idle block": problem(300, 700, 100, options=["bias"]),
    "odd sizes": problem(131, 257, 67, torch.float16, ["bias", "temperatures"], 3.0),
    "splits": problem(130, 2311, 64, options=["bias", "temperatures"]),
}


@pytest.mark.parametrize("kept, running", [(False, True), (True, False)], ids=["running", "kept"])
@pytest.mark.parametrize("case", CASES)
def test_as_logits_in_float64(case, kept, running):
    p = CASES[case]
    z, vocab = p.logits(), len(p.weight)
    results = folded(p, seed=1, kept=kept, running=running)
    splits = torch.stack([statistics(s) for s in z.split(SPLIT, 1)], 1)
    torch.testing.assert_close(results.statistics.double(), splits, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(results.target_logits.double(), z.gather(1, p.targets[:, None])[:, 0], rtol=0, atol=5e-6)
    tiles = z.split(TILE, 1)
    if running:
        before = [z[:, v // SPLIT * SPLIT : v + TILE] for v in range(0, vocab, TILE)]
        upto = torch.stack([statistics(x)[:2] for x in before], 1)
        torch.testing.assert_close(results.running.double(), upto, rtol=1e-6, atol=2e-5)
    if kept:
        tops = torch.stack([x.max(1).values for x in tiles])
        torch.testing.assert_close(results.tops.double(), tops, rtol=0, atol=5e-6)
        e = torch.cat([(x - top[:, None]).exp() for x, top in zip(tiles, tops, strict=True)], 1)
        torch.testing.assert_close(results.kept.double(), e, rtol=2**-11, atol=1e-5)
        width = results.kept.stride(0)
        beside = results.kept.as_strided((len(z), width - vocab), (width, 1), vocab)
        assert (beside == 7).all()


@pytest.mark.unpoisoned
def test_a_row_has_the_same_bits_among_any_others_under_any_schedule():
    """Alone, in either half of a pair of blocks, beside a block without rows; with exponentials kept or not."""
    p = problem(300, 530, 100, options=["bias", "temperatures"], softcap=9.0)
    whole = folded(p, seed=0, kept=True, running=True)
    for seed in range(1, 8):
        assert folded(p, seed, kept=True, running=True).same(whole)
    for seed, rows in enumerate([slice(0, 1), slice(7, 128), slice(40, 180), slice(100, 300), slice(299, 300)]):
        assert folded(p.rows(rows), seed).same(whole.rows(rows))


def test_wild_targets_and_rows_that_are_not_finite_stay_alone():
    p = problem(140, 300, 64)
    clean = folded(p, seed=2, kept=True)
    wild = torch.tensor([-1, -100, 300, 511, 1 << 40, -(1 << 62)])
    p.targets[3:9] = wild
    p.hidden[135] = math.nan
    p.hidden[20, 5] = math.inf
    results = folded(p, seed=3, kept=True)
    touched = [*range(3, 9), 20, 135]
    others = [i for i in range(140) if i not in touched]
    assert torch.equal(results.statistics[..., others], clean.statistics[..., others])
    assert torch.equal(results.statistics[..., 3:9], clean.statistics[..., 3:9])
    assert torch.equal(results.target_logits[others], clean.target_logits[others])
    assert torch.equal(results.kept[others], clean.kept[others])
    assert results.statistics[1, 0, [20, 135]].isnan().all()


def test_columns_of_probability_0():
    p = problem(5, 300, 64, options=["bias"])
    p.bias[:] = -math.inf
    p.bias[[70, 280]] = 0
    p.targets[:] = 70
    results = folded(p, seed=4, kept=True)
    want = statistics(p.logits()[:, [70, 280]])
    torch.testing.assert_close(results.statistics[:, 0].double(), want, rtol=1e-6, atol=1e-5)
    assert folded(p._replace(bias=torch.full_like(p.bias, -math.inf)), seed=5).statistics[1:].eq(0).all()


def test_what_the_copy_engine_cannot_read_is_refused():
    p = problem(4, 30, 64)
    odd = torch.zeros(4, 69, dtype=torch.bfloat16)[:, :64]
    with pytest.raises(RuntimeError, match=r"refuses a tensor map of \[4, 64\] elements with rows 69 elements apart"):
        folded(p._replace(hidden=odd), seed=0)


def folded_jointly(policy: Problem, q: Problem, beta: float, seed: int, **mutation) -> tuple[Tensor, Tensor]:
    """Sums, that of e Q divided by that of e, and target_logits; `q` is read for its hidden states and weight alone."""
    num_rows = len(policy.hidden)
    sums = torch.full((6, math.ceil(len(q.weight) / JOINT_SPLIT), num_rows), math.nan)
    target_logits = torch.full((2, num_rows), math.nan)
    heads = policy.hidden, policy.weight, q.hidden, q.weight
    arguments = *heads, policy.targets, policy.temperatures, beta, sums, target_logits
    cuda_launches.launched("q_values_fold", seed, *arguments, **mutation)
    sums[3] /= sums[1]
    return sums, target_logits


def joint_sums(z: Tensor, q: Tensor, beta: float) -> Tensor:
    """[6, T] of these columns, as folded_jointly has them."""
    e = (z - z.max(1).values[:, None]).exp()
    expected = torch.where(e == 0, 0, e * q).sum(1) / e.sum(1)
    return torch.cat([statistics(z), expected[None], statistics(q / beta)[:2]])


@pytest.mark.parametrize(
    ("policy", "q", "beta"),
    [
        (problem(1, 300, 64), problem(1, 300, 40), 1.0),
        (problem(200, 520, 192, options=["temperatures"]), problem(200, 520, 67), 0.3),
        (problem(300, 192, 100, torch.float16), problem(300, 192, 320, torch.float16), 2.0),
        (problem(130, 2311, 8, options=["temperatures"]), problem(130, 2311, 64), 0.5),
    ],
    ids=["one row", "a pair of blocks", "an idle block", "splits"],
)
def test_joint_sums_as_in_float64(policy, q, beta):
    z, q_logits = policy.logits(), q.logits()
    sums, target_logits = folded_jointly(policy, q, beta, seed=1)
    pieces = zip(z.split(JOINT_SPLIT, 1), q_logits.split(JOINT_SPLIT, 1), strict=True)
    want = torch.stack([joint_sums(*piece, beta) for piece in pieces], 1)
    torch.testing.assert_close(sums.double(), want, rtol=2e-6, atol=2e-5)
    taken = torch.stack([x.gather(1, policy.targets[:, None])[:, 0] for x in (z, q_logits)])
    torch.testing.assert_close(target_logits.double(), taken, rtol=0, atol=5e-6)


@pytest.mark.unpoisoned
def test_a_row_of_both_heads_has_the_same_bits_among_any_others_under_any_schedule():
    policy, q = problem(300, 530, 100, options=["temperatures"]), problem(300, 530, 72)
    whole = folded_jointly(policy, q, 0.3, seed=0)
    for seed in range(1, 6):
        assert all(map(torch.equal, whole, folded_jointly(policy, q, 0.3, seed)))
    for seed, rows in enumerate([slice(0, 1), slice(7, 128), slice(100, 300), slice(299, 300)]):
        part = folded_jointly(policy.rows(rows), q.rows(rows), 0.3, seed)
        assert all(torch.equal(x, y[..., rows]) for x, y in zip(part, whole, strict=True))


def test_wild_targets_rows_and_columns_that_are_not_finite_stay_alone_in_both_heads():
    """A column that the policy masks may hold any Q, all but Q's own sum is finite then."""
    policy, q = problem(140, 300, 64), problem(140, 300, 72)
    policy.hidden[:, 0], q.hidden[:, 0] = 1, 1
    policy.weight[299], q.weight[299] = 0, 0
    policy.weight[299, 0], q.weight[299, 0] = -math.inf, math.inf
    q.weight[7] = 0
    q.weight[7, 0] = -math.inf
    policy.weight[7] = policy.weight[299]
    sums, target_logits = folded_jointly(policy, q, 1.0, seed=2)
    kept = [i for i in range(299) if i != 7]
    z, q_logits = policy.logits()[:, kept], q.logits()[:, kept]
    torch.testing.assert_close(sums[:4, 0].double(), joint_sums(z, q_logits, 1.0)[:4], rtol=2e-6, atol=2e-5)
    assert sums[4].isinf().all() and sums[5].isnan().all()
    policy.targets[3:9] = torch.tensor([-1, -100, 300, 383, 1 << 40, -(1 << 62)])
    policy.hidden[135], q.hidden[20] = math.nan, math.nan
    got, got_logits = folded_jointly(policy, q, 1.0, seed=3)
    others = [i for i in range(140) if i not in (20, 135)]
    assert torch.equal(got[:4, :, others], sums[:4, :, others])
    others = [i for i in others if not 3 <= i < 9]
    assert torch.equal(got_logits[:, others], target_logits[:, others])
    assert got[1, 0, 135].isnan() and got[3, 0, [20, 135]].isnan().all() and got[1, 0, 20] == sums[1, 0, 20]


def gradient(p: Problem, factors: Tensor, lse: Tensor, seed: int, first_column=0, **mutation) -> Tensor:
    """dZ of the columns from first_column on, in rows that start at multiples of 16 bytes."""
    num_columns = len(p.weight) - first_column
    dz = torch.full((len(p.hidden), math.ceil(num_columns / 8) * 8), 7.0).to(p.hidden)[:, :num_columns]
    head = p.hidden, p.weight[first_column:], p.targets, None if p.bias is None else p.bias[first_column:]
    cuda_launches.launched("head_dz", seed, *head, *p[4:], factors, lse, first_column, dz, **mutation)
    return dz


def copied(x: Tensor) -> Tensor:
    """With its strides."""
    return x.new_empty(len(x), x.stride(0))[:, : x.shape[1]].copy_(x)


def random_factors(num_rows: int) -> Tensor:
    """scale, g, a, e; row 3 is idle."""
    factors = torch.randn(4, num_rows, generator=torch.Generator().manual_seed(2))
    factors[0] = factors[0].abs() + 0.1
    factors[:, 3:4] = 0
    return factors


@pytest.mark.parametrize("case", ["one block of rows", "a pair of blocks", "an idle block", "odd sizes"])
def test_dz_as_gradients_in_float64(case):
    p = CASES[case]
    z, factors = p.logits(), random_factors(len(p.hidden))
    lse = z.logsumexp(1).float()
    p = p._replace(hidden=copied(p.hidden))
    p.hidden[3] = math.nan
    _, g, a, e = factors.double()[:, :, None]
    logp = z - lse.double()[:, None]
    want = torch.zeros_like(z).scatter_(1, p.targets[:, None], g) - logp.exp() * (a + e * logp)
    if p.softcap is not None:
        temperatures = 1 if p.temperatures is None else p.temperatures.double()[:, None]
        want *= 1 - (z * temperatures / p.softcap) ** 2
    want[3] = 0
    for seed, first_column in enumerate([0, 256 if len(p.weight) > 264 else 8]):
        dz = gradient(p, factors, lse, seed, first_column)
        torch.testing.assert_close(dz.double(), want[:, first_column:], rtol=2**-8, atol=2e-5)
        width, num_columns = dz.stride(0), dz.shape[1]
        assert (dz.as_strided((len(dz), width - num_columns), (width, 1), num_columns) == 7).all()


def multiplied(
    a: Tensor, b: Tensor, scale: Tensor, seed: int, start: Tensor | None, transposed: bool, **mutation
) -> Tensor:
    """scale a @ b, plus start, beside 3 columns that stay."""
    num_rows, num_columns = a.shape[1] if transposed else len(a), b.shape[1]
    wide = torch.full((num_rows, num_columns + 3), 7.0)
    out = wide[:, :num_columns]
    out.copy_(torch.tensor(math.nan) if start is None else start)
    cuda_launches.launched("head_product", seed, a, b, out, scale, start is not None, transposed, **mutation)
    assert (wide[:, num_columns:] == 7).all()
    return out


def factor(num_rows: int, num_columns: int, seed: int, dtype=torch.bfloat16) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, math.ceil(num_columns / 8) * 8, generator=g).to(dtype)[:, :num_columns]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "num_rows, num_columns, depth", [(1, 5, 9), (100, 256, 64), (150, 264, 320), (390, 515, 130), (600, 67, 200)]
)
def test_products_as_in_float64(num_rows, num_columns, depth, transposed):
    """Of both kinds of scale, started or not, in both dtypes; an idle row holds what is not finite."""
    for dtype, per_row, added in (
        (torch.bfloat16, True, True),
        (torch.float16, False, False),
        (torch.float16, True, False),
    ):
        a, b = factor(num_rows, depth, 3, dtype), factor(depth, num_columns, 4, dtype)
        start = torch.randn(num_rows, num_columns) if added else None
        scale = torch.rand(num_rows) + 0.5 if per_row else torch.tensor(0.75)
        want = a.double() @ b.double() * (scale[:, None] if per_row else scale) + (0 if start is None else start)
        if per_row:
            a[-1], scale[-1], want[-1] = math.inf, 0, 0
        if transposed:
            a = factor(depth, num_rows, 0, dtype).copy_(a.T)
        out = multiplied(a, b, scale, 5, start, transposed)
        torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6 * depth)


@pytest.mark.unpoisoned
def test_an_element_has_the_same_bits_in_any_product_under_any_schedule():
    p = problem(300, 530, 100, options=["bias", "temperatures"], softcap=9.0)
    factors, lse = random_factors(300), p.logits().logsumexp(1).float()
    dz = gradient(p, factors, lse, 0)
    a, b, scale = factor(300, 200, 6), factor(200, 530, 7), torch.rand(300)
    turned = factor(200, 300, 0).copy_(a.T)
    out = multiplied(a, b, scale, 0, None, False)
    assert torch.equal(out, multiplied(turned, b, scale, 1, None, True))
    for seed, rows in enumerate([slice(0, 300), slice(299, 300), slice(8, 136), slice(120, 300)]):
        assert torch.equal(gradient(p.rows(rows), factors[:, rows], lse[rows], seed), dz[rows])
        assert torch.equal(multiplied(a[rows], b, scale[rows], seed, None, False), out[rows])
        if rows.start % 8 == 0:  # what the copy engine can begin with
            assert torch.equal(multiplied(turned[:, rows], b, scale[rows], seed, None, True), out[rows])
    assert torch.equal(multiplied(a, b[:, 256:], scale, 2, None, False), out[:, 256:])


def instructions_per_logit(**options) -> float:
    """Of a thread, with what one piece of the depth costs: what further columns take more."""
    counts = []
    for vocab in 1024, 2048:
        cuda_launches.counts.clear()
        folded(problem(256, vocab, 64), seed=0, **options)
        counts.append(sum(cuda_launches.counts.values()))
    return 32 * (counts[1] - counts[0]) / (256 * 1024)


@pytest.mark.parametrize("kept, most", [(False, 11), (True, 12)])
def test_instructions_per_logit(kept, most):
    assert instructions_per_logit(kept=kept) <= most


def test_instructions_per_logit_of_both_heads():
    """Of a pair of them."""
    counts = []
    for vocab in 960, 1920:
        cuda_launches.counts.clear()
        folded_jointly(problem(256, vocab, 64), problem(256, vocab, 64), 0.5, seed=0)
        counts.append(sum(cuda_launches.counts.values()))
    assert 32 * (counts[1] - counts[0]) / (256 * 960) <= 22


def changed(pattern: str, replacement: str, where: slice = slice(None)):
    """A mutation of those places."""

    def mutation(text: str) -> str:
        places = list(re.finditer(pattern, text))[where]
        assert places, f"no {pattern}"
        for match in reversed(places):
            text = text[: match.start()] + match.expand(replacement) + text[match.end() :]
        return text

    return mutation


WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 done, .*;"
DONE = "setp.eq.s32 done, 0, 0;"
FIRST, SECOND, THIRD = slice(0, 1), slice(1, 2), slice(2, 3)
INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), %r\d+;"
CLUSTER = r"barrier\.cluster\.arrive\.release;\s*barrier\.cluster\.wait\.acquire;"
MUTANTS = {
    "stages are filled before they are left": (changed(WAIT, DONE, FIRST), "race|still being read|more arrivals"),
    "stages are read before they are filled": (changed(WAIT, DONE, THIRD), "race|in flight|still being read"),
    "the readers of one block are waited for": (changed(INIT, r"\1, 8;", slice(1, None, 2)), "race|still being read"),
    "one reader too many is waited for": (changed(INIT, r"\1, 17;", slice(1, None, 2)), "hang"),
    "blocks end before the other one has arrived": (changed(CLUSTER, "", SECOND), "ended|block ends while another"),
    "barriers are used before they are there": (
        changed(CLUSTER, "", FIRST),
        "not initialised|not published|initialised yet",
    ),
    "barriers are not published": (changed(r"fence\.mbarrier_init\.release\.cluster;", ""), "not published"),
    "halves of weight tiles stay at home": (changed(r"(multicast::cluster .*), %rs\d+;", r"\1, 1;"), "hang"),
    "arrivals stay at home": (
        changed(r"mapa\.shared::cluster\.u32 there, (%r\d+), %r\d+;", r"mov.b32 there, \1;"),
        "race|still being read|hang",
    ),
    "more bytes are announced than come": (changed(r"(expect_tx.*), %r\d+;", r"\1, 65536;"), "hang"),
    "products are not waited for": (changed(r"wgmma\.wait_group\.sync\.aligned 0;", ""), "touches an accumulator"),
    "a stage is left while it is read": (
        changed(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
        "race|still being read",
    ),
    "accumulators are not fenced": (changed(r"wgmma\.fence\.sync\.aligned;", ""), "without a fence between"),
    "boxes are not shown to the copy engine": (changed(r"fence\.proxy\.async\.shared::cta;", ""), "without a fence"),
    "boxes are filled while they leave": (
        changed(r"cp\.async\.bulk\.wait_group\.read 1;", "cp.async.bulk.wait_group.read 3;"),
        "still being read",
    ),
    "blocks end before their boxes have left": (
        changed(r"cp\.async\.bulk\.wait_group\.read 0;", ""),
        "ends before its stores",
    ),
    "more registers than there are": (changed(r"(setmaxnreg\.inc.* )240;", r"\g<1>248;"), "deadlock: .*registers"),
}


STAYING = [  # in blocks that take one tile after the other
    "stages are filled before they are left",
    "stages are read before they are filled",
    "the readers of one block are waited for",
    "blocks end before the other one has arrived",
    "products are not waited for",
    "a stage is left while it is read",
]


@pytest.mark.parametrize("mutant", STAYING)
def test_mutants_of_products_are_caught(mutant):
    mutation, complaint = MUTANTS[mutant]
    a, b, scale = factor(300, 320, 8), factor(320, 700, 9), torch.rand(300)
    for transposed in False, True:
        with pytest.raises(Fault, match=complaint):
            for seed in range(8):
                multiplied(
                    factor(320, 300, 8) if transposed else a, b, scale, seed, None, transposed, mutation=mutation
                )


JOINT = {  # of two products a tile
    "stages are filled with Q before they are left": (changed(WAIT, DONE, SECOND), "race|still being read"),
    "stages are read before they are filled": (changed(WAIT, DONE, slice(3, 4)), "race|in flight|still being read"),
    "stages are read before Q fills them": (changed(WAIT, DONE, slice(4, 5)), "race|in flight|still being read"),
    "the policy's last stage is left while it is read": (
        changed(r"wgmma\.wait_group\.sync\.aligned 0;", "", FIRST),
        "race|still being read",
    ),
    "Q's product is not waited for": (
        changed(r"wgmma\.wait_group\.sync\.aligned 0;", "", SECOND),
        "touches an accumulator|race",
    ),
    **{name: MUTANTS[name] for name in MUTANTS if "blocks end before the other" in name or "reader" in name},
}


@pytest.mark.parametrize("mutant", JOINT)
def test_mutants_of_both_heads_are_caught(mutant):
    mutation, complaint = JOINT[mutant]
    policy, q = problem(200, 400, 320), problem(200, 400, 200)
    with pytest.raises(Fault, match=complaint):
        for seed in range(8):
            folded_jointly(policy, q, 0.5, seed, mutation=mutation)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    mutation, complaint = MUTANTS[mutant]
    p = problem(200, 300, 320)  # more pieces of the depth than stages
    with pytest.raises(Fault, match=complaint):
        for seed in range(8):
            folded(p, seed, kept=True, mutation=mutation)
