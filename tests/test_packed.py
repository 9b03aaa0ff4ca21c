"""What the ops over packed sequences promise alike: packing, boundaries, holes, slices. test_scan.py has the scans.

A batch is a list of answers, each a dict of its own rows and numbers; an op is run on the answers packed.
"""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from grids import cu_seqlens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import qrm_fast
from qrm_fast.ops.clip_delta import _clip_delta
from qrm_fast.ops.group_advantages import KINDS
from qrm_fast.ops.implicit_rewards import _implicit_rewards
from qrm_fast.ops.informative_groups import _informative_groups
from qrm_fast.ops.loss_weights import MODES, _loss_weights
from qrm_fast.ops.merge_logprobs import _merge_logprobs
from qrm_fast.ops.min_form_returns import OPERATORS
from qrm_fast.ops.prm_rewards import _prm_rewards
from qrm_fast.ops.process_advantages import PRESETS
from qrm_fast.ops.progress_rewards import _progress_rewards
from qrm_fast.ops.segments import sequence_ids, sequence_sum
from qrm_fast.ops.whiten import _whiten

ROWS = ("q", "values", "logprobs", "ref_logprobs", "mask", "kl", "hidden", "is_end", "scores", "logits")
NUMBERS = ("group_ids", "rewards", "outcomes", "start_values")


