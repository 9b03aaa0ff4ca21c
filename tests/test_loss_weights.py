"""loss_weights: the four averages against their definition, and sums over micro-batches that equal one batch."""

import itertools

import pytest
import torch
from cuda_graph import replayed
from grids import LENGTHS, cu_seqlens

from qrm_fast import loss_weights
from qrm_fast.ops.loss_weights import MODES, _loss_weights

MODE_AND_NORM = [(mode, 7.0 if mode.endswith("norm") else None) for mode in MODES]


def padded_loss(losses, lengths, mask, mode, norm):
    """The average written on a list per sequence, as the trainers define it."""
    rows = iter(zip(losses.tolist(), mask.tolist(), strict=True))
    sequences = [[loss for loss, counted in [next(rows) for _ in range(length)] if counted] for length in lengths]
    sequences = [s for s in sequences if s]
    if not sequences:
        return 0.0
    if mode == "token-mean":
        return sum(map(sum, sequences)) / sum(map(len, sequences))
    if mode == "seq-mean-token-mean":
        return sum(sum(s) / len(s) for s in sequences) / len(sequences)
    return sum(map(sum, sequences)) / len(sequences) / (norm or 1)


def inputs(lengths, device="cpu"):
    g = torch.Generator().manual_seed(len(lengths))
    losses = torch.randn(sum(lengths), generator=g, dtype=torch.float64).add(3)
    mask = torch.rand(sum(lengths), generator=g) < 0.6
    return losses.to(device), cu_seqlens(lengths).to(device), mask.to(device)


def test_hand_computed():
    cu = torch.tensor([0, 3, 3, 4, 6])
    mask = torch.tensor([True, False, True, True, False, False])
    expected = {
        "token-mean": [1 / 3, 0, 1 / 3, 1 / 3, 0, 0],
        "seq-mean-token-mean": [1 / 4, 0, 1 / 4, 1 / 2, 0, 0],  # the empty and the fully masked sequence do not count
        "seq-mean-token-sum": [1 / 2, 0, 1 / 2, 1 / 2, 0, 0],
        "seq-mean-token-sum-norm": [1 / 8, 0, 1 / 8, 1 / 8, 0, 0],
    }
    for mode, weights in expected.items():
        norm = 4.0 if mode.endswith("norm") else 1.0
        assert _loss_weights(cu, mask, 6, mode, 0.0, norm).tolist() == torch.tensor(weights).tolist()


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("mode, norm", MODE_AND_NORM)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_the_definition(lengths, mode, norm, masked, device):
    losses, cu, mask = inputs(lengths, device)
    weights = loss_weights(cu, mask=mask if masked else None, mode=mode, norm=norm, num_tokens=len(losses))
    assert weights.shape == losses.shape and weights.dtype == torch.float32
    counted = mask if masked else torch.ones_like(mask)
    assert not weights[~counted].any()
    loss = (weights.double() * losses).sum().item()
    # each weight is rounded once
    slack = 2**-24 * (weights.double() * losses.abs()).sum().item()
    assert loss == pytest.approx(padded_loss(losses, lengths, counted, mode, norm), rel=1e-12, abs=slack)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode, norm", MODE_AND_NORM)
def test_nothing_waits_and_a_graph_captures_it(mode, norm):
    _, cu, mask = inputs([1 + i * 37 % 3000 for i in range(80)], "cuda")
    options = {"mask": mask, "mode": mode, "norm": norm}
    loss_weights(cu, **options)
    torch.cuda.set_sync_debug_mode("error")
    direct = loss_weights(cu, **options)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(replayed(lambda: loss_weights(cu, **options)), direct)
    assert torch.equal(direct.cpu(), loss_weights(cu.cpu(), mask=mask.cpu(), mode=mode, norm=norm))


@pytest.mark.parametrize("mode, norm", MODE_AND_NORM)
def test_micro_batches_add_up_to_the_batch(mode, norm):
    lengths = [3, 1, 7, 0, 63, 65, 2, 9]
    losses, cu, mask = inputs(lengths)
    mask[11:14] = False
    whole = (loss_weights(cu, mask=mask, mode=mode, norm=norm) * losses).sum()
    sequences = [mask[bos:eos] for bos, eos in itertools.pairwise(cu)]
    totals = {"global_tokens": int(mask.sum()), "global_sequences": sum(bool(s.any()) for s in sequences)}
    parts = 0
    for first, last in (0, 3), (3, 4), (4, 6), (6, 8):
        rows = slice(int(cu[first]), int(cu[last]))
        weights = loss_weights(cu[first : last + 1] - cu[first], mask=mask[rows], mode=mode, norm=norm, **totals)
        parts = parts + (weights * losses[rows]).sum()
    torch.testing.assert_close(parts, whole, rtol=1e-7, atol=0)


def test_length_from_mask_argument_or_boundaries():
    cu = torch.tensor([0, 2, 5])
    expected = torch.full((5,), 0.2)
    assert torch.equal(loss_weights(cu), expected)
    assert torch.equal(loss_weights(cu, num_tokens=5), expected)
    assert torch.equal(loss_weights(cu.int(), mask=torch.ones(5, dtype=torch.bool)), expected)


def test_opcheck():
    _, cu, mask = inputs([3, 0, 4])
    for mode in MODES:
        torch.library.opcheck(_loss_weights.op, (cu, mask, 7, mode, 0.0, 2.0))
    torch.library.opcheck(_loss_weights.op, (cu, None, 7, MODES[0], 5.0, 1.0))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(loss_weights, fullgraph=True, dynamic=True)
    for lengths, tokens in ([3, 4, 9, 5], 30), ([8, 1, 6, 6, 70, 2], 100), ([1, 2], 7):
        _, cu, mask = inputs(lengths)
        for options in {"mask": mask, "global_tokens": tokens}, {"num_tokens": sum(lengths), "mode": MODES[1]}:
            assert torch.equal(compiled(cu, **options), loss_weights(cu, **options))


CU = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64, got \[3\] float32", {"cu_seqlens": CU.float()}),
        (ValueError, "cu_seqlens must start at 0, got 2", {"cu_seqlens": CU[1:]}),
        (ValueError, "cu_seqlens must not decrease, got 2 then 0", {"cu_seqlens": CU[[0, 1, 0, 2]]}),
        (ValueError, "cu_seqlens must end at the number of packed rows, 4, got 5", {"num_tokens": 4}),
        (TypeError, r"mask must be \[T\] bool, got \[5\] float32", {"mask": torch.ones(5)}),
        (
            ValueError,
            "num_tokens must be the length of mask, 5, got 6",
            {"mask": CU.new_ones(5).bool(), "num_tokens": 6},
        ),
        (ValueError, "mode must be one of token-mean, seq-mean-token-mean, .* got 'mean'", {"mode": "mean"}),
        (ValueError, "norm must be given for mode 'seq-mean-token-sum-norm' only, got None", {"mode": MODES[3]}),
        (ValueError, "norm must be given .* only, got 3.0 for 'token-mean'", {"norm": 3.0}),
        (ValueError, "norm must be positive, got 0.0", {"mode": MODES[3], "norm": 0.0}),
        (ValueError, "global_tokens must be positive, got 0", {"global_tokens": 0}),
        (ValueError, "global_sequences must be positive, got -1", {"global_sequences": -1}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        loss_weights(**{"cu_seqlens": CU} | options)
