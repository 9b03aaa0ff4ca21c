"""q_token_rewards: golden vectors of the released code, a float64 loop, and the promises of every op."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from grids import LENGTHS, cu_seqlens

from qrm_fast import gae, q_token_rewards
from qrm_fast.ops.moments import _moments
from qrm_fast.ops.q_token_rewards import _q_token_rewards
from qrm_fast.triton import moments as triton_moments
from qrm_fast.triton import q_token_rewards as triton_kernels

# Spec 2.8: two padded rows of the released code, packed. Scores, values, log-probabilities; sequences of 4 and 3.
CU = torch.tensor([0, 4, 7])
SCORES = torch.tensor([0.5, -1, 2, 1.5, -0.5, 0.25, 3])
VALUES = torch.tensor([0.2, 0.4, 0.1, -0.3, 0.6, 0.5, 0.2])
LOGPROBS = torch.tensor([-0.1, -0.7, -0.2, -1.1, -0.3, -0.4, -0.05])
REF_LOGPROBS = torch.tensor([-0.3, -0.5, -0.2, -2.1, -0.35, -0.1, -0.45])
KL = {"kl_coef": 0.01, "logprobs": LOGPROBS, "ref_logprobs": REF_LOGPROBS}
LAST = torch.tensor([3, 6])


def close(result, expected):
    torch.testing.assert_close(result, torch.tensor(expected), rtol=0, atol=1.5e-6)


def test_golden_a_rewards():
    close(q_token_rewards(SCORES, CU, **KL), [0.378469, -0.762937, 1.521874, 1.131406, -0.380969, 0.187234, 2.278811])


def test_golden_b_last_action_rescored():
    rewards = q_token_rewards(SCORES, CU, eos_rescore="mean")
    close(rewards, [0.380469, -0.760937, 1.521874, 0.570703, -0.380469, 0.190234, 0.697526])


def test_golden_b_centred():
    rewards = q_token_rewards(SCORES, CU, eos_rescore="mean", center=True)
    close(rewards, [-0.244587, -1.385992, 0.896819, -0.054353, -1.005524, -0.434821, 0.072470])


def test_golden_c_outcome_reward_on_the_last_action():
    """The outcome reward is normalised while on every token, then kept on the last, then the KL is subtracted."""
    broadcast = SCORES[LAST].repeat_interleave(torch.tensor([4, 3]))
    kept = torch.zeros(7).index_copy(0, LAST, q_token_rewards(broadcast, CU)[LAST])
    rewards = kept + q_token_rewards(torch.zeros(7), CU, **KL)
    close(rewards, [-0.002, -0.002, 0, 2.010726, -0.0005, -0.003, 4.037452])
    advantages, returns = gae(rewards, VALUES, CU, gamma=0.9, lam=0.8)
    close(advantages, [0.604026, 0.619480, 1.293723, 2.310726, 1.606275, 2.439965, 3.837452])
    close(returns, [0.804026, 1.019480, 1.393723, 2.010726, 2.206275, 2.939965, 4.037452])


def test_golden_d_dense_rewards_with_gae():
    advantages, _ = gae(q_token_rewards(SCORES, CU, **KL), VALUES, CU, gamma=0.9, lam=0.8)
    close(advantages, [0.897355, 0.498453, 2.182486, 1.431406, 0.451096, 1.363978, 2.078811])


def test_golden_e_outcome_reward_on_every_action():
    broadcast = SCORES[LAST].repeat_interleave(torch.tensor([4, 3]))
    close(q_token_rewards(broadcast, CU, eos_rescore="mean"), [2.020726] * 4 + [4.041452] * 3)


def oracle(
    q,
    cu,
    *,
    mask=None,
    center=False,
    scope="batch",
    group_ids=None,
    eos_rescore="none",
    kl_coef=0.0,
    kl_estimator="abs",
    logprobs=None,
    ref_logprobs=None,
    min_std=0.0,
    eps=1e-8,
):
    """The definition in Python's floats, which are float64."""
    bounds = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    rows = [[t for t in range(bos, eos) if mask is None or mask[t]] for bos, eos in bounds]
    sets = {"batch": [0] * len(rows), "sequence": list(range(len(rows)))}
    set_of = sets[scope] if scope in sets else group_ids.tolist()
    out = [0.0] * q.shape[0]
    x = q.double().tolist()
    for i, kept in enumerate(rows):
        values = [x[t] for j, others in enumerate(rows) if set_of[j] == set_of[i] for t in others]
        mu = math.fsum(values) / max(len(values), 1)
        sigma = math.sqrt(math.fsum((v - mu) ** 2 for v in values) / max(len(values), 1))
        sigma = max(sigma, min_std)
        for t in kept:
            out[t] = (x[t] - mu * center) / (sigma + eps) if sigma > 0 else 0.0
        if kept and eos_rescore == "mean":
            out[kept[-1]] = math.fsum(out[t] for t in kept) / len(kept)
        for t in kept:
            if kl_coef:
                d = logprobs[t].item() - ref_logprobs[t].item()
                kl = {"abs": abs(d), "k1": d, "k2": d * d / 2, "k3": math.expm1(-d) + d}[kl_estimator]
                out[t] -= kl_coef * kl
    return torch.tensor(out, dtype=torch.float64)


