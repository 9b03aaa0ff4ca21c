"""min_form_returns: golden values of PURE, its definitions word by word, corner cases, and the promises of every op."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate
from grids import LENGTHS, cu_seqlens
from hypothesis import given, settings
from hypothesis import strategies as st

from qrm_fast import min_form_returns
from qrm_fast.ops.min_form_returns import OPERATORS, _min_form_returns
from qrm_fast.ops.step_rows import step_rows
from qrm_fast.triton import min_form_returns as min_form_triton
from qrm_fast.triton import step_rows as rows_triton

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter

GOLDEN = torch.tensor([0.9, 0.8, 0.95, -0.6, 0.7], dtype=torch.float64)
TIES = torch.tensor([-0.5, 0.3, -0.5, 0.2], dtype=torch.float64)


@pytest.fixture(params=["kernel", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr("qrm_fast.ops.min_form_returns._min_form_returns", _min_form_returns.reference)
        monkeypatch.setattr("qrm_fast.ops.min_form_returns.step_rows", step_rows.reference)


def one_row_per_step(rewards, **options):
    return min_form_returns(rewards, torch.arange(len(rewards)), torch.tensor([0, len(rewards)]), **options)


def close(result, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=result.dtype), rtol=rtol, atol=atol)


def token_rewards(returns):
    """r*: what each step adds to the return."""
    return returns - torch.cat([returns[1:], returns.new_zeros(1)])


@pytest.mark.usefixtures("implementation")
def test_golden_a():
    cold = one_row_per_step(GOLDEN)
    expected = [2.753111019295e-07, 6.652205915982e-07, 1.762615478506e-07, -5.999978500280e-01, 1.582224915301e-06]
    close(token_rewards(cold.returns), expected, rtol=1e-9, atol=0)
    assert cold.outcome == cold.returns[0] and cold.worst_step == 3
    warm = one_row_per_step(GOLDEN, temperature=1.0)
    expected = [0.102746, 0.100935, 0.103164, -0.306983, 0.097606]
    close(token_rewards(warm.returns), expected, rtol=0, atol=5e-7)
    expected = [0.097468, -0.005277, -0.106212, -0.209376, 0.097606]
    close(warm.returns, expected, rtol=0, atol=5e-7)
    for operator, expected in {
        "hard": [-0.6, -0.6, -0.6, -0.6, 0],
        "revmin": [-0.6, -0.6, -0.6, -0.6, 0.7],
        "sum": [2.75, 1.85, 1.05, 0.1, 0.7],
        "mean": [0.55, 0.37, 0.21, 0.02, 0.14],
    }.items():
        close(one_row_per_step(GOLDEN, operator=operator).returns, expected)


@pytest.mark.usefixtures("implementation")
def test_golden_b_ties():
    soft = one_row_per_step(TIES, temperature=0.01).returns
    close(soft, [-0.5, -0.25, -0.25, 0], rtol=0, atol=1e-9)
    hard = one_row_per_step(TIES, operator="hard")
    assert hard.returns.tolist() == [-0.5, -0.25, -0.25, 0] and hard.worst_step == 0
    assert one_row_per_step(TIES, operator="revmin").returns.tolist() == [-0.5, -0.5, -0.5, 0.2]


@pytest.mark.usefixtures("implementation")
def test_good_answers_decay_under_soft_only():
    rewards = torch.tensor([0.9, 0.92, 0.95, 0.91], dtype=torch.float64)
    for operator, expected in {
        "soft": [0.917, 0.646, 0.420, 0.247],
        "causal_soft": [0.917, 0.924, 0.926, 0.910],
        "revmin": [0.90, 0.91, 0.91, 0.91],
    }.items():
        result = one_row_per_step(rewards, operator=operator).returns
        close(result, expected, rtol=0, atol=5e-4)


@pytest.mark.usefixtures("implementation")
def test_layout_worked_by_hand():
    """Steps own the rows up to their end; rows beyond the last end, and sequences without steps, give 0."""
    rewards, ends = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1, 4, 9])
    cu = torch.tensor([0, 6, 6, 8, 10])
    result = min_form_returns(rewards, ends, cu, operator="sum")
    assert result.returns.tolist() == [4, 4, 1, 1, 1, 0, 0, 0, 2, 2]
    assert result.outcome.tolist() == [4, 0, 0, 2] and result.worst_step.tolist() == [1, -1, -1, 2]
    assert min_form_returns(rewards, ends, cu, operator="hard").returns.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 2, 2]
    assert min_form_returns(rewards, ends, cu, operator="mean").returns.tolist() == [2, 2, 0.5, 0.5, 0.5, 0, 0, 0, 2, 2]


@pytest.mark.usefixtures("implementation")
def test_temperature_limits():
    """0 is hard and revmin, infinity the mean; a temperature that overflows exp does no harm."""
    for cold in 0.0, 1e-300:
        assert one_row_per_step(GOLDEN, temperature=cold).returns.tolist() == [-0.6, -0.6, -0.6, -0.6, 0]
        causal = one_row_per_step(GOLDEN, operator="causal_soft", temperature=cold).returns
        assert causal.tolist() == [-0.6, -0.6, -0.6, -0.6, 0.7]
    for hot in math.inf, 1e9:
        torch.testing.assert_close(
            one_row_per_step(GOLDEN, temperature=hot).returns, one_row_per_step(GOLDEN, operator="mean").returns
        )
        causal = one_row_per_step(GOLDEN, operator="causal_soft", temperature=hot).returns
        close(causal, [0.55, 0.4625, 0.35, 0.05, 0.7], rtol=1e-7)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("operator", OPERATORS)
def test_steps_that_are_not_finite_spoil_their_own_sequence(operator):
    for poison in math.nan, math.inf, -math.inf:
        rewards = torch.tensor([0.5, 0.25, poison, 0.75])
        cu = torch.tensor([0, 3, 6, 8])
        result = min_form_returns(rewards, torch.tensor([0, 1, 4, 7]), cu, operator=operator)
        assert result.returns.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 2
        assert result.outcome.isnan().tolist() == [False, True, False] and result.worst_step[1] == -1


def oracle_steps(r, operator, temperature):
    """The definition word by word in Python's floats, which are float64: a sum per step."""
    low, n = min(r), len(r)

    def weights(over):
        raw = [math.exp(-(x - low) / temperature) for x in over]
        return [w / math.fsum(raw) for w in raw]

    def weighted(w, x):
        return math.fsum(a * b for a, b in zip(w, x, strict=True))

    g = {
        "soft": lambda t: weighted(weights(r)[t:], r[t:]),
        "hard": lambda t: low * r[t:].count(low) / r.count(low),
        "revmin": lambda t: min(r[t:]),
        "causal_soft": lambda t: weighted(weights(r[t:]), r[t:]),
        "sum": lambda t: math.fsum(r[t:]),
        "mean": lambda t: math.fsum(r[t:]) / n,
    }[operator]
    return [g(t) for t in range(n)]


