"""process_advantages by its Triton kernels, on the GPU or in the interpreter: the tests of test_process_advantages."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from cuda_graph import replayed
from grids import cu_seqlens
from test_process_advantages import CASES, EXPECTED, GOLDEN, inputs, transcription

from qrm_fast import process_advantages
from qrm_fast.ops.min_form_returns import _min_form_returns
from qrm_fast.ops.process_advantages import PRESETS, WHITENING, _process_advantages
from qrm_fast.triton import groups as groups_triton
from qrm_fast.triton import min_form_returns as min_form_triton
from qrm_fast.triton import process_advantages as triton_kernels
from qrm_fast.triton import step_rows as rows_triton

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # interpreter
every_preset = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture
def by_triton(triton_device, monkeypatch):
    """The public function through the launcher, with small blocks."""
    for module, name, size in (
        (min_form_triton.LAUNCH, "BK", 4),
        (rows_triton.LAUNCH, "BT", 64),
        (triton_kernels.SUMS, "BK", 4),
        (triton_kernels.SUMS, "BT", 32),
        (triton_kernels.LEVELS, "BK", 4),
        (triton_kernels.MOMENTS, "BT", 32),
        (triton_kernels.GROUP, "BS", 4),
    ):
        monkeypatch.setitem(module, name, size)
    monkeypatch.setattr(triton_kernels, "ROW_SPLITS", 2)
    monkeypatch.setattr(triton_kernels, "BATCH_SPLITS", 2)  # fewer programs than sequences or blocks of rows
    monkeypatch.setattr("qrm_fast.ops.process_advantages._process_rows", triton_kernels.launch_rows)

    def run(**arguments):
        moved = {k: v.to(triton_device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return process_advantages(**moved, num_tokens=int(arguments["cu_seqlens"][-1])).cpu()

    return run


def float32(arguments):
    return {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


@every_preset
def test_golden_c(by_triton, preset):
    result = by_triton(**float32(GOLDEN), preset=preset)
    torch.testing.assert_close(result.double(), torch.tensor(EXPECTED[preset]).double(), rtol=2e-7, atol=3e-8)


@every_preset
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_padded_transcription(by_triton, preset, case, monkeypatch):
    if case == "everything":
        monkeypatch.setattr(groups_triton, "COMPARED", 0)  # groups by sorting
    arguments, kl = inputs([3, 1, 7, 33, 9, 2, 17, 8])
    options = CASES[case](kl)
    exact, peer = (
        transcription(
            *list(arguments.values())[:4],
            outcome_rewards=arguments["outcome_rewards"],
            preset=preset,
            max_gen_len=arguments["max_gen_len"],
            dtype=dtype,
            **options,
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(by_triton(**arguments, **options, preset=preset), exact, peer)


def odd_arguments(preset, penalised, mask_step_ends=True):
    """Of the op: answers alone, without steps, empty, without an answer to verify; what is not finite; rows behind the
    last step; in group 2, between two others."""
    g = torch.Generator().manual_seed(0)
    cu = cu_seqlens([6, 4, 0, 5, 7, 2, 9, 3])
    ends = torch.tensor([1, 3, 12, 14, 16, 18, 22, 25, 30, 35])
    rewards = torch.tensor([0.5, -0.5, 0.25, math.inf, 1.0, 0.0, 0.75, -0.25, 0.5, 0.0])
    returns, _, _ = _min_form_returns(rewards, ends, cu, 36, "soft", 0.1)
    ids = torch.tensor([2, 5, 5, 2, 2, 2, 2, 2], dtype=torch.int32)
    outcomes = torch.tensor([1.0, 1, 0, 1, 0, math.nan, 1, 0])
    has_answer = torch.tensor([True, True, True, False, True, True, True, True])
    penalty = torch.rand(36, generator=g).mul(0.1) if penalised else None
    return returns, ends, cu, ids, outcomes, has_answer, penalty, 36, preset, 9.0, 0.5, 2.0, mask_step_ends


def launched(arguments, device):
    moved = (x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)
    return [x.cpu() for x in triton_kernels.launch(*moved)]


@every_preset
@pytest.mark.parametrize("penalised", [False, True], ids=["plain", "penalised"])
@pytest.mark.usefixtures("by_triton")
def test_as_the_cpu_kernel_where_something_is_missing(preset, penalised, triton_device):
    for mask_step_ends in (False, True) if preset in WHITENING else (False,):
        arguments = odd_arguments(preset, penalised, mask_step_ends)
        for ours, want in zip(launched(arguments, triton_device), _process_advantages(*arguments), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-13, equal_nan=True)


@every_preset
def test_nothing_to_do(by_triton, preset):
    none = torch.zeros(0)
    for cu in [0], [0, 0], [0, 3, 3]:
        ids = torch.zeros(len(cu) - 1, dtype=torch.int64)
        result = by_triton(
            step_rewards=none,
            step_ends=ids[:0],
            cu_seqlens=torch.tensor(cu),
            group_ids=ids,
            preset=preset,
            max_gen_len=5,
        )
        assert result.shape == (cu[-1],) and not result.any()


@every_preset
def test_ids_out_of_range_make_their_own_sequence_nan(by_triton, preset):
    wrong = float32(GOLDEN) | {"group_ids": torch.tensor([1, 3, 1])}
    result = by_triton(**wrong, preset=preset, mask_step_ends=False)
    assert result[6:10].isnan().all() and result[:6].isfinite().all() and result[10:].isfinite().all()


@pytest.mark.overlapping
@pytest.mark.parametrize("preset, penalised", [("paper-step", False), ("openrlhf", False), ("verl", True)])
def test_stays_inside_its_tensors(preset, penalised, triton_device, monkeypatch):
    """Boundaries, steps and groups that a CPU kernel would refuse."""
    monkeypatch.setattr(triton_kernels, "ROW_SPLITS", 2)
    returns, ends, cu, ids, *rest = odd_arguments(preset, penalised)
    wild_cu = torch.tensor([-50, 4, 90, 3, 1 << 40, 7, 0, 20, 500])
    wild_ids = torch.tensor([-1, 8, 1 << 40, 2, -(1 << 40), 7, 9, 2])
    for broken in (
        (ends.flip(0), cu, wild_ids),
        (ends + 1000, cu, ids),
        (ends - 20, wild_cu, ids),
        (ends, wild_cu, wild_ids),
    ):
        levels, base, stats = launched((returns, *broken, *rest), triton_device)
        assert levels.shape == (10,) and base.shape == (8,) and stats.shape == (2, 3)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@every_preset
@pytest.mark.parametrize("num_sequences", [300, 5000], ids=["compared", "sorted"])
def test_nothing_waits_and_a_graph_captures_it(preset, num_sequences):
    """Through the public function, by the kernels that serve it on the GPU; as in float64 on CPU."""
    arguments, kl = inputs([1 + i * 37 % 90 for i in range(num_sequences)])
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    moved |= {"kl": kl.cuda(), "preset": preset}

    def step():
        return process_advantages(**moved)

    step()
    torch.cuda.set_sync_debug_mode("error")
    direct = step()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(replayed(step), direct)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    exact = process_advantages(**wide, kl=kl.double(), preset=preset)
    torch.testing.assert_close(direct.cpu().double(), exact, rtol=1e-6, atol=1e-6)
