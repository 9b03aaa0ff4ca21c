"""What a further row costs the kernels over rows of all sequences: `EMULATED=90 pytest tests/ptx/row_costs.py`.

One program takes all rows, as each of a large batch takes many; a further logit for dZ of linear_policy_loss. Not
collected by name: only a process that emulates can run it.
"""

import pytest
import torch

from ptx import triton_launches
from qrm_fast.triton import (
    linear_policy_loss,
    moments,
    policy_loss,
    process_advantages,
    process_diagnostics,
    step_rows,
)

NUM_ROWS = 2048


def instructions_per_row(kernel: str, launch) -> float:
    """Those of a thread: what a launch of twice the rows executes more."""
    counts = []
    for num_rows in (NUM_ROWS, 2 * NUM_ROWS):
        triton_launches.counts.pop(kernel, None)
        launch(num_rows)
        counts.append(triton_launches.counts[kernel].instructions)
    return 32 * (counts[1] - counts[0]) / NUM_ROWS


@pytest.mark.parametrize(
    ("kind", "estimator", "columns", "most"),
    [
        ("ppo", "k3", 3, 118),
        ("ppo", "unbiased", 3, 120),
        ("sapo", "k3", 3, 132),
        ("cispo", "k2", 3, 90),
        ("ppo", "k1", 1, 78),
    ],
    ids=["every input", "unbiased", "sapo", "cispo", "old log-probabilities alone"],
)
def test_policy_loss(monkeypatch, triton_device, kind, estimator, columns, most):
    monkeypatch.setattr(policy_loss, "PROGRAMS", 1)

    def launch(num_rows):
        logprobs, advantages, old, entropy, ref = torch.randn(5, num_rows)
        entropy, ref = (entropy, ref) if columns == 3 else (None, None)
        weights = torch.rand(num_rows)
        options = kind, 0.2, 0.28, 3.0, 0.01, estimator, 0.01
        policy_loss.forward(logprobs, advantages, entropy, old, ref, weights, None, *options)

    assert instructions_per_row("policy_loss_rows", launch) <= most


def test_gspo(monkeypatch, triton_device):
    """Sequences of 256 rows."""
    monkeypatch.setattr(policy_loss, "PROGRAMS", 1)

    def launch(num_rows):
        cu_seqlens, options = torch.arange(0, num_rows + 1, 256), ("gspo", 0.2, 0.28, 3.0, 0.01, "k3", 0.01)
        policy_loss.forward(*torch.randn(5, num_rows), torch.rand(num_rows), cu_seqlens, *options)

    assert instructions_per_row("policy_loss_rows", launch) <= 141
    assert instructions_per_row("policy_loss_log_ratios", launch) <= 112


def test_moments_of_sequences(triton_device):
    def launch(num_rows):
        moments.launch(torch.randn(num_rows), None, torch.arange(0, num_rows + 1, 256), None)

    assert instructions_per_row("moments_rows", launch) <= 80


@pytest.mark.parametrize(("masked", "most"), [(False, 15), (True, 18)])
def test_moments(monkeypatch, triton_device, masked, most):
    monkeypatch.setattr(moments, "BATCH_SPLITS", 1)

    def launch(num_rows):
        moments.launch(torch.randn(num_rows), torch.rand(num_rows) < 0.8 if masked else None, None, None)

    assert instructions_per_row("moments_rows", launch) <= most


@pytest.mark.parametrize(("penalised", "most"), [(False, 50), (True, 54)])
def test_rows_of_steps(triton_device, penalised, most):
    """Steps of 40 rows, sequences of 512, in a batch of 2^17."""
    ends, cu = torch.arange(39, 1 << 17, 40), torch.arange(0, (1 << 17) + 1, 512)
    values, base, stats = torch.rand(len(ends)).double(), torch.rand(len(cu) - 1).double(), torch.rand(2, 3).double()

    def launch(num_rows):
        penalty = torch.rand(num_rows) if penalised else None
        step_rows.launch(values, base, ends, cu, penalty, stats, "nonzero", num_rows, True, False)

    assert instructions_per_row("rows_of_steps", launch) <= most


@pytest.mark.parametrize(
    ("preset", "penalised", "most"),
    [
        ("openrlhf", False, {"process_sums": 11, "process_levels": 19}),
        ("openrlhf", True, {"process_sums": 11, "process_levels": 15, "process_moments": 64}),
        ("verl", True, {"process_sums": 54, "process_levels": 12, "process_moments": 58}),
    ],
    ids=["plain", "penalised", "penalised verl"],
)
def test_process_advantages(monkeypatch, triton_device, preset, penalised, most):
    """Steps of 40 rows, sequences of 512."""
    monkeypatch.setattr(process_advantages, "BATCH_SPLITS", 1)

    def launch(num_rows):
        num_rows *= 8
        ends, cu = torch.arange(39, num_rows, 40), torch.arange(0, num_rows + 1, 512)
        ids, penalty = torch.arange(len(cu) - 1) // 8, torch.rand(num_rows) if penalised else None
        of_sequence = ends, cu, ids, torch.rand(len(ids)), None, penalty
        options = preset, 3000.0, 1.0, 1.0, preset == "openrlhf"
        process_advantages.launch(torch.rand(len(ends)).double(), *of_sequence, num_rows, *options)

    for kernel, number in most.items():
        assert instructions_per_row(kernel, launch) / 8 <= number, kernel


@pytest.mark.parametrize(("shares", "most"), [(False, 43), (True, 80)])
def test_process_diagnostics(triton_device, shares, most):
    """Steps of 40 rows, sequences of 512."""

    def launch(num_rows):
        num_rows *= 8
        ends, cu = torch.arange(39, num_rows, 40), torch.arange(0, num_rows + 1, 512)
        advantages = torch.randn(num_rows) if shares else None
        process_diagnostics.launch(torch.randn(len(ends)), ends, cu, 0.1, 20, advantages)

    assert instructions_per_row("diagnose", launch) / 8 <= most


@pytest.mark.parametrize(("entropy_coef", "most"), [(0.0, 22), (0.01, 40)])
def test_dz_of_kept_logits(triton_device, entropy_coef, most):
    num_rows, vocab = 256, 1024
    hidden, weight = torch.randn(num_rows, 64).bfloat16(), torch.randn(vocab, 64).bfloat16()
    logprobs, advantages, weights = torch.rand(3, num_rows)
    triton_launches.counts.pop("linear_policy_loss_dz", None)
    linear_policy_loss.forward(
        *(hidden, weight, torch.randint(vocab, (num_rows,)), advantages, -logprobs, None, weights, None),
        *(None, 1.0, None, None, -100, "ppo", 0.2, 0.28, 3.0, 0.0, "k3", entropy_coef, True, True, False),
    )
    assert 32 * triton_launches.counts["linear_policy_loss_dz"].instructions / (num_rows * vocab) <= most