def answers(lengths: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """Normal scores, steps at a fifth of the rows, holes in a third; answers share a prompt with some others."""
    g = torch.Generator().manual_seed(seed)

    def answer(length: int) -> dict[str, Tensor]:
        columns = dict(zip(ROWS, torch.randn(len(ROWS), length, generator=g), strict=True))
        columns |= {"hidden": torch.randn(length, 24, generator=g), "logits": torch.randn(length, 2, generator=g)}
        columns |= {"is_end": columns["is_end"] > 0.8, "mask": columns["mask"] > -0.5}
        numbers = dict(zip(NUMBERS, torch.randn(len(NUMBERS), 1, generator=g), strict=True))
        group = torch.randint(0, 1 + len(lengths) // 3, (1,), generator=g)
        return columns | numbers | {"group_ids": group, "outcomes": (numbers["outcomes"] > 0).float()}

    return [answer(length) for length in lengths]


def from_rows(batch: list[dict[str, Tensor]], cu: Tensor, rows: dict[str, Tensor]) -> SimpleNamespace:
    """The arguments of every op; `rows` are the packed rows of the batch."""
    numbers = {name: torch.cat([torch.zeros(0), *(a[name] for a in batch)]) for name in NUMBERS}
    numbers["group_ids"] = numbers["group_ids"].long()
    p = SimpleNamespace(cu=cu, **rows, **numbers, num_tokens=len(rows["q"]), head=torch.linspace(-1, 1, 24))
    p.step_ends = p.is_end.nonzero()[:, 0]
    p.step_rewards, p.logits = p.scores[p.is_end].tanh(), p.logits[p.is_end]
    p.step_cu = cu_seqlens([int(a["is_end"].sum()) for a in batch])
    return p


def packed(batch: list[dict[str, Tensor]]) -> SimpleNamespace:
    none = answers([0])[0]
    rows = {name: torch.cat([none[name], *(a[name] for a in batch)]) for name in ROWS}
    return from_rows(batch, cu_seqlens([len(a["q"]) for a in batch]), rows)


def through_padding(batch: list[dict[str, Tensor]]) -> SimpleNamespace:
    """As a trainer with [S, width] tensors gets there; what it padded with is NaN."""
    p = packed(batch)
    width = max(len(a["q"]) for a in batch)
    real = qrm_fast.to_padded(torch.ones(p.num_tokens, dtype=torch.bool), p.cu, width)
    rows = {name: torch.cat([a[name] for a in batch]) for name in ROWS}
    padded = (
        qrm_fast.to_padded(x, p.cu, width, fill=math.nan if x.is_floating_point() else True) for x in rows.values()
    )
    cu, *columns = qrm_fast.from_padded(real, *padded)
    return from_rows(batch, cu, dict(zip(ROWS, columns, strict=True)))


class Op(NamedTuple):
    """What `run` returns has one entry per row, step or sequence: T, K or S of `shapes`; 0 is one for the batch."""

    run: Callable[[SimpleNamespace], tuple[Tensor, ...]]
    shapes: str
    alone: bool = False  # a sequence's bits are its own; others share statistics
    masked: bool = False


def rewards_options(p: SimpleNamespace, scope: str) -> dict:
    penalty = {"kl_coef": 0.1, "kl_estimator": "k3", "logprobs": p.logprobs, "ref_logprobs": p.ref_logprobs}
    group_ids = p.group_ids if scope == "group" else None
    return {"mask": p.mask, "center": True, "scope": scope, "group_ids": group_ids, "eos_rescore": "mean"} | penalty


def q_rewards(p: SimpleNamespace, scope: str) -> tuple[Tensor]:
    return (qrm_fast.q_token_rewards(p.q, p.cu, **rewards_options(p, scope)),)


def q_advantages(p: SimpleNamespace, scope: str) -> tuple[Tensor, ...]:
    return tuple(qrm_fast.q_advantages(p.q, p.values, p.cu, **rewards_options(p, scope)))


def steps(p: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    return p.step_rewards, p.step_ends, p.cu


def diagnostics(p: SimpleNamespace) -> tuple[Tensor, ...]:
    return tuple(qrm_fast.process_diagnostics(*steps(p), advantages=p.q))


def groups(p: SimpleNamespace, kind: str) -> tuple[Tensor]:
    extras = {"lengths": p.cu.diff()} if kind == "opo" else {"baseline": p.start_values} if kind == "remax" else {}
    return (qrm_fast.group_advantages(p.rewards, p.group_ids, kind=kind, **extras),)


def processed(p: SimpleNamespace, preset: str) -> tuple[Tensor]:
    options = {"outcome_rewards": p.outcomes, "max_gen_len": 90, "kl": p.kl, "preset": preset}
    return (qrm_fast.process_advantages(*steps(p), p.group_ids, **options),)


def form(p: SimpleNamespace, operator: str) -> tuple[Tensor, ...]:
    return qrm_fast.min_form_returns(*steps(p), operator=operator, num_tokens=p.num_tokens)[:2]


def head(p: SimpleNamespace) -> tuple[Tensor]:
    return (qrm_fast.q_head_advantages(p.hidden, p.head, p.cu, mask=p.mask, center=True, eos_rescore="mean"),)


def weights(p: SimpleNamespace, mode: str) -> tuple[Tensor]:
    return (qrm_fast.loss_weights(p.cu, mask=p.mask, mode=mode, norm=9.0 if mode.endswith("norm") else None),)


SCOPES = ("sequence", "batch", "group")
OPS = {
    "prm_rewards": Op(lambda p: (qrm_fast.prm_rewards(p.logits),), "K", alone=True),
    "implicit_rewards": Op(lambda p: (qrm_fast.implicit_rewards(p.logprobs, p.ref_logprobs),), "T", alone=True),
    "clip_delta": Op(lambda p: (qrm_fast.clip_delta(p.step_rewards, p.step_cu),), "K", alone=True),
    "progress_rewards": Op(
        lambda p: (qrm_fast.progress_rewards(p.step_rewards, p.start_values, p.step_cu),), "K", alone=True
    ),
    **{f"min_form_returns, {o}": Op(partial(form, operator=o), "TS", alone=True) for o in OPERATORS},
    "process_diagnostics": Op(diagnostics, "SSS0000"),
    **{f"process_advantages, {x}": Op(partial(processed, preset=x), "T") for x in PRESETS},
    "informative_groups": Op(lambda p: (qrm_fast.informative_groups(p.rewards.round(), p.group_ids),), "S"),
    **{f"group_advantages, {kind}": Op(partial(groups, kind=kind), "S") for kind in KINDS},
    "q_head_advantages": Op(head, "T", alone=True, masked=True),
    **{f"q_token_rewards, {x}": Op(partial(q_rewards, scope=x), "T", x == "sequence", masked=True) for x in SCOPES},
    **{f"q_advantages, {x}": Op(partial(q_advantages, scope=x), "TT", x == "sequence", masked=True) for x in SCOPES},
    "whiten": Op(lambda p: (qrm_fast.whiten(p.q, mask=p.mask),), "T", masked=True),
    **{f"loss_weights, {mode}": Op(partial(weights, mode=mode), "T", masked=True) for mode in MODES},
}


def split(results: tuple[Tensor, ...], shapes: str, p: SimpleNamespace) -> list[list[Tensor]]:
    """Every result by answers; one of the whole batch as it is."""
    bounds = {"T": p.cu.diff().tolist(), "K": p.step_cu.diff().tolist(), "S": [1] * (len(p.cu) - 1)}
    return [list(x.split(bounds[shape])) if shape in bounds else [x] for x, shape in zip(results, shapes, strict=True)]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", OPS)
@settings(deadline=None, max_examples=6)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=9), data=st.data())
def test_packed_one_by_one_padded_and_shuffled_agree(name, lengths, data):
    """Bit for bit where a sequence is by itself; statistics of a batch or group to 1e-6."""
    op, batch = OPS[name], answers(lengths)
    p = packed(batch)
    whole = op.run(p)
    assert all(map(torch.equal, whole, op.run(through_padding(batch))))
    order = data.draw(st.permutations(range(len(lengths))))
    shuffled = packed([batch[i] for i in order])
    ours, moved = split(whole, op.shapes, p), split(op.run(shuffled), op.shapes, shuffled)
    for x, y, shape in zip(ours, moved, op.shapes, strict=True):
        x = [x[i] for i in order] if shape != "0" else x
        if op.alone:
            assert all(map(torch.equal, x, y))
        else:
            torch.testing.assert_close(
                torch.cat([v.view(-1) for v in x]), torch.cat([v.view(-1) for v in y]), rtol=1e-6, atol=1e-6
            )
    if op.alone:
        for i, answer in enumerate(batch):
            assert all(torch.equal(x[i], y) for x, y in zip(ours, op.run(packed([answer])), strict=True))


@pytest.mark.parametrize("name", OPS)
def test_slices_at_any_offset_are_read_in_place(name):
    """Misaligned views of larger tensors whose other rows are NaN."""
    op, p = OPS[name], packed(answers([5, 0, 1, 17, 9]))
    moved = SimpleNamespace(**vars(p))
    for field, x in vars(p).items():
        if isinstance(x, Tensor):
            wide = x.new_full((len(x) + 4, *x.shape[1:]), math.nan if x.is_floating_point() else 1)
            wide[3:-1] = x
            setattr(moved, field, wide[3:-1])
    assert all(map(torch.equal, op.run(p), op.run(moved)))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.masked])
