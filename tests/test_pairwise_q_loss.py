"""pairwise_q_loss: values of the paper's code, a float64 loop, gradients, and the promises of every op."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from cuda_graph import replayed
from grids import cu_seqlens

from qrm_fast import pairwise_q_loss
from qrm_fast.ops.pairwise_q_loss import _pairwise_q_loss, _pairwise_q_loss_backward
from qrm_fast.triton import pairwise_q_loss as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # interpreter

PAIRS = [
    pytest.param([], id="no-pair"),
    pytest.param([0, 0], id="both-sides-empty"),
    pytest.param([1, 1], id="one-token"),
    pytest.param([3, 7, 1, 64, 33, 0, 0, 5, 2, 2], id="odd-and-empty"),
    pytest.param([3000, 1, 17, 2999], id="long"),
    pytest.param([1 + i % 7 for i in range(300)], id="many"),
]


def oracle(q, lengths, mask, beta=0.2, gamma=2.0):
    """The definition, token by token in float64. Differentiable."""
    q = q.double()
    rows = iter(range(q.shape[0]))
    means = []
    for length in lengths:
        kept = [q[t] for t in [next(rows) for _ in range(length)] if mask is None or mask[t]]
        means.append(sum(kept) / len(kept) if kept else None)
    losses, margins, right = [], [], 0
    for chosen, rejected in zip(means[0::2], means[1::2], strict=True):
        if chosen is None or rejected is None:
            margins.append(q.new_zeros(()))
            continue
        margins.append(chosen - rejected)
        losses.append(torch.nn.functional.softplus(gamma - beta * margins[-1]))
        right += bool(margins[-1] > 0)
    margin = torch.stack(margins) if margins else q.new_zeros(0)
    loss = sum(losses) / len(losses) if losses else q.sum() * 0.0
    return loss, margin, torch.tensor(right / max(len(losses), 1), dtype=torch.float64)


def inputs(lengths, masked, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(len(lengths))
    q = torch.randn(sum(lengths), generator=g).mul(5).to(dtype).to(device)
    mask = (torch.rand(sum(lengths), generator=g) < 0.6).to(device) if masked else None
    return q, cu_seqlens(lengths).to(device), mask


def test_hand_computed():
    q = torch.tensor([1.0, 3.0, 1.0, -4.0, 2.0, 9.0])
    loss, margin, accuracy = pairwise_q_loss(q, torch.tensor([0, 2, 3, 4, 6]), beta=1.0, gamma=0.0)
    # means 2 | 1 | -4 | 5.5; softplus(-1) = .3132617, softplus(9.5) = 9.5000749
    torch.testing.assert_close(margin, torch.tensor([1.0, -9.5]))
    torch.testing.assert_close(loss, torch.tensor((0.3132617 + 9.5000749) / 2))
    assert accuracy == 0.5


@pytest.mark.parametrize("implementation", [_pairwise_q_loss, _pairwise_q_loss._init_fn], ids=["kernel", "reference"])
def test_golden_vector_of_the_released_code(implementation):
    """The mean-score loss of spec 2.8: two padded rows per side, masks made into packed sequences."""
    chosen = [[1.0, 2, -1, 4], [0.5, 0.5]]
    rejected = [[-1.0, 0.5], [2.0, 1, 0]]
    sequences = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
    q = torch.cat([torch.tensor(s) for s in sequences])
    loss, *_ = implementation(q, cu_seqlens([len(s) for s in sequences]), None, 0.2, 2.0)
    assert loss.item() == pytest.approx(2.0205970, abs=5e-7)


def test_zero_scores_give_softplus_of_gamma():
    assert pairwise_q_loss(torch.zeros(9), torch.tensor([0, 4, 9])).loss.item() == pytest.approx(2.126928, abs=5e-7)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("lengths", PAIRS)
def test_agrees_with_the_definition(lengths, masked, device):
    q, cu, mask = inputs(lengths, masked, device=device)
    q64 = q.double().cpu().requires_grad_()
    exact = oracle(q64, lengths, None if mask is None else mask.cpu())
    peer_q = q.clone().requires_grad_()
    peer = _pairwise_q_loss._init_fn(peer_q, cu, mask, 0.2, 2.0)
    q.requires_grad_()
    result = pairwise_q_loss(q, cu, mask=mask)
    for ours, ref, torchs in zip(result, exact, peer[:3], strict=True):
        assert_as_accurate(ours, ref, torchs)
    weights = torch.linspace(-1, 1, len(lengths) // 2, device=device)

    def backward(loss, margin):
        (loss + (margin * weights.to(margin)).sum()).backward()

    backward(*exact[:2])
    backward(*peer[:2])
    backward(*result[:2])
    assert_as_accurate(q.grad, q64.grad, peer_q.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    lengths = [3, 7, 1, 64, 33, 20]
    q, cu, mask = inputs(lengths, True, dtype)
    q64 = q.double().requires_grad_()
    exact = oracle(q64, lengths, mask)
    q.requires_grad_()
    result = pairwise_q_loss(q, cu, mask=mask)
    acc = torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in result} == {acc}
    peer = _pairwise_q_loss._init_fn(q.detach(), cu, mask, 0.2, 2.0)
    assert_as_accurate(result.loss, exact[0], peer[0])
    assert_as_accurate(result.margin, exact[1], peer[1])
    exact[0].backward()
    result.loss.backward()
    assert_as_accurate(q.grad, q64.grad, q64.grad.to(dtype))  # rounded once


def test_masked_rows_are_never_read(device):
    q, cu, mask = inputs([5, 9, 40, 3], True, device=device)
    results = []
    for poison in 0.0, math.nan, math.inf:
        leaf = q.where(mask, poison).requires_grad_()
        result = pairwise_q_loss(leaf, cu, mask=mask)
        result.loss.backward()
        assert not leaf.grad[~mask].any()
        results.append(torch.cat([x.detach().flatten() for x in (*result, leaf.grad)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("lengths, mask", [([0, 3], None), ([2, 1], [False, False, True]), ([], None)])
def test_no_counted_pair(lengths, mask, device):
    q = torch.full((sum(lengths),), 7.0, device=device, requires_grad=True)
    mask = None if mask is None else torch.tensor(mask, device=device)
    loss, margin, accuracy = pairwise_q_loss(q, cu_seqlens(lengths).to(device), mask=mask)
    (loss + margin.sum()).backward()
    assert loss == 0 and accuracy == 0 and not margin.any() and not q.grad.any()


def test_extreme_margins_stay_finite(device):
    q = torch.tensor([1e4, -1e4, -1e4, 1e4], device=device, requires_grad=True)
    loss, margin, _ = pairwise_q_loss(q, torch.arange(5, device=device))
    assert margin.tolist() == [2e4, -2e4]
    assert loss.item() == pytest.approx((0 + 2 + 0.2 * 2e4) / 2)
    loss.backward()
    torch.testing.assert_close(q.grad.cpu(), torch.tensor([0.0, 0.0, -0.1, 0.1]))


def test_nan_in_a_counted_row_shows():
    loss, margin, _ = pairwise_q_loss(torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.arange(5))
    assert loss.isnan() and margin[0].isnan() and margin[1] == -1


@pytest.mark.unpoisoned
def test_bits_depend_on_the_own_pair_only():
    lengths = [700, 3, 41, 1, 5, 1033, 2, 2]
    q, cu, mask = inputs(lengths, True)
    margin = pairwise_q_loss(q, cu, mask=mask).margin
    for i in range(len(lengths) // 2):
        bos, mid, eos = cu[2 * i : 2 * i + 3].tolist()
        alone = pairwise_q_loss(q[bos:eos], torch.tensor([0, mid - bos, eos - bos]), mask=mask[bos:eos]).margin
        assert torch.equal(alone[0], margin[i])


@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_threads():
    q, cu, mask = inputs([1 + i % 70 for i in range(400)], True)
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in 1, 2, 2:
            torch.set_num_threads(num_threads)
            leaf = q.clone().requires_grad_()
            result = pairwise_q_loss(leaf, cu, mask=mask)
            result.loss.backward()
            results.append(torch.cat([x.detach().flatten() for x in (*result, leaf.grad)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offset_slices_and_index_dtypes(dtype):
    q, cu, _ = inputs([3, 2, 4, 4], False)
    wide = torch.full((30,), math.nan)
    wide[7:20] = q
    assert torch.equal(pairwise_q_loss(wide[7:20], cu.to(dtype)).loss, pairwise_q_loss(q, cu).loss)


def test_opcheck():
    q, cu, mask = inputs([3, 0, 4, 4, 6, 2], True)
    torch.library.opcheck(_pairwise_q_loss, (q.requires_grad_(), cu, mask, 0.2, 2.0))
    torch.library.opcheck(_pairwise_q_loss, (q.to(torch.bfloat16).detach(), cu, None, 0.2, 2.0))
    _, margin, _, counts = _pairwise_q_loss(q.detach(), cu, mask, 0.2, 2.0)
    args = (torch.ones(()), torch.ones(3), q.detach(), cu, mask, margin, counts, 0.2, 2.0)
    torch.library.opcheck(_pairwise_q_loss_backward, args)


def test_gradcheck():
    q, cu, mask = inputs([3, 1, 4, 4, 2, 0], True, torch.float64)
    mask[0] = mask[3] = True

    def differentiable(q):
        result = pairwise_q_loss(q, cu, mask=mask)
        assert not result.accuracy.requires_grad
        return result.loss, result.margin

    assert torch.autograd.gradcheck(differentiable, q.requires_grad_())


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(pairwise_q_loss, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2], [1, 2]:
        grads = []
        q, cu, mask = inputs(lengths, True)
        for function in pairwise_q_loss, compiled:
            leaf = q.clone().requires_grad_()
            result = function(leaf, cu, mask=mask)
            result.loss.backward()
            grads.append((result.loss, result.margin, result.accuracy, leaf.grad))
        for eager, graph in zip(*grads, strict=True):
            assert torch.equal(eager, graph)


# Triton, on the GPU or in the interpreter


@pytest.fixture
def launches(triton_device, monkeypatch):
    """Loss, margin, accuracy, counts and the gradient of q by the launchers, with small blocks."""
    monkeypatch.setitem(triton_kernels.ROWS, "BT", 16)
    monkeypatch.setitem(triton_kernels.PAIRS, "BP", 4)

    def run(q, cu, mask, grad_loss, grad_margin, beta=0.2, gamma=2.0):
        q, cu, mask, *upstream = (
            x if x is None else x.to(triton_device) for x in (q, cu, mask, grad_loss, grad_margin)
        )
        loss, margin, accuracy, counts = triton_kernels.forward(q, cu, mask, beta, gamma)
        grad = triton_kernels.backward(*upstream, q, cu, mask, margin, counts, beta, gamma)
        return [x.cpu() for x in (loss, margin, accuracy, counts, grad)]

    return run


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 1], [3, 7, 1, 64, 33, 0, 0, 5, 2, 2, 90, 1, 4, 4]], ids=str)
def test_triton_agrees_with_the_definition(lengths, masked, launches):
    q, cu, mask = inputs(lengths, masked)
    upstream = torch.tensor(0.5), torch.linspace(-1, 1, len(lengths) // 2)
    q64, peer_q = q.double().requires_grad_(), q.clone().requires_grad_()
    exact, peer = oracle(q64, lengths, mask), _pairwise_q_loss._init_fn(peer_q, cu, mask, 0.2, 2.0)
    for loss, margin in exact[:2], peer[:2]:
        (loss * upstream[0].to(loss) + (margin * upstream[1].to(margin)).sum()).backward()
    poisoned = q if mask is None else q.where(mask, math.nan)
    *result, counts, grad = launches(poisoned, cu.long() if masked else cu, mask, *upstream)
    for ours, want, torchs in zip((*result, grad), (*exact, q64.grad), (*peer[:3], peer_q.grad), strict=True):
        assert_as_accurate(ours, want, torchs)
    assert torch.equal(counts, peer[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_rounds_16_bit_gradients_once(dtype, launches):
    lengths = [3, 7, 1, 40, 33, 20]
    q, cu, mask = inputs(lengths, True, dtype)
    q64 = q.double().requires_grad_()
    exact = oracle(q64, lengths, mask)[0]
    exact.backward()
    loss, *_, grad = launches(q, cu, mask, torch.tensor(1.0), torch.zeros(3))
    assert_as_accurate(loss, exact, exact.float())
    assert_as_accurate(grad, q64.grad, q64.grad.to(dtype))


def test_triton_extreme_margins_and_nan(launches):
    q = torch.tensor([1e4, -1e4, -1e4, 1e4, 250.0, 0.0])
    loss, margin, accuracy, _, grad = launches(q, torch.arange(7), None, torch.tensor(1.0), torch.zeros(3))
    assert margin.tolist() == [2e4, -2e4, 250]
    assert loss.item() == pytest.approx((2 + 0.2 * 2e4) / 3) and accuracy == pytest.approx(2 / 3)
    torch.testing.assert_close(grad[:4], torch.tensor([0.0, 0.0, -0.2 / 3, 0.2 / 3]))
    tiny = launches(q[4:], torch.arange(3), None, torch.tensor(1.0), torch.zeros(1))[0]
    assert tiny.item() == pytest.approx(math.exp(2 - 50), rel=1e-6, abs=0)
    loss, margin, *_ = launches(q.index_fill(0, torch.tensor(1), math.nan), torch.arange(7), None, loss, margin)
    assert loss.isnan() and margin.isnan().tolist() == [True, False, False]


@pytest.mark.unpoisoned
def test_triton_bits_depend_on_the_own_pair_only(launches):
    lengths = [70, 3, 41, 1, 5, 133]
    q, cu, mask = inputs(lengths, True)
    upstream = torch.tensor(1.0), torch.zeros(3)
    margin = launches(q, cu, mask, *upstream)[1]
    bos, mid, eos = cu[2:5].tolist()
    alone = launches(q[bos:eos], torch.tensor([0, mid - bos, eos - bos]), mask[bos:eos], upstream[0], upstream[1][:1])
    assert torch.equal(alone[1][0], margin[1])


def test_triton_stays_inside_its_tensors(launches):
    """Boundaries that a CPU kernel would refuse."""
    wide = torch.full((60,), 7.0)
    for bounds in [0, 500, 20], [-50, 4, 90], [9, 3, 40], [1 << 40, 3, -1]:
        *_, counts, grad = launches(wide[20:40], torch.tensor(bounds), None, torch.tensor(1.0), torch.ones(1))
        assert counts.shape == (2,) and counts.min() >= 0 and counts.max() <= 20 and grad.shape == (20,)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_nothing_waits_and_a_graph_captures_it():
    q, cu, mask = inputs([1 + i * 37 % 3000 for i in range(80)], True, device="cuda")
    q.requires_grad_()

    def step():
        result = pairwise_q_loss(q, cu, mask=mask)
        return *result, *torch.autograd.grad(result.loss, q)

    step()
    torch.cuda.set_sync_debug_mode("error")
    direct = step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, replayed(step), direct))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"q must be \[T\] float32 .* got \[4, 1\] float32", {"q": torch.zeros(4, 1)}),
        (TypeError, r"q must be \[T\] .* got \[4\] int64", {"q": torch.zeros(4, dtype=torch.int64)}),
        (TypeError, "q must be a tensor .* got list", {"q": [0.0] * 4}),
        (
            ValueError,
            "cu_seqlens must have 2P\\+1 entries for some P >= 0, got .4.",
            {"cu": torch.tensor([0, 1, 2, 4])},
        ),
        (
            TypeError,
            r"cu_seqlens must be \[2P\+1\] int32 or int64, got \[3\] float32",
            {"cu": torch.tensor([0.0, 2, 4])},
        ),
        (ValueError, "cu_seqlens must start at 0, got 1", {"cu": torch.tensor([1, 2, 4])}),
        (ValueError, "cu_seqlens must not decrease, got 5 then 4 at index 2", {"cu": torch.tensor([0, 5, 4])}),
        (ValueError, "cu_seqlens must end at the number of packed rows, 4, got 3", {"cu": torch.tensor([0, 2, 3])}),
        (TypeError, r"mask must be \[T\] bool, got \[4\] float32", {"mask": torch.ones(4)}),
        (ValueError, r"mask must be \[T\] bool with T = 4, got \[3\] bool", {"mask": torch.ones(3, dtype=torch.bool)}),
        (ValueError, "q must be dense in its last dimension, got stride 2", {"q": torch.zeros(8)[::2]}),
    ],
)
def test_bad_input(error, message, change):
    arguments = {"q": torch.zeros(4), "cu": torch.tensor([0, 2, 4]), "mask": None} | change
    with pytest.raises(error, match=message):
        pairwise_q_loss(arguments["q"], arguments["cu"], mask=arguments["mask"])