def oracle(rewards, ends, cu, operator="soft", temperature=0.1):
    returns, outcome, worst = [0.0] * int(cu[-1]), [], []
    rewards, ends = rewards.tolist(), ends.tolist()
    for bos, eos in itertools.pairwise(cu.tolist()):
        steps = [k for k, end in enumerate(ends) if bos <= end < eos]
        r = [rewards[k] for k in steps]
        g = oracle_steps(r, operator, temperature) if r else []
        for row in range(bos, eos):
            after = [t for t, k in enumerate(steps) if ends[k] >= row]
            returns[row] = g[after[0]] if after else 0.0
        outcome.append(g[0] if g else 0.0)
        worst.append(steps[r.index(min(r))] if g else -1)
    doubles = (torch.tensor(x, dtype=torch.float64) for x in (returns, outcome))
    return *doubles, torch.tensor(worst, dtype=torch.int64)


def float32_path(rewards, ends, cu, operator="soft", temperature=0.1):
    """What one would write with PyTorch's own operators, in the dtype of the result."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    returns, outcome = rewards.new_zeros(int(cu[-1])), rewards.new_zeros(len(cu) - 1)
    for i, (bos, eos) in enumerate(itertools.pairwise(cu.tolist())):
        mine = (ends >= bos) & (ends < eos)
        r, e = rewards[mine], ends[mine].tolist()
        if not e:
            continue
        low = r == r.min()
        star = {
            "soft": (-r / temperature).softmax(0) * r,
            "hard": r * low / low.sum(),
            "sum": r,
            "mean": r / len(r),
        }.get(operator)
        if star is not None:
            g = star.flip(0).cumsum(0).flip(0)
        elif operator == "revmin":
            g = r.flip(0).cummin(0).values.flip(0)
        else:
            g = torch.stack([((-r[t:] / temperature).softmax(0) * r[t:]).sum() for t in range(len(r))])
        for value, start, end in zip(g, [bos, *(x + 1 for x in e[:-1])], e, strict=True):
            returns[start : end + 1] = value
        outcome[i] = g[0]
    return returns, outcome


def inputs(lengths, dtype=torch.float32, share=0.1):
    """Steps at every tenth row or so; some sequences have none, some rows follow the last one."""
    g = torch.Generator().manual_seed(len(lengths))
    ends = (torch.rand(sum(lengths), generator=g) < share).nonzero()[:, 0]
    rewards = torch.rand(len(ends), generator=g).mul(2).sub(1).to(dtype)
    return rewards, ends, cu_seqlens(lengths)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_the_definition(lengths, operator, device):
    rewards, ends, cu = inputs(lengths)
    *exact, worst = oracle(rewards, ends, cu, operator)
    peer = float32_path(rewards, ends, cu, operator)
    result = min_form_returns(rewards.to(device), ends.to(device), cu.to(device), operator=operator)
    assert torch.equal(result.worst_step.cpu(), worst)
    for ours, want, torchs in zip(result[:2], exact, peer, strict=True):
        assert_as_accurate(ours, want, torchs)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, operator):
    rewards, ends, cu = inputs([30, 1, 70, 0, 65], dtype)
    result = min_form_returns(rewards, ends, cu, operator=operator)
    assert {x.dtype for x in result[:2]} == {torch.promote_types(dtype, torch.float32)}
    *exact, _ = oracle(rewards, ends, cu, operator)
    slack = 2 if dtype == torch.float64 else 1  # float64 cannot be carried wider, and the oracle rounds as well
    for ours, want, torchs in zip(result[:2], exact, float32_path(rewards, ends, cu, operator), strict=True):
        assert_as_accurate(ours, want, torchs, slack=slack)


def test_a_long_answer_of_many_steps():
    rewards, ends, cu = inputs([60_000, 100, 40_000], share=0.5)
    for operator in "soft", "causal_soft", "sum":
        returns, outcome, worst = min_form_returns(rewards, ends, cu, operator=operator)
        for i, (bos, eos) in enumerate(itertools.pairwise(cu.tolist())):
            r = rewards[(ends >= bos) & (ends < eos)].double()
            suffix = torch.stack([r[t:].sum() for t in (0, len(r) // 2, len(r) - 1)])
            if operator != "sum":
                parts = [r if operator == "soft" else r[t:] for t in (0, len(r) // 2, len(r) - 1)]
                weights = [(-10 * p).softmax(0)[-n:] for p, n in zip(parts, (len(r), -(-len(r) // 2), 1), strict=True)]
                suffix = torch.stack([(w * r[-len(w) :]).sum() for w in weights])
            mine = ends[(ends >= bos) & (ends < eos)]
            torch.testing.assert_close(returns[mine[[0, len(r) // 2, -1]]].double(), suffix, rtol=1e-6, atol=1e-12)
            assert outcome[i] == returns[mine[0]] and rewards[worst[i]] == r.min()


@pytest.mark.unpoisoned
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12), operator=st.sampled_from(OPERATORS), data=st.data()
)
def test_bits_do_not_depend_on_the_packing(lengths, operator, data):
    rewards, ends, cu = inputs(lengths, share=0.3)
    packed = min_form_returns(rewards, ends, cu, operator=operator)
    mine = [(ends >= bos) & (ends < eos) for bos, eos in itertools.pairwise(cu.tolist())]
    alone = [
        min_form_returns(rewards[m], ends[m] - bos, torch.tensor([0, n]), operator=operator)
        for m, n, bos in zip(mine, lengths, cu.tolist(), strict=False)
    ]
    order = data.draw(st.permutations(range(len(lengths))))
    moved_cu = cu_seqlens([lengths[i] for i in order])
    moved_ends = torch.cat([ends[mine[i]] - cu[i] + moved_cu[j] for j, i in enumerate(order)])
    moved = min_form_returns(torch.cat([rewards[mine[i]] for i in order]), moved_ends, moved_cu, operator=operator)
    assert torch.equal(torch.cat([a.returns for a in alone]), packed.returns)
    assert torch.equal(torch.cat([a.outcome for a in alone]), packed.outcome)
    assert torch.equal(torch.cat([alone[i].returns for i in order]), moved.returns)


@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_threads():
    rewards, ends, cu = inputs([1 + i * 37 % 300 for i in range(200)])
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in 1, 2, 2:
            torch.set_num_threads(num_threads)
            results.append(min_form_returns(rewards, ends, cu).returns)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offset_slices_and_index_dtypes(dtype):
    rewards, ends, cu = inputs([30, 20, 40], share=0.3)
    wide = torch.full((len(rewards) + 9,), math.nan)
    wide[4 : 4 + len(rewards)] = rewards
    result = min_form_returns(wide[4 : 4 + len(rewards)], ends.to(dtype), cu, num_tokens=90)
    for ours, expected in zip(result, min_form_returns(rewards, ends, cu.long()), strict=True):
        assert torch.equal(ours, expected)


def test_not_differentiable():
    rewards, ends, cu = inputs([30, 20])
    with pytest.raises(RuntimeError, match="is not differentiable"):
        min_form_returns(rewards.requires_grad_(), ends, cu).outcome.sum().backward()


def test_opcheck():
    rewards, ends, cu = inputs([30, 0, 20])
    torch.library.opcheck(_min_form_returns.op, (rewards, ends, cu, 50, "causal_soft", 0.1))
    torch.library.opcheck(_min_form_returns.op, (rewards.bfloat16(), ends.int(), cu.long(), 50, "soft", math.inf))
    values, base, stats = rewards.double(), torch.randn(3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    torch.library.opcheck(step_rows.op, (values, None, ends, cu, None, None, "", 50, False, True))
    torch.library.opcheck(step_rows.op, (values, base, ends, cu, torch.randn(50), stats, "nonzero", 50, True, False))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(min_form_returns, fullgraph=True, dynamic=True)
    for lengths in [30, 4, 9, 50], [8, 1, 6, 60, 70, 2], [10, 20]:
        arguments = inputs(lengths, share=0.3)
        for graph, eager in zip(
            compiled(*arguments, num_tokens=sum(lengths)), min_form_returns(*arguments), strict=True
        ):
            assert torch.equal(graph, eager)


# Triton, on the GPU or in the interpreter


@pytest.fixture
def by_triton(triton_device, monkeypatch):
    """The public function through the launchers, with blocks of 4 steps and 16 rows."""
    monkeypatch.setitem(min_form_triton.LAUNCH, "BK", 4)
    monkeypatch.setitem(rows_triton.LAUNCH, "BT", 16)
    monkeypatch.setattr("qrm_fast.ops.min_form_returns._min_form_returns", min_form_triton.launch)
    monkeypatch.setattr("qrm_fast.ops.min_form_returns.step_rows", rows_triton.launch)

    def run(rewards, ends, cu, **options):
        arguments = (x.to(triton_device) for x in (rewards, ends, cu))
        return [x.cpu() for x in min_form_returns(*arguments, num_tokens=int(cu[-1]), **options)]

    return run


@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_agrees_with_the_definition(by_triton, operator):
    for lengths, dtype in (
        ([30, 0, 1, 61], torch.float32),
        ([], torch.float32),
        ([0], torch.bfloat16),
        ([40], torch.half),
    ):
        rewards, ends, cu = inputs(lengths, dtype, share=0.3)
        *exact, worst = oracle(rewards, ends, cu, operator)
        *result, result_worst = by_triton(rewards, ends.int(), cu, operator=operator)
        assert torch.equal(result_worst, worst)
        for ours, want, torchs in zip(result, exact, float32_path(rewards, ends, cu, operator), strict=True):
            assert_as_accurate(ours, want, torchs)


def test_triton_ties_temperatures_and_rows_after_the_last_step(by_triton):
    ties = torch.tensor([0.5, -0.5, 0.25, 0.5, -0.5, 0.75, 0.5])
    ends, cu = torch.arange(7) * 2 + 1, torch.tensor([0, 14, 17])
    for operator, temperature in itertools.product(("soft", "causal_soft"), (0.0, 0.01, 0.1, math.inf)):
        expected = min_form_returns(ties, ends, cu, operator=operator, temperature=temperature)
        result = by_triton(ties, ends, cu, operator=operator, temperature=temperature)
        for ours, want in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, want, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("operator", ["soft", "causal_soft", "sum"])
def test_triton_steps_that_are_not_finite_spoil_their_own_sequence(by_triton, operator):
    for poison in math.nan, math.inf, -math.inf:
        rewards, ends = torch.tensor([0.5, 0.25, poison, 0.75]), torch.tensor([0, 1, 4, 8])
        returns, outcome, worst = by_triton(rewards, ends, torch.tensor([0, 3, 6, 7, 9]), operator=operator)
        assert returns.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3
        assert outcome.isnan().tolist() == [False, True, False, False] and worst[1] == -1


@pytest.mark.unpoisoned
def test_triton_bits_do_not_depend_on_the_packing(by_triton):
    rewards, ends, cu = inputs([30, 7, 45], share=0.3)
    mine = (ends >= 37) & (ends < 82)
    for operator in "soft", "causal_soft", "sum":
        packed = by_triton(rewards, ends, cu, operator=operator)
        alone = by_triton(rewards[mine], ends[mine] - 37, torch.tensor([0, 45]), operator=operator)
        assert torch.equal(alone[0], packed[0][37:]) and alone[1] == packed[1][2]


@pytest.mark.overlapping
def test_triton_finds_the_steps_between_any_two_rows(triton_device):
    pairs = torch.tensor(list(itertools.combinations(range(10), 2)))
    rewards, ends = 2.0 ** torch.arange(9), torch.arange(9)
    arguments = (x.to(triton_device) for x in (rewards, ends, pairs.flatten()))
    _, outcome, _ = min_form_triton.launch(*arguments, 9, "sum", 0.1)
    assert torch.equal(outcome[::2].cpu(), 2.0 ** pairs[:, 1] - 2.0 ** pairs[:, 0])


def test_triton_whitens_and_masks_as_the_kernel_does(triton_device, monkeypatch):
    monkeypatch.setitem(rows_triton.LAUNCH, "BT", 16)
    rewards, ends, cu = inputs([30, 0, 20], share=0.3)
    values, base = rewards.double().masked_fill(rewards > 0.5, 0.0), torch.tensor([0.5, 0.0, 0.25]).double()
    stats = torch.tensor([[33.0, 0.25, 7.0], [4.0, 0, 0]], dtype=torch.float64)
    for penalty, whitening, masked in (None, "nonzero", True), (torch.rand(50), "unbiased", False):
        options = (penalty, stats, whitening, 50, masked, False)
        on_device = [x.to(triton_device) if isinstance(x, torch.Tensor) else x for x in options]
        result = rows_triton.launch(*(x.to(triton_device) for x in (values, base, ends, cu)), *on_device)
        torch.testing.assert_close(result.cpu(), step_rows(values, base, ends, cu, *options), rtol=2e-7, atol=1e-9)


def test_triton_rows_of_many_steps_and_of_none(triton_device):
    """Several runs of rows per thread, sequences without rows between them, steps of one row."""
    rewards, ends, cu = inputs([700, 0, 0, 1, 900, 5, 1394, 0], share=0.2)
    for base in torch.randn(8, dtype=torch.float64), None:
        arguments = [None if x is None else x.to(triton_device) for x in (rewards.double(), base, ends, cu)]
        result = rows_triton.launch(*arguments, None, None, "", 3000, base is None, True)
        want = step_rows(rewards.double(), base, ends, cu, None, None, "", 3000, base is None, True)
        assert torch.equal(result.cpu(), want)


@pytest.mark.overlapping
def test_triton_stays_inside_its_tensors(triton_device):
    """Boundaries that a CPU kernel would refuse."""
    rewards, ends = torch.rand(5, device=triton_device), torch.tensor([1, 3, 4, 8, 9], device=triton_device)
    for bounds in [0, 500], [-5, 4], [4, 1, 6], [1 << 40, 3], [0, 1 << 40], [7]:
        cu = torch.tensor(bounds, device=triton_device)
        for wild in ends, ends.int(), ends.flip(0), ends - 7, ends + 100:
            values, _, _ = min_form_triton.launch(rewards, wild, cu, 10, "soft", 0.1)
            rows = rows_triton.launch(values, None, wild, cu, None, None, "", 12, True, False)
            assert values.shape == (5,) and rows.shape == (12,)


R, ENDS, CU = torch.zeros(3), torch.tensor([1, 2, 5]), torch.tensor([0, 3, 6])


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, r"step_rewards must be \[K\] .* got \[3\] int64", {"step_rewards": ENDS}),
        (ValueError, r"step_rewards must be \[K\] .* got \[3, 1\] float32", {"step_rewards": R[:, None]}),
        (TypeError, r"step_ends must be \[K\] int32 or int64, got \[3\] float32", {"step_ends": R}),
        (ValueError, r"step_ends must be \[K\] int32 or int64 with K = 3, got \[2\] int64", {"step_ends": ENDS[:2]}),
        (ValueError, r"step_ends must lie in \[0, 6\), got 6 at index 2", {"step_ends": torch.tensor([1, 2, 6])}),
        (ValueError, r"step_ends must lie in \[0, 6\), got -1 at index 0", {"step_ends": ENDS.int() - 2}),
        (ValueError, "step_ends must ascend, got 2 then 2 at index 1", {"step_ends": torch.tensor([2, 2, 5])}),
        (TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64, got \[3\] float32", {"cu_seqlens": R}),
        (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": CU + 1}),
        (ValueError, "cu_seqlens must not decrease, got 6 then 3 at index 2", {"cu_seqlens": CU[[0, 2, 1]]}),
        (ValueError, "cu_seqlens must end at the number of packed rows, 7, got 6", {"num_tokens": 7}),
        (ValueError, "operator must be one of soft, hard, .* got 'min'", {"operator": "min"}),
        (ValueError, "temperature must be >= 0, got -0.1", {"temperature": -0.1}),
        (ValueError, "temperature must be >= 0, got nan", {"temperature": math.nan}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        min_form_returns(**{"step_rewards": R, "step_ends": ENDS, "cu_seqlens": CU} | options)