def test_an_all_masked_batch_gives_zeros(name):
    p = packed(answers([5, 0, 1, 17]))
    p.mask = torch.zeros_like(p.mask)
    for field in "q", "values", "logprobs", "ref_logprobs", "hidden":
        setattr(p, field, torch.full_like(getattr(p, field), math.nan))
    assert not any(result.any() for result in OPS[name].run(p))


BROKEN = {
    "must start at 0, got 1": lambda cu: cu.clamp(min=1),
    "must not decrease, got 6 then 5 at index 3": lambda cu: cu.index_fill(0, torch.tensor([3]), 5),
    "must end at the number of packed rows, 23, got 20": lambda cu: cu.clamp(max=20),
    "must end at the number of packed rows, 23, got 99": lambda cu: cu.index_fill(0, torch.tensor([4]), 99),
}
# Boundaries of steps too: clip_delta and progress_rewards take no others.
WITH_BOUNDARIES = [name for name in OPS if not name.startswith(("prm", "implicit", "whiten", "group", "informative"))]


@pytest.mark.parametrize("message", BROKEN)
@pytest.mark.parametrize("name", WITH_BOUNDARIES)
def test_broken_boundaries_are_refused(name, message):
    batch = answers([5, 1, 0, 17])
    for answer in batch:
        answer["is_end"].fill_(True)
    p = packed(batch)
    p.cu = p.step_cu = BROKEN[message](p.cu)
    with pytest.raises(ValueError, match=f"(cu_seqlens|step_cu) {message}"):
        OPS[name].run(p)


