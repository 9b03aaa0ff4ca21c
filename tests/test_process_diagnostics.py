"""process_diagnostics: a batch worked by hand, temperature limits, corner cases, and the promises of every op."""

import itertools
import math

import pytest
import torch
from cuda_graph import replayed

from qrm_fast import min_form_returns, process_diagnostics
from qrm_fast.ops.process_diagnostics import _process_diagnostics
from qrm_fast.triton import process_diagnostics as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # interpreter


@pytest.fixture(params=["kernel", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr("qrm_fast.ops.process_diagnostics._process_diagnostics", _process_diagnostics.reference)


REWARDS = torch.tensor([0.5, -0.5, 0.5, 0.25, 0.75, 0.75], dtype=torch.float64)
ENDS = torch.tensor([2, 5, 9, 11, 20, 24])  # three steps, one step, none, two steps in a tie, and an empty answer
CU = torch.tensor([0, 10, 12, 15, 25, 25])


@pytest.mark.usefixtures("implementation")
def test_worked_by_hand():
    advantages = torch.arange(25, dtype=torch.float64).sub(10)
    result = process_diagnostics(REWARDS, ENDS, CU, temperature=0.5, min_tokens=3, advantages=advantages)
    e = math.exp(-2)
    p = [e / (1 + 2 * e), 1 / (1 + 2 * e), e / (1 + 2 * e)]
    entropy = -sum(x * math.log(x) for x in p)
    expected = [0.5 * p[0] - 0.5 * p[1] + 0.5 * p[2], 0.25, 0, 0.75, 0]
    torch.testing.assert_close(result.outcome, torch.tensor(expected, dtype=torch.float64))
    assert result.worst_position.tolist() == pytest.approx([2 / 3, 1, 0, 1 / 2, 0])
    assert result.effective_steps.tolist() == pytest.approx([math.exp(entropy), 1, 0, 2, 0])
    # |A| is 55 on the first answer, 0 + 1 on the second, 2 + 3 + 4 on the third, 95 on the fourth
    assert result.one_step == pytest.approx(3 / 5) and result.short == pytest.approx(2 / 5)
    assert result.one_step_mass == pytest.approx(10 / 160) and result.short_mass == pytest.approx(1 / 160)


@pytest.mark.usefixtures("implementation")
def test_limits_of_the_temperature():
    cold = process_diagnostics(REWARDS, ENDS, CU, temperature=0.0)
    assert cold.outcome.tolist() == [-0.5, 0.25, 0, 0.75, 0]
    assert cold.effective_steps.tolist() == pytest.approx([1, 1, 0, 2, 0])
    hot = process_diagnostics(REWARDS, ENDS, CU, temperature=math.inf)
    assert hot.effective_steps.tolist() == pytest.approx([3, 1, 0, 2, 0])
    assert hot.outcome[0].item() == pytest.approx(1 / 6)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outcome_and_worst_step_are_those_of_min_form_returns(dtype):
    g = torch.Generator().manual_seed(0)
    ends = (torch.rand(3000, generator=g) < 0.1).nonzero()[:, 0]
    cu = torch.arange(0, 3001, 60)
    rewards = torch.rand(len(ends), generator=g).mul(2).sub(1).to(dtype)
    form = min_form_returns(rewards, ends, cu)
    result = process_diagnostics(rewards, ends, cu)
    assert result.outcome.dtype == form.outcome.dtype
    torch.testing.assert_close(result.outcome, form.outcome, rtol=2e-7, atol=1e-12)
    step_cu = torch.searchsorted(ends, cu)
    worst = (form.worst_step - step_cu[:-1] + 1) / step_cu.diff()
    torch.testing.assert_close(result.worst_position.float(), worst.where(step_cu.diff() > 0, 0.0))
    assert result.one_step_mass is None and result.short_mass is None


@pytest.mark.usefixtures("implementation")
def test_agrees_with_a_loop_over_answers():
    g = torch.Generator().manual_seed(0)
    lengths = [1 + i * 37 % 60 for i in range(50)]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    ends = (torch.rand(sum(lengths), generator=g) < 0.08).nonzero()[:, 0]
    rewards, advantages = torch.rand(len(ends), generator=g).mul(2).sub(1), torch.randn(sum(lengths), generator=g)
    result = process_diagnostics(rewards, ends, cu, min_tokens=20, advantages=advantages)
    few, mass, expected = [[], []], [], []
    for bos, eos in itertools.pairwise(cu.tolist()):
        r = [x for x, end in zip(rewards.tolist(), ends.tolist(), strict=True) if bos <= end < eos]
        raw = [math.exp(-10 * (x - min(r))) for x in r]
        w = [x / math.fsum(raw) for x in raw]
        entropy = -math.fsum(x * math.log(x) for x in w)
        soft = math.fsum(x * y for x, y in zip(w, r, strict=True))
        expected.append((soft, (r.index(min(r)) + 1) / len(r), math.exp(entropy)) if r else (0.0, 0.0, 0.0))
        few[0].append(len(r) <= 1)
        few[1].append(eos - bos < 20)
        mass.append(advantages[bos:eos].double().abs().sum().item())
    for ours, exact in zip(result[:3], zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours.double(), torch.tensor(exact, dtype=torch.float64), rtol=2e-7, atol=1e-12)
    shares = [sum(f) / 50 for f in few]
    shares += [math.fsum(m for m, counts in zip(mass, f, strict=True) if counts) / math.fsum(mass) for f in few]
    assert [x.item() for x in result[3:]] == pytest.approx(shares, rel=2e-7)


@pytest.mark.usefixtures("implementation")
def test_what_is_not_finite():
    rewards = REWARDS.index_fill(0, torch.tensor([1]), math.inf)
    advantages = torch.ones(25, dtype=torch.float64)
    advantages[:10] = math.nan
    result = process_diagnostics(rewards, ENDS, CU, advantages=advantages)
    for field in result[:3]:
        assert field.isnan().tolist() == [True, False, False, False, False]
    assert result.one_step_mass == pytest.approx(5 / 15)


@pytest.mark.usefixtures("implementation")
def test_nothing():
    none = torch.zeros(0)
    for num_sequences in 0, 2:
        cu = torch.zeros(num_sequences + 1, dtype=torch.int64)
        result = process_diagnostics(none, none.long(), cu, advantages=none)
        assert result.outcome.tolist() == [0] * num_sequences and result.one_step == bool(num_sequences)
        assert result.one_step_mass == 0 and result.short_mass == 0


@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_threads():
    g = torch.Generator().manual_seed(0)
    ends = (torch.rand(60_000, generator=g) < 0.1).nonzero()[:, 0]
    arguments = torch.rand(len(ends), generator=g), ends, torch.arange(0, 60_001, 60)
    advantages = torch.randn(60_000, generator=g)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in 1, 2:
            torch.set_num_threads(num_threads)
            results.append(process_diagnostics(*arguments, advantages=advantages))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_not_differentiable():
    with pytest.raises(RuntimeError, match="is not differentiable"):
        process_diagnostics(REWARDS.clone().requires_grad_(), ENDS, CU).outcome.sum().backward()


def test_opcheck():
    torch.library.opcheck(_process_diagnostics.op, (REWARDS, ENDS, CU, 0.1, 8, None))
    torch.library.opcheck(_process_diagnostics.op, (REWARDS.float(), ENDS.int(), CU, 0.1, 8, torch.randn(25)))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(process_diagnostics, fullgraph=True, dynamic=True)
    for num_sequences in 5, 9:
        cu = torch.arange(num_sequences + 1) * 6
        ends = torch.arange(2, 6 * num_sequences, 3)
        arguments = torch.rand(len(ends)), ends, cu
        options = {"advantages": torch.randn(6 * num_sequences)}
        for graph, eager in zip(
            compiled(*arguments, **options), process_diagnostics(*arguments, **options), strict=True
        ):
            assert torch.equal(graph, eager)


# Triton, on the GPU or in the interpreter


@pytest.fixture
def launched(triton_device, monkeypatch):
    """The op by its launcher, with small blocks."""
    for blocks, name in (
        (triton_kernels.SUMS, "BK"),
        (triton_kernels.SUMS, "BT"),
        (triton_kernels.SEQUENCES, "BS"),
    ):
        monkeypatch.setitem(blocks, name, 4)

    def run(*arguments):
        moved = (x.to(triton_device) if isinstance(x, torch.Tensor) else x for x in arguments)
        return [x.cpu() for x in triton_kernels.launch(*moved)]

    return run


@pytest.mark.parametrize("temperature", [0.0, 0.1, math.inf])
def test_triton_as_the_cpu_kernel(temperature, launched):
    """Ties, many steps, none, an empty answer, rewards and advantages that are not finite."""
    g = torch.Generator().manual_seed(0)
    ends = torch.cat([ENDS, 25 + torch.arange(0, 40, 3), torch.tensor([66, 69])])
    rewards = torch.cat([REWARDS.float(), torch.randn(len(ends) - 6, generator=g)])
    rewards[-1] = math.inf
    rewards[9] = rewards[13] = -4.0  # in one lane of two blocks
    cu = torch.cat([CU, torch.tensor([65, 70])])
    advantages = torch.randn(70, generator=g)
    advantages[3], advantages[40] = math.nan, -math.inf
    for a, dtype, index in (None, torch.float32, torch.int64), (advantages, torch.bfloat16, torch.int32):
        arguments = rewards.to(dtype), ends.to(index), cu.to(index), temperature, 10, a
        for ours, want in zip(launched(*arguments), _process_diagnostics(*arguments), strict=True):
            torch.testing.assert_close(ours, want, rtol=2e-7, atol=1e-12, equal_nan=True)
    for num_sequences in 0, 2:
        nothing = rewards[:0], ends[:0], cu.new_zeros(num_sequences + 1), temperature, 8, advantages[:0]
        for ours, want in zip(launched(*nothing), _process_diagnostics(*nothing), strict=True):
            assert torch.equal(ours, want)


def test_triton_stays_inside_its_tensors(launched):
    """Boundaries and steps that a CPU kernel would refuse."""
    for wild in [-50, 4, 90, 3, 1 << 40, 7], [25, 20, 15, 10, 5, 0]:
        for ends in ENDS.flip(0), ENDS + 1000, ENDS - 20:
            for a in None, torch.full((25,), 2.0):
                per_sequence, shares = launched(REWARDS.float(), ends, torch.tensor(wild), 0.1, 8, a)
                assert per_sequence.shape == (3, 5) and shares.shape == (4,)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_nothing_waits_and_a_graph_captures_it():
    g = torch.Generator().manual_seed(0)
    ends = (torch.rand(60_000, generator=g) < 0.1).nonzero()[:, 0]
    cpu = torch.rand(len(ends), generator=g), ends, torch.arange(0, 60_001, 60)
    arguments, advantages = [x.cuda() for x in cpu], torch.randn(60_000, generator=g)
    on_device = advantages.cuda()

    def step():
        return process_diagnostics(*arguments, advantages=on_device)

    step()
    torch.cuda.set_sync_debug_mode("error")
    direct = step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, replayed(step), direct))
    for ours, want in zip(direct, process_diagnostics(*cpu, advantages=advantages), strict=True):
        torch.testing.assert_close(ours.cpu(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, r"advantages must be \[T\] float64, got \[25\] float32", {"advantages": torch.zeros(25)}),
        (
            ValueError,
            "cu_seqlens must end at the number of packed rows, 24, got 25",
            {"advantages": torch.zeros(24, dtype=torch.float64)},
        ),
        (ValueError, r"step_ends must lie in \[0, 25\), got 25 at index 0", {"step_ends": ENDS + 23}),
        (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": CU + 1}),
        (ValueError, "temperature must be >= 0, got -1.0", {"temperature": -1.0}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        process_diagnostics(**{"step_rewards": REWARDS, "step_ends": ENDS, "cu_seqlens": CU} | options)
