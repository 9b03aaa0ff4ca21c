"""q_advantages: the released code's golden values, the definition in float64, and the promises of every op."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from cuda_graph import replayed
from grids import LENGTHS
from test_q_token_rewards import CASES, CU, KL, SCORES, VALUES, close, float32_path, inputs, oracle

from qrm_fast import q_advantages, q_token_rewards
from qrm_fast.ops.q_token_rewards import _q_token_rewards
from qrm_fast.triton import moments as triton_moments
from qrm_fast.triton import q_token_rewards as triton_rows


@pytest.fixture(params=["kernel", "reference", "triton"])
def on(request, monkeypatch, triton_device):
    """The device of the kernels that the public function now builds on."""
    if request.param == "triton":
        monkeypatch.setitem(triton_moments.ROWS, "BT", 32)
        monkeypatch.setitem(triton_rows.LAUNCH, "BT", 32)
        monkeypatch.setattr("qrm_fast.ops.moments._moments", triton_moments.launch)
    if request.param != "kernel":
        rows = triton_rows.launch if request.param == "triton" else _q_token_rewards.reference
        for page in "q_token_rewards", "q_advantages":
            monkeypatch.setattr(f"qrm_fast.ops.{page}._q_token_rewards", rows)
    return triton_device if request.param == "triton" else "cpu"


def test_golden_a(on):
    options = {name: x.to(on) if isinstance(x, torch.Tensor) else x for name, x in KL.items()}
    advantages, returns = (x.cpu() for x in q_advantages(SCORES.to(on), VALUES.to(on), CU.to(on), **options))
    close(advantages, [0.371249, -0.777377, 1.518264, 1.142236, -0.402628, 0.169184, 2.271591])
    close(returns, [0.378469, -0.762937, 1.521874, 1.131406, -0.380969, 0.187234, 2.278811])


def test_algorithm_1_of_the_paper(on):
    """Standardised scores minus the critic's raw value."""
    tensors = SCORES.to(on), VALUES.to(on), CU.to(on)
    advantages = q_advantages(*tensors, center=True, value_coef=1.0, value_normalize=False).advantages.cpu()
    scores = SCORES.double()
    standardised = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(advantages.double(), standardised - VALUES.double(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_the_definition(lengths, case, on, request):
    if request.node.callspec.params["on"] == "triton":
        lengths = lengths[:20]  # the interpreter is slow
    q, cu, *rest = inputs(lengths, device=on)
    options = CASES[case](*rest)
    values = torch.randn(len(q), generator=torch.Generator().manual_seed(5)).mul(2).add(3).to(on)
    spread = {name: options[name] for name in ("mask", "scope", "group_ids", "eps") if name in options}
    exact_returns, exact_values = oracle(q, cu, **options), oracle(values, cu, **spread)
    peer_returns, peer_values = float32_path(q, cu, options), float32_path(values, cu, spread)
    advantages, returns = q_advantages(q, values, cu, value_coef=0.5, **options)
    assert_as_accurate(returns, exact_returns, peer_returns)
    assert_as_accurate(advantages, exact_returns - 0.5 * exact_values, peer_returns - 0.5 * peer_values)


def test_without_values_or_spread(on):
    q, cu, mask, *_ = inputs([4, 0, 9], device=on)
    advantages, returns = q_advantages(q, None, cu, mask=mask)
    assert torch.equal(advantages, returns) and torch.equal(returns, q_token_rewards(q, cu, mask=mask))
    for scope in "batch", "sequence":
        flat = q_advantages(q, torch.full_like(q, 0.1), cu, scope=scope)
        assert torch.equal(flat.advantages, flat.returns)
    raw = q_advantages(q, torch.full_like(q, 0.25), cu, value_coef=2.0, value_normalize=False)
    torch.testing.assert_close(raw.advantages, raw.returns - 0.5)


@pytest.mark.parametrize("value_normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("scope", ["batch", "sequence", "group"])
def test_masked_rows_are_never_read(scope, value_normalize, on):
    q, cu, mask, group_ids, *_ = inputs([5, 9, 40, 3], device=on)
    values = torch.randn_like(q)
    options = {"mask": mask, "scope": scope, "group_ids": group_ids if scope == "group" else None}
    options["value_normalize"] = value_normalize
    clean, *poisoned = (
        torch.stack(q_advantages(q.where(mask, poison), values.where(mask, poison), cu, **options))
        for poison in (0.0, math.nan, math.inf)
    )
    assert not clean[:, ~mask].any() and all(torch.equal(clean, p) for p in poisoned)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(poison, on):
    q, cu, *_ = inputs([4, 3, 5], device=on)
    values = q.flip(0)
    clean = q_advantages(q, values, cu, mask=torch.arange(12, device=on) != 5)
    values[5] = poison
    advantages, returns = q_advantages(q, values, cu)
    assert not advantages[5].isfinite() and advantages.isfinite().sum() == 11 and returns.isfinite().all()
    q[5] = poison
    kept = torch.arange(12, device=on) != 5
    for ours, expected in zip(q_advantages(q, values, cu), clean, strict=True):
        assert not ours[5].isfinite() and torch.equal(ours[kept], expected[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    q, cu, *rest = inputs([3, 1, 7, 63, 65], dtype)
    options = CASES["everything"](*rest)
    result = q_advantages(q, q.flip(0), cu, **options)
    assert {x.dtype for x in result} == {torch.promote_types(dtype, torch.float32)}
    spread = {name: options[name] for name in ("mask", "scope", "group_ids", "eps")}
    exact = oracle(q, cu, **options) - 0.01 * oracle(q.flip(0), cu, **spread)
    peer = float32_path(q, cu, options) - 0.01 * float32_path(q.flip(0), cu, spread)
    assert_as_accurate(result.advantages, exact, peer)


@pytest.mark.unpoisoned
def test_bits_depend_on_the_own_sequence_only():
    q, cu, mask, *_ = inputs([1, 1025, 3, 0, 2049, 7, 1024])
    values = torch.randn_like(q)
    options = {"scope": "sequence", "center": True, "eos_rescore": "mean"}
    packed = torch.stack(q_advantages(q, values, cu, mask=mask, **options))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(packed, torch.stack(q_advantages(q, values, cu, mask=mask, **options)))
    finally:
        torch.set_num_threads(threads)
    for bos, eos in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        rows = slice(bos, eos)
        alone = q_advantages(q[rows], values[rows], torch.tensor([0, eos - bos]), mask=mask[rows], **options)
        assert torch.equal(torch.stack(alone), packed[:, rows])


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("scope", ["batch", "sequence", "group"])
def test_nothing_waits_on_cuda_and_a_graph_captures_it(scope):
    q, cu, mask, group_ids, logprobs, ref_logprobs = inputs([1, 1025, 3, 0, 2049, 7], device="cuda")
    options = CASES["everything"](mask, group_ids, logprobs, ref_logprobs) | {"scope": scope}
    options["group_ids"] = group_ids if scope == "group" else None
    values = q + 1
    q_advantages(q, values, cu, **options)
    torch.cuda.set_sync_debug_mode("error")
    direct = q_advantages(q, values, cu, **options)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, replayed(lambda: q_advantages(q, values, cu, **options)), direct))


def test_not_differentiable():
    with pytest.raises(RuntimeError, match="is not differentiable"):
        q_advantages(SCORES, VALUES.clone().requires_grad_(), CU).advantages.sum().backward()


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(q_advantages, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2]:
        q, cu, *rest = inputs(lengths)
        options = CASES["everything"](*rest)
        for graph, eager in zip(compiled(q, q + 1, cu, **options), q_advantages(q, q + 1, cu, **options), strict=True):
            assert torch.equal(graph, eager)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, r"values must be \[T\] float32, got \[7\] bfloat16", {"values": VALUES.bfloat16()}),
        (ValueError, r"values must be \[T\] float32 with T = 7, got \[6\] float32", {"values": VALUES[:6]}),
        (ValueError, "scope must be one of batch, sequence, group, got 'chunk'", {"scope": "chunk"}),
        (ValueError, "cu_seqlens must end at the number of packed rows, 7, got 4", {"cu_seqlens": CU[:2]}),
        (ValueError, "logprobs must be given for kl_coef = 0.1, got None", {"kl_coef": 0.1}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        q_advantages(**{"q": SCORES, "values": VALUES, "cu_seqlens": CU} | options)


def test_values_of_little_spread_are_divided_by_their_standard_deviation():
    """As the released code divides: V / std(V), also where std(V)^2 is as small as eps."""
    values = torch.tensor([1e-4, -1e-4, 3e-4, 1e-4], dtype=torch.float64)  # std 1.414e-4
    q = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 2, 4])
    advantages, returns = q_advantages(q, values, cu_seqlens, value_coef=1.0, value_normalize=True)
    expected = torch.tensor([0.7071, -0.7071, 2.1213, 0.7071], dtype=torch.float64)
    torch.testing.assert_close(returns - advantages, expected, rtol=0, atol=2e-4)