@pytest.mark.parametrize("bounds", [[-5, 30], [0, 500, 20], [20, 1, 3, 20], [0, 7], [0, 1 << 40], [9]], ids=str)
def test_references_that_serve_cuda_stay_inside_their_tensors(bounds, monkeypatch):
    """Of boundaries that nobody can refuse there: an index out of range would end the process's use of the device."""
    monkeypatch.setattr("qrm_fast.ops.segments.at_hand", lambda x: False)
    wide = torch.full((3, 60), math.nan)
    wide[:, 20:40] = 1
    x, cu, mask, start = wide[0, 20:40], torch.tensor(bounds), wide[1, 20:40] > 0, wide[2, 20 : 19 + len(bounds)]
    sane = cu.clamp(0, 20).cummax(0).values
    assert torch.equal(sequence_sum(x.double(), cu), sane.diff().double())
    assert torch.equal(sequence_ids(cu, 20), torch.searchsorted(sane[1:], torch.arange(20), right=True))
    for mode in MODES:
        for counted in None, mask:
            norm = 1.0 if mode.endswith("norm") else None
            weights = qrm_fast.loss_weights(cu, mask=counted, mode=mode, norm=norm, num_tokens=20)
            assert weights.shape == (20,) and not (weights < 1 / 40).any()  # at most 2 sequences of 20 rows
    for delta in False, True:
        assert set(qrm_fast.clip_delta(x, cu, clip=False, delta=delta).tolist()) <= {0.0, 1.0}
    assert set(qrm_fast.progress_rewards(x, start, cu).tolist()) <= {0.0, 1.0}


def test_references_that_serve_cuda_read_nothing_on_the_host(monkeypatch):
    """Of tensors without data, any that is asked for raises."""
    monkeypatch.setattr("qrm_fast.ops.segments.at_hand", lambda x: False)
    monkeypatch.setattr("qrm_fast.ops.merge_logprobs.at_hand", lambda x: False)
    with FakeTensorMode():
        x, mask, cu = torch.empty(20), torch.empty(20, dtype=torch.bool), torch.empty(4, dtype=torch.int32)
        stats, shards = torch.empty(1, 3, dtype=torch.float64), torch.empty(4, 3, 20)
        options = [(m, 20, mode, total, 1.0) for m in (None, mask) for mode in MODES for total in (0.0, 5.0)]
        results = [
            *(_loss_weights.reference(cu, *some) for some in options),
            _clip_delta.reference(x, cu, 0.5, True, True),
            _progress_rewards.reference(x, x[:3], cu, 1.0),
            _implicit_rewards.reference(x, x, 0.1),
            _prm_rewards.reference(x.view(10, 2)),
            _informative_groups.reference(x[:3], cu[:3]),
            _whiten.reference(x, stats, mask, True, True, 1e-8),
            *_merge_logprobs.reference(*shards),
        ]
    assert all(isinstance(result, FakeTensor) for result in results)


def test_ten_million_rows():
    """One answer, beside PyTorch in float64."""
    num_tokens = 10_000_000
    q = torch.randn(num_tokens, generator=torch.Generator().manual_seed(0))
    cu, ids = torch.tensor([0, num_tokens]), torch.tensor([0])
    deviation = q.double().sub_(q.double().mean())
    sigma = deviation.square().mean().sqrt()
    exact = deviation.div_(sigma).float()

    def close(result, expected):
        assert (result - expected).abs().max() <= 1e-6 * expected.abs().max()

    close(qrm_fast.whiten(q), exact)
    close(qrm_fast.q_token_rewards(q, cu, center=True, scope="sequence"), exact)
    close(qrm_fast.q_advantages(q, q, cu, center=True, value_coef=-1.0, scope="sequence").advantages, exact + q / sigma)
    close(qrm_fast.q_head_advantages(q[:, None], torch.ones(1), cu, center=True), exact)
    assert qrm_fast.loss_weights(cu, num_tokens=num_tokens).eq(1e-7).all()

    ends = torch.arange(39, num_tokens, 40)
    step_rewards = q[ends].tanh()
    to_go = step_rewards.double().flip(0).cumsum(0).flip(0)
    totals = qrm_fast.min_form_returns(step_rewards, ends, cu, operator="sum", num_tokens=num_tokens).returns
    close(totals.view(-1, 40), to_go.float()[:, None].expand(-1, 40))
    shares = (-10 * step_rewards.double()).softmax(0) * step_rewards.double()
    returns = shares.flip(0).cumsum(0).flip(0)
    advantages = qrm_fast.process_advantages(step_rewards, ends, cu, ids, max_gen_len=1, num_tokens=num_tokens)
    close(advantages.view(-1, 40), returns.float()[:, None].expand(-1, 40))  # nobody to compare with: no baseline
    assert qrm_fast.process_diagnostics(step_rewards, ends, cu).outcome == returns[0].float()