def inputs(lengths, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(len(lengths))
    num_tokens, acc = sum(lengths), torch.promote_types(dtype, torch.float32)
    q = torch.randn(num_tokens, generator=g).mul(3).add(1).to(dtype)
    logprobs, ref_logprobs = torch.randn(2, num_tokens, generator=g, dtype=acc).sub(2).unbind()
    mask = torch.rand(num_tokens, generator=g) < 0.7
    group_ids = torch.randint(max(len(lengths) // 2, 1), (len(lengths),), generator=g)
    return tuple(x.to(device) for x in (q, cu_seqlens(lengths), mask, group_ids, logprobs, ref_logprobs))


CASES = {
    "released": lambda m, g, lp, ref: {"kl_coef": 0.01, "logprobs": lp, "ref_logprobs": ref},
    "rescored": lambda m, g, lp, ref: {"mask": m, "eos_rescore": "mean"},
    "sequence": lambda m, g, lp, ref: {"mask": m, "scope": "sequence", "center": True, "eos_rescore": "mean"},
    "group": lambda m, g, lp, ref: {"mask": m, "scope": "group", "group_ids": g, "center": True, "min_std": 0.5},
    "k1": lambda m, g, lp, ref: {"kl_coef": 0.5, "kl_estimator": "k1", "logprobs": lp, "ref_logprobs": ref},
    "k2": lambda m, g, lp, ref: {"kl_coef": 0.5, "kl_estimator": "k2", "logprobs": lp, "ref_logprobs": ref},
    "k3": lambda m, g, lp, ref: {"mask": m, "kl_coef": 0.5, "kl_estimator": "k3", "logprobs": lp, "ref_logprobs": ref},
    "everything": lambda m, g, lp, ref: {
        "mask": m,
        "scope": "group",
        "group_ids": g,
        "center": True,
        "eos_rescore": "mean",
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "logprobs": lp,
        "ref_logprobs": ref,
        "min_std": 0.1,
        "eps": 1e-3,
    },
}


def float32_path(q, cu, options):
    """What one would write with PyTorch's own operators, in the dtype of the result."""
    acc = torch.promote_types(q.dtype, torch.float32)
    q, mask = q.to(acc).cpu(), options.get("mask")
    mask = torch.ones_like(q, dtype=torch.bool) if mask is None else mask.cpu()
    num_sequences = cu.shape[0] - 1
    sequences = [range(*bounds) for bounds in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
    kept = [torch.tensor([t for t in rows if mask[t]], dtype=torch.int64) for rows in sequences]
    scope = options.get("scope", "batch")
    sets = {"batch": [0] * num_sequences, "sequence": list(range(num_sequences))}
    set_of = sets[scope] if scope in sets else options["group_ids"].tolist()
    out = torch.zeros_like(q)
    for i, rows in enumerate(kept):
        values = torch.cat([q[kept[j]] for j in range(num_sequences) if set_of[j] == set_of[i]])
        if not len(rows):
            continue
        sigma = values.std(correction=0).clamp(min=options.get("min_std", 0.0))
        y = (q[rows] - values.mean() * options.get("center", False)) / (sigma + options.get("eps", 1e-8))
        y = y if sigma > 0 else torch.zeros_like(y)
        if options.get("eos_rescore") == "mean":
            y[-1] = y.mean()
        if options.get("kl_coef"):
            d = options["logprobs"].cpu()[rows] - options["ref_logprobs"].cpu()[rows]
            estimators = {"abs": d.abs(), "k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}
            y = y - options["kl_coef"] * estimators[options.get("kl_estimator", "abs")]
        out[rows] = y
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_the_definition(lengths, case, device):
    q, cu, *rest = inputs(lengths, device=device)
    options = CASES[case](*rest)
    exact = oracle(q, cu, **options)
    peer = float32_path(q, cu, options)
    assert_as_accurate(q_token_rewards(q, cu, **options), exact, peer)


@pytest.fixture
def through_references(monkeypatch):
    monkeypatch.setattr("qrm_fast.ops.moments._moments", _moments.reference)
    monkeypatch.setattr("qrm_fast.ops.q_token_rewards._q_token_rewards", _q_token_rewards.reference)


@pytest.mark.parametrize("case", ["released", "everything"])
def test_reference_agrees_with_the_definition(case, through_references):
    q, cu, *rest = inputs([0, 3, 1, 7, 63, 0, 65])
    options = CASES[case](*rest)
    assert_as_accurate(q_token_rewards(q, cu, **options), oracle(q, cu, **options), float32_path(q, cu, options))


@pytest.fixture
def through_triton(monkeypatch):
    """The public function through the launchers of the Triton kernels, with programs of 32 rows instead of 1024."""
    monkeypatch.setitem(triton_moments.ROWS, "BT", 32)
    monkeypatch.setitem(triton_kernels.LAUNCH, "BT", 32)
    monkeypatch.setattr("qrm_fast.ops.moments._moments", triton_moments.launch)
    monkeypatch.setattr("qrm_fast.ops.q_token_rewards._q_token_rewards", triton_kernels.launch)


@pytest.mark.usefixtures("through_triton")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 3, 1, 7, 63, 0, 165]], ids=str)
def test_triton_agrees_with_the_definition(lengths, case, triton_device):
    q, cu, *rest = inputs(lengths, device=triton_device)
    options = CASES[case](*rest)
    assert_as_accurate(q_token_rewards(q, cu, **options), oracle(q, cu, **options), float32_path(q, cu, options))


@pytest.mark.usefixtures("through_triton")
def test_triton_bits_depend_on_the_own_sequence_only(triton_device):
    q, cu, mask, *_ = inputs([1, 70, 3], device=triton_device)
    options = {"scope": "sequence", "center": True, "eos_rescore": "mean"}
    own = torch.tensor([0, 70], device=triton_device)
    packed = q_token_rewards(q, cu, mask=mask, **options)
    assert torch.equal(packed[1:71], q_token_rewards(q[1:71].clone(), own, mask=mask[1:71].clone(), **options))


@pytest.mark.usefixtures("through_triton")
def test_triton_stays_inside_its_tensors(triton_device):
    q = torch.ones(30, device=triton_device)[5:25]
    for boundaries in [-50, 5, 20], [0, 15, 5], [0, 10**9, 20], [0, 3, 3]:
        cu = torch.tensor(boundaries, device=triton_device)
        result = q_token_rewards(q, cu, scope="sequence", eos_rescore="mean", min_std=0.5)
        assert result.shape == q.shape and not (result > 2.001).any()


@pytest.mark.parametrize("by", ["through_references", "through_triton"])
def test_ids_out_of_range_give_nan_where_nothing_can_be_raised(by, request, triton_device):
    request.getfixturevalue(by)
    q, cu, ids = (x.to(triton_device) for x in (SCORES, CU, torch.tensor([2, 1])))
    result = q_token_rewards(q, cu, scope="group", group_ids=ids)
    assert result[:4].isnan().all()
    assert torch.equal(result[4:], q_token_rewards(q[4:], cu[1:] - 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    q, cu, *rest = inputs([3, 1, 7, 63, 65], dtype)
    options = CASES["everything"](*rest)
    result = q_token_rewards(q, cu, **options)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_accurate(result, oracle(q, cu, **options), float32_path(q, cu, options))


@pytest.mark.parametrize("scope", ["batch", "sequence", "group"])
def test_masked_rows_are_never_read(scope, device):
    q, cu, mask, group_ids, logprobs, ref_logprobs = inputs([5, 9, 40, 3], device=device)
    options = CASES["everything"](mask, group_ids, None, None) | {"scope": scope}
    options["group_ids"] = group_ids if scope == "group" else None
    results = []
    for poison in 0.0, math.nan, math.inf:
        options["logprobs"], options["ref_logprobs"] = (x.where(mask, poison) for x in (logprobs, ref_logprobs))
        results.append(q_token_rewards(q.where(mask, poison), cu, **options))
        assert not results[-1][~mask].any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [False, True])
def test_zero_spread(dtype, center):
    q, cu = torch.full((7000,), 0.1, dtype=dtype), torch.tensor([0, 6997, 7000])
    assert not q_token_rewards(q, cu, center=center).any()
    floored = q_token_rewards(q, cu, center=center, min_std=0.5, eps=0.0)
    torch.testing.assert_close(floored, torch.full_like(q, 0.0 if center else 0.2))
    assert not q_token_rewards(torch.tensor([3.0]), torch.tensor([0, 1]), scope="sequence").any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_in_its_sequence(poison, device):
    """It is left out of the statistics; the re-scored last action holds the mean of its sequence."""
    lengths = [4, 3, 5]
    q, cu, *_ = inputs(lengths, device=device)
    q[5] = poison
    result = q_token_rewards(q, cu, center=True, eos_rescore="mean")
    spoilt = torch.tensor([poison, poison], device=device)
    assert torch.equal(result[5:7].nan_to_num(7.0), spoilt.nan_to_num(7.0)) and result.isfinite().sum() == 10
    kept = torch.arange(12, device=device) != 5
    expected = q_token_rewards(q, cu, center=True, eos_rescore="mean", mask=kept)
    assert torch.equal(result[:4], expected[:4]) and torch.equal(result[7:], expected[7:])


@pytest.mark.unpoisoned
def test_bits_depend_on_the_own_sequence_only():
    lengths = [1, 1025, 3, 0, 2049, 7, 1024]
    q, cu, mask, _, logprobs, ref_logprobs = inputs(lengths)
    options = CASES["sequence"](mask, None, None, None) | {"kl_coef": 0.1, "kl_estimator": "k3"}
    packed = q_token_rewards(q, cu, logprobs=logprobs, ref_logprobs=ref_logprobs, **options)
    for bos, eos in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        own = {"mask": mask[bos:eos], "logprobs": logprobs[bos:eos], "ref_logprobs": ref_logprobs[bos:eos]}
        alone = q_token_rewards(q[bos:eos], torch.tensor([0, eos - bos]), **(options | own))
        assert torch.equal(alone, packed[bos:eos])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("scope", ["batch", "sequence", "group"])
def test_bits_do_not_depend_on_threads(scope):
    q, cu, mask, group_ids, *_ = inputs([1 + i * 37 % 3000 for i in range(90)])
    group_ids = group_ids if scope == "group" else None
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in 1, 2, 2:
            torch.set_num_threads(num_threads)
            results.append(q_token_rewards(q, cu, mask=mask, scope=scope, group_ids=group_ids, eos_rescore="mean"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offset_slices_and_index_dtypes(dtype):
    q, cu, _, group_ids, *_ = inputs([3, 2, 4])
    wide = torch.full((30,), math.nan)
    wide[7:16] = q
    result = q_token_rewards(wide[7:16], cu.to(dtype), scope="group", group_ids=group_ids.to(dtype))
    assert torch.equal(result, q_token_rewards(q, cu, scope="group", group_ids=group_ids))


def test_zero_coefficient_skips_the_penalty():
    broken = torch.full_like(SCORES, -math.inf)
    result = q_token_rewards(SCORES, CU, kl_coef=0.0, logprobs=broken, ref_logprobs=broken)
    assert torch.equal(result, q_token_rewards(SCORES, CU))


def test_not_differentiable():
    leaf = SCORES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="is not differentiable"):
        q_token_rewards(leaf, CU).sum().backward()


def test_opcheck():
    q, cu, mask, _, logprobs, ref_logprobs = inputs([3, 0, 4, 6])
    stats = torch.tensor([[13.0, 0.5, 20.0]], dtype=torch.float64)
    torch.library.opcheck(
        _q_token_rewards.op, (q, cu, stats, mask, True, True, logprobs, ref_logprobs, 0.1, "k3", 0.0, 1e-8)
    )
    stats = stats.expand(4, 3).contiguous()
    torch.library.opcheck(
        _q_token_rewards.op, (q.bfloat16(), cu, stats, None, False, False, None, None, 0.0, "abs", 0.1, 1e-8)
    )


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(q_token_rewards, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2], [1, 2]:
        q, cu, *rest = inputs(lengths)
        options = CASES["everything"](*rest)
        assert torch.equal(compiled(q, cu, **options), q_token_rewards(q, cu, **options))


X = torch.zeros(7)
IDS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"q must be \[T\] .* got \[7, 1\] float32", {"q": torch.zeros(7, 1)}),
        (TypeError, r"q must be \[T\] .* got \[7\] int64", {"q": torch.zeros(7, dtype=torch.int64)}),
        (TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64, got \[3\] float32", {"cu_seqlens": CU.float()}),
        (ValueError, "cu_seqlens must have S\\+1 entries for some S >= 0, got .0.", {"cu_seqlens": CU[:0]}),
        (ValueError, "cu_seqlens must end at the number of packed rows, 7, got 4", {"cu_seqlens": CU[:2]}),
        (ValueError, "cu_seqlens must start at 0, got 4", {"cu_seqlens": CU[1:], "scope": "sequence"}),
        (TypeError, r"mask must be \[T\] bool, got \[7\] float32", {"mask": X}),
        (ValueError, "scope must be one of batch, sequence, group, got 'chunk'", {"scope": "chunk"}),
        (ValueError, "eos_rescore must be one of none, mean, got 'last'", {"eos_rescore": "last"}),
        (ValueError, "kl_estimator must be one of abs, k1, k2, k3, got 'full'", {"kl_estimator": "full"}),
        (ValueError, "group_ids must be given for scope 'group' only, got None for 'group'", {"scope": "group"}),
        (ValueError, "group_ids must be given for scope 'group' only, got a tensor for 'batch'", {"group_ids": IDS}),
        (ValueError, r"group_ids must lie in \[0, 2\), got 2 at index 1", {"scope": "group", "group_ids": CU[:2] // 2}),
        (ValueError, r"group_ids must lie in \[0, 2\), got -1 at index 0", {"scope": "group", "group_ids": IDS - 1}),
        (ValueError, r"group_ids must be \[S\] .* with S = 2, got \[3\] int64", {"scope": "group", "group_ids": CU}),
        (ValueError, "min_std and eps must be >= 0, got -1.0 and 1e-08", {"min_std": -1.0}),
        (ValueError, "logprobs must be given for kl_coef = 0.1, got None", {"kl_coef": 0.1}),
        (ValueError, "ref_logprobs must be given for kl_coef = 0.1, got None", {"kl_coef": 0.1, "logprobs": X}),
        (TypeError, r"logprobs must be \[T\] float32, got \[7\] bfloat16", {"logprobs": X.bfloat16()}),
        (
            ValueError,
            "process_group joins the statistics of scope 'batch' only, got 'sequence'",
            {"scope": "sequence", "process_group": object()},
        ),
    ],
)
def test_bad_input(error, message, options):
    arguments = {"q": X, "cu_seqlens": CU} | options
    with pytest.raises(error, match=message):
        q_token_rewards(**arguments)
